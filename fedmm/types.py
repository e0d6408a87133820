"""The nouns every floor shares. Records are frozen; tensors inside them are never written in place.

Dimension key, the only one:
    B batch   M its images   I a sample's images   T positions   P patches   E encoder width   D LLM width
    R rank   V vocabulary   A answer positions   K clients   N positions packed over a batch   F a trunk's width
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

State = dict[str, Tensor]
"""Named trainable tensors, and nothing else; what travels and what a rule merges."""

IGNORE = -100
"""The label of a position that is no answer token (torch's own `ignore_index`)."""

IMAGE_PLACE = "<image>"
"""Where a further image stands in a question; the first one's place is in the prompt."""


READ_PATH = "is read from this machine's disk"
ReadPath = Annotated[str, READ_PATH]
"""Names a file or folder to read. An order may set a parameter of this type only to what lies below the site's root."""

ANCHORED = "stay near the received state"
Anchored = Annotated[Sequence[str], ANCHORED]
"""Names sets of adapters that a method holds near the received state; being named so does not make them act."""


@dataclass(frozen=True)
class Example:
    """One image-text question with its answer; `labels` are what partitions group by (kind, style, ...)."""

    id: str
    images: Sequence[Image.Image]
    question: str
    answer: str
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Segment:
    """The base embeddings of one kind of positions, image or text, packed over a batch.

    `positions_N` index the flattened (B T) axis, in rising order.
    """

    kind: str
    x_ND: Float[Tensor, "N D"]
    positions_N: Int[Tensor, " N"]


@dataclass(frozen=True)
class LowRank:
    """One low-rank term on a segment of some embeddings, `scale * h B^T` with `h = x A^T`, kept apart for the link.

    `A` itself is not here: h is formed where x is, and A's gradient too, from h's.
    """

    segment: Segment
    h_NR: Float[Tensor, "N R"]
    up_DR: Float[Tensor, "D R"]
    scale: float
    name: str = ""  # of the adapter, the same in every step

    def squares(self, grad_BTD: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "N R"], Float[Tensor, "D R"]]:
        """From the gradient by the embeddings: that by h, and the sum over samples of the squared one by B.

        The square of the whole gradient by B would be another thing; so it is taken where samples are still apart.
        """
        T = grad_BTD.shape[1]
        grad_ND = self.scale * grad_BTD.flatten(0, 1)[self.segment.positions_N]
        squares_DR = torch.zeros_like(self.up_DR)
        counts = torch.bincount(self.segment.positions_N // T, minlength=len(grad_BTD)).tolist()
        for g_ND, h_NR in zip(grad_ND.split(counts), self.h_NR.split(counts), strict=True):
            squares_DR += (g_ND.T @ h_NR).pow(2)
        return grad_ND @ self.up_DR, squares_DR


@dataclass(frozen=True)
class Squares:
    """What a diagonal Fisher needs of the LLM: see `LowRank.squares`, one pair a term.

    `image_ND` is the gradient by the image segment, where something trains in front of it.
    """

    terms: tuple[tuple[Float[Tensor, "_ _"], Float[Tensor, "D _"]], ...]
    image_ND: Float[Tensor, "_ D"] | None = None


@dataclass(frozen=True)
class Source:
    """What the segments of a base are formed from, by whoever has connector and token table.

    `features_MPE` are those of the M images of the batch in order, and `keys` name the own of each sample with images
    by their content, where they are the same in every epoch. With `image_trains` something trains in front of the LLM
    (`edge.lora`): image positions cannot be formed elsewhere, and there are no features.
    """

    tokens_BT: Int[Tensor, "B T"]
    image_BT: Bool[Tensor, "B T"]
    image_trains: bool = False
    features_MPE: Float[Tensor, "M P E"] | None = None
    keys: tuple[bytes, ...] | None = None

    def by_sample(self) -> tuple[Float[Tensor, "I P E"], ...]:
        """Each sample's own features, of those with images."""
        assert self.features_MPE is not None
        P = self.features_MPE.shape[1]
        counts = [count // P for count in self.image_BT.sum(1).tolist() if count]
        return self.features_MPE.split(counts) if counts else ()


@dataclass(frozen=True)
class Embeds:
    """What enters the LLM: the segments of a base, and the low-rank terms that adapters add to them."""

    shape: tuple[int, ...]  # (B, T)
    segments: tuple[Segment, ...]
    terms: tuple[LowRank, ...] = ()
    source: Source | None = None
    embed: Callable[[Tensor], Tensor] | None = None  # of generated tokens; None: the LLM's own table

    @staticmethod
    def whole(base_BTD: Float[Tensor, "B T D"]) -> Embeds:
        """Embeddings of which no more is known than their values."""
        B, T, D = base_BTD.shape
        return Embeds((B, T), (Segment("whole", base_BTD.reshape(B * T, D), torch.arange(B * T)),))

    def dense(self) -> Float[Tensor, "B T D"]:
        """The sum, `base + sum_i scale_i h_i B_i^T`, each term at its own positions; padding is zero."""
        B, T = self.shape
        first = self.segments[0].x_ND
        out_ND = first if self.segments[0].kind == "whole" else first.new_zeros(B * T, first.shape[1])
        for segment in self.segments:
            if segment.kind != "whole":
                out_ND = out_ND.index_copy(0, segment.positions_N, segment.x_ND)
        for term in self.terms:
            out_ND = out_ND.index_add(0, term.segment.positions_N, term.scale * (term.h_NR @ term.up_DR.T))
        return out_ND.view(B, T, -1)

    def squares(self, grad_BTD: Float[Tensor, "B T D"]) -> Squares:
        """What a diagonal Fisher needs, from the gradient of a sum over samples by these embeddings."""
        trained = self.source is not None and self.source.image_trains
        image_N = next((segment.positions_N for segment in self.segments if segment.kind == "image" and trained), None)
        image_ND = grad_BTD.flatten(0, 1)[image_N] if image_N is not None else None
        return Squares(tuple(term.squares(grad_BTD) for term in self.terms), image_ND)


@dataclass(frozen=True)
class TokenTerm:
    """A text adapter as `generate` needs it: a new token's embedding x becomes `x + scale * (x A^T) B^T`."""

    down_RD: Float[Tensor, "R D"]
    up_DR: Float[Tensor, "D R"]
    scale: float


@dataclass(frozen=True)
class Batch:
    """Examples made ready for the edge. Rows are right-padded.

    `features_MPE` are the encoder's outputs for the M images of the batch where the encoder is frozen, the own of each
    sample with images named by their content in `keys`; else `pixels` go through it at every step. Without any image
    there are neither.
    `keep_BA` are the positions whose logits predict the answer; `labels_BA` their targets, IGNORE where padded.
    """

    ids: tuple[str, ...]
    tokens_BT: Int[Tensor, "B T"]
    mask_BT: Bool[Tensor, "B T"]
    image_BT: Bool[Tensor, "B T"]
    keep_BA: Int[Tensor, "B A"]
    labels_BA: Int[Tensor, "B A"]
    pixels: Float[Tensor, "M C H W"] | None = None
    features_MPE: Float[Tensor, "M P E"] | None = None
    keys: tuple[bytes, ...] | None = None


@dataclass(frozen=True)
class Step:
    """Where a client stands in its round: `step` of `steps` in `round` of `rounds`, all from 1.

    `anchor` is the state the client received. `scratch` is the method's own memory for this client and round; the only
    thing here that may be written.
    """

    round: int
    rounds: int
    step: int
    steps: int
    anchor: State
    scratch: dict[str, State] = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """What a client returns: the change of its travelling state from the anchor, and what a rule weighs it by.

    `delta` may lack tensors, those that this client did not train, and so may the Fisher. A client of a lower rank than
    the server's changes the first rows of each A and the first columns of each B.
    """

    client: int
    delta: State
    num_examples: int
    fisher: State | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class FedmmError(Exception):
    """Something outside this process failed (a host gone, a client lost); the message names the knob to turn."""
