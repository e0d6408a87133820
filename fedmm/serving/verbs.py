"""What a host does for a client that is let in: each verb a method that takes a frame and answers it.

A mistake in a frame is a ValueError with its reason; nothing was done then, and the session goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedmm.codecs import Feedback
from fedmm.link import messages, wire
from fedmm.llm.local import LocalLLM
from fedmm.losses import answer_cross_entropy, branch_losses
from fedmm.serving import requests
from fedmm.serving.engine import Engine
from fedmm.serving.features import Features
from fedmm.serving.footprint import Footprint, Shape
from fedmm.serving.limits import Limits
from fedmm.serving.passes import Begun, Rows
from fedmm.serving.requests import Reader
from fedmm.serving.round import Round, Traffic
from fedmm.types import State, Update


@dataclass(frozen=True)
class Pending:
    """A forward that waits for its backward, and what it takes beside its graph."""

    step: requests.Read
    begun: Begun
    size_bytes: int


@dataclass(eq=False)
class Caller:
    """A client in one session of one round, and the forwards it left here until their backward comes."""

    client: int
    round: int
    pending: dict[int, Pending] = field(default_factory=dict)
    pending_bytes: int = 0
    feedback: Feedback = field(default_factory=Feedback)

    @property
    def size_bytes(self) -> int:
        """What of it stays here from one frame to the next."""
        return self.pending_bytes + self.feedback.size_bytes


class Verbs:
    """The verbs of one host, by name."""

    def __init__(
        self,
        llm: LocalLLM,
        round: Round,
        engine: Engine,
        footprint: Footprint,
        *,
        card: Mapping[str, Any],
        edge: State,
        features: Features,
        limits: Limits,
    ) -> None:
        self._llm, self._round, self._engine, self._card, self._features = llm, round, engine, dict(card), features
        # encoded once: it may be large, and many ask for it
        self._edge = wire.encode(messages.Tensors(edge).to_frame(messages.EdgeRequest.verb))
        self._read = Reader.of(llm, features, footprint, limits)
        self._pending_limit = limits.pending
        self.known: Mapping[str, Callable[[Caller, wire.Frame, Traffic], wire.Frame | wire.Chunks]] = {
            messages.CardRequest.verb: self._send_card,
            messages.EdgeRequest.verb: self._send_edge,
            messages.StateRequest.verb: self._send_state,
            messages.UpdateRequest.verb: self._take_update,
            messages.KnownRequest.verb: self._known,
            messages.FeaturesRequest.verb: self._keep_features,
            messages.ForwardRequest.verb: self._forward,
            messages.BackwardRequest.verb: self._backward,
            messages.LossRequest.verb: self._loss,
            messages.SquaresRequest.verb: self._squares,
            messages.GenerateRequest.verb: self._generate,
            messages.EchoRequest.verb: self._echo,
        }

    def answer(self, caller: Caller, frame: wire.Frame, traffic: Traffic) -> wire.Frame | wire.Chunks:
        """Do what a frame asks. Raises ValueError with the reason where it is wrong, Busy where no worker came free."""
        if over := self._round.over(caller.round):
            raise ValueError(over)
        verb = self.known.get(frame.verb)
        if verb is None:
            raise ValueError(f"unknown verb {frame.verb[:32]!r}; this host knows {', '.join(self.known)}")
        return verb(caller, frame, traffic)

    # ---- verbs: once a run, once a round ---------------------------------------------------------------------------

    def _send_card(self, caller: Caller, frame: wire.Frame, traffic: Traffic) -> wire.Frame:
        return messages.Card(self._card).to_frame(frame.verb)

    def _send_edge(self, caller: Caller, frame: wire.Frame, traffic: Traffic) -> wire.Chunks:
        return self._edge

    def _send_state(self, caller: Caller, frame: wire.Frame, traffic: Traffic) -> wire.Frame:
        return messages.Tensors(self._round.state(caller.client)).to_frame(frame.verb)

    def _take_update(self, caller: Caller, frame: wire.Frame, traffic: Traffic) -> wire.Frame:
        def read() -> Update:
            return messages.UpdateRequest.from_frame(frame).update(caller.client)

        self._round.take(caller.round, caller.client, read, traffic)
        return messages.Done().to_frame(frame.verb)

    # ---- verbs: once a sample --------------------------------------------------------------------------------------

    def _known(self, caller: Caller, frame: wire.Frame, traffic: Traffic) -> wire.Frame:
        request = messages.KnownRequest.from_frame(frame)
        missing_S = torch.zeros(len(request.keys_SK), dtype=torch.bool)
        missing_S[self._features.missing(caller.client, request.keys_SK)] = True
        return messages.Missing(missing_S).to_frame(frame.verb)

    def _keep_features(self, caller: Caller, frame: wire.Frame, traffic: Traffic) -> wire.Frame:
        request = messages.FeaturesRequest.from_frame(frame)
        self._features.keep(caller.client, request.keys_SK, request.features)
        return messages.Done().to_frame(frame.verb)

    # ---- verbs: every step -----------------------------------------------------------------------------------------

    def _echo(self, caller: Caller, frame: wire.Frame, traffic: Traffic) -> wire.Frame:
        return messages.Tensors(messages.EchoRequest.from_frame(frame).tensors).to_frame(frame.verb)

    def _forward(self, caller: Caller, frame: wire.Frame, traffic: Traffic) -> wire.Frame:
        request = self._read.request(messages.ForwardRequest, frame)
        step, number = self._read.step(request.step, caller.client, request.grads), request.number
        keep_BA = self._read.keep(request.keep_BA, step.mask_BT.shape[1])
        _check_one_branch(step, frame)
        if number in caller.pending:
            raise ValueError(f"step {number} already waits for its backward; give each forward a number of its own")
        if step.leaves and len(caller.pending) >= self._pending_limit:
            raise ValueError(
                f"{len(caller.pending)} steps wait for their backward, at most {self._pending_limit}; "
                "call backward, use no_grad, or raise link.pending"
            )
        (rows,) = _rows(step, keep_BA)
        if step.leaves:
            begun = self._engine.begin(rows, caller.client)
            caller.pending[number] = pending = Pending(step, begun, step.size_bytes + begun.size_bytes)
            caller.pending_bytes += pending.size_bytes
            logits_BAV, seconds = begun.logits_BAV, begun.seconds
        else:
            passed = self._engine.run([rows], client=caller.client)
            logits_BAV, seconds = passed.logits[0], passed.seconds
        traffic.llm_seconds += seconds
        traffic.llm_samples += len(keep_BA)
        return messages.Logits(logits_BAV).to_frame(frame.verb, request.codecs)

    def _backward(self, caller: Caller, frame: wire.Frame, traffic: Traffic) -> wire.Frame:
        number = messages.NUMBER.read(frame, {})
        if number not in caller.pending:
            raise ValueError(f"no forward of step {number} waits for its backward")
        step, begun = caller.pending[number].step, caller.pending[number].begun
        sizes = dict(zip("BAV", begun.logits_BAV.shape, strict=True))
        request = messages.BackwardRequest.from_frame(frame, **sizes)
        grad_BTD, seconds = self._engine.finish(begun, request.grad_BAV.to(begun.logits_BAV))
        caller.pending_bytes -= caller.pending.pop(number).size_bytes  # only now: one that found no worker comes again
        traffic.llm_seconds += seconds
        grads = _gradients([begun.rows], step.leaves, [grad_BTD])
        return messages.Gradients(grads).to_frame(frame.verb, request.codecs, caller.feedback, step.summed)

    def _loss(self, caller: Caller, frame: wire.Frame, traffic: Traffic) -> wire.Frame:
        request = self._read.request(messages.LossRequest, frame)
        step = self._read.step(request.step, caller.client, request.grads)
        keep_BA = self._read.keep(request.keep_BA, step.mask_BT.shape[1])
        labels_BA, mutual = self._read.labels(request.labels_BA), requests.mutual_of(request, len(step.branches))

        def values(logits: list[Tensor]) -> Tensor:
            return torch.stack(branch_losses(logits, labels_BA, mutual, request.reduction))

        rows = _rows(step, keep_BA)
        pairs = messages.pairs_of(len(keep_BA), len(rows)) if mutual else 0
        passed = self._engine.run(rows, values, grad=bool(step.leaves), pairs=pairs, client=caller.client)
        traffic.llm_seconds += passed.seconds
        traffic.llm_samples += len(keep_BA) * len(rows)
        losses = messages.Losses(passed.values, _gradients(rows, step.leaves, passed.grads))
        return losses.to_frame(frame.verb, request.codecs, caller.feedback, step.summed)

    def _squares(self, caller: Caller, frame: wire.Frame, traffic: Traffic) -> wire.Frame:
        request = self._read.request(messages.SquaresRequest, frame)
        step = self._read.step(request.step, caller.client)
        keep_BA = self._read.keep(request.keep_BA, step.mask_BT.shape[1])
        labels_BA = self._read.labels(request.labels_BA)
        _check_one_branch(step, frame)

        def values(logits: list[Tensor]) -> Tensor:
            return answer_cross_entropy(logits[0], labels_BA, reduction="sum")

        passed = self._engine.run(_rows(step, keep_BA), values, grad=True, client=caller.client)
        traffic.llm_seconds += passed.seconds
        traffic.llm_samples += len(keep_BA)
        squares = step.branches[0].squares(passed.grads[0])
        h_grads, by_up = zip(*squares.terms, strict=True) if squares.terms else ((), ())
        return messages.StepSquares(h_grads, by_up, squares.image_ND).to_frame(frame.verb, request.codecs)

    def _generate(self, caller: Caller, frame: wire.Frame, traffic: Traffic) -> wire.Frame:
        request = self._read.request(messages.GenerateRequest, frame)
        step = self._read.step(request.step, caller.client)
        _check_one_branch(step, frame)
        B, T = step.mask_BT.shape
        tokens_BN, seconds = self._engine.alone(
            lambda: self._llm.generate(step.branches[0], step.mask_BT, request.terms, request.max_tokens),
            Shape(B, T, tokens=request.max_tokens),
            caller.client,
        )
        traffic.llm_seconds += seconds
        traffic.llm_samples += len(tokens_BN)
        return messages.Tokens(tokens_BN).to_frame(frame.verb)


def _check_one_branch(step: requests.Read, frame: wire.Frame) -> None:
    if len(step.branches) != 1:
        raise ValueError(f"{frame.verb} takes one branch, got {len(step.branches)}")


def _rows(step: requests.Read, keep_BA: Tensor) -> list[Rows]:
    """The branches of a step as they enter the LLM, with their graphs to the leaves."""
    with torch.set_grad_enabled(bool(step.leaves)):
        return [Rows(embeds.dense(), step.mask_BT, keep_BA) for embeds in step.branches]


def _gradients(rows: list[Rows], leaves: Mapping[str, Tensor], grads: list[Tensor]) -> State:
    """The gradients by the leaves from those by the embeddings."""
    if not leaves:
        return {}
    pairs = [(own.embeds_BTD, grad) for own, grad in zip(rows, grads, strict=True) if own.embeds_BTD.requires_grad]
    outputs, given = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, list(leaves.values()), given, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))
