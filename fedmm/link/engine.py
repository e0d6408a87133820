"""Passes of the frozen LLM for many clients: each step alone, or steps that wait together as one batch.

    merge_rows 0    a step runs alone; its bits depend on nobody else
    merge_rows n    a worker takes the next step, waits up to `merge_wait_seconds` for others of similar length, and
                    runs up to n rows as one batch; company changes a gradient by rounding, and by no more

Rows of a batch do not see each other, and each step's loss is formed on its own rows; but where bitsandbytes picks its
outlier columns over a whole batch (8bit), company shows there too.

Clients share the LLM by the size of their steps, not by their number. The queue is start-time fair (Goyal et al. 1996):

    start = max(now, end of the client's last step)    end = start + work    now = start of what was taken last

The lowest start goes next, the oldest of equal ones. A new client starts at `now`, and an idle one saves nothing. A
pass cannot be interrupted. So while large steps hold all of several workers, one more thread runs steps that are
`SMALL` times smaller than each of them. With one worker a small step waits for the pass under way.

A forward whose backward comes later keeps its graph, as long as all graphs fit into `graph_bytes`. Beyond that, and
with merging, its inputs are kept and the backward runs the pass again: 1.4 times the arithmetic, but in company.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as LateError
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmm.link.footprint import SMALL, Footprint, Shape
from fedmm.llm.local import LocalLLM
from fedmm.types import Embeds, FedmmError

LARGE_NICE = 5  # a third of the weight of a thread at 0
BUCKET = 1.25  # steps share a batch where the longest has at most so many times the positions of the shortest


class Busy(FedmmError):
    """No worker came free in time. The step cost its client nothing, and may be asked for again."""


@dataclass(frozen=True)
class Rows:
    """One branch of a step as it enters the LLM."""

    embeds_BTD: Tensor
    mask_BT: Tensor
    keep_BA: Tensor


@dataclass(frozen=True)
class Passed:
    """What a pass gave: logits by branch, values of them, gradients by each branch's embeddings, its share of time."""

    logits: list[Tensor]
    values: Tensor
    grads: list[Tensor]
    seconds: float


@dataclass(eq=False)
class Begun:
    """A client's forward that waits for its backward: its inputs and logits, and its graph where that is kept."""

    client: int
    rows: Rows
    logits_BAV: Tensor
    seconds: float
    graph: tuple[Tensor, Tensor] | None = None  # embeddings and logits
    graph_bytes: int = 0

    @property
    def bytes(self) -> int:
        """What it takes beside its graph: its inputs twice, as they came and as their sum, and its logits."""
        return 2 * self.rows.embeds_BTD.nbytes + self.logits_BAV.nbytes


@dataclass(eq=False)
class _Job:
    client: int
    shape: Shape
    work: Callable[[], Any] | None = None  # of another kind than a pass: it waits for its turn, and is never merged
    branches: Sequence[Rows] = ()
    values: Callable[[list[Tensor]], Tensor] = lambda logits: torch.empty(0)
    start: int = 0  # when it comes before others, in work and not in seconds
    done: Future[Any] = field(default_factory=Future)

    @property
    def rows(self) -> int:
        return self.shape.rows

    @property
    def length(self) -> int:
        return self.shape.positions

    @property
    def grad(self) -> bool:
        return self.shape.grad

    def goes_with(self, other: _Job) -> bool:
        if self.work or other.work or self.grad != other.grad:
            return False
        return max(self.length, other.length) <= BUCKET * min(self.length, other.length)


class Engine:
    """Workers that run steps on one LLM, from construction until `close`."""

    def __init__(
        self,
        llm: LocalLLM,
        *,
        workers: int = 2,
        merge_rows: int = 0,
        merge_wait_seconds: float = 0.01,
        wait_seconds: float = 30.0,
        graph_bytes: int = 1 << 30,
        footprint: Footprint | None = None,
        crowd: Callable[[], int] = lambda: 1 << 30,
    ) -> None:
        """`crowd` tells how many steps can be under way: once as many are here, nobody else is waited for.

        `footprint` bounds what steps that run together take of memory; whoever queues a step has checked that step.
        """
        self.merges = merge_rows > 1
        self._llm, self._crowd = llm, crowd
        self._merge_rows, self._merge_wait_seconds, self._wait_seconds = merge_rows, merge_wait_seconds, wait_seconds
        self._graph_bytes, self._footprint = graph_bytes, footprint
        self._begun: weakref.WeakSet[Begun] = weakref.WeakSet()  # with graphs; a session that ends drops its own
        self._queue: list[_Job] = []
        self._now = 0  # the queue's own time, which is work
        self._ends: dict[int, int] = {}  # of the last step of each client that is ahead of now
        self._turn = threading.Lock()  # one worker gathers at a time, or two would share out what belongs together
        self._changed = threading.Condition()
        self._held: list[list[_Job]] = []  # what each busy worker runs
        self._small_ones = 0  # under way beside the workers
        self._open = True
        self._count = workers
        self._workers = [
            threading.Thread(target=self._work, name=f"fedmm-llm-{i}", daemon=True) for i in range(workers)
        ]
        if workers > 1:
            self._workers.append(threading.Thread(target=self._work_small, name="fedmm-llm-small", daemon=True))
        for worker in self._workers:
            worker.start()

    def run(
        self,
        branches: Sequence[Rows],
        values: Callable[[list[Tensor]], Tensor] = lambda logits: torch.empty(0),
        *,
        grad: bool = False,
        pairs: int = 0,
        client: int = 0,
    ) -> Passed:
        """Pass the branches of a step through the LLM; with `grad`, differentiate the sum of `values(logits)`.

        `pairs` are `Shape.pairs`: rows of branches that learn from each other in `values`.

        Raises Busy where no worker came free in time, and whatever the pass itself raised.
        """
        shape = replace(_shape(branches), grad=grad, pairs=pairs)
        found: Passed = self._wait(_Job(client, shape, branches=branches, values=values))
        return found

    def begin(self, rows: Rows, client: int = 0) -> Begun:
        """Logits whose gradient is still to come."""
        if self.merges or not self._graph_bytes:
            passed = self.run([rows], client=client)
            return Begun(client, rows, passed.logits[0], passed.seconds)
        (leaf, logits_BAV, graph_bytes), seconds = self.alone(
            lambda: _with_graph(self._llm, rows), _shape([rows]), client
        )
        begun = Begun(client, rows, logits_BAV.detach(), seconds)
        with self._changed:
            if sum(other.graph_bytes for other in self._begun) + graph_bytes <= self._graph_bytes:
                begun.graph, begun.graph_bytes = (leaf, logits_BAV), graph_bytes
                self._begun.add(begun)
        return begun

    def finish(self, begun: Begun, grad_BAV: Tensor) -> tuple[Tensor, float]:
        """The gradient by the embeddings, from that by the logits; and the seconds it took."""
        if begun.graph is None:
            passed = self.run([begun.rows], lambda logits: (logits[0] * grad_BAV).sum(), grad=True, client=begun.client)
            return passed.grads[0], passed.seconds
        leaf, logits_BAV = begun.graph
        (grad_BTD,), seconds = self.alone(
            lambda: torch.autograd.grad(logits_BAV, leaf, grad_BAV), _shape([begun.rows]), begun.client
        )
        begun.graph, begun.graph_bytes = None, 0
        return grad_BTD, seconds

    def alone(self, work: Callable[[], Any], shape: Shape, client: int = 0) -> tuple[Any, float]:
        """Run work of another kind when its turn comes, as generation is. Returns its result and its seconds."""
        result: tuple[Any, float] = self._wait(_Job(client, shape, work))
        return result

    def close(self) -> None:
        """End the workers; steps that wait get an error. Safe to repeat."""
        with self._changed:
            self._open = False
            waiting, self._queue = self._queue, []
            self._changed.notify_all()
        for job in waiting:
            if job.done.set_running_or_notify_cancel():  # else nobody waits for it any more
                job.done.set_exception(FedmmError("the host is closing"))
        for worker in self._workers:
            worker.join()

    def _wait(self, job: _Job) -> Any:
        with self._changed:
            if not self._open:
                raise FedmmError("the host is closing")
            job.start = max(self._now, self._ends.get(job.client, 0))
            self._ends[job.client] = job.start + job.shape.work
            self._queue.append(job)
            self._changed.notify_all()
        try:
            return job.done.result(self._wait_seconds)
        except LateError:
            if not job.done.cancel():
                return job.done.result()  # it runs, or has just ended
        with self._changed:
            if job in self._queue:
                self._queue.remove(job)
            self._ends[job.client] = job.start  # a client has one step at a time, so nothing else stands behind it
        raise Busy(
            f"the LLM was busy for {self._wait_seconds:g} s; lower the clients that run at once, or raise "
            "link.workers, link.merge_rows or link.deadline_seconds"
        )

    def _work(self) -> None:
        if self._count > 1:
            _yield_to_small_steps()
        while jobs := self._next():
            self._settle([job for job in jobs if job.done.set_running_or_notify_cancel()])
            with self._changed:
                self._held.remove(jobs)

    def _work_small(self) -> None:
        while jobs := self._next_small():
            self._settle([job for job in jobs if job.done.set_running_or_notify_cancel()])
            with self._changed:
                self._small_ones = 0

    def _next(self) -> list[_Job]:
        """The first job and those that go with it, or nothing when the engine closes."""
        with self._turn, self._changed:
            while not self._queue and self._open:
                self._changed.wait()
            if not self._open:
                return []
            jobs: list[_Job] = []
            self._held.append(jobs)
            self._take(min(self._queue, key=lambda job: job.start), jobs)
            until = time.monotonic() + self._merge_wait_seconds
            while self._open and self._room(jobs) and not jobs[0].work:
                self._join(jobs)
                here = sum(map(len, self._held)) + self._small_ones + len(self._queue)
                left = until - time.monotonic()
                if not self._room(jobs) or here >= self._crowd() or left <= 0:
                    break
                self._changed.wait(left)
            self._changed.notify_all()  # who may not wait for these
            return jobs

    def _next_small(self) -> list[_Job]:
        """The first of the jobs that need not wait for the large ones under way, or nothing when the engine closes."""
        with self._changed:
            while self._open:
                if small := [job for job in self._queue if self._small(job)]:
                    jobs: list[_Job] = []
                    self._take(min(small, key=lambda job: job.start), jobs)
                    self._small_ones = 1
                    return jobs
                self._changed.wait()
            return []

    def _small(self, job: _Job) -> bool:
        """Whether large jobs hold every worker, beside which this one is little work and little memory."""
        if len(self._held) < self._count:
            return False
        least = min(sum(other.shape.work for other in jobs) for jobs in self._held)
        return SMALL * job.shape.work <= least and self._fits(job.shape, 1 / SMALL)

    def _take(self, job: _Job, jobs: list[_Job]) -> None:
        """From the queue to `jobs`, which moves the queue's time on."""
        self._queue.remove(job)
        jobs.append(job)
        self._now = max(self._now, job.start)
        self._ends = {client: end for client, end in self._ends.items() if end > self._now}

    def _room(self, jobs: list[_Job]) -> int:
        return max(0, self._merge_rows - sum(job.rows for job in jobs))

    def _join(self, jobs: list[_Job]) -> None:
        """Take from the queue what goes with all of `jobs` and has room and memory beside them, in its order."""
        for job in sorted(self._queue, key=lambda job: job.start):
            merged = reduce(Shape.beside, (other.shape for other in jobs), job.shape)
            goes = all(job.goes_with(other) for other in jobs)
            if goes and job.rows <= self._room(jobs) and self._fits(merged):
                self._take(job, jobs)

    def _fits(self, shape: Shape, share: float = 1.0) -> bool:
        return self._footprint is None or self._footprint.fits(shape, share)

    def _settle(self, jobs: list[_Job]) -> None:
        """Run jobs together; where that fails, each for itself, so that nobody pays for another's fault or size."""
        results: list[Any] = []
        try:
            results = [self._timed(jobs[0].work)] if jobs and jobs[0].work else self._together(jobs)
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].done.set_exception(error)
                return
        if not results:  # out of the handler: an error holds what the failed pass held
            for job in jobs:
                self._settle([job])
            return
        for job, result in zip(jobs, results, strict=True):
            job.done.set_result(result)

    def _together(self, jobs: list[_Job]) -> list[Passed]:
        if not jobs:
            return []
        began = time.perf_counter()
        with torch.set_grad_enabled(jobs[0].grad):
            leaves = [[branch.embeds_BTD.detach().requires_grad_(job.grad) for branch in job.branches] for job in jobs]
            logits = self._logits(jobs, leaves)
            values = [job.values(own) for job, own in zip(jobs, logits, strict=True)]
            grads = iter(_gradients(values, [leaf for own in leaves for leaf in own]) if jobs[0].grad else ())
        self._finish()
        seconds = (time.perf_counter() - began) / max(1, sum(job.rows for job in jobs))
        return [
            Passed(
                [part.detach() for part in own],
                value.detach(),
                [next(grads) for _ in job.branches] if job.grad else [],
                seconds * job.rows,
            )
            for job, own, value in zip(jobs, logits, values, strict=True)
        ]

    def _timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        began = time.perf_counter()
        result = work()
        self._finish()
        return result, time.perf_counter() - began

    def _finish(self) -> None:
        """A pass is over when the device is done with it, not when its kernels are under way."""
        if self._llm.device.type == "cuda":
            torch.cuda.synchronize(self._llm.device)

    def _logits(self, jobs: list[_Job], leaves: list[list[Tensor]]) -> list[list[Tensor]]:
        """The logits of each job's branches: branch by branch where there is one job, else as one batch."""
        if len(jobs) == 1:
            pairs = zip(leaves[0], jobs[0].branches, strict=True)
            return [[self._llm(Embeds.whole(leaf), branch.mask_BT, branch.keep_BA) for leaf, branch in pairs]]
        branches = [branch for job in jobs for branch in job.branches]
        T, A = max(job.length for job in jobs), max(branch.keep_BA.shape[1] for branch in branches)
        flat = [leaf for own in leaves for leaf in own]
        embeds_BTD = torch.cat([F.pad(leaf, (0, 0, 0, T - leaf.shape[1])) for leaf in flat])
        mask_BT = torch.cat([F.pad(branch.mask_BT, (0, T - branch.mask_BT.shape[1])) for branch in branches])
        keep_BA = torch.cat([F.pad(branch.keep_BA, (0, A - branch.keep_BA.shape[1])) for branch in branches])
        merged = iter(self._llm(Embeds.whole(embeds_BTD), mask_BT, keep_BA).split([len(leaf) for leaf in flat]))
        return [[next(merged)[:, : branch.keep_BA.shape[1]] for branch in job.branches] for job in jobs]


def _yield_to_small_steps() -> None:
    """Have this thread's large steps give way on a core to the thread of small ones; elsewhere than on Linux, nothing.

    A third thread on two cores has two thirds of one; with this it has nearly all of it.
    """
    if sys.platform == "linux":  # where a priority is a thread's own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LARGE_NICE)


def _shape(branches: Sequence[Rows]) -> Shape:
    """The size of branches that pass the LLM, as one job of them is counted."""
    return Shape(
        rows=sum(len(branch.embeds_BTD) for branch in branches),
        positions=max(branch.embeds_BTD.shape[1] for branch in branches),
        answers=max(branch.keep_BA.shape[1] for branch in branches),
    )


def _with_graph(llm: LocalLLM, rows: Rows) -> tuple[Tensor, Tensor, int]:
    """The embeddings as a leaf, the logits, and the bytes that the graph between them holds beside the weights."""
    weights = {tensor.untyped_storage().data_ptr() for part in (llm.decoder, llm.head) for tensor in part.parameters()}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would hold its own node where an operation saves its output: a leak

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        leaf = rows.embeds_BTD.detach().requires_grad_()
        logits_BAV = llm(Embeds.whole(leaf), rows.mask_BT, rows.keep_BA)
    return leaf, logits_BAV, sum(saved.values())


def _gradients(values: list[Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(torch.stack([value.sum() for value in values]).sum(), leaves, materialize_grads=True)
