"""Accuracy by group of classes: by hand, and as a run leaves it."""

from __future__ import annotations

import json

import pytest
from omegaconf import OmegaConf

from fedmm.config import composition
from fedmm.evaluate.groups import group, tally
from fedmm.federation import build
from fedmm.runs import summary
from fedmm.runs.folder import RunFolder


def test_thirds_go_by_rank_and_ties_by_order():
    counts = {"a": 5, "b": 50, "c": 7, "d": 7, "e": 7, "f": 1}
    assert group(counts, "thirds") == {
        "b": "many", "c": "many", "d": "medium", "e": "medium", "a": "few", "f": "few",
    }  # fmt: skip


@pytest.mark.parametrize(("classes", "sizes"), [(10, (3, 4, 3)), (11, (4, 3, 4)), (100, (33, 34, 33)), (1, (0, 1, 0))])
def test_thirds_are_rounded(classes, sizes):
    found = list(group({str(c): 1000 - c for c in range(classes)}, "thirds").values())
    assert tuple(map(found.count, ("many", "medium", "few"))) == sizes
    assert found == sorted(found, key=["many", "medium", "few"].index)


def test_bounds_are_in_the_middle():
    counts = {"a": 101, "b": 100, "c": 20, "d": 19, "e": 0}
    assert list(group(counts, [100, 20]).values()) == ["many", "medium", "medium", "few", "few"]


def test_tally_by_hand_leaves_out_what_nobody_asked_about():
    groups = {"x": "many", "y": "few", "z": "medium"}
    answered = [("x", True), ("x", False), ("x", True), ("y", False)]
    assert tally(answered, groups) == {"many": (2, 3), "few": (0, 1)}


def test_classes_are_counted_over_all_clients_and_the_unseen_ones_too():
    cfg = composition.load(
        [
            "scenario=long_tail",
            "clients=4",
            "dataset.of.train=200",
            "dataset.largest=20",
            "dataset.imbalance=10",
            "seed=3",
        ]
    )
    counts = build.class_counts(cfg)
    assert list(counts.items())[:3] == [("0", 20), ("1", 15), ("2", 11)] and list(counts) == list("0123456789")
    none = composition.load(["partition=iid", "dataset.train=8", "dataset.test=90", "dataset.validation=0"])
    assert 0 in build.class_counts(none).values() and sum(build.class_counts(none).values()) == 8


def test_the_summary_has_groups_of_both_ends_and_counts_a_repeated_answer_once(tmp_path):
    asked = ["scenario=long_tail", "rounds=2", "clients=2", f"run.dir={tmp_path}"]
    folder = RunFolder(tmp_path, OmegaConf.to_yaml(composition.load(asked)), asked)
    (tmp_path / summary.CLASSES).write_text(json.dumps({"0": 9, "1": 5, "2": 1}))
    rows = [(0, 0, "a", "0", "1"), (2, 0, "a", "0", "0"), (2, 1, "b", "1", "0"), (2, 1, "c", " 2", "2")]
    for round, part, id, said, truth in [*rows, rows[1], (1, 0, "a", "0", "0")]:
        folder.append("predictions.jsonl", round=round, client=part, part=part, id=id, said=said, truth=truth)
    told = summary.write_summary(tmp_path)
    assert told["final"]["groups"] == {"many": (1, 2), "few": (1, 1)}
    assert told["zero_shot"]["groups"] == {"medium": (0, 1)}
