"""Who holds which examples: `(examples, num_clients, generator, *, trained, ...)` to one list of indices a client.

All draw the law (the shares of each label at each client) first, from the generator and the sorted label values of
`trained`, the training split, alone; only then do they look at how many examples there are. Called with a generator of
the same seed, the train, validation and test splits of a dataset therefore follow the same law, and a client is tested
on what it trained on. A value that no training example has gets a law of its own, which nobody trained for.
Every index is used exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int

from fedmm.data.views import by_value
from fedmm.types import Example

Parts = list[list[int]]


def iid(
    examples: Sequence[Example],
    num_clients: int,
    generator: torch.Generator,
    *,
    trained: Sequence[Example] | None = None,  # no label matters here
) -> Parts:
    """Even shares of a shuffled deck; sizes differ by one at most."""
    order = _rng(generator).permutation(len(examples))
    return _checked("iid", [order[client::num_clients].tolist() for client in range(num_clients)], examples)


def dirichlet(
    examples: Sequence[Example],
    num_clients: int,
    generator: torch.Generator,
    *,
    trained: Sequence[Example] | None = None,
    by: str = "kind",  # the question kinds: what a client asks about
    alpha: float = 0.3,  # small: few kinds a client; large: iid
    min_examples: int = 8,  # a quarter of a batch; the proportions of a tiny client would be noise anyway
) -> Parts:
    """Label skew: each label's examples are shared out by proportions drawn from Dir(alpha), one draw a label.

    Clients left with fewer than `min_examples` take some of the largest client's, so that no split is drawn twice.
    Source: Hsu, Qi & Brown 2019, with the draw over clients as in Yurochkin et al. 2019.
    """
    rng, groups = _rng(generator), _groups("dirichlet", examples, trained, by)
    if alpha <= 0:
        raise ValueError(f"partition=dirichlet has alpha={alpha}; set partition.alpha above 0")
    shares_LK = rng.dirichlet([alpha] * num_clients, size=len(groups.all))
    parts: Parts = [[] for _ in range(num_clients)]
    for share_K, members in zip(shares_LK, groups.all, strict=True):
        cuts = np.rint(np.cumsum(share_K) * len(members)).astype(int)[:-1]
        for part, some in zip(parts, np.split(rng.permutation(members), cuts), strict=True):
            part.extend(some.tolist())
    if min_examples * num_clients > len(examples):
        raise ValueError(
            f"partition=dirichlet needs {min_examples} examples for each of {num_clients} clients, but the dataset has "
            f"{len(examples)}; lower clients or partition.min_examples, or use a larger dataset"
        )
    return _checked("dirichlet", _levelled(parts, min_examples, rng), examples)


def by_label(
    examples: Sequence[Example],
    num_clients: int,
    generator: torch.Generator,
    *,
    trained: Sequence[Example] | None = None,
    by: str = "style",  # FedDAT's four: style (domain), kind (function), layout (scene), task
    share: bool = False,  # clients of one value are no heterogeneity; True where that is what is wanted
) -> Parts:
    """One label value a client: client k holds value k, in sorted order; with fewer clients, some hold several.

    More clients than values are refused, or, with `share`, values go round and their clients share them evenly.
    Source: FedDAT 2023, section 4.1, where each client is one dataset.
    """
    rng, groups = _rng(generator), _groups("by_label", examples, trained, by)
    L = len(groups.trained)
    if num_clients > L and not share:
        raise ValueError(
            f"partition.by={by} gives each client one value, but the dataset has {L} ({', '.join(groups.trained)}) for "
            f"clients={num_clients}; lower clients, set partition.share=true so that clients share a value, or choose "
            "a dataset with more values (scenario=domain, function, scene or task sets both)"
        )
    parts: Parts = [[] for _ in range(num_clients)]
    for value, members in enumerate(groups.all):
        holders = [k for k in range(num_clients) if k % L == value] or [value % num_clients]
        order = rng.permutation(members)
        for turn, client in enumerate(holders):
            parts[client].extend(order[turn :: len(holders)].tolist())
    return _checked("by_label", parts, examples)


def equal(
    examples: Sequence[Example],
    num_clients: int,
    generator: torch.Generator,
    *,
    trained: Sequence[Example] | None = None,
    by: str = "answer",  # the classes; of long tails the answer is the class
    alpha: float | None = 0.5,  # MLLM-FL's and the common protocol's; None: every client has everybody's mix
) -> Parts:
    """Clients of one size, give or take one, whose classes differ.

    The mix of classes at each client is drawn from Dir(alpha), and then scaled, rows and columns in turn, until clients
    are equal and classes used up. Of a split whose classes come in other shares, as a balanced test split beside a long
    tail, clients get what is nearest to the same mix: its odds, scaled to that split's shares.
    Source: MLLM-FL 2024 for alpha and equal sizes; the scaling is Sinkhorn & Knopp 1967.
    """
    rng, groups = _rng(generator), _groups("equal", examples, trained, by)
    if alpha is not None and alpha <= 0:
        raise ValueError(f"partition=equal has alpha={alpha}; set partition.alpha above 0 or to null")
    L = len(groups.trained)
    mix_KC = rng.dirichlet([alpha] * L, size=num_clients) if alpha else np.ones((num_clients, L))
    mix_KC = np.pad(mix_KC, ((0, 0), (0, len(groups.all) - L)), constant_values=1 / L)
    shares_KC = _even(mix_KC, [len(members) for members in groups.all])
    parts: Parts = [[] for _ in range(num_clients)]
    for label, members in enumerate(groups.all):
        for part, some in zip(
            parts, np.split(rng.permutation(members), np.cumsum(shares_KC[:, label])[:-1]), strict=True
        ):
            part.extend(some.tolist())
    return _checked("equal", parts, examples)


def _rng(generator: torch.Generator) -> np.random.Generator:
    """NumPy's generator, as it can draw from Dir(alpha) for small alpha, seeded by one draw of the given one."""
    return np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))


@dataclass(frozen=True)
class _Groups:
    """Indices by label value: of each value that the law is drawn for, in its order, then of those nobody trained."""

    all: list[list[int]]
    trained: list[str]


def _groups(partition: str, examples: Sequence[Example], trained: Sequence[Example] | None, by: str) -> _Groups:
    who, knob = f"partition={partition}", "partition.by"
    found = by_value(examples, by, who, knob)
    law = list(found if trained is None or trained is examples else by_value(trained, by, who, knob))
    return _Groups([found.get(value, []) for value in dict.fromkeys((*law, *found))], law)


def _levelled(parts: Parts, least: int, rng: np.random.Generator) -> Parts:
    """Give each client below `least` random examples of whoever then holds most."""
    for part in parts:
        while len(part) < least:
            largest = max(parts, key=len)
            part.append(largest.pop(int(rng.integers(len(largest)))))
    return parts


def _even(mix_KC: Float[np.ndarray, "K C"], counts: Sequence[int]) -> Int[np.ndarray, "K C"]:
    """Whole numbers near the mix whose columns sum to `counts` and whose rows are equal, give or take one."""
    clients, total = len(mix_KC), sum(counts)
    sizes = np.array([total // clients + (client < total % clients) for client in range(clients)])
    shares = np.maximum(mix_KC, 1e-6)  # Sinkhorn needs a way round every zero
    for _ in range(200):
        shares *= (np.array(counts) / np.maximum(shares.sum(0), 1e-12))[None]
        shares *= (sizes / np.maximum(shares.sum(1), 1e-12))[:, None]
    whole = np.floor(shares).astype(int)
    for label, count in enumerate(counts):  # columns are met to rounding only, so a floor can be one too many
        while whole[:, label].sum() > count:
            whole[whole[:, label].argmax(), label] -= 1
    row_room, column_room = sizes - whole.sum(1), np.array(counts) - whole.sum(0)
    for cell in np.argsort((whole - shares).ravel(), kind="stable"):  # by what was cut off: a client without a share
        client, label = divmod(int(cell), len(counts))  # of a rare class gets none of it
        if row_room[client] > 0 and column_room[label] > 0:
            whole[client, label] += 1
            row_room[client] -= 1
            column_room[label] -= 1
    while row_room.any():  # the last few, wherever there is room
        client, label = int(row_room.argmax()), int(column_room.argmax())
        whole[client, label] += 1
        row_room[client] -= 1
        column_room[label] -= 1
    return whole


def _checked(partition: str, parts: Parts, examples: Sequence[Example]) -> Parts:
    if not all(parts):
        raise ValueError(
            f"partition={partition} needs at least one example per client, but with {len(examples)} examples and "
            f"clients={len(parts)}, {sum(not part for part in parts)} would have none; lower clients, or raise "
            "dataset.train (or the size of the split that is scored)"
        )
    return parts
