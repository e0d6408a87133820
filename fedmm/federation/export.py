"""From a finished run to an ordinary Hugging Face checkpoint: the tuned adapters folded into the backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedmm.config import derived, targets
from fedmm.edge import frozen_modules
from fedmm.edge.folding import fold
from fedmm.federation.build import Whole, initial_state, local_model
from fedmm.runs.folder import latest_checkpoint, read_config
from fedmm.storage import disk


def export(run: Path, into: Path) -> int:
    """Write the backbone of `run` with its last shared adapters folded in to `into`; returns their round.

    Raises ValueError where there is nothing to fold, or folding would not be exact.
    """
    if into.exists() and any(into.iterdir()):
        raise ValueError(f"{into} has files already; name a folder that is not there yet")
    cfg: Any = read_config(run) if (run / "config.yaml").exists() else None
    found = latest_checkpoint(run)
    if cfg is None or found is None:
        raise ValueError(f"{run} holds no checkpoint; name the folder of a run that has finished a round")
    round, state, _ = found
    if own := [name for name in derived.private_names(cfg) if name.startswith("shared.")]:
        raise ValueError(f"with {cfg.label} every client keeps its own {own[0]!r}: no one model is there to export")
    if not state:
        raise ValueError(f"{run} has no shared adapters: with {cfg.label} every client keeps its own")
    if cfg.get("compact"):  # not in a run from before there were any
        raise ValueError(
            f"{run} has clients with a compact network of their own, which is no part of a Hugging Face LLaVA; its "
            "values are in checkpoints/"
        )
    backbone = targets.make(cfg.llm)
    held = Whole(backbone, frozen_modules.take(backbone.model, backbone.processor), {})
    start = initial_state(cfg, local_model(cfg, held)[0].edge, "shared")  # what never travelled is at its start
    in_edge, in_llm = derived.scale(cfg.edge.lora), derived.scale(cfg.get("inner") or {})
    in_layers = {"encoder": in_edge, "connector": in_edge, "llm": in_llm}
    fold(backbone.model, start | state, derived.scale(cfg.edge), in_layers)
    with disk.named(into, "name another folder"):
        backbone.model.save_pretrained(into)
        backbone.processor.save_pretrained(into)
    return round
