"""Running weighted means: what lets a rule hold one update at a time, however many clients there are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fedmm.types import State, Update

Weights = Literal["examples", "uniform"]


def average(current: State, updates: Iterable[Update], weights: Weights) -> State:
    """The weighted mean of the deltas, of each tensor over those who sent it; what nobody sent is not in it.

    Holds one update at a time.
    """
    mean = Mean()
    for update in updates:
        delta = fitting(current, update)
        mean = mean.plus(delta, dict.fromkeys(delta, share(update, weights)))
    return mean.values


@dataclass(frozen=True)
class Mean:
    """A weighted mean of states, of each tensor over those that have it."""

    values: State = field(default_factory=dict)
    totals: Mapping[str, float] = field(default_factory=dict)

    def plus(self, change: State, weights: Mapping[str, float]) -> Mean:
        """The mean after one more, by the weights of its tensors."""
        totals = {**self.totals, **{name: self.totals.get(name, 0.0) + weights[name] for name in change}}
        values = {
            name: step(self.values.get(name, torch.zeros_like(value)), value, weights[name], totals[name])
            for name, value in change.items()
        }
        return Mean({**self.values, **values}, totals)


def fitting(current: State, update: Update) -> State:
    """The delta of an update, whose tensors must have the shapes of `current`'s. Raises ValueError for another rank."""
    for name, delta in update.delta.items():
        if delta.shape != current[name].shape:
            raise ValueError(
                f"{name!r} of client {update.client} has shape {tuple(delta.shape)}, the server's "
                f"{tuple(current[name].shape)}, and this rule takes one rank; set edge.ranks=null, or "
                "rule=hetlora, rule=exact_lowrank or rule=stack"
            )
    return update.delta


def share(update: Update, weights: Weights) -> float:
    """What an update counts before the weights are brought to sum 1: its examples, or 1."""
    return float(update.num_examples) if weights == "examples" else 1.0


def weights_of(rule: Callable[..., Any]) -> Weights:
    """How a rule weighs clients: what its `weights` is bound to, or its default. A rule without counts all alike."""
    parameter = inspect.signature(rule).parameters.get("weights")
    return parameter.default if parameter else "uniform"


def step(average: Tensor, value: Tensor, weight: Tensor | float, total: Tensor | float) -> Tensor:
    """The weighted mean after one more `value`; `total` is the sum of weights with this one in it.

        m <- m + (v - m) weight / total,   and m where total = 0

    Works coordinate by coordinate where the weights are tensors.
    """
    return torch.lerp(average, value, fraction(weight, total, average.dtype))


def fraction(weight: Tensor | float, total: Tensor | float, dtype: torch.dtype) -> Tensor:
    """`weight / total`, and 0 where total = 0."""
    weight, total = torch.as_tensor(weight, dtype=dtype), torch.as_tensor(total, dtype=dtype)
    return torch.where(total > 0, weight / total, 0.0)
