"""The floor of the link: gRPC alone, the same messages, options and certificates, with no codec and no checks.

The server stores a whole turn before it sends it back, as the host stores a step before it computes.
"""

from __future__ import annotations

import itertools
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from fedmm.link import tls, wire

METHOD = "/fedmm.Bare/Echo"


def serve(authority: tls.Authority | None) -> tuple[grpc.Server, int]:
    """A server on a free port of loopback; without an authority it is plain."""
    server = grpc.server(ThreadPoolExecutor(2), options=wire.GRPC_OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(_echo)
    service, method = METHOD.strip("/").split("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0") if authority is None else _add_secure_port(server, authority.host())
    server.start()
    return server, port


class Bare:
    """A client's stream to it."""

    def __init__(self, address: str, identity: tls.Identity | None) -> None:
        self._outbox: queue.SimpleQueue[list[bytes] | None] = queue.SimpleQueue()
        self._channel = _dial(address, identity)
        sent = itertools.chain.from_iterable(iter(self._outbox.get, None))
        self._stream = self._channel.stream_stream(METHOD)(sent)

    def echo(self, chunks: list[bytes]) -> None:
        """Send the chunks, wait for as many."""
        self._outbox.put([len(chunks).to_bytes(4, "little"), *chunks])
        for _ in chunks:
            next(self._stream)

    def close(self) -> None:
        self._outbox.put(None)
        self._stream.cancel()
        self._channel.close()


def chunks_of(size_bytes: int) -> list[bytes]:
    """Messages of 1 MiB, the last one shorter."""
    sizes = [wire.CHUNK_BYTES] * (size_bytes // wire.CHUNK_BYTES) + [size_bytes % wire.CHUNK_BYTES]
    return [bytes(size) for size in sizes if size]


def _echo(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    for count in messages:
        yield from [next(messages) for _ in range(int.from_bytes(count, "little"))]


def _add_secure_port(server: grpc.Server, own: tls.Identity) -> int:
    pair = (own.key.encode(), own.certificate.encode())
    shown = grpc.ssl_server_credentials([pair], own.authority.encode(), require_client_auth=True)
    return int(server.add_secure_port("127.0.0.1:0", shown))


def _dial(address: str, identity: tls.Identity | None) -> grpc.Channel:
    if identity is None:
        return grpc.insecure_channel(address, options=wire.GRPC_OPTIONS)
    trusted, key, certificate = identity.authority.encode(), identity.key.encode(), identity.certificate.encode()
    named = ("grpc.ssl_target_name_override", tls.HOST_NAME)
    shown = grpc.ssl_channel_credentials(trusted, key, certificate)
    return grpc.secure_channel(address, shown, options=[*wire.GRPC_OPTIONS, named])
