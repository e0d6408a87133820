"""One pass of the frozen LLM: of a step's branches, or of several steps as one batch; with gradients or without."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmm.llm.local import LocalLLM
from fedmm.serving.footprint import Shape
from fedmm.types import Embeds

Values = Callable[[list[Tensor]], Tensor]
"""What is differentiated, from a step's logits by branch."""


@dataclass(frozen=True)
class Rows:
    """One branch of a step as it enters the LLM."""

    embeds_BTD: Tensor
    mask_BT: Tensor
    keep_BA: Tensor


@dataclass(frozen=True)
class Passed:
    """What a pass gave: logits by branch, values of them, gradients by each branch's embeddings, its share of time."""

    logits: list[Tensor]
    values: Tensor
    grads: list[Tensor]
    seconds: float


@dataclass(eq=False)
class Begun:
    """A client's forward that waits for its backward: its inputs and logits, and its graph where that is kept."""

    client: int
    rows: Rows
    logits_BAV: Tensor
    seconds: float
    graph: tuple[Tensor, Tensor] | None = None  # embeddings and logits
    graph_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        """What it takes beside its graph."""
        return self.rows.embeds_BTD.nbytes + self.logits_BAV.nbytes


def run_together(
    llm: LocalLLM, steps: Sequence[Sequence[Rows]], values: Sequence[Values], *, grad: bool
) -> list[Passed]:
    """Pass steps, each a list of branches, together. With `grad` differentiate the sum of each step's values."""
    began = time.perf_counter()
    with torch.set_grad_enabled(grad):
        leaves = [[branch.embeds_BTD.detach().requires_grad_(grad) for branch in branches] for branches in steps]
        logits = _logits(llm, steps, leaves)
        of_steps = [value(own) for value, own in zip(values, logits, strict=True)]
        grads = iter(_gradients(of_steps, [leaf for own in leaves for leaf in own]) if grad else ())
    finish(llm)
    rows = [sum(len(branch.embeds_BTD) for branch in branches) for branches in steps]
    seconds = (time.perf_counter() - began) / max(1, sum(rows))
    return [
        Passed(
            [branch.detach() for branch in own],
            value.detach(),
            [next(grads) for _ in own] if grad else [],
            seconds * count,
        )
        for own, value, count in zip(logits, of_steps, rows, strict=True)
    ]


def finish(llm: LocalLLM) -> None:
    """A pass is over when the device is done with it, not when its kernels are under way."""
    if llm.device.type == "cuda":
        torch.cuda.synchronize(llm.device)


def shape_of(branches: Sequence[Rows]) -> Shape:
    """The size of branches that pass the LLM, as one job of them is counted."""
    return Shape(
        rows=sum(len(branch.embeds_BTD) for branch in branches),
        positions=max(branch.embeds_BTD.shape[1] for branch in branches),
        answers=max(branch.keep_BA.shape[1] for branch in branches),
    )


def with_graph(llm: LocalLLM, rows: Rows) -> tuple[Tensor, Tensor, int]:
    """The embeddings as a leaf, the logits, and the bytes that the graph between them holds beside the weights."""
    weights = {tensor.untyped_storage().data_ptr() for part in (llm.decoder, llm.head) for tensor in part.parameters()}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would hold its own node where an operation saves its output: a leak

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        leaf = rows.embeds_BTD.detach().requires_grad_()
        logits_BAV = llm(Embeds.whole(leaf), rows.mask_BT, rows.keep_BA)
    return leaf, logits_BAV, sum(saved.values())


def _logits(llm: LocalLLM, steps: Sequence[Sequence[Rows]], leaves: list[list[Tensor]]) -> list[list[Tensor]]:
    """The logits of each step's branches: branch by branch where there is one step, else as one batch."""
    if len(steps) == 1:
        pairs = zip(leaves[0], steps[0], strict=True)
        return [[llm(Embeds.whole(leaf), branch.mask_BT, branch.keep_BA) for leaf, branch in pairs]]
    branches = [branch for step in steps for branch in step]
    T, A = max(branch.mask_BT.shape[1] for branch in branches), max(branch.keep_BA.shape[1] for branch in branches)
    flat = [leaf for own in leaves for leaf in own]
    embeds_BTD = torch.cat([F.pad(leaf, (0, 0, 0, T - leaf.shape[1])) for leaf in flat])
    mask_BT = torch.cat([F.pad(branch.mask_BT, (0, T - branch.mask_BT.shape[1])) for branch in branches])
    keep_BA = torch.cat([F.pad(branch.keep_BA, (0, A - branch.keep_BA.shape[1])) for branch in branches])
    merged = iter(llm(Embeds.whole(embeds_BTD), mask_BT, keep_BA).split([len(leaf) for leaf in flat]))
    return [[next(merged)[:, : branch.keep_BA.shape[1]] for branch in step] for step in steps]


def _gradients(values: list[Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(torch.stack([value.sum() for value in values]).sum(), leaves, materialize_grads=True)
