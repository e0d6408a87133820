"""One process, Flower's simulation, and a real SuperLink with two SuperNodes give the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT

from fedmm.flower import inprocess
from fedmm.flower.inprocess import InProcessGrid
from fedmm.flower.messages import ask_who, read_who
from fedmm.flower.server_app import plan
from fedmm.runs import summary


@pytest.fixture(scope="module")
def asked() -> list[str]:
    """The embedded LLaVA, which ServerApp and ClientApps must find in Flower's bundle with no path configured."""
    sizes = ["dataset.train=64", "dataset.validation=20", "dataset.test=40"]
    return ["rounds=2", "clients=2", "compare=[]", "edge.rank=4", "partition=iid", *sizes]


@pytest.fixture(scope="module")
def in_one_process(asked, tmp_path_factory) -> Path:
    return inprocess.run(plan([*asked, f"run.dir={tmp_path_factory.mktemp('runs') / 'here'}"]), page=False)


def by_script(name: str, asked: list[str], folder: Path) -> tuple[Path, str]:
    command = ["bash", str(ROOT / "scripts" / name), *asked, f"run.dir={folder}"]
    env = {**os.environ, "FEDMM_HOME": str(folder.parent / "home")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd="/", env=env, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout


@pytest.mark.deploy
@pytest.mark.parametrize("script", ["demo.sh", "loopback.sh"])
def test_simulation_and_deployment_give_the_bits_of_one_process(asked, in_one_process, tmp_path, script):
    path, said = by_script(script, asked, tmp_path / "run")
    assert (path / "rounds.jsonl").read_text() == (in_one_process / "rounds.jsonl").read_text()
    assert summary.scores(path)[2] == summary.scores(in_one_process)[2]
    last = [line for line in said.splitlines() if line.strip()]
    assert last[-1].strip() == str(path / "report.html")
    assert any("FedNano" in line for line in last[-8:]), "the table comes before it"


@pytest.mark.deploy
@pytest.mark.parametrize("script", ["demo.sh", "loopback.sh"])
def test_the_whole_model_on_a_client_and_its_local_adapters_give_them_too(asked, tmp_path, script):
    """In a deployment each message is a process of its own, which must find the adapter that the last one left."""
    asked = [*asked, "arm=feddat_llm", "edge.rank=0"]
    here = inprocess.run(plan([*asked, f"run.dir={tmp_path / 'here'}"]), page=False)
    path, _ = by_script(script, asked, tmp_path / "run")
    assert (path / "rounds.jsonl").read_text() == (here / "rounds.jsonl").read_text()
    assert summary.scores(path) == summary.scores(here), "personal accuracy, of shared and local adapters together"


@pytest.mark.deploy
def test_a_run_that_fails_under_flower_fails_the_script(asked, tmp_path):
    """`flwr run --stream` ends with 0 all the same."""
    with pytest.raises(AssertionError, match="needs at least one example per client"):
        by_script("demo.sh", [*asked, "clients=70"], tmp_path / "run")


@pytest.mark.deploy
def test_the_bundle_holds_what_a_run_needs_and_fits(tmp_path):
    """Flower takes at most 10 MB; what is not in the bundle is not there on a SuperNode."""
    bundle = tmp_path / "fedmm.fab"
    subprocess.run(["flwr", "build", "--app", str(ROOT)], cwd=tmp_path, check=True, capture_output=True)
    (bundle,) = tmp_path.glob("*.fab")
    assert bundle.stat().st_size < 10e6
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(tmp_path / "app")
    code = (
        "from fedmm.config import composition, targets; targets.make(composition.load().llm); print(targets.__file__)"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "app")}
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, capture_output=True, text=True
    )
    assert said.stdout.startswith(str(tmp_path / "app"))


def test_what_is_private_to_flower_is_where_it_was():
    """TaskIdentity and the message id are no public names of flwr: this fails when they move."""
    with InProcessGrid(3) as grid:
        replies = list(grid.send_and_receive([ask_who(node) for node in grid.get_node_ids()], timeout=30))
    assert sorted(map(read_who, replies)) == [0, 1, 2]
