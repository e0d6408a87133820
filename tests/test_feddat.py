"""FedDAT against a written-out loop, and what its published code got wrong: who trains when, and what is evaluated."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import PROMPT, served, some_examples, visiting

from fedmm import seeds, tree
from fedmm.edge import frozen_modules
from fedmm.edge.prepare import batches, encode, prepare
from fedmm.link.remote import RemoteLLM
from fedmm.methods.feddat import feddat, progress
from fedmm.model import SplitModel
from fedmm.train import train
from fedmm.types import Step

ADAMW = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.0)
T = 3.0


def started(llava, llm):
    built, processor = frozen_modules.build(
        frozen_modules.take(*llava), sets=("shared", "local", "frozen"), rank=4, alpha=8.0
    )
    for name in ("shared", "local", "frozen"):
        built.reset(seeds.generator(0, "adapters"), name)
    built.freeze_all_but(["shared.*", "local.*"])
    return SplitModel(built, llm), encode(built, prepare(some_examples(6), processor, PROMPT))


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


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0)])
def test_the_generator_equals_a_written_out_loop(llava, local_llm, alpha, beta):
    model, items = started(llava, local_llm)
    before = states(model)
    run(model, items, alpha=alpha, beta=beta)
    other, _ = started(llava, local_llm)
    written_out(other, items, alpha, beta)
    assert states(model) == states(other)
    assert states(model)["frozen"] == before["frozen"]
    assert all(states(model)[name] != before[name] for name in ("shared", "local"))


@pytest.mark.parametrize("options", [{"ramp": 0.25}, {"ramp": 1.0}, {"share": 0.5}])
def test_ramp_and_share_equal_a_written_out_loop(llava, local_llm, options):
    """By plain descent: AdamW hardly sees how large a loss is."""
    descent = functools.partial(torch.optim.SGD, lr=0.1)
    model, items = started(llava, local_llm)
    run(model, items, make_optimizer=descent, alpha=0.5, beta=2.0, **options)
    other, _ = started(llava, local_llm)
    written_out(other, items, 0.5, 2.0, descent, **options)
    assert states(model) == states(other)


@pytest.mark.parametrize("loss_at", ["auto", "client"])
@pytest.mark.parametrize("encoding", ["factored", "dense"])
def test_it_trains_alike_through_the_link(llava, local_llm, encoding, loss_at):
    near, items = started(llava, local_llm)
    run(near, items)
    far, _ = started(llava, local_llm)
    with served(llava, far.edge, local_llm) as (host, _), visiting(host) as session:
        run(SplitModel(far.edge, RemoteLLM(session, encoding=encoding), loss_at), items)
    assert states(near) == states(far)


def test_the_settings_do_what_they_say(llava, local_llm):
    def after(**options):
        model, items = started(llava, local_llm)
        run(model, items, **options)
        return states(model)

    plain = after(alpha=0.0, beta=0.0)
    assert after(alpha=0.0)["shared"] == plain["shared"] and after(alpha=0.0)["local"] != plain["local"]
    assert after(beta=0.0)["local"] == plain["local"] and after(beta=0.0)["shared"] != plain["shared"]
    assert after(ramp=1.0) not in (plain, after())
    assert after(share=0.5) != after()
    assert after(temperature=1.0) != after()


def test_progress_runs_from_the_first_step_to_one():
    assert progress(Step(1, 2, 1, 4, {})) == 0.125
    assert progress(Step(2, 2, 4, 4, {})) == 1.0
