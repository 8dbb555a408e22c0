"""Every Python, every system, every version, every box."""
import glob
import textwrap

from test_cexec import *  # noqa: F401,F403


# ---------------------------------------------------------------------------
# Everywhere: other Pythons, other systems, other versions, bare boxes
# ---------------------------------------------------------------------------

BODY = random.Random(4).getrandbits(8 * 2000000).to_bytes(2000000, "big")


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


AGES = ["oldest", "newest"]
BETWEEN = list(pythons().values())[1:-1]


def there_and_back(cluster, command="CMD=cat; echo oh >&2; exit 5"):
    """A job of some megabytes, whose every byte and status come back."""
    done = cluster.client(command, input=BODY)
    assert (done.returncode, done.stderr) == (5, b"oh\n") and done.stdout == BODY, done.stderr


@pytest.mark.parametrize("proxy", AGES)
@pytest.mark.parametrize("worker", AGES)
@pytest.mark.parametrize("client", AGES)
def test_old_and_new_pythons_together(cluster, client, worker, proxy):
    """A job there and back through a proxy, and the alert; each party on the oldest or the newest Python."""
    python, far = oldest_and_newest(), "127.255.255.255:%d" % free_port()
    cluster.launch = [python[worker], PROGRAM]
    cluster.shell_worker(env={"GROUP": far})
    logger = cluster.logger(cluster.pub, env={"GROUP": far})
    cluster.launch = [python[proxy], PROGRAM]
    between = cluster.start("cproxy", "-v", "127.0.0.2", far, stderr=subprocess.PIPE)
    assert b"cproxy: from " in between.stderr.readline()
    cluster.launch = [python[client], PROGRAM]
    there_and_back(cluster)
    until(logger.lines, "the alert's way")
    assert "127.0.0.2 completed by 127.0.0.1 for app.pub exit code 5" in logger.lines()[0]


@pytest.mark.parametrize("python", BETWEEN, ids=os.path.basename)
def test_a_python_between(cluster, python):
    """A job there and back: all on that Python, and each side with the Python under test."""
    own, other = [python, PROGRAM], cluster.launch
    for worker, clients in ((own, [own, other]), (other, [own])):
        cluster.launch = worker
        process = cluster.shell_worker()
        for cluster.launch in clients:
            there_and_back(cluster)
        process.terminate()
        assert process.wait(PATIENCE) == 0
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


# What a system may not have

WITHOUT_PROC = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]

# Taken away before the first line of the program.  os.memfd_create always is, or cservice would start
# anew without this.
TAKEN_AWAY = {
    "memfd_create": "",
    "sched_getaffinity": "del os.sched_getaffinity",
    "getloadavg": "del os.getloadavg",
    "getloadavg fails": """
        def getloadavg():
            raise OSError
        os.getloadavg = getloadavg""",
    "poll": "del select.poll, selectors.PollSelector",
    "F_SETPIPE_SZ": "refuse(fcntl, 'fcntl', lambda fd, request, *rest: request == 1031, errno.EINVAL)",
    "SO_ACCEPTCONN": "del socket.SO_ACCEPTCONN",
    "SO_ACCEPTCONN fails": """
        refuse(socket.socket, 'getsockopt', lambda self, *rest: rest[1] == socket.SO_ACCEPTCONN, errno.ENOPROTOOPT)""",
    "IP_PKTINFO": """
        refuse(socket.socket, 'setsockopt', lambda self, *rest: rest[:2] == (0, 8), errno.ENOPROTOOPT)
        refuse(socket.socket, 'sendmsg', lambda self, data, ancillary=(), *rest: ancillary, errno.EINVAL)""",
    "interface ioctls": """
        refuse(fcntl, 'ioctl', lambda fd, request, *rest: request >> 8 == 0x89, errno.ENOTTY)""",
    "TCP_KEEPIDLE": "del socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT",
    "/proc": "",
}

# A Linux that looks like a BSD, as far as Python tells: BSD's numbers of ioctls work, Linux's do not.
BSD = """
    sys.platform = {platform!r}
    for module, names in ((os, "sched_getaffinity O_PATH splice pidfd_open eventfd getrandom"),
                          (socket, "IP_PKTINFO SO_BINDTODEVICE TCP_KEEPIDLE"), (fcntl, "F_SETPIPE_SZ"),
                          (select, "epoll " + {lost!r}), (selectors, "EpollSelector DevpollSelector")):
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


def take_away(cluster, code):
    """Has the cluster's applets run without what the code deletes."""
    shim = put(cluster.path("shim.py"), textwrap.dedent("""\
        import errno, fcntl, hashlib, os, runpy, select, selectors, socket, sys
        def refuse(place, name, when, error):
            inner = getattr(place, name)
            def outer(*words, **named):
                if when(*words, **named):
                    raise OSError(error, os.strerror(error))
                return inner(*words, **named)
            setattr(place, name, outer)
        if hasattr(os, "memfd_create"):
            del os.memfd_create
        """) + textwrap.dedent(code) + "\nsys.argv.pop(0)\nrunpy.run_path(sys.argv[0], run_name='__main__')\n")
    cluster.launch = [PYTHON, shim, PROGRAM]


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
        need_root()
        need("unshare")
        cluster.launch = WITHOUT_PROC + cluster.launch
    cluster.shell_worker()
    same_as_here(cluster)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_that_is_not_linux(hosts, system):
    """On one host, without a network: only one listener of a host hears what comes from the host itself."""
    need("unshare")
    space = hosts.space("one")
    take_away(hosts, SYSTEMS[system])
    hosts.launch = ["ip", "netns", "exec", space] + WITHOUT_PROC + hosts.launch
    worker = hosts.shell_worker()
    there_and_back(hosts)
    master, terminal = pty.openpty()
    talk = hosts.start_client("CMD=read line; echo got $line", stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    os.write(master, b"a line\n")
    assert talk.wait(PATIENCE) == 0 and b"got a line" in os.read(master, 1000)
    os.close(master)
    job = hosts.start_client("CMD=sleep 1000 & echo started; sleep 1000", stdout=subprocess.PIPE)
    assert job.stdout.readline() == b"started\n"
    job.kill()
    until(lambda: b"ended, done" in read(worker.log).partition(b"abandons")[2], "the end of the job")


@pytest.mark.parametrize("system", [*SYSTEMS, "IP_PKTINFO"])
def test_every_network_is_reached_without_pktinfo(hosts, system):
    """The client sends to the broadcast address of each network that it is in; no route leads to all of them."""
    near = hosts.lan("near", ["client", "one"], "10.77.0")
    far = hosts.lan("far", [near["client"], "two"], "10.78.0")
    take_away(hosts, {**SYSTEMS, **TAKEN_AWAY}[system])
    for device, place, address in ((None, near["one"], "10.77.0.2"), (None, far["two"], "10.78.0.2"),
                                   ("far", far["two"], "10.78.0.2")):
        worker = hosts.shell_worker(space=place)
        done = hosts.client("CMD=echo $SERVER_ADDR", space=near["client"],
                            env={"GROUP": device + ":255.255.255.255"} if device else {})
        assert (done.returncode, done.stdout, done.stderr) == (0, address.encode() + b"\n", b"")
        worker.terminate()
        assert worker.wait(PATIENCE) == 0


def test_a_terminal_is_read_without_proc(cluster):
    """It is opened again by its name."""
    need_root()
    need("unshare")
    cluster.launch = WITHOUT_PROC + cluster.launch
    cluster.shell_worker()
    master, terminal = pty.openpty()
    job = cluster.start_client("CMD=read line; echo got $line", stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    os.write(master, b"a line\n")
    assert job.wait(PATIENCE) == 0
    assert b"got a line" in os.read(master, 1000)
    os.close(master)


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
        for fd in (master, terminal, reader, writer):
            os.close(fd)


def test_variables_are_bytes_in_any_locale(monkeypatch):
    """In a locale of one byte a character what was typed goes as it is."""
    monkeypatch.setattr(cexec.os, "fsencode", lambda word: word.encode("latin-1"))
    word, = cexec.parse_environment(["X=\xe9\xff\xc3\xa9"])
    assert cexec.pack_field("text", word)[2:] == b"X=\xe9\xff\xc3\xa9"


@pytest.mark.parametrize("system, request_", [("linux", 0x80045430), ("darwin", 0x40807453), ("freebsd14", 0x4004740f),
                                              ("netbsd10", None)])
def test_masters_of_terminals_are_known_by_each_systems_ioctl(system, request_, monkeypatch):
    asked = []
    monkeypatch.setattr(cexec.sys, "platform", system)
    monkeypatch.setattr(cexec.fcntl, "ioctl", lambda fd, request, *rest: asked.append(request) or b"1")
    item = SimpleNamespace(number=0)
    assert cexec.Inherited._is_pty_master(item) == bool(request_) and asked == [request_] * bool(request_)


@pytest.mark.parametrize("module, applets", [("ssl", ["cexec", "cservice"]), ("fcntl", ["cexec", "crat"]),
                                             ("resource", ["cexec", "cservice"]), ("subprocess", ["cservice"]),
                                             ("argparse", ["ckeygen"])])
def test_a_python_without(keys, module, applets):
    """One line says what it lacks, and nothing has run."""
    take_away(keys, "sys.modules[%r] = None" % module)
    words = {"cexec": [keys.pub], "cservice": [keys.key, "cat"], "crat": [keys.pub], "ckeygen": [keys.key]}
    for applet in applets:
        done = keys.run(applet, *words[applet])
        assert module in refusal(done, 111, "another python3")


def test_keys_are_made_without_ssl(keys):
    take_away(keys, "sys.modules['ssl'] = None")
    keys.run("ckeygen", keys.path("new"), keys.path("new.pub"), check=True)
    take_away(keys, "del hashlib.pbkdf2_hmac")
    refusal(keys.run("ckeygen", "-stdin", keys.path("other"), input=b"word"), 111, "another python3")


# Other versions

def other_version(cluster):
    """The program as it will be in the next version of the protocol, with a longer HELLO."""
    text = read(PROGRAM).decode()
    for old, new in (("\nPROTOCOL = 1 ", "\nPROTOCOL = 2 "),
                     ('load="I", delay="I")', 'load="I", delay="I", more="I")'),
                     ("delay=u32(self.delay * 1e6))", "delay=u32(self.delay * 1e6), more=1)"),
                     ('attempt="I", waited="I")', 'attempt="I", waited="I", more="I")'),
                     ("u32((now - self.began) * 1000))\n", "u32((now - self.began) * 1000), more=1)\n")):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return put(cluster.path("next.py"), text)


def test_a_peer_of_another_version_is_named(cluster):
    """By the worker, crat and a proxy that hear it; and it ends with 111, in its own time."""
    group, other = cluster.env["GROUP"], "127.255.255.255:%d" % free_port()
    worker = cluster.worker("cat")
    plain, as_json = cluster.logger(), cluster.logger("-j")
    proxy_log = cluster.path("proxy.log")
    with open(proxy_log, "wb") as file:
        cluster.start("cproxy", "-v", "127.0.0.2", other, stderr=file)
    until(lambda: b"from " in read(proxy_log), "the proxy's start")
    cluster.launch = [PYTHON, other_version(cluster)]
    done = cluster.client(env={"CEXEC_TIMEOUT_ACCEPT": "1"})        # that announces itself more than once
    refusal(done, 111, "no worker answered in 1 s on %s (is cservice running" % group)
    said = "127.0.0.1 speaks protocol version 2, this is 1 (cexec %s)" % cexec.VERSION
    until(lambda: plain.lines() and as_json.lines(), "crat's lines")
    dropped = b"dropped a datagram from 127.0.0.1: protocol version 2, this is 1"
    for log in (worker.log, proxy_log):
        until(lambda: dropped in read(log), "a line in %s" % log)
    cluster.launch = [PYTHON, PROGRAM]
    assert cluster.client(input=b"mine").stdout == b"mine"      # its alert comes after all that
    until(lambda: len(plain.lines()) > 1 and len(as_json.lines()) > 1, "the alert")
    assert plain.lines()[0] == said and "completed" in plain.lines()[1] and len(plain.lines()) == 2
    record = json.loads(as_json.lines()[0])
    assert record.pop("time") > 1e9
    assert record == {"client": "127.0.0.1", "event": "version", "version": 2, "ours": 1}


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
            complaint = ear.wait_for(cexec.ALERT)[0].body
            assert complaint.reason == "protocol version 7, this is 1"
        assert client.wait(PATIENCE) == 111
    last = read(client.log).decode().splitlines()
    assert any("(127.0.0.1 speaks protocol version 7, this is 1)" in line for line in last), last
    assert any("127.0.0.1: protocol version 7, this is 1" in line for line in last), last


@pytest.mark.parametrize("rest", [b"", b"\0", bytes(20), bytes(1195), b"\xff" * 60])
def test_magic_and_version_are_read_whatever_follows(rest):
    with pytest.raises(cexec.OtherVersion) as caught:
        cexec.Datagram(b"CEXC\2" + rest)
    assert (caught.value.version, str(caught.value)) == (2, "protocol version 2, this is 1")
    with pytest.raises(cexec.ProtocolError, match="not a cexec datagram"):
        cexec.Datagram(b"CEXD\2" + rest)


# Bare boxes

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
    refusal(cluster.run("cexec", directory + b"/none"), 111, "no such public key")


CLOSED = [numbers for count in (1, 2, 3) for numbers in itertools.combinations(range(3), count)]


@pytest.mark.parametrize("closed", CLOSED, ids=lambda numbers: "".join(map(str, numbers)))
def test_standard_descriptors_closed(cluster, closed):
    """A worker without them serves whole jobs, a client has what it has, and ckeygen works."""
    close = placed(dict.fromkeys(closed))

    def start(applet, *words):
        process = subprocess.Popen(cluster.argv(applet, *words), env=cluster.environment(), cwd=cluster.directory,
                                   close_fds=False, preexec_fn=close)
        cluster.started.append(process)
        return process
    worker = start("cservice", cluster.key, "sh", "-c", 'eval "$PEER_CMD"')
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


def test_crat_and_ckeygen_say_what_is_closed(keys):
    for words, closed, message in ((["crat", keys.pub], 1, "standard output is closed"),
                                   (["ckeygen", "-stdin", keys.path("new")], 0, "standard input is closed")):
        reader, writer = os.pipe()
        process = subprocess.Popen(keys.argv(*words), env=keys.environment(), close_fds=False,
                                   preexec_fn=placed({2: writer, closed: None}))
        os.close(writer)
        with os.fdopen(reader, "rb") as errors:
            line = errors.read().decode()
        assert process.wait(PATIENCE) == 100 and message in line and line.count("\n") == 1


@pytest.mark.parametrize("how", ["read-only", "removed"])
def test_current_directory(cluster, how):
    need_root()
    need("unshare")
    place = cluster.path("place")
    os.mkdir(place)
    enter = 'cd "$0"; mount --bind -o ro . . && cd "$0"' if how == "read-only" else 'cd "$0"; rmdir "$0"'
    plain = cluster.launch
    cluster.launch = ["unshare", "--mount", "sh", "-c", enter + ' && exec "$@"; exit 99', place, *plain]
    cluster.worker("cat")               # a shell would have a word to say on the directory
    os.makedirs(place, exist_ok=True)
    done = cluster.client(input=BODY)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout == BODY
    os.makedirs(place, exist_ok=True)
    refusal(cluster.run("ckeygen", "new"), 103, "Read-only" if how == "read-only" else "current directory")
    os.makedirs(place, exist_ok=True)
    assert cluster.run("ckeygen", cluster.key, cluster.pub).returncode == 0


@pytest.mark.parametrize("age", AGES)
def test_no_network(hosts, age):
    """Not even loopback is up: the client says so, and the others wait for better times."""
    hosts.launch[0] = oldest_and_newest()[age]
    space = hosts.space("dark")
    ip("-n", space, "link", "set", "lo", "down")
    hosts.shell_worker(space=space)
    hosts.logger(space=space)
    done = hosts.client(space=space, env={"CEXEC_TIMEOUT_ACCEPT": "1"})
    assert "is there a network?" in refusal(done, 111, "no worker answered in 1 s")
    ip("-n", space, "link", "set", "lo", "up")
    done = hosts.client("CMD=exit 5", space=space)
    assert (done.returncode, done.stderr) == (5, b"")


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
    log = cluster.path("log")
    with open(PROGRAM, "rb") as program, open(log, "wb") as file:
        cluster.start("cservice", "-v", cluster.key, "sh", "-c", 'eval "$PEER_CMD"', stdin=program, stdout=file,
                      stderr=file)
    until(lambda: b"serves" in read(log), "the worker's start")
    with open(PROGRAM, "rb") as program:
        done = cluster.client("CMD=wc -c; exit 5", stdin=program)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (5, b"0", b"")
    done = cluster.client("CMD=wc -c; exit 5", input=read(PROGRAM))
    assert (done.returncode, done.stdout.strip(), done.stderr) == (5, b"0", b"")
    refusal(cluster.run("--install", "bin", input=read(PROGRAM)), 100, "standard input")
    cluster.launch = [PYTHON, PROGRAM]
    there_and_back(cluster)


@pytest.fixture
def run_sshd():
    """The directory that sshd wants to see, if it is started by root."""
    made = not os.getuid() and not os.path.isdir("/run/sshd")
    if made:
        os.makedirs("/run/sshd", 0o755)
    yield
    if made:
        os.rmdir("/run/sshd")


def test_a_worker_over_ssh_with_the_program_on_standard_input(run_sshd, cluster):
    """As the README has it: nothing but the key is on the worker's machine."""
    need("ssh", "ssh-keygen")
    server = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin")
    if not server:
        skip("sshd is not installed")
    host, user, port = cluster.path("host"), cluster.path("user"), free_port()
    for key in (host, user):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    put(cluster.path("known"), "[127.0.0.1]:%d %s" % (port, read(host + ".pub").decode()))
    put(cluster.path("config"), "Port %d\nListenAddress 127.0.0.1\nHostKey %s\nAuthorizedKeysFile %s\nPidFile none\n"
        "StrictModes no\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\n" % (port, host, user + ".pub"))
    daemon = subprocess.Popen([server, "-D", "-e", "-f", cluster.path("config")], stderr=subprocess.PIPE,
                              env=cluster.environment())
    cluster.started.append(daemon)
    until(lambda: b"listening" in daemon.stderr.readline(), "sshd's start")
    words = ["env", cluster.marker, "GROUP=" + cluster.env["GROUP"], PYTHON, "-", "cservice", "-v", cluster.key,
             "sh", "-c", 'eval "$PEER_CMD"']
    log = cluster.path("ssh.log")
    with open(PROGRAM, "rb") as program, open(log, "wb") as file:
        far = subprocess.Popen(["ssh", "-F", "none", "-i", user, "-p", str(port), "-o", "BatchMode=yes",
                                "-o", "UserKnownHostsFile=" + cluster.path("known"), "-o", "IdentitiesOnly=yes",
                                "127.0.0.1", " ".join(map(shlex.quote, words))],
                               stdin=program, stdout=file, stderr=file, env=cluster.environment())
    cluster.started.append(far)
    until(lambda: b"serves" in read(log) or far.poll() is not None, "the worker's start")
    there_and_back(cluster)
    for pid in cluster.alive():
        if b"cservice" in read("/proc/%d/cmdline" % pid).split(b"\0"):
            os.kill(pid, signal.SIGTERM)            # it outlives its ssh, which gave it no terminal
    assert far.wait(PATIENCE) == 0
