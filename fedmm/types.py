"""The nouns every floor shares. Records are frozen; tensors inside them are never written in place.

Dimension key, the only one:
    B batch   T positions   P patches   E encoder width   D LLM width   R rank   V vocabulary   A answer positions
    K clients   N positions packed over a batch
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

State = dict[str, Tensor]
"""Named trainable tensors, and nothing else; what travels and what a rule merges."""

IGNORE = -100
"""The label of a position that is no answer token (torch's own `ignore_index`)."""


@dataclass(frozen=True)
class Example:
    """One image-text question with its answer; `labels` are what partitions group by (kind, style, ...)."""

    id: str
    images: Sequence[Image.Image]
    question: str
    answer: str
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LowRank:
    """One low-rank term of some embeddings, `scale * h B^T` at `positions`, kept apart so that a link can use it.

    `positions_N` index the flattened (B T) axis. `A` itself is not here: `h = x A^T` is formed where x is.
    """

    h_NR: Float[Tensor, "N R"]
    up_DR: Float[Tensor, "D R"]
    positions_N: Int[Tensor, " N"]
    scale: float


@dataclass(frozen=True)
class Embeds:
    """What enters the LLM: a base and the low-rank terms that adapters add to it."""

    base_BTD: Float[Tensor, "B T D"]
    terms: tuple[LowRank, ...] = ()

    def dense(self) -> Float[Tensor, "B T D"]:
        """The sum, `base + sum_i scale_i h_i B_i^T`, each term at its own positions."""
        B, T, D = self.base_BTD.shape
        out_ND = self.base_BTD.reshape(B * T, D)
        for term in self.terms:
            out_ND = out_ND.index_add(0, term.positions_N, term.scale * (term.h_NR @ term.up_DR.T))
        return out_ND.view(B, T, D)


@dataclass(frozen=True)
class TokenTerm:
    """A text adapter as `generate` needs it: a new token's embedding x becomes `x + scale * (x A^T) B^T`."""

    down_RD: Float[Tensor, "R D"]
    up_DR: Float[Tensor, "D R"]
    scale: float


@dataclass(frozen=True)
class Batch:
    """Examples made ready for the edge. Rows are right-padded.

    `features_BPE` are the encoder's outputs where the encoder is frozen, else `pixels` go through it at every step.
    `keep_BA` are the positions whose logits predict the answer; `labels_BA` their targets, IGNORE where padded.
    """

    ids: tuple[str, ...]
    tokens_BT: Int[Tensor, "B T"]
    mask_BT: Bool[Tensor, "B T"]
    image_BT: Bool[Tensor, "B T"]
    keep_BA: Int[Tensor, "B A"]
    labels_BA: Int[Tensor, "B A"]
    pixels: Float[Tensor, "B C H W"] | None = None
    features_BPE: Float[Tensor, "B P E"] | None = None


@dataclass(frozen=True)
class Step:
    """Where a client stands in its round: `step` of `steps` in `round` of `rounds`, all from 1.

    `anchor` is the state the client received. `kept` is the method's own memory for this client and round; the only
    thing here that may be written.
    """

    round: int
    rounds: int
    step: int
    steps: int
    anchor: State
    kept: dict[str, State] = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """What a client returns: the change of its travelling state from the anchor, and what a rule weighs it by."""

    client: int
    delta: State
    num_examples: int
    fisher: State | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


class FedmmError(Exception):
    """Something outside this process failed (a host gone, a client lost); the message names the knob to turn."""
