"""The page of several runs: their tables and one picture, with the command and the day they were made, and beside it
the records they were made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedmm.runs import evidence, home, plots, records, table
from fedmm.runs.records import Choice, Records


def write(into: Path, made_of: Records, against: str | None, command: str) -> Path:
    """Write `into`, a markdown file, and beside it the picture and the file of records; returns `into`.

    Raises ValueError for a name that is no markdown file's: the others take its name with an ending of their own.
    """
    if into.suffix != ".md":
        raise ValueError(f"--into {into} must end in .md; picture and records take its name, with .png and .jsonl")
    rows = evidence.rows(made_of.runs)
    picture, kept, shown = into.with_suffix(".png"), into.with_suffix(".jsonl"), table.columns(against, rows)
    home.write(picture, plots.png(plots.comparison(rows)))
    records.save(kept, made_of)
    made = {command: records.now()} | dict(made_of.commands)
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
    if made_of.choices:
        parts += ["## Settings chosen on the validation split", _chosen(made_of.choices)]
    home.write(into, ("\n\n".join(parts) + "\n").encode())
    return into


def _chosen(choices: Sequence[Choice]) -> str:
    """What each search found, a column for each value that any of them tried."""
    values = list(dict.fromkeys(value for choice in choices for value in choice.tried))
    lines = [
        "| combination | setting | chosen | " + " | ".join(values) + " |",
        "| --- | --- |" + " ---: |" * (1 + len(values)),
    ]
    for choice in choices:
        tried = " | ".join(f"{100 * choice.tried[v]:.1f}" if v in choice.tried else "–" for v in values)
        edge = " (edge)" if choice.at_the_edge else ""
        lines.append(f"| {' '.join(choice.combination)} | {choice.key} | {choice.chosen}{edge} | {tried} |")
    return "Own accuracy in per cent of a seed used for nothing else.\n\n" + "\n".join(lines)
