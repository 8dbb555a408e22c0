"""cexec -t."""
from test_cexec import *  # noqa: F401,F403
from test_cexec import (contextlib, fcntl, os, pty, pytest, re, shlex, signal, struct, subprocess, tempfile, termios,
                        threading, time)
import cexec
import pwd


# ---------------------------------------------------------------------------
# Jobs: a terminal for the command
# ---------------------------------------------------------------------------

class Tmux:
    """A window of tmux with a shell in it, whose prompt is "here> "."""

    def __init__(self, cluster, env=None):
        self.cluster, self.words = cluster, ["tmux", "-S", cluster.path("tmux"), "-f", "/dev/null"]
        self.do("new-session", "-d", "-x", "100", "-y", "30", "PS1='here> ' exec bash --norc --noprofile",
                env=cluster.environment(dict({"HISTFILE": None, "TMUX": None, "LC_ALL": "C.UTF-8",
                                              "PUB": cluster.pub, "RUN": " ".join(cluster.argv("cexec"))},
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

    def keys(self, *keys):
        self.do("send-keys", *keys)

    def line(self, text):
        self.do("send-keys", "-l", text)
        self.keys("Enter")

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
    made = Tmux(one)
    yield made
    made.close()


THERE = "CMD='PS1=\"there> \" exec bash --norc --noprofile -i'"


def test_a_shell_in_a_terminal(tmux):
    tmux.keys("-l", "stty erase ^H; ")
    tmux.line("$RUN -t $PUB %s; echo sta'tus'=$?" % THERE)
    tmux.shows("^there>$")
    tmux.line("echo s'ize' $(stty size) $TERM $(tty)")
    tmux.shows("^size 30 100 (screen|tmux)[-a-z0-9]* /dev/pts/[0-9]+$")
    tmux.line("ps -o stat= -p $$; ps -o stat=,args= -C ps")
    tmux.shows(r"^Ss *\n")
    tmux.shows(r"^R\+ +ps -o")

    tmux.line("clear; trap 'echo w\"inch\"' WINCH")
    tmux.do("resize-window", "-x", "90", "-y", "40")
    tmux.keys("Enter")
    tmux.shows("winch$")
    tmux.line("echo s'ize' $(stty size)")
    tmux.shows("^size 40 90$")

    tmux.line("clear; echo r'eady'; sleep 1000; echo sl'ept' $?")
    tmux.shows("^ready")
    tmux.keys("C-c")
    tmux.shows(r"^\^C\n+there>$")
    tmux.line("clear; echo r'eady'; sleep 1001")
    tmux.shows("^ready")
    tmux.keys("C-z")
    tmux.shows("Stopped +sleep 1001")
    tmux.line("jobs; fg")
    tmux.shows(r"^sleep 1001\n*\Z")
    tmux.keys("C-c")
    tmux.shows(r"^\^C\n+there>$")
    tmux.line("clear; sh -c 'kill -QUIT $$'; sleep 1002")
    tmux.shows("Quit")
    tmux.keys("C-\\")
    tmux.shows(r"^\^.Quit")
    tmux.line("exit 3")
    tmux.shows("^status=3$")


def test_the_terminal_is_as_before_when_the_command_has_ended(tmux):
    before = tmux.modes()
    tmux.line("$RUN -t $PUB " + THERE)
    tmux.shows("^there>$")
    assert tmux.modes() != before
    tmux.keys("C-d")
    tmux.shows("^here>$")
    until(lambda: tmux.modes() == before, "the modes of before")


def test_vi(tmux):
    need("vi")
    path = tmux.cluster.path(new_mark())
    tmux.line("$RUN -t $PUB CMD='exec vi %s'" % path)
    tmux.shows("^~\n")
    tmux.keys("-l", "ifirst line")
    tmux.keys("Enter")
    tmux.keys("-l", "second ~. line")
    tmux.keys("Escape")
    tmux.shows("^first line\nsecond ~. line")
    tmux.keys("-l", ":wq")
    tmux.keys("Enter")
    tmux.shows("^here>$")
    assert read(path) == b"first line\nsecond ~. line\n"


def test_top(tmux):
    need("top")
    tmux.line("$RUN -t $PUB CMD='exec top'")
    tmux.shows("load average")
    tmux.shows("PID")
    tmux.do("resize-window", "-x", "60", "-y", "10")
    until(lambda: 0 < max(map(len, tmux.screen().splitlines())) <= 60 and "PID" in tmux.screen(), "a smaller top")
    tmux.keys("q")
    tmux.shows("here>$")


def test_escapes(tmux):
    mark, before = new_mark(), tmux.modes()
    tmux.line("$RUN -t $PUB MARK=%s %s" % (mark, THERE))
    tmux.shows("^there>$")
    raw = tmux.modes()
    tmux.keys("-l", "~?")
    tmux.shows("^after Enter: ~. hang up")
    tmux.line("")
    tmux.line("~~nobody-of-that-name 'here'")
    tmux.shows("^bash: ~nobody-of-that-name: ")         # one tilde has come through
    tmux.line("clear; echo a~~ ~. 'within'")
    tmux.shows("^a~~ ~. within")
    tmux.keys("-l", "~")
    tmux.keys("C-z")
    tmux.shows(r"Stopped .*\n")
    tmux.shows("^here>$")
    until(lambda: tmux.modes() != raw, "the modes that the shell has set")
    tmux.line("clear; stty -a; echo lo'cal'")
    tmux.shows("^local")
    assert "isig icanon iexten echo " in tmux.screen()
    tmux.line("clear; fg")
    until(lambda: tmux.modes() == raw, "the raw modes")
    tmux.line("echo back 'again'")
    tmux.shows("^back again")
    tmux.line("echo two; ~? ~ x~")      # none at the beginning of a line
    tmux.shows("^two")
    tmux.keys("-l", "~.")
    tmux.shows("^here>$")
    tmux.line("echo sta'tus'=$?")
    tmux.shows("^status=129$")
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
    tmux.line("echo sta'tus'=$?")
    tmux.shows("^status=%d$" % (128 + number))
    until(lambda: tmux.modes() == before, "the modes of before")
    until(lambda: not marked(mark), "the end of the command")


def test_terminal_is_usable_after_reset_when_cexec_is_killed_with_kill(tmux):
    mark = new_mark()
    tmux.line("$RUN -t $PUB MARK=%s %s" % (mark, THERE))
    tmux.shows("^there>$")
    os.kill(tmux.client(), signal.SIGKILL)
    tmux.shows("Killed")
    tmux.line("reset")
    tmux.line("clear; echo us'able'; stty -a")
    tmux.shows("^usable")
    tmux.shows("isig icanon iexten echo ")
    assert "-icanon" not in tmux.screen()
    until(lambda: not marked(mark), "the end of the command")


def test_terminal_is_put_back_when_the_worker_is_lost(tmux):
    mark, before = new_mark(), tmux.modes()
    tmux.line("$RUN -t $PUB MARK=%s %s; echo sta'tus'=$?" % (mark, THERE))
    tmux.shows("^there>$")
    os.kill(parent_of(marked(mark)[0]), signal.SIGKILL)
    tmux.shows("cexec: worker 127.0.0.1 lost after .*: connection closed$")
    tmux.shows("^status=111$")
    until(lambda: tmux.modes() == before, "the modes of before")
    until(lambda: not marked(mark), "the end of the command")


@pytest.mark.parametrize("name", ("TSTP", "STOP"))
def test_stopped_from_elsewhere_and_raw_again(tmux, name):
    before = tmux.modes()
    tmux.line("$RUN -t $PUB " + THERE)
    tmux.shows("^there>$")
    raw = tmux.modes()
    os.kill(tmux.client(), getattr(signal, "SIG" + name))
    tmux.shows("Stopped")
    tmux.do("resize-window", "-x", "70", "-y", "20")
    tmux.line("clear; fg")
    until(lambda: tmux.modes() == raw, "the raw modes")
    tmux.line("echo s'ize' $(stty size)")
    tmux.shows("^size 20 70$")
    tmux.line("exit")
    tmux.shows("^here>$")
    until(lambda: tmux.modes() == before, "the modes of before")


def test_in_the_background_it_stops_until_it_is_in_the_foreground(tmux):
    tmux.line("$RUN -t $PUB %s &" % THERE)
    client = tmux.client()
    until(lambda: state_of(client) == "T", "the stop")
    tmux.line("")
    tmux.shows("Stopped")
    tmux.line("clear; fg")
    tmux.line("echo s'hell' $(stty size)")
    tmux.shows("^shell 30 100$")
    tmux.line("exit")
    tmux.shows("^here>$")
    tmux.line("clear; stty -a; echo al'l'")
    tmux.shows("^all")
    assert "isig icanon iexten echo " in tmux.screen()


@pytest.mark.parametrize("how", ("started there", "stopped there"))
def test_killed_in_the_background(tmux, how):
    """It ends, and leaves the terminal to whoever has it now."""
    if how == "started there":
        tmux.line("$RUN -t $PUB %s &" % THERE)
    else:
        tmux.line("$RUN -t $PUB " + THERE)
        tmux.shows("^there>$")
        os.kill(tmux.client(), signal.SIGSTOP)
        tmux.shows("Stopped")
    client = tmux.client()
    until(lambda: state_of(client) == "T", "the stop")
    tmux.line("clear; echo s'hell'")
    tmux.shows("^shell\nhere>$")
    before = tmux.modes()
    os.kill(client, signal.SIGTERM)
    os.kill(client, signal.SIGCONT)
    until(lambda: state_of(client) is None, "its end")
    assert tmux.modes() == before
    tmux.line("stty -a; echo al'l'")
    tmux.shows("^all")
    assert "-icanon" not in tmux.screen()


def test_a_worker_that_hangs_can_be_left(tmux):
    mark = new_mark()
    tmux.line("$RUN -t $PUB MARK=%s %s" % (mark, THERE))
    tmux.shows("^there>$")
    supervisor = parent_of(marked(mark)[0])
    os.kill(supervisor, signal.SIGSTOP)
    tmux.line("into the void")
    tmux.keys("-l", "~.")
    tmux.shows("^here>$")
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
    tmux.line("GROUP=127.255.255.255:%d $RUN -v -t $PUB; echo sta'tus'=$?" % free_port())
    tmux.shows("try 2")
    tmux.keys("C-c")
    tmux.line("echo sta'tus'=$?")
    tmux.shows("^status=130$")


# The same here and there, on terminals of our own

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
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)
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
    command = "trap 'echo int' INT; echo ready; while read x; do echo got $x; done; echo eof; read x; echo $x; exit 5"
    typed = [(b"ready", b"\x03"), (b"int", b"one\n"), (b"got one", b"\x04"), (b"eof", b"end\n")]
    status, shown, _ = both(one, tmp_path, lambda side: on_terminal(side, "exec RUN", command, typed=typed))
    assert status == 5 and b"int" in shown


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
    assert done.stderr == b"cexec: -t: no descriptor is a terminal here, and so the command has none\n"


def test_n_and_t(one, tmp_path):
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
    os.close(master)
    os.close(slave)


def test_a_terminal_that_may_not_be_opened_again(one, tmp_path):
    """After su the terminal is another user's: it is used as it stands."""
    need_root()
    need("setpriv")
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
    """With -u the command can open its terminal by name."""
    need_root()
    worker = cluster.worker("sh", "-c", 'eval "$PEER_CMD"', options=["-u", "nobody"])
    cluster.data = ""
    side = There(cluster, cluster.path("there"))
    status, shown, _ = on_terminal(side, "RUN", 'echo by name >$(tty); stat -c %U $(tty); exit 4')
    assert (status, shown) == (4, b"by name\nnobody\n") and worker.poll() is None


def test_a_lost_job_in_a_terminal_is_run_again(cluster):
    """As long as it has shown nothing: what was typed by then is typed again."""
    for _ in range(2):
        cluster.shell_worker(env={"BOOST": "0"})
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


# What goes into a terminal, in memory

def terminal_end(fd):
    end = cexec.TerminalEnd(fd, fd)
    end.signals = []
    end.signalled = end.signals.append
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


T = cexec.FLAG_INPUT | cexec.FLAG_OUTPUT | cexec.FLAG_TERMINAL


@pytest.mark.parametrize("rows, given, good", [
    ([(0, 0, T), (1, 0, T), (2, 0, T)], {"term": "xterm-256color", "modes": ["VERASE=8", "ECHO=0", "NEW=255"]}, True),
    ([(2, 2, T), (1, 1, 2)], {"term": "x" * 64}, True),
    ([(0, 0, T)], {}, False), ([(0, 0, 1)], {"term": "vt100"}, False), ([(0, 0, 1)], {"term": "/"}, False),
    ([(0, 0, T)], {"term": "../x"}, False), ([(0, 0, T)], {"term": "x" * 65}, False),
    ([(0, 0, T)], {"term": "a b"}, False), ([(0, 0, T)], {"term": "\udcff"}, False),
    ([(0, 0, T), (1, 1, T)], {"term": "vt100"}, False), ([(0, 0, T | 8)], {"term": "vt100"}, False),
    ([(0, 0, T | 4)], {"term": "vt100"}, False), ([(0, 0, 1 | 16)], {"term": "vt100"}, False),
    ([(0, 0, 1 | 32)], {}, False), ([(0, 0, 7 | 8)], {}, False),
    ([(0, 0, T)], {"term": "vt100", "modes": ["VERASE"]}, False),
    ([(0, 0, T)], {"term": "vt100", "modes": ["VERASE=256"]}, False),
    ([(0, 0, T)], {"term": "vt100", "modes": ["VERASE=-1"]}, False),
    ([(0, 0, T)], {"term": "vt100", "modes": ["VERASE=0001"]}, False),
    ([(0, 0, T)], {"term": "vt100", "modes": ["A=1=1"]}, False),
    ([(0, 0, T)], {"term": "vt100", "modes": ["=1"]}, False),
])
def test_what_a_job_may_ask_of_a_terminal(rows, given, good):
    job = cexec.JOB.unpack(cexec.JOB.pack(**filled(cexec.JOB, descriptors=rows, **given)))
    if good:
        assert cexec.check_job(job) is job
    else:
        with pytest.raises(cexec.ProtocolError):
            cexec.check_job(job)


@pytest.mark.parametrize("rows, term, status", [([(1, 1, 2)], "", None), ([(0, 0, T)], "vt100", 0)])
def test_resize_needs_a_terminal(cluster, rows, term, status):
    worker = cluster.worker("sh", "-c", "exec sleep 0.5")
    with Asker(cluster) as asker, asker.offer() as peer:
        peer.send(cexec.AUTH, proof=asker.proof(peer))
        peer.send(cexec.JOB, descriptors=rows, term=term, linger=cexec.NO_LINGER)
        peer.expect(cexec.ACCEPT)
        peer.send(cexec.GO)
        peer.send(cexec.RESIZE, lines=65535, columns=65535)
        kinds = []
        while kinds[-1:] != [None]:
            found = peer.next()
            kinds.append(found and found[0])
        assert (cexec.EXIT in kinds) == (status is not None)
    assert (b"RESIZE without a terminal" in read(worker.log)) == (status is None)


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
        for fd in (near, far, one_more, other):
            os.close(fd)


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
    terminal.type("a line\r")
    terminal.shows("got a line")
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
    tmux.keys("C-c")
    tmux.shows("^here>$")
    tmux.line("echo sta'tus'=$?")
    tmux.shows("^status=130$")


def test_the_size_is_there_from_the_start(cluster):
    cluster.worker("stty", "size")
    with Asker(cluster) as asker, asker.offer() as peer:
        peer.send(cexec.AUTH, proof=asker.proof(peer))
        peer.send(cexec.JOB, descriptors=[(0, 0, T), (1, 0, T)], term="vt100", lines=34, columns=56,
                  linger=cexec.NO_LINGER)
        peer.expect(cexec.ACCEPT)
        peer.send(cexec.GO)
        assert peer.expect(cexec.DATA) == b"34 56\r\n"


def test_nothing_is_taken_from_a_terminal_in_the_background(monkeypatch):
    near, far = pty.openpty()
    sent, end = [], terminal_end(far)
    monkeypatch.setattr(end, "may_read", lambda: False)
    monkeypatch.setattr(os, "kill", lambda *words: sent.append(words))
    before = termios.tcgetattr(far)
    end.raw()
    assert (end.saved, sent, termios.tcgetattr(far)) == (None, [(0, signal.SIGTTOU)], before)
    os.close(near)
    os.close(far)


def test_a_source_that_is_to_end_waits_for_credit_and_not_for_an_endless_writer():
    zero = os.open("/dev/zero", os.O_RDONLY)
    link = SimpleNamespace(congested=False, closed=False, send=lambda *words: None, send_data=lambda *words: None)
    carrier = SimpleNamespace(loop=cexec.Loop(), link=link, stream_ended=lambda: None, sinks={},
                              buffer=memoryview(bytearray(cexec.FRAME_HEAD.size + cexec.FRAME_MAX)))
    source = cexec.Source(carrier, 1, cexec.End(zero, zero, lambda: os.close(zero), ["read"]))
    source.credit = 1000
    source.close_soon()
    assert (source.sent, source.state) == (1000, cexec.OPEN)
    source.rcvd_credit(cexec.WINDOW)
    assert (source.sent, source.state) == (cexec.PIPE_SIZE, cexec.ENDED)
