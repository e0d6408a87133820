"""Coordinate-wise trimmed mean and median: no value beyond those of the honest clients gets through.

    w_j <- w_j + mean of the K - 2c middle values of (w_kj - w_j)     c dropped at each end
    median: as many dropped as leave one value, or two

All clients count alike: a number of examples is a client's own claim, and who sends garbage may lie about it too.
Source: Yin et al. 2018, definitions 1 (median) and 2 (trimmed mean), there of gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedmm.aggregate import gathered
from fedmm.aggregate.gathered import Gathered
from fedmm.types import State


def median(current: State, updates: Gathered, memory: State) -> tuple[State, State]:
    """Add the coordinate-wise median of the deltas to `current`; of an even number, the mean of the middle two.

    Bears garbage from fewer than half of the clients. Holds all deltas.
    """
    changes = gathered.deltas(updates)
    return _add_middle(current, changes, (len(changes) - 1) // 2), memory


def trimmed_mean(current: State, updates: Gathered, memory: State, *, trim: float = 0.2) -> tuple[State, State]:
    """Add the mean of the deltas without the lowest and the highest `trim` of them, coordinate by coordinate.

    `trim` below 1/2 is a share of the clients that arrived, rounded up, so that it bears at least that share of
    garbage; from 1 on it is their number. Holds all deltas. Raises ValueError where nobody would be left.
    """
    changes = gathered.deltas(updates)
    dropped = int(trim) if trim >= 1 else math.ceil(round(trim * len(changes), 9))  # 0.28 * 25 is a little above 7
    if changes and not 0 <= dropped * 2 < len(changes):
        raise ValueError(
            f"rule.trim={trim:g} drops {dropped} of {len(changes)} clients at each end, which must leave one; "
            "set it to a share from 0 to below 0.5 or to a smaller number, or raise clients_per_round"
        )
    return _add_middle(current, changes, dropped), memory


def _add_middle(current: State, changes: Sequence[State], dropped: int) -> State:
    """A value that is not finite sorts to an end, NaN to the upper one."""
    if not changes:
        return current
    kept = slice(dropped, len(changes) - dropped)
    return {
        name: tensor + gathered.stack(changes, name).sort(dim=0).values[kept].mean(dim=0)
        for name, tensor in current.items()
    }
