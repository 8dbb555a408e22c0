"""Tests of cexec, in the order of the code: bytes first, then processes, then hosts.

    make test                           # everything; what needs root or a tool is skipped without it
    python3 -m pytest test_cexec.py -k oracle
    CEXEC_TEST_PYTHON=/path/to/python3.6 python3 -m pytest test_cexec.py

Everything is sent over loopback (each test has a port of its own) or inside network
namespaces that a test makes and removes.  A test that leaves a process behind fails.
"""
import ast
import atexit
import builtins
import collections
import concurrent.futures.process
import contextlib
import copy
import copyreg
import ctypes
import datetime
import decimal
import dis
import errno
import faulthandler
import fcntl
import fractions
import functools
import gc
import glob
import hashlib
import heapq
import importlib.util
import inspect
import io
import itertools
import json
import marshal
import math
import operator
import os
import pathlib
import pickle
import pty
import pwd
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import termios
import textwrap
import threading
import time
import traceback
import tracemalloc
import uuid
import wave
import zipfile
import zlib
from types import ModuleType, SimpleNamespace
from xml.etree import ElementTree

import pytest

import cexec

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "cexec.py")
PYTHON = os.environ.get("CEXEC_TEST_PYTHON", sys.executable)
with open(PROGRAM) as program:
    BOOT = shlex.split("".join(program.readlines()[2:10]))[2:-2]        # what sh has Python do: -S -c '...'
IN_CI = bool(os.environ.get("CI"))
FIRST_TRY = {"attempt": 1, "waited": 0, "pause": 62, "batch": bytes(8), "only": bytes(8)}      # ANNOUNCE's fields
# Each of the processes that share the tests has ports of its own.
PORTS = itertools.count(4000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]))
HEAVY = pytest.mark.xdist_group("heavy") if "xdist" in sys.modules else lambda test: test      # not two at a time
PATIENCE = 30.0                         # seconds until something that must happen has not
DEADLINE, GRACE = 300.0, 60.0           # seconds that a test may take; after so many more its process ends
# What the applets wait for is shorter here, so that tests need not wait for it: the program's text, another.
HURRY = (("KILL_SECONDS = 5.0", "KILL_SECONDS = 1.0"), ("PENALTY = 2.0", "PENALTY = 0.5"),
         ("ENOUGH, PATIENCE = 1.2, 3.0", "ENOUGH, PATIENCE = 1.2, 1.8"))


# The constants of the sections, in their order
MASTER = bytes(range(1, 33))            # a private key that everybody knows
OTHER_MASTER = bytes(range(2, 34))
GOOD_KEY = cexec.format_key(MASTER)[0]
NONCE, TOKEN = bytes(range(16)), bytes(range(32))
CHANNELS = (0, 1, 2, 3, 1023, 65535)
INPUT_AND_OUTPUTS = [(0, 0, cexec.FLAG_INPUT), (1, 1, cexec.FLAG_OUTPUT), (2, 2, cexec.FLAG_OUTPUT)]
SHELL = 'eval "$PEER_CMD"'          # what the worker's sh is given, and ours
NUMBERS = "import os\nprint(*[number for number in range(64) if os.path.lexists('/proc/self/fd/%d' % number)])"
FOREVER = "while :; do sleep 0.02; done"
NODE = socket.gethostname()             # what messages call a worker here
CLONE_NEWNET = 0x40000000               # setns(2)
ETH_P_ALL, SO_RCVBUFFORCE = 3, 33       # packet(7), socket(7)
GROUP_PORT = cexec.PORT
BLOCKED = "the workers answer, but their connections do not arrive: let TCP to port "
MAY_HAVE_RUN = re.escape("; the command may have run (cexec -r runs it again)")
ORDERLY = ("sh", "-c", 'echo "$REMOTE_USER$PEER_N" >> order; exec cat')     # tells when it is whose turn
RUN = "echo $PPID >>runs; "             # the command's parent is its supervisor
BODY = random.Random(4).getrandbits(8 * 2000000).to_bytes(2000000, "big")
AGES = ["oldest", "newest"]
KEY_SHA256 = "650423be01f3b19044e02e865a009dee6a386ee3ca489cdb58add88337876205"
LOOPBACK = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
UP, BROADCAST, LOOP, MULTICAST = 1, 2, 8, 0x1000
CLOSED = ("EXIT is missing", "nothing at all")
BOTH_EOF = cexec.make_frame(cexec.EOF, 1) + cexec.make_frame(cexec.EOF, 2)
LINES = "for i in 1 2 3 4 5 6 7 8 9; do echo out $i; echo err $i >&2; done"
INTERLEAVED = "".join("out %d\nerr %d\n" % (i, i) for i in range(1, 10))
FAMILIES = pytest.mark.parametrize("family", (socket.AF_UNIX, socket.AF_INET), ids=("unix", "tcp"))
AT = pytest.mark.parametrize("number", (0, 7))
BULK = bytes(range(256)) * 40000
SOCKET = "import os, socket, sys, time\ns = socket.socket(fileno=int(sys.argv[1]))\n"
EVERY_NUMBER = (0, 1, 2, 3, 9, 31)
SOME_BYTES = b"some bytes\nand more\n"
CAUGHT = "INT TERM HUP QUIT USR1 USR2 WINCH".split()
HALF = 'head -c 1000000; [ -e go ] || exec sleep 1000; cat'
STORM_JOBS, STORM_BYTES = 20, 50000000
STORM_COMMAND = "head -c 17000000; sleep 0.5; head -c 17000000; sleep 0.5; exec cat"
MANY = ["V%d=%s" % (number, chr(97 + number) * (130000 - number)) for number in range(12)]      # execve takes 2 MiB
MANY_SEEN = "".join("PEER_%s\n" % word for word in MANY)
ODD = ["", " ", "a b", "\n", "--", "{}", "{.}", "A=1", "-v", "*", "$HOME", "'\"\\", "\udcff\udcfe", "\xe9", ""]
SHOW = [sys.executable, "-Sc", "import os, sys; print(list(map(os.fsencode, sys.argv[1:])))"]
THERE = "CMD='PS1=\"there> \" exec bash --norc --noprofile -i'"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ROT13 = str.maketrans(LETTERS + LETTERS.upper(), LETTERS[13:] + LETTERS[:13] + (LETTERS[13:] + LETTERS[:13]).upper())
NOTED = 'printf "%s\\0" "$PEER_FILE" >>runs; '      # what the worker has been given, in the order of its beginning
FILES, FAILING, BIG = 500, 3, 200000000
TALLIED = "echo + >>count; cat; sleep 0.02; echo - >>count"
MARKED = "cat; echo END"                       # shows where each block ends
LONG_LINE = b"x" * 5000 + b"\n"
BAD, GOOD, THIRD = (bytes([number]) * 16 for number in (1, 2, 3))
MUCH = cexec.MUCH_MOVED
HANDSHAKE = 0.005                       # seconds from the first offer to the claim that everybody hears
GOOD_ROWS = [(0, 0, cexec.FLAG_INPUT), (1, 1, cexec.FLAG_OUTPUT), (2, 1, cexec.FLAG_OUTPUT)]
T = cexec.FLAG_INPUT | cexec.FLAG_OUTPUT | cexec.FLAG_TERMINAL
NOON = 1800000000.0                     # 2027-01-15 08:00:00 UTC
BEGINNING = b"\x16\x03\x01\x00\x05\x01"         # of a TLS ClientHello
RESETS = struct.pack("ii", 1, 0)                # SO_LINGER: what is closed so is reset
COUNTED = "echo run >>runs; cat; echo oh >&2; exit 7"
BANNER = "Welcome to %s.\nNo mail"      # an unfinished line
SECRET = "correct horse"
JOB = ["sh", "-c", 'echo ready; while [ ! -e "$PEER_GO" ]; do sleep 0.05; done; echo done']
SILENCE = {"ALIVE_SECONDS": 0.5, "SILENCE_SECONDS": 5.0}
LANE = [PYTHON, "/dev/fd/3"]            # what a worker runs for an Executor
CLOSED_AT_START = [numbers for count in (1, 2, 3) for numbers in itertools.combinations(range(3), count)]
GOING = "until [ -e $PEER_GO ]; do sleep 0.05; done"
STEPS = ["ckeygen ogg ogg.pub", "cservice ogg oggenc -o- -", "crat ogg.pub", "cexec ogg.pub < input.wav > output.ogg"]
WITHOUT_PROC = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
SOUNDS = ["a b", "it's", 'quo"te', "$HOME", "plain"]


# ---- Helpers ---------------------------------------------------------------

def until(condition, what="something", seconds=PATIENCE):
    """Polls until condition() is true, and returns what it gave."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, "%s has not happened in %g s" % (what, seconds)
        time.sleep(0.01)


def skip(reason):
    """Skips a test, except in CI, where nothing may be skipped."""
    if IN_CI:
        pytest.fail("in CI nothing is skipped: " + reason)
    pytest.skip(reason)


def need(*tools):
    """Skips a test on a machine that has not all of these programs; "root" is the right to do all."""
    for tool in tools:
        if tool == "root" and os.getuid():
            skip("needs root")
        if tool != "root" and not shutil.which(tool):
            skip("%s is not installed" % tool)


def free_port():
    """A UDP port that nobody uses now, and that nobody is given who asks for any."""
    while True:
        port = 10000 + next(PORTS) % 20000          # below the ports of those who ask for any, and never twice
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("127.0.0.1", port))
            # for a child that is being forked by another thread, and has it until its exec: a Listener shares it
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            return port


def read(path):
    with open(path, "rb") as file:
        return file.read()


@functools.lru_cache(None)
def cache():
    """Where every test's programs keep their compiled code."""
    directory = tempfile.mkdtemp(prefix="cexec-test-cache-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def processes_with(marker):
    """The processes that have marker in their environment, zombies aside."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                state = read("/proc/%s/stat" % name).rpartition(b")")[2].split()[0]
                if marker.encode() in read("/proc/%s/environ" % name) and state != b"Z":
                    found.append(int(name))
    return found


# A test that hangs fails: the alarm raises an exception in it, every few seconds until it ends.  If that cannot
# be, because signals are blocked or C code waits, the whole process ends, and says where it was.

@pytest.fixture(autouse=True)
def deadline(request):
    """A test that takes longer than DEADLINE fails, and tells what waits."""
    def over(number, frame):
        told = "\n".join(["it has taken longer than %g s" % DEADLINE, *stacks(), *descendants()])
        for pid in forks_of_ours():
            os.kill(pid, signal.SIGKILL)
        raise AssertionError(told)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        stderr = os.dup(2)
    old = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE, 10.0)
    faulthandler.dump_traceback_later(DEADLINE + GRACE, exit=True, file=stderr)
    yield
    faulthandler.cancel_dump_traceback_later()
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)
    os.close(stderr)


def stacks():
    """Yields where each thread is."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        yield "\nThread %s:\n%s" % (names.get(ident, ident), "".join(traceback.format_stack(frame)))


def children_of(pid):
    """The pids of the children that its threads have started."""
    found = []
    for thread in glob.glob("/proc/%d/task/*/children" % pid):
        with contextlib.suppress(OSError):
            found += map(int, read(thread).split())
    return found


def all_below(pid):
    """The pids of its children, of theirs, and so on."""
    return [found for child in children_of(pid) for found in (child, *all_below(child))]


def descendants():
    """Yields a line for each process that this one has started: what it is, its state, and where it waits."""
    for pid in all_below(os.getpid()):
        with contextlib.suppress(OSError):
            state = read("/proc/%d/stat" % pid).rpartition(b")")[2].split()[0].decode()
            words = os.fsdecode(read("/proc/%d/cmdline" % pid).replace(b"\0", b" "))[-200:]
            yield "%d %s in %s: %s" % (pid, state, read("/proc/%d/wchan" % pid).decode() or "?", words)


def forks_of_ours():
    """The children that are copies of this process: one may run on in our code."""
    ours = read("/proc/self/cmdline")
    return [pid for pid in all_below(os.getpid()) if read("/proc/%d/cmdline" % pid) == ours]


class Cluster:
    """Keys, workers, loggers and clients of one test, on this host's loopback or in namespaces.

    Every process started here, and all that they start, carries a marker in its
    environment: what is left of them when the test ends makes it fail.
    """

    def __init__(self, directory):
        self.directory = str(directory)
        self.marker = "CEXEC_TEST_MARKER=" + uuid.uuid4().hex
        name, _, value = self.marker.partition("=")
        ours = ("GROUP", "MAXFD", "BOOST", "CONCURRENCY")
        self.env = {key: value for key, value in os.environ.items()
                    if not key.startswith(("CEXEC_", "PEER_")) and key not in ours}
        self.env.update({name: value, "GROUP": "127.255.255.255:%d" % free_port(), "XDG_CACHE_HOME": cache()})
        self.env.pop("PYTHONDONTWRITEBYTECODE", None)
        self.started, self.spaces = [], []
        self.launch = [PYTHON, *BOOT, edited(HURRY)]    # what the applets are run with
        self.key, self.pub = self.path("app"), self.path("app.pub")
        cexec.main_ckeygen([self.key, self.pub])        # in this process: there are a thousand tests

    def path(self, name):
        return os.path.join(self.directory, name)

    def argv(self, applet, *arguments, space=None):
        """The command line of an applet, in a network namespace if one is named."""
        return (["ip", "netns", "exec", space] if space else []) + [*self.launch, applet, *arguments]

    def environment(self, env=None):
        values = dict(self.env, **(env or {}))
        return {key: value for key, value in values.items() if value is not None}

    def run(self, applet, *arguments, space=None, **options):
        """Runs an applet to its end: a CompletedProcess with bytes in stdout and stderr."""
        return self.do(self.argv(applet, *arguments, space=space), **options)

    def do(self, argv, env=None, timeout=PATIENCE * 2, **options):
        """Runs any program to its end."""
        for stream in ("stdout", "stderr"):
            options.setdefault(stream, subprocess.PIPE)
        if "input" not in options:
            options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("cwd", self.directory)
        return subprocess.run(argv, env=self.environment(env), timeout=timeout, **options)

    def run_here(self, applet, *arguments, env=None, input=b""):
        """The same in a fork of this process, for what ends at once: Python starts ten times as slowly."""
        with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            source.write(input)
            source.seek(0)
            child = os.fork()
            if not child:
                try:
                    signal.alarm(int(PATIENCE))
                    for number, file in enumerate((source, out, err)):
                        os.dup2(file.fileno(), number)
                    os.closerange(3, 4096)
                    sys.stdin, sys.stdout, sys.stderr = (open(number, mode, closefd=False)
                                                         for number, mode in enumerate("rww"))
                    os.chdir(self.directory)
                    os.environ.clear()
                    os.environ.update(self.environment(env))
                    cexec.log.__init__()
                    cexec.main([PROGRAM, applet, *arguments])
                finally:
                    os._exit(99)
            status = os.waitpid(child, 0)[1]
            code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
            for file in (out, err):
                file.seek(0)
            return subprocess.CompletedProcess([applet, *arguments], code, out.read(), err.read())

    def start(self, applet, *arguments, space=None, **options):
        """Starts an applet; it is ended, by its pid, at the end of the test."""
        options.setdefault("stdin", subprocess.DEVNULL)
        return self.popen(self.argv(applet, *arguments, space=space), **options)

    def popen(self, argv, env=None, **options):
        """Starts any program; it is ended like an applet."""
        options.setdefault("cwd", self.directory)
        process = subprocess.Popen(argv, env=self.environment(env), **options)
        self.started.append(process)
        return process

    def follow(self, applet, *arguments, **options):
        """Starts an applet with a file for its standard error: process.log; process.said() is what is there by now."""
        log = self.path("%s-%s.log" % (applet, uuid.uuid4().hex[:6]))
        with open(log, "wb") as file:
            process = self.start(applet, *arguments, stderr=file, **options)
        process.log, process.said = log, lambda: read(log).decode()
        return process

    def proxy(self, *arguments, **options):
        """Starts a cproxy -v and waits until it listens."""
        process = self.follow("cproxy", "-v", *arguments, **options)
        until(lambda: "cproxy: from " in process.said() or process.poll() is not None, "a proxy's start")
        assert process.poll() is None, process.said()
        return process

    def worker(self, *command, options=(), key=None, verbose=True, **rest):
        """Starts a cservice and waits until it listens; process.log is the file of its -v lines."""
        log = self.path("worker-%s.log" % uuid.uuid4().hex[:6])
        with open(log, "wb") as file:
            process = self.start("cservice", *["-v"] * verbose, *options, key or self.key, *command,
                                 stdout=file, stderr=file, **rest)
        process.log = log
        if verbose:
            until(lambda: b"serves" in read(log) or process.poll() is not None, "a worker's start")
        assert process.poll() is None, read(log)
        return process

    def shell_worker(self, **options):
        """A worker that runs what the client says in CMD=..., for tests of what a command sees."""
        return self.worker("sh", "-c", SHELL, **options)

    def shell_workers(self, count, **options):
        return [self.shell_worker(**options) for _ in range(count)]

    def logger(self, *arguments, space=None, env=None):
        """Starts a crat; process.lines() are the lines that it has printed."""
        log = self.path("crat-%s.log" % uuid.uuid4().hex[:6])
        with open(log, "wb") as file, open(log + ".err", "wb") as errors:
            process = self.start("crat", "-v", *arguments, env=env, space=space, stdout=file, stderr=errors)
        process.lines = lambda: read(log).decode().splitlines()
        until(lambda: listening(process.pid), "a logger's start")
        return process

    def client(self, *words, **options):
        """Runs cexec to its end."""
        return self.run("cexec", self.pub, *words, **options)

    def start_client(self, *words, **options):
        return self.start("cexec", self.pub, *words, **options)

    def space(self, *names):
        """Makes a network namespace for each name, with loopback up; theirs (that of a single one)."""
        made = ["cx%d%s" % (os.getpid(), name) for name in names]
        ip_each(["netns add " + space for space in made])
        self.spaces += made
        for space in made:
            ip("-n", space, "link", "set", "lo", "up")
        return made if len(made) > 1 else made[0]

    def lan(self, name, hosts, network):
        """A bridge and a namespace for each host: {host: its namespace}; addresses network.1, .2, ...

        A network with colons in it is IPv6's (network::1 and so on); None has link-local addresses alone.
        hosts are names; one that is a namespace already gets one more interface.
        """
        new = [host for host in hosts if host not in self.spaces]
        switch, *made = self.space(name, *(name + host for host in new)) if new else [self.space(name)]
        spaces = {host: made.pop(0) if host in new else host for host in hosts}
        ip_each(["link add name switch type bridge", "link set switch up"]
                + ["link add name p%d type veth peer name %s netns %s" % (number, name, space)
                   for number, space in enumerate(spaces.values(), 1)]
                + ["link set p%d master switch up" % number for number in range(1, len(hosts) + 1)], switch)
        for number, space in enumerate(spaces.values(), 1):
            ip("netns", "exec", space, "sysctl", "-qw", "net.ipv6.conf.%s.accept_dad=0" % name)
            address = []
            if network:
                address = ["address add %s dev %s" % ("%s::%d/64" % (network, number) if ":" in network else
                                                      "%s.%d/24 brd +" % (network, number), name)]
            ip_each(address + ["link set %s up" % name], space)
        return spaces

    def net(self, *lans):
        """The networks of a table, a line each, "name network host ...": {host: its namespace}, in their order.

        A host may be on several lines; a network "-" has link-local addresses alone.
        """
        spaces = {}
        for name, network, *hosts in map(str.split, lans):
            made = self.lan(name, [spaces.get(host, host) for host in hosts], None if network == "-" else network)
            spaces.update(zip(hosts, made.values()))
        return spaces

    def alive(self):
        return processes_with(self.marker)

    def end(self, processes):
        """Sees to the end of processes, and closes their pipes."""
        for process in processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                signalled(process, signal.SIGKILL)
            for stream in filter(None, (process.stdin, process.stdout, process.stderr)):
                stream.close()

    def close(self):
        """Ends what was started; fails if anything else is left."""
        for process in self.started:
            if process.poll() is None:
                process.terminate()
        self.end(self.started)
        try:
            until(lambda: not self.alive(), "the end of every process", 12)
        finally:
            left = self.alive()
            lines = [read("/proc/%d/cmdline" % pid).replace(b"\0", b" ") for pid in left]
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            if self.spaces:
                ip_each(["netns delete " + space for space in self.spaces])
            assert not left, lines


def ip(*words):
    subprocess.run(["ip", *words], check=True, stdout=subprocess.DEVNULL)


def ip_each(lines, space=None):
    """Does what the lines say, with one process."""
    subprocess.run(["ip", *["-n", space] * bool(space), "-batch", "-"], input="\n".join(lines).encode(), check=True)


def listening(pid):
    """Whether a process has a UDP socket."""
    with contextlib.suppress(OSError):
        sockets = {os.readlink("/proc/%d/fd/%s" % (pid, fd)) for fd in os.listdir("/proc/%d/fd" % pid)}
        table = read("/proc/%d/net/udp" % pid).decode().splitlines()[1:]
        return any("socket:[%s]" % line.split()[9] in sockets for line in table)
    return False


@functools.lru_cache(None)
def edited(pairs):
    """A copy of the program in which each old text, which is there once, is a new one; kept like its compiled code."""
    text = read(PROGRAM).decode()
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return put("%s/%s.py" % (tempfile.mkdtemp(dir=cache()), "program"), text)


def altered(cluster, *pairs, **values):
    """Has the cluster's applets run with other values of the program's constants, or with other text in it."""
    hurry = [pair for pair in HURRY if pair[0].split(" = ")[0] not in values]
    text = functools.reduce(lambda text, pair: text.replace(*pair), hurry, read(PROGRAM).decode())
    lines = [re.search(r"(?m)^ *%s = [^#\n]+" % name, text).group() for name in values]
    pairs += tuple((line, "%s= %s " % (line.partition("=")[0], value)) for line, value in zip(lines, values.values()))
    cluster.launch = [PYTHON, *BOOT, edited((*hurry, *pairs))]


@pytest.fixture
def cluster(tmp_path):
    with contextlib.closing(Cluster(tmp_path)) as made:
        yield made


@pytest.fixture
def hosts(cluster):
    """A cluster for tests in namespaces: with the default group."""
    need("root", "ip")
    cluster.env.pop("GROUP")
    return cluster


@pytest.fixture
def spaces(hosts):
    """A network of two hosts: the namespaces of "client", which is 10.77.0.1, and "worker"."""
    return hosts.lan("lan", ["client", "worker"], "10.77.0")


PUB_LINE = ("cexec-public-key 1 anyone 43c2883cee7bee50"
            " b2f8321199fb984769253237dfee1a31d1c737faaac8f56d9231db80be0d30b6"
            " 4d7e81375d2f0df05da4d6ce6fc8dfb54415d2e5f171c1f699a823e1e3cc4110\n")


@functools.lru_cache(None)
def made_pub(master=MASTER, name="anyone"):
    """A Pub as a client has it after reading its file."""
    fingerprint = cexec.format_key(master)[1]
    return cexec.parse_pub(cexec.format_pub(master, name, fingerprint), name + ".pub")


def make_datagram(kind, pub, nonce, port, **fields):
    return cexec.make_datagram(kind, pub.application, pub.name, pub.secret, nonce, port, **fields)


def fatal(code, call, *arguments):
    """The message of the Fatal, with that exit code, that call() must raise."""
    with pytest.raises(cexec.Fatal) as caught:
        call(*arguments)
    assert caught.value.code == code, caught.value
    return str(caught.value)


def refusal(done, code, word):
    """That an applet ended with that code and one line that has the word in it."""
    lines = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (code, b"", 1) and done.stderr.endswith(b"\n"), done
    assert word in lines[0] and "internal error" not in lines[0], lines
    return lines[0]


@pytest.fixture
def keys(cluster):
    """A Cluster, for its directory, keys and ways to run applets."""
    return cluster


def put(path, text, mode=0o600):
    with open(path, "w", encoding="latin-1") as file:
        file.write(text)
    os.chmod(path, mode)
    return str(path)


@contextlib.contextmanager
def few_descriptors(count):
    """Within it so many more descriptors can be open; none of them may be left open."""
    def opened():
        return {int(number) for number in os.listdir("/proc/self/fd") if os.path.lexists("/proc/self/fd/" + number)}
    before, limits = opened(), resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [number for number in range(limits[0]) if number not in before]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[count], limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not opened() - before


def refusing(code):
    """A call that fails with that errno."""
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))
    return refuse


# A field's type: values that are packed and come back
SAMPLES = {
    "B": (0, 255), "H": (0, 65535), "I": (0, 2 ** 32 - 1), "Q": (0, 2 ** 64 - 1),
    "8s": (bytes(8), b"\xff" * 8), "16s": (bytes(16), NONCE), "32s": (bytes(32), TOKEN),
    "240s": (bytes(240), TOKEN * 7 + NONCE),
    "text": ("", "name \xe9\u20ac \udcff\0"),
    "texts": ([], ["", "A=1", "B=\xe9\udcfe"]),
    "rest": (b"", b"A=1\0B=\xff" * 100),
}


def samples(kind):
    if kind.startswith("rows:"):
        return [], [tuple(255 - i for i, _ in enumerate(kind[5:]))] * 3
    return SAMPLES[kind]


def filled(message, **given):
    """Values for all fields of a message: those given, and something for the rest."""
    return {**{field: samples(kind)[0] for field, kind in message.fields.items()}, **given}


def with_byte(data, place, value):
    return data[:place] + bytes([value]) + data[place + 1:]


ANNOUNCEMENT = make_datagram(cexec.ANNOUNCE, made_pub(), NONCE, 4097, **FIRST_TRY)


def data_frame(channel, payload, flags=0):
    return cexec.FRAME_HEAD.pack(cexec.DATA.code, flags, channel, len(payload)) + payload


# ---- Helpers: two ends in memory -------------------------------------------

def spin(loop, condition, what="something", seconds=2 * PATIENCE):
    """Turns a loop until condition() is true."""
    deadline = time.monotonic() + seconds
    late = []

    def tick():                         # so that turn() never waits for ever
        assert time.monotonic() < deadline, "%s has not happened in %g s" % (what, seconds)
        late[:] = [loop.after(0.02, tick)]
    tick()
    try:
        while not condition():
            loop.turn()
    finally:
        late[0].cancel()


def words_sent(environment, arguments=()):
    """(the words as they arrive, JOB)."""
    words, rest = cexec.Words(), {"descriptors": [], "linger": 0, "term": "", "lines": 0, "columns": 0, "modes": []}
    frames = cexec.job_frames(environment, arguments, **rest)
    *before, (kind, _, _, job) = all_frames(cexec.FrameReader(), b"".join(frames), size=4096)
    assert kind is cexec.JOB and len(before) == len(frames) - 1
    for kind, _, _, payload in before:
        assert kind is cexec.WORDS and 0 < len(payload["bytes"]) <= cexec.WORDS_CHUNK
        words.add(payload["bytes"])
    return words, SimpleNamespace(**job)


class Holder(cexec.Carrier):
    """A Carrier that keeps what it was told."""

    def __init__(self, loop):
        super().__init__(loop, None)
        self.ready, self.lost, self.errors = False, [], []

    def link_ready(self, link):
        self.ready = True

    def link_lost(self, link, reason, violation):
        self.lost.append((reason, bool(violation)))

    def local_error(self, channel, error):
        self.errors.append((channel, error))

    def stream_ended(self):
        pass


def tcp_pair():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]


class Wire:
    """Two Holders, here (the TLS client) and there (the server), with a real TLS connection between them."""

    def __init__(self, key):
        self.loop = cexec.Loop()
        self.here, self.there = Holder(self.loop), Holder(self.loop)
        near, far = tcp_pair()
        self.here.link = cexec.Link(self.loop, near, cexec.Tls(cexec.tls_context(), False), self.here)
        self.there.link = cexec.Link(self.loop, far, cexec.Tls(cexec.tls_context(key), True), self.there)
        self.here.link.start()
        self.fds = []
        self.spin(lambda: self.here.ready and self.there.ready, "the handshake")

    def spin(self, condition, what="something"):
        spin(self.loop, condition, what)

    def pipe(self, channel, holder, half):
        """A pipe at one holder, which reads (or writes) it for the channel; the other end of the pipe."""
        reader, writer = os.pipe()
        mine, other = (reader, writer) if half == "read" else (writer, reader)
        for fd in (mine, other):
            os.set_blocking(fd, False)
        self.fds += [mine, other]
        holder.carry(channel, cexec.End(mine, mine, lambda: self.close_fd(mine), [half]))
        holder.refresh()
        return other

    def pair(self, channel, holder):
        """A socket at one holder, which carries both directions of it; the other end."""
        mine, other = socket.socketpair()
        fd = mine.detach()
        self.fds.append(fd)
        holder.carry(channel, cexec.SocketEnd(fd, fd, lambda: self.close_fd(fd), ["read", "write"]))
        holder.refresh()
        other.setblocking(False)
        return other

    def through(self, channel):
        """(where bytes go in, where they come out): a channel from here to there."""
        out = self.pipe(channel, self.there, "write")
        return self.pipe(channel, self.here, "read"), out

    def close_fd(self, fd):
        self.fds.remove(fd)
        os.close(fd)

    def raw(self, data):
        """Sends bytes within TLS, whatever they are, from here."""
        self.here.link.tls.write(data)
        self.here.link.flush()

    def close(self):
        for holder in (self.here, self.there):
            holder.link.close()
            for channel in holder.channels.values():
                if isinstance(channel.end, cexec.SocketEnd):
                    channel.end.sock.close()
        for fd in list(self.fds):
            self.close_fd(fd)


@pytest.fixture(scope="module")
def worker_key(tmp_path_factory):
    return cexec.open_key(put(tmp_path_factory.mktemp("key") / "app", GOOD_KEY))


@pytest.fixture
def wire(worker_key):
    with contextlib.closing(Wire(worker_key)) as made:
        yield made


def noise(size, seed=1):
    return random.Random(seed).getrandbits(8 * size).to_bytes(size, "big")


# ---- Helpers: peers in a test's hands, and a man in the middle -------------

def not_taken(kind, *ports):
    """What sockets here with these ports have not taken yet: bytes of "udp", connections of a "tcp" listener."""
    wanted = {"%04X" % port for port in ports}
    rows = [line.split() for line in read("/proc/net/" + kind).decode().splitlines()[1:]]
    return sum(int(row[4].partition(":")[2], 16) for row in rows if row[1].partition(":")[2] in wanted)


def group_port(cluster):
    return int(cluster.env["GROUP"].rpartition(":")[2])


def rss(pid):
    """Resident memory, bytes."""
    return int(re.search(rb"VmRSS:\s+(\d+) kB", read("/proc/%d/status" % pid)).group(1)) * 1024


def no_defect(*texts):
    """That no log has a traceback, an internal error, or a supervisor's unforeseen end."""
    for text in texts:
        for word in (b"Traceback", b"internal error", b"supervisor: "):
            assert word not in text, text[-3000:]


class Closing:
    """Is closed at the end of its with block."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


class Ear(Closing):
    """Hears a group as crat does, and speaks to it."""

    def __init__(self, port):
        self.group = cexec.Group("127.255.255.255:%d" % port)
        self.listener = cexec.Listener(port, [])
        self.sock, self.mouth = self.listener.socks[socket.AF_INET], cexec.open_udp(socket.AF_INET)
        self.heard = []                 # (Datagram, address)

    def close(self):
        self.listener.close()
        self.mouth.close()

    def hear(self):
        """Everything that has been heard by now, oldest first."""
        while True:
            try:
                heard = self.listener.receive(self.sock)
            except cexec.ProtocolError:
                continue
            if heard is None:
                return self.heard
            self.heard.append(heard[:2])

    def wait_for(self, kind, known=()):
        """(Datagram, address) of the first of a kind, for a nonce that is not known."""
        return until(lambda: next((heard for heard in self.hear() if heard[0].kind is kind
                                   and heard[0].nonce not in known), None), repr(kind))

    def say(self, data):
        assert self.group.send({socket.AF_INET: self.mouth}, data) == 1


class Peer(Closing):
    """One end of an offer's connection in a test's hands: blocking; a worker's if a key is given."""

    def __init__(self, sock, key=None):
        sock.settimeout(20)
        self.sock = cexec.tls_context(key).wrap_socket(sock, server_side=key is not None)
        self.reader, self.frames = cexec.FrameReader(), []
        self.words, self.answers = cexec.Words(), 0     # of a JOB that comes; PONGs due for one that was sent

    def close(self):
        self.sock.close()

    def send(self, kind, channel=0, flags=0, **fields):
        """Sends a frame; a JOB with its environment, which goes before it."""
        if "environment" in fields:
            rest = filled(kind)
            for number in ("variables", "arguments", "patterns"):
                del rest[number]
            rest.update(fields, environment=[os.fsencode(word) for word in fields["environment"]])
            frames = cexec.job_frames(**rest)
            self.answers += len(frames) - 1
            return self.raw(b"".join(frames))
        self.answers += kind is cexec.WORDS
        self.raw(cexec.make_frame(kind, channel, flags, **filled(kind, **fields)))

    def raw(self, data):
        with contextlib.suppress(ConnectionError, cexec.ssl.SSLError):      # the other side may have closed
            self.sock.sendall(data)

    def next(self):
        """(kind, payload) of the next frame; None when the other side has closed.  A JOB comes with its environment."""
        while True:
            found = self.next_frame()
            if found and found[0] is cexec.WORDS:
                self.words.add(found[1].bytes)
            elif found and found[0] is cexec.PONG and self.answers:
                self.answers -= 1
            else:
                if found and found[0] is cexec.JOB:
                    job = found[1]
                    job.environment, job.arguments, job.patterns = self.words.take(
                        job.variables, job.arguments, job.patterns)
                return found

    def next_frame(self):
        while not self.frames:
            try:
                count = self.sock.recv_into(self.reader.room())
            except (ConnectionError, cexec.ssl.SSLError):
                return None
            if not count:
                return None
            self.reader.filled(count)
            self.frames += [(kind, bytes(payload) if kind is cexec.DATA else payload)
                            for kind, _, _, payload in self.reader.frames()]
        return self.frames.pop(0)

    def expect(self, kind):
        found = self.next()
        assert found and found[0] is kind, found
        return found[1]

    def asked(self):
        """A worker's part up to the JOB, which it gives."""
        self.expect(cexec.AUTH)
        return self.expect(cexec.JOB)

    def take_job(self):
        """A worker's part up to GO; the JOB."""
        job = self.asked()
        self.send(cexec.ACCEPT)
        self.expect(cexec.GO)
        return job


class Asker(Closing):
    """A client in a test's hands."""

    def __init__(self, cluster, pub=None):
        self.pub = pub or cexec.open_pub(cluster.pub)
        self.token = os.urandom(32)
        self.nonce = cexec.token_nonce(self.token)
        self.group = cexec.Group(cluster.env["GROUP"])
        self.back = cexec.ReturnPort([0], cexec.Loop(), [socket.AF_INET], "127.0.0.1")
        self.udp, (self.listener,) = self.back.udp[socket.AF_INET], self.back.listeners
        self.udp.setblocking(True)
        self.listener.settimeout(20)
        self.port = self.back.port

    def close(self):
        self.back.close()

    def say(self, kind, nonce=None, **fields):
        data = make_datagram(kind, self.pub, nonce or self.nonce, self.port, **filled(kind, **fields))
        assert self.group.send(self.back.udp, data) == 1

    def offer(self, attempt=1):
        """Announces; the Peer that offers, its HELLO read."""
        self.say(cexec.ANNOUNCE, attempt=attempt)
        peer = Peer(self.listener.accept()[0])
        peer.hello = peer.expect(cexec.HELLO)
        assert peer.hello.nonce == self.nonce
        return peer

    def begin(self, peer=None, **job):
        """A job that is accepted and begun; its Peer."""
        peer = peer or self.offer()
        peer.send(cexec.AUTH, proof=self.proof(peer))
        peer.send(cexec.JOB, **job)
        peer.expect(cexec.ACCEPT)
        peer.send(cexec.GO)
        return peer

    def proof(self, peer):
        return cexec.client_proof(self.pub.secret, peer.hello.challenge, self.nonce)

    def complain(self, worker_id, nonce=None):
        self.say(cexec.ALERT, nonce=nonce, event=cexec.ALERT_COMPLAINT, worker_id=worker_id, reason="it is bad")


def play_worker(datagram, address, key, nonce=None, options=0):
    """Connects to a client that announces itself, with some key: the Peer, after HELLO."""
    peer = Peer(socket.create_connection((address, datagram.port), 20), key)
    peer.send(cexec.HELLO, version=cexec.PROTOCOL, nonce=nonce or datagram.nonce, worker_id=os.urandom(8),
              options=options, challenge=os.urandom(32), address="127.0.0.1", host="test")
    return peer


def searching_client(cluster, port, *words, **env):
    """A client that announces itself on a port where only the test listens; client.log is its -v."""
    return cluster.follow("cexec", "-v", cluster.pub, *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          env=dict(env, GROUP="127.255.255.255:%d" % port))


class Fault:
    """What happens to a connection at the record of that number that goes that way, or within it.

    cut and reset end it, stall lets nothing more through, hold waits until the test says
    so, flip changes a bit of the record, dribble sends every byte for itself.
    """

    def __init__(self, what, way="down", record=0, offset=0, bit=0):
        self.what, self.way, self.record, self.offset, self.bit = what, way, record, offset, bit
        self.reached, self.released = threading.Event(), threading.Event()

    def __repr__(self):
        return "%s %s %d+%d" % (self.what, self.way, self.record, self.offset)


class Joined:
    """A worker's connection to the meddler and his to the client: the one's records go to the other."""

    def __init__(self, worker, client, fault):
        self.fault, self.stalled = fault, False
        self.others = {worker: client, client: worker}
        self.ways = {worker: "down", client: "up"}
        self.buffers, self.records = {worker: b"", client: b""}, {"up": [], "down": []}
        for sock in self.others:
            sock.settimeout(20)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def work(self):
        reading = list(self.others)
        try:
            while reading:
                for sock in select.select(reading, [], [], 1)[0]:
                    data = sock.recv(65536)
                    if not self.stalled:
                        self.came(sock, data)
                    if not data:
                        reading.remove(sock)
                        self.others[sock].shutdown(socket.SHUT_WR)
                        if self.stalled:
                            return
        except OSError:
            pass                        # either side has reset it: so do we
        finally:
            for sock in self.others:
                sock.close()

    def came(self, sock, data):
        """Passes on every record that is whole; at the end whatever there is."""
        way, self.buffers[sock] = self.ways[sock], self.buffers[sock] + data
        while self.buffers[sock] and not self.stalled:
            size = 5 + int.from_bytes(self.buffers[sock][3:5], "big")   # RFC 8446, 5.1
            if data and (len(self.buffers[sock]) < 5 or len(self.buffers[sock]) < size):
                return
            record, self.buffers[sock] = self.buffers[sock][:size], self.buffers[sock][size:]
            self.pass_on(self.others[sock], way, record)

    def pass_on(self, target, way, record):
        fault, number = self.fault, len(self.records[way])
        self.records[way].append(len(record))
        if fault and fault.what == "dribble":
            fault.reached.set()
            for place in range(len(record)):
                target.sendall(record[place:place + 1])
        elif fault and (fault.way, fault.record) == (way, number):
            fault.reached.set()
            self.spoil(target, record)
        else:
            target.sendall(record)

    def spoil(self, target, record):
        what, offset = self.fault.what, self.fault.offset
        if what == "flip":
            return target.sendall(with_byte(record, offset, record[offset] ^ 1 << self.fault.bit))
        target.sendall(record[:offset])
        if what == "hold":
            self.fault.released.wait(PATIENCE)
            return target.sendall(record[offset:])
        self.stalled = True
        for sock in self.others:
            if what == "cut":
                sock.shutdown(socket.SHUT_WR)
            elif what == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
        if what == "reset":
            raise ConnectionResetError


class Meddler(Closing):
    """Stands between clients that announce themselves on his port and the workers of a group.

    The next connections suffer the faults that are in his list.  fates(datagram) says
    after how many seconds a copy of it goes on, and how many copies do.
    """

    def __init__(self, group, fates=lambda datagram: [0]):
        self.port, self.fates, self.faults, self.last = free_port(), fates, [], None
        self.ear, self.group = Ear(self.port), cexec.Group(group)
        self.mouth = cexec.open_udp(socket.AF_INET)
        self.backs = {}                 # nonce: [listener, UDP socket of that port, the client]
        self.later, self.count, self.error, self.stopped = [], 0, None, False
        self.threads = [threading.Thread(target=self.guarded)]
        self.threads[0].start()

    def close(self):
        self.stopped = True
        for fault in self.faults:
            fault.released.set()
        for thread in self.threads:
            thread.join(PATIENCE)
        for listener, udp, _ in self.backs.values():
            listener.close()
            udp.close()
        self.ear.close()
        self.mouth.close()
        assert self.error is None, self.error

    @property
    def env(self):
        return {"GROUP": "127.255.255.255:%d" % self.port}

    def guarded(self):
        try:
            while not self.stopped:
                self.turn()
        except Exception as error:      # seen when the test leaves
            self.error = error

    def turn(self):
        backs = list(self.backs.values())
        sockets = [self.ear.sock] + [sock for back in backs for sock in back[:2]]
        ready = select.select(sockets, [], [], 0.01 if self.later else 0.1)[0]
        for datagram, address in self.ear.hear():
            self.to_workers(datagram, address)
        self.ear.heard = []
        for listener, udp, target in backs:
            if udp in ready:
                data = udp.recv(2000)
                self.schedule(cexec.Datagram(data), udp, data, target)
            if listener in ready:
                self.join(listener.accept()[0], target)
        while self.later and self.later[0][0] <= time.monotonic():
            _, _, sock, data, target = heapq.heappop(self.later)
            if target:
                sock.sendto(data, target)
            else:
                self.group.send({socket.AF_INET: sock}, data)

    def schedule(self, datagram, sock, data, target=None):
        for delay in self.fates(datagram):
            self.count += 1
            heapq.heappush(self.later, (time.monotonic() + delay, self.count, sock, data, target))

    def to_workers(self, datagram, address):
        if datagram.nonce not in self.backs:
            back = cexec.ReturnPort([0], cexec.Loop(), [socket.AF_INET], "127.0.0.1")
            (listener,), udp = back.listeners, back.udp[socket.AF_INET]
            listener.setblocking(True)
            self.backs[datagram.nonce] = [listener, udp, None]
        back = self.backs[datagram.nonce]
        if datagram.kind is cexec.ANNOUNCE:
            back[2] = address, datagram.port
        self.schedule(datagram, self.mouth, datagram.readdressed("127.0.0.1", back[0].getsockname()[1], 1))

    def join(self, worker, target):
        try:
            client = socket.create_connection(target, 5)
        except OSError:
            return worker.close()
        self.last = Joined(worker, client, self.faults.pop(0) if self.faults else None)
        self.threads.append(threading.Thread(target=self.last.work))
        self.threads[-1].start()


def open_files(pid):
    return len(os.listdir("/proc/%d/fd" % pid))


def random_frame(chance, without=()):
    """A frame of any kind with any of the least and largest values, a head alone, DATA, or noise."""
    way = chance.randrange(8)
    if way == 0:
        return cexec.FRAME_HEAD.pack(chance.randrange(256), 0, chance.choice(CHANNELS),
                                     chance.choice((0, 1, 65537, 262145, 2 ** 31, 2 ** 32 - 1)))
    if way == 1:
        return noise(chance.randrange(1, 3000), chance.random())
    if way < 4:
        payload = bytes(chance.choice((0, 1, 5000, 262144)))
        return data_frame(chance.choice(CHANNELS), payload, chance.choice((0, 1, 255)))
    kind = chance.choice([kind for kind in cexec.FRAMES.values() if kind not in without])
    fields = {field: chance.choice(samples(form)) for field, form in kind.fields.items()}
    if kind is cexec.EXIT:
        fields.update(how=chance.choice((0, 1, 2, 3)), channels=[(1, chance.randrange(9), 0)] * chance.randrange(3))
    return cexec.make_frame(kind, chance.choice(CHANNELS), chance.choice((0, 1, 255)), **fields)


# ---- Helpers: jobs and terminals -------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A cluster with one worker for many tests; its data/ has files to read."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
        signal.signal(number, handler)          # a shell's background job ignores them, and so would ours
    made = Cluster(tmp_path_factory.mktemp("jobs"))
    made.data = made.path("data")
    os.makedirs(made.path("data/tree"))
    block = os.urandom(1 << 20)
    with open(made.path("data/big"), "wb") as file:
        for number in range(48):
            file.write(struct.pack("Q", number) + block[8:])
    files = [("bytes", bytes(range(256)) * 3), ("words", b"alpha\nbeta\ngamma\ndelta\n")]
    files += [("tree/%d" % number, b"%d\n" % number + block[:number * 9973]) for number in range(12)]
    for name, data in files:
        with open(made.path("data/" + name), "wb") as file:
            file.write(data)
    made.serving = made.worker("sh", "-c", SHELL, env={"CONCURRENCY": "16", "BOOST": "0"}, verbose=False)
    until(lambda: listening(made.serving.pid), "a worker's start")
    yield made
    made.close()


@pytest.fixture
def one(shared):
    """The shared cluster, of which nothing but the worker may be left when the test ends."""
    yield shared
    for process in shared.started[1:]:
        if process.poll() is None:
            process.kill()
    shared.end(shared.started[1:])
    del shared.started[1:]
    try:
        until(lambda: shared.alive() == [shared.serving.pid], "the end of every process but the worker", 12)
    finally:
        for pid in shared.alive():
            if pid != shared.serving.pid:
                os.kill(pid, signal.SIGKILL)


def placed(fds):
    """For Popen's preexec_fn: descriptors {number: file}, None for a closed one; 0, 1 and 2 else /dev/null."""
    def child():
        null = os.open(os.devnull, os.O_RDWR)
        wanted = dict.fromkeys(range(3), null)
        wanted.update(fds)
        moved = {number: fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 300)
                 for number, file in wanted.items() if file is not None}
        for number in range(300):
            if number in moved:
                os.dup2(moved[number], number)
            else:
                with contextlib.suppress(OSError):
                    fcntl.fcntl(number, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    return child


class Here:
    """Runs a command on this host: what There is compared with."""

    def __init__(self, cluster, directory):
        self.cluster, self.directory = cluster, str(directory)
        os.makedirs(self.directory)

    def argv(self, command):
        return ["env", "PEER_CMD=" + command, "sh", "-c", SHELL]

    def shell(self):
        """A shell's words that run the command in $CMD."""
        return 'env PEER_CMD="$CMD" sh -c ' + shlex.quote(SHELL)

    def path(self, name):
        return os.path.join(self.directory, name)

    def start(self, command, fds, env=None):
        return self.cluster.popen(self.argv(command), env=env, cwd=self.directory, close_fds=False,
                                  preexec_fn=placed(fds))

    def script(self, text, command):
        """Runs a script in which RUN stands for the command: (status, stdout, stderr, files it has made)."""
        done = self.cluster.do(["sh", "-c", text.replace("RUN", self.shell())], cwd=self.directory,
                               env={"CMD": command, "DATA": self.cluster.data})
        files = {name: read(self.path(name)) for name in os.listdir(self.directory)
                 if os.path.isfile(self.path(name))}
        return done.returncode, done.stdout, done.stderr, files


class There(Here):
    """Runs it over cexec."""

    def argv(self, command):
        return self.cluster.argv("cexec", self.cluster.pub, "CMD=" + command)

    def shell(self):
        return " ".join(map(shlex.quote, self.cluster.argv("cexec", self.cluster.pub))) + ' CMD="$CMD"'


def both(cluster, directory, scenario, *words):
    """What scenario(side, *words) gives here and over cexec, which must be the same."""
    here = scenario(Here(cluster, directory / "here"), *words)
    there = scenario(There(cluster, directory / "there"), *words)
    assert there == here
    return here


def python(program, *words):
    """A command that becomes a Python program."""
    return "exec " + " ".join(map(shlex.quote, [PYTHON, "-ISc", program, *words]))


def wait_for(path):
    """A command that waits until there is such a file."""
    return "until [ -e %s ]; do sleep 0.02; done" % shlex.quote(path)


def touch(path):
    open(path, "w").close()


def read_all(fd):
    """What can be read until the end of file; a pty's is EIO.  Closes it."""
    pieces = []
    try:
        while pieces[-1:] != [b""]:
            assert select.select([fd], [], [], PATIENCE * 2)[0], "no end of file after %r" % pieces[-1:]
            try:
                pieces.append(os.read(fd, 1 << 16))
            except OSError as error:
                assert error.errno == errno.EIO
                break
    finally:
        os.close(fd)
    return b"".join(pieces)


def read_count(fd, count):
    """That many bytes."""
    data = bytearray()
    while len(data) < count:
        assert select.select([fd], [], [], PATIENCE * 2)[0], "only %d bytes have come" % len(data)
        piece = os.read(fd, min(1 << 16, count - len(data)))
        assert piece, "the end of file after %d bytes" % len(data)
        data += piece
    return bytes(data)


def socketpair(family):
    """A connected pair of stream sockets, over loopback for AF_INET."""
    return socket.socketpair() if family == socket.AF_UNIX else tcp_pair()


def close_all(*fds):
    for fd in fds:
        os.close(fd)


@contextlib.contextmanager
def job(cluster, command, *words, outputs=(1,), fds=None, env=None, mark=None, preexec=None, ready=False):
    """A running client: process.out[number] reads its output there; closed when the block ends.

    ready: the command has said so.
    """
    ends = {number: os.pipe() for number in outputs}
    place = placed({**(fds or {}), **{number: end[1] for number, end in ends.items()}})

    def child():
        place()
        if preexec:
            preexec()
    arguments = ["CMD=" + command] + (["MARK=" + mark] if mark else [])
    process = cluster.popen(cluster.argv("cexec", *words, cluster.pub, *arguments), env=env, close_fds=False,
                            preexec_fn=child)
    process.out = {number: end[0] for number, end in ends.items()}
    close_all(*(end[1] for end in ends.values()))
    try:
        if ready:
            assert read_count(process.out[1], 6) == b"ready\n"
        yield process
    finally:
        for reader in process.out.values():
            with contextlib.suppress(OSError):
                os.close(reader)


def finish(process, number=1):
    """(status, the rest of an output) of a job."""
    rest = read_all(process.out.pop(number))
    return process.wait(PATIENCE * 2), rest


def ended(done):
    """How a process has ended: (exit status, standard output, standard error)."""
    return done.returncode, done.stdout, done.stderr


def output(done, status=0, errors=b""):
    """The standard output of a process that has ended with this status and these errors."""
    assert (done.returncode, done.stderr) == (status, errors), done
    return done.stdout


def failed(done, status=111):
    """The standard error of a process that has ended with this status and has printed nothing."""
    assert (done.returncode, done.stdout) == (status, b""), done
    return done.stderr


def signalled(process, number=signal.SIGTERM):
    """Sends a process a signal, and waits for its end: its exit status."""
    process.send_signal(number)
    return process.wait(PATIENCE)


def new_mark():
    return uuid.uuid4().hex


def marked(mark):
    """The processes of the command that was given MARK=mark."""
    return processes_with("PEER_MARK=" + mark)


def state_of(pid):
    """A process's letter in ps; None if there is no such process."""
    with contextlib.suppress(OSError):
        return read("/proc/%d/stat" % pid).rpartition(b")")[2].split()[0].decode()
    return None


def parent_of(pid):
    return int(read("/proc/%d/stat" % pid).rpartition(b")")[2].split()[1])


class Terminal:
    """A process on a terminal of its own: what is typed at it, and what it shows."""

    def __init__(self, cluster, argv, env=None):
        self.master, slave = pty.openpty()
        self.text = b""
        self.process = cluster.popen(
            argv, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            env=dict({"PS1": "$ ", "TERM": "dumb", "HISTFILE": None}, **(env or {})),
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(slave)

    def type(self, text, shows=None):
        """Types a text; and waits for what is shown then."""
        os.write(self.master, text.encode())
        if shows:
            self.shows(shows)

    def shows(self, text):
        """Waits until a text is shown, and forgets what came up to there."""
        def shown():
            if select.select([self.master], [], [], 0)[0]:
                self.text += os.read(self.master, 65536)
            return text.encode() in self.text
        until(shown, "%r on the terminal, after %r" % (text, self.text))
        self.text = self.text.partition(text.encode())[2]

    def close(self):
        signalled(self.process, signal.SIGKILL)
        os.close(self.master)


def shown(words):
    return repr([os.fsencode(word) for word in words]).encode() + b"\n"


@contextlib.contextmanager
def inside(space):
    """The sockets that are made in here belong to a namespace, and stay there."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as home, open("/var/run/netns/" + space) as there:
        assert libc.setns(there.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert libc.setns(home.fileno(), CLONE_NEWNET) == 0


def udp_socket(space, port=0):
    with inside(space):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.bind(("", port))
        sock.settimeout(PATIENCE)
        return sock


class Capture(Closing):
    """Every IP packet that the interfaces of a host see from now on, as AF_PACKET gives it."""

    def __init__(self, space):
        with inside(space):
            self.sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
        self.sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 128 << 20)
        self.sock.setblocking(False)
        self.seen = []                  # (interface, packet)

    def packets(self):
        with contextlib.suppress(BlockingIOError):
            while True:
                data, address = self.sock.recvfrom(1 << 17)
                self.seen.append((address[0], data))
        return self.seen

    def datagrams(self):
        """(interface, Datagram) for each of ours that was addressed to the group's port."""
        found = []
        for interface, packet in self.packets():
            head = (packet[0] & 15) * 4
            if packet[0] >> 4 == 4 and packet[9] == socket.IPPROTO_UDP:
                port, = struct.unpack_from("!H", packet, head + 2)
                if port == GROUP_PORT:
                    found.append((interface, cexec.Datagram(packet[head + 8:])))
        return found

    def close(self):
        self.sock.close()


def outcome(process, *, status=0):
    """Waits for the end of a process, which must have this status; what it wrote on its pipes."""
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == status, (process.returncode, out, err)
    return out, err


def lost(job):
    """Waits until a held job ends, its stdin still open: with 111 and one line; the reason that it gives."""
    assert job.wait(PATIENCE) == 111
    out, err = outcome(job, status=111)
    found = re.fullmatch(r"cexec: worker %s lost after \d+\.\d s: ([^\n]+)%s\n" % (NODE, MAY_HAVE_RUN), err.decode())
    assert out == b"" and found, (out, err)
    return found.group(1)


def verbose_client(cluster, *words, pub=None, **options):
    return cluster.follow("cexec", "-v", pub or cluster.pub, *words, **options)


def held_job(cluster, *words, pub=None, **options):
    """A job of `cat`, or of what begins like it, that runs until its stdin is closed; it runs now."""
    client = cluster.start("cexec", pub or cluster.pub, *words, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, **options)
    client.stdin.write(b"begun\n")
    client.stdin.flush()
    assert client.stdout.readline() == b"begun\n", client.stderr.read()
    return client


def heard(worker, kind=b"ANNOUNCE"):
    return b"<- " + kind in read(worker.log)


def order(cluster):
    with contextlib.suppress(FileNotFoundError):
        return read(cluster.path("order")).decode().split()
    return []


def in_line(cluster, ahead, *words, **options):
    """Starts a client that gets into the line, behind so many."""
    client = verbose_client(cluster, *words, **options)
    until(lambda: "every slot of a worker is busy, %d ahead of us" % ahead in client.said(),
          "BUSY with %d ahead, not: %s" % (ahead, client.said()))
    return client


def survey(cluster, *words, pub=None, **options):
    """What cexec -l says: a CompletedProcess with text."""
    done = cluster.run("cexec", "-l", *words, pub or cluster.pub, **options)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    no_defect(done.stderr.encode())
    return done


def let_in_answers_only(space):
    """Gives a host the firewall of most desktops: what belongs to a connection that it has begun comes in."""
    need("nft")
    subprocess.run(["ip", "netns", "exec", space, "nft", "-f", "-"], check=True, input=b"""
        table inet desktop { chain input { type filter hook input priority 0; policy drop;
            iif "lo" accept
            ct state established,related accept
        }
        }""")


def block(space, *rule):
    """Has a firewall drop what comes in."""
    need("iptables")
    subprocess.run(["ip", "netns", "exec", space, "iptables", "-A", "INPUT", *rule, "-j", "DROP"], check=True)


def outcomes(*processes):
    for process in processes:
        outcome(process)


def slow_down(space, interface="lan", rate="64kbit"):
    """Lets a host send so much and no more, and queue what it likes to."""
    need("tc")
    ip("netns", "exec", space, "tc", "qdisc", "add", "dev", interface, "root", "tbf", "rate", rate, "burst", "2kb",
       "limit", "1mb")


class Crossing:
    """Two networks, 10.77.0 on the left and 10.78.0 on the right, and a gate on both."""

    def __init__(self, hosts):
        self.hosts = hosts
        spaces = hosts.net("left 10.77.0 client gate other", "right 10.78.0 gate worker")
        self.client, self.gate, self.other, self.worker = spaces.values()

    def proxy(self, *arguments, space=None):
        return self.hosts.proxy(*(arguments or ["10.78.0.1"]), space=space or self.gate)


@pytest.fixture
def crossing(hosts):
    return Crossing(hosts)


def runs(cluster):
    """The supervisors of the runs so far, oldest first."""
    with contextlib.suppress(FileNotFoundError):
        return [int(line) for line in read(cluster.path("runs")).splitlines()]
    return []


def make_file(cluster, name, data=b""):
    with open(cluster.path(name), "wb") as file:
        file.write(data)
    return cluster.path(name)


def size_of(cluster, name):
    with contextlib.suppress(FileNotFoundError):
        return os.path.getsize(cluster.path(name))
    return -1


@functools.lru_cache(None)
def pythons():
    """{(3, N): path} of the Pythons of this machine, from 3.6 up: pyenv's, those of PATH, and the one under test."""
    pyenvs = {os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv")) + "/versions", sys.base_prefix + "/.."}
    places = [versions + "/*/bin/python3.*" for versions in sorted(pyenvs)]
    places += [directory + "/python3.*" for directory in os.environ["PATH"].split(":") if "/shims" not in directory]
    found = {}
    for path in itertools.chain.from_iterable(map(glob.glob, places)):
        name = re.fullmatch(r"python3\.(\d+)", os.path.basename(path))
        if name and int(name.group(1)) >= 6:
            found.setdefault((3, int(name.group(1))), path)
    if not found:
        found[sys.version_info[:2]] = PYTHON
    return dict(sorted(found.items()))


def oldest_and_newest():
    versions = list(pythons().values())
    if len(versions) < 2:
        skip("there is one Python on this machine")
    return {"oldest": versions[0], "newest": versions[-1]}


def there_and_back(cluster, command="CMD=cat; echo oh >&2; exit 5", **options):
    """A job of some megabytes, whose every byte and status come back."""
    assert output(cluster.client(command, input=BODY, **options), 5, b"oh\n") == BODY


# Taken away before the first line of the program, which is run as a module, or cservice would start anew without this.
TAKEN_AWAY = {
    "sched_getaffinity": "del os.sched_getaffinity",
    "getloadavg": "del os.getloadavg",
    "getloadavg fails": """
        def getloadavg():
            raise OSError
        os.getloadavg = getloadavg""",
    "poll": "del select.poll, sys.modules['selectors']",
    "F_SETPIPE_SZ": "refuse(fcntl, 'fcntl', lambda fd, request, *rest: request == 1031, errno.EINVAL)",
    "SO_ACCEPTCONN": "del socket.SO_ACCEPTCONN",
    "SO_ACCEPTCONN fails": """
        refuse(socket.socket, 'getsockopt', lambda self, *rest: rest[1] == socket.SO_ACCEPTCONN, errno.ENOPROTOOPT)""",
    "IP_PKTINFO": """
        refuse(socket.socket, 'setsockopt', lambda self, *rest: rest[:2] == (0, 8), errno.ENOPROTOOPT)
        refuse(socket.socket, 'sendmsg', lambda self, data, ancillary=(), *rest: ancillary, errno.EINVAL)""",
    "AF_NETLINK": "refuse(socket, 'if_nameindex', lambda: True, errno.EPERM)",
    "interface ioctls": """
        refuse(fcntl, 'ioctl', lambda fd, request, *rest: request >> 8 == 0x89, errno.ENOTTY)""",
    "TCP_KEEPIDLE": "del socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT",
    "/proc": "",
}


def take_away(cluster, code):
    """Has the cluster's applets run without what the code deletes."""
    shim = put(cluster.path("shim.py"), textwrap.dedent("""\
        import errno, fcntl, hashlib, importlib.util, os, select, socket, sys
        def refuse(place, name, when, error):
            inner = getattr(place, name)
            def outer(*words, **named):
                if when(*words, **named):
                    raise OSError(error, os.strerror(error))
                return inner(*words, **named)
            setattr(place, name, outer)
        """) + textwrap.dedent(code) + textwrap.dedent("""
        sys.dont_write_bytecode = True
        sys.argv.pop(0)
        enter = None                # the door's: the file is not imported by a program
        spec = importlib.util.spec_from_file_location("cexec", sys.argv[0])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for name, value in (("KILL_SECONDS", 1.0), ("PENALTY", 0.5)):
            setattr(module, name, value)
        module.main(sys.argv)
        """))
    cluster.launch = [PYTHON, shim, PROGRAM]


class Tmux:
    """A window of tmux with a shell in it, whose prompt is "here> "."""

    def __init__(self, cluster, env=None):
        self.cluster, self.words = cluster, ["tmux", "-S", cluster.path("tmux"), "-f", "/dev/null"]
        run = " ".join(map(shlex.quote, cluster.argv("cexec")))
        put(cluster.path("run"), "#!/bin/sh\nexec %s \"$@\"\n" % run, 0o700)
        self.do("new-session", "-d", "-x", "100", "-y", "30", "PS1='here> ' exec bash --norc --noprofile",
                env=cluster.environment(dict({"HISTFILE": None, "TMUX": None, "LC_ALL": "C.UTF-8",
                                              "PUB": cluster.pub, "RUN": cluster.path("run")},
                                             **(env or {}))))
        self.shows("here>")
        self.pid = int(self.do("display-message", "-p", "#{pane_pid}"))

    def do(self, *words, env=None):
        return subprocess.run([*self.words, *words], env=env, check=True, stdout=subprocess.PIPE,
                              timeout=PATIENCE).stdout.decode()

    def screen(self):
        return self.do("capture-pane", "-p")

    def shows(self, pattern):
        """Waits until a line of the screen has the pattern; the match."""
        return until(lambda: re.search(pattern, self.screen(), re.M), Said(self, pattern))

    def keys(self, *keys, shows=None):
        self.do("send-keys", *keys)
        if shows:
            self.shows(shows)

    def line(self, text, shows=None):
        """Types a line, and waits for what is shown then."""
        self.do("send-keys", "-l", text)
        self.keys("Enter", shows=shows)

    def clear(self):
        """An empty screen, for the next thing to be shown."""
        self.line("clear")
        until(lambda: len(self.screen().split()) < 3, Said(self, "an empty screen"))

    def modes(self):
        """What stty tells of the terminal, but for its size."""
        path = self.do("display-message", "-p", "#{pane_tty}").strip()
        shown = subprocess.run(["stty", "-aF", path], check=True, stdout=subprocess.PIPE).stdout.decode()
        return shown.partition(";")[0] + shown.partition("line =")[2]

    def client(self):
        """The process id of the cexec that runs in it."""
        def found():
            with contextlib.suppress(OSError):      # one that has just ended
                return [pid for pid in self.cluster.alive() if parent_of(pid) == self.pid
                        and b"\0cexec\0" in read("/proc/%d/cmdline" % pid)]
        return until(found, "cexec in tmux")[0]

    def close(self):
        self.do("kill-server")


class Said:
    """A text for until() that tells what was on the screen."""

    def __init__(self, tmux, pattern):
        self.tmux, self.pattern = tmux, pattern

    def __str__(self):
        return "%r on the screen:\n%s\n" % (self.pattern, self.tmux.screen().rstrip())


@pytest.fixture
def tmux(one):
    need("tmux", "bash", "stty", "ps")
    with contextlib.closing(Tmux(one)) as made:
        yield made


def batch_words(cluster, files, options=(), variables=()):
    return ["-m", *options, cluster.pub, *variables, "--", *files]


def batch(cluster, *files, options=(), variables=(), **rest):
    """Runs cexec -m to its end."""
    return cluster.run("cexec", *batch_words(cluster, files, options, variables), **rest)


def made_files(cluster, count, directory="."):
    """Small files, each with other bytes: their names."""
    os.makedirs(cluster.path(directory), exist_ok=True)
    names = [os.path.normpath("%s/f%03d" % (directory, number)) for number in range(count)]
    for number, name in enumerate(names):
        make_file(cluster, name, b"%d\n" % number * (number % 7 * 100 + 1))
    return names


def row(screen, worker):
    """The words of a worker's row in the table."""
    return [line.split() for line in screen.splitlines() if line.startswith(worker + " ")]


def recipe(page, beginning):
    """A literal block, a displayed line or a quoted line of a manual page, as man shows it."""
    text = read(os.path.join(os.path.dirname(cexec.__file__), "man", page)).decode()
    for block in (re.findall(r"^\.Bd -literal -offset indent\n(.*?)^\.Ed$", text, re.M | re.S)
                  + re.findall(r"^\.(?:Dl|Ql|Li) (.*)$", text, re.M)):
        plain = block.replace("\\&", "").replace("\\(dq", '"').replace("\\e", "\\")
        if plain.startswith(beginning):
            return plain
    raise AssertionError("%s has no block that begins with %r" % (page, beginning))


def live_in(cluster, monkeypatch):
    for name in os.environ:
        if name.startswith("CEXEC_") and name not in cluster.env:
            monkeypatch.delenv(name)
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)


def failure(call, *arguments, **options):
    with pytest.raises(cexec.Failed) as caught:
        call(*arguments, **options)
    assert isinstance(caught.value, OSError)
    return caught.value.code, str(caught.value)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of one's own, which imports what is dangerous."""
    put(str(tmp_path / "mine_x.py"), textwrap.dedent("""
        import os, subprocess
        from os import system
        from subprocess import Popen
        from functools import partial
        from io import FileIO
        class Point:
            def __init__(self, x):
                self.x = x
            class Inner:
                pass
        class Caller(partial):
            pass
        class Sneaky(Exception):
            def __init__(self, one, two):
                super().__init__(one)
        def function():
            pass
        """))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield __import__("mine_x")
    del sys.modules["mine_x"]


# ---- Forks -----------------------------------------------------------------

@contextlib.contextmanager
def only_the_parent_leaves():
    """A child that leaves this block ends with 99: it would go on with our tests."""
    parent = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != parent:
            os._exit(99)


@pytest.mark.parametrize("fails", ["nothing", "work", "closing", "wakeup"])
def test_a_child_never_goes_on_in_its_parents_code(monkeypatch, fails):
    def fail(*_):
        raise KeyboardInterrupt
    if fails == "closing":
        monkeypatch.setattr(cexec, "close_all_but", fail)
    if fails == "wakeup":
        monkeypatch.setattr(signal, "set_wakeup_fd", fail)
    with only_the_parent_leaves():
        pid = cexec.forked(fail if fails == "work" else lambda: None, [])
    assert os.waitpid(pid, 0)[1] >> 8 == (fails != "nothing")


def test_a_child_whose_error_nobody_reads_ends(tmp_path):
    """What it has to say cannot be written then."""
    loop, (reader, writer) = cexec.Loop(), os.pipe()

    def work():
        os.read(reader, 1)          # until the parent has closed its end
        raise OSError(errno.EIO, "no disk")
    with only_the_parent_leaves():
        helper = cexec.Helper(loop, work, [reader], None)
    loop.forget(helper.reader)
    close_all(helper.reader, reader, writer)
    assert os.waitpid(helper.pid, 0)[1] == 1 << 8


def test_a_child_has_only_what_it_is_given():
    """And it can still be told of a signal only when it has a handler of its own."""
    reader, writer = os.pipe()

    def work():
        there = {number: os.readlink("/proc/self/fd/%d" % number) for number in map(int, os.listdir("/proc/self/fd"))
                 if os.path.lexists("/proc/self/fd/%d" % number)}
        blocked = len(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        os.write(writer, repr((sorted(there), [there[number] for number in range(3)], blocked)).encode())
        return 7
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with only_the_parent_leaves():
        pid = cexec.forked(work, [writer])
    assert os.waitpid(pid, 0)[1] >> 8 == 7
    numbers, standard, blocked = ast.literal_eval(os.read(reader, 4096).decode())
    assert numbers == [0, 1, 2, writer] and standard == [os.devnull] * 3
    assert blocked == len(set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    close_all(reader, writer)


def test_there_is_one_way_to_fork():
    """In which a child cannot go on in its parent's code, nor hold what it does not need."""
    assert len(re.findall(rb"\b(?:os|pty)\.fork(?:pty)?\b", read(PROGRAM))) == 1


# ---- The deadline of the tests themselves ----------------------------------

HANGS = """import os, signal, subprocess, test_cexec
from test_cexec import deadline
test_cexec.DEADLINE, test_cexec.GRACE = 2.0, 10.0

def test_waits_for_a_child_that_runs_on():
    sleeper = subprocess.Popen(["sleep", "1000"])
    child = os.fork()
    if not child:
        while True:
            signal.pause()
    try:
        os.waitpid(child, 0)
    finally:
        sleeper.kill()

def test_is_fine():
    pass

def test_waits_with_all_signals_blocked():
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.Signals)
    os.read(os.pipe()[0], 1)

def test_is_fine_too():
    pass
"""


def how_make_runs_them():
    """The options of `make test`: with others, xdist may run a test that has ended its process again and again."""
    line, = re.findall(r'pytest -q (.*) test_cexec\.py\n', read(os.path.join(HERE, "Makefile")).decode())
    return line.replace("$(AT_ONCE)", "2").split()


@pytest.mark.parametrize("options", [[], ["-n", "1"], how_make_runs_them()], ids=["alone", "beside others", "make"])
def test_a_test_that_hangs_fails_and_tells_what_waits(tmp_path, options):
    if options and "xdist" not in sys.modules:
        skip("pytest-xdist is not installed")
    put(tmp_path / "test_hangs.py", HANGS)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "test_hangs.py"],
                          cwd=str(tmp_path), env=dict(os.environ, PYTHONPATH=HERE, PYTEST_ADDOPTS=""),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE * 4)
    said = done.stdout.decode()
    assert "in test_waits_with_all_signals_blocked" in said, said
    if "loadgroup" in options:
        assert re.search(r"\b[23] failed, ", said), said
    elif options:                   # alone, the run ends there
        assert "2 failed, 2 passed" in said, said
        assert "it has taken longer than 2 s" in said and "os.waitpid(child, 0)" in said, said
        assert re.search(r"\d+ S in \S+: .*-c", said) and re.search(r"\d+ S in \S+: sleep 1000", said), said


# ---- Options and settings --------------------------------------------------

@pytest.mark.parametrize("line, mode, words, values", [
    ("app", "-", "app", {}),
    ("", "-", "", {}),
    ("- -n", "-", "- -n", {}),
    ("-n app", "-", "app", {"empty": "all"}),
    ("-n", "-", "", {"empty": "all"}),
    ("-n 3 app X=1", "-", "app X=1", {"empty": "3"}),
    ("-n3 app", "-", "app", {"empty": "3"}),
    ("-n 3 4", "-", "4", {"empty": "3"}),
    ("-vn app A=1", "-", "app A=1", {"empty": "all", "verbose": True}),
    ("-vn 0 app", "-", "app", {"empty": "0", "verbose": True}),
    ("-n -v app", "-", "app", {"empty": "all", "verbose": True}),
    ("-nr app", "-", "app", {"empty": "all", "repeat": True}),
    ("-pt -n -- -r", "-", "-r", {"empty": "all", "progress": True, "terminal": True}),
    ("-v app -n -- -r", "-", "app -n -- -r", {"verbose": True}),
    ("-lj app", "-l", "app", {"list": True, "json": True}),
    ("-j -l app", "-l", "app", {"list": True, "json": True}),
    ("-l --json app", "-l", "app", {"list": True, "json": True}),
    ("-m -j 4 -o n app -- -f", "-m", "app -- -f", {"batch": True, "jobs": 4, "output": "n"}),
    ("-mfj4 -0 app", "-m", "app", {"batch": True, "jobs": 4, "force": True, "zero": True}),
    ("-mon.out app", "-m", "app", {"batch": True, "output": "n.out"}),
    ("-mo- app", "-m", "app", {"batch": True, "output": "-"}),
    ("-m -o -l -o=x app", "-m", "app", {"batch": True, "output": "=x"}),
    ("-m --log -n app", "-m", "app", {"batch": True, "joblog": "-n"}),
    ("--log=a=b -m app", "-m", "app", {"batch": True, "joblog": "a=b"}),
])
def test_options_are_read(line, mode, words, values, monkeypatch):
    monkeypatch.setattr(cexec.log, "verbose", False)
    options = vars(cexec.CEXEC.read(line.split()))
    assert (options.pop("mode"), options.pop("words")) == (mode, words.split())
    assert {name: value for name, value in options.items() if value} == values
    assert cexec.log.verbose == values.get("verbose", False)


@pytest.mark.parametrize("syntax, line, message", [
    (cexec.CEXEC, "-z app", "no such option: -z"),
    (cexec.CEXEC, "-rz app", "no such option: -z"),
    (cexec.CEXEC, "-m -vz app", "no such option: -z"),
    (cexec.CEXEC, "-l --jsons app", "no such option: --jsons"),
    (cexec.CEXEC, "-nx7 app", "no such option: -x"),
    (cexec.CEXEC, "-n7r app", "-n needs a number from 0, and not 7r"),
    (cexec.CEXEC, "-n" + "7" * 5000, "-n needs a number from 0, and not " + "7" * 20),
    (cexec.CEXEC, "-lm app", "-m does not go with -l"),
    (cexec.CEXEC, "-l -n app", "-n does not go with -l"),
    (cexec.CEXEC, "-mt app", "-t does not go with -m"),
    (cexec.CEXEC, "-o x app", "-o is for -m"),
    (cexec.CEXEC, "-j app", "-j is for -l and -m and -b"),
    (cexec.CEXEC, "-lj 4 app", "-j takes no number with -l"),
    (cexec.CEXEC, "-mj app", "-j needs N"),
    (cexec.CEXEC, "-m -j0 app", "-j needs a number from 1, and not 0"),
    (cexec.CEXEC, "-m -o", "-o needs PATTERN"),
    (cexec.CEXEC, "-m --log", "--log needs FILE"),
    (cexec.CEXEC, "--json=x -l", "--json takes no value"),
    (cexec.CSERVICE, "-x", "-x needs NAME"),
    (cexec.CPROXY, "--bogus", "no such option: --bogus"),
])
def test_wrong_options_are_told_in_a_line_without_the_usage(syntax, line, message):
    assert fatal(100, syntax.read, line.split()) == "%s (see %s -h)" % (message, syntax.applet)


@pytest.mark.parametrize("call, code, said, texts", [
    (cexec.parse_ports, 100, "CEXEC_LISTEN_PORTS", [
        "x", "5000-", "-5000", "5000,,6000", ",", "65536", "5000-70000", "5002-5000", "5000-5001-5002", "-", "+5",
        "0x10", "5 000", "\xb2"]),
    (lambda text: cexec.parse_group(text, 3010), 100, "", [
        "", ",", "127.0.0.1,", ":", ":127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:-1",
        "127.0.0.1:x", "127.0.0.256", "127.0.0", "1.2.3.4.5", "a:b:c:d", "1:2:3", "fd00::1", "[fd00::1", "[fd00::1]x",
        "x[fd00::1]", "[10.0.0.1]", "[]", "[fd00::1]:0", "[fd00::g]", "10.0.0.0/21", "10.0.0.0/x", "10.0.0.0/33",
        "10.0.0/24", "[fd00::/117]", "/24", "@", "@/nowhere", "@.", "no such host.invalid", "x" * 70 + ".invalid",
        "127.0.0.1:\xb2", "3010", LOOPBACK + ":", "staff"]),
    (lambda text: cexec.parse_group(text, 3010), 111, "", ["nosuchdevice0:127.0.0.1", "[fe80::1%nosuch]"]),   # yet
    (cexec.parse_size, 100, "not a size as in 64M", ["0", "-1", "x", "1Q", "M", "2000G", "", "9" * 14, "1" * 5000]),
    (cexec.result_pattern, 100, "", ["", "/x", "..", "a/../b", ".", "/"]),
    (cexec.check_name, 100, "", ["", "a" * 65, "a b", "a/b", "a\n", "\xe9"])],
    ids=["ports", "groups", "devices_that_may_come_up", "sizes", "patterns", "names_of_clients"])
def test_what_is_none_is_refused(call, code, said, texts, monkeypatch):
    def nobody(name, *rest):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    for text in texts:
        assert said in fatal(code, call, text), text


@pytest.mark.parametrize("words", ["-mn0 app", "-m -n0 app", "-m0n app", "-fmn0j4 app"])
def test_options_of_a_batch_stand_together(words):
    """As the synopsis shows them: -n has a number in another mode."""
    options = cexec.CEXEC.read(words.split())
    assert (options.mode, options.values, options.zero, options.words) == ("-m", True, True, ["app"])


def test_options_of_the_other_applets(monkeypatch):
    """Of cservice before the key alone; of those that take no command anywhere."""
    monkeypatch.setattr(cexec.log, "verbose", False)
    options = cexec.CSERVICE.read(["-x", "a", "-ixb", "app", "sh", "-i", "--", "-u"])
    assert (options.refused, options.repeatable, options.user) == (["a", "b"], True, None)
    assert options.words == ["app", "sh", "-i", "--", "-u"]
    for spelling in ("-stdin", "--stdin"):
        options = cexec.CKEYGEN.read(["app", spelling, "app.pub", "-n", "al", "--", "-v"])
        assert (options.words, options.stdin, options.name) == (["app", "app.pub", "-v"], True, "al")
    assert cexec.CRAT.read(["--json"]).json and cexec.CRAT.read(["a.pub", "-j"]).json


@pytest.mark.parametrize("syntax", [cexec.CEXEC, cexec.CSERVICE, cexec.CKEYGEN, cexec.CRAT, cexec.CPROXY])
def test_help_has_every_option_and_mode(syntax, capsys):
    with pytest.raises(SystemExit):
        syntax.read(["-h", "--no-such-option"])
    said = capsys.readouterr().out
    assert max(map(len, said.split("\n\n", 1)[1].splitlines())) <= 95
    for row in syntax.rows:
        assert re.search("^  %s\\b.*  %s" % (", ".join(row.flags), re.escape(row.help[:20])), said, re.M), row
    for mode in syntax.operands:
        assert "  %s\n" % syntax.synopsis(mode) in said.replace("usage: ", "       ")


@pytest.mark.parametrize("text, ports", [
    ("", [0]), ("0", [0]), ("5000", [5000]), ("5000-5002", [5000, 5001, 5002]), ("5000-5001,6000", [5000, 5001, 6000]),
    (" 5000 , 6000-6000 ", [5000, 6000]), ("65535", [65535])])
def test_ports_to_listen_on(text, ports):
    assert cexec.parse_ports(text) == ports


@pytest.mark.parametrize("accept, reject, good, bad", [
    ("", "", ["1.2.3.4"], []),
    ("10.0.0.1", "", ["10.0.0.1"], ["10.0.0.2", "1.2.3.4"]),
    ("10.0.0.0/24 127.0.0.1", "", ["10.0.0.1", "10.0.0.255", "127.0.0.1"], ["10.0.1.0"]),
    ("10.0.0.5/24", "", ["10.0.0.1"], ["10.0.1.1"]),
    ("", "10.0.0.0/24,127.0.0.1", ["10.0.1.0", "1.2.3.4"], ["10.0.0.1", "127.0.0.1"]),
    ("10.0.0.0/8", "10.1.0.0/16", ["10.0.0.1"], ["10.1.0.1", "11.0.0.1"]),
    ("::/0", "", [], ["10.0.0.1"]),
])
def test_whose_offers_are_taken(accept, reject, good, bad, monkeypatch):
    monkeypatch.setenv("CEXEC_ACCEPT_SERVER", accept)
    monkeypatch.setenv("CEXEC_REJECT_SERVERS", reject)
    servers = cexec.ServerFilter()
    assert [address for address in good + bad if servers.may_allow(address)] == good
    assert [address for address in good + bad if servers.allows(address, "host", bytes(8))] == good


@pytest.mark.parametrize("accept, reject, allowed", [
    ("box1", "", ["box1", "BOX1.lan"]), ("", "BOX1, 00000000000000bb", ["box2", "me"]),
    ("00000000000000bb 10.0.0.1", "", ["box1", "box2 bb"]), ("10.0.0.0/8", "box1.lan", ["box1", "box2", "box2 bb"]),
    ("", "localhost", ["box1", "BOX1.lan", "box2", "box2 bb"])])
def test_workers_are_allowed_by_name_and_id(accept, reject, allowed, monkeypatch):
    monkeypatch.setenv("CEXEC_ACCEPT_SERVER", accept)
    monkeypatch.setenv("CEXEC_REJECT_SERVERS", reject)
    workers = {"box1": ("10.0.0.1", "box1", 1), "BOX1.lan": ("10.0.0.2", "BOX1.lan", 1),
               "box2": ("10.0.0.3", "box2", 1), "box2 bb": ("10.0.0.4", "box2", 0xbb), "me": ("127.0.0.1", "me", 1)}
    servers = cexec.ServerFilter()
    assert [name for name, (address, host, number) in workers.items()
            if servers.may_allow(address) and servers.allows(address, host, number.to_bytes(8, "big"))] == allowed


@pytest.mark.parametrize("text", ["10.0.0.0/33", "host/example", "10.0.0", "10.0.0.1;10.0.0.2"])
def test_lists_of_addresses_that_are_none(text, monkeypatch):
    monkeypatch.setenv("CEXEC_REJECT_SERVERS", text)
    monkeypatch.delenv("CEXEC_ACCEPT_SERVER", raising=False)
    message = fatal(100, cexec.ServerFilter)
    assert "CEXEC_REJECT_SERVERS" in message


@pytest.mark.parametrize("words, variables, arguments", [
    ([], 0, []),
    (["A=1", "b_2=", "_=x=y", "LONG=\xe9 \n\t", "BYTES=\udcff"], 5, []),
    (["A=1", "x", "B=2"], 1, ["x", "B=2"]),
    (["-x", "A=1"], 0, ["-x", "A=1"]),
    (["A=1", "--", "B=2"], 1, ["B=2"]),
    (["--", "--", "A=1"], 0, ["--", "A=1"]),
    (["x", "--"], 0, ["x", "--"]),
    (["--"], 0, []),
    ([""], 0, [""]),
    *(([word], 0, [word]) for word in ("=1", "1A=1", "A-B=1", "A B=1", "\xc4=1", "A.B=1", " A=1", "A\n=1", "--a=1"))])
def test_words_behind_a_public_key(words, variables, arguments):
    assert cexec.parse_words(words) == ([os.fsencode(word) for word in words[:variables]],
                                        [os.fsencode(word) for word in arguments])


def test_as_many_words_as_a_command_can_have(monkeypatch):
    room = cexec.WORDS_MAX
    assert cexec.parse_words(["A=" + "x" * (room - 11)])
    assert "6 MiB" in fatal(100, cexec.parse_words, ["A=" + "x" * (room - 10)])
    assert "6 MiB" in fatal(100, cexec.parse_words, ["x" * (room // 2), "x" * (room // 2)])
    fatal(100, cexec.parse_words, ["A=" + "\xe9" * (room // 2)])
    fatal(100, cexec.parse_words, ["A="] * (room // 11 + 1))
    assert len(cexec.parse_words(["A="] * (room // 11))[0]) == room // 11


def test_variables_are_bytes_in_any_locale(monkeypatch):
    """In a locale of one byte a character what was typed goes as it is."""
    monkeypatch.setattr(cexec.os, "fsencode", lambda word: word.encode("latin-1"))
    (word,), _ = cexec.parse_words(["X=\xe9\xff\xc3\xa9"])
    assert word == b"X=\xe9\xff\xc3\xa9"


def test_messages_that_are_said_once_are_remembered_up_to_a_limit(monkeypatch):
    log, said = cexec.Log(), []
    monkeypatch.setattr(log, "say", said.append)
    for number in range(1000):
        for _ in range(2):
            log.once("%d of a peer's making" % number)
            log.once("of one topic", topic=str(number))
    assert len(said) == 2000 and len(log.said) < 100


# ---- Keys ------------------------------------------------------------------


def test_one_master_has_one_key_file_and_one_pub():
    text, fingerprint = cexec.format_key(MASTER)
    assert hashlib.sha256(text.encode()).hexdigest() == KEY_SHA256
    assert cexec.format_pub(MASTER, "anyone", fingerprint) == PUB_LINE
    assert cexec.format_key(MASTER) == (text, fingerprint)
    assert cexec.format_key(OTHER_MASTER)[1] != fingerprint


@pytest.mark.parametrize("scalar, x, y", [
    (1, "6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296",
        "4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5"),
    (2, "7cf27b188d034f7e8a52380304b51ac3c08969e277f21b35a60b48fc47669978",
        "07775510db8ed040293d9ac69f7430dbba7dade63ce982299e04b79d227873d1"),
    (3, "5ecbe4d1a6330a44c8f7ef951d4bf165e6c6b721efada985fb41661bc6e7fd6c",
        "8734640c4998ff7e374b06ce1a64a2ecd82ab036384fb83d9a79b127a27d5032"),
    (cexec.P256_N - 1, "6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296",
                       "b01cbd1c01e58065711814b583f061e9d431cca994cea1313449bf97c840ae0a"),
])
def test_p256_multiples_of_the_base_point(scalar, x, y):
    assert cexec.p256_multiply(scalar, cexec.P256_G) == (int(x, 16), int(y, 16))


def test_secrets_differ_by_label_name_and_master():
    made = {cexec.client_secret(MASTER, "a"), cexec.client_secret(MASTER, "b"), cexec.client_secret(OTHER_MASTER, "a"),
            cexec.mac(MASTER, b"application"), cexec.client_proof(MASTER, bytes(32), bytes(16)),
            cexec.client_proof(MASTER, bytes(32), bytes(15) + b"\1")}
    assert len(made) == 6 and all(len(secret) == 32 for secret in made)


# The smallest and the largest scalar, and one that begins with zeros
@pytest.mark.parametrize("number", [1, 2 ** 200 + 7, cexec.P256_N - 1, int.from_bytes(MASTER, "big")])
def test_openssl_accepts_a_made_key(number, tmp_path):
    need("openssl")
    text, fingerprint = cexec.format_key(number.to_bytes(32, "big"))
    path = put(tmp_path / "app", text)

    def openssl(*words):
        return subprocess.run(["openssl", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              check=True).stdout.decode()
    assert "valid" in openssl("ec", "-in", path, "-check", "-noout").lower()
    assert openssl("verify", "-check_ss_sig", "-CAfile", path, path).strip().endswith(": OK")
    printed = openssl("x509", "-in", path, "-noout", "-fingerprint", "-sha256").strip()
    assert printed.rpartition("=")[2].replace(":", "").lower() == fingerprint.hex()
    assert openssl("x509", "-in", path, "-noout", "-pubkey") == openssl("pkey", "-in", path, "-pubout")


def test_python_takes_a_made_key_as_it_stands(tmp_path):
    path = put(tmp_path / "app", cexec.format_key(MASTER)[0])
    key = cexec.open_key(path)
    assert key.master == MASTER and key.application == made_pub().application
    cexec.tls_context(key)


def test_pub_there_and_back():
    pub = cexec.parse_pub(PUB_LINE, "/some/where/app.pub")
    assert (pub.label, pub.name, pub.application) == ("app.pub", "anyone", cexec.application_id(MASTER))
    assert pub.secret == cexec.client_secret(MASTER, "anyone")
    assert pub.fingerprint == cexec.format_key(MASTER)[1]


WORDS = PUB_LINE.split()


@pytest.mark.parametrize("text, word", [
    ("", "not a cexec public key"),
    ("\0" * 300, "not a cexec public key"),
    (cexec.format_key(MASTER)[0], "a private key where the public key is needed"),
    (PUB_LINE.replace(" 1 ", " 2 ", 1), "another version"),
    ("cexec-public-key", "another version"),
    (" ".join(WORDS[:5]), "damaged"),
    (" ".join(WORDS[:2]), "damaged"),
    (PUB_LINE + "00", "damaged"),
    (PUB_LINE[:-2], "damaged"),
    (PUB_LINE[:-3], "damaged"),
    (PUB_LINE.replace("43c2", "43zz"), "damaged"),
    (PUB_LINE.replace("43c2", "43\xe92"), "damaged"),
    (PUB_LINE.replace("anyone", "any/one"), "damaged"),
    (PUB_LINE.replace("anyone", "a" * 65), "damaged"),
], ids=lambda value: value[-20:])
def test_a_damaged_pub_is_refused_with_its_cause(text, word):
    assert word in fatal(100, cexec.parse_pub, text, "app.pub")


@pytest.mark.parametrize("name", ["a", "alice@host.example+1_2-3", "a" * 64])
def test_names_of_clients(name):
    assert cexec.check_name(name) == name


def test_every_damage_of_a_key_file_is_found(tmp_path):
    text, chance = cexec.format_key(MASTER)[0], random.Random(1)
    path = tmp_path / "app"
    assert cexec.existing_key(put(path, text)) == MASTER
    damaged = [text[:size] for size in range(0, len(text), 29)] + [text + "\n", text * 2, text.replace("\n", "\r\n")]
    for place in range(0, len(text), 5):
        other = chr(ord(text[place]) ^ 1 << chance.randrange(8))
        damaged.append(text[:place] + other + text[place + 1:])
    for bad in damaged:
        put(path, bad)
        assert str(path) in fatal(101, cexec.existing_key, str(path))


@pytest.mark.parametrize("code, status, said", [
    (errno.EACCES, 111, "Permission denied: let the user with the id %d read it" % os.geteuid()), (errno.EIO, 111, ""),
    (errno.EISDIR, 100, ": name the %s key in it"), (errno.EFBIG, 100, ": not a cexec %s key"),
    (errno.ELOOP, 100, "")])
def test_a_key_that_cannot_be_read(monkeypatch, code, status, said):
    monkeypatch.setattr(cexec, "read_text", refusing(code))
    for name, opening in (("public", cexec.open_pub), ("private", cexec.open_key)):
        message = fatal(status, opening, "app")
        assert message.startswith("app: " + os.strerror(code)) and (said % name if "%" in said else said) in message


def test_warning_for_a_private_key_that_others_can_read(keys):
    for mode, warned in ((0o600, False), (0o400, False), (0o640, True), (0o604, True)):
        os.chmod(keys.key, mode)
        worker = keys.worker("true")
        lines = [line for line in read(worker.log).splitlines() if b"warning" in line]
        assert len(lines) == warned and all(b"app can be read by others" in line for line in lines), (mode, lines)


def test_cexec_app_finds_app_pub(keys):
    keys.worker("cat")
    assert ended(keys.run("cexec", keys.key, input=b"found")) == (0, b"found", b"")


# ---- Messages --------------------------------------------------------------

def all_messages():
    return list(cexec.DATAGRAMS.values()) + list(cexec.FRAMES.values())


@pytest.mark.parametrize("message", all_messages(), ids=repr)
@pytest.mark.parametrize("which", [0, 1], ids=["smallest", "largest"])
def test_message_there_and_back(message, which):
    values = {field: samples(kind)[which] for field, kind in message.fields.items()}
    body = message.pack(**values)
    assert vars(message.unpack(body)) == values
    if message is cexec.WORDS:          # it has as many bytes as the frame
        return
    for size in range(len(body)):
        with pytest.raises(cexec.ProtocolError, match=message.name + " cut short"):
            message.unpack(body[:size])
    for more in (1, 100):
        with pytest.raises(cexec.ProtocolError, match="%s with %d bytes too many" % (message.name, more)):
            message.unpack(body + bytes(more))


@pytest.mark.parametrize("message", all_messages(), ids=repr)
def test_message_wants_every_field_and_no_other(message):
    with pytest.raises(TypeError):
        message.pack(**filled(message), nonsense=1)
    for field in message.fields:
        values = filled(message)
        del values[field]
        with pytest.raises(TypeError):
            message.pack(**values)


def test_codes_and_names_are_unique():
    for table in (cexec.DATAGRAMS, cexec.FRAMES):
        assert sorted(table) == list(range(1, len(table) + 1))
        assert len({message.name for message in table.values()}) == len(table)
        assert all(code == message.code for code, message in table.items())


# What is on the wire may never change within a version: (message, fields, bytes)
@pytest.mark.parametrize("made, wire", [
    (lambda: cexec.make_frame(cexec.EOF, 3, cexec.FLAG_WHOLE), "0801000300000000"),
    (lambda: cexec.make_frame(cexec.CREDIT, 258, bytes=65536), "0a0001020000000400010000"),
    (lambda: cexec.make_frame(cexec.SIGNAL, signal="INT"), "0b000000000000050003494e54"),
    (lambda: cexec.make_frame(cexec.AUTH, proof=TOKEN), "0200000000000020" + TOKEN.hex()),
    (lambda: cexec.COMMON.pack(application=b"application"[:8], client="bob", nonce=NONCE),
     "6170706c69636174" + "0003626f62" + NONCE.hex()),
    (lambda: cexec.ANNOUNCE.pack(attempt=2, waited=3, pause=4, batch=bytes(8), only=b"worker 1"),
     "00000002" + "00000003" + "00000004" + "00" * 8 + "776f726b65722031"),
    (lambda: cexec.BUSY.pack(worker_id=b"abcdefgh", attempt=2, ahead=3, failures=4, address="::2"),
     "6162636465666768" + "00000002" + "00000003" + "0004" + "0003" + "3a3a32"),
    (lambda: cexec.CLAIM.pack(token=TOKEN, offers=5), TOKEN.hex() + "0005"),
    (lambda: make_datagram(cexec.CLAIM, made_pub(), NONCE, 4097, token=TOKEN, offers=1)[:-16],
     "43455843" + "03" + "02" + "00" + "00" * 16 + "1001" + "43c2883cee7bee50" + "0006616e796f6e65"
     + NONCE.hex() + TOKEN.hex() + "0001"),
])
def test_bytes_on_the_wire(made, wire):
    assert made().hex() == wire


def test_the_mac_of_a_datagram_is_hmac_sha256_of_what_it_proves():
    pub = made_pub()
    data = make_datagram(cexec.ANNOUNCE, pub, NONCE, 9, **FIRST_TRY)
    proved = b"datagram" + data[:6] + data[25:-16]
    assert data[-16:] == cexec.hmac.new(pub.secret, proved, "sha256").digest()[:16]


def datagrams():
    """One of each kind, as its sender makes it."""
    return [make_datagram(kind, made_pub(), NONCE, 4097, **filled(kind)) for kind in cexec.DATAGRAMS.values()]


def test_datagram_there_and_back():
    for data in datagrams():
        datagram = cexec.Datagram(data)
        assert data[5] == datagram.kind.code and len(data) <= cexec.DATAGRAM_MAX
        assert (datagram.name, datagram.application, datagram.nonce) == ("anyone", made_pub().application, NONCE)
        assert (datagram.address, datagram.port, datagram.hops) == (None, 4097, 0)
        assert datagram.proved_by(made_pub().secret)
        assert not datagram.proved_by(made_pub(name="bob").secret)
        assert not datagram.proved_by(made_pub(OTHER_MASTER).secret)


def test_datagram_of_another_client_is_not_proved():
    """A name is part of what is proved, and goes with one secret."""
    alice, bob = made_pub(name="alice"), made_pub(name="bob")
    data = make_datagram(cexec.ANNOUNCE, bob._replace(name="alice"), NONCE, 1, **FIRST_TRY)
    assert cexec.Datagram(data).proved_by(bob.secret) and not cexec.Datagram(data).proved_by(alice.secret)


NAMED = made_pub()._replace


@pytest.mark.parametrize("data, word", [
    (b"", "cut short"),
    (ANNOUNCEMENT[:24], "cut short"),
    (ANNOUNCEMENT[:25], "cut short"),
    (ANNOUNCEMENT[:-1], "cut short"),
    (ANNOUNCEMENT + b"\0", "1 bytes too many"),
    (b"XEXC" + ANNOUNCEMENT[4:], "not a cexec datagram"),
    (ANNOUNCEMENT + bytes(1201 - len(ANNOUNCEMENT)), "not a cexec datagram"),
    (with_byte(ANNOUNCEMENT, 4, 0), "protocol version 0"),
    (with_byte(ANNOUNCEMENT, 4, 4), "protocol version 4"),
    (with_byte(ANNOUNCEMENT, 5, 0), "unknown datagram 0"),
    (with_byte(ANNOUNCEMENT, 5, 255), "unknown datagram 255"),
    (with_byte(ANNOUNCEMENT, 33, 255), "cut short"),
    (with_byte(ANNOUNCEMENT, 34, 7), "ANNOUNCE cut short"),
    (with_byte(ANNOUNCEMENT, 34, 5), "too many"),
    (with_byte(ANNOUNCEMENT, 35, 0), "name"),
    (make_datagram(cexec.ANNOUNCE, NAMED(name=""), NONCE, 1, **FIRST_TRY), "name"),
    (make_datagram(cexec.ANNOUNCE, NAMED(name="a" * 65), NONCE, 1, **FIRST_TRY), "name"),
    (make_datagram(cexec.ANNOUNCE, NAMED(name="a/b"), NONCE, 1, **FIRST_TRY), "name"),
    (make_datagram(cexec.ANNOUNCE, NAMED(name="\udcff"), NONCE, 1, **FIRST_TRY), "name"),
], ids=lambda value: value if isinstance(value, str) else "%d-bytes" % len(value))
def test_datagram_that_does_not_parse(data, word):
    with pytest.raises(cexec.ProtocolError, match=word):
        cexec.Datagram(data)


def test_any_flipped_bit_is_refused_but_in_hops_and_return_address():
    rewritten = range(6, 25)            # hops, address, port
    for data in datagrams():
        for bit in range(8 * len(data)):
            flipped = with_byte(data, bit // 8, data[bit // 8] ^ 1 << bit % 8)
            try:
                accepted = cexec.Datagram(flipped).proved_by(made_pub().secret)
            except cexec.ProtocolError:
                accepted = False
            assert accepted == (bit // 8 in rewritten), "bit %d of %r" % (bit, cexec.Datagram(data))


@pytest.mark.parametrize("address", ["10.1.2.3", "255.255.255.255", "fe80::1", "2001:db8::ffff:1"])
def test_rewritten_return_address_is_accepted(address):
    for data in datagrams():
        moved = cexec.Datagram(cexec.Datagram(data).readdressed(address, 65535, 8))
        assert (moved.address, moved.port, moved.hops) == (address, 65535, 8)
        assert moved.proved_by(made_pub().secret) and moved.mac == data[-16:]


def test_token_is_proved_by_the_nonce():
    assert cexec.token_nonce(TOKEN) == hashlib.sha256(TOKEN).digest()[:16] != cexec.token_nonce(bytes(32))


@pytest.mark.parametrize("rest", [b"", b"\0", bytes(20), bytes(1195), b"\xff" * 60])
def test_magic_and_version_are_read_whatever_follows(rest):
    with pytest.raises(cexec.OtherVersion) as caught:
        cexec.Datagram(b"CEXC\4" + rest)
    assert (caught.value.version, str(caught.value)) == (4, "protocol version 4, this is 3")
    with pytest.raises(cexec.ProtocolError, match="not a cexec datagram"):
        cexec.Datagram(b"CEXD\4" + rest)


@pytest.mark.parametrize("size, asks_at", [(25, 0), (308, 0), (309, 9)])
def test_a_short_query_of_another_version_asks_for_nothing(size, asks_at):
    """No answer is longer than its question."""
    head = cexec.DATAGRAM_HEAD.pack(cexec.MAGIC, cexec.PROTOCOL + 1, cexec.QUERY.code, 0, bytes(16), 9)
    with pytest.raises(cexec.OtherVersion) as caught:
        cexec.Datagram(head.ljust(size, b"\0"))
    assert caught.value.asks_at == asks_at
    assert len(make_datagram(cexec.QUERY, made_pub(name="a"), NONCE, 9, **filled(cexec.QUERY))) == cexec.QUERY_MIN


def test_random_bytes_are_only_protocol_errors():
    """20,000 of each: pure noise, noise behind a good head, and a good datagram that is damaged."""
    chance, good, parsed = random.Random(3), datagrams(), 0
    secret = made_pub().secret
    for case in range(20000):
        noise = chance.getrandbits(8 * 300).to_bytes(300, "big")[:chance.randrange(300)]
        whole = good[case % len(good)]
        place, size = chance.randrange(len(whole)), chance.randrange(8)
        for data in (noise, whole[:25] + noise, with_byte(whole[:5], 5, case % 256) + noise,
                     whole[:place] + noise[:size] + whole[place + size * chance.randrange(2):]):
            try:
                datagram = cexec.Datagram(data)
            except cexec.ProtocolError:
                continue
            parsed += 1
            changed = data[:6] + data[25:] != whole[:6] + whole[25:]
            assert datagram.proved_by(secret) != changed
            cexec.printable(repr(datagram))
    assert parsed > 100                 # or this shows nothing


def test_memory_forgets_the_oldest():
    memory = cexec.Memory(3)
    for key in "abcad":                 # a is young again
        memory[key] = key
    assert list(memory) == ["c", "a", "d"]


def all_frames(reader, data, chance=None, size=None):
    """What a FrameReader gives for data, in pieces of a size, or of random sizes; DATA joined, frame by frame."""
    given, place = [], 0
    while place < len(data):
        room = reader.room()
        piece = data[place:place + min(len(room), size or chance.choice((1, 2, 7, 8, 9, 100, 5000, 70000)))]
        room[:len(piece)] = piece
        reader.filled(len(piece))
        place += len(piece)
        for kind, flags, channel, payload in reader.frames():
            if kind is cexec.DATA and given and given[-1][:3] == (kind, flags, channel):
                given[-1][3].extend(payload)
            else:
                given.append((kind, flags, channel, bytearray(payload) if kind is cexec.DATA else vars(payload)))
    return given


def every_frame():
    """The bytes of each kind of frame, small and large, and what a reader is to give for them."""
    stream, expected = b"", []
    for kind in cexec.FRAMES.values():
        for which in (0, 1):
            channel, flags = kind.code * 1000, which
            if kind is cexec.DATA:
                payload = (b"x", bytes(range(256)) * 1024)[which]
                stream += data_frame(channel, payload, flags)
                expected.append((kind, flags, channel, bytearray(payload)))
            else:
                values = {field: samples(form)[which] for field, form in kind.fields.items()}
                stream += cexec.make_frame(kind, channel, flags, **values)
                expected.append((kind, flags, channel, values))
    return stream, expected


def test_frames_that_come_whole():
    stream, expected = every_frame()
    assert all_frames(cexec.FrameReader(), stream, size=len(stream)) == expected


def test_frames_a_byte_at_a_time():
    stream, expected = every_frame()
    big = stream.index(bytes(range(256)) * 2)
    assert all_frames(cexec.FrameReader(), stream[:big + 3000], size=1)[:-1] == [
        frame for frame in expected if frame[0].code <= cexec.DATA.code][:-1]
    rest = stream[big + cexec.FRAME_MAX:]
    assert all_frames(cexec.FrameReader(), rest, size=1) == [f for f in expected if f[0].code > cexec.DATA.code]


@pytest.mark.parametrize("seed", range(10))
def test_frames_in_random_pieces(seed):
    stream, expected = every_frame()
    reader = cexec.FrameReader()
    for _ in range(3):                  # the same reader, so that all that wraps has wrapped
        assert all_frames(reader, stream, chance=random.Random(seed)) == expected


def test_empty_data_frames_give_nothing():
    assert all_frames(cexec.FrameReader(), data_frame(1, b"") * 5000, size=4096) == []


@pytest.mark.parametrize("head, good", [
    ((cexec.DATA.code, 0, 1, cexec.FRAME_MAX), True),
    ((cexec.DATA.code, 0, 1, cexec.FRAME_MAX + 1), False),
    ((cexec.DATA.code, 0, 1, 2 ** 32 - 1), False),
    ((cexec.JOB.code, 0, 0, cexec.CONTROL_MAX), True),
    ((cexec.JOB.code, 0, 0, cexec.CONTROL_MAX + 1), False),
    ((cexec.EXIT.code, 0, 0, 2 ** 32 - 1), False),
    ((0, 0, 0, 0), False),
    ((len(cexec.FRAMES) + 1, 0, 0, 0), False),
    ((255, 0, 0, 0), False),
    ((cexec.PING.code, 0, 0, 1), True),         # until its byte has come
])
def test_heads_of_frames(head, good):
    """A bad head is refused before anything of its payload is waited for."""
    reader = cexec.FrameReader()
    reader.room()[:8] = cexec.FRAME_HEAD.pack(*head)
    reader.filled(8)
    if good:
        assert list(reader.frames()) == []
    else:
        with pytest.raises(cexec.ProtocolError):
            list(reader.frames())


@pytest.mark.parametrize("kind", [k for k in cexec.FRAMES.values() if k not in (cexec.DATA, cexec.WORDS)], ids=repr)
def test_frame_with_a_byte_too_many(kind):
    ours = {"version": cexec.PROTOCOL} if kind is cexec.HELLO else {}
    reader, payload = cexec.FrameReader(), kind.pack(**filled(kind, **ours)) + b"\0"
    with pytest.raises(cexec.ProtocolError, match="too many"):
        all_frames(reader, cexec.FRAME_HEAD.pack(kind.code, 0, 0, len(payload)) + payload, size=100000)


def test_random_frames_are_only_protocol_errors_and_take_bounded_memory():
    """20,000 streams, half of them with good heads and bad bodies; no reader ever grows beyond its one buffer."""
    chance, refused, largest = random.Random(5), 0, 0
    tracemalloc.start()
    try:
        for _ in range(20000):
            size = chance.randrange(1, 200)
            stream = chance.getrandbits(8 * size).to_bytes(size, "big")
            if chance.randrange(2):
                size = chance.choice((0, 1, 4, size, size, 5000, 70000))
                stream = cexec.FRAME_HEAD.pack(chance.randrange(18), 0, 1, size) + stream * chance.choice((1, 1, 20))
            reader = cexec.FrameReader()
            try:
                all_frames(reader, stream, chance=chance)
            except cexec.ProtocolError:
                refused += 1
            largest = max(largest, len(reader.view))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refused > 10000 and largest <= cexec.FrameReader.FULL_SIZE and peak < 8 << 20


PAGE_TYPES = {"B": "u8", "H": "u16", "I": "u32", "Q": "u64", "8s": "bytes 8", "16s": "bytes 16", "32s": "bytes 32",
              "240s": "bytes 240",
              "text": "text", "texts": "texts", "rest": "all bytes", "rows:HHB": "rows Pq u16 , u16 , u8",
              "rows:HQQ": "rows Pq u16 , u64 , u64"}


@pytest.mark.parametrize("message", [cexec.COMMON] + all_messages(), ids=repr)
def test_cexec_7_has_every_message_with_its_code_and_fields(message):
    page = read(os.path.join(HERE, "man", "cexec.7")).decode()
    title = ".It Sy " + message.name + (" Pq %d" % message.code if message.code else "") + "\n"
    assert page.count(title) == 1, title
    entry = re.split(r"^\.(?:It Sy|El|Sh)\b", page.partition(title)[2], maxsplit=1, flags=re.M)[0]
    fields = re.findall(r"^\.Va (\w+) Pq (.+?)(?: [,;.])?$", entry, re.M)
    assert fields == [(field, PAGE_TYPES[kind]) for field, kind in message.fields.items()]
    assert ("No fields." in entry) == (not fields)


@pytest.mark.parametrize("variables, arguments", [
    ([], []), ([b"A="], []), ([b"A=1", b"B=\xff\n"], [b"", b"x", b""]), ([], [b""] * 1000),
    ([b"A=" + b"x" * 300000, b"B=2"], [b"y" * 131072]), ([b"A=" + b"x" * (cexec.WORDS_CHUNK - 3)], [b"z"]),
    ([b"A="] * (cexec.WORDS_MAX // 11), [])],
    ids=["none", "one", "both", "empty ones", "large", "a whole chunk", "as many as there can be"])
def test_words_there_and_back(variables, arguments):
    words, job = words_sent(variables, arguments)
    assert words.take(job.variables, job.arguments) == (variables, arguments)
    assert words.take(0, 0) == ([], [])         # and the next job's are its own


@pytest.mark.parametrize("variables, arguments", [(0, 0), (1, 0), (2, 1), (0, 3), (2 ** 32 - 1, 2 ** 32 - 1)])
def test_words_of_another_number_than_job_says(variables, arguments):
    with pytest.raises(cexec.ProtocolError, match="other words"):
        words_sent([b"A=1", b"B=2"])[0].take(variables, arguments)


def test_words_without_an_end():
    words = cexec.Words()
    words.add(b"A=1\0B=2")
    for count in (1, 2):
        with pytest.raises(cexec.ProtocolError, match="other words"):
            words.take(count, 0)


@pytest.mark.parametrize("piece", [b"x" * cexec.CONTROL_MAX, bytes(cexec.CONTROL_MAX), b""],
                         ids=["long", "many", "none"])
def test_words_without_bounds(piece):
    words = cexec.Words()
    with pytest.raises(cexec.ProtocolError, match="more than 6 MiB"):
        for _ in range(cexec.WORDS_MAX // cexec.CONTROL_MAX + 1):
            words.add(piece)
    assert len(words.data) + 8 * words.count <= cexec.WORDS_MAX + 9 * cexec.CONTROL_MAX


# ---- Groups ----------------------------------------------------------------


@pytest.mark.parametrize("text, targets", [
    ("10.0.0.255", [(None, "10.0.0.255", 3010)]),
    (" 10.0.0.255 ", [(None, "10.0.0.255", 3010)]),
    ("255.255.255.255:4000", [(None, "255.255.255.255", 4000)]),
    ("239.1.2.3:1", [(None, "239.1.2.3", 1)]),
    (LOOPBACK + ":239.1.2.3", [(LOOPBACK, "239.1.2.3", 3010)]),
    (LOOPBACK + ":127.0.0.1:65535", [(LOOPBACK, "127.0.0.1", 65535)]),
    ("[fd00::1]", [(None, "fd00::1", 3010)]),
    ("[FF02::0:1]:7", [(None, "ff02::1", 7)]),
    (LOOPBACK + ":[ff02::cec]:7", [(LOOPBACK, "ff02::cec", 7)]),
    ("[fe80::1%" + LOOPBACK + "]", [(None, "fe80::1%" + LOOPBACK, 3010)]),
    ("10.0.0.8/30:9", [(None, "10.0.0.9", 9), (None, "10.0.0.10", 9)]),
    ("10.0.0.9/32", [(None, "10.0.0.9", 3010)]),
    ("10.0.0.8/31", [(None, "10.0.0.8", 3010), (None, "10.0.0.9", 3010)]),
    ("10.0.0.9/30,[fd00::/126]:9", [(None, "10.0.0.9", 3010), (None, "10.0.0.10", 3010)]
     + [(None, "fd00::%d" % n, 9) for n in (1, 2, 3)]),
    ("127.0.0.1,10.0.0.255:4000, " + LOOPBACK + ":239.1.2.3:5",
     [(None, "127.0.0.1", 3010), (None, "10.0.0.255", 4000), (LOOPBACK, "239.1.2.3", 5)]),
])
def test_what_a_group_stands_for(text, targets):
    assert [tuple(target)[:3] for target in cexec.parse_group(text, 3010)] == targets


def test_group_of_names(monkeypatch):
    known = {"cluster.example": ["10.0.0.2", "10.0.0.1", "10.0.0.2"]}

    def lookup(name, *rest):
        return [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", (address, 0)) for address in known[name]]
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert [tuple(target) for target in cexec.parse_group("cluster.example:4000", 3010)] == [
        (None, "10.0.0.1", 4000, "cluster.example"), (None, "10.0.0.2", 4000, "cluster.example")]


def test_group_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put("hosts", "# the workers of \xc3\x85land\n10.0.0.1, 10.0.0.2:9   # two\n\n[fd00::1]\n10.1.0.0/30\n")
    put("more", "10.9.0.1")
    targets = cexec.parse_group("10.8.0.1,@hosts,@%s" % (tmp_path / "more"), 3010)
    assert [cexec.spelled(target.address, target.port) for target in targets] == [
        "10.8.0.1:3010", "10.0.0.1:3010", "10.0.0.2:9", "[fd00::1]:3010", "10.1.0.1:3010", "10.1.0.2:3010",
        "10.9.0.1:3010"]
    for text, said in (("", "no address"), ("# none\n\n", "no address"), ("@more", "names another file"),
                       ("10.0.0.1\nnonsense:::\n", "nonsense"), ("10.0.0.0/22\n" * 5, "more than 4096"),
                       ("# \xff\n10.0.0.1\n", "is not UTF-8")):
        put("wrong", text)
        assert said in fatal(100, cexec.parse_group, "@wrong", 3010)


def test_a_large_network_is_spoken_to_slowly():
    """A client of a network of a thousand addresses announces every two seconds, not every one."""
    assert len(cexec.parse_group("10.0.0.0/22", 3010)) == 1022
    assert 1022 * cexec.SECONDS_A_WAY > 2


def test_link_local_addresses_keep_their_interface():
    """In a datagram that is passed on within a host, and only there."""
    address = "fe80::1%" + LOOPBACK
    assert cexec.unpack_address(cexec.pack_address(address)) == address
    assert cexec.unpack_address(cexec.pack_address("fe80::1")) == "fe80::1"
    with pytest.raises(cexec.ProtocolError):
        cexec.unpack_address(bytes.fromhex("fe80ffffffff0000") + bytes(8))
    with pytest.raises(cexec.ProtocolError):
        cexec.unpack_address(bytes.fromhex("fe807fffffff0000") + bytes(8))


def test_group_is_cexec_group_else_group_else_everywhere(monkeypatch):
    for variables, address in (({"CEXEC_GROUP": "10.0.0.1", "GROUP": "10.0.0.2"}, "10.0.0.1"),
                               ({"GROUP": "10.0.0.2"}, "10.0.0.2"),
                               ({"CEXEC_GROUP": "", "GROUP": "10.0.0.2"}, "10.0.0.2"),
                               ({}, "255.255.255.255"),
                               ({"GROUP": ""}, "255.255.255.255")):
        for name in ("CEXEC_GROUP", "GROUP"):
            monkeypatch.setenv(name, variables.get(name, ""))
        assert [target.address for target in cexec.Group().targets] == [address]
    monkeypatch.setenv("GROUP", "staff member")          # tcsh's GROUP
    assert "CEXEC_GROUP" in fatal(100, cexec.Group)


HOST = [cexec.Interface(1, "lo", UP | LOOP, "127.0.0.1"),
        cexec.Interface(2, "eth0", UP | BROADCAST | MULTICAST, "10.0.0.1"),
        cexec.Interface(3, "eth1", UP | BROADCAST | MULTICAST, "10.1.0.1"),
        cexec.Interface(4, "tun0", UP | MULTICAST, "10.2.0.1"),
        cexec.Interface(5, "eth2", UP | BROADCAST | MULTICAST, None)]


@pytest.mark.parametrize("text, host, ways", [
    # every interface that broadcasts and has an address, and this host's own listeners
    ("255.255.255.255:9", HOST, [(2, "255.255.255.255", 9), (3, "255.255.255.255", 9), (0, "127.255.255.255", 9)]),
    ("239.1.2.3:9", HOST, [(2, "239.1.2.3", 9), (3, "239.1.2.3", 9), (4, "239.1.2.3", 9), (0, "127.255.255.255", 9)]),
    # a laptop without a network, and a system that does not tell
    ("255.255.255.255", HOST[:1], [(0, "127.255.255.255", 3010)]),
    ("255.255.255.255", [], [(0, "255.255.255.255", 3010), (0, "127.255.255.255", 3010)]),
    # one way for what is one place
    ("10.0.0.255", HOST, [(0, "10.0.0.255", 3010)]),
    ("10.0.0.7,127.0.0.1:5", HOST, [(0, "10.0.0.7", 3010), (0, "127.0.0.1", 5)]),
    # IPv6: every interface that has multicast, and this host by ::1
    ("[ff02::1]:9", HOST, [(2, "ff02::1", 9), (3, "ff02::1", 9), (4, "ff02::1", 9), (5, "ff02::1", 9), (0, "::1", 9)]),
    ("[ff02::1]:9", [], [(0, "ff02::1", 9), (0, "::1", 9)]),
    ("[fd00::7]:5,10.0.0.7", HOST, [(0, "fd00::7", 5), (0, "10.0.0.7", 3010)]),
    (LOOPBACK + ":[ff02::1]", HOST, [(socket.if_nametoindex(LOOPBACK), "ff02::1", 3010)]),
    (LOOPBACK + ":239.1.2.3", HOST, [(socket.if_nametoindex(LOOPBACK), "239.1.2.3", 3010)]),
])
def test_ways_to_a_group(text, host, ways, monkeypatch):
    monkeypatch.setattr(cexec, "interfaces", lambda: host)
    group = cexec.Group(text)
    found = list(group.ways())
    assert (found if cexec.LINUX else found[:len(ways)]) == ways


def test_interfaces_of_this_host():
    if not cexec.LINUX:
        assert cexec.interfaces() == []
        return
    loopback = [i for i in cexec.interfaces() if i.name == "lo"]
    assert [(i.address, bool(i.flags & cexec.IFF_LOOPBACK)) for i in loopback] == [("127.0.0.1", True)]


def test_send_counts_the_ways_and_keeps_the_last_error():
    port = free_port()
    group = cexec.Group("127.0.0.1:%d,240.0.0.1:%d,127.0.0.1:%d" % (port, port, port))
    udp = socket.AF_INET, socket.SOCK_DGRAM
    with socket.socket(*udp) as near, socket.socket(*udp) as far:
        far.bind(("127.0.0.1", port))
        far.settimeout(10)
        near.bind(("127.0.0.1", 0))     # from here 240.0.0.1 cannot be reached
        assert group.send({socket.AF_INET: near}, b"hello") == 2 and group.error
        assert [far.recv(10), far.recv(10)] == [b"hello"] * 2


def test_a_device_that_has_been_removed_is_no_way(monkeypatch):
    group = cexec.Group(LOOPBACK + ":239.1.2.3")

    def no_such(name):
        raise OSError(errno.ENODEV, "No such device")
    monkeypatch.setattr(socket, "if_nametoindex", no_such)
    assert list(group.ways()) == [] and group.error == LOOPBACK + ": No such device"


def test_a_family_for_which_there_is_no_socket_is_said():
    port = free_port()
    group = cexec.Group("[::1]:%d,127.0.0.1:%d" % (port, port))
    with cexec.open_udp(socket.AF_INET) as sock:
        assert (group.send({socket.AF_INET: sock}, b"x"), group.error) == (1, "no IPv6 here")
    assert (group.send({}, b"x"), group.error) == (0, "no IPv4 here")


def test_listener_passes_a_unicast_datagram_on_to_the_others():
    """Two listeners of one host share a port; only one hears what is sent to the host alone."""
    port = free_port()
    group = cexec.Group("127.255.255.255:%d" % port)
    listeners = cexec.open_listeners(group) + cexec.open_listeners(group)
    heard = [[], []]
    last = make_datagram(cexec.ANNOUNCE, made_pub(), NONCE, 1, **dict(FIRST_TRY, attempt=2))
    try:
        with cexec.open_udp(socket.AF_INET) as sock:
            sock.sendto(ANNOUNCEMENT, ("127.0.0.1", port))

            def all_heard(attempt):
                for listener, got in zip(listeners, heard):
                    found = listener.receive(listener.socks[socket.AF_INET])
                    if found:
                        got.append(found)
                return all(attempt in [found[0].body.attempt for found in got] for got in heard)
            until(lambda: all_heard(1), "both listeners' hearing")
            group.send({socket.AF_INET: sock}, last)      # what is still to come of the first comes before it
            until(lambda: all_heard(2), "both listeners' hearing")
        for got in heard:
            first = [found for found in got if found[0].body.attempt == 1]
            assert 1 <= len(first) <= 2     # the one that heard it hears its own copy as well, and that was all
            for datagram, address, _ in first:
                assert address == "127.0.0.1" and datagram.port == 4097 and datagram.proved_by(made_pub().secret)
    finally:
        for listener in listeners:
            listener.close()


@pytest.mark.parametrize("code, status, said", [
    (socket.EAI_AGAIN, 111, "the name box has no address now: why"),
    (socket.EAI_NONAME, 100, "not an address, and the name box has none: why")])
def test_a_name_without_an_answer_now_may_have_one_later(monkeypatch, code, status, said):
    def getaddrinfo(*_):
        raise socket.gaierror(code, "why")
    monkeypatch.setattr(cexec.socket, "getaddrinfo", getaddrinfo)
    assert fatal(status, cexec.parse_group, "box", 1) == "group box: " + said
    assert fatal(status, cexec.own_address, "box") == "SELF box: " + said


def test_a_device_with_a_nul_in_a_file_of_addresses(tmp_path):
    fatal(111, cexec.parse_group, "@" + put(tmp_path / "group", "a\0b:127.0.0.1"), 1)


# ---- The event loop --------------------------------------------------------

def test_timers_in_the_order_of_their_times():
    loop, called = cexec.Loop(), []
    for delay, name in ((0.02, "c"), (0.0, "a"), (0.01, "b"), (0.0, "a2"), (0.02, "c2")):
        loop.after(delay, lambda name=name: called.append(name))
    spin(loop, lambda: len(called) == 5)
    assert called == ["a", "a2", "b", "c", "c2"]


def test_a_cancelled_timer_is_not_called():
    loop, called = cexec.Loop(), []
    timers = [loop.after(0.05 * i, lambda i=i: called.append(i)) for i in range(5)]
    loop.after(0, timers[2].cancel)     # by a timer of the same turn, too
    timers[0].cancel()
    timers[4].cancel()
    spin(loop, lambda: len(called) == 2)
    assert called == [1, 3] and loop._patience() is None


def test_a_timer_may_set_itself_again_and_starves_nobody():
    loop, called = cexec.Loop(), []
    near, far = os.pipe()

    def again():
        called.append("timer")
        loop.after(0, again)
    again()
    loop.on_read(near, lambda: called.append(os.read(near, 10)))
    os.write(far, b"read")
    spin(loop, lambda: b"read" in called)
    loop.forget(near)
    close_all(near, far)


def test_what_came_is_seen_to_before_what_is_due():
    loop, called = cexec.Loop(), []
    near, far = os.pipe()
    loop.on_read(near, lambda: called.append(os.read(near, 10)))
    loop.after(0, lambda: called.append("due"))
    os.write(far, b"came")
    until(lambda: loop._patience() == 0)
    loop.turn()
    assert called == [b"came", "due"]
    close_all(near, far)


def test_what_nobody_wants_is_not_waited_for():
    """A closed or ready descriptor that is still registered would make the loop spin."""
    loop = cexec.Loop()
    near, far = socket.socketpair()
    fd = near.fileno()
    with near, far:
        loop.on_read(fd, lambda: None)
        loop.on_write(fd, lambda: None)
        assert set(loop.selector.get_map()) == {fd}
        loop.on_read(fd, None)
        loop.on_read(fd, None)
        assert list(loop.readers) == [] and list(loop.writers) == [fd]
        loop.forget(fd)
        assert not loop.selector.get_map() and not loop.writers
        loop.forget(fd)


def test_a_callback_may_be_replaced_and_forgotten_in_the_same_turn():
    """Of two that are ready, the first takes the other's call away: it is not called any more."""
    loop, called = cexec.Loop(), []
    pairs = [socket.socketpair() for _ in range(2)]
    fds = [near.fileno() for near, _ in pairs]

    def first(mine, other):
        called.append(mine)
        loop.forget(other)
    for mine, other in (fds, fds[::-1]):
        loop.on_read(mine, lambda: called.append("old"))
        loop.on_read(mine, lambda mine=mine, other=other: first(mine, other))
    for _, far in pairs:
        far.send(b"x")
    loop.after(0, lambda: None)
    loop.turn()
    assert len(called) == 1 and called[0] in fds
    for pair in pairs:
        for sock in pair:
            sock.close()


@pytest.mark.parametrize("make", [os.pipe, lambda: [sock.detach() for sock in socket.socketpair()]],
                         ids=["pipe", "socket"])
def test_a_loop_tells_that_the_reader_has_left(make):
    """Once, and it does not spin before."""
    loop, (reader, writer), left, turns = cexec.Loop(), make(), [], []
    loop.on_leave(writer, lambda: (left.append(True), loop.on_leave(writer, None)))
    loop.after(0.2, lambda: turns.append(len(left)))
    count = 0
    while not turns:
        loop.turn()
        count += 1
    assert turns == [0] and count < 5
    os.close(reader)
    loop.turn()
    assert left == [True] and not loop.leavers
    loop.on_leave(writer, lambda: None)
    loop.on_write(writer, lambda: None)
    loop.forget(writer)
    assert not loop.selector.get_map().keys() - {loop.watch.fileno()} and not loop.leavers
    os.close(writer)


def test_a_loop_moves_its_own_sockets_out_of_the_way():
    loop = cexec.Loop(floor=300)
    sock = loop.above_floor(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    assert sock.fileno() >= 300 and not os.get_inheritable(sock.fileno())
    assert loop.above_floor(sock) is sock
    sock.setblocking(False)
    sock.close()


def dialled(address, port, seconds=20):
    """What a Dial calls, once: ("connected", a socket, the seconds left) or ("failed", why, unreached)."""
    loop, told = cexec.Loop(), []
    cexec.Dial(loop, address, port, seconds, lambda *words: told.append(("connected", *words)),
               lambda *words: told.append(("failed", *words)))
    assert not told
    spin(loop, lambda: told, "the end of it")
    assert not loop.readers and not loop.writers and not any(timer.call for _, _, timer in loop.timers)
    (found,) = told
    return found


def test_a_connection_is_given_with_what_is_left_of_its_deadline():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        word, sock, left = dialled("127.0.0.1", listener.getsockname()[1])
        with sock:
            assert word == "connected" and 0 < left <= 20 and sock.getpeername() == listener.getsockname()


def test_a_connection_that_fails_tells_why_and_whose_fault_it_is(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert dialled("127.0.0.1", closed.getsockname()[1]) == ("failed", os.strerror(errno.ECONNREFUSED), True)
    far, near = socket.socketpair()
    with far:
        while True:                         # until it can't be written
            try:
                near.send(bytes(65536), socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
        monkeypatch.setattr(cexec, "begin_connection", lambda address, port: (near, None))
        assert dialled("127.0.0.2", 9, 0.01) == ("failed", "no connection in 0.01 s", True) and near.fileno() < 0
    monkeypatch.setattr(cexec, "begin_connection", lambda address, port: (None, "Too many open files"))
    assert dialled("127.0.0.2", 9) == ("failed", "Too many open files", False)


# ---- The channel, two ends of it back to back ------------------------------

def test_both_ends_know_the_certificate(wire, worker_key):
    assert wire.here.link.tls.fingerprint() == made_pub().fingerprint
    assert wire.here.lost == wire.there.lost == []


class Tap:
    """Writes bytes into a descriptor as it takes them, or gathers what comes out of one; driven by the loop."""

    def __init__(self, wire, fd, data=None, gathers=True):
        self.wire, self.fd, self.got, self.count, self.ended, self.error = wire, fd, bytearray(), 0, False, None
        self.digest, self.gathers = hashlib.sha256(), gathers
        self.data = None if data is None else memoryview(data)
        if data is None:
            wire.loop.on_read(fd, self.readable)
        else:
            wire.loop.on_write(fd, self.writable)

    def readable(self):
        piece = os.read(self.fd, 1 << 20)
        self.count += len(piece)
        self.digest.update(piece)
        if self.gathers:
            self.got += piece
        if not piece:
            self.ended = True
            self.stop()

    def writable(self):
        try:
            self.data = self.data[os.write(self.fd, self.data[:1 << 20]):]
        except OSError as error:
            self.error, self.data = error, b""
        if not self.data:
            self.stop()

    def stop(self):
        self.wire.loop.forget(self.fd)

    def hang_up(self):
        self.stop()
        self.wire.close_fd(self.fd)


@pytest.mark.parametrize("size", [0, 1, cexec.FRAME_MAX + 1, 3 * cexec.WINDOW])
def test_bytes_and_end_of_file_come_through(size, wire):
    data = noise(size)
    into, out = wire.through(0)
    back_into, back_out = wire.pipe(1, wire.there, "read"), wire.pipe(1, wire.here, "write")
    if size:
        Tap(wire, into, data)
    tap, back = Tap(wire, out), Tap(wire, back_out)
    wire.spin(lambda: len(tap.got) == size, "the bytes' arrival")
    assert tap.got == data and not tap.ended and tap is not back
    wire.close_fd(into)
    wire.spin(lambda: tap.ended, "the end of file")
    assert tap.got == data and not back.ended
    assert wire.here.channels[0].source.state == wire.there.channels[0].sink.state == cexec.ENDED
    os.write(back_into, b"there")
    wire.close_fd(back_into)
    wire.spin(lambda: back.ended)
    assert back.got == b"there" and (wire.here.lost, wire.there.lost) == ([], [])


def test_a_link_has_its_system_look_for_a_peer_that_has_vanished(wire):
    for holder in (wire.here, wire.there):
        sock = holder.link.sock
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        names = [name for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT") if hasattr(socket, name)]
        assert [sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names] in ([60, 15, 4], [])


def test_a_reader_that_has_gone_reaches_the_writer(wire):
    into, out = wire.through(0)
    feed = Tap(wire, into, noise(8 << 20))
    tap = Tap(wire, out)
    wire.spin(lambda: len(tap.got) > 100000)
    tap.hang_up()
    wire.spin(lambda: feed.error)
    assert feed.error.errno == errno.EPIPE
    assert wire.here.channels[0].source.state == wire.there.channels[0].sink.state == cexec.SHUTDOWN
    assert wire.here.errors == wire.there.errors == []


def test_a_socket_is_closed_one_way_at_a_time(wire):
    here, there = wire.pair(5, wire.here), wire.pair(5, wire.there)
    with here, there:
        here.send(b"ping")
        tap = Tap(wire, there.fileno())
        wire.spin(lambda: tap.got == b"ping")
        here.shutdown(socket.SHUT_WR)
        wire.spin(lambda: tap.ended)
        there.send(b"pong after that")
        back = Tap(wire, here.fileno())
        wire.spin(lambda: back.got == b"pong after that")
        assert not back.ended
        there.close()
        wire.spin(lambda: back.ended)
        assert all(stream.state != cexec.OPEN for holder in (wire.here, wire.there)
                   for stream in (holder.channels[5].source, holder.channels[5].sink))


def test_frames_that_are_sent_together_leave_in_one_packet(wire, monkeypatch):
    frames, writes = [cexec.make_frame(cexec.PING), data_frame(0, b"x"), cexec.make_frame(cexec.EOF, 0)], []
    tls_write = wire.here.link.tls.write
    out = Tap(wire, wire.pipe(0, wire.there, "write"))
    monkeypatch.setattr(wire.there, "rcvd_ping", lambda *_: None, raising=False)
    monkeypatch.setattr(wire.here.link.tls, "write", lambda data: writes.append(data) or tls_write(data))
    wire.here.link.send_frames(frames)
    wire.spin(lambda: out.ended)
    assert out.got == b"x" and writes == [b"".join(frames)]


def test_a_sink_that_nobody_drains_stops_its_source_and_nothing_else(wire):
    size = 3 * cexec.WINDOW
    stalled, other = noise(size, 1), noise(size, 2)
    into, out = wire.through(0)
    other_into, other_out = wire.through(1)
    Tap(wire, into, stalled)
    source, sink = wire.here.channels[0].source, wire.there.channels[0].sink
    tracemalloc.start()
    try:
        wire.spin(lambda: source.credit == 0 and sink.received == source.sent, "the credit's end")
        Tap(wire, other_into, other)
        tap = Tap(wire, other_out, gathers=False)
        wire.spin(lambda: tap.count == size, "the other channel")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert tap.digest.digest() == hashlib.sha256(other).digest()
    assert source.sent == cexec.WINDOW and len(sink.queue) == cexec.WINDOW - sink.written <= cexec.WINDOW
    assert peak < 2 * cexec.WINDOW + (2 << 20)
    late = Tap(wire, out)
    wire.spin(lambda: len(late.got) == size, "the rest")
    assert late.got == stalled and not sink.queue


def test_a_window_in_frames_of_one_byte_takes_no_more_memory(wire):
    """A holder of a pub may send so; what is kept is bytes, not pieces."""
    into, out = wire.through(0)
    sink, count = wire.there.channels[0].sink, 100000
    tracemalloc.start()
    try:
        for _ in range(count // 1000):
            wire.raw(data_frame(0, b"x") * 1000)
            wire.spin(lambda: not wire.here.link.congested)
        wire.spin(lambda: sink.received == count, "the frames' arrival")
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept < 4 << 20
    tap = Tap(wire, out)
    wire.spin(lambda: len(tap.got) == count)
    assert wire.there.lost == []


@pytest.mark.parametrize("most_in, most_out", [(1, 1), (1, 70), (70, 1), (700, 300), (3000, 900), (999, 2000)])
def test_a_backlog_gives_its_bytes_in_order_however_they_come_and_go(most_in, most_out, monkeypatch):
    monkeypatch.setattr(cexec, "FRAME_MAX", 1000)       # pieces of so many
    data, came, went, backlog, chance = noise(20000), 0, bytearray(), cexec.Backlog(), random.Random(7)
    while len(went) < len(data):
        view = memoryview(data)[came:][:chance.randint(0, most_in)]
        backlog.add(view)
        came += len(view)
        with backlog.first() as first:
            assert bool(first) == bool(backlog)
            count = chance.randint(0, min(most_out, len(first)))
            went += first[:count]
        backlog.drop(count)
        assert len(backlog) == came - len(went) and bytes(backlog) == data[len(went):came]
    assert went == data and not backlog and not bytes(backlog)


def test_a_backlog_of_single_bytes_is_a_few_pieces_and_these_are_used_again():
    backlog, size = cexec.Backlog(), cexec.FRAME_MAX
    for _ in range(3 * size + 1):
        backlog.add(b"x")
    pieces = list(backlog.pieces)
    assert list(map(len, pieces)) == [size] * 4
    for turn in range(10):
        backlog.drop(size)
        backlog.add(bytes(size))
        assert len(backlog) == 3 * size + 1
    assert sorted(map(id, pieces)) == sorted(map(id, backlog.pieces)) and bytes(backlog) == bytes(3 * size + 1)


def test_after_shut_what_was_under_way_is_swallowed(wire):
    """No violation: the peer could not know; but no more of it than a window, and nothing is kept."""
    into, out = wire.through(0)
    wire.close_fd(out)
    for _ in range(cexec.WINDOW // cexec.FRAME_MAX):
        wire.raw(data_frame(0, bytes(cexec.FRAME_MAX)))
        wire.spin(lambda: not wire.here.link.congested)
    wire.raw(cexec.make_frame(cexec.EOF, 0) + cexec.make_frame(cexec.PING))
    wire.spin(lambda: wire.there.lost)
    assert wire.there.lost == [("PING out of place", True)]         # all before it was in order
    assert wire.there.channels[0].sink.state == cexec.SHUTDOWN and not wire.there.channels[0].sink.queue


def test_a_failed_write_is_told_and_shuts_the_channel(wire):
    """ENOSPC is no end of file."""
    wire.pipe(0, wire.here, "read")
    fd = os.open("/dev/full", os.O_WRONLY)
    wire.fds.append(fd)
    wire.there.carry(0, cexec.End(fd, fd, lambda: wire.close_fd(fd), ["write"]))
    wire.raw(data_frame(0, b"does not fit"))
    wire.spin(lambda: wire.here.channels[0].source.state == cexec.SHUTDOWN)
    assert [(channel, error.errno) for channel, error in wire.there.errors] == [(0, errno.ENOSPC)]


TOO_MUCH = [data_frame(1, bytes(cexec.FRAME_MAX))] * (cexec.WINDOW // cexec.FRAME_MAX)


# At the other end channel 1 is a sink that nobody drains, and channel 2 a source
@pytest.mark.parametrize("stream, word", [
    (TOO_MUCH + [data_frame(1, b"x")], "without credit"),
    ([cexec.make_frame(cexec.EOF, 1), data_frame(1, b"x")], "after EOF"),
    ([data_frame(1, b"x" * 100000), cexec.make_frame(cexec.EOF, 1), data_frame(1, b"x")], "after EOF"),
    ([cexec.make_frame(cexec.EOF, 1)] * 2, "EOF twice"),
    ([data_frame(1, b"x" * 100000)] + [cexec.make_frame(cexec.EOF, 1)] * 2, "EOF twice"),
    ([data_frame(2, b"x")], "no channel 2"),
    ([data_frame(3, b"x")], "no channel 3"),
    ([data_frame(65535, b"x")], "no channel 65535"),
    ([cexec.make_frame(cexec.EOF, 2)], "no channel 2"),
    ([cexec.make_frame(cexec.SHUT, 1)], "no channel 1"),
    ([cexec.make_frame(cexec.CREDIT, 1, bytes=1)], "no channel 1"),
    ([cexec.make_frame(cexec.CREDIT, 2, bytes=1)], "more credit"),
    ([cexec.make_frame(cexec.CREDIT, 2, bytes=2 ** 32 - 1)], "more credit"),
    ([cexec.make_frame(cexec.HELLO, **filled(cexec.HELLO))], "HELLO out of place"),
    ([cexec.make_frame(cexec.AUTH, **filled(cexec.AUTH))], "AUTH out of place"),
    ([cexec.make_frame(cexec.JOB, **filled(cexec.JOB))], "JOB out of place"),
    ([cexec.make_frame(cexec.ACCEPT)], "ACCEPT out of place"),
    ([cexec.make_frame(cexec.REFUSE, status=0, reason="no")], "REFUSE out of place"),
    ([cexec.FRAME_HEAD.pack(cexec.DATA.code, 0, 1, cexec.FRAME_MAX + 1)], "frame of kind 7"),
    ([cexec.FRAME_HEAD.pack(cexec.DATA.code, 0, 1, 2 ** 32 - 1) + bytes(1000)], "frame of kind 7"),
    ([cexec.FRAME_HEAD.pack(cexec.EXIT.code, 0, 0, cexec.CONTROL_MAX + 1)], "frame of kind 15"),
    ([cexec.FRAME_HEAD.pack(0, 0, 0, 0)], "frame of kind 0"),
    ([cexec.FRAME_HEAD.pack(200, 0, 0, 0)], "frame of kind 200"),
    ([cexec.FRAME_HEAD.pack(cexec.CREDIT.code, 0, 2, 3) + bytes(3)], "CREDIT cut short"),
    ([cexec.FRAME_HEAD.pack(cexec.EOF.code, 0, 1, 1) + b"x"], "EOF with 1 bytes too many"),
    ([noise(5000)], ""),
], ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "")
def test_a_violation_loses_the_link_and_nothing_else(stream, word, wire):
    out = wire.pipe(1, wire.there, "write")
    wire.pipe(2, wire.there, "read")
    for piece in stream:
        wire.raw(piece)
        wire.spin(lambda: not wire.here.link.congested or wire.there.lost)
    wire.spin(lambda: wire.there.lost and wire.here.lost)
    (reason, violation), = wire.there.lost
    assert violation and word in reason, reason
    assert [violation for _, violation in wire.here.lost] == [False]        # to whoever broke it, a closed connection
    assert wire.there.link.closed and wire.there.link.sock.fileno() == -1
    allowed = b"".join(piece[8:] for piece in stream if piece[:1] == bytes([cexec.DATA.code]))
    tap = Tap(wire, out)
    left = wire.there.channels[1].sink.queue
    wire.spin(lambda: len(tap.got) == wire.there.channels[1].sink.written)
    assert allowed.startswith(bytes(tap.got)) and len(left) <= cexec.WINDOW


@pytest.mark.parametrize("data, word", [
    (b"GET / HTTP/1.0\r\n\r\n", ""), (b"\x17\x03\x03\x00\x20" + bytes(32), ""), (b"\x15\x03\x03\x00\x02\x02\x28", ""),
    (b"\x17\x03\x03\xff\xff", ""), (noise(2000), "")])
def test_bytes_beneath_tls_that_are_no_tls_are_a_violation(data, word, wire):
    wire.pipe(1, wire.there, "write")
    wire.here.link.sock.send(data)
    wire.spin(lambda: wire.there.lost)
    (reason, violation), = wire.there.lost
    assert violation and reason.startswith("TLS: ")
    assert wire.there.channels[1].sink.received == 0


@pytest.mark.parametrize("how", ["closed", "reset", "cut in a record", "said so in TLS"])
def test_a_cut_connection_is_no_violation_and_no_end_of_file(how, wire):
    out = wire.pipe(1, wire.there, "write")
    wire.raw(data_frame(1, b"so far"))
    tap = Tap(wire, out)
    wire.spin(lambda: tap.got == b"so far")
    link = wire.here.link
    if how == "reset":
        link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    elif how == "cut in a record":
        link.tls.write(data_frame(1, b"x" * 1000))
        link.sock.send(link.tls.take()[:500])
    elif how == "said so in TLS":
        link.finish()
    link.close()
    wire.spin(lambda: wire.there.lost)
    (reason, violation), = wire.there.lost
    assert not violation and reason and not tap.ended and tap.got == b"so far"
    assert wire.there.channels[1].sink.state == cexec.OPEN


def test_a_lost_link_is_told_once_and_is_not_waited_for(wire):
    wire.here.link.close()
    wire.spin(lambda: wire.there.lost)
    wire.there.link.fail("again")
    wire.there.link.send(cexec.PING)
    wire.there.link.flush()
    assert len(wire.there.lost) == 1 and not wire.loop.selector.get_map()


def test_a_link_whose_writes_fail_reads_on(wire):
    """The peer has closed its reading side; what it sent before still comes."""
    out = wire.pipe(1, wire.there, "write")
    wire.raw(data_frame(1, b"last words"))
    wire.there.link.write_closed = True
    wire.there.link.send(cexec.PING)
    tap = Tap(wire, out)
    wire.spin(lambda: tap.got == b"last words")
    assert wire.there.lost == []


def test_no_handshake_with_what_is_not_tls(worker_key):
    loop, owner = cexec.Loop(), Holder(None)
    for context, server_side in ((cexec.tls_context(), False), (cexec.tls_context(worker_key), True)):
        near, far = tcp_pair()
        with far:
            owner.lost = []
            link = cexec.Link(loop, near, cexec.Tls(context, server_side), owner)
            link.start()
            far.send(noise(3000))
            spin(loop, lambda: owner.lost)
        assert owner.lost[0][1] and owner.lost[0][0].startswith("TLS: ") and not owner.ready
    assert not loop.selector.get_map()


def test_a_source_that_is_to_end_waits_for_credit_and_not_for_an_endless_writer():
    zero = os.open("/dev/zero", os.O_RDONLY)
    holder = Holder(cexec.Loop())
    nothing = {"send": lambda *words: None, "send_data": lambda *words: None}
    holder.link = SimpleNamespace(congested=False, closed=False, **nothing)
    source = holder.carry(1, cexec.End(zero, zero, lambda: os.close(zero), ["read"])).source
    source.credit = 1000
    source.close_soon()
    assert (source.sent, source.state) == (1000, cexec.DRAINING)
    source.rcvd_credit(cexec.WINDOW)
    assert (source.sent, source.state) == (cexec.PIPE_SIZE, cexec.ENDED)


@pytest.mark.parametrize("late", [
    lambda holder, source: holder.link_writable(holder.link), lambda holder, source: source.rcvd_credit(1)])
def test_a_source_at_its_end_leaves_the_next_file_with_its_number_alone(late):
    """A slow link can be written again, or CREDIT comes, when the End was closed long ago."""
    reader, writer = os.pipe()
    holder, called = Holder(cexec.Loop()), []
    holder.link = SimpleNamespace(congested=False, closed=False, send=lambda *words: None,
                                  send_data=lambda *words: None)
    source = holder.carry(1, cexec.End(reader, reader, lambda: os.close(reader), ["read"])).source
    os.write(writer, b"data")
    os.close(writer)
    holder.refresh()
    spin(holder.loop, lambda: source.state is cexec.ENDED)
    again, writer = os.pipe()
    try:
        assert again == reader
        holder.loop.on_read(again, lambda: called.append(os.read(again, 1)))
        late(holder, source)
        os.write(writer, b"x")
        assert again in holder.loop.readers
        spin(holder.loop, lambda: called)
    finally:
        close_all(again, writer)


@pytest.mark.parametrize("writer_left, credit, sent, state", [
    (True, 9, [(b"data", 4), cexec.EOF], cexec.ENDED), (True, 3, [(b"dat", 3), cexec.EOF], cexec.ENDED),
    (True, 0, [cexec.EOF], cexec.ENDED), (False, 9, [], cexec.SHUTDOWN)])
def test_shut_that_its_writer_can_no_longer_be_told(writer_left, credit, sent, state):
    """Then the peer learns that there was more, if there was."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    holder, frames = Holder(cexec.Loop()), []
    holder.link = SimpleNamespace(
        congested=False, closed=False, send=lambda kind, *words: frames.append(kind),
        send_data=lambda number, buffer, count: frames.append((bytes(buffer[8:8 + count]), count)))
    source = holder.carry(1, cexec.PipeEnd(reader, reader, lambda: os.close(reader), ["read"])).source
    source.credit = credit
    os.write(writer, b"data")
    if writer_left:
        os.close(writer)
    source.rcvd_shut(True)
    assert (frames, source.state) == (sent, state)
    if not writer_left:
        with pytest.raises(BrokenPipeError):
            os.write(writer, b"more")
        os.close(writer)


@pytest.mark.parametrize("events, cut", [
    ("data leave eof", True), ("data eof leave", True), ("leave data eof", True), ("leave eof", False),
    ("data leave", False), ("data eof", False), ("leave data", False)])
def test_what_a_sink_knows_of_output_that_was_cut(wire, events, cut):
    """Bytes found no reader, and the peer's writer was at its end before it could be told."""
    out = wire.pipe(0, wire.there, "write")
    sink = wire.there.channels[0].sink
    filler = os.dup(sink.end.fd)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(filler, bytes(4096))               # so that "data" has to wait
    os.close(filler)
    for event in events.split():
        {"data": lambda: sink.rcvd_data(memoryview(b"x")), "eof": lambda: sink.rcvd_eof(True),
         "leave": lambda: (wire.close_fd(out), sink.break_off(True))}[event]()
    assert sink.has_cut() == cut


def test_a_terminal_in_the_background_is_not_drained_in_a_loop():
    looks = []

    class End(cexec.End):
        def may_read(self):
            looks.append(1)
            assert len(looks) < 10
            return False
    reader, writer = os.pipe()
    holder = Holder(cexec.Loop())
    holder.link = SimpleNamespace(congested=False, closed=False)
    source = holder.carry(1, End(reader, reader, lambda: None, ["read"])).source
    source.close_soon()
    assert source.state is cexec.DRAINING and looks
    close_all(reader, writer)


def test_a_dial_is_not_told_by_an_event_of_another_socket():
    """Which had the same number before: this one is not connected yet."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):          # it takes no more
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        told, loop = [], cexec.Loop()
        dial = cexec.Dial(loop, *listener.getsockname(), 9, lambda *words: told.append(words), told.append)
        dial.writable()
        assert told == [] and dial.sock.fileno() in loop.writers
        dial.close()


# What a stream is told, one after another -> its state after each
@pytest.mark.parametrize("half, events, states", [
    ("read", ["close_soon", "discard", "finish"], ["DRAINING", "DISCARDING", "ENDED"]),
    ("read", ["discard", "stop", "finish"], ["DISCARDING", "STOPPED", "STOPPED"]),
    ("read", ["rcvd_shut", "close_soon", "discard", "stop"], ["SHUTDOWN"] * 4),
    ("read", ["finish", "rcvd_shut", "close_soon", "discard", "stop"], ["ENDED"] * 5),
    ("read", ["close_soon", "rcvd_shut"], ["DRAINING", "SHUTDOWN"]),
    ("write", ["rcvd_eof", "stop"], ["ENDED", "ENDED"]),
    ("write", ["fill", "rcvd_eof", "break_off", "rcvd_eof"], ["OPEN", "DRAINING", "SHUTDOWN", "SHUTDOWN"]),
    ("write", ["fill", "rcvd_eof", "write_all"], ["OPEN", "DRAINING", "ENDED"]),
    ("write", ["fill", "rcvd_eof", "stop", "rcvd_eof"], ["OPEN", "DRAINING", "STOPPED", "STOPPED"]),
    ("write", ["break_off", "stop"], ["SHUTDOWN", "SHUTDOWN"]),
])
def test_a_stream_goes_only_where_the_drawing_says(half, events, states):
    """The source has no credit and does not read; the sink's End takes nothing until it is asked again."""
    class End(cexec.End):
        taken = 0

        def write(self, view):
            if not self.taken:
                self.taken = len(view)
                raise BlockingIOError
            return len(view)

        def read_into(self, view):
            raise AssertionError("read without credit")

    reader, writer = os.pipe()
    holder, frames = Holder(cexec.Loop()), []
    holder.link = SimpleNamespace(congested=False, closed=False, send=lambda kind, *words: frames.append(kind))
    fd = reader if half == "read" else writer
    channel = holder.carry(1, End(fd, fd, lambda: None, [half]))
    stream = channel.source or channel.sink
    if channel.source:
        channel.source.credit = 0
    words = {"rcvd_shut": [True], "rcvd_eof": [True], "break_off": [True]}
    seen = []
    try:
        for event in events:
            stream.rcvd_data(b"data") if event == "fill" else getattr(stream, event)(*words.get(event, []))
            seen.append(stream.state)
        assert seen == states
        # The peer is told of an end exactly once, and of none that it has told us, or that stop() made
        told = {"ENDED": [cexec.EOF], "SHUTDOWN": []} if half == "read" else {"SHUTDOWN": [cexec.SHUT]}
        assert frames == told.get(states[-1], [])
        watched = fd in holder.loop.readers or fd in holder.loop.writers
        assert not watched
        with pytest.raises(RuntimeError, match="not in the drawing"):
            stream._set(cexec.OPEN)
    finally:
        close_all(reader, writer)


@pytest.mark.parametrize("kind", [
    cexec.Source, cexec.Sink, cexec.Candidate, cexec.Command, cexec.Supervisor, cexec.KnownClient, cexec.Offer,
    cexec.Host, cexec.Lane], ids=lambda kind: kind.__name__)
def test_a_state_that_the_drawing_lacks_is_refused(kind):
    kind = type("It", (kind,), {"__repr__": lambda self: "it"})
    for state, following in kind.LAW.items():
        for other in set(kind.LAW) - set(following):
            it = kind.__new__(kind)
            it.state = state
            with pytest.raises(RuntimeError, match="it: from %s to %s is not in the drawing" % (state, other)):
                it._set(other)
            assert it.state == state


# ---- Descriptors and terminals of this host --------------------------------

@pytest.mark.parametrize("flags, numbers", [
    ("", set()), ("k -j4", set()), (" -j4 --jobserver-auth=3,4", {3, 4}), ("--jobserver-fds=5,6 -j", {5, 6}),
    ("--jobserver-auth=fifo:/tmp/GMfifo3 -j", set()), ("--jobserver-auth=-2,-2", set()), ("--jobserver-auth=3", {3}),
    ("--jobserver-auth=", set()), ("--jobserver-auth=\xb2,4", {4}), ("-- CFLAGS=3,4", set())])
def test_numbers_of_makes_jobserver(flags, numbers, monkeypatch):
    monkeypatch.setenv("MAKEFLAGS", flags)
    assert cexec.jobserver_numbers() == numbers


@pytest.mark.parametrize("way", ["by an owner", "by O_NONBLOCK", "by nothing but that", "by the offset"])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND])
def test_shared_offsets_are_found_and_left_as_they_were(way, flags, tmp_path, monkeypatch):
    """Without moving them, where that can be: or whoever writes to a log that is shared has its lines overwritten."""
    names = {"by an owner": ["F_DUPFD_QUERY"], "by O_NONBLOCK": ["F_DUPFD_QUERY", "F_SETOWN"]}.get(way, [])
    path = put(tmp_path / "file", "twelve bytes")
    one, other = os.open(path, flags), os.open(path, flags)
    copy = os.dup(one)
    try:
        for here, there in ((0, 0), (5, 5), (5, 6), (12, 12), (100, 100)):
            os.lseek(one, here, os.SEEK_SET)
            os.lseek(other, there, os.SEEK_SET)
            with monkeypatch.context() as without:
                for name in names:
                    without.setattr(cexec, name, 9999)
                if way != "by the offset":
                    without.setattr(cexec.os, "lseek", None)
                assert cexec.shares_offset(one, copy) and cexec.shares_offset(copy, one)
                assert not cexec.shares_offset(one, other) and not cexec.shares_offset(other, one)
            assert [os.lseek(fd, 0, os.SEEK_CUR) for fd in (one, copy, other)] == [here, here, there]
            assert {fcntl.fcntl(fd, fcntl.F_GETFL) & ~0o100000 for fd in (one, copy, other)} == {flags}
            assert {fcntl.fcntl(fd, fcntl.F_GETOWN) for fd in (one, copy, other)} == {0}
        assert read(path) == b"twelve bytes"
    finally:
        close_all(one, other, copy)


def test_a_disk_is_read_at_an_offset_of_our_own(tmp_path, monkeypatch):
    """It has one that others share, as a regular file does."""
    fd = os.open(put(tmp_path / "disk", "sectors"), os.O_RDONLY)
    status = os.fstat(fd)
    monkeypatch.setattr(cexec.os, "fstat", lambda fd: os.stat_result((stat.S_IFBLK | 0o600,) + status[1:]))
    item = cexec.Inherited(fd)
    end = cexec.local_end([item], ["read"], 3)
    view = memoryview(bytearray(3))
    assert item.kind == cexec.FILE and end.read_into(view) == 3 and bytes(view) == b"sec"
    assert end.read_into(memoryview(bytearray(9))) == 4 and end.read_into(view) == 0
    assert os.lseek(fd, 0, os.SEEK_CUR) == 0
    os.close(fd)


LIST_CHANNELS = """
import os, sys
sys.path.insert(0, %r)
import cexec
found = cexec.inherited_channels(int(sys.argv[2]))
with open(sys.argv[1], "w") as file:
    for channel, members in sorted(found.items()):
        item = members[0]
        file.write("%%s=%%s:%%s%%s " %% (",".join(str(m.number) for m in members), item.kind,
                                         "r" * item.readable, "w" * item.writable))
"""


@pytest.mark.parametrize("redirections, channels", [
    ("<&- >&- 2>&-", ""),
    ("</dev/null >/dev/null 2>/dev/null", "0=device:r 1,2=device:w"),
    ("<in >out 2>&1", "0=file:r 1,2=file:w"),
    ("<in >out 2>out", "0=file:r 1=file:w 2=file:w"),
    ("<in >>out 2>>out", "0=file:r 1=file:w 2=file:w"),
    ("<in 3<in 4<&3 >&- 2>&-", "0=file:r 3,4=file:r"),
    ("<>in 1<>out 2<>out", "0=file:r 1=file:w 2=file:w"),
    ("<&- >&- 2>&- 9<>in", "9=file:w"),
    ("<fifo >&- 2>&- 5<fifo", "0,5=pipe:r"),
    ("<>fifo >&- 2>&-", "0=pipe:r"),
    ("<&- 3<>fifo >&3 2>&-", "1,3=pipe:w"),
    ("3<>fifo <&3 >&- 2>&-", "0=pipe:r 3=pipe:w"),
    ("<fifo >&- 2>&- 5<>fifo", "0=pipe:r 5=pipe:w"),
    ("<fifo >>fifo 2>fifo 5<fifo", "0,5=pipe:r 1,2=pipe:w"),
    ("<&- >fifo 2>&- 5<fifo", "1=pipe:w"),
    ("<&- >/dev/null 2>&- 3<.", "1=device:w"),
    ("<&- >&- 2>&- 8</ 7>out", "7=file:w"),
    ("<&- 3>out >&3 2>&3", "1,2,3=file:w"),
])
@pytest.mark.parametrize("limit", [32])
def test_which_inherited_descriptors_are_carried(redirections, channels, limit, tmp_path):
    with open(str(tmp_path / "in"), "w") as file:
        file.write("input\n")
    os.mkfifo(str(tmp_path / "fifo"))
    holder = os.open(str(tmp_path / "fifo"), os.O_RDWR)     # so that opening it does not wait
    script = 'exec "$0" -c "$1" "$2" "$3" ' + redirections
    answer = str(tmp_path / "answer")
    try:
        subprocess.run(["sh", "-c", script, sys.executable, LIST_CHANNELS % os.path.dirname(cexec.__file__), answer,
                        str(limit)], cwd=str(tmp_path), check=True, timeout=60, close_fds=True)
    finally:
        os.close(holder)
    assert read(answer).decode().split() == channels.split()
    assert read(str(tmp_path / "in")) == b"input\n"


def channels_with(tmp_path, fds, limit=64, env=None):
    """What a process that inherits just these descriptors of ours finds to carry: {number: kind}."""
    answer = str(tmp_path / "answer")
    subprocess.run([sys.executable, "-c", LIST_CHANNELS % os.path.dirname(cexec.__file__), answer, str(limit)],
                   pass_fds=fds, check=True, timeout=60, env=dict(os.environ, **(env or {})),
                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = {}
    for word in read(answer).decode().split():
        numbers, _, kind = word.partition("=")
        found.update({int(number): kind for number in numbers.split(",") if int(number) > 2})
    return found


def test_inherited_sockets_and_terminals(tmp_path):
    stream, peer = socket.socketpair()
    datagrams, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener = socket.socket()
    listener.listen(1)
    master, terminal = os.openpty()
    fds = [stream.fileno(), datagrams.fileno(), listener.fileno(), master, terminal]
    try:
        limit = max(fds) + 1
        assert channels_with(tmp_path, fds, limit) == {stream.fileno(): "socket:rw", terminal: "terminal:w"}
        low = channels_with(tmp_path, fds, stream.fileno())
        assert stream.fileno() not in low
    finally:
        for sock in (stream, peer, datagrams, other, listener):
            sock.close()
        close_all(master, terminal)


def test_make_s_jobserver_is_not_carried(tmp_path):
    near, far = os.pipe()
    try:
        flags = {"MAKEFLAGS": " -j4 --jobserver-auth=%d,%d" % (near, far)}
        limit = max(near, far) + 1
        assert channels_with(tmp_path, [near, far], limit) == {far: "pipe:w"}
        assert channels_with(tmp_path, [near, far], limit, flags) == {}
    finally:
        close_all(near, far)


def test_a_terminal_is_opened_again_by_its_name(monkeypatch):
    """And nobody else's O_NONBLOCK is changed; a pipe has no name."""
    monkeypatch.setattr(cexec, "PROC_FD", "/nowhere/%d")
    master, terminal = pty.openpty()
    reader, writer = os.pipe()
    try:
        again = cexec.opened_again(cexec.Inherited(terminal))
        assert not os.get_blocking(again) and os.get_blocking(terminal) and os.ttyname(again) == os.ttyname(terminal)
        os.close(again)
        with pytest.raises(OSError):
            cexec.opened_again(cexec.Inherited(reader))
    finally:
        close_all(master, terminal, reader, writer)


@pytest.mark.parametrize("system, request_", [("linux", 0x80045430), ("darwin", 0x40807453), ("freebsd14", 0x4004740f),
                                              ("netbsd10", None)])
def test_masters_of_terminals_are_known_by_each_systems_ioctl(system, request_, monkeypatch):
    asked = []
    monkeypatch.setattr(cexec.sys, "platform", system)
    monkeypatch.setattr(cexec.fcntl, "ioctl", lambda fd, request, *rest: asked.append(request) or b"1")
    item = SimpleNamespace(number=0)
    assert cexec.Inherited._is_pty_master(item) == bool(request_) and asked == [request_] * bool(request_)


def terminal_end(fd):
    signals = []
    end = cexec.TerminalEnd(fd, fd, signals.append)
    end.signals = signals
    return end


@pytest.mark.parametrize("typed, sent, signals", [
    (b"echo ~\r", b"echo ~\r", 0), (b"~~x", b"~x", 0), (b"~x", b"~x", 0), (b"~\r~~~", b"~\r~~", 0),
    (b"~~~.", b"~~.", 0), (b"a~.", b"a~.", 0), (b"~.", b"", 1), (b"a\r~.", b"a\r", 1), (b"a\n~.b", b"a\nb", 1),
    (b"~?~.", b"", 1), (b"~?~~", b"~", 0), (b"\r\r~", b"\r\r", 0), (b"", b"", 0),
    (bytes(range(256)), bytes(range(256)), 0)])
def test_escapes_in_what_is_typed(typed, sent, signals):
    for size in (1, 2, 3, 1000):
        end = terminal_end(os.open(os.devnull, os.O_RDWR))
        pieces = [end.without_escapes(typed[i:i + size]) for i in range(0, len(typed), size)]
        assert (b"".join(pieces), end.signals) == (sent, [signal.SIGHUP] * signals)
        os.close(end.fd)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_typed_bytes_into_little_room(size):
    reader, writer = os.pipe()
    end, got = terminal_end(reader), b""
    os.write(writer, b"~a\r~~b\r~\r~")
    os.close(writer)
    while True:
        view = memoryview(bytearray(size))
        with contextlib.suppress(BlockingIOError):
            count = end.read_into(view)
            if not count:
                break
            got += bytes(view[:count])
    assert got == (b"~a\r~~b\r~\r~" if size == 1 else b"~a\r~b\r~\r")
    os.close(reader)


def test_modes_of_one_terminal_set_at_another():
    (near, far), (one_more, other) = pty.openpty(), pty.openpty()
    try:
        subprocess.run(["stty", "-F", os.ttyname(far), "erase", "^H", "-ixon", "iutf8", "-echo", "intr", "undef"],
                       check=True)
        cexec.set_terminal_modes(other, cexec.terminal_modes(far) + ["NEWFANGLED=1"])
        assert termios.tcgetattr(other) == termios.tcgetattr(far)
        cexec.set_terminal_modes(other, [])
        assert termios.tcgetattr(other) == termios.tcgetattr(far)
    finally:
        close_all(near, far, one_more, other)


def test_nothing_is_taken_from_a_terminal_in_the_background(monkeypatch):
    near, far = pty.openpty()
    sent, end = [], terminal_end(far)
    monkeypatch.setattr(end, "may_read", lambda: False)
    monkeypatch.setattr(os, "kill", lambda *words: sent.append(words))
    before = termios.tcgetattr(far)
    assert not end.take()
    assert (end.saved, sent, termios.tcgetattr(far)) == (None, [(0, signal.SIGTTOU)], before)
    close_all(near, far)


@pytest.mark.parametrize("modes, typed, lines, rest", [
    ("sane", b"\x04", b"\x04", b""), ("sane", b"a\r\x04", b"a\n\x04", b""),
    ("sane", b"a\x04\x04b", b"a\x04\x04", b"b"), ("sane", b"a\0\r\0\x04b\0", b"a\0\n\0\x04", b"b\0"),
    ("sane", b"a\x16\x04\r", b"a\x04\n", b""), ("sane", 4000 * b"x" + b"\r\x04", 4000 * b"x" + b"\n\x04", b""),
    ("sane eof ^B", b"a\x04\r\x02", b"a\x04\n\x02", b""), ("sane eol ^E", b"a\x05b\r", b"a\x05b\n", b""),
    ("sane eof undef", b"a\x04\r\x04", b"a\x04\n", b"\x04"), ("raw", b"a\n\x04", b"", b"a\n\x04")])
def test_an_end_of_file_that_was_typed_before_the_terminal_was_raw(modes, typed, lines, rest):
    """Raw mode alone would make a NUL of it.  What has no end yet is read as ever."""
    near, far = pty.openpty()
    subprocess.run(["stty", "-F", os.ttyname(far), *modes.split()], check=True)
    before, end = termios.tcgetattr(far), terminal_end(far)
    os.write(near, typed)
    assert select.select([far], [], [], PATIENCE)[0]
    assert end.take() and end.typed == lines and is_raw(near)
    os.write(near, b"\x04late")
    got, view = b"", memoryview(bytearray(1000))
    while len(got) < len(lines + rest) + 5:
        got += bytes(view[:end.read_into(view)])
    assert got == lines + rest + b"\x04late"
    end.restore()
    assert termios.tcgetattr(far) == before
    close_all(near, far)


# ---- cexec: searches, with workers in the test's hands ---------------------

@pytest.mark.parametrize("limit", [128, 1024])
def test_silent_connections_take_no_descriptor_that_is_needed(cluster, limit):
    """As many as the client may have, and more; a worker is found all the same."""
    port = group_port(cluster)
    cluster.launch = ["sh", "-c", 'ulimit -n %d; exec "$@"' % limit, "sh"] + cluster.launch
    with contextlib.ExitStack() as stack:
        with Ear(port) as ear:
            client = searching_client(cluster, port, "CMD=echo done")
            announced, _ = ear.wait_for(cexec.ANNOUNCE)
            for _ in range(180):
                sock = stack.enter_context(socket.socket())
                sock.connect(("127.0.0.1", announced.port))
            until(lambda: not not_taken("tcp", announced.port), "the connections' being accepted")
            ear.heard.clear()
            ear.wait_for(cexec.ANNOUNCE)            # it goes on
            assert open_files(client.pid) < min(limit, 128) + 30
        cluster.launch = cluster.launch[4:]
        cluster.shell_worker()
        assert client.stdout.read() == b"done\n" and client.wait(PATIENCE) == 0
        no_defect(read(client.log))


def test_holder_of_a_pub_cannot_play_the_worker(cluster):
    """All but the certificate is right: the client closes, says so to crat, and waits for a true one."""
    own_key = cexec.open_key(put(cluster.path("own"), cexec.format_key(OTHER_MASTER)[0]))
    crat = cluster.logger(cluster.pub)
    with Ear(group_port(cluster)) as ear:
        client = cluster.start_client(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        announcement = ear.wait_for(cexec.ANNOUNCE)
        for _ in range(2):
            with play_worker(*announcement, own_key) as peer:
                assert peer.next() is None      # neither AUTH nor JOB
    complaint = until(lambda: [line for line in crat.lines() if "rats out" in line], "the complaint")
    assert "127.0.0.1 rats out 127.0.0.1 for app.pub" in complaint[0] and "wrong certificate" in complaint[0]
    assert client.poll() is None
    cluster.worker("tr", "a-z", "A-Z")
    assert client.communicate(b"for the worker", timeout=60) == (b"FOR THE WORKER", b"") and client.returncode == 0
    until(lambda: any("completed by" in line for line in crat.lines()))
    assert len([line for line in crat.lines() if "rats out" in line]) == 1


def test_an_offer_with_a_name_that_is_too_long_is_none(cluster):
    key = cexec.open_key(cluster.key)
    with Ear(group_port(cluster)) as ear:
        client = searching_client(cluster, group_port(cluster))
        announced, address = ear.wait_for(cexec.ANNOUNCE)
        for over in (0, 1):
            with Peer(socket.create_connection((address, announced.port), 20), key) as peer:
                peer.send(cexec.HELLO, version=cexec.PROTOCOL, nonce=announced.nonce, worker_id=os.urandom(8),
                          address="127.0.0.1", host="x" * (255 + over))
                assert (peer.next() is None) == bool(over)
        assert signalled(client) == -signal.SIGTERM
        until(lambda: [heard for heard, _ in ear.hear() if heard.kind is cexec.ALERT
                       and heard.body.reason == "a name that is too long"], "the complaint")


def test_busy_that_answers_an_old_announcement_is_none(cluster):
    """It may be a replay, and would make a client wait in a line that is gone."""
    pub = cexec.open_pub(cluster.pub)
    with Ear(group_port(cluster)) as ear:
        client = searching_client(cluster, group_port(cluster))
        client_of, address = ear.wait_for(cexec.ANNOUNCE)

        def tries():
            return max(heard.body.attempt for heard, _ in ear.hear() if heard.kind is cexec.ANNOUNCE)

        def said(words, attempt):
            data = make_datagram(cexec.BUSY, pub, client_of.nonce, 0, **filled(cexec.BUSY, attempt=attempt, ahead=7))
            ear.mouth.sendto(data, (address, client_of.port))
            return words in read(client.log)
        for forged, nonce in ((pub._replace(secret=bytes(32)), client_of.nonce), (pub, os.urandom(16))):
            before = read(client.log).count(b"dropped BUSY")
            ear.mouth.sendto(make_datagram(cexec.BUSY, forged, nonce, 0,
                                               **filled(cexec.BUSY, attempt=tries(), ahead=7)),
                             (address, client_of.port))
            until(lambda: read(client.log).count(b"dropped BUSY") > before, "a forged one")
        until(lambda: tries() > cexec.FRESH_TRIES + 1, "a fifth try")
        until(lambda: said(b": it is old", 1), "a word on it")
        assert b"is busy" not in read(client.log)
        until(lambda: said(b"every slot of a worker is busy, 7 ahead", tries()), "a place in a line")
        assert signalled(client) == -signal.SIGTERM


def test_a_worker_that_refuses_is_avoided_for_seconds_and_its_reason_told(cluster):
    key, port, worker_id = cexec.open_key(cluster.key), free_port(), os.urandom(8)
    with Ear(port) as ear:
        client = searching_client(cluster, port, CEXEC_TIMEOUT_ACCEPT="3")
        announced, address = ear.wait_for(cexec.ANNOUNCE)

        def offer():
            peer = Peer(socket.create_connection((address, announced.port), 20), key)
            peer.send(cexec.HELLO, version=cexec.PROTOCOL, nonce=announced.nonce, worker_id=worker_id,
                      address="127.0.0.1", host="test")
            asked = peer.next()
            if asked:
                peer.expect(cexec.JOB)
                peer.send(cexec.REFUSE, status=0, reason="cannot fork: Resource temporarily unavailable")
            peer.sock.close()
            return asked
        assert offer() and not offer()
        until(offer, "another try")             # in a second
        assert not offer()
        assert client.wait(PATIENCE) == 111
    last = read(client.log).decode().splitlines()[-1]
    assert re.fullmatch(r"cexec: no worker took the job in \d+ s: worker test refused it: cannot fork: "
                        "Resource temporarily unavailable", last), last


def test_how_long_a_worker_is_avoided():
    avoided, now = cexec.Avoided(), time.monotonic()
    for seconds in (1, 2, 4):
        avoided.for_now(b"a")
        assert b"a" in avoided and b"b" not in avoided and avoided.seconds[b"a"] == seconds
    assert 0 < avoided.until[b"a"] - now
    avoided.until[b"a"] = now
    assert b"a" not in avoided
    avoided.forgive(b"a")
    avoided.for_now(b"a")
    assert avoided.seconds[b"a"] == 1
    avoided.for_good(b"b")
    assert b"b" in avoided and avoided.until[b"b"] > now + 1e9


REFUSALS = [
    ("REFUSE", lambda peer: peer.send(cexec.REFUSE, status=0, reason="not now")),
    ("a close", lambda peer: None),
    ("EXIT before GO", lambda peer: peer.send(cexec.EXIT, how=cexec.HOW_EXITED)),
    ("DATA before GO", lambda peer: peer.raw(data_frame(1, b"forged output"))),
    ("random bytes", lambda peer: peer.raw(noise(3000))),
]


def test_before_go_the_search_goes_on_whatever_a_worker_does(cluster):
    key = cexec.open_key(cluster.key)
    port = free_port()
    worker = cluster.worker("tr", "a-z", "A-Z")
    with Ear(port) as ear, Ear(group_port(cluster)) as mouth:
        client = searching_client(cluster, port)
        announced, address = ear.wait_for(cexec.ANNOUNCE)
        with play_worker(announced, address, key, nonce=os.urandom(16)) as peer:
            assert peer.next() is None          # an offer for another job
        with play_worker(announced, address, key) as peer:
            peer.asked()
            peer.send(cexec.HELLO, version=cexec.PROTOCOL, nonce=announced.nonce, worker_id=os.urandom(8),
                      address="127.0.0.1")      # once is enough
            until(lambda: b"HELLO out of place" in read(client.log), "the end of this offer")
            assert peer.next() is None
        for name, refuse in REFUSALS:
            with play_worker(announced, address, key) as peer:
                peer.asked()
                refuse(peer)
                if name == "a close":
                    continue
                assert peer.next() is None, name
        for hello in ({"version": cexec.PROTOCOL + 1}, {"version": 0}):
            with Peer(socket.create_connection((address, announced.port), 20), key) as peer:
                peer.send(cexec.HELLO, nonce=announced.nonce, **hello)
                assert peer.next() is None
        with Peer(socket.create_connection((address, announced.port), 20), key) as peer:
            peer.send(cexec.ACCEPT)             # nobody has asked
            assert peer.next() is None
        assert client.poll() is None and b"-> GO" not in read(client.log)
        mouth.say(announced.readdressed("127.0.0.1", announced.port, 1))
        assert client.communicate(b"done", timeout=60)[0] == b"DONE" and client.returncode == 0
    no_defect(read(client.log), read(worker.log))


@pytest.mark.parametrize("address", ["1\nworker=2", "10.0.0.1 status=0", "\udcff", "", "fe80::1%eth0\n", "10.0.0.300",
                                     "1.2.3.4\0"])
def test_a_worker_whose_address_is_none_gets_no_job(cluster, address):
    """It would be in a line that programs read."""
    key = cexec.open_key(cluster.key)
    report = os.open(cluster.path("report"), os.O_CREAT | os.O_WRONLY, 0o600)
    with Ear(group_port(cluster)) as ear:
        client = cluster.start("cexec", cluster.pub, stdout=subprocess.PIPE, pass_fds=[report],
                               env={"CEXEC_FD_FOR_ERRORS": str(report), "CEXEC_MAXFD": "3"})
        os.close(report)
        announced, there = ear.wait_for(cexec.ANNOUNCE)
        with Peer(socket.create_connection((there, announced.port), 20), key) as peer:
            peer.send(cexec.HELLO, version=cexec.PROTOCOL, nonce=announced.nonce, address=address)
            assert peer.next() is None
        assert ear.wait_for(cexec.ALERT)[0].body.reason == "an impossible address"
    cluster.worker("echo", "a true one")
    assert client.communicate(timeout=PATIENCE) == (b"a true one\n", None)
    report = read(cluster.path("report")).decode()
    assert re.fullmatch(r"worker=127\.0\.0\.1 seconds=[\d.]+ status=0 exited=0\n", report)


def test_a_connection_that_says_nothing_delays_no_job(cluster):
    """The job is done while whoever connected first still has all of its time to speak."""
    worker, port = cluster.worker("cat"), free_port()
    with Ear(port) as ear, Ear(group_port(cluster)) as mouth, contextlib.ExitStack() as silent:
        client = searching_client(cluster, port)
        announced, address = ear.wait_for(cexec.ANNOUNCE)
        for _ in range(5):
            silent.enter_context(socket.create_connection((address, announced.port), 20))
        mouth.say(announced.readdressed("127.0.0.1", announced.port, 1))
        assert client.communicate(b"quick", timeout=60)[0] == b"quick" and client.returncode == 0
        assert b"said nothing" not in read(client.log), "the job waited for them"
    no_defect(read(client.log), read(worker.log))


def test_announcement_says_its_pace(cluster):
    """That of 4096 addresses, and the longest that its randomness makes of it."""
    group = "127.0.2.0/22,127.0.8.0/22,127.0.16.0/22,127.0.24.0/22:%d" % group_port(cluster)
    with Ear(group_port(cluster)) as ear:
        client = cluster.start_client(env={"GROUP": group + ",127.255.255.255:%d" % group_port(cluster)})
        many = ear.wait_for(cexec.ANNOUNCE)[0].body.pause
        signalled(client)
        few = searching_client(cluster, group_port(cluster))
        announced = until(lambda: [heard.body for heard, _ in ear.hear() if heard.kind is cexec.ANNOUNCE
                                   and heard.body.pause < many], "a short one")
        few.terminate()
    assert many == int((4 * 1022 + 1) * 2 * 1.25) and announced[0].pause == 62


@pytest.mark.parametrize("count", [0, 1])
def test_more_pongs_than_words(cluster, count):
    """A worker does not hold a client that waits for its ACCEPT by PONGs for nothing."""
    key, port = cexec.open_key(cluster.key), free_port()
    with Ear(port) as ear:
        client = searching_client(cluster, port, *["A=1"] * count)
        announced, address = ear.wait_for(cexec.ANNOUNCE)
        with play_worker(announced, address, key) as peer:
            peer.asked()
            for _ in range(count + 1):
                peer.send(cexec.PONG)
            assert peer.next() is None
        assert ear.wait_for(cexec.ALERT)[0].body.reason == "PONG out of place"
        signalled(client)


def rows_of(job, **sent):
    """EXIT's rows: for each channel what was sent; sent["out"] on channel 1."""
    return [(channel, sent["out"] if channel == 1 else 0, 0) for number, channel, _ in job.descriptors
            if number == channel]


def says_hello(peer, job, out=5, leave=(), eofs=(1, 2), how=cexec.HOW_EXITED, again=b""):
    """A worker's part after GO: "hello" on descriptor 1, and EXIT that says how much that was."""
    peer.raw(data_frame(1, b"hello") + again)
    for channel in eofs:
        peer.send(cexec.EOF, channel, cexec.FLAG_WHOLE)
    rows = [row for row in rows_of(job, out=out) if row[0] not in leave]
    peer.send(cexec.EXIT, how=how, channels=rows)


ENDINGS = [
    ("all is right", 0, says_hello),
    ("more after EXIT", 0, lambda peer, job: (says_hello(peer, job), peer.raw(data_frame(1, b"late") + noise(99)))),
    ("EXIT counts more than came", 111, lambda peer, job: says_hello(peer, job, out=6)),
    ("EXIT counts less than came", 111, lambda peer, job: says_hello(peer, job, out=4)),
    ("EXIT counts nothing", 111, lambda peer, job: says_hello(peer, job, out=0)),
    ("EXIT has no row for an output", 111, lambda peer, job: says_hello(peer, job, leave=(1,))),
    ("EXIT before the end of an output", 111, lambda peer, job: says_hello(peer, job, eofs=(2,))),
    ("EXIT of no known kind", 111, lambda peer, job: says_hello(peer, job, how=9)),
    ("EXIT is missing", 111, lambda peer, job: (peer.raw(data_frame(1, b"hello")), peer.send(cexec.EOF, 1),
                                                 peer.send(cexec.EOF, 2))),
    ("nothing at all", 111, lambda peer, job: None),
    ("DATA after EOF", 111, lambda peer, job: (peer.send(cexec.EOF, 1), says_hello(peer, job, eofs=(2,)))),
    ("DATA for an input", 111, lambda peer, job: says_hello(peer, job, again=data_frame(0, b"x"))),
    ("ACCEPT twice", 111, lambda peer, job: (peer.send(cexec.ACCEPT), says_hello(peer, job))),
    ("an oversized frame", 111, lambda peer, job: (peer.raw(cexec.FRAME_HEAD.pack(7, 0, 1, 2 ** 32 - 1)),
                                                    says_hello(peer, job))),
]


def test_success_is_only_what_a_worker_has_said_in_full(cluster):
    """A worker with the true key that does not keep to the protocol: 0 only for a whole job."""
    key = cexec.open_key(cluster.key)
    with Ear(group_port(cluster)) as ear:
        known = []
        for name, status, ending in ENDINGS:
            client = cluster.start_client(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            announced, address = ear.wait_for(cexec.ANNOUNCE, known)
            known.append(announced.nonce)
            with play_worker(announced, address, key) as peer:
                job = peer.take_job()
                ending(peer, job)
                while name not in CLOSED and peer.next():
                    pass                        # until the client closes: unread input would reset the connection
            out, errors = client.communicate(timeout=60)
            assert client.returncode == status, (name, client.returncode, errors)
            if status == 0:
                assert (out, errors) == (b"hello", b""), name
            else:
                assert errors.startswith(b"cexec: worker test lost") and errors.count(b"\n") == 1, (name, errors)


def abused_client(cluster, meddler, **env):
    """A client that announces itself on the meddler's port: (the client, where it listens)."""
    with Ear(meddler.port) as ear:
        with open(cluster.path("in"), "rb") as source:
            client = verbose_client(cluster, stdin=source, stdout=subprocess.PIPE,
                                    env=dict(meddler.env, CEXEC_TIMEOUT_PINGPONG="1", **env))
        return client, ear.wait_for(cexec.ANNOUNCE)


def refuse_for_ever(client, announced, key, chance):
    """Until the client gives up, which CEXEC_TIMEOUT_WAIT bounds."""
    while client.poll() is None:
        with contextlib.suppress(OSError), play_worker(*announced, key) as peer:
            if peer.next() and peer.next():
                peer.send(cexec.REFUSE, status=0, reason="not now\x1b[2J")


def say_before_accept(client, announced, key, chance):
    for _ in range(6):
        with play_worker(*announced, key) as peer:
            if chance.random() < 0.7:
                peer.next()
            for _ in range(chance.randrange(1, 6)):
                peer.raw(random_frame(chance, without=(cexec.ACCEPT,)))


def never_accept(client, announced, key, chance):
    with play_worker(*announced, key) as peer:
        while peer.next():
            pass                        # AUTH, JOB, and then the client's patience is at its end


def never_say_hello(client, announced, key, chance):
    with socket.create_connection((announced[1], announced[0].port), 20) as sock:
        assert sock.recv(65536)[:1] == b"\x16"          # ClientHello; it hears no answer
        while sock.recv(65536):
            pass


def abuse_before_go(cluster, key, abuse, seed):
    """Whatever is done to a client, a true worker gets its job in the end."""
    opened = threading.Event()
    with Meddler(cluster.env["GROUP"], lambda datagram: [0] if opened.is_set() else []) as meddler:
        client, announced = abused_client(cluster, meddler)
        abuse(client, announced, key, random.Random(seed))
        assert client.poll() is None and b"-> GO" not in read(client.log)
        opened.set()
        assert client.communicate(timeout=PATIENCE * 2)[0] == read(cluster.path("in")).upper()
        assert client.returncode == 0
        no_defect(read(client.log))


def test_a_worker_with_the_key_sends_anything_before_accept(cluster):
    key = cexec.open_key(cluster.key)
    make_file(cluster, "in", b"a job " * 1000)
    worker = cluster.worker("tr", "a-z", "A-Z", env={"CONCURRENCY": "8"})
    abuses = [never_accept, never_say_hello] + [say_before_accept] * 12
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        played = [pool.submit(abuse_before_go, cluster, key, abuse, seed) for seed, abuse in enumerate(abuses)]
        for each in played:
            each.result()
    with Meddler(cluster.env["GROUP"], lambda datagram: []) as meddler:
        client, announced = abused_client(cluster, meddler, CEXEC_TIMEOUT_WAIT="2")
        refuse_for_ever(client, announced, key, None)
        assert (client.wait(), client.stdout.read()) == (111, b"")
        assert b"-> GO" not in read(client.log) and b"\x1b" not in read(client.log)
        assert read(client.log).count(b"refused: not now") > 3
    no_defect(read(worker.log))


def exit_frame(*rows):
    return cexec.make_frame(cexec.EXIT, how=cexec.HOW_EXITED, status=0, more=0, reason="", channels=list(rows))


# (how, status, more, reason) of an EXIT with which no job ends, or no job without -g
LYING_EXITS = [
    (2, 0, 0, ""), (2, 128, 0, ""), (2, 255, 0, ""), (2, 9, 0, "lies"),         # 128 + 128 would be success
    (3, 0, 0, "lies"), (3, 0, 0, ""), (3, 1, 0, "lies"), (3, 255, 0, "lies"), (3, 126, 1, "lies"),
    (1, 0, 0, "lies"), (1, 5, 0, "lies"), (1, 0, 2, ""), (0, 0, 0, ""), (4, 0, 0, ""), (255, 0, 1, "")]

# What a worker says behind ACCEPT, and the reason why the job is lost
LIES = [
    ("output is missing on descriptor 1", data_frame(1, b"12345") + BOTH_EOF + exit_frame((1, 6, 0), (2, 0, 0))),
    ("output is missing on descriptor 1", data_frame(1, b"12345") + BOTH_EOF + exit_frame((1, 4, 0), (2, 0, 0))),
    ("output is missing on descriptor 2", BOTH_EOF + exit_frame((1, 0, 0), (2, 2 ** 64 - 1, 0))),
    ("output is missing on descriptor 1", BOTH_EOF + exit_frame()),
    ("output is missing on descriptor 1", data_frame(1, b"12345") + exit_frame((1, 5, 0), (2, 0, 0))),
    *[("an impossible EXIT: how %d, status %d, more %d" % (how, status, more),
       BOTH_EOF + cexec.make_frame(cexec.EXIT, how=how, status=status, more=more, reason=reason,
                                   channels=[(1, 0, 0), (2, 0, 0)])) for how, status, more, reason in LYING_EXITS],
    ("DATA without credit", b"".join(data_frame(1, bytes(cexec.FRAME_MAX)) for _ in range(40))),    # nobody reads it
    ("more credit than a window", cexec.make_frame(cexec.CREDIT, 0, bytes=2 ** 32 - 1)),
    ("no channel 7", data_frame(7, b"x")),
    ("HELLO out of place", cexec.make_frame(cexec.HELLO, **filled(cexec.HELLO))),
    ("SIGNAL out of place", cexec.make_frame(cexec.SIGNAL, signal="KILL")),
    ("REFUSE out of place", cexec.make_frame(cexec.REFUSE, status=0, reason="too late")),
    ("frame of kind 7", cexec.FRAME_HEAD.pack(7, 0, 1, 2 ** 32 - 1)),
    ("no sign of life for 1 s", b""),
    ("no sign of life for 1 s", data_frame(1, b"12345") + BOTH_EOF),
]


def abuse_after_go(cluster, key, reason, data):
    with Meddler(cluster.env["GROUP"], lambda datagram: []) as meddler:
        client, announced = abused_client(cluster, meddler)
        with play_worker(*announced, key) as peer:
            peer.take_job()
            peer.raw(data)
            assert client.wait(PATIENCE) == 111, reason     # though the connection is open
        lines = [line for line in read(client.log).decode().splitlines() if "lost after" in line]
        assert len(lines) == 1 and reason in lines[0], (reason, lines)
        no_defect(read(client.log))


def test_a_worker_with_the_key_sends_anything_after_go(cluster):
    key = cexec.open_key(cluster.key)
    make_file(cluster, "in", b"a job")
    lies = list(LIES)
    for seed in range(24):
        chance = random.Random(seed)
        lies.append(("", b"".join(random_frame(chance) for _ in range(chance.randrange(1, 12)))))
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for each in [pool.submit(abuse_after_go, cluster, key, *lie) for lie in lies]:
            each.result()


def lying_worker(cluster, how, status, more, reason, *command, options=()):
    """A worker whose jobs are done, and end with this EXIT."""
    altered(cluster, ("status, reason = self.command.result\n", "status, reason = %r\n" % ((how, status, reason),)),
            ("more=more, reason=reason", "more=%d, reason=reason" % more))
    return cluster.worker(*command, options=options, env={"CONCURRENCY": "8"})


@pytest.mark.parametrize("how, status, more, reason", LYING_EXITS)
def test_an_impossible_exit_is_no_success_in_any_mode(farm, how, status, more, reason):
    make = ["sh", "-c", "cat; echo 1 > r"]
    modes = [["-n", farm.pub, *make], ["-n", "-g", "r", farm.pub, *make],
             ["-mn", "-o", "out", farm.pub, *make, ":::", "r"], ["-mn", "-g", "{}", farm.pub, *make, ":::", "r"],
             ["-m", "-o", "-", farm.pub, *make, "--", "in"], ["-b", "9", farm.pub, *make], ["-An", farm.pub, *make]]
    in_desk(farm, "in")
    lying_worker(farm, how, status, more, reason, options=["-ad"])
    clients = []
    for words in modes:
        clients.append(farm.begin(*words, env={"CEXEC_RETRIES": "0"}))
        clients[-1].stdin.write(b"a line\n")
        clients[-1].stdin.close()
        clients[-1].stdin = None
    for words, client in zip(modes, clients):
        out, errors = client.communicate(timeout=PATIENCE)
        assert client.returncode == (1 if "m" in words[0] else 111), (words, client.returncode, out, errors)
        assert b"an impossible EXIT" in errors or b"cannot send results: lies" in errors, errors
    assert sorted(os.listdir(farm.desk)) == ["in"]


@pytest.mark.parametrize("how, status, more, reason", LYING_EXITS)
def test_an_impossible_exit_is_no_result_of_python(cluster, monkeypatch, how, status, more, reason):
    live_in(cluster, monkeypatch)
    monkeypatch.setenv("CEXEC_TIMEOUT_ACCEPT", "20")
    lying_worker(cluster, how, status, more, reason, "true")
    with pytest.raises(cexec.Failed, match="impossible EXIT"):
        cexec.run(cluster.pub, input=b"")
    with cexec.Executor(cluster.pub) as pool:
        assert "impossible EXIT" in str(pool.submit(pow, 2, 3).exception())


def test_an_exit_while_the_clients_files_are_on_the_way(farm):
    """The worker has refused them: the process here that packs them has no reader any more."""
    in_desk(farm, "large", bytes(20000000))
    with Ear(group_port(farm)) as ear:
        client = farm.begin("-n", "-i", "large", farm.pub, "true")
        announced, address = ear.wait_for(cexec.ANNOUNCE)
        with play_worker(announced, address, cexec.open_key(farm.key), options=14) as peer:
            job = peer.take_job()
            for channel in (1, 2):
                peer.send(cexec.EOF, channel, cexec.FLAG_WHOLE)
            peer.send(cexec.EXIT, how=cexec.HOW_NOT_STARTED, status=126, reason="no room", channels=rows_of(job, out=0))
            assert outcome(client, status=126) == (b"", b"cexec: worker test cannot run its command: no room\n")


# ---- cexec: the same command here and there --------------------------------

def test_first_job(cluster):
    cluster.worker("tr", "a-z", "A-Z")
    assert ended(cluster.client(input=b"hello\n")) == (0, b"HELLO\n", b"")


def case(name, command, script, stdout):
    return pytest.param(command, script, stdout, id=name)


WAIT_FOR_READER = """
import os, select
os.write(1, b"first\\n")
poll = select.poll()
poll.register(1, 0)
os._exit(7 if poll.poll(30000) else 1)
"""


ORACLE = [
    case("null_input", "cat; echo end", "RUN </dev/null", "end\n"),
    case("empty_pipe", "cat; echo end", ": | RUN", "end\n"),
    case("empty_file", "cat; echo end", ": >empty; RUN <empty", "end\n"),
    case("empty_output", "true", "echo old >f; RUN >f; wc -c <f", "0\n"),
    case("every_byte", "cat", "RUN <$DATA/bytes | cmp - $DATA/bytes && echo same", "same\n"),
    case("48_MB_from_a_file", "cat", "RUN <$DATA/big | cmp - $DATA/big && echo same", "same\n"),
    case("48_MB_from_a_pipe", "cat", "cat $DATA/big | RUN >copy; cmp copy $DATA/big && echo same; rm copy", "same\n"),
    case("stdout_and_stderr", "head -c 5000000 /dev/zero; head -c 5000001 /dev/zero >&2",
         "RUN 2>err | wc -c; wc -c <err", "5000000\n5000001\n"),
    case("device_input", "head -c 300000 | wc -c", "RUN </dev/zero", "300000\n"),
    case("sort", "sort", r"printf 'c\na\nb\n' | RUN", "a\nb\nc\n"),
    case("three_in_a_pipeline", "sort; echo z", r"printf 'b\na\n' | RUN | RUN | RUN", "a\nb\nz\nz\nz\n"),
    case("here_document", "cat", "RUN <<X\none\ntwo\nX\n", "one\ntwo\n"),
    case("command_substitution", r"printf 'a\nb\n\n'", 'x=$(RUN); echo "<$x>"', "<a\nb>\n"),
    case("in_the_background", "exit 3", "RUN & wait $!; echo $?", "3\n"),
    case("quotes_and_newlines", "printf '%s\\n' \"a'b\" 'c\nd\\e' \"$(echo f)\"", "RUN", "a'b\nc\nd\\e\nf\n"),
    case("bytes_that_are_no_text", "printf '\udcff\udc80\\n'", "RUN", "\udcff\udc80\n"),
    case("yes_into_head", "head -n 1", "{ yes; echo $? >status; } | RUN; cat status", "y\n141\n"),
    case("head_of_yes", "yes", "{ RUN; echo $? >status; } | head -n 1; cat status", "y\n141\n"),
    case("true_with_a_large_pipe", "true", "{ cat $DATA/big; echo $? >status; } | RUN; cat status", "141\n"),
    case("true_with_a_large_file", "true", "{ RUN; head -c 6; } <$DATA/words", "alpha\n"),
    case("false_with_a_large_file", "false", "RUN <$DATA/big; echo $?", "1\n"),
    case("between_two_echoes", "echo x", "(echo a; RUN; echo b) >f; cat f", "a\nx\nb\n"),
    case("both_to_one_file", LINES, "RUN >log 2>&1; cat log", INTERLEAVED),
    case("both_to_one_pipe", LINES, "RUN 2>&1 | cat", INTERLEAVED),
    case("append", "echo x", "echo a >f; RUN >>f; echo b >>f; cat f", "a\nx\nb\n"),
    case("append_by_two_at_once", "for i in 1 2 3; do echo $i; done", "RUN >>f & RUN >>f; wait; sort f; rm f",
         "1\n1\n2\n2\n3\n3\n"),
    case("while_read", "read x; echo command $x", "while read x; do echo shell $x; RUN; done <$DATA/words",
         "shell alpha\ncommand beta\nshell gamma\ncommand delta\n"),
    case("two_share_an_input_head", "head -c 5", "{ RUN; echo; RUN; echo; cat; } <$DATA/words",
         "alpha\n\nbeta\n\ngamma\ndelta\n"),
    case("two_share_an_input_dd", "dd bs=1 count=7 2>/dev/null", "{ RUN; echo; RUN; echo; cat; } <$DATA/words",
         "alpha\nb\neta\ngam\nma\ndelta\n"),
    case("offset_before_and_after", "read a; read b; echo $b $a", "{ read x; RUN; cat; } <$DATA/words",
         "gamma beta\ndelta\n"),
    case("offset_after_all", "cat", "{ RUN; cat; echo end; } <$DATA/words", "alpha\nbeta\ngamma\ndelta\nend\n"),
    case("offset_of_a_large_file", "head -c 9000000 | wc -c", "{ RUN; cat | wc -c; } <$DATA/big",
         "9000000\n41331648\n"),
    case("one_input_on_0_and_5", "read a; read b <&5; echo $a $b", "{ RUN 5<&0; cat; } <$DATA/words",
         "alpha beta\ngamma\ndelta\n"),
    case("one_file_opened_twice", "read a; read b <&5; echo $a $b", "RUN <$DATA/words 5<$DATA/words",
         "alpha alpha\n"),
    case("input_at_5", "cat <&5", "RUN 5<$DATA/words", "alpha\nbeta\ngamma\ndelta\n"),
    case("outputs_at_3_and_9", "echo three >&3; echo nine >&9", "RUN 3>three 9>nine; cat three nine", "three\nnine\n"),
    case("one_pipe_on_3_and_4", "for i in 1 2 3; do echo a$i >&3; echo b$i >&4; done", "RUN 3>&1 4>&1 | cat",
         "a1\nb1\na2\nb2\na3\nb3\n"),
    case("one_file_on_3_and_4", "for i in 1 2 3; do echo a$i >&3; echo b$i >&4; done", "RUN 3>f 4>&3; cat f",
         "a1\nb1\na2\nb2\na3\nb3\n"),
    case("read_write_file_as_input", "head -c 2", "printf abcdef >f; { RUN; cat; } <>f", "abcdef"),
    case("read_write_file_as_output", "printf XY", "printf abcdef >f; RUN 1<>f; cat f", "XYcdef"),
    case("write_in_the_middle", "printf XY", "printf abcdef >f; { head -c 2; RUN 1<&0 0</dev/null; cat; } <>f; cat f",
         "abefabXYef"),
    case("fifo_as_input", "cat", "mkfifo f; echo through >f & RUN <f; wait", "through\n"),
    case("fifo_as_output", "echo through", "mkfifo f; cat f >copy & RUN >f; wait; cat copy", "through\n"),
    case("tokens_in_a_fifo", "true", "mkfifo f; exec 3<>f; echo token >&3; RUN; read x <&3; echo $x", "token\n"),
    case("token_put_back", "echo token >&3", "mkfifo f; exec 3<>f; RUN; read x <&3; echo $x", "token\n"),
    case("output_to_a_fifo_both_ways", "echo out", "mkfifo f; exec 4<>f; RUN >&4; read x <&4; echo $x", "out\n"),
    case("input_from_a_fifo_both_ways", "head -n 1", "mkfifo f; exec 4<>f; echo in >&4; RUN <&4 4>&-", "in\n"),
    case("one_fifo_opened_twice", "head -n 4", "mkfifo f; exec 9<>f; cat $DATA/words >f; RUN <f 5<f 9>&-",
         "alpha\nbeta\ngamma\ndelta\n"),
    case("reader_that_has_left", python(WAIT_FOR_READER), "{ RUN; echo $? >status; } | head -n 1; cat status",
         "first\n7\n"),
    case("readers_of_a_fifo_that_come_and_go", "echo one >&3; read go; echo two >&3",
         "mkfifo f g; RUN <g 3>f & exec 9>g; read x <f; echo $x; sleep 0.2; { sleep 0.2; echo >&9; } & read x <f; "
         "echo $x; wait", "one\ntwo\n"),
    case("a_file_at_5_that_is_not_read", "true", "exec 5<$DATA/words; RUN; cat <&5", "alpha\nbeta\ngamma\ndelta\n"),
    case("closed_stdin", "cat; echo $?", "RUN <&-", "1\n"),
    case("closed_stdout", "cat", "RUN <$DATA/words >&-; echo $?", "1\n"),
    case("closed_stderr", "echo gone >&2; echo $?", "RUN 2>&-", "2\n"),
    case("closed_all", "(echo x) >&1 || exit 7", "RUN <&- >&- 2>&-; echo $?", "7\n"),
    case("closed_stdin_and_stdout", "cat; echo $? >&2", "RUN <&- >&- 2>err; cat err | wc -l", "2\n"),
    case("not_found_in_the_shell", "no-such-command-here", "RUN; echo $?", "127\n"),
    case("tar", "cat", "mkdir x; tar cf - -C $DATA tree | RUN | tar xf - -C x; diff -r $DATA/tree x/tree && echo same",
         "same\n"),
    case("untar_on_the_worker", "tar tf - | sort", "tar cf - -C $DATA tree/3 tree/4 | RUN", "tree/3\ntree/4\n"),
    case("gzip", "gzip", "RUN <$DATA/tree/9 | gunzip | cmp - $DATA/tree/9 && echo same", "same\n"),
    case("xargs", "cat; wc -c </dev/null", "cat >run <<'X'\nRUN <$DATA/tree/$1 >$1.out\nX\n"
         "ls $DATA/tree | xargs -P4 -n1 sh run; rm run; ls | wc -l", "12\n"),
]


@pytest.mark.parametrize("command, script, stdout", ORACLE)
def test_oracle(one, tmp_path, command, script, stdout):
    _, seen, _, _ = both(one, tmp_path, Here.script, script, command)
    assert seen == os.fsencode(stdout)


@pytest.mark.parametrize("name", "KILL TERM SEGV ABRT PIPE HUP INT".split())
def test_oracle_death_by_signal(one, tmp_path, name):
    number = getattr(signal, "SIG" + name)
    script = "ulimit -c 0; { RUN >out; echo $? >status; } 2>/dev/null"       # our shell tells of a death here
    files = both(one, tmp_path, Here.script, script, "echo last; kill -%s $$" % name)[3]
    assert files == {"status": b"%d\n" % (128 + number), "out": b"last\n"}


@pytest.mark.parametrize("status", (0, 1, 2, 100, 111, 126, 127, 128, 129, 143, 254, 255))
def test_oracle_status(one, tmp_path, status):
    assert both(one, tmp_path, Here.script, "RUN", "exit %d" % status)[0] == status


def test_oracle_many_statuses(one, tmp_path):
    script = ("cat >run <<'X'\nCMD=\"exit $1\"; RUN; echo $1 $?\nX\n"
              "seq 0 5 255 | xargs -P4 -n1 sh run | sort -n; rm run")
    seen = both(one, tmp_path, Here.script, script, "")
    assert seen[1].decode() == "".join("%d %d\n" % (status, status) for status in range(0, 256, 5))


def test_oracle_unread_stderr(one, tmp_path):
    def scenario(side):
        (out, far_out), (err, far_err) = os.pipe(), os.pipe()
        done = side.path("done")
        process = side.start("(head -c 30000000 /dev/zero >&2; : >%s) & head -c 60000000 /dev/zero; wait; echo end"
                             % done, {1: far_out, 2: far_err})
        close_all(far_out, far_err)
        count = len(read_count(out, 60000000))
        select.select([], [], [], 1)    # all that time nobody reads stderr
        blocked = not os.path.exists(done)
        errors = len(read_all(err))
        return count, blocked, errors, read_all(out), process.wait(PATIENCE)
    assert both(one, tmp_path, scenario) == (60000000, True, 30000000, b"end\n", 0)


def test_oracle_stdout_closed_early(one, tmp_path):
    """The reader sees the end of file while the command still runs."""
    def scenario(side):
        out, far = os.pipe()
        process = side.start("echo early; exec >&-; %s; exit 5" % wait_for(side.path("go")), {1: far})
        os.close(far)
        data, running = read_all(out), process.poll() is None
        touch(side.path("go"))
        return data, running, process.wait(PATIENCE)
    assert both(one, tmp_path, scenario) == (b"early\n", True, 5)


def test_oracle_stdin_closed_early(one, tmp_path):
    """The writer gets EPIPE while the command still runs."""
    def scenario(side):
        near, out = os.pipe()
        process = side.start("exec <&-; %s; exit 5" % wait_for(side.path("go")), {0: near})
        os.close(near)
        with pytest.raises(BrokenPipeError):
            for _ in range(1000):       # more than any window
                os.write(out, bytes(65536))
        os.close(out)
        running = process.poll() is None
        touch(side.path("go"))
        return running, process.wait(PATIENCE)
    assert both(one, tmp_path, scenario) == (True, 5)


@pytest.mark.parametrize("command, status", [
    ("echo one; read x; yes", 141),
    ("trap '' PIPE; echo one; read x; while echo two; do :; done 2>/dev/null; exit 6", 6),
    ("echo one; read x; exit 3", 3)], ids=("dies", "ignores_SIGPIPE", "writes_nothing"))
def test_oracle_reader_leaves(one, tmp_path, command, status):
    """The command writes on after its reader has gone."""
    def scenario(side):
        (out, far_out), (near_in, far_in) = os.pipe(), os.pipe()
        process = side.start(command, {0: near_in, 1: far_out})
        close_all(far_out, near_in)
        first = read_count(out, 4)
        os.close(out)
        os.write(far_in, b"go\n")
        os.close(far_in)
        ended = process.wait(PATIENCE)
        return first, 128 - ended if ended < 0 else ended       # Popen's own death in the shell's numbers
    assert both(one, tmp_path, scenario) == (b"one\n", status)


@pytest.mark.parametrize("number", [1, 9])
@pytest.mark.parametrize("command, awaited, status", [
    ("exec head -c 40000 /dev/zero", "client", 0),              # a pipe holds that
    *[("exec head -c %d /dev/zero" % size, "command", 141)
      for size in (70000, 1000000, cexec.WINDOW + 300000)],
    ("exec head -c 20000000 /dev/zero", None, 141), ("head -c 1000000 /dev/zero; exit 3", "command", 3),
    (python("import os, signal\nsignal.signal(signal.SIGPIPE, signal.SIG_IGN)\n"
            "try:\n while True: os.write(1, bytes(9999))\nexcept BrokenPipeError: pass"), None, 0)])
def test_oracle_reader_leaves_when_the_command_may_have_ended(one, tmp_path, number, command, awaited, status):
    """What nobody reads is no success, although the command has ended with 0; unless it has seen that."""
    def scenario(side):
        mark, (out, far) = "MARK=" + new_mark(), os.pipe()
        process = side.start("exec >&%d; %s %s" % (number, mark, command), {number: far})
        os.close(far)
        first = read_count(out, 10)
        if awaited == "client":
            process.wait(PATIENCE)
        elif awaited and isinstance(side, There):
            until(lambda: not processes_with(mark), "the command's end")
        os.close(out)
        ended = process.wait(PATIENCE)
        return first, 128 - ended if ended < 0 else ended
    assert both(one, tmp_path, scenario) == (bytes(10), status)


def test_oracle_held_by_the_background(one, tmp_path):
    def scenario(side):
        out, far = os.pipe()
        process = side.start("(%s; echo late) & echo early; exit 4" % wait_for(side.path("go")), {1: far})
        os.close(far)
        data = read_count(out, 6)
        touch(side.path("go"))
        return data + read_all(out), process.wait(PATIENCE)
    assert both(one, tmp_path, scenario) == (b"early\nlate\n", 4)


def test_oracle_left_in_the_background(one, tmp_path):
    def scenario(side):
        out, far = os.pipe()
        path = side.path("pid")
        process = side.start("setsid sleep 1000 </dev/null >/dev/null 2>&1 & echo $! >%s; echo x" % path, {1: far})
        os.close(far)
        data, status, pid = read_all(out), process.wait(PATIENCE), int(read(path))
        alive = state_of(pid) is not None
        os.kill(pid, signal.SIGKILL)
        return data, status, alive
    assert both(one, tmp_path, scenario) == (b"x\n", 0, True)


def talk(side, family, number, command):
    """A command with a socket at a number, at 0, 1 and 2 if that is 0: (its process, the other end)."""
    near, far = socketpair(family)
    with far:
        process = side.start(command, dict.fromkeys((0, 1, 2), far) if number == 0 else {number: far})
    near.settimeout(PATIENCE * 2)
    return process, near


@FAMILIES
def test_oracle_inetd_half_close_by_the_peer(one, tmp_path, family):
    def scenario(side):
        process, near = talk(side, family, 0, "sort; echo error >&2; echo last")
        near.sendall(b"b\na\n")
        near.shutdown(socket.SHUT_WR)
        return read_all(near.detach()), process.wait(PATIENCE)
    assert both(one, tmp_path, scenario) == (b"a\nb\nerror\nlast\n", 0)


def at_end(fd):
    """Whether the next that comes is the end of file."""
    assert select.select([fd], [], [], PATIENCE * 2)[0], "nothing has come"
    return os.read(fd, 1) == b""


@FAMILIES
@AT
def test_oracle_half_close_by_the_command(one, tmp_path, family, number):
    """The peer reads to the end, and only then sends: the other direction is still open."""
    program = SOCKET + ("s.sendall(b'first')\ns.shutdown(socket.SHUT_WR)\n"
                        "sys.exit(len(s.makefile('rb').read()) % 251)")

    def scenario(side):
        process, near = talk(side, family, number, python(program, str(number)))
        with near:
            data, end = read_count(near.fileno(), 5), at_end(near.fileno())
            near.sendall(BULK)
            near.shutdown(socket.SHUT_WR)
            return data, end, process.wait(PATIENCE)
    assert both(one, tmp_path, scenario) == (b"first", True, len(BULK) % 251)


@FAMILIES
@AT
def test_oracle_half_close_by_the_peer(one, tmp_path, family, number):
    program = SOCKET + ("s.sendall(b'%8d' % len(s.makefile('rb').read()))\ns.shutdown(socket.SHUT_RDWR)\nsys.exit(9)")

    def scenario(side):
        process, near = talk(side, family, number, python(program, str(number)))
        near.sendall(BULK)
        near.shutdown(socket.SHUT_WR)
        return read_all(near.detach()), process.wait(PATIENCE)
    assert both(one, tmp_path, scenario) == (b"%8d" % len(BULK), 9)


@FAMILIES
@AT
def test_oracle_socket_closed_by_the_command(one, tmp_path, family, number):
    """The peer sees the end of file although it has closed nothing, and the command runs on."""
    program = SOCKET + ("s.sendall(b'hello')\ns.recv(2)\ns.close()\nif sys.argv[1] == '0':\n    os.closerange(1, 3)\n"
                        "while not os.path.exists(sys.argv[2]):\n    time.sleep(0.02)")

    def scenario(side):
        process, near = talk(side, family, number, python(program, str(number), side.path("go")))
        with near:
            data = read_count(near.fileno(), 5)
            near.sendall(b"ok")
            end, running = at_end(near.fileno()), process.poll() is None
            touch(side.path("go"))
            return data, end, running, process.wait(PATIENCE)
    assert both(one, tmp_path, scenario) == (b"hello", True, True, 0)


@FAMILIES
@AT
def test_oracle_writes_to_a_socket_that_the_command_closed(one, tmp_path, family, number):
    def scenario(side):
        close = "exec <&- >&- 2>&-; " if number == 0 else "exec 7<&-; "
        process, near = talk(side, family, number, close + wait_for(side.path("go")))
        with near:
            assert at_end(near.fileno())
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                for _ in range(1000):
                    near.sendall(bytes(65536))
        running = process.poll() is None
        touch(side.path("go"))
        return running, process.wait(PATIENCE)
    assert both(one, tmp_path, scenario) == (True, 0)


@FAMILIES
@AT
def test_oracle_writes_to_a_socket_that_the_peer_closed(one, tmp_path, family, number):
    program = SOCKET + ("s.sendall(b'hello')\ntry:\n    for _ in range(1000):\n        s.sendall(bytes(65536))\n"
                        "except (BrokenPipeError, ConnectionResetError):\n    sys.exit(8)")

    def scenario(side):
        process, near = talk(side, family, number, python(program, str(number)))
        with near:
            data = read_count(near.fileno(), 5)
        return data, process.wait(PATIENCE)
    assert both(one, tmp_path, scenario) == (b"hello", 8)


def test_output_on_a_full_disk_is_111_with_its_reason(one):
    """The one difference: what cannot be written here is 111, with its reason."""
    for command in ("echo x", "head -c 5000000 /dev/zero", "echo x; exit 3"):
        with open("/dev/full", "wb") as full:
            done = one.client("CMD=" + command, stdout=full)
        assert done.returncode == 111
        assert done.stderr.decode() == "cexec: standard output: No space left on device\n"


def test_linger_is_bounded(one):
    go = one.path(new_mark())
    command = "(%s; echo late) & echo early; exit 4" % wait_for(go)
    assert ended(one.client("CMD=" + command, env={"CEXEC_TIMEOUT_LINGER": "1"})) == (4, b"early\n", b"")
    touch(go)


def test_terminal_is_told_of_lingering(one):
    master, slave = pty.openpty()
    go = one.path(new_mark())
    with job(one, "%s & exit 4" % wait_for(go), fds={2: slave}) as process:
        os.close(slave)
        text = b""
        while b"\n" not in text:
            text += read_count(master, 1)
        assert text.startswith(b"cexec: the command has ended with status 4; a process that it left behind")
        assert process.poll() is None
        touch(go)
        assert finish(process) == (4, b"")
    os.close(master)


@pytest.mark.parametrize("command, status, reason", [
    ("/nowhere/no-such-command", 127, "No such file or directory"),
    ("no-such-command-here", 127, "No such file or directory"),
    ("/etc/passwd/x", 127, "Not a directory"),
    ("/etc/passwd", 126, "Permission denied"),
    ("/", 126, "Permission denied")])
def test_command_that_cannot_run(cluster, command, status, reason):
    """It is refused before anything is sent or read, and the worker gets no penalty."""
    worker = cluster.worker(command)
    make_file(cluster, "in", b"abc")
    with open(cluster.path("in"), "rb") as file:
        said = failed(cluster.client(stdin=file), status)
        assert file.read() == b"abc"
    assert said.decode() == (
        "cexec: worker %s cannot run its command: %s: %s\n" % (NODE, command, reason))
    assert cluster.client(input=b"").returncode == status
    until(lambda: read(worker.log).count(b": missing ") == 2, "the supervisor's line")
    assert read(worker.log).decode().count("cservice: refuses jobs: %s: %s\n" % (command, reason)) == 1
    assert b": failed" not in read(worker.log) and b"-> ACCEPT" not in read(worker.log)


def without_interpreter(cluster, name="script"):
    """A script of which only exec can tell that it cannot be started."""
    put(cluster.path(name), "#!/no/such/interpreter\n", 0o755)
    return cluster.path(name)


def test_a_command_that_only_exec_cannot_start(cluster):
    """The reason is not the host's: no penalty."""
    command = without_interpreter(cluster)
    worker = cluster.worker(command)
    said = failed(cluster.client(input=bytes(9000000)), 127).decode()
    assert said == "cexec: worker %s cannot run its command: %s: No such file or directory\n" % (NODE, command)
    until(lambda: "cservice: %s: No such file or directory (127.0.0.1 gets 127)\n" % command
          in read(worker.log).decode(), "the worker's message")
    assert b": failed" not in read(worker.log)


class Toolbox:
    """Two workers, of which only the good one can run `tool`; the bad one is always faster to offer."""

    def __init__(self, cluster, bad="missing", options=(), **rest):
        for place in ("none", "tools"):
            os.mkdir(cluster.path(place))
        put(cluster.path("tools/tool"), '#!/bin/sh\necho "$@"; cat\n', 0o755)
        if bad == "not executable":
            put(cluster.path("none/tool"), "", 0o644)
        self.cluster, self.command = cluster, [] if options else ["tool"]
        self.bad = cluster.worker(*self.command, options=options,
                                  env=dict(self.path("none"), BOOST="0", CONCURRENCY="2"), **rest)
        self.good = cluster.worker(*self.command, options=options,
                                   env=dict(self.path("tools"), BOOST="100000", CONCURRENCY="2"), **rest)

    def path(self, place):
        return {"PATH": "%s:/usr/bin:/bin" % self.cluster.path(place)}


MODES = {"one": [], "-r": ["-r"], "-m -o": ["-m", "-o", "{}.out"], "-m -g": ["-m", "-i", "{}", "-g", "{}.r"],
         ":::": ["-mn"], "-b": ["-b", "20"]}


@pytest.mark.parametrize("bad", ["missing", "not executable"])
@pytest.mark.parametrize("mode", [*MODES, "-A"])
def test_a_job_goes_where_its_command_is(cluster, mode, bad):
    """In every mode, whoever offers first; all outputs are there once."""
    names = made_files(cluster, 6)
    tools = Toolbox(cluster, bad, ["-ad"] if mode == "-m -g" else ["-a"])
    why = {"missing": "No such file or directory", "not executable": "Permission denied"}[bad]
    said = "worker %s cannot run its command: tool: %s" % (NODE, why)
    if mode == "-A":
        done = cluster.run("cexec", "-A", "-n", cluster.pub, "tool", "x")
        assert done.returncode == {"missing": 127, "not executable": 126}[bad] and done.stdout.count(b": x\n") == 1
        assert done.stderr.decode().endswith(": %s\n" % said) and done.stderr.count(b"\n") == 1
        return
    work = 'cat "$1" > "$1.r"' if mode == "-m -g" else "cat; echo $1"
    put(cluster.path("tools/tool"), "#!/bin/sh\n%s\n" % work, 0o755)
    words = [*MODES[mode], cluster.pub, "tool", *{"-b": [], "one": ["x"], "-r": ["x"]}.get(mode, ["{}"])]
    words += {"-m -o": ["--", *names], "-m -g": ["--", *names], ":::": [":::", *names]}.get(mode, [])
    data = b"".join(b"line %d\n" % number for number in range(30)) if mode == "-b" else b"in\n"
    done = cluster.run("cexec", "-v", *words, input=data)
    assert done.returncode == 0, done
    whole = {"one": b"in\nx\n", "-r": b"in\nx\n", ":::": b"".join(name.encode() + b"\n" for name in names)}
    if mode == "-b":
        assert b"".join(done.stdout.split(b"\n\n")).replace(b"\n", b"") == data.replace(b"\n", b"")
    else:
        assert done.stdout == whole.get(mode, b"")
    for name in names if mode.startswith("-m") else []:
        more = name.encode() + b"\n" if mode == "-m -o" else b""
        assert read(cluster.path(name + {"-m -o": ".out", "-m -g": ".r"}[mode])) == read(cluster.path(name)) + more
    assert done.stderr.decode().count("cexec: %s\n" % said) == 1
    assert b"-> ACCEPT" not in read(tools.bad.log) and b": failed" not in read(tools.bad.log)


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOMEM])
@pytest.mark.parametrize("line, what", [("self.process = killing_stopped(lambda: subprocess.Popen(", ""),
                                        ("self.helper = Helper(self.loop, with_rights", "the job's directory: ")])
def test_what_a_worker_is_short_of_now_is_worth_another_try(cluster, monkeypatch, code, line, what):
    """A process for the command, or for the files that it is to have."""
    live_in(cluster, monkeypatch)
    short, indent = cluster.path("short"), "\n" + 12 * " "
    altered(cluster, (indent + line, "%sif os.path.exists(%r):%s    raise OSError(%d, os.strerror(%d))%s%s" % (
        indent, short, indent, code, code, indent, line)))
    cluster.worker("cat", options=["-d"], env={"TMPDIR": cluster.directory})
    touch(short)
    said = failed(cluster.run("cexec", "-n", "-i", "short", cluster.pub)).decode()
    assert said == "cexec: worker %s cannot run its command: cat: %s%s\n" % (NODE, what, os.strerror(code))
    if not what:
        assert failure(cexec.run, cluster.pub, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == (
            111, "worker 127.0.0.1 cannot run its command: it cannot be started now (exit status 111)")
    os.unlink(short)
    assert cluster.client(input=b"again").stdout == b"again"


def test_option_n_keeps_an_input_from_the_command(one):
    command = "cat; echo; cat <&5; echo end"
    with open(one.path("data/words")) as words, open(one.path("data/words")) as again:
        for options, expected in ((["-n"], b"\nend\n"),
                                  (["-n", "0"], b"\nalpha\nbeta\ngamma\ndelta\nend\n"),
                                  (["-n", "5"], b"alpha\nbeta\ngamma\ndelta\n\nend\n"),
                                  (["-n0"], b"\nalpha\nbeta\ngamma\ndelta\nend\n"),
                                  (["-n", "7"], b"alpha\nbeta\ngamma\ndelta\n\nalpha\nbeta\ngamma\ndelta\nend\n")):
            words.seek(0)
            again.seek(0)
            with job(one, command, *options, fds={0: words, 5: again}) as process:
                assert finish(process) == (0, expected), options
            offsets = [os.lseek(file.fileno(), 0, os.SEEK_CUR) for file in (words, again)]
            assert offsets == [23 * (options[-1] not in ("-n", "0", "-n0")), 23 * (options[-1] not in ("-n", "5"))]


def test_option_n_leaves_a_loop_its_input(one):
    run = " ".join(map(shlex.quote, one.argv("cexec", "-n", one.pub))) + ' CMD="cat; echo x"'
    done = one.do(["sh", "-c", "while read w; do echo $w; %s; done <$DATA/words" % run], env={"DATA": one.data})
    assert done.stdout == b"alpha\nx\nbeta\nx\ngamma\nx\ndelta\nx\n"


def numbers_in_the_command(cluster, fds, env=None):
    """The descriptors that are open in a command whose client has these."""
    with job(cluster, python(NUMBERS), fds=fds, env=env) as process:
        status, text = finish(process)
    assert status == 0
    return [int(word) for word in text.split()]


@pytest.mark.parametrize("env, expected", [
    ({}, [0, 1, 2, 3, 4, 31]),
    ({"MAXFD": "4"}, [0, 1, 2, 3]),
    ({"CEXEC_MAXFD": "5"}, [0, 1, 2, 3, 4]),
    ({"MAXFD": "4", "CEXEC_MAXFD": "40"}, [0, 1, 2, 3, 4, 31, 32, 39]),
    ({"CEXEC_MAXFD": "3"}, [0, 1, 2])])
def test_descriptors_below_maxfd_are_carried(one, env, expected):
    with open(os.devnull, "r+b") as null:
        assert numbers_in_the_command(one, dict.fromkeys((3, 4, 31, 32, 39, 40), null), env) == expected


def test_descriptors_that_are_not_carried(one):
    master, slave = pty.openpty()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, master)
        stack.callback(os.close, slave)
        directory = os.open("/", os.O_RDONLY)
        stack.callback(os.close, directory)
        path = os.open(os.devnull, os.O_PATH)
        stack.callback(os.close, path)
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        datagrams = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        carried = stack.enter_context(open(os.devnull))
        fds = {3: directory, 4: server, 5: master, 6: datagrams, 7: path, 8: carried, 9: slave}
        assert numbers_in_the_command(one, fds) == [0, 1, 2, 8, 9]


@pytest.mark.parametrize("number", [3, 9])
@pytest.mark.parametrize("make", [
    lambda: os.pipe()[::-1], lambda: [sock.detach() for sock in socketpair(socket.AF_UNIX)],
    lambda: [sock.detach() for sock in socketpair(socket.AF_INET)]], ids=["pipe", "socket", "TCP"])
def test_output_whose_other_end_is_inherited_too(one, make, number):
    """A parent without close-on-exec; nobody but it reads what the command writes."""
    output, other = make()
    with job(one, "echo hello", outputs=(), fds={1: output, number: other}) as process:
        assert process.wait(PATIENCE) == 0
        os.close(output)
        assert read_all(other) == b"hello\n"


def test_a_pipe_at_both_ends_of_a_job(one):
    """At 0 it is the command's input, whoever writes it."""
    reader, writer = os.pipe()
    with job(one, "echo round >&4; head -n 1", fds={0: reader, 4: writer}) as process:
        assert finish(process) == (0, b"round\n")
    close_all(reader, writer)


def test_a_file_that_others_read_meanwhile(one):
    """Its offset stays while the job runs, and moves by what the command took only at its end."""
    with open(one.path("data/words"), "rb", 0) as file:
        with job(one, "read a <&5; echo $a; read b", fds={5: file}) as process:
            assert finish(process)[1] == b"alpha\n"
        assert file.tell() == 6
        ours, theirs = os.pipe()
        with job(one, "echo ready; head -n 1 >&2; head -c 3 <&5", outputs=(1, 2), fds={0: ours, 5: file}) as process:
            assert read_count(process.out[1], 6) == b"ready\n"
            assert file.tell() == 6
            os.write(theirs, b"go\n")
            assert finish(process) == (0, b"bet")
        assert file.tell() == 9
        close_all(ours, theirs)


def test_a_lost_job_leaves_its_input_where_it_was(one):
    with open(one.path("data/words"), "rb", 0) as file:
        file.seek(6)
        with job(one, "head -n 1; kill -KILL $(cut -d ' ' -f 4 /proc/$$/stat); sleep 1000", fds={0: file}) as process:
            assert finish(process) == (111, b"beta\n")
        assert file.tell() == 6


def test_option_n_takes_nothing_from_a_socket(one):
    """Nor the other direction of it: whoever has it as well goes on."""
    near, far = socket.socketpair()
    with near, far:
        with job(one, "cat; echo out", "-n", outputs=(), fds={0: far, 1: far}) as process:
            assert process.wait(PATIENCE) == 0
        assert near.recv(100) == b"out\n"
        near.sendall(b"later")
        assert far.recv(100) == b"later"


def test_a_writer_sees_that_the_command_has_closed_its_input(one):
    """Though it writes nothing."""
    reader, writer = os.pipe()
    with job(one, "exec <&-; echo closed; sleep 1000", fds={0: reader}) as process:
        os.close(reader)
        assert read_count(process.out[1], 7) == b"closed\n"
        poll = select.poll()
        poll.register(writer, 0)
        assert poll.poll(PATIENCE * 1000) == [(writer, select.POLLERR)]
        assert signalled(process) == 143
    os.close(writer)


def test_jobserver_is_not_carried(one):
    reader, writer = os.pipe()
    fds = {3: reader, 4: writer, 5: writer}
    for flags in (" -j4 --jobserver-auth=3,4", "k --jobserver-fds=3,4 -j", " -j2 --jobserver-auth=3,4 -- X=1"):
        assert numbers_in_the_command(one, fds, {"MAKEFLAGS": flags}) == [0, 1, 2, 5], flags
    assert numbers_in_the_command(one, fds, {"MAKEFLAGS": " -j4 --jobserver-auth=fifo:/nowhere"}) == [0, 1, 2, 4, 5]
    close_all(reader, writer)


def test_jobs_under_make_get_none_of_its_descriptors(one, tmp_path):
    need("make")
    put(str(tmp_path / "run"), 'exec %s CMD="$NUMBERS"' % " ".join(map(shlex.quote, one.argv("cexec", one.pub))))
    lines = ["all: one two three four"]
    lines += ["%s:\n\t+@sh run </dev/null >$@.out\n" % name for name in ("one", "two", "three", "four")]
    with open(str(tmp_path / "Makefile"), "w") as file:
        file.write("\n".join(lines))
    done = one.do(["make", "-s", "-j2"], cwd=str(tmp_path), env={"NUMBERS": python(NUMBERS)})
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    for name in ("one", "two", "three", "four"):
        assert read(str(tmp_path / (name + ".out"))) == b"0 1 2\n"


def has_nonblock(fd):
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK)


@pytest.mark.parametrize("nonblocking", (False, True), ids=("blocking", "nonblocking"))
@pytest.mark.parametrize("kind", ("pipe", "unix", "tcp", "pty"))
def test_nonblock_flag_is_left_alone(one, kind, nonblocking):
    """Others share an inherited descriptor: its flags stay as they are, and both kinds work."""
    if kind == "pipe":
        (near_in, far_in), (far_out, near_out) = os.pipe(), os.pipe()
    elif kind == "pty":
        (far_in, near_in), (far_out, near_out) = pty.openpty(), pty.openpty()
        for slave in (near_in, near_out):
            mode = termios.tcgetattr(slave)
            mode[0], mode[1], mode[3] = 0, 0, termios.ICANON
            termios.tcsetattr(slave, termios.TCSANOW, mode)
    else:
        family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
        (near_in, far_in), (far_out, near_out) = ([sock.detach() for sock in socketpair(family)] for _ in range(2))
    for fd in (near_in, near_out):
        os.set_blocking(fd, not nonblocking)
    seen = []
    with job(one, "echo ready; cat", outputs=(), fds={0: near_in, 1: near_out}) as process:
        assert read_count(far_out, 6) == b"ready\n"
        seen.append((has_nonblock(near_in), has_nonblock(near_out)))
        for number in range(20 if kind == "pty" else 500):
            line = b"%08d" % number * 100 + b"\n"
            os.write(far_in, line)
            if kind == "pty" or number % 50 == 49:
                read_count(far_out, len(line) * (1 if kind == "pty" else 50))
            if not number % 10:
                seen.append((has_nonblock(near_in), has_nonblock(near_out)))
        os.write(far_in, b"\x04") if kind == "pty" else None
        if kind in ("unix", "tcp"):
            with socket.socket(fileno=os.dup(far_in)) as sock:
                sock.shutdown(socket.SHUT_WR)
        elif kind == "pipe":
            os.close(far_in)
        assert process.wait(PATIENCE) == 0
    seen.append((has_nonblock(near_in), has_nonblock(near_out)))
    for fd in (near_in, near_out, far_out) + (far_in,) * (kind != "pipe"):
        os.close(fd)
    assert set(seen) == {(nonblocking, nonblocking)}


# ---- cexec: every kind of descriptor at every number -----------------------


EVERY_KIND = [(kind, "input", number) for number in EVERY_NUMBER
          for kind in ("pipe", "file", "null", "unix", "tcp", "closed", "pty") + ("readwrite",) * (number == 0)]
EVERY_KIND += [(kind, "output", number) for number in EVERY_NUMBER
           for kind in ("pipe", "file", "null", "unix", "tcp", "closed", "append", "pty")
           + ("readwrite",) * (number != 0)]

PROBE = """
import json, os, sys
number, way, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
seen = {"numbers": [fd for fd in range(64) if os.path.lexists("/proc/self/fd/%d" % fd)], "data": "", "error": 0}
try:
    if way == "input":
        seen["data"] = open(number, "rb", 0).read().decode()
    else:
        os.write(number, b"written\\n")
        os.write(number, b"twice\\n")
        os.close(number)
except OSError as error:
    seen["error"] = error.errno
with open(path, "w") as file:
    json.dump(seen, file)
os._exit(3)
"""


def end_of_kind(kind, way, directory):
    """(descriptor for the command or None, a function that tells what is left of it afterwards)."""
    path = os.path.join(directory, "file")
    if kind == "closed":
        return None, lambda: None
    if kind == "null":
        return os.open(os.devnull, os.O_RDONLY if way == "input" else os.O_WRONLY), lambda: None
    if kind == "pipe":
        reader, writer = os.pipe()
        if way == "output":
            return writer, lambda: read_all(reader)
        os.write(writer, SOME_BYTES)
        os.close(writer)
        return reader, lambda: None
    if kind in ("unix", "tcp"):
        near, far = socketpair(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
        if way == "input":
            near.sendall(SOME_BYTES)
            near.shutdown(socket.SHUT_WR)
        return far.detach(), lambda: read_all(near.detach())
    if kind == "pty":
        master, slave = pty.openpty()
        narrow = os.open(os.ttyname(slave), os.O_NOCTTY | (os.O_RDONLY if way == "input" else os.O_WRONLY))
        os.close(slave)
        if way == "input":
            os.write(master, SOME_BYTES + b"\x04")
            return narrow, lambda: os.close(master)
        return narrow, lambda: read_all(master)
    with open(path, "wb") as file:
        file.write(SOME_BYTES)
    access = {"file": os.O_RDONLY if way == "input" else os.O_WRONLY, "readwrite": os.O_RDWR,
              "append": os.O_WRONLY | os.O_APPEND}[kind]
    fd = os.open(path, access)
    os.lseek(fd, 5, os.SEEK_SET)
    copy = os.dup(fd)

    def left():
        offset = os.lseek(copy, 0, os.SEEK_CUR)
        os.close(copy)
        return offset, read(path)
    return fd, left


def probed(side, kind, way, number):
    fd, left = end_of_kind(kind, way, side.directory)
    report = side.path("report")
    process = side.start(python(PROBE, str(number), way, report), {number: fd})
    if fd is not None:
        os.close(fd)
    status = process.wait(PATIENCE)
    return status, json.loads(read(report).decode()), left()


@pytest.mark.parametrize("kind, way, number", EVERY_KIND)
def test_every_kind_of_descriptor_at_every_number(one, tmp_path, kind, way, number):
    status, seen, _ = both(one, tmp_path, probed, kind, way, number)
    assert status == 3
    assert (number in seen["numbers"]) == (kind != "closed")


# ---- cexec: signals --------------------------------------------------------

def test_term_is_caught_by_the_command(one):
    with job(one, "trap 'echo caught; exit 3' TERM; echo ready; " + FOREVER, ready=True) as process:
        process.terminate()
        assert finish(process) == (3, b"caught\n")


def test_signals_reach_the_command(one):
    go = one.path(new_mark())
    traps = "; ".join("trap 'echo %s' %s" % (name, name) for name in CAUGHT)
    with job(one, "%s; echo ready; %s; exit 3" % (traps, wait_for(go)), ready=True) as process:
        for name in CAUGHT:
            process.send_signal(getattr(signal, "SIG" + name))
            assert read_count(process.out[1], len(name) + 1).decode() == name + "\n"
        touch(go)
        assert finish(process) == (3, b"")


@pytest.mark.parametrize("name", "TERM HUP USR1 USR2".split())
def test_signal_reaches_the_whole_group(one, name):
    """The shell catches it; a child of its group dies of it, and the shell tells of that."""
    command = "(trap - %s; exec sleep 1000) & trap : %s; echo ready; wait $!; wait $!; exit $?" % (name, name)
    with job(one, command, mark=new_mark(), ready=True) as process:
        process.send_signal(getattr(signal, "SIG" + name))
        assert finish(process) == (128 + getattr(signal, "SIG" + name), b"")


@pytest.mark.parametrize("name", ("INT", "TERM", "HUP", "USR1"))
def test_command_dies_of_a_signal_passed_on(one, name):
    number = getattr(signal, "SIG" + name)
    with job(one, "echo ready; exec sleep 1000", mark=new_mark(), ready=True) as process:
        process.send_signal(number)
        assert finish(process) == (128 + number, b"")


def test_stop_and_continue(one):
    mark = new_mark()
    command = "trap 'echo usr1' USR1; sleep 1000 & echo ready; while :; do wait; done"   # a stop in vfork shows as D
    with job(one, command, mark=mark, ready=True) as process:
        process.send_signal(signal.SIGTSTP)
        until(lambda: {state_of(pid) for pid in marked(mark)} == {"T"}, "the command's stop")
        until(lambda: state_of(process.pid) == "T", "the client's stop")
        process.send_signal(signal.SIGCONT)
        until(lambda: "T" not in {state_of(pid) for pid in marked(mark)}, "the command's going on")
        process.send_signal(signal.SIGUSR1)
        assert read_count(process.out[1], 5) == b"usr1\n"
        process.terminate()
        assert finish(process) == (143, b"")


def test_ctrl_z_and_fg_in_a_shell(one):
    need("bash")
    mark = new_mark()
    what = 'trap "echo has caught it; exit 5" INT; echo read"y"; read x; echo got $x; ' + FOREVER
    terminal = Terminal(one, ["bash", "--norc", "--noprofile", "-i"], {"WHAT": what})
    run = " ".join(map(shlex.quote, one.argv("cexec", one.pub, "MARK=" + mark)))
    terminal.type(run + ' CMD="$WHAT"; echo "status"=$?\n', "ready")
    terminal.type("\x1a", "Stopped")
    until(lambda: {state_of(pid) for pid in marked(mark)} == {"T"}, "the command's stop")
    terminal.shows("$ ")
    terminal.type("echo in the 'shell'\n", "in the shell")
    terminal.type("fg\n")
    until(lambda: "T" not in {state_of(pid) for pid in marked(mark)}, "the command's going on")
    terminal.type("a line\n", "got a line")
    terminal.type("\x03", "has caught it")
    terminal.type('echo "at last"=$?\n', "at last=5")
    terminal.close()


def test_terminal_is_not_read_in_the_background(one):
    """A line that is typed while cexec is in the background goes to the shell."""
    need("bash")
    go, mark = one.path(new_mark()), new_mark()
    terminal = Terminal(one, ["bash", "--norc", "--noprofile", "-i"], {"WHAT": "echo read\"y\"; " + wait_for(go)})
    run = " ".join(map(shlex.quote, one.argv("cexec", one.pub, "MARK=" + mark)))
    terminal.type(run + ' CMD="$WHAT" &\n', "ready")
    for number in range(5):
        terminal.type("echo line %d 'here'\n" % number, "line %d here" % number)
    touch(go)
    terminal.type("wait; echo status'='$?\n", "status=0")
    terminal.close()


def test_second_interrupt_ends_cexec(one):
    mark = new_mark()
    with job(one, "trap '' INT; echo ready; " + FOREVER, mark=mark, ready=True) as process:
        process.send_signal(signal.SIGINT)
        until(lambda: state_of(process.pid) in ("S", None), "the first one's handling")
        until(lambda: process.send_signal(signal.SIGINT) or process.poll() is not None, "the end")
        assert process.returncode == -signal.SIGINT
    until(lambda: not marked(mark), "the command's end")


def test_interrupts_far_apart_are_passed_on(one):
    with job(one, "trap 'echo int' INT; echo ready; " + FOREVER, ready=True) as process:
        for seconds in (1.1, 0):
            process.send_signal(signal.SIGINT)
            assert read_count(process.out[1], 4) == b"int\n"
            time.sleep(seconds)     # at least: a second one within a second would end it
        assert process.poll() is None
        process.terminate()
        assert finish(process) == (143, b"")


@pytest.mark.parametrize("name", "INT TERM HUP QUIT USR1 USR2".split())
def test_signal_before_any_worker(one, name):
    with job(one, "true", "-v", outputs=(2,), env={"GROUP": "127.255.255.255:%d" % free_port()}) as process:
        text = b""
        while b"ANNOUNCE" not in text:
            text += read_count(process.out[2], 1)
        assert signalled(process, getattr(signal, "SIG" + name)) == -getattr(signal, "SIG" + name)


def test_stop_before_any_worker(one):
    group = "127.255.255.255:%d" % free_port()
    with job(one, "true", "-v", outputs=(2,), env={"GROUP": group}) as process:
        text = b""
        while b"ANNOUNCE" not in text:
            text += read_count(process.out[2], 1)
        process.send_signal(signal.SIGTSTP)
        until(lambda: state_of(process.pid) == "T", "the stop")
        process.send_signal(signal.SIGCONT)
        until(lambda: state_of(process.pid) != "T", "going on")
        assert signalled(process) == -signal.SIGTERM


@pytest.mark.parametrize("name", ("HUP", "INT", "QUIT"))
def test_ignored_signal_stays_ignored(one, name):
    """nohup, and a shell's background: neither cexec nor the command hears of it."""
    number = getattr(signal, "SIG" + name)
    with job(one, "trap 'echo it' %s; trap 'echo usr1' USR1; echo ready; %s" % (name, FOREVER),
             preexec=lambda: signal.signal(number, signal.SIG_IGN), ready=True) as process:
        for _ in range(3):
            process.send_signal(number)
            process.send_signal(signal.SIGUSR1)
            assert read_count(process.out[1], 5) == b"usr1\n"
        process.terminate()
        assert finish(process) == (143, b"")


def test_a_stop_under_congestion_with_high_descriptors(monkeypatch):
    """CEXEC_MAXFD=1024 and TSTP: select() ends at 1023."""
    near, far = socket.socketpair()
    loop = cexec.Loop(floor=1024)
    cexec.make_room(0, 1100)
    with contextlib.closing(loop.above_floor(near)) as sock, far:
        sock.setblocking(False)
        flushed, stopped = [], []
        link = SimpleNamespace(sock=sock, closed=False, congested=True)
        link.flush = lambda: (flushed.append(True), setattr(link, "congested", False))
        monkeypatch.setattr(cexec.os, "kill", lambda *words: stopped.append(words))
        cexec.Run.stop_here(SimpleNamespace(link=link))
        assert flushed and stopped == [(os.getpid(), signal.SIGSTOP)]


# ---- cexec: kills and losses -----------------------------------------------

STUBBORN = {
    "a_command": "echo ready; exec sleep 1000",
    "a_tree": "sh -c 'sh -c \"sleep 1000\"; :' & sleep 1001 & echo ready; wait",
    "ignores_HUP_and_TERM": "trap '' HUP TERM; echo ready; sleep 1000; sleep 1001",
    "a_group_of_its_own": python("import os, time\nif os.fork() == 0:\n    os.setpgid(0, 0)\n"
                                 "    print('ready', flush=True)\ntime.sleep(1000)"),
    "holds_its_output": "trap '' HUP TERM; (trap '' PIPE; echo ready; while :; do echo y; sleep 0.1; done) & exit 0",
    "is_stopped": "echo ready; kill -STOP $$; sleep 1000",
}


def test_a_killed_client_leaves_nothing_of_its_command(one):
    """Nothing is left of the command, whatever it ignores and however its tree looks."""
    with contextlib.ExitStack() as stack:
        jobs = []
        for name, command in STUBBORN.items():
            mark = new_mark()
            process = stack.enter_context(job(one, command, mark=mark))
            assert read_count(process.out[1], 6) == b"ready\n"
            assert marked(mark), name
            jobs.append((name, mark, process))
        for _, _, process in jobs:
            process.kill()
        for name, mark, _ in jobs:
            until(lambda mark=mark: not marked(mark), "the end of " + name)


def test_a_killed_supervisor_is_a_lost_job(one):
    mark = new_mark()
    with job(one, "trap '' HUP; sleep 1001 & echo ready; exec sleep 1000", outputs=(1, 2), mark=mark) as process:
        assert read_count(process.out[1], 6) == b"ready\n"
        command = until(lambda: [pid for pid in marked(mark) if read("/proc/%d/cmdline" % pid) == b"sleep\0001000\0"],
                        "the command")
        supervisor = parent_of(command[0])
        assert parent_of(supervisor) == one.serving.pid
        os.kill(supervisor, signal.SIGKILL)
        status, errors = finish(process, 2)
        assert status == 111
        assert errors.startswith(b"cexec: worker %s lost after " % NODE.encode()) and errors.count(b"\n") == 1
        until(lambda: not marked(mark), "the command's end")


def the_line(fd):
    """What is read up to the end of a line."""
    return b"".join(iter(lambda: os.read(fd, 1), b"\n"))


ENDS_BEFORE_ITS_CHILD = ("echo $$; (trap 'echo caught; exit' TERM; echo ready; "
                         "while [ ! -e %s ]; do sleep 0.02; done) & exit 3")


def test_a_command_that_has_ended_keeps_its_number(one):
    """As long as its group may be signalled: or another user's process could be given that number, and the signal."""
    with job(one, ENDS_BEFORE_ITS_CHILD % one.path(new_mark())) as process:
        pid = int(the_line(process.out[1]))
        assert the_line(process.out[1]) == b"ready"
        until(lambda: state_of(pid) == "Z", "the command's end")
        process.terminate()
        assert finish(process) == (3, b"caught\n")
    until(lambda: state_of(pid) is None, "the end of its supervisor")


def test_a_group_whose_number_is_free_is_not_signalled(cluster):
    """Where a process that has ended can't be seen without giving its number away."""
    take_away(cluster, "del os.waitid")
    cluster.shell_worker()
    go = cluster.path("go")
    with job(cluster, ENDS_BEFORE_ITS_CHILD % go) as process:
        pid = int(the_line(process.out[1]))
        assert the_line(process.out[1]) == b"ready"
        until(lambda: state_of(pid) is None, "the command's end")
        process.terminate()
        time.sleep(0.3)                     # in which nothing may happen
        touch(go)
        assert finish(process) == (3, b"")


def test_a_lost_supervisor_keeps_its_number(one):
    """Its session is ended by that number: nobody else may have it until then."""
    mark, go = new_mark(), one.path(new_mark())
    with job(one, "trap '' HUP TERM; echo $PPID; " + wait_for(go), mark=mark) as process:
        supervisor = int(the_line(process.out[1]))
        assert parent_of(supervisor) == one.serving.pid
        os.kill(supervisor, signal.SIGKILL)
        assert finish(process)[0] == 111
        assert marked(mark) and state_of(supervisor) == "Z"
        touch(go)
        until(lambda: state_of(supervisor) is None, "the end of its session")
        assert not marked(mark)


def test_a_supervisor_killed_before_its_child_has_started_the_command(cluster):
    """The child holds the pipe to cservice as well: that does not wait for it."""
    need("root")
    touch(cluster.path("wait"))
    take_away(cluster, """
        import time
        def initgroups(*_):
            while os.path.exists(%r):
                time.sleep(0.01)
        os.initgroups = initgroups""" % cluster.path("wait"))
    worker = cluster.shell_worker(options=["-u", "nobody"])
    client = cluster.start_client("CMD=true", stderr=subprocess.PIPE)
    try:
        supervisor, = until(lambda: children_of(worker.pid), "a supervisor")
        child, = until(lambda: children_of(supervisor), "its child")
        os.kill(child, signal.SIGSTOP)      # it is not ended yet by what cservice does then
        os.kill(supervisor, signal.SIGKILL)
        assert client.wait(PATIENCE) == 111
        assert cluster.run("cexec", "-l", cluster.pub).returncode == 0
    finally:
        os.unlink(cluster.path("wait"))
    until(lambda: state_of(child) is None, "the child's end")


def test_orphans_of_a_container_are_reaped(cluster):
    """Where cservice is the first process, it is given them; also while a supervisor was lost."""
    need("root", "unshare", "setsid")
    cluster.launch = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"] + cluster.launch
    worker = cluster.shell_worker()
    service, = children_of(worker.pid)
    cluster.launch = cluster.launch[5:]
    lost = cluster.start_client("CMD=trap '' HUP TERM; echo; " + wait_for(cluster.path("go")), stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL)
    assert lost.stdout.read(1) == b"\n"
    os.kill(children_of(service)[0], signal.SIGKILL)
    assert lost.wait(PATIENCE) == 111
    assert cluster.client("CMD=setsid sleep 0.1 >/dev/null 2>&1 & exit 0").returncode == 0
    touch(cluster.path("go"))
    until(lambda: not children_of(service), "the end of every zombie")


STORM = python("""import fcntl, os, signal, sys
for number in (signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
fcntl.flock(os.open('{0}', os.O_RDWR), fcntl.LOCK_EX)
print('ready', flush=True)
while os.path.exists('{0}'):
    if os.fork():
        os._exit(0)
    {1}""")


def is_free(file):
    """Whether nobody has the lock of a file."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True


def test_a_command_that_forks_over_and_over_is_killed(one):
    """By no process of it is there for long enough to be found; whether it keeps its group or not."""
    locks = [put(one.path(new_mark()), "") for _ in range(2)]
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [os.unlink(lock) for lock in locks])     # or it would go on for ever
        for lock, then in zip(locks, ("pass", "os.setpgid(0, 0)")):
            process = stack.enter_context(job(one, STORM.format(lock, then)))
            assert the_line(process.out[1]) == b"ready"
            process.kill()
        for lock in locks:
            with open(lock) as file:
                until(lambda file=file: is_free(file), "the end of the last one")


def test_a_job_outlives_its_cservice(cluster):
    worker = cluster.shell_worker()
    go = cluster.path("go")
    with job(cluster, "echo ready; %s; cat; exit 4" % wait_for(go), ready=True) as process:
        signalled(worker, signal.SIGKILL)
        touch(go)
        assert finish(process) == (4, b"")


@pytest.mark.parametrize("size", (0, 50000000), ids=("quiet", "in_full_flow"))
def test_a_stopped_worker_is_lost(cluster, size):
    worker = cluster.shell_worker()
    mark = new_mark()
    command = "echo ready; head -c %d /dev/zero; exec sleep 1000" % size
    with job(cluster, command, outputs=(1, 2), mark=mark, env={"CEXEC_TIMEOUT_PINGPONG": "2"}, ready=True) as process:
        supervisor = parent_of(min(marked(mark)))
        assert parent_of(supervisor) == worker.pid
        os.kill(worker.pid, signal.SIGSTOP)
        os.kill(supervisor, signal.SIGSTOP)
        rest = read_all(process.out.pop(1))
        assert rest == bytes(len(rest))
        status, errors = finish(process, 2)
        os.kill(supervisor, signal.SIGCONT)
        os.kill(worker.pid, signal.SIGCONT)
        assert status == 111
        assert b": no sign of life for 2 s" in errors and errors.count(b"\n") == 1
        until(lambda: not marked(mark), "the command's end")


def test_client_stopped_for_a_while(one):
    with open(one.path("data/big"), "rb") as big:
        with job(one, "cat", fds={0: big}, env={"CEXEC_TIMEOUT_PINGPONG": "1"}) as process:
            data = [read_count(process.out[1], 1000000)]
            process.send_signal(signal.SIGSTOP)
            time.sleep(2)
            process.send_signal(signal.SIGCONT)
            status, rest = finish(process)
    assert status == 0
    assert b"".join(data) + rest == read(one.path("data/big"))


def test_quiet_for_longer_than_the_patience(one):
    with job(one, "sleep 2; echo end", env={"CEXEC_TIMEOUT_PINGPONG": "1"}) as process:
        assert finish(process) == (0, b"end\n")


def status_line(cluster, command, env=None, expected=None):
    with job(cluster, command, outputs=(1, 40), env=dict(env or {}, CEXEC_FD_FOR_ERRORS="40")) as process:
        line = read_all(process.out.pop(40)).decode()
        assert process.wait(PATIENCE) == expected
    assert line.endswith("\n") and line.count("\n") == 1
    return line.split(None, 3)


@pytest.mark.parametrize("command, status, word", [
    ("exit 0", 0, "exited=0"), ("exit 111", 111, "exited=111"), ("exit 137", 137, "exited=137"),
    ("kill -KILL $$", 137, "signalled=9"), ("kill -SEGV $$", 139, "signalled=11"),
    ("kill -KILL $(cut -d ' ' -f 4 /proc/$$/stat); sleep 1000", 111, "lost=connection closed")])
def test_status_line_tells_how_the_command_ended(one, command, status, word):
    words = status_line(one, "ulimit -c 0; " + command, expected=status)
    assert words[0] == "worker=127.0.0.1" and float(words[1].partition("seconds=")[2]) >= 0
    assert words[2] == "status=%d" % status
    assert words[3].strip() == word or word.startswith("lost=") and words[3].startswith("lost=")


def test_status_line_when_nobody_answers(one):
    env = {"GROUP": "127.255.255.255:%d" % free_port(), "CEXEC_TIMEOUT_ACCEPT": "1"}
    words = status_line(one, "true", env, expected=111)
    assert words[0] == "worker=-" and words[2] == "status=111"
    assert re.match(r"failed=no worker answered in \d+ s on 127\.255\.255\.255:", words[3])


def test_status_line_of_a_command_that_cannot_run(cluster):
    """As one worker that tried can tell, or all that were asked."""
    worker = cluster.worker(without_interpreter(cluster))
    assert status_line(cluster, "", expected=127)[2:] == ["status=127", "notstarted=127\n"]
    signalled(worker)
    cluster.worker("/no/such")
    assert status_line(cluster, "", expected=127)[2:] == [
        "status=127", "failed=worker %s cannot run its command: /no/such: No such file or directory\n" % NODE]


def test_status_line_that_cannot_be_written_is_said_and_changes_nothing(one):
    full = os.open("/dev/full", os.O_WRONLY)
    with job(one, "exit 3", outputs=(2,), fds={40: full}, env={"CEXEC_FD_FOR_ERRORS": "40"}) as process:
        os.close(full)
        assert finish(process, 2) == (3, b"cexec: CEXEC_FD_FOR_ERRORS=40: No space left on device\n")


def test_too_few_descriptors_are_said(cluster):
    launch = cluster.launch
    cluster.launch = ["sh", "-c", 'ulimit -n 50; exec "$@"', "sh"] + launch
    refusal(cluster.client(), 111, "no more than 50 descriptors are allowed, 51 are needed (see ulimit -n)")
    cluster.launch = launch
    cluster.worker("cat")
    cluster.launch = ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh"] + launch
    assert cluster.client(input=b"with few").stdout == b"with few"


@pytest.mark.parametrize("end", [47, 300])
def test_inherited_descriptors_above_the_limit_take_no_room(cluster, end):
    """The soft limit may be low: it is raised by what is open too, from CEXEC_MAXFD up."""
    cluster.worker("cat")
    cluster.launch = [sys.executable, "-Sc", textwrap.dedent("""\
        import os, resource, sys
        for number in range(32, int(sys.argv[1])):
            os.dup2(0, number, True)
        resource.setrlimit(resource.RLIMIT_NOFILE, (29, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        os.execv(sys.argv[2], sys.argv[2:])
        """), str(end)] + cluster.launch
    assert output(cluster.client()) == b""


def test_a_connection_that_finds_no_descriptor_is_no_firewall(cluster):
    """For a search, and for -l: it is said, with the remedy."""
    cluster.worker("cat")
    cluster.launch = [PYTHON, edited((("sock, address = self.loop.above_floor(sock), address_of(peer)",
                                       "raise OSError(errno.EMFILE, 'Too many open files')"),))]
    said = b"cexec: cannot take a worker's connection: Too many open files: this needs more descriptors (see ulimit -n)"
    done = cluster.client(env={"CEXEC_TIMEOUT_ACCEPT": "3"})
    assert (done.returncode, done.stderr.count(said)) == (111, 1) and b"arrive" not in done.stderr
    assert b"\ncexec: no worker's connection could be taken in 3 s: Too many open files: this needs" in done.stderr
    assert cluster.run("cexec", "-l", cluster.pub).stderr == said + b"\n"


def test_who_was_lost_is_said_though_the_command_has_closed_2(one):
    """A terminal has no reader who waits for its end."""
    reader, writer = os.pipe()
    master, terminal = pty.openpty()
    command = "exec 2>&-; echo closed; read x; kill -KILL $(cut -d ' ' -f 4 /proc/$$/stat); sleep 1000"
    with job(one, command, fds={0: reader, 2: terminal}) as process:
        assert read_count(process.out[1], 7) == b"closed\n"
        time.sleep(1.5)                 # a pipe would be closed by now, so that whoever reads it sees its end
        os.write(writer, b"go\n")
        assert finish(process) == (111, b"")
    os.close(terminal)
    assert read_all(master).startswith(b"cexec: worker %s lost after" % NODE.encode())
    close_all(reader, writer)


def test_status_line_is_not_carried(one):
    """The command does not see the descriptor, and what it writes there is its own."""
    with job(one, python(NUMBERS), outputs=(1, 40), env={"CEXEC_FD_FOR_ERRORS": "40"}) as process:
        assert finish(process) == (0, b"0 1 2\n")


# ---- cexec: a lost job is run again, or not at all -------------------------

def lose_worker(cluster, number=1):
    """Kills the supervisor of a job's run of that number; its service sees to the rest."""
    until(lambda: len(runs(cluster)) >= number, "run %d" % number)
    os.kill(runs(cluster)[number - 1], signal.SIGKILL)


def start_job(cluster, command, *, words=("-r",), **options):
    return cluster.follow("cexec", *words, cluster.pub, "CMD=" + RUN + command, **options)


@pytest.mark.parametrize("where", ["cexec -r", "cservice -i"])
def test_a_lost_job_from_file_to_file_is_run_again_elsewhere(cluster, where):
    data = os.urandom(3000000)
    options = ("-i",) if where == "cservice -i" else ()
    workers = cluster.shell_workers(2, options=options)
    crat = cluster.logger(cluster.pub)
    before = b"what was there before\n"
    with open(make_file(cluster, "in", b"not this" + data), "rb") as source, \
            open(make_file(cluster, "out", before), "r+b") as output:
        source.seek(8)
        output.seek(0, os.SEEK_END)
        client = start_job(cluster, HALF + "; exit 3", words=() if options else ("-r",), stdin=source, stdout=output)
        until(lambda: size_of(cluster, "out") == len(before) + 1000000, "half of the output")
        make_file(cluster, "go")
        lose_worker(cluster)
        assert client.wait(PATIENCE) == 3 and client.said() == ""
        assert read(cluster.path("out")) == before + data
        assert source.seek(0, os.SEEK_CUR) == 8 + len(data)
    assert len(set(runs(cluster))) == 2
    assert [read(worker.log).count(b"forked for") for worker in workers] == [1, 1]
    lines = until(lambda: len(crat.lines()) == 2 and crat.lines(), "both alerts")
    assert "rats out 127.0.0.1" in lines[0] and ", lost, run again: " in lines[0]
    assert "completed by 127.0.0.1 for app.pub exit code 3" in lines[1]
    no_defect(*[read(worker.log) for worker in workers])


def test_a_worker_that_lost_the_only_job_is_named_if_no_other_answers(cluster):
    """It answers, so no firewall is asked for."""
    cluster.shell_workers(1)
    client = start_job(cluster, HALF, words=("-r", "-n"), env={"CEXEC_TIMEOUT_ACCEPT": "2"})
    until(lambda: runs(cluster), "the job")
    lose_worker(cluster)
    assert client.wait(PATIENCE) == 111
    assert client.said().endswith(": 127.0.0.1 lost the job before\n") and "is cservice running" not in client.said()


@pytest.mark.parametrize("first, more", [(0, 0), (0, 1000), (3000000, 1000000), (cexec.HELD_MAX, 0),
                                         (cexec.HELD_MAX, 2000000)])
def test_input_from_a_pipe_is_held_and_sent_again(cluster, first, more):
    """What is read before the loss is held; what comes later is just read."""
    cluster.shell_workers(2)
    data = noise(first + more)
    command = "[ -e go ] && exec cat; head -c %d >/dev/null; touch ready; exec sleep 1000" % first
    with open(make_file(cluster, "out"), "r+b") as output:
        client = start_job(cluster, command, stdin=subprocess.PIPE, stdout=output)
        client.stdin.write(data[:first])
        if not more:
            client.stdin.close()
        else:
            client.stdin.flush()
        until(lambda: size_of(cluster, "ready") == 0, "what was sent at first")
        make_file(cluster, "go")
        lose_worker(cluster)
        until(lambda: len(runs(cluster)) == 2, "the second run")
        if more:
            client.stdin.write(data[first:])
            client.stdin.close()
        assert client.wait(PATIENCE) == 0 and client.said() == ""
    client.stdin = None
    assert read(cluster.path("out")) == data and len(runs(cluster)) == 2


def lost_with(reason):
    """What cexec says; what a killed supervisor had not read yet makes the close a reset."""
    return r"cexec: worker \S+ lost after \d+\.\d s: (connection closed|Connection reset by peer)%s\n" % (
        re.escape(reason))


def written_by_another(cluster):
    with open(cluster.path("out"), "ab") as file:
        file.write(b"and this is somebody else's")


# name: (the command, how its output is opened, what must be there before the loss, what then happens, the reason)
NOT_AGAIN = {
    "too_much_input": ("head -c %d >/dev/null; touch ready" % (cexec.HELD_MAX + 1), "r+b", ("ready", 0), None,
                       "more than 8 MiB of input were read"),
    "a_pipe_was_written_to": ("printf begun", "pipe", ("copy", 5), None, "descriptor 1 was written to"),
    "a_pipe_was_closed": ("exec >&-", "pipe", ("closed", 0), None, "descriptor 1 was closed"),
    "append_only": ("printf begun", "ab", ("out", 11), None, "the file on descriptor 1 cannot be cut back"),
    "not_begun_at_its_end": ("printf begun", "r+b", ("out", 6), None, "the file on descriptor 1 cannot be cut back"),
    "written_by_another": ("printf begun", "end", ("out", 11), written_by_another,
                           "the file on descriptor 1 cannot be cut back"),
}


@pytest.mark.parametrize("name", NOT_AGAIN)
def test_a_lost_job_that_would_show_is_not_run_again(cluster, name):
    command, how, (there, size), then, reason = NOT_AGAIN[name]
    cluster.shell_workers(2)
    with contextlib.ExitStack() as stack:
        source = subprocess.PIPE if name == "too_much_input" else subprocess.DEVNULL
        if how == "pipe":
            copy = subprocess.Popen(["sh", "-c", "cat >copy; touch closed"], stdin=subprocess.PIPE,
                                    cwd=cluster.directory)
            stack.callback(copy.wait)
            output = stack.enter_context(copy.stdin)
        else:
            make_file(cluster, "out", b"before")
            output = stack.enter_context(open(cluster.path("out"), "r+b" if how == "end" else how))
            output.seek(0, os.SEEK_SET if how == "r+b" and not source == subprocess.PIPE else os.SEEK_END)
        client = start_job(cluster, command + "; exec sleep 1000", stdin=source, stdout=output)
        if how == "pipe":
            copy.stdin.close()
        if source == subprocess.PIPE:
            client.stdin.write(bytes(cexec.HELD_MAX + 1))
            client.stdin.flush()
        wanted = b"begun" if "not_begun" in name else b""
        until(lambda: size_of(cluster, there) >= size and wanted in read(cluster.path(there)), "the output")
        if then:
            then(cluster)
        known = read(cluster.path("out")) if how != "pipe" else None
        lose_worker(cluster)
        assert client.wait(PATIENCE) == 111
        assert re.fullmatch(lost_with("; not run again: " + reason), client.said())
        assert len(runs(cluster)) == 1
        assert known is None or read(cluster.path("out")) == known      # and nothing was cut


def test_a_job_that_was_told_to_end_is_not_run_again(cluster):
    cluster.shell_workers(2)
    client = start_job(cluster, "trap 'touch told' TERM; touch ready; while :; do sleep 0.02; done")
    until(lambda: size_of(cluster, "ready") == 0, "the command")
    client.terminate()
    until(lambda: size_of(cluster, "told") == 0, "the signal")
    lose_worker(cluster)
    assert client.wait(PATIENCE) == 111 and len(runs(cluster)) == 1
    last = client.said().splitlines(True)[-1]           # the shell has a line for its child that was terminated
    assert re.fullmatch(lost_with("; not run again: it was told to end"), last)


def test_a_job_is_never_run_twice_unless_somebody_allows_it(cluster):
    cluster.shell_workers(2)
    client = start_job(cluster, "kill -KILL $PPID; sleep 1000", words=())
    assert client.wait(PATIENCE) == 111
    assert re.fullmatch(lost_with("; the command may have run (cexec -r runs it again)"), client.said())
    assert cluster.client("CMD=true").returncode == 0       # whatever was still to be heard has been heard
    assert len(runs(cluster)) == 1


@pytest.mark.parametrize("retries", [0, 2])
def test_retries_come_to_an_end(cluster, retries):
    cluster.shell_workers(retries + 2)
    client = start_job(cluster, "kill -KILL $PPID; sleep 1000", env={"CEXEC_RETRIES": str(retries)})
    assert client.wait(PATIENCE) == 111 and len(set(runs(cluster))) == retries + 1
    assert re.fullmatch(lost_with("; not run again: that was try %d (CEXEC_RETRIES)" % (retries + 1)), client.said())


def test_nobody_else_is_there_to_run_it_again(cluster):
    cluster.shell_worker()
    client = start_job(cluster, "kill -KILL $PPID; sleep 1000", env={"CEXEC_TIMEOUT_ACCEPT": "1"})
    assert client.wait(PATIENCE) == 111 and len(runs(cluster)) == 1
    assert re.search("no other worker answered in [12] s: 127.0.0.1 lost the job before\n", client.said())


def test_the_slot_of_a_lost_supervisor_is_free_when_its_session_is_over(cluster):
    worker = cluster.shell_worker(env={"CONCURRENCY": "1", "BOOST": "0"})     # or the complaint would cost 2 s
    for _ in range(3):
        client = start_job(cluster, "touch ready; exec sleep 1000", words=())
        lose_worker(cluster, len(runs(cluster)) + 1)
        assert client.wait(PATIENCE) == 111
        done = cluster.client("CMD=true", env={"CEXEC_TIMEOUT_WAIT": "3"})      # less than until KILL
        assert (done.returncode, done.stderr) == (0, b"")
    no_defect(read(worker.log))


@HEAVY
def test_twenty_jobs_while_workers_are_killed(cluster):
    """A supervisor, or a worker, each second: every output is whole, every status 0, and crat tells what ran again."""
    chance, env = random.Random(5), {"CEXEC_RETRIES": "1000"}
    data = [noise(STORM_BYTES, seed) for seed in range(3)]
    names = [make_file(cluster, "in%d" % number, each) for number, each in enumerate(data)]

    def worker():
        return cluster.worker("sh", "-c", STORM_COMMAND, options=("-i",), env={"CONCURRENCY": "2"}, verbose=False)

    def one_job(number):
        with open(names[number % 3], "rb") as source, open(cluster.path("out%d" % number), "wb") as output:
            done = cluster.run("cexec", cluster.pub, stdin=source, stdout=output, env=env, timeout=PATIENCE * 4)
        return done.returncode, done.stderr, read(cluster.path("out%d" % number)) == data[number % 3]

    workers, logger = [worker() for _ in range(3)], cluster.logger(cluster.pub)
    killed = {"supervisor": 0, "worker": 0}
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(one_job, number) for number in range(STORM_JOBS)]
        while not all(job.done() for job in jobs):
            concurrent.futures.wait(jobs, 1)
            index = chance.randrange(3)
            supervisors = children_of(workers[index].pid)
            if chance.random() < 0.3:
                killed["worker"] += 1
                signalled(workers[index], signal.SIGKILL)
                workers[index] = worker()
            if supervisors:
                killed["supervisor"] += 1
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(supervisors), signal.SIGKILL)
    assert [job.result() for job in jobs] == [(0, b"", True)] * STORM_JOBS
    print("killed:", killed)
    assert killed["supervisor"] > 2
    until(lambda: sum(" completed by " in line for line in logger.lines()) == STORM_JOBS, "every job's alert")
    assert any("lost, run again" in line for line in logger.lines())


# ---- cexec: large variables ------------------------------------------------


def test_variables_as_large_as_the_systems(cluster):
    cluster.worker("sh", "-c", "env | grep ^PEER_V | sort -V")
    done = cluster.client(*MANY)
    assert (done.returncode, done.stdout.decode() == MANY_SEEN, done.stderr) == (0, True, b"")


def test_variables_of_a_batch_and_of_a_job_that_is_run_again(cluster):
    cluster.worker("sh", "-c", 'test -e %s || { touch %s; kill -KILL $PPID; sleep 1000; }; env | grep ^PEER_V | sort -V'
                   % ((shlex.quote(cluster.path("lost")),) * 2), env={"CONCURRENCY": "2"})
    names = made_files(cluster, 3)
    done = batch(cluster, *names, variables=MANY)
    assert done.returncode == 0, done.stderr
    assert {read(cluster.path(name + ".out")).decode() == MANY_SEEN for name in names} == {True}


def test_more_variables_than_the_worker_s_system_takes(cluster):
    """The command cannot be run, and that is not the worker's fault."""
    launch = cluster.launch
    cluster.launch = ["sh", "-c", 'ulimit -s 512; exec "$@"', "sh"] + launch
    worker = cluster.worker("cat")
    cluster.launch = launch
    said = failed(cluster.client(*MANY[:2]), 126)
    assert said == b"cexec: worker %s cannot run its command: cat: Argument list too long\n" % NODE.encode()
    until(lambda: b"supervisor" in read(worker.log) and b": done" in read(worker.log), "the job's end")
    assert b": failed" not in read(worker.log)
    assert cluster.client("A=1", input=b"x").stdout == b"x"


def test_words_over_a_slow_connection(cluster):
    """Either side waits for as long as some of them arrive, though all take longer than an offer may."""
    altered(cluster, OFFER_SECONDS=1.0)
    worker, key, port = cluster.worker("cat"), cexec.open_key(cluster.key), free_port()
    count = -(-len(MANY[0]) // cexec.WORDS_CHUNK)
    with Asker(cluster) as asker, asker.offer() as slow, Ear(port) as ear:
        client = searching_client(cluster, port, *MANY[:1])
        announced, address = ear.wait_for(cexec.ANNOUNCE)
        slow.send(cexec.AUTH, proof=asker.proof(slow))
        with play_worker(announced, address, key) as peer:
            peer.expect(cexec.AUTH)
            began = time.monotonic()
            for _ in range(count):
                kind, payload = peer.next_frame()
                peer.words.add(payload.bytes)
                peer.send(cexec.PONG)
                slow.send(cexec.WORDS, bytes=b"A=1\0")
                time.sleep(0.2)
            assert time.monotonic() > began + 1.0
            assert peer.expect(cexec.JOB).environment == [MANY[0].encode()]
            peer.send(cexec.ACCEPT)
            peer.expect(cexec.GO)
        assert client.wait(PATIENCE) == 111         # lost, after GO
        slow.send(cexec.JOB, variables=count)
        slow.expect(cexec.ACCEPT)
    no_defect(read(worker.log))


# ---- cexec: arguments ------------------------------------------------------


@pytest.mark.parametrize("command, seen", [
    (SHOW, lambda words: words),
    ([*SHOW, "first"], lambda words: ["first", *words]),
    ([*SHOW, "{}", "last"], lambda words: [*words, "last"]),
    ([*SHOW, "{}", "x{}", "{}"], lambda words: [*words, "x{}", *words])], ids=["alone", "end", "place", "twice"])
def test_arguments_byte_for_byte(cluster, command, seen):
    cluster.worker(*command, options=["-a"])
    for words in (["x", *ODD], ["x"], []):
        assert ended(cluster.client("A=1", *words)) == (0, shown(seen(words)), b"")
    assert cluster.client("A=1", "--", *ODD).stdout == shown(seen(ODD))


def test_a_worker_without_a_keeps_its_braces(cluster):
    cluster.worker(*SHOW, "{}")
    assert cluster.client("A=1").stdout == shown(["{}"])


def test_the_arguments_are_the_command(cluster):
    worker = cluster.worker(options=["-a"])
    assert ended(cluster.client("A=1", "sh", "-c", 'echo "$PEER_A $*"', "sh", "x  y", "$z")) == (0, b"1 x  y $z\n", b"")
    said = failed(cluster.client("no such thing", "x"), 127)
    why = b"cexec: worker %s cannot run its command: no such thing: No such file or directory" % NODE.encode()
    assert said.startswith(why)
    assert cluster.client("true").returncode == 0
    assert b": failed" not in read(worker.log)          # it is not the worker's fault


def test_a_command_with_a_place_for_its_name(cluster):
    cluster.worker("{}", "x", options=["-a"])
    assert cluster.client("echo", "-n").stdout == b"x"


def test_without_a_command_there_is_nothing_to_run(cluster):
    """Said before anything runs; more than a message is needed to get past it."""
    worker = cluster.worker(options=["-a"])
    said = failed(cluster.client("A=1"), 100)
    assert said == b"cexec: worker %s has no command of its own: name one after the public key (cservice -a)\n" % (
        NODE.encode())
    with Asker(cluster) as asker, asker.offer() as peer:
        peer.send(cexec.AUTH, proof=asker.proof(peer))
        peer.send(cexec.JOB)
        assert peer.next() is None
    until(lambda: b"no command" in read(worker.log), "its complaint")


@pytest.mark.parametrize("batch_of", [0, 3])
def test_a_worker_that_takes_no_arguments(cluster, batch_of):
    worker = cluster.worker("touch", cluster.path("ran"), env={"CONCURRENCY": "2"})
    names = made_files(cluster, batch_of)
    done = batch(cluster, *names, variables=["-x"]) if batch_of else cluster.client("-x")
    assert (done.returncode, done.stdout) == (100, b"")
    said = (b"cexec: worker %s takes no arguments (cservice -a); options come before the public key, "
            b"variables are KEY=VALUE" % NODE.encode())
    assert done.stderr.startswith(said) and done.stderr.count(b"\n") == 1
    assert not os.path.exists(cluster.path("ran")) and b"supervisor" not in read(worker.log)


def test_among_workers_one_takes_arguments(cluster):
    for _ in range(3):
        cluster.worker("false", env={"BOOST": "0"})
    cluster.worker("echo", options=["-a"], env={"BOOST": "200000"})
    for _ in range(3):
        assert cluster.client("x").stdout == b"x\n"
    names = made_files(cluster, 5)
    assert batch(cluster, *names, variables=["{}"]).returncode == 0
    assert [read(cluster.path(name + ".out")) for name in names] == [name.encode() + b"\n" for name in names]


def test_the_one_that_takes_arguments_is_busy(cluster):
    """The client waits in its line, and others do not make it give up."""
    cluster.worker("false", env={"BOOST": "300000"})
    cluster.worker(options=["-a"], env={"BOOST": "0", "CONCURRENCY": "1"})
    first = cluster.start_client("cat", stdin=subprocess.PIPE)
    until(lambda: len(cluster.alive()) > 4, "the first job")
    second = verbose_client(cluster, "echo", "x", stdout=subprocess.PIPE)
    until(lambda: "takes no arguments (cservice -a); options come before the public key, variables are KEY=VALUE; "
                  "waits for a worker that is busy" in second.said(), "an objection")
    first.communicate(b"")
    assert second.communicate()[0] == b"x\n" and first.returncode == second.returncode == 0


def test_a_megabyte_of_arguments(cluster):
    lost, words = cluster.path("lost"), [chr(97 + number) * (99999 + number) for number in range(11)]
    cluster.worker("sh", "-c", 'test -e "$0" || { touch "$0"; kill -KILL $PPID; sleep 1000; }; printf "%s\\n" "$@"',
                   lost, "{}", options=["-a"], env={"CONCURRENCY": "2"})
    seen = "".join(word + "\n" for word in words).encode()
    cluster.worker("true", env={"BOOST": "1000000"})
    names = made_files(cluster, 2)
    done = batch(cluster, *names, variables=words)
    assert done.returncode == 0, done.stderr
    assert all(read(cluster.path(name + ".out")) == seen for name in names)
    assert cluster.client(*words).stdout == seen


def test_arguments_of_a_job_that_is_run_again(cluster):
    worker = cluster.worker("sh", "-c", 'echo "$*"; test -e "$0" || { touch "$0"; kill -KILL $PPID; sleep 1000; }',
                            cluster.path("lost"), "{}", options=["-ai"])
    cluster.worker("sh", "-c", 'echo "$*"', "sh", options=["-a"], env={"BOOST": "1000000"})
    with open(cluster.path("out"), "wb") as out:
        assert cluster.client("a", "", "b", stdout=out).returncode == 0
    assert read(cluster.path("out")) == b"a  b\n"
    assert os.path.exists(cluster.path("lost")) and worker.poll() is None


def test_words_of_a_batch_are_filled_in(cluster):
    cluster.worker(*SHOW[:2], "import os, sys; print(os.environ['PEER_X'], os.environ['PEER_FILE'], sys.argv[1:])",
                   options=["-a"], env={"CONCURRENCY": "2"})
    os.mkdir(cluster.path("d"))
    name, = made_files(cluster, 1, "d")
    stem = os.path.splitext(os.path.basename(name))[0]
    done = batch(cluster, name, variables=["X={/}", "{}", "-o{.}.x", "{/.}{//}", "{x}", ""])
    assert done.returncode == 0, done.stderr
    seen = [name, "-o%s.x" % os.path.splitext(name)[0], stem + os.path.dirname(name), "{x}", ""]
    assert read(cluster.path(name + ".out")).decode() == "%s %s %s\n" % (os.path.basename(name), name, seen)


def test_a_file_of_a_batch_whose_words_are_too_many(cluster):
    cluster.worker("true", options=["-a"])
    long, = made_files(cluster, 1)
    os.mkdir(cluster.path("d" * 200))
    longer = os.path.join("d" * 200, long)
    shutil.copy(cluster.path(long), cluster.path(longer))
    done = batch(cluster, long, longer, variables=["{}" * 200 + "x" * 2000] * 200)
    assert done.returncode == 1 and b"more than 6 MiB" in done.stderr and done.stderr.startswith(b"cexec: " + b"d" * 9)
    assert os.path.exists(cluster.path(long + ".out"))


def test_arguments_cross_a_proxy(hosts, crossing):
    hosts.worker(*SHOW, options=["-a"], space=crossing.worker)
    crossing.proxy()
    assert hosts.client("x", *ODD, space=crossing.client).stdout == shown(["x", *ODD])


def test_a_as_root_is_warned_of(cluster):
    warning = b"warning: -a as root: a client can make the command"
    assert (warning in read(cluster.worker("cat", options=["-a"]).log)) == (os.getuid() == 0)
    assert warning not in read(cluster.worker("cat").log)


def test_the_arguments_are_the_command_of_another_user(cluster):
    need("root")
    worker = cluster.worker(options=["-au", "nobody"])
    assert cluster.client("id", "-un").stdout == b"nobody\n"
    assert b"warning" not in read(worker.log)


def test_who_takes_arguments_is_in_the_list(cluster):
    cluster.worker("cat", options=["-ai"])
    row = json.loads(survey(cluster, "-j").stdout)
    assert row["options"] == "-ai"
    assert survey(cluster).stdout.rstrip("\n").split("\t")[-2:] == ["-ai", row["id"]]


def test_every_running_job_has_a_number_of_its_own(cluster):
    cluster.worker("sh", "-c", 'echo $CEXEC_SLOT; read x', env={"CONCURRENCY": "3", "CEXEC_SLOT": "7"})

    def job():
        started = cluster.start_client(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return started, started.stdout.readline()
    jobs = [job() for _ in range(3)]
    assert [number for _, number in jobs] == [b"0\n", b"1\n", b"2\n"]
    for place in (1, 0):
        jobs[place][0].communicate(b"\n")
    assert job()[1] == b"0\n"           # the smallest that is free
    assert job()[1] == b"1\n"


def test_a_batch_keeps_its_number_and_a_lost_job_keeps_it_until_all_has_ended(cluster):
    altered(cluster, KILL_SECONDS=5.0)
    cluster.worker("sh", "-c", "trap '' TERM HUP; echo $CEXEC_SLOT $PPID; cat; test -z $PEER_HOLD || sleep 1000",
                   env={"CONCURRENCY": "2"})
    held = cluster.start_client("HOLD=1", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    number, supervisor = held.stdout.readline().split()
    assert number == b"0"
    names = made_files(cluster, 4)
    assert batch(cluster, *names, options=["-j1"]).returncode == 0
    assert {read(cluster.path(name + ".out")).split()[0] for name in names} == {b"1"}
    os.kill(int(supervisor), signal.SIGKILL)
    assert held.wait(PATIENCE) == 111
    assert cluster.client(input=b"x").stdout.startswith(b"1 ")
    until(lambda: cluster.client(input=b"x").stdout.startswith(b"0 "), "the end of the lost job")


# ---- Files: a directory for each job ---------------------------------------

def packed(*entries):
    """An archive of (name, data) or (name, None) for a directory; names may be what no archive of ours has."""
    data = b""
    for name, content, *mode in entries:
        kind = stat.S_IFREG if content is not None else stat.S_IFDIR
        data += cexec.member_head(name, kind | (mode[0] if mode else 0o755), len(content or b""), 0)
        data += (content or b"") + bytes(-len(content or b"") % 512)
    return data


END = packed((b".", None))


def head_of(name, **fields):
    """A tar head with any fields."""
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT, "latin-1", "strict")


def head_with_holes(pieces, size):
    return cexec.member_head(b"x", stat.S_IFREG | 0o644, size, 0, pieces)


HOSTILE = {
    "parent": packed((b"../x", b"1")) + END,
    "hidden parent": packed((b"a/../../x", b"1")) + END,
    "absolute": packed((b"/tmp/x", b"1")) + END,
    "dot": packed((b"./x", b"1")) + END,
    "double slash": packed((b"a//x", b"1")) + END,
    "parent as a directory": packed((b"..", None)) + END,
    "link": head_of("x", type=tarfile.SYMTYPE, linkname="/etc/passwd") + END,
    "hard link": head_of("x", type=tarfile.LNKTYPE, linkname="/etc/passwd") + END,
    "fifo": head_of("x", type=tarfile.FIFOTYPE) + END,
    "device": head_of("x", type=tarfile.CHRTYPE, devmajor=1, devminor=3) + END,
    "holes without an end": head_with_holes([(512 * n, 1) for n in range(100)], 100000)[:512 * 3] + END,
    "holes that overlap": head_with_holes([(512, 600), (1024, 1)], 5000) + bytes(1024) + END,
    "data behind the end": head_with_holes([(0, 1), (4096, 2)], 4097) + bytes(512) + END,
    "a hole of a negative size": head_with_holes([(100, 600), (90, -10)], 5000) + bytes(1024) + END,
    "a piece of nothing below zero": head_with_holes([(-5, 5)], 5000) + bytes(512) + END,
    "pax": head_of("x", type=tarfile.XHDTYPE, size=512) + bytes(512) + END,
    "set-id": head_of("x", mode=0o4755) + END,
    "negative size": head_of("x", size=-512) + END,
    "size of a directory": head_of("x", type=tarfile.DIRTYPE, size=1) + END,
    "large name": head_of("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=2 ** 40) + END,
    "name upon name": (2 * (head_of("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=2) + b"x" * 512)
                       + packed((b"x", b"1")) + END),
    "file twice": packed((b"x", b"1"), (b"x", b"2")) + END,
    "file as a directory": packed((b"x", b"1"), (b"x/y", b"2")) + END,
    "not the end": END + packed((b"x", b"1")),
    "no end": packed((b"x", b"1")),
    "half a head": packed((b"x", b"1"))[:700],
    "nothing": b"",
    "zeros": bytes(10240),
    "noise": b"\x07" * 5120,
}


def unpacked(data, directory, **options):
    """unpack() of an archive's bytes into a new directory."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        os.makedirs(directory)
        top = os.open(directory, os.O_RDONLY)
        try:
            return cexec.unpack(os.dup(file.fileno()), top, **options)
        finally:
            os.close(top)


@pytest.mark.parametrize("what", HOSTILE)
def test_an_archive_that_is_refused(tmp_path, what):
    with pytest.raises(OSError if what in ("file twice", "file as a directory") else cexec.ProtocolError):
        unpacked(HOSTILE[what], str(tmp_path / "in"), allowed=lambda name: True)
    assert os.listdir(str(tmp_path)) == ["in"] and not os.path.islink(str(tmp_path / "in" / "x"))


@pytest.mark.parametrize("name, kind", [(b"a/" * 50, stat.S_IFDIR), (b"n" * 200, stat.S_IFREG)])
def test_more_names_than_a_reader_keeps_are_refused(tmp_path, monkeypatch, name, kind):
    """A directory within many makes many; memory for the names has an end."""
    monkeypatch.setattr(cexec, "ARCHIVE_NAMES", 100000, raising=False)
    data = [cexec.member_head(b"%d%s" % (number, name), kind | 0o700, 0, 0) for number in range(1000)]
    few = sum(map(len, data[:5]))
    unpacked(b"".join(data)[:few] + END, str(tmp_path / "few"))
    with pytest.raises(cexec.ProtocolError, match="too many files"):
        unpacked(b"".join(data) + END, str(tmp_path / "many"))
    made = sum(len(names) + len(files) for _, names, files in os.walk(str(tmp_path / "many")))
    assert made <= 100000 / 100


def test_an_archive_cut_anywhere_is_refused(tmp_path):
    whole = packed((b"a", b"x" * 600), (b"d", None), (b"d/" + b"n" * 200, b"y"), (b"zero", bytes(2000))) + END
    for size in [*range(0, len(whole), 512), *range(100, len(whole), 700)]:
        with pytest.raises(cexec.ProtocolError):
            unpacked(whole[:size], str(tmp_path / str(size)))
    files, directories = unpacked(whole, str(tmp_path / "whole"))
    assert files == [b"a", b"d/" + b"n" * 200, b"zero"] and list(directories) == [b"d"]


@pytest.mark.parametrize("pattern, names, others", [
    ("*.pdf", ["a.pdf", "a.b.pdf"], ["a.ps", ".x.pdf", "d/a.pdf"]),
    ("out", ["out", "out/x", "out/d/.y"], ["outer", "d/out"]),
    ("d/?.[ch]", ["d/a.c", "d/b.h"], ["d/ab.c", "d/.c", "d/a.o", "d/a.c2"]),
    ("[!a]*", ["b", "bb/x"], ["a", ".b"]),
    ("**/*.o", ["x.o", "a/x.o", "a/b/x.o"], [".a/x.o", "x.oo"]),
    ("d/**", ["d/x", "d/e/f"], ["e/x", "d"]),
    (".x", [".x"], ["x"]),
    ("a[[]1].c", ["a[1].c"], ["a1.c"]),
    ("a+(b).^$", ["a+(b).^$"], ["ab"]),
    ("[[:digit:]x]", ["1", "x"], [":", "d", "[", "1]"]),
    (r"\*.c", ["*.c", "*.c/x"], ["a.c", r"\*.c"]),
    (r"a\/b\?", ["a/b?"], ["a/bc", r"a\/b?"]),
    ("caf??", ["café"], ["cafe", "cafés"]),         # bytes
    ("[z-a]", [], ["z", "a", "-"])])
def test_what_a_pattern_matches(pattern, names, others):
    matches = cexec.matcher([cexec.result_pattern(pattern).encode()])
    assert [name for name in names if not matches(name.encode())] == []
    assert [name for name in others if matches(name.encode())] == []


def chosen_by(shell, patterns, place):
    """What a shell makes of each pattern in a directory: sets of the names there."""
    script = b"".join(b"printf '%%s\\0' %s; printf '\\0'\n" % pattern for pattern in patterns)
    found = subprocess.run([shell], input=script, cwd=str(place), env={"LC_ALL": "C"}, stdout=subprocess.PIPE,
                           check=True)
    there = set(os.listdir(os.fsencode(str(place))))
    return [there.intersection(names.split(b"\0")) for names in found.stdout.split(b"\0\0")[:-1]]


@pytest.mark.parametrize("pieces", [
    [b"a", b"b", b"-", b"*", b"?", b"[", b"]", b"[!", b".", rb"\\"],
    [b"a", b"[[:digit:]", b"[:alpha:]", b"]", b"[", b"1", b"-", b"*", rb"\]", rb"\-", rb"\*"],
    [b"\xc3\xa9", b"\xff", b"?", b"[", b"]", b"*", b"\xa9", rb"\?"],
    *([b"[[:%s:]]" % name, b"[![:%s:]]" % name] for name in cexec.CLASSES)],
    ids=["brackets", "classes", "bytes", *map(bytes.decode, cexec.CLASSES)])
def test_patterns_are_those_of_sh(tmp_path, pieces):
    """As sh in the C locale has them; where two shells differ, POSIX says nothing."""
    need("bash")
    chance = random.Random(7)
    names = [bytes([byte]) for byte in range(1, 256) if byte not in b"./"] if len(pieces) == 2 else [
        b"".join(chance.choice([b"a", b"b", b"1", b"-", b"]", b"[", b"!", b":", b".", b"*", b"?", b"\\", b"\xc3\xa9",
                                b"\xff"]) for _ in range(chance.randrange(1, 4))) for _ in range(600)]
    for name in set(names) - {b".", b".."}:
        os.close(os.open(os.path.join(os.fsencode(str(tmp_path)), name), os.O_CREAT | os.O_WRONLY))
    patterns = pieces if len(pieces) == 2 else sorted({
        b"".join(chance.choice(pieces) for _ in range(chance.randrange(1, 6))) for _ in range(1500)})
    patterns = [pattern for pattern in patterns if pattern not in (b".", b"..") and b"**" not in pattern
                and b"-[:" not in pattern and not pattern.startswith(b"-")]      # no range ends with a class
    names, compared = os.listdir(os.fsencode(str(tmp_path))), 0
    for pattern, one, other in zip(patterns, *(chosen_by(shell, patterns, tmp_path) for shell in ("sh", "bash"))):
        if one == other:
            compared += 1
            matches = cexec.matcher([pattern])
            assert (pattern, {name for name in names if matches(name)}) == (pattern, one)
    assert compared > len(patterns) * 0.9, (compared, len(patterns))


@pytest.mark.parametrize("levels", [1, 7, 10000])
def test_any_directory_is_removed(tmp_path, levels):
    """Deep ones, of which few levels are remembered, read-only ones, odd names; what links lead to stays."""
    keep = tmp_path / "keep"
    keep.write_text("x")
    place = tmp_path / "place"
    place.mkdir()

    class Watched(cexec.Emptying):
        def unlink_files(self):
            assert len(self.above) <= levels
            return super().unlink_files()

    def make_and_remove():
        cexec.Emptying, cexec.LEVELS_MAX = Watched, levels
        if os.getuid() == 0:
            os.chown(str(place), 65534, 65534)
            os.chdir(str(place))
            os.setuid(65534)
        os.chdir(str(place)) if os.getuid() != 65534 else None
        os.mkdir("job")
        top = os.open("job", os.O_RDONLY)
        os.chdir("job")
        for _ in range(1500):
            os.mkdir("d")
            os.mkdir("e", 0)
            os.mkfifo("f")
            os.chdir("d")
        os.chdir(top)
        os.makedirs("ro/none")
        os.symlink(str(keep), "ro/link")
        os.symlink(str(tmp_path), "link")
        os.mkfifo(b"fifo\xff")
        for name, mode in (("ro/none", 0), ("ro", 0o555), (".", 0o700)):
            os.chmod(name, mode)
        os.fchdir(os.open("..", os.O_RDONLY))
        os.chmod("job", 0)
        cexec.remove_directory("job")
    pid = os.fork()
    if not pid:
        try:
            make_and_remove()
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert os.listdir(str(place)) == [] and keep.read_text() == "x"


@pytest.mark.parametrize("change", ["removed", "moved", "moved each time", "is away"])
def test_a_removal_goes_on_although_somebody_is_at_work_there(tmp_path, monkeypatch, change):
    """Of a directory that is gone, and is not found from there any more, nothing stays."""
    monkeypatch.chdir(str(tmp_path))
    os.makedirs("job/a/b/c")
    os.makedirs("job/d/e")
    os.makedirs("job/a/f/g")
    enter, entered = cexec.open_writable, []

    def open_writable(name, place):
        if change == "is away" and name == "b":
            shutil.rmtree("job/a/b")
        fd = enter(name, place)
        if name == "b" and (change == "moved each time" or name not in entered):
            entered.append(name)
            if change == "removed":
                shutil.rmtree("job/a")
            else:
                path = os.readlink("/proc/self/fd/%d" % fd)
                os.rename(path, "away%d" % len(entered))
                os.makedirs(path)
        return fd
    monkeypatch.setattr(cexec, "open_writable", open_writable)
    if change == "moved each time":
        with pytest.raises(OSError, match="was moved while it was removed"):
            cexec.remove_directory("job")
        assert os.path.isdir("job/a/b")
    else:
        cexec.Emptying("job", None).work()
        assert os.listdir("job") == []


def test_a_removal_ends_although_somebody_makes_more(tmp_path, monkeypatch):
    """A directory that is entered has another one by then."""
    monkeypatch.setattr(cexec, "REMOVAL_SECONDS", 0.3, raising=False)
    enter, entered = cexec.open_writable, []

    def open_writable(name, place):
        fd = enter(name, place)
        os.mkdir("d", dir_fd=fd)
        entered.append(name)
        assert len(entered) < 50000
        return fd
    monkeypatch.setattr(cexec, "open_writable", open_writable)
    monkeypatch.chdir(str(tmp_path))
    os.mkdir("job")
    with pytest.raises(OSError, match="not done in 0.3 s"):
        cexec.remove_directory("job")
    monkeypatch.undo()
    cexec.remove_directory(str(tmp_path / "job"))


@pytest.mark.parametrize("name", [b"x", b"long" * 40])
@pytest.mark.parametrize("places, size", [
    ([], 3 << 20), ([0], 3 << 20), ([1 << 20], 3 << 20), ([1 << 20], (1 << 20) + 3), ([0, 1 << 20], 2 << 20),
    ([n << 20 for n in range(4)], 5 << 20), ([n << 20 for n in range(26)], 27 << 20),
    ([n << 18 for n in range(1, 300)], 80 << 20), ([0, 9 << 33], 10 << 33)])
def test_holes_stay_holes(tmp_path, name, places, size):
    """In the archive, which tarfile reads too, and at the other end."""
    path = str(tmp_path / "x")
    with open(path, "wb") as file:
        for place in places:
            file.seek(place)
            file.write(b"%d" % place)
        file.truncate(size)
    if os.stat(path).st_blocks * 512 > len(places) * 8192:
        skip("no holes on this disk")
    with tempfile.TemporaryFile() as file:
        cexec.pack_files(os.dup(file.fileno()), [(os.fsencode(path), name), (os.fsencode(path), b"y")])
        assert file.tell() < 2 * (len(places) * 8800 + 2048)
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True, encoding="latin-1") as archive:
            members = archive.getmembers()
            assert [member.name for member in members] == [name.decode(), "y", "."]
            assert {member.size for member in members[:2]} == {size}
            if size < 1 << 30:
                assert archive.extractfile(members[1]).read() == read(path)
        file.seek(0)
        assert unpacked(file.read(), str(tmp_path / "in"))[0] == [name, b"y"]
    for made in (os.fsdecode(name), "y"):
        made = str(tmp_path / "in" / made)
        assert os.stat(made).st_size == size and os.stat(made).st_blocks <= os.stat(path).st_blocks + 8
        with open(made, "rb") as one, open(path, "rb") as other:
            for place in [0, *places, size - 100]:
                one.seek(place)
                other.seek(place)
                assert one.read(4096) == other.read(4096)


@pytest.mark.parametrize("change", ["grows", "shrinks", "is rewritten", "vanishes", "becomes a link"])
def test_a_file_that_changes_while_it_is_packed(tmp_path, monkeypatch, change):
    """No archive is whole then: not at the client, and not at the worker."""
    paths = [os.fsencode(str(tmp_path / name)) for name in "abc"]
    for path in paths:
        put(os.fsdecode(path), "1" * 100)
    changes = {
        "grows": lambda: os.truncate(paths[1], 200), "shrinks": lambda: os.truncate(paths[1], 50),
        "is rewritten": lambda: os.utime(paths[1], (1, 1)), "vanishes": lambda: os.unlink(paths[1]),
        "becomes a link": lambda: (os.unlink(paths[1]), os.symlink(str(tmp_path), paths[1]))}

    def entries():
        yield paths[0], b"a"
        if change in ("vanishes", "becomes a link"):
            changes[change]()
        else:                       # between the look at its size and the first byte
            monkeypatch.setattr(cexec, "member_head", lambda *fields: (
                fields[0] == b"b" and changes[change](), head(*fields))[1])
        yield paths[1], b"b"
    head = cexec.member_head
    with tempfile.TemporaryFile() as file:
        with pytest.raises(OSError) as raised:
            cexec.pack_files(os.dup(file.fileno()), entries())
        assert raised.value.filename == paths[1]
        monkeypatch.undo()
        file.seek(0)
        with pytest.raises(cexec.ProtocolError):
            unpacked(file.read(), str(tmp_path / "in"))


def results_in(directory, names, part=".cexec.box-0.0123456789abcdef.part"):
    """What commit_all() gets: results that wait below a directory, which becomes the current one."""
    os.chdir(directory)
    os.mkdir(part)
    parents = {os.path.dirname(name) for name in names} - {""}
    parents |= {os.path.dirname(name) for name in parents} - {""}
    for name in sorted(parents):
        os.mkdir(os.path.join(part, name))
    for name in names:
        put(os.path.join(part, name), "new " + name)
    return part, [os.fsencode(name) for name in names], {os.fsencode(name): 0o755 for name in parents}, True


def contents(directory):
    """{name: data} of all files below a directory; None for an empty directory."""
    found = {}
    for place, directories, files in os.walk(directory):
        for name in files:
            found[os.path.relpath(os.path.join(place, name), directory)] = read(os.path.join(place, name)).decode()
        if not files and not directories:
            found[os.path.relpath(place, directory)] = None
    return found


@pytest.mark.parametrize("failing", range(6))
def test_a_rename_that_fails_is_undone(tmp_path, monkeypatch, failing):
    """What was there is there again, and what was not is not."""
    os.makedirs(str(tmp_path / "here" / "there"))
    for name in ("old", "there/old", "there/gone"):
        put(str(tmp_path / "here" / name), "as it was")
    before, back = contents(str(tmp_path / "here")), os.getcwd()
    names, done, rename = ["old", "a", "there/old", "there/b", "n/m/c"], [], os.rename

    def some(path, name):
        if b"there/gone" in (path, name) or name in map(os.fsencode, names):
            if len(done) == failing:
                done.append(None)
                raise OSError(errno.EIO, "no luck")
            done.append(name)
        rename(path, name)
    try:
        given = results_in(str(tmp_path / "here"), names)
        monkeypatch.setattr(os, "rename", some)
        with pytest.raises(OSError) as raised:
            cexec.commit_all(*given, old=[b"there/gone"])
        monkeypatch.undo()
        cexec.remove_directory(given[0])
        assert raised.value.filename == os.fsencode([*names, "there/gone"][failing])
        assert contents(str(tmp_path / "here")) == before
    finally:
        os.chdir(back)


def test_deep_directories_are_packed_and_unpacked(tmp_path):
    place = os.getcwd()
    os.makedirs(str(tmp_path / "from"))
    os.chdir(str(tmp_path / "from"))
    try:
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
        os.chdir(str(tmp_path / "from"))
        with tempfile.TemporaryFile() as file:
            cexec.pack_files(os.dup(file.fileno()), cexec.tree(b"d", b"d"))
            file.seek(0)
            assert len(unpacked(file.read(), str(tmp_path / "to"))[1]) == 1200
    finally:
        os.chdir(place)
        for name in ("from", "to"):
            cexec.remove_directory(str(tmp_path / name))


def test_results_that_wait_are_no_input(tmp_path, monkeypatch):
    """Another cexec in the same directory, on any host, may have some, which go while they are read."""
    monkeypatch.chdir(str(tmp_path))
    for name in (cexec.new_part(), ".cexec.other_host-1.0123456789abcdef.part"):
        os.makedirs("d/%s/x" % name)
        put("d/%s/x/y" % name, "1")
    put("d/.cexec", "1")
    names = [name for _, name in cexec.input_entries(map(cexec.Names().listing, [".", "d"]))]
    assert names == [b"d", b"d/.cexec"]


def test_only_this_hosts_own_unfinished_results_are_removed(tmp_path, monkeypatch):
    """Others' locks are not seen where a file system is shared, and what only looks alike is somebody else's."""
    need("root")
    monkeypatch.chdir(str(tmp_path))
    ours, anothers = cexec.new_part(), cexec.new_part()
    others = [anothers, ".cexec.otherhost-1.0123456789abcdef.part", ".cexec.notes.part",
              ours.replace(".part", ".part.part"), ours[:-6] + "x.part", ".cexec.%s.part" % ("0" * 16)]
    for name in [ours, *others]:
        os.makedirs(name + "/inside")
        if name == anothers:
            os.chown(name, 1, 1)
        os.utime(name, (1, 1))
    assert len(cexec.new_part()) < 120 and socket.gethostname()[:8] in ours
    cexec.check_current_directory()
    assert sorted(os.listdir(".")) == sorted(others)


def test_hosts_of_one_name_have_parts_of_their_own(monkeypatch):
    cexec.this_host.cache_clear()
    monkeypatch.setattr(cexec, "read_text", lambda path: "another machine")
    other = cexec.new_part()
    monkeypatch.undo()
    cexec.this_host.cache_clear()
    assert cexec.is_part(other) and not cexec.is_part(other, cexec.this_host())


def test_results_for_another_file_system(farm):
    """A directory here may be a mount, or a link to another disk; if that is full, nothing is kept."""
    need("root", "unshare", "mount")
    farm.serve()
    os.mkdir(os.path.join(farm.desk, "disk"))
    os.symlink("disk", os.path.join(farm.desk, "link"))
    script = 'mount -t tmpfs -o size=1m none "$0/disk" && cd "$0" && echo was > disk/a && "$@"; s=$?; ' \
             'find . -type f -exec grep -H ^ {} + | sort; find . -name ".cexec*"; exit $s'

    def work(command):
        words = farm.argv("cexec", "-n", "-g", "disk", "-g", "link/*", "-g", "z", farm.pub, "sh", "-c", command)
        return subprocess.run(["unshare", "-m", "sh", "-c", script, farm.desk, *words], env=farm.environment(),
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              timeout=PATIENCE)
    made = "mkdir -p disk/d link; echo 1 > disk/a; echo 2 > disk/d/b; echo 3 > link/c; echo 4 > z"
    done = work(made + "; head -c 2M /dev/zero > link/z")
    assert (done.returncode, done.stdout) == (111, b"./disk/a:was\n")
    assert done.stderr == b"cexec: link/z: No space left on device\n"
    done = work(made)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"./disk/a:1\n./disk/c:3\n./disk/d/b:2\n./z:4\n"


@pytest.mark.parametrize("pattern, said", [
    ("file/x", "file: there is something that is no directory"),
    ("file/x/*.o", "file: there is something that is no directory"),
    ("fifo", "fifo: there is something that is no regular file"),
    ("ro/x", "ro: cannot be written"), ("ro/*", "ro: cannot be written"), ("ro/in/x", None), ("ro/*/x", None),
    ("ro", None), ("fi*", None), ("file", None), ("new/x", None), ("dangling", None)])
def test_a_place_that_results_cannot_have(tmp_path, monkeypatch, pattern, said):
    """What can be known is known before."""
    monkeypatch.chdir(str(tmp_path))
    put("file", "x")
    os.mkfifo("fifo")
    os.makedirs("ro/in")
    os.symlink("nowhere", "dangling")
    access = os.access              # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != "ro" and access(path, mode))
    if said is None:
        cexec.check_current_directory([pattern])
    else:
        assert fatal(111, cexec.check_current_directory, [pattern]) == "-g: no results can be put here: " + said
    assert sorted(os.listdir(".")) == ["dangling", "fifo", "file", "ro"]


@pytest.fixture
def farm(cluster):
    """A worker whose jobs have directories, below farm.place; its client runs in farm.desk."""
    cluster.place, cluster.desk = cluster.path("place"), cluster.path("desk")
    for path in (cluster.place, cluster.desk):
        os.mkdir(path)
        os.chmod(path, 0o1777)
    os.chmod(cluster.directory, 0o755)
    cluster.env["TMPDIR"] = cluster.place
    cluster.serve = lambda *options, **rest: cluster.worker(*rest.pop("command", ()), options=["-ad", *options], **rest)
    cluster.work = lambda *words, **rest: cluster.do(cluster.argv("cexec", *words), cwd=cluster.desk, **rest)
    cluster.begin = lambda *words, **rest: cluster.start("cexec", *words, cwd=cluster.desk, stdin=subprocess.PIPE,
                                                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, **rest)
    return cluster


def in_desk(farm, name, data=b"x", mode=0o644):
    path = os.path.join(os.fsencode(farm.desk), os.fsencode(name))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
    os.chmod(path, mode)


def left(farm):
    """What is left of jobs: their directories, and results that wait."""
    return os.listdir(farm.place) + [name for name in os.listdir(farm.desk) if name.startswith(".cexec")]


def all_gone(farm):
    """A job's directory goes after its end: nothing is left of it then."""
    return until(lambda: left(farm) == [], "the removal of all") is not False


def test_files_go_into_a_jobs_directory_and_come_out(farm):
    farm.serve()
    odd = b"n\xff\n " + b"long" * 50
    in_desk(farm, "a", b"1")
    in_desk(farm, b"d/" + odd, b"2", 0o755)
    in_desk(farm, "d/e/ro", b"3", 0o400)
    os.mkdir(os.path.join(farm.desk, "d", "empty"))
    os.chmod(os.path.join(farm.desk, "d", "e"), 0o555)
    os.symlink("a", os.path.join(farm.desk, "link"))
    command = ('test "$PWD" = "$(pwd -P)" && stat -c "%a %F %n" . && find . ! -name . -printf "%P\\0" && '
               'cp -r d out && cat link')
    done = output(farm.work("-i", "a", "-i", "d", "-i", os.path.join(farm.desk, "link"), "-g", "out", farm.pub, "sh",
                            "-c", command))
    head, found = done[:-1].split(b"\n", 1)
    assert head == b"700 directory ."
    assert set(found.rstrip(b"\0").split(b"\0")) == {b"a", b"d", b"d/" + odd, b"d/e", b"d/e/ro", b"d/empty", b"link"}
    out = os.path.join(os.fsencode(farm.desk), b"out")
    assert read(os.path.join(out, odd)) == b"2" and read(os.path.join(out, b"e/ro")) == b"3"
    modes = [stat.S_IMODE(os.stat(os.path.join(out, name)).st_mode) for name in (odd, b"e/ro", b"e", b"empty")]
    assert modes == [0o755, 0o400, 0o555, 0o755] and all_gone(farm)


def test_the_searches_of_a_batch_are_one_client_in_line():
    line = cexec.Line()
    for number, batch in enumerate((cexec.NO_BATCH, cexec.NO_BATCH, b"b" * 8, b"b" * 8)):
        line.join(SimpleNamespace(name="a", nonce=bytes([number]) * 16, since=float(number), batch=batch))
    assert (len(line), line.clients()) == (4, 3)


def test_the_screen_asks_before_it_says_that_nobody_answers():
    watch = SimpleNamespace(workers={}, began=time.monotonic(), PATIENCE=100, pub=SimpleNamespace(label="app"))
    assert cexec.presence_text([watch]) == "now: asking which workers there are"
    watch.PATIENCE = -1
    assert cexec.presence_text([watch]) == "now: no worker answers (cexec -l app tells why)"


def test_a_load_that_is_not_of_our_jobs_is_explained(capsys, monkeypatch):
    said, row = [], {"address": "10.0.0.3", "slots": 2, "state": "serving"}
    monkeypatch.setattr(cexec.log, "tell_user", said.append)
    rows = [dict(row, host=host, load=load, running=running) for host, load, running in (
        ("idle", 5.8, 0), ("busy", 1.9, 2), ("quiet", 0.2, 0))]
    assert cexec.show_workers(SimpleNamespace(rows=lambda: rows, troubles=list), False) == 0
    assert len(said) == 1 and said[0].startswith("idle: LOAD is more than our jobs there: ")


def test_what_a_batch_says_that_is_done_or_interrupted():
    """The same command again does the rest, also if the results of -g show what is done."""
    for files, again in (({"results": ["{}.r"]}, True), ({"results": ["*.r"]}, False), ({}, False)):
        terms = cexec.BatchTerms([], (), "-", True, **files)
        tasks = [cexec.Task(terms, 1, ("a",), None)]
        tasks[0].note_outputs()
        batch = SimpleNamespace(terms=terms, tasks=tasks, force=False, done=0, done_before=0, printer=True,
                                total=lambda: "1")
        assert cexec.Batch.summary(batch) == "0 of 1 jobs are done" + "; the same command again does the rest" * again


def test_a_command_that_is_not_there_gets_a_hint(farm):
    """What the user may have meant."""
    farm.serve()
    in_desk(farm, "a.in")
    for words, hint in ((["ls | wc -l"], "write the arguments as words of their own, or use sh -c)"), (
                        ["-n", "ls"], "(options come before the public key)"), (
                        ["no-such"], "No such file or directory")):
        for mode, more in (([], []), (["-A"], []), (["-mn"], [":::", "1"])):
            done = farm.work(*mode, farm.pub, *words, *more)
            assert done.returncode == 127 and hint in done.stderr.decode(), done
    done = farm.work("-mn", farm.pub, "test", "-e", "{}", ":::", "a.in", "b.in")
    assert sorted(done.stderr.decode().splitlines()) == [
        line % NODE for line in (
            "cexec: 2 failed, 2 at %s: exit status 1 (2)", "cexec: a.in at %s: exit status 1 (a.in is here: "
            "-i {} takes it there, if the workers have directories for jobs)", "cexec: b.in at %s: exit status 1")]
    assert farm.work("-mn", "-i", "{}", farm.pub, "test", "!", "-e", "{}", ":::", "a.in").stderr.endswith(b"status 1\n")


@pytest.mark.parametrize("closed", [False, True])
def test_a_misspelt_command_under_u_is_not_found(farm, closed):
    """Though its user may not enter a directory of PATH."""
    need("root")
    os.makedirs(farm.path("closed"), 0o700)
    farm.worker(options=["-a", "-u", "nobody"], env={"PATH": os.environ["PATH"] + ":" + farm.path("closed")})
    if closed:
        put(farm.path("closed/misspelt"), "", 0o755)
    said = failed(farm.work("-n", farm.pub, "misspelt"), 126 if closed else 127).decode()
    assert said.endswith("misspelt: %s\n" % ("Permission denied" if closed else "No such file or directory"))


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}       # as Python 3.6 has it


@pytest.mark.parametrize("here", [{"LC_ALL": "C"}, {"LC_ALL": "C.UTF-8"}, {"LC_ALL": "POSIX"}, ASCII],
                         ids=["C", "UTF-8", "POSIX", "ASCII"])
@pytest.mark.parametrize("there", [{"LC_ALL": "C.UTF-8"}, ASCII], ids=["there UTF-8", "there ASCII"])
def test_names_that_are_no_text(farm, here, there):
    """In every locale, here and there: bytes as they are in the log, one form in messages, and the same results."""
    farm.serve(env=there)
    names, shown = [b"\xff\xfe", "gr\xf6\xdfe".encode(), b"a\tb\nc"], [r"\xff\xfe", "gr\xf6\xdfe", r"a\tb\nc"]
    done = farm.work("-mn", "--log", "log", farm.pub, "false", ":::", *names, env=here)
    assert done.returncode == 3
    assert sorted(done.stderr.decode().splitlines()[:-1]) == sorted(
        "cexec: %s at %s: exit status 1" % (name, NODE) for name in shown)
    rows = read(os.path.join(farm.desk, "log")).split(b"\n")[1:-1]
    assert {row.split(b"\t", 8)[8] for row in rows} == {*names[:2], rb"a\tb\nc"}
    for name, its in zip(names, shown):
        assert failed(farm.work("-i", name, farm.pub, "cat", env=here), 100) == (
            "cexec: -i: %s: No such file or directory\n" % its).encode()
        assert "cannot run its command: %s: No such" % its in failed(farm.work(farm.pub, name, env=here), 127).decode()
        assert "-g %s: nothing in" % its in failed(farm.work("-g", name, farm.pub, "true", env=here), 111).decode()
    output(farm.work("-g", "*", farm.pub, "touch", *names, env=here))
    output(farm.work("-g", "b/??", "-g", "[![:print:]]*", farm.pub, "sh", "-c", "mkdir b; touch b/\xe9 b/e \xff a",
                     env=here))
    assert set(os.listdir(os.fsencode(farm.desk))) == {b"log", b"b", b"\xc3\xbf", *names}
    assert os.listdir(os.path.join(os.fsencode(farm.desk), b"b")) == [b"\xc3\xa9"]


def test_ten_thousand_files_and_thirty_megabytes(farm):
    farm.serve()
    for number in range(10000):
        in_desk(farm, "many/%d" % number, b"%d" % number)
    in_desk(farm, "large", noise(30000000))
    output(farm.work("-n", "-i", "many", "-i", "large", "-g", "out", "-g", "l*2", farm.pub, "sh", "-c",
                     "mv many out; mv large large2"))
    assert read(os.path.join(farm.desk, "large2")) == noise(30000000)
    names = os.listdir(os.path.join(farm.desk, "out"))
    assert len(names) == 10000
    assert all(read(os.path.join(farm.desk, "out", name)) == name.encode() for name in names[::97])
    assert all_gone(farm)


def test_a_directory_is_the_users(farm):
    need("root")
    farm.serve("-u", "nobody")
    in_desk(farm, "a", b"1")
    done = farm.work("-n", "-i", "a", "-g", "b", farm.pub, "sh", "-c", "stat -c %U . a; cp a b; chmod 0 .")
    assert (done.returncode, done.stdout, done.stderr[:48]) == (
        111, b"nobody\nnobody\n", b"cexec: worker %s cannot send results: Per" % NODE.encode())
    done = farm.work("-n", "-i", "a", "-g", "b", farm.pub,
                     "sh", "-c", "cp a b; chmod 4711 b; mkdir r; touch r/x; chmod 0 r")
    assert (done.returncode, done.stderr) == (0, b"") and all_gone(farm)
    assert stat.S_IMODE(os.stat(os.path.join(farm.desk, "b")).st_mode) == 0o711


def test_more_holes_than_a_reader_keeps_are_refused(tmp_path):
    pieces = [(4096 * number, 1) for number in range(2 * cexec.PIECES_MAX)]
    data = head_with_holes(pieces, 4096 * len(pieces)) + bytes(20480) + END
    with pytest.raises(cexec.ProtocolError, match="impossible holes"):
        unpacked(data, str(tmp_path / "in"))


def test_modes_and_times_of_files_are_kept(farm):
    """Whatever the worker's umask is, and before 1970."""
    launch = farm.launch
    farm.launch = ["sh", "-c", 'umask 077; exec "$0" "$@"'] + launch
    farm.serve()
    farm.launch = launch
    in_desk(farm, "d/a", b"1", 0o777)
    in_desk(farm, "e/b", b"1", 0o666)
    os.chmod(os.path.join(farm.desk, "d"), 0o775)
    os.utime(os.path.join(farm.desk, "d/a"), (-86400.5, -86400.5))
    done = farm.work("-n", "-i", "d", "-i", "e/b", "-g", "c", farm.pub, "sh", "-c",
                     "stat -c '%a %Y' d/a; stat -c %a d e/b e .; touch c; chmod 751 c")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"777 -86401\n775\n666\n700\n700\n", b"")
    assert stat.S_IMODE(os.stat(os.path.join(farm.desk, "c")).st_mode) == 0o751


def test_a_worker_without_directories(farm):
    worker = farm.worker("touch", farm.path("ran"), options=["-a"])
    for words in (["-i", "/etc/passwd"], ["-g", "x"]):
        done = farm.work("-n", *words, farm.pub)
        assert done.returncode == 100 and done.stderr == (
            b"cexec: worker %s has no directory for the files of -i and -g (cservice -d)\n" % NODE.encode())
    assert not os.path.exists(farm.path("ran")) and b"supervisor" not in read(worker.log)


@pytest.mark.parametrize("command, status, said", [
    ("echo 1 > a; echo 2 > b; exit 3", 3, b""),
    ("echo 1 > a; kill -9 $$", 137, b""),
    ("echo 1 > a", 111, b"cexec: -g b: nothing in the job's directory matches\n"),
    ("echo 1 > a; mkfifo b", 111,
     b"cexec: worker %s cannot send results: b: neither a regular file nor a directory\n" % NODE.encode()),
    ("echo 1 > a; ln -s / b", 111, b"cexec: worker %s cannot send results: b: a link to a directory\n" % NODE.encode()),
    ("echo 1 > a; echo 2 > b; echo 3 > there", 111, b"cexec: there: there is something that is no regular file\n")])
def test_all_results_come_or_none(farm, command, status, said):
    farm.serve()
    os.mkdir(os.path.join(farm.desk, "there"))
    output(farm.work("-n", "-g", "a", "-g", "b", "-g", "there*" if "there" in command else "b", farm.pub, "sh", "-c",
                     command), status, said)
    assert os.listdir(farm.desk) == ["there"] and all_gone(farm)


@pytest.mark.parametrize("where", ["read-only", "gone", "a file"])
def test_no_job_runs_whose_results_have_no_place(farm, where):
    need("root", "unshare", "mount")
    farm.serve()
    in_desk(farm, "d")
    script = {"read-only": 'mount -t tmpfs -o ro none "$0" && cd "$0" && exec "$@"',
              "gone": 'mkdir "$0/gone" && cd "$0/gone" && rmdir "$0/gone" && exec "$@"',
              "a file": 'cd "$0" && exec "$@"'}[where]
    said = {"read-only": "the current directory: Read-only file system", "gone":
            "the current directory: No such file or directory", "a file": "d: there is something that is no directory"}
    for words in ([], ["-m"]):
        words = farm.argv("cexec", "-n", *words, "-g", "d/x", farm.pub, "touch", farm.path("ran"),
                          *(["--", "1"] if words else []))
        done = subprocess.run(["unshare", "-m", "sh", "-c", script, farm.desk, *words], env=farm.environment(),
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              timeout=PATIENCE)
        old = where == "gone" and "the current directory was removed" in done.stderr.decode()   # Python 3.13.0
        assert (old or said[where] in done.stderr.decode()) and done.returncode == (
            1 if "-m" in words and where == "a file" else 111), done
    assert not os.path.exists(farm.path("ran")) and all_gone(farm)


def test_a_lost_jobs_large_directory_does_not_stop_the_worker(farm):
    """A child removes it: it is stopped here, and the worker goes on; its slot is free only when it is over."""
    worker = farm.serve(env={"CONCURRENCY": "2"})
    client = farm.begin("-n", farm.pub, "sh", "-c", "seq 8000 | xargs mkdir; touch began; exec sleep 1000")
    until(lambda: glob.glob(farm.place + "/*/began"), "its start")
    supervisor, = children_of(worker.pid)
    os.kill(supervisor, signal.SIGKILL)
    client.wait(PATIENCE)
    remover = []

    def caught():
        remover[:] = [pid for pid in children_of(worker.pid) if pid != supervisor]
        return remover
    deadline = time.monotonic() + PATIENCE
    while not caught() and time.monotonic() < deadline:
        pass                        # not until(): that sleeps for longer than the removal takes
    os.kill(remover[0], signal.SIGSTOP)
    if os.listdir(farm.place):
        done = farm.work("-n", farm.pub, "sh", "-c", "echo $CEXEC_SLOT")
        assert (done.returncode, done.stdout) == (0, b"1\n")
    os.kill(remover[0], signal.SIGCONT)
    until(lambda: left(farm) == [] and not children_of(worker.pid), "the removal")
    assert farm.work("-n", farm.pub, "sh", "-c", "echo $CEXEC_SLOT").stdout == b"0\n"
    assert b"cannot be removed" not in read(worker.log)


@pytest.mark.parametrize("room", range(12))
@pytest.mark.parametrize("listings", [[], [(b"/nowhere", b"x", b"", 0)]])
@pytest.mark.parametrize("patterns", [[], [b"*"]])
def test_files_of_a_job_are_all_closed_if_descriptors_run_out(tmp_path, monkeypatch, room, listings, patterns):
    monkeypatch.chdir(tmp_path)
    holder, (reader, writer) = Holder(cexec.Loop()), os.pipe()
    holder.loop.on_leave(writer, lambda: None)          # so the loop's own epoll is open before
    with few_descriptors(room), contextlib.suppress(OSError):
        cexec.JobFiles(holder, list(itertools.starmap(cexec.Listing, listings)), patterns, lambda: None).wait()
    assert not cexec.at_end and os.listdir(str(tmp_path)) == []
    close_all(reader, writer)


@pytest.mark.parametrize("words", [["-i", "a"], ["-g", "*.r"]])
def test_without_a_process_for_its_files_a_job_fails(farm, words):
    """And nothing is left of it here: neither a process nor an unfinished output."""
    altered(farm, ("        pid = os.fork()\n",
                   '        pid = os.open("none", os.O_RDONLY) if os.path.exists("no-fork") else os.fork()\n'))
    farm.serve()
    for name in ("a", "b", "no-fork"):
        in_desk(farm, name)
    said = b"the files of -i and -g: No such file or directory"
    assert ended(farm.work(*words, farm.pub, "cat")) == (111, b"", b"cexec: %s\n" % said)
    batch = ["-m", "-o", "{}.out", *words, farm.pub, "sh", "-c", "cat; touch $PEER_FILE.r", "--", "a", "b"]
    done = farm.work(*batch)
    assert (done.returncode, sorted(done.stderr.splitlines())) == (2, [b"cexec: a: " + said, b"cexec: b: " + said])
    assert sorted(os.listdir(farm.desk)) == ["a", "b", "no-fork"]
    os.unlink(os.path.join(farm.desk, "no-fork"))
    assert farm.work(*batch).returncode == 0


def test_a_command_may_remove_its_own_directory(farm):
    worker = farm.serve()
    done = farm.work("-n", farm.pub, "sh", "-c", 'cd / && rmdir "$OLDPWD"')
    assert (done.returncode, done.stderr) == (0, b"") and all_gone(farm)
    assert b"cannot be removed" not in read(worker.log)


def test_what_cannot_be_sent(farm):
    """What is not there is said at once; the command is not started for half of its files."""
    farm.serve()
    done = farm.work("-n", "-i", "nix", farm.pub, "touch", farm.path("ran"))
    assert (done.returncode, done.stderr) == (100, b"cexec: -i: nix: No such file or directory\n")
    in_desk(farm, "d/a")
    os.mkfifo(os.path.join(farm.desk, "d", "z"))
    done = farm.work("-n", "-i", "d", farm.pub, "touch", farm.path("ran"))
    assert done.returncode == 111 and done.stderr.endswith(b"d/z: neither a regular file nor a directory\n")
    os.mkdir(os.path.join(farm.desk, "e"))
    in_desk(farm, "e/a")
    done = farm.work("-n", "-i", os.path.join(farm.desk, "d/a"), "-i", "../desk/e/a", farm.pub,
                     "touch", farm.path("ran"))
    assert done.returncode == 100 and done.stderr.endswith(b"desk/e/a have the same name at the worker, a\n")
    assert not os.path.exists(farm.path("ran")) and all_gone(farm)


@pytest.mark.parametrize("what", sorted(HOSTILE))
def test_a_hostile_clients_archive_starts_nothing(farm, what):
    worker = farm.serve(command=["touch", farm.path("ran")])
    with Asker(farm) as asker, asker.offer() as peer:
        assert peer.hello.options & cexec.HELLO_DIRECTORIES
        peer.send(cexec.AUTH, proof=asker.proof(peer))
        peer.send(cexec.JOB, descriptors=[(cexec.FILES_IN, cexec.FILES_IN, cexec.FLAG_INPUT | cexec.FLAG_FILES)])
        peer.expect(cexec.ACCEPT)
        peer.send(cexec.GO)
        if HOSTILE[what]:
            peer.raw(data_frame(cexec.FILES_IN, HOSTILE[what]))
        peer.send(cexec.EOF, cexec.FILES_IN, cexec.FLAG_WHOLE)
        kind, payload = peer.next()
        while kind is not cexec.EXIT:
            kind, payload = peer.next()
        assert (payload.how, payload.status) == (cexec.HOW_NOT_STARTED, 126) and "job's directory" in payload.reason
    until(lambda: left(farm) == [], "its removal")
    assert not os.path.exists(farm.path("ran")) and os.listdir(farm.directory).count("x") == 0
    assert b"Traceback" not in read(worker.log)


@pytest.mark.parametrize("what", sorted(HOSTILE) + ["not asked for"])
def test_a_hostile_workers_archive_leaves_nothing(farm, what):
    key, port = cexec.open_key(farm.key), free_port()
    data = dict(HOSTILE, **{"not asked for": packed((b"x1", b"1"), (b".bashrc", b"2")) + END})[what]
    with Ear(port) as ear:
        client = farm.start("cexec", "-n", "-g", "x*", farm.pub, cwd=farm.desk, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, env={"GROUP": "127.255.255.255:%d" % port})
        announced, address = ear.wait_for(cexec.ANNOUNCE)
        with play_worker(announced, address, key, options=cexec.HELLO_DIRECTORIES) as peer:
            peer.expect(cexec.AUTH)
            job = peer.expect(cexec.JOB)
            assert job.patterns == [b"x*"]
            peer.send(cexec.ACCEPT)
            peer.expect(cexec.GO)
            if data:
                peer.raw(data_frame(cexec.FILES_OUT, data))
            for channel in (1, 2, cexec.FILES_OUT):
                peer.send(cexec.EOF, channel, cexec.FLAG_WHOLE)
            peer.send(cexec.EXIT, how=cexec.HOW_EXITED, status=0, channels=[
                (0, 0, 0), (1, 0, 0), (2, 0, 0), (cexec.FILES_OUT, len(data), 0)])
            assert client.wait(PATIENCE) == 111
        assert client.stderr.read().count(b"\n") == 1
    assert os.listdir(farm.desk) == [] and not os.path.exists(os.path.join(farm.directory, "x"))


def phases(farm, phase):
    """A job that hangs in a phase: its client."""
    farm.worker_of_job = farm.serve()
    if phase == "filling":          # the client's packer has more than fits, and its client is stopped
        in_desk(farm, "large", bytes(80000000))
    command = {"filling": "true", "running": "touch began; sleep 1000",
               "fetching": "head -c 300M /dev/zero > big"}[phase]
    client = farm.begin("-n", "-i", "large" if phase == "filling" else "/etc/passwd", "-g", "b*", farm.pub,
                        "sh", "-c", command)
    if phase == "running":
        until(lambda: glob.glob(farm.place + "/*/began"), "its start")
    elif phase == "filling":
        until(lambda: glob.glob(farm.place + "/*/large"), "its files")
    else:
        until(lambda: glob.glob(farm.desk + "/.cexec.*.part/big"), "its results")
    return client


@HEAVY
@pytest.mark.parametrize("phase", ["filling", "running", "fetching"])
@pytest.mark.parametrize("victim", ["client", "supervisor", "both"])
def test_kills_leave_no_directory(farm, phase, victim):
    client = phases(farm, phase)
    supervisors = children_of(farm.worker_of_job.pid)
    if victim in ("client", "both"):
        client.kill()
    if victim in ("supervisor", "both"):
        for pid in supervisors:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    client.wait(PATIENCE)
    until(lambda: left(farm) == [], "their removal", 20)
    until(lambda: not children_of(farm.worker_of_job.pid), "the end of all")
    assert not os.path.exists(os.path.join(farm.desk, "big"))


def test_the_directory_of_a_job_that_outlives_its_cservice(farm):
    client = phases(farm, "running")
    signalled(farm.worker_of_job, signal.SIGKILL)
    assert len(left(farm)) == 2                 # the supervisor lives on
    signalled(client)
    until(lambda: left(farm) == [], "its removal")


def test_what_a_crash_has_left_goes_at_the_next_start(farm):
    client = phases(farm, "running")
    supervisor, = children_of(farm.worker_of_job.pid)
    farm.worker_of_job.kill()
    os.kill(supervisor, signal.SIGKILL)
    farm.worker_of_job.wait()
    client.wait(PATIENCE)
    path, = (os.path.join(farm.place, name) for name in os.listdir(farm.place))
    for pid in farm.alive():
        if read("/proc/%d/comm" % pid) == b"sleep\n":
            os.kill(pid, signal.SIGKILL)
    worker = farm.serve()
    until(lambda: not children_of(worker.pid), "the first look")
    assert os.path.exists(path)                 # too new to be sure
    os.utime(path, (1, 1))
    farm.serve()
    until(lambda: not os.path.exists(path), "its removal")


def test_what_a_crash_has_left_just_now_goes_a_little_later(farm):
    """As when cservice is started again at once."""
    altered(farm, OLD_SECONDS=2.0)
    os.mkdir(os.path.join(farm.place, "cexec.0123456789abcdef"))
    farm.serve()
    until(lambda: left(farm) == [], "its removal")


def waiting_job(farm, asker, *arguments):
    """A job whose directory is made, and which is not started: (its peer, the directory)."""
    before = set(os.listdir(farm.place))
    peer = asker.offer()
    peer.send(cexec.AUTH, proof=asker.proof(peer))
    fields = filled(cexec.JOB, descriptors=[])
    peer.send(cexec.JOB, environment=[], arguments=list(arguments), **{
        name: value for name, value in fields.items() if name not in ("variables", "arguments", "patterns")})
    peer.expect(cexec.ACCEPT)
    name, = set(os.listdir(farm.place)) - before
    return peer, os.path.join(farm.place, name)


@pytest.mark.parametrize("options", [[], ["-u", "nobody"]])
@pytest.mark.parametrize("change", ["a link", "chmod 0", None])
def test_the_command_enters_its_directory_and_nothing_else(farm, options, change):
    """Not what the user has put at its path, and with the user's rights."""
    need("root")
    farm.serve(*options)
    private, moved = farm.path("private"), farm.path("moved")
    os.mkdir(private, 0o700)
    with Asker(farm) as asker:
        peer, path = waiting_job(farm, asker, b"touch", b"here")
        with peer:
            if change == "chmod 0":
                os.chmod(path, 0)
            else:
                os.rename(path, moved)
            if change == "a link":
                os.symlink(private, path)
            peer.send(cexec.GO)
            kind, payload = peer.next()
            while kind is not cexec.EXIT:
                kind, payload = peer.next()
    if change == "chmod 0" and options:
        assert (payload.how, payload.status, payload.reason) == (
            cexec.HOW_HOST_FAILED, 126, "touch: the job's directory: Permission denied")
    else:
        assert (payload.how, payload.status) == (cexec.HOW_EXITED, 0)
    assert os.listdir(private) == []
    if change != "chmod 0":
        assert os.listdir(moved) == ["here"]


def test_a_command_that_is_stopped_before_its_exec_holds_no_slot(farm):
    """By another process of its user, which can do that as soon as the child has this user's rights."""
    need("root")
    become = "                become(user)\n"
    altered(farm, (become, become + "                os.kill(os.getpid(), signal.SIGSTOP)\n"))
    worker = farm.serve("-u", "nobody")
    assert farm.work("-n", farm.pub, "echo").returncode == 128 + 9
    assert all_gone(farm)
    until(lambda: not children_of(worker.pid), "the end of all")


def test_the_users_rights_remove_what_a_job_has_left(farm):
    """Files of others, which the job could move to its directory, stay, and are named once."""
    need("root")
    worker = farm.serve("-u", "nobody")
    victim = os.path.join(farm.place, "shared/victim")
    os.makedirs(victim + "/private")
    put(victim + "/private/thesis", "x")
    for name, mode in (("", 0o777), ("/private", 0o700)):
        os.chmod(victim + name, mode)
        os.chown(victim + name, 1, 1)
    os.chmod(os.path.dirname(victim), 0o777)
    script = 'mkdir -p a/b; mv ../shared/victim a/b; touch c; mkdir -p e/f; chmod 0 e/f e; ln -s ../shared d'
    output(farm.work("-n", farm.pub, "sh", "-c", script))
    until(lambda: b"removed" in read(worker.log), "the message")
    place, = set(left(farm)) - {"shared"}
    assert contents(os.path.join(farm.place, place)) == {"a/b/victim/private/thesis": "x"}
    lines = [line for line in read(worker.log).decode().splitlines() if "removed" in line]
    assert len(lines) == 1 and lines[0].endswith(
        "/%s: cannot be removed: a/b/victim/private: Permission denied" % place), lines
    shutil.rmtree(farm.place)


def test_a_directory_of_the_job_that_is_another_disk_stays(farm):
    need("root", "mount")
    worker = farm.serve()
    script = "mkdir -p a/b; touch a/c; mount -t tmpfs none a/b && touch a/b/kept"
    output(farm.work("-n", farm.pub, "sh", "-c", script))
    until(lambda: b"a/b: another disk is mounted there" in read(worker.log), "the message")
    kept, = glob.glob(farm.place + "/*/a/b/kept")
    assert os.listdir(os.path.dirname(os.path.dirname(kept))) == ["b"]
    subprocess.run(["umount", os.path.dirname(kept)], check=True)
    shutil.rmtree(os.path.dirname(os.path.dirname(os.path.dirname(kept))))


def test_only_directories_of_a_cservice_are_removed_at_the_next_start(farm):
    """Those of its own user; others have names that look alike."""
    need("root")
    names = ["cexec.0123456789abcdef", "cexec.0123456789abcde0", "cexec.0123456789abcde1", "cexec.benchmarks-2026b",
             "cexec.0123456789ABCDEF", "cexec.0123456789abcdef0", "cexec.0123456789abcde2"]
    for name in names:
        path = os.path.join(farm.place, name)
        os.makedirs(path + "/inside")
        os.chown(path + "/inside", 65534, 65534)
        if name != names[1]:        # that is root's
            os.chown(path, 65534, 65534)
        os.utime(path, (2 ** 32, 2 ** 32) if name == names[6] else (1, 1))      # a command may set any time
    lock = os.open(os.path.join(farm.place, names[2]), os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    worker = farm.serve("-u", "nobody")
    until(lambda: names[0] not in os.listdir(farm.place) and not children_of(worker.pid), "its removal")
    os.close(lock)
    assert set(left(farm)) == set(names[1:6])


def test_the_removal_of_what_a_crash_has_left_delays_nothing(farm):
    gate = farm.path("gate")
    os.mkfifo(gate)
    altered(farm, ("        remove_left(self.fd, is_job_directory, self.user)\n", "        open(%r).close()\n" % gate))
    worker = farm.serve()
    assert farm.work("-n", farm.pub, "echo", "served").stdout == b"served\n"
    assert len(children_of(worker.pid)) >= 1
    signalled(worker, signal.SIGTERM)
    assert worker.wait(PATIENCE) == 0 and not children_of(worker.pid)


def test_a_job_is_over_before_its_directory_is_removed(farm):
    """The slot is free only after that; a worker that is to end removes it first."""
    gate = farm.path("gate")
    os.mkfifo(gate)
    altered(farm, ("            remove_directory(name, self.fd, self.user)\n",
                   "            open(%r).close()\n            remove_directory(name, self.fd, self.user)\n" % gate))
    worker = farm.serve(env={"CONCURRENCY": "2"})
    assert farm.work("-n", farm.pub, "sh", "-c", "touch x; echo $CEXEC_SLOT").stdout == b"0\n"
    assert len(left(farm)) == 1
    assert farm.work("-n", farm.pub, "sh", "-c", "echo $CEXEC_SLOT").stdout == b"1\n"
    until(lambda: len(left(farm)) == 1, "the removal of what is empty, without a process")
    worker.send_signal(signal.SIGTERM)
    until(lambda: b"draining" in read(worker.log), "the signal")
    assert worker.poll() is None
    with open(gate, "w"):
        pass
    assert worker.wait(PATIENCE) == 0 and left(farm) == []


def test_a_slow_disk_stops_no_more_than_the_files_of_its_job(tmp_path, monkeypatch):
    """JobFiles.close() does not wait, only the end of the process does."""
    gate = str(tmp_path / "gate")
    os.mkfifo(gate)

    def stuck(writer, entries):
        select.select([os.open(gate, os.O_RDONLY | os.O_NONBLOCK)], [], [], PATIENCE)
        with open(gate, "rb") as file:
            file.read(1)
    monkeypatch.setattr(cexec, "pack_files", stuck)
    holder = Holder(cexec.Loop())
    files = cexec.JobFiles(holder, [(b"/nowhere", b"x")], [], lambda: None)
    helper, = files.helpers
    with open(os.open(gate, os.O_RDWR), "wb", 0) as file:
        files.close()
        assert files.helpers == [helper] and cexec.is_running(helper.pid) and cexec.at_end == [files.end]
        file.write(b"12")
        files.wait()
    assert files.helpers == [] and cexec.at_end == []


@pytest.mark.parametrize("phase", ["filling", "running"])
def test_a_signal_ends_a_job_in_each_phase(farm, phase):
    farm.serve()
    with Asker(farm) as asker, asker.offer() as peer:
        peer.send(cexec.AUTH, proof=asker.proof(peer))
        peer.send(cexec.JOB, environment=[], arguments=[b"sleep", b"1000"],
                  **{key: value for key, value in filled(cexec.JOB, descriptors=[
                      (cexec.FILES_IN, cexec.FILES_IN, cexec.FLAG_INPUT | cexec.FLAG_FILES)]).items()
                     if key not in ("variables", "arguments", "patterns")})
        peer.expect(cexec.ACCEPT)
        peer.send(cexec.GO)
        if phase == "running":
            peer.raw(data_frame(cexec.FILES_IN, packed((b"x", b"1")) + END))
            peer.send(cexec.EOF, cexec.FILES_IN, cexec.FLAG_WHOLE)
            until(lambda: glob.glob(farm.place + "/*/x") and any(
                read("/proc/%d/comm" % pid) == b"sleep\n" for pid in farm.alive()), "its start")
        peer.send(cexec.SIGNAL, signal="TERM")
        kind, payload = peer.next()
        while kind is not cexec.EXIT:
            kind, payload = peer.next()
        assert (payload.how, payload.status) == (cexec.HOW_SIGNALLED, 15)
    until(lambda: left(farm) == [], "its removal")


@pytest.mark.parametrize("name", ["USR1", "USR2"])
def test_a_signal_without_a_command_yet_does_what_it_does_by_default(farm, name):
    farm.serve()
    with Asker(farm) as asker:
        peer = asker.begin(environment=[], **{key: value for key, value in filled(cexec.JOB, descriptors=[
            (cexec.FILES_IN, cexec.FILES_IN, cexec.FLAG_INPUT | cexec.FLAG_FILES)]).items()
            if key not in ("variables", "arguments", "patterns")}, arguments=[b"true"])
        with peer:
            peer.send(cexec.SIGNAL, signal=name)
            found = peer.next()
            while found and found[0] is not cexec.EXIT:
                found = peer.next()
            assert (found[1].how, found[1].status) == (cexec.HOW_SIGNALLED, getattr(signal, "SIG" + name))


@pytest.mark.parametrize("pattern", [b"", b"/etc/passwd", b"a//b", b"a/", b"../x", b"a/./b", b".", b"a/.."])
def test_an_impossible_pattern_is_a_violation(pattern):
    words = cexec.Words()
    words.add(pattern + b"\0")
    rows = [(cexec.FILES_OUT, cexec.FILES_OUT, cexec.FLAG_OUTPUT | cexec.FLAG_FILES)]
    job = SimpleNamespace(**dict(filled(cexec.JOB), variables=0, arguments=0, patterns=1, term="", modes=[],
                                 descriptors=rows))
    with pytest.raises(cexec.ProtocolError, match="impossible pattern"):
        cexec.check_job(job, words, cexec.HELLO_DIRECTORIES)


@pytest.mark.parametrize("where", ["there", "here"])
def test_a_full_disk_for_files(farm, where):
    need("root", "unshare", "mount")
    in_desk(farm, "in", bytes(3000000))
    small = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m none "$0" && cd "$1" && shift && exec "$@"']
    if where == "there":
        farm.launch = [*small, farm.place, farm.directory] + farm.launch
    farm.serve()
    farm.launch = farm.launch[-len([PYTHON, *BOOT, PROGRAM]):]
    if where == "there":
        done = farm.work("-n", "-i", "in", farm.pub, "touch", farm.path("ran"))
        assert done.returncode == 126 and done.stderr == (
            b"cexec: worker %s cannot run its command: touch: the job's directory: in: "
            b"No space left on device\n" % NODE.encode())
    else:
        words = farm.argv("cexec", "-n", "-g", "out", "-g", "a", farm.pub,
                          "sh", "-c", "head -c 3M /dev/zero > out; echo 1 > a")
        output(farm.do([*small, farm.desk, farm.desk, *words]), 111, b"cexec: out: No space left on device\n")
    assert not os.path.exists(farm.path("ran")) and all_gone(farm)


def test_files_of_a_lost_job_are_sent_again(farm):
    farm.serve()
    in_desk(farm, "a", b"1")
    lost = farm.path("lost")
    farm.serve()
    done = farm.work("-n", "-r", "-i", "a", "-g", "b", farm.pub, "sh", "-c",
                     'test -e "$0" || { touch "$0"; cp a b; kill -KILL $PPID; sleep 1000; }; cp a b', lost)
    assert (done.returncode, read(os.path.join(farm.desk, "b"))) == (0, b"1")
    until(lambda: left(farm) == [], "the removal", 20)


def test_a_batch_with_files_that_is_taken_up_again(farm):
    farm.serve(env={"CONCURRENCY": "2"})
    names = ["d/f %d[1].in" % number for number in range(6)]
    for name in names:
        in_desk(farm, name, name.encode())
    in_desk(farm, "common", b"+")
    words = ["-m", "-n", "-i", "{}", "-i", "common", "-g", "{/.}.out", "-g", "{/.}.*.log", farm.pub,
             "sh", "-c", 'cat "$1" common > "$2.out"; echo x > "$2.x.log"; echo "$3"', "sh", "{}", "{/.}", "{.}",
             "--", *names]
    done = farm.work(*words)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().splitlines() == [name[:-3] for name in names]
    assert all(read(os.path.join(farm.desk, name[2:-3] + ".out")) == name.encode() + b"+" for name in names)
    assert farm.work(*words).stdout == b""                      # all is done
    in_desk(farm, names[2], b"new")
    done = farm.work(*words)
    assert (done.stdout.decode().splitlines(), done.stderr) == ([names[2][:-3]], b"")
    assert read(os.path.join(farm.desk, names[2][2:-3] + ".out")) == b"new+"
    in_desk(farm, "common", b"-")
    assert len(farm.work(*words).stdout.splitlines()) == 6 and all_gone(farm)


def test_a_batch_sends_nothing_that_it_writes(farm):
    """With -i of the current directory: neither outputs, finished or not, nor errors, the log and standard output.

    And nothing that comes later; the same command again has nothing to do, what is written counts as no input.
    """
    farm.serve(env={"CONCURRENCY": "3"})
    for name in ("1.txt", "2.txt", "3.txt", "sub/x", "sub/2.png", "old.out", "err/notes"):
        in_desk(farm, name)
    os.symlink("1.out", os.path.join(farm.desk, "link.out"))
    words = ["-m", "-i", ".", "-o", "{.}.out", "-g", "sub/{/.}.png", "-g", "new/{/.}", "--errors", "err",
             "--log", "log", farm.pub, "sh", "-c",
             'find . -type f | sort; mkdir -p new sub; echo > "sub/$1.png"; echo > "new/$1"; '
             "head -c 3000000 /dev/zero | tr '\\0' '\\n'; echo oh >&2", "sh", "{/.}", "--", "1.txt", "2.txt", "3.txt"]
    given = "./1.txt ./2.txt ./3.txt ./err/notes ./old.out ./sub/x".split()
    for again in (0, 1):
        with open(os.path.join(farm.desk, "stdout"), "wb") as stdout:
            done = farm.do(farm.argv("cexec", *words[:1], *["-f"] * again, *words[1:]), cwd=farm.desk, stdout=stdout)
        assert (done.returncode, done.stderr) == (0, b"")
        for number in "123":
            assert read(os.path.join(farm.desk, number + ".out")).decode().split() == given
    assert farm.work(*words[:1], "--dry-run", *words[1:]).stdout == b""


def test_private_keys_are_not_sent(farm):
    """What lies in a directory is left out, and said once; another's key and a public key are only files."""
    farm.serve(env={"CONCURRENCY": "2"})
    other = read(farm.key).replace(b"BEGIN CERT", b"BEGIN OTHER").replace(b"END CERT", b"END OTHER")
    for name, data in {"d/akey": read(farm.key), "d/e/key": b"my key:\r\n" + read(farm.key), "d/x": b"x",
                       "d/other": other, "d/pub": read(farm.pub)}.items():
        in_desk(farm, name, data)
    command = [farm.pub, "sh", "-c", "find . -type f | sort"]
    said = b"cexec: -i: d/akey and 1 more: private keys are not sent\n"
    found = b"./d/other\n./d/pub\n./d/x\n"
    assert ended(farm.work("-n", "-i", "d", *command)) == (0, found, said)
    assert ended(farm.work("-mn", "-i", "d", *command, "--", "1", "2")) == (0, found * 2, said)
    assert ended(farm.work("-mn", "-i", "{}", *command, "--", "d", "d")) == (0, found * 2, said)


def test_what_is_sent_is_what_was_there_when_the_batch_began(farm):
    farm.serve(env={"CONCURRENCY": "1"})
    in_desk(farm, "d/a")
    done = farm.work("-mn", "-i", "d", "-g", "d/*.new", farm.pub, "sh", "-c", "ls d; touch d/$1.new", "sh", "{}",
                     "--", "1", "2", "3")
    assert ended(done) == (0, b"a\n" * 3, b"") and sorted(os.listdir(os.path.join(farm.desk, "d"))) == [
        "1.new", "2.new", "3.new", "a"]


def test_a_batch_whose_results_clash_is_refused(farm):
    in_desk(farm, "a")
    in_desk(farm, "d/a")
    done = farm.work("-m", "-n", "-i", "{}", "-g", "{/}.out", farm.pub, "--", "a", "d/a")
    assert done.returncode == 100 and b"-g a.out: a and d/a would both be written to a.out" in done.stderr


@pytest.mark.parametrize("options, command, said", [
    (["-g", "*.png"], "echo $1 > plot.png", "-g plot.png: one and two would both be written to plot.png"),
    (["-g", "d/*"], "mkdir d; echo $1 > d/res; echo > d/$1",
     "-g d/res: one and two would both be written to d/res"),
    (["-g", "*/"], "mkdir -p d/e; echo $1 > d/e/res", "-g d/e/res: one and two would both be written to d/e/res"),
    (["-f", "-g", "old/*"], "mkdir old; echo $1 > old/res", "-g old/res: one and two would both be written to old/res"),
    (["-g", "l*"], "mkdir link$1; echo $1 > link$1/x", "-g linktwo/x: one and two would both be written to linktwo/x"),
    (["-o", "o/{}", "-g", "o/*"], "mkdir o; [ $1 = one ] && echo > o/y || echo $1 > o/one",
     "-g o/one: one and two would both be written to o/one"),
    (["-o", "o/{}", "-g", "**/.*.part"], "mkdir o; [ $1 = one ] && echo > o/.x.part || echo > o/.one.part",
     "-g o/.one.part: one and two would both be written to o/.one.part"),
    (["-g", "{}.d", "-g", "*.d/*"], "mkdir -p one.d $1.d; echo > $1.d/1; echo > one.d/$1",
     "-g one.d/two: it would be in one.d, a result of one"),
    (["-g", "*.log", "--log", "x.log"], "[ $1 = one ] && echo > y.log || echo > x.log",
     "-g x.log: --log and two would both be written to x.log"),
    (["-g", "e/*", "--errors", "e"], "mkdir e; [ $1 = one ] && echo > e/x || echo > e/1",
     "-g e/1: --errors and two would both be written to e/1")])
def test_results_that_a_wildcard_brings_replace_nothing_of_the_batch(farm, options, command, said):
    """Each job names both, and the first keeps all of its own; what an earlier run has left may be replaced."""
    farm.serve(env={"CONCURRENCY": "1"})
    in_desk(farm, "old/res", b"old")
    os.mkdir(os.path.join(farm.desk, "o"))
    os.mkdir(os.path.join(farm.desk, "linkone"))
    os.symlink("linkone", os.path.join(farm.desk, "linktwo"))
    done = farm.work("-mn", "-j", "1", *options, farm.pub, "sh", "-c", command, "sh", "{}", "--", "one", "two")
    assert (done.returncode, done.stderr.decode()) == (1, "cexec: two: %s\n" % said)
    found = contents(farm.desk)
    for name in "plot.png", "d/res", "d/e/res", "linkone/x":
        assert found.get(name, "one\n") == "one\n"
    assert found["old/res"] == ("one\n" if "old/*" in options else "old") and all_gone(farm)
    assert "two\n" not in found.values() and "d/two" not in found


@pytest.mark.parametrize("name", ["a.o", ".a.o.part"])
def test_a_wildcard_does_not_bring_the_output_of_its_own_job(farm, name):
    """Its job would fail when the output gets its name, and be done for the next run, with another content."""
    farm.serve()
    for _ in range(2):
        done = farm.work("-mn", "-o", "{}.o", "-g", "**/*.o", "-g", "**/.*.part", farm.pub, "sh", "-c",
                         "mkdir d; touch e.o d/.x.part; echo 1 > $1; echo 2", "sh", name, "--", "a")
        assert ended(done) == (1, b"", b"cexec: a: -g %s: the output of -o is written there\n" % name.encode())
        assert not os.path.exists(os.path.join(farm.desk, "a.o"))


def test_results_that_a_wildcard_brings_replace_no_input(farm):
    """Neither a FILE nor what -i has sent; what comes back unchanged is no result at all."""
    farm.serve(env={"CONCURRENCY": "2"})
    for name in ("a.txt", "b.txt", "d/c"):
        in_desk(farm, name, name.encode())
    words = ["-m", "-f", "-i", "{}", "-i", "d", "-g", "*", farm.pub, "sh", "-c"]
    before = os.stat(os.path.join(farm.desk, "d/c"))
    done = farm.work(*words, "cp $PEER_FILE $PEER_FILE.new", "--", "a.txt", "b.txt")
    assert ended(done) == (0, b"", b"")
    after = os.stat(os.path.join(farm.desk, "d/c"))
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    for command, said in (("echo > a.txt", "a.txt: -i sends it, and it would be overwritten"),
                          ("echo > b.txt", "-g b.txt: b.txt would be overwritten"),
                          ("echo > d/c", "d/c: -i sends it, and it would be overwritten")):
        done = farm.work(*words, "rm *.txt; echo > new; " + command, "--", "a.txt", "b.txt")
        assert done.returncode == 2 and "cexec: a.txt: %s\n" % said in done.stderr.decode()
    assert contents(farm.desk) == {name: name[:5] for name in ("a.txt", "b.txt", "a.txt.new", "b.txt.new", "d/c")}


@pytest.mark.parametrize("pattern, name", [
    (b"a/b", b"a/b"), (b"a*", None), (b"a?/b", None), (b"[a]", None), (rb"a\*\[1]\\", rb"a*[1]" + b"\\"),
    (rb"a\**", None), (b"a\\\n", b"a\n"), (rb"\a\?", b"a?")])
def test_names_that_patterns_without_wildcards_stand_for(pattern, name):
    assert cexec.plain_name(pattern) == name and (name is None or cexec.matcher([pattern])(name))


@pytest.mark.parametrize("user", [[], ["-u", "nobody"]])
def test_directories_of_named_results_are_made_for_the_command(farm, user):
    """As its user, also in a directory that it may only read, and not for what a wildcard matches."""
    if user:
        need("root")
    farm.serve(*user)
    in_desk(farm, "d/x")
    os.chmod(os.path.join(farm.desk, "d"), 0o555)
    words = ["-g", "small/{/}", "-g", "d/e/{/}.\\[1\\]", farm.pub, "sh", "-c",
             "echo $1 > small/$1; echo $1 > d/e/$1.[1]; test ! -e w", "sh", "{/}", "--", "a/one"]
    assert ended(farm.work("-mn", "-g", "s*", "-i", "d", *words)) == (0, b"", b"")
    assert contents(farm.desk) == {"d/x": "x", "small/one": "one\n", "d/e/one.[1]": "one\n"}
    command = ["sh", "-c", "find . -type d; echo > a/b/c"]
    assert sorted(farm.work("-n", "-g", "a/b/c", farm.pub, *command).stdout.split()) == [b".", b"./a", b"./a/b"]
    assert contents(farm.desk)["a/b/c"] == "\n" and all_gone(farm)


def test_a_directory_that_g_names_is_replaced_as_a_whole(farm):
    """Not one in which only a wildcard matches something, or of which -i sends something, nor an open log in it."""
    farm.serve()
    old = ["out/old", "out/e/old", "out/f/g", "out/new", "else/old", "sent/old"]
    for name in old:
        in_desk(farm, name, b"old\n")
    os.symlink("out/old", os.path.join(farm.desk, "out", "link"))
    in_desk(farm, "script", b"")
    command = "mkdir -p out/e else sent; for name in out/new out/e/new else/new sent/new; do echo new > $name; done"
    words = farm.argv("cexec", "-n", "-i", "sent", "-g", "out", "-g", "else/*", "-g", "sent", farm.pub, "sh", "-c",
                      command + "; rm sent/old; echo said")
    with open(os.path.join(farm.desk, "out", "log"), "wb") as log:
        done = subprocess.run(words, cwd=farm.desk, env=farm.environment(), stdin=subprocess.DEVNULL, stdout=log,
                              stderr=subprocess.PIPE, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, b"")
    new = dict.fromkeys(["out/new", "out/e/new", "else/new", "sent/new"], "new\n")
    assert contents(farm.desk) == {**new, "else/old": "old\n", "sent/old": "old\n", "out/log": "said\n", "script": ""}
    assert all_gone(farm)


def test_a_batch_whose_results_are_directories_is_taken_up_again(farm):
    """The newest file in a directory counts, however deep it is; one without any file is not done."""
    farm.serve(env={"CONCURRENCY": "2"})
    for name in ("a", "b", "b.d/e/old"):
        in_desk(farm, name)
    os.mkdir(os.path.join(farm.desk, "a.d"))
    words = ["-m", "-g", "{}.d", farm.pub, "sh", "-c", "mkdir -p {}.d/e; echo > {}.d/e/f; echo {}", "--", "a", "b"]
    os.utime(os.path.join(farm.desk, "b.d", "e", "old"), (1, 1))
    assert ended(farm.work(*words)) == (0, b"a\nb\n", b"")
    assert set(contents(farm.desk)) == {"a", "b", "a.d/e/f", "b.d/e/f"}
    for name in ("a.d", "a.d/e", "b.d", "b.d/e"):
        os.utime(os.path.join(farm.desk, name), (1, 1))
    assert farm.work(*words).stdout == b""
    os.utime(os.path.join(farm.desk, "b.d", "e", "f"), (1, 1))
    assert [farm.work(*words).stdout for _ in range(2)] == [b"b\n", b""]


def test_dry_run_shows_files_too_and_works_when_it_is_run(farm):
    farm.serve()
    names = ["d/it's *.x", "d/b.x"]
    for name in [*names, "common 1"]:
        in_desk(farm, name, name.encode())
    command = 'cat "$1" common* > "$2.out"; mkdir "$2.more"; echo "$2" > "$2.more/1"; echo oh >&2'
    words = ["-n", "-i", "{}", "-i", "common 1", "-g", "{/.}.out", "-g", "{/.}.more/*", "--errors", "said 1", farm.pub,
             "sh", "-c", command, "sh", "{}", "{/.}", "--", *names]
    done = farm.work("-m", "--dry-run", *words)
    assert (done.returncode, done.stderr) == (0, b"") and not os.path.exists(os.path.join(farm.desk, "said 1"))
    script = "cexec() { %s \"$@\"; }\n%s" % (shlex.join(farm.argv("cexec")), done.stdout.decode())
    done = farm.do(["sh", "-e"], cwd=farm.desk, input=script.encode())
    assert (done.returncode, done.stderr) == (0, b"")
    one = contents(farm.desk)
    assert one["it's *.out"] == names[0] + "common 1" and one["b.more/1"] == "b\n" and one["said 1/2"] == "oh\n"
    assert farm.work("-m", "-f", *words).returncode == 0 and contents(farm.desk) == one


def test_a_single_job_may_change_its_files_in_place(farm):
    farm.serve()
    in_desk(farm, "a", b"1")
    assert ended(farm.work("-n", "-i", "a", "-g", "a", farm.pub, "sh", "-c", "echo 2 > a")) == (0, b"", b"")
    assert contents(farm.desk) == {"a": "2\n"}


# ---- cexec: how far a job is -----------------------------------------------

@pytest.mark.parametrize("count, said", [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999949, "999.9 kB"),
                                         (999950, "1.0 MB"), (12.34e9, "12.3 GB"), (5e15, "5000.0 TB")])
def test_size_of_bytes(count, said):
    assert cexec.size(count) == said


@pytest.mark.parametrize("seconds, said", [(0, "0s"), (59, "59s"), (60, "1m"), (3599, "59m"), (3600, "1h00m"),
                                           (86399, "23h59m"), (86400, "1d00h"), (900000, "10d10h")])
def test_duration_of_seconds(seconds, said):
    assert cexec.duration(seconds) == said


def test_columns_of_wide_and_combining_characters():
    assert [cexec.columns(text) for text in ("abc", "\u65e5\u672c", "e\u0301", "")] == [3, 4, 1, 0]
    assert [cexec.fitted("\u65e5\u672c\u8a9e", width) for width in (6, 5, 4, 1)] == [
        "\u65e5\u672c\u8a9e", "\u65e5\u672c", "\u65e5\u672c", ""]
    lines = cexec.table(["A", "B"], [["\u65e5\u672c", "x"], ["y", "z\n"]])
    assert lines == ["A     B", "\u65e5\u672c  x", "y     z\\n"]


def test_progress_ends_with_the_sums(cluster):
    """Not on a terminal: a line at the end, whatever the command's own standard error says."""
    cluster.worker("sh", "-c", "head -c 1000000; cat >/dev/null; echo said >&2; exit 3")
    done = cluster.run("cexec", "-p", cluster.pub, stdin=open(make_file(cluster, "in", bytes(4000000))))
    assert (done.returncode, len(done.stdout)) == (3, 1000000)
    sums = rb"said\ncexec: \S+, \d+\.\d s, 4\.0 MB in \(100%\), 1\.0 MB out, [0-9.]+ [kMG]?B/s\n"
    assert re.fullmatch(sums, done.stderr), done.stderr


def test_progress_in_a_file_is_a_line_every_ten_seconds(cluster):
    altered(cluster, ("0.25 if self.on_terminal else 10.0", "0.25 if self.on_terminal else 1.0"))
    cluster.worker("sh", "-c", "cat; until [ -e go ]; do sleep 0.05; done")
    put(cluster.path("in"), "twelve bytes")
    with open(cluster.path("said"), "wb") as said, open(cluster.path("in")) as source:
        client = cluster.start("cexec", "-p", cluster.pub, stdin=source, stdout=subprocess.DEVNULL, stderr=said)
    until(lambda: read(cluster.path("said")).endswith(b"\n"), "a line")
    make_file(cluster, "go")
    assert client.wait(PATIENCE) == 0
    *lines, last = read(cluster.path("said")).decode().splitlines()
    for line in lines:
        assert re.fullmatch(r"cexec: %s, \d+s, 12 B in \(100%%\), 12 B out, [0-9.]+ k?B/s" % NODE, line), line
    assert lines and re.match(r"cexec: \S+, \d+\.\d s, 12 B in \(100%\), 12 B out, ", last), last


def test_progress_on_a_terminal(cluster):
    """Below the other lines while it goes on: in line, then the share of the input; and it leaves no trace."""
    command = "head -c 4000000 >/dev/null; echo half >&2; cat <&3; cat >/dev/null"
    cluster.worker("sh", "-c", command, env={"CONCURRENCY": "1"})
    os.mkfifo(cluster.path("fifo"))
    first = cluster.start_client("N=1", stdin=subprocess.PIPE, pass_fds=())
    until(lambda: children_of(cluster.started[0].pid), "the first job")
    make_file(cluster, "in", bytes(8000000))
    near, far = pty.openpty()
    termios.tcsetwinsize(far, (24, 100)) if hasattr(termios, "tcsetwinsize") else None
    shell = 'exec "$@" <in 3<fifo'
    process = cluster.popen(["sh", "-c", shell, "sh", *cluster.argv("cexec", "-p", cluster.pub)], stderr=far,
                            stdout=subprocess.DEVNULL)
    os.close(far)
    opened = open(cluster.path("fifo"), "wb")
    shown = bytearray()

    def seen(pattern):
        with contextlib.suppress(OSError):
            if select.select([near], [], [], 0.05)[0]:
                shown.extend(os.read(near, 4096))
        return re.search(pattern, shown)
    until(lambda: seen(rb"\r\x1b\[Kin line, 0 ahead, \d+s"), "a place in the line")
    first.stdin.close()
    until(lambda: seen(rb"half\r\n"), "the command's own line")
    until(lambda: seen(rb"\r\x1b\[K\S+, \d+s, [78]\.\d MB in \((9\d|100)%\), 5 B out, "), "the share")
    opened.close()
    assert process.wait(30) == 0
    sums = rb"\r\x1b\[Kcexec: \S+, [0-9.]+ s, 8\.0 MB in \(100%\), 5 B out, [^\n]*\r\n"
    until(lambda: seen(sums), "the sums")
    os.close(near)


def test_progress_makes_way_for_what_is_written_to_the_terminal(one):
    """It goes before the output, and comes back only below a whole line."""
    go = one.path(new_mark())
    command = "echo first; %s; printf 'Really? '; sleep 1; echo yes" % wait_for(go)
    terminal = Terminal(one, one.argv("cexec", "-p", "-n", one.pub, "CMD=" + command))
    terminal.shows("first\r\n\r\x1b[K%s, " % NODE)
    touch(go)
    terminal.shows("\r\x1b[KReally? yes\r\n")
    terminal.close()


def test_a_terminal_is_told_of_a_long_search(cluster):
    """In a line that goes when the job begins."""
    terminals = [Terminal(cluster, cluster.argv("cexec", *words)) for words in (["-n", cluster.pub],
                                                                                ["-m", cluster.pub, "--", "app"])]
    for terminal in terminals:
        terminal.shows("looking for a worker (cexec -l finds out more)")
    cluster.worker("sh", "-c", "echo found")
    terminals[0].shows("\r\x1b[Kfound\r\n")
    terminals[1].shows("cexec: 1 done, 0 failed")
    for terminal in terminals:
        terminal.close()


def test_a_terminal_is_told_of_the_line(cluster):
    cluster.worker("sh", "-c", "echo begun; cat", env={"CONCURRENCY": "1"})
    first = held_job(cluster)
    terminal = Terminal(cluster, cluster.argv("cexec", "-n", cluster.pub))
    terminal.shows("\r\x1b[Kin line, 0 ahead")
    first.stdin.close()
    terminal.shows("\r\x1b[Kbegun\r\n")
    terminal.close()


# ---- cexec: a terminal for the command -------------------------------------


def test_a_shell_in_a_terminal(tmux):
    tmux.keys("-l", "stty erase ^H; ")
    tmux.line("$RUN -t $PUB %s; echo sta'tus'=$?" % THERE, "^there>$")
    tmux.line("echo s'ize' $(stty size) $TERM $(tty)", "^size 30 100 (screen|tmux)[-a-z0-9]* /dev/pts/[0-9]+$")
    tmux.line("ps -o stat= -p $$; ps -o stat=,args= -C ps")
    tmux.shows(r"^S[<N]?s *\n")         # nice, or not
    tmux.shows(r"^R[<N]?\+ +ps -o")

    tmux.line("clear; trap 'echo w\"inch\"' WINCH; echo tr'apped'", "^trapped$")
    tmux.do("resize-window", "-x", "90", "-y", "40")
    tmux.keys("Enter", shows="winch$")
    tmux.line("echo s'ize' $(stty size)", "^size 40 90$")

    def sleeps(after=""):
        mark = new_mark()
        tmux.line("clear; MARK=%s sleep 1000%s" % (mark, after))
        until(lambda: processes_with("MARK=" + mark), "a command's start")
    sleeps("; echo sl'ept' $?")
    tmux.keys("C-c", shows=r"^\^C\n+there>$")
    sleeps()
    tmux.keys("C-z", shows=r"Stopped +MARK=\S+ sleep 1000")
    tmux.line("jobs; fg", r"^MARK=\S+ sleep 1000\n*\Z")
    tmux.keys("C-c", shows=r"^\^C\n+there>$")
    tmux.line("clear; sh -c 'kill -QUIT $$'", "Quit")
    sleeps()
    tmux.keys("C-\\", shows=r"^\^.Quit")
    tmux.line("exit 3", "^status=3$")


def test_the_terminal_is_as_before_when_the_command_has_ended(tmux):
    before = tmux.modes()
    tmux.line("$RUN -t $PUB " + THERE, "^there>$")
    assert tmux.modes() != before
    tmux.keys("C-d", shows="^here>$")
    until(lambda: tmux.modes() == before, "the modes of before")


def test_vi_in_a_terminal(tmux):
    need("vi")
    path = tmux.cluster.path(new_mark())
    tmux.line("$RUN -t $PUB CMD='exec vi %s'" % path, "^~\n")
    tmux.keys("-l", "ifirst line")
    tmux.keys("Enter")
    tmux.keys("-l", "second ~. line")
    tmux.keys("Escape", shows="^first line\nsecond ~. line")
    tmux.keys("-l", ":wq")
    tmux.keys("Enter", shows="^here>$")
    assert read(path) == b"first line\nsecond ~. line\n"


def test_top_in_a_terminal_that_is_resized(tmux):
    need("top")
    tmux.line("$RUN -t $PUB CMD='exec top'", "load average")
    tmux.shows("PID")
    tmux.do("resize-window", "-x", "60", "-y", "10")
    until(lambda: 0 < max(map(len, tmux.screen().splitlines())) <= 60 and "PID" in tmux.screen(), "a smaller top")
    tmux.keys("q", shows="here>$")


def test_tilde_escapes_at_the_beginning_of_a_line(tmux):
    mark, before = new_mark(), tmux.modes()
    tmux.line("$RUN -t $PUB MARK=%s %s" % (mark, THERE), "^there>$")
    raw = tmux.modes()
    tmux.keys("-l", "~?", shows="^after Enter: ~. hang up")
    tmux.line("")
    tmux.line("~~nobody-of-that-name 'here'")
    tmux.shows("^bash: ~nobody-of-that-name: ")         # one tilde has come through
    tmux.line("clear; echo a~~ ~. 'within'", "^a~~ ~. within")
    tmux.keys("-l", "~")
    tmux.keys("C-z", shows=r"Stopped .*\n")
    tmux.shows("^here>$")
    until(lambda: tmux.modes() != raw, "the modes that the shell has set")
    tmux.line("clear; stty -a; echo lo'cal'", "^local")
    assert "isig icanon iexten echo " in tmux.screen()
    tmux.line("clear; fg")
    until(lambda: tmux.modes() == raw, "the raw modes")
    tmux.line("echo back 'again'", "^back again")
    tmux.line("echo two; ~? ~ x~")      # none at the beginning of a line
    tmux.shows("^two")
    tmux.keys("-l", "~.", shows="^here>$")
    tmux.line("echo sta'tus'=$?", "^status=129$")
    until(lambda: not marked(mark), "the end of the command")
    tmux.line("clear")
    assert tmux.modes() == before


@pytest.mark.parametrize("name", "TERM INT HUP QUIT".split())
def test_terminal_is_put_back_when_cexec_is_killed(tmux, name):
    mark, before = new_mark(), tmux.modes()
    tmux.line("ulimit -c 0; $RUN -t $PUB MARK=%s CMD='trap \"\" HUP TERM; echo re\"ady\"; %s'" % (mark, FOREVER))
    tmux.shows("^ready")
    number = getattr(signal, "SIG" + name)
    os.kill(tmux.client(), number)
    tmux.shows("here>$")
    tmux.line("echo sta'tus'=$?", "^status=%d$" % (128 + number))
    until(lambda: tmux.modes() == before, "the modes of before")
    until(lambda: not marked(mark), "the end of the command")


def test_terminal_is_usable_after_reset_when_cexec_is_killed_with_kill(tmux):
    mark = new_mark()
    tmux.line("$RUN -t $PUB MARK=%s %s" % (mark, THERE), "^there>$")
    os.kill(tmux.client(), signal.SIGKILL)
    tmux.shows("Killed")
    tmux.line("reset")
    tmux.line("clear; echo us'able'; stty -a", "^usable")
    tmux.shows("isig icanon iexten echo ")
    assert "-icanon" not in tmux.screen()
    until(lambda: not marked(mark), "the end of the command")


def test_terminal_is_put_back_when_the_worker_is_lost(tmux):
    mark, before = new_mark(), tmux.modes()
    tmux.line("$RUN -t $PUB MARK=%s %s; echo sta'tus'=$?" % (mark, THERE), "^there>$")
    os.kill(parent_of(marked(mark)[0]), signal.SIGKILL)
    tmux.shows(r"cexec: worker \S+ lost after .*: connection closed; the command may have run")
    tmux.shows("^status=111$")
    until(lambda: tmux.modes() == before, "the modes of before")
    until(lambda: not marked(mark), "the end of the command")


@pytest.mark.parametrize("name", ("TSTP", "STOP"))
def test_stopped_from_elsewhere_and_raw_again(tmux, name):
    before = tmux.modes()
    tmux.line("$RUN -t $PUB " + THERE, "^there>$")
    raw = tmux.modes()
    os.kill(tmux.client(), getattr(signal, "SIG" + name))
    tmux.shows("Stopped")
    tmux.do("resize-window", "-x", "70", "-y", "20")
    tmux.line("clear; fg")
    until(lambda: tmux.modes() == raw, "the raw modes")
    tmux.line("echo s'ize' $(stty size)", "^size 20 70$")
    tmux.line("exit", "^here>$")
    until(lambda: tmux.modes() == before, "the modes of before")


def test_in_the_background_it_stops_until_it_is_in_the_foreground(tmux):
    tmux.line("$RUN -t $PUB %s &" % THERE)
    client = tmux.client()
    until(lambda: state_of(client) == "T", "the stop")
    tmux.line("", "Stopped")
    tmux.line("clear; fg")
    tmux.line("echo s'hell' $(stty size)", "^shell 30 100$")
    tmux.line("exit", "^here>$")
    tmux.line("clear; stty -a; echo al'l'", "^all")
    assert "isig icanon iexten echo " in tmux.screen()


@pytest.mark.parametrize("how", ("started there", "stopped there"))
def test_killed_in_the_background(tmux, how):
    """It ends, and leaves the terminal to whoever has it now."""
    if how == "started there":
        tmux.line("$RUN -t $PUB %s &" % THERE)
    else:
        tmux.line("$RUN -t $PUB " + THERE, "^there>$")
        os.kill(tmux.client(), signal.SIGSTOP)
        tmux.shows("Stopped")
    client = tmux.client()
    until(lambda: state_of(client) == "T", "the stop")
    tmux.line("clear; echo s'hell'", "^shell\nhere>$")
    before = tmux.modes()
    os.kill(client, signal.SIGTERM)
    os.kill(client, signal.SIGCONT)
    until(lambda: state_of(client) is None, "its end")
    assert tmux.modes() == before
    tmux.line("stty -a; echo al'l'", "^all")
    assert "-icanon" not in tmux.screen()


def test_a_worker_that_hangs_can_be_left(tmux):
    mark = new_mark()
    tmux.line("$RUN -t $PUB MARK=%s %s" % (mark, THERE), "^there>$")
    supervisor = parent_of(marked(mark)[0])
    os.kill(supervisor, signal.SIGSTOP)
    tmux.line("into the void")
    tmux.keys("-l", "~.", shows="^here>$")
    os.kill(supervisor, signal.SIGCONT)
    until(lambda: not marked(mark), "the end of the command")


@pytest.mark.parametrize("ignored", (False, True))
def test_a_terminal_that_goes_away_hangs_the_command_up(one, ignored):
    mark = new_mark()
    terminal = Terminal(one, ["sh", "-c", 'trap "" HUP; exec "$@"' if ignored else 'exec "$@"', "sh",
                              *one.argv("cexec", "-t", one.pub, "MARK=" + mark),
                              "CMD=trap 'exit 9' HUP; echo ready; " + FOREVER])
    terminal.shows("ready")
    os.close(terminal.master)
    assert terminal.process.wait(PATIENCE) == (9 if ignored else -signal.SIGHUP)
    until(lambda: not marked(mark), "the end of the command")


def test_while_it_searches_the_keys_are_as_ever(tmux):
    tmux.line("GROUP=127.255.255.255:%d $RUN -v -t $PUB; echo sta'tus'=$?" % free_port(), "try 2")
    tmux.keys("C-c")
    tmux.line("echo sta'tus'=$?", "^status=130$")


def on_terminal(side, text, command, size=(33, 77), modes=None, typed=(), last=b""):
    """What a terminal shows of a script in which RUN stands for the command, and the script's files.

    The terminal is given a size and changed modes; what is typed is sent after its prompt has been shown.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    subprocess.run(["stty", "-F", os.ttyname(slave), *(modes or "sane -onlcr").split()], check=True)
    before = termios.tcgetattr(slave)
    run = side.shell().replace(" cexec ", " cexec -t ", 1)
    process = subprocess.Popen(
        ["sh", "-c", text.replace("RUN", run)], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        env=side.cluster.environment({"CMD": command, "DATA": side.cluster.data, "TERM": "vt100"}), cwd=side.directory,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    shown, answers, deadline = b"", list(typed), time.monotonic() + PATIENCE
    try:
        while process.poll() is None or select.select([master], [], [], 0)[0]:
            assert time.monotonic() < deadline, shown[-1000:]
            if select.select([master], [], [], 0.05)[0]:
                shown += os.read(master, 1 << 16)
            if answers and answers[0][0] in shown:
                os.write(master, answers.pop(0)[1])
        if "-t" in run.split():
            assert termios.tcgetattr(slave) == before
    finally:
        signalled(process, signal.SIGKILL)
        close_all(master, slave)
    files = {name: read(side.path(name)) for name in os.listdir(side.directory)}
    return process.returncode, shown, files


WHAT_IS_THERE = ("for n in 0 1 2 3; do if [ -t $n ]; then echo $n is a terminal >&2; fi; done; "
                 "stty size </dev/tty >&2; echo $TERM; cat /dev/null; ps -o stat= -p $$ | tr -d ' ' | sed 's/^/st=/'")


@pytest.mark.parametrize("text", [
    "RUN; echo status $?", "RUN 2>err", "RUN >out", "RUN | cat", "RUN 2>&1 | cat", "RUN </dev/null",
    "echo piped | RUN", "RUN </dev/tty >/dev/tty", "RUN 3</dev/tty", "RUN >out 2>err", "RUN 0<&-",
    "echo piped | RUN >out 2>err 4<>/dev/tty"])
def test_oracle_what_is_a_terminal(one, tmp_path, text):
    need("stty", "ps")
    command = WHAT_IS_THERE.replace("st=", "").replace("ps -o stat= -p $$", "ps -o tty= -p $$ | grep -c pts")
    status, shown, files = both(one, tmp_path, on_terminal, text, command)
    assert b"33 77" in shown + files.get("err", b"") and status == 0


@pytest.mark.parametrize("modes", [
    "sane", "sane erase ^H -ixon", "sane intr ^X susp undef quit ^P", "sane -onlcr iutf8 tostop", "sane -echo",
    "sane -iutf8 -icrnl -echoctl", "sane -isig eof ^B werase ^E ixany"])
def test_oracle_modes_of_the_terminal(one, tmp_path, modes):
    need("stty")
    _, shown, _ = both(one, tmp_path, lambda side: on_terminal(side, "RUN", "exec stty -a", modes=modes))
    assert b"rows 33" in shown


def test_oracle_bytes_through_a_terminal(one, tmp_path):
    """Two megabytes, a line at a time and with the last one just before the end."""
    command = "head -c 1500000 $PEER_BIG | od -An -v -tx1; printf last; exit 7"
    big = shlex.quote(one.data + "/big")
    text = "PEER_BIG=%s; export PEER_BIG; RUN" % big
    status, shown, _ = both(one, tmp_path, lambda side: on_terminal(
        side, text.replace("RUN", "RUN BIG=$PEER_BIG" if isinstance(side, There) else "RUN"), command, modes="sane"))
    assert (status, shown[-4:], len(shown)) == (7, b"last", 1500000 // 16 * 50 + 4)


def test_oracle_typed_bytes(one, tmp_path):
    """Every byte but those that a terminal's keys mean something by, in raw mode all of them."""
    every = bytes(code for code in range(256)) * 20
    command = "stty raw -echo; echo go; exec head -c %d | od -An -v -tx1" % len(every)
    status, shown, _ = both(one, tmp_path, lambda side: on_terminal(
        side, "RUN", command, typed=[(b"go\n", every[1:] + b"\0")]))
    assert status == 0 and len(shown) == 3 + len(every) // 16 * 49


def test_oracle_interrupt_and_end_of_file_keys(one, tmp_path):
    command = ("trap 'echo int; exit 6' INT; echo ready; while read x; do echo got $x; done; echo eof; read x; "
               "echo done-$x; while :; do sleep 0.1; done")
    typed = [(b"ready", b"one\n"), (b"got one", b"\x04"), (b"eof", b"end\n"), (b"done-end", b"\x03")]
    status, shown, _ = both(one, tmp_path, lambda side: on_terminal(side, "exec RUN", command, typed=typed))
    assert status == 6 and b"int" in shown


@pytest.mark.parametrize("typed", [b"\x04", b"one\n\x04", b"one\ntwo\x04\x04", b"\x04one\n\x04"])
def test_oracle_an_end_of_file_before_the_terminal_is_raw(one, tmp_path, typed):
    command = "cat; echo; cat; exit 5" if typed[:1] == b"\x04" and typed[1:] else "cat; exit 5"
    status, shown, _ = both(one, tmp_path, lambda side: on_terminal(
        side, "sleep 0.3; RUN", command, modes="sane -onlcr -echo", typed=[(b"", typed)]))
    assert (status, shown) == (5, b"\n" * typed.startswith(b"\x04one") + typed.replace(b"\x04", b""))


def test_oracle_script_without_an_input(one, tmp_path):
    """It types an end of file at once."""
    need("script")

    def seen(side):
        run = side.shell().replace(" cexec ", " cexec -t ", 1)
        return ended(one.do(["script", "-qec", run, "/dev/null"], stdin=subprocess.DEVNULL, env={"CMD": "cat; exit 3"}))
    assert both(one, tmp_path, seen)[0] == 3


@pytest.mark.parametrize("command, status", [("exit 0", 0), ("exit 255", 255), ("kill -TERM $$", 143),
                                             ("exec /nowhere/none", 127), ("kill -HUP $$", 129)])
def test_status_of_a_command_in_a_terminal(one, tmp_path, command, status):
    side = There(one, tmp_path / "there")
    assert on_terminal(side, "RUN; echo status=$?", command)[1].endswith(b"status=%d\n" % status)


def test_the_last_output_is_not_lost_in_a_terminal(one, tmp_path):
    for number in range(10):
        side = There(one, tmp_path / str(number))
        assert on_terminal(side, "RUN", "head -c 30000 /dev/zero | tr '\\0' x; printf %d" % number)[1] == (
            b"x" * 30000 + b"%d" % number)


def test_a_command_that_closes_its_terminal_goes_on(one, tmp_path):
    side = There(one, tmp_path / "there")
    command = "echo one; exec 0<&- 1>&- 2>&-; sleep 0.2; echo two >/dev/tty; exit 4"
    assert on_terminal(side, "RUN", command)[:2] == (4, b"one\ntwo\n")


def test_the_terminal_ends_with_the_command(one, tmp_path):
    """Whatever it has left behind, and however much that writes."""
    side = There(one, tmp_path / "there")
    command = "trap '' HUP; exec 2>/dev/null; yes & yes & yes & sleep 0.1; exit 6"
    status, shown, _ = on_terminal(side, "RUN", command)
    assert status == 6 and set(shown) <= set(b"y\r\n")


def test_a_pipe_beside_the_terminal_still_holds_the_job(one, tmp_path):
    side, go = There(one, tmp_path / "there"), one.path(new_mark())
    command = "trap '' HUP; (%s; echo late >&2) 0<&- >/dev/null & echo ended; exit 2" % wait_for(go)
    touch(go)
    assert on_terminal(side, "RUN 2>err", command) == (2, b"ended\n", {"err": b"late\n"})


def test_without_a_terminal_t_is_told_and_ignored(one):
    done = one.run("cexec", "-t", one.pub, "CMD=cat; tty; exit 3", input=b"x\n")
    assert (done.returncode, done.stdout) == (3, b"x\nnot a tty\n")
    assert done.stderr == b"cexec: -t: no descriptor here is a terminal, so the command has none\n"


def test_options_n_and_t_do_not_share_a_terminal(one, tmp_path):
    side = There(one, tmp_path / "there")
    for options, status in (("-n -t", 100), ("-tn 0", 100), ("-tn 1", 100), ("-tn 3", 0)):
        run = side.shell().replace(" cexec ", " cexec %s " % options, 1)
        assert on_terminal(side, run + " 3</dev/null", "exit 0")[0] == status


def test_another_terminal_stays_a_pipe(one, tmp_path):
    master, slave = pty.openpty()
    side = There(one, tmp_path / "there")
    text = "RUN 3>%s" % os.ttyname(slave)
    status, shown, _ = on_terminal(side, text, "[ -t 0 ] && echo yes; [ -t 3 ] || echo no >&3; exit 8")
    assert (status, shown) == (8, b"yes\n")
    assert read_count(master, 2) == b"no"
    close_all(master, slave)


def test_a_terminal_that_may_not_be_opened_again(one, tmp_path):
    """After su the terminal is another user's: it is used as it stands."""
    need("root", "setpriv")
    nobody = pwd.getpwnam("nobody")
    with tempfile.TemporaryDirectory(dir="/tmp") as public:
        os.chmod(public, 0o755)
        for source, name in ((one.pub, "app.pub"), (PROGRAM, "cexec.py")):
            with open(os.path.join(public, name), "wb") as file:
                file.write(read(source))
            os.chmod(file.name, 0o644)
        python = shutil.which("python3", path="/usr/bin:/bin") or skip("no python3 that all may use")
        text = "cd %s; setpriv --reuid=%d --regid=%d --clear-groups %s cexec.py cexec -t app.pub CMD=\"$CMD\"" % (
            public, nobody.pw_uid, nobody.pw_gid, python)
        command = "read x; echo got $x; seq 10000; exit 3"
        status, shown, _ = on_terminal(There(one, tmp_path / "there"), text, command, modes="sane -onlcr -echo",
                                       typed=[(b"", b"a line\n")])
        assert (status, shown) == (3, b"got a line\n" + b"".join(b"%d\n" % n for n in range(1, 10001)))


def test_a_terminal_of_another_user(cluster):
    need("root")
    worker = cluster.worker("sh", "-c", 'eval "$PEER_CMD"', options=["-u", "nobody"])
    cluster.data = ""
    side = There(cluster, cluster.path("there"))
    status, shown, _ = on_terminal(side, "RUN", 'echo by name >$(tty); stat -c %U $(tty); exit 4')
    assert (status, shown) == (4, b"by name\nnobody\n") and worker.poll() is None


def test_a_lost_job_in_a_terminal_is_run_again(cluster):
    """As long as it has shown nothing: what was typed by then is typed again."""
    cluster.shell_workers(2, env={"BOOST": "0"})
    cluster.data, first, mark = "", cluster.path("first"), new_mark()
    side = There(cluster, cluster.path("there"))
    run = side.shell().replace(" cexec ", " cexec -rt ", 1) + " MARK=" + mark
    command = "if mkdir %s; then read x; touch %s/read; exec sleep 1000; fi; read x; echo got $x $(stty size)"

    def lose():
        until(lambda: os.path.exists(first + "/read"), "the first run")
        os.kill(parent_of(marked(mark)[0]), signal.SIGKILL)
    typist = threading.Thread(target=lose)
    typist.start()
    shown = on_terminal(side, run, command % (first, first), modes="sane -onlcr -echo",
                        typed=[(b"", b"a line\n")])
    typist.join()
    assert shown[0] == 0 and shown[1].endswith(b"got a line 33 77\n")


def test_a_lost_supervisor_leaves_nothing_in_the_command_s_session(one, tmp_path):
    """Though it has a session of its own, and ignores the hang-up."""
    side, mark = There(one, tmp_path / "there"), new_mark()
    command = "trap '' HUP; sleep 1000 & echo ready; set -m; sleep 1001 & wait"

    def lose():
        until(lambda: len(marked(mark)) == 3, "the command")
        os.kill(parent_of(min(marked(mark))), signal.SIGKILL)
    killer = threading.Thread(target=lose)
    killer.start()
    assert on_terminal(side, "RUN MARK=" + mark, command)[0] == 111
    killer.join()
    until(lambda: not marked(mark), "the end of the command", 12)


def test_a_slow_reader_gets_what_was_written_before_a_bounded_linger(one):
    """The wait for processes that are left behind is bounded, that for the reader is not."""
    command = "sleep 3 & head -c 5000000 %s/big" % one.data
    with job(one, command, env={"CEXEC_TIMEOUT_LINGER": "1"}) as process:
        mark = time.monotonic() + 2
        until(lambda: time.monotonic() > mark)
        status, out = finish(process)
    assert (status, out == read(one.data + "/big")[:5000000]) == (0, True)


def is_raw(master):
    return not termios.tcgetattr(master)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)


def test_the_terminal_is_raw_only_while_a_command_has_it(one):
    """Not while cexec is stopped, and not while it waits for a pipe when the command has ended."""
    go = one.path(new_mark())
    command = "trap '' HUP; (%s) 0<&- >/dev/null & echo ready; read x; echo got $x" % wait_for(go)
    run = " ".join(map(shlex.quote, one.argv("cexec", "-t", one.pub))) + ' CMD="$WHAT"'
    terminal = Terminal(one, ["sh", "-c", "exec %s 2>/dev/null" % run], {"WHAT": command})
    terminal.shows("ready")
    assert is_raw(terminal.master)
    os.kill(terminal.process.pid, signal.SIGTSTP)
    until(lambda: state_of(terminal.process.pid) == "T", "the stop")
    assert not is_raw(terminal.master)
    os.kill(terminal.process.pid, signal.SIGCONT)
    until(lambda: is_raw(terminal.master), "the raw terminal")
    terminal.type("a line\r", "got a line")
    until(lambda: not is_raw(terminal.master), "the terminal as it was")
    assert terminal.process.poll() is None
    touch(go)
    assert terminal.process.wait(PATIENCE) == 0
    terminal.close()


def test_while_it_searches_again_the_keys_are_as_ever(tmux):
    mark, before = new_mark(), tmux.modes()
    tmux.line("$RUN -rvt $PUB MARK=%s CMD='exec sleep 1000'" % mark)
    until(lambda: marked(mark), "the command")
    until(lambda: tmux.modes() != before, "the raw terminal")
    os.kill(parent_of(marked(mark)[0]), signal.SIGKILL)
    tmux.shows("runs the job again")
    until(lambda: "try 2," in tmux.screen().partition("again")[2], "the next search")
    tmux.keys("C-c", shows="^here>$")
    tmux.line("echo sta'tus'=$?", "^status=130$")


# ---- cexec: real programs --------------------------------------------------

def cexec_in_a_shell(cluster):
    return " ".join(map(shlex.quote, cluster.argv("cexec", cluster.pub)))


@pytest.mark.parametrize("size", [0, 5, 12813, 3000000])
def test_git_with_a_filter(cluster, size):
    """git leaves the file open for its filter, which does not read it there."""
    need("git")
    cluster.worker("tr", "a-zA-Z", "n-za-mN-ZA-M")
    repository, filter_ = cluster.path("repository"), cexec_in_a_shell(cluster)
    env = cluster.environment({"HOME": cluster.directory, "GIT_CONFIG_NOSYSTEM": "1"})

    def git(*words):
        return subprocess.run(["git", *words], cwd=repository, env=env, stdout=subprocess.PIPE, check=True).stdout
    os.mkdir(repository)
    git("init", "-q")
    git("config", "filter.rot.clean", filter_)
    git("config", "filter.rot.smudge", filter_)
    git("config", "filter.rot.required", "true")
    put(repository + "/.gitattributes", "file filter=rot\n")
    text = ("Any text, line after line.\n" * (size // 27 + 1))[:size]
    put(repository + "/file", text)
    git("add", "file")
    assert git("cat-file", "blob", ":file").decode() == text.translate(ROT13)
    os.unlink(repository + "/file")
    git("checkout", "file")
    assert read(repository + "/file").decode() == text


def program(cluster, name, *words):
    """An executable that runs cexec."""
    path = put(cluster.path(name), "#!/bin/sh\n%s\n" % " ".join(words))
    os.chmod(path, 0o755)
    return path


def test_sftp_over_cexec(cluster):
    """Its protocol over cexec, as -D has it with a server of this host."""
    need("sftp")
    servers = [path for path in ("/usr/lib/openssh/sftp-server", "/usr/libexec/sftp-server") if os.path.exists(path)]
    if not servers:
        skip("sftp-server is not installed")
    cluster.worker(servers[0])
    data = noise(3000000)
    make_file(cluster, "here", data)
    commands = "put here there\nget there back\nrename there moved\nls -l moved\nrm moved\n"
    server = program(cluster, "server", "exec", cexec_in_a_shell(cluster))
    done = cluster.do(["sftp", "-q", "-b", "-", "-D", server], input=commands.encode())
    assert done.returncode == 0 and b" 3000000 " in done.stdout, done
    assert read(cluster.path("back")) == data and not os.path.exists(cluster.path("moved"))


def test_rsync_over_cexec(cluster):
    """There and back, where cexec is the remote shell; then what has changed alone."""
    need("rsync")
    cluster.shell_worker()
    data = noise(3000000)
    for name, content in (("large", data), ("empty", b""), ("d/small", b"x"), ("d/e/\xe9 name", b"\0\xff")):
        os.makedirs(os.path.dirname(cluster.path("from/" + name)), exist_ok=True)
        make_file(cluster, "from/" + name, content)
    shell = program(cluster, "rsh", "shift\nexec", cexec_in_a_shell(cluster), 'CMD="$*"')

    def copy(source, target):
        cluster.do(["rsync", "-a", "-e", shell, source, target], check=True)
        subprocess.run(["diff", "-r", "from", target.partition(":")[2] or target], cwd=cluster.directory, check=True)
    copy("from/", "host:" + cluster.path("there"))
    make_file(cluster, "from/large", data[:1000000] + b"changed" + data[1000000:])
    copy("from/", "host:" + cluster.path("there"))
    copy("host:" + cluster.path("there") + "/", "back")


def test_oggenc_gives_the_same_bytes(cluster):
    need("oggenc")
    sound = cluster.path("input.wav")
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(b"".join(struct.pack("<h", (i * i >> 4) % 20000 - 10000) for i in range(40000)))
    encode = ["oggenc", "-Q", "--serial", "1", "-o", "-", "-"]
    cluster.worker(*encode)
    with open(sound, "rb") as file:
        there = cluster.client(stdin=file)
    with open(sound, "rb") as file:
        here = subprocess.run(encode, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert here.stdout.startswith(b"OggS")
    assert (there.returncode, there.stdout, there.stderr) == (0, here.stdout, here.stderr)


# ---- cexec -l: who is there ------------------------------------------------


def test_list_of_workers(hosts):
    """Load, jobs and line of each, as they are; in a pipe, as JSON, on a terminal."""
    spaces = hosts.lan("lan", ["client", "one", "two"], "10.77.0")
    for host, slots in (("one", "1"), ("two", "3")):
        boost = "0" if host == "one" else "300000"
        worker = hosts.worker("cat", space=spaces[host], env={"CONCURRENCY": slots, "BOOST": boost})
    first = held_job(hosts, space=spaces["client"])
    until(lambda: survey(hosts, space=spaces["client"]).stdout.count("\n") == 2, "two workers")
    out = output(survey(hosts, "-j", space=spaces["client"]), errors="")
    rows = {row["address"]: row for row in map(json.loads, out.splitlines())}
    assert list(map(set, rows.values())) == [{"host", "address", "load", "running", "slots", "waiting", "version",
                                              "uptime", "round_trip", "state", "options", "id"}] * 2
    one, two = rows["10.77.0.2"], rows["10.77.0.3"]
    assert (one["running"], one["slots"], two["running"], two["slots"]) == (1, 1, 0, 3)
    assert one["load"] >= 1 and one["version"] == cexec.VERSION and 0 < one["round_trip"] < 3
    assert one["host"] == socket.gethostname() and 0 <= one["uptime"] < 100
    lines = survey(hosts, space=spaces["client"]).stdout.splitlines()
    loads = [float(line.split("\t")[2]) for line in lines]
    assert len(loads) == 2 and loads == sorted(loads)   # the least loaded first
    assert {tuple(line.split("\t")[9:11]) for line in lines} == {("serving", "-")}
    words = shlex.join(hosts.argv("cexec", "-l", hosts.pub, space=spaces["client"]))
    shown = hosts.do(["script", "-qec", words, "/dev/null"])
    head, *rows = shown.stdout.decode().splitlines()
    assert head.split() == ["HOST", "ADDRESS", "LOAD", "JOBS", "WAITING", "VERSION", "UPTIME", "ROUND", "TRIP",
                            "OPTIONS"]
    assert [row.index("10.77.0.") for row in rows[:2]] == [head.index("ADDRESS")] * 2
    assert any(" 1/1 " in row for row in rows[:2])
    outcome(first)
    assert worker.poll() is None


def test_workers_that_drain_are_listed_and_marked(cluster):
    worker = cluster.worker("cat", env={"CONCURRENCY": "2"})
    job = held_job(cluster)
    worker.terminate()
    until(lambda: b"draining: 1 jobs run" in read(worker.log), "draining")
    assert [json.loads(line)["state"] for line in survey(cluster, "-j").stdout.splitlines()] == ["draining"]
    done = survey(cluster)
    assert "\tdraining\t-\t" in done.stdout and done.returncode == 0
    assert done.stderr == "cexec: all of them are draining: they take no more jobs\n"
    words = shlex.join(cluster.argv("cexec", "-l", cluster.pub))
    shown = cluster.do(["script", "-qec", words, "/dev/null"])
    assert b" 1/2 draining " in shown.stdout
    late = cluster.client(env={"CEXEC_TIMEOUT_ACCEPT": "1"})
    assert late.returncode == 111 and b"no worker answered" in late.stderr
    assert outcome(job) == (b"", b"") and worker.wait(PATIENCE) == 0


def test_list_says_the_true_cause_first_where_others_share_the_network(cluster):
    """Workers of other applications are one line then, and no advice; without a cause they are the clue."""
    cluster.worker("cat", options=("-x", "bob"))
    for name in ("other", "another"):
        cluster.run("ckeygen", cluster.path(name), check=True)
        cluster.worker("cat", key=cluster.path(name))
    cluster.run("ckeygen", "-n", "bob", cluster.key, cluster.path("bob.pub"), check=True)
    words = read(cluster.pub).decode().split()
    put(cluster.path("wrong.pub"), " ".join(words[:4] + ["ab" * 32] + words[5:]))
    for pub, cause in (("bob.pub", "a worker that refuses the client bob"), ("wrong.pub", "cannot verify wrong.pub")):
        lines = survey(cluster, pub=cluster.path(pub)).stderr.splitlines()
        assert cause in lines[1], lines
        foreign = [line for line in lines if "other application" in line]
        assert len(foreign) == 1 and "key" not in foreign[0] and foreign[0] == lines[-1], lines
    put(cluster.path("foreign.pub"), " ".join(words[:3] + ["ab" * 8] + words[4:]))
    lines = survey(cluster, pub=cluster.path("foreign.pub")).stderr.splitlines()
    assert sum("its key is another one" in line for line in lines) == 3, lines


def test_list_through_a_proxy(hosts):
    left = hosts.lan("left", ["client", "gate"], "10.77.0")
    right = hosts.lan("right", [left["gate"], "worker"], "10.78.0")
    hosts.worker("cat", space=right["worker"])
    hosts.proxy("10.78.0.1", space=left["gate"])
    out = output(survey(hosts, space=left["client"]), errors="")
    assert out.split("\t")[1] == "10.78.0.2"


def test_a_worker_answers_a_question_once_and_no_longer_than_it(cluster):
    cluster.worker("cat")
    with Asker(cluster) as asker:
        asker.udp.settimeout(1)
        for _ in range(3):
            asker.say(cexec.QUERY, padding=bytes(240))
        data = asker.udp.recv(2000)
        question = make_datagram(cexec.QUERY, asker.pub, asker.nonce, 1, strangers=1, padding=bytes(240))
        assert cexec.Datagram(data).kind is cexec.REPLY and len(data) <= len(question)
        with pytest.raises(socket.timeout):
            asker.udp.recv(2000)
    longest = filled(cexec.REPLY, host="h" * 64, address="f" * 39, version="9" * 10)
    assert len(make_datagram(cexec.REPLY, asker.pub, asker.nonce, 0, **longest)) <= len(question)
    assert len(make_datagram(cexec.DENY, asker.pub, asker.nonce, 0, **filled(cexec.DENY))) <= len(question)


def test_strangers_are_denied_only_if_they_ask_and_seldom(cluster):
    """A worker of another application says so five times a second, however often it is asked."""
    cluster.worker("cat")
    other = cluster.path("other")
    cluster.run("ckeygen", other, check=True)
    with Asker(cluster, pub=cexec.open_pub(other)) as asker:
        asker.udp.settimeout(1)
        asker.say(cexec.QUERY, padding=bytes(240))
        with pytest.raises(socket.timeout):
            asker.udp.recv(2000)
        began = time.monotonic()
        for _ in range(50):
            asker.say(cexec.QUERY, nonce=os.urandom(16), strangers=1, padding=bytes(240))
        count = 0
        with contextlib.suppress(socket.timeout):
            while True:
                assert cexec.Datagram(asker.udp.recv(2000)).kind is cexec.DENY
                count += 1
        assert 1 <= count <= 1 + (time.monotonic() - began) / cexec.DENY_SECONDS


def misconfigured(hosts, spaces, what):
    """(the pub to use, the environment) after one thing was made wrong; there is one worker."""
    client, worker, pub, env = spaces["client"], spaces["worker"], hosts.pub, {}
    if what == "another key":
        pub = hosts.path("other.pub")
        hosts.run("ckeygen", hosts.path("other"), pub, check=True)
    elif what == "refused":
        pub = hosts.path("bob.pub")
        hosts.run("ckeygen", "-n", "bob", hosts.key, pub, check=True)
    elif what == "wrong secret":
        words = read(hosts.pub).decode().split()
        pub = hosts.path("wrong.pub")
        put(pub, " ".join(words[:4] + ["ab" * 32] + words[5:]))
    elif what == "no network":
        ip("-n", client, "link", "set", "lan", "down")
        ip("-n", client, "link", "set", "lo", "down")
    elif what == "no route":
        env["GROUP"] = "10.99.0.1"
    elif what == "another port":
        env["GROUP"] = "255.255.255.255:3011"
    elif what == "firewall there":
        block(worker, "-p", "udp")
    elif what == "udp firewall here":
        block(client, "-i", "lan", "-p", "udp")
    elif what == "tcp firewall here":
        block(client, "-i", "lan", "-p", "tcp", "--syn")
    return pub, env


@pytest.mark.parametrize("what, answered, said", [
    ("nothing", True, ""),
    ("another key", False, "10.77.0.2: a worker of another application, .*its key is another one"),
    ("refused", False, r"10.77.0.2: a worker that refuses the client bob \(cservice -x\)"),
    ("wrong secret", False, "10.77.0.2: a worker of this application cannot verify wrong.pub: make the public key"),
    ("no network", False, "no network is up: only this machine was asked"),
    ("no route", False, r"nothing could be sent \(Network is unreachable\): is there a network"),
    ("another version there", False, r"10\.77\.0\.2 speaks protocol version 4, this is 3: copy one cexec.py to both"),
    ("another port", False, "do those of the workers let UDP to port 3011 in"),
    ("firewall there", False, "no other cexec was heard: is cservice running, in the same network, with the same"),
    ("udp firewall here", False, "workers connect to us, but their datagrams do not arrive: let UDP"),
    ("tcp firewall here", True, "the workers answer, but their connections do not arrive: let TCP"),
])
def test_list_says_what_is_wrong(hosts, spaces, what, answered, said):
    usual = hosts.launch
    if what == "another version there":
        altered(hosts, PROTOCOL=cexec.PROTOCOL + 1)
    hosts.worker("cat", options=("-x", "bob"), space=spaces["worker"])
    hosts.launch = usual
    pub, env = misconfigured(hosts, spaces, what)
    done = survey(hosts, pub=pub, env=env, space=spaces["client"])
    assert (done.returncode, bool(done.stdout)) == ((0, True) if answered else (111, False)), done
    assert re.search(said, done.stderr) and bool(said) == bool(done.stderr), done.stderr
    if not answered and not what.startswith("no "):
        assert re.search(r"asked by way of .*lan \(10\.77\.0\.1\), from port \d+", done.stderr)
    job = hosts.run("cexec", pub, env=dict(env, CEXEC_TIMEOUT_ACCEPT="1"), space=spaces["client"])
    assert job.returncode == (0 if what in ("nothing", "udp firewall here") else 111)
    assert job.returncode == 0 or what.startswith("no ") or b"cexec -l finds out more" in job.stderr


@pytest.mark.parametrize("group", ["255.255.255.255", "10.77.0.2"], ids=["broadcast", "list"])
@pytest.mark.parametrize("ports", [None, "5000-5003"], ids=["any port", "some ports"])
def test_a_firewall_here_that_lets_only_answers_in(hosts, spaces, group, ports):
    """An answer to a broadcast is none for it, and no connection is.  This machine is named first."""
    hosts.worker("cat", space=spaces["worker"])
    let_in_answers_only(spaces["client"])
    env = {"GROUP": group, "CEXEC_LISTEN_PORTS": ports, "CEXEC_TIMEOUT_ACCEPT": "3"}
    here = "ports 5000-5003 (CEXEC_LISTEN_PORTS)" if ports else "port N (another each time: set CEXEC_LISTEN_PORTS)"
    listed = survey(hosts, env=env, space=spaces["client"])
    job = hosts.client(env=env, space=spaces["client"])
    assert (listed.returncode, job.returncode) == (111 if group == "255.255.255.255" else 0, 111)
    for said in (listed.stderr, job.stderr.decode()):
        said = re.sub(r"port (?!3010)\d+", "port N", said)
        if group == "10.77.0.2":
            assert "do not arrive: let TCP to %s in through the firewall of this machine, and TCP out " % here in said
        else:
            assert ("does the firewall of this machine let UDP and TCP to %s in? do those of the workers let UDP to "
                    "port 3010 in?" % here in said), said


def test_what_there_is_without_netlink(hosts):
    space = hosts.space("one")
    take_away(hosts, TAKEN_AWAY["AF_NETLINK"])
    hosts.shell_worker(space=space)
    done = hosts.run("cexec", "-l", hosts.pub, space=space)
    assert done.returncode == 0 and done.stdout
    hosts.proxy("127.0.0.2", "127.255.255.255:4000", space=space)
    assert signalled(hosts.started[0]) == 0
    done = hosts.run("cexec", "-l", hosts.pub, space=space)
    assert done.returncode == 111 and b"no worker answered on 255.255.255.255" in done.stderr
    assert b"internal error" not in done.stderr


@pytest.mark.parametrize("options, words", [
    (["-l"], []), (["-b", "9"], []), (["-m", "-n"], [":::", "1"]), (["-m", "-o", "-"], ["--", PROGRAM]), (["-A"], [])])
def test_modes_that_print_with_standard_output_closed(cluster, options, words):
    """Nothing runs: its output would be lost."""
    cluster.worker("cat")
    cluster.launch = ["sh", "-c", 'exec "$@" >&-', "sh"] + cluster.launch
    refusal(cluster.run("cexec", *options, cluster.pub, *words, input=b"line"), 100,
            "standard output is closed: open it, as with > file")


# ---- cexec -m: a batch of files --------------------------------------------

def kill_with_supervisors(worker):
    """As if its host had lost power; one of its supervisors may have ended just now."""
    for pid in [worker.pid, *children_of(worker.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def start_batch(cluster, *files, options=(), variables=(), **rest):
    return cluster.follow("cexec", *batch_words(cluster, files, options, variables), **rest)


def begun(cluster):
    """The files that workers have begun, oldest first."""
    with contextlib.suppress(FileNotFoundError):
        return read(cluster.path("runs")).split(b"\0")[:-1]
    return []


def parts(directory):
    return [name for name in os.listdir(directory) if os.fsencode(name).endswith(b".part")]


def rows_of_log(path):
    """The rows of a job log as dictionaries; its heads come first and once."""
    heads, *lines = os.fsdecode(read(path)).split("\n")[:-1]
    assert heads.split("\t") == "Seq Host Starttime JobRuntime Send Receive Exitval Signal Command".split()
    return [dict(zip(heads.split("\t"), line.split("\t"))) for line in lines]


ODD_NAMES = [
    b"plain", b"with space", b'quote\'d "twice"', b"two\nlines", b"-dash", b"--", b"$(touch oops)", b"\xff\xfe bytes",
    "größe".encode(), b"tab\there", b"{}", b"{.}.x", b"a.b.c", b".hidden", b"back\\slash", b"*?[x]", b"%s%d"]


def five_hundred(directory):
    """Makes the files, of 0 bytes to 200 MB: their names, as bytes."""
    chance, block = random.Random(3), os.urandom(1 << 20)
    names = []
    for number in range(FILES):
        odd = ODD_NAMES[number % len(ODD_NAMES)]
        name = (b"fail" if number % 150 == 149 else b"") + odd + (b"%d" % number if number >= len(ODD_NAMES) else b"")
        size = {0: 0, 100: BIG}.get(number, int(10 ** chance.uniform(0, 5)))
        start = chance.randrange(len(block))
        with open(os.path.join(os.fsencode(directory), name), "wb") as file:
            file.write(block[start:start + min(size, 99999)])
            file.truncate(size)
        names.append(name)
    return names


@HEAVY
def test_five_hundred_files_a_kill_and_an_interrupt(cluster):
    """Every output is right, none half there, none made twice that was whole; the log and the status are exact."""
    command = NOTED + 'case "$PEER_FILE" in fail*) echo no such luck >&2; exit 7;; esac; cat; echo the end'
    os.mkdir(cluster.path("in"))
    os.mkdir(cluster.path("out"))
    names = five_hundred(cluster.path("in"))
    workers = [cluster.worker("sh", "-c", command, env={"CONCURRENCY": "2"}) for _ in range(3)]
    words = ["-o", cluster.path("out") + "/{/}.done", "--log", cluster.path("log")]
    place = os.fsencode(cluster.path("in"))

    def client():
        return start_batch(cluster, *names, options=words, cwd=place)

    def whole():
        return set(os.listdir(os.fsencode(cluster.path("out"))))

    first = client()
    until(lambda: len(begun(cluster)) >= 180 or first.poll() is not None, "much of the batch")
    assert signalled(first, signal.SIGINT) == -signal.SIGINT
    done = whole()
    assert not parts(cluster.path("out")) and 100 < len(done) < FILES
    assert first.said().splitlines()[-1] == (
        "cexec: interrupted: %d of 500 files are done; the same command again does the rest" % len(done))
    rows = rows_of_log(cluster.path("log"))
    assert {names[int(row["Seq"]) - 1] + b".done" for row in rows if row["Exitval"] == "0"} == done
    until(lambda: not any(children_of(worker.pid) for worker in workers), "the commands' end")
    before = collections.Counter(begun(cluster))

    second = client()
    until(lambda: len(begun(cluster)) >= 360, "more of the batch")
    kill_with_supervisors(workers[2])
    assert second.wait(PATIENCE * 2) == FAILING, second.said()
    good = [name for name in names if not name.startswith(b"fail")]
    assert whole() == {name + b".done" for name in good} and not parts(cluster.path("out"))
    for name in good:
        made = read(os.path.join(os.fsencode(cluster.path("out")), name + b".done"))
        assert made == read(os.path.join(place, name)) + b"the end\n", name
    assert second.said().count("exit status 7\nno such luck\n") == FAILING

    after = collections.Counter(begun(cluster))
    for name in good:
        assert after[name] == before[name] == 1 or name + b".done" not in done, name
    twice = sum(after[name] - 1 for name in good)
    print("begun again: %d" % twice)
    assert twice <= 6 + 2               # what was under way at the interrupt, and what at the kill
    rows = rows_of_log(cluster.path("log"))
    ends = collections.Counter((int(row["Seq"]), row["Exitval"], row["Signal"]) for row in rows)
    assert {row for row in ends if row[1] != "7"} == {(n + 1, "0", "0") for n in range(FILES) if names[n] in good}
    assert all(count == 1 for row, count in ends.items() if row[1] != "7")
    assert {row[0] for row in ends if row[1] == "7"} == {150, 300, 450} and len(ends) == FILES
    assert sum(int(row["Send"]) for row in rows if row["Seq"] == "101") == BIG
    assert sum(int(row["Receive"]) for row in rows if row["Seq"] == "101") == BIG + 8

    assert client().wait(PATIENCE) == FAILING
    assert collections.Counter(begun(cluster)) - after == {name: 1 for name in names if name not in good}
    no_defect(*(read(worker.log) for worker in workers[:2]))


def test_outputs_are_named_as_parallel_names_them():
    need("parallel")
    parts_of_names = [
        "a", "a.b", "a.b.c", ".a", ".a.b", "a.", "..a", "a b", "a'b\"c", "-a.x", "ä.ö", "a\nb.c\nd", "{.}", "%s.x",
        "$x.y", "a\\b.c", "a..b", "a.b c", "~.x", "*.?", "a.tar.gz", "x=1.y", "nl.\n", "n.l\n", "#.#", "&;.|"]
    names = [*parts_of_names, *("d/" + part for part in parts_of_names), *("/d.e/" + part for part in parts_of_names),
             *("./" + part for part in parts_of_names[:8]), *("../d.e/" + part for part in parts_of_names[:8]),
             "/a", "/a.b", "d//a.b", "d.x/a", "d/.x/a", "a/", "a//", "d/a/", "d//a/", "/a/", "/", "//", "./a.b/", "../"]
    patterns = [
        "{}", "{.}", "{/}", "{//}", "{/.}", "{.}.ogg", "x{/.}y{/}z{}", "out/{//}/{/.}.x", "{}{}", "{ }", "{..}", "{",
        "}"]
    told = (
        subprocess.run(
            ["parallel", "--will-cite", "-0", "-k", "-j4", "-q", "printf", "%s\\0", *patterns], check=True,
            input="\0".join(names).encode() + b"\0", stdout=subprocess.PIPE)
        .stdout.decode()
        .split("\0")[:-1]
    )
    ours = [cexec.fill_pattern(pattern, [name]) for name in names for pattern in patterns]
    assert len(told) == len(ours)
    different = [(name, pattern, cexec.fill_pattern(pattern, [name]), theirs) for (name, pattern), theirs in
                 zip(((name, pattern) for name in names for pattern in patterns), told)
                 if cexec.fill_pattern(pattern, [name]) != theirs]
    assert not different


@pytest.mark.parametrize("options, text", [((), b"f000\n\nf001\nf 2"), (("-0",), b"f000\0f001\0\0f 2\0")])
def test_names_on_standard_input(cluster, options, text):
    made_files(cluster, 2)
    make_file(cluster, "f 2", b"2")
    cluster.worker("tr", "0-9", "a-j")
    output(batch(cluster, "-", options=options, input=text))
    assert [read(cluster.path(name)) for name in ("f000.out", "f 2.out")] == [b"a\n", b"c"]
    assert os.path.exists(cluster.path("f001.out"))


@pytest.mark.parametrize("options, end", [((), b"\n"), (("-0",), b"\0"), (("-n", "-o", "{}.out"), b"\n")])
def test_names_begin_as_they_come(cluster, options, end):
    """Each is done while the pipe stays open; the last needs no end of its own."""
    made_files(cluster, 3)
    cluster.worker("sh", "-c", "cat; echo $PEER_FILE")
    client = start_batch(cluster, "-", options=options, stdin=subprocess.PIPE)
    for number in range(3):
        client.stdin.write(b"f%03d" % number + end * (number < 2))
        client.stdin.flush()
        if number == 2:
            client.stdin.close()
        until(lambda: os.path.exists(cluster.path("f%03d.out" % number)), "the output")
        assert read(cluster.path("f%03d.out" % number)).endswith(b"f%03d\n" % number)
    assert client.wait(PATIENCE) == 0 and client.said() == ""


def test_a_list_that_grows_is_a_queue(cluster):
    """With tail -f, as the manual has it; the outputs are printed as they come, in the order of the names."""
    need("tail")
    cluster.worker("sh", "-c", "sleep 0.$((3 - PEER_FILE)); echo did $PEER_FILE")
    make_file(cluster, "list", b"0\n")
    with subprocess.Popen(["tail", "-n", "+1", "-f", cluster.path("list")], stdout=subprocess.PIPE) as tail:
        client = cluster.start("cexec", "-mn", cluster.pub, "--", "-", stdin=tail.stdout, stdout=subprocess.PIPE)
        said = b""
        for numbers in ([], [1, 2], [3]):
            with open(cluster.path("list"), "ab") as file:
                file.write(b"".join(b"%d\n" % number for number in numbers))
            for number in numbers or [0]:
                said = client.stdout.readline()
                assert said == b"did %d\n" % number
        tail.terminate()
        assert client.wait(PATIENCE) == 0 and client.stdout.read() == b""


@pytest.mark.parametrize("options, names, said", [
    ((), ["a", "./a", "b"], ["./a: -o {}.out: a and ./a would both be written to ./a.out"]),
    ((), ["a", "a.out", "b"], ["a.out: a.out: it is written by a"]),
    ((), ["d/a", "none/a", "b"], ["none/a: No such file or directory"]),
    (("-n", "-o", "{}.out"), ["d/a", "none/a", "b"],
     ["none/a: -o {}.out: there is no directory none (mkdir -p makes one)"]),
    (("-n", "-o", "{/}"), ["1/x", "2/x", "b"], ["2/x: -o {/}: 1/x and 2/x would both be written to x"])])
def test_names_that_collide_fail_when_they_come(cluster, options, names, said):
    """The earlier ones have begun already, and what they have made stays."""
    os.mkdir(cluster.path("d"))
    for name in ("a", "b", "d/a"):
        make_file(cluster, name, name.encode())
    cluster.worker("sh", "-c", "cat; echo $PEER_FILE")
    client = start_batch(cluster, "-", options=options, stdin=subprocess.PIPE)
    first, last = (os.path.basename(name) if "{/}" in options else name + ".out" for name in (names[0], names[-1]))
    client.stdin.write(names[0].encode() + b"\n")
    client.stdin.flush()
    until(lambda: os.path.exists(cluster.path(first)), "the first output")
    made = read(cluster.path(first))
    client.communicate("\n".join(names[1:]).encode(), timeout=PATIENCE)
    assert client.returncode == len(said) and client.said().splitlines() == ["cexec: " + line for line in said]
    assert read(cluster.path(first)) == made and os.path.exists(cluster.path(last))


@pytest.mark.parametrize("first, second", [("d/x", "d"), ("d", "d/x"), ("d/e/x", "d"), ("d", "d/e/x"), ("d", "./d")])
def test_results_in_those_of_a_job_that_came_before(farm, first, second):
    """A directory of -g is replaced as a whole: so nothing of another job may be in it."""
    farm.serve()
    client = farm.start("cexec", "-m", "-n", "-g", "{}", farm.pub, "sh", "-c",
                        'case {} in */x) mkdir -p "$(dirname {})"; echo > {};; *) mkdir {}; echo > {}/y;; esac', "--",
                        "-", cwd=farm.desk, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    client.stdin.write(first.encode() + b"\n")
    client.stdin.flush()
    made = first if first.endswith("x") else first + "/y"
    until(lambda: os.path.exists(os.path.join(farm.desk, made)), "the first result")
    errors = client.communicate(second.encode() + b"\nfree/x\n", timeout=PATIENCE)[1].decode()
    assert client.returncode == 1 and errors.startswith("cexec: %s: " % second) and errors.count("\n") == 1
    assert sorted(contents(farm.desk)) == sorted([made, "free/x"]) and all_gone(farm)


def test_an_output_whose_name_comes_later_is_no_input(farm):
    """Although -i has listed it before."""
    farm.serve()
    for name in ("d/in", "d/1.out", "d/2.out"):
        in_desk(farm, name)
    done = farm.work("-m", "-n", "-f", "-i", "d", "-o", "d/{}.out", farm.pub, "ls", "d", "--", "-", input=b"1\n2\n")
    assert ended(done) == (0, b"", b"")
    assert contents(farm.desk) == {"d/in": "x", "d/1.out": "in\n", "d/2.out": "in\n"}


def test_an_open_list_ends_at_halt(cluster):
    cluster.worker("false")
    client = start_batch(cluster, "-", options=["-n", "--halt", "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    client.stdin.write(b"a\n")
    client.stdin.flush()
    assert client.wait(PATIENCE) == 1
    assert client.said() == ("cexec: a at %s: exit status 1\ncexec: stopped after 1 failures (--halt); "
                             "0 of 1+ jobs are done\n" % socket.gethostname())
    client.stdin.close()


def test_a_list_that_is_no_list_is_refused(cluster):
    done = batch(cluster, "-", stdin=open("/dev/zero", "rb"))
    refusal(done, 100, "standard input: a name of more than 6 MiB")


def test_names_with_zeros_need_no_dash(cluster):
    make_file(cluster, "two\nlines", b"1")
    cluster.worker("cat")
    done = cluster.run("cexec", "-m0", "-o", "{}.x", cluster.pub, input=b"two\nlines\0")
    assert (done.returncode, done.stderr, read(cluster.path("two\nlines.x"))) == (0, b"", b"1")


def test_names_that_can_not_be(cluster):
    make_file(cluster, "good", b"in")
    cluster.worker("cat")
    done = batch(cluster, "-", input=b"a\0b\na\0/b\ngood\n" + b"n" * 300 + b"\n")
    assert done.returncode == 3 and read(cluster.path("good.out")) == b"in"
    said = done.stderr.decode().splitlines()
    for name, line in zip(("a\\x00b", "a\\x00/b"), said):
        assert line.startswith("cexec: %s: " % name) and re.search("null (byte|character)", line), said
    assert said[2:] == ["cexec: %s: File name too long" % ("n" * 300), "cexec: 3 failed, 3 here: "
                        "a null character is in it (2), File name too long (1)"]


def test_no_names_are_no_work(cluster):
    for words in (["-"], []):
        assert batch(cluster, *words, input=b"").returncode == 0
    refusal(cluster.run("cexec", "-m", cluster.pub), 100, "no files are named")
    output(cluster.run("cexec", *batch_words(cluster, ["-"]), stdin=None, preexec_fn=lambda: os.close(0)))
    unreadable = os.open(os.devnull, os.O_WRONLY)
    refusal(
        cluster.run("cexec", *batch_words(cluster, ["-"]), stdin=unreadable), 111, "standard input: Bad file descriptor"
    )
    os.close(unreadable)


LISTS = [
    [["a/b.c", "d"], ["x/y.z", "w", ""]],
    [["1", "2", "3"]],
    [["a b", "{1}", "$x", "-"], ["--", "\n"], ["ä", ".h", "a.tar.gz"]],
]
LIST_PATTERNS = ["{}", "{.}", "{/}", "{//}", "{/.}", "{1}", "{2}", "{1.}", "{2/}", "{2//}", "{1/.}", "{3}", "{-1}",
                 "{-1/.}", "{01}", "x{2}-{1}.{}", "{#}", "{a}", "{1", "x{#}y{#}{"]


def behind_colons(lists):
    return [word for values in lists for word in (":::", *values)]


@pytest.mark.parametrize("lists", LISTS, ids=["two", "one", "three"])
def test_crossed_lists_as_parallel_has_them(cluster, lists):
    """The same jobs in the same order, with the same fills, of arguments and, with variables, too."""
    need("parallel")
    told = subprocess.run(["parallel", "--will-cite", "-0k", "-j4", "-q", "printf", "%s\\0", *LIST_PATTERNS,
                           *behind_colons(lists)], check=True, stdout=subprocess.PIPE).stdout
    head, inputs = cexec.batch_inputs([*LIST_PATTERNS, *behind_colons(lists)], False)
    assert head == LIST_PATTERNS
    terms = cexec.BatchTerms([], [os.fsencode(word) for word in head])
    assert [word for number, given in enumerate(inputs, 1)
            for word in cexec.Task(terms, number, given, None).fill_words()[1]] == told.split(b"\0")[:-1]
    cluster.worker(*SHOW[:2], "import os, sys; sys.stdout.buffer.write(b''.join(os.fsencode(word) + b'\\0' "
                   "for word in [*sys.argv[1:], os.environ['PEER_X']]))", options=["-a"], env={"CONCURRENCY": "3"})
    done = cluster.run("cexec", "-mn", cluster.pub, "X=" + LIST_PATTERNS[-1], *LIST_PATTERNS[:-1],
                       *behind_colons(lists))
    assert (done.returncode, done.stderr, done.stdout) == (0, b"", told)


@pytest.mark.parametrize("words", [["x"], ["{#}"], ["{2}", "x"], ["{ }", "#"], ["x{.}"], ["-n"]])
def test_inputs_are_appended_as_parallel_does(cluster, words):
    """Not where an argument, or a variable, has a place, nor where there are no arguments."""
    need("parallel")
    lists = behind_colons([["a b", "c'd", ""], ["{}", "e"]])
    told = subprocess.run(["parallel", "--will-cite", "-k", "-q", "printf", "[%s]\\0", *words, *lists], check=True,
                          stdout=subprocess.PIPE).stdout
    cluster.worker(options=["-a"])
    assert output(cluster.run("cexec", "-mn", cluster.pub, "printf", "[%s]\\0", *words, *lists)) == told
    done = cluster.run("cexec", "-mn", "--dry-run", cluster.pub, "printf", *words, ":::", "a b")
    assert (b" 'a b'\n" in output(done)) == (words[0] in ("x", "{ }", "-n"))
    assert output(cluster.run("cexec", "-mn", cluster.pub, "X={}", "echo", "x", ":::", "a")) == b"x\n"
    assert output(cluster.run("cexec", "-mn", cluster.pub, "echo", "x", "--", "a")) == b"x\n"


def test_each_job_has_a_number_and_a_slot(cluster):
    """The slots as with parallel: none is used twice at a time, and no higher one than is needed."""
    need("parallel")
    cluster.worker(options=["-a"], env={"CONCURRENCY": "4"})
    script = "mkdir slot{%} && sleep 0.0{}; rmdir slot{%}; echo {#} {%} $PEER_S$S"
    values = list(map(str, range(1, 10)))
    told = subprocess.run(["parallel", "--will-cite", "-k", "-j3", "S={#}.{%};" + script, ":::", *values], check=True,
                          cwd=cluster.directory, stdout=subprocess.PIPE).stdout
    ours = output(cluster.run("cexec", "-mn", "-j", "3", cluster.pub, "S={#}.{%}", "sh", "-c", script, ":::", *values))
    for text in (told, ours):
        rows = [line.split() for line in text.decode().splitlines()]
        assert [row[0] for row in rows] == values and {row[1] for row in rows} == {"1", "2", "3"}
        assert all(row[2] == ".".join(row[:2]) for row in rows)
    for option in ("-o", "-i", "-g"):
        refusal(cluster.run("cexec", "-mn", option, "x{%}", cluster.pub, "x", ":::", "1"), 100, "x{%}: {%} is for arg")
    done = cluster.run("cexec", "-mn", "-o", "o{#}", cluster.pub, "echo", ":::", "a", "b")
    assert output(done) == b"" and [read(cluster.path(name)) for name in ("o1", "o2")] == [b"a\n", b"b\n"]


def test_each_block_has_a_number_and_a_slot_as_with_parallel(cluster):
    need("parallel")
    data = b"".join(b"%d\n" % number for number in range(200))
    script = "mkdir slot{%} && sleep 0.01; rmdir slot{%}; echo {#} {} {2} $(wc -l)"
    words = "parallel", "--will-cite", "--pipe", "-k", "-j3", "--block", "100", script
    told = subprocess.run(words, input=data, check=True, cwd=cluster.directory, stdout=subprocess.PIPE).stdout
    cluster.worker(options=["-a"], env={"CONCURRENCY": "4"})
    ours = output(cluster.run("cexec", "-b", "100", "-j", "3", cluster.pub, "sh", "-c", script, input=data))
    first = [[line.split()[0] for line in text.splitlines()] for text in (told, ours)]
    assert first[0] == first[1] and b"1 {} {2} " in ours


def test_what_stands_before_the_lists(cluster):
    """The first -- or ::: begins them; what would be misread is refused."""
    assert cexec.split_words(["x", ":::", "a", "--", "-"]) == (["x"], [["a", "--", "-"]])
    assert cexec.split_words(["x", "--", "a", "--", "b"]) == (["x"], [["a", "--", "b"]])
    assert cexec.batch_inputs(["x", ":::", "a", ":::"], False) == (["x"], [])
    for words in (["--", "a", ":::", "b"], [":::", "a", ":::+", "b"], ["::::", "a"]):
        refusal(cluster.run("cexec", "-m", cluster.pub, "--", *words), 100, "use either -- before one list, or :::")
    refusal(cluster.run("cexec", "-m0", cluster.pub, ":::", "a"), 100, "-0 is for names on standard input")
    assert ended(cluster.run("cexec", "-mn", cluster.pub, ":::", "a", ":::")) == (0, b"", b"")


def test_files_of_outputs_without_names_are_used_again_and_are_empty_then():
    terms, files = cexec.BatchTerms([], values=True), set()
    for number, size in enumerate((cexec.FRAME_MAX + 1, 0, 10, 1000)):
        task = cexec.Task(terms, number, ("value",), None)
        task.open()
        for file in (task.result, task.errors):
            assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == os.fstat(file.fileno()).st_size == 0
            os.write(file.fileno(), bytes(size))
            files.add(file)
        task.discard()
        assert (task.result, task.errors) == (None, None)
    assert len(files) == 2
    for file in files:
        file.close()


def test_each_value_has_its_own_output_however_long_the_one_before_was(cluster):
    cluster.worker("sh", "-c", "yes $PEER_FILE | head -c $PEER_FILE; yes $PEER_FILE | head -c $((PEER_FILE / 2)) >&2")
    sizes = [300000, 7, 0, 5000, 1, 90000, 2] * 3

    def said(size, times):
        return (b"%d\n" % size * size)[:times]
    done = cluster.run("cexec", "-mn", cluster.pub, ":::", *map(str, sizes))
    assert done.returncode == 0 and done.stdout == b"".join(said(size, size) for size in sizes)
    assert sorted(part for part in re.split(rb"cexec: \d+: done, and said:\n", done.stderr) if part) == sorted(
        said(size, size // 2).rstrip(b"\n") + b"\n" for size in sizes if size > 1)


def test_values_are_not_read(cluster):
    """Standard input is empty, and a file of the value's name is only a name."""
    make_file(cluster, "a", b"in a")
    cluster.worker("sh", "-c", 'cat; echo "$PEER_FILE $PEER_X"')
    for words in ([":::", "a", "none"], ["--", "a", "none"]):
        done = cluster.run("cexec", "-m", "-n", cluster.pub, "X={}.{1}", *words)
        assert (done.returncode, done.stderr, done.stdout) == (0, b"", b"a a.a\nnone none.none\n")
    done = cluster.run("cexec", "-m0n", cluster.pub, "X={}", input=b"a\nb\0c\0")
    assert done.stdout == b"a\nb a\nb\nc c\n"
    done = cluster.run("cexec", "-mn", cluster.pub, "X={}", "--", "-", input=b"a\0b\nc\n")
    assert (done.returncode, done.stdout) == (1, b"c c\n")
    assert done.stderr == b"cexec: a\\x00b: a null character is in it\n"


def test_files_crossed_with_values(cluster):
    """Without -n the first list is of files, each read once for each value."""
    names = made_files(cluster, 3)
    cluster.worker("sh", "-c", 'echo "$PEER_FILE $PEER_X"; cat')
    words = ["cexec", "-m", "-o", "{1}-{2}", cluster.pub, "X={2}", ":::", *names, "missing", ":::", "1", "2"]
    done = cluster.run(*words)
    assert done.returncode == 2 and sorted(done.stderr.decode().splitlines()) == [
        "cexec: missing %d: missing: No such file or directory" % value for value in (1, 2)]
    for name in names:
        for value in "12":
            assert read(cluster.path("%s-%s" % (name, value))) == b"%s %s\n" % (
                name.encode(), value.encode()) + read(cluster.path(name))
    os.utime(cluster.path("f001-2"), (1000, 1000))
    assert b"f001-2" in cluster.run(*words[:2], "--dry-run", *words[2:]).stdout
    refusal(cluster.run("cexec", "-m", "-o", "{2}", *words[4:]), 100, "f000 1 and f001 1 would both be written to 1")


def test_values_are_resumed_by_their_outputs(cluster):
    cluster.worker("sh", "-c", NOTED + 'echo "$PEER_X"; [ "$PEER_X" != 2-b ] || [ -e go ]')
    words = ["-mn", "-o", "r/{1}-{2}", "--log", "log", cluster.pub, "X={1}-{2}", *behind_colons(["123", "ab"])]
    refusal(cluster.run("cexec", *words), 100, "there is no directory r (mkdir -p makes one)")
    os.mkdir(cluster.path("r"))
    done = cluster.run("cexec", *words)
    assert (done.returncode, done.stderr.decode()) == (1, "cexec: 2 b at %s: exit status 1\n" % NODE)
    assert len(begun(cluster)) == 6
    make_file(cluster, "go")
    done = cluster.run("cexec", "--dry-run", *words)
    assert done.stdout.decode() == "cexec -n %s X=2-b FILE=2 > r/2-b\n" % cluster.pub
    assert cluster.run("cexec", *words).returncode == 0 and len(begun(cluster)) == 7
    assert {name: read(cluster.path("r/" + name)) for name in os.listdir(cluster.path("r"))} == {
        "%s-%s" % pair: b"%s-%s\n" % tuple(map(str.encode, pair)) for pair in itertools.product("123", "ab")}
    rows = rows_of_log(cluster.path("log"))
    assert sorted((row["Seq"], row["Command"], row["Exitval"]) for row in rows) == [
        ("1", "1 a", "0"), ("2", "1 b", "0"), ("3", "2 a", "0"), ("4", "2 b", "0"), ("4", "2 b", "1"),
        ("5", "3 a", "0"), ("6", "3 b", "0")]
    refusal(cluster.run("cexec", "-mn", "-o", "{1}", *words[5:]), 100, "1 a and 1 b would both be written to 1")


def test_five_hundred_values_while_a_worker_is_killed(cluster):
    workers = [cluster.worker("sh", "-c", 'sleep 0.01; echo "$PEER_X"', env={"CONCURRENCY": "2"}) for _ in range(3)]
    with open(cluster.path("all"), "wb") as output:
        client = cluster.start("cexec", "-mn", "--log", "log", cluster.pub, "X={2}{1}", *behind_colons(
            ["abcde", map(str, range(100))]), stdout=output)
    until(lambda: os.path.getsize(cluster.path("all")) > 300, "some of it")
    for victim in (*children_of(workers[0].pid), workers[0].pid):
        os.kill(victim, signal.SIGKILL)
    assert client.wait(PATIENCE) == 0
    assert read(cluster.path("all")).decode().split() == [
        "%d%s" % (number, letter) for letter in "abcde" for number in range(100)]
    assert len(rows_of_log(cluster.path("log"))) == 500


@pytest.mark.parametrize("lists", [[100000], [1000, 100]], ids=["one list", "crossed"])
def test_a_hundred_thousand_values(cluster, lists):
    """Are begun at once, and fit in little memory."""
    cluster.worker("sh", "-c", NOTED + "sleep 1000", env={"CONCURRENCY": "2"})
    words = behind_colons([map(str, range(count)) for count in lists])
    client = cluster.start("cexec", "-mn", cluster.pub, "X={1}", *words)
    until(lambda: len(begun(cluster)) == 2, "the first two")
    assert rss(client.pid) < 150000000
    assert signalled(client) == -signal.SIGTERM
    with_outputs = cluster.run("cexec", "-mn", "--dry-run", "-o", "{}.x", cluster.pub, *words)
    assert with_outputs.returncode == 0 and with_outputs.stdout.count(b"\n") == 100000


def test_what_is_done_is_left_alone(cluster):
    names = ["older", "equal", "newer", "none", "empty"]
    for name in names:
        make_file(cluster, name, b"in")
        if name != "none":
            make_file(cluster, name + ".out", b"" if name == "empty" else b"before")
        os.utime(cluster.path(name), (1000, 1000))
    for name, when in (("older", 999), ("equal", 1000), ("newer", 1001), ("empty", 1001)):
        os.utime(cluster.path(name + ".out"), (when, when))
    cluster.worker("sh", "-c", NOTED + "echo after")
    assert batch(cluster, *names).returncode == 0
    assert sorted(begun(cluster)) == [b"none", b"older"]
    assert [read(cluster.path(name + ".out")) for name in names] == [b"after\n", b"before", b"before", b"after\n", b""]
    assert batch(cluster, *names).returncode == 0 and len(begun(cluster)) == 2
    assert batch(cluster, *names, options=["-f"]).returncode == 0 and len(begun(cluster)) == 7
    assert {read(cluster.path(name + ".out")) for name in names} == {b"after\n"}


@pytest.mark.parametrize("pattern, files, message", [
    ("same", ["f000", "f001"], "-o same: f000 and f001 would both be written to same"),
    ("{.}.x", ["f000.a", "f000.b"], "f000.a and f000.b would both be written to f000.x"),
    ("out/{/}", ["f000", "d/f000"], "f000 and d/f000 would both be written to out/f000"),
    ("{}.out", ["f000", "./f000"], "f000 and ./f000 would both be written to ./f000.out"),
    ("{}", ["f000"], "-o {}: f000 would be overwritten"),
    ("./{}", ["f000"], "f000 would be overwritten"),
    ("link/{/}", ["d/f000"], "d/f000 would be overwritten"),
    ("{.}", ["f000.a", "f000"], "f000 would be overwritten"),
    ("x{}", ["f000", "xf000"], "xf000 would be overwritten"),
    ("/dev/null", ["f000"], "/dev/null is no regular file"),
    ("d", ["f000"], "d is no regular file"), ("out/", ["f000"], "out/ is no regular file"),
    ("", ["f000"], "an empty name is no regular file")])
def test_outputs_that_clash_are_refused_and_nothing_is_done(cluster, pattern, files, message):
    os.makedirs(cluster.path("d"))
    os.makedirs(cluster.path("out"))
    os.symlink("d", cluster.path("link"))
    for name in ("f000", "f001", "f000.a", "f000.b", "d/f000"):
        make_file(cluster, name, b"in")
    before = sorted(os.listdir(cluster.directory))
    refusal(batch(cluster, *files, options=["-o", pattern]), 100, message)
    assert sorted(os.listdir(cluster.directory)) == before and not os.listdir(cluster.path("out"))
    assert read(cluster.path("d/f000")) == read(cluster.path("f000")) == b"in" and not os.path.isfile("/dev/null")


REFUSED = """
    -m -o b P -- l/a                            | -o b: l/a would be overwritten
    -m -o l/a P -- a                            | -o l/a: a would be overwritten
    -m -o hard P -- a                           | -o hard: a would be overwritten
    -m -o d/../l/../here/a P -- b               | -o d/../l/../here/a: b would be overwritten
    -m -o .//a P -- "$PWD/a"                    | /here/a would be overwritten
    -m -f -o new P -- d/x new                   | -o new: new would be overwritten
    -mn -i a -o {} P -- a                       | -o {}: a would be overwritten
    -mn -i {1} -o {2} P ::: l/a ::: b           | -o {2}: l/a would be overwritten
    -mn -f -i d -g ld P -- 1                    | -g ld: d would be overwritten
    -mn -i d/x -g d P -- 1                      | -g d: d/x would be overwritten
    -mn -i ld/x -g d P -- 1                     | -g ld: ld/x would be overwritten
    -mn -i d/e/y -g ld P -- 1                   | would be overwritten
    -mn -i le/y -g d P -- 1                     | -g %: le/y would be overwritten
    -m -o {2} P ::: a ::: n ../here/n           | -o {2}: a n and a ../here/n would both be written to ../here/n
    -m -o {2} P ::: a ::: d/new ld/new          | -o {2}: a d/new and a ld/new would both be written to ld/new
    -mn -g {} P ::: r r/s/t                     | -g r: r/s/t and r would both be written to r/s/t
    -mn -g {} P ::: d/e/new d                   | -g d: d/e/new and d would both be written to d/e/new
    -mn -o d/{} -g d P -- 1 2                   | -g d: 1 and 2 would both be written to d
    -mn -o {} --errors . P ::: 7 2 8            | --errors .: 2 and the errors of job 2 would both be written to ./2
    -m -o - --errors ld P -- d/1                | --errors ld: d/1 would be overwritten
    -m -o - --errors h P -- hard                | --errors h: hard would be overwritten
    -mn -i d/1 --errors d P ::: x               | --errors d: d/1 would be overwritten
    -mn -g d/{} --errors d P ::: 1              | --errors d: 1 and the errors of job 1 would both be written to d/1
    -mn -g d --errors d/e P ::: 1               | -g d: the files of --errors d/e would be in it
    -m -o - --log b P -- a                      | --log b: a would be overwritten
    -m -o - --log hard P -- l/a                 | --log hard: l/a would be overwritten
    -mn -i a --log b P -- 1                     | --log b: a would be overwritten
    -mn -o {} --log n P -- n                    | -o {}: --log and n would both be written to n
    -m --log d/x -o - P -- a 1<> d/x            | --log d/x: standard output (without >>) and --log would both be
    -mn -g d --log d/log P -- 1                 | -g d: --log and 1 would both be written to d/log
    -mn --errors d --log d/1 P -- 1             | --errors d: --log and the errors of job 1 would both be written to d/1
    -m -o .{}.part P -- a .a.part               | -o .{}.part: .a.part would be overwritten
    -mn -o {} P -- new .new.part                | -o {}: new and .new.part would both be written to .new.part
    -b 4 --errors d P < d/1                     | --errors d: standard input would be overwritten
    -b 4 --log b P < a                          | --log b: standard input would be overwritten
    -b 4 P < a >> b                             | standard output: standard input would be overwritten
    -b 4 --errors d P >> d/3                    | --errors d: standard output and the errors of job 3 would both be
    -m -o b P -- d/x >> a                       | -o b: standard output and d/x would both be written to b
    -m -o - P -- d/x a >> hard                  | standard output: a would be overwritten
    -m --log b P -- - < a                       | --log b: standard input would be overwritten
    -m -o - --log k P -- a                      | --log k: the key ../app.pub would be overwritten
    -mn -o {} P -- k                            | -o {}: the key ../app.pub would be overwritten
    -b 4 --log k P < a                          | --log k: the key ../app.pub would be overwritten
    -mn -i key P -- 1                           | -i key: a private key is not sent
    -mn -i {} P -- d/x lk                       | -i lk: a private key is not sent
    -n -i key P                                 | -i key: a private key is not sent
"""


@pytest.mark.parametrize("line", REFUSED.strip().splitlines())
def test_one_file_under_two_names_is_refused(cluster, line):
    """Links, hard links, other spellings, directories: nothing is begun, and all that is there stays as it is."""
    words, _, said = line.partition("|")
    script = ("mkdir -p here/d/e here/h && cd here && for n in a d/x d/1 d/3 d/e/y; do echo $n > $n; done; "
              "ln -s a b; ln a hard; ln a h/1; ln -s . l; ln -s d ld; ln -s d/e le; ln -s key lk; "
              "cp ../app key; ln -s ../app.pub k; ls -lR > ../before; eval \"cexec $0\"; code=$?; "
              "ls -lR > ../after; cat a; exit $code")
    shell = "cexec() { %s \"$@\"; }; %s" % (shlex.join(cluster.argv("cexec")), script)
    done = cluster.do(["sh", "-c", shell, words.replace("{", "'{").replace("}", "}'").replace("P", "../app.pub", 1)])
    told = done.stderr.decode() + read(cluster.path("here/a")).decode()
    pattern = re.escape(said.strip()).replace("%", ".*")
    assert done.returncode == 100 and re.search(pattern, told), (done, told)
    assert read(cluster.path("before")) == read(cluster.path("after")) and done.stdout.endswith(b"a\n")


@pytest.mark.parametrize("line", [
    "-m -o {}.o P -- a b", "-mn -o r/{} P -- 1 2", "-mn -o r/{} --errors r P -- 7 8", "-mn -o one{} P -- 1 2",
    "-m -o - --errors 7 P -- a", "-mn -i d -o d/{} --errors d/e --log d/log P ::: 1 2", "-mn -i a -g b P ::: 1",
    "-mn -g r -g r/x P ::: 1", "-m --log log -o - P -- a >> log 2>&1", "-mn -o {} P -- x > log 2>&1",
    "-mn -i . -g {} P -- 1 2", "-mn -i . P -- 1"])
def test_names_that_only_look_alike_are_not_refused(cluster, line):
    """Old outputs that were made links to one file are two outputs still."""
    script = ("mkdir -p here/d/e here/r && cd here && for n in a b one1 d/x d/1; do echo $n > $n; done; "
              "ln one1 one2; eval \"cexec --dry-run $0\"")
    shell = "cexec() { %s \"$@\"; }; %s" % (shlex.join(cluster.argv("cexec")), script)
    done = cluster.do(["sh", "-c", shell, line.replace("{", "'{").replace("}", "}'").replace("P", "../app.pub", 1)])
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("names, said", [
    (["over", "up"], b"disk/up/.x.part: another job of this batch writes it"),
    (["over", "else", "up"], b"disk/up/x: the same file as a result of over")])
def test_two_names_that_become_one_file_when_they_are_written(cluster, names, said):
    """An overlay and what lies below it: neither name is there before, and their directories are not one."""
    need("root", "unshare", "mount")
    cluster.worker("sh", "-c", 'echo "$PEER_FILE"', env={"CONCURRENCY": "1"})
    os.mkdir(cluster.path("disk"))
    script = ('mount -t tmpfs none disk && cd disk && mkdir low up work over else && '
              'mount -t overlay -o lowerdir=low,upperdir=up,workdir=work none over && cd .. && "$@"; '
              'echo $?; cat disk/up/x; ls -A disk/up')
    words = cluster.argv("cexec", "-mn", "-j", "1", "-o", "disk/{}/x", cluster.pub, "--", *names)
    done = cluster.do(["unshare", "-m", "sh", "-c", script, "sh", *words])
    assert (done.stdout, done.stderr) == (b"1\nover\nx\n", b"cexec: up: " + said + b"\n")


def test_outputs_on_standard_output_keep_their_order(cluster):
    """The first is slow: not more than 256 others are done meanwhile, with no more than the usual descriptors."""
    names = made_files(cluster, 400)
    worker = cluster.worker(
        "sh", "-c", NOTED + '[ "$PEER_FILE" = f000 ] && while [ ! -e go ]; do sleep 0.05; done; cat',
        env={"CONCURRENCY": "4"})
    with open(cluster.path("all"), "wb") as output:
        client = start_batch(cluster, *names, options=["-o", "-"], stdout=output,
                             preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024)))
    until(
        lambda: len(begun(cluster)) >= cexec.OUTPUTS_MAX and len(children_of(worker.pid)) == 1, "the wait for the first"
    )
    assert len(begun(cluster)) == cexec.OUTPUTS_MAX and read(cluster.path("all")) == b""
    assert open_files(client.pid) < 256 + 40
    make_file(cluster, "go")
    assert client.wait(PATIENCE) == 0, client.said()
    assert read(cluster.path("all")) == b"".join(read(cluster.path(name)) for name in names)
    assert not parts(cluster.directory) and not [
        name for name in os.listdir(cluster.directory) if name.endswith(".out")
    ]


def test_failed_outputs_are_left_out_of_the_order(cluster):
    names = made_files(cluster, 9)
    cluster.worker("sh", "-c", 'echo half; case "$PEER_FILE" in *[258]) exit 3;; esac; cat', env={"CONCURRENCY": "3"})
    done = batch(cluster, *names, names[0], options=["-o", "-"])
    good = [name for name in [*names, names[0]] if name[-1] not in "258"]
    assert (done.returncode, done.stdout) == (3, b"".join(b"half\n" + read(cluster.path(name)) for name in good))


def test_reader_of_the_outputs_leaves(cluster):
    names = made_files(cluster, 60)
    worker = cluster.worker("sh", "-c", "cat; yes | head -c 100000")
    client = start_batch(cluster, *names, options=["-o", "-"], stdout=subprocess.PIPE)
    assert client.stdout.readline() == b"0\n"
    client.stdout.close()
    assert client.wait(PATIENCE) == -signal.SIGPIPE and client.said() == ""
    until(lambda: not children_of(worker.pid), "the end of the commands")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_nobody_reads_the_outputs(cluster, number):
    names = made_files(cluster, 3)
    worker = cluster.worker("sh", "-c", NOTED + "head -c 1000000 /dev/zero", env={"CONCURRENCY": "3"})
    client = start_batch(cluster, *names, options=["-o", "-"], stdout=subprocess.PIPE)
    until(lambda: len(begun(cluster)) == 3 and not children_of(worker.pid), "the end of the jobs")
    assert signalled(client, number) == -number
    assert client.said() == "cexec: interrupted: 3 of 3 files are done\n"


def test_a_batch_on_a_terminal(cluster):
    """A line below the others tells how far it is, who works and what has failed; nothing of it stays."""
    need("tmux", "bash")
    names = made_files(cluster, 5)
    command = ('until [ -e "go.$PEER_FILE" ]; do sleep 0.05; done; '
               'case $PEER_FILE in f001) echo oops >&2; exit 3;; esac; cat')
    for _ in range(2):
        cluster.worker("sh", "-c", command, env={"CONCURRENCY": "1"})

    def go(*files):
        for name in files:
            make_file(cluster, "go." + name)
    with contextlib.closing(Tmux(cluster)) as tmux:
        tmux.line("cd %s; clear; $RUN -m -j 2 $PUB -- f00?; echo sta'tus'=$?" % shlex.quote(cluster.directory))
        tmux.shows(r"^0/5 done, 2 running, 0 failed  %s\*2$" % NODE)
        go("f000")
        tmux.shows(r"^1/5 done, 2 running, 0 failed, \d+\.\d/s, \S+ left  %s\*2$" % NODE)
        go("f001")
        tmux.shows(r"^cexec: f001 at %s: exit status 3\noops\n1/5 done, 2 running, 1 failed, " % NODE)
        tmux.keys("C-c")
        tmux.shows(r"oops\ncexec: interrupted: 1 of 5 files are done; the same command again does the rest\n+here> *$")
        assert "running" not in tmux.screen()
        go(*names)
        tmux.line("clear; $RUN -m $PUB -- f00?; echo sta'tus'=$?", r"^cexec: 3 done, 1 failed, after \S+\nstatus=1$")
        assert "running" not in tmux.screen()
        tmux.line("clear; $RUN -m $PUB -- f000 f002; echo sta'tus'=$?",
                  r"\Acexec: nothing to do: all 2 files are done already \(-f does them again\)\nstatus=0$")
        tmux.line("clear; printf 'f000\\nf002' | $RUN -m $PUB -- -; echo sta'tus'=$?",
                  r"\Acexec: nothing to do: all 2 files are done already \(-f does them again\)\nstatus=0$")
        tmux.line("clear; { echo f000; cat; } | $RUN -mn $PUB -- -; echo sta'tus'=$?",
                  r"^1/1\+ done, 0 running, 0 failed, \d+\.\d/s, waits for names$")
        tmux.keys("C-d")
        tmux.shows(r"^cexec: 1 done, 0 failed, after \S+\nstatus=0$")
    assert sorted(name for name in os.listdir(cluster.directory) if name.endswith(".out")) == [
        name + ".out" for name in names if name != "f001"]


def test_a_silent_worker_of_a_batch_is_shown(cluster):
    """On the progress line until it is lost; then a terminal is told so, and the file runs elsewhere."""
    need("tmux", "bash")
    make_file(cluster, "f000")
    command = "until [ -e go ]; do sleep 0.05; done; cat"
    silent = cluster.worker("sh", "-c", command, env={"CONCURRENCY": "1"})
    with contextlib.closing(Tmux(cluster)) as tmux:
        tmux.line("cd %s; clear; CEXEC_TIMEOUT_PINGPONG=6 $RUN -m $PUB -- f000; echo sta'tus'=$?"
                  % shlex.quote(cluster.directory), r"^0/1 done, 1 running, 0 failed  %s\*1$" % NODE)
        supervisor, = until(lambda: children_of(silent.pid), "a job")
        os.kill(supervisor, signal.SIGSTOP)
        try:
            tmux.shows(r"%s\*1 \(f000: silent for \d s, lost after 6\)$" % NODE)
            make_file(cluster, "go")
            cluster.worker("sh", "-c", command, env={"CONCURRENCY": "1"})
            tmux.shows(r"^cexec: f000: worker %s lost: no sign of life for 6 s; runs the job again\n" % NODE)
            tmux.shows("^status=0$")
        finally:
            os.kill(supervisor, signal.SIGKILL)


@pytest.mark.parametrize("words", ["-n", "-np"])
def test_a_silent_worker_of_a_job_is_shown(cluster, words):
    """On a terminal, and the line is away when it is heard again; with -p on the line of the progress."""
    need("tmux", "bash")
    worker = cluster.worker("sh", "-c", "touch begun; until [ -e go ]; do sleep 0.05; done; echo here")
    with contextlib.closing(Tmux(cluster)) as tmux:
        tmux.line("cd %s; clear; CEXEC_TIMEOUT_PINGPONG=9 $RUN %s $PUB; echo sta'tus'=$?"
                  % (shlex.quote(cluster.directory), words))
        until(lambda: os.path.exists(cluster.path("begun")), "the job")
        supervisor, = children_of(worker.pid)
        os.kill(supervisor, signal.SIGSTOP)
        tmux.shows(r"^(worker )?%s.* silent for \d s, lost after 9$" % NODE)
        make_file(cluster, "go")
        os.kill(supervisor, signal.SIGCONT)
        tmux.shows("^status=0$")
        assert "silent" not in tmux.screen() and re.search("(?m)^here$", tmux.screen())


def test_failures_are_counted_and_told(cluster):
    """Each with its file's name and what its command said, as successful ones are told that said something."""
    command = ('echo "said $PEER_FILE" >&2; echo half; case "$PEER_FILE" in '
               "exit) exit 3;; killed) kill -KILL $$;; term) kill $$;; esac; cat")
    for name in ("good", "exit", "killed", "term", "fine"):
        make_file(cluster, name, b"in\n")
    os.mkdir(cluster.path("directory"))
    os.mkfifo(cluster.path("fifo"))
    cluster.worker("sh", "-c", command, env={"CONCURRENCY": "1"})
    names = ["good", "exit", "killed", "missing", "directory", "fifo", "term", "fine", "none/x"]
    done = batch(cluster, *names, options=["--log", "log"])
    assert done.returncode == 7
    assert sorted(re.split(r"(?=cexec: )", done.stderr.decode())[1:]) == sorted([
        "cexec: exit at %s: exit status 3\nsaid exit\n" % NODE,
        "cexec: killed at %s: killed by signal 9\nsaid killed\n" % NODE,
        "cexec: term at %s: killed by signal 15\nsaid term\n" % NODE, "cexec: missing: No such file or directory\n",
        "cexec: directory: not a regular file\n", "cexec: fifo: not a regular file\n",
        "cexec: good at %s: done, and said:\nsaid good\n" % NODE,
        "cexec: fine at %s: done, and said:\nsaid fine\n" % NODE, "cexec: none/x: No such file or directory\n",
        "cexec: 7 failed, 4 here, 3 at %s: No such file or directory (2), not a regular file (2), "
        "exit status 3 (1), ...\n" % NODE])
    left = sorted(name for name in os.listdir(cluster.directory) if ".out" in name or ".part" in name)
    assert left == ["fine.out", "good.out"] and read(cluster.path("fine.out")) == b"half\nin\n"
    ends = {row["Command"]: (row["Exitval"], row["Signal"]) for row in rows_of_log(cluster.path("log"))}
    assert ends == {
        "good": ("0", "0"), "fine": ("0", "0"), "exit": ("3", "0"), "killed": ("0", "9"), "term": ("0", "15"),
        "missing": ("111", "0"), "directory": ("111", "0"), "fifo": ("111", "0"), "none/x": ("111", "0")}


def test_what_is_said_ends_with_a_newline_and_nothing_is_nothing(cluster):
    names = made_files(cluster, 2)
    cluster.worker("sh", "-c", 'cat; if [ "$PEER_FILE" = f001 ]; then printf "no newline" >&2; fi')
    output(batch(cluster, *names), errors=b"cexec: f001 at %s: done, and said:\nno newline\n" % NODE.encode())


def test_errors_are_kept(cluster):
    """In a file for each number of --log, also of those that say nothing; a failure names its file."""
    names = made_files(cluster, 4)
    cluster.worker("sh", "-c", 'cat; case "$PEER_FILE" in f000) echo why >&2; exit 3;; f001) echo hm >&2;; '
                   'f002) exit 4;; esac')
    done = batch(cluster, *names, options=["--errors", "new/said", "--log", "log"])
    assert done.returncode == 2 and sorted(done.stderr.decode().splitlines()) == [
        "cexec: 2 failed, 2 at %s: exit status 3 (1), exit status 4 (1)" % NODE,
        "cexec: f000 at %s: exit status 3 (see new/said/1)" % NODE, "cexec: f002 at %s: exit status 4" % NODE]
    assert [read(cluster.path("new/said/%d" % number)) for number in (1, 2, 3, 4)] == [b"why\n", b"hm\n", b"", b""]
    assert {row["Seq"]: row["Command"] for row in rows_of_log(cluster.path("log"))} == {
        str(number): name for number, name in enumerate(names, 1)}
    refusal(batch(cluster, *names, options=["--errors", "f000/x"]), 111, "--errors f000/x: Not a directory")


def test_errors_of_the_run_that_counts_are_kept(cluster):
    """What a command said whose worker was lost is not."""
    names = made_files(cluster, 1)
    cluster.worker("sh", "-c", 'echo said >&2; [ -e lost ] || { touch lost; sleep 0.1; kill -KILL $PPID; }; cat')
    done = batch(cluster, *names, options=["--errors", "said"])
    assert done.returncode == 0 and read(cluster.path("said/1")) == b"said\n"


@pytest.mark.parametrize("failures", [1, 3])
def test_halt_after_so_many_failures(cluster, failures):
    """Nothing more is begun; what runs goes on, and the same command again does the rest."""
    names = made_files(cluster, 30)
    cluster.worker("sh", "-c", NOTED + 'case "$PEER_FILE" in *[02468]) exit 3;; esac; cat', env={"CONCURRENCY": "1"})
    done = batch(cluster, *names, options=["--halt", str(failures)])
    assert done.returncode == failures
    assert begun(cluster) == [name.encode() for name in names[:2 * failures - 1]]
    assert done.stderr.decode().splitlines()[-1] == (
        "cexec: stopped after %d failures (--halt); %d of 30 files are done; the same command again does the rest"
        % (failures, failures - 1))


def test_halt_lets_those_that_run_end(cluster):
    names = made_files(cluster, 30)
    cluster.worker("sh", "-c", NOTED + 'case "$PEER_FILE" in f001) exit 3;; esac; until [ -e go ]; do sleep 0.02; '
                   'done; cat', env={"CONCURRENCY": "3"})
    client = start_batch(cluster, *names, options=["--halt", "1", "-o", "-"], stdout=open(cluster.path("all"), "wb"))
    until(lambda: "exit status 3" in client.said(), "the failure")
    make_file(cluster, "go")
    assert client.wait(PATIENCE) == 1 and len(begun(cluster)) <= 4
    assert read(cluster.path("all")) == b"".join(
        read(cluster.path(name.decode())) for name in sorted(begun(cluster)) if name != b"f001")


def test_halt_counts_files_that_can_not_be_read(cluster):
    cluster.worker("cat")
    done = batch(cluster, *("no%d" % number for number in range(30)), options=["--halt", "2"])
    assert done.returncode == 2 and done.stderr.count(b"No such file") == 2
    refusal(batch(cluster, "f", options=["--halt", "0"]), 100, "--halt needs a number from 1")
    refusal(cluster.run("cexec", "--halt", "1", cluster.pub), 100, "--halt is for -m")


def test_dry_run_prints_what_would_be_done(cluster):
    """Without a worker: commands that do just that, for what is not done yet."""
    names = [*made_files(cluster, 3), "it's odd\n.x"]
    make_file(cluster, names[-1], b"odd")
    make_file(cluster, "f001.out")
    words = {"variables": ["X={/}", "-q", "{.}", "a b"]}
    done = batch(cluster, *names, options=["--dry-run", "--errors", "said", "--log", "log"], **words)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == "mkdir -p -- said\n" + "".join(
        "cexec %s %s %s -- -q %s 'a b' < %s > %s 2> said/%d\n" % (cluster.pub, *map(shlex.quote, (
            "X=" + name, "FILE=" + name, os.path.splitext(name)[0], name, name + ".out")), number)
        for number, name in enumerate(names, 1) if name != "f001")
    assert not os.path.exists(cluster.path("said")) and not os.path.exists(cluster.path("log"))
    cluster.worker(*SHOW, options=["-a"])
    shell = "cexec() { %s \"$@\"; }; . ./script" % shlex.join(cluster.argv("cexec"))
    make_file(cluster, "script", done.stdout)
    subprocess.run(["sh", "-c", shell], check=True, cwd=cluster.directory, env=cluster.environment())
    one = {name: read(cluster.path(name + ".out")) for name in names}
    assert batch(cluster, *names, options=["-f"], **words).returncode == 0
    assert {name: read(cluster.path(name + ".out")) for name in names if name != "f001"} == {
        name: data for name, data in one.items() if name != "f001"}
    done = batch(cluster, *names[:1], options=["--dry-run", "-f", "-o", "-"])
    assert done.stdout.decode() == "cexec %s FILE=f000 < f000\n" % cluster.pub


@pytest.mark.parametrize("call", ["fsync", "dup", "close"])
def test_output_that_does_not_get_to_the_disk_is_a_failure(cluster, call):
    """Where a full quota is told only then, as NFS does.  The output has no name, and is done next time."""
    names = made_files(cluster, 3)
    cluster.worker("cat")
    take_away(cluster, """
        def close(fd, inner=os.close):
            link = os.readlink("/proc/self/fd/%d" % fd)
            inner(fd)
            if ".f001.out.part" in link:
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        if "CALL" == "close":
            os.close = close
        else:
            refuse(os, "CALL", lambda fd: ".f001.out.part" in os.readlink("/proc/self/fd/%d" % fd), errno.EDQUOT)
        """.replace("CALL", call))
    output(batch(cluster, *names), 1, b"cexec: f001: Disk quota exceeded\n")
    assert sorted(name for name in os.listdir(cluster.directory) if "out" in name) == ["f000.out", "f002.out"]
    cluster.launch = [PYTHON, *BOOT, PROGRAM]
    assert batch(cluster, *names).returncode == 0 and os.path.exists(cluster.path("f001.out"))


def test_the_names_of_outputs_are_on_the_disk(cluster):
    """Once a directory; what can't be done is said."""
    names = made_files(cluster, 3)
    cluster.worker("cat")
    take_away(cluster, """
        refuse(os, "fsync", lambda fd: os.path.isdir("/proc/self/fd/%d" % fd), errno.EIO)
        """)
    output(batch(cluster, *names), 111, b"cexec: .: Input/output error\n")


def test_a_hundred_failures_and_more_are_101(cluster):
    cluster.worker("false")
    for count, status in ((1, 1), (99, 99), (100, 101), (130, 101)):
        assert batch(cluster, *("no%d" % number for number in range(count))).returncode == status


def supervisors(*workers):
    """How many supervisors these workers have had."""
    return sum(len(re.findall(rb"supervisor \d+ forked", read(worker.log))) for worker in workers)


def test_a_batch_whose_command_is_nowhere_stops_at_once(cluster):
    """With each host."""
    names = made_files(cluster, 5)
    for place in ("one", "two"):
        os.mkdir(cluster.path(place))
        cluster.worker(options=["-a"], env={"PATH": cluster.path(place), "CONCURRENCY": "1"})
    put(cluster.path("two/tool"), "", 0o644)
    done = batch(cluster, *names, variables=["tool", "{}"])
    cannot = "worker %s cannot run its command: " % NODE
    assert done.returncode == 126 and sorted(done.stderr.decode().replace("cexec: ", "").strip().split("; ")[:2]) == [
        cannot + "tool: No such file or directory", cannot + "tool: Permission denied"]
    assert done.stderr.endswith(b"; 0 of 5 files are done; the same command again does the rest\n")


def test_a_command_of_a_files_own_fails_alone(cluster):
    """Where it is not there; each file goes to the worker that has its command."""
    names = made_files(cluster, 6)
    for place, number in (("one", 1), ("two", 3)):
        os.mkdir(cluster.path(place))
        cluster.worker(options=["-a"], env={"PATH": cluster.path(place), "CONCURRENCY": "1"})
        put(cluster.path("%s/f%03d" % (place, number)), "#!/bin/sh\n", 0o755)
        put(cluster.path("%s/f005" % place), "#!/bin/sh\n", 0o755)
    done = cluster.run("cexec", "-mn", "--log", "log", cluster.pub, "{}", ":::", *names)
    why = "cexec: %s: worker NODE cannot run its command: %s: No such file or directory; the same on NODE" \
        " (%s is here: -i {} takes it there, if the workers have directories for jobs)"
    assert done.returncode == 3 and sorted(done.stderr.decode().splitlines())[1:] == [
        (why % (name, name, name)).replace("NODE", NODE) for name in ("f000", "f002", "f004")]
    assert sorted(row["Exitval"] for row in rows_of_log(cluster.path("log"))) == ["0", "0", "0", "127", "127", "127"]


def test_a_batch_waits_for_the_worker_that_has_its_command(cluster):
    """It was there before, so a worker without it does not decide: not while a job is on its way, and not later."""
    altered(cluster, OBJECTION_SECONDS=0.1)
    names = made_files(cluster, 4)
    tools = Toolbox(cluster)
    command = "#!/bin/sh\n[ $PEER_FILE = f000 ] && exec cat; echo $$ >> pids; exec sleep 100\n"
    put(cluster.path("tools/tool"), command, 0o755)
    client = start_batch(cluster, *names, options=["-v", "-j", "1"])
    until(lambda: size_of(cluster, "pids") > 0, "a job")
    for _ in range(2):
        tools.good.terminate()
        time.sleep(0.1)
    assert tools.good.wait(PATIENCE) == 0
    put(cluster.path("tools/tool"), "#!/bin/sh\nexec cat\n", 0o755)
    until(lambda: client.said().count(": refused: tool: ") >= 3, "refusals, with a second between them")
    cluster.worker("tool", env=tools.path("tools"))
    assert client.wait(PATIENCE) == 0
    assert [read(cluster.path(name + ".out")) for name in names] == [read(cluster.path(name)) for name in names]


def test_a_command_that_goes_during_a_batch(cluster):
    """The next job on a connection has had GO: the worker closes, and the job is done where the command is."""
    names = made_files(cluster, 6)
    for place in ("one", "two"):
        os.mkdir(cluster.path(place))
    put(cluster.path("one/tool"), '#!/bin/sh\nrm -f "%s"; exec cat\n' % cluster.path("one/tool"), 0o755)
    put(cluster.path("two/tool"), "#!/bin/sh\nexec cat\n", 0o755)
    one, two = ({"PATH": cluster.path(place) + ":/usr/bin:/bin", "CONCURRENCY": "1"} for place in ("one", "two"))
    first = cluster.worker("tool", env=one)
    client = start_batch(cluster, *names, options=["-v", "-j", "1"])
    until(lambda: " before it began" in client.said(), "the next job")
    second = cluster.worker("tool", env=two)
    assert client.wait(PATIENCE) == 0
    assert [read(cluster.path(name + ".out")) for name in names] == [read(cluster.path(name)) for name in names]
    assert read(first.log).count(b": group ") == 1 and read(second.log).count(b": group ") == 5


def test_a_job_too_large_for_several_hosts_fails(farm):
    """It does not go round for ever, while the others are done."""
    need("root", "unshare")
    altered(farm, RETRIES=1)
    usual, names = farm.launch, ["large", "a", "b", "c"]
    for name in names:
        in_desk(farm, name, b"x" * (100000 if name == "large" else 10))
    small = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64k none "$0" && exec "$@"', farm.place]
    farm.launch = small + farm.launch
    workers = [farm.serve(env={"CONCURRENCY": "1"}) for _ in range(3)]
    farm.launch = usual
    done = farm.work("-mn", "-o", "{}.out", "-i", "{}", farm.pub, "cat", "{}", ":::", *names)
    why = "worker %s cannot run its command: cat: the job's directory: large: No space left on device" % NODE
    assert done.returncode == 1 and done.stderr.decode() == "cexec: large: %s\n" % why
    assert [read(os.path.join(farm.desk, name + ".out")) for name in names[1:]] == [b"x" * 10] * 3
    assert sum(read(worker.log).count(b": failed") for worker in workers) == 2


@pytest.mark.parametrize("mode", ["one", "-m -o"])
def test_a_full_disk_at_a_worker(farm, mode):
    """The message names the worker; a batch does the job elsewhere, and leaves this worker alone."""
    need("root", "unshare")
    names, usual = ["f%d" % number for number in range(6)], farm.launch
    for name in names:
        in_desk(farm, name, name.encode() * 100000)
    farm.launch = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64k none "$0" && exec "$@"', farm.place, *usual]
    full = farm.serve(env={"BOOST": "0", "CONCURRENCY": "2"})
    farm.launch = usual
    said = "worker %s cannot run its command: cat: the job's directory: f0: No space left on device" % NODE
    if mode == "one":
        assert failed(farm.work("-n", "-i", "f0", farm.pub, "cat", "f0"), 126).decode() == "cexec: %s\n" % said
        return
    farm.serve(env={"BOOST": "99999", "CONCURRENCY": "2"})
    if mode == "-m -o":
        done = farm.work("-v", "-mn", "-o", "{}.out", "-i", "{}", farm.pub, "cat", "{}", ":::", *names)
        assert done.returncode == 0, done
        assert all(read(os.path.join(farm.desk, name + ".out")) == name.encode() * 100000 for name in names)
        assert 1 <= read(full.log).count(b": failed") <= 4 and b" cannot run its command: cat: " in done.stderr
    assert all_gone(farm)


def bad_and_good(cluster, bad="exit 1", good="cat", slots="1"):
    """Two workers; the bad one is always faster to offer."""
    return [cluster.worker("sh", "-c", command, env={"BOOST": boost, "CONCURRENCY": slots})
            for command, boost in ((bad, "0"), (good, "50000"))]


@pytest.mark.parametrize("mode", ["-m", "-b"])
def test_a_command_that_failed_runs_again_elsewhere(cluster, mode):
    """Once, on the other worker; the log has each try, and the last one of a number is the job's."""
    names = made_files(cluster, 4)
    bad, good = bad_and_good(cluster, "echo half; exit 3")
    if mode == "-m":
        done = batch(cluster, *names, options=["-v", "--retries", "1", "--log", "log"])
        assert [read(cluster.path(name + ".out")) for name in names] == [read(cluster.path(name)) for name in names]
    else:
        data = b"".join(b"%d\n" % number for number in range(30))
        done = cluster.run("cexec", "-b", "20", "-v", "--retries", "1", "--log", "log", cluster.pub, input=data)
        assert done.stdout == data
    rows = rows_of_log(cluster.path("log"))
    last = {row["Seq"].strip(): row["Exitval"] for row in rows}
    assert done.returncode == 0 and set(last.values()) == {"0"}
    failures = [row["Seq"].strip() for row in rows if row["Exitval"] == "3"]
    assert failures and len(set(failures)) == len(failures) == done.stderr.count(b": exit status 3; runs it again\n")
    assert len(failures) == read(bad.log).count(b": group ")
    assert len(rows) - len(failures) == read(good.log).count(b": group ")


def test_failures_count_when_the_last_try_is_over(cluster):
    """Where there is no other worker the same one gets the job again; without --retries there is one try."""
    altered(cluster, OBJECTION_SECONDS=0.1)
    names = made_files(cluster, 2)
    cluster.worker("sh", "-c", NOTED + "exit 3", env={"CONCURRENCY": "1"})
    done = batch(cluster, *names, options=["--retries", "2", "-j", "1", "--halt", "2", "--log", "log"])
    assert done.returncode == 2 and sorted(begun(cluster)) == [b"f000"] * 3 + [b"f001"] * 3
    assert done.stderr.decode().splitlines() == ["cexec: %s: exit status 3" % name for name in names]
    assert [row["Exitval"] for row in rows_of_log(cluster.path("log"))] == ["3"] * 6
    assert batch(cluster, *names).returncode == 2 and len(begun(cluster)) == 8
    refusal(batch(cluster, "f", options=["--retries", "x"]), 100, "--retries needs a number from 1")
    refusal(cluster.run("cexec", "--retries", "1", cluster.pub), 100, "--retries is for -m")


def test_a_try_fails_and_the_next_does_not(cluster):
    """Of the same worker: the output is that of the last try alone."""
    altered(cluster, OBJECTION_SECONDS=0.1)
    make_file(cluster, "f", b"whole")
    cluster.worker("sh", "-c", "[ -e there ] && exec cat; echo half; echo oh >&2; touch there; kill -9 $$")
    done = batch(cluster, "f", options=["-o", "-", "--retries", "5"])
    assert ended(done) == (0, b"whole", b"")


@pytest.mark.parametrize("elsewhere, fails, row", [
    (0, 0, 14), (2, 0, 7), (20, 0, 3), (1000, 0, 3), (2, 2, 37), (100, 50, 14), (100, 100, None)])
def test_failures_in_a_row_that_are_no_accident(elsewhere, fails, row):
    """How many, by what has happened elsewhere; and never if there is no elsewhere."""
    record, good, bad = cexec.Record(), b"good", b"bad"
    for number in range(elsewhere):
        record.add(good, number < fails)
    for number in range(1, 60):
        record.add(bad, True)
        assert record.is_bad(bad, {bad, good}) == (row is not None and number >= row), number
        assert elsewhere or not record.is_bad(bad, {bad})
    record.add(bad, False)
    record.add(bad, True)
    assert not record.is_bad(bad, {bad, good})


def test_where_half_of_the_jobs_fail_nobody_rests():
    chance, record = random.Random(1), cexec.Record()
    for _ in range(5000):
        worker, fails = chance.randrange(4), chance.random() < 0.5
        record.add(worker, fails)
        assert not fails or not record.is_bad(worker, {0, 1, 2, 3})


def test_a_worker_where_jobs_fail_that_succeed_elsewhere_rests(cluster):
    """It is named once, and gets some more after its rest: all are done, and few have failed first."""
    altered(cluster, REST_SECONDS=0.5)
    names = made_files(cluster, 60)
    bad, good = bad_and_good(cluster, "[ -e well ] && exec cat; exit 1", "sleep 0.1; exec cat", "2")
    client = start_batch(cluster, *names, options=["-v", "--retries", "1", "--log", "log"])
    until(lambda: " gets no more jobs for " in client.said(), "the rest")
    make_file(cluster, "well")
    assert client.wait(PATIENCE) == 0 and client.said().count(" gets no more jobs for ") == 1
    assert [read(cluster.path(name + ".out")) for name in names] == [read(cluster.path(name)) for name in names]
    exits = [row["Exitval"] for row in rows_of_log(cluster.path("log"))]
    assert exits.count("0") == 60 and 3 <= exits.count("1") <= 16


def without_power():
    """Words before a command: root that may not read and write everything."""
    need("root", "setpriv")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


def test_files_that_may_not_be_read_or_written(cluster):
    names = made_files(cluster, 2)
    os.mkdir(cluster.path("closed"), 0o555)
    make_file(cluster, "closed/in", b"in")
    os.chmod(cluster.path("f001"), 0)
    cluster.worker("cat")
    cluster.launch = without_power() + cluster.launch
    done = batch(cluster, *names, "closed/in")
    assert done.returncode == 2 and done.stderr.decode().splitlines() == [
        "cexec: f001: Permission denied", "cexec: closed/in: closed/.in.out.part: Permission denied"]
    assert read(cluster.path("f000.out")) == b"0\n" and os.listdir(cluster.path("closed")) == ["in"]


def test_disk_that_is_full(cluster):
    need("root", "unshare", "mount")
    os.mkdir(cluster.path("small"))
    make_file(cluster, "little", b"in")
    make_file(cluster, "large", bytes(3000000))
    make_file(cluster, "last", b"in")
    worker = cluster.worker("cat", env={"CONCURRENCY": "1"})
    words = cluster.argv(
        "cexec", *batch_words(cluster, ["little", "large", "last"], ["-o", "small/{}", "--log", "log"])
    )
    script = 'mount -t tmpfs -o size=1m none small && "$@"; echo $? >status; ls -A small >listed'
    done = cluster.do(["unshare", "-m", "sh", "-c", script, "sh", *words])
    assert done.stderr == b"cexec: large: small/large: No space left on device\n"
    assert read(cluster.path("status")) == b"1\n" and read(cluster.path("listed")) == b"last\nlittle\n"
    ends = [(row["Command"], row["Exitval"], row["Signal"]) for row in rows_of_log(cluster.path("log"))]
    assert ends == [("little", "0", "0"), ("large", "111", "0"), ("last", "0", "0")]
    no_defect(read(worker.log))


@pytest.mark.parametrize("length", [155000, 156000, 157000, 158000, 160000])
def test_output_that_just_does_not_fit(cluster, length):
    """The last write is a short one, and the next, which would say so, comes after EXIT."""
    need("root", "unshare", "mount")
    os.mkdir(cluster.path("small"))
    data = make_file(cluster, "in", noise(length))
    cluster.worker("cat")
    words = cluster.argv("cexec", *batch_words(cluster, ["in"], ["-o", "small/out"]))
    script = ('mount -t tmpfs -o size=300k none small && head -c 150000 /dev/zero >small/fill && "$@"; '
              'echo $? >status; if [ -e small/out ]; then cp small/out copy; fi; rm -f small/fill; ls -A small >listed')
    cluster.do(["unshare", "-m", "sh", "-c", script, "sh", *words])
    if read(cluster.path("status")) == b"0\n":
        assert read(cluster.path("copy")) == read(data)
    else:
        assert read(cluster.path("status")) == b"1\n" and read(cluster.path("listed")) == b""


@pytest.mark.parametrize("part", ["an input", "a link to a file", "a fifo", "another user's", "left behind"])
def test_what_stands_where_an_output_is_to_be_written(cluster, part):
    """Only what cexec itself may have left there is written over."""
    need("root")
    make_file(cluster, "a", b"A")
    make_file(cluster, "keep", b"precious")
    place, names = cluster.path(".a.out.part"), ["a"]
    if part == "an input":
        make_file(cluster, ".a.out.part", b"precious")
        names.append(".a.out.part")
    elif part == "a link to a file":
        os.link(cluster.path("keep"), place)
    elif part == "a fifo":
        os.mkfifo(place)
    else:
        make_file(cluster, ".a.out.part", b"old")
        os.chmod(place, 0o666)
        if part == "another user's":
            os.chown(place, 1, 1)
    cluster.worker("cat")
    done = batch(cluster, *names)
    assert read(cluster.path("keep")) == b"precious"
    if part == "left behind":
        assert done.returncode == 0 and read(cluster.path("a.out")) == b"A" and not os.path.exists(place)
    else:
        assert done.returncode == (100 if part == "an input" else 1) and not os.path.exists(cluster.path("a.out"))
        assert part != "an input" or read(place) == b"precious"
        assert part == "an input" or b"is not a file that cexec has left there" in done.stderr


def test_log_on_a_full_disk(cluster):
    make_file(cluster, "in", b"in")
    cluster.worker("cat")
    refusal(batch(cluster, "in", options=["--log", "/dev/full"]), 111, "--log /dev/full: No space left on device")
    refusal(batch(cluster, "in", options=["--log", "none/log"]), 111, "--log none/log: No such file or directory")
    assert not os.path.exists(cluster.path("in.out"))
    done = batch(cluster, "in", options=["-o", "-"], stdout=open("/dev/full", "wb"))
    assert done.returncode == 111 and b"standard output: No space left on device" in done.stderr


def test_log_into_a_pipe(cluster):
    make_file(cluster, "in", b"in")
    cluster.worker("cat")
    out = output(batch(cluster, "in", options=["--log", "/dev/stdout"]))
    heads, line = out.decode().splitlines()
    assert (heads.split()[0], line.split()[-1]) == ("Seq", "in")
    heads, line = output(batch(cluster, "in", options=["-f", "--log", "-"])).decode().splitlines()
    assert (heads.split()[0], line.split()[-1]) == ("Seq", "in") and not os.path.exists(cluster.path("-"))
    for words in (["-m", "-o", "-", "--log", "-", cluster.pub, "--", "in"], ["-b9", "--log", "-", cluster.pub]):
        refusal(cluster.run("cexec", *words, input=b"x"), 100, "--log -: standard output has the outputs")


@pytest.mark.parametrize("change", ["append", "replace", "remove"])
def test_file_that_changes_while_it_is_read(cluster, change):
    make_file(cluster, "in", b"before")
    cluster.worker("sh", "-c", NOTED + "cat; while [ ! -e go ]; do sleep 0.05; done")
    client = start_batch(cluster, "in")
    until(lambda: begun(cluster), "the start")
    if change == "append":
        with open(cluster.path("in"), "ab") as file:
            file.write(b"more")
    elif change == "replace":
        make_file(cluster, "new", b"after!")
        shutil.copystat(cluster.path("in"), cluster.path("new"))
        os.rename(cluster.path("new"), cluster.path("in"))
    else:
        os.unlink(cluster.path("in"))
    make_file(cluster, "go")
    assert client.wait(PATIENCE) == 1 and not parts(cluster.directory) and not os.path.exists(cluster.path("in.out"))
    assert client.said() == "cexec: in: %s\n" % ("No such file or directory" if change == "remove" else
                                                 "changed while it was read")


def at_once(cluster):
    """The most commands that have run at a time."""
    running = [1 if line == b"+" else -1 for line in read(cluster.path("count")).split()]
    return max(sum(running[:end]) for end in range(1, len(running) + 1))


@pytest.mark.parametrize("jobs", [1, 3, 5])
def test_no_more_than_so_many_at_a_time_and_no_fewer(cluster, jobs):
    names = made_files(cluster, 40)
    for _ in range(2):
        cluster.worker("sh", "-c", TALLIED, env={"CONCURRENCY": "4", "BOOST": "0"})
    assert batch(cluster, *names, options=["-j", str(jobs)]).returncode == 0
    assert at_once(cluster) == jobs


def test_all_slots_of_all_workers_are_used(cluster):
    names = made_files(cluster, 30)
    workers = [
        cluster.worker("sh", "-c", NOTED + "while [ ! -e go ]; do sleep 0.02; done; cat", env={"CONCURRENCY": "3"})
        for _ in range(2)
    ]
    client = start_batch(cluster, *names)
    until(lambda: len(begun(cluster)) == 6, "six at a time")
    assert [supervisors(worker) for worker in workers] == [3, 3]
    make_file(cluster, "go")
    assert client.wait(PATIENCE) == 0


def test_connections_are_kept(cluster):
    """One slot, a hundred files: one connection; and every file has its own command, input and name."""
    names = made_files(cluster, 100)
    worker = cluster.worker("sh", "-c", 'echo "$PEER_FILE $PEER_X"; cat', env={"CONCURRENCY": "1"})
    logger = cluster.logger(cluster.pub)
    assert batch(cluster, *names, variables=["X=y"]).returncode == 0
    assert supervisors(worker) == 1 and read(worker.log).count(b"-> EXIT") == 100
    for name in names:
        assert read(cluster.path(name + ".out")) == name.encode() + b" y\n" + read(cluster.path(name))
    until(lambda: sum("completed by" in line for line in logger.lines()) == 100, "a line for each file")
    assert sum("exit code 0" in line for line in logger.lines()) == 100
    no_defect(read(worker.log))


def cexec_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_one_port_is_enough(cluster):
    names = made_files(cluster, 20)
    cluster.worker("cat", env={"CONCURRENCY": "3"})
    output(batch(cluster, *names, env={"CEXEC_LISTEN_PORTS": str(cexec_port())}))


def test_few_descriptors_are_enough(cluster):
    """Where more slots are free than there are descriptors for."""
    names = made_files(cluster, 36)
    cluster.worker("sh", "-c", "cat; sleep 0.1", env={"CONCURRENCY": "40", "BOOST": "0"})
    output(batch(cluster, *names, options=["-j", "1000"],
                 preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (90, 90))))


def test_another_client_is_served_in_the_middle_of_a_batch(cluster):
    """Before the third file that is begun after it came: two were in the line before it."""
    names = made_files(cluster, 60)
    worker = cluster.worker("sh", "-c", NOTED + "sleep 0.1; cat", env={"CONCURRENCY": "1"})
    client = start_batch(cluster, *names)
    for _ in range(3):
        before = len(begun(cluster))
        until(lambda before=before: len(begun(cluster)) >= before + 3, "some of the batch")
        other = verbose_client(cluster, "FILE=other", stdout=subprocess.DEVNULL)
        nonce = until(lambda: re.search(r"ANNOUNCE (\w+)", other.said()), "the other's announcement").group(1)
        until(lambda: b"<- ANNOUNCE " + nonce.encode() in read(worker.log), "its arrival")
        at = len(begun(cluster))
        assert other.wait(PATIENCE) == 0
        place = len(begun(cluster)) - 1 - begun(cluster)[::-1].index(b"other")
        assert place <= at + 4, (place, at)
    assert client.poll() is None
    assert client.wait(PATIENCE) == 0 and len(begun(cluster)) == 63
    assert 3 < supervisors(worker) < 20


def test_two_batches_share_the_slots(cluster):
    made_files(cluster, 30, "a")
    made_files(cluster, 30, "b")
    cluster.worker("sh", "-c", NOTED + "cat; sleep 0.03", env={"CONCURRENCY": "1"})
    clients = [start_batch(cluster, *sorted(os.path.join(place, name) for name in os.listdir(cluster.path(place))))
               for place in ("a", "b")]
    assert [client.wait(PATIENCE) for client in clients] == [0, 0]
    order = [name[:1] for name in begun(cluster)]
    first = min(len(order) - 1 - order[::-1].index(letter) for letter in (b"a", b"b"))
    assert first > 45, order


def test_background_process_has_the_connection_to_itself(cluster):
    """What a command leaves running is not taken for the next one's, and outlives it."""
    names = made_files(cluster, 8)
    worker = cluster.worker("sh", "-c", 'sleep 600 >&- 2>&- <&- & echo $! >>pids; cat', env={"CONCURRENCY": "2"})
    assert batch(cluster, *names).returncode == 0
    pids = [int(line) for line in read(cluster.path("pids")).split()]
    assert supervisors(worker) == 8 and set(pids) <= set(cluster.alive())
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_worker_drained_in_the_middle(cluster):
    names = made_files(cluster, 60)
    workers = [cluster.worker("sh", "-c", NOTED + "cat; sleep 0.02", env={"CONCURRENCY": "1"}) for _ in range(2)]
    logger = cluster.logger(cluster.pub)
    client = start_batch(cluster, *names, env={"CEXEC_RETRIES": "0"})
    until(lambda: len(begun(cluster)) > 10, "some of the batch")
    assert signalled(workers[0]) == 0 and client.poll() is None
    assert client.wait(PATIENCE) == 0 and client.said() == ""
    assert sorted(begun(cluster)) == sorted(name.encode() for name in names)
    assert not any("rats out" in line for line in logger.lines())


def test_workers_lost_one_after_another(cluster):
    names = made_files(cluster, 80)
    workers = [cluster.worker("sh", "-c", NOTED + "sleep 0.03; cat", env={"CONCURRENCY": "2"}) for _ in range(4)]
    client = start_batch(cluster, *names)
    for number, worker in enumerate(workers[:3]):
        until(lambda number=number: len(begun(cluster)) > 15 * (number + 1), "some more of the batch")
        kill_with_supervisors(worker)
    assert client.wait(PATIENCE) == 0 and client.said() == ""
    for name in names:
        assert read(cluster.path(name + ".out")) == read(cluster.path(name))
    assert 80 <= len(begun(cluster)) <= 86 and not parts(cluster.directory)


def test_file_that_kills_its_worker_is_given_up(cluster):
    names = made_files(cluster, 12)
    worker = cluster.worker(
        "sh", "-c", NOTED + '[ "$PEER_FILE" != f004 ] || kill -KILL $PPID; cat', env={"CONCURRENCY": "1"}
    )
    done = batch(cluster, *names, options=["--log", "log"], env={"CEXEC_RETRIES": "2"})
    assert done.returncode == 1
    assert re.fullmatch(rb"cexec: f004 at %s: worker lost: [^\n]+\n" % NODE.encode(), done.stderr)
    assert collections.Counter(begun(cluster)) == {name.encode(): 3 if name == "f004" else 1 for name in names}
    ends = {row["Command"]: row["Exitval"] for row in rows_of_log(cluster.path("log"))}
    assert ends == {name: "-1" if name == "f004" else "0" for name in names}
    assert not parts(cluster.directory) and not os.path.exists(cluster.path("f004.out"))
    no_defect(read(worker.log))


def test_lost_runs_are_in_the_log_and_parallel_reads_it(cluster):
    """The last line that begins with a job's number is the job's, also for its --resume and the like."""
    need("parallel")
    cluster.worker("sh", "-c", "read name; [ $name = good ] || { [ $name = once ] && ! mkdir once 2>&-; } || "
                   "kill -KILL $PPID; echo done", env={"CONCURRENCY": "1"})
    names = ["good", "once", "never"]
    for name in names:
        put(cluster.path(name + ".in"), name + "\n")
    done = batch(cluster, *(name + ".in" for name in names), options=["--log", "log"], env={"CEXEC_RETRIES": "1"})
    assert done.returncode == 1
    rows = [(row["Seq"], row["Host"], row["Exitval"], row["Signal"]) for row in rows_of_log(cluster.path("log"))]
    assert sorted(rows) == [(" 2", NODE, "-1", "0"), (" 3", NODE, "-1", "0"), ("1", NODE, "0", "0"),
                            ("2", NODE, "0", "0"), ("3", NODE, "-1", "0")]

    def parallel(option, log):
        make_file(cluster, "copy", log)
        done = cluster.do(["parallel", option, "--joblog", "copy", *["echo again {}"] * (option != "--retry-failed"),
                           *([":::", *names] if option != "--retry-failed" else [])],
                          env={"HOME": cluster.path(".")})
        return done.stdout.split()
    log = read(cluster.path("log"))
    begun_only = b"".join(line for line in log.splitlines(True) if not re.match(b"[23]", line))
    assert parallel("--resume-failed", log) == [b"again", b"never"] and parallel("--resume", log) == []
    assert parallel("--resume", begun_only) == [b"again", b"once", b"again", b"never"]
    put(cluster.path("never.in"), "echo repaired\n", 0o755)
    assert parallel("--retry-failed", log.replace(b"never.in", b"./never.in")) == [b"repaired"]


def test_no_worker_at_all(cluster):
    names = made_files(cluster, 3)
    make_file(cluster, "f001.out", b"there")
    done = batch(cluster, *names, env={"CEXEC_TIMEOUT_ACCEPT": "1"})
    line = refusal(done, 111, "no worker answered in ")
    assert line.endswith("; 1 of 3 files are done; the same command again does the rest")
    assert not parts(cluster.directory)


def test_last_worker_goes(cluster):
    names = made_files(cluster, 30)
    altered(cluster, BUSY_SECONDS=1.0)
    worker = cluster.worker("sh", "-c", NOTED + "sleep 0.03; cat", env={"CONCURRENCY": "1"})
    client = start_batch(cluster, *names, env={"CEXEC_TIMEOUT_ACCEPT": "1"})
    until(lambda: len(begun(cluster)) > 10, "some of the batch")
    worker.terminate()
    assert client.wait(PATIENCE) == 111
    done = [name for name in names if os.path.exists(cluster.path(name + ".out"))]
    assert client.said().count("\n") == 1 and "; %d of 30 files are done; the same" % len(done) in client.said()
    assert len(begun(cluster)) == len(done) and not parts(cluster.directory)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_signals_end_a_batch_and_its_commands(cluster, number):
    names = made_files(cluster, 9)
    worker = cluster.worker("sh", "-c", NOTED + "echo half; sleep 600", env={"CONCURRENCY": "2"})
    client = start_batch(cluster, *names)
    until(lambda: len(begun(cluster)) == 2 and len(parts(cluster.directory)) >= 2, "the start")
    assert signalled(client, number) == -number
    assert client.said() == "cexec: interrupted: 0 of 9 files are done; the same command again does the rest\n"
    assert not parts(cluster.directory) and not [name for name in os.listdir(cluster.directory) if ".out" in name]
    until(lambda: not children_of(worker.pid), "the end of the commands")


def test_an_interrupted_batch_that_does_all_again_does_not_say_the_rest(cluster):
    names = made_files(cluster, 3)
    cluster.worker("sh", "-c", NOTED + "sleep 600", env={"CONCURRENCY": "1"})
    client = start_batch(cluster, *names, options=["-f"])
    until(lambda: begun(cluster), "the start")
    assert signalled(client) == -signal.SIGTERM
    assert client.said() == (
        "cexec: interrupted: 0 of 3 files are done; the same command again does all of them once more (-f)\n")


def test_killed_batch_is_taken_up_again(cluster):
    """KILL leaves it no time to clear up: its commands end all the same, and the next one uses what is left."""
    names = made_files(cluster, 9)
    worker = cluster.worker(
        "sh", "-c", NOTED + "echo half; [ -e go ] || { seq 1000; sleep 600; }; cat", env={"CONCURRENCY": "2"}
    )
    client = start_batch(cluster, *names)
    until(lambda: len(begun(cluster)) == 2 and sum(size > 3000 for size in map(
        os.path.getsize, map(cluster.path, parts(cluster.directory)))) == 2, "the start")
    signalled(client, signal.SIGKILL)
    assert len(parts(cluster.directory)) >= 2
    until(lambda: not children_of(worker.pid), "the end of the commands")
    make_file(cluster, "go")
    assert batch(cluster, *names).returncode == 0
    for name in names:
        assert read(cluster.path(name + ".out")) == b"half\n" + read(cluster.path(name))
    assert not parts(cluster.directory)


def test_two_batches_for_the_same_outputs(cluster):
    names = made_files(cluster, 2)
    cluster.worker(
        "sh", "-c", NOTED + "echo half; while [ ! -e go ]; do sleep 0.02; done; cat", env={"CONCURRENCY": "4"}
    )
    first = start_batch(cluster, *names)
    until(lambda: len(begun(cluster)) == 2, "the start")
    second = batch(cluster, *names)
    assert second.returncode == 2 and sorted(second.stderr.decode().splitlines()[:2]) == [
        "cexec: %s: .%s.out.part: another cexec is writing it" % (name, name) for name in names]
    make_file(cluster, "go")
    assert first.wait(PATIENCE) == 0 and not parts(cluster.directory)
    assert [read(cluster.path(name + ".out")) for name in names] == [
        b"half\n" + read(cluster.path(name)) for name in names
    ]
    assert batch(cluster, *names).returncode == 0 and len(begun(cluster)) == 2


def test_stopped_client_goes_on(cluster):
    """Stopped for longer than a worker waits for the next file: no worker counts as lost, and no file as tried."""
    altered(cluster, OFFER_SECONDS=1.0)
    names = made_files(cluster, 6)
    command = "x=$(cat; echo .); %s sleep 0.3; head -c 200000 /dev/zero; echo ${x%%.}" % NOTED  # all input
    worker = cluster.worker("sh", "-c", command, env={"CONCURRENCY": "1"})
    logger = cluster.logger(cluster.pub)
    client = start_batch(cluster, *names, env={"CEXEC_RETRIES": "0"})
    until(lambda: len(begun(cluster)) == 2, "the second file")
    client.send_signal(signal.SIGSTOP)
    until(lambda: read(worker.log).count(b"-> EXIT") == 2, "its end")
    time.sleep(1.5)                     # OFFER_SECONDS
    assert signalled(client, signal.SIGCONT) == 0, client.said()
    assert len(begun(cluster)) == 6 and client.said() == "" and not any("rats out" in line for line in logger.lines())
    assert all(os.path.getsize(cluster.path(name + ".out")) > 200000 for name in names)


@pytest.mark.parametrize("age", AGES)
@pytest.mark.parametrize("who", ["client", "worker"])
def test_a_batch_on_old_and_new_pythons(cluster, age, who):
    names = made_files(cluster, 30)
    usual = cluster.launch
    strange = [oldest_and_newest()[age], *usual[1:]]
    cluster.launch = strange if who == "worker" else usual
    worker = cluster.worker("sh", "-c", 'echo "$PEER_FILE $PEER_X"; cat', env={"CONCURRENCY": "2"})
    cluster.launch = strange if who == "client" else usual
    for options, input in (([], None), (["-o", "out/{/.}", "-j2"], None), (["-f0"], "\0".join(names).encode())):
        os.makedirs(cluster.path("out"), exist_ok=True)
        words = names if input is None else ["-"]
        given = {} if input is None else {"input": input}
        output(batch(cluster, *words, options=options, variables=["X=y"], **given))
    for name in names:
        assert read(cluster.path(name + ".out")) == name.encode() + b" y\n" + read(cluster.path(name))
    done = batch(cluster, *names, options=["-o", "-"])
    assert done.stdout == b"".join(read(cluster.path(name + ".out")) .replace(b" y\n", b" \n", 1) for name in names)
    no_defect(read(worker.log))


def test_batch_through_a_proxy(cluster):
    """The client and the workers hear different groups."""
    names = made_files(cluster, 60)
    far = "127.255.255.255:%d" % (group_port(cluster) + 1)
    worker = cluster.worker("sh", "-c", NOTED + "cat", env={"GROUP": far, "CONCURRENCY": "2"})
    cluster.proxy("127.0.0.2", far)
    output(batch(cluster, *names))
    for name in names:
        assert read(cluster.path(name + ".out")) == read(cluster.path(name))
    assert supervisors(worker) < 30


def lines_of(seed, size, longest=200):
    """Lines of many lengths, the same for the same seed."""
    drawn, made = random.Random(seed), []
    while size > 0:
        made.append(b"%d " % len(made) * (drawn.randrange(longest) // 4) + b"\n")
        size -= len(made[-1])
    return b"".join(made)


def blocks(cluster, size, *words, options=(), **rest):
    return cluster.run("cexec", "-b", str(size), *options, cluster.pub, *words, **rest)


def blocks_of(data, size):
    """The blocks by the rule: as many whole lines as there is room for, or a longer one."""
    made = []
    while len(data) > size:
        end = data.rfind(b"\n", 0, size) + 1 or data.find(b"\n", size) + 1 or len(data)
        made.append(data[:end])
        data = data[end:]
    return made + [data] * bool(data)


INPUTS = {"lines": lines_of(1, 30000), "no newline at the end": lines_of(2, 30000)[:-1] + b"x", "empty": b"",
          "one byte": b"x", "newlines": b"\n" * 5000, "a long line": lines_of(3, 5000) + LONG_LINE + lines_of(4, 5000),
          "long lines": LONG_LINE * 3 + b"a\n" + LONG_LINE[:-1], "a block and no more": b"x" * 776 + b"\n",
          "exact blocks": (b"x" * 776 + b"\n") * 5, "zeros": bytes(3000)}


@pytest.mark.parametrize("source", ["pipe", "file"])
@pytest.mark.parametrize("what", INPUTS)
def test_blocks(cluster, what, source):
    """Of whole lines, one of them at least, in order; nothing is lost at their ends."""
    data = INPUTS[what]
    cluster.worker("sh", "-c", MARKED, env={"CONCURRENCY": "3"})
    if source == "pipe":
        done = blocks(cluster, 777, input=data)
    else:
        with open(make_file(cluster, "in", b"before\n" + data), "rb") as file:
            file.seek(7)
            done = blocks(cluster, 777, stdin=file)
            assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 7 + len(data)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"".join(block + b"END\n" for block in blocks_of(data, 777))


@pytest.mark.parametrize("size", ["777", "1k", "1K", "7"])
def test_blocks_as_parallel_has_them(cluster, size):
    need("parallel")
    data = lines_of(size, 40000, 200) if size != "7" else b"1\n22\n333\n" * 25
    cluster.worker("sh", "-c", MARKED, env={"CONCURRENCY": "3"})
    told = subprocess.run(["parallel", "--will-cite", "--pipe", "-k", "--block", size, MARKED], input=data,
                          check=True, stdout=subprocess.PIPE).stdout
    assert output(blocks(cluster, size, input=data)) == told


@pytest.mark.parametrize("data", [
    lines_of(5, 4000, 50), b"h\n", b"h1\nh2\n", b"h", b"h1\nx", b"h1\n\nx\n", b"", b"\n\n", b"h" * 2000 + b"\nx\ny\n"])
@pytest.mark.parametrize("lines", [1, 2])
def test_each_block_has_the_header_as_parallel_has_it(cluster, lines, data):
    """It does not count for the size.  Where the input ends in the header, that is a block, unless it ends with it."""
    cluster.worker("sh", "-c", MARKED, env={"CONCURRENCY": "3"})
    done = blocks(cluster, "777", options=["--header", str(lines)], input=data)
    cut = data.split(b"\n", lines)
    head = b"\n".join(cut[:lines]) + b"\n" if len(cut) > lines else b""
    rest = data[len(head):]
    assert output(done) == b"".join(head + block + b"END\n" for block in blocks_of(rest, 777))
    if data[:1] != b"\n":
        need("parallel")
        argv = ["parallel", "--will-cite", "--pipe", "-k", "--block", "777", "--header", str(lines), MARKED]
        assert done.stdout == subprocess.run(argv, input=data, check=True, stdout=subprocess.PIPE).stdout


def test_a_header_that_is_too_long(cluster):
    done = blocks(cluster, "9", options=["--header", "1"], input=bytes(2 << 20))
    refusal(done, 100, "--header: these lines have more than 1 MiB")


def test_words_of_blocks_are_the_commands(cluster):
    cluster.worker(*SHOW, options=["-a"])
    done = blocks(cluster, "1M", "X={}", "{.}", "a b", input=b"x\n")
    assert done.stdout == shown(["{.}", "a b"])


def test_sizes():
    assert [cexec.parse_size(text) for text in ("7", "1k", "2K", "3m", "64M", "1g", "1G", "1024G", "100000000000")] == [
        7, 1000, 2048, 3000000, 64 << 20, 10 ** 9, 1 << 30, 1 << 40, 10 ** 11]


@pytest.mark.parametrize("what, status, text", [
    ("exit 3", 3, "exit status 3\nwhy\n"), ("kill -KILL $$", 137, "killed by signal 9\nwhy\n"),
    ("exec /no/such/command", 127, "exit status 127\n")])
def test_first_block_that_fails_ends_the_output(cluster, what, status, text):
    data = b"".join(b"%03d\n" % number for number in range(200))
    cluster.worker("sh", "-c", 'read line; case $line in 0[2-5]5) echo why >&2; %s;; 01*) sleep 0.2;; esac; '
                   'echo $line; cat' % what, env={"CONCURRENCY": "6"})
    done = blocks(cluster, 20, "--", input=data)
    assert (done.returncode, done.stdout) == (status, data[:100])
    said = done.stderr.decode()
    assert "cexec: block 6 (from byte 100) at %s: " % NODE + text.partition("\n")[0] in said
    assert said.endswith("cexec: the output ends before block 6 (from byte 100)\n")


def test_block_that_fails_while_others_before_it_fail_too(cluster):
    """The first by its place counts, not by its time."""
    data = b"".join(b"%03d\n" % number for number in range(100))
    cluster.worker("sh", "-c", 'read line; case $line in 010) until [ -e failed ]; do sleep 0.02; done; exit 3;; '
                   '015) touch failed; exit 4;; esac; echo $line; cat', env={"CONCURRENCY": "6"})
    done = blocks(cluster, 20, input=data)
    assert (done.returncode, done.stdout) == (3, data[:40])
    assert done.stderr.endswith(b"cexec: the output ends before block 3 (from byte 40)\n")


def test_blocks_while_workers_are_killed(cluster):
    data = lines_of(5, 10000000, 2000)
    workers = [cluster.worker("sh", "-c", "sleep 0.05; cat", env={"CONCURRENCY": "2"}) for _ in range(4)]
    make_file(cluster, "in", data)
    with open(cluster.path("in"), "rb") as source, open(cluster.path("out"), "wb") as output:
        client = cluster.start("cexec", "-b", "200k", cluster.pub, stdin=source, stdout=output,
                               env={"CEXEC_TIMEOUT_PINGPONG": "2"})
    stalled = []
    for victim, enough in zip(workers, (500000, 2000000, 4000000)):
        until(lambda enough=enough: os.path.getsize(cluster.path("out")) > enough, "some of it")
        pids = [*children_of(victim.pid), victim.pid]
        for pid in pids:
            os.kill(pid, signal.SIGKILL if victim is not workers[2] else signal.SIGSTOP)
        stalled = pids
    assert client.wait(PATIENCE * 2) == 0
    for pid in stalled:
        os.kill(pid, signal.SIGCONT)
    assert read(cluster.path("out")) == data


def held_now(pid):
    """What a process holds in files without names."""
    sizes = {}
    for fd in os.listdir("/proc/%d/fd" % pid):
        with contextlib.suppress(OSError):
            path = "/proc/%d/fd/%s" % (pid, fd)
            if " (deleted)" in os.readlink(path) or "/#" in os.readlink(path):
                sizes[os.stat(path).st_ino] = os.stat(path).st_size
    return sum(sizes.values())


@pytest.mark.parametrize("slow", ["reader", "first block"])
def test_blocks_that_are_held_are_few(cluster, slow):
    """As many as workers take, and two more, wherever they wait."""
    data = b"x" * 99999 + b"\n"
    cluster.worker("sh", "-c", NOTED + "cat; while [ -e stall ]; do sleep 0.05; done", env={"CONCURRENCY": "3"})
    if slow == "first block":
        make_file(cluster, "stall")
    with open(make_file(cluster, "in", data * 100), "rb") as source:
        client = cluster.start("cexec", "-b", "100000", cluster.pub, stdin=source, stdout=subprocess.PIPE)
        place = lambda: os.lseek(source.fileno(), 0, os.SEEK_CUR)       # noqa: E731
        until(lambda: place() >= (3 if slow == "reader" else 5) * len(data) and state_of(client.pid) == "S", "the wait")
        time.sleep(0.5)
        assert place() <= 5 * len(data)
        assert held_now(client.pid) <= 10 * len(data)                   # inputs and outputs
        if slow == "first block":
            os.unlink(cluster.path("stall"))
        assert client.stdout.read() == data * 100 and client.wait(PATIENCE) == 0


def test_block_is_sent_when_it_is_full(cluster):
    """Though the next one is far from it."""
    cluster.worker("cat")
    client = cluster.start("cexec", "-b", "10", cluster.pub, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for text in (b"12345\n789\n", b"abc\n", b"def\nghi\n"):
        client.stdin.write(text)
        client.stdin.flush()
        if text.startswith(b"1"):
            assert client.stdout.read(10) == b"12345\n789\n"
    assert client.stdout.read(8) == b"abc\ndef\n"
    client.stdin.close()
    assert client.stdout.read() == b"ghi\n" and client.wait(PATIENCE) == 0


def test_blocks_without_a_worker(cluster):
    said = failed(blocks(cluster, 10, input=b"1\n" * 30, env={"CEXEC_TIMEOUT_ACCEPT": "1"}))
    assert b"no worker answered" in said and b"; the output of 0 blocks was printed" in said


def test_blocks_log_and_errors(cluster):
    cluster.worker("sh", "-c", "cat; echo said >&2")
    words = ["-b10", "--log", "log", "--errors", "said", "-j2", cluster.pub]
    assert ended(cluster.run("cexec", *words, input=b"123456789\n" * 3)) == (0, b"123456789\n" * 3, b"")
    assert [read(cluster.path("said/%d" % number)) for number in (1, 2, 3)] == [b"said\n"] * 3
    assert sorted((row["Seq"], row["Send"], row["Receive"], row["Command"]) for row in rows_of_log(
        cluster.path("log"))) == [(str(n), "10", "15", "block %d (from byte %d)" % (n, 10 * n - 10)) for n in (1, 2, 3)]
    refusal(cluster.run("cexec", "-b10", "-f", cluster.pub), 100, "-f does not go with -b")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_blocks_and_their_commands(cluster, number):
    worker = cluster.worker("sh", "-c", NOTED + "sleep 1000", env={"CONCURRENCY": "2"})
    client = cluster.start("cexec", "-b", "2", cluster.pub, stdin=open(make_file(cluster, "in", b"1\n" * 9), "rb"),
                           stderr=open(cluster.path("said"), "wb"))
    until(lambda: len(begun(cluster)) == 2, "two at a time")
    assert signalled(client, number) == -number
    assert read(cluster.path("said")) == b"cexec: interrupted: the output of 0 blocks was printed\n"
    until(lambda: not children_of(worker.pid), "the end of the commands")


def test_reader_of_the_blocks_leaves(cluster):
    cluster.worker("cat", env={"CONCURRENCY": "2"})
    client = cluster.start("cexec", "-b", "1k", cluster.pub, stdin=open(make_file(cluster, "in", lines_of(6, 3000000))),
                           stdout=subprocess.PIPE)
    assert client.stdout.read(5)
    client.stdout.close()
    assert client.wait(PATIENCE) == -signal.SIGPIPE


def test_blocks_where_no_room_is_left(cluster):
    need("root", "unshare", "mount")
    os.mkdir(cluster.path("small"))
    cluster.worker("cat")
    make_file(cluster, "in", lines_of(7, 3000000))
    script = 'mount -t tmpfs -o size=1m none small && TMPDIR=small "$@" < in >out; echo $? >status'
    done = cluster.do(["unshare", "-m", "sh", "-c", script, "sh", *cluster.argv("cexec", "-b2m", cluster.pub)])
    assert read(cluster.path("status")) == b"111\n" and b"No space left on device (TMPDIR)" in done.stderr, done.stderr


@pytest.mark.parametrize("number", [1, 2])
def test_a_full_place_for_waiting_outputs_is_named(cluster, number):
    """And not the standard output or standard error that the output is for."""
    need("root", "unshare", "mount")
    os.mkdir(cluster.path("small"))
    cluster.worker("sh", "-c", "head -c 2000000 /dev/zero >&%d" % number)
    script = 'mount -t tmpfs -o size=1m none small && TMPDIR=small exec "$@"'
    words = cluster.argv("cexec", "-m", "-n", "-o", "-", cluster.pub, ":::", "x")
    done = cluster.do(["unshare", "-m", "sh", "-c", script, "sh", *words])
    assert done.returncode == 1 and b"cexec: x: " in done.stderr, done.stderr
    assert b"/small: No space left on device (TMPDIR)" in done.stderr, done.stderr


@HEAVY
def test_a_gigabyte_in_blocks_is_flat_in_memory(cluster):
    cluster.worker("cat", env={"CONCURRENCY": "2"})
    client = cluster.start("cexec", "-b", "16M", cluster.pub, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    counted = subprocess.Popen(["cksum"], stdin=client.stdout, stdout=subprocess.PIPE)
    client.stdout.close()
    line, held, largest = b"0123456789" * 1000 + b"\n", 0, 0
    expected = subprocess.Popen(["cksum"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for count in range(1000):
        for stream in (client.stdin, expected.stdin):
            stream.write(line * 100)
        if count % 50 == 49:
            held, largest = max(held, held_now(client.pid)), max(largest, rss(client.pid))
    client.stdin.close()
    expected.stdin.close()
    assert client.wait(PATIENCE) == 0
    assert counted.stdout.read() == expected.stdout.read()
    counted.wait()
    expected.wait()
    print(held, largest)
    assert held <= 2 * 5 * (16 << 20) and largest < 80000000


def exits(peer, more, out=0):
    for channel in (1, 2):
        peer.send(cexec.EOF, channel, cexec.FLAG_WHOLE)
    peer.send(cexec.EXIT, how=cexec.HOW_EXITED, more=more, channels=[(0, 0, 0), (1, out, 0), (2, 0, 0)])


@pytest.mark.parametrize("counts, after", [
    (True, lambda peer: peer.raw(os.urandom(1000))), (True, lambda peer: peer.raw(cexec.FRAME_HEAD.pack(99, 0, 0, 0))),
    (True, lambda peer: exits(peer, 1)), (True, lambda peer: peer.raw(data_frame(1, b"late"))),
    (True, lambda peer: peer.send(cexec.EOF, 1)), (True, lambda peer: peer.send(cexec.CREDIT, 0, bytes=1)),
    (True, lambda peer: (peer.send(cexec.ACCEPT), peer.send(cexec.ACCEPT))), (False, lambda peer: None),
    (False, lambda peer: peer.send(cexec.PONG)), (True, lambda peer: peer.send(cexec.ACCEPT))],
    ids=["garbage", "an unknown frame", "EXIT twice", "DATA", "EOF", "CREDIT", "ACCEPT twice", "the connection's end",
         "a PONG and the connection's end", "ACCEPT and the connection's end"])
def test_worker_that_goes_wrong_after_an_exit(cluster, counts, after):
    """The file that is done stays done; the next counts as tried, unless nothing but the connection's end came."""
    names = made_files(cluster, 2)
    key = cexec.open_key(cluster.key)
    with Ear(group_port(cluster)) as ear:
        client = start_batch(cluster, *names, env={"CEXEC_RETRIES": "0"})
        announced, address = ear.wait_for(cexec.ANNOUNCE)
        with play_worker(announced, address, key) as peer:
            assert b"FILE=f000" in peer.take_job().environment
            peer.raw(data_frame(1, b"done"))
            exits(peer, more=1, out=4)
            after(peer)
            while (peer.next() or [cexec.GO])[0] is not cexec.GO:
                pass                    # until the second one's GO, or the client has closed
    if not counts:
        cluster.worker("cat")
    assert client.wait(PATIENCE) == int(counts), client.said()
    assert read(cluster.path("f000.out")) == b"done" and not parts(cluster.directory)
    assert os.path.exists(cluster.path("f001.out")) != counts
    assert client.said() == "" or re.fullmatch(r"cexec: f001 at \S+: worker lost: [^\n]+\n", client.said())


class BatchPeer(Closing):
    """A client in a test's hands that has begun a job of a batch."""

    ROWS = [(0, 0, cexec.FLAG_INPUT), (1, 1, cexec.FLAG_OUTPUT)]

    def __init__(self, cluster, batch=b"12345678"):
        self.asker = Asker(cluster)
        self.asker.say(cexec.ANNOUNCE, attempt=1, batch=batch)
        self.peer = Peer(self.asker.listener.accept()[0])
        self.peer.hello = self.peer.expect(cexec.HELLO)
        self.peer.send(cexec.AUTH, proof=self.asker.proof(self.peer))
        self.job()
        self.peer.expect(cexec.ACCEPT)
        self.peer.send(cexec.GO)

    def close(self):
        self.peer.close()
        self.asker.close()

    def job(self, rows=None):
        self.peer.send(cexec.JOB, descriptors=rows or self.ROWS)

    def begin(self, rows=None):
        self.job(rows)
        self.peer.send(cexec.GO)

    def end(self, data=b"x"):
        """Gives it data and the end of file; (what it writes, EXIT)."""
        self.peer.raw(data_frame(0, data))
        self.peer.send(cexec.EOF, 0, cexec.FLAG_WHOLE)
        out = b""
        while True:
            kind, payload = self.peer.next()
            out += payload if kind is cexec.DATA else b""
            if kind is cexec.EXIT:
                return out, payload


def free_again(cluster, worker):
    """That the worker's only slot is free within the time that an offer may take."""
    began = time.monotonic()
    assert cluster.client(input=b"ab").stdout == b"ab"
    until(lambda: not children_of(worker.pid), "the supervisor's end")
    no_defect(read(worker.log))
    return time.monotonic() - began


def late_frames(peer):
    """All that may still be under way of a job that is over."""
    peer.raw(data_frame(0, b"late"))
    peer.send(cexec.EOF, 0, cexec.FLAG_WHOLE)
    peer.send(cexec.SHUT, 1, cexec.FLAG_WHOLE)
    peer.send(cexec.CREDIT, 1, bytes=cexec.WINDOW)
    peer.send(cexec.SIGNAL, signal="TERM")
    peer.send(cexec.RESIZE, lines=1, columns=1)
    peer.send(cexec.GO)
    peer.send(cexec.PING)


def test_frames_of_the_job_before_do_nothing(cluster):
    worker = cluster.worker("cat", env={"CONCURRENCY": "1"})
    with BatchPeer(cluster) as client:
        for number in range(5):
            out, end = client.end(b"data %d" % number)
            assert (out, end.more, end.how, end.status) == (b"data %d" % number, 1, cexec.HOW_EXITED, 0)
            late_frames(client.peer)
            client.begin()
        assert client.end(b"last")[0] == b"last"
    free_again(cluster, worker)
    assert supervisors(worker) == 2


def test_the_time_for_the_next_job_begins_when_exit_has_arrived(cluster):
    """A client that is slow to read: the connection is kept for it, though another waits, and its next JOB is taken."""
    altered(cluster, OFFER_SECONDS=1.0)
    worker = cluster.worker("sh", "-c", "cat; head -c 4000000 /dev/zero", env={"CONCURRENCY": "1"})
    with BatchPeer(cluster) as client:
        client.peer.raw(data_frame(0, b"one"))
        client.peer.send(cexec.EOF, 0, cexec.FLAG_WHOLE)
        until(lambda: b"-> EXIT" in read(worker.log), "the end of the first job")
        other = verbose_client(cluster)
        until(lambda: "try 4, " in other.said(), "more than the time that a JOB has")
        assert "-> GO" not in other.said()
        size, end = 0, None
        while end is None:
            kind, payload = client.peer.next()
            size += len(payload) if kind is cexec.DATA else 0
            end = payload if kind is cexec.EXIT else None
        assert size == 4000003 and end.more == 1
        client.begin()
        client.peer.expect(cexec.ACCEPT)
    assert other.wait(PATIENCE) == 0
    no_defect(read(worker.log))


@pytest.mark.parametrize("wrong, why", [
    (lambda client: client.job(), b"JOB within a job"),
    (lambda client: (client.end(), client.job(), client.job()), b"JOB within a job"),
    (lambda client: client.peer.send(cexec.AUTH, proof=bytes(32)), b"AUTH out of place"),
    (lambda client: (client.end(), client.begin([(256, 256, 1)])), b"higher descriptors than the first"),
    (lambda client: (client.end(), client.begin([(1, 1, 77)])), b"impossible flags 77"),
    (lambda client: (client.end(), client.job(), client.peer.raw(data_frame(0, b"x"))), b"DATA before GO"),
    (lambda client: (client.end(), client.begin(), client.peer.send(cexec.GO)), b"GO twice"),
    (lambda client: (client.end(), client.job()), b"no GO"),
    (lambda client: (client.end(), client.peer.raw(os.urandom(999))), b"frame of kind"),
    (lambda client: client.end(), None), (lambda client: (client.end(), client.peer.send(cexec.PING)), None)],
    ids=["JOB within a job", "JOB twice", "AUTH", "a high number", "an impossible JOB", "DATA before GO", "GO twice",
         "JOB without GO", "garbage", "nothing", "nothing but PING"])
def test_client_that_goes_wrong_in_a_batch(cluster, wrong, why):
    """Its slot is free again, though it keeps the connection open."""
    altered(cluster, OFFER_SECONDS=1.0)
    worker = cluster.worker("cat", env={"CONCURRENCY": "1"})
    with BatchPeer(cluster) as client:
        wrong(client)
        assert cluster.client(input=b"ab", env={"CEXEC_TIMEOUT_WAIT": "10"}).stdout == b"ab"
        if why:
            assert why in read(worker.log)
    free_again(cluster, worker)


def test_job_that_is_of_no_batch_has_no_next(cluster):
    worker = cluster.worker("cat", env={"CONCURRENCY": "1"})
    with BatchPeer(cluster, batch=bytes(8)) as client:
        assert client.end()[1].more == 0
        client.begin()
        assert client.peer.next() is None and supervisors(worker) == 1
    free_again(cluster, worker)


@pytest.mark.parametrize("rows", [[(0, 0, 1), (1, 1, 2)], [(0, 0, 9), (1, 1, 2), (5, 5, 7), (6, 5, 7)],
                                  [(0, 0, 19), (1, 0, 19)]], ids=["pipes", "files and sockets", "terminal"])
@HEAVY
def test_thousands_of_jobs_on_one_connection(cluster, rows):
    """The supervisor has as many descriptors and as much memory as after the first hundred."""
    count = 3000 if rows[0][2] == 1 else 300
    worker = cluster.worker("true", env={"CONCURRENCY": "1"}, verbose=False)
    until(lambda: listening(worker.pid), "the start")
    with BatchPeer(cluster) as client:
        figures = []
        for number in range(count):
            while client.peer.next()[0] is not cexec.EXIT:
                pass
            if number in (count // 10, count - 1):
                supervisor, = children_of(worker.pid)
                until(lambda: state_of(supervisor) == state_of(worker.pid) == "S", "both to wait for what comes next")
                figures.append((open_files(supervisor), rss(supervisor), open_files(worker.pid), rss(worker.pid)))
            client.peer.send(cexec.JOB, descriptors=rows, term="x" if rows[0][2] == 19 else "")
            client.peer.send(cexec.GO)
            if rows[0][2] == 9:
                client.peer.send(cexec.EOF, 0, cexec.FLAG_WHOLE)
    print(figures)
    early, late = figures
    assert late[0] <= early[0] and late[2] <= early[2]
    assert late[1] - early[1] < 2000000 and late[3] - early[3] < 2000000


# ---- cservice: load, spread, the line --------------------------------------

@pytest.mark.parametrize("busy, slots, average, runnable, cpus, load, delay", [
    (0, 2, 0.0, 0, 2, 0.0, 0.0),
    (0, 2, 0.19, 2, 2, 0.0, 0.0),           # under 0.1 a CPU is idle
    (0, 2, 0.2, 0, 2, 0.1, 0.002),
    (0, 4, 0.0, 8, 4, 1.0, 0.020),          # runnable beyond the CPUs
    (0, 4, 2.0, 6, 4, 0.5, 0.010),          # the worse of both
    (2, 4, 0.0, 0, 4, 0.5, 0.010),
    (2, 4, 4.0, 0, 4, 1.5, 0.030),
    (0, 1, 1000.0, 0, 1, 1000.0, 1.0),      # capped
    (5, 4, 0.0, 0, 4, 1.25, 0.025),
])
def test_load_and_delay(busy, slots, average, runnable, cpus, load, delay):
    assert cexec.load_delay(busy, slots, average, runnable, cpus) == (pytest.approx(load), pytest.approx(delay))


def test_the_less_loaded_of_two_is_sooner():
    ladder = [cexec.load_delay(busy, 4, average, 0, 4)[1] for average in (0, 2, 8) for busy in range(5)]
    for busy, average in ((0, 0), (1, 0), (0, 2), (3, 2), (0, 8)):
        here = cexec.load_delay(busy, 4, average, 0, 4)[1]
        assert here < cexec.load_delay(busy + 1, 4, average, 0, 4)[1]
        assert here < cexec.load_delay(busy, 4, average + 1, 0, 4)[1]
    assert len(set(ladder)) > 10


def test_spread_follows_the_offers():
    assert cexec.next_spread(0.1, 3) == pytest.approx(0.1)
    assert cexec.next_spread(0.1, 6) == pytest.approx(0.2)
    assert cexec.next_spread(0.1, 0) == cexec.next_spread(0.1, 1) == pytest.approx(0.05)     # never below a half
    assert cexec.next_spread(0.01, 65535) == pytest.approx(0.16)                             # nor beyond 16 times
    assert cexec.next_spread(0.9, 65535) == 1.0
    assert cexec.next_spread(0.0, 0) == cexec.SPREAD_MIN / 2


def test_spread_of_two_workers_is_none_and_that_of_a_hundred_settles():
    spread = 1.0
    for _ in range(20):
        spread = cexec.next_spread(spread, 2)
    assert cexec.spread_delay(spread, 0.999) == 0.0
    spread, offers = cexec.SPREAD_MIN / 2, []
    for _ in range(20):                 # whoever waits less than 5 ms makes an offer before it hears the claim
        delays = [cexec.spread_delay(spread, i / 100) for i in range(100)]
        offers.append(sum(delay < 0.005 for delay in delays))
        spread = cexec.next_spread(spread, offers[-1])
    assert offers[0] == 100 and max(offers[3:]) <= 10 and min(offers) >= 1


def test_the_choice_among_the_oldest_follows_the_offers():
    assert cexec.next_few(4.0, cexec.OFFERS_IN_LINE) == 4.0
    assert cexec.next_few(4.0, 0) == cexec.next_few(4.0, 1) == 2.0 and cexec.next_few(4.0, 65535) == 16.0
    assert cexec.next_few(1.0, 0) == 1.0 and cexec.next_few(60.0, 100) == cexec.FEW_MAX


def test_spread_delay_is_a_fraction_of_it():
    assert cexec.spread_delay(0.5, 0.5) == 0.25 and cexec.spread_delay(0.5, 0.0) == 0.0
    assert cexec.spread_delay(cexec.SPREAD_MIN, 0.5) > 0.0 == cexec.spread_delay(cexec.SPREAD_MIN * 0.99, 0.5)


def waiting(name, number, since, heard=0.0):
    pub, nonce = made_pub()._replace(name=name), bytes([number]) * 16
    data = make_datagram(cexec.ANNOUNCE, pub, nonce, 9, **FIRST_TRY)
    client = cexec.KnownClient(cexec.Datagram(data), since)
    client.announced(cexec.Datagram(data), heard)
    return client


def queued(*members):
    """The Clients of a worker where these are in the line."""
    clients = cexec.Clients()
    for client in members:
        assert clients.add(client)
        clients.move(client, cexec.QUEUED)
    return clients


def line_of(text):
    """A Line of names, who joined in this order, each a second after the one before; and its clients."""
    line = cexec.Line()
    clients = [waiting(name, number, since=number) for number, name in enumerate(text)]
    for client in clients:
        line.join(client)
    return line, clients


def served(line, few=1, fraction=0.0):
    order = []
    while line:
        order.append(line.take(few, fraction))
    return order


@pytest.mark.parametrize("text, order", [
    ("", ""), ("a", "0"), ("aaa", "012"),
    ("aaab", "0312"),                   # names in turn: b does not wait for all of a's
    ("aaabbb", "031425"), ("abcabc", "012345"), ("aabc", "0231"), ("baaa", "0123")])
def test_line_serves_names_in_turn_and_the_oldest_of_each(text, order):
    line, clients = line_of(text)
    assert len(line) == len(text)
    assert [client.nonce[0] for client in served(line)] == [int(place) for place in order]
    assert len(line) == 0 and not line


def test_line_goes_by_who_waits_longest_not_by_who_joined_first():
    line = cexec.Line()
    for number, since in ((1, 30.0), (2, 10.0), (3, 20.0)):
        line.join(waiting("a", number, since))
    assert [client.nonce[0] for client in served(line)] == [2, 3, 1]


@pytest.mark.parametrize("few, fraction, first", [
    (1, 0.999, 0), (3, 0.0, 0), (3, 0.34, 1), (3, 0.999, 2), (100, 0.999, 4), (1.9, 0.999, 0), (2.0, 0.999, 1)])
def test_line_takes_one_of_the_oldest_few(few, fraction, first):
    line, clients = line_of("aaaaa")
    assert line.take(few, fraction) is clients[first] and clients[first] not in line and len(line) == 4


@pytest.mark.parametrize("text", ["aaaa", "abab", "aaab", "abbbb", "abcdabcdaa"])
def test_line_tells_how_many_are_ahead(text):
    """What was told may not be fewer than come before, as long as nobody leaves: the turn of a name may come first."""
    line, clients = line_of(text)
    told = {client.nonce: line.ahead(client) for client in clients}
    order = served(line)
    for place, client in enumerate(order):
        assert place <= told[client.nonce] <= place + len(set(text)) - 1, (text, place)
    assert told[clients[0].nonce] <= len(set(text)) - 1


def test_line_keeps_its_books():
    """Whoever joins, leaves or is served: each name's clients in their order, and which name has most."""
    for seed in range(20):
        chance, line, model = random.Random(seed), cexec.Line(), {}
        for number in range(120):
            if model and chance.random() < 0.4:
                client = chance.choice(list(model.values()))
                if chance.random() < 0.5:
                    client = line.take(1 + 3 * chance.random(), chance.random())
                line.leave(client)
                line.leave(client)              # twice is once
                del model[client.nonce]
            else:
                client = waiting(chance.choice("aaab"), number, since=float(chance.randrange(5)))
                assert client not in line
                line.join(client)
                model[client.nonce] = client
            counts = collections.Counter(client.name for client in model.values())
            assert sorted(client.nonce for client in line) == sorted(model) and len(line) == len(model)
            assert all(client in line for client in model.values()) and bool(line) == bool(model)
            assert line.most == max(counts.values(), default=0)
            assert {size: set(names) for size, names in line.sizes.items()} == {
                size: {name for name in counts if counts[name] == size} for size in counts.values()}
            for members in line.names.values():
                assert members == sorted(members)


def test_line_forgets_whoever_is_silent():
    silent, alive = waiting("a", 1, 0.0, heard=100.0), waiting("b", 2, 0.0, heard=104.0)
    clients = queued(silent, alive)
    clients.expire(100.0 + cexec.LINE_SECONDS)
    assert len(clients.line) == 2
    clients.expire(100.1 + cexec.LINE_SECONDS)
    assert silent not in clients.line and alive in clients.line and list(clients.line.names) == ["b"]


@pytest.mark.parametrize("pause, patience", [(0, 5), (62, 5), (1250, 5), (10240, 40.96), (2 ** 32 - 1, 60)])
def test_line_is_as_patient_as_an_announcement_says(pause, patience):
    """A group of thousands of addresses is announced to every ten seconds."""
    client = waiting("a", 1, 0.0)
    data = make_datagram(cexec.ANNOUNCE, made_pub(), NONCE, 9, **dict(FIRST_TRY, pause=pause))
    client.announced(cexec.Datagram(data), 100.0)
    clients = queued(client)
    clients.expire(100.0 + patience - 0.1)
    assert client in clients.line
    clients.expire(100.0 + patience + 0.1)
    assert client not in clients.line


class StillLoop(cexec.Loop):
    """No connection ever gets anywhere: what becomes of an offer, the test decides."""

    def on_write(self, fd, call):
        pass


@pytest.fixture
def desk():
    """A Worker with one slot, in this process: it hears announce() and say(), and said is what it answers."""
    settings = cexec.Settings(["cat"], 1, 0.0, [], None, 0, None, None, False)
    key = SimpleNamespace(master=MASTER, application=made_pub().application)
    made = cexec.Worker(StillLoop(), key, None, [], settings)
    made.said = []
    made.answer = lambda kind, client, to, handle, **fields: made.said.append((kind, client.nonce, fields))
    made.say = lambda kind, nonce, address, name="anyone", **fields: made.hear(
        cexec.Datagram(make_datagram(kind, made_pub(name=name), nonce, 9, **fields)), address, 0)

    def announce(nonce, address, attempt=1):
        made.say(cexec.ANNOUNCE, nonce, address, **dict(FIRST_TRY, attempt=attempt))
        for client in made.clients.under_way():
            if client.state is cexec.DELAYED:           # BOOST is 0
                client.timer.call()
        return made.clients.offers.get(("anyone", nonce))
    made.announce = announce
    yield made
    for offer in list(made.clients.offers.values()):
        offer.close()


def test_a_client_knows_no_way_that_is_not_drawn():
    client, clients = waiting("a", 1, 0.0), cexec.Clients()
    clients.add(client)
    with pytest.raises(RuntimeError, match="from NEW to SERVED is not in the drawing"):
        clients.move(client, cexec.SERVED)
    assert client.state is cexec.NEW and clients.find(client) is client


def test_two_ways_to_one_client(desk):
    """The way through ssh stands beside the direct one, which no copy of an announcement changes."""
    desk.has_lifeline(SimpleNamespace(here=lambda address: ("10.0.0.9", 22), connect=lambda handle: None))
    handle = "127.0.0.1", 9

    def heard(address, attempt, handle=None):
        data = make_datagram(cexec.ANNOUNCE, made_pub(), GOOD, 9, **dict(FIRST_TRY, attempt=attempt))
        desk.hear(cexec.Datagram(data), address, 0, handle)
        client = desk.clients.find(cexec.Datagram(data))
        return client.address, client.handle
    assert heard("10.0.0.5", 1, handle) == ("10.0.0.5", handle)
    assert heard("127.0.0.2", 1) == ("127.0.0.2", handle)
    assert heard("127.0.0.3", 1) == ("127.0.0.2", handle)           # a replay from elsewhere
    assert heard("10.0.0.5", 2, handle) == ("127.0.0.2", handle)
    assert heard("127.0.0.4", 3) == ("127.0.0.4", handle)


def test_nobody_that_was_served_is_forgotten_for_announcements_or_claims():
    """Or a replay of its announcement would get an offer, and its complaint would not count."""
    clients, ours, other = cexec.Clients(limit=3), waiting("a", 1, 0.0), waiting("a", 2, 0.0)
    clients.add(ours)
    for state in (cexec.DELAYED, cexec.OFFERED, cexec.SERVED, cexec.CLAIMED):
        clients.move(ours, state)
    clients.move(other, cexec.CLAIMED)
    for number in range(3, 13):
        assert clients.add(waiting("a", number, 0.0))
    assert clients.find(ours) is ours and clients.find(other) is other and len(clients.unserved) == 3
    for number in range(20, 30):
        clients.move(waiting("a", number, 0.0), cexec.CLAIMED)
    assert clients.find(ours) is ours and clients.find(other) is None and len(clients.others) == 3


def test_a_client_with_an_offer_or_a_place_is_not_forgotten():
    clients, members = cexec.Clients(limit=3), [waiting("a", number, 0.0) for number in range(5)]
    for client, state in zip(members, (cexec.DELAYED, cexec.QUEUED)):
        clients.add(client)
        clients.move(client, state)
    assert clients.add(members[2]) and clients.add(members[3]) and clients.find(members[2]) is None
    clients.move(members[3], cexec.QUEUED)
    assert not clients.add(members[4]) and clients.find(members[4]) is None and len(clients.line) == 2


def test_a_full_line_has_room_for_another_name():
    """Of the name that has most of all clients in the line, the newest goes; which may be the newcomer itself."""
    first, many = waiting("b", 1, 90.0), [waiting("a", number, float(number)) for number in range(2, 7)]
    clients = queued(first, *many)
    clients.limit = 6

    def comes(name, number, since):
        client = waiting(name, number, since)
        if clients.add(client):
            clients.move(client, cexec.QUEUED)
        assert len(clients.unserved) == len(clients.line) == 6 and first in clients.line
        assert (clients.find(client) is client) == (client in clients.line)
        return client in clients.line
    assert comes("b", 10, 100.0) and many[4] not in clients.line and clients.find(many[4]) is None
    assert not comes("a", 11, 5.5) and many[3] in clients.line
    assert comes("a", 12, 1.0) and many[3] not in clients.line          # it waits longer
    assert comes("c", 13, 101.0) and many[2] not in clients.line
    assert comes("c", 14, 102.0) and many[1] not in clients.line        # now each name has two
    assert not comes("c", 15, 103.0)
    assert comes("d", 16, 104.0) and len(clients.line.names) == 4


def test_one_name_does_not_keep_others_out_of_the_line(cluster):
    """Its clients are more than the worker remembers; another name's is told its place, and is served in its turn."""
    altered(cluster, MEMORY="40")
    cluster.run_here("ckeygen", "-n", "mallory", "app", "mallory.pub")
    worker = cluster.worker(*ORDERLY, env={"CONCURRENCY": "1"})
    first = held_job(cluster, "N=first")
    before = in_line(cluster, 0, "N=before", stdin=subprocess.DEVNULL)
    with Asker(cluster, cexec.open_pub(cluster.path("mallory.pub"))) as mallory:
        def flood():
            for _ in range(200):
                mallory.say(cexec.ANNOUNCE, nonce=os.urandom(16), attempt=1, waited=2 ** 32 - 1, pause=15000)
        flood()
        after = in_line(cluster, 3, "N=after", stdin=subprocess.DEVNULL)
        flood()
        outcomes(first, before, after)          # to end the first one closes its input
    assert [word for word in order(cluster) if "mallory" not in word] == ["anyonefirst", "anyonebefore", "anyoneafter"]
    no_defect(read(worker.log))


def test_announcement_of_a_job_that_was_served_does_nothing(desk, monkeypatch):
    """Until its supervisor says that the client left before GO, and nobody has claimed it."""
    monkeypatch.setattr(desk.supervisors, "fork", lambda settings, client, link, job: None)
    nonce = cexec.token_nonce(TOKEN)
    desk.start_job(desk.announce(nonce, "127.0.0.2"), None)
    client = desk.clients.find(SimpleNamespace(name="anyone", nonce=nonce))
    assert client.state is cexec.SERVED and desk.announce(nonce, "127.0.0.2", attempt=2) is None
    desk.job_returned(client)
    again = desk.announce(nonce, "127.0.0.2", attempt=3)
    assert again
    desk.start_job(again, None)
    desk.say(cexec.CLAIM, nonce, "127.0.0.2", token=TOKEN, offers=1)
    desk.job_returned(client)
    assert client.state is cexec.CLAIMED and desk.announce(nonce, "127.0.0.2", attempt=4) is None


def test_a_draining_worker_takes_back_what_is_under_way(desk):
    offer, _ = desk.announce(BAD, "127.0.0.2"), desk.announce(GOOD, "127.0.0.3")
    desk.hear(cexec.Datagram(make_datagram(cexec.ANNOUNCE, made_pub(), THIRD, 9, **FIRST_TRY)), "127.0.0.4", 0)
    assert len(desk.clients.line) == 2 and desk.clients.offers
    desk.signalled(signal.SIGTERM)
    assert offer.dial.sock is None and not desk.clients.offers and not desk.clients.line and not desk.loop.running
    assert {client.state for client in desk.clients.unserved.values()} == {cexec.NEW}


def test_an_offer_that_hangs_leaves_the_only_slot_to_others(desk):
    hanging = desk.announce(BAD, "127.0.0.2")
    assert desk.free_slots() == 0 and desk.announce(GOOD, "127.0.0.3") is None and len(desk.clients.line) == 1
    hanging.late()
    assert ("anyone", GOOD) in desk.clients.offers and len(desk.clients.line) == 0
    assert desk.free_slots() == 0 and ("anyone", BAD) in desk.clients.offers


def test_a_failed_connection_costs_the_client_its_place(desk):
    """It is told so, and tried again later, and neither that nor another nonce of its host holds the slot."""
    hanging = desk.announce(BAD, "127.0.0.2")
    hanging.late()
    hanging.lost("no answer")
    assert desk.said == [(cexec.BUSY, BAD, {"worker_id": desk.id, "attempt": 1, "ahead": 0, "failures": 1,
                                            "address": ""})]
    assert desk.announce(BAD, "127.0.0.2", attempt=2) is None and len(desk.clients.line) == 0     # not yet
    another = desk.announce(THIRD, "127.0.0.2")
    assert another and desk.free_slots() == 1
    good = desk.announce(GOOD, "127.0.0.3")
    assert good and desk.free_slots() == 0
    client = desk.clients.unserved["anyone", BAD]
    client.retry_at = 0.0
    again = desk.announce(BAD, "127.0.0.2", attempt=3)          # though no slot is free
    assert again and desk.free_slots() == 0
    again.lost("no answer")
    assert desk.said[-1] == (cexec.BUSY, BAD, {"worker_id": desk.id, "attempt": 3, "ahead": 0, "failures": 2,
                                               "address": ""})


def test_a_client_that_is_slow_to_connect_finds_its_place_in_the_line(desk):
    """If the slot is taken by then; and the next time it is waited for."""
    far = desk.announce(BAD, "127.0.0.2")
    far.late()
    near = desk.announce(GOOD, "127.0.0.3")
    far.began -= 1.0
    far.link_ready(None)
    assert desk.clients.offers == {("anyone", GOOD): near}
    assert [client.nonce for client in desk.clients.line] == [BAD] and desk.said[-1][2]["failures"] == 0
    near.end("it has another worker")
    far = desk.clients.offers["anyone", BAD]
    assert far.hold == cexec.HOLD_MAX and desk.free_slots() == 0


def test_a_copy_of_an_announcement_gets_no_second_offer(desk):
    """Nor an older one, which may be a replay; nor one that says nothing of where its client listens."""
    for attempt, good in ((2, True), (2, False), (1, False), (3, True)):
        offer = desk.announce(GOOD, "127.0.0.2", attempt)
        assert bool(offer) == good
        if offer:
            offer.end("it has left")
    nowhere = cexec.Datagram(make_datagram(cexec.ANNOUNCE, made_pub(), THIRD, 0, **FIRST_TRY))
    desk.hear(nowhere, "127.0.0.2", 0)
    assert desk.clients.find(nowhere) is None


def test_backoff_of_a_client_doubles_up_to_a_bound():
    client, waits = waiting("a", 1, 0.0), []
    for _ in range(2000):
        client.failed(100.0)
        waits.append(client.retry_at - 100.0)
    assert waits[:6] == [1, 2, 4, 8, 16, 16] and waits[-1] == cexec.BACKOFF_MAX


def test_our_own_lack_of_descriptors_is_no_failure_of_the_client(desk, monkeypatch):
    monkeypatch.setattr(cexec, "begin_connection", lambda address, port: (None, "Too many open files"))
    offer = desk.announce(BAD, "127.0.0.2")
    desk.loop.turn()
    assert offer and not desk.clients.offers and desk.said == [] and desk.clients.unserved["anyone", BAD].failures == 0


def test_only_claims_of_announced_jobs_steer_the_spread(desk):
    for _ in range(50):
        token = os.urandom(32)
        desk.say(cexec.CLAIM, cexec.token_nonce(token), "127.0.0.2", token=token, offers=65535)
    assert (desk.pace.spread, desk.pace.few) == (cexec.SPREAD_MIN / 2, 1.0)
    desk.announce(cexec.token_nonce(token), "127.0.0.2")
    assert not desk.clients.offers                      # it is remembered, all the same
    nonce = cexec.token_nonce(TOKEN)
    desk.announce(nonce, "127.0.0.2")
    for _ in range(2):                          # and the second time it is a copy
        desk.say(cexec.CLAIM, nonce, "127.0.0.2", token=TOKEN, offers=65535)
        assert desk.pace.spread > cexec.SPREAD_MIN and desk.pace.few == 4.0


@pytest.mark.parametrize("others, fields, counts", [
    ([], {}, True),
    (["127.0.0.3"], {}, True),                  # another client's complaint, of another worker
    (["127.0.0.2"], {}, False),                 # its own: who complains of everyone
    ([], {"bytes_out": MUCH}, False),
    ([], {"bytes_out": MUCH - 1}, True),
    ([], {"bytes_in": cexec.WINDOW}, True),     # that much is sent unasked
    ([], {"bytes_in": cexec.WINDOW + MUCH}, False)])
def test_weight_of_a_complaint(desk, others, fields, counts):
    """A client with a bad link of its own does not penalise a worker for everybody."""
    desk.announce(NONCE, "127.0.0.2")
    complaint = filled(cexec.ALERT, event=cexec.ALERT_COMPLAINT, bytes_in=0, bytes_out=0, reason="lost: gone")
    for address in others:
        desk.say(cexec.ALERT, THIRD, address, **dict(complaint, worker_id=os.urandom(8)))
    desk.say(cexec.ALERT, NONCE, "127.0.0.2", **dict(complaint, worker_id=desk.id, **fields))
    assert desk.pace.penalty == (cexec.PENALTY if counts else 0.0)


def test_line_leave_and_join_again():
    line, clients = line_of("ab")
    line.leave(clients[0])
    line.leave(clients[0])
    assert clients[0] not in line and clients[1] in line and len(line) == 1
    line.join(clients[0])
    line.join(clients[0])
    assert served(line) == [clients[1], clients[0]]


# ---- cservice: many workers, simulated by a seeded model -------------------


class Model:
    """Idle workers that hear announcements one after the other: what each of them costs."""

    def __init__(self, workers, seed=1):
        self.random = random.Random(seed)
        self.workers = workers
        self.spread = cexec.SPREAD_MIN / 2          # all hear the same claims, so all have the same

    def announcement(self):
        """(offers made, seconds to the first, which worker was the first)."""
        delays = sorted((self.random.uniform(0.0001, 0.0005) +
                         cexec.spread_delay(self.spread, self.random.random()), worker)
                        for worker in range(self.workers))
        first, winner = delays[0]
        offers = sum(delay < first + HANDSHAKE for delay, _ in delays)
        self.spread = cexec.next_spread(self.spread, offers)
        return offers, first, winner


@pytest.mark.parametrize("workers, most", [(1, 1), (2, 2), (10, 6), (100, 6), (1000, 12), (10000, 75)])
def test_offers_for_an_announcement_among_idle_workers(workers, most):
    model = Model(workers)
    results = [model.announcement() for _ in range(100)]
    offers = sorted(count for count, _, _ in results[10:])
    print("%5d workers: first %s, median %d, worst %d, time to the first %.1f ms" % (
        workers, [count for count, _, _ in results[:4]], offers[len(offers) // 2], offers[-1],
        1000 * max(first for _, first, _ in results)))
    assert offers[len(offers) // 2] <= most
    assert max(first for _, first, _ in results[10:]) < 0.2         # simulated seconds, not ours


def test_two_workers_wait_for_nothing():
    model = Model(2)
    assert max(first for _, first, _ in (model.announcement() for _ in range(100))) <= 0.0005


def test_idle_workers_are_chosen_evenly():
    model = Model(10)
    wins = collections.Counter(model.announcement()[2] for _ in range(5000))
    assert len(wins) == 10 and max(wins.values()) < 1.3 * min(wins.values())


def test_the_spread_follows_when_workers_leave():
    model = Model(1000)
    for _ in range(30):
        model.announcement()
    model.workers = 2
    for _ in range(30):
        model.announcement()
    assert model.announcement()[1] <= 0.0005


def simulated(name, since):
    return SimpleNamespace(name=name, nonce=("%s %r" % (name, since)).encode(), since=since, heard=since)


def serve(workers, clients, seed=1):
    """Every worker has one slot that frees at the same time: rounds of offers until all clients are served.

    Returns (offers for each client served, the order in which they were served).
    """
    rng, served, offers, few = random.Random(seed), [], 0, 1
    lines = []
    for _ in range(workers):
        line = cexec.Line()
        for client in clients:
            line.join(client)
        lines.append(line)
    while len(served) < len(clients):
        chosen = collections.defaultdict(int)
        for line in lines:
            if line:
                chosen[line.take(few, rng.random()).nonce] += 1
        taken = [client for client in clients if client.nonce in chosen and client not in served]
        served += taken
        offers += sum(chosen.values())
        for client in taken:                # its claim: everybody forgets it, and learns how offers collide
            few = cexec.next_few(few, chosen[client.nonce])
            for line in lines:
                line.leave(client)
    return offers / len(clients), served


@pytest.mark.parametrize("workers, most", [(1, 1), (2, 2), (10, 3.5), (100, 6)])
def test_workers_that_become_free_at_once_do_not_all_run_to_one_client(workers, most):
    clients = [simulated("anyone", float(number)) for number in range(500)]
    cost, served = serve(workers, clients)
    late = max(abs(place - clients.index(client)) for place, client in enumerate(served))
    print("%d workers: %.2f offers for each client, displaced by %d at most" % (workers, cost, late))
    assert cost <= most
    assert late <= 3 * workers


def test_one_worker_serves_strictly_oldest_first_and_names_in_turn():
    many = [simulated("many", float(number)) for number in range(20)]
    served = serve(1, many + [simulated("few", 100.0 + number) for number in range(2)])[1]
    assert [client.name for client in served[:4]] in (["many", "few", "many", "few"], ["few", "many", "few", "many"])
    assert [client for client in served if client.name == "many"] == many


# ---- cservice: what clients may ask for, and who may -----------------------


@pytest.mark.parametrize("rows, variables, good", [
    (GOOD_ROWS, ["A=1"], True), *((rows, [], True) for rows in (
        [], [(1023, 1023, 1)], [(5, 5, 1 | 2 | 4)], [(0, 0, 1 | 8)])),
    *((rows, [], False) for rows in (
        [(1024, 1024, 1)], [(65535, 65535, 1)], [(0, 0, 0)], [(0, 0, 2 | 8)], [(0, 0, 3)], [(0, 0, 1 | 4)], [(1, 0, 1)],
        [(0, 0, 1), (1, 0, 2)], [(0, 0, 1), (0, 0, 1)], [(2, 1, 2), (1, 1, 2)])),
    *((GOOD_ROWS, [word], False) for word in ("A", "=1", "A B=1", "\xe9=1", "A=1\0B=2"))])
def test_what_a_job_may_ask_for(rows, variables, good):
    job = cexec.JOB.unpack(cexec.JOB.pack(**filled(cexec.JOB, descriptors=rows, variables=len(variables))))
    words, _ = words_sent([variable.encode() for variable in variables])
    if good:
        checked = cexec.check_job(job, words, 0)
        assert checked.descriptors == job.descriptors
        assert checked.environment == [variable.encode() for variable in variables] and checked.arguments == []
    else:
        with pytest.raises(cexec.ProtocolError):
            cexec.check_job(job, words, 0)


def test_no_name_of_the_file_is_given_twice():
    """A constant of one section that another section sets again is wrong in the first."""
    names = collections.Counter()
    for statement in ast.parse(read(PROGRAM)).body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            names[statement.name] += 1
        elif isinstance(statement, ast.Assign):
            names.update(found.id for target in statement.targets for found in ast.walk(target)
                         if isinstance(found, ast.Name) and isinstance(found.ctx, ast.Store))
    assert len(names) > 500 and [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("rows, given, good", [
    ([(0, 0, T), (1, 0, T), (2, 0, T)], {"term": "xterm-256color", "modes": ["VERASE=8", "ECHO=0", "NEW=255"]}, True),
    ([(2, 2, T), (1, 1, 2)], {"term": "x" * 64}, True),
    *((rows, {}, False) for rows in ([(0, 0, T)], [(0, 0, 1 | 32)], [(0, 0, 7 | 8)])),
    ([(0, 0, 1)], {"term": "vt100"}, False), ([(0, 0, 1)], {"term": "/"}, False),
    *(([(0, 0, T)], {"term": term}, False) for term in ("../x", "x" * 65, "a b", "\udcff")),
    *((rows, {"term": "vt100"}, False) for rows in (
        [(0, 0, T), (1, 1, T)], [(0, 0, T | 8)], [(0, 0, T | 4)], [(0, 0, 1 | 16)])),
    *(([(0, 0, T)], {"term": "vt100", "modes": [mode]}, False)
      for mode in ("VERASE", "VERASE=256", "VERASE=-1", "VERASE=0001", "A=1=1", "=1"))])
def test_what_a_job_may_ask_of_a_terminal(rows, given, good):
    job = cexec.JOB.unpack(cexec.JOB.pack(**filled(cexec.JOB, descriptors=rows, **given)))
    if good:
        assert cexec.check_job(job, cexec.Words(), 0).descriptors == job.descriptors
    else:
        with pytest.raises(cexec.ProtocolError):
            cexec.check_job(job, cexec.Words(), 0)


def test_worker_with_another_key_never_gets_a_job(cluster):
    other = cluster.path("other")
    cluster.run("ckeygen", other, check=True)
    wrong = cluster.worker("echo", "wrong", key=other)
    assert b"no worker answered" in failed(cluster.client(env={"CEXEC_TIMEOUT_ACCEPT": "1"}))
    cluster.worker("echo", "right")
    assert [cluster.client().stdout for _ in range(4)] == [b"right\n"] * 4
    assert b"offer" not in read(wrong.log)


def test_revoked_name_is_not_served_and_another_is(cluster):
    worker = cluster.worker("sh", "-c", "echo served $REMOTE_USER", options=("-x", "bob", "-x", "carol"))
    for name in ("bob", "alice"):
        cluster.run("ckeygen", "-n", name, cluster.key, check=True)
    bob = cluster.start("cexec", cluster.path("app-bob.pub"), env={"CEXEC_TIMEOUT_ACCEPT": "2"},
                        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert cluster.run("cexec", cluster.path("app-alice.pub")).stdout == b"served alice\n"
    assert cluster.client().stdout == b"served anyone\n"
    out, errors = bob.communicate(timeout=60)
    assert (bob.returncode, out) == (111, b"") and b"no worker answered" in errors
    assert b"bob: the name is refused" in read(worker.log) and b"ANNOUNCE" in read(worker.log)


def test_name_of_another_client_cannot_be_taken(cluster):
    """Bob's secret under Alice's name, which is what a revoked client would try."""
    worker = cluster.worker("true")
    cluster.run("ckeygen", "-n", "bob", cluster.key, check=True)
    put(cluster.path("forged.pub"), read(cluster.path("app-bob.pub")).decode().replace(" bob ", " alice "))
    done = cluster.run("cexec", cluster.path("forged.pub"), env={"CEXEC_TIMEOUT_ACCEPT": "1"})
    assert done.returncode == 111 and b"alice: wrong MAC" in read(worker.log)
    assert b"offer" not in read(worker.log)


def test_replayed_announcement_runs_nothing(cluster):
    """A worker that was not there when it was sent makes an offer, and learns that nobody can prove anything."""
    runs = cluster.path("runs")
    command = ("sh", "-c", "echo run >>%s; cat" % runs)
    first = cluster.worker(*command)
    with Ear(group_port(cluster)) as ear, socket.socket() as trap:
        assert cluster.client(input=b"one").stdout == b"one"
        announced, claimed = ear.wait_for(cexec.ANNOUNCE)[0], ear.wait_for(cexec.CLAIM)[0]
        trap.bind(("127.0.0.1", 0))
        trap.listen(8)
        trap.settimeout(20)
        port = trap.getsockname()[1]
        for proof in (None, bytes(32), os.urandom(32)):
            fresh = cluster.worker(*command)
            ear.say(announced.readdressed("127.0.0.1", port, 0))
            with Peer(trap.accept()[0]) as peer:
                assert peer.expect(cexec.HELLO).nonce == announced.nonce
                if proof:
                    peer.send(cexec.AUTH, proof=proof)
                peer.send(cexec.JOB)
                peer.send(cexec.GO)
                assert peer.next() is None
            ear.say(announced.data)             # as it was sent: a lower try than it knows
            ear.say(claimed.data)
            until(lambda: read(fresh.log).count(b"<- CLAIM") >= 1, "the claim's replay")
            assert read(fresh.log).count(b"offer to") == 1
            signalled(fresh)
        fresh = cluster.worker(*command)
        known = read(first.log).count(b"<- ANNOUNCE")
        ear.say(announced.data)                 # the return address is whoever sends it, its port is closed
        until(lambda: b"Connection refused" in read(fresh.log), "an offer to nobody")
        until(lambda: read(first.log).count(b"<- ANNOUNCE") > known, "the first worker's hearing all that")
        assert b"offer to" not in read(first.log) and read(first.log).count(b"forked") == 1    # it knows that job
        trap.settimeout(0)
        with pytest.raises(OSError):
            trap.accept()
    assert read(runs) == b"run\n"
    assert cluster.client(input=b"two").stdout == b"two" and read(runs) == b"run\n" * 2
    no_defect(read(first.log), read(fresh.log))


def oversized(asker, peer):
    peer.send(cexec.AUTH, proof=asker.proof(peer))
    peer.raw(cexec.FRAME_HEAD.pack(cexec.JOB.code, 0, 0, 2 ** 31) + bytes(cexec.CONTROL_MAX))


def proved(*frames_of_it):
    """Frames behind a right AUTH."""
    def send(asker, peer):
        peer.send(cexec.AUTH, proof=asker.proof(peer))
        for kind, fields in frames_of_it:
            peer.send(kind, **fields)
    return send


def accepted(data):
    """Bytes behind a JOB that was accepted, in place of GO."""
    def send(asker, peer):
        peer.send(cexec.AUTH, proof=asker.proof(peer))
        peer.send(cexec.JOB, descriptors=[(0, 0, 1)])
        peer.expect(cexec.ACCEPT)
        peer.raw(data)
    return send


def proof_of(change):
    def send(asker, peer):
        peer.send(cexec.AUTH, proof=change(asker, peer))
        peer.send(cexec.JOB)
    return send


INTRUSIONS = [
    ("JOB first", b"JOB out of place", lambda asker, peer: peer.send(cexec.JOB)),
    ("GO first", b"GO out of place", lambda asker, peer: peer.send(cexec.GO)),
    ("DATA first", b"DATA out of place", lambda asker, peer: peer.raw(data_frame(0, b"x" * 100000))),
    ("no proof", b"a wrong proof", proof_of(lambda asker, peer: bytes(32))),
    ("another secret", b"a wrong proof",
     proof_of(lambda asker, peer: cexec.client_proof(os.urandom(32), peer.hello.challenge, asker.nonce))),
    ("another challenge", b"a wrong proof",
     proof_of(lambda asker, peer: cexec.client_proof(asker.pub.secret, os.urandom(32), asker.nonce))),
    ("another nonce", b"a wrong proof",
     proof_of(lambda asker, peer: cexec.client_proof(asker.pub.secret, peer.hello.challenge, os.urandom(16)))),
    ("a proof cut short", b"AUTH cut short",
     lambda asker, peer: peer.raw(cexec.FRAME_HEAD.pack(cexec.AUTH.code, 0, 0, 31) + asker.proof(peer)[:31])),
    ("AUTH twice", b"AUTH out of place", proved((cexec.AUTH, {}))),
    ("GO without a JOB", b"GO out of place", proved((cexec.GO, {}))),
    ("an oversized JOB", b"frame of kind 3", oversized),
    ("a variable without a name", b"impossible variable", proved((cexec.JOB, {"environment": ["=x"]}))),
    ("a variable with a zero", b"other words than JOB", proved((cexec.JOB, {"environment": ["A=x\0LD_PRELOAD=y"]}))),
    ("words that JOB does not have", b"other words than JOB",
     proved((cexec.WORDS, {"bytes": b"A=1\0"}), (cexec.JOB, {}))),
    ("words without end", b"more than 6 MiB", proved(*[(cexec.WORDS, {"bytes": b"x" * cexec.CONTROL_MAX})] * 97)),
    ("words before a proof", b"WORDS out of place", lambda asker, peer: peer.send(cexec.WORDS, bytes=b"A=1\0")),
    ("arguments", b"takes none", proved((cexec.WORDS, {"bytes": b"x\0"}), (cexec.JOB, {"arguments": 1}))),
    ("a descriptor beyond", b"impossible descriptor", proved((cexec.JOB, {"descriptors": [(1024, 1024, 1)]}))),
    ("a descriptor for nothing", b"has impossible flags", proved((cexec.JOB, {"descriptors": [(1, 1, 0)]}))),
    ("DATA before GO", b"DATA before GO", accepted(data_frame(0, b"x"))),
    ("SIGNAL before GO", b"SIGNAL before GO", accepted(cexec.make_frame(cexec.SIGNAL, signal="TERM"))),
    ("EXIT before GO", b"EXIT before GO", accepted(cexec.make_frame(cexec.EXIT, **filled(cexec.EXIT)))),
    ("HELLO to a worker", b"HELLO out of place", proved((cexec.HELLO, {}))),
    ("random bytes", b"", lambda asker, peer: peer.raw(noise(5000))),
]


def test_nothing_runs_without_a_proof_a_job_and_go(cluster):
    runs = cluster.path("runs")
    worker = cluster.worker("sh", "-c", "echo run >>%s; cat" % runs)
    for name, reason, intrude in INTRUSIONS:
        before = len(read(worker.log))
        with Asker(cluster) as asker:
            with asker.offer() as peer:
                intrude(asker, peer)
                assert peer.next() is None, name        # closed, and not a word
            until(lambda: reason in read(worker.log)[before:], "%s: %s" % (name, reason))
            asker.say(cexec.CLAIM, token=asker.token)
        assert not os.path.exists(runs), name
    assert cluster.client(input=b"whole").stdout == b"whole" and read(runs) == b"run\n"
    no_defect(read(worker.log))


def test_variables_of_a_client_are_always_prefixed(cluster):
    """Whatever a client that keeps to no rule sends: LD_PRELOAD and PATH become PEER_LD_PRELOAD and PEER_PATH."""
    cluster.worker("env")
    with Asker(cluster) as asker, asker.offer() as peer:
        asker.begin(peer, descriptors=[(1, 1, 2)], linger=cexec.NO_LINGER,
                    environment=["LD_PRELOAD=/evil.so", "PATH=/evil", "REMOTE_USER=root"])
        out = b""
        while not out.endswith(b"\n") or b"PEER_" not in out:
            kind, payload = peer.next()
            out += payload if kind is cexec.DATA else b""
            if kind is cexec.EXIT:
                break
    lines = out.split(b"\n")
    assert {b"PEER_LD_PRELOAD=/evil.so", b"PEER_PATH=/evil", b"PEER_REMOTE_USER=root"} <= set(lines)
    assert b"REMOTE_USER=anyone" in lines
    assert not any(line.startswith(b"LD_PRELOAD") or line == b"PATH=/evil" for line in lines)


def test_connection_stays_after_a_command_that_cannot_be_started(cluster):
    """Until the client closes it: what is under way to the worker would reset the connection otherwise."""
    worker = cluster.worker(without_interpreter(cluster))
    with Asker(cluster) as asker, asker.offer() as peer:
        peer.send(cexec.AUTH, proof=asker.proof(peer))
        peer.send(cexec.JOB, descriptors=[(0, 0, 1), (1, 1, 2)], linger=cexec.NO_LINGER, environment=[])
        peer.expect(cexec.ACCEPT)
        supervisor, = children_of(worker.pid)
        peer.send(cexec.GO)
        peer.expect(cexec.EOF)
        assert peer.expect(cexec.EXIT).status == cexec.EXIT_NOT_FOUND and peer.next() is None
        until(lambda: state_of(supervisor) == "S", "the supervisor to wait")
    until(lambda: not children_of(worker.pid), "the supervisor's end")


def test_complaints_count_once_and_only_for_an_offer_that_was_made(cluster):
    worker = cluster.worker("true")

    def heard(count):
        until(lambda: read(worker.log).count(b"<- ALERT") == count, "complaint %d" % count)
        return read(worker.log).count(b"a complaint about us")

    with Asker(cluster) as asker, Asker(cluster) as other:
        with asker.offer() as peer:
            worker_id = peer.hello.worker_id
        other.complain(worker_id)               # it was never made an offer
        assert heard(1) == 0
        asker.complain(os.urandom(8))           # another worker
        assert heard(2) == 0
        asker.complain(worker_id, nonce=other.nonce)
        assert heard(3) == 0
        asker.complain(worker_id)
        assert heard(4) == 1
        asker.complain(worker_id)
        asker.complain(worker_id)
        assert heard(6) == 1
        until(lambda: b"offer to 127.0.0.1:%d" % asker.port in read(worker.log))
    assert cluster.client().returncode == 0     # later, but served


def test_only_who_announced_a_job_can_claim_it(cluster):
    """Another holder of the same pub, and one of another name, say that a waiting client is served."""
    worker = cluster.worker("cat", env={"CONCURRENCY": "1"})
    cluster.run("ckeygen", "-n", "bob", cluster.key, check=True)
    with Ear(group_port(cluster)) as ear:
        holder = cluster.start_client(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        own_claim = ear.wait_for(cexec.CLAIM)[0]        # it has the slot now
        victim = searching_client(cluster, group_port(cluster), CEXEC_TIMEOUT_ACCEPT="15")
        nonce = ear.wait_for(cexec.ANNOUNCE, known=[own_claim.nonce])[0].nonce
        until(lambda: b"every slot of a worker is busy" in read(victim.log), "a place in the line")
        for pub, token in ((cluster.pub, os.urandom(32)), (cluster.pub, own_claim.body.token),
                           (cluster.path("app-bob.pub"), os.urandom(32))):
            before = read(worker.log).count(b"<- CLAIM")
            with Asker(cluster, cexec.open_pub(pub)) as forger:
                forger.say(cexec.CLAIM, nonce=nonce, token=token, offers=9)
            until(lambda: read(worker.log).count(b"<- CLAIM") == before + 1, "a forged claim")
        assert holder.communicate(b"held", timeout=60)[0] == b"held"
        assert victim.communicate(b"waited", timeout=60)[0] == b"waited" and victim.returncode == 0, read(victim.log)


def refusals_said(worker):
    return re.findall("refuses jobs until .*", read(worker.log).decode())


def test_a_worker_without_descriptors_refuses_and_serves_later(cluster):
    """Says so itself, once; the clients find it again when that is over."""
    worker = cluster.worker("cat", env={"BOOST": "0"})
    limit, hard = resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/%d/fd" % worker.pid)))
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (highest + 2, hard))
    clients = [cluster.start_client(stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    until(lambda: read(worker.log).count(b"-> REFUSE") >= 2, "two refusals")
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (limit, hard))
    for client in clients:
        assert client.communicate(b"served", timeout=60)[0] == b"served"
    assert refusals_said(worker) == ["refuses jobs until there is room: cannot fork: Too many open files"]


def test_a_worker_that_can_never_serve_a_job_says_so_and_so_does_the_client(cluster):
    worker = cluster.worker("cat", env={"BOOST": "0"})
    resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (100, 100))
    for _ in range(2):
        done = cluster.client(env={"CEXEC_TIMEOUT_ACCEPT": "1"})
        refusal(done, 111, "no worker took the job in ")
        assert b" refused it: no more than 100 descriptors are allowed" in done.stderr
    assert len(refusals_said(worker)) == 1 and b"supervisor: Fatal" not in read(worker.log)


def garbage_datagrams(pub, count, seed):
    """Noise, noise behind a good head, damaged ones, and well-formed ones of every kind with a wrong MAC."""
    chance = random.Random(seed)
    wrong = pub._replace(secret=bytes(32))
    kinds = list(cexec.DATAGRAMS.values())
    for number in range(count):
        kind = kinds[number // 4 % len(kinds)]
        nonce = chance.getrandbits(128).to_bytes(16, "big")
        data = make_datagram(kind, wrong, nonce, chance.randrange(65536), **filled(kind))
        way = number % 4
        if way == 0:
            data = nonce * chance.randrange(80)
        elif way == 1:
            data = data[:25] + nonce * chance.randrange(60)
        elif way == 2:
            place = chance.randrange(25, len(data))
            data = with_byte(data, place, chance.randrange(256))[:chance.choice((len(data), place))]
        yield data[:1300]


def drained(*ports):
    deadline = time.monotonic() + 30
    while not_taken("udp", *ports):
        assert time.monotonic() < deadline, "nobody reads what was sent"


@HEAVY
def test_a_hundred_thousand_garbage_datagrams(cluster):
    """To a worker, a logger and a searching client, all of them read; then a job runs as ever."""
    worker, crat, port = cluster.worker("cat"), cluster.logger(cluster.pub), free_port()
    pub = cexec.open_pub(cluster.pub)
    crat_pid = cluster.started[-1].pid
    with Ear(port) as ear, cexec.open_udp(socket.AF_INET) as sock:
        client = searching_client(cluster, port)
        announced, address = ear.wait_for(cexec.ANNOUNCE)
        group = cexec.Group(cluster.env["GROUP"])
        assert cluster.client(input=b"before").stdout == b"before"
        processes = (worker.pid, crat_pid, client.pid)
        before = [rss(pid) for pid in processes]
        count = 0
        for data in garbage_datagrams(pub, 25000, 7):
            for copy in range(4):
                sock.sendto(data, (cexec.THIS_HOST, group_port(cluster)))
                sock.sendto(data, ("127.0.0.1", announced.port))
                count += 1
            if count % 64 == 0:
                drained(group_port(cluster), announced.port)
        drained(group_port(cluster), announced.port)
        assert count == 100000
        grown = [rss(pid) - old for pid, old in zip(processes, before)]
        assert max(grown) < 6 << 20, grown
        assert cluster.client(input=b"after").stdout == b"after"
        group.send({socket.AF_INET: sock}, announced.readdressed("127.0.0.1", announced.port, 1))
        assert client.communicate(b"found", timeout=60)[0] == b"found" and client.returncode == 0
    for log in (worker.log, client.log):
        assert 80000 < read(log).count(b"dropped") < 110000     # the rest is for others, or of no kind for them
        no_defect(read(log))
    until(lambda: len([line for line in crat.lines() if "completed by" in line and "unverified" not in line]) == 2)
    errors = [name for name in os.listdir(cluster.directory) if name.startswith("crat") and name.endswith(".err")]
    no_defect(*[read(cluster.path(name)) for name in errors])


def client_hello():
    tls = cexec.Tls(cexec.tls_context(), False)
    tls.handshake()
    return tls.take()


@HEAVY
def test_a_thousand_garbage_connections(cluster):
    """To a searching client, from many addresses: silent, closed at once, noise, what begins like TLS."""
    worker, port, chance = cluster.worker("cat"), free_port(), random.Random(11)
    crat = cluster.logger(cluster.pub, env={"GROUP": "127.255.255.255:%d" % port})
    own_key = cexec.open_key(put(cluster.path("own"), cexec.format_key(OTHER_MASTER)[0]))
    hello = client_hello()
    with Ear(port) as ear, Ear(group_port(cluster)) as mouth, contextlib.ExitStack() as kept:
        client = searching_client(cluster, port)
        announced, address = ear.wait_for(cexec.ANNOUNCE)
        before = rss(client.pid)
        for number in range(1000):
            sock = socket.create_connection((address, announced.port), 20, ("127.0.0.%d" % (2 + number % 40), 0))
            sock.settimeout(20)
            way = number % 5
            try:
                if way == 1:
                    sock.sendall(noise(chance.randrange(1, 3000), number))
                elif way == 2:
                    sock.sendall(hello + noise(300, number))
                elif way == 3:
                    sock.sendall(b"\x16\x03\x03\x02\x00\x02" + noise(600, number))
                elif number % 50 == 4:
                    play = Peer(sock, own_key)
                    sock = play.sock
            except OSError:
                pass                    # it has closed already
            if number % 3:
                sock.close()
            else:
                kept.callback(sock.close)
        assert client.poll() is None
        assert rss(client.pid) - before < 24 << 20
        mouth.say(announced.readdressed("127.0.0.1", announced.port, 1))
        assert client.communicate(b"found", timeout=60)[0] == b"found" and client.returncode == 0
        until(lambda: any("completed by 127.0.0.1" in line for line in crat.lines()))
    complaints = [line for line in crat.lines() if "rats out" in line]
    assert 1 <= len(complaints) <= 16 and len({line.split()[3] for line in complaints}) == len(complaints)
    assert all("127.0.0.1 rats out" in line and "unverified" not in line for line in complaints)
    no_defect(read(client.log), read(worker.log))


def close_hard(peer):
    peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.sock.close()


def abuse_worker(cluster, chance, mark):
    """One connection of somebody who has the pub, proves it, and then keeps to nothing."""
    with Asker(cluster) as asker, asker.offer() as peer:
        peer.send(cexec.AUTH, proof=asker.proof(peer))
        rows = INPUT_AND_OUTPUTS
        way = chance.randrange(6)
        if way == 0:
            rows = [tuple(chance.choice((0, 1, 255, 1024, 65535)) for _ in range(2)) + (chance.randrange(256),)
                    for _ in range(chance.choice((1, 3, 5000)))]
        elif way == 1:
            rows = [(number, number, chance.choice((1, 2, 7, 9))) for number in range(chance.choice((100, 1024)))]
        words = ["MARK=" + mark, "CMD=echo ready; exec cat"]
        words += ["A%d=%s" % (number, "x" * 500) for number in range(chance.choice((0, 0, 50)))]
        if way == 2:
            peer.raw(random_frame(chance))
        else:
            peer.send(cexec.JOB, descriptors=rows, environment=words, linger=chance.choice((0, 1, cexec.NO_LINGER)))
        if chance.random() < 0.8:
            peer.next()                 # ACCEPT, or the end
            peer.send(cexec.GO)
            if way > 2:
                assert peer.expect(cexec.DATA)[:1] == b"r"      # it runs
        for _ in range(chance.randrange(12)):
            peer.raw(random_frame(chance))
        if chance.random() < 0.5:
            close_hard(peer)
        asker.say(cexec.CLAIM, token=asker.token)


def test_a_client_with_the_pub_sends_anything(cluster):
    """The worker outlives it all, grows by nothing, and keeps nothing of it."""
    worker, mark = cluster.shell_worker(env={"CONCURRENCY": "6", "BOOST": "0"}), uuid.uuid4().hex
    assert cluster.client("CMD=cat", input=b"before").stdout == b"before"

    def abuse(seeds):
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda seed: abuse_worker(cluster, random.Random(seed), mark), seeds))
        until(lambda: not processes_with("PEER_MARK=" + mark) and not children_of(worker.pid), "the end of all jobs")
        return rss(worker.pid), open_files(worker.pid)
    before = abuse(range(60))
    after = abuse(range(60, 200))
    assert after[0] - before[0] < 2 << 20 and after[1] == before[1], (before, after)
    assert read(worker.log).count(b"group ") > 60          # many of them had a command running
    assert cluster.client("CMD=cat", input=b"after").stdout == b"after"
    no_defect(read(worker.log))


def run_over(size):
    return b"".join(data_frame(0, bytes(cexec.FRAME_MAX)) for _ in range(size // cexec.FRAME_MAX))


AFTER_GO = [
    ("GO twice", cexec.make_frame(cexec.GO)),
    ("no channel 9", data_frame(9, b"x")),
    ("no channel 1", data_frame(1, b"to an output")),
    ("no channel 0", cexec.make_frame(cexec.CREDIT, 0, bytes=1)),
    ("more credit than a window", cexec.make_frame(cexec.CREDIT, 1, bytes=len("ready") + 1)),
    ("more credit than a window", cexec.make_frame(cexec.CREDIT, 1, bytes=2 ** 32 - 1)),
    ("DATA without credit", run_over(2 * cexec.WINDOW)),        # nobody reads it
    ("EOF twice", run_over(2 << 20) + cexec.make_frame(cexec.EOF, 0) * 2),
    ("signal 'KILL'", cexec.make_frame(cexec.SIGNAL, signal="KILL")),
    ("signal ''", cexec.make_frame(cexec.SIGNAL, signal="")),
    ("ACCEPT out of place", cexec.make_frame(cexec.ACCEPT)),
    ("JOB within a job", cexec.make_frame(cexec.JOB, **filled(cexec.JOB))),
    ("frame of kind 99", cexec.FRAME_HEAD.pack(99, 0, 0, 0)),
    ("SHUT with 1 bytes too many", cexec.FRAME_HEAD.pack(cexec.SHUT.code, 0, 1, 1) + b"x"),
]


def test_a_client_that_breaks_the_protocol_after_go_ends_its_job(cluster):
    worker = cluster.shell_worker(env={"CONCURRENCY": "1"})
    for reason, data in AFTER_GO:
        before, mark = len(read(worker.log)), uuid.uuid4().hex
        with Asker(cluster) as asker:
            with asker.offer() as peer:
                asker.begin(peer, descriptors=INPUT_AND_OUTPUTS,
                            environment=["MARK=" + mark, "CMD=printf ready; exec sleep 1000"])
                assert peer.expect(cexec.DATA) == b"ready"
                peer.raw(data)
                assert peer.next() is None, reason
            until(lambda: not processes_with("PEER_MARK=" + mark), "the command's end")
            assert b"abandons the job: " + reason.encode() in read(worker.log)[before:], reason
            asker.say(cexec.CLAIM, token=asker.token)
    assert cluster.client("CMD=cat", input=b"next").stdout == b"next"
    no_defect(read(worker.log))


@pytest.mark.parametrize("rows, term, status", [([(1, 1, 2)], "", None), ([(0, 0, T)], "vt100", 0)])
def test_resize_needs_a_terminal(cluster, rows, term, status):
    worker = cluster.worker("sh", "-c", "exec sleep 0.5")
    with Asker(cluster) as asker, asker.offer() as peer:
        asker.begin(peer, descriptors=rows, term=term, linger=cexec.NO_LINGER)
        peer.send(cexec.RESIZE, lines=65535, columns=65535)
        kinds = []
        while kinds[-1:] != [None]:
            found = peer.next()
            kinds.append(found and found[0])
        assert (cexec.EXIT in kinds) == (status is not None)
    if status is None:
        until(lambda: b"RESIZE without a terminal" in read(worker.log), "the worker's word on it")


def test_the_size_is_there_from_the_start(cluster):
    cluster.worker("stty", "size")
    with Asker(cluster) as asker, asker.offer() as peer:
        asker.begin(peer, descriptors=[(0, 0, T), (1, 0, T)], term="vt100", lines=34, columns=56,
                    linger=cexec.NO_LINGER)
        assert peer.expect(cexec.DATA) == b"34 56\r\n"


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
    assert read(cluster.worker("cat", verbose=False).log) == b""


def test_a_service_tells_a_terminal_what_it_serves(cluster):
    terminal = Terminal(cluster, cluster.argv("cservice", "-x", "eve", cluster.key, "cat", "-u"), {"CONCURRENCY": "3"})
    terminal.shows("serves app with 3 slots on %s: cat -u, for the holders of a public key except eve (-x)\r\n"
                   % cluster.env["GROUP"])
    assert signalled(terminal.process) == 0
    terminal.close()


@pytest.mark.parametrize("how", ["told to end", "told twice", "killed"])
def test_a_worker_ends_with_its_line_full_and_another_takes_over(cluster, how):
    """The job that runs is finished, but for a second SIGTERM; those in the line go to the new worker."""
    old = cluster.shell_worker(env={"CONCURRENCY": "1"})
    running = verbose_client(cluster, "CMD=echo >begun; until [ -e go ]; do sleep 0.02; done; exit 9")
    until(lambda: size_of(cluster, "begun") == 1, "the first job")
    line = [verbose_client(cluster, "CMD=echo %d >>order; exit 8" % number) for number in range(3)]
    for client in line:
        until(lambda: "every slot of a worker is busy" in client.said(), "a place in the line")
    new = None
    for _ in range(2 if how == "told twice" else 1):
        old.send_signal(signal.SIGKILL if how == "killed" else signal.SIGTERM)
        if new is None:
            if how != "killed":
                until(lambda: b"draining: 1 jobs run" in read(old.log), "draining")
            new = cluster.shell_worker(env={"CONCURRENCY": "1"})
            assert [client.wait(PATIENCE) for client in line] == [8, 8, 8]
            assert running.poll() is None and (how == "killed" or old.poll() is None)
    if how != "told twice":
        make_file(cluster, "go")
    assert running.wait(PATIENCE) == (111 if how == "told twice" else 9), running.said()
    assert old.wait(PATIENCE) == (-9 if how == "killed" else 0)
    assert sorted(read(cluster.path("order")).split()) == [b"0", b"1", b"2"]
    assert read(old.log).count(b"forked for") == 1 and read(new.log).count(b"forked for") == 3
    no_defect(read(old.log), read(new.log))


def test_a_worker_whose_host_fails_waits_until_a_command_runs(cluster):
    """Two seconds longer, as its HELLO says; the first success is the end of that."""
    line = "\n            self.process = killing_stopped(lambda: subprocess.Popen("
    altered(cluster, (line, "\n            if os.path.exists(%r): raise OSError(errno.EAGAIN, 'no process')%s" % (
        cluster.path("short"), line)), PENALTY=cexec.PENALTY)
    worker = cluster.worker("sh", "-c", "exit 6")
    touch(cluster.path("short"))

    def one_job():
        done = cluster.run("cexec", "-v", cluster.pub)
        waited = re.search(rb"it waited ([\d.]+) ms", done.stderr)
        return done.returncode, float(waited.group(1)) >= cexec.PENALTY * 1000

    assert one_job() == (111, False)
    assert one_job() == (111, True)
    os.unlink(cluster.path("short"))
    assert one_job() == (6, True)
    assert one_job() == (6, False)
    no_defect(read(worker.log))


def test_clients_that_never_close_are_bounded(cluster):
    """Whatever they send; the one that was over first goes, of the name that has most."""
    altered(cluster, OVER_MAX="3")
    cluster.run_here("ckeygen", "-n", "other", "app", "other.pub")
    worker = cluster.worker("true", env={"BOOST": "0"})
    pids = []
    with contextlib.ExitStack() as stack:
        for pub in [cexec.open_pub(cluster.path("other.pub"))] + 5 * [None]:
            asker = stack.enter_context(Asker(cluster, pub))
            peer = stack.enter_context(asker.begin(**filled(cexec.JOB, descriptors=[])))
            peer.expect(cexec.EXIT)
            pids += set(children_of(worker.pid)) - set(pids)
        until(lambda: children_of(worker.pid) == pids[:1] + pids[4:], "the end of the first three of the second name")
    until(lambda: not children_of(worker.pid), "the end of all")
    no_defect(read(worker.log))


def test_a_supervisor_that_fails_after_go_does_not_refuse_the_job(cluster):
    """The client would take that for a breach of the protocol."""
    altered(cluster, ("        self.command.start()\n", "        raise MemoryError\n"))
    worker = cluster.worker("cat")
    said = failed(cluster.client()).decode()
    assert re.fullmatch(lost_with("; the command may have run (cexec -r runs it again)"), said)
    until(lambda: b"cservice: supervisor: MemoryError: " in read(worker.log), "the worker's message")


def test_a_service_ends_though_an_exit_is_queued_to_a_client_that_never_reads(cluster):
    """At the second signal; both hosts' buffers are made so small that EXIT does not go into them."""
    line = "        how, status, reason = self.command.result\n"
    altered(cluster, (line, line + "        self.link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)\n"),
            KILL_SECONDS="0.5")
    worker = cluster.worker("true")
    with Asker(cluster) as asker:
        asker.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        rows = [(number, number, cexec.FLAG_OUTPUT) for number in range(500)]
        with asker.begin(**filled(cexec.JOB, descriptors=rows)):
            until(lambda: "done" in read(worker.log).decode(), "the end of the job")
            for _ in range(2):
                worker.send_signal(signal.SIGTERM)
                until(lambda: b"draining" in read(worker.log), "draining")
            assert worker.wait(PATIENCE) == 0
    no_defect(read(worker.log))


# ---- cexec -A: a job on every worker ---------------------------------------

def every(cluster, *words, options=(), **rest):
    return cluster.run("cexec", "-A", *options, cluster.pub, *words, **rest)


def labels(count):
    """The names of so many workers of this host, which have one name and one address."""
    return ["%s[127.0.0.1]#%d" % (socket.gethostname(), number) for number in range(1, count + 1)]


def test_lines_get_their_label_however_they_come():
    """And the beginning of a line is not copied for each of its bytes."""
    for seed in range(20):
        chance, added = random.Random(seed), bytearray()
        end = cexec.LineEnd(SimpleNamespace(is_full=lambda: False, add=added.extend, number=1), "h")
        data = bytes(chance.choice(b"ab\n") for _ in range(300))
        place = 0
        while place < len(data):
            size = chance.randint(1, 20)
            assert end.write(memoryview(data)[place:place + size]) == len(data[place:place + size])
            place += size
        end.finish()
        lines = data.split(b"\n") if data[-1:] != b"\n" else data[:-1].split(b"\n")
        assert added == b"".join(b"h: " + line + b"\n" for line in lines)
    end.add(b"begun")
    line = end.line
    end.add(b", and more")
    assert end.line is line and line == b"begun, and more"
    end.add(bytes(cexec.LINE_MAX))
    assert added.endswith(bytes(9) + b"\n") and not end.line


def test_names_of_workers():
    rows = {name.encode(): dict(zip(("host", "address"), row)) for name, row in {
        "a": ("box", "10.0.0.1"), "b": ("bin", "10.0.0.2"), "c": ("bin", "10.0.0.3"), "d": ("two", "10.0.0.4"),
        "e": ("two", "10.0.0.4"), "f": ("", "10.0.0.5"), "g": ("x\ny", "::1"), "h": ("bin", "\x1b[2J"),
        "i": ("..", "10.0.0.6"), "j": (".", "10.0.0.7"), "k": ("../up", "10.0.0.8")}.items()}
    assert cexec.labels_of(rows) == {
        b"a": "box", b"b": "bin[10.0.0.2]", b"c": "bin[10.0.0.3]", b"d": "two[10.0.0.4]#1", b"e": "two[10.0.0.4]#2",
        b"f": "10.0.0.5", b"g": "x\\ny", b"h": "bin[\\x1b[2J]",
        b"i": "..[10.0.0.6]", b"j": ".[10.0.0.7]", b"k": "..\\x2fup"}


def test_jobs_on_every_worker_wait_for_descriptors(cluster):
    """Here one after another: two at a time would find the directory."""
    for _ in range(3):
        cluster.worker("sh", "-c", "mkdir busy && sleep 0.1 && rmdir busy && echo done")
    cluster.launch = ["sh", "-c", 'ulimit -n 70; exec "$@"', "sh"] + cluster.launch
    done = every(cluster)
    assert sorted(output(done).decode().splitlines()) == ["%s: done" % label for label in labels(3)]


def test_every_worker_has_one_job(cluster):
    """With its output a line at a time, each stream where it belongs; no worker hears of another's job more."""
    command = 'echo "out $PEER_X"; echo err >&2; sleep 0.1; printf "no newline"; exit $PEER_S'
    workers = [cluster.worker("sh", "-c", command) for _ in range(3)]
    done = every(cluster, "X=y", "S=0")
    names = labels(3)
    assert done.returncode == 0
    assert sorted(done.stdout.decode().splitlines()) == sorted(
        line for name in names for line in (name + ": out y", name + ": no newline"))
    assert sorted(done.stderr.decode().splitlines()) == [name + ": err" for name in names]
    assert [supervisors(worker) for worker in workers] == [1, 1, 1]
    assert [read(worker.log).count(b"offers ") for worker in workers] == [1, 1, 1]
    done = every(cluster, "X=y", "S=3")
    assert done.returncode == 3 and done.stderr.count(b": exit status 3\n") == 3
    for worker in workers:
        no_defect(read(worker.log))


def test_every_worker_reads_the_file_from_its_offset(cluster):
    for _ in range(3):
        cluster.worker("sh")
    make_file(cluster, "script", b"nonsense\n" + b"echo one\n" + b"# much\n" * 100000 + b"echo two\n")
    with open(cluster.path("script"), "rb") as script:
        script.seek(9)
        done = every(cluster, stdin=script)
        assert os.lseek(script.fileno(), 0, os.SEEK_CUR) == 9
    assert (done.returncode, done.stderr) == (0, b"")
    assert sorted(done.stdout.decode().split("\n")[:-1]) == sorted(
        "%s: %s" % (name, word) for name in labels(3) for word in ("one", "two"))
    assert ended(every(cluster, options=["-n"], input=b"echo x")) == (0, b"", b"")


@pytest.mark.parametrize("kind", ["pipe", "socket", "slow pipe"])
def test_every_worker_reads_all_of_a_pipe(cluster, kind):
    """Its end too; kept in an unnamed file, of which nothing is left."""
    for _ in range(3):
        cluster.worker("sh", "-c", "wc -c; echo $PEER_X")
    place = cluster.path("tmp")
    os.mkdir(place)
    ours, theirs = socket.socketpair() if kind == "socket" else map(io.FileIO, os.pipe(), "rw")
    client = cluster.start("cexec", "-A", cluster.pub, "X=y", stdin=ours, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, env={"TMPDIR": place})
    ours.close()
    with theirs:
        for piece in (b"x" * 3000000, b"y" * 10):
            theirs.sendall(piece) if kind == "socket" else cexec.write_all(theirs.write, piece)
            if kind == "slow pipe":
                until(lambda: glob.glob("/proc/%d/fd/*" % client.pid), "the client")
                assert client.poll() is None
    out, err = client.communicate(timeout=PATIENCE)
    assert (client.returncode, err) == (0, b"")
    assert sorted(out.decode().splitlines()) == sorted(
        "%s: %s" % (name, text) for name in labels(3) for text in ("3000010", "y"))
    assert os.listdir(place) == []


def test_a_pipe_that_no_file_can_hold_is_no_input_for_every_worker(cluster):
    cluster.worker("cat")
    cluster.launch = ["sh", "-c", 'ulimit -f 100; trap "" XFSZ; exec "$@"', "sh"] + cluster.launch
    refusal(every(cluster, input=bytes(1 << 20)), 111, "standard input, or ")


def test_a_command_that_fails_is_run_again_on_its_worker(cluster):
    """With --retries; the lines of each try are shown, and the last one counts."""
    command = 'mkdir try$W && { echo first; exit 3; }; echo second; exit $W'
    for status in ("0", "4"):
        cluster.worker("sh", "-c", command + " 2> /dev/null", env={"W": status, "CONCURRENCY": "1"})
    done = every(cluster, options=["--retries", "2"])
    said = [line.split(": ", 1)[1] for line in done.stdout.decode().splitlines()]
    assert done.returncode == 4 and sorted(said) == ["first"] * 2 + ["second"] * 3
    errors = [line.split(": ", 2)[2] for line in done.stderr.decode().splitlines() if line.startswith("cexec: ")]
    assert sorted(errors) == ["exit status 3; runs it again"] * 2 + ["exit status 4", "exit status 4; runs it again"]
    assert every(cluster).returncode == 4


def test_exit_status_is_the_largest(cluster):
    for status in ("0", "kill", "2"):
        cluster.worker("sh", "-c", "kill -TERM $$" if status == "kill" else "exit " + status)
    cluster.worker("/no/such/command")
    done = every(cluster)
    assert done.returncode == 128 + signal.SIGTERM
    assert sorted(line.partition(b": ")[2].partition(b": ")[2] for line in done.stderr.splitlines()) == [
        b"/no/such/command: No such file or directory", b"exit status 2", b"killed by signal 15"]


@pytest.mark.parametrize("free", [True, False], ids=["in time", "never"])
def test_worker_in_use_is_waited_for(cluster, free):
    command = '[ "$PEER_HOLD" ] && { touch held; until [ -e go ]; do sleep 0.02; done; }; echo $PEER_X; touch done'
    cluster.worker("sh", "-c", command, env={"CONCURRENCY": "1"})
    holder = cluster.start_client("HOLD=1")
    until(lambda: os.path.exists(cluster.path("held")), "the hold")
    cluster.worker("sh", "-c", "echo $PEER_X; touch done", env={"CONCURRENCY": "1"})
    with open(cluster.path("out"), "wb") as out, open(cluster.path("err"), "wb") as err:
        client = cluster.start("cexec", "-A", cluster.pub, "X=y", stdout=out, stderr=err,
                               env={"CEXEC_TIMEOUT_WAIT": "20" if free else "2"})
    until(lambda: os.path.exists(cluster.path("done")), "the other's end")
    if free:
        make_file(cluster, "go")
    assert client.wait(PATIENCE) == (0 if free else 111)
    assert read(cluster.path("out")).count(b": y\n") == (2 if free else 1)
    said = read(cluster.path("err"))
    never = rb"cexec: \S+#[12]: no worker was free in \d s \(0 ahead in line\)\n"
    assert re.fullmatch(b"" if free else never, said)
    make_file(cluster, "go")
    assert holder.wait(PATIENCE) == 0


def test_workers_that_are_lost_refuse_or_drain_are_named(cluster):
    drains = cluster.worker("sh", "-c", "touch held; until [ -e go ]; do sleep 0.02; done", options=["-a"])
    holder = cluster.start_client("x")
    until(lambda: os.path.exists(cluster.path("held")), "the hold")
    drains.terminate()
    until(lambda: "draining" in survey(cluster).stdout, "the drain")
    cluster.worker("sh", "-c", 'echo "good $*"', "sh", options=["-a"])
    cluster.worker("sh", "-c", 'echo half; sleep 0.3; kill -KILL $PPID; sleep 1000', "sh", options=["-a"])
    cluster.worker("cat")                               # takes no arguments
    refuses = cluster.worker("cat", options=["-a"])
    resource.prlimit(refuses.pid, resource.RLIMIT_NOFILE, (100, 100))
    done = every(cluster, "a", "b", env={"CEXEC_TIMEOUT_WAIT": "2"})
    assert done.returncode == 111
    assert sorted(re.sub(rb"^\S+ ", b"", line) for line in done.stdout.splitlines()) == [b"good a b", b"half"]
    reasons = b"".join(sorted(re.sub(rb"^cexec: \S+: ", b"", line) + b"\n" for line in done.stderr.splitlines()))
    for part in (b"is draining: it takes no more jobs", b"lost: ", b"; the command may have run", b"takes no arguments",
                 b" refused it: no more than 100 descriptors"):
        assert part in reasons, reasons
    assert reasons.count(b"\n") == 5 and done.stderr.splitlines()[-1].startswith(b"cexec: 4 failed, 1 at ")
    make_file(cluster, "go")
    assert holder.wait(PATIENCE) == 0


def test_interrupt_keeps_what_has_come_and_names_who_is_missing(cluster):
    workers = [cluster.worker("sh", "-c", command) for command in (
        "echo quick", "echo begun; printf half; touch half; sleep 1000")]
    with open(cluster.path("out"), "wb") as out, open(cluster.path("err"), "wb") as err:
        client = cluster.start("cexec", "-A", cluster.pub, stdout=out, stderr=err)
    until(lambda: read(cluster.path("out")).count(b"\n") == 2 and os.path.exists(cluster.path("half")), "the lines")
    time.sleep(0.3)
    assert signalled(client, signal.SIGINT) == -signal.SIGINT
    slow = next(line for line in read(cluster.path("out")).splitlines() if b"begun" in line).partition(b": ")[0]
    assert read(cluster.path("out")).endswith(slow + b": half\n")
    assert read(cluster.path("err")) == b"cexec: interrupted: not over on " + slow + b"\n"
    until(lambda: not any(children_of(worker.pid) for worker in workers), "the end of the commands")


def test_lines_of_every_worker_stay_whole(cluster):
    """Many at once, to a slow reader; long ones too, in bounded memory."""
    for letter in "abc":
        command = "seq -f 'X%0999.f' 3000; head -c 3000000 /dev/zero | tr '\\0' X"
        cluster.worker("sh", "-c", command.replace("X", letter))
    client = cluster.start("cexec", "-A", cluster.pub, stdout=subprocess.PIPE)
    time.sleep(2)
    got = client.stdout.read()
    assert client.wait(PATIENCE) == 0
    lines = [line.partition(b": ")[2] for line in got.splitlines()]
    for letter in "abc":
        mine = [line.decode() for line in lines if line.startswith(letter.encode())]
        assert mine[:3000] == ["%s%0999d" % (letter, number) for number in range(1, 3001)]
        assert "".join(mine[3000:]) == letter * 3000000


def test_an_announcement_for_one_worker_is_nothing_to_others(cluster):
    worker = cluster.worker("cat", env={"CONCURRENCY": "1"})
    with Asker(cluster) as asker:
        asker.say(cexec.ANNOUNCE, attempt=1, only=b"somebody")
        until(lambda: b"<- ANNOUNCE" in read(worker.log), "the announcement")
    assert cluster.client(input=b"x").stdout == b"x" and read(worker.log).count(b"offers ") == 1


def test_offer_of_another_worker_is_declined(cluster):
    """Which does not know that it was not meant, as one of another program may not."""
    worker = cluster.worker("echo", "mine")
    key, other = cexec.open_key(cluster.key), os.urandom(8)
    with Ear(group_port(cluster)) as ear:
        client = cluster.start("cexec", "-A", cluster.pub, stdout=subprocess.PIPE)
        announced, address = ear.wait_for(cexec.ANNOUNCE)
        assert announced.body.only not in (bytes(8), other)
        with contextlib.suppress(OSError), Peer(socket.create_connection((address, announced.port), 20), key) as peer:
            peer.send(cexec.HELLO, version=cexec.PROTOCOL, nonce=announced.nonce, worker_id=other, address="127.0.0.1",
                      host="test")
            assert peer.next() is None
        assert client.communicate(timeout=PATIENCE)[0].endswith(b"mine\n") and client.returncode == 0
    assert supervisors(worker) == 1


def test_one_port_is_enough_for_every_worker(cluster):
    for _ in range(3):
        cluster.worker("echo", "x")
    done = every(cluster, env={"CEXEC_LISTEN_PORTS": str(cexec_port())})
    assert (done.returncode, done.stderr, done.stdout.count(b": x\n")) == (0, b"", 3)


def test_every_worker_where_there_is_none(cluster):
    done = every(cluster)
    assert done.returncode == 111 and b"no worker answered on" in done.stderr


def test_every_worker_of_a_network(hosts):
    spaces = hosts.lan("lan", ["client", "one", "two", "three"], "10.77.0")
    for name in ("one", "two", "three"):
        hosts.worker("echo", name, space=spaces[name])
    done = every(hosts, space=spaces["client"])
    name = socket.gethostname()
    assert (done.returncode, done.stderr) == (0, b"")
    assert sorted(done.stdout.decode().splitlines()) == [
        "%s[10.77.0.%d]: %s" % (name, number, text) for number, text in ((2, "one"), (3, "two"), (4, "three"))]


def test_files_go_to_every_worker_and_results_come_from_each(farm):
    """Into a directory for each; nothing of those that fail.  What is there of an earlier run is replaced."""
    for _ in range(3):
        farm.serve()
    in_desk(farm, "conf/a", b"1\n")
    in_desk(farm, "tool", b"#!/bin/sh\ncat conf/a $1; echo $1 > out; mkdir d; echo $$ > d/$1; touch w.txt\n", 0o755)
    in_desk(farm, "one", b"one\n")
    in_desk(farm, "two", b"two\n")
    first, second, third = labels(3)
    command = "./tool", "one"
    inputs = [word for name in ("conf", "tool", "one") for word in ("-i", name)]
    results = ["-g", "out", "-g", "d", "-g", "*.txt"]
    done = farm.work("-A", "-n", *inputs, *results, farm.pub, *command)
    assert sorted(output(done).decode().splitlines()) == sorted(
        "%s: %s" % (name, word) for name in labels(3) for word in ("1", "one"))
    there = contents(farm.desk)
    for name in labels(3):
        assert there.pop(name + "/out") == "one\n" and there.pop(name + "/d/one") and there.pop(name + "/w.txt") == ""
    assert sorted(there) == ["conf/a", "one", "tool", "two"]

    # one of them fails, and only the others have a second file, which takes the place of the first
    inputs += ["-i", "two"]
    done = farm.work("-A", "-n", *inputs, *results, farm.pub, "sh", "-c",
                     'mkdir "$0" 2> /dev/null && exit 3; ./tool two', farm.path("failed"))
    assert done.returncode == 3 and done.stderr.count(b"\n") == 1 and done.stderr.endswith(b": exit status 3\n")
    failed = done.stderr.decode().split(": ")[1]
    there = contents(farm.desk)
    for name in labels(3):
        word = "one" if name == failed else "two"
        assert there[name + "/out"] == word + "\n"
        assert [path for path in there if path.startswith(name + "/d")] == ["%s/d/%s" % (name, word)]
    assert all_gone(farm)


def test_results_of_every_worker_overwrite_nothing_that_is_read(farm):
    """And a job without results, or with wrong ones, leaves no directory behind."""
    farm.serve()
    label = socket.gethostname()
    in_desk(farm, label + "/out", b"mine")
    command = "-g", "out", farm.pub, "sh", "-c", "echo new > out"
    said = "-g %s/out: %s/out would be overwritten" % (label, label)
    refusal(farm.work("-A", "-i", label + "/out", *command), 100, said)
    refusal(farm.work("-A", "-i", "gone", *command), 100, "-i: gone: No such file or directory")
    refusal(farm.work("-A", "-g", "../out", farm.pub, "true"), 100, "-g ../out: ")
    assert contents(farm.desk) == {label + "/out": "mine"}
    shutil.rmtree(os.path.join(farm.desk, label))
    done = farm.work("-A", "-g", "gone", farm.pub, "true")
    assert ended(done) == (111, b"", b"cexec: %s: -g gone: nothing in the job's directory matches\n" % label.encode())
    in_desk(farm, label, b"a file")
    done = farm.work("-A", *command)
    assert done.returncode == 111 and b": there is something that is no directory\n" in done.stderr
    assert contents(farm.desk) == {label: "a file"} and all_gone(farm)


@pytest.mark.parametrize("host", ["..", "../up", ".cexec"])
def test_results_of_no_host_lead_out_of_the_current_directory(farm, host):
    altered(farm, ("socket.gethostname()[:64]", repr(host)))            # in REPLY
    farm.serve()
    label = farm.work("-A", "-g", "out", farm.pub, "sh", "-c", "echo new | tee out").stdout.decode().split(": ")[0]
    assert contents(farm.desk) == {label + "/out": "new\n"}
    assert not os.path.exists(farm.path("out")) and not os.path.exists(farm.path("up"))


def test_silent_hosts_of_a_list_are_named(hosts):
    """111, by the name in the list; not those that are excluded, and not a network's or a broadcast's."""
    spaces = hosts.lan("lan", ["client", "one", "two"], "10.77.0")
    hosts.worker("echo", "here", space=spaces["one"])

    def said(group, **env):
        done = every(hosts, space=spaces["client"], env=dict(env, GROUP=group))
        assert done.stdout.endswith(b": here\n") and done.stdout.count(b"\n") == 1
        return done.returncode, done.stderr.decode()

    assert said("10.77.0.2,10.77.0.3,10.77.0.9") == (
        111, "cexec: 10.77.0.3: no worker answers\ncexec: 10.77.0.9: no worker answers\n")
    assert said("10.77.0.2,10.77.0.3,10.77.0.9", CEXEC_REJECT_SERVERS="10.77.0.3 10.77.0.9") == (0, "")
    assert said("10.77.0.2,10.77.0.3", CEXEC_ACCEPT_SERVER="10.77.0.2") == (0, "")
    assert said("10.77.0.0/29,10.77.0.255,10.77.0.2") == (0, "")


# ---- crat -t ---------------------------------------------------------------

class Alerts:
    """Says alerts to a cluster's group, as clients do."""

    def __init__(self, cluster, pub=None):
        self.pub = cexec.open_pub(pub or cluster.pub)
        self.group = cexec.Group(cluster.env["GROUP"])
        self.socks = cexec.open_speakers()

    def say(self, worker="10.0.0.3", event=cexec.ALERT_EXITED, status=0, count=1, pub=None, reason="", **fields):
        fields = dict({"milliseconds": 1500, "bytes_in": 2000, "bytes_out": 1000}, **fields)
        for _ in range(count):
            self.group.send(self.socks, make_datagram(
                cexec.ALERT, pub or self.pub, os.urandom(16), 0, event=event, worker=worker, host="box",
                worker_id=bytes(8), status=status, reason=reason, **fields))

    def forge(self, worker="10.0.0.66", **fields):
        self.say(worker, pub=self.pub._replace(secret=bytes(32)), **fields)

    def close(self):
        for sock in self.socks.values():
            sock.close()


@pytest.fixture
def alerts(cluster):
    with contextlib.closing(Alerts(cluster)) as made:
        yield made


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


def test_the_log_as_a_screen(cluster, alerts, window):
    modes = window.modes()
    window.crat()
    assert "before" not in window.screen()
    alerts.say(count=3)
    alerts.say(status=7)
    alerts.say(event=cexec.ALERT_SIGNALLED, status=9)
    alerts.say(event=cexec.ALERT_COMPLAINT, reason="wrong certificate")
    alerts.say("10.0.0.4")
    window.shows("^finished: 4 done, 2 failed, 1 complained about, 12.0 kB in, 6.0 kB out$")
    screen = window.screen()
    assert row(screen, "WORKER") == ["WORKER HOST NOW LOAD DONE FAILED COMPLAINTS IN OUT TIME MEAN LAST".split()]
    assert row(screen, "10.0.0.3")[0][1:-2] == "3 2 1 10.0 kB 5.0 kB 7s 1.500 s".split()
    assert row(screen, "10.0.0.4")[0][1:4] == ["1", "0", "0"]
    assert re.search(r"^\d\d:\d\d:\d\d 127.0.0.1 rats out 10.0.0.3 for app.pub: 1.500 s, ", screen, re.M)
    assert len(re.findall("completed by", screen)) == 6
    window.keys("q", shows="^status=0$")
    screen = window.screen()
    assert "before" in screen and "q ends it" not in screen
    assert re.search(r"^crat: \S+, app.pub, \d+s\nfinished: 4 done, 2 failed, 1 complained about.*\nWORKER.*\n"
                     r"10.0.0.3 .*\n10.0.0.4 .*\nstatus=0$", screen, re.M)
    assert window.modes() == modes
    assert window.do("display-message", "-p", "#{cursor_flag} #{alternate_on} #{wrap_flag}").split() == ["1", "0", "1"]


def crat_pid(cluster):
    def found():
        with contextlib.suppress(OSError):
            return [pid for pid in cluster.alive() if b"\0crat\0" in read("/proc/%d/cmdline" % pid)]
    return until(found, "crat")[0]


@pytest.mark.parametrize("end, status", [("C-c", 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), ("C-\\", 131)])
def test_the_screen_is_left_however_it_ends(cluster, alerts, window, end, status):
    modes = window.modes()
    window.line("ulimit -c 0")
    window.crat()
    alerts.say()
    window.shows("^finished: 1 done")
    if isinstance(end, str):
        window.keys(end)
    else:
        os.kill(crat_pid(cluster), end)
    window.shows("^finished: 1 done, 0 failed, .*\nWORKER .*\n10.0.0.3 ")
    if end == "C-c":                # then bash leaves out the rest of the line
        window.line("echo sta'tus'=$?")
    window.shows("^status=%d$" % status)
    assert "before" in window.screen() and window.modes() == modes
    assert window.do("display-message", "-p", "#{cursor_flag} #{alternate_on} #{wrap_flag}").split() == ["1", "0", "1"]


def test_the_screen_stopped_and_continued(cluster, alerts, window):
    modes = window.modes()
    window.crat()
    window.keys("C-z", shows="Stopped")
    assert window.modes() == modes and "q ends it" not in window.screen()
    window.line("clear; bg", r"^\[1\]\+ ")
    window.line("echo st'ill'", "^still$")
    assert "q ends it" not in window.screen()
    window.line("fg", "q ends it")
    alerts.say()
    window.shows("^finished: 1 done")
    window.keys("q", shows="^finished: 1 done.*\nWORKER .*\n10.0.0.3 .*\n")
    window.line("echo sta'tus'=$?", "^status=0$")
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
    window.shows("^finished: 51 done")
    screen = window.screen().splitlines()
    assert screen[5].startswith("10.0.0.17 ") and screen[6].startswith("10.0.0.0 ")
    more = int(next(line for line in screen if line.endswith(" more")).split()[0])
    assert more + sum(line.startswith("10.0.0.") for line in screen) == 50
    assert "10.0.0.49" in screen[29] and "10.0.0.48" in screen[28]
    for columns, lines in ((60, 12), (30, 5), (20, 2), (120, 120)):
        window.do("resize-window", "-x", str(columns), "-y", str(lines))
        until(functools.partial(is_whole_picture, window, columns, lines), "a picture of that size")
    assert "more" not in window.screen()
    window.do("resize-window", "-x", "100", "-y", "20")
    until(functools.partial(is_whole_picture, window, 100, 20), "a picture of that size")       # crat knows of it
    window.keys("q", shows="^status=0$")
    assert len(window.screen().splitlines()) == 20 and re.search(r"^crat: .*\nfinished: 51 done", window.screen(), re.M)


def test_the_screen_counts_apart_what_nothing_proves(cluster, alerts, window):
    window.crat()
    alerts.forge(count=5)
    alerts.forge("10.0.0.3", event=cexec.ALERT_COMPLAINT)
    alerts.say()
    window.shows("^finished: 1 done, 0 failed, 0 complained about, 2.0 kB in, 1.0 kB out; unverified: 5 done, 0")
    rows = window.screen().splitlines()[5:8]
    assert [line.split()[:4] for line in rows] == [
        ["10.0.0.3", "1", "0", "0"], ["10.0.0.66", "(unverified)", "5", "0"], ["10.0.0.3", "(unverified)", "0", "0"]]


def test_the_screen_has_room_for_wide_characters(cluster, window):
    wide = cluster.path("\u5de5\u4f5c\u6a5f\u68b0" * 6 + ".pub")
    os.rename(cluster.pub, wide)
    said = Alerts(cluster, wide)
    window.line("clear; %s -t '%s'" % (" ".join(map(shlex.quote, cluster.argv("crat"))), wide), "q ends it")
    said.say("\u6a5f1", reason="\u68b0" * 40 + "\x1b[2J")
    said.say("m2")
    window.shows("^finished: 2 done")
    screen = window.screen().splitlines()
    assert len(screen[8:]) >= 2 and all(cexec.columns(line) <= 100 for line in screen)
    place = screen[4].index("DONE")
    assert [cexec.columns(screen[line][:screen[line].index(" 1 ")]) + 1 for line in (5, 6)] == [place] * 2
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


def is_full(master):
    """Whether nothing more comes to a pty's other side, where there is something to be read."""
    counts = []
    for _ in range(3):
        counts.append(struct.unpack("i", fcntl.ioctl(master, termios.FIONREAD, bytes(4)))[0])
        time.sleep(2 * cexec.REDRAW_SECONDS)
    return counts[0] > 1000 and counts[0] == counts[2]


def test_a_terminal_that_takes_nothing(cluster, alerts):
    """TERM ends it all the same: a picture is more than a pty holds."""
    with on_a_pty(cluster, cluster.pub, size=(300, 900)) as crat:
        alerts.say("w" * 800, count=50)
        until(lambda: b"50 done" in crat.look(), "the first of them")
        alerts.say("w" * 800, count=300)
        until(lambda: is_full(crat.master), "a terminal that takes no more")
        assert signalled(crat) == -signal.SIGTERM


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
        assert len(tallies.table(room, 80, None)) in (0, room) and len(tallies.table(room, 80, None)) <= max(0, room)
    lines = tallies.table(5, 80, None)
    assert lines[1].startswith("true ") and lines[-1] == "%d more" % (cexec.WORKERS_MAX - 2)


def test_the_screen_shows_who_is_there(cluster, alerts, window):
    """The workers' answers beside what was finished, host names and all; also who has gone, and who has come back."""
    altered(cluster, ("ASK_SECONDS, ABSENT_SECONDS = 3.0, 10.0", "ASK_SECONDS, ABSENT_SECONDS = 0.5, 3.0"))
    worker = cluster.worker("cat", env={"CONCURRENCY": "3"})
    window.crat()
    window.shows("^now: 1 there, 0 of 3 slots in use, 0 in line$")
    host = socket.gethostname()[:24]
    assert row(window.screen(), "127.0.0.1")[0][:3] == ["127.0.0.1", host, "0/3"]
    with cluster.start_client(stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as client:
        window.shows("^now: 1 there, 1 of 3 slots in use")
        assert row(window.screen(), "127.0.0.1")[0][2] == "1/3" and "never" in window.screen()
        client.stdin.close()
        assert client.wait(PATIENCE) == 0
    window.shows("^finished: 1 done")
    alerts.say("10.0.0.3")
    window.shows("^10.0.0.3 ")
    assert row(window.screen(), "10.0.0.3")[0][1:4] == ["1", "0", "0"]      # it did not answer
    worker.terminate()
    window.shows("^now: no worker answers .cexec -l app.pub tells why.$")
    assert row(window.screen(), "127.0.0.1")[0][1:4] == [host, "gone", "1"]
    cluster.worker("cat", env={"CONCURRENCY": "2"})
    window.shows("^now: 1 there, 0 of 2 slots in use")
    window.keys("q", shows="^127.0.0.1 +%s +0/2 " % re.escape(host))


def test_the_screen_asks_with_a_private_key_and_not_without_a_key(cluster, window):
    cluster.worker("cat", env={"CONCURRENCY": "3"})
    command = " ".join(map(shlex.quote, cluster.argv("crat")))
    window.line("clear; %s -t %s" % (command, cluster.key), "^now: 1 there, 0 of 3 slots in use")
    window.keys("q")
    window.line("clear; %s -t" % command, "^now: not known without a key$")


def answer(address="10.0.0.3", host="node", running=1, slots=2, ago=0.0, waiting=0, state="serving"):
    return {"address": address, "host": host, "load": 0.5, "running": running, "slots": slots, "waiting": waiting,
            "state": state, "heard": time.monotonic() - ago}


def test_answers_of_one_address_are_taken_together():
    one = SimpleNamespace(workers={1: answer(), 2: answer(running=2, slots=4, waiting=3), 3: answer(ago=60, running=9)})
    other = SimpleNamespace(workers={1: answer("10.0.0.4", "a\x1b" + "x" * 99, ago=60)})
    assert cexec.presence([one, other]) == {
        "10.0.0.3": ("node", "3/6", "0.50"), "10.0.0.4": (("a\x1b" + "x" * 99)[:24], "gone", "")}
    assert cexec.presence_text([one, other]) == "now: 2 there, 3 of 6 slots in use, 3 in line"
    other.workers[1].update(heard=time.monotonic(), state="draining")
    assert cexec.presence([one, other])["10.0.0.4"][1] == "1/2 draining"


def test_a_worker_that_has_gone_is_shown_for_what_it_did():
    tallies = cexec.Tallies()
    tallies.add({"event": "exited", "status": 0, "seconds": 1.0, "bytes_in": 1, "bytes_out": 2, "verified": True,
                 "worker": "busy"})
    present = {"busy": ("h1", "gone", ""), "idle": ("h2", "0/4", "0.10"), "past": ("h3", "gone", "")}
    shown = tallies.table(9, 200, present)
    assert [line.split()[:4] for line in shown[1:]] == [["busy", "h1", "gone", "1"], ["idle", "h2", "0/4", "0.10"]]
    assert shown[2].endswith("never") and "NOW" not in tallies.table(9, 200, None)[0]


def test_a_narrow_table_leaves_columns_out():
    heads = cexec.Tally.HEADS
    rows = [[head.lower() for head in heads]]
    shown = [cexec.narrowed(heads, rows, width, [])[0].split() for width in (200, 75, 60, 10)]
    assert shown[0] == heads and shown[1] == [head for head in heads if head != "TIME"]
    assert shown[-1] == ["WORKER", "HOST", "NOW", "LOAD", "DONE", "FAILED"]
    assert cexec.narrowed(heads, rows, 200, cexec.PRESENT)[0].split()[:2] == ["WORKER", "DONE"]


@pytest.mark.parametrize("text, width, fits", [
    ("abc", 3, "abc"), ("abc", 2, "ab"), ("abc", 0, ""), ("\u6a5f\u6a5f", 3, "\u6a5f"), ("e\u0301e", 1, "e\u0301")])
def test_text_is_cut_to_a_number_of_columns(text, width, fits):
    assert cexec.fitted(text, width) == fits


@pytest.mark.parametrize("options, env, message", [
    ("", "TERM=dumb", "standard output is no terminal"), ("-v", "", "messages would disturb the screen")])
def test_no_screen_on_this_terminal(cluster, window, options, env, message):
    window.line("clear; %s %s -t %s $PUB; echo sta'tus'=$?"
                % (env, " ".join(map(shlex.quote, cluster.argv("crat"))), options))
    window.shows("^status=100$")
    assert message in window.screen().replace("\n", "")


# ---- crat --svg ------------------------------------------------------------


def joblog_line(number=1, host="node1", began=NOON, seconds=1.0, status=0, killer=0, command="in"):
    return "%d\t%s\t%.3f\t%10.3f\t1000\t500\t%d\t%d\t%s" % (number, host, began, seconds, status, killer, command)


def alert_record(**fields):
    return dict({"time": NOON + 1, "client": "10.0.0.9", "worker": "10.0.0.3", "event": "exited", "status": 0,
                 "application": "ogg.pub", "verified": True, "name": "anyone", "seconds": 1.0, "bytes_in": 1000,
                 "bytes_out": 500, "reason": ""}, **fields)


@pytest.mark.parametrize("line, entry", [
    (joblog_line(), ("node1", NOON, NOON + 1, "done", "1: in", "exit status 0", 1000, 500)),
    (joblog_line(status=3, command="a\tb\tc"), (
        "node1", NOON, NOON + 1, "failed", "1: a\tb\tc", "exit status 3", 1000, 500)),
    (joblog_line(host=":", status=-1, killer=15), (
        "this host", NOON, NOON + 1, "killed", "1: in", "killed by signal 15", 1000, 500)),
    (" " + joblog_line(status=-1), ("node1", NOON, NOON + 1, "lost", "1: in", "worker lost", 1000, 500)),
    (joblog_line(host="-", seconds=0, status=111), (
        "no worker", NOON, NOON, "failed", "1: in", "exit status 111", 1000, 500)),
    ("\t".join(cexec.JOBLOG), None),
    (json.dumps(alert_record()), (
        "10.0.0.3", NOON, NOON + 1, "done", "ogg.pub for anyone at 10.0.0.9", "exit status 0", 1000, 500)),
    (json.dumps(alert_record(event="signalled", status=9, verified=False)), (
        "10.0.0.3 (unverified)", NOON, NOON + 1, "killed", "ogg.pub for anyone at 10.0.0.9", "killed by signal 9",
        1000, 500)),
    (json.dumps(alert_record(event="complaint", reason="lost, run again: silent")), (
        "10.0.0.3", NOON, NOON + 1, "lost", "ogg.pub for anyone at 10.0.0.9", "lost, run again: silent", 1000, 500)),
    (json.dumps(alert_record(host="box")), (
        "box[10.0.0.3]", NOON, NOON + 1, "done", "ogg.pub for anyone at 10.0.0.9", "exit status 0", 1000, 500)),
    (json.dumps(alert_record(event="complaint", reason="wrong certificate")), (
        "10.0.0.3", NOON + 1, NOON + 1, "complaint", "ogg.pub for anyone at 10.0.0.9", "wrong certificate", 1000, 500)),
    (json.dumps({"time": NOON, "client": "10.0.0.9", "event": "version", "version": 7, "ours": 1}), None)])
def test_lines_of_logs(line, entry):
    assert cexec.parse_entry(line) == entry


@pytest.mark.parametrize("line, cause", [
    ("", "neither a joblog's 9 fields"), ("hello", "neither a joblog's 9 fields"), ("\x00" * 99, "neither a joblog's"),
    (joblog_line().rpartition("\t")[0], "neither a joblog's 9 fields"),
    (joblog_line().replace("1800000000.000", "soon"), "Starttime is no number from 0 to 250000000000: soon"),
    (joblog_line(began=1e15), "Starttime is no number"), (joblog_line(seconds=float("nan")), "JobRuntime is no number"),
    (joblog_line(seconds=-1), "JobRuntime is no number"),
    (joblog_line().replace("\t500\t", "\t1e999\t"), "Receive is no number"),
    ("{", "Expecting"), ('{"a":' * 100000, "too deep"), ("{}", "there is no 'event'"),
    (json.dumps(alert_record(event="seen")), "the event is none of crat's: seen"),
    (json.dumps(alert_record(time=None)), "time is no number"),
    (json.dumps(alert_record(seconds=float("inf"))), "seconds is no number"),
    (json.dumps(alert_record(bytes_in=10 ** 400)), "bytes_in is no number"),
    (json.dumps(alert_record(bytes_out=[[]])), "bytes_out is no number")])
def test_lines_that_are_none_of_a_log(line, cause):
    with pytest.raises(ValueError) as caught:
        cexec.parse_entry(line)
    assert cause in str(caught.value) and len(str(caught.value)) < 200


def logged(worker="w", began=0.0, seconds=1.0, outcome="done", name="in", **fields):
    return cexec.Entry(worker, NOON + began, NOON + began + seconds, outcome, name, "", 0, 0)._replace(**fields)


@pytest.mark.parametrize("jobs, rows", [
    ([(0, 1), (1, 1), (2, 1)], [[0, 1, 2]]), ([(0, 3), (1, 1), (2, 1)], [[0], [1, 2]]),
    ([(0, 1), (0, 1), (0, 1)], [[0], [0], [0]]),
    ([(0, 5), (1, 1), (2.5, 1), (5, 1)], [[0, 5], [1, 2.5]]),       # the first row that is free
    ([(0, 1), (0.97, 1), (1.95, 1)], [[0, 0.97, 1.95]]),            # alerts take their time
    ([(0, 0), (0, 0)], [[0, 0]])])
def test_jobs_have_a_row_for_each_slot(jobs, rows):
    packed = cexec.pack([logged(began=began, seconds=seconds) for began, seconds in jobs])
    assert [[round(entry.began - NOON, 2) for entry in row] for row in packed] == rows


class Drawn:
    """A picture, parsed: its texts, tooltips and bars."""

    def __init__(self, svg):
        self.svg = svg if isinstance(svg, str) else svg.decode()
        self.root = ElementTree.fromstring(self.svg.encode())
        self.height = int(self.root.get("height"))
        self.texts = [(element.text or "") + "".join(child.tail or "" for child in element)
                      for element in self.all("text")]
        self.tips = [element.text for element in self.all("title")][1:]

    def all(self, name, style=None):
        return [element for element in self.root.iter("{http://www.w3.org/2000/svg}" + name)
                if style in (None, element.get("class"))]

    def bars(self, style):
        """(left, width, top) of what has a colour, the legend aside."""
        found = [tuple(float(element.get(key)) for key in ("x", "width", "y")) for element in self.all("rect", style)]
        return [bar for bar in found if bar[2] > 100]


def draw(*entries, title="title", notes=()):
    return Drawn(cexec.picture(list(entries), title, list(notes)))


def test_what_a_picture_shows():
    picture = draw(logged("node10", 0, 10), logged("node9", 5, 5, "failed"), logged("node9", 0, 4, "lost"),
                   logged("node9", 2, 8, "killed"), logged("node9", 7, 0, "complaint", "why"),
                   title="run.log", notes=["noted"])
    assert picture.texts[:2] == ["run.log", "1 done, 1 failed, 1 killed, 1 lost, 1 complained about; "
                                            "2 workers; 0 B sent, 0 B received"]
    assert {"exit status 0", "killed by a signal", "noted", "jobs that ended"} <= set(picture.texts)
    assert picture.texts.index("node9") < picture.texts.index("node10")
    (done, *_), (failed, *_), (killed, *_), (lost, *_) = map(picture.bars, ("done", "failed", "killed", "lost"))
    assert done[1] == pytest.approx(2 * failed[1], rel=0.01) and lost[0] == done[0] < killed[0] < failed[0]
    assert lost[2] == failed[2] < killed[2] < done[2]       # one slot has both, and node9 is above node10
    assert len(picture.all("path", "mark")) == 1 + 2        # the legend's; the complaint's and that of the lost job
    assert any(tip.startswith("why\n") for tip in picture.tips)
    assert sum(tip.endswith("1 done, 1 failed, 1 killed") for tip in picture.tips) == 1     # that ended at once


def test_an_axis_in_time_and_duration(monkeypatch):
    monkeypatch.setenv("TZ", "XYZ-1:30")
    time.tzset()
    try:
        texts = draw(logged(began=100, seconds=3600)).texts
    finally:
        monkeypatch.undo()
        time.tzset()
    assert texts[2] == "2027-01-15 09:31:40 to 2027-01-15 10:31:40 (XYZ), 1h"
    assert ["0s", "10m", "20m", "50m", "1h"] == [text for text in texts if text in ("0s", "10m", "20m", "50m", "1h")]
    assert ["09:40", "10:30"] == [text for text in texts if text in ("09:40", "10:30")]


def check_labels(ticks):
    assert all(0 <= x <= 1000.1 for x, _ in ticks)
    for (left, one), (right, other) in zip(ticks, ticks[1:]):
        assert right - left >= 6.2 * (len(one) + len(other)) / 2


@pytest.mark.parametrize("seconds", [0, 0.001, 0.3, 7, 100, 5000, 86400 * 3, 86400 * 400, 4e9, 2e11])
@pytest.mark.parametrize("began", [0, NOON])
def test_labels_of_an_axis_keep_apart(seconds, began):
    axis = cexec.TimeAxis([logged()._replace(began=began, ended=began + seconds)], 0, 1000)
    for clock in (True, False):
        ticks = axis.ticks(clock)
        assert 1 <= len(ticks) <= 12 and len({text for _, text in ticks}) == len(ticks)
        check_labels(ticks)


def test_labels_of_a_broken_axis_keep_apart():
    axis = cexec.TimeAxis([logged(began=10 ** number, seconds=number) for number in range(1, 10)], 0, 1000)
    assert len(axis.cuts) == 8 and axis.spans[-1].right == pytest.approx(1000)
    check_labels(axis.ticks(True))
    check_labels(axis.ticks(False))


def test_long_idle_times_are_cut_out():
    """Two batches on two days, and a clock that was set: the jobs have room, and the picture says so."""
    first = [logged(began=number, seconds=0.8) for number in range(10)]
    rest = [entry._replace(began=entry.began + away, ended=entry.ended + away)
            for away in (86400, -NOON) for entry in first]
    picture = draw(*first, *rest)
    bars = [bar for bar in picture.bars("done") if bar[1] < 100]
    assert len(bars) >= 30 and min(bar[1] for bar in bars) > 10
    assert any("the axis is broken" in text for text in picture.texts)
    assert "nothing was logged for 23h59m50.2s" in picture.tips
    assert not any("broken" in text for text in draw(*first).texts)


def test_a_job_of_whoever_has_no_key_does_not_stretch_the_axis():
    picture = draw(logged(began=100), logged("forger" + cexec.UNVERIFIED, -4e6, 4e6 + 100))
    assert max(bar[1] for bar in picture.bars("done")) > 900 and "(UTC), 1s" in picture.texts[2].replace(
        time.strftime("%Z", time.localtime(NOON)), "UTC")


@pytest.mark.parametrize("name", [
    "10,000 jobs", "a hundred workers", "a thousand workers", "thousands at a time", "no time at all", "complaints"])
def test_a_picture_of_very_many_is_small(name):
    entries = {
        "10,000 jobs": [logged("w%d" % (n % 4), n / 10, 0.39, "done" if n % 97 else "failed") for n in range(10000)],
        "a hundred workers": [logged("w%d" % (n % 99), n / 10, 9) for n in range(10000)],
        "a thousand workers": [logged("w%d" % (n % 1000), n / 10, 99) for n in range(10000)],
        "thousands at a time": [logged("w%d" % (n % 3), n / 1000, 60) for n in range(10000)],
        "no time at all": [logged("w", 0, 0, "failed" if n % 2 else "done") for n in range(10000)],
        "complaints": [logged("w%d (unverified)" % (n % 300), n / 100, 0, "complaint") for n in range(10000)]}[name]
    picture = draw(*entries, *[logged("known", n, 1) for n in range(20)])
    assert len(picture.svg) < 1500000 and picture.height < 2600
    rectangles = len(picture.all("rect"))
    assert rectangles < 2 * cexec.BARS_MAX + 1000 and "known" in picture.texts
    assert any(text.startswith("Not drawn: ") for text in picture.texts) == (name in (
        "a thousand workers", "thousands at a time", "complaints"))
    assert rectangles > 1000 or name not in ("10,000 jobs", "a hundred workers")    # and not for want of bars
    assert len(picture.bars("failed")) > 50 or name != "10,000 jobs"


def test_bars_that_are_joined_tell_of_all_of_them():
    short = [logged(began=n / 1000, seconds=0.0005, outcome="failed" if n == 500 else "done") for n in range(1000)]
    picture = draw(*short, logged("other", 0, 1000))
    assert any(tip.startswith("1000: 999 done, 1 failed\nw, ") for tip in picture.tips)
    whole, half = [next(bar for bar in picture.bars(style) if bar[1] < 3) for style in ("done", "failed")]
    assert whole[0] == half[0] and whole[2] < half[2]       # the failure does not hide behind the others


EVIL = ["<script>alert(1)</script>", "]]>&\"'<!--", "\x1b[2J\x07\x00", "\u202eevil\u2028", "\ud800", "w" * 5000,
        "\u5de5\u4f5c\u6a5f\u68b0" * 30, "&#0;"]


def test_foreign_text_is_escaped():
    lines = [joblog_line(host=text, command=text) for text in EVIL]
    lines += [json.dumps(alert_record(worker=text, client=text, application=text, reason=text, event=event))
              for text in EVIL for event in ("exited", "complaint")]
    picture = draw(*[cexec.parse_entry(line) for line in lines], title=EVIL[0], notes=EVIL)
    assert picture.texts[0] == EVIL[0] and not picture.all("script") and "<script" not in picture.svg
    assert all(character.isprintable() or character == "\n" for character in picture.svg)
    assert any(tip.startswith("1: " + EVIL[0] + "\n") for tip in picture.tips)
    assert {"\\x1b[2J\\x07\\x00", "\\u202eevil\\u2028", "\\ud800"} <= set(picture.texts)
    assert all(cexec.columns(text) <= 181 for text in picture.texts) and max(map(len, picture.tips)) < 2000


def drawn(cluster, *words, **options):
    done = cluster.run("crat", "--svg", *words, **options)
    assert done.returncode == 0, done.stderr
    return Drawn(done.stdout), done.stderr.decode()


def test_lines_that_cannot_be_read_are_told_and_left_out(cluster):
    put(cluster.path("log"), "\n".join(["\t".join(cexec.JOBLOG), joblog_line(), "junk", joblog_line(2, began=NOON - 5),
                                        json.dumps(alert_record()), "\t" * 20, '{"cut off']))
    picture, said = drawn(cluster, "log")
    reason = "log: 3 lines left out, the first is line 3: neither a joblog's 9 fields with tabs between them nor an"
    assert said.startswith("crat: " + reason) and said.count("\n") == 1
    assert any(text.startswith("Not read: " + reason) for text in picture.texts)
    assert picture.texts[:2] == ["cexec: log", "3 done; 2 workers; 3.0 kB sent, 1.5 kB received"]
    assert any("alerts, which can be lost" in text for text in picture.texts)


@pytest.mark.parametrize("words", [[], ["-"]])
def test_a_log_on_standard_input(cluster, words):
    picture, said = drawn(cluster, *words, input=joblog_line(host="n\u00f6de").encode(), env={"LC_ALL": "C"})
    assert said == "" and picture.texts[0] == "cexec: standard input" and "n\u00f6de" in picture.texts
    assert not any("alerts" in text for text in picture.texts)
    assert drawn(cluster, *words, input=b"")[0].texts == ["cexec: standard input", "No job is in it."]
    assert "n\\xff" in drawn(cluster, *words, input=joblog_line().encode().replace(b"node1", b"n\xff"))[0].texts


def test_several_logs_in_one_picture(cluster):
    put(cluster.path("one"), joblog_line(host="node1") + "\r\n")
    put(cluster.path("two"), joblog_line(host="node2"))
    assert {"cexec: one, two", "node1", "node2"} <= set(drawn(cluster, "one", "two")[0].texts)


def test_a_picture_that_cannot_be_written(cluster):
    put(cluster.path("log"), joblog_line())
    with open("/dev/full", "wb") as full:
        done = cluster.run("crat", "--svg", "log", stdout=full)
    assert (done.returncode, done.stderr) == (111, b"crat: standard output: No space left on device\n")


def test_logs_that_were_really_written(cluster):
    need("parallel")
    subprocess.run(["parallel", "-j2", "--joblog", "theirs", "exit {}", ":::", "0", "3"], cwd=cluster.directory,
                   env=cluster.environment({"HOME": cluster.path(".")}), stderr=subprocess.DEVNULL)
    crat = cluster.logger("-j", cluster.pub)
    cluster.worker("sh", "-c", "read status; exit $status")
    for name in "04":
        put(cluster.path(name), name + "\n")
    cluster.run("cexec", "-m", "--log", "ours", cluster.pub, "--", "0", "4")
    put(cluster.path("alerts"), "\n".join(until(lambda: len(crat.lines()) == 2 and crat.lines(), "both alerts")))
    for name, words in (("theirs", "exit 3\nexit status 3\nthis host, "), ("ours", "4\nexit status 4\n%s, " % NODE),
                        ("alerts", "app.pub for anyone at 127.0.0.1\nexit status 4\n%s[127.0.0.1], " % NODE)):
        picture, said = drawn(cluster, name)
        assert said == "" and picture.texts[1].startswith("1 done, 1 failed; 1 worker;")
        assert any(words in tip for tip in picture.tips)


def pixels(path):
    """The rows of a PNG of 8-bit RGB or RGBA (RFC 2083): a list of (red, green, blue) each."""
    data, place, packed = read(path), 8, b""
    while place < len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        chunk, place = data[place + 8:place + 8 + length], place + 12 + length
        if kind == b"IHDR":
            width, _, depth, colours = struct.unpack_from(">IIBB", chunk)
            assert depth == 8 and colours in (2, 6)
        packed += chunk if kind == b"IDAT" else b""
    step = 3 if colours == 2 else 4
    raw, rows, above = zlib.decompress(packed), [], bytes(step * (width + 1))
    for start in range(0, len(raw), step * width + 1):
        method, row = raw[start], bytearray(step) + raw[start + 1:start + 1 + step * width]
        for i in range(step, len(row)) if method else ():
            left, up, corner = row[i - step], above[i], above[i - step]
            nearest = min((left, up, corner), key=lambda value: abs(left + up - corner - value))
            row[i] = row[i] + (0, left, up, (left + up) // 2, nearest)[method] & 255
        above = bytes(row)
        rows.append([tuple(above[i:i + 3]) for i in range(step, len(above), step)])
    return rows


def rendered(cluster, svg, dark):
    """The picture's pixels as headless Chromium shows it; it has no network, and nothing of another run."""
    put(cluster.path("picture.svg"), svg)
    profile = tempfile.mkdtemp(dir=cluster.directory)
    subprocess.run(["ip", "netns", "exec", cluster.space("browser%d" % dark), "chromium", "--headless", "--no-sandbox",
                    "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
                    "--disable-sync", "--disable-quic", "--user-data-dir=" + profile, "--hide-scrollbars",
                    "--window-size=1200,700", "--blink-settings=preferredColorScheme=%d" % (not dark),
                    "--screenshot=" + cluster.path("picture.png"), "file://" + cluster.path("picture.svg")],
                   env=cluster.environment({"HOME": profile}), cwd=profile, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, check=True, timeout=60)
    return pixels(cluster.path("picture.png"))


@HEAVY
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_picture(cluster, dark):
    need("root", "ip", "chromium")
    svg = cexec.picture([logged("node1", 0, 10), logged("node1", 10, 10, "failed"), logged("node2", 0, 10, "killed"),
                         logged("node2", 10, 10, "lost")], "in a browser", [])
    picture, shown = Drawn(svg), rendered(cluster, svg, dark)
    paper, ink = ((0x16, 0x18, 0x1c), (0xdd,) * 3) if dark else ((255,) * 3, (0x22,) * 3)
    assert shown[2][2] == shown[picture.height - 2][1190] == paper
    for style, colour in (("done", (0, 0x72, 0xb2)), ("failed", (0xd5, 0x5e, 0)), ("killed", (0xcc, 0x79, 0xa7)),
                          ("lost", ink)):
        left, width, top = picture.bars(style)[0]
        assert {shown[int(top) + 7][int(left) + away] for away in (2, int(width) // 2, int(width) - 2)} == {colour}
    title = [pixel for row in shown[14:32] for pixel in row[20:200]]
    assert title.count(paper) > 1000 and title.count(ink) > 50      # letters, of the ink's colour
    for row in (120, 122):          # between the labels of the axis and the rows: nothing but the ticks
        assert len([pixel for pixel in shown[row] if pixel != paper]) < 40


# ---- cproxy: pumps, chains, rings, limits, NAT -----------------------------


class Between:
    """A cproxy on this host; sockets that stand for the clients and workers of its two sides."""

    def __init__(self, cluster):
        self.announced = 0
        self.near, self.far, self.opened, self.refusals = cluster.env["GROUP"].rpartition(":")[2], free_port(), [], 0
        self.ear = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.ear.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self.ear.bind(("", self.far))
        self.process = cluster.proxy("127.0.0.2", "127.255.255.255:%d" % self.far)
        self.log, self.pid = self.process.log, self.process.pid
        self.files = open_files(self.pid)

    def announce(self, port):
        """What a worker hears of a client at that port; None if the proxy drops it."""
        sent = make_datagram(cexec.ANNOUNCE, made_pub(), os.urandom(16), port, **FIRST_TRY)
        self.announced += 1                     # clients of eight hosts in turn
        sent = cexec.Datagram(sent).readdressed("127.0.1.%d" % (1 + self.announced % 8), port, 0)
        self.ear.sendto(sent, ("127.255.255.255", int(self.near)))
        until(lambda: select.select([self.ear], [], [], 0.1)[0] or self.refused(), "the announcement or a refusal")
        if select.select([self.ear], [], [], 0)[0]:
            relayed = cexec.Datagram(self.ear.recv(2000))
            assert relayed.identity == cexec.Datagram(sent).identity
            return relayed.address, relayed.port
        self.refusals += 1
        return None

    def refused(self):
        return read(self.log).count(b": too many clients") > self.refusals

    def client(self):
        """A client that listens for offers."""
        listener = socket.create_server(("", 0))
        self.opened.append(listener)
        listener.settimeout(PATIENCE)
        return listener

    def offer(self, listener, address):
        """The two ends of a connection through the proxy: the client's, the worker's."""
        worker = socket.create_connection(address, PATIENCE)
        client = listener.accept()[0]
        self.opened += [client, worker]
        client.settimeout(PATIENCE)
        client.sendall(BEGINNING)
        assert worker.recv(100) == BEGINNING
        return client, worker

    def join(self):
        listener = self.client()
        return self.offer(listener, self.announce(listener.getsockname()[1]))

    def ticks(self):
        fields = read("/proc/%d/stat" % self.pid).rpartition(b")")[2].split()
        return int(fields[11]) + int(fields[12])

    def rests(self):
        """Waits until it uses no processor any more."""
        def quiet():
            before = self.ticks()
            time.sleep(0.3)
            return self.ticks() == before
        until(quiet, "a proxy at rest")

    def tidy(self):
        """All connections have been closed: it has no descriptor more than at its beginning, but its two relays'."""
        relays = 2 * read(self.log).count(b"-> ANNOUNCE")
        until(lambda: open_files(self.pid) <= self.files + relays, "the end of its pipes and connections")

    def close(self):
        for sock in [*self.opened, self.ear]:
            sock.close()


@pytest.fixture
def proxy(cluster):
    made = Between(cluster)
    yield made
    made.close()


def in_thread(call, *arguments):
    thread = threading.Thread(target=call, args=arguments, daemon=True)
    thread.start()
    return thread


def take(sock, size):
    """So many bytes, or those until the end."""
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(min(1 << 16, size - len(data)))
        if not piece:
            break
        data += piece
    return bytes(data)


def test_what_goes_through_a_proxy_comes_out(proxy):
    """Both ways at once; then one side ends and the other does not; then nothing of it is left."""
    client, worker = proxy.join()
    there, back = os.urandom(6 << 20), os.urandom(6 << 20)
    senders = [in_thread(client.sendall, there), in_thread(worker.sendall, back)]
    got = []
    reader = in_thread(lambda: got.append(take(worker, len(there))))
    assert take(client, len(back)) == back
    for thread in [reader, *senders]:
        thread.join(PATIENCE)
    assert got == [there]
    client.shutdown(socket.SHUT_WR)
    assert worker.recv(1) == b""
    worker.sendall(back[:1 << 20])
    assert take(client, 1 << 20) == back[:1 << 20]
    worker.close()
    assert client.recv(1) == b""
    until(lambda: b"ends: done" in read(proxy.log), "the end of the join")
    proxy.tidy()
    assert b"internal error" not in read(proxy.log) and proxy.process.poll() is None


def fill(sock):
    """Sends until nothing more is taken; how much was."""
    sock.setblocking(False)
    sent, since = 0, time.monotonic()
    piece = bytes(range(256)) * 256
    while time.monotonic() < since + 0.5:
        try:
            sent += sock.send(piece[sent % 256:])
            since = time.monotonic()
        except BlockingIOError:
            time.sleep(0.01)
    sock.settimeout(PATIENCE)
    return sent


def test_a_datagram_that_has_gone_far_enough_goes_no_farther(proxy):
    sent = []
    for hops in (cexec.HOPS_MAX, cexec.HOPS_MAX - 1):
        data = make_datagram(cexec.ANNOUNCE, made_pub(), os.urandom(16), 9, **FIRST_TRY)
        sent.append(cexec.Datagram(cexec.Datagram(data).readdressed("127.0.1.1", 9, hops)))
        proxy.ear.sendto(sent[-1].data, ("127.255.255.255", int(proxy.near)))
    relayed = cexec.Datagram(until(lambda: select.select([proxy.ear], [], [], 0.1)[0], "a relay")[0].recv(2000))
    assert (relayed.identity, relayed.hops) == (sent[1].identity, cexec.HOPS_MAX)


def test_a_side_that_stalls_stalls_the_other(proxy):
    """Without a storm of wake-ups, and with no more memory than a buffer; then all of it comes, and the end."""
    client, worker = proxy.join()
    worker.sendall(bytes(1 << 20))
    assert take(client, 1 << 20) == bytes(1 << 20)
    before = rss(proxy.pid)
    sent = fill(worker)
    proxy.rests()
    worker.shutdown(socket.SHUT_WR)         # now one side has ended, and the other stalls
    proxy.rests()
    assert rss(proxy.pid) - before < 4 << 20
    client.sendall(b"the other way")
    assert take(worker, 13) == b"the other way"
    client.shutdown(socket.SHUT_WR)
    assert worker.recv(1) == b""
    proxy.rests()
    assert len(take(client, sent + 1)) == sent
    until(lambda: b"ends: done" in read(proxy.log), "the end of the join")


@pytest.mark.parametrize("side", ["client", "worker"])
@pytest.mark.parametrize("state", ["quiet", "stalled", "half closed"])
def test_a_reset_crosses_a_proxy_as_a_reset(proxy, side, state):
    """Never as an end of file; also where the proxy reads no more from it, as the other side stalls."""
    ends = dict(zip(("client", "worker"), proxy.join()))
    one, other = ends.pop(side), ends.popitem()[1]
    one.sendall(bytes(1 << 20))
    assert take(other, 1 << 20) == bytes(1 << 20)
    if state == "stalled":
        fill(one)
    elif state == "half closed":
        other.shutdown(socket.SHUT_WR)
        assert one.recv(1) == b""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESETS)
    one.close()
    until(lambda: other.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNRESET, "the reset")
    other.close()
    proxy.tidy()


def crowd(cluster, proxy):
    listeners = [proxy.client() for _ in range(500)]
    ports = [proxy.announce(listener.getsockname()[1]) for listener in listeners]
    joins = [proxy.offer(*pair) for pair in zip(listeners, ports)]
    each_its_own(joins)
    through(cluster, proxy, b"among them\n")
    while len(listeners) < cexec.RELAYS_MAX:        # that of the job gives way: it has no connection any more
        listeners.append(proxy.client())
        ports.append(proxy.announce(listeners[-1].getsockname()[1]))
        joins.append(proxy.offer(listeners[-1], ports[-1]))
    assert proxy.announce(proxy.client().getsockname()[1]) is None      # and no client that is served does
    for number in range(len(joins), cexec.JOINS_MAX):
        joins.append(proxy.offer(listeners[number % len(listeners)], ports[number % len(ports)]))
    with socket.create_connection(ports[0], PATIENCE) as late:
        assert late.recv(1) == b""          # closed at once
    assert read(proxy.log).count(b"too many connections") == 1
    each_its_own(joins)
    for sock in proxy.opened:
        sock.close()
    through(cluster, proxy, b"after them\n")
    proxy.rests()


def through(cluster, proxy, data):
    """A job gets through, with a worker that is gone then: it would hear all else."""
    worker = cluster.worker("cat", env={"GROUP": "127.255.255.255:%d" % proxy.far})
    assert ended(cluster.client(input=data)) == (0, data, b"")
    signalled(worker)
    while select.select([proxy.ear], [], [], 0.3)[0]:
        proxy.ear.recv(2000)


def each_its_own(joins):
    """Each connection carries what was sent on it, both ways."""
    for number, (client, worker) in enumerate(joins):
        client.sendall(b"to %6d" % number)
        worker.sendall(b"from %6d" % number)
    for number, (client, worker) in enumerate(joins):
        assert take(worker, 9) == b"to %6d" % number
        assert take(client, 11) == b"from %6d" % number


@HEAVY
def test_hundreds_of_connections_through_one_proxy(cluster, proxy):
    """500 raw ones that begin like TLS, a client each; then all there may be; a refusal; a job goes through."""
    wanted = 2 * (cexec.JOINS_MAX + cexec.RELAYS_MAX) + 500
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        skip("%d descriptors are needed" % wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    try:
        crowd(cluster, proxy)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Census(Closing):
    """How often each datagram is on each network, as the hosts there see it."""

    def __init__(self, places):
        self.captures = {network: Capture(space) for network, space in places.items()}

    def copies(self):
        """{network: {identity: times}}."""
        return {network: collections.Counter(datagram.identity for interface, datagram in capture.datagrams()
                                             if interface == network)
                for network, capture in self.captures.items()}

    def most(self):
        return {network: max(counts.values(), default=0) for network, counts in self.copies().items()}

    def close(self):
        for capture in self.captures.values():
            capture.close()


def job_crosses(hosts, space, worker, runs):
    """A job gets through, once, with its bytes and status."""
    data = os.urandom(3 << 20)
    assert output(hosts.client("CMD=" + COUNTED, space=space, input=data), 7, b"oh\n") == data
    assert read(hosts.path("runs")) == b"run\n" * runs
    assert signalled(worker) == 0


def test_a_chain_of_three_proxies(hosts):
    client, one, two, three, far = hosts.net("na 10.71.0 client one", "nb 10.72.0 one two", "nc 10.73.0 two three",
                                             "nd 10.74.0 three worker").values()
    for space, address in ((one, "10.72.0.1"), (two, "10.73.0.1"), (three, "10.74.0.1")):
        hosts.proxy(address, space=space)
    worker = hosts.shell_worker(space=far, env={"CONCURRENCY": "1"})
    logger = hosts.logger(hosts.pub, space=far)
    with Census({"na": client, "nb": one, "nc": two, "nd": far}) as census:
        first = held_job(hosts, "CMD=exec cat", space=client)
        second = in_line(hosts, 0, "CMD=true", space=client)        # BUSY comes back through all three
        outcomes(first, second)
        job_crosses(hosts, client, worker, 1)
        until(lambda: len(logger.lines()) >= 3, "the alerts")
        copies = until(lambda: (lambda c: c if len({frozenset(n) for n in c.values()}) == 1 else None)(
            census.copies()), "the same datagrams everywhere")
        print("chain: %d datagrams, copies at most %s" % (len(copies["na"]), census.most()))
        assert set(census.most().values()) == {1}
    assert len(logger.lines()) == 3 and all("10.74.0.1 completed by 10.74.0.2" in line for line in logger.lines())


def test_jobs_both_ways_through_two_proxies(hosts):
    left, gate, _, right = hosts.net("na 10.71.0 left gate more", "nb 10.72.0 gate right").values()
    for address in ("10.72.0.1", "10.71.0.2"):
        hosts.proxy(address, space=gate)
    with Census({"na": left, "nb": right}) as census:
        job_crosses(hosts, left, hosts.shell_worker(space=right), 1)
        job_crosses(hosts, right, hosts.shell_worker(space=left), 2)
        copies = census.copies()
        assert len(copies["na"]) >= 6 and copies["na"].keys() == copies["nb"].keys()
        print("opposite: %d datagrams, copies at most %s" % (len(copies["na"]), census.most()))
        assert set(census.most().values()) == {1}


@pytest.mark.parametrize("directions", [1, 2])
def test_a_ring_of_three_networks(hosts, directions):
    """A proxy from each network to the next, or one each way: nothing goes round, jobs get where they can."""
    client_a, one, three, client_b, two, client_c = hosts.net(
        "na 10.71.0 ca one three", "nb 10.72.0 one cb two", "nc 10.73.0 two three cc").values()
    forward = [(one, "10.72.0.1"), (two, "10.73.0.1"), (three, "10.71.0.3")]
    backward = [(one, "10.71.0.2"), (two, "10.72.0.3"), (three, "10.73.0.2")]
    for space, address in forward + backward * (directions - 1):
        hosts.proxy(address, space=space)
    with Census({"na": client_a, "nb": client_b, "nc": client_c}) as census:
        done = hosts.client(space=client_a, env={"CEXEC_TIMEOUT_ACCEPT": "2"})      # tries that nobody answers
        assert done.returncode == 111
        for runs, (client, place) in enumerate([(client_a, client_b), (client_a, client_c), (client_b, client_a)], 1):
            job_crosses(hosts, client, hosts.shell_worker(space=place), runs)
        copies, most = census.copies(), census.most()
        print("ring, directions %d: %d datagrams, copies at most %s" % (directions, len(copies["na"]), most))
        assert len(copies["na"]) >= 12
        assert copies["na"].keys() == copies["nb"].keys() == copies["nc"].keys()
        assert max(most.values()) <= directions + 1     # its own, or one of each proxy that sends there


def job_in_flight(hosts, crossing, mark, command, **env):
    """A job that sends, or takes, as fast as it can."""
    with open("/dev/zero", "rb") as zero:
        job = hosts.start_client("CMD=" + command, mark, space=crossing.client, stdin=zero, env=env,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert len(job.stdout.read(4 << 20)) == 4 << 20
    return job, in_thread(job.stdout.read)


@pytest.mark.parametrize("command", ["exec cat", "exec cat /dev/zero"])
@pytest.mark.parametrize("number, reason", [
    (signal.SIGKILL, r"(connection closed|Connection reset by peer)%s" % MAY_HAVE_RUN),     # long before the timeout
    (signal.SIGSTOP, r"no sign of life[^\n]*")], ids=["killed", "stopped"])
def test_a_proxy_that_ends_while_much_is_moved(hosts, crossing, command, number, reason):
    mark = "MARK=" + os.urandom(8).hex()
    hosts.shell_worker(space=crossing.worker)
    proxy = crossing.proxy()
    env = {"CEXEC_TIMEOUT_PINGPONG": "1"} if number == signal.SIGSTOP else {}
    job, reader = job_in_flight(hosts, crossing, mark, command, **env)
    proxy.send_signal(number)
    assert job.wait(PATIENCE) == 111
    reader.join(PATIENCE)
    assert re.fullmatch(r"cexec: worker 10\.78\.0\.2 lost after \d+\.\d s: %s\n" % reason, job.stderr.read().decode())
    if number == signal.SIGSTOP:
        proxy.send_signal(signal.SIGCONT)
    until(lambda: not processes_with("PEER_" + mark), "the end of the command")
    if number == signal.SIGSTOP:
        assert ended(hosts.client("CMD=cat; exit 3", space=crossing.client, input=b"again\n")) == (3, b"again\n", b"")


def test_a_reset_in_mid_job_is_no_success(hosts, crossing):
    """The gate's worker's side is reset, all that has come until then looks whole: 111."""
    need("ss")
    mark = "MARK=" + os.urandom(8).hex()
    hosts.shell_worker(space=crossing.worker)
    crossing.proxy()
    job = held_job(hosts, "CMD=exec cat", mark, space=crossing.client)
    subprocess.run(["ip", "netns", "exec", crossing.worker, "ss", "-tK", "dst", "10.78.0.1"], check=True,
                   stdout=subprocess.DEVNULL)
    if "Connection reset" not in lost(job):
        skip("the kernel has no SOCK_DESTROY")
    until(lambda: not processes_with("PEER_" + mark), "the end of the command")


def test_a_client_behind_nat_is_served_by_a_proxy_on_its_gateway(hosts):
    """No worker can reach it by itself, though they hear it."""
    need("nft")
    client, gateway, outside = hosts.net("home 192.168.7 client gateway", "wide 10.78.0 gateway worker").values()
    ip("-n", client, "route", "add", "default", "via", "192.168.7.2")
    rules = ("table ip nat { chain out { type nat hook postrouting priority 100; policy accept;"
             " oifname wide masquerade; }; }")
    subprocess.run(["ip", "netns", "exec", gateway, "sh", "-ec",
                    "echo 1 >/proc/sys/net/ipv4/ip_forward; nft -f -"], input=rules.encode(), check=True)
    with udp_socket(client) as mouth, udp_socket(outside, 9999) as ear:
        mouth.sendto(b"who am I?", ("10.78.0.2", 9999))
        assert ear.recvfrom(100)[1][0] == "10.78.0.1"
    worker = hosts.shell_worker(space=outside, env={"CONCURRENCY": "1"})
    for group in (None, "10.78.0.2"):
        done = hosts.client("CMD=cat", space=client, env={"CEXEC_TIMEOUT_ACCEPT": "2", "GROUP": group})
        assert done.returncode == 111 and (b"no worker reached us" if group else b"no worker answered") in done.stderr
    assert heard(worker)
    hosts.proxy("10.78.0.1", space=gateway)
    data = os.urandom(3 << 20)
    done = hosts.client("CMD=cat; echo $REMOTE_ADDR >&2; exit 5", space=client, input=data)
    assert (done.returncode, done.stderr) == (5, b"10.78.0.1\n") and done.stdout == data
    first = held_job(hosts, "CMD=exec cat", space=client)
    second = in_line(hosts, 0, "CMD=true", space=client)
    outcomes(first, second)


def test_nothing_crosses_without_a_proxy(hosts, crossing):
    worker = hosts.worker("cat", space=crossing.worker)
    done = hosts.client(space=crossing.client, env={"CEXEC_TIMEOUT_ACCEPT": "1"})
    assert done.returncode == 111 and not heard(worker)


@pytest.mark.parametrize("target", [None, "10.78.0.255", "right:255.255.255.255", "10.78.0.2", "239.7.7.7",
                                    "right:239.7.7.7:4010", "10.78.0.9,10.78.0.2"])
def test_a_job_crosses_a_proxy(hosts, crossing, target):
    there = {"GROUP": target} if target and "239" in target else {}
    hosts.shell_worker(space=crossing.worker, env=there)
    loggers = [hosts.logger(hosts.pub, space=crossing.other), hosts.logger(hosts.pub, space=crossing.worker, env=there)]
    crossing.proxy("10.78.0.1", *[target] * bool(target))
    assert ended(hosts.client("CMD=cat; echo $REMOTE_ADDR $SERVER_ADDR; echo oh >&2; exit 7", space=crossing.client,
                              input=b"in\n")) == (7, b"in\n10.78.0.1 10.78.0.2\n", b"oh\n")
    for logger, client in zip(loggers, ("10.77.0.1", "10.78.0.1")):
        until(logger.lines, "a line on either side")
        assert [line.startswith("%s completed by 10.78.0.2 for app.pub exit code 7" % client)
                for line in logger.lines()] == [True], logger.lines()


def test_twenty_megabytes_cross_and_come_back(hosts, crossing):
    hosts.worker("cat", space=crossing.worker)
    crossing.proxy()
    data = os.urandom(1 << 20) * 20
    assert output(hosts.client(space=crossing.client, input=data)) == data


def test_half_closes_cross(hosts, crossing):
    hosts.worker("sort", space=crossing.worker)
    crossing.proxy()
    assert ended(hosts.client(space=crossing.client, input=b"b\nc\na\n")) == (0, b"a\nb\nc\n", b"")


def test_the_last_byte_crosses_to_a_slow_link(hosts, crossing):
    """The worker has left, the proxy has the rest: what the client says meanwhile resets nothing."""
    altered(hosts, CLOSE_SECONDS=0.1)
    worker = hosts.worker("head", "-c", "40000", "/dev/zero", space=crossing.worker)
    crossing.proxy()
    ip("netns", "exec", crossing.client, "sysctl", "-qw", "net.ipv4.tcp_rmem=4096 16384 16384")     # or all is sent
    slow_down(crossing.gate, "left")
    client = hosts.start_client(space=crossing.client, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env={"CEXEC_TIMEOUT_PINGPONG": "2"})
    until(lambda: b"ended, done" in read(worker.log), "the supervisor's end")
    assert client.poll() is None
    assert outcome(client) == (bytes(40000), b"")


def test_a_client_that_vanishes_behind_a_proxy(hosts, crossing):
    mark = "PEER_MARK=" + os.urandom(8).hex()
    worker = hosts.worker("yes", space=crossing.worker)
    altered(hosts, GONE_SECONDS=2.0)
    proxy = crossing.proxy()
    client = hosts.start_client(mark[5:], space=crossing.client, stdout=subprocess.DEVNULL)
    until(lambda: read(worker.log).count(b"CREDIT") > 3, "the output")
    ip("-n", crossing.client, "link", "set", "dev", "left", "down")
    client.kill()
    until(lambda: not processes_with(mark), "the end of the command")
    assert os.strerror(errno.ETIMEDOUT).encode() in read(proxy.log)


def test_an_early_close_crosses(hosts, crossing):
    hosts.worker("yes", space=crossing.worker)
    crossing.proxy()
    client = hosts.start_client(space=crossing.client, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert client.stdout.readline() == b"y\n"
    client.stdout.close()
    assert client.wait(30) == 128 + signal.SIGPIPE and client.stderr.read() == b""


@pytest.mark.parametrize("rp_filter", [False, True])
def test_busy_crosses_a_proxy(hosts, crossing, rp_filter):
    """Also to a host that checks where it comes from and has no route to the workers: theirs would be dropped."""
    for name in ["all", "left"] * rp_filter:
        ip("netns", "exec", crossing.client, "sysctl", "-qw", "net.ipv4.conf.%s.rp_filter=1" % name)
    hosts.worker(*ORDERLY, space=crossing.worker, env={"CONCURRENCY": "1"})
    crossing.proxy()
    first = held_job(hosts, "N=0", space=crossing.client)
    clients = [in_line(hosts, n - 1, "N=%d" % n, space=crossing.client) for n in (1, 2)]
    outcomes(first, *clients)
    assert order(hosts) == ["anyone0", "anyone1", "anyone2"]


def test_two_proxies_in_a_row(hosts, crossing):
    hosts.shell_worker(space=hosts.lan("far", [crossing.worker, "worker"], "10.79.0")["worker"])
    crossing.proxy()
    crossing.proxy("10.79.0.1", space=crossing.worker)
    data = os.urandom(1 << 20)
    assert output(hosts.client("CMD=cat; exit 4", space=crossing.client, input=data), 4) == data


def memory(pid):
    """What a process can write in its memory."""
    parts = []
    with open("/proc/%d/maps" % pid) as maps, open("/proc/%d/mem" % pid, "rb", 0) as mem:
        for line in maps:
            span, mode = line.split()[:2]
            if mode.startswith("rw"):
                first, last = (int(number, 16) for number in span.split("-"))
                with contextlib.suppress(OSError, ValueError):
                    mem.seek(first)
                    parts.append(mem.read(last - first))
    return b"\n".join(parts)


def test_a_proxy_can_not_read_what_it_relays(hosts, crossing):
    hosts.worker("sh", "-c", 'cat; echo "$PEER_WORD"', space=crossing.worker)
    proxy = crossing.proxy()
    secret = os.urandom(12).hex().encode()
    data = (secret + b"\n") * 50000
    with Capture(crossing.gate) as capture:
        done = hosts.client("WORD=" + secret.decode(), space=crossing.client, input=data)
        assert (done.returncode, done.stdout, done.stderr) == (0, data + secret + b"\n", b"")
        wire = b"".join(packet for _, packet in capture.packets())
    assert len(wire) > 2 * len(data) and cexec.MAGIC in wire and b"\x16\x03" in wire     # all of it was captured
    assert secret not in wire
    assert b"goes to 10.77.0.1:" in read(proxy.log) and secret not in read(proxy.log)
    known = memory(proxy.pid)
    assert b"10.78.0.1" in known and secret not in known


@pytest.mark.parametrize("gates", [1, 2])
def test_proxies_in_opposite_directions_do_not_storm(hosts, gates):
    """One gate with a proxy each way; then two such gates, a ring."""
    client, one, two, worker = hosts.net("left 10.77.0 client one two",
                                         "right 10.78.0 one worker" + " two" * (gates - 1)).values()
    proxies = [(one, "10.78.0.1"), (one, "10.77.0.2"), (two, "10.78.0.3"), (two, "10.77.0.3")]
    for space, address in proxies[:2 * gates]:
        hosts.proxy(address, space=space)
    logger = hosts.logger(hosts.pub, space=worker)
    with Capture(client) as left, Capture(worker) as right:
        assert hosts.client(space=client, env={"CEXEC_TIMEOUT_ACCEPT": "2"}).returncode == 111
        hosts.shell_worker(space=worker)
        assert ended(hosts.client("CMD=cat", space=client, input=b"in\n")) == (0, b"in\n", b"")
        until(logger.lines, "the alert")
        copies = [collections.Counter(datagram.identity for interface, datagram in capture.datagrams()
                                      if interface != "lo") for capture in (left, right)]
    assert len(copies[0]) >= 6 and copies[0].keys() == copies[1].keys()
    print("copies of a datagram, at most: left %d, right %d" % tuple(max(count.values()) for count in copies))
    # its own and one of each proxy that sends there
    assert max(copies[0].values()) <= 1 + gates and max(copies[1].values()) <= gates, copies
    assert len(logger.lines()) == 1, logger.lines()


def test_a_proxy_killed_in_mid_job(hosts, crossing):
    mark = "PEER_MARK=" + os.urandom(8).hex()
    hosts.worker("cat", space=crossing.worker)
    proxy = crossing.proxy()
    job = held_job(hosts, mark[5:], space=crossing.client)
    proxy.kill()
    assert "no sign of life" not in lost(job)      # long before CEXEC_TIMEOUT_PINGPONG
    until(lambda: not processes_with(mark), "the end of the command")


def test_a_worker_killed_behind_a_proxy(hosts, crossing):
    worker = hosts.worker("cat", space=crossing.worker)
    crossing.proxy()
    job = held_job(hosts, space=crossing.client)
    for _ in range(2):
        worker.terminate()
        until(lambda: b"draining" in read(worker.log), "draining")
    lost(job)


def test_a_client_killed_behind_a_proxy(hosts, crossing):
    """Its connection ends without a word in TLS: the proxy has to pass that on."""
    mark = "PEER_MARK=" + os.urandom(8).hex()
    hosts.worker("cat", space=crossing.worker)
    proxy = crossing.proxy()
    job = held_job(hosts, mark[5:], space=crossing.client)
    assert len(processes_with(mark)) == 1
    job.kill()
    until(lambda: not processes_with(mark), "the end of the command")
    until(lambda: b"ends: done" in read(proxy.log), "the end of both connections")


def tcp_socket(space):
    with inside(space):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.settimeout(PATIENCE)
        return sock


def captured_announcements(hosts, crossing, number):
    """So many announcements of a client that is gone since, as they were on the wire."""
    with Capture(crossing.gate) as capture:
        client = hosts.start_client(space=crossing.client, stderr=subprocess.DEVNULL)
        until(lambda: len(capture.datagrams()) >= number, "announcements")
        signalled(client, signal.SIGKILL)
        return [datagram for _, datagram in capture.datagrams()][:number]


def test_a_forged_return_address_gets_not_one_byte(hosts, crossing):
    """Services of another host that answer anybody; and somebody on the right who has words for them."""
    answers = [b"", b"220 ready\r\n", b"\x16\x03\x03\x00\x10\x02", b"\x15\x03\x03", b"\x16"]
    captured = captured_announcements(hosts, crossing, len(answers))
    altered(hosts, HELLO_SECONDS=1.0)
    crossing.proxy()
    ear, mouth = udp_socket(crossing.worker, GROUP_PORT), udp_socket(crossing.client)
    sockets = [ear, mouth]
    try:
        pairs = []
        for datagram, answer in zip(captured, answers):
            victim = tcp_socket(crossing.other)
            sockets.append(victim)
            victim.bind(("10.77.0.3", 0))
            victim.listen(5)
            mouth.sendto(datagram.readdressed("10.77.0.3", victim.getsockname()[1], 0), ("10.77.0.255", GROUP_PORT))
            relayed = cexec.Datagram(ear.recv(2000))
            assert relayed.identity == datagram.identity and relayed.address == "10.78.0.1"
            caller = tcp_socket(crossing.worker)
            sockets.append(caller)
            caller.connect((relayed.address, relayed.port))
            caller.sendall(b"DELETE / HTTP/1.0\r\n\r\n")
            service = victim.accept()[0]
            service.settimeout(PATIENCE)
            sockets.append(service)
            service.sendall(answer)
            pairs.append((service, caller))
        for service, caller in pairs:
            with contextlib.suppress(ConnectionResetError):
                assert service.recv(100) == b""     # the silent one is given up too
            with contextlib.suppress(ConnectionResetError):
                assert caller.recv(100) in (b"", b"\x16")       # what may be the beginning of a ClientHello
    finally:
        for sock in sockets:
            sock.close()


def test_a_proxy_passes_on_only_answers_and_to_hosts_alone(hosts, crossing):
    """Not every BUSY, REPLY or DENY that somebody sends to its port, and to whom its client's address is forged."""
    announced, forged, broadcast = captured_announcements(hosts, crossing, 3)
    crossing.proxy()
    pub = cexec.open_pub(hosts.pub)
    ear, mouth = udp_socket(crossing.worker, GROUP_PORT), udp_socket(crossing.client, 5555)
    neighbour = udp_socket(crossing.other, 5555)
    with ear, mouth, neighbour:
        mouth.settimeout(PATIENCE)
        mouth.sendto(forged.readdressed("239.1.2.3", 5555, 0), ("10.77.0.255", GROUP_PORT))
        mouth.sendto(broadcast.readdressed("10.77.0.255", 5555, 0), ("10.77.0.255", GROUP_PORT))
        mouth.sendto(announced.readdressed("10.77.0.1", 5555, 0), ("10.77.0.255", GROUP_PORT))
        relayed = [cexec.Datagram(ear.recv(2000))]
        while relayed[-1].identity != announced.identity:
            relayed.append(cexec.Datagram(ear.recv(2000)))
        assert forged.identity not in [datagram.identity for datagram in relayed]

        def say(kind, nonce, to, **fields):
            ear.sendto(make_datagram(kind, pub, nonce, 0, **filled(kind, **fields)), (to.address, to.port))
        say(cexec.BUSY, broadcast.nonce, relayed[0])
        say(cexec.BUSY, os.urandom(16), relayed[-1])            # of nobody's job
        say(cexec.REPLY, announced.nonce, relayed[-1])          # it has asked no question
        say(cexec.DENY, announced.nonce, relayed[-1])
        say(cexec.ANNOUNCE, announced.nonce, relayed[-1])
        say(cexec.BUSY, announced.nonce, relayed[-1], ahead=7)
        data, (sender, port) = mouth.recvfrom(2000)
        assert (sender, port) != ("10.77.0.1", 5555)
        answer = cexec.Datagram(data)
        assert (answer.kind, answer.nonce, answer.body.ahead) == (cexec.BUSY, announced.nonce, 7)
        neighbour.setblocking(False)
        with pytest.raises(BlockingIOError):
            neighbour.recv(2000)


def test_garbage_at_a_proxys_ports(hosts, crossing):
    noise = random.Random(2)
    captured, whole = captured_announcements(hosts, crossing, 2)
    proxy = crossing.proxy()
    ear, mouth = udp_socket(crossing.worker, GROUP_PORT), udp_socket(crossing.client)
    ear.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
    with ear, mouth:
        for size in [0, 1, 3, 25, 26, 100, 1200, 1201, 9000] * 20:
            mouth.sendto(noise.getrandbits(8 * size + 8).to_bytes(size + 1, "big")[1:], ("10.77.0.2", GROUP_PORT))
        for _ in range(200):            # damaged ones, which do parse in part
            data = bytearray(captured.data)
            for _ in range(noise.randint(1, 4)):
                data[noise.randrange(4, len(data))] = noise.randrange(256)
            mouth.sendto(data[:noise.randint(4, len(data) + 40)], ("10.77.0.2", GROUP_PORT))
        ear.settimeout(0.1)

        def relayed_whole():            # some of the damaged ones do look well, and are relayed too
            mouth.sendto(whole.readdressed("10.77.0.3", 9, 0), ("10.77.0.2", GROUP_PORT))   # the queue may be full
            with contextlib.suppress(socket.timeout):
                found = cexec.Datagram(ear.recv(2000))
                return found if found.identity == whole.identity else None
        relayed = until(relayed_whole, "the relay's port")
        for size in (0, 1, 30, 1200, 3000):
            ear.sendto(os.urandom(size), (relayed.address, relayed.port))
            ear.sendto(captured.data[:size], (relayed.address, relayed.port))
        for text in (b"", b"GET / HTTP/1.0\r\n\r\n", os.urandom(100000)):
            with tcp_socket(crossing.worker) as caller, contextlib.suppress(OSError):
                caller.connect((relayed.address, relayed.port))
                caller.sendall(text)
                assert caller.recv(100) == b""
    assert proxy.poll() is None, read(proxy.log)[-2000:].decode()
    hosts.worker("cat", space=crossing.worker)
    assert ended(hosts.client(space=crossing.client, input=b"still there\n")) == (0, b"still there\n", b"")
    until(lambda: read("/proc/%d/stat" % proxy.pid).split()[2] == b"S", "a proxy at rest")


# ---- ckeygen ---------------------------------------------------------------

def with_certificate_of(text, other):
    """A key file whose certificate is another key's."""
    mark = "-----BEGIN CERTIFICATE-----"
    return text.partition(mark)[0] + mark + other.partition(mark)[2]


def impossible_scalar(number):
    """A key file of a number that is no private key, with some certificate."""
    private = cexec.der(0x30, cexec.der_integer(1), cexec.der(0x04, number.to_bytes(32, "big")))
    return with_certificate_of(cexec.pem("EC PRIVATE KEY", private), cexec.format_key(MASTER)[0])


@pytest.mark.parametrize("text", [
    "", GOOD_KEY[:-40], GOOD_KEY.partition("-----BEGIN CERT")[0], GOOD_KEY.replace("AECAwQFBgc", "AECAwQEBgc"),
    GOOD_KEY[:-60] + chr(ord(GOOD_KEY[-60]) ^ 1) + GOOD_KEY[-59:],
    with_certificate_of(GOOD_KEY, cexec.format_key(OTHER_MASTER)[0]),
    PUB_LINE, impossible_scalar(0), impossible_scalar(cexec.P256_N), "#!/bin/sh\n"],
    ids=["empty", "cut short", "without a certificate", "a flipped bit in the scalar", "one in the certificate",
         "another key's certificate", "a public key", "the scalar 0", "the scalar n", "something else"])
def test_ckeygen_101_the_key_is_there_and_invalid(text, keys):
    assert text != GOOD_KEY
    path, pub = put(keys.path("bad"), text), keys.path("bad.pub")
    refusal(keys.run_here("ckeygen", path, pub), 101, path)
    assert read(path) == text.encode() and not os.path.exists(pub)


def typed(keys, *answers):
    """Runs ckeygen --stdin on a terminal that answers its questions: (exit status, what the terminal showed)."""
    master, slave = pty.openpty()
    process = subprocess.Popen(keys.argv("ckeygen", "--stdin", "typed"), cwd=keys.directory, env=keys.environment(),
                               stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
                               preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(slave)
    shown = b""
    with open(master, "r+b", 0) as terminal:
        with contextlib.suppress(OSError):          # the last one has closed the terminal
            for answer in answers:
                while not shown.endswith(b": "):
                    shown += terminal.read(1)
                terminal.write(answer)
                shown += terminal.read(1)
            while True:
                shown += terminal.read(1)
        return process.wait(PATIENCE), shown.decode()


def test_ckeygen_asks_a_terminal_for_a_passphrase(keys):
    """Without echo; twice for a new key.  The same line in a pipe names the same key."""
    asks = "passphrase (12 characters or more): "
    assert typed(keys, b"my long word\n", b"my long wort\n") == (
        100, asks + "\r\nagain: \r\nckeygen: -stdin: the two passphrases differ: type the same one twice\r\n")
    assert typed(keys, b"\n") == (100, asks + "\r\nckeygen: -stdin: no passphrase was given\r\n")
    assert typed(keys, b"\4") == (100, asks + "ckeygen: -stdin: no passphrase was given\r\n")
    assert sorted(os.listdir(keys.directory)) == ["app", "app.pub"]
    assert typed(keys, b"my long word\n", b"my long word\n") == (0, asks + "\r\nagain: \r\n")
    assert typed(keys, b"my long word\n") == (0, "passphrase: \r\n")
    assert typed(keys, b"my wort\n")[0] == 104
    keys.run("ckeygen", "-stdin", "piped", input=b"my long word\n", check=True)
    assert read(keys.path("typed")) == read(keys.path("piped"))


def test_a_short_passphrase_makes_a_key_with_a_warning(keys):
    """Once, when the key is made.  An empty line makes none: it comes of a variable that is not set."""
    code, shown = typed(keys, b"my word\n", b"my word\n")
    assert code == 0 and "ckeygen: warning: fewer than 12 characters" in shown
    assert typed(keys, b"my word\n") == (0, "passphrase: \r\n")
    done = keys.run("ckeygen", "-stdin", "piped", input=b"my word\n", check=True)
    assert done.stderr.startswith(b"ckeygen: warning: fewer than 12 characters")
    assert read(keys.path("typed")) == read(keys.path("piped"))
    assert keys.run("ckeygen", "-stdin", "piped", input=b"my word\n", check=True).stderr == b""
    assert keys.run("ckeygen", "-stdin", "long", input=b"twelve bytes", check=True).stderr == b""
    for nothing in (b"\n", b"\r\n"):
        refusal(keys.run_here("ckeygen", "-stdin", "empty", input=nothing), 100, "-stdin: no passphrase was given")


def small_files():
    """Before exec: no file may grow beyond 100 bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


def test_ckeygen_102_cannot_write_the_pub(keys):
    before = read(keys.pub)
    for pub in (keys.path("app/x.pub"), keys.path("missing/x.pub"), "/proc/x.pub", keys.directory):
        refusal(keys.run_here("ckeygen", keys.key, pub), 102, pub)
    refusal(keys.run("ckeygen", keys.key, keys.pub, preexec_fn=small_files), 102, keys.pub)
    put(keys.path("precious"), "not a key\n")
    refusal(keys.run_here("ckeygen", keys.key, keys.path("precious")), 102, "precious")
    assert read(keys.path("precious")) == b"not a key\n" and read(keys.pub) == before
    assert sorted(os.listdir(keys.directory)) == ["app", "app.pub", "precious"]


def test_ckeygen_103_cannot_write_the_key(keys):
    for key in (keys.path("app/x"), keys.path("missing/x"), "/proc/x"):
        refusal(keys.run_here("ckeygen", key, keys.path("x.pub")), 103, key)
    refusal(keys.run("ckeygen", keys.path("x"), keys.path("x.pub"), preexec_fn=small_files), 103, keys.path("x"))
    assert sorted(os.listdir(keys.directory)) == ["app", "app.pub"]


def test_ckeygen_104_another_key_than_stdin_names(keys):
    before = read(keys.key)
    refusal(keys.run_here("ckeygen", "-stdin", keys.key, keys.path("x.pub"), input=b"a passphrase"), 104, keys.key)
    assert read(keys.key) == before and not os.path.exists(keys.path("x.pub"))


def test_ckeygen_104_when_another_key_appears_meanwhile(tmp_path, monkeypatch):
    def somebody_was_faster(path, text, replace):
        put(path, GOOD_KEY)
        raise FileExistsError(errno.EEXIST, "File exists")
    monkeypatch.setattr(cexec, "write_new", somebody_was_faster)
    assert cexec.make_key(str(tmp_path / "one"), None) == MASTER
    assert cexec.make_key(str(tmp_path / "two"), MASTER) == MASTER
    fatal(104, cexec.make_key, str(tmp_path / "three"), OTHER_MASTER)


def test_ckeygen_101_what_is_there_can_be_no_key(keys):
    refusal(keys.run_here("ckeygen", keys.directory, keys.path("x.pub")), 101, "directory: not a cexec private key")
    refusal(keys.run_here("ckeygen", PROGRAM, keys.path("x.pub")), 101, "File too large: not a cexec private key")


def test_ckeygen_111_the_key_cannot_be_read(monkeypatch):
    monkeypatch.setattr(cexec, "read_text", refusing(errno.EIO))
    fatal(111, cexec.existing_key, "app")


def test_ckeygen_needs_no_hard_links(keys):
    """As on FAT; and what is there is not overwritten."""
    take_away(keys, "refuse(os, 'link', lambda *names: True, errno.EPERM)")
    keys.run("ckeygen", keys.path("new"), check=True)
    before = read(keys.path("new"))
    keys.run("ckeygen", keys.path("new"), keys.path("again.pub"), check=True)
    assert cexec.existing_key(keys.path("new")) and read(keys.path("new")) == before
    assert stat.S_IMODE(os.stat(keys.path("new")).st_mode) == 0o600
    assert sorted(os.listdir(keys.directory)) == ["again.pub", "app", "app.pub", "new", "new.pub", "shim.py"]
    with pytest.raises(FileExistsError):
        os.symlink(keys.path("nowhere"), keys.path("link"))
        cexec.write_new(keys.path("link"), "text", replace=False)


def test_ckeygen_is_not_stopped_by_what_a_crash_has_left(tmp_path):
    for name in ("app", "app.pub"):
        put(tmp_path / ("%s.%d.part" % (name, os.getpid())), "")
    cexec.main_ckeygen([str(tmp_path / "app")])
    assert cexec.open_pub(str(tmp_path / "app.pub")).application == cexec.open_key(str(tmp_path / "app")).application


def test_ckeygen_never_overwrites_a_key_and_makes_the_same_pub_again(keys):
    key, pub = read(keys.key), read(keys.pub)
    os.unlink(keys.pub)
    keys.run("ckeygen", keys.key, keys.pub, check=True)
    assert (read(keys.key), read(keys.pub)) == (key, pub)


def test_ckeygen_five_at_once_agree_on_one_key(keys):
    started = [keys.start("ckeygen", keys.path("new"), keys.path("%d.pub" % i)) for i in range(5)]
    assert [process.wait(60) for process in started] == [0] * 5
    assert len({read(keys.path("%d.pub" % i)) for i in range(5)}) == 1
    keys.run("ckeygen", keys.path("new"), keys.path("again.pub"), check=True)
    assert read(keys.path("again.pub")) == read(keys.path("0.pub"))
    assert not [name for name in os.listdir(keys.directory) if name.endswith(".part")]


def test_ckeygen_writes_modes_0600_whatever_the_umask(keys):
    keys.run("ckeygen", keys.path("new"), check=True, preexec_fn=lambda: os.umask(0))
    put(keys.path("new-bob.pub"), PUB_LINE, 0o644)
    keys.run("ckeygen", "-n", "bob", keys.path("new"), check=True, preexec_fn=lambda: os.umask(0))
    for name in ("new", "new.pub", "new-bob.pub"):
        assert stat.S_IMODE(os.stat(keys.path(name)).st_mode) == 0o600, name


def test_ckeygen_replaces_a_pub_in_one_step(keys):
    """Whoever has the old pub open keeps all of it: it is another file that takes its name."""
    put(keys.pub, PUB_LINE)
    with open(keys.pub, "rb") as old:
        keys.run("ckeygen", keys.key, keys.pub, check=True)
        assert old.read() == PUB_LINE.encode() != read(keys.pub)
        assert os.fstat(old.fileno()).st_nlink == 0


def test_ckeygen_n_makes_a_pub_for_one_name(keys):
    keys.run("ckeygen", "-n", "bob", keys.key, keys.path("b"), check=True)
    keys.run("ckeygen", "-n", "bob", keys.key, check=True)
    anyone, bob = cexec.open_pub(keys.pub), cexec.open_pub(keys.path("b"))
    assert (anyone.name, bob.name) == ("anyone", "bob") and anyone.secret != bob.secret
    assert (anyone.application, anyone.fingerprint) == (bob.application, bob.fingerprint)
    assert bob.secret == cexec.client_secret(cexec.open_key(keys.key).master, "bob")
    assert read(keys.path("b")) == read(keys.path("app-bob.pub"))


# What is longer than a block of SHA-256 is hashed as HMAC itself would: PBKDF2's own answer in all cases.
@pytest.mark.parametrize("size", [1, 64, 65, 300000])
def test_ckeygen_stdin_is_pbkdf2_of_all_of_it(size, keys):
    words = random.Random(size).getrandbits(8 * size).to_bytes(size, "big")
    wide = hashlib.pbkdf2_hmac("sha256", words, b"cexec private key 1", 600000, 48)
    master = (int.from_bytes(wide, "big") % (cexec.P256_N - 1) + 1).to_bytes(32, "big")
    keys.run("ckeygen", "-stdin", keys.path("named"), input=words, check=True)
    assert read(keys.path("named")) == cexec.format_key(master)[0].encode()


def test_ckeygen_stdin_the_same_words_name_the_same_key(keys):
    for name, words in (("a", b"correct horse\n"), ("b", b"correct horse\n"), ("c", b"correct horse")):
        keys.run("ckeygen", "-stdin", keys.path(name), input=words, check=True)
    assert read(keys.path("a")) == read(keys.path("b")) != read(keys.path("c"))
    assert read(keys.path("a.pub")) == read(keys.path("b.pub"))
    keys.run("ckeygen", "-stdin", keys.path("a"), input=b"correct horse\n", check=True)


def test_keys_are_made_without_ssl(keys):
    take_away(keys, "sys.modules['ssl'] = None")
    keys.run("ckeygen", keys.path("new"), keys.path("new.pub"), check=True)
    take_away(keys, "del hashlib.pbkdf2_hmac")
    refusal(keys.run("ckeygen", "-stdin", keys.path("other"), input=b"a long password"), 111, "another python3")


# ---- cservice -s: workers on other hosts, over ssh -------------------------


class Boxes:
    """Hosts in namespaces, each with an sshd and logins of its own, and one, `here`, with cservice -s.

    All share one file system, but have a /run and an /etc/passwd each; names of ssh are LOGIN@HOST.
    """

    def __init__(self, cluster, names, python=PYTHON):
        self.cluster, self.names, self.processes, self.daemons = cluster, names, [], {}
        self.key, self.pub = cluster.path("new"), cluster.path("new.pub")
        self.spaces = cluster.lan("lan", ["here", *names], "10.0.9")
        self.server = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")
        if not self.server:
            skip("sshd is not installed")
        for key in ("hostkey", "user", "stranger"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", cluster.path(key)], check=True)
        os.mkdir(cluster.path("bin"))
        os.symlink(python, cluster.path("bin/python3"))
        for name, script in (("banner", "printf '%s'\nexec sh \"$@\"\n" % BANNER.replace("%s", "banner")),
                             ("bare", "PATH=/nowhere; export PATH; exec /bin/sh \"$@\"\n"),
                             ("nologin", "echo This account is not available.; exit 1\n")):
            put(cluster.path(name), "#!/bin/sh\n" + script, 0o755)
        lines = ["Host *\nUser sh\nIdentityFile %s\nIdentitiesOnly yes\nIdentityAgent none\nUserKnownHostsFile %s\n"
                 "GlobalKnownHostsFile /dev/null\nUpdateHostKeys no\n" % (cluster.path("user"), cluster.path("known"))]
        known = ""
        for number, name in enumerate(names, 2):
            lines.append("Host %s\nHostName 10.0.9.%d\n" % (name, number))
            known += "10.0.9.%d %s" % (number, read(cluster.path("hostkey.pub")).decode())
            os.mkdir(cluster.path("home-" + name))
        put(cluster.path("config"), "".join(lines))
        put(cluster.path("known"), known)
        self.ssh = "ssh -F " + cluster.path("config")

    def open(self, name, read_only=False, forwarding="no"):
        """Starts a host's sshd."""
        home, path = self.cluster.path("home-" + name), self.cluster.path
        shells = {"sh": "/bin/sh", "bash": "/bin/bash", "csh": "/bin/csh", "fish": "/usr/bin/fish"}
        shells.update({login: path(login) for login in ("banner", "bare", "nologin")})
        password = subprocess.run(["openssl", "passwd", "-6", SECRET], check=True, stdout=subprocess.PIPE).stdout
        rows = ["%s:%s:0:0::%s:%s" % (login, password.decode().strip(), home, shell) for login, shell in shells.items()]
        put(path("passwd-" + name), read("/etc/passwd").decode() + "\n".join(rows) + "\n", 0o644)
        put(path("sshd-" + name), "HostKey %s\nAuthorizedKeysFile %s\nPidFile none\nStrictModes no\nUsePAM no\n"
            "PermitRootLogin yes\nPasswordAuthentication yes\nMaxStartups 100\n"
            "AllowTcpForwarding %s\nSetEnv %s PYTHONDONTWRITEBYTECODE=1 "
            "PATH=%s:/usr/bin:/bin\n" % (path("hostkey"), path("user.pub"), forwarding,
                                                        self.cluster.marker, path("bin")))
        setup = ("mount --bind %s /etc/passwd && mount -t tmpfs tmpfs /run && mkdir /run/sshd || exit 9\n"
                 % path("passwd-" + name))
        if read_only:
            setup += "cut -d' ' -f2 /proc/mounts | sort -u | while read m; do mount -o remount,bind,ro $m; done\n"
            setup += "! touch %s /tmp/.cexec-test /dev/shm/.cexec-test 2>/dev/null || exit 9\n" % path("writable")
        setup += "exec %s -D -e -f %s" % (self.server, path("sshd-" + name))
        log = path("sshd-%s.log" % name)
        with open(log, "ab") as file:
            daemon = self.cluster.popen(["ip", "netns", "exec", self.spaces[name], "sh", "-c", setup], stdout=file,
                                        stderr=file, stdin=subprocess.DEVNULL)
        self.daemons[name] = daemon
        until(lambda: b"Server listening" in read(log) or daemon.poll() is not None, "sshd's start")
        assert daemon.poll() is None, read(log)

    def open_all(self, **options):
        for name in self.names:
            self.open(name, **options)

    def start(self, hosts, *command, words=(), key=None, up=0, **env):
        """Starts cservice -s, and waits for so many workers; .said() is its standard error, .shown() its output."""
        log = self.cluster.path("start-%s" % uuid.uuid4().hex[:6])
        with open(log + ".out", "wb") as out, open(log, "wb") as err:
            process = self.cluster.start("cservice", "-s", hosts, *words, key or self.key, *command,
                                         stdout=out, stderr=err, space=self.spaces["here"], start_new_session=True,
                                         env=dict({"CEXEC_SSH": self.ssh}, **env))
        process.said = lambda: read(log).decode()
        process.shown = lambda: read(log + ".out").decode()
        if up:
            self.up(process, up)
        return process

    def on_terminal(self, hosts):
        """cservice -s on a terminal, which may log in with passwords alone."""
        argv = self.cluster.argv("cservice", "-s", hosts, self.key, *JOB, space=self.spaces["here"])
        return Terminal(self.cluster, argv, {"CEXEC_SSH": self.ssh + " -o PubkeyAuthentication=no"})

    def up(self, process, count):
        """Waits for the table of so many workers; its rows."""
        until(lambda: process.shown().count("\n") >= count or process.poll() is not None, "the table")
        assert process.poll() is None, process.said()
        return process.shown().splitlines()

    def said(self, process):
        """What it has said, but of the keys that it has made, and of the hosts that serve."""
        lines = process.said().splitlines(True)
        return "".join(line for line in lines if not re.match("cservice: (made the keys|. of . hosts serve) ", line))

    def client(self, *words, pub=None, **options):
        return self.cluster.run("cexec", pub or self.pub, *words, space=self.spaces["here"], **options)

    def there(self, name):
        """The processes on a host but its sshd."""
        pids = subprocess.run(["ip", "netns", "pids", self.spaces[name]], stdout=subprocess.PIPE, check=True).stdout
        return [int(pid) for pid in pids.split() if int(pid) != self.daemons[name].pid]

    def workers(self, name):
        return [pid for pid in self.there(name) if b"cservice" in words_of(pid)]

    def empty(self):
        """Waits until nothing of ours is on any host."""
        until(lambda: not any(self.there(name) for name in self.daemons), "empty hosts")

    def close(self):
        for name in self.daemons:
            self.cut(name)              # an sshd that does not know that its client's host is gone

    def cut(self, name):
        """Kills the sessions of a host's sshd."""
        for pid in self.there(name):
            if b"sshd: " in b" ".join(words_of(pid)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def words_of(pid):
    with contextlib.suppress(OSError):
        return read("/proc/%d/cmdline" % pid).split(b"\0")
    return []


@pytest.fixture
def boxes(hosts):
    """boxes(names) makes hosts, open unless told otherwise."""
    need("ssh", "ssh-keygen", "openssl", "mount")
    made = []

    def make(*names, opened=True, **options):
        made.append(Boxes(hosts, names, **options))
        if opened:
            made[0].open_all()
        return made[0]
    yield make
    for farm in made:
        farm.close()


@pytest.mark.parametrize("age", AGES)
def test_a_cluster_in_one_command(boxes, age):
    """With old and new Pythons, on hosts on which not one file can be written."""
    farm = boxes("a", "b", "c", python=oldest_and_newest()[age], opened=False)
    farm.open_all(read_only=True)
    put(farm.cluster.path("list"), "# ours\n\nb\n  bash@c # the third\n")
    process = farm.start("5/a,@" + farm.cluster.path("list"), "sh", "-c", "cat; echo $SSH_CONNECTION",
                         CONCURRENCY="3")
    assert sorted((row.split("\t")[1], row.split("\t")[4]) for row in farm.up(process, 3)) == [
        ("10.0.9.2", "5"), ("10.0.9.3", "3"), ("10.0.9.4", "3")]
    assert stat.S_IMODE(os.stat(farm.key).st_mode) == 0o600
    answers = {farm.client(input=b"x").stdout for _ in range(6)}
    assert {answer.split()[2] for answer in answers} <= {b"10.0.9.2", b"10.0.9.3", b"10.0.9.4"}
    assert all(rss(pid) < 30 << 20 for name in "abc" for pid in farm.workers(name))
    assert signalled(process, signal.SIGINT) == 0
    assert process.said().splitlines() == [
        "cservice: made the keys app for the workers and app.pub for the clients".replace("app", farm.key),
        "cservice: 3 of 3 hosts serve %s until Ctrl-C" % os.path.basename(farm.key + ".pub"),
        "cservice: drains; a second signal ends the jobs that run"]
    farm.empty()


@pytest.mark.parametrize("login", ["sh", "bash", "csh", "fish", "banner"])
def test_words_go_through_every_shell_byte_for_byte(boxes, login):
    need(*{"csh", "fish", "bash"} & {login})
    farm = boxes("a")
    words = [b"", b" ", b"a'b", b'"', b"!x", b"$HOME", b"`id`", b"a\nb", b"\\", b"\xff\xe9", b"{}", b"*", b"--", b"-s",
             b"a;b", b"%d", b"x=y", b"#", b"~", b"&"]
    process = farm.start(login + "@a", "printf", "%s\\0", *words, up=1)
    done = farm.client()
    assert (done.returncode, done.stdout.split(b"\0")[:-1]) == (0, words)
    says = "".join("banner@a: %s\n" % line for line in BANNER.replace("%s", "banner").split("\n"))
    assert farm.said(process) == (says if login == "banner" else "")


def test_options_and_settings_hold_there(boxes):
    farm = boxes("a")
    for name in ("alice", "bob"):
        farm.cluster.run("ckeygen", "-n", name, farm.key, farm.cluster.path(name + ".pub"), check=True)
    process = farm.start("a", "sh", "-c", "id -un; echo $CONCURRENCY $BOOST $CEXEC_GROUP",
                         words=["-iv", "-u", "nobody", "-x", "bob"], CONCURRENCY="7", BOOST="5",
                         GROUP="lan:10.0.9.255:4000")
    assert farm.up(process, 1)[0].split("\t")[3:5] == ["0", "7"]
    env = {"GROUP": "10.0.9.2:4000"}
    assert farm.client(pub=farm.cluster.path("alice.pub"), env=env).stdout == b"nobody\n7 5 10.0.9.255:4000\n"
    assert farm.client(pub=farm.cluster.path("bob.pub"), env=dict(env, CEXEC_TIMEOUT_ACCEPT="1")).returncode == 111
    until(lambda: "a: cservice: dropped" in process.said(), "the refusal")
    worker, = farm.workers("a")
    assert b"-iv" in words_of(worker) or b"-Sc" in words_of(worker)         # Python 3.6 and 3.7 have no memfd
    assert read(farm.key).split()[5] not in read("/proc/%d/cmdline" % worker) + read("/proc/%d/environ" % worker)


def test_arguments_and_files_on_other_hosts(boxes):
    """-a and -d go there; the directory of a job is removed also where the starter is killed meanwhile."""
    farm = boxes("a")
    desk = farm.cluster.path("desk")
    os.mkdir(desk)
    put(os.path.join(desk, "in"), "1")
    process = farm.start("a", words=["-ad", "-u", "nobody"], up=1)
    words = [b"", b"a'b", b"\xff\n", b"{}", b"--", b"x=y", b"-g"]

    def argv(*command):
        return farm.cluster.argv("cexec", "-n", "-i", "in", "-g", "out", farm.pub, *command)
    options = {"env": farm.cluster.environment(), "cwd": desk, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    space = ["ip", "netns", "exec", farm.spaces["here"]]
    done = subprocess.run(space + argv("sh", "-c", 'id -un; cp in out; pwd; printf "%s\\0" "$@"', "sh", *words),
                          timeout=PATIENCE, **options)
    user, directory, said = done.stdout.split(b"\n", 2)
    assert (done.returncode, done.stderr, user) == (0, b"", b"nobody") and said.split(b"\0")[:-1] == words
    assert read(os.path.join(desk, "out")) == b"1" and not os.path.exists(directory)
    client = farm.cluster.start("cexec", "-n", "-g", "out", farm.pub, "sh", "-c", "pwd; exec sleep 1000", cwd=desk,
                                space=farm.spaces["here"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    directory = client.stdout.readline()[:-1]
    assert os.path.isdir(directory)
    process.kill()                  # its worker drains
    client.kill()
    client.wait()
    until(lambda: not os.path.exists(directory), "its removal", 20)
    process.wait()
    farm.empty()


def test_two_applications_on_the_same_hosts(boxes):
    farm = boxes("a", "b")
    other = farm.cluster.path("other")
    one, two = farm.start("a,b", "echo", "one"), farm.start("a,b", "echo", "two", key=other)
    farm.up(one, 2)
    farm.up(two, 2)
    assert farm.client().stdout == b"one\n"
    assert signalled(one) == 0
    assert farm.client(pub=other).stdout == b"two\n"
    assert signalled(two) == 0
    farm.empty()


def test_a_host_that_is_not_heard(boxes):
    farm = boxes("a", "b")
    block(farm.spaces["b"], "-p", "udp")
    process = farm.start("a,b", "true", GROUP="10.0.9.2,10.0.9.3")      # without this host, so not through ssh either
    assert [row.split("\t")[1] for row in farm.up(process, 1)] == ["10.0.9.2"]
    until(lambda: "\n" in process.said(), "the line about b")
    assert farm.said(process) == (
        "cservice: b: serves, but is not heard on 10.0.9.2,10.0.9.3: let UDP port 3010 in through its firewall, or add "
        "127.0.0.1 to GROUP (cexec(1), The group): then it is reached through ssh\n")


def test_hosts_that_fail_stop_nothing(boxes):
    farm = boxes("a", "b", "c", "d", opened=False)
    farm.open("a")
    farm.open("b")
    with open(farm.cluster.path("config"), "a") as file:
        file.write("Host unknown\nHostName 10.0.9.2\nHostKeyAlias unknown\n")
    process = farm.start("a,bare@a,nologin@a,c,nosuch@a,unknown", "cat", up=1)
    lines = {"bare@a: cservice": "exit status 127 instead of a worker: is python3 in the PATH of `ssh bare@a`?",
             "nologin@a: This": "This account is not available.",
             "nologin@a: cservice": "exit status 1 instead of a worker",
             "nosuch": "nosuch@a: nosuch@10.0.9.2: Permission denied",
             "unknown": "unknown: Host key verification failed.",
             "c": "c: ssh: connect to host 10.0.9.4 port 22: Connection refused"}
    for line in lines.values():
        assert line in process.said()
    for host, hint in (("c", ""), ("nosuch@a", " (ssh nosuch@a true must work without a question)")):
        assert "cservice: %s: ssh failed; tries again in 1 s, then less often%s\n" % (host, hint) in process.said()
    farm.open("c")
    until(lambda: "cservice: c: serves now\n" in process.said(), "c")
    farm.cut("c")                           # and once more, when it is up
    until(lambda: process.said().count("cservice: c: serves now\n") == 2, "c again")
    said = process.said()
    assert said.count("instead of a worker") == 2 and said.count("bare@a: ") == 2
    assert said.count("nosuch@10.0.9.2: Permission denied") == 1        # of several tries
    assert signalled(process, signal.SIGINT) == 0
    farm.empty()


def test_no_host_starts(boxes):
    farm = boxes("a", "b")
    process = farm.start("a,b", "cat", words=["-u", "no-such-user"])
    assert process.wait(PATIENCE) == 100
    for name in "ab":
        assert "%s: cservice: -u no-such-user: no such user\n" % name in process.said()
        assert "cservice: %s: the worker ended with exit status 100, and is not started" % name in process.said()
    farm.empty()


def test_a_signal_before_any_worker_is_up(boxes):
    farm = boxes("a", "b", opened=False)
    process = farm.start("a,b", "cat")
    until(lambda: "b: ssh failed" in process.said() and "a: ssh failed" in process.said(), "failures")
    assert signalled(process, signal.SIGINT) == 111


def started_job(farm):
    """A job that says ready, and ends when its file is there; (the job, that file)."""
    go = farm.cluster.path(new_mark())
    job = farm.cluster.start("cexec", farm.pub, "GO=" + go, space=farm.spaces["here"], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
    assert job.stdout.readline() == b"ready\n", job.stderr.read()
    return job, go


def test_the_first_signal_drains_and_the_second_ends_the_jobs(boxes):
    farm = boxes("a", "b")
    process = farm.start("a,b", *JOB, CONCURRENCY="1", up=2)
    (one, go), (two, _) = started_job(farm), started_job(farm)
    os.killpg(process.pid, signal.SIGINT)       # as a terminal does it
    until(lambda: "cservice: drains" in process.said(), "the drain")
    touch(go)
    assert outcome(one)[0] == b"done\n"
    until(lambda: sum(bool(farm.workers(name)) for name in "ab") == 1, "the end of the idle worker")
    assert process.poll() is None and two.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    out, err = outcome(two, status=111)
    assert b"lost" in err
    assert process.wait(PATIENCE) == 0
    farm.empty()


def test_nothing_is_left_when_the_starter_is_killed(boxes):
    """Its workers drain: a job that runs comes to its end."""
    farm = boxes("a", "b")
    process = farm.start("a,b", *JOB, CONCURRENCY="1", up=2)
    job, go = started_job(farm)
    signalled(process, signal.SIGKILL)
    until(lambda: sum(bool(farm.workers(name)) for name in "ab") == 1, "the end of the idle worker")
    touch(go)
    assert outcome(job)[0] == b"done\n"
    farm.empty()
    until(lambda: not processes_with(farm.cluster.marker) or
          not [pid for pid in processes_with(farm.cluster.marker) if words_of(pid)[0] == b"ssh"], "the end of ssh")


def test_the_network_to_a_host_is_lost(cluster, boxes):
    """sshd there does not notice; the worker does, and drains.  When it is back there is a new one."""
    altered(cluster, **SILENCE)
    farm = boxes("a", "b")
    process = farm.start("a,b", "cat", CEXEC_SSH=farm.ssh + " -o ServerAliveInterval=1 -o ServerAliveCountMax=2")
    farm.up(process, 2)
    old, = farm.workers("b")
    ip("-n", farm.spaces["b"], "link", "set", "lan", "down")
    until(lambda: not farm.workers("b"), "the end of the worker")
    until(lambda: "cservice: b: ssh failed; tries again in 1 s" in process.said(), "the loss")
    ip("-n", farm.spaces["b"], "link", "set", "lan", "up")
    until(lambda: "cservice: b: serves now" in process.said(), "the return")
    assert old not in farm.workers("b") and process.poll() is None


def test_a_stopped_starter_finds_its_hosts_drained(cluster, boxes):
    altered(cluster, **SILENCE)
    farm = boxes("a")
    process = farm.start("a", "cat", up=1)
    process.send_signal(signal.SIGSTOP)
    until(lambda: not farm.workers("a"), "the end of the worker")
    process.send_signal(signal.SIGCONT)
    until(lambda: "cservice: a: serves now" in process.said(), "another")
    assert "cservice: a: the worker ended; tries again in 1 s, then less often\n" in process.said()


def test_one_host_may_ask_for_a_password(boxes):
    """On the terminal, where Ctrl-C reaches ssh too, and must not end it."""
    farm = boxes("a")
    terminal = farm.on_terminal("a")
    terminal.shows("password:")
    terminal.type(SECRET + "\n", "ROUND TRIP")
    terminal.shows("10.0.9.2")
    job, go = started_job(farm)
    terminal.type("\x03", "cservice: drains")
    touch(go)
    assert outcome(job)[0] == b"done\n"
    assert terminal.process.wait(PATIENCE) == 0
    terminal.close()
    farm.empty()


def test_several_hosts_are_never_asked_for_passwords(boxes):
    farm = boxes("a", "b")
    terminal = farm.on_terminal("a,b")
    for _ in range(2):
        terminal.shows("Permission denied")
    assert b"password:" not in terminal.text
    terminal.type("\x03")
    assert terminal.process.wait(PATIENCE) == 111
    terminal.close()


@pytest.fixture
def local(cluster):
    """local(script) writes a CEXEC_SSH that runs, for the host $1 and the command $2, this script."""
    os.mkdir(cluster.path("bin"))
    os.symlink(cluster.launch[0], cluster.path("bin/python3"))
    cluster.env.update(PATH=cluster.path("bin") + ":" + cluster.env["PATH"], BOOST="0")
    cluster.log = cluster.path("said")

    def start(script, hosts, *words):
        put(cluster.path("login"), "#!/bin/sh\ncd %s\n%s\n" % (shlex.quote(cluster.directory), script), 0o700)
        with open(cluster.log, "wb") as file:
            return cluster.start("cservice", "-s", hosts, *words, stdout=file, stderr=file,
                                 env={"CEXEC_SSH": shlex.quote(cluster.path("login"))})
    cluster.serve = start
    cluster.said = lambda: read(cluster.log).decode()
    return cluster


def test_eight_logins_at_a_time(local):
    names = ["h%d" % number for number in range(11)]
    local.serve('echo >> begun; until [ -e go ]; do sleep 0.05; done; echo >&2 up; exec sh -c "$2"', ",".join(names),
                local.key, "cat")
    until(lambda: os.path.exists(local.path("begun")) and read(local.path("begun")).count(b"\n") == 8, "eight logins")
    assert not local.said() and local.client(env={"CEXEC_TIMEOUT_ACCEPT": "1"}).returncode == 111
    assert read(local.path("begun")).count(b"\n") == 8
    touch(local.path("go"))
    until(lambda: len(set(re.findall(r"(?m)^(h\d+): up$", local.said()))) == 11, "all of them")
    assert local.client(input=b"x").stdout == b"x"


def test_a_login_that_hangs_makes_room(local):
    altered(local, LOGIN_SECONDS=4.0)
    names = ["hangs%d" % number for number in range(8)] + ["good"]
    local.serve('case $1 in hangs*) exec sleep 100;; esac; exec sh -c "$2"', ",".join(names), local.key, "cat")
    until(lambda: local.client(input=b"x", env={"CEXEC_TIMEOUT_ACCEPT": "1"}).stdout == b"x", "the ninth")
    for name in names[:8]:
        for line in ("no worker after 4 s (does a file such as ~/.bashrc there read standard input?)",
                     "ssh was killed; tries again in 1 s, then less often"):
            assert "cservice: %s: %s\n" % (name, line) in local.said()


def test_the_third_signal_leaves_at_once(local):
    """Also if what is run for ssh does not end when it is told to."""
    process = local.serve("trap 'echo term >> $1' TERM; echo > $1; while :; do sleep 1; done", "one,two", local.key,
                          "cat")

    def lines(count):
        return all(os.path.exists(local.path(name)) and read(local.path(name)).count(b"\n") == count
                   for name in ("one", "two"))
    until(lambda: lines(1), "two logins")
    process.send_signal(signal.SIGINT)
    until(lambda: lines(2), "the first signal's effect")
    process.send_signal(signal.SIGINT)
    until(lambda: "cservice: ends the jobs\n" in local.said(), "the second's")
    assert process.poll() is None
    assert signalled(process, signal.SIGINT) == 111


def test_a_worker_stays_for_longer_than_the_silence_that_ends_it(local):
    altered(local, **SILENCE)
    local.serve('exec sh -c "$2"', "box", local.key, "cat")

    def uptimes():
        return [json.loads(line)["uptime"] for line in local.run("cexec", "-lj", local.pub).stdout.splitlines()]
    until(lambda: any(uptime > 7 for uptime in uptimes()), "some age")
    assert "again" not in local.said()


BASHRC = "does a file such as ~/.bashrc there read standard input? It is not tried again"


@pytest.mark.parametrize("status, says", [
    (255, "ssh failed; tries again in 1 s, then less often"),
    (111, "the worker ended; tries again in 1 s, then less often"),
    (100, "the worker ended with exit status 100, and is not started again"),
    (0, "exit status 0 instead of a worker: is python3 in the PATH of `ssh box`? " + BASHRC),
    (127, "exit status 127 instead of a worker: is python3 in the PATH of `ssh box`? " + BASHRC)])
def test_what_follows_from_the_exit_status(local, status, says):
    process = local.serve("exit %d" % status, "box", local.key, "cat")
    until(lambda: "cservice: box: %s\n" % says in local.said(), "the line")
    if "again in" in says:
        process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == (100 if status == 100 else 111)


def test_what_hosts_say_cannot_move_a_cursor(local):
    """Long lines, half of a line at the end, control characters and bytes that are no text."""
    process = local.serve(r"printf 'a\033[2Jb\r\n\377\n'; head -c 20000 /dev/zero | tr '\0' x; exit 127",
                          "box", local.key, "cat")
    assert process.wait(PATIENCE) == 111
    lines = local.said().split("\n")
    assert lines[:2] == ["box: a\\x1b[2Jb", "box: \\xff"]
    assert "".join(line[5:] for line in lines[2:] if line.startswith("box: x")) == "x" * 20000


def test_a_host_that_says_much_takes_no_memory(local):
    """Only its last lines are remembered, though each is another."""
    put(local.path("talk"), "for n in range(300000): print('%0100d' % n)\nprint('over', flush=True)")
    process = local.serve("echo begun; until [ -e go ]; do sleep 0.05; done; python3 talk; exec sleep 1000",
                          "box", local.key, "cat")
    until(lambda: local.said() == "box: begun\n", "a login")
    before = rss(process.pid)
    touch(local.path("go"))
    until(lambda: read(local.log)[-10:] == b"box: over\n", "its last line", 2 * PATIENCE)
    assert rss(process.pid) < before + 5000000
    assert read(local.log).count(b"\n") == 300002


def test_what_an_ssh_leaves_behind_does_not_hold_up_its_end(local):
    """A process that has its output, and writes faster than that is read."""
    process = local.serve("yes & sleep 0.5; exit 127", "box", local.key, "cat")
    assert process.wait(PATIENCE) == 111
    assert local.said().splitlines()[-1].startswith("cservice: box: exit status 127 instead of a worker: ")


def test_a_worker_there_that_is_told_to_end_is_not_started_again(local):
    process = local.serve('exec sh -c "$2"', "one,two", local.key, "cat")
    until(lambda: len(re.findall(r"(?m)^\S+\t.*\n", local.said())) == 2, "two workers")
    for pid in local.alive():
        if b"cservice" in words_of(pid) and pid != process.pid:
            os.kill(pid, signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    assert local.said().count("the worker ended with exit status 0, and is not started again") == 2


def test_an_old_python_says_so(local):
    put(local.path("old"), "import sys; sys.version_info = (3, 5, 2)\n" + read(PROGRAM).decode())
    process = local.serve('exec %s -c "import sys; sys.version_info = (3, 5, 2); '
                          'f = open(0, \'rb\', 0, closefd=0); exec(f.readline())"' % PYTHON, "box", local.key, "cat")
    assert process.wait(PATIENCE) == 100
    assert local.said().startswith("box: Python 3.5 is too old: cexec needs 3.6 or newer\n")


@pytest.mark.parametrize("words, found", [
    (["a,b", "me@c"], ["a", "b", "me@c"]), (["a,a", "a"], ["a"]), (["@list"], ["one", "u@two"]),
    (["x,@list,one"], ["x", "one", "u@two"]), (["[fe80::1%eth0]"], ["[fe80::1%eth0]"]),
    (["@utf8"], ["b\xfccher"]), (["b\xfccher"], ["b\xfccher"]), (["b\udcc3\udcbccher"], ["b\xfccher"]),
    (["4/a,b", "2/a,1/c", "@slots"], [("a", 4), "b", ("c", 1), ("me@d", 3)])])
def test_hosts_of_s(tmp_path, monkeypatch, words, found):
    """Texts of the command line are those of the locale: a byte that is none of its characters is a lone surrogate."""
    monkeypatch.chdir(tmp_path)
    put("list", "# all\none # first\n\n   u@two\n")
    put("utf8", "\xef\xbb\xbf# all\r\nb\xc3\xbccher\r\n")
    put("slots", "3/me@d\n")
    assert cexec.parse_hosts(words) == dict(host if isinstance(host, tuple) else (host, None) for host in found)


@pytest.mark.parametrize("text, there", [
    (None, "255.255.255.255"), ("10.0.0.0/30", "10.0.0.0/30"),
    ("239.1.2.3:4000", "239.1.2.3:4000"), ("lo:255.255.255.255", "255.255.255.255:3010"),
    ("@list", "10.0.0.1:3010,[fd00::1]:4000"), ("[fe80::1%lo]", "[fe80::1]:3010")])
def test_the_group_there(tmp_path, monkeypatch, text, there):
    """As it is here, without what is of this machine alone: files and devices."""
    monkeypatch.chdir(tmp_path)
    put("list", "10.0.0.1 # one\n[fd00::1]:4000\n")
    monkeypatch.delenv("GROUP", raising=False)
    if text:
        monkeypatch.setenv("CEXEC_GROUP", text)
    line = cexec.first_input(["app", "cat"], "key", cexec.Group()).partition(b"\n")[0].decode()
    namespace = {}
    assert line.startswith("exec(") and exec(ast.literal_eval(line[5:-1]).partition("\n")[0], namespace) is None
    assert namespace["variables"][b"CEXEC_GROUP"].decode() == there
    assert namespace["words"] == [b"-s", b"-", b"app", b"cat"]


@pytest.mark.parametrize("words, says", [
    (["a,"], "-s a,: a host is missing before or after a comma"), ([""], "a host is missing"),
    (["-oProxyCommand=id"], "-s -oProxyCommand=id: not a host"),
    (["a:22"], "-s a:22: a port is set by CEXEC_SSH='ssh -p PORT'"),
    (["a b"], "-s a b: not a host"), (["a\nb"], "not a host"), (["0/a"], "-s 0/a: N/HOST has 1 to 10000 slots"),
    (["99999/a"], "-s 99999/a: N/HOST has 1 to"), (["4/"], "-s : not a host"), (["2/-v"], "-s -v: not a host"),
    (["@none"], "-s @none: No such file"),
    (["@empty"], "-s @empty: no host in it"), (["@options"], "-s -v: not a host"), (["\udcff"], "not a host"),
    (["@latin"], "-s @latin: is not UTF-8"), (["@commas"], "-s @commas: a,b: write one host on each line"),
    (["@blanks"], "-s @blanks: a b: write one host on each line")])
def test_what_is_no_host(tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    put("empty", "# none\n")
    put("options", "-v\n")
    put("latin", "b\xfccher\n")
    put("commas", "a,b\n")
    put("blanks", "a b\n")
    assert says in fatal(100, cexec.parse_hosts, words)


def test_the_command_that_logs_in(monkeypatch):
    monkeypatch.delenv("CEXEC_SSH", raising=False)
    need("ssh")
    ours = ["-T", "-o", "ServerAliveInterval=15", "-o", "ConnectTimeout=15"]
    assert cexec.ssh_words(False) == ["ssh", *ours]
    assert cexec.ssh_words(True) == ["ssh", *ours, "-o", "BatchMode=yes"]
    monkeypatch.setenv("CEXEC_SSH", "ssh -i 'my key'")
    assert cexec.ssh_words(False) == ["ssh", "-i", "my key", *ours]
    monkeypatch.setenv("CEXEC_SSH", "env A=1 ssh")
    assert cexec.ssh_words(True) == ["env", "A=1", "ssh"]
    for text in ("no-such-command", "'", "' '", "   "):
        monkeypatch.setenv("CEXEC_SSH", text)
        fatal(100, cexec.ssh_words, True)


def test_a_worker_whose_words_nobody_reads_still_drains(local, monkeypatch):
    """As when its starter is stopped: what it has to say is lost."""
    monkeypatch.setenv("CEXEC_GROUP", local.env["GROUP"])
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"full")
    os.set_blocking(writer, True)
    worker = local.popen(["sh", "-c", cexec.REMOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    worker.stdin.write(cexec.one_line(cexec.ASK)
                       + cexec.first_input(["-v", local.key, "cat"], read(local.key).decode(), cexec.Group()))
    worker.stdin.close()
    assert worker.wait(PATIENCE) == 111
    assert re.match(rb"\n%s.*\n\n%s" % (cexec.RUNS, cexec.SERVES), worker.stdout.read())
    os.close(reader)


@pytest.mark.parametrize("gone", [["app", "app.pub"], ["app.pub"], []])
def test_keys_are_made_for_s_if_there_are_none(keys, gone):
    before = read(keys.key)
    for name in gone:
        os.unlink(keys.path(name))
    text, pub = cexec.key_to_send(keys.key)
    assert text.encode() == read(keys.key) and cexec.open_pub(keys.pub) == pub
    assert (text.encode() == before) == ("app" not in gone)
    assert pub.fingerprint == cexec.format_key(cexec.parse_key(text, "").master)[1]


def test_what_stops_s_before_any_login(local):
    """Wrong words and keys are said once, here."""
    def fails(*words, env=None, code=100):
        done = local.run_here("cservice", "-s", "box", *words, env=dict({"CEXEC_SSH": "false"}, **(env or {})))
        return refusal(done, code, "")
    assert "client name" in fails("-x", "a b", local.key, "cat")
    assert "CONCURRENCY" in fails(local.key, "cat", env={"CONCURRENCY": "x"})
    assert "group" in fails(local.key, "cat", env={"GROUP": "nonsense:x:y"})
    local.run("ckeygen", local.path("other"), local.path("other.pub"), check=True)
    os.rename(local.path("other.pub"), local.pub)
    assert "app.pub: does not belong to the key" in fails(local.key, "cat")
    os.unlink(local.path("other"))
    os.rename(local.pub, local.path("other.pub"))
    assert "exists, but the private key" in fails(local.path("other"), "cat")
    assert not os.path.exists(local.path("other"))
    assert "cannot write" in fails(local.path("none/key"), "cat", code=111)
    put(local.path("no-key"), "text")
    assert "not a cexec private key" in fails(local.path("no-key"), "cat")
    refusal(local.run_here("cservice", "-s", "-", local.key, "cat"), 100,
            "-s - is only for workers of cservice -s itself")
    local.launch = [PYTHON, "-"]
    refusal(local.run("cservice", "-s", "box", local.key, "cat", input=read(PROGRAM)), 100, "from standard input")


# ---- cservice -s: clients through ssh --------------------------------------

WAY = 'cat; echo $SERVER_ADDR $REMOTE_ADDR $([ $SERVER_PORT = 22 ] && echo ssh || echo direct) >&2; exit 5'


def let_in_ssh_only(space):
    """A host to which connections to sshd get, and answers, and nothing else."""
    block(space, "-p", "udp")
    block(space, "-p", "tcp", "--syn", "!", "--dport", "22")


@pytest.mark.parametrize("closed, way", [((), "direct"), (("a",), "direct"), (("here",), "ssh"),
                                         (("here", "a"), "ssh")], ids="open worker client both".split())
def test_the_way_of_a_job(boxes, closed, way):
    """It is direct wherever that works, and nobody need know which it is."""
    farm = boxes("a")
    for name in closed:
        (let_in_answers_only if name == "here" else let_in_ssh_only)(farm.spaces[name])
    process = farm.start("a", "sh", "-c", SHELL, up=1)
    assert farm.said(process) == ""
    for _ in range(2):                          # the second time the worker knows the way
        done = farm.client("CMD=" + WAY, input=BODY)
        assert (done.returncode, done.stderr.decode()) == (5, "10.0.9.2 10.0.9.1 %s\n" % way) and done.stdout == BODY
    for rule, found in (({"CEXEC_ACCEPT_SERVER": "10.0.9.2"}, True), ({"CEXEC_REJECT_SERVERS": "10.0.9.2"}, False),
                        ({"CEXEC_REJECT_SERVERS": "10.0.9.1,127.0.0.1"}, True)):
        env = dict(rule, CEXEC_TIMEOUT_ACCEPT="1")
        listed = survey(farm.cluster, pub=farm.pub, space=farm.spaces["here"], env=env)
        assert (listed.returncode, listed.stdout.split("\t")[1:2]) == ((0, ["10.0.9.2"]) if found else (111, []))
        done = farm.client("CMD=exit 3", env=env)
        assert done.returncode == (3 if found else 111)
        for said in (done.stderr.decode(), listed.stderr):
            assert found and said == "" or re.search(r"not allowed .*10\.0\.9\.2$|10\.0\.9\.2: not allowed", said, re.M)


def test_a_line_behind_a_firewall(boxes):
    """BUSY comes through ssh too, and counts for the worker's address."""
    farm = boxes("a")
    let_in_answers_only(farm.spaces["here"])
    farm.start("a", "sh", "-c", SHELL, CONCURRENCY="1", up=1)
    options = {"pub": farm.pub, "space": farm.spaces["here"]}
    first = held_job(farm.cluster, "CMD=cat", **options)
    env = {"CEXEC_ACCEPT_SERVER": "10.0.9.2", "CEXEC_TIMEOUT_ACCEPT": "3"}
    second = farm.cluster.follow("cexec", "-v", farm.pub, "CMD=echo second", space=options["space"], env=env,
                                 stdout=subprocess.PIPE)
    until(lambda: b"a worker is busy" in read(second.log), "its place")
    third = farm.client("CMD=true", env={"CEXEC_REJECT_SERVERS": "10.0.9.2", "CEXEC_TIMEOUT_ACCEPT": "1"})
    assert third.returncode == 111 and b"not allowed" in third.stderr and b"10.0.9.2" in third.stderr
    outcome(first)
    assert second.wait(PATIENCE) == 0 and second.stdout.read() == b"second\n"


def test_one_host_directly_and_one_through_ssh(boxes):
    farm = boxes("a", "b")
    let_in_ssh_only(farm.spaces["b"])
    block(farm.spaces["here"], "-s", "10.0.9.3", "-p", "tcp", "--syn")
    block(farm.spaces["here"], "-s", "10.0.9.3", "-p", "udp")
    process = farm.start("a,b", "sh", "-c", SHELL, CONCURRENCY="1")
    assert sorted(row.split("\t")[1] for row in farm.up(process, 2)) == ["10.0.9.2", "10.0.9.3"]
    assert "2 of 2 hosts serve" in process.said()
    jobs = [held_job(farm.cluster, "CMD=" + WAY, pub=farm.pub, space=farm.spaces["here"]) for _ in range(2)]
    assert sorted(outcome(job, status=5)[1] for job in jobs) == [b"10.0.9.2 10.0.9.1 direct\n",
                                                                 b"10.0.9.3 10.0.9.1 ssh\n"]


def test_a_client_behind_nat_is_served_through_ssh(boxes):
    farm = boxes("a", "gate")
    client, gate = farm.cluster.lan("home", ["client", farm.spaces["gate"]], "192.168.7").values()
    need("nft")
    ip("-n", client, "route", "add", "default", "via", "192.168.7.2")
    subprocess.run(["ip", "netns", "exec", gate, "sh", "-ec", "echo 1 >/proc/sys/net/ipv4/ip_forward; nft -f -"],
                   check=True, input=b"table ip nat { chain out { type nat hook postrouting priority 100;"
                   b" policy accept; oifname lan masquerade; }; }")
    farm.spaces["here"] = client
    farm.start("a", "sh", "-c", SHELL, up=1)
    done = farm.client("CMD=" + WAY, input=BODY)
    assert done.returncode == 5 and done.stdout == BODY     # its address: its own, or the one that sshd sees
    assert done.stderr in (b"10.0.9.2 192.168.7.1 ssh\n", b"10.0.9.2 10.0.9.3 ssh\n")


def test_a_host_behind_another(boxes):
    """ProxyJump, as in the user's own configuration; no packet gets to the host from here."""
    farm = boxes("a", "b", opened=False)
    farm.open("a", forwarding="yes")
    farm.open("b")
    with open(farm.cluster.path("config"), "a") as file:
        file.write("Host b\nProxyJump a\n")
    block(farm.spaces["b"], "-s", "10.0.9.1")
    block(farm.spaces["here"], "-s", "10.0.9.3")
    farm.start("b", "sh", "-c", SHELL, up=1)
    done = farm.client("CMD=" + WAY, input=BODY)
    assert done.returncode == 5 and done.stdout == BODY
    assert done.stderr in (b"10.0.9.3 10.0.9.1 ssh\n", b"10.0.9.3 10.0.9.2 ssh\n")


@pytest.mark.parametrize("login", ["csh", "fish", "banner"])
def test_through_every_shell(boxes, login):
    need(*{"csh", "fish"} & {login})
    farm = boxes("a")
    let_in_answers_only(farm.spaces["here"])
    farm.start(login + "@a", "sh", "-c", SHELL, up=1)
    done = farm.client("CMD=" + WAY, input=BODY)
    assert (done.returncode, done.stderr) == (5, b"10.0.9.2 10.0.9.1 ssh\n") and done.stdout == BODY


@pytest.mark.parametrize("what", ["client", "starter", "ssh", "sshd", "worker", "supervisor"])
def test_what_is_killed_amid_a_job_through_ssh(boxes, what):
    """Nothing is left, here or there; only the client itself has no word to say."""
    farm = boxes("a")
    let_in_answers_only(farm.spaces["here"])
    process = farm.start("a", "sh", "-c", SHELL, up=1)
    worker, = farm.workers("a")
    job = held_job(farm.cluster, "CMD=cat; sleep 1000", pub=farm.pub, space=farm.spaces["here"])
    supervisor = max(set(farm.workers("a")) - {worker})
    ssh, = [pid for pid in processes_with(farm.cluster.marker) if words_of(pid)[0] == b"ssh"]
    if what == "sshd":
        farm.cut("a")
    else:
        os.kill({"client": job.pid, "starter": process.pid, "ssh": ssh, "worker": worker,
                 "supervisor": supervisor}[what], signal.SIGKILL)
    if what == "client":
        assert job.wait(PATIENCE) == -signal.SIGKILL
    else:
        assert outcome(job, status=111)[1].startswith(b"cexec: worker 10.0.9.2 lost after ")
    until(lambda: supervisor not in farm.there("a") and not any(b"sleep" in words_of(pid) for pid in farm.there("a")),
          "the end of the command", 20)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    process.wait(PATIENCE)
    farm.empty()


def test_the_first_signal_lets_jobs_through_ssh_end(boxes):
    farm = boxes("a")
    let_in_answers_only(farm.spaces["here"])
    process = farm.start("a", *JOB, CONCURRENCY="2", up=1)
    (one, go), (two, _) = started_job(farm), started_job(farm)
    process.send_signal(signal.SIGINT)
    until(lambda: "cservice: drains" in process.said(), "the drain")
    touch(go)
    assert outcome(one)[0] == b"done\n" and process.poll() is None
    process.send_signal(signal.SIGINT)
    assert b"lost" in outcome(two, status=111)[1]
    assert process.wait(PATIENCE) == 0
    farm.empty()


# For the local ssh: no direct connection to a client is possible, to such an address.
NO_DIRECT_WAY = "export SSH_CONNECTION='224.0.0.1 9 10.9.9.9 22'; "


@pytest.fixture
def tunnelled(local):
    """A worker on this host that reaches clients only through ssh."""
    local.env["CONCURRENCY"] = "16"
    local.serving = local.serve(NO_DIRECT_WAY + 'exec sh -c "$2"', "box", local.key, "sh", "-c", SHELL)
    until(lambda: "hosts serve" in local.said(), "the worker")
    return local


def test_jobs_through_ssh_are_as_jobs_here(tunnelled, tmp_path):
    tunnelled.data = tunnelled.path("data")
    os.mkdir(tunnelled.data)
    with open(tunnelled.path("data/big"), "wb") as file:
        file.write(BODY * 5)
    put(tunnelled.path("data/words"), "alpha\nbeta\ngamma\ndelta\n")
    cases = {param.id: param.values for param in ORACLE}
    for name in ("48_MB_from_a_pipe", "yes_into_head", "true_with_a_large_pipe", "head_of_yes", "closed_stdin",
                 "two_share_an_input_head", "three_in_a_pipeline"):
        command, script, stdout = cases[name]
        os.mkdir(str(tmp_path / name))
        _, seen, _, _ = both(tunnelled, tmp_path / name, Here.script, script, command)
        assert seen == os.fsencode(stdout)
    done = tunnelled.client("CMD=echo $SERVER_ADDR $SERVER_PORT $REMOTE_ADDR; kill -9 $$")
    assert (done.returncode, done.stdout) == (137, b"10.9.9.9 22 224.0.0.1\n")


def test_a_stopped_reader_holds_up_nobody_else(tunnelled):
    """Of the job that nobody reads only a window waits, here or there."""
    stopped = [tunnelled.start_client("CMD=exec cat /dev/zero", stdout=subprocess.PIPE) for _ in range(3)]
    for client in stopped:
        assert client.stdout.read(100) == bytes(100)
    done = tunnelled.client("CMD=cat", input=BODY * 3)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout == BODY * 3
    assert rss(tunnelled.serving.pid) < 80 << 20
    for client in stopped:
        client.kill()
    until(lambda: not processes_with("PEER_CMD=exec cat /dev/zero"), "the end of the commands")


# A host that is not what it seems: it plays a worker with the script's words.
EVIL = """
import os, socket, struct, sys, time
def frame(code, channel=0, payload=b"", flags=0, size=None):
    return struct.pack("!BBHI", code, flags, channel, len(payload) if size is None else size) + payload
def address(port):
    return b"\\0\\x09127.0.0.1" + struct.pack("!H", port)
def send(data):
    while data:
        data = data[os.write(1, data):]
def take(count):
    data = b""
    while len(data) < count:
        data += os.read(0, count - len(data)) or sys.exit()
    return data
def hear():
    code, flags, channel, size = struct.unpack("!BBHI", take(8))
    return code, flags, channel, take(size)
os.read(0, 65536)
time.sleep(0.2)
os.set_blocking(0, False)
try:
    while os.read(0, 1 << 20):
        time.sleep(0.05)
except BlockingIOError:
    pass
os.set_blocking(0, True)
send(b"\\ncexec: serves 0123456789abcdef\\n")
hear()
%s
while True:
    hear()
"""

def with_evil(local, does, hosts):
    """A starter with a host, evil, that does what the script says, and perhaps with a worker at another."""
    put(local.path("evil"), EVIL % does)
    return local.serve('[ $1 = evil ] && exec python3 evil; ' + NO_DIRECT_WAY + 'exec sh -c "$2"', hosts, local.key,
                       "cat")


@pytest.mark.parametrize("does", [
    "send(b'\\xfe' * 1000)", "send(frame(7, 1, size=2 ** 31))", "send(frame(1, 0, b'x' * 100))", "send(frame(12))",
    "send(frame(34))", "send(frame(35))", "send(frame(32, 0, b'\\0'))", "send(frame(32, 0, address(9) + b'CEXC'))",
    "send(frame(33, 1, address(9) + b'x'))", "send(frame(99))", "send(frame(3, 0, b'\\0' * 60000))",
    "send(frame(7, 1, b'') * 10 + frame(10, 1, b'\\xff' * 4) * 10 + frame(8, 1) + frame(9, 1) + frame(2, 0, b'y'))",
    "while True: send(frame(33, 1, address(9)))"])
def test_a_hostile_hosts_frames_get_it_dropped(local, does):
    """Nothing else happens: the other host serves on."""
    altered(local, SSH_QUEUE=100000)
    process = with_evil(local, does, "evil,box")
    until(lambda: re.search(r"(?m)^cservice: evil: has sent what no worker sends \(.*\), and is not started again$",
                            local.said()), "the drop")
    assert not re.search("(?m)^Traceback", local.said())
    assert local.client(input=b"x").stdout == b"x"
    assert signalled(process) == 0


def test_a_hostile_host_gets_no_byte_to_what_is_no_client(local):
    """Not before TLS begins there; and no more than 64 connections."""
    with_evil(local, """
while not os.path.exists("port"):
    hear()
port = int(open("port").read())
for number in range(70):
    send(frame(33, number, address(port)) + frame(7, number, b"early"))
refused = set()
while len(refused) < 6:
    code, flags, channel, _ = hear()
    refused |= {channel} if code == 8 else set()
open("refused", "w").close()
while True:
    code, _, channel, body = hear()
    if code == 7:
        send(frame(7, channel, b"answer"))
""", "evil")
    until(lambda: os.path.exists(local.pub), "the keys")
    pub = cexec.open_pub(local.pub)
    with socket.socket() as listener, Ear(group_port(local)) as ear:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        listener.settimeout(PATIENCE)
        port = listener.getsockname()[1]
        put(local.path("port"), str(port))
        attempts = itertools.count(1)

        def announced():
            ear.say(make_datagram(cexec.ANNOUNCE, pub, NONCE, port, **dict(FIRST_TRY, attempt=next(attempts))))
            return os.path.exists(local.path("refused"))
        until(announced, "the refusals")
        with contextlib.ExitStack() as stack:
            accepted = [stack.enter_context(listener.accept()[0]) for _ in range(64)]
            for sock in accepted:
                sock.settimeout(PATIENCE)
            accepted[0].sendall(b"SSH-2.0-OpenSSH\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert accepted[0].recv(100) == b""
            hello = b"\x16\x03\x01\x00\x05\x01hello"
            for sock in accepted[1:]:
                sock.sendall(hello)
                assert sock.recv(100) == b"answer"


# ---- cexec -s: workers on other hosts for one call -------------------------


@pytest.fixture
def away(local):
    """local, where cexec -s runs a script for each host $1 and the command $2; away.tmp() is what is in TMPDIR."""
    os.mkdir(local.path("tmp"))

    def login(script='sh -c "$2"'):
        put(local.path("login"), "#!/bin/sh\ncd %s\n%s\n" % (shlex.quote(local.directory), script), 0o700)
        local.env["CEXEC_SSH"] = shlex.quote(local.path("login"))
    local.login, local.tmp = login, lambda: os.listdir(local.path("tmp"))
    local.env["TMPDIR"] = local.path("tmp")
    login()
    return local


def starter_of(client):
    """The pid of the `cservice -s` that a cexec -s has started."""
    return until(lambda: [pid for pid in children_of(client.pid) if b"-ad" in words_of(pid)], "the starter")[0]


def workers_of(starter):
    """The pids of the workers: below each script that stands for ssh."""
    return [worker for ssh in children_of(starter) for worker in children_of(ssh)]


@pytest.mark.parametrize("words, input, status, out, err", [
    (["-s", "a", "cat"], b"x\xff\0", 0, b"x\xff\0", b""),
    (["-s", "a,b", "sh", "-c", "cat; echo e >&2; exit 7"], b"x", 7, b"x", b"e\n"),
    (["-s", "a", "-s", "2/b", "sh", "-c", "kill -9 $$"], b"", 137, b"", b""),
    (["-s", "a,b", "no-such-command"], b"", 127, b"", None),
    (["-s", "a", "A=1 2", "B=", "sh", "-c", 'echo "$PEER_A,$PEER_B,$0,$*"', "x", "-s", "--", "a=b"], b"", 0,
     b"1 2,,x,-s -- a=b\n", b""),
    (["-rs", "a", "--", "printf", "%s.", "-n"], b"", 0, b"-n.", b""),
    (["-s", "a,b", "-n", "cat"], b"unread", 0, b"", b""),
    (["-s", "a", "-i", "in", "-g", "o*", "sh", "-c", "tr a-z A-Z < in > out"], b"", 0, b"", b""),
    (["-ps", "a", "true"], b"", 0, b"", None),
    (["-s", "a,b", "-b", "4", "-j", "2", "tr", "a-z", "A-Z"], b"one\ntwo\nthree\n", 0, b"ONE\nTWO\nTHREE\n", b""),
    (["-s", "a,b", "-mn", "echo", "{}", ":::", "1", "2", "3"], b"", 0, b"1\n2\n3\n", b""),
    (["-s", "a,b", "-m", "-o", "-", "cat", "--", "in", "in2"], b"", 0, b"textmore", b""),
    (["-s", "a,b", "-A", "echo", "hello"], b"", 0, None, b""),
    (["-ls", "a,b"], b"", 0, None, b""),
], ids=range(14))
def test_every_mode_with_hosts(away, words, input, status, out, err):
    put(away.path("in"), "text")
    put(away.path("in2"), "more")
    done = away.run("cexec", *words, input=input)
    assert done.returncode == status, done
    assert out is None or done.stdout == out
    assert err is None or done.stderr == err
    if out is None:
        assert done.stdout.count(b"\n") == 2
    if "-g" in words:
        assert read(away.path("out")) == b"TEXT"
    assert not away.tmp() and not away.alive()          # at once


def test_a_terminal_on_another_host(away):
    """It is the command's when the login is over: what the login says comes before that, where it could be asked."""
    away.login('echo password: >&2; read answer < /dev/tty; echo "got $answer" >&2; exec sh -c "$2"')
    terminal = Terminal(away, away.argv("cexec", "-ts", "a", "sh", "-c", "tty; stty size; read x; echo $x; exit 3"))
    fcntl.ioctl(terminal.master, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 44, 0, 0))
    terminal.shows("password:")
    terminal.type("secret\n", "got secret")
    terminal.shows("/dev/pts/")
    terminal.shows("33 44")
    terminal.type("line\r", "line\r\nline\r\n")
    assert terminal.process.wait(PATIENCE) == 3
    terminal.close()


def test_hosts_that_fail_are_named_with_their_reasons(away):
    away.login('case $1 in\na) echo hi; echo "Permission denied (publickey)." >&2; exit 255;;\n'
               'b) echo hello; exit 127;;\n'
               'c) echo "Host key verification failed." >&2; exit 255;;\n'
               'd) kill -9 $$;; e) sleep 0.5; exec sh -c "$2";; esac')
    reasons = {
        "a: Permission denied (publickey).; ssh failed (ssh a true must work without a question)",
        "b: hello; exit status 127 instead of a worker: is python3 in the PATH of `ssh b`? " + BASHRC,
        "c: Host key verification failed.; ssh failed (run this once, it asks: %s c true)" % away.env["CEXEC_SSH"],
        "d: ssh was killed"}
    for words in (["echo", "x"], ["-A", "true"], ["-l"]):
        done = away.run("cexec", *words[:1] * (words[0] < "a"), "-s", "a,b,c,d", *words[words[0] < "a":])
        lines = done.stderr.decode().splitlines()
        assert (done.returncode, done.stdout, lines[-1]) == (111, b"", "cexec: no host serves")
        assert set(lines[:-1]) == {"cexec: " + reason for reason in reasons}
    done = away.run("cexec", "-s", "a,b,c,d,e", "echo", "x")
    assert (done.returncode, done.stdout) == (0, b"x\n")
    done = away.run("cexec", "-As", "a,e", "echo", "x")
    assert done.returncode == 111 and done.stdout.endswith(b": x\n") and b"cexec: a: Permission denied" in done.stderr


def test_what_stops_s_of_cexec_before_any_login(away):
    away.login("echo >> logins; exit 1")
    put(away.path("in"), "text")
    for words, word in ((["-s", "a"], "no command is named"), (["-s", "a", "A=1"], "no command is named"),
                        (["-ms", "a", "cat"], "no files are named"), (["-s", "a,", "true"], "a host is missing"),
                        (["-ls", "a", "true"], "one word too many"), (["-s", "a b", "true"], "not a host"),
                        (["-s", "a", "-b", "1x", "cat"], "not a size"), (["-s", "@none", "true"], "No such file"),
                        (["-Ans", "a"], "no command is named"), (["-s", "a", "-i", "none", "true"], "none: No such"),
                        (["-mns", "a", "-o", "x", "echo", ":::", "1", "2"], "x")):
        assert refusal(away.run("cexec", *words), 100, word).startswith("cexec: ")
    away.env["CEXEC_SSH"] = "no-such-ssh"
    refusal(away.run("cexec", "-s", "a", "true"), 100, "no-such-ssh: no such command")
    away.login("echo >> logins; exit 1")
    away.launch = [PYTHON, "-"]
    refusal(away.run("cexec", "-s", "a", "true", input=read(PROGRAM)), 100, "from standard input")
    away.launch = [PYTHON, PROGRAM]
    done = away.run("cexec", "-mns", "2/a,b", "-s", "c", "--dry-run", "A={}", "echo", "{}", ":::", "1 2")
    assert done.stdout == b"cexec -n -s 2/a,b -s c 'A=1 2' 'FILE=1 2' -- echo '1 2'\n"
    put(away.path("in.out"), "done")
    assert away.run("cexec", "-ms", "a", "cat", "--", "in").returncode == 0
    assert not os.path.exists(away.path("logins"))


def test_the_keys_of_a_call_are_in_no_file_and_no_environment(away):
    away.login('tee -a sent | sh -c "$2"')
    client = away.start("cexec", "-s", "a", *JOB, "GO=x", stdout=subprocess.PIPE, env={"PEER_GO": away.path("go")})
    assert client.stdout.readline() == b"ready\n"
    key = bytes.fromhex(re.search(rb"([0-9a-f]{400,})\n", read(away.path("sent"))).group(1).decode())
    os.unlink(away.path("sent"))
    master = cexec.parse_key(key.decode(), "").master
    secrets = [master, cexec.client_secret(master, "anyone")]
    secrets += [secret.hex().encode() for secret in secrets] + [key.split()[5]]
    for pid in away.alive():
        for file in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                text = read("/proc/%d/%s" % (pid, file))
                assert not any(secret in text for secret in secrets), words_of(pid)
    for top, _, files in os.walk(away.directory):
        for file in files:
            text = read(os.path.join(top, file))
            assert not any(secret in text for secret in secrets), file
    client.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("who", ["client", "starter", "ssh", "worker"])
def test_nothing_is_left_whoever_is_killed(away, who, number):
    """While a job runs that does not want to end: 111 or a status of the job, and no process and no file."""
    away.login('trap "" HUP; [ $1 = slow ] && exec sleep 1000; sh -c "$2"')
    client = away.start("cexec", "-s", "a,slow", "-i", PROGRAM, "sh", "-c",
                        "trap '' TERM HUP; echo ready; sleep 1000 & wait; sleep 1000", stdout=subprocess.PIPE)
    assert client.stdout.readline() == b"ready\n" and away.tmp()
    starter = starter_of(client)
    worker, = workers_of(starter)
    ssh = parent_of(worker)
    os.kill({"client": client.pid, "starter": starter, "ssh": ssh, "worker": worker}[who], number)
    if number == signal.SIGTERM and who in ("client", "starter", "worker"):
        client.kill()               # it ignores TERM, and so does the starter; a worker drains
    elif who == "worker":           # its supervisor carries the job on
        client.kill()
    client.wait(PATIENCE)
    until(lambda: not away.alive(), "the end of everything", 20)
    assert not away.tmp()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("hosts", ["a", "a,b"])
def test_a_signal_during_the_logins_leaves_nothing(away, hosts, number):
    away.login("echo >> begun; sleep 1000")
    client = away.start("cexec", "-s", hosts, "true", stderr=subprocess.PIPE)
    until(lambda: os.path.exists(away.path("begun")) and read(away.path("begun")).count(b"\n") == len(hosts.split(",")),
          "the logins")
    assert signalled(client, number) == -number and client.stderr.read() == b""
    until(lambda: not away.alive(), "the end of everything")


def test_two_interrupts_end_a_job_and_its_workers(away):
    client = away.start("cexec", "-s", "a,b", "sh", "-c", "trap 'echo int' INT; echo ready; "
                        "while :; do sleep 0.1; done", stdout=subprocess.PIPE)
    assert client.stdout.readline() == b"ready\n"
    client.send_signal(signal.SIGINT)
    assert client.stdout.readline() == b"int\n"
    client.send_signal(signal.SIGINT)
    assert client.wait(PATIENCE) == -signal.SIGINT
    until(lambda: not away.alive(), "the end of everything")


def test_a_signal_for_the_whole_group_reaches_the_command_alone(away):
    """As timeout(1) and a keyboard send it: neither the starter nor a lone ssh takes it for its own."""
    away.login('exec sh -c "$2"')
    argv = away.argv("cexec", "-s", "a", "sh", "-c", "trap 'sleep 0.5; echo over; exit 5' TERM INT; echo ready; "
                     "while :; do sleep 0.1; done")
    for number in (signal.SIGTERM, signal.SIGINT):
        terminal = Terminal(away, argv)
        terminal.shows("ready")
        os.killpg(terminal.process.pid, number)
        terminal.shows("over")
        assert terminal.process.wait(PATIENCE) == 5
        terminal.close()


def test_a_stopped_client_keeps_its_workers(away):
    altered(away, **SILENCE)
    client = away.start("cexec", "-s", "a,b", *JOB, "x", stdout=subprocess.PIPE, env={"PEER_GO": away.path("go")})
    assert client.stdout.readline() == b"ready\n"
    client.send_signal(signal.SIGSTOP)
    time.sleep(6)
    client.send_signal(signal.SIGCONT)
    touch(away.path("go"))
    assert outcome(client)[0] == b"done\n"


def test_a_host_that_comes_back_serves_a_batch_again(away):
    put(away.path("die"), "")
    away.login('sh -c "$2"')
    client = away.start("cexec", "-s", "1/a", "-mn", "sh", "-c", 'if rm "$0" 2>&-; then echo > began; sleep 1000; fi; '
                        "echo {}", away.path("die"), ":::", "1", "2", stdout=subprocess.PIPE)
    starter = starter_of(client)
    until(lambda: not os.path.exists(away.path("die")), "the job")
    os.kill(children_of(starter)[0], signal.SIGKILL)
    assert outcome(client)[0] == b"1\n2\n"


def test_descriptors_with_hosts_are_those_of_a_local_command(away):
    """Also where 0, 1 or 2 is closed, and the reader of an output sees its end when the command closes it."""
    script = "%s cexec -s a sh -c 'ls /dev/fd; echo out; echo err >&2 || :' 4</dev/null %s" % (
        " ".join(map(shlex.quote, away.launch)), "%s")
    for closed in ("", "<&-", "2>&-", "<&- 2>&-"):
        assert away.do(["sh", "-c", script % closed]).returncode == 0
    client = away.start("cexec", "-s", "a", "sh", "-c", "echo x; exec >&- 2>&-; until [ -e go ]; do sleep 0.05; done",
                        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert client.stdout.read() == b"x\n" and client.stderr.read() == b""
    client.kill()


def test_a_worker_needs_no_section_that_is_not_sent():
    """What program_for() leaves out defines nothing that the rest uses, but for what only other modes call."""
    pieces = read(PROGRAM).split(cexec.SECTION_LINE)
    names, gone, used = set(), set(), set()

    def walk(code):
        for row in dis.get_instructions(code):
            if row.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                used.add(row.argval)
        for one in code.co_consts:
            if isinstance(one, type(code)):
                walk(one)
    for title, body in zip([b""] + pieces[1::2], pieces[::2]):
        code = compile(body, "section", "exec")
        made = {row.argval for row in dis.get_instructions(code) if row.opname == "STORE_NAME"}
        if title.startswith(cexec.NOT_THERE):
            gone |= made
        else:
            names |= made
            walk(code)
    assert used & (gone - names) == {"serve_on_hosts"} and len(gone) > 300


def test_the_program_goes_compiled_to_the_same_python_alone(monkeypatch):
    monkeypatch.setattr(cexec, "__file__", PROGRAM)
    start, program = cexec.program_for.__wrapped__(cexec.own_bytecode())
    assert start is cexec.START_COMPILED and len(program) < len(read(PROGRAM)) / 2
    for other in ("", "cpython-3550a0a0d0a"):
        assert cexec.program_for.__wrapped__(other) == (cexec.START_SOURCE, read(PROGRAM))


def test_run_on_hosts(away, monkeypatch):
    live_in(away, monkeypatch)
    monkeypatch.chdir(away.directory)
    put("in", "text")
    cexec.run("mv", "in", "out", hosts="a", put=["in"], get=["out"], check=True)
    assert read("out") == b"text"
    done = cexec.run("sh", "-c", "cat; echo $PEER_A; exit 3", hosts=["a", "2/b"], input=b"x", env={"A": "1"},
                     capture_output=True)
    assert (done.returncode, done.stdout, done.stderr, done.args[0]) == (3, b"x1\n", b"", "sh")
    away.login("exit 255")
    with pytest.raises(cexec.Failed) as failed:
        cexec.run("true", hosts=["a"], stderr=subprocess.PIPE)
    assert failed.value.code == 111 and "no host serves" in str(failed.value)
    assert b"a: ssh failed" in failed.value.stderr
    for words, hosts in (((), ["a"]), (("true",), [])):
        with pytest.raises(TypeError):
            cexec.run(*words, hosts=hosts)


def hire(farm, hosts, *words, start=False, ssh="", **options):
    """Runs cexec -s from the machine `here`, which no host can reach but through ssh."""
    options["env"] = dict(options.get("env", {}), CEXEC_SSH=farm.ssh + ssh)
    return (farm.cluster.start if start else farm.cluster.run)(
        "cexec", "-s", hosts, *words, space=farm.spaces["here"], **options)


@pytest.mark.parametrize("login", ["sh", "csh", "fish", "banner"])
def test_one_line_over_a_real_ssh(boxes, login):
    """Two hosts; one command, then every one; what comes in and goes out."""
    need(*{"csh", "fish"} & {login})
    farm = boxes("a", "b")
    let_in_answers_only(farm.spaces["here"])
    put(farm.cluster.path("in"), "text")
    hosts = "%s@a,%s@b" % (login, login)
    done = hire(farm, hosts, "-i", "in", "-g", "out", "sh", "-c", "cat in - > out; echo e >&2; exit 0", input=b"x")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"e\n")
    assert read(farm.cluster.path("out")) == b"textx"
    done = hire(farm, hosts, "-A", "sh", "-c", "echo $SSH_CONNECTION | cut -d' ' -f3")
    assert done.returncode == 0
    assert {line.split()[-1] for line in done.stdout.splitlines()} == {b"10.0.9.2", b"10.0.9.3"}
    words = [b"", b" ", b"a'b", b'"', b"!x", b"$HOME", b"`id`", b"a\nb", b"\\", b"\xff\xe9", b"{}", b"*", b"%d", b"~"]
    done = hire(farm, hosts, "printf", "%s\\0", *words)
    assert (done.returncode, done.stdout.split(b"\0")[:-1]) == (0, words)
    done = hire(farm, hosts, "-mn", "sh", "-c", "echo {}; exit 0", ":::", *map(str, range(30)))
    assert (done.returncode, done.stdout.split()) == (0, [b"%d" % number for number in range(30)])
    farm.empty()


def test_hosts_of_all_kinds_that_fail(boxes):
    """The first host that serves does the work; without one each has its reason."""
    farm = boxes("a", "b", opened=False)
    farm.open("a")
    with open(farm.cluster.path("config"), "a") as file:
        file.write("Host unknown\nHostName 10.0.9.2\nHostKeyAlias unknown\nHost silent\nHostName 10.0.9.3\n")
    block(farm.spaces["b"], "-p", "tcp", "--dport", "22")       # it never answers
    bad, ssh = "bare@a,nologin@a,nosuch@a,unknown,silent", " -o ConnectTimeout=2"
    done = hire(farm, bad + ",a", "echo", "x", ssh=ssh)
    assert (done.returncode, done.stdout) == (0, b"x\n")
    reasons = ["bare@a: /bin/sh: 1: exec: python3: not found; exit status 127 instead of a worker: is python3 in",
               "nologin@a: This account is not available.; exit status 1 instead of a worker",
               "nosuch@a: nosuch@10.0.9.2: Permission denied (publickey,password",
               "unknown: Host key verification failed.; ssh failed (run this once, it asks: %s%s unknown true)" % (
                   farm.ssh, ssh),
               "silent: ssh: connect to host 10.0.9.3 port 22: Connection timed out; ssh failed"]
    for mode in ((), ("-A",), ("-l",)):
        done = hire(farm, bad + ",a" * (mode == ("-A",)), *mode, *["true"] * (mode != ("-l",)), ssh=ssh)
        lines = done.stderr.decode().splitlines()
        assert done.returncode == 111, done
        for reason in reasons:
            assert sum(line.startswith("cexec: " + reason) for line in lines) == 1, (reason, lines)
        assert len(lines) == len(reasons) + (mode != ("-A",))
    farm.empty()


def test_one_host_of_a_call_may_ask_for_a_password(boxes):
    """Keys at the terminal are the command's then, and not ssh's."""
    farm = boxes("a")
    argv = farm.cluster.argv("cexec", "-ts", "a", "sh", "-c", "tty; cat; exit 4", space=farm.spaces["here"])
    terminal = Terminal(farm.cluster, argv, {"CEXEC_SSH": farm.ssh + " -o PubkeyAuthentication=no"})
    terminal.shows("password:")
    terminal.type(SECRET + "\r", "/dev/pts/")
    terminal.type("line\r", "line\r\nline\r\n")
    terminal.type("\x04")
    assert terminal.process.wait(PATIENCE) == 4
    terminal.close()
    argv = farm.cluster.argv("cexec", "-s", "a", "sh", "-c", "trap 'echo int; exit 5' INT; echo ready; "
                             "while :; do sleep 0.1; done", space=farm.spaces["here"])
    terminal = Terminal(farm.cluster, argv, {"CEXEC_SSH": farm.ssh + " -o PubkeyAuthentication=no"})
    terminal.shows("password:")
    terminal.type(SECRET + "\r", "ready")
    terminal.type("\x03", "int")
    assert terminal.process.wait(PATIENCE) == 5
    terminal.close()
    farm.empty()


@pytest.mark.parametrize("who", ["client", "starter", "ssh", "sshd", "worker"])
def test_a_kill_leaves_nothing_on_a_host(boxes, who):
    farm = boxes("a")
    let_in_answers_only(farm.spaces["here"])
    client = hire(farm, "a", "sh", "-c", "trap '' TERM HUP; echo ready; sleep 1000 & wait; sleep 1000", start=True,
                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert client.stdout.readline() == b"ready\n"
    starter = starter_of(client)
    if who == "sshd":
        farm.cut("a")
    else:
        ssh, worker = children_of(starter)[0], farm.workers("a")[0]
        os.kill({"client": client.pid, "starter": starter, "ssh": ssh, "worker": worker}[who], signal.SIGKILL)
    assert client.wait(PATIENCE) == (-signal.SIGKILL if who == "client" else 111)
    farm.empty()
    assert not [pid for pid in farm.cluster.alive() if words_of(pid)[:1] == [b"ssh"]]


def test_a_call_that_loses_the_network_leaves_nothing(cluster, boxes):
    altered(cluster, **SILENCE)
    farm = boxes("a")
    client = hire(farm, "a", "sh", "-c", "echo ready; sleep 1000", start=True, stdout=subprocess.PIPE,
                  ssh=" -o ServerAliveInterval=1 -o ServerAliveCountMax=2", env={"CEXEC_TIMEOUT_PINGPONG": "5"})
    assert client.stdout.readline() == b"ready\n"
    ip("-n", farm.spaces["a"], "link", "set", "lan", "down")
    until(lambda: not farm.workers("a"), "the end of the worker")
    assert client.wait(PATIENCE) == 111


# ---- Python: cexec.run -----------------------------------------------------

@pytest.fixture
def here(one, monkeypatch):
    """The shared cluster, found by cexec.run in this process; here.sh(command, ...) has its worker run a command."""
    live_in(one, monkeypatch)
    one.sh = lambda command, **options: cexec.run(one.pub, env={"CMD": command}, **options)
    return one


@pytest.mark.parametrize("command, options", [
    ("cat; exit 3", {"input": b"\xffa\n", "stdout": subprocess.PIPE}),
    ("cat; echo \xe4 >&2", {"input": "h\xe9\r\n", "stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
                            "encoding": "utf-8"}),
    ("echo hello; echo world >&2", {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE,
                                    "stderr": subprocess.STDOUT, "universal_newlines": True}),
    ("echo hello; echo world >&2", {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL,
                                    "stderr": subprocess.PIPE}),
    ("head -c 3000000 /dev/zero", {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}),
    ("cat >/dev/null; wc -c", {"input": bytes(3000000), "stdout": subprocess.PIPE}),
    ("kill -TERM $$", {"stdin": subprocess.DEVNULL}),
    ("exit 111", {"stdin": subprocess.DEVNULL}), ("exit 127", {"stdin": subprocess.DEVNULL}),
], ids=range(9))
def test_run_gives_what_subprocess_run_gives(here, command, options):
    done, local = here.sh(command, **options), subprocess.run(["sh", "-c", command], **options)
    assert (done.returncode, done.stdout, done.stderr) == (local.returncode, local.stdout, local.stderr)
    assert isinstance(done, subprocess.CompletedProcess) and done.args == [here.pub]


def test_run_gives_the_command_its_arguments(cluster, monkeypatch):
    """As they are, with variables before them or none, and in the right place of the worker's words."""
    cluster.worker("printf", "<%s>", "first", "{}", "last", options=["-a"])
    live_in(cluster, monkeypatch)
    for words in (["K=V", "a b", "", "--", "-x", "\n", "{}"], ["--", "K=V"], ["-n", "1"]):
        for env in ({}, {"K": "V"}):
            done = cexec.run(cluster.pub, *words, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
            assert done.stdout.decode() == "".join(map("<%s>".__mod__, ["first", *words, "last"]))
            assert done.args == [cluster.pub, *words]


def test_run_puts_and_gets_files(farm, monkeypatch):
    farm.serve()
    live_in(farm, monkeypatch)
    monkeypatch.chdir(farm.desk)
    in_desk(farm, "in.txt", b"hello")
    in_desk(farm, "-x", b"dash")
    done = cexec.run(farm.pub, "sh", "-c", "tr a-z A-Z <in.txt >out.txt; cat -- -x; exit 3",
                     put=[pathlib.Path("in.txt"), b"-x"], get=["*.txt"], stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (3, b"dash") and not os.path.exists("out.txt")
    cexec.run(farm.pub, "sh", "-c", "tr a-z A-Z <in.txt >out.txt", put=["in.txt"], get=["out.*"], check=True)
    assert read("out.txt") == b"HELLO"
    for option, code in (({"put": ["nowhere"]}, 100), ({"get": ["nothing"]}, 111)):
        with pytest.raises(cexec.Failed) as caught:
            cexec.run(farm.pub, "true", stderr=subprocess.PIPE, **option)
        assert caught.value.code == code and re.search("nowhere|nothing in", caught.value.stderr.decode())
    with pytest.raises(TypeError, match="lists of paths"):
        cexec.run(farm.pub, "true", put="in.txt")


def test_run_takes_files_and_pipes(here, tmp_path):
    """A file's offset is where the command stopped to read; a pipe of pass_fds is at its number there."""
    reader, writer = os.pipe()
    with open(here.path("data/words"), "rb") as source, open(str(tmp_path / "out"), "wb") as target:
        assert here.sh("head -c 6; echo more >/dev/fd/%d" % writer, stdin=source, stdout=target,
                       pass_fds=[writer]).returncode == 0
        os.close(writer)
        assert source.read(4) == b"beta"
    assert (read(str(tmp_path / "out")), read_all(reader)) == (b"alpha\n", b"more\n")


def test_run_from_threads(here):
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        done = threads.map(lambda number: here.sh("cat; exit %d" % number, input=b"%d" % number,
                                                  stdout=subprocess.PIPE), range(16))
        assert [(run.returncode, run.stdout) for run in done] == [(number, b"%d" % number) for number in range(16)]


def test_run_refuses_what_does_not_go_together(here):
    for options in ({"input": b"", "stdin": subprocess.DEVNULL}, {"capture_output": True, "stderr": subprocess.PIPE}):
        with pytest.raises(ValueError):
            here.sh("true", **options)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        here.sh("echo out; exit 3", stdin=subprocess.DEVNULL, capture_output=True, check=True)
    assert (caught.value.returncode, caught.value.stdout, caught.value.stderr) == (3, b"out\n", b"")


def test_run_at_its_timeout_ends_the_job_there(here):
    for seconds in (1, 5, 20):          # until one was enough for it to begin
        with pytest.raises(subprocess.TimeoutExpired) as caught:
            here.sh("trap '' TERM; echo begun; while :; do sleep 0.1; done", stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE, timeout=seconds)
        if caught.value.stdout:
            break
    assert caught.value.stdout == b"begun\n" and caught.value.timeout == seconds
    until(lambda: here.alive() == [here.serving.pid], "the end of the job", 12)


def test_what_fails_in_cexec_is_no_returncode(here, monkeypatch):
    assert failure(cexec.run, "nowhere.pub", stderr=subprocess.DEVNULL) == (
        100, "nowhere.pub: no such public key: is the name right? (ckeygen makes keys)")
    assert failure(cexec.run, "-r", stderr=subprocess.DEVNULL)[1].startswith("./-r: no such public key")
    code, text = failure(cexec.run, here.pub, env={"A B": "x"})
    assert code == 100 and text.startswith("A B: not a variable")
    code, text = failure(here.sh, "kill -KILL $PPID; exec sleep 100", stdin=subprocess.DEVNULL, capture_output=True)
    assert code == 111 and "lost after" in text and text.endswith("the command may have run")
    monkeypatch.setenv("CEXEC_TIMEOUT_ACCEPT", "1")
    monkeypatch.setenv("GROUP", "127.255.255.255:%d" % free_port())
    code, text = failure(here.sh, "true", stderr=subprocess.DEVNULL)
    assert code == 111 and text.startswith("no worker answered in ")
    monkeypatch.setenv("CEXEC_RETRIES", "many")
    code, text = failure(here.sh, "true", stderr=subprocess.DEVNULL)
    assert (code, text) == (100, "cexec ended with status 100: its standard error says why")


def test_a_command_that_cannot_be_run_is_a_failure(cluster, monkeypatch):
    live_in(cluster, monkeypatch)
    cluster.worker(cluster.path("no-such-command"))
    code, text = failure(cexec.run, cluster.pub, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert code == 127 and text == "worker 127.0.0.1 cannot run its command: it is not there (exit status 127)"


def test_the_file_may_have_any_name(here, tmp_path):
    """As a program that has a link to it, or a copy under an applet's name, may import it."""
    for name, path in (("link.py", PROGRAM), ("cexec", None)):
        if path:
            os.symlink(path, str(tmp_path / name))
        else:
            shutil.copy(PROGRAM, str(tmp_path / name))
        done = subprocess.run([PYTHON, "-c", textwrap.dedent("""
            import importlib.util, importlib.machinery, sys
            loader = importlib.machinery.SourceFileLoader("other", sys.argv[1])
            other = importlib.util.module_from_spec(importlib.util.spec_from_loader("other", loader))
            loader.exec_module(other)
            print(other.run(sys.argv[2], input=b"", env={"CMD": "exit 7"}).returncode)"""),
            str(tmp_path / name), here.pub], stdout=subprocess.PIPE, env=here.environment(), timeout=PATIENCE)
        assert done.stdout == b"7\n"


def test_import_is_cheap_and_help_can_be_read(cluster):
    program = """if 1:
        import sys
        import cexec
        costly = {"concurrent.futures", "pickle", "threading", "subprocess"} & set(sys.modules)
        assert not costly or sys.version_info < (3, 7)
        import concurrent.futures
        assert issubclass(cexec.Executor, concurrent.futures.Executor)
        assert sorted(cexec.__all__) == ["Executor", "Failed", "joblib", "run"] and cexec.__version__ == cexec.VERSION
        help(cexec)"""
    done = cluster.do([PYTHON, "-c", program], env={"PYTHONPATH": HERE, "PAGER": "cat", "TERM": "dumb"})
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode()
    for word in ("cexec.run(", "class Executor(concurrent.futures", "class Failed(", "PEER_KEY", "retries: how often",
                 "submit(fn, *args, **kwargs)"):
        assert word in shown
    assert len(shown.splitlines()) < 320 and "exec python3 -S" not in shown and "Supervisor" not in shown


# ---- Python: what a result may have in it ----------------------------------

def loaded(data, allow=()):
    return cexec.load_result(cexec.result_readers(allow), b"...." + data, 4)


DATA = [None, True, 10 ** 40, 1.5, 2j, "\ud800 text", b"bytes", bytearray(b"x"), [1, [2]], (1, (2,)), {"a": {1, 2}},
        frozenset([3]), range(5), slice(1, 2), Ellipsis, NotImplemented, int, [object], {"type": ValueError}]


@pytest.mark.parametrize("protocol", range(4, 6))
def test_data_is_read(protocol):
    for value in DATA:
        found = loaded(pickle.dumps(value, min(protocol, pickle.HIGHEST_PROTOCOL)))
        assert type(found) is type(value) and found == value
    cyclic = []
    cyclic.append(cyclic)
    assert loaded(pickle.dumps(cyclic))[0][0] is not None


def test_builtin_exceptions_are_read():
    for error in (ValueError("x", 1), OSError(2, "no", "file"), UnicodeDecodeError("a", b"b", 0, 1, "c"), KeyError(3),
                  StopIteration(4), SystemExit(5)):
        found = loaded(pickle.dumps(error))
        assert type(found) is type(error) and found.args == error.args
    assert loaded(pickle.dumps(OSError(2, "no", "file"))).filename == "file"


# What the manual and its readers allow
EVERY_ALLOW = ["numpy", "datetime", "collections", "fractions.Fraction", "decimal.Decimal", "uuid", "cexec.Failed"]


def stack_global(module, name):
    return b"\x80\x04" + b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name)) + b"\x93."


class Harm:
    """Pickles as a call of anything."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def harmful_pickles(touch):
    """Pickles each of which would have a file made, by every way to a callable that pickle has."""
    command = "touch %s" % touch
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for call in ((os.system, (command,)), (eval, ("open(%r, 'w')" % touch,)), (open, (touch, "w")),
                     (subprocess.Popen, (["touch", touch],)), (exec, ("open(%r, 'w')" % touch,)),
                     (getattr, (os, "system")) if protocol < 0 else (__import__, ("os",)), (map, (print, [1])),
                     (functools.partial, (os.system, command)), (type, ("X", (), {}))):
            harm = Harm(*call)
            for place in (harm, [harm], {"a": (1, harm)}, ValueError(harm)):
                yield pickle.dumps(place, protocol)
    text = command.encode()
    yield b"cos\nsystem\n(V" + text + b"\ntR."                                      # GLOBAL, REDUCE
    yield b"(V" + text + b"\nios\nsystem\n."                                         # INST
    yield b"(cos\nsystem\nV" + text + b"\no."                                        # OBJ
    yield b"c__builtin__\neval\n(V1\ntR."                                            # a name of Python 2
    for module, name in (("builtins", "getattr"), ("builtins", "ValueError.__init__.__globals__"),
                         ("builtins", "__import__"), ("os", "system"), ("posix", "system"), ("builtins", "type"),
                         ("builtins", "object.__subclasses__"), ("builtins", "ValueError.mro"), ("builtins", "exec"),
                         ("builtins", "str.format"), ("builtins", "dict.get"), ("builtins", ""), ("", "getattr"),
                         ("cexec", "os.system"), ("cexec", "run"), ("__mp_main__", "os"), ("__main__", "sys"),
                         ("_codecs", "encode"), ("copyreg", "_reconstructor"), ("copyreg", "__newobj__"),
                         ("sys", "modules"), ("builtins", "memoryview"), ("builtins", "super"), ("io", "open"),
                         ("builtins", "property"), ("importlib", "import_module"), ("operator", "attrgetter"),
                         ("antigravity", "fly"), ("functools", "partial"), ("types", "FunctionType"),
                         ("copyreg", "__newobj_ex__"), ("pickle", "loads"), ("re", "compile"), ("enum", "Enum"),
                         ("builtins", "vars"), ("builtins", "setattr"), ("builtins", "breakpoint"),
                         ("array", "array.fromfile"), ("uuid", "os"), ("pathlib", "Path.unlink"), ("cexec", "log")):
        words = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name))
        yield b"\x80\x04" + words + b"\x93."                                        # STACK_GLOBAL
        yield b"\x80\x04" + words + b"\x93\x8c" + bytes([len(text)]) + text + b"\x85R."
        yield b"\x80\x04" + words + b"\x93)\x81."                                   # NEWOBJ
        yield b"\x80\x04" + words + b"\x93)}\x92."                                  # NEWOBJ_EX
    yield b"P1\n."                                                                  # PERSID
    yield b"K\x01Q."                                                                # BINPERSID
    yield b"\x80\x02\x82\x07."                                                      # EXT1
    yield b"\x80\x02\x83\x07\x00."                                                  # EXT2
    yield b"\x80\x02\x84\x07\x00\x00\x00."                                          # EXT4
    yield b"\x80\x05\x97\x98."                                                      # NEXT_BUFFER, READONLY_BUFFER
    for kind, name in (("int", "__add__"), ("ValueError", "__init__")):
        kind, value = (stack_global("builtins", word)[:-1] for word in (kind, "str"))
        state = b"}\x8c" + bytes([len(name)]) + name.encode() + value + b"s"
        yield kind + state + b"b."                                                  # BUILD of a type
        yield kind + b"N" + state + b"\x86b."                                       # with slots
    yield b"K\x01K\x02a."                                                           # APPEND to no list
    yield b"K\x01)R."                                                               # REDUCE of no callable


@pytest.mark.parametrize("extensions", [False, True])
def test_no_result_runs_code_here(tmp_path, extensions):
    """With a number of copyreg's too, whose object was loaded before, which pickle's C code does not ask about."""
    mark, before = str(tmp_path / "harm"), set(sys.modules)
    readers = [cexec.result_readers(allow) for allow in ((), EVERY_ALLOW)]
    if extensions:
        copyreg.add_extension("os", "system", 7)
        assert pickle.loads(b"\x80\x02\x82\x07.") is os.system
    try:
        for data in harmful_pickles(mark):
            for reader in readers:
                with pytest.raises(Exception):      # noqa: B017
                    cexec.load_result(reader, data, 0)
    finally:
        if extensions:
            copyreg.remove_extension("os", "system", 7)
            copyreg.clear_extension_cache()
    assert not os.path.exists(mark) and "antigravity" not in set(sys.modules) - before
    assert int("1") == 1 and ValueError(1).args == (1,)


def test_allow_names_a_modules_classes_and_nothing_that_it_has_imported(mine):
    data = pickle.dumps([mine.Point(3), mine.Point.Inner()])
    assert loaded(data, ["mine_x"])[0].x == 3
    with pytest.raises(pickle.UnpicklingError, match=r'allow=\["mine_x.Point", "mine_x.Point.Inner"\]'):
        loaded(data)                # both, although the first is enough to refuse it
    with pytest.raises(pickle.UnpicklingError, match=r'allow=\["mine_x.Point.Inner"\]'):
        loaded(data, ["mine_x.Point"])
    assert loaded(data, ["mine_x.Point", "mine_x.Point.Inner"])[0].x == 3
    for name in ("os", "os.system", "system", "Popen", "subprocess.Popen", "partial", "FileIO", "function", "Point.x",
                 "Point.__init__", "Point.__init__.__globals__", "Point.__class__", "Point.mro", "__builtins__",
                 "__loader__"):
        with pytest.raises(pickle.UnpicklingError):
            loaded(stack_global("mine_x", name), ["mine_x"])
    with pytest.raises(pickle.UnpicklingError):         # what is not imported here is not imported for it
        loaded(stack_global("xml.sax.expatreader", "ExpatParser"), ["xml"])
    assert "xml.sax.expatreader" not in sys.modules


def test_allow_names_what_is_there(mine):
    assert loaded(stack_global("mine_x", "Point"), ["mine_x.Point"]) is mine.Point
    with pytest.raises(ImportError):
        cexec.result_readers(["no_such_module_x"])
    with pytest.raises(AttributeError):
        cexec.result_readers(["datetime.no_such_class"])
    with pytest.raises(TypeError):
        cexec.result_readers("datetime")


@pytest.mark.parametrize("name", [
    "builtins", "builtins.getattr", "builtins.eval", "builtins.type", "builtins.map", "builtins.property", "operator",
    "operator.attrgetter", "operator.methodcaller", "functools.partial", "functools.reduce", "copyreg.__newobj__",
    "types.FunctionType", "types", "subprocess.Popen", "os", "os.system", "ctypes.CDLL", "importlib.import_module",
    "importlib", "pickle.Unpickler", "mine_x.function", "mine_x.system", "mine_x.Popen", "mine_x.partial",
    "mine_x.Caller", "enum.EnumMeta", "mine_x.FileIO", "weakref.finalize", "threading.Thread", "zipfile.ZipFile",
    "sqlite3.Connection"])
def test_allow_takes_only_classes_for_data(mine, name):
    with pytest.raises(TypeError, match="classes for data"):
        cexec.result_readers([name])
    module, _, inner = name.rpartition(".")
    with pytest.raises((ValueError, pickle.UnpicklingError)) as refused:
        loaded(stack_global(module or name, inner or "getattr"))
    assert "allow=" not in str(refused.value)       # nor is it advised


# What a program may have of its own: a dataclass in each form that Python has, and whom it may not be
OURS = """
import abc, collections, dataclasses, enum, functools
CALLED = []
class Color(enum.Enum):
    RED, BLUE = 1, "b"
class Mode(enum.Flag):
    A, B, C = 1, 2, 4
class Strange(enum.Flag):
    A, B = 1, 2
    @classmethod
    def _missing_(cls, value):
        CALLED.append(value)
class Making(enum.IntFlag):
    A, B = 1, 2
    def __new__(cls, value):
        made = int.__new__(cls, value)
        made._value_ = value
        return made
Pair = collections.namedtuple("Pair", "x y")
class Wrong(Exception):
    level = 0
    def __init__(self, one, two):
        CALLED.append(one)
        super().__init__("%s and %s" % (one, two))
        self.one, self.two = one, two
    def __reduce__(self):
        return Wrong, (self.one, self.two)
    def fatal(self):
        return True
class Missing(FileNotFoundError):
    pass
class Named(ImportError):
    path = property(lambda self: 1, lambda self, value: CALLED.append(value))
@dataclasses.dataclass
class Point:
    x: int
    y: list = dataclasses.field(default_factory=list)
    def __post_init__(self):
        CALLED.append(self)
        self.total = self.x
    def is_safe(self):
        return False
    @functools.cached_property
    def double(self):
        return 2 * self.x
    def __setattr__(self, name, value):
        CALLED.append(name)
        super().__setattr__(name, value)
    def __setitem__(self, key, value):
        CALLED.append(key)
    def append(self, value):
        CALLED.append(value)
    extend = add = append
@dataclasses.dataclass(frozen=True)
class Frozen:
    x: object
    y: object = None
class Child(Frozen):
    pass
@dataclasses.dataclass
class Abstract(abc.ABC):
    x: int
@dataclasses.dataclass
class Deleted:
    x: int
    def __del__(self):
        CALLED.append(1)
class Meta(type):
    pass
@dataclasses.dataclass
class Made(metaclass=Meta):
    x: int
class Descriptor:
    def __get__(self, made, cls=None):
        return 0
    def __set__(self, made, value):
        CALLED.append(value)
@dataclasses.dataclass
class Described:
    x: int = Descriptor()
class Plain:
    pass
"""


@pytest.fixture
def ours(tmp_path, monkeypatch):
    """A module with classes of a program's own, and a function that pickles as a worker does."""
    put(str(tmp_path / "ours_x.py"), OURS)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = __import__("ours_x")
    program = cexec.LANE_PROGRAM
    scope = {"made": lambda: None, "ATOMS": (), "trusted": False, "protocol": 5, "LARGE": 1 << 16}
    scope["made"].__module__, scope["made"].__qualname__ = "cexec", "made"
    monkeypatch.setattr(cexec, "made", scope["made"], raising=False)
    exec("import copyreg, functools, io, operator, pickle, sys\n"
         + program[program.index("class Ways"):program.index("def set_up")], scope)
    module.scope, module.dumps = scope, lambda value: bytes(scope["dumps"](value))
    yield module
    del sys.modules["ours_x"]


def test_the_programs_own_classes_are_read_and_never_called(ours):
    point = ours.Point(3, [4])
    assert point.double == 6        # it is cached, and not sent
    looped = ours.Point(5)
    looped.y.append(looped)
    values = [ours.Color.RED, ours.Mode.A | ours.Mode.C, ~ours.Mode.A, ours.Pair(1, [2]), point, ours.Frozen(1, (2,)),
              {ours.Frozen(ours.Pair(1, 2)): ours.Child(7)}, ours.Abstract(1), ours.Missing(2, "no", "file")]
    data = [ours.dumps(value) for value in values + [looped, ours.Wrong(1, 2)]]
    ours.CALLED.clear()
    found = [loaded(each) for each in data]
    assert ours.CALLED == []
    error, found_loop = found.pop(), found.pop()
    assert found_loop.y[0] is found_loop
    assert found[:7] == values[:7] and vars(found[4]) == {"x": 3, "y": [4], "total": 3}
    assert [type(value) for value in found] == [type(value) for value in values]
    assert found[0] is ours.Color.RED and found[1] is values[1] and found[8].filename == "file"
    assert type(error) is ours.Wrong and error.args == ("1 and 2",) and (error.one, error.two) == (1, 2)


def made(kind, *rest, state=None, after=b""):
    """A pickle that a hostile worker writes: of made(), a state for what it gives, and opcodes after this."""
    body = pickle.dumps((kind, "ours_x") + rest, 4)[11:-1] if len(rest) else b""
    return (stack_global("cexec", "made")[:-1] + body + b"R"
            + (pickle.dumps(state, 4)[2:-1].replace(b"\x94", b"") + b"b" if state is not None else b"") + after + b".")


@pytest.mark.parametrize("data, why", [
    (made("dataclass", "Deleted"), "it has a __del__"), (made("dataclass", "Made"), "a metaclass of its own"),
    (made("dataclass", "Nobody"), "not found by its name"), (made("dataclass", "Descriptor.x"), "not found"),
    (made("dataclass", "Described", state={"x": 1}), "x is not data"),
    (made("dataclass", "Point", state={"is_safe": bool}), "is_safe is not data"),
    (made("dataclass", "Point", state={"double": 1}), "double is not data"),
    (made("dataclass", "Point", state={"__class__": 1}), "__class__ is not data"),
    (made("dataclass", "Point", state={"__eq__": 1}), "__eq__ is not data"),
    (made("dataclass", "Point", state=[1]), "does not write"), (made("dataclass", "Point", state={1: 1}), "not write"),
    (made("dataclass", "Plain"), "Plain is no dataclass"), (made("dataclass", "Color"), "metaclass of its own"),
    (made("dataclass", "Point", state={"x": 1}, after=b"}b"), "does not write"),        # a second state
    (made("dataclass", "Point", after=b"K\x01a"), "not write"), (made("dataclass", "Point", after=b"(K\x01e"), "not w"),
    (made("dataclass", "Point", after=b"K\x01K\x02s"), "not write"),
    (made("dataclass", "Point", after=b"(K\x01\x90"), "not write"),
    (made("enum", "Color", "RED", 1, state={"_value_": 2}), "does not write"),
    (made("enum", "Color", "GREEN", 1), "no such member"), (made("enum", "Mode", None, 64), "no such member"),
    (made("enum", "Mode", None, -64), "no such member"), (made("enum", "Strange", None, 3), "no such member"),
    (made("enum", "Making", None, 3), "no such member"),
    (made("enum", "Plain", "x", 1), "no Enum"), (made("enum", "Color", ["x"], 1), "no such member"),
    (made("tuple", "Pair", (1,)), "no named tuple"), (made("tuple", "Pair", [1, 2]), "no named tuple"),
    (made("tuple", "Plain", ()), "no named tuple"), (made("exception", "Plain", ()), "no exception"),
    (made("exception", "Wrong", (), state={"fatal": None}), "fatal is not data"),
    (made("exception", "Named", (), state={"path": 1}), "path is not data"),
    (made("exception", "Wrong", (), state={"__cause__": None}), "__cause__ is not data"),
    (made("other", "Wrong"), "not write"), (made(("dataclass",) * 3, "Wrong"), "not write"),
    (made("enum", 5), "not write"),
    (stack_global("ours_x", "Plain")[:-1] + b")\x81.", r'allow=\["ours_x.Plain"\]'),
    (stack_global("ours_x", "Color")[:-1] + b"K\x01\x85R.", "allow="), (stack_global("cexec", "made"), "not write"),
])
def test_what_the_programs_own_classes_are_refused(ours, data, why):
    ours.CALLED.clear()
    with pytest.raises(Exception, match=why):
        loaded(data)
    assert ours.CALLED == [] and ours.Color.RED.value == 1 and ours.Point.is_safe(None) is False


def test_a_class_with_its_own_way_needs_allow(ours):
    for allow in ([], ["ours_x.Plain"], ["ours_x"]):
        value = ours.Plain()
        value.x = ours.Color.BLUE
        data = ours.dumps([value])
        if allow:
            assert loaded(data, allow)[0].x is ours.Color.BLUE
        else:
            with pytest.raises(pickle.UnpicklingError, match="ours_x.Plain is not known here"):
                loaded(data, allow)
    with pytest.raises(pickle.UnpicklingError, match="not found by its name in a module that is imported here"):
        loaded(ours.dumps(ours.Wrong(1, 2)).replace(b"ours_x", b"antigr"))
    assert "antigr" not in sys.modules


def test_no_result_changes_a_class(ours):
    """By the state that pickle's BUILD sets on whatever it gets: on a class, a function, an Enum's member."""
    before = {cls: dict(vars(cls)) for cls in (fractions.Fraction, ours.Point, ours.Color, ours.Plain, OSError)}
    state = b"}\x8c\x06__eq__" + stack_global("builtins", "bool")[2:-1] + b"s"
    readers = [cexec.result_readers(allow) for allow in ((), EVERY_ALLOW + ["ours_x"])]
    for module, name in (("fractions", "Fraction"), ("ours_x", "Point"), ("ours_x", "Color"), ("ours_x", "Plain"),
                         ("builtins", "OSError"), ("ours_x", "Point.is_safe"), ("re", "_compile"), ("cexec", "made")):
        for reader in readers:
            for data in (state + b"b", b"N" + state + b"\x86b", state[1:-1] + b"s", b"(" + state[1:-1] + b"u"):
                with pytest.raises(Exception):      # noqa: B017
                    cexec.load_result(reader, stack_global(module, name)[:-1] + data + b".", 0)
    member = stack_global("ours_x", "Color")[:-1] + b"K\x01\x85R"
    with pytest.raises(ValueError):
        loaded(member + b"}\x8c\x07_value_K\x07sb.", ["ours_x"])
    assert {cls: dict(vars(cls)) for cls in before} == before and ours.Color.RED.value == 1
    assert fractions.Fraction(1, 2) != fractions.Fraction(1, 3)


BUILTIN, EVEN_DEEPER = functools.partial(stack_global, "builtins"), 2000000
TWINS = [(((1 << 61) - 1) * number).to_bytes(12, "little") for number in range(1, 100000)]         # of one hash
HUGE = b"\x8b" + struct.pack("<i", 1000001) + (1 << 8000000).to_bytes(1000001, "little")


def chain(module, name, before, after):
    """A pickle of objects each in the next, which C code would free one from inside the other."""
    return (stack_global(module, name)[:-1] + b"\x940" + (b"h\0" + before) * 2000 + b"h\0)R" + after * 2000 + b".")


UUID_OF = stack_global("uuid", "UUID")[2:-1] + b")\x81}\x8c\x03int\x8a\x0c%ssb"


@pytest.mark.parametrize("data, why", [
    (b"\x80\x04})" + b"\x85" * EVEN_DEEPER + b"Ns.", "deeper than 500"),
    (b"\x80\x04)" + b"\x94\x85" * EVEN_DEEPER + b".", "deeper than 500"),
    (b"\x80\x04)\x94" + b"".join(b"h%ch%c\x86\x94" % (n, n) for n in range(99)) + b"}hcNs.", "too long"),
    (b"\x80\x04\x8f()\x94" + b"".join(b"h%ch%c\x86\x94" % (n, n) for n in range(99)) + b"\x90.", "too long"),
    (b"\x80\x04()\x94" + b"".join(b"h%ch%c\x86\x94" % (n, n) for n in range(99)) + b"\x91.", "too long"),
    (b"\x80\x04(" + b"K\x01" * 100000 + b"t\x94}(" + b"h\x00N" * 100000 + b"u.", "too long"),
    (b"\x80\x04}(" + b"".join(b"\x8a\x0c%sN" % twin for twin in TWINS) + b"u.", "too long"),
    (b"\x80\x04\x8f(" + b"".join(UUID_OF % twin for twin in TWINS) + b"\x90.", "too long"),
    (BUILTIN("bytes")[:-1] + b"\x8a\x06\0\0\0\0\0\1\x85R.", "not write"),
    (BUILTIN("bytearray")[:-1] + b"\x8a\x06\0\0\0\0\0\1\x85R.", "bytearray of int"),
    (BUILTIN("tuple")[:-1] + BUILTIN("range")[2:-1] + b"K\0J\xff\xff\xff\x7f\x86R\x85R.", "not write"),
    (b"\x80\x04B\x10\x27\0\0" + b"x" * 10000 + b"\x94(" +
     (BUILTIN("bytearray")[2:-1] + b"h\0\x85R") * 10000 + b"t.", "too long"),
    (b"\x80\x04N\x94r\xff\xff\xff\x7f.", "opcode 114"), (b"\x80\x04\x8e\0\0\0\0\0\0\0\x7f", "too early"),
    (b"\x80\x05\x96\0\0\0\0\0\0\0\x7f.", "too early"), (b"\x80\x04\x8b\xff\xff\xff\xff.", "not write"),
    (pickle.dumps(UnicodeDecodeError("a", b"b", 0, 1, "r"), 4).replace(b"K\x00", b"J\0\0\0\x80"), "not in its text"),
    (pickle.dumps(UnicodeDecodeError("a", b"b", 0, 1, "r"), 4)[:-1] + b"}\x8c\x05startJ\0\0\0\x80sb.",
     "start is not data"),
    (pickle.dumps(UnicodeEncodeError("a", "b", 0, 1, "r"), 4).replace(b"K\x01", b"K\x02"), "not in its text"),
    (pickle.dumps(SyntaxError("a", ("f", 1, 2, "text")), 4).replace(b"K\x01", b"]"), "a place that is none"),
    (pickle.dumps([re.compile("x" * 200 + str(n)) for n in range(30)], 4), "more than 4096 characters"),
    (pickle.dumps(re.compile("x"), 4).replace(b"K ", b"K\xa0"), "not write"),           # DEBUG: it prints
    (b"\x80\x04" + pickle.dumps(7 ** 200000, 4)[11:-1] + b"\x94(" + (stack_global("fractions", "Fraction")[2:-1] +
                                                                       b"h\0h\0\x86R") * 99 + b"t.", "too long"),
    (b"\x80\x04.", "not enough values"), (b"\x80\x04" + b"N" * 500 + b"u.", "find MARK"), (b"", "too early"),
    (pickle.dumps(datetime.date(2026, 1, 2), 4).replace(b"\xea\x01\x02", b"\xea\x01\xff"), "day"),
    (pickle.dumps(collections.defaultdict(list), 4).replace(b"list", b"iter"), "iter is not known"),
    (pickle.dumps(slice(1, 2), 4).replace(b"K\x01", b")"), "slice of tuple"),
    (chain("collections", "deque", b")R", b"a"), "in each other"),
    (chain("collections", "defaultdict", b")RN", b"s"), "in each other"),
    (chain("builtins", "OSError", b"K\2N", b"\x87R"), "of a file that is none"),
    (chain("builtins", "ImportError", b")R}\x8c\4name", b"sb"), "of a name that is none"),
    (BUILTIN("ValueError")[:-1] + b"\x94(" + b"N" * 10000 + b"t\x94(" + b"h\0h\1R" * 10000 + b"t.", "too long"),
    (b"\x80\x04}(" + b"".join(
        b"(K\1\x91\x94" + b"".join(b"(h%cK\0\x86h%cK\1\x86\x91\x94" % (n, n) for n in range(first, first + 50)) + b"N"
        for first in (0, 51)) + b"u.", "too long"),
    (b"\x80\x04\x8f(" + HUGE + stack_global("decimal", "Decimal")[2:-1] + b"\x8c\x14%20d\x85R\x90." % hash(
        1 << 8000000), "only one is a number"),
    (stack_global("collections", "Counter")[:-1] + b"\x94}\x94(" + b"".join(
        b"\x8a\x0c%sN" % twin for twin in TWINS[:500]) + b"u(" + b"h\0h\1\x85R" * 100 + b"t.", "too long"),
    (pickle.dumps(re.compile("[a-z0-9]" * 20, re.I), 4), "more than 4096 characters"),
    (pickle.dumps(re.compile("(?i)" + "[a-z0-9]" * 20), 4).replace(b"K\x22", b"K\0"), "more than 4096 characters"),
    (pickle.dumps(re.compile("(?i)" + "[a-z0-9]" * 20), 4).replace(b"K\x22", b"K\x20"), "more than 4096 characters"),
], ids=range(40))
def test_no_result_is_a_bomb_or_a_crash(data, why):
    """Each would take for ever, or all the memory, or kill this process."""
    with pytest.raises(Exception, match=why):
        loaded(data)


def test_what_has_the_same_hash_is_read():
    """-1 and -2 have; and few deques in deques, equal frozen sets and ranges of letters are no bombs."""
    for value in ({(-1, "a"): 1, (-2, "a"): 2, (-1.0, decimal.Decimal(-2)): 3, (-2, decimal.Decimal(-1)): 4},
                  {frozenset([(1, 2)]): frozenset([(1, 2)])}, {decimal.Decimal(-1), -2, -1.5}, {0, 2 ** 61 - 1},
                  collections.deque([collections.deque([1])] * 50), {fractions.Fraction(1, 3): range(3), range(5): 1},
                  re.compile("[a-z0-9_-]+", re.I)):
        assert loaded(pickle.dumps(value, 4)) == value


def test_what_python_says_of_an_error_imports_and_calls_nothing(ours):
    """Its traceback imports the module that an ImportError names, for a hint; an AttributeError brings its args."""
    words = [b"\x8c" + bytes([len(word)]) + word for word in (b"x", b"name", b"antigravity", b"name_from", b"flyy")]
    found = loaded(BUILTIN("ImportError")[:-1] + words[0] + b"\x85R}(" + b"".join(words[1:]) + b"ub.")
    assert found.name == "antigravity" and getattr(found, "name_from", None) is None
    "".join(traceback.format_exception(type(found), found, None))
    assert "antigravity" not in sys.modules
    found = loaded(BUILTIN("AttributeError")[:-1] + words[0] + b"\x85R}(" + words[1] + b"N\x8c\4args" + words[0] +
                   b"\x85ub.")
    assert found.args == ("x",)
    for error in (ImportError("x", name="y"), decimal.InvalidOperation([decimal.ConversionSyntax])):
        assert repr(loaded(ours.dumps(error))) == repr(error)


def test_what_a_worker_sends_at_random(ours):
    """Pickles of each kind, with bytes changed, left out, doubled and exchanged: no result does any harm."""
    chance = random.Random(22)
    values = [DATA, ours.Point(1), [ours.Color.RED, ours.Mode.A], ours.Wrong(1, 2), ours.Pair(1, 2), ours.Frozen(1),
              {ours.Frozen((1, 2)): 1}, datetime.datetime.now(datetime.timezone.utc), fractions.Fraction(1, 3),
              collections.OrderedDict(a=1), collections.Counter("abc"), collections.deque([1], 3), re.compile("a+"),
              UnicodeDecodeError("a", b"b", 0, 1, "r"), OSError(2, "x", "y"), pathlib.Path("/x"), time.gmtime(0),
              collections.defaultdict(list, a=[1])]
    whole = [ours.dumps(value) for value in values]
    before = {cls: dict(vars(cls)) for cls in (ours.Point, ours.Color, ours.Mode, ours.Pair, fractions.Fraction)}
    readers, modules = [cexec.result_readers(allow) for allow in ((), EVERY_ALLOW)], set(sys.modules)
    ours.CALLED.clear()
    opcodes = sorted(cexec.Reader.OPS) + [ord(".")]
    for turn in range(6000):
        data = bytearray(chance.choice(whole))
        for _ in range(chance.randint(1, 6)):
            place, other = chance.randrange(len(data)), chance.choice(whole)
            cut = chance.randrange(len(other))
            data[place:place + chance.randint(0, 4)] = chance.choice([
                bytes([chance.choice(opcodes)]), bytes([chance.randrange(256)]), b"", data[place:place + 9],
                other[cut:cut + chance.randint(1, 40)], b"b", b"R", b"\x93", b"h" + bytes([chance.randrange(20)])])
            data = data or bytearray(b".")
        with contextlib.suppress(Exception):
            repr(cexec.load_result(readers[turn % 2], bytes(data), 0))
    assert ours.CALLED == [] and ours.Color.RED.value == 1
    assert {cls: set(vars(cls)) for cls in before} == {cls: set(before[cls]) for cls in before}
    assert all(vars(cls)[name] is there for cls, names in before.items() for name, there in names.items()
               if callable(there))
    new = {name for name in set(sys.modules) - modules if not name.startswith(("encodings", "_"))}
    assert not new - set(cexec.MAKERS)


NUMPY_VALUES = """
import numpy
VALUES = [
    numpy.arange(12.0).reshape(3, 4), numpy.arange(12).reshape(3, 4).T, numpy.arange(24).reshape(2, 3, 4)[::2, :, ::-1],
    numpy.array(3.5), numpy.zeros((0, 3)), numpy.array([True, False]), numpy.array(["a", "bcd"]), numpy.array([b"x"]),
    numpy.array(["2020-01-01"], "M8[D]"), numpy.array([1], "m8[25s]"), numpy.array([1, 2], ">i4"), numpy.array([1j]),
    numpy.array([(1, 2.5, "x")], [("a", "i4"), ("b", "f8"), ("c", "U3")]), numpy.float64(3), numpy.bool_(True),
    numpy.int32(5), numpy.datetime64("2020-01-01"), numpy.str_("abc"), numpy.float16(1), numpy.dtype("f8"),
    numpy.zeros(3, numpy.dtype([("a", "i1"), ("b", "f8", (2,))], align=True))]
"""


def with_package(name, python=PYTHON):
    """Skips the test if this Python lacks the package, which the suite's own always has in CI."""
    if subprocess.call([python, "-c", "import " + name], stderr=subprocess.DEVNULL):
        if IN_CI and python == sys.executable:
            pytest.fail("the tests' Python has no " + name)
        pytest.skip("%s has no %s" % (python, name))


def test_numpys_arrays_are_read(ours):
    with_package("numpy", sys.executable)
    scope = {}
    exec(NUMPY_VALUES, scope)
    for value in scope["VALUES"]:
        found = loaded(ours.dumps(value))
        assert type(found) is type(value) and repr(found) == repr(value) or getattr(value.dtype, "names", None)
        if value.shape:
            assert found.flags.writeable and found.dtype == value.dtype and (found == value).all()
    big = scope["numpy"].arange(10)
    big.flags.writeable = False
    assert loaded(ours.dumps([big]))[0].flags.writeable
    for value in (scope["numpy"].array([object()]), scope["numpy"].ma.array([1])):
        with pytest.raises(pickle.UnpicklingError, match="only with trust=True"):
            loaded(ours.dumps(value), ["numpy"])


@pytest.mark.parametrize("what, shape, raw", [
    ("|O", (1,), b"12345678"), ("<f8", (1 << 61,), b""), ("<f8", (-1,), b"x"), ("<f8", (-1, -1), b"12345678"),
    ("|b1", (1,), b"\x02"), ("<U1", (1,), b"\xff\xff\xff\x7f"), ([("a", "|b1")], (1,), b"\x02"),
    ("<f8", (True,), b"12345678"),
    ("|S0", (1 << 40,), b""), ("numpy.object_", (1,), b"12345678"), ("f8,O", (1,), b"x" * 16),
    ([("a", "|O")], (1,), b"x" * 8),
    ("<f8", [1], b"12345678"), ("<f8", (1,), "12345678"), (["a"], (1,), b"x"), ([("a", [("b", "O")])], (1,), b"x" * 8),
    ([("a", "<f8", Harm())], (1,), b"12345678"), ([("a", "<f8", [1])], (1,), b"12345678"),
    ([(("a", Harm()), "<f8")], (1,), b"12345678"), ([("a", "<f8", (Harm(),))], (1,), b"12345678"),
    (functools.reduce(lambda one, _: [(name, one) for name in "abcdefgh"], range(6), "|i1"), (), b"x" * 8 ** 6),
    ("<f8", (1,) * 100, b"12345678"), ("|V99999999999", (1,), b""), ({"a": 1}, (1,), b"")])
def test_what_numpy_would_take_on_trust_is_refused(what, shape, raw):
    with_package("numpy", sys.executable)
    with pytest.raises(Exception):      # noqa: B017
        cexec.numpy_array(what, shape, "C", raw)


@pytest.mark.parametrize("order", ["A", "K", "c", "", None, b"C", 1, ["C"]])
def test_an_array_has_one_of_two_orders(order):
    with_package("numpy", sys.executable)
    assert cexec.numpy_array("|u1", (2, 3), "F", b"abcdef").tolist() == [[97, 99, 101], [98, 100, 102]]
    with pytest.raises(ValueError, match="does not write"):
        cexec.numpy_array("|u1", (2, 3), order, b"abcdef")


@pytest.mark.parametrize("what", ["|O", [("a", "|O")], [("a", "<f8"), ("b", [("c", "|O")])]])
def test_an_array_of_objects_is_refused_even_if_its_dtype_was_let_through(monkeypatch, what):
    """Its bytes would be addresses."""
    with_package("numpy", sys.executable)
    monkeypatch.setattr(cexec, "check_dtype", lambda what, seen: None)
    with pytest.raises(ValueError, match="a numpy array of "):
        cexec.numpy_array(what, (), "C", bytes(16 if len(what) == 2 and what != "|O" else 8))


def test_no_key_of_numpy_is_compared_with_what_it_would_make_an_array_of(ours):
    with_package("numpy", sys.executable)
    import numpy
    other = next(key for key in ((range(n, 10 ** 8),) for n in range(1000)) if abs(hash(key)) < 1 << 60)
    for keys in ([numpy.int64(hash(other)), other], [other, numpy.int64(hash(other))],
                 [(1, numpy.int64(hash(other))), (1, other)]):
        parts = [bytes(ours.dumps(key))[2:-1].replace(b"\x94", b"") for key in keys]
        data = b"\x80\x04}(" + b"".join(part + b"N" for part in parts) + b"u."
        with pytest.raises(ValueError, match="only one is a number"):
            loaded(re.sub(b"\x95.{8}", b"", data, flags=re.DOTALL))
    value = {numpy.int64(-1): 1, -2: 2, (numpy.int64(-1), "a"): 3, (numpy.int64(-2), "a"): 4}
    assert loaded(ours.dumps(value)) == value


def test_only_what_is_plain_is_read_by_pickle():
    numbers, text, flat = [1, 300, 70000, -1, 2 ** 50, 1.5, True, None], "x" * 70, [(1, 2.5), (1, "a", b"b", None)]
    for value, kinds in ((numbers * 500, 3), ([text, b"y" * 300, text], 3), ({"a": [{"b": 1}, {2}]}, 1), (flat, 2),
                         ([numbers, flat, {}], 0), ({(1, 2): 3}, 0), ([(1, (2,))], 0), ([2 ** 70], 0), (int, 0),
                         (2j, 0), ([bytearray(1)], 0), ([()], 0), (frozenset([1]), 0), (KeyError(1), 0)):
        data = b".." + pickle.dumps(value, 4)
        assert [cexec.is_plain(data, 2, keyed) for keyed in (True, False)] == [bool(kinds & 1), bool(kinds & 2)], value
        assert repr(loaded(data[2:])) == repr(value)
    for data in (b"", b"\x80", b"\x80\x04", b"\x80\x04N", b"..N.", b"N.", b"\x80\x04X\xff\xff\xff\xffN.",
                 b"\x80\x04X\1\0.",
                 b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xff.", b"\x80\x04N2.", b"\x80\x04h\x00\x94h\x00\x86.",
                 b"\x80\x04))\x86.", b"\x80\x04}\x91.", b"\x80\x04Nq\0."):
        assert not any(cexec.is_plain(data, 0, keyed) for keyed in (True, False)), data
    assert {opcode for opcode in range(256) for keyed in (True, False)
            if cexec.plain_run(keyed).match(bytes([opcode]) + b"\0" * 99)} == set(
                b"KGJMN\x88\x89\x8a\x8cChj\x95}us\x8f\x90\x94](ae")


def test_with_trust_a_result_is_read_as_pickle_does(mine):
    readers = cexec.result_readers((), trust=True)
    assert cexec.load_result(readers, b".." + pickle.dumps(mine.function, 4), 2) is mine.function
    assert cexec.load_result(readers, pickle.dumps(Harm(len, ("abc",)), 4), 0) == 3


def test_an_exception_that_cannot_be_made_here_is_told(mine):
    def told(error, allow=()):
        text = b"Traceback ...\n\x1b[2Jmine_x.Sneaky: why"
        data = cexec.TEXT_SIZE.pack(len(text)) + text + (pickle.dumps(error) if error else b"")
        return cexec.load_error(cexec.result_readers(allow), data, 0, "box")
    for error, allow, word in ((mine.Sneaky(1, 2), (), "mine_x.Sneaky is not known here"),
                               (mine.Sneaky(1, 2), ["mine_x"], "missing 1 required"),
                               (None, (), "it cannot be pickled"),
                               ("no exception", (), "no exception")):
        found = told(error, allow)
        assert type(found) is pickle.UnpicklingError and word in str(found) and "mine_x.Sneaky: why" in str(found)
        assert "On box:\nTraceback ...\n\\x1b[2J" in str(found.__cause__)
    assert told(KeyError(1)).args == (1,)


# ---- Python: cexec.Executor ------------------------------------------------


@pytest.fixture
def pooled(cluster, monkeypatch):
    """A cluster with a worker for an Executor in this process; script() runs a main program with it to its end."""
    live_in(cluster, monkeypatch)
    monkeypatch.setenv("CEXEC_TIMEOUT_ACCEPT", "20")
    cluster.serving = cluster.worker(*LANE, env={"CONCURRENCY": "2", "BOOST": "0"})
    cluster.script = functools.partial(main_program, cluster)
    return cluster


def main_program(cluster, text, name="main.py", before=(), python=PYTHON, terminal=False, env=()):
    """What a main program in a file prints, standard error too; POOL in it is the Executor's public key.

    terminal: its output is a terminal.
    """
    path = cluster.path("program/" + name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    put(path, "import cexec\nPOOL = %r\n%s" % (cluster.pub, textwrap.dedent(text)))
    master, slave = pty.openpty() if terminal else (None, None)
    done = cluster.do([python, *before, *([path] if not before else [])], stderr=subprocess.STDOUT,
                      stdout=slave if terminal else subprocess.PIPE, env=dict(env, PYTHONPATH=HERE),
                      cwd=cluster.path("program"))
    if terminal:
        os.close(slave)
        return read_all(master).decode().replace("\r\n", "\n")
    return done.stdout.decode()


def test_the_main_programs_functions(pooled):
    """With prints there, of the function and of a process that it starts, and what it allows."""
    out = pooled.script("""
        import os, sys
        class Point:
            def __init__(self, x):
                self.x = x
        def double(x):
            return x * 2
        def talk(word):
            print(word, "\\x1b[2J")
            print("error", file=sys.stderr)
            os.system("echo child")
            os.write(1, b"no newline")
            return __name__, sys.argv[1:]
        if __name__ == "__main__":
            with cexec.Executor(POOL, allow=["__main__.Point"]) as pool:
                assert list(pool.map(double, range(100))) == [2 * x for x in range(100)]
                assert list(pool.map(double, range(100), chunksize=7)) == [2 * x for x in range(100)]
                assert pool.submit(Point, 3).result().x == 3
                result = pool.submit(talk, "h\\xe9llo").result()
            print(result)
        """)
    lines = ["%s: %s" % (os.uname().nodename, line) for line in ("h\xe9llo \\x1b[2J", "error", "child", "no newline")]
    assert out.splitlines() == lines + ["('__mp_main__', [])"]


def test_modules_beside_the_main_program(pooled):
    """A module, a package with relative imports, one without __init__; and nothing from elsewhere."""
    for name, text in (("beside.py", "from pack.deep import leaf\nfrom bare import twig\n\ndef both():\n"
                                     "    return leaf.VALUE + twig.VALUE\n"),
                       ("pack/__init__.py", "VALUE = 40\n"), ("pack/deep/__init__.py", ""),
                       ("pack/deep/leaf.py", "from .. import VALUE\n"), ("bare/twig.py", "VALUE = 2\n")):
        os.makedirs(os.path.dirname(pooled.path("program/" + name)), exist_ok=True)
        put(pooled.path("program/" + name), text)
    put(pooled.path("outside.py"), "SECRET = 1\n")
    os.symlink("../outside.py", pooled.path("program/linked.py"))
    out = pooled.script("""
        import beside
        def missing(name):
            return __import__(name).__name__
        if __name__ == "__main__":
            with cexec.Executor(POOL, 1) as pool:
                print(pool.submit(beside.both).result(), pool.submit(missing, "json").result())
                for name in ("outside", "linked", "pack.nothing", "nowhere_x"):
                    print(type(pool.submit(missing, name).exception()).__name__)
        """)
    assert out == "42 json\n" + "ModuleNotFoundError\n" * 4


def test_a_directory_of_data_hides_no_module(pooled):
    """Neither one of the worker's Python nor, from the first of two directories, one in the second."""
    for name in ("csv", "both"):
        os.makedirs(pooled.path("program/" + name))
    put(pooled.path("program/csv/table.csv"), "a,b\n")
    os.makedirs(pooled.path("program/second"))
    put(pooled.path("program/second/both.py"), "VALUE = 42\n")
    assert pooled.script("""
        import sys
        sys.path.insert(0, "second")
        def read():
            import csv, both
            return next(csv.reader(["a,b"])), both.VALUE
        if __name__ == "__main__":
            with cexec.Executor(POOL) as pool:
                print(pool.submit(read).result())
        """) == "(['a', 'b'], 42)\n"


def test_a_directory_hides_no_module_that_another_finder_has(pooled, tmp_path, monkeypatch):
    """As that of a package which is installed editable: on the worker, and here."""
    os.makedirs(pooled.path("program/data"))
    put(pooled.path("elsewhere.py"), "VALUE = 42\n")
    assert pooled.script("""
        import importlib.util, sys
        class Finder:
            @staticmethod
            def find_spec(name, path=None, target=None):
                return importlib.util.spec_from_file_location("data", %r) if name == "data" else None
        def read():
            sys.meta_path.append(Finder)
            import data
            return data.VALUE
        if __name__ == "__main__":
            with cexec.Executor(POOL) as pool:
                print(pool.submit(read).result())
        """ % pooled.path("elsewhere.py")) == "42\n"
    os.makedirs(str(tmp_path / "data_x"))
    monkeypatch.setattr(sys, "path", [str(tmp_path)] + sys.path)
    assert cexec.Program().module("data_x") == (None, str(tmp_path / "data_x"), True)
    spec = importlib.util.spec_from_file_location("data_x", pooled.path("elsewhere.py"))
    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=lambda *_: spec)] + sys.meta_path)
    assert cexec.Program().module("data_x") is None


def test_where_an_import_does_not_look_beside_the_main_program_nothing_is_sent(pooled):
    if int(python_version(PYTHON).split(".")[1]) < 11:
        pytest.skip("python3 -P came with Python 3.11")
    text = """
        if __name__ == "__main__":
            print(cexec.Executor(POOL)._pool.program.module("beside"))
        """
    os.makedirs(pooled.path("program"))
    put(pooled.path("program/beside.py"), "")
    assert "beside.py" in pooled.script(text)
    assert pooled.script(text, before=["-P", pooled.path("program/main.py")]) == "None\n"


def test_a_module_that_is_edited_during_the_run_stays_as_it_was_sent_first(tmp_path, monkeypatch):
    put(tmp_path / "beside.py", "VALUE = 1\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)] + sys.path)
    program = cexec.Program()
    first = program.module("beside")
    put(tmp_path / "beside.py", "VALUE = 2\n")
    assert program.module("beside") == first and first[0] == b"VALUE = 1\n"
    os.unlink(str(tmp_path / "beside.py"))
    assert "beside" in program.names() and program.module("beside") == first      # for lanes that begin later


def test_a_call_whose_exception_cannot_be_shown_runs_once(pooled):
    out = pooled.script("""
        def spoil(path):
            with open(path, "a") as file:
                file.write("x")
            raise SyntaxError("bad", ("file", 1, 1, b"bytes"))
        if __name__ == "__main__":
            with cexec.Executor(POOL) as pool:
                print(isinstance(pool.submit(spoil, %r).exception(), (RuntimeError, cexec.Failed)))
        """ % pooled.path("count"))
    assert out == "False\n" and read(pooled.path("count")) in ("x", b"x")


def test_a_module_of_a_package_as_the_main_program(pooled):
    """python -m package.main, whose functions import what is in the package."""
    for name, text in (("pack/__init__.py", ""), ("pack/other.py", "VALUE = 42\n")):
        os.makedirs(os.path.dirname(pooled.path("program/" + name)), exist_ok=True)
        put(pooled.path("program/" + name), text)
    assert pooled.script("""
        from . import other
        def answer():
            from .other import VALUE
            return VALUE + other.VALUE
        if __name__ == "__main__":
            with cexec.Executor(POOL) as pool:
                print(pool.submit(answer).result())
        """, name="pack/main.py", before=["-m", "pack.main"]) == "84\n"


def test_what_a_worker_may_read(tmp_path, monkeypatch):
    """It is the worker that asks: modules below the main program's directory, and nothing else."""
    for name in ("top.py", "pack/__init__.py", "pack/leaf.py", "text.txt", "with-dash.py"):
        os.makedirs(os.path.dirname(str(tmp_path / "main" / name)), exist_ok=True)
        put(str(tmp_path / "main" / name), "# " + name)
    put(str(tmp_path / "secret.py"), "SECRET")
    os.symlink("../secret.py", str(tmp_path / "main/link.py"))
    os.symlink("..", str(tmp_path / "main/up"))
    os.mkfifo(str(tmp_path / "main/fifo.py"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "main")] + sys.path[1:])
    program = cexec.Program()
    assert program.roots[-1:] == [str(tmp_path / "main")]
    assert {"top", "pack"} <= set(program.names()) and "text" not in program.names()
    assert program.module("top") == (b"# top.py", str(tmp_path / "main/top.py"), False)
    assert program.module("pack")[1:] == (str(tmp_path / "main/pack/__init__.py"), True)
    assert program.module("pack.leaf")[0] == b"# pack/leaf.py"
    for name in ("", ".", "..secret", "...", "../secret", "/etc/passwd", "link", "up.secret", "up", "fifo", "text.txt",
                 "text", "with-dash", "top.py", "pack/leaf", "pack.", "top\0", "nowhere", "pack..leaf"):
        assert program.module(name) is None, name
    monkeypatch.setattr(sys, "path", [os.path.dirname(os.__file__)])       # the library is on the worker
    assert cexec.Program().roots == [root for root in program.roots if root != str(tmp_path / "main")]


def test_what_cannot_be_sent_is_refused_with_advice(pooled):
    """Without cloudpickle, it is the remedy; with it, some things are not data."""
    out = pooled.script("""
        import threading
        lock = threading.Lock()
        def outer():
            def inner():
                return lock
            return inner
        if __name__ == "__main__":
            cexec.cloudpickle_directory = lambda: None
            with cexec.Executor(POOL) as pool:
                for function in (lambda: 1, outer()):
                    print(repr(pool.submit(function).exception()))
                print(pool.submit(pow, 2, 3).result())
        """)
    assert out.count("PicklingError(") == out.count("pip install cloudpickle") == 2 and out.endswith("\n8\n"), out
    out = pooled.script("", before=["-c", "if 1:\n def f(): pass\n import cexec\n"
                                          " cexec.cloudpickle_directory = lambda: None\n"
                                          " pool = cexec.Executor(%r)\n print(repr(pool.submit(f).exception()))\n"
                                          " print(pool.submit(len, '__main__').result())" % pooled.pub])
    assert "is defined in no file (a notebook, an interactive session, python -c, standard input)" in out
    assert "pip install cloudpickle" in out and out.endswith("\n8\n"), out
    with_package("cloudpickle")
    out = pooled.script("", before=["-c", "if 1:\n import threading\n lock = threading.Lock()\n def f(): return lock\n"
                                          " import cexec\n print(repr(cexec.Executor(%r).submit(f).exception()))"
                                          % pooled.pub])
    assert "PicklingError(" in out and "must be data or code" in out, out


# A program as it is typed into a notebook or a prompt: {0} is the public key
CELLS = ["""
import dataclasses, enum
import cexec
import functools, helper
factor = 3
""", """
@functools.lru_cache()
def choices(number):
    return number if number < 2 else choices(number - 1) + choices(number - 2)
""", """
@dataclasses.dataclass
class Point:
    x: int
""", """
class Color(enum.Enum):
    RED = 1
""", """
class Wrong(Exception):
    pass
""", """
class Plain:
    pass
""", """
def scaled(point):
    if point.x < 0:
        raise Wrong("negative")
    return [Point(point.x * factor), Color.RED, helper.VALUE]
""", """
def adder(more):
    return lambda number: number + more - choices(1) + choices(2)
""", """
with cexec.Executor({0!r}, 1, allow=["__main__.Plain"]) as pool:
    made = pool.submit(scaled, Point(2)).result()
    added = list(pool.map(adder(5), range(3))) + list(pool.map(adder(5), range(3), chunksize=2))
    wrong = pool.submit(scaled, Point(-1)).exception()
    plain = pool.submit(lambda: Plain()).result()
""", """
print("it", "made", made, type(made[0]) is Point, added, [wrong], type(wrong) is Wrong, type(plain) is Plain)
"""]
MADE = "it made [Point(x=6), <Color.RED: 1>, 42] True [5, 6, 7, 5, 6, 7] [Wrong('negative')] True True\n"


@pytest.fixture
def prompted(pooled):
    """What is pooled, with a module beside a program that has no file; run() returns all that a command prints."""
    with_package("cloudpickle")
    pooled.cells = [cell.strip("\n").format(pooled.pub) + "\n" for cell in CELLS]
    os.makedirs(pooled.path("program"), exist_ok=True)
    put(pooled.path("program/helper.py"), "VALUE = 42\n")

    def run(*words, env=None, **options):
        done = pooled.do([PYTHON, *words], stderr=subprocess.STDOUT, cwd=pooled.path("program"),
                         env=dict(homes(pooled), **(env or {})), **options)
        return done.stdout.decode()
    pooled.python = run
    return pooled


def homes(cluster):
    """Variables by which nothing is written or read in the user's home."""
    names = "HOME IPYTHONDIR JUPYTER_CONFIG_DIR JUPYTER_DATA_DIR JUPYTER_RUNTIME_DIR"
    return dict({name: cluster.path("home") for name in names.split()}, PYTHONPATH=HERE, TERM="dumb")


def test_functions_typed_at_a_prompt_or_read_from_standard_input(prompted):
    text = "\n".join(prompted.cells)
    assert prompted.python("-c", text) == MADE
    assert prompted.python("-", input=text.encode()) == MADE
    put(prompted.path("program/script.py"), text)      # without the guard: -i makes a prompt of it
    assert prompted.python("-i", "script.py", stdin=subprocess.DEVNULL).startswith(MADE)
    master, slave = pty.openpty()
    try:
        prompt = prompted.popen([PYTHON, "-i", "-q"], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
                             cwd=prompted.path("program"), env=homes(prompted))
        said = b""
        for cell in prompted.cells + ["exit()\n"]:
            os.write(master, (cell + "\n").encode())
        while b"\nit made " not in said:
            assert select.select([master], [], [], PATIENCE)[0], said
            said += os.read(master, 4096)
    finally:
        os.close(slave)
        os.close(master)
    assert MADE.strip() in said.decode().replace("\r", ""), said
    prompt.wait(PATIENCE)


def test_a_function_by_value_is_as_it_was_when_it_was_submitted(prompted):
    """A notebook's next cell may change what calls use that still wait."""
    assert prompted.python("-c", textwrap.dedent("""
        import time
        import cexec
        factor = 0
        def scaled(number):
            return number * factor
        with cexec.Executor(%r, 1) as pool:
            first = pool.submit(time.sleep, 1)
            for factor in 2, 3, 4:
                if factor == 2:
                    calls = pool.submit(scaled, 1), pool.map(scaled, [1]), pool.map(scaled, [1, 1], chunksize=2)
            print(first.result(), calls[0].result(), list(calls[1]), list(calls[2]))
        """ % prompted.pub)) == "None 2 [2] [2, 2]\n"


@pytest.mark.skipif(sys.version_info < (3, 8), reason="pickle has no buffers")
def test_what_waits_in_a_function_is_a_copy_of_what_may_change():
    with_package("cloudpickle", sys.executable)
    data, program = bytearray(cexec.LARGE), SimpleNamespace(text=b"", cloudpickle=True)
    for function in (len, lambda data: 0):
        kept = cexec.Shared(functools.partial(function, memoryview(data))).pickled(5, program)
        data[0] += 1
        assert pickle.loads(kept.data).args[0][0] == data[0] - 1 and not kept.buffers
        assert len(cexec.Shared(functools.partial(function, bytes(data))).pickled(5, program).buffers) == 1


def test_functions_by_value_share_what_one_of_them_sets(prompted):
    """As an initializer does, or a function that loads its data once."""
    assert prompted.python("-c", textwrap.dedent("""
        import cexec
        def load():
            global table
            table = [40]
        def look(number):
            table[0] += 1
            return table[0] * number
        with cexec.Executor(%r, 1, initializer=load) as pool:
            print(list(pool.map(look, [1, 2])), pool.submit(lambda: table).result())
        """ % prompted.pub)) == "[41, 84] [42]\n"


def test_trust_brings_back_what_came_by_value(prompted):
    """Objects of its classes, also of one that is defined inside a function, and functions."""
    text = """
        import cexec
        class Plain:
            pass
        def local():
            class Local:
                pass
            return Local
        Local = local()
        def use():
            return pool
        with cexec.Executor(%r, 1, trust=True) as pool:
            made = pool.submit(lambda: [Plain(), Local(), lambda: 42]).result()
            print([type(made[0]) is Plain, type(made[1]) is Local, made[2]()], pool.submit(use).exception())
        """ % prompted.pub
    out = prompted.python("-c", textwrap.dedent(text))
    assert out.startswith("[True, True, 42] a function that runs on a worker cannot use the Executor: "), out


def test_functions_in_cells_of_a_notebook_and_in_ipython(prompted):
    for name in ("nbconvert", "ipykernel", "IPython"):
        with_package(name)
    cells = [{"cell_type": "code", "source": cell, "metadata": {}, "outputs": [], "execution_count": None}
             for cell in prompted.cells]
    notebook = {"cells": cells, "nbformat": 4, "nbformat_minor": 4, "metadata": {
        "kernelspec": {"name": "python3", "display_name": "", "language": "python"}}}
    put(prompted.path("program/book.ipynb"), json.dumps(notebook))
    said = prompted.python("-m", "nbconvert", "--to", "notebook", "--execute", "--output", "done", "book.ipynb")
    assert os.path.exists(prompted.path("program/done.ipynb")), said
    outputs = json.loads(read(prompted.path("program/done.ipynb")).decode())["cells"][-1]["outputs"]
    assert ["".join(output.get("text", output)) for output in outputs] == [MADE]
    put(prompted.path("program/script.py"), "\n".join(prompted.cells))
    assert prompted.python("-m", "IPython", "--colors=NoColor", "script.py").endswith(MADE)


def test_functions_of_exec_doctest_and_pytest(prompted):
    """The module of a doctest and of a test is beside the program; its functions inside others go by value."""
    put(prompted.path("program/told.py"), textwrap.dedent('''
        """
        >>> import cexec
        >>> def triple(number):
        ...     return 3 * number + helper.VALUE
        >>> import helper
        >>> with cexec.Executor(%r) as pool:
        ...     print(pool.submit(triple, 2).result(), pool.submit(double, 2).result())
        48 4
        """
        def double(number):
            return 2 * number
        def test_it():
            import cexec
            with cexec.Executor(%r) as pool:
                assert pool.submit(lambda: double(21)).result() == pool.submit(double, 21).result() == 42
        ''' % (prompted.pub, prompted.pub)))
    assert prompted.python("-m", "doctest", "told.py") == ""
    assert "\n1 passed" in prompted.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "told.py")
    assert prompted.python("-c", "import cexec\nspace = {}\nexec('def f(): return 42', space)\nwith cexec.Executor(%r) "
                                 "as pool: print(pool.submit(space['f']).result())" % prompted.pub) == "42\n"


def test_modules_of_a_zipapp(prompted):
    """And functions of its __main__, which cannot be imported."""
    with zipfile.ZipFile(prompted.path("program/app.pyz"), "w") as file:
        file.writestr("__main__.py", "import cexec\nfrom inside import leaf\ndef both():\n    return leaf.double(21)\n"
                                     "with cexec.Executor(%r) as pool:\n"
                                     "    print(pool.submit(leaf.double, 2).result(), pool.submit(both).result())\n"
                      % prompted.pub)
        file.writestr("inside/__init__.py", "")
        file.writestr("inside/leaf.py", "from bare.twig import TWO\ndef double(number):\n    return TWO * number\n")
        file.writestr("bare/", "")
        file.writestr("bare/twig.py", "TWO = 2\n")
    assert prompted.python("app.pyz") == "4 42\n"


def test_modules_of_other_roots_are_sent_where_send_names_them(pooled):
    """A directory of PYTHONPATH, a zip, an editable install.  No directory of data hides one."""
    for name, text in (("path/common/one.py", "VALUE = 1\n"), ("path/data/table.csv", ""),
                       ("path/twice.py", "VALUE = 3\n"), ("src/common/two.py", "VALUE = 2\n"),
                       ("src/data/__init__.py", "VALUE = 4\n"),
                       ("src/data/leaf.py", "VALUE = 5\n"), ("path/data/leaf.py", "VALUE = 'not of this package'\n"),
                       ("site/src.pth", pooled.path("src") + "\n")):
        os.makedirs(os.path.dirname(pooled.path(name)), exist_ok=True)
        put(pooled.path(name), text)
    with zipfile.ZipFile(pooled.path("some.zip"), "w") as file:
        file.writestr("zipped.py", "VALUE = 6\n")
        file.writestr("twice.py", "VALUE = 'hidden'\n")
    out = pooled.script("""
        import os, site, sys
        path, src, some = (os.path.join(os.path.dirname(POOL), name) for name in ("path", "src", "some.zip"))
        def values():
            import common.one, common.two, data.leaf, twice, zipped
            return common.one.VALUE, common.two.VALUE, twice.VALUE, data.VALUE, data.leaf.VALUE, zipped.VALUE
        if __name__ == "__main__":
            sys.path += [path, some]
            site.addsitedir(os.path.join(os.path.dirname(POOL), "site"))
            values()
            with cexec.Executor(POOL) as pool:
                print(type(pool.submit(values).exception()).__name__)
            with cexec.Executor(POOL, send=[some, src, path]) as pool:
                print(pool.submit(values).result())
            for send in (path, [path + "/twice.py"], [os.path.dirname(os.__file__)]):
                try:
                    cexec.Executor(POOL, send=send)
                except (TypeError, ValueError) as error:
                    print(error)
        """)
    lines = out.splitlines()
    assert lines[:2] == ["ModuleNotFoundError", "(1, 2, 3, 4, 5, 6)"]
    assert lines[2].startswith("send is a list") and "no zip file" in lines[3] and "belongs to Python" in lines[4]


def test_what_an_import_finds_elsewhere_is_not_sent(tmp_path, monkeypatch):
    """As in IPython, where the current directory comes after the library: there statistics.py hides nothing."""
    put(tmp_path / "statistics.py", "")
    put(tmp_path / "mine.py", "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [os.path.dirname(os.__file__), ""])
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    program = cexec.Program()
    assert program.roots == [str(tmp_path)] and {"mine", "statistics"} <= set(program.names())
    assert program.module("statistics") is None and program.module("mine")[1] == str(tmp_path / "mine.py")


def test_functions_by_value_go_to_the_same_python_only(cluster, monkeypatch):
    """Another one would crash.  It is named, with the remedy; ordinary functions run there."""
    with_package("cloudpickle")
    there = [python for python in PYTHONS if python_version(python) != python_version(PYTHON)]
    if not there:
        pytest.skip("there is only one Python")
    live_in(cluster, monkeypatch)
    cluster.worker(there[-1], "/dev/fd/3", env={"BOOST": "0"})
    text = """
        import platform
        if __name__ == "__main__":
            with cexec.Executor(POOL) as pool:
                version = platform.python_version
                for call in [pool.submit(function) for function in (version, lambda: version(), version)]:
                    print(call.exception() or call.result(), flush=True)
        """
    here, other = python_version(PYTHON), python_version(there[-1])
    named = "%s has Python %s" % (os.uname().nodename, other)
    why = ("a function of a notebook, a lambda or the like needs Python %s there, as here: start the worker with "
           "python%s, or put the function into a module" % (here, here))
    refused = "no worker can do the calls: %s (%s)" % (named, why)

    def told(text, **how):
        lines = main_program(cluster, text, **how).splitlines()
        lines.remove("cexec: " + named + ": " + why)
        return [line if line == refused else line.rpartition(".")[0] for line in lines]
    assert told(text, terminal=True) == [other, refused, other]
    cluster.worker(*LANE, env={"BOOST": "1"})
    assert told("import sys\nsys.ps1 = 'as in a notebook'\n" + textwrap.dedent(text))[:2] == [other, here]


def test_one_thread_for_each_slot(pooled):
    """Unless the worker's environment or the program says otherwise."""
    pooled.serving.terminate()
    pooled.serving.wait(PATIENCE)
    pooled.worker(*LANE, env={"BOOST": "0", "MKL_NUM_THREADS": "7"})
    names = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"]
    for options, right in (({}, ["1", "1", "7"]), ({"threads": 3}, ["3", "3", "7"]),
                           ({"threads": None}, [None, None, "7"])):
        with cexec.Executor(pooled.pub, **options) as pool:
            assert list(pool.map(os.getenv, names)) == right
    with pytest.raises(ValueError, match="threads must be greater"):
        cexec.Executor(pooled.pub, threads=0)


def test_a_package_and_what_is_below_the_guard_are_told_apart(pooled):
    out = pooled.script("""
        def f():
            pass
        cexec.cloudpickle_directory = lambda: None
        print(cexec.Executor(POOL).submit(f).exception())
        """, name="pack/__main__.py", before=["-m", "pack"])
    assert "is defined in a package's __main__.py, which would do its work there: put it into a module" in out, out
    out = pooled.script("""
        if __name__ == "__main__":
            def f():
                pass
            with cexec.Executor(POOL) as pool:
                print(repr(pool.submit(f).exception()))
        """)
    assert out.startswith("AttributeError(")
    assert ": what is defined below if __name__ == '__main__': is not there on a worker, so define it above" in out


def test_a_missing_module_is_told_with_its_host_and_the_remedy(pooled):
    out = pooled.script("""
        import traceback
        def f():
            import nowhere_x
        if __name__ == "__main__":
            with cexec.Executor(POOL) as pool:
                try:
                    pool.submit(f).result()
                except ModuleNotFoundError:
                    traceback.print_exc()
        """)
    assert ("\nOn %s:\n" % os.uname().nodename in out and
            "install it there, or put a module of your own beside the main program, or its directory into send; "
            "CEXEC_REJECT_SERVERS=%s leaves the host out\n" % os.uname().nodename in out)


def test_a_main_program_may_name_the_executor_in_classes_and_annotations(pooled):
    assert pooled.script("""
        import sys
        class Mine(cexec.Executor):
            pass
        if sys.version_info >= (3, 10):
            kind = cexec.Executor | None
        def f(pool: cexec.Executor = None):
            return 42
        if __name__ == "__main__":
            with Mine(POOL) as pool:
                print(pool.submit(f).result())
        """) == "42\n"


def test_wrong_arguments_of_an_executor_are_told_in_its_own_name(pooled):
    for arguments, options, word in (((4,), {}, "comes first, as in Executor('py.pub', max_workers=4), and not 4"),
                                     ((None,), {}, "and not None"), ((), {}, "__init__() missing 1 "),
                                     ((pooled.pub,), {"mad": 1}, "__init__() got an unexpected keyword")):
        with pytest.raises(TypeError) as caught:
            cexec.Executor(*arguments, **options)
        assert word in str(caught.value) and "Methods" not in str(caught.value)
    with pytest.raises(TypeError, match="and not 4"):
        cexec.run(4)
    assert cexec.Executor(os.fsencode(pooled.pub)).submit(abs, -1).result() == 1


def test_of_a_progress_bar_the_last_state_is_shown(pooled):
    assert pooled.script("""
        def f():
            for percent in range(0, 101, 50):
                print("\\r%d%%" % percent, end="", flush=True)
            print("\\ndos\\r")
        if __name__ == "__main__":
            with cexec.Executor(POOL) as pool:
                pool.submit(f).result()
        """) == "%s: 100%%\n%s: dos\n" % (2 * (os.uname().nodename,))


def test_output_to_descriptor_0(cluster):
    cluster.worker("echo", "hi", env={"BOOST": "0"})
    with open(cluster.path("both"), "w+") as file:
        cluster.do([PYTHON, "-c", "import cexec; cexec.run(%r, input=b'', stdout=0)" % cluster.pub], stdin=file,
                   env={"PYTHONPATH": HERE})
    assert read(cluster.path("both")) == b"hi\n"


def test_a_main_program_that_makes_an_executor_everywhere_is_told(pooled):
    """Without the guard each worker would make one of its own."""
    out = pooled.script("""
        def f():
            pass
        pool = cexec.Executor(POOL)
        print(repr(pool.submit(f).exception()))
        """)
    assert out.startswith("Failed(")
    assert "no worker can do the calls: %s cannot load the program" % os.uname().nodename in out
    assert "RuntimeError: cexec cannot be used on a worker" in out and "below if __name__ == '__main__':" in out


def test_a_function_may_fork_and_is_told_that_it_cannot_spawn(pooled):
    """With spawn the processes would look for the main program's file, for ever."""
    out = pooled.script("""
        import multiprocessing
        def square(number):
            return number ** 2
        def many(how):
            with multiprocessing.get_context(how).Pool(2) as pool:
                return pool.map(square, [2, 3])
        if __name__ == "__main__":
            with cexec.Executor(POOL) as pool:
                for how in ("fork", "spawn", "forkserver"):
                    try:
                        print(how, pool.submit(many, how).result(20), flush=True)
                    except RuntimeError as error:
                        print(how, error, flush=True)
        """)
    said = "spawn and forkserver do not work in a function on a worker, which has not the main program's file: "
    assert out.splitlines() == ["fork [4, 9]"] + [
        how + " " + said + "use multiprocessing.get_context('fork')" for how in ("spawn", "forkserver")]


def test_exceptions_come_with_the_traceback_there(pooled):
    out = pooled.script("""
        import traceback
        class Mine(Exception):
            pass
        def bad(kind):
            raise kind("reason")        # here
        if __name__ == "__main__":
            with cexec.Executor(POOL) as pool:
                for kind in (KeyError, Mine):
                    try:
                        pool.submit(bad, kind).result()
                    except Exception:
                        traceback.print_exc()
        """)
    assert out.count('raise kind("reason")        # here') == 2
    assert "\nKeyError: 'reason'\n" in out and "On %s:\nTraceback" % os.uname().nodename in out
    assert "\nMine: reason\n" in out       # the program's own class


def test_ten_thousand_calls_and_large_ones(pooled):
    with cexec.Executor(pooled.pub) as pool:
        assert list(pool.map(abs, range(-5000, 5000))) == list(map(abs, range(-5000, 5000)))
        futures = [pool.submit(bytes, count) for count in (0, 1, 65535, 10 ** 6, 3 * 10 ** 7)]
        futures += [pool.submit(len, bytes(count)) for count in (0, 1, 65535, 10 ** 6, 3 * 10 ** 7)]
        found = [future.result() for future in futures]
        assert found[5:] == [len(data) for data in found[:5]] == [0, 1, 65535, 10 ** 6, 3 * 10 ** 7]


class Once:
    """A list [0] where it is unpickled; counts how often it is pickled."""

    count = 0

    def __reduce__(self):
        Once.count += 1
        return list, ([0],)


def test_map_sends_its_function_once_to_a_lane(pooled, monkeypatch):
    """It is made anew for each call; more functions than a worker keeps may be in use."""
    send, sent = cexec.Lane.send, []
    monkeypatch.setattr(cexec.Lane, "send", lambda lane, kind, *parts: (sent.append(kind), send(lane, kind, *parts)))
    Once.count, data = 0, bytes(range(256)) * 1000
    with cexec.Executor(pooled.pub, max_workers=1) as pool:
        function = functools.partial(operator.iadd, Once())
        assert list(pool.map(function, [[n] for n in range(50)])) == [[0, n] for n in range(50)]
        assert Once.count == sent.count(cexec.FUNCTION) == 1
        function = functools.partial(operator.add, Once())
        assert list(pool.map(function, [[n] for n in range(50)], chunksize=9)) == [[0, n] for n in range(50)]
        assert Once.count == 2
        many = [pool.map(functools.partial(operator.getitem, data[n:]), range(9), buffersize=1) for n in range(9)]
        assert list(zip(*many)) == [tuple(data[n:n + 9]) for n in range(9)]
        function = functools.partial(operator.iadd, memoryview(bytearray(cexec.LARGE)))
        assert list(map(len, pool.map(function, [b"y"] * 3))) == [cexec.LARGE + 1] * 3
        assert all(len(lane.functions) == cexec.FUNCTIONS_KEPT for lane in pool._pool.lanes)


def test_map_submits_no_more_than_its_buffer(pooled):
    """And so takes an endless iterable; the rest is cancelled when nobody wants it."""
    taken = []

    def endless():
        for number in itertools.count():
            taken.append(number)
            yield -number

    with cexec.Executor(pooled.pub) as pool:
        results = pool.map(abs, endless(), buffersize=3)
        assert taken == [0, 1, 2] and next(results) == 0 and taken == [0, 1, 2, 3]
        assert list(itertools.islice(results, 20)) == list(range(1, 21)) and len(taken) == 24
        results.close()
        chunks = pool.map(abs, endless(), chunksize=4, buffersize=2)
        assert list(itertools.islice(chunks, 9)) == list(range(9)) and len(taken) == 24 + 20
        with pytest.raises(ZeroDivisionError):
            list(pool.map(divmod, [1, 1], [1, 0], buffersize=1))
        for wrong, kind in ((0, ValueError), ("1", TypeError)):
            with pytest.raises(kind, match="buffersize must be"):
                pool.map(abs, [], buffersize=wrong)


@pytest.mark.parametrize("size", [100, cexec.LARGE, 3 * 10 ** 6])
def test_bytes_and_memoryviews_there_and_back(pooled, size):
    data = bytes(range(100)) * (size // 100 + 1)
    with cexec.Executor(pooled.pub) as pool:
        for value in (data, bytearray(data), memoryview(data), memoryview(bytearray(data)), memoryview(data)[::2]):
            made = pool.submit(copy.copy, value).result()
            assert made == value and type(made) in (type(value), bytes, bytearray)
        assert pool.submit(memoryview, bytearray(data)).result() == data
        assert pool.submit(len, memoryview(data)).result() == pool.submit(bytes.__len__, data).result() == len(data)


@pytest.mark.skipif(sys.version_info < (3, 8), reason="pickle has no buffers")
def test_what_is_large_is_not_copied_into_a_pickle(ours):
    with_package("numpy", sys.executable)
    import numpy
    data, array = bytes(cexec.LARGE), numpy.arange(10 ** 5)
    value = cexec.in_buffers((functools.partial(len, data), (memoryview(data), array)), 5)
    pickle_, buffers, _ = cexec.dumps(value, 5)
    assert len(pickle_) < 1000 and [bytes(one) for one in buffers] == [data, data, array.tobytes()]
    assert buffers[0].obj is data and [one.readonly for one in buffers] == [True, True, False]
    for value in (data, memoryview(data), array, [array, {"a": array + 1}]):
        buffers = []
        made = bytes(ours.scope["dumps"](value, buffers))
        assert len(made) < 1000 and len(buffers) == (2 if type(value) is list else 1)
        found = cexec.load_result(cexec.result_readers(()), made, 0, [bytearray(one) if type(value) in (
            numpy.ndarray, list) else bytes(one) for one in buffers])
        assert repr(found) == repr(data if type(value) is memoryview else value)
    given = bytearray(array.tobytes())
    found = cexec.load_result(cexec.result_readers(()), bytes(ours.scope["dumps"](array, [])), 0, [given])
    given[0] = 7
    assert found[0] == 7                # it is the memory that came


def test_an_initializer_runs_once_for_each_lane_before_its_calls(pooled):
    """What it returns need not be data."""
    assert pooled.script("""
        import os, sys, threading
        def begin(*words):
            global begun
            begun = globals().get("begun", ()) + words
            return threading.Lock()
        def look(number):
            return begun
        if __name__ == "__main__":
            with cexec.Executor(POOL, initializer=begin, initargs=("a", b"b")) as pool:
                print(set(pool.map(look, range(200))))
        """) == "{('a', b'b')}\n"


def test_the_initializers_time_is_no_work_of_a_lane(pooled, monkeypatch):
    """A lane ends after a while; not sooner than it takes to be worth its start.  Nor does it count as idle."""
    monkeypatch.setattr(cexec, "LANE_SECONDS", 0.1)
    monkeypatch.setattr(cexec, "LANE_IDLE_SECONDS", 0.0)
    count = pooled.path("count")
    text = "import time\nopen(%r, 'a').write('x')\ntime.sleep(1)" % count
    with cexec.Executor(pooled.pub, 1, initializer=exec, initargs=(text,)) as pool:
        waiting = pool.submit(abs, -1)
        until(lambda: any(lane.state is cexec.PREPARING for lane in pool._pool.lanes), "the initializer")
        assert waiting.result(PATIENCE) == 1
        lane, = pool._pool.lanes
        assert lane.preparation >= 1 and lane.since - lane.idle_since <= 0
        pool.submit(time.sleep, 0.1).result()           # now none is sent ahead
        list(pool.map(time.sleep, [0.05] * 10))
        assert lane in pool._pool.lanes and read(count) == b"x" and not lane.leaving


def test_an_initializer_that_fails_breaks_the_pool(pooled):
    with cexec.Executor(pooled.pub, initializer=divmod, initargs=(1, 0)) as pool:
        error = pool.submit(abs, -1).exception(PATIENCE)
        assert type(error) is concurrent.futures.process.BrokenProcessPool
        assert "cannot run the initializer" in str(error) and "ZeroDivisionError" in str(error)
        with pytest.raises(concurrent.futures.process.BrokenProcessPool, match="ZeroDivisionError"):
            pool.submit(abs, -1)
    with cexec.Executor(pooled.pub, initializer=os._exit, initargs=(3,)) as pool:
        error = pool.submit(abs, -1).exception(PATIENCE)
        assert type(error) is concurrent.futures.process.BrokenProcessPool and "in the initializer" in str(error)
    with cexec.Executor(pooled.pub, initializer=abs, initargs=(threading.Lock(),)) as pool:
        error = pool.submit(abs, -1).exception(PATIENCE)
        assert type(error.__cause__) is pickle.PicklingError


def test_a_host_whose_initializer_fails_gets_no_calls(cluster, monkeypatch):
    """They wait for another one."""
    live_in(cluster, monkeypatch)
    gate, good = cluster.path("gate"), {"CONCURRENCY": "1", "BOOST": "0"}
    begin = "import os\nif os.environ.get('BAD'): raise OSError('no licence')"
    wait = "import os, time\nassert not os.environ.get('BAD')\nwhile not os.path.exists(%r): time.sleep(0.01)" % gate
    cluster.worker(*LANE, env=good)
    cluster.worker(*LANE, env=dict(good, BAD="1"))
    with cexec.Executor(cluster.pub, initializer=exec, initargs=(begin,)) as pool:
        futures = [pool.submit(exec, wait) for _ in range(3)]
        try:
            until(lambda: pool._pool.unprepared and pool._pool.prepared, "a failure and a success")
        finally:
            touch(gate)
        assert [future.result(PATIENCE) for future in futures] == [None] * 3
        text, = [text for text, _ in pool._pool.faults.values()]
        assert "cannot run the initializer" in text and "no licence" in text


def test_max_tasks_per_child(pooled):
    with cexec.Executor(pooled.pub, 1, max_tasks_per_child=3) as pool:
        pids = list(pool.map(eval, ["__import__('os').getpid()"] * 9))
    assert [pids.count(pid) for pid in pids] == [3] * 9


def test_the_number_of_workers_is_asked_when_it_is_read(pooled, monkeypatch):
    pooled.worker(*LANE, env={"CONCURRENCY": "3", "BOOST": "0"})
    count, asked = cexec.count_slots, []
    monkeypatch.setattr(cexec, "count_slots", lambda pub: asked.append(pub) or count(pub))
    with cexec.Executor(pooled.pub) as pool:
        assert pool.submit(abs, -1).result() == 1 and not asked
        assert pool._max_workers == 5 and pool._max_workers == 5 and asked == [pooled.pub]
    with cexec.Executor(pooled.pub, 7, mp_context=None) as pool:
        assert pool._max_workers == 7 and asked == [pooled.pub]


@pytest.mark.parametrize("options, kind, word", [
    ({"mp_context": 1}, ValueError, "mp_context must be None"), ({"initializer": 1}, TypeError, "callable"),
    ({"max_tasks_per_child": 0}, ValueError, ">= 1"), ({"max_tasks_per_child": "1"}, TypeError, "an integer")])
def test_wrong_options_of_an_executor(cluster, options, kind, word):
    with pytest.raises(kind, match=word):
        cexec.Executor(cluster.pub, **options)


def test_the_types_are_those_of_the_functions():
    """What type checkers read has the parameters and defaults that are there."""
    block = re.search(r"^if TYPE_CHECKING:.*\n((?:    .*\n|\n)+)", read(os.path.join(HERE, "cexec.py")).decode(), re.M)
    typed = {"os": os}
    exec(textwrap.dedent(block.group(1)), typed)

    def parameters(function):
        return [(one.name, one.kind, one.default) for one in inspect.signature(function).parameters.values()]

    assert parameters(typed["run"]) == parameters(cexec.run)
    assert parameters(typed["Executor"].map) == parameters(cexec.Executor.map)
    assert parameters(typed["Executor"].__init__) == parameters(cexec.Executor.__init__)
    assert parameters(typed["joblib"]) == parameters(cexec.joblib)
    assert set(cexec.__all__) - {"Failed"} <= set(typed) and not cexec.TYPE_CHECKING


def test_joblibs_parallel_uses_the_workers(pooled):
    with_package("joblib")
    out = pooled.script("""
        import math, os, joblib
        def inner(number):
            return joblib.Parallel()(joblib.delayed(math.sqrt)(n) for n in [number]), os.getppid()
        if __name__ == "__main__":
            with cexec.joblib(POOL, 2) as pool:
                assert joblib.effective_n_jobs() == 2 and isinstance(pool, cexec.Executor)
                parallel = joblib.Parallel()
                found = parallel(joblib.delayed(inner)(n) for n in range(300))
                print([value for value, _ in found] == [[math.sqrt(n)] for n in range(300)])
                print(os.getpid() not in {parent for _, parent in found})
                try:
                    parallel(joblib.delayed(math.sqrt)(n) for n in range(50, -50, -1))
                except ValueError as error:
                    print(error)
                print(list(joblib.Parallel(return_as="generator")(joblib.delayed(abs)(n) for n in [-1, 2])))
            print(joblib.effective_n_jobs(1))
        """)
    assert out == "True\nTrue\nmath domain error\n[1, 2]\n1\n"


def lanes_of(cluster):
    """The processes of workers' Pythons."""
    found = []
    for pid in cluster.alive():
        with contextlib.suppress(OSError):      # it has just ended
            words = read("/proc/%d/cmdline" % pid)
            found += [pid] * (words.endswith(b"\0/dev/fd/3\0") and b"cservice" not in words)
    return found


def test_lanes_are_as_many_as_workers_take_and_are_given_back(pooled):
    with cexec.Executor(pooled.pub) as pool:
        futures = [pool.submit(time.sleep, 0.3) for _ in range(8)]
        until(lambda: len(lanes_of(pooled)) == 2, "two lanes")
        for future in futures:
            future.result()
        pids = [pool.submit(os.getpid).result() for _ in range(3)]
        assert len(set(pids)) <= 2
        until(lambda: not lanes_of(pooled), "the end of idle lanes")
        assert pool.submit(os.getpid).result() not in pids
    with cexec.Executor(pooled.pub, max_workers=1) as pool:
        assert len({pool.submit(os.getpid).result() for _ in range(20)}) == 1


def crash(path):
    """A call of which only the first try dies."""
    return "import os\nopen(%r, 'ab').write(b'x')\nif os.path.getsize(%r) < 2: os._exit(3)" % (path, path)


def test_a_lost_worker_is_made_good_or_told(pooled):
    count = pooled.path("count")
    broken = concurrent.futures.process.BrokenProcessPool
    with cexec.Executor(pooled.pub) as pool:
        assert pool.submit(exec, crash(count)).result() is None and os.path.getsize(count) == 2
        assert "that was try 4 of 4" in str(pool.submit(os._exit, 3).exception())
        assert pool.submit(pow, 2, 3).result() == 8
        assert isinstance(pool.submit(os.abort).exception(), broken)
    os.unlink(count)
    with cexec.Executor(pooled.pub, retries=0) as pool:
        error = pool.submit(exec, crash(count)).exception()
        assert isinstance(error, broken) and "ended with status 3 (that was try 1 of 1)" in str(error)
        assert os.path.getsize(count) == 1 and pool.submit(pow, 2, 3).result() == 8


def test_short_calls_behind_a_long_one_are_taken_back(pooled):
    """A lane has calls ahead while they are short; another lane with nothing to do gets those that are stuck."""
    with cexec.Executor(pooled.pub) as pool:
        list(pool.map(abs, range(3000)))
        gate = pooled.path("gate")
        wait = "import os, time\nwhile not os.path.exists(%r): time.sleep(0.01)" % gate
        futures = [pool.submit(*call) for call in [(abs, 1)] * 5 + [(exec, wait)] + [(abs, 1)] * 60]
        try:
            for future in futures[6:]:
                assert future.result(PATIENCE) == 1
            assert not futures[5].done()
        finally:
            touch(gate)
        assert futures[5].result(PATIENCE) is None


def test_no_worker_is_said(pooled, monkeypatch):
    code, text = failure(cexec.Executor, pooled.path("nowhere.pub"))
    assert code == 100 and "no such public key" in text
    monkeypatch.setenv("CEXEC_TIMEOUT_ACCEPT", "1")
    monkeypatch.setenv("GROUP", "127.255.255.255:%d" % free_port())
    with cexec.Executor(pooled.pub) as pool:
        errors = [pool.submit(pow, 2, 3).exception() for _ in range(2)]
    assert all(isinstance(error, cexec.Failed) and str(error).startswith("no worker answered in ")
               for error in errors)


@pytest.mark.parametrize("command, word", [
    (["cat"], "frame of kind b'S'"),
    (["sh", "-c", "echo oops >&2; exit 3"], "ended with status 3: oops (is it python3"),
    (["/no/such"], "cannot run its command: /no/such: No such file or directory"),
    ([PYTHON, "-c", "print('x' * 99)"], "frame of kind b'x'")])
def test_a_command_that_is_no_python_is_said(cluster, monkeypatch, command, word):
    live_in(cluster, monkeypatch)
    monkeypatch.setattr(cexec, "LANE_FAILURES", 1)
    cluster.worker(*command, env={"BOOST": "0"})
    with cexec.Executor(cluster.pub) as pool:
        error = pool.submit(pow, 2, 3).exception()
    assert isinstance(error, cexec.Failed) and word in str(error)


def test_a_worker_that_drains_is_left(pooled, monkeypatch):
    """A lane ends after a while for that; what waits goes on elsewhere."""
    monkeypatch.setattr(cexec, "LANE_SECONDS", 0.5)
    with cexec.Executor(pooled.pub) as pool:
        first, futures = pool.submit(os.getppid).result(), []

        def left():
            """Whether it has ended, though there are always calls that wait."""
            futures.extend(pool.submit(time.sleep, 0.05) for _ in range(8 - sum(not one.done() for one in futures)))
            return pooled.serving.poll() is not None
        left()
        pooled.serving.terminate()
        other = pooled.worker(*LANE, env={"CONCURRENCY": "2", "BOOST": "0"})
        until(left, "the end of the worker")
        assert all(future.result(PATIENCE) is None for future in futures)
        assert first != pool.submit(os.getppid).result() and other.poll() is None


def test_cancelling_and_shutting_down(pooled):
    pool = cexec.Executor(pooled.pub, max_workers=1)
    running = pool.submit(time.sleep, 0.5)
    until(running.running, "the start of a call")
    futures = [pool.submit(abs, -number) for number in range(5)]
    assert futures[0].cancel() and not running.cancel()
    pool.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        pool.submit(abs, 1)
    assert running.result(PATIENCE) is None and all(future.cancelled() for future in futures)
    pool.shutdown()
    assert not lanes_of(pooled)


def test_ctrl_c_ends_what_runs(pooled):
    with pytest.raises(KeyboardInterrupt), cexec.Executor(pooled.pub) as pool:
        future = pool.submit(time.sleep, 1000)
        until(lambda: lanes_of(pooled) and future.running(), "the start of a call")
        raise KeyboardInterrupt
    assert isinstance(future.exception(), concurrent.futures.process.BrokenProcessPool)
    until(lambda: not lanes_of(pooled), "the end of the call")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("step", ["search", "start", "call", "result"])
def test_a_main_program_that_is_ended_leaves_nothing(cluster, step, number):
    """Here and there: in the search, before Python has started, in a call, and while a result comes."""
    commands = {"search": [], "start": [["sleep", "1000"]]}.get(step, [LANE])
    workers = [cluster.worker(*command, env={"CONCURRENCY": "1", "BOOST": "0"}) for command in commands]
    put(cluster.path("main.py"), textwrap.dedent("""
        import cexec, time
        if __name__ == "__main__":
            with cexec.Executor(%r) as pool:
                pool.submit(bytes, 10 ** 8 if %r == "result" else 1).result()
                if %r == "call":
                    pool.submit(time.sleep, 1000).result()
                print("over")
                time.sleep(1000)
        """ % (cluster.pub, step, step)))
    program = cluster.popen([PYTHON, cluster.path("main.py")], env={"PYTHONPATH": HERE}, stdout=subprocess.PIPE)
    first = [program.pid] + [worker.pid for worker in workers]
    until(lambda: len(cluster.alive()) > len(first) + 1 if workers else len(cluster.alive()) > len(first), "a job")
    program.send_signal(number)
    assert program.wait(PATIENCE) in (-number, 1)
    until(lambda: cluster.alive() == first[1:], "the end of all")


def test_the_interpreters_exit_waits_for_calls(pooled):
    out = pooled.script("""
        import atexit, time
        def late():
            try:
                pool.submit(abs, 1)
            except RuntimeError as error:
                print(error)
        if __name__ == "__main__":
            atexit.register(late)
            pool = cexec.Executor(POOL)
            pool.submit(time.sleep, 0.5).add_done_callback(lambda future: print("done", flush=True))
        """)
    assert out == "done\ncannot schedule new futures after interpreter shutdown\n"


def test_asyncio(pooled):
    assert pooled.script("""
        import asyncio
        async def main(pool):
            loop = asyncio.get_event_loop()
            print(await asyncio.gather(*[loop.run_in_executor(pool, pow, 2, n) for n in range(4)]))
            try:
                await loop.run_in_executor(pool, divmod, 1, 0)
            except ZeroDivisionError:
                print("raised")
        if __name__ == "__main__":
            with cexec.Executor(POOL) as pool:
                asyncio.new_event_loop().run_until_complete(main(pool))
        """) == "[1, 2, 4, 8]\nraised\n"


def test_calls_from_many_threads(pooled):
    with cexec.Executor(pooled.pub) as pool, concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda n: pool.submit(pow, n, 2).result(), range(200))) == [n * n for n in range(200)]
    assert not [thread for thread in threading.enumerate() if thread.name == "cexec.Executor"]


CPYTHON_TESTS = """
import importlib, sys, unittest
import concurrent.futures.process
import cexec
try:
    package = "test.test_concurrent_futures."
    modules = [importlib.import_module(package + name)
               for name in ("executor", "test_init", "test_shutdown", "test_as_completed", "test_wait",
                            "test_process_pool")]
    util = importlib.import_module(package + "util")
    base = util.BaseTestCase
except ImportError:                     # before Python 3.13, and 3.12, it is one file
    modules = [importlib.import_module("test.test_concurrent_futures")]
    base = getattr(modules[0], "BaseTestCase", unittest.TestCase)

class Ours(concurrent.futures.Executor):
    "What their mixins make, with our arguments."
    def __new__(cls, max_workers=None, **options):
        return cexec.Executor(POOL, max_workers, allow=ALLOW, **options)

ALLOW = [modules[0].__name__]

def found(name):
    return next(vars(module)[name] for module in modules if name in vars(module))

class Mixin(modules[0].ExecutorMixin if hasattr(modules[0], "ExecutorMixin") else util.ExecutorMixin):
    executor_type = Ours

tests = unittest.TestSuite()
for name in sys.argv[1:]:
    made = type("Cexec" + name, (Mixin, found(name), base), {"__module__": "__main__"})
    names = [test for test in unittest.defaultTestLoader.getTestCaseNames(made) if test not in LEFT_OUT]
    if name == "ProcessPoolExecutorTest":       # else those of ExecutorTest once more
        names = [test for test in names if test not in dir(found("ExecutorTest"))]
    tests.addTests(map(made, names))
result = unittest.TextTestRunner(sys.stdout, verbosity=2).run(tests)
print("ran", result.testsRun, "failed", len(result.failures) + len(result.errors))
"""

# What they are about is not there in an Executor like ours, or elsewhere than their process looks.
LEFT_OUT = {
    # from concurrent.futures they import the executor by its name, in another interpreter and without a public key
    "test_interpreter_shutdown", "test_submit_after_interpreter_shutdown", "test_hang_gh83386", "test_hang_issue83386",
    # the pool's processes, by name: executor._processes, and a call that kills one breaks the whole pool, not a call
    "test_killed_child", "test_saturation", "test_idle_process_reuse_one", "test_idle_process_reuse_multiple",
    # and for max_tasks_per_child, together with a context of multiprocessing; and its semaphores and managers
    "test_max_tasks_per_child", "test_max_tasks_early_shutdown", "test_max_tasks_per_child_defaults_to_spawn_context",
    "test_ressources_gced_in_workers", "test_python_finalization_error", "test_max_workers_too_large",
    # it wants one call to have begun at once: here a worker is looked for first
    "test_cancel_futures",
    # the cause is of another type than concurrent.futures' own, private one, which takes multiprocessing to import
    "test_traceback",
}


@functools.lru_cache(None)
def python_with_tests():
    """A Python that has its own tests of executors: the one under test, or else the newest."""
    versions = glob.glob(os.path.expanduser("~/.pyenv/versions/3.*/bin/python3"))
    versions.sort(key=lambda path: [int(number) for number in re.findall(r"\d+", path.split("/")[-3])], reverse=True)
    for path in [PYTHON, *versions, "/usr/bin/python3"]:
        if os.path.exists(path) and not subprocess.run([path, "-c", "import test.test_concurrent_futures"],
                                                       stderr=subprocess.DEVNULL).returncode:
            return path
    return None


@pytest.mark.parametrize("classes, least", [
    (("ExecutorTest", "ProcessPoolExecutorTest"), 9),
    (("ExecutorShutdownTest", "AsCompletedTests", "InitializerMixin"), 6),
    (("WaitTests",), 7)])
def test_cpythons_own_tests_of_executors(cluster, classes, least):
    python = python_with_tests()
    if not python:
        skip("no Python here has its own tests (in Debian 12 they are libpython3.11-testsuite's)")
    cluster.worker(python, "/dev/fd/3", env={"CONCURRENCY": "5", "BOOST": "0"})
    put(cluster.path("main.py"), "POOL, LEFT_OUT = %r, %r\n" % (cluster.pub, LEFT_OUT) + CPYTHON_TESTS)
    done = cluster.do([python, "-W", "ignore", cluster.path("main.py"), *classes], stderr=subprocess.STDOUT,
                      env={"PYTHONPATH": HERE}, timeout=240)
    ran, failed = re.search(rb"ran (\d+) failed (\d+)\n$", done.stdout).groups()
    assert int(ran) >= least and int(failed) == 0, done.stdout.decode()


PYTHONS = sorted({os.path.realpath(path) for path in glob.glob(os.path.expanduser("~/.pyenv/versions/3.*/bin/python3"))
                  if int(path.split("/versions/3.")[1].split(".")[0]) >= 6} | {os.path.realpath(PYTHON)},
                 key=lambda path: [int(number) for number in re.findall(r"\d+", path)])


def python_version(python):
    """Its minor version, as in 3.11."""
    return subprocess.check_output([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2], end='')"]).decode()


@pytest.mark.parametrize("there", sorted({PYTHONS[0], PYTHONS[-1]}))
def test_another_python_there(cluster, monkeypatch, there):
    """The older of both says what pickle's protocol is."""
    live_in(cluster, monkeypatch)
    cluster.worker(there, "/dev/fd/3", env={"BOOST": "0"})
    for here in {PYTHON, PYTHONS[0]}:
        out = main_program(cluster, """
            import sys
            def version(data):
                return sys.version_info[:2], len(data)
            if __name__ == "__main__":
                with cexec.Executor(POOL) as pool:
                    print(pool.submit(version, bytearray(3000000)).result(), end=" ")
                    print(repr(pool.submit({}.pop, 7).exception())[:10])
                    print(len(pool.submit(bytearray, 3000000).result()))
            """, python=here)
        version = subprocess.check_output([there, "-c", "import sys; print(sys.version_info[:2], end='')"]).decode()
        assert out == "(%s, 3000000) KeyError(7\n3000000\n" % version


# What the same Python on both sides gives back at the first try, without allow
VALUES = """
import array, collections, datetime, decimal, enum, fractions, ipaddress, json, os, pathlib, re, subprocess, sys, time
import types, uuid

class Color(enum.Enum):
    RED, BLUE = 1, "b"
class Mode(enum.Flag):
    A, B = 1, 2
class Level(enum.IntEnum):
    LOW = 1
Pair = collections.namedtuple("Pair", "x y")
class Wrong(Exception):
    def __init__(self, one, two):
        super().__init__("%s, %s" % (one, two))
        self.one, self.two = one, two
utc, hour = datetime.timezone.utc, datetime.timezone(datetime.timedelta(hours=1), "X")
VALUES = [
    None, 2 ** 100, 1.5, 2j, "\\ud800 text", b"bytes", bytearray(b"x"), [1, [2]], (1, (2,)), {(1, 2): {3}},
    frozenset([(4,)]), range(5), slice(1, 2), Ellipsis, datetime.date(2026, 1, 2),
    datetime.time(1, 2, 3, 4, utc, fold=1), datetime.datetime(2026, 1, 2, 3, 4, 5, 6, hour, fold=1),
    datetime.timedelta(-1, 2, 3), hour,
    decimal.Decimal("1.50"), fractions.Fraction(-1, 3), uuid.UUID(int=7), pathlib.Path("/a/b"),
    pathlib.PureWindowsPath("c:/x"), collections.OrderedDict([(1, 2)]), collections.defaultdict(list, a=[1]),
    collections.deque([1], 3), collections.Counter("abca"), collections.ChainMap({1: 2}, {}), collections.UserDict(a=1),
    collections.UserList([1]), ipaddress.ip_address("1.2.3.4"), ipaddress.ip_network("::/8"),
    ipaddress.ip_interface("1.2.3.4/8"), re.compile("a+", re.I), array.array("d", [1.5]), time.gmtime(0), os.stat("/"),
    types.SimpleNamespace(a=[1]), Color.BLUE, Mode.A | Mode.B, ~Mode.A, Level.LOW, Pair(1, [2]), re.I | re.S, int,
    ValueError]
ERRORS = [
    Wrong(1, 2), OSError(2, "no", "file"), KeyError(3), UnicodeDecodeError("a", b"b", 0, 1, "c"),
    ImportError("x", name="y"), json.JSONDecodeError("m", "doc", 1), subprocess.CalledProcessError(1, "x", "out"),
    SyntaxError("x", ("f", 1, 2, "t"))]
if sys.version_info >= (3, 7):
    import dataclasses
    @dataclasses.dataclass
    class Point:
        x: int
        y: object = None
    @dataclasses.dataclass(frozen=True)
    class Frozen:
        x: int
        y: object = None
    VALUES += [Point(1, [Point(2)]), {Frozen(1, (2,)): Frozen(Color.RED)}]
if sys.version_info >= (3, 10):
    @dataclasses.dataclass(frozen=True, slots=True)
    class Slots:
        x: int
    VALUES.append(Slots(1))
if sys.version_info >= (3, 9):
    import zoneinfo
    try:
        VALUES.append(datetime.datetime(2026, 1, 2, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")))
    except zoneinfo.ZoneInfoNotFoundError:
        pass                        # this host has no zones

def value(place):
    return VALUES[place]

def error(place):
    raise ERRORS[place]

def same(one, two):
    return type(one) is type(two) and (one == two or repr(one) == repr(two) and vars(one) == vars(two))

if __name__ == "__main__":
    with cexec.Executor(POOL) as pool:
        found = [pool.submit(value, place) for place in range(len(VALUES))]
        raised = [pool.submit(error, place) for place in range(len(ERRORS))]
        for future, right in zip(found + raised, VALUES + ERRORS):
            wrong = future.exception()
            if right in ERRORS and same(wrong, right) and wrong.args == right.args or not wrong and same(
                    future.result(), right):
                continue
            print("not", repr(right), "but", repr(wrong or future.result()))
        print(len(VALUES) >= 40, len(found + raised) == len(VALUES + ERRORS))
"""


@pytest.mark.parametrize("python", PYTHONS)
def test_forty_types_without_allow(cluster, monkeypatch, python):
    live_in(cluster, monkeypatch)
    cluster.worker(python, "/dev/fd/3", env={"BOOST": "0"})
    assert main_program(cluster, VALUES, python=python) == "True True\n"


def test_values_between_the_oldest_and_the_newest_python(cluster, monkeypatch):
    """Their pickles of some types differ: Fraction's, UUID's, paths'; and so do Enum's and Flag's own."""
    live_in(cluster, monkeypatch)
    cluster.worker(PYTHONS[-1], "/dev/fd/3", env={"BOOST": "0"})
    assert main_program(cluster, VALUES, python=PYTHONS[0]) == "True True\n"


def test_numpys_arrays_come_and_go(cluster, monkeypatch):
    """And what needs trust."""
    with_package("numpy")
    live_in(cluster, monkeypatch)
    cluster.worker(*LANE, env={"BOOST": "0"})
    out = main_program(cluster, """
        import numpy
        def turned(array):
            return array.T
        def strange():
            return numpy.ma.array([1, 2], mask=[0, 1])
        if __name__ == "__main__":
            with cexec.Executor(POOL) as pool:
                found = pool.submit(turned, numpy.ones((300, 500))).result()
                print(found.shape, found.sum(), found.flags.f_contiguous)
                print(type(pool.submit(strange).exception()).__name__)
            with cexec.Executor(POOL, trust=True) as pool:
                print(pool.submit(strange).result())
        """)
    assert out == "(500, 300) 150000.0 True\nUnpicklingError\n[1 --]\n"


def test_a_supervisor_that_is_killed(pooled):
    marks = [pooled.path("first"), pooled.path("second")]
    program = ("import os, time\nfirst, second = %r, %r\nmark = second if os.path.exists(first) else first\n"
               "open(mark, 'w').write(str(os.getppid()))\nwhile mark == first: time.sleep(0.1)" % tuple(marks))
    with cexec.Executor(pooled.pub) as pool:
        future = pool.submit(exec, program)
        supervisor = int(until(lambda: os.path.exists(marks[0]) and read(marks[0]), "the start of a call"))
        os.kill(supervisor, signal.SIGKILL)
        assert future.result(PATIENCE) is None and int(read(marks[1])) != supervisor
    until(lambda: not lanes_of(pooled), "the end of all lanes")


# The example of concurrent.futures in Python's documentation, but for the line that makes the executor
PRIMES = """
import math
import cexec

PRIMES = [112272535095293, 112582705942171, 112272535095293, 115280095190773, 115797848077099, 1099726899285419]

def is_prime(n):
    if n < 2:
        return False
    if n == 2:
        return True
    if n % 2 == 0:
        return False
    sqrt_n = int(math.floor(math.sqrt(n)))
    for i in range(3, sqrt_n + 1, 2):
        if n % i == 0:
            return False
    return True

def main():
    with cexec.Executor("app.pub") as executor:
        for number, prime in zip(PRIMES, executor.map(is_prime, PRIMES)):
            print('%d is prime: %s' % (number, prime))

if __name__ == '__main__':
    main()
"""


def test_the_documentations_example_on_three_hosts(hosts):
    spaces = hosts.lan("lan", ["here", "one", "two", "three"], "10.77.7")
    workers = [hosts.worker(*LANE, space=spaces[name], env={"CONCURRENCY": "1"}) for name in ("one", "two", "three")]
    put(hosts.path("primes.py"), PRIMES)
    done = hosts.do(["ip", "netns", "exec", spaces["here"], PYTHON, "primes.py"], stderr=subprocess.STDOUT,
                    env={"PYTHONPATH": HERE})
    lines = done.stdout.decode().splitlines()
    assert [line.split()[-1] for line in lines] == ["True"] * 5 + ["False"], lines
    assert all(b"supervisor WAITING -> RUNNING" in read(worker.log) for worker in workers)


def test_the_manuals_parameter_study(pooled):
    """Its plot is XML with a share for each probability: no way at the left, always one at the right."""
    text = recipe("cexec.1", "#!/usr/bin/env python3\n# study.py")
    put(pooled.path("py.pub"), read(pooled.pub).decode())
    put(pooled.path("study.py"), text.replace("SIZE, TRIES = 60, 50", "SIZE, TRIES = 20, 4"))
    failed(pooled.do([PYTHON, "study.py"], stderr=subprocess.STDOUT, env={"PYTHONPATH": HERE}), 0)
    svg = ElementTree.parse(pooled.path("study.svg")).getroot()
    line, = svg.iter("{http://www.w3.org/2000/svg}polyline")
    points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    assert len(points) == 101 and points[0] == (0, 300) and points[-1] == (400, 0)


def test_the_readmes_program(pooled):
    text = read(os.path.join(HERE, "README")).decode()
    program = textwrap.dedent(re.search(r"^    import cexec, random\n(    .*\n)+", text, re.M).group())
    put(pooled.path("py.pub"), read(pooled.pub).decode())
    put(pooled.path("pi.py"), program.replace("10 ** 6", "10 ** 4").replace("25e6", "25e4"))
    done = pooled.do([PYTHON, "pi.py"], stderr=subprocess.STDOUT, env={"PYTHONPATH": HERE})
    assert re.match(rb"pi is about 3\.1[345]\d*\n$", done.stdout), done.stdout


EVIL_WORKER = """
import os, struct, sys, threading, time
def send(kind, data=b"", size=None):
    os.write(1, struct.pack("!cQ", kind, len(data) if size is None else size) + data)
def frame():
    kind, size = struct.unpack("!cQ", sys.stdin.buffer.read(9))
    return kind, sys.stdin.buffer.read(size)
def call():
    while True:
        kind, data = frame()
        if kind == b"C":
            return data[:8]
def ready():
    send(b"W", b"cexec-lane 1 4 3.6.0 evil\x1b[2J")
def value(number, data):
    send(b"V", number + data)
%s
time.sleep(1000)
"""


@pytest.mark.parametrize("does, kind, word", [
    ("ready(); value(call(), b'\\x80\\x04\\x8c\\x02os\\x8c\\x06system\\x93\\x8c\\ntouch harm\\x85R.')",
     "UnpicklingError", "os.system is not known here"),
    ("ready(); value(call(), b'')", "Failed", "a result that cannot be read: EOFError"),
    ("ready(); value(call(), b'(' * 100000)", "Failed", "a result that cannot be read"),
    ("ready(); n = call(); send(b'X', n + b'\\xff\\xff\\xff\\xff')", "BrokenProcessPool", "longer than its frame"),
    ("ready(); n = call(); send(b'X', n)", "BrokenProcessPool", "requires a buffer"),
    ("ready(); call(); value(b'\\0' * 8, b'N.')", "BrokenProcessPool", "a result of no call"),
    ("ready(); call(); send(b'V', b'\\0')", "BrokenProcessPool", "requires a buffer"),
    ("ready(); n = call(); send(b'D', b'x'); send(b'A', b'y'); value(n, b'\\x80\\x05\\x97\\x98\\x97\\x86.')", "value",
     "(b'x', bytearray(b'y'))"),
    ("ready(); n = call(); send(b'D', b'x'); value(n, b'\\x80\\x05\\x97\\x97\\x86.')", "Failed", "cannot be read"),
    ("ready(); n = call(); send(b'A', b'x'); value(n, b'\\x80\\x05\\x97\\x98.')", "Failed", "cannot be read"),
    ("ready(); call(); send(b'A', b'x', 2 ** 62); os._exit(0)", "BrokenProcessPool", "ended with status 0"),
    ("ready(); n = call(); send(b'B', n)", "BrokenProcessPool", "BACK out of place"),
    ("ready(); call(); ready()", "BrokenProcessPool", "READY out of place"),
    ("ready(); call(); send(b'Z')", "BrokenProcessPool", "a frame of kind b'Z'"),
    ("ready(); call(); send(b'I', b'', 2 ** 63)", "BrokenProcessPool", "length 9223372036854775808"),
    ("send(b'W', b'x' * 5000)", "Failed", "length 5000"),
    ("send(b'W', b'cexec-lane 2 4 3.6.0 evil')", "Failed", "READY out of place"),
    ("send(b'V', b'\\0' * 8 + b'N.')", "Failed", "a result of no call"),
    ("ready(); call(); os._exit(0)", "BrokenProcessPool", "ended with status 0"),
    ("send(b'I', b'main'); k, d = frame(), frame(); ready(); value(call(), b'C%c' % len(d[1]) + d[1] + b'.')", "value",
     "N."),
    ("[send(b'I', b'../../etc/passwd') for _ in range(3)]; ready(); value(call(), b'N.')", "value", "None"),
], ids=range(21))
def test_a_hostile_worker_is_refused(cluster, monkeypatch, does, kind, word):
    live_in(cluster, monkeypatch)
    monkeypatch.setattr(cexec, "KILL_SECONDS", 0.5)
    monkeypatch.setattr(cexec, "LANE_FAILURES", 1)
    monkeypatch.chdir(cluster.directory)
    put(cluster.path("evil.py"), EVIL_WORKER % does)
    cluster.worker(PYTHON, cluster.path("evil.py"), env={"BOOST": "0"})
    with contextlib.ExitStack() as stack:
        pool = cexec.Executor(cluster.pub, retries=0)
        stack.callback(pool.__exit__, KeyboardInterrupt, None, None)
        future = pool.submit(pow, 2, 3)
        error = future.exception(PATIENCE)
        if kind == "value":
            assert word in str(future.result())
        else:
            assert type(error).__name__ == kind and word in str(error)
    assert not os.path.exists("harm")


@pytest.mark.parametrize("room", range(13))
def test_a_lane_that_cannot_start_leaves_no_descriptor_open(monkeypatch, room):
    monkeypatch.setattr(cexec, "start_client", refusing(errno.EAGAIN))
    lane = cexec.Lane.__new__(cexec.Lane)
    lane.pool = SimpleNamespace(pub="app.pub", useless=list)
    with few_descriptors(room), pytest.raises(OSError):
        lane.start()


def test_an_executor_without_a_thread_leaves_no_descriptor_open(cluster, monkeypatch):
    def no_thread(self):
        raise RuntimeError("can't start new thread")
    pool = cexec.Executor(cluster.pub)
    with monkeypatch.context() as without, few_descriptors(10):
        without.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError, match="new thread"):
            pool.submit(pow, 2, 3)
    assert pool._pool.thread is None and not pool._pool.inbox
    pool.shutdown()


def test_a_worker_that_is_never_ready_holds_up_nobody(cluster, monkeypatch):
    """It is asked first; the calls are done elsewhere, and it is named and asked no more."""
    live_in(cluster, monkeypatch)
    monkeypatch.setattr(cexec, "LATE_SECONDS", 0.0)
    silent = cluster.worker("sh", "-c", "echo x >>asked; exec sleep 1000", env={"CONCURRENCY": "1", "BOOST": "0"})
    said = []
    with cexec.Executor(cluster.pub) as pool:
        monkeypatch.setattr(pool._pool, "tell", said.append)
        futures = [pool.submit(abs, -number) for number in range(40)]
        until(lambda: any(lane.state is cexec.STARTING for lane in pool._pool.lanes), "GO")
        cluster.worker(*LANE, env={"CONCURRENCY": "2", "BOOST": "0"})
        assert [future.result(PATIENCE) for future in futures] == list(range(40))
        good = {lane.worker_id for lane in pool._pool.lanes if lane.state is cexec.UP}
        for lane in list(pool._pool.lanes):
            if lane.state is cexec.STARTING and lane.worker_id not in good:
                lane.loop.after(0, lane.check_ready)            # its time is over
        gate = cluster.path("gate")
        wait = "import os, time\nwhile not os.path.exists(%r): time.sleep(0.01)" % gate
        futures = [pool.submit(exec, wait) for _ in range(4)]
        try:
            until(lambda: any("Python" in line for line in said), "the name")
        finally:
            touch(gate)             # or the calls would never end
        assert all(future.result(PATIENCE) is None for future in futures) and silent.poll() is None
        assert [line for line in said if "Python" in line] == [
            "%s: it has not started Python in 10 s (is its command python3 /dev/fd/3?); "
            "CEXEC_REJECT_SERVERS=%s leaves it out; it gets no calls for a while" % (2 * (os.uname().nodename,))]
        assert len(pool._pool.bad.now()) == 1


def test_a_refusing_worker_is_avoided_longer_each_time_but_not_for_ever():
    avoided = cexec.Avoided(10.0)
    for _ in range(100):
        avoided.for_now("bad")
    assert avoided.now() == ["bad"] and avoided.seconds == {"bad": cexec.AVOID_MAX}
    avoided.forgive("bad")
    avoided.for_now("bad")
    assert avoided.seconds == {"bad": 10.0}


def test_calls_wait_for_a_good_worker_that_is_busy(cluster, monkeypatch):
    """However many bad ones are free; what they wait for is told.  Then they fail, with all names, when it has gone."""
    live_in(cluster, monkeypatch)
    monkeypatch.setenv("CEXEC_TIMEOUT_ACCEPT", "20")
    monkeypatch.setattr(cexec, "LANE_FAILURES", 1)
    monkeypatch.setattr(cexec, "REJECT_SECONDS", 100.0)
    gate, said = cluster.path("gate"), []
    wait = "import os, time\nwhile not os.path.exists(%r): time.sleep(0.01)" % gate
    good = cluster.worker(*LANE, env={"CONCURRENCY": "1", "BOOST": "0"})
    with cexec.Executor(cluster.pub) as holder, cexec.Executor(cluster.pub) as pool:
        monkeypatch.setattr(pool._pool, "tell", said.append)
        held = holder.submit(exec, wait)
        try:
            until(held.running, "the good worker at work")
            for number in range(2):
                cluster.worker("sh", "-c", "echo oops%d >&2; exit 3" % number, env={"CONCURRENCY": "1", "BOOST": "0"})
            future = pool.submit(abs, -7)
            until(lambda: any(line.startswith("in line, ") for line in said), "the line")
            assert not future.done() and repr(pool) == "<cexec.Executor app.pub: 0 running, 1 waiting  no worker>"
            assert repr(holder) == "<cexec.Executor app.pub: 1 running, 0 waiting  %s*1>" % os.uname().nodename
        finally:
            touch(gate)
        assert future.result(PATIENCE) == 7
        names = {line.rpartition("oops")[2][0] for line in said if "oops" in line}
        good.terminate()
        until(lambda: good.poll() is not None, "the end of the good worker")
        error = pool.submit(abs, -7).exception(PATIENCE)
        for number in names | {"0"}:
            assert "oops%s (is it python3 /dev/fd/3?); CEXEC_REJECT_SERVERS=" % number in str(error)
        assert names == set("01") and str(error).startswith("no worker can do the calls: ") and not pool._pool.faults


def test_the_only_worker_is_asked_again_if_its_python_has_died(cluster, monkeypatch):
    live_in(cluster, monkeypatch)
    cluster.worker("sh", "-c", "[ -e died ] || { touch died; kill -9 $$; }; exec %s /dev/fd/3" % PYTHON,
                   env={"BOOST": "0"})
    with cexec.Executor(cluster.pub, retries=0) as pool:
        assert pool.submit(abs, -7).result(PATIENCE) == 7 and os.path.exists(cluster.path("died"))


BAD_LOAD = """
    import os, time
    if os.environ.get("BAD_HOST"):
        open(%r, "w").close()
        %s
    def f(n):
        while not os.path.exists(%r):
            time.sleep(0.01)
        time.sleep(0.1)
        return n
    if __name__ == "__main__":
        with cexec.Executor(POOL, retries=0) as pool:
            print(sum(pool.map(f, range(12))))
"""


@pytest.mark.parametrize("does, says", [
    ("import nowhere_x", ": ModuleNotFoundError: No module named 'nowhere_x' (install it there, or put a module of "
     "your own beside the main program, or its directory into send; CEXEC_REJECT_SERVERS=%s leaves it out); it gets no "
     "calls for a while" % os.uname().nodename),
    ("os._exit(3)", "ended with status 3 while it loaded the program; CEXEC_REJECT_SERVERS=")], ids=["import", "exit"])
def test_a_host_that_cannot_load_the_program_costs_no_try_and_is_named_on_a_terminal(pooled, does, says):
    pooled.worker(*LANE, env={"CONCURRENCY": "1", "BOOST": "0", "BAD_HOST": "1"})
    asked = pooled.path("asked")
    for terminal in True, False:
        out = pooled.script(BAD_LOAD % (asked, does, asked), terminal=terminal)
        assert out.endswith("66\n") and (says in out if terminal else out == "66\n")
        assert ("cexec: %s" % os.uname().nodename in out) == terminal
        os.unlink(asked)


@pytest.mark.parametrize("guard", ["if os.environ.get('BAD_HOST'): ", ""], ids=["on one host", "everywhere"])
def test_a_host_that_cannot_load_a_functions_module_does_not_get_all_calls(cluster, monkeypatch, guard):
    """It would fail each at once.  If no host can, the calls fail with their own exception, and others are done."""
    live_in(cluster, monkeypatch)
    monkeypatch.setenv("CEXEC_TIMEOUT_ACCEPT", "20")
    cluster.worker(*LANE, env={"CONCURRENCY": "1", "BOOST": "0"})
    gate = cluster.path("gate")
    os.makedirs(cluster.path("program"))
    put(cluster.path("program/beside.py"), "import os\n%simport nowhere_x\ndef f(n):\n    return n\n" % guard)
    with cexec.Executor(cluster.pub) as holder:
        if guard:                   # the good worker is busy until the bad one has failed
            held = holder.submit(exec, "import os, time\nwhile not os.path.exists(%r): time.sleep(0.01)" % gate)
            until(held.running, "the good worker at work")
            cluster.worker(*LANE, env={"CONCURRENCY": "1", "BOOST": "0", "BAD_HOST": "1"})
        try:
            out = main_program(cluster, """
                import sys, time, types
                if __name__ == "__main__":
                    sys.modules["nowhere_x"] = types.ModuleType("nowhere_x")
                    import beside
                    with cexec.Executor(POOL, retries=0) as pool:
                        futures = [pool.submit(beside.f, n) for n in range(12)]
                        other = pool.submit(abs, -7)
                        while not (futures[0].done() or pool._pool.faults):
                            time.sleep(0.01)
                        open(%r, "w").close()
                        print(other.result(), [str(future.exception() or future.result()) for future in futures])
                """ % gate)
        finally:
            touch(gate)
    assert out == "7 %s\n" % (list(map(str, range(12))) if guard else ["No module named 'nowhere_x'"] * 12)


def test_a_main_program_behind_a_long_call_is_not_taken_back(pooled):
    out = pooled.script("""
        import os, time
        def f(n):
            return n
        if __name__ == "__main__":
            wait = "import os, time\\nopen(%r, 'a').write('x')\\nwhile not os.path.exists(%r): time.sleep(0.01)"
            with cexec.Executor(POOL) as pool:
                list(pool.map(abs, range(3000)))
                futures = [pool.submit(*call) for call in [(abs, 1)] * 5 + [(exec, wait)] + [(f, 1)] * 60]
                print(sum(future.result() for future in futures[6:]))
                open(%r, "w").close()
        """ % (pooled.path("begun"), pooled.path("gate"), pooled.path("gate")))
    assert out == "60\n" and read(pooled.path("begun")) == b"x"


def test_a_silent_worker_is_told_and_its_loss(pooled, monkeypatch):
    monkeypatch.setenv("CEXEC_TIMEOUT_PINGPONG", "3")
    first, said = pooled.path("first"), []
    once = "import os, time\nif not os.path.exists(%r):\n open(%r, 'w').write(str(os.getppid()))\n time.sleep(1000)"
    with cexec.Executor(pooled.pub) as pool:
        monkeypatch.setattr(pool._pool, "tell", said.append)
        future = pool.submit(exec, once % (first, first))
        supervisor = int(until(lambda: os.path.exists(first) and read(first), "the start of a call"))
        os.kill(supervisor, signal.SIGSTOP)
        try:
            assert future.result(PATIENCE) is None
        finally:
            os.kill(supervisor, signal.SIGKILL)
    assert re.match(r"%s \(silent for \d s, lost after 3\)$" % re.escape(os.uname().nodename), said[0])
    assert said[1].endswith("no sign of life for 3 s; the command may have run; runs its calls again")


def test_an_executor_says_on_a_terminal_that_it_looks_for_a_worker(cluster, monkeypatch):
    live_in(cluster, monkeypatch)
    for terminal in True, False:
        out = main_program(cluster, """
            if __name__ == "__main__":
                with cexec.Executor(POOL) as pool:
                    print(type(pool.submit(abs, 1).exception()).__name__)
            """, terminal=terminal, env={"CEXEC_TIMEOUT_ACCEPT": "5" if terminal else "1"})
        assert out == "cexec: looking for a worker (cexec -l finds out more)\n" * terminal + "Failed\n"


@pytest.mark.parametrize("says", ["", "yes from-the-holder"])
def test_pipes_that_somebody_else_holds_do_not_keep_an_executor(cluster, monkeypatch, says):
    """A process that the client has left behind holds all of them, and may write."""
    live_in(cluster, monkeypatch)
    monkeypatch.chdir(cluster.directory)
    monkeypatch.setattr(cexec, "LET_GO_SECONDS", 0.1)
    holders = []

    def holding(*words, **options):
        reader, writer = os.pipe()
        standard = {name: options[name] for name in ("bufsize", "stdin", "stdout", "stderr")}
        child = subprocess.Popen(["sh", "-c", "(%s; exec sleep 1000) & echo $! >holder" % (says or ":")],
                                 pass_fds=[writer], **standard)
        os.close(writer)
        holders.append(int(until(lambda: os.path.exists("holder") and read("holder"), "the holder")))
        os.unlink("holder")
        return child, reader
    monkeypatch.setattr(cexec, "start_client", holding)
    pool = cexec.Executor(cluster.pub)
    try:
        future = pool.submit(pow, 2, 3)
        ended_in_time(pool.shutdown)
        assert isinstance(future.exception(), cexec.Failed)
    finally:
        for pid in holders:
            os.kill(pid, signal.SIGKILL)
        ended_in_time(pool.shutdown)


def ended_in_time(call, *arguments, **options):
    """Calls it in a thread, and fails if it does not return."""
    thread = threading.Thread(target=call, args=arguments, kwargs=options, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), "%s does not return" % call.__name__


def test_callbacks_run_in_the_pools_thread_and_may_submit_and_shut_down(pooled):
    pool, done = cexec.Executor(pooled.pub, max_workers=1), []

    def called(future):
        done.append(threading.current_thread().name)
        try:
            done.append(pool.submit(abs, -1))
        except RuntimeError:
            done.append("refused")

    gate = pooled.path("gate")
    running = pool.submit(exec, "import os, time\nwhile not os.path.exists(%r): time.sleep(0.01)" % gate)
    until(running.running, "the start of a call")
    running.add_done_callback(lambda future: pool.shutdown())
    waiting = [pool.submit(abs, -number) for number in range(3)]
    waiting[0].add_done_callback(called)
    assert waiting[0].cancel() and done[0] == threading.current_thread().name      # cancel() itself calls it
    for future in waiting[1:]:
        future.add_done_callback(called)
    until(lambda: len(pool._pool.queue) == 3, "that the calls wait")       # the head, which is cancelled, has left
    ended_in_time(pool.shutdown, wait=False, cancel_futures=True)
    touch(gate)
    ended_in_time(pool.shutdown)
    assert running.result() is None and all(future.cancelled() for future in waiting + done[1:2])
    assert done[2:] == ["cexec.Executor", "refused"] * 2


def test_a_callback_that_exits_ends_only_itself(pooled, capsys):
    with cexec.Executor(pooled.pub) as pool:
        for _ in range(2):
            pool.submit(time.sleep, 0.1).add_done_callback(lambda future: sys.exit("from a callback"))
        assert pool.submit(pow, 2, 3).result(PATIENCE) == 8
    assert capsys.readouterr().err.count("SystemExit: from a callback") == 2


@pytest.mark.parametrize("place", ["take_in", "dispatch"])
def test_a_call_that_comes_while_the_thread_looks_is_not_forgotten(pooled, monkeypatch, place):
    """Right after its look at the inbox, before it sleeps."""
    pool, real, late = cexec.Executor(pooled.pub), getattr(cexec.Pool, place), []

    def looked(self):
        real(self)
        if not late:
            ended_in_time(lambda: late.append(pool.submit(pow, 2, 3)))
    monkeypatch.setattr(cexec, "LANE_IDLE_SECONDS", 0)
    with pool:
        state = pool._pool
        assert pool.submit(abs, -1).result(PATIENCE) == 1
        until(lambda: not (state.lanes or state.queue or state.ticking), "that only the inbox can wake it")
        monkeypatch.setattr(cexec.Pool, place, looked)
        with state.gate:
            state.wake()
        until(lambda: late, "the call")
        assert late[0].result(PATIENCE) == 8


def test_a_call_at_the_threads_end_is_refused(pooled, monkeypatch):
    refused = []

    def stopping(self):
        ended_in_time(lambda: refused.append(pytest.raises(RuntimeError, pool.submit, abs, 1)))
        stop(self)
    stop = cexec.Pool.stop_thread
    monkeypatch.setattr(cexec.Pool, "stop_thread", stopping)
    pool = cexec.Executor(pooled.pub)
    future = pool.submit(abs, -1)
    ended_in_time(pool.shutdown)
    assert future.result() == 1 and len(refused) == 1 and not pool._pool.inbox


def test_calls_that_are_cancelled_need_no_worker(pooled, monkeypatch):
    monkeypatch.setenv("CEXEC_TIMEOUT_ACCEPT", "1000")
    monkeypatch.setenv("GROUP", "127.255.255.255:%d" % free_port())
    for cancel in True, False:
        pool = cexec.Executor(pooled.pub)
        futures = [pool.submit(abs, number) for number in range(3)]
        until(lambda pool=pool: pool._pool.lanes, "a search")
        if not cancel:
            assert all(future.cancel() for future in futures)
        ended_in_time(pool.shutdown, cancel_futures=cancel)
        assert concurrent.futures.wait(futures, PATIENCE)[0] == set(futures)


def test_an_executor_that_nobody_has_any_more_ends(pooled):
    """After its calls; nothing is left of it, no thread and no descriptor."""
    before = os.listdir("/dev/fd")
    pool = cexec.Executor(pooled.pub)
    future, thread = pool.submit(time.sleep, 0.3), pool._pool.thread
    until(future.running, "the start of the call")
    del pool
    gc.collect()
    assert future.result(PATIENCE) is None
    until(lambda: not thread.is_alive() and not lanes_of(pooled), "the end")
    with cexec.Executor(pooled.pub) as pool:
        assert pool.submit(abs, -1).result() == 1
    assert pool and os.listdir("/dev/fd") == before


@pytest.mark.parametrize("python", sorted({PYTHONS[0], PYTHONS[-1], os.path.realpath(PYTHON)}))
def test_an_executor_and_a_fork(cluster, monkeypatch, python):
    """The child has calls of its own.  Both end, with an idle pool that nobody has shut down."""
    live_in(cluster, monkeypatch)
    cluster.worker(*LANE, env={"CONCURRENCY": "2", "BOOST": "0"})
    assert main_program(cluster, """
        import os, sys, time
        if __name__ == "__main__":
            cexec.LANE_IDLE_SECONDS = 0
            pool = cexec.Executor(POOL)
            running = pool.submit(time.sleep, 0.5)
            child = os.fork()
            if child == 0:
                print(pool.submit(pow, 2, 3).result(), flush=True)
                sys.exit(7)
            print(os.waitpid(child, 0)[1] >> 8, running.result(), pool.submit(pow, 2, 4).result())
            while pool._pool.lanes:
                time.sleep(0.01)
        """, python=python, before=["-W", "ignore", cluster.path("program/main.py")]) == "8\n7 None 16\n"


def test_many_threads_submit_cancel_and_shut_down(pooled):
    """Each call that was taken is done, or was cancelled; none is forgotten."""
    with cexec.Executor(pooled.pub) as warm:
        warm.submit(abs, 1).result(PATIENCE)
    for turn in range(10):
        pool, taken, refused = cexec.Executor(pooled.pub, max_workers=2), [], []

        def submit(pool=pool, taken=taken, refused=refused):
            try:
                for number in range(400):
                    taken.append(pool.submit(abs, -number))
                    if number % 3 == 0:
                        taken[-1].cancel()
            except RuntimeError:
                refused.append(True)
        threads = [threading.Thread(target=submit) for _ in range(4)]
        for thread in threads:
            thread.start()
        until(lambda taken=taken: len(taken) > 100 * turn, "some calls")
        enders = [threading.Thread(target=pool.shutdown, kwargs={"cancel_futures": turn % 2 == 0}) for _ in range(3)]
        for thread in enders:
            thread.start()
        for thread in threads + enders:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert taken and all(future.done() for future in taken)


# ---- The applets: what a user is told --------------------------------------

@pytest.fixture(scope="module")
def taken():
    """A port that is taken, for TCP and for UDP."""
    for _ in range(100):
        with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            tcp.bind(("", 0))
            with contextlib.suppress(OSError):
                udp.bind(("", tcp.getsockname()[1]))
                tcp.listen(1)
                yield tcp.getsockname()[1]
                return
    pytest.fail("no port is free")


def refused(applet, code, message, *words, **env):
    name = "-".join([applet, *map(str, words), *("%s=%s" % item for item in env.items())])
    return pytest.param(applet, code, message, words, env, id=name)


NUMBER_SETTINGS = ("MAXFD", "CEXEC_MAXFD", "CEXEC_TIMEOUT_ACCEPT", "CEXEC_TIMEOUT_WAIT", "CEXEC_TIMEOUT_PINGPONG",
                   "CEXEC_TIMEOUT_LINGER", "CEXEC_FD_FOR_ERRORS")

REFUSED = [
    refused("cexec", 100, "no public key is named"),
    refused("cexec", 100, "no public key is named", "-v"),
    refused("cexec", 100, "no public key is named (see cexec -h)", "-vm"),
    refused("cexec", 100, "no such option: -k (see cexec -h)", "-m", "-k", "app.pub"),
    refused("cexec", 100, "no such option: --mad (see cexec -h)", "--mad", "app.pub"),
    refused("cexec", 100, "-o no/{}: there is no directory no (mkdir -p makes one)", "-m", "-o", "no/{}", "app.pub",
            "--", "nothing", "app", "app.pub"),
    refused("cexec", 100, "no such option: -²", "-n²", "app.pub"),
    refused("cexec", 100, "missing.pub: no such public key: is the name right?", "missing.pub"),
    refused("cexec", 100, "directory: Is a directory: name the public key in it", "directory"),
    refused("cexec", 100, "-n x: not a descriptor's number", "-n", "x", "app.pub"),
    refused("cexec", 100, "missing.pub: no such public key: is the name right?", "-n", "missing.pub", "uname"),
    refused("cexec", 100, "-b app.pub: not a size as in 64M", "-b", "app.pub"),
    refused("cservice", 100, "-a: options come before the private key (see cservice -h)", "app", "-a"),
    refused("cservice", 100, "-s: options come before the private key (see cservice -h)", "app", "-s", "box", "cat"),
    refused("ckeygen", 100, "new.pub: no such private key, and a new one needs another name", "new.pub"),
    *(refused("cexec", 100, "does not go with -" + mode, words, "app.pub")
      for words, mode in (("-lm", "l"), ("-lr", "l"), ("-mt", "m"), ("-mp", "m"), ("-nl", "l"))),
    refused("cexec", 100, "A=b is one word too many (see cexec -h)", "-l", "app.pub", "A=b"),
    refused("cexec", 100, "-p and -t do not go together: the command has the terminal", "-pt", "app.pub"),
    refused("cexec", 100, "no public key is named (see cexec -h)", "-m"),
    refused("cexec", 100, "no files are named: -- FILE ..., or -- - for a list on standard input (see cexec -h)",
            "-m", "app.pub"),
    refused("cexec", 100, "large: File too large: not a cexec public key", "large"),
    refused("cservice", 100, "large: File too large: not a cexec private key", "large", "true"),
    refused("cexec", 100, "missing: no such public key, and no missing.pub: is the name right?", "-n", "missing"),
    refused("cexec", 100, "missing: no such public key", "-n", "missing", "A=b"),
    refused("cexec", 100, "junk: not a cexec public key", "junk"),
    refused("cexec", 100, "empty: not a cexec public key", "empty"),
    refused("cexec", 100, "lonely: a private key where the public key is needed (ckeygen lonely writes it)", "lonely"),
    refused("cexec", 100, "short.pub: damaged public key", "short.pub"),
    refused("cexec", 100, "later.pub: a public key of another version", "later.pub"),
    *(refused("cexec", 100, "%s=%s: not a whole number" % (name, value), "app.pub", **{name: value})
      for name in NUMBER_SETTINGS for value in ("x", "-2", "1.5", "99999999999999")),
    refused("cexec", 100, "MAXFD=2: not a whole number from 3 to 1024", "app.pub", MAXFD="2"),
    refused("cexec", 100, "CEXEC_FD_FOR_ERRORS=31: not a whole number from 32 to 1048576; CEXEC_MAXFD, which can be "
            "lowered, is 32", "app.pub", CEXEC_FD_FOR_ERRORS="31"),
    refused("cexec", 100, "CEXEC_FD_FOR_ERRORS=77: Bad file descriptor", "app.pub", CEXEC_FD_FOR_ERRORS="77"),
    refused("cexec", 100, "CEXEC_LISTEN_PORTS=x: use ports and ranges", "app.pub", CEXEC_LISTEN_PORTS="x"),
    refused("cexec", 100, "CEXEC_LISTEN_PORTS=²: use ports and ranges", "app.pub", CEXEC_LISTEN_PORTS="²"),
    refused("cexec", 100, "CEXEC_LISTEN_PORTS=70000: use ports", "app.pub", CEXEC_LISTEN_PORTS="70000"),
    refused("cexec", 100, "CEXEC_LISTEN_PORTS=20-10: an empty range", "app.pub", CEXEC_LISTEN_PORTS="20-10"),
    refused("cexec", 111, "no free port to listen on: Address already in use (see CEXEC_LISTEN_PORTS) "
            "(as root, ss -tuanp sport = :TAKEN shows by whom)", "app.pub", CEXEC_LISTEN_PORTS="TAKEN"),
    refused("cexec", 100, "-j needs a number from 1", "-m", "-j", "0" * 5000, "app.pub", "--", "x"),
    refused("cexec", 100, ": use ports and ranges", "app.pub", CEXEC_LISTEN_PORTS="9" * 5000),
    refused("cexec", 100, ": not [DEVICE:]ADDRESS[:PORT]", "app.pub", CEXEC_GROUP="127.0.0.1:" + "9" * 5000),
    refused("cexec", 100, ": not a whole number from", "app.pub", CEXEC_MAXFD="9" * 5000),
    refused("cexec", 100, "CEXEC_ACCEPT_SERVER: ", "app.pub", CEXEC_ACCEPT_SERVER="10.0.0.0/99"),
    refused("cexec", 100, "CEXEC_REJECT_SERVERS: ", "app.pub", CEXEC_REJECT_SERVERS="some/body"),
    *(refused(applet, 100, "group %s: %s" % (value, message), *words, CEXEC_GROUP=value)
      for applet, words in (("cexec", ["app.pub"]), ("cservice", ["app", "true"]))
      for value, message in (("127.0.0.1.2", "not an address"), ("127.0.0.1:0", "not [DEVICE:]ADDRESS[:PORT]"),
                             ("127.0.0.1:99999", "not [DEVICE:]ADDRESS[:PORT]"), (":", "not [DEVICE:]ADDRESS[:PORT]"),
                             ("127.0.0.1,", "not [DEVICE:]ADDRESS[:PORT]"))),
    *(refused(applet, 111, "group %s: no such device: nodevice" % value, *words, CEXEC_GROUP=value)
      for applet, words in (("cexec", ["app.pub"]), ("cservice", ["app", "true"]), ("crat", []),
                            ("cproxy", ["127.0.0.1"]))
      for value in ("nodevice:127.255.255.255", "[fe80::1%nodevice]")),
    refused("cexec", 100, "(from GROUP: set CEXEC_GROUP)", "app.pub", GROUP="staff:"),
    refused("cexec", 100, "(from CEXEC_GROUP)", "app.pub", CEXEC_GROUP="127.0.0"),
    refused("cexec", 100, "group 10.0.0.0/8: 10.0.0.0/8 has more than 1024 addresses (from", "app.pub",
            CEXEC_GROUP="10.0.0.0/8"),
    refused("cproxy", 100, "group a:b:c: not [DEVICE:]ADDRESS[:PORT] (TARGET)", "127.0.0.1", "a:b:c"),
    refused("cproxy", 111, "SELF 192.0.2.99: not an address of this machine (which has 127.0.0.1", "192.0.2.99"),
    refused("cproxy", 111, "SELF [fe80::1%nodevice]: no such device: nodevice", "[fe80::1%nodevice]"),
    refused("cproxy", 100, "SELF 127.0.0.300: not an address: 127.0.0.300", "127.0.0.300"),
    refused("cproxy", 100, "SELF 127.0.0.0/30: stands for 2 addresses", "127.0.0.0/30"),
    refused("cproxy", 100, "no address SELF is named (see cproxy -h)"),
    refused("cproxy", 100, "c is one word too many (see cproxy -h)", "127.0.0.1", "127.0.0.2", "c"),
    refused("ckeygen", 100, "c is one word too many (see ckeygen -h)", "a", "b", "c"),
    refused("cservice", 100, "no private key is named"),
    refused("cservice", 100, "no command is named", "app"),
    refused("cservice", 100, "-u", "-u"),
    refused("cservice", 100, "missing: No such file or directory: is the name right? (ckeygen", "missing", "true"),
    refused("cservice", 100, "directory: Is a directory: name the private key in it", "directory", "true"),
    refused("cservice", 100, "app.pub: a public key where the private key is needed", "app.pub", "true"),
    refused("cservice", 100, "junk: not a cexec private key", "junk", "true"),
    refused("cservice", 100, "empty: not a cexec private key", "empty", "true"),
    refused("cservice", 100, "mixed: invalid private key", "mixed", "true"),
    refused("cservice", 100, "-u nobody-here: no such user", "-u", "nobody-here", "app", "true"),
    refused("cservice", 100, "client name 'a b'", "-x", "a b", "app", "true"),
    *(refused("cservice", 100, "%s=%s: not a whole number" % (name, value), "app", "true", **{name: value})
      for name in ("CONCURRENCY", "BOOST") for value in ("x", "-2", "1.5", "99999999999")),
    refused("cservice", 100, "CONCURRENCY=0: not a whole number from 1", "app", "true", CONCURRENCY="0"),
    refused("cservice", 111, "cannot listen on UDP port TAKEN: Address already in use "
            "(as root, ss -uanp sport = :TAKEN shows by whom)", "app", "true", GROUP="127.255.255.255:TAKEN"),
    *(refused("ckeygen", 100, "", *words) for words in (
        [], ["-n"], ["-n", "", "x"], ["-n", "a b", "x"], ["-n", "a" * 65, "x"], ["x", "x"], ["x", "./x"],
        ["--nonsense", "x"])),
    refused("ckeygen", 100, "nothing to read", "-stdin", "x"),
    refused("crat", 100, "not a cexec public key", "junk"),
    refused("crat", 100, "no such public key", "missing"),
    refused("crat", 100, "Not a directory: is the name right?", "app/none"),
    refused("crat", 100, "-t: standard output is no terminal with a screen: leave -t out, and the log is lines", "-t",
            "app.pub"),
    refused("crat", 100, "-j and -t do not go together: leave one of them out", "-jt", "app.pub"),
    refused("crat", 111, "none: No such file or directory", "--svg", "none"),
    refused("crat", 111, "/: Is a directory", "--svg", "/"),
    refused("crat", 100, "app:1: neither a joblog's 9 fields", "--svg", "app"),
    refused("crat", 100, "/dev/zero:1: a line without an end", "--svg", "/dev/zero"),
    refused("crat", 100, "-j does not go with --svg", "--svg", "-j", "log"),
    refused("crat", 100, "-t does not go with --svg", "--svg", "-t", "log"),
]


@pytest.fixture(scope="module")
def blunders(shared):
    """The files that REFUSED names."""
    shared.run("ckeygen", shared.path("lonely"), shared.path("other.pub"), check=True)
    os.mkdir(shared.path("directory"))
    with open(shared.pub) as file:
        words = file.read().split()
    with open(shared.key) as key, open(shared.path("lonely")) as lonely:
        own, other = key.read(), lonely.read()
    certificate = other.index("-----BEGIN CERTIFICATE")
    for name, text in (("junk", "junk\n"), ("empty", ""), ("large", own + " " * cexec.CONTROL_MAX),
                       ("short.pub", " ".join(words)[:-2] + "\n"),
                       ("later.pub", " ".join(words[:1] + ["2"] + words[2:]) + "\n"),
                       ("mixed", own[:own.index("-----BEGIN CERTIFICATE")] + other[certificate:])):
        with open(shared.path(name), "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(text)
    return shared


@pytest.mark.parametrize("applet, code, message, words, env", REFUSED)
def test_what_is_refused_is_told_in_one_line(blunders, taken, applet, code, message, words, env):
    """Of standard error; nothing is on standard output, no file is made, and the exit code is the manual's."""
    env = {name: value.replace("TAKEN", str(taken)) for name, value in env.items()}
    before = sorted(os.listdir(blunders.directory))
    line = refusal(blunders.run_here(applet, *words, env=env), code, message.replace("TAKEN", str(taken)))
    assert line.startswith(applet + ": ") and "Traceback" not in line and "Error:" not in line
    assert sorted(os.listdir(blunders.directory)) == before


@pytest.mark.parametrize("applet, code, words", [("cexec", 100, ["-Z"]), ("cservice", 100, ["missing", "true"]),
                                                 ("crat", 100, ["missing"]), ("cproxy", 111, ["192.0.2.99"])])
def test_what_is_refused_by_a_process_of_its_own(one, applet, code, words):
    assert refusal(one.run(applet, *words), code, "").startswith(applet + ": ")


def test_a_search_without_an_answer_says_where_it_asked(one):
    port = free_port()
    done = one.client(env={"GROUP": "127.255.255.255:%d" % port, "CEXEC_TIMEOUT_ACCEPT": "1"})
    assert done.returncode == 111
    assert re.fullmatch(r"cexec: no worker answered in \d+ s on 127\.255\.255\.255:%d \(is cservice running with this "
                        r"key\?\): cexec -l finds out more\n" % port, done.stderr.decode())


@pytest.mark.parametrize("words, env, status", [
    ([], {}, 100), (["missing.pub"], {}, 100), (["app.pub"], {"MAXFD": "x"}, 100),
    (["app.pub"], {"GROUP": "127.255.255.255:9", "CEXEC_TIMEOUT_ACCEPT": "1"}, 111)])
def test_what_is_refused_with_standard_error_closed(one, words, env, status):
    """The message has nowhere to go: it lands in no other file, and the code is the same."""
    reader, writer = os.pipe()
    process = one.popen(one.argv("cexec", *words), env=env, close_fds=False,
                        preexec_fn=placed({1: writer, 2: None, 3: writer, 4: writer}))
    os.close(writer)
    assert (read_all(reader), process.wait(PATIENCE)) == (b"", status)


def test_install_says_what_it_cannot_do(cluster):
    make_file(cluster, "file")
    refusal(cluster.run("--install", "file"), 111, "file: File exists")
    refusal(cluster.run("--install", "file/links"), 111, "file/links: Not a directory")
    os.makedirs(cluster.path("links/crat"))
    refusal(cluster.run("--install", "links"), 111, "links/crat: File exists")
    refusal(cluster.run("--install"), 100, "--install takes one directory")


def test_install_makes_the_program_executable(cluster):
    copy = shutil.copy(PROGRAM, cluster.path("copied.py"))
    os.chmod(copy, 0o644)
    links, env = cluster.path("links"), cluster.environment()
    for path, said in ((env["PATH"], b"is not in PATH yet: export PATH=%s:$PATH\n" % os.fsencode(links)),
                       (env["PATH"] + ":" + links, b"")):
        done = subprocess.run([PYTHON, copy, "--install", links], check=True, env=dict(env, PATH=path),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert done.stderr.endswith(said) and bool(done.stderr) == bool(said)
        assert done.stdout.decode() == "%s: links to ../copied.py: %s\n" % (links, ", ".join(cexec.APPLETS))
    assert os.access(copy, os.X_OK)
    assert {os.path.realpath(cluster.path("links/" + name)) for name in cexec.APPLETS} == {copy}


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("defect, said", [
    ('{}["x"]', "internal error: KeyError: 'x'"),
    ("raise OSError(24, 'Too many open files')", "Too many open files: this needs more descriptors (see ulimit -n)"),
    ("raise OSError(12, 'Cannot allocate memory')", cexec.NO_MEMORY), ("raise MemoryError", cexec.NO_MEMORY),
    ("raise OSError('malloc failure')", cexec.NO_MEMORY)])
def test_a_defect_is_one_line_and_111(defect, said, verbose, tmp_path):
    broken = put(str(tmp_path / "broken.py"), read(PROGRAM).decode().replace(
        'def main_cexec(argv):\n', 'def main_cexec(argv):\n    log.verbose = %s\n    %s\n' % (verbose, defect)))
    done = subprocess.run([PYTHON, broken, "cexec", "app.pub"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE)
    *before, line = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout, line) == (111, b"", "cexec: " + said)
    assert bool(before) == verbose and (not before or before[0].startswith("Traceback"))


@pytest.mark.parametrize("module", ["select", "ssl"])
def test_a_library_that_cannot_be_mapped_is_a_lack_of_memory(cluster, module):
    """Python calls that an ImportError; the first is imported at the start, the other one when it is needed."""
    put(cluster.path(module + ".py"), "raise ImportError('x.so: failed to map segment from shared object')")
    done = cluster.run("cservice", cluster.key, "cat", env={"PYTHONPATH": cluster.directory})
    assert failed(done).decode().rpartition(": ")[2] == cexec.NO_MEMORY + "\n" and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("applet", sorted(cexec.APPLETS))
def test_help_tells_where_the_environment_is_explained(one, applet):
    assert one.run(applet, "-h").stdout.decode().endswith(
        "environment variables, examples and the rest: %s(1)\n" % applet)


def test_standard_input_that_is_a_directory_is_said(cluster):
    cluster.launch = ["sh", PROGRAM]
    fd = os.open("/", os.O_RDONLY)
    refusal(cluster.client(stdin=fd), 100, "standard input is a directory")
    os.close(fd)


@pytest.mark.parametrize("words", [["-h"], ["--version"], ["cexec", "-h"], ["cexec", "--version"],
                                   ["cexec", "-l", "PUB"], ["crat"]], ids=" ".join)
def test_standard_output_that_cannot_be_written_is_said(one, words):
    with open("/dev/full", "w") as full:
        process = one.popen([*one.launch, *(one.pub if word == "PUB" else word for word in words)], stdout=full,
                            stderr=subprocess.PIPE)
    if words == ["crat"]:
        until(lambda: listening(process.pid), "a logger's start")
        assert one.client("CMD=true").returncode == 0
    applet = words[0] if words[0][0] != "-" else "cexec"
    assert process.stderr.read().decode() == applet + ": standard output: No space left on device\n"
    assert process.wait(PATIENCE) == 111


def test_crat_and_ckeygen_say_what_is_closed(keys):
    for words, closed, message in ((["crat", keys.pub], 1, "standard output is closed"),
                                   (["ckeygen", "-stdin", keys.path("new")], 0, "standard input is closed")):
        reader, writer = os.pipe()
        process = keys.popen(keys.argv(*words), close_fds=False, preexec_fn=placed({2: writer, closed: None}))
        os.close(writer)
        line = read_all(reader).decode()
        assert process.wait(PATIENCE) == 100 and message in line and line.count("\n") == 1


@pytest.mark.parametrize("closed", CLOSED_AT_START, ids=lambda numbers: "".join(map(str, numbers)))
def test_standard_descriptors_closed(cluster, closed):
    """A worker without them serves whole jobs, a client has what it has, and ckeygen works."""
    close = placed(dict.fromkeys(closed))

    def start(applet, *words):
        return cluster.popen(cluster.argv(applet, *words), close_fds=False, preexec_fn=close)
    worker = start("cservice", cluster.key, "sh", "-c", SHELL)
    until(lambda: listening(worker.pid), "a worker's start")
    there_and_back(cluster)
    look = "CMD=for n in 0 1 2; do [ -e /proc/$$/fd/$n ] && touch %s$n; done; exit 6" % cluster.path("seen")
    assert start("cexec", cluster.pub, look).wait(PATIENCE) == 6
    assert [number for number in range(3) if not os.path.exists(cluster.path("seen%d" % number))] == list(closed)
    assert start("ckeygen", cluster.path("new"), cluster.path("new.pub")).wait(PATIENCE) == 0
    assert read(cluster.path("new.pub")).startswith(b"cexec-public-key")
    assert start("cexec", "--version").wait(PATIENCE) == 0
    logger = start("crat", cluster.pub)
    if 1 in closed:
        assert logger.wait(PATIENCE) == 100
    else:
        until(lambda: listening(logger.pid), "a logger's start")
    relay = start("cproxy", "127.0.0.1", "127.255.255.255:9")
    until(lambda: listening(relay.pid), "a proxy's start")


# ---- The door --------------------------------------------------------------

def test_links_are_started_by_their_first_line(cluster):
    """As a shell starts them: by sh, which starts the python3 of PATH without its site packages."""
    os.mkdir(cluster.path("bin"))
    os.symlink(PYTHON, cluster.path("bin/python3"))
    cluster.run("--install", cluster.path("bin"), check=True)
    env = cluster.environment({"PATH": cluster.path("bin") + ":" + os.environ["PATH"]})
    worker = subprocess.Popen(["cservice", "-v", cluster.key, "cat"], env=env, stdin=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, executable=cluster.path("bin/cservice"))
    cluster.started.append(worker)
    assert b"serves" in worker.stderr.readline()
    words = read("/proc/%d/cmdline" % worker.pid).rstrip(b"\0").split(b"\0")
    assert words[1:] == [b"-S", *map(os.fsencode, (cluster.path("bin/cservice"), "-v", cluster.key, "cat"))]
    assert read("/proc/%d/comm" % worker.pid) == b"cservice\n"
    done = subprocess.run([cluster.path("bin/cexec"), cluster.pub], input=b"hello", stdout=subprocess.PIPE, env=env,
                          timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, b"hello")


@pytest.fixture
def linked(cluster):
    """A copy of the file with its link, and a cache of its own; linked.version() runs it and gives what it prints."""
    return link_of(cluster, read(PROGRAM).decode())


def link_of(cluster, text):
    for name in ("bin", "cache"):
        os.mkdir(cluster.path(name))
    os.symlink(PYTHON, cluster.path("bin/python3"))
    copy, link = put(cluster.path("copied.py"), text, 0o755), cluster.path("bin/cexec")
    os.symlink("../copied.py", link)
    env = cluster.environment({"PATH": cluster.path("bin") + ":" + os.environ["PATH"],
                               "XDG_CACHE_HOME": cluster.path("cache")})

    def version(before="", **changes):
        values = {key: value for key, value in dict(env, **changes).items() if value is not None}
        done = subprocess.run(["sh", "-c", before + 'exec "$0" --version', link], env=values,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE)
        assert done.returncode == 0, done.stdout
        return done.stdout.decode().strip()
    return SimpleNamespace(version=version, copy=copy, cache=cluster.path("cache/cexec"), path=cluster.path, env=env)


def only_file(directory):
    name, = os.listdir(directory)
    return os.path.join(directory, name)


def make_another(kept, source):
    """Has the kept code be version 2.0, as if it had been compiled so."""
    about = os.stat(source)
    version = int(subprocess.check_output([PYTHON, "-Sc", "import sys; print(sys.hexversion)"]))
    of = repr((version, source, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)).encode()
    code = read(kept)[32:]
    assert hashlib.sha256(of + code).digest() == read(kept)[:32]
    code = code.replace(b"\x031.0", b"\x032.0")
    with open(kept, "r+b") as file:
        file.write(hashlib.sha256(of + code).digest() + code)


def test_compiled_code_is_kept_and_taken_again(linked):
    """What the second start runs is the file in the cache: seen by changing that."""
    assert linked.version() == "cexec 1.0"
    kept = only_file(linked.cache)
    assert stat.S_IMODE(os.stat(kept).st_mode) == 0o600
    make_another(kept, linked.copy)
    assert linked.version() == "cexec 2.0"


def codes_of(code):
    """A code object, and those within it."""
    yield code
    for constant in code.co_consts:
        if hasattr(constant, "co_consts"):
            yield from codes_of(constant)


def test_cexec_uses_nothing_of_what_its_link_leaves_out(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/cexec"])
    sections, part = marshal.loads(cexec.compiled(PROGRAM)), ModuleType("part")
    part.__file__ = PROGRAM
    for code in sections:
        exec(code, part.__dict__)
    words = [(word.opname.partition("_")[0], word.argval) for code in sections for inner in codes_of(code)
             for word in dis.get_instructions(inner) if word.opname.endswith(("_NAME", "_GLOBAL"))]
    there = set(vars(part)) | set(dir(builtins)) | {name for kind, name in words if kind == "STORE"}
    assert {name for kind, name in words if kind == "LOAD"} <= there
    assert not hasattr(part, "Worker")


def test_no_name_is_given_twice():
    """In one long file the second would quietly take the place of the first."""
    names = []
    for one in ast.parse(read(cexec.__file__)).body:
        for each in [one] + [each for target in getattr(one, "targets", []) for each in ast.walk(target)]:
            if isinstance(each, (ast.FunctionDef, ast.ClassDef)):
                names.append(each.name)
            elif isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
                names.append(each.id)
    assert len(names) > 500 and sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("name", ["cexec", "cservice"])
def test_each_section_is_compiled_by_itself_and_lines_keep_their_numbers(name, monkeypatch):
    """The whole at once would take 22 or 39 MB, and half as much time again."""
    monkeypatch.setattr(sys, "argv", ["/usr/bin/" + name])
    sections, banners = marshal.loads(cexec.compiled(PROGRAM)), read(PROGRAM).count(b"\n# " + b"-" * 75 + b"\n")
    assert len(sections) == banners + 1 if name == "cservice" else 30 < len(sections) <= banners
    lines = [""] + read(PROGRAM).decode().split("\n")
    found = [code for section in sections for code in codes_of(section) if code.co_name.isidentifier()]
    assert all(re.match(r" *(@|(def|class) %s\b)" % code.co_name, lines[code.co_firstlineno]) for code in found)
    assert len(found) > 700


def test_the_door_fits_into_what_is_read_of_it():
    assert len(read(PROGRAM).rpartition(b"\n# START\n")[2]) < 4000


@pytest.fixture
def door(cluster):
    """The same of a file that has nothing but its version and the door, and is compiled in no time."""
    text = read(PROGRAM).decode()
    head, place = "".join(text.splitlines(True)[:10]) + '"""\n', text.index("def show_in_ps")
    main = 'import os, signal, sys\nVERSION = "1.0"\ndef main(argv):\n    print("cexec " + VERSION)\n'
    return link_of(cluster, head + main + "# MAKE\n".join(["", text.split("\n# MAKE\n")[1], text[place:]]))


def replace_by_fifo(path):
    os.unlink(path)
    os.mkfifo(path)


def flip_a_bit(path):
    with open(path, "r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte ^ 4]))


@pytest.mark.parametrize("spoil", [
    lambda door: os.utime(door.copy, ns=(0, 0)), lambda door: os.utime(door.copy),
    lambda door: os.chmod(only_file(door.cache), 0o622),
    lambda door: os.truncate(only_file(door.cache), 2500),
    lambda door: os.truncate(only_file(door.cache), 0),
    lambda door: flip_a_bit(only_file(door.cache)),
    lambda door: replace_by_fifo(only_file(door.cache)),
    lambda door: os.chown(only_file(door.cache), 1, 1),
    lambda door: os.rename(door.copy + ".new", door.copy),
], ids=["old", "touched", "writable", "cut", "empty", "flipped", "fifo", "foreign", "replaced"])
def test_kept_code_that_may_be_another_is_not_run(door, spoil):
    need("root")
    shutil.copy2(door.copy, door.copy + ".new")
    door.version()
    make_another(only_file(door.cache), door.copy)
    assert door.version() == "cexec 2.0"
    spoil(door)
    assert door.version() == "cexec 1.0"


@pytest.mark.parametrize("changes", [
    {"XDG_CACHE_HOME": None, "HOME": None}, {"XDG_CACHE_HOME": "/dev/null"}, {"XDG_CACHE_HOME": "/proc"},
    {"XDG_CACHE_HOME": "/nowhere/at/all"}, {"XDG_CACHE_HOME": "", "HOME": ""},
    {"XDG_CACHE_HOME": None, "HOME": "foreign"}])
def test_where_no_code_can_be_kept_it_is_compiled(door, changes):
    need("root")
    os.mkdir(door.path("foreign"))
    os.chown(door.path("foreign"), 1, 1)
    if changes.get("HOME") == "foreign":
        changes = dict(changes, HOME=door.path("foreign"))
    assert door.version(**changes) == "cexec 1.0"
    assert not os.listdir(door.path("foreign")) and not os.path.exists(door.cache)


@pytest.mark.parametrize("call", ["reader, writer = os.pipe()", "pid = os.fork()"])
def test_where_no_child_can_compile_it_is_compiled(door, call):
    text = read(door.copy).decode()
    assert text.count(call) == 1
    put(door.copy, text.replace(call, 'raise OSError("there are too many")'), 0o755)
    assert door.version() == "cexec 1.0"
    assert only_file(door.cache)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_start_that_is_killed_while_it_compiles_leaves_nothing(door, number):
    """Its child holds nothing of it, and ends when it has compiled, although that is more than a pipe takes."""
    began, go = door.path("began"), door.path("go")
    slow = "    open(%r, 'w').close()\n    while not os.path.exists(%r):\n        pass\n" % (began, go)
    slow += "    return bytes(9**6) + marshal.dumps("
    text = read(door.copy).decode().replace("    return marshal.dumps(", slow)
    put(door.copy, text, 0o755)
    start = subprocess.Popen([door.path("bin/cexec"), "--version"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, env=dict(os.environ, XDG_CACHE_HOME=door.path("cache")))
    with start:
        until(lambda: os.path.exists(began), "the compilation")
        child, = children_of(start.pid)
        start.send_signal(number)
        assert start.wait(PATIENCE) == -number
        assert state_of(child) not in (None, "Z")
        assert start.stdout.read() == b""               # to its end
        with pytest.raises(BrokenPipeError):
            os.write(start.stdin.fileno(), b"x")
    put(go, "")
    until(lambda: state_of(child) in (None, "Z"), "the child's end")


@pytest.mark.parametrize("kept", [False, True])
def test_an_interrupt_during_the_start_is_no_traceback(door, kept):
    """Ctrl-C in the first hundredths of a second, before main() takes care of it."""
    text = read(door.copy).decode()
    put(door.copy, text.replace('VERSION = "1.0"', "import signal; os.kill(os.getpid(), signal.SIGINT)"), 0o755)
    for _ in range(1 + kept):
        done = subprocess.run([door.path("bin/cexec"), "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env=dict(os.environ, XDG_CACHE_HOME=door.path("cache")), timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, b"")


@pytest.mark.parametrize("place", ["# START\n", "def enter():\n", "    del sys.argv[0]\n"])
def test_an_interrupt_before_there_is_a_program_is_no_traceback(door, place):
    """At the first bytes of what is read, before anything in it is run that could catch it, and later."""
    text = read(door.copy).decode()
    before, found, after = text.rpartition(place)
    now = "import os; os.kill(os.getpid(), 2)\n"
    indent = " " * (4 if found.endswith(":\n") else len(found) - len(found.lstrip()))
    put(door.copy, before + found + indent + now + after, 0o755)
    done = subprocess.run(["sh", "-c", 'exec "$0" --version', door.path("bin/cexec")], timeout=PATIENCE,
                          env=door.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, b"")


@pytest.mark.parametrize("value", [None, "", ":", ".", "there", "/usr/nowhere:", "/usr/nowhere:there"])
def test_nothing_is_imported_from_the_current_directory(door, tmp_path, value):
    for place in (tmp_path / "here", tmp_path / "here/there"):
        os.mkdir(str(place))
        for name in ("hashlib", "os", "marshal", "stat", "signal"):
            put(place / (name + ".py"), "raise SystemExit('from here')")
    for _ in range(2):
        assert door.version("cd %s && " % shlex.quote(str(tmp_path / "here")), PYTHONPATH=value) == "cexec 1.0"


def test_where_there_is_no_room_for_code_no_half_of_it_is_left(door):
    assert door.version("ulimit -f 1; ") == "cexec 1.0"
    assert os.listdir(door.cache) == []


def spoil_cache(door, spoiled):
    """Has the cache be a directory with 20 older files, which is not ours alone, or a link to one that is."""
    real = door.path("real") if spoiled == "link" else door.cache
    os.makedirs(real, 0o700)
    for number in range(20):
        put(os.path.join(real, "%%a.py.cpython-3%d.all" % number), "")
    os.chmod(real, {"writable": 0o707, "writable by its group": 0o770}.get(spoiled, 0o700))
    if spoiled == "link":
        os.symlink(real, door.cache)
    if spoiled == "foreign":
        os.chown(real, 1, 1)


@pytest.mark.parametrize("spoiled", ["link", "foreign", "writable", "writable by its group"])
def test_no_code_is_kept_where_others_may_write(door, spoiled):
    """And nothing is removed there."""
    need("root")
    spoil_cache(door, spoiled)
    before = sorted(os.listdir(door.cache))
    assert door.version() == "cexec 1.0"
    assert sorted(os.listdir(door.cache)) == before and len(before) == 20


def test_only_files_of_the_cache_are_removed_from_it(door):
    """What a crash has left too; but no files of the user's, of whatever name."""
    ours = ["%%a.py.%s.%s" % (tag, end) for tag in ("cpython-36", "cpython-313", "x-3-y")
            for end in ("cexec", "all", "all.9.part")]
    theirs = ["%d.txt" % number for number in range(20)] + [
        "%a.part", "%a.all", "a.cpython-311.all", "%a.cpython-311.all.txt", "%a.cpython-311.all.part", "%a..cexec"]
    os.makedirs(door.cache, 0o700)
    for name in ours + theirs:
        os.utime(put(os.path.join(door.cache, name), ""), ns=(0, 0))
    door.version()
    left = set(os.listdir(door.cache))
    assert left >= set(theirs) and len(left) == len(theirs) + cexec.KEPT_MAX


def test_code_is_not_kept_if_python_is_told_to_write_none(door):
    assert door.version(PYTHONDONTWRITEBYTECODE="1") == "cexec 1.0"
    assert not os.path.exists(door.cache)
    door.version()
    assert only_file(door.cache)


def test_builds_of_one_version_share_the_kept_code(door):
    """As Debian's Python and one's own may be: neither compiles again what the other has kept."""
    door.version()
    kept = only_file(door.cache)
    make_another(kept, door.copy)
    before = os.stat(kept)
    os.unlink(door.path("bin/python3"))
    another = put(door.path("bin/python3"), textwrap.dedent("""\
        #!/bin/sh
        shift 2; text=$1; shift
        exec "%s" -S -c "import sys; sys.version = 'another build'; $text" "$@"
        """) % PYTHON)
    os.chmod(another, 0o755)
    assert door.version() == "cexec 2.0"
    after = os.stat(only_file(door.cache))
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_no_more_than_some_copies_keep_code(door):
    """The oldest are removed; a copy that is used again is compiled again."""
    names = []
    for number in range(cexec.KEPT_MAX + 2):
        door.version()
        names += set(os.listdir(door.cache)) - set(names)
        for name in os.listdir(door.cache):
            path = os.path.join(door.cache, name)
            os.utime(path, ns=(0, os.stat(path).st_mtime_ns - 10 ** 9))
        os.rename(door.copy, door.path("copied%d.py" % number))
        shutil.copy(door.path("copied%d.py" % number), door.path("copied%d.py" % (number + 1)))
        door.copy = door.path("copied%d.py" % (number + 1))
        os.unlink(door.path("bin/cexec"))
        os.symlink(door.copy, door.path("bin/cexec"))
    assert sorted(os.listdir(door.cache)) == sorted(names[-cexec.KEPT_MAX:])


def test_a_service_that_python_was_given_as_a_file_starts_again_by_the_door(cluster):
    """So that it does not keep the file's syntax tree, with Python's own options; and ps shows what it is."""
    cluster.launch = [PYTHON, "-B", PROGRAM]
    worker = cluster.worker("cat")
    words = read("/proc/%d/cmdline" % worker.pid).rstrip(b"\0").split(b"\0")
    assert words[1:5] == [b"-B", b"-S", os.fsencode(PROGRAM), b"cservice"] and b"cat" == words[-1]
    assert read("/proc/%d/comm" % worker.pid) == b"cexec.py\n"
    assert cluster.client(input=b"hello").stdout == b"hello"


WAYS = {"a link": ["bin/{}"], "a link given to Python": [PYTHON, "bin/{}"], "another name": ["bin/another", "{}"],
        "the file": [PROGRAM, "{}"], "the file given to Python": [PYTHON, PROGRAM, "{}"],
        "another name given to Python": [PYTHON, "bin/another", "{}"], "standard input": [PYTHON, "-", "{}"]}


@pytest.mark.parametrize("kept", [False, True], ids=["compiled", "kept"])
@pytest.mark.parametrize("way", WAYS)
def test_each_applet_does_its_work_however_it_is_started(cluster, way, kept):
    """All five, with one job."""
    def start(applet, *words, **options):
        with open(PROGRAM) as program:
            argv = [word.format(applet) for word in WAYS[way]]
            return cluster.popen([*argv, *words], env=env, stdin=program, stderr=subprocess.STDOUT, **options)

    def done(*words):
        process = start(*words, stdout=subprocess.PIPE)
        return process.communicate(timeout=PATIENCE)[0], process.returncode

    cluster.run("--install", cluster.path("bin"), check=True)
    for name, target in (("python3", PYTHON), ("another", PROGRAM)):
        os.symlink(target, cluster.path("bin/" + name))
    env = {"PATH": cluster.path("bin") + ":" + os.environ["PATH"]}
    if not kept:
        env["XDG_CACHE_HOME"] = cluster.path("nowhere")
    assert done("ckeygen", "new", "new.pub") == (b"", 0)
    with open(cluster.path("log"), "wb") as log:
        logger, relay = start("crat", "new.pub", stdout=log), start("cproxy", "127.0.0.1", "127.255.255.255:9")
        worker = start("cservice", "new", "echo", "served", stdout=subprocess.DEVNULL)
    for process in logger, relay, worker:
        until(lambda process=process: listening(process.pid) or process.poll() is not None, "its start")
    assert [process.poll() for process in (logger, relay, worker)] == [None] * 3
    assert done("cexec", "-n", "new.pub") == (b"served\n", 0)
    until(lambda: b"completed" in read(cluster.path("log")), "the line in the log")


@pytest.mark.parametrize("env", [{}, {"PYTHONSAFEPATH": "1"}])
def test_modules_that_lie_about_are_not_imported(linked, env):
    """Neither beside the file nor where it is run, before and after the code is kept."""
    for name in ("os", "socket", "hmac", "marshal", "stat"):
        with open(linked.path(name + ".py"), "w") as file:
            file.write("raise SystemExit('imported %s')" % name)
    before = os.getcwd()
    os.chdir(linked.path(""))
    try:
        assert [linked.version(**env) for _ in range(2)] == ["cexec 1.0"] * 2
        done = subprocess.run([PYTHON, linked.copy, "--version"], env={**os.environ, **env}, stdout=subprocess.PIPE)
        assert done.stdout == b"cexec 1.0\n"
    finally:
        os.chdir(before)


@pytest.mark.parametrize("kept", [True, False])
def test_too_little_memory_is_said(cluster, kept):
    """However little it is, once Python itself can start."""
    text = 'ulimit -v $0; "$@"'
    link, env = cluster.path("cexec"), dict(cluster.env, HOME=cluster.directory)
    os.symlink(PROGRAM, link)
    if kept:
        subprocess.run([link, "--version"], env=dict(os.environ, **env), check=True, stdout=subprocess.DEVNULL)
    told, done = 0, None
    for size in range(8000, 100000, 1000):
        here = subprocess.run(["sh", "-c", text, str(size), "python3", "-S", "-c", "import os, stat, signal, hashlib"],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if here.returncode == 0:
            done = cluster.do(["sh", "-c", text, str(size), link, cluster.pub], env=dict(
                env, CEXEC_TIMEOUT_ACCEPT="1", XDG_CACHE_HOME=None, PYTHONDONTWRITEBYTECODE=None if kept else "1"))
            assert done.returncode == 111 and re.fullmatch(
                b"cexec: [^\n]*(memory \\(see ulimit -v|no worker answered)[^\n]*\n", done.stderr), (size, done)
            if b"memory" not in done.stderr:
                break
            told += 1
    assert told and b"no worker" in done.stderr


# ---- Faults: a man in the middle -------------------------------------------

def lane(cluster, faults):
    """Jobs one after the other, each through a fault, of a worker with one slot; what came of each."""
    group = "127.255.255.255:%d" % free_port()
    worker = cluster.worker("sh", "-c", 'echo $PEER_N >>%s; exec tr a-z A-Z' % cluster.path("counted"),
                            env={"GROUP": group, "CONCURRENCY": "1", "BOOST": "0"})
    payload, outcomes = b"the quick brown fox\n" * 100, []
    with Meddler(group) as meddler:
        for fault in faults:
            number = uuid.uuid4().hex
            meddler.faults = [fault]
            env = dict(meddler.env, CEXEC_TIMEOUT_PINGPONG="1", CEXEC_TIMEOUT_ACCEPT="20")
            done = cluster.run("cexec", "-v", cluster.pub, "N=" + number, input=payload, env=env)
            no_defect(done.stderr)
            counted = read(cluster.path("counted")).split().count(number.encode())
            where = (fault, done.returncode, counted, done.stderr[-1000:].decode())
            if done.returncode == 0:
                assert done.stdout == payload.upper() and counted == 1, where
            else:
                assert done.returncode == 111 and counted <= 1, where
                assert re.search(rb"cexec: worker \S+ lost after", done.stderr), where  # not: nobody was free
                assert done.stderr.count(b"-> GO") == 1 and payload.upper().startswith(done.stdout), where
            offers = len(re.findall(b"-> AUTH|: TLS: |: said nothing", done.stderr))
            outcomes.append((fault, done.returncode, offers))
            records = meddler.last.records
    done = cluster.client("N=plain", input=payload, env={"GROUP": group, "CEXEC_TIMEOUT_ACCEPT": "10"})
    assert (done.returncode, done.stdout, done.stderr) == (0, payload.upper(), b""), done
    no_defect(read(worker.log))
    return outcomes, records


def in_lanes(cluster, faults, lanes=8):
    with concurrent.futures.ThreadPoolExecutor(lanes) as pool:
        results = list(pool.map(lambda number: lane(cluster, faults[number::lanes]), range(lanes)))
    return [outcome for outcomes, _ in results for outcome in outcomes]


def test_a_flipped_bit_anywhere_is_never_a_wrong_success(cluster):
    """Before GO the search goes on; after it, the job is lost; what has no effect has none."""
    chance = random.Random(2)
    _, records = lane(cluster, [None])
    places = [(way, number, offset) for way, sizes in records.items() for number, size in enumerate(sizes)
              for offset in range(size)]
    faults = [Fault("flip", *place, bit=chance.randrange(8)) for place in chance.sample(places, 30)]
    outcomes = in_lanes(cluster, faults, 4)
    flips = sum(fault.reached.is_set() for fault in faults)
    lost = sum(status != 0 for _, status, _ in outcomes)
    again = sum(status == 0 and offers > 1 for _, status, offers in outcomes)
    assert flips >= 25 and lost >= 5 and again >= 5, (flips, lost, again)


def test_a_connection_spoiled_at_every_record(cluster):
    """Lost, or found again, or whole: never a success that is none, never a second run, never a slot kept."""
    chance = random.Random(3)
    outcomes, records = lane(cluster, [Fault("dribble")])
    assert outcomes[0][1] == 0 and len(records["up"]) > 5 and len(records["down"]) > 5
    faults = []
    for way, sizes in records.items():
        for record, size in enumerate(sizes):
            faults += [Fault(what, way, record) for what in ("cut", "reset", "stall")]
            for what in chance.sample(["cut", "reset", "stall", "flip", "flip"], 2):
                faults.append(Fault(what, way, record, chance.randrange(1, size)))
    chance.shuffle(faults)
    outcomes = in_lanes(cluster, faults)
    reached = [outcome for outcome in outcomes if outcome[0].reached.is_set()]
    print("%d faults, %d reached, %d lost, %d found another offer" % (
        len(faults), len(reached), sum(status != 0 for _, status, _ in outcomes),
        sum(offers > 1 for _, _, offers in outcomes)))
    assert len(reached) > 0.9 * len(faults)
    for what in ("cut", "reset", "stall", "flip"):
        statuses = [status for fault, status, _ in reached if fault.what == what]
        assert statuses.count(111) >= 2 and statuses.count(0) >= 4, (what, statuses)


def test_datagrams_lost_doubled_late_and_out_of_order(cluster):
    """Of any datagram half get lost; the others come once to three times, up to half a second later."""
    chance, count = random.Random(4), 16
    command = ("sh", "-c", "echo $PEER_N >>%s; sleep 0.1; exec cat" % cluster.path("counted"))
    workers = [cluster.worker(*command, env={"CONCURRENCY": "2"}) for _ in range(2)]
    tally = []

    def fates(datagram):
        copies = 0 if chance.random() < 0.5 else chance.choice((1, 1, 2, 3))
        tally.append((datagram.kind, copies))
        return [chance.choice((0, chance.random() / 2)) for _ in range(copies)]

    with Meddler(cluster.env["GROUP"], fates) as meddler:
        def one_job(number):
            done = cluster.client("N=%d" % number, env=meddler.env, input=b"job %d" % number)
            return done.returncode, done.stdout, done.stderr
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            results = list(pool.map(one_job, range(count)))
    assert results == [(0, b"job %d" % number, b"") for number in range(count)]
    assert sorted(map(int, read(cluster.path("counted")).split())) == list(range(count))
    for kind in (cexec.ANNOUNCE, cexec.CLAIM, cexec.BUSY):
        assert (kind, 0) in tally and any(each is kind and copies for each, copies in tally), kind
    no_defect(*[read(worker.log) for worker in workers])


@pytest.mark.parametrize("end", ["given up", "served", "running"])
def test_a_job_that_is_over_gets_no_offer_whatever_is_still_heard_of_it(cluster, end):
    """Announcements with a right MAC that come late, later tries too; before the end, a later try gets an offer."""
    worker = cluster.worker("sh", "-c", RUN + "cat", env={"CONCURRENCY": "2", "BOOST": "0"})   # one slot for the other
    with contextlib.ExitStack() as stack:
        asker, other = (stack.enter_context(Asker(cluster)) for _ in range(2))
        asker.offer(attempt=2).sock.close()
        until(lambda: b": connection closed" in read(worker.log), "the end of an offer that was not taken")
        for attempt in (2, 1):
            asker.say(cexec.ANNOUNCE, attempt=attempt)      # a copy and a replay
        peer = stack.enter_context(asker.offer(attempt=3))
        if end != "given up":
            asker.begin(peer, descriptors=INPUT_AND_OUTPUTS)
            until(lambda: runs(cluster), "the command")
        if end == "served":
            peer.send(cexec.EOF, 0)
            while peer.next()[0] is not cexec.EXIT:
                pass
        if end == "given up":
            asker.say(cexec.CLAIM, token=asker.token)
            until(lambda: b"<- CLAIM" in read(worker.log), "the claim")
        for attempt in (3, 4, 1, 5):
            asker.say(cexec.ANNOUNCE, attempt=attempt)
        other.offer().sock.close()      # what was heard before that has had its offer
        asker.listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            asker.listener.accept()
    assert len(runs(cluster)) == (end != "given up")
    no_defect(read(worker.log))


# ---- Faults: kills and stops -----------------------------------------------

STATES = {"searching": "true", "in_line": "true", "shaking_hands": "true",
          "running": "exec 3<&0; cat <&3 & trap 'kill $!' EXIT; " + GOING, "lingering": "(%s) & exit 5" % GOING}
PARTIES = {"searching": ("client", "proxy"), "in_line": ("client", "service", "proxy"),
           "shaking_hands": ("client", "service", "proxy"),
           "running": ("client", "supervisor", "service", "proxy", "command"),
           "lingering": ("client", "supervisor", "service", "proxy", "command")}


class Stage:
    """A client, a worker with one slot and what may be between them, with a mark of their own."""

    def __init__(self, cluster, state, party):
        self.cluster, self.state, self.party = cluster, state, party
        self.mark = "STAGE=" + uuid.uuid4().hex
        self.go, self.log = (cluster.path(kind + self.mark[6:]) for kind in ("go-", "client-"))
        self.groups = ["127.255.255.255:%d" % free_port() for _ in range(2)]
        self.fault = Fault("hold", "up", 3)             # AUTH: the worker has said HELLO and waits
        self.meddler = self.proxy = self.service = None

    def env(self, group):
        name, _, value = self.mark.partition("=")
        return {name: value, "GROUP": self.groups[group], "CONCURRENCY": "1", "CEXEC_TIMEOUT_ACCEPT": "25"}

    def start_service(self):
        self.service = self.cluster.worker("sh", "-c", 'eval "$PEER_CMD"; exit 5', env=self.env(1))
        self.files = open_files(self.service.pid)

    def start_proxy(self, target):
        self.proxy = self.cluster.proxy("127.0.0.2", target, env=self.env(0))

    def start_client(self, command, log):
        with open(log, "wb") as errors, open("/dev/zero", "rb") as zero:
            return self.cluster.start("cexec", "-v", self.cluster.pub, "GO=" + self.go, "CMD=" + command, stdin=zero,
                                      stdout=subprocess.DEVNULL, stderr=errors, env=self.env(0))

    def begin(self):
        """Brings the client into its state."""
        target = self.groups[1]
        if self.state == "shaking_hands":
            self.meddler = Meddler(target)
            self.meddler.faults.append(self.fault)
            target = self.meddler.env["GROUP"]
        if self.party == "proxy":
            self.start_proxy(target)
        else:
            self.groups[0] = target
        if self.state != "searching":
            self.start_service()
        if self.state == "in_line":
            self.first = self.start_client(GOING, self.log + "-first")
            until(lambda: "group " in read(self.service.log).decode(), "the job before")
        self.client = self.start_client(STATES[self.state], self.log)
        wanted, where = {
            "searching": (b"try 3", self.log),
            "in_line": (b"every slot of a worker is busy", self.log),
            "shaking_hands": (b"-> AUTH", self.log),
            "running": (b"<- CREDIT", self.log),
            "lingering": (b"<- LINGER", self.log),
        }[self.state]
        until(lambda: wanted in read(where), "%s: %s" % (self.state, wanted))
        if self.state == "shaking_hands":
            assert self.fault.reached.wait(PATIENCE)

    def signal(self, number):
        if self.party == "command":
            for pid in processes_with("PEER_GO=" + self.go):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            return
        pid = children_of(self.service.pid)[0] if self.party == "supervisor" else getattr(self, self.party).pid
        os.kill(pid, number)
        if number == signal.SIGSTOP:
            until(lambda: state_of(pid) == "T", "a stop")

    def end(self, killed):
        """What must come of it; then nothing is left of the client, and the worker serves as before."""
        self.fault.released.set()
        finished = self.state in ("running", "lingering")
        if killed and self.party == "proxy" and not finished:
            self.proxy.wait()
            self.start_proxy(self.meddler.env["GROUP"] if self.meddler else self.groups[1])
        if killed and self.party == "service":
            self.service.wait()
        if self.service is None or killed and self.party == "service":
            self.start_service()
        if not killed or self.party == "service" or self.state == "in_line":
            make_file(self.cluster, self.go)
        lost = self.party == "supervisor" or self.party == "proxy" and finished
        wanted = 5
        if killed and self.party == "client":
            wanted = -9
        elif killed and lost:
            wanted = 111
        elif killed and self.party == "command" and self.state == "running":
            wanted = 128 + 9
        status = self.client.wait(PATIENCE * 2)
        assert status == wanted, (status, wanted, read(self.log)[-2000:])
        if self.state == "in_line":
            assert self.first.wait(PATIENCE) == (111 if killed and self.party == "proxy" else 5)
        if killed and lost:
            assert b"cexec: worker 127.0.0." in read(self.log)
        if killed and self.party == "proxy" and finished:
            self.proxy.wait()
            self.groups[0] = self.groups[1]
        until(lambda: not processes_with("PEER_GO=" + self.go), "the command's end")
        assert self.start_client("true", self.log + "-last").wait(PATIENCE) == 5, read(self.log + "-last")
        staying = {process.pid for process in (self.service, self.proxy) if process and process.poll() is None}
        until(lambda: set(processes_with(self.mark)) == staying, "the end of all else")
        until(lambda: open_files(self.service.pid) == self.files, "as many open files as before")
        no_defect(read(self.service.log), read(self.log))


def play(cluster, state, party, how):
    stage = Stage(cluster, state, party)
    try:
        stage.begin()
        if how == "kill":
            stage.signal(signal.SIGKILL)
        else:
            stage.signal(signal.SIGSTOP)
            time.sleep(0.3)             # whatever the others do meanwhile
            stage.signal(signal.SIGCONT if how == "stop and continue" else signal.SIGKILL)
        stage.end(how != "stop and continue")
    except Exception as error:
        raise AssertionError("%s, %s, %s" % (state, party, how)) from error
    finally:
        if stage.meddler:
            stage.meddler.close()


@pytest.mark.parametrize("state", STATES)
def test_anyone_is_killed_or_stopped(cluster, state):
    """In every state: the others see to it, the job goes on where it can, and nothing is left."""
    ways = [(party, how) for party in PARTIES[state] for how in ("kill", "stop and continue", "stop and kill")]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        plays = [pool.submit(play, cluster, state, *way) for way in ways]
    for played in plays:
        played.result()
    ours = ("app", "go-", "client-", "worker-", "cproxy-")
    assert [name for name in os.listdir(cluster.directory) if not name.startswith(ours)] == []


# ---- Many, really: two hundred clients, a hundred workers ------------------

class Announced:
    """Counts the jobs that a worker has heard of, by its log."""

    def __init__(self, worker):
        self.file, self.nonces, self.rest = open(worker.log, "rb"), set(), b""

    def count(self):
        lines, _, self.rest = (self.rest + self.file.read()).rpartition(b"\n")
        self.nonces.update(re.findall(rb"<- ANNOUNCE (\w+)", lines))
        return len(self.nonces)


@HEAVY
def test_two_hundred_clients_on_two_slots(cluster):
    """All are served, in order within a name; the one client of a second name does not wait for the first name's."""
    other = cluster.path("other.pub")
    cluster.run("ckeygen", "-n", "other", cluster.key, other, check=True)
    command = "echo $PEER_N >>order; while [ $PEER_N = hold ] && [ ! -e go ]; do sleep 0.1; done"
    announced = Announced(cluster.worker("sh", "-c", command, env={"CONCURRENCY": "2"}))
    holders = [cluster.start_client("N=hold") for _ in range(2)]
    until(lambda: order(cluster) == ["hold"] * 2, "the hold")
    clients = []
    for number in range(200):
        clients.append(cluster.start_client("N=%d" % number))
        until(lambda number=number: announced.count() >= number + 3, "client %d's announcement" % number)
    clients.append(cluster.start("cexec", other, "N=other"))
    until(lambda: announced.count() >= 203, "the other's announcement")
    announced.file.close()
    put(cluster.path("go"), "")
    assert [client.wait(200) for client in holders + clients] == [0] * 203
    served = order(cluster)[2:]
    assert served.index("other") < 6, served
    numbers = [int(word) for word in served if word != "other"]
    assert sorted(numbers) == list(range(200))
    # Two slots: neighbours may write their lines in either order.  On a busy machine a slow client is passed over.
    away = [number for place, number in enumerate(numbers) if abs(place - number) > 4]
    assert len(away) <= 3, numbers


@HEAVY
def test_a_hundred_idle_workers(cluster):
    """Announcements make a few offers each, once the workers have learned how many they are; -A gives each a job."""
    logs = [cluster.path("worker%d" % number) for number in range(100)]
    for log in logs:
        with open(log, "wb") as file:
            cluster.start("cservice", "-v", cluster.key, "echo", "x", env={"CONCURRENCY": "1"}, stderr=file)
    for log in logs:
        until(lambda log=log: b"serves" in read(log), log, 120)
    for _ in range(60):
        assert cluster.client().returncode == 0
    offers, first = collections.Counter(), {}
    for log in logs:
        text = read(log)
        for nonce in set(re.findall(rb"<- ANNOUNCE (\w+)", text)):
            first.setdefault(nonce, text.index(nonce))
        offers.update(re.findall(rb"offers \S+ (\w+)", text))
    counts = [offers[nonce] for nonce in sorted(first, key=first.get)]
    late = sorted(counts[20:])
    print("offers for each announcement:", counts)
    print("after the first twenty: median %d, worst %d" % (late[len(late) // 2], late[-1]))
    assert len(counts) == 60 and late[len(late) // 2] <= 10
    before = sum(counts)
    done = output(every(cluster, timeout=120))
    assert sorted(done.decode().splitlines()) == sorted(name + ": x" for name in labels(100))
    assert sum(read(log).count(b"offers ") for log in logs) - before < 300      # not each of them to each search


# ---- Hosts, in network namespaces ------------------------------------------


def write_wav(path, seconds=3, rate=44100):
    """A tone with some noise, always the same."""
    noise = random.Random(1)
    samples = [int(12000 * math.sin(i * 440 * 2 * math.pi / rate) + noise.randint(-3000, 3000))
               for i in range(seconds * rate)]
    with wave.open(path, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(struct.pack("<%dh" % len(samples), *samples))


def audio(ogg):
    """The samples in an Ogg Vorbis file: two encodings differ in a random serial number."""
    wav = subprocess.run(["oggdec", "-Q", "-o", "-", ogg], stdout=subprocess.PIPE, check=True).stdout
    return wav[wav.index(b"data") + 8:]


def test_readme_four_steps(hosts):
    need("oggenc", "oggdec")
    keygen, service, logger, job = STEPS
    for file in (PROGRAM, os.path.join(HERE, "README")):
        assert all("    %s " % step in read(file).decode().partition("import gc")[0] for step in STEPS)
    spaces = hosts.lan("lan", ["client", "one", "two", "logger"], "10.77.0")
    links = hosts.path("links")
    os.mkdir(links)
    os.symlink(PYTHON, os.path.join(links, "python3"))
    subprocess.run([PYTHON, PROGRAM, "--install", links], check=True)
    hosts.env["PATH"] = links + ":" + hosts.env["PATH"]

    def command(space, line):
        return ["ip", "netns", "exec", spaces[space], "sh", "-c", "exec " + line]

    def start(space, line, **options):
        process = hosts.popen(command(space, line), **options)
        until(lambda: listening(process.pid), line)

    subprocess.run(command("client", keygen), env=hosts.environment(), cwd=hosts.directory, check=True)
    start("one", service)
    start("two", service)
    with open(hosts.path("log"), "wb") as log:
        start("logger", logger, stdout=log)
    write_wav(hosts.path("input.wav"))
    # oggenc reports its progress on its standard error, which is the client's
    done = hosts.do(["ip", "netns", "exec", spaces["client"], "sh", "-c", job], timeout=60)
    assert done.returncode == 0, done.stderr
    assert b"Done encoding" in done.stderr and b"cexec:" not in done.stderr
    with open(hosts.path("input.wav"), "rb") as wav, open(hosts.path("local.ogg"), "wb") as ogg:
        subprocess.run(["oggenc", "-Q", "-o-", "-"], stdin=wav, stdout=ogg, check=True)
    here, there = audio(hosts.path("local.ogg")), audio(hosts.path("output.ogg"))
    assert len(here) == os.path.getsize(hosts.path("input.wav")) - 44 and here == there
    line = until(lambda: read(hosts.path("log")).decode(), "the logger's line")
    assert re.match(r"10\.77\.0\.1 completed by 10\.77\.0\.[23] for ogg\.pub exit code 0\b", line)
    assert line.count("\n") == 1


# Of what a host's load makes of an offer's delay, a part for what is measured here: the average is this machine's, and
# a second stands out from what that takes to start a process.
ONLY_RUNNABLE = {"DELAY_PER_LOAD": 1.0, "average": 0.0}


def set_runnable(cluster, worker, number):
    """Gives a worker a /proc/loadavg of its own, which tells the processes that are runnable now: hosts share none."""
    path = cluster.path("loadavg-%d" % worker.pid)
    with open(path, "w") as file:
        file.write("0.00 0.00 0.00 %d/99 1\n" % number)
    subprocess.run(["nsenter", "-t", str(worker.pid), "-m", "mount", "--bind", path, "/proc/loadavg"], check=True)


def served_by(cluster, number, space):
    """A shell's loop of jobs, one after another: how many each worker did."""
    jobs = "for i in $(seq %d); do %s || exit; done" % (
        number, shlex.join(cluster.argv("cexec", cluster.pub, "CMD=echo $SERVER_ADDR")))
    out = output(cluster.do(["ip", "netns", "exec", space, "sh", "-c", jobs], timeout=120))
    served = collections.Counter(out.decode().split())
    assert sum(served.values()) == number
    return served


def test_a_hundred_jobs_go_to_the_idle_worker(hosts):
    need("nsenter", "mount")
    altered(hosts, **ONLY_RUNNABLE)
    spaces = hosts.lan("lan", ["client", "busy", "idle"], "10.77.0")
    busy = hosts.shell_worker(space=spaces["busy"], env={"CONCURRENCY": "2"})
    set_runnable(hosts, busy, 1)
    long_job = held_job(hosts, "CMD=cat", space=spaces["client"])       # takes half its slots
    set_runnable(hosts, hosts.shell_worker(space=spaces["idle"], env={"CONCURRENCY": "2"}), 1)
    served = served_by(hosts, 100, spaces["client"])
    print("a hundred jobs:", dict(served))
    assert served["10.77.0.3"] >= 95, served
    outcome(long_job)


def test_jobs_avoid_a_loaded_host(hosts):
    """Of two workers without a job, one is on a host that has much else to do at this moment."""
    need("nsenter", "mount")
    altered(hosts, **ONLY_RUNNABLE)
    spaces = hosts.lan("lan", ["client", "loaded", "idle"], "10.77.0")
    set_runnable(hosts, hosts.shell_worker(space=spaces["loaded"]), 10 * os.cpu_count())
    set_runnable(hosts, hosts.shell_worker(space=spaces["idle"]), 1)

    def loads():
        rows = map(json.loads, survey(hosts, "-j", space=spaces["client"]).stdout.splitlines())
        return sorted((row["address"], row["load"] > 5) for row in rows)
    until(lambda: loads() == [("10.77.0.2", True), ("10.77.0.3", False)], "a load that has lasted")
    served = served_by(hosts, 10, spaces["client"])
    assert served["10.77.0.3"] >= 9, served


def test_the_line_is_served_oldest_first(hosts):
    spaces = hosts.lan("lan", ["one", "two", "worker"], "10.77.0")
    hosts.worker(*ORDERLY, space=spaces["worker"], env={"CONCURRENCY": "1"})
    first = held_job(hosts, "N=0", space=spaces["one"])
    clients = [in_line(hosts, n - 1, "N=%d" % n, space=spaces["one" if n % 2 else "two"]) for n in (1, 2, 3, 4)]
    assert order(hosts) == ["anyone0"]
    outcomes(first, *clients)
    assert order(hosts) == ["anyone%d" % n for n in range(5)]


def test_names_take_turns_in_the_line(hosts, spaces):
    for name in ("ann", "bob"):
        hosts.run("ckeygen", "-n", name, hosts.key, hosts.path(name), check=True)
    hosts.worker(*ORDERLY, space=spaces["worker"], env={"CONCURRENCY": "1"})
    first = held_job(hosts, "N=0", space=spaces["client"])
    clients = [in_line(hosts, ahead, "N=%d" % n, pub=hosts.path(name), space=spaces["client"])
               for name, n, ahead in (("ann", 1, 0), ("ann", 2, 1), ("ann", 3, 2), ("bob", 1, 1), ("bob", 2, 3))]
    outcomes(first, *clients)
    assert order(hosts) == ["anyone0", "ann1", "bob1", "ann2", "bob2", "ann3"]


def test_a_client_killed_in_the_line_is_skipped(hosts, spaces):
    hosts.worker(*ORDERLY, space=spaces["worker"], env={"CONCURRENCY": "1"})
    first = held_job(hosts, "N=0", space=spaces["client"])
    killed, interrupted, last = (in_line(hosts, n, "N=%d" % (n + 1), space=spaces["client"]) for n in range(3))
    killed.kill()                       # without a word: the worker finds out when it offers
    interrupted.send_signal(signal.SIGINT)              # takes its leave of the worker
    assert (killed.wait(30), interrupted.wait(30)) == (-signal.SIGKILL, -signal.SIGINT)
    outcomes(first, last)
    assert order(hosts) == ["anyone0", "anyone3"]


def test_timeout_wait_ends_the_wait_in_line(hosts, spaces):
    hosts.worker("cat", space=spaces["worker"], env={"CONCURRENCY": "1"})
    first = held_job(hosts, space=spaces["client"])
    said = failed(hosts.client(space=spaces["client"], env={"CEXEC_TIMEOUT_WAIT": "2"}))
    assert re.fullmatch(br"cexec: no worker was free in [23] s \(0 ahead in line\)\n", said)
    outcome(first)


def test_a_host_with_two_networks_reaches_both(hosts):
    client, *places = hosts.net("left 10.77.0 client worker", "right 10.78.0 client other").values()
    workers = [hosts.shell_worker(space=place) for place in places]
    loggers = [hosts.logger(hosts.pub, space=place) for place in places]
    done = hosts.client("CMD=echo $SERVER_ADDR", space=client)
    assert done.returncode == 0 and done.stderr == b"" and done.stdout in (b"10.77.0.2\n", b"10.78.0.2\n")
    until(lambda: all(map(heard, workers)), "the announcement on both networks")
    for number, logger in zip((77, 78), loggers):       # each knows the client by its own network's address
        until(logger.lines, "the alert on both networks")
        assert logger.lines()[0].startswith("10.%d.0.1 completed by %s " % (number, done.stdout.decode().strip()))
    signalled(workers[0])
    assert output(hosts.client("CMD=echo $SERVER_ADDR $REMOTE_ADDR", space=client)) == b"10.78.0.2 10.78.0.1\n"


def test_a_host_with_only_loopback_serves_itself(hosts):
    space = hosts.space("alone")
    hosts.shell_worker(space=space)
    logger = hosts.logger(hosts.pub, space=space)
    done = hosts.client("CMD=cat; echo $SERVER_ADDR; exit 3", space=space, input=b"in\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"in\n127.0.0.1\n", b"")
    until(logger.lines, "the alert")
    assert logger.lines()[0].startswith("127.0.0.1 completed by 127.0.0.1 for app.pub exit code 3")
    assert logger.lines()[0].endswith(", client anyone, worker %s" % NODE)


@pytest.mark.parametrize("left_over", ["down", "unplugged", "no address", "no loopback"])
def test_an_interface_of_no_use_is_no_failure(hosts, spaces, left_over):
    hosts.lan("other", [spaces["client"]], "10.78.0")
    switch = hosts.spaces[-1]
    space, *change = {"down": [spaces["client"], "link", "set", "dev", "other", "down"],
                      "unplugged": [switch, "link", "set", "dev", "p1", "down"],
                      "no address": [spaces["client"], "address", "flush", "dev", "other"],
                      "no loopback": [spaces["client"], "link", "set", "dev", "lo", "down"]}[left_over]
    ip("-n", space, *change)
    hosts.shell_worker(space=spaces["worker"])
    assert ended(hosts.client("CMD=echo $SERVER_ADDR", space=spaces["client"])) == (0, b"10.77.0.2\n", b"")


@pytest.mark.parametrize("group", ["255.255.255.255", "10.77.0.255", "239.7.7.7", "lan:239.7.7.7",
                                   "lan:255.255.255.255:4010", "10.77.0.255:4010", "239.7.7.7:4010",
                                   "10.77.0.2,10.77.0.3", "10.77.0.2:4010,lan:10.77.0.3:4011",
                                   "10.77.0.0/24", "lan:10.77.0.0/29:4010", "@hosts", "workers.test"])
def test_everyone_hears_a_group(hosts, group, request):
    """Two workers and two loggers on one host, one of each on another."""
    spaces = hosts.lan("lan", ["client", "one", "two"], "10.77.0")
    hosts.env["CEXEC_GROUP"] = group if group != "workers.test" else "255.255.255.255"
    hosts.env["GROUP"] = "wheel"        # as in tcsh: CEXEC_GROUP goes first
    put(hosts.path("hosts"), "# workers\n10.77.0.2\n10.77.0.3  # and this\n")
    if group == "workers.test":
        directory = os.path.join("/etc/netns", spaces["client"])    # ip-netns(8): `ip netns exec` binds it to /etc
        os.makedirs(directory)
        request.addfinalizer(lambda: shutil.rmtree(directory))
        put(directory + "/hosts", "10.77.0.2 workers.test\n10.77.0.3 workers.test\n", 0o644)
    workers = [hosts.shell_worker(space=spaces[host]) for host in ("one", "one", "two")]
    loggers = [hosts.logger(hosts.pub, space=spaces[host]) for host in ("one", "one", "two")]
    done = hosts.client("CMD=cat; echo $SERVER_ADDR; exit 5", space=spaces["client"], input=b"in\n",
                        env={"CEXEC_GROUP": group})
    assert done.returncode == 5 and done.stderr == b"", done.stderr
    assert done.stdout in (b"in\n10.77.0.2\n", b"in\n10.77.0.3\n")
    until(lambda: all(heard(worker) and heard(worker, b"ALERT") for worker in workers), "datagrams at every worker")
    line = "10.77.0.1 completed by %s for app.pub exit code 5" % done.stdout.split()[1].decode()
    for logger in loggers:
        until(logger.lines, "a line of every logger")
    for logger in loggers:
        assert [text.startswith(line) for text in logger.lines()] == [True], logger.lines()


def only_ipv6(hosts, names, network="fd00:77:0:0"):
    """A LAN on which there is no IPv4."""
    spaces = hosts.lan("lan", names, network)
    for space in spaces.values():
        if network:
            until(lambda: b"tentative" not in subprocess.check_output(["ip", "-n", space, "address"]), "addresses")
    return spaces


@pytest.mark.parametrize("group, network", [
    ("lan:[ff02::cec]", None), ("[ff02::cec]:4010", None), ("[ff02::1]", None), ("[fe80::%s%%lan]", None),
    ("[ff05::cec]", "fd00:77:0:0"), ("lan:[ff05::cec]:4010", "fd00:77:0:0"), ("[ff02::1]", "fd00:77:0:0"),
    ("[fd00:77::2],[fd00:77::3]", "fd00:77:0:0"), ("[fd00:77::/125]", "fd00:77:0:0"),
    ("10.77.0.2,[fd00:77::2],[fd00:77::3]", "fd00:77:0:0"), ("255.255.255.255,[ff02::1]", None)])
def test_everyone_hears_a_group_of_ipv6(hosts, group, network):
    """As above, and there is no IPv4 but on loopback."""
    spaces = only_ipv6(hosts, ["client", "one", "two"], network)
    if "%s" in group:
        address, = re.findall(rb"inet6 fe80::(\S+)/64", subprocess.check_output(["ip", "-n", spaces["one"], "address"]))
        group = group % address.decode()
    hosts.env["GROUP"] = group
    names = ("one", "one", "one" if "%" in group else "two")
    workers = [hosts.shell_worker(space=spaces[host]) for host in names]
    loggers = [hosts.logger(hosts.pub, space=spaces[host]) for host in names]
    done = hosts.client("CMD=cat; echo $SERVER_ADDR $REMOTE_ADDR; exit 5", space=spaces["client"], input=b"in\n")
    assert done.returncode == 5 and done.stderr == b"", done.stderr
    server, client = done.stdout.decode().splitlines()[1].split()
    near = network is None or "ff02" in group           # the scope of the group's address is the sender's
    assert re.fullmatch("fe80::[0-9a-f:]*%lan" if near else "fd00:77::[23]", server)
    assert re.fullmatch("fe80::[0-9a-f:]*%lan" if near else "fd00:77::1", client)
    until(lambda: all(heard(worker) and heard(worker, b"ALERT") for worker in workers), "datagrams at every worker")
    for logger in loggers:
        until(logger.lines, "a line of every logger")
    for logger in loggers:
        line = "%s completed by %s for app.pub exit code 5" % (client, server.partition("%")[0])
        assert [text.startswith(line) for text in logger.lines()] == [True], logger.lines()


def test_ipv6_carries_what_ipv4_does(hosts):
    spaces = only_ipv6(hosts, ["client", "worker"], None)
    hosts.env["GROUP"] = "lan:[ff02::1]"
    worker = hosts.worker("cat", space=spaces["worker"], env={"CONCURRENCY": "1"})
    payload = os.urandom(1000000)
    assert hosts.client(space=spaces["client"], input=payload).stdout == payload
    first = held_job(hosts, space=spaces["client"])
    waiting = in_line(hosts, 0, space=spaces["client"])
    os.kill(children_of(worker.pid)[0], signal.SIGKILL)
    assert first.wait(30) == 111
    outcome(waiting)


def one_host_for_all(hosts, spaces, group, client):
    """Loggers and workers of one host hear what is sent to its only address: whoever opened its socket last hears it,
    and passes it on."""
    loggers, keys = [hosts.logger(space=spaces["host"])], []
    for number in range(3):
        keys.append(hosts.path("app%d" % number))
        hosts.run("ckeygen", keys[-1], check=True)
        hosts.worker("sh", "-c", "echo %d $REMOTE_ADDR" % number, key=keys[-1], space=spaces["host"])
    loggers.append(hosts.logger(space=spaces["host"]))
    for number, key in enumerate(keys):
        done = hosts.run("cexec", key + ".pub", space=spaces["client"], env={"GROUP": group})
        assert (done.returncode, done.stdout, done.stderr) == (0, b"%d %s\n" % (number, client.encode()), b"")
    until(lambda: all(len(logger.lines()) >= 3 for logger in loggers), "three lines of each logger")
    return loggers


def test_an_application_on_ipv6_beside_one_on_ipv4(hosts):
    """A unicast datagram of IPv6 is heard by every worker and logger of the host, and answered by IPv6."""
    one_host_for_all(hosts, only_ipv6(hosts, ["client", "host"]), "[fd00:77::2]", "fd00:77::1")


@pytest.mark.parametrize("group", ["255.255.255.255", "239.7.7.7", "lan:239.7.7.7", "[ff02::cec]", "lan:[ff02::cec]"])
@pytest.mark.parametrize("change", ["down", "removed"])
def test_an_interface_that_comes_back_is_heard_again(hosts, spaces, group, change):
    """It goes down and up, or is another of the same name, while cservice and crat run."""
    hosts.env["GROUP"] = group
    altered(hosts, REJOIN_SECONDS=0.5)
    hosts.worker("echo", "served", space=spaces["worker"])
    logger = hosts.logger(hosts.pub, space=spaces["worker"])
    space, switch = spaces["worker"], hosts.spaces[hosts.spaces.index(spaces["client"]) - 1]
    assert hosts.client(space=spaces["client"]).stdout == b"served\n"
    if change == "down":
        ip("-n", space, "link", "set", "lan", "down")
    else:
        ip("-n", space, "link", "delete", "lan")
    failed(hosts.client(space=spaces["client"], env={"CEXEC_TIMEOUT_ACCEPT": "1"}))
    if change == "removed":
        ip("-n", space, "link", "add", "name", "lan", "type", "veth", "peer", "name", "p2", "netns", switch)
        ip("-n", switch, "link", "set", "p2", "master", "switch", "up")
        ip("-n", space, "address", "add", "10.77.0.2/24", "brd", "+", "dev", "lan")
    ip("-n", space, "link", "set", "lan", "up")
    done = hosts.client(space=spaces["client"], env={"CEXEC_TIMEOUT_ACCEPT": "20"})
    assert (done.returncode, done.stdout) == (0, b"served\n")
    until(lambda: len(logger.lines()) == 2, "the second alert")


def test_two_ipv6_networks_are_both_reached(hosts):
    """Of a multicast group without a device; of two hosts with only link-local addresses each."""
    client, *places = hosts.net("lan - client worker", "right - client other").values()
    hosts.env["GROUP"] = "[ff02::cec]"
    workers = [hosts.shell_worker(space=place) for place in places]
    for worker, device in zip(workers, (b"lan", b"right")):
        for other in workers:
            os.kill(other.pid, signal.SIGCONT if other is worker else signal.SIGSTOP)
        assert output(hosts.client("CMD=echo $SERVER_ADDR", space=client)).endswith(b"%" + device + b"\n")
    for worker in workers:
        os.kill(worker.pid, signal.SIGCONT)


def test_cproxy_joins_ipv4_and_ipv6(hosts):
    """A client that has only IPv4, workers that have only IPv6; and its line, and its crat."""
    spaces = hosts.net("left 10.77.0 client gate", "right fd00:78:0:0 gate worker")
    hosts.env["GROUP"] = "255.255.255.255"
    worker = hosts.worker("sh", "-c", "cat; echo $REMOTE_ADDR", space=spaces["worker"], env={"CONCURRENCY": "1"})
    logger = hosts.logger(hosts.pub, space=spaces["worker"])
    hosts.proxy("fd00:78::1", space=spaces["gate"])
    assert ended(hosts.client(space=spaces["client"], input=b"in\n")) == (0, b"in\nfd00:78::1\n", b"")
    first = held_job(hosts, space=spaces["client"])
    waiting = in_line(hosts, 0, space=spaces["client"])
    outcomes(first, waiting)
    until(lambda: len(logger.lines()) == 3, "the alerts")
    assert logger.lines()[0].startswith("fd00:78::1 completed by "), logger.lines()
    assert b"supervisor" in read(worker.log)


def test_cproxy_with_a_link_local_address(hosts):
    """On a network that has no other: there the return address is its datagrams' own."""
    spaces = hosts.net("left 10.77.0 client gate", "right - gate worker")
    hosts.env["GROUP"] = "255.255.255.255"
    shown = subprocess.check_output(["ip", "-n", spaces["gate"], "address", "show", "dev", "right"]).decode()
    address, = re.findall(r"inet6 (fe80::\S+)/64", shown)
    hosts.worker("sh", "-c", "cat; echo $REMOTE_ADDR", space=spaces["worker"], env={"CONCURRENCY": "1"})
    hosts.proxy(address + "%right", space=spaces["gate"])
    for _ in range(2):
        assert output(hosts.client(space=spaces["client"], input=b"in\n")) == b"in\n%s%%right\n" % address.encode()


def test_clients_that_no_connection_reaches_keep_nobody_from_the_only_slot(hosts):
    """A good client's jobs are begun while offers to the bad ones hang, which say what is wrong, and give up."""
    spaces = hosts.lan("lan", ["good", "bad", "worse", "worker"], "10.77.0")
    worker = hosts.worker("cat", space=spaces["worker"], env={"CONCURRENCY": "1"})
    bad = []
    for space in (spaces["bad"], spaces["worse"]):
        block(space, "-i", "lan", "-p", "tcp")
        bad += [verbose_client(hosts, space=space, env={"CEXEC_TIMEOUT_ACCEPT": "6"}) for _ in range(2)]

    def failures():
        return [client.said().count("connections of 10.77.0.4 to us fail") for client in bad]
    until(lambda: re.search(rb"offers 10\.77\.0\.[23]:", read(worker.log)), "an offer to one of them")
    for number in range(10):
        assert ended(hosts.client(space=spaces["good"], input=b"%d" % number)) == (0, b"%d" % number, b"")
        if number == 0:
            assert b"no job in 3 s" not in read(worker.log)     # it did not wait for that
    for client in bad:
        assert client.wait(PATIENCE) == 111
        lines = client.said().splitlines()
        assert sum(line.startswith("cexec: " + BLOCKED) for line in lines) == 1
        assert re.match("cexec: no worker reached us in \\d+ s: " + BLOCKED, lines[-1])
    assert all(1 <= count <= 3 for count in failures()), failures()     # and it is not tried over and over


def test_a_stopped_client_in_line_is_not_told_of_a_firewall(hosts, spaces):
    """Nothing gets through to it while it is stopped; then it is served."""
    worker = hosts.worker(*ORDERLY, space=spaces["worker"], env={"CONCURRENCY": "1"})
    first = held_job(hosts, "N=0", space=spaces["client"])
    stopped = in_line(hosts, 0, "N=1", space=spaces["client"])
    stopped.send_signal(signal.SIGSTOP)
    outcome(first)
    until(lambda: b": no job in 3 s" in read(worker.log), "the end of the offer")
    assert signalled(stopped, signal.SIGCONT) == 0 and order(hosts) == ["anyone0", "anyone1"]
    assert "connections of 10.77.0.2 to us fail" in stopped.said() and BLOCKED not in stopped.said()


def test_a_client_in_line_that_no_connection_reaches_says_so(hosts):
    """When its turn has come; the clients behind it are served."""
    spaces = hosts.lan("lan", ["client", "bad", "worker"], "10.77.0")
    hosts.worker(*ORDERLY, space=spaces["worker"], env={"CONCURRENCY": "1"})
    first = held_job(hosts, "N=0", space=spaces["client"])
    block(spaces["bad"], "-i", "lan", "-p", "tcp")
    bad = in_line(hosts, 0, "N=1", space=spaces["bad"], env={"CEXEC_TIMEOUT_ACCEPT": "1"})
    last = in_line(hosts, 1, "N=2", space=spaces["client"])
    outcomes(first, last)
    assert order(hosts) == ["anyone0", "anyone2"]
    assert bad.wait(PATIENCE) == 111 and bad.said().count(BLOCKED) == 2


def test_unicast_to_one_host_reaches_all_that_listen_there(hosts):
    spaces = hosts.lan("lan", ["client", "host"], "10.77.0")
    hosts.env["CEXEC_GROUP"] = "10.77.0.2"
    for logger in one_host_for_all(hosts, spaces, "10.77.0.2", "10.77.0.1"):
        assert [line.startswith("10.77.0.1 completed by 10.77.0.2 for ") for line in logger.lines()] == [True] * 3


def test_passing_on_ends(hosts):
    spaces = hosts.lan("lan", ["client", "host"], "10.77.0")
    hosts.env["CEXEC_GROUP"] = "10.77.0.2"
    for _ in range(3):
        hosts.logger(space=spaces["host"])
    with Capture(spaces["host"]) as capture:
        assert hosts.client(space=spaces["client"], env={"CEXEC_TIMEOUT_ACCEPT": "1"}).returncode == 111
        copies = collections.Counter((datagram.identity, interface) for interface, datagram in capture.datagrams())
    announcements = {identity for identity, _ in copies}
    assert len(announcements) >= 3      # tries, and the claim
    for identity in announcements:
        assert copies[identity, "lan"] == 1 and 1 <= copies[identity, "lo"] <= 2, copies    # lo: sent and received


@pytest.mark.parametrize("address", ["2001:db8::1", "::1", "0.0.0.0", "255.255.255.255", "10.77.0.255", "239.1.2.3"])
def test_a_return_address_that_is_no_address_here(hosts, spaces, address):
    """The head of a datagram is outside its MAC: whoever captures one can change it."""
    worker = hosts.worker("cat", space=spaces["worker"], env={"CONCURRENCY": "1"})
    pub, limit = cexec.open_pub(hosts.pub), {"CEXEC_TIMEOUT_ACCEPT": "5"}
    with udp_socket(spaces["client"]) as mouth:
        def forge():
            data = make_datagram(cexec.ANNOUNCE, pub, os.urandom(16), 9, **FIRST_TRY)
            mouth.sendto(cexec.Datagram(data).readdressed(address, 9, 0), ("10.77.0.255", GROUP_PORT))
        forge()                         # for an offer
        done = hosts.client(space=spaces["client"], input=b"still there\n", env=limit)
        assert (done.returncode, done.stdout) == (0, b"still there\n"), read(worker.log)
        job = held_job(hosts, space=spaces["client"])
        forge()                         # for BUSY, and an offer later
        outcome(job)
        done = hosts.client(space=spaces["client"], input=b"still there\n", env=limit)
        assert (done.returncode, done.stdout) == (0, b"still there\n"), read(worker.log)
    assert worker.poll() is None, read(worker.log)


def test_nobody_there_names_the_group(hosts):
    spaces = hosts.lan("lan", ["client"], "10.77.0")
    said = failed(hosts.client(space=spaces["client"], env={"CEXEC_TIMEOUT_ACCEPT": "1"}))
    assert re.fullmatch(br"cexec: no worker answered in [12] s on 255\.255\.255\.255 "
                        br"\(is cservice running with this key\? does the firewall of this machine let UDP and TCP to "
                        br"port \d+ \(another each time: set CEXEC_LISTEN_PORTS\) in\? do those of the workers let UDP "
                        br"to port 3010 in\?\): cexec -l finds out more\n", said)


@pytest.mark.parametrize("rule, servers", [
    ({"CEXEC_ACCEPT_SERVER": "10.77.0.3"}, {b"10.77.0.3"}),
    ({"CEXEC_ACCEPT_SERVER": "10.77.0.3/32, 192.0.2.0/24"}, {b"10.77.0.3"}),
    ({"CEXEC_REJECT_SERVERS": "10.77.0.3"}, {b"10.77.0.2"}),
    ({"CEXEC_REJECT_SERVERS": "192.0.2.1 10.77.0.2/31"}, set()),
    ({"CEXEC_ACCEPT_SERVER": "10.77.0.0/24", "CEXEC_REJECT_SERVERS": "10.77.0.2"}, {b"10.77.0.3"}),
    ({"CEXEC_ACCEPT_SERVER": "10.77.0.64/26"}, set())])
def test_accepted_and_rejected_servers(hosts, rule, servers):
    spaces = hosts.lan("lan", ["client", "two", "three"], "10.77.0")
    workers = [hosts.shell_worker(space=spaces[host]) for host in ("two", "three")]
    for _ in range(3):
        done = hosts.client("CMD=echo $SERVER_ADDR", space=spaces["client"], env=dict(rule, CEXEC_TIMEOUT_ACCEPT="1"))
        if not servers:
            assert (done.returncode, done.stdout) == (111, b"")
            assert re.fullmatch(br"cexec: 2 of the workers answered in [12] s and were not allowed "
                                br"\(CEXEC_ACCEPT_SERVER, CEXEC_REJECT_SERVERS\): 10\.77\.0\.2, 10\.77\.0\.3\n",
                                done.stderr), done.stderr
            assert all(b"offer to" in read(worker.log) for worker in workers)   # they would have
            break
        assert (done.returncode, done.stderr) == (0, b"") and done.stdout.strip() in servers


def test_servers_excluded_by_id_are_left_out_everywhere(hosts):
    """At once by -l and -A; a search declines their offers."""
    spaces = hosts.lan("lan", ["client", "two", "three"], "10.77.0")
    for host in ("two", "three"):
        hosts.shell_worker(space=spaces[host])
    def addresses_and_ids(**env):
        lines = survey(hosts, "-j", space=spaces["client"], env=env).stdout.splitlines()
        return {row["address"]: row["id"] for row in map(json.loads, lines)}

    rule = {"CEXEC_REJECT_SERVERS": addresses_and_ids()["10.77.0.2"]}
    assert list(addresses_and_ids(**rule)) == ["10.77.0.3"]
    done = hosts.run("cexec", "-A", hosts.pub, "CMD=echo $SERVER_ADDR", space=spaces["client"], env=rule)
    assert (done.returncode, done.stdout.split(b": ")[1:], done.stderr) == (0, [b"10.77.0.3\n"], b"")
    for _ in range(3):
        done = hosts.client("CMD=echo $SERVER_ADDR", space=spaces["client"], env=rule)
        assert ended(done) == (0, b"10.77.0.3\n", b"")
    done = survey(hosts, space=spaces["client"], env={"CEXEC_ACCEPT_SERVER": "nobody.example"})
    assert done.returncode == 111
    assert "10.77.0.2, 10.77.0.3: not allowed (CEXEC_ACCEPT_SERVER, CEXEC_REJECT_SERVERS)\n" in done.stderr


def test_listen_ports_are_a_port_a_range_and_none_left(hosts, spaces):
    hosts.shell_worker(space=spaces["worker"], env={"CONCURRENCY": "4"})

    def client(ports):
        return held_job(hosts, "CMD=head -n1; echo $REMOTE_PORT; exec cat", space=spaces["client"],
                        env={"CEXEC_LISTEN_PORTS": ports})
    taken = [udp_socket(spaces["client"], port) for port in (5000, 5006)]
    jobs = [client(ports) for ports in ("5005", "5005-5007", "5000-5000,5006-5007", "5000,5006,5005")]
    ports = [job.stdout.readline() for job in jobs]
    assert ports == [b"5005\n", b"5005\n", b"5007\n", b"5005\n"]      # a job that runs needs none
    taken.append(udp_socket(spaces["client"], 5005))
    done = hosts.client("CMD=true", space=spaces["client"], env={"CEXEC_LISTEN_PORTS": "5000,5005-5006"})
    assert (done.returncode, done.stdout) == (111, b"")
    assert done.stderr.startswith(b"cexec: no free port to listen on: Address already in use (see CEXEC_LISTEN_PORTS")
    for sock in taken:
        sock.close()
    outcomes(*jobs)
    done = hosts.client("CMD=echo $REMOTE_PORT", space=spaces["client"], env={"CEXEC_LISTEN_PORTS": "5005"})
    assert (done.returncode, done.stdout) == (0, b"5005\n")


def test_the_commands_environment(hosts, spaces):
    hosts.run("ckeygen", "-n", "carol@laptop", hosts.key, hosts.path("carol.pub"), check=True)
    hosts.worker("env", "-0", space=spaces["worker"], env={"INHERITED": "yes", "REMOTE_USER": "mallory"})
    done = hosts.run("cexec", hosts.path("carol.pub"), "CMD=x y", "LD_PRELOAD=/no/such.so", "EMPTY=", "PATH=",
                     "REMOTE_USER=root", "LINES=a\nb=c", space=spaces["client"], env={"CEXEC_LISTEN_PORTS": "5005"})
    assert (done.returncode, done.stderr) == (0, b"")
    found = dict(item.partition("=")[::2] for item in done.stdout.decode().split("\0")[:-1])
    assert {name: found.pop(name) for name in list(found) if name.startswith(("REMOTE_", "SERVER_ADDR"))} == {
        "REMOTE_ADDR": "10.77.0.1", "REMOTE_PORT": "5005", "REMOTE_USER": "carol@laptop", "SERVER_ADDR": "10.77.0.2"}
    assert 1024 <= int(found["SERVER_PORT"]) < 65536
    assert {name: value for name, value in found.items() if name.startswith("PEER_")} == {
        "PEER_CMD": "x y", "PEER_LD_PRELOAD": "/no/such.so", "PEER_EMPTY": "", "PEER_PATH": "",
        "PEER_REMOTE_USER": "root", "PEER_LINES": "a\nb=c"}
    assert found["INHERITED"] == "yes" and found["PATH"] == hosts.env["PATH"] and "LD_PRELOAD" not in found


def test_u_runs_the_command_as_another_user(hosts, spaces):
    need("id")
    nobody = pwd.getpwnam("nobody")
    with tempfile.TemporaryDirectory(dir="/tmp") as public:
        os.chmod(public, 0o755)         # pytest's own directory would keep nobody out as it is
        key, other = os.path.join(public, "app"), os.path.join(public, "other")
        hosts.run("ckeygen", key, check=True)
        with open(other, "w") as file:
            file.write("for all\n")
        os.chmod(other, 0o644)
        assert stat.S_IMODE(os.stat(key).st_mode) == 0o600
        worker = hosts.shell_worker(options=["-u", "nobody"], key=key, space=spaces["worker"], cwd=public,
                                    preexec_fn=lambda: os.setgroups([4, 20]))

        def job(command):
            done = hosts.run("cexec", key + ".pub", "CMD=" + command, space=spaces["client"])
            return done.returncode, done.stdout.decode()
        groups = sorted(os.getgrouplist("nobody", nobody.pw_gid))
        assert job("id -u; id -ru; id -g; echo $(id -G | tr ' ' '\n' | sort -n)") == (
            0, "%d\n%d\n%d\n%s\n" % (nobody.pw_uid, nobody.pw_uid, nobody.pw_gid, " ".join(map(str, groups))))
        assert job("echo $HOME $USER $LOGNAME $SHELL") == (
            0, "%s nobody nobody %s\n" % (nobody.pw_dir, nobody.pw_shell))
        assert job("cat '%s'" % other) == (0, "for all\n")
        status, out = job("cat '%s' 2>&1" % key)
        assert status != 0 and "Permission denied" in out and "BEGIN" not in out
        status, out = job("kill -0 $PPID 2>&1; cat /proc/$PPID/environ 2>&1; ls -l /proc/$PPID/fd 2>&1")
        assert status != 0 and out.count("ermi") >= 2, out          # nor its supervisor, which is root
        assert signalled(worker) == 0


def test_u_without_the_power_to_become_anybody(cluster):
    need("root", "setpriv")
    cluster.launch = ["setpriv", "--bounding-set=-setuid,-setgid"] + cluster.launch
    worker = cluster.worker("touch", "ran", options=("-u", "nobody"))
    done = cluster.client()
    assert done.returncode == 126 and not os.path.exists(cluster.path("ran"))
    assert done.stderr == (b"cexec: worker %s cannot run its command: "
                           b"touch: cannot become the user nobody (-u): Operation not permitted\n" % NODE.encode())
    no_defect(read(worker.log))


def test_u_has_a_session_keyring_of_its_own(cluster):
    """Or root's keys would be the user's as well."""
    need("root")
    child = os.fork()
    if child == 0:
        os._exit((cexec.keyring_joiner()() or -1) < 0)
    if os.waitpid(child, 0)[1]:
        skip("no keyrings here (keyctl)")
    cluster.worker("grep", " _ses:", "/proc/keys", options=("-u", "nobody"))
    first, second = (cluster.client().stdout.decode().splitlines() for _ in range(2))
    assert {line.split()[0] for line in second} - {line.split()[0] for line in first}       # the first may be there yet
    assert {int(line.split()[5]) for line in first + second} == {pwd.getpwnam("nobody").pw_uid}


def test_a_worker_cut_off_in_mid_job(hosts, spaces):
    mark = "PEER_MARK=" + os.urandom(8).hex()
    worker = hosts.worker("cat", space=spaces["worker"])
    job = held_job(hosts, mark[5:], space=spaces["client"], env={"CEXEC_TIMEOUT_PINGPONG": "3"})
    assert len(processes_with(mark)) == 1
    ip("-n", spaces["worker"], "link", "set", "dev", "lan", "down")
    assert lost(job) == "no sign of life for 3 s"
    worker.terminate()                  # nobody there to tell the supervisor: so the second signal ends it
    until(lambda: b"draining: 1 jobs" in read(worker.log), "draining")
    assert signalled(worker) == 0
    until(lambda: not processes_with(mark), "the end of the command")


# A worker of a batch that falls silent.  Each of "good" and "bad" has two slots, and a job on "bad" waits for a file.

BATCHES = {                             # options, and what comes after the public key; jobs 1 to 8
    "-m": (["-m", "-o", "{}.o"], ["--", *"12345678"]), "-j": (["-m", "-j2", "-o", "{}.o"], ["--", *"12345678"]),
    "-g": (["-mn", "-g", "{}.o"], [":::", *"12345678"]), ":::": (["-mn"], [":::", *"12345678"]), "-b": (["-b2"], [])}


def signal_host(space, number):
    """Sends a signal to all processes of a host, as if it slept or was switched off."""
    for pid in subprocess.run(["ip", "netns", "pids", space], stdout=subprocess.PIPE, check=True).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), number)


class Silent:
    """A batch whose first two jobs are on a worker that can be silenced.

    rest: bytes in each file, after its name; rate: of the link to this worker, both ways.
    """

    def __init__(self, hosts, mode, options=(), rest=b"", rate=None, retries="3"):
        altered(hosts, PING_SECONDS=0.2, SILENCE_MIN=1.0)
        self.hosts, self.mode, self.spaces = hosts, mode, hosts.lan("lan", ["client", "good", "bad"], "10.77.0")
        if rate:
            slow_down(self.spaces["bad"], rate=rate)
            slow_down(hosts.spaces[0], "p3", rate)
        self.bad = self.worker("bad", "echo >>%s; %s;" % (hosts.path("held"), wait_for(hosts.path("go"))))
        self.wanted = [b"%d\n" % number + rest for number in range(1, 9)]
        for name, text in zip("12345678", self.wanted):
            make_file(hosts, name, text)
        with open(make_file(hosts, "in", b"".join(self.wanted))) as source, open(hosts.path("out"), "wb") as out:
            self.client = hosts.follow("cexec", *options, *BATCHES[mode][0], "--log", "log", hosts.pub,
                                       *BATCHES[mode][1], stdin=source, stdout=out, space=self.spaces["client"],
                                       env={"CEXEC_TIMEOUT_PINGPONG": "600", "CEXEC_RETRIES": retries})
        until(lambda: size_of(hosts, "held") == 2, "two jobs on the worker")

    def worker(self, space, command=""):
        return self.hosts.worker(
            "sh", "-c", command + "read name || name=$PEER_FILE; cat >rest; (echo $name; cat rest) | tee $name.o",
            space=self.spaces[space], options=["-d"], env={"CONCURRENCY": "2", "BOOST": "0"})

    def rows(self):
        return rows_of_log(self.hosts.path("log"))

    def lost_rows(self):
        return [row for row in self.rows() if row["Exitval"] == "-1"]

    def check(self):
        """All is there, once and whole."""
        assert self.client.wait(PATIENCE) == 0, self.client.said()
        if self.mode in (":::", "-b"):
            assert read(self.hosts.path("out")) == b"".join(self.wanted)
        else:
            assert [read(self.hosts.path(name + ".o")) for name in "12345678"] == self.wanted
        assert not parts(self.hosts.directory)
        assert sorted(row["Seq"] for row in self.rows() if row["Exitval"] == "0") == list("12345678")


@pytest.mark.parametrize("mode", BATCHES)
@pytest.mark.parametrize("way", ["off", "stopped"])
def test_a_silent_worker_holds_up_no_batch_that_has_an_idle_slot(hosts, way, mode):
    batch = Silent(hosts, mode)
    if way == "off":
        ip("-n", batch.spaces["bad"], "link", "set", "dev", "lan", "down")
    else:
        signal_host(batch.spaces["bad"], signal.SIGSTOP)
    batch.worker("good")
    batch.check()
    assert batch.client.said() == ""
    make_file(hosts, "go")
    signal_host(batch.spaces["bad"], signal.SIGCONT if way == "stopped" else signal.SIGKILL)
    first, second = batch.lost_rows()
    assert first["Host"] == second["Host"] == NODE and {first["Seq"], second["Seq"]} == {" 1", " 2"}
    assert {row["Host"] for row in batch.rows() if row["Exitval"] == "0"} == {NODE + "[10.77.0.2]"}


def test_the_job_of_a_silent_worker_that_has_no_more_tries_fails(hosts):
    batch = Silent(hosts, "-m", retries="0")
    ip("-n", batch.spaces["bad"], "link", "set", "dev", "lan", "down")
    batch.worker("good")
    assert batch.client.wait(PATIENCE) == 2
    *failures, sums = batch.client.said().splitlines()
    assert sorted(line.partition(" lost: no sign")[0] for line in failures) == [
        "cexec: %s at %s: worker" % (name, NODE) for name in "12"]
    assert sums.startswith("cexec: 2 failed, 2 at %s: worker lost: no sign of life for " % NODE)
    assert sorted((row["Seq"], row["Exitval"]) for row in batch.rows()) == [
        (name, "-1" if name in "12" else "0") for name in "12345678"]
    signal_host(batch.spaces["bad"], signal.SIGKILL)


def test_a_worker_that_was_silent_goes_on_where_no_other_is_idle(hosts):
    """The batch looks for another one meanwhile."""
    batch = Silent(hosts, "-m", ["-v"])
    announced = batch.client.said().count("ANNOUNCE")
    signal_host(batch.spaces["bad"], signal.SIGSTOP)
    until(lambda: batch.client.said().count("ANNOUNCE") > announced + 2, "a search")
    make_file(hosts, "go")
    signal_host(batch.spaces["bad"], signal.SIGCONT)
    batch.check()
    assert not batch.lost_rows()


def test_a_worker_on_a_slow_link_is_not_given_up(hosts):
    """Though another one is idle: any byte is a sign of life, and so is one that its host takes."""
    batch = Silent(hosts, "-m", rest=os.urandom(40000), rate="200kbit")
    batch.worker("good")
    make_file(hosts, "go")
    batch.check()
    assert not batch.lost_rows()
    assert {row["Host"] for row in batch.rows() if row["Seq"] in "12"} == {NODE}


def test_a_silent_host_of_many_is_named(hosts):
    """The others' output is there, and theirs alone is waited for no longer than for a single job."""
    spaces = hosts.lan("lan", ["client", "good", "bad"], "10.77.0")
    for space in "good", "bad":
        hosts.worker("sh", "-c", "echo %s; until [ -e %s ]; do sleep 0.05; done" % (space, hosts.path(space)),
                     space=spaces[space])
    with open(hosts.path("out"), "wb") as out:
        client = hosts.follow("cexec", "-A", hosts.pub, stdout=out, space=spaces["client"],
                              env={"CEXEC_TIMEOUT_PINGPONG": "2"})
    until(lambda: read(hosts.path("out")).count(b"\n") == 2, "both jobs")
    ip("-n", spaces["bad"], "link", "set", "dev", "lan", "down")
    make_file(hosts, "good")
    assert client.wait(PATIENCE) == 111
    assert client.said() == ("cexec: %s[10.77.0.3]: worker lost: no sign of life for 2 s; "
                             "the command may have run\n" % NODE)
    signal_host(spaces["bad"], signal.SIGKILL)


def test_a_client_killed_in_mid_job(hosts, spaces):
    mark = "PEER_MARK=" + os.urandom(8).hex()
    worker = hosts.worker("sh", "-c", "(trap '' HUP; sleep 300) & cat; wait", space=spaces["worker"])
    job = held_job(hosts, mark[5:], space=spaces["client"])
    assert len(processes_with(mark)) >= 3
    job.kill()
    until(lambda: not processes_with(mark), "the end of all that the command had started")
    assert worker.poll() is None
    until(lambda: b"ended, done" in read(worker.log), "a free slot")


def test_a_client_cut_off_in_mid_job_and_back(hosts, spaces):
    mark = "PEER_MARK=" + os.urandom(8).hex()
    hosts.worker("cat", space=spaces["worker"])
    job = held_job(hosts, mark[5:], space=spaces["client"])
    ip("-n", spaces["client"], "link", "set", "dev", "lan", "down")
    job.kill()                          # and its farewell gets lost, at first
    job.wait()
    assert len(processes_with(mark)) == 1
    ip("-n", spaces["client"], "link", "set", "dev", "lan", "up")
    until(lambda: not processes_with(mark), "the end of the command")


def test_a_short_cut_in_mid_job_is_no_failure(hosts, spaces):
    hosts.worker("cat", space=spaces["worker"])
    job = held_job(hosts, space=spaces["client"])
    ip("-n", spaces["worker"], "link", "set", "dev", "lan", "down")
    job.stdin.write(b"while it is cut\n")
    job.stdin.flush()
    ip("-n", spaces["worker"], "link", "set", "dev", "lan", "up")
    assert job.stdout.readline() == b"while it is cut\n"
    assert outcome(job) == (b"", b"")


def test_the_last_byte_on_a_slow_link(hosts, spaces):
    """The kernel has taken all in a moment; the worker waits until the client has it, whatever that says meanwhile."""
    altered(hosts, CLOSE_SECONDS=0.5, CHECK_SECONDS=0.5)
    worker = hosts.worker("head", "-c", "25000", "/dev/zero", space=spaces["worker"])
    slow_down(spaces["worker"])
    client = hosts.start_client(space=spaces["client"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env={"CEXEC_TIMEOUT_PINGPONG": "2"})
    until(lambda: b": done" in read(worker.log), "the command's end")
    assert client.poll() is None
    assert outcome(client) == (bytes(25000), b"")
    until(lambda: b"ended, done" in read(worker.log), "the supervisor's end")


def test_a_client_stopped_while_its_command_ends(hosts, spaces):
    """Its host acknowledges what it has no room for: its output is there when it goes on."""
    ip("netns", "exec", spaces["client"], "sysctl", "-qw", "net.ipv4.tcp_rmem=4096 16384 16384")
    altered(hosts, CLOSE_SECONDS=0.1, GONE_SECONDS=2.0)
    wait = "until [ -e go ]; do sleep 0.05; done"
    worker = hosts.worker("sh", "-c", "echo begun; %s; head -c 50000 /dev/zero" % wait, space=spaces["worker"])
    job = hosts.start_client(space=spaces["client"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert job.stdout.readline() == b"begun\n"
    job.send_signal(signal.SIGSTOP)
    make_file(hosts, "go")
    until(lambda: b": done" in read(worker.log), "the command's end")
    time.sleep(5)                       # nothing tells how long a client is stopped: longer than those seconds
    assert b"ended, done" not in read(worker.log)
    job.send_signal(signal.SIGCONT)
    assert outcome(job) == (bytes(50000), b"")
    until(lambda: b"ended, done" in read(worker.log), "the supervisor's end")


def test_a_slow_uplink_is_no_silence(hosts, spaces):
    """PING stands behind all the input that the kernel has taken: as that moves, the worker's host lives."""
    hosts.worker("wc", "-c", space=spaces["worker"])
    slow_down(spaces["client"])
    done = hosts.client(input=bytes(50000), space=spaces["client"], env={"CEXEC_TIMEOUT_PINGPONG": "3"})
    assert (done.returncode, done.stdout, done.stderr) == (0, b"50000\n", b"")


def test_a_client_that_vanishes_amid_the_output(hosts, spaces):
    """What it does not acknowledge keeps keepalive from finding that; but a stopped client's host acknowledges."""
    mark = "PEER_MARK=" + os.urandom(8).hex()
    altered(hosts, GONE_SECONDS=2.0)
    worker = hosts.worker("yes", space=spaces["worker"])
    job = hosts.start_client(mark[5:], space=spaces["client"], stdout=subprocess.DEVNULL)
    until(lambda: b"group" in read(worker.log), "the command's start")
    job.send_signal(signal.SIGSTOP)
    time.sleep(5)                       # longer than those seconds, with nothing to see
    assert b"abandons" not in read(worker.log)
    job.send_signal(signal.SIGCONT)
    until(lambda: read(worker.log).count(b"CREDIT") > 3, "the output's going on")
    ip("-n", spaces["client"], "link", "set", "dev", "lan", "down")
    job.kill()
    until(lambda: not processes_with(mark), "the end of the command")
    assert b"nothing was acknowledged for 2 s" in read(worker.log)


def test_sigterm_drains_a_worker(hosts, spaces):
    worker = hosts.shell_worker(space=spaces["worker"], env={"CONCURRENCY": "2"})
    job = held_job(hosts, "CMD=cat; exit 9", space=spaces["client"])
    worker.terminate()
    until(lambda: b"draining: 1 jobs run" in read(worker.log), "draining")
    late = hosts.client("CMD=true", space=spaces["client"], env={"CEXEC_TIMEOUT_ACCEPT": "1"})
    assert late.returncode == 111 and b"no worker answered" in late.stderr
    assert worker.poll() is None
    job.stdin.write(b"to the end\n")
    assert outcome(job, status=9) == (b"to the end\n", b"")
    assert worker.wait(30) == 0


def test_a_second_sigterm_ends_the_jobs(hosts, spaces):
    mark = "PEER_MARK=" + os.urandom(8).hex()
    worker = hosts.shell_worker(space=spaces["worker"])
    job = held_job(hosts, "CMD=cat", mark[5:], space=spaces["client"])
    worker.terminate()
    until(lambda: b"draining: 1 jobs run" in read(worker.log), "draining")
    assert job.poll() is None
    worker.terminate()
    lost(job)
    assert worker.wait(30) == 0
    until(lambda: not processes_with(mark), "the end of the command")


# ---- Everywhere: other Pythons, other systems, other versions, bare boxes --

@pytest.mark.parametrize("proxy", AGES)
@pytest.mark.parametrize("worker", AGES)
@pytest.mark.parametrize("client", AGES)
def test_old_and_new_pythons_together(cluster, client, worker, proxy):
    """A job there and back through a proxy, and the alert; each party on the oldest or the newest Python."""
    python, far = oldest_and_newest(), "127.255.255.255:%d" % free_port()
    cluster.launch = [python[worker], *BOOT, PROGRAM]
    cluster.shell_worker(env={"GROUP": far})
    logger = cluster.logger(cluster.pub, env={"GROUP": far})
    cluster.launch[0] = python[proxy]
    cluster.proxy("127.0.0.2", far)
    cluster.launch[0] = python[client]
    there_and_back(cluster)
    until(logger.lines, "the alert's way")
    assert "127.0.0.2 completed by 127.0.0.1 for app.pub exit code 5" in logger.lines()[0]


BETWEEN = list(pythons().values())[1:-1]


@pytest.mark.parametrize("python", BETWEEN, ids=os.path.basename)
def test_a_python_between(cluster, python):
    """A job there and back: all on that Python, and each side with the Python under test."""
    own, other = [python, *BOOT, PROGRAM], cluster.launch
    for worker, clients in ((own, [own, other]), (other, [own])):
        cluster.launch = worker
        process = cluster.shell_worker()
        for cluster.launch in clients:
            there_and_back(cluster)
        assert signalled(process) == 0
    cluster.launch = own
    cluster.run("ckeygen", cluster.path("app"), cluster.path("again.pub"), check=True)
    assert read(cluster.pub) == read(cluster.path("again.pub"))


@pytest.mark.parametrize("age", AGES)
@pytest.mark.parametrize("side", ["client", "worker"])
def test_tls_1_2_on_one_side(cluster, side, age):
    """OpenSSL's own settings, of a distribution or a company, allow one side no TLS 1.3."""
    settings = put(cluster.path("openssl.cnf"), textwrap.dedent("""\
        openssl_conf = all
        [all]
        ssl_conf = ssl
        [ssl]
        system_default = limits
        [limits]
        MaxProtocol = TLSv1.2
        """))
    cluster.launch[0] = oldest_and_newest()[age]
    env = {"OPENSSL_CONF": settings}
    cluster.shell_worker(env=env if side == "worker" else {})
    if side == "client":
        cluster.env.update(env)
    done = cluster.run("cexec", "-v", cluster.pub, "CMD=cat; exit 5", input=BODY)
    assert done.returncode == 5 and done.stdout == BODY and b"cexec: TLSv1.2, " in done.stderr


def same_as_here(cluster):
    """Jobs over cexec end as they do here: bytes, status, what is left of the input, a signal, a dead client."""
    there_and_back(cluster)
    path = put(cluster.path("lines"), "".join("line %d\n" % number for number in range(2000)))
    with open(path, "rb") as source, open(cluster.path("out"), "wb") as output:
        done = cluster.client("CMD=read line; echo $line; kill -9 $$", stdin=source, stdout=output)
        assert (done.returncode, read(cluster.path("out"))) == (137, b"line 0\n")
        assert os.lseek(source.fileno(), 0, os.SEEK_CUR) == len("line 0\n")
    near, far = socket.socketpair()
    with near:
        job = cluster.start_client("CMD=read line; echo got $line", stdin=far, stdout=far)
        far.close()
        near.sendall(b"a line\n")
        assert near.makefile("rb").read() == b"got a line\n" and job.wait(PATIENCE) == 0
    job = cluster.start_client("CMD=sleep 1000 & echo started; sleep 1000", stdout=subprocess.PIPE)
    assert job.stdout.readline() == b"started\n"
    job.kill()                              # and nothing is left: the cluster's end sees to that


@pytest.mark.parametrize("what", TAKEN_AWAY)
def test_a_linux_without(cluster, what):
    take_away(cluster, TAKEN_AWAY[what])
    if what == "/proc":
        need("root", "unshare")
        cluster.launch = WITHOUT_PROC + cluster.launch
    cluster.shell_worker()
    same_as_here(cluster)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM])
def test_a_refused_memfd(cluster, code):
    take_away(cluster, "os.memfd_create = lambda *_: None\nrefuse(os, 'memfd_create', lambda *_: True, %d)" % code)
    cluster.shell_worker()
    there_and_back(cluster)


def test_a_kernel_without_ipv6(cluster):
    port = group_port(cluster)
    take_away(cluster, "refuse(socket.socket, '__init__', "
                       "lambda self, family=-1, *rest, **named: family == socket.AF_INET6, errno.EAFNOSUPPORT)")
    cluster.env["GROUP"] = "127.255.255.255:%d,[::1]:%d" % (port, port)
    refusal(cluster.run("cservice", cluster.key, "true"), 111, "cannot listen on UDP port %d: Address family" % port)
    cluster.shell_worker(env={"GROUP": "127.255.255.255:%d" % port})
    same_as_here(cluster)
    make_file(cluster, "in", b"in")
    assert batch(cluster, "in", variables=["CMD=cat"]).returncode == 0
    assert b"cservice: does not listen by IPv6" in read(cluster.started[0].log)
    refusal(cluster.client(env={"GROUP": "[::1]:%d" % port, "CEXEC_TIMEOUT_ACCEPT": "1"}), 111, "Address family")


# A Linux that looks like a BSD, as far as Python tells: BSD's numbers of ioctls work, Linux's do not.
BSD = """
    sys.platform = {platform!r}
    for module, names in ((os, "sched_getaffinity O_PATH pidfd_open eventfd getrandom"),
                          (socket, "IP_PKTINFO SO_BINDTODEVICE TCP_KEEPIDLE"), (fcntl, "F_SETPIPE_SZ"),
                          (select, "epoll " + {lost!r})):
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
    refuse(fcntl, 'fcntl', lambda fd, request, *rest: request == 1031, errno.EINVAL)
    refuse(socket.socket, 'setsockopt', lambda self, *rest: rest[:2] == (0, 8), errno.ENOPROTOOPT)
    refuse(socket.socket, 'sendmsg', lambda self, data, ancillary, flags, to: ancillary or to[0] == "127.255.255.255",
           errno.EADDRNOTAVAIL)
    here = dict(zip((0xc0006911 | {size} << 16, 0xc0006921 | {size} << 16, 0xc0006923 | {size} << 16, 0x40807453),
                    (0x8913, 0x8915, 0x8919, 0x80045430)))
    linux = fcntl.ioctl
    def ioctl(fd, request, *rest):
        if request in here:
            return linux(fd, here[request], *rest)
        if request in here.values():
            raise OSError(errno.ENOTTY, "not of this system")
        return linux(fd, request, *rest)
    fcntl.ioctl = ioctl
"""

SYSTEMS = {"darwin": BSD.format(platform="darwin", lost="poll", size=32),
           "freebsd14": BSD.format(platform="freebsd14", lost="", size=32),
           "netbsd10": BSD.format(platform="netbsd10", lost="", size=144)}


def answers_on_a_terminal(cluster):
    """A job whose terminal is ours."""
    master, terminal = pty.openpty()
    talk = cluster.start_client("CMD=read line; echo got $line", stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    os.write(master, b"a line\n")
    assert talk.wait(PATIENCE) == 0 and b"got a line" in os.read(master, 1000)
    os.close(master)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_that_is_not_linux(hosts, system):
    """On one host, without a network: only one listener of a host hears what comes from the host itself."""
    need("unshare")
    space = hosts.space("one")
    take_away(hosts, SYSTEMS[system])
    hosts.launch = ["ip", "netns", "exec", space] + WITHOUT_PROC + hosts.launch
    worker = hosts.shell_worker()
    there_and_back(hosts)
    answers_on_a_terminal(hosts)
    job = hosts.start_client("CMD=sleep 1000 & echo started; sleep 1000", stdout=subprocess.PIPE)
    assert job.stdout.readline() == b"started\n"
    job.kill()
    until(lambda: b"ended, done" in read(worker.log).partition(b"abandons")[2], "the end of the job")


@pytest.mark.parametrize("system", [*SYSTEMS, "IP_PKTINFO"])
def test_every_network_is_reached_without_pktinfo(hosts, system):
    """The client sends to the broadcast address of each network that it is in; no route leads to all of them."""
    client, one, two = hosts.net("near 10.77.0 client one", "far 10.78.0 client two").values()
    take_away(hosts, {**SYSTEMS, **TAKEN_AWAY}[system])
    for env, place, address in (({}, one, b"10.77.0.2\n"), ({}, two, b"10.78.0.2\n"),
                                ({"GROUP": "far:255.255.255.255"}, two, b"10.78.0.2\n")):
        worker = hosts.shell_worker(space=place)
        assert output(hosts.client("CMD=echo $SERVER_ADDR", space=client, env=env)) == address
        assert signalled(worker) == 0


def test_a_terminal_is_read_without_proc(cluster):
    """It is opened again by its name."""
    need("root", "unshare")
    cluster.launch = WITHOUT_PROC + cluster.launch
    cluster.shell_worker()
    answers_on_a_terminal(cluster)


@pytest.mark.parametrize("module, applets", [("ssl", ["cexec", "cservice"]), ("fcntl", ["cexec", "crat"]),
                                             ("resource", ["cexec", "cservice"]), ("subprocess", ["cservice"])])
def test_a_python_without(keys, module, applets):
    take_away(keys, "sys.modules[%r] = None" % module)
    words = {"cexec": [keys.pub], "cservice": [keys.key, "cat"], "crat": [keys.pub]}
    keys.launch = ["sh", "-c", 'ulimit -Sn 32 && exec "$@"', "sh", *keys.launch]        # resource raises it
    for applet in applets:
        assert module in refusal(keys.run(applet, *words[applet]), 111, "another python3")


# The program as it will be in the next version of the protocol, with a longer HELLO
NEXT_VERSION = (('load="I", delay="I")', 'load="I", delay="I", more="I")'),
                ("delay=u32(self.delay * 1e6))", "delay=u32(self.delay * 1e6), more=1)"),
                ('batch="8s", only="8s")', 'batch="8s", only="8s", more="I")'),
                ("only=self.only)\n", "only=self.only, more=1)\n"))


def test_a_peer_of_another_version_is_named(cluster):
    """By the worker, crat and a proxy that hear it; and it ends with 111, in its own time."""
    group, other = cluster.env["GROUP"], "127.255.255.255:%d" % free_port()
    worker = cluster.worker("cat")
    plain, as_json = cluster.logger(), cluster.logger("-j")
    proxy = cluster.proxy("127.0.0.2", other)
    usual = cluster.launch
    altered(cluster, *NEXT_VERSION, PROTOCOL=cexec.PROTOCOL + 1)
    done = cluster.client(env={"CEXEC_TIMEOUT_ACCEPT": "1"})        # that announces itself more than once
    assert " s on %s (is cservice running" % group in refusal(done, 111, "no worker answered in ")
    said = "127.0.0.1 speaks protocol version 4, this is 3 (cexec %s)" % cexec.VERSION
    until(lambda: plain.lines() and as_json.lines(), "crat's lines")
    dropped = b"dropped a datagram from 127.0.0.1: protocol version 4, this is 3"
    for log in (worker.log, proxy.log):
        until(lambda: dropped in read(log), "a line in %s" % log)
    cluster.launch = usual
    assert cluster.client(input=b"mine").stdout == b"mine"      # its alert comes after all that
    until(lambda: len(plain.lines()) > 1 and len(as_json.lines()) > 1, "the alert")
    assert plain.lines()[0] == said and "completed" in plain.lines()[1] and len(plain.lines()) == 2
    record = json.loads(as_json.lines()[0])
    assert record.pop("time") > 1e9
    assert record == {"client": "127.0.0.1", "event": "version", "version": 4, "ours": 3}


@pytest.mark.parametrize("how", ["BUSY", "HELLO", "a longer HELLO"])
def test_a_client_names_a_worker_of_another_version(cluster, how, worker_key):
    """The search goes on, and its end tells: never a hang."""
    port = free_port()
    with Ear(port) as ear:
        client = searching_client(cluster, port, CEXEC_TIMEOUT_ACCEPT="1")
        announced, address = ear.wait_for(cexec.ANNOUNCE)
        if how == "BUSY":
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"CEXC\7", (address, announced.port))
        else:
            key = cexec.open_key(cluster.key)
            with Peer(socket.create_connection((address, announced.port), 20), key) as peer:
                body = cexec.HELLO.pack(**filled(cexec.HELLO, version=7)) + bytes(99) * (how != "HELLO")
                peer.raw(cexec.FRAME_HEAD.pack(cexec.HELLO.code, 0, 0, len(body)) + body)
                assert peer.next() is None
            assert ear.wait_for(cexec.ALERT)[0].body.reason == "protocol version 7, this is 3"
        assert client.wait(PATIENCE) == 111
    last = read(client.log).decode().splitlines()
    assert any("(127.0.0.1 speaks protocol version 7, this is 3)" in line for line in last), last
    assert any("127.0.0.1: protocol version 7, this is 3" in line for line in last), last


def bare(cluster, **variables):
    """Leaves the applets nothing in their environment but the group and these variables."""
    name = cluster.marker.partition("=")[0]
    cluster.env = {**{key: cluster.env[key] for key in ("GROUP", name)}, **variables}


@pytest.mark.parametrize("age", AGES)
@pytest.mark.parametrize("locale", [None, "C", "C.utf8", "xx_YY.nonsense"])
def test_no_environment_and_any_bytes(cluster, age, locale):
    """No HOME, USER, PATH and locale; names and values are bytes, whatever the locale makes of them."""
    cluster.launch[0] = oldest_and_newest()[age]
    directory = os.fsencode(cluster.path("")) + b"\xff d\xc3\xa9 \xe2\x82\xac"
    os.mkdir(directory)
    key, value = directory + b"/k\xe9y", b"\xff\xc3\xa9\xe9 \xe2\x82\xac"
    shutil.copy(cluster.key, key)
    shutil.copy(cluster.pub, key + b".pub")
    bare(cluster, **{"LC_ALL": locale} if locale else {})
    cluster.worker("/bin/sh", "-c", b'printf %s "$PEER_X" "$1"; exit 5', "sh", value, key=key)
    logger = cluster.logger(key + b".pub")
    done = cluster.run("cexec", "-v", key, b"X=" + value)
    assert (done.returncode, done.stdout) == (5, value * 2), done.stderr
    until(logger.lines, "crat's line")
    assert " for k" in logger.lines()[0] and "y.pub exit code 5" in logger.lines()[0]
    no_defect(done.stderr)
    refusal(cluster.run("cexec", directory + b"/none"), 100, "no such public key")


@pytest.mark.parametrize("age", AGES)
@pytest.mark.parametrize("how", ["read-only", "removed"])
def test_a_current_directory_that_is_read_only_or_gone(cluster, how, age):
    need("root", "unshare")
    cluster.launch[0] = oldest_and_newest()[age]
    place = cluster.path("place")
    os.mkdir(place)
    enter = 'cd "$0"; mount --bind -o ro . . && cd "$0"' if how == "read-only" else 'cd "$0"; rmdir "$0"'
    plain = cluster.launch
    there = ["unshare", "--mount", "sh", "-c", enter + ' && exec "$@"; exit 99', place]
    cluster.launch = there + plain
    if subprocess.run([*there, plain[0], "-S", "-c", "import socket"], stderr=subprocess.DEVNULL).returncode:
        os.mkdir(place)                 # Python 3.13.0
        refusal(cluster.client(), 111, "does not work where the current directory was removed")
        return
    os.makedirs(place, exist_ok=True)
    cluster.worker("cat")               # a shell would have a word to say on the directory
    os.makedirs(place, exist_ok=True)
    assert output(cluster.client(input=BODY)) == BODY
    os.makedirs(place, exist_ok=True)
    refusal(cluster.run("ckeygen", "new"), 103, "Read-only" if how == "read-only" else "current directory")
    os.makedirs(place, exist_ok=True)
    assert cluster.run("ckeygen", cluster.key, cluster.pub).returncode == 0


@pytest.mark.parametrize("age", AGES)
def test_without_a_network_the_client_says_so(hosts, age):
    """Not even loopback is up: the client says so, and the others wait for better times."""
    hosts.launch[0] = oldest_and_newest()[age]
    space = hosts.space("dark")
    ip("-n", space, "link", "set", "lo", "down")
    hosts.shell_worker(space=space)
    hosts.logger(space=space)
    done = hosts.client(space=space, env={"CEXEC_TIMEOUT_ACCEPT": "1"})
    assert "is there a network?" in refusal(done, 111, "no worker answered in ")
    ip("-n", space, "link", "set", "lo", "up")
    output(hosts.client("CMD=exit 5", space=space), 5)


@pytest.mark.parametrize("age", AGES)
@pytest.mark.parametrize("options", [["-I", "-S"], ["-E", "-OO"], ["-bb", "-W", "error"]], ids=" ".join)
def test_options_of_python(cluster, age, options):
    cluster.launch = [oldest_and_newest()[age], *options, PROGRAM]
    cluster.shell_worker()
    there_and_back(cluster)


@pytest.mark.parametrize("age", AGES)
def test_the_program_on_standard_input(cluster, age):
    """cservice serves; a job of cexec has the end of the file for input."""
    cluster.launch = [oldest_and_newest()[age], "-"]
    with open(PROGRAM, "rb") as program:
        cluster.shell_worker(stdin=program)
    with open(PROGRAM, "rb") as program:
        assert output(cluster.client("CMD=wc -c; exit 5", stdin=program), 5).strip() == b"0"
    assert output(cluster.client("CMD=wc -c; exit 5", input=read(PROGRAM)), 5).strip() == b"0"
    refusal(cluster.run("--install", "bin", input=read(PROGRAM)), 100, "standard input")
    cluster.launch = [PYTHON, *BOOT, PROGRAM]
    there_and_back(cluster)


def test_a_worker_over_ssh_with_the_program_on_standard_input(boxes):
    """As the README has it: nothing but the key is on the worker's machine."""
    farm = boxes("a")
    words = [PYTHON, "-", "cservice", "-v", farm.cluster.key, "sh", "-c", SHELL]
    log = farm.cluster.path("ssh.log")
    with open(PROGRAM, "rb") as program, open(log, "wb") as file:
        far = farm.cluster.popen(["ip", "netns", "exec", farm.spaces["here"], *farm.ssh.split(), "a",
                                  " ".join(map(shlex.quote, words))], stdin=program, stdout=file, stderr=file)
    until(lambda: b"serves" in read(log) or far.poll() is not None, "the worker's start")
    there_and_back(farm.cluster, space=farm.spaces["here"])
    for pid in farm.workers("a"):
        os.kill(pid, signal.SIGTERM)            # it outlives its ssh, which gave it no terminal
    assert far.wait(PATIENCE) == 0


# ---- The manual's recipes --------------------------------------------------

@pytest.fixture
def linked_cluster(cluster):
    """A cluster with the applets' links in PATH; linked_cluster.sh(command) runs one in its directory."""
    links = cluster.path("links")
    os.mkdir(links)
    os.symlink(cluster.launch[0], os.path.join(links, "python3"))
    cluster.run("--install", links, check=True)
    cluster.env["PATH"] = links + ":" + cluster.env["PATH"]

    def sh(command, **env):
        return cluster.do(["bash", "-c", command], env=env, stderr=subprocess.STDOUT)
    cluster.sh = sh
    return cluster


def script(cluster, name):
    """Cuts a script out of the page of recipes, in the page's own words."""
    cut = recipe("cexec-recipes.7", "sed -n").replace("ccexec", name).replace("man/", os.path.join(HERE, "man/"))
    failed(cluster.sh(cut), 0)


@pytest.fixture
def compiling(linked_cluster):
    """A project in C, a worker that compiles, and the script of the manual."""
    need("gcc", "make", "bash")
    cluster = linked_cluster
    script(cluster, "ccexec")
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
    cluster.compiler = cluster.worker(options=["-a"])
    return cluster


def compiled(cluster):
    names = [name for name in os.listdir(cluster.directory) if name.endswith((".o", ".d"))]
    return {name: read(cluster.path(name)) for name in names}


def jobs_done(worker):
    """How many jobs the worker has begun and ended, when none is left."""
    def count(line):
        return read(worker.log).count(line)
    until(lambda: count(b"supervisor WAITING -> RUNNING") == count(b"ended, done"), "the jobs' end", 5)
    return count(b"ended, done")


def test_make_compiles_on_workers(compiling):
    """The objects and dependencies are those of the compiler here."""
    done = compiling.sh("make -j8 CC=$PWD/ccexec && ./program")
    assert done.returncode == 0 and done.stdout.endswith(b"\n132\n"), done.stdout
    there = compiled(compiling)
    assert len(there) == 26 and jobs_done(compiling.compiler) == 13
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
    for flags in ("-c f7.c", "-c missing.c", "-Wno-such -c f7.c", "-c f1.c"):       # f1.c: all.h is not found
        here, there = (compiling.sh(compiler + " " + flags) for compiler in ("cc", "./ccexec"))
        assert here.returncode == there.returncode == 1 and here.stdout == there.stdout
    assert jobs_done(compiling.compiler) == 15 and not os.listdir(compiling.path("tmp"))


def test_ccexec_warns_as_cc(compiling):
    """By comments and macros too; no line of the source comes with it."""
    put(compiling.path("w.c"), "#define UNUSED(x) do { int x; } while (0)\n"
        "int w(int x)\n{\n    int y = 0;\n    switch (x) {\n    case 1:\n        y++;    /* FALLTHROUGH */\n"
        "    case 2:\n        y--;\n    case 3:\n        UNUSED(z);\n    }\n    return y;\n}\n")
    results = []
    for compiler in ("cc", "./ccexec"):
        done = compiling.sh(compiler + " -Wall -Wextra -fno-diagnostics-show-caret -c w.c")
        results.append((done.returncode, done.stdout, read(compiling.path("w.o"))))
    assert results[0] == results[1] and results[0][1].count(b"warning") == 2
    assert jobs_done(compiling.compiler) == 1


def test_ccexec_compiles_here_if_no_worker_can(compiling):
    def both(**env):
        here, there = (compiling.sh(compiler + " -DFACTOR=1 -Iinclude -c f8.c -o %s.o" % name, **env)
                       for compiler, name in (("cc", "a"), ("./ccexec", "b")))
        assert (here.returncode, there.returncode) == (0, 0)
        assert read(compiling.path("a.o")) == read(compiling.path("b.o")) and not os.listdir(compiling.path("tmp"))
        return there.stdout
    assert both(GROUP="127.255.255.255:%d" % free_port()).startswith(b"cexec: no worker answered in ")
    compiling.run("ckeygen", "other", "other.pub", check=True)
    compiling.worker("sh", "-c", "head -c 10; exit 1", key=compiling.path("other"), options=["-a"])
    assert both(CCEXEC_PUB="other.pub") == b""
    compiling.run("ckeygen", "old", "old.pub", check=True)
    compiling.worker("/no/cc1", key=compiling.path("old"), options=["-a"])
    assert b"cannot run its command: /no/cc1: No such file" in both(CCEXEC_PUB="old.pub")


@pytest.mark.parametrize("words, made, jobs", [
    ("-c f1.c", "f1.o", 1), ("-c -o'a b.o' f1.c", "a b.o", 1), ("f1.c -c -o x/y.o -MD", "x/y.d", 1),
    ("-c -DQ='\"a b\"' f1.c", "f1.o", 1), ("-pipe -c f1.c", "f1.o", 1), ("-c x.c -D'Q=1 -o y.s'", "x.o", 1),
    ("-MMD -MFother -MTthat -c f1.c -o z.o", "other", 1), ("-S f1.c", "f1.s", 0),
    ("-shared -fPIC f1.c f2.c -o b.so", "b.so", 0), ("-c assembler.S", "assembler.o", 0),
    ("-O3 -std=c99 -fno-common -c f1.c", "f1.o", 1), ("-c f1.c f2.c", "f2.o", 2), ("-E f1.c -o e", "e", 0),
    ("-march=native -c f1.c", "f1.o", 1), ("-g3 -c f1.c", "f1.o", 0), ("-pg -c f1.c", "f1.o", 1),
    ("-g -gno-record-gcc-switches -c f1.c", "f1.o", 1), ("-gsplit-dwarf -gno-record-gcc-switches -c f1.c", "f1.dwo", 1),
    ("-include include/all.h -D Y -c f1.c", "f1.o", 1), ("--param=ssp-buffer-size=4 -c f1.c", "f1.o", 1),
    ("-Wa,--noexecstack -c f1.c", "f1.o", 1), ("-fstack-usage -c f1.c", "f1.su", 0), ("-Wp,-MD,p -c f1.c", "p", 1)])
def test_ccexec_is_as_cc(compiling, words, made, jobs):
    os.mkdir(compiling.path("x"))
    put(compiling.path("x.c"), "#include <assert.h>\nint x(int y) { assert(y && y < FACTOR + 3); return __LINE__; }\n")
    put(compiling.path("assembler.S"), '#include "all.h"\n# a comment isn\'t a string\n.byte FACTOR /* 1 */\n')
    put(compiling.path("include/all.h"), "#ifndef __ASSEMBLER__\n" + read(compiling.path("include/all.h")).decode()
        + "#endif\n")
    results = []
    for compiler in ("cc", "./ccexec"):
        done = compiling.sh("%s -Iinclude -DFACTOR=3 %s" % (compiler, words))
        assert done.returncode == 0, done.stdout
        results.append((done.stdout, compiled(compiling), read(compiling.path(made))))
        os.unlink(compiling.path(made))
    assert results[0] == results[1]
    assert jobs_done(compiling.compiler) == jobs


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


def test_a_simulation_for_each_pair(linked_cluster):
    need("seq", "bash")
    linked_cluster.worker("sh", "-c", 'echo "$PEER_SEED $PEER_RATE"', env={"CONCURRENCY": "3"})
    put(linked_cluster.path("sim.pub"), read(linked_cluster.pub).decode())
    done = linked_cluster.sh(recipe("cexec.1", "mkdir -p r\ncexec -mn"))
    assert done.returncode == 0
    pairs = [(str(seed), rate) for seed in range(1, 101) for rate in ("0.1", "0.2")]
    assert done.stdout.decode() == "".join(
        "cexec -n sim.pub SEED=%s RATE=%s FILE=%s > r/%s-%s\n" % (*pair, pair[0], *pair) for pair in pairs)
    assert {name: read(linked_cluster.path("r/" + name)).decode() for name in os.listdir(linked_cluster.path("r"))} == {
        "%s-%s" % pair: "%s %s\n" % pair for pair in pairs}


def test_files_for_gnuplot_latex_and_sox(linked_cluster):
    """With a script in place of latexmk: TeX is large."""
    need("gnuplot", "sox", "soxi", "bash")
    cluster = linked_cluster
    cluster.worker(options=["-a", "-d"])
    put(cluster.path("run.pub"), read(cluster.pub).decode())
    put(cluster.path("fig.gp"), 'set terminal svg\nset output "fig.svg"\nplot "data/points" with lines\n')
    os.mkdir(cluster.path("data"))
    put(cluster.path("data/points"), "1 1\n2 4\n3 9\n")
    for name in ("a", "b c"):
        write_wav(cluster.path(name + ".wav"), seconds=1)
    put(cluster.path("paper.tex"), "text\n")
    os.mkdir(cluster.path("figures"))
    put(cluster.path("figures/a.pdf"), "figure\n")
    put(cluster.path("links/latexmk"),
        '#!/bin/sh\n[ "$1" = -pdf ] && cat "$2" figures/a.pdf > "${2%.tex}.pdf"\n', 0o700)
    done = cluster.sh(recipe("cexec.1", "cexec -n -i fig.gp"))
    assert done.returncode == 0, done.stdout
    assert read(cluster.path("paper.pdf")) == b"text\nfigure\n"
    assert b"</svg>" in read(cluster.path("fig.svg"))
    for name in ("a", "b c"):
        assert cluster.sh("soxi -s %s" % shlex.quote(name + ".flac")).stdout == b"44100\n"


def test_files_of_pytest(linked_cluster):
    """Each file is a job with the package; the reports are shown, and the failures counted."""
    need("bash")
    cluster = linked_cluster
    for _ in range(2):
        cluster.worker(options=["-a", "-d"])
    put(cluster.path("run.pub"), read(cluster.pub).decode())
    put(cluster.path("links/pytest"), "#!/bin/sh\nexec %s -m pytest \"$@\"\n" % shlex.quote(sys.executable), 0o700)
    os.mkdir(cluster.path("package"))
    put(cluster.path("package/__init__.py"), "def double(x):\n    return x + x\n")
    for name, value in (("good", 4), ("bad", 5), ("a b", 4)):
        put(cluster.path("test_%s.py" % name), "import package\n\ndef test_double():\n"
            "    assert package.double(2) == %d\n" % value)
    done = cluster.sh(recipe("cexec.1", "cexec -m -n -i package"))
    assert done.returncode == 1 and done.stdout.count(b"1 passed in") == 2, done.stdout
    assert b"FAILED test_bad.py::test_double - assert 4 == 5" in done.stdout


def manual_worker(cluster, page, beginning):
    """Starts the worker of a line of a manual page, with a new key of that name."""
    words = shlex.split(recipe(page, beginning).splitlines()[0])
    place = next(n for n, word in enumerate(words) if n and not word.startswith("-") and words[n - 1] != "-u")
    if "-u" in words:
        need("root")
    cluster.run("ckeygen", words[place], words[place] + ".pub", check=True)
    return cluster.worker(*words[place + 1:], options=words[1:place], key=cluster.path(words[place]))


def test_the_clients_options_for_sox(linked_cluster):
    need("sox", "soxi", "bash")
    assert manual_worker(linked_cluster, "cservice.1", "cservice -a -u nobody flac").poll() is None
    write_wav(linked_cluster.path("a.wav"), seconds=1)
    line = recipe("cservice.1", "cservice -a -u nobody flac").splitlines()[1]
    assert line == recipe("cexec.1", "cexec flac.pub")
    assert recipe("cexec.1", "cservice -a -u nobody flac") in recipe("cservice.1", "cservice -a -u nobody flac")
    done = linked_cluster.sh(line)
    assert (done.returncode, done.stdout) == (0, b"")
    assert linked_cluster.sh("soxi -t a.flac; soxi -r a.flac; soxi -c a.flac").stdout == b"flac\n16000\n1\n"


def test_any_command(linked_cluster):
    need("uname")
    manual_worker(linked_cluster, "cservice.1", "cservice -a -u nobody run")
    done = linked_cluster.sh(recipe("cservice.1", "cservice -a -u nobody run").splitlines()[1])
    assert (done.returncode, done.stdout.split()[0]) == (0, b"Linux")


def ogg_files(cluster, *names):
    """What is none of them, and what is no Ogg."""
    return [name for name in names if not read(cluster.path(name)).startswith(b"OggS")]


def test_the_examples_with_oggenc(linked_cluster):
    """Each in the words of the manual, with its worker."""
    need("oggenc", "bash", "xargs", "find", "sort")
    cluster = linked_cluster
    manual_worker(cluster, "cexec.1", "cservice ogg oggenc")
    assert recipe("cexec.1", "cservice ogg oggenc") == recipe("cservice.1", "cservice ogg oggenc")

    def run(beginning, *made):
        done = cluster.sh(recipe("cexec.1", beginning))
        assert done.returncode == 0, done.stdout
        assert not ogg_files(cluster, *made)
        for name in made:
            os.unlink(cluster.path(name))
        return done.stdout.decode()

    for name in ("input", "a b", "c"):
        write_wav(cluster.path(name + ".wav"), seconds=1)
    outputs = ["input.ogg", "a b.ogg", "c.ogg"]
    assert run("cexec ogg.pub <", "output.ogg") == ""
    lines = run("cexec -l ogg.pub\n").splitlines()
    assert len(lines) == 2 and lines[0].split("\t")[0] == lines[1].split("\t")[0] == socket.gethostname()
    run("cexec -m -o '{.}.ogg'", *outputs)
    assert read(cluster.path("log")).count(b"\n") == 4
    assert sorted(run("ls *.wav | while read file; do\n        cexec ogg.pub <", *outputs).splitlines()) == [
        "a b.wav", "c.wav", "input.wav"]
    run("while cexec", "output.ogg")
    run("CEXEC_MAXFD=3", "output.ogg")
    assert b"127.0.0.1" in read(cluster.path("report"))


def test_the_service_with_limits(linked_cluster):
    """Two slots, another user, a time limit, and not for bob."""
    need("oggenc", "bash", "nice", "timeout")
    need("root")
    cluster = linked_cluster
    cluster.run("ckeygen", "ogg", "ogg.pub", check=True)
    cluster.run("ckeygen", "-n", "bob", "ogg", "bob.pub", check=True)
    write_wav(cluster.path("input.wav"), seconds=1)
    with open(cluster.path("log"), "wb") as log:
        command = "exec env " + recipe("cservice.1", "CONCURRENCY=2 nice")
        cluster.popen(["bash", "-c", command], stderr=log, stdin=subprocess.DEVNULL)
    done = cluster.sh("cexec ogg.pub < input.wav > output.ogg")
    assert (done.returncode, done.stdout, ogg_files(cluster, "output.ogg")) == (0, b"", []), read(log.name)
    assert cluster.sh("cexec -l ogg.pub").stdout.split(b"\t")[4] == b"2"
    assert cluster.sh("CEXEC_TIMEOUT_ACCEPT=1 cexec bob.pub < input.wav").returncode == 111


def test_the_quality_for_oggenc(linked_cluster):
    need("oggenc", "bash")
    assert recipe("cexec.1", "cservice ogg sh -c") == recipe("cservice.1", "cservice ogg sh -c")
    manual_worker(linked_cluster, "cexec.1", "cservice ogg sh -c")
    write_wav(linked_cluster.path("input.wav"), seconds=1)
    done = linked_cluster.sh(recipe("cexec.1", "cexec ogg.pub QUALITY=5"))
    assert (done.returncode, done.stdout, ogg_files(linked_cluster, "output.ogg")) == (0, b"", [])


def test_blocks_for_gzip_and_a_job_on_every_worker(linked_cluster):
    need("gzip", "bash")
    cluster = linked_cluster
    for name, command, options in (("gzip", ["gzip"], ()), ("run", [], ["-a"]), ("sh", ["sh"], ())):
        cluster.run("ckeygen", name, name + ".pub", check=True)
        for _ in range(2):
            cluster.worker(*command, key=cluster.path(name), options=options)
    put(cluster.path("dump.sql"), "".join("insert into t values (%d);\n" % number for number in range(100000)))
    failed(cluster.sh(recipe("cexec.1", "cexec -b 64M gzip.pub").replace("64M", "256K")), 0)
    assert cluster.sh("gzip -dc dump.sql.gz | cmp - dump.sql").returncode == 0
    put(cluster.path("script"), "echo a script\necho $((2 * 21))\n")
    done = cluster.sh(recipe("cexec.1", "cexec -A run.pub uptime"))
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 0 and len(lines) == 6
    assert sum("load average" in line for line in lines) == sum(line.endswith(": 42") for line in lines) == 2


@pytest.fixture
def in_place_of_ssh(linked_cluster):
    """A worker that runs everything, the scripts of the recipes in PATH, and a directory "there"."""
    need("bash", "sed")
    cluster = linked_cluster
    cluster.env["PATH"] = cluster.directory + ":" + cluster.env["PATH"]
    cluster.env["CSSH_PUB"] = cluster.pub
    cluster.serving = cluster.worker(options=["-a", "-d"])
    for name in ("cssh", "onexec", "csh1"):
        script(cluster, name)
    os.mkdir(cluster.path("there"))
    os.mkdir(cluster.path("data"))
    put(cluster.path("data/file"), "data\n")

    def follow(beginning, *words):
        """A line of the page, with this worker and directory for box1 and /srv."""
        line = re.sub(r"\bbox1\b", socket.gethostname(), recipe("cexec-recipes.7", beginning))
        done = cluster.sh(" ".join([line.replace("/srv", cluster.path("there")), *words]))
        assert done.returncode == 0, (line, done.stdout)
        return done.stdout
    cluster.follow = follow
    return cluster


def test_rsync_git_and_sftp_by_cssh(in_place_of_ssh):
    need("rsync", "git")
    cluster = in_place_of_ssh
    cluster.follow("rsync")
    assert read(cluster.path("there/data/file")) == b"data\n"
    failed(cluster.sh("rsync -a -e cssh any:$PWD/there/data/ back && cmp back/file data/file"), 0)
    git = "git -c user.name=me -c user.email=me@localhost"
    failed(cluster.sh("git init -q there/repo && cd there/repo && %s commit -q --allow-empty -m one" % git), 0)
    cluster.follow("GIT_SSH_COMMAND")
    assert b" one\n" in cluster.sh("cd repo && git log --oneline").stdout
    cluster.follow("sftp", '<<< "get there/data/file" 2>&1 || false')
    assert jobs_done(cluster.serving) == 4


def test_a_program_and_commands_of_make_on_a_worker(in_place_of_ssh):
    need("make", "gcc")
    cluster = in_place_of_ssh
    put(cluster.path("p.c"), "int main(int argc, char **argv) { return argc + 6; }\n")
    assert cluster.sh("gcc -o p p.c && onexec ./p one two").returncode == 9
    put(cluster.path("Makefile"), "SHELL = %s\nall: a b\na b:\n\techo made $@ > $@\n" % cluster.path("csh1"))
    failed(cluster.sh("make -s -j2"), 0)
    assert read(cluster.path("a")) + read(cluster.path("b")) == b"made a\nmade b\n"
    assert jobs_done(cluster.serving) == 3


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
    failed(linked_cluster.sh("systemd-analyze verify " + path), 0)


def test_the_run_script_of_daemontools(linked_cluster):
    """As supervise runs it, and as svc -d ends it: with TERM and CONT, to the script's process alone."""
    need("root")
    script_text = recipe("cservice.1", "#!/bin/sh\nexec 2>&1\n")
    os.mkdir(linked_cluster.path("service"))
    put(linked_cluster.path("service/run"), script_text.replace("oggenc -Q -o- -", "cat"), 0o700)
    os.rename(linked_cluster.key, linked_cluster.path("service/key"))
    with open(linked_cluster.path("log"), "wb") as log:
        service = linked_cluster.popen(["./run"], cwd=linked_cluster.path("service"), stdin=subprocess.DEVNULL,
                                       stdout=log)
    job = held_job(linked_cluster)
    service.terminate()
    service.send_signal(signal.SIGCONT)
    assert linked_cluster.client(env={"CEXEC_TIMEOUT_ACCEPT": "1"}).returncode == 111
    assert service.poll() is None
    job.stdin.write(b"end\n")
    assert outcome(job) == (b"end\n", b"")
    assert service.wait(PATIENCE) == 0 and read(linked_cluster.path("log")) == b""
