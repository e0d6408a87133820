"""Limits on the numbers of examples and questions that a client claims to have.

A rule weighs an update by `num_examples`, and an accuracy is a sum over everybody's questions. So a client that claims
more than it has speaks for the others. Where the server has the data (`run.has_data`) it knows both counts. Else
`run.max_examples` bounds them, and the first count that was accepted binds the client until the run's end: an honest
client has the same in every round, since every method and sampling tells all of a client's examples.

A count above the limit is refused, not lowered to it. So a false claim is reported, and a site whose data grew learns
that it needs a new run.
"""

from __future__ import annotations

from fedmm.config.settings import Config
from fedmm.federation.build import client_shards, partition, splits
from fedmm.runs.folder import RunFolder


class Claims:
    """What was accepted in a run so far, which its folder tells after a resume."""

    def __init__(self, cfg: Config, folder: RunFolder, round: int) -> None:
        """`round` is the one that comes: updates of it may be safe already."""
        self._limit = cfg.run.max_examples
        self._clients = {client: client_shards(cfg, client) for client in range(cfg.clients)}
        self._held = _counts(cfg, "train")
        self._asked = _counts(cfg, cfg.evaluate.split)
        self._examples: dict[int, int] = {}
        self._questions: dict[tuple[int, int], int] = {}
        for row in folder.rows("rounds.jsonl"):
            for client, count in row["examples"].items():
                self.accept_examples(int(client), count)
        for client in folder.arrived(round):
            self.accept_examples(client, folder.update_header(round, client).num_examples)
        for row in folder.rows("scores.jsonl"):
            self.accept_questions(row["client"], row["part"], row["count"])

    def accept_examples(self, client: int, count: int) -> None:
        self._examples.setdefault(client, count)

    def accept_questions(self, client: int, shard: int, count: int) -> None:
        self._questions.setdefault((client, shard), count)

    def examples_fault(self, client: int, count: int) -> str | None:
        """Why an update may not weigh `count` examples, or None if it may."""
        if count > self._limit:
            return f"claims {count} examples, above run.max_examples={self._limit}; raise it if a client has so many"
        if self._held and count > (has := sum(self._held[shard] for shard in self._clients[client])):
            return (
                f"claims {count} examples and has {has} by the server's own copy of the data; set run.has_data=false "
                "if the server has other data than the clients"
            )
        if count > (first := self._examples.get(client, count)):
            return f"claims {count} examples, and {first} before; if its data grew, start a new run"
        return None

    def questions_fault(self, client: int, shard: int, count: int) -> str | None:
        """Why a score of `part` may not be of `count` questions, or None if it may."""
        if self._asked and count != self._asked[shard]:
            return (
                f"scores part {shard} on {count} questions of {self._asked[shard]}; set run.has_data=false if the "
                "server has other data than the clients"
            )
        if not 0 <= count <= self._limit:
            return f"scores part {shard} on {count} questions, above run.max_examples={self._limit}"
        if count != (first := self._questions.get((client, shard), count)):
            return f"scores part {shard} on {count} questions, and on {first} before"
        return None


def _counts(cfg: Config, split: str) -> list[int]:
    """How many examples of a split each part has; empty where the server cannot know."""
    known = cfg.run.has_data and splits(cfg).get(split)
    return [len(shard) for shard in partition(cfg, split)] if known else []
