"""One example as the edge reads it, and the order in which an epoch goes through such examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Sampling = Callable[[Sequence["Prepared"], torch.Generator], list[int]]
"""The order of one epoch, by index."""


@dataclass(frozen=True)
class Prepared:
    """One example as the edge reads it. It holds no image: thousands of them would not fit.

    `content` is a hash of its images. With an `encoder` a batch takes features from there, else it takes `pixels`.
    """

    id: str
    prompt: Int[Tensor, " T"]
    image: Bool[Tensor, " T"]
    answer: Int[Tensor, " A"]
    truth: str
    content: str
    pixels: Callable[[], Float[Tensor, "I C H W"]]
    encoder: Callable[[Sequence[Prepared]], list[Tensor]] | None = None

    @property
    def sees(self) -> bool:
        """Whether there is an image in it at all."""
        return bool(self.image.any())
