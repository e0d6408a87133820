"""The page of a run: one html file that needs no network and no script, made from the files of the run's folder.

Only the gallery's images are not in the folder: the server builds them again from the dataset of the configuration,
which it can for embedded and open data. `run.examples=0` leaves the gallery out.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from fedmm.config.settings import Config
from fedmm.evaluate.answers import Answer
from fedmm.federation.build import splits
from fedmm.results import intervals, plots, table
from fedmm.results.page import CHANNELS, PAGE
from fedmm.runs import events, records, summary
from fedmm.runs.events import ArmBegan, ClientsUnscored
from fedmm.runs.folder import read_config, read_rows
from fedmm.shown import visible
from fedmm.storage import machine_cache
from fedmm.types import Example

DASH = "\N{EN DASH}"
THUMBNAIL = 256  # pixels of the longer side of an image in the page
REPORTED = {
    "seconds", "start_seconds", "score_seconds", "link_seconds", "peak_rss_bytes", "edge_parameters",
    "trained_parameters",
}  # fmt: skip
"""What a client's report measures whole; what an update says beside it may be anything."""
OUTCOMES = {
    "put right": "series-3",
    "still right": "series-1",
    "still wrong": "line",
    "no longer right": "series-2",
}
"""What became of an answer, and its colour in the page."""


def write(run: Path) -> Path:
    """Write plots/*.png and report.html from what lies in the folder now; returns the path of the page."""
    figures = plots.figures(run)
    for name, draw in figures.items():
        machine_cache.write(run / "plots" / f"{name}.png", plots.png(draw(plots.WIDE)))
    path = run / "report.html"
    machine_cache.write(path, render(run, figures).encode())
    return path


def render(run: Path, figures: Mapping[str, Callable[[float], plots.Figure]]) -> str:
    """The page. Questions, answers and reasons are untrusted text: they are escaped, controls too."""
    environment = jinja2.Environment(
        autoescape=True, finalize=_shown, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"bytes": plots.readable_bytes, "percent": _percent, "count": _count}
    cfg: Any = read_config(run)
    folders = summary.arm_folders(run)
    arms = [_arm(folder) for folder in folders]
    rows = intervals.rows(map(records.of_arm, folders))
    shown = table.short_columns(rows)
    return environment.from_string(PAGE).render(
        cfg=cfg,
        arms=arms,
        main=arms[0] if arms else None,
        table=_table(rows, shown),
        command=_command(run),
        environment=json.loads((run / "environment.json").read_text()),
        config=(run / "config.yaml").read_text(),
        headings=[column.heading for column in shown],
        dash=DASH,
        chance=_chance(arms[0]) if arms else None,
        channels=CHANNELS,
        panels=plots.PANELS,
        colours=plots.COLOURS,
        figures={name: _figure(name, draw) for name, draw in figures.items()},
        gallery=gallery(run, cfg),
    )


# ---- figures of the arms ------------------------------------------------------------------------------------------


def _arm(folder: Path) -> dict[str, Any]:
    """What the page says of one finished arm: its summary, its curve, what its clients hold and how long they take."""
    told = json.loads((folder / "summary.json").read_text())
    rounds = read_rows(folder / "rounds.jsonl")
    ledger = read_rows(folder / "ledger.jsonl")
    client = [row for row in ledger if row["kind"] == "client" and row.keys() >= REPORTED]  # else its report was lost
    questions = {}
    for row in read_rows(folder / "scores.jsonl"):
        questions[row["part"]] = row["count"]
    lost = [
        {"round": row["round"], "client": int(client), "reason": reason}
        for row in rounds
        for client, reason in row["lost"].items()
    ]
    unscored = [logged.event.lost for logged in events.read(folder) if isinstance(logged.event, ClientsUnscored)]
    lost += [
        {"round": "final", "client": client, "reason": unscored[-1].get(client) if unscored else "not scored"}
        for client in told.get("unscored", [])
    ]
    return told | {
        "curve": plots.curve(folder),
        "questions": questions,
        "examples": {int(client): count for row in rounds for client, count in row["examples"].items()},
        "lost": lost,
        "stages": _stages(read_rows(folder / "stages.jsonl")),
        "control": told["bytes"].get("control", [0, 0]),
        "link": [sum(both[i] for name, both in told["bytes"].items() if name != "control") for i in (0, 1)],
        "stored": _stored(folder, client),
        "means": _means(client),
    }


def _stages(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the server did before the first round and after aggregations; None where it did nothing."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_name.setdefault(row["stage"], []).append(row)
    aligned = by_name.get("align", [])
    return (
        {
            "pretrain": by_name.get("pretrain", [None])[0],
            "open_set": by_name.get("open set", [None])[0],
            "aligned": aligned,
            "kept": sum(row["kept"] == 0 for row in aligned),
            "seconds": sum(row["seconds"] for row in aligned),
        }
        if rows
        else None
    )


def _stored(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Parameters that lie on a client, frozen and trained, and those of the whole model; None where none reported."""
    cards = [logged.event.card for logged in events.read(folder) if isinstance(logged.event, ArmBegan)]
    if not rows or not cards:
        return None
    frozen, trained = (max(row[name] for row in rows) for name in ("edge_parameters", "trained_parameters"))
    model = cards[-1]["model_parameters"]
    return {"frozen": frozen, "trained": trained, "model": model, "less": 1 - (frozen + trained) / model}


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean over clients and rounds of each time that clients report, of the rounds in which they trained."""
    trained = [row for row in rows if row.keys() >= {"train_seconds", "fisher_seconds"}]
    names = ("seconds", "start_seconds", "score_seconds", "train_seconds", "fisher_seconds", "link_seconds")
    means = {name: statistics.fmean(row[name] for row in trained) for name in names if trained}
    return means | {"peak_rss_bytes": max((row["peak_rss_bytes"] for row in rows), default=0.0)}


def _chance(arm: Mapping[str, Any]) -> float | None:
    """Half the 95% interval of an accuracy for the number of questions alone; normal, so None at its ends."""
    share, questions = arm["final"]["global"], sum(arm["questions"].values())
    return None if share in (None, 0, 1) else 1.96 * math.sqrt(share * (1 - share) / questions)


def _table(rows: Sequence[intervals.Row], shown: Sequence[table.Column]) -> list[dict[str, Any]]:
    """The cells of the table of arms, with the share that draws the bar behind the accuracy."""
    found = table.cells(rows, shown)
    return [{"cells": c, "share": intervals.mean(row.overall().values())} for c, row in zip(found, rows, strict=True)]


def _command(run: Path) -> str:
    """The command that asks for the same run; where its folder lay says nothing and is left out."""
    asked = (run / "overrides.txt").read_text().splitlines()
    return shlex.join(["fedmm", "run", *(override for override in asked if not override.startswith("run.dir="))])


def _figure(name: str, draw: Callable[[float], plots.Figure]) -> dict[str, Markup]:
    """One figure for a page and one for a phone; matplotlib escapes the text inside."""
    widths = {"wide": plots.WIDE, "narrow": plots.NARROW}
    return {size: Markup(plots.svg(draw(width), name.replace("_", " "))) for size, width in widths.items()}


# ---- the gallery --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """One test example as the main arm's first and last state answered it at one client."""

    client: int
    before: Answer
    after: Answer

    @property
    def outcome(self) -> str:
        if self.after.right:
            return "still right" if self.before.right else "put right"
        return "no longer right" if self.before.right else "still wrong"


def gallery(run: Path, cfg: Config) -> list[dict[str, Any]]:
    """The chosen examples by outcome, each with its count of all; empty where no answers or images may be shown."""
    pairs = _pairs(read_rows(run / "predictions.jsonl"), cfg.rounds) if cfg.run.examples and cfg.run.has_data else []
    if not pairs:
        return []
    examples = {example.id: example for example in splits(cfg)[cfg.evaluate.split]}
    shown = choose([pair for pair in pairs if pair.after.id in examples], cfg.run.examples, cfg.seed)
    return [
        {
            "outcome": outcome,
            "colour": colour,
            "count": sum(pair.outcome == outcome for pair in pairs),
            "of": len(pairs),
            "cards": [_card(pair, examples[pair.after.id]) for pair in shown if pair.outcome == outcome],
        }
        for outcome, colour in OUTCOMES.items()
    ]


def choose(pairs: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    """Some pairs, fixed by the seed and blind to everything but outcome and client.

    Each outcome gets the share it has among all (at least one, where it occurs at all), and within it clients take
    turns, each giving its examples in the order of a hash of seed and id.
    """
    by_outcome = {outcome: [pair for pair in pairs if pair.outcome == outcome] for outcome in OUTCOMES}
    shares = _shares({outcome: len(found) for outcome, found in by_outcome.items()}, count)
    return [pair for outcome in OUTCOMES for pair in _in_turn(by_outcome[outcome], seed)[: shares[outcome]]]


def _pairs(rows: Iterable[Mapping[str, Any]], last: int) -> list[Pair]:
    """Examples answered in round 0 and in the last; rows of a killed attempt that was made again stand twice."""
    said = {(row["round"], row["part"], row["id"]): Answer(row["id"], row["said"], row["truth"]) for row in rows}
    ends = sorted((part, id) for round, part, id in said if round == last and (0, part, id) in said)
    return [Pair(part, said[0, part, id], said[last, part, id]) for part, id in ends]


def _shares(counts: Mapping[str, int], total: int) -> dict[str, int]:
    """Divide `total` as `counts` are, by largest remainder after one for each that occurs."""
    shares = {name: min(1, count) for name, count in counts.items()}
    everything = sum(counts.values())
    for _ in range(min(total, everything) - sum(shares.values())):
        behind = {
            name: total * counts[name] / everything - shares[name] for name in counts if shares[name] < counts[name]
        }
        shares[max(behind, key=lambda name: behind[name])] += 1
    return shares


def _in_turn(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """Every client's first by hash, then every client's second, and so on."""
    taken: Counter[int] = Counter()
    ranked: list[tuple[int, Pair]] = []
    for pair in sorted(pairs, key=lambda pair: hashlib.sha256(f"{seed}/{pair.after.id}".encode()).digest()):
        ranked.append((taken[pair.client], pair))
        taken[pair.client] += 1
    return [pair for _, pair in sorted(ranked, key=lambda entry: entry[0])]


def _card(pair: Pair, example: Example) -> dict[str, Any]:
    return {"pair": pair, "question": example.question, "images": list(map(_image, example.images))}


def _image(image: Image.Image) -> dict[str, Any]:
    """The image as a data URL, and whether it is large enough to be smoothed when it is scaled."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    small.save(out, format="PNG", optimize=True)
    url = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    return {"url": url, "large": max(small.size) >= 96}


def _shown(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


# ---- numbers as words ---------------------------------------------------------------------------------------------


def _percent(share: float | None, digits: int = 1) -> str:
    return DASH if share is None else f"{100 * share:.{digits}f}%"


def _count(value: float) -> str:
    """A count of parameters: 1.17 M, 7.06 B."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.{max(0, 2 - int(math.log10(value / size)))}f}{unit}"
    return f"{value:.0f}"
