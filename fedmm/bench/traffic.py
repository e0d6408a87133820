"""What the link moves: bytes of warm steps and of a whole run, factored against dense, as the session counts them.

A step is warm where the host holds its samples' features. Frames are counted whole, headers included, without what gRPC
and TLS add (below 1%). Steps really run: edge, link and host, with random features in the place of an encoder's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedmm import codecs
from fedmm.bench.common import Case, Size
from fedmm.bench.served import Endpoint, Shapes, batch, edge
from fedmm.codecs import Codec, Codecs
from fedmm.edge import base
from fedmm.edge.nano_edge import NanoEdge
from fedmm.link.remote import RemoteLLM
from fedmm.link.session import Session
from fedmm.losses import Mutual
from fedmm.model import Model, SplitModel
from fedmm.types import Batch

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

RATIO_BARS: dict[tuple[Codec, int], float | None] = {
    ("none", 8): None, ("none", 16): None, ("fp16", 8): 1 / 20, ("fp16", 16): 1 / 30, ("int8", 8): 1 / 40,
    ("int8", 16): 1 / 60,
}  # fmt: skip
RUN_BATCH, RUN_BATCHES, RUN_EPOCHS = 16, 400, 10  # 6,400 samples, 64,000 sample-steps
RUN_BARS_GB: dict[tuple[Codec, int], float] = {("fp16", RUN_BATCH): 30.0, ("int8", RUN_BATCH): 15.0}
PARTS = 100  # one of them really runs, to hold the arithmetic against


@dataclass(frozen=True)
class Way:
    """How a step goes over the link: its codec and encoding, which sets act in each branch, where losses are."""

    codec: Codec = "none"
    encoding: str = "factored"
    uses: tuple[tuple[str, ...], ...] = (("shared",),)
    mutual: Mutual | None = None
    loss_at: str = "auto"

    def model(self, one: NanoEdge, session: Session) -> Model:
        codecs = Codecs(self.codec, self.codec, self.codec, self.codec)
        return SplitModel(one, RemoteLLM(session, encoding=self.encoding, codecs=codecs), self.loss_at)

    def step(self, model: Model, given: Batch) -> tuple[Tensor, ...]:
        losses = model.losses(given, self.uses, self.mutual)
        for loss in losses:
            loss.backward()
        return losses


FEDDAT = Way("fp16", uses=(("local", "frozen"), ("shared",)), mutual=Mutual((1.0, 1.0), 3.0))


@dataclass(frozen=True)
class Frames:
    """Bytes of one batch: of a warm step, and of what brings its features to the host before the first."""

    step: int
    fill: int

    def total(self, batches: int, epochs: int) -> int:
        return batches * (self.fill + epochs * self.step)


def figures(endpoint: Endpoint, shapes: Shapes, model: LlavaForConditionalGeneration, size: Size) -> Iterator[Case]:
    """Equal gradients, ratios of warm steps, a whole run, FedDAT's step. Ratios and totals have bars at real size."""
    one = edge(shapes, model)
    yield _equal_gradients(endpoint, shapes, one)
    dense = {
        (codec, B): frames(endpoint, shapes, one, B, Way(codec, "dense")) for codec in ("none", "fp16") for B in (8, 16)
    }
    for (codec, B), bar in RATIO_BARS.items():
        against = "none" if codec == "none" else "fp16"
        found = frames(endpoint, shapes, one, B, Way(codec))
        yield _ratio(f"warm step, {codec} over dense {against}, batch {B}", found, dense[against, B], bar, size)
        if (codec, B) in RUN_BARS_GB:
            yield from _whole_run(endpoint, shapes, one, codec, found, dense[against, B], size)
    triple = edge(shapes, model, ("shared", "local", "frozen"))
    found = frames(endpoint, shapes, triple, 8, FEDDAT)
    with_logits = frames(endpoint, shapes, triple, 8, replace(FEDDAT, encoding="dense", loss_at="client"))
    yield _ratio("FedDAT's step, losses at the host over dense with logits, batch 8", found, with_logits, 1 / 15, size)


def frames(endpoint: Endpoint, shapes: Shapes, one: NanoEdge, B: int, way: Way) -> Frames:
    """Two steps on a batch: the second is warm, what the first has more is the filling."""
    given = batch(shapes, range(1000 * B, 1001 * B), way.codec)  # samples of its own: nobody sent them before
    with endpoint.session() as session:
        model = way.model(one, session)
        way.step(model, given)
        first = _moved(session)
        way.step(model, given)
    second = _moved(session) - first
    return Frames(second, first - second)


def _equal_gradients(endpoint: Endpoint, shapes: Shapes, one: NanoEdge) -> Case:
    """1 where loss and every gradient of a factored step have the bits of the dense one, in fp32, else 0."""
    given, found = batch(shapes, range(8)), []
    with endpoint.session() as session:
        for way in (Way(), Way(encoding="dense")):
            (loss,) = way.step(way.model(one, session), given)
            found.append([loss, *(parameter.grad for parameter in one.trainable("shared").values())])
            one.zero_grad()
    equal = all(map(torch.equal, *found))
    return Case("link", "factored and dense gradients have the same bits", int(equal), "bool", 1, at_least=True)


def _ratio(case: str, found: Frames, dense: Frames, bar: float | None, size: Size) -> Case:
    value = found.step / dense.step
    detail = {"times_less": 1 / value, "step_bytes": found.step, "dense_bytes": dense.step}
    return Case("link", case, value, "of dense", bar if size == "real" else None, detail=detail)


def _whole_run(
    endpoint: Endpoint, shapes: Shapes, one: NanoEdge, codec: Codec, found: Frames, dense: Frames, size: Size
) -> Iterator[Case]:
    """All bytes of ten epochs by arithmetic, filling included; a hundredth that ran; and what B takes of a step."""
    total, whole = found.total(RUN_BATCHES, RUN_EPOCHS), dense.total(RUN_BATCHES, RUN_EPOCHS)
    bar = RUN_BARS_GB[codec, RUN_BATCH] if size == "real" else None
    steps = RUN_BATCHES * RUN_EPOCHS * RUN_BATCH
    yield Case("link", f"{steps} sample-steps, {codec}", total / 1e9, "GB", bar, detail={"dense": whole / 1e9})

    measured = _run(endpoint, shapes, one, Way(codec), RUN_BATCHES // PARTS)
    counted = found.total(RUN_BATCHES // PARTS, RUN_EPOCHS)
    detail = {"measured_bytes": measured, "counted_bytes": counted}
    off = abs(counted / measured - 1)
    yield Case("link", f"arithmetic off a measured hundredth, {codec}", off, "of it", 0.01, detail=detail)

    up_DR = torch.zeros(shapes.D, shapes.R)
    sent = sum(part.nbytes for part in codecs.pack(up_DR, codec).values())
    share = 2 * len(base.KINDS) * sent / found.step
    yield Case("link", f"what B and its gradient take of a warm step, {codec}", share, "of it")


def _run(endpoint: Endpoint, shapes: Shapes, one: NanoEdge, way: Way, batches: int) -> int:
    """Every byte of all epochs over so many batches."""
    given = [batch(shapes, range(i * RUN_BATCH, (i + 1) * RUN_BATCH), way.codec) for i in range(batches)]
    with endpoint.session() as session:
        model = way.model(one, session)
        for _ in range(RUN_EPOCHS):
            for each in given:
                way.step(model, each)
    return _moved(session)


def _moved(session: Session) -> int:
    return sum(session.sent_bytes.values()) + sum(session.received_bytes.values())
