"""Which of Flower's nodes is which client of a run, found out before the first round."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedmm.config.settings import RunConfig
from fedmm.flower import messages
from fedmm.runs.events import Event, NodeLeftAside
from fedmm.shown import one_line
from fedmm.types import FedmmError

log = logging.getLogger("fedmm")


def find_clients(grid: Grid, run: RunConfig, clients: int, log_event: Callable[[Event], None]) -> dict[int, int]:
    """The node of each client 0..clients-1. Waits for them; raises FedmmError naming those that did not come.

    With `run.nodes`, client k is the node that the operator registered under the k-th name. A node's own claim does
    not count. Without `run.nodes`, every node is asked for its number, and the first node to claim a number keeps
    it. A node without a usable answer is left aside, and each reason is logged as an event.
    """
    deadline = time.monotonic() + run.wait_seconds
    node_of: dict[int, int] = {}
    polls = _registered(grid, run.nodes) if run.nodes else _answers(grid)
    reported: set[tuple[int, str]] = set()
    while not set(range(clients)) <= node_of.keys():
        for node, answer in next(polls):
            reason = _not_a_client(node, answer, clients, node_of)
            if reason is None:
                node_of[answer] = node
            elif (node, reason) not in reported:
                reported.add((node, reason))
                log.warning("node %d is left aside: %s", node, reason)
                log_event(NodeLeftAside(str(node), reason))
        if time.monotonic() > deadline:
            missing = sorted(set(range(clients)) - node_of.keys())
            raise FedmmError(
                f"clients {missing} of {clients} did not come within {run.wait_seconds:g} s; start their SuperNodes "
                "(simulation: --federation-config num-supernodes=N), lower clients, or raise run.wait_seconds"
            )
        time.sleep(messages.POLL_SECONDS)
    return node_of


def _registered(grid: Grid, names: Sequence[str]) -> Iterator[list[tuple[int, Any]]]:
    """Nodes with the client that their registered name makes them, again and again."""
    while True:
        yield [(node.node_id, names.index(node.name)) for node in grid.get_nodes() if node.name in names]


def _answers(grid: Grid) -> Iterator[list[tuple[int, Any]]]:
    """Nodes with what they have answered since the last time: a number, or why there is none.

    A node that sent an error gets the question again, as the error may be mended.
    """
    questioned: set[int] = set()
    pending: dict[str, int] = {}
    while True:
        new = [node for node in grid.get_node_ids() if node not in questioned]
        if new:
            ids = grid.push_messages([messages.ask_who(node) for node in new])
            sent = {id: node for id, node in zip(ids, new, strict=False) if id}  # none of what it could not push
            questioned |= set(sent.values())
            pending |= sent
        answers: list[tuple[int, Any]] = []
        for id, reply in messages.replies(grid, list(pending)):
            node = pending.pop(id)
            if isinstance(reply, Message) and reply.has_error():
                questioned.discard(node)
            answers.append((node, _number(reply)))
        yield answers


def _number(reply: Message | str) -> int | str:
    """The client's number in a node's answer, or why there is none."""
    if isinstance(reply, str):
        return reply
    if reply.has_error():
        return f"it does not know which client it is: {reply.error.reason}"
    try:
        return messages.read_lost(reply) or messages.read_who(reply)
    except ValueError as error:
        return str(error)


def _not_a_client(node: int, answer: int | str, clients: int, node_of: Mapping[int, int]) -> str | None:
    """Why a node that answered this is no client of the run, or None if it is one."""
    if isinstance(answer, str):
        return one_line(answer)
    if not 0 <= answer < clients:
        return f"it says it is client {answer}, and clients={clients} has 0 to {clients - 1}"
    if node_of.get(answer, node) != node:
        return (
            f"it says it is client {answer}, and so did node {node_of[answer]} before; give each its own partition-id, "
            "or name them in run.nodes"
        )
    return None
