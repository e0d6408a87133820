"""What the link costs: milliseconds over plain and mutual TLS, and bytes (`traffic.py`).

The host is a process of its own on this machine. Beside every echo stands the floor, in the same rounds: bare gRPC with
the same bytes in the same messages. A step's cost is what it takes longer over the link than in this process, dense,
in fp16 on the wire, the median over pairs that follow each other.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import torch

from fedmm.bench import traffic
from fedmm.bench.bare import chunks_of
from fedmm.bench.common import Case, Size, in_turn, median_ms
from fedmm.bench.served import SHAPES, Endpoint, Shapes, llava, served
from fedmm.codecs import Codecs
from fedmm.link import wire
from fedmm.link.messages import EchoRequest
from fedmm.link.remote import RemoteLLM
from fedmm.llm.local import LocalLLM
from fedmm.types import Embeds

EMPTY_ROUNDS = {"toy": 20, "real": 400}
BATCH = 16
EMPTY_BAR_MS = {"tls": 1.0}
ECHO_BARS_MS = {("tls", 1): 20.0, ("plain", 1): 8.0, ("tls", BATCH): 250.0, ("plain", BATCH): 110.0}


@dataclass(frozen=True)
class _Steps:
    """Steps of so many positions, batch 1: at LLaVA's width 169 move 2.77 MB in fp16, 676 move 11.1 MB."""

    positions: int
    bar_ms: float
    rounds: int


STEPS = {
    "toy": (_Steps(13, 20.0, 3), _Steps(52, 60.0, 3)),
    "real": (_Steps(169, 20.0, 100), _Steps(676, 60.0, 60)),
}


def cases(size: Size) -> Iterator[Case]:
    """Round trips, echoes beside their floor, steps beside local ones, then bytes. Times have bars at real size."""
    shapes = SHAPES[size]
    model = llava(shapes)
    with served(shapes) as endpoints:
        for endpoint in endpoints.values():
            yield _empty(endpoint, size)
        for samples, rounds in ((1, 60), (BATCH, 16)):
            for endpoint in endpoints.values():
                yield _echo(endpoint, samples, shapes, size, rounds if size == "real" else 3)
            yield _codec_alone(samples, shapes, rounds if size == "real" else 3)
        for steps in STEPS[size]:
            for endpoint in endpoints.values():
                yield _overhead(endpoint, LocalLLM(model), steps, shapes, size)
        yield from traffic.figures(endpoints["plain"], shapes, model, size)


def _empty(endpoint: Endpoint, size: Size) -> Case:
    """A frame without tensors there and back."""
    with endpoint.session() as session, closing(endpoint.bare()) as bare:
        runs = {"link": lambda: session.ask(EchoRequest({})), "floor": lambda: bare.echo([b"0"])}
        seconds = in_turn(runs, EMPTY_ROUNDS[size])
    bar = EMPTY_BAR_MS.get(endpoint.name) if size == "real" else None
    return _beside_floor(f"empty round trip, {endpoint.name}", seconds, bar)


def _echo(endpoint: Endpoint, samples: int, shapes: Shapes, size: Size, rounds: int) -> Case:
    """The embeddings of some samples in fp16 there and back."""
    whole = torch.randn(samples * shapes.T, shapes.D).half()
    chunks = chunks_of(whole.nbytes)
    with endpoint.session() as session, closing(endpoint.bare()) as bare:
        runs = {"link": lambda: session.ask(EchoRequest({"whole": whole})), "floor": lambda: bare.echo(chunks)}
        seconds = in_turn(runs, rounds)
    bar = ECHO_BARS_MS[endpoint.name, samples] if size == "real" else None
    return _beside_floor(f"{_mb(whole.nbytes)} each way, {endpoint.name}", seconds, bar)


def _beside_floor(case: str, seconds: dict[str, list[float]], bar: float | None) -> Case:
    value, floor = median_ms(seconds["link"]), median_ms(seconds["floor"])
    detail = {"floor": floor, "ratio": value / floor, "median_of": len(seconds["link"])}
    return Case("link", case, value, "ms", bar, detail=detail)


def _codec_alone(samples: int, shapes: Shapes, rounds: int) -> Case:
    """A frame encoded, cut and decoded in this thread: the part of an echo's half that is neither gRPC nor waiting."""
    whole = torch.randn(samples * shapes.T, shapes.D).half()
    frame = EchoRequest({"whole": whole}).to_frame()
    seconds = in_turn({"wire": lambda: wire.decode(iter(wire.encode(frame)), 1 << 30)}, rounds)["wire"]
    return Case(
        "link", f"{_mb(whole.nbytes)} encode and decode", median_ms(seconds), "ms", detail={"median_of": rounds}
    )


def _overhead(endpoint: Endpoint, local: LocalLLM, steps: _Steps, shapes: Shapes, size: Size) -> Case:
    """How much longer a step takes over the link: loss and gradient by the embeddings of one sample."""
    base_BTD = torch.randn(1, steps.positions, shapes.D).half().float()
    mask_BT = torch.ones(1, steps.positions, dtype=torch.bool)
    keep_BA = torch.arange(steps.positions - shapes.A, steps.positions)[None]
    labels_BA = torch.zeros(1, shapes.A, dtype=torch.int64)

    def step(llm: LocalLLM | RemoteLLM) -> None:
        embeds = Embeds.whole(base_BTD.clone().requires_grad_())
        llm.losses([embeds], mask_BT, keep_BA, labels_BA)[0].backward()

    with endpoint.session() as session:
        remote = RemoteLLM(session, encoding="dense", codecs=Codecs(features="fp16", gradients="fp16"))
        seconds = in_turn({"remote": lambda: step(remote), "local": lambda: step(local)}, steps.rounds)
    longer = [remote - local for remote, local in zip(seconds["remote"], seconds["local"], strict=True)]
    moved = _mb(2 * 2 * base_BTD.numel())
    detail = {"local": median_ms(seconds["local"]), "remote": median_ms(seconds["remote"]), "median_of": len(longer)}
    return Case(
        "link",
        f"remote step over local, dense, {moved} moved, {endpoint.name}",
        1e3 * statistics.median(longer),
        "ms",
        steps.bar_ms if size == "real" else None,
        detail=detail,
    )


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.3g} MB"
