"""Many clients on one LLM: alone or in company, a gradient is a client's own."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from helpers import gradients, served, some_examples, visiting

from fedmm import seeds
from fedmm.edge import frozen_modules
from fedmm.edge.prepare import collate, encode, prepare
from fedmm.link.remote import RemoteLLM
from fedmm.llm.local import LocalLLM
from fedmm.losses import Mutual
from fedmm.model import SplitModel
from fedmm.serving.engine import Engine
from fedmm.serving.footprint import Footprint, Shape
from fedmm.serving.passes import Rows
from fedmm.types import Embeds, FedmmError

PROMPT = "<image> {question}"


def rows(seed: int, B: int = 1, T: int = 9, A: int = 2) -> Rows:
    generator = seeds.generator(seed, "rows")
    mask_BT = torch.ones(B, T, dtype=torch.bool)
    mask_BT[0, T - seed % 3 :] = False
    keep_BA = torch.arange(2, 2 + A).repeat(B, 1)
    return Rows(torch.randn(B, T, 16, generator=generator), mask_BT, keep_BA)


def values(seed):
    return lambda logits: sum((z * (i + 1 + seed)).tanh().mean() for i, z in enumerate(logits))


class CountingLLM(LocalLLM):
    """Notes the shape of every pass; the first may wait until it is let go."""

    def __init__(self, llm, hold=False):
        self.__dict__ |= llm.__dict__
        self.passes, self.firsts = [], []
        self.go = threading.Event()
        if not hold:
            self.go.set()

    def __call__(self, embeds, mask_BT, keep_BA):
        self.passes.append(embeds.shape)
        self.firsts.append(embeds.dense()[:, 0, 0].tolist())
        self.go.wait(20)
        return super().__call__(embeds, mask_BT, keep_BA)


def until(true):
    """Wait for something that comes soon."""
    for _ in range(2000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come")


def together(engine, jobs):
    """Run jobs at once, one thread each."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [f.result() for f in [pool.submit(engine.run, own, values(i), grad=True) for i, own in enumerate(jobs)]]


@pytest.fixture
def engine_of(local_llm):
    with ExitStack() as stack:

        def make(llm=local_llm, **options):
            engine = Engine(llm, **options)
            stack.callback(engine.close)
            return engine

        yield make


def alone(local_llm, own, seed):
    leaves = [row.embeds_BTD.clone().requires_grad_() for row in own]
    logits = [local_llm(Embeds.whole(x), row.mask_BT, row.keep_BA) for x, row in zip(leaves, own, strict=True)]
    value = values(seed)(logits)
    return value, torch.autograd.grad(value, leaves)


JOBS = [[rows(0)], [rows(1, B=3, T=10)], [rows(2, T=8, A=3), rows(5, T=8)], [rows(3)], [rows(4, T=10, A=1)]]


def test_without_merging_a_step_has_the_bits_it_has_alone(local_llm, engine_of):
    for i, (own, found) in enumerate(zip(JOBS, together(engine_of(workers=2), JOBS), strict=True)):
        value, grads = alone(local_llm, own, i)
        assert torch.equal(found.values, value.detach())
        assert all(torch.equal(a, b) for a, b in zip(found.grads, grads, strict=True))


def test_in_company_a_gradient_changes_by_rounding_only(local_llm, engine_of):
    llm = CountingLLM(local_llm)
    engine = engine_of(llm, merge_rows=32, merge_wait_seconds=5.0, crowd=lambda: len(JOBS))
    found = together(engine, JOBS)
    assert llm.passes == [(8, 10)], "all of them were one batch"
    for i, (own, passed) in enumerate(zip(JOBS, found, strict=True)):
        value, grads = alone(local_llm, own, i)
        torch.testing.assert_close(passed.values, value.detach(), rtol=1e-5, atol=1e-6)
        for came, wanted, row in zip(passed.grads, grads, own, strict=True):
            assert came.shape == row.embeds_BTD.shape and wanted.abs().sum() > 0
            torch.testing.assert_close(came, wanted, rtol=1e-4, atol=1e-7)


def test_what_a_neighbour_sends_changes_nothing_beyond_rounding(local_llm, engine_of):
    """However large it is."""
    first = None
    for size in (1.0, 1e4):
        llm = CountingLLM(local_llm)
        engine = engine_of(llm, merge_rows=8, merge_wait_seconds=5.0, crowd=lambda: 2)
        neighbour = rows(1)
        found = together(engine, [[rows(0)], [Rows(neighbour.embeds_BTD * size, neighbour.mask_BT, neighbour.keep_BA)]])
        first = first or found[0]
        assert llm.passes == [(2, 9)]
        assert torch.equal(found[0].grads[0], first.grads[0])


def test_steps_of_other_lengths_and_kinds_are_not_one_batch(local_llm, engine_of):
    llm = CountingLLM(local_llm)
    engine = engine_of(llm, workers=1, merge_rows=32, merge_wait_seconds=2.0)
    with ThreadPoolExecutor(4) as pool:
        futures = [
            pool.submit(engine.run, [rows(0, T=8)], values(0), grad=True),
            pool.submit(engine.run, [rows(1, T=10)], values(0), grad=True),
            pool.submit(engine.run, [rows(2, T=40)], values(0), grad=True),
            pool.submit(engine.run, [rows(3, T=8)]),
        ]
        [future.result() for future in futures]
    assert sorted(llm.passes) == [(1, 8), (1, 40), (2, 10)]


def test_a_batch_has_its_bound_and_the_oldest_go_first(local_llm, engine_of):
    llm = CountingLLM(local_llm, hold=True)
    engine = engine_of(llm, workers=1, merge_rows=3, merge_wait_seconds=0.0)
    with ThreadPoolExecutor(8) as pool:
        futures = []
        for i in range(8):
            futures.append(pool.submit(engine.run, [rows(i)], values(i), grad=True))
            until(lambda i=i: len(llm.passes) == 1 and len(engine._queue) == i)
        llm.go.set()
        [future.result() for future in futures]
    firsts = [rows(i).embeds_BTD[0, 0, 0].item() for i in range(8)]
    assert llm.firsts == [firsts[:1], firsts[1:4], firsts[4:7], firsts[7:]]


class GatedLLM(LocalLLM):
    """Notes the rows of every pass, and holds one of more than three until it is let go: so a large step takes long."""

    def __init__(self, llm):
        self.__dict__ |= llm.__dict__
        self.passes = []
        self.go = threading.Event()

    def __call__(self, embeds, mask_BT, keep_BA):
        self.passes.append(embeds.shape[0])
        if embeds.shape[0] > 3:
            self.go.wait(60)
        return super().__call__(embeds, mask_BT, keep_BA)


def served_in(engine, llm, jobs):
    """Queue jobs (client, rows) one after the other while the first holds the only worker; the order of the passes."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = []
        for i, (client, B) in enumerate(jobs):
            futures.append(pool.submit(engine.run, [rows(0, B=B)], values(0), grad=True, client=client))
            until(lambda i=i: len(llm.passes) == 1 and len(engine._queue) == i)
        llm.go.set()
        [future.result() for future in futures]
    return llm.passes


def test_who_sends_little_does_not_wait_behind_who_sends_much(local_llm, engine_of):
    """Client 0 and 1 send large steps, client 2 comes last with small ones."""
    llm = GatedLLM(local_llm)
    order = served_in(
        engine_of(llm, workers=1), llm, [(0, 20), (0, 21), (0, 22), (1, 30), (1, 31), (2, 1), (2, 2), (2, 3)]
    )
    assert order == [20, 30, 1, 2, 3, 21, 31, 22]


def test_an_idle_client_saves_nothing_and_a_new_one_starts_where_the_others_are(local_llm, engine_of):
    llm = GatedLLM(local_llm)
    engine = engine_of(llm, workers=1)
    for _ in range(20):
        engine.run([rows(0)], values(0), grad=True, client=1)  # which client 0 has not done, nor client 2
    engine.run([rows(0)], values(0), grad=True, client=0)
    llm.passes.clear()
    jobs = [(9, 20), *((client, client + 1) for _ in range(4) for client in (0, 1, 2))]
    order = served_in(engine, llm, jobs)[1:]
    assert order == [3, 1, 2, 1, 2, 3, 1, 1, 2, 3, 2, 3], "in turns by rows, neither 0's 19 steps first nor 2's 21"


def test_large_steps_do_not_hold_every_worker_against_a_small_one(llava, local_llm, edge):
    """Over the real link: two clients hold both workers, and a third has its step done meanwhile, with its own bits."""
    llm, small = GatedLLM(local_llm), rows(0, B=2)
    labels_BA = torch.ones(2, 2, dtype=torch.int64)

    def step(session, own):
        tensors = {
            "whole.0": own.embeds_BTD, "mask": own.mask_BT, "keep": own.keep_BA,
            "labels": labels_BA[:1].expand(len(own.mask_BT), 2),
        }  # fmt: skip
        return session.call("loss", tensors, branches=1, grads=["whole.0"]).tensors["grad/whole.0"]

    leaf = small.embeds_BTD.clone().requires_grad_()
    (loss,) = local_llm.losses([Embeds.whole(leaf)], small.mask_BT, small.keep_BA, labels_BA)
    with served(llava, edge, llm, workers=2) as (host, _), ExitStack() as stack:
        sessions = [stack.enter_context(visiting(host, client=i, deadline_seconds=8.0)) for i in range(4)]
        llm.passes.clear()
        with ThreadPoolExecutor(3) as pool:
            large = [pool.submit(step, sessions[i], rows(i, B=9)) for i in range(2)]
            until(lambda: llm.passes == [9, 9])
            large.append(pool.submit(step, sessions[2], rows(2, B=9)))
            try:
                for _ in range(3):
                    assert torch.equal(step(sessions[3], small), torch.autograd.grad(loss, leaf, retain_graph=True)[0])
                assert llm.passes == [9, 9, 2, 2, 2], "a third large one waits"
            finally:
                llm.go.set()
            assert all(torch.isfinite(future.result()).all() for future in large)


def test_a_step_that_finds_no_worker_in_time_is_asked_again_and_loses_nothing(llava, local_llm, edge, batch):
    """Found in a review: two clients' passes of a minute made a victim lose its round. The host waits a second here,
    the client as long as its turn."""
    llm = GatedLLM(local_llm)
    local = SplitModel(edge, local_llm)
    local(batch).sum().backward()
    wanted = gradients(edge)
    options = {"workers": 1, "deadline_seconds": 2.0}
    with served(llava, edge, llm, **options) as (host, _), visiting(host) as victim, visiting(host, client=1) as other:
        llm.passes.clear()
        own = rows(1, B=9)
        large = {"whole.0": own.embeds_BTD, "mask": own.mask_BT, "keep": own.keep_BA}
        with ThreadPoolExecutor(2) as pool:
            logits_BAV = SplitModel(edge, RemoteLLM(victim))(batch)
            attack = pool.submit(other.call, "forward", large, step=0, branches=1, grads=[])
            until(lambda: llm.passes[-1:] == [9])
            backward = pool.submit(logits_BAV.sum().backward)
            until(lambda: victim.sent_frames["backward"] > 1)
            llm.go.set()
            backward.result()
            attack.result()
    assert all(torch.equal(wanted[name], gradient) for name, gradient in gradients(edge).items())


def test_with_one_worker_one_pass_runs_at_a_time(local_llm, engine_of):
    llm = GatedLLM(local_llm)
    assert served_in(engine_of(llm, workers=1), llm, [(0, 20), (0, 21), (1, 1)]) == [20, 1, 21]


def test_a_merged_batch_keeps_within_a_steps_memory(local_llm, engine_of):
    """Two of three fit; neither is run with a third, and each alone is as it was checked."""
    two = Footprint.measured(local_llm, 0).bytes(Shape(2, 9, 2, grad=True))
    llm = CountingLLM(local_llm, hold=True)
    engine = engine_of(
        llm, workers=1, merge_rows=8, merge_wait_seconds=0.0, footprint=Footprint.measured(local_llm, two)
    )
    with ThreadPoolExecutor(4) as pool:
        futures = []
        for i in range(4):
            futures.append(pool.submit(engine.run, [rows(0)], values(0), grad=True, client=i))
            until(lambda i=i: len(llm.passes) == 1 and len(engine._queue) == i)
        llm.go.set()
        [future.result() for future in futures]
    assert llm.passes == [(1, 9), (2, 9), (1, 9)]


def test_a_client_that_does_not_come_is_waited_for_no_longer_than_said(local_llm, engine_of):
    engine = engine_of(merge_rows=8, merge_wait_seconds=0.2, crowd=lambda: 99)
    began = time.monotonic()
    engine.run([rows(0)], values(0), grad=True)
    assert 0.15 < time.monotonic() - began < 5.0


def test_one_that_fails_fails_alone(local_llm, engine_of):
    def spoilt(logits):
        raise RuntimeError("out of memory")

    engine = engine_of(merge_rows=8, merge_wait_seconds=5.0, crowd=lambda: 3)
    with ThreadPoolExecutor(3) as pool:
        bad = pool.submit(engine.run, [rows(0)], spoilt, grad=True)
        good = [pool.submit(engine.run, [rows(i)], values(i), grad=True) for i in (1, 2)]
        with pytest.raises(RuntimeError, match="out of memory"):
            bad.result()
        for i, future in zip((1, 2), good, strict=True):
            assert torch.equal(future.result().grads[0], alone(local_llm, [rows(i)], i)[1][0])


def test_who_waits_too_long_is_told_the_knobs(local_llm, engine_of):
    llm = CountingLLM(local_llm, hold=True)
    engine = engine_of(llm, workers=1, wait_seconds=0.3)
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(engine.run, [rows(0)], values(0), grad=True)
        until(lambda: llm.passes)
        with pytest.raises(FedmmError, match=r"busy for 0.3 s.*link.workers, link.merge_rows"):
            engine.run([rows(1)], values(1), grad=True)
        llm.go.set()
        assert torch.isfinite(slow.result().values)
    assert len(llm.passes) == 1, "what nobody waits for is not computed"


def test_who_gave_up_waiting_is_no_trouble_when_the_host_closes(local_llm):
    llm = CountingLLM(local_llm, hold=True)
    engine = Engine(llm, workers=1, wait_seconds=0.2)
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(engine.run, [rows(0)])
        until(lambda: llm.passes)
        with pytest.raises(FedmmError, match="busy"):
            engine.run([rows(1)])
        closing = pool.submit(engine.close)
        until(lambda: not engine._open)
        llm.go.set()
        slow.result()
        closing.result()


def test_graphs_that_are_made_at_once_keep_the_bound(local_llm, engine_of):
    whole = engine_of().begin(rows(0)).graph_bytes
    engine = engine_of(graph_bytes=whole, workers=4)
    with ThreadPoolExecutor(8) as pool:
        begun = list(pool.map(engine.begin, [rows(0) for _ in range(8)]))
    assert sum(one.graph is not None for one in begun) == 1


def test_steps_that_wait_when_the_host_closes_are_told(local_llm):
    llm = CountingLLM(local_llm, hold=True)
    engine = Engine(llm, workers=1)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(engine.run, [rows(0)])
        until(lambda: llm.passes)
        waiting = pool.submit(engine.run, [rows(1)])
        until(lambda: engine._queue)
        closing = pool.submit(engine.close)
        with pytest.raises(FedmmError, match="closing"):
            waiting.result()
        llm.go.set()
        first.result()
        closing.result()
    with pytest.raises(FedmmError, match="closing"):
        engine.run([rows(0)])


@pytest.mark.parametrize("options", [{}, {"graph_bytes": 0}, {"merge_rows": 4, "merge_wait_seconds": 0.0}])
def test_a_backward_is_the_same_from_a_kept_graph_and_run_again(local_llm, engine_of, options):
    llm = CountingLLM(local_llm)
    engine = engine_of(llm, **options)
    begun = engine.begin(rows(0))
    grad_BAV = torch.randn(begun.logits_BAV.shape, generator=seeds.generator(0, "grad"))
    grad_BTD, _ = engine.finish(begun, grad_BAV)
    leaf = rows(0).embeds_BTD.requires_grad_()
    wanted = local_llm(Embeds.whole(leaf), rows(0).mask_BT, rows(0).keep_BA)
    assert torch.equal(begun.logits_BAV, wanted)
    assert torch.equal(grad_BTD, torch.autograd.grad(wanted, leaf, grad_BAV)[0])
    assert len(llm.passes) == (2 if options else 1)


def test_graphs_are_kept_while_memory_lasts_and_given_back(local_llm, engine_of):
    whole = engine_of().begin(rows(0)).graph_bytes
    assert whole > rows(0).embeds_BTD.nbytes
    engine = engine_of(graph_bytes=2 * whole)
    kept = [engine.begin(rows(0)) for _ in range(3)]
    assert [begun.graph is not None for begun in kept] == [True, True, False]
    engine.finish(kept[0], torch.ones_like(kept[0].logits_BAV))
    assert engine.begin(rows(0)).graph is not None
    del kept
    assert engine.begin(rows(0)).graph is not None, "a session that ended holds nothing"


@pytest.mark.parametrize("options", [{}, {"merge_rows": 64, "merge_wait_seconds": 2.0}])
@pytest.mark.parametrize("loss_at", ["auto", "client"])
def test_clients_at_once_get_the_gradients_they_get_alone(llava, local_llm, options, loss_at):
    """Over the real link; without merging to the last bit."""
    clients = 4
    edges, batches = [], []
    for client in range(clients):
        built, processor = frozen_modules.build(
            frozen_modules.take(*llava), sets=("shared", "local"), rank=4, alpha=8.0
        )
        for name in ("shared", "local"):
            built.reset(seeds.generator(client, name), name)
        with torch.no_grad():
            for parameter in built.adapters.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=seeds.generator(client, "shake")))
        items = encode(built, prepare(some_examples(6)[client : client + 2], processor, PROMPT))
        edges.append(built)
        batches.append(collate(items))

    def step(llm, client):
        losses = SplitModel(edges[client], llm, loss_at).losses(
            batches[client], (("local",), ("shared",)), Mutual((1.0, 1.0), 2.0)
        )
        for loss in losses:
            loss.backward()
        return [loss.item() for loss in losses], gradients(edges[client])

    wanted = [step(local_llm, client) for client in range(clients)]
    with served(llava, edges[0], local_llm, pending=8, **options) as (host, _), ExitStack() as stack:
        llms = [RemoteLLM(stack.enter_context(visiting(host, client=client))) for client in range(clients)]
        with ThreadPoolExecutor(clients) as pool:
            found = list(pool.map(step, llms, range(clients)))
    for (losses, grads), (wanted_losses, wanted_grads) in zip(found, wanted, strict=True):
        if not options:
            assert losses == wanted_losses
            assert all(torch.equal(grads[name], wanted_grads[name]) for name in wanted_grads)
        assert losses == pytest.approx(wanted_losses, rel=1e-5)
        for name, gradient in wanted_grads.items():
            torch.testing.assert_close(grads[name], gradient, rtol=1e-3, atol=1e-6)
