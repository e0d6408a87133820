"""FedAdam and FedYogi: the server takes the mean change for a gradient, and each coordinate has a step of its own.

    d = sum_k p_k (w_k - w)
    m <- beta1 m + (1 - beta1) d                                     from 0
    v <- beta2 v + (1 - beta2) d^2                     FedAdam       from tau^2
    v <- v - (1 - beta2) d^2 sign(v - d^2)             FedYogi       from tau^2
    w <- w + eta m / (sqrt(v) + tau)

Without bias correction, as in the paper (Flower's FedAdam has one). A step is about eta in every coordinate that
moves steadily, however far the clients went: also where clients agree, they are followed in direction, not in length.
Source: Reddi et al. 2021, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated

import torch
from torch import Tensor

from fedmm.aggregate import running
from fedmm.bounds import Ge, Gt, Lt, hold
from fedmm.types import State, Update

Above0 = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0), Lt(1)]


def fedadam(
    current: State,
    updates: Iterable[Update],
    memory: State,
    *,
    lr: Above0 = 0.01,
    beta1: Share = 0.9,
    beta2: Share = 0.99,
    tau: Above0 = 1e-3,
    weights: running.Weights = "examples",
) -> tuple[State, State]:
    """Adam on the server. `memory` keeps `first/NAME` and `second/NAME`. Holds one update at a time."""
    hold("rule", fedadam, lr=lr, beta1=beta1, beta2=beta2, tau=tau)
    change = running.average(current, updates, weights)
    return _step(current, change, memory, lambda v, d2: beta2 * v + (1 - beta2) * d2, lr, beta1, tau)


def fedyogi(
    current: State,
    updates: Iterable[Update],
    memory: State,
    *,
    lr: Above0 = 0.01,
    beta1: Share = 0.9,
    beta2: Share = 0.99,
    tau: Above0 = 1e-3,
    weights: running.Weights = "examples",
) -> tuple[State, State]:
    """Yogi on the server: v falls by d^2's size, not by its own, so one quiet round does not forget the loud ones."""
    hold("rule", fedyogi, lr=lr, beta1=beta1, beta2=beta2, tau=tau)
    change = running.average(current, updates, weights)
    return _step(current, change, memory, lambda v, d2: v - (1 - beta2) * d2 * torch.sign(v - d2), lr, beta1, tau)


def _step(
    current: State,
    change: State,
    memory: State,
    second: Callable[[Tensor, Tensor], Tensor],
    lr: float,
    beta1: float,
    tau: float,
) -> tuple[State, State]:
    merged, kept = dict(current), dict(memory)  # a tensor that nobody sent waits, and its moments with it
    for name, d in change.items():
        m = beta1 * memory.get(f"first/{name}", torch.zeros_like(d)) + (1 - beta1) * d
        v = second(memory.get(f"second/{name}", torch.full_like(d, tau**2)), d**2)
        merged[name] = current[name] + lr * m / (v.sqrt() + tau)
        kept |= {f"first/{name}": m, f"second/{name}": v}
    return merged, kept
