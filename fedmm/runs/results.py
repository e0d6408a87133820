"""The page of several runs: their tables and one picture, with the command and the day they were made."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmm.runs import evidence, home, plots, summary, table

COMMANDS = "commands.json"  # in a sweep's folder


def runs_of(paths: Sequence[Path]) -> list[Path]:
    """The finished runs in these folders, each a run's or a sweep's. Raises ValueError where one has none."""
    found: list[Path] = []
    for path in paths:
        inside = sorted((path / "runs").iterdir()) if (path / "runs").is_dir() else [path]
        finished = [folder for folder in inside if summary.arm_folders(folder)]
        if not finished:
            raise ValueError(f"no finished run in {path}; a finished one has a summary.json")
        found += finished
    return found


def note(sweep: Path, command: str) -> None:
    """Keep with a sweep's folder the command that has made a part of it, its day and its machine."""
    home.write(sweep / COMMANDS, json.dumps(_noted(sweep) | {command: _now()}, indent=1).encode())


def _now() -> str:
    return f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores"


def _noted(sweep: Path) -> dict[str, str]:
    file = sweep / COMMANDS
    return json.loads(file.read_text()) if file.exists() else {}


def write(into: Path, rows: Sequence[evidence.Row], against: str | None, command: str, sweeps: Sequence[Path]) -> Path:
    """Write `into`, a markdown file, and the picture beside it; returns `into`. `sweeps` tell by which commands they
    were made and what they have chosen."""
    tuned = [sweep / "tuned.json" for sweep in sweeps]
    made = {command: _now()} | {asked: when for sweep in sweeps for asked, when in _noted(sweep).items()}
    picture, shown = into.with_suffix(".png"), table.columns(against, rows)
    home.write(picture, plots.png(plots.comparison(rows)))
    parts = [
        f"# {into.stem.replace('_', ' ').capitalize()}",
        "\n".join(f"- `{asked}`, {when}." for asked, when in made.items()),
        table.reading(shown),
        table.markdown(rows, shown),
        f"![accuracy by arm, on clients' own test parts and on everybody's]({picture.name})",
    ]
    if gains := table.by_client(rows):
        parts += [
            "## Is it worth joining?",
            "Points of own accuracy above the client alone, mean over seeds and 95% interval, paired by seed.",
            gains,
        ]
    if chosen := [row for file in tuned if file.exists() for row in json.loads(file.read_text())]:
        parts += ["## Settings chosen on the validation split", _tuned(chosen)]
    home.write(into, ("\n\n".join(parts) + "\n").encode())
    return into


def _tuned(found: Sequence[Mapping[str, Any]]) -> str:
    values = list(dict.fromkeys(value for row in found for value in row["tried"]))
    lines = ["| combination | chosen | " + " | ".join(values) + " |", "| --- |" + " ---: |" * (1 + len(values))]
    for row in found:
        tried = " | ".join(f"{100 * row['tried'][v]:.1f}" if v in row["tried"] else "–" for v in values)
        edge = " (edge)" if row["at_the_edge"] else ""
        lines.append(f"| {' '.join(row['combination'])} | {row['chosen']}{edge} | {tried} |")
    return "Own accuracy in per cent of a seed used for nothing else.\n\n" + "\n".join(lines)
