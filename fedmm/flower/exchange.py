"""One exchange with clients: orders out and reports in over Flower, while updates arrive over the link.

What one client sends costs no other client anything. A client whose reply cannot be read is lost, with a reason.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from fedmm.config.settings import Config
from fedmm.federation.claims import Claims
from fedmm.federation.client import Order
from fedmm.flower import messages
from fedmm.flower.recorder import Recorder
from fedmm.serving.host import Host
from fedmm.serving.round import Moved
from fedmm.shown import one_line
from fedmm.types import FedmmError, Update

log = logging.getLogger("fedmm")


class Inbox:
    """Where updates arrive: those that claim too much are refused, the others made safe."""

    def __init__(self, recorder: Recorder, claims: Claims) -> None:
        self.recorder, self.claims = recorder, claims
        self._failure: FedmmError | None = None  # the folder did not take an update: the run cannot go on

    def take(self, round: int, update: Update, moved: Moved) -> None:
        """Check an update and journal it. Raises ValueError, for the client to read, if the update is not taken."""
        if fault := self.claims.examples_fault(update.client, update.num_examples):
            raise ValueError(f"the update {fault}")
        try:
            self.recorder.update(round, update, moved)
        except FedmmError as error:
            self._failure = error
            raise ValueError("the server cannot keep updates and stops; its own log says why") from error
        self.claims.accept_examples(update.client, update.num_examples)

    def check(self) -> None:
        """Raises what kept an update from being made safe."""
        if self._failure:
            raise self._failure


class Exchange:
    """Sends orders and takes reports, until all are in or `run.round_seconds` are over."""

    def __init__(self, grid: Grid, nodes: Mapping[int, int], cfg: Config, host: Host, inbox: Inbox) -> None:
        self.grid, self.nodes, self.cfg, self.host, self.inbox = grid, nodes, cfg, host, inbox
        self.recorder, self.claims = inbox.recorder, inbox.claims

    def __call__(self, orders: Sequence[Order], title: str) -> dict[int, str]:
        """Send the orders, take the reports, end the host's round. `title` is for the log.

        Returns, by client, why it gave no report or why its update was refused.
        """
        sent = [messages.send_order(order, self.nodes[order.client]) for order in orders]
        order_bytes = {order.client: messages.size_bytes(m) for order, m in zip(orders, sent, strict=True)}
        lost: dict[int, str] = {}
        pending: dict[str, Order] = {}
        for id, order in zip(self.grid.push_messages(sent), orders, strict=True):
            if id:
                pending[id] = order
            else:
                lost[order.client] = "Flower could not deliver the order; is its SuperNode connected?"
        lost |= self._reports(pending, order_bytes, title)
        refused, traffic = self.host.close_round()
        self.inbox.check()
        for order in orders:
            if order.client in order_bytes:
                self.recorder.control_bytes(order, order_bytes[order.client], 0)
        if orders:
            self.recorder.exchange_ended(orders[0].round, traffic)
        return lost | {client: one_line(reason) for client, reason in refused.items()}

    def _reports(self, pending: dict[str, Order], order_bytes: dict[int, int], title: str) -> dict[int, str]:
        """Take the reports on `pending` orders; returns, by client, why there is none.

        For a client that replied, the bytes of order and report are recorded. It is taken out of `order_bytes`.
        """
        lost: dict[int, str] = {}
        deadline = time.monotonic() + self.cfg.run.round_seconds
        while pending:
            self.inbox.check()
            for id, reply in messages.replies(self.grid, list(pending)):
                order = pending.pop(id)
                report_bytes = 0 if isinstance(reply, str) else messages.size_bytes(reply)
                self.recorder.control_bytes(order, order_bytes.pop(order.client), report_bytes)
                if reason := self._take(order, reply):
                    lost[order.client] = reason
                    log.warning("%s: client %d is lost: %s", title, order.client, reason)
            if pending and time.monotonic() > deadline:
                late = f"did not report within run.round_seconds={self.cfg.run.round_seconds:g}"
                return lost | {order.client: late for order in pending.values()}
            if pending:
                time.sleep(messages.POLL_SECONDS)
        return lost

    def _take(self, order: Order, reply: Message | str) -> str | None:
        """Record a report, or say why the reply is none."""
        if isinstance(reply, str):
            return one_line(reply)
        if reply.has_error():
            return one_line(reply.error.reason or "") or f"error {reply.error.code}"
        try:
            if reason := messages.read_lost(reply):
                return reason
            report = messages.read_report(reply, self.cfg.run.report_limit_mb << 20)
            fault = report.fault(order, self.cfg, self.claims)
        except messages.UNREADABLE as error:
            return one_line(f"its report cannot be read: {error}")
        if fault:
            return f"its report {fault}"
        for part, (_, count) in report.scores.items():
            self.claims.accept_questions(order.client, part, count)
        self.recorder.report(order, report)
        return None
