"""FedAvg with low-rank adapters beside a frozen LLM, from top to bottom: no network, no Flower, no configuration.

    python examples/fedavg_by_hand.py     computes what     fedmm run arm=fedavg     computes, bit for bit

A round: every client starts from the server's adapters, trains them on its own examples, and returns the change; the
server adds the mean of the changes, weighted by numbers of examples. Source: McMahan et al. 2017, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from fedmm import seeds, tree
from fedmm.aggregate.mean import mean
from fedmm.data.partition import dirichlet
from fedmm.data.scenes import scenes
from fedmm.data.views import Some
from fedmm.edge import frozen_modules
from fedmm.edge.prepare import batches, encode, prepare
from fedmm.edge.prepared import Prepared
from fedmm.llm.loading import tiny
from fedmm.llm.local import LocalLLM
from fedmm.losses import answer_cross_entropy
from fedmm.model import SplitModel
from fedmm.types import Example, State, Update


def federation(
    train: Sequence[Example],
    *,
    seed: int = 0,
    clients: int = 5,
    per_round: int = 5,
    rounds: int = 8,
    batch_size: int = 32,
) -> Iterator[tuple[State, list[Update]]]:
    """Yields the server's adapters after each round, and the updates they were merged from."""
    backbone = tiny(prompt="<image> {question}")
    frozen = frozen_modules.take(backbone.model, backbone.processor)  # encoder, connector, token table
    edge, processor = frozen_modules.build(frozen)  # the same with adapters, which alone are trained
    model = SplitModel(edge, LocalLLM(backbone.model))

    shares = dirichlet(train, clients, seeds.generator(seed, "partition"))
    items = [encode(edge, prepare(Some(train, share), processor, backbone.prompt)) for share in shares]

    edge.reset(seeds.generator(seed, "adapters"))
    current = edge.state()
    for round in range(1, rounds + 1):
        rate = 6e-3 * 0.5 * (1 + math.cos(math.pi * (round - 1) / rounds))
        updates = []
        for client in seeds.sample_clients(seed, round, clients, per_round):
            edge.load(current)
            order = seeds.generator(seed, "batches/0", round, client)  # of epoch 0, the only one
            loss = train_locally(model, items[client], rate, batch_size, order)
            change = tree.subtract(edge.state(), current)
            updates.append(Update(client, change, len(items[client]), metrics={"loss": loss}))
        current, _ = mean(current, updates, {})
        yield current, updates


def train_locally(
    model: SplitModel, items: Sequence[Prepared], rate: float, batch_size: int, order: torch.Generator
) -> float:
    """One epoch of AdamW on the adapters; returns the mean loss of its steps."""
    parameters = [*model.edge.trainable("shared").values()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses = []
    for batch in batches(items, batch_size, order):
        logits_BAV = model(batch)  # at the answer's positions
        loss = answer_cross_entropy(logits_BAV, batch.labels_BA)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def main() -> None:
    torch.set_num_threads(1)  # sums depend on their number
    for round, (state, updates) in enumerate(federation(scenes()["train"]), 1):
        loss = sum(update.metrics["loss"] for update in updates) / len(updates)
        print(f"round {round}: loss {loss:.4f}, state {tree.digest(state)[:12]}")


if __name__ == "__main__":
    main()
