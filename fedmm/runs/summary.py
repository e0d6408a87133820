"""The figures of a run's arms, from the files of its folder alone.

`global` is accuracy on everybody's test examples: of the one shared model, or, for personal models, the mean over
clients of each one's accuracy on all of them. `own` is each client's accuracy on its own part. `groups`, where
`evaluate.groups` asks for them, are (right, count) of many, medium and few classes over everybody's own parts.
`product_error` is how far the merged products B A are from the mean of the clients' products, relative to that: mean
over adapters, then over rounds; None of what has no low-rank adapters, or where it was too much work to tell.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmm.config.derived import personal
from fedmm.evaluate.answers import Answer
from fedmm.evaluate.groups import group, tally
from fedmm.runs import events
from fedmm.runs.events import ArmBegan, RunBegan
from fedmm.runs.folder import read_config, read_rows
from fedmm.storage import machine_cache

CLASSES = "classes.json"
"""Training examples by class over all clients, in a run's folder where `evaluate.groups` asks for them."""


def scores(folder: Path) -> dict[int, dict[str, Any]]:
    """Accuracy by round of the scored state: `global` (None where it was not measured everywhere), `own` by client."""
    cfg = read_config(folder)
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
    if personal(cfg):
        full = [rows for rows in parts.values() if rows.keys() == everything]
        overall = statistics.fmean(map(_accuracy, full)) if len(full) == len(_scorers(cfg)) else None
    else:
        union = {part: score for rows in parts.values() for part, score in rows.items()}
        overall = _accuracy(union) if union.keys() == everything else None
    return {"global": overall, "own": own}


def _scorers(cfg: Any) -> list[int]:
    """The clients that are scored at the end."""
    return [0] if cfg.pooled else list(range(cfg.clients))


def write_summary(folder: Path) -> dict[str, Any]:
    """Work out the figures of a finished arm and write summary.json."""
    cfg = read_config(folder)
    moved: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    llm_samples, client_parameters = 0, 0.0
    for row in read_rows(folder / "ledger.jsonl"):
        if row["kind"] == "bytes":
            moved[row["channel"]][0] += row["up_bytes"]
            moved[row["channel"]][1] += row["down_bytes"]
            llm_samples += row["llm_samples"]
        else:
            llm_samples += int(row.get("llm_samples", 0))  # where the LLM is at the client
            held = row.get("edge_parameters", 0.0) + row.get("trained_parameters", 0.0)
            client_parameters = max(client_parameters, held)
    stages: dict[str, dict[str, float]] = {}
    for row in read_rows(folder / "stages.jsonl"):
        told = stages.setdefault(row["stage"], {"seconds": 0.0, "llm_samples": 0})
        told["seconds"] += row["seconds"]
        told["llm_samples"] += row["llm_samples"]
    rounds = read_rows(folder / "rounds.jsonl")
    scored = scores(folder)
    scorers = {row["client"] for row in read_rows(folder / "scores.jsonl") if row["round"] == cfg.rounds}
    nothing: dict[str, Any] = {"global": None, "own": {}}
    zero_shot, final = ({**scored.get(round, nothing), **_groups(folder, cfg, round)} for round in (0, cfg.rounds))
    environment = json.loads((folder / "environment.json").read_text())
    summary = {
        "data": cfg.data,
        "label": cfg.label,
        "head": cfg.head,
        "seed": cfg.seed,
        "rounds": cfg.rounds,
        "clients": cfg.clients,
        "split": cfg.evaluate.split,
        "zero_shot": zero_shot,
        "final": final,
        "bytes": dict(moved),
        "llm_samples": llm_samples,
        "stages": stages,
        "client_parameters": client_parameters,
        "seconds": _seconds(folder),
        "lost": sum(len(row["lost"]) for row in rounds),
        "unscored": [client for client in _scorers(cfg) if client not in scorers],
        "product_error": _product_error(rounds),
        "state": rounds[-1]["state"] if rounds else None,
        "environment": {key: value for key, value in environment.items() if key != "run"},
    }
    machine_cache.write(folder / "summary.json", json.dumps(summary, indent=1).encode())
    return summary


def _groups(folder: Path, cfg: Any, round: int) -> dict[str, Any]:
    """Right and asked by group of classes, of each client's answers on its own part; nothing where not asked for."""
    if not (by := cfg.evaluate.get("groups")):  # runs from before there were groups have no such setting
        return {}
    groups = group(json.loads((folder / CLASSES).read_text()), by)
    rows = [row for row in read_rows(folder / "predictions.jsonl") if row["round"] == round]
    said = {(row["part"], row["id"]): Answer(row["id"], row["said"], row["truth"]) for row in rows}  # a resumed: twice
    return {"groups": tally(((answer.truth, answer.right) for answer in said.values()), groups)}


def _product_error(rounds: Sequence[Mapping[str, Any]]) -> float | None:
    by_round = [statistics.fmean(row["product_error"].values()) for row in rounds if row.get("product_error")]
    return statistics.fmean(by_round) if by_round else None


def arm_folders(run: Path) -> list[Path]:
    """The folders of a run's finished arms, the main one first."""
    return [path for path in (run, *sorted((run / "arms").glob("*"))) if (path / "summary.json").exists()]


def _seconds(folder: Path) -> float:
    """How long an arm took, from its start to its last event; of a resumed one, the sum of its attempts."""
    total, began, last = 0.0, None, 0.0
    for logged in events.read(folder):
        if isinstance(logged.event, RunBegan | ArmBegan):
            total += last - began if began is not None else 0.0
            began = logged.time if isinstance(logged.event, ArmBegan) else None
        last = logged.time
    return total + (last - began if began is not None else 0.0)


def _accuracy(rows: dict[int, tuple[int, int]]) -> float:
    return sum(right for right, _ in rows.values()) / max(1, sum(count for _, count in rows.values()))
