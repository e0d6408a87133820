"""Scenarios: one override sets a dataset and a partition that go together, and what cannot be is refused at once."""

from __future__ import annotations

import re
import shlex
from collections import Counter

import pytest
from omegaconf import OmegaConf

from fedmm.config import composition, settings
from fedmm.federation.build import partition, splits
from fedmm.flower import server_app

SPLITS = ("train", "test")


def held(overrides: list[str], split: str) -> list[dict[str, int]]:
    """How many examples of each value of its partition's label each client has."""
    cfg = composition.load([*overrides, "dataset.train=420", "dataset.validation=0", "dataset.test=210"])
    examples, by = splits(cfg)[split], cfg.partition.by
    counts: list[dict[str, int]] = []
    for part in partition(cfg, split):
        values = [examples[i].labels[by] for i in part]
        counts.append({value: values.count(value) for value in sorted(set(values))})
    return counts


def test_the_default_scenario_changes_nothing():
    for group, chosen in (("dataset", "scenes"), ("partition", "dirichlet")):
        own = OmegaConf.load(composition.folder() / group / f"{chosen}.yaml")
        assert composition.load()[group] == own == composition.load(["scenario=dirichlet"])[group]


@pytest.mark.parametrize("scenario", ["domain", "scene", "task"])
def test_a_scenario_gives_each_client_a_value_of_its_own_in_every_split(scenario):
    for split in SPLITS:
        mine = held([f"scenario={scenario}"], split)
        assert [len(values) for values in mine] == [1] * 5
        assert len({value for values in mine for value in values}) == 5
        assert len({count for values in mine for count in values.values()}) == 1


def test_seven_functions_at_seven_clients_and_two_clients_with_two_at_five():
    assert [len(values) for values in held(["scenario=function", "clients=7"], "train")] == [1] * 7
    assert [len(values) for values in held(["scenario=function"], "test")] == [2, 2, 1, 1, 1]


def test_a_long_tail_at_twenty_equal_clients_and_a_balanced_test():
    cfg = composition.load(["scenario=long_tail", "clients=20", "dataset.imbalance=10"])
    made = splits(cfg)
    counts = [Counter(example.answer for example in made[split]) for split in SPLITS]
    assert [counts[0][str(digit)] for digit in range(10)] == [500, 387, 299, 232, 179, 139, 107, 83, 64, 50]
    assert set(counts[1].values()) == {100} and len(counts[1]) == 10
    for split, size in zip(SPLITS, (102, 50), strict=True):
        assert {len(part) for part in partition(cfg, split)} == {size}


def test_fewer_clients_than_values_hold_several_and_every_example_is_held():
    mine = held(["scenario=domain", "clients=2"], "train")
    assert [len(values) for values in mine] == [3, 2]
    assert sum(count for values in mine for count in values.values()) == 420


def test_a_group_chosen_by_name_wins_over_the_scenario():
    cfg = composition.load(["scenario=domain", "partition=iid", "dataset.vocabulary=english"])
    assert cfg.partition["_target_"].endswith(".iid") and len(cfg.dataset.styles) == 5
    assert cfg.dataset.vocabulary == "english"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["scenario=domain", "clients=6"],
            r"partition.by=style gives each client one value, but the dataset has 5 .*for clients=6; lower clients",
        ),
        (["scenario=function", "clients=8"], r"partition.by=kind gives each client one value, but the dataset has 7"),
        (
            ["partition=domain"],
            r"partition.by=style gives each client one value, but the dataset has 1 \(turku\) for clients=5.*scenario=",
        ),
        (["partition=scene"], r"partition.by=layout gives each client one value, but the dataset has 1 \(taught\)"),
        (["partition=dataset"], r"groups by 'dataset', but example train/000000 has only answer, digit, kind, layout"),
        (
            ["scenario=scene", "dataset.kinds=[sum]"],
            r"dataset.layouts has crowded, whose questions are of the kinds colour, count",
        ),
        (["compare=[local]", "scenario=domain", "clients=6"], r"the dataset has 5"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_anything_starts(overrides, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        server_app.plan([*overrides, f"run.dir={tmp_path / 'run'}", "dataset.train=70", "dataset.test=70"])
    assert not (tmp_path / "run").exists()


def test_every_mistake_of_every_arm_is_told_at_once(tmp_path):
    asked = ["scenario=domain", "clients=6", "arm=krum", "rule.byzantine=2", "compare=[flora,nonsense]", "edge.rank=8"]
    with pytest.raises(settings.ConfigError) as told:
        server_app.plan([*asked, f"run.dir={tmp_path / 'run'}", "dataset.train=70", "dataset.test=70"])
    for says in (
        "rule.byzantine=2 needs at least 7 clients",
        "partition.by=style gives each client one value, but the dataset has 5",
        "compare names 'nonsense'",
        "edge.ranks must be from 1 to edge.rank=8",
    ):
        assert str(told.value).count(says) == 1
    with pytest.raises(
        settings.ConfigError, match=r"^clients must be at least 1, got -1\ndataset.train must be int, got 'oops'$"
    ):
        server_app.plan(["clients=-1", "dataset.train=oops"])


def test_more_clients_share_where_that_is_asked_for():
    mine = held(["scenario=domain", "clients=10", "partition.share=true"], "train")
    assert [len(values) for values in mine] == [1] * 10


def test_compared_arms_keep_the_scenario():
    overrides = ["scenario=scene", "arm=feddat", "compare=[local,fedavg_plateau]"]
    for _, asked in composition.arms(composition.compose(overrides), overrides):
        assert list(composition.load(asked).dataset.layouts) == ["crowded", "one", "overlapping", "tiny", "two"]


# --- presets --------------------------------------------------------------------------------------------------------

PRESETS = composition.options("experiment")


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_second_line_is_a_command_that_composes_and_what_it_takes(name):
    line = (composition.folder() / "experiment" / f"{name}.yaml").read_text().splitlines()[1]
    command, cost = re.split(r" {3,}", line.removeprefix("# "))
    assert command.startswith(f"fedmm run experiment={name}") and cost
    overrides = [o for o in shlex.split(command)[2:] if o not in ("dataset=YOURS", "partition=dataset")]
    for _, asked in composition.arms(composition.load(overrides), overrides):
        composition.load(asked)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("fednano", {"label": "FedNano", "rounds": 10, "edge.rank": 64, "partition.alpha": 1.0}),
        ("feddat", {"label": "FedDAT", "rounds": 30, "optimizer.lr": 1e-4, "partition.by": "style"}),
        ("fednano_embedded", {"label": "FedNano", "rounds": 10, "partition.alpha": 1.0, "optimizer.lr": 6e-3}),
        ("feddat_embedded", {"label": "FedDAT", "rounds": 20, "partition.by": "style", "optimizer.lr": 6e-3}),
        ("feddat_function_embedded", {"label": "FedDAT", "rounds": 20, "partition.by": "kind"}),
        ("feddat_scene_embedded", {"label": "FedDAT", "rounds": 20, "partition.by": "layout"}),
        ("feddat_task_embedded", {"label": "FedDAT", "rounds": 20, "partition.by": "task"}),
    ],
)
def test_a_preset_is_what_the_paper_says(name, values):
    cfg = composition.load([f"experiment={name}"])
    assert {path: OmegaConf.select(cfg, path) for path in values} == values
    assert (cfg.clients, cfg.epochs) == (5, 1)
    assert cfg.llm["_target_"].endswith("tiny" if name.endswith("embedded") else "llava")


def test_every_preset_has_a_twin_that_needs_no_network():
    papers = [name for name in PRESETS if not name.endswith("_embedded")]
    assert papers and all(f"{name}_embedded" in PRESETS for name in papers)


def test_what_is_asked_for_wins_over_a_preset():
    cfg = composition.load(["experiment=feddat_embedded", "rounds=2", "scenario=scene", "arm=local"])
    assert (cfg.rounds, cfg.partition.by, cfg.label) == (2, "layout", "local")
