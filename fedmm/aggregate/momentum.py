"""FedAvgM: momentum on the server.

    v <- beta v + sum_k p_k (w_k - w),   w <- w + eta v

A change that every round repeats grows by 1 / (1 - beta), tenfold at 0.9; lower `lr` where that is too much.
Source: Hsu et al. 2019 (FedAvgM, eta = 1).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch

from fedmm import tree
from fedmm.aggregate import running
from fedmm.bounds import Ge, Gt, Lt, hold
from fedmm.types import State, Update


def fedavgm(
    current: State,
    updates: Iterable[Update],
    memory: State,
    *,
    lr: Annotated[float, Gt(0)] = 1.0,
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9,
    weights: running.Weights = "examples",
) -> tuple[State, State]:
    """Step by the velocity, which `memory` keeps as `velocity/NAME`. Holds one update at a time.

    A tensor that nobody sent waits, and its velocity with it. With momentum 0 and lr 1 it is the mean, bit for bit.
    Raises ValueError for settings out of range.
    """
    hold("rule", fedavgm, lr=lr, momentum=momentum)
    change = running.average(current, updates, weights)
    velocity = {name: momentum * memory.get(f"velocity/{name}", torch.zeros_like(d)) + d for name, d in change.items()}
    return tree.moved(current, tree.scale(velocity, lr)), memory | {f"velocity/{n}": v for n, v in velocity.items()}
