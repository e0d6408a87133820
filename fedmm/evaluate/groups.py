"""Accuracy by group of classes: many, medium and few, by how often a class occurs in the clients' training data.

A class is what is answered. One that nobody trains on counts as having none.
Source: Liu et al. 2019 (ImageNet-LT): many above 100 examples, few below 20. MLLM-FL's "thirds" go by rank instead, so
that data of any size have all three.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

GROUPS = ("many", "medium", "few")


def group(counts: Mapping[str, int], by: str | Sequence[int]) -> dict[str, str]:
    """The group of each class, from its training count.

    `by` is "thirds", a third of the classes in rank order (rounded) in many and in few, ties in the order of `counts`;
    or the two bounds (most, least): many above the one, few below the other.
    """
    if isinstance(by, str):
        ranked = sorted(counts, key=lambda name: -counts[name])  # stable
        third = round(len(ranked) / 3)
        ends = dict.fromkeys(ranked[:third], "many") | dict.fromkeys(ranked[len(ranked) - third :], "few")
        return {name: ends.get(name, "medium") for name in counts}
    above, below = by
    return {name: "many" if count > above else "few" if count < below else "medium" for name, count in counts.items()}


def tally(answered: Iterable[tuple[str, bool]], groups: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """(right, count) of each group that was asked about, from each answer's truth and whether it was right.

    A truth that is no class is in no group: clients say what it is.
    """
    found = dict.fromkeys(GROUPS, (0, 0))
    for truth, right in answered:
        if truth not in groups:
            continue
        before = found[groups[truth]]
        found[groups[truth]] = (before[0] + right, before[1] + 1)
    return {name: both for name, both in found.items() if both[1]}
