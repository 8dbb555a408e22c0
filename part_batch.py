"""Tests of cexec -m."""
from test_cexec import *  # noqa: F401,F403
import collections
import concurrent.futures
import contextlib
import filecmp
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time

import pytest

import cexec
from test_cexec import (PATIENCE, PROGRAM, PYTHON, Asker, Ear, Peer, children_of, cluster, data_frame, group_port, hosts,
                        make_file, need, need_root, no_defect, open_files, play_worker, processes_with, read,
                        refusal, rss, rows_of, skip, until)


# ---------------------------------------------------------------------------
# A batch of files
# ---------------------------------------------------------------------------

NOTED = 'printf "%s\\0" "$PEER_FILE" >>runs; '      # what the worker has been given, in the order of its beginning


def batch_words(cluster, files, options=(), variables=()):
    return ["-m", *options, cluster.pub, *variables, "--", *files]


def batch(cluster, *files, options=(), variables=(), **rest):
    """Runs cexec -m to its end."""
    return cluster.run("cexec", *batch_words(cluster, files, options, variables), **rest)


def start_batch(cluster, *files, options=(), variables=(), **rest):
    """Starts cexec -m; client.said() is what is on its standard error."""
    errors = cluster.path("errors-%s" % os.urandom(3).hex())
    with open(errors, "wb") as file:
        client = cluster.start("cexec", *batch_words(cluster, files, options, variables), stderr=file, **rest)
    client.said = lambda: read(errors).decode()
    return client


def begun(cluster):
    """The files that workers have begun, oldest first."""
    with contextlib.suppress(FileNotFoundError):
        return read(cluster.path("runs")).split(b"\0")[:-1]
    return []


def made_files(cluster, count, directory="."):
    """Small files, each with other bytes: their names."""
    os.makedirs(cluster.path(directory), exist_ok=True)
    names = [os.path.normpath("%s/f%03d" % (directory, number)) for number in range(count)]
    for number, name in enumerate(names):
        make_file(cluster, name, b"%d\n" % number * (number % 7 * 100 + 1))
    return names


def parts(directory):
    return [name for name in os.listdir(directory) if os.fsencode(name).endswith(b".part")]


def rows_of_log(path):
    """The rows of a job log as dictionaries; its heads come first and once."""
    heads, *lines = read(path).decode().split("\n")[:-1]
    assert heads.split("\t") == "Seq Host Starttime JobRuntime Send Receive Exitval Signal Command".split()
    return [dict(zip(heads.split("\t"), line.split("\t"))) for line in lines]


def supervisors(*workers):
    """How many supervisors these workers have had."""
    return sum(len(re.findall(rb"supervisor \d+ forked", read(worker.log))) for worker in workers)


# Five hundred files

ODD = [b"plain", b"with space", b"quote'd \"twice\"", b"two\nlines", b"-dash", b"--", b"$(touch oops)", b"\xff\xfe bytes",
       "größe".encode(), b"tab\there", b"{}", b"{.}.x", b"a.b.c", b".hidden", b"back\\slash", b"*?[x]", b"%s%d"]
FILES, FAILING, BIG = 500, 3, 200000000


def five_hundred(directory):
    """Makes the files, of 0 bytes to 200 MB: their names, as bytes."""
    chance, block = random.Random(3), os.urandom(1 << 20)
    names = []
    for number in range(FILES):
        odd = ODD[number % len(ODD)]
        name = (b"fail" if number % 150 == 149 else b"") + odd + (b"%d" % number if number >= len(ODD) else b"")
        size = {0: 0, 100: BIG}.get(number, int(10 ** chance.uniform(0, 5)))
        start = chance.randrange(len(block))
        with open(os.path.join(os.fsencode(directory), name), "wb") as file:
            file.write(block[start:start + min(size, 99999)])
            file.truncate(size)
        names.append(name)
    return names


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
    first.send_signal(signal.SIGINT)
    assert first.wait(PATIENCE) == -signal.SIGINT
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
    for pid in [workers[2].pid, *children_of(workers[2].pid)]:
        os.kill(pid, signal.SIGKILL)
    assert second.wait(PATIENCE * 2) == FAILING, second.said()
    good = [name for name in names if not name.startswith(b"fail")]
    assert whole() == {name + b".done" for name in good} and not parts(cluster.path("out"))
    for name in good:
        local = subprocess.run(["sh", "-c", "cat; echo the end"], stdin=open(os.path.join(place, name), "rb"),
                               stdout=subprocess.PIPE).stdout
        assert read(os.path.join(os.fsencode(cluster.path("out")), name + b".done")) == local, name
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


# Names

def test_outputs_are_named_as_parallel_names_them():
    need("parallel")
    parts_of_names = ["a", "a.b", "a.b.c", ".a", ".a.b", "a.", "..a", "a b", "a'b\"c", "-a.x", "ä.ö", "a\nb.c\nd", "{.}", "%s.x",
                      "$x.y", "a\\b.c", "a..b", "a.b c", "~.x", "*.?", "a.tar.gz", "x=1.y", "nl.\n", "n.l\n", "#.#", "&;.|"]
    names = [*parts_of_names, *("d/" + part for part in parts_of_names), *("/d.e/" + part for part in parts_of_names),
             *("./" + part for part in parts_of_names[:8]), *("../d.e/" + part for part in parts_of_names[:8]),
             "/a", "/a.b", "d//a.b", "d.x/a", "d/.x/a"]
    patterns = ["{}", "{.}", "{/}", "{//}", "{/.}", "{.}.ogg", "x{/.}y{/}z{}", "out/{//}/{/.}.x", "{}{}", "{ }", "{..}", "{", "}"]
    told = subprocess.run(["parallel", "--will-cite", "-0", "-k", "-j4", "-q", "printf", "%s\\0", *patterns], check=True,
                          input="\0".join(names).encode() + b"\0", stdout=subprocess.PIPE).stdout.decode().split("\0")[:-1]
    ours = [cexec.fill_pattern(pattern, name) for name in names for pattern in patterns]
    assert len(told) == len(ours)
    different = [(name, pattern, cexec.fill_pattern(pattern, name), theirs) for (name, pattern), theirs in
                 zip(((name, pattern) for name in names for pattern in patterns), told)
                 if cexec.fill_pattern(pattern, name) != theirs]
    assert not different


@pytest.mark.parametrize("options, text", [((), b"f000\n\nf001\nf 2"), (("-0",), b"f000\0f001\0\0f 2\0")])
def test_names_on_standard_input(cluster, options, text):
    made_files(cluster, 2)
    make_file(cluster, "f 2", b"2")
    cluster.worker("tr", "0-9", "a-j")
    done = batch(cluster, "-", options=options, input=text)
    assert (done.returncode, done.stderr) == (0, b"")
    assert [read(cluster.path(name)) for name in ("f000.out", "f 2.out")] == [b"a\n", b"c"]
    assert os.path.exists(cluster.path("f001.out"))


def test_names_with_zeros_need_no_dash(cluster):
    make_file(cluster, "two\nlines", b"1")
    cluster.worker("cat")
    done = cluster.run("cexec", "-m0", "-o", "{}.x", cluster.pub, input=b"two\nlines\0")
    assert (done.returncode, done.stderr, read(cluster.path("two\nlines.x"))) == (0, b"", b"1")


def test_no_names_are_no_work(cluster):
    for words in (["-"], []):
        assert batch(cluster, *words, input=b"").returncode == 0
    refusal(cluster.run("cexec", "-m", cluster.pub), 100, "no files are named")
    done = cluster.run("cexec", *batch_words(cluster, ["-"]), stdin=None, preexec_fn=lambda: os.close(0))
    assert (done.returncode, done.stderr) == (0, b"")
    unreadable = os.open(os.devnull, os.O_WRONLY)
    refusal(cluster.run("cexec", *batch_words(cluster, ["-"]), stdin=unreadable), 111, "standard input: Bad file descriptor")
    os.close(unreadable)


# What is done, and where to

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


def test_outputs_on_standard_output_keep_their_order(cluster):
    """The first is slow: not more than 256 others are done meanwhile, with no more than the usual descriptors."""
    names = made_files(cluster, 400)
    worker = cluster.worker("sh", "-c", NOTED + '[ "$PEER_FILE" = f000 ] && while [ ! -e go ]; do sleep 0.05; done; cat',
                            env={"CONCURRENCY": "4"})
    with open(cluster.path("all"), "wb") as output:
        client = start_batch(cluster, *names, options=["-o", "-"], stdout=output,
                             preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024)))
    until(lambda: len(begun(cluster)) >= cexec.OUTPUTS_MAX and len(children_of(worker.pid)) == 1, "the wait for the first")
    assert len(begun(cluster)) == cexec.OUTPUTS_MAX and read(cluster.path("all")) == b""
    assert open_files(client.pid) < 256 + 40
    make_file(cluster, "go")
    assert client.wait(PATIENCE) == 0, client.said()
    assert read(cluster.path("all")) == b"".join(read(cluster.path(name)) for name in names)
    assert not parts(cluster.directory) and not [name for name in os.listdir(cluster.directory) if name.endswith(".out")]


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
    """A full pipe stops the printing, not cexec."""
    names = made_files(cluster, 3)
    worker = cluster.worker("sh", "-c", NOTED + "head -c 1000000 /dev/zero", env={"CONCURRENCY": "3"})
    client = start_batch(cluster, *names, options=["-o", "-"], stdout=subprocess.PIPE)
    until(lambda: len(begun(cluster)) == 3 and not children_of(worker.pid), "the end of the jobs")
    client.send_signal(number)
    assert client.wait(PATIENCE) == -number
    assert client.said() == "cexec: interrupted: 3 of 3 files are done\n"


# What fails

def test_failures_are_counted_and_told(cluster):
    """Each with its file's name and what its command said; what a successful one said is not shown."""
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
        "cexec: exit: exit status 3\nsaid exit\n", "cexec: killed: killed by signal 9\nsaid killed\n",
        "cexec: term: killed by signal 15\nsaid term\n", "cexec: missing: No such file or directory\n",
        "cexec: directory: not a regular file\n", "cexec: fifo: not a regular file\n",
        "cexec: none/x: No such file or directory\n"])
    left = sorted(name for name in os.listdir(cluster.directory) if ".out" in name or ".part" in name)
    assert left == ["fine.out", "good.out"] and read(cluster.path("fine.out")) == b"half\nin\n"
    ends = {row["Command"]: (row["Exitval"], row["Signal"]) for row in rows_of_log(cluster.path("log"))}
    assert ends == {"good": ("0", "0"), "fine": ("0", "0"), "exit": ("3", "0"), "killed": ("0", "9"), "term": ("0", "15"),
                    "missing": ("111", "0"), "directory": ("111", "0"), "fifo": ("111", "0"), "none/x": ("111", "0")}


def test_more_than_a_hundred_failures_are_101(cluster):
    cluster.worker("false")
    for count, status in ((1, 1), (100, 100), (101, 101), (130, 101)):
        assert batch(cluster, *("no%d" % number for number in range(count))).returncode == status


@pytest.mark.parametrize("command, status, why", [
    ("/no/such/command", 127, "No such file or directory"), ("/etc/passwd", 126, "Permission denied")])
def test_worker_that_cannot_run_its_command_does_not_fail_all(cluster, command, status, why):
    """It gets one file, and backs off: another does the rest."""
    names = made_files(cluster, 40)
    broken = cluster.worker(command, env={"CONCURRENCY": "1"})
    until_failed = start_batch(cluster, *names, options=["--log", "log"])
    until(lambda: supervisors(broken) >= 1, "the first failure")
    cluster.worker("cat")
    failed = until_failed.wait(PATIENCE * 2)
    said = until_failed.said()
    assert 1 <= failed <= 5 and said.count("%s: %s" % (command, why)) == failed == supervisors(broken), said
    assert [row["Exitval"] for row in rows_of_log(cluster.path("log"))].count(str(status)) == failed


def without_power():
    """Words before a command: root that may not read and write everything."""
    need_root()
    need("setpriv")
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
    need_root()
    need("unshare", "mount")
    os.mkdir(cluster.path("small"))
    make_file(cluster, "little", b"in")
    make_file(cluster, "large", bytes(3000000))
    make_file(cluster, "last", b"in")
    worker = cluster.worker("cat", env={"CONCURRENCY": "1"})
    words = cluster.argv("cexec", *batch_words(cluster, ["little", "large", "last"], ["-o", "small/{}", "--log", "log"]))
    script = 'mount -t tmpfs -o size=1m none small && "$@"; echo $? >status; ls -A small >listed'
    done = subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", *words], env=cluster.environment(),
                          cwd=cluster.directory, stderr=subprocess.PIPE, timeout=PATIENCE)
    assert done.stderr == b"cexec: large: small/large: No space left on device\n"
    assert read(cluster.path("status")) == b"1\n" and read(cluster.path("listed")) == b"last\nlittle\n"
    ends = [(row["Command"], row["Exitval"], row["Signal"]) for row in rows_of_log(cluster.path("log"))]
    assert ends == [("little", "0", "0"), ("large", "111", "0"), ("last", "0", "0")]
    no_defect(read(worker.log))


def test_log_on_a_full_disk(cluster):
    make_file(cluster, "in", b"in")
    cluster.worker("cat")
    refusal(batch(cluster, "in", options=["--log", "/dev/full"]), 111, "--log /dev/full: No space left on device")
    refusal(batch(cluster, "in", options=["--log", "none/log"]), 111, "--log none/log: No such file or directory")
    done = batch(cluster, "in", options=["-o", "-"], stdout=open("/dev/full", "wb"))
    assert done.returncode == 111 and b"standard output: No space left on device" in done.stderr


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
