"""FedDPA-F: a shared adapter is federated first, and then each client tunes a local one on top of it.

    rounds 1 .. R - tune         shared alone acts, is trained and averaged
    rounds R - tune + 1 .. R     local starts as the shared one; both act, weight 1/2 each, local alone is trained

Until it is trained a local adapter is the shared one, so that half of each is the shared one whole: a client is scored
with both at any time. Nothing is sent while local adapters are tuned.
Source: Yang et al. 2024 (FedDPA, arXiv 2403.19211), variant F. Their weight of the two, made for each instance from its
likeness to the client's own data, is left out: it is 1/2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from fedmm.adapters.schema import Schema
from fedmm.model import Model
from fedmm.types import Batch, Step


def feddpa(
    model: Model,
    batch: Batch,
    step: Step,
    *,
    tune: int = 1,
    federated: Sequence[str] = ("shared",),
    tuned: Sequence[str] = ("shared", "local"),
) -> Iterator[Tensor]:
    """Answer cross-entropy of the federated sets, in the last `tune` rounds of the tuned ones."""
    yield model.answer_loss(batch, tuned if step.round > step.rounds - tune else federated)


def schema(round: int, rounds: int, *, tune: int = 1) -> Schema:
    """The shared adapter trains and travels; in the last `tune` rounds the local one trains, and nothing travels.

    Each phase has the schedule of learning rates to itself: at the tail of a cosine nothing would be tuned.
    Raises ValueError where nothing would be federated.
    """
    if not 0 <= tune < rounds:
        raise ValueError(f"method.step.tune={tune} must be from 0 to below rounds={rounds}, or nothing is federated")
    federated = rounds - tune
    if round > federated:
        return Schema(("local.*",), (), (round - federated, tune))
    return Schema(("shared.*",), ("shared.*",), (round, federated))
