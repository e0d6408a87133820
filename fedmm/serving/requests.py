"""What a client sent, checked against the LLM before it touches it; and the embeddings that a step stands for.

The host has the connector and the token table, which a factored step lacks. So it forms the same sums of the same
numbers in the same order as the client would. Everything wrong is a ValueError that says what came and what is wanted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from fedmm.edge import base
from fedmm.edge.folding import embed_of
from fedmm.link.fields import number
from fedmm.link.messages import KEEP, GenerateRequest, LossRequest, StepRequest, StepSize
from fedmm.link.steps import DenseStep, FactoredStep, Step
from fedmm.link.wire import Frame
from fedmm.llm.local import LocalLLM
from fedmm.losses import Mutual
from fedmm.serving.features import Features
from fedmm.serving.footprint import Footprint, Shape
from fedmm.serving.limits import Limits
from fedmm.types import IGNORE, Embeds, LowRank, Segment, Source

_R = TypeVar("_R", bound=StepRequest)


@dataclass(frozen=True)
class Read:
    """A step as it came: branches of embeddings over one mask, and the tensors whose gradient is asked for."""

    branches: list[Embeds]
    mask_BT: Tensor
    leaves: dict[str, Tensor]
    summed: Mapping[str, str]  # those leaves whose gradients an optimiser sums over steps, by adapter

    @property
    def size_bytes(self) -> int:
        """What it takes: each storage once, as branches share theirs."""
        tensors = [
            tensor
            for embeds in self.branches
            for segment in embeds.segments
            for tensor in (segment.x_ND, segment.positions_N)
        ]
        tensors += [tensor for embeds in self.branches for term in embeds.terms for tensor in (term.h_NR, term.up_DR)]
        storages = (tensor.untyped_storage() for tensor in tensors)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@dataclass(frozen=True)
class Reader:
    """Reads steps for one LLM: its width, positions and vocabulary, and the features that clients left at the host.

    `footprint` refuses a step by its size, before anything is made for it.
    """

    width: int
    positions: int
    vocabulary: int
    device: torch.device
    features: Features
    footprint: Footprint
    limit_bytes: int  # of what a step makes here: what its dense frame could have been
    answer_tokens: int

    @staticmethod
    def of(llm: LocalLLM, features: Features, footprint: Footprint, limits: Limits) -> Reader:
        sizes = llm.width, llm.positions, llm.vocabulary, llm.device
        return Reader(*sizes, features, footprint, limits.frame_limit_bytes, limits.answer_tokens)

    def request(self, kind: type[_R], frame: Frame) -> _R:
        """The request in a frame, where its step is no larger than it may be."""
        size = StepSize.of(frame)
        if kind is GenerateRequest and not 1 <= size.tokens <= self.answer_tokens:
            raise ValueError(
                f"max_tokens must be from 1 to evaluate.max_tokens={self.answer_tokens}, got {size.tokens}"
            )
        B, T = size.mask_BT.shape
        if self.positions < T + size.tokens:
            generated = f" and {size.tokens} tokens to generate" if size.tokens else ""
            wanted = "shorten the questions" + (" or lower evaluate.max_tokens" if size.tokens else "")
            raise ValueError(f"{T} positions{generated}, the LLM has {self.positions}; {wanted}")
        if not (B and T) or not size.mask_BT.any(1).all():
            raise ValueError(f"every row needs at least one position, got a mask of {(B, T)}")
        rows = B * size.branches
        self.footprint.check(Shape(rows, T, size.answers, size.pairs, size.tokens, size.grad, size.sent))
        return kind.from_frame(frame, D=self.width, V=self.vocabulary)

    def step(self, step: Step, client: int, wanted: Collection[str] = ()) -> Read:
        """The branches of a step. The inputs whose gradients are wanted become leaves."""
        inputs = {name: tensor.to(self.device, torch.float32) for name, tensor in step.inputs().items()}
        if unknown := sorted(set(wanted) - inputs.keys()):
            raise ValueError(f"no gradient by {unknown[0]!r}: it is no tensor of this step")
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items() if name in wanted}
        step = step.with_inputs(inputs)
        if isinstance(step, DenseStep):
            branches = [Embeds.whole(whole_BTD) for whole_BTD in step.whole]
        else:
            branches = self._factored(step, client)
        embed = embed_of(self.features.table)
        return Read([replace(embeds, embed=embed) for embeds in branches], step.mask_BT, leaves, step.summed())

    def _factored(self, step: FactoredStep, client: int) -> list[Embeds]:
        self._bound("embeddings", len(step.branches) * step.mask_BT.numel() * self.width)
        image_N, text_N = (at_N.to(self.device) for at_N in base.positions(step.image_BT, step.mask_BT))
        segments = {
            "image": self._image_segment(step, image_N, client),
            "text": self.features.text_segment(step.tokens_BT.to(self.device), text_N),
        }
        # whether something trains in front of the LLM is for `Embeds.squares` to know
        source = Source(step.tokens_BT, step.image_BT, image_trains=step.image_ND is not None)
        shape = tuple(step.mask_BT.shape)
        return [
            Embeds(
                shape,
                tuple(segments.values()),
                tuple(LowRank(segments[term.kind], term.h_NR, term.up_DR, term.scale, term.name) for term in terms),
                source,
            )
            for terms in step.branches
        ]

    def _image_segment(self, step: FactoredStep, image_N: Tensor, client: int) -> Segment:
        if step.image_ND is not None:
            return Segment("image", step.image_ND, image_N)
        if step.keys_SK is not None:
            features_MPE = self.features.fetch(client, step.keys_SK, len(image_N))
        else:
            features_MPE = self.features.joined(step.features, len(image_N))
        return self.features.image_segment(features_MPE.to(self.device), image_N)

    def keep(self, keep_BA: Tensor, T: int) -> Tensor:
        """The positions whose logits are asked for, of T."""
        if not 1 <= keep_BA.shape[1] <= T:
            raise ValueError(f"{KEEP.name!r} names {keep_BA.shape[1]} positions a row, wanted 1 to {T}")
        self._bound("logits", keep_BA.numel() * self.vocabulary)
        return keep_BA

    def _bound(self, what: str, numbers: int) -> None:
        if 4 * numbers > self.limit_bytes:
            raise ValueError(
                f"{what} of {4 * numbers} bytes, at most {self.limit_bytes}; "
                "lower batch_size or raise link.frame_limit_mb"
            )

    def labels(self, labels_BA: Tensor) -> Tensor:
        """The answer tokens."""
        if (labels_BA == IGNORE).all():
            raise ValueError("labels hold no answer token")
        return labels_BA.to(self.device)


def mutual_of(request: LossRequest, branches: int) -> Mutual | None:
    """How branches learn from each other, where they do."""
    weights, temperature = request.weights, request.temperature
    if weights is None:
        return None
    if len(weights) != branches or not (number(temperature) and 1e-3 <= temperature <= 1e3):
        raise ValueError(
            f"mutual learning takes a weight for each of {branches} branches and a temperature from 0.001 to "
            f"1000, got {len(weights)} and {str(temperature)[:32]}"
        )
    return Mutual(tuple(weights), float(temperature))
