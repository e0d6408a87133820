"""Losses on answer logits. The same functions run at the client and at the host, so their bits agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fedmm.types import IGNORE


@dataclass(frozen=True)
class Mutual:
    """How much each branch learns from what the others say: a weight for each branch, and the temperature of both."""

    weights: tuple[float, ...]
    temperature: float = 1.0


def answer_cross_entropy(
    logits_BAV: Float[Tensor, "B A V"], labels_BA: Int[Tensor, "B A"], reduction: str = "mean"
) -> Float[Tensor, ""]:
    """Cross-entropy over answer tokens; `mean` over all of the batch, or `sum`. Padded positions count nothing."""
    return F.cross_entropy(
        logits_BAV.flatten(0, 1).float(), labels_BA.flatten(), ignore_index=IGNORE, reduction=reduction
    )


def branch_losses(
    logits: Sequence[Float[Tensor, "B A V"]],
    labels_BA: Int[Tensor, "B A"],
    mutual: Mutual | None = None,
    reduction: str = "mean",
) -> tuple[Float[Tensor, ""], ...]:
    """The loss of each branch: cross-entropy, and with `mutual` its distance from the other branches.

        loss_i = CE(z_i) + w_i T^2 mean over j != i of KL(softmax(sg(z_j) / T) || softmax(z_i / T))

    Nothing flows into z_j, so that each loss trains its own branch only.
    Source: Zhang et al. 2018 (deep mutual learning), equations 4 and 9; Hinton et al. 2015 for T^2.
    """
    if mutual and len(mutual.weights) != len(logits):
        raise ValueError(f"{len(mutual.weights)} weights of mutual learning for {len(logits)} branches")
    losses = [answer_cross_entropy(z_BAV, labels_BA, reduction) for z_BAV in logits]
    if mutual is None or len(logits) == 1:
        return tuple(losses)
    for i, weight in enumerate(mutual.weights):
        if weight:
            others = [divergence(z, logits[i], labels_BA, mutual.temperature) for j, z in enumerate(logits) if j != i]
            losses[i] = losses[i] + weight * torch.stack(others).mean()
    return tuple(losses)


def divergence(
    teacher_BAV: Float[Tensor, "B A V"],
    student_BAV: Float[Tensor, "B A V"],
    labels_BA: Int[Tensor, "B A"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """`T^2 KL(softmax(sg(teacher) / T) || softmax(student / T))`, mean over the answer tokens."""
    answer_BA = labels_BA != IGNORE
    teacher_NV = F.log_softmax(teacher_BAV[answer_BA].detach().float() / temperature, dim=-1)
    student_NV = F.log_softmax(student_BAV[answer_BA].float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student_NV, teacher_NV, reduction="batchmean", log_target=True)
