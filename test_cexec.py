"""Tests of cexec, in the order of the code: bytes first, then processes, then hosts.

    make test                           # everything; what needs root or a tool is skipped without it
    python3 -m pytest test_cexec.py -k oracle
    CEXEC_TEST_PYTHON=/path/to/python3.6 python3 -m pytest test_cexec.py

Everything is sent over loopback (each test has a port of its own) or inside network
namespaces that a test makes and removes.  A test that leaves a process behind fails.
"""
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid

import pytest


HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "cexec.py")
PYTHON = os.environ.get("CEXEC_TEST_PYTHON", sys.executable)
IN_CI = bool(os.environ.get("CI"))
PATIENCE = 30.0                         # seconds until something that must happen has not


# ---------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------

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
    for tool in tools:
        if not shutil.which(tool):
            skip("%s is not installed" % tool)


def need_root():
    if os.getuid():
        skip("needs root")


def free_port():
    """A UDP port of loopback that nobody uses now."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def read(path):
    with open(path, "rb") as file:
        return file.read()


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
        self.env.update({name: value, "GROUP": "127.255.255.255:%d" % free_port(), "PYTHONDONTWRITEBYTECODE": "1"})
        self.started, self.spaces = [], []
        self.key, self.pub = self.path("app"), self.path("app.pub")
        self.run("ckeygen", self.key, self.pub, check=True)

    def path(self, name):
        return os.path.join(self.directory, name)

    def argv(self, applet, *arguments, space=None):
        """The command line of an applet, in a network namespace if one is named."""
        return (["ip", "netns", "exec", space] if space else []) + [PYTHON, PROGRAM, applet, *arguments]

    def environment(self, env=None):
        values = dict(self.env, **(env or {}))
        return {key: value for key, value in values.items() if value is not None}

    def run(self, applet, *arguments, env=None, space=None, timeout=PATIENCE * 2, **options):
        """Runs an applet to its end: a CompletedProcess with bytes in stdout and stderr."""
        for stream in ("stdout", "stderr"):
            options.setdefault(stream, subprocess.PIPE)
        if "input" not in options:
            options.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.run(self.argv(applet, *arguments, space=space), env=self.environment(env),
                              timeout=timeout, cwd=self.directory, **options)

    def start(self, applet, *arguments, env=None, space=None, **options):
        """Starts an applet; it is ended, by its pid, at the end of the test."""
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("cwd", self.directory)
        process = subprocess.Popen(self.argv(applet, *arguments, space=space), env=self.environment(env), **options)
        self.started.append(process)
        return process

    def worker(self, *command, options=(), key=None, env=None, space=None, verbose=True):
        """Starts a cservice and waits until it listens; process.log is the file of its -v lines."""
        log = self.path("worker-%s.log" % uuid.uuid4().hex[:6])
        with open(log, "wb") as file:
            process = self.start("cservice", *["-v"] * verbose, *options, key or self.key, *command,
                                 env=env, space=space, stdout=file, stderr=file)
        process.log = log
        if verbose:
            until(lambda: b"serves" in read(log) or process.poll() is not None, "a worker's start")
        assert process.poll() is None, read(log)
        return process

    def shell_worker(self, **options):
        """A worker that runs what the client says in CMD=..., for tests of what a command sees."""
        return self.worker("sh", "-c", 'eval "$PEER_CMD"', **options)

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

    def space(self, name):
        """Makes a network namespace, with loopback up; its name."""
        full = "cx%d%s" % (os.getpid(), name)
        ip("netns", "add", full)
        self.spaces.append(full)
        ip("-n", full, "link", "set", "lo", "up")
        return full

    def lan(self, name, hosts, network):
        """A bridge and a namespace for each host: {host: its namespace}; addresses network.1, .2, ...

        hosts are names; one that is a namespace already gets one more interface.
        """
        switch = self.space(name)
        ip("-n", switch, "link", "add", "name", "switch", "type", "bridge")
        ip("-n", switch, "link", "set", "switch", "up")
        spaces = {}
        for number, host in enumerate(hosts, 1):
            space = host if host in self.spaces else self.space(name + host)
            plug = "p%d" % number
            ip("-n", space, "link", "add", "name", name, "type", "veth", "peer", "name", plug, "netns", switch)
            ip("-n", switch, "link", "set", plug, "master", "switch", "up")
            ip("-n", space, "address", "add", "%s.%d/24" % (network, number), "brd", "+", "dev", name)
            ip("-n", space, "link", "set", name, "up")
            spaces[host] = space
        return spaces

    def alive(self):
        return processes_with(self.marker)

    def close(self):
        """Ends what was started; fails if anything else is left."""
        for process in self.started:
            if process.poll() is None:
                process.terminate()
        for process in self.started:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream:
                    stream.close()
        try:
            until(lambda: not self.alive(), "the end of every process", 12)
        finally:
            left = self.alive()
            lines = [read("/proc/%d/cmdline" % pid).replace(b"\0", b" ") for pid in left]
            for pid in left:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            for space in self.spaces:
                ip("netns", "delete", space)
            assert not left, lines


def ip(*words):
    subprocess.run(["ip", *words], check=True, stdout=subprocess.DEVNULL)


def listening(pid):
    """Whether a process has a UDP socket."""
    with contextlib.suppress(OSError):
        sockets = {os.readlink("/proc/%d/fd/%s" % (pid, fd)) for fd in os.listdir("/proc/%d/fd" % pid)}
        table = read("/proc/%d/net/udp" % pid).decode().splitlines()[1:]
        return any("socket:[%s]" % line.split()[9] in sockets for line in table)
    return False


@pytest.fixture
def cluster(tmp_path):
    made = Cluster(tmp_path)
    yield made
    made.close()


@pytest.fixture
def hosts(cluster):
    """A cluster for tests in namespaces: with the default group."""
    need_root()
    need("ip")
    cluster.env.pop("GROUP")
    return cluster


# ---------------------------------------------------------------------------
# The whole, on one host
# ---------------------------------------------------------------------------

def test_first_job(cluster):
    cluster.worker("tr", "a-z", "A-Z")
    done = cluster.client(input=b"hello\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"HELLO\n", b"")
