"""MLLM-FL's third stage: after an aggregation the server tunes the state on open data, supervised by the MLLM.

    loss = CE(y, p) + beta T^2 KL(q^(1/T) || p^(1/T))

on a small class-balanced set. p is the federated model's answer, q the MLLM's: its own answer distribution for the same
image and question, or, under a classifier, its scores of the class names. beta = 0 is plain fine-tuning on the set, the
control. What is best on held-out open data is returned, so where nothing helps the aggregate itself is.
Source: MLLM-FL 2024 (arXiv 2409.06067), global alignment; steps, rate and the early stop are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from fedmm import seeds
from fedmm.adapters.schema import fits
from fedmm.bounds import Count, Ge, NotNegative
from fedmm.edge.prepare import collate
from fedmm.edge.prepared import Prepared
from fedmm.losses import answer_cross_entropy, divergence
from fedmm.model import Model
from fedmm.types import Batch, State

Teacher = Callable[[Sequence[int], Batch], Float[Tensor, "B A V"]]
"""The MLLM's logits for the items of these indices, of which the batch is made."""


@dataclass(frozen=True)
class Aligned:
    """The state, and how it came about: loss and accuracy of answer tokens on the held-out set, before and after."""

    state: State
    steps: int  # taken; the state is that of `best_step`
    best_step: int  # 0: the aggregate
    loss_before: float
    loss_after: float
    accuracy_before: float
    accuracy_after: float
    reason: str = ""  # why it stopped early


# parameters: each after * is a setting of conf/align/; those before are what a stage is given
def align(
    model: Model,
    state: State,
    items: Sequence[Prepared],
    teacher: Teacher,
    held_out: Sequence[Prepared],
    seed: int,
    round: int,
    *,
    trains: Sequence[str] = ("shared.*",),
    steps: Count = 60,
    batch_size: Count = 32,
    lr: NotNegative = 1e-3,
    beta: NotNegative = 1.0,
    temperature: Annotated[float, Ge(0.01)] = 2.0,
    check_every: Count = 10,
    patience: Count = 2,
) -> Aligned:
    """Tune what `trains` names of `state`, and return the best of what was held against `held_out`.

    What else the shared set has, which no client sends, stays as it is. The state is checked every `check_every` steps;
    tuning stops when it was worse than the best `patience` times in a row, or is not finite. A step's batch is a
    function of (seed, round, step).
    """
    model.edge.load(model.edge.state() | state)
    model.edge.freeze_all_but(tuned([f"shared.{key}" for key in state], trains))
    parameters = [parameter for parameter in model.edge.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    loss, accuracy = first = measured(model, held_out, batch_size)
    best, best_step, worse, reason, step = state, 0, 0, "", 0
    for step in range(1, steps + 1):
        generator = seeds.generator(seed, "align", round, step)
        picks = torch.randint(len(items), (min(batch_size, len(items)),), generator=generator).tolist()
        batch = collate([items[i] for i in picks])
        logits_BAV = model(batch)
        labels_BA = batch.labels_BA.to(logits_BAV.device)
        total = answer_cross_entropy(logits_BAV, labels_BA)
        if beta:
            says_BAV = teacher(picks, batch).to(logits_BAV.device)
            total = total + beta * divergence(says_BAV, logits_BAV, labels_BA, temperature)
        optimizer.zero_grad(set_to_none=True)
        if torch.isfinite(total):
            total.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        now = measured(model, held_out, batch_size) if step % check_every == 0 or step == steps else None
        if not torch.isfinite(total) or (now and not now[0] < float("inf")):
            what, value = ("held-out loss", now[0]) if now and torch.isfinite(total) else ("loss", total.item())
            reason = f"the {what} is {value:g} at step {step}; lower align.step.lr={lr:g}"
            break
        if now and now[0] < loss:
            (loss, accuracy), best, best_step, worse = now, _of(model, state), step, 0
        elif now and (worse := worse + 1) >= patience:
            reason = f"no better on held-out open data since step {best_step}"
            break
    return Aligned(best, step, best_step, first[0], loss, first[1], accuracy, reason)


def tuned(names: Sequence[str], trains: Sequence[str]) -> list[str]:
    """Those that `trains` names. Raises ValueError where it names none."""
    if found := [name for name in names if fits(name, trains)]:
        return found
    raise ValueError(f"align.step.trains={list(trains)} names nothing; there are {', '.join(names)}")


def _of(model: Model, state: State) -> State:
    own = model.edge.state()
    return {name: own[name] for name in state}


@torch.no_grad()
def measured(model: Model, items: Sequence[Prepared], batch_size: int) -> tuple[float, float]:
    """Cross-entropy and accuracy over the answer tokens of some items."""
    loss, right, count = 0.0, 0, 0
    for start in range(0, len(items), batch_size):
        batch = collate(items[start : start + batch_size])
        logits_BAV, labels_BA = model(batch).cpu(), batch.labels_BA
        answer_BA = labels_BA >= 0
        loss += float(answer_cross_entropy(logits_BAV, labels_BA, reduction="sum"))
        right += int((logits_BAV.argmax(-1) == labels_BA)[answer_BA].sum())
        count += int(answer_BA.sum())
    return loss / count, right / count
