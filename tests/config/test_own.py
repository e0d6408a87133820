"""A rule, a method and a dataset of one's own: each is one file of Python and one yaml, outside this tree."""

from __future__ import annotations

import pytest
from helpers import rounds

from fedmm.config import targets
from fedmm.config.composition import load, options
from fedmm.config.settings import ConfigError
from fedmm.flower import inprocess
from fedmm.flower.server_app import plan
from fedmm.runs.folder import latest_checkpoint

RULE = '''
"""The mean change, shortened."""
from collections.abc import Iterable, Iterator
from typing import Annotated

import torch

from fedmm import tree
from fedmm.aggregate import running
from fedmm.bounds import Gt, Mistake
from fedmm.types import State, Update


def gentle(current: State, updates: Iterable[Update], memory: State, *, share: Annotated[float, Gt(0)] = 0.5):
    merged = tree.moved(current, tree.scale(running.average(current, updates, "examples"), share))
    return merged, {"share": torch.tensor(share)}


def check(clients: int, adapters: State, *, share: float) -> Iterator[Mistake]:
    if share * clients > 100:
        yield Mistake("rule.share", f"rule.share={share:g} of {clients} clients is above 100; lower one")
'''
METHOD = '''
"""The answer loss, weighed."""
from collections.abc import Iterator, Sequence
from typing import Annotated

from fedmm.bounds import Ge, Mistake
from fedmm.model import Model
from fedmm.types import Batch, Step


def weighed(model: Model, batch: Batch, step: Step, *, weight: Annotated[float, Ge(0)] = 1.0) -> Iterator:
    yield weight * model.answer_loss(batch)


def check(sets: Sequence[str], merges: object, *, weight: float) -> Iterator[Mistake]:
    if len(sets) > 1 and weight == 7:
        yield Mistake("method.step.weight", f"method.step.weight=7 goes with one set, got {list(sets)}")
'''
DATASET = '''
"""Plain squares: is it light or dark?"""
from PIL import Image

from fedmm.types import Example


def squares(*, train: int = 12, test: int = 6):
    return {name: [_example(f"{name}/{i}", i % 2) for i in range(n)] for name, n in (("train", train), ("test", test))}


def _example(id: str, light: int) -> Example:
    return Example(id, [Image.new("RGB", (16, 16), (255 * light,) * 3)], "which digit is red ?", ("one", "two")[light])
'''
YAML = "_target_: {target}\n_partial_: true\n"
FILES = {
    "site_rule.py": RULE,
    "conf/rule/gentle.yaml": YAML.format(target="site_rule.gentle") + "share: 0.5\n",
    "site_method.py": METHOD,
    "conf/method/weighed.yaml": "sets: [shared]\nuse: [shared]\nfisher: null\nstep:\n  _target_: site_method.weighed\n"
    "  _partial_: true\n  weight: 1.0\n",
    "site_data.py": DATASET,
    "conf/dataset/squares.yaml": YAML.format(target="site_data.squares") + "train: 12\ntest: 6\n",
}
OWN = ["arm=fedavg", "rule=gentle", "method=weighed", "dataset=squares", "partition=iid", "evaluate.split=test"]


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder of one's own, on the path and in FEDMM_CONF."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("FEDMM_CONF", str(tmp_path / "conf"))


def test_without_the_folder_there_are_none(monkeypatch):
    monkeypatch.delenv("FEDMM_CONF", raising=False)
    assert "gentle" not in options("rule")
    with pytest.raises(ConfigError, match=r"Could not find 'rule/gentle'"):
        load(["arm=fedavg", "rule=gentle"])


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["rule.share=0"], "rule.share must be above 0, got 0"),
        (["rule.share=nan"], "rule.share must be above 0, got nan"),
        (["rule.share=20", "clients=6"], "rule.share=20 of 6 clients is above 100; lower one"),
        (["rule.share=half"], "rule.share must be float, got 'half'"),
        (["method.step.weight=-1"], "method.step.weight must be at least 0, got -1"),
        (
            ["method.step.weight=7", "method.sets=[shared,local]"],
            r"method.step.weight=7 goes with one set, got \['shared', 'local'\]",
        ),
        (["+dataset.size=3"], "dataset.size is unknown to site_data.squares; available options: train, test"),
    ],
)
def test_its_bounds_and_its_conditions_are_checked_like_any_other(outside, asked, says):
    with pytest.raises(ConfigError, match=says):
        load([*OWN, *asked])


def test_it_is_an_option_and_a_whole_run_uses_it(outside, backbone, tmp_path):
    assert "gentle" in options("rule") and "weighed" in options("method") and "squares" in options("dataset")
    few = ["clients=2", "rounds=1", "batch_size=8", "edge.rank=2", "evaluate.every=0", "run.at_once=1"]
    asked = [*backbone, *OWN, *few, "method.step.weight=0", "rule.share=0.25", f"run.dir={tmp_path / 'run'}"]
    path = inprocess.run(plan(asked))
    (row,), (_, _, memory) = rounds(path), latest_checkpoint(path)
    assert row["examples"] == {"0": 6, "1": 6}, "12 squares, dealt to two clients"
    assert row["loss"] == {"0": 0.0, "1": 0.0}, "a loss of weight 0"
    assert memory["share"].item() == 0.25


def test_what_a_yaml_outside_names_is_allowed_where_it_stands_and_nowhere_else(outside):
    with pytest.raises(ConfigError, match=r"fault takes no _target_|fault._target_=site_rule.gentle is not allowed"):
        load([*OWN, "fault=scaled", "fault._target_=site_rule.gentle"])
    assert targets.make(load(OWN).rule).func.__name__ == "gentle"
