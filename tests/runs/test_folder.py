"""A run's folder: the order in which updates are read, and where a run goes on."""

from __future__ import annotations

import pytest
import torch

from fedmm.runs.folder import RunFolder, latest_checkpoint
from fedmm.types import Update


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "run", "seed: 0\n", [])


def test_a_rounds_updates_are_in_the_order_of_clients_however_they_arrived(folder):
    """A sum of floats depends on its order."""
    for client in (2, 10, 0, 1):
        folder.save_update(1, Update(client, {"w": torch.full((1,), float(client))}, client + 1))
    folder.save_update(2, Update(5, {"w": torch.zeros(1)}, 1))
    assert folder.arrived(1) == [0, 1, 2, 10]
    updates = list(folder.updates(1, folder.arrived(1)))
    assert [(update.client, update.delta["w"].item()) for update in updates] == [(0, 0), (1, 1), (2, 2), (10, 10)]


def test_a_run_goes_on_after_its_last_whole_round(folder):
    assert folder.resume() is None and latest_checkpoint(folder.path) is None
    for round in (1, 2):
        folder.append("rounds.jsonl", round=round, clients=[0])
        folder.save_checkpoint(round, {"w": torch.full((1,), float(round))}, {"m": torch.full((1,), -float(round))})
    folder.append("rounds.jsonl", round=3, clients=[0])  # killed before its checkpoint
    last, state, memory = folder.resume()
    assert (last, state["w"].item(), memory["m"].item()) == (2, 2, -2)
    assert [row["round"] for row in folder.rows("rounds.jsonl")] == [1, 2]
