from test_cexec import *  # noqa: F401,F403


# A proxy between sockets of the test's own

BEGINNING = b"\x16\x03\x01\x00\x05\x01"         # of a TLS ClientHello
RESETS = struct.pack("ii", 1, 0)                # SO_LINGER: what is closed so is reset
WAYS = {
    "spliced": "",
    "no splice": "vars(os).pop('splice', None)",
    "splice refused": "if hasattr(os, 'splice'): os.splice = refused",
    "no pipes": "os.pipe2 = refused",
    "few descriptors": "cexec.make_room = few",
}
CHANGED = """import errno, os, sys
sys.path.insert(0, %r)
import cexec
def refused(*_, **__):
    raise OSError(errno.EINVAL, "refused")
def few(numbers, make_room=cexec.make_room):
    if numbers > 6000:
        raise cexec.Fatal(111, "no more than 6000 descriptors are allowed")
    make_room(numbers)
%s
cexec.main(["changed", "cproxy", "-v", "127.0.0.2", "127.255.255.255:%d"])
"""


class Between:
    """A cproxy on this host, changed or not; sockets that stand for the clients and workers of its two sides."""

    def __init__(self, cluster, change=""):
        self.near, self.far, self.opened, self.refusals = cluster.env["GROUP"].rpartition(":")[2], free_port(), [], 0
        self.ear = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.ear.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self.ear.bind(("", self.far))
        self.log = cluster.path("between.log")
        with open(self.log, "wb") as file:
            argv = [PYTHON, "-c", CHANGED % (HERE, change, self.far)]
            self.process = subprocess.Popen(argv, env=cluster.environment(), stdin=subprocess.DEVNULL, stdout=file,
                                            stderr=file)
        cluster.started.append(self.process)
        self.pid = self.process.pid
        until(lambda: b"cproxy: from " in read(self.log) or self.process.poll() is not None, "a proxy's start")
        assert self.process.poll() is None, read(self.log)
        self.files = open_files(self.pid)

    def announce(self, port):
        """What a worker hears of a client at that port; None if the proxy drops it."""
        sent = cexec.make_datagram(cexec.ANNOUNCE, made_pub(), os.urandom(16), port, **FIRST_TRY)
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
        listener = socket.create_server(("127.0.0.1", 0))
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

    def pipes(self):
        found = 0
        for fd in os.listdir("/proc/%d/fd" % self.pid):
            with contextlib.suppress(OSError):
                found += os.readlink("/proc/%d/fd/%s" % (self.pid, fd)).startswith("pipe:")
        return found

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
def between(cluster):
    made = []

    def make(way="spliced"):
        made.append(Between(cluster, WAYS[way]))
        return made[0]
    yield make
    for one in made:
        one.close()


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


def spliced(way):
    """Whether a proxy changed this way splices, on the Python under test."""
    has = subprocess.run([PYTHON, "-c", "import os, sys; sys.exit(not hasattr(os, 'splice'))"]).returncode == 0
    return way == "spliced" and has


@pytest.mark.parametrize("way", WAYS)
def test_what_goes_through_a_proxy_comes_out(between, way):
    """Both ways at once; then one side ends and the other does not; then nothing of it is left."""
    proxy = between(way)
    client, worker = proxy.join()
    there, back = os.urandom(6 << 20), os.urandom(6 << 20)
    senders = [in_thread(client.sendall, there), in_thread(worker.sendall, back)]
    got = []
    reader = in_thread(lambda: got.append(take(worker, len(there))))
    assert take(client, len(back)) == back
    for thread in [reader, *senders]:
        thread.join(PATIENCE)
    assert got == [there]
    assert proxy.pipes() == (4 if spliced(way) else 0), read(proxy.log)[-500:]
    client.shutdown(socket.SHUT_WR)
    assert worker.recv(1) == b""
    worker.sendall(back[:1 << 20])
    assert take(client, 1 << 20) == back[:1 << 20]
    worker.close()
    assert client.recv(1) == b""
    until(lambda: b"ends: done" in read(proxy.log), "the end of the join")
    proxy.tidy()
    assert b"internal error" not in read(proxy.log) and proxy.process.poll() is None


@pytest.mark.parametrize("way", ["spliced", "no splice"])
def test_a_side_that_stalls_stalls_the_other(between, way):
    """Without a storm of wake-ups, and with no more memory than a buffer; then all of it comes, and the end."""
    proxy = between(way)
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


@pytest.mark.parametrize("way", ["spliced", "no splice"])
@pytest.mark.parametrize("side", ["client", "worker"])
@pytest.mark.parametrize("state", ["quiet", "stalled", "half closed"])
def test_a_reset_crosses_a_proxy_as_a_reset(between, way, side, state):
    """Never as an end of file; also where the proxy reads no more from it, as the other side stalls."""
    proxy = between(way)
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


def test_hundreds_of_connections_through_one_proxy(cluster, between):
    """500 raw ones that begin like TLS, a client each; then all there may be; a refusal; a job goes through."""
    wanted = 2 * (cexec.JOINS_MAX + cexec.RELAYS_MAX) + 500
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        skip("%d descriptors are needed" % wanted)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    try:
        crowd(cluster, between())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


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
    done = cluster.client(input=data)
    assert (done.returncode, done.stdout, done.stderr) == (0, data, b"")
    worker.terminate()
    worker.wait(PATIENCE)
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


# Networks of them

def start_proxy(hosts, space, *arguments):
    log = hosts.path("proxy-%s.log" % os.urandom(4).hex())
    with open(log, "wb") as file:
        process = hosts.start("cproxy", "-v", *arguments, space=space, stdout=file, stderr=file)
    process.log = log
    until(lambda: b"cproxy: from " in read(log) or process.poll() is not None, "a proxy's start")
    assert process.poll() is None, read(log)
    return process


class Census:
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

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for capture in self.captures.values():
            capture.sock.close()


COUNTED = "echo run >>runs; cat; echo oh >&2; exit 7"


def job_crosses(hosts, space, worker, runs):
    """A job gets through, once, with its bytes and status."""
    data = os.urandom(3 << 20)
    done = hosts.client("CMD=" + COUNTED, space=space, input=data)
    assert (done.returncode, done.stderr) == (7, b"oh\n") and done.stdout == data
    assert read(hosts.path("runs")) == b"run\n" * runs
    worker.terminate()
    assert worker.wait(PATIENCE) == 0


def test_a_chain_of_three_proxies(hosts):
    """Four networks in a row: each datagram is once in each of them."""
    client, one = hosts.lan("na", ["client", "one"], "10.71.0").values()
    two = hosts.lan("nb", [one, "two"], "10.72.0")["two"]
    three = hosts.lan("nc", [two, "three"], "10.73.0")["three"]
    far = hosts.lan("nd", [three, "worker"], "10.74.0")["worker"]
    for space, address in ((one, "10.72.0.1"), (two, "10.73.0.1"), (three, "10.74.0.1")):
        start_proxy(hosts, space, address)
    worker = hosts.shell_worker(space=far, env={"CONCURRENCY": "1"})
    logger = hosts.logger(hosts.pub, space=far)
    with Census({"na": client, "nb": one, "nc": two, "nd": far}) as census:
        first = held_job(hosts, "CMD=exec cat", space=client)
        second = in_line(hosts, 0, "CMD=true", space=client)        # BUSY comes back through all three
        outcome(first)
        outcome(second)
        job_crosses(hosts, client, worker, 1)
        until(lambda: len(logger.lines()) >= 3, "the alerts")
        copies = until(lambda: (lambda c: c if len({frozenset(n) for n in c.values()}) == 1 else None)(
            census.copies()), "the same datagrams everywhere")
        print("chain: %d datagrams, copies at most %s" % (len(copies["na"]), census.most()))
        assert set(census.most().values()) == {1}
    assert len(logger.lines()) == 3 and all("10.74.0.1 completed by 10.74.0.2" in line for line in logger.lines())


def test_jobs_both_ways_through_two_proxies(hosts):
    left, gate, _ = hosts.lan("na", ["left", "gate", "more"], "10.71.0").values()
    right = hosts.lan("nb", [gate, "right"], "10.72.0")["right"]
    for address in ("10.72.0.1", "10.71.0.2"):
        start_proxy(hosts, gate, address)
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
    spaces = hosts.lan("na", ["ca", "gone", "gthree"], "10.71.0")
    client_a, one, three = spaces["ca"], spaces["gone"], spaces["gthree"]
    _, client_b, two = hosts.lan("nb", [one, "cb", "gtwo"], "10.72.0").values()
    client_c = hosts.lan("nc", [two, three, "cc"], "10.73.0")["cc"]
    forward = [(one, "10.72.0.1"), (two, "10.73.0.1"), (three, "10.71.0.3")]
    backward = [(one, "10.71.0.2"), (two, "10.72.0.3"), (three, "10.73.0.2")]
    for space, address in forward + backward * (directions - 1):
        start_proxy(hosts, space, address)
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


# What ends a proxy, and what it stands between

@pytest.fixture
def gate(hosts):
    """Two networks, a client, a worker, and a gate between: .proxy() starts one there."""
    client, space = hosts.lan("left", ["client", "gate"], "10.77.0").values()
    worker = hosts.lan("right", [space, "worker"], "10.78.0")["worker"]
    return SimpleNamespace(client=client, space=space, worker=worker,
                           proxy=lambda: start_proxy(hosts, space, "10.78.0.1"))


def job_in_flight(hosts, gate, mark, command, proxy, **env):
    """A job that sends, or takes, as fast as it can."""
    with open("/dev/zero", "rb") as zero:
        job = hosts.start_client("CMD=" + command, mark, space=gate.client, stdin=zero, env=env,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert len(job.stdout.read(4 << 20)) == 4 << 20
    assert any("pipe:" in os.readlink("/proc/%d/fd/%s" % (proxy.pid, fd))
               for fd in os.listdir("/proc/%d/fd" % proxy.pid)) == spliced("spliced")
    return job, in_thread(job.stdout.read)


@pytest.mark.parametrize("command", ["exec cat", "exec cat /dev/zero"])
def test_a_proxy_killed_while_much_is_moved(hosts, gate, command):
    mark = "MARK=" + os.urandom(8).hex()
    hosts.shell_worker(space=gate.worker)
    proxy = gate.proxy()
    job, reader = job_in_flight(hosts, gate, mark, command, proxy)
    proxy.kill()
    assert job.wait(PATIENCE) == 111            # long before CEXEC_TIMEOUT_PINGPONG
    reader.join(PATIENCE)
    assert re.fullmatch(r"cexec: worker 10\.78\.0\.2 lost after \d+\.\d s: "
                        r"(connection closed|Connection reset by peer)\n", job.stderr.read().decode())
    until(lambda: not processes_with("PEER_" + mark), "the end of the command")


@pytest.mark.parametrize("command", ["exec cat", "exec cat /dev/zero"])
def test_a_proxy_stopped_while_much_is_moved(hosts, gate, command):
    mark = "MARK=" + os.urandom(8).hex()
    hosts.shell_worker(space=gate.worker)
    proxy = gate.proxy()
    job, reader = job_in_flight(hosts, gate, mark, command, proxy, CEXEC_TIMEOUT_PINGPONG="2")
    proxy.send_signal(signal.SIGSTOP)
    assert job.wait(PATIENCE) == 111
    reader.join(PATIENCE)
    assert re.fullmatch(r"cexec: worker 10\.78\.0\.2 lost after \d+\.\d s: no sign of life[^\n]*\n",
                        job.stderr.read().decode())
    proxy.send_signal(signal.SIGCONT)
    until(lambda: not processes_with("PEER_" + mark), "the end of the command")
    done = hosts.client("CMD=cat; exit 3", space=gate.client, input=b"again\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"again\n", b"")


def test_a_reset_in_mid_job_is_no_success(hosts, gate):
    """The gate's worker's side is reset, all that has come until then looks whole: 111."""
    need("ss")
    mark = "MARK=" + os.urandom(8).hex()
    hosts.shell_worker(space=gate.worker)
    gate.proxy()
    job = held_job(hosts, "CMD=exec cat", mark, space=gate.client)
    subprocess.run(["ip", "netns", "exec", gate.worker, "ss", "-tK", "dst", "10.78.0.1"], check=True,
                   stdout=subprocess.DEVNULL)
    if "Connection reset" not in lost(job, "10.78.0.2"):
        skip("the kernel has no SOCK_DESTROY")
    until(lambda: not processes_with("PEER_" + mark), "the end of the command")


def test_busy_reaches_a_host_that_checks_where_it_comes_from(hosts, gate):
    """rp_filter, and no route to the workers: what came from there would be dropped."""
    subprocess.run(["ip", "netns", "exec", gate.client, "sh", "-ec",
                    "for name in all left; do echo 1 >/proc/sys/net/ipv4/conf/$name/rp_filter; done"], check=True)
    hosts.worker(*ORDERLY, space=gate.worker, env={"CONCURRENCY": "1"})
    gate.proxy()
    first = held_job(hosts, "N=0", space=gate.client)
    second = in_line(hosts, 0, "N=1", space=gate.client)
    outcome(first)
    outcome(second)
    assert order(hosts) == ["anyone0", "anyone1"]


def test_a_client_behind_nat_is_served_by_a_proxy_on_its_gateway(hosts):
    """No worker can reach it by itself, though they hear it."""
    need("nft")
    client, gateway = hosts.lan("home", ["client", "gateway"], "192.168.7").values()
    outside = hosts.lan("wide", [gateway, "worker"], "10.78.0")["worker"]
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
        assert done.returncode == 111 and b"no worker answered" in done.stderr
    assert heard(worker)
    start_proxy(hosts, gateway, "10.78.0.1")
    data = os.urandom(3 << 20)
    done = hosts.client("CMD=cat; echo $REMOTE_ADDR >&2; exit 5", space=client, input=data)
    assert (done.returncode, done.stderr) == (5, b"10.78.0.1\n") and done.stdout == data
    first = held_job(hosts, "CMD=exec cat", space=client)
    second = in_line(hosts, 0, "CMD=true", space=client)
    outcome(first)
    outcome(second)
