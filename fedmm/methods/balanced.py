"""Local training on a long tail: the loss counts a class for what it is worth, not for how often the client has it.

    balanced softmax    CE(z + log n)            n_c how often the client has class c
    logit adjustment    CE(z + tau log pi)       pi_c = (n_c + s) / sum (n + s)

Adjusted logits are for training only; answers are given by z. A class is a token at its place in the answer: the stop
token, which every answer has second, is no class among the first. Counts are the client's own and never leave it.
Source: Ren et al. 2020 (balanced softmax); Menon et al. 2021 (the logit-adjusted loss).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fedmm.bounds import Gt, NotNegative
from fedmm.edge.prepared import Prepared
from fedmm.losses import answer_cross_entropy
from fedmm.model import Model
from fedmm.types import Batch, State, Step


def counts(model: Model, items: Sequence[Prepared]) -> State:
    """How often each token stands at each place of the items' answers, up to the largest token there is: `answers`."""
    longest, largest = (
        max(values) for values in zip(*((len(i.answer), int(i.answer.max())) for i in items), strict=True)
    )
    counts_AV = torch.zeros(longest, largest + 1)
    for item in items:
        counts_AV[torch.arange(len(item.answer)), item.answer.long()] += 1
    return {"answers": counts_AV}


def balanced_softmax(model: Model, batch: Batch, step: Step, *, use: Sequence[str] = ("shared",)) -> Iterator[Tensor]:
    """Cross-entropy of `z + log n`. A class that the client lacks is not in its softmax, and gets no gradient."""
    logits_BAV = model(batch, use)
    yield _loss(logits_BAV, batch, _places(step, logits_BAV).log())


def logit_adjustment(
    model: Model,
    batch: Batch,
    step: Step,
    *,
    use: Sequence[str] = ("shared",),
    tau: Annotated[float, Gt(0)] = 1.0,
    smoothing: NotNegative = 1.0,  # add-one; with none, a class that the client lacks would be as for balanced softmax
) -> Iterator[Tensor]:
    """Cross-entropy of `z + tau log pi`, where no class is impossible.

    The paper knows no client who lacks a class; here pi is smoothed by `smoothing` examples of every class, so that an
    absent one stays in the softmax and is still pushed down, by less than it would be without adjustment. With
    `smoothing=0` and `tau=1` it is balanced softmax.
    """
    logits_BAV = model(batch, use)
    smooth_AV = _places(step, logits_BAV) + smoothing
    yield _loss(logits_BAV, batch, tau * (smooth_AV / smooth_AV.sum(-1, keepdim=True)).log())


def _places(step: Step, logits_BAV: Float[Tensor, "B A V"]) -> Float[Tensor, "A V"]:
    """The counts at this batch's places, for every class of the logits."""
    _, A, V = logits_BAV.shape
    counts_AV = step.scratch["begin"]["answers"][:A]
    return F.pad(counts_AV, (0, V - counts_AV.shape[1])).to(logits_BAV.device)


def _loss(logits_BAV: Float[Tensor, "B A V"], batch: Batch, shift_AV: Float[Tensor, "A V"]) -> Float[Tensor, ""]:
    labels_BA: Int[Tensor, "B A"] = batch.labels_BA.to(logits_BAV.device)
    return answer_cross_entropy(logits_BAV.float() + shift_AV, labels_BA)
