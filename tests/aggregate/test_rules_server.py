"""FedAvgM, FedAdam, FedYogi against the paper's lines written out, number by number."""

from __future__ import annotations

import math

import pytest
import torch

from fedmm import tree
from fedmm.aggregate.adaptive import fedadam, fedyogi
from fedmm.aggregate.mean import mean
from fedmm.aggregate.momentum import fedavgm
from fedmm.types import Update

SERVER = [fedavgm, fedadam, fedyogi]
DELTAS = [(0.5, -0.25), (0.25, 0.0), (-1.0, 3.0), (0.0, 0.0)]  # of two clients with 1 and 3 examples, round by round


def rounds(rule, deltas=DELTAS, **settings):
    """One weight from 1.0, and the memory after the last round."""
    state, memory = {"w": torch.ones(1)}, {}
    for pair in deltas:
        given = [Update(k, {"w": torch.tensor([delta])}, (1, 3)[k]) for k, delta in enumerate(pair)]
        state, memory = rule(state, given, memory, **settings)
    return state["w"].item(), memory


def test_fedavgm_written_out():
    w, v = 1.0, 0.0
    for one, three in DELTAS:
        v = 0.9 * v + (one + 3 * three) / 4
        w = w + 0.5 * v
    got, memory = rounds(fedavgm, lr=0.5)
    assert (got, memory["velocity/w"].item()) == pytest.approx((w, v), abs=1e-6)


@pytest.mark.parametrize("rule", [fedadam, fedyogi])
def test_adaptive_rules_written_out(rule):
    """Algorithm 2: v starts at tau^2, and nothing corrects the bias."""
    w, m, v, tau = 1.0, 0.0, 0.01**2, 0.01
    for one, three in DELTAS:
        d = (one + 3 * three) / 4
        m = 0.8 * m + (1 - 0.8) * d
        if rule is fedadam:
            v = 0.95 * v + (1 - 0.95) * d * d
        elif v != d * d:
            v = v - (1 - 0.95) * d * d * (1 if v > d * d else -1)
        w = w + 0.1 * m / (math.sqrt(v) + tau)
    got, memory = rounds(rule, lr=0.1, beta1=0.8, beta2=0.95, tau=tau)
    assert (got, memory["first/w"].item(), memory["second/w"].item()) == pytest.approx((w, m, v), abs=1e-6)


def test_adam_forgets_a_loud_round_sooner_than_yogi():
    """d^2 is 0.0625, then next to nothing: Adam's v decays by its own size, Yogi's by the small d^2's."""
    quiet = [(1.0, 0.0), *[(0.01, 0.01)] * 50]
    adam, yogi = (rounds(rule, quiet)[1]["second/w"].item() for rule in (fedadam, fedyogi))
    assert adam == pytest.approx(0.01 * 0.0625 * 0.99**50, rel=0.2)
    assert yogi == pytest.approx(0.01 * 0.0625, rel=0.2)


def test_no_momentum_and_a_rate_of_one_is_the_mean_to_the_bit():
    state = {"w": torch.randn(7, generator=torch.Generator().manual_seed(0))}
    given = [Update(k, {"w": torch.full((7,), 0.3 * k)}, k + 1) for k in range(3)]
    merged, memory = fedavgm(state, given, {"velocity/w": torch.ones(7)}, momentum=0.0)
    assert tree.digest(merged) == tree.digest(mean(state, given, {})[0])
    assert not torch.equal(memory["velocity/w"], torch.ones(7))


@pytest.mark.parametrize("rule", SERVER)
def test_names_in_memory_cannot_collide(rule):
    """Also not where a tensor is called like a slot."""
    state = {name: torch.full((2,), float(i)) for i, name in enumerate(("w", "first/w", "second/w", "velocity/w"))}
    given = [Update(0, {name: 0.1 * (tensor + 1) for name, tensor in state.items()}, 1)]
    _, memory = rule(state, given, {})
    alone = [rule({name: t}, [Update(0, {name: given[0].delta[name]}, 1)], {})[1] for name, t in state.items()]
    assert tree.digest(memory) == tree.digest({name: t for each in alone for name, t in each.items()})
    assert len(memory) == sum(map(len, alone))


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        (fedavgm, {"momentum": 1.0}),
        (fedavgm, {"lr": 0.0}),
        (fedadam, {"beta1": 1.0}),
        (fedadam, {"tau": 0.0}),
        (fedyogi, {"beta2": -0.1}),
        (fedyogi, {"lr": -1.0}),
    ],
)
def test_settings_out_of_range_are_refused(rule, settings):
    with pytest.raises(ValueError, match=f"rule.{next(iter(settings))} .*got "):
        rule({}, [], {}, **settings)
