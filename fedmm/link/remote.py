"""The LLM across a session, as a callable that is differentiable.

`RemoteLLM` is called like `LocalLLM`. Its backward is a call: the logits' gradient goes up, those of its inputs come
down. `losses` is one round trip: labels up, losses and gradients down. Its other end is `serving.requests`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedmm.adapters.privacy import EVERYTHING_MAY_LEAVE, Privacy
from fedmm.codecs import PLAIN, Codecs
from fedmm.edge.base import KEY_BYTES
from fedmm.link import messages
from fedmm.link.session import FeaturesGone, Session
from fedmm.link.steps import DenseStep, FactoredStep, Step, Term
from fedmm.losses import Mutual
from fedmm.types import Embeds, Source, Squares, State, TokenTerm

log = logging.getLogger("fedmm.link")
_SAMPLES = 256  # whose features go up in one frame, which holds a tensor for each
_REFILLS = 2  # times that lost features are left there again, before they go up with the step
_R = TypeVar("_R", bound=messages.Reply)


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
        codecs: Codecs = PLAIN,
    ) -> None:
        self._session = session
        self._encoding, self._cache, self._privacy, self._codecs = encoding, cache, privacy, codecs
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
        private = self._privacy.covers(term.name for embeds in branches for term in embeds.terms)
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
    terms = [[Term(t.segment.kind, t.scale, t.name, t.h_NR, t.up_DR) for t in embeds.terms] for embeds in branches]
    step = FactoredStep(mask_BT, source.tokens_BT.to(torch.int32), source.image_BT, branches=tuple(map(tuple, terms)))
    if source.image_trains:
        image_ND = next(segment.x_ND for segment in branches[0].segments if segment.kind == "image")
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
