"""The whole model as a method sees it: an edge and an LLM, wherever the LLM is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedmm.edge.nano_edge import NanoEdge
from fedmm.losses import Mutual, branch_losses
from fedmm.types import Batch, Embeds, Squares, TokenTerm


@runtime_checkable
class LLM(Protocol):
    """What LocalLLM and RemoteLLM both are."""

    def __call__(
        self, embeds: Embeds, mask_BT: Bool[Tensor, "B T"], keep_BA: Int[Tensor, "B A"]
    ) -> Float[Tensor, "B A V"]: ...

    def losses(
        self,
        branches: Sequence[Embeds],
        mask_BT: Bool[Tensor, "B T"],
        keep_BA: Int[Tensor, "B A"],
        labels_BA: Int[Tensor, "B A"],
        mutual: Mutual | None = None,
    ) -> tuple[Float[Tensor, ""], ...]: ...

    def squares(
        self,
        embeds: Embeds,
        mask_BT: Bool[Tensor, "B T"],
        keep_BA: Int[Tensor, "B A"],
        labels_BA: Int[Tensor, "B A"],
    ) -> Squares: ...

    def generate(
        self, embeds: Embeds, mask_BT: Bool[Tensor, "B T"], terms: Sequence[TokenTerm], max_tokens: int
    ) -> Int[Tensor, "B N"]: ...


@dataclass(frozen=True)
class Model:
    """`model(batch)` gives answer logits; `use` names the sets of adapters that act.

    `loss_at` is `link.loss`: auto lets the LLM's side compute the losses it knows (one round trip), client never does.
    """

    edge: NanoEdge
    llm: LLM
    loss_at: str = "auto"

    def __call__(self, batch: Batch, use: Sequence[str] = ("shared",)) -> Float[Tensor, "B A V"]:
        """Answer logits, on which the caller computes any loss."""
        embeds, mask_BT = self.edge(batch, use)
        return self.llm(embeds, mask_BT, batch.keep_BA)

    def answer_loss(self, batch: Batch, use: Sequence[str] = ("shared",)) -> Float[Tensor, ""]:
        """Mean cross-entropy over the answer tokens."""
        return self.losses(batch, (use,))[0]

    def losses(
        self, batch: Batch, uses: Sequence[Sequence[str]], mutual: Mutual | None = None
    ) -> tuple[Float[Tensor, ""], ...]:
        """A loss for each of several branches, each with its own sets of adapters, by `fedmm.losses.branch_losses`."""
        if self.loss_at == "client":
            return branch_losses([self(batch, use) for use in uses], batch.labels_BA, mutual)
        return self.llm.losses(self.edge.branches(batch, uses), batch.mask_BT, batch.keep_BA, batch.labels_BA, mutual)

    def generate(self, batch: Batch, use: Sequence[str] = ("shared",), max_tokens: int = 8) -> Int[Tensor, "B N"]:
        """Greedy answers to a batch of prompts."""
        embeds, mask_BT = self.edge(batch, use)
        return self.llm.generate(embeds, mask_BT, self.edge.token_terms(use), max_tokens)
