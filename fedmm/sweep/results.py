"""The page of several runs: their tables and one picture, with the command and the day they were made, and beside it
the records they were made of."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedmm.results import intervals, plots, table
from fedmm.runs import records
from fedmm.runs.records import Choice, Records
from fedmm.storage import machine_cache
from fedmm.sweep import plan


def write(
    into: Path,
    made_of: Records,
    against: str | None,
    command: str,
    *,
    records_to: Path | None = None,
    anew: bool = False,
) -> Path:
    """Write `into`, a markdown file, with the picture beside it and the records in `records_to`; returns `into`.

    Without `records_to` the records lie beside the page too. Raises ValueError where a name has another ending than .md
    or .jsonl and, unless `anew`, where the file of records has runs or searches that the new one would lack.
    """
    if into.suffix != ".md":
        raise ValueError(f"--into {into} must end in .md; picture and records take its name, with .png and .jsonl")
    picture, records_to = into.with_suffix(".png"), records_to or into.with_suffix(".jsonl")
    if records_to.suffix != ".jsonl":
        raise ValueError(f"--records {records_to} must end in .jsonl, as records do")
    if not anew and (lost := records.only_in(records_to, made_of)):
        raise ValueError(
            f"{records_to} has {len(lost)} runs or searches that would be lost, such as {lost[0]}; add {records_to} to "
            "what is compared, choose another --into or --records, or remove the file"
        )
    rows = intervals.rows(made_of.runs)
    shown = table.columns(against, rows)
    machine_cache.write(picture, plots.png(plots.comparison(rows)), public=True)
    records.save(records_to, made_of)
    link = Path(os.path.relpath(records_to, into.parent)).as_posix()
    made = [f"- `{asked}`, {when}." for asked, when in ({command: records.now()} | dict(made_of.commands)).items()]
    if days := records.days(made_of.runs):
        made.append(f"- Runs of {days}.")
    parts = [
        f"# {into.stem.replace('_', ' ').capitalize()}",
        "\n".join(made),
        f"{table.reading(shown)} What each run was asked and its figures by client: [{records_to.name}]({link}).",
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
    machine_cache.write(into, ("\n\n".join(parts) + "\n").encode(), public=True)
    return into


def _chosen(choices: Sequence[Choice]) -> str:
    """What each search found, a column for each value that any of them tried, and the mean of those that took one."""
    values = _in_order(value for choice in choices for value in choice.tried)
    everywhere = set.intersection(*(set(choice.combination) for choice in choices)) if len(choices) > 1 else set()
    together: dict[tuple[str, ...], list[Choice]] = {}
    for choice in choices:
        alike = (part for part in choice.combination if part.split("=")[0] not in choice.across)
        together.setdefault((choice.key, choice.chosen, *alike), []).append(choice)
    lines = [
        "| combination | setting | chosen | " + " | ".join(values) + " |",
        "| --- | --- |" + " ---: |" * (1 + len(values)),
    ]
    for (key, chosen, *shared), group in together.items():
        edge = " (edge)" if group[0].at_the_edge else ""
        rows = [(choice.combination, choice.tried) for choice in group]
        if group[0].across:
            of_all = {
                v: statistics.fmean(c.tried[v] for c in group) for v in values if all(v in c.tried for c in group)
            }
            if of_all and plan.best(of_all) == chosen:  # else others were among them, which a later search has
                rows.append(((*shared, f"(mean over {', '.join(group[0].across)})"), of_all))
        for combination, tried in rows:
            name = " ".join(part for part in combination if part not in everywhere) or "–"
            cells = " | ".join(f"{100 * tried[value]:.1f}" if value in tried else "–" for value in values)
            lines.append(f"| {name} | {key} | {chosen}{edge} | {cells} |")
    shown = "Own accuracy in per cent of a seed used for nothing else."
    return "\n\n".join([shown, "\n".join(lines)])


def _in_order(values: Iterable[str]) -> list[str]:
    """Each once; numbers in rising order."""
    once = list(dict.fromkeys(values))
    try:
        return sorted(once, key=float)
    except ValueError:
        return once
