"""A long tail: some classes of a dataset are common, others rare, and what is asked in the end is everything alike.

    n_c = int(n_max IF^(-c / (C - 1))),   c = 0 .. C - 1: classes in sorted order, numbers as numbers

Only `train` is thinned; a test split that is balanced stays so, and that is what the common protocol scores.
Source: Cao et al. 2019 (LDAM), the exponential profile of CIFAR-10-LT and CIFAR-100-LT; IF 10, 50 and 100.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import numpy as np

from fedmm.data.views import Some, by_value
from fedmm.types import Example


def long_tail(
    *,
    of: Callable[[], Mapping[str, Sequence[Example]]],
    imbalance: float,  # head over tail
    by: str = "class",  # the label whose values are the classes, in the order from head to tail
    largest: int | None = None,  # examples of the head; None: as many as every class has
    seed: int = 0,  # of which ones stay
) -> dict[str, Sequence[Example]]:
    """The dataset `of` with its `train` split thinned to a long tail, other splits as they are.

    Which ones of a class stay is fixed by the seed, and a rarer class keeps some of those that it would keep as a more
    common one. Nothing is copied, and no image is looked at. Raises ValueError where a class has fewer than it should.
    """
    data = dict(of())
    groups = by_value(data["train"], by, "long_tail", "dataset.by")
    available = [len(members) for members in groups.values()]
    if imbalance < 1 or not available or (largest is not None and largest < 1):
        raise ValueError(
            f"long_tail has imbalance={imbalance:g}, largest={largest} and {sum(available)} examples in train; set "
            "dataset.imbalance to 1 or more, dataset.largest to null or to 1 or more, and use a dataset with examples"
        )
    counts = long_tail_counts(len(groups), min(available) if largest is None else largest, imbalance)
    if not counts[-1]:
        raise ValueError(
            f"long_tail leaves no example with {by} {list(groups)[-1]!r} in train: the commonest value has "
            f"{counts[0]}, and that over imbalance={imbalance:g} is less than one; lower "
            "dataset.imbalance or raise dataset.largest"
        )
    for value, have, want in zip(groups, available, counts, strict=True):
        if have < want:
            raise ValueError(
                f"long_tail needs {want} examples with {by} {value!r} in train, but there are {have}; lower "
                f"dataset.largest={largest}, set it to null (then it is {min(available)}), or enlarge dataset.of"
            )
    rng = np.random.default_rng(seed)
    kept = [rng.permutation(members)[:count] for members, count in zip(groups.values(), counts, strict=True)]
    return {**data, "train": Some(data["train"], np.sort(np.concatenate(kept)).tolist())}


def long_tail_counts(classes: int, largest: int, imbalance: float) -> list[int]:
    """`int(n_max IF^(-c/(C-1)))` for each class, in whole numbers: no rounding of a float can take one away."""
    last, ratio = max(1, classes - 1), Fraction(str(imbalance))
    counts = []
    for c in range(classes):
        bound = largest**last / ratio**c  # the count is the largest whole n with n^(C-1) <= bound
        count = int(largest * imbalance ** (-c / last))
        while count**last > bound:
            count -= 1
        while (count + 1) ** last <= bound:
            count += 1
        counts.append(count)
    return counts
