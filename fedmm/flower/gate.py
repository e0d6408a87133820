"""The gate that sites connect to: it passes only Flower's Fleet API on to a SuperLink on this machine.

Flower 1.41 serves three APIs on one port. The Fleet API knows each SuperNode by its key. The Control API has no login:
whoever reaches it can start a run, which is code on the server. So the SuperLink listens on loopback, and sites reach
it through this:

    python -m fedmm.flower.gate --bind 0.0.0.0:8000 --superlink 127.0.0.1:8001 --keys fleet

A reverse proxy that passes `POST /v1/fleet/` alone does the same; docs/SECURITY.md has nginx's configuration.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import resource
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx  # of Flower, as uvicorn is
import uvicorn
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.proto.fab_pb2 import GetFabResponse
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from google.protobuf.message import DecodeError

from fedmm.flower import signing
from fedmm.serving.door import address_of, machine_of

FLEET = frozenset(
    f"/v1/fleet/{call}"
    for call in (
        "register-node", "activate-node", "deactivate-node", "unregister-node", "send-node-heartbeat", "pull-messages",
        "push-messages", "get-run", "get-fab", "push-object", "pull-object", "confirm-message-received",
    )
)  # fmt: skip
BODY_LIMIT_BYTES = 64 << 20  # a site's answers, the largest that goes up, are a few MB
BODIES_LIMIT_BYTES = 256 << 20  # of all bodies that are here at once, and one site's share is BODY_LIMIT_BYTES
_BODY_SECONDS = 60.0
_HANDSHAKE_SECONDS = 5.0
_CONNECTIONS = 1024  # more are told 503, so that they cannot take every descriptor
CONNECTIONS_OF_ONE = 512  # machine, handshakes included; more are closed as they come
_CLOSED_AT_ONCE = 64  # so that a machine that connects without end does not hold the event loop

Headers = list[tuple[bytes, bytes]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


class _Refused(Exception):
    """The gate's own answer, an HTTP status."""

    def __init__(self, status: int) -> None:
        self.status = status


class Gate:
    """An ASGI application that hands `FLEET` on to `superlink` and answers 404 to everything else.

    A request without a node key's signature is refused before its body is read (401). So is a body that is too large
    (413), or for which there is no room beside the others (503). A node answers for itself alone (403). Only Flower's
    own headers pass. With a `signature`, the bundle it was made for goes to sites with it.
    """

    def __init__(self, superlink: httpx.AsyncClient, signature: signing.Signature | None = None) -> None:
        self._superlink, self._signature = superlink, signature
        self._bodies = _Bodies()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        asked = scope.get("path", "")
        known = scope["type"] == "http" and scope["method"] == "POST" and asked in FLEET
        try:
            if not known:
                raise _Refused(404)
            await self._hand_on(asked, scope["headers"], receive, send)
        except _Refused as refused:
            await _answer(send, refused.status)

    async def _hand_on(self, path: str, headers: Headers, receive: Receive, send: Send) -> None:
        key = _signer(headers)
        with self._bodies.one_of(key) as grow:
            body = await _read(headers, receive, grow)
            if path == "/v1/fleet/push-messages":
                _check_senders(body)
            reply, content = await self._ask(path, headers, body, grow)
            if reply.status_code == 200:
                self._bodies.let_in(key)
                if path == "/v1/fleet/get-fab" and self._signature is not None:
                    content = _signed(content, self._signature)
            await _answer(send, reply.status_code, _flowers(reply.headers.raw), content)

    async def _ask(
        self, path: str, headers: Headers, body: bytes, grow: Callable[[int], None]
    ) -> tuple[httpx.Response, bytes]:
        """The SuperLink's reply, and its body."""
        content = bytearray()
        try:
            async with self._superlink.stream("POST", path, content=body, headers=_flowers(headers)) as reply:
                async for piece in reply.aiter_bytes():
                    grow(len(piece))
                    content += piece
        except httpx.HTTPError:
            raise _Refused(502) from None
        return reply, bytes(content)


class _Bodies:
    """Counts the bytes of all bodies that are here, whole or in part: of requests, and of replies until they are sent.

    Each key that the SuperLink has accepted has a share of its own. All other keys have one share together, since
    anyone can make new keys.
    """

    def __init__(self) -> None:
        self._keys: set[bytes] = set()
        self._held: Counter[bytes] = Counter()

    def let_in(self, key: bytes) -> None:
        self._keys.add(key)

    @contextmanager
    def one_of(self, key: bytes) -> Iterator[Callable[[int], None]]:
        """Gives what to call before so many bytes more are kept; it raises _Refused(503) where there is no room."""
        who, here = key if key in self._keys else b"", 0

        def grow(more: int) -> None:
            nonlocal here
            if self._held[who] + more > BODY_LIMIT_BYTES or self._held.total() + more > BODIES_LIMIT_BYTES:
                raise _Refused(503)
            self._held[who] += more
            here += more

        try:
            yield grow
        finally:
            self._held[who] -= here
            if not self._held[who]:
                del self._held[who]


def _signer(headers: Headers) -> bytes:
    """The public key that signed this request's time stamp; the SuperLink checks whose it is, once it has the body."""
    found = dict(headers)
    if len(found) != len(headers):  # one header twice: the SuperLink might read the other one
        raise _Refused(401)
    try:
        key = base64.b64decode(found[FLEET_HTTP_PUBLIC_KEY_HEADER.encode()], validate=True)
        signature = base64.b64decode(found[FLEET_HTTP_SIGNATURE_HEADER.encode()], validate=True)
        stamp = found[TIMESTAMP_HEADER.encode()]
        age = (now() - datetime.fromisoformat(stamp.decode("ascii"))).total_seconds()
        public = bytes_to_public_key(key)
        if not isinstance(public, EllipticCurvePublicKey) or not verify_signature(public, stamp, signature):
            raise ValueError("the signature is not this key's")
    except (KeyError, ValueError, TypeError, UnsupportedAlgorithm):  # which of these is no stranger's business
        raise _Refused(401) from None
    if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:  # Flower's own bounds
        raise _Refused(401)
    return key


async def _read(headers: Headers, receive: Receive, grow: Callable[[int], None]) -> bytes:
    """The request's body."""
    declared = dict(headers).get(b"content-length", b"0")
    if not declared.isdigit() or len(declared) > 12 or int(declared) > BODY_LIMIT_BYTES:
        raise _Refused(413)
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            while True:
                event = await receive()
                piece = event.get("body", b"")
                if len(body) + len(piece) > BODY_LIMIT_BYTES:
                    raise _Refused(413)
                grow(len(piece))
                body += piece
                if not event.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise _Refused(408) from None


async def _answer(send: Send, status: int, headers: Headers | None = None, content: bytes = b"") -> None:
    """Send an answer, to one who takes it within `_BODY_SECONDS`."""
    whole = [*(headers or []), (b"content-length", str(len(content)).encode())]
    async with asyncio.timeout(_BODY_SECONDS):
        await send({"type": "http.response.start", "status": status, "headers": whole})
        await send({"type": "http.response.body", "body": content})


def _check_senders(body: bytes) -> None:
    """Flower compares the key with `node` alone, and takes an answer for that of its message's source."""
    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError:
        raise _Refused(400) from None
    if any(message.metadata.src_node_id != request.node.node_id for message in request.messages_list):
        raise _Refused(403)


def _flowers(headers: Headers) -> Headers:
    names = {b"content-type", b"accept"}
    return [(name, value) for name, value in headers if name.lower() in names or name.lower().startswith(b"flwr-")]


def _signed(content: bytes, signature: signing.Signature) -> bytes:
    reply = GetFabResponse.FromString(content)
    if signature.is_of(reply.fab.content):
        for name, value in signature.records().items():
            reply.fab.verifications[name] = value
    return reply.SerializeToString()


class Listener(socket.socket):
    """A listening socket that closes connections of a machine that has `limit` of them open."""

    limit = CONNECTIONS_OF_ONE

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self._open: Counter[object] = Counter()

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection that may stay. Raises BlockingIOError where none waits, or many had to go."""
        for _ in range(_CLOSED_AT_ONCE):
            came, address = super().accept()
            machine = machine_of(address_of(address[0]))
            if self._open[machine] >= self.limit:
                came.close()
                continue
            self._open[machine] += 1
            return _Connection(came, lambda: self._leave(machine)), address  # noqa: B023 (returned at once)
        raise BlockingIOError("connections of machines that have enough are being closed; others get their turn")

    def _leave(self, machine: object) -> None:
        self._open -= Counter([machine])


class _Connection(socket.socket):
    """A socket that says when it is closed."""

    def __init__(self, came: socket.socket, on_close: Callable[[], None]) -> None:
        super().__init__(came.family, came.type, came.proto, fileno=came.detach())
        self._on_close: Callable[[], None] | None = on_close

    def close(self) -> None:
        super().close()
        if self._on_close is not None:
            self._on_close()
            self._on_close = None


def _listen(bind: str) -> Listener:
    """Listen at host:port. Raises OSError where it cannot."""
    host, _, port = bind.rpartition(":")
    family, kind, number, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    listener = Listener(family, kind, number)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    return listener


class Loop(asyncio.SelectorEventLoop):
    """asyncio's loop for uvicorn, with a shorter time for a TLS handshake: seconds instead of a minute."""

    async def create_server(self, *args: Any, **how: Any) -> asyncio.Server:
        return await super().create_server(*args, **how, ssl_handshake_timeout=_HANDSHAKE_SECONDS)


def main() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bind", required=True, help="where sites knock, host:port")
    parser.add_argument("--superlink", required=True, help="the SuperLink's address on this machine, host:port")
    parser.add_argument("--keys", required=True, type=Path, help="the folder of ca.crt, server.crt and server.key")
    parser.add_argument("--signature", type=Path, help="what `python -m fedmm.flower.signing` wrote")
    given = parser.parse_args()
    superlink = httpx.AsyncClient(
        base_url=f"https://{given.superlink}",
        verify=ssl.create_default_context(cafile=str(given.keys / "ca.crt")),
        trust_env=False,
        timeout=_BODY_SECONDS,
    )
    config = uvicorn.Config(
        Gate(superlink, signing.read(given.signature) if given.signature else None),  # type: ignore[arg-type]
        ssl_certfile=given.keys / "server.crt",
        ssl_keyfile=given.keys / "server.key",
        loop="fedmm.flower.gate:Loop",
        lifespan="off",
        interface="asgi3",
        http="h11",  # it bounds a request's headers, by 64 KB; httptools does not
        ws="none",
        limit_concurrency=_CONNECTIONS,
        proxy_headers=False,
        server_header=False,
    )
    with _listen(given.bind) as listener:
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
