"""What an arm writes into its folder while it runs; the round loop itself writes nothing.

rounds.jsonl scores.jsonl predictions.jsonl ledger.jsonl events.jsonl       rows
classes.json summary.json journal/ checkpoints/                              whole files
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmm import tree
from fedmm.config.settings import Config
from fedmm.federation.build import class_counts
from fedmm.federation.client import Order, Report
from fedmm.link.messages import channel_of
from fedmm.runs import events, summary
from fedmm.runs.folder import RunFolder
from fedmm.serving.round import Moved, Traffic
from fedmm.storage import machine_cache
from fedmm.types import State, Update


@dataclass(frozen=True)
class Outcome:
    """How a round went, beside the state that it left."""

    round: int
    arrived: Sequence[int]  # clients whose updates were merged
    lost: Mapping[int, str]  # why the others sent none
    failed: Mapping[int, str]  # why a client gave no report, or its update was refused
    product_error: Mapping[str, float] | None
    began: float  # by time.perf_counter


class Recorder:
    """Writes an arm's folder. Raises FedmmError where the disk does not take it."""

    def __init__(self, folder: RunFolder, cfg: Config) -> None:
        self.folder, self.cfg = folder, cfg

    def arm_began(self, start: int, card: Mapping[str, Any]) -> None:
        """The arm begins, or goes on after round `start`."""
        cfg = self.cfg
        if cfg.evaluate.groups:
            machine_cache.write(self.folder.path / summary.CLASSES, json.dumps(class_counts(cfg)).encode())
        self.folder.log(events.ArmBegan(cfg.label, cfg.rounds, cfg.clients, start, card))

    def arm_finished(self) -> None:
        summary.write_summary(self.folder.path)
        self.folder.log(events.ArmFinished(self.cfg.label))

    def update(self, round: int, update: Update, traffic: Moved) -> None:
        """Journal an update and its client's traffic. From then on a kill of any process does not lose it."""
        self._traffic(round, traffic)
        self.folder.save_update(round, update)
        self.folder.log(events.UpdateArrived(round, update.client, update.metrics.get("loss")))

    def report(self, order: Order, report: Report) -> None:
        """Scores, answers and figures of a client. Its scores belong to the state of the round before."""
        scored = {"round": order.round - 1, "client": order.client}
        self.folder.extend(
            "predictions.jsonl",
            (
                {**scored, "part": part, "id": answer.id, "said": answer.said, "truth": answer.truth}
                for part, answer in report.answers
            ),
        )
        self.folder.extend(  # after the answers and at once: a client whose scores are here is not asked again
            "scores.jsonl",
            (
                {**scored, "part": part, "right": right, "count": count}
                for part, (right, count) in report.scores.items()
            ),
        )
        sender = {"kind": "client", "round": order.round, "client": order.client}
        self.folder.append("ledger.jsonl", **report.metrics | sender)
        on_itself = [score for part, score in report.scores.items() if part == order.client or self.cfg.pooled]
        if on_itself:
            right, count = map(sum, zip(*on_itself, strict=True))
            self.folder.log(events.ClientScored(order.round - 1, order.client, right, count))

    def control_bytes(self, order: Order, order_bytes: int, report_bytes: int) -> None:
        """What Flower's messages with a client took."""
        self._bytes(order.round, order.client, "control", Traffic(report_bytes, order_bytes, frames=1))

    def exchange_ended(self, round: int, traffic: Moved) -> None:
        """Add the traffic that came with no update. The ledger then has all bytes of the exchange."""
        self._traffic(round, traffic)
        self.folder.log(events.BytesCounted(round))

    def round_ended(self, outcome: Outcome, state: State, memory: State) -> None:
        """The round's row, then its checkpoint: a row without its checkpoint is dropped on resume."""
        round = outcome.round
        headers = {client: self.folder.update_header(round, client) for client in outcome.arrived}
        losses = {client: header.metrics.get("loss") for client, header in headers.items()}
        self.folder.append(
            "rounds.jsonl",
            round=round,
            clients=list(outcome.arrived),
            lost=dict(outcome.lost),
            examples={client: header.num_examples for client, header in headers.items()},
            loss=losses,
            state=tree.digest(state),
            product_error=outcome.product_error,
        )
        self.folder.save_checkpoint(round, state, memory)
        known = [loss for loss in losses.values() if loss is not None]
        mean, seconds = sum(known) / len(known) if known else None, time.perf_counter() - outcome.began
        self.folder.log(events.RoundEnded(round, mean, seconds, outcome.lost, outcome.failed))

    def stages_ended(self, state: State, memory: State) -> None:
        """The state of an arm without rounds: what the server's stages alone have made."""
        self.folder.save_checkpoint(0, state, memory)

    def unscored(self, lost: Mapping[int, str]) -> None:
        self.folder.log(events.ClientsUnscored(lost))

    def _traffic(self, round: int, traffic: Moved) -> None:
        for (client, channel), row in sorted(channels(traffic).items()):
            self._bytes(round, client, channel, row)

    def _bytes(self, round: int, client: int, channel: str, row: Traffic) -> None:
        self.folder.append(
            "ledger.jsonl", kind="bytes", round=round, client=client, channel=channel,
            up_bytes=row.up_bytes, down_bytes=row.down_bytes, frames=row.frames,
            llm_seconds=row.llm_seconds, llm_samples=row.llm_samples,
        )  # fmt: skip


def channels(traffic: Moved) -> dict[tuple[int, str], Traffic]:
    """Traffic by the ledger's channels. The Fisher has its own channel, though it travels with the adapters."""
    sums: dict[tuple[int, str], Traffic] = defaultdict(Traffic)
    for (client, verb), row in traffic.items():
        into = sums[client, channel_of(verb)]
        into.frames += row.frames
        into.up_bytes += row.up_bytes - row.fisher_bytes
        into.down_bytes += row.down_bytes
        into.llm_seconds += row.llm_seconds
        into.llm_samples += row.llm_samples
        if row.fisher_bytes:
            sums[client, "fisher"].up_bytes += row.fisher_bytes
    return dict(sums)
