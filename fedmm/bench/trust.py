"""What one client can cost the host and the others: memory left behind, memory of a step, time of a victim, of a frame.

    left behind    the host's memory over steps whose graphs nobody finishes, in sessions that vanish
    estimate       what the host reckons a training step takes, over the peak of its process
    victim         time of a client's small step while two others send large ones, over its time alone
    frame          time to decode a frame of as many tensors as a client may send

Clients are threads of the host's process, so what they cost is in the figures.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmm.bench import served
from fedmm.bench.common import Case, Size, in_turn, median_ms
from fedmm.bench.served import Shapes
from fedmm.link import wire
from fedmm.link.messages import ForwardRequest, LossRequest
from fedmm.link.session import Session
from fedmm.link.steps import FactoredStep, Term
from fedmm.llm.local import LocalLLM
from fedmm.serving.features import Features
from fedmm.serving.footprint import Footprint, Shape
from fedmm.serving.host import Host
from fedmm.serving.limits import Limits
from fedmm.storage import memory
from fedmm.types import Embeds

DEADLINE_SECONDS = 600.0
_REFS = Path("/proc/self/clear_refs")  # of Linux: 5 starts the peak anew


@dataclass(frozen=True)
class Setting:
    """An LLM, how many steps are left behind, the rows of a small and of a large step, and how often each is timed."""

    shapes: Shapes
    layers: int
    mlp: int
    steps: int
    rows: tuple[int, int]
    repeats: int
    flat: float | None = None  # growth of memory over the steps after the first quarter, at most
    ratio: float | None = None  # of a victim's time


SETTINGS: Mapping[Size, Setting] = {
    "toy": Setting(replace(served.SHAPES["toy"], T=32, P=16), 2, 128, steps=24, rows=(1, 16), repeats=3),
    "real": Setting(
        Shapes(T=128, P=64, D=512, E=64, R=8, V=4000, A=4), 6, 1376, 2000, (1, 24), 5, flat=1.02, ratio=1.2
    ),
}


def cases(size: Size) -> Iterator[Case]:
    """Every figure; at real size on an LLM of 21M parameters, and what is left behind by 2,000 steps on the toy."""
    torch.set_num_threads(1)  # as the host of a run
    setting = SETTINGS[size]
    left = replace(SETTINGS["toy"], steps=setting.steps, flat=setting.flat)
    for name, options in {"over the bound": {"graph_bytes": 1}, "vanished": {}}.items():
        yield _left_behind(left, _llm(left), name, options)
    llm = _llm(setting)
    if _REFS.exists():
        yield from _estimates(setting, llm)
    yield from _victims(setting, llm)
    yield _frame(setting)


def _llm(setting: Setting) -> LocalLLM:
    shapes = setting.shapes
    return LocalLLM(served.llava(shapes, layers=setting.layers, heads=8, head=shapes.D // 8, mlp=setting.mlp))


def _left_behind(setting: Setting, llm: LocalLLM, name: str, options: Mapping[str, Any]) -> Case:
    held = []
    with _host(setting, llm, **options) as host:
        for step in range(setting.steps):
            with _session(host, 0) as session:
                session.ask(ForwardRequest(_step(setting, 1), _keep(setting, 1), step, _by_h(setting)))
            if step % max(1, setting.steps // 8) == 0:
                memory.give_back()
                held.append(memory.rss_bytes())
    growth = held[-1] / held[len(held) // 4]
    each = (held[-1] - held[len(held) // 4]) / (setting.steps * 0.75)
    detail = {"steps": setting.steps, "bytes_a_step": each, "held_mb": [value / 2**20 for value in held]}
    return Case("trust", f"left behind, {name}", growth, "of its memory before", setting.flat, detail=detail)


def _estimates(setting: Setting, llm: LocalLLM) -> Iterator[Case]:
    footprint = Footprint.measured(llm, 1 << 62)
    for B in (setting.rows[1] // 4, setting.rows[1]):
        T, A = setting.shapes.T, setting.shapes.A
        keep_BA, labels_BA = torch.arange(A).expand(B, A), torch.ones(B, A, dtype=torch.int64)
        memory.give_back()
        _REFS.write_text("5")
        before = memory.rss_bytes()
        leaf = torch.zeros(B, T, setting.shapes.D).requires_grad_()
        mask_BT = torch.arange(T).expand(B, T) < T - 1
        torch.autograd.grad(llm.losses([Embeds.whole(leaf)], mask_BT, keep_BA, labels_BA)[0], leaf)
        peak = memory.peak_rss_bytes() - before
        estimate = footprint.bytes(Shape(B, T, A, grad=True))
        detail = {"estimate_mb": estimate / 2**20, "peak_mb": peak / 2**20}
        yield Case("trust", f"estimate, {B} rows of {T}", estimate / max(1, peak), "of the peak", detail=detail)


def _victims(setting: Setting, llm: LocalLLM) -> Iterator[Case]:
    small, large = setting.rows
    for workers in (1, 2):
        with _host(setting, llm, workers=workers) as host, _session(host, 0) as victim:
            alone = [_timed(victim, setting, small) for _ in range(setting.repeats)]
            with _attacks(setting, host, large):
                beside = [_timed(victim, setting, small) for _ in range(setting.repeats)]
        ratio = statistics.median(beside) / statistics.median(alone)
        detail = {"alone_ms": median_ms(alone), "beside_ms": median_ms(beside), "worst_ms": 1e3 * max(beside)}
        bar = setting.ratio if workers > 1 else None
        yield Case("trust", f"victim, {workers} workers", ratio, "of its time alone", bar, detail=detail)


def _frame(setting: Setting) -> Case:
    frame = wire.Frame(LossRequest.verb, {}, {f"{'x' * 200}{i}": torch.zeros(0) for i in range(wire.TENSORS_LIMIT)})
    sent = list(wire.encode(frame))
    ways = {"decode": lambda: wire.decode(iter(sent), 1 << 30, wire.TENSORS_LIMIT)}
    detail = {"tensors": len(frame.tensors), "bytes": sum(map(len, sent))}
    return Case("trust", "frame", median_ms(in_turn(ways, setting.repeats)["decode"]), "ms", detail=detail)


@contextmanager
def _attacks(setting: Setting, host: Host, rows: int) -> Iterator[None]:
    """Two clients that send large steps without a pause."""
    over = threading.Event()
    under_way = threading.Barrier(3)

    def attack(client: int) -> None:
        with _session(host, client) as session:
            under_way.wait()
            while not over.is_set():
                session.ask(_loss(setting, rows))

    with ExitStack() as stack:
        threads = [threading.Thread(target=attack, args=(client,)) for client in (1, 2)]
        for thread in threads:
            thread.start()
            stack.callback(thread.join)
        stack.callback(over.set)
        under_way.wait()
        time.sleep(0.2)  # until both are in the LLM
        yield


def _timed(session: Session, setting: Setting, rows: int) -> float:
    began = time.perf_counter()
    session.ask(_loss(setting, rows))
    return time.perf_counter() - began


def _loss(setting: Setting, B: int) -> LossRequest:
    labels_BA = torch.ones(B, setting.shapes.A, dtype=torch.int64)
    return LossRequest(_step(setting, B), _keep(setting, B), labels_BA, _by_h(setting))


def _by_h(setting: Setting) -> list[str]:
    """The gradient that is asked for: by h alone."""
    return list(_step(setting, 1).inputs())[-1:]


def _keep(setting: Setting, B: int) -> Tensor:
    return torch.arange(setting.shapes.A).repeat(B, 1)


def _step(setting: Setting, B: int) -> FactoredStep:
    """A factored step of text alone: ten bytes a position."""
    T, D = setting.shapes.T, setting.shapes.D
    mask_BT = torch.ones(B, T, dtype=torch.bool)
    term = Term("text", 1.0, "a", torch.ones(B * T, 1), torch.ones(D, 1))
    return FactoredStep(mask_BT, torch.ones(B, T, dtype=torch.int32), ~mask_BT, branches=((term,),))


@contextmanager
def _host(setting: Setting, llm: LocalLLM, **options: Any) -> Iterator[Host]:
    features = Features(served.connector(setting.shapes).requires_grad_(False), llm.decoder.embed_tokens.weight)
    with Host(
        llm, card={}, edge={}, features=features, on_update=lambda round, update, moved: None,
        limits=Limits(deadline_seconds=DEADLINE_SECONDS, **options),
    ) as host:  # fmt: skip
        host.open_round(1, {}, [])
        yield host


def _session(host: Host, client: int) -> Session:
    return Session(
        f"127.0.0.1:{host.port}", client=client, round=1, token=host.token(1, client), deadline_seconds=DEADLINE_SECONDS
    )
