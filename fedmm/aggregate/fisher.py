"""Fisher merging: weigh each client's coordinate by how sure that client is of it.

    w_j <- w_j + sum_k c_kj (w_kj - w_j) / sum_k c_kj,   c_kj = p_k F_kj / mean_j(F_kj)

The division by the tensor's mean (its trace over its size) is `normalise: trace`. Without it a client with a large
loss dominates every coordinate. A coordinate of which nobody is sure (sum_k c_kj / sum_k p_k below `floor`) takes the
plain mean: with B = 0 at the start dL/dA = 0, and a modality that nobody has seen has no Fisher at all.
Source: Matena & Raffel 2022, section 2.3 (diagonal Fisher, weights lambda_k); FedNano 2025 applies it to NanoAdapters.
The normalisation and the fall-back are ours.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from fedmm import tree
from fedmm.aggregate import running
from fedmm.bounds import NotNegative
from fedmm.types import State, Update

_NOTHING = 1e-28  # a mean below it is nobody's certainty: divided by it, weights would leave fp32


def fisher(
    current: State,
    updates: Iterable[Update],
    memory: State,
    *,
    weights: running.Weights = "examples",
    normalise: Literal["trace", "none"] = "trace",
    floor: NotNegative = 1e-8,
) -> tuple[State, State]:
    """Merge deltas by diagonal Fisher information. Holds one update at a time.

    Raises ValueError where an update carries no Fisher: `rule=fisher` needs a method that makes one.
    """
    mean, surest, certainty = (tree.zeros_like(current) for _ in range(3))
    totals: dict[str, float] = defaultdict(float)  # by tensor, of those who sent it
    for update in updates:
        if update.fisher is None:
            raise ValueError(
                f"rule=fisher needs a Fisher from every client, client {update.client} sent none; "
                "set method=fednano or method=fednano_ef, or rule=mean"
            )
        p = running.share(update, weights)
        for name, delta in running.fitting(current, update).items():
            totals[name] += p
            sure = update.fisher[name]
            scale = p / _size(sure, normalise)
            surest[name].addcmul_(sure, delta, value=scale)  # these three are ours: in place, and nothing in between
            certainty[name].add_(sure, alpha=scale)
            mean[name].lerp_(delta, float(running.fraction(p, totals[name], delta.dtype)))
    merged = {
        name: torch.where(certainty[name] > floor * total, surest[name] / certainty[name], mean[name])
        for name, total in totals.items()
    }
    return tree.moved(current, merged), memory


def _size(fisher: Tensor, normalise: str) -> float:
    """What a Fisher is divided by: its mean, where that is something."""
    size = float(fisher.mean()) if normalise == "trace" else 1.0
    return size if size > _NOTHING else 1.0
