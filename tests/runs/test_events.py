"""Events of a run on disk: the lines of today's version, of the one before, and of one to come."""

from __future__ import annotations

import io
import json
from dataclasses import fields
from pathlib import Path

import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf
from rich.console import Console

from fedmm import tree
from fedmm.config import composition
from fedmm.results import report
from fedmm.results.progress import watch
from fedmm.runs import events, summary
from fedmm.runs.folder import RunFolder, read_rows

CARD = '{"width": 128, "edge_parameters": 400000, "model_parameters": 1000000}'
FORMER = f"""
{{"time": 100.0, "event": "run", "arms": ["FedNano"], "dir": "/runs/a"}}
{{"time": 101.0, "event": "node_left_aside", "node": "7", "reason": "it says it is client 9"}}
{{"time": 102.0, "event": "stage", "label": "FedNano", "says": "pretraining, step 1 of 2"}}
{{"time": 103.0, "event": "arm", "label": "FedNano", "rounds": 2, "clients": 2, "start": 0, "card": {CARD}}}
{{"time": 104.0, "event": "update", "round": 1, "client": 0, "loss": 1.5}}
{{"time": 105.0, "event": "score", "round": 0, "client": 0, "right": 2, "count": 8}}
{{"time": 106.0, "event": "bytes", "round": 1}}
{{"time": 107.0, "event": "aligned", "round": 1, "steps": 20, "kept": 10, "loss_before": 2.0, "loss_after": 1.0, \
"accuracy_before": 0.1, "accuracy_after": 0.2, "reason": "", "seconds": 3.0, "llm_samples": 64}}
{{"time": 108.0, "event": "round", "round": 1, "loss": 1.5, "lost": {{"1": "late"}}, "failed": {{"1": "late"}}, \
"seconds": 4.0}}
{{"time": 109.0, "event": "round", "round": 2, "loss": null, "lost": {{}}, "seconds": 4.0}}
{{"time": 110.0, "event": "unscored", "lost": {{"1": "did not report"}}}}
{{"time": 111.0, "event": "arm_finished", "label": "FedNano"}}
{{"time": 112.0, "event": "finished", "report": "/runs/a/report.html"}}
""".strip()
"""Lines as the version wrote them whose events were texts with keyword arguments; `failed` came later than `lost`."""

SMALL = ["rounds=2", "clients=2", "partition=iid", "dataset.train=8", "dataset.validation=4", "dataset.test=8"]


def of_former_layout(path: Path) -> Path:
    """A run of one arm that its events say has finished, without its summary."""
    cfg = composition.load([*SMALL, f"run.dir={path}"])
    RunFolder(path, OmegaConf.to_yaml(cfg), [])
    (path / "events.jsonl").write_text(FORMER + "\n")
    return path


def watched(path: Path) -> tuple[int, str]:
    out = io.StringIO()
    return watch(path, console=Console(file=out, width=200, color_system=None), stall_seconds=5.0), out.getvalue()


def test_every_kind_of_the_former_layout_is_read(tmp_path):
    logged = events.read(of_former_layout(tmp_path / "run"))
    assert [one.time for one in logged] == [float(at) for at in range(100, 113)]
    assert {one.event.kind for one in logged} == events.KINDS.keys() - {"failed"}
    by_kind = {one.event.kind: one.event for one in logged[:9]}
    assert by_kind["arm"] == events.ArmBegan("FedNano", 2, 2, 0, json.loads(CARD))
    assert by_kind["score"] == events.ClientScored(0, 0, right=2, count=8)
    assert by_kind["aligned"] == events.StateAligned(1, steps=20, seconds=3.0)
    assert by_kind["round"] == events.RoundEnded(1, 1.5, 4.0, {1: "late"}, {1: "late"})
    assert logged[10].event == events.ClientsUnscored({1: "did not report"})


def test_a_run_of_the_former_layout_is_watched(tmp_path):
    code, out = watched(of_former_layout(tmp_path / "run"))
    lines = out.splitlines()
    assert code == 0 and lines[-1] == "/runs/a/report.html"
    assert lines[:2] == ["run: FedNano", "FedNano: pretraining, step 1 of 2"]
    assert "[1/1] FedNano round 1/2  loss 1.500  test 25.0% at the start" in lines[2] and "1 lost" in lines[2]
    assert "FedNano finished" in out


def test_a_run_of_the_former_layout_is_summarised_and_shown(tmp_path):
    path = of_former_layout(tmp_path / "run")
    assert summary.write_summary(path)["seconds"] == 9.0, "from the arm's start at 103 to the last event at 112"
    arm = report._arm(path)
    assert {"round": "final", "client": 1, "reason": "did not report"} in arm["lost"]


def test_a_run_of_the_former_layout_goes_on(tmp_path):
    """Its journal has an update whose report was lost, and a kill has cut its last event off."""
    path = of_former_layout(tmp_path / "run")
    with (path / "events.jsonl").open("a") as file:
        file.write('{"time": 113.0, "ev')
    (path / "journal" / "round_0001").mkdir(parents=True)
    header = {"num_examples": 4, "fisher": True, "metrics": {"loss": 1.5}}
    tensors = tree.joined(delta={"w": torch.ones(2)}, fisher={"w": torch.zeros(2)})
    file = path / "journal" / "round_0001" / "client_0001.safetensors"
    safetensors.torch.save_file(tensors, file, {"about": json.dumps(header)})
    folder = RunFolder(path, (path / "config.yaml").read_text(), [])
    assert folder.resume() is None and folder.arrived(1) == [1]
    (update,) = folder.updates(1, [1])
    assert (update.num_examples, update.metrics, update.fisher["w"].tolist()) == (4, {"loss": 1.5}, [0, 0])
    assert folder.update_header(1, 1).num_examples == 4
    assert read_rows(path / "ledger.jsonl") == [{"loss": 1.5, "kind": "client", "round": 1, "client": 1}]
    folder.log(events.RunBegan(["FedNano"]))
    assert (path / "events.jsonl").read_text().startswith(FORMER + "\n") and len(events.read(path)) == 14


@pytest.mark.parametrize(
    "event",
    [
        events.RunBegan(["a", "b"], "/runs/a"),
        events.ArmBegan("a", 2, 3, 1, {"width": 8}),
        events.UpdateArrived(1, 0, None),
        events.RoundEnded(1, 0.5, 2.0, {3: "late"}, {4: "refused"}),
        events.ClientsUnscored({0: "late"}),
        events.RunFailed("why"),
    ],
    ids=lambda event: event.kind,
)
def test_an_event_comes_back_as_it_was_written(tmp_path, event):
    folder = RunFolder(tmp_path / "run", "seed: 0\n", [])
    folder.log(event)
    (row,) = folder.rows("events.jsonl")
    assert row.keys() == {"time", "event", *(of.name for of in fields(event))} and row["event"] == event.kind
    assert [one.event for one in events.read(folder.path)] == [event]


@pytest.mark.parametrize(
    "line",
    [
        '{"time": 1.0, "event": "paused", "until": 2.0}', '{"time": 1.0, "event": "round", "number": 1}',
        '{"time": 1.0, "ev', '{"time": 1.0}', '{"event": ["run"]}', "[]", "",
    ],
)  # fmt: skip
def test_what_a_newer_version_or_a_kill_left_is_passed_over(tmp_path, line):
    path = of_former_layout(tmp_path / "run")
    (path / "events.jsonl").write_text(FORMER.replace("\n", f"\n{line}\n", 3) + "\n")
    assert len(events.read(path)) == 13
    assert watched(path)[0] == 0


def test_a_field_of_a_newer_version_is_passed_over():
    logged = events.parse('{"time": 1.0, "event": "update", "round": 1, "client": 0, "loss": 1.5, "codec": "int8"}')
    assert logged == events.Logged(1.0, events.UpdateArrived(1, 0, 1.5))


def test_a_tail_gives_whole_lines_once(tmp_path):
    tail, path = events.Tail(tmp_path), tmp_path / "events.jsonl"
    assert tail.read() == []
    path.write_text('{"time": 1.0, "event": "bytes", "round": 1}\n{"time": 2.0, "event": "by')
    assert [one.time for one in tail.read()] == [1.0] and tail.read() == []
    with path.open("a") as file:
        file.write('tes", "round": 2}\n')
    assert [one.event for one in tail.read()] == [events.BytesCounted(2)]
