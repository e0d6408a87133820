"""The client's end of the link: a session, and the LLM as a callable that is differentiable across it.

`RemoteLLM` is called like `LocalLLM`. Its backward is a call: the logits' gradient goes up, those of its inputs come
down. `losses` is one round trip: labels up, losses and gradients down. What of a step travels stands in `reading.py`,
which is its other end. This file knows neither host nor LLM.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedmm.adapters.privacy import EVERYTHING_MAY_LEAVE, Privacy
from fedmm.codecs import Codecs, read, write
from fedmm.edge.base import KEY_BYTES
from fedmm.link import tls, wire
from fedmm.losses import Mutual
from fedmm.types import Embeds, FedmmError, LowRank, Source, Squares, State, TokenTerm

log = logging.getLogger("fedmm.link")
CUTS = 12  # connections cut before the session is open, at most: a host under attack cuts honest ones too
FIRST_PAUSE_SECONDS, CUT_PAUSE_SECONDS, TURN_PAUSE_SECONDS = 0.02, 0.25, 2.0
_SAMPLES = 256  # whose features go up in one frame, which holds a tensor for each
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
    """One client's stream to the host for one round; `call` is a frame up and a frame down.

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

    def call(self, verb: str, tensors: Mapping[str, Tensor] | None = None, **meta: Any) -> wire.Frame:
        """Send one frame, wait for the reply. Raises HostRefused or HostGone.

        A host whose LLM is busy is asked again for `turn_seconds`.
        """
        until = time.monotonic() + self._turn_seconds
        while (reply := self._exchange(verb, tensors or {}, meta)).meta.get("busy") and time.monotonic() < until:
            continue  # it has waited at the host already
        if reply.verb == "error" and "missing" in reply.meta:
            raise FeaturesGone(str(reply.meta["message"]), list(reply.meta["missing"]))
        if reply.verb == "error":
            raise HostRefused(str(reply.meta["message"]))
        if reply.verb != verb:
            raise HostGone(f"the host at {self._address} answered {reply.verb!r} to {verb!r}")
        return reply

    def _exchange(self, verb: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> wire.Frame:
        """One frame up, one frame down."""
        if self._broken is not None:
            raise self._broken
        if self._stream is None:
            self._stream = self._open(verb)
        began = time.perf_counter()
        chunks = wire.encode(wire.Frame(verb, meta, tensors))
        self.sent_bytes[verb] += chunks.size_bytes
        self.sent_frames[verb] += 1
        self._stream.send(chunks)
        reply = self._stream.reply(verb, self._deadline_seconds)  # what comes later would be taken for another's answer
        if isinstance(reply, Exception):
            self._broken = reply
            raise reply
        self.received_bytes[verb] += reply.wire_bytes
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
            if isinstance(reply, wire.Frame):
                return stream
            stream.close()
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
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT):
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
    a private set of adapters acts, a step is dense, so that nothing of that set leaves.
    """

    def __init__(
        self,
        session: Session,
        *,
        encoding: str = "factored",
        cache: str = "run",
        privacy: Privacy = EVERYTHING_MAY_LEAVE,
        codecs: Codecs | None = None,
    ) -> None:
        self._session = session
        self._encoding, self._cache, self._privacy, self._codecs = encoding, cache, privacy, codecs or Codecs()
        self._steps = itertools.count()
        self._told = False
        self._held: set[str] = set()  # keys of features that the host has said it holds

    def __call__(
        self, embeds: Embeds, mask_BT: Bool[Tensor, "B T"], keep_BA: Int[Tensor, "B A"]
    ) -> Float[Tensor, "B A V"]:
        """Logits at `keep_BA`: one round trip, and one more in the backward. Under no_grad the host keeps nothing."""
        step = self._pack([embeds], mask_BT)
        return _Forward.apply(self, step, step.wanted(), keep_BA, *step.inputs.values())

    def losses(
        self,
        branches: Sequence[Embeds],
        mask_BT: Bool[Tensor, "B T"],
        keep_BA: Int[Tensor, "B A"],
        labels_BA: Int[Tensor, "B A"],
        mutual: Mutual | None = None,
    ) -> tuple[Float[Tensor, ""], ...]:
        """The loss of each branch, with its gradients, in one round trip."""
        step = self._pack(branches, mask_BT)
        grads = step.wanted()
        about = {"weights": list(mutual.weights), "temperature": mutual.temperature} if mutual else {}
        found = self._send("loss", step, {"keep": keep_BA, "labels": labels_BA}, grads=grads, **about)
        losses = []
        for loss, names in zip(found["losses"], step.by_branch, strict=True):
            wanted = [name for name in names if name in grads]
            given = [found[f"grad/{name}"] for name in wanted]
            losses.append(_Known.apply(loss, given, *(step.inputs[name] for name in wanted)) if wanted else loss)
        return tuple(losses)

    def squares(
        self,
        embeds: Embeds,
        mask_BT: Bool[Tensor, "B T"],
        keep_BA: Int[Tensor, "B A"],
        labels_BA: Int[Tensor, "B A"],
    ) -> Squares:
        """What a diagonal Fisher needs of the LLM, in one round trip."""
        step, answers = self._pack([embeds], mask_BT), {"keep": keep_BA, "labels": labels_BA}
        if "whole.0" in step.inputs:
            return embeds.squares(self._send("loss", step, answers, grads=["whole.0"], reduction="sum")["grad/whole.0"])
        found = self._send("squares", step, answers)
        terms = tuple((found[f"grad/h.{i}"], found[f"squares.{i}"]) for i in range(len(embeds.terms)))
        return Squares(terms, found.get("grad/image_part"))

    def generate(
        self, embeds: Embeds, mask_BT: Bool[Tensor, "B T"], terms: Sequence[TokenTerm], max_tokens: int
    ) -> Int[Tensor, "B N"]:
        """Greedy answers, made at the host; the text adapters go up so that new tokens pass them too."""
        adapters: dict[str, Tensor] = {}
        for i, term in enumerate(terms):
            adapters |= {f"token_down.{i}": term.down_RD, f"token_up.{i}": term.up_DR}
        scales = [term.scale for term in terms]
        step = self._pack([embeds], mask_BT)
        return self._send("generate", step, adapters, scales=scales, max_tokens=max_tokens)["tokens"]

    def _pack(self, branches: Sequence[Embeds], mask_BT: Tensor) -> _Step:
        source = branches[0].source
        trained = source is not None and source.features_MPE is None
        if trained and self._encoding == "factored" and not self._told:
            log.warning("edge.lora trains in front of the LLM, so image positions change each step: they go whole")
            self._told = True
        private = self._privacy.covers(term.name for embeds in branches for term in embeds.terms)
        if self._encoding == "dense" or private or source is None or (trained and len(branches) > 1):
            return _dense_step(branches, mask_BT)
        return _factored_step(branches, mask_BT, source, named=self._cache == "run")

    def _send(self, verb: str, step: _Step, others: Mapping[str, Tensor], /, **meta: Any) -> State:
        """One round trip; where the host lacks features, they go up first, and again if it has lost them since."""
        tensors = {**step.fixed, **step.inputs, **others}
        for _ in range(_REFILLS):
            self._fill(step)
            try:
                return self._call(verb, tensors, **step.meta, **meta)
            except FeaturesGone as gone:
                self._held -= {step.keys[row].hex() for row in gone.rows}
        log.warning(
            "the host does not hold a batch's features at once: raise link.cache_memory_mb or link.cache_disk_mb"
        )
        del tensors["keys"]
        inline = {f"features.{i}": features_IPE for i, features_IPE in enumerate(step.features)}
        return self._call(verb, tensors | inline, **step.meta, **meta)

    def _backward(self, grad_BAV: Tensor, number: int) -> State:
        return self._call("backward", {"grad": grad_BAV}, step=number)

    def _call(self, verb: str, tensors: Mapping[str, Tensor], **meta: Any) -> State:
        words = {"codecs": list(dataclasses.astuple(self._codecs))} if self._codecs != Codecs() else {}
        return read(self._session.call(verb, write(tensors, self._codecs), **meta, **words).tensors, self._codecs)

    def _fill(self, step: _Step) -> None:
        """Leave with the host what it does not hold of this step's features; asked once a sample and session."""
        new = [row for row, key in enumerate(step.keys) if key.hex() not in self._held]
        if not new:
            return
        keys_BK = _keys_of([step.keys[row] for row in new])
        lacks_B = self._call("known", {"keys": keys_BK})["missing"]
        missing = [row for row, lacks in zip(new, lacks_B.tolist(), strict=True) if lacks]
        for start in range(0, len(missing), _SAMPLES):
            few = missing[start : start + _SAMPLES]
            features = {f"features.{i}": step.features[row] for i, row in enumerate(few)}
            self._call("features", features | {"keys": _keys_of([step.keys[row] for row in few])})
        self._held |= {step.keys[row].hex() for row in new}


@dataclass(frozen=True)
class _Step:
    """A step on its way up: tensors without gradients, those with (`inputs`), which of these each branch uses."""

    fixed: dict[str, Tensor]
    inputs: dict[str, Tensor]
    by_branch: list[list[str]]
    meta: dict[str, Any]
    keys: tuple[bytes, ...] = ()
    features: tuple[Tensor, ...] = ()  # by sample with images, as the keys

    def wanted(self) -> list[str]:
        """The inputs whose gradients are wanted: none under no_grad, when the host need keep nothing."""
        return [name for name, tensor in self.inputs.items() if tensor.requires_grad and torch.is_grad_enabled()]


def _dense_step(branches: Sequence[Embeds], mask_BT: Tensor) -> _Step:
    inputs = {f"whole.{i}": embeds.dense() for i, embeds in enumerate(branches)}
    return _Step({"mask": mask_BT}, inputs, [[name] for name in inputs], {"branches": len(branches)})


def _factored_step(branches: Sequence[Embeds], mask_BT: Tensor, source: Source, *, named: bool) -> _Step:
    fixed = {"mask": mask_BT, "tokens": source.tokens_BT.to(torch.int32), "image": source.image_BT}
    first: dict[str, Tensor] = {}
    keys: tuple[bytes, ...] = ()
    if source.features_MPE is None:
        first["image_part"] = next(part.x_ND for part in branches[0].parts if part.kind == "image")
    elif named and source.keys is not None:
        keys = source.keys
        fixed["keys"] = _keys_of(keys)
    else:
        fixed |= {f"features.{i}": features_IPE for i, features_IPE in enumerate(source.by_sample())}
    inputs, by_branch, terms = dict(first), [], [term for embeds in branches for term in embeds.terms]
    numbers = itertools.count()
    for embeds in branches:
        own = {
            f"{name}.{i}": t for term, i in zip(embeds.terms, numbers, strict=False) for name, t in _of(term).items()
        }
        inputs |= own
        by_branch.append([*first, *own])
    meta = {
        "terms": [[term.part.kind, term.scale, term.name] for term in terms],
        "branches": [len(embeds.terms) for embeds in branches],
    }
    return _Step(fixed, inputs, by_branch, meta, keys, source.by_sample() if keys else ())


def _of(term: LowRank) -> dict[str, Tensor]:
    return {"h": term.h_NR, "up": term.up_DR}


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
        ctx: Any, llm: RemoteLLM, step: _Step, wanted: list[str], keep_BA: Tensor, *inputs: Tensor
    ) -> Tensor:
        ctx.llm, ctx.number = llm, next(llm._steps)
        ctx.names = [name if name in wanted else None for name in step.inputs]
        return llm._send("forward", step, {"keep": keep_BA}, step=ctx.number, grads=wanted)["logits"]

    @staticmethod
    def backward(ctx: Any, grad_BAV: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        found = ctx.llm._backward(grad_BAV, ctx.number)
        return None, None, None, None, *(found[f"grad/{name}"] if name else None for name in ctx.names)
