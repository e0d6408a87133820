"""The whole model as a method sees it: an edge with an LLM behind it, wherever that is, or a classifier alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedmm.adapters.privacy import EVERYTHING_MAY_LEAVE, Privacy
from fedmm.edge.classifier import Classifier
from fedmm.edge.nano_edge import NanoEdge
from fedmm.edge.sets import Edge
from fedmm.losses import Mutual, branch_losses
from fedmm.types import IGNORE, Batch, Embeds, Squares, TokenTerm


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


@runtime_checkable
class Model(Protocol):
    """What methods, scores and the server's stages ask of a model; `use` names the sets of adapters that act."""

    @property
    def edge(self) -> Edge: ...

    def __call__(self, batch: Batch, use: Sequence[str] = ("shared",)) -> Float[Tensor, "B A V"]:
        """Answer logits, on which the caller computes any loss."""

    def answer_loss(self, batch: Batch, use: Sequence[str] = ("shared",)) -> Float[Tensor, ""]:
        """Mean cross-entropy over the answer tokens."""

    def losses(
        self, batch: Batch, uses: Sequence[Sequence[str]], mutual: Mutual | None = None
    ) -> tuple[Float[Tensor, ""], ...]:
        """A loss for each of several branches, each with its own sets of adapters, by `fedmm.losses.branch_losses`."""

    def generate(self, batch: Batch, use: Sequence[str] = ("shared",), max_tokens: int = 8) -> Int[Tensor, "B N"]:
        """Greedy answers to a batch of prompts."""


@dataclass(frozen=True)
class ClassifierModel:
    """A classifier: its answer is one position, its vocabulary the class names."""

    edge: Classifier

    def __call__(self, batch: Batch, use: Sequence[str] = ("shared",)) -> Float[Tensor, "B A V"]:
        return self.edge.logits(batch, use)[:, None]

    def answer_loss(self, batch: Batch, use: Sequence[str] = ("shared",)) -> Float[Tensor, ""]:
        return self.losses(batch, (use,))[0]

    def losses(
        self, batch: Batch, uses: Sequence[Sequence[str]], mutual: Mutual | None = None
    ) -> tuple[Float[Tensor, ""], ...]:
        return branch_losses([self(batch, use) for use in uses], batch.labels_BA, mutual)

    def generate(self, batch: Batch, use: Sequence[str] = ("shared",), max_tokens: int = 8) -> Int[Tensor, "B N"]:
        return self(batch, use).argmax(-1)


@dataclass(frozen=True)
class SplitModel:
    """An edge, and the LLM behind it.

    `loss_at` is `link.loss`: auto lets the LLM's side compute the losses it knows (one round trip), client never does.
    Private sets stay here in generation too: a token at a time, each a forward of its own, up to one of `stop_tokens`.
    """

    edge: NanoEdge
    llm: LLM
    loss_at: str = "auto"
    privacy: Privacy = EVERYTHING_MAY_LEAVE
    stop_tokens: Sequence[int] = ()

    def __call__(self, batch: Batch, use: Sequence[str] = ("shared",)) -> Float[Tensor, "B A V"]:
        embeds, mask_BT = self.edge(batch, use)
        return self.llm(embeds, mask_BT, batch.keep_BA)

    def answer_loss(self, batch: Batch, use: Sequence[str] = ("shared",)) -> Float[Tensor, ""]:
        return self.losses(batch, (use,))[0]

    def losses(
        self, batch: Batch, uses: Sequence[Sequence[str]], mutual: Mutual | None = None
    ) -> tuple[Float[Tensor, ""], ...]:
        if self.loss_at == "client" or not self.edge.terms_only:  # adapters inside the LLM: a branch at a time
            logits = [self(batch, use) for use in uses]
            return branch_losses(logits, batch.labels_BA.to(logits[0].device), mutual)
        return self.llm.losses(self.edge.branches(batch, uses), batch.mask_BT, batch.keep_BA, batch.labels_BA, mutual)

    def generate(self, batch: Batch, use: Sequence[str] = ("shared",), max_tokens: int = 8) -> Int[Tensor, "B N"]:
        """A row that has stopped is filled with its stop token."""
        if self.privacy.covers(use):
            return self._greedy(batch, use, max_tokens, torch.tensor(self.stop_tokens))
        embeds, mask_BT = self.edge(batch, use)
        return self.llm.generate(embeds, mask_BT, self.edge.token_terms(use), max_tokens)

    @torch.no_grad()
    def _greedy(self, batch: Batch, use: Sequence[str], max_tokens: int, stops: Tensor) -> Int[Tensor, "B N"]:
        length_B, rows_B = batch.mask_BT.sum(1), torch.arange(len(batch.ids))
        stopped_B = torch.zeros(len(batch.ids), dtype=torch.bool)
        tokens: list[Tensor] = []
        for n in range(max_tokens):
            last_B1 = (length_B + n - 1)[:, None]
            asked = replace(batch, keep_BA=last_B1, labels_BA=torch.full_like(last_B1, IGNORE))
            token_B = self(asked, use)[:, 0].argmax(-1).cpu()
            tokens.append(torch.where(stopped_B, stops[0], token_B))
            stopped_B = stopped_B | torch.isin(tokens[-1], stops)
            if stopped_B.all():
                break
            longer = [F.pad(t, (0, 1)) for t in (batch.tokens_BT, batch.mask_BT, batch.image_BT)]
            batch = replace(batch, tokens_BT=longer[0], mask_BT=longer[1], image_BT=longer[2])
            batch.tokens_BT[rows_B, length_B + n], batch.mask_BT[rows_B, length_B + n] = tokens[-1], True
        return torch.stack(tokens, dim=1)
