"""The gate itself, without a network: what it answers, and what reaches a SuperLink behind it."""

from __future__ import annotations

import asyncio
import base64
import socket
import ssl
from contextlib import ExitStack
from datetime import timedelta

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import x25519 as x25519_keys
from fleet_keys import new_key, signed
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedmm.flower import gate

PUSH, PULL = "/v1/fleet/push-object", "/v1/fleet/pull-object"
MIB = 1 << 20


class Door:
    """A gate before a SuperLink that answers 200 to each key in `members`."""

    def __init__(self, *members, reply: bytes = b"") -> None:
        self.came: list[httpx.Request] = []
        keys = {base64.b64encode(public_key_to_bytes(key.public_key())).decode() for key in members}

        def superlink(request: httpx.Request) -> httpx.Response:
            self.came.append(request)
            return httpx.Response(200 if request.headers["flwr-public-key"] in keys else 401, content=reply)

        behind = httpx.AsyncClient(base_url="https://superlink", transport=httpx.MockTransport(superlink))
        self.gate = gate.Gate(behind)

    def ask(self, path: str, headers, *pieces: bytes) -> tuple[int, int]:
        """The status, and how many pieces of the body were read for it."""
        return asyncio.run(self.asked(path, headers, *pieces))

    async def asked(self, path: str, headers, *pieces: bytes, last: asyncio.Event | None = None) -> tuple[int, int]:
        read, said = 0, []

        async def receive():
            nonlocal read
            if last is not None and read == len(pieces) - 1:
                await last.wait()
            read += 1
            return {"type": "http.request", "body": pieces[read - 1], "more_body": read < len(pieces)}

        async def send(event):
            said.append(event)

        await self.gate({"type": "http", "method": "POST", "path": path, "headers": headers}, receive, send)
        return said[0]["status"], read

    async def holds(self, path: str, headers, size: int, last: asyncio.Event) -> asyncio.Task:
        """A request of which all has come but its end."""
        task = asyncio.create_task(self.asked(path, headers, *[bytes(MIB)] * (size // MIB), b"", last=last))
        await asyncio.sleep(0)
        return task


def test_a_request_of_a_node_reaches_the_superlink_with_its_body():
    key = new_key()
    door = Door(key)
    assert door.ask(PUSH, signed(key), b"one", b"two")[0] == 200
    assert door.came[0].content == b"onetwo"


@pytest.mark.parametrize("lacks", [b"flwr-public-key", b"flwr-signature", b"flwr-timestamp"])
def test_no_body_is_read_of_who_does_not_sign(lacks):
    door = Door()
    headers = [(name, value) for name, value in signed(new_key()) if name != lacks]
    assert door.ask(PUSH, headers, b"body") == (401, 0)
    assert door.came == []


def x25519() -> bytes:
    public = x25519_keys.X25519PrivateKey.generate().public_key()
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def test_no_body_is_read_of_who_signs_wrongly():
    key, other, hour = new_key(), new_key(), timedelta(hours=1)
    wrong = {
        "another's signature": signed(key, signer=other),
        "old": signed(key, late=hour),
        "from the future": signed(key, late=-hour),
        "twice": signed(key) + signed(other),
        "no base64": [*signed(key)[1:], (b"flwr-public-key", b"\xff")],
        "no key": [*signed(key)[1:], (b"flwr-public-key", base64.b64encode(b"key"))],
        "no such kind": [*signed(key)[1:], (b"flwr-public-key", base64.b64encode(x25519()))],
        "no time": [*signed(key)[:2], (b"flwr-timestamp", b"now")],
        "no time zone": [*signed(key)[:2], (b"flwr-timestamp", b"2026-01-01T00:00:00")],
        "no ASCII": [*signed(key)[:2], (b"flwr-timestamp", b"\xff")],
    }
    door = Door(key, other)
    assert {name: door.ask(PUSH, headers, b"body") for name, headers in wrong.items()} == dict.fromkeys(wrong, (401, 0))
    assert door.came == []


def test_a_body_over_the_limit_is_refused_as_soon_as_that_is_known():
    key = new_key()
    door = Door(key)
    pieces = [bytes(MIB)] * (gate.BODY_LIMIT_BYTES // MIB + 3)
    declared = [*signed(key), (b"content-length", str(len(pieces) * MIB).encode())]
    assert door.ask(PUSH, declared, *pieces) == (413, 0)
    assert door.ask(PUSH, signed(key), *pieces) == (413, gate.BODY_LIMIT_BYTES // MIB + 1)
    assert door.came == []


def test_all_bodies_together_have_one_bound_and_leave_it_when_they_end():
    members = [new_key() for _ in range(5)]
    door = Door(*members)
    fit = gate.BODIES_LIMIT_BYTES // gate.BODY_LIMIT_BYTES

    async def attack() -> None:
        for key in members:  # the SuperLink has said yes to each
            assert (await door.asked(PULL, signed(key), b""))[0] == 200
        last = asyncio.Event()
        held = [await door.holds(PUSH, signed(key), gate.BODY_LIMIT_BYTES, last) for key in members[:fit]]
        assert (await door.asked(PUSH, signed(members[fit]), b"one more"))[0] == 503
        last.set()
        assert [(await task)[0] for task in held] == [200] * fit
        assert (await door.asked(PUSH, signed(members[fit]), b"one more"))[0] == 200

    asyncio.run(attack())


def test_keys_that_nobody_registered_take_no_room_from_those_that_somebody_did():
    key = new_key()
    door = Door(key)

    async def attack() -> None:
        assert (await door.asked(PULL, signed(key), b""))[0] == 200
        last = asyncio.Event()
        strangers = [await door.holds(PUSH, signed(new_key()), gate.BODY_LIMIT_BYTES // 2, last) for _ in range(20)]
        assert (await door.asked(PUSH, signed(key), *[bytes(MIB)] * (gate.BODY_LIMIT_BYTES // MIB)))[0] == 200
        last.set()
        assert sorted([(await task)[0] for task in strangers]) == [401] * 2 + [503] * 18

    asyncio.run(attack())


def push(node: int, *sources: int) -> bytes:
    request = PushMessagesRequest()
    request.node.node_id = node
    for source in sources:
        request.messages_list.add().metadata.src_node_id = source
    return request.SerializeToString()


def test_a_node_answers_for_itself_alone():
    key = new_key()
    door = Door(key)
    path = "/v1/fleet/push-messages"
    for sources in ((8,), (7, 8), (8, 7), (0,)):
        assert door.ask(path, signed(key), push(7, *sources))[0] == 403
    assert door.ask(path, signed(key), b"\xff\xff")[0] == 400
    assert door.came == []
    assert door.ask(path, signed(key), push(7, 7, 7))[0] == 200


def test_who_opens_a_connection_and_says_nothing_is_cut(monkeypatch):
    monkeypatch.setattr(gate, "_HANDSHAKE_SECONDS", 0.2)

    async def said() -> bytes:
        loop = asyncio.get_running_loop()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0, ssl=context)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            try:
                return await asyncio.wait_for(reader.read(), 30)
            finally:
                writer.close()

    with asyncio.Runner(loop_factory=gate.Loop) as runner:
        assert runner.run(said()) == b"", "closed, and not by us"


def test_a_reply_counts_until_it_is_taken():
    """Found in a review: 40 replies of 32 MB to a site that does not read them."""
    key = new_key()

    async def ask() -> list[int]:
        door, taken, statuses = Door(key, reply=bytes(40 * MIB)), asyncio.Event(), []

        async def receive():
            return {"type": "http.request", "body": b""}

        async def send(event):
            if event["type"] == "http.response.start":
                statuses.append(event["status"])
            elif event["body"]:
                await taken.wait()

        scope = {"type": "http", "method": "POST", "path": PULL, "headers": signed(key)}
        taken.set()
        await door.gate(scope, receive, send)  # now the key has a share of its own
        taken.clear()
        tasks = [asyncio.create_task(door.gate(scope, receive, send)) for _ in range(3)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        taken.set()
        await asyncio.gather(*tasks)
        await door.gate(scope, receive, send)
        return statuses

    assert sorted(asyncio.run(ask())) == [200, 200, 200, 503, 503], "and there is room again once it is taken"


def test_one_machine_takes_no_more_than_its_share_of_connections(monkeypatch):
    monkeypatch.setattr(gate.Listener, "limit", 3)
    with ExitStack() as stack:
        listener = stack.enter_context(gate._listen("127.0.0.1:0"))
        listener.listen()
        listener.setblocking(False)

        def connect(source: str) -> socket.socket:
            return stack.enter_context(socket.create_connection(listener.getsockname(), 5, source_address=(source, 0)))

        for _ in range(5):
            connect("127.0.0.2")
        stayed = [listener.accept()[0] for _ in range(3)]
        with pytest.raises(BlockingIOError):
            listener.accept()
        connect("127.0.0.1")
        other, address = listener.accept()
        assert address[0] == "127.0.0.1"
        stayed.pop().close()
        connect("127.0.0.2")
        stayed.append(listener.accept()[0])
        for socket_ in (*stayed, other):
            socket_.close()
            socket_.close()
        assert not +listener._open
