"""Norm clipping: nobody moves the mean by more than his share of a bound.

    w <- w + sum_k p_k min(1, c / |d_k|) d_k,   |d_k| over all tensors together

Against a change that is too large, not against one of ordinary size in a wrong direction, nor NaN.
Source: Sun et al. 2019 (norm thresholding). The median of the norms as bound is ours.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Annotated

import torch

from fedmm import tree
from fedmm.aggregate import running
from fedmm.aggregate.gathered import Gathered
from fedmm.bounds import Gt, hold
from fedmm.types import State, Update


def norm_clip(
    current: State,
    updates: Gathered,
    memory: State,
    *,
    bound: Annotated[float, Gt(0)] | None = None,
    weights: running.Weights = "uniform",
) -> tuple[State, State]:
    """Clip each delta to the norm `bound`, then add their mean to `current`.

    Without a bound it is the median of the norms that arrived, for which all deltas are held; with one, one update at
    a time. Raises ValueError for a bound that is not above 0.
    """
    hold("rule", norm_clip, bound=bound)
    if bound is None:
        updates = [replace(update, fisher=None) for update in updates]
        bound = statistics.median([norm(update.delta) for update in updates] or [0.0])
    clipped = (_clip(update, bound) for update in updates)
    return tree.moved(current, running.average(current, clipped, weights)), memory


def norm(change: State) -> float:
    """The Euclidean norm over all tensors."""
    return math.hypot(*(float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in change.values()))


def _clip(update: Update, bound: float) -> Update:
    size = norm(update.delta)
    return replace(update, delta=tree.scale(update.delta, bound / size)) if size > bound else update
