"""Coordinate-wise trimmed mean and median: no value beyond those of the honest clients gets through.

    w_j <- w_j + mean of the K - 2c middle values of (w_kj - w_j)     c dropped at each end
    median: as many dropped as leave one value, or two

All clients count alike: a number of examples is a client's own claim, and who sends garbage may lie about it too.
Source: Yin et al. 2018, definitions 1 (median) and 2 (trimmed mean), there of gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from fedmm.aggregate import gathered
from fedmm.aggregate.gathered import Gathered
from fedmm.bounds import Mistake
from fedmm.types import State


def median(current: State, updates: Gathered, memory: State) -> tuple[State, State]:
    """Add the coordinate-wise median of the deltas to `current`; of an even number, the mean of the middle two.

    Bears garbage from fewer than half of the clients. Holds all deltas.
    """
    changes = gathered.deltas(current, updates)
    return gathered.moved(current, changes, lambda changes_K: _middle(changes_K, (len(changes_K) - 1) // 2)), memory


def trimmed_mean(current: State, updates: Gathered, memory: State, *, trim: float = 0.2) -> tuple[State, State]:
    """Add the mean of the deltas without the lowest and the highest `trim` of them, coordinate by coordinate.

    `trim` below 1/2 is a share of the clients that sent a tensor, rounded up, so that it bears at least that share of
    garbage; from 1 on it is their number. Where that leaves nobody, as clients were lost, it is the median. Holds all
    deltas. Raises ValueError for a share that always leaves nobody.
    """
    if not 0 <= trim < 0.5 and not trim >= 1:
        raise ValueError(f"rule.trim must be a share from 0 to below 0.5, or a number from 1, got {trim:g}")
    changes = gathered.deltas(current, updates)
    return gathered.moved(current, changes, lambda changes_K: _middle(changes_K, dropped(trim, len(changes_K)))), memory


def check(clients: int, adapters: State, *, trim: float = 0.0) -> Iterator[Mistake]:
    """Whether a round has clients enough, as `trim` stands; the median has none."""
    if trim >= 1 and not float(trim).is_integer():
        wanted = "a share below 0.5, or a whole number of clients from 1"
        yield Mistake("rule.trim", f"rule.trim must be {wanted}, got {trim:g}")
    elif (0 <= trim < 0.5 or trim >= 1) and dropped(trim, clients) * 2 >= clients:
        yield Mistake(
            "rule.trim",
            f"rule.trim={trim:g} must leave one of {clients} clients in a round, and drops {dropped(trim, clients)} at "
            "each end; lower it, or raise clients or clients_per_round",
        )


def dropped(trim: float, K: int) -> int:
    """How many of K values go at each end."""
    return int(trim) if trim >= 1 else math.ceil(round(trim * K, 9))  # 0.28 * 25 is a little above 7


def _middle(changes_K: Tensor, dropped: int) -> Tensor:
    """A value that is not finite sorts to an end, NaN to the upper one."""
    dropped = min(dropped, (len(changes_K) - 1) // 2)
    return changes_K.sort(dim=0).values[dropped : len(changes_K) - dropped].mean(dim=0)
