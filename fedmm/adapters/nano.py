"""The NanoAdapter: a low-rank product beside embeddings.

    x  ->  x + (alpha / r) B A x        A: (r, D) random, B: (D, r) zero, so that it starts as the identity

Source: FedNano 2025 (low-rank adapters on image and text embeddings); Hu et al. 2021, section 4.1 (B = 0, alpha / r).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedmm.types import LowRank, Segment, State, TokenTerm


class NanoAdapter(nn.Module):
    """A low-rank term on D-wide embeddings; `down` is A, `up` is B."""

    def __init__(self, width: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.zeros(rank, width))
        self.up = nn.Parameter(torch.zeros(width, rank))

    def reset(self, generator: torch.Generator, rank: int) -> None:
        """A random, B zero. Of A `rank` rows are drawn, of which a smaller adapter has the first."""
        R, D = self.down.shape
        with torch.no_grad():
            self.down.copy_(draw(rank, D, generator)[:R])
            self.up.zero_()

    def term(self, segment: Segment, weight: float, name: str) -> LowRank:
        """What the adapter adds to a segment of the base, times `weight`."""
        return LowRank(segment, segment.x_ND @ self.down.T, self.up, weight * self.scale, name)

    def token_term(self, weight: float) -> TokenTerm:
        return TokenTerm(self.down, self.up, weight * self.scale)


def draw(rank: int, width: int, generator: torch.Generator) -> Float[Tensor, "R D"]:
    """A by Kaiming's uniform law with a = sqrt(5), as peft does, which is U(-1/sqrt(D), 1/sqrt(D))."""
    return torch.empty(rank, width).uniform_(-(width**-0.5), width**-0.5, generator=generator)


def cut(state: State, rank: int) -> State:
    """The first `rank` rows of every A and columns of every B of NanoAdapters: what of a state a smaller client has.

    Views. LoRA inside the edge has one rank everywhere. Source: Cho et al. 2024 (HetLoRA), truncation.
    """

    def own(name: str, tensor: Tensor) -> Tensor:
        return tensor[:rank] if name.endswith(".down") else tensor[:, :rank] if name.endswith(".up") else tensor

    return {name: own(name, tensor) for name, tensor in state.items()}
