# cexec is one file to use as it is; this makes links to it, shows it, tests it, installs it.

PYTHON ?= python3
PREFIX ?= /usr/local
DESTDIR ?=
APPLETS = cexec cservice ckeygen crat cproxy
BINDIR = $(DESTDIR)$(PREFIX)/bin
MANDIR = $(DESTDIR)$(PREFIX)/share/man
PAGES = $(APPLETS:=.1)
PAGES7 = cexec.7 cexec-recipes.7
VENV = .venv
# What mandoc finds wrong with pages that refer to others, where these are not installed.
NOT_INSTALLED = referenced manual not found\|mandoc.db
LINT = check --isolated --line-length 120 --select E,F,W,B,C4,PLE,RUF100 --per-file-ignores cexec.py:E402,cexec.py:B905,test_cexec.py:B007,test_cexec.py:B023 --target-version py37

# Sets $python to one that can import $tool: $(PYTHON), or else its own in $(VENV), made if need be, with $packages.
BASE = import sys; print(sys.base_prefix, sys.version)
USE_TOOL = python=$$($(PYTHON) -c 'import sys; print(sys.executable)') || exit 1; \
	if ! "$$python" -c "import $$tool" 2>/dev/null; then \
		if [ "$$("$$python" -c '$(BASE)')" != "$$($(VENV)/bin/python -c '$(BASE)' 2>/dev/null)" ]; then \
			"$$python" -m venv --clear $(VENV) || exit 1; \
		fi; \
		if ! $(VENV)/bin/python -c "import $$tool" 2>/dev/null; then \
			echo "$$python has no $$tool: installing it into $(VENV)"; \
			$(VENV)/bin/python -m pip install -q $$packages || exit 1; \
		fi; \
		python=$(VENV)/bin/python; \
	fi

WITH_PYTEST = tool="xdist, numpy, cloudpickle, joblib, nbconvert, ipykernel" packages="pytest pytest-xdist numpy cloudpickle joblib nbconvert ipykernel"; $(USE_TOOL)
# Tests at a time: they mostly wait.
AT_ONCE = 4

# The part of the tests that is run on every Python between the oldest and the newest of $(PYTHONS).
SMALL = test_first_job or test_oracle or sigterm or twenty_megabytes
PYTHONS ?= $(shell for n in 6 7 8 9 10 11 12 13 14 15; do \
	ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/*/bin/python3.$$n /usr/local/bin/python3.$$n /usr/bin/python3.$$n \
	2>/dev/null | head -n 1; done)

.PHONY: all bin demo test test-all check bench soak install uninstall clean

all: bin

bin:
	@mkdir -p bin
	$(PYTHON) cexec.py --install bin

demo:
	@PYTHON="$(PYTHON)" sh .ci/demo

test:
	@$(WITH_PYTEST); "$$python" -m pytest -q -n $(AT_ONCE) --dist loadgroup --max-worker-restart=0 test_cexec.py

# Runs the tests under $(PYTHON), and what they test on each of $(PYTHONS), for half an hour or so.
test-all:
	@$(WITH_PYTEST); \
	for under_test in $(PYTHONS); do \
		case $$under_test in $(firstword $(PYTHONS))|$(lastword $(PYTHONS))) some=;; *) some="$(SMALL)";; esac; \
		echo "== $$under_test $${some:+, $$some}"; \
		CEXEC_TEST_PYTHON=$$under_test "$$python" -m pytest -q -n $(AT_ONCE) --dist loadgroup --max-worker-restart=0 test_cexec.py -k "$$some" || failed="$$failed $$under_test"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

# Without the package distributed, which cannot be installed where there is no network, dask's rows are left out.
bench:
	@tool=distributed packages=distributed; \
	BENCH_DASK=$$($(USE_TOOL) >&2; echo "$$python") $(PYTHON) .ci/bench

soak:
	@$(PYTHON) .ci/soak

check:
	@tool=ruff packages=ruff; $(USE_TOOL); set -x; "$$python" -m ruff $(LINT) cexec.py test_cexec.py .ci/bench .ci/soak
	@if command -v mandoc >/dev/null; then set -x; ! mandoc -Tlint man/*.[17] 2>&1 | grep -v '$(NOT_INSTALLED)'; \
	else echo "mandoc is not installed: the manual pages were not checked"; test -z "$$CI"; fi
	@if command -v shellcheck >/dev/null; then set -x; shellcheck .ci/run .ci/demo; \
	else echo "shellcheck is not installed: the scripts were not checked"; test -z "$$CI"; fi

install:
	mkdir -p "$(BINDIR)" "$(MANDIR)/man1" "$(MANDIR)/man7"
	install -m 755 cexec.py "$(BINDIR)/cexec.py"
	for applet in $(APPLETS); do ln -sf cexec.py "$(BINDIR)/$$applet" || exit 1; done
	for page in $(PAGES); do install -m 644 "man/$$page" "$(MANDIR)/man1/$$page" || exit 1; done
	for page in $(PAGES7); do install -m 644 "man/$$page" "$(MANDIR)/man7/$$page" || exit 1; done

uninstall:
	rm -f "$(BINDIR)/cexec.py" $(PAGES7:%="$(MANDIR)/man7/%")
	for applet in $(APPLETS); do rm -f "$(BINDIR)/$$applet" "$(MANDIR)/man1/$$applet.1" || exit 1; done

clean:
	rm -rf bin demo.svg $(VENV) __pycache__ .pytest_cache .ruff_cache .benchmarks
