"""A client's stream to the host for one round: a request goes up, its reply comes down."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import grpc
from torch import Tensor

from fedmm.link import messages, tls, wire
from fedmm.types import FedmmError

CUTS = 12  # connections cut before the session is open, at most: a host under attack cuts honest ones too
FIRST_PAUSE_SECONDS, CUT_PAUSE_SECONDS, TURN_PAUSE_SECONDS = 0.02, 0.25, 2.0
_REFUSALS = (
    grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION,
)  # fmt: skip
_R = TypeVar("_R", bound=messages.Reply)


class HostGone(FedmmError):
    """The host did not answer: it ended, the network is cut, or it is too slow for the deadline."""


class HostFull(HostGone):
    """The host serves as many clients as link.sessions allows, and none of them has left."""


class _Cut(HostGone):
    """The connection failed."""


class HostRefused(FedmmError):
    """The host answered that it will not do this, and why. The session lives on."""


class FeaturesGone(HostRefused):
    """The host has lost features of the samples in `rows`. They can be sent again."""

    def __init__(self, message: str, rows: list[int]) -> None:
        super().__init__(message)
        self.rows = rows


class Session:
    """One client's stream to the host for one round; `ask` is a request up and its reply down.

    The first call opens the stream. It waits up to `turn_seconds` for its turn where the host is full. Every other wait
    ends within `deadline_seconds` in an answer, HostRefused or HostGone. Not for use from several threads.
    """

    def __init__(
        self,
        address: str,
        *,
        client: int,
        round: int,
        token: str,
        identity: tls.Identity | None = None,
        deadline_seconds: float = 60.0,
        turn_seconds: float = 60.0,
        frame_limit_bytes: int = 1 << 30,
    ) -> None:
        self.client, self.round = client, round
        self.sent_bytes: dict[str, int] = defaultdict(int)
        self.received_bytes: dict[str, int] = defaultdict(int)
        self.sent_frames: Counter[str] = Counter()
        self.wait_seconds = 0.0
        self._address, self._identity, self._credentials = address, identity, wire.credentials(client, round, token)
        self._broken: Exception | None = None  # a session that failed once stays failed
        self._deadline_seconds, self._turn_seconds = deadline_seconds, turn_seconds
        self._frame_limit_bytes = frame_limit_bytes
        self._stream: _Stream | None = None

    def ask(self, request: messages.Asks[_R]) -> _R:
        """The reply to a request. Raises HostRefused or HostGone, as `call`."""
        frame = request.to_frame()
        reply = self.call(frame.verb, frame.tensors, **frame.meta)
        try:
            return request.reply.from_frame(reply, request.codecs)
        except ValueError as error:
            raise HostGone(f"the host at {self._address} sent no valid {frame.verb!r}: {error}") from error

    def call(self, verb: str, tensors: Mapping[str, Tensor] | None = None, **meta: Any) -> wire.Frame:
        """Send one frame as it is, wait for the reply. Raises HostRefused or HostGone.

        A host whose LLM is busy is asked again for `turn_seconds`.
        """
        until = time.monotonic() + self._turn_seconds
        while True:
            reply = self._exchange(wire.Frame(verb, meta, tensors or {}))
            if reply.verb == verb:
                return reply
            if reply.verb != messages.Failure.FAILS:
                raise HostGone(f"the host at {self._address} answered {reply.verb!r} to {verb!r}")
            failure = messages.Failure.from_frame(reply)
            if failure.busy and time.monotonic() < until:
                continue  # it has waited at the host already
            if failure.missing:
                raise FeaturesGone(failure.message, list(failure.missing))
            raise HostRefused(failure.message)

    def _exchange(self, frame: wire.Frame) -> wire.Frame:
        """One frame up, one frame down."""
        if self._broken is not None:
            raise self._broken
        if self._stream is None:
            self._stream = self._open(frame.verb)
        began = time.perf_counter()
        chunks = wire.encode(frame)
        self.sent_bytes[frame.verb] += chunks.size_bytes
        self.sent_frames[frame.verb] += 1
        self._stream.send(chunks)
        # a reply that comes later would be taken for another's
        reply = self._stream.reply(frame.verb, self._deadline_seconds)
        if isinstance(reply, Exception):
            self._broken = reply
            raise reply
        self.received_bytes[frame.verb] += reply.wire_bytes
        self.wait_seconds += time.perf_counter() - began
        return reply

    def close(self) -> None:
        """End the stream and the channel; safe to repeat."""
        if self._stream is not None:
            self._stream.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, verb: str) -> _Stream:
        """The stream, once the host has a session for it. Raises HostFull, HostRefused or HostGone."""
        began, cuts, pause_seconds = time.monotonic(), 0, FIRST_PAUSE_SECONDS
        while True:
            stream = _Stream(self._address, self._identity, self._credentials, self._frame_limit_bytes)
            reply = stream.reply(verb, self._deadline_seconds)
            if isinstance(reply, wire.Frame) and not (odd := stream.differs(self.client)):
                return stream
            stream.close()
            if isinstance(reply, wire.Frame):
                reply = HostRefused(odd)
            full, cuts = isinstance(reply, HostFull), cuts + isinstance(reply, _Cut)
            if full and time.monotonic() - began > self._turn_seconds:
                reply = HostFull(f"{reply}; client {self.client} waited {self._turn_seconds:g} s; raise link.sessions")
            elif full or (isinstance(reply, _Cut) and cuts < CUTS):
                time.sleep(pause_seconds)
                pause_seconds = min(2 * pause_seconds, TURN_PAUSE_SECONDS if full else CUT_PAUSE_SECONDS)
                continue
            self._broken = reply
            raise reply


class _Stream:
    """A connection of its own and the one stream on it; whole frames go up, and come down in their order."""

    def __init__(
        self,
        address: str,
        identity: tls.Identity | None,
        credentials: tuple[tuple[str, str], ...],
        frame_limit_bytes: int,
    ) -> None:
        self._address = address
        self._outbox: queue.SimpleQueue[wire.Chunks | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[wire.Frame | Exception] = queue.SimpleQueue()
        self._awaited = threading.Semaphore(1)  # frames that the host may send: one when the stream opens, then replies
        self._channel = _dial(address, identity)
        sent = itertools.chain.from_iterable(iter(self._outbox.get, None))
        self._call = self._channel.stream_stream(wire.METHOD)(sent, metadata=credentials)
        self._reader = threading.Thread(target=self._read, args=(frame_limit_bytes,), daemon=True)
        self._reader.start()

    def send(self, chunks: wire.Chunks) -> None:
        """Send a frame, and read one more: a host that sends without being asked fills no memory here."""
        self._outbox.put(chunks)
        self._awaited.release()

    def reply(self, verb: str, deadline_seconds: float) -> wire.Frame | Exception:
        """The next frame, or why there is none."""
        try:
            return self._inbox.get(timeout=deadline_seconds)
        except queue.Empty:
            return HostGone(
                f"the host at {self._address} did not answer {verb!r} within {deadline_seconds:g} s; "
                "see the server's log, or raise link.deadline_seconds"
            )

    def differs(self, client: int) -> str | None:
        """Why the host, which has answered, is not one to talk with."""
        return wire.differs(self._call.initial_metadata(), f"client {client}", f"the host at {self._address}")

    def close(self) -> None:
        self._outbox.put(None)
        self._call.cancel()
        self._awaited.release()
        self._channel.close()
        self._reader.join(timeout=5)

    def _read(self, limit_bytes: int) -> None:
        chunks: Iterator[bytes] = iter(self._call)
        try:
            while self._awaited.acquire() and (frame := wire.decode(chunks, limit_bytes)) is not None:
                self._inbox.put(frame)
                del frame  # or it would stay until the next one comes
            self._inbox.put(HostGone(f"the host at {self._address} closed the session"))
        except grpc.RpcError as error:
            self._inbox.put(self._gone(error))
        except wire.WireError as error:
            self._inbox.put(HostGone(f"the host at {self._address} sent no valid frame: {error}"))

    def _gone(self, error: grpc.RpcError) -> FedmmError:
        code, details = self._call.code(), self._call.details()
        if code in _REFUSALS:
            return HostRefused(str(details))
        if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            return HostFull(f"the host at {self._address} has no free session: {details}")
        return (_Cut if code == grpc.StatusCode.UNAVAILABLE else HostGone)(
            f"the host at {self._address} is gone ({code.name.lower()}: {details}); "
            "is the server running, and is link.address one that clients can reach?"
        )


def _dial(address: str, identity: tls.Identity | None) -> grpc.Channel:
    options = [*wire.GRPC_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]  # or sessions of a process share a connection
    if identity is None:
        return grpc.insecure_channel(address, options=options)
    shown = grpc.ssl_channel_credentials(
        identity.authority.encode(), identity.key.encode(), identity.certificate.encode()
    )
    return grpc.secure_channel(address, shown, options=[*options, ("grpc.ssl_target_name_override", tls.HOST_NAME)])
