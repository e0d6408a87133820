"""A run on disk. Everything shown of a run is read from here, and a killed run goes on from here.

    config.yaml overrides.txt environment.json      what was asked, where it ran
    rounds.jsonl scores.jsonl predictions.jsonl      per round: who trained; how the state scored; what the model said
    ledger.jsonl events.jsonl summary.json           bytes and seconds; what happened when; the figures of the end
    stages.jsonl compact.safetensors classes.json    the server's stages; a compact encoder; `evaluate.groups`
    checkpoints/round_0007.safetensors               state (and the rule's memory) after round 7
    journal/round_0008/client_0003.safetensors       updates of the round in progress
    arms/<name>/                                     the same, for every arm that is compared

A row of rounds.jsonl is written before its checkpoint and rows beyond the last checkpoint are dropped on resume, but
for what a client moved and scored whose update is in the journal. So a run that was killed at any instant ends with the
same state, rounds.jsonl and scores as an undisturbed one. Of checkpoints the last two stay.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import platform
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from omegaconf import OmegaConf

from fedmm import tree
from fedmm.config import targets
from fedmm.config.composition import what
from fedmm.link.messages import UpdateRequest
from fedmm.link.wire import Frame
from fedmm.runs import events
from fedmm.storage import disk, machine_cache
from fedmm.types import State, Update

PACKAGES = ("fedmm", "flwr", "torch", "transformers", "peft", "grpcio")
_OF_ROUND = ("rounds.jsonl", "ledger.jsonl", "stages.jsonl")  # written in a round, about it
KEPT_CHECKPOINTS = 2  # the one to go on from, and the one before
_HEADER = "about"  # in the metadata of a journaled update's file; resumed journals of older versions have this name
_OF_STATE = ("scores.jsonl", "predictions.jsonl")  # written in a round, about the state it began with


@dataclass(frozen=True)
class UpdateHeader:
    """What stands beside the tensors of an update in the journal."""

    num_examples: int
    fisher: bool  # whether the tensors have a Fisher
    metrics: dict[str, float]


class RunFolder:
    """The folder of one arm. Opening it starts the run, or resumes the same one."""

    def __init__(self, path: Path, config_yaml: str, overrides: list[str]) -> None:
        """Raises ValueError where the folder holds another run."""
        self.path = path
        self._lock = threading.Lock()
        check_folder(path, config_yaml)
        if (path / "config.yaml").exists():
            self._rewrite("events.jsonl", lambda row: True)
        else:
            machine_cache.write(path / "overrides.txt", "".join(f"{override}\n" for override in overrides).encode())
            machine_cache.write(path / "environment.json", json.dumps(_environment(), indent=1).encode())
            machine_cache.write(path / "config.yaml", config_yaml.encode())
        self.run: str = json.loads((path / "environment.json").read_text())["run"]

    # ---- rows ------------------------------------------------------------------------------------------------------

    def append(self, file: str, /, **row: Any) -> None:
        self.extend(file, [row])

    def extend(self, file: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Several rows in one write. Raises FedmmError where the disk does not take them; then none is there."""
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        with self._lock, machine_cache.writing(self.path):
            disk.append(self.path / file, lines.encode())

    def log(self, event: events.Event) -> None:
        """Something a watcher wants to know now."""
        self.append("events.jsonl", **events.row(event))

    def rows(self, file: str) -> list[dict[str, Any]]:
        return read_rows(self.path / file)

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").exists()

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def save_checkpoint(self, round: int, state: State, memory: State) -> None:
        """Make the round last, then forget its journal."""
        machine_cache.save(tree.joined(state=state, memory=memory), self._checkpoint(round), {"round": str(round)})
        shutil.rmtree(self._journal(round), ignore_errors=True)
        for _, path in _checkpoints(self.path)[:-KEPT_CHECKPOINTS]:
            path.unlink(missing_ok=True)

    def resume(self) -> tuple[int, State, State] | None:
        """The last whole round with its state and memory; None at the very start.

        Rows beyond it are dropped, but for those of clients whose update of the next round is safe: they are not asked
        for it again. Of one that had not yet told how it scored, the answers too: it will give them again.
        """
        checkpoint = latest_checkpoint(self.path)
        last = checkpoint[0] if checkpoint else 0
        journaled = set(self.arrived(last + 1))
        for file in _OF_STATE:
            self._rewrite(file, lambda row: row["round"] < last + (row["client"] in journaled))
        scorers = {row["client"] for row in self.rows("scores.jsonl") if row["round"] == last}
        unscored = journaled - scorers
        for file in _OF_ROUND:
            self._rewrite(
                file,
                lambda row: (
                    row["round"] <= last + (row.get("client") in journaled)
                    and not (row["round"] > last and row.get("channel") == "answers" and row["client"] in unscored)
                ),
            )
        ledger = self.rows("ledger.jsonl")
        reporters = {row["client"] for row in ledger if row["kind"] == "client" and row["round"] > last}
        for client in sorted(journaled - reporters):  # its report was lost with the server; the update says most of it
            metrics = self.update_header(last + 1, client).metrics
            self.append("ledger.jsonl", **{**metrics, "kind": "client", "round": last + 1, "client": client})
        return checkpoint

    def _rewrite(self, file: str, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Keep these whole rows; a line that a kill cut off goes, or the next row would be glued to it."""
        if (self.path / file).exists():
            rows = [row for row in self.rows(file) if keep(row)]
            machine_cache.write(self.path / file, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def _checkpoint(self, round: int) -> Path:
        return self.path / "checkpoints" / f"round_{round:04d}.safetensors"

    # ---- journal ---------------------------------------------------------------------------------------------------

    def save_update(self, round: int, update: Update) -> None:
        """Make an update safe the moment it arrives."""
        frame = UpdateRequest.of(update).to_frame()
        machine_cache.save(frame.tensors, self._update(round, update.client), {_HEADER: json.dumps(frame.meta)})

    def arrived(self, round: int) -> list[int]:
        """The clients whose updates of this round are safe, in client order."""
        return sorted(
            int(path.stem.removeprefix("client_")) for path in self._journal(round).glob("client_*.safetensors")
        )

    def update_header(self, round: int, client: int) -> UpdateHeader:
        """What a journaled update says of itself, read without its tensors."""
        with safetensors.safe_open(self._update(round, client), "pt") as file:
            return UpdateHeader(**json.loads(file.metadata()[_HEADER]))

    def updates(self, round: int, clients: Iterable[int]) -> Iterator[Update]:
        """These clients' updates of the round in the order given, one in memory at a time; while one is used, the
        system reads the next from its disk."""
        clients = list(clients)
        for client, after in itertools.zip_longest(clients, clients[1:]):
            if after is not None:
                machine_cache.read_ahead(self._update(round, after))
            header, tensors = (
                self.update_header(round, client),
                safetensors.torch.load_file(self._update(round, client)),
            )
            yield UpdateRequest.from_frame(Frame(UpdateRequest.verb, vars(header), tensors)).update(client)

    def _update(self, round: int, client: int) -> Path:
        return self._journal(round) / f"client_{client:04d}.safetensors"

    def _journal(self, round: int) -> Path:
        return self.path / "journal" / f"round_{round:04d}"


@contextmanager
def alone(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder for this process. Where another one holds it, wait for its end or raise ValueError."""
    with machine_cache.writing(path):
        disk.make_folder(path)
        lock = disk.opened(path / ".lock", "w")
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ValueError(
                f"another process is running in {path}; wait for it, or set run.dir to another folder"
            ) from None
        yield


def read_config(path: Path) -> Any:
    """The configuration of the run in this folder, as of today where an older version wrote it."""
    return OmegaConf.create(targets.renamed((path / "config.yaml").read_text()))


def check_folder(path: Path, config_yaml: str) -> None:
    """Raises ValueError where `path` holds another run than this configuration's."""
    if (path / "config.yaml").exists() and what(read_config(path)) != what(OmegaConf.create(config_yaml)):
        raise ValueError(
            f"{path} holds a run with another configuration; set run.dir (of a sweep, its folder) to another, or "
            "remove it"
        )


def latest_checkpoint(run: Path) -> tuple[int, State, State] | None:
    """The last round that is whole on disk, with the state after it and the rule's memory."""
    checkpoints = _checkpoints(run)
    if not checkpoints:
        return None
    round, path = checkpoints[-1]
    state, memory = tree.parted(safetensors.torch.load_file(path), "state", "memory")
    return round, state, memory


def _checkpoints(run: Path) -> list[tuple[int, Path]]:
    """By round, the last one last."""
    files = (run / "checkpoints").glob("round_*.safetensors")
    return sorted((int(file.stem.removeprefix("round_")), file) for file in files)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _environment() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a Flower bundle runs without being installed
            versions[package] = "not installed"
    return {
        "run": uuid.uuid4().hex,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": versions,
    }
