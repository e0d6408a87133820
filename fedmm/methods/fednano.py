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
from fedmm.bounds import Count
from fedmm.edge.prepare import collate
from fedmm.edge.prepared import Prepared
from fedmm.losses import answer_cross_entropy
from fedmm.methods.lora import lora
from fedmm.model import Model, SplitModel
from fedmm.types import Batch, Embeds, Segment, Squares, State, Step


def fednano_ef(model: Model, batch: Batch, step: Step) -> Iterator[Tensor]:
    """Plain training that adds up its squared gradients on the way."""
    yield from lora(model, batch, step)
    total = step.scratch.setdefault("squares", {})  # the loop is back: the gradients of this step still stand
    for name, parameter in model.edge.trainable("shared").items():
        square = parameter.grad.pow(2) if parameter.grad is not None else torch.zeros_like(parameter)
        total[name] = total[name] + square if name in total else square


def mean_of_squares(model: Model, items: Sequence[Prepared], step: Step) -> State:
    """`fednano_ef`'s Fisher: the mean over the round's steps of the squared gradient."""
    return {name: square / step.steps for name, square in step.scratch["squares"].items()}


def diagonal_fisher(
    model: Model, items: Sequence[Prepared], step: Step, *, batch_size: Count = 32, samples: Count | None = None
) -> State:
    """The diagonal Fisher at the trained adapters over `samples` of the client's examples (None: all), evenly spaced:
    a partition may leave them kind by kind.

    The LLM gives, in one pass a batch, each term's gradient by h and the sum over samples of the squared one by B.
    A's is formed here, where h is: `dL_i/dA = (dL_i/dh)^T x`, sample by sample. Costs one more pass over the data.
    With adapters inside the LLM, or no LLM, that pass takes one sample at a time.
    """
    parameters = model.edge.trainable("shared")
    total: State = {name: torch.zeros_like(parameter, device="cpu") for name, parameter in parameters.items()}
    if samples is not None and samples < len(items):
        items = [items[i * len(items) // samples] for i in range(samples)]
    if not (isinstance(model, SplitModel) and model.edge.terms_only):
        _add_singly(total, model, items)
        return tree.scale(total, 1 / len(items))
    for start in range(0, len(items), batch_size):
        chunk = items[start : start + batch_size]
        whole = collate(chunk)
        with torch.no_grad():
            embeds, mask_BT = model.edge(whole)
        found = model.llm.squares(embeds, mask_BT, whole.keep_BA, whole.labels_BA)
        for term, (grad_NR, squares_DR) in zip(embeds.terms, found.terms, strict=True):
            total[f"{term.segment.kind}.up"] += squares_DR
            for grad, x in zip(
                _by_sample(grad_NR, term.segment, whole),
                _by_sample(term.segment.x_ND, term.segment, whole),
                strict=True,
            ):
                total[f"{term.segment.kind}.down"] += (grad.T @ x).pow(2)
        if found.image_ND is not None:
            _add_inner(total, model, chunk, embeds, found)
    return tree.scale(total, 1 / len(items))


def _by_sample(packed_N: Tensor, segment: Segment, batch: Batch) -> tuple[Tensor, ...]:
    """What is packed over a batch, sample by sample."""
    B, T = batch.tokens_BT.shape
    return packed_N.split(torch.bincount(segment.positions_N // T, minlength=B).tolist())


def _add_inner(total: State, model: SplitModel, chunk: Sequence[Prepared], embeds: Embeds, found: Squares) -> None:
    """Add the squares of what trains inside encoder and connector: each sample's graph is made and used alone."""
    inner = {
        name: p
        for name, p in model.edge.trainable("shared").items()
        if name.startswith(("encoder.", "connector.")) and p.requires_grad
    }
    if not inner:
        return
    whole = collate(chunk)
    i = next(i for i, term in enumerate(embeds.terms) if term.segment.kind == "image")
    segment, (grad_NR, _) = embeds.terms[i].segment, found.terms[i]
    assert found.image_ND is not None
    rows = zip(chunk, _by_sample(found.image_ND, segment, whole), _by_sample(grad_NR, segment, whole), strict=True)
    for item, grad_ND, grad_h in rows:
        if not item.sees:
            continue
        single, _ = model.edge(collate([item]))
        outputs = [single.terms[i].segment.x_ND, single.terms[i].h_NR]
        grads = torch.autograd.grad(outputs, list(inner.values()), [grad_ND, grad_h], allow_unused=True)
        for name, grad in zip(inner, grads, strict=True):
            if grad is not None:
                total[name] += grad.pow(2)


def _add_singly(total: State, model: Model, items: Sequence[Prepared]) -> None:
    """Add the squares of everything that trains, by a backward for each sample."""
    trained = {name: p for name, p in model.edge.trainable("shared").items() if p.requires_grad}
    for item in items:
        batch = collate([item])
        logits_BAV = model(batch)
        loss = answer_cross_entropy(logits_BAV, batch.labels_BA.to(logits_BAV.device), reduction="sum")
        grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)  # of text alone, no encoder
        for name, grad in zip(trained, grads, strict=True):
            total[name] += 0.0 if grad is None else grad.pow(2).cpu()
