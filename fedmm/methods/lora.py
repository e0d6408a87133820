"""Plain local training of the adapters: FedAvg's and FedNano's step, and, with a proximal term, FedProx's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedmm.bounds import Mistake, NotNegative
from fedmm.model import Model
from fedmm.types import Anchored, Batch, Step


def lora(model: Model, batch: Batch, step: Step, *, use: Sequence[str] = ("shared",)) -> Iterator[Tensor]:
    """Answer cross-entropy, mean over the answer tokens of the batch."""
    yield model.answer_loss(batch, use)


def fedprox(
    model: Model,
    batch: Batch,
    step: Step,
    *,
    mu: NotNegative = 0.01,
    use: Sequence[str] = ("shared",),
    near: Anchored = ("shared",),
) -> Iterator[Tensor]:
    """Answer cross-entropy, and the sets `near` held near the received state, which is that of the shared set.

        CE + mu / 2 |theta - anchor|^2

    Source: Li et al. 2020, equation 2. With mu = 0 it is lora, bit for bit.
    """
    loss = model.answer_loss(batch, use)
    if mu:
        held = [(step.anchor[name], parameter) for of in near for name, parameter in model.edge.trainable(of).items()]
        distance = sum((parameter - anchor.to(parameter)).pow(2).sum() for anchor, parameter in held)
        loss = loss + mu / 2 * torch.as_tensor(distance)
    yield loss


def check(sets: Sequence[str], merges: object, *, near: Anchored = ()) -> Iterator[Mistake]:
    """What is held near the received state needs that state."""
    if near and "shared" not in sets:
        yield Mistake(
            "method.step.near",
            f"method.step.near is held near what the server sent, and method.sets={list(sets)} has no shared; name it, "
            "or set method=lora",
        )
