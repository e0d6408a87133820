"""One process, Flower's simulation, and a real SuperLink with two SuperNodes give the same bits."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import ROOT
from processes import SLOW, commands_about, env, wait_until

from fedmm.flower import inprocess
from fedmm.flower.inprocess import InProcessGrid
from fedmm.flower.messages import ask_who, read_who
from fedmm.flower.server_app import plan
from fedmm.runs import summary
from fedmm.runs.folder import read_rows


@pytest.fixture(scope="module")
def asked() -> list[str]:
    """The embedded LLaVA, which ServerApp and ClientApps must find in Flower's bundle with no path configured."""
    sizes = ["dataset.train=64", "dataset.validation=20", "dataset.test=40"]
    sizes += ["run.wait_seconds=600"]  # a busy machine starts SuperNodes slowly
    return ["rounds=2", "clients=2", "compare=[feddat_llm]", "edge.rank=4", "partition=iid", *sizes]


@pytest.fixture(scope="module")
def in_one_process(asked, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMM_HOME", str(tmp_path_factory.mktemp("home")))
        return inprocess.run(plan([*asked, f"run.dir={tmp_path_factory.mktemp('runs') / 'here'}"]), page=False)


@contextmanager
def script(name: str, asked: list[str], folder: Path) -> Iterator[tuple[subprocess.Popen, Path]]:
    """A script in the background, what it keeps beside `folder`, and its output."""
    output, state = folder.with_suffix(".out"), folder.with_suffix(".state")
    command = ["bash", str(ROOT / "scripts" / name), *asked, f"run.dir={folder}"]
    with output.open("w") as out:
        process = subprocess.Popen(command, env=env(state), cwd="/", stdout=out, stderr=out)
    try:
        yield process, output
    finally:
        process.terminate()
        process.wait(timeout=60)


def bits(path: Path) -> list[object]:
    """What two runs of one configuration must have in common: of both arms, every round and the last scores."""
    arms = path, path / "arms" / "feddat_llm"
    return [((arm / "rounds.jsonl").read_text(), summary.scores(arm)) for arm in arms]


def check_end(output: Path, path: Path) -> None:
    last = [line for line in output.read_text().splitlines() if line.strip()]
    assert last[-1].strip() == str(path / "report.html")
    assert any("FedNano" in line for line in last[-8:]), "the table comes before it"


@pytest.mark.deploy
@pytest.mark.timeout(900)  # a process that imports torch for each client, and the server
def test_a_simulation_gives_the_bits_of_one_process(asked, in_one_process, tmp_path):
    path = tmp_path / "run"
    with script("demo.sh", asked, path) as (process, output):
        assert process.wait() == 0, output.read_text()[-3000:]
    assert bits(path) == bits(in_one_process)
    check_end(output, path)


@pytest.mark.deploy
@pytest.mark.timeout(900)  # a process that imports torch for each message, one after the other
def test_a_deployment_gives_the_bits_of_one_process_and_nothing_in_it_is_insecure(asked, in_one_process, tmp_path):
    """Each message is a process of its own, which must find the adapter that the last one left."""
    path, commands = tmp_path / "run", set()
    state = path.with_suffix(".state")
    with script("loopback.sh", asked, path) as (process, output):
        while process.poll() is None:
            commands |= commands_about(state)
            time.sleep(0.5)
        assert process.returncode == 0, output.read_text()[-3000:]
    assert bits(path) == bits(in_one_process)
    check_end(output, path)
    assert [row["event"] for row in read_rows(path / "events.jsonl")][-1] == "finished"
    for name in ("flower-superlink", "fedmm.flower.gate", "flower-supernode", "flower-superexec", "flwr-clientapp"):
        assert any(name in line for line in commands), f"{name} was not seen among {commands}"
    assert not [line for line in commands if "--insecure" in line]
    assert not [line for line in commands if "0.0.0.0" in line]
    assert wait_until(lambda: not commands_about(state), 30), "all that it started has ended"
    posts = (state / "log" / "gate.log").read_text()
    assert '"POST /v1/fleet/push-messages HTTP/1.1" 200' in posts, "the sites came through the gate"
    database = list((state / "fleet").glob("state.db*"))
    assert any(b"PRIVATE KEY" in path.read_bytes() for path in database), "the link's keys are in it"
    assert not [path for path in database if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)]


@pytest.mark.deploy
def test_a_run_that_fails_under_flower_fails_the_script(asked, tmp_path):
    """`flwr run --stream` ends with 0 all the same."""
    with script("demo.sh", [*asked, "clients=70"], tmp_path / "run") as (process, output):
        assert process.wait(SLOW) != 0
    assert "needs at least one example per client" in output.read_text()


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
