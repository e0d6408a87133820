"""FLoRA: the exact mean of the clients' products, whatever their ranks, folded into the base; then factors start fresh.

    W <- W + P (I + s W),   P = sum_k p_k B_k A_k,   B <- 0,   A drawn anew

The base under the adapters is (I + s W) x, s the adapters' scale, formed by `edge/folding.py` at both ends of the link.
A client's adapters act on that base, so its model is (I + s B_k A_k) (I + s W) x, and the merged one is the mean of the
clients' models; a client alone gets its own back. (FLoRA adds P alone: its adapters stand beside what they adapt, these
stand behind it.)
W is D x D and travels down with the state, as `image.folded` and `text.folded`: 67 MB each at width 4096, where FLoRA's
stacked factors of K clients of rank r are K r / D of that a round, but to be added up by whoever missed one.
Nothing is truncated, so what rounds add has no bound in rank; optimisers see a fresh pair every round.
Source: Wang et al. 2024 (FLoRA, arXiv 2409.05976), section 3: stacking [B_1 .. B_K] [A_1; ..; A_K] is this sum.
"""

from __future__ import annotations

import torch

from fedmm import seeds, tree
from fedmm.adapters.nano import draw
from fedmm.aggregate import lowrank, running
from fedmm.aggregate.gathered import Gathered
from fedmm.types import State


def stack(
    current: lowrank.Folded,
    updates: Gathered,
    memory: State,
    *,
    alpha: float,
    rank: int,
    seed: int = 0,
    weights: running.Weights = "examples",
) -> tuple[State, State]:
    """Fold the mean of the products, and take the mean of what is no pair. `memory` counts rounds, for A's generator.
    `alpha / rank` is the adapters' scale.

    A pair that nobody has changed keeps its own factors. Memory: see `lowrank.Product`. Raises ValueError for LoRA
    inside the edge, which does not fold here, and for updates with one factor of a pair.
    """
    pairs = lowrank.whole_pairs(current, "rule=stack")
    if inner := [pair.name for pair in pairs if pair.down.endswith("lora_A")]:
        raise ValueError(f"rule=stack folds NanoAdapters, {inner[0]!r} is a LoRA; set edge.lora.rank=0 or rule=mean")
    round = int(memory.get("round", torch.zeros((), dtype=torch.int64))) + 1
    products = {pair: lowrank.Product() for pair in pairs}
    rest, moved = running.Mean(), set[str]()
    factors = {name for pair in pairs for name in (pair.down, pair.up)}
    for update in updates:
        if half := [pair.name for pair in pairs if len({pair.down, pair.up} & update.delta.keys()) == 1]:
            raise ValueError(
                f"rule=stack starts {half[0]!r} afresh in every round, so both its factors must train in each; "
                "set schema=all or rule=mean"
            )
        p = running.share(update, weights)
        products = lowrank.plus(products, current, update, p)
        others = {name: delta for name, delta in update.delta.items() if name not in factors}
        rest = rest.plus(others, dict.fromkeys(others, p))
        moved |= {name for name, delta in update.delta.items() if p and delta.any()}
    merged = tree.moved(current, rest.values)
    generator = seeds.generator(seed, "adapters", round)
    for pair, product in products.items():
        rows, width = current[pair.down].shape
        fresh = draw(rows, width, generator)  # for each pair, so that none depends on another
        if moved & {pair.down, pair.up}:
            left, right = lowrank.on_base(*product.mean(), pair, current, alpha / rank)
            folded = current.get(f"{pair.name}.folded", 0) + left @ right
            merged |= {pair.down: fresh, pair.up: torch.zeros_like(current[pair.up])}
            merged[f"{pair.name}.folded"] = folded.to(current[pair.up].dtype)
    return merged, {"round": torch.tensor(round)} if pairs else memory
