"""What clients of one process share, and that nothing of one is in it for another; what a mistake says of itself."""

from __future__ import annotations

from typing import Annotated

import pytest
import torch

from fedmm import seeds, tree
from fedmm.bounds import Ge, Gt, Lt, hold, outside
from fedmm.config import targets
from fedmm.config.composition import check, compose, load
from fedmm.config.settings import ConfigError
from fedmm.edge import frozen_modules
from fedmm.edge.nano_edge import Lora


@pytest.fixture
def parts(llava):
    return frozen_modules.take(*llava)


def test_two_clients_on_one_base_change_nothing_for_each_other(parts):
    base = frozen_modules.base(parts)
    before, table = tree.digest(dict(base.connector.state_dict())), base.table.clone()
    (one, its), (other, theirs) = (frozen_modules.build(parts, encoder=False, shared=base, rank=2) for _ in "ab")
    assert one.connector is other.connector is base.connector and its is theirs is base.processor
    for edge, seed in ((one, 1), (other, 2)):
        edge.reset(seeds.generator(seed, "adapters"))
    own = other.state()
    width = base.table.shape[1]
    one.fold({f"{kind}.folded": torch.ones(width, width) for kind in ("image", "text")}, 0.5)
    with torch.no_grad():
        for parameter in one.trainable("shared").values():
            parameter.add_(1.0)
    assert tree.digest(other.state()) == tree.digest(own)
    assert other.connector is base.connector and other.table_VD is base.table
    assert tree.digest(dict(base.connector.state_dict())) == before and torch.equal(base.table, table)
    assert not any(parameter.requires_grad for parameter in base.connector.parameters())


def test_lora_in_the_connector_is_a_clients_own(parts):
    base = frozen_modules.base(parts)
    names = set(base.connector.state_dict())
    edge, _ = frozen_modules.build(parts, shared=base, rank=2, lora=Lora(rank=2))
    assert edge.connector is not base.connector and set(base.connector.state_dict()) == names
    plain, fresh = (frozen_modules.build(parts, encoder=False, shared=s, rank=2)[0] for s in (base, None))
    assert tree.digest(dict(plain.connector.state_dict())) == tree.digest(dict(fresh.connector.state_dict()))


def test_a_function_is_made_once_for_its_settings_and_its_environment(monkeypatch):
    one, again, other = (compose(["arm=fedprox", f"method.step.mu={mu}", *more]).method.step
                         for mu, more in ((0.1, []), (0.1, ["rounds=3"]), (0.2, [])))  # fmt: skip
    assert targets.make(one) is targets.make(again) is not targets.make(other)
    assert targets.make(other).keywords["mu"] == 0.2
    monkeypatch.setenv("FEDMM_ALLOW_TARGETS", "operator.")
    assert targets.make(one) is not None
    own = compose(["arm=fedavg", "rule._target_=operator.add", "~rule.weights"])
    targets.make(own.rule)
    monkeypatch.delenv("FEDMM_ALLOW_TARGETS")
    with pytest.raises(ConfigError, match="named by no file of conf/"):
        targets.make(own.rule)


def test_what_one_site_allowed_is_asked_anew_at_the_next(monkeypatch):
    asked = ["arm=fedavg", "rule._target_=operator.add", "~rule.weights"]
    monkeypatch.setenv("FEDMM_ALLOW_TARGETS", "operator.")
    assert load(asked, of_client=True).rule["_target_"] == "operator.add"
    monkeypatch.delenv("FEDMM_ALLOW_TARGETS")
    with pytest.raises(ConfigError, match="not allowed"):
        load(asked, of_client=True)


@pytest.mark.parametrize(
    "asked",
    [["arm=krum", "clients=4"], ["arm=ffa_lora", "rule=exact_lowrank"], ["arm=fedavg", "rule.weights=heavy"]],
)
def test_a_client_leaves_the_rule_to_the_server(asked):
    with pytest.raises(ConfigError, match="rule"):
        load(asked)
    assert load(asked, of_client=True)


@pytest.mark.parametrize("asked", ["optimizer.lr=-1", "method.step.mu=-1", "link.loss=server"])
def test_a_client_checks_what_it_runs_every_time(asked):
    for _ in range(2):
        with pytest.raises(ConfigError, match=asked.partition("=")[0]):
            load(["arm=fedprox", asked], of_client=True)


def test_a_mistake_names_its_setting():
    found = check(compose(["link.loss=server", "rule.floor=low", "clients_per_round=9", "compare=[nobody]"]))
    assert {mistake.path for mistake in found} == {"link.loss", "rule.floor", "clients_per_round", "compare"}


def bounded(*, share: Annotated[float, Ge(0), Lt(1)] = 0.5, count: Annotated[int, Gt(0)] | None = None) -> None:
    """What bounds are read from."""


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"share": 1}, "rule.share must be at least 0 and below 1, got 1"),
        ({"share": -0.5}, "rule.share must be at least 0 and below 1, got -0.5"),
        ({"share": float("nan")}, "rule.share must be at least 0 and below 1, got nan"),
        ({"count": 0}, "rule.count must be above 0, or null, got 0"),
    ],
)
def test_a_value_outside_its_bounds_is_told_with_them(values, says):
    with pytest.raises(ValueError, match=f"^{says}$"):
        hold("rule", bounded, **values)


def test_what_is_within_its_bounds_is_left_alone():
    hold("rule", bounded, share=0.0, count=None)
    hold("rule", bounded, share=0.999, count=1)
    assert not list(outside("x", "a text", Annotated[float, Ge(0)]))
