"""FedDAT's local step written out, for adapters at the edge and inside the LLM, and one call of ours beside it."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from fedmm import seeds, tree
from fedmm.edge.prepare import batches
from fedmm.methods.feddat import feddat
from fedmm.train import train

ADAMW = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.0)
T = 3.0


def run(model, items, make_optimizer=ADAMW, **options):
    settings = {
        "make_optimizer": make_optimizer,
        "seed": 0,
        "round": 1,
        "rounds": 2,
        "client": 0,
        "epochs": 2,
        "batch_size": 4,
    }
    return train(model, items, functools.partial(feddat, **options), anchor=model.edge.state(), **settings)


def written_out(model, items, alpha, beta, make_optimizer=ADAMW, share=1.0, ramp=0.0):
    """The paper's local step, in the words of plain torch: one optimiser for each adapter."""
    shared, local = (make_optimizer(list(model.edge.trainable(name).values())) for name in ("shared", "local"))
    done, steps = 0, 4  # of the first of two rounds
    for epoch in range(2):
        for batch in batches(items, 4, seeds.generator(0, f"batches/{epoch}", 1, 0)):
            done += 1
            rise = min(1.0, done / steps / 2 / ramp) if ramp else 1.0
            labels = batch.labels_BA.flatten()
            z_dat, z_s = (model(batch, use).flatten(0, 1) for use in (("local", "frozen"), ("shared",)))
            asked = labels != -100
            student, teacher = ((z[asked] / T).log_softmax(-1) for z in (z_s, z_dat))
            loss_s = F.cross_entropy(z_s, labels) + rise * alpha * (T**2 * F.kl_div(
                student, teacher.detach(), reduction="batchmean", log_target=True
            ))  # fmt: skip
            loss_dat = F.cross_entropy(z_dat, labels) + rise * beta * (T**2 * F.kl_div(
                teacher, student.detach(), reduction="batchmean", log_target=True
            ))  # fmt: skip
            for optimizer, loss in ((shared, loss_s), (local, loss_dat)):
                optimizer.zero_grad()
                (share * loss).backward()
                optimizer.step()


def states(model):
    return {name: tree.digest(model.edge.state(name)) for name in ("shared", "local", "frozen")}
