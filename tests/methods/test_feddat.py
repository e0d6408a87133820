"""FedDAT against a written-out loop, and what its published code got wrong: who trains when, and what is evaluated."""

from __future__ import annotations

import functools

import pytest
import torch
from feddat_loop import run, states, written_out
from helpers import PROMPT, served, some_examples, visiting

from fedmm import seeds
from fedmm.edge import frozen_modules
from fedmm.edge.prepare import encode, prepare
from fedmm.link.remote import RemoteLLM
from fedmm.methods.feddat import progress
from fedmm.model import SplitModel
from fedmm.types import Step


def started(llava, llm):
    built, processor = frozen_modules.build(
        frozen_modules.take(*llava), sets=("shared", "local", "frozen"), rank=4, alpha=8.0
    )
    for name in ("shared", "local", "frozen"):
        built.reset(seeds.generator(0, "adapters"), name)
    built.freeze_all_but(["shared.*", "local.*"])
    return SplitModel(built, llm), encode(built, prepare(some_examples(6), processor, PROMPT))


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
