"""A full disk, a home that is none, who may read what: a run ends with the folder and the knob, and goes on later."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DATA, SMALL, rounds, run

from fedmm.config.derived import is_loopback
from fedmm.runs import summary
from fedmm.runs.folder import RunFolder, read_rows
from fedmm.storage import machine_cache
from fedmm.storage.tensor_store import Store
from fedmm.types import FedmmError


class Full:
    """A disk that is `full` for files with `path` in theirs. It says so in `os.fsync`, where files are made to last."""

    def __init__(self, monkeypatch, path: str, beyond: int = 0) -> None:
        self.path, self.left, self.full = path, beyond, True
        fsync = os.fsync

        def sync(descriptor: int) -> None:
            if self.full and self.path in os.readlink(f"/proc/self/fd/{descriptor}"):
                self.left -= 1
                if self.left < 0:
                    raise OSError(28, "No space left on device")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", sync)


@pytest.mark.run
@pytest.mark.parametrize(
    ("place", "beyond"), [("journal/round_0002", 1), ("checkpoints/", 1)], ids=["journal", "checkpoint"]
)
def test_a_disk_that_is_full_in_round_two_ends_the_run_and_it_goes_on(
    backbone, finished, tmp_path, monkeypatch, place, beyond
):
    whole = finished("arm=fedavg")
    disk_full = Full(monkeypatch, place, beyond)
    with pytest.raises(FedmmError, match=r"run/.*No space left.*run\.dir"):
        run(backbone, tmp_path / "run", "arm=fedavg")
    assert "No space left" in read_rows(tmp_path / "run" / "events.jsonl")[-1]["error"]
    assert [row["clients"] for row in rounds(tmp_path / "run") if row["round"] == 1] == [[0, 1, 2]]
    arrived = len(list((tmp_path / "run" / "journal").rglob("client_*.safetensors")))
    assert arrived == (1 if place.startswith("journal") else 3), "one that is not safe is not acknowledged"
    disk_full.full = False
    path = run(backbone, tmp_path / "run", "arm=fedavg")
    assert (path / "rounds.jsonl").read_text() == (whole / "rounds.jsonl").read_text()
    assert summary.scores(path) == summary.scores(whole)
    assert not list(path.rglob(".*.safetensors.*")), "nothing is left aside"


def command(backbone, folder: Path, home_path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    asked = [*backbone, *SMALL, *DATA, "run.at_once=1", "arm=fedavg", "rounds=1", *overrides, f"run.dir={folder}"]
    env = {**os.environ, "FEDMM_HOME": str(home_path)}
    return subprocess.run(
        [sys.executable, "-m", "fedmm.cli", "run", *asked], env=env, capture_output=True, text=True, timeout=200
    )


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.deploy
def test_the_command_line_names_the_folder_of_a_full_disk_and_the_knob(backbone, small_disk, tmp_path):
    done = command(backbone, small_disk / "run", tmp_path / "home")
    assert done.returncode == 1, done.stderr
    assert f"{small_disk}/run" in done.stderr and "No space left" in done.stderr and "run.dir" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.deploy
@pytest.mark.parametrize("what", ["full", "a file", "read-only"])
def test_a_home_that_takes_nothing_is_named_by_every_client(backbone, request, tmp_path, what):
    place = tmp_path / "a-file"
    place.write_text("")
    if what != "a file":
        place = request.getfixturevalue("small_disk")
        if what == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        else:
            (place / "ballast").write_bytes(b"0" * (64 << 10))
    done = command(backbone, tmp_path / "run", place)
    assert done.returncode == 1, done.stderr
    assert f"{place}" in done.stderr and "FEDMM_HOME" in done.stderr and "Traceback" not in done.stderr + done.stdout


def test_a_full_feature_store_goes_on_and_names_its_knob(small_disk, caplog):
    store = Store(memory_bytes=1 << 16, folder=small_disk / "features", disk_bytes=1 << 30)
    for key in "abcd":
        store.put("client_0", key, torch.zeros(1 << 13))  # 32 KiB each
    assert "link.cache_disk_mb" in caplog.text and str(small_disk / "features") in caplog.text
    assert store.get("client_0", "d") is not None


def test_rows_are_there_whole_or_not_at_all(small_disk):
    folder = RunFolder(small_disk / "run", "seed: 0\n", [])
    with pytest.raises(FedmmError, match=r"cannot be written: .*No space left.*run\.dir"):
        while True:
            folder.append("scores.jsonl", text="x" * 1500)
    rows = (small_disk / "run" / "scores.jsonl").read_text()
    assert rows.endswith("}\n") and len(rows.splitlines()) == len(read_rows(small_disk / "run" / "scores.jsonl"))


@pytest.mark.run
def test_a_run_and_a_home_are_for_their_owner_alone(backbone, tmp_path):
    before = os.umask(0)
    try:
        path = run(backbone, tmp_path / "new" / "run", "arm=feddat", "rounds=1", "compare=[fedavg]", page=True)
        machine_cache.write(tmp_path / "asked" / "table.md", b"", public=True)
    finally:
        os.umask(before)
    places = [path, *path.rglob("*"), tmp_path / "home", *(tmp_path / "home").rglob("*")]
    assert {".jsonl", ".safetensors", ".html", ".png", ".yaml", ".json"} <= {place.suffix for place in places}
    for place in places:
        assert not stat.S_IMODE(place.stat().st_mode) & 0o077, f"{place} may be read by others"
    assert stat.S_IMODE((tmp_path / "asked" / "table.md").stat().st_mode) == 0o666, "by the umask"


def test_a_store_on_disk_is_for_its_owner_alone(tmp_path):
    before = os.umask(0)
    try:
        Store(memory_bytes=0, folder=tmp_path / "features", disk_bytes=1 << 20).put("client_0", "a", torch.zeros(8))
    finally:
        os.umask(before)
    found = [tmp_path / "features", *(tmp_path / "features").rglob("*")]
    assert len(found) == 3 and not any(stat.S_IMODE(place.stat().st_mode) & 0o077 for place in found)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:1", True), ("127.255.0.9:1", True), ("127.0.0.1", True), ("localhost:1", True), ("localhost", True),
        ("[::1]:1", True), ("[::1]", True), ("::1", True), ("0:0:0:0:0:0:0:1", True),
        ("127.evil.example:1", False), ("127.0.0.1.evil.example:1", False), ("127.:1", False), ("127.1:1", False),
        ("localhost.evil.example:1", False), ("evil.localhost:1", False), ("[::1].evil.example:1", False),
        ("0.0.0.0:1", False), ("[::]:1", False), ("::1:1", False), ("10.0.0.1:1", False),
        ("", False), (":1", False), ("unix:/tmp/s", False), ("ipv4:127.0.0.1:1", False), ("fe80::1", False),
    ],
)  # fmt: skip
def test_only_this_machine_is_loopback(address, loopback):
    assert is_loopback(address) is loopback
