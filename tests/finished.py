"""Finished runs without a run: the files that evidence is made of, and what it says of them."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import OmegaConf

from fedmm.config import composition
from fedmm.results import intervals, table
from fedmm.runs import records


def write_arm(path: Path, label: str, seed: int, own: dict[str, float], **more: object) -> Path:
    """A finished arm as summary.write_summary leaves it."""
    path.mkdir(parents=True, exist_ok=True)
    cfg = {"label": label, "seed": seed, "rounds": more.pop("rounds", 8), "link": {"bind": f"127.0.0.1:{seed}"}}
    cfg |= {"evaluate": {"split": more.pop("split", "test")}}
    (path / "config.yaml").write_text(json.dumps(cfg))
    score = {"global": sum(own.values()) / len(own), "own": own}
    summary = {
        "data": "domain", "label": label, "seed": seed, "zero_shot": {"global": 0.25, "own": {"0": 0.2, "1": 0.3}},
        "final": score, "bytes": {"steps": [3_000_000, 1_000_000], "control": [1000, 1000]}, "seconds": 10.0,
        "llm_samples": 640, "client_parameters": 5e6, **more,
    }  # fmt: skip
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def composed_arm(path: Path, asked: list[str], own: dict[str, float]) -> Path:
    """A finished arm as a run of these overrides leaves it."""
    cfg = composition.compose(asked)
    write_arm(path, cfg.label, cfg.seed, own, data=cfg.data)
    (path / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    return path


def rows_of(paths: list[Path]) -> list[intervals.Row]:
    return intervals.rows(records.load(paths).runs)


def page(rows: list[intervals.Row]) -> str:
    return table.markdown(rows, table.columns("FedAvg", rows))
