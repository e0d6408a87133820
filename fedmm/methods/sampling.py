"""In which order a client sees its examples: `(items, generator) -> indices of one epoch`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedmm.edge.prepared import Prepared


def class_balanced(items: Sequence[Prepared], generator: torch.Generator) -> list[int]:
    """Each class as likely, whatever its size: an epoch of as many draws as there are items, with replacement.

        p(i) = 1 / (C n_c(i))

    A class is an answer, of those that the client has. Source: class-balanced sampling as in Kang et al. 2020.
    """
    names = {name: c for c, name in enumerate(dict.fromkeys(item.truth for item in items))}
    classes_N = torch.tensor([names[item.truth] for item in items])
    weights_N = 1 / torch.bincount(classes_N)[classes_N]
    return torch.multinomial(weights_N, len(items), replacement=True, generator=generator).tolist()
