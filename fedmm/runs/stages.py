"""MLLM-FL's two stages at the server, made from a configuration: before the first round, and after an aggregation.

    open images -> captions -> a compact encoder that sees for the LLM                      `pretrained`
    open images -> a class-balanced set and the MLLM's word on it -> a better aggregate     `Alignment`

Clients do nothing for either, and nothing of them goes to clients but the state, which is as large as without. What
costs time is kept under FEDMM_HOME by what it depends on: texts, scores, and the encoder, with notes on the way.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from omegaconf import OmegaConf
from torch import Tensor

from fedmm import seeds, tree
from fedmm.data.partition import answers_of
from fedmm.edge import compact as compacts
from fedmm.edge import parts as edge_parts
from fedmm.edge.folding import unfolded
from fedmm.edge.prepare import Prepared, encode, prepare
from fedmm.evaluate.answers import answers
from fedmm.llm.loading import twin
from fedmm.llm.local import LocalLLM
from fedmm.model import Model
from fedmm.runs import home
from fedmm.runs.build import Built, Whole, cached_encoder, initial_state, server_model, splits
from fedmm.runs.config import make
from fedmm.runs.folder import RunFolder
from fedmm.runs.settings import Config
from fedmm.stages.align import Aligned
from fedmm.stages.pretrain import Look
from fedmm.stages.scores import agreement, balanced_set, class_scores
from fedmm.types import Batch, Example, State

log = logging.getLogger("fedmm")


def pretrained(cfg: Config, held: Whole, folder: RunFolder) -> State | None:
    """The values of the compact encoder that `cfg` asks for: pretrained, or as drawn; None where there is none."""
    if not cfg.compact:
        return None
    compact = edge_parts.empty_compact(held.parts, make(cfg.compact))
    compacts.reset(compact, seeds.generator(cfg.seed, "compact"))
    if cfg.pretrain.step:
        _Pretraining(cfg, held, folder).run(compact)
    return tree.clone(compact.state_dict())


class _Pretraining:
    """The first stage, once for what it depends on: a second run, or arm, finds the encoder made."""

    def __init__(self, cfg: Config, held: Whole, folder: RunFolder) -> None:
        self.cfg, self.held, self.folder = cfg, held, folder

    def run(self, compact: compacts.Compact) -> None:
        began = time.perf_counter()
        place = home.home() / "pretrained"
        with _threads(self.cfg.pretrain.threads), _alone(place):
            mllm = the_mllm(self.cfg, self.held)
            told = make(self.cfg.captions)(
                mllm.model,
                mllm.processor,
                self.held.backbone.prompt,
                open_examples(self.cfg),
                home.home() / "captions" / f"{_key(OmegaConf.to_yaml(self.cfg.dataset))}.jsonl",
            )
            captioned = time.perf_counter()
            made = place / f"{self._key(told.kept)}.safetensors"
            losses = []
            if not made.exists():
                log.info("pretraining on %d texts of open images; dropped: %s", len(told.kept), told.dropped)
                notes = _NotesAt(made.with_suffix(".part"))
                losses = make(self.cfg.pretrain.step)(compact, mllm.model, self._looks(mllm, told.examples), notes)
                home.save(compact.state_dict(), made)
                notes.path.unlink(missing_ok=True)
            compact.load_state_dict(safetensors.torch.load_file(made))
        if not self.folder.rows("stages.jsonl"):
            self.folder.append(
                "stages.jsonl", stage="pretrain", round=0, texts=len(told.kept), dropped=told.dropped,
                captions_seconds=captioned - began, seconds=time.perf_counter() - began, llm_samples=mllm.llm.samples,
                steps=len(losses), loss=losses[-1] if losses else None, parameters=_size(compact),
                teacher_parameters=_size(mllm.model.edge.encoder),
            )  # fmt: skip

    def _looks(self, mllm: _MLLM, examples: Sequence[Example]) -> list[Look]:
        side = make(self.cfg.compact).side
        items = mllm.ready(examples)
        return [Look(item, functools.partial(compacts.pixels, e.images, side)) for item, e in zip(items, examples, strict=True)]

    def _key(self, captions: Sequence[Any]) -> str:
        cfg = self.cfg
        said = hashlib.sha256(json.dumps([asdict(caption) for caption in captions]).encode()).hexdigest()
        nodes = [OmegaConf.to_yaml(node) for node in (cfg.pretrain, cfg.compact)]
        return _key(said, self.held.card["edge"], str(cfg.seed), torch.__version__, *nodes)
