"""HetLoRA: adapters of different ranks, padded with zeros to the server's and weighted by the size of their products.

    p_k = |B_k A_k| / sum_i |B_i A_i|                          Frobenius norms, pair by pair
    A <- sum_k p_k [A_k; 0],   B <- sum_k p_k [B_k, 0]         clients get A and B cut to their ranks, `edge.ranks`

What only the larger clients have is a mean with zeros, so it shrinks: with ranks of one size that is the mean weighted
by size, else those rows move even where nobody has changed any. It averages factors, not products: `product_error`
tells by how much that differs.
Source: Cho et al. 2024 (HetLoRA, arXiv 2401.06432). Their self-pruning of ranks, and the decay that drives it, are left
out; pair by pair, where an adapter has several, is ours.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from fedmm import tree
from fedmm.aggregate import lowrank, running
from fedmm.types import State, Update


def hetlora(
    current: lowrank.Paired, updates: Iterable[Update], memory: State, *, weights: running.Weights = "examples"
) -> tuple[State, State]:
    """Merge pairs of any rank up to the server's; `weights` is for what is no pair. Holds one update at a time."""
    pairs = lowrank.whole_pairs(current, "rule=hetlora")
    mean = running.Mean()
    for update in updates:
        change = {name: _change(delta, current[name]) for name, delta in update.delta.items()}
        mean = mean.plus(change, dict.fromkeys(change, running.share(update, weights)) | _sizes(pairs, current, update))
    return tree.moved(current, mean.values), memory


def _sizes(pairs: list[lowrank.Pair], current: State, update: Update) -> dict[str, float]:
    """The norm of each of a client's products, under the names of both its factors."""
    sent = [pair for pair in pairs if {pair.up, pair.down} & update.delta.keys()]
    norms = {pair: lowrank.norm(*lowrank.factors(pair, current, update)) for pair in sent}
    return {name: norm for pair, norm in norms.items() for name in (pair.up, pair.down)}


def _change(delta: Tensor, like: Tensor) -> Tensor:
    """From `like` to the client's own factor, zero beyond its rank."""
    own = like[tuple(map(slice, delta.shape))]
    return lowrank.padded(delta, like) - (like - lowrank.padded(own, like))
