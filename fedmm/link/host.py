"""The server's end of the link: one frozen LLM, many sessions, the round's state down and the clients' updates up.

A session is one client's stream for one round, let in by a token that only the server can make. Everything a client
sends is checked here, before it touches the LLM or the round: a mistake is answered with its reason and harms neither
the host nor another session; what is no frame ends the session.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import torch
from torch import Tensor

from fedmm import codecs, tree
from fedmm.adapters.schema import without_images
from fedmm.codecs import Feedback
from fedmm.link import door, requests, tls, wire
from fedmm.link.engine import Begun, Busy, Engine, Rows
from fedmm.link.features import Features, FeaturesMissing
from fedmm.link.footprint import Footprint, Shape, default_frames_bytes, default_limit_bytes
from fedmm.link.requests import Reader
from fedmm.llm.local import LocalLLM
from fedmm.losses import answer_cross_entropy, branch_losses
from fedmm.shown import one_line
from fedmm.storage import memory
from fedmm.types import FedmmError, State, Update

log = logging.getLogger("fedmm.host")
METRIC_NAME = re.compile("[a-z][a-z0-9_]{0,39}")  # they become keys of the run's files
NOTES, NOTE_CHARACTERS = 20, 300  # of one session in the log, and of each
IDLE_DEADLINES = 10  # of silence, after which a session gives way to clients that wait for one
FREE_REFUSALS = 20  # of a client in a round; each further one is answered after a pause
REFUSAL_PAUSE_SECONDS = 0.5  # four clients that sent wrong steps without a pause made a victim four times slower
_SPARE_THREADS = 4  # for streams that are being let in or turned away, where every session is taken
ENTRY_LIMIT = 1e9  # of an update: sums and products of a thousand clients' stay finite in fp32


@dataclass(eq=False)
class Traffic:
    """What one client moved for one verb in one round, as counted on the wire, and the LLM's seconds in it."""

    up_bytes: int = 0
    down_bytes: int = 0
    fisher_bytes: int = 0  # of up_bytes
    frames: int = 0
    llm_seconds: float = 0.0
    llm_samples: int = 0  # that went into the LLM, once for each branch; backwards and later tokens are not counted


@dataclass(eq=False)
class _Visit:
    """A live session: who, in which round, and the forwards it left here until their backward comes."""

    client: int
    round: int
    context: grpc.ServicerContext
    peer: str  # the connection, as gRPC names it; the context forgets it
    pending: dict[int, tuple[requests.Read, Begun]] = field(default_factory=dict)
    pending_bytes: int = 0
    frame_bytes: int = 0  # of the frame that is being read or answered
    feedback: Feedback = field(default_factory=Feedback)
    noted: int = 0  # times that it did something wrong
    moved: float = field(default_factory=time.monotonic)  # when something came last, or an answer went
    reading: bool = False  # whether a frame has begun and is not whole

    @property
    def taken_bytes(self) -> int:
        return self.frame_bytes + self.pending_bytes


class Host:
    """Serves a LocalLLM and the round's state over gRPC from construction until `close`.

    `on_update` is called with every update that fits the round's state, before the client hears that it arrived; it
    makes the update safe (a journal), or refuses it by a ValueError. `edge` are the frozen parts a client runs, and
    `card` what it must know of them; `features` forms the base of factored steps.
    `step_memory_bytes` is the most that one step may take; None: by what is free (`footprint.default_limit_bytes`).
    `frames_bytes` is what frames in work and pending steps of all sessions may take, at least one frame's limit; None:
    a share of what is free. Above it the session with the most is cut.
    With an `authority` the link is TLS and clients show a certificate of it; without, plain.
    """

    def __init__(
        self,
        llm: LocalLLM,
        *,
        card: Mapping[str, Any],
        edge: State,
        features: Features,
        on_update: Callable[[int, Update], None],
        authority: tls.Authority | None = None,
        bind: str = "127.0.0.1:0",
        sessions: int = 64,
        pending: int = 4,
        workers: int = 2,
        merge_rows: int = 0,
        merge_wait_seconds: float = 0.01,
        graph_bytes: int = 1 << 30,
        step_memory_bytes: int | None = None,
        frames_bytes: int | None = None,
        frame_limit_bytes: int = 1 << 30,
        answer_tokens: int = 1024,
        deadline_seconds: float = 60.0,
    ) -> None:
        self._llm, self._card, self._on_update = llm, dict(card), on_update
        self._edge = wire.encode(wire.Frame("edge", {}, edge))  # once: it may be large, and many ask for it
        self._features = features
        self._frames_bytes = max(frame_limit_bytes, frames_bytes or default_frames_bytes(llm.device))
        footprint = Footprint.measured(llm, step_memory_bytes or default_limit_bytes(llm.device, workers, graph_bytes))
        self._read = Reader(
            llm.width, llm.positions, llm.vocabulary, llm.device, features, footprint, frame_limit_bytes
        )
        self._pending_limit, self._frame_limit_bytes, self._answer_tokens = pending, frame_limit_bytes, answer_tokens
        self._engine = Engine(
            llm,
            workers=workers,
            merge_rows=merge_rows,
            merge_wait_seconds=merge_wait_seconds,
            wait_seconds=deadline_seconds / 2,  # whoever waits must hear of it before giving up
            graph_bytes=graph_bytes,
            footprint=footprint,
            crowd=lambda: len(self._visits),
        )
        self._authority = authority
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._updating = threading.Lock()  # held from an update's check until it is safe; a round closes after it
        self._round = 0  # 0 while no round is open
        self._current: State = {}
        self._down = self._up = lambda client, current: current
        self._awaited: set[int] = set()
        self._refused: dict[int, str] = {}
        self._sessions = sessions
        self._visits: dict[int, _Visit] = {}  # by client; each has a thread until it is taken out
        self._refusals: Counter[int] = Counter()  # by client, in this round
        self._full: set[int] = set()  # clients who found no free session in this round, and have none since
        self._traffic: dict[tuple[int, str], Traffic] = defaultdict(Traffic)
        self._verbs: dict[str, Callable[[_Visit, wire.Frame, Traffic], wire.Frame | wire.Chunks]] = {
            "card": self._send_card,
            "edge": self._send_edge,
            "state": self._send_state,
            "update": self._take_update,
            "known": self._known,
            "features": self._keep_features,
            "forward": self._forward,
            "backward": self._backward,
            "loss": self._loss,
            "squares": self._squares,
            "generate": self._generate,
            "echo": self._echo,
        }
        self._server = grpc.server(
            ThreadPoolExecutor(sessions + _SPARE_THREADS, thread_name_prefix="fedmm-host"),
            options=[
                *wire.GRPC_OPTIONS,
                ("grpc.http2.max_ping_strikes", 0),
                ("grpc.max_concurrent_streams", door.STREAMS),
                ("grpc.max_allowed_incoming_connections", door.connections(sessions)),
            ],
        )
        handler = grpc.stream_stream_rpc_method_handler(self._session)
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
        self._door = door.Door(self.port, door.room(sessions))
        self._deadline_seconds, self._closed = deadline_seconds, threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="fedmm-sessions", daemon=True)
        self._watcher.start()
        self._server.start()

    # ---- for the server's round loop -------------------------------------------------------------------------------

    def open_round(
        self,
        round: int,
        current: State,
        clients: list[int],
        down: Callable[[int, State], State] = lambda client, current: current,
        up: Callable[[int, State], State] = lambda client, current: current,
        scale: float = 1.0,
    ) -> None:
        """Serve `current` as the state of `round` to whoever has its token; take one update from each of `clients`.

        What of it a client gets is `down(client, current)`, and its update's delta has the names and shapes of
        `up(client, current)`; it may lack what only an image can train. What of it is folded (`rule=stack`) goes, times
        the adapters' `scale`, under the bases that are formed here.
        """
        self._features.fold(current, scale)
        with self._lock:
            self._round, self._current = round, tree.clone(current)
            self._awaited, self._refused, self._full = set(clients), {}, set()
            self._refusals.clear()
            self._down, self._up = down, up

    def token(self, round: int, client: int) -> str:
        """What lets this client, and no other, into this round, and no other."""
        return hmac.new(self._secret, f"{round}/{client}".encode(), hashlib.sha256).hexdigest()

    def identity(self, client: int) -> tls.Identity | None:
        """What this client shows on a TLS link; None where the link is plain."""
        return self._authority.client(client) if self._authority else None

    def traffic_of(self, client: int) -> dict[tuple[int, str], Traffic]:
        """What this client has moved since it was last asked, by (client, verb); it is then forgotten here."""
        with self._lock:
            own = [key for key in self._traffic if key[0] == client]
            return {key: self._traffic.pop(key) for key in own}

    def close_round(self) -> tuple[dict[int, str], dict[tuple[int, str], Traffic]]:
        """End the round: no update is taken any more, every session is cut.

        Returns the reasons of refused updates by client, and what of the round's traffic nobody has asked for.
        """
        with self._updating, self._lock:
            self._round, self._awaited = 0, set()
            visits = list(self._visits.values())
            refused, traffic, self._traffic = self._refused, self._traffic, defaultdict(Traffic)
            waited = f"it waited until the round ended, and all of {self._limit()} were in use; raise link.sessions"
            refused = dict.fromkeys(self._full, waited) | refused
        for visit in visits:
            visit.context.cancel()
        memory.give_back()
        return refused, dict(traffic)

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

    def _session(self, chunks: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        visit = self._admit(context)
        try:
            yield from wire.encode(wire.Frame("open"))
            watched = _watched(chunks, visit)
            while (frame := wire.decode(watched, self._frame_limit_bytes, self._tensors_limit())) is not None:
                visit.reading = False
                moved = visit.client, frame.verb if frame.verb in self._verbs else "refused"
                with self._lock:
                    traffic = self._traffic[moved]
                    traffic.frames += 1
                    traffic.up_bytes += frame.wire_bytes
                answer = self._answer(visit, frame, traffic)
                reply = answer if isinstance(answer, wire.Chunks) else wire.encode(answer)
                with self._lock:
                    self._traffic[moved].down_bytes += reply.size_bytes  # what came may have been asked for by now
                yield from reply
                visit.moved = time.monotonic()
                del frame, answer, reply  # or each session would hold what came last, until it sends again
                visit.frame_bytes = 0
        except wire.WireError as error:
            self._note(visit, f"sent no valid frame: {error}")
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no valid frame: {error}")
        finally:
            visit.pending.clear()  # gRPC may keep this call for a while
            self._door.leave(visit.peer)
            with self._lock:
                del self._visits[visit.client]

    def _watch(self) -> None:
        """Cut a session whose frame has begun and does not go on; the one that takes most memory, while all together
        take too much; and, while clients wait for a session, the one that has been silent longest, if that is long: a
        client may encode or compute for a while between two frames."""
        while not self._closed.wait(min(1.0, self._deadline_seconds / 4)):
            now = time.monotonic()
            with self._lock:
                visits = list(self._visits.values())
                late = [v for v in visits if v.reading and now - v.moved > self._deadline_seconds]
                silent = [v for v in visits if now - v.moved > IDLE_DEADLINES * self._deadline_seconds]
                if self._full and silent:
                    late.append(min(silent, key=lambda visit: visit.moved))
            for visit in late:
                self._note(visit, "its session is cut: it holds a frame, or others wait and it is silent")
                visit.context.cancel()
            if visits and sum(visit.taken_bytes for visit in visits) > self._frames_bytes:
                largest = max(visits, key=lambda visit: visit.taken_bytes)
                self._note(
                    largest,
                    f"its session is cut: its frame and steps take {largest.taken_bytes >> 20} MB, and those of all "
                    f"clients more than {self._frames_bytes >> 20}; raise link.frames_mb or lower link.pending",
                )
                largest.context.cancel()

    def _admit(self, context: grpc.ServicerContext) -> _Visit:
        """Let a client in by its token, where a session is free.

        A client has one session: a new one ends an old one, which a crash may have left, and is let in once that has
        ended. So one client holds one thread, however often it comes.
        """
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
        visit = _Visit(int(client), int(round), context, context.peer())
        with self._lock:
            over, before = visit.round != self._round, self._visits.get(visit.client)
            full = before is None and len(self._visits) >= self._sessions
            if not over and full:
                self._full.add(visit.client)
            elif not over and before is None:
                self._visits[visit.client] = visit
                self._full.discard(visit.client)
                self._door.prove(visit.peer)
        if over:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, self._over(visit))
        if before is not None:
            before.context.cancel()
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"an earlier session of client {visit.client} is ending")
        if full:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"all of {self._limit()} are in use")
        return visit

    def _limit(self) -> str:
        return f"link.sessions={self._sessions}"

    def _tensors_limit(self) -> int:
        """Tensors of a client's frame: those of a step, or of an update with its Fisher."""
        return max(wire.TENSORS_LIMIT, 2 * len(self._current))

    def _over(self, visit: _Visit) -> str:
        now = f"in round {self._round}" if self._round else "between rounds"
        return f"round {visit.round} is over, the run is {now}"

    def _answer(self, visit: _Visit, frame: wire.Frame, traffic: Traffic) -> wire.Frame | wire.Chunks:
        try:
            if visit.round != self._round:
                raise ValueError(self._over(visit))
            verb = self._verbs.get(frame.verb)
            if verb is None:
                raise ValueError(f"unknown verb {frame.verb[:32]!r}; this host knows {', '.join(self._verbs)}")
            return verb(visit, frame, traffic)
        except FeaturesMissing as error:
            return wire.Frame("error", {"message": f"{frame.verb[:32]}: {error}", "missing": error.rows})
        except Busy as error:
            return wire.Frame("error", {"message": f"{frame.verb[:32]}: {error}", "busy": True})
        except ValueError as error:
            self._note(visit, f"refused {frame.verb[:32]}: {error}")
            self._pause(visit)
            return wire.Frame("error", {"message": f"{frame.verb[:32]}: {error}"[:4096]})
        except Exception as error:  # a fault of ours must reach the client by name, and end nobody else's session
            log.exception("%s of client %d failed", one_line(frame.verb[:32]), visit.client)
            reason = f"{frame.verb} failed at the host: {type(error).__name__}: {error}"
            return wire.Frame("error", {"message": reason[:4096]})

    def _note(self, visit: _Visit, text: str) -> None:
        """Log what a client did wrong, in one line; of one that does nothing else, the first times of a session."""
        visit.noted += 1
        if visit.noted <= NOTES:
            last = "; no more of this session is logged" if visit.noted == NOTES else ""
            log.warning("client %d: %s%s", visit.client, one_line(text, NOTE_CHARACTERS), last)

    def _pause(self, visit: _Visit) -> None:
        """Have a client that is refused again and again wait: what is refused costs others, and no queue counts it."""
        with self._lock:
            self._refusals[visit.client] += 1
            often = self._refusals[visit.client] > FREE_REFUSALS
        if often:
            self._closed.wait(REFUSAL_PAUSE_SECONDS)

    # ---- verbs: once a run, once a round ---------------------------------------------------------------------------

    def _send_card(self, visit: _Visit, frame: wire.Frame, traffic: Traffic) -> wire.Frame:
        return wire.Frame("card", self._card)

    def _send_edge(self, visit: _Visit, frame: wire.Frame, traffic: Traffic) -> wire.Chunks:
        return self._edge

    def _send_state(self, visit: _Visit, frame: wire.Frame, traffic: Traffic) -> wire.Frame:
        with self._lock:
            return wire.Frame("state", {}, self._down(visit.client, self._current))

    def _take_update(self, visit: _Visit, frame: wire.Frame, traffic: Traffic) -> wire.Frame:
        with self._updating:
            if visit.round != self._round or visit.client not in self._awaited:
                raise ValueError(f"no update of client {visit.client} is awaited in round {visit.round}")
            try:
                update = _read_update(visit.client, frame, self._up(visit.client, self._current))
                traffic.fisher_bytes += tree.size_bytes(update.fisher or {})
                self._on_update(visit.round, update)
            except ValueError as error:
                self._refused[visit.client] = str(error)
                raise
            self._awaited.discard(visit.client)
            self._refused.pop(visit.client, None)
        return wire.Frame("update")

    # ---- verbs: once a sample --------------------------------------------------------------------------------------

    def _known(self, visit: _Visit, frame: wire.Frame, traffic: Traffic) -> wire.Frame:
        keys_BK = requests.tensor(frame.tensors, "keys", (None, None))
        missing_B = torch.zeros(len(keys_BK), dtype=torch.bool)
        missing_B[self._features.missing(visit.client, keys_BK)] = True
        return wire.Frame("known", {}, {"missing": missing_B})

    def _keep_features(self, visit: _Visit, frame: wire.Frame, traffic: Traffic) -> wire.Frame:
        tensors = codecs.read(frame.tensors, codecs.named(frame.meta.get("codecs")))
        keys_BK = requests.tensor(tensors, "keys", (None, None))
        features = [
            requests.tensor(tensors, f"features.{i}", (None, None, None), floating=True) for i in range(len(keys_BK))
        ]
        self._features.keep(visit.client, keys_BK, features)
        return wire.Frame("features")

    # ---- verbs: every step -----------------------------------------------------------------------------------------

    def _echo(self, visit: _Visit, frame: wire.Frame, traffic: Traffic) -> wire.Frame:
        """What came, so that a benchmark can tell the link's own time."""
        return wire.Frame("echo", {}, frame.tensors)

    def _forward(self, visit: _Visit, frame: wire.Frame, traffic: Traffic) -> wire.Frame:
        step = self._read.step(frame, visit.client)
        keep_BA, number = self._read.keep(frame, step.mask_BT), requests.integer(frame, "step")
        if len(step.branches) != 1:
            raise ValueError(f"forward takes one branch, got {len(step.branches)}")
        if number in visit.pending:
            raise ValueError(f"step {number} already waits for its backward; give each forward a number of its own")
        if step.leaves and len(visit.pending) >= self._pending_limit:
            raise ValueError(
                f"{len(visit.pending)} steps wait for their backward, at most {self._pending_limit}; "
                "call backward, use no_grad, or raise link.pending"
            )
        (rows,) = _rows(step, keep_BA)
        if step.leaves:
            visit.pending[number] = (step, begun := self._engine.begin(rows, visit.client))
            visit.pending_bytes += begun.bytes
            logits_BAV, seconds = begun.logits_BAV, begun.seconds
        else:
            passed = self._engine.run([rows], client=visit.client)
            logits_BAV, seconds = passed.logits[0], passed.seconds
        traffic.llm_seconds += seconds
        traffic.llm_samples += len(keep_BA)
        return self._written("forward", {"logits": logits_BAV}, frame, visit)

    def _backward(self, visit: _Visit, frame: wire.Frame, traffic: Traffic) -> wire.Frame:
        number = requests.integer(frame, "step")
        if number not in visit.pending:
            raise ValueError(f"no forward of step {number} waits for its backward")
        step, begun = visit.pending[number]
        tensors = codecs.read(frame.tensors, codecs.named(frame.meta.get("codecs")))
        grad_BAV = requests.tensor(tensors, "grad", tuple(begun.logits_BAV.shape), floating=True)
        grad_BTD, seconds = self._engine.finish(begun, grad_BAV.to(begun.logits_BAV))
        del visit.pending[number]  # only now: a step that found no worker is asked for again
        visit.pending_bytes -= begun.bytes
        traffic.llm_seconds += seconds
        grads = _gradients([begun.rows], step.leaves, [grad_BTD])
        return self._written("backward", grads, frame, visit, step.summed())

    def _loss(self, visit: _Visit, frame: wire.Frame, traffic: Traffic) -> wire.Frame:
        step = self._read.step(frame, visit.client)
        keep_BA = self._read.keep(frame, step.mask_BT)
        labels_BA, mutual = self._read.labels(frame, keep_BA), self._read.mutual(frame, len(step.branches))
        reduction = frame.meta.get("reduction", "mean")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be mean or sum, got {str(reduction)[:32]!r}")

        def values(logits: list[Tensor]) -> Tensor:
            return torch.stack(branch_losses(logits, labels_BA.to(self._llm.device), mutual, reduction))

        rows = _rows(step, keep_BA)
        pairs = len(keep_BA) * len(rows) * (len(rows) - 1) if mutual else 0
        passed = self._engine.run(rows, values, grad=bool(step.leaves), pairs=pairs, client=visit.client)
        traffic.llm_seconds += passed.seconds
        traffic.llm_samples += len(keep_BA) * len(rows)
        tensors = {"losses": passed.values, **_gradients(rows, step.leaves, passed.grads)}
        return self._written("loss", tensors, frame, visit, step.summed())

    def _squares(self, visit: _Visit, frame: wire.Frame, traffic: Traffic) -> wire.Frame:
        step = self._read.step(frame, visit.client, grad=True)
        keep_BA = self._read.keep(frame, step.mask_BT)
        labels_BA = self._read.labels(frame, keep_BA).to(self._llm.device)
        if len(step.branches) != 1:
            raise ValueError(f"squares takes one branch, got {len(step.branches)}")

        def values(logits: list[Tensor]) -> Tensor:
            return answer_cross_entropy(logits[0], labels_BA, reduction="sum")

        passed = self._engine.run(_rows(step, keep_BA), values, grad=True, client=visit.client)
        traffic.llm_seconds += passed.seconds
        traffic.llm_samples += len(keep_BA)
        found = step.branches[0].squares(passed.grads[0])
        tensors = {f"grad/h.{i}": grad_NR for i, (grad_NR, _) in enumerate(found.terms)}
        tensors |= {f"squares.{i}": squares_DR for i, (_, squares_DR) in enumerate(found.terms)}
        if found.image_ND is not None:
            tensors["grad/image_part"] = found.image_ND
        return self._written("squares", tensors, frame, visit)

    def _generate(self, visit: _Visit, frame: wire.Frame, traffic: Traffic) -> wire.Frame:
        max_tokens = requests.integer(frame, "max_tokens")
        if not 1 <= max_tokens <= self._answer_tokens:
            raise ValueError(
                f"max_tokens must be from 1 to evaluate.max_tokens={self._answer_tokens}, got {max_tokens}"
            )
        step = self._read.step(frame, visit.client, tokens=max_tokens)
        if len(step.branches) != 1:
            raise ValueError(f"generate takes one branch, got {len(step.branches)}")
        terms, (B, T) = self._read.token_terms(frame), step.mask_BT.shape
        tokens_BN, seconds = self._engine.alone(
            lambda: self._llm.generate(step.branches[0], step.mask_BT, terms, max_tokens),
            Shape(B, T, tokens=max_tokens),
            visit.client,
        )
        traffic.llm_seconds += seconds
        traffic.llm_samples += len(tokens_BN)
        return wire.Frame("generate", {}, {"tokens": tokens_BN})

    def _written(
        self, verb: str, tensors: State, frame: wire.Frame, visit: _Visit, summed: Mapping[str, str] | None = None
    ) -> wire.Frame:
        """An answer in the codecs that the client asked for."""
        words = codecs.named(frame.meta.get("codecs"))
        return wire.Frame(verb, {}, codecs.write(tensors, words, visit.feedback, summed or {}))


def _watched(chunks: Iterator[bytes], visit: _Visit) -> Iterator[bytes]:
    """The chunks, noting on the visit when one came, that a frame is being read, and its bytes so far."""
    for chunk in chunks:
        visit.moved, visit.reading = time.monotonic(), True
        visit.frame_bytes += len(chunk)
        yield chunk


def _secured(authority: tls.Authority) -> grpc.ServerCredentials:
    own = authority.host()
    return grpc.ssl_server_credentials(
        [(own.key.encode(), own.certificate.encode())], own.authority.encode(), require_client_auth=True
    )


def _read_update(client: int, frame: wire.Frame, wanted: State) -> Update:
    """The update a frame holds, or ValueError with the reason it is not one with the names and shapes of `wanted`."""
    delta, fisher = tree.parted(frame.tensors, "delta", "fisher")
    count = requests.integer(frame, "num_examples")
    if not 1 <= count < 1 << 31:
        raise ValueError(f"num_examples must be at least 1 and below 2^31, got {str(count)[:12]}")
    has_fisher = bool(frame.meta.get("fisher"))
    if without_images(delta).keys() == delta.keys():  # of a client who has seen none
        wanted = without_images(wanted)
    for what, state in (("delta", delta), *((("Fisher", fisher),) if has_fisher else ())):
        if reason := tree.mismatch(state, wanted):
            raise ValueError(f"the {what} {reason}")
        if any((tensor.abs() > ENTRY_LIMIT).any() for tensor in state.values()):
            raise ValueError(f"the {what} has an entry above {ENTRY_LIMIT:g}, which no training makes")
    if any((tensor < 0).any() for tensor in fisher.values()):
        raise ValueError("the Fisher has a negative entry; it is a mean of squares")
    metrics = frame.meta.get("metrics", {})
    if not isinstance(metrics, dict) or len(metrics) > 64 or not all(map(requests.number, metrics.values())):
        raise ValueError(f"metrics must be finite numbers by name, got {ascii(metrics)[:200]}")
    if odd := [name for name in metrics if not METRIC_NAME.fullmatch(name)]:
        raise ValueError(f"a metric's name must be 1 to 40 of a-z 0-9 _, got {odd[0][:40]!a}")
    return Update(client, delta, count, fisher if has_fisher else None, metrics)


def _rows(step: requests.Read, keep_BA: Tensor) -> list[Rows]:
    """The branches of a step as they enter the LLM, with their graphs to the leaves."""
    with torch.set_grad_enabled(bool(step.leaves)):
        return [Rows(embeds.dense(), step.mask_BT, keep_BA) for embeds in step.branches]


def _gradients(rows: list[Rows], leaves: Mapping[str, Tensor], grads: list[Tensor]) -> State:
    """The gradients by the leaves from those by the embeddings, as tensors of an answer."""
    if not leaves:
        return {}
    pairs = [(own.embeds_BTD, grad) for own, grad in zip(rows, grads, strict=True) if own.embeds_BTD.requires_grad]
    outputs, given = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, list(leaves.values()), given, materialize_grads=True)
    return {f"grad/{name}": tensor for name, tensor in zip(leaves, found, strict=True)}
