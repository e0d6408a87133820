"""Running weighted means: what lets a rule hold one update at a time, however many clients there are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from fedmm import tree
from fedmm.types import State, Update

Weights = Literal["examples", "uniform"]


def average(current: State, updates: Iterable[Update], weights: Weights) -> State:
    """The weighted mean of the deltas; zero without any. Holds one update at a time."""
    mean, total = tree.zeros_like(current), 0.0
    for update in updates:
        p = share(update, weights)
        total += p
        mean = {name: step(mean[name], update.delta[name], p, total) for name in current}
    return mean


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
