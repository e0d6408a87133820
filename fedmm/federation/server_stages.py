"""MLLM-FL's two stages at the server, made from a configuration: before the first round, and after an aggregation.

    open images -> captions -> a compact encoder that sees for the LLM                      `pretrained`
    open images -> a class-balanced set and the MLLM's word on it -> a better aggregate     `Alignment`

Clients do nothing for either, and nothing of them goes to clients but the state, which is as large as without. What
costs time is kept under FEDMM_HOME by what it depends on: texts, scores, and the encoder, with notes on the way.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from omegaconf import OmegaConf
from torch import Tensor

from fedmm import seeds, tree
from fedmm.config.settings import Config
from fedmm.config.targets import make
from fedmm.edge import compact as compacts
from fedmm.edge import frozen_modules
from fedmm.edge.prepare import Processor, collate, encode, prepare
from fedmm.edge.prepared import Prepared
from fedmm.evaluate.answers import answers as answers_to
from fedmm.federation.build import Whole, cached_encoder, initial_state, local_llm, server_model, splits
from fedmm.llm.loading import twin
from fedmm.llm.local import LocalLLM
from fedmm.model import Model, SplitModel
from fedmm.runs.events import StageProgress, StateAligned
from fedmm.runs.folder import RunFolder, alone
from fedmm.stages.align import Aligned, Teacher, tuned
from fedmm.stages.captions import prepared_files
from fedmm.stages.fingerprint import fingerprint
from fedmm.stages.pretrain import Look
from fedmm.stages.scores import MORE_OPEN, agreement, balanced_set, class_scores
from fedmm.storage import machine_cache
from fedmm.types import Batch, Example, State

log = logging.getLogger("fedmm")
ROWS = "stages.jsonl"


def pretrained(cfg: Config, loaded: Whole, folder: RunFolder) -> State | None:
    """The values of the compact encoder that `cfg` asks for: pretrained, or as drawn; None where there is none."""
    if not cfg.compact:
        return None
    here = folder.path / "compact.safetensors"
    if here.exists():  # a run that goes on does so with its own
        return safetensors.torch.load_file(here)
    compact = frozen_modules.empty_compact(loaded.modules, make(cfg.compact))
    compacts.reset(compact, seeds.generator(cfg.seed, "compact"))
    if cfg.pretrain.step:
        _Pretraining(cfg, loaded, folder).run(compact)
    machine_cache.save(compact.state_dict(), here)
    return tree.clone(compact.state_dict())


class _Pretraining:
    """The first stage, once for what it depends on: another run, or arm, finds the encoder made."""

    def __init__(self, cfg: Config, loaded: Whole, folder: RunFolder) -> None:
        self.cfg, self.loaded, self.folder = cfg, loaded, folder

    def run(self, compact: compacts.Compact) -> None:
        """Give `compact` the values that it learns from what the MLLM says."""
        place = machine_cache.home() / "pretrained"
        self._says("pretraining begins, or waits for another process that does the same")
        with _threads(self.cfg.pretrain.threads), alone(place, wait=True):
            began = time.perf_counter()
            mllm = the_mllm(self.cfg, self.loaded)
            who = _key(*(OmegaConf.to_yaml(node) for node in (self.cfg.captions.writer, self.cfg.llm)))
            file = machine_cache.home() / "captions" / f"{who}.jsonl"
            prompt = self.loaded.backbone.prompt
            self._says(f"open images are described, into {file}")
            told = make(self.cfg.captions)(
                mllm.model, mllm.processor, prompt, open_examples(self.cfg), file, self._says
            )
            made = place / f"{self._key(mllm, told.used)}.safetensors"
            if not made.exists():
                steps = self.cfg.pretrain.step.get("steps", "the last")
                notes = _NotesAt(
                    made.with_suffix(".part"),
                    lambda: {"seconds": time.perf_counter() - began, "llm_samples": mllm.llm.samples},
                    lambda step: self._says(f"pretraining, step {step} of {steps}"),
                )
                learn = make(self.cfg.pretrain.step)
                learn(compact, mllm.model, self._looks(mllm, told.examples), notes, self.cfg.seed)
                machine_cache.save(compact.state_dict(), made, {"cost": json.dumps(notes.about)})
                notes.path.unlink(missing_ok=True)
            compact.load_state_dict(safetensors.torch.load_file(made))
        with safetensors.safe_open(made, "pt") as file:
            cost = json.loads(file.metadata()["cost"])  # of whoever made it
        sizes = {"parameters": _size(compact), "teacher_parameters": _size(mllm.encoder)}
        writer = str(self.cfg.captions.writer["_target_"]).rpartition(".")[2]
        texts = {"texts": len(told.used), "dropped": told.dropped, "writer": writer}
        _once(self.folder, stage="pretrain", round=0, **texts, **sizes, **cost)

    def _says(self, says: str) -> None:
        self.folder.log(StageProgress(self.cfg.label, says))

    def _looks(self, mllm: MLLM, examples: Sequence[Example]) -> list[Look]:
        side = make(self.cfg.compact).side
        looks = [functools.partial(compacts.pixels, example.images, side) for example in examples]
        return [Look(item, look) for item, look in zip(mllm.ready(examples), looks, strict=True)]

    def _key(self, mllm: MLLM, captions: Sequence[Any]) -> str:
        """Of all that the encoder's bits depend on."""
        import transformers

        cfg = self.cfg
        whose = fingerprint(mllm.model, mllm.processor, self.loaded.backbone.prompt)
        said = json.dumps([asdict(caption) for caption in captions])
        nodes = [OmegaConf.to_yaml(node) for node in (cfg.pretrain, cfg.compact)]
        return _key(said, whose, str(cfg.seed), torch.__version__, transformers.__version__, *nodes)


class Alignment:
    """The third stage of an arm: its set of open data, and what the MLLM says of it, made once."""

    def __init__(self, cfg: Config, original: Whole, loaded: Whole, folder: RunFolder) -> None:
        """`original` is the backbone as it is, the MLLM; `loaded` what the arm's clients train on. Raises ValueError
        where there is no open image of a class."""
        self.cfg, self.folder = cfg, folder
        began, self._waited = time.perf_counter(), 0.0
        folder.log(StageProgress(cfg.label, "the MLLM is asked about the open images"))
        by_mllm = cfg.align.labels == "mllm"
        with _threads(cfg.align.threads):
            asks = by_mllm or bool(cfg.align.step.get("beta", 1.0))
            self._mllm = the_mllm(cfg, original) if asks else None
            built = server_model(cfg, loaded)
            self.model = built.model
            tuned([*built.model.edge.named()], cfg.align.step.get("trains", ["*"]))  # before anybody trains
            examples, classes = open_examples(cfg), loaded.card.get("classes")
            truths = [example.answer for example in examples]
            said, scores_NC = self._word(original, examples, classes) if by_mllm else ([], None)
            labels = said if by_mllm else truths
            names = classes or _common(labels)
            drawn = seeds.generator(cfg.seed, "balanced")
            chosen, held_out = balanced_set(labels, names, cfg.align.per_class, cfg.align.held_out, drawn)
            some, others = ([replace(examples[i], answer=labels[i]) for i in part] for part in (chosen, held_out))
            self.items, self.held_out = _held(built.ready(some)), _held(built.ready(others))
            if by_mllm:
                said, scores_NC = [said[i] for i in chosen], None if scores_NC is None else scores_NC[chosen]
            elif asks:
                said, scores_NC = self._word(original, some, classes)
            known = [truths[i] for i in chosen]
            self.agreement = agreement(said, known) if asks and all(known) else None
            self.teacher = _teacher(self._mllm, some, scores_NC) if self._mllm else _nobody
        if self.agreement is not None:
            share = f"{100 * self.agreement:.0f}% of {len(chosen)} open images"
            folder.log(StageProgress(cfg.label, f"by itself the MLLM knows {share}"))
        cost = {"seconds": time.perf_counter() - began - self._waited, "llm_samples": self._samples()}
        about = {"images": len(chosen), "held_out": len(held_out), "zero_shot": self.agreement}
        _once(folder, stage="open set", round=0, **about, **cost)

    def __call__(self, round: int, state: State) -> State:
        """The aggregate of a round, aligned. It is on the disk in the clients' updates until the round is whole."""
        began, samples = time.perf_counter(), self._samples()
        initial_state(self.cfg, self.model.edge, "shared")  # of what no client sends
        with _threads(self.cfg.align.threads):
            found: Aligned = make(self.cfg.align.step)(
                self.model, state, self.items, self.teacher, self.held_out, self.cfg.seed, round
            )
        if found.reason:
            log.info("round %d: alignment stopped after %d steps: %s", round, found.steps, found.reason)
        about = {"kept" if key == "best_step" else key: value for key, value in vars(found).items() if key != "state"}
        about |= {"seconds": time.perf_counter() - began, "llm_samples": self._samples() - samples}
        _once(self.folder, stage="align", round=round, **about)
        self.folder.log(StateAligned(round, found.steps, about["seconds"]))
        return found.state

    def _samples(self) -> int:
        """What has gone through the LLM so far, for the MLLM's word and for the federated model's."""
        llms = {local_llm(self.model), self._mllm.llm if self._mllm else None}
        return sum(llm.samples for llm in llms if llm)

    def _word(
        self, original: Whole, examples: Sequence[Example], classes: Sequence[str] | None
    ) -> tuple[list[str], Tensor | None]:
        """What the MLLM answers; of class names the likeliest, and its scores of them, from where they are kept."""
        assert self._mllm is not None
        if classes is None:
            return self._mllm.said(examples), None
        place, mllm = machine_cache.home() / "scores", self._mllm
        asked = time.perf_counter()
        with alone(place, wait=True):
            self._waited += time.perf_counter() - asked
            scores_NC = class_scores(
                mllm.model, mllm.processor, original.backbone.prompt, examples, classes, path=place
            )
        return [classes[i] for i in scores_NC.argmax(-1).tolist()], scores_NC


def _teacher(mllm: MLLM, examples: Sequence[Example], scores_NC: Tensor | None) -> Teacher:
    """The MLLM's word on these examples: its scores of class names, else its own answer distribution."""
    if scores_NC is not None:
        return lambda indices, batch: scores_NC[list(indices)][:, None]
    asked = mllm.ready(examples)

    @torch.no_grad()
    def answers(indices: Sequence[int], batch: Batch) -> Tensor:
        return mllm.model(collate([asked[i] for i in indices]), ())

    return answers


def _held(items: Sequence[Prepared]) -> list[Prepared]:
    """The items with their pixels in memory once they were asked for: there are few, seen in every round."""
    return [replace(item, pixels=functools.cache(item.pixels)) for item in items]


def _common(labels: Sequence[str]) -> list[str]:
    """The answers that open examples have twice or more, to tune on and to stop by; a warning names the rest."""
    counts = Counter(label for label in labels if label.strip())
    names = [name for name, count in counts.items() if count > 1]
    if out := sorted(counts.keys() - set(names)):
        log.warning(
            "%d of %d answers of open examples occur once and are not aligned on: %s", len(out), len(counts), out
        )
    return names


def _nobody(indices: Sequence[int], batch: Batch) -> Tensor:
    raise AssertionError("without beta the MLLM is not asked")


@dataclass(frozen=True, eq=False)
class MLLM:
    """The host's own LLM with its own encoder and no adapters in use."""

    model: Model
    processor: Processor
    llm: LocalLLM
    encoder: torch.nn.Module
    ready: Callable[[Sequence[Example]], list[Prepared]]

    def said(self, examples: Sequence[Example]) -> list[str]:
        """Its answers to the examples' own questions."""
        return [
            answer.said for answer in answers_to(self.model, self.ready(examples), self.processor.tokenizer, use=())
        ]


def the_mllm(cfg: Config, loaded: Whole) -> MLLM:
    """The backbone as a whole, its encoder among it, in modules of its own on the same memory."""
    llm = LocalLLM(twin(loaded.backbone.model), checkpointing=loaded.backbone.checkpointing)
    edge, processor = frozen_modules.build(loaded.modules, rank=1)
    cached = cached_encoder(cfg, loaded.modules, loaded.card["edge"], "none")

    def ready(examples: Sequence[Example]) -> list[Prepared]:
        items = prepare(examples, processor, loaded.backbone.prompt, cached)
        return items if cached else encode(edge, items)

    assert edge.encoder is not None
    return MLLM(SplitModel(edge, llm), processor, llm, edge.encoder, ready)


def check_stages(cfg: Config) -> None:
    """Raises ValueError where a stage would find no open images, or no texts that were to be prepared."""
    if cfg.pretrain.step or cfg.align.step:
        open_examples(cfg)
    folder = cfg.captions.writer.get("folder") if cfg.pretrain.step else None
    if folder:
        prepared_files(folder)


def open_examples(cfg: Config) -> Sequence[Example]:
    """The public split. Raises ValueError where it is empty."""
    if examples := splits(cfg).get("public"):
        return examples
    raise ValueError(f"the stages at the server need open images, and there are none; {MORE_OPEN}")


def _once(folder: RunFolder, **row: Any) -> None:
    """Write a row about what is done once in a round, or before any: a run that goes on may have it already."""
    if not any((there["stage"], there["round"]) == (row["stage"], row["round"]) for there in folder.rows(ROWS)):
        folder.append(ROWS, **row)


class _NotesAt:
    """Notes in a file beside what they become, with what the steps until then took, of all processes that took them."""

    def __init__(self, path: Path, spent: Callable[[], dict[str, float]], noted: Callable[[int], None]) -> None:
        self.path, self._spent, self._noted = path, spent, noted
        self.about: dict[str, Any] = {}  # the last note's
        self._before: dict[str, Any] = {}

    def read(self) -> tuple[int, State] | None:
        if not self.path.exists():
            return None
        with safetensors.safe_open(self.path, "pt") as file:
            self.about = self._before = json.loads(file.metadata()["about"])
        return self.about["steps"], safetensors.torch.load_file(self.path)

    def write(self, step: int, loss: float, state: State) -> None:
        spent = {key: value + self._before.get(key, 0) for key, value in self._spent().items()}
        self.about = {"steps": step, "loss": loss, **spent}
        machine_cache.save(state, self.path, {"about": json.dumps(self.about)})
        self._noted(step)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _key(*about: str) -> str:
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:32]


def _size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
