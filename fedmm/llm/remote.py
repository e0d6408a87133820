"""The client's end of the link: a session, and the LLM as a callable that is differentiable across it.

`RemoteLLM` is called like `LocalLLM`. Its backward is a call: the logits' gradient goes up, the embeddings' comes
down. `answer_loss` is one round trip: labels up, loss and gradient down. This file knows neither host nor LLM.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grpc
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedmm.llm import tls, wire
from fedmm.types import Embeds, FedmmError, TokenTerm


class HostGone(FedmmError):
    """The host did not answer: it ended, the network is cut, or it is too slow for the deadline."""


class HostRefused(FedmmError):
    """The host answered that it will not do this, and why. The session lives on."""


class Session:
    """One client's stream to the host for one round; `call` is a frame up and a frame down.

    Every wait ends within `deadline_seconds` in an answer, HostRefused or HostGone. Not for use from several threads.
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
        frame_limit_bytes: int = 1 << 30,
    ) -> None:
        self.client, self.round = client, round
        self.sent_bytes: dict[str, int] = defaultdict(int)
        self.received_bytes: dict[str, int] = defaultdict(int)
        self.wait_seconds = 0.0
        self._address = address
        self._broken: Exception | None = None  # a session that failed once stays failed
        self._deadline_seconds = deadline_seconds
        self._outbox: queue.SimpleQueue[wire.Chunks | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[wire.Frame | Exception] = queue.SimpleQueue()
        self._channel = _dial(address, identity)
        stream = self._channel.stream_stream(wire.METHOD)
        metadata = wire.credentials(client, round, token)
        self._stream = stream(itertools.chain.from_iterable(iter(self._outbox.get, None)), metadata=metadata)
        self._reader = threading.Thread(target=self._read, args=(frame_limit_bytes,), daemon=True)
        self._reader.start()

    def call(self, verb: str, tensors: Mapping[str, Tensor] | None = None, **meta: Any) -> wire.Frame:
        """Send one frame, wait for the reply. Raises HostRefused or HostGone."""
        if self._broken is not None:
            raise self._broken
        began = time.perf_counter()
        chunks = wire.encode(wire.Frame(verb, meta, tensors or {}))
        self.sent_bytes[verb] += chunks.size_bytes
        self._outbox.put(chunks)
        try:
            reply = self._inbox.get(timeout=self._deadline_seconds)
        except queue.Empty:
            reply = HostGone(
                f"the host at {self._address} did not answer {verb!r} within {self._deadline_seconds:g} s; "
                "see the server's log, or raise link.deadline_seconds"
            )  # whatever comes after it would be taken for the answer to another call
        if isinstance(reply, Exception):
            self._broken = reply
            raise reply
        self.received_bytes[verb] += reply.wire_bytes
        self.wait_seconds += time.perf_counter() - began
        if reply.verb == "error":
            raise HostRefused(str(reply.meta["message"]))
        if reply.verb != verb:
            raise HostGone(f"the host at {self._address} answered {reply.verb!r} to {verb!r}")
        return reply

    def close(self) -> None:
        """End the stream and the channel; safe to repeat."""
        self._outbox.put(None)
        self._stream.cancel()
        self._channel.close()
        self._reader.join(timeout=5)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, limit_bytes: int) -> None:
        chunks: Iterator[bytes] = iter(self._stream)
        try:
            while (frame := wire.decode(chunks, limit_bytes)) is not None:
                self._inbox.put(frame)
            self._inbox.put(HostGone(f"the host at {self._address} closed the session"))
        except grpc.RpcError as error:
            self._inbox.put(self._gone(error))
        except wire.WireError as error:
            self._inbox.put(HostGone(f"the host at {self._address} sent no valid frame: {error}"))

    def _gone(self, error: grpc.RpcError) -> FedmmError:
        code, details = self._stream.code(), self._stream.details()
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT):
            return HostRefused(str(details))
        return HostGone(
            f"the host at {self._address} is gone ({code.name.lower()}: {details}); "
            "is the server running, and is link.address one that clients can reach?"
        )


def _dial(address: str, identity: tls.Identity | None) -> grpc.Channel:
    if identity is None:
        return grpc.insecure_channel(address, options=wire.GRPC_OPTIONS)
    shown = grpc.ssl_channel_credentials(
        identity.authority.encode(), identity.key.encode(), identity.certificate.encode()
    )
    named = ("grpc.ssl_target_name_override", tls.HOST_NAME)
    return grpc.secure_channel(address, shown, options=[*wire.GRPC_OPTIONS, named])


class RemoteLLM:
    """The frozen LLM across a session; the same callable as LocalLLM, and the same bits in fp32 on CPU."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._steps = itertools.count()

    def __call__(
        self, embeds: Embeds, mask_BT: Bool[Tensor, "B T"], keep_BA: Int[Tensor, "B A"]
    ) -> Float[Tensor, "B A V"]:
        """Logits at `keep_BA`: one round trip, and one more in the backward. Under no_grad the host keeps nothing."""
        return _Forward.apply(embeds.dense(), mask_BT, keep_BA, self._session, next(self._steps))

    def answer_loss(
        self,
        embeds: Embeds,
        mask_BT: Bool[Tensor, "B T"],
        keep_BA: Int[Tensor, "B A"],
        labels_BA: Int[Tensor, "B A"],
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy over the answer tokens, and its gradient, in one round trip."""
        return _AnswerLoss.apply(embeds.dense(), mask_BT, keep_BA, labels_BA, self._session)

    def generate(
        self, embeds: Embeds, mask_BT: Bool[Tensor, "B T"], terms: Sequence[TokenTerm], max_tokens: int
    ) -> Int[Tensor, "B N"]:
        """Greedy answers, made at the host; the text adapters go up so that new tokens pass them too."""
        tensors = {"embeds": embeds.dense(), "mask": mask_BT}
        for i, term in enumerate(terms):
            tensors |= {f"down.{i}": term.down_RD, f"up.{i}": term.up_DR}
        scales = [term.scale for term in terms]
        return self._session.call("generate", tensors, scales=scales, max_tokens=max_tokens).tensors["tokens"]


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, embeds_BTD: Tensor, mask_BT: Tensor, keep_BA: Tensor, session: Session, step: int
    ) -> Tensor:
        ctx.session, ctx.step = session, step
        tensors = {"embeds": embeds_BTD, "mask": mask_BT, "keep": keep_BA}
        return session.call("forward", tensors, step=step, grad=ctx.needs_input_grad[0]).tensors["logits"]

    @staticmethod
    def backward(ctx: Any, grad_BAV: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        reply = ctx.session.call("backward", {"grad": grad_BAV}, step=ctx.step)
        return reply.tensors["grad"], None, None, None, None


class _AnswerLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, embeds_BTD: Tensor, mask_BT: Tensor, keep_BA: Tensor, labels_BA: Tensor, session: Session
    ) -> Tensor:
        tensors = {"embeds": embeds_BTD, "mask": mask_BT, "keep": keep_BA, "labels": labels_BA}
        reply = session.call("loss", tensors, grad=ctx.needs_input_grad[0])
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(reply.tensors["grad"])
        return reply.tensors["loss"]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad_BTD,) = ctx.saved_tensors
        return grad * grad_BTD, None, None, None, None
