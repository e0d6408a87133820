"""What rules share that are no running means: most compare the clients with each other, so need all of them at once.

Such a rule says so in its signature, `updates: Gathered`; without it, the tests hold it to one update at a time. What
it gathers is K times the adapters, if it says no less: 1,000 clients of 1.05M parameters are 4.2 GB.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from fedmm.types import State, Update

Gathered = Annotated[Iterable[Update], "memory grows with the clients"]


def deltas(updates: Gathered) -> list[State]:
    """The change of every client; what else came with it, as a Fisher, is let go."""
    return [update.delta for update in updates]


def stack(changes: Sequence[State], name: str) -> Float[Tensor, "K ..."]:
    return torch.stack([change[name] for change in changes])
