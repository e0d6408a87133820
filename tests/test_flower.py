"""One process, Flower's simulation, and a real SuperLink with two SuperNodes give the same bits."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from conftest import small_llava

from fedmm.flower import inprocess
from fedmm.flower.inprocess import InProcessGrid
from fedmm.flower.messages import ask_who, read_who
from fedmm.flower.server_app import plan
from fedmm.runs import table

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> list[str]:
    path = small_llava(tmp_path_factory.mktemp("backbone"), image_size=48)
    return [
        "llm=llava_1_5_7b", f"llm.path={path}", "llm.dtype=float32", "llm.device=cpu",
        r'llm.prompt="<image> {question}"', "rounds=2", "clients=2", "compare=[]", "edge.rank=4",
        "dataset.train=64", "dataset.validation=20", "dataset.test=40",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def in_one_process(asked, tmp_path_factory) -> Path:
    return inprocess.run(plan([*asked, f"run.dir={tmp_path_factory.mktemp('runs') / 'here'}"]))


def by_script(name: str, asked: list[str], folder: Path) -> tuple[Path, str]:
    command = ["bash", str(ROOT / "scripts" / name), *asked, f"run.dir={folder}"]
    env = {**os.environ, "FEDMM_HOME": str(folder.parent / "home")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd="/", env=env, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout


@pytest.mark.parametrize("script", ["demo.sh", "loopback.sh"])
def test_simulation_and_deployment_give_the_bits_of_one_process(asked, in_one_process, tmp_path, script):
    path, said = by_script(script, asked, tmp_path / "run")
    assert (path / "rounds.jsonl").read_text() == (in_one_process / "rounds.jsonl").read_text()
    assert table.scores(path)[2] == table.scores(in_one_process)[2]
    last = [line for line in said.splitlines() if line.strip()]
    assert last[-1].strip() == str(path / "report.html")
    assert any("FedNano" in line for line in last[-8:]), "the table comes before it"


def test_a_run_that_fails_under_flower_fails_the_script(asked, tmp_path):
    """`flwr run --stream` ends with 0 all the same."""
    with pytest.raises(AssertionError, match="clients=3000"):
        by_script("demo.sh", [*asked[:-5], "dataset.train=64", "clients=3000", "partition=iid"], tmp_path / "run")


def test_what_is_private_to_flower_is_where_it_was():
    """TaskIdentity and the message id are no public names of flwr: this fails when they move."""
    with InProcessGrid(3) as grid:
        replies = list(grid.send_and_receive([ask_who(node) for node in grid.get_node_ids()], timeout=30))
    assert sorted(map(read_who, replies)) == [0, 1, 2]
