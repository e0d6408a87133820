"""The round loop over Flower's Grid, one for every method and rule, in simulation, deployment and one process.

    for each round: draw clients, open the round at the host, send orders, wait, fold the journal in client order

Tensors are not here: the host serves the state and journals the updates; Flower's messages say who works and how it
went.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from flwr.app import Message
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError

from fedmm import seeds, tree
from fedmm.aggregate import lowrank
from fedmm.config.derived import encrypted, per_round, scale, sessions
from fedmm.config.settings import Config, RunConfig
from fedmm.config.targets import make
from fedmm.edge import frozen_modules
from fedmm.federation.build import Whole, class_counts, for_arm, server_start, state_for, update_of
from fedmm.federation.claims import Claims
from fedmm.federation.client import Order, Report
from fedmm.federation.server_stages import Alignment, pretrained
from fedmm.flower import messages
from fedmm.link.features import Features
from fedmm.link.host import Host, Traffic
from fedmm.link.tls import Authority
from fedmm.llm.local import LocalLLM
from fedmm.runs import summary
from fedmm.runs.folder import RunFolder
from fedmm.shown import one_line
from fedmm.storage import machine_cache
from fedmm.storage.tensor_store import Store
from fedmm.types import FedmmError, State, Update

log = logging.getLogger("fedmm")
POLL_SECONDS = 0.05
SCORINGS = 2  # of the final state: no later round makes up for a client that was away
UNREADABLE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, DecodeError)
"""What reading a client's words may raise; not what a SuperLink that is gone does (httpx)."""
ERROR_COST_LIMIT = 2.2e9  # LLaVA-1.5 at rank 64 with eight clients: 5 s of one core


def find_clients(grid: Grid, run: RunConfig, clients: int, event: Callable[..., None]) -> dict[int, int]:
    """Which node each client 0..clients-1 is. Waits for them; raises FedmmError naming those that did not come.

    With `run.nodes` a client is the node that was registered by that name, whatever a node says of itself: Flower gives
    names, and keys, to nodes that its operator registered, and to no others. Without, a node is asked, and the first
    that says a number keeps it: a later one must not push it out. A node that says nothing of use is left aside; each
    is an `event`.
    """
    deadline = time.monotonic() + run.wait_seconds
    found: dict[int, int] = {}
    nodes = _named(grid, run.nodes) if run.nodes else _asked(grid)
    noted: set[tuple[int, str]] = set()
    while not set(range(clients)) <= found.keys():
        for node, said in next(nodes):
            reason = _not_a_client(node, said, clients, found)
            if reason is None:
                found[said] = node
            elif (node, reason) not in noted:
                noted.add((node, reason))
                log.warning("node %d is left aside: %s", node, reason)
                event("node_left_aside", node=str(node), reason=reason)
        if time.monotonic() > deadline:
            missing = sorted(set(range(clients)) - found.keys())
            raise FedmmError(
                f"clients {missing} of {clients} did not come within {run.wait_seconds:g} s; start their SuperNodes "
                "(simulation: --federation-config num-supernodes=N), lower clients, or raise run.wait_seconds"
            )
        time.sleep(POLL_SECONDS)
    return found


def _named(grid: Grid, names: Sequence[str]) -> Iterator[list[tuple[int, Any]]]:
    """By node the client that its registered name makes it, again and again."""
    while True:
        yield [(node.node_id, names.index(node.name)) for node in grid.get_nodes() if node.name in names]


def _asked(grid: Grid) -> Iterator[list[tuple[int, Any]]]:
    """By node what new nodes have answered since the last time: a number, or why there is none. Who sent an error is
    asked again, as it may be mended."""
    asked: set[int] = set()
    pending: dict[str, int] = {}
    while True:
        new = [node for node in grid.get_node_ids() if node not in asked]
        if new:
            ids = grid.push_messages([messages.ask_who(node) for node in new])
            sent = {id: node for id, node in zip(ids, new, strict=False) if id}  # none of what it could not push
            asked |= set(sent.values())
            pending |= sent
        answers: list[tuple[int, Any]] = []
        for id, reply in _replies(grid, list(pending)):
            node = pending.pop(id)
            if isinstance(reply, Message) and reply.has_error():
                asked.discard(node)
            answers.append((node, _number(reply)))
        yield answers


def _number(reply: Message | str) -> int | str:
    """What a node answered, or why that is no number."""
    if isinstance(reply, str):
        return reply
    if reply.has_error():
        return f"it does not know which client it is: {reply.error.reason}"
    try:
        return messages.read_lost(reply) or messages.read_who(reply)
    except ValueError as error:
        return str(error)


def _not_a_client(node: int, said: int | str, clients: int, found: Mapping[int, int]) -> str | None:
    """Why a node that said this is no client of the run, or None if it is one."""
    if isinstance(said, str):
        return one_line(said)
    if not 0 <= said < clients:
        return f"it says it is client {said}, and clients={clients} has 0 to {clients - 1}"
    if found.get(said, node) != node:
        return (
            f"it says it is client {said}, and so did node {found[said]} before; give each its own partition-id, or "
            "name them in run.nodes"
        )
    return None


def _replies(grid: Grid, ids: Iterable[str]) -> Iterator[tuple[str, Message | str]]:
    """The replies to these messages that are there, each under the id it was asked for by; one that Flower cannot put
    together is the reason.

    One at a time: a reply that cannot be read would take along the others of its call, and which message it answers is
    a client's word too.
    """
    for id in ids:
        try:
            came = list(grid.pull_messages([id]))[:1]
            usable = all(isinstance(reply, Message) for reply in came)
        except UNREADABLE as error:
            yield id, f"its reply cannot be read: {type(error).__name__}: {error}"
            continue
        if came:
            yield id, came[0] if usable else "its reply is no message"


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
    held = for_arm(cfg, whole, compact)
    backbone, parts, card = held.backbone, held.parts, held.card
    first, common = server_start(cfg, held, compact)
    align = Alignment(cfg, whole, held, folder) if cfg.align.step else None
    start, current, memory = resumed or (0, first, {})
    if cfg.evaluate.groups:
        machine_cache.write(folder.path / summary.CLASSES, json.dumps(class_counts(cfg)).encode())
    folder.event("arm", label=cfg.label, rounds=cfg.rounds, clients=cfg.clients, start=start, card=card)

    inbox = _Inbox(folder, Claims(cfg, folder, start + 1))
    llm = LocalLLM(backbone.model, checkpointing=backbone.checkpointing)
    connector, table_VD = frozen_modules.build_base(parts)
    kept = store if cfg.link.cache == "run" else None
    features = Features(connector.to(llm.device), table_VD.to(llm.device), kept)
    with Host(
        llm,
        card=card,
        edge=parts,
        features=features,
        on_update=lambda round, update: inbox.take(round, update, host.traffic_of),
        authority=Authority() if encrypted(cfg.link) else None,
        bind=cfg.link.bind,
        sessions=sessions(cfg),
        pending=cfg.link.pending,
        workers=cfg.link.workers,
        merge_rows=cfg.link.merge_rows,
        merge_wait_seconds=cfg.link.merge_wait_ms / 1000,
        graph_bytes=cfg.link.graphs_mb << 20,
        step_memory_bytes=cfg.link.step_memory_mb << 20 if cfg.link.step_memory_mb else None,
        frames_bytes=cfg.link.frames_mb << 20 if cfg.link.frames_mb else None,
        frame_limit_bytes=cfg.link.frame_limit_mb << 20,
        answer_tokens=cfg.evaluate.max_tokens,
        deadline_seconds=cfg.link.deadline_seconds,
    ) as host:
        arm = _Arm(grid, nodes, cfg, tuple(overrides), inbox, host, align, common)
        rule = make(cfg.rule)
        if align and not cfg.rounds and not resumed:  # the stages at the server alone
            current = align(0, current)
            folder.save_checkpoint(0, current, memory)
        for round in range(start + 1, cfg.rounds + 1):
            current, memory = arm.train_round(round, current, memory, rule)
        arm.score_round(cfg.rounds + 1, current)
    summary.write_summary(folder.path)
    folder.event("arm_finished", label=cfg.label)


class _Inbox:
    """Where updates arrive: those that claim too much are refused, the others made safe."""

    def __init__(self, folder: RunFolder, claims: Claims) -> None:
        self.folder, self.claims = folder, claims
        self.failed: FedmmError | None = None  # the folder did not take an update: the run cannot go on

    def take(self, round: int, update: Update, traffic_of: Callable[[int], Mapping[tuple[int, str], Traffic]]) -> None:
        """Make an update safe. Raises ValueError with what its client is told where it is not: then it is not
        acknowledged."""
        if fault := self.claims.examples_fault(update.client, update.num_examples):
            raise ValueError(f"the update {fault}")
        try:
            _write_moved(self.folder, round, traffic_of(update.client))
            self.folder.save_update(round, update)  # now it is not asked for again, whoever is killed
            self.folder.event("update", round=round, client=update.client, loss=update.metrics.get("loss"))
        except FedmmError as error:
            self.failed = error
            raise ValueError("the server cannot keep updates and stops; its own log says why") from error
        self.claims.accept_examples(update.client, update.num_examples)


class _Arm:
    """What stays the same over the rounds of an arm."""

    def __init__(
        self,
        grid: Grid,
        nodes: Mapping[int, int],
        cfg: Config,
        overrides: tuple[str, ...],
        inbox: _Inbox,
        host: Host,
        align: Alignment | None,
        common: State,
    ) -> None:
        self.grid, self.nodes, self.cfg, self.overrides = grid, nodes, cfg, overrides
        self.inbox, self.host, self.align, self.common = inbox, host, align, common
        self.folder = folder = inbox.folder
        self.scale = scale(cfg.edge)
        self.everybody = [0] if cfg.pooled else list(range(cfg.clients))
        self.took_part = {c: row["round"] for row in folder.rows("rounds.jsonl") for c in row["clients"]}

    def train_round(self, round: int, current: State, memory: State, rule: Any) -> tuple[State, State]:
        """One round: orders out, updates in, merged, made to last."""
        began = time.perf_counter()
        chosen = seeds.sample_clients(self.cfg.seed, round, len(self.everybody), per_round(self.cfg))
        awaited = [client for client in chosen if client not in self.folder.arrived(round)]  # a killed server has some
        update = partial(update_of, self.cfg, round)
        self.host.open_round(round, current, awaited, partial(state_for, self.cfg), update, scale=self.scale)
        failed = self._exchange(self._orders(round, chosen, awaited), f"round {round}")
        arrived = self.folder.arrived(round)  # once: what the round is made of is what is safe now
        silent = "reported, but sent no update"
        lost = {client: failed.get(client, silent) for client in chosen if client not in arrived}
        if not arrived:
            raise FedmmError(f"round {round}: no client returned an update; " + "; ".join(map(_reason, lost.items())))
        before = current
        current, memory = rule(before, self.folder.updates(round, arrived), memory)
        if bad := tree.not_finite(current):
            raise FedmmError(f"round {round}: the merged state {bad}; lower optimizer.lr or choose a robust rule")
        self.took_part |= dict.fromkeys(arrived, round)
        product_error = self._product_error(round, arrived, before, current)
        if self.align and round % self.cfg.align.every == 0:
            current = self.align(round, current)
        losses = self._write_round(round, arrived, lost, current, product_error)
        self.folder.save_checkpoint(round, current, memory)
        self.folder.event(
            "round",
            round=round,
            loss=sum(losses) / len(losses) if losses else None,
            lost=_by_name(lost),
            failed=_by_name(failed),
            seconds=time.perf_counter() - began,
        )
        return current, memory

    def _orders(self, round: int, chosen: list[int], awaited: list[int]) -> list[Order]:
        """Who trains and who is scored on the state of the round before; before the first round that is everybody.

        A client that has reported to a server which was then killed is asked for nothing again.
        """
        every = self.cfg.evaluate.every
        scored = self.everybody if round == 1 else chosen if every and (round - 1) % every == 0 else []
        if awaited != chosen:
            done = {row["client"] for row in self.folder.rows("scores.jsonl") if row["round"] == round - 1}
            scored = [client for client in scored if client not in done]
        return [
            self._order(round, client, train=client in awaited, score=client in scored)
            for client in sorted({*awaited, *scored})
        ]

    def _product_error(self, round: int, arrived: list[int], before: State, merged: State) -> dict[str, float] | None:
        """How far each pair's product is from the mean of the clients', less those that `fault` makes send garbage;
        None where that is too much work to tell."""
        honest = [client for client in arrived if not self.cfg.fault or client not in self.cfg.faulty]
        merged, before = self.common | merged, self.common | before
        if lowrank.error_cost(before, len(honest)) > ERROR_COST_LIMIT:
            log.warning("round %d: the rule's product error is not told: %d clients are too many", round, len(honest))
            return None
        weights = self.cfg.rule.get("weights", "uniform")  # a rule that takes none counts all alike
        found = lowrank.product_error(
            merged, before, self.folder.updates(round, honest), scale=self.scale, weights=weights
        )
        return {name: error for name, error in found.items() if math.isfinite(error)}

    def _write_round(
        self,
        round: int,
        arrived: list[int],
        lost: dict[int, str],
        state: State,
        product_error: dict[str, float] | None,
    ) -> list[float]:
        """The round's row, from what the updates say of themselves; returns the losses they tell."""
        about = {client: self.folder.about(round, client) for client in arrived}
        losses = {client: told["metrics"].get("loss") for client, told in about.items()}
        self.folder.append(
            "rounds.jsonl",
            round=round,
            clients=arrived,
            lost=_by_name(lost),
            examples=_by_name({client: told["num_examples"] for client, told in about.items()}),
            loss=_by_name(losses),
            state=tree.digest(state),
            product_error=product_error,
        )
        return [loss for loss in losses.values() if loss is not None]

    def score_round(self, round: int, current: State) -> None:
        """After the last round: everybody is scored on the final state, nobody trains. Who was lost is asked again,
        where there is time: of one that said nothing for all of it, no more is expected."""
        lost, deadline = dict.fromkeys(self.everybody, ""), time.monotonic() + self.cfg.run.round_seconds
        for _ in range(SCORINGS):
            self.host.open_round(round, current, [], partial(state_for, self.cfg), scale=self.scale)
            lost = self._exchange([self._order(round, client, train=False, score=True) for client in lost], "final")
            if not lost:
                return
            if time.monotonic() > deadline:
                break
        self.folder.event("unscored", lost=_by_name(lost))
        if len(lost) == len(self.everybody):
            raise FedmmError("no client scored the final state; " + "; ".join(map(_reason, lost.items())))

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
            kept_round=self.took_part.get(client, 0),
            train=train,
            score=score,
            answers=cfg.evaluate.predictions and round in (1, cfg.rounds + 1),
        )

    def _exchange(self, orders: list[Order], what: str) -> dict[int, str]:
        """Send orders, take reports until all are in or time is up; returns why clients failed or were refused."""
        sent = [messages.send_order(order, self.nodes[order.client]) for order in orders]
        ordered = {order.client: messages.size_bytes(m) for order, m in zip(orders, sent, strict=True)}
        lost: dict[int, str] = {}
        pending: dict[str, Order] = {}
        for id, order in zip(self.grid.push_messages(sent), orders, strict=True):
            if id:
                pending[id] = order
            else:
                lost[order.client] = "Flower could not deliver the order; is its SuperNode connected?"
        deadline = time.monotonic() + self.cfg.run.round_seconds
        while pending:
            if self.inbox.failed:
                raise self.inbox.failed
            for id, reply in _replies(self.grid, list(pending)):
                order = pending.pop(id)
                reported = 0 if isinstance(reply, str) else messages.size_bytes(reply)
                _write_control(self.folder, order, ordered.pop(order.client), reported)
                if reason := self._take(order, reply):
                    lost[order.client] = reason
                    log.warning("%s: client %d is lost: %s", what, order.client, reason)
            if pending and time.monotonic() > deadline:
                late = f"did not report within run.round_seconds={self.cfg.run.round_seconds:g}"
                lost |= {order.client: late for order in pending.values()}
                break
            if pending:
                time.sleep(POLL_SECONDS)
        refused, moved = self.host.close_round()
        if self.inbox.failed:
            raise self.inbox.failed
        for order in orders:
            if order.client in ordered:
                _write_control(self.folder, order, ordered[order.client], 0)
        if orders:
            _write_moved(self.folder, orders[0].round, moved)
            self.folder.event("bytes", round=orders[0].round)
        return lost | {client: one_line(reason) for client, reason in refused.items()}

    def _take(self, order: Order, reply: Message | str) -> str | None:
        """Record a reply, or say why it is none. Whatever a client sends costs no other client anything."""
        if isinstance(reply, str):
            return one_line(reply)
        if reply.has_error():
            return one_line(reply.error.reason or "") or f"error {reply.error.code}"
        try:
            if reason := messages.read_lost(reply):
                return reason
            report = messages.read_report(reply, self.cfg.run.report_limit_mb << 20)
            bad = report.fault(order, self.cfg, self.inbox.claims)
        except UNREADABLE as error:
            return one_line(f"its report cannot be read: {error}")
        if bad:
            return f"its report {bad}"
        self._record(order, report)
        return None

    def _record(self, order: Order, report: Report) -> None:
        state_round = order.round - 1  # a score belongs to the state that was received
        self.folder.extend(
            "predictions.jsonl",
            (
                {"round": state_round, "client": order.client, "part": part}
                | {"id": answer.id, "said": answer.said, "truth": answer.truth}
                for part, answer in report.answers
            ),
        )
        for part, (_, count) in report.scores.items():
            self.inbox.claims.accept_questions(order.client, part, count)
        self.folder.extend(  # last and at once: a client that is here is not asked again
            "scores.jsonl",
            (
                {"round": state_round, "client": order.client, "part": part, "right": right, "count": count}
                for part, (right, count) in report.scores.items()
            ),
        )
        about = {"kind": "client", "round": order.round, "client": order.client}
        self.folder.append("ledger.jsonl", **report.metrics | about)
        own = [score for part, score in report.scores.items() if part == order.client or self.cfg.pooled]
        if own:
            right, count = (sum(values) for values in zip(*own, strict=True))
            self.folder.event("score", round=state_round, client=order.client, right=right, count=count)


CHANNEL = {
    "state": "adapters", "update": "adapters", "card": "edge", "edge": "edge", "forward": "steps",
    "backward": "steps", "loss": "steps", "squares": "steps", "generate": "answers", "known": "features",
    "features": "features",
}  # fmt: skip


def channels(traffic: Mapping[tuple[int, str], Traffic]) -> dict[tuple[int, str], Traffic]:
    """Verbs as the ledger's channels; the Fisher is told apart from the adapters it travels with."""
    sums: dict[tuple[int, str], Traffic] = defaultdict(Traffic)
    for (client, verb), row in traffic.items():
        into = sums[client, CHANNEL.get(verb, "refused")]
        into.frames += row.frames
        into.up_bytes += row.up_bytes - row.fisher_bytes
        into.down_bytes += row.down_bytes
        into.llm_seconds += row.llm_seconds
        into.llm_samples += row.llm_samples
        if row.fisher_bytes:
            sums[client, "fisher"].up_bytes += row.fisher_bytes
    return dict(sums)


def _write_moved(folder: RunFolder, round: int, moved: Mapping[tuple[int, str], Traffic]) -> None:
    """What clients have moved over the link, by channel, into the ledger."""
    for (client, channel), row in sorted(channels(moved).items()):
        folder.append(
            "ledger.jsonl", kind="bytes", round=round, client=client, channel=channel,
            up_bytes=row.up_bytes, down_bytes=row.down_bytes, frames=row.frames,
            llm_seconds=row.llm_seconds, llm_samples=row.llm_samples,
        )  # fmt: skip


def _write_control(folder: RunFolder, order: Order, ordered_bytes: int, reported_bytes: int) -> None:
    """What Flower's messages with a client took, into the ledger."""
    folder.append(
        "ledger.jsonl", kind="bytes", round=order.round, client=order.client, channel="control",
        up_bytes=reported_bytes, down_bytes=ordered_bytes, frames=1, llm_seconds=0.0, llm_samples=0,
    )  # fmt: skip


def _by_name(values: Mapping[int, Any]) -> dict[str, Any]:
    """JSON has no integer keys."""
    return {str(key): value for key, value in values.items()}


def _reason(item: tuple[int, str]) -> str:
    return f"client {item[0]}: {item[1]}"
