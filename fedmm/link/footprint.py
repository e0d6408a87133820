"""What a step takes of memory at its peak: known before anything is allocated for it.

    bytes = overhead (fixed + rows (a T + b T^2) + embeddings + logits + what the frame holds)

`fixed`, `a` and `b` come from small passes on the LLM that is served, measured once at the host's start: with
gradients, as a training step runs, and with a cache, as generation runs. Embeddings and logits are counted. The
estimate is made to be above the truth: padding counts, and so does the cache of a pass that keeps none.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fedmm.llm.local import LocalLLM
from fedmm.peak import peak_bytes
from fedmm.storage import memory
from fedmm.types import Embeds

POSITIONS = (16, 32, 64)  # of the passes that are measured; no kernel that we know of changes its kind beyond
EMBEDDINGS = 8  # copies in fp32 of a row's embeddings: connector, parts, terms, their sum and its gradient
SENT = 3  # copies in fp32 of what the frame holds: as unpacked, its gradient, and that one on its way back
LOGITS = 6  # of a row's logits: as the head gives them, in fp32, their log-softmax, and the gradients of these
PAIR = 6  # of a row's logits where one branch learns from another
DECODED = 32  # positions that one generated token costs at least: a pass reads every weight, however few its rows
HEAP = 1.6  # what a process takes on a CPU over what its tensors do: glibc's heap has holes (1.4 and 1.6 measured)
SMALL = 4  # times smaller than each step under way: the engine runs such a step beside them
SHARE = 0.8  # of the free memory that steps may take; the rest is for frames, features and fragmentation
FRAMES_SHARE = 0.1  # of the free memory that frames in work and pending steps may take
LEAST_BYTES = 256 << 20


@dataclass(frozen=True)
class Shape:
    """The size of a step: rows over all its branches, padded positions of each, and answer positions with logits.

    `pairs` are rows of branches that learn from another branch, once for each other one; `tokens` are to be generated;
    `sent` are the numbers in the tensors of its frame.
    """

    rows: int
    positions: int
    answers: int = 1
    pairs: int = 0
    tokens: int = 0
    grad: bool = False
    sent: int = 0

    @property
    def work(self) -> int:
        """What the step costs in time, in positions that go through the LLM once."""
        passes = 2 if self.grad else 1
        return passes * self.rows * self.positions + self.tokens * max(self.rows, DECODED)

    def beside(self, other: Shape) -> Shape:
        """Both as one batch."""
        return Shape(
            self.rows + other.rows,
            max(self.positions, other.positions),
            max(self.answers, other.answers),
            self.pairs + other.pairs,
            sent=self.sent + other.sent,
            grad=self.grad or other.grad,
        )


@dataclass(frozen=True)
class Curve:
    """Peak bytes of a pass as a function of its rows and positions."""

    fixed: float
    linear: float
    square: float

    def bytes(self, rows: int, positions: int) -> float:
        return self.fixed + rows * (self.linear * positions + self.square * positions**2)

    @staticmethod
    def above(peaks: dict[int, int]) -> Curve:
        """The curve through the peaks of one row by positions, or above them where they lie on none."""
        points = sorted(peaks.items())
        slopes = [((y - y0) / (x - x0), x + x0) for (x0, y0), (x, y) in pairwise(points)]
        bends = [(b - a) / (x - x0) for (a, x0), (b, x) in pairwise(slopes)]
        square = max([0.0, *bends])
        linear = max([0.0, *(slope - square * ends for slope, ends in slopes)])
        fixed = max([0.0, *(y - linear * x - square * x * x for x, y in points)])
        return Curve(fixed, linear, square)


@dataclass(frozen=True)
class Footprint:
    """The memory of steps on one LLM, and the most that one of them may take."""

    training: Curve
    answering: Curve
    width: int
    vocabulary: int
    limit_bytes: int
    overhead: float = 1.0  # of the process over its tensors

    @staticmethod
    def measured(llm: LocalLLM, limit_bytes: int) -> Footprint:
        """Measure the LLM with a few small passes."""
        lengths = sorted({max(1, min(T, llm.positions * T // POSITIONS[-1])) for T in POSITIONS})
        _train(llm, lengths[-1])  # the first pass also makes what stays: workspaces, kernels
        training = {T: peak_bytes(llm.device, lambda T=T: _train(llm, T)) for T in lengths}  # type: ignore[misc]
        answering = {T: peak_bytes(llm.device, lambda T=T: _answer(llm, T)) for T in lengths}  # type: ignore[misc]
        overhead = HEAP if llm.device.type == "cpu" else 1.0
        return Footprint(
            Curve.above(training), Curve.above(answering), llm.width, llm.vocabulary, limit_bytes, overhead
        )

    def bytes(self, shape: Shape) -> int:
        """The estimate of a step's peak, beside the weights."""
        curve = self.training if shape.grad else self.answering
        positions = shape.positions + shape.tokens
        embeddings = EMBEDDINGS * shape.rows * shape.positions * self.width
        logits = shape.answers * self.vocabulary * (LOGITS * shape.rows + PAIR * shape.pairs)
        numbers = embeddings + logits + SENT * shape.sent
        return round(self.overhead * (curve.bytes(shape.rows, positions) + 4 * numbers))

    def fits(self, shape: Shape, share: float = 1.0) -> bool:
        """Whether a step takes no more than it may, or than this share of it."""
        return self.bytes(shape) <= share * self.limit_bytes

    def check(self, shape: Shape) -> None:
        """Raises ValueError where a step of this size takes more than it may."""
        if not self.fits(shape):
            raise ValueError(
                f"a step of {shape.rows} rows with {shape.positions + shape.tokens} positions takes about "
                f"{self.bytes(shape) / 2**20:.0f} MB of the host's memory, at most {self.limit_bytes / 2**20:.0f}; "
                "lower batch_size at the client, or raise link.step_memory_mb at the host "
                "(llm.checkpointing=true makes training steps smaller)"
            )


def default_limit_bytes(device: torch.device, workers: int, graph_bytes: int) -> int:
    """What one step may take where `workers` run at once: its share of the memory that is free now, less kept graphs.

    A fixed number would be above what a small machine has, or below what LLaVA-1.5-7B needs. Beside several workers the
    engine runs one small step more.
    """
    free = _free_bytes(device)
    passes = workers + (1 / SMALL if workers > 1 else 0)
    return max(LEAST_BYTES, int(SHARE * (free - graph_bytes) / passes))


def default_frames_bytes(device: torch.device) -> int:
    """What frames and pending steps of all sessions may take; logits of pending steps lie on the device."""
    return int(FRAMES_SHARE * min(_free_bytes(device), memory.free_bytes()))


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory.free_bytes()


def _inputs(llm: LocalLLM, T: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, a mask with padding, which costs more than one without, and one answer position."""
    mask_BT = (torch.arange(T) < max(1, T - 1))[None]
    return torch.full((1, T, llm.width), 0.01, device=llm.device), mask_BT, torch.zeros(1, 1, dtype=torch.int64)


def _train(llm: LocalLLM, T: int) -> None:
    embeds_BTD, mask_BT, keep_BA = _inputs(llm, T)
    with torch.enable_grad():
        logits_BAV = llm(Embeds.whole(embeds_BTD.requires_grad_()), mask_BT, keep_BA)
        torch.autograd.grad(logits_BAV.sum(), embeds_BTD)


def _answer(llm: LocalLLM, T: int) -> None:
    embeds_BTD, mask_BT, _ = _inputs(llm, T)
    llm.generate(Embeds.whole(embeds_BTD), mask_BT, [], 1)
