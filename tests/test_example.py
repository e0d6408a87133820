"""The algorithm written out by hand is what the product runs."""

from __future__ import annotations

import ast
import runpy

import pytest
from helpers import ROOT
from test_floors import floor_of, imports_of

from fedmm import tree
from fedmm.data.scenes import scenes
from fedmm.flower import inprocess
from fedmm.flower.server_app import plan
from fedmm.runs.folder import latest_checkpoint, read_rows

EXAMPLE = ROOT / "examples" / "fedavg_by_hand.py"
SMALL = ["rounds=2", "clients=3", "clients_per_round=2", "batch_size=8", "dataset.train=36"]
SCORED_LITTLE = ["dataset.validation=24", "dataset.test=24", "evaluate.every=0", "evaluate.max_tokens=1"]


@pytest.mark.run
def test_fedavg_by_hand_is_the_products_bit_for_bit(tmp_path):
    federation = runpy.run_path(str(EXAMPLE))["federation"]
    by_hand = list(federation(scenes(train=36)["train"], rounds=2, clients=3, per_round=2, batch_size=8))
    path = inprocess.run(plan(["arm=fedavg", *SMALL, *SCORED_LITTLE, "run.examples=0", f"run.dir={tmp_path / 'run'}"]))

    rows = read_rows(path / "rounds.jsonl")
    assert [row["state"] for row in rows] == [tree.digest(state) for state, _ in by_hand]
    for row, (_, updates) in zip(rows, by_hand, strict=True):
        assert row["clients"] == [update.client for update in updates]
        assert row["examples"] == {str(update.client): update.num_examples for update in updates}
        assert row["loss"] == {str(update.client): update.metrics["loss"] for update in updates}
    _, final, _ = latest_checkpoint(path)
    assert tree.digest(final) == tree.digest(by_hand[-1][0])


def test_the_example_stays_below_the_link():
    names = imports_of(EXAMPLE)
    assert not {name.split(".")[0] for name in names} & {"flwr", "hydra", "omegaconf", "grpc", "ray"}
    assert max(floor_of(name) for name in names if name.startswith("fedmm")) <= floor_of("fedmm.model")


def test_the_example_can_be_read_at_a_sitting():
    functions = [node for node in ast.parse(EXAMPLE.read_text()).body if isinstance(node, ast.FunctionDef)]
    assert sum(node.end_lineno - node.lineno + 1 for node in functions) <= 65
