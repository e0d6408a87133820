"""The figures of a run and the table of its arms, from the files of its folder alone.

`global` is accuracy on everybody's test examples: of the one shared model, or, for personal models, the mean over
clients of each one's accuracy on all of them. `own` is each client's accuracy on its own part.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fedmm.runs import home
from fedmm.runs.folder import read_rows


def scores(folder: Path) -> dict[int, dict[str, Any]]:
    """Accuracy by round of the scored state: `global` (None where it was not measured everywhere), `own` by client."""
    cfg = OmegaConf.load(folder / "config.yaml")
    found: dict[int, dict[int, dict[int, tuple[int, int]]]] = defaultdict(lambda: defaultdict(dict))
    for row in read_rows(folder / "scores.jsonl"):
        found[row["round"]][row["client"]][row["part"]] = (row["right"], row["count"])
    return {round: _score(parts, cfg) for round, parts in sorted(found.items())}


def _score(parts: dict[int, dict[int, tuple[int, int]]], cfg: Any) -> dict[str, Any]:
    """One state's accuracy from (right, count) by client and part."""
    own = {
        part: right / count
        for client, rows in sorted(parts.items())
        for part, (right, count) in sorted(rows.items())
        if (part == client or cfg.pooled) and count
    }
    everything = set(range(cfg.clients))
    if "local" in cfg.method.use:  # a model for each client
        full = [rows for rows in parts.values() if rows.keys() == everything]
        overall = statistics.fmean(map(_accuracy, full)) if len(full) == len(parts) > 0 else None
    else:
        union = {part: score for rows in parts.values() for part, score in rows.items()}
        overall = _accuracy(union) if union.keys() == everything else None
    return {"global": overall, "own": own}


def write_summary(folder: Path) -> dict[str, Any]:
    """Work out the figures of a finished arm and write summary.json."""
    cfg = OmegaConf.load(folder / "config.yaml")
    moved: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in read_rows(folder / "ledger.jsonl"):
        if row["kind"] == "bytes":
            moved[row["channel"]][0] += row["up_bytes"]
            moved[row["channel"]][1] += row["down_bytes"]
    rounds = read_rows(folder / "rounds.jsonl")
    scored = scores(folder)
    nothing: dict[str, Any] = {"global": None, "own": {}}
    summary = {
        "label": cfg.label,
        "seed": cfg.seed,
        "rounds": cfg.rounds,
        "clients": cfg.clients,
        "split": cfg.evaluate.split,
        "zero_shot": scored.get(0, nothing),
        "final": scored.get(cfg.rounds, nothing),
        "bytes": dict(moved),
        "seconds": _seconds(folder),
        "lost": sum(len(row["lost"]) for row in rounds),
        "state": rounds[-1]["state"] if rounds else None,
    }
    home.write(folder / "summary.json", json.dumps(summary, indent=1).encode())
    return summary


def arm_folders(run: Path) -> list[Path]:
    """The folders of a run's finished arms, the main one first."""
    return [path for path in (run, *sorted((run / "arms").glob("*"))) if (path / "summary.json").exists()]


@dataclass(frozen=True)
class Line:
    """One line of the table: a label and, per seed, the figures (from 0 to 1, None where not measured)."""

    label: str
    seeds: tuple[int, ...]
    overall: tuple[float | None, ...]
    own: tuple[float, ...]
    worst: tuple[float, ...]
    up_bytes: int
    down_bytes: int
    seconds: float


def lines(runs: Sequence[Path]) -> list[Line]:
    """The table of several runs of the same arms, one run a seed: zero-shot first, then by rising accuracy."""
    by_label: dict[str, list[dict[str, Any]]] = defaultdict(list)
    zero: list[dict[str, Any]] = []
    for run in runs:
        summaries = [json.loads((path / "summary.json").read_text()) for path in arm_folders(run)]
        for summary in summaries:
            if any(other["seed"] == summary["seed"] for other in by_label[summary["label"]]):
                raise ValueError(
                    f"{run} has {summary['label']} with seed {summary['seed']} again; give each seed once, and set "
                    "label=... where arms differ in more than their method and rule"
                )
            by_label[summary["label"]].append(summary)
        with_zero = [s for s in summaries if s["zero_shot"]["global"] is not None]
        zero += [{**with_zero[0], "final": with_zero[0]["zero_shot"], "bytes": {}, "seconds": 0.0}] if with_zero else []
    arms = sorted(
        (_line(label, found) for label, found in by_label.items()), key=lambda line: mean(line.overall) or 0.0
    )
    return [_line("zero-shot", zero), *arms] if zero else arms


def mean(values: Sequence[float | None]) -> float | None:
    return statistics.fmean(v for v in values if v is not None) if values and None not in values else None


def interval(values: Sequence[float | None]) -> float | None:
    """Half the width of the 95% interval of the mean by Student's t, or None of fewer than two values."""
    if len(values) < 2 or None in values:
        return None
    from scipy import stats  # half a second to import

    t = float(stats.t.ppf(0.975, len(values) - 1))
    return t * statistics.stdev(v for v in values if v is not None) / math.sqrt(len(values))


def percent(values: Sequence[float | None]) -> str:
    """Mean and 95% interval in per cent; a dash where it was not measured."""
    centre, half = mean(values), interval(values)
    if centre is None:
        return "–"
    return f"{100 * centre:.1f}" + (f" ± {100 * half:.1f}" if half is not None else "")


HEADINGS = ("arm", "global accuracy %", "own test %", "worst client %", "MB up", "MB down", "seconds")


def cells(line: Line) -> tuple[str, ...]:
    moved = [f"{value / 1e6:.1f}" if line.seconds else "0" for value in (line.up_bytes, line.down_bytes)]
    return (line.label, percent(line.overall), percent(line.own), percent(line.worst), *moved, f"{line.seconds:.0f}")


def markdown(table: Sequence[Line]) -> str:
    """The table as the README holds it."""
    rows = [HEADINGS, ("---",) + ("---:",) * (len(HEADINGS) - 1), *map(cells, table)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def difference(line: Line, other: Line) -> str | None:
    """How much more accurate `line` is than `other`, in points, paired by seed; None where no seed has both."""
    theirs = dict(zip(other.seeds, other.overall, strict=True))
    pairs = [(mine, theirs.get(seed)) for seed, mine in zip(line.seeds, line.overall, strict=True)]
    gaps = [mine - yours for mine, yours in pairs if mine is not None and yours is not None]
    if not gaps:
        return None
    half = interval(gaps)
    spread = f" ± {100 * half:.1f}" if half is not None else " (one seed)"
    return f"{line.label} minus {other.label}: {100 * statistics.fmean(gaps):+.1f}{spread} points of global accuracy"


def _seconds(folder: Path) -> float:
    """How long an arm took, from its start to its last event; of a resumed one, the sum of its attempts."""
    total, began, last = 0.0, None, 0.0
    for event in read_rows(folder / "events.jsonl"):
        if event["event"] in ("run", "arm"):
            total += last - began if began is not None else 0.0
            began = event["time"] if event["event"] == "arm" else None
        last = event["time"]
    return total + (last - began if began is not None else 0.0)


def _line(label: str, found: Sequence[dict[str, Any]]) -> Line:
    own = [list(s["final"]["own"].values()) for s in found]
    moved = [[v[i] for s in found for v in s["bytes"].values()] for i in (0, 1)]
    return Line(
        label,
        tuple(s["seed"] for s in found),
        tuple(s["final"]["global"] for s in found),
        tuple(statistics.fmean(values) for values in own if values),
        tuple(min(values) for values in own if values),
        sum(moved[0]) // max(1, len(found)),
        sum(moved[1]) // max(1, len(found)),
        statistics.fmean(s["seconds"] for s in found) if found else 0.0,
    )


def _accuracy(rows: dict[int, tuple[int, int]]) -> float:
    return sum(right for right, _ in rows.values()) / max(1, sum(count for _, count in rows.values()))
