"""Running weighted means: what lets a rule hold one update at a time, however many clients there are."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedmm.types import Update

Weights = Literal["examples", "uniform"]


def share(update: Update, weights: Weights) -> float:
    """What an update counts before the weights are brought to sum 1: its examples, or 1."""
    return float(update.num_examples) if weights == "examples" else 1.0


def step(average: Tensor, value: Tensor, weight: Tensor | float, total: Tensor | float) -> Tensor:
    """The weighted mean after one more `value`; `total` is the sum of weights with this one in it.

        m <- m + (v - m) weight / total,   and m where total = 0

    Works coordinate by coordinate where the weights are tensors.
    """
    weight, total = torch.as_tensor(weight, dtype=average.dtype), torch.as_tensor(total, dtype=average.dtype)
    return average + (value - average) * torch.where(total > 0, weight / total, 0.0)
