"""A client's part in a round: receive the state, be scored, train, send the update. Knows the link, not Flower."""

from __future__ import annotations

import functools
import math
import resource
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import OmegaConf

from fedmm import seeds, tree
from fedmm.codecs import Codecs
from fedmm.edge import parts as edge_parts
from fedmm.edge.nano_edge import Lora, NanoEdge
from fedmm.edge.prepare import Prepared, encode, prepare
from fedmm.evaluate.answers import Answer, answers
from fedmm.llm import tls
from fedmm.llm.remote import RemoteLLM, Session
from fedmm.model import Model
from fedmm.runs import home
from fedmm.runs.config import Config, load, make
from fedmm.train import train
from fedmm.types import Example, State, Update

if TYPE_CHECKING:
    from transformers import ProcessorMixin


@dataclass(frozen=True)
class Order:
    """What the server asks of one client in one round; round `rounds + 1` only scores the final state."""

    overrides: tuple[str, ...]
    run: str
    round: int
    client: int
    address: str
    token: str
    identity: tls.Identity | None = None  # what this client shows on a TLS link; None: the link is plain
    kept_round: int = 0  # the last round this client took part in; what it kept then is what it goes on from
    train: bool = True
    score: bool = True
    answers: bool = False  # return what the model said, not only how often it was right


@dataclass(frozen=True)
class Report:
    """What a client tells the server in words; its tensors went over the link.

    `scores` are (right, count) by part, of the state of the round before; `metrics` are seconds, losses and sizes.
    """

    client: int
    round: int
    scores: dict[int, tuple[int, int]] = field(default_factory=dict)
    answers: list[tuple[int, Answer]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    def fault(self, order: Order, cfg: Config) -> str | None:
        """Why this is no report of `order`, or None if it is one."""
        if (self.client, self.round) != (order.client, order.round):
            return f"is of client {self.client} in round {self.round}"
        for part, (right, count) in self.scores.items():
            if part not in scored_parts(cfg, order) or not 0 <= right <= count:
                return f"scores part {part} with {right} of {count}"
        if any(not math.isfinite(value) for value in self.metrics.values()):
            return "has a metric that is not finite"
        return None


def held_parts(cfg: Config, client: int) -> list[int]:
    """The parts of the data that a client trains on."""
    return list(range(cfg.clients)) if cfg.pooled else [client]


def scored_parts(cfg: Config, order: Order) -> list[int]:
    """The parts a client is scored on: its own; at the end, where asked, everybody's, which is many times the work."""
    everywhere = cfg.evaluate.everywhere and order.round > cfg.rounds
    return list(range(cfg.clients)) if everywhere else held_parts(cfg, order.client)


def splits(cfg: Config) -> dict[str, Sequence[Example]]:
    """The examples this machine can see, by split."""
    return _splits(OmegaConf.to_yaml(cfg.dataset))


def partition(cfg: Config, split: str) -> list[list[int]]:
    """Which examples of a split belong to which client; every split follows the same law.

    Raises ValueError where the split cannot be divided so.
    """
    generator = seeds.generator(cfg.seed, "partition")
    return make(cfg.partition)(splits(cfg)[split], cfg.clients, generator)


def initial_state(cfg: Config, edge: NanoEdge, name: str) -> State:
    """Where a set of adapters starts: the same A at every client and at the server, B zero."""
    edge.reset(seeds.generator(cfg.seed, "adapters"), name)
    return edge.state(name)


def build_edge(cfg: Config, parts: State) -> tuple[NanoEdge, ProcessorMixin]:
    """The NanoEdge that `cfg` asks for from the frozen parts of the host."""
    lora = Lora(cfg.edge.lora.rank, cfg.edge.lora.alpha, tuple(cfg.edge.lora.targets))
    return edge_parts.build(
        parts, sets=tuple(cfg.method.sets), rank=cfg.edge.rank, alpha=cfg.edge.alpha, lora=lora if lora.rank else None
    )


def take_part(order: Order) -> Report:
    """Do what `order` asks. Raises ConfigError, ValueError or FedmmError with the reason where it cannot."""
    began = time.perf_counter()
    cfg = load(order.overrides)
    torch.set_num_threads(cfg.threads)
    with Session(
        order.address,
        client=order.client,
        round=order.round,
        token=order.token,
        identity=order.identity,
        deadline_seconds=cfg.link.deadline_seconds,
        frame_limit_bytes=cfg.link.frame_limit_mb << 20,
    ) as session:
        card = dict(session.call("card").meta)
        parts = _parts(session, card["edge"])
        edge, processor = build_edge(cfg, parts)
        codec = cfg.link.codec
        codecs = Codecs(codec.features, codec.h, codec.gradients, codec.logits)
        llm = RemoteLLM(session, encoding=cfg.link.encoding, cache=cfg.link.cache, codecs=codecs)
        model = Model(edge, llm, cfg.link.loss)
        anchor = dict(session.call("state").tensors)
        _load_sets(cfg, edge, order, anchor)
        site = _Site(cfg, edge, processor, card)
        own = held_parts(cfg, order.client)
        ready = time.perf_counter()

        scores: dict[int, tuple[int, int]] = {}
        said: list[tuple[int, Answer]] = []
        if order.score:
            for part in scored_parts(cfg, order):
                given = site.answers(model, part)
                scores[part] = (sum(answer.right for answer in given), len(given))
                if order.answers and part in own:
                    said += [(part, answer) for answer in given]
        scored = time.perf_counter()

        metrics: dict[str, float] = {}
        if order.train:
            items = [item for part in own for item in site.items("train", part)]
            metrics = _train(cfg, order, session, model, anchor, items)
        metrics |= {
            "seconds": time.perf_counter() - began,
            "start_seconds": ready - began,
            "score_seconds": scored - ready,
            "link_seconds": session.wait_seconds,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT_BYTES,
            "edge_parameters": float(card["edge_parameters"]),
            "trained_parameters": float(sum(p.numel() for p in edge.parameters() if p.requires_grad)),
        }
    return Report(order.client, order.round, scores, said, metrics)


def _load_sets(cfg: Config, edge: NanoEdge, order: Order, anchor: State) -> None:
    """Fill every set: shared and frozen from what arrived, local from what this client kept, or the common start."""
    for name in cfg.method.sets:
        if name == "local":
            kept = home.load_kept(order.run, order.client, order.kept_round) if order.kept_round else None
            if order.kept_round and kept is None:
                raise ValueError(
                    f"client {order.client} no longer has its local adapters of round {order.kept_round}; they were "
                    f"under {home.home()}; point FEDMM_HOME there, or start a new run"
                )
            edge.load(kept if kept is not None else initial_state(cfg, edge, name), name)
        else:
            edge.load(anchor, name)
    edge.freeze_all_but([name for name in cfg.method.sets if name != "frozen"])


def _train(
    cfg: Config, order: Order, session: Session, model: Model, anchor: State, items: list[Prepared]
) -> dict[str, float]:
    trained = train(
        model,
        items,
        make(cfg.method.step),
        make_optimizer=make(cfg.optimizer),
        anchor=anchor,
        seed=cfg.seed,
        round=order.round,
        rounds=cfg.rounds,
        client=order.client,
        epochs=cfg.epochs,
        batch_size=cfg.batch_size,
        schedule="cosine" if cfg.schedule == "cosine" else "constant",
        clip_norm=cfg.clip_norm,
    )
    began = time.perf_counter()
    fisher = make(cfg.method.fisher)
    sure = fisher(model, items, trained.last) if fisher else None
    fisher_seconds = time.perf_counter() - began
    if "local" in cfg.method.sets:
        home.save_kept(order.run, order.client, order.round, model.edge.state("local"), needed=order.kept_round)
    delta = tree.subtract(model.edge.state("shared"), anchor) if "shared" in cfg.method.sets else {}
    metrics = {"loss": trained.mean_loss, "first_loss": trained.first_loss, "examples": float(len(items))}
    _send(session, Update(order.client, delta, len(items), sure, metrics))
    return metrics | {"train_seconds": trained.seconds, "fisher_seconds": fisher_seconds}


def _send(session: Session, update: Update) -> None:
    tensors = {f"delta/{name}": tensor for name, tensor in update.delta.items()}
    tensors |= {f"fisher/{name}": tensor for name, tensor in (update.fisher or {}).items()}
    has_fisher = update.fisher is not None
    session.call("update", tensors, num_examples=update.num_examples, fisher=has_fisher, metrics=dict(update.metrics))


def _parts(session: Session, digest: str) -> State:
    """The frozen parts: from this machine where it has them, else fetched once and kept under their hash."""
    if (parts := home.load_parts(digest)) is None:
        parts = dict(session.call("edge").tensors)
        if (came := tree.digest(parts)) != digest:
            raise ValueError(f"the host's frozen parts have hash {came[:12]}, its card says {digest[:12]}")
        home.save_parts(digest, parts)
    return parts


@dataclass(frozen=True)
class _Site:
    """This machine's examples, made ready for the edge, part by part."""

    cfg: Config
    edge: NanoEdge
    processor: ProcessorMixin
    card: dict[str, Any]

    def items(self, split: str, part: int) -> list[Prepared]:
        """One part of a split; with a frozen encoder as features, which this process then remembers."""
        if self.edge.lora or not self.cfg.edge.keep_features:
            return self._prepare(split, part)
        key = self._key(split, part)
        with _remembering:
            found = _remembered.get(key)
        if found is None:
            found = encode(self.edge, self._prepare(split, part))
            with _remembering:
                _remembered[key] = found
                while len(_remembered) > _REMEMBERED_PARTS:
                    del _remembered[next(iter(_remembered))]
        return found

    def answers(self, model: Model, part: int) -> list[Answer]:
        evaluate = self.cfg.evaluate
        return answers(
            model,
            self.items(evaluate.split, part),
            self.processor.tokenizer,
            use=tuple(self.cfg.method.use),
            batch_size=evaluate.batch_size,
            max_tokens=evaluate.max_tokens,
        )

    def _key(self, split: str, part: int) -> tuple[Any, ...]:
        """Everything that the features of a part depend on."""
        cfg = self.cfg
        data = (OmegaConf.to_yaml(cfg.dataset), OmegaConf.to_yaml(cfg.partition), cfg.seed, cfg.clients, split, part)
        return (*data, self.card["edge"], self.card["prompt"], cfg.threads)

    def _prepare(self, split: str, part: int) -> list[Prepared]:
        indices = partition(self.cfg, split)[part]
        examples = splits(self.cfg)[split]
        return prepare([examples[i] for i in indices], self.processor, self.card["prompt"])


_RSS_UNIT_BYTES = 1.0 if sys.platform == "darwin" else 1024.0
_REMEMBERED_PARTS = 16  # a process may serve several clients in turn; correctness rests on none of this
_remembering = threading.Lock()
_remembered: dict[tuple[Any, ...], list[Prepared]] = {}


@functools.lru_cache(maxsize=4)
def _splits(dataset_yaml: str) -> dict[str, Sequence[Example]]:
    return make(OmegaConf.create(dataset_yaml))()
