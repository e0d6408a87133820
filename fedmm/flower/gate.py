"""The door that sites knock on: passes Flower's Fleet API to a SuperLink on this machine, and nothing else.

Flower 1.41 serves three APIs on one port. The Fleet API knows each SuperNode by its key. The Control API has no login:
whoever reaches it can start a run, which is code on the server. So the SuperLink listens on loopback, and sites reach
it through this:

    python -m fedmm.flower.gate --bind 0.0.0.0:8000 --superlink 127.0.0.1:8001 --keys fleet

A reverse proxy that passes `POST /v1/fleet/` alone does the same; docs/SECURITY.md has nginx's configuration.
"""

from __future__ import annotations

import argparse
import asyncio
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx  # of Flower, as uvicorn is
import uvicorn
from flwr.proto.fab_pb2 import GetFabResponse

from fedmm.flower import signing

FLEET = frozenset(
    f"/v1/fleet/{call}"
    for call in (
        "register-node", "activate-node", "deactivate-node", "unregister-node", "send-node-heartbeat", "pull-messages",
        "push-messages", "get-run", "get-fab", "push-object", "pull-object", "confirm-message-received",
    )
)  # fmt: skip
BODY_LIMIT_BYTES = 64 << 20  # a site's answers, the largest that goes up, are a few MB
_BODY_SECONDS = 60.0
_CONNECTIONS = 1024  # more are told 503, so that they cannot take every descriptor

Headers = list[tuple[bytes, bytes]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


class Gate:
    """An ASGI application that hands `FLEET` on to `superlink` and answers 404 to everything else.

    Only Flower's own headers pass. With a `signature`, the bundle it was made for goes to sites with it.
    """

    def __init__(self, superlink: httpx.AsyncClient, signature: signing.Signature | None = None) -> None:
        self._superlink, self._signature = superlink, signature

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        asked = scope.get("path", "")
        known = scope["type"] == "http" and scope["method"] == "POST" and asked in FLEET
        status, headers, content = await self._hand_on(asked, scope["headers"], receive) if known else (404, [], b"")
        headers.append((b"content-length", str(len(content)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _hand_on(self, path: str, headers: Headers, receive: Receive) -> tuple[int, Headers, bytes]:
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                body = await _read(receive)
        except TimeoutError:
            return 408, [], b""
        if body is None:
            return 413, [], b""
        try:
            reply = await self._superlink.post(path, content=body, headers=_flowers(headers))
        except httpx.HTTPError:
            return 502, [], b""
        content = reply.content
        if path == "/v1/fleet/get-fab" and reply.status_code == 200 and self._signature is not None:
            content = _signed(content, self._signature)
        return reply.status_code, _flowers(reply.headers.raw), content


async def _read(receive: Receive) -> bytes | None:
    """The request's body; None where it is over the limit."""
    body = bytearray()
    while True:
        event = await receive()
        body += event.get("body", b"")
        if len(body) > BODY_LIMIT_BYTES:
            return None
        if not event.get("more_body"):
            return bytes(body)


def _flowers(headers: Headers) -> Headers:
    names = {b"content-type", b"accept"}
    return [(name, value) for name, value in headers if name.lower() in names or name.lower().startswith(b"flwr-")]


def _signed(content: bytes, signature: signing.Signature) -> bytes:
    reply = GetFabResponse.FromString(content)
    if signature.is_of(reply.fab.content):
        for name, value in signature.records().items():
            reply.fab.verifications[name] = value
    return reply.SerializeToString()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bind", required=True, help="where sites knock, host:port")
    parser.add_argument("--superlink", required=True, help="the SuperLink's address on this machine, host:port")
    parser.add_argument("--keys", required=True, type=Path, help="the folder of ca.crt, server.crt and server.key")
    parser.add_argument("--signature", type=Path, help="what `python -m fedmm.flower.signing` wrote")
    given = parser.parse_args()
    host, _, port = given.bind.rpartition(":")
    superlink = httpx.AsyncClient(
        base_url=f"https://{given.superlink}",
        verify=ssl.create_default_context(cafile=str(given.keys / "ca.crt")),
        trust_env=False,
        timeout=_BODY_SECONDS,
    )
    uvicorn.run(
        Gate(superlink, signing.read(given.signature) if given.signature else None),  # type: ignore[arg-type]
        host=host.strip("[]"),
        port=int(port),
        ssl_certfile=given.keys / "server.crt",
        ssl_keyfile=given.keys / "server.key",
        lifespan="off",
        interface="asgi3",
        limit_concurrency=_CONNECTIONS,
        proxy_headers=False,
        server_header=False,
    )


if __name__ == "__main__":
    main()
