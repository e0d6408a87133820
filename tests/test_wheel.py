"""The package as it is installed: it runs with no checkout on the path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

pytestmark = pytest.mark.deploy
TINY_RUN = ["rounds=1", "clients=2", "partition=iid", "batch_size=8"]
TINY_DATA = ["dataset.train=16", "dataset.validation=4", "dataset.test=4", "evaluate.max_tokens=1"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that holds the wheel, unpacked by pip, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT], check=True)
    (wheel,) = folder.glob("fedmm-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


def outside(installed: Path, folder: Path, *command: str) -> str:
    """What a command says in an empty folder, where the wheel stands before any checkout on the path."""
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_wheel_is_what_is_imported(installed, tmp_path):
    said = outside(installed, tmp_path, sys.executable, "-c", "import fedmm; print(fedmm.__file__)")
    assert Path(said.strip()).is_relative_to(installed)


def test_its_command_runs_a_federation_in_an_empty_folder(installed, tmp_path):
    fedmm = str(installed / "bin" / "fedmm")
    assert "run a federation" in outside(installed, tmp_path, fedmm, "--help")
    said = outside(installed, tmp_path, fedmm, "run", *TINY_RUN, *TINY_DATA)
    (run,) = (tmp_path / "runs").iterdir()
    assert said.splitlines()[-1].strip() == str(run / "report.html") and (run / "report.html").exists()
