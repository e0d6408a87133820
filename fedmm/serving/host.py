"""The server's end of the link: one gRPC server, who is let in, and one session of each client.

A session is one client's stream for one round, let in by a token that only the server can make. A client's mistake is
answered with its reason and harms neither the host nor another session; what is no frame ends the session. What a host
does for its clients is in `verbs`, what a round takes in `round`.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc

from fedmm.link import messages, tls, wire
from fedmm.llm.local import LocalLLM
from fedmm.serving import door
from fedmm.serving.engine import Busy, Engine
from fedmm.serving.features import Features, FeaturesMissing
from fedmm.serving.footprint import Footprint, default_frames_bytes, default_limit_bytes
from fedmm.serving.limits import Limits
from fedmm.serving.round import Moved, OnUpdate, Round, Shown, Traffic
from fedmm.serving.verbs import Caller, Verbs
from fedmm.shown import one_line
from fedmm.storage import memory
from fedmm.types import FedmmError, State

log = logging.getLogger("fedmm.host")
NOTES, NOTE_CHARACTERS = 20, 300  # log lines for one session, and characters in each
IDLE_DEADLINES = 10  # of silence, after which a session gives way to clients that wait for one
FREE_REFUSALS = 20  # of a client in a round; each further one is answered after a pause
REFUSAL_PAUSE_SECONDS = 0.5  # four clients that sent wrong steps without a pause made a victim four times slower
_SPARE_THREADS = 4  # for streams that are being let in or turned away, where every session is taken


@dataclass(eq=False)
class _Session:
    """A client's stream, from its admission to its end."""

    caller: Caller
    context: grpc.ServicerContext
    peer: str  # the connection, as gRPC names it; the context forgets it
    frame_bytes: int = 0  # of the frame that is being read or answered, and of its answer
    noted: int = 0  # times that its client did something wrong
    moved: float = field(default_factory=time.monotonic)  # when something came or went last
    moving: bool = False  # whether a frame has begun, in either direction, and is not whole
    cut: bool = False  # for its bytes; they count no more, as they are on their way out

    @property
    def client(self) -> int:
        return self.caller.client

    @property
    def taken_bytes(self) -> int:
        return self.frame_bytes + self.caller.size_bytes


class _Cut(Exception):
    """A session ends, as it takes too much memory."""


class Host:
    """Serves a LocalLLM and the round's state over gRPC from construction until `close`.

    `on_update` is called with every update that fits the round's state, before the client hears that it arrived.
    `edge` are the frozen modules a client runs, and `card` what it must know of them; `features` forms the base of
    factored steps. With an `authority` the link is TLS and clients show a certificate of it; without, plain.
    """

    def __init__(
        self,
        llm: LocalLLM,
        *,
        card: Mapping[str, Any],
        edge: State,
        features: Features,
        on_update: OnUpdate,
        authority: tls.Authority | None = None,
        bind: str = "127.0.0.1:0",
        limits: Limits = Limits(),  # noqa: B008
    ) -> None:
        self._features, self._authority, self._limits = features, authority, limits
        self._frames_bytes = max(limits.frame_limit_bytes, limits.frames_bytes or default_frames_bytes(llm.device))
        step_bytes = limits.step_memory_bytes or default_limit_bytes(llm.device, limits.workers, limits.graph_bytes)
        footprint = Footprint.measured(llm, step_bytes)
        self._engine = Engine(
            llm,
            workers=limits.workers,
            merge_rows=limits.merge_rows,
            merge_wait_seconds=limits.merge_wait_seconds,
            wait_seconds=limits.deadline_seconds / 2,  # whoever waits must hear of it before giving up
            graph_bytes=limits.graph_bytes,
            footprint=footprint,
            crowd=lambda: len(self._sessions),
        )
        self._round = Round(on_update)
        self._verbs = Verbs(
            llm, self._round, self._engine, footprint, card=card, edge=edge, features=features, limits=limits
        )
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()  # over the sessions
        self._sessions: dict[int, _Session] = {}  # by client; each has a thread until it is taken out
        self._refusals: Counter[int] = Counter()  # by client, in this round
        self._full: set[int] = set()  # clients who found no free session in this round, and have none since
        self._closed = threading.Event()
        self._server = grpc.server(
            ThreadPoolExecutor(limits.sessions + _SPARE_THREADS, thread_name_prefix="fedmm-host"),
            options=[
                *wire.GRPC_OPTIONS,
                ("grpc.http2.max_ping_strikes", 0),
                ("grpc.max_concurrent_streams", door.STREAMS),
                ("grpc.max_allowed_incoming_connections", door.connections(limits.sessions)),
            ],
        )
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        service, method = wire.METHOD.strip("/").split("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        try:
            self.port = (
                self._server.add_secure_port(bind, _secured(authority))
                if authority
                else self._server.add_insecure_port(bind)
            )
        except RuntimeError as error:
            self._engine.close()
            raise FedmmError(f"the link cannot listen on {bind}; set link.bind to a free address") from error
        self._door = door.Door(self.port, door.room(limits.sessions))
        self._watcher = threading.Thread(target=self._watch, name="fedmm-sessions", daemon=True)
        self._watcher.start()
        self._server.start()

    # ---- for the server's round loop -------------------------------------------------------------------------------

    def open_round(
        self,
        round: int,
        current: State,
        clients: list[int],
        down: Shown = lambda client, current: current,
        up: Shown = lambda client, current: current,
        scale: float = 1.0,
    ) -> None:
        """Serve `current` as the state of `round` to whoever has its token; take one update from each of `clients`.

        A client gets `down(client, current)`. Its update's delta must have the names and shapes of
        `up(client, current)`, but may lack tensors that only an image can train. Tensors that are folded into the base
        (`rule=stack`) are added to the base here, times the adapters' `scale`.
        """
        self._features.fold(current, scale)
        with self._lock:
            self._refusals.clear()
            self._full.clear()
            self._round.open(round, current, clients, down, up)

    def token(self, round: int, client: int) -> str:
        """What lets this client, and no other, into this round, and no other."""
        return hmac.new(self._secret, f"{round}/{client}".encode(), hashlib.sha256).hexdigest()

    def identity(self, client: int) -> tls.Identity | None:
        """What this client shows on a TLS link; None where the link is plain."""
        return self._authority.client(client) if self._authority else None

    def close_round(self) -> tuple[dict[int, str], Moved]:
        """End the round: no update is taken any more, every session is cut.

        Returns the reasons of refused updates by client, and what of the round's traffic no update took along.
        """
        refused, moved = self._round.close()
        with self._lock:
            sessions, full = list(self._sessions.values()), set(self._full)
        waited = f"it waited until the round ended, and all of {self._limit()} were in use; raise link.sessions"
        for session in sessions:
            session.context.cancel()
        memory.give_back()
        return dict.fromkeys(full, waited) | refused, moved

    def close(self) -> None:
        """Stop serving; safe to repeat."""
        self._server.stop(grace=0.5).wait()
        self._closed.set()
        self._watcher.join()
        self._door.close()
        self._engine.close()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- a session -------------------------------------------------------------------------------------------------

    def _serve(self, chunks: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        session = self._admit(context)
        client, limits = session.client, self._limits
        try:
            yield from wire.encode(messages.Done().to_frame(messages.Done.OPENS))
            watched = self._watched(chunks, session)
            tensors = max(wire.TENSORS_LIMIT, self._round.tensors)  # of a step, or of an update
            while (frame := wire.decode(watched, limits.frame_limit_bytes, tensors)) is not None:
                session.moving = False
                verb = frame.verb if frame.verb in self._verbs.known else messages.REFUSED
                traffic = self._round.traffic(client, verb)
                traffic.frames += 1
                traffic.up_bytes += frame.wire_bytes
                answer = self._answer(session, frame, traffic)
                reply = answer if isinstance(answer, wire.Chunks) else wire.encode(answer)
                self._round.traffic(client, verb).down_bytes += reply.size_bytes
                if reply is not answer:  # else it is one that all clients share
                    session.frame_bytes += reply.size_bytes
                self._bound(session)
                yield from _moving(reply, session)
                del frame, answer, reply  # or each session would hold what came last, until it sends again
                session.frame_bytes, session.moving = 0, False
        except wire.WireError as error:
            self._note(session, f"sent no valid frame: {error}")
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no valid frame: {error}")
        except _Cut as cut:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(cut))
        finally:
            session.caller.pending.clear()  # gRPC may keep this call for a while
            self._door.leave(session.peer)
            with self._lock:
                del self._sessions[client]

    def _watch(self) -> None:
        """Cut every session in which a frame has begun, in either direction, and does not go on.

        While clients wait for a session, also cut the one that has been silent longest, after `IDLE_DEADLINES`
        deadlines: a client may encode or compute for a while between two frames.
        """
        while not self._closed.wait(min(1.0, self._limits.deadline_seconds / 4)):
            now = time.monotonic()
            with self._lock:
                sessions = list(self._sessions.values())
                late = [s for s in sessions if s.moving and now - s.moved > self._limits.deadline_seconds]
                silent = [s for s in sessions if now - s.moved > IDLE_DEADLINES * self._limits.deadline_seconds]
                if self._full and silent:
                    late.append(min(silent, key=lambda session: session.moved))
            for session in late:
                self._note(session, "its session is cut: it holds a frame, or others wait and it is silent")
                session.context.cancel()

    def _watched(self, chunks: Iterator[bytes], session: _Session) -> Iterator[bytes]:
        """The chunks, noting on the session when one came, that a frame is being read, and its bytes so far."""
        for chunk in chunks:
            session.moved, session.moving = time.monotonic(), True
            session.frame_bytes += len(chunk)
            self._bound(session)
            yield chunk

    def _bound(self, session: _Session) -> None:
        """Cut the sessions that take most memory while all together take too much. Raises _Cut where this is one."""
        cut: _Cut | None = None
        for other, taken_bytes in self._over_the_bound():
            reason = (
                f"its session is cut: its frame and steps take {taken_bytes >> 20} MB, and those of all clients "
                f"together more than {self._frames_bytes >> 20}; raise link.frames_mb or lower link.pending"
            )
            self._note(other, reason)
            if other is session:
                cut = _Cut(reason)
            else:
                other.context.cancel()
        if cut is not None:
            raise cut  # only now: the others are given out once

    def _over_the_bound(self) -> list[tuple[_Session, int]]:
        """The sessions to cut, largest first, each with its bytes. Each is given out once: two threads may ask."""
        with self._lock:
            taken = {session: session.taken_bytes for session in self._sessions.values() if not session.cut}
            over, chosen = sum(taken.values()) - self._frames_bytes, []
            for session in sorted(taken, key=taken.__getitem__, reverse=True):
                if over <= 0:
                    break
                session.cut, over = True, over - taken[session]
                chosen.append((session, taken[session]))
            return chosen

    def _admit(self, context: grpc.ServicerContext) -> _Session:
        """Let a client in, where a session is free.

        A client has one session: a new one ends an old one, which a crash may have left, and is let in once that has
        ended. So one client holds one thread, however often it comes.
        """
        session = _Session(self._caller(context), context, context.peer())
        client = session.client
        with self._lock:
            over, before = self._round.over(session.caller.round), self._sessions.get(client)
            full = before is None and len(self._sessions) >= self._limits.sessions
            if not over and full:
                self._full.add(client)
            elif not over and before is None:
                self._sessions[client] = session
                self._full.discard(client)
                self._door.prove(session.peer)
        if over:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, over)
        if before is not None:
            before.context.cancel()
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"an earlier session of client {client} is ending")
        if full:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"all of {self._limit()} are in use")
        return session

    def _caller(self, context: grpc.ServicerContext) -> Caller:
        """Who is calling, by a token and, over TLS, a certificate; and whether both ends speak one version."""
        sent = dict(context.invocation_metadata())
        client, round = str(sent.get("fedmm-client", "")), str(sent.get("fedmm-round", ""))
        numbers = all(text.isdecimal() and len(text) < 10 for text in (client, round))
        wanted = self.token(int(round), int(client)) if numbers else ""
        if not wanted or not hmac.compare_digest(wanted.encode(), str(sent.get("fedmm-token", "")).encode()):
            context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                f"the token is not the one of client {client[:9]!r} in round {round[:9]!r} of this run; "
                "it comes with the server's Flower message and ends with the run",
            )
        shown = context.auth_context().get("x509_common_name", [b""])[0].decode()
        if self._authority and shown != tls.client_name(int(client)):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, f"the certificate is {shown!r}'s, not client {client}'s")
        context.send_initial_metadata(wire.protocol())
        if odd := wire.differs(sent.items(), "the host", f"client {client}"):
            log.warning("client %s is refused: %s", client, odd)
            self._round.refuse(int(client), odd)
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, odd)
        return Caller(int(client), int(round))

    def _limit(self) -> str:
        return f"link.sessions={self._limits.sessions}"

    def _answer(self, session: _Session, frame: wire.Frame, traffic: Traffic) -> wire.Frame | wire.Chunks:
        try:
            return self._verbs.answer(session.caller, frame, traffic)
        except FeaturesMissing as error:
            failure = messages.Failure(f"{frame.verb[:32]}: {error}", error.rows)
        except Busy as error:
            failure = messages.Failure(f"{frame.verb[:32]}: {error}", busy=True)
        except ValueError as error:
            self._note(session, f"refused {frame.verb[:32]}: {error}")
            self._pause(session)
            failure = messages.Failure(f"{frame.verb[:32]}: {error}"[:4096])
        except Exception as error:  # a fault of ours must reach the client by name, and end nobody else's session
            self._note(session, f"{frame.verb[:32]} failed at the host", fault=error)
            self._pause(session)
            failure = messages.Failure(f"{frame.verb} failed at the host: {type(error).__name__}: {error}"[:4096])
        return failure.to_frame(messages.Failure.FAILS)

    def _note(self, session: _Session, text: str, fault: Exception | None = None) -> None:
        """Log what a client did wrong, in one line; of one that does nothing else, the first times of a session.
        A `fault` of the host's own is logged with its traceback."""
        session.noted += 1
        if session.noted <= NOTES:
            last = "; no more of this session is logged" if session.noted == NOTES else ""
            level = logging.ERROR if fault else logging.WARNING
            log.log(level, "client %d: %s%s", session.client, one_line(text, NOTE_CHARACTERS), last, exc_info=fault)

    def _pause(self, session: _Session) -> None:
        """Have a client that is refused again and again wait: what is refused costs others, and no queue counts it."""
        with self._lock:
            self._refusals[session.client] += 1
            often = self._refusals[session.client] > FREE_REFUSALS
        if often:
            self._closed.wait(REFUSAL_PAUSE_SECONDS)


def _moving(reply: wire.Chunks, session: _Session) -> Iterator[bytes]:
    """The chunks of an answer, noting on the session that it is being taken."""
    session.moved, session.moving = time.monotonic(), True
    for chunk in reply:
        yield chunk
        session.moved = time.monotonic()


def _secured(authority: tls.Authority) -> grpc.ServerCredentials:
    own = authority.host()
    return grpc.ssl_server_credentials(
        [(own.key.encode(), own.certificate.encode())], own.authority.encode(), require_client_auth=True
    )
