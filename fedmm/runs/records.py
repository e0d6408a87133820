"""Finished runs as evidence takes them: what each was asked and its figures, from its folder or from a file of many.

A file of records keeps what a page of results was made of, so that the page outlives the runs' folders, others compare
their own runs with it, and a sweep does not repeat what is in it. It is jsonl, a line each:

    {"settings": {...}}                            what all its runs were asked alike, by path
    {"settings": {...}, "summary": {...}}          a run: what else it was asked, and its summary.json
    {"combination": [...], "chosen": ..., ...}     what a search chose, as in a sweep's tuned.json
    {"command": ..., "when": ...}                  what made some of them
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fedmm.runs import home, summary
from fedmm.runs.config import what

TUNED, COMMANDS = "tuned.json", "commands.json"  # in a sweep's folder


@dataclass(frozen=True)
class Run:
    """A finished run of one arm: where it is told of, its settings by path and its summary."""

    where: str
    settings: Mapping[str, Any]
    summary: Mapping[str, Any]

    @property
    def seed(self) -> int:
        return int(self.settings["seed"])


@dataclass(frozen=True)
class Records:
    """Runs, what searches chose, and the commands that made them with their days."""

    runs: Sequence[Run] = ()
    tuned: Sequence[Mapping[str, Any]] = ()
    commands: Mapping[str, str] = field(default_factory=dict)

    def run_with(self, settings: Mapping[str, Any]) -> Run | None:
        """The run that was asked just this."""
        return next((run for run in self.runs if run.settings == settings), None)

    def choice(self, combination: Sequence[str]) -> Mapping[str, Any] | None:
        """What a search chose for a combination, in whatever order it was asked."""
        return next((row for row in self.tuned if sorted(row["combination"]) == sorted(combination)), None)


def settings_of(cfg: Any) -> dict[str, Any]:
    """What a run is asked, by path, as json has it; not where and how long, nor what is compared with it."""
    found = {
        key: OmegaConf.to_object(value) if OmegaConf.is_config(value) else value for key, value in what(cfg).items()
    }
    return {key: value for key, value in found.items() if key != "compare"}


def of_arm(folder: Path) -> Run:
    """A finished arm, from its folder."""
    told = json.loads((folder / "summary.json").read_text())
    return Run(str(folder), settings_of(OmegaConf.load(folder / "config.yaml")), told)


def load(paths: Iterable[Path]) -> Records:
    """What these folders, each a run's or a sweep's, and files of records tell. A run that is told of twice alike is
    one. Raises ValueError where a path has no finished run, or a file is no file of records."""
    found = [_of_folder(path) if path.is_dir() else _read(path) for path in paths]
    runs: list[Run] = []
    for run in (run for records in found for run in records.runs):
        if not any((run.settings, run.summary) == (other.settings, other.summary) for other in runs):
            runs.append(run)
    tuned = {tuple(sorted(row["combination"])): row for records in found for row in records.tuned}
    commands = {command: when for records in found for command, when in records.commands.items()}
    return Records(runs, list(tuned.values()), commands)


def beside(sweep: Path) -> Records:
    """What a sweep's folder tells beside its runs: what searches chose, and the commands."""
    return Records((), _json(sweep / TUNED, []), _json(sweep / COMMANDS, {}))


def save(file: Path, records: Records) -> None:
    """Write a file of records."""
    shared = [run.settings.items() for run in records.runs]
    first = dict(shared[0]) if shared else {}
    common: dict[str, Any] = {
        key: value for key, value in first.items() if all((key, value) in items for items in shared)
    }
    lines: list[Mapping[str, Any]] = [{"settings": common}]
    for run in sorted(records.runs, key=lambda run: (run.summary["data"], run.summary["label"], run.seed)):
        own = {key: value for key, value in run.settings.items() if key not in common}
        lines.append({"settings": own, "summary": run.summary})
    lines += records.tuned
    lines += [{"command": command, "when": when} for command, when in records.commands.items()]
    home.write(file, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _read(file: Path) -> Records:
    rows = list(_rows(file))
    common: dict[str, Any] = next((row["settings"] for row in rows if row.keys() == {"settings"}), {})
    runs = [Run(str(file), common | row["settings"], row["summary"]) for row in rows if "summary" in row]
    if not runs and not any("chosen" in row for row in rows):
        raise ValueError(f"{file} is no file of records: no line of it tells of a run; fedmm compare --into writes one")
    tuned = [row for row in rows if "chosen" in row]
    return Records(runs, tuned, {row["command"]: row["when"] for row in rows if "command" in row})


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    if not file.exists():
        raise ValueError(f"{file} is not there; name a run's folder, a sweep's, or a file of records")
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{file} is no file of records: line {number} is no json object; name a run's folder, "
                             "or the .jsonl that fedmm compare --into leaves beside its page")  # fmt: skip
        yield row


def _of_folder(path: Path) -> Records:
    inside = sorted((path / "runs").iterdir()) if (path / "runs").is_dir() else [path]
    runs = [of_arm(arm) for folder in inside for arm in summary.arm_folders(folder)]
    if not runs:
        raise ValueError(f"no finished run in {path}; a finished one has a summary.json")
    return replace(beside(path), runs=runs)


def _json(file: Path, nothing: Any) -> Any:
    return json.loads(file.read_text()) if file.exists() else nothing
