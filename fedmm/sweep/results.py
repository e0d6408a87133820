"""The page of several runs: their tables and one picture, with the command and the day they were made, and beside it
the records they were made of."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedmm.results import intervals, plots, table
from fedmm.runs import records
from fedmm.runs.records import Choice, Records
from fedmm.storage import machine_cache
from fedmm.sweep import plan


def write(into: Path, made_of: Records, against: str | None, command: str, *, anew: bool = False) -> Path:
    """Write `into`, a markdown file, and beside it the picture and the file of records; returns `into`.

    Raises ValueError for a name that is no markdown file's, as the others take its name with an ending of their own,
    and where the file of records that lies there has runs or searches that these would not replace, unless `anew`.
    """
    if into.suffix != ".md":
        raise ValueError(f"--into {into} must end in .md; picture and records take its name, with .png and .jsonl")
    picture, kept = into.with_suffix(".png"), into.with_suffix(".jsonl")
    if not anew and (lost := records.only_in(kept, made_of)):
        raise ValueError(
            f"{kept} has runs or searches that these would not replace, {len(lost)} of them, as {lost[0]}; name it "
            "among what is compared, give another --into, or remove it"
        )
    rows = intervals.rows(made_of.runs)
    shown = table.columns(against, rows)
    machine_cache.write(picture, plots.png(plots.comparison(rows)), public=True)
    records.save(kept, made_of)
    made = [f"- `{asked}`, {when}." for asked, when in ({command: records.now()} | dict(made_of.commands)).items()]
    if days := records.days(made_of.runs):
        made.append(f"- Runs of {days}.")
    parts = [
        f"# {into.stem.replace('_', ' ').capitalize()}",
        "\n".join(made),
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
