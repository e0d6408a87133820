"""The page of several runs: their tables and one picture, with the command and the day they were made, and beside it
the records they were made of."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmm.runs import evidence, home, plots, records, table
from fedmm.runs.records import Records


def note(sweep: Path, command: str) -> None:
    """Keep with a sweep's folder the command that has made a part of it, its day and its machine."""
    made = dict(records.beside(sweep).commands) | {command: _now()}
    home.write(sweep / records.COMMANDS, json.dumps(made, indent=1).encode())


def _now() -> str:
    return f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores"


def write(into: Path, made_of: Records, against: str | None, command: str) -> Path:
    """Write `into`, a markdown file, and beside it the picture and the file of records; returns `into`."""
    rows = evidence.rows(made_of.runs)
    picture, kept, shown = into.with_suffix(".png"), into.with_suffix(".jsonl"), table.columns(against, rows)
    home.write(picture, plots.png(plots.comparison(rows)))
    records.save(kept, made_of)
    made = {command: _now()} | dict(made_of.commands)
    parts = [
        f"# {into.stem.replace('_', ' ').capitalize()}",
        "\n".join(f"- `{asked}`, {when}." for asked, when in made.items()),
        f"{table.reading(shown)} What each run was asked and its figures by client: [{kept.name}]({kept.name}).",
        table.markdown(rows, shown),
        f"![accuracy by arm, on clients' own test parts and on everybody's]({picture.name})",
    ]
    if gains := table.by_client(rows):
        parts += [
            "## Is it worth joining?",
            "Points of own accuracy above the client alone, mean over seeds and 95% interval, paired by seed.",
            gains,
        ]
    if made_of.tuned:
        parts += ["## Settings chosen on the validation split", _tuned(made_of.tuned)]
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
