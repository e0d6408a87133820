"""The link's port under connections that show no token, and under more clients than it has sessions."""

from __future__ import annotations

import json
import os
import resource
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from helpers import ROOT, gradients, rounds, run, served, visiting

from fedmm import tree
from fedmm.link import tls
from fedmm.link.remote import RemoteLLM
from fedmm.link.session import HostFull, HostRefused, Session
from fedmm.model import SplitModel

HOST = ROOT / "tests" / "door_host.py"
DESCRIPTORS = 256
EARLY = 7  # a client that is there before the attack
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # of HTTP/2
SETTINGS = b"\0\0\0\4\0\0\0\0\0"


class Outside:
    """A host in a process that may open few descriptors, as those outside see it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        about = json.loads(self._line())
        self.address = "127.0.0.1", about["port"]
        self.pid = process.pid
        self._tokens = about["tokens"]
        self.identities = [tls.Identity(**shown) for shown in about["identities"]]

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def session(self, client: int) -> Session:
        return Session(
            f"127.0.0.1:{self.address[1]}", client=client, round=1, token=self._tokens[client],
            identity=self.identities[client], deadline_seconds=30.0,
        )  # fmt: skip

    def next_update(self) -> dict:
        return json.loads(self._line())


@contextmanager
def outside(folder: Path):
    few = (DESCRIPTORS, DESCRIPTORS)
    with subprocess.Popen(
        [sys.executable, HOST, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"GRPC_VERBOSITY": "NONE"}, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, few),
    ) as process:  # fmt: skip
        try:
            yield Outside(process)
        finally:
            process.kill()


def knock(host: Outside) -> socket.socket:
    """A connection, and nothing more."""
    return socket.create_connection(host.address, timeout=3)


def half_a_hello(host: Outside) -> socket.socket:
    """The first bytes of a TLS handshake."""
    sent = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        shown(host, 1).wrap_bio(ssl.MemoryBIO(), sent).do_handshake()
    return sending(knock(host), sent.read(100))


def handshake(host: Outside) -> socket.socket:
    """TLS to its end, with a client's certificate, then no HTTP/2."""
    return shown(host, 1).wrap_socket(knock(host))


def settings(host: Outside) -> socket.socket:
    """HTTP/2 to where a stream would follow."""
    return sending(handshake(host), HELLO + SETTINGS)


def sending(opened: socket.socket, sent: bytes) -> socket.socket:
    try:
        opened.sendall(sent)
    except OSError:
        opened.close()
        raise
    return opened


def shown(host: Outside, client: int) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    identity = host.identities[client]
    with open_in_memory(identity.certificate) as certificate, open_in_memory(identity.key) as key:
        context.load_cert_chain(certificate, key)
    return context


@contextmanager
def open_in_memory(text: str):
    descriptor = os.memfd_create("pem")
    try:
        os.write(descriptor, text.encode())
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def attack(host: Outside, kind, stack: ExitStack, count: int = 300) -> None:
    """So many connections of one kind, or as many as the host takes."""

    def one(_: int) -> None:
        with suppress(OSError):  # refused, cut in the middle, or not answered
            stack.enter_context(kind(host))

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(one, range(count)))


def gradients_of(host: Outside, edge, batch) -> str:
    """The digest of a step's gradients, from a host that nobody attacks."""
    with host.session(EARLY) as session:
        SplitModel(edge, RemoteLLM(session)).answer_loss(batch).backward()
    return tree.digest(gradients(edge))


def step_and_update(session: Session, edge, batch) -> str:
    """An honest client's round: a step, and its gradients as the update. Returns their digest."""
    SplitModel(edge, RemoteLLM(session)).answer_loss(batch).backward()
    delta = gradients(edge)
    tensors = {f"delta/{name}": tensor for name, tensor in delta.items()}
    session.call("update", tensors, num_examples=3, fisher=False, metrics={"loss": 1.0})
    return tree.digest(delta)


def is_open(opened: socket.socket) -> bool:
    opened.settimeout(0)
    try:
        while opened.recv(1 << 16):
            pass
    except (BlockingIOError, ssl.SSLWantReadError):
        return True
    except OSError:
        return False
    return False


def until(done, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.05)
    return done()


@pytest.fixture(scope="module")
def attacked(llava_folder):
    """A host that all attacks here share, so that it bears them one after another."""
    with outside(llava_folder) as host:
        yield host


KINDS = [knock, half_a_hello, handshake, settings]


@pytest.mark.deploy
@pytest.mark.parametrize("client", range(len(KINDS)), ids=lambda client: KINDS[client].__name__)
def test_connections_without_a_token_keep_no_client_out(attacked, edge, batch, client):
    """300 of them, at a host that may open 256 descriptors, all from one address, which clients share."""
    wanted = gradients_of(attacked, edge, batch)
    with attacked.session(EARLY) as early, ExitStack() as stack:
        early.call("card")
        attack(attacked, KINDS[client], stack)
        with attacked.session(client) as late:
            assert step_and_update(late, edge, batch) == wanted
        assert attacked.next_update() == {"update": client, "digest": wanted}, "with the bits of a host in peace"
        assert early.call("card").verb == "card", "a session is not cut, however many stand at the port"


@pytest.mark.deploy
def test_a_flood_that_never_ends_keeps_no_client_out(attacked, edge, batch):
    """Each that the host cuts is followed by another."""
    wanted, over = gradients_of(attacked, edge, batch), threading.Event()

    def flood() -> None:
        opened: list[socket.socket] = []
        while not over.is_set():
            opened = [one for one in opened if is_open(one) or one.close()]
            with suppress(OSError):
                opened += [knock(attacked) for _ in range(300 - len(opened))]
        for one in opened:
            one.close()

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        for client in (4, 5):
            with attacked.session(client) as session:
                assert step_and_update(session, edge, batch) == wanted
            assert attacked.next_update()["digest"] == wanted
    finally:
        over.set()
        thread.join()


@pytest.mark.deploy
def test_a_connection_without_a_token_is_cut(attacked):
    with ExitStack() as stack:
        opened = {kind.__name__: stack.enter_context(kind(attacked)) for kind in KINDS}
        assert until(lambda: not any(map(is_open, opened.values()))), [k for k, one in opened.items() if is_open(one)]


# ---- more clients than sessions ------------------------------------------------------------------------------------


@pytest.fixture
def one_session(llava, edge, local_llm):
    with served(llava, edge, local_llm, sessions=1) as (host, _):
        yield host


def test_a_client_over_the_limit_waits_for_its_turn(one_session):
    said = []

    def second() -> None:
        with visiting(one_session, client=1) as session:
            said.append(session.call("card").verb)

    with visiting(one_session) as first:
        first.call("card")
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.5)
        assert first.call("card").verb == "card" and not said
    waiting.join(30)
    assert said == ["card"]


def test_a_client_that_waits_in_vain_names_the_limit(one_session):
    with visiting(one_session) as first, visiting(one_session, client=1, turn_seconds=0.2) as second:
        first.call("card")
        with pytest.raises(
            HostFull, match=r"link\.sessions=1 are in use; client 1 waited 0\.2 s; raise link\.sessions"
        ):
            second.call("card")
        first.call("card")
    reasons, _ = one_session.close_round()
    assert list(reasons) == [1] and "all of link.sessions=1 were in use; raise link.sessions" in reasons[1]


def test_a_client_that_comes_back_needs_no_second_session(one_session):
    with visiting(one_session) as old:
        old.call("card")
        with visiting(one_session) as new:
            assert new.call("card").verb == "card"


def test_credentials_are_checked_before_a_session_is_wanted(one_session):
    with visiting(one_session) as first, visiting(one_session, client=1, token="x") as stranger:
        first.call("card")
        with pytest.raises(HostRefused, match="the token is not the one of client '1'"):
            stranger.call("card")


@pytest.mark.run
def test_a_run_with_more_clients_than_sessions_loses_none_and_no_bit(backbone, tmp_path):
    five = ["clients=5", "rounds=1", "run.at_once=5", "dataset.train=60", "dataset.test=20"]
    few, many = (run(backbone, tmp_path / n, *five, f"link.sessions={n}") for n in ("2", "64"))
    assert rounds(few) == rounds(many) and rounds(few)[0]["clients"] == list(range(5))


# ---- what a run needs ----------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
soft, hard, *overrides = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_NOFILE, (int(soft), int(hard)))
from fedmm.flower.server_app import plan
from fedmm.federation import descriptors
for arm in plan(overrides):
    descriptors.claim(arm.cfg)
print(*resource.getrlimit(resource.RLIMIT_NOFILE), descriptors.wanted(arm.cfg))
"""


def limited(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", LIMITED, *args], capture_output=True, text=True, check=False)


@pytest.mark.deploy
def test_a_run_that_may_not_open_enough_files_is_refused_before_it_starts(tmp_path):
    ended = limited("100", "200", "run.has_data=false", "clients=100", f"run.dir={tmp_path}")
    assert ended.returncode == 1 and not list(tmp_path.iterdir())
    assert "64 sessions need 448 open files and connections, and this process may have 200" in ended.stderr
    assert "run `ulimit -n 448` before it, or lower link.sessions" in ended.stderr


@pytest.mark.deploy
def test_a_run_raises_the_soft_limit_to_what_it_needs(tmp_path):
    ended = limited("100", "1000", "run.has_data=false", f"run.dir={tmp_path}")
    soft, hard, wanted = map(int, ended.stdout.split())
    assert (soft, hard) == (wanted, 1000) and 100 < wanted <= DESCRIPTORS
