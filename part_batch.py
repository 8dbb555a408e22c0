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
                        listening, make_file, need, need_root, no_defect, open_files, play_worker, processes_with, read,
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


# How many at a time, and where

COUNTED = "echo + >>count; cat; sleep 0.02; echo - >>count"


def at_once(cluster):
    """The most commands that have run at a time."""
    running = [1 if line == b"+" else -1 for line in read(cluster.path("count")).split()]
    return max(sum(running[:end]) for end in range(1, len(running) + 1))


@pytest.mark.parametrize("jobs", [1, 3, 5])
def test_no_more_than_so_many_at_a_time_and_no_fewer(cluster, jobs):
    names = made_files(cluster, 40)
    for _ in range(2):
        cluster.worker("sh", "-c", COUNTED, env={"CONCURRENCY": "4", "BOOST": "0"})
    assert batch(cluster, *names, options=["-j", str(jobs)]).returncode == 0
    assert at_once(cluster) == jobs


def test_all_slots_of_all_workers_are_used(cluster):
    names = made_files(cluster, 30)
    workers = [cluster.worker("sh", "-c", NOTED + "while [ ! -e go ]; do sleep 0.02; done; cat", env={"CONCURRENCY": "3"})
               for _ in range(2)]
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


def test_one_port_is_enough(cluster):
    """With a single port to listen on there is one search at a time."""
    names = made_files(cluster, 20)
    cluster.worker("cat", env={"CONCURRENCY": "3"})
    done = batch(cluster, *names, env={"CEXEC_LISTEN_PORTS": str(cexec_port())})
    assert (done.returncode, done.stderr) == (0, b"")


def cexec_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_few_descriptors_are_enough(cluster):
    """Where more slots are free than there are descriptors for."""
    names = made_files(cluster, 36)
    cluster.worker("sh", "-c", "cat; sleep 0.25", env={"CONCURRENCY": "40", "BOOST": "0"})
    done = batch(cluster, *names, options=["-j", "1000"],
                 preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (90, 90)))
    assert (done.returncode, done.stderr) == (0, b"")


def test_another_client_is_served_in_the_middle_of_a_batch(cluster):
    """Before the third file that is begun after it came: two were in the line before it."""
    names = made_files(cluster, 60)
    worker = cluster.worker("sh", "-c", NOTED + "sleep 0.1; cat", env={"CONCURRENCY": "1"})
    client = start_batch(cluster, *names)
    for _ in range(3):
        before = len(begun(cluster))
        until(lambda before=before: len(begun(cluster)) >= before + 3, "some of the batch")
        other = cluster.start_client("FILE=other", stdout=subprocess.DEVNULL)
        known = len(set(re.findall(rb"<- ANNOUNCE (\w+)", read(worker.log))))
        at = len(begun(cluster))
        assert other.wait(PATIENCE) == 0 and known
        place = len(begun(cluster)) - 1 - begun(cluster)[::-1].index(b"other")
        assert place <= at + 4, (place, at)
    assert client.poll() is None
    assert client.wait(PATIENCE) == 0 and len(begun(cluster)) == 63
    assert 3 < supervisors(worker) < 20


def test_two_batches_share_the_slots(cluster):
    """Neither waits for the other's end."""
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
    workers[0].terminate()
    assert workers[0].wait(PATIENCE) == 0 and client.poll() is None
    assert client.wait(PATIENCE) == 0 and client.said() == ""
    assert sorted(begun(cluster)) == sorted(name.encode() for name in names)
    assert not any("rats out" in line for line in logger.lines())


# Losses

def test_workers_lost_one_after_another(cluster):
    names = made_files(cluster, 80)
    workers = [cluster.worker("sh", "-c", NOTED + "sleep 0.03; cat", env={"CONCURRENCY": "2"}) for _ in range(4)]
    client = start_batch(cluster, *names)
    for number, worker in enumerate(workers[:3]):
        until(lambda number=number: len(begun(cluster)) > 15 * (number + 1), "some more of the batch")
        for pid in [worker.pid, *children_of(worker.pid)]:
            os.kill(pid, signal.SIGKILL)
    assert client.wait(PATIENCE) == 0 and client.said() == ""
    for name in names:
        assert read(cluster.path(name + ".out")) == read(cluster.path(name))
    assert 80 <= len(begun(cluster)) <= 86 and not parts(cluster.directory)


def test_file_that_kills_its_worker_is_given_up(cluster):
    """After CEXEC_RETRIES more runs; the rest is done."""
    names = made_files(cluster, 12)
    worker = cluster.worker("sh", "-c", NOTED + '[ "$PEER_FILE" != f004 ] || kill -KILL $PPID; cat', env={"CONCURRENCY": "1"})
    done = batch(cluster, *names, options=["--log", "log"], env={"CEXEC_RETRIES": "2"})
    assert done.returncode == 1
    assert re.fullmatch(rb"cexec: f004: worker 127\.0\.0\.1 lost: [^\n]+\n", done.stderr)
    assert collections.Counter(begun(cluster)) == {name.encode(): 3 if name == "f004" else 1 for name in names}
    ends = {row["Command"]: row["Exitval"] for row in rows_of_log(cluster.path("log"))}
    assert ends == {name: "111" if name == "f004" else "0" for name in names}
    assert not parts(cluster.directory) and not os.path.exists(cluster.path("f004.out"))
    no_defect(read(worker.log))


def test_no_worker_at_all(cluster):
    names = made_files(cluster, 3)
    make_file(cluster, "f001.out", b"there")
    done = batch(cluster, *names, env={"CEXEC_TIMEOUT_ACCEPT": "1"})
    line = refusal(done, 111, "no worker answered in 1 s on ")
    assert line.endswith("; 1 of 3 files are done; the same command again does the rest")
    assert not parts(cluster.directory)


def test_last_worker_goes(cluster):
    names = made_files(cluster, 30)
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
    client.send_signal(number)
    assert client.wait(PATIENCE) == -number
    assert client.said() == "cexec: interrupted: 0 of 9 files are done; the same command again does the rest\n"
    assert not parts(cluster.directory) and not [name for name in os.listdir(cluster.directory) if ".out" in name]
    until(lambda: not children_of(worker.pid), "the end of the commands")


def test_killed_batch_is_taken_up_again(cluster):
    """KILL leaves it no time to clear up: its commands end all the same, and the next one uses what is left."""
    names = made_files(cluster, 9)
    worker = cluster.worker("sh", "-c", NOTED + 'echo half; [ -e go ] || { seq 1000; sleep 600; }; cat', env={"CONCURRENCY": "2"})
    client = start_batch(cluster, *names)
    until(lambda: len(begun(cluster)) == 2 and sum(size > 3000 for size in map(
        os.path.getsize, map(cluster.path, parts(cluster.directory)))) == 2, "the start")
    client.kill()
    client.wait()
    assert len(parts(cluster.directory)) >= 2
    until(lambda: not children_of(worker.pid), "the end of the commands")
    make_file(cluster, "go")
    assert batch(cluster, *names).returncode == 0
    for name in names:
        assert read(cluster.path(name + ".out")) == b"half\n" + read(cluster.path(name))
    assert not parts(cluster.directory)


def test_two_batches_for_the_same_outputs(cluster):
    """What one is writing the other leaves alone; a third finds all done."""
    names = made_files(cluster, 2)
    cluster.worker("sh", "-c", NOTED + "echo half; while [ ! -e go ]; do sleep 0.02; done; cat", env={"CONCURRENCY": "4"})
    first = start_batch(cluster, *names)
    until(lambda: len(begun(cluster)) == 2, "the start")
    second = batch(cluster, *names)
    assert second.returncode == 2 and sorted(second.stderr.decode().splitlines()) == [
        "cexec: %s: .%s.out.part: another cexec is writing it" % (name, name) for name in names]
    make_file(cluster, "go")
    assert first.wait(PATIENCE) == 0 and not parts(cluster.directory)
    assert [read(cluster.path(name + ".out")) for name in names] == [b"half\n" + read(cluster.path(name)) for name in names]
    assert batch(cluster, *names).returncode == 0 and len(begun(cluster)) == 2


def test_stopped_client_goes_on(cluster):
    """Stopped for longer than a worker waits for the next file: no worker counts as lost, and no file as tried."""
    names = made_files(cluster, 6)
    worker = cluster.worker("sh", "-c", NOTED + "cat; sleep 0.3; head -c 3000000 /dev/zero", env={"CONCURRENCY": "1"})
    logger = cluster.logger(cluster.pub)
    client = start_batch(cluster, *names, env={"CEXEC_RETRIES": "0"})
    until(lambda: len(begun(cluster)) == 2, "the second file")
    client.send_signal(signal.SIGSTOP)
    until(lambda: read(worker.log).count(b"-> EXIT") == 2, "its end")
    time.sleep(3.5)                     # OFFER_SECONDS
    client.send_signal(signal.SIGCONT)
    assert client.wait(PATIENCE) == 0, client.said()
    assert len(begun(cluster)) == 6 and client.said() == "" and not any("rats out" in line for line in logger.lines())
    assert all(os.path.getsize(cluster.path(name + ".out")) > 3000000 for name in names)


def other_pythons():
    for version in ("3.6.15", "3.13.0"):
        path = os.path.expanduser("~/.pyenv/versions/%s/bin/python3" % version)
        yield pytest.param(path, marks=pytest.mark.skipif(not os.path.exists(path), reason="no " + version), id=version)


@pytest.mark.parametrize("other", other_pythons())
@pytest.mark.parametrize("who", ["client", "worker"])
def test_other_pythons(cluster, other, who):
    names = made_files(cluster, 30)
    usual = cluster.launch
    strange = [other, *usual[1:]]
    cluster.launch = strange if who == "worker" else usual
    worker = cluster.worker("sh", "-c", 'echo "$PEER_FILE $PEER_X"; cat', env={"CONCURRENCY": "2"})
    cluster.launch = strange if who == "client" else usual
    for options, input in (([], None), (["-o", "out/{/.}", "-j2"], None), (["-f0"], "\0".join(names).encode())):
        os.makedirs(cluster.path("out"), exist_ok=True)
        words = names if input is None else ["-"]
        given = {} if input is None else {"input": input}
        done = batch(cluster, *words, options=options, variables=["X=y"], **given)
        assert (done.returncode, done.stderr) == (0, b"")
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
    cluster.start("cproxy", "127.0.0.2", far)
    done = batch(cluster, *names)
    assert (done.returncode, done.stderr) == (0, b"")
    for name in names:
        assert read(cluster.path(name + ".out")) == read(cluster.path(name))
    assert supervisors(worker) < 30


# Peers that hold a key, or a pub, and do not keep to the protocol

def exits(peer, more, out=0):
    for channel in (1, 2):
        peer.send(cexec.EOF, channel, cexec.FLAG_WHOLE)
    peer.send(cexec.EXIT, how=cexec.HOW_EXITED, more=more, channels=[(0, 0, 0), (1, out, 0), (2, 0, 0)])


AFTER_EXIT = [
    ("garbage", True, lambda peer: peer.raw(os.urandom(1000))),
    ("an unknown frame", True, lambda peer: peer.raw(cexec.FRAME_HEAD.pack(99, 0, 0, 0))),
    ("EXIT twice", True, lambda peer: exits(peer, 1)),
    ("DATA", True, lambda peer: peer.raw(data_frame(1, b"late"))),
    ("EOF", True, lambda peer: peer.send(cexec.EOF, 1)),
    ("CREDIT", True, lambda peer: peer.send(cexec.CREDIT, 0, bytes=1)),
    ("ACCEPT twice", True, lambda peer: (peer.send(cexec.ACCEPT), peer.send(cexec.ACCEPT))),
    ("the connection's end", False, lambda peer: None),
    ("a PONG and the connection's end", False, lambda peer: peer.send(cexec.PONG)),
    ("ACCEPT and the connection's end", True, lambda peer: peer.send(cexec.ACCEPT)),
]


@pytest.mark.parametrize("what, counts, after", AFTER_EXIT, ids=[row[0] for row in AFTER_EXIT])
def test_worker_that_goes_wrong_after_an_exit(cluster, what, counts, after):
    """The file that is done stays done; the next counts as tried, unless nothing but the connection's end came."""
    names = made_files(cluster, 2)
    key = cexec.open_key(cluster.key)
    with Ear(group_port(cluster)) as ear:
        client = start_batch(cluster, *names, env={"CEXEC_RETRIES": "0"})
        announced, address = ear.wait_for(cexec.ANNOUNCE)
        with play_worker(announced, address, key) as peer:
            peer.expect(cexec.AUTH)
            assert "FILE=f000" in peer.expect(cexec.JOB).environment
            peer.send(cexec.ACCEPT)
            peer.expect(cexec.GO)
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
    assert client.said() == "" or re.fullmatch(r"cexec: f001: worker 127\.0\.0\.1 lost: [^\n]+\n", client.said())


class BatchPeer:
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

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.peer.__exit__()
        self.asker.__exit__()

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


WRONG_NEXT = [
    ("JOB within a job", lambda client: client.job(), b"JOB within a job"),
    ("JOB twice", lambda client: (client.end(), client.job(), client.job()), b"JOB within a job"),
    ("AUTH", lambda client: client.peer.send(cexec.AUTH, proof=bytes(32)), b"AUTH out of place"),
    ("a high number", lambda client: (client.end(), client.begin([(256, 256, 1)])), b"higher descriptors than the first"),
    ("an impossible JOB", lambda client: (client.end(), client.begin([(1, 1, 77)])), b"not for anything"),
    ("DATA before GO", lambda client: (client.end(), client.job(), client.peer.raw(data_frame(0, b"x"))), b"DATA before GO"),
    ("GO twice", lambda client: (client.end(), client.begin(), client.peer.send(cexec.GO)), b"GO twice"),
    ("JOB without GO", lambda client: (client.end(), client.job()), b"no GO"),
    ("garbage", lambda client: (client.end(), client.peer.raw(os.urandom(999))), b"frame of kind"),
    ("nothing", lambda client: client.end(), None),
    ("nothing but PING", lambda client: (client.end(), client.peer.send(cexec.PING)), None),
]


@pytest.mark.parametrize("what, wrong, why", WRONG_NEXT, ids=[row[0] for row in WRONG_NEXT])
def test_client_that_goes_wrong_in_a_batch(cluster, what, wrong, why):
    """Its slot is free again, though it keeps the connection open."""
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
                figures.append((open_files(supervisor), rss(supervisor), open_files(worker.pid), rss(worker.pid)))
            client.peer.send(cexec.JOB, descriptors=rows, term="x" if rows[0][2] == 19 else "")
            client.peer.send(cexec.GO)
            if rows[0][2] == 9:
                client.peer.send(cexec.EOF, 0, cexec.FLAG_WHOLE)
    print(figures)
    early, late = figures
    assert late[0] <= early[0] and late[2] <= early[2]
    assert late[1] - early[1] < 2000000 and late[3] - early[3] < 2000000
