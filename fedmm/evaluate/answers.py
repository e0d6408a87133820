"""Exact-match accuracy of generated answers, as the VQA papers count a short answer: case and outer space ignored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fedmm.edge.prepare import collate
from fedmm.edge.prepared import Prepared
from fedmm.model import Model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """What the model said to one example, and the truth."""

    id: str
    said: str
    truth: str

    @property
    def right(self) -> bool:
        return self.said.strip().casefold() == self.truth.strip().casefold()


@torch.no_grad()
def answers(
    model: Model,
    items: Sequence[Prepared],
    tokenizer: PreTrainedTokenizerBase,
    *,
    use: Sequence[str] = ("shared",),
    batch_size: int = 64,
    max_tokens: int = 8,
) -> list[Answer]:
    """Greedy answers to `items`, in their order. Batches hold prompts of similar length, so that little is padded."""
    order = sorted(range(len(items)), key=lambda i: len(items[i].prompt))
    said: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        tokens_BN = model.generate(collate([items[i] for i in chunk], answers=False), use, max_tokens)
        said |= zip(chunk, tokenizer.batch_decode(tokens_BN, skip_special_tokens=True), strict=True)
    return [Answer(item.id, said[i].strip(), item.truth) for i, item in enumerate(items)]
