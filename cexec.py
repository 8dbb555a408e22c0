#!/bin/sh
""":"; [ -d /dev/stdin ] && { echo "${0##*/}: standard input is a directory" >&2; exit 100; }
exec python3 -S -c 'import sys
try:
    with open(sys.argv[1], "rb") as file: file.seek(-4096, 2); text = file.read()
    exec(text.rpartition(b"# START")[2])
except MemoryError: print("cexec: not enough memory (see ulimit -v)", file=sys.stderr); sys.exit(111)
except KeyboardInterrupt:
    import os, signal
    signal.signal(2, signal.SIG_DFL); os.kill(os.getpid(), 2)' "$0" "$@"
# That is for sh: the last section of this file, The door, explains it.

cexec: run a command on the least loaded machine of the network.

    cexec -s box1,box2 sort < file           # sorts it on the least loaded of these hosts, over ssh

And where workers stay:

    ckeygen ogg ogg.pub                      # once: a keypair names the application
    cservice ogg oggenc -o- -                # on every worker
    crat ogg.pub                             # anywhere: who did what
    cexec ogg.pub < input.wav > output.ogg   # anywhere: runs on the least loaded worker

The way of a job:

     client                                   worker
       | ANNOUNCE nonce, port  ---- group --->  |   MAC good? key known? not served?
       |                                        |   wait load x 20 ms
       |  <------------------------- TCP connect|   an offer: it holds a slot
       |  TLS ClientHello ------------------->  |   the worker is the TLS server
       |  <---------------- certificate, finish |
       |  hash pinned in the pub? else: complain, close
       |  <-------- HELLO nonce, id, challenge  |
       |  AUTH hmac, WORDS, JOB fds --------->  |   hmac good? else: close
       |  <------------------ ACCEPT or REFUSE  |   supervisor forked, nothing run
       |  GO -------------------------------->  |   the command starts
       |  CLAIM token  ------------ group --->  |   other workers forget the job
       |  DATA EOF SHUT CREDIT SIGNAL  <----->  |
       |  <------------------------------- EXIT |   status, bytes sent, bytes taken
       |  ALERT outcome ------------ group ---> |   crat

Before GO nothing has run: if the connection is lost, the search goes on.  After GO a loss
means exit status 111.  Two kinds of jobs run again instead: those of a batch (cexec -m, -b),
and those that may be repeated (cexec -r, cservice -i) while no output of theirs was shown.
EXIT is the last frame of a job: without it, and without every byte that it counts, no job is
a success.

Limits: a worker that no datagram reaches is not found; names, sizes and times are not secret.
cexec(7) has the whole protocol, and what it does not protect from.

The sections, from the leaves up.  A section calls only those above it, with two exceptions:
main_cservice calls cservice -s, which needs ckeygen; and cservice -s sends workers the compiled
code that The door keeps.

    Basics      constants, exit codes, errors, the log                         Log, Fatal, ProtocolError
    Options     an applet's table of options: read, and told by -h             Option, Syntax
    Keys        the private key, what a pub holds, certificates                Key, Pub
    Messages    datagrams and frames, each declared once: bytes in and out     Message, Datagram, FrameReader
    Groups      where announcements go, and how they are heard                 Group, Listener
    Event loop  waits for descriptors, timers and signals                      Loop
    Return port the client's port, to which offers and answers are sent        ReturnPort
    Connection  TLS, frames over it, the channels of descriptors over these    Dial, Link, Source, Sink, Carrier
    Descriptors descriptors, terminals and processes of this host              Inherited, Writer, TerminalEnd, PtyEnd
    Files       what goes into a job's directory, and comes out of it          Helper, JobFiles
    cexec       the search for a worker                                        Terms, Candidate, Search
    cexec       the job: one run of it, and the next if that is lost           Job, RemoteRun, Run, Alerts, Client
    cexec -l    which workers there are                                        Survey
    cexec -m    a batch of files or values, a job each                         Task, FileRun, Printer, Batch
    cexec -b    standard input in blocks, a job each                           Block, Splitter, BlockBatch
    cexec -A    a job on every worker                                          HostTask, HostRun, Everywhere
    cexec -s    workers on other hosts for one call                            RunGroup
    cexec       the applet: its options and modes
    cservice    the supervisor: the process that runs a client's jobs          Command, Supervisor, Supervisors
    cservice    the offers, their delay, and the line of waiting clients       Pace, Clients, Offer, Worker
    cservice    the applet, and its lifeline to cservice -s                    Lifeline, WorkerLifeline
    crat        the logger, as lines or on the whole screen                    Logger, Screen
    crat --svg  a log as a picture                                             TimeAxis, Band, Bar
    crat        the applet: its options and forms
    cproxy      joins networks                                                 Relay, Join, Proxy
    ckeygen     makes keys
    cservice -s workers on other hosts, over ssh, and clients through it       Starter, RunStarter, Host, HostLifeline
    Python      what a program imports: cexec.run and cexec.Executor           Executor, Program, Reader, Pool, Lane
    Applets     the program's name or first word, and its exit code
    The door    how this file is started, and where its compiled code is kept
"""
# mypy: ignore-errors
import gc
import sys

if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]                 # never import a socket.py that lies beside this file

NO_MEMORY = "not enough memory (see ulimit -v)"


def lack_of_memory(error):
    """What to say of an exception if memory was short; None for another one.  A library is then an ImportError."""
    if (isinstance(error, MemoryError) or getattr(error, "errno", None) == 12       # ENOMEM
            or any(words in str(error) for words in ("failed to map", "annot allocate memory", "malloc failure"))):
        return NO_MEMORY
    return None


try:
    import collections
    import errno
    import fcntl
    import functools
    import hashlib
    import heapq
    import hmac
    import io
    import itertools
    import os
    import select
    import selectors
    import signal
    import socket
    import stat
    import struct
    import time
    from types import SimpleNamespace
except (ImportError, MemoryError) as error:     # fcntl on Windows, or a Python built without a part of its library
    sys.stderr.write("cexec: %s\n" % (
        lack_of_memory(error) or "this Python is not complete (%s): use another python3" % error))
    sys.exit(111)
except SystemError:                 # 3.13.0's import of socket, by -c, without a current directory
    sys.stderr.write("cexec: this Python does not work where the current directory was removed: go to another\n")
    sys.exit(111)


class Later:
    """A module that is imported when it is first used: most processes never use it."""

    __spec__ = None                 # an import that finds this in the module's place asks for it

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        module = globals()[self._name] = __import__(self._name)
        return getattr(module, attribute)


abc, atexit, binascii, bisect, enum, filecmp = map(Later, ("abc", "atexit", "binascii", "bisect", "enum", "filecmp"))
getpass, html, importlib, ipaddress, json = map(Later, ("getpass", "html", "importlib", "ipaddress", "json"))
marshal, pickle, pwd, re, resource, shlex = map(Later, ("marshal", "pickle", "pwd", "re", "resource", "shlex"))
shutil, subprocess, sysconfig, tarfile = map(Later, ("shutil", "subprocess", "sysconfig", "tarfile"))
tempfile, termios, textwrap, threading = map(Later, ("tempfile", "termios", "textwrap", "threading"))
traceback, tty, unicodedata, uuid, weakref = map(Later, ("traceback", "tty", "unicodedata", "uuid", "weakref"))
zipfile, zlib = map(Later, ("zipfile", "zlib"))
ssl = None                          # imported by load_ssl: clients announce themselves first


# ---------------------------------------------------------------------------
# Basics: constants, exit codes, errors, the log
# ---------------------------------------------------------------------------

VERSION = "1.0"
PROTOCOL = 4                        # the version in every datagram and in HELLO

EXIT_USAGE = 100                    # a bad option or argument: permanent
EXIT_BAD_KEY = 101                  # ckeygen: the private key is there and invalid
EXIT_NO_PUB = 102                   # ckeygen: cannot write the pub
EXIT_NO_KEY = 103                   # ckeygen: cannot write the private key
EXIT_OTHER_KEY = 104                # ckeygen: -stdin does not match the key that is there
EXIT_TEMPORARY = 111                # cexec's own failure, always worth another try
EXIT_CANNOT_RUN = 126               # the command is there and cannot be run
EXIT_NOT_FOUND = 127                # the command is not there
EXIT_SIGNAL = 128                   # plus the number of the signal that killed the command

PORT = 3010                         # UDP: the datagrams to a group
DATAGRAM_MAX = 1200                 # bytes: fits an Ethernet frame through any tunnel
FRAME_MAX = 256 * 1024              # bytes of DATA in one frame
CONTROL_MAX = 64 * 1024             # bytes of any other frame's payload
WORDS_MAX = 6 * 1024 * 1024         # bytes of a job's words, each with its NUL and 8 more for its pointer: what
                                    # Linux's execve(2) takes at most, 3/4 of 8 MiB whatever the stack's limit is
WINDOW = 4 * 1024 * 1024            # bytes of credit for each channel and direction
PIPE_SIZE = 1024 * 1024             # bytes asked for in the command's pipes
MAXFD_LIMIT = 1024                  # the most that CEXEC_MAXFD can be
HELD_MAX = 8 * 1024 * 1024          # bytes of input held for a job that may be run again
MEMORY = 10000                      # jobs or datagrams that are remembered, in each memory

OFFER_SECONDS = 3.0                 # an offer is open for this long
BUSY_SECONDS = 10.0                 # a waiting client is told of its place this often
KILL_SECONDS = 5.0                  # between TERM and KILL for an abandoned command
PING_SECONDS = 3.0                  # between two PINGs, at most
GONE_SECONDS = 120.0                # a host that has acknowledged nothing for so long has vanished


class Fatal(Exception):
    """Ends the applet: one line with the cause and the remedy, and an exit code."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


class raising:
    """with raising(make, kinds): for an exception of these kinds in the block raises what make(exception) returns.

    If that is None, the block ends, and nothing else.  If it is the exception itself, this goes on as it is.
    """

    def __init__(self, make, kinds=OSError):
        self.make, self.kinds = make, kinds

    def __enter__(self):
        pass

    def __exit__(self, kind, error, traceback):
        made = self.make(error) if isinstance(error, self.kinds) else error
        if made is not None and made is not error:
            raise made from None
        return made is None


def suppress(*kinds):
    """with suppress(kinds): an exception of these kinds does not matter (to import contextlib takes 0.3 ms)."""
    return raising(lambda error: None, kinds)


def noting(message, *arguments):
    """with noting(message, ...): an OSError in the block is only told with -v."""
    return raising(lambda error: log.note(message + ": %s", *arguments, error.strerror))


def or_fatal(what, code=EXIT_TEMPORARY, hint=""):
    """with or_fatal(what, code): an OSError in the block ends the applet: Fatal, with what failed and the reason."""
    return raising(lambda error: Fatal(code, "%s: %s%s" % (what, error.strerror, hint)))


def on_failure(call, *arguments):
    """with on_failure(call, ...): makes this call if the block raises anything; the exception goes on."""
    def called(error):
        call(*arguments)
        return error
    return raising(called, BaseException)


class closing:
    """with closing(fd, ...) as fd: closes the descriptors at the end of the block."""

    def __init__(self, *fds):
        self.fds = fds

    def __enter__(self):
        return next(iter(self.fds), None)

    def __exit__(self, kind, error, traceback):
        for fd in self.fds:
            os.close(fd)


class ProtocolError(Exception):
    """A peer's bytes break the protocol; the message says how."""


class OtherVersion(ProtocolError):
    """A peer speaks another version of the protocol."""

    def __init__(self, version, asks_at=0):
        super().__init__("protocol version %d, this is %d" % (version, PROTOCOL))
        self.version, self.asks_at = version, asks_at       # asks_at: the return port of a QUERY, or 0


class Log:
    """Lines on standard error: say() always, note() with -v.  Never an exception."""

    def __init__(self):
        self.applet = "cexec"
        self.verbose = False
        self.fd, self.newline, self.shown = 2, "\n", ""
        self.midline = False        # whether what was written last has not ended its line
        self.said = collections.deque(maxlen=64)        # the last messages and topics of once()

    def speak_for(self, applet):
        """This process is that applet."""
        self.applet = applet

    def be_verbose(self, verbose):
        self.verbose = verbose

    def leave_2(self, floor):
        """Writes to a copy of descriptor 2 from now on, with a number from floor up.

        A job carries 2 like any other descriptor, and closes it when the command does.
        Later messages still have to get out.
        """
        self.return_to_2()
        self.fd = lifted(2, floor)

    def return_to_2(self):
        """Writes to 2 itself again: then a reader there sees the end of file when 2 is closed."""
        if self.fd != 2:
            os.closerange(self.fd, self.fd + 1)     # in a child it is closed already
            self.fd = 2

    def on_raw_terminal(self, raw):
        """Ends lines with CR LF while the terminal is raw: there LF alone does not go back to the left."""
        self.newline = "\r\n" if raw and os.isatty(self.fd) else "\n"

    def once(self, message, topic=None, say=None):
        """Says a message only the first time, or the first one of its topic, by say(message) if it is given."""
        if (topic or message) not in self.said:
            self.said.append(topic or message)
            (say or self.say)(message)

    def say(self, message):
        shown = self.shown
        self.status_line("")
        self.write("%s: %s%s" % (self.applet, printable(message), self.newline))
        self.status_line(shown)

    def tell_user(self, message):
        """Says it on a terminal; elsewhere only with -v, so that a script's standard error stays empty."""
        if os.isatty(2):
            self.say(message)
        else:
            self.note("%s", message)

    def write(self, text):
        self.copy(text.encode("utf-8", "backslashreplace"))

    def copy(self, data):
        self.midline = data[-1:] != b"\n"
        with suppress(OSError):     # nobody reads it
            write_all(functools.partial(os.write, self.fd), data)

    def beside(self, fd, data):
        """os.write() to a terminal, perhaps to ours: the status line is away until this output has ended a line."""
        self.status_line("")
        count = os.write(fd, data)
        self.midline = bytes(data[:count][-1:]) != b"\n"
        return count

    def status_line(self, text):
        """Shows this line below the others, on a terminal, in place of the last one; "" removes it."""
        if text and not self.midline or self.shown:
            try:
                width = os.get_terminal_size(self.fd).columns or 80
            except OSError:         # the terminal was closed
                width = 80
            self.shown = fitted(printable(text), max(20, width - 1))
            self.write("\r\x1b[K" + self.shown)
            self.midline = False

    def note(self, message, *args):
        if self.verbose:
            self.say(message % args if args else message)


def lack_of(error):
    """What to say of an exception if descriptors or memory were short; None for another one."""
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
        return "%s: this needs more descriptors (see ulimit -n)" % error.strerror
    return lack_of_memory(error)


def memory_hint():
    """The end of an error's message if memory is limited: libraries without memory report errors of any kind."""
    try:
        limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    except ImportError:             # it needs memory too
        limited = True
    return "; or there is " + NO_MEMORY if limited else ""


def what_came(read, *arguments):
    """Returns the bytes that read() gives: b"" at the end of file, and after an error; None if nothing is there now."""
    try:
        return read(*arguments)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def write_all(write, data):
    """Calls write() again after each short write, until all of the data is written.  Raises OSError."""
    while data:
        data = data[write(data):]


def readable(text):
    """The text with the bytes in it that Python could not decode, as lone surrogates, as UTF-8 or else as \\xNN.

    So it is the same in every locale, and can be encoded.
    """
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:      # another lone surrogate, as JSON can have it
        data = text.encode("utf-8", "backslashreplace")
    return data.decode("utf-8", "backslashreplace")


def printable(text):
    """The text, readable and with control characters escaped: what a peer says never moves a cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in readable(text))


log = Log()
at_end = []                         # functions that are called before this process ends, in every case


def tidy_up():
    while at_end:
        at_end.pop()()


def die_of(number):
    """Ends this process by a signal, as the shell that waits for it expects."""
    tidy_up()
    signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
    os._exit(EXIT_SIGNAL + number)


def encoded(text):
    """The bytes of a text in the encoding of standard output."""
    return text.encode(sys.stdout and sys.stdout.encoding or "ascii", "backslashreplace")


def need_output():
    """Raises Fatal (100) if standard output is closed."""
    if sys.stdout is None:
        raise Fatal(EXIT_USAGE, "standard output is closed: open it, as with > file")


def show(line):
    """A line on standard output.  Raises Fatal: 100 if that is closed, 111 if it can't be written."""
    need_output()
    print_out(encoded(line + "\n"))


def print_out(data=b""):
    """Writes to standard output, after what its buffer holds.  Raises Fatal (111), BrokenPipeError."""
    try:
        if sys.stdout:
            sys.stdout.flush()
            if data:                # a write of nothing also fails if standard output is open for reading only
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:        # a full disk
        raise Fatal(EXIT_TEMPORARY, "standard output: %s" % error.strerror) from None


def json_line(values):
    """A dictionary as a line of JSON, its texts readable."""
    return json.dumps({name: readable(value) if isinstance(value, str) else value for name, value in values.items()})


def columns(text):
    """The columns that a text takes on a terminal: wide characters take two (Unicode annex 11)."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def table(heads, rows):
    """Lines with the rows' texts in columns below their heads."""
    rows = [heads] + [[printable(text) for text in row] for row in rows]
    widths = [max(map(columns, column)) for column in zip(*rows)]
    return ["  ".join(text + " " * (width - columns(text)) for text, width in zip(row, widths)).rstrip()
            for row in rows]


def amount(count):
    """Bytes as people say them: 999 B, 1.0 kB, 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.95:
            return ("%d %s" if unit == "B" else "%.1f %s") % (count, unit)
        count /= 1000
    return "%.1f TB" % count


def fitted(text, width):
    """As much of a text as has room in so many columns."""
    for index, character in enumerate(text):
        width -= columns(character)
        if width < 0:
            return text[:index]
    return text


def shortened(text, width):
    """The text, or as much of it as has room in so many columns with an ellipsis."""
    return text if columns(text) <= width else fitted(text, width - 1) + "\u2026"


def duration(seconds):
    """Seconds as people say them: 59s, 12m, 3h05m, 2d04h."""
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if not minutes:
        return "%ds" % seconds
    if not hours:
        return "%dm" % minutes
    return "%dh%02dm" % (hours, minutes % 60) if not days else "%dd%02dh" % (days, hours % 24)


def setting(name, default, low, high, hint=""):
    """The number in the environment variable NAME, or the default.

    Raises Fatal (100), which ends with the hint, if it is no whole number within low..high.
    """
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        raise Fatal(EXIT_USAGE, "%s=%s: not a whole number from %d to %d%s" % (name, text, low, high, hint))
    return value


def started_up():
    """Begins to collect garbage, but not what is there now: processes forked later share its memory."""
    if hasattr(gc, "freeze"):       # Python 3.7
        gc.freeze()
    gc.enable()


def cut(text, limit):
    """As much of a text as fits so many bytes of UTF-8."""
    return readable(text).encode()[:limit].decode("utf-8", "ignore")


def number_of(digits):
    """The number in decimal digits; only the first twenty count, which is beyond every limit here.

    Python refuses thousands of digits (int(), "Integer string conversion length limitation").
    """
    return int(digits.lstrip("0")[:20] or "0")


def free_number(used, first):
    """Returns the smallest number from first up that is not used."""
    return next(number for number in itertools.count(first) if number not in used)


def u32(number):
    """The whole number, or the largest that fits a field of 32 bits."""
    return min(int(number), 0xffffffff)


def lifted(fd, floor):
    """A copy of fd at the first free number from floor up, not to be inherited."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, floor)


def lifted_away(fd, floor):
    """fd, moved to a number from floor up.  Raises OSError, and then fd is closed."""
    with closing(fd):
        return lifted(fd, floor)


def lifted_pair(one, other, floor):
    """Two descriptors, moved to numbers from floor up.  Raises OSError, and then both are closed."""
    with on_failure(os.close, other):
        one = lifted_away(one, floor)
    with on_failure(os.close, one):
        return one, lifted_away(other, floor)


# What is between two lines MAKE is also run by The door, without the rest of this section: see code_of().
# MAKE
def fill_standard():
    """Opens /dev/null at a closed 0, 1 or 2, so that no file of ours gets this number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number, False)
                os.close(null)


def close_all_but(kept):
    """Closes every other descriptor of this process, and opens /dev/null at 0, 1 and 2."""
    try:
        numbers = map(int, os.listdir("/dev/fd"))
    except OSError:
        numbers = range(4096)
    for number in set(numbers) - set(kept):
        try:
            os.close(number)
        except OSError:
            pass                    # listdir() itself had it open
    fill_standard()


def forked(work, kept):
    """Runs work() in a child process, which ends after it, whatever is raised.  Returns its pid.  Raises OSError.

    The child has no descriptors but those in kept, and /dev/null at 0, 1 and 2.  Its exit code is
    what work() returns, with 0 for None, and 1 if work() raises.  All signals are blocked in it
    until work() has its own handlers: those of the parent must not be called there.
    """
    old = signal.pthread_sigmask(signal.SIG_BLOCK, signal.Signals)
    try:
        pid = os.fork()
        # An exception must not leave this block: the child would go on in the code of its parent.
        # So nothing is called outside of its try: without memory a call can fail.
        if pid == 0:
            code = 1
            try:
                signal.set_wakeup_fd(-1)
                close_all_but(kept)
                code = work() or 0
            finally:
                os._exit(code)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
    return pid


# MAKE
def random_fraction():
    """A random number, at least 0 and less than 1 (`random` costs 3 ms to import)."""
    return int.from_bytes(os.urandom(6), "big") / 2 ** 48


# ---------------------------------------------------------------------------
# Options: an applet's table, from which they are read and -h is made
# ---------------------------------------------------------------------------

class Option:
    """A row of an applet's table.

    flags: its spellings, "-j --json".  argument: "" for none, "N" for a number from 1, "[N]" for
    an optional number (without it the value is "all"), "NAME+" if the option may be repeated (a
    list), else any text.  name: the value's attribute in what Syntax.read() returns.  modes: the
    modes that have the option, "- -m"; all modes if empty.  Rows of different modes may share a
    flag, and then their arguments may differ.
    """

    def __init__(self, flags, argument, name, help, modes=""):
        self.flags, self.argument, self.name, self.help, self.modes = flags.split(), argument, name, help, modes.split()
        self.spelled = (self.flags[0] + " " + argument.rstrip("+")).rstrip()

    def lines(self):
        """The lines of -h about it."""
        heads = "  %-14s  " % (", ".join(self.flags) + self.spelled[len(self.flags[0]):])
        return textwrap.wrap(self.help, 79, initial_indent=heads, subsequent_indent=" " * 18)


class Syntax:
    """An applet's command line.

    operands: {mode: what -h calls the words after the options}.  A mode is "-", or the flag that
    chooses it.  Options end at the first other word, or at --; with anywhere=True only at --.
    """

    def __init__(self, applet, operands, text, *rows, anywhere=False):
        self.applet, self.operands, self.text, self.anywhere = applet, operands, text, anywhere
        self.rows = [Option("-h --help", "", "help", "print this and exit", "-"), *rows,
                     Option("-v", "", "verbose", "say on standard error what happens"),
                     Option("--version", "", "version", "print the version and exit", "-")]
        self.arguments = {}             # flag: the arguments of all its rows
        for row in self.rows:
            for flag in row.flags:
                self.arguments.setdefault(flag, set()).add(row.argument)

    def read(self, argv):
        """A namespace: words, mode, and a value for each name in the table.  Obeys -v at once.  Raises Fatal (100)."""
        given, words, rest = [], [], list(argv)         # given: (flag, value) in this order; rest: not read yet
        while rest and rest[0] != "--" and (self.anywhere or not words):
            word = rest.pop(0)
            flag = word.partition("=")[0]
            if word == "-" or not word.startswith("-"):
                words.append(word)
            elif len(flag) > 2 and flag in self.arguments:
                self._read_long(word, rest, given)
            else:
                self._read_letters(word, rest, given)
        if rest and (self.anywhere or not words):
            rest.pop(0)                                 # the --
        values = self._values(given, words + rest)
        log.be_verbose(values.verbose)
        return values

    def _read_long(self, word, rest, given):
        """--log FILE is --log=FILE."""
        flag, equals, value = word.partition("=")
        if self.arguments[flag] != {""}:
            value = value if equals else self._next(flag, rest)
        elif equals:
            raise self.error("%s takes no value" % flag)
        self._give(flag, value or True, given)

    def _read_letters(self, word, rest, given):
        """-nr is -n -r, -oFILE is -o FILE; a number belongs to the option before it if that takes one."""
        letters = word[1:]
        while letters:
            flag, letters, value = "-" + letters[0], letters[1:], True
            arguments = self.arguments.get(flag)
            if not arguments:
                raise self.error("no such option: %s" % (word if word[1] == "-" else flag))
            if not arguments & {"", "[N]"}:
                value, letters = letters or self._next(flag, rest), ""
            elif arguments != {""} and letters[:1].isdecimal() and not self._is_plain(flag, given):
                value, letters = letters, ""
            elif arguments != {""} and not letters and rest and rest[0].isdecimal():
                value = rest.pop(0)
            self._give(flag, value, given)

    def _is_plain(self, flag, given):
        """Whether it has no argument in the mode given so far: then an option comes next, as in -mn0."""
        return any(flag in row.flags and not row.argument for row in self._rows(self._mode(given)))

    def _next(self, flag, rest):
        if not rest:
            raise self.error("%s needs %s" % (flag, max(self.arguments[flag]).rstrip("+")))
        return rest.pop(0)

    def _give(self, flag, value, given):
        if flag in ("-h", "--help", "--version"):
            print_out(encoded(("cexec " + VERSION if flag == "--version" else self.help()) + "\n"))
            raise SystemExit(0)
        given.append((flag, value))

    def _mode(self, given):
        return next((flag for flag, _ in given if flag in self.operands), "-")

    def _rows(self, mode):
        return [row for row in self.rows if not row.modes or mode in row.modes]

    def _values(self, given, words):
        mode = self._mode(given)
        values = SimpleNamespace(mode=mode, words=words)
        for row in self.rows:
            setattr(values, row.name, [] if row.argument.endswith("+") else None if row.argument else False)
        for flag, value in given:
            row = next((row for row in self._rows(mode) if flag in row.flags), None)
            if not row or flag in self.operands and flag != mode:
                raise self.error(self._misplaced(flag, mode))
            if row.argument.endswith("+"):
                getattr(values, row.name).append(value)
            else:
                setattr(values, row.name, self._value(flag, row.argument, value, mode))
        return values

    def _misplaced(self, flag, mode):
        """The message for an option that only other modes have."""
        if mode != "-":
            return "%s does not go with %s" % (flag, mode)
        modes = [mode for row in self.rows if flag in row.flags for mode in row.modes]
        return "%s is for %s" % (flag, " and ".join(modes))

    def _value(self, flag, argument, value, mode):
        """An option's value, of the type that its row's argument asks for."""
        if value is True:
            if argument in ("", "[N]"):
                return "all" if argument else True
            raise self.error("%s needs %s" % (flag, argument))
        if not argument:
            raise self.error("%s takes no number%s" % (flag, "" if mode == "-" else " with " + mode))
        lowest = {"N": 1, "[N]": 0, "TIMES": 0}.get(argument)
        if lowest is not None and not (value.isdecimal() and len(value) < 10 and int(value) >= lowest):
            raise self.error("%s needs a number from %d, and not %s" % (flag, lowest, cut(value, 20)))
        return int(value) if argument in ("N", "TIMES") else value

    def error(self, message):
        """A Fatal (100) that says where the usage is."""
        return Fatal(EXIT_USAGE, "%s (see %s -h)" % (message, self.applet))

    def synopsis(self, mode):
        """The line of usage of a mode: flags, options with arguments, long flags, operands."""
        shown = [row for row in self._rows(mode) if row.flags[0] not in self.operands]
        plain = [row.flags[0] for row in shown if not row.argument]
        words = [self.applet] + [row.spelled for row in self.rows if row.flags[0] == mode]
        words.append("[-%s]" % "".join(sorted(flag[1] for flag in plain if len(flag) == 2)))
        words += ["[%s]" % row.spelled for row in shown if row.argument]
        words += ["[%s]" % flag for flag in plain if len(flag) > 2]
        return " ".join(words + [self.operands[mode]])

    def help(self):
        """The text of -h: first the options of the common mode, then those of the others."""
        groups = {"options": []}
        for row in self.rows:
            heading = "with " + " or ".join(row.modes) if row.modes and "-" not in row.modes else "options"
            groups.setdefault(heading, []).append(row)
        lines = ["usage: " + "\n       ".join(map(self.synopsis, self.operands)), "", self.text.rstrip()]
        for heading, rows in groups.items():
            lines += ["", heading + ":"] + [line for row in rows for line in row.lines()]
        return "\n".join(lines + ["", "environment variables, examples and the rest: %s(1)" % self.applet])


# ---------------------------------------------------------------------------
# Keys: a keypair made of HMACs, and the certificate that goes with it
# ---------------------------------------------------------------------------
#
# The private key is a P-256 scalar, the master.  Each other secret or id is an HMAC of a label,
# with the master as key: the application id, which everybody may see, and a secret for each
# client's name.  The certificate is computed from the master too, so its bytes are always the
# same, and a pub can pin it.

DEFAULT_NAME = "anyone"             # the client's name in a pub made without -n
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._@+-")
NAME_MAX = 64
RUN_KEY = "-"                       # the name of a key that is in no file: of cexec -s
PUB_MAGIC = "cexec-public-key"
PUB_VERSION = "1"

# NIST P-256 (SEC 2, section 2.4.2): y^2 = x^3 - 3x + B over the integers modulo P
P256_P = 2 ** 256 - 2 ** 224 + 2 ** 192 + 2 ** 96 - 1
P256_N = 0xffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551
P256_G = (0x6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296,
          0x4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5)

OID_EC_PUBLIC_KEY = bytes.fromhex("06072a8648ce3d0201")
OID_P256 = bytes.fromhex("06082a8648ce3d030107")
OID_ECDSA_SHA256 = bytes.fromhex("06082a8648ce3d040302")
OID_COMMON_NAME = bytes.fromhex("0603550403")


def mac(key, *parts):
    """HMAC-SHA256 (RFC 2104), 32 bytes."""
    return hmac.new(key, b"".join(parts), hashlib.sha256).digest()


def application_id(master):
    """8 bytes that name the application on the wire."""
    return mac(master, b"application")[:8]


def client_secret(master, name):
    """32 bytes shared by the holder of the pub for NAME and every worker."""
    return mac(master, b"client ", name.encode())


def client_proof(secret, challenge, nonce):
    """32 bytes with which a client answers a worker's challenge, for one job."""
    return mac(secret, b"proof", challenge, nonce)


def is_name(name):
    """Whether it can be a client's name, or a terminal's type (TERM)."""
    return 0 < len(name) <= NAME_MAX and NAME_CHARACTERS.issuperset(name)


def check_name(name):
    """The client's name, or Fatal (100)."""
    if not is_name(name):
        raise Fatal(EXIT_USAGE, "client name %r: use 1 to %d letters, digits and . _ @ + -" % (name, NAME_MAX))
    return name


Pub = collections.namedtuple("Pub", "label name application secret fingerprint")
Pub.__doc__ = """A client's public key: its name, the application id (8 bytes), its secret (32)
and the SHA-256 of the workers' certificate (32).  label is the file's name, for messages."""

Key = collections.namedtuple("Key", "label path master application")
Key.__doc__ = """A worker's private key: the master (32 bytes), and the application id derived from it."""


def format_pub(master, name, fingerprint):
    """The one line of a pub file."""
    return "%s %s %s %s %s %s\n" % (PUB_MAGIC, PUB_VERSION, name, application_id(master).hex(),
                                    client_secret(master, name).hex(), fingerprint.hex())


def parse_pub(text, label):
    """The Pub in a pub file's text; Fatal (100) says what is wrong with it."""
    words = text.split()
    if "-----BEGIN" in text:
        raise Fatal(EXIT_USAGE, "%s: a private key where the public key is needed (ckeygen %s writes it)"
                    % (label, label))
    if text.startswith("Seq\tHost"):
        raise Fatal(EXIT_USAGE, "%s: not a public key but a log (crat --svg %s > FILE draws it)" % (label, label))
    if words[:1] != [PUB_MAGIC]:
        raise Fatal(EXIT_USAGE, "%s: not a cexec public key (ckeygen makes them)" % label)
    if words[1:2] != [PUB_VERSION]:
        raise Fatal(EXIT_USAGE, "%s: a public key of another version than %s" % (label, PUB_VERSION))
    try:
        name, application, secret, fingerprint = words[2], *map(bytes.fromhex, words[3:])
        if not is_name(name) or (len(application), len(secret), len(fingerprint)) != (8, 32, 32):
            raise ValueError
    except (ValueError, IndexError):
        raise Fatal(EXIT_USAGE, "%s: damaged public key (make it again with ckeygen)" % label) from None
    return Pub(os.path.basename(label), name, application, secret, fingerprint)


def pem(kind, der):
    """A DER object in PEM armour (RFC 7468)."""
    lines = [binascii.b2a_base64(der[i:i + 48]).decode() for i in range(0, len(der), 48)]
    return "-----BEGIN %s-----\n%s-----END %s-----\n" % (kind, "".join(lines), kind)


def unpem(kind, text):
    """The DER of the first such object in a PEM text, or None."""
    begin, end = "-----BEGIN %s-----" % kind, "-----END %s-----" % kind
    body = text.partition(begin)[2].partition(end)[0]
    try:
        return binascii.a2b_base64(body) or None
    except ValueError:
        return None


def parse_key(text, path):
    """The Key in a private key file's text; Fatal (100) says what is wrong with it.

    Reads only the scalar of the EC PRIVATE KEY (RFC 5915), as ckeygen writes it.  load_cert_chain
    checks that the certificate belongs to it; ckeygen computes the certificate again.
    """
    if text.startswith(PUB_MAGIC):
        raise Fatal(EXIT_USAGE, "%s: a public key where the private key is needed (its name is without .pub)" % path)
    der = unpem("EC PRIVATE KEY", text)
    if not der or not unpem("CERTIFICATE", text) or len(der) < 39 or der[2:7] != b"\x02\x01\x01\x04\x20":
        raise Fatal(EXIT_USAGE, "%s: not a cexec private key (make one with ckeygen)" % path)
    master = der[7:39]
    return Key(os.path.basename(path), path, master, application_id(master))


NO_FILE = errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP
NO_KEY = errno.EFBIG, errno.EISDIR  # the path is there, and can't be a key


def read_text(path, limit=CONTROL_MAX):
    """A small text file's contents.  Raises OSError."""
    with open(path, "rb") as file:
        text = file.read(limit + 1).decode("latin-1")
    if len(text) > limit:           # never return a part as if it were the whole
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return text


def open_pub(path):
    """The Pub in the file PATH, or in PATH.pub if PATH is missing or no pub.  Raises Fatal."""
    for name in (path, path + ".pub"):
        try:
            text = read_text(name)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise unreadable(name, error, "public key") from None
        if text.startswith(PUB_MAGIC) or name != path or not os.path.exists(path + ".pub"):
            return parse_pub(text, name)
    other = "" if path.endswith(".pub") else ", and no %s.pub" % path
    hint = "; -s comes before hosts" if other and log.applet == "cexec" else ""
    raise Fatal(EXIT_USAGE, "%s: no such public key%s: is the name right? (ckeygen makes keys%s)" % (path, other, hint))


def unreadable(path, error, kind):
    """The Fatal for a key file that can't be read: 100 if it is missing or can't be a key, else 111."""
    remedy = {errno.ENOENT: ": is the name right? (ckeygen makes keys)",
              errno.ENOTDIR: ": is the name right? (ckeygen makes keys)",
              errno.EFBIG: ": not a cexec %s" % kind,
              errno.EISDIR: ": name the %s in it" % kind,
              errno.EACCES: ": let the user with the id %d read it" % os.geteuid()}.get(error.errno, "")
    code = EXIT_USAGE if error.errno in NO_KEY or error.errno in NO_FILE else EXIT_TEMPORARY
    return Fatal(code, "%s: %s%s" % (path, error.strerror, remedy))


def open_key(path):
    """The Key in the file PATH, with a warning if others can read it.  Raises Fatal."""
    with raising(lambda error: unreadable(path, error, "private key")):
        text = read_text(path)
        mode = os.stat(path).st_mode
    if mode & 0o077:
        log.say("warning: %s can be read by others (chmod 600 it)" % path)
    return parse_key(text, path)


# The certificate.  Only ckeygen uses this: integers and DER, 3 ms, no randomness.

def p256_multiply(scalar, point):
    """scalar * point on P-256, in Jacobian coordinates; both points affine pairs.

    Not in constant time: it runs once, when a key is made, on its owner's machine.
    """
    x, y, z = 0, 1, 0                                       # the point at infinity
    for bit in bin(scalar)[2:]:
        if z:
            x, y, z = p256_double(x, y, z)
        if bit == "1":
            x, y, z = p256_add(x, y, z, *point) if z else (*point, 1)
    inverse = pow(z, P256_P - 2, P256_P)
    return x * inverse ** 2 % P256_P, y * inverse ** 3 % P256_P


def p256_double(x, y, z):
    """dbl-2001-b of the Explicit-Formulas Database, for a = -3."""
    delta, gamma = z * z, y * y % P256_P
    beta = x * gamma
    alpha = 3 * (x - delta) * (x + delta)
    x3 = (alpha * alpha - 8 * beta) % P256_P
    z3 = ((y + z) ** 2 - gamma - delta) % P256_P
    return x3, (alpha * (4 * beta - x3) - 8 * gamma * gamma) % P256_P, z3


def p256_add(x1, y1, z1, x2, y2):
    """madd of the same database; the second point is affine, and the points are never equal here."""
    zz = z1 * z1 % P256_P
    h = (x2 * zz - x1) % P256_P
    r = (y2 * zz * z1 - y1) % P256_P
    hh = h * h % P256_P
    hhh, v = h * hh % P256_P, x1 * hh % P256_P
    x3 = (r * r - hhh - 2 * v) % P256_P
    return x3, (r * (v - x3) - y1 * hhh) % P256_P, z1 * h % P256_P


def ecdsa_sign(master, message):
    """Returns (r, s): the signature of message's SHA-256 by the scalar (FIPS 186-4, 6.4).

    The nonce is an HMAC of the message with the scalar as key: the idea of RFC 6979.
    """
    digest = int.from_bytes(hashlib.sha256(message).digest(), "big")
    scalar = int.from_bytes(master, "big")
    wide = mac(master, b"nonce 1 ", message) + mac(master, b"nonce 2 ", message)
    nonce = int.from_bytes(wide, "big") % (P256_N - 1) + 1
    r = p256_multiply(nonce, P256_G)[0] % P256_N
    return r, pow(nonce, P256_N - 2, P256_N) * (digest + r * scalar) % P256_N


def der(tag, *parts):
    """One DER object (X.690): tag, length, contents."""
    body = b"".join(parts)
    length = len(body)
    if length < 128:
        return bytes([tag, length]) + body
    width = (length.bit_length() + 7) // 8
    return bytes([tag, 128 | width]) + length.to_bytes(width, "big") + body


def der_integer(number):
    return der(0x02, number.to_bytes(number.bit_length() // 8 + 1, "big"))


def format_key(master):
    """The text of a private key file, and its certificate's SHA-256 (32 bytes).

    An EC PRIVATE KEY (RFC 5915) and a self-signed X.509 v3 certificate (RFC 5280) with
    fixed names, serial 1, validity 1970 to 9999: one master always gives the same bytes.
    """
    x, y = p256_multiply(int.from_bytes(master, "big"), P256_G)
    point = der(0x03, b"\0\x04" + x.to_bytes(32, "big") + y.to_bytes(32, "big"))
    private = der(0x30, der_integer(1), der(0x04, master), der(0xa0, OID_P256), der(0xa1, point))
    algorithm = der(0x30, OID_ECDSA_SHA256)
    name = der(0x30, der(0x31, der(0x30, OID_COMMON_NAME, der(0x0c, b"cexec"))))
    validity = der(0x30, der(0x17, b"700101000000Z"), der(0x18, b"99991231235959Z"))
    public = der(0x30, der(0x30, OID_EC_PUBLIC_KEY, OID_P256), point)
    signed = der(0x30, der(0xa0, der_integer(2)), der_integer(1), algorithm, name, validity, name, public)
    signature = der(0x30, *map(der_integer, ecdsa_sign(master, signed)))
    certificate = der(0x30, signed, algorithm, der(0x03, b"\0", signature))
    text = pem("EC PRIVATE KEY", private) + pem("CERTIFICATE", certificate)
    return text, hashlib.sha256(certificate).digest()


# ---------------------------------------------------------------------------
# Messages: datagrams and frames, each declared once
# ---------------------------------------------------------------------------
#
# A field's type is a struct format of one item ("H", "16s"), "text" (16-bit length,
# UTF-8), "texts" (16-bit count), "parts" (16-bit count of byte strings, each with a 16-bit length before it),
# "rows:FORMAT" (16-bit count of tuples) or "rest" (all bytes that follow).
#
# A new frame needs: its declaration, a place in FRAMES, and a method rcvd_NAME at each end that takes
# it.  That is all for a Carrier: a RemoteRun, a Command and a Lifeline take each frame for which they have
# a method.  The others name the frames that they take in each state: Supervisor.TAKES, and link_frame() of Candidate,
# Offer and FileRun.  Lifeline.link_frame() names those that may come for a channel that is closed.  A new datagram
# needs a place in DATAGRAMS, and rcvd_NAME in Worker, Search or Survey, or for crat a place in Logger.hear() and
# records() and a form in record_line(); also a place in FOR_WORKERS, RELAYED or ANSWERS, if it is to be passed on.
# Both need cexec(7), and another PROTOCOL, a number that is in cexec(7) too.
VARIABLE = "text", "parts", "rows:", "rest"         # a field whose type begins so has no fixed size
WORDS_CHUNK = 16 * 1024             # bytes of them in one frame: what even a slow link carries in OFFER_SECONDS


class Message:
    """One kind of datagram or frame: code, name, and its fields in wire order."""

    def __init__(self, code, name, **fields):
        self.code, self.name, self.fields = code, name, fields
        self.parts = list(parts_of(fields))

    def __repr__(self):
        return self.name

    def pack(self, **values):
        """The body's bytes.  Every field must be given."""
        if values.keys() != self.fields.keys():
            raise TypeError("%s has the fields %s" % (self.name, ", ".join(self.fields)))
        return b"".join([form.pack(*[values[name] for name in names]) if form else pack_field(kind, values[names[0]])
                         for names, kind, form in self.parts])

    def unpack(self, body):
        """The fields as a namespace; ProtocolError if the body is not exactly them."""
        values, rest = {}, memoryview(body)
        try:
            for names, kind, form in self.parts:
                if form:
                    values.update(zip(names, form.unpack_from(rest)))
                    rest = rest[form.size:]
                else:
                    values[names[0]], rest = unpack_field(kind, rest)
        except struct.error:
            raise ProtocolError("%s cut short" % self.name) from None
        if rest:
            raise ProtocolError("%s with %d bytes too many" % (self.name, len(rest)))
        return SimpleNamespace(**values)


def parts_of(fields):
    """Yields (names, kind, a Struct or None) for the parts of a message: fields of fixed size in a row are one."""
    for varies, run in itertools.groupby(fields.items(), lambda item: item[1].startswith(VARIABLE)):
        names, kinds = zip(*run)
        if varies:
            yield from (((name,), kind, None) for name, kind in zip(names, kinds))
        else:
            yield names, None, struct.Struct("!" + "".join(kinds))


def pack_field(kind, value):
    if kind == "rest":
        return value
    if kind == "part":
        return struct.pack("!H", len(value)) + value
    if kind == "text":
        return pack_field("part", value.encode("utf-8", "surrogateescape"))
    if kind in ("texts", "parts"):
        return struct.pack("!H", len(value)) + b"".join(pack_field(kind[:-1], one) for one in value)
    if kind.startswith("rows:"):
        return struct.pack("!H", len(value)) + b"".join(struct.pack("!" + kind[5:], *row) for row in value)
    return struct.pack("!" + kind, value)


def unpack_field(kind, view):
    """Returns (value, the rest of the view).  Raises struct.error if the view is too short."""
    if kind == "rest":
        return bytes(view), view[len(view):]
    if kind in ("part", "text"):
        size, = struct.unpack_from("!H", view)
        if len(view) < 2 + size:
            raise struct.error
        data = bytes(view[2:2 + size])
        return data if kind == "part" else data.decode("utf-8", "surrogateescape"), view[2 + size:]
    if kind in ("texts", "parts") or kind.startswith("rows:"):
        count, = struct.unpack_from("!H", view)
        view, values = view[2:], []
        for _ in range(count):
            value, view = unpack_field(kind[:-1] if kind in ("texts", "parts") else kind[5:], view)
            values.append(value)
        return values, view
    form = struct.Struct("!" + kind)
    value = form.unpack_from(view)
    return (value[0] if len(value) == 1 else value), view[form.size:]


def option_letters(options):
    """The options of cservice in a HELLO or REPLY, as "-ai"; "-" if there is none."""
    return "-" + "".join(letter for bit, letter in OPTION_LETTERS.items() if options & bit)


def is_variable(name):
    """Whether it can name an environment variable in a shell."""
    return name.isidentifier() and all(character < "\x7f" for character in name)


def by_code(*messages):
    return {message.code: message for message in messages}


def handler_of(owner, kind):
    """The owner's method rcvd_NAME for a message of this kind; None if there is no such method."""
    return getattr(owner, "rcvd_" + kind.name.lower(), None)


def take_frame(owner, taken, kind, flags, channel, payload):
    """The gate for frames: calls owner.rcvd_NAME() for one that is among those taken now.  Raises ProtocolError."""
    if kind not in taken:
        raise ProtocolError("%s out of place" % kind)
    handler_of(owner, kind)(flags, channel, payload)


# Datagrams: to the group; BUSY, REPLY and DENY are answers to one client.  Every body begins with COMMON.
COMMON = Message(0, "COMMON", application="8s", client="text", nonce="16s")
ANNOUNCE = Message(1, "ANNOUNCE", attempt="I", waited="I", pause="I", batch="8s", only="8s")    # waited, pause: ms
CLAIM = Message(2, "CLAIM", token="32s", offers="H")
ALERT = Message(3, "ALERT", outcomes="parts")                       # each part is an OUTCOME
BUSY = Message(4, "BUSY", worker_id="8s", attempt="I", ahead="I",
               failures="H",                                        # connections that did not get through
               address="text")                                      # the worker's, if this comes through ssh; else ""
QUERY = Message(5, "QUERY", strangers="B", padding="240s")          # no answer is longer
REPLY = Message(6, "REPLY", worker_id="8s", address="text", host="text", version="text", load="I", running="H",
                slots="H", waiting="I", uptime="I", draining="B", options="B")      # load: 1/1000, uptime: s
DENY = Message(7, "DENY", serves="8s", why="B")                     # proves nothing; serves: an application id
COMPLAINT = Message(8, "COMPLAINT", worker="text", host="text", worker_id="8s", milliseconds="I", bytes_in="Q",
                    bytes_out="Q", reason="text")
DATAGRAMS = by_code(ANNOUNCE, CLAIM, ALERT, BUSY, QUERY, REPLY, DENY, COMPLAINT)
OUTCOME = Message(0, "OUTCOME", ago="I", how="B", status="H", worker="text", host="text", milliseconds="I",    # ago: ms
                  bytes_in="Q", bytes_out="Q", reason="text")       # how: HOW_SIGNALLED, else HOW_EXITED
WHOLE_DATAGRAMS = {code: Message(code, message.name, **COMMON.fields, **message.fields)
                   for code, message in DATAGRAMS.items()}

FOR_WORKERS = (ANNOUNCE, CLAIM, COMPLAINT, QUERY)                   # what cservice -s passes on to its workers,
RELAYED = (ALERT, *FOR_WORKERS)                                     # and cproxy to another network,
ANSWERS = {BUSY: ANNOUNCE, REPLY: QUERY, DENY: QUERY}               # and a worker's datagrams: what each answers

DENY_APPLICATION, DENY_NAME, DENY_SECRET, DENY_VERSION = 1, 2, 3, 4     # DENY's why

# Frames: on the connection of a worker and a client, and the last ones on that of a worker and `cservice -s`.
HELLO = Message(1, "HELLO", version="B", options="B", nonce="16s", worker_id="8s", challenge="32s",
                address="text", host="text", load="I", delay="I")   # load: 1/1000, delay: us
AUTH = Message(2, "AUTH", proof="32s")
JOB = Message(3, "JOB", descriptors="rows:HHB", variables="I", arguments="I", patterns="I", linger="I",   # ms
              term="text", lines="H", columns="H", modes="texts")   # of the client's terminal, with -t
ACCEPT = Message(4, "ACCEPT")
REFUSE = Message(5, "REFUSE", status="B", reason="text")             # status: 127 or 126 of the command; else 0
GO = Message(6, "GO")
DATA = Message(7, "DATA")                                           # the payload is the bytes
EOF = Message(8, "EOF")
SHUT = Message(9, "SHUT")
CREDIT = Message(10, "CREDIT", bytes="I")
SIGNAL = Message(11, "SIGNAL", signal="text")
PING = Message(12, "PING")
PONG = Message(13, "PONG")
LINGER = Message(14, "LINGER", status="B")
EXIT = Message(15, "EXIT", how="B", status="B", more="B", reason="text", channels="rows:HQQ")
RESIZE = Message(16, "RESIZE", lines="H", columns="H")
WORDS = Message(17, "WORDS", bytes="rest")                          # before JOB: its words, each ended by a NUL
PASS = Message(18, "PASS", address="text", port="H", datagram="rest")       # a client's datagram, or an answer to it
CONNECT = Message(19, "CONNECT", address="text", port="H")          # a new channel: a connection to that client
DRAIN = Message(20, "DRAIN")
END_JOBS = Message(21, "END_JOBS")
FRAMES = by_code(HELLO, AUTH, JOB, ACCEPT, REFUSE, GO, DATA, EOF, SHUT, CREDIT, SIGNAL, PING, PONG, LINGER, EXIT,
                 RESIZE, WORDS, PASS, CONNECT, DRAIN, END_JOBS)

HOW_EXITED, HOW_SIGNALLED, HOW_NOT_STARTED, HOW_HOST_FAILED = 1, 2, 3, 4   # EXIT's how; 4: not started, for a reason
                                                                    # that lies in the worker's host
NOT_STARTED = HOW_NOT_STARTED, HOW_HOST_FAILED
NO_LINGER = 0xffffffff                                              # JOB's linger: wait for ever
NO_BATCH = bytes(8)                                                 # ANNOUNCE's batch: a job of its own
ANY_WORKER = bytes(8)                                               # ANNOUNCE's only: else a worker's id

# A row of JOB's descriptors: the command's number, its channel, and these flags.
FLAG_INPUT = 1                      # the client reads it, the command can read it
FLAG_OUTPUT = 2                     # the command writes it, the client gets it
FLAG_SOCKET = 4                     # both ways: a socketpair for the command
FLAG_COUNTED = 8                    # an input; the client gives back the bytes that the command did not take
FLAG_TERMINAL = 16                  # both ways: a terminal for the command, the controlling one of its session
FLAG_FILES = 32                     # an archive for the job's directory, or of results: no descriptor of the command
POSSIBLE_FLAGS = {FLAG_INPUT, FLAG_INPUT | FLAG_COUNTED, FLAG_OUTPUT, FLAG_INPUT | FLAG_FILES, FLAG_OUTPUT | FLAG_FILES,
                  FLAG_INPUT | FLAG_OUTPUT | FLAG_SOCKET, FLAG_INPUT | FLAG_OUTPUT | FLAG_TERMINAL}
FILES_IN, FILES_OUT = MAXFD_LIMIT, MAXFD_LIMIT + 1      # the channels of the archives: see the section Files

HELLO_REPEATABLE = 1                # HELLO's and REPLY's options: the application may be run again,
HELLO_ARGUMENTS = 2                 # the client may give arguments,
HELLO_DIRECTORIES = 4               # each job has a directory, and files may come into it and out of it,
HELLO_NO_COMMAND = 8                # the arguments are the command: there is no other,
HELLO_BY_SSH = 16                   # it comes through ssh: the worker's address is the one that it tells
OPTION_LETTERS = {HELLO_ARGUMENTS: "a", HELLO_DIRECTORIES: "d", HELLO_REPEATABLE: "i"}      # of cservice

# A frame's flags: on EOF and SHUT.
FLAG_WHOLE = 1                      # both directions: the descriptor is closed

MAGIC = b"CEXC"
DATAGRAM_HEAD = struct.Struct("!4sBBB16sH")     # magic, version, kind, hops, return address, port
PROVED = struct.Struct("!4sBB")                 # the part of the head that the MAC covers
MAC_SIZE = 16
QUERY_MIN = 309                     # bytes: shorter ones of other versions are not answered, so no answer is longer
FRAME_HEAD = struct.Struct("!BBHI")             # kind, flags, channel, length of the payload

SIGNALS = ("INT", "TERM", "HUP", "QUIT", "USR1", "USR2", "WINCH", "TSTP", "CONT")   # carried to the command


def other_version(data):
    """An OtherVersion for a datagram: its head is the same in every version."""
    code = port = 0
    if len(data) >= DATAGRAM_HEAD.size:
        _, _, code, _, _, port = DATAGRAM_HEAD.unpack_from(data)
    return OtherVersion(data[4], port if code == QUERY.code and len(data) >= QUERY_MIN else 0)


class Datagram:
    """A datagram that is well formed; proved_by() tells whether it is genuine.

    address and port are the return address; address is None if it is the sender's.  identity (16
    bytes) is the same for all copies, by whatever way they came.
    """

    def __init__(self, data):
        if len(data) > DATAGRAM_MAX or data[:4] != MAGIC[:len(data)]:
            raise ProtocolError("not a cexec datagram")
        if len(data) > 4 and data[4] != PROTOCOL:       # every version has its number in this place
            raise other_version(data)
        try:
            _, _, code, self.hops, address, port = DATAGRAM_HEAD.unpack_from(data)
        except struct.error:
            raise ProtocolError("datagram cut short") from None
        if code not in DATAGRAMS:
            raise ProtocolError("unknown datagram %d" % code)
        self.data, self.kind = data, DATAGRAMS[code]
        body, self.mac = data[DATAGRAM_HEAD.size:-MAC_SIZE], data[-MAC_SIZE:]
        self.body = WHOLE_DATAGRAMS[code].unpack(body)
        self.application, self.name, self.nonce = self.body.application, self.body.client, self.body.nonce
        if not is_name(self.name):
            raise ProtocolError("not a client's name")
        self.address = unpack_address(address)
        self.port = port
        self.identity = hashlib.sha256(bytes([code]) + data[DATAGRAM_HEAD.size:]).digest()[:16]

    def __repr__(self):
        return "%s %s %s" % (self.kind, self.nonce.hex()[:8], self.name)

    def proved_by(self, secret):
        """Whether a holder of the client secret made it."""
        proved = PROVED.pack(MAGIC, PROTOCOL, self.kind.code) + self.data[DATAGRAM_HEAD.size:-MAC_SIZE]
        return hmac.compare_digest(mac(secret, b"datagram", proved)[:MAC_SIZE], self.mac)

    def readdressed(self, address, port, hops):
        """The same datagram, with another return address and count of hops."""
        head = DATAGRAM_HEAD.pack(MAGIC, PROTOCOL, self.kind.code, hops, pack_address(address), port)
        return head + self.data[DATAGRAM_HEAD.size:]


def make_datagram(kind, application, name, secret, nonce, port, **fields):
    """A datagram's bytes, at most 1200, with a MAC by the client's secret; the return address is the sender's."""
    common = COMMON.pack(application=application, client=name, nonce=nonce)
    body = common + kind.pack(**fields)
    proved = PROVED.pack(MAGIC, PROTOCOL, kind.code) + body
    head = DATAGRAM_HEAD.pack(MAGIC, PROTOCOL, kind.code, 0, bytes(16), port)
    return head + body + mac(secret, b"datagram", proved)[:MAC_SIZE]


LINK_LOCAL = bytes.fromhex("fe80")  # RFC 4291, 2.5.6: and then 54 bits of zeros


def pack_address(address):
    """16 bytes for an IP address: IPv4 mapped into IPv6 (RFC 4291, 2.5.5.2), zeros for None.

    A link-local address has its interface's index in place of zeros; only this host understands it.
    """
    if address is None:
        return bytes(16)
    address, _, device = address.partition("%")
    if ":" not in address:
        return bytes(10) + b"\xff\xff" + socket.inet_aton(address)
    data = socket.inet_pton(socket.AF_INET6, address)
    if device:
        data = data[:2] + socket.if_nametoindex(device).to_bytes(4, "big") + data[6:]
    return data


def unpack_address(data):
    """The IP address in 16 bytes; None for all zeros.  Raises ProtocolError."""
    if data == bytes(16):
        return None
    if data.startswith(bytes(10) + b"\xff\xff"):
        return socket.inet_ntoa(data[12:])
    index = int.from_bytes(data[2:6], "big") if data.startswith(LINK_LOCAL) else 0
    if not index:
        return socket.inet_ntop(socket.AF_INET6, data)
    try:
        device = socket.if_indextoname(index)
    except (OSError, OverflowError):
        raise ProtocolError("an address of interface %d" % index) from None
    return "%s%%%s" % (socket.inet_ntop(socket.AF_INET6, data[:2] + bytes(4) + data[6:]), device)


def token_nonce(token):
    """The 16-byte nonce that names a job: a hash of the token, which the client reveals in CLAIM."""
    return hashlib.sha256(token).digest()[:16]


class Memory(collections.OrderedDict):
    """A dictionary of limited size, which forgets its oldest entries."""

    def __init__(self, limit=MEMORY):
        super().__init__()
        self.limit = limit

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > self.limit:
            self.popitem(last=False)


class FrameReader:
    """Takes the connection's bytes, gives frames.

    Put bytes into room(), tell filled() how many, and go through frames().  DATA comes in
    pieces as they arrive, as views that are valid until the next room(); every other frame comes
    whole, with its payload unpacked.
    """

    FULL_SIZE = FRAME_MAX + CONTROL_MAX + FRAME_HEAD.size

    def __init__(self):
        self.view = memoryview(bytearray(16384))    # most connections never need more
        self.start = self.end = 0
        self.data_flags = self.data_channel = self.data_left = 0

    def room(self):
        """A view that the caller fills from its beginning; never empty."""
        waiting = self.view[self.start:self.end]
        if self.end == len(self.view) < self.FULL_SIZE:
            self.view = memoryview(bytearray(self.FULL_SIZE))
        self.start, self.end = 0, len(waiting)
        self.view[:self.end] = waiting
        return self.view[self.end:]

    def filled(self, count):
        self.end += count

    def frames(self):
        """Yields (kind, flags, channel, payload).  Raises ProtocolError."""
        while True:
            if self.data_left:
                size = min(self.data_left, self.end - self.start)
                if not size:
                    return
                self.start, self.data_left = self.start + size, self.data_left - size
                yield DATA, self.data_flags, self.data_channel, self.view[self.start - size:self.start]
                continue
            if self.end - self.start < FRAME_HEAD.size:
                return
            code, flags, channel, size = FRAME_HEAD.unpack_from(self.view, self.start)
            kind = FRAMES.get(code)
            if kind is None or size > (FRAME_MAX if kind is DATA else CONTROL_MAX):
                raise ProtocolError("frame of kind %d and %d bytes" % (code, size))
            body = self.start + FRAME_HEAD.size
            if kind is DATA:
                self.start, self.data_flags, self.data_channel, self.data_left = body, flags, channel, size
            elif self.end - body < size:
                return
            else:
                self.start = body + size
                yield kind, flags, channel, unpack_frame(kind, bytes(self.view[body:body + size]))


def unpack_frame(kind, body):
    """A frame's fields.  Raises ProtocolError; OtherVersion for a HELLO with other fields than ours."""
    try:
        return kind.unpack(body)
    except ProtocolError:
        if kind is HELLO and body and body[0] != PROTOCOL:      # the first byte in every version
            raise OtherVersion(body[0]) from None
        raise


def make_frame(kind, channel=0, flags=0, **fields):
    """A frame's bytes; for DATA see Link.send_data."""
    payload = kind.pack(**fields)
    return FRAME_HEAD.pack(kind.code, flags, channel, len(payload)) + payload


# A job's words are its variables (KEY=VALUE), its arguments and the patterns of -g: bytes, perhaps many.
# WORDS frames carry them before JOB, each word with a NUL after it, cut anywhere.  JOB has their numbers.

def words_size(words):
    """How many bytes of WORDS_MAX the words take."""
    return sum(len(word) + 9 for word in words)


def job_frames(environment=(), arguments=(), patterns=(), **fields):
    """Returns the frames of a job's words, each of which the worker answers with PONG, and of JOB."""
    data = b"".join(word + b"\0" for word in (*environment, *arguments, *patterns))
    return [make_frame(WORDS, bytes=data[at:at + WORDS_CHUNK]) for at in range(0, len(data), WORDS_CHUNK)] + [
        make_frame(JOB, variables=len(environment), arguments=len(arguments), patterns=len(patterns), **fields)]


class Words:
    """The words of a job as they arrive."""

    def __init__(self):
        self.data, self.count = bytearray(), 0

    def add(self, data):
        """Adds the bytes of a WORDS frame.  Raises ProtocolError if all are more than a command can be given."""
        self.data += data
        self.count += data.count(b"\0")
        if not data or len(self.data) + 8 * self.count > WORDS_MAX:
            raise ProtocolError("no words, or more than %d MiB of them" % (WORDS_MAX >> 20))

    def take(self, *counts):
        """Lists of so many words each, in their order.  Raises ProtocolError if there are fewer words or more."""
        if self.count != sum(counts) or self.data and self.data[-1]:
            raise ProtocolError("other words than JOB says")
        words = iter(bytes(self.data).split(b"\0"))
        self.__init__()
        return tuple(list(itertools.islice(words, count)) for count in counts)


# ---------------------------------------------------------------------------
# Groups: where announcements go, and how they are heard
# ---------------------------------------------------------------------------

LINUX = sys.platform.startswith("linux")
ALL_NETWORKS = "255.255.255.255"    # out of every interface that broadcasts
ALL_NODES = "ff02::1"               # RFC 4291, 2.7.1: every IPv6 host of a network hears it unasked
THIS_HOST = "127.255.255.255" if LINUX else "127.0.0.1"     # every listener of this machine; on macOS and the
                                    # BSDs only one listener, because their loopback has no broadcast
MULTICAST_TTL = 31                  # hops: within a site
NETWORK_MAX = 1024                  # addresses of a network that a group may name: a /22
TARGETS_MAX = 4096                  # addresses of a group in all
GROUP_FILE_MAX = 1024 * 1024        # bytes of a file of addresses
SECONDS_A_WAY = 0.002               # the pause for each address: announcements to a thousand are 2 s apart
REJOIN_SECONDS = 5.0                # so often new interfaces are joined to a multicast group
IFF_UP, IFF_BROADCAST, IFF_LOOPBACK, IFF_MULTICAST = 0x1, 0x2, 0x8, 0x1000 if LINUX else 0x8000
if LINUX:
    SIOCGIFFLAGS, SIOCGIFADDR, SIOCGIFBRDADDR = 0x8913, 0x8915, 0x8919      # netdevice(7)
else:                               # sys/sockio.h: _IOWR('i', N, struct ifreq), of 32 bytes, on NetBSD 144
    SIOCGIFFLAGS, SIOCGIFADDR, SIOCGIFBRDADDR = (
        0xc0000000 | (144 if sys.platform.startswith("netbsd") else 32) << 16 | 0x6900 | number
        for number in (17, 33, 35))
HOLDS_PIDS = hasattr(os, "waitid")  # whether the system can say that a child has ended without reaping it
IP_PKTINFO = 8 if LINUX else None   # ip(7); Python has the name from 3.14.  It differs on macOS and NetBSD
PKTINFO = struct.Struct("@i4s4s")   # interface index, local address, destination address
PKTINFO6 = struct.Struct("@16sI")   # destination address, interface index: RFC 3542, 6.

Interface = collections.namedtuple("Interface", "index name flags address")
Target = collections.namedtuple("Target", "device address port host")       # host: its name, or "" for several hosts


def family_of(address):
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def is_address(text):
    """Whether it is an IPv4 or IPv6 address, and nothing more."""
    try:
        return bool(socket.inet_pton(family_of(text), text))
    except (OSError, ValueError):   # ValueError: a NUL, or what has no encoding
        return False


def is_multicast(address):
    return address[:2].lower() == "ff" if ":" in address else 224 <= int(address.partition(".")[0]) <= 239


def is_broadcast(address):
    """Whether a datagram to it goes to many hosts; a host's own IPv4 address hardly ends with 255."""
    return is_multicast(address) or address.endswith(".255")


def address_of(peer):
    """The IP address in a socket's address; a link-local one has its interface (RFC 4007).  Raises OSError."""
    address = peer[0].partition("%")[0]
    return address + "%" + socket.if_indextoname(peer[3]) if peer[3:] and peer[3] else address


def socket_address(address, port, index=0):
    """An address as a socket's methods take it; a link-local one gets its interface's index.  Raises OSError."""
    if ":" not in address:
        return address, port
    address, _, device = address.partition("%")
    return address, port, 0, socket.if_nametoindex(device) if device else index


def spelled(address, port):
    return ("[%s]:%d" if ":" in address else "%s:%d") % (address, port)


def ask_interface(sock, name, request):
    """An ioctl's answer about an interface: the 16 bytes after the name in struct ifreq.  Raises OSError."""
    return fcntl.ioctl(sock, request, struct.pack("256s", os.fsencode(name)))[16:32]


def interface_names():
    """{index: name} of the interfaces; empty if the system does not tell (a sandbox without AF_NETLINK)."""
    try:
        return dict(socket.if_nameindex())
    except OSError:
        return {}


def interfaces():
    """The interfaces that are up, with their IPv4 addresses; none if the system does not tell."""
    found = []
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:      # or no descriptor is free
        for index, name in interface_names().items():
            address = None
            with suppress(OSError):     # no IPv4 address
                address = socket.inet_ntoa(ask_interface(probe, name, SIOCGIFADDR)[4:8])
            with suppress(OSError):     # it went away meanwhile
                flags, = struct.unpack_from("H", ask_interface(probe, name, SIOCGIFFLAGS))
                if flags & IFF_UP:
                    found.append(Interface(index, name, flags, address))
    return found


def interface_of(address):
    """The (index, name) of the interface that has an address; (0, None) if no such interface is known."""
    if "%" in address:
        name = address.partition("%")[2]
        return socket.if_nametoindex(name), name
    rows = []
    with suppress(OSError), open("/proc/net/if_inet6") as table:        # proc(5): address, index, ..., name
        rows = [line.split() for line in table]
    known = [(int(row[1], 16), row[5]) for row in rows if bytes.fromhex(row[0]) == pack_address(address)]
    known += [(interface.index, interface.name) for interface in interfaces() if interface.address == address]
    return known[0] if known else (0, None)


def broadcast_address(name):
    """The broadcast address of an interface's own network.  Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return socket.inet_ntoa(ask_interface(probe, name, SIOCGIFBRDADDR)[4:8])


def tells_interfaces(sock):
    """Asks the system for each datagram's interface, in both directions.  Returns whether it can do that."""
    with suppress(OSError, TypeError):          # not Linux, or an emulation of it
        sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        return True
    return False


def parse_group(text, default_port):
    """The Targets of a list of [DEVICE:]ADDRESS[:PORT], with commas between them.

    An ADDRESS is an IPv4 address, an IPv6 address in brackets, a network of at most 1,024
    addresses, or a name, which stands for all of its addresses.  @FILE is a file of such
    lists.  Raises Fatal: 111 for a DEVICE that is not there and for a name server that does not
    answer, because both may change; else 100.
    """
    targets = []
    for item in text.split(","):
        if item.strip().startswith("@"):
            targets += parse_group_file(item.strip()[1:], default_port)
        else:
            targets += parse_target(item.strip(), text, default_port)
    if len(targets) > TARGETS_MAX:
        raise Fatal(EXIT_USAGE, "group %s: more than %d addresses" % (text, TARGETS_MAX))
    return targets


def read_list(path):
    """The lines of a file in UTF-8, without empty ones and comments, which begin with #.  Raises OSError."""
    with raising(lambda error: OSError(errno.EILSEQ, "is not UTF-8"), UnicodeDecodeError):
        text = read_text(path, GROUP_FILE_MAX).encode("latin-1").decode("utf-8-sig")
    return [line for line in (line.partition("#")[0].strip() for line in text.split("\n")) if line]


def parse_group_file(path, default_port):
    """The Targets of a file: a list on each line; a comment begins with #."""
    with or_fatal("group @%s" % path, EXIT_USAGE):
        lines = read_list(path)
    if any("@" in line for line in lines):
        raise Fatal(EXIT_USAGE, "group @%s: names another file: write addresses in it" % path)
    targets = [target for line in lines for target in parse_group(line, default_port)]
    if not targets:
        raise Fatal(EXIT_USAGE, "group @%s: no address in it" % path)
    return targets


def parse_target(item, text, port):
    """The Targets of one item of a group."""
    before, bracket, rest = item.partition("[")
    if bracket:
        address, closing, after = rest.partition("]")
        words = ([before[:-1]] if before else []) + [address] + ([after[1:]] if after else [])
        well_formed = closing and before[-1:] in ("", ":") and after[:1] in ("", ":") and ":" in address
    else:
        words, well_formed = item.split(":"), True
    if len(words) > 1 and words[-1].isdecimal():
        port = number_of(words.pop())
    device = words.pop(0) if len(words) > 1 else None
    possible = device is None or device and not is_address(device)
    if not well_formed or len(words) != 1 or not words[0] or not possible or not 0 < port < 65536:
        raise Fatal(EXIT_USAGE, "group %s: not [DEVICE:]ADDRESS[:PORT]%s"
                    % (text, ", IPv6 in brackets" if item.count(":") > 2 else ""))
    try:
        targets = [Target(device, address, port, "" if "/" in words[0] or is_broadcast(address) else words[0])
                   for address in resolve(words[0])]
        if device:
            find_device(device)     # last: a wrong address is permanent (100), but a device may come up (111)
        return targets
    except (OSError, UnicodeError, ValueError) as error:
        code, why = no_address(words[0], error)
        raise Fatal(code, "group %s: %s" % (text, why)) from None


class NoDevice(OSError):
    """There is no such interface now."""


def find_device(name):
    """The index of an interface.  Raises NoDevice."""
    # ValueError: a NUL in a file of addresses
    with raising(lambda error: NoDevice(errno.ENODEV, "no such device: %s" % name), (OSError, ValueError)):
        return socket.if_nametoindex(name)


def no_address(text, error):
    """Returns (exit code, reason) for a text that resolve() has refused; the code is 111 if another try may work."""
    if isinstance(error, NoDevice):
        return EXIT_TEMPORARY, error.strerror
    if isinstance(error, socket.gaierror):
        if error.errno == socket.EAI_AGAIN:
            return EXIT_TEMPORARY, "the name %s has no address now: %s" % (text, error.strerror)
        return EXIT_USAGE, "not an address, and the name %s has none: %s" % (text, error.strerror)
    if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
        return EXIT_USAGE, str(error)           # a wrong network
    return EXIT_USAGE, "not an address: %s" % (getattr(error, "strerror", None) or text)


def resolve(name):
    """The IP addresses of a name, network or address.  Raises OSError, UnicodeError, ValueError."""
    if "/" in name:
        network = ipaddress.ip_network(name, strict=False)
        if network.num_addresses > NETWORK_MAX:
            raise ValueError("%s has more than %d addresses" % (network, NETWORK_MAX))
        return [str(host) for host in network.hosts()] or [str(network.network_address)]
    if not name.strip("0123456789."):
        return [socket.inet_ntoa(socket.inet_pton(socket.AF_INET, name))]   # getaddrinfo costs 4 ms
    if ":" in name:
        address, percent, device = name.partition("%")
        if percent:
            find_device(device)
        return [socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, address)) + percent + device]
    return sorted({address_of(found[4]) for found in socket.getaddrinfo(name, None, 0, socket.SOCK_DGRAM)})


class Group:
    """The addresses in a text, or in CEXEC_GROUP.  A way is one copy of a datagram: its interface, address, port."""

    def __init__(self, text=None, default_port=PORT):
        named = next((name for name in ("CEXEC_GROUP", "GROUP") if os.environ.get(name)), None)
        self.text = text or os.environ.get(named or "", ALL_NETWORKS)
        try:
            self.targets = parse_group(self.text, default_port)
        except Fatal as error:
            source = "TARGET" if text else "from GROUP: set CEXEC_GROUP" if named == "GROUP" else "from CEXEC_GROUP"
            raise Fatal(error.code, "%s (%s)" % (error, source)) from None
        self.error = None           # why a way of the last send() failed
        self.chooses = bool(IP_PKTINFO)         # whether we can choose a datagram's interface

    def attend(self, loop):
        """Has a loop hear what its workers' starter says; only a RunGroup has one."""

    def families(self):
        """The address families of the targets, IPv4 first."""
        return sorted({family_of(target.address) for target in self.targets})

    def is_here(self):
        """Whether it reaches no other machine."""
        return all(target.address.startswith("127.") or target.address == "::1" for target in self.targets)

    def hosts(self):
        """Returns {name: addresses} of the hosts that it names one by one."""
        hosts = {}
        for target in self.targets:
            if target.host:
                hosts.setdefault(target.host, set()).add(target.address.partition("%")[0])
        return hosts

    def failed_hosts(self):
        """Returns the hosts of -s that do not serve."""
        return []

    def is_whole(self, workers):
        """Whether no other worker than these will answer; only a RunGroup knows that."""
        return False

    def may_have_crat(self):
        """Whether crat may listen to it: not to a RunGroup, whose public key nobody else has."""
        return True

    def ways(self):
        """Yields (interface index or 0, address, port) for every way."""
        for device, address, port, _ in self.targets:
            if device:
                try:
                    yield self.way_through(socket.if_nametoindex(device), device, address, port)
                except OSError as error:        # the device was removed
                    self.error = "%s: %s" % (device, error.strerror or error)
            elif address == ALL_NETWORKS or is_multicast(address):
                yield from self.every_interface(address, port)
            else:
                yield 0, address, port

    def way_through(self, index, name, address, port):
        """The way out of one interface.  Raises OSError.

        If we can't choose the interface, a broadcast goes to the broadcast address of its network,
        and everything else takes the system's routes.
        """
        if not self.chooses and ":" not in address:
            return 0, broadcast_address(name) if address == ALL_NETWORKS else address, port
        return index, address, port

    def every_interface(self, address, port):
        """Yields the ways of a broadcast or multicast: out of every interface, and to this machine itself."""
        wanted = IFF_MULTICAST if is_multicast(address) else IFF_BROADCAST
        known, ways = interfaces(), {}
        for interface in known:
            if not interface.address and ":" not in address:
                continue
            if interface.flags & wanted and not interface.flags & IFF_LOOPBACK:
                with suppress(OSError):         # it has just lost its address
                    ways[self.way_through(interface.index, interface.name, address, port)] = True
        if not known:
            yield 0, address, port
        yield from ways             # each once
        yield 0, "::1" if ":" in address else THIS_HOST, port       # listeners here hear us without any network

    def send(self, socks, data):
        """Sends a datagram by all ways, with {family: UDP socket}.  Returns the number of ways that worked."""
        sent, self.error, socks = 0, None, dict(socks)
        self.chooses = socket.AF_INET in socks and tells_interfaces(socks[socket.AF_INET])
        for way in self.ways():
            family = family_of(way[1])
            try:
                try:
                    send_through(socks[family], data, *way)
                except BlockingIOError:         # datagrams to hosts that do not exist fill this socket's buffer
                    socks[family] = open_udp(family)
                    send_through(socks[family], data, *way)
                sent += 1
            except OSError as error:
                self.error = error.strerror or str(error)
            except KeyError:
                self.error = "no IPv6 here" if family == socket.AF_INET6 else "no IPv4 here"
        return sent


def send_through(sock, data, index, address, port):
    """Sends one datagram, out of the interface with that index; index 0 leaves the choice to the system."""
    ancillary = []
    if index and ":" in address and hasattr(socket, "IPV6_PKTINFO"):
        ancillary = [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, PKTINFO6.pack(bytes(16), index))]
    elif index and ":" not in address:
        ancillary = [(socket.IPPROTO_IP, IP_PKTINFO, PKTINFO.pack(index, bytes(4), bytes(4)))]
    sock.sendmsg([data], ancillary, 0, socket_address(address, port, index))


def open_udp(family, address="", port=0, shared=False, broadcasts=True):
    """A UDP socket that does not block.  Raises OSError.

    shared: other sockets may have the same port.  broadcasts: it may send broadcasts; a socket
    for answers may not, because anybody can forge a return address.
    """
    sock = socket.socket(family, socket.SOCK_DGRAM)
    with on_failure(sock.close):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, broadcasts)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, MULTICAST_TTL)
        else:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, MULTICAST_TTL)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if not LINUX and hasattr(socket, "SO_REUSEPORT"):
                # On macOS and the BSDs this shares a port, and each socket hears a broadcast.  On Linux it
                # would give each unicast datagram to one of the sockets, and only one user's could share.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(socket_address(address, port) if address else ("", port))
    return sock


def open_speakers(address=None):
    """{family: UDP socket}; the socket of an address's family is bound to this address.  Raises OSError."""
    socks = {family_of(address): open_udp(family_of(address), address)} if address else {}
    for family in {socket.AF_INET, socket.AF_INET6} - set(socks):
        with suppress(OSError):     # a kernel without IPv6
            socks[family] = open_udp(family)
    return socks


def who_has(error, protocols, port):
    """A hint how to find who uses a port, if that is the error; protocols: "t" (TCP), "u" (UDP) or both."""
    if error.errno != errno.EADDRINUSE:
        return ""
    command = "ss -%sanp sport = :%d" % (protocols, port) if LINUX else "lsof -i :%d" % port
    return " (as root, %s shows by whom)" % command


def deliver(sock, handler, stranger=None):
    """Calls handler(Datagram, sender's address, ancillary data) for each datagram that waits at a UDP socket.

    At most 64: other descriptors get their turn.  One that is not well formed is dropped; stranger(address, an
    OtherVersion) is called for one of another protocol version.
    """
    for _ in range(64):
        try:
            data, ancillary, _, peer = sock.recvmsg(DATAGRAM_MAX + 1, socket.CMSG_SPACE(PKTINFO6.size))
            sender = address_of(peer)
        except OSError:
            return
        try:
            handler(Datagram(data), sender, ancillary)
        except ProtocolError as error:
            log.note("dropped a datagram from %s: %s", sender, error)
            if stranger and isinstance(error, OtherVersion):
                stranger(sender, error)


class Listener:
    """UDP sockets that hear a group on one port; other processes of this host may hear it too.

    They are bound to :: and to 0.0.0.0, which hears every broadcast; a socket bound to
    255.255.255.255 would miss broadcasts to a network's own address.  Only one socket of a host
    hears a unicast datagram, so its listener sends it on to the others once, to THIS_HOST.
    """

    def __init__(self, port, targets):
        self.port = port
        self.groups = [target for target in targets if is_multicast(target.address)]
        self.joined = {}            # target: the indexes of the interfaces on which it was joined
        try:
            self.socks = {socket.AF_INET: open_udp(socket.AF_INET, "", port, shared=True, broadcasts=False)}
            tells_interfaces(self.socks[socket.AF_INET])        # else hear() cannot tell unicast from broadcast
            if socket.has_ipv6:
                self.open_ipv6(required=any(":" in target.address for target in targets))
        except OSError as error:
            raise Fatal(EXIT_TEMPORARY, "cannot listen on UDP port %d: %s%s"
                        % (port, error.strerror, who_has(error, "u", port))) from None

    def open_ipv6(self, required):
        try:
            sock = self.socks[socket.AF_INET6] = open_udp(socket.AF_INET6, "", self.port, shared=True)
            if hasattr(socket, "IPV6_RECVPKTINFO"):
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        except OSError as error:    # a kernel without IPv6
            if required:
                raise
            log.note("does not listen by IPv6: %s", error.strerror)

    def join(self):
        """Joins the multicast groups on their devices, or on every interface.  Returns False if there is none."""
        for target in self.groups:
            try:
                present = {socket.if_nametoindex(target.device)} if target.device else {i.index for i in interfaces()}
            except OSError:
                present = set()     # the device is gone, and may come back
            before = self.joined.get(target, set())
            for index in present - before if present or target.device else {0} - before:
                self.join_on(index, target.address)
            self.joined[target] = present or {0}
        return bool(self.groups)

    def join_on(self, index, address):
        with noting("cannot join %s on interface %d", address, index):
            if ":" in address:
                member = PKTINFO6.pack(socket.inet_pton(socket.AF_INET6, address.partition("%")[0]), index)
                self.socks[socket.AF_INET6].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, member)
            else:
                member = struct.pack("@4s4si", socket.inet_aton(address), bytes(4), index)
                self.socks[socket.AF_INET].setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)

    def hear(self, handler, datagram, sender, ancillary):
        """Calls handler(datagram, its return address, interface index) for a datagram that has come."""
        index, unicast = arrival(ancillary)
        if unicast:
            self.pass_on(datagram, sender)
        handler(datagram, datagram.address or sender, index)

    def pass_on(self, datagram, sender):
        with noting("cannot pass on %s", datagram):
            copy = datagram.readdressed(datagram.address or sender, datagram.port, datagram.hops)
            with open_udp(socket.AF_INET) as sock:
                sock.sendto(copy, (THIS_HOST, self.port))

    def send(self, data, address, port):
        """Sends a datagram to one address.  Raises OSError."""
        if is_multicast(address):
            raise OSError(errno.EADDRNOTAVAIL, "not a host's address")
        if family_of(address) not in self.socks:
            raise OSError(errno.EAFNOSUPPORT, "no IPv6 here")
        self.socks[family_of(address)].sendto(data, socket_address(address, port))

    def close(self):
        self.groups = []
        for sock in self.socks.values():
            sock.close()


def arrival(ancillary):
    """Returns (interface index, whether it was unicast) of a datagram, from its ancillary data."""
    for level, kind, info in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO) and len(info) == PKTINFO.size:
            index, local, destination = PKTINFO.unpack(info)
            return index, local == destination and not is_multicast(socket.inet_ntoa(local))
        if level == socket.IPPROTO_IPV6 and len(info) == PKTINFO6.size:
            destination, index = PKTINFO6.unpack(info)
            return index, destination[0] != 0xff
    return 0, False


def open_listeners(group):
    """A Listener for each port of the group.  Raises Fatal (111)."""
    ports = sorted({target.port for target in group.targets})
    return [Listener(port, [t for t in group.targets if t.port == port]) for port in ports]


# ---------------------------------------------------------------------------
# The event loop
# ---------------------------------------------------------------------------

class Timer:
    def __init__(self, call):
        self.call = call

    def cancel(self):
        self.call = None


NO_TIMER = Timer(None)              # in place of a Timer: may be cancelled too


def new_selector():
    """A selector for descriptors of every kind.

    epoll refuses regular files and /dev/null.  macOS's poll refuses terminals and devices
    (poll(2), BUGS), and Python has no poll if it is broken: then it is select, which takes
    descriptors up to 1023.
    """
    broken = sys.platform == "darwin" or not hasattr(selectors, "PollSelector")
    return selectors.SelectSelector() if broken else selectors.PollSelector()


class Loop:
    """Waits, and calls a function when a descriptor is ready, a time has come or a signal has.

    A descriptor is registered only while somebody wants to read or write it: else the loop would spin.

    Every reader must bear to be called when there is nothing to read.  One turn asks the system
    once, and what is called first can close a descriptor, and open another with the same number.
    Only a descriptor that stays open as long as the loop runs is never another one.
    """

    def __init__(self, floor=0):
        self.floor = floor          # descriptors of our own keep to numbers from here up
        self.selector, self.watch = new_selector(), None
        self.readers, self.writers, self.leavers = {}, {}, {}
        self.timers, self.count = [], 0
        self.running = True

    def on_read(self, fd, call):
        """Calls call() whenever fd can be read; None ends that."""
        self._want(self.readers, fd, call)

    def on_write(self, fd, call):
        """Calls call() whenever fd can be written; None ends that."""
        self._want(self.writers, fd, call)

    def on_leave(self, fd, call):
        """Calls call() when a pipe's or socket's other end has no reader any more; None ends that.

        Only on Linux: an epoll without any events still reports errors (epoll_ctl(2)).
        """
        if call is None:
            if self.leavers.pop(fd, None):
                self.watch.unregister(fd)
        elif hasattr(select, "epoll"):
            if fd not in self.leavers:
                self._watch().register(fd, 0)
            self.leavers[fd] = call

    def _watch(self):
        if self.watch is None:
            with select.epoll() as epoll:
                self.watch = select.epoll.fromfd(lifted(epoll.fileno(), self.floor))
            self.on_read(self.watch.fileno(), self._readers_gone)
        return self.watch

    def _readers_gone(self):
        for fd, _ in self.watch.poll(0):
            if fd in self.leavers:
                self.leavers[fd]()

    def _want(self, calls, fd, call):
        before = fd in calls
        if call:
            calls[fd] = call
        else:
            calls.pop(fd, None)
        if before == (call is not None):
            return
        events = (selectors.EVENT_READ * (fd in self.readers)) | (selectors.EVENT_WRITE * (fd in self.writers))
        if not events:
            self.selector.unregister(fd)
        elif fd in self.selector.get_map():
            self.selector.modify(fd, events)
        else:
            self.selector.register(fd, events)

    def forget(self, fd):
        """To be called before fd is closed."""
        self.on_read(fd, None)
        self.on_write(fd, None)
        self.on_leave(fd, None)

    def after(self, seconds, call):
        """Calls call() once, so many seconds later, unless the Timer that this returns is cancelled."""
        timer = Timer(call)
        self.count += 1
        heapq.heappush(self.timers, (time.monotonic() + seconds, self.count, timer))
        return timer

    def turn(self):
        """Waits once, then calls: first for descriptors that are ready, then for timers that are due."""
        for key, events in self.selector.select(self._patience()):
            if events & selectors.EVENT_READ and key.fd in self.readers:
                self.readers[key.fd]()
            if events & selectors.EVENT_WRITE and key.fd in self.writers:
                self.writers[key.fd]()
        now = time.monotonic()
        while self.timers and self.timers[0][0] <= now:
            _, _, timer = heapq.heappop(self.timers)
            if timer.call:
                timer.call()

    def _patience(self):
        """Seconds until the next timer is due; None if there is none."""
        while self.timers and self.timers[0][2].call is None:
            heapq.heappop(self.timers)
        return max(0, self.timers[0][0] - time.monotonic()) if self.timers else None

    def run(self):
        """Turns until stop()."""
        while self.running:
            self.turn()

    def stop(self):
        self.running = False

    def above_floor(self, sock):
        """The socket, at a number from floor up: the lower numbers are for descriptors that are carried."""
        if sock.fileno() < self.floor:
            with sock:
                moved = socket.socket(sock.family, sock.type, sock.proto, fileno=lifted(sock.fileno(), self.floor))
                moved.settimeout(sock.gettimeout())
            return moved
        return sock

    def catch(self, numbers, call):
        """Calls call(number) from the loop for each of these signals, except ignored ones."""
        near, far = map(self.above_floor, socket.socketpair())
        far.setblocking(False)
        near.setblocking(False)
        self.wakeup = near, far     # a reference: garbage collection would close them
        signal.set_wakeup_fd(far.fileno())
        for number in numbers:
            ignored = signal.getsignal(number) is signal.SIG_IGN    # nohup does this, and a shell for its background
            if not ignored or number == signal.SIGCHLD:
                signal.signal(number, lambda number, frame: None)

        def caught():
            for number in near.recv(512):
                call(number)
        self.on_read(near.fileno(), caught)


# ---------------------------------------------------------------------------
# The return port, and the datagrams of a group: how they get to a handler
# ---------------------------------------------------------------------------

def hear_all(loop, listeners, handler, stranger=None):
    """Calls handler(datagram, address, interface index) for each datagram that the listeners hear.

    It ends with hear_no_more().  stranger is that of deliver().
    """
    for listener in listeners:
        for sock in listener.socks.values():
            hear = functools.partial(listener.hear, handler)
            loop.on_read(sock.fileno(), functools.partial(deliver, sock, hear, stranger))

        def rejoin(listener=listener):
            if listener.join():
                loop.after(REJOIN_SECONDS, rejoin)
        rejoin()


def hear_no_more(loop, listeners):
    for listener in listeners:
        for sock in listener.socks.values():
            loop.forget(sock.fileno())
        listener.close()


class ReturnPort:
    """The client's port for offers (TCP) and answers (UDP): one number for both, and for each address family.

    ports are tried in turn; [0] stands for any free port.  Raises Fatal (111).
    """

    def __init__(self, ports, loop, families, address=""):
        self.loop, self.udp, self.listeners, self.port, error = loop, {}, [], 0, None
        self.lack = None            # why the last connection could not be taken: lack_of()
        for port in ports * 16 if ports == [0] else ports:
            self.port = port
            try:
                for family in families:
                    self.open(family, address)
                return
            except OSError as caught:
                error = caught
                self.close()
        raise Fatal(EXIT_TEMPORARY, lack_of(error) or
                    "no free port to listen on: %s (see CEXEC_LISTEN_PORTS)%s"
                    % (error.strerror, who_has(error, "tu", self.port)))

    def open(self, family, address):
        try:
            listener = self.loop.above_floor(socket.socket(family, socket.SOCK_STREAM))
        except OSError:
            if not self.listeners:
                raise
            return                  # a kernel without IPv6; IPv4 is there already
        self.listeners.append(listener)
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(socket_address(address, self.port) if address else ("", self.port))
        listener.listen(128)
        self.port = listener.getsockname()[1]
        self.udp[family] = self.loop.above_floor(open_udp(family, address, self.port))

    def attend(self, hear, accept, stranger=None, spare=None):
        """Calls hear(datagram, sender's address) for each datagram, accept(socket, address) for each connection.

        stranger is that of deliver().  If no descriptor is left for a connection, spare() is called:
        it closes something, and returns whether it did.
        """
        for sock in self.udp.values():
            self.loop.on_read(sock.fileno(), functools.partial(
                deliver, sock, lambda datagram, sender, ancillary: hear(datagram, sender), stranger))
        for listener in self.listeners:
            self.loop.on_read(listener.fileno(), functools.partial(self.accept_all, listener, accept, spare))

    def accept_all(self, listener, accept, spare):
        """Accepts every connection that waits, in the order in which they came."""
        while True:
            try:
                sock, peer = listener.accept()
                sock, address = self.loop.above_floor(sock), address_of(peer)
            except OSError as error:
                lack = lack_of(error)
                if lack and spare and spare():
                    continue
                if lack:
                    self.lack = lack
                    log.once("cannot take a worker's connection: " + lack)
                return
            self.lack = None
            accept(sock, address)

    def close(self):
        for sock in list(self.udp.values()) + self.listeners:
            self.loop.forget(sock.fileno())
            sock.close()
        self.udp, self.listeners = {}, []


# ---------------------------------------------------------------------------
# The connection: TLS, a link of frames, and the channels of descriptors over it
# ---------------------------------------------------------------------------
#
# The way of a byte, and the states of a channel's streams, are drawn above class Stream.

def load_ssl():
    """Imports ssl when the first bytes need it.  Raises Fatal (111)."""
    global ssl
    if ssl is None:
        # ssl imports base64, and that re, for functions that we do not call: this is a third of the time that it takes.
        unused = sys.modules.setdefault("base64", Later("base64"))
        try:
            import ssl as module
        except ImportError as error:
            raise Fatal(EXIT_TEMPORARY, lack_of(error) or
                        "this Python has no ssl module (%s): use another python3%s" % (error, memory_hint())) from None
        finally:
            if isinstance(unused, Later):
                del sys.modules["base64"]
        ssl = module
    return ssl


@functools.lru_cache(None)          # all searches of a process have the same
def tls_context(key=None, text=None):
    """The TLS settings of a worker (with its Key) or a client (without).  Raises Fatal.

    The client checks the certificate by its hash alone: no clock, names or authorities.
    text is the key file's, where there is no file.
    """
    load_ssl()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if key else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.options |= ssl.OP_NO_COMPRESSION | getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    if hasattr(context, "minimum_version"):
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    else:                           # Python 3.6
        context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    if key and hasattr(context, "num_tickets"):
        context.num_tickets = 0     # nobody resumes, and a ticket is one more thing to send
    if key:
        pipes = [full_pipe(text.encode()), full_pipe(text.encode())] if text else []    # each is read once
        with closing(*pipes):
            try:
                context.load_cert_chain(*["/dev/fd/%d" % pipe for pipe in pipes] or [key.path])
            except (OSError, ValueError) as error:
                raise Fatal(EXIT_USAGE, "%s: invalid private key (%s)" % (key.path, error)) from None
    return context


def full_pipe(data):
    """The reading end of a pipe that holds data: for a function that wants a path, where there is no file.

    data must fit into the pipe, or this blocks: 4096 bytes where the user has many pipes, else 64 KiB; pipe(7).
    """
    reader, writer = os.pipe()
    with open(writer, "wb", 0) as file:
        file.write(data)
    return reader


class Tls:
    """One end of a TLS connection, without a socket: its bytes go in by feed() and come out by take()."""

    direct = False                  # whether the socket's bytes are the frames themselves: so none need a place between

    def __init__(self, context, server_side):
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.object = context.wrap_bio(self.incoming, self.outgoing, server_side=server_side)
        self.ready = False
        self.ended = False          # whether the peer has said that nothing more comes

    def feed(self, data):
        """Bytes that came from the peer."""
        self.incoming.write(data)

    def take(self):
        """Bytes to send to the peer: none if there are none."""
        return self.outgoing.read() if self.outgoing.pending else b""

    def has_more(self):
        """Whether read_into() may find something.  To ask is cheaper than the exception that says no."""
        return self.incoming.pending or self.object.pending() or self.ended

    def handshake(self):
        """Takes one more step.  Returns True when all are done.  Raises ProtocolError."""
        try:
            self.object.do_handshake()
            self.ready = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            raise ProtocolError("TLS: %s" % (error.reason or error)) from None
        return self.ready

    def fingerprint(self):
        """The SHA-256 of the peer's certificate, 32 bytes."""
        return hashlib.sha256(self.object.getpeercert(True) or b"").digest()

    def read_into(self, view):
        """The number of bytes now in view: 0 when more must be fed first.

        Raises ProtocolError on damage, EOFError when the peer has closed properly.
        """
        count, size = 0, len(view)
        try:
            while count < size and self.has_more():
                got = self.object.read(size - count, view[count:])
                self.ended = not got            # close_notify, as ssl.SSLObject tells it
                if self.ended:
                    break
                count += got
        except ssl.SSLWantReadError:
            pass
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            self.ended = True
        except ssl.SSLError as error:
            raise ProtocolError("TLS: %s" % (error.reason or error)) from None
        if self.ended and not count:
            raise EOFError
        return count

    def write(self, data):
        self.object.write(data)

    def close(self):
        """Says that nothing more will be sent."""
        with suppress(OSError, ValueError):     # the peer's own farewell has not come yet, or never will
            self.object.unwrap()


class Plain:
    """In the place of a Tls, on a connection that ssh protects: the bytes as they are."""

    ready = direct = True
    ended = False                   # here nobody says it

    def __init__(self):
        self.incoming, self.outgoing = 0, bytearray()

    def feed(self, data):
        self.incoming = len(data)   # they are where read_into() is to put them, as it is direct

    def take(self):
        data, self.outgoing = self.outgoing, bytearray()
        return data

    def has_more(self):
        return self.incoming

    def read_into(self, view):
        count, self.incoming = self.incoming, 0
        return count

    def write(self, data):
        self.outgoing += data

    def close(self):
        pass


def begins_tls(head):
    """Whether a connection's first six bytes, or as many as have come, may begin a TLS ClientHello: RFC 8446, 5.1."""
    return head[:1] in (b"", b"\x16") and head[1:2] in (b"", b"\x03") and head[5:6] in (b"", b"\x01")


class TwoPipes:
    """A descriptor to read and one to write, where a Link expects a socket.  close() closes both."""

    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    def fileno(self):
        return self.reader

    def recv_into(self, view):
        return os.readv(self.reader, [view])

    def send(self, data):
        return os.write(self.writer, data)

    def close(self):
        os.close(self.reader)
        os.close(self.writer)


class Delivery:
    """What the peer's host has acknowledged, as Linux tells it: tcp(7), TCP_INFO, and linux/tcp.h.

    It tells a host that has vanished from a process that is stopped.  The stopped process's host
    acknowledges data until its buffers are full, and then probes.  Other systems tell nothing.
    """

    INFO = struct.Struct("2xBB20xI28xI")            # retransmits, probes, unacked, last_ack_recv (ms ago)

    def __init__(self):
        self.sent = self.delivered = 0              # bytes: given to the socket, acknowledged by the last look
        self.waited = False                         # whether some bytes were not acknowledged at the last look
        self.answered_at = time.monotonic()         # the last look at which nothing waited for an answer

    def took(self, count):
        """The socket has taken so many bytes."""
        self.sent += count

    def look_for_progress(self, sock):
        """Looks what the host has acknowledged.  Returns whether bytes that waited at the last call are among that.

        Only bytes that had to wait count: a PING leaves at once, and proves nothing.
        """
        waiting, waited, before = unacknowledged(sock), self.waited, self.delivered
        self.delivered, self.waited = self.sent - waiting, waiting > 0
        return waited and self.delivered > before

    def unanswered(self, sock):
        """Seconds since the host should have acknowledged something and has not; 0 if that is not known.

        Call it now and then: a call that finds nothing to be acknowledged starts the time anew.
        """
        now = time.monotonic()
        try:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, self.INFO.size) if LINUX else bytes(60)
            retransmits, probes, unacknowledged, silence = self.INFO.unpack(info)
        except (OSError, struct.error):
            return 0.0
        if not (retransmits or probes or unacknowledged):
            self.answered_at = now
        return min(now - self.answered_at, silence / 1000)


class Link:
    """Frames over TLS, or a Plain, over one non-blocking socket, or over TwoPipes.

    The owner is told by link_ready(link), link_frame(link, kind, flags, channel,
    payload), link_writable(link) and, once, link_lost(link, reason, violation).
    Reading never waits for writing: a link that cannot send any more reads on.
    """

    full = FRAME_HEAD.size + FRAME_MAX              # a whole frame: by shorter reads each would come in two pieces
    at_once, little = 256, 4096     # after more frames than that in a turn, the next read takes only so many bytes
    received = memoryview(bytearray(full))          # between recv and TLS: shared by all
    late, late_most = 0.002, 64     # frames that are sent later: for how many seconds they wait, and how many, at most

    def __init__(self, loop, sock, tls, owner, stands_for=None):
        self.sock, self.tls = sock, tls
        self.stands_for = stands_for                # our (address, port) where the socket has none
        self.reader = FrameReader()
        self.appetite = self.full                   # bytes to read in the next turn
        self.waiting, self.holding = [], False      # frames that go with a later one; whether all wait for release()
        self.timer = NO_TIMER                       # of send_waiting()
        self.sending = memoryview(b"")              # what the socket has not taken yet
        self.closed = self.write_closed = False
        self.last_activity = time.monotonic()       # the last sign of life
        self.delivery = Delivery()
        if isinstance(sock, socket.socket):
            sock.setblocking(False)
            tune(sock)
        self.attach(loop, owner)

    def attach(self, loop, owner):
        """Has this loop drive it, for this owner."""
        self.loop, self.owner, self.sock = loop, owner, loop.above_floor(self.sock)
        self.writer = getattr(self.sock, "writer", self.sock.fileno())
        loop.on_read(self.sock.fileno(), self.readable)
        loop.on_write(self.writer, self.flush if self.sending else None)

    @property
    def here(self):
        """Returns (the address, the port) of this end."""
        if self.stands_for:
            return self.stands_for
        name = self.sock.getsockname()
        return address_of(name), name[1]

    @property
    def finished(self):
        """Whether the peer has called finish(): it has not crashed, and no network was cut."""
        return self.tls.ended

    @property
    def congested(self):
        """Whether the socket takes no more: a sender should wait for link_writable()."""
        return bool(self.sending)

    def undelivered(self):
        """The bytes that the peer's host has not acknowledged; where the system does not tell, what is still here."""
        return len(self.sending) + unacknowledged(self.sock)

    def start(self):
        """Begins the handshake: the client's side sends first."""
        self._digest()

    def readable(self):
        room = (self.reader.room() if self.tls.direct else self.received)[:self.appetite]
        try:
            count = self.sock.recv_into(room)
        except BlockingIOError:
            return
        except OSError as error:
            return self.fail(error.strerror)
        if count:
            self.last_activity = time.monotonic()
            self.tls.feed(room[:count])
            self._digest()
        else:
            self.fail("connection closed")

    def _digest(self):
        try:
            if not self.tls.ready:
                ready = self.tls.handshake()
                self.flush()
                if not ready:
                    return
                log.note("%s, %s", self.tls.object.version(), self.tls.object.cipher()[0])
                self.owner.link_ready(self)
            self._deliver()
        except EOFError:
            self.fail("connection closed")
        except ProtocolError as error:
            self.flush()            # the alert that TLS has made of it
            self.fail(str(error), violation=error)

    def _deliver(self):
        count = 0
        while not self.closed and self.tls.has_more():
            self.reader.filled(self.tls.read_into(self.reader.room()))
            for kind, flags, channel, payload in self.reader.frames():
                count += 1
                if log.verbose:
                    log.note("<- %s %d %s", kind, channel, len(payload) if kind is DATA else "")
                self.owner.link_frame(self, kind, flags, channel, payload)
                if self.closed:
                    return
        self.appetite = self.little if count > self.at_once else min(2 * self.appetite, self.full)

    def send(self, kind, channel=0, flags=0, later=False, **fields):
        """Sends a frame; later: with the next one, or in 2 ms."""
        self.send_frames([make_frame(kind, channel, flags, **fields)], later)

    def send_frames(self, frames, later=False):
        """Sends frames together: one packet costs the sender and the peer as much as several frames."""
        if log.verbose:
            for code, _, channel, _ in map(FRAME_HEAD.unpack_from, frames):
                log.note("-> %s %d", FRAMES[code], channel)
        self._write(b"".join(frames), later)

    def send_data(self, channel, buffer, size, later=False):
        """Sends size bytes as DATA.  buffer has room for a frame's head, and then the bytes."""
        if log.verbose:
            log.note("-> DATA %d %d", channel, size)
        FRAME_HEAD.pack_into(buffer, 0, DATA.code, 0, channel, size)
        self._write(buffer[:FRAME_HEAD.size + size], later)

    def hold(self):
        """Has all frames wait for release()."""
        self.holding = True

    def release(self):
        """Sends the frames since hold() together."""
        self.holding = False
        self.send_waiting()

    def send_waiting(self):
        """Sends what was to be sent later; between hold() and release() it still waits."""
        if self.waiting and not self.holding:
            self._write(b"")

    def _write(self, frame, later=False):
        if self.holding or later and len(self.waiting) < self.late_most:
            if later and self.timer is NO_TIMER:
                self.timer = self.loop.after(self.late, self.send_waiting)
            return self.waiting.append(bytes(frame))        # a copy: the buffer of send_data() is used again
        self.timer.cancel()
        self.timer = NO_TIMER
        if self.waiting:
            frame, self.waiting = b"".join([*self.waiting, frame]), []
        if self.closed or self.write_closed:
            return
        if self.tls.direct and not self.congested:
            frame = frame[self._hand_over(frame):]  # nothing waits: only what the pipe does not take is copied
        if frame:
            self.tls.write(frame)
            self.flush()

    def _hand_over(self, data):
        """Returns how many of the bytes the socket has taken, or nobody will ever take."""
        try:
            count = self.sock.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self.write_closed = True
            return len(data)
        self.delivery.took(count)
        return count

    def flush(self):
        """Sends what the socket takes now."""
        was_congested = self.congested
        while not self.closed:
            if not self.sending:
                self.sending = memoryview(self.tls.take())
                if not self.sending:
                    break
            count = self._hand_over(self.sending)
            if not count:
                break
            self.sending = self.sending[count:]
            if was_congested and not self.write_closed:         # what was queued moves: the peer's host takes it
                self.last_activity = time.monotonic()
        if self.closed:
            return
        if was_congested != self.congested:
            self.loop.on_write(self.writer, self.flush if self.congested else None)
            if was_congested:
                self.owner.link_writable(self)

    def silence(self):
        """Seconds since the last sign of life."""
        return time.monotonic() - self.last_activity

    def excuse_silence(self):
        """Counts the silence from now: we did not listen."""
        self.last_activity = time.monotonic()

    def check_delivery(self):
        """Counts it as a sign of life if the peer's host takes what was queued in the kernel."""
        if self.delivery.look_for_progress(self.sock):
            self.last_activity = time.monotonic()

    def check_host(self):
        """Fails if the peer's host has vanished: keepalive does not run while something is not acknowledged."""
        if self.delivery.unanswered(self.sock) > GONE_SECONDS:
            self.fail("nothing was acknowledged for %d s" % GONE_SECONDS)

    def fail(self, reason, violation=False):
        """Closes, and tells the owner why; violation is true, or the ProtocolError, if it is the peer's fault."""
        owner = self.owner
        if not self.closed:
            self.close()
            owner.link_lost(self, reason, violation)

    def close(self):
        if not self.closed:
            self.closed, self.sending = True, memoryview(b"")
            self.owner = None       # no cycle: what a connection held goes at once
            self.loop.forget(self.sock.fileno())
            self.loop.forget(self.writer)
            self.sock.close()

    def finish(self):
        """Says that nothing more will be sent; goes on reading."""
        self.tls.close()
        self.flush()
        self.write_closed = True
        with suppress(OSError):     # the peer has closed already
            self.sock.shutdown(socket.SHUT_WR)


def begin_connection(address, port):
    """Returns (a socket that connects, or None; what was wrong at once, or None); it is done when it can be written."""
    sock = None
    try:
        sock = socket.socket(family_of(address), socket.SOCK_STREAM)
        sock.setblocking(False)
        error = sock.connect_ex(socket_address(address, port))
    except OSError as caught:       # too many files; or an address of another host's making is none
        return sock, str(caught)
    return sock, None if error in (0, errno.EINPROGRESS) else os.strerror(error)


class Dial:
    """A connection that is being opened, with a deadline.

    Calls connected(socket, seconds left until the deadline) or failed(reason, unreached), once.
    The socket is the called one's from then on.  unreached is false if this process got no
    socket: that tells nothing about the peer.
    """

    def __init__(self, loop, address, port, seconds, connected, failed):
        self.loop, self.connected, self.failed = loop, connected, failed
        self.deadline = time.monotonic() + seconds
        self.sock, error = begin_connection(address, port)
        if error:                   # told from the loop: our caller does not have this object yet
            self.timer = loop.after(0, lambda: self.fail(error))
        else:
            self.timer = loop.after(seconds, lambda: self.fail("no connection in %g s" % seconds))
            loop.on_write(self.sock.fileno(), self.writable)

    def writable(self):
        error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            return self.fail(os.strerror(error))
        try:
            self.sock.getpeername()
        except OSError:             # poll has seen another socket, which had this number before
            return
        self.loop.forget(self.sock.fileno())
        sock, self.sock, connected = self.sock, None, self.connected
        self.close()
        connected(sock, max(0, self.deadline - time.monotonic()))

    def fail(self, reason):
        unreached, failed = self.sock is not None, self.failed
        self.close()
        failed(reason, unreached)

    def close(self):
        """Gives up.  A socket that was handed to connected() stays open."""
        self.timer.cancel()
        self.connected = self.failed = None         # no cycle: what they belong to goes at once
        if self.sock:
            self.loop.forget(self.sock.fileno())
            self.sock.close()
            self.sock = None


def queued(fd, request):
    """The number of bytes that an ioctl of termios tells; 0 where the system does not tell."""
    try:
        return struct.unpack("i", fcntl.ioctl(fd, getattr(termios, request), bytes(4)))[0]
    except (OSError, ValueError):   # or it is closed
        return 0


def unread(fd):
    """How many bytes wait in a pipe."""
    return queued(fd, "FIONREAD")


def unacknowledged(sock):
    """The bytes in a TCP socket's send queue (SIOCOUTQ, tcp(7))."""
    return queued(sock, "TIOCOUTQ")


def tune(sock):
    """Sends without delay, and finds a host that vanished while nothing is under way.

    TCP_USER_TIMEOUT would end stopped clients too.
    """
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):   # macOS calls the first TCP_KEEPALIVE; its default will do
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def in_foreground(terminal):
    """Whether a read of the terminal would not stop us: our group has it, or it does not control us."""
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return True


class End:
    """One open file at this host that a channel reads, writes, or both.

    polled is the descriptor to wait on, fd the one to use.  If other processes share the
    polled one, fd is the same file opened again, without blocking.  halves are "read", "write"
    or both; release() is called when both are done.
    """

    patient = False                 # to be written only when poll says so, PIPE_BUF at most
    terminal = False                # to be read only in the foreground, or it would stop us
    watched = False                 # whether poll tells that nobody will ever read the other end again
    typed = b""                     # what was read before, and is the first for read_into()

    def __init__(self, fd, polled, release, halves):
        self.fd, self.polled, self.release, self.halves = fd, polled, release, set(halves)

    def may_read(self):
        return not self.terminal or in_foreground(self.polled)

    def read_into(self, view):
        """The number of bytes read, 0 at the end of file.  Raises OSError."""
        return os.readv(self.fd, [view])

    def write(self, view):
        """The number of bytes written.  Raises OSError."""
        view = view[:select.PIPE_BUF] if self.patient else view
        return log.beside(self.fd, view) if self.terminal else os.write(self.fd, view)

    def done(self, half, whole=True):
        """Nothing more will be read, or written.  A socket is shut so, unless the peer has closed both (whole)."""
        self.halves.discard(half)
        if not self.halves:
            self.release()
        elif not whole:
            self.shut_down(half)

    def shut_down(self, half):
        """Closes one direction of two."""

    def hung_up(self):
        """Whether the process at the other end has closed both directions; False where there is no poll to tell."""
        if not hasattr(select, "poll"):
            return False
        poll = select.poll()
        poll.register(self.polled, 0)
        return any(events & select.POLLHUP for _, events in poll.poll(0))


class PipeEnd(End):
    """Our end of a pipe of which another process has the other end."""

    watched = True


class FileEnd(End):
    """A regular file as input, read at an offset of our own: other processes may use the common one."""

    def __init__(self, fd, offset):
        super().__init__(fd, fd, lambda: None, ["read"])
        self.offset = offset

    def read_into(self, view):
        if hasattr(os, "preadv"):               # Python 3.7
            count = os.preadv(self.fd, [view], self.offset)
        else:
            data = os.pread(self.fd, len(view), self.offset)
            count = len(data)
            view[:count] = data
        self.offset += count
        return count


class SocketEnd(End):
    """A stream socket: used without blocking, whatever its flags say."""

    watched = True

    def __init__(self, fd, polled, release, halves):
        super().__init__(fd, polled, release, halves)
        self.sock = socket.socket(fileno=os.dup(fd))
        os.set_inheritable(self.sock.fileno(), False)

    def read_into(self, view):
        return self.sock.recv_into(view, 0, socket.MSG_DONTWAIT)

    def write(self, view):
        return self.sock.send(view, socket.MSG_DONTWAIT)

    def shut_down(self, half):
        with suppress(OSError):     # the peer was faster
            self.sock.shutdown(socket.SHUT_RD if half == "read" else socket.SHUT_WR)

    def done(self, half, whole=True):
        super().done(half, whole)
        if not self.halves:
            self.sock.close()


class ReplayBuffer:
    """What a job has read from inputs that cannot be rewound.  Another run reads it again.

    limit bounds the bytes of all channels together.  Once it is passed, nothing is kept any more.
    """

    def __init__(self, limit=HELD_MAX):
        self.room, self.overflowed = limit, False
        self.parts = collections.defaultdict(bytearray)         # channel: all that was read of it
        self.replayed = collections.Counter()                   # channel: how much of that this run has got

    def read_into(self, channel, view):
        """Copies bytes of the channel that this run has not got yet into view.  Returns their number."""
        part = memoryview(self.parts[channel])[self.replayed[channel]:][:len(view)]
        view[:len(part)] = part
        self.replayed[channel] += len(part)
        return len(part)

    def keep(self, channel, view):
        """Adds what was read for the first time."""
        self.room -= len(view)
        if self.room >= 0:
            self.parts[channel] += view
            self.replayed[channel] += len(view)
        else:
            self.overflowed = True
            self.parts.clear()

    def rewind(self):
        """Another run begins: it gets everything from the beginning."""
        self.replayed.clear()


class Backlog:
    """Bytes that wait to be written, first in first out.  Neither add() nor drop() moves what is there.

    They are in pieces, each filled before the next begins.  A piece that was written is used again: to take
    and free so much memory, over and over, would cost a page fault for each 4 KiB.
    """

    def __init__(self):
        self.pieces = collections.deque()           # of FRAME_MAX each; the last ones may be empty
        self.start = self.end = 0                   # where the bytes are, counted from the first piece on

    def __len__(self):
        return self.end - self.start

    def __bytes__(self):
        return b"".join(self.pieces)[self.start:self.end]

    def add(self, data):
        while data:
            number, offset = divmod(self.end, FRAME_MAX)
            if number == len(self.pieces):
                self.pieces.append(memoryview(bytearray(FRAME_MAX)))
            part = data[:FRAME_MAX - offset]
            self.pieces[number][offset:offset + len(part)] = part
            self.end += len(part)
            data = data[len(part):]

    def first(self):
        """A view of the oldest bytes, as many as are in one piece."""
        return self.pieces[0][self.start:self.end] if self.pieces else memoryview(b"")

    def drop(self, count):
        """Forgets so many of the bytes that first() shows."""
        self.start += count
        if self.start == self.end:
            self.start = self.end = 0
        elif self.start == FRAME_MAX:
            self.pieces.rotate(-1)
            self.start, self.end = 0, self.end - FRAME_MAX


class Stateful:
    """An object with a state.  LAW: which states may follow each state; _set() refuses all others."""

    __slots__ = ()
    LAW = {}

    def __repr__(self):
        return type(self).__name__.lower()

    def _set(self, state):
        if state not in self.LAW[self.state]:
            raise RuntimeError("%r: from %s to %s is not in the drawing" % (self, self.state, state))
        log.note("%r %s -> %s", self, self.state, state)
        self.state = state


# The way of a byte: for an input the client reads and the worker writes, for an output it is the other way.
#
#   reads    End.read_into <-- Source.readable --> Link.send_data --> Tls --> socket
#   writes   Link.readable --> link_frame --> Carrier.rcvd_data --> Sink.rcvd_data --> End.write
#                                             what that does not take: Sink.queue --> Sink.writable
#   credit   Sink --CREDIT--> Carrier.rcvd_credit --> Source.rcvd_credit
#
# link_frame is the Carrier's; at the worker Supervisor.link_frame calls it.  The Ends come from Job.open_ends or
# Task.ends, from Command.make_ends, and for archives from JobFiles.carry.  Carrier.carry makes a Channel of each.
#
# A channel joins an End to its peer at the other host.  For each half of the End it has a stream: a
# Source, a Sink, or both.  A stream has a state, which only _set() changes; it refuses what is not
# drawn here.
#
#   Source (reads the End, sends DATA)
#
#     OPEN --close_soon()--> DRAINING --nothing there, or the budget is spent: send EOF--> ENDED
#      '--discard()--'----> DISCARDING
#     from these three:  end of file: send EOF--> ENDED      rcvd SHUT--> SHUTDOWN      stop()--> STOPPED
#     SHUT that comes when its writer has gone: send what there is credit for, at most one DATA, and EOF--> ENDED
#
#   Sink (gets DATA, writes the End)
#
#     OPEN --rcvd EOF--> DRAINING --all is written--> ENDED
#     from these two:    write failed, or the reader has gone: send SHUT--> SHUTDOWN    stop()--> STOPPED
#
# stop() is for a job that is over, or that another run does again: the peer is told nothing, and
# the End stays as it is.

OPEN, DRAINING, DISCARDING = "OPEN", "DRAINING", "DISCARDING"
ENDED, SHUTDOWN, STOPPED = "ENDED", "SHUTDOWN", "STOPPED"

# The last is macOS's, of a socket that is just being torn down.
READER_GONE = errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EPROTOTYPE


class Stream(Stateful):
    """One half of a channel.  watch(call) has the Loop call when there is something to do; None ends that."""

    def __init__(self, carrier, number, end):
        self.carrier, self.number, self.end = carrier, number, end
        self.loop, self.link = carrier.loop, carrier.link
        self.state = OPEN

    def __repr__(self):
        return "%s %d" % (type(self).__name__, self.number)

    def is_live(self):
        """Whether its end is still to come."""
        return bool(self.LAW[self.state])

    def stop(self):
        """Does nothing more, and tells the peer nothing."""
        if self.is_live():
            self._set(STOPPED)
            self.watch(None)

    def _leave(self, half, whole):
        """The half is at its end; whole: so is the other."""
        self.watch(None)
        self.end.done(half, whole)
        self.carrier.stream_ended()


class Pausable:
    """Reads what may be a terminal.  In the background that would stop us: so it pauses, and calls refresh() later."""

    paused = False

    def pause(self):
        """For a second: nobody tells when a terminal's foreground becomes ours."""
        if not self.paused:
            self.paused = True
            self.loop.after(1.0, self.resume)

    def resume(self):
        self.paused = False
        self.refresh()


class Source(Pausable, Stream):
    """Reads its End while there is credit and the link has room; sends DATA, then EOF."""

    LAW = {OPEN: (DRAINING, DISCARDING, ENDED, SHUTDOWN, STOPPED), DRAINING: (DISCARDING, ENDED, SHUTDOWN, STOPPED),
           DISCARDING: (ENDED, SHUTDOWN, STOPPED), ENDED: (), SHUTDOWN: (), STOPPED: ()}

    def __init__(self, carrier, number, end, replay=None):
        super().__init__(carrier, number, end)
        self.credit, self.sent = carrier.window, 0
        self.replay = replay        # the ReplayBuffer of a job that may be run again
        self.drain_budget = None    # while DRAINING: the most bytes that are still to be read

    def watch(self, call):
        self.loop.on_read(self.end.polled, call)

    def refresh(self):
        """Waits for input exactly when there is something to do with it."""
        if not self.is_live():
            return                  # the End may be closed, and another file have its number
        if self.replay:
            self._replay_held()
        while (self.state is DRAINING or self.end.typed) and self._wanted() and self.end.may_read():
            self.readable()
        self.watch(self.readable if self._wanted() else None)

    def begin(self):
        """Sends a small file and its end at once, and the first frame of a large one: a file can always be read."""
        while self.sent < FRAME_MAX and self._wanted():
            self.readable()

    def is_held_open(self):
        """Whether all is read, and the end of file has not come."""
        return self.is_live() and self._wanted() and not unread(self.end.polled)

    def _wanted(self):
        if self.state is OPEN or self.state is DRAINING:
            return self.credit and not self.link.congested and not self.link.closed
        return self.state is DISCARDING

    def _room(self):
        """Where to put what is read, behind room for a frame's head."""
        size = FRAME_MAX if self.state is DISCARDING else min(FRAME_MAX, self.credit)
        if self.state is DRAINING:
            size = min(size, self.drain_budget)
        return self.carrier.buffer[FRAME_HEAD.size:][:size]

    def _send(self, count):
        self.sent += count
        self.credit -= count
        self.link.send_data(self.number, self.carrier.buffer, count, later=count <= self.carrier.small)

    def _replay_held(self):
        """Sends what is held of the run before."""
        while self._wanted():
            count = self.replay.read_into(self.number, self._room())
            if not count:
                break
            self._send(count)

    def readable(self):
        if not self.end.may_read():
            self.watch(None)
            return self.pause()
        room = self._room()
        try:
            count = self.end.read_into(room)
        except BlockingIOError:
            if self.state is DRAINING:
                self.finish()
            return
        except OSError as error:
            pty_ended = error.errno == errno.EIO and self.end.terminal
            if error.errno != errno.ECONNRESET and not pty_ended:           # a reset is a socket's end too
                self.carrier.local_error(self.number, error)
            count = 0
        if not count:
            return self.finish()
        if self.state is DISCARDING:
            return
        if self.replay:
            self.replay.keep(self.number, room[:count])
        self._send(count)
        if self.state is DRAINING:
            self.drain_budget -= count
            if not self.drain_budget:
                return self.finish()
        if not self._wanted():
            self.refresh()

    def discard(self):
        """Goes on reading and throws away what it reads: so the writer can end in its own way."""
        if self.state in (OPEN, DRAINING):
            self._set(DISCARDING)
            self.refresh()

    def close_soon(self):
        """Reads what is there already, no more than a pipe holds, and is then at its end."""
        if self.state is OPEN:
            self._set(DRAINING)
            self.drain_budget = PIPE_SIZE
            self.refresh()

    def finish(self):
        """The end of file: tells the peer."""
        if self.is_live():
            self._set(ENDED)
            whole, channel = len(self.end.halves) < 2 or self.end.hung_up(), self.carrier.channels[self.number]
            self.link.send(EOF, self.number, FLAG_WHOLE if whole else 0, later=self.carrier.small >= 0)
            self._leave("read", whole)          # the job may be over with that: EXIT goes, and its channels are closed
            if whole:
                channel.break_off()

    def leave_alone(self):
        """Tells the peer an end of file at once.  Others are to read the End: a socket stays open both ways."""
        self._set(ENDED)
        self.link.send(EOF, self.number, FLAG_WHOLE if self.end.halves == {"read"} else 0)
        self._leave("read", True)

    def rcvd_credit(self, count):
        self.credit += count
        if self.credit > self.carrier.window:
            raise ProtocolError("more credit than a window")
        self.refresh()

    def rcvd_shut(self, whole):
        """Nobody reads at the other end."""
        if self.is_live() and self.end.hung_up():
            # Whoever wrote here has ended, and cannot be told any more: so tell the peer that there was more.
            if self.credit:
                self.readable()
            self.finish()
        elif self.is_live():
            self._set(SHUTDOWN)
            self._leave("read", whole)


class Sink(Stream):
    """Writes to its End what came as DATA, and gives credit for what it has written."""

    LAW = {OPEN: (DRAINING, SHUTDOWN, STOPPED), DRAINING: (ENDED, SHUTDOWN, STOPPED),
           ENDED: (), SHUTDOWN: (), STOPPED: ()}

    def __init__(self, carrier, number, end):
        super().__init__(carrier, number, end)
        self.queue = Backlog()      # what the End has not taken: at most a window, in however many frames
        self.received = self.written = self.owed = 0
        self.allowed = carrier.window           # bytes that the peer may still send
        self.ended = False          # whether the peer has sent EOF
        self.whole = False          # whether the peer has closed both halves
        if self.end.watched:
            self.loop.on_leave(self.end.polled, self.reader_left)

    def watch(self, call):
        self.loop.on_write(self.end.polled, call)
        if call is None and not self.is_live():
            self.loop.on_leave(self.end.polled, None)

    def rcvd_data(self, view):
        self.allowed -= len(view)
        if self.allowed < 0 or self.state in (DRAINING, ENDED):
            raise ProtocolError("DATA without credit or after EOF on channel %d" % self.number)
        self.received += len(view)
        if self.state is not OPEN:
            return                  # the peer has sent it before our SHUT came there, and could not know
        if not self.queue and not self.end.patient:
            view = view[self._write(view):]
        if view and self.state is OPEN:
            self.queue.add(view)
            self.watch(self.writable)

    def writable(self):
        with self.queue.first() as view:
            count = self._write(view)
        self.queue.drop(count)
        if not self.queue and self.is_live():
            self.watch(None)
            self._drained()

    def _write(self, view):
        """The number of bytes written now, with credit for them."""
        try:
            count = self.end.write(view)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno not in READER_GONE:
                self.carrier.local_error(self.number, error)
            self.break_off(self.end.halves == {"write"} or self.end.hung_up())
            return 0
        self.written += count
        self.owed += count
        if self.owed >= self.carrier.window // 4 and self.state is OPEN:
            self.link.send(CREDIT, self.number, bytes=self.owed)
            self.allowed += self.owed
            self.owed = 0
        return count

    def rcvd_eof(self, whole):
        if self.state in (DRAINING, ENDED):
            raise ProtocolError("EOF twice on channel %d" % self.number)
        self.ended = True
        if self.state is OPEN:
            self._set(DRAINING)
            self.whole = whole
            self._drained()

    def _drained(self):
        if self.state is DRAINING and not self.queue:
            self._set(ENDED)
            self._leave("write", self.whole)

    def break_off(self, whole):
        """Nobody reads here any more: tells the peer."""
        if self.is_live():
            self._set(SHUTDOWN)
            self.queue = Backlog()
            self.link.send(SHUT, self.number, FLAG_WHOLE if whole else 0)
            self._leave("write", whole)

    def reader_left(self):
        """The reader has left while nothing was to be written: a writer at the peer may wait for just that."""
        self.break_off(self.end.halves == {"write"})

    def has_cut(self):
        """Whether bytes found no reader, and whoever wrote them at the peer had ended before our SHUT could tell it."""
        return self.state is SHUTDOWN and self.ended and self.written < self.received

    def has_all(self, sent):
        """Whether everything has come, if the peer tells that it has sent so many bytes (None: it tells nothing)."""
        return self.state is SHUTDOWN or self.state is not OPEN and self.received == sent


class Channel:
    """An End of a job here, and the streams of its halves: source and sink, None for a half that it lacks."""

    source = sink = None

    def __init__(self, carrier, number, end, replay=None):
        self.end = end
        if "read" in end.halves:
            self.source = Source(carrier, number, end, replay)
        if "write" in end.halves:
            self.sink = Sink(carrier, number, end)

    @property
    def sent(self):
        """Bytes that were read here and sent."""
        return self.source.sent if self.source else 0

    @property
    def received(self):
        """Bytes that came from the peer."""
        return self.sink.received if self.sink else 0

    @property
    def written(self):
        """Bytes that were written here."""
        return self.sink.written if self.sink else 0

    def is_reading(self):
        """Whether the end of what is read here is still to come."""
        return self.source is not None and self.source.is_live()

    def is_writing(self):
        """Whether the end of what is written here is still to come."""
        return self.sink is not None and self.sink.is_live()

    def break_off(self):
        """Whoever writes what is read here has closed both halves: nobody reads here any more either."""
        if self.sink:
            self.sink.break_off(True)

    def stop(self):
        """The job is over here.  The End stays: another run may get it."""
        for stream in filter(None, (self.source, self.sink)):
            stream.stop()

    def close(self):
        """The job is over, and nobody needs the End any more."""
        self.stop()
        for half in list(self.end.halves):
            self.end.done(half)


class Carrier:
    """A job's channels over a link: what the client and the supervisor have in common.

    The method rcvd_NAME(flags, channel, payload) handles a frame.  A frame without a method
    breaks the protocol.  local_error(channel, error) is called when a descriptor here has failed in a
    way that is no end of file, and stream_ended() when a stream has come to its end.
    """

    buffer = memoryview(bytearray(FRAME_HEAD.size + FRAME_MAX))     # between a read and TLS: shared by all
    window = WINDOW                 # bytes of credit for each channel and direction
    small = -1                      # DATA of at most so many bytes, and EOF, wait for the next frame; -1: they do not

    def __init__(self, loop, link):
        self.loop, self.link = loop, link
        self.channels = {}          # by their numbers

    def carry(self, number, end, replay=None):
        """A new Channel for the halves that the End has; replay keeps what is read."""
        self.channels[number] = Channel(self, number, end, replay)
        return self.channels[number]

    def sources(self):
        """The streams that read here."""
        return [channel.source for channel in self.channels.values() if channel.source]

    def refresh(self):
        for source in self.sources():
            source.refresh()

    def is_writing(self):
        """Whether the end of any output is still to come."""
        return any(channel.is_writing() for channel in self.channels.values())

    def stop_sources(self):
        """The peer wants no more input."""
        for source in self.sources():
            source.stop()

    def stop_channels(self):
        """The job is over here; see Channel.stop()."""
        for channel in self.channels.values():
            channel.stop()

    def close_channels(self):
        """Nobody needs their Ends any more; see Channel.close()."""
        for channel in self.channels.values():
            channel.close()

    def link_frame(self, link, kind, flags, channel, payload):
        method = handler_of(self, kind)
        if method is None:
            raise ProtocolError("%s out of place" % kind)
        method(flags, channel, payload)

    def link_writable(self, link):
        self.refresh()

    def _stream(self, number, half):
        stream = getattr(self.channels.get(number), half, None)
        if stream is None:
            raise ProtocolError("no channel %d" % number)
        return stream

    def rcvd_data(self, flags, channel, payload):
        self._stream(channel, "sink").rcvd_data(payload)

    def rcvd_eof(self, flags, channel, payload):
        self._stream(channel, "sink").rcvd_eof(bool(flags & FLAG_WHOLE))

    def rcvd_shut(self, flags, channel, payload):
        self._stream(channel, "source").rcvd_shut(bool(flags & FLAG_WHOLE))

    def rcvd_credit(self, flags, channel, payload):
        self._stream(channel, "source").rcvd_credit(payload.bytes)


# ---------------------------------------------------------------------------
# Descriptors and processes of this host
# ---------------------------------------------------------------------------

F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", 1031 if LINUX else None)      # fcntl(2)
O_PATH = getattr(os, "O_PATH", 0)
PTY_MASTER = {"linux": 0x80045430, "darwin": 0x40807453, "freebsd": 0x4004740f}     # ioctls that only a pty's
                                    # master accepts: TIOCGPTN of ioctl_tty(2) and pts(4), macOS's TIOCPTYGNAME
PROC_FD = "/proc/self/fd/%d"        # opens the file again; /dev/fd of macOS and the BSDs only duplicates the
                                    # descriptor, and then O_NONBLOCK would change for every process that has it

STANDARD = ("standard input", "standard output", "standard error")
PIPE, FILE, SOCKET, TERMINAL, DEVICE = "pipe", "file", "socket", "terminal", "device"
LOOKS = 3                           # looks in turn that must find no process of a command that is being ended
BURST = 100                         # looks in a row once KILL_SECONDS are over


class Inherited:
    """A descriptor that this process has inherited from its parent, and that a channel can carry."""

    def __init__(self, number):
        self.number = number
        self.flags = fcntl.fcntl(number, fcntl.F_GETFL)         # O_APPEND and the like
        self.stat = os.fstat(number)
        self.kind = self._kind()
        access = self.flags & os.O_ACCMODE
        if self.kind != SOCKET and access == os.O_RDWR:
            # A channel carries one direction of it: 0 is an input, every other number an output.  In the other
            # direction we would take what belongs to other processes, such as the tokens of make in a FIFO.
            access = os.O_WRONLY if number else os.O_RDONLY
        self.readable, self.writable = access != os.O_WRONLY, access != os.O_RDONLY

    def _kind(self):
        """PIPE, FILE, SOCKET, TERMINAL or DEVICE; None if no channel can carry it."""
        mode = self.stat.st_mode
        if self.flags & O_PATH and O_PATH:
            return None
        if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
            return FILE if self._has_offset() else DEVICE
        if stat.S_ISFIFO(mode):
            return PIPE
        if stat.S_ISSOCK(mode):
            return SOCKET if self._is_stream() else None
        if stat.S_ISCHR(mode) and os.isatty(self.number):
            return None if self._is_pty_master() else TERMINAL
        return DEVICE if stat.S_ISCHR(mode) else None

    def _has_offset(self):
        """Whether pread() and lseek() work, as with every regular file but some in /proc."""
        with suppress(OSError):
            os.lseek(self.number, 0, os.SEEK_CUR)
            if self.flags & os.O_ACCMODE != os.O_WRONLY:
                os.pread(self.number, 0, 0)
            return True
        return False

    def _is_stream(self):
        """Whether this socket carries a stream: it is not for datagrams, and does not listen."""
        with socket.socket(fileno=os.dup(self.number)) as sock:
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) != socket.SOCK_STREAM:
                return False
            # SO_ACCEPTCONN is 30 on Linux, 2 on macOS and the BSDs; some of these refuse the question
            try:
                return not sock.getsockopt(socket.SOL_SOCKET, getattr(socket, "SO_ACCEPTCONN", 30 if LINUX else 2))
            except OSError:
                return True

    def _is_pty_master(self):
        request = PTY_MASTER.get(sys.platform.rstrip("0123456789"))
        try:
            return request is not None and bool(fcntl.ioctl(self.number, request, bytes(128)))
        except OSError:
            return False

    def use_both_ways(self):
        self.readable = self.writable = True

    def same_as(self, other):
        """Whether both numbers are the same open file, or the same end of a pipe.

        If so, one channel carries both, and the command too gets one open file at both numbers.
        """
        if (self.readable, self.writable) != (other.readable, other.writable):
            return False            # a terminal that is open as an input and as an output
        if not os.path.samestat(self.stat, other.stat):
            return False
        if self.kind == PIPE:       # even if it was opened twice: two channels would compete for the same bytes
            return True
        return self.flags == other.flags and (self.kind != FILE or shares_offset(self.number, other.number))

    def is_nameless_pipe(self):
        """Whether it was made by pipe(2).  Of a FIFO, other processes can still open the reading end."""
        reader, writer = os.pipe()
        with closing(reader, writer):
            return self.kind == PIPE and self.stat.st_dev == os.fstat(reader).st_dev

    def is_other_end_of(self, output):
        """Whether bytes that are written to that output can be read here."""
        if self.kind == PIPE:
            return output.kind == PIPE and self.stat.st_ino and os.path.samestat(self.stat, output.stat)
        return self.kind == output.kind == SOCKET and are_peers(self.number, output.number)


F_DUPFD_QUERY = 1027                # fcntl(2), Linux 6.10: are two descriptors the same open file?
F_SETOWN, F_GETOWN = fcntl.F_SETOWN, fcntl.F_GETOWN


def shares_offset(one, two):
    """Whether two descriptors of a regular file are one open file, and so have a common offset."""
    # To move the offset and look would disturb other processes, which may write there now.
    if LINUX:
        with suppress(OSError):     # an older kernel
            return fcntl.fcntl(one, F_DUPFD_QUERY, two) == 1
    # So we set the owner of the first one (F_SETOWN), which regular files do not use, and look whether the
    # second one has this owner too.  Other cexec processes may do the same with this file at the same
    # time.  But each sets only its own id, or 0: so "no" is sure if our id is still at the first one.
    with suppress(OSError):         # macOS and the BSDs refuse this for a regular file
        for _ in range(100):
            fcntl.fcntl(one, F_SETOWN, os.getpid())
            shared = fcntl.fcntl(two, F_GETOWN) == os.getpid()
            settled = shared or fcntl.fcntl(one, F_GETOWN) == os.getpid()
            fcntl.fcntl(one, F_SETOWN, 0)
            if settled:
                return shared
    # There we change O_NONBLOCK for a moment, which has no effect on a regular file.
    flags = fcntl.fcntl(one, fcntl.F_GETFL)
    fcntl.fcntl(one, fcntl.F_SETFL, flags ^ os.O_NONBLOCK)
    shared = (fcntl.fcntl(two, fcntl.F_GETFL) ^ flags) & os.O_NONBLOCK != 0
    fcntl.fcntl(one, fcntl.F_SETFL, flags)
    return shared


SOCK_DIAG = struct.Struct("@IHHII BBHIIIII")    # nlmsghdr, unix_diag_req: sock_diag(7)
SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, UDIAG_SHOW_PEER, UNIX_DIAG_PEER, ANY_STATE = 20, 1, 4, 2, 0xffffffff


def peer_inode(inode):
    """The inode of the socket that a Unix socket is connected to; None if the system does not tell."""
    request = SOCK_DIAG.pack(SOCK_DIAG.size, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 0, 0, socket.AF_UNIX, 0, 0,
                             ANY_STATE, inode, UDIAG_SHOW_PEER, ANY_STATE, ANY_STATE)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as sock:      # NETLINK_SOCK_DIAG
            sock.settimeout(1.0)
            sock.send(request)
            answer = sock.recv(8192)
    except (OSError, AttributeError):
        return None                 # this kernel has no unix_diag, or the system has no netlink
    offset = 32                      # attributes begin here, after nlmsghdr and unix_diag_msg
    while struct.unpack_from("@H", answer, 4) == (SOCK_DIAG_BY_FAMILY,) and offset + 8 <= len(answer):
        length, kind, value = struct.unpack_from("@HHI", answer, offset)
        if kind == UNIX_DIAG_PEER:
            return value
        offset += max(4, length + 3 & ~3)
    return None


def are_peers(one, two):
    """Whether two stream sockets are the ends of one connection."""
    with socket.socket(fileno=os.dup(one)) as first, socket.socket(fileno=os.dup(two)) as second:
        try:
            here, there = first.getsockname(), second.getsockname()
            if not isinstance(here, tuple):     # a Unix socket: Python 3.6 calls every family AF_INET
                return peer_inode(os.fstat(one).st_ino) == os.fstat(two).st_ino
            return here == second.getpeername() and first.getpeername() == there
        except OSError:
            return False            # one of them is not connected


def jobserver_numbers():
    """The descriptors of make's jobserver, which MAKEFLAGS names (GNU make, "POSIX Jobserver")."""
    numbers = set()
    for word in os.environ.get("MAKEFLAGS", "").split():
        name, _, value = word.partition("=")
        if name in ("--jobserver-auth", "--jobserver-fds"):
            numbers.update(int(number) for number in value.split(",") if number.isdecimal())
    return numbers


def enlarge(pipe):
    """Asks for a larger buffer for a pipe, with room for more than a frame."""
    if F_SETPIPE_SZ:
        with suppress(OSError):     # the user has too many large pipes: pipe(7)
            fcntl.fcntl(pipe, F_SETPIPE_SZ, PIPE_SIZE)


def large_pipe(floor):
    """Returns (reader, writer) of a large pipe, both numbers from floor up.  Raises OSError."""
    reader, writer = lifted_pair(*os.pipe(), floor)
    enlarge(writer)
    return reader, writer


def is_open(number):
    try:
        return fcntl.fcntl(number, fcntl.F_GETFD) >= 0
    except OSError:
        return False


def make_room(floor, count):
    """Raises the limit, so that so many more descriptors can be open from floor up.  Raises Fatal (111)."""
    needed = floor
    while count:
        count -= not is_open(needed)            # some may be inherited, even above the limit
        needed += 1
    soft = os.sysconf("SC_OPEN_MAX")            # -1: no limit
    if 0 <= soft < needed:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        except (OSError, ValueError):
            raise Fatal(EXIT_TEMPORARY, "no more than %d descriptors are allowed, %d are needed (see ulimit -n)"
                        % (soft, needed)) from None


def is_controlling(fd):
    """Whether it is our controlling terminal, no matter by which name it was opened."""
    try:
        return os.tcgetpgrp(fd) > 0
    except OSError:
        return False


def join_terminal(channels):
    """Puts the descriptors of the first terminal into one channel, for both ways.  Returns its members, or None."""
    # A shell gives us the same terminal at 0, 1 and 2, but not always as one open file: after 2>/dev/tty
    # the terminal is open twice, by two names.  The command gets one terminal at all these numbers.
    # So which descriptors are the same terminal?  Those with the same device number (st_rdev).  But
    # /dev/tty has a device number of its own; it means the controlling terminal of this session.
    # So two descriptors are also the same terminal if both are the controlling one.
    # A second terminal, which a user may have opened at 3, keeps its own channel.
    found = [members for members in channels.values() if members[0].kind == TERMINAL]
    if not found:
        return None
    first = found[0][0]
    joined = []
    for members in found:
        item = members[0]
        if item.stat.st_rdev == first.stat.st_rdev or is_controlling(item.number) and is_controlling(first.number):
            joined += channels.pop(item.number)
    for item in joined:
        item.use_both_ways()
    joined.sort(key=lambda item: item.number)
    channels[joined[0].number] = joined
    return joined


def inherited_channels(limit):
    """{channel: [Inherited, ...]} for the descriptors below limit that are carried.

    Descriptors in one list are one open file; the channel's number is the lowest of theirs.
    """
    channels, left_out = {}, jobserver_numbers()
    for number in range(limit):
        try:
            if number in left_out or fcntl.fcntl(number, fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
                continue
        except OSError:
            continue                # closed
        item = Inherited(number)
        if item.kind is None:
            log.note("descriptor %d is not carried", number)
            continue
        for members in channels.values():
            if item.same_as(members[0]):
                members.append(item)
                break
        else:
            channels[number] = [item]
    return without_own_outputs(channels)


def without_own_outputs(channels):
    """The channels without inputs from 3 up at which the command's own outputs would be read.

    Our parent has forgotten to close such a reading end.  A local command would not read there, but we
    would, and the output's real reader would miss those bytes.
    """
    outputs = [members[0] for members in channels.values() if members[0].writable]

    def is_own(item):
        return item.readable and item.number > 2 and any(item.is_other_end_of(output) for output in outputs)
    return {channel: members for channel, members in channels.items() if not is_own(members[0])}


def replace_with_null(numbers):
    """Closes descriptors, and opens /dev/null at their numbers, so that no file of ours gets them."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in numbers:
        os.dup2(null, number, False)
    os.close(null)


def opened_again(item):
    """A descriptor of its own, which does not block, for an inherited pipe or terminal.  Raises OSError."""
    flags = item.flags & os.O_ACCMODE | os.O_NONBLOCK | os.O_NOCTTY
    try:
        return os.open(PROC_FD % item.number, flags)
    except OSError:
        if item.kind != TERMINAL:
            raise
        return os.open(os.ttyname(item.number), flags)


def local_end(members, halves, floor, signalled=None):
    """An End for one channel of inherited descriptors."""
    # We must not block, but must not set O_NONBLOCK either: it belongs to the open file, which other
    # processes share.  So a pipe or a terminal is opened again, a terminal by its name if /proc does not
    # help.  If that fails, SharedEnd writes only when poll() says that there is room.  A regular file
    # never blocks, and opened again it would begin at offset 0: so it is used as it is.
    item = members[0]
    number, numbers = item.number, [member.number for member in members]
    if item.kind == FILE and item.readable:
        return FileEnd(number, os.lseek(number, 0, os.SEEK_CUR))
    if item.kind == FILE:
        return End(number, number, lambda: None, halves)
    if item.kind == SOCKET:
        return SocketEnd(number, number, lambda: replace_with_null(numbers), halves)
    if item.kind == DEVICE:
        return End(number, number, lambda: replace_with_null(numbers), halves)
    if item.kind == TERMINAL and len(halves) == 2:
        return open_terminal(number, floor, signalled)
    try:
        fd = lifted_away(opened_again(item), floor)
    except OSError:                 # it belongs to another user
        return SharedEnd(item, number, lambda: replace_with_null(numbers), halves)
    if item.kind == PIPE and halves == ["read"]:
        enlarge(fd)                 # with 64 KiB it would be slower by a fifth
    return SharedEnd(item, fd, lambda: (replace_with_null(numbers), os.close(fd)), halves)


class SharedEnd(End):
    """A pipe or a terminal that other processes may have open too."""

    def __init__(self, item, fd, release, halves):
        super().__init__(fd, item.number, release, halves)
        self.patient = fd == item.number        # it could not be opened again, so a write may block
        self.terminal, self.watched = item.kind == TERMINAL, item.is_nameless_pipe()


def of_termios(error):
    """The OSError for a termios.error, which is none."""
    return OSError(*error.args)


class Writer:
    """Bytes for an End whose reader may be slow: those that it has not taken wait here."""

    def __init__(self, loop, end):
        self.loop, self.end, self.pending = loop, end, Backlog()

    def add(self, data):
        self.pending.add(data)
        self.loop.on_write(self.end.polled, self.writable)

    def writable(self):
        """Writes as much as the reader takes now.  Returns how many bytes."""
        count = 0
        with self.pending.first() as view:
            try:
                count = self.end.write(view)
            except BlockingIOError:
                pass
            except OSError as error:
                self.failed(error)
        self.pending.drop(count)
        if not self.pending:
            self.loop.on_write(self.end.polled, None)
        return count

    def failed(self, error):
        """The reader has gone, as its owner will see: drops the pending bytes."""
        self.pending = Backlog()

    def drain(self):
        """Writes the pending bytes, as long as the reader takes some."""
        while self.pending and self.writable():
            pass


# How a terminal's size gets to the command: TerminalEnd.size() goes in JOB, and in a RESIZE when the job begins,
# after each WINCH, and after a stop (Run.take_terminal, Run.signalled_at_terminal).  The worker's Command gives it
# to set_terminal_size(), in make_terminal() and rcvd_resize().

class TerminalEnd(End):
    """A terminal that an applet controls, from take() until restore() or the end of this process.

    cexec -t makes it raw: every key is a byte for the command, except the escapes of ssh at the
    beginning of a line.  signalled(number) is called for the escape that hangs up.
    """

    terminal = True
    HELP = "\r\nafter Enter: ~. hang up, ~^Z suspend cexec, ~~ a tilde, ~? this help\r\n"

    def __init__(self, fd, number, signalled=None):
        super().__init__(fd, number, self.restore, ["read", "write"])
        self.patient = fd == number             # it could not be opened again, so a write may block
        self.saved = None           # while it is taken: the modes that restore() sets again
        self.typed = b""            # before it was raw
        self.at = "start"           # where we are in the line: at its "start"; after a "tilde" there, which is
                                    # held back; or "within" it
        self.signalled = signalled

    def size(self):
        """Its lines and columns, as the fields of RESIZE; 0 if they are not known."""
        try:
            columns, lines = os.get_terminal_size(self.fd)
        except OSError:
            lines = columns = 0
        return {"lines": lines, "columns": columns}

    def take(self, raw=True):
        """Makes it raw, or only without echo and line mode.  False if we may not.  Raises OSError.

        In the background this process stops itself and returns False: call this again after CONT.
        """
        if not self.may_read():
            os.kill(0, signal.SIGTTOU)          # tcsetattr would stop us too, but inside a call that misses TERM
            return False
        with raising(of_termios, termios.error):
            self.saved = self.saved or termios.tcgetattr(self.fd)
            if raw:
                self.keep_lines()
            (tty.setraw if raw else tty.setcbreak)(self.fd, termios.TCSANOW)
        log.on_raw_terminal(raw)
        return True

    def keep_lines(self):
        """Keeps what was typed while the terminal had lines: raw mode makes a NUL of each ^D there."""
        modes = termios.tcgetattr(self.fd)
        if not modes[3] & termios.ICANON or not hasattr(select, "poll"):
            return
        none, end = bytes([os.fpathconf(self.fd, "PC_VDISABLE")]), modes[6][termios.VEOF]
        ends = {b"\n", modes[6][termios.VEOL]} - {none}
        # From now on ^D is a byte like others.  So none is lost between the last line here and raw mode.
        modes[6][termios.VEOF] = none
        termios.tcsetattr(self.fd, termios.TCSANOW, modes)
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        while len(self.typed) < FRAME_MAX and [found for _, found in poll.poll(0)] == [select.POLLIN]:
            line = os.read(self.fd, FRAME_MAX)
            self.typed += line if line[-1:] in ends else line + end

    def restore(self):
        """Sets its old modes again, unless a shell or another job has the terminal by now."""
        saved, self.saved = self.saved, None
        log.on_raw_terminal(False)
        if saved and self.may_read():
            try:
                termios.tcsetattr(self.fd, termios.TCSANOW, saved)
            except termios.error as error:
                log.note("the terminal stays as it is: %s", error.args[1])

    def read_into(self, view):
        size = len(view) - (self.at == "tilde")
        if not size:                # no room for the tilde and another byte: send the tilde, it is no escape
            self.at, view[0] = "within", ord("~")
            return 1
        typed, self.typed = self.typed[:size], self.typed[size:]
        typed = typed or os.read(self.fd, size)
        sent = self.without_escapes(typed)
        if typed and not sent:
            raise BlockingIOError
        view[:len(sent)] = sent
        return len(sent)

    def without_escapes(self, typed):
        """The bytes for the command; obeys the escapes in the others."""
        sent = bytearray()
        for code in typed:
            if self.at == "tilde" and self.escape(code):
                self.at = "start"
                continue
            if self.at == "tilde" and code != ord("~"):
                sent += b"~"
            elif self.at == "start" and code == ord("~"):
                self.at = "tilde"
                continue
            sent.append(code)
            self.at = "start" if code in b"\r\n" else "within"
        return sent

    def escape(self, code):
        """Obeys an escape.  Returns False if there is none with this key."""
        if code == ord("."):
            self.signalled(signal.SIGHUP)
        elif code == ord("Z") - 64:
            os.kill(0, signal.SIGTSTP)          # us, and the other processes of our pipeline
        elif code == ord("?"):
            os.write(self.fd, self.HELP.encode())
        else:
            return False
        return True


def open_terminal(number, floor, signalled=None):
    """A TerminalEnd for a descriptor that is a terminal, which is opened again if we may."""
    try:
        fd = lifted_away(os.open(PROC_FD % number, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY), floor)
    except OSError:                 # it belongs to another user: after su(1)
        fd = number
    return TerminalEnd(fd, number, signalled)


# The modes that are carried to the command's terminal: the index in tcgetattr's list, and names of termios(3)
TERMINAL_MODES = (
    (0, "BRKINT ISTRIP INLCR IGNCR ICRNL IXON IXANY IXOFF IMAXBEL IUTF8"), (1, "OPOST ONLCR OCRNL"),
    (3, "ISIG ICANON IEXTEN ECHO ECHOE ECHOK ECHONL ECHOCTL ECHOKE NOFLSH TOSTOP"),
    (6, "VINTR VQUIT VERASE VKILL VEOF VEOL VSTART VSTOP VSUSP VREPRINT VWERASE VLNEXT"))


def known_modes():
    """Yields (name, index in the list, bit or index of the character) for each mode that this system has."""
    for index, names in TERMINAL_MODES:
        for name in names.split():
            bit = getattr(termios, name, 0x4000 if name == "IUTF8" else None)   # termbits.h: Python has no name for it
            if bit is not None:
                yield name, index, bit


def terminal_modes(fd):
    """The modes of a terminal as ["NAME=N", ...]; N is a character's code, or 0 or 1.  [] if it has hung up."""
    try:
        now = termios.tcgetattr(fd)
    except termios.error:
        return []
    return ["%s=%d" % (name, ord(now[6][bit]) if index == 6 else bool(now[index] & bit))
            for name, index, bit in known_modes()]


def set_terminal_modes(fd, modes):
    """Gives a terminal the modes from another's terminal_modes(), except those that this system does not have."""
    now, wanted = termios.tcgetattr(fd), dict(mode.split("=") for mode in modes)
    for name, index, bit in known_modes():
        value = int(wanted.get(name, -1))
        if index == 6 and value >= 0:
            now[6][bit] = bytes([value])
        elif value > 0:
            now[index] |= bit
        elif value == 0:
            now[index] &= ~bit
    with raising(of_termios, termios.error):
        termios.tcsetattr(fd, termios.TCSANOW, now)


def set_terminal_size(fd, lines, columns):
    """Sets a terminal's size; if it changes, the system sends WINCH to its foreground process group."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))


class PtyEnd(End):
    """The master of the command's terminal, at the worker: both its directions end at once."""

    def hung_up(self):
        return True


def ended(pid):
    """A child's returncode, as in subprocess: its exit code, or minus a signal; None while it runs.

    The child stays a zombie: so no other process, session or process group gets its number before it
    is reaped.  If there is no waitid(2) (macOS before Python 3.13), this reaps it.
    """
    if not HOLDS_PIDS:
        found, status = os.waitpid(pid, os.WNOHANG)
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        return code if found else None
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def killing_stopped(work):
    """Returns what work() returns.  A child that is stopped meanwhile gets KILL, within a second."""
    def look(number, frame):
        try:
            child = os.waitid(os.P_ALL, 0, os.WSTOPPED | os.WNOHANG) if HOLDS_PIDS else None
        except ChildProcessError:
            return
        if child:
            os.kill(child.si_pid, signal.SIGKILL)
    old = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
    try:
        return work()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def session_members(sessions):
    """Yields (pid, process group) of the sessions' processes, the newest first, without the first session's leader.

    Raises OSError if there is no /proc.
    """
    names = os.listdir("/proc")
    if "self" not in names:
        raise FileNotFoundError(errno.ENOENT, "no /proc")
    for name in reversed(names):    # the names are in order; the newest pid may fork again and end at once
        if name.isdigit() and int(name) != sessions[0]:
            try:
                if os.getsid(int(name)) in sessions:        # 50 times as fast as its file in /proc
                    yield int(name), os.getpgid(int(name))
            except OSError:
                pass                # it has just ended


def is_running(pid):
    """Whether a process is there and is no zombie.  Raises OSError where there is no /proc."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] != b"Z"
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return False


def signal_all(kill, target, numbers):
    """Sends these signals to a process or a group.  Returns False if there is none."""
    try:
        for number in numbers:
            kill(target, number)
        return True
    except OSError:
        return False


def signal_sessions(sessions, group, told, late):
    """Signals every process of the sessions, except the first session's leader.  Returns whether there was one.

    Each process gets HUP, TERM and CONT once.  told has those that got them: this is called again
    and again, because new processes may have been forked.  When it is late, each whole process group
    gets KILL, so that no process escapes by a fork at this moment.  Without /proc only the command's
    process group is signalled.
    """
    first, found = (signal.SIGHUP, signal.SIGTERM, signal.SIGCONT), False
    try:
        # Signal each one at once: a moment later its pid may belong to another process.
        for member, its_group in session_members(sessions):
            if late and its_group != sessions[0]:       # sessions[0] may be our own group
                signal_all(os.killpg, its_group, [signal.SIGKILL])
            else:
                signal_all(os.kill, member, (signal.SIGKILL,) if late else (0,) if member in told else first)
            found |= is_running(member)
            told.add(member)
    except OSError:
        if group and late:
            signal_all(os.killpg, group, [signal.SIGKILL])      # not "found": its zombie leader always is
        elif group:
            found = signal_all(os.killpg, group, [0] if group in told else first)
            told.add(group)
    return found


def end_sessions(loop, sessions, group, over):
    """Ends the processes in the supervisor's session, and in the command's own session if it has one.

    They get HUP, TERM and CONT, and KILL 5 s later.  Calls over() when no process is left.  group is
    the command's process group; its leader is not reaped yet (see ended()).  If it is, group is None.
    """
    # A process that forks and ends again and again can escape one look through /proc.  So several looks
    # in turn must find nothing, and in the end the command's process group gets KILL in any case.
    deadline, told = time.monotonic() + KILL_SECONDS, set()

    def look(tries=LOOKS):
        late = time.monotonic() > deadline
        # A process that forks and ends at once lives for a millisecond: many looks in a row meet one of them.
        if all(signal_sessions(sessions, group, told, late) for _ in range(BURST if late else 1)):
            loop.after(0.05, look)
        elif tries > 1:
            loop.after(0.01, lambda: look(tries - 1))
        else:
            if group:
                signal_all(os.killpg, group, [signal.SIGKILL])
            over()
    look()


# A file is written under another name in the same directory, and gets its own name only when it is whole.
# commit() does that for keys.  For the outputs of a batch, Disk.store() and then Task.commit() do, see Batch.store.
# For the results of -g see Files.

def commit(file, part, path, replace=True):
    """Gives an open file its name: renames it from part to path, once all of it is on the disk.  Raises OSError.

    Without replace it raises FileExistsError if there is another file of that name.
    """
    file.flush()
    await_disk(os.dup(file.fileno()))
    if not replace:
        give_free_name(part, path)
    if replace or os.path.lexists(part):
        os.rename(part, path)


def await_disk(fd):
    """Waits until a file is on the disk.  fd is closed: another descriptor than the one that may hold a lock.

    Raises OSError.
    """
    try:
        os.fsync(fd)
    finally:
        os.close(fd)                # NFS reports some errors only at a close


def give_free_name(part, path):
    """Gives the file at part the name path, but never replaces another file, as rename(2) would.  Raises OSError.

    If the file system has no hard links (FAT, some network file systems), this only makes an
    empty file at path, and the caller must rename.
    """
    try:
        os.link(part, path)
        os.unlink(part)
    except FileExistsError:
        raise
    except OSError:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def drop_part(part):
    """Removes a file that did not get its name, if it is there."""
    with suppress(OSError):
        os.unlink(part)


# The number of keyctl(2), which Python does not know, by machine and size of a pointer
KEYCTL = {("x86_64", 8): 250, ("x86_64", 4): 288, ("i686", 4): 288, ("aarch64", 8): 219, ("aarch64", 4): 311,
          ("armv7l", 4): 311, ("riscv64", 8): 219, ("ppc64le", 8): 271, ("s390x", 8): 280}
KEYCTL_JOIN_SESSION_KEYRING = 1


def keyring_joiner():
    """A function that gives this process a new session keyring (keyrings(7)), or does nothing if it cannot.

    Call this before the fork, and the function after it: ctypes takes long to import.
    """
    number = KEYCTL.get((os.uname().machine, struct.calcsize("P"))) if LINUX else None
    if number is None:
        return lambda: None
    try:
        import ctypes
        syscall = ctypes.CDLL(None).syscall
    except (ImportError, OSError, AttributeError):      # a Python without ctypes, a C library without syscall(2)
        return lambda: None
    return lambda: syscall(ctypes.c_long(number), ctypes.c_long(KEYCTL_JOIN_SESSION_KEYRING), None)


def processors():
    """The number of CPUs that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        return os.cpu_count() or 1


def system_load():
    """Returns (1-minute load average, processes runnable now besides this one)."""
    average, runnable = 0.0, 0
    with suppress(AttributeError, OSError):     # Android's C library has no getloadavg
        average = os.getloadavg()[0]
    with suppress(OSError, ValueError, IndexError), open("/proc/loadavg", "rb") as file:
        runnable = int(file.read().split()[3].partition(b"/")[0]) - 1
    return average, runnable


# ---------------------------------------------------------------------------
# Files: what goes into a job's directory, and what comes out of it
# ---------------------------------------------------------------------------
#
# Two channels carry archives.  FILES_IN takes the files of cexec -i to the worker, before the
# command starts.  FILES_OUT brings the files of -g to the client, after the command has ended
# with 0.  At each end a child process (a Helper) writes or reads the archive, so that a slow
# disk stops nothing else; at the worker it runs as the command's user.
#
# An archive is a tar file in GNU's format (tarfile's GNU_FORMAT) with regular files and
# directories only, all with relative names; a file with holes has the type S.  Its last member
# is the directory ".", and nothing comes after it: so a reader knows that the archive is whole.
#
# The results of -g get their names so:
#
#   RemoteRun.judge_files, after EXIT --> JobFiles.approve --a byte--> receive, in a Helper --> commit_all
#   before the first one gets its name:   JobFiles.read_question <--their names-- ask_parent
#       '--a byte; in a batch only if Names.claim finds no other job that reads or writes them--> commit_all goes on

WHOLE = b"."                        # the last member
BLOCK = 512                         # tar(5): bytes of a member's head; its data is padded to a multiple of this
PATH_MAX = 4096                     # a name has fewer bytes
PIECE = 1024 * 1024                 # bytes of a file read or written at a time
SPARSE_AT = 386                     # where in the head of a file with holes (GNU's type S) the table of its data is
ARCHIVE_NAMES = 256 * 1024 * 1024   # bytes of memory for the names in an archive that is unpacked; else a few bytes
                                    # from a peer, "a/a/a/a/...", would make any number of directories
PIECES_MAX = 10000                  # pieces of data in a file with holes; those of one with more are sent as zeros


def naming(name):
    """with naming(name): an OSError in the block gets the name of the file, bytes; not one of the pipe to a peer."""
    return raising(lambda error: error if isinstance(error, BrokenPipeError) else
                   OSError(error.errno, error.strerror, name))


def error_text(error, name=None):
    """Returns the text of an error; that of an OSError with its file, if this has another name than the job."""
    file, text = getattr(error, "filename", None), getattr(error, "strerror", None) or str(error)
    return "%s: %s" % (os.fsdecode(file), text) if file and file != name else text


def tree(path, name, wanted=lambda name: True):
    """Yields (path, name), both bytes, of a file, or of a directory and everything in it.

    A directory comes before its entries; "." itself does not come.  Links to directories are not
    followed.  Raises OSError if a wanted directory can't be read.
    """
    todo = [(path, name)]
    while todo:
        path, name = todo.pop()
        if name != WHOLE and wanted(name):
            yield path, name
        if os.path.isdir(path) and (name == WHOLE or not os.path.islink(path)):
            try:
                inside = sorted(os.listdir(path), reverse=True)
            except OSError:
                if name == WHOLE or wanted(name):
                    raise
                continue
            todo += [(entry if path == WHOLE else os.path.join(path, entry),
                      entry if name == WHOLE else name + b"/" + entry) for entry in inside]


def pack_files(writer, entries):
    """Writes an archive of the entries, (path, name), to a descriptor.  Raises OSError."""
    with open(writer, "wb", PIECE) as out:
        for path, name in entries:
            with naming(path):
                pack_member(out, path, name)
        out.write(member_head(WHOLE, stat.S_IFDIR | 0o700, 0, 0))


def member_head(name, mode, size, seconds, pieces=None):
    """Returns a member's head; that of a file with holes has its pieces: see data_pieces()."""
    info = tarfile.TarInfo(name.decode("latin-1"))      # each byte is one character of latin-1
    info.type = tarfile.DIRTYPE if stat.S_ISDIR(mode) else tarfile.REGTYPE
    info.mode, info.size, info.mtime = mode & 0o777, size, int(seconds // 1)
    if pieces is None:
        return info.tobuf(tarfile.GNU_FORMAT, "latin-1", "strict")
    if not pieces or sum(pieces[-1]) < size:
        pieces = [*pieces, (size, 0)]           # without it GNU tar would leave out the hole at the end
    info.type, info.size = tarfile.GNUTYPE_SPARSE, sum(count for _, count in pieces)
    data = info.tobuf(tarfile.GNU_FORMAT, "latin-1", "strict")
    rows = [tarfile.itn(number, 12, tarfile.GNU_FORMAT) for piece in pieces for number in piece]
    rows += [bytes(12)] * (8 - len(rows) if len(rows) < 8 else -(len(rows) - 8) % 42)
    more = [b"".join(rows[at:at + 42]) for at in range(8, len(rows), 42)]
    head = bytearray(data[-BLOCK:])
    head[SPARSE_AT:SPARSE_AT + 109] = b"".join(rows[:8]) + bytes([bool(more)]) + tarfile.itn(
        size, 12, tarfile.GNU_FORMAT)
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return data[:-BLOCK] + head + b"".join(
        (block + bytes([number < len(more)])).ljust(BLOCK, b"\0") for number, block in enumerate(more, 1))


def data_pieces(fd, size):
    """Returns [(offset, count), ...] of a file's data between its holes; None if it has none, or too many."""
    pieces, end = [], 0
    try:
        while end < size and len(pieces) < PIECES_MAX:
            begin = min(size, os.lseek(fd, end, os.SEEK_DATA))
            end = min(size, os.lseek(fd, begin, os.SEEK_HOLE))
            pieces.append((begin, end - begin))
    except OSError as error:
        if error.errno != errno.ENXIO:          # the rest is a hole; others: the disk does not tell
            return None
        end = size
    finally:
        os.lseek(fd, 0, os.SEEK_SET)
    return None if end < size or pieces == [(0, size)] else pieces


def pack_member(out, path, name):
    """Writes a member.  Raises OSError if it is no regular file or directory, or if the file changes meanwhile."""
    with closing(os.open(path, os.O_RDONLY | os.O_NONBLOCK)) as fd:         # it may be a FIFO
        before = os.fstat(fd)
        if stat.S_ISREG(before.st_mode):
            holes = before.st_blocks * 512 < before.st_size and hasattr(os, "SEEK_DATA")
            pieces = data_pieces(fd, before.st_size) if holes else None
            out.write(member_head(name, before.st_mode, before.st_size, before.st_mtime, pieces))
            pack_data(out, fd, before, [(0, before.st_size)] if pieces is None else pieces)
        elif not stat.S_ISDIR(before.st_mode):
            raise OSError(errno.EINVAL, "neither a regular file nor a directory")
        elif os.path.islink(path):
            raise OSError(errno.ELOOP, "a link to a directory")
        else:
            out.write(member_head(name, before.st_mode, 0, before.st_mtime))


def pack_data(out, fd, before, pieces):
    missing = total = sum(count for _, count in pieces)
    for offset, count in pieces:
        os.lseek(fd, offset, os.SEEK_SET)
        while count:
            data = os.read(fd, min(count, PIECE))
            if not data:
                break
            out.write(data)
            count -= len(data)
            missing -= len(data)
    after = os.fstat(fd)
    if missing or (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise OSError(errno.EBUSY, "changed while it was read")
    out.write(bytes(-total % BLOCK))


def archive_members(file):
    """Yields (name, TarInfo) of an archive's members; the caller reads a member's data before it goes on.

    Raises ProtocolError unless the archive is whole, and has only regular files and directories
    with relative names.  tarfile's own reader would accept anything, and use any amount of memory.
    """
    name = None
    while True:
        head = file.read(BLOCK)
        try:
            info = tarfile.TarInfo.frombuf(head, "latin-1", "strict")
        except tarfile.TarError:
            raise ProtocolError("the archive is cut short" if len(head) < BLOCK else "no archive") from None
        if info.type == tarfile.GNUTYPE_LONGNAME and name is None and 0 < info.size <= PATH_MAX:
            name = file.read(info.size + -info.size % BLOCK)[:info.size].rstrip(b"\0")
            continue
        name = info.name.encode("latin-1") if name is None else name
        if info.isdir():
            name = name.rstrip(b"/")
            if name == WHOLE:
                break
        info.sparse = [(0, info.size)], info.size           # the pieces of its data, and the size of the file
        if info.type == tarfile.GNUTYPE_SPARSE:
            info.sparse = read_pieces(file, head, name, info.size)
            info.type = tarfile.REGTYPE
        check_member(name, info, tarfile.DIRTYPE, tarfile.REGTYPE, tarfile.AREGTYPE)
        yield name, info
        name = None
    if file.read(1):
        raise ProtocolError("something behind the archive's end")


def read_pieces(file, head, name, size):
    """Returns (the pieces, the file's size) of a file with holes.  Raises ProtocolError."""
    rows, number = head[SPARSE_AT:SPARSE_AT + 96], 4
    more, pieces = head[SPARSE_AT + 96], []
    try:
        whole = tarfile.nti(head[SPARSE_AT + 97:SPARSE_AT + 109])
        while True:
            pieces += [(tarfile.nti(rows[at:at + 12]), tarfile.nti(rows[at + 12:at + 24]))
                       for at in range(0, 24 * number, 24)]
            if not more or len(pieces) > PIECES_MAX + 24:
                break
            rows, number = file.read(BLOCK), 21
            more = rows[504]
    except (tarfile.TarError, IndexError):
        more = True
    pieces = [piece for piece in pieces if piece != (0, 0)]
    ends = [0] + [offset + count for offset, count in pieces]
    if (more or sum(count for _, count in pieces) != size or ends[-1] > whole or whole >= 2 ** 63
            or any(offset < end or count < 0 for (offset, count), end in zip(pieces, ends))):
        raise ProtocolError("%s has impossible holes" % os.fsdecode(name))
    return pieces, whole


def check_member(name, info, *kinds):
    """Raises ProtocolError for a member that pack_files() never writes."""
    if info.type not in kinds:
        raise ProtocolError("%s is neither a regular file nor a directory" % os.fsdecode(name))
    if len(name) >= PATH_MAX or b"\0" in name or {b"", b".", b".."} & set(name.split(b"/")):
        raise ProtocolError("%s: not a relative name" % os.fsdecode(name[:PATH_MAX]))
    if info.mode & ~0o777 or info.size < 0 or info.isdir() and info.size:
        raise ProtocolError("%s has an impossible mode or size" % os.fsdecode(name))


def unpack(reader, top, allowed=lambda name: True, exact=True):
    """Unpacks an archive, read from a descriptor, into an empty directory; top is a descriptor of this.

    Returns the files' names, and {name: mode} for set_modes(): until then each directory has mode
    0700.  exact: files get the archive's times and modes, which the umask does not cut.  Raises OSError,
    ProtocolError.
    """
    files, directories, room = [], {}, ARCHIVE_NAMES
    with open(reader, "rb", PIECE) as file:
        for name, info in archive_members(file):
            if not allowed(name):
                raise ProtocolError("%s was not asked for" % os.fsdecode(name))
            with naming(name):
                parts, before = name.split(b"/"), len(directories)
                for count in range(1, len(parts) + info.isdir()):
                    make_once(b"/".join(parts[:count]), top, directories)
                if info.isdir():
                    if directories[name] is not None:
                        raise ProtocolError("%s comes twice" % os.fsdecode(name))
                    directories[name] = info.mode
                else:
                    unpack_file(file, name, info, top, exact)
                    files.append(name)
            room -= (1 + len(directories) - before) * (100 + len(name))     # 100: of Python's own for each
            if room < 0:
                raise ProtocolError("too many files for one archive: their names need %d MiB" % (ARCHIVE_NAMES >> 20))
    return files, directories


def make_once(name, top, directories):
    """Makes a directory, unless it was made for an earlier member."""
    if name not in directories:
        os.mkdir(name, 0o700, dir_fd=top)
        directories[name] = None


def unpack_file(file, name, info, top, exact):
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, info.mode, dir_fd=top)
    pieces, size = info.sparse
    with open(fd, "wb", 0) as out:
        for offset, missing in pieces:
            out.seek(offset)
            while missing:
                piece = memoryview(file.read(min(missing, PIECE)))
                if not piece:
                    raise ProtocolError("the archive is cut short")
                missing -= len(piece)
                write_all(out.write, piece)
        file.read(-info.size % BLOCK)
        if size > info.size:
            out.truncate(size)
        if exact:
            os.fchmod(fd, info.mode)
            seconds = min(max(-2 ** 33, info.mtime), 2 ** 33)
            os.utime(fd, (seconds, seconds))


def set_modes(directories, top, exact=False):
    """Gives directories their modes, the innermost first, because a mode may forbid to change what is inside.

    The umask cuts them, unless exact; it always cuts those that are in no archive (None).
    """
    umask = os.umask(0o077)
    os.umask(umask)
    for name in sorted(directories, reverse=True):
        mode = directories[name]
        os.chmod(name, 0o777 & ~umask if mode is None else mode if exact else mode & ~umask, dir_fd=top)


# A pattern of -g is one for relative names, as in a shell; ** stands for any number of directories.

def result_pattern(text):
    """A pattern of -g without "." and double slashes.  Raises Fatal (100) if it leads out of the directory."""
    pattern = "/".join(part for part in text.split("/") if part not in ("", "."))
    if text.startswith("/") or leads_out(os.fsencode(pattern)):
        raise Fatal(EXIT_USAGE, "-g %s: not the name of anything in the job's directory" % (text or "''"))
    return pattern


def leads_out(pattern):
    """Whether a pattern of -g, in bytes, has a part that is no name in a directory, also without its backslashes."""
    return any(part in (b"", b".", b"..")
               for text in (pattern, plain_name(pattern) or pattern) for part in text.split(b"/"))


def matcher(patterns):
    """A function that tells whether a pattern matches a name, or a directory in it.  Patterns and names are bytes.

    The worker and the client must agree: so neither decodes them in its locale.
    """
    rules = [re.compile(pattern_rule(pattern) + rb"(?:/.*)?\Z", re.DOTALL) for pattern in patterns]
    return lambda name: any(rule.match(name) for rule in rules)


# [...] of a pattern; a ] at its beginning, or after the !, is in the set
BRACKETS = rb"\[(?:[!^]|(?![!^]))ITEM(?:(?!\])ITEM)*\]".replace(
    b"ITEM", rb"(?:\[:[a-z]+:\]|\\.|(?!\[:[a-z]+:\])[^\\])")
CLASSES = {b"alnum": b"0-9A-Za-z", b"alpha": b"A-Za-z", b"blank": b" \t", b"cntrl": b"\0-\x1f\x7f", b"digit": b"0-9",
           b"graph": b"!-~", b"lower": b"a-z", b"print": b" -~", b"punct": rb"!-/:-@\[-`{-~", b"space": b" \t-\r",
           b"upper": b"A-Z", b"xdigit": b"0-9A-Fa-f"}


def pattern_rule(pattern):
    """A pattern as a regular expression.  Only a dot matches the dot at the beginning of a name, as in a shell."""
    def rule(found):
        text = found.group()
        if len(text) > 2:
            return bracket_rule(text)
        return {b"*": b"[^/]*", b"?": b"[^/]"}.get(text) or re.escape(text[-1:])

    rules = []
    *directories, last = re.sub(rb"(\\[^/])|\\/", lambda found: found.group(1) or b"/", pattern).split(b"/")
    for part in directories + [b"*" if last == b"**" else last]:
        hidden = rb"(?!\.)" if part[:1] in b"*?[" else b""
        rules.append(rb"(?:(?!\.)[^/]+/)*" if part == b"**" else
                     hidden + re.sub(BRACKETS + rb"|\\.|.", rule, part, flags=re.DOTALL) + b"/")
    return b"".join(rules)[:-1]


def bracket_rule(text):
    """The regular expression for [...]: one of these bytes, or with ! or ^ one of the others."""
    negated, chosen = text[1:2] in b"!^", {b"/"}
    for name, first, last in re.findall(rb"\[:([a-z]+):\]|(\\?.)(?:-(\\?.))?", text[1 + negated:-1], re.DOTALL):
        if name:
            chosen.update(re.findall(b"[%s]" % CLASSES.get(name, b"/"), bytes(range(128))))
        else:
            chosen.update(bytes([byte]) for byte in range(first[-1], (last or first)[-1] + 1))
    if not negated:
        chosen.discard(b"/")
    return b"[%s%s]" % (b"^" * negated, b"".join(map(re.escape, sorted(chosen)))) if chosen else b"(?!)"


def plain_name(pattern):
    """Returns the name that a pattern of -g without wildcards stands for, in bytes; None for one with wildcards."""
    if b"\\" not in pattern:
        return None if is_pattern(os.fsdecode(pattern)) else pattern
    if re.search(rb"[*?[]", re.sub(rb"\\.", b"", pattern, flags=re.DOTALL)):
        return None
    return re.sub(rb"\\(.)", rb"\1", pattern, flags=re.DOTALL)


def parents(patterns):
    """Returns the directories above what patterns without wildcards name, the outermost first."""
    found = set()
    for name in filter(None, map(plain_name, patterns)):
        parts = name.split(b"/")
        found.update(b"/".join(parts[:count]) for count in range(1, len(parts)))
    return sorted(found)


def is_pattern(text):
    return any(character in text for character in "*?[\\")


def may_be_replaced(path):
    """Whether the path is a regular file, or there is nothing."""
    found = stat_if_there(path)
    return not found or stat.S_ISREG(found.st_mode)


# A process locks each directory that it makes here, as long as it uses it.  So a directory without a lock
# was left by a crash.

DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
OLD_SECONDS = 60.0                  # a younger directory without a lock may have just been made
REMOVAL_PAUSE = 10.0                # seconds before the next try to remove a job's directory, if no process was left


def make_directory(name, floor=0, dir_fd=None):
    """Makes a directory with mode 0700.  Returns a descriptor, from floor up, that locks it.  Raises OSError.

    dir_fd: a descriptor of the directory to make it in; None: the current one.
    """
    os.mkdir(name, 0o700, dir_fd=dir_fd)
    fd = lifted_away(os.open(name, DIRECTORY_FLAGS, dir_fd=dir_fd), floor)
    with on_failure(os.close, fd):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fd


def as_user(user, work):
    """Returns what work() returns, which has the rights of a user, an entry of passwd(5); None: our own."""
    if user is None:
        return work()
    ours, group, groups = os.geteuid(), os.getegid(), os.getgroups()
    try:
        os.initgroups(user.pw_name, user.pw_gid)
        os.setegid(user.pw_gid)
        os.seteuid(user.pw_uid)
        return work()
    finally:
        os.seteuid(ours)
        os.setegid(group)
        os.setgroups(groups)


def remove_directory(name, dir_fd=None, user=None):
    """Removes a directory with everything in it.  Raises OSError with the first name that stays, and its reason.

    What is inside goes with the rights of user (see as_user): the user may have moved there what only
    we could remove.  dir_fd: as for make_directory().
    """
    trouble = None
    try:
        as_user(user, lambda: Emptying(name, dir_fd).work())
    except OSError as error:
        trouble = error
    try:
        os.rmdir(name, dir_fd=dir_fd)
    except OSError as error:
        raise trouble or error from None


LEVELS_MAX = 1000                   # levels of a tree that a removal remembers; what is deeper is moved to the top
AGAIN_MAX = 100                     # so often a removal begins again, because another process moves directories there
REMOVAL_SECONDS = 3600.0            # a removal gives up after so long: a process can make files faster than it removes


class Emptying:
    """Removes all that is in a directory, in read-only and very deep directories too.

    Others may change it at the same time: so it is used by descriptors only, and no link is followed.
    Only the top and one other are open at a time, as there may be any number of levels.
    """

    def __init__(self, name, dir_fd):
        self.top = open_writable(name, dir_fd)
        self.here = os.dup(self.top)
        self.disk = os.fstat(self.here).st_dev
        self.deadline = time.monotonic() + REMOVAL_SECONDS
        self.above = []             # of each level above: (the name below it, its fstat(), its directories to do)
        self.begun_again = 0
        self.trouble = None         # the first OSError

    def work(self):
        """Raises OSError at the end, if something stays."""
        try:
            todo = self.unlink_files()
            while todo or self.above:
                if time.monotonic() > self.deadline:
                    raise OSError(errno.ETIMEDOUT, "not done in %g s: is a process at work there?" % REMOVAL_SECONDS)
                todo = self.go_down(todo) if todo else self.go_up()
        finally:
            os.close(self.here)
            os.close(self.top)
        if self.trouble:
            raise self.trouble

    def unlink_files(self):
        """Returns the names of the directories that are here."""
        directories = []
        for name in os.listdir(self.here):
            try:
                os.unlink(name, dir_fd=self.here)
            except FileNotFoundError:
                pass
            except OSError as error:
                if is_directory(name, self.here):
                    directories.append(name)
                else:
                    self.stays(name, error)
        return directories

    def go_down(self, todo):
        """Enters the last directory of todo.  Returns the directories to do next, where self.here is then."""
        name = todo.pop()
        if len(self.above) == LEVELS_MAX:
            self.bring_up(name)
            return todo
        try:
            below = open_writable(name, self.here)
        except FileNotFoundError:
            return todo
        except OSError as error:
            self.stays(name, error)
            return todo
        if os.fstat(below).st_dev != self.disk:
            os.close(below)
            self.stays(name, OSError(errno.EBUSY, "another disk is mounted there"))
            return todo
        self.above.append((name, os.fstat(self.here), todo))
        os.close(self.here)
        self.here = below
        return self.unlink_files()

    def bring_up(self, name):
        """Moves a directory from here to the top, to be removed from there."""
        new, (_, _, todo) = os.urandom(8).hex(), self.above[0]
        make_readable(name, self.here)          # without w its .. could not be changed
        try:
            os.rename(name, new, src_dir_fd=self.here, dst_dir_fd=self.top)
            todo.append(new)
        except OSError as error:
            self.stays(name, error)

    def go_up(self):
        name, known, todo = self.above.pop()
        try:
            parent = os.open("..", DIRECTORY_FLAGS, dir_fd=self.here)
        except FileNotFoundError:   # another process has removed the directory
            parent = os.dup(self.top)
        os.close(self.here)
        self.here = parent
        if not os.path.samestat(os.fstat(parent), known):
            return self.begin_again(name)
        try:
            os.rmdir(name, dir_fd=parent)
        except FileNotFoundError:
            pass
        except OSError as error:
            self.stays(name, error)
        return todo

    def begin_again(self, name):
        """Another process has moved or removed the directory: only from the top do we find the others."""
        self.begun_again += 1
        if self.begun_again > AGAIN_MAX:
            raise OSError(errno.EBUSY, "was moved while it was removed", name)
        os.close(self.here)
        self.here, self.above = os.dup(self.top), []
        return self.unlink_files()

    def stays(self, name, error):
        if not self.trouble:
            path = "/".join([below for below, _, _ in self.above] + [name])
            self.trouble = OSError(error.errno, error.strerror, path)


def is_directory(name, dir_fd):
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode)
    except OSError:
        return False


def open_writable(name, dir_fd):
    """Returns a descriptor of a directory; if it is ours, we may then remove what is in it.  Raises OSError."""
    try:
        fd = os.open(name, DIRECTORY_FLAGS, dir_fd=dir_fd)
    except PermissionError as error:            # it may be ours, without r
        if not make_readable(name, dir_fd):
            raise error
        fd = os.open(name, DIRECTORY_FLAGS, dir_fd=dir_fd)
    with on_failure(os.close, fd):
        if os.fstat(fd).st_uid == os.geteuid():
            os.fchmod(fd, 0o700)
        os.stat(".", dir_fd=fd)     # needs x, as ".." will
    return fd


def make_readable(name, dir_fd):
    """Gives a directory the mode 0700, and follows no link.  Returns whether it is ours."""
    with suppress(OSError):
        if os.chmod in os.supports_follow_symlinks:
            os.chmod(name, 0o700, dir_fd=dir_fd, follow_symlinks=False)
        else:                       # Linux's fchmodat(2) follows links
            with closing(os.open(name, O_PATH | DIRECTORY_FLAGS, dir_fd=dir_fd)) as handle:
                os.chmod(PROC_FD % handle, 0o700)
        return True
    return False


def remove_left(dir_fd, is_ours, user=None):
    """Removes directories that a crash has left below dir_fd: those with is_ours(name) that no process locks.

    They belong to user, an entry of passwd(5), and are removed with the user's rights; None: to us.
    """
    owner = user.pw_uid if user else os.geteuid()
    for name in filter(is_ours, os.listdir(dir_fd)):
        try:
            with closing(os.open(name, DIRECTORY_FLAGS, dir_fd=dir_fd)) as fd:
                there = os.fstat(fd)
                # A time to come is of a clock that was wrong, or of a command that has set it.
                if there.st_uid == owner and abs(time.time() - there.st_mtime) > OLD_SECONDS:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove_directory(name, dir_fd, user)
        except OSError as error:    # it is in use, or has what the user cannot remove
            log.note("%s stays: %s", name, error)


def check_current_directory(patterns=()):
    """Raises Fatal (111) if no results can be put there; removes what a crash has left of earlier ones."""
    part = new_part()
    try:
        os.mkdir(part)              # access(2) does not tell of a disk that is full, or of a directory that has gone
        os.rmdir(part)
        for pattern in patterns:
            check_target(pattern)
    except OSError as error:
        name = "the current directory" if error.filename == part else error.filename
        raise Fatal(EXIT_TEMPORARY, "-g: no results can be put here: %s: %s" % (name, error.strerror)) from None
    with closing(os.open(".", os.O_RDONLY | os.O_DIRECTORY)) as here:
        remove_left(here, lambda name: is_part(name, this_host()))


ENDING_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT


NO_ERRNO = 255                      # a Helper's exit code for an error without a number


class Helper:
    """A child process that does some work with files.  When it has ended, over(None or an error's text) is called.

    It keeps only the descriptors in kept.  If the reader of its output has gone, this is no error
    here: the reader reports it.
    """

    def __init__(self, loop, work, kept, over, handling=signal.SIG_IGN):
        self.loop, self.over, self.said = loop, over, b""
        self.error = 0              # the number of the OSError that has ended it; 0 also if it was killed
        self.reader, writer = lifted_pair(*os.pipe(), loop.floor)
        with closing(writer), on_failure(os.close, self.reader):
            self.pid = forked(lambda: self.run(work, writer, handling), [writer, *kept])
        os.set_blocking(self.reader, False)
        loop.on_read(self.reader, self.read)

    @staticmethod
    def run(work, writer, handling):
        """In the child: does the work, or writes the error's text.  Returns the exit code: 0, or the error's number."""
        try:
            for number in (*ENDING_SIGNALS, signal.SIGTSTP):
                signal.signal(number, handling)
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            log.be_verbose(False)
            log.return_to_2()
            work()
            return 0
        except BrokenPipeError:
            return 0
        except (OSError, Fatal, ProtocolError) as error:
            text, code = error_text(error), getattr(error, "errno", None)
        except BaseException as error:
            text, code = "%s: %s" % (type(error).__name__, error), None
        os.write(writer, cut(text, 400).encode())
        return code or NO_ERRNO

    def read(self):
        data = what_came(os.read, self.reader, 4096)
        if data is None:            # poll has seen another pipe, which had this number before
            return
        self.said += data
        if not data:
            self.over(self.wait())

    def wait(self):
        """Waits for its end.  Returns None, or the error's text."""
        self.loop.forget(self.reader)
        os.close(self.reader)
        code = os.waitpid(self.pid, 0)[1]
        self.error = os.WEXITSTATUS(code)
        return (self.said.decode() or "a process of ours that handles files was killed") if code else None

    def kill(self):
        """Ends it; over() will be called."""
        os.kill(self.pid, signal.SIGKILL)


# The client's side

# Results wait in a directory .cexec.HOST.NUMBER.part here.  The file system may be shared with other hosts, and
# these do not see our lock: so each host removes only what it has left itself.  Hosts may have the same name.

PART_NAME = r"\.cexec\.%s\.[0-9a-f]{16}\.part\Z"


@functools.lru_cache(None)
def this_host():
    """Returns the HOST of this host: its name, and a few digits that other hosts of this name do not have."""
    try:
        machine = read_text("/etc/machine-id")
    except OSError:
        machine = ""
    name = os.uname().nodename
    digits = hashlib.sha256((name + machine).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return "%s-%s" % (re.sub(r"[^A-Za-z0-9-]", "_", name)[:64], digits)


def new_part():
    """Returns a name for such a directory."""
    return ".cexec.%s.%s.part" % (this_host(), os.urandom(8).hex())


def is_part(name, host="[A-Za-z0-9_-]+"):
    """Whether this is the name of such a directory; host: a regular expression."""
    return name.startswith(".cexec.") and re.match(PART_NAME % host, name) is not None


def named_there(text):
    """Returns (path, name there) for an argument of -i, both bytes.  Raises OSError if it does not exist.

    The name is the same relative path; for an absolute path and one with ".." it is the last part, or
    what that stands for.
    """
    os.stat(text)
    path, name = os.fsencode(text), os.fsencode(os.path.normpath(text))
    if path.startswith(b"/") or b".." in path.split(b"/"):
        last = [part for part in path.split(b"/") if part not in (b"", b".")][-1:]
        name = os.path.basename(os.path.realpath(path)) if last in ([], [b".."]) else last[0]
    if not name:
        raise OSError(errno.EINVAL, "it has no name of its own", text)
    return os.path.realpath(path), name


def is_wanted(name):
    """Whether -i sends an entry of this name: everything but results that wait."""
    return b".cexec." not in name or not any(map(is_part, os.fsdecode(name).split("/")))


KEY_MIN, KEY_MAX = 500, 4096        # bytes: other files are no private keys of this program


def holds_key(path, found):
    """Whether what is there is a private key of this program.  If it cannot be read, its job will say so."""
    if not found or not stat.S_ISREG(found.st_mode) or not KEY_MIN < found.st_size < KEY_MAX:
        return False
    try:
        text = read_text(path)
        return "-----BEGIN EC PRIVATE KEY-----" in text and (
            unpem("CERTIFICATE", text) == unpem("CERTIFICATE", format_key(parse_key(text, "").master)[0]))
    except (OSError, Fatal):
        return False


class Listing(collections.namedtuple("Listing", "path name inside newest given")):
    """What -i sends of a file or directory: its path, its name there, and what is inside: each name with a NUL.

    newest is when the newest of the files was changed, in ns; given is the path too, but if the argument of -i is a
    link, that of the link.
    """

    __slots__ = ()

    def entries(self):
        """Yields (path, name), both bytes."""
        if self.name != WHOLE:
            yield self.path, self.name
        for inner in self.inside.split(b"\0")[:-1]:
            yield os.path.join(self.path, inner), inner if self.name == WHOLE else self.name + b"/" + inner


def input_entries(listings):
    """Yields (path, name) for everything that -i packs, each name once.  Raises OSError."""
    known = {}
    for listing in listings:
        for path, name in listing.entries():
            if name not in known:
                known[name] = path
                yield path, name
            elif known[name] != path and not os.path.isdir(path):
                raise OSError(errno.EEXIST, "has the same name there as %s" % os.fsdecode(known[name]), path)


def stat_if_there(path):
    """Returns the stat_result of what is there, links followed; None if nothing is."""
    try:
        return os.stat(path)
    except (OSError, ValueError):   # ValueError: a NUL in the name
        return None


APPENDED = {"--log", *STANDARD[1:]}         # these may be one file


def list_if_there(path):
    try:
        return os.listdir(path)
    except OSError:
        return []


def called(who):
    return who if isinstance(who, str) else who.name


class Names:
    """Every file that a job, or a batch of jobs, reads and writes here: none may be lost to another.

    A file's identity does not depend on how its path is spelled.  It is the device and the inode of
    what is there, links followed; if nothing is there, the identity of its directory, and its name
    in it.  Who reads or writes it is a text, or a job, which has a name.
    """

    # Two names that do not exist yet can still become one file: where a file system does not tell A from a, or
    # where two ways lead to one directory and look like two.  So what jobs have made is noted too, and
    # whoever gives a file its name looks again at what is there.

    def __init__(self):
        self.directories = {}       # the path of a directory: its identity
        self.readers, self.writers = {}, {}     # the first half of an identity: {the second half: who reads, or will
                                    # write, that file}
        self.makers = {}            # (the inode, the time of change) of what was made here: who
        self.parts = {}             # the inode of an unfinished output: its open file
        self.errors, self.count = set(), 0      # the identities of the directory of --errors; how many files it gets
        self.inputs = {}            # a directory that -i names: its Listing
        self.keys = []              # private keys that are left out
        self.above = set()          # the identities of directories above what is noted, for note_nested()

    def directory(self, path):
        """Returns the identity of a directory."""
        missing = []
        while path not in self.directories:
            found, (above, last) = stat_if_there(path or "."), os.path.split(path)
            if found or not last:
                self.directories[path] = (found.st_dev, found.st_ino) if found else (None, path)
            else:
                missing.append((path, last))
                path = above
        identity = self.directories[path]
        for path, last in reversed(missing):
            identity = self.directories[path] = identity, last
        return identity

    def entry(self, path):
        """Returns the identity of a file, if nothing is there."""
        above, last = os.path.split(path)
        return self.directory(above), last

    # What will be read and written

    def note_read(self, path, name):
        """Returns what is there.  Raises Fatal (100) if a job writes it, which was noted before."""
        found, (directory, last) = stat_if_there(path), self.entry(path)
        writer = self.writer(directory, last) or found and self.writer(found.st_dev, found.st_ino)
        if writer:
            raise Fatal(EXIT_USAGE, "%s: it is written by %s" % (name, called(writer)))
        self.readers.setdefault(directory, {})[last] = name
        if found:
            self.readers.setdefault(found.st_dev, {})[found.st_ino] = name
        return found

    def note_keys(self, path):
        """Notes the public key, and the private key beside it."""
        for name in {path, path + ".pub", path[:-4] if path.endswith(".pub") else path}:
            self.note_read(name, "the key " + name)

    def note_input(self, path, found=None):
        """Notes what -i names, unless it is noted and found already.  Raises Fatal (100) for a private key."""
        found = found or self.note_read(path, path)
        if holds_key(path, found):
            raise Fatal(EXIT_USAGE, "-i %s: a private key is not sent" % path)
        if found and stat.S_ISDIR(found.st_mode):
            self.inputs[path] = None

    def note_written(self, path, who, option):
        """Returns what is there.  Raises Fatal (100) if it is read, or if somebody else writes it."""
        found = stat_if_there(path)
        self.note_name(path, who, option)
        if found:
            # A result replaces one name of what is there, and the log is appended to it, whatever its name.
            linked = found.st_nlink > 1 and not isinstance(who, str)
            self.refuse(found.st_dev, found.st_ino, path, who, option, linked)
            self.writers.setdefault(found.st_dev, {})[found.st_ino] = who
            self.leave_out(path)
        return found

    def leave_out(self, path):
        """Has a directory listed again that -i names, if it was listed before it was known that this is written."""
        path = os.fsencode(os.path.realpath(path)) if any(self.inputs.values()) else b""
        for top, listing in self.inputs.items():
            if listing and path.startswith(os.path.join(listing.path, b"")):
                self.inputs[top] = None

    def note_name(self, path, who, option):
        """Notes a name, whatever is there: of an unfinished output, for example.  Raises Fatal (100)."""
        directory, last = self.entry(path)
        self.refuse(directory, last, path, who, option)
        self.writers.setdefault(directory, {})[last] = who

    def note_standard(self):
        """Notes the regular files that are open at 0, 1 and 2.  Raises Fatal (100) if an output is the input."""
        for fd, name in enumerate(STANDARD):
            found = os.fstat(fd)
            if stat.S_ISREG(found.st_mode):
                if fd:
                    self.refuse(found.st_dev, found.st_ino, name, self.writer(found.st_dev, found.st_ino), name)
                    if not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND:
                        name += " (without >>)"         # it would be written over the lines of the log
                (self.writers if fd else self.readers).setdefault(found.st_dev, {})[found.st_ino] = name

    def note_log(self, path):
        """Notes the file of --log.  Raises Fatal (100)."""
        if path != "-" and may_be_replaced(path):       # else it is a pipe or a device
            self.note_written(path, "--log", "--log " + path)

    def note_errors(self, path, count):
        """Notes the files of --errors, 1 to count, after all others.  Raises Fatal (100)."""
        directory, self.count = self.directory(path), count
        option, errors = "--errors " + path, "the errors of job %s"
        for noted in self.readers, self.writers:
            for last in filter(self.is_number, noted.get(directory, ())):
                self.refuse(directory, last, os.path.join(path, last), errors % last, option)
        for last in filter(self.is_number, list_if_there(path)):
            found = stat_if_there(os.path.join(path, last))
            if found:
                self.refuse(found.st_dev, found.st_ino, os.path.join(path, last), errors % last, option)
        self.errors.add(directory)

    def note_errors_made(self, path):
        """Notes what the directory of --errors is now, because before it was made it had another identity."""
        found = stat_if_there(path)
        if found:
            self.errors.add((found.st_dev, found.st_ino))

    def is_number(self, last):
        """Whether this is the name of a file of --errors."""
        return os.fsencode(last).isdigit() and last[0] != "0" and int(last) <= self.count

    def refuse(self, first, second, path, who, option, linked=False):
        """Raises Fatal (100) if the file with this identity is read, or if somebody else writes it.

        linked: it is one of several names that a file has, and other jobs may replace the others.
        """
        reader, writer = self.readers.get(first, {}).get(second), self.writer(first, second)
        if reader is not None:
            raise Fatal(EXIT_USAGE, "%s: %s would be overwritten" % (option, reader))
        if writer is None or writer is who or {writer, who} <= APPENDED or linked and not isinstance(writer, str):
            return
        raise Fatal(EXIT_USAGE, "%s: %s and %s would both be written to %s"
                    % (option, called(writer), called(who), path))

    def check_directories(self):
        """Raises Fatal (100) if a job's result is a directory, and somebody else reads or writes what is in it."""
        above = {}                  # the path of a directory: (the path of one here or above that is written, who)

        def find_above(path):
            passed = []
            while path not in above:
                passed.append(path)
                first, second = self.directory(path)
                who, parent = self.writers.get(first, {}).get(second), os.path.dirname(os.path.realpath(path))
                if who or parent == path:
                    above[path] = (os.path.relpath(path), who) if who else None
                else:
                    path = parent
            above.update(dict.fromkeys(passed, above[path]))
            return above[path]

        for path, directory in list(self.directories.items()):
            top = find_above(path) if "\0" not in path else None
            if top and directory in self.errors:
                raise Fatal(EXIT_USAGE, "-g %s: the files of --errors %s would be in it" % (top[0], path))
            for noted in (self.readers, self.writers) if top else ():
                for last in noted.get(directory, ()):
                    self.refuse(directory, last, os.path.join(path, last), top[1], "-g " + top[0])

    def note_nested(self, task):
        """Raises Fatal (100) if a result of a task is above what others read or write, or it uses what is in theirs.

        For a task that comes when others are noted; then notes it for this check too.
        """
        results, passed = task.outputs(), {""}
        paths = results + task.input_paths() + [task.input_path] * (task.input_path is not None)
        for path in paths:
            self.check_above(os.path.dirname(path), task, path, passed)
        for path in results:
            if not self.above.isdisjoint({self.entry(path), self.directory(path)}):
                raise Fatal(EXIT_USAGE, "-g %s: other jobs read or write files in it" % path)
        self.note_above(paths)

    def note_above(self, paths):
        """Notes the directories above."""
        for path in map(os.path.dirname, map(os.path.realpath, paths)):
            while self.directory(path) not in self.above:
                self.above.add(self.directory(path))
                path = os.path.dirname(path)

    # What -i sends

    def list_inputs(self):
        """Lists what is in the directories, once for all jobs, when all that will be written is noted."""
        for path in self.inputs:
            with suppress(OSError):             # it cannot be read, which its job will say
                self.listing(path)
        if self.keys:
            more = len(self.keys) - 1
            log.once("-i: %s%s: private keys are not sent" % (self.keys[0], " and %d more" % more if more else ""))
            self.keys = []

    def listing(self, path):
        """Returns the Listing of a file or directory.  Raises OSError."""
        if self.inputs.get(path):
            return self.inputs[path]
        top, name = named_there(path)
        newest, inside, left_out = 0, [], None
        for one, its_name in tree(top, name, is_wanted):
            found = stat_if_there(one)
            if its_name != name:
                if left_out and its_name.startswith(left_out):
                    continue
                if self.is_written(one, found):
                    left_out = its_name + b"/"
                    continue
                if holds_key(one, found):
                    self.keys.append(os.path.relpath(os.fsdecode(one)))
                    continue
                inside.append(its_name[len(name) + 1 if name != WHOLE else 0:] + b"\0")
            if not found:           # a link to nothing: its job will fail
                newest = float("inf")
            elif not stat.S_ISDIR(found.st_mode):
                newest = max(newest, found.st_mtime_ns)
        head, last = os.path.split(os.fsencode(path).rstrip(b"/"))
        given = top if last in (b"", b".", b"..") else os.path.join(os.path.realpath(head or b"."), last)
        listing = Listing(top, name, b"".join(inside), newest, given)
        if path in self.inputs:
            self.inputs[path] = listing
        return listing

    def is_written(self, path, found):
        """Whether a job writes what is there, or will be where a link leads, so that -i does not send it."""
        if found and self.writer(found.st_dev, found.st_ino):
            return True
        return self.writer(*self.entry(os.fsdecode(path if found else os.path.realpath(path)))) is not None

    def writer(self, first, second):
        """Returns who writes the file with this identity, or None."""
        if first in self.errors and self.is_number(second):
            return "--errors"
        return self.writers.get(first, {}).get(second)

    # What is done

    def newest(self, path, found):
        """Returns when a result was changed, in ns: for a directory, the newest file in it.  None: there is none."""
        if not found or not stat.S_ISDIR(found.st_mode):
            return found and found.st_mtime_ns
        try:
            inside = [stat_if_there(one) for one, _ in tree(os.path.realpath(os.fsencode(path)), WHOLE)]
        except OSError:
            return None
        return max((one.st_mtime_ns for one in inside if one and not stat.S_ISDIR(one.st_mode)), default=None)

    # What is written, and has got its name

    def note_part_open(self, file):
        self.parts[os.fstat(file.fileno()).st_ino] = file

    def forget_part(self, file):
        self.parts.pop(os.fstat(file.fileno()).st_ino, None)

    def check_part(self, path, found):
        """Raises OSError if what was found as an unfinished output is one that a job writes now, or is read."""
        self.check_there(path)
        part = self.parts.get(found.st_ino)     # a lock does not tell: each way to a file may have its own
        now = part and os.fstat(part.fileno())
        if now and (now.st_mtime_ns, now.st_ctime_ns, now.st_size) == (
                found.st_mtime_ns, found.st_ctime_ns, found.st_size):
            raise OSError(errno.EBUSY, "another job of this batch writes it", path)

    def note_made(self, found, who):
        self.makers[found.st_ino, found.st_mtime_ns] = who

    def check_there(self, path):
        """Raises OSError if what is there by now is read by a job, or was made by one."""
        found = stat_if_there(path)
        if not found:
            return
        reader = self.readers.get(found.st_dev, {}).get(found.st_ino)
        if reader is not None:
            raise OSError(errno.EEXIST, "%s would be overwritten" % reader, path)
        self.check_made(path, found.st_ino, found.st_mtime_ns)

    def check_made(self, path, inode, changed):
        maker = self.makers.get((inode, changed))
        if maker is not None:
            raise OSError(errno.EEXIST, "the same file as a result of %s" % called(maker), path)

    # Results whose names are known only when they are there: those that a wildcard matches, or in a directory

    def claim(self, arrivals, who):
        """Notes results that are about to get their names.  Raises Fatal, OSError if one of them must not be written.

        Returns a function that takes this back, if they do not get them.
        """
        passed = {""}
        kept = set() if who.output_path is None else {self.entry(who.output_path), self.entry(who.part)}
        for name, _, there in arrivals:
            path = os.fsdecode(name)
            option = "-g " + path
            if self.entry(path) in kept:        # with it, the job would look done when its output has failed
                raise Fatal(EXIT_USAGE, "%s: the output of -o is written there" % option)
            self.refuse(*self.entry(path), path, who, option)
            self.check_above(os.path.dirname(path), who, option, passed)
            if there:
                device, inode, changed, links = there
                self.refuse(device, inode, path, who, option, links > 1)
                self.check_made(path, inode, changed)
        new = []
        for name, made, _ in arrivals:
            self.makers[made] = who
            directory, last = self.entry(os.fsdecode(name))
            names = self.writers.setdefault(directory, {})
            if last not in names:
                names[last] = who
                new.append((names, last))
        def undo():
            for names, last in new:
                names.pop(last)
            for _, made, _ in arrivals:
                self.makers.pop(made, None)
        return undo

    def check_above(self, path, who, option, passed):
        """Raises Fatal if the directory, or one above it, is the result of another job; passed: those seen before."""
        while path not in passed:
            passed.add(path)
            for identity in self.entry(path), self.directory(path):
                writer = self.writer(*identity)
                if writer not in (None, who):
                    raise Fatal(EXIT_USAGE, "%s: it would be in %s, a result of %s" % (option, path, called(writer)))
            path = os.path.dirname(path)


def receive(part, reader, parent, patterns, listings, in_batch, in_use=(), directory=b""):
    """In a Helper: unpacks results into a directory of its own, part, and waits for its parent: a byte, or end of file.

    After a byte it asks with the names of the results, see ask_parent().  After a second byte it gives them their
    names.  After an end of file it removes them.  in_use: the files that are open at 0, 1 and 2, {(device, inode):
    whether it is an output}.  directory: where the results go, or b"".  Raises OSError, ProtocolError, Fatal.
    """
    # An error before the first byte is kept until then: if the command has failed, it does not matter.
    error = None
    try:
        try:
            top = make_directory(part)
            inner = make_directory(directory, dir_fd=top) if directory else top
            files, directories = unpack(reader, inner, matcher(patterns), exact=False)
        except (OSError, ProtocolError) as trouble:
            error = trouble
            os.closerange(reader, reader + 1)   # the writer must not wait for us
        if not os.read(parent, 1):
            return
        if error:
            raise error
        for pattern in patterns:
            if not any(map(matcher([pattern]), files + list(directories))):
                raise Fatal(EXIT_TEMPORARY, "-g %s: nothing in the job's directory matches" % os.fsdecode(pattern))
        if directory:
            files = [os.path.join(directory, name) for name in files]
            modes = {os.path.join(directory, name): mode for name, mode in directories.items()}
            directories = {directory: None, **modes}
        again = any(map(os.path.lexists, files + list(directories)))
        sent = [(path, os.path.join(directory, name)) for path, name in input_entries(listings)] if again else []
        named = [os.path.join(directory, name) for name in map(plain_name, patterns) if name]
        sent += [(listing.given, listing.given) for listing in listings]
        old = old_files(named, files, directories, sent, in_use)
        sent = {identity_of(path): path for path, _ in sent}
        files = [name for name in files if not is_unchanged(part, name, sent, in_batch)]
        for name in files:
            if in_use.get(identity_of(name)):
                raise OSError(errno.EBUSY, "an output of this job is written there", name)
        commit_all(part, files, directories, in_batch, lambda arrivals: ask_parent(parent, arrivals), old)
    finally:
        if os.path.lexists(part):
            remove_directory(part)


def old_files(named, files, directories, sent, in_use):
    """Returns the names of what is in a directory that -g names, and not among the results: what is there is replaced.

    But nothing in a directory of which -i has sent something, no file that is in use, and no private key of this
    program.  sent: (path, name there) of all that -i sends, and where its arguments lie.  Raises OSError.
    """
    known, old = {*files, *directories}, []
    tops = []
    for top in {name for name in named if name in directories and os.path.isdir(name)}:
        real = os.path.realpath(top)
        if not any(is_within(path, real) or is_within(name, top) for path, name in sent):
            tops.append(top)
    todo = [top for top in tops if not any(is_within(top, other) and top != other for other in tops)]
    while todo:
        directory = todo.pop()
        for name in [os.path.join(directory, last) for last in os.listdir(directory) if is_wanted(last)]:
            if os.path.isdir(name) and not os.path.islink(name) and (
                    name in known or any(is_in_use(path, in_use) for path, _ in tree(name, name))):
                todo.append(name)
            elif name not in known and not is_in_use(name, in_use) and not holds_key(name, stat_if_there(name)):
                old.append(name)
    return old


def is_within(path, top):
    """Whether a path is this one, or below it: both text, or both bytes."""
    return path == top or path.startswith(os.path.join(top, top[:0]))


def identity_of(path):
    """Returns the (device, inode) of what is there; None if nothing is."""
    found = stat_if_there(path)
    return found and (found.st_dev, found.st_ino)


def is_in_use(path, in_use):
    return identity_of(path) in in_use


def is_unchanged(part, name, sent, in_batch):
    """Whether a result is a file of -i, and still as it was sent.  Raises OSError if a batch has changed it."""
    new, there = os.path.join(os.fsencode(part), name), stat_if_there(name)
    if not there or (there.st_dev, there.st_ino) not in sent:
        return False
    umask = os.umask(0o077)
    os.umask(umask)
    if os.stat(new).st_mode == there.st_mode & ~umask and filecmp.cmp(new, name, shallow=False):
        return True
    if in_batch:
        raise OSError(errno.EEXIST, "-i sends it, and it would be overwritten", name)
    return False


def ask_parent(parent, arrivals):
    """Has our parent claim the names of results, see Names.claim().  Returns whether they may have them."""
    with socket.socket(socket.AF_UNIX, fileno=parent) as question:
        question.sendall(marshal.dumps(arrivals))
        question.shutdown(socket.SHUT_WR)
        return question.recv(1) != b""


def arrived(path, name):
    """Returns what claim() is to know of a result that waits at a path, and of what is there now: numbers and bytes."""
    new, old = os.stat(path), stat_if_there(name)
    return name, (new.st_ino, new.st_mtime_ns), old and (old.st_dev, old.st_ino, old.st_mtime_ns, old.st_nlink)


def commit_all(part, files, directories, in_batch, claim_names=lambda arrivals: True, old=()):
    """Gives results their names: all of them, or none if something fails.  Then removes what is old.  Raises OSError.

    In a batch they are durable first.

    Everything that may fail is done before the first one gets its name, and renames are undone if one fails
    all the same.  Only a KILL or a crash between them leaves some of the results, and where
    there are no hard links a file that was replaced does not come back.
    """
    part, undo = os.fsencode(part), []
    stages = {b"": part}            # directory: the one of ours in it
    try:
        new = new_directories(files, directories)
        waiting = [brought_beside(name, number, new, stages) for number, name in enumerate(files)]
        for path in waiting if in_batch else ():
            with closing(os.open(path, os.O_RDONLY)) as fd:
                os.fsync(fd)
        arrivals = list(map(arrived, waiting, files))
        if claim_names(arrivals):
            make_new(new, undo)
            for path, (name, _, there) in zip(waiting, arrivals):
                give_name(path, name, there, undo)
            for name in old:
                move_away(name, stages, undo)
            set_modes(new, None)
    except BaseException:           # a lack of memory, too
        for step in reversed(undo):
            take_back(step)
        raise
    finally:
        del stages[b""]
        for stage in stages.values():
            take_back(functools.partial(remove_directory, stage))


def take_back(step):
    try:
        step()
    except OSError as error:        # somebody else is at work there
        log.note("%s", error)


def new_directories(files, directories):
    """Returns the modes of the directories that are not there yet.  Raises OSError if a name is another thing's."""
    for name in files:
        if not may_be_replaced(name):
            raise OSError(errno.EEXIST, "there is something that is no regular file", name)
    for name in directories:
        if os.path.lexists(name) and not os.path.isdir(name):
            raise OSError(errno.ENOTDIR, "there is something that is no directory", name)
    return {name: mode for name, mode in directories.items() if not os.path.isdir(name)}


def make_new(new, undo):
    for name in sorted(new):
        try:
            os.mkdir(name)
            undo.append(lambda name=name: os.rmdir(name))
        except FileExistsError:     # another job's results have come first
            del new[name]


def brought_beside(name, number, new, stages):
    """Brings a result to where rename(2) must work: to the disk of its directory.  Returns its path there."""
    path, directory = os.path.join(stages[b""], name), os.path.dirname(name)
    while directory in new:
        directory = os.path.dirname(directory)
    if not directory:
        return path
    with naming(name):
        beside = os.path.join(stage_in(directory, stages), b"%d.new" % number)
        rename_or_copy(path, beside)
    return beside


def stage_in(directory, stages):
    """Returns the path of the directory of ours in a directory.  Raises OSError."""
    if directory not in stages:
        stage = os.path.join(directory, os.fsencode(new_part()))
        os.mkdir(stage, 0o700)
        stages[directory] = stage
    return stages[directory]


def move_away(name, stages, undo):
    """Moves what is old to where it will be removed; undo gets how that is taken back.  Raises OSError."""
    away = os.path.join(stage_in(os.path.dirname(name), stages), os.urandom(8).hex().encode())
    with naming(name):
        os.rename(name, away)
    undo.append(functools.partial(os.rename, away, name))


def rename_or_copy(path, beside):
    try:
        os.rename(path, beside)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copy(path, beside)   # its directory is a link to another disk


def give_name(path, name, there, undo):
    """Gives a result its name; undo gets how that is taken back.  Raises OSError, also if there is another file now."""
    now = stat_if_there(name)
    if (now and (now.st_dev, now.st_ino)) != (there and there[:2]):
        raise OSError(errno.EEXIST, "the same file as another result, or somebody else has just written it", name)
    old = os.path.join(os.path.dirname(path), os.urandom(8).hex().encode())
    try:
        os.link(name, old)
        back = functools.partial(os.rename, old, name)
    except FileNotFoundError:
        back = functools.partial(os.unlink, name)
    except OSError:                 # no hard links
        back = None
    with naming(name):
        os.rename(path, name)
    if back:
        undo.append(back)


def check_target(pattern, *above):
    """Raises OSError if it is known before that what matches can't get its name here, in the directory above."""
    directory, parts = "", [*above, *pattern.split("/")]
    for number, part in enumerate(parts):
        path, last = os.path.join(directory, part), number == len(parts) - 1
        wild = is_pattern(part) and number >= len(above)
        if wild and not last:
            return
        if wild or not os.path.lexists(path):
            if not os.access(directory or ".", os.W_OK | os.X_OK):
                raise OSError(errno.EACCES, "cannot be written", directory or ".")
            return
        if last and os.path.exists(path) and not os.path.isdir(path) and not may_be_replaced(path):
            raise OSError(errno.EEXIST, "there is something that is no regular file", path)
        if not last and not os.path.isdir(path):
            raise OSError(errno.ENOTDIR, "there is something that is no directory", path)
        directory = path


class JobFiles:
    """A job's files at the client: one Helper packs the files of -i, another receives the results of -g.

    ended(trouble) is called when a Helper has ended, with an error's text or None.  In a batch, claim(arrivals) is
    called before results get their names: see Names.  directory: where the results go.  Raises OSError.
    """

    def __init__(self, carrier, listings, patterns, ended, claim=None, directory=""):
        self.loop, self.ended, self.claim, self.directory = carrier.loop, ended, claim, os.fsencode(directory)
        self.part = self.receiver = None        # the directory in which results wait, and their Helper
        self.refused = None         # why claim() does not let results get their names
        self.helper_socket = None   # to the Helper that has the results: see receive()
        self.question = None        # None until approve(); then what the Helper has asked so far: see ask_parent()
        self.unclaim = lambda: None             # takes back what claim() has noted
        self.helpers, self.channels = [], []
        self.closed = False         # whether nobody waits for the Helpers any more
        at_end.append(self.end)     # removes unfinished results, no matter why this process ends
        with on_failure(self.wait):             # no process or no descriptor is left
            if listings:
                self.send_inputs(carrier, listings)
            if patterns:
                self.receive_results(carrier, patterns, listings)

    def send_inputs(self, carrier, listings):
        reader, writer = large_pipe(self.loop.floor)
        self.carry(carrier, FILES_IN, reader, "read")
        self.help(lambda: pack_files(writer, input_entries(listings)), [writer])

    def receive_results(self, carrier, patterns, listings):
        parent, self.helper_socket = lifted_pair(*(end.detach() for end in socket.socketpair()), self.loop.floor)
        with on_failure(os.close, parent):
            reader, writer = large_pipe(self.loop.floor)
        self.carry(carrier, FILES_OUT, writer, "write")
        in_use = {}
        for fd in range(3):
            found = os.fstat(fd)
            in_use[found.st_dev, found.st_ino] = in_use.get((found.st_dev, found.st_ino)) or fd > 0
        self.part = new_part()
        self.receiver = self.help(lambda: receive(
            self.part, reader, parent, patterns, listings, self.claim is not None, in_use, self.directory),
            [reader, parent])

    def help(self, work, kept):
        """Starts a Helper that does work().  Returns it."""
        with closing(*kept):
            helper = Helper(self.loop, work, kept, lambda trouble: self.helper_ended(helper, trouble))
        self.helpers.append(helper)
        return helper

    def carry(self, carrier, channel, fd, half):
        os.set_blocking(fd, False)
        self.channels.append(carrier.carry(channel, PipeEnd(fd, fd, lambda: os.close(fd), [half])))

    def helper_ended(self, helper, trouble):
        self.helpers.remove(helper)
        if trouble:
            self.unclaim()
        if trouble and helper is self.receiver and os.path.lexists(self.part):
            with noting("%s", self.part):       # it was killed
                remove_directory(self.part)
        if self.closed:
            self.close()
        else:
            self.ended(self.refused or trouble)

    def approve(self):
        """All bytes have come: has the Helper give the results their names, see receive()."""
        if self.helper_socket is not None and self.question is None:
            self.question = b""
            os.set_blocking(self.helper_socket, False)
            self.loop.on_read(self.helper_socket, self.read_question)
            self.say_yes()

    def stop(self):
        """Waits for no more bytes: a Helper that still packs the files of -i must not wait for a reader."""
        for channel in self.channels:
            channel.close()

    def drop(self):
        """Has the results removed, unless approve() was called before."""
        if self.question is None:
            self.close_socket()

    def say_yes(self):
        """Lets the Helper go on."""
        with suppress(OSError):     # the Helper has ended, and says why
            os.write(self.helper_socket, b"1")

    def read_question(self):
        """Reads which results the Helper has; when all is read, answers, or closes the socket if one is refused."""
        data = what_came(os.read, self.helper_socket, PIECE)
        if data is None:
            return
        self.question += data
        if data:
            return
        try:
            if self.claim and self.question:
                self.unclaim = self.claim(marshal.loads(self.question))
            self.say_yes()
        except (Fatal, OSError, EOFError, ValueError) as error:
            self.refused = error_text(error)
        self.close_socket()

    def close_socket(self):
        if self.helper_socket is not None:
            self.loop.forget(self.helper_socket)
            os.close(self.helper_socket)
            self.helper_socket = None

    def close(self):
        """Stops.  The Helpers end by themselves, however slow the disk is, and remove results that have no name yet."""
        self.closed = True
        self.stop()
        self.close_socket()
        if not self.helpers and self.end in at_end:
            at_end.remove(self.end)

    def wait(self):
        """Stops, and waits until its Helpers have ended."""
        self.close()
        while self.helpers:
            self.helpers.pop().wait()
        self.close()

    def end(self):
        """At the end of this process: waits, or leaves the rest to the Helpers if one more signal comes."""
        for number in ENDING_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        self.wait()


# ---------------------------------------------------------------------------
# cexec: the search
# ---------------------------------------------------------------------------
#
# A Search finds a worker for a patron: a Client, which has one job, or a Batch, which has many.
#
#   patron.has_job_for(worker_id)        whether this worker may be asked
#   patron.assign(search, worker_id)     returns a job for the worker that offers, opened, or None if none is left for
#                                        it; then this may have ended the search
#   patron.note_lacking(hello, job, why, code)  this worker has not this job's command, but perhaps that of others
#   patron.put_back(job)                 this worker was lost before GO: nothing has run
#   patron.begin(search, candidate, job) GO was sent: the search is over, and the link is the patron's now
#   patron.not_found(search, message, code)     the search gives up, for good (100) or for now (111)
#
# A job is a Job or a Task.  Its job_fields() are for job_frames().

LOSSES_MAX = 3                      # times that a job is run again whose worker was lost
FRESH_TRIES = 3                     # a BUSY is a replay if more announcements than these came after its own
TELL_SECONDS = 3.0                  # a search that takes longer says so on a terminal
AVOID_MAX = 300.0                   # a worker that refuses again and again is asked again after this
UNFIT_SECONDS = 1.0                 # if a worker can't do the job, others have so long to make an offer
HEAD_START = 0.020                  # seconds in which an earlier offer is preferred


class Terms:
    """The settings of all jobs of one call of cexec: from its words and options, and from the environment.

    environment (KEY=VALUE) and arguments are bytes.  inputs and results are the arguments of -i and -g.
    wait: the seconds that a search waits by default in the lines of busy workers; 0: for ever.
    """

    command_remedy = "name one after the public key (cservice -a)"

    def __init__(self, environment, arguments=(), batch=NO_BATCH, inputs=(), results=(), wait=0):
        self.environment, self.arguments, self.inputs, self.results = environment, arguments, inputs, results
        self.batch = batch          # an id, the same in all searches of a batch
        self.losses_max = setting("CEXEC_RETRIES", LOSSES_MAX, 0, 10 ** 6)
        self.accept_seconds = setting("CEXEC_TIMEOUT_ACCEPT", 60, 0, 10 ** 9)
        self.wait_seconds = setting("CEXEC_TIMEOUT_WAIT", wait, 0, 10 ** 9)
        self.silence_seconds = setting("CEXEC_TIMEOUT_PINGPONG", 60, 1, 10 ** 9)
        linger = setting("CEXEC_TIMEOUT_LINGER", -1, 0, 10 ** 6)
        self.useless = ServerList("CEXEC_USELESS_SERVERS")      # an Executor knows that they cannot do its calls
        self.linger = NO_LINGER if linger < 0 else linger * 1000
        self.servers = ServerFilter()
        self.ports = listen_ports()

    def job_fields(self):
        """The arguments of job_frames(), without descriptors and terminal."""
        return {"descriptors": [], "environment": self.environment, "arguments": self.arguments,
                "patterns": self.results, "linger": self.linger, "term": "", "lines": 0, "columns": 0, "modes": []}

    def why_unfit(self, hello):
        """Why the worker of a HELLO cannot do the job; None if it can."""
        if self.arguments and not hello.options & HELLO_ARGUMENTS:
            return "takes no arguments (cservice -a); options come before the public key, variables are KEY=VALUE"
        if not self.arguments and hello.options & HELLO_NO_COMMAND:
            return "has no command of its own: " + self.command_remedy
        if (self.inputs or self.results) and not hello.options & HELLO_DIRECTORIES:
            return "has no directory for the files of -i and -g (cservice -d)"
        if hello.worker_id in self.useless.ids:
            return "cannot do the calls"
        return None

    def has_own_command(self):
        """Whether this job names a command that other jobs of this call do not name, as with cexec -m ... {}."""
        return False

    def tell_waiting(self, text):
        """Tells an Executor, which has started us, what is waited for."""

    def file_rows(self):
        """Returns JOB's rows for the channels of files."""
        return ([(FILES_IN, FILES_IN, FLAG_INPUT | FLAG_FILES)] * bool(self.inputs)
                + [(FILES_OUT, FILES_OUT, FLAG_OUTPUT | FLAG_FILES)] * bool(self.results))


def parse_words(words, options):
    """Returns (variables, arguments) from the words after a public key, or after -s, as bytes.  Raises Fatal (100).

    As with env(1), the first word that is no KEY=VALUE is the first argument; a "--" before it is left out.
    """
    count = next((index for index, word in enumerate(words)
                  if "=" not in word or not is_variable(word.partition("=")[0])), len(words))
    variables = [os.fsencode(word) for word in words[:count]]
    arguments = [os.fsencode(word) for word in words[count + (words[count:count + 1] == ["--"]):]]
    if words_size(variables + arguments) > WORDS_MAX:
        raise Fatal(EXIT_USAGE, "more than %d MiB of variables and arguments" % (WORDS_MAX >> 20))
    if options.hosts:
        check_command(arguments, options.inputs)
    return variables, arguments


def check_command(arguments, inputs):
    """Raises Fatal (100) if the command of a call with -s is missing, or can never run in an empty directory there."""
    if not arguments:
        raise Fatal(EXIT_USAGE, "no command is named (with -s its words come after the options)")
    name = os.fsdecode(arguments[0])
    if "/" in name and not name.startswith("/"):
        source = source_of(name, inputs)
        if source is None and os.path.isfile(name):
            raise Fatal(EXIT_USAGE, "%s: it is here, and not on the hosts (%s)" % (name, how_to_send(name)))
        if source is not None and os.path.isfile(source) and not os.access(source, os.X_OK):
            raise Fatal(EXIT_USAGE, "%s: not executable (chmod +x %s)" % (name, os.path.relpath(os.fsdecode(source))))


def parse_ports(text):
    """The ports of "5000-5010,6000"; [0], any port, for an empty text.  Raises Fatal (100)."""
    ports = []
    for item in text.split(",") if text else ["0"]:
        first, dash, last = item.strip().partition("-")
        if not first.isdecimal() or not (last.isdecimal() or not dash) or number_of(last or first) > 65535:
            raise Fatal(EXIT_USAGE, "CEXEC_LISTEN_PORTS=%s: use ports and ranges, as in 5000-5010,6000" % text)
        ports.extend(range(number_of(first), number_of(last or first) + 1))
    if not ports:
        raise Fatal(EXIT_USAGE, "CEXEC_LISTEN_PORTS=%s: an empty range" % text)
    return ports


def listen_ports():
    """The ports in CEXEC_LISTEN_PORTS.  Raises Fatal (100)."""
    return parse_ports(os.environ.get("CEXEC_LISTEN_PORTS", ""))


def network_of(text):
    """The address or network.  Raises ValueError."""
    return ipaddress.ip_network(text, strict=False)


def addresses_of(name):
    """The addresses that a host's name has; none if nobody knows it."""
    try:
        return {info[4][0].partition("%")[0] for info in socket.getaddrinfo(name, None)}
    except (OSError, UnicodeError):
        return set()


class ServerList:
    """The workers in an environment variable: addresses, networks, host names and ids, with commas or spaces between.

    Raises Fatal (100).  A name is what the worker calls its host, with or without the domain, or what has its address.
    """

    def __init__(self, variable):
        self.networks, self.names, self.ids = [], set(), set()
        for word in os.environ.get(variable, "").replace(",", " ").split():
            if len(word) == 16 and not set(word) - set("0123456789abcdef"):
                self.ids.add(bytes.fromhex(word))
            elif is_name(word) and not word.replace(".", "").isdecimal():
                self.names.add(word.lower())
                self.networks += map(network_of, addresses_of(word))
            else:
                try:
                    self.networks.append(network_of(word))
                except ValueError as error:
                    raise Fatal(EXIT_USAGE, "%s: %s (use addresses, networks, host names and ids, as in 10.0.0.0/24, "
                                            "box3)" % (variable, error)) from None

    def __bool__(self):
        return bool(self.networks or self.names or self.ids)

    def has_address(self, address):
        address = address.partition("%")[0]
        if not self.networks or not is_address(address):        # a host of -s is known by its worker's id
            return False
        address = ipaddress.ip_address(address)
        return any(address in network for network in self.networks)

    def has(self, address, host, worker_id):
        host = host.lower()
        return worker_id in self.ids or not self.names.isdisjoint({host, host.partition(".")[0]}) or (
            self.has_address(address))


class ServerFilter:
    """The workers that CEXEC_ACCEPT_SERVER and CEXEC_REJECT_SERVERS allow."""

    def __init__(self):
        self.accepted, self.rejected = ServerList("CEXEC_ACCEPT_SERVER"), ServerList("CEXEC_REJECT_SERVERS")

    def may_allow(self, address):
        """Whether a worker at this address may be allowed; its name and id are not known yet."""
        if self.rejected.has_address(address):
            return False
        return not self.accepted or bool(self.accepted.names or self.accepted.ids) or self.accepted.has_address(address)

    def expects(self, host, addresses):
        """Whether a worker of this host, which has not answered, would be allowed as far as is known."""
        return host.lower() not in self.rejected.names and any(map(self.may_allow, addresses))

    def allows(self, address, host, worker_id):
        """Whether this worker is allowed: its address as we see it, its host's name as it says, its id."""
        if self.rejected.has(address, host, worker_id):
            return False
        return not self.accepted or self.accepted.has(address, host, worker_id)


class Candidate:
    """An offer: a worker's connection to the client, until GO."""

    def __init__(self, search, sock, address):
        self.search, self.address = search, address
        self.hello, self.ready_at = None, 0.0       # its HELLO for this job, and when it came
        self.asked = False          # whether we have answered that with AUTH and JOB
        self.unconfirmed = 0        # WORDS that the worker has not answered with PONG
        self.link = Link(search.loop, sock, Tls(search.context, server_side=False), self)
        self.timer = search.loop.after(OFFER_SECONDS, self.silent)
        self.link.start()

    def silent(self):
        self.link.fail("said nothing for %g s" % OFFER_SECONDS, violation=not self.hello)

    def link_ready(self, link):
        if not hmac.compare_digest(link.tls.fingerprint(), self.search.pub.fingerprint):
            raise ProtocolError("wrong certificate")

    def link_frame(self, link, kind, flags, channel, payload):
        kinds = (ACCEPT, PONG, REFUSE) if self.asked else () if self.hello else (HELLO,)
        take_frame(self, kinds, kind, flags, channel, payload)

    def rcvd_hello(self, flags, channel, hello):
        if hello.version != PROTOCOL:
            raise OtherVersion(hello.version)
        if len(hello.host) > 255:
            raise ProtocolError("a name that is too long")
        if not is_address(hello.address):       # it goes into messages, and programs read some of them
            raise ProtocolError("an impossible address")
        if hello.nonce != self.search.nonce or not self.search.may_ask(hello.worker_id):
            self.search.not_asked(self.address, hello.worker_id)
            return self.link.fail("an offer that we do not take")
        if hello.options & HELLO_BY_SSH:        # the connection comes from the host of `cservice -s`
            self.address = hello.address
        if not self.search.terms.servers.allows(self.address, hello.host, hello.worker_id):
            self.search.not_allowed(self.address)
            return self.link.fail("not allowed")
        unfit = self.search.terms.why_unfit(hello)
        if unfit:
            self.search.note_unfit(hello, unfit, EXIT_USAGE)
            return self.link.fail(unfit)
        log.note("offer from %s (%s): load %.3f, it waited %.1f ms",
                 hello.address, hello.host, hello.load / 1000, hello.delay / 1000)
        self.hello, self.ready_at = hello, time.monotonic()
        self.search.worker_answered()
        self.search.choose()

    def ask(self, secret, job_fields):
        """Sends AUTH and JOB."""
        self.asked = True
        proof, frames = client_proof(secret, self.hello.challenge, self.hello.nonce), job_frames(**job_fields)
        self.unconfirmed = len(frames) - 1
        self.link.send_frames([make_frame(AUTH, proof=proof), *frames])

    def rcvd_pong(self, flags, channel, payload):
        """A part of the job's words has arrived: the worker has more time for the rest."""
        self.unconfirmed -= 1
        if self.unconfirmed < 0:
            raise ProtocolError("PONG out of place")
        self.timer.cancel()
        self.timer = self.search.loop.after(OFFER_SECONDS, self.silent)
        self.search.worker_answered()

    def rcvd_accept(self, flags, channel, payload):
        """Sends GO: from now on the job may run, and the link belongs to the patron."""
        self.timer.cancel()
        self.link.send(GO)
        self.search.won(self)

    def rcvd_refuse(self, flags, channel, payload):
        if payload.status not in (0, EXIT_CANNOT_RUN, EXIT_NOT_FOUND):
            raise ProtocolError("an impossible REFUSE: status %d" % payload.status)
        self.search.refused(self, payload.status, cut(payload.reason, 400))
        self.link.fail("refused: " + payload.reason)

    def link_writable(self, link):
        pass                        # before GO no stream waits for room: the link queues the words

    def link_lost(self, link, reason, violation):
        self.search.dropped(self, reason, violation)

    def close(self):
        self.timer.cancel()
        self.link.close()


class Avoided:
    """Workers that are not asked: for ever, or for a time that doubles each time."""

    def __init__(self, seconds=1.0):
        self.first = seconds
        self.until, self.seconds = {}, {}           # worker_id: until when (monotonic); the last length of time
        self.refusals = Refusals()  # what they have said
        self.has_worked = False     # whether a command has run anywhere: then a refusal is no reason to give up

    def __contains__(self, worker_id):
        return time.monotonic() < self.until.get(worker_id, 0.0)

    def for_good(self, worker_id):
        self.until[worker_id] = float("inf")

    def is_for_good(self, worker_id):
        return self.until.get(worker_id) == float("inf")

    def for_now(self, worker_id, least=0.0):
        """Returns for how many seconds, least at least."""
        seconds = max(least, min(AVOID_MAX, 2 * self.seconds.get(worker_id, self.first / 2)))
        self.seconds[worker_id], self.until[worker_id] = seconds, time.monotonic() + seconds
        return seconds

    def now(self):
        """Returns those that are not asked now."""
        return [worker_id for worker_id in self.until if worker_id in self]

    def worked(self, worker_id):
        """A command has run there."""
        self.has_worked = True
        self.refusals.forget(worker_id)

    def ask_again(self, worker_id):
        """It may be asked at once; if it refuses again, it is avoided for longer."""
        self.until.pop(worker_id, None)

    def forgive(self, worker_id):
        self.seconds.pop(worker_id, None)


class Refusals:
    """What workers have said that do not do a job.

    The exit code is 127 or 126 if the command is not there or cannot be run, 100 if the worker takes no such jobs,
    and 111 if it may take the job later.
    """

    def __init__(self):
        self.said = {}              # worker_id: (its name, why, the exit code)

    def add(self, worker_id, name, why, code):
        self.said[worker_id] = name, why, code

    def forget(self, worker_id):
        self.said.pop(worker_id, None)

    def text(self, only, codes):
        """Returns (what workers, or only this one, have said with such codes, the first code); ("", 0) if none."""
        said = [row for worker_id, row in self.said.items() if only in (ANY_WORKER, worker_id) and row[2] in codes]
        found = {}
        for name, why, _ in said:
            found.setdefault(why, []).append(name)
        texts = ["worker %s %s%s" % (first, why, "; the same on " + ", ".join(others) if others else "")
                 for why, (first, *others) in found.items()]
        return "; ".join(texts), min((code for _, _, code in said), key=codes.index, default=0)

    def unable(self):
        """Returns the ids of workers that cannot do the job."""
        return [worker_id for worker_id, (_, _, code) in self.said.items() if code in CANNOT]

    def tell_user(self):
        """Tells the user once which workers cannot do the job, when another one does it."""
        for name, why, code in self.said.values():
            if code in CANNOT:
                log.once("worker %s %s" % (name, why), say=log.tell_user)


# The exit codes for workers that cannot do a job.  As with exec, "cannot be run" counts more than "is not there".
CANNOT = EXIT_CANNOT_RUN, EXIT_NOT_FOUND, EXIT_USAGE


def source_of(name, inputs):
    """Returns the path of what the inputs, Listings or texts of -i, send as a relative name; None if they do not."""
    name = os.fsencode(os.path.normpath(name))
    for item in inputs:
        with suppress(OSError):     # a text with placeholders is no file
            path, there = item[:2] if isinstance(item, Listing) else named_there(item)
            if name == there:
                return path
            inner = name if there == WHOLE else name[len(there) + 1:]
            if is_within(name, there) or there == WHOLE and not is_within(name, b".."):
                return os.path.join(path, inner)
    return None


def how_to_send(name):
    there = "./" + os.path.basename(name) if ".." in name.split("/") else name
    return "-i %s sends it%s" % (name, "" if there == name else ", and it is %s there" % there)


def not_found_hint(reason, options, terms):
    """Returns what the user may have meant, if the command that is not there is the client's word; else ""."""
    name = reason.rpartition(": ")[0]
    if not options & HELLO_NO_COMMAND:
        return ""
    if name.startswith("-"):
        return " (options come before the public key)"
    if " " in name:
        return " (no shell reads this: write the arguments as words of their own, or use sh -c)"
    if not options & HELLO_DIRECTORIES or name.startswith("/") or not os.path.isfile(name):
        return ""
    if "/" not in name:
        return " (a file here: as a command it is ./%s; a pattern of -g needs quotes)" % name
    source = source_of(name, terms.inputs)
    if source is None:
        return " (it is here: %s)" % how_to_send(name)
    with suppress(OSError), open(source, "rb") as file:
        line = file.readline(80).rstrip(b"\n")
        if line.startswith(b"#!"):
            return " (its first line names a program that is not there: %s)" % printable(line.decode("latin-1"))
    return ""


def ports_here(port):
    """What a firewall of this machine must let in, if answers come to this port now."""
    ports = os.environ.get("CEXEC_LISTEN_PORTS")
    return "ports %s (CEXEC_LISTEN_PORTS)" % ports if ports else (
        "port %d (another each time: set CEXEC_LISTEN_PORTS)" % port)


def tcp_blocked(port):
    return ("the workers answer, but their connections do not arrive: let TCP to %s in through the firewall of this "
            "machine, and TCP out through theirs" % ports_here(port))


def ask_of_firewalls(port, group):
    """What to look at if nothing is heard at a port of this machine.  The workers' answers to a broadcast are no
    answers for a firewall here that lets nothing in but these, as most desktops have."""
    theirs = ", ".join(sorted({str(target.port) for target in group.targets}))
    return ("does the firewall of this machine let UDP and TCP to %s in? do those of the workers let UDP to port %s in?"
            % (ports_here(port), theirs))


class Search:
    """Announces a job until a worker has accepted it, then calls patron.begin().

    quiet: the patron shows on the terminal what we wait for.  only: the id of the one worker that may do the job.
    """

    def __init__(self, loop, group, pub, terms, patron, avoid, quiet, only=ANY_WORKER):
        self.loop, self.group, self.pub, self.terms = loop, group, pub, terms
        self.patron, self.quiet, self.only = patron, quiet, only
        self.token = os.urandom(32)
        self.nonce = token_nonce(self.token)
        self.candidates, self.avoid, self.complained = [], avoid, set()
        self.offers = self.attempt = 0
        self.context = None
        self.chosen = self.job = None                # the Candidate to which we sent a job, and this job
        self.back = ReturnPort(terms.ports, loop, group.families())
        self.timer = NO_TIMER       # of the next announcement
        self.began = self.last_answer = time.monotonic()
        self.ahead = None           # how many clients are before us in the line, from the last BUSY
        self.stranger = None        # a text: the address of a worker with another protocol version, and this version
        self.shown = self.told = ""             # our text on the terminal; the same for an Executor
        self.unfit_timer = None     # for insist()
        self.busy = {}              # a worker_id: when its last BUSY came; it may be able to do the job
        self.excluded = set()       # addresses of workers that answered, and that we do not accept
        self.losers = set()         # the same of those that have lost this job before
        self.arrived = self.blocked = False         # a connection came; a worker says that its connections fail

    def start(self):
        """Announces the job, and then takes offers.

        ssl takes long to import, so this comes after the announcement: workers connect at the same time.
        """
        self.announce()
        if self.refusal()[0]:
            self.await_others()
        self.context = tls_context()
        self.back.attend(self.hear, self.accept, self.hear_stranger, lambda: self.drop_quiet(8))

    def pause(self):
        """The seconds until the next announcement; announce() varies them by a quarter."""
        seconds = min(1.0, 0.050 * 2 ** min(self.attempt - 1, 10))
        return max(seconds, len(self.group.targets) * SECONDS_A_WAY)

    def announce(self):
        """Sends ANNOUNCE and sets the timer for the next, or gives up if the time is over."""
        now = time.monotonic()
        accept, wait = self.terms.accept_seconds, self.terms.wait_seconds
        if accept and self.ahead is not None:           # BUSY comes only every BUSY_SECONDS: wait longer than that
            accept = max(accept, BUSY_SECONDS + 2 + 1.25 * len(self.group.targets) * SECONDS_A_WAY)
        if accept and now - self.last_answer > accept or wait and now - self.began > wait:
            message, code = self.refusal()
            if not message or self.avoid.has_worked:
                message, code = self.why_none(now), EXIT_TEMPORARY
            return self.patron.not_found(self, message, code)
        self.attempt += 1
        self.tell()
        pause = self.pause()
        ways = self.send(ANNOUNCE, attempt=self.attempt, waited=u32((now - self.began) * 1000),
                         pause=u32(pause * 1250), batch=self.terms.batch, only=self.only)
        log.note("ANNOUNCE %s try %d, %d ways", self.nonce.hex()[:8], self.attempt, ways)
        self.timer = self.loop.after(pause * (0.75 + random_fraction() / 2), self.announce)

    def waits(self):
        """A text for the terminal: what the search waits for; "" in its first seconds."""
        if self.ahead is not None:
            return "in line, %d ahead" % self.ahead
        late = time.monotonic() - self.began >= TELL_SECONDS
        return "looking for a worker (cexec -l finds out more)" if late else ""

    def tell(self):
        """Shows on a terminal what the search waits for, until the job begins."""
        text = self.waits()
        quiet = log.verbose or self.quiet
        if text != self.told:
            self.told = text
            self.terms.tell_waiting(text)
        if text != self.shown and not quiet and os.isatty(log.fd) and in_foreground(log.fd):
            self.shown = text
            log.status_line(text)

    def why_none(self, now):
        """Why no worker was found."""
        if self.back.lack:
            return "no worker's connection could be taken in %d s: %s" % (now - self.began, self.back.lack)
        if self.blocked:
            return "no worker reached us in %d s: %s" % (now - self.began, tcp_blocked(self.back.port))
        refusal, _ = self.avoid.refusals.text(self.only, (*CANNOT, EXIT_TEMPORARY))
        if refusal:
            return "no worker took the job in %d s: %s" % (now - self.began, refusal)
        if self.ahead is not None:
            return "no worker was free in %d s (%d ahead in line)" % (now - self.began, self.ahead)
        silence = now - self.last_answer
        if self.group.failed_hosts():
            return "no worker answered in %d s: %s: does not serve any more" % (
                silence, ", ".join(self.group.failed_hosts()))
        if self.excluded:
            return ("%d of the workers answered in %d s and were not allowed (CEXEC_ACCEPT_SERVER, "
                    "CEXEC_REJECT_SERVERS): %s" % (len(self.excluded), silence,
                                                   ", ".join(sorted(self.excluded)[:8])))
        if self.losers:
            lost_by = ", ".join(sorted(self.losers))
            return "no other worker answered in %d s: %s lost the job before" % (silence, lost_by)
        if self.group.error and self.attempt and not self.offers:
            hint = "%s; is there a network? see GROUP in cexec(1)" % self.group.error
        else:
            hint = self.stranger or "is cservice running with this key?" + (
                "" if self.group.is_here() else " " + ask_of_firewalls(self.back.port, self.group))
        return "no worker answered in %d s on %s (%s): cexec -l finds out more" % (silence, self.group.text, hint)

    def send(self, kind, **fields):
        pub = self.pub
        return self.group.send(self.back.udp, make_datagram(kind, pub.application, pub.name, pub.secret,
                                                            self.nonce, self.back.port, **fields))

    # Answers in datagrams: BUSY

    def worker_answered(self):
        """A worker is there: the time in which one must answer begins again."""
        self.last_answer = time.monotonic()

    def hear_stranger(self, address, error):
        self.stranger = "%s speaks %s" % (address, error)

    def hear(self, datagram, address):
        handler = handler_of(self, datagram.kind)
        if not handler or datagram.nonce != self.nonce or not datagram.proved_by(self.pub.secret):
            return log.note("dropped %r", datagram)
        handler(datagram, address)

    def rcvd_busy(self, datagram, address):
        """A worker has us in its line, or its connections to us fail."""
        if datagram.body.attempt < self.attempt - FRESH_TRIES:
            return log.note("dropped %r: it is old", datagram)
        if is_address(datagram.body.address):
            address = datagram.body.address         # it came through ssh
        if address in self.excluded or not self.terms.servers.may_allow(address):
            return self.not_allowed(address)
        if datagram.body.failures:
            return self.not_reached(address)
        self.worker_answered()
        self.busy[datagram.body.worker_id], self.ahead = time.monotonic(), datagram.body.ahead
        log.note("every slot of a worker is busy, %d ahead of us", self.ahead)
        self.tell()

    def is_in_line(self, but=()):
        """Whether a worker has us in its line that is none of these."""
        since = time.monotonic() - BUSY_SECONDS - 2
        return any(when >= since for worker_id, when in self.busy.items() if worker_id not in but)

    def may_ask(self, worker_id):
        return (worker_id not in self.avoid and self.only in (ANY_WORKER, worker_id)
                and self.patron.has_job_for(worker_id))

    def not_asked(self, address, worker_id):
        """Remembers a worker that has lost this job."""
        if self.avoid.is_for_good(worker_id):
            self.losers.add(address)

    def not_allowed(self, address):
        """Remembers a worker that CEXEC_ACCEPT_SERVER and CEXEC_REJECT_SERVERS exclude."""
        log.note("answer of %s rejected (CEXEC_ACCEPT_SERVER, CEXEC_REJECT_SERVERS)", address)
        self.excluded.add(address)

    def not_reached(self, address):
        """A worker says that its connections to us fail.  If no connection arrives at all, a firewall blocks them."""
        log.note("connections of %s to us fail", address)
        if not self.arrived and not self.back.lack:
            self.blocked = True
            self.loop.after(1.0, self.say_blocked)      # perhaps we were stopped, and a connection arrives now

    def say_blocked(self):
        if self.blocked:
            self.say_once(tcp_blocked(self.back.port), tcp_blocked)         # another search has another port

    def say_once(self, message, topic=None):
        log.once(message, topic)
        self.terms.tell_waiting(message)

    # Offers

    def refusal(self):
        """Returns (what the workers have said that cannot do the job, the exit code); ("", 0) if none has."""
        return self.avoid.refusals.text(self.only, CANNOT)

    def note_unfit(self, hello, why, code):
        """This worker cannot do the job.  Others may: they have a second more to offer."""
        self.avoid.refusals.add(hello.worker_id, self.patron.called(hello), why, code)
        self.await_others()

    def await_others(self):
        if not self.unfit_timer:
            seconds = UNFIT_SECONDS if self.only == ANY_WORKER else 0
            self.unfit_timer = self.loop.after(seconds, self.insist)

    def insist(self):
        """Gives up, unless we have asked a worker, or one has us in its line, or has done such a job.

        Only the offer of a busy worker will tell whether it can do the job.
        """
        message, code = self.refusal()
        busy = self.chosen or self.is_in_line(self.avoid.refusals.unable())
        if message and (self.only != ANY_WORKER or not busy and not self.avoid.has_worked):
            return self.patron.not_found(self, message, code)
        if message and not self.chosen and not self.avoid.has_worked:
            self.say_once(message + "; waits for a worker that is busy")
        self.unfit_timer = self.loop.after(UNFIT_SECONDS, self.insist)

    def accept(self, sock, address):
        """A worker has connected."""
        self.arrived, self.blocked = True, False
        self.offers += 1
        if len(self.candidates) >= 128 and not self.drop_quiet(1):      # a flood
            return sock.close()
        self.candidates.append(Candidate(self, sock, address))

    def drop_quiet(self, count):
        """Closes the oldest connections on which no HELLO came, so many at most.  Returns their number."""
        quiet = [c for c in self.candidates if not c.hello][:count]
        for candidate in quiet:
            candidate.close()
            self.candidates.remove(candidate)
        return len(quiet)

    def choose(self):
        """Asks the worker that has connected first, because the least loaded worker waits least.

        If its HELLO is slow, the first one that is ready gets the job after HEAD_START.
        """
        ready = [c for c in self.candidates if c.hello and not c.asked]
        if self.chosen or not ready:
            return
        wait = ready[0].ready_at + HEAD_START - time.monotonic()
        if ready[0] is self.candidates[0] or wait <= 0:
            self.ask(ready[0])
        else:
            self.loop.after(wait, self.choose)

    def ask(self, candidate):
        job = self.patron.assign(self, candidate.hello.worker_id)
        if job:
            self.chosen, self.job = candidate, job
            candidate.ask(self.pub.secret, job.job_fields())
        elif candidate in self.candidates:
            candidate.link.fail("no job is left for this worker")

    def take_job(self):
        """Gives away the job that we asked a worker to do.  Returns None if there is none."""
        job, self.chosen, self.job = self.job, None, None
        return job

    def refused(self, candidate, status, reason):
        """This worker has not the command, or cannot take the job now: it is not asked for some seconds."""
        hello = candidate.hello
        self.worker_answered()
        hint = not_found_hint(reason, hello.options, self.terms) if status == EXIT_NOT_FOUND else ""
        why = "cannot run its command: " + reason + hint
        if status and hello.options & HELLO_NO_COMMAND and self.job.has_own_command():
            return self.patron.note_lacking(hello, self.job, why, status)
        self.avoid.for_now(hello.worker_id)
        if status:
            self.note_unfit(hello, why, status)
        else:
            name = self.patron.called(hello)
            self.avoid.refusals.add(hello.worker_id, name, "refused it: " + reason, EXIT_TEMPORARY)

    def dropped(self, candidate, reason, violation):
        """An offer's connection has ended before GO."""
        log.note("offer from %s: %s", candidate.address, reason)
        candidate.close()
        if candidate in self.candidates:
            self.candidates.remove(candidate)
        if self.chosen is candidate:
            self.patron.put_back(self.take_job())
        if violation:
            if isinstance(violation, OtherVersion):
                self.hear_stranger(candidate.address, violation)
            self.offers -= 1
            if candidate.address not in self.complained and len(self.complained) < 16:
                self.complained.add(candidate.address)
                self.complain(candidate, reason)
        self.choose()

    def complain(self, candidate, reason):
        """The sender of an offer has broken the protocol.  After GO Alerts.complain() sends this datagram."""
        hello = candidate.hello
        self.send(COMPLAINT, worker=cut(candidate.address, 64),
                  host=cut(hello.host, 64) if hello else "", worker_id=hello.worker_id if hello else bytes(8),
                  milliseconds=u32((time.monotonic() - self.began) * 1000), bytes_in=0, bytes_out=0,
                  reason=cut(reason, 400))

    def won(self, candidate):
        """GO was sent: the search is over."""
        # The order matters.  end() closes every candidate that it knows and gives a job back to the patron: so
        # the winner and its job leave the search first.  CLAIM, which end() sends, comes after GO: it ends the
        # other workers' offers, and if GO had not been sent, nobody would do the job.
        self.candidates.remove(candidate)
        self.avoid.refusals.tell_user()
        job = self.take_job()
        self.end()
        self.patron.begin(self, candidate, job)

    def end(self):
        """Ends announcements and offers: the job was begun or given up.  CLAIM tells all workers to forget it."""
        if self.shown:
            log.status_line("")
        self.send(CLAIM, token=self.token, offers=min(self.offers, 0xffff))
        self.timer.cancel()
        if self.unfit_timer:
            self.unfit_timer.cancel()
        for candidate in self.candidates:
            candidate.close()
        self.candidates = []
        job = self.take_job()
        if job:
            self.patron.put_back(job)
        self.back.close()


# ---------------------------------------------------------------------------
# cexec: the job
# ---------------------------------------------------------------------------
#
# After GO the job runs at a worker; at the client it is a RemoteRun: a Run, a FileRun (-m, -b) or a
# HostRun (-A).  If the connection breaks then, the worker ends the command (Supervisor.abandon), and
# the client does this:
#
#   link_lost --> Patron.run_lost --+-- Patron.objection() is None --> job.rewind(run), then Patron.run_again(run)
#                                   '-- a text ----------------------> Patron.failed(run, reason, text)
#
# The text comes from the job: a Job runs again with -r or cservice -i, and only while nothing of it was
# shown; a Task always; a HostTask never.  CEXEC_RETRIES bounds that for all.  Of each loss crat and
# the worker are told, by Alerts.complain.  A FileRun whose job was not begun is no loss: see FileRun.link_lost.
MAXFD = 32                          # descriptors below this number are carried


class Job(Terms):
    """The single job of cexec, with the descriptors of this process."""

    name = ""                       # for messages

    def __init__(self, environment, arguments=(), empty=None, repeat=False, terminal=False, progress=False,
                 inputs=(), results=()):
        super().__init__(environment, arguments, inputs=inputs, results=results)
        self.limit = setting("CEXEC_MAXFD", setting("MAXFD", MAXFD, 3, MAXFD_LIMIT), 3, MAXFD_LIMIT)
        self.repeat = repeat
        self.progress = progress    # cexec -p
        self.report = setting("CEXEC_FD_FOR_ERRORS", -1, self.limit, 2 ** 20,
                              "; CEXEC_MAXFD, which can be lowered, is %d" % self.limit)
        self.start_report = setting("CEXEC_FD_FOR_START", -1, self.limit, 2 ** 20)
        if self.start_report >= 0:              # an Executor's
            self.command_remedy = "for calls it is `cservice KEY python3 /dev/fd/3`"
        self.channels = inherited_channels(self.limit)
        make_room(self.limit, len(self.channels) + 16)      # each is opened again; a search needs some too
        self.terminal = None        # the TerminalEnd of -t
        joined = join_terminal(self.channels) if terminal else None
        if terminal and not joined:
            log.say("-t: no descriptor here is a terminal, so the command has none")
        self.empty = {channel for channel in self.channels
                      if empty == "all" or empty and self.has_number(channel, number_of(empty))}
        if joined and joined[0].number in self.empty:
            raise Fatal(EXIT_USAGE, "-n and -t: the terminal cannot be empty: leave one of them out")
        self.replay = None          # the ReplayBuffer, if the job may be run again
        self.losses, self.told_to_end = 0, False
        if self.report >= 0:
            with or_fatal("CEXEC_FD_FOR_ERRORS=%d" % self.report, EXIT_USAGE):
                os.fstat(self.report)

    def tell_waiting(self, text):
        self.tell_executor("- " + text)

    def tell_executor(self, line):
        """Tells an Executor, which has started us, what we wait for, or what worker has the job."""
        if self.start_report >= 0:
            with suppress(OSError):             # it has ended
                write_all(functools.partial(os.write, self.start_report), printable(line).encode() + b"\n")

    def tell(self, code, word, worker="-", seconds=0.0):
        """Writes the line for CEXEC_FD_FOR_ERRORS."""
        if self.report >= 0:
            line = "worker=%s seconds=%.3f status=%d %s\n" % (worker, seconds, code, printable(word))
            try:
                os.write(self.report, line.encode())
            except OSError as error:
                log.say("CEXEC_FD_FOR_ERRORS=%d: %s" % (self.report, error.strerror))

    def open_ends(self, floor, signalled):
        """Opens an End for each channel, once for all runs; signalled is for the TerminalEnd."""
        self.ends = {}
        for channel, members in self.channels.items():
            halves = ["read"] * members[0].readable + ["write"] * members[0].writable
            self.ends[channel] = local_end(members, halves, floor, signalled)
            if isinstance(self.ends[channel], TerminalEnd):
                self.terminal = self.ends[channel]
                at_end.append(self.terminal.restore)
        self.positions = {channel: SavedPosition(members[0]) for channel, members in self.channels.items()}

    def has_number(self, channel, number):
        return number in [member.number for member in self.channels[channel]]

    def rows(self):
        """JOB's rows: the descriptor's number in the command, its channel, flags."""
        rows = []
        for channel, members in sorted(self.channels.items()):
            item = members[0]
            flags = FLAG_INPUT * item.readable | FLAG_OUTPUT * item.writable
            flags |= FLAG_COUNTED * (item.kind == FILE and item.readable)
            if item.readable and item.writable:
                flags |= FLAG_TERMINAL if item.kind == TERMINAL else FLAG_SOCKET
            rows += [(member.number, channel, flags) for member in members]
        return rows

    def job_fields(self):
        fields = dict(super().job_fields(), descriptors=self.rows() + self.file_rows())
        if self.terminal:
            term = os.environ.get("TERM", "")
            fields.update(self.terminal.size(), term=term if is_name(term) else "dumb",
                          modes=terminal_modes(self.terminal.fd))
        return fields

    # Another run, after a worker was lost

    def keep_input(self):
        """The job may be run again: from now on its input is kept."""
        self.replay = self.replay or ReplayBuffer()

    def tell_to_end(self):
        """The user has sent a signal that ends commands: the job will not run again."""
        self.told_to_end = True

    def objection(self, run):
        """Why the job does not run again after this run; None if it does, "" if neither side allows it (-r, -i)."""
        if self.replay is None:
            return ""
        if self.told_to_end:
            return "it was told to end"
        if run.trouble:
            return run.trouble
        found = (position.objection(run.channels[number], self.replay) for number, position in self.positions.items())
        return next(filter(None, found), None)

    def rewind(self, run):
        """Puts descriptors and input back to their state before this run."""
        self.losses += 1
        for channel, position in self.positions.items():
            position.restore(run.channels[channel].written)
            self.reopen(channel)
        self.replay.rewind()

    def reopen(self, channel):
        """Gives the next run an End that it can use; a closed one is replaced by /dev/null or the file itself."""
        end, item = self.ends[channel], self.channels[channel][0]
        if item.kind == FILE and item.readable:
            self.ends[channel] = FileEnd(item.number, self.positions[channel].offset)
        elif item.kind == FILE or not end.halves:
            halves = ["read"] * item.readable + ["write"] * item.writable
            self.ends[channel] = End(item.number, item.number, lambda: None, halves)


class SavedPosition:
    """A descriptor's state before the job, at which another run can begin."""

    def __init__(self, item):
        self.item, self.number = item, item.number
        self.is_file = item.kind == FILE
        if self.is_file:
            self.offset, self.size = os.lseek(self.number, 0, os.SEEK_CUR), os.fstat(self.number).st_size

    def objection(self, channel, replay):
        """Why the effects of this run on the descriptor cannot be undone; None if they can."""
        source, sink, written = channel.source, channel.sink, channel.written
        # A regular file: an input is read again from its offset, and needs no replay buffer.  An output
        # is cut back to its old size, if only our bytes were added to it.
        if self.is_file:
            if written and not self.can_cut(written):
                return "the file on descriptor %d cannot be cut back" % self.number
            return None
        # A pipe, socket or terminal gives each byte once: the next run reads it from the replay buffer.
        if source and replay.overflowed:
            return "more than %d MiB of input were read" % (HELD_MAX // 2 ** 20)
        # An output there cannot be taken back: its reader may have seen it.
        if written:
            return "descriptor %d was written to" % self.number
        # An input at its end is no obstacle: the next run finds the end too.  But if the command closed
        # a descriptor, the process at the other end of the socket or pipe may have seen that.
        if source and source.state is not OPEN and (source.state is SHUTDOWN or sink):
            return "descriptor %d was closed" % self.number
        if sink and not sink.is_live():
            return "descriptor %d was closed" % self.number
        return None

    def can_cut(self, written):
        """Whether the file is now its old contents and our bytes after them, and nothing else."""
        now = self.offset + written
        return (not self.item.flags & os.O_APPEND and self.offset == self.size and
                os.lseek(self.number, 0, os.SEEK_CUR) == now == os.fstat(self.number).st_size)

    def advance(self, count):
        """Moves the offset of an input that is a regular file behind the bytes that the command has taken.

        We have read more, at an offset of our own.  The common offset must be where a local command
        would have left it, because the shell's next command begins there.
        """
        if self.is_file and count:
            with noting("descriptor %d", self.number):          # some files in /proc
                os.lseek(self.number, self.offset + count, os.SEEK_SET)

    def restore(self, written):
        """Cuts an output that is a regular file, to which so many bytes were written, back to its old size.

        Raises OSError.
        """
        if self.is_file and written:
            os.ftruncate(self.number, self.size)
            os.lseek(self.number, self.offset, os.SEEK_SET)


class Outcome:
    """How a job has ended.  Only RemoteRun.outcome(), failure() and loss() decide it; the modes tell it.

    exit_code: 0 is a success; signal: the number of the one that has killed the command, or 0;
    reason: what the exit code does not say, for people; word: for CEXEC_FD_FOR_ERRORS;
    lead and hint are for people too: who says the reason, and what the user may have meant.
    kind: how the word begins: "failed" is here, "lost" is the worker.
    """

    def __init__(self, exit_code, word, reason="", signal=0, lead="", hint=""):
        self.exit_code, self.word, self.reason, self.signal = exit_code, word, reason, signal
        self.lead, self.hint, self.kind = lead, hint, word.partition("=")[0]

    def cause(self):
        """Returns why it is no success, in a few words."""
        return "killed by signal %d" % self.signal if self.signal else self.reason or "exit status %d" % self.exit_code

    def common_cause(self):
        """Returns the cause without the names before it, which differ from job to job: for a sum of many."""
        return self.cause().rpartition(": ")[2] if self.kind == "failed" else self.cause()

    def text(self):
        """Returns the cause, and perhaps what to do."""
        return self.lead + self.cause() + self.hint

    def record_fields(self):
        """Returns what OUTCOME tells of it.  how is HOW_EXITED for all without a signal, even if nothing has run."""
        return {"how": HOW_SIGNALLED if self.signal else HOW_EXITED, "status": self.signal or self.exit_code,
                "reason": cut(self.reason, 400)}


def failure(reason, exit_code=EXIT_TEMPORARY, hint=""):
    """Returns the Outcome of a job that failed here, or that no worker took."""
    return Outcome(exit_code, "failed=%s" % reason, reason, hint=hint)


def loss(reason):
    """Returns the Outcome of a job whose worker was lost."""
    return Outcome(EXIT_TEMPORARY, "lost=%s" % reason, "worker lost: " + reason)


class RemoteRun(Carrier):
    """A job after GO, at the client: the common part of Run and FileRun.  The worker's part is a Command.

    exited(rows) is called when EXIT has come; rows are {channel: (bytes sent, bytes taken)}.  detach() stops
    using the descriptors: another run gets them.
    """

    def __init__(self, patron, link, hello, job):
        super().__init__(patron.loop, link)
        self.patron, self.hello, self.job = patron, hello, job
        self.address = hello.address            # the worker's
        self.worker = patron.called(hello)      # its name for messages
        self.silence_seconds = patron.terms.silence_seconds
        self.exit = None            # EXIT's fields, once it has come
        self.trouble = None         # the text of the first error with a descriptor or a file here
        self.files = None           # the JobFiles, with -i or -g
        self.began = self.last_tick = time.monotonic()
        self.tick = self.loop.after(self.tick_seconds(), self.send_ping)
        link.attach(self.loop, self)

    def rcvd_exit(self, flags, channel, payload):
        """Checks that a job can end so, and that all output has come that EXIT counts."""
        self.check_result(payload)
        rows = {number: (sent, taken) for number, sent, taken in payload.channels}
        for number, channel in self.channels.items():
            if channel.sink and not channel.sink.has_all(rows.get(number, (None,))[0]):
                raise ProtocolError("output is missing on descriptor %d" % number)
        self.exit = payload
        self.tick.cancel()          # the command has ended: no more PING, and no more input
        self.stop_sources()
        self.exited(rows)

    def check_result(self, result):
        """Raises ProtocolError for an EXIT of no command: so status 0 is always that of a command that has exited."""
        how, status, reason = result.how, result.status, result.reason
        if how == HOW_EXITED:       # a reason tells why the results could not be packed
            possible = not reason or status == 0 and FILES_OUT in self.channels
        elif how == HOW_SIGNALLED:
            possible = 0 < status < EXIT_SIGNAL and not reason
        else:
            possible = (how in NOT_STARTED and not result.more
                        and status in (EXIT_TEMPORARY, EXIT_CANNOT_RUN, EXIT_NOT_FOUND))
        if not possible or result.more > 1:
            raise ProtocolError("an impossible EXIT: how %d, status %d, more %d" % (how, status, result.more))

    def outcome(self):
        """Returns the Outcome, when all output was written here, or could not be."""
        how, status = self.exit.how, self.exit.status
        if self.trouble:
            return failure(self.trouble)
        cut = any(channel.sink and channel.sink.has_cut() for channel in self.channels.values())
        if how == HOW_EXITED and status == 0 and cut:
            how, status = HOW_SIGNALLED, int(signal.SIGPIPE)        # as if it had written to the pipe here
        if how == HOW_SIGNALLED:
            return Outcome(EXIT_SIGNAL + status, "signalled=%d" % status, signal=status)
        if how in NOT_STARTED:
            lead = "worker %s cannot run its command: " % self.worker
            return Outcome(status, "notstarted=%d" % status, self.exit.reason, lead=lead, hint=self.hint())
        return Outcome(status, "exited=%d" % status, self.exit.reason, hint=self.hint())

    def hint(self):
        """Returns what the user may have meant, if the command is not there."""
        if self.exit.status != EXIT_NOT_FOUND:
            return ""
        return not_found_hint(self.exit.reason, self.hello.options, self.patron.terms)

    # Its files

    def begin_files(self, listings, patterns, claim=None, directory=""):
        """Begins to send the files of -i, and to receive those of -g: see JobFiles.  Raises Fatal (111)."""
        if listings or patterns:
            with or_fatal("the files of -i and -g"):
                self.files = JobFiles(self, listings, patterns, self.files_ended, claim, directory)

    def files_ended(self, trouble):
        self.trouble = self.trouble or trouble
        self.stream_ended()

    def judge_files(self):
        """After EXIT, when all bytes have come: has the results of -g get their names if the command has succeeded."""
        if self.files:
            success = self.exit.how == HOW_EXITED and self.exit.status == 0
            if success and self.exit.reason:
                self.trouble = self.trouble or "worker %s cannot send results: %s" % (self.worker, self.exit.reason)
            self.files.stop()
            self.files.approve() if success and not self.trouble else self.files.drop()

    def files_are_over(self):
        """Whether the results of -g have their names, or will not get them; trouble tells why."""
        return not self.files or not self.files.helpers

    def close_files(self):
        if self.files:
            self.files.close()

    def rcvd_pong(self, flags, channel, payload):
        pass                        # the link has noted the sign of life

    def moved(self):
        """Returns (bytes sent to the worker, bytes received from it)."""
        return (sum(channel.sent for channel in self.channels.values()),
                sum(channel.received for channel in self.channels.values()))

    def record_fields(self):
        """Returns what OUTCOME and COMPLAINT both tell of the run."""
        sent, received = self.moved()
        return {"worker": cut(self.address, 64), "host": cut(self.hello.host, 64), "bytes_in": sent,
                "bytes_out": received, "milliseconds": u32((time.monotonic() - self.began) * 1000)}

    # Signs of life

    def tick_seconds(self):
        return min(PING_SECONDS, self.silence_seconds / 3)

    def silent_for(self):
        """Returns "silent for 40 s, lost after 60" once a PING has not been answered in time, else ""."""
        silence = self.link.silence()
        if self.exit or silence < 1.5 * self.tick_seconds():
            return ""
        return "silent for %d s, lost after %d" % (silence, self.silence_seconds)

    def send_ping(self):
        """Sends PING; a worker that has been silent for too long is lost."""
        now, interval = time.monotonic(), self.tick_seconds()
        if now - self.last_tick > interval * 2:
            self.link.excuse_silence()          # this process was stopped, and read nothing
        self.last_tick = now
        self.link.check_delivery()
        left = self.silence_seconds - self.link.silence()
        if left <= 0:
            return self.link.fail("no sign of life for %d s" % self.silence_seconds)
        self.link.send(PING)
        self.tick = self.loop.after(min(interval, left + 0.01), self.send_ping)
        self.patron.watch(self)


class Run(RemoteRun):
    """One run of a single job, with the descriptors of this process."""

    def __init__(self, client, link, hello, job):
        super().__init__(client, link, hello, job)
        self.exit_code = None       # cexec's, once the run is over
        self.interrupted_at = 0.0   # when the last INT came
        log.leave_2(self.loop.floor)
        for number, end in job.ends.items():
            channel = self.carry(number, end, None if job.positions[number].is_file else job.replay)
            if channel.source and number in job.empty:
                channel.source.leave_alone()
        self.begin_files(job.inputs, job.results)
        if job.terminal:
            self.take_terminal()

    # What the worker tells us

    def exited(self, rows):
        self.link.close()
        for number, channel in self.channels.items():
            if number in rows and number in self.job.positions:
                # The worker tells how many bytes the command has taken.  The bytes in pipes and
                # buffers on the way count as never read.  We do not believe more than we sent.
                self.job.positions[number].advance(min(rows[number][1], channel.sent))
        self.stream_ended()

    def rcvd_linger(self, flags, channel, payload):
        if os.isatty(2):
            log.say("the command has ended with status %d; a process that it left behind holds its output "
                    "(CEXEC_TIMEOUT_LINGER limits the wait)" % payload.status)

    def link_lost(self, link, reason, violation):
        if self.exit_code is None:
            self.patron.run_lost(self, reason)

    def let_go_of_stderr(self):
        """Releases the log's copy of 2, if the command has closed 2 and goes on.

        So the reader there sees the end of file at once, as with a local command, and not at the end
        of the job.  A file or a terminal has no such reader: then the log keeps its copy.
        """
        closed = any(self.job.has_number(number, 2) and members[0].kind in (PIPE, SOCKET)
                     and self.channels[number].sink and not self.channels[number].is_writing()
                     for number, members in self.job.channels.items())
        if closed and self.exit is None:
            log.return_to_2()

    # The descriptors here

    def detach(self):
        self.tick.cancel()
        if self.job.terminal:
            self.job.terminal.restore()
        log.status_line("")
        log.return_to_2()
        self.close_files()
        self.stop_channels()

    def local_error(self, channel, error):
        if not self.trouble:
            name = STANDARD[channel] if channel < 3 else "descriptor %d" % channel
            self.trouble = "%s: %s" % (name, error.strerror)

    def stream_ended(self):
        """After EXIT the job is over when every output has been written here."""
        if self.exit is None:
            self.loop.after(1.0, self.let_go_of_stderr)
        elif self.exit_code is None and not self.is_writing():
            self.judge_files()
            if self.files_are_over():
                self.conclude(self.outcome())

    def conclude(self, outcome):
        """The job is over: tells the user and crat how it ended."""
        if self.trouble:
            log.say(self.trouble)
        elif self.exit.how in NOT_STARTED:
            log.say(outcome.text())
        self.patron.alerts.tell_end(self, outcome)
        self.finish(outcome)

    def finish(self, outcome):
        self.exit_code = outcome.exit_code
        self.tick.cancel()
        log.status_line("")
        self.link.close()
        self.close_files()
        self.job.tell(outcome.exit_code, outcome.word, self.address, time.monotonic() - self.began)

    # Signals

    def signalled(self, number):
        now = time.monotonic()
        if self.job.terminal and self.signalled_at_terminal(number):
            return
        if number == signal.SIGINT and now - self.interrupted_at < 1.0 or self.exit is not None:
            if number not in (signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT):
                self.die_of(number)
        if number == signal.SIGINT:
            self.interrupted_at = now
        if number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            self.job.tell_to_end()
        if self.exit is None:
            self.link.send(SIGNAL, signal=signal.Signals(number).name[3:])
        if number == signal.SIGTSTP:
            self.stop_here()
        if number == signal.SIGCONT:
            self.refresh()

    def die_of(self, number):
        """Ends this process: the link closes, and the worker ends the command."""
        self.job.tell(EXIT_SIGNAL + number, "ended=%d" % number, self.address, time.monotonic() - self.began)
        die_of(number)

    def signalled_at_terminal(self, number):
        """With -t signals are for cexec, except USR1 and USR2.  Returns whether this one was.  Keys go as bytes."""
        if number == signal.SIGWINCH:
            self.link.send(RESIZE, **self.job.terminal.size())
        elif number == signal.SIGCONT:
            self.loop.after(0, self.take_terminal)      # later: it may stop us, so a TERM that waits must go first
        elif number == signal.SIGTSTP:
            self.job.terminal.restore()
            os.kill(os.getpid(), signal.SIGSTOP)
        elif number not in (signal.SIGUSR1, signal.SIGUSR2):
            self.die_of(number)
        return number not in (signal.SIGUSR1, signal.SIGUSR2)

    def take_terminal(self):
        """Makes the terminal raw and sends its size: at the start, and after a stop, when the size may be new."""
        with noting("the terminal stays as it is"):
            self.job.terminal.take()
        self.link.send(RESIZE, **self.job.terminal.size())
        self.refresh()

    def stop_here(self):
        """Stops this process, as the command is stopped; but first sends the signal that is queued in the link."""
        # SIGSTOP stops us at once, at the last line here.  If the signal were still in our queue then, the
        # command would run on, although the user has stopped it.  So we write the queue first.  The loop
        # must not do that: it would also read, and write output while the user sees a stopped job.
        # After a second we stop in any case: a worker that takes nothing for so long cannot be helped.
        deadline, selector = time.monotonic() + 1.0, new_selector()
        if not self.link.closed:    # it is closed after EXIT
            selector.register(self.link.sock, selectors.EVENT_WRITE)
        while self.link.congested and not self.link.closed and time.monotonic() < deadline:
            selector.select(0.1)
            self.link.flush()
        os.kill(os.getpid(), signal.SIGSTOP)


class Progress:
    """cexec -p: shows the job's progress, on a terminal in its last line four times a second, else every 10 s."""

    def __init__(self, client):
        self.client, self.loop = client, client.loop
        self.on_terminal, self.began = os.isatty(log.fd), time.monotonic()
        self.samples = collections.deque([(self.began, 0)], maxlen=9)       # (when, bytes) of the last two seconds
        at_end.append(lambda: log.status_line(""))
        self.tick()

    def tick(self):
        seconds = 0.25 if self.on_terminal else 10.0
        if self.on_terminal:
            log.status_line(self.text())
        elif time.monotonic() - self.began >= seconds:
            log.say(self.text())
        self.loop.after(seconds, self.tick)

    def text(self):
        run, search, now = self.client.run, self.client.search, time.monotonic()
        if run is None:
            return "%s, %s" % (search.waits() or "looking for a worker", duration(int(now - search.began)))
        self.samples.append((now, sum(run.moved())))
        seconds, count = (last - first for first, last in zip(self.samples[0], self.samples[-1]))
        line = self.line(run, duration(int(now - run.began)), count, seconds)
        return ", ".join(filter(None, [line, run.silent_for()]))

    def line(self, run, lasted, count, seconds):
        sent, received = run.moved()
        return "%s, %s, %s in%s, %s out, %s/s" % (run.worker, lasted, amount(sent), self.share(run), amount(received),
                                                  amount(count / seconds if seconds else 0))

    def share(self, run):
        """How much of its regular input files was sent, as " (42%)"."""
        files = [(run.channels[number].sent, position.size - position.offset)
                 for number, position in run.job.positions.items() if run.channels[number].source and position.is_file]
        sent, total = (sum(column) for column in zip((0, 0), *files))
        return " (%d%%)" % min(100, 100 * sent // total) if total > 0 else ""

    def end(self, run):
        """Shows the last line, which stays."""
        seconds = time.monotonic() - run.began
        log.status_line("")
        log.say(self.line(run, "%.1f s" % seconds, sum(run.moved()), seconds))


class Alerts:
    """Tells crat, and a worker that was lost, how runs have ended.  With cexec -s there is no crat.

    A run that has come to its EXIT is an OUTCOME, also if its job runs again then (--retries).  A run that was lost is
    a COMPLAINT.  A job that no worker has begun is neither, nor is a run that this process ends.

    A datagram for each OUTCOME of a batch could cost more than the job: it goes out by every interface, and all
    workers of the network hear it.  So the first one goes at once, and those of the next tenth of a second together.
    """

    PAUSE = 0.1                     # seconds between two ALERTs, unless one is full
    ROOM = 1000                     # bytes of OUTCOMEs in an ALERT; the rest of a datagram has 133 at most
    AGO = struct.Struct("!I")       # the first field of OUTCOME

    def __init__(self, group, pub, loop):
        self.group, self.pub, self.loop = group, pub, loop
        self.speakers = {family: loop.above_floor(sock) for family, sock in open_speakers().items()}
        self.waiting = []           # (when, an OUTCOME with 0 as ago)
        self.sent_at, self.timer = 0.0, NO_TIMER
        at_end.append(self.flush)

    def send(self, kind, nonce, **fields):
        self.group.send(self.speakers, make_datagram(
            kind, self.pub.application, self.pub.name, self.pub.secret, nonce, 0, **fields))

    def complain(self, run, reason):
        """Tells crat and the worker that the worker was lost: always, for the worker too must hear it."""
        self.flush()                # first, as they have happened before
        self.send(COMPLAINT, run.hello.nonce, worker_id=run.hello.worker_id, reason=cut(reason, 400),
                  **run.record_fields())

    def tell_end(self, run, outcome):
        """Tells how a run has ended: at once if the last ALERT is older than PAUSE, else with the next."""
        if not self.group.may_have_crat():
            return
        now, part = time.monotonic(), OUTCOME.pack(ago=0, **run.record_fields(), **outcome.record_fields())
        if sum(2 + len(one) for _, one in [*self.waiting, (now, part)]) > self.ROOM:
            self.flush()
        self.waiting.append((now, part))
        if now >= self.sent_at + self.PAUSE:
            self.flush()
        elif len(self.waiting) == 1:
            self.timer = self.loop.after(self.sent_at + self.PAUSE - now, self.flush)

    def flush(self):
        """Sends what waits; also when this process ends."""
        self.timer.cancel()
        if self.waiting:
            now = self.sent_at = time.monotonic()
            self.send(ALERT, os.urandom(16), outcomes=[
                self.AGO.pack(u32((now - when) * 1000)) + part[self.AGO.size:] for when, part in self.waiting])
            self.waiting = []


class Patron:
    """Has jobs, searches workers for them, and may run a job again if its worker is lost: a Client or a Batch.

    These have the methods that Search calls, and run_again(run), failed(run, reason, objection) and watch(run), which
    is called when the time of the worker's last sign of life was looked at.
    """

    def __init__(self, pub, group, terms, loop):
        self.pub, self.group, self.terms, self.loop = pub, group, terms, loop
        self.avoid = Avoided()
        self.hosts = {}             # a worker's name: the first address that had it
        group.attend(loop)
        self.alerts = Alerts(group, pub, loop)

    def new_search(self, quiet, only=ANY_WORKER):
        """A Search; the caller starts it."""
        return Search(self.loop, self.group, self.pub, self.terms, self, self.avoid, quiet, only)

    def has_job_for(self, worker_id):
        return True

    def called(self, hello):
        """Returns a worker's name for messages: its host's, with the address if it is not the first of this name."""
        host = printable(hello.host).replace(" ", "_") or hello.address
        return host if self.hosts.setdefault(host, hello.address) == hello.address else "%s[%s]" % (host, hello.address)

    def run_lost(self, run, reason):
        """The connection broke after GO: runs the job again, or fails, as objection() says."""
        objection = self.objection(run)
        self.avoid.worked(run.hello.worker_id)
        if objection is None:
            log.tell_user("%sworker %s lost: %s; runs the job again" % (
                run.job.name + ": " if run.job.name else "", run.worker, reason))
            self.alerts.complain(run, "lost, run again: " + reason)
            run.detach()
            run.job.rewind(run)
            self.run_again(run)
        else:
            self.alerts.complain(run, "lost: " + reason)
            self.failed(run, reason, objection)

    def objection(self, run):
        """Why a lost job does not run again; None if it does, "" if that was not asked for."""
        objection = run.job.objection(run)
        if objection is None and run.job.losses >= self.terms.losses_max:
            return "that was try %d (CEXEC_RETRIES)" % (run.job.losses + 1)
        return objection


class Client(Patron):
    """Has a single job: a search, then a run; both again if the run is lost and the job may be repeated."""

    def __init__(self, pub, group, job):
        super().__init__(pub, group, job, Loop(floor=job.limit))
        self.job = job
        self.search = self.run = None           # only one of them at a time
        self.silent = False         # whether an Executor knows that the worker is silent
        job.open_ends(self.loop.floor, self.signalled)
        deadly = ["ALRM", "VTALRM", "PROF", "XCPU", "IO"] if job.terminal else []      # restore the terminal first
        self.loop.catch([getattr(signal, "SIG" + name) for name in list(SIGNALS) + deadly], self.signalled)
        if job.start_report >= 0:
            self.loop.on_read(job.start_report, self.executor_ended)

    def executor_ended(self):
        """Nobody wants the job any more.  If it runs, the worker ends it when our connection closes."""
        self.end_search()
        die_of(signal.SIGTERM)

    def work(self):
        """Finds a worker and carries the job.  Returns its exit code.  Raises Fatal (111) if there is no worker."""
        with on_failure(self.end_search):
            self.begin_search()
            progress = Progress(self) if self.job.progress else None
            while self.run is None or self.run.exit_code is None:
                self.loop.turn()
            if progress:
                progress.end(self.run)
        return self.run.exit_code

    def begin_search(self):
        self.search = self.new_search(self.job.progress)
        self.search.start()

    def end_search(self):
        if self.search:
            self.search.end()
            self.search = None

    def signalled(self, number):
        if self.run:
            self.run.signalled(number)
        elif number == signal.SIGTSTP:
            os.kill(os.getpid(), signal.SIGSTOP)
        elif number not in (signal.SIGCONT, signal.SIGWINCH):
            self.end_search()
            self.job.tell(EXIT_SIGNAL + number, "ended=%d" % number)
            die_of(number)

    # The patron's methods, which Search calls

    def assign(self, search, worker_id):
        return self.job

    def put_back(self, job):
        pass                        # the search goes on, with the same job

    def begin(self, search, candidate, job):
        started_up()
        self.search = None
        job.tell_executor("%s %s" % (candidate.hello.worker_id.hex(), candidate.hello.host))
        if job.repeat or candidate.hello.options & HELLO_REPEATABLE:
            job.keep_input()
        self.run = Run(self, candidate.link, candidate.hello, job)
        self.run.refresh()

    def not_found(self, search, message, code):
        raise Fatal(code, message)

    # When the worker is lost

    def watch(self, run):
        """Shows on a terminal how long the worker has been silent.  With -p Progress does, and with -t it is raw."""
        silent = run.silent_for()
        if bool(silent) != self.silent:
            self.silent = bool(silent)
            self.job.tell_waiting(silent and " (%s)" % silent)
        if os.isatty(log.fd) and in_foreground(log.fd) and not (log.verbose or self.job.progress or self.job.terminal):
            log.status_line(silent and "worker %s %s" % (run.worker, silent))

    def run_again(self, run):
        self.avoid.for_good(run.hello.worker_id)
        self.run = None
        self.begin_search()

    def failed(self, run, reason, objection):
        message = "worker %s lost after %.1f s: %s" % (run.worker, time.monotonic() - run.began, reason)
        log.say(message + ("; not run again: " + objection if objection else
                           "; the command may have run (cexec -r runs it again)"))
        run.finish(loss(reason))


# ---------------------------------------------------------------------------
# cexec -l: which workers there are
# ---------------------------------------------------------------------------

class Survey:
    """cexec -l: sends QUERY and collects the workers that answer.  If none does, it finds out why.

    A stranger is a peer that cannot do this client's jobs.
    """

    STRANGERS_MAX = 16              # remembered of each kind: anybody can send any number of datagrams

    ASK = (0.0, 0.2, 0.6)           # seconds after the start at which it asks
    ENOUGH, PATIENCE = 1.2, 3.0     # seconds after which it stops: with an answer, and without one

    def __init__(self, group, pub, job_ports, loop, servers=None):
        self.group, self.pub, self.loop = group, pub, loop
        self.servers = servers      # a ServerFilter; None: all
        self.back = ReturnPort(job_ports, self.loop, group.families())
        self.questions, self.workers = Memory(16), {}           # nonce: when; worker_id: a row
        self.answered = set()       # addresses of workers that sent REPLY: as we see them, and as they say
        self.excluded = set()       # addresses of workers that CEXEC_ACCEPT_SERVER and CEXEC_REJECT_SERVERS exclude
        self.connected = set()      # addresses of workers whose probe (a connection) has come
        self.denied = {}            # DENY's why: addresses of our application's workers
        self.foreign = {}           # application id: addresses of the workers that sent DENY
        self.others = {}            # application id: addresses from which we heard datagrams to the group
        self.versions = {}          # (version, address): addresses
        self.ways, self.errors = 0, set()
        self.back.attend(self.hear, self.accept, self.hear_stranger)
        self.listen()

    def listen(self):
        """Begins to hear what other peers send to the group."""
        try:
            self.listeners = open_listeners(self.group)
        except Fatal as error:      # another program does not share the port
            log.note("%s", error)
            self.listeners = []
        hear_all(self.loop, self.listeners, self.overhear, self.hear_stranger)

    def begin(self, over):
        """Asks, and calls over() when its time is over: see ENOUGH and PATIENCE."""
        for seconds in self.ASK:
            self.loop.after(seconds, self.ask)
        self.loop.after(self.ENOUGH, lambda: over() if self.workers and not self.silent_hosts() else self.loop.after(
            self.PATIENCE - self.ENOUGH, over))

    def run(self):
        """Asks, and waits for the answers."""
        self.begin(self.loop.stop)
        self.loop.run()
        self.close()

    def close(self):
        self.back.close()
        hear_no_more(self.loop, self.listeners)

    def ask(self):
        nonce = os.urandom(16)
        self.questions[nonce] = time.monotonic()
        self.ways = self.group.send(self.back.udp, make_datagram(
            QUERY, self.pub.application, self.pub.name, self.pub.secret, nonce, self.back.port,
            strangers=not self.workers and len(self.questions) > 1, padding=bytes(240)))
        self.errors |= {self.group.error} - {None}

    def hear(self, datagram, address):
        handler = handler_of(self, datagram.kind)
        if handler and datagram.nonce in self.questions:
            handler(datagram, address)

    def rcvd_reply(self, datagram, address):
        """A worker that can do our jobs."""
        body, seconds = datagram.body, time.monotonic() - self.questions[datagram.nonce]
        if not datagram.proved_by(self.pub.secret):
            return
        if body.options & HELLO_BY_SSH and is_address(body.address):
            address = body.address
        self.answered |= {address.partition("%")[0], body.address, body.worker_id.hex()}
        if self.servers and not self.servers.allows(address, body.host, body.worker_id):
            self.excluded.add(address)          # this peer has a key: there are not many of them
        else:
            self.add_worker(body.worker_id, {
                "host": body.host, "address": body.address or address, "load": body.load / 1000,
                "running": body.running, "slots": body.slots, "waiting": body.waiting, "version": body.version,
                "uptime": body.uptime, "round_trip": round(seconds, 6),
                "state": "draining" if body.draining else "serving", "options": option_letters(body.options),
                "id": body.worker_id.hex()})

    def rcvd_deny(self, datagram, address):
        """A worker that refuses us, or one of another application."""
        if datagram.body.serves == self.pub.application:
            self.note_stranger(self.denied, datagram.body.why, address)
        else:
            self.note_stranger(self.foreign, datagram.body.serves, address)

    def add_worker(self, worker_id, row):
        known = self.workers.setdefault(worker_id, row)
        known["round_trip"] = min(known["round_trip"], row["round_trip"])
        self.stop_early()

    def accept(self, sock, address):
        """A worker's probe: it shows that its connections arrive here."""
        sock.close()
        self.connected.add(address)
        self.stop_early()

    def stop_early(self):
        """Ends the wait for answers if all workers are known to have answered: those of cexec -s."""
        if self.connected and self.group.is_whole(self.workers):
            self.loop.stop()

    def overhear(self, datagram, address, index):
        """A datagram to the group from another client or worker."""
        if datagram.nonce not in self.questions:
            self.note_stranger(self.others, datagram.application, address)

    def hear_stranger(self, address, error):
        self.note_stranger(self.versions, (error.version, address), address)

    def note_stranger(self, known, what, address):
        """Adds an address to the set known[what]; the dictionary and the set are bounded."""
        if what in known or len(known) < self.STRANGERS_MAX:
            addresses = known.setdefault(what, set())
            if len(addresses) < self.STRANGERS_MAX:
                addresses.add(address)

    # The result

    def silent_hosts(self):
        """Returns the hosts that the group names, that are allowed, and of which no worker answers, in their order."""
        return [host for host, addresses in self.group.hosts().items() if not addresses & self.answered
                and (self.servers is None or self.servers.expects(host, addresses))]

    def rows(self):
        """The workers as dictionaries, the least loaded first."""
        return sorted(self.workers.values(), key=lambda row: (row["load"], row["host"], row["address"]))

    def troubles(self):
        """Yields the reasons why a job would find no worker: lines with the cause and the remedy."""
        if self.workers:
            if not self.connected and not self.back.lack:       # accept_all() has told of that
                yield tcp_blocked(self.back.port)
            elif all(row["state"] == "draining" for row in self.workers.values()):
                yield "all of them are draining: they take no more jobs"
            return
        causes = list(self.causes())
        yield "no worker answered on %s" % self.group.text
        yield from causes
        yield from self.sending_troubles()
        if causes and self.foreign:
            yield "workers of other applications answered too (%s)" % ", ".join(sorted(map(bytes.hex, self.foreign)))
        elif not causes:
            yield from self.guesses()

    def causes(self):
        """Yields the certain causes."""
        for why, addresses in sorted(self.denied.items()):
            yield "%s: %s" % (", ".join(sorted(addresses)), self.denial(why))
        for version, address in sorted(self.versions):
            yield "%s speaks protocol version %d, this is %d: copy one cexec.py to both" % (address, version, PROTOCOL)
        if self.excluded:
            yield "%s: not allowed (CEXEC_ACCEPT_SERVER, CEXEC_REJECT_SERVERS)" % ", ".join(sorted(self.excluded))
        elif self.connected:
            yield ("workers connect to us, but their datagrams do not arrive: let UDP to %s in through the firewall of "
                   "this machine, and UDP out through theirs" % ports_here(self.back.port))

    def guesses(self):
        """Yields the possible causes, if none is certain."""
        if self.foreign:
            yield "is cservice running with the key of %s, which is for %s?" % (
                self.pub.label, self.pub.application.hex())
        for application, addresses in sorted(self.foreign.items()):
            yield ("%s: a worker of another application, %s (if that is to be yours, its key is another one: copy the "
                   "key, or make the pub again)" % (", ".join(sorted(addresses)), application.hex()))
        others = sorted(other.hex() for other in self.others if other != self.pub.application)
        if others and not self.foreign:
            yield ("other applications' datagrams are heard (%s): is cservice running with the key of %s?"
                   % (", ".join(others), self.pub.label))
        elif self.others and not self.foreign:
            yield "only other clients of %s are heard: is cservice running with its key?" % self.pub.label
        elif not self.foreign:
            yield "no other cexec was heard: is cservice running, in the same network, with the same GROUP?"
        if not self.foreign:
            yield ask_of_firewalls(self.back.port, self.group)

    def sending_troubles(self):
        """Yields where the questions went, or why they could not be sent."""
        names = interface_names()
        own = {interface.index: interface.address for interface in interfaces()}
        ways = sorted({"%s (%s)" % (names.get(index, "?"), own.get(index) or "no IPv4") if index else address
                       for index, address, _ in self.group.ways()})
        if set(ways) <= {THIS_HOST, ALL_NETWORKS, "::1"}:
            yield "no network is up: only this machine was asked (see ip address)"
        elif not self.ways:
            yield "nothing could be sent (%s): is there a network? see ip address" % ", ".join(self.errors)
        else:
            shown = ways[:8] + ["%d more" % (len(ways) - 8)] * (len(ways) > 8)
            errors = "; not everywhere: %s" % ", ".join(sorted(self.errors)) if self.errors else ""
            yield "asked by way of %s, from port %d%s" % (", ".join(shown), self.back.port, errors)

    def denial(self, why):
        if why == DENY_NAME:
            return "a worker that refuses the client %s (cservice -x)" % self.pub.name
        return "a worker of this application cannot verify %s: make the public key again (ckeygen)" % self.pub.label


def list_workers(pub, group, ports, as_json):
    """Asks for the workers, and shows them.  Returns the exit code."""
    survey = Survey(group, pub, ports, Loop(), ServerFilter())
    survey.run()
    return show_workers(survey, as_json)


def show_workers(survey, as_json):
    """Prints a line for each worker that has answered, and says what is wrong.  Returns 0, or 111 if none has."""
    rows = survey.rows()
    if as_json:
        lines = map(json_line, rows)
    elif sys.stdout and sys.stdout.isatty():
        lines = table(["HOST", "ADDRESS", "LOAD", "JOBS", "WAITING", "VERSION", "UPTIME", "ROUND TRIP",
                       "OPTIONS"], [
            [row["host"], row["address"], "%.2f" % row["load"],
             "%d/%d" % (row["running"], row["slots"]) + " draining" * (row["state"] == "draining"),
             str(row["waiting"]), row["version"], duration(row["uptime"]), "%.1f ms" % (row["round_trip"] * 1000),
             row["options"]]
            for row in rows])
    else:
        lines = ["\t".join(printable(str(value)) for value in row.values()) for row in rows]
    for line in lines:
        show(line)
    for line in survey.troubles():
        log.say(line)
    others = [row["host"] for row in rows if row["load"] - row["running"] / max(1, row["slots"]) >= 1]
    if others:
        log.tell_user("%s: LOAD is more than our jobs there: it has the load average of a minute, of all that runs or "
                      "has just run (see uptime there)" % ", ".join(others[:8]))
    return 0 if rows else EXIT_TEMPORARY


# ---------------------------------------------------------------------------
# cexec -m: a batch of files or values, a job each
# ---------------------------------------------------------------------------
#
# The first file of a connection is a job like any other.  Then:
#
#   client (Batch, a FileRun for each file)     worker (Supervisor)
#     |  <----------------------- EXIT, more=1  |  no other client waits: the supervisor keeps the slot
#     |  JOB, GO, DATA ... EOF ------------->   |  no JOB in 3 s: it gives the slot back
#     |  <------------------------------ ACCEPT |  the command starts; ACCEPT comes within 2 ms, perhaps with EXIT
#     |     finished without ACCEPT: nothing has run, the file goes back to the head of the queue
#     |  <------------------- DATA, EOF ...     |
#     |     lost in any other way: no output was shown, so the file is done again, CEXEC_RETRIES times
#     |  <----------------------- EXIT, more=1  |  and so on; after more=0 the client closes, and searches
#     |  no file is left: it closes             |  it gives the slot back
#
# The way of a Task:
#
#   Batch.queue --take--> FileRun, at a worker that was searched or that has just done another Task
#     --EXIT--> Disk.store: the output is on the disk --> Task.commit: it gets its name --> Batch.task_over
#     or, if it goes to standard output, it waits for its turn there
#   After EXIT crat hears how each run has ended, of a success when its output has its name: see Alerts.

PLACEHOLDERS = r"\{(?:(-?\d{1,9})?(//|/\.|/|\.|)|([#%]))\}"    # parallel's {} {.} {/} {//} {/.}, {1} {1.} ... {#} {%}
OUTPUTS_MAX = 256                   # outputs that wait for their turn on standard output, at most
SEARCHES_MAX = 2                    # searches at a time
JOBS_MAX = 10000                    # jobs at a time, without -j
ROW_MIN, ACCIDENT = 3, 0.001        # so many failures in a row, if they are less probable elsewhere, show a bad worker
BAD_SECONDS = 30.0                  # a bad worker gets no jobs for so long; the next time for twice as long
FAILURES_MAX = 101                  # the exit status for 100 failures and more, because 100 means wrong usage
HOSTS_MAX = 4                       # a job that cannot be started fails, if so many workers are not to have it again
SILENCE_MIN = 10.0                  # a run whose worker has been silent for so many seconds,
SILENCE_SHARE = 5                   # and for 1/5 of the run's time, goes to a worker that has nothing else to do
LOST = -1                           # Exitval of a run whose worker was lost
STORES_MAX = 16                     # outputs that wait for the disk beside the jobs that run, at most;
QUICK_STORE = 0.0005                # with a disk that needs less than so many seconds, none
JOBLOG = "Seq Host Starttime JobRuntime Send Receive Exitval Signal Command".split()


def fill_pattern(pattern, inputs, number="", slot="", between=" "):
    """Returns the pattern with its placeholders filled in from the inputs.  between stands between several inputs.

    {} is the input, {.} without its extension, {/} its last part, {//} its directory, {/.} the last
    part without the extension.  {2}, {2.} and so on are the same for the second input, {-1} for the
    last one; without such an input they are empty.  {#} is the job's number, {%} its slot.  Without
    inputs (None) only these two are filled in.
    """
    def filled(match):
        which, form, mark = match.groups()
        if mark:
            return str(number if mark == "#" else slot)
        return match.group() if inputs is None else fill_placeholder(inputs, int(which or 0), form, between)
    return re.sub(PLACEHOLDERS, filled, pattern)


def has_placeholders(pattern):
    return re.search(PLACEHOLDERS, pattern) is not None


def fill_placeholder(inputs, number, form, between):
    """The text for one placeholder: the input with this number, from 1, or with -1 from the end; 0: all inputs."""
    if not number:
        return between.join(formed(form, text) for text in inputs)
    number = number - 1 if number > 0 else number + len(inputs)
    return formed(form, inputs[number]) if 0 <= number < len(inputs) else ""


def formed(form, text):
    """An input in the form of {}, {.}, {/}, {//} or {/.}, as in parallel(1)."""
    if form == "//":
        return os.path.dirname(text.rstrip("/") or text[:1]) or "."
    text = os.path.basename(text) if form.startswith("/") else text
    return re.sub(r"\.[^/.]*$", "", text) if form.endswith(".") else text


def split_words(words):
    """Returns (the words before the first -- or ::: of a batch, the lists of inputs after it).  Raises Fatal (100).

    Each ::: begins a list; -- begins the only one.  Without them the lists are None.
    """
    index = next((index for index, word in enumerate(words) if word in ("--", ":::")), len(words))
    head, rest = words[:index], words[index:]
    for word in words:
        if word in (":::+", "::::", "::::+") or word == ":::" and rest[0] == "--":
            raise Fatal(EXIT_USAGE, "%s: use either -- before one list, or ::: before each of several" % word)
    if not rest or rest[0] == "--":
        return head, [rest[1:]] if rest else None
    lists = []
    for word in rest:
        if word == ":::":
            lists.append([])
        else:
            lists[-1].append(word)
    return head, lists


def batch_inputs(words, zero):
    """Returns (the words for the command, the inputs of each job, as tuples).  Raises Fatal (100).

    The inputs are None if their names are on standard input.
    """
    head, lists = split_words(words)
    names = lists[0] if lists else []
    if ":::" in words and zero:
        raise Fatal(EXIT_USAGE, "-0 is for names on standard input, not for those after :::")
    if ":::" in words:
        return head, list(itertools.product(*lists))
    if names in ([], ["-"]):
        return head, None
    if zero:
        raise Fatal(EXIT_USAGE, "-0 is for names on standard input, not for %s" % names[0])
    return head, [(name,) for name in names]


def all_names(separator):
    """Returns the inputs of each job, from the names on standard input.  Raises Fatal (111)."""
    with or_fatal("standard input"):
        with open(0, "rb", closefd=False) as file:
            return [(os.fsdecode(name),) for name in file.read().split(separator) if name]


def new_task(terms, number, inputs):
    pattern = terms.pattern
    return Task(terms, number, inputs, None if pattern == "-" else fill_pattern(pattern, inputs, number))


def batch_tasks(terms, inputs, options):
    """The Tasks of a batch, in order.  Raises Fatal (100) for an output that must not be written.

    inputs: None if they will come, see QueueBatch.
    """
    tasks = [new_task(terms, number, given) for number, given in enumerate(inputs or [], 1)]
    note_names(terms, tasks, options, float("inf") if inputs is None else len(tasks))
    check_directories(terms.pattern, tasks)
    return tasks


def note_names(terms, tasks, options, count):
    """Notes all files that a batch of so many jobs reads and writes.  Raises Fatal (100) if one would be lost."""
    names = terms.names
    if not options.hosts:
        names.note_keys(options.words[0])
    for text in terms.inputs:
        if not has_placeholders(text):
            names.note_input(text)
    for task in tasks:
        task.note_inputs()
    names.note_standard()
    if options.joblog:
        names.note_log(options.joblog)
    for task in tasks:
        task.note_outputs()
    if terms.errors:
        names.note_errors(terms.errors, count)
    if terms.results:
        names.check_directories()
    names.list_inputs()


def check_directories(pattern, tasks):
    """Raises Fatal (100) if an output has no directory, unless its input is missing: then the Task itself fails."""
    known = {"": True}
    for task in tasks if pattern != "-" else ():
        directory = os.path.dirname(task.output_path)
        with suppress(ValueError):  # a NUL in the name: the Task will fail
            if directory not in known:
                known[directory] = os.path.isdir(directory)
            if not known[directory] and (task.input_path is None or os.path.exists(task.input_path)):
                raise Fatal(EXIT_USAGE, "-o %s: there is no directory %s (mkdir -p makes one)" % (pattern, directory))


class BatchTerms(Terms):
    """The settings of all jobs of a batch.  In words, inputs and results no placeholder {} {.} ... is filled in."""

    def __init__(self, environment, arguments=(), pattern="-", values=False, errors=None, batch=b"", retries=0,
                 **others):
        super().__init__(environment, arguments, batch or os.urandom(8), **others)
        self.names = Names()
        self.pattern = pattern      # -o: where outputs go
        self.values = values        # -n: the inputs are values, and not files to be read
        self.errors = errors        # the directory of --errors
        self.has_slots = any(b"{%}" in word for word in [*self.environment, *self.arguments])
        self.retries = retries or 0             # --retries: how often a job runs again whose command has failed
        self.unnamed = UnnamedFiles()

    def unit(self):
        """What messages call its jobs."""
        return "jobs" if self.values else "files"

    def words_for(self, fill, *variables):
        """Returns (variables, arguments), filled in by fill(text, between=).  Raises OSError.

        If one {} in an argument stands for several inputs, it makes several arguments, as with parallel.
        """
        environment = [*(os.fsencode(fill(os.fsdecode(word))) for word in self.environment), *variables]
        arguments = [part for word in self.arguments
                     for part in os.fsencode(fill(os.fsdecode(word), between="\0")).split(b"\0")]
        if words_size(environment + arguments) > WORDS_MAX:
            raise OSError(errno.E2BIG, "more than %d MiB of variables and arguments" % (WORDS_MAX >> 20))
        return environment, arguments


class UnnamedFiles:
    """The files for outputs that get no name.  Each is used again: to make one costs as much as the rest of a job."""

    def __init__(self):
        self.spare = []

    def take(self):
        """Returns an empty file.  Raises OSError."""
        return self.spare.pop() if self.spare else tempfile.TemporaryFile(buffering=0)

    def give_back(self, file):
        file.seek(0)
        if os.fstat(file.fileno()).st_size:
            file.truncate()
        self.spare.append(file)


class Task:
    """A job of a batch.

    Its first input is the file that it reads, or with -n a value like the others.

    The output is written under another name (part), and gets its own name when it is whole, and on
    the disk: in commit().  With -o - it goes to an unnamed file, from which the Printer copies it in its turn.
    """

    ROWS = [(0, 0, FLAG_INPUT), (1, 1, FLAG_OUTPUT), (2, 2, FLAG_OUTPUT)]       # of JOB
    directory = ""                  # where its results go
    __slots__ = ("terms", "number", "inputs", "input_path", "output_path", "errors_path", "losses", "stamp",
                 "input_file", "output_file", "errors_file", "slot", "words", "listings", "newest", "oldest",
                 "patterns", "retries", "avoids", "since", "refusals", "unsettled", "exit_code",
                 "done_before")     # a batch may have a million

    def __init__(self, terms, number, inputs, output):
        self.terms, self.number, self.inputs, self.output_path = terms, number, inputs, output
        self.input_path = None if terms.values else inputs[0]
        self.errors_path = terms.errors and os.path.join(terms.errors, str(number))     # where --errors keeps them
        self.losses, self.input_file, self.stamp, self.output_file, self.errors_file = 0, None, None, None, None
        self.slot = 1               # the number for {%}, of the present run
        self.words = None           # (variables, arguments), while its files are open
        self.listings = ()          # the files of -i
        self.newest = 0             # when the newest of the files that it reads was changed, in ns, without those of -i
        self.oldest = None          # and the oldest of its outputs; None if one is not there
        self.patterns = ()          # of -g
        self.retries = terms.retries            # --retries: how often it still runs again if its command fails
        self.avoids, self.since = frozenset(), 0.0      # the workers of avoid(); since when
        self.refusals = None        # the Refusals of workers that have not its own command
        self.unsettled = False      # whether settle() will be called
        self.exit_code = None       # once it is over; 0 is a success
        self.done_before = False    # an earlier batch has done it

    @property
    def name(self):
        """A name for messages and the joblog."""
        return " ".join(self.inputs)

    @property
    def part(self):
        """The name under which the output is written, in its directory: .NAME.part, or with a hash for a long name."""
        directory, base = os.path.split(self.output_path)
        raw = os.fsencode(base)
        return os.path.join(directory, ".%s.part" % (base if len(raw) < 240 else hashlib.sha256(raw).hexdigest()))

    def fill(self, text, form=str, between=" "):
        """Returns a pattern with its placeholders filled in; form: what is done with each input first."""
        return fill_pattern(text, list(map(form, self.inputs)), self.number, self.slot, between)

    def job_fields(self):
        environment, arguments = self.words
        return dict(self.terms.job_fields(), descriptors=self.ROWS + self.terms.file_rows(), environment=environment,
                    arguments=arguments, patterns=list(map(os.fsencode, self.patterns)))

    def has_own_command(self):
        return has_placeholders(os.fsdecode(self.terms.arguments[0]))

    def avoid(self, worker_id):
        """It is not for this worker, as long as there is another one."""
        self.avoids, self.since = self.avoids | {worker_id}, time.monotonic()

    def objection(self, run):
        """Why it is not done again after this run.  None: it always can, because no output was shown."""
        return None

    def rewind(self, run):
        """Removes the unfinished output of a run that was lost."""
        self.losses += 1
        self.discard()

    def conclude(self, outcome):
        self.exit_code, self.words = outcome.exit_code, None

    def outputs(self):
        """The names of the files that it makes here, as far as they are known: -o, and -g without wildcards."""
        named = filter(None, (plain_name(os.fsencode(pattern)) for pattern in self.patterns))
        return [os.path.join(self.directory, os.fsdecode(name)) for name in named] + [self.output_path] * (
            self.output_path is not None)

    def note_inputs(self):
        """Notes what it reads.  Raises Fatal (100) for a private key."""
        names, found = self.terms.names, None
        if self.input_path is not None:
            found = names.note_read(self.input_path, self.input_path)
            self.newest = found.st_mtime_ns if found else float("inf")
        for text in self.terms.inputs:
            if has_placeholders(text):
                path = self.fill(text)
                names.note_input(path, found if path == self.input_path else None)

    def note_outputs(self):
        """Notes what it writes.  Raises Fatal (100) if this must not be written."""
        names, times = self.terms.names, []
        self.patterns = tuple(result_pattern(self.fill(text, quoted)) for text in self.terms.results)
        for name in self.outputs():
            is_result, option = name is not self.output_path, "-o %s" % self.terms.pattern
            found = names.note_written(name, self, "-g " + name if is_result else option)
            times.append(names.newest(name, found))
            if not is_result:
                names.note_name(self.part, self, option)
                if name[-1:] in ("", "/") or found and not stat.S_ISREG(found.st_mode):
                    raise Fatal(EXIT_USAGE, "%s: %s is no regular file" % (option, name or "an empty name"))
        self.oldest = min(times) if times and None not in times else None

    def check_done(self):
        """Notes in done_before whether its outputs are there and no older than its inputs.  Returns that."""
        with suppress(OSError, ValueError):  # a file is missing, or its name is impossible
            self.done_before = self.oldest is not None and self.oldest >= max(
                [self.newest] + [listing.newest for listing in self.list_inputs()])
        return self.done_before

    def input_paths(self):
        return list(map(self.fill, self.terms.inputs))

    def list_inputs(self):
        """Returns the Listings of its -i.  Raises OSError, ValueError."""
        return tuple(map(self.terms.names.listing, self.input_paths()))

    def open(self, slot=1):
        """Opens its input, its unfinished output and the file for its errors, for one more try.  Raises OSError."""
        self.slot = slot
        self.words = self.fill_words()
        self.listings = self.list_inputs()
        for text in self.patterns:
            check_target(text, *[self.directory] * bool(self.directory))
        with on_failure(self.discard):
            self.open_input()
            self.open_outputs()

    def fill_words(self):
        """Returns its (variables, arguments).  Raises OSError, ValueError."""
        if "\0" in self.name:
            raise ValueError("a null character is in it")
        return self.terms.words_for(self.fill, b"FILE=" + os.fsencode(self.inputs[0]))

    def hint(self):
        """Returns that an argument names an input which is a file here, if the command may have looked for it there."""
        for name in self.inputs if self.words and not self.terms.inputs else ():
            if os.fsencode(name) in self.words[1] and os.path.isfile(name):
                return " (%s is here: -i {} takes it there, if the workers have directories for jobs)" % name
        return ""

    def value_hint(self, error):
        """Returns what may be meant if the file that it reads is missing, and its name looks like a value."""
        missing = self.input_path and isinstance(error, FileNotFoundError) and not os.path.lexists(self.input_path)
        return " (with -n the inputs are values)" if missing and not re.search("[./]", self.input_path) else ""

    def open_input(self):
        """Opens the file that it reads; with -n it reads nothing.  Raises OSError."""
        self.stamp = self.state_of_input()
        if self.stamp and not stat.S_ISREG(self.stamp[0]):
            raise OSError(errno.EINVAL, "not a regular file")
        self.input_file = open(self.input_path, "rb", 0) if self.stamp else None

    def open_outputs(self):
        self.output_file = self.terms.unnamed.take() if self.output_path is None else self.open_part()
        self.errors_file = self.open_errors() if self.errors_path else self.terms.unnamed.take()

    def ends(self):
        """Returns the Ends of its descriptors, for a run.  Without an input that End is not read: its number is -1."""
        numbers = [file.fileno() if file else -1 for file in (self.input_file, self.output_file, self.errors_file)]
        return [End(number, number, lambda: None, [half]) for number, half in zip(numbers, ("read", "write", "write"))]

    def open_part(self):
        """The file for the unfinished output, empty, and locked for us alone.  Raises OSError."""
        # A file with this name may be there: another cexec has left it, is writing it, or is just giving it
        # its final name.  So take it only with a lock, and look then whether the name still leads to it.
        while True:
            flags, ours = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, True
            try:
                fd = os.open(self.part, flags | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                try:
                    fd, ours = os.open(self.part, flags), False
                except FileNotFoundError:
                    continue        # another cexec has just renamed or removed it
            part = open(fd, "r+b", 0)
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found = os.fstat(fd)
                if not ours and (not stat.S_ISREG(found.st_mode) or found.st_nlink > 1
                                 or found.st_uid != os.geteuid()):
                    raise OSError(errno.EEXIST, "is not a file that cexec has left there", self.part)
                if not ours:
                    self.terms.names.check_part(self.part, found)
                if os.path.samestat(found, os.stat(self.part)):
                    part.truncate(0)
                    self.terms.names.note_part_open(part)
                    return part
            except FileNotFoundError:
                pass                # the same, just now
            except BlockingIOError:
                part.close()
                raise OSError(errno.EBUSY, "another cexec is writing it", self.part) from None
            except OSError:
                part.close()
                raise
            part.close()

    def open_errors(self):
        """The file for its standard error, empty.  Raises OSError."""
        self.terms.names.check_there(self.errors_path)
        return open(self.errors_path, "w+b", 0)

    def state_of_input(self):
        """A value that changes if the input is changed or replaced by another file.  Raises OSError."""
        if self.input_path is None:
            return None
        now = os.stat(self.input_path)
        return now.st_mode, now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns

    def commit(self):
        """Gives the output, which is on the disk, its name.  Raises OSError.

        For a later batch a file with this name is done: so it must be whole, and from the present input.
        """
        if self.state_of_input() != self.stamp:
            raise OSError(errno.EBUSY, "changed while it was read", self.input_path)
        if self.output_path is not None:
            self.terms.names.check_there(self.output_path)
            if not os.path.samestat(os.lstat(self.part), os.fstat(self.output_file.fileno())):
                raise OSError(errno.EBUSY, "another program has replaced it", self.part)
            os.rename(self.part, self.output_path)
            self.terms.names.note_made(os.fstat(self.output_file.fileno()), self)
            self.terms.names.forget_part(self.output_file)

    def discard(self):
        """Removes the unfinished output."""
        if self.output_file and self.output_path is not None:
            drop_part(self.part)
            self.terms.names.forget_part(self.output_file)
        self.close()

    def close(self, *names):
        """Closes the open files of these names, or all; those without a name are for other Tasks then."""
        named = {"input_file": True, "output_file": self.output_path is not None, "errors_file": self.errors_path}
        for name in names or named:
            file = getattr(self, name)
            setattr(self, name, None)
            with noting("%s", self.name):       # if it matters, await_disk() has raised it
                if file:
                    file.close() if named[name] else self.terms.unnamed.give_back(file)


def quoted(name):
    """A file's name with its * ? [ \\ escaped, to be filled into a pattern of -g."""
    return re.sub(r"([*?[\\])", r"\\\1", name)


def make_durable(directory):
    """Waits until the names in a directory are on the disk.  Raises OSError."""
    with closing(os.open(directory, os.O_RDONLY | os.O_DIRECTORY)) as fd:
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:     # this file system cannot do it
                raise


def listings_of(names, inputs):
    """Returns the Listing of each argument of -i, which are noted.  Raises Fatal (100) for one that does not exist."""
    try:
        listings = [names.listing(text) for text in inputs]
    except (OSError, ValueError) as error:
        raise Fatal(EXIT_USAGE, "-i: %s" % error_text(error)) from None
    files = {}
    for listing in listings:
        path, name = listing.path, listing.name
        if not os.path.isdir(path) and files.setdefault(name, path) != path:
            raise Fatal(EXIT_USAGE, "-i: %s and %s have the same name at the worker, %s" % tuple(
                map(os.fsdecode, (files[name], path, name))))
    return listings


def open_joblog(path, prints):
    """A file to append to, with the heads of parallel's columns if it is new.  Raises Fatal (100, 111).

    As with parallel, "-" is standard output.  prints: the outputs go there too.
    """
    if path == "-":
        need_output()
        if prints:
            raise Fatal(EXIT_USAGE, "--log -: standard output has the outputs: name a file, or -o for the outputs")
    with or_fatal("--log %s" % path):
        # Without a buffer: else a line for which the disk had no room could be written later.
        # Not mode "ab": with it Python 3.6 refuses a pipe.
        file = open(path, "wb", 0, opener=lambda name, _: os.dup(1) if name == "-" else os.open(
            name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666))
        size_before = os.fstat(file.fileno()).st_size
    if not size_before:
        write_joblog(file, "\t".join(JOBLOG).encode())
    return file


def in_a_line(name):
    """The bytes of a name as they are, but for control characters, as in printable(): these would end a field."""
    return re.sub(rb"[\0-\x1f\x7f]", lambda found: printable(found.group().decode()).encode(), name)


def write_joblog(file, line):
    """Adds a line, of bytes.  Raises Fatal (111)."""
    with or_fatal("--log %s" % file.name):
        write_all(file.write, line + b"\n")


class FileRun(RemoteRun):
    """One run of a Task.  After its EXIT the next Task can use the connection: see Batch.go_on()."""

    def __init__(self, batch, link, hello, task, accepted):
        super().__init__(batch, link, hello, task)
        self.started_at = time.time()           # for the joblog
        self.accepted = accepted    # False for the next Task of a connection, until ACCEPT: its GO was sent at once
        self.reported = False       # whether run_ended() of the batch was called
        with on_failure(self.detach):
            for number, end in enumerate(task.ends()):
                channel = self.carry(number, end)
                if channel.source and not task.input_file:
                    channel.source.leave_alone()
            self.begin_files(task.listings, list(map(os.fsencode, task.patterns)),
                             lambda arrivals: task.terms.names.claim(arrivals, task), task.directory)
        self.channels[0].source.begin()
        self.refresh()

    def link_frame(self, link, kind, flags, channel, payload):
        if not self.accepted:
            take_frame(self, (ACCEPT, PONG), kind, flags, channel, payload)
        elif kind is ACCEPT:
            raise ProtocolError("ACCEPT out of place")
        else:
            super().link_frame(link, kind, flags, channel, payload)

    def rcvd_accept(self, flags, channel, payload):
        self.accepted = True

    def patience(self):
        """Returns the silence, in seconds, after which the job may go to a worker that has nothing else to do."""
        return min(max(SILENCE_MIN, (time.monotonic() - self.began) / SILENCE_SHARE), self.silence_seconds)

    def exited(self, rows):
        if not self.exit.more:
            self.link.close()
        self.stream_ended()

    def hint(self):
        return super().hint() + (self.job.hint() if self.exit.status else "")

    def detach(self):
        self.tick.cancel()
        self.close_files()
        self.close_channels()

    def local_error(self, channel, error):
        name = (self.job.name, self.job.output_path, self.job.errors_path)[channel]
        self.trouble = self.trouble or ("%s: %s" % (name, error.strerror) if name else
                                        "%s: %s (TMPDIR)" % (tempfile.gettempdir(), error.strerror))

    def stream_ended(self):
        """EXIT comes after the end of each output, but the results of -g may not have their names yet."""
        if self.exit and not self.reported and not self.is_writing():
            self.judge_files()
            if self.files_are_over():
                self.reported = True
                self.detach()
                self.patron.run_ended(self)

    def rcvd_linger(self, flags, channel, payload):
        pass

    def link_lost(self, link, reason, violation):
        if self.exit:
            return                  # only our own files are missing now: the worker has done its part
        self.detach()
        if not self.accepted and link.finished and not violation:
            self.patron.came_too_late(self, reason)
        else:
            self.patron.run_lost(self, reason)


class Input(Pausable):
    """Reads standard input, whenever may_read() allows it: room() bytes at a time at most.

    feed(view) gets what has come; an empty view is the end.
    """

    def __init__(self, loop, may_read):
        self.loop, self.may_read = loop, may_read
        item = Inherited(0)
        # A regular file is read at its common offset, where the next process that reads it goes on.
        self.end = End(0, 0, lambda: None, ["read"]) if item.kind == FILE else local_end([item], ["read"], 3)
        self.buffer = memoryview(bytearray(PIPE_SIZE))
        self.ended = False

    def refresh(self):
        """Waits for input if there is room for it, else not."""
        wanted = not self.ended and not self.paused and self.may_read()
        self.loop.on_read(self.end.polled, self.readable if wanted else None)

    def stop(self):
        """Reads nothing more."""
        self.ended = True
        self.loop.on_read(self.end.polled, None)

    def readable(self):
        """Raises Fatal (111)."""
        if not self.end.may_read():
            self.pause()
            return self.refresh()
        try:
            count = self.end.read_into(self.buffer[:self.room()])
        except BlockingIOError:
            return
        except OSError as error:
            raise Fatal(EXIT_TEMPORARY, "standard input: %s" % error.strerror) from None
        self.feed(self.buffer[:count])
        self.refresh()


class NameInput(Input):
    """Standard input as a list of names, with a separator behind each.  give(names) is called when some have come."""

    def __init__(self, loop, separator, give):
        super().__init__(loop, lambda: True)
        self.separator, self.give = separator, give
        self.begun = b""            # a name whose end has not come
        self.is_whole = False       # whether all names have come

    def room(self):
        return 16 * 1024            # more names at a time would keep the runs waiting

    def feed(self, view):
        """Raises Fatal (100)."""
        *names, self.begun = (self.begun + bytes(view)).split(self.separator)
        if len(self.begun) > WORDS_MAX:
            raise Fatal(EXIT_USAGE, "standard input: a name of more than %d MiB; is it a list of names?"
                        % (WORDS_MAX >> 20))
        if not view:
            names.append(self.begun)
            self.is_whole = True
            self.stop()
        self.give([os.fsdecode(name) for name in names if name])


class Printer:
    """cexec -m -o -, cexec -b: prints the outputs on standard output, in the order of the jobs."""

    def __init__(self, batch, tasks):
        need_output()
        self.batch, self.loop = batch, batch.loop
        self.tasks = collections.deque(tasks)       # those whose outputs are not printed yet
        self.end = local_end([Inherited(1)], ["write"], 3)
        self.count = 0              # outputs that were printed or left out
        self.task, self.unprinted = None, b""       # whose output is being printed; bytes of it

    def add(self, task):
        self.tasks.append(task)

    def end_before(self, number):
        """The output ends before this task, which has failed: drops the output of each later one."""
        while self.tasks and self.tasks[-1].number > number:
            self.tasks.pop().discard()
        self.tasks.pop()

    def leave_out(self, tasks):
        """These will not be begun any more: the outputs of others do not wait for theirs."""
        gone = set(tasks)
        self.tasks = collections.deque(task for task in self.tasks if task not in gone)
        self.refresh()

    def has_room(self, task):
        """Whether a task may be begun: waiting outputs need descriptors, so their number is bounded."""
        return task.number <= self.count + OUTPUTS_MAX

    def refresh(self):
        """Begins to print the next output if it is whole; outputs of failed tasks are left out."""
        while not self.task and self.tasks and (self.tasks[0].done_before or self.tasks[0].exit_code is not None):
            task = self.tasks[0]
            if task.done_before or task.exit_code:
                self.tasks.popleft()
                self.count += 1
            else:
                self.task = task
                task.output_file.seek(0)
                self.loop.on_write(self.end.polled, self.writable)

    def writable(self):
        """Prints as much as standard output takes now: its reader may be slow.  Raises Fatal (111), BrokenPipeError."""
        log.status_line("")
        self.unprinted = self.unprinted or memoryview(self.task.output_file.read(FRAME_MAX))
        if not self.unprinted:
            return self.printed()
        try:
            self.unprinted = self.unprinted[self.end.write(self.unprinted):]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            raise
        except OSError as error:
            raise Fatal(EXIT_TEMPORARY, "standard output: %s; %s" % (error.strerror, self.batch.summary())) from None

    def printed(self):
        self.loop.on_write(self.end.polled, None)
        self.tasks.popleft().close()
        self.task, self.count = None, self.count + 1
        self.refresh()
        self.batch.begin_searches()


class Record:
    """How the jobs of a batch have ended at each worker."""

    def __init__(self):
        self.ended, self.failed, self.in_a_row = (collections.Counter() for _ in range(3))

    def add(self, worker_id, has_failed):
        self.ended[worker_id] += 1
        self.failed[worker_id] += has_failed
        self.in_a_row[worker_id] = (self.in_a_row[worker_id] + 1) * has_failed

    def is_bad(self, worker_id, running):
        """Whether so many failures in a row as its last ones are no accident, at the rate of failures elsewhere.

        running: the workers that have jobs now.  Two more jobs are assumed elsewhere, of which one has failed: so a
        worker that fails at once does not get all jobs before the first one elsewhere has ended.
        """
        ended = sum(self.ended.values()) - self.ended[worker_id]
        rate = (sum(self.failed.values()) - self.failed[worker_id] + 1) / (ended + 2)
        row = self.in_a_row[worker_id]
        return (row >= ROW_MIN and (ended > 0 or bool(running - {worker_id}))
                and rate ** row * self.ended[worker_id] < ACCIDENT)     # the row could have begun at each of its jobs


class Disk:
    """Waits until files are on the disk.

    A disk writes several files in the time of one.  So each waits in a thread, and there are at most `most` of these;
    more files wait in the loop.  So does a file if the last one took less than QUICK_STORE: a thread costs more.
    """

    def __init__(self, loop, most):
        self.most = most
        self.waiting = 0                            # how many files there are whose over() was not called
        self.seconds = 0.0                          # that the last one took
        self.ended = collections.deque()            # (over, None or an OSError): the threads append to it, and
        self.reader, self.writer = os.pipe()        # wake the loop
        loop.on_read(self.reader, self.woken)

    def store(self, file, over):
        """Calls over(None or an OSError) when the file is on the disk: perhaps before this returns."""
        try:
            fd = os.dup(file.fileno())
        except OSError as error:
            return over(error)
        self.waiting += 1
        if self.seconds < QUICK_STORE or self.waiting > self.most or not self.begin(fd, over):
            self.wait(fd, over)
            self.call_back()

    def begin(self, fd, over):
        """Begins to wait in a thread.  Returns False if there can be no more."""
        import _thread
        try:
            _thread.start_new_thread(lambda: (self.wait(fd, over), os.write(self.writer, b"1")), ())
            return True
        except RuntimeError:
            return False

    def wait(self, fd, over):
        """Waits for a file, in its thread or in the loop."""
        error, began = None, time.monotonic()
        try:
            await_disk(fd)
        except OSError as caught:
            error = caught
        self.seconds = time.monotonic() - began
        self.ended.append((over, error))

    def woken(self):
        os.read(self.reader, 4096)
        self.call_back()

    def finish(self):
        """Waits for all, whatever over() raises for one of them."""
        try:
            self.call_back()        # first those whose threads have woken the loop already
            while self.waiting:
                self.woken()
        finally:
            if self.waiting:
                self.finish()

    def call_back(self):
        """Calls over() for each file that has waited."""
        while self.ended:
            over, error = self.ended.popleft()
            self.waiting -= 1
            over(error)


class Batch(Patron):
    """cexec -m: does as many files at a time as the workers take, each on the least loaded worker.

    A worker takes the next file on the same connection, unless other clients wait for it.  In
    addition, two searches at a time find more workers, or fewer searches if -j leaves less room.
    """

    RUN = FileRun                   # the class of its runs

    def __init__(self, pub, group, terms, tasks, jobs, joblog, force, halt):
        super().__init__(pub, group, terms, Loop())
        self.jobs_max, self.joblog = jobs, joblog       # how many files at a time; the file of --log
        self.force = force          # -f: files that are done already are done again
        self.tasks, self.queue = tasks, collections.deque(task for task in tasks if not task.done_before)
        self.searches, self.runs = [], []
        self.silent_runs = []       # runs whose workers may be silent
        self.began, self.failures, self.done = time.monotonic(), 0, 0
        self.done_before = len(tasks) - len(self.queue)         # files that earlier batches have done
        self.where, self.causes = collections.Counter(), collections.Counter()      # of the failures
        self.halt, self.halted = halt, False        # the number of --halt or None; whether no more files are begun
        self.printer = Printer(self, tasks) if terms.pattern == "-" else None
        self.shows_progress = os.isatty(2) and not log.verbose
        self.record = Record()
        self.directories = set()    # they have new outputs, whose names may not be on the disk yet
        # No thread beside the Helpers of -i and -g: Python warns of a fork in a process with threads.
        self.disk = Disk(self.loop, 0 if terms.inputs or terms.results else STORES_MAX)

    def work(self):
        """Does all files.  Returns the exit code.  Raises Fatal (111) if no worker is found."""
        self.loop.catch([signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT], self.interrupted)
        if self.shows_progress:
            self.show_progress()
        try:
            if self.printer:
                self.printer.refresh()          # passes over files that are done already
            self.begin_searches()
            started_up()
            while self.is_busy():
                self.loop.turn()
            self.make_durable()
        finally:
            self.stop()
        if self.shows_progress:
            log.say(self.farewell())
        if self.failures > 1:
            log.say(self.failures_text())
        if self.halted:
            log.say("stopped after %d failures (--halt); %s" % (self.halt, self.summary()))
        return self.exit_code()

    def farewell(self):
        """Returns the last message for a terminal."""
        return "%d done, %d failed, after %s" % (
            self.done, self.failures, duration(int(time.monotonic() - self.began)))

    def exit_code(self):
        return self.failures if self.failures < EXIT_USAGE else FAILURES_MAX

    def is_busy(self):
        printing = self.printer and self.printer.task
        waiting = self.queue and not self.halted
        storing = self.disk.waiting
        return waiting or self.runs or storing or printing or any(search.chosen for search in self.searches)

    def make_durable(self):
        """Makes the names of all outputs durable, once for each directory.

        If a crash before this loses a name, the next batch does this file again: no harm.
        """
        for directory in self.directories:
            with or_fatal(directory):
                make_durable(directory)

    # Searches, and the files for the workers that they find

    def begin_searches(self):
        """Begins searches, if there are files for them, and -j leaves room."""
        silent = len(self.overdue())
        room = min(SEARCHES_MAX, self.jobs_max - len(self.runs) + silent)
        while len(self.searches) < min(room, self.ready() or silent) and self.begin_search():
            pass

    def begin_search(self, only=ANY_WORKER):
        """Begins a search.  Returns whether it could: CEXEC_LISTEN_PORTS may have only one.  Raises Fatal."""
        try:
            search = self.new_search(True, only)        # quiet: the batch shows one line for all of them
        except Fatal as error:
            if not self.searches and not self.runs:
                raise
            log.note("%s", error)
            return False
        self.searches.append(search)
        search.start()
        return True

    def has_more(self):
        """Whether there are files that were not begun."""
        return bool(self.queue)

    def ready(self):
        """Returns 0 if no file may be begun, else how many wait; with -o - the number of waiting outputs is a bound."""
        if self.halted or self.queue and self.printer and not self.printer.has_room(self.queue[0]):
            return 0
        return len(self.queue)

    def end_search(self, search):
        if search in self.searches:
            self.searches.remove(search)
            search.end()

    def end_searches(self):
        for search in list(self.searches):
            self.end_search(search)

    def not_found(self, search, message, code):
        """A search has given up.  The batch goes on if there is another search or a run."""
        self.end_search(search)
        if not self.runs and not self.searches:
            self.disk.finish()      # the summary counts these outputs too
            raise Fatal(code, "%s; %s" % (message, self.summary()))

    def tasks_for(self, worker_id):
        """Yields the Tasks that wait, and that this worker may have now."""
        bounded = itertools.takewhile(self.printer.has_room, self.queue) if self.printer else self.queue
        return (task for task in bounded if self.may_take(task, worker_id))

    def has_job_for(self, worker_id):
        # Without a queue too: so the offer is taken, and assign() ends the search.
        return not self.queue or any(self.tasks_for(worker_id)) or any(self.overdue(worker_id))

    def assign(self, search, worker_id):
        has_room = len(self.runs) + sum(search.chosen is not None for search in self.searches) < self.jobs_max
        task = self.take(worker_id) if has_room or self.give_up_silent(worker_id) else None
        if search not in self.searches:         # ended, because a task before this one could not be opened: see -b
            if task:
                self.put_back(task)
            self.loop.after(0, self.begin_searches)
            return None
        if task is None and not (has_room and self.ready()):
            self.end_search(search)
        return task

    def take(self, worker_id):
        """Returns the next Task for this worker, which is idle, that can be opened; None if there is none."""
        task = None
        while not task:
            task = next(self.tasks_for(worker_id), None) if self.ready() else None
            if task:
                self.queue.remove(task)
                task = self.opened(task)
            elif not self.give_up_silent(worker_id):
                return None
        return task

    # A task avoids a worker where its command has failed (--retries), or where a command is not there that the task
    # itself names, as in {}.  It waits for another worker as long as there may be one: for a second, and while one is
    # busy with this batch or has it in its line.

    def may_take(self, task, worker_id):
        return worker_id not in task.avoids or not task.refusals and not self.has_elsewhere(task)

    def has_elsewhere(self, task):
        return (time.monotonic() - task.since < UNFIT_SECONDS
                or any(run.hello.worker_id not in task.avoids for run in self.runs)
                or any(search.is_in_line(task.avoids) for search in self.searches))

    def note_lacking(self, hello, task, why, code):
        task.refusals = task.refusals or Refusals()
        task.refusals.add(hello.worker_id, self.called(hello), why, code)
        task.avoid(hello.worker_id)
        self.settle_later(task)

    def settle_later(self, task):
        if not task.unsettled:
            task.unsettled = True
            self.loop.after(UNFIT_SECONDS, lambda: self.settle(task))

    def settle(self, task):
        """A task fails whose own command is not there, if no other worker may have it."""
        task.unsettled = False
        if task not in self.queue:
            return
        if self.has_elsewhere(task):
            self.settle_later(task)
        else:
            self.queue.remove(task)
            message, code = task.refusals.text(ANY_WORKER, CANNOT)
            self.task_over(task, Outcome(code, "notstarted=%d" % code, message, hint=task.hint()))
            self.begin_searches()

    def opened(self, task):
        """Opens the files of a Task.  Returns it; None if that failed, and it is over."""
        try:
            task.open(self.slot_number() if self.terms.has_slots else 1)
            return task
        except (OSError, ValueError) as error:
            self.task_over(task, failure(error_text(error, task.name), hint=task.value_hint(error)))
            return None

    def slot_number(self):
        """Returns the smallest number from 1 up that no other job has now."""
        return free_number({run.job.slot for run in self.runs} | {
            search.job.slot for search in self.searches if search.job}, 1)

    # A silent worker.  While a worker has been silent for longer than a run's patience(), the batch searches as if
    # one more job waited.  A worker that makes an offer then, or has just ended a job, and for which no job waits, is
    # an idle slot: only then the silent one is given up, and its job goes there.

    def watch(self, run):
        self.silent_runs = [one for one in self.silent_runs if one in self.runs and one.link.silence() > one.patience()]
        if not run.exit and run.link.silence() > run.patience() and run not in self.silent_runs:
            self.silent_runs.append(run)
        if self.silent_runs:
            self.begin_searches()

    def overdue(self, worker_id=None):
        """Returns the runs that are given up if a slot of this worker is idle.  After --halt nothing is begun any more.

        Any byte of a worker counts for all its runs: on a slow link one may wait long behind the others.
        A run that was the last try is given up too: its job then fails sooner than by CEXEC_TIMEOUT_PINGPONG.
        """
        silence = {}
        for run in self.runs if self.silent_runs and not self.halted else ():
            worker = run.hello.worker_id
            silence[worker] = min(run.link.silence(), silence.get(worker, float("inf")))
        return [run for run in self.silent_runs if run in self.runs and not run.exit
                and silence.get(run.hello.worker_id, 0) > run.patience() and worker_id not in run.job.avoids]

    def give_up_silent(self, worker_id):
        """Gives up the run that has waited longest, so that this worker may do its job.  Returns whether there was one.
        """
        run = max(self.overdue(worker_id), key=lambda run: run.link.silence(), default=None)
        if run:
            run.link.fail("no sign of life for %d s, and another worker is idle" % run.link.silence())
        return run is not None

    def put_back(self, task):
        task.discard()
        self.queue.appendleft(task)
        if self.halted and self.printer:
            self.printer.leave_out([task])

    def begin(self, search, candidate, task):
        self.searches.remove(search)
        self.begin_run(candidate.link, candidate.hello, task, accepted=True)
        self.begin_searches()

    def begin_run(self, link, hello, task, accepted):
        """GO was sent for a Task.  It fails if no descriptor, or no process for the files of -i and -g, is left."""
        try:
            self.runs.append(self.RUN(self, link, hello, task, accepted))
        except (Fatal, OSError) as error:
            link.close()
            self.task_over(task, failure(error_text(error)))

    # The end of a run

    def run_ended(self, run):
        """EXIT: the file is done, or has failed; its worker may take the next file."""
        self.runs.remove(run)
        outcome = run.outcome()
        if run.exit.how == HOW_HOST_FAILED and not run.trouble:
            return self.host_failed(run, outcome)
        self.note_result(run, outcome)          # first: go_on() asks whether this worker is avoided now
        if outcome.exit_code and not run.trouble and run.job.retries and not self.halted:
            self.try_again(run, outcome)
            self.go_on(run)
        elif outcome.exit_code:
            self.conclude(run, outcome)
            self.go_on(run)         # last: this failure may stop the batch
        else:
            self.go_on(run)         # first: the worker computes while the output waits for the disk
            self.store(run, outcome)
        self.begin_searches()

    def host_failed(self, run, outcome):
        """Nothing has run, for a reason that lies in the worker's host: others do the job, and it is left alone."""
        worker_id, task = run.hello.worker_id, run.job
        self.avoid.refusals.add(worker_id, run.worker, "cannot run its command: " + outcome.reason, outcome.exit_code)
        self.avoid.for_now(worker_id)
        run.link.close()
        again = worker_id in task.avoids        # then there was no other one
        task.avoid(worker_id)
        if outcome.exit_code != EXIT_TEMPORARY and (again or len(task.avoids) >= HOSTS_MAX):
            self.conclude(run, outcome)  # as one that is too large for their disks: more tries would cost as much
        else:
            log.once(outcome.text(), say=log.tell_user)
            self.alerts.tell_end(run, outcome)
            self.put_back(task)
        self.begin_searches()

    def note_result(self, run, outcome):
        """A command has ended.  A worker where jobs fail that succeed elsewhere gets no more for a while."""
        worker_id = run.hello.worker_id
        self.avoid.worked(worker_id)
        if run.trouble:
            return
        self.record.add(worker_id, bool(outcome.exit_code))
        if not outcome.exit_code:
            self.avoid.forgive(worker_id)
        elif self.record.is_bad(worker_id, {one.hello.worker_id for one in self.runs}):
            why = "its last %d have failed, and elsewhere they do not" % self.record.in_a_row[worker_id]
            self.avoid.refusals.add(worker_id, run.worker, "gets no jobs now: " + why, EXIT_TEMPORARY)
            if worker_id not in self.avoid:
                seconds = self.avoid.for_now(worker_id, BAD_SECONDS)
                log.once("worker %s gets no more jobs for %d s: %s" % (run.worker, seconds, why), worker_id,
                         log.tell_user)

    def try_again(self, run, outcome):
        """Does a Task whose command has failed again (--retries)."""
        task = run.job
        self.tell_again(task, outcome, run)
        self.alerts.tell_end(run, outcome)
        self.log_run(task, outcome, run)
        task.retries -= 1
        task.avoid(run.hello.worker_id)
        self.put_back(task)

    def tell_again(self, task, outcome, run):
        log.tell_user("%s at %s: %s; runs it again" % (task.name, run.worker, outcome.text()))

    def conclude(self, run, outcome):
        self.alerts.tell_end(run, outcome)
        self.task_over(run.job, outcome, run)

    def store(self, run, outcome):
        """A success: if its output is to have a name, it gets this when it is on the disk."""
        def stored(error):
            self.conclude(run, failure(error_text(error, run.job.name)) if error else self.commit(run.job, outcome))
        if run.job.output_path is None:
            stored(None)
        else:
            self.disk.store(run.job.output_file, stored)

    def commit(self, task, outcome):
        """Gives the output of a success its name.  Returns the Outcome, which is a failure if that fails."""
        try:
            task.commit()
            if task.output_path is not None:
                self.directories.add(os.path.dirname(task.output_path) or ".")
            return outcome
        except OSError as error:
            return failure(error_text(error, task.name))

    def go_on(self, run):
        """Gives the run's worker the next file, if there is one for it and the worker takes it."""
        worker_id = run.hello.worker_id
        may_go_on = run.exit.more and not run.link.closed and worker_id not in self.avoid
        following = self.take(worker_id) if may_go_on else None
        if following:
            run.link.hold()         # a small file goes with its JOB: each packet costs both sides about as much
            run.link.send_frames([*job_frames(**following.job_fields()), make_frame(GO)])
            self.begin_run(run.link, run.hello, following, accepted=False)
            run.link.release()
        else:
            run.link.close()

    def came_too_late(self, run, reason):
        """The worker has finished without the next file's ACCEPT: nothing has run."""
        self.runs.remove(run)
        log.note("%s: worker %s lost: %s before it began", run.job.name, run.worker, reason)
        self.put_back(run.job)
        self.begin_searches()

    def run_again(self, run):
        self.log_run(run.job, loss("run again"), run)
        self.runs.remove(run)
        self.put_back(run.job)
        self.begin_searches()

    def failed(self, run, reason, objection):
        self.runs.remove(run)
        self.task_over(run.job, loss(reason), run)
        self.begin_searches()

    def task_over(self, task, outcome, run=None):
        """A file is done or has failed: tells the user, writes the joblog, prints outputs whose turn it is."""
        task.conclude(outcome)      # first: the printer and the log need its exit code
        if outcome.exit_code:
            self.failures += 1
            self.where[self.worker_of(task, outcome, run)] += 1
            self.causes[outcome.common_cause()] += 1
        else:
            self.done += 1
        self.tell(task, outcome, run)
        self.log_run(task, outcome, run)
        if outcome.exit_code:       # not earlier: these leave the file with the errors to another Task
            task.discard()
        elif task.output_path is not None:
            task.close()
        else:
            task.close("input_file", "errors_file")
        if self.printer:
            self.printer.refresh()
        if outcome.exit_code and self.failures == self.halt:
            self.stop_early()

    def stop_early(self):
        """Begins no more files; those that run go on to their end."""
        if self.has_more():
            self.halted = True
            self.end_searches()
            if self.printer:
                self.printer.leave_out(self.queue)

    def worker_of(self, task, outcome, run):
        """Returns the name of the worker where a job has ended so; "" if the reason is here."""
        return run.worker if run and outcome.kind != "failed" else ""

    def tell(self, task, outcome, run):
        """Says why a file failed, and shows what its command wrote on standard error, also after a success."""
        said = task.errors_file and os.fstat(task.errors_file.fileno()).st_size
        if not task.exit_code and (task.errors_path or not said):
            return
        text = outcome.text() if task.exit_code else "done, and said:"
        log.status_line("")
        worker = "" if outcome.lead else self.worker_of(task, outcome, run)     # a lead names the worker
        log.say("%s%s: %s%s" % (task.name, " at " + worker if worker else "", text,
                                " (see %s)" % task.errors_path if said and task.errors_path else ""))
        if said and not task.errors_path:
            task.errors_file.seek(0)
            for part in iter(lambda: task.errors_file.read(FRAME_MAX), b""):
                log.copy(part)
            if log.midline:
                log.write("\n")

    def log_run(self, task, outcome, run):
        """Writes a line in the format of parallel's --joblog, if there is --log, for a job that is over or a lost run.

        For parallel --resume a job has run whose number begins a line: so a blank comes before the number of a job
        that runs again.
        """
        if not self.joblog:
            return
        sent, received = run.moved() if run else (0, 0)
        seconds = time.monotonic() - run.began if run else 0.0
        worker, started_at = (run.worker, run.started_at) if run else ("-", time.time())
        status = LOST if outcome.kind == "lost" else 0 if outcome.signal else outcome.exit_code
        line = "\t".join(map(str, [
            task.number if task.exit_code is not None else " %d" % task.number, worker, "%.3f" % started_at,
            "%10.3f" % seconds, sent, received, status, outcome.signal, ""]))
        write_joblog(self.joblog, line.encode() + in_a_line(os.fsencode(task.name)))

    # For the user

    def failures_text(self):
        """Returns how many jobs have failed, where, and the commonest causes."""
        counts, causes = self.where.most_common(), self.causes.most_common()
        where = ["%d %s" % (count, "at " + worker if worker else "here") for worker, count in counts[:8]]
        where += ["%d elsewhere" % sum(count for _, count in counts[8:])] * (len(counts) > 8)
        why = ["%s (%d)" % item for item in causes[:3]] + ["..."] * (len(causes) > 3)
        return "%d failed, %s: %s" % (self.failures, ", ".join(where), ", ".join(why))

    def summary(self):
        """How much is done, and how to do the rest."""
        again = "; the same command again does the rest" if any(task.outputs() for task in self.tasks[:1]) else ""
        if again and self.force:
            again = "; the same command again does all of them once more (-f)"
        return "%d of %s %s are done%s" % (
            self.done + self.done_before, self.total(), self.terms.unit(), again)

    def total(self):
        """Returns how many files there are, as a text."""
        return str(len(self.tasks))

    def waits(self):
        """Returns what the batch waits for, in texts."""
        return list(filter(None, (search.waits() for search in self.searches)))

    def stop(self):
        """Ends all searches and runs, removes unfinished outputs, and gives whole ones their names."""
        log.status_line("")
        self.end_searches()
        for run in self.runs:
            self.abandon(run)
        self.runs = []
        self.disk.finish()
        self.alerts.flush()         # a second signal may end this process before at_end does that

    def abandon(self, run):
        """Ends a run: the link closes, so the worker ends the command."""
        run.detach()
        run.link.close()
        run.job.discard()

    def interrupted(self, number):
        self.stop()
        log.say("interrupted: " + self.summary())
        die_of(number)

    def show_progress(self):
        log.status_line(self.progress())
        self.loop.after(0.2, self.show_progress)

    def progress(self):
        seconds, to_do = time.monotonic() - self.began, len(self.queue) + len(self.runs)
        finished = self.done + self.failures
        rate = finished / seconds if seconds else 0.0
        text = "%d/%s done, %d running, %d failed" % (
            self.done + self.done_before, self.total(), len(self.runs), self.failures)
        if finished:
            text += ", %.1f/s" % rate
        if finished and self.total().isdecimal():
            text += ", %s left" % duration(int(to_do / rate))
        if not self.runs:
            text = ", ".join([text] + self.waits()[:1])
        workers = collections.Counter(run.worker for run in self.runs)
        silent = {run.worker: " (%s: %s)" % (run.job.name, run.silent_for()) for run in self.runs if run.silent_for()}
        return "  ".join([text] + ["%s*%d%s" % (worker, count, silent.get(worker, ""))
                                   for worker, count in sorted(workers.items())])


class QueueBatch(Batch):
    """cexec -m with names from standard input: each begins as it comes.

    A job whose names collide with those of earlier ones fails, because these have begun already.
    """

    def __init__(self, pub, group, terms, separator, jobs, joblog, force, halt):
        super().__init__(pub, group, terms, [], jobs, joblog, force, halt)
        self.input = NameInput(self.loop, separator, self.add)
        self.input.refresh()
        used = [joblog and joblog.name, terms.errors and os.path.join(terms.errors, "1")]
        terms.names.note_above(filter(None, used + [text for text in terms.inputs if not has_placeholders(text)]))

    def add(self, names):
        """These names have come."""
        for name in names:
            if not self.halted:
                self.add_task(new_task(self.terms, len(self.tasks) + 1, (name,)))
        self.terms.names.list_inputs()          # those that an output was in
        if self.printer:
            self.printer.refresh()
        self.begin_searches()

    def add_task(self, task):
        self.tasks.append(task)
        if self.printer:
            self.printer.add(task)
        try:
            task.note_inputs()
            task.note_outputs()
            if task.patterns:
                self.terms.names.note_nested(task)
            check_directories(self.terms.pattern, [task])
        except (Fatal, ValueError) as error:        # ValueError: a NUL in the name
            return self.task_over(task, failure(str(error)))
        if not self.force and task.check_done():
            self.done_before += 1
        else:
            self.queue.append(task)

    def is_busy(self):
        return not self.input.ended or super().is_busy()

    def has_more(self):
        return super().has_more() or not self.input.ended

    def stop_early(self):
        super().stop_early()
        self.input.stop()

    def farewell(self):
        return super().farewell() if self.done or self.failures else nothing_to_do(self.tasks, self.terms.unit())

    def total(self):
        return "%d%s" % (len(self.tasks), "" if self.input.is_whole else "+")

    def waits(self):
        return super().waits() or ["waits for names"] * (not self.queue)


def nothing_to_do(tasks, unit):
    return "nothing to do: %s" % ("all %d %s are done already (-f does them again)" % (
        len(tasks), unit) if tasks else "no input is named")


def jobs_at_once(each, others=OUTPUTS_MAX + 256):
    """How many jobs can run at a time, if each needs so many descriptors, and all together so many others."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * JOBS_MAX if hard == resource.RLIM_INFINITY else min(hard, 4 * JOBS_MAX)
    with suppress(OSError, ValueError):         # macOS allows fewer than its hard limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
        soft = max(soft, wanted)
    if not LINUX:
        soft = min(soft, 1024)      # select cannot wait for more
    return max(1, (soft - others) // each)


def main_batch(reach, words, options):
    """Does a batch.  Returns its exit code."""
    pattern = options.output
    if pattern is None:
        pattern = "-" if options.values or options.results else "{}.out"
    for text in [pattern, *options.inputs, *options.results]:
        if "{%}" in text:
            raise Fatal(EXIT_USAGE, "%s: {%%} is for arguments and variables: no job has a slot yet" % text)
    appends = options.values and ":::" in words
    words, inputs = batch_inputs(words, options.zero)
    separator = b"\0" if options.zero else b"\n"
    if inputs is None and options.dry_run:
        inputs = all_names(separator)
    environment, arguments = parse_words(words, options)
    if appends and arguments and not any(has_placeholders(os.fsdecode(word)) for word in environment + arguments):
        arguments.append(b"{}")     # as parallel does
    terms = BatchTerms(environment, arguments, pattern, options.values, options.errors, retries=options.retries,
                       inputs=options.inputs, results=options.results)
    if options.results:
        check_current_directory()
    tasks = batch_tasks(terms, inputs, options)
    todo = [task for task in tasks if options.force or not task.check_done()]
    log.note("%d jobs, %d of them are done already", len(tasks), len(tasks) - len(todo))
    if options.dry_run:
        return show_tasks(options, todo)
    joblog = open_joblog(options.joblog, pattern == "-") if options.joblog else None
    if options.errors:
        make_errors_directory(options.errors, terms.names)
    jobs = min(options.jobs or JOBS_MAX, jobs_at_once(9 if options.inputs or options.results else 4))
    if inputs is None:
        return QueueBatch(*reach(), terms, separator, jobs, joblog, options.force, options.halt).work()
    if not todo:
        (log.say if tasks else log.tell_user)(nothing_to_do(tasks, terms.unit()))
        return 0
    return Batch(*reach(), terms, tasks, jobs, joblog, options.force, options.halt).work()


def make_errors_directory(path, names):
    """Makes the directory of --errors.  Raises Fatal (111)."""
    with or_fatal("--errors %s" % path):
        os.makedirs(path, exist_ok=True)
    names.note_errors_made(path)


def show_tasks(options, tasks):
    """--dry-run: prints for each Task a shell command that does the same.  Returns 0."""
    errors = tasks[0].terms.errors if tasks else None
    if errors and not os.path.isdir(errors):
        print_out(os.fsencode("mkdir -p -- %s\n" % shlex.quote(errors)))
    for task in tasks:
        try:
            environment, arguments = task.fill_words()
        except (OSError, ValueError) as error:
            raise Fatal(EXIT_USAGE, "%s: %s" % (task.name, error_text(error, task.name))) from None
        words = [b"cexec"] + [b"-n"] * task.terms.values
        for option, values in (b"-i", task.input_paths()), (b"-g", task.patterns):
            words += [word for value in values for word in (option, os.fsencode(value))]
        named = [word for hosts in options.hosts for word in ("-s", hosts)] or options.words[:1]
        words += [*map(os.fsencode, named), *environment]
        words += [b"--"] * bool(arguments) + arguments
        line = " ".join(shlex.quote(os.fsdecode(word)) for word in words)
        ends = [("<", task.input_path), (">", task.output_path), ("2>", task.errors_path)]
        line += "".join(" %s %s" % (sign, shlex.quote(name)) for sign, name in ends if name)
        print_out(os.fsencode(line) + b"\n")
    return 0


# ---------------------------------------------------------------------------
# cexec -b: standard input in blocks, a job each
# ---------------------------------------------------------------------------
#
#   standard input --Splitter--> Blocks --Batch.queue, as with -m--> outputs --Printer--> standard output
#
# A Block keeps its bytes until its output is whole, so that its job can be done again.  The
# number of blocks has a bound: as many as workers have had at a time so far, one that is ready
# for the next worker, and one that is being filled.  A block counts until it is printed.

HEADER_MAX = 1024 * 1024            # bytes of the lines of --header


class Block(Task):
    """A job whose input is a part of standard input, from this offset on, behind the header, in an unnamed file."""

    def __init__(self, terms, number, offset, header=b""):
        super().__init__(terms, number, ("block %d (from byte %d)" % (number, offset),), None)
        self.input_path = None
        self.data = tempfile.TemporaryFile(buffering=0)
        self.size = self.whole = 0                  # bytes; bytes in whole lines, both without the header
        self.header_size = len(header)
        write_all(self.data.write, header)

    def has_own_command(self):
        return False

    def fill(self, text, form=str, between=" "):
        return fill_pattern(text, None, self.number, self.slot)

    def fill_words(self):
        return self.terms.words_for(self.fill)

    def open_input(self):
        self.stamp = None
        self.data.seek(0)
        self.input_file = open(os.dup(self.data.fileno()), "rb", 0)

    def conclude(self, outcome):
        super().conclude(outcome)
        self.data.close()

    def add(self, view):
        """Appends bytes.  Raises OSError."""
        newline = bytes(view).rfind(b"\n")
        if newline >= 0:
            self.whole = self.size + newline + 1
        self.size += len(view)
        write_all(self.data.write, view)

    def cut_off(self):
        """Yields the bytes after the last whole line, in pieces, and then removes them.  Raises OSError."""
        self.data.seek(self.header_size + self.whole)
        yield from iter(lambda: self.data.read(FRAME_MAX), b"")
        self.data.truncate(self.header_size + self.whole)
        self.size = self.whole


class Splitter(Input):
    """Cuts standard input into Blocks, as GNU parallel's --pipe --block does: as many whole lines as fit the size.

    A longer line is a block of its own.  Each Block begins with the header, the first lines of the
    input.  give(block) is called for each Block that is full, and for the last one.  may_read()
    tells whether there is room for another Block.
    """

    def __init__(self, loop, terms, size, header_lines, may_read, give):
        super().__init__(loop, may_read)
        self.terms, self.size, self.give = terms, size, give
        self.block, self.count = None, 0
        self.header, self.missing = bytearray(), header_lines   # the header so far; the lines of it to come
        self.offset = 0             # where the next block begins in the input

    def stop(self):
        """Reads nothing more, and drops the block that is being filled."""
        super().stop()
        self.block = None

    def feed(self, view):
        """Raises Fatal (111)."""
        with or_fatal(tempfile.gettempdir(), hint=" (TMPDIR)"):
            self.take(self.take_header(view)) if view else self.finish()

    def room(self):
        """How many bytes to read: what the block has room for, or a block's size while one line is longer."""
        filled = self.block.size if self.block else 0
        return min(len(self.buffer), self.size - filled if filled < self.size else self.size)

    def take_header(self, view):
        """Takes the lines of the header.  Returns what comes behind them.  Raises Fatal (100)."""
        while self.missing and view:
            newline = bytes(view).find(b"\n") + 1
            self.header += view[:newline or len(view)]
            view = view[newline or len(view):]
            self.missing -= bool(newline)
            if len(self.header) > HEADER_MAX:
                raise Fatal(EXIT_USAGE, "--header: these lines have more than %d MiB" % (HEADER_MAX >> 20))
            self.offset = len(self.header)
        return view

    def take(self, view):
        if not view:
            return
        self.block = self.block or self.new_block()
        if self.block.size >= self.size:            # one long line: the block ends with it
            newline = bytes(view).find(b"\n") + 1
            self.block.add(view[:newline or len(view)])
            view = view[newline or len(view):]
        else:
            self.block.add(view)
            view = view[:0]
        if self.block.size >= self.size and self.block.whole:
            self.cut(view)

    def cut(self, view):
        """Ends a block after its last whole line; the bytes after that, and view, begin the next block."""
        full, self.block = self.block, None
        self.offset += full.whole
        if full.size > full.whole or view:
            self.block = self.new_block()
            for piece in full.cut_off():
                self.block.add(piece)
            self.give(full)
            if view:
                self.take(view)
        else:
            self.give(full)

    def new_block(self):
        self.count += 1
        return Block(self.terms, self.count, self.offset, self.header)

    def finish(self):
        """The input has ended; if that was within the header, all of it is one block."""
        if self.missing:
            short, self.header, self.offset = self.header, b"", 0
            if short:
                self.block = self.new_block()
                self.block.add(memoryview(short))
        last = self.block
        self.stop()
        if last:
            self.give(last)


class BlockBatch(Batch):
    """cexec -b.  The output ends before the first block that fails: only the blocks before it are still done."""

    def __init__(self, pub, group, terms, size, header_lines, jobs, joblog):
        super().__init__(pub, group, terms, [], jobs, joblog, False, None)
        self.widest = 0             # the largest number of blocks that workers had at a time
        self.broken = None          # the first Block that has failed
        self.splitter = Splitter(self.loop, terms, size, header_lines, self.may_read, self.add)

    def may_read(self):
        """Whether one more block may be filled, see above."""
        return len(self.printer.tasks) < self.widest + 2

    def add(self, block):
        self.queue.append(block)
        self.printer.add(block)
        self.begin_searches()

    def begin_searches(self):
        self.widest = max(self.widest, len(self.runs))
        super().begin_searches()
        self.splitter.refresh()

    def is_busy(self):
        return not self.splitter.ended or self.printer.tasks or super().is_busy()

    def task_over(self, block, outcome, run=None):
        if outcome.exit_code:       # first: else the printer would go on with the block after this one
            self.broken = block
            self.drop_from(block.number)
        super().task_over(block, outcome, run)

    def drop_from(self, first):
        """Ends the output before this block, which has failed, and forgets all blocks after it."""
        self.splitter.stop()
        for run in [run for run in self.runs if run.job.number > first]:
            self.runs.remove(run)
            self.abandon(run)
        self.end_searches()
        self.queue = collections.deque(block for block in self.queue if block.number < first)
        self.printer.end_before(first)

    def put_back(self, block):
        super().put_back(block)
        if self.broken and block.number > self.broken.number:
            self.queue.popleft()

    def exit_code(self):
        if not self.broken:
            return 0
        log.say("the output ends before %s" % self.broken.name)
        return self.broken.exit_code

    def summary(self):
        return "the output of %d blocks was printed" % self.printer.count

    def progress(self):
        return "%d blocks done, %d running, %d printed" % (self.done, len(self.runs), self.printer.count)


SIZES = {"": 1, "k": 1000, "m": 1000 ** 2, "g": 1000 ** 3, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_size(text):
    """The bytes in "1000000", "64M", "1m"; as with parallel, K M G are powers of 1024, k m g of 1000.  Raises Fatal."""
    digits, letter = (text[:-1], text[-1:]) if text[-1:] in SIZES else (text, "")
    size = number_of(digits) * SIZES[letter] if digits.isdecimal() else 0
    if not 0 < size <= 1 << 40:
        raise Fatal(EXIT_USAGE, "-b %s: not a size as in 64M (K, M, G; a TiB at most)" % cut(text, 20))
    return size


def main_blocks(reach, words, options):
    """Does standard input in blocks.  Returns the exit code."""
    size = parse_size(options.blocks)
    terms = BatchTerms(*parse_words(words, options), errors=options.errors, retries=options.retries)
    note_names(terms, [], options, float("inf"))
    joblog = open_joblog(options.joblog, True) if options.joblog else None
    if options.errors:
        make_errors_directory(options.errors, terms.names)
    jobs = min(options.jobs or JOBS_MAX, jobs_at_once(4))
    return BlockBatch(*reach(), terms, size, options.header or 0, jobs, joblog).work()


# ---------------------------------------------------------------------------
# cexec -A: a job on every worker
# ---------------------------------------------------------------------------
#
#   Survey (as -l) --a HostTask for each worker--> Batch.queue --Search for that worker only--> runs --> task_over
#
# The search for a busy worker waits in this worker's line, like any other client.  A task leaves the queue
# when its worker has offered.

LINE_MAX = 1024 * 1024              # bytes of a line that are kept until its end comes
EVERY_PAUSE = 0.010                 # seconds between the beginnings of two searches


def labels_of(workers):
    """Returns {worker_id: label}: the host's name; if several have it, with the address, and a number if needed.

    A label is the name of a directory too: so "/" in it is escaped, and a dot at its beginning, as in ".ssh".
    """
    names = {worker_id: re.sub(r"/|^\.", lambda found: "\\x%02x" % ord(found.group()),
                               printable(row["host"] or row["address"])) for worker_id, row in workers.items()}
    long_names = {worker_id: "%s[%s]" % (name, printable(workers[worker_id]["address"]))
                  for worker_id, name in names.items()}
    short, long = collections.Counter(names.values()), collections.Counter(long_names.values())
    labels, numbers = {}, collections.Counter()
    for worker_id in sorted(names):
        label = names[worker_id] if short[names[worker_id]] == 1 else long_names[worker_id]
        numbers[label] += 1
        labels[worker_id] = label if long[label] < 2 else "%s#%d" % (label, numbers[label])
    return labels


class LineWriter(Writer):
    """Standard output or standard error, for whole lines from many jobs."""

    def __init__(self, loop, number):
        super().__init__(loop, local_end([Inherited(number)], ["write"], 3))
        self.number = number

    def is_full(self):
        return len(self.pending) >= FRAME_MAX

    def failed(self, error):
        """Raises Fatal (111), BrokenPipeError."""
        if isinstance(error, BrokenPipeError):
            raise error
        raise Fatal(EXIT_TEMPORARY, "%s: %s" % (STANDARD[self.number], error.strerror)) from None


class LineEnd(End):
    """The End of one output of a job: puts the worker's label before each line, and gives it to a LineWriter."""
    # All jobs share 1 and 2, but the Loop calls only one function for a descriptor: so each waits for a copy.

    def __init__(self, writer, label):
        copy = lifted(writer.number, 3)
        super().__init__(copy, copy, self.finish, ["write"])
        self.writer, self.label, self.line = writer, label.encode() + b": ", bytearray()

    def write(self, view):
        if self.writer.is_full():
            raise BlockingIOError
        self.add(view)
        return len(view)

    def add(self, data):
        whole, newline, rest = bytes(data).rpartition(b"\n")
        self.line += whole if newline else rest         # in its place: a copy at each small write would take long
        if newline or len(self.line) > LINE_MAX:
            self.writer.add(b"".join(self.label + line + b"\n" for line in self.line.split(b"\n")))
            self.line = bytearray(rest if newline else b"")

    def finish(self):
        """Adds the last line, if it has no newline."""
        if self.line:
            self.add(b"\n")
        os.close(self.polled)


class HostTask(Task):
    """The job of cexec -A for one worker: its outputs are shown as they come."""

    def __init__(self, terms, number, worker_id, label, source, writers):
        super().__init__(terms, number, (label,), None)
        self.worker_id, self.label = worker_id, label
        self.source, self.offset = source       # the descriptor that each job reads, from this offset
        self.writers = writers
        self.directory = label

    def fill(self, text, form=str, between=" "):
        return text                 # nothing is filled in: the jobs differ in their hosts only

    def fill_words(self):
        return self.terms.environment, self.terms.arguments

    def open_input(self):
        self.input_file = open(lifted(self.source, 3), "rb", 0)

    def open_outputs(self):
        """They are LineEnds."""

    def has_own_command(self):
        return False

    def ends(self):
        """Yields the Ends.  Raises OSError."""
        yield FileEnd(self.input_file.fileno(), self.offset)
        for writer in self.writers:
            yield LineEnd(writer, self.label)

    def commit(self):
        """Its output has no name."""

    def objection(self, run):
        return ""                   # that it is done again if its worker is lost was not asked for


class HostRun(FileRun):
    """One run of a HostTask."""

    def detach(self):
        # Of a lost job, show the output that has come.  An error in __init__() can have left us without these channels.
        outputs = [channel for number, channel in self.channels.items() if number in (1, 2)]
        for channel in filter(Channel.is_writing, outputs):
            channel.end.add(bytes(channel.sink.queue))
        super().detach()

    def local_error(self, channel, error):
        self.trouble = self.trouble or "standard input: %s" % error.strerror

    def rcvd_linger(self, flags, channel, payload):
        self.patron.say(self.job, "the command has ended, and a process that it left behind holds its output")


class Everywhere(Batch):
    """cexec -A: one job on each worker, all at the same time if there are descriptors, independent of each other."""

    RUN = HostRun

    def __init__(self, pub, group, terms, workers, source, most):
        super().__init__(pub, group, terms, [], most, None, False, None)
        out = LineWriter(self.loop, 1)
        self.writers = out, out if os.path.samestat(os.fstat(1), os.fstat(2)) else LineWriter(self.loop, 2)
        labels = labels_of(workers)
        self.tasks = [HostTask(terms, number, worker_id, labels[worker_id], source, self.writers)
                      for number, worker_id in enumerate(sorted(workers, key=labels.get), 1)]
        self.timer = self.loop.after(0, self.begin_searches)        # for the next search
        self.shows_progress = False             # the lines show how far it is
        for task in self.tasks:
            if workers[task.worker_id]["state"] == "serving":
                self.queue.append(task)
            else:
                self.task_over(task, failure("is draining: it takes no more jobs"))

    def exit_code(self):
        return max(task.exit_code for task in self.tasks)

    def is_busy(self):
        return self.queue or self.searches or self.runs or any(writer.pending for writer in self.writers)

    def begin_searches(self):
        """Begins the next search, and sets a timer for the one after it.

        All workers hear each announcement.  A hundred at once, all repeated, would be too many for
        a busy machine.
        """
        self.timer.cancel()
        sought = {search.only for search in self.searches}
        only = next((task.worker_id for task in self.queue if task.worker_id not in sought), None)
        if only is not None and len(self.searches) + len(self.runs) < self.jobs_max and self.begin_search(only):
            self.timer = self.loop.after(EVERY_PAUSE, self.begin_searches)

    def may_take(self, task, worker_id):
        return task.worker_id == worker_id

    def note_result(self, run, outcome):
        """A worker has only one job."""

    def assign(self, search, worker_id):
        task = self.opened(self.dequeue(search))
        if task is None:
            self.end_search(search)
        return task

    def dequeue(self, search):
        """Takes the Task for the worker of a search from the queue.  Returns it."""
        task = next(task for task in self.queue if task.worker_id == search.only)
        self.queue.remove(task)
        return task

    def not_found(self, search, message, code):
        self.end_search(search)
        self.task_over(self.dequeue(search), failure(message, code))
        self.begin_searches()

    def host_failed(self, run, outcome):
        self.conclude(run, outcome)     # this is its host's result
        run.link.close()
        self.begin_searches()

    def watch(self, run):
        """No other worker can do its job."""

    def failed(self, run, reason, objection):
        super().failed(run, reason + "; the command may have run", objection)

    # For the user

    def worker_of(self, task, outcome, run):
        return task.label

    def tell(self, task, outcome, run):
        if outcome.exit_code:
            self.say(task, outcome.text())

    def tell_again(self, task, outcome, run):
        self.say(task, outcome.text() + "; runs it again")      # always: the lines of this run were shown

    def say(self, task, text):
        """Adds a message to standard error, after the lines that wait there."""
        line = "%s: %s: %s\n" % (log.applet, task.label, printable(text))
        self.writers[1].add(line.encode("utf-8", "backslashreplace"))

    def stop(self):
        """Ends all searches and runs, and writes the output that has come."""
        super().stop()
        for writer in self.writers:
            writer.drain()

    def summary(self):
        return "not over on " + ", ".join(task.label for task in self.tasks if task.exit_code is None)


def input_for_all(empty):
    """Returns (descriptor, offset) of the input that each job reads.  Raises Fatal (111)."""
    item = Inherited(0)
    if item.kind == FILE and not empty:
        return 0, os.lseek(0, 0, os.SEEK_CUR)
    if item.kind in (PIPE, SOCKET) and not empty:
        return kept_input(), 0
    return os.open(os.devnull, os.O_RDONLY), 0


def kept_input():
    """Reads standard input to its end.  Returns a descriptor of an unnamed file that has it.  Raises Fatal (111)."""
    with or_fatal("standard input, or " + tempfile.gettempdir(), hint=" (TMPDIR)"):
        with tempfile.TemporaryFile(buffering=0) as file, open(0, "rb", closefd=False) as source:
            shutil.copyfileobj(source, file, FRAME_MAX)
            return os.dup(file.fileno())


def main_everywhere(reach, words, options):
    """Runs a job on every worker.  Returns the exit code."""
    need_output()
    terms = BatchTerms(*parse_words(words, options), pattern=None, values=True, batch=NO_BATCH, wait=60,
                       retries=options.retries, inputs=options.inputs,
                       results=list(map(result_pattern, options.results)))
    if options.results:
        check_current_directory()
    source = input_for_all(options.no_input)
    most = jobs_at_once(11 if options.inputs or options.results else 6, 64)     # a search needs more than a run
    pub, group = reach()
    survey = Survey(group, pub, terms.ports, Loop(), terms.servers)
    survey.run()
    for line in survey.troubles():
        log.say(line)
    if not survey.workers:
        return EXIT_TEMPORARY
    silent = survey.silent_hosts()
    for host in silent:
        log.say("%s: no worker answers" % host)
    silent += group.failed_hosts()  # it has said why
    everywhere = Everywhere(pub, group, terms, survey.workers, source, most)
    note_names(terms, everywhere.tasks, options, 0)
    listings_of(terms.names, terms.inputs)
    code = everywhere.work()
    return max(code, EXIT_TEMPORARY) if silent else code


# ---------------------------------------------------------------------------
# cexec -s: workers for one call
# ---------------------------------------------------------------------------
#
#     cexec -s (RunGroup)                         its child, `cservice -s ... -` (RunStarter)
#       |  <------------------ PUB group, the pub   |  makes the keys, in memory
#       |  <- HOST name, state, ssh's pid, its id   |  at each change; the pid of a group is negative
#       |  <---------------------- lines of text    |  messages
#       |  end of file, in any case ------------->  |  ends the workers and their jobs
#       |  <-------------------------- end of file  |  when all of them have ended
#
# Both ends are one socket, which is 0, 1 and 2 of the child.  PUB and HOST are lines too, which begin with a NUL.
#
# No byte of a job goes over this socket.  The group is a port of this host, where only the child hears the client.
# It passes ANNOUNCE on over ssh, and the worker connects to the client: directly, or else by a channel through ssh,
# which the child joins to the client's port.  The section cservice -s draws this.  Either way TLS and all frames are
# between the client and the worker.

PUB_LINE, HOST_LINE = "\0pub", "\0host"
WAITS, SERVES_NOW, FAILED_NOW = "waits", "serves", "failed"     # states of a host
END_SECONDS = 2.0                   # cexec -s waits so long for the end of its workers

# A child starts as by sh (see The door).  The slash hides a file's name, which might be an applet's.
CHILD_BOOT = """import sys
sys.path[:] = filter(None, sys.path)
import os
for old, new in %r: os.dup2(old, new)
with open(sys.argv[1][:-1], "rb") as file: file.seek(-4096, 2); text = file.read()
exec(text.rpartition(b"# START")[2])"""


def child_words(applet, numbered=()):
    """The words that start an applet of this file as a child; numbered: see CHILD_BOOT."""
    return [sys.executable or "python3", "-S", "-c", CHILD_BOOT % (list(numbered),),
            os.path.realpath(__file__) + "/", applet]


class RunGroup(Group):
    """The group of the workers that a child, `cservice -s`, starts for this call alone, and that child.

    pub is their public key.  Raises Fatal: 100 for a wrong host, else 111.  It becomes a Group, with targets, when the
    child's first line comes: see rcvd_line().
    """

    def __init__(self, hosts, floor):
        if not os.path.isfile(__file__):
            raise Fatal(EXIT_USAGE, "-s sends this program, and it was read from standard input: start it from a file")
        words = [word for text in hosts for word in ("-s", text)] + ["-v"] * log.verbose
        ours, theirs = socket.socketpair()
        with theirs:
            self.sock = socket.socket(ours.family, ours.type, fileno=lifted_away(ours.detach(), floor))
            with or_fatal("-s: cannot start cservice"):
                self.child = subprocess.Popen(child_words("cservice") + [*words, "-ad", RUN_KEY],
                                              stdin=theirs, stdout=theirs, stderr=theirs)
        self.unread, self.said, self.pub = b"", "", None
        self.states, self.pids, self.ids = {}, {}, {}       # of each host, of its ssh, and of its worker
        self.loop = None            # that reads what the child says
        while not self.pub:
            self.read()

    # What the child says

    def attend(self, loop):
        self.loop = loop
        self.sock.setblocking(False)
        loop.on_read(self.sock.fileno(), self.read)

    def read(self):
        """Handles what has come.  Raises Fatal at the end of file: the child has ended."""
        try:
            data = self.sock.recv(CONTROL_MAX)
        except BlockingIOError:
            return
        *lines, self.unread = (self.unread + data).split(b"\n")
        for line in filter(None, lines):
            self.rcvd_line(line.decode("utf-8", "replace"))
        if not data:
            if self.loop:
                self.loop.forget(self.sock.fileno())        # or the loop would call us again at once
            code = self.reap()
            if not self.pub:
                raise Fatal(EXIT_USAGE if code == EXIT_USAGE else EXIT_TEMPORARY, self.said or "-s: cannot start")
            raise Fatal(EXIT_TEMPORARY, "no host serves any more" if code >= 0 else
                        "the process that keeps the workers was killed by signal %d" % -code)

    def rcvd_line(self, line):
        kind, *words = line.split("\t")
        if kind == PUB_LINE:
            super().__init__(words[0])
            self.pub_text, self.pub = words[1], parse_pub(words[1], "-s")
        elif kind == HOST_LINE:
            self.states[words[0]], self.pids[words[0]], self.ids[words[0]] = words[1], int(words[2]), words[3]
        else:
            self.said = line.partition("cservice: ")[2] if line.startswith("cservice: ") else line
            if self.pub:
                log.say(self.said)

    def reap(self):
        """Returns the child's returncode.  If it was killed, ends what it has started: an ssh might wait for ever."""
        code = self.child.wait()
        for pid in filter(None, self.pids.values() if code < 0 else ()):
            with suppress(OSError):             # it has ended
                os.kill(pid, signal.SIGALRM if pid > 0 else signal.SIGTERM)         # see Host.kill()
        return code

    # The hosts

    def wait(self, for_all):
        """Waits for the first host that serves, or until no host is left to wait for.  Raises Fatal (111)."""
        self.sock.settimeout(TELL_SECONDS)
        while not self.serves() or for_all and WAITS in self.states.values():
            try:
                self.read()
            except socket.timeout:
                self.tell_user()
        log.status_line("")

    def tell_user(self):
        """Shows on a terminal what we wait for; not with one host, whose ssh may ask something there."""
        late = [host for host, state in self.states.items() if state == WAITS]
        if os.isatty(log.fd) and len(self.states) > 1 and not log.verbose and in_foreground(log.fd):
            log.status_line("waits for ssh: %s" % ", ".join(late))

    def serves(self):
        """Whether a host serves.  Raises Fatal (111) if none does, and none is waited for."""
        states = self.states.values()
        if states and WAITS not in states and SERVES_NOW not in states:
            raise Fatal(EXIT_TEMPORARY, "no host serves")
        return SERVES_NOW in states

    def hosts(self):
        """Returns {name: {the worker's id}} of the hosts that serve: each must answer."""
        return {host: {self.ids[host]} for host, state in self.states.items() if state == SERVES_NOW}

    def failed_hosts(self):
        return [host for host, state in self.states.items() if state == FAILED_NOW]

    def may_have_crat(self):
        return False

    def is_whole(self, workers):
        return len(workers) == list(self.states.values()).count(SERVES_NOW)

    def end(self):
        """Has the child end all workers and jobs, and waits for END_SECONDS at most: it goes on without us."""
        deadline = time.monotonic() + END_SECONDS
        with suppress(OSError):     # the time is over, or the child was killed
            self.sock.shutdown(socket.SHUT_WR)
            while time.monotonic() < deadline:
                self.sock.settimeout(max(0.001, deadline - time.monotonic()))
                if not self.sock.recv(CONTROL_MAX):
                    self.reap()
                    break


# ---------------------------------------------------------------------------
# cexec, the applet
# ---------------------------------------------------------------------------

CEXEC = Syntax(
    "cexec", {"-": "[APP.pub] [KEY=VALUE ...] [ARGUMENT ...]", "-l": "[APP.pub]",
              "-A": "[APP.pub] [KEY=VALUE ...] [ARGUMENT ...]", "-b": "[APP.pub] [KEY=VALUE ...] [ARGUMENT ...]",
              "-m": "[APP.pub] [KEY=VALUE ...] [ARGUMENT ...] {-- FILE ... | ::: INPUT ... [::: INPUT ...]}"},
    """Run a command on the least loaded worker, with the descriptors of this process.

With -s, workers are started for this call alone, over ssh, and there is no APP.pub: the
ARGUMENTs are the command.  Else APP.pub names an application; its workers have the
command, and ARGUMENTs are arguments of it, if they take any (cservice -a).  KEY=VALUE
is PEER_KEY=VALUE in the command's environment.

    cexec -s box1,box2 sort < file                      # on the least loaded of two hosts
    cexec -s @boxes -mo '{.}.ogg' oggenc -o- - -- *.wav # one job for each file
    cexec ogg.pub < input.wav > output.ogg              # on a worker that stays

exit status: the command's; 128+S if signal S killed it; 126 or 127 if it could not
be run; 111 if cexec failed (try again); 100 for a usage error
""",
    Option("-l", "", "list", "list the workers; if there are none, say why"),
    Option("-m", "", "batch", "run one job for each FILE, which is its standard input, or each set of INPUTs"),
    Option("-A", "", "everywhere", "run one job on every worker; each line of output begins with HOST:"),
    Option("-b", "SIZE", "blocks", "cut standard input into blocks of whole lines, and run one job for each"),
    Option("-s", "[N/]HOST,...+", "hosts",
           "start workers on these hosts for this call, over ssh (may be repeated); @FILE lists hosts"),
    Option("-n", "[N]", "empty", "give the command an empty input, or an empty descriptor N", "-"),
    Option("-g", "PATTERN+", "results",
           "bring what matches in the job's directory here when the command has ended with 0", "- -m -A"),
    Option("-i", "PATH+", "inputs", "put the file or directory into the job's directory (may be repeated)", "- -m -A"),
    Option("-p", "", "progress", "show the progress of the job", "-"),
    Option("-r", "", "repeat", "run the job again if its worker is lost", "-"),
    Option("-t", "", "terminal", "give the command a terminal, as ssh -t does", "-"),
    Option("-j --json", "", "json", "print JSON", "-l"),
    Option("-n", "", "no_input", "give the commands an empty input", "-A"),
    Option("-0", "", "zero", "read the names of the files from standard input; each ends with a NUL", "-m"),
    Option("-f", "", "force", "do all files, also those that are done already", "-m"),
    Option("-j", "N", "jobs", "run at most N jobs at a time", "-m -b"),
    Option("-n", "", "values", "the inputs are values, and not files to be read", "-m"),
    Option("-o", "PATTERN", "output",
           "write outputs to files named with {} {.} {/} {//} {/.} {#} {1} ...; - is standard output, in order "
           "(default: {}.out, with -n -)", "-m"),
    Option("--dry-run", "", "dry_run", "only print what would be done", "-m"),
    Option("--errors", "DIR", "errors", "keep the standard error of each job in a file in DIR", "-m -b"),
    Option("--halt", "N", "halt", "begin no more jobs after N failures", "-m"),
    Option("--header", "N", "header", "begin each block with the first N lines of the input", "-b"),
    Option("--log", "FILE", "joblog", "append a line for each job, as parallel does", "-m -b"),
    Option("--retries", "TIMES", "retries", "run a failed job again, up to so many TIMES", "-m -b -A"))


def main_cexec(argv):
    """Runs the mode that the options choose.  Returns its exit code."""
    options = CEXEC.read(argv)
    if options.blocks is not None:
        parse_size(options.blocks)              # or -b APP.pub would miss the key
    words = options.words if options.hosts else options.words[1:]
    if not options.words and not options.hosts:
        raise CEXEC.error("no public key is named (or hosts, with -s)")
    if options.mode == "-":
        return main_single(words, options)
    if options.list and words:
        raise CEXEC.error("%s is one word too many" % words[0])
    if options.batch and not {"--", ":::"} & set(words) and not options.zero:
        raise CEXEC.error("no files are named: -- FILE ..., or -- - for a list on standard input")
    fill_standard()
    reach = functools.lru_cache(None)(functools.partial(open_reach, options))
    if not options.hosts:
        reach()                     # a wrong key is said first; workers are started last
    if options.list:
        return list_workers(*reach(), listen_ports(), options.json)
    return {"-m": main_batch, "-A": main_everywhere, "-b": main_blocks}[options.mode](reach, words, options)


def open_reach(options, floor=3):
    """Returns the Pub and the Group: those of the application, or with -s of workers that it starts.  Raises Fatal.

    With -A and -l it waits until each host serves or has failed, else for the first that serves.  Descriptors of its
    own get numbers from floor up.
    """
    if not options.hosts:
        return open_pub(options.words[0]), Group()
    group = RunGroup(options.hosts, floor)
    at_end.append(group.end)
    group.wait(options.everywhere or options.list)
    return group.pub, group


def files_named(options):
    """Returns the arguments of Job for what -i and -g name.  Raises Fatal (100)."""
    names = Names()
    for text in options.inputs:
        names.note_input(text)
    names.list_inputs()
    return {"inputs": listings_of(names, options.inputs),
            "results": [os.fsencode(result_pattern(text)) for text in options.results]}


def main_single(words, options):
    """Runs one job.  Returns its exit code."""
    if options.terminal and options.progress:
        raise CEXEC.error("-p and -t do not go together: the command has the terminal")
    if options.empty == "all" and words and words[0].endswith(".pub") and not options.words[0].endswith(".pub"):
        raise CEXEC.error("-n %s: not a descriptor's number" % options.words[0])
    files = files_named(options) if options.inputs or options.results else {}
    job = Job(*parse_words(words, options), options.empty, options.repeat, options.terminal, options.progress,
              **files)
    try:
        if job.results:
            check_current_directory(map(os.fsdecode, job.results))
        fill_standard()
        return Client(*open_reach(options, job.limit), job).work()
    except Fatal as error:
        job.tell(error.code, "failed=%s" % error)
        raise


# ---------------------------------------------------------------------------
# cservice: the supervisor
# ---------------------------------------------------------------------------

# cservice forks a supervisor for each connection that brings a job; it does this job, and the next
# jobs of a batch.  They talk over a socketpair: the supervisor sends a line for each event, and
# cservice sends only an answer to "more", and "ask".  After "free" the jobs of a batch follow each other
# without "group" and "more", until cservice wants to hear of the next one: "ask".
#
#     cservice (Supervisors, SupervisorHandle)     supervisor (Supervisor, Command)
#       | fork, with the client's connection ---->  |  makes the command's descriptors, sends ACCEPT
#       |  <------- missing COMMAND: REASON, back   |  or the command is not there: sends REFUSE
#       |  <---------------- refused REASON, back   |  or it cannot make them: sends REFUSE
#       |  <--------------------------------- back  |  the client left, and no command has started: it may ask again
#       |  <---------------------- directory NAME   |  with -d: a directory is made for the job
#       |  <---------------- group PID|session PID  |  GO came: the command has started
#       |  <------------------------------- failed  |  or it cannot be started, for a reason of this host
#       |  <-------------------------- leaves NAME  |  the job is over: cservice removes its directory
#       |  <--------------------------------- more  |  a job of a batch is over: may the batch go on?
#       | yes|no|free --------------------------->  |
#       | ask ----------------------------------->  |  it was free, and is no longer
#       |  <--------------------------------- done  |  EXIT is sent: the slot is free, once the directory is removed
#       | reaps it                                  |  ends when the client has closed

SLOTS_MAX = 10000                   # the most slots that a worker can have
CLOSE_SECONDS = 30.0                # after EXIT a worker waits so long for a silent client to close
OVER_MAX = 256                      # supervisors that wait for clients to close, whether these are silent or not
CHECK_SECONDS = GONE_SECONDS / 6    # between two looks for hosts that have vanished
WORKER_SIGNALS = [signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def check_job(job, words, options):
    """A namespace: the fields of JOB, and environment, arguments and patterns as lists of bytes.

    options are those of our HELLO.  Raises ProtocolError if such a job is impossible.
    """
    environment, arguments, patterns = words.take(job.variables, job.arguments, job.patterns)
    if arguments and not options & HELLO_ARGUMENTS:
        raise ProtocolError("arguments for a command that takes none")
    if not arguments and options & HELLO_NO_COMMAND:
        raise ProtocolError("no command")
    channels = check_descriptors(job.descriptors, options & HELLO_DIRECTORIES)
    if bool(patterns) != (FILES_OUT in channels):
        raise ProtocolError("patterns without results")
    if sum(len(pattern) * (1 + pattern.count(b"/")) for pattern in patterns) > ARCHIVE_NAMES or any(
            map(leads_out, patterns)):          # first: the names of the directories above one need so much memory
        raise ProtocolError("impossible pattern")
    for variable in environment:
        name, equals, _ = variable.partition(b"=")
        if not equals or not is_variable(name.decode("latin-1")):
            raise ProtocolError("impossible variable")
    terminals = [flags for flags in channels.values() if flags & FLAG_TERMINAL]
    if len(terminals) > 1 or not (is_name(job.term) if terminals else job.term == ""):
        raise ProtocolError("impossible terminal")
    for mode in job.modes:
        name, _, value = mode.partition("=")
        if not is_variable(name) or not value.isdecimal() or len(value) > 3 or int(value) > 255:
            raise ProtocolError("impossible mode of a terminal")
    return SimpleNamespace(**dict(vars(job), environment=environment, arguments=arguments, patterns=patterns))


def check_descriptors(rows, may_have_files):
    """The flags of each channel.  Raises ProtocolError if a row of JOB's descriptors is impossible."""
    channels = {}
    for number, channel, flags in rows:
        if channel not in channels and number != channel:       # the first row of a channel has its number
            raise ProtocolError("impossible descriptor %d" % number)
        files = {FLAG_INPUT | FLAG_FILES: FILES_IN, FLAG_OUTPUT | FLAG_FILES: FILES_OUT}.get(flags)
        if files is None and number >= MAXFD_LIMIT or channels.setdefault(channel, flags) != flags:
            raise ProtocolError("impossible descriptor %d" % number)
        if flags not in POSSIBLE_FLAGS:
            raise ProtocolError("descriptor %d has impossible flags %d" % (number, flags))
        if files is not None and (number != files or not may_have_files):
            raise ProtocolError("files for a job without a directory")
    if len({number for number, _, _ in rows}) < len(rows):
        raise ProtocolError("a descriptor twice")
    return channels


# A job's directory is in TMPDIR.  The supervisor makes it, and cservice removes it: after the job, or when the
# supervisor is lost.  If cservice is lost, the supervisor removes it.  If both are, the next cservice on this host
# does: nobody locks it any more.

DIRECTORY_NAME = "cexec."           # the beginning of a job directory's name; 16 hexadecimal digits follow
REMOVALS_MAX = 4                    # a connection gets no more jobs while so many of its directories are being removed


def is_job_directory(name):
    digits = name[len(DIRECTORY_NAME):]
    return name.startswith(DIRECTORY_NAME) and len(digits) == 16 and set(digits) <= set("0123456789abcdef")


def become(user):
    """Gives this process the rights of a user, an entry of passwd(5)."""
    os.initgroups(user.pw_name, user.pw_gid)
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)


class JobRoot:
    """The directory in which the jobs' directories are made.  Raises OSError.

    Root never uses the path of anything that user, the commands' user, could move or replace: only
    descriptors.  What is inside a job's directory is used with the rights of this user.
    """

    def __init__(self, path, user):
        self.path, self.user = path, user
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def lift(self, floor):
        """Moves its descriptor to a number from floor up."""
        self.fd = lifted_away(self.fd, floor)

    def make(self, name, floor):
        """Returns a descriptor, from floor up, of a new directory."""
        fd = make_directory(name, floor, self.fd)
        with on_failure(os.close, fd):
            if self.user:
                self.give_away(fd, name)
        return fd

    def give_away(self, fd, name):
        # Who may write in this directory may have put another directory there meanwhile: the user must not get that.
        if os.fstat(fd).st_uid != os.geteuid() or os.listdir(fd):
            raise OSError(errno.EEXIST, "another directory is in its place", name)
        os.fchown(fd, self.user.pw_uid, self.user.pw_gid)

    def remove_empty(self, name):
        """Removes a directory if it is empty.  Returns whether it was."""
        with suppress(OSError):
            os.rmdir(name, dir_fd=self.fd)
            return True
        return False

    def remove(self, name):
        with suppress(FileNotFoundError):       # the command has removed it
            remove_directory(name, self.fd, self.user)

    def remove_left(self):
        """Removes the directories that a crash has left."""
        remove_left(self.fd, is_job_directory, self.user)

    def tell(self, name, trouble):
        log.once("%s/%s: cannot be removed: %s" % (self.path, name, trouble))


class JobDirectory:
    """The directory of one job, owned by the command's user.  A Helper with this user's rights works in it.

    Raises OSError.
    """

    def __init__(self, loop, root, say):
        self.loop, self.user, self.helper = loop, root.user, None
        self.how = None             # EXIT's, if the last Helper has failed
        self.name = DIRECTORY_NAME + os.urandom(8).hex()
        self.path = os.path.join(root.path, self.name)
        say("directory " + self.name)
        self.fd = root.make(self.name, loop.floor)

    def fill(self, reader, needed, over):
        """Unpacks the client's archive from a pipe, or None, and makes directories in which results will be.

        Then calls over(None or an error's text).
        """
        def work():
            directories = unpack(reader, self.fd)[1] if reader is not None else {}
            for name in needed:
                with naming(name), suppress(FileExistsError):
                    os.mkdir(name, dir_fd=self.fd)
            set_modes(directories, self.fd, exact=True)
        self.start_helper(work, reader, over)

    def pack_results(self, writer, patterns, over):
        """Packs the files that match the patterns into a pipe, and then calls over() in the same way."""
        def work():
            os.fchdir(self.fd)
            pack_files(writer, tree(WHOLE, WHOLE, matcher(patterns)))
        self.start_helper(work, writer, over)

    def start_helper(self, work, pipe, over):
        def with_rights():
            import re               # noqa: F401 - before become(): the user may not be able to read this Python
            import tarfile          # noqa: F401
            if self.user:
                become(self.user)
            work()

        def ended(trouble):
            self.how = HOW_HOST_FAILED if self.helper.error in (0, *HOSTS_ERRORS) else HOW_NOT_STARTED
            self.helper = None
            over(trouble)
        pipes = [] if pipe is None else [pipe]
        with closing(*pipes):
            self.helper = Helper(self.loop, with_rights, [*pipes, self.fd], ended, signal.SIG_DFL)

    def stop(self):
        """Kills the Helper that works in it, which will call over().  Returns whether there is one."""
        if self.helper:
            self.helper.kill()
        return self.helper is not None

    def close(self):
        os.close(self.fd)


SHORT_OF = errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE       # processes, memory or descriptors, for now
HOSTS_ERRORS = SHORT_OF + (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)
                                    # with these another host may do the job; the client's job has other ones


def command_paths(name):
    """The paths at which exec looks for a command."""
    return [name] if "/" in name else [os.path.join(directory, name) for directory in os.get_exec_path()]


def find_command(name, settings):
    """Returns the path at which exec will find a command of this name; None if only exec can tell.

    Raises the OSError that exec would raise because no such command can be run here.  Only exec can tell
    what the user of -u may run.  A relative name may come into the job's directory with -i.
    """
    errors = []
    for path in command_paths(name):
        if settings.job_root and not os.path.isabs(path):
            return None
        try:
            if is_program(path) or settings.user:
                return None if settings.user else path
            errors.append(errno.EACCES)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                return None
            errors.append(error.errno)
    number = errno.EACCES if errno.EACCES in errors else errors[-1]
    raise OSError(number, os.strerror(number))


def is_program(path):
    """Whether we may run this file.  Raises OSError."""
    return stat.S_ISREG(os.stat(path).st_mode) and os.access(path, os.X_OK)


class Finder:
    """Finds commands, like a shell: the last one is searched again only if it is not there any more."""

    def __init__(self, settings):
        self.settings, self.name, self.path = settings, None, None

    def find(self, name):
        """Returns what find_command() returns.  Raises OSError."""
        if name != self.name or not self.is_there():
            self.name, self.path = name, find_command(name, self.settings)
        return self.path

    def is_there(self):
        try:
            return self.path is not None and is_program(self.path)
        except OSError:
            return False


def start_error(error, name):
    """The OSError of exec; "not found" for a command that is nowhere.

    exec says EACCES for it, if a directory of PATH is closed to the user of -u.
    """
    if error.errno == errno.EACCES and not any(map(os.path.lexists, command_paths(name))):
        return OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    return error


def start_status(error):
    """The exit status for a command that cannot be started."""
    if error.errno in SHORT_OF:
        return EXIT_TEMPORARY
    return EXIT_NOT_FOUND if error.errno in (errno.ENOENT, errno.ENOTDIR) else EXIT_CANNOT_RUN


# A command's states, which only _set() changes:
#
#   MADE --started--> RUNNING --it has ended--> LINGERING --its output is at its end--> FINISHED
#     '--cannot be started, or a signal ends it first--A                                    |
#                                                        CLOSED <--EXIT says more-----------'
#   from any of the first four: ABANDONED, when the client has gone

MADE, LINGERING, FINISHED, CLOSED, ABANDONED = "MADE", "LINGERING", "FINISHED", "CLOSED", "ABANDONED"
RUNNING = "RUNNING"                 # a supervisor's state as well


class PairEnd(SocketEnd):
    """Our end of a socketpair; the command has the other end."""

    def __init__(self, fd, floor):
        super().__init__(fd, fd, lambda: os.close(fd), ["read", "write"])
        number = self.sock.detach()
        self.sock = socket.socket(fileno=number if number >= floor else lifted_away(number, floor))


def can_spawn():
    """Whether there is a posix_spawn that tells why a command cannot be run: glibc's does so since 2.24."""
    try:
        name, version = os.confstr("CS_GNU_LIBC_VERSION").split()
        is_old = name == "glibc" and tuple(map(int, version.split("."))) < (2, 24)
    except (AttributeError, OSError, ValueError):       # this is another C library
        is_old = False
    return hasattr(os, "posix_spawn") and not is_old    # Python 3.8


SPAWNS = can_spawn()                # else, and for -u and -t, subprocess starts the commands


class Command(Carrier, Stateful):
    """A job's command: its descriptors, its process, its result.  At the client, a RemoteRun is its counterpart.

    It calls the supervisor's command_started() and command_finished().
    """

    LAW = {MADE: (RUNNING, LINGERING, ABANDONED), RUNNING: (LINGERING, ABANDONED), LINGERING: (FINISHED, ABANDONED),
           FINISHED: (CLOSED, ABANDONED), CLOSED: (), ABANDONED: ()}

    def __init__(self, supervisor, job):
        super().__init__(supervisor.loop, supervisor.link)
        self.supervisor, self.settings, self.client = supervisor, supervisor.settings, supervisor.client
        self.job, self.state = job, MADE
        # A job's last frames come at nearly the same time: in one packet they cost both sides less than half.
        # Nobody sees an output of a batch before EXIT, so small outputs wait for it too.
        self.small = 0 if self.client.batch == NO_BATCH else 4096
        self.counted = {channel for number, channel, flags in job.descriptors if flags & FLAG_COUNTED}
        self.far = {}               # channel: the command's end, until the command has started
        self.terminal = None        # the channel of the command's terminal
        self.path = None            # where the command is; None if only exec can tell
        self.process = None         # once the command has started: a namespace with its pid, or a Popen, which we keep
                                    # because subprocess reaps what nobody keeps
        self.group = None           # its process group; None as soon as another group could get this number
        self.result = None          # (how, status, reason) for EXIT, once it is known
        self.inputs = {}            # channel of a counted input: a descriptor for unread(), after ours was closed
        self.timers = []            # of the time LINGERING: that of tell_lingering(), and then of stop_lingering()
        self.directory = None       # the JobDirectory

    # Its descriptors

    def make_ends(self):
        """Makes a pipe, a socketpair or a terminal for each channel.  Raises OSError.

        A Source, a Sink or both carry the near end.  The far end waits in self.far for the command.
        """
        if self.settings.job_root:
            self.directory = JobDirectory(self.loop, self.settings.job_root, self.supervisor.say)
        # JOB has a row for each number that the command gets.  If several numbers are one open file,
        # they have the same channel, and only the row whose number is the channel makes ends.
        # All ends are moved at once to numbers from the floor up.  Below the floor are the numbers of
        # the command, which spawn() fills with dup2(): it must never overwrite an end of ours.
        for number, channel, flags in self.job.descriptors:
            if number != channel:
                continue
            make = (self.make_terminal if flags & FLAG_TERMINAL else self.make_pair if flags & FLAG_SOCKET
                    else self.make_pipe)
            far, end = make(channel, flags)
            # A command may open /dev/stdout, which opens the pipe again.  With -u it runs as another
            # user, who needs the permission to do that: so the pipe gets this owner.  A terminal keeps
            # its group, tty, as with login(1).
            user = self.settings.user
            if user:
                os.fchown(far, user.pw_uid, -1 if channel == self.terminal else user.pw_gid)
            self.far[channel] = far
            self.carry(channel, end)

    def make_pipe(self, channel, flags):
        """Returns (the command's end, ours) of a pipe."""
        reader, writer = large_pipe(self.loop.floor)
        near, far, half = (writer, reader, "write") if flags & FLAG_INPUT else (reader, writer, "read")
        os.set_blocking(near, False)
        return far, PipeEnd(near, near, lambda: self.release(near, channel), [half])

    def make_pair(self, channel, flags):
        """Returns (the command's end, ours) of a socketpair."""
        near, far = lifted_pair(*(end.detach() for end in socket.socketpair()), self.loop.floor)
        return far, PairEnd(near, self.loop.floor)

    def make_terminal(self, channel, flags):
        """Returns (the command's end, ours) of a new pseudo terminal, with the modes and the size of the client's."""
        self.terminal = channel
        near, far = lifted_pair(*os.openpty(), self.loop.floor)
        # Our side gets EIO, an end of file, whenever no process has the other side open.  But a command may
        # close its terminal and open it again: so we keep the other side open until the command has ended.
        kept = lifted(far, self.loop.floor)
        set_terminal_modes(far, self.job.modes)
        set_terminal_size(near, self.job.lines, self.job.columns)
        os.set_blocking(near, False)
        return far, PtyEnd(near, near, lambda: (os.close(near), os.close(kept)), ["read", "write"])

    def release(self, near, channel):
        """Closes a pipe's near end.  For a counted input it keeps a descriptor for unread()."""
        if channel in self.counted and self.state in (MADE, RUNNING, LINGERING, FINISHED):
            try:
                reader = os.open(PROC_FD % near, os.O_RDONLY | os.O_NONBLOCK)
                self.inputs[channel] = lifted_away(reader, self.loop.floor)
            except OSError:         # no /proc
                self.inputs[channel] = near
                return self.close_when_empty(near, channel)
        os.close(near)

    def close_when_empty(self, near, channel):
        """Without /proc: closes the near end when the command has read everything; until then it serves unread().

        On macOS and the BSDs only a pipe's reading end can tell how much is unread.  There this closes at
        once, and all bytes count as taken.
        """
        if self.state in (MADE, RUNNING, LINGERING) and unread(near):
            self.loop.after(0.005, lambda: self.close_when_empty(near, channel))
        elif self.inputs.pop(channel, None) is not None:
            os.close(near)

    def taken(self, channel):
        """The number of bytes of an input that the command has read."""
        written, end = self.channels[channel].written, self.channels[channel].end
        if channel not in self.counted:
            return written
        fd = self.inputs.get(channel, end.polled if end.halves else None)
        return written - (unread(fd) if fd is not None else 0)

    def counts(self):
        """EXIT's rows: (channel, bytes sent, bytes taken)."""
        return [(number, channel.sent, self.taken(number)) for number, channel in self.channels.items()]

    # Its start

    def start(self):
        """Takes the client's files if there are any, and then starts the command.  A failure becomes the result."""
        needed = parents(self.job.patterns)
        if FILES_IN not in self.far and not needed:
            return self.start_process()
        try:
            self.directory.fill(self.far.pop(FILES_IN, None), needed, self.filled)
        except OSError as error:
            self.fail_to_start(start_status(error), "the job's directory: " + error.strerror, HOW_HOST_FAILED)

    def filled(self, trouble):
        if self.state is ABANDONED:
            return
        if self.result:             # of interrupt_files()
            self._set(LINGERING)
            self.end_sources()
        elif trouble:
            self.fail_to_start(EXIT_CANNOT_RUN, "the job's directory: " + trouble, self.directory.how)
        else:
            self.start_process()

    def start_process(self):
        try:
            self.spawn()
        except Fatal as error:
            self.fail_to_start(error.code, str(error), HOW_HOST_FAILED)
        except OSError as caught:
            error = caught if self.is_brought() else start_error(caught, self.name())
            theirs = error.errno not in HOSTS_ERRORS or error.errno == errno.EACCES and self.is_brought()
            self.fail_to_start(start_status(error), os.strerror(error.errno),
                               HOW_NOT_STARTED if theirs else HOW_HOST_FAILED)
        else:
            self._set(RUNNING)
            self.group = self.process.pid
            self.supervisor.command_started(self)
            self.refresh()

    def spawn(self):
        """Starts the command with its ends at its numbers.  Raises OSError; Fatal if it cannot be prepared."""
        # The ends are at numbers from the floor up, and the command's numbers below it: so none is overwritten
        # by another.  All descriptors of ours are closed by exec.  After the start the supervisor closes its
        # copies: a pipe is at its end only when no process has the other end open.
        ends = {number: self.far[channel] for number, channel, flags in self.job.descriptors if not flags & FLAG_FILES}
        path = self.path or ("/" in self.name() and self.name())
        try:
            if SPAWNS and path and not self.settings.user and self.terminal is None:
                self.process = self.start_plain(path, ends)
            else:
                self.process = self.start_prepared(ends)
        finally:
            self.close_far(set(self.far) - {FILES_OUT})

    def start_plain(self, path, ends):
        """Returns a namespace with the command's pid.  Raises OSError, Fatal."""
        if self.directory:          # the command inherits it; we stay there: each job of ours enters its own
            with or_fatal("the job's directory", EXIT_CANNOT_RUN):
                os.fchdir(self.directory.fd)
        moves = [(os.POSIX_SPAWN_DUP2, end, number) for number, end in ends.items()]
        try:
            return SimpleNamespace(pid=os.posix_spawn(path, self.words(), self.environment(), file_actions=moves,
                                                      setpgroup=0))
        except OSError as error:
            if error.errno != errno.ENOEXEC:
                raise
            return self.start_prepared(ends)        # it is for another kind of machine: exec looks further in PATH

    def start_prepared(self, ends):
        """The same with prepare(), by a Popen: it copies our memory, which takes longer.  Raises OSError, Fatal."""
        # The child gets its 0, 1 and 2 from subprocess.  Higher numbers subprocess can pass on, but does
        # not move.  So the supervisor itself puts them at the command's numbers.
        standard = [ends.pop(number, None) for number in range(3)]
        reader, report = lifted_pair(*os.pipe(), self.loop.floor)
        for number, end in ends.items():
            os.dup2(end, number, True)
        try:
            # Popen waits for exec, and we for Popen.  Before exec the child becomes the user of -u: another process
            # of this user could stop it, and we would not hear the client or cservice any more.
            with closing(report):
                return killing_stopped(lambda: subprocess.Popen(
                    self.words(), -1, None, *standard, env=self.environment(), close_fds=True, pass_fds=list(ends),
                    preexec_fn=lambda: self.prepare(report)))
        except subprocess.SubprocessError:          # without a report, it was no OSError
            status, _, reason = os.read(reader, 4096).decode().partition(" ")
            raise Fatal(int(status or EXIT_TEMPORARY), reason or "its process could not be prepared") from None
        finally:
            for number in [reader, *ends]:
                os.close(number)

    def close_far(self, channels):
        for channel in channels:
            os.close(self.far.pop(channel))

    def words(self):
        """The worker's command, with the client's arguments in place of {} (cservice -a)."""
        if not self.settings.options & HELLO_ARGUMENTS:
            return self.settings.command
        return [word for ours in self.settings.command for word in (self.job.arguments if ours == "{}" else [ours])]

    def prepare(self, report):
        """In the child before exec: makes a process group, becomes the user of -u, and enters the job's directory.

        Of an error here subprocess tells nothing: so this writes it to report, a pipe.
        """
        # The directory is entered by its descriptor, and with the user's rights: the user could put a link
        # at its path.  Popen's own cwd would be entered by the path, as root.
        user, what = self.settings.user, "a process group"
        try:
            self.lead()
            if user:
                what = "cannot become the user %s (-u)" % user.pw_name
                self.settings.join_keyring()    # a new one: the user must not get the keys in root's
                become(user)
                self.settings.join_keyring()    # one that the user owns; fails if the user has too many
            if self.directory:
                what = "the job's directory"
                os.fchdir(self.directory.fd)
        except OSError as error:
            status = EXIT_TEMPORARY if error.errno in SHORT_OF else EXIT_CANNOT_RUN
            os.write(report, ("%d %s: %s" % (status, what, error.strerror)).encode())
            raise

    def lead(self):
        """In the child: leads a process group, or with a terminal a session."""
        if self.terminal is None:
            os.setpgid(0, 0)
        else:
            os.setsid()
            fcntl.ioctl(self.terminal, termios.TIOCSCTTY, 0)

    def environment(self):
        """Returns the supervisor's variables and the job's own, as bytes: the client's have PEER_ before the name."""
        values = dict(self.supervisor.variables)
        for variable in self.job.environment:
            name, _, value = variable.partition(b"=")
            values[b"PEER_" + name] = value
        if self.terminal is not None:
            values[b"TERM"] = os.fsencode(self.job.term)
        if self.directory:
            values[b"PWD"] = os.fsencode(self.directory.path)
        return values

    def name(self):
        return os.fsdecode(self.words()[0])

    def is_brought(self):
        """Whether the command may have come with the client's files."""
        return self.directory is not None and not all(map(os.path.isabs, command_paths(self.name())))

    def find(self):
        """Notes where the command is.  Returns (126 or 127, why) if it is not there, or cannot be run; else None."""
        try:
            self.path = self.supervisor.finder.find(self.name())
        except OSError as error:
            return start_status(error), "%s: %s" % (cut(self.name(), 400), error.strerror)

    def fail_to_start(self, status, reason, how):
        """The command cannot be started.  how is EXIT's: it says whether the reason lies in this host."""
        self._set(LINGERING)
        if how == HOW_HOST_FAILED:
            self.supervisor.say("failed")
        # The result comes before end_sources(): that ends the last stream, and so sends EXIT with it.
        self.result = how, status, "%s: %s" % (cut(self.name(), 400), reason)
        self.settings.say("%s (%s gets %d)" % (self.result[2], self.client.address, status))
        self.end_sources()

    def end_sources(self):
        """Ends all outputs: there is no command that could write."""
        self.close_far(list(self.far))
        for source in self.sources():
            source.finish()
        self.stream_ended()

    # Its results

    def send_results(self):
        """Begins to send the results of -g, once, if the command has ended with 0."""
        if FILES_OUT in self.far:
            for timer in self.timers:
                timer.cancel()
            writer = self.far.pop(FILES_OUT)
            if self.result == (HOW_EXITED, 0, ""):
                try:
                    self.directory.pack_results(writer, self.job.patterns, self.results_packed)
                except OSError as error:
                    self.result = HOW_EXITED, 0, error.strerror
            else:
                os.close(writer)

    def is_sending_results(self):
        """Whether results of -g are still on their way from the disk."""
        results = self.channels.get(FILES_OUT)
        return results is not None and results.is_reading() or self.directory.helper is not None

    def results_packed(self, trouble):
        if self.state is ABANDONED:
            return
        if self.result[0] == HOW_SIGNALLED:     # by interrupt_files()
            return self.end_sources()
        if trouble:
            self.result = HOW_EXITED, 0, trouble
        self.stream_ended()

    def interrupt_files(self, number):
        """A signal that ends a job has come: if files are on the way, this ends it, by filled() or results_packed()."""
        if self.directory and self.directory.stop():
            self.result = HOW_SIGNALLED, number, ""

    def leave_directory(self):
        """Has the job's directory removed."""
        if self.directory:
            self.directory.close()
            self.supervisor.release_directory(self.directory.name)
            self.directory = None

    def is_at_work(self):
        """Whether the command has started, or files for it are on the way."""
        return self.process is not None or self.directory is not None and self.directory.helper is not None

    # While it runs

    def rcvd_signal(self, flags, channel, payload):
        if payload.signal not in SIGNALS:
            raise ProtocolError("signal %r" % payload.signal)
        if self.group:
            signal_all(os.killpg, self.group, [getattr(signal, "SIG" + payload.signal)])
        if payload.signal in ("INT", "TERM", "HUP", "QUIT") + ("USR1", "USR2") * (self.state is MADE):
            self.interrupt_files(getattr(signal, "SIG" + payload.signal))

    def rcvd_resize(self, flags, channel, payload):
        if self.terminal is None:
            raise ProtocolError("RESIZE without a terminal")
        end = self.channels[self.terminal].end
        with noting("the terminal's size"):
            if end.halves:
                set_terminal_size(end.fd, payload.lines, payload.columns)

    def local_error(self, channel, error):
        log.say("descriptor %d: %s" % (channel, error.strerror))

    # Its end

    def child_ended(self):
        """SIGCHLD came: if the command has ended, takes its exit code or signal."""
        if self.state is not RUNNING:
            return
        code = ended(self.group)
        if code is None:
            return
        # ended() leaves a zombie, so no other process group can get this number, and we may still
        # signal the group.  But without waitid(2) the zombie is reaped, and the number is free now.
        self.group = self.group if HOLDS_PIDS else None
        self.result = (HOW_SIGNALLED, -code, "") if code < 0 else (HOW_EXITED, code, "")
        self._set(LINGERING)
        if self.terminal is not None:
            self.channels[self.terminal].source.close_soon()
        self.timers = [self.loop.after(1.0, self.tell_lingering)]
        if self.job.linger != NO_LINGER:
            self.timers.append(self.loop.after(self.job.linger / 1000, self.stop_lingering))
        self.stream_ended()

    def stop_lingering(self):
        for number, channel in self.channels.items():
            if channel.source and number != FILES_OUT:
                channel.source.close_soon()

    def tell_lingering(self):
        """Tells the client if processes that the command has left behind hold its outputs open."""
        # A reader that is slow, at the client or on the way, has us wait in the same state.
        if self.state is LINGERING:
            if any(source.is_held_open() for source in self.sources()):
                how, status, _ = self.result
                self.link.send(LINGER, status=status + EXIT_SIGNAL * (how == HOW_SIGNALLED))
            else:
                self.timers[0] = self.loop.after(1.0, self.tell_lingering)

    def stream_ended(self):
        """The job is over when the command has ended, and all its outputs are closed and sent."""
        has_output = any(channel.is_reading() for number, channel in self.channels.items() if number != FILES_OUT)
        if self.state is not LINGERING or has_output:
            return
        if self.directory:
            self.send_results()
        if not (self.directory and self.is_sending_results()):
            self.leave_directory()
            self._set(FINISHED)
            self.supervisor.command_finished(self)

    def reap_group(self):
        """Reaps the command.  Returns False if others of its group still run: then the batch must not go on here."""
        self.group = None
        with suppress(ChildProcessError):       # without waitid(2) ended() has done so
            os.waitpid(self.process.pid, os.WNOHANG)        # reaps the command: as a zombie it would count
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass                    # they belong to another user
        return False

    def close(self):
        """Closes everything that the job still has open."""
        self._set(CLOSED)
        for timer in self.timers:
            timer.cancel()
        self.close_channels()
        for fd in self.inputs.values():
            os.close(fd)
        self.inputs, self.channels = {}, {}     # breaks reference cycles, which would keep memory

    def abandon(self):
        """The client has gone: reads the outputs and drops them, so that the command can end in its own way.

        The inputs stay open: else the command would see an early end of file, and might finish its
        work with half of its input.
        """
        self._set(ABANDONED)
        if self.directory:
            self.directory.stop()
        for channel in self.channels.values():
            if channel.source:
                channel.source.discard()
            if channel.sink:
                channel.sink.stop()

    def sessions(self):
        """[the command's own session] if it has a terminal, else []."""
        return [self.group] if self.terminal is not None and self.group is not None else []


# A supervisor's states, which only _set() changes:
#
#   AWAITING_GO --GO--> RUNNING --the job is over: send EXIT------------> OVER --the client closes--> the end
#      A                   |------a job of a batch is over: say "more"--> ASKING --no: send EXIT--> OVER
#      |                   | the same, while cservice leaves it free        |
#      |                   V                                               |
#      '----JOB---- RESTING <--yes, free: send EXIT, more=1----------------'
#                      '--3 s without a JOB, or TERM--> OVER
#
#   from every state but OVER: the client has gone, or (not in RESTING) TERM came: GONE, until the session is ended

AWAITING_GO, ASKING, RESTING, OVER, GONE = "AWAITING_GO", "ASKING", "RESTING", "OVER", "GONE"


class Supervisor(Stateful):
    """The worker's process for one job, or for several jobs of a batch in turn.

    It leads a session.  It owns the connections to the client and to cservice.  The job that runs
    is its Command; between two jobs there is none.
    """

    LAW = {AWAITING_GO: (RUNNING, GONE), RUNNING: (ASKING, RESTING, OVER, GONE), ASKING: (RESTING, OVER, GONE),
           RESTING: (AWAITING_GO, OVER, GONE), OVER: (), GONE: ()}
    TAKES = {AWAITING_GO: (GO, PING), RUNNING: (PING,), ASKING: (), RESTING: (WORDS, JOB, PING), OVER: (), GONE: ()}
    DROPS = (ASKING, RESTING, OVER, GONE)       # here all other frames belong to a job that is over: nobody reads them

    def __init__(self, settings, client, link, job, service):
        floor = max([256] + [number + 1 for number, _, flags in job.descriptors if not flags & FLAG_FILES])
        make_room(floor, 4 * len(job.descriptors) + 16)
        # The command has the numbers below floor.  So everything of ours that is to stay is moved above it,
        # and only then closed below: a copy made later could get one of the command's numbers.
        self.loop, self.link = Loop(floor=floor), link
        self.settings, self.client, self.words = settings, client, Words()
        link.attach(self.loop, self)
        self.service = lifted(service, floor)
        log.leave_2(floor)
        if settings.job_root:
            settings.job_root.lift(floor)
        replace_with_null([2])
        self.state = AWAITING_GO
        self.finder = Finder(settings)
        self.variables = self.common_variables()
        self.started = False        # whether any command has started
        self.is_free = False        # whether the next jobs of a batch need no word to cservice: "free"
        self.deadline = None        # the Timer of set_deadline()
        self.delivered_at = 0.0     # after the last EXIT: when the client's host had acknowledged everything
        self.left = []              # names of jobs' directories that cservice cannot remove: it was lost
        self.command = Command(self, job)
        os.close(service)           # last: become_supervisor() tells cservice of an error by it

    def common_variables(self):
        """Returns the variables of every job here, as bytes: cservice's own, and the addresses of both sides."""
        values, user, client, (address, port) = dict(os.environ), self.settings.user, self.client, self.link.here
        if user:
            values.update(HOME=user.pw_dir, USER=user.pw_name, LOGNAME=user.pw_name, SHELL=user.pw_shell)
        values.update(REMOTE_ADDR=client.address, REMOTE_PORT=str(client.port), REMOTE_USER=client.name,
                      SERVER_ADDR=address, SERVER_PORT=str(port))
        return {os.fsencode(name): os.fsencode(value) for name, value in values.items()}

    def work(self):
        """Runs the job to its end.  Returns this process's exit code."""
        loop = self.loop
        # cservice may have inherited ignored signals, which exec would pass on to the command.  A signal
        # with a handler gets its default from exec: so each ignored one gets a handler here.
        for number in range(1, signal.NSIG):
            if signal.Handlers.SIG_IGN is signal.getsignal(number):
                signal.signal(number, lambda number, frame: None)
        loop.catch([signal.SIGCHLD, signal.SIGTERM], self.signalled)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        missing = self.command.find()
        if missing:
            return self.refuse("missing", *missing)
        try:
            self.command.make_ends()
        except OSError as error:
            self.command.leave_directory()
            return self.refuse("refused", 0, "cannot make pipes, a terminal or a directory: %s" % error.strerror)
        self.accept()
        loop.after(CHECK_SECONDS, self.check_client)
        loop.run()
        self.remove_left()
        return 0

    def refuse(self, word, status, reason):
        """Sends REFUSE, and the word to cservice.  Returns this process's exit code."""
        self.link.send(REFUSE, status=status, reason=reason)
        self.say("%s %s\nback" % (word, printable(reason)))
        return 1

    def accept(self):
        """Sends ACCEPT, when the descriptors are made and nothing has run, and waits for GO."""
        # A client sends its first GO after this ACCEPT.  A batch sends the next GO at once: there ACCEPT tells that the
        # job has begun.
        self.link.send(ACCEPT, later=self.started)
        self.set_deadline(OFFER_SECONDS, lambda: self.link.fail("no GO"))

    def set_deadline(self, seconds, call):
        """Calls call() after so many seconds, if the next event of this state has not come until then."""
        if self.deadline:
            self.deadline.cancel()
        self.deadline = self.loop.after(seconds, call)

    def say(self, words):
        """Sends a line to cservice.  Returns False if that has ended."""
        with suppress(OSError):
            os.write(self.service, words.encode() + b"\n")
            return True
        return False

    def release_directory(self, name):
        """A job is over: has its directory removed, by cservice or, if that has ended, by this process at its end."""
        if not self.say("leaves " + name):
            self.left.append(name)

    def remove_left(self):
        for name in self.left:
            try:
                self.settings.job_root.remove(name)
            except OSError as error:
                self.settings.job_root.tell(name, error)

    def signalled(self, number):
        if number == signal.SIGTERM:
            # Between two jobs the next may be on its way: close_notify tells its client that it does not begin here.
            if self.state is not RESTING:
                return self.abandon("told to end")
            self.leave()
            self.loop.after(1.0, self.loop.stop)        # the client may be stopped
        elif self.command:
            self.command.child_ended()

    def check_client(self):
        """Looks every CHECK_SECONDS whether the client's host has vanished."""
        if not self.link.closed:
            self.loop.after(CHECK_SECONDS, self.check_client)
            self.link.check_host()

    # What the client tells us

    def link_frame(self, link, kind, flags, channel, payload):
        taken = self.TAKES[self.state]
        if kind not in taken and self.state is RUNNING:
            self.command.link_frame(link, kind, flags, channel, payload)
        elif kind in taken or self.state not in self.DROPS:
            take_frame(self, taken, kind, flags, channel, payload)

    def rcvd_go(self, flags, channel, payload):
        self._set(RUNNING)
        self.deadline.cancel()
        self.command.start()
        # A frame that could not be sent only marks the link: nobody else tells us.
        if self.state is RUNNING and (self.link.write_closed or self.link.closed):
            self.abandon("the client has gone")

    def rcvd_ping(self, flags, channel, payload):
        if not self.link.congested:         # else one PONG will answer several PINGs
            self.link.send(PONG)

    def rcvd_words(self, flags, channel, payload):
        """A part of the words of the batch's next job."""
        self.words.add(payload.bytes)
        self.set_deadline(OFFER_SECONDS, self.leave)
        self.link.send(PONG, later=True)

    def rcvd_job(self, flags, channel, payload):
        """The next job of a batch; its GO is on the way."""
        job = check_job(payload, self.words, self.settings.options)
        self._set(AWAITING_GO)
        if any(number >= self.loop.floor and not flags & FLAG_FILES for number, _, flags in job.descriptors):
            raise ProtocolError("a job with higher descriptors than the first")
        self.command = Command(self, job)
        missing = self.command.find()
        if missing:
            return self.decline(missing[1])
        try:
            self.command.make_ends()
        except OSError as error:
            return self.decline("cannot make pipes, a terminal or a directory: %s" % error.strerror)
        self.accept()

    def decline(self, reason):
        """This job does not begin.  GO is on the way: so it is too late for REFUSE, and the end must say it."""
        self.link.finish()
        self.link.fail(reason)

    def link_writable(self, link):
        if self.state is OVER:
            self.close_when_sent()
        elif self.command:
            self.command.refresh()

    def link_lost(self, link, reason, violation):
        if self.state is OVER:
            return self.loop.stop()
        self.abandon(reason)

    # What the command tells us

    def command_started(self, command):
        self.started = True
        if command.sessions():
            self.is_free = False    # cservice must know of this session, and later that it is over
        if not self.is_free:
            self.say("%s %d" % ("session" if command.sessions() else "group", command.process.pid))

    def command_finished(self, command):
        """Sends EXIT; in a batch it first asks cservice whether the batch may go on here."""
        # If the command could not be started here, the batch must not fail job after job: the next goes elsewhere.
        if self.client.batch == NO_BATCH or command.process is None or not command.reap_group():
            self.send_exit()
        elif self.is_free:
            self.send_exit(more=True)
        else:
            self.ask_for_more()

    def ask_for_more(self):
        """Asks cservice whether this batch may go on here; without an answer in a second it may not."""
        self._set(ASKING)
        self.set_deadline(1.0, lambda: self.decide("no"))
        self.loop.on_read(self.service, self.hear_service)
        self.say("more")

    def hear_service(self):
        """Handles the words of cservice; if it has ended, that is "no"."""
        words = what_came(os.read, self.service, 4096).decode().split()
        if not words:
            self.loop.on_read(self.service, None)
        for word in words or ["no"]:
            self.decide(word)

    def decide(self, word):
        """Takes an answer to "more", or "ask"."""
        self.is_free = word == "free"
        if self.state is ASKING and word != "ask":
            self.deadline.cancel()
            self.send_exit(more=word != "no")

    # After a job

    def send_exit(self, more=False):
        """Sends EXIT, the last frame of a job."""
        how, status, reason = self.command.result
        counts = self.command.counts()
        self.command.stop_channels()            # no SHUT follows if the other end of an input is closed now
        self.link.send(EXIT, how=how, status=status, more=more, reason=reason, channels=counts)
        if more:
            self.await_next_job()
        else:
            self.leave()

    def await_next_job(self):
        """Forgets the job, and waits for the next one or for the client to close."""
        self.command.close()
        self.command = None
        self._set(RESTING)
        self.await_delivery(self.link.undelivered(), time.monotonic())

    def await_delivery(self, before, since):
        """Waits until EXIT has arrived; from then on the client has OFFER_SECONDS for the next JOB.

        before: how many bytes were not delivered at the last look.  since: when this number last fell.
        It gives up if the number does not fall for CLOSE_SECONDS.
        """
        now, undelivered = time.monotonic(), self.link.undelivered()
        if undelivered < before:
            since = now
        if not undelivered:
            self.set_deadline(OFFER_SECONDS, self.leave)
        elif now - since > CLOSE_SECONDS:
            self.leave()
        else:
            self.set_deadline(0.1, lambda: self.await_delivery(undelivered, since))

    def leave(self):
        """Frees the slot, because no job follows.  The connection stays, for the client may still be reading."""
        self._set(OVER)
        self.deadline.cancel()
        self.say("done")
        self.close_when_sent()

    def close_when_sent(self):
        if self.link.congested and not self.link.write_closed:
            return                  # link_writable() will call this again
        self.link.finish()
        self.delivered_at = time.monotonic()
        self.await_close()

    def await_close(self):
        """Goes on reading until the client closes, and drops what it reads.

        If we closed first while input of the client is on its way to us, TCP would reset the
        connection, and the client would lose the output that it has not read yet.  It may need long:
        it may be stopped, or its network is slow.  check_client() detects a host that has vanished.
        """
        now = time.monotonic()
        if self.link.undelivered():
            self.delivered_at = now
        if now - max(self.delivered_at, self.link.last_activity) > CLOSE_SECONDS:
            return self.loop.stop()
        self.loop.after(min(1.0, CLOSE_SECONDS), self.await_close)

    def abandon(self, reason):
        """The client has gone, or we got TERM: ends the command and all processes that it has started."""
        # After the last EXIT there is no command to end, and this process ends too.  But if a part of EXIT
        # is still in our queue, the client has a moment to take it: perhaps it never reads again.
        if self.state is OVER:
            return self.loop.after(KILL_SECONDS if self.link.congested else 0, self.loop.stop)
        if self.state is GONE:
            return
        log.note("abandons the job: %s", reason)
        self._set(GONE)
        self.link.close()
        if not self.command or not self.command.is_at_work():
            return self.end()
        # The slot stays in use until all processes of our session and of the command's own session
        # have ended.  If this process is killed before that, cservice ends them: see Supervisors.
        self.command.abandon()
        end_sessions(self.loop, [os.getpid()] + self.command.sessions(), self.command.group, over=self.end)

    def end(self):
        if self.command:
            self.command.leave_directory()
        # If no process was started, nothing of the job has run: the client may ask again ("back").
        # Between two jobs of a batch there is no process either, but no job to ask again for ("done").
        self.say("done" if self.started else "back")
        self.loop.stop()


def become_supervisor(settings, client, link, job, service):
    """The child's side of the fork.  Returns the exit code."""
    supervisor = None
    try:
        os.setsid()
        supervisor = Supervisor(settings, client, link, job, service)
        return supervisor.work()
    except BaseException as error:
        if not isinstance(error, (OSError, Fatal)) or supervisor:
            log.say("supervisor: %s: %s" % (type(error).__name__, error))
        if supervisor is None or supervisor.deadline is None:       # after ACCEPT the client has sent GO
            link.send(REFUSE, status=0, reason=str(error) or type(error).__name__)
        if supervisor is None:
            os.write(service, b"refused %s\nback\n" % str(error).encode())
        elif not supervisor.started:
            supervisor.say("back")
        return 1


class SupervisorHandle:
    """A supervisor process, at cservice.

    The method rcvd_WORD(value) handles a line from it.  worker, the Worker, has the methods
    job_started(), job_failed(), command_missing(reason), job_refused(reason), job_returned(client),
    may_go_on(client), has_penalty() and slots_changed().
    """

    def __init__(self, supervisors, client, pid, pipe, slot):
        self.loop, self.worker, self.removals = supervisors.loop, supervisors.worker, supervisors.removals
        self.supervisors, self.client, self.pid = supervisors, client, pid
        self.slot = slot            # its number, CEXEC_SLOT
        self.directories = set()    # names of its jobs' directories that it still uses
        self.pipe = pipe            # our end of the socketpair; None once it is closed
        self.unfinished = b""       # the beginning of a line
        self.sessions = [pid]       # its session; with a terminal also the command's session
        self.is_free = False        # whether its batch goes on without asking
        self.done = False           # whether no command runs, and none will
        self.killed = False         # by cut_off()
        os.set_blocking(pipe, False)
        self.loop.on_read(pipe, self.read)

    def read(self):
        """Handles the lines that have come."""
        data = what_came(os.read, self.pipe, 65536)
        if data is None:            # poll has seen another pipe, which had this number before
            return
        if not data:                # it has ended, and perhaps did not read our answer
            return self.hang_up()
        *lines, self.unfinished = (self.unfinished + data).split(b"\n")
        for line in lines:
            log.note("supervisor %d: %s", self.pid, line.decode())
            word, _, value = line.decode().partition(" ")
            method = getattr(self, "rcvd_" + word, None)
            if method:
                method(value)
        self.worker.slots_changed()

    def rcvd_group(self, value):
        self.worker.job_started()
        self.sessions = [self.pid]  # forgets the session of the batch's last job: its number may be in use again

    def rcvd_session(self, value):
        self.worker.job_started()
        self.sessions = [self.pid, int(value)]

    def rcvd_directory(self, value):
        self.directories.add(value)

    def rcvd_leaves(self, value):
        self.directories.discard(value)
        self.removals.remove(value, self)

    def remove_directories(self):
        """Has what a lost supervisor has left there removed."""
        for name in self.directories:
            self.removals.remove(name, self)
        self.directories = set()

    def rcvd_failed(self, value):
        self.worker.job_failed()

    def rcvd_missing(self, value):
        self.worker.command_missing(value)

    def rcvd_refused(self, value):
        self.worker.job_refused(value)

    def rcvd_back(self, value):
        self.worker.job_returned(self.client)

    def rcvd_more(self, value):
        may_go_on = self.removals.count(self) < REMOVALS_MAX and self.worker.may_go_on(self.client)
        # A job with a directory tells of its directory, so "free" would save nothing, and one with a session has to
        # tell when this is over.  While there is a penalty, we must hear of the next start.
        self.is_free = may_go_on and not (self.removals.root or self.sessions != [self.pid]
                                          or self.worker.has_penalty())
        self.tell(b"free\n" if self.is_free else b"yes\n" if may_go_on else b"no\n")

    def ask(self):
        """Has it tell of the next start of a job, and ask when that job is over."""
        if self.is_free:
            self.is_free = False
            self.tell(b"ask\n")

    def tell(self, line):
        with suppress(OSError):     # it has just ended
            os.write(self.pipe, line)

    def rcvd_done(self, value):
        self.done = True
        self.supervisors.limit_over(self)

    def hang_up(self):
        self.is_free = False
        if self.pipe is not None:
            self.loop.forget(self.pipe)
            os.close(self.pipe)
            self.pipe = None

    def hear_end(self):
        """Returns whether the process has ended; then its last lines were handled."""
        code = ended(self.pid)
        if code is None:
            return False
        if self.pipe is not None:
            self.read()             # once, not to the end of file: a child of its may hold the pipe open
            self.hang_up()
        log.note("supervisor %d ended, %s", self.pid, "done" if self.done else "status %d" % code)
        return True

    def terminate(self):
        os.kill(self.pid, signal.SIGTERM)

    def cut_off(self):
        """Ends it when it is over: it has no command any more, and the client has not closed."""
        self.killed = True
        os.kill(self.pid, signal.SIGKILL)


class Removals:
    """The Helpers that remove jobs' directories, which may be large.  over() is called when one has ended."""

    def __init__(self, loop, root, over):
        self.loop, self.root, self.over = loop, root, over
        self.owners = {}            # pid of a Helper: a SupervisorHandle, or None: it removes what a crash has left

    def remove(self, name, owner):
        """Removes one of the owner's directories; most small jobs leave it empty, and need no Helper."""
        if not self.root.remove_empty(name) and not self.help(
                lambda: self.root.remove(name), owner, lambda trouble: self.root.tell(name, trouble)):
            self.loop.after(REMOVAL_PAUSE, lambda: self.remove(name, None))

    def remove_left(self):
        """Removes what a crash has left.  The Helper is killed when this process ends: the next one will go on."""
        helper = self.help(self.root.remove_left, None, lambda trouble: None)
        if helper:
            at_end.append(lambda: helper.pid in self.owners and (helper.kill(), helper.wait()))

    def help(self, work, owner, tell):
        """Returns a Helper that does work(); or None, if no process is left, and calls tell(why)."""
        def ended(trouble):
            del self.owners[helper.pid]
            if trouble:
                tell(trouble)
            self.over()
        try:
            helper = Helper(self.loop, work, [self.root.fd], ended)
        except OSError as error:    # no process is left now
            return tell(error.strerror)
        self.owners[helper.pid] = owner
        return helper

    def count(self, owner):
        return list(self.owners.values()).count(owner)


class Supervisors:
    """All supervisors of a cservice, and the processes and directories that they have left."""

    def __init__(self, loop, worker, root):
        self.loop, self.worker = loop, worker
        self.handles = {}           # pid: SupervisorHandle
        self.lost = {}              # the same, of those that ended before "done", or have left directories, until
                                    # all that they have left has ended
        self.removals = Removals(loop, root, self.reap)

    def __len__(self):
        return len(self.busy() | set(self.handles.values()))

    def busy(self):
        """The handles that have a slot: until EXIT is sent, no process is left, and the directory is removed."""
        running = {handle for handle in self.handles.values() if not handle.done}
        return (running | set(self.lost.values()) | set(self.removals.owners.values())) - {None}

    def slots_in_use(self):
        return len(self.busy())

    def slot_number(self):
        """The smallest number that no running job has as its slot; it is below CONCURRENCY."""
        return free_number({handle.slot for handle in self.busy()}, 0)

    def fork(self, settings, client, link, job):
        """Hands a client's connection to a new supervisor.  Raises OSError."""
        near, far = (end.detach() for end in socket.socketpair())
        slot = self.slot_number()

        def work():
            os.environ["CEXEC_SLOT"] = str(slot)        # for every job on this connection
            return become_supervisor(settings, client, link, job, far)
        kept = [link.sock.fileno(), far, 2, log.fd]
        if settings.job_root:
            kept.append(settings.job_root.fd)
        with closing(far), on_failure(os.close, near):
            pid = forked(work, kept)
        self.handles[pid] = SupervisorHandle(self, client, pid, near, slot)
        log.note("supervisor %d forked for %s", pid, client.address)

    def hear_more(self):
        """Has each batch that goes on without asking tell of its next start, and ask after that job."""
        for handle in self.handles.values():
            handle.ask()

    def limit_over(self, handle):
        """This one is over: its slot is free.  If too many are, ends the first of them, of the name that has most.

        A client decides when it closes, and no slot is in use: so there could be any number.
        """
        self.handles[handle.pid] = self.handles.pop(handle.pid)     # in the order in which they were over
        waiting = [other for other in self.handles.values() if other.done and not other.killed]
        if len(waiting) > OVER_MAX:
            (name, _), = collections.Counter(other.client.name for other in waiting).most_common(1)
            next(other for other in waiting if other.client.name == name).cut_off()

    def reap(self):
        """Removes supervisors that have ended from handles; ends the processes of those that were lost."""
        for handle in list(self.handles.values()):
            if handle.hear_end():
                del self.handles[handle.pid]
                if not handle.done or handle.directories:
                    self.end_session(handle)
        self.reap_zombies()
        self.worker.slots_changed()

    def reap_zombies(self):
        """Reaps every child that has ended, except supervisors in handles and lost, and Helpers.

        In a container cservice may be process 1: then orphans become its children.
        """
        # As soon as a process is reaped, another process and another session can get its number.  But
        # end_session() finds the processes of a lost supervisor by this number.  So a lost supervisor
        # stays a zombie until its session has ended.  One in self.handles was not seen by reap() yet.
        # waitid(2) returns the same child again and again, so the loop must stop at the first child
        # that has to stay; reap() will be called again.
        while HOLDS_PIDS:
            try:
                child = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                break
            if child is None or any(child.si_pid in ours for ours in (self.handles, self.lost, self.removals.owners)):
                break
            os.waitpid(child.si_pid, 0)

    def end_session(self, handle):
        """A supervisor was lost: ends the processes that it has left.  Until then its slot is in use."""
        def over():
            del self.lost[handle.pid]
            handle.remove_directories()
            self.reap()             # while it was there, other children may have waited behind it

        self.lost[handle.pid] = handle
        end_sessions(self.loop, handle.sessions, None, over)    # the command was never our child

    def terminate(self):
        """Ends all running jobs."""
        for handle in self.handles.values():
            handle.terminate()


# ---------------------------------------------------------------------------
# cservice: the offers, their delay, and the line of waiting clients
# ---------------------------------------------------------------------------

# The way of an announcement:
#
#     Worker.hear --> rcvd_announce --a slot is free, nobody in line--> delay_offer --Pace.delay()--> offer --> Offer
#                         '--else--> queue_up --> Line --a slot is free: serve_line-------------------'
#
# Pace.delay() makes the least loaded worker the first: its delay grows with the load.  It adds a random spread if this
# is the client's first announcement, and a penalty after a failure.  BOOST replaces all that.  A client that comes
# from the line waits for the penalty only, whatever BOOST is.
HOLD_SECONDS = 0.25                 # an offer holds a slot for this long before TLS is up,
HOLD_MAX = 1.0                      # or for this long, if the last one to the same address needed more
BY_SSH_SECONDS = 600.0              # a client's address that was reached only through ssh is tried directly again
LATE_MAX = 64                       # late offers at a time, which hold no slot any more
BACKOFF_MAX = 16.0                  # the longest pause before a client that cannot be reached is tried again
LINE_SECONDS = 5.0                  # a waiting client is forgotten after this silence,
LINE_PAUSES = 4                     # or after so many pauses between its announcements, if these are longer
PAUSE_MAX = 15.0                    # seconds: a longer pause between announcements is not believed
DELAY_PER_LOAD = 0.020              # seconds that a worker waits for a load of 1
DELAY_MAX = 1.0
PENALTY = 2.0                       # seconds that a worker which has failed waits in addition
COMPLAINT_SECONDS = 600.0           # a client that complains of two workers in this time may have a bad link
MUCH_MOVED = 1024 * 1024            # bytes of a job: a worker that has moved so many works, so no complaint counts
SPREAD_MIN = 0.002                  # a smaller random spread counts as none
SPREAD_MAX = 1.0
OFFERS_WANTED = 3                   # offers for an announcement: the spread is adapted to get so many
OFFERS_IN_LINE = 2                  # offers for a client in the line: "few" is adapted to get so many
FEW_MAX = 64                        # a worker chooses among so many of the oldest in the line at most
QUERIES_MAX = 64                    # QUERYs that a worker answers in a second
PROBES_MAX = 64                     # connections back to clients that sent a QUERY, at a time
DENY_SECONDS = 0.2                  # between two DENYs


def load_delay(busy, slots, average, runnable, cpus):
    """Returns (load, seconds to wait before an offer); the load is 1 if all slots or all CPUs are in use.

    It is the share of the slots that are in use, plus the greater of two numbers per CPU: the
    1-minute load average, and the number of processes that are runnable now beyond the CPUs.
    The sum decides between two workers on equally loaded hosts: the one with fewer jobs is first.
    """
    system = max(average / cpus, max(0, runnable - cpus) / cpus)
    load = busy / slots + (system if system >= 0.1 else 0)
    return load, min(load * DELAY_PER_LOAD, DELAY_MAX)


def next_spread(spread, offers):
    """The random spread (seconds) after a CLAIM, which tells how many offers its client got.

    It grows after more offers than OFFERS_WANTED, and shrinks after fewer.  So a hundred idle
    workers soon make about three offers for an announcement, and two workers do not wait at all.
    """
    factor = min(16.0, max(0.5, offers / OFFERS_WANTED))
    return min(SPREAD_MAX, max(SPREAD_MIN / 2, spread * factor))


def spread_delay(spread, fraction):
    """This fraction of the spread, in seconds; 0 while the spread is below 2 ms."""
    return spread * fraction if spread >= SPREAD_MIN else 0.0


def next_few(few, offers):
    """Among how many of the oldest clients a worker chooses, after a CLAIM, which tells how many offers its client got.

    If many slots become free at once, not all workers should choose the same client.  A single
    worker hears of one offer in each claim, and so keeps to the order.
    """
    factor = min(4.0, max(0.5, offers / OFFERS_IN_LINE))
    return min(FEW_MAX, max(1.0, few * factor))


class Pace:
    """Decides how long a worker waits before an offer: the sum of its load's delay, a random spread and a penalty."""

    def __init__(self, slots, boost):
        self.slots, self.boost = slots, boost       # boost: BOOST's seconds, which replace the sum, or None
        self.penalty, self.spread = 0.0, SPREAD_MIN / 2
        self.few = 1.0              # it chooses among so many of the oldest in the line
        self.sample()

    def sample(self):
        """To be called every second."""
        self.runnable = system_load()[1]

    def load(self, in_use):
        """Returns (load, delay in seconds) with so many slots in use."""
        average, runnable = system_load()
        # The smaller number of now and a second ago: a process that runs for a moment only is no load.
        return load_delay(in_use, self.slots, average, min(runnable, self.runnable), processors())

    def delay(self, in_use, first):
        """Seconds until an offer; first: all workers answer this announcement now, so the spread is needed."""
        if self.boost is not None:
            return self.boost
        spread = spread_delay(self.spread, random_fraction()) if first else 0.0
        return self.load(in_use)[1] + spread + self.penalty

    def claimed(self, offers):
        """A client has sent CLAIM, and had so many offers."""
        self.spread, self.few = next_spread(self.spread, offers), next_few(self.few, offers)

    def failed(self):
        self.penalty = PENALTY

    def works(self):
        self.penalty = 0.0


# A client's states at a worker, which only Clients.move() changes.
#
#   NEW --a slot is free--> DELAYED --its delay is over--> OFFERED --JOB--> SERVED --CLAIM--> CLAIMED
#    |                       |   A                          A   |             '--gone before GO--> NEW
#    |      no slot any more |   | its turn, and we         |   |--the connection has ended--> NEW
#    |                       V   | have a penalty           |   |--TLS is up, no slot is free--> QUEUED
#    '--no slot is free---> QUEUED -------its turn----------'   '--no connection--> BACKING_OFF
#                             '--silent for too long--> NEW
#
#   In NEW, and in BACKING_OFF after some seconds, its next ANNOUNCE leads to DELAYED or QUEUED.
#   From every state CLAIM leads to CLAIMED.  From DELAYED, QUEUED and OFFERED draining leads to NEW.

NEW, DELAYED, QUEUED, OFFERED = "NEW", "DELAYED", "QUEUED", "OFFERED"
BACKING_OFF, SERVED, CLAIMED = "BACKING_OFF", "SERVED", "CLAIMED"


class KnownClient(Stateful):
    """A client that announces a job, at a worker: one object for each job."""

    LAW = {NEW: (DELAYED, QUEUED, CLAIMED), DELAYED: (OFFERED, QUEUED, NEW, CLAIMED),
           QUEUED: (OFFERED, DELAYED, NEW, CLAIMED), OFFERED: (SERVED, NEW, QUEUED, BACKING_OFF, CLAIMED),
           BACKING_OFF: (DELAYED, QUEUED, CLAIMED), SERVED: (CLAIMED, NEW), CLAIMED: ()}

    # There may be 30,000 of them.
    __slots__ = ("application", "name", "nonce", "key", "address", "port", "attempt", "batch", "only", "state",
                 "timer", "since", "heard_at", "patience", "told_at", "failures", "retry_at", "ours", "complained",
                 "handle", "direct")

    def __init__(self, datagram, since):
        self.application, self.name, self.nonce = datagram.application, datagram.name, datagram.nonce
        self.key = self.name, self.nonce
        self.state, self.timer = NEW, NO_TIMER      # the timer of the state DELAYED
        self.address, self.port, self.attempt, self.batch, self.only = "", 0, 0, NO_BATCH, ANY_WORKER
        self.handle = None              # (address, port) by which `cservice -s` reaches it, if that has heard it
        self.direct = False             # whether we have heard it ourselves: then address and port are its own
        self.since = since              # when it began to wait, by our clock
        self.heard_at = self.told_at = 0.0          # when it last announced itself; when we last sent it BUSY
        self.patience = LINE_SECONDS    # seconds that it may be silent in the line
        self.failures, self.retry_at = 0, 0.0       # failed connections to it in a row; the time of the next try
        self.ours = self.complained = False         # we have made it an offer; it has complained of the last one

    def __repr__(self):
        return "client %s %s" % (self.name, self.nonce.hex()[:8])

    def enter(self, state, timer):
        """Only Clients.move() calls this."""
        self._set(state)
        self.timer.cancel()
        self.timer = timer
        if state is OFFERED:
            self.ours, self.complained = True, False

    def heard(self, datagram, address, handle):
        """An ANNOUNCE came, directly or, with a handle, through ssh; perhaps a copy, by another way than the first.

        The address may be another than before, but not by a copy: that may be a replay from elsewhere.
        """
        if handle and not self.handle:
            self.told_at = 0.0      # it may not have heard what we told it directly
        self.handle = handle or self.handle
        if not self.direct or not handle and datagram.body.attempt > self.attempt:
            self.address, self.port, self.direct = address, datagram.port, not handle

    def announced(self, datagram, now):
        """This ANNOUNCE is no copy."""
        self.heard_at, self.attempt, self.batch = now, datagram.body.attempt, datagram.body.batch
        self.only = datagram.body.only
        self.patience = max(LINE_SECONDS, LINE_PAUSES * min(PAUSE_MAX, datagram.body.pause / 1000))

    def succeeded(self):
        """A connection to it was made."""
        self.failures, self.retry_at = 0, 0.0

    def failed(self, now):
        """A connection to it could not be made: the next try comes after a pause, which doubles each time."""
        self.retry_at = now + min(BACKOFF_MAX, 2.0 ** min(self.failures, 10))
        self.failures += 1

    def is_silent(self, now):
        """Whether it has been silent for longer than its patience."""
        return now - self.heard_at > self.patience

    def is_busy_due(self, now):
        """Whether it is time for the next BUSY."""
        return now - self.told_at >= BUSY_SECONDS

    def told(self, now):
        """BUSY is sent to it."""
        self.told_at = now

    def note_complaint(self):
        """It complains.  Returns whether that counts: one complaint for each offer does."""
        counts, self.complained = self.ours and not self.complained, True
        return counts


class Line:
    """Clients that wait for a slot.  The names take turns; within a name the oldest client is first."""

    def __init__(self):
        self.names = collections.OrderedDict()      # name: [(since, nonce, KnownClient)], sorted; the next one is first
        self.sizes = {}             # a number of clients: the names that have so many
        self.most = 0               # the largest number of clients of a name

    def __len__(self):
        return sum(size * len(names) for size, names in self.sizes.items())

    def __bool__(self):
        return bool(self.names)

    def __iter__(self):
        return (client for members in self.names.values() for _, _, client in members)

    def __contains__(self, client):
        return any(other is client for _, _, other in self.names.get(client.name, ())[self.index(client):][:1])

    def index(self, client):
        """How many clients of its name are older."""
        return bisect.bisect_left(self.names.get(client.name, ()), (client.since, client.nonce))

    def join(self, client):
        if client not in self:
            members = self.names.setdefault(client.name, [])
            members.insert(self.index(client), (client.since, client.nonce, client))
            self._resized(client.name, len(members) - 1, len(members))

    def leave(self, client):
        if client in self:
            members = self.names[client.name]
            del members[self.index(client)]
            self._resized(client.name, len(members) + 1, len(members))
            if not members:
                del self.names[client.name]

    def _resized(self, name, before, now):
        """Keeps sizes and most, of which a name's size changes by one: to count all names would take long."""
        for size, change in ((before, set.discard), (now, set.add)):
            names = self.sizes.setdefault(size, set())
            change(names, name)
            if not names or not size:
                del self.sizes[size]
        if now > self.most or self.most not in self.sizes:
            self.most = now

    def clients(self):
        """How many wait, for people: all searches of a batch are one."""
        return len({client.nonce if client.batch == NO_BATCH else client.batch for client in self})

    def silent(self, now):
        """The clients that have been silent for longer than their patience."""
        return [client for client in self if client.is_silent(now)]

    def ahead(self, client):
        """How many clients will be served before this one, if none comes or goes."""
        turns = self.index(client) + 1          # of its name, up to its own; every other name has as many before it
        return sum(min(size, turns) * len(names) for size, names in self.sizes.items()) - 1

    def take(self, few, fraction):
        """Removes and returns one of the oldest few clients of the name whose turn it is."""
        name, members = next(iter(self.names.items()))
        _, _, client = members[int(fraction * min(int(few), len(members)))]
        self.names.move_to_end(name)
        self.leave(client)
        return client

    def last(self, newcomer):
        """Returns who has to go: the newest client of the name that has most, where the newcomer counts too."""
        members = self.names.get(newcomer.name, ())
        if len(members) < self.most:
            members = self.names[next(iter(self.sizes[self.most]))]
            return members[-1][2]
        return newcomer if self.index(newcomer) == len(members) else members[-1][2]


class Clients:
    """All clients that a worker knows.

    line has the clients that are QUEUED, and offers has the Offer of each that is OFFERED: to find
    them among all clients would take long.
    """

    def __init__(self, limit=MEMORY):
        # A replayed ANNOUNCE must do nothing: so a client is remembered after it was served or claimed.
        # Each of the three parts has its own bound.  So a flood of announcements makes us forget no
        # client that was served; and a flood of claims for other workers' jobs makes us forget no
        # client that we have made an offer: its complaint must still count.
        self.limit = limit
        self.unserved = {}          # (name, nonce): KnownClient, here and in the other parts
        self.idle = collections.OrderedDict()       # the unserved ones that are NEW or BACKING_OFF, the oldest first
        self.ours, self.others = Memory(limit), Memory(limit)   # SERVED or CLAIMED: with an offer of ours, without
        self.line, self.offers = Line(), {}         # offers: (name, nonce): Offer

    def find(self, named):
        """The client with the same name and nonce as this datagram or object; None if it is not known."""
        key = named.name, named.nonce
        return self.unserved.get(key) or self.ours.get(key) or self.others.get(key)

    def add(self, client):
        """Adds a client after its first ANNOUNCE.  Returns whether there was room.

        To make room it forgets the oldest idle client; or one in the line, of the name that has most there: so
        nobody keeps other names out.  It never forgets one with an offer or a delay: a replay of its ANNOUNCE
        would get it another.
        """
        if len(self.unserved) >= self.limit:
            other = next(iter(self.idle.values()), None) or self.line.last(client)
            if other is client:
                return False
            self.line.leave(other)
            self.idle.pop(other.key, None)
            del self.unserved[other.key]
        self.unserved[client.key] = self.idle[client.key] = client
        return True

    def move(self, client, state, timer=NO_TIMER, offer=None):
        """Changes a client's state; a timer comes with DELAYED, an offer with OFFERED."""
        client.enter(state, timer)
        for part in (self.unserved, self.idle, self.ours, self.others):
            part.pop(client.key, None)
        remembered = self.ours if client.ours else self.others
        (remembered if state in (SERVED, CLAIMED) else self.unserved)[client.key] = client
        if state in (NEW, BACKING_OFF):
            self.idle[client.key] = client
        self.line.leave(client)
        if state is QUEUED:
            self.line.join(client)
        self.offers.pop(client.key, None)
        if state is OFFERED:
            self.offers[client.key] = offer

    def expire(self, now):
        """Takes silent clients out of the line."""
        for client in self.line.silent(now):
            self.move(client, NEW)

    def under_way(self):
        """The clients with a delay, a place in the line or an offer."""
        return [client for client in self.unserved.values() if client.state in (DELAYED, QUEUED, OFFERED)]


class Offer:
    """A worker's connection to a client, until a supervisor is forked for it, or the connection has ended.

    It holds a slot for hold seconds, and again, if one is free, from TLS on: then it is seated.  If `cservice -s`
    reaches the client too, an offer that is not seated after its hold seconds, or fails before that, begins once more
    through ssh.  If it still holds its slot, it has HOLD_MAX for that.
    """

    def __init__(self, worker, client, load, delay, hold):
        self.worker, self.client, self.load, self.delay = worker, client, load, delay
        self.holds_slot, self.seated, self.began = hold > 0, False, time.monotonic()
        self.challenge, self.proved, self.link = os.urandom(32), False, None
        self.words, self.timer = Words(), NO_TIMER  # timer: the deadline for JOB
        self.by_ssh = False         # whether this connection goes through ssh
        self.hold, self.hold_timer = hold, worker.loop.after(hold, self.late)
        self.dial = None
        if not worker.prefers_ssh(client) or not self.turn_to_ssh():
            self.dial = Dial(worker.loop, client.address, client.port, OFFER_SECONDS, self.connected,
                             self.not_connected)

    def await_job(self, seconds=OFFER_SECONDS):
        self.timer.cancel()
        self.timer = self.worker.loop.after(seconds, lambda: self.lost("no job in %g s" % OFFER_SECONDS))

    def late(self):
        """TLS is not up yet: a connection that is slow or is never made must not hold a slot for long."""
        if not self.seated and not self.turn_to_ssh() and self.holds_slot:
            log.note("offer for %s is late: it holds no slot", self.client.nonce.hex()[:8])
            self.holds_slot = False
            self.worker.offer_late(self)

    def turn_to_ssh(self):
        """Leaves the direct way for the one through ssh.  Returns False if there is none, or this is it already."""
        sock = None if self.by_ssh else self.worker.connect_by_ssh(self.client)
        if sock is None:
            return False
        self.close()
        self.by_ssh, self.hold_timer = True, self.worker.loop.after(HOLD_MAX, self.late)
        self.connected(sock, OFFER_SECONDS)
        return True

    def connected(self, sock, seconds):
        self.await_job(seconds)
        self.link = Link(self.worker.loop, sock, Tls(self.worker.context, server_side=True), self,
                         self.worker.lifeline.here(self.client.address) if self.by_ssh else None)

    def not_connected(self, reason, unreached):
        (self.lost if unreached else self.end)(reason)

    def link_ready(self, link):
        if not self.worker.seat(self):
            return
        self.holds_slot = self.seated = True
        link.send(HELLO, version=PROTOCOL, options=self.worker.settings.options | HELLO_BY_SSH * self.by_ssh,
                  nonce=self.client.nonce, worker_id=self.worker.id,
                  challenge=self.challenge, address=link.here[0].partition("%")[0],
                  host=socket.gethostname(), load=u32(self.load * 1000), delay=u32(self.delay * 1e6))

    def link_frame(self, link, kind, flags, channel, payload):
        """Takes AUTH first, and only once; every other frame before a right AUTH is an error."""
        take_frame(self, (WORDS, JOB) if self.proved else (AUTH,), kind, flags, channel, payload)

    def rcvd_auth(self, flags, channel, payload):
        secret = client_secret(self.worker.key.master, self.client.name)
        if not hmac.compare_digest(payload.proof, client_proof(secret, self.challenge, self.client.nonce)):
            raise ProtocolError("a wrong proof")
        self.proved = True

    def rcvd_words(self, flags, channel, payload):
        self.words.add(payload.bytes)
        self.await_job()
        self.link.send(PONG)

    def rcvd_job(self, flags, channel, payload):
        self.worker.start_job(self, check_job(payload, self.words, self.worker.settings.options))

    def link_writable(self, link):
        pass                        # nothing large is sent before GO

    def link_lost(self, link, reason, violation):
        self.lost(reason)

    def lost(self, reason):
        """The connection could not be made, or has ended."""
        if not self.seated:
            if self.turn_to_ssh():
                return
            self.worker.not_reached(self)
        self.end(reason)

    def end(self, reason):
        log.note("offer to %s for %s: %s", spelled(self.client.address, self.client.port), self.client.nonce.hex()[:8],
                 reason)
        self.close()
        self.worker.offer_ended(self)

    def close(self):
        if self.dial:
            self.dial.close()
        self.hold_timer.cancel()
        self.timer.cancel()
        if self.link:
            self.link.close()


class Probe:
    """A connection to a client that has sent QUERY.  It sends nothing: it shows that offers reach this client."""

    def __init__(self, worker, address, port):
        self.worker = worker
        self.dial = Dial(worker.loop, address, port, OFFER_SECONDS, self.connected, self.end)

    def connected(self, sock, seconds):
        sock.close()
        self.end()

    def end(self, reason="", unreached=False):
        self.worker.probe_over(self)


class ProbeBySsh:
    """The same through ssh.  The client closes it."""

    def __init__(self, worker, sock):
        self.worker, self.sock = worker, sock
        self.timer = worker.loop.after(OFFER_SECONDS, self.end)
        worker.loop.on_read(sock.fileno(), self.end)

    def end(self):
        self.timer.cancel()
        self.worker.loop.forget(self.sock.fileno())
        self.sock.close()
        self.worker.probe_over(self)


def local_address(address):
    """The address of this host from which it sends to that address; "" if there is no route."""
    try:
        with socket.socket(family_of(address), socket.SOCK_DGRAM) as sock:
            sock.connect(socket_address(address, PORT))
            return sock.getsockname()[0].partition("%")[0]
    except OSError:
        return ""


class Worker:
    """cservice: hears clients, makes offers, has a supervisor for each job.

    The method rcvd_NAME(datagram, address, handle) handles a datagram; kinds without a method are not for a worker.
    The handle is None, or (address, port) by which `cservice -s` reaches the sender: then it came through ssh.
    """

    def __init__(self, loop, key, context, listeners, settings):
        self.loop, self.key, self.context = loop, key, context
        self.listeners, self.settings = listeners, settings
        self.id = os.urandom(8)
        self.pace = Pace(settings.slots, settings.boost)
        self.clients, self.supervisors = Clients(), Supervisors(loop, self, settings.job_root)
        self.complainers = Memory()                 # (name, address): when it last complained of another worker
        self.lifeline = None        # a WorkerLifeline, if `cservice -s` has started us
        self.holds = Memory()       # address: seconds that an offer to it holds a slot, if not HOLD_SECONDS
        self.ssh_until = Memory()   # address: until when offers to it go through ssh at once
        self.queried = Memory()     # (name, nonce, handle) of each QUERY that was answered
        self.replies = 0            # how many of these in this second
        self.probes, self.last_denial = set(), 0.0  # the Probes under way; when we last sent DENY
        self.draining, self.began = False, time.monotonic()
        self.trouble = None         # why we refuse jobs; None after a job was started
        hear_all(loop, listeners, self.hear, self.hear_stranger)
        self.sweep()

    def take_lifeline(self, lifeline):
        """`cservice -s` has started us, and hears clients for us too."""
        self.lifeline = lifeline

    def sweep(self):
        """Runs every second."""
        self.pace.sample()
        self.replies = 0
        self.clients.expire(time.monotonic())
        self.serve_line()
        self.loop.after(1.0, self.sweep)

    # Datagrams

    def hear(self, datagram, address, index, handle=None):
        method = handler_of(self, datagram.kind)
        if method is None:          # an answer of another worker, or what is for crat
            return
        if datagram.application != self.key.application:
            return self.deny(datagram, address, handle, DENY_APPLICATION)
        if datagram.name in self.settings.refused:
            log.note("dropped %r: the name is refused (-x)", datagram)
            return self.deny(datagram, address, handle, DENY_NAME)
        if not datagram.proved_by(client_secret(self.key.master, datagram.name)):
            log.note("dropped %r: wrong MAC", datagram)
            return self.deny(datagram, address, handle, DENY_SECRET)
        log.note("<- %r from %s%s", datagram, address, ", through ssh" if handle else "")
        if datagram.kind is QUERY or not self.draining:
            method(datagram, address, handle)

    def rcvd_announce(self, datagram, address, handle):
        client, now = self.clients.find(datagram), time.monotonic()
        if not datagram.port or datagram.body.only not in (ANY_WORKER, self.id):
            return                  # no answer can reach the client; or it wants only another worker
        if client is None:
            client = KnownClient(datagram, now - datagram.body.waited / 1000)
            if not self.clients.add(client):
                return
        elif client.state in (SERVED, CLAIMED):
            return                  # the job is served
        client.heard(datagram, address, handle)
        if datagram.body.attempt <= client.attempt:     # this is a copy or a replay
            # What we have told it by its first way may not arrive there.
            return self.queue_up(client) if handle and client.state is QUEUED else None
        client.announced(datagram, now)
        if client.state in (DELAYED, OFFERED) or now < client.retry_at:
            return
        # If the last connection to a client failed, its next offer holds no slot before TLS is up:
        # so it need not wait for a slot.  Every other client has to wait if there is a line.
        if not self.hold_seconds(client) or self.free_slots() and not self.clients.line:
            self.delay_offer(client, self.pace.delay(self.in_use(), first=client.attempt == 1))
        else:
            self.queue_up(client)

    def rcvd_claim(self, datagram, address, handle):
        """The job is served, here or by another worker, or its client has given it up."""
        # 1. The nonce is a hash of the token, so only the job's client can send this.  A repeated claim
        #    does nothing.
        # 2. If we did not hear the announcement, a holder of the key may have invented the claim: it
        #    must not change our pace.  We remember it, in case the announcement comes later.
        # 3. The client becomes CLAIMED before its offer ends, see withdraw().  The end of an offer
        #    serves the line: then this client must not be in the line, nor its slot in use.
        if token_nonce(datagram.body.token) != datagram.nonce:
            return
        client = self.clients.find(datagram)
        if client is None:
            self.clients.move(KnownClient(datagram, time.monotonic()), CLAIMED)
        elif client.state is not CLAIMED:
            if client.only == ANY_WORKER:
                self.pace.claimed(datagram.body.offers)
            self.withdraw(client, CLAIMED, "the job is served")

    def rcvd_complaint(self, datagram, address, handle):
        """A complaint about us counts once for each offer, and not if the reason may be the client's own link."""
        body, client = datagram.body, self.clients.find(datagram)
        if body.worker_id != self.id:
            self.complainers[datagram.name, address] = time.monotonic()
        elif client and client.note_complaint():
            excuse = self.excuse(body, self.complainers.get((datagram.name, address)))
            if not excuse:
                self.penalize()
            log.note("a complaint about us: %s%s", body.reason, "; of no weight: " + excuse if excuse else "")

    def excuse(self, complaint, other):
        """Why a complaint does not count: the reason may be the client's link.  None if it counts.

        other is the time when the client last complained of another worker, or None.
        """
        if other is not None and time.monotonic() - other < COMPLAINT_SECONDS:
            return "its client complains of others too"
        if complaint.bytes_out + max(0, complaint.bytes_in - WINDOW) >= MUCH_MOVED:     # beyond it we gave credit
            return "much was moved before"
        return None

    def rcvd_query(self, datagram, address, handle):
        """Answers REPLY, once by each way, and connects to the client: so it sees whether offers would reach it."""
        key = (datagram.name, datagram.nonce, handle)
        if key in self.queried or not datagram.port or self.replies >= QUERIES_MAX:
            return
        self.queried[key] = True
        self.replies += 1
        jobs = self.supervisors.slots_in_use()
        here = self.lifeline.here(address)[0] if handle else local_address(address)
        self.answer(REPLY, datagram, address, handle, worker_id=self.id, address=here,
                    host=socket.gethostname()[:64], version=VERSION, load=u32(self.load() * 1000),
                    running=min(jobs, 0xffff), slots=self.settings.slots, waiting=self.clients.line.clients(),
                    uptime=u32(time.monotonic() - self.began), draining=self.draining,
                    options=self.settings.options | HELLO_BY_SSH * bool(handle))
        if len(self.probes) < PROBES_MAX:
            sock = self.lifeline.connect(handle) if handle else None
            if sock or not handle:
                self.probes.add(ProbeBySsh(self, sock) if sock else Probe(self, address, datagram.port))

    def probe_over(self, probe):
        self.probes.discard(probe)

    def deny(self, datagram, address, handle, why):
        """Sends DENY to a client whose QUERY asks for strangers.  It has no valid MAC, so it proves nothing."""
        if datagram.kind is QUERY and datagram.body.strangers and datagram.port:
            self.send_denial(datagram, address, handle, why)

    def send_denial(self, datagram, address, handle, why):
        """Sends DENY, unless the last one was sent just now."""
        now = time.monotonic()
        if now - self.last_denial >= DENY_SECONDS:
            self.last_denial = now
            self.answer(DENY, datagram, address, handle, serves=self.key.application, why=why)

    def hear_stranger(self, address, error):
        """Answers a QUERY of another protocol version with a DENY of ours: so the client learns our version."""
        if error.asks_at:
            asker = SimpleNamespace(application=self.key.application, name=DEFAULT_NAME, nonce=bytes(16),
                                    port=error.asks_at)
            self.send_denial(asker, address, None, DENY_VERSION)

    def answer(self, kind, datagram, to, handle, **fields):
        """Sends a datagram to the address to, or through ssh, as an answer to a client's datagram."""
        secret = bytes(32) if kind is DENY else client_secret(self.key.master, datagram.name)
        data = make_datagram(kind, datagram.application, datagram.name, secret, datagram.nonce, 0, **fields)
        if handle:
            return self.lifeline.pass_on(handle, data)
        with noting("cannot send %s to %s", kind, to):
            self.listeners[0].send(data, to, datagram.port)

    # Slots, the line, offers

    def in_use(self):
        return (self.supervisors.slots_in_use()
                + sum(offer.holds_slot for offer in self.clients.offers.values()))

    def free_slots(self):
        return 0 if self.draining else max(0, self.settings.slots - self.in_use())

    def load(self):
        return self.pace.load(self.in_use())[0]

    def hold_seconds(self, client):
        """The seconds for which an offer to this client holds a slot before TLS is up; 0 if the last one failed.

        This is also remembered for its address, because its next job will have another nonce.
        """
        return 0.0 if client.failures else self.holds.get(client.address, HOLD_SECONDS)

    def tell_busy(self, client, ahead, failures=0):
        here = self.lifeline.here(client.address)[0] if client.handle else ""
        self.answer(BUSY, client, client.address, client.handle, worker_id=self.id, attempt=client.attempt,
                    ahead=ahead, failures=min(failures, 0xffff), address=here)

    def prefers_ssh(self, client):
        """Whether the direct way to this client's address has failed, and the one through ssh worked."""
        return time.monotonic() < self.ssh_until.get(client.address, 0.0)

    def connect_by_ssh(self, client):
        """Returns a socket that leads to the client through ssh; None if there is no such way."""
        return self.lifeline.connect(client.handle) if client.handle else None

    def queue_up(self, client):
        """Puts a client in the line, and sends it BUSY with its place, at once and then every ten seconds."""
        if client.state is not QUEUED:
            self.clients.move(client, QUEUED)
            self.supervisors.hear_more()
        now = time.monotonic()
        if client.is_busy_due(now):
            client.told(now)
            self.tell_busy(client, self.clients.line.ahead(client))

    def delay_offer(self, client, delay):
        self.clients.move(client, DELAYED, timer=self.loop.after(delay, lambda: self.offer(client, delay)))

    def offer(self, client, delay):
        """Connects to a client, if a slot is still free; else the client waits in the line."""
        hold, offers = self.hold_seconds(client), self.clients.offers.values()
        if hold and not self.free_slots():
            return self.queue_up(client)
        if not hold and sum(not offer.holds_slot for offer in offers) >= LATE_MAX:
            return self.clients.move(client, NEW)
        log.note("offers %s %s", spelled(client.address, client.port), client.nonce.hex()[:8])
        self.clients.move(client, OFFERED, offer=Offer(self, client, self.load(), delay, hold))

    def offer_ended(self, offer):
        if self.clients.offers.get(offer.client.key) is offer:
            self.clients.move(offer.client, NEW)
        self.serve_line()

    def seat(self, offer):
        """TLS is up.  Returns whether the offer has a slot; if not, its client waits in the line."""
        client, free = offer.client, offer.holds_slot or self.free_slots()
        client.succeeded()
        if offer.by_ssh:
            if not self.prefers_ssh(client):
                self.ssh_until[client.address] = time.monotonic() + BY_SSH_SECONDS
        elif time.monotonic() - offer.began > HOLD_SECONDS:     # far or slow: with less it would never get a slot
            self.holds[client.address] = HOLD_MAX
        elif offer.hold < HOLD_SECONDS:                         # it failed before: trust it again step by step
            self.holds[client.address] = min(HOLD_SECONDS, 0.03 + 2 * offer.hold)
        if not free:
            self.withdraw(client, QUEUED, "no slot is free any more")
            self.supervisors.hear_more()
            self.queue_up(client)
        return bool(free)

    def offer_late(self, offer):
        """An offer is late: the next offer to this address holds no slot before TLS is up."""
        self.holds[offer.client.address] = 0.0
        self.serve_line()

    def not_reached(self, offer):
        """A connection failed: the client has to back off, and BUSY tells it that its connections fail."""
        client = offer.client
        client.failed(time.monotonic())
        self.clients.move(client, BACKING_OFF)
        self.tell_busy(client, 0, client.failures)

    def serve_line(self):
        """Offers every free slot to the next client in the line.

        With a penalty the offer is delayed, whatever BOOST says, so that another worker can serve the client first.
        """
        while self.clients.line and self.free_slots():
            client = self.clients.line.take(self.pace.few, random_fraction())
            if client.is_silent(time.monotonic()):
                self.clients.move(client, NEW)
            elif self.pace.penalty:
                self.delay_offer(client, self.pace.penalty)
            else:
                self.offer(client, 0.0)

    def withdraw(self, client, state, reason):
        """Moves a client to another state, and ends the offer that it has."""
        offer = self.clients.offers.get(client.key)
        self.clients.move(client, state)
        if offer:
            offer.end(reason)

    # Jobs

    def start_job(self, offer, job):
        """Forks a supervisor, which gets the connection."""
        try:
            self.supervisors.fork(self.settings, offer.client, offer.link, job)
        except OSError as error:
            self.job_refused("cannot fork: %s" % error.strerror)
            offer.link.send(REFUSE, status=0, reason=self.trouble)
            return offer.end(error.strerror)
        # From here on the slot is counted for the supervisor: so the offer must leave Clients.offers first.
        # Then our copy of the connection is closed.  We send nothing: the supervisor talks to the client.
        self.clients.move(offer.client, SERVED)
        offer.close()

    def job_started(self):
        self.trouble = None
        self.pace.works()

    def penalize(self):
        """Lets other workers be first, until the next start of a command here, of which we must hear."""
        self.pace.failed()
        self.supervisors.hear_more()

    def job_failed(self):
        """A command cannot be started here: the penalty lets other workers be first."""
        self.penalize()

    def command_missing(self, reason):
        """A client was refused.  This gets no penalty: perhaps the client's word is wrong, or others lack it too."""
        self.settings.say("refuses jobs: " + reason, log.once)

    def job_refused(self, reason):
        """This host cannot take a job now; this is said once, until a job is started again."""
        self.penalize()
        if self.trouble is None:
            log.say("refuses jobs until there is room: " + reason)
        self.trouble = reason

    def job_returned(self, client):
        """The connection has ended before GO: the client may ask again, unless another worker has served it."""
        if client.state is SERVED and self.clients.find(client) is client:
            self.clients.move(client, NEW)

    def may_go_on(self, client):
        """Whether a batch may have its next job on the same connection: only if no other client waits."""
        return not self.draining and all(other.batch == client.batch for other in self.clients.line)

    def has_penalty(self):
        """Whether offers are delayed until a command has started."""
        return self.pace.penalty > 0

    def slots_changed(self):
        """A slot may be free, or the last job may be over."""
        self.serve_line()
        if self.draining and not self.supervisors:
            self.loop.stop()

    def signalled(self, number):
        if number == signal.SIGCHLD:
            self.supervisors.reap()
        elif self.draining:
            log.note("a second signal: ends the running jobs")
            self.supervisors.terminate()
        else:
            self.drain()

    def clear_up(self):
        """Begins to remove the directories that a crash has left; once more when those are old that were too young."""
        if self.settings.job_root:
            self.supervisors.removals.remove_left()
            self.loop.after(OLD_SECONDS + 1, self.supervisors.removals.remove_left)

    def drain(self):
        """Makes no more offers, and stops when the last job is over; until then it still answers QUERY."""
        log.note("draining: %d jobs run", self.supervisors.slots_in_use())
        self.draining = True
        self.supervisors.hear_more()
        for client in self.clients.under_way():
            self.withdraw(client, NEW, "draining")
        self.slots_changed()


# ---------------------------------------------------------------------------
# cservice, the applet
# ---------------------------------------------------------------------------

class Settings(collections.namedtuple(
        "Settings", "command slots boost refused user options join_keyring job_root for_run")):
    """What a cservice does.  options: those of HELLO; job_root: a JobRoot (-d); for_run: it serves one cexec -s."""

    def say(self, message, say=log.say):
        """Says why a client does not get its command.  The client of one cexec -s says it itself."""
        (log.note if self.for_run else say)(message)


# The messages between cservice -s and a worker that it has started, over ssh
OVER_SSH = "-"                      # the argument of -s that makes a cservice such a worker
SERVES = b"cexec: serves "          # the worker's output: a line with this and its id, when it serves
ALIVE_SECONDS = 10.0                # seconds between two PING
LIFELINE_SECONDS = 60.0             # a worker drains if it has read nothing for so long
SSH_WINDOW = 1024 * 1024            # bytes of credit for each connection and direction
SSH_STREAMS = 64                    # connections for each host at most
SSH_QUEUE = 2 * SSH_STREAMS * FRAME_MAX         # bytes that may wait for a host: each of these sends a frame at a time

CSERVICE = Syntax(
    "cservice", {"-": "APP [COMMAND [ARGUMENT ...]]"},
    """Run COMMAND for the holders of a public key of the application.

A client that can make COMMAND run code has all rights of this user, and can read the
private key: -u runs COMMAND as another user.

    cservice -s box1,box2 sort sort     # workers on other hosts, over ssh, until Ctrl-C
    cservice ogg oggenc -o- -           # a worker here, for one command
    cservice -a -d -u nobody run        # for whatever command its clients give it
""",
    Option("-a", "", "arguments",
           "take the client's arguments: where {} is, or at the end; without COMMAND they are the command"),
    Option("-d", "", "directories", "give each job a new empty directory, for files that come and go"),
    Option("-i", "", "repeatable", "allow a job to run again if its worker is lost"),
    Option("-s", "[N/]HOST,...+", "hosts",
           "start workers on these hosts, over ssh, until this process ends; @FILE lists hosts"),
    Option("-u", "USER", "user", "run the command as USER (needs root)"),
    Option("-x", "NAME+", "refused", "refuse the client NAME (may be repeated)"))


def main_cservice(argv):
    """Serves until a signal ends it.  Returns its exit code."""
    options = CSERVICE.read(argv)
    if not options.words or len(options.words) < 2 and not options.arguments:
        raise CSERVICE.error("no command is named" if options.words else "no private key is named")
    path, command = options.words[0], options.words[1:]
    if command and command[0].startswith("-"):
        raise CSERVICE.error("%s: options come before the private key" % command[0])
    slots = setting("CONCURRENCY", processors(), 1, SLOTS_MAX)
    boost, refused = setting("BOOST", -1, 0, 10 ** 9), frozenset(map(check_name, options.refused))
    if options.hosts and options.hosts[0] != OVER_SSH:
        return serve_on_hosts(options.hosts, path, argv)
    # In this order: 0, 1 and 2 are open, so that no file of ours gets such a number.  slim_down() may start this
    # again from compiled code: so nothing is open or raised yet, and handed_key() has read nothing of standard input.
    fill_standard()
    slim_down(argv)
    make_room(0, 512 + 2 * slots + 2 * SSH_STREAMS * bool(options.hosts))
                                    # two for each slot: a connection, a supervisor's pipe; the rest for a supervisor
    user = find_user(options.user) if options.user else None
    command, bits = what_is_run(command, options)
    settings = Settings(command, slots, None if boost < 0 else boost / 1e6, refused, user, bits,
                        keyring_joiner() if user else None,
                        job_root_for(user) if options.directories else None,
                        bool(options.hosts) and path == RUN_KEY)
    if user or not SPAWNS:
        import subprocess           # noqa: F401 - now, and not in each supervisor
    text = handed_key() if options.hosts else None
    key, group = parse_key(text, path) if text else open_key(path), Group()
    warn_of_command(settings)
    context = tls_context(key, text)
    listeners = [] if options.hosts and group.is_here() else open_listeners(group)      # ssh brings all that it hears
    loop = Loop()
    worker = Worker(loop, key, context, listeners, settings)
    loop.catch(WORKER_SIGNALS, worker.signalled)
    lifeline = WorkerLifeline(loop, worker) if options.hosts else None
    started_up()
    tell_service(key, group, settings)
    worker.clear_up()
    loop.run()
    return EXIT_TEMPORARY if lifeline and lifeline.orphaned else 0


def handed_key():
    """The text of the private key, which `cservice -s` sends after the program, as a line of hexadecimal digits."""
    line = open(0, "rb", 0, closefd=False).readline()
    wrong = Fatal(EXIT_USAGE, "-s %s is only for workers of cservice -s itself: name a host" % OVER_SSH)
    with raising(lambda error: wrong, ValueError):
        return bytes.fromhex(line.decode().strip() or "none").decode()


class Lifeline(Carrier):
    """An end of the connection over ssh between `cservice -s` (the starter) and its worker on a host.

    Once the worker serves it carries frames.  Each channel is a connection of the worker to a client, which the
    starter makes; the worker gives it its number.  The owner of a lifeline is told lifeline_lost(reason, violation).
    """

    window = SSH_WINDOW

    def __init__(self, loop, owner, reader, writer):
        self.owner = owner
        pipes = TwoPipes(os.dup(reader), os.dup(writer))
        for pipe in (pipes.reader, pipes.writer):
            os.set_blocking(pipe, False)
            enlarge(pipe)
        super().__init__(loop, Link(loop, pipes, Plain(), self))

    def pass_on(self, handle, data):
        """Sends a datagram of a client, or one to it.  As any datagram, it is lost if there is no room."""
        if not self.link.congested:
            self.link.send(PASS, address=handle[0], port=handle[1], datagram=data)

    def join(self, number, sock):
        """Carries a connection, as the channel with this number.  Raises OSError; then the socket is the caller's."""
        fd = sock.fileno()
        end = SocketEnd(fd, fd, lambda: os.close(fd), ["read", "write"])
        sock.detach()
        self.carry(number, end).source.refresh()

    def link_frame(self, link, kind, flags, channel, payload):
        if kind in (DATA, EOF, SHUT, CREDIT) and channel not in self.channels:
            return                  # it is over here, and the peer could not know that yet
        super().link_frame(link, kind, flags, channel, payload)

    def link_lost(self, link, reason, violation):
        self.close_channels()
        self.channels = {}
        self.owner.lifeline_lost(reason, violation)

    def local_error(self, channel, error):
        log.note("channel %d: %s", channel, error.strerror)

    def stream_ended(self):
        self.loop.after(0, self.forget_ended)       # not now: somebody may be going through the channels

    def forget_ended(self):
        self.channels = {number: channel for number, channel in self.channels.items()
                         if channel.is_reading() or channel.is_writing()}


class WorkerLifeline(Lifeline):
    """The worker's end.

    At the end of its input the worker drains.  It also drains after LIFELINE_SECONDS without a byte:
    a connection can break without an end, and a stopped starter sends nothing.
    """

    def __init__(self, loop, worker):
        self.worker = worker
        self.orphaned = False       # whether it drains because its starter is lost
        self.last_number = 0        # of a channel
        # The client that asked for our login, and we, as sshd sees both; nothing where no sshd has started us.
        words = [word.partition("%")[0] for word in os.environ.get("SSH_CONNECTION", "").split()]
        self.starter_address, self.ours = (words[0], (words[2], int(words[3]))) if len(words) == 4 else ("", None)
        os.set_blocking(2, False)   # the worker must be able to drain if the starter does not read
        super().__init__(loop, self, 0, 1)
        with suppress(OSError):     # the starter has gone: the link will see it
            os.write(1, b"\n%s%s\n" % (SERVES, worker.id.hex().encode()))       # \n: the login may have begun a line
        replace_with_null([0, 1])   # only frames go there from now on
        self.watch_silence()
        worker.take_lifeline(self)

    def watch_silence(self):
        if not self.link.closed and self.link.silence() > LIFELINE_SECONDS:
            self.link.fail("silent for %d s" % LIFELINE_SECONDS)
        self.loop.after(ALIVE_SECONDS, self.watch_silence)

    def here(self, address):
        """Returns (our address, the port) to which the starter has connected, for a client at that address."""
        return self.ours or (local_address(address) or THIS_HOST, 0)

    def connect(self, handle):
        """Returns a socket that leads to a client; None if there are too many, or the starter is lost."""
        if self.link.closed or len(self.channels) >= SSH_STREAMS:
            return None
        # A number is not used again soon: frames for the channel that had it last may be on their way.
        self.last_number = next(number for number in itertools.count(self.last_number + 1)
                                if number & 0xffff not in self.channels) & 0xffff
        try:
            near, far = socket.socketpair()
            for sock in near, far:  # with room for a whole frame: what does not fit waits for a turn of the other side
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * FRAME_MAX)
            self.join(self.last_number, far)
        except OSError as error:    # no descriptor is left
            return log.note("no connection through ssh: %s", error.strerror)
        self.link.send(CONNECT, self.last_number, address=handle[0], port=handle[1])
        return near

    def rcvd_pass(self, flags, channel, payload):
        """A client's datagram, which the starter has heard."""
        # Some addresses have a meaning only on the starter's host: the one from which it came to us may do instead.
        away = "%" in payload.address or payload.address.startswith(("127.", "::1"))
        address = away and self.starter_address or payload.address.partition("%")[0]
        self.worker.hear(Datagram(payload.datagram), address, 0, (payload.address, payload.port))

    def rcvd_ping(self, flags, channel, payload):
        pass                        # any byte is a sign of life

    def rcvd_drain(self, flags, channel, payload):
        self.drain()

    def rcvd_end_jobs(self, flags, channel, payload):
        self.drain()
        self.drain(True)

    def drain(self, again=False):
        if again or not self.worker.draining:
            self.worker.signalled(signal.SIGTERM)

    def lifeline_lost(self, reason, violation):
        log.note("the starter is lost: %s", reason)
        self.orphaned = not self.worker.draining
        self.drain()
        if self.worker.settings.for_run:
            self.drain(True)


def tell_service(key, group, settings):
    """Says what this cservice serves; on a terminal always, else with -v."""
    but = " except %s (-x)" % ", ".join(sorted(settings.refused)) if settings.refused else ""
    text = "serves %s with %d slots on %s: %s, for the holders of a public key%s" % (
        key.label, settings.slots, group.text, " ".join(settings.command), but)
    log.tell_user(text)


def what_is_run(command, options):
    """Returns (the command; with -a its {} stands for the client's arguments, the options of HELLO)."""
    bits = (HELLO_REPEATABLE * options.repeatable | HELLO_ARGUMENTS * options.arguments
            | HELLO_DIRECTORIES * options.directories)
    if options.directories and command and "/" in command[0]:
        command = [os.path.abspath(command[0])] + command[1:]       # it will run in another directory
    if options.arguments:
        command = command if "{}" in command else command + ["{}"]
        bits |= HELLO_NO_COMMAND * (command[0] == "{}")
    return command, bits


def job_root_for(user):
    """Returns the JobRoot, TMPDIR or /tmp, for the commands' user.  Raises Fatal."""
    with or_fatal("-d: no directory for the jobs' directories"):
        return JobRoot(os.path.realpath(tempfile.gettempdir()), user)


def warn_of_command(settings):
    """Warns if the command is not there, as it may be installed later, and if clients can make root run anything."""
    name = settings.command[0]
    if settings.options & HELLO_ARGUMENTS and not os.geteuid() and not settings.user and not settings.for_run:
        log.say("warning: -a as root: a client can make the command do anything as root that its arguments "
                "allow (-u USER runs it as another user)")
    if settings.options & HELLO_NO_COMMAND:
        return
    files = list(filter(os.path.isfile, command_paths(name)))
    if not files:
        where = "" if name.startswith("/") else " in " + os.getcwd() if "/" in name else " in PATH"
        log.say("warning: %s: no such command%s: until there is one, jobs are refused%s"
                % (name, where, " (give its arguments as words of their own)" if " " in name else ""))
    elif not any(os.access(file, os.X_OK) for file in files):
        log.say("warning: %s: not executable: until it is (chmod +x), jobs are refused" % files[0])


def slim_down(words):
    """Starts this applet again through The door, in the same process, if Python was given a file.

    Python keeps the syntax tree of a script in memory as long as it runs: 10 MB, which a service
    does not need.  Returns if there is no file (python3 -), or no docstring (python3 -OO).
    """
    if __file__.startswith("/dev/fd/"):                         # cservice -s has started it
        os.close(int(__file__[8:]))
    elif __name__ == "__main__" and __doc__ and sys.executable and os.path.isfile(__file__):
        options = subprocess._args_from_interpreter_flags()     # multiprocessing uses this too
        options += ["-S", "-c", __doc__.split("'")[1]]          # the same as sh does in the first lines of this file
        named = os.path.basename(__file__) == log.applet        # it was started as `python3 LINK`
        os.execv(sys.executable, [sys.executable, *options, __file__, *[log.applet][named:], *words])


def find_user(name):
    """The passwd(5) entry of a user; None if we are this user.  Raises Fatal (100) if it is missing or forbidden."""
    with raising(lambda error: Fatal(EXIT_USAGE, "-u %s: no such user" % name), KeyError):
        user = pwd.getpwnam(name)
    if os.getuid() not in (0, user.pw_uid):
        raise Fatal(EXIT_USAGE, "-u %s: only root can run commands as another user (with -s: root@HOST)" % name)
    if os.getuid():
        return None                 # we are that user already
    return user


# ---------------------------------------------------------------------------
# crat, the logger
# ---------------------------------------------------------------------------

class Logger:
    """Calls tell(record, form) for every outcome and complaint that it hears; form(record) is a line."""

    EVENTS = {HOW_EXITED: "exited", HOW_SIGNALLED: "signalled"}

    def __init__(self, loop, listeners, pubs, keys, tell):
        self.pubs, self.keys, self.tell = pubs, keys, tell
        self.known = Memory()       # identities, because copies of a datagram come by other ways
        hear_all(loop, listeners, self.hear, self.hear_stranger)

    def hear(self, datagram, address, index):
        if datagram.kind in (ALERT, COMPLAINT) and datagram.identity not in self.known:
            self.known[datagram.identity] = True
            for record in list(self.records(datagram, address)):
                self.tell(record, record_line)

    def hear_stranger(self, address, error):
        """A peer has sent a datagram of another protocol version: told once for each address."""
        if (address, error.version) not in self.known:
            self.known[address, error.version] = True
            self.tell({"time": time.time(), "client": address, "event": "version", "version": error.version,
                       "ours": PROTOCOL}, version_line)

    def prover(self, datagram):
        """The label of the pub or key that proves a datagram; None if none does."""
        for pub in self.pubs:
            if (pub.application, pub.name) == (datagram.application, datagram.name) and datagram.proved_by(pub.secret):
                return pub.label
        for key in self.keys:
            if key.application == datagram.application:
                if datagram.proved_by(client_secret(key.master, datagram.name)):
                    return key.label
        return None

    def records(self, datagram, address):
        """Yields dictionaries, for -j and for record_line.  Raises ProtocolError."""
        label, now = self.prover(datagram), time.time()
        if datagram.kind is COMPLAINT:
            told = [(datagram.body, "complaint", 0, 0)]
        else:
            ends = map(OUTCOME.unpack, datagram.body.outcomes)
            told = [(end, self.EVENTS.get(end.how), end.status, end.ago / 1000) for end in ends]
        for body, event, status, ago in told:
            if event is None:
                raise ProtocolError("ALERT of an impossible end: %d" % body.how)
            yield {"time": now - ago, "client": address, "worker": body.worker, "host": body.host, "event": event,
                   "status": status, "application": label or datagram.application.hex(),
                   "verified": label is not None, "name": datagram.name, "seconds": body.milliseconds / 1000,
                   "bytes_in": body.bytes_in, "bytes_out": body.bytes_out, "reason": body.reason}


def print_line(record, form):
    show(printable(form(record)))


def print_json(record, form):
    show(json_line(record))


def record_line(record):
    """crat's line for an outcome or a complaint."""
    form = {"exited": "{client} completed by {worker} for {application} exit code {status}",
            "signalled": "{client} completed by {worker} for {application} signal {status}",
            "complaint": "{client} rats out {worker} for {application}"}[record["event"]]
    detail = "{seconds:.3f} s, {bytes_in} bytes in, {bytes_out} out, client {name}"
    detail += ", worker {host}" if record["host"] else ""
    reason = ", {reason}" if record["reason"] else ""
    unverified = "" if record["verified"] else UNVERIFIED
    return (form + unverified + ": " + detail + reason).format(**record)


def version_line(record):
    """crat's line for a peer with another protocol version."""
    return "{client} speaks protocol version {version}, this is {ours} (cexec {program})".format(
        program=VERSION, **record)


REDRAW_SECONDS = 0.25               # between two drawings of the screen
WORKERS_MAX = 4096                  # workers that the screen counts
LINES_KEPT = 500                    # lines of the log, for a window that grows
NAME_COLUMNS, HOST_COLUMNS = 40, 24     # the most that a worker's address and name take
ASK_SECONDS, ABSENT_SECONDS = 3.0, 10.0   # between two QUERYs; a worker is gone so long after its last answer
PRESENT, ABSENT = ("HOST", "NOW", "LOAD"), "gone"     # the columns from the workers' answers; NOW without an answer
UNVERIFIED = " (unverified)"        # after the name of a worker whose records no key proves
LEFT_OUT = ("TIME", "OUT", "IN", "MEAN", "LAST", "COMPLAINTS")      # columns that a narrow screen lacks, in this order
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l\x1b[?7l", "\x1b[?7h\x1b[?25h\x1b[?1049l"   # to xterm's other screen, without
                                    # cursor and wrapped lines; and back
BOLD, REVERSED, DIM, RED, YELLOW = "1", "7", "2", "31", "33"
STYLES = {"complaint": RED, "signalled": YELLOW}


class Tally:
    """The sums of the records about one worker, or about all."""

    HEADS = ["WORKER", "HOST", "NOW", "LOAD", "DONE", "FAILED", "COMPLAINTS", "IN", "OUT", "TIME", "MEAN", "LAST"]

    def __init__(self):
        self.done = self.failed = self.complaints = self.bytes_in = self.bytes_out = 0
        self.seconds, self.heard_at = 0.0, time.monotonic()

    def add(self, record):
        good = record["event"] == "exited" and record["status"] == 0
        self.heard_at = time.monotonic()
        if record["event"] == "complaint":
            self.complaints += 1
            return
        self.done, self.failed = self.done + good, self.failed + (not good)
        self.seconds += record["seconds"]
        self.bytes_in += record["bytes_in"]
        self.bytes_out += record["bytes_out"]

    def activity(self):
        return self.done + self.failed + self.complaints

    def row(self, name, host="", now="", load=""):
        """The texts below HEADS."""
        mean = self.seconds / max(1, self.done + self.failed)
        last = duration(int(time.monotonic() - self.heard_at)) + " ago" if self.activity() else "never"
        return [name, host, now, load, str(self.done), str(self.failed), str(self.complaints), amount(self.bytes_in),
                amount(self.bytes_out), duration(int(self.seconds)), "%.3f s" % mean, last]

    def text(self):
        return "%d done, %d failed, %d complained about" % (self.done, self.failed, self.complaints)


class Tallies:
    """A Tally for each worker.  Unverified records are counted apart: they cannot push verified ones out of memory."""

    def __init__(self):
        self.began = time.monotonic()
        self.all = {True: Tally(), False: Tally()}      # by whether it is verified
        self.workers = {True: Memory(WORKERS_MAX), False: Memory(WORKERS_MAX)}

    def add(self, record):
        verified, name = record["verified"], printable(record["worker"])[:64]
        tally = self.workers[verified].get(name) or Tally()
        self.workers[verified][name] = tally
        for each in (tally, self.all[verified]):
            each.add(record)

    def total(self):
        """A line with the sums of all workers."""
        proved, rest = self.all[True], self.all[False]
        text = "finished: %s, %s in, %s out" % (proved.text(), amount(proved.bytes_in), amount(proved.bytes_out))
        return text + "; unverified: " + rest.text() if rest.activity() else text

    def table(self, room, width, present):
        """A table of room lines at most: first the workers that did most, then the unverified ones.

        present: {address: (host, now, load)} with the texts for workers that have answered, see
        presence(); None if we have no key to ask them.
        """
        there = present or {}
        proved = {name: Tally() for name, (_, now, _) in there.items() if now != ABSENT}
        proved.update(self.workers[True])
        known = [(tally, name, "", there.get(name, ("", "", ""))) for name, tally in by_activity(proved)]
        known += [(tally, name, UNVERIFIED, ("", "", "")) for name, tally in by_activity(self.workers[False])]
        if not known or room < 2:
            return []
        shown = known if len(known) < room else known[:room - 2]
        lines = narrowed(Tally.HEADS, [tally.row(fitted(name, NAME_COLUMNS) + mark, *texts)
                                       for tally, name, mark, texts in shown],
                         width, PRESENT if present is None else [])
        return lines + ["%d more" % (len(known) - len(shown))] * (len(shown) < len(known))


def by_activity(workers):
    return sorted(workers.items(), key=lambda item: (-item[1].activity(), item[0]))


def narrowed(heads, rows, width, hidden):
    """A table without the hidden columns; if it is too wide, also without more and more columns of LEFT_OUT."""
    for number in range(len(LEFT_OUT) + 1):
        kept = [index for index, head in enumerate(heads) if head not in hidden and head not in LEFT_OUT[:number]]
        lines = table([heads[index] for index in kept], [[row[index] for index in kept] for row in rows])
        if max(map(columns, lines)) <= width:
            break
    return lines


class Watch(Survey):
    """Asks every few seconds which workers there are."""

    def __init__(self, group, pub, job_ports, loop):
        super().__init__(group, pub, job_ports, loop)
        self.workers = Memory(WORKERS_MAX)      # worker_id: the last answer
        self.began = time.monotonic()
        self.ask_again()

    def listen(self):
        pass                        # the Logger listens

    def ask_again(self):
        self.ask()
        self.loop.after(max(ASK_SECONDS, self.ways * SECONDS_A_WAY), self.ask_again)

    def add_worker(self, worker_id, row):
        self.workers[worker_id] = dict(row, heard=time.monotonic())


def open_watches(loop, group, pubs, keys):
    """A Watch for each application of the pubs and keys; a private key gets a pub made for it.  Raises Fatal."""
    known = {pub.application: pub for pub in reversed(pubs)}
    for key in keys:
        known.setdefault(key.application, Pub(key.label, DEFAULT_NAME, key.application,
                                              client_secret(key.master, DEFAULT_NAME), b""))
    return [Watch(group, pub, listen_ports(), loop) for pub in known.values()]


def presence(watches):
    """{address: (host, now, load)} of the workers that have answered; several at one address are summed up."""
    found, now = {}, time.monotonic()
    for row in sorted((row for watch in watches for row in watch.workers.values()), key=lambda row: row["heard"]):
        found.setdefault(printable(row["address"])[:64], []).append(row)
    for address, rows in found.items():
        there = [row for row in rows if now - row["heard"] < ABSENT_SECONDS]
        jobs = "%d/%d" % (sum(row["running"] for row in there), sum(row["slots"] for row in there))
        jobs += " draining" * all(row["state"] == "draining" for row in there)
        found[address] = (fitted(rows[-1]["host"], HOST_COLUMNS), jobs if there else ABSENT,
                          "%.2f" % max(row["load"] for row in there) if there else "")
    return found


def presence_text(watches):
    """A line that sums up the workers which answer now."""
    if not watches:
        return "now: not known without a key"
    now = time.monotonic()
    rows = [row for watch in watches for row in watch.workers.values() if now - row["heard"] < ABSENT_SECONDS]
    if not rows and any(now - watch.began < watch.PATIENCE and not watch.workers for watch in watches):
        return "now: asking which workers there are"
    if not rows:
        return "now: no worker answers (cexec -l %s tells why)" % watches[0].pub.label
    return "now: %d there, %d of %d slots in use, %d in line" % (
        len(rows), sum(row["running"] for row in rows), sum(row["slots"] for row in rows),
        max(row["waiting"] for row in rows))


class Screen:
    """crat -t: shows the log on the whole screen; at the end it prints a summary on the normal screen.

    The terminal is opened again, so that it does not block: if it takes nothing for a while, it
    misses drawings, but we still hear alerts and signals.
    """

    def __init__(self, loop, title, watches):
        self.loop, self.title, self.watches, self.tallies = loop, title, watches, Tallies()
        self.lines = collections.deque(maxlen=LINES_KEPT)       # (text, style)
        self.end = open_terminal(1, 0)
        self.writer, self.drawn_at = Writer(loop, self.end), 0.0
        self.draws = False          # whether it has the terminal
        self.changed, self.coloured = True, not os.environ.get("NO_COLOR")
        loop.catch([signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGCONT,
                    signal.SIGWINCH], self.signalled)
        at_end.append(self.close)
        self.take()
        self.tick()

    def tell(self, record, form):
        """Adds a line to the log."""
        if record["event"] != "version":
            self.tallies.add(record)
        style = STYLES.get(record["event"], YELLOW if record.get("status") else "")
        text = printable(form(record))[:1000]
        when = time.strftime("%H:%M:%S ", time.localtime(record["time"]))
        self.lines.append((when + text, style if record.get("verified") else DIM))
        self.changed = True

    # The terminal

    def take(self):
        """Begins to draw.  In the background it stops this process instead, until CONT."""
        with or_fatal("-t: the terminal"):
            self.draws = self.end.take(raw=False)   # no echo, and a key comes without Enter
        if not self.draws:
            return
        self.loop.on_read(self.end.polled, self.typed)
        self.writer.add(ENTER.encode())
        self.changed = True

    def give_back(self, text=""):
        """Restores the normal screen, with this text; gives up if the terminal takes nothing for a second."""
        if self.draws:
            self.draws = False
            self.writer.add(encoded(LEAVE + text))
            deadline = time.monotonic() + 1.0
            while self.writer.pending and time.monotonic() < deadline:
                select.select([], [self.end.polled], [], 0.1)
                self.writer.writable()
            self.loop.forget(self.end.polled)
            self.end.restore()

    def close(self):
        """Runs at every end of this process: prints the summary on the normal screen."""
        lines = ["crat: %s, %s" % (self.title, duration(int(time.monotonic() - self.tallies.began))),
                 self.tallies.total()] + self.workers(self.size()[0] - 4)
        self.give_back("".join(self.styled(line, "") + "\r\n" for line in lines))

    def typed(self):
        keys = what_came(os.read, self.end.fd, 256)
        if keys is None:
            return
        if not keys or b"q" in keys:            # the terminal was hung up, or the user ends it
            self.loop.stop()
        self.changed = True

    def signalled(self, number):
        if number == signal.SIGTSTP:
            self.give_back()
            os.kill(os.getpid(), signal.SIGSTOP)
        elif number == signal.SIGCONT:
            self.take()
        elif number == signal.SIGWINCH:
            self.changed = True
        else:
            die_of(number)

    # What is drawn

    def size(self):
        """Returns (lines, columns) of the terminal."""
        known = self.end.size()
        return known["lines"] or 24, known["columns"] or 80

    def tick(self):
        """Draws if there is news or a second has passed, but not before the terminal has taken the last drawing."""
        self.loop.after(REDRAW_SECONDS, self.tick)
        now = time.monotonic()
        if self.draws and not self.writer.pending and (self.changed or now - self.drawn_at >= 1.0):
            self.changed, self.drawn_at = False, now
            room = self.size()[0]
            lines = ["\x1b[K" + self.styled(*line) for line in self.picture(room)]
            self.writer.add(encoded("\x1b[H" + "\r\n".join(lines + ["\x1b[J"] * (len(lines) < room))))

    def picture(self, room):
        """Returns (text, style) of each line on the screen, room lines at most."""
        lasted = duration(int(time.monotonic() - self.tallies.began))
        lines = [("crat: %s, %s; q ends it" % (self.title, lasted), REVERSED), (self.tallies.total(), BOLD),
                 (presence_text(self.watches), BOLD)]
        if room < 8:
            lines.pop()             # what was finished is more important
        for_log = min(len(self.lines), max(3, room // 3)) + 1
        workers = self.workers(room - len(lines) - 1 - for_log)
        if workers:
            lines += [("", ""), (workers[0], BOLD)] + [(text, "") for text in workers[1:]]
        below = room - len(lines) - 1
        if self.lines and below > 0:
            lines += [("", "")] + list(self.lines)[-below:]
        return lines[:room]

    def workers(self, room):
        return self.tallies.table(room, self.size()[1], presence(self.watches) if self.watches else None)

    def styled(self, text, style):
        """A line, cut to the screen's width, with its style."""
        text = fitted(encoded(text).decode(sys.stdout.encoding or "ascii"), self.size()[1])
        return "\x1b[%sm%s\x1b[m" % (style, text) if style and self.coloured else text


# ---------------------------------------------------------------------------
# crat --svg: a log as a picture
# ---------------------------------------------------------------------------
#
#   lines of logs -- parse_entry --> Entry -- pack --> Band, Bar -- picture --> the SVG's text
#
# Only read_entries and draw_logs touch files.  A log's lines may come from anybody: so every
# text from them is limited in size, and goes through markup().

OUTCOMES = {                        # each outcome of a job, and its text in the legend; STYLE has its colour
    "done": "exit status 0", "failed": "another exit status", "killed": "killed by a signal", "lost": "worker lost"}
LOG_LINE_MAX = 1024 * 1024          # bytes: no log has longer lines
NAME_SHOWN = 200                    # characters of a name
TIME_MAX = 250e9                    # seconds since 1970: the year 9892
CLOCK_SLACK = 0.05                  # two jobs in one slot may seem to overlap so many seconds: alerts need time
CUTS_MAX = 8                        # idle times that are left out, at most
BARS_MAX, MARKS_APART = 4000, 8.0   # bars in the whole picture; pixels between two marks
WORKERS_DRAWN, ROWS_DRAWN = 100, 300
PICTURE_WIDTH, ROWS_HEIGHT, RATES_HEIGHT = 1200, 1200, 60       # pixels
TICK_PIXELS = 96                    # between two labels of an axis, at least
COLUMNS_MAX = 120                   # columns of the throughput
LABEL_COLUMNS, ROWS_LEFT = 28, 200  # the room for a worker's name: columns of text, pixels
TICKS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600,
         7200, 10800, 21600, 43200] + [86400 * days for days in (1, 2, 7, 14, 28, 91, 365, 3650, 36500, 365000)]
# The colours of Okabe and Ito, which colour-blind people can tell apart; and black, or white on a dark background
STYLE = """
svg { color-scheme: light dark }
text { font: 11px system-ui, sans-serif; fill: #222 } .mono { font-family: ui-monospace, monospace }
.title { font-size: 15px; font-weight: bold } .paper { fill: #fff } .line { stroke: #ddd }
.done { fill: #0072b2 } .failed { fill: #d55e00 } .killed { fill: #cc79a7 } .lost, .mark { fill: #222 }
@media (prefers-color-scheme: dark) {
text, .lost, .mark { fill: #ddd } .paper { fill: #16181c } .line { stroke: #3a3d42 }
}
"""

Entry = collections.namedtuple("Entry", "worker began ended outcome name result sent received")
Entry.__doc__ = """A job or a complaint in a log.  Times are seconds since 1970.  outcome is one of OUTCOMES, or
"complaint" for a complaint that is not about a lost job."""


# A log's lines

def parse_entry(line):
    """The Entry in a line of a joblog or of crat -j; None if the line is not about a job.  Raises ValueError."""
    if line.startswith("{"):
        try:
            return entry_of_record(json.loads(line))
        except KeyError as error:
            raise ValueError("there is no %s" % error) from None
        except RecursionError:
            raise ValueError("too deep") from None
    fields = line.split("\t", len(JOBLOG) - 1)
    if len(fields) != len(JOBLOG):
        raise ValueError("neither a joblog's %d fields with tabs between them nor an object of crat -j" % len(JOBLOG))
    return None if fields[0] == JOBLOG[0] else entry_of_joblog(*fields)


def entry_of_joblog(number, host, began, seconds, sent, received, status, signal_number, command):
    """The Entry in a joblog's fields, ours or GNU parallel's.  Raises ValueError."""
    began, seconds = quantity(began, JOBLOG[2], TIME_MAX), quantity(seconds, JOBLOG[3], TIME_MAX)
    if signal_number not in ("", "0"):
        outcome, result = "killed", "killed by signal " + signal_number
    elif status == str(LOST):
        outcome, result = "lost", "worker lost"
    else:
        outcome, result = "done" if status == "0" else "failed", "exit status " + status
    worker = {":": "this host", "-": "no worker"}.get(host, host)
    name = "%s: %s" % (number.strip(), command[:NAME_SHOWN])
    return Entry(worker[:NAME_SHOWN], began, began + seconds, outcome, name, result,
                 quantity(sent, JOBLOG[4]), quantity(received, JOBLOG[5]))


def entry_of_record(record):
    """The Entry in a record of crat -j; None for another version of the protocol.  Raises ValueError, KeyError."""
    event, reason = record["event"], record.get("reason", "")
    if event == "version":
        return None
    if event not in ("exited", "signalled", "complaint"):
        raise ValueError("the event is none of crat's: %s" % event)
    ended, seconds = quantity(record["time"], "time", TIME_MAX), quantity(record["seconds"], "seconds", TIME_MAX)
    if event == "complaint":
        outcome, result = "lost" if str(reason).startswith("lost") else "complaint", ""
    elif event == "signalled":
        outcome, result = "killed", "killed by signal %s" % record["status"]
    else:
        outcome, result = "failed" if record["status"] else "done", "exit status %s" % record["status"]
    began = ended if outcome == "complaint" else max(0.0, ended - seconds)      # a complaint counts the search's time
    worker = "%s[%s]" % (record["host"], record["worker"]) if record.get("host") else str(record["worker"])
    return Entry(worker[:NAME_SHOWN] + ("" if record["verified"] else UNVERIFIED),
                 began, ended, outcome, "%s for %s at %s" % (record["application"], record["name"], record["client"]),
                 "%s%s%s" % (result, ", " if result and reason else "", reason),
                 quantity(record["bytes_in"], "bytes_in"), quantity(record["bytes_out"], "bytes_out"))


def quantity(value, name, high=2.0 ** 64):
    """A number in a log, from 0 to high.  Raises ValueError."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if not 0 <= number <= high:
        raise ValueError("%s is no number from 0 to %.0f: %s" % (name, high, cut(str(value), 40)))
    return number


def read_entries(path):
    """Returns (a log's Entries, a message about wrong lines or "", whether the log has alerts).  Raises Fatal."""
    entries, bad, alerts = [], [], False
    label = "standard input" if path == "-" else path
    with or_fatal(label):
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            for number, line in enumerate(iter(lambda: file.readline(LOG_LINE_MAX), b""), 1):
                if len(line) == LOG_LINE_MAX:
                    raise Fatal(EXIT_USAGE, "%s:%d: a line without an end: is it a log?" % (label, number))
                try:
                    entry = parse_entry(line.decode("utf-8", "backslashreplace").rstrip("\r\n"))
                    entries += [entry] if entry else []
                    alerts = alerts or line.startswith(b"{")
                except ValueError as error:
                    bad = bad or [number, 0, error]
                    bad[1] += 1
    if bad and not entries:
        raise Fatal(EXIT_USAGE, "%s:%d: %s: is it a log?" % (label, bad[0], bad[2]))
    return entries, bad and "%s: %d lines left out, the first is line %d: %s" % (label, bad[1], bad[0], bad[2]), alerts


# The layout

class TimeAxis:
    """The horizontal axis: turns a time into pixels.

    The longest idle times are cut out: else a night between two jobs would leave no room for the jobs.
    """

    Span = collections.namedtuple("Span", "began ended left right")

    def __init__(self, entries, left, right):
        # Unverified alerts do not count here: anybody could invent a job that lasted for a month.
        entries = [entry for entry in entries if not entry.worker.endswith(UNVERIFIED)] or entries
        self.began, self.ended = entries[0].began, max(entry.ended for entry in entries)
        self.cuts = self.choose_cuts(self.idle_times(entries), self.ended - self.began)
        starts = [self.began] + [cut_end for _, cut_end in self.cuts]
        ends = [cut_began for cut_began, _ in self.cuts] + [self.ended]
        lengths = [max(0.1, end - start) for start, end in zip(starts, ends)]
        room = right - left - 20 * (len(starts) - 1) - 20 * len(starts)     # 20 between two spans, and 20 for each
        self.left, self.right, self.spans = left, right, []
        for start, length in zip(starts, lengths):
            width = 20 + room * length / sum(lengths)
            self.spans.append(self.Span(start, start + length, left, left + width))
            left += width + 20

    @staticmethod
    def idle_times(entries):
        """[(from, to)]: the times in which nothing was logged, the longest first."""
        idle, end = [], entries[0].ended
        for entry in entries:
            if entry.began > end:
                idle.append((end, entry.began))
            end = max(end, entry.ended)
        return sorted(idle, key=lambda times: times[0] - times[1])

    @staticmethod
    def choose_cuts(idle, length):
        """The idle times that take over a third of the axis after the longer ones are cut out, in order of time."""
        cuts = []
        for began, ended in idle[:CUTS_MAX]:
            if ended - began <= length / 3:
                break
            length -= ended - began
            cuts.append((began, ended))
        return sorted(cuts)

    def span(self, when):
        return next((span for span in reversed(self.spans) if span.began <= when), self.spans[0])

    def x(self, when):
        span = self.span(when)
        share = (min(max(when, span.began), span.ended) - span.began) / (span.ended - span.began)
        return span.left + share * (span.right - span.left)

    def ticks(self, clock):
        """[(x, text)]: times of day, or the time since the beginning of each span; the texts do not touch."""
        ticks, free = [], self.left
        one_day = time.localtime(self.began)[:3] == time.localtime(self.ended)[:3]
        for span in self.spans:
            least = TICK_PIXELS * (span.ended - span.began) / (span.right - span.left)
            step = next((step for step in TICKS if step >= least), TICKS[-1])
            offset = time.localtime(span.began).tm_gmtoff if clock else -span.began
            number = -(-(span.began + offset) // step)
            while number * step - offset <= span.ended:
                when, number = number * step - offset, number + 1
                x = self.x(when)
                if x >= free:
                    ticks.append((x, clock_time(when, step, one_day) if clock else elapsed(when - span.began)))
                    free = x + TICK_PIXELS
        return ticks


def clock_time(when, step, one_day):
    """A time of day, as short as ticks with this step in seconds allow."""
    when = round(when, 3)
    if step >= 86400:
        return time.strftime("%Y-%m-%d", time.localtime(when))
    text = time.strftime(("" if one_day else "%m-%d ") + ("%H:%M" if step >= 60 else "%H:%M:%S"), time.localtime(when))
    return text + ("%.3f" % (when % 1))[1:].rstrip("0").rstrip(".") if step < 1 else text


def elapsed(seconds):
    """Seconds as an exact text: 0.25s, 1m30s, 2h, 1d12h."""
    text, seconds = "", round(seconds, 3)
    for unit, letter in ((86400, "d"), (3600, "h"), (60, "m")):
        count, seconds = divmod(seconds, unit)
        text += "%d%s" % (count, letter) if count else ""
    return text + "%gs" % round(seconds, 3) if round(seconds, 3) or not text else text


def pack(entries):
    """Returns rows of entries, these in the order of their beginnings: each is in the first row that was free."""
    rows, free, busy = [], [], []           # two heaps: rows; (when it is free, row)
    for entry in entries:
        while busy and busy[0][0] <= entry.began:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if not free:
            free.append(len(rows))
            rows.append([])
        row = heapq.heappop(free)
        rows[row].append(entry)
        heapq.heappush(busy, (entry.ended - min(CLOCK_SLACK, (entry.ended - entry.began) / 2), row))
    return rows


class Band:
    """A worker in the picture: a row for each slot that it used, and above them a strip for its marks."""

    def __init__(self, worker, entries):
        self.worker, self.unverified, self.count = worker, worker.endswith(UNVERIFIED), len(entries)
        self.jobs = [entry for entry in entries if entry.outcome != "complaint"]
        self.marks = [entry for entry in entries if entry.outcome in ("complaint", "lost")]
        self.rows = pack(self.jobs)
        self.slots, self.hidden = len(self.rows), 0

    def limit(self, rows):
        """Keeps this number of rows, and leaves out the jobs in the others."""
        self.hidden = sum(map(len, self.rows[rows:]))
        self.rows = self.rows[:rows]

    def put(self, top, row_height):
        """Puts it below top; returns where the next Band begins."""
        self.top, self.row_height = top, row_height
        self.first = top + 3 + 9 * bool(self.marks)
        return max(self.first + row_height * len(self.rows), top + 16) + 3


def make_bands(entries):
    """Returns (the Bands that are drawn, notes on the others): those with the most entries, sorted by name."""
    by_worker = collections.defaultdict(list)
    for entry in entries:
        by_worker[entry.worker].append(entry)
    bands = sorted((Band(*item) for item in by_worker.items()), key=lambda band: (band.unverified, -band.count))
    shown, others = bands[:WORKERS_DRAWN], bands[WORKERS_DRAWN:]
    limit = max(band.slots for band in shown)
    while sum(min(band.slots, limit) for band in shown) > ROWS_DRAWN:
        limit = limit * 3 // 4
    for band in shown:
        band.limit(limit)
    hidden, notes = sum(band.hidden for band in shown), []
    if others:
        notes.append("Not drawn: %d more workers, with %d jobs and complaints." % (
            len(others), sum(band.count for band in others)))
    if hidden:
        notes.append("Not drawn: %d jobs of workers with more than %d at the same time." % (hidden, limit))
    return sorted(shown, key=lambda band: (band.unverified, natural(band.worker))), notes


def natural(name):
    """A key that sorts node9 before node10."""
    return [(int(part), "") if number % 2 else (0, part) for number, part in enumerate(re.split("([0-9]{1,9})", name))]


class Bar:
    """A job in a row, or several jobs that are too narrow to be drawn one by one."""

    def __init__(self, entry, axis):
        self.entry, self.ended, self.counts = entry, entry.ended, collections.Counter([entry.outcome])
        self.sent, self.received = entry.sent, entry.received
        self.left, self.right = axis.x(entry.began), axis.x(entry.ended)

    def join(self, other):
        """Includes the jobs of the next Bar."""
        self.counts.update(other.counts)
        self.sent, self.received = self.sent + other.sent, self.received + other.received
        self.ended, self.right = max(self.ended, other.ended), max(self.right, other.right)

    def lines(self):
        """The lines of its tooltip."""
        entry, count = self.entry, sum(self.counts.values())
        if count == 1:
            yield from (entry.name[:3 * NAME_SHOWN], entry.result[:3 * NAME_SHOWN])
        else:
            yield "%d: %s" % (count, outcome_text(self.counts))
        yield "%s, %s, %s" % (entry.worker, clock_time(entry.began, 0.001, False),
                              elapsed(self.ended - entry.began))
        yield "%s sent, %s received" % (amount(self.sent), amount(self.received))


def outcome_text(counts):
    """The number of each outcome: 12 done, 3 failed."""
    words = dict({outcome: outcome for outcome in OUTCOMES}, complaint="complained about")
    return ", ".join("%d %s" % (counts[outcome], word) for outcome, word in words.items() if counts[outcome])


def merged(bars, cell):
    """The bars of a row; bars that are narrower than a cell, in pixels, and begin in the same cell become one."""
    result = []
    for bar in bars:
        last = result[-1] if result else None
        if (last and last.left // cell == bar.left // cell
                and max(last.right - last.left, bar.right - bar.left) < cell):
            last.join(bar)
        else:
            result.append(bar)
    return result


def make_bars(bands, axis):
    """{band: a list of Bars for each row}: so few that a browser is quick."""
    bars, cell = {band: [[Bar(entry, axis) for entry in row] for row in band.rows] for band in bands}, 2.0
    while True:
        bars = {band: [merged(row, cell) for row in rows] for band, rows in bars.items()}
        if sum(len(row) for rows in bars.values() for row in rows) <= BARS_MAX or cell > PICTURE_WIDTH:
            return bars
        cell *= 2


# The SVG's text

def markup(text):
    """The text for an XML document, with control characters escaped."""
    return printable(html.escape(text, quote=False).replace('"', "&quot;"))


def element(name, style, inner="", **attributes):
    """An SVG element with a CSS class; inner is markup, numbers are pixels."""
    words = ['%s class="%s"' % (name, style)] + [
        '%s="%s"' % (key.replace("_", "-"), value if isinstance(value, str) else "%g" % round(value, 1))
        for key, value in attributes.items()]
    return "<%s>%s</%s>\n" % (" ".join(words), inner, name) if inner else "<%s/>\n" % " ".join(words)


def tooltip(lines):
    return "<title>%s</title>" % "\n".join(markup(line) for line in lines if line)


def text_at(x, y, text, style="text", anchor="start"):
    return element("text", style, markup(text), x=x, y=y, text_anchor=anchor)


def draw_bar(bar, top, height):
    """A rectangle in the colour of its most common outcome, with the other outcomes in its lower half."""
    parts, ranked = "", [outcome for outcome, _ in bar.counts.most_common()]
    for index, outcome in enumerate(ranked):
        share = height / 2 / (len(ranked) - 1) if index else height
        parts += element("rect", outcome, x=bar.left, y=top + height - share * max(1, index), height=share,
                         width=max(1.0, bar.right - bar.left - 1))
    return "<g>%s%s</g>\n" % (tooltip(bar.lines()), parts)


def draw_band(band, rows, axis):
    """A worker's name, its line, marks and bars."""
    about = [band.worker, "%d jobs, %d at the same time" % (len(band.jobs), band.slots)]
    yield element("path", "line", d="M0 %gH%g" % (band.top, axis.right))
    yield element("text", "mono", tooltip(about) + markup(shortened(band.worker, LABEL_COLUMNS)),
                  x=axis.left - 10, y=band.top + 13, text_anchor="end")
    marks = merged([Bar(entry._replace(began=entry.ended), axis) for entry in
                    sorted(band.marks, key=lambda entry: entry.ended)], MARKS_APART)
    for mark in marks:
        yield element("path", "mark", tooltip(mark.lines()), d="M%.1f %gh7l-3.5 7z" % (mark.left - 3.5, band.top + 3))
    for number, row in enumerate(rows):
        for bar in row:
            yield draw_bar(bar, band.first + number * band.row_height, band.row_height - 1)


def draw_axis(axis, top, bottom):
    """Durations above the rows, times of day below them, and marks where time is cut out."""
    for x, text in axis.ticks(clock=True):
        yield element("path", "line", d="M%.1f %gV%g" % (x, top, bottom + 4))
        yield text_at(x, bottom + 16, text, anchor="middle")
    for x, text in axis.ticks(clock=False):
        yield element("path", "line", d="M%.1f %gv-4" % (x, top))
        yield text_at(x, top - 7, text, anchor="middle")
    for span, (began, ended) in zip(axis.spans[1:], axis.cuts):
        for x in (span.left - 13, span.left - 7):
            about = tooltip(["nothing was logged for " + elapsed(ended - began)])
            yield element("path", "mark", about, d="M%.1f %gV%gh1V%gz" % (x, top, bottom, top))


def rate_text(rate):
    """Jobs per second as a text, with the unit of time that makes the number at least one."""
    unit, seconds = next(((unit, seconds) for unit, seconds in (("s", 1), ("min", 60), ("h", 3600))
                          if rate * seconds >= 1), ("day", 86400))
    return ("%d/%s" if rate >= 100 else "%.3g/%s") % (rate * seconds, unit)


def throughput(entries, axis):
    """[(left, right, seconds, {outcome: count})] for each piece of time in which jobs ended."""
    ended = [entry for entry in entries if entry.outcome in ("done", "failed", "killed")]
    found = collections.defaultdict(collections.Counter)    # keys: (span, how many pieces it has, number of this one)
    for entry in ended:
        span = axis.span(entry.ended)
        share = (span.right - span.left) / (axis.right - axis.left)
        pieces = max(1, round(share * min(2 * len(ended) ** 0.5, COLUMNS_MAX)))
        number = int((axis.x(entry.ended) - span.left) / (span.right - span.left) * pieces)
        found[span, pieces, min(number, pieces - 1)][entry.outcome] += 1
    return [(span.left + (span.right - span.left) * number / pieces,
             span.left + (span.right - span.left) * (number + 1) / pieces, (span.ended - span.began) / pieces, counts)
            for (span, pieces, number), counts in sorted(found.items())]


def draw_rates(pieces, axis, top):
    """Draws how many jobs ended in each piece of time, by outcome, failures on top."""
    bottom = top + RATES_HEIGHT
    highest = max([sum(counts.values()) / seconds for _, _, seconds, counts in pieces] or [0])
    yield element("path", "line", d="M0 %gH%g" % (top - 12, axis.right))
    for y, text in ((top + 4, rate_text(highest) if highest else ""), (top + 34, "jobs that ended"), (bottom + 1, "0")):
        yield text_at(axis.left - 10, y, text, "mono", "end")
    for left, right, seconds, counts in pieces:
        inner, y = tooltip([rate_text(sum(counts.values()) / seconds), outcome_text(counts)]), bottom
        for outcome in OUTCOMES:
            height = RATES_HEIGHT * counts[outcome] / seconds / highest
            y -= height
            if height:
                inner += element("rect", outcome, x=left, y=y, width=right - left - 0.5, height=height)
        yield "<g>%s</g>\n" % inner


def draw_heading(entries, title, axis):
    """The title, the sums, the time, and the legend."""
    counts = collections.Counter(entry.outcome for entry in entries)
    workers = len({entry.worker for entry in entries})
    yield text_at(20, 28, shortened(title, 100), "title")
    yield text_at(20, 48, "%s; %d worker%s; %s sent, %s received" % (
        outcome_text(counts), workers, "s" * (workers > 1), amount(sum(entry.sent for entry in entries)),
        amount(sum(entry.received for entry in entries))))
    yield text_at(20, 64, "%s to %s (%s), %s" % (
        *(time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)) for when in (axis.began, axis.ended)),
        time.strftime("%Z", time.localtime(axis.began)), elapsed(round(axis.ended - axis.began, 2))))
    x = 20
    for outcome, text in OUTCOMES.items():
        yield element("rect", outcome, x=x, y=78, width=12, height=10)
        yield text_at(x + 18, 87, text)
        x += 50 + 7 * len(text)
    yield element("path", "mark", d="M%g 80h7l-3.5 7z" % x) + text_at(x + 14, 87, "a client's complaint about a worker")


def picture(entries, title, notes):
    """The SVG for Entries, in any order.  Its size is bounded: a few MB, about three screens high."""
    if not entries:
        body, height = text_at(20, 28, title, "title") + text_at(20, 48, "No job is in it."), 70
    else:
        body, height = draw_all(sorted(entries, key=lambda entry: entry[1:3]), title, notes)
    return ('<?xml version="1.0" encoding="UTF-8"?>\n'
            '<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}" viewBox="0 0 {0} {1}">\n'
            '<title>{2}</title>\n<style>{3}</style>\n<rect class="paper" width="{0}" height="{1}"/>\n{4}</svg>\n'
            ).format(PICTURE_WIDTH, height, markup(title), STYLE, body)


def draw_all(entries, title, notes):
    """Returns (markup, height) of a picture with at least one Entry."""
    bands, left_out = make_bands(entries)
    axis = TimeAxis(entries, left=ROWS_LEFT, right=PICTURE_WIDTH - 50)
    top = bottom = 124
    row_height = max(4, min(16, ROWS_HEIGHT // max(1, sum(len(band.rows) for band in bands))))
    for band in bands:
        bottom = band.put(bottom, row_height)
    parts, bars = list(draw_heading(entries, title, axis)), make_bars(bands, axis)
    parts += draw_axis(axis, top, bottom + 16 + RATES_HEIGHT)
    for band in bands:
        parts += draw_band(band, bars[band], axis)
    parts += draw_rates(throughput(entries, axis), axis, bottom + 12)
    y = bottom + RATES_HEIGHT + 56
    if axis.cuts:
        left_out.append("Where the axis is broken, time in which nothing was logged is left out; durations begin anew.")
    for note in ["A bar is a job, or several short ones; point at it for names, times and bytes."] + left_out + notes:
        parts.append(text_at(20, y, shortened(note, 180)))
        y += 16
    return "".join(parts), y + 4


def draw_logs(paths):
    """Writes the picture of logs to standard output.  Raises Fatal."""
    entries, notes, any_alerts = [], [], False
    for path in paths or ["-"]:
        more, trouble, alerts = read_entries(path)
        entries, any_alerts = entries + more, any_alerts or alerts
        if trouble:
            log.say(trouble)
            notes.append("Not read: " + trouble)
    if any_alerts:
        notes.insert(0, "The picture is made of alerts, which can be lost: some jobs may be missing.")
    names = ["standard input" if path == "-" else path for path in paths or ["-"]]
    print_out(picture(entries, "cexec: " + ", ".join(names), notes).encode())
    return 0


# ---------------------------------------------------------------------------
# crat, the applet
# ---------------------------------------------------------------------------

CRAT = Syntax(
    "crat", {"-": "[APP.pub | APP ...]", "--svg": "[FILE ...]"},
    """Print a line for every job that ended, and for every complaint.

A public key proves the alerts of its own client, a private key those of all clients.
Alerts that no key proves are printed as unverified.

--svg draws the logs of cexec -m --log, parallel --joblog or crat -j.

    crat ogg.pub                        # each job as it ends, until Ctrl-C
    crat -t ogg.pub                     # the workers on the whole screen
    crat --svg run.log > run.svg        # a picture of a batch, for a browser
""",
    Option("-j --json", "", "json", "print one JSON object on each line", "-"),
    Option("-t", "", "screen", "show the workers and the last lines on the whole screen; q ends it", "-"),
    Option("--svg", "", "svg", "draw the logs FILE ..., or standard input, as an SVG"),
    anywhere=True)


def main_crat(argv):
    """Logs until a signal ends it."""
    options = CRAT.read(argv)
    need_output()
    if options.svg:
        return draw_logs(options.words)
    if options.screen:
        check_screen(options)
    pubs, keys = [], []
    for path in options.words:
        if is_private_key(path):
            keys.append(open_key(path))
        else:
            pubs.append(open_pub(path))
    group, loop = Group(), Loop()
    listeners = open_listeners(group)
    if options.screen:
        labels = ", ".join(key.label for key in pubs + keys)
        watches = open_watches(loop, group, pubs, keys)
        tell = Screen(loop, printable("%s, %s" % (group.text, labels or "no key")), watches).tell
    else:
        tell = print_json if options.json else print_line
        end_quietly()
    Logger(loop, listeners, pubs, keys, tell)
    started_up()
    loop.run()
    return 0


def check_screen(options):
    """Raises Fatal (100) if -t is impossible."""
    if options.json:
        raise Fatal(EXIT_USAGE, "-j and -t do not go together: leave one of them out")
    if not os.isatty(1) or os.environ.get("TERM", "dumb") == "dumb":
        raise Fatal(EXIT_USAGE, "-t: standard output is no terminal with a screen: leave -t out, and the log is lines")
    if options.verbose and os.isatty(2):
        raise Fatal(EXIT_USAGE, "-t and -v: messages would disturb the screen: redirect them (2> file)")


def is_private_key(path):
    try:
        return "-----BEGIN" in read_text(path)
    except OSError:
        return False                # open_pub() will report the error


def end_quietly():
    """Lets INT and TERM end this process at once: it has nothing to save."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


# ---------------------------------------------------------------------------
# cproxy, which joins networks
# ---------------------------------------------------------------------------

HOPS_MAX = 8
RELAYS_MAX = 512                    # clients that have a Relay, at a time
JOINS_MAX = 1024                    # Joins at a time,
JOINS_A_CLIENT = 256                # and for one client's address, so that nobody can use up all Joins
RELAY_SECONDS = 70.0                # a Relay is given up after so long without announcements
HELLO_SECONDS = 10.0                # the time in which the client's side must begin TLS
RESET = struct.pack("ii", 1, 0)     # SO_LINGER: close() resets the connection

class Pump:
    """One direction of a Join: reads from the socket source and writes to the socket target.

    It reads only when everything is written: if the target stalls, so does the source.
    """

    def __init__(self, join, source, target, held=False):
        self.join, self.source, self.target = join, source, target
        self.waiting = memoryview(b"")              # was read, and is not written yet
        self.ended, self.discards, self.held = False, False, held

    def let_go(self):
        """Begins to read, after it was held."""
        self.held = False
        self.refresh()

    def refresh(self):
        loop, waiting = self.join.loop, self.waiting
        loop.on_read(self.source.fileno(), None if waiting or self.ended or self.held else self.readable)
        loop.on_write(self.target.fileno(), self.writable if waiting else None)

    def readable(self):
        try:
            self.waiting = memoryview(self.source.recv(FRAME_MAX))
        except BlockingIOError:
            return
        except OSError as error:
            return self.join.close(error.strerror, reset=True)
        self.join.vet(self)
        if not self.join.closed:
            self.writable() if self.waiting else self.hang_up()

    def writable(self):
        try:
            self.waiting = self.waiting[len(self.waiting) if self.discards else self.target.send(self.waiting):]
        except BlockingIOError:
            pass
        except OSError as error:
            if self is self.join.up or not self.join.up.ended:
                return self.join.close(error.strerror, reset=True)
            # The worker has sent everything and closed, so what the client sends now is read and dropped.  To
            # leave it unread would reset the client's connection at our close, while the worker's last bytes
            # are on their way.
            self.discards, self.waiting = True, memoryview(b"")
        self.refresh()

    def hang_up(self):
        self.ended = True
        self.refresh()
        with suppress(OSError):     # the target has gone too
            self.target.shutdown(socket.SHUT_WR)
        self.join.ended()


class Join:
    """A worker's connection to us, and our connection to its client, joined.

    The client's side gets no byte before it has sent a TLS ClientHello.  So nobody can use a forged
    return address to send bytes through us to a service that does not begin TLS itself.
    """

    def __init__(self, relay, worker):
        self.relay, self.loop, self.closed = relay, relay.proxy.loop, False
        self.worker_side, self.client_side, self.first = worker, None, b""
        worker.setblocking(False)
        self.deliveries = [(worker, Delivery())]
        self.up, self.down, self.timer = None, None, NO_TIMER
        self.dial = Dial(self.loop, *relay.return_address, HELLO_SECONDS, self.connected,
                         lambda reason, unreached: self.close(reason))

    def connected(self, client, seconds):
        self.client_side = client
        self.deliveries.append((client, Delivery()))
        self.timer = self.loop.after(seconds, lambda: self.close("no TLS ClientHello"))
        self.up, self.down = Pump(self, self.worker_side, client, held=True), Pump(self, client, self.worker_side)
        for sock in (client, self.worker_side):
            tune(sock)
        self.down.refresh()

    def vet(self, pump):
        """Looks at what a pump has read, and closes the Join if the client's side does not begin TLS."""
        if pump is self.up or not self.up.held:
            return
        self.first = (self.first + bytes(pump.waiting[:6]))[:6]
        if not pump.waiting:
            self.close("the client's side closed")
        elif not begins_tls(self.first):
            self.close("the client's side does not begin TLS")
        elif len(self.first) == 6:
            self.timer.cancel()
            self.up.let_go()

    def ended(self):
        if self.up.ended and self.down.ended:
            self.close("done")

    def check(self):
        """Ends the Join if a side was reset or its host has vanished: we would not see this while we do not read it.

        A worker that has sent everything may go.
        """
        for sock, delivery in self.deliveries:
            if not self.closed and not (sock is self.worker_side and self.up and self.up.ended):
                error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error or delivery.unanswered(sock) > GONE_SECONDS:
                    self.close(os.strerror(error or errno.ETIMEDOUT), reset=True)

    def close(self, reason, reset=False):
        """Closes both sides.  reset: as one side was reset, the other is too, so that it does not see a regular end."""
        if self.closed:
            return
        log.note("join of %s ends: %s", spelled(*self.relay.return_address), reason)
        self.closed = True
        self.dial.close()
        self.timer.cancel()
        for sock in filter(None, (self.worker_side, self.client_side)):
            self.loop.forget(sock.fileno())
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            sock.close()
        self.relay.join_over(self)


class Guest:
    """A client whose datagrams are passed on: workers may answer its questions, and connect to it."""

    def __init__(self):
        self.questions = Memory(16)             # the nonce of an ANNOUNCE or QUERY: the kind
        self.heard_at = 0.0

    def asked(self, datagram):
        self.questions[datagram.nonce], self.heard_at = datagram.kind, time.monotonic()

    def is_there(self):
        """Whether it was heard just now: later its port may be another program's."""
        return time.monotonic() - self.heard_at < RELAY_SECONDS

    def wants(self, datagram):
        """Whether this answers a question of its own."""
        kind = ANSWERS.get(datagram.kind)
        return kind is not None and self.questions.get(datagram.nonce) is kind


class Relay(Guest):
    """One client's representative on the workers' side: a port for offers and answers."""

    def __init__(self, proxy, client):
        super().__init__()
        self.proxy, self.return_address, self.joins = proxy, client, set()      # return_address: (address, port)
        self.back = ReturnPort([0], proxy.loop, [family_of(proxy.address)], proxy.address)
        self.back.attend(self.hear, self.accept)

    def accept(self, worker, address):
        relays = self.proxy.relays.values()
        host = self.return_address[0]
        if (sum(len(relay.joins) for relay in relays) >= JOINS_MAX or
                sum(len(relay.joins) for relay in relays if relay.return_address[0] == host) >= JOINS_A_CLIENT):
            log.note("offer from %s: too many connections", address)
            return worker.close()
        log.note("offer from %s goes to %s", address, spelled(*self.return_address))
        self.joins.add(Join(self, worker))

    def join_over(self, join):
        self.joins.discard(join)

    def hear(self, datagram, address):
        """Sends a worker's answer on to the client, unchanged.

        It is not sent from SELF: a client whose host has no route to SELF would not hear it (rp_filter).
        """
        if not self.wants(datagram):
            return
        with noting("dropped a datagram from %s", address):
            with open_udp(family_of(self.return_address[0]), broadcasts=False) as back:
                back.sendto(datagram.data, socket_address(*self.return_address))


class Proxy:
    """Hears one group, and sends its datagrams on to another, with its own address as the return address."""

    def __init__(self, loop, listeners, address, target):
        self.loop, self.address, self.target = loop, address, target
        self.home = interface_of(address)[0]
        self.relayed = Memory()     # identities of datagrams that were heard already
        self.relays = {}            # a client's (address, port): Relay
        self.udp = open_speakers(address)
        hear_all(loop, listeners, self.hear)
        self.sweep()

    def hear(self, datagram, address, index):
        if datagram.kind not in RELAYED or datagram.identity in self.relayed:
            return
        self.relayed[datagram.identity] = True
        if datagram.hops >= HOPS_MAX:
            return log.note("dropped %r: %d hops", datagram, datagram.hops)
        if index and index == self.home and self.reaches_home():
            return                  # it comes from the network to which it would be sent
        port = 0
        if datagram.kind in ANSWERS.values():
            if is_multicast(address):           # the system itself refuses answers to a broadcast address
                return log.note("dropped %r: %s is not a host's address", datagram, address)
            relay = self.relay_for((address, datagram.port))
            if relay is None:
                return log.note("dropped %r: too many clients", datagram)
            relay.asked(datagram)               # from now on relay.hear() lets the answers through
            port = relay.back.port
        # A link-local address has a meaning only on its link: there the sender's address will do.
        self_address = None if "%" in self.address else self.address
        self.target.send(self.udp, datagram.readdressed(self_address, port, datagram.hops + 1))
        log.note("-> %r from %s, as %s", datagram, address, spelled(self.address, port))

    def reaches_home(self):
        """Whether the target is a broadcast or multicast on our address's own network."""
        return any(target.device or target.address == ALL_NETWORKS or target.address.endswith(".255")
                   or is_multicast(target.address) for target in self.target.targets)

    def relay_for(self, client):
        """The Relay of a client's (address, port), made if necessary; None if there are too many."""
        relay = self.relays.get(client)
        if relay is None:
            if not client[1] or len(self.relays) >= RELAYS_MAX and not self.give_up_oldest():
                return None
            try:
                relay = self.relays[client] = Relay(self, client)
            except (Fatal, OSError) as error:
                return log.note("cannot relay %s: %s", spelled(*client), error)
        return relay

    def give_up_oldest(self):
        idle = [relay for relay in self.relays.values() if not relay.joins]
        if not idle:
            return False
        self.give_up(min(idle, key=lambda relay: relay.heard_at))
        return True

    def give_up(self, relay):
        relay.back.close()
        del self.relays[relay.return_address]

    def sweep(self):
        for relay in list(self.relays.values()):
            for join in list(relay.joins):
                join.check()
            if not relay.joins and not relay.is_there():
                self.give_up(relay)
        self.loop.after(1.0, self.sweep)


CPROXY = Syntax(
    "cproxy", {"-": "SELF [TARGET]"},
    """Repeat the announcements of clients to the group TARGET, and join the connections of
workers to the clients.  SELF is the address of this machine in the workers' network.
TARGET is by default the broadcast of that network.  No key is needed.

    cproxy 10.0.2.1                     # clients of other networks use workers of 10.0.2.x
    cproxy 10.0.2.1 239.1.2.3           # the workers hear a multicast group
    cproxy 203.0.113.5 198.51.100.7     # on a NAT gateway: its outer address, and a worker
""", anywhere=True)


def main_cproxy(argv):
    """Joins two networks until a signal ends it."""
    words = CPROXY.read(argv).words
    if not 1 <= len(words) <= 2:
        raise CPROXY.error("%s is one word too many" % words[2] if words else "no address SELF is named")
    loop, group = Loop(), Group()
    address = own_address(words[0])
    target = words[1] if len(words) > 1 and words[1] else default_target(address)
    make_room(0, 2 * (RELAYS_MAX + JOINS_MAX) + 64)
    proxy = Proxy(loop, open_listeners(group), address, Group(target, group.targets[0].port))
    end_quietly()
    started_up()
    log.note("from %s to %s, as %s", group.text, proxy.target.text, address)
    loop.run()
    return 0


def own_address(text):
    """The IP address of this machine that the text means.  Raises Fatal: 111 if another try may work, else 100."""
    try:
        found = resolve(text.strip("[]"))
        if len(found) != 1:
            raise Fatal(EXIT_USAGE, "SELF %s: stands for %d addresses: use one of them" % (text, len(found)))
        open_udp(family_of(found[0]), found[0]).close()
        return found[0]
    except (OSError, UnicodeError, ValueError) as error:
        code, why = no_address(text, error)
        if getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
            ours = ", ".join(interface.address for interface in interfaces() if interface.address)
            code, why = EXIT_TEMPORARY, "not an address of this machine (which has %s)" % (ours or "none of IPv4")
        raise Fatal(code, "SELF %s: %s" % (text, why)) from None


def default_target(address):
    """The text of a group: the broadcast of the address's network, or for IPv6 its all-nodes multicast."""
    device = interface_of(address)[1]
    return (device + ":" if device else "") + ("[%s]" % ALL_NODES if ":" in address else ALL_NETWORKS)


# ---------------------------------------------------------------------------
# ckeygen
# ---------------------------------------------------------------------------

KEY_ROUNDS = 600000                 # rounds of PBKDF2-HMAC-SHA256, for -stdin
SECRET_MIN = 12                     # characters of a passphrase: a shorter one gets a warning
NO_SECRET = "no passphrase was given"


def stretch(secret):
    """The master (32 bytes) computed from any bytes: PBKDF2-HMAC-SHA256 (RFC 8018), 600,000 rounds."""
    if not hasattr(hashlib, "pbkdf2_hmac"):     # from Python 3.12 on only OpenSSL provides it
        raise Fatal(EXIT_TEMPORARY, "this Python has no OpenSSL for -stdin: use another python3")
    return fold(hashlib.pbkdf2_hmac("sha256", secret, b"cexec private key 1", KEY_ROUNDS, 48))


def fold(wide):
    """A scalar (32 bytes) from 48 random bytes: with so many, each scalar is equally likely (FIPS 186-4, B.4.1)."""
    return (int.from_bytes(wide, "big") % (P256_N - 1) + 1).to_bytes(32, "big")


def read_secret(path):
    """Reads standard input.  Returns bytes for stretch(); more than 64 are replaced by their SHA-256, as HMAC does."""
    if sys.stdin is None:
        raise Fatal(EXIT_USAGE, "-stdin: standard input is closed")
    new = not os.path.lexists(path)
    if sys.stdin.isatty():
        return ask_secret(new)
    data, digest = sys.stdin.buffer.read(65), hashlib.sha256()
    if data in (b"", b"\n", b"\r\n"):
        raise Fatal(EXIT_USAGE, "-stdin: %s" % (NO_SECRET if data else "nothing to read on standard input"))
    if new:
        warn_of_secret(data.rstrip(b"\n"))
    if len(data) <= 64:
        return data
    while data:
        digest.update(data)
        data = sys.stdin.buffer.read(FRAME_MAX)
    return digest.digest()


def ask_secret(new):
    """Asks for a passphrase, without echo, and twice if new.  Returns its bytes, and a newline, as echo(1) adds one."""
    try:
        secret = getpass.getpass("passphrase (%d characters or more): " % SECRET_MIN if new else "passphrase: ")
        if not secret:
            raise EOFError
        if new and getpass.getpass("again: ") != secret:
            raise Fatal(EXIT_USAGE, "-stdin: the two passphrases differ: type the same one twice")
        if new:
            warn_of_secret(secret)
        return os.fsencode(secret) + b"\n"
    except EOFError:
        raise Fatal(EXIT_USAGE, "-stdin: %s" % NO_SECRET) from None
    except UnicodeError:
        raise Fatal(EXIT_USAGE, "-stdin: the passphrase is no text in this locale") from None


def warn_of_secret(secret):
    """A passphrase is all that is between a sniffed datagram and the key: who has one can try others at leisure."""
    if len(secret) < SECRET_MIN:
        log.say("warning: fewer than %d characters: who records this application's datagrams can guess them"
                % SECRET_MIN)


def write_new(path, text, replace):
    """Writes a file, whole or not at all, with mode 0600; replaces an old one only with replace.  Raises OSError."""
    part = "%s.%s.part" % (path, os.urandom(4).hex())       # a random name: a crash may have left another
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(text)
            commit(file, part, path, replace)
    finally:
        drop_part(part)


def existing_key(path):
    """The master in a private key file, after a check of every byte; None if there is no file.

    Raises Fatal: 101 if it is no valid key, 111 if it can't be read.
    """
    try:
        text = read_text(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno in NO_KEY:
            raise Fatal(EXIT_BAD_KEY, "%s: %s: not a cexec private key" % (path, error.strerror)) from None
        raise Fatal(EXIT_TEMPORARY, "%s: %s" % (path, error.strerror)) from None
    with raising(lambda error: Fatal(EXIT_BAD_KEY, str(error)), Fatal):
        master = parse_key(text, path).master
    if not 0 < int.from_bytes(master, "big") < P256_N or format_key(master)[0] != text:
        raise Fatal(EXIT_BAD_KEY, "%s: damaged private key (restore it, or move it away and make a new one)" % path)
    return master


CKEYGEN = Syntax(
    "ckeygen", {"-": "APP [APP.pub]"},
    """Make the private key APP, if it does not exist, and write a public key for it.

Both are secrets: the holder of APP can answer jobs, that of APP.pub can submit them.

    ckeygen ogg ogg.pub                 # a keypair
    ckeygen -n alice ogg alice.pub      # one more public key, with a name
    ckeygen -stdin ogg                  # the same key on each worker, from a passphrase

exit status: 0; 101 APP exists and is invalid; 102 APP.pub cannot be written; 103 APP
cannot be written; 104 -stdin does not match APP; 100 usage; 111 temporary
""",
    Option("-n", "NAME", "name", "make a public key for the client NAME"),
    Option("-stdin --stdin", "", "stdin",
           "make the private key from standard input; on a terminal, ask for a passphrase"),
    anywhere=True)


def main_ckeygen(argv):
    """Makes a keypair, or one more public key.  Returns 0."""
    options = CKEYGEN.read(argv)
    words = options.words
    if not 1 <= len(words) <= 2:
        raise CKEYGEN.error("%s is one word too many" % words[2] if words else "no private key is named")
    path = words[0]
    name = check_name(options.name) if options.name is not None else DEFAULT_NAME
    pub = "".join(words[1:]) or path + ("-" + name if options.name else "") + ".pub"
    with or_fatal("the current directory", EXIT_NO_KEY):     # it was removed
        same = os.path.abspath(pub) == os.path.abspath(path)
    if same:
        raise Fatal(EXIT_USAGE, "%s: the public and the private key need two names" % pub)
    make_pub(pub, make_key(path, stretch(read_secret(path)) if options.stdin else None), name)
    return 0


def make_pub(path, master, name):
    """Writes the public key of a client; replaces another public key."""
    with or_fatal("cannot write %s" % path, EXIT_NO_PUB):
        if os.path.exists(path) and not read_text(path).startswith(PUB_MAGIC):
            raise Fatal(EXIT_NO_PUB, "%s: exists and is not a public key: not overwritten" % path)
        write_new(path, format_pub(master, name, format_key(master)[1]), replace=True)


def make_key(path, derived):
    """The master in the key file at path.  If there is no file, makes it, with derived or a random master."""
    master = existing_key(path)
    if master is not None:
        if derived is not None and derived != master:
            raise Fatal(EXIT_OTHER_KEY, "%s: exists, and standard input names another key" % path)
        log.note("%s: there already", path)
        return master
    if path.endswith(".pub"):
        raise Fatal(EXIT_USAGE, "%s: no such private key, and a new one needs another name: clients get .pub" % path)
    master = derived or fold(os.urandom(48))
    try:
        write_new(path, format_key(master)[0], replace=False)
    except FileExistsError:         # another process has just made it
        if not os.path.exists(path):
            raise Fatal(EXIT_NO_KEY, "cannot write %s: it is a link to nothing" % path) from None
        return make_key(path, derived)
    except OSError as error:
        raise Fatal(EXIT_NO_KEY, "cannot write %s: %s" % (path, error.strerror)) from None
    return master


# ---------------------------------------------------------------------------
# cservice -s: workers on other hosts, over ssh
# ---------------------------------------------------------------------------

#     client    the starter (Starter, Host)               the worker (WorkerLifeline) on a host
#                 | ssh HOST REMOTE  -------------------->  |   the login shell (sh, csh, fish) runs python3
#                 | a line of Python (ASK) -------------->  |   runs it
#                 |  <---------- anything that a login says |
#                 |  <--------------- RUNS, which bytecode  |
#                 | a line of Python (FIRST) ------------>  |   runs it
#                 | this file, compiled or as it is ----->  |   compiles it if need be, starts it: cservice -s - ...
#                 | the private key in hexadecimal ------>  |   serves
#                 |  <--------------------- SERVES, its id  |   from now on frames go both ways
#                 | PING, every ten seconds ------------->  |   drains after a minute without a byte
#       | ANNOUNCE |                                        |
#       |--------->| PASS: our clients' datagrams ------->  |   offers directly, and after 0.25 s so:
#       |          |  <-------- CONNECT to who sent ANNOUNCE |
#       |<-connects|   waits for a ClientHello              |
#       | TLS ---->| DATA EOF SHUT CREDIT  <------------->  |   the offer and the job, as on a socket
#       |<---------|  <------------------- PASS: BUSY, REPLY |
#                 | DRAIN --------------------------------> |   drains
#                 | END_JOBS -----------------------------> |   drains, and ends its jobs
#                 | end of file --------------------------> |   drains, and ends the connections through ssh
#                 |  <------------- ssh's exit status       |   0 it has drained, 111 the starter is lost, 100 permanent

# All comes through standard input, and the program is never a file on the host.  Each reader must leave the next
# one's bytes there: so the first one opens 0 without a buffer.  The quotes and words of REMOTE mean the same to
# sh, csh and fish; its last word is only for ps(1).
REMOTE = "exec python3 -Sc 'f=open(0,\"rb\",0,closefd=0);exec(f.readline())' cservice"
RUNS = b"cexec: runs "              # the host's output: a line with this and what own_bytecode() is there
OWN_BYTECODE = """
import _frozen_importlib_external
try:
    import zlib
    bytecode = sys.implementation.cache_tag + _frozen_importlib_external.MAGIC_NUMBER.hex()
except (AttributeError, ImportError, TypeError):
    bytecode = ""
"""
ASK = """
import sys
sys.path[:] = [path for path in sys.path if path[:1] == "/"]
import os
if sys.version_info < (3, 6):
    sys.stderr.write("Python %d.%d is too old: cexec needs 3.6 or newer\\n" % sys.version_info[:2])
    os._exit(100)
""" + OWN_BYTECODE + """
os.write(1, ("\\n{}" + bytecode + "\\n").encode())
exec(f.readline())
""".format(RUNS.decode())
FIRST = """
program = b""
while len(program) < count:
    piece = f.read(count - len(program))
    if not piece:
        os._exit(111)
    program += piece
sys.argv, __file__ = ["cservice"] + [os.fsdecode(word) for word in words], "<ssh>"
os.environb.update(variables)
"""
START_COMPILED = """
import gc, marshal
gc.disable()
module = sys.modules["cexec"] = type(sys)("cexec")
module.__file__ = __file__
for code in marshal.loads(zlib.decompress(program)):
    exec(code, module.__dict__)
module.main(sys.argv)
"""
START_SOURCE = """
code = compile(program, "cexec.py", "exec")
try:
    import importlib.util, marshal
    path = "/dev/fd/%d" % os.memfd_create("cexec", 0)
    with open(path, "wb") as file:
        file.write(importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code))
    os.execv(sys.executable, [sys.executable, "-S", path] + sys.argv)
except (AttributeError, OSError):
    pass
exec(code)
"""

LOGINS = 8                          # logins at a time, because sshd refuses some if there are many (MaxStartups)
LOGIN_SECONDS = 60.0                # a login that takes longer is ended, so that others get their turn
SSH_FAILED = 255                    # ssh's own exit status, ssh(1)
RETRY_MAX = 60.0                    # seconds between two tries at most; they begin with one second
SAID_MAX = 8192                     # bytes of a line that is shown
SAID_LINES = 64                     # lines of a login that are remembered: the next one does not show them again


def parse_hosts(words):
    """Returns {host: its slots, or None} of all -s: [N/]HOST,... or @FILE, see hosts_in().  Raises Fatal (100)."""
    names = []
    for word in words:
        for item in word.split(","):
            names += hosts_in(item) if item.startswith("@") else [
                item.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")]
    if "" in names:
        raise Fatal(EXIT_USAGE, "-s %s: a host is missing before or after a comma (no space there)" % words[0])
    hosts = {}
    for text in names:
        slots, slash, name = text.partition("/")
        slots, name = (number_of(slots), name) if slash and slots.isdecimal() else (None, text)
        if slots is not None and not 0 < slots <= SLOTS_MAX:
            raise Fatal(EXIT_USAGE, "-s %s: N/HOST has 1 to %d slots" % (text, SLOTS_MAX))
        hosts.setdefault(name, slots)
    for name in hosts:              # ssh would take a word that begins with - for an option
        if not name or name.startswith("-") or " " in name or not name.isprintable():
            raise Fatal(EXIT_USAGE, "-s %s: not a host, or [USER@]HOST,..., or @FILE" % name)
        if name.count(":") == 1:
            raise Fatal(EXIT_USAGE, "-s %s: a port is set by CEXEC_SSH='ssh -p PORT'" % name)
        if "/" in name:
            raise Fatal(EXIT_USAGE, "-s %s: not a host (slots come first: 4/box1)" % name)
    if not hosts:
        raise Fatal(EXIT_USAGE, "-s %s: no host in it" % words[0])
    return hosts


def hosts_in(item):
    """The hosts of @FILE, one on each line.  Raises Fatal (100)."""
    with or_fatal("-s %s" % item, EXIT_USAGE):
        names = read_list(item[1:])
    for name in names:
        if "," in name or len(name.split()) > 1:
            raise Fatal(EXIT_USAGE, "-s %s: %s: write one host on each line" % (item, name))
    return names


def ssh_words(several):
    """The command line of ssh, up to the host."""
    text = os.environ.get("CEXEC_SSH") or "ssh"
    with raising(lambda error: Fatal(EXIT_USAGE, "CEXEC_SSH=%s: %s" % (text, error)), ValueError):
        words = shlex.split(text)
    if not words or not shutil.which(words[0]):
        raise Fatal(EXIT_USAGE, "%s: no such command: install ssh, or set CEXEC_SSH" % (words[0] if words else text))
    if os.path.basename(words[0]) == "ssh":     # of an option given twice ssh takes the first: the user's one wins
        words += ["-T", "-o", "ServerAliveInterval=15", "-o", "ConnectTimeout=15"] + ["-o", "BatchMode=yes"] * several
    return words


def key_to_send(path):
    """Makes both key files if they do not exist.  Returns (the text of the private key, its Pub).  Raises Fatal."""
    pub = path + ".pub"
    if not os.path.lexists(path) and os.path.lexists(pub):
        raise Fatal(EXIT_USAGE, "%s exists, but the private key %s does not: copy it, or name another" % (pub, path))
    if not os.path.lexists(pub):
        is_new = not os.path.lexists(path)
        try:
            make_pub(pub, make_key(path, None), DEFAULT_NAME)
        except Fatal as error:      # ckeygen's exit codes are its own
            raise Fatal(EXIT_USAGE if error.code in (EXIT_USAGE, EXIT_BAD_KEY) else EXIT_TEMPORARY,
                        str(error)) from None
        log.say("made %s%s for the clients" % ("the keys %s for the workers and " % path if is_new else "", pub))
    key, public = open_key(path), open_pub(pub)
    if public.application != key.application:
        raise Fatal(EXIT_USAGE, "%s: does not belong to the key %s: make it again (ckeygen %s)" % (pub, path, path))
    return read_text(path), public


def own_bytecode():
    """The kind of compiled code that this Python runs; "" if there is no zlib to pack it."""
    names = {"sys": sys}
    exec(OWN_BYTECODE, names)
    return names["bytecode"]


@functools.lru_cache(2)             # what hosts have said: of those that are not as ours, any number
def program_for(bytecode):
    """Returns this program for a worker: (START_COMPILED or START_SOURCE, the bytes that it needs).

    It is sent compiled if the host's Python runs what ours does: to compile it takes longer than all the rest there.
    """
    with open(__file__, "rb") as file:
        source = file.read()
    try:
        if bytecode and bytecode == own_bytecode():
            return START_COMPILED, zlib.compress(marshal.dumps(code_of(os.path.realpath(__file__), "cservice")), 1)
    except OSError:
        pass
    return START_SOURCE, source


def first_input(argv, key, group, slots=None, bytecode=""):
    """Returns the bytes that a host gets at standard input when it has said RUNS, up to the private key.

    slots: None for those of CONCURRENCY.
    """
    # The group goes as plain addresses: the host does not have our @FILE, and its devices have other names.
    # It goes in CEXEC_GROUP, because csh sets GROUP to the user's group.
    text = group.text
    if "@" in text or "%" in text or any(target.device for target in group.targets):
        text = ",".join(dict.fromkeys(spelled(target.address.partition("%")[0], target.port)
                                      for target in group.targets))
    variables = {name: os.environb[name] for name in (b"CONCURRENCY", b"BOOST") if name in os.environb}
    variables[b"CEXEC_GROUP"] = os.fsencode(text)
    if slots is not None:
        variables[b"CONCURRENCY"] = b"%d" % slots
    start, program = program_for(bytecode)
    words = [os.fsencode(word) for word in ["-s", OVER_SSH, *argv]]
    first = "count, words, variables = %a, %a, %a" % (len(program), words, variables) + FIRST + start
    return one_line(first) + program + b"%s\n" % key.encode().hex().encode()


def one_line(text):
    """Lines of Python as one."""
    return b"exec(%s)\n" % ascii(text).encode()


# A host's states, which only _set() changes:
#
#   WAITING --its turn--> LOGIN --SERVES came--> SERVING
#
#   When ssh ends, LOGIN and SERVING lead to WAITING for 1, 2, 4 ... s, if ssh has failed or the worker
#   has ended with 111; else they lead to DROPPED.  From WAITING draining leads to DROPPED.

WAITING, LOGIN, SERVING, DROPPED = "WAITING", "LOGIN", "SERVING", "DROPPED"


class Visit:
    """A connection to a client, for the worker of a host, until the client begins TLS: until then it gets no byte."""

    def __init__(self, lifeline, number, address, port):
        self.lifeline, self.loop, self.number = lifeline, lifeline.loop, number
        self.sock, self.timer = None, NO_TIMER
        self.dial = Dial(self.loop, address, port, HELLO_SECONDS, self.connected, self.refuse)

    def connected(self, sock, seconds):
        self.sock, self.timer = sock, self.loop.after(seconds, self.refuse)
        sock.setblocking(False)
        tune(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 6)       # or the loop would spin with fewer
        self.loop.on_read(sock.fileno(), self.look)

    def look(self):
        head = what_came(self.sock.recv, 6, socket.MSG_PEEK)
        if head is None:
            return
        if len(head) < 6 or not begins_tls(head):       # fewer: no more will come
            self.refuse("it does not begin TLS")
        else:
            self.timer.cancel()
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
            self.loop.forget(self.sock.fileno())
            self.lifeline.begins(self.number, self.sock)

    def refuse(self, reason="it does not begin TLS", unreached=True):
        log.note("no connection through ssh: %s", reason)
        self.close()
        self.lifeline.refused(self.number)

    def close(self):
        self.dial.close()
        if self.sock:
            self.timer.cancel()
            self.loop.forget(self.sock.fileno())
            self.sock.close()


class HostLifeline(Lifeline):
    """The starter's end: what a host can have us do is to connect to clients, and to send them answers."""

    def __init__(self, loop, host, reader, writer):
        self.starter = host.starter
        self.visits, self.deliveries = {}, {}       # by the channel's number; of the channels: a Delivery
        super().__init__(loop, host, reader, writer)

    def link_frame(self, link, kind, flags, channel, payload):
        if len(link.tls.outgoing) > SSH_QUEUE:
            raise ProtocolError("it asks for much and reads nothing")
        if kind is EOF and channel in self.visits:
            return self.visits.pop(channel).close()     # the worker has changed its mind
        super().link_frame(link, kind, flags, channel, payload)

    def rcvd_pass(self, flags, channel, payload):
        """A worker's datagram."""
        guest, datagram = self.starter.guests.get((payload.address, payload.port)), Datagram(payload.datagram)
        if guest and guest.is_there() and guest.wants(datagram):
            self.starter.send(datagram, payload.address, payload.port)

    def rcvd_connect(self, flags, channel, payload):
        """The worker wants a channel to a client."""
        guest = self.starter.guests.get((payload.address, payload.port))
        if channel in self.channels or channel in self.visits:
            raise ProtocolError("CONNECT for a channel that is there")
        if not guest or not guest.is_there() or len(self.channels) + len(self.visits) >= SSH_STREAMS:
            return self.refused(channel)
        self.visits[channel] = Visit(self, channel, payload.address, payload.port)

    # As on a direct connection, the client closes first.  If we closed a socket with bytes that were not read, TCP
    # would reset the connection, and a stopped client would lose what it has not read yet: tcp(7), close(2).

    def rcvd_eof(self, flags, channel, payload):
        super().rcvd_eof(flags & ~FLAG_WHOLE, channel, payload)

    def rcvd_shut(self, flags, channel, payload):
        self._stream(channel, "source").discard()

    def begins(self, number, sock):
        self.deliveries[number] = Delivery()
        try:
            self.join(number, sock)
            del self.visits[number]
        except OSError as error:    # no descriptor is left
            self.visits[number].refuse(error.strerror)

    def refused(self, number):
        """There is no connection: tells it as the end of one."""
        self.visits.pop(number, None)
        self.link.send_frames([make_frame(EOF, number, FLAG_WHOLE), make_frame(SHUT, number, FLAG_WHOLE)])

    def check(self):
        """Ends connections to clients whose hosts have vanished."""
        for number, channel in self.channels.items():
            if channel.end.halves and self.deliveries[number].unanswered(channel.end.sock) > GONE_SECONDS:
                with suppress(OSError):         # it has been reset
                    channel.end.sock.shutdown(socket.SHUT_RDWR)         # its streams see that, and tell the worker

    def forget_ended(self):
        super().forget_ended()
        self.deliveries = {number: self.deliveries[number] for number in self.channels}

    def link_lost(self, link, reason, violation):
        for visit in self.visits.values():
            visit.close()
        self.visits = {}
        super().link_lost(link, reason, violation)


class Host(Stateful):
    """A host of -s: the ssh to it, and the worker there."""

    LAW = {WAITING: (LOGIN, DROPPED), LOGIN: (SERVING, WAITING, DROPPED), SERVING: (WAITING, DROPPED), DROPPED: ()}

    def __init__(self, starter, name, slots):
        self.starter, self.loop, self.name, self.slots = starter, starter.loop, name, slots
        self.state, self.process, self.worker_id = WAITING, None, None
        self.failures = 0           # in a row
        self.status = None          # the exit status of the last ssh
        self.lines = Memory(SAID_LINES)         # what this login has said last,
        self.known_lines = ()       # and what the one before has
        self.timer = NO_TIMER       # for the next try, or the deadline of a login
        self.awaits_runs = False    # whether the host has not said RUNS yet
        self.writer = None          # during a login: for ssh's input
        self.unsaid = {}            # descriptor: the beginning of a line from the host
        self.lifeline = None        # while its worker serves
        self.violation = None       # how the host has broken the protocol

    def __repr__(self):
        return self.name

    def _set(self, state):
        super()._set(state)
        self.timer.cancel()

    def say(self, text, *args):
        self.starter.say(self, text % args)

    # The ssh

    def login(self):
        self._set(LOGIN)
        alone = self.starter.alone
        try:
            # Ctrl-C must reach only us: we drain then, and ssh must go on.  So ssh gets a session of its own.  But a
            # single ssh may ask for a password: it keeps the terminal, and ignores the signals of its keys.
            self.process = subprocess.Popen(
                [*self.starter.ssh, self.name.encode(), REMOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, bufsize=0, start_new_session=not alone,
                preexec_fn=ignore_signals if alone else None)
        except OSError as error:
            return self.retry_later("cannot start ssh: %s" % error.strerror)
        self.timer = self.loop.after(LOGIN_SECONDS, self.hurry)
        self.unsaid = {self.process.stdout.fileno(): b"", self.process.stderr.fileno(): b""}
        for fd in self.unsaid:
            os.set_blocking(fd, False)
            self.loop.on_read(fd, functools.partial(self.read, fd))
        into = self.process.stdin.fileno()
        os.set_blocking(into, False)
        self.awaits_runs, self.writer = True, Writer(self.loop, End(into, into, lambda: None, ["write"]))
        self.writer.add(one_line(ASK))

    def hurry(self):
        self.say("no worker after %d s (does a file such as ~/.bashrc there read standard input?)", LOGIN_SECONDS)
        if not self.starter.alone:              # a single ssh may still wait for a password
            self.kill()

    def kill(self, number=signal.SIGTERM):
        """Ends ssh; the worker then sees the end of its input."""
        with suppress(ProcessLookupError):      # reap() will see it
            if self.starter.alone:  # at ALRM, too, it shows again what is typed, if it asks for a password
                os.kill(self.process.pid, signal.SIGALRM if number == signal.SIGTERM else number)
            else:
                os.killpg(self.process.pid, number)

    def send(self, kind):
        """Sends a frame to its worker."""
        self.lifeline.link.send(kind)

    def read(self, fd):
        """Reads and shows what the host says.  Returns whether there may be more."""
        data = what_came(os.read, fd, SAID_MAX)
        if data is None:
            return False
        *lines, self.unsaid[fd] = (self.unsaid[fd] + data).split(b"\n")
        if not data or len(self.unsaid[fd]) > SAID_MAX:
            lines.append(self.unsaid[fd])
            self.unsaid[fd] = b""
        if not data:
            self.loop.forget(fd)
        for line in lines:
            if self.rcvd_line(line):
                return False        # no frame follows yet: the worker sends one only when it has got one
        return bool(data)

    def rcvd_line(self, line):
        """Shows a line, or handles SERVES.  Returns whether it was that."""
        if line.startswith(SERVES) and self.state is LOGIN:
            self.rcvd_up(line[len(SERVES):])
            return True
        if line.startswith(RUNS) and self.awaits_runs and self.state is LOGIN:
            self.awaits_runs = False
            self.writer.add(self.starter.first(self.slots, line[len(RUNS):].decode("ascii", "replace")))
        elif line.strip():
            text = printable(line.decode("utf-8", "backslashreplace").rstrip("\r"))
            if self.state is LOGIN:             # an unreachable host says the same at each try: once is enough
                self.lines[text] = True
            if self.state is not LOGIN or text not in self.known_lines:
                self.starter.show_line(self, text)
        return False

    def rcvd_up(self, worker_id):
        self._set(SERVING)
        self.worker_id = worker_id.decode("ascii", "replace").strip()
        if self.failures:
            self.say("serves now")
        self.failures, self.known_lines, self.writer = 0, (), None
        out, into = self.process.stdout, self.process.stdin
        for pipe in (out, into):
            self.loop.forget(pipe.fileno())
        del self.unsaid[out.fileno()]
        self.lifeline = HostLifeline(self.loop, self, out.fileno(), into.fileno())
        out.close()
        into.close()
        self.starter.changed()

    def lifeline_lost(self, reason, violation):
        """ssh has ended, or will."""
        if violation:
            self.violation = reason
            self.kill()

    # Its end

    def reap(self):
        """If ssh has ended, handles its last output and its exit status."""
        if self.process is None or self.process.poll() is None:
            return
        for fd in list(self.unsaid):
            for _ in range(PIPE_SIZE // SAID_MAX):      # more is not ssh's: a child of it goes on
                if not self.read(fd):
                    break
            if self.unsaid.get(fd):     # no end of file came: a child of ssh still has the pipe open
                self.rcvd_line(self.unsaid[fd])
            self.loop.forget(fd)
        if self.lifeline:
            self.lifeline.link.fail("ssh has ended")
            self.lifeline = None
        else:
            self.loop.forget(self.process.stdin.fileno())
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()
        status, self.process = self.process.returncode, None
        self.judge(status)

    def judge(self, status):
        """Decides by ssh's exit status, which is the worker's if that was started."""
        self.status = status
        if self.violation:
            self.say("has sent what no worker sends (%s), and is not started again", self.violation)
            self.end()
        elif self.starter.draining:
            if status and self.state is SERVING:
                self.say("ended with exit status %d", status)
            self.end()
        elif status < 0 or status in (SSH_FAILED, EXIT_TEMPORARY):
            self.retry_later({SSH_FAILED: "ssh failed", EXIT_TEMPORARY: "the worker ended"}.get(
                status, "ssh was killed"))
        elif self.state is SERVING or status == EXIT_USAGE:
            self.say("the worker ended with exit status %d, and is not started again", status)
            self.end()
        else:
            self.say("exit status %d instead of a worker: is python3 in the PATH of `ssh %s`? does a file such as "
                     "~/.bashrc there read standard input? It is not tried again", status, self.name)
            self.end()

    def retry_later(self, why):
        """Tries again after a pause, which doubles each time."""
        delay = min(2 ** self.failures, RETRY_MAX)
        self.failures += 1
        if self.failures == 1:
            self.say("%s%s%s", why, self.starter.next_try(delay), self.hint())
        else:
            log.note("%s: %s; tries again in %d s", self.name, why, delay)
        self.lines, self.known_lines = Memory(SAID_LINES), self.lines
        self._set(WAITING)
        self.timer = self.loop.after(delay, lambda: self.starter.take_turn(self))
        self.starter.changed()

    def hint(self):
        """What to do if ssh would have asked something."""
        lines = "\n".join(self.lines)
        if "Host key verification failed" in lines and "HAS CHANGED" not in lines:
            return " (run this once, it asks: %s %s true)" % (os.environ.get("CEXEC_SSH") or "ssh", self.name)
        if "Permission denied" in lines:
            return " (ssh %s true must work without a question)" % self.name
        return ""

    def end(self):
        self._set(DROPPED)
        self.starter.changed()


def ignore_signals():
    """The keyboard's signals, and those that timeout(1) and shells send to the whole process group, are for us."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)


class Starter:
    """cservice -s: keeps a worker running on each host, until a signal ends it."""

    def __init__(self, hosts, ssh, argv, text, group, survey=None):
        make_room(0, 64 + 4 * len(hosts) + 2 * SSH_STREAMS * min(8, len(hosts)))    # of more connections some will fail
        self.loop, self.ssh, self.listeners = Loop(), ssh, open_listeners(group)
        self.key, self.first = parse_key(text, RUN_KEY), functools.partial(first_input, argv, text, group)
        self.passed = Memory()      # identities of the datagrams that were passed on
        self.guests = Memory()      # a client's (address, port): Guest
        self.make_survey = survey   # makes a Survey; None once that was done
        self.alone = len(hosts) == 1
        self.hosts = [Host(self, name, slots) for name, slots in hosts.items()]
        self.to_login = collections.deque(self.hosts)           # Hosts that wait for their turn
        self.served = False         # whether any worker has served
        self.signals = 0            # how many came
        self.draining = False

    def work(self, signals):
        """Keeps the workers running until they have ended, for example after one of the signals."""
        self.loop.catch(signals, self.signalled)
        self.begin()
        started_up()
        self.loop.run()

    def begin(self):
        hear_all(self.loop, self.listeners, self.hear)
        self.changed()
        self.keep_alive()
        self.loop.after(0, lambda: program_for(own_bytecode()))         # while the hosts log in

    def keep_alive(self):
        self.tell(PING)
        for host in self.in_state(SERVING):
            host.lifeline.check()
        self.loop.after(ALIVE_SECONDS, self.keep_alive)

    def tell(self, kind):
        for host in self.in_state(SERVING):
            host.send(kind)

    def hear(self, datagram, address, index):
        """Passes a client's datagram on to the workers, if it is genuine, and once, by however many ways it came."""
        if (datagram.kind not in FOR_WORKERS or datagram.application != self.key.application
                or datagram.identity in self.passed
                or not datagram.proved_by(client_secret(self.key.master, datagram.name))):
            return
        self.passed[datagram.identity] = True
        handle = address, datagram.port
        if datagram.kind in ANSWERS.values() and datagram.port:
            self.guests[handle] = self.guests.get(handle) or Guest()
            self.guests[handle].asked(datagram)
        for host in self.in_state(SERVING):
            host.lifeline.pass_on(handle, datagram.data)

    def send(self, datagram, address, port):
        """Sends a worker's answer to a client."""
        with noting("cannot send %s to %s", datagram.kind, address):
            self.listeners[0].send(datagram.data, address, port)

    def say(self, host, text):
        log.say("%s: %s" % (host, text))

    def next_try(self, seconds):
        return "; tries again in %d s, then less often" % seconds

    def show_line(self, host, text):
        """Shows a line that a host has said."""
        log.write("%s: %s\n" % (host, text))

    def in_state(self, *states):
        return [host for host in self.hosts if host.state in states]

    def take_turn(self, host):
        self.to_login.append(host)
        self.changed()

    def changed(self):
        """Called after a host's state has changed: begins logins, shows the workers, or stops."""
        while self.to_login and len(self.in_state(LOGIN)) < LOGINS:
            self.to_login.popleft().login()
        self.served = self.served or bool(self.in_state(SERVING))
        if not self.in_state(WAITING, LOGIN, SERVING):
            self.loop.stop()
        tried = all(host.failures or host.state in (SERVING, DROPPED) for host in self.hosts)
        if tried and self.make_survey and self.in_state(SERVING) and not self.draining:
            self.look_around()

    def look_around(self):
        """Shows the table of cexec -l, once, when each host serves or has failed."""
        make, self.make_survey = self.make_survey, None
        try:
            survey = make()
        except Fatal as error:
            return log.say(str(error))
        survey.begin(lambda: self.show(survey))

    def show(self, survey):
        survey.close()
        if self.draining:
            return
        show_workers(survey, False)
        log.say("%d of %d hosts serve %s until Ctrl-C" % (
            len(self.in_state(SERVING)), len(self.hosts), survey.pub.label))
        heard = {worker_id.hex() for worker_id in survey.workers}
        for host in self.in_state(SERVING):
            if host.worker_id not in heard:
                host.say("serves, but is not heard on %s: let UDP port %s in through its firewall, or add "
                         "127.0.0.1 to GROUP (cexec(1), The group): then it is reached through ssh", survey.group.text,
                         ", ".join(sorted({str(target.port) for target in survey.group.targets})))

    def signalled(self, number):
        if number == signal.SIGCHLD:
            for host in self.hosts:
                host.reap()
            return
        self.signals += 1
        if self.signals == 1:
            self.drain()
        elif self.signals == 2:
            log.say("ends the jobs")
            self.tell(END_JOBS)
        else:
            self.cut_off()

    def cut_off(self):
        """A host that has not ended until now cannot be reached: its worker will notice that."""
        for host in self.in_state(LOGIN, SERVING):
            host.kill(signal.SIGKILL)

    def drain(self):
        self.draining = True
        self.to_login.clear()
        for host in self.in_state(LOGIN):
            host.kill()
        self.tell(DRAIN)
        if self.in_state(SERVING):
            log.say("drains; a second signal ends the jobs that run")
        for host in self.in_state(WAITING):
            host.end()


def serve_on_hosts(words, path, argv):
    """Keeps a worker running on each host until a signal ends it.

    Returns 0; if no worker ever served, 111, or 100 if that was each worker's exit status.
    """
    if not os.path.isfile(__file__):
        raise Fatal(EXIT_USAGE, "-s sends this program, and it was read from standard input: start it from a file")
    hosts = parse_hosts(words)
    if path == RUN_KEY:
        return serve_run(hosts, argv)
    ssh, group, ports = ssh_words(len(hosts) > 1), Group(), listen_ports()
    text, pub = key_to_send(path)
    fill_standard()
    starter = Starter(hosts, ssh, argv, text, group, lambda: Survey(group, pub, ports, starter.loop))
    starter.work(WORKER_SIGNALS)
    if starter.served:
        return 0
    return EXIT_USAGE if all(host.status == EXIT_USAGE for host in starter.hosts) else EXIT_TEMPORARY


class RunStarter(Starter):
    """cservice -s for one call of cexec -s, its parent: tells it what the hosts do, and ends all when it has ended."""

    def __init__(self, hosts, ssh, argv, text, group, greeting):
        super().__init__(hosts, ssh, argv, text, group)
        self.greeting = greeting    # the words of the first line for the parent
        self.told = {}              # a Host: the state that the parent knows
        self.alone = self.alone and is_openable("/dev/tty")     # else ssh cannot ask anything

    def begin(self):
        self.report(*self.greeting)
        for number in range(3):
            os.set_blocking(number, False)      # the parent may be stopped: we must not stop with it
        self.loop.on_read(0, self.read)
        super().begin()

    def read(self):
        """The parent says nothing: the end of file is its end."""
        if what_came(os.read, 0, 1) == b"":
            self.leave()

    def signalled(self, number):
        """Other signals are for the parent: the keyboard sends them to both, and so do timeout(1) and shells."""
        if number == signal.SIGCHLD:
            super().signalled(number)

    def leave(self):
        """Ends the workers, with their jobs."""
        self.loop.forget(0)
        self.drain()
        self.tell(END_JOBS)
        self.loop.after(KILL_SECONDS + END_SECONDS, self.cut_off)

    # For the parent

    def changed(self):
        super().changed()
        self.tell_parent()

    def tell_parent(self):
        """Tells what it does not know yet: later, if it is stopped and its socket full of what the hosts say."""
        whole = True
        for host in self.hosts:
            failed = host.failures or host.state is DROPPED
            state = SERVES_NOW if host.state is SERVING else FAILED_NOW if failed else WAITS
            news = state, (host.process.pid if self.alone else -host.process.pid) if host.process else 0
            if self.told.get(host) != news:
                whole = whole and self.report(HOST_LINE, str(host), *map(str, news), host.worker_id or "")
                if not whole:
                    break
                self.told[host] = news
        self.loop.on_write(1, None if whole else self.tell_parent)

    @staticmethod
    def report(*words):
        """Returns whether the parent's socket has room.  It begins a line: the one before may have been cut."""
        try:
            os.write(1, b"\n%s\n" % "\t".join(words).encode())      # whole, or not at all: it is short
        except BlockingIOError:
            return False
        except OSError:
            pass                    # the parent has gone, as read() will see
        return True

    def say(self, host, text):
        """A login that fails has often said why in its last line."""
        reason = next(reversed(host.lines), None) if host.state is LOGIN and not self.alone else None
        if not self.draining:
            super().say(host, "%s; %s" % (reason, text) if reason else text)

    def next_try(self, seconds):
        return ""                   # perhaps nobody waits for it

    def show_line(self, host, text):
        """What a login says is only shown where it may be a part of ssh's questions."""
        if host.state is not LOGIN or self.alone or log.verbose:
            super().show_line(host, text)


def is_openable(path):
    with suppress(OSError):
        os.close(os.open(path, os.O_RDWR | os.O_NOCTTY))
        return True
    return False


def serve_run(hosts, argv):
    """Keeps a worker on each host for one call of cexec -s.  Returns 0."""
    master = fold(os.urandom(48))   # the key: it is never in a file
    text, fingerprint = format_key(master)
    with open_udp(socket.AF_INET) as probe:     # a port that is free here
        group = Group(spelled(THIS_HOST, probe.getsockname()[1]))
    greeting = PUB_LINE, group.text, format_pub(master, DEFAULT_NAME, fingerprint).strip()
    starter = RunStarter(hosts, ssh_words(len(hosts) > 1), argv, text, group, greeting)
    starter.work(WORKER_SIGNALS + [signal.SIGQUIT, signal.SIGTSTP])
    return 0


# ---------------------------------------------------------------------------
# Python: cexec.run and cexec.Executor
# ---------------------------------------------------------------------------
# A program gets this with "import cexec".  The applets do not use it.
#
# run() starts the client as a child process.  An Executor has a Pool of Lanes.  Each Lane is one
# job, whose command is the Python of a worker (cservice APP python3 /dev/fd/3), with descriptors:
#
#     0  calls    frames to the worker          3  LANE_PROGRAM, which the worker's Python runs
#     1  results  frames from the worker        4  the output of the functions
#     2  messages of cexec and of Python: the reason, if the lane fails
#
#     client (Pool, Lane)                            worker (LANE_PROGRAM)
#       | SETUP ------------------------------------>  |
#       |  <------------------------------------ READY |  takes calls
#       | CALL 0: the initializer, if there is one --->  |
#       |  <---------------------- VALUE 0 or RAISED 0 |  then the lane is up, or ends
#       | MAIN, once a call needs it ----------------->  |
#       | FUNCTION, if map() has it for many calls --->  |
#       | CALL --------------------------------------->  |
#       |  <---------------------- IMPORT name, if any |  for a module beside the main program
#       | MODULE source ------------------------------>  |
#       |  <----------------------------------- LOADED |  the main module has run
#       |  <-------------------------- VALUE or RAISED |  or FAILED: the main module can't be run
#       |                                              |  or UNREAD: a module that the call needs cannot be loaded
#       | RECALL, if another lane has nothing to do -->  |
#       |  <-------------- BACK, the calls not begun   |
#       | END --------------------------------------->  |  exits
#
# With pickle's protocol 5 (Python 3.8), large bytes, memoryviews and numpy arrays travel outside of the pickle,
# each as a frame FIXED, or WRITABLE if the receiver may change it, before the frame with the pickle.
#
# The worker trusts the client, because its command runs what it reads.  The client does not
# trust the worker: results are only data (see Reader), and a frame out of place ends the lane.
# One thread does all the work of a pool; other threads only call submit() and shutdown().
#
# A lane ends when its worker is lost, or its Python dies: its client exits, and with the last pipe Lane.client_ended()
# calls Pool.lane_over().  This puts the lane's calls back into the queue, and another lane does them.  A call may be
# lost `retries` times; with the next loss it fails, with BrokenProcessPool.  If a lane may have begun a call, that was
# a try for all its calls, else for none.

__all__ = ["Executor", "Failed", "joblib", "run"]
__version__ = VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:                   # what mypy and editors know of the public names; the applets import no typing
    import concurrent.futures
    from subprocess import CompletedProcess
    from typing import IO, Any, Callable, ContextManager, Iterable, Iterator, Mapping, Optional, TypeVar, Union
    AnyPath = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]"]
    AnyStream = Union[None, int, IO[Any]]
    Result = TypeVar("Result")

    def run(*words: AnyPath, hosts: Union[None, str, Iterable[str]] = None, input: Union[None, str, bytes] = None,
            stdin: AnyStream = None, stdout: AnyStream = None, stderr: AnyStream = None, capture_output: bool = False,
            env: Optional[Mapping[str, str]] = None, timeout: Optional[float] = None, check: bool = False,
            text: Optional[bool] = None, encoding: Optional[str] = None, errors: Optional[str] = None,
            universal_newlines: Optional[bool] = None, pass_fds: Iterable[int] = (), put: Iterable[AnyPath] = (),
            get: Iterable[Union[str, bytes]] = ()) -> "CompletedProcess[Any]": ...

    class Executor(concurrent.futures.Executor):
        def __init__(self, pub: Optional[AnyPath] = None, max_workers: Optional[int] = None,
                     allow: Iterable[str] = (), retries: int = 3, *, hosts: Union[None, str, Iterable[str]] = None,
                     trust: bool = False, send: Iterable[str] = (), threads: Optional[int] = 1,
                     mp_context: None = None, initializer: Optional[Callable[..., Any]] = None,
                     initargs: Iterable[Any] = (), max_tasks_per_child: Optional[int] = None,
                     python: Union[str, "os.PathLike[str]"] = "python3") -> None: ...

        def map(self, fn: Callable[..., Result], *iterables: Iterable[Any], timeout: Optional[float] = None,
                chunksize: int = 1, buffersize: Optional[int] = None) -> Iterator[Result]: ...

    def joblib(*arguments: Any, **options: Any) -> ContextManager[Executor]: ...

LANE_IDLE_SECONDS = 3.0             # a lane without a call for so long gives its slot back,
LANE_SECONDS = 60.0                 # and so does a busy lane after this, for other clients and draining workers
LANE_FAILURES = 3                   # calls fail when so many lanes in a row have ended before a worker had them,
FAULTS_MAX = 256                    # or when so many workers cannot do the calls
SEARCH_PAUSE = 10.0                 # seconds until the next search for more workers, after one that found none
AHEAD_SECONDS = 0.010               # a lane gets further calls before it has done the first: for so many seconds,
AHEAD_MAX = 32                      # and so many calls, at most,
AHEAD_BYTES = 64 * 1024             # and none while so many bytes wait to be sent
RECALL_SECONDS = 0.050              # if a call takes longer, idle lanes get the calls that wait for it
TICK_SECONDS = 0.1
READY_SECONDS = 10.0                # from GO until a worker's Python must be ready,
LATE_SECONDS = 1.0                  # and until others are looked for, if it is not
REJECT_SECONDS = 10.0               # a worker that cannot do the calls gets none for so long, then longer: see Avoided
LET_GO_SECONDS = 1.0                # after a client's end, what it wrote must have been read
PRINTED_MAX = 64 * 1024             # bytes of a line that a function prints
WORDS_SHOWN = 1000                  # characters of what an exception from a worker says, in messages
NAMES_MAX = 10000                   # modules beside the main program

LANE_HEAD = struct.Struct("!cQ")    # a frame's kind, and the length of its contents
CALL_NUMBER = struct.Struct("!Q")   # CALL, VALUE and RAISED begin with it; BACK is a list of it
FUNCTION_NUMBER = struct.Struct("!Q")           # FUNCTION begins with it; it is next in CALL, or 0
FUNCTIONS_KEPT = 4                  # by a lane: the last of them.  LANE_PROGRAM has the same number
LARGE = 64 * 1024                   # bytes from which a buffer is no part of the pickle
TEXT_SIZE = struct.Struct("!I")     # RAISED and FAILED: the size of a text, the text, and the exception's pickle
SETUP, MAIN, FUNCTION, CALL, MODULE, RECALL, END = b"S", b"M", b"P", b"C", b"O", b"R", b"E"
READY, IMPORT, LOADED, VALUE, RAISED, UNREAD, FAILED, BACK = b"W", b"I", b"L", b"V", b"X", b"U", b"F", b"B"
FIXED, WRITABLE = b"D", b"A"        # both ways
SMALL_FRAMES = {READY: 1024, IMPORT: 1024, LOADED: 0, BACK: 8 * AHEAD_MAX}     # bytes, at most

MODULE_DOC = """Run commands and Python functions on the least loaded machine of the network.

    import cexec

    hosts = ["box1", "box2"]                        # names for ssh; python3 there is all that they need
    done = cexec.run("sort", hosts=hosts, input=b"b\\na\\n", stdout=subprocess.PIPE)
    done.stdout                                     # b"a\\nb\\n", sorted by one of them

    with cexec.Executor(hosts=hosts) as pool:       # a concurrent.futures.Executor
        for score in pool.map(simulate, seeds):     # as many at a time as the hosts have CPUs
            print(score)

Workers that stay have a public key instead of hosts, made by ckeygen:

    cexec.run("sort.pub", input=b"b\\na\\n")          # workers run: cservice sort sort
    cexec.Executor("py.pub")                        # cservice -u nobody py python3 /dev/fd/3

If the workers are not in this network, the environment variable CEXEC_GROUP has their addresses.
A worker is not trusted: see allow in Executor.  The manual pages are cexec(1), cservice(1), and
cexec(7) with the security model.
"""

# The program that a lane's Python runs.  It uses nothing of this file, which the worker may not have.
LANE_PROGRAM = r'''
import copyreg, functools, io, linecache, operator, os, pickle, queue, struct, sys, threading, traceback, types
from importlib.machinery import ModuleSpec

HEAD, NUMBER, SIZE = struct.Struct("!cQ"), struct.Struct("!Q"), struct.Struct("!I")
calls, answers = [getattr(queue, "SimpleQueue", queue.Queue)() for _ in range(2)]
writing, asking, mains = threading.Lock(), threading.Lock(), []
this, pid, names, protocol = sys.modules["__main__"], os.getpid(), set(), 4     # this: kept, or its globals would go
functions, KEPT, LARGE = {}, 4, 1 << 16
trusted, made = False, None     # made: the stub's, by whose name the client knows what it makes by itself
blank = types.ModuleType("__main__")    # for a main program that is not sent; the classes of it that came by value
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS",
           "VECLIB_MAXIMUM_THREADS")
ATOMS = frozenset([int, float, str, bytes, bool, type(None)])
STUB = """
class Failed(OSError):
    pass

def refuse(*arguments, **keywords):
    raise RuntimeError("cexec cannot be used on a worker: if the main program makes an Executor or calls run(), it "
                       "must do so below if __name__ == '__main__':")

run = refuse

class Executor:                     # a class: the program may have one of its own from it, or name it in annotations
    __init__ = refuse

def call_each(function, rows):
    return [function(*row) for row in rows]

def cached(function, *options):
    from functools import lru_cache
    return lru_cache(*options)(function)

def made():
    pass
"""

def move_away():
    """Moves our ends of 0 and 1 to other numbers, so that what a function prints cannot get into the frames."""
    source, target = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((null, 0), (4, 1), (4, 2)):
        os.dup2(old, new)
    for fd in {null, 3, 4} - {0, 1, 2}:
        os.close(fd)
    sys.stdout = open(1, "w", 1, "utf-8", "backslashreplace", closefd=False)
    sys.stderr = open(2, "w", 1, "utf-8", "backslashreplace", closefd=False)
    return os.fdopen(source, "rb", 1 << 18), target

def send(kind, *parts):
    parts = (HEAD.pack(kind, sum(map(len, parts))),) + parts
    with writing:
        for part in parts if len(parts[-1]) >= LARGE else [b"".join(parts)]:
            data = memoryview(part)
            while data:
                data = data[os.write(target, data):]

def receive():
    """Reads frames in its own thread, so that the end of the client ends us, whatever the function does."""
    buffers = []                # for the next function or call
    while True:
        head = source.read(HEAD.size)
        if len(head) < HEAD.size:
            os._exit(1)
        kind, size = HEAD.unpack(head)
        if kind == b"A":
            data = bytearray(size)
            source.readinto(data)
        else:
            data = source.read(size)
        if kind in (b"A", b"D"):
            buffers.append(data)
        elif kind == b"P":
            functions[data[:NUMBER.size]] = data, buffers
            buffers = []
            if len(functions) > KEPT:
                del functions[next(iter(functions))]            # the first; the client does the same
        elif kind == b"C":          # with its function: this may be forgotten before the call begins
            calls.put((kind, data, functions.get(data[NUMBER.size:2 * NUMBER.size]), buffers))
            buffers = []
        elif kind == b"O":
            answers.put(data)
        elif kind == b"M":
            mains.append(data)      # not one of the calls, which RECALL takes back
        elif kind == b"R":
            send(b"B", *take_back())
        else:
            calls.put((kind, data, None, None))
            if kind == b"E":
                return

def take_back():
    try:
        while True:
            yield calls.get_nowait()[1][:NUMBER.size]
    except queue.Empty:
        pass

def loads(data, offset, buffers):
    data, more = memoryview(data)[offset:], {"buffers": buffers} if buffers else {}
    try:
        return pickle.loads(data, **more)
    except ModuleNotFoundError as error:        # Python 3.13 calls its module of paths so
        if error.name != "pathlib._local":
            raise
    import pathlib
    sys.modules["pathlib._local"] = pathlib
    return pickle.loads(data, **more)

class Source:
    """Finds and loads modules that the client has beside its main program."""
    def __init__(self, text=b""):
        self.text = text

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in names or os.getpid() != pid:
            return None
        with asking:
            send(b"I", name.encode())
            found = pickle.loads(answers.get())
        if found is None:
            return None
        text, filename, is_package = found
        if text is None:            # a directory without __init__.py: a module comes first, as Python has it
            for finder in sys.meta_path:
                find = getattr(finder, "find_spec", None)
                own = find and not isinstance(finder, Source) and find(name, path)
                if own and own.loader:
                    return None
        spec = ModuleSpec(name, Source(text or b""), origin=filename, is_package=is_package)
        spec.has_location = True
        return spec

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        exec(compile(self.text, module.__file__, "exec", dont_inherit=True), module.__dict__)
        if module.__name__ == make_function.__module__:
            module._make_function = make_function

    def get_source(self, name):
        import importlib.util
        return importlib.util.decode_source(self.text)

def make_function(code, names, *more):
    """As cloudpickle's; but functions of the main program share their globals, so what an initializer sets lasts."""
    names["__builtins__"] = __builtins__
    if names.get("__name__") == "__main__":
        vars(blank).update(names)
        names = vars(blank)
    return types.FunctionType(code, names, *more)

make_function.__module__, make_function.__qualname__ = "cloudpickle.cloudpickle", "_make_function"

class NoSpawn:
    """Fails what cannot work: multiprocessing's spawn and forkserver would look for the main program's file here."""
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in ("multiprocessing.popen_spawn_posix", "multiprocessing.popen_forkserver"):
            raise RuntimeError("spawn and forkserver do not work in a function on a worker, which has not the main "
                               "program's file: use multiprocessing.get_context('fork')")

class Ways(dict):
    """{a class: how its objects are pickled}: calls of made() for what the client makes by the name of its class."""
    def __missing__(self, kind):
        if issubclass(kind, type):
            raise KeyError(kind)    # a class goes by its name
        if kind.__module__ == "__main__":
            setattr(blank, kind.__qualname__, kind)     # where pickle looks whether the name is right
        numpy, enum, zones = map(sys.modules.get, ("numpy", "enum", "zoneinfo"))
        way = copyreg.dispatch_table.get(kind) or operator.methodcaller("__reduce_ex__", protocol)
        if trusted:
            pass
        elif numpy and (kind is numpy.ndarray or issubclass(kind, (numpy.generic, numpy.dtype))):
            way = functools.partial(of_numpy, numpy, way)
        elif zones and kind is zones.ZoneInfo:
            way = lambda value: (kind, (value.key,))
        elif enum and issubclass(kind, enum.Enum):
            way = lambda value: (made, ("enum",) + name_of(kind) + (value._name_, value._value_))
        elif issubclass(kind, BaseException) and kind.__module__ != "builtins":
            way = of_exception
        elif issubclass(kind, tuple) and hasattr(kind, "_fields"):
            way = lambda value: (made, ("tuple",) + name_of(kind) + (tuple(value),), getattr(value, "__dict__", None))
        elif hasattr(kind, "__dataclass_fields__") and kind not in copyreg.dispatch_table and not has_own_way(kind):
            way = of_dataclass
        self[kind] = way
        return way

def name_of(kind):
    return kind.__module__, kind.__qualname__

def has_own_way(kind):
    """Whether a dataclass says how it is pickled, so that the client must allow it."""
    pairs = [(getattr(kind, name, None), getattr(object, name, None)) for name in (
        "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")]
    return any(mine is not common and not getattr(mine, "__name__", "").startswith("_dataclass_")
               for mine, common in pairs)

def of_dataclass(value):
    kind, state = type(value), object.__reduce_ex__(value, 2)[2]
    if type(state) is list:         # of one that is frozen and has slots
        state = {name: getattr(value, name) for name in kind.__dataclass_fields__ if hasattr(value, name)}
    if type(state) is dict:         # not what a cached_property keeps
        state = {name: state[name] for name in state if name in kind.__dataclass_fields__ or
                 not hasattr(getattr(kind, name, None), "__set_name__")}
    return made, ("dataclass",) + name_of(kind), state

def of_exception(value):
    kind = base = type(value)
    while base.__module__ != "builtins":
        base = base.__base__
    _, args, *state = base.__reduce__(value)
    return (made, ("exception",) + name_of(kind) + (args,), *state)

def of_numpy(numpy, way, value):
    import numpy.lib.format as form
    dtype = value if isinstance(value, numpy.dtype) else value.dtype
    if dtype.hasobject or not dtype.itemsize or dtype.kind not in "biufcSUmMV" or dtype.type is numpy.record:
        return way(value)
    what = form.dtype_to_descr(dtype) if dtype.names else dtype.str
    if (form.descr_to_dtype(what) if dtype.names else numpy.dtype(what)) != dtype:
        return way(value)           # what a dtype's text does not tell
    if value is dtype:
        return made, ("dtype", what, None)
    if isinstance(value, numpy.generic):
        return made, ("scalar", what, value.tobytes())
    order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
    flat = numpy.ascontiguousarray(value.T if order == "F" else value).reshape(-1).view("u1")
    return made, ("array", what, value.shape, order, pickle.PickleBuffer(flat) if protocol > 4 else flat.tobytes())

def dumps(value, buffers=None):
    """Returns the pickle; what travels outside of it is appended to buffers, if that is a list."""
    options = {}
    if type(value) is memoryview or type(value) is bytes and len(value) >= LARGE:
        whole = protocol < 5 or buffers is None or type(value) is memoryview and not value.contiguous
        value = bytes(value) if whole else pickle.PickleBuffer(value)
    if type(value) in ATOMS:
        return pickle.dumps(value, protocol)
    if protocol > 4 and buffers is not None:
        options["buffer_callback"] = lambda buffer: buffer.raw().nbytes < LARGE or buffers.append(buffer.raw())
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol, **options)
    pickler.dispatch_table = ways
    try:
        pickler.dump(value)
    except Exception:
        if not trusted or "cloudpickle" not in sys.modules:
            raise
        del (buffers or [])[:]
        return sys.modules["cloudpickle"].dumps(value, protocol)
    return file.getbuffer()

ways = Ways()

def set_up(data):
    global protocol, trusted, made
    settings = pickle.loads(data)
    names.update(settings["names"])
    if settings["python"] != sys.version_info[:2]:
        names.discard("cloudpickle")        # it is sent for calls by value, which this Python does not get
    for name in THREADS if settings["threads"] else ():     # before a library is loaded that reads it
        os.environ.setdefault(name, str(settings["threads"]))
    protocol = min(settings["protocol"], pickle.HIGHEST_PROTOCOL)
    sys.argv = settings["argv"]
    sys.path[:] = [path for path in sys.path if not path.startswith(("/dev/", "/proc/"))]
    sys.meta_path.insert(2, Source())       # after the finders of built-in and frozen modules
    sys.meta_path.insert(0, NoSpawn)
    # A traceback shows no lines of this program: by now /dev/fd/3 is another file, and to read it may block for ever.
    ours = set_up.__code__.co_filename
    linecache.cache[ours] = 0, None, [], ours
    stub = types.ModuleType(settings["stub"])
    exec(STUB, stub.__dict__)
    sys.modules[settings["stub"]], sys.modules["__main__"] = stub, blank
    trusted, made = settings["trust"], stub.made
    send(b"W", ("cexec-lane 1 %d %d.%d.%d %s" % ((pickle.HIGHEST_PROTOCOL,) + sys.version_info[:3]
                                                + (os.uname().nodename,))).encode("utf-8", "replace"))

def run_main(data):
    text, path, package = pickle.loads(data)
    module = types.ModuleType("__mp_main__")
    module.__file__, module.__package__, module.__loader__ = path, package, Source(text)
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module
    module.__loader__.exec_module(module)
    send(b"L")

def report(kind, number, error):
    trace = error.__traceback__ and error.__traceback__.tb_next
    try:
        text = "".join(traceback.format_exception(type(error), error, trace))
    except Exception as reason:     # a SyntaxError can have anything as its text
        text = "".join(traceback.format_tb(trace)) + "%s (it cannot be shown: %s)" % (
            type(error).__name__, type(reason).__name__)
    text = text.encode("utf-8", "backslashreplace")
    try:
        data = dumps(error)
    except BaseException:
        data = b""
    send(kind, number, SIZE.pack(len(text)), text, data)

def work(number, data, shared, buffers):
    """Does a call.  A function of many calls is unpickled for each: what one changes in it, no other sees."""
    result, kind = [], b"U"
    try:
        try:
            if shared:
                own = [bytearray(buffer) if type(buffer) is bytearray else buffer for buffer in shared[1]]
                function, keywords = loads(shared[0], NUMBER.size, own), {}
                arguments = loads(data, 2 * NUMBER.size, buffers)
            else:
                function, arguments, keywords = loads(data, 2 * NUMBER.size, buffers)
        except AttributeError as error:
            if sys.modules["__main__"] is blank or not (
                    "'__mp_main__'" in str(error) or "'__main__'" in str(error)):
                raise
            raise AttributeError("%s: what is defined below if __name__ == '__main__': is not there on a worker, so "
                                 "define it above" % error) from None
        del data
        kind = b"X"
        value = function(*arguments, **keywords)
        value = dumps(value if number.strip(b"\0") else None, result)       # not what an initializer returns
    except BaseException as error:
        report(kind if isinstance(error, (ImportError, SyntaxError)) else b"X", number, error)
    else:
        for buffer in result:
            send(b"D" if buffer.readonly else b"A", buffer)
        send(b"V", number, value)

source, target = move_away()
threading.Thread(target=receive, daemon=True).start()
while True:
    kind, data, shared, buffers = calls.get()
    if kind == b"E":
        break
    try:
        if kind == b"S":
            set_up(data)
        else:
            while mains:
                run_main(mains.pop())
            work(data[:NUMBER.size], data, shared, buffers)
    except BaseException as error:
        report(b"F", b"", error)
        os._exit(1)
    del data, shared, buffers
'''


class Failed(OSError):
    """cexec itself failed: no worker was found, or it was lost, or it cannot run its command.

    str() of it is cexec's message.  code is cexec's exit status: 111 may be tried again; 100 is
    permanent (a bad key, variable or setting); 126 and 127 mean that the command cannot be run, or
    does not exist.  stdout and stderr are the output that run() had captured, or None.
    """

    def __init__(self, message, code=EXIT_TEMPORARY, stdout=None, stderr=None):
        super().__init__(message)
        self.code, self.stdout, self.stderr = code, stdout, stderr


def as_failed(error):
    """The Failed for a Fatal."""
    return Failed(str(error), error.code)


def run(*words, hosts=None, input=None, stdin=None, stdout=None, stderr=None, capture_output=False, env=None,
        timeout=None, check=False, text=None, encoding=None, errors=None, universal_newlines=None, pass_fds=(), put=(),
        get=()):
    """Run a command on a worker, as subprocess.run() runs one here: run(pub, *arguments), or run(*command, hosts=...).

    pub is the path of an application's public key.  The arguments are for its command, if the
    worker takes any (cservice -a).  With hosts, a list of names for ssh, the words are the command;
    workers are started for this call alone, as by cexec -s.  env has variables for the command,
    which sees KEY as PEER_KEY.

    put is a list of files and directories for the job's directory, get a list of patterns of files to
    bring from there into the current directory, as by cexec -i and -g (the worker needs cservice -d).

    input, stdin, stdout, stderr, capture_output, check, text, encoding, errors and pass_fds are
    those of subprocess.run(), on every Python.  The descriptors in pass_fds have the same numbers
    in the command.  After timeout seconds the command gets TERM, a second later HUP, and five
    seconds later KILL.

    Returns a subprocess.CompletedProcess: its args are [*words], its returncode is
    the command's exit status, or -N if signal N killed it.

    Raises Failed if cexec failed, so a returncode is always the command's;
    subprocess.TimeoutExpired; subprocess.CalledProcessError with check; ValueError for
    arguments that do not go together.
    """
    if input is not None and stdin is not None or capture_output and (stdout is not None or stderr is not None):
        raise ValueError("stdin and input, or stdout or stderr and capture_output, do not go together")
    if not words or hosts is not None and not hosts:
        raise TypeError("run() needs a public key, or hosts and a command")
    if any(isinstance(word, (list, tuple)) for word in words):
        raise TypeError("run() takes each word as an argument, and no list: run(*words)")
    piped = subprocess.PIPE if capture_output else None
    for paths in put, get:
        if isinstance(paths, (str, bytes, os.PathLike)):
            raise TypeError("put and get are lists of paths, not one: [%r]" % paths)
    options = [word for option, paths in (("-i", put), ("-g", get)) for path in paths
               for word in (option, os.fsdecode(path))]
    pub, *arguments = words if hosts is None else (None, *words)
    if hosts is not None:
        options += [word for host in ([hosts] if isinstance(hosts, str) else hosts) for word in ("-s", host)]
    child, reader = start_client(
        pub, variables(env) + (["--"] + list(arguments) if arguments else []), options, pass_fds=pass_fds,
        stdin=stdin if input is None else subprocess.PIPE, stdout=piped if stdout is None else stdout,
        stderr=piped if stderr is None else stderr,
        universal_newlines=bool(text or universal_newlines), encoding=encoding, errors=errors)
    args = list(words)
    with open(reader, "rb") as file, child:
        out, err = communicate(child, args, input, timeout)
        report = file.read()
    try:
        code = returncode_of(report, child.returncode)
    except Failed as failed:
        raise Failed(str(failed), failed.code, out, err) from None
    if check and code:
        raise subprocess.CalledProcessError(code, args, out, err)
    return subprocess.CompletedProcess(args, code, out, err)


def communicate(child, args, input, timeout):
    """The child's output and errors, when it has ended.  Ends it after the timeout: subprocess.TimeoutExpired."""
    with on_failure(child.kill):
        try:
            return child.communicate(input, timeout)
        except subprocess.TimeoutExpired:
            child.terminate()
        try:
            out, err = child.communicate(timeout=1.0)
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
        raise subprocess.TimeoutExpired(args, timeout, out, err)


def variables(env):
    """The words KEY=VALUE of a dictionary.  Raises Failed."""
    for key in map(os.fsdecode, env or {}):
        if not is_variable(key):
            raise Failed("%s: not a variable: letters, digits and _, and no digit first" % key, EXIT_USAGE)
    return ["%s=%s" % (os.fsdecode(key), os.fsdecode(value)) for key, value in (env or {}).items()]


def checked_path(pub):
    """The path of a public key, as text.  Raises TypeError."""
    try:
        return os.fsdecode(pub)
    except TypeError:
        raise TypeError("the path of a public key comes first, as in Executor('py.pub', max_workers=4), or else "
                        "hosts=[...], and not %r" % (pub,)) from None


def start_client(pub, words, options=(), pass_fds=(), numbered=(), kept=(), env=None, **others):
    """Starts cexec as a child.  Returns (its Popen, the reading end of a pipe with its status line).

    pub: the path of a public key; None if the options have -s.
    numbered: (our descriptor, its number there) for descriptors that are carried besides pass_fds; kept: those that
    only the child itself needs.
    """
    numbers = list(pass_fds) + [number for _, number in numbered]
    floor = max([2] + numbers) + 1
    argv = child_words("cexec", numbered) + list(options)
    if pub is not None:
        pub = checked_path(pub)
        argv.append("./" + pub if pub.startswith("-") else pub)
    reader, writer = os.pipe()
    # From the floor up cexec carries nothing
    with on_failure(os.close, reader), closing(lifted_away(writer, floor)) as report:
        env = dict(env or os.environ, CEXEC_MAXFD=str(floor), CEXEC_FD_FOR_ERRORS=str(report))
        child = subprocess.Popen(argv + words, env=env, **dict(
            others, pass_fds=[report] + list(kept) + list(pass_fds) + [old for old, _ in numbered]))
    return child, reader


def returncode_of(report, code):
    """The command's returncode, from cexec's status line; code is cexec's own.  Raises Failed if there is none."""
    words = report.decode("utf-8", "replace").rstrip("\n").split(" ", 3)
    what, _, value = words[3].partition("=") if len(words) == 4 else ("", "", "")
    if what == "exited":
        return int(value)
    if what == "signalled":
        return -int(value)
    worker, _, seconds = " ".join(words[:2]).replace("worker=", "").partition(" seconds=")
    raise Failed({
        "failed": value,
        "lost": "worker %s lost after %s s: %s; the command may have run" % (worker, seconds, value),
        "notstarted": "worker %s cannot run its command: it %s (exit status %d)" % (
            worker, {EXIT_NOT_FOUND: "is not there", EXIT_CANNOT_RUN: "is there and cannot be run"}.get(
                code, "cannot be started now"), code),
        "ended": "cexec was ended by signal %s" % value,
    }.get(what, "cexec ended by signal %d" % -code if code < 0 else
          "cexec ended with status %d: its standard error says why" % code),
        code if code in (EXIT_USAGE, EXIT_CANNOT_RUN, EXIT_NOT_FOUND) else EXIT_TEMPORARY)


# Executor: the main program, for the workers

def library_paths():
    """The directories of Python and of installed packages: nothing in them is sent."""
    return [os.path.realpath(path) for name, path in sysconfig.get_paths().items() if name.endswith("lib")]


class Program:
    """The source of the main program, and of the modules beside it, for workers that ask for them.

    A worker is not trusted.  So it gets modules only from the roots: the directory of the main program, or the current
    one if that has no file; sys.path[0]; and the directories and zip files in send.  A module comes from where an
    import finds it here: what lies before a root in sys.path hides the root's modules, as it does here.
    cloudpickle is sent too, if it is installed here: calls by value need it there.
    """

    def __init__(self, send=()):
        main = sys.modules["__main__"]
        path, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
        name = spec.name if spec else "main"
        self.path = self.text = None
        self.package = getattr(main, "__package__", None)
        self.cloudpickle = cloudpickle_directory()
        # A package's __main__ has no `if __name__ == "__main__"`: like multiprocessing, we do not send it.
        self.is_package = name == "__main__" or name.endswith(".__main__")
        is_source = path and (path.endswith(".py") or not spec and os.path.isfile(path) and not path.endswith(".pyc"))
        if is_source and not self.is_package:
            self.path = os.path.abspath(path)
        # What is typed at a prompt belongs to the main program too, and is not in its file
        if self.path and not (self.cloudpickle and (sys.flags.interactive or hasattr(sys, "ps1"))):
            with open(self.path, "rb") as file:
                self.text = file.read()
        here = os.path.dirname(os.path.realpath(path)) if self.path else None
        for _ in range(name.count(".") if here else 0):     # python -m package.module
            here = os.path.dirname(here)
        self.library, self.sent, self.zips = library_paths(), {}, {}
        paths = list(map(os.path.realpath, sys.path))       # "" is this directory
        roots = [here] if here else [os.getcwd()] if not path or path.startswith("<") else []
        if not may_import_beside_main():
            roots = [root for root in roots if root in paths]
        self.roots = []
        for root in roots + paths[:1] + self.named(send):
            if root not in self.roots and not is_below(root, self.library) and self.has_modules(root):
                self.roots.append(root)
        self.paths = paths + self.roots

    def named(self, send):
        """The real paths of what the program names.  Raises TypeError, or ValueError if modules cannot be sent."""
        if isinstance(send, (str, bytes)):
            raise TypeError("send is a list of directories and zip files, not one: send=[%r]" % send)
        roots = [os.path.realpath(os.fsdecode(root)) for root in send]
        for root in roots:
            if is_below(root, self.library):
                raise ValueError("%s belongs to Python: what is installed here must be installed there too" % root)
            if not self.has_modules(root):
                raise ValueError("%s is no directory and no zip file with modules" % root)
        return roots

    def has_modules(self, root):
        """Whether modules can be in it.  Notes the names in a zip file."""
        if os.path.isfile(root):
            try:
                with zipfile.ZipFile(root) as file:
                    self.zips[root] = frozenset(os.path.join(root, name) for name in file.namelist())
            except (OSError, zipfile.BadZipFile):
                return False
        return root in self.zips or os.path.isdir(root)

    def names(self):
        """The names of top-level modules and packages: a worker asks for no others."""
        names = {name.partition(".")[0] for name in self.sent}.union(["cloudpickle"] if self.cloudpickle else [])
        for root in self.roots:
            try:
                found = {path[len(root) + 1:].partition("/")[0] for path in self.zips.get(root, ())} or os.listdir(root)
            except OSError:         # the directory was removed
                found = []
            for entry in found:
                name, dot, suffix = entry.partition(".")
                if name.isidentifier() and (suffix == "py" or not dot and self.is_directory(os.path.join(root, name))):
                    names.add(name)
        return sorted(names)[:NAMES_MAX]

    def module(self, name):
        """Returns (source, path, whether it is a package) of a module; None if it is not below our directories.

        What was sent first stays, whatever is edited: all workers must have the same.
        """
        if name not in self.sent:
            found = self.find(name)
            if found is None:
                return None
            self.sent[name] = found
        return self.sent[name][0]

    def find(self, name):
        """Returns (what module() does, where its own modules are), from the files.  Raises what open() or zipfile does.

        The source of a directory without __init__.py is None, and as in Python there may be several of one name.
        A package must have been sent before what is in it.
        """
        parent, _, last = name.rpartition(".")
        if not last.isidentifier() or parent and parent not in self.sent:
            return None
        bare = []
        for directory in self.sent[parent][1] if parent else self.paths:
            base = os.path.join(directory, last)
            for path, is_package in ((os.path.join(base, "__init__.py"), True), (base + ".py", False)):
                if self.is_file(path):
                    ours = parent or directory in self.roots or base == self.cloudpickle
                    return ((self.read(path), path, is_package), [base]) if ours and self.holds(path) else None
            if (parent or directory in self.roots) and self.is_directory(base) and self.holds(base):
                bare.append(base)
        return ((None, bare[0], True), bare) if bare and (parent or not is_module(name)) else None

    def holds(self, path):
        """Whether a path, after all links are followed, is below a root and in no library."""
        path = os.path.realpath(path)
        return is_below(path, [self.cloudpickle] if self.cloudpickle else []) or (
            is_below(path, self.roots) and not is_below(path, self.library))

    def zip_of(self, path):
        return next((root for root in self.zips if is_below(path, [root])), None)

    def is_file(self, path):
        root = self.zip_of(path)
        return path in self.zips[root] if root else os.path.isfile(path)

    def is_directory(self, path):
        root = self.zip_of(path)
        return any(is_below(name, [path]) for name in self.zips[root]) if root else os.path.isdir(path)

    def read(self, path):
        root = self.zip_of(path)
        if not root:
            with open(path, "rb") as file:
                return file.read()
        with zipfile.ZipFile(root) as file:
            return file.read(path[len(root) + 1:])


def may_import_beside_main():
    """Whether an import looks in the main program's directory: not with python3 -P or -I."""
    return not (sys.flags.isolated or getattr(sys.flags, "safe_path", False))


def spec_of(name):
    """Returns the ModuleSpec of what an import here would find; None if that is nothing."""
    import importlib.util
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def is_module(name):
    """Whether an import here would find a module, perhaps by a finder of its own, and not only directories."""
    spec = spec_of(name)
    return bool(spec and spec.loader and spec.origin not in (None, "namespace"))


def is_below(path, tops):
    """Whether a path is one of these, or below one of them."""
    return any(is_within(path, top) for top in tops)


def cloudpickle_directory():
    """The directory of the package cloudpickle; None if it is not installed here."""
    spec = spec_of("cloudpickle")
    paths = spec and spec.submodule_search_locations
    return os.path.realpath(list(paths)[0]) if paths else None


def call_each(function, rows):
    """The function that map() with a chunksize submits; LANE_PROGRAM has a copy for the worker."""
    return [function(*row) for row in rows]


def cached(function, *options):
    """What functools.lru_cache makes of a function; LANE_PROGRAM has a copy for the worker."""
    return functools.lru_cache(*options)(function)


# Executor: the results, from a worker that is not trusted
#
# A result travels as a pickle of protocol 4 or 5.  If it names nothing, and hashes nothing that is costly, pickle's C
# code reads it (see is_plain); else Reader does.  Reader has only the opcodes that pickle writes for data.  No opcode
# imports, fetches an attribute or changes a class, and none calls what a worker names: a class is only the key to a
# maker here, and only an object that a maker has just made takes a state.  The makers check what they get.
#
#     what                                          how it is sent               who makes it here
#     builtin data and exceptions, the standard     as pickle does               MAKERS
#     library's types for data
#     dataclasses, named tuples, enums,             made(kind, module, name, ..) Reader.own
#     exceptions; numpy without objects             (Ways in LANE_PROGRAM)
#     classes in allow                              as pickle does               their own code
#     anything, with trust=True                     as pickle does               pickle

DATA_TYPES = frozenset("bool bytearray bytes complex dict float frozenset int list object range set slice str tuple "
                       "Ellipsis NotImplemented".split())
PLAIN = frozenset([bool, bytearray, bytes, complex, dict, float, int, list, set, str, type(None)])   # no tuple inside
KEYS = frozenset([bool, bytes, float, str, type(None)])     # keys whose hash costs nothing, and is nobody else's,
                                    # but for not-a-number: before Python 3.10 all of them have one, and none is equal
TUPLES_DEEP = 500                   # tuples in tuples: hash() in C has no limit of its own
FLAGS_KEPT = 1000                   # values that an IntFlag has without members
WORK_MIN = 100000                   # steps that reading a result may take, and ten more for each of its bytes
PATTERN_MAX = 4096                  # characters of a result's regular expressions: to compile one may take long
RANGE_LIKE = 128                    # characters that a range counts for if case is ignored: it is gone through
LINKS_MAX = 1000                    # deques in deques: C code frees one from inside the other, without a limit
NO_DATA = frozenset(                # modules whose classes can call, fetch an attribute, import, open or start
    "_ctypes _frozen_importlib _frozen_importlib_external _io _operator _pickle _socket _sqlite3 _thread asyncio bdb "
    "builtins bz2 code codeop concurrent copyreg ctypes dbm fileinput ftplib functools gc gzip imaplib imp importlib "
    "inspect io logging lzma mailbox mmap multiprocessing nt numpy operator os pdb pickle pkgutil poplib posix pty "
    "runpy select selectors shelve signal site smtplib socket socketserver sqlite3 ssl subprocess sys tarfile "
    "telnetlib tempfile threading timeit trace types unittest urllib weakref webbrowser wsgiref xmlrpc zipfile "
    "zipimport".split())
SHORT = 200                         # bytes: such a result is not worth two looks
REFUSED_MAX = 20                    # names in a refusal
SIZED = frozenset([bytearray, bytes, dict, str, tuple])     # what is copied when an object is made of it

# What a metaclass could give otherwise
MODULE_OF, DICT_OF, MRO_OF, BASE_OF = (vars(type)[name] for name in ("__module__", "__dict__", "__mro__", "__base__"))


def malformed(what="a pickle that pickle does not write"):
    return ValueError(what)


def exactly(*kinds):
    """A maker that calls the class with at most so many arguments, each of exactly one of these types."""
    def make(reader, cls, *args):
        if len(args) > len(kinds) or not all(type(arg) in kind for arg, kind in zip(args, kinds)):
            raise malformed("%s of %s" % (cls.__name__, ", ".join(type(arg).__name__ for arg in args)))
        return cls(*args)
    return make


def make_path(reader, cls, *args):
    return exactly(*[(str,)] * len(args))(reader, cls, *args)


def make_fraction(reader, cls, *args):
    """From two integers, or the text that Python 3.10 and older send."""
    if len(args) == 1 and type(args[0]) is str and len(args[0]) < 10000:
        top, _, bottom = args[0].partition("/")
        args = int(top), int(bottom or 1)
    if [type(arg) for arg in args] != [int, int]:
        raise malformed()
    reader.spend(sum(arg.bit_length() for arg in args) ** 2 >> 20)      # for the greatest common divisor
    return cls(*args)


def make_moment(reader, cls, raw, zone=None):
    """A date, time or datetime from the bytes that each keeps; its own constructor would check only the month."""
    size = {"date": 4, "time": 6, "datetime": 10}[cls.__name__]
    if type(raw) is not bytes or len(raw) != size:
        raise malformed()
    if size == 4:
        return cls(int.from_bytes(raw[:2], "big"), *raw[2:])
    clock = raw[-6], raw[-5], raw[-4], int.from_bytes(raw[-3:], "big"), zone
    if size == 6:                   # the top bit of the hour is the fold
        return cls(clock[0] & 127, *clock[1:], fold=clock[0] >> 7)
    return cls(int.from_bytes(raw[:2], "big"), raw[2] & 127, raw[3], *clock, fold=raw[2] >> 7)


def make_counter(reader, cls, counts=None):
    made = cls()
    if type(counts) is dict:
        reader.fill(made, counts.items())
    return made


def make_default_dict(reader, cls, factory=None):
    if factory is not None and (type(factory) is not type or factory.__name__ not in DATA_TYPES
                                or MODULE_OF.__get__(factory) != "builtins"):
        raise malformed("a defaultdict of anything but a builtin type")
    return cls(factory)


def make_deque(reader, cls, items=(), most=None):
    if type(items) is not tuple or items or type(most) not in (int, type(None)):
        raise malformed()
    return cls((), most)


def make_structure(reader, cls, items, more):
    """Of numbers and texts alone, for such an object is a tuple."""
    if type(items) is not tuple or type(more) is not dict or not (
            KEYS | {int}).issuperset(map(type, [*items, *more, *more.values()])):
        raise malformed()
    return cls(items, more)


def make_type(reader, cls, one):
    """The type of None, Ellipsis or NotImplemented, which has no name of its own."""
    if one is not None and one is not Ellipsis and one is not NotImplemented:
        raise malformed()
    return type(one)


def make_pattern(reader, compile, text, flags):
    if type(text) not in (str, bytes) or type(flags) is not int or flags & re.DEBUG:
        raise malformed()
    words = text if type(text) is str else text.decode("latin-1")
    reader.patterns += len(text)
    if flags & re.IGNORECASE or re.search("[(][?][aLmsux]*i", words):
        reader.patterns += RANGE_LIKE * words.count("-")
    if reader.patterns > PATTERN_MAX:
        raise malformed("regular expressions of more than %d characters" % PATTERN_MAX)
    return re.compile(text, flags)


def make_array(reader, rebuild, cls, code, form, raw):
    import array
    if cls is not array.array or [type(code), type(form), type(raw)] != [str, int, bytes]:
        raise malformed()
    return rebuild(cls, code, form, raw)


def make_zone(reader, cls, key):
    """The key is part of a file's path, and of the name of a package."""
    if type(key) is not str or len(key) > 100 or not all(
            part.replace("-", "").replace("+", "").isalnum() for part in key.replace("_", "").split("/")):
        raise malformed()
    return cls(key)


def bare(check):
    """A maker of an object without arguments, whose state comes later: the attributes that check() returns."""
    def make(reader, cls, *args):
        if args:
            raise malformed()
        return reader.fresh(cls.__new__(cls), check)
    return make


def uuid_state(reader, made, state):
    number, safe = state.get("int"), state.get("is_safe")
    if type(number) is not int or not 0 <= number < 1 << 128 or type(safe) not in (int, type(None)):
        raise malformed()
    unknown = {"is_safe": uuid.SafeUUID(safe)} if hasattr(uuid, "SafeUUID") else {}     # not in Python 3.6
    return dict(unknown, int=number)


def of_kind(name, kind, inner=None):
    """A check that the state is one attribute of this name and type, with items of the inner type, if any."""
    def check(reader, made, state):
        value = state.get(name)
        if len(state) != 1 or type(value) is not kind or inner and not all(type(item) is inner for item in value):
            raise malformed()
        return state
    return check


def namespace_state(reader, made, state):
    return {name: state[name] for name in state if name.isidentifier() and not name.startswith("__")}


NUMBERS, TEXTS, SIMPLE = (int,), (str,), (int, float, str, type(None))
# The makers of the standard library's types, by the names that pickle has for the types, or for the functions that
# make them.  Each is called as maker(reader, what the name stands for, *arguments).
MAKERS = {
    "builtins": {"complex": exactly((float,), (float,)), "bytearray": exactly((bytes,)), "object": exactly(),
                 "range": exactly(NUMBERS, NUMBERS, NUMBERS), "slice": exactly(SIMPLE, SIMPLE, SIMPLE),
                 "type": make_type},
    "datetime": {"date": make_moment, "time": make_moment, "datetime": make_moment,
                 "timedelta": exactly(NUMBERS, NUMBERS, NUMBERS), "timezone": lambda reader, cls, *args: cls(*args)},
    "zoneinfo": {"ZoneInfo": make_zone},
    "decimal": dict({name: exactly() for name in (      # what its exceptions have in their args
        "Clamped ConversionSyntax DivisionByZero DivisionImpossible DivisionUndefined FloatOperation Inexact "
        "InvalidContext InvalidOperation Overflow Rounded Subnormal Underflow").split()}, Decimal=exactly(TEXTS)),
    "fractions": {"Fraction": make_fraction},
    "uuid": {"UUID": bare(uuid_state)},
    "pathlib": {"PurePosixPath": make_path, "PureWindowsPath": make_path,
                "PosixPath": make_path, "WindowsPath": make_path},
    "collections": {"OrderedDict": exactly(), "Counter": make_counter, "defaultdict": make_default_dict,
                    "deque": make_deque,
                    "ChainMap": bare(of_kind("maps", list, dict)), "UserDict": bare(of_kind("data", dict)),
                    "UserList": bare(of_kind("data", list))},
    "ipaddress": {"IPv%d%s" % (version, name): exactly((str, int)) for version in (4, 6)
                  for name in ("Address", "Network", "Interface")},
    "re": {"_compile": make_pattern},
    "array": {"_array_reconstructor": make_array, "array": exactly()},
    "time": {"struct_time": make_structure},
    "os": {"stat_result": make_structure, "terminal_size": make_structure},
    "types": {"SimpleNamespace": bare(namespace_state)},
}


class Allowed:
    """Which classes a result may have besides data: those that the program names.

    Raises ImportError or AttributeError for a name that does not exist, TypeError for what is no class for data.
    """

    def __init__(self, allow, trust=False):
        if isinstance(allow, str):
            raise TypeError("allow is a list of names, not one: allow=[%r]" % allow)
        self.trust, self.classes, self.modules = trust, {}, []
        for item in allow:
            if item != "numpy":     # its arrays need no leave, and its other classes cannot stand any data
                self.add(item)

    def add(self, item):
        module, inner = item, ""
        while True:
            try:
                found = importlib.import_module(module)
                break
            except ImportError as error:
                if not (module + ".").startswith("%s." % getattr(error, "name", "")) or "." not in module:
                    raise
                module, _, last = module.rpartition(".")
                inner = last + ("." + inner if inner else "")
        for part in filter(None, inner.split(".")):
            found = getattr(found, part)
        if inner and not is_for_data(found) or not inner and module.partition(".")[0] in NO_DATA:
            raise TypeError("allow names classes for data, or their modules, and %s is neither: a worker could run "
                            "code here by it (trust=True is for workers that are your own)" % item)
        if inner:
            self.classes[module, inner] = found
        else:
            self.modules.append(module)

    def find(self, module, name):
        """The class with this name if it is allowed, or else None.  Of a module only what it has itself defined."""
        if (module, name) in self.classes:
            return self.classes[module, name]
        found = class_of(module, name) if self.has(module) else None
        return found if found and is_for_data(found) and self.has(MODULE_OF.__get__(found)) else None

    def has(self, module):
        return isinstance(module, str) and any(module == one or module.startswith(one + ".") for one in self.modules)


def class_of(module, name):
    """The class with this name in a module that is imported here, or None.  Runs and imports nothing."""
    found = sys.modules.get(module)
    for part in name.split("."):
        found = vars(found).get(part) if isinstance(found, (type, type(sys))) else None
    return found if isinstance(found, type) else None


def lookup(cls, name):
    """What a class or a base of it has under this name, as it is there; None if nothing."""
    for base in MRO_OF.__get__(cls):
        if name in DICT_OF.__get__(base):
            return DICT_OF.__get__(base)[name]
    return None


def hazard(cls, kind):
    """Why no object of the program's own class is made for a worker; "" if one may be."""
    if kind == "enum":
        return "" if isinstance(cls, enum.EnumMeta) else "it is no Enum here"
    if type(cls) not in (type, abc.ABCMeta):
        return "it has a metaclass of its own"
    return "it has a __del__" if lookup(cls, "__del__") else ""


def advice(refused):
    """The message for {(module, name): why} that a result had."""
    names = {pair: printable(".".join(pair)) for pair in sorted(refused)}
    text = "%s %s not known here" % (", ".join(names.values()), "is" if len(names) == 1 else "are")
    others = [names[pair] for pair in names if refused[pair] or not is_for_data(class_of(*pair))]
    if not others:
        return text + ": if a worker may make such objects here, use Executor(..., allow=[%s])" % ", ".join(
            '"%s"' % name for name in names.values())
    whys = ["%s: %s" % (names[pair], refused[pair]) for pair in names if refused[pair]]
    if ("numpy", "ndarray") in refused:
        whys.append("an array of objects, or of a class of its own")
    return text + " (%s): only with trust=True, from workers that are your own" % (
        "; ".join(whys) or "%s is not known to be a class for data" % others[0])


def is_for_data(cls):
    """Whether a program may allow it: a class that cannot call, fetch an attribute, or start something by itself."""
    if not isinstance(cls, type) or issubclass(cls, type):
        return False
    modules = {base: str(MODULE_OF.__get__(base)) for base in MRO_OF.__get__(cls)}
    return all(base.__name__ in DATA_TYPES or issubclass(base, BaseException) if module == "builtins" else
               module.partition(".")[0] not in NO_DATA for base, module in modules.items())


def load_result(readers, data, offset, buffers=()):
    """The object of the pickle that begins at this offset, with what came before it.  Raises any exception."""
    if readers.trust:
        return load_trusted(data, offset, buffers)
    if len(data) - offset > SHORT and any(is_plain(data, offset, keyed) for keyed in (True, False)):
        return pickle.loads(memoryview(data)[offset:])
    reader = Reader(readers, data, offset, buffers)
    try:
        return reader.load()
    finally:
        reader.check()              # a name that was refused is the better reason


@functools.lru_cache()
def plain_run(keyed):
    """Matches up to a thousand opcodes of what pickle itself may read, with their arguments.

    They make numbers, short texts and bytes, and lists of them.  If keyed, dictionaries and sets are added, whose
    keys then cost little to hash and to compare, without not-a-number (see KEYS); if not, flat tuples, which then are
    nobody's key.
    """
    def sized(most):
        return b"(?:" + b"|".join(b"%s.{%d}" % (re.escape(bytes([size])), size) for size in range(most)) + b")"
    special = b"(?![\x7f\xff][\xf0-\xff])" if keyed and sys.version_info < (3, 10) else b""
    number = b"(?:K.|G" + special + b".{8}|J.{4}|M..|[N\x88\x89]|\x8a" + sized(8) + b")"
    short = b"[\x8cC]" + sized(64)
    frame = b"(?:\x95.{8})?"         # pickle begins one every 64 KiB, before any object
    tuples = number + b"(?:\x85|" + frame + number + b"(?:\x86|" + frame + number + b"\x87))|\\((?:" + (
        frame + b"(?:" + number + b"|" + short + b"\x94?)){1,64}t|")
    return re.compile(b"(?:" + (b"" if keyed else tuples) + number + b"|" + short + b"|h.|j.{4}|\x95.{8}|[" +
                      (b"}us\x8f\x90" if keyed else b"") + b"\x94\\](ae]){1,1000}", re.DOTALL)


def is_plain(data, offset, keyed):
    """Whether a pickle has only what plain_run() matches, and longer texts and bytes: then C code reads it."""
    run = plain_run(keyed)
    if data[offset:offset + 1] != b"\x80":
        return False                # we would not be where pickle is
    offset += 2                     # the version
    while offset < len(data):
        match = run.match(data, offset)
        if match:
            offset = match.end()
            continue
        method, detail = Reader.OPS.get(data[offset], (None, None))
        if method is not Reader.counted or detail[0] is SIGNED or detail[1] is integer:
            return data[offset] == STOP
        count = detail[0]
        if offset + count.size >= len(data):
            break
        offset += 1 + count.size + count.unpack_from(data, offset + 1)[0]
    return False


RENAMED = {"__mp_main__": "__main__", "pathlib._local": "pathlib"}     # modules of a worker: the same here


def load_trusted(data, offset, buffers):
    """As pickle does: a worker can run anything here."""
    class Trusting(pickle.Unpickler):
        def find_class(self, module, name):
            return super().find_class(RENAMED.get(module, module), name)
    file = io.BytesIO(data)         # without a copy, as data is bytes
    file.seek(offset)
    return Trusting(file, **{"buffers": buffers} if buffers else {}).load()


CHAINS = (collections.deque, collections.defaultdict)      # see LINKS_MAX


def module_of(value):
    """The name of the module that its class is from.  Runs no code of the class."""
    return str(MODULE_OF.__get__(type(value)))


def is_number(value):
    """Whether it is of a type whose == makes a new object of what it is compared with."""
    return module_of(value).partition(".")[0] in ("decimal", "numpy")


class Name:
    """What a worker named that is no class and only serves as a key: inert."""


REFUSED = Name()                    # stands for what was refused, so that the rest is read and all is named


STOP = ord(".")
BYTE, INT, SIGNED, LONG = (struct.Struct("<" + form) for form in "BIiQ")        # counts in a pickle


def integer(data):
    return int.from_bytes(data, "little", signed=True)


def from_utf8(data):
    return data.decode("utf-8", "surrogatepass")


@functools.lru_cache()
def run_of(code, form):
    """For numbers of one kind, up to a thousand in turn: what matches them, and what unpacks each."""
    form = struct.Struct(form)
    return re.compile(b"(?:%s.{%d}){1,1000}" % (code, form.size - 1), re.DOTALL), form


def attributes(state):
    """Returns what a state has for __dict__, and for slots: two dictionaries."""
    parts = [{} if part is None else part
             for part in (state if type(state) is tuple and len(state) == 2 else (state, None))]
    if not all(type(part) is dict and all(type(name) is str for name in part) for part in parts):
        raise malformed()
    return parts


def set_state(made, state):
    """As pickle does, for a class that the program allows."""
    if hasattr(type(made), "__setstate__"):
        return made.__setstate__(state)
    mine, slots = attributes(state)
    vars(made).update(mine)
    for name, value in slots.items():
        setattr(made, name, value)


def may_be_set(cls, name):
    """Whether a result may have this attribute: no code runs by setting it, and no method is hidden."""
    import types
    fields, there = lookup(cls, "__dataclass_fields__"), lookup(cls, name)
    if type(there) is types.MemberDescriptorType:       # a slot, or what C code keeps of an exception
        return MODULE_OF.__get__(there.__objclass__) != "builtins" or name in ("name", "path")
    active = ["__set__", "__delete__"]
    if not isinstance(fields, dict) or name not in fields:
        notes = name == "__notes__" and issubclass(cls, BaseException)
        if not notes and (not name.isidentifier() or name.startswith("__")):
            return False
        active.append("__get__")
    return not any(lookup(type(there), method) for method in active)


def numpy_dtype(what, nothing=None):
    """numpy's dtype of what numpy.lib.format makes of one; no objects, and no name of a class.

    nothing: what the worker's pickle has as a second argument.
    """
    import numpy
    import numpy.lib.format
    check_dtype(what, [])
    return numpy.lib.format.descr_to_dtype(what) if type(what) is list else numpy.dtype(what)


def check_dtype(what, seen, depth=0):
    """Raises ValueError for what is no dtype's text, or has the same list of fields again and again: 8 ** 8 fields."""
    if type(what) is str and re.match(r"[<>|=][biufcSUmMV?]\d{1,9}(\[\d*[A-Za-z]+\])?$", what):
        return
    if type(what) is not list or depth > 9 or len(seen) > 10000:
        raise malformed()
    for field in what:
        name, inner, shape = field if type(field) is tuple and len(field) == 3 else field + ((),)
        seen.append(name)
        if any(type(part) is not str for part in (name if type(name) is tuple else [name])) or (
                type(shape) is not tuple or any(type(size) is not int for size in shape)):
            raise malformed()
        check_dtype(inner, seen, depth + 1)


def numpy_array(what, shape, order, raw):
    """numpy's array in this memory: bytes are copied, a bytearray is not."""
    import numpy
    dtype = numpy_dtype(what)
    if type(shape) is not tuple or len(shape) > 64 or not all(type(size) is int for size in shape) or (
            order not in ("C", "F") or type(raw) not in (bytes, bytearray)):
        raise malformed()
    size = functools.reduce(lambda one, two: one * two, shape, dtype.itemsize)
    if dtype.hasobject or not dtype.itemsize or size != len(raw) or min(shape, default=0) < 0:
        raise malformed("a numpy array of %d bytes, not of %d" % (len(raw), size))
    array = numpy.ndarray(shape, dtype, bytearray(raw) if type(raw) is bytes else raw, order=order)
    check_numpy(numpy, array)
    return array


def check_numpy(numpy, array):
    """Numpy's C code takes it on trust that a bool is 0 or 1, and that a character is one."""
    most = {"b": 1, "U": sys.maxunicode}.get(array.dtype.kind)
    for name in array.dtype.names or ():
        check_numpy(numpy, array[name])
    if most and array.size:
        flat = numpy.ascontiguousarray(array).reshape(-1)
        if flat.view("u1" if most == 1 else flat.dtype.byteorder.replace("|", "=") + "u4").max() > most:
            raise malformed("a numpy array with values that its type does not have")


def numpy_scalar(what, raw):
    return numpy_array(what, (), "C", raw)[()]


NUMPY = {"array": numpy_array, "scalar": numpy_scalar, "dtype": numpy_dtype}


class Reader:
    """Reads a pickle of protocol 4 or 5 that is not trusted: see the table above.  It recurses nowhere.

    Every object is of an exact builtin type, or made by a maker, or (theirs) by a class that the program allows.
    Time and memory are bounded by the length of the pickle: where an opcode costs more than its bytes, it says so
    to spend().  Tuples in tuples are no deeper than TUPLES_DEEP, and what is hashed is weighed first: the same
    tuple twice in a tuple, and this twice in another, would need 2 ** 64 steps after 64 opcodes.
    """

    def __init__(self, allowed, data, offset, buffers=()):
        self.allowed, self.data, self.offset, self.buffers = allowed, data, offset, iter(buffers)
        self.stack, self.marks, self.memo = [], [], []
        self.makers = {}            # id of a class or a Name on the stack: (its maker, what to give it)
        self.open = {}              # id of an object that may take a state: (it, what checks the state)
        self.theirs = {}            # id: an object of a class in allow
        self.parts = {}             # id: (an object of the program's own class, {name: value in it}), for hash()
        self.sets = {}              # id: (a frozenset, the steps that a comparison of it takes)
        self.links = 0              # deques and the like in deques and the like
        self.deep = {}              # id: (a tuple with more than plain data in it, its depth)
        self.twins = {}             # (a dictionary or set, a hash): list of its keys with this hash
        self.refused = collections.OrderedDict()    # (module, name): why
        self.left = WORK_MIN + 10 * (len(data) - offset + sum(map(len, buffers)))
        self.patterns = 0           # characters of regular expressions
        self.classes, self.settable = {}, {}        # what was looked up: see own(), own_state()

    def load(self):
        try:
            while True:
                code = self.data[self.offset]
                self.offset += 1
                if code == STOP:
                    break
                method, detail = self.OPS.get(code) or self.unknown(code)
                method(self, detail)
        except IndexError:
            raise EOFError("it ends too early") from None
        result, = self.stack
        if isinstance(result, Name) and not self.refused:
            raise malformed()
        return result

    def unknown(self, code):
        raise malformed("opcode %d is not one for data" % code)

    def spend(self, steps):
        self.left -= steps
        if self.left < 0:
            raise malformed("reading it would take too long for its size")

    # Plain data

    def take(self, count):
        self.offset += count
        if self.offset > len(self.data):
            raise EOFError("it ends too early")
        return self.data[self.offset - count:self.offset]

    def constant(self, value):
        self.stack.append(value)

    def empty(self, kind):
        self.stack.append(kind())

    def fixed(self, detail):
        """Numbers of one kind, as many as follow each other."""
        run, form = run_of(*detail)
        end = run.match(self.data, self.offset - 1).end()        # None: it ends too early
        self.stack += [value for value, in form.iter_unpack(self.data[self.offset - 1:end])]
        self.offset = end

    def counted(self, detail):
        form, convert = detail
        size, = form.unpack(self.take(form.size))
        if size < 0:
            raise malformed()
        self.stack.append(convert(self.take(size)))

    def byte_array(self, _):
        """Copied once: it can be an array's memory."""
        size, = LONG.unpack(self.take(LONG.size))
        if size > len(self.data) - self.offset:
            raise EOFError("it ends too early")
        self.stack.append(bytearray(memoryview(self.data)[self.offset:self.offset + size]))
        self.offset += size

    def next_buffer(self, _):
        """Bytes or a bytearray that came before the pickle, each once."""
        try:
            self.stack.append(next(self.buffers))
        except StopIteration:
            raise malformed() from None

    def read_only(self, _):
        if type(self.stack[-1]) is not bytes:
            raise malformed()

    def mark(self, _):
        self.marks.append(len(self.stack))

    def marked(self, _=None):
        """The values after the last mark: they leave the stack."""
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def pop(self, _):
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def memoize(self, _):
        self.memo.append(self.stack[-1])

    def recall(self, form):
        number, = form.unpack(self.take(form.size))
        self.stack.append(self.memo[number])

    def tuple_of(self, count):
        mark = self.marks.pop() if count is None else len(self.stack) - count
        whole = tuple(self.stack[mark:])
        self.stack[mark:] = [whole]
        if not PLAIN.issuperset(map(type, whole)):
            self.nest(whole)

    def nest(self, whole):
        """Remembers how deep a tuple is."""
        deep = 1 + max([self.deep[id(part)][1] if id(part) in self.deep else 1
                        for part in tuple.__iter__(whole) if isinstance(part, tuple)], default=0)
        if deep > TUPLES_DEEP:
            raise malformed("tuples in tuples, deeper than %d" % TUPLES_DEEP)
        if deep > 1:
            self.deep[id(whole)] = whole, deep

    def append(self, many):
        values = self.marked() if many else [self.stack.pop()]
        target = self.stack[-1]
        if type(target) in (list, collections.deque):
            self.link(target, values)
            target.extend(values)
        elif self.is_theirs(target):
            for value in values:
                target.append(value)

    def link(self, target, values):
        """Bounds the depth of deques and defaultdicts in each other: the other types free theirs without recursion."""
        if type(target) in CHAINS:
            self.links += sum(type(value) in CHAINS for value in values)
            if self.links > LINKS_MAX:
                raise malformed("more than %d deques or default dictionaries in each other" % LINKS_MAX)

    def set_items(self, many):
        values = self.marked() if many else [self.stack.pop(-2), self.stack.pop()]
        target = self.stack[-1]
        if type(target) in (dict, collections.OrderedDict, collections.defaultdict) or self.is_theirs(target):
            self.link(target, values[1::2])
            self.fill(target, zip(values[::2], values[1::2]))

    def fill(self, target, pairs):
        for key, value in pairs:
            if type(key) not in KEYS or key != key:
                self.weigh(key, id(target))
            target[key] = value

    def add_items(self, _):
        values = self.marked()
        if type(self.stack[-1]) is not set:
            raise malformed()
        self.add(self.stack[-1], values, id(self.stack[-1]))

    def frozen(self, _):
        whole = set()
        steps = self.add(whole, self.marked(), -self.offset)
        whole = frozenset(whole)
        self.sets[id(whole)] = whole, steps
        self.stack.append(whole)

    def add(self, whole, values, number):
        """Returns the steps that a comparison of these values takes."""
        steps = 1
        for value in values:
            steps += 1 if type(value) in KEYS and value == value else self.weigh(value, number)
            whole.add(value)
        return steps

    def weigh(self, key, number):
        """Spends what a key will take in the dictionary or set with this number.  Returns the steps to compare it.

        That is hash(), which goes into tuples, and into the program's own objects; and a comparison with each
        other key that has the same hash, which can be made for all but texts, and goes into frozen sets too.
        """
        if type(key) is int and key.bit_length() < 60:
            return 1
        todo, steps = [key], 0
        while todo:
            part = todo.pop()
            count = 1
            if type(part) is int:
                count += part.bit_length() >> 6
            elif type(part) in (range, slice):          # a slice has a hash from Python 3.12 on
                todo += [part.start, part.stop, part.step]
            elif isinstance(part, tuple):
                count += tuple.__len__(part)
                todo.extend(tuple.__iter__(part))
            elif id(part) in self.parts:
                todo.extend(self.parts[id(part)][1].values())
            elif id(part) in self.sets:
                steps += self.sets[id(part)][1]         # it keeps its hash
            elif type(part) not in KEYS and module_of(part) == "fractions":
                todo += [part.numerator, part.denominator]
            elif type(part) not in KEYS and module_of(part) in ("decimal", "re", "_sre"):
                count += sys.getsizeof(part) >> 3       # of a regular expression, its code
            self.spend(count)
            steps += count
        twins = self.twins.setdefault((number, hash(key)), [])
        for twin in twins:
            self.spend(steps)
            self.compare(key, twin)
        twins.append(key)
        return steps

    def compare(self, *keys):
        """Raises ValueError unless Python may compare two keys.

        A number of another kind can make a new object of the other key.
        """
        todo = [keys]
        while todo:
            one, other = todo.pop()
            self.spend(1)
            if isinstance(one, tuple) and isinstance(other, tuple):
                todo.extend(zip(tuple.__iter__(one), tuple.__iter__(other)))
            elif id(one) in self.parts and id(other) in self.parts:
                there = self.parts[id(other)][1]
                todo.extend((value, there.get(name)) for name, value in self.parts[id(one)][1].items())
            elif type(one) is not type(other) and (is_number(one) or is_number(other)):
                for part in (one, other):
                    if not is_number(part) and type(part) not in KEYS and (
                            type(part) is not int or part.bit_length() > 60):
                        raise malformed("two keys of one hash, and only one is a number")

    # Names, objects and their state

    def is_theirs(self, target):
        """Whether the target is an object of a class in allow.  Raises ValueError if not, and nothing was refused."""
        if target is not REFUSED and id(target) not in self.theirs:
            raise malformed()
        return target is not REFUSED

    def find(self, _):
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise malformed()
        module = RENAMED.get(module, module)
        self.stack.append(self.found(module, name))

    def found(self, module, name):
        """A class, or a Name for what is none; its maker is noted.  REFUSED for what is not known."""
        import builtins
        here = vars(builtins).get(name) if module == "builtins" else None
        maker = MAKERS.get(module, {}).get(name)
        if (module, name) == (__name__, "made"):
            return self.known(Name(), Reader.own)
        if isinstance(here, type) and issubclass(here, BaseException):
            return self.known(here, Reader.exception)
        if maker:
            there = getattr(importlib.import_module(module), name)      # a module of the standard library
            return self.known(there if isinstance(there, type) and there is not type else Name(), maker, there)
        if here is not None and name in DATA_TYPES:
            return here
        cls = self.allowed.find(module, name)
        return self.known(cls, None) if cls else self.refuse(module, name)

    def known(self, what, maker, target=None):
        self.makers[id(what)] = what, maker, target or what
        return what

    def refuse(self, module, name, why=""):
        if len(self.refused) < REFUSED_MAX:
            self.refused[module, name] = why
        return REFUSED

    def check(self):
        """Raises pickle.UnpicklingError if anything was refused."""
        if self.refused:
            raise pickle.UnpicklingError(advice(self.refused))

    def reduce(self, new):
        args, what = self.stack.pop(), self.stack.pop()
        self.stack.append(self.make(what, args, {}, new))

    def new_with_keywords(self, _):
        keywords, args, what = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append(self.make(what, args, keywords, True))

    def make(self, what, args, keywords, new):
        if what is REFUSED:
            return REFUSED
        _, maker, target = self.makers.get(id(what), (None, None, None))
        if target is None or type(args) is not tuple or type(keywords) is not dict or maker and keywords:
            raise malformed()
        self.spend(1 + len(args) + len(keywords) + sum(len(arg) for arg in args if type(arg) in SIZED))
        if maker:
            return maker(self, target, *args)
        made = target.__new__(target, *args, **keywords) if new else target(*args, **keywords)
        if lookup(target, "_member_map_"):
            return made             # of an Enum: it was there before, and takes no state
        self.theirs[id(made)] = made
        if isinstance(made, tuple):
            self.nest(made)
        return self.fresh(made, None)

    def fresh(self, made, check):
        """An object that was just made, and may take one state."""
        self.open[id(made)] = made, check
        return made

    def build(self, _):
        state, made = self.stack.pop(), self.stack[-1]
        if made is REFUSED:
            return
        self.spend(sum(len(part) for part in (state if type(state) is tuple else [state]) if type(part) is dict))
        _, check = self.open.pop(id(made), (None, None))
        if check:
            mine, slots = attributes(state)
            for name, value in check(self, made, dict(mine, **slots)).items():
                object.__setattr__(made, name, value)
        elif self.is_theirs(made):
            set_state(made, state)

    # The program's own classes

    def own(self, _, kind, module, name, *rest):
        """An object of a class that is looked up here, in modules that are imported; or of numpy."""
        if type(kind) is str and kind in NUMPY:
            return NUMPY[kind](module, name, *rest)
        if not type(kind) is type(module) is type(name) is str or kind not in OWN:
            raise malformed()
        module = "__main__" if module == "__mp_main__" else module
        if (kind, module, name) not in self.classes:
            cls = class_of(module, name)
            why = hazard(cls, kind) if cls else (
                "it is defined inside a function" if "<locals>" in name else
                "it is not found by its name in a module that is imported here")
            if why and (not cls or self.allowed.find(module, name) is not cls):
                return self.refuse(module, name, why)
            self.classes[kind, module, name] = cls
        return OWN[kind](self, self.classes[kind, module, name], *rest)

    def own_dataclass(self, cls):
        if not isinstance(lookup(cls, "__dataclass_fields__"), dict):
            raise malformed("%s is no dataclass here" % cls.__name__)
        return self.fresh(object.__new__(cls), Reader.own_state)

    def own_tuple(self, cls, values):
        fields = lookup(cls, "_fields")
        if not issubclass(cls, tuple) or type(fields) is not tuple or type(values) is not tuple or (
                len(fields) != len(values)):
            raise malformed("%s is no named tuple with so many values here" % cls.__name__)
        made = tuple.__new__(cls, values)
        self.nest(made)
        return self.fresh(made, Reader.own_state)

    def own_enum(self, cls, name, value):
        """A member of an Enum, or a combination of a Flag's members: only enum's own code runs."""
        members = lookup(cls, "_member_map_")
        if type(name) is str and isinstance(members, dict) and name in members:
            return members[name]
        own = [key for base in MRO_OF.__get__(cls) if MODULE_OF.__get__(base) != "enum"
               for key in DICT_OF.__get__(base)]
        if type(cls) is enum.EnumMeta and issubclass(cls, enum.Flag) and type(value) is int and not (
                {"_missing_", "__new_member__"} & set(own)):
            known = lookup(cls, "_value2member_map_")
            if value in known:
                return known[value]
            self.spend(len(known))          # 3.10 and older look at all of them
            bits = functools.reduce(lambda one, two: one | two, [member._value_ for member in members.values()], 0)
            # An IntFlag keeps bits that have no member: in Python 3.11 and newer its boundary says so.
            # The class keeps each for ever, so there is a bound.
            if (issubclass(cls, enum.IntFlag) and lookup(cls, "_boundary_") is getattr(enum, "KEEP", None)
                    and len(known) < FLAGS_KEPT):
                bits |= 2 ** 64 - 1
            if not (value if value >= 0 else ~value) & ~bits:
                return cls(value)
        raise malformed("%s has no such member here" % cls.__name__)

    def own_exception(self, cls, args):
        if not issubclass(cls, BaseException) or type(args) is not tuple:
            raise malformed("%s is no exception here" % cls.__name__)
        return self.exception(cls, *args)

    def exception(self, cls, *args):
        """By the builtin class alone: what its C code would take on trust is checked first."""
        base = cls
        while MODULE_OF.__get__(base) != "builtins":
            base = BASE_OF.__get__(base)
        if issubclass(base, UnicodeError) and base is not UnicodeError:
            text, start, end = args[-4:-1]
            if type(text) not in (str, bytes) or type(start) is not int or type(end) is not int or not (
                    0 <= start <= end <= len(text)):
                raise malformed("%s of a place that is not in its text" % base.__name__)
        if issubclass(base, SyntaxError) and len(args) > 1 and not (
                type(args[1]) is tuple and all(type(part) in (str, type(None)) or type(part) is int and
                                               abs(part) < 1 << 31 for part in args[1])):
            raise malformed("%s of a place that is none" % base.__name__)
        if issubclass(base, OSError) and any(isinstance(arg, BaseException) or type(arg) in CHAINS for arg in args[2:]):
            raise malformed("%s of a file that is none" % base.__name__)        # see LINKS_MAX
        made = base.__new__(cls, *args)
        base.__init__(made, *args)
        return self.fresh(made, Reader.exception_state)

    def exception_state(self, made, state):
        """Without args, which it has, and without the name that makes traceback import the module it is from."""
        names = state.get("name"), state.get("path")
        if any(isinstance(name, BaseException) or type(name) in CHAINS for name in names):
            raise malformed("%s of a name that is none" % type(made).__name__)  # see LINKS_MAX
        return self.own_state(made, {name: state[name] for name in state if name not in ("args", "name_from")})

    def own_state(self, made, state):
        """The state if each of its names is a field, or hides nothing that the class has under this name."""
        cls = type(made)
        for name in state:
            if (cls, name) not in self.settable:
                self.settable[cls, name] = may_be_set(cls, name)
            if not self.settable[cls, name]:
                raise malformed("%s.%s is not data: the class has a descriptor or a method there" % (
                    cls.__name__, printable(name)))
        self.parts[id(made)] = made, state
        return state

    OPS = {ord(code): (method, detail) for code, method, detail in [
        ("\x80", take, 1), ("\x95", take, 8), ("(", mark, None), ("0", pop, None), ("1", marked, None),
        ("N", constant, None), ("\x88", constant, True), ("\x89", constant, False),
        ("]", empty, list), ("}", empty, dict), (")", empty, tuple), ("\x8f", empty, set),
        ("J", fixed, (b"J", "<xi")), ("K", fixed, (b"K", "<xB")), ("M", fixed, (b"M", "<xH")),
        ("G", fixed, (b"G", ">xd")),
        ("\x8a", counted, (BYTE, integer)), ("\x8b", counted, (SIGNED, integer)),
        ("\x8c", counted, (BYTE, from_utf8)), ("X", counted, (INT, from_utf8)), ("\x8d", counted, (LONG, from_utf8)),
        ("C", counted, (BYTE, bytes)), ("B", counted, (INT, bytes)), ("\x8e", counted, (LONG, bytes)),
        ("\x96", byte_array, None), ("\x97", next_buffer, None), ("\x98", read_only, None),
        ("\x94", memoize, None), ("h", recall, BYTE), ("j", recall, INT),
        ("\x85", tuple_of, 1), ("\x86", tuple_of, 2), ("\x87", tuple_of, 3),
        ("t", tuple_of, None), ("a", append, False), ("e", append, True), ("s", set_items, False),
        ("u", set_items, True), ("\x90", add_items, None), ("\x91", frozen, None), ("\x93", find, None),
        ("R", reduce, False), ("\x81", reduce, True), ("\x92", new_with_keywords, None), ("b", build, None)]}


OWN = {"dataclass": Reader.own_dataclass, "tuple": Reader.own_tuple, "enum": Reader.own_enum,
       "exception": Reader.own_exception}


class RemoteTraceback(Exception):
    """The cause of an exception that a function has raised on a worker; tb is the text of its traceback.

    words: what the exception says, as the worker has written it.  Its own str() may run code of the program's class,
    fail, or take for ever, as that of a list with one list twice in it, and this with another twice in it.
    """

    def __init__(self, tb, words=""):
        super().__init__(tb)
        self.tb, self.words = tb, words[:WORDS_SHOWN]

    def __str__(self):
        return self.tb


def words_of(error):
    """What an exception says, for the pool's thread: see RemoteTraceback."""
    return error.__cause__.words if isinstance(error.__cause__, RemoteTraceback) else str(error)


def remedy_of(error):
    """What to do on a worker's host about this exception; "" if that is not known."""
    if isinstance(error, ModuleNotFoundError):
        return ("install it there, or name a Python that has it (hosts=..., python=...), or put a module of your own "
                "beside the main program, or its directory into send")
    if isinstance(error, (ImportError, SyntaxError, AttributeError)):
        return "another Python or another version there may do it"
    return ""


def fault_of(host, python, error, what="load the program"):
    """Why this host cannot do calls, and the remedy."""
    leave_out = "CEXEC_REJECT_SERVERS=%s leaves it out" % host
    if not isinstance(error.__cause__, RemoteTraceback):
        return "%s: %s; %s" % (host, error, leave_out)
    return "%s cannot %s with Python %s: %s (%s)" % (
        host, what, python, words_of(error), "; ".join(filter(None, [remedy_of(error), leave_out])))


def load_error(readers, data, offset, host):
    """The exception in a RAISED or FAILED, with the worker's traceback as its cause."""
    size, = TEXT_SIZE.unpack_from(data, offset)
    offset += TEXT_SIZE.size + size
    text = data[offset - size:offset].decode("utf-8", "replace")
    if offset > len(data):
        raise ProtocolError("a text that is longer than its frame")
    lines = [printable(line) for line in text.splitlines()] or ["?"]
    words = next((line for line in reversed(lines) if line.strip(" |+-")), "?").lstrip(" |")     # no rule of a group
    try:
        if offset == len(data):
            raise TypeError("it cannot be pickled")
        error = load_result(readers, data, offset)
        if not isinstance(error, BaseException):
            raise TypeError("no exception")
    except BaseException as reason:             # with trust, reading it may call sys.exit()
        words = "the function raised %s (%s)" % (words, reason)
        error = pickle.UnpicklingError(words)
    if isinstance(error, ModuleNotFoundError):
        lines += ["", "%s; CEXEC_REJECT_SERVERS=%s leaves the host out" % (remedy_of(error), host)]
    cause = RemoteTraceback('\n"""\nOn %s:\n%s\n"""' % (host, "\n".join(lines)), words)
    BaseException.__cause__.__set__(error, cause)       # a frozen dataclass refuses  error.__cause__ = cause
    return error


# Executor: lanes, and their pool

OUR_PYTHON = "%d.%d" % sys.version_info[:2]
SAME_PYTHON = ("a function of a notebook, a lambda or the like needs Python {0} there, as here: start the worker with "
               "python{0}, or put the function into a module".format(OUR_PYTHON))
SEARCHING, STARTING, PREPARING = "SEARCHING", "STARTING", "PREPARING"
UP, ENDING, EXITED = "UP", "ENDING", "EXITED"


# by_value: with code, so that it needs our minor version of Python; buffers: memoryviews, which are not in the data
Pickled = collections.namedtuple("Pickled", "data buffers by_value")
BULKY = frozenset([bytes, functools.partial, memoryview])       # of an argument: for this in_buffers() is called
HOLDERS = frozenset([tuple, dict, functools.partial])           # what it looks into


def in_buffers(value, protocol, made=None):
    """The value, or what stands for it in a pickle that has its bytes or memoryview outside.

    Only what has such bytes within is made anew, and once: else an object that is there twice would arrive as two.
    made: {id: what stands for it}.  What is within itself stands there as it is.
    """
    kind = type(value)
    if kind is memoryview:
        return pickle.PickleBuffer(value) if protocol > 4 and value.contiguous else bytes(value)
    if kind is bytes:
        return pickle.PickleBuffer(value) if protocol > 4 and len(value) >= LARGE else value
    if kind not in HOLDERS:
        return value
    made = {} if made is None else made
    if id(value) in made:
        return made[id(value)]
    made[id(value)] = value
    old = value if kind is tuple else (value.func, value.args, value.keywords) if kind is functools.partial else tuple(
        value.values())
    new = [in_buffers(one, protocol, made) if type(one) in BULKY or type(one) in HOLDERS else one for one in old]
    if any(one is not other for one, other in zip(old, new)):
        made[id(value)] = rebuilt(value, new)
    return made[id(value)]


def rebuilt(value, parts):
    """Returns a tuple, dict or partial as this one, of these parts."""
    if type(value) is not functools.partial:
        return tuple(parts) if type(value) is tuple else dict(zip(value, parts))
    made = functools.partial(parts[0], *parts[1], **parts[2])
    vars(made).update(vars(value))
    return made


def dumps(value, protocol, by_value=False, kept=False):
    """Returns Pickled.  Raises any exception.

    kept: it is for later, so it has copies of what may change, as the memory of an array.
    """
    buffers, file = [], io.BytesIO()
    outside = {} if protocol < 5 else {"buffer_callback": lambda buffer: (
        buffer.raw().nbytes < LARGE or kept and type(buffer.raw().obj) is not bytes or buffers.append(buffer.raw()))}
    if not by_value:
        return Pickled(pickle.dumps(value, protocol, **outside), buffers, False)
    by_value_pickler()(file, protocol, **outside).dump(value)
    data = file.getvalue()
    return Pickled(data, buffers, b"cloudpickle" in data)


@functools.lru_cache(None)
def by_value_pickler():
    """Returns cloudpickle's Pickler, which knows functions of functools.lru_cache too: it would send their names."""
    import cloudpickle

    def reduce_cached(function):
        there = getattr(sys.modules.get(function.__module__), function.__qualname__, None)
        if there is function and function.__module__ != "__main__":
            return function.__qualname__
        options = getattr(function, "cache_parameters", dict)()         # Python 3.9
        return cached, (function.__wrapped__, function.cache_info().maxsize, options.get("typed", False))

    class Pickler(cloudpickle.Pickler):
        dispatch_table = collections.ChainMap(
            {type(by_value_pickler): reduce_cached}, cloudpickle.Pickler.dispatch_table)
    return Pickler


def for_worker(value, protocol, program, kept=False):
    """Returns Pickled, for a call or its function.  Raises any exception.

    pickle sends functions and classes by their names.  What it cannot name goes by value, as cloudpickle sends
    it: bytecode, with which another version of Python would crash.
    """
    try:
        made = dumps(value, protocol, kept=kept)
        if program.text or b"__main__" not in made.data:
            return made
        if not program.cloudpickle:
            function = value[0] if type(value) is tuple and value else value
            while hasattr(function, "func"):        # functools.partial
                function = function.func
            if getattr(function, "__module__", "") != "__main__":
                return made
            raise ValueError("%r is defined in %s" % (
                function, "a package's __main__.py, which would do its work there" if program.is_package else
                "no file (a notebook, an interactive session, python -c, standard input)"))
    except (Exception, SystemExit) as error:    # a future's SystemExit would end the program that asks for its result
        if not program.cloudpickle:
            raise pickle.PicklingError(
                "%s: put it into a module, or pip install cloudpickle here: pickle alone sends functions by their "
                "names in modules (no lambda, no function inside another), and data" % error) from error
    try:
        return dumps(value, protocol, by_value=True, kept=True)
    except (Exception, SystemExit) as error:
        raise pickle.PicklingError("%s: a function's arguments, and what it uses, must be data or code" % (
            error)) from error


def goes_by_value(function, program):
    """Whether pickle cannot send this function by its name."""
    from types import FunctionType
    while hasattr(function, "func"):            # functools.partial
        function = function.func
    if not isinstance(function, FunctionType):
        return False
    there = getattr(sys.modules.get(function.__module__), function.__qualname__, None)
    return there is not function or function.__module__ == "__main__" and not program.text


class Shared:
    """A function of many calls: its bytes go to each lane once.  keep() is that of Call."""

    numbers = itertools.count(1)

    def __init__(self, function):
        self.function, self.number, self.made = function, next(self.numbers), {}

    def keep(self, program):
        with suppress(Exception):
            self.pickled(pickle.HIGHEST_PROTOCOL, program)

    def pickled(self, protocol, program):
        """Returns Pickled, made only once.  Raises any exception."""
        if protocol not in self.made:
            self.made[protocol] = for_worker(in_buffers(self.function, protocol), protocol, program, kept=True)
        return self.made[protocol]


class Call:
    """A function with its arguments that was submitted, until it is done."""

    def __init__(self, future, function, arguments, keywords):
        self.future, self.function = future, function
        self.what = arguments if isinstance(function, Shared) else (function, arguments, keywords)
        self.is_bulky = not BULKY.isdisjoint(map(type, (function, *arguments, *keywords.values())))
        self.tries, self.begun, self.by_value, self.made = 0, False, False, None
        self.unread = {}            # a worker's id: why it cannot load what the call needs

    def keep(self, program):
        """Pickles a call by value when it is submitted: the globals that it uses may change while it waits."""
        try:
            made = self.pickled(pickle.HIGHEST_PROTOCOL, program)       # that of each worker with our version of Python
        except Exception:
            return                  # give() will say it
        if self.by_value:
            self.made, self.what = made, None

    def set_running(self):
        """From now on it cannot be cancelled.  Returns False if it was cancelled before: then no worker gets it."""
        self.begun = self.begun or self.future.set_running_or_notify_cancel()
        return self.begun

    def lane_ended(self, begun):
        """Its lane has ended.  That was a try, if one of its calls may have begun."""
        self.tries += begun

    def pickled(self, protocol, program):
        """Returns Pickled, and that of a function which is Shared, or None; notes by_value.  Raises any exception."""
        if self.made:
            return self.made
        shared = self.function.pickled(protocol, program) if isinstance(self.function, Shared) else None
        made = for_worker(in_buffers(self.what, protocol) if self.is_bulky else self.what, protocol, program)
        self.by_value = made.by_value or bool(shared and shared.by_value)
        return made, shared


def last_shown(line):
    """What a terminal shows of a line after its carriage returns, as those of a progress bar."""
    return line.rstrip(b"\r").rpartition(b"\r")[2]


def unnamed_file(data):
    """Returns a descriptor of a file without a name, which holds data, for reading.  Raises OSError."""
    with suppress(OSError, AttributeError):     # this system or Python has no memfd_create(2), or there is no /proc
        with closing(os.memfd_create("cexec")) as fd:
            write_all(functools.partial(os.write, fd), data)
            return os.open("/proc/self/fd/%d" % fd, os.O_RDONLY)
    with tempfile.NamedTemporaryFile(buffering=0) as file:
        write_all(file.write, data)
        return os.open(file.name, os.O_RDONLY)


class Lane(Stateful):
    """One job of cexec, with a worker's Python as its command.

    SEARCHING --GO--> STARTING --READY--> PREPARING --VALUE 0--> UP --end(): send END--> ENDING --pipes closed--> EXITED
        |'---------------|-----READY--------^|'-no initializer---^|                        A                        A
        '----------------'-------------------'--------------------'----terminate()---------'                        |
        '----------------'-------------------'--------------------'----the job has ended: all pipes are closed------'
    """

    LAW = {SEARCHING: (STARTING, PREPARING, ENDING, EXITED), STARTING: (PREPARING, ENDING, EXITED),
           PREPARING: (UP, ENDING, EXITED), UP: (ENDING, EXITED), ENDING: (EXITED,), EXITED: ()}

    def __init__(self, pool):
        self.pool, self.loop, self.state = pool, pool.loop, SEARCHING
        self.calls = collections.OrderedDict()  # number: a Call that the worker has, until its result comes
        self.worker_id, self.start_lines, self.waits, self.told = "", b"", "", ""
        self.host, self.python, self.protocol = "?", "", 0
        self.main_sent, self.loading = not pool.program.text, False
        self.since = self.idle_since = self.head_since = time.monotonic()
        self.pace, self.first, self.fastest = 1.0, None, 1e9    # seconds of a call: lately, of the first, the least
        self.preparation, self.unprepared = 0.0, False      # seconds of the initializer; whether it failed
        self.taken, self.recalled, self.leaving = 0, False, False
        self.functions = collections.deque(maxlen=FUNCTIONS_KEPT)   # numbers of those that the worker has
        self.unsent, self.backlog = collections.deque(), 0      # parts of frames; their bytes
        self.imports = 0            # IMPORTs since unsent was last empty: the worker must send one at a time
        self.rest = b""             # of what came: the beginning of a frame's head
        self.kind, self.body, self.missing = b"", None, 0   # of a frame that has not come whole; its missing bytes
        self.buffers = []           # FIXED and WRITABLE for the next result
        self.line = self.words = self.report = b""
        self.failure = self.killing = self.letting_go = None
        self.start()
        self.send(SETUP, pickled({"protocol": pool.protocol, "names": pool.program.names(), "stub": __name__,
                                  "argv": sys.argv, "trust": pool.readers.trust, "threads": pool.threads,
                                  "python": sys.version_info[:2]}))
        self.flush()

    def start(self):
        """Starts the client.  Raises OSError."""
        ours = []                   # descriptors that are closed at the end
        try:
            ours += os.pipe()
            ours += [end.detach() for end in socket.socketpair()]       # the client reads that we have ended
            ours.append(unnamed_file(LANE_PROGRAM.encode()))
            prints, printer, started, starter, program = ours
            for fd in program, printer, starter:
                ours.append(lifted(fd, 5))
            numbered = [(ours[5], 3), (ours[6], 4)]
            env = dict({"CEXEC_TIMEOUT_LINGER": "1"}, **os.environ)
            env["CEXEC_RETRIES"] = "0"                          # the pool itself decides what runs again
            env["CEXEC_FD_FOR_START"] = str(ours[7])
            env["CEXEC_USELESS_SERVERS"] = " ".join(self.pool.useless())
            pub, words, kept, group = self.pool.pub, [], [ours[7]], self.pool.group
            if group:               # its workers run what they are given
                ours.append(lifted_away(full_pipe(group.pub_text.encode()), 5))
                pub, words, kept = "/dev/fd/%d" % ours[-1], ["--", self.pool.python, "/dev/fd/3"], kept + ours[-1:]
                env["CEXEC_GROUP"] = group.text
            self.child, report = start_client(
                pub, words, numbered=numbered, kept=kept, env=env, bufsize=0, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            ours.remove(prints)
            ours.remove(started)
        finally:
            for fd in ours:
                os.close(fd)
        self.target = self.child.stdin.fileno()
        os.set_blocking(self.target, False)
        enlarge(self.target)
        enlarge(self.child.stdout.fileno())
        self.files = {}             # a pipe from the client: what its data is for
        for file, call in ((self.child.stdout, self.rcvd), (self.child.stderr, self.rcvd_words),
                           (open(report, "rb", 0), self.rcvd_report), (open(prints, "rb", 0), self.rcvd_prints),
                           (open(started, "rb", 0), self.rcvd_start)):
            os.set_blocking(file.fileno(), False)
            self.files[file] = call
            self.loop.on_read(file.fileno(), functools.partial(self.read, file))

    def __repr__(self):
        return "lane " + self.host

    # To the worker

    def send(self, kind, *parts):
        """Queues a frame; the pool calls flush() when it has queued everything."""
        parts = [LANE_HEAD.pack(kind, sum(map(len, parts)))] + list(parts)
        if len(parts[-1]) < LARGE:
            parts = [b"".join(parts)]
        for part in parts:
            self.unsent.append(memoryview(part))
            self.backlog += len(part)

    def flush(self):
        try:
            while self.unsent:
                count = os.writev(self.target, [self.unsent[index] for index in range(min(len(self.unsent), 64))])
                self.backlog -= count
                while count:
                    part = self.unsent.popleft()
                    if count < len(part):
                        self.unsent.appendleft(part[count:])
                    count -= min(count, len(part))
        except BlockingIOError:
            pass
        except OSError:             # the job has ended; read() will see it
            self.unsent.clear()
        if not self.unsent:
            self.backlog = self.imports = 0
        if not self.child.stdin.closed:
            self.loop.on_write(self.target, self.flush if self.unsent else None)

    # The law of calls ahead.  A lane has one call, or none.  If its calls are short, the way there and back would cost
    # more than the work: then it gets further calls before it has done the first, as many as take AHEAD_SECONDS at its
    # pace (half the last call's time, half the pace before), and AHEAD_MAX at most.  It gets none ahead
    #   - before its first result, as its pace is not known; a call that runs for longer than that pace counts instead;
    #   - without retries, because a call that only waits there is lost with the lane, and that would be its one try;
    #   - while AHEAD_BYTES wait to be sent: large calls fill the way by themselves.
    # Calls ahead may wait for a long one.  So if another lane has nothing to do or may be begun, and no call waits
    # here, those that it has not begun for RECALL_SECONDS are recalled.  They go to the head of the queue, for the lane
    # with the fewest.

    def has_room(self):
        """Whether it takes another call: its only one, or one of several that are short."""
        if self.state is not UP or self.leaving or not self.calls:
            return self.state is UP and not self.leaving
        pace = max(self.pace, time.monotonic() - self.head_since)
        return (self.pool.retries > 0 and not self.recalled and self.backlog < AHEAD_BYTES
                and len(self.calls) < min(AHEAD_MAX, AHEAD_SECONDS / pace))

    def take(self, number, call, made, function):
        """Sends a call: Pickled, and that of its function, if this is Shared."""
        shared = call.function.number if function else 0
        if function and shared not in self.functions:
            self.send_pickled(FUNCTION, FUNCTION_NUMBER.pack(shared), function)
            self.functions.append(shared)
        self.send_pickled(CALL, CALL_NUMBER.pack(number) + FUNCTION_NUMBER.pack(shared), made)
        if not self.calls:
            self.head_since = time.monotonic()
        self.calls[number] = call
        self.taken += 1
        if self.taken == self.pool.calls_max:
            self.leave()

    def send_pickled(self, kind, head, made):
        if not self.main_sent and not made.by_value and b"__main__" in made.data:
            program = self.pool.program
            self.send(MAIN, pickled((program.text, program.path, program.package)))
            self.main_sent, self.loading = True, not self.calls
        for buffer in made.buffers:
            self.send(FIXED if buffer.readonly else WRITABLE, buffer)
        self.send(kind, head, made.data)

    def suits(self, call):
        """Whether its Python can read the call."""
        return not call.by_value or self.python.rpartition(".")[0] == OUR_PYTHON

    def awaited(self):
        """Calls wait for it while it searches: it is not idle."""
        self.idle_since = time.monotonic()

    def leave(self):
        """It takes no more calls; the pool ends it when it has none."""
        self.leaving = True

    def may_recall(self):
        """Whether it has calls that it has not begun."""
        return not self.recalled and len(self.calls) > (not self.loading)

    def recall(self):
        self.recalled = True
        self.send(RECALL)
        self.flush()

    def end(self):
        """Lets the worker exit, after its last call."""
        self._set(ENDING)
        self.send(END)
        self.flush()
        self.killing = self.loop.after(KILL_SECONDS, self.terminate)

    def terminate(self):
        """Ends the job at once."""
        if self.state is not ENDING:
            self._set(ENDING)
        if self.killing:
            self.killing.cancel()
        self.child.terminate()
        self.killing = self.loop.after(KILL_SECONDS, self.child.kill)

    # From the worker

    def read(self, file):
        data = os.read(file.fileno(), FRAME_MAX)
        if data:
            return self.files[file](data)
        self.close(file)
        if not self.files:
            self.client_ended()

    def close(self, file):
        self.loop.forget(file.fileno())
        del self.files[file]
        file.close()

    def look_at_client(self):
        """If the client has ended and a pipe is open, somebody else holds it: the lane does not wait for him."""
        if not self.letting_go and self.child.poll() is not None:
            self.letting_go = self.loop.after(LET_GO_SECONDS, self.let_go)

    def let_go(self):
        for file in list(self.files):
            with suppress(BlockingIOError):
                for _ in range(4):              # a pipe's room
                    self.files[file](os.read(file.fileno(), FRAME_MAX))
            self.close(file)
        self.client_ended()

    def rcvd_start(self, data):
        """What the client waits for; or GO was sent to a worker: from now on its Python must start."""
        *lines, self.start_lines = (self.start_lines + data).split(b"\n")
        for line in lines:
            word, _, text = line.decode("utf-8", "replace").partition(" ")
            if word == "-":
                self.waits = text
            elif self.state is SEARCHING:
                self.rcvd_go(word, text)

    def rcvd_go(self, worker_id, host):
        self.worker_id, self.host, self.waits, self.since = worker_id, host, "", time.monotonic()
        if worker_id in self.pool.useless():    # since this search has begun
            return self.terminate()
        self._set(STARTING)
        self.loop.after(READY_SECONDS, self.check_ready)

    def check_ready(self):
        if self.state is STARTING:
            self.failure = Failed(
                "it has not started Python in %g s (is its command python3 /dev/fd/3?)" % READY_SECONDS)
            self.terminate()

    def holds_up(self):
        """Whether it will soon take a call, so that the pool begins no other lane for it."""
        return self.state is PREPARING or self.state is STARTING and not self.is_late()

    def is_late(self):
        return self.state is STARTING and time.monotonic() - self.since >= LATE_SECONDS

    def rcvd_words(self, data):
        self.words = (self.words + data)[-4096:]

    def tell_waiting(self, is_needed):
        """Says what is waited for, if that is new: a worker, if this is needed, or one that is silent."""
        text = self.host + self.waits if self.state is UP and self.calls else self.waits if is_needed else ""
        if self.waits and text and text.partition(",")[0] != self.told:         # not each place in the line
            self.told = text.partition(",")[0]
            self.pool.tell(text)

    def rcvd_report(self, data):
        self.report += data

    def rcvd_prints(self, data):
        """Shows whole lines, and the beginning of a line that is too long."""
        *lines, self.line = (self.line + data).split(b"\n")
        if len(self.line) > PRINTED_MAX:
            lines.append(self.line)
            self.line = b""
        self.pool.show("".join("%s: %s\n" % (self.host, "\t".join(map(printable, line.split("\t"))))
                               for line in [last_shown(line).decode("utf-8", "replace") for line in lines]))

    def rcvd(self, data):
        """Handles each whole frame, and keeps the beginning of the next."""
        if self.state is ENDING:    # what a worker still sends is not kept
            return
        try:
            if self.body is not None:
                data = self.rcvd_more(data)
            offset, data = 0, self.rest + data
            while self.body is None and len(data) - offset >= LANE_HEAD.size and self.state is not ENDING:
                kind, size = LANE_HEAD.unpack_from(data, offset)
                if size > SMALL_FRAMES.get(kind, size) or kind not in self.HANDLERS:
                    raise ProtocolError("a frame of kind %r and length %d" % (kind, size))
                offset += LANE_HEAD.size + size
                if offset > len(data):
                    self.kind, self.missing = kind, size
                    self.body = bytearray() if kind == WRITABLE else io.BytesIO()
                    self.rcvd_more(data[offset - size:])
                else:
                    self.HANDLERS[kind](self, data, offset - size, offset)
            self.rest = data[offset:]
        except (ProtocolError, struct.error) as error:
            self.failure = Failed("a worker's Python does not speak cexec's protocol (%s): is its command python3 "
                                  "/dev/fd/3, with at least Python 3.6?" % printable(str(error)))
            self.terminate()

    def rcvd_more(self, data):
        """More of a long frame.  It grows as it comes: it may not be as long as it says.  Returns what is after it."""
        after, data = data[self.missing:], data[:self.missing]
        self.missing -= len(data)
        (self.body.extend if self.kind == WRITABLE else self.body.write)(data)
        if not self.missing and self.state is not ENDING:
            whole, self.body = self.body if self.kind == WRITABLE else self.body.getvalue(), None
            self.HANDLERS[self.kind](self, whole, 0, len(whole))
        return after

    def rcvd_buffer(self, data, offset, end):
        """Bytes that a result has outside of its pickle.  The slice is no copy if it is the whole."""
        self.check_buffer()
        self.buffers.append(data[offset:end])

    def check_buffer(self):
        """Raises ProtocolError if no result can come: a worker without a call could fill the memory."""
        if not self.calls:
            raise ProtocolError("a buffer of no call")

    def rcvd_writable(self, data, offset, end):
        self.check_buffer()
        self.buffers.append(data if type(data) is bytearray else bytearray(data[offset:end]))

    def rcvd_ready(self, data, offset, end):
        words = data[offset:end].decode("utf-8", "replace").split(" ", 4)
        right = words[:2] == ["cexec-lane", "1"] and len(words) == 5 and words[2].isdecimal()
        if self.state not in (SEARCHING, STARTING) or not right:
            raise ProtocolError("READY out of place")
        self.protocol, self.host = min(int(words[2]), self.pool.protocol), printable(words[4])
        self.python = printable(words[3])
        self._set(PREPARING)
        if self.pool.initializer:
            self.prepare(self.pool.initializer)
        else:
            self.up()

    def prepare(self, initializer):
        """Sends the initializer."""
        self.since = time.monotonic()
        try:
            made, _ = initializer.pickled(self.protocol, self.pool.program)
        except BaseException as error:
            return self.pool.give_up(error)
        if not self.suits(initializer):
            self.failure = Failed("it has Python %s; %s" % (self.python, SAME_PYTHON))
            return self.terminate()
        self.send_pickled(CALL, CALL_NUMBER.pack(0) + FUNCTION_NUMBER.pack(0), made)
        self.flush()

    def up(self):
        """It takes calls from now on."""
        self.since = self.idle_since = time.monotonic()
        self._set(UP)
        self.pool.lane_up()

    def is_prepared_by(self, data, offset):
        """Whether this is the result of the initializer."""
        return self.state is PREPARING and CALL_NUMBER.unpack_from(data, offset) == (0,)

    def rcvd_loaded(self, data, offset, end):
        self.loading = False

    def rcvd_import(self, data, offset, end):
        self.imports += 1
        if self.imports > 1 and self.backlog > WINDOW:
            raise ProtocolError("IMPORT twice")
        try:
            found = self.pool.program.module(data[offset:end].decode())
        except Exception as error:      # zipfile raises many kinds, if the file has changed or is encrypted
            found = log.note("a module that a worker wants: %s", error)
        self.send(MODULE, pickled(found))
        self.flush()

    def finish_call(self, data, offset, end):
        """Takes a call off the lane, and notes its time.  Returns it, and where the rest of its result begins."""
        number, = CALL_NUMBER.unpack_from(data, offset)
        call, now = self.calls.pop(number, None), time.monotonic()
        if call is None:
            raise ProtocolError("a result of no call")
        took, self.head_since = now - self.head_since, now
        self.pace = (self.pace + took) / 2 if self.first else took
        if not self.first:
            self.pool.found_useful(self.worker_id)
        self.first, self.fastest = self.first or took, min(self.fastest, took)
        if not self.calls:
            self.idle_since = now
        return call, offset + CALL_NUMBER.size

    def rcvd_value(self, data, offset, end):
        if self.is_prepared_by(data, offset):
            self.preparation = time.monotonic() - self.since
            return self.up()
        call, offset = self.finish_call(data, offset, end)
        buffers, self.buffers = self.buffers, []
        try:
            result = load_result(self.pool.readers, data, offset, buffers)
        except BaseException as error:          # a worker can send anything; with trust, what calls sys.exit() too
            self.pool.done(call, error if type(error).__name__ == "UnpicklingError" else
                           Failed("a result that cannot be read: %s: %s" % (type(error).__name__, error)))
        else:
            self.pool.done(call, None, result)

    def rcvd_raised(self, data, offset, end):
        error = load_error(self.pool.readers, data, offset + CALL_NUMBER.size, self.host)     # first: may raise
        if self.is_prepared_by(data, offset):
            self.failure, self.unprepared = error, True
            return self.terminate()
        call, _ = self.finish_call(data, offset, end)
        self.pool.done(call, error)

    def rcvd_unread(self, data, offset, end):
        """The call has not begun: the worker cannot load what it needs."""
        number, = CALL_NUMBER.unpack_from(data, offset)
        error = load_error(self.pool.readers, data, offset + CALL_NUMBER.size, self.host)
        if number not in self.calls or not self.pool.may_try_elsewhere(self.calls[number], error):
            return self.rcvd_raised(data, offset, end)
        self.head_since = time.monotonic()
        self.pool.try_elsewhere(self, self.calls.pop(number), error)

    def rcvd_failed(self, data, offset, end):
        self.failure = load_error(self.pool.readers, data, offset, self.host)
        self.terminate()

    def rcvd_back(self, data, offset, end):
        if not self.recalled:
            raise ProtocolError("BACK out of place")
        self.recalled = False
        numbers = [number for number, in CALL_NUMBER.iter_unpack(data[offset:end])]
        if not set(numbers) <= set(self.calls) or len(set(numbers)) < len(numbers):
            raise ProtocolError("BACK of no call")
        self.pool.put_back([self.calls.pop(number) for number in numbers])

    HANDLERS = {READY: rcvd_ready, IMPORT: rcvd_import, LOADED: rcvd_loaded, VALUE: rcvd_value, RAISED: rcvd_raised,
                UNREAD: rcvd_unread, FAILED: rcvd_failed, BACK: rcvd_back, FIXED: rcvd_buffer, WRITABLE: rcvd_writable}

    def client_ended(self):
        """All its pipes are closed: the child has ended."""
        if self.line:
            self.rcvd_prints(b"\n")
        self.loop.forget(self.target)
        self.child.stdin.close()
        for timer in (self.killing, self.letting_go):
            if timer:
                timer.cancel()
        try:
            reason = Failed(self.reason_of(returncode_of(self.report, self.child.wait())))
        except Failed as failed:
            reason = failed
        hopeless = b" failed=" in self.report or getattr(reason, "code", 0) == EXIT_USAGE
        self.unprepared |= self.state is PREPARING
        useless = self.failure is not None or self.state in (SEARCHING, STARTING, PREPARING) or (
            self.state is UP and self.loading)
        self._set(EXITED)
        self.pool.lane_over(self, reason if self.failure is None else self.failure, useless, hopeless)

    def has_begun(self):
        """Whether one of its calls may have begun."""
        return not self.loading and (self.failure is None or self.failure.__cause__ is None)

    def reason_of(self, code):
        """The message for a command that has ended with this returncode."""
        worker = printable(self.report.decode("utf-8", "replace").partition(" ")[0][len("worker="):])
        how = "with status %d" % code if code >= 0 else "by signal %d" % -code
        if self.state not in (SEARCHING, STARTING):
            return "the Python of worker %s (%s) ended %s%s" % (
                worker, self.host, how, " in the initializer" if self.state is PREPARING else
                " while it loaded the program" if self.loading else "")
        words = printable((self.words.decode("utf-8", "replace").strip() or "it said nothing").splitlines()[-1])
        return "the command of worker %s ended %s: %s (is it python3 /dev/fd/3?)" % (worker, how, words)


running_pools = set()               # the Pools that have a thread


def end_pools():
    """Waits for all calls, when the interpreter exits."""
    for pool in list(running_pools):
        pool.shutdown(True, False)


@functools.lru_cache(None)
def end_at_exit():
    """Sees to it, once, that end_pools() is called before the interpreter waits for its threads."""
    getattr(threading, "_register_atexit", atexit.register)(end_pools)


class Pool:
    """The lanes of an Executor, and the calls that wait for one.

    Its thread alone touches them.  It runs from the first call until all is done after shutdown(), which comes at the
    latest when the Executor is collected as garbage or the interpreter exits.  Other threads append to the inbox and
    wake it.  Futures' callbacks run in it, without a lock, so they may submit calls.
    """

    def __init__(self, pub, hosts, limit, readers, retries, send=(), threads=1, initializer=None, calls_max=None,
                 python="python3"):
        self.hosts, self.python = hosts, python         # python: the command of a lane on these hosts
        self.limit, self.retries = limit, retries
        self.pub = None
        if not hosts:
            pub = checked_path(pub)
            self.pub = os.path.abspath(pub)
            with raising(as_failed, Fatal):
                open_pub(pub)
        self.program, self.readers, self.protocol = Program(send), readers, pickle.HIGHEST_PROTOCOL
        self.threads, self.calls_max = threads, calls_max       # of a lane; None: any number
        self.initializer = initializer          # a Call without a future, or None
        self.shut = False
        self.reset()

    def reset(self):
        """Begins without calls, lanes and thread.  In a forked child too: there they are the parent's."""
        self.process, self.gate, self.thread = os.getpid(), threading.RLock(), None
        self.group = None                       # the RunGroup of the hosts, while the thread runs
        self.inbox = collections.deque()        # Calls, and methods for the thread to call
        self.queue, self.lanes, self.ticking = collections.deque(), [], False
        self.abandoned = self.sleeping = False
        self.number, self.search_at = 0, 0.0
        self.failed_initializers = set()        # ids of workers whose initializer has failed
        self.failures = self.faulty = 0         # lanes in a row that had no worker, or one that could do nothing
        self.nowhere = set()        # texts of exceptions: no worker can load what some call needs
        self.rounds = 0             # in a row in which every worker that answers was tried: see next_round()
        self.bad, self.faults = Avoided(REJECT_SECONDS), {}     # workers that get no lane; {their ids: (why, error)}
        self.prepared, self.cause = not self.initializer, None  # whether it has succeeded; what has broken the pool
        self.unlike = {}            # a worker's id: what is said of it, if it has another version of Python

    # For any thread.  With the gate, what is put before shutdown() is done, what comes later is refused, and nobody
    # writes to a pipe that is closed.  In it a signal or a garbage collection can run code of others: so the same
    # thread may enter it twice.

    def put(self, call):
        """Gives the thread a call, and starts it if needed.  Raises RuntimeError after shutdown()."""
        self.check_process()
        with self.gate:
            if not threading.main_thread().is_alive():
                raise RuntimeError("cannot schedule new futures after interpreter shutdown")
            if self.cause:
                raise self.given_up()
            if self.shut:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if self.thread is None:
                self.start_thread()
            self.inbox.append(call)
            self.wake()

    def await_hosts(self):
        """Waits until each host serves or has failed.  Returns their RunGroup; None after shutdown().

        Raises what put() raises.
        """
        self.check_process()
        with self.gate:
            if self.thread is None and not self.shut:
                self.start_thread()
        group = self.group
        while group and group is self.group and not self.cause:
            states = list(group.states.values())
            if states and WAITS not in states:
                return group
            time.sleep(TICK_SECONDS)
        if self.cause:
            raise self.given_up()
        return None

    def submit(self, function, arguments, keywords):
        """Returns the future of this call.  Raises RuntimeError after shutdown()."""
        from concurrent.futures import Future
        future = Future()
        call = Call(future, function, arguments, keywords)
        if goes_by_value(function, self.program):
            call.keep(self.program)
        self.put(call)
        return future

    def check_process(self):
        if self.process != os.getpid():
            self.reset()

    def start_thread(self):
        """Raises OSError, Failed or RuntimeError, and then nothing has changed."""
        end_at_exit()
        self.loop, (self.waker, self.woken) = Loop(), os.pipe()
        # Before Python 3.9 the interpreter waits for all others before it calls end_pools()
        daemon = not hasattr(threading, "_register_atexit")
        self.thread = threading.Thread(target=self.work, name="cexec.Executor", daemon=daemon)
        running_pools.add(self)
        with on_failure(self.drop_thread), raising(as_failed, Fatal):
            self.group = RunGroup(self.hosts, 3) if self.hosts else None
        try:
            self.thread.start()
        except RuntimeError:            # there are too many threads; after Ctrl-C here it may run
            self.drop_thread()
            raise

    def drop_thread(self):
        """It has not started."""
        self.stop_thread()
        self.thread = None

    def wake(self):
        if self.sleeping:
            self.sleeping = False
            os.write(self.woken, b"x")

    def shutdown(self, wait, cancel, abandon=False):
        """Takes no more calls, and may wait for the end.

        cancel: cancels the calls that have not begun; abandon: ends those that have.
        """
        self.check_process()
        with self.gate:
            self.shut, thread = True, self.thread
            self.inbox += [self.cancel] * cancel + [self.abandon] * abandon
            self.wake()
        if wait and thread not in (None, threading.current_thread()):
            with on_failure(self.shutdown, False, True, True):         # after Ctrl-C
                thread.join()

    # The thread

    def work(self):
        """Runs in the thread, until nothing is left to do after shutdown()."""
        self.loop.on_read(self.waker, lambda: os.read(self.waker, 512))
        if self.group:
            self.group.attend(self.loop)
        try:
            while self.step():
                try:
                    self.loop.turn()
                except Fatal as error:          # of the RunGroup: its hosts serve no more
                    self.give_up(as_failed(error))
        except BaseException as error:          # a defect of ours: nobody must wait for ever
            self.shutdown(False, False)
            for lane in self.lanes:
                lane.child.kill()
                self.queue.extend(lane.calls.values())
            self.take_in()
            self.fail_all(error)
            raise
        finally:
            self.stop_thread()

    def step(self):
        """Does what can be done now.  Returns whether more can come."""
        self.sleeping = True        # before the inbox is looked at: what comes later must wake us
        shut = self.shut            # before it too: nothing is put into it later
        self.take_in()
        if self.cause:
            self.fail_all(self.given_up())
        self.dispatch()
        return self.lanes or self.queue or self.inbox or not shut

    def take_in(self):
        """Takes what is in the inbox now.  Callbacks may put more into it."""
        for _ in range(len(self.inbox)):
            item = self.inbox.popleft()
            if isinstance(item, Call):
                self.queue.append(item)
            else:
                item()

    def stop_thread(self):
        with self.gate:
            self.sleeping, self.loop = False, None      # nobody wakes it any more
            os.close(self.waker)
            os.close(self.woken)
        if self.group:
            self.group.end()
            self.group = None
        running_pools.discard(self)

    def dispatch(self):
        """Gives calls to lanes, begins one more lane if calls are left, and ends lanes that nobody needs."""
        while self.queue and self.queue[0].future.cancelled():
            self.queue.popleft().set_running()  # it needs no lane
        while self.queue:
            self.leave_unlike(self.queue[0])
            ready = [lane for lane in self.lanes if lane.has_room()]
            if not ready:
                break
            self.give(self.queue.popleft(), min(ready, key=lambda lane: (lane.loading, len(lane.calls))))
        for lane in self.lanes:
            if lane.unsent:
                lane.flush()
        if self.queue:
            self.grow()
        self.end_idle()
        if (self.queue or self.lanes) and not self.ticking:
            self.ticking = True
            self.loop.after(TICK_SECONDS, self.tick)

    def give(self, call, lane):
        if not call.set_running():
            return
        try:
            made, function = call.pickled(lane.protocol, self.program)
        except BaseException as error:
            return self.done(call, error)
        if not lane.suits(call):
            return self.put_back([call])        # now it is known: see leave_unlike()
        self.number += 1
        lane.take(self.number, call, made, function)

    def leave_unlike(self, call):
        """Lanes whose Python cannot read the next call take no more, and others are looked for."""
        for lane in self.lanes:
            if not lane.suits(call) and lane.has_room():
                lane.leave()
                if lane.worker_id not in self.unlike:
                    self.unlike[lane.worker_id] = "%s has Python %s" % (lane.host, lane.python.rpartition(".")[0])
                    self.tell("%s: %s" % (self.unlike[lane.worker_id], SAME_PYTHON))

    def left_out(self):
        """What is known of workers whose Python cannot read the next call: {id: text}."""
        return self.unlike if self.queue and self.queue[0].by_value else {}

    def done(self, call, error, result=None):
        try:
            if error is not None:   # it may have a length, which is 0
                call.future.set_exception(error)
            else:
                call.future.set_result(result)
        except BaseException:       # of a callback, or of a future that is done: not for the other calls
            self.show(traceback.format_exc())

    def put_back(self, calls):
        """Puts calls at the head of the queue, where they were before."""
        self.queue.extendleft(reversed(calls))

    def may_grow(self):
        """Whether there may be one more lane."""
        return sum(lane.state is not ENDING for lane in self.lanes) < self.limit and time.monotonic() >= self.search_at

    def grow(self):
        """Begins one more lane, unless one is searching already, or enough of them will soon be up."""
        if not self.may_grow() or any(lane.state is SEARCHING for lane in self.lanes) or (
                sum(lane.holds_up() for lane in self.lanes) >= len(self.queue)):
            return
        try:
            if not self.group or self.group.serves():
                self.lanes.append(Lane(self))
        except Fatal as error:                  # no host will serve
            self.give_up(Failed("%s: %s" % (error, self.group.said), error.code))
        except OSError as error:
            self.cannot_grow(Failed("cannot start cexec: %s" % error))

    def cannot_grow(self, error):
        """No more workers were found: all calls fail, unless a lane is up or may soon be."""
        self.failures = self.faulty = 0
        there = [lane for lane in self.lanes if lane.state in (STARTING, PREPARING, UP)]
        if all(lane.leaving for lane in there) and self.fail_unread():
            pass                    # the others may be done by the same workers
        elif there:
            self.search_at = time.monotonic() + SEARCH_PAUSE
        elif not self.next_round():
            error, by_value = self.hopeless_error(error), bool(self.left_out())
            self.forget_faults()
            if self.failed_initializers and not self.prepared:
                self.give_up(error)
            else:
                self.fail_all(error, by_value)      # other workers may do the rest

    # A worker that cannot load what a call needs, as a module for its function, would fail one call after the other
    # at once, and so get them all.  So its lanes leave, and the call is tried on other workers.  If none can load it,
    # or LANE_FAILURES cannot, it is the call's fault: it fails, and the same error fails later ones at once.

    def may_try_elsewhere(self, call, error):
        return words_of(error) not in self.nowhere and len(call.unread) < LANE_FAILURES - 1

    def try_elsewhere(self, lane, call, error):
        call.unread[lane.worker_id] = error
        for other in self.lanes:
            if other.worker_id == lane.worker_id:
                other.leave()
        self.put_back([call])
        self.found_useless(lane, error)

    def fail_unread(self):
        """Fails the calls that no worker can load.  Returns whether there are any."""
        unread = [call for call in self.queue if call.unread]
        self.queue = collections.deque(call for call in self.queue if not call.unread)
        for call in unread:
            self.nowhere.update(map(words_of, call.unread.values()))
            for worker_id in call.unread:
                self.bad.ask_again(worker_id)
                self.faults.pop(worker_id, None)
            self.done(call, list(call.unread.values())[-1])
        return bool(unread)

    def next_round(self):
        """Asks the workers again that ended for no reason that must stay, LANE_FAILURES times in all.

        Returns whether there are any.
        """
        again = [worker_id for worker_id, (_, error) in self.faults.items()
                 if not isinstance(error.__cause__, RemoteTraceback)]
        self.rounds += 1
        if not again or self.rounds >= LANE_FAILURES:
            return False
        for worker_id in again:
            self.bad.ask_again(worker_id)
        return True

    def hopeless_error(self, error):
        """Returns the exception of calls that no worker can do: it names the workers' faults, or else is this error."""
        faults = list(self.faults.values())
        if self.left_out():
            faults.insert(0, ("%s (%s)" % (", ".join(sorted(set(self.unlike.values()))), SAME_PYTHON), None))
        if not faults:
            return error
        more = ["and %d more" % (len(faults) - 8)] * (len(faults) > 8)
        failed = Failed("no worker can do the calls: " + "; ".join([text for text, _ in faults[:8]] + more))
        failed.__cause__ = faults[-1][1]
        return failed

    def forget_faults(self):
        """Has later calls try all workers again."""
        self.bad, self.faults, self.rounds = Avoided(REJECT_SECONDS), {}, 0

    def give_up(self, error):
        """The initializer cannot be run: all calls fail, and so does submit()."""
        self.cause = error
        self.end_lanes()

    def given_up(self):
        """Returns the exception of calls after give_up()."""
        error = self.broken(words_of(self.cause))
        error.__cause__ = self.cause
        return error

    def end_lanes(self):
        for lane in self.lanes:
            if lane.state is not ENDING:
                lane.terminate()

    def fail_all(self, error, by_value=False):
        """Fails the calls that wait, or only those by value."""
        calls, self.queue = self.queue, collections.deque()
        for call in calls:
            if by_value and not call.by_value:
                self.queue.append(call)
            elif call.set_running():
                self.done(call, error)

    def lane_up(self):
        """A lane is ready, perhaps late: its worker is as good as others."""
        self.search_at, self.prepared = 0.0, True

    def lane_over(self, lane, error, useless, hopeless):
        """Puts the lane's calls back, except those that have had all their tries: they fail.

        useless: it has done nothing, and why is not our own end; hopeless: another search would end like it.
        """
        self.lanes.remove(lane)
        again = []
        for call in lane.calls.values():
            call.lane_ended(lane.has_begun())
            if self.abandoned or call.tries > self.retries:
                broken = self.broken("%s (%s)" % (words_of(error), "ended here" if self.abandoned else
                                                  "that was try %d of %d" % (call.tries, self.retries + 1)))
                self.done(call, broken)
            else:
                again.append(call)
        self.put_back(again)
        if again and not useless:
            self.tell("%s; runs its calls again" % words_of(error))
        if not any(other.state in (STARTING, PREPARING, UP) for other in self.lanes):
            self.search_at = 0.0
        if useless and lane.worker_id:
            self.found_useless(lane, error)
        elif useless:
            self.failures += 1
        self.failed_initializers |= {lane.worker_id} if lane.unprepared else set()
        if len(self.failed_initializers) >= LANE_FAILURES and not self.prepared:
            error = self.hopeless_error(error)
            self.forget_faults()
            self.give_up(error)
        elif useless and (hopeless or self.failures >= LANE_FAILURES or self.faulty >= FAULTS_MAX):
            self.cannot_grow(error)

    # A worker may be unable to do the calls: its Python does not start, or cannot load the program.  Lanes that begin
    # later do not take its offers.  Their client waits for others as for one that takes the job's arguments
    # (Search.note_unfit): while a busy one has it in line, without limit, else for a second.  So the calls
    # fail when every worker that answers was tried: once if it cannot load the program, else LANE_FAILURES times,
    # because a Python may be killed for want of memory.  FAULTS_MAX is for workers that come with ever new ids.

    def found_useless(self, lane, error):
        self.bad.for_now(lane.worker_id)
        self.faulty += 1
        text = fault_of(lane.host, lane.python, error, *["run the initializer"] * lane.unprepared)
        self.faults.pop(lane.worker_id, None)
        self.faults[lane.worker_id] = text, error       # the newest is the last
        while len(self.faults) > FAULTS_MAX:
            del self.faults[next(iter(self.faults))]
        self.tell(text + "; it gets no calls for a while", always=True)

    def found_useful(self, worker_id):
        """A lane's first result has come."""
        self.bad.forgive(worker_id)
        self.faults.pop(worker_id, None)
        self.failures = self.faulty = self.rounds = 0

    def useless(self):
        """The ids of workers that no lane is to use: those that cannot do the calls, and those that may prove so."""
        up = {lane.worker_id for lane in self.lanes if lane.state is UP}
        late = {lane.worker_id for lane in self.lanes if lane.is_late()}
        return sorted(late.difference(up).union(self.bad.now(), self.left_out()))

    def broken(self, text):
        from concurrent.futures.process import BrokenProcessPool         # what programs catch
        return BrokenProcessPool(text)

    def end_idle(self):
        """Ends lanes that have had no call for a while, or at once if no more calls can come."""
        now = time.monotonic()
        for lane in list(self.lanes):
            if lane.state is not UP and self.queue or lane.state is PREPARING and not self.shut:
                lane.awaited()
            elif not lane.calls and (lane.leaving or not self.queue) and (
                    lane.leaving or self.shut or now - lane.idle_since > max(LANE_IDLE_SECONDS, lane.preparation)):
                if lane.state is UP:
                    lane.end()
                elif lane.state is not ENDING:
                    lane.terminate()

    def tick(self):
        """Every TICK_SECONDS: recalls calls that wait for a long one, and replaces a lane that is old."""
        self.ticking = False        # dispatch() sets the next
        now = time.monotonic()
        up = any(lane.state is UP for lane in self.lanes)
        for lane in self.lanes:
            lane.look_at_client()
            lane.tell_waiting(is_needed=self.queue and not up)
        up = [lane for lane in self.lanes if lane.state is UP and not lane.leaving]
        if not self.queue and (self.may_grow() or any(not lane.calls and not lane.loading for lane in up)):
            for lane in up:
                if lane.may_recall() and now - lane.head_since > RECALL_SECONDS:
                    lane.recall()
        elif self.queue and len(up) == sum(lane.state is UP for lane in self.lanes):
            for lane in up:
                warm_up = lane.preparation + (lane.first or 0) - lane.fastest       # seconds that a new one needs again
                if now - lane.since > max(LANE_SECONDS, 20 * warm_up):
                    lane.leave()
                    break

    def cancel(self):
        """Cancels the calls that have not begun."""
        self.queue = collections.deque(call for call in self.queue if not call.future.cancel() or call.set_running())

    def abandon(self):
        self.abandoned = True
        self.cancel()
        self.fail_all(self.broken("the executor was ended"))
        self.end_lanes()

    def summary(self):
        """The key, the calls, and the hosts with their numbers of lanes, for people.  Any thread may ask."""
        lanes = list(self.lanes)
        hosts = collections.Counter(lane.host for lane in lanes if lane.state is UP)
        waiting = len(self.queue) + sum(isinstance(item, Call) for item in list(self.inbox))
        return "%s: %d running, %d waiting  %s" % (
            ",".join(self.hosts) or os.path.basename(self.pub), sum(len(lane.calls) for lane in lanes), waiting,
            " ".join("%s*%d" % item for item in sorted(hosts.items())) or "no worker")

    def tell(self, text, always=False):
        """Says on a terminal, or in a notebook, what the command line would say on a terminal."""
        with suppress(ValueError):  # standard error is closed
            if sys.stderr and (always or sys.stderr.isatty() or hasattr(sys, "ps1")):
                self.show("cexec: %s\n" % printable(text))

    def show(self, text):
        """Prints the output of functions."""
        if sys.stderr and text:
            with suppress(OSError, ValueError):  # standard error is closed
                sys.stderr.write(text)
                sys.stderr.flush()


def count_slots(pool):
    """Returns how many jobs the workers that answer take at a time.  Asks for a second or more.  Raises Failed."""
    with raising(as_failed, Fatal):
        group = pool.await_hosts() if pool.hosts else None
        if pool.hosts and not group:
            return 0
        reach = (Group(group.text), group.pub) if group else (Group(), open_pub(pool.pub))
        survey = Survey(*reach, listen_ports(), Loop(), ServerFilter())
    survey.run()
    return sum(row["slots"] for row in survey.rows() if row["state"] == "serving")


def pickled(value):
    """A pickle that any worker's Python can read."""
    return pickle.dumps(value, 2)


class ExecutorMethods:
    """A concurrent.futures.Executor whose calls run on the workers of an application.

    Executor(pub, max_workers=None, allow=(), retries=3, *, hosts=None, trust=False, send=(), threads=1,
             mp_context=None, initializer=None, initargs=(), max_tasks_per_child=None, python="python3")

    pub is the path of the public key.  The workers run
        cservice -u nobody py python3 /dev/fd/3
    with any Python from 3.6 on, and need nothing else.  Everybody who has the public key can run
    any code there as this user.

    hosts: names for ssh, in place of pub, as for cexec -s: ["box1", "4/box2"].  Workers are started
        there at the first call, and ended at the end.
    python: with hosts, the Python there that does the calls: the path of one that has your packages,
        such as "/opt/venv/bin/python3"; a name is looked for in PATH as ssh has it.

    max_workers: how many calls run at a time; None: as many as the workers take.
    allow: more classes that may be in results: names of classes, or of modules for all classes that
        they define: ["__main__.Plain", "mymodule"].  A worker can make such objects here, with any
        contents, by these classes' own code: so name only classes for data.
    retries: how often a call runs again, on another worker, if its worker is lost.  With 0 a call
        runs at most once.
    trust: results may be anything that pickle can carry, as pandas needs it; then a worker, or who
        has stolen its private key, can run any code here.  It is for workers that are your own.
    send: directories and zip files with modules of yours that the workers need, besides those that are
        beside the main program: ["/home/me/project/src"].
    threads: how many threads numpy, and other libraries that use OpenMP, OpenBLAS or MKL, start in each
        call, unless the worker's environment says it; None: as many as the library likes.
    initializer, initargs: each worker's Python calls initializer(*initargs) before its calls, to load
        data into globals, for example.  If it fails, the worker gets no calls.  If it fails on three
        workers, or on all that answer, and has succeeded on none, the Executor is broken.
    max_tasks_per_child: a worker's Python ends after so many calls, and is started anew.
    mp_context: only None, for programs that give it.

    A result may be: Python's own types and exceptions; the standard library's types for data
    (datetime, zoneinfo, decimal, fractions, uuid, pathlib, collections, ipaddress, array, regular
    expressions); numpy's arrays, scalars and dtypes without objects; and dataclasses, named tuples,
    enums and exceptions that a module which is imported here has under their name.

    Large bytes, memoryviews and numpy arrays are not copied into a pickle, with Python 3.8 or newer on
    both sides.  A memoryview arrives as bytes, or as a bytearray if it can be written to.

    A function that is found by its name in a module can go to any worker.  The file of the main
    program is sent, and the first call that needs it runs it on the worker as __mp_main__, as
    multiprocessing does: so the main program's own work must be below  if __name__ == "__main__":
    Other functions go by value, if the package cloudpickle is installed here (pip install
    cloudpickle): those of a notebook, an interactive session, python -c or standard input, lambdas,
    and functions inside others.  Then the worker must have the same minor version of Python; other
    workers get no such calls.  The globals that such a function uses come with it, as they are when
    the call is submitted: with each call of submit(), once with map().  So a global that an initializer
    is to set must not exist here; what it sets there is kept for the calls.
    Modules beside the main program are sent when a worker imports them, those in the current
    directory if the main program has no file, and those in send; installed packages must be
    installed on the workers too.  A call sees no file of yours: its data are its arguments, or what
    the initializer was given.  The output of a function comes to standard error here, after the
    worker's name.  A worker's Python does many calls, for about a minute; globals last as long.  A
    module is sent as it was when its first call needed it: after an edit make a new Executor.
    Workers are held while there are calls, and for 3 seconds more, or for as long as the initializer
    took.
    A worker whose Python does not start in 10 seconds, or cannot load the program, gets no calls for
    a while; that was no try.  While busy workers have the calls in line, these wait.  When no worker
    that answers can do them, they fail, with the name of each host, the reason and the remedy.
    On a terminal or in a notebook, standard error says what calls wait for, which worker is silent or lost, and
    which cannot do them.  repr() of an Executor has its calls and hosts.
    The callbacks of futures run in the Executor's thread: while one of them runs, the others wait.
    A forked child of the program has the Executor too, without the calls of its parent.

    Raises Failed if the public key cannot be read; ValueError; TypeError; for a name in allow
    ImportError or AttributeError if it does not exist, TypeError if it is no class for data.  A
    future's exception is the one that the function raised, with the worker's traceback as its
    __cause__; Failed if there is no worker; concurrent.futures.process.BrokenProcessPool if the
    worker was lost too often, or if the initializer has failed: then submit() raises it too;
    pickle.PicklingError for a call that cannot be sent; pickle.UnpicklingError for a result or an
    exception with something that is not allowed.
    """

    def __init__(self, pub=None, max_workers=None, allow=(), retries=3, *, hosts=None, trust=False, send=(), threads=1,
                 mp_context=None, initializer=None, initargs=(), max_tasks_per_child=None, python="python3"):
        hosts = [hosts] if isinstance(hosts, str) else list(hosts or ())
        if hosts and pub is not None:
            raise TypeError("pub and hosts do not go together: hosts have a key of their own")
        if not hosts and python != "python3":
            raise TypeError("python goes with hosts: where workers stay, the command of cservice names it")
        if max_workers is not None and max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        if retries < 0:
            raise ValueError("retries must not be negative")
        if threads is not None and threads <= 0:
            raise ValueError("threads must be greater than 0")
        if mp_context is not None:
            raise ValueError("mp_context must be None: a worker's Python is started by its cservice")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if max_tasks_per_child is not None and not isinstance(max_tasks_per_child, int):
            raise TypeError("max_tasks_per_child must be an integer")
        if max_tasks_per_child is not None and max_tasks_per_child <= 0:
            raise ValueError("max_tasks_per_child must be >= 1")
        self._given = max_workers
        self._pool = Pool(pub, hosts, max_workers or 10 ** 6, Allowed(allow, trust), retries, send, threads,
                          None if initializer is None else Call(None, initializer, tuple(initargs), {}),
                          max_tasks_per_child, os.fspath(python))
        weakref.finalize(self, self._pool.shutdown, False, False).atexit = False

    @property
    def _max_workers(self):
        """What dask and joblib read: max_workers, or else the slots of the workers that answer now, asked once."""
        self._given = self._given or count_slots(self._pool)
        return self._given or 1

    def __repr__(self):
        return "<cexec.Executor %s>" % self._pool.summary()

    def __reduce__(self):
        raise TypeError("a function that runs on a worker cannot use the Executor")

    def submit(*args, **kwargs):
        """submit(fn, *args, **kwargs): a concurrent.futures.Future of fn(*args, **kwargs), run on a worker.

        Raises RuntimeError after shutdown().
        """
        if len(args) < 2:
            raise TypeError("submit() needs a function")
        return args[0]._pool.submit(args[1], args[2:], kwargs)

    def map(self, fn, *iterables, timeout=None, chunksize=1, buffersize=None):
        """The results of fn for each of the iterables' items, in their order, as the builtin map() gives them.

        fn is sent once to each worker, so it may hold much: functools.partial(f, table).

        chunksize: so many items are one call: faster if an item takes less than a millisecond.
        buffersize: so many calls, at most, are submitted before their results are asked for; None: all at once.
        With a buffersize the iterables may be endless.

        Raises the function's exception, and concurrent.futures.TimeoutError for a result that has not come
        timeout seconds from now.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        deadline, rows = None if timeout is None else time.monotonic() + timeout, zip(*iterables)
        by_value = goes_by_value(fn, self._pool.program)
        if chunksize > 1:
            fn, items = functools.partial(call_each, fn), rows
            rows = ((chunk,) for chunk in iter(lambda: list(itertools.islice(items, chunksize)), []))
        shared = Shared(fn)
        if by_value:
            shared.keep(self._pool.program)
        more = (self._pool.submit(shared, row, {}) for row in rows)
        results = results_of(collections.deque(itertools.islice(more, buffersize)), more, deadline)
        return flattened(results) if chunksize > 1 else results

    def shutdown(self, wait=True, *, cancel_futures=False):
        """Take no more calls; wait until all are done, unless wait is false.

        cancel_futures: cancel the calls that have not begun.
        """
        self._pool.shutdown(wait, cancel_futures)

    def __exit__(self, kind, error, traceback):
        """Waits for all calls; but after Ctrl-C or sys.exit() it ends the running ones."""
        stopped = kind is not None and issubclass(kind, (KeyboardInterrupt, SystemExit))
        self._pool.shutdown(True, stopped, stopped)
        return False


def result_of(future, deadline):
    """Its result.  It is cancelled if this does not come in time, and no reference to it is left."""
    try:
        return future.result(None if deadline is None else deadline - time.monotonic())
    finally:
        future.cancel()
        del future


def results_of(futures, more, deadline):
    """The results of futures in their order; for each that is taken, one more is begun."""
    try:
        while futures:
            futures.extend(itertools.islice(more, 1))
            yield result_of(futures.popleft(), deadline)
    finally:
        for future in futures:
            future.cancel()


def flattened(chunks):
    """The items of these lists; each item is released at once."""
    for chunk in chunks:
        chunk.reverse()
        while chunk:
            yield chunk.pop()


def joblib(*arguments, **options):
    """A context in which joblib, and so the n_jobs of scikit-learn, uses the workers.

        with cexec.joblib("py.pub"):                # or hosts=["box1", "box2"]
            GridSearchCV(SVC(), grid).fit(X, y)

    The arguments are an Executor's, which is what as gives.  joblib 1.3 or newer, and what the functions use, must
    be installed here and on the workers.  Other results than numpy's arrays and plain data, as the fitted models of a
    random forest are, need trust=True.  n_jobs is all slots of the workers, unless the program says a number.
    """
    import contextlib

    from joblib import parallel_config
    from joblib.parallel import AutoBatchingMixin, ParallelBackendBase, SequentialBackend
    futures = set()

    class Backend(AutoBatchingMixin, ParallelBackendBase):
        supports_retrieve_callback = True

        def effective_n_jobs(self, n_jobs):
            return n_jobs if n_jobs and n_jobs > 0 else pool._max_workers

        def submit(self, func, callback=None):
            future = pool.submit(func)
            futures.add(future)
            future.add_done_callback(futures.discard)
            future.add_done_callback(callback)
            return future

        apply_async = submit            # its name before joblib 1.5

        def retrieve_result_callback(self, out):
            return out.result()

        def abort_everything(self, ensure_ready=True):
            for future in list(futures):
                future.cancel()

        def get_nested_backend(self):
            return SequentialBackend(nesting_level=1), 1        # a call has one slot

    @contextlib.contextmanager
    def context():
        with pool, parallel_config(Backend(), n_jobs=-1):
            yield pool

    pool = __getattr__("Executor")(*arguments, **options)
    return context()


def __getattr__(name):
    """Makes Executor at its first use, because to import concurrent.futures takes time (PEP 562, Python 3.7)."""
    if name != "Executor":
        raise AttributeError("module %r has no attribute %r" % (__name__, name))
    import concurrent.futures
    members = {key: value for key, value in vars(ExecutorMethods).items() if key not in ("__dict__", "__weakref__")}
    for key, value in members.items():
        if callable(value):
            value.__qualname__ = "Executor." + key      # for messages
    return globals().setdefault(name, type("Executor", (concurrent.futures.Executor,), members))


def __dir__():
    return sorted(set(globals()) | set(__all__))        # for help()


if __name__ != "__main__" and not hasattr(sys.modules["__main__"], "enter"):      # imported, not by The door
    __doc__ = MODULE_DOC
    if sys.version_info < (3, 7):
        __getattr__("Executor")


# ---------------------------------------------------------------------------
# The applets
# ---------------------------------------------------------------------------

APPLETS = ("cexec", "cservice", "ckeygen", "crat", "cproxy")

USAGE = """usage: cexec.py APPLET [ARGUMENT ...]
       cexec.py --install DIR
       cexec.py --help | --version

The applets, also by the name of a link to this file:
  ckeygen   make a keypair that names an application
  cservice  run a command for the holders of a public key of the application
  cexec     run the application's command on the least loaded worker
  crat      log who did what
  cproxy    join networks
"""


def install(words):
    """Makes the five links in a directory."""
    if len(words) != 1:
        raise Fatal(EXIT_USAGE, "--install takes one directory")
    here = os.path.abspath(__file__)
    if not os.path.isfile(here):
        raise Fatal(EXIT_USAGE, "--install makes links to a file, and this program was read from standard input")
    with or_fatal(words[0]):
        os.makedirs(words[0], exist_ok=True)
    target = os.path.relpath(here, os.path.realpath(words[0]))
    for applet in APPLETS:
        path = os.path.join(words[0], applet)
        with or_fatal(path):
            if os.path.islink(path):
                os.unlink(path)
            os.symlink(target, path)
    with or_fatal(here, hint=" (chmod +x it)"):
        if not os.access(here, os.X_OK):
            os.chmod(here, 0o755)
    print_out(encoded("%s: links to %s: %s\n" % (printable(words[0]), printable(target), ", ".join(APPLETS))))
    if os.path.abspath(words[0]) not in map(os.path.abspath, os.get_exec_path()):
        log.say("%s is not in PATH yet: export PATH=%s:$PATH" % (words[0], os.path.abspath(words[0])))
    return 0


def run_applet(argv):
    """Runs the applet that the program's name or the first argument names.  Returns its exit code."""
    words, name = argv[1:], os.path.basename(argv[0])
    if name not in APPLETS:
        name, words = (words[0], words[1:]) if words else ("", [])
    if name in APPLETS:
        log.speak_for(name)
        if name != "cexec":         # cexec must first see which descriptors are open
            fill_standard()
        return globals()["main_" + name](words)
    if name == "--install":
        return install(words)
    if name == "--version":
        print_out(("cexec %s\n" % VERSION).encode())
    elif name in ("-h", "--help"):
        print_out(USAGE.encode())
    else:
        raise Fatal(EXIT_USAGE, "%s (%s; try --help)" % ("%s: no such applet" % name if name else "no applet is named",
                                                         ", ".join(APPLETS)))
    return 0


def main(argv):
    """Runs an applet and ends this process with its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # else, if our starter ignores it, we cannot reap our children
    try:
        try:
            code = run_applet(argv)
        except SystemExit as error:             # after -h and --version
            code = error.code or 0
        print_out()
    except Fatal as error:
        tidy_up()                   # first: it may end a full screen, and the message with it
        log.say(str(error))
        code = error.code
    except KeyboardInterrupt:
        die_of(signal.SIGINT)
    except BrokenPipeError:
        die_of(signal.SIGPIPE)      # the reader of our output has gone
    except ImportError as error:
        log.say(lack_of(error) or "this Python is not complete (%s): use another python3%s" % (error, memory_hint()))
        code = EXIT_TEMPORARY
    except Exception as error:      # a defect of ours: one line, and the traceback only with -v
        tidy_up()
        if log.verbose:
            traceback.print_exc()
        log.say(lack_of(error) or "internal error: %s: %s%s" % (type(error).__name__, error, memory_hint()))
        code = EXIT_TEMPORARY
    tidy_up()
    os._exit(code)                  # at once: Python has nothing to clean up


# ---------------------------------------------------------------------------
# The door: how this file is started
# ---------------------------------------------------------------------------
#
# Python compiles a script anew at each start, and for this one that takes longer than a short
# job.  So the first lines of this file let sh give Python only the part below START.  There
# enter() runs the whole file as a module, from its compiled code in ~/.cache/cexec.  If that is
# missing, the parts below MAKE, here and in Basics, make it.
#
#     ./cexec.py cexec ..., a link        sh, enter(), main() in the module
#     python3 cexec.py cexec ...          main() in the file
#     python3 cexec.py cservice ...       the same, then slim_down(), enter(), main() in the module
#     python3 LINK ...                    as cexec.py and the link's name
#     python3 - cservice ... < cexec.py   main() in standard input: slim_down() has no file
#     a child of ours: child_words()      enter(), main() in the module
#     a worker of cservice -s             the code that its starter sends: program_for()
#     import cexec                        nothing is started
#
# What is kept is a part of the program, without the sections that the applet does not need: see
# PARTS.  "job" is for cexec without options.  With all sections, a short job would take a
# seventh longer, and an idle cservice would have 1.6 MB more.  Code of a part may call only what
# the part has: else it ends with a NameError, when it runs and not before.
#
# sh gives -S, because we use no site packages.  It first tests that standard input is no
# directory, because with one Python does not start.  The part below START is compiled at each
# start: it must stay short, and fit into the 4096 bytes that those lines read.


def show_in_ps():
    """Makes ps show our name and arguments instead of the text after -c (Linux; see proc(5))."""
    try:
        with open("/proc/self/comm", "w") as comm:
            comm.write(os.path.basename(sys.argv[0]))
        with open("/proc/self/stat", "rb") as file:
            begin, end = map(int, file.read().rpartition(b")")[2].split()[45:47])       # arg_start, arg_end
        with open("/proc/self/mem", "r+b", 0) as memory:
            memory.seek(begin)
            words = memory.read(end - begin).split(b"\0")
            index = words.index(b"-c")
            memory.seek(begin)
            memory.write(b"\0".join(words[:index] + words[index + 2:]).ljust(end - begin, b"\0"))
    except (OSError, ValueError):
        pass


# MAKE
SECTION_LINE = b"\n# %s\n" % (b"-" * 75)
KEPT_MAX = 16                       # files in the cache: four for each path of this file and each version of Python
KEPT_NAME = r"(?s)%.*\.[\w-]+\.(job|cexec|cservice|all)(\.[0-9]+\.part)?\Z"    # of kept_path() and write_kept()
OTHERS = (b"# crat", b"# cproxy", b"# ckeygen", b"# Python")
PARTS = {"job": (b"# Files", b"# cexec -", b"# cservice", *OTHERS), "cexec": (b"# cservice", *OTHERS),
         "cservice": (b"# cexec", b"# cservice -s", *OTHERS), "all": ()}
                                    # a part of the program: how the titles of the sections that it lacks begin


def compiled(path, part):
    """The code of a part of the file, without docstrings, a code object for each section, as bytes.

    To compile each section by itself takes two thirds of the time of the whole, and a fifth of the memory.
    """
    import marshal
    with open(path, "rb") as file:
        pieces = file.read().split(SECTION_LINE)
    sections, line = [], 0
    for title, section in zip([b""] + pieces, pieces):          # a section's title is the piece before it
        if not title.startswith(PARTS[part]):
            sections.append(compile(b"\n" * line + section, path, "exec", optimize=2))  # lines keep their numbers
        line += section.count(b"\n") + 2
    return marshal.dumps(sections)


def made_by_child(make):
    """The result of make(), which are bytes, in a child process; None if there can be no child.

    To compile this file takes up to 7 MB, which Python would not give back to the system.
    """
    def work():
        with open(writer, "wb") as file:
            file.write(make())

    try:
        reader, writer = os.pipe()
    except OSError:                 # no descriptor is free
        return None
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # as in main()
    try:
        child = forked(work, [writer])
    except OSError:                 # there are too many processes
        os.close(reader)
        return None
    finally:
        os.close(writer)
    with open(reader, "rb") as file:
        made = file.read()
    return None if os.waitpid(child, 0)[1] else made


def opened_cache(path):
    """A descriptor of this directory, made if need be.  Raises OSError if others may write there, or it is a link."""
    os.makedirs(path, 0o700, exist_ok=True)
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    about = os.fstat(directory)
    if about.st_uid != os.geteuid() or about.st_mode & 0o022:
        os.close(directory)
        raise OSError("not ours alone")
    return directory


def prune(directory):
    """Removes the oldest files of the cache if there are too many, and no file of another name.  Raises OSError."""
    import re
    times = {name: os.stat(name, dir_fd=directory, follow_symlinks=False).st_mtime
             for name in os.listdir(directory) if re.match(KEPT_NAME, name)}
    for oldest in sorted(times, key=times.get)[:-KEPT_MAX]:
        os.unlink(oldest, dir_fd=directory)


def write_kept(kept, data):
    """Writes a file of the cache, whole or not at all, and removes others if there are too many.  Raises OSError."""
    cache, name = os.path.split(kept)
    directory, part = opened_cache(cache), "%s.%d.part" % (name, os.getpid())
    try:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory)
        try:
            with open(fd, "wb") as file:
                file.write(data)
            os.rename(part, name, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError:
            os.unlink(part, dir_fd=directory)
            raise
        prune(directory)
    finally:
        os.close(directory)


def make(path, part, kept):
    """The code of a part as bytes, newly compiled; writes it to kept, if that is a path.  Raises OSError."""
    of = identity(path)             # first: if the file changes meanwhile, this code is never taken for the new one's
    data = made_by_child(lambda: compiled(path, part)) or compiled(path, part)
    try:
        if kept and not sys.dont_write_bytecode:
            write_kept(kept, digest(of, data) + data)
    except OSError:
        pass                        # the disk is full, or the directory not ours: the next start compiles again
    return data


# START
def part_needed():
    """The part that this start needs: see PARTS."""
    name, *words = [sys.argv[0].rpartition("/")[2]] + sys.argv[1:]
    if name[-3:] in ("", ".py"):    # no link: see child_words()
        name, *words = words or [""]
    if name == "cexec":
        return "cexec" if words and words[0][:1] == "-" else "job"
    hosts = any(word[:1] == "-" and "s" in word for word in words)      # perhaps -s
    return "cservice" if name == "cservice" and not hosts else "all"


def identity(path):
    """What tells this version of the file at path, and of Python, from others."""
    import os
    about = os.stat(path)
    return repr((sys.hexversion, path, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)).encode()


def digest(of, data):
    """The SHA-256 before kept code.  It covers the code, because a damaged one could crash Python."""
    import hashlib
    made = hashlib.sha256(of)
    made.update(data)
    return made.digest()


def kept_path(path, part):
    """Where the compiled code of a part is kept.  Raises OSError in another user's home (sudo)."""
    import os
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    home = xdg if xdg.startswith("/") else os.environ.get("HOME") or os.devnull     # a relative path does not count
    if os.stat(home).st_uid != os.geteuid():
        raise OSError("another user's home")
    name = "%s.%s.%s" % (path.replace("/", "%"), sys.implementation.cache_tag, part)
    return os.path.join(home, "cexec" if home is xdg else ".cache/cexec", name)


def read_kept(kept, of):
    """The code that make() has kept.  Raises OSError if it is of another file, or another user may have written it."""
    import os
    import stat
    with open(os.open(kept, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb", 0) as file:     # it may be a FIFO
        about = os.fstat(file.fileno())
        if about.st_uid != os.geteuid() or about.st_mode & 0o022 or not stat.S_ISREG(about.st_mode):
            raise OSError("not ours alone")
        made, data = file.read(32), file.read()
    if made != digest(of, data):
        raise OSError("damaged, or of another file")
    return data


def code_of(path, part):
    """The code objects of a part of the file: from the cache, or else newly made.  Raises OSError."""
    import marshal
    kept = None
    try:
        kept = kept_path(path, part)
        data = read_kept(kept, identity(path))
    except OSError:
        import os
        import signal
        with open(path, "rb") as source:
            names = {"__name__": "make", "os": os, "signal": signal, "sys": sys}    # so its last lines start nothing
            exec(b"".join(source.read().split(b"\n# MAKE\n")[1::2]), names)
        data = names["make"](path, part, kept)
    return marshal.loads(data)


def drop_relative_paths():
    """No module is imported from the current directory: for -c, or an empty or relative path in PYTHONPATH."""
    sys.path[:] = [path for path in sys.path if path.startswith("/")]
    import os
    try:                            # Python 3.11 has made PYTHONPATH's absolute
        ours = {os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "/").split(":") if path[:1] != "/"}
    except OSError:                 # the current directory was removed
        ours = ()
    sys.path[:] = [path for path in sys.path if path not in ours]


def enter():
    """Runs this file as the module cexec: argv is -c, the file's path, and its arguments."""
    import gc
    gc.disable()                    # until started_up(): it would cost 10 ms, and find nothing
    drop_relative_paths()
    import os
    del sys.argv[0]
    module = sys.modules["cexec"] = type(sys)("cexec")
    module.__file__ = os.path.realpath(sys.argv[0])
    for code in code_of(module.__file__, part_needed()):
        exec(code, module.__dict__)
    module.show_in_ps()
    module.main(sys.argv)


if __name__ == "__main__":
    enter() if sys.argv[0] == "-c" else main(sys.argv)
