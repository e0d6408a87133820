"""What the recorder writes of an arm, by file."""

from __future__ import annotations

import time

import pytest
import torch
from omegaconf import OmegaConf

from fedmm import tree
from fedmm.config.composition import load
from fedmm.evaluate.answers import Answer
from fedmm.federation.client import Order, Report
from fedmm.flower.recorder import Outcome, Recorder
from fedmm.runs import events
from fedmm.runs.folder import RunFolder, latest_checkpoint
from fedmm.serving.round import Traffic
from fedmm.types import Update


@pytest.fixture(scope="module")
def cfg():
    return load(["rounds=2", "clients=3"])


@pytest.fixture
def recorder(cfg, tmp_path) -> Recorder:
    return Recorder(RunFolder(tmp_path / "run", OmegaConf.to_yaml(cfg), []), cfg)


def logged(recorder: Recorder) -> list[events.Event]:
    return [one.event for one in events.read(recorder.folder.path)]


def update(client: int, **metrics: float) -> Update:
    return Update(client, {"w": torch.full((2,), float(client))}, 4 + client, None, metrics)


def test_an_update_is_journaled_with_its_bytes_by_channel(recorder):
    moved = {(1, "update"): Traffic(up_bytes=100, down_bytes=5, fisher_bytes=40, frames=2), (1, "loss"): Traffic(7, 8)}
    recorder.update(1, update(1, loss=0.5), moved)
    rows = {row["channel"]: (row["up_bytes"], row["down_bytes"]) for row in recorder.folder.rows("ledger.jsonl")}
    assert rows == {"adapters": (60, 5), "fisher": (40, 0), "steps": (7, 8)}
    assert recorder.folder.arrived(1) == [1] and logged(recorder) == [events.UpdateArrived(1, 1, 0.5)]


def test_a_report_is_scores_answers_and_figures_of_the_state_before(recorder):
    order = Order((), "run", 2, 1, "127.0.0.1:1", "token")
    report = Report(1, 2, {1: (3, 4), 0: (1, 4)}, [(1, Answer("test/0", "two", "two"))], {"seconds": 2.0})
    recorder.report(order, report)
    assert recorder.folder.rows("scores.jsonl") == [
        {"round": 1, "client": 1, "part": 1, "right": 3, "count": 4},
        {"round": 1, "client": 1, "part": 0, "right": 1, "count": 4},
    ]
    (answer,) = recorder.folder.rows("predictions.jsonl")
    assert answer == {"round": 1, "client": 1, "part": 1, "id": "test/0", "said": "two", "truth": "two"}
    assert recorder.folder.rows("ledger.jsonl") == [{"seconds": 2.0, "kind": "client", "round": 2, "client": 1}]
    assert logged(recorder) == [events.ClientScored(1, 1, right=3, count=4)], "on its own questions alone"


def test_a_round_is_its_row_its_checkpoint_and_its_event(recorder):
    for client, metrics in ((0, {"loss": 0.5}), (2, {})):
        recorder.folder.save_update(1, update(client, **metrics))
    state, lost = {"w": torch.ones(2)}, {1: "late"}
    recorder.round_ended(Outcome(1, [0, 2], lost, lost | {2: "refused"}, {"text": 0.1}, time.perf_counter()), state, {})
    (row,) = recorder.folder.rows("rounds.jsonl")
    assert row == {
        "round": 1, "clients": [0, 2], "lost": {"1": "late"}, "examples": {"0": 4, "2": 6},
        "loss": {"0": 0.5, "2": None}, "state": tree.digest(state), "product_error": {"text": 0.1},
    }  # fmt: skip
    assert latest_checkpoint(recorder.folder.path)[0] == 1 and recorder.folder.arrived(1) == []
    (ended,) = logged(recorder)
    assert ended == events.RoundEnded(1, 0.5, ended.seconds, lost, lost | {2: "refused"})


def test_what_an_exchange_moved_besides_updates_is_in_the_ledger_before_its_event(recorder):
    recorder.control_bytes(Order((), "run", 1, 0, "127.0.0.1:1", "token"), 30, 20)
    recorder.exchange_ended(1, {(0, "card"): Traffic(1, 2), (0, "no verb"): Traffic(3, 4)})
    rows = [(row["channel"], row["up_bytes"], row["down_bytes"]) for row in recorder.folder.rows("ledger.jsonl")]
    assert rows == [("control", 20, 30), ("edge", 1, 2), ("refused", 3, 4)]
    assert logged(recorder) == [events.BytesCounted(1)]
