"""The round loop over Flower's Grid, one for every method and rule, in simulation, deployment and one process.

    draw        the clients of the round, and those whose update is still awaited
    exchange    the round is open at the host: orders out, reports and updates in
    gather      whose update is safe, and why the others' are not
    merge       the rule over the journal in client order; the server's alignment, if the arm has one
    record      the round's row, its checkpoint, its event

No tensors pass through here: the host serves the state and takes the updates. Flower's messages carry orders and
reports. The recorder writes the files.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from flwr.serverapp import Grid

from fedmm import seeds, tree
from fedmm.aggregate import lowrank, running
from fedmm.config.derived import encrypted, host_limits, per_round, scale
from fedmm.config.settings import Config
from fedmm.config.targets import make
from fedmm.edge import frozen_modules
from fedmm.federation.build import Whole, for_arm, server_start, state_for, update_of
from fedmm.federation.claims import Claims
from fedmm.federation.client import Order
from fedmm.federation.server_stages import Alignment, pretrained
from fedmm.flower.exchange import Exchange, Inbox
from fedmm.flower.recorder import Outcome, Recorder
from fedmm.link.tls import Authority
from fedmm.llm.local import LocalLLM
from fedmm.runs.folder import RunFolder
from fedmm.serving.features import Features
from fedmm.serving.host import Host
from fedmm.storage.tensor_store import Store
from fedmm.types import FedmmError, State

log = logging.getLogger("fedmm")
SCORINGS = 2  # of the final state: no later round makes up for a client that was away
ERROR_COST_LIMIT = 2.2e9  # LLaVA-1.5 at rank 64 with eight clients: 5 s of one core


def run_arm(
    grid: Grid,
    nodes: Mapping[int, int],
    cfg: Config,
    overrides: list[str],
    whole: Whole,
    folder: RunFolder,
    store: Store,
) -> None:
    """Run one arm from where its folder stands to its summary. A finished arm is left as it is."""
    if folder.finished:
        return
    torch.set_num_threads(cfg.threads)
    resumed = folder.resume()
    compact = pretrained(cfg, whole, folder)
    loaded = for_arm(cfg, whole, compact)
    backbone, modules, card = loaded.backbone, loaded.modules, loaded.card
    first, common = server_start(cfg, loaded, compact)
    align = Alignment(cfg, whole, loaded, folder) if cfg.align.step else None
    start, current, memory = resumed or (0, first, {})
    recorder = Recorder(folder, cfg)
    recorder.arm_began(start, card)

    inbox = Inbox(recorder, Claims(cfg, folder, start + 1))
    llm = LocalLLM(backbone.model, checkpointing=backbone.checkpointing)
    connector, table_VD = frozen_modules.build_base(modules)
    features = Features(connector.to(llm.device), table_VD.to(llm.device), store if cfg.link.cache == "run" else None)
    with Host(
        llm,
        card=card,
        edge=modules,
        features=features,
        on_update=inbox.take,
        authority=Authority() if encrypted(cfg.link) else None,
        bind=cfg.link.bind,
        limits=host_limits(cfg),
    ) as host:
        exchange = Exchange(grid, nodes, cfg, host, inbox)
        rounds = _Rounds(cfg, tuple(overrides), host, exchange, recorder, align, common)
        if align and not cfg.rounds and not resumed:  # the stages at the server alone
            current = align(0, current)
            recorder.stages_ended(current, memory)
        for round in range(start + 1, cfg.rounds + 1):
            current, memory = rounds.play(round, current, memory)
        rounds.score(cfg.rounds + 1, current)
    recorder.arm_finished()


@dataclass(frozen=True)
class _Drawn:
    """The clients of a round, and those of them whose update is not in the journal yet: a killed server has some."""

    round: int
    clients: list[int]
    awaited: list[int]


@dataclass(frozen=True)
class _Merged:
    """The state and the rule's memory after a round, and how far the rule is from the mean of products."""

    state: State
    memory: State
    product_error: dict[str, float] | None


class _Rounds:
    """The rounds of one arm."""

    def __init__(
        self,
        cfg: Config,
        overrides: tuple[str, ...],
        host: Host,
        exchange: Exchange,
        recorder: Recorder,
        align: Alignment | None,
        common: State,
    ) -> None:
        self.cfg, self.overrides, self.host, self.exchange = cfg, overrides, host, exchange
        self.recorder, self.align, self.common = recorder, align, common
        self.folder = recorder.folder
        self.rule = make(cfg.rule)
        self.scale = scale(cfg.edge)
        self.everybody = [0] if cfg.pooled else list(range(cfg.clients))
        self.took_part = {c: row["round"] for row in self.folder.rows("rounds.jsonl") for c in row["clients"]}

    def play(self, round: int, current: State, memory: State) -> tuple[State, State]:
        """One round, to where it is safe; returns the state and the rule's memory after it."""
        began = time.perf_counter()
        drawn = self._draw(round)
        failed = self._exchange(drawn, current)
        arrived, lost = self._gather(drawn, failed)
        merged = self._merge(round, arrived, current, memory)
        outcome = Outcome(round, arrived, lost, failed, merged.product_error, began)
        self.recorder.round_ended(outcome, merged.state, merged.memory)
        return merged.state, merged.memory

    def _draw(self, round: int) -> _Drawn:
        clients = seeds.sample_clients(self.cfg.seed, round, len(self.everybody), per_round(self.cfg))
        arrived = self.folder.arrived(round)
        return _Drawn(round, clients, [client for client in clients if client not in arrived])

    def _exchange(self, drawn: _Drawn, current: State) -> dict[int, str]:
        """Let the drawn clients work on `current`; returns why clients failed."""
        down, up = partial(state_for, self.cfg), partial(update_of, self.cfg, drawn.round)
        self.host.open_round(drawn.round, current, drawn.awaited, down, up, scale=self.scale)
        return self.exchange(self._orders(drawn), f"round {drawn.round}")

    def _gather(self, drawn: _Drawn, failed: Mapping[int, str]) -> tuple[list[int], dict[int, str]]:
        """The clients whose updates are in the journal, which make up the round; and why the others are lost."""
        arrived = self.folder.arrived(drawn.round)
        silent = "reported, but sent no update"
        lost = {client: failed.get(client, silent) for client in drawn.clients if client not in arrived}
        if not arrived:
            raise FedmmError(f"round {drawn.round}: no client returned an update; {_listed(lost)}")
        self.took_part |= dict.fromkeys(arrived, drawn.round)
        return arrived, lost

    def _merge(self, round: int, arrived: Sequence[int], current: State, memory: State) -> _Merged:
        state, memory = self.rule(current, self.folder.updates(round, arrived), memory)
        if bad := tree.not_finite(state):
            raise FedmmError(f"round {round}: the merged state {bad}; lower optimizer.lr or choose a robust rule")
        product_error = self._product_error(round, arrived, current, state)
        if self.align and round % self.cfg.align.every == 0:
            state = self.align(round, state)
        return _Merged(state, memory, product_error)

    def _product_error(
        self, round: int, arrived: Sequence[int], current: State, merged: State
    ) -> dict[str, float] | None:
        """How far each pair's merged product is from the mean of the clients' products.

        Clients that send garbage (`fault`) are left out. None if this is too much work.
        """
        honest = [client for client in arrived if not self.cfg.fault or client not in self.cfg.faulty]
        merged, current = self.common | merged, self.common | current
        if lowrank.error_cost(current, len(honest)) > ERROR_COST_LIMIT:
            log.warning("round %d: no product error: it takes too long for %d clients", round, len(honest))
            return None
        updates, weights = self.folder.updates(round, honest), running.weights_of(self.rule)
        errors = lowrank.product_error(merged, current, updates, scale=self.scale, weights=weights)
        return {name: error for name, error in errors.items() if math.isfinite(error)}

    def score(self, round: int, current: State) -> None:
        """After the last round: score every client on the final state; no client trains.

        A client that was lost is asked once more, unless `run.round_seconds` are over.
        """
        lost, deadline = dict.fromkeys(self.everybody, ""), time.monotonic() + self.cfg.run.round_seconds
        for _ in range(SCORINGS):
            self.host.open_round(round, current, [], partial(state_for, self.cfg), scale=self.scale)
            lost = self.exchange([self._order(round, client, train=False, score=True) for client in lost], "final")
            if not lost:
                return
            if time.monotonic() > deadline:
                break
        self.recorder.unscored(lost)
        if len(lost) == len(self.everybody):
            raise FedmmError(f"no client scored the final state; {_listed(lost)}")

    def _orders(self, drawn: _Drawn) -> list[Order]:
        """One order for each client that trains or is scored. Scores are of the state of the round before.

        In round 1 every client is scored. A client that reported before the server was killed is not asked again.
        """
        round, every = drawn.round, self.cfg.evaluate.every
        scored = self.everybody if round == 1 else drawn.clients if every and (round - 1) % every == 0 else []
        if drawn.awaited != drawn.clients:
            done = {row["client"] for row in self.folder.rows("scores.jsonl") if row["round"] == round - 1}
            scored = [client for client in scored if client not in done]
        return [
            self._order(round, client, train=client in drawn.awaited, score=client in scored)
            for client in sorted({*drawn.awaited, *scored})
        ]

    def _order(self, round: int, client: int, *, train: bool, score: bool) -> Order:
        cfg = self.cfg
        return Order(
            overrides=self.overrides,
            run=self.folder.run,
            round=round,
            client=client,
            address=cfg.link.address or f"127.0.0.1:{self.host.port}",
            token=self.host.token(round, client),
            identity=self.host.identity(client),
            private_round=self.took_part.get(client, 0),
            train=train,
            score=score,
            answers=cfg.evaluate.predictions and round in (1, cfg.rounds + 1),
        )


def _listed(reasons: Mapping[int, str]) -> str:
    return "; ".join(f"client {client}: {reason}" for client, reason in reasons.items())
