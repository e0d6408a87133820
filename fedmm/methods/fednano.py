"""FedNano's local step: plain training, and then how sure the client is of each coordinate, for Fisher merging.

    F = mean over samples of (d log p(answer | image, question) / d theta)^2

Squared per sample, not the square of a batch's mean; log p is the sum over the answer's tokens; theta are the trained
adapters; the answers are the data's own (the empirical Fisher). The variant `ef` takes what training already computed:
the mean over steps of the squared batch gradient (clipped, where training clips), which needs no further pass and
estimates another quantity.
Source: FedNano 2025 and its FedNano-EF, as far as they are known; Matena & Raffel 2022, section 2.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedmm import tree
from fedmm.edge.prepare import Prepared, collate
from fedmm.losses import answer_cross_entropy
from fedmm.methods.lora import lora
from fedmm.model import Model
from fedmm.types import Batch, Embeds, State, Step


def fednano_ef(model: Model, batch: Batch, step: Step) -> Iterator[Tensor]:
    """Plain training that adds up its squared gradients on the way."""
    yield from lora(model, batch, step)
    total = step.kept.setdefault("squares", {})  # the loop is back: the gradients of this step still stand
    for name, parameter in model.edge.trainable("shared").items():
        square = parameter.grad.pow(2) if parameter.grad is not None else torch.zeros_like(parameter)
        total[name] = total[name] + square if name in total else square


def mean_of_squares(model: Model, items: Sequence[Prepared], step: Step) -> State:
    """`fednano_ef`'s Fisher: the mean over the round's steps of the squared gradient."""
    return {name: square / step.steps for name, square in step.kept["squares"].items()}


def diagonal_fisher(
    model: Model, items: Sequence[Prepared], step: Step, *, batch_size: int = 32, samples: int | None = None
) -> State:
    """The diagonal Fisher at the trained adapters over the first `samples` of the client's examples (None: all).

    Through the LLM goes one batch at a time; the edge's share of each sample's gradient is taken alone, so that it
    can be squared alone. Costs one more pass over the data.
    """
    parameters = model.edge.trainable("shared")
    total: State = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    items = items[:samples]
    for start in range(0, len(items), batch_size):
        chunk = items[start : start + batch_size]
        whole = collate(chunk)
        T = whole.tokens_BT.shape[1]
        singles = [_padded(model, item, T) for item in chunk]
        joined_BTD = torch.cat([single.detach() for single in singles]).requires_grad_()
        logits_BAV = model.llm(Embeds(joined_BTD), whole.mask_BT, whole.keep_BA)
        nll = answer_cross_entropy(logits_BAV, whole.labels_BA, reduction="sum")
        (grad_BTD,) = torch.autograd.grad(nll, joined_BTD)
        for b, single in enumerate(singles):
            grads = torch.autograd.grad(single, list(parameters.values()), grad_BTD[b : b + 1], allow_unused=True)
            for name, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    total[name] += grad.pow(2)
    return tree.scale(total, 1 / len(items))


def _padded(model: Model, item: Prepared, T: int) -> Tensor:
    """One sample's embeddings with their own graph, brought to the batch's T positions."""
    embeds, _ = model.edge(collate([item]))
    dense_1TD = embeds.dense()
    return torch.nn.functional.pad(dense_1TD, (0, 0, 0, T - dense_1TD.shape[1]))
