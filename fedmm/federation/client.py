"""A client's part in a round: receive the state, be scored, train, send the update. Knows the link, not Flower."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections import Counter
from dataclasses import dataclass, field

import torch

from fedmm import tree
from fedmm.adapters import schema as schemas
from fedmm.config.composition import compose
from fedmm.config.derived import scale
from fedmm.config.settings import Config
from fedmm.config.targets import make
from fedmm.data.views import Some
from fedmm.edge.folding import unfolded
from fedmm.edge.prepared import Prepared
from fedmm.edge.sets import Edge
from fedmm.evaluate.answers import Answer, answers
from fedmm.federation.build import Built, client_shards, head_of, initial_state, local_llm, partition, splits
from fedmm.federation.claims import Claims
from fedmm.federation.reasons import Lost, Reason, because
from fedmm.link import messages, tls
from fedmm.link.session import Session
from fedmm.model import Model
from fedmm.shown import one_line
from fedmm.storage import machine_cache, memory
from fedmm.train import train
from fedmm.types import State, Update

TEXT_LIMIT = 1 << 16  # characters of an example's name or true answer
TOKEN_LIMIT = 128  # characters of a generated token: the longest of Llama 3 are 128 spaces
MEASURED = {
    "seconds", "start_seconds", "encode_seconds", "score_seconds", "link_seconds", "peak_rss_bytes", "edge_parameters",
    "trained_parameters",
}  # fmt: skip
MEASURED_IN_TRAINING = {"loss", "first_loss", "examples", "train_seconds", "fisher_seconds"}
"""The metrics of a report. `llm_samples` is beside them where the LLM is at the client."""


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
    private_round: int = 0  # the last round this client took part in; what it kept then is what it goes on from
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

    def fault(self, order: Order, cfg: Config, claims: Claims) -> str | None:
        """Why this is no report of `order`, or None if it is one. Its numbers and texts are a client's word."""
        if (self.client, self.round) != (order.client, order.round):
            return f"is of client {self.client} in round {self.round}"
        return self._scores_fault(order, cfg, claims) or self._answers_fault(order, cfg) or self._metrics_fault(order)

    def _scores_fault(self, order: Order, cfg: Config, claims: Claims) -> str | None:
        asked = scored_shards(cfg, order) if order.score else []
        for part, (right, count) in self.scores.items():
            if part not in asked or not 0 <= right <= count:
                return f"scores part {part} with {right} of {count}"
            if fault := claims.questions_fault(order.client, part, count):
                return fault
        return next((f"does not score part {part}" for part in asked if part not in self.scores), None)

    def _answers_fault(self, order: Order, cfg: Config) -> str | None:
        own = client_shards(cfg, order.client) if order.answers else []
        given = Counter(part for part, _ in self.answers)
        for part, count in given.items():
            if part not in own or count > (asked := self.scores.get(part, (0, 0))[1]):
                return f"has answers of part {part}" + (f": {count} to {asked} questions" if part in own else "")
        most = {"id": TEXT_LIMIT, "said": cfg.evaluate.max_tokens * TOKEN_LIMIT, "truth": TEXT_LIMIT}
        for _, answer in self.answers:
            for name, limit in most.items():
                if len(getattr(answer, name)) > limit:
                    return f"has an answer whose {name} is longer than {limit} characters"
        return None

    def _metrics_fault(self, order: Order) -> str | None:
        if any(not math.isfinite(value) for value in self.metrics.values()):
            return "has a metric that is not finite"
        wanted = MEASURED | (MEASURED_IN_TRAINING if order.train else set())
        if missing := sorted(wanted - self.metrics.keys()):
            return f"lacks the metric {missing[0]}"
        if unknown := sorted(self.metrics.keys() - wanted - {"llm_samples"}):
            return f"has a metric {one_line(unknown[0], 40)!r}, which is none"
        least = {name: value for name, value in self.metrics.items() if name not in ("loss", "first_loss")}
        if odd := next((name for name, value in least.items() if not 0 <= value < 2**53), None):
            return f"has {odd}={least[odd]:g}, which cannot be"
        return None


def scored_shards(cfg: Config, order: Order) -> list[int]:
    """The parts a client is scored on: its own; at the end, where asked, everybody's, which is many times the work."""
    everywhere = cfg.evaluate.everywhere and order.round > cfg.rounds
    return list(range(cfg.clients)) if everywhere else client_shards(cfg, order.client)


def carry_out(order: Order) -> Report:
    """Do what an order asks that `Site.admit` has let in, which checks its settings.

    Raises Lost where it cannot; what may leave of that is the reason and the count alone.
    """
    began = time.perf_counter()
    cfg = compose(order.overrides)
    torch.set_num_threads(cfg.threads)
    with (
        because(Reason.TRAINING),
        Session(
            order.address,
            client=order.client,
            round=order.round,
            token=order.token,
            identity=order.identity,
            deadline_seconds=cfg.link.deadline_seconds,
            turn_seconds=cfg.run.round_seconds,
            frame_limit_bytes=cfg.link.frame_limit_mb << 20,
        ) as session,
    ):
        card = dict(session.ask(messages.CardRequest()).card)
        with because(Reason.BACKBONE):
            head = head_of(cfg)
            built = head.at_client(card, order.client, session)
        model, edge, encoder = built.model, built.model.edge, built.encoder
        arrived = session.ask(messages.StateRequest()).tensors
        _load_sets(cfg, edge, order, arrived)
        own = client_shards(cfg, order.client)
        read = functools.partial(_items, cfg, built)
        with because(Reason.DATA):
            tests = {part: read(cfg.evaluate.split, part) for part in scored_shards(cfg, order)} if order.score else {}
            items = [item for part in own for item in read("train", part)] if order.train else []
            ready = time.perf_counter()
            if encoder:
                encoder.fill([*items, *itertools.chain.from_iterable(tests.values())])
        encoded = time.perf_counter()

        scores: dict[int, tuple[int, int]] = {}
        said: list[tuple[int, Answer]] = []
        for part, questions in tests.items():
            given = _answers(cfg, built, questions)
            scores[part] = (sum(answer.right for answer in given), len(given))
            if order.answers and part in own:
                said += [(part, answer) for answer in given]
        scored = time.perf_counter()

        metrics = _train(cfg, order, session, model, items) if order.train else {}
        metrics |= {
            "seconds": time.perf_counter() - began,
            "start_seconds": ready - began,
            "encode_seconds": encoded - ready,
            "score_seconds": scored - encoded,
            "link_seconds": session.wait_seconds,
            "peak_rss_bytes": float(memory.peak_rss_bytes()),
            "edge_parameters": float(head.frozen_parameters(card)),
            "trained_parameters": float(sum(p.numel() for n in edge.sets for p in edge.trainable(n).values())),
        }
        if llm := local_llm(model):
            metrics["llm_samples"] = float(llm.samples)
    return Report(order.client, order.round, scores, said, metrics)


def _load_sets(cfg: Config, edge: Edge, order: Order, arrived: State) -> None:
    """Fill every set: the common start, over it what arrived, over that what this client kept.

    So a local set starts as the shared one. The frozen one is the shared one, what it kept included.
    """
    kept = _kept(cfg, edge, order)
    edge.fold(arrived, scale(cfg.edge))
    start = initial_state(cfg, edge, cfg.method.sets[0]) | unfolded(arrived)
    for name in cfg.method.sets:
        whose = "shared" if name == "frozen" else name
        edge.load({key: kept.get(f"{whose}.{key}", tensor) for key, tensor in start.items()}, name)
    edge.freeze_all_but(make(cfg.schema)(order.round, cfg.rounds).trains)


def _kept(cfg: Config, edge: Edge, order: Order) -> State:
    """What this client kept when it last took part, which may be nothing.

    Raises Lost where what lies there is not what this order's schema keeps: an order with another schema would have it
    sent.
    """
    keeps = schemas.private(make(cfg.schema), cfg.rounds, edge.named(), order.private_round)
    if not keeps:
        return {}
    kept = machine_cache.load_private(order.run, order.client, order.private_round)
    if kept is None:
        raise Lost(
            Reason.KEPT,
            f"client {order.client}'s local adapters of round {order.private_round} are not under "
            f"{machine_cache.home()}; point FEDMM_HOME to the folder they were kept in, or start a new run",
        )
    if odd := kept.keys() ^ {*keeps}:
        raise Lost(Reason.KEPT, f"{min(odd)} is kept by another schema than the order's, or not at all")
    return kept


def _train(cfg: Config, order: Order, session: Session, model: Model, items: list[Prepared]) -> dict[str, float]:
    schema = make(cfg.schema)
    llm = local_llm(model)
    before = llm.samples if llm else 0
    anchor = model.edge.state("shared") if "shared" in cfg.method.sets else {}
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
        phase=schema(order.round, cfg.rounds).phase,
        clip_norm=cfg.clip_norm,
        begin=make(cfg.method.begin),
        sampling=make(cfg.sampling or None),
    )
    began = time.perf_counter()
    fisher = make(cfg.method.fisher)
    sure = fisher(model, items, trained.last) if fisher else None
    fisher_seconds = time.perf_counter() - began
    own = {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.edge.named().items()}
    if keeps := schemas.private(schema, cfg.rounds, own, order.round):
        kept = {name: own[name] for name in keeps}
        machine_cache.save_private(order.run, order.client, order.round, kept, needed=order.private_round)
    sends = schemas.sent(schema, cfg.rounds, anchor, order.round)
    delta = tree.subtract({name: own[f"shared.{name}"] for name in sends}, anchor)
    if not any(item.sees for item in items):
        delta = schemas.without_images(delta)
    if cfg.fault and order.client in cfg.faulty:
        delta = make(cfg.fault)(delta)
    sure = {name: sure[name].cpu() for name in delta} if sure is not None else None
    metrics = {
        "loss": trained.mean_loss,
        "first_loss": trained.first_loss,
        "examples": float(len(items)),
        "train_seconds": trained.seconds,
        "fisher_seconds": fisher_seconds,
    }
    if llm:  # a report tells of scoring too, and may be lost where the update is not
        metrics["llm_samples"] = float(llm.samples - before)
    _send(session, Update(order.client, delta, len(items), sure, metrics))
    return metrics


def _send(session: Session, update: Update) -> None:
    session.ask(messages.UpdateRequest.of(update))


def _items(cfg: Config, built: Built, split: str, part: int) -> list[Prepared]:
    """One part of a split, made ready for the edge."""
    return built.ready(Some(splits(cfg)[split], partition(cfg, split)[part]))


def _answers(cfg: Config, built: Built, items: list[Prepared]) -> list[Answer]:
    evaluate = cfg.evaluate
    return answers(
        built.model,
        items,
        built.tokenizer,
        use=tuple(cfg.method.use),
        batch_size=evaluate.batch_size,
        max_tokens=evaluate.max_tokens,
    )
