"""The NanoAdapter, and where the state of an edge's adapters is read and written.

    x  ->  x + (alpha / r) B A x        A: (r, D) random, B: (D, r) zero, so that it starts as the identity

Source: FedNano 2025 (low-rank adapters on image and text embeddings); Hu et al. 2021, section 4.1 (B = 0, alpha / r).
"""

from __future__ import annotations

import torch
from torch import nn

from fedmm.types import LowRank, Part, TokenTerm


class NanoAdapter(nn.Module):
    """A low-rank term on D-wide embeddings; `down` is A, `up` is B."""

    def __init__(self, width: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.zeros(rank, width))
        self.up = nn.Parameter(torch.zeros(width, rank))

    def reset(self, generator: torch.Generator) -> None:
        """A by Kaiming's uniform law with a = sqrt(5), as peft does, which is U(-1/sqrt(D), 1/sqrt(D)); B zero."""
        bound = self.down.shape[1] ** -0.5
        with torch.no_grad():
            self.down.uniform_(-bound, bound, generator=generator)
            self.up.zero_()

    def term(self, part: Part, weight: float, name: str) -> LowRank:
        """What the adapter adds to a part of the base, times `weight`."""
        return LowRank(part, part.x_ND @ self.down.T, self.up, weight * self.scale, name)

    def token_term(self, weight: float) -> TokenTerm:
        return TokenTerm(self.down, self.up, weight * self.scale)
