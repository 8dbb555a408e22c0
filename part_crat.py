"""crat -t, messages, recipes."""
import contextlib
import errno
import fcntl
import functools
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import time

import pytest

import cexec
from test_cexec import *  # noqa: F401,F403
from test_cexec import PATIENCE, Tmux, fatal, free_port, need, need_root, put, read, until


# ---------------------------------------------------------------------------
# crat -t
# ---------------------------------------------------------------------------

class Alerts:
    """Says alerts to a cluster's group, as clients do."""

    def __init__(self, cluster, pub=None):
        self.pub = cexec.open_pub(pub or cluster.pub)
        self.group = cexec.Group(cluster.env["GROUP"])
        self.socks = cexec.open_speakers()

    def say(self, worker="10.0.0.3", event=cexec.ALERT_EXITED, status=0, count=1, pub=None, reason="", **fields):
        fields = dict({"milliseconds": 1500, "bytes_in": 2000, "bytes_out": 1000}, **fields)
        for _ in range(count):
            self.group.send(self.socks, cexec.make_datagram(
                cexec.ALERT, pub or self.pub, os.urandom(16), 0, event=event, worker=worker, worker_id=bytes(8),
                status=status, reason=reason, **fields))

    def forge(self, worker="10.0.0.66", **fields):
        self.say(worker, pub=self.pub._replace(secret=bytes(32)), **fields)

    def close(self):
        for sock in self.socks.values():
            sock.close()


@pytest.fixture
def alerts(cluster):
    made = Alerts(cluster)
    yield made
    made.close()


@pytest.fixture
def window(cluster):
    """A terminal of tmux; window.crat(options) runs crat -t for the cluster's pub in it."""
    need("tmux", "bash", "stty")
    made = Tmux(cluster)

    def crat(options="", env=""):
        made.line("clear; echo bef'ore'; %s %s -t %s $PUB; echo sta'tus'=$?"
                  % (env, " ".join(map(shlex.quote, cluster.argv("crat"))), options))
        made.shows(r"^crat: 127\.255\.255\.255:\d+, app.pub, \d+s; q ends it")
    made.crat = crat
    yield made
    made.close()


def crat_pid(cluster):
    def found():
        with contextlib.suppress(OSError):
            return [pid for pid in cluster.alive() if b"\0crat\0" in read("/proc/%d/cmdline" % pid)]
    return until(found, "crat")[0]


def row(screen, worker):
    """The words of a worker's row in the table."""
    return [line.split() for line in screen.splitlines() if line.startswith(worker + " ")]


def test_the_log_as_a_screen(cluster, alerts, window):
    modes = window.modes()
    window.crat()
    assert "before" not in window.screen()
    alerts.say(count=3)
    alerts.say(status=7)
    alerts.say(event=cexec.ALERT_SIGNALLED, status=9)
    alerts.say(event=cexec.ALERT_COMPLAINT, reason="wrong certificate")
    alerts.say("10.0.0.4")
    window.shows("^4 done, 2 failed, 1 complained about, 12.0 kB in, 6.0 kB out$")
    screen = window.screen()
    assert row(screen, "WORKER") == [["WORKER", "DONE", "FAILED", "COMPLAINTS", "IN", "OUT", "TIME", "MEAN", "LAST"]]
    assert row(screen, "10.0.0.3")[0][1:-2] == "3 2 1 10.0 kB 5.0 kB 7s 1.500 s".split()
    assert row(screen, "10.0.0.4")[0][1:4] == ["1", "0", "0"]
    assert re.search(r"^\d\d:\d\d:\d\d 127.0.0.1 rats out 10.0.0.3 for app.pub: 1.500 s, ", screen, re.M)
    assert len(re.findall("completed by", screen)) == 6
    window.keys("q")
    window.shows("^status=0$")
    screen = window.screen()
    assert "before" in screen and "q ends it" not in screen
    assert re.search(r"^crat: \S+, app.pub, \d+s\n4 done, 2 failed, 1 complained about.*\nWORKER.*\n10.0.0.3 .*\n"
                     r"10.0.0.4 .*\nstatus=0$", screen, re.M)
    assert window.modes() == modes
    assert window.do("display-message", "-p", "#{cursor_flag} #{alternate_on} #{wrap_flag}").split() == ["1", "0", "1"]


@pytest.mark.parametrize("end, status", [("C-c", 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), ("C-\\", 131)])
def test_the_screen_is_left_however_it_ends(cluster, alerts, window, end, status):
    modes = window.modes()
    window.line("ulimit -c 0")
    window.crat()
    alerts.say()
    window.shows("^1 done")
    if isinstance(end, str):
        window.keys(end)
    else:
        os.kill(crat_pid(cluster), end)
    window.shows("^1 done, 0 failed, .*\nWORKER .*\n10.0.0.3 ")
    if end == "C-c":                # then bash leaves out the rest of the line
        window.line("echo sta'tus'=$?")
    window.shows("^status=%d$" % status)
    assert "before" in window.screen() and window.modes() == modes
    assert window.do("display-message", "-p", "#{cursor_flag} #{alternate_on} #{wrap_flag}").split() == ["1", "0", "1"]


def test_the_screen_stopped_and_continued(cluster, alerts, window):
    modes = window.modes()
    window.crat()
    window.keys("C-z")
    window.shows("Stopped")
    assert window.modes() == modes and "q ends it" not in window.screen()
    window.line("clear; bg")
    window.shows(r"^\[1\]\+ ")
    window.line("echo st'ill'")
    window.shows("^still$")
    assert "q ends it" not in window.screen()
    window.line("fg")
    window.shows("q ends it")
    alerts.say()
    window.shows("^1 done")
    window.keys("q")
    window.shows("^1 done.*\nWORKER .*\n10.0.0.3 .*\n")
    window.line("echo sta'tus'=$?")
    window.shows("^status=0$")
    assert window.modes() == modes


def is_whole_picture(window, columns, lines):
    """Whether the first line and, where there is room, the last alert of the log are on the screen, and no more."""
    shown = window.screen().rstrip("\n").splitlines()
    return shown and len(shown) <= lines and shown[0].startswith("crat: ") and (
        columns < 60 or "10.0.0.49" in shown[-1]) and (columns != 60 or shown[-1].endswith(" exit c"))


def test_the_screen_fits_the_window(cluster, alerts, window):
    """More workers than lines: those that did most, and how many more; the last lines of the log below."""
    window.crat()
    for number in range(50):
        alerts.say("10.0.0.%d" % number, count=1 + (number == 17))
    window.shows("^51 done")
    screen = window.screen().splitlines()
    assert screen[4].startswith("10.0.0.17 ") and screen[5].startswith("10.0.0.0 ")
    more = int(next(line for line in screen if line.endswith(" more")).split()[0])
    assert more + sum(line.startswith("10.0.0.") for line in screen) == 50
    assert "10.0.0.49" in screen[29] and "10.0.0.48" in screen[28]
    for columns, lines in ((60, 12), (30, 5), (20, 2), (120, 120)):
        window.do("resize-window", "-x", str(columns), "-y", str(lines))
        until(functools.partial(is_whole_picture, window, columns, lines), "a picture of that size")
    assert "more" not in window.screen()
    window.do("resize-window", "-x", "100", "-y", "20")
    window.keys("q")
    window.shows("^status=0$")
    assert len(window.screen().splitlines()) == 20 and re.search(r"^crat: .*\n51 done", window.screen(), re.M)


def test_the_screen_counts_apart_what_nothing_proves(cluster, alerts, window):
    window.crat()
    alerts.forge(count=5)
    alerts.forge("10.0.0.3", event=cexec.ALERT_COMPLAINT)
    alerts.say()
    window.shows("^1 done, 0 failed, 0 complained about, 2.0 kB in, 1.0 kB out; unverified: 5 done, 0 failed, 1 compl")
    rows = window.screen().splitlines()[4:7]
    assert [line.split()[:4] for line in rows] == [
        ["10.0.0.3", "1", "0", "0"], ["10.0.0.66", "(unverified)", "5", "0"], ["10.0.0.3", "(unverified)", "0", "0"]]


def test_the_screen_has_room_for_wide_characters(cluster, window):
    wide = cluster.path("\u5de5\u4f5c\u6a5f\u68b0" * 6 + ".pub")
    os.rename(cluster.pub, wide)
    said = Alerts(cluster, wide)
    window.line("clear; %s -t '%s'" % (" ".join(map(shlex.quote, cluster.argv("crat"))), wide))
    window.shows("q ends it")
    said.say("\u6a5f1", reason="\u68b0" * 40 + "\x1b[2J")
    said.say("m2")
    window.shows("^2 done")
    screen = window.screen().splitlines()
    assert len(screen[7:]) >= 2 and all(cexec.columns(line) <= 100 for line in screen)
    place = screen[3].index("DONE")
    assert [cexec.columns(screen[line][:screen[line].index(" 1 ")]) + 1 for line in (4, 5)] == [place] * 2
    window.keys("q")
    said.close()


@pytest.mark.parametrize("no_color", ["", "1"])
def test_the_screen_has_colour_unless_told(cluster, alerts, window, no_color):
    window.crat(env="NO_COLOR=" + no_color)
    alerts.say(event=cexec.ALERT_COMPLAINT)
    window.shows("rats out")
    shown = window.do("capture-pane", "-pe")
    assert ("\x1b[" in shown) == (not no_color) == ("\x1b[31m" in shown)


@contextlib.contextmanager
def on_a_pty(cluster, *words, size=(24, 80), env=None):
    """crat -t at a terminal in the test's hands: process.master is its other side."""
    master, slave = pty.openpty()
    cexec.set_window(slave, *size)
    process = cluster.start("crat", "-t", *words, stdin=slave, stdout=slave, stderr=subprocess.DEVNULL,
                            env=dict({"TERM": "xterm"}, **(env or {})), start_new_session=True)
    os.close(slave)
    process.master, process.seen = master, b""

    def look():
        while select.select([master], [], [], 0)[0]:
            process.seen += os.read(master, 65536)
        return process.seen
    process.look = look
    until(lambda: b"q ends it" in look(), "a picture")
    yield process
    os.close(master)


def is_full(master):
    """Whether nothing more comes to a pty's other side, where there is something to be read."""
    import struct
    import termios
    counts = []
    for _ in range(3):
        counts.append(struct.unpack("i", fcntl.ioctl(master, termios.FIONREAD, bytes(4)))[0])
        time.sleep(2 * cexec.REDRAW_SECONDS)
    return counts[0] > 1000 and counts[0] == counts[2]


def test_a_flood_of_alerts_is_drawn_now_and_then(cluster, alerts):
    with on_a_pty(cluster, cluster.pub) as crat:
        began, crat.seen, sent = time.monotonic(), b"", 0
        while time.monotonic() - began < 2:
            alerts.say(count=20)
            sent += 20
            time.sleep(0.005)
        until(lambda: b"%d done" % sent in crat.look() or time.monotonic() - began > 5, "the last of them")
        drawn, seconds = crat.look().count(b"\x1b[H"), time.monotonic() - began
        assert sent > 500 and 0 < drawn <= seconds / cexec.REDRAW_SECONDS + 2


def test_a_terminal_that_takes_nothing(cluster, alerts):
    """TERM ends it all the same: a picture is more than a pty holds."""
    with on_a_pty(cluster, cluster.pub, size=(300, 900)) as crat:
        alerts.say("w" * 800, count=50)
        until(lambda: b"50 done" in crat.look(), "the first of them")
        alerts.say("w" * 800, count=300)
        until(lambda: is_full(crat.master), "a terminal that takes no more")
        crat.terminate()
        assert crat.wait(PATIENCE) == -signal.SIGTERM


def test_a_terminal_that_goes_away(cluster):
    with on_a_pty(cluster, cluster.pub) as crat:
        os.close(os.dup2(os.open(os.devnull, os.O_RDONLY), crat.master))
        os.open(os.devnull, os.O_RDONLY)
        assert crat.wait(PATIENCE) in (0, -signal.SIGHUP)


def test_accounts_are_bounded():
    """And nobody without a key pushes true ones out."""
    tallies = cexec.Tallies()
    record = {"event": "exited", "status": 0, "seconds": 1.0, "bytes_in": 1, "bytes_out": 2}
    tallies.add(dict(record, verified=True, worker="true"))
    for number in range(cexec.WORKERS_MAX + 500):
        tallies.add(dict(record, verified=False, worker="%d" % number + "x" * 1000))
    assert len(tallies.workers[False]) == cexec.WORKERS_MAX and list(tallies.workers[True]) == ["true"]
    assert max(map(len, tallies.workers[False])) == 64
    assert "%d done" % (cexec.WORKERS_MAX + 500) in tallies.total()
    for room in range(-3, 30):
        assert len(tallies.table(room)) in (0, room) and len(tallies.table(room)) <= max(0, room)
    assert tallies.table(5)[1].startswith("true ") and tallies.table(5)[-1] == "%d more" % (cexec.WORKERS_MAX - 2)


@pytest.mark.parametrize("text, width, fits", [
    ("abc", 3, "abc"), ("abc", 2, "ab"), ("abc", 0, ""), ("\u6a5f\u6a5f", 3, "\u6a5f"), ("e\u0301e", 1, "e\u0301")])
def test_fitted(text, width, fits):
    assert cexec.fitted(text, width) == fits


@pytest.mark.parametrize("words, env, message", [
    (["-t"], {}, "-t: standard output is no terminal that can be drawn on (without -t the log is lines)"),
    (["-jt"], {}, "-j and -t: lines for a program, or a screen for a person")])
def test_no_screen(cluster, words, env, message):
    done = cluster.run("crat", *words, cluster.pub, env=env)
    assert (done.returncode, done.stdout, done.stderr.decode()) == (100, b"", "crat: %s\n" % message)


@pytest.mark.parametrize("options, env, message", [
    ("", "TERM=dumb", "standard output is no terminal"), ("-v", "", "what -v says would spoil the screen")])
def test_no_screen_on_this_terminal(cluster, window, options, env, message):
    window.line("clear; %s %s -t %s $PUB; echo sta'tus'=$?"
                % (env, " ".join(map(shlex.quote, cluster.argv("crat"))), options))
    window.shows("^status=100$")
    assert message in window.screen().replace("\n", "")


# ---------------------------------------------------------------------------
# Messages
# ---------------------------------------------------------------------------

def test_a_command_that_is_not_there_yet(cluster):
    """cservice says so at once, and goes on: it serves as soon as there is one."""
    command = cluster.path("later")
    worker = cluster.worker(command)
    assert "cservice: warning: %s: no such command: until there is one" % command in read(worker.log).decode()
    put(command, "#!/bin/sh\nexec cat\n", 0o600)
    other = cluster.worker(command)
    assert "cservice: warning: %s: not executable: until it is (chmod +x)" % command in read(other.log).decode()
    os.chmod(command, 0o700)
    assert cluster.client(input=b"hello").stdout == b"hello"
    third = cluster.worker("no-such-command-here")
    assert "no-such-command-here: no such command in PATH: until" in read(third.log).decode()
    fourth = cluster.worker("cat", verbose=False)
    assert read(fourth.log) == b""


@pytest.mark.parametrize("code, said", [
    (errno.EACCES, "Permission denied: let the user with the id %d read it" % os.geteuid()), (errno.EIO, ""),
    (errno.EISDIR, ": name the %s key in it")])
def test_a_key_that_cannot_be_read(monkeypatch, code, said):
    def refuse(path):
        raise OSError(code, os.strerror(code))
    monkeypatch.setattr(cexec, "read_text", refuse)
    for name, opening in (("public", cexec.open_pub), ("private", cexec.open_key)):
        message = fatal(111, opening, "app")
        assert message.startswith("app: " + os.strerror(code)) and (said % name if "%" in said else said) in message


@pytest.mark.parametrize("applet", sorted(cexec.APPLETS))
def test_help_tells_where_the_environment_is_explained(one, applet):
    assert one.run(applet, "-h").stdout.decode().endswith(
        "environment variables, examples and the rest: %s(1)\n" % applet)


# ---------------------------------------------------------------------------
# The manual's recipes
# ---------------------------------------------------------------------------

def recipe(page, beginning):
    """A literal block of a manual page, as man shows it."""
    text = read(os.path.join(os.path.dirname(cexec.__file__), "man", page)).decode()
    for block in re.findall(r"^\.Bd -literal -offset indent\n(.*?)^\.Ed$", text, re.M | re.S):
        plain = block.replace("\\&", "").replace("\\(dq", '"').replace("\\e", "\\")
        if plain.startswith(beginning):
            return plain
    raise AssertionError("%s has no block that begins with %r" % (page, beginning))


@pytest.fixture
def linked_cluster(cluster):
    """A cluster with the applets' links in PATH; linked_cluster.sh(command) runs one in its directory."""
    links = cluster.path("links")
    os.mkdir(links)
    os.symlink(cluster.launch[0], os.path.join(links, "python3"))
    cluster.run("--install", links, check=True)
    cluster.env["PATH"] = links + ":" + cluster.env["PATH"]

    def sh(command, **env):
        return subprocess.run(["bash", "-c", command], cwd=cluster.directory, env=cluster.environment(env),
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              timeout=PATIENCE * 2)
    cluster.sh = sh
    return cluster


def script(cluster, page, name):
    put(cluster.path(name), recipe(page, "#!/bin/sh\n# %s:" % name), 0o700)


@pytest.fixture
def compiling(linked_cluster):
    """A project in C, a worker that compiles, and the two scripts of the manual."""
    need("cc", "make", "bash")
    cluster = linked_cluster
    for name in ("ccexec", "ccworker"):
        script(cluster, "cexec.1", name)
    cluster.env["CCEXEC_PUB"] = cluster.pub
    cluster.env["TMPDIR"] = cluster.path("tmp")
    os.mkdir(cluster.path("tmp"))
    os.mkdir(cluster.path("include"))
    put(cluster.path("include/all.h"), "#define EACH %s\n#define X(n) int f##n(int);\nEACH\n#undef X\n"
        % " ".join("X(%d)" % n for n in range(12)))
    for n in range(12):
        put(cluster.path("f%d.c" % n), '#include "all.h"\nint f%d(int x) { return x + %d * FACTOR; }\n' % (n, n))
    put(cluster.path("main.c"), '#include "all.h"\n#include <stdio.h>\nint main(void) { int s = 0;\n'
        "#define X(n) s = f##n(s);\nEACH\n" 'printf("%d\\n", s); return 0; }\n')
    put(cluster.path("Makefile"), "CFLAGS = -O2 -Wall -MMD -Iinclude -DFACTOR=2\nobjects = $(patsubst %.c,%.o,"
        "$(wildcard *.c))\nprogram: $(objects)\n\t$(CC) -o $@ $(objects)\n-include $(objects:.o=.d)\n")
    cluster.compiler = cluster.worker(cluster.path("ccworker"))
    return cluster


def compiled(cluster):
    names = [name for name in os.listdir(cluster.directory) if name.endswith((".o", ".d"))]
    return {name: read(cluster.path(name)) for name in names}


def test_make_compiles_on_workers(compiling):
    """The objects and dependencies are those of the compiler here."""
    done = compiling.sh("make -j8 CC=./ccexec && ./program")
    assert done.returncode == 0 and done.stdout.endswith(b"\n132\n"), done.stdout
    there = compiled(compiling)
    assert len(there) == 26 and read(compiling.compiler.log).count(b"ended, done") == 13
    compiling.sh("rm -f *.o *.d program; make -j8 CC=cc")
    assert compiled(compiling) == there
    assert not os.listdir(compiling.path("tmp"))
    compiling.sh("touch -d '1 hour' include/all.h")
    assert compiling.sh("make -q CC=./ccexec").returncode == 1          # by the dependencies of -MMD


def test_make_ends_with_the_compilers_error(compiling):
    put(compiling.path("f7.c"), "int f7(int x)\n{\n    return undeclared;\n}\n")
    done = compiling.sh("make -k -j8 CC=./ccexec")
    assert done.returncode == 2 and b"f7.c:3:12: error: " in done.stdout, done.stdout
    assert not os.path.exists(compiling.path("f7.o")) and len([n for n in compiled(compiling) if n[-1] == "o"]) == 12
    assert compiling.sh("./ccexec -c f7.c").returncode == 1
    nobody = {"GROUP": "127.255.255.255:%d" % free_port(), "CEXEC_TIMEOUT_ACCEPT": "1"}
    done = compiling.sh("./ccexec -DFACTOR=1 -Iinclude -c f8.c -o new.o", **nobody)
    assert done.returncode == 111 and done.stdout.startswith(b"cexec: no worker answered"), done.stdout
    assert not os.path.exists(compiling.path("new.o")) and not os.listdir(compiling.path("tmp"))


@pytest.mark.parametrize("words, made", [
    ("-c f1.c", "f1.o"), ("-c -o'a b.o' f1.c", "a b.o"), ("f1.c -c -o x/y.o -MD", "x/y.d"),
    ("-c -DQ='\"a b\"' f1.c", "f1.o"),
    ("-MMD -MFother -MTthat -c f1.c -o z.o", "other"), ("-S f1.c", "f1.s"),
    ("-shared -fPIC f1.c f2.c -o b.so", "b.so"),
    ("-O3 -std=c99 -fno-common -c f1.c", "f1.o"), ("-c f1.c f2.c", "f2.o"), ("-E f1.c -o e", "e"),
    ("-march=native -c f1.c", "f1.o"), ("-g3 -c f1.c", "f1.o"), ("-pg -c f1.c", "f1.o"),
    ("-include include/all.h -D Y -c f1.c", "f1.o"), ("--param=ssp-buffer-size=4 -c f1.c", "f1.o"),
    ("-Wa,--noexecstack -c f1.c", "f1.o")])
def test_ccexec_is_as_cc(compiling, words, made):
    os.mkdir(compiling.path("x"))
    results = []
    for compiler in ("cc", "./ccexec"):
        done = compiling.sh("%s -Iinclude -DFACTOR=3 %s" % (compiler, words))
        assert done.returncode == 0, done.stdout
        results.append((done.stdout, compiled(compiling), read(compiling.path(made))))
        os.unlink(compiling.path(made))
    assert results[0] == results[1]


SOUNDS = ["a b", "it's", 'quo"te', "$HOME", "plain"]


@pytest.mark.parametrize("tool", ["xargs", "parallel"])
def test_a_job_for_each_file_by(linked_cluster, tool):
    need(tool, "bash")
    linked_cluster.worker("tr", "a-z", "A-Z")
    put(linked_cluster.path("ogg.pub"), read(linked_cluster.pub).decode())
    commands = recipe("cexec.1", "find . -name '*.wav' -print0 | xargs")
    place = commands.index("parallel -j")
    for name in SOUNDS:
        put(linked_cluster.path(name + ".wav"), name)
    done = linked_cluster.sh(commands[:place] if tool == "xargs" else commands[place:], HOME=linked_cluster.directory)
    assert done.returncode == 0, done.stdout
    assert [read(linked_cluster.path(name + ".ogg")).decode() for name in SOUNDS] == [name.upper() for name in SOUNDS]


def test_readme_has_the_same_recipes():
    text = read(os.path.join(os.path.dirname(cexec.__file__), "README")).decode()
    for line in recipe("cexec.1", "find . -name").replace("\\\n        ", "").splitlines():
        assert "    " + line + "\n" in text


def test_the_unit_for_systemd(linked_cluster):
    need("systemd-analyze")
    unit = recipe("cservice.1", "[Unit]")
    assert "\nKillMode=mixed\n" in unit
    path = linked_cluster.path("cexec-ogg.service")
    put(path, unit.replace("/usr/local/bin/cservice", linked_cluster.path("links/cservice")))
    done = linked_cluster.sh("systemd-analyze verify " + path)
    assert (done.returncode, done.stdout) == (0, b"")


def test_the_run_script_of_daemontools(linked_cluster):
    """As supervise runs it, and as svc -d ends it: with TERM and CONT, to the script's process alone."""
    need_root()
    script_text = recipe("cservice.1", "#!/bin/sh\nexec 2>&1\n")
    os.mkdir(linked_cluster.path("service"))
    put(linked_cluster.path("service/run"), script_text.replace("oggenc -Q -o- -", "cat"), 0o700)
    os.rename(linked_cluster.key, linked_cluster.path("service/key"))
    with open(linked_cluster.path("log"), "wb") as log:
        service = subprocess.Popen(["./run"], cwd=linked_cluster.path("service"), stdin=subprocess.DEVNULL,
                                   env=linked_cluster.environment(), stdout=log)
    linked_cluster.started.append(service)
    with linked_cluster.start_client(stdin=subprocess.PIPE, stdout=subprocess.PIPE) as job:
        job.stdin.write(b"begun\n")
        job.stdin.flush()
        assert job.stdout.readline() == b"begun\n"
        service.terminate()
        service.send_signal(signal.SIGCONT)
        assert linked_cluster.client(env={"CEXEC_TIMEOUT_ACCEPT": "1"}).returncode == 111
        assert service.poll() is None
        job.stdin.write(b"end\n")
        job.stdin.close()
        assert job.stdout.read() == b"end\n" and job.wait(PATIENCE) == 0
    assert service.wait(PATIENCE) == 0 and read(linked_cluster.path("log")) == b""
