"""crat -t, messages, recipes."""
from test_cexec import *  # noqa: F401,F403
from test_cexec import (PATIENCE, Tmux, cexec, contextlib, os, pty, pytest, re, read, signal, shlex, subprocess, time,
                        until, put, need, Cluster, free_port, SimpleNamespace)


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
    assert re.search(r"^crat: \S+, app.pub, \d+s\n4 done, 2 failed, 1 complained about.*\nWORKER.*\n10.0.0.3 .*\n10.0.0.4 .*\n"
                     "status=0$", screen, re.M)
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
        fits = lambda: len(window.screen().rstrip("\n").splitlines()) <= lines     # noqa: E731
        until(lambda: fits() and window.screen().startswith("crat: ") and (
            columns < 60 or "10.0.0.49" in window.screen()), "a picture of that size")
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
def on_a_pty(cluster, *words, env=None):
    """crat -t at a terminal in the test's hands: process.master is its other side."""
    master, slave = pty.openpty()
    process = cluster.start("crat", "-t", *words, stdin=slave, stdout=slave, stderr=subprocess.DEVNULL,
                            env=dict({"TERM": "xterm"}, **(env or {})), start_new_session=True)
    os.close(slave)
    process.master, process.seen = master, b""

    def look():
        import select
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


def test_a_terminal_that_takes_nothing(cluster, alerts):
    """Drawings are left out, memory does not grow, and TERM ends it all the same."""
    with on_a_pty(cluster, cluster.pub) as crat:
        for _ in range(40):
            alerts.say("w" * 1000, count=40, reason="r" * 100)
            time.sleep(0.05)
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


def test_a_key_that_may_not_be_read(cluster):
    if os.getuid():
        pytest.skip("needs root")
    os.chmod(cluster.directory, 0o755)
    for applet, words in (("cexec", [cluster.pub]), ("cservice", [cluster.key, "true"])):
        def nobody():
            os.setgid(65534)
            os.setuid(65534)
        os.chmod(words[0], 0o600)
        reach = cluster.environment({"XDG_CACHE_HOME": "/nowhere"})
        done = subprocess.run(["cat", cexec.__file__], stdout=subprocess.DEVNULL, preexec_fn=nobody,
                              stderr=subprocess.DEVNULL)
        parent = subprocess.run(["test", "-x", cluster.directory], preexec_fn=nobody)
        if done.returncode or parent.returncode:
            pytest.skip("nobody cannot get here")
        done = subprocess.run(cluster.argv(applet, *words), env=reach, preexec_fn=nobody, stderr=subprocess.PIPE,
                              stdin=subprocess.DEVNULL)
        assert (done.returncode, done.stderr.decode()) == (
            111, "%s: %s: Permission denied: let the user with the id 65534 read it\n" % (applet, words[0]))


@pytest.mark.parametrize("applet", sorted(cexec.APPLETS))
def test_help_tells_where_the_environment_is_explained(one, applet):
    assert one.run(applet, "-h").stdout.decode().endswith(
        "environment variables, examples and the rest: %s(1)\n" % applet)
