"""The client's end of the link: a session, and the LLM as a callable that is differentiable across it.

`RemoteLLM` is called like `LocalLLM`. Its backward is a call: the logits' gradient goes up, those of its inputs come
down. `losses` is one round trip: labels up, losses and gradients down. This file knows neither host nor LLM.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import grpc
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedmm.codecs import Codecs
from fedmm.edge.base import KEY_BYTES
from fedmm.link import messages, tls, wire
from fedmm.link.steps import DenseStep, FactoredStep, Step, Term
from fedmm.losses import Mutual
from fedmm.types import Embeds, FedmmError, Source, Squares, State, TokenTerm

log = logging.getLogger("fedmm.link")
CUTS = 12  # connections cut before the session is open, at most: a host under attack cuts honest ones too
FIRST_PAUSE_SECONDS, CUT_PAUSE_SECONDS, TURN_PAUSE_SECONDS = 0.02, 0.25, 2.0
_SAMPLES = 256  # whose features go up in one frame, which holds a tensor for each
_REFUSALS = (
    grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION,
)  # fmt: skip
_R = TypeVar("_R", bound=messages.Reply)
_REFILLS = 2  # times that lost features are left there again, before they go up with the step


class HostGone(FedmmError):
    """The host did not answer: it ended, the network is cut, or it is too slow for the deadline."""


class HostFull(HostGone):
    """The host serves as many clients as link.sessions allows, and none of them has left."""


class _Cut(HostGone):
    """The connection failed."""


class HostRefused(FedmmError):
    """The host answered that it will not do this, and why. The session lives on."""


class FeaturesGone(HostRefused):
    """The host has lost features that it held; `rows` are the samples whose. They can be sent again."""

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
        self._channel = _dial(address, identity)
        sent = itertools.chain.from_iterable(iter(self._outbox.get, None))
        self._call = self._channel.stream_stream(wire.METHOD)(sent, metadata=credentials)
        self._reader = threading.Thread(target=self._read, args=(frame_limit_bytes,), daemon=True)
        self._reader.start()

    def send(self, chunks: wire.Chunks) -> None:
        self._outbox.put(chunks)

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
        self._channel.close()
        self._reader.join(timeout=5)

    def _read(self, limit_bytes: int) -> None:
        chunks: Iterator[bytes] = iter(self._call)
        try:
            while (frame := wire.decode(chunks, limit_bytes)) is not None:
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


class RemoteLLM:
    """The frozen LLM across a session; the same callable as LocalLLM, and the same bits in fp32 on CPU.

    With `encoding` factored a step carries names of its samples' features, h and B of each low-rank term, and brings
    their gradients back; `dense` carries embeddings and theirs. With `cache` none features go up with every step. Where
    a set of adapters named in `private` acts, a step is dense, so that nothing of that set leaves.
    """

    def __init__(
        self,
        session: Session,
        *,
        encoding: str = "factored",
        cache: str = "run",
        private: Sequence[str] = (),
        codecs: Codecs | None = None,
    ) -> None:
        self._session = session
        self._encoding, self._cache, self._private, self._codecs = encoding, cache, private, codecs or Codecs()
        self._steps = itertools.count()
        self._warned = False
        self._held: set[str] = set()  # keys of features that the host has said it holds

    def __call__(
        self, embeds: Embeds, mask_BT: Bool[Tensor, "B T"], keep_BA: Int[Tensor, "B A"]
    ) -> Float[Tensor, "B A V"]:
        """Logits at `keep_BA`: one round trip, and one more in the backward. Under no_grad the host keeps nothing."""
        out = self._pack([embeds], mask_BT)
        return _Forward.apply(self, out, out.wanted(), keep_BA, *out.inputs.values())

    def losses(
        self,
        branches: Sequence[Embeds],
        mask_BT: Bool[Tensor, "B T"],
        keep_BA: Int[Tensor, "B A"],
        labels_BA: Int[Tensor, "B A"],
        mutual: Mutual | None = None,
    ) -> tuple[Float[Tensor, ""], ...]:
        """The loss of each branch, with its gradients, in one round trip."""
        out = self._pack(branches, mask_BT)
        grads = out.wanted()
        learn = (mutual.weights, mutual.temperature) if mutual else ()
        reply = self._send(
            out, lambda step: messages.LossRequest(step, keep_BA, labels_BA, grads, *learn, codecs=self._codecs)
        )
        losses = []
        for loss, names in zip(reply.losses, out.step.by_branch(), strict=True):
            wanted = [name for name in names if name in grads]
            given = [reply.grads[name] for name in wanted]
            losses.append(_Known.apply(loss, given, *(out.inputs[name] for name in wanted)) if wanted else loss)
        return tuple(losses)

    def squares(
        self,
        embeds: Embeds,
        mask_BT: Bool[Tensor, "B T"],
        keep_BA: Int[Tensor, "B A"],
        labels_BA: Int[Tensor, "B A"],
    ) -> Squares:
        """What a diagonal Fisher needs of the LLM, in one round trip."""
        out, codecs = self._pack([embeds], mask_BT), self._codecs
        if isinstance(out.step, DenseStep):
            (whole,) = out.inputs
            reply = self._send(
                out,
                lambda step: messages.LossRequest(step, keep_BA, labels_BA, [whole], reduction="sum", codecs=codecs),
            )
            return embeds.squares(reply.grads[whole])
        found = self._send(out, lambda step: messages.SquaresRequest(step, keep_BA, labels_BA, codecs=codecs))
        return Squares(tuple(zip(found.h_grads, found.squares, strict=True)), found.image_ND)

    def generate(
        self, embeds: Embeds, mask_BT: Bool[Tensor, "B T"], terms: Sequence[TokenTerm], max_tokens: int
    ) -> Int[Tensor, "B N"]:
        """Greedy answers, made at the host; the text adapters go up so that new tokens pass them too."""
        out = self._pack([embeds], mask_BT)
        reply = self._send(out, lambda step: messages.GenerateRequest(step, terms, max_tokens, codecs=self._codecs))
        return reply.tokens_BN

    def _pack(self, branches: Sequence[Embeds], mask_BT: Tensor) -> _Outgoing:
        source = branches[0].source
        trained = source is not None and source.image_trains
        if trained and self._encoding == "factored" and not self._warned:
            log.warning("edge.lora trains in front of the LLM, so image positions change each step: they go whole")
            self._warned = True
        private = any(term.name.split(".")[0] in self._private for embeds in branches for term in embeds.terms)
        if self._encoding == "dense" or private or source is None or (trained and len(branches) > 1):
            return _outgoing(DenseStep(mask_BT, tuple(embeds.dense() for embeds in branches)))
        return _factored(branches, mask_BT, source, named=self._cache == "run")

    def _send(self, out: _Outgoing, make: Callable[[Step], messages.Asks[_R]]) -> _R:
        """One round trip of the request that is made of a step; where the host lacks features, they go up first, and
        again if it has lost them since."""
        for _ in range(_REFILLS):
            self._fill(out)
            try:
                return self._session.ask(make(out.step))
            except FeaturesGone as gone:
                self._held -= {out.keys[row].hex() for row in gone.rows}
        log.warning(
            "the host does not hold a batch's features at once: raise link.cache_memory_mb or link.cache_disk_mb"
        )
        assert isinstance(out.step, FactoredStep), "a dense step has no features to miss"
        return self._session.ask(make(replace(out.step, keys_SK=None, features=out.features)))

    def _backward(self, grad_BAV: Tensor, number: int) -> State:
        return self._session.ask(messages.BackwardRequest(number, grad_BAV, codecs=self._codecs)).grads

    def _fill(self, out: _Outgoing) -> None:
        """Leave with the host what it does not hold of this step's features; asked once a sample and session."""
        new = [row for row, key in enumerate(out.keys) if key.hex() not in self._held]
        if not new:
            return
        keys_SK = _keys_of([out.keys[row] for row in new])
        lacks_S = self._session.ask(messages.KnownRequest(keys_SK, codecs=self._codecs)).missing_S
        missing = [row for row, lacks in zip(new, lacks_S.tolist(), strict=True) if lacks]
        for start in range(0, len(missing), _SAMPLES):
            few = missing[start : start + _SAMPLES]
            features, keys_SK = tuple(out.features[row] for row in few), _keys_of([out.keys[row] for row in few])
            self._session.ask(messages.FeaturesRequest(features, keys_SK, codecs=self._codecs))
        self._held |= {out.keys[row].hex() for row in new}


@dataclass(frozen=True)
class _Outgoing:
    """A step on its way up, with its inputs; and what its keys name, by sample with images."""

    step: Step
    inputs: Mapping[str, Tensor]
    keys: tuple[bytes, ...] = ()
    features: tuple[Tensor, ...] = ()

    def wanted(self) -> list[str]:
        """The inputs whose gradients are wanted: none under no_grad, when the host need keep nothing."""
        return [name for name, tensor in self.inputs.items() if tensor.requires_grad and torch.is_grad_enabled()]


def _outgoing(step: Step, keys: tuple[bytes, ...] = (), features: tuple[Tensor, ...] = ()) -> _Outgoing:
    return _Outgoing(step, step.inputs(), keys, features)


def _factored(branches: Sequence[Embeds], mask_BT: Tensor, source: Source, *, named: bool) -> _Outgoing:
    terms = [[Term(t.part.kind, t.scale, t.name, t.h_NR, t.up_DR) for t in embeds.terms] for embeds in branches]
    step = FactoredStep(mask_BT, source.tokens_BT.to(torch.int32), source.image_BT, branches=tuple(map(tuple, terms)))
    if source.image_trains:
        image_ND = next(part.x_ND for part in branches[0].parts if part.kind == "image")
        return _outgoing(replace(step, image_ND=image_ND))
    if named and source.keys is not None:
        return _outgoing(replace(step, keys_SK=_keys_of(source.keys)), source.keys, source.by_sample())
    return _outgoing(replace(step, features=source.by_sample()))


def _keys_of(keys: Sequence[bytes]) -> Tensor:
    return torch.tensor([*b"".join(keys)], dtype=torch.uint8).view(len(keys), KEY_BYTES)


class _Known(torch.autograd.Function):
    """A loss whose gradients came with it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor], *inputs: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*grads)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, *(grad * given for given in ctx.saved_tensors)


class _Forward(torch.autograd.Function):
    """Logits whose backward is a call."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, llm: RemoteLLM, out: _Outgoing, wanted: list[str], keep_BA: Tensor, *inputs: Tensor
    ) -> Tensor:
        ctx.llm, ctx.number = llm, next(llm._steps)
        ctx.names = [name if name in wanted else None for name in out.inputs]
        return llm._send(
            out, lambda step: messages.ForwardRequest(step, keep_BA, ctx.number, wanted, codecs=llm._codecs)
        ).logits_BAV

    @staticmethod
    def backward(ctx: Any, grad_BAV: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = ctx.llm._backward(grad_BAV, ctx.number)
        return None, None, None, None, *(grads[name] if name else None for name in ctx.names)
