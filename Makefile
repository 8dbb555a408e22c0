# cexec: one file to use as it is; this makes links, runs the tests, installs.

PYTHON ?= python3
PREFIX ?= /usr/local
DESTDIR ?=
APPLETS = cexec cservice ckeygen crat cproxy
PAGES = $(APPLETS:=.1)
VENV = .venv

all: bin
