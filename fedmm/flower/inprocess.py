"""The same two apps in this process, without SuperLink, SuperNodes or Ray: for notebooks, tests and sweeps.

The link is the real one, over loopback; only Flower's message delivery is replaced, by a thread.
"""

from __future__ import annotations

import os
import threading
import traceback
import uuid
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity  # private; a test tells when it moves

from fedmm.federation.reasons import Lost
from fedmm.flower import client_app, server_app
from fedmm.flower.client_app import IN_PROCESS
from fedmm.types import FedmmError

CLIENT_RAISED = 2  # flwr's ErrorCode.CLIENT_APP_RAISED_EXCEPTION


def run(arms: list[server_app.Arm], *, page: bool = True) -> Path:
    """Run what `server_app.plan` made of some overrides, with all clients in this process; `page`: its report too."""
    cfg = arms[0].cfg
    with InProcessGrid(cfg.clients, cfg.run.at_once or os.cpu_count() or 1) as grid:
        return server_app.run(grid, arms, page=page)


class InProcessGrid(Grid):
    """Delivers each message by calling the ClientApp in one of a few worker threads."""

    def __init__(self, clients: int, at_once: int = 1) -> None:
        self._contexts = {
            node: Context(
                1, node, {"partition-id": node - 1, "num-partitions": clients, IN_PROCESS: True}, RecordDict(), {}
            )
            for node in range(1, clients + 1)
        }
        self._worker = ThreadPoolExecutor(at_once, thread_name_prefix="fedmm-client")
        self._replies: dict[str, Future[Message]] = {}
        self._lock = threading.Lock()
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 0

    def __enter__(self) -> InProcessGrid:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)

    def set_run(self, run: Any) -> None:
        """There is one run."""

    @property
    def run(self) -> Any:
        raise AttributeError("a run in one process has no record at a SuperLink")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        ids = self.push_messages(messages)
        wait([self._replies[id] for id in ids], timeout)
        return self.pull_messages(ids)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            id = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = id
            with self._lock:
                self._replies[id] = self._worker.submit(self._deliver, message)
            ids.append(id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        with self._lock:
            done = [id for id in message_ids if id in self._replies and self._replies[id].done()]
            return [self._replies.pop(id).result() for id in done]

    def _deliver(self, message: Message) -> Message:
        try:
            return client_app.app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # as Flower does: the run learns the reason and goes on without this client
            cause = error.__cause__ if isinstance(error, Lost) and error.__cause__ else error
            if not isinstance(cause, (ValueError, FedmmError)):  # these say all there is to know
                traceback.print_exc()
            return Message(Error(CLIENT_RAISED, f"{type(cause).__name__}: {error}"), reply_to=message)
