"""A sweep of real runs, each a process: killed half way and started again, it repeats nothing and shows the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedmm.cli import main
from fedmm.config import composition
from fedmm.results import intervals, table
from fedmm.runs import records
from fedmm.sweep import plan

ASKED = [
    "arm=fedavg,local", "rounds=1", "clients=2", "batch_size=8", "edge.rank=4", "partition=iid",
    "dataset.train=16", "dataset.validation=8", "dataset.test=8",
]  # fmt: skip
TABLE = ("arm", "global accuracy %", "own test %", "worst client %", "own - local", "LLM samples", "seeds")


@pytest.mark.deploy
def test_a_killed_sweep_goes_on_and_its_table_is_the_same(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    sweep_to_its_end(whole)
    process = start(killed)
    wait_for_summaries(killed, 1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in killed.glob("runs/*/summary.json")}
    assert len(done) == 1, "killed half way"
    sweep_to_its_end(killed)
    assert all(path.stat().st_mtime_ns == when for path, when in done.items()), "what was done is not repeated"
    assert shown(killed) == shown(whole)
    assert (killed / "results.md").exists() and (killed / "results.png").exists()


def start(path: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fedmm.cli", "sweep", str(path), *ASKED, "--at-once", "1"]
    with path.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, start_new_session=True, stdout=log, stderr=subprocess.STDOUT)


def sweep_to_its_end(path: Path) -> None:
    process = start(path)
    assert process.wait(timeout=600) == 0, path.with_suffix(".log").read_text()[-2000:]


def wait_for_summaries(path: Path, count: int) -> None:
    deadline = time.monotonic() + 600
    while len(list(path.glob("runs/*/summary.json"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def shown(path: Path) -> list[tuple[str, ...]]:
    """All but seconds and bytes, which tell of the attempts too."""
    rows = intervals.rows(records.load([path]).runs)
    shown = [column for column in table.columns("FedAvg", rows) if column.heading in TABLE]
    return table.cells(rows, shown)


def test_a_preset_with_arms_to_compare_gives_a_run_of_one_arm(tmp_path):
    asked = ["experiment=mllmfl_embedded", "arm=fedavg,creff"]
    made = plan.jobs(tmp_path, asked)
    assert [composition.load(job.overrides).compare for job in made] == [[], []] and composition.load(asked[:1]).compare
    assert plan.jobs(tmp_path, ["arm=fedavg"])[0].overrides[0] == "arm=fedavg" and "compare=[]" not in made[0].name


def test_an_arm_to_set_against_that_is_none_is_told_before_any_run(tmp_path, capsys):
    assert main(["sweep", str(tmp_path / "sweep"), *ASKED, "--against", "FedAvgg"]) == 2
    assert "'FedAvgg' is none of these arms: 'FedAvg', 'local'" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()
