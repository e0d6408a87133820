"""One LLM for many clients: steps that wait together as one batch, against one by one and against one big batch.

    throughput    16 clients send steps of one sample; the host merges them, or runs each alone; beside it the same 16
                  samples as one batch in the host's own process, with no link
    training      the same with whole clients: edge, link, optimiser; against one process that trains on batches of 16
    sessions      the host's memory with 64 sessions that have each done a step, over that with one

Clients are threads of one other process, on the same cores: what they cost is in the figure.
"""

from __future__ import annotations

import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedmm import seeds, tree
from fedmm.bench import served
from fedmm.bench.common import Case, Size
from fedmm.bench.served import Shapes
from fedmm.edge.nano_edge import NanoEdge
from fedmm.link.remote import RemoteLLM
from fedmm.link.session import Session
from fedmm.llm.local import LocalLLM
from fedmm.model import SplitModel
from fedmm.serving.features import Features
from fedmm.serving.host import Host
from fedmm.serving.limits import Limits
from fedmm.storage import memory
from fedmm.storage.tensor_store import Store

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

CLIENTS, SESSIONS = 16, 64
DEADLINE_SECONDS = 600.0


@dataclass(frozen=True)
class Depth:
    """What of an LLM is behind its width, and on what it runs."""

    layers: int
    heads: int
    head: int
    mlp: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


@dataclass(frozen=True)
class Setting:
    """An LLM and the questions put to it; `repeats` rounds of measuring, each way in turn."""

    name: str
    shapes: Shapes
    depth: Depth
    repeats: int
    bars: tuple[float, float] | None = None  # of throughput and training; at toy size the LLM is too small to matter


def cases(size: Size) -> Iterator[Case]:
    """At real size a 100M LLM with 64 and 676 positions, and, where there is a CUDA device, one of 7B shapes."""
    for setting in _settings(size):
        yield from _speed(setting)
    yield from _sessions(_settings(size)[0])


def _settings(size: Size) -> list[Setting]:
    if size == "toy":
        return [Setting("toy", replace(served.SHAPES["toy"], T=24, P=16), Depth(2, 4, 16, 128), repeats=2)]
    small = Shapes(T=64, P=49, D=768, E=1024, R=64, V=32064, A=5)
    settings = [
        Setting("100M, 64 positions", small, Depth(12, 12, 64, 2048), repeats=5, bars=(0.8, 0.85)),
        Setting(
            "100M, 676 positions", replace(small, T=676, P=576), Depth(12, 12, 64, 2048), repeats=2, bars=(0.8, 0.85)
        ),
    ]
    if torch.cuda.is_available():
        large = Depth(32, 32, 128, 11008, torch.bfloat16, "cuda")
        settings += [
            Setting("7B on CUDA, 64 positions", replace(small, D=4096), large, repeats=5, bars=(0.8, 0.9)),
            Setting("7B on CUDA, 676 positions", served.SHAPES["real"], large, repeats=5, bars=(0.8, 0.9)),
        ]
    return settings


def _speed(setting: Setting) -> Iterator[Case]:
    """Samples a second, each way in turn; a bar is of the way that merges, over the one big batch."""
    torch.set_num_threads(multiprocessing.cpu_count())
    model = _llava(setting)
    llm, merged_batch = LocalLLM(model), served.batch(setting.shapes, range(CLIENTS))
    with ExitStack() as stack:
        merging = stack.enter_context(_host(setting, model, merge_rows=CLIENTS, merge_wait_seconds=0.1))
        single = stack.enter_context(_host(setting, model, workers=1))
        clients = stack.enter_context(_clients(setting))
        edge = _edge(setting.shapes, model.get_input_embeddings().weight.detach().float().cpu())
        whole = SplitModel(edge, llm)
        optimizer = torch.optim.AdamW(list(edge.trainable("shared").values()), lr=1e-3)
        embeds, mask_BT = edge(merged_batch)
        fixed = replace(embeds, terms=())  # as the host sees it once features are there

        def one_pass() -> None:
            leaf = replace(
                fixed, segments=tuple(replace(p, x_ND=p.x_ND.detach().requires_grad_()) for p in fixed.segments)
            )
            loss = llm.losses([leaf], mask_BT, merged_batch.keep_BA, merged_batch.labels_BA)[0]
            torch.autograd.grad(loss, [segment.x_ND for segment in leaf.segments])

        def one_step() -> None:
            optimizer.zero_grad()
            whole.answer_loss(merged_batch).backward()
            optimizer.step()

        for i, (name, train, alone) in enumerate((("throughput", False, one_pass), ("training", True, one_step))):
            bar = setting.bars[i] if setting.bars else None
            ways: dict[str, Callable[[], object]] = {
                "monolithic": alone,
                "merged": lambda train=train: clients(merging, train),  # type: ignore[misc]
                "one by one": lambda train=train: clients(single, train),  # type: ignore[misc]
            }
            rates = {way: CLIENTS / seconds for way, seconds in _medians(ways, setting.repeats).items()}
            detail = {"samples_a_second": rates, "tokens_a_second": rates["merged"] * setting.shapes.T}
            best = max(rates["merged"], rates["one by one"]) if train else rates["merged"]
            share = best / rates["monolithic"]
            yield Case(
                "host", f"{name}, {setting.name}", share, "of one batch of 16", bar, at_least=True, detail=detail
            )
            gain = rates["merged"] / rates["one by one"]
            yield Case("host", f"{name}, {setting.name}, merged", gain, "times one by one")


def _medians(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each way, in turn, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            memory.give_back()
            began = time.perf_counter()
            way()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _sessions(setting: Setting) -> Iterator[Case]:
    """What more sessions add to the host's memory, each having done a step; their features are counted apart."""
    model = _llava(setting)
    frozen = tree.digest(dict(model.state_dict()))
    batch = served.batch(setting.shapes, range(1))
    store = Store(memory_bytes=1 << 30)
    with _host(setting, model, store=store, sessions=80) as host, _clients(setting) as clients:
        held = []
        for count in (1, SESSIONS):
            clients(host, True, count)
            memory.give_back()  # what is freed is kept by thread
            held.append(memory.rss_bytes() - store.memory_used_bytes)
    weights = sum(p.nbytes for p in model.parameters())
    features = {"of one sample": batch.features_MPE} if batch.features_MPE is not None else {}
    detail = {"host_bytes": held[0], "model_bytes": weights, "features_bytes_a_client": tree.size_bytes(features)}
    assert tree.digest(dict(model.state_dict())) == frozen
    growth = (held[1] - held[0]) / (SESSIONS - 1) / 1e6
    yield Case("host", f"memory of one more session, {setting.name}", growth, "MB", None, detail=detail)


def _llava(setting: Setting) -> LlavaForConditionalGeneration:
    depth = setting.depth
    model = served.llava(setting.shapes, layers=depth.layers, heads=depth.heads, head=depth.head, mlp=depth.mlp)
    return model.to(depth.device, depth.dtype)


@contextmanager
def _host(
    setting: Setting, model: LlavaForConditionalGeneration, store: Store | None = None, **options: Any
) -> Iterator[Host]:
    device = model.lm_head.weight.device
    connector = served.connector(setting.shapes).to(device).requires_grad_(False)
    features = Features(connector, model.get_input_embeddings().weight, store or Store(memory_bytes=1 << 30))
    with Host(
        LocalLLM(model), card={}, edge={}, features=features, on_update=lambda round, update, moved: None,
        limits=Limits(deadline_seconds=DEADLINE_SECONDS, **options),
    ) as host:  # fmt: skip
        host.open_round(1, {}, [])
        yield host


def _session(host: Host, client: int) -> Session:
    address, token = f"127.0.0.1:{host.port}", host.token(1, client)
    return Session(address, client=client, round=1, token=token, deadline_seconds=DEADLINE_SECONDS)


def _edge(shapes: Shapes, table_VD: Tensor) -> NanoEdge:
    built = NanoEdge(nn.Identity(), served.connector(shapes), table_VD, rank=shapes.R, alpha=2.0 * shapes.R)
    built.reset(seeds.generator(0, "adapters"))
    return built


@contextmanager
def _clients(setting: Setting) -> Iterator[Callable[..., None]]:
    """Clients in another process: called with a host, each does a step of its one sample there."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve_clients, args=(setting, theirs), daemon=True)
    process.start()
    theirs.close()

    def step(host: Host, train: bool, count: int = CLIENTS) -> None:
        ours.send((host.port, [host.token(1, client) for client in range(count)], train))
        if (fault := ours.recv()) is not None:
            raise RuntimeError(fault)

    try:
        yield step
    finally:
        ours.close()
        process.join(10)
        process.kill()


def _serve_clients(setting: Setting, connection: Connection) -> None:
    """Sessions stay open from step to step, as in a round; `train` runs the whole client, else a step made before."""
    torch.set_num_threads(1)
    clients: dict[int, list[_Client]] = {}
    with ExitStack() as stack:
        while True:
            try:
                port, tokens, train = connection.recv()
            except EOFError:
                return
            own = clients.setdefault(port, [])
            own += [_Client(setting, port, client, tokens[client], stack) for client in range(len(own), len(tokens))]
            threads = [threading.Thread(target=one.step, args=(train,)) for one in own]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            memory.give_back()
            connection.send(next((one.fault for one in own if one.fault), None))


class _Client:
    """One client with one sample of its own, its edge and its optimiser."""

    def __init__(self, setting: Setting, port: int, client: int, token: str, stack: ExitStack) -> None:
        address = f"127.0.0.1:{port}"
        session = Session(address, client=client, round=1, token=token, deadline_seconds=DEADLINE_SECONDS)
        self._llm = RemoteLLM(stack.enter_context(session))
        self._edge = _edge(setting.shapes, torch.zeros(setting.shapes.V, setting.shapes.D))
        self._optimizer = torch.optim.AdamW(list(self._edge.trainable("shared").values()), lr=1e-3)
        self._batch = served.batch(setting.shapes, range(client, client + 1))
        self._embeds, self._mask_BT = self._edge(self._batch)
        self.fault: str | None = None

    def step(self, train: bool) -> None:
        try:
            if train:
                self._optimizer.zero_grad()
                SplitModel(self._edge, self._llm).answer_loss(self._batch).backward()
                self._optimizer.step()
            else:
                self._llm.losses([self._embeds], self._mask_BT, self._batch.keep_BA, self._batch.labels_BA)
        except Exception as error:  # in a thread: the other process raises it
            self.fault = f"{type(error).__name__}: {error}"
