"""Krum and multi-Krum: follow the clients who have the nearest neighbours.

    s(k) = sum over the n - f - 2 nearest others i of |d_k - d_i|^2,   d the change over all tensors together
    w <- w + mean of the m changes with the lowest scores              Krum: m = 1

Whole changes are kept or dropped, so that no factor of one client meets another factor of a dropped one. What is kept
need not be typical of clients who differ: where each has data of its own kind, Krum follows one kind. All clients count
alike, as in `trimmed`.
Source: Blanchard et al. 2017, section 4 (Krum, n >= 2f + 3) and their multi-Krum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from fedmm.aggregate import gathered
from fedmm.aggregate.gathered import Gathered
from fedmm.bounds import Count, Ge, Mistake, hold
from fedmm.types import State

Byzantine = Annotated[int, Ge(0)]
Keep = Count | None


def krum(current: State, updates: Gathered, memory: State, *, byzantine: Byzantine = 1) -> tuple[State, State]:
    """Add the change of the one client with the lowest score to `current`; of equal ones, the first client's.

    Bears garbage from `byzantine` clients, f, of at least 2 f + 3. Holds all deltas.
    """
    return multi_krum(current, updates, memory, byzantine=byzantine, keep=1)


def multi_krum(
    current: State, updates: Gathered, memory: State, *, byzantine: Byzantine = 1, keep: Keep = None
) -> tuple[State, State]:
    """Add the mean change of the `keep` clients with the lowest scores to `current`.

    By default n - f are kept, all that are supposed honest. El Mhamdi et al. 2019 prove it for at most n - f - 2.
    Of fewer than 2 f + 3 clients, as when one was refused at the door, it bears as many as they can, (n - 3) / 2; of
    fewer than three nothing is taken, as nobody could be told from garbage. Holds all deltas.
    """
    hold("rule", multi_krum, byzantine=byzantine, keep=keep)
    changes = gathered.deltas(current, updates)
    if len(changes) < 3:
        return current, memory
    f = min(byzantine, (len(changes) - 3) // 2)
    best = scores(changes, f).argsort(stable=True)[: min(keep or len(changes), len(changes) - f)]
    chosen = [changes[k] for k in best.tolist()]
    return gathered.moved(current, chosen, lambda changes_K: changes_K.mean(dim=0)), memory


def check(clients: int, adapters: State, *, byzantine: int, keep: int | None = None) -> Iterator[Mistake]:
    """How many clients a round needs."""
    if 2 * byzantine + 3 > clients:
        yield Mistake(
            "rule.byzantine",
            f"rule.byzantine={byzantine} needs at least {2 * byzantine + 3} clients in a round, got {clients}; "
            "lower it, or raise clients or clients_per_round",
        )
    elif keep is not None and keep > clients - byzantine:
        yield Mistake(
            "rule.keep",
            f"rule.keep={keep} of {clients} clients in a round keeps some of rule.byzantine={byzantine}; lower one, "
            "or raise clients or clients_per_round",
        )


def scores(changes: Sequence[State], byzantine: int) -> Float[Tensor, " K"]:
    """Each client's sum of squared distances to its nearest others; NaN, which sorts last, for one that is not finite.

    What a client did not send it did not change. From differences, not from inner products: clients are near each
    other, and there the latter cancel.
    """
    K = len(changes)
    squares_KK = torch.zeros(K, K, dtype=torch.float64)
    like = {name: tensor for change in changes for name, tensor in change.items()}
    for name, tensor in like.items():
        flat_KN = torch.stack([change.get(name, torch.zeros_like(tensor)) for change in changes]).flatten(1).double()
        squares_KK += torch.cdist(flat_KN, flat_KN, compute_mode="donot_use_mm_for_euclid_dist").square().cpu()
    nearest_KK = squares_KK.fill_diagonal_(torch.inf).sort(dim=1).values
    return nearest_KK[:, : K - byzantine - 2].sum(dim=1)
