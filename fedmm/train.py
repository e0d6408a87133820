"""A client's local training. The loop knows no method: `for batch: for loss in method(...): step(loss)`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedmm import seeds
from fedmm.edge.prepare import batches
from fedmm.edge.prepared import Prepared, Sampling
from fedmm.model import Model
from fedmm.types import Batch, State, Step

Method = Callable[[Model, Batch, Step], Iterator[Tensor]]
Begin = Callable[[Model, Sequence[Prepared]], State]
Schedule = Literal["constant", "cosine"]
MakeOptimizer = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Trained:
    """What a round of local training left: the last step's place (with the method's memory), losses, seconds."""

    last: Step
    first_loss: float
    mean_loss: float
    seconds: float


def rate_share(schedule: Schedule, round: int, rounds: int) -> float:
    """The share of the learning rate that a round uses: 1, or a half cosine from 1 in the first round towards 0.

    Averaging clients lowers the noise of their steps, a single model has only the rate for that.
    """
    return 0.5 * (1 + math.cos(math.pi * (round - 1) / rounds)) if schedule == "cosine" else 1.0


# parameters: each after * is a setting of a run, or where the round stands in it
def train(
    model: Model,
    items: Sequence[Prepared],
    method: Method,
    *,
    make_optimizer: MakeOptimizer,
    anchor: State,
    seed: int,
    round: int,
    rounds: int,
    client: int,
    epochs: int = 1,
    batch_size: int = 32,
    schedule: Schedule = "constant",
    phase: tuple[int, int] | None = None,
    clip_norm: float | None = None,
    begin: Begin | None = None,
    sampling: Sampling | None = None,
) -> Trained:
    """Train the edge's unfrozen adapters for `epochs` over `items`, with a fresh optimiser.

    The order of batches is a function of (seed, round, client, epoch). `schedule` sets the rate of the whole round, by
    its place in the run or in its `phase`; `clip_norm` bounds the norm of each gradient over all parameters. What the
    method's `begin` finds in the items is in `step.scratch["begin"]` from the first step on; `sampling` draws the order
    of an epoch. Raises ValueError when a loss is not finite: training on would only spread it.
    """
    began = time.perf_counter()
    parameters = [parameter for parameter in model.edge.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(parameters)
    for group in optimizer.param_groups:
        group["lr"] *= rate_share(schedule, *(phase or (round, rounds)))
    per_epoch = math.ceil(len(items) / batch_size)
    kept: dict[str, State] = {} if begin is None else {"begin": begin(model, items)}
    losses: list[float] = []
    step = Step(round, rounds, 0, epochs * per_epoch, anchor, kept)
    for epoch in range(epochs):
        generator = seeds.generator(seed, f"batches/{epoch}", round, client)
        for i, batch in enumerate(batches(items, batch_size, generator, sampling)):
            step = Step(round, rounds, epoch * per_epoch + i + 1, epochs * per_epoch, anchor, kept)
            for loss in method(model, batch, step):
                if not torch.isfinite(loss):
                    raise ValueError(f"client {client}, round {round}: the loss is {loss.item()}; lower optimizer.lr")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
                optimizer.step()
                losses.append(loss.item())
    return Trained(step, losses[0], sum(losses) / len(losses), time.perf_counter() - began)
