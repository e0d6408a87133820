"""FedDAT's local step: a shared adapter and a dual adapter teacher learn from the answers and from each other.

    z_dat = f(A_c, A_f)      z_s = f(A_s)            both from the same weights, in one call
    step A_s on  CE(z_s)   + alpha T^2 KL(softmax(sg z_dat / T) || softmax(z_s / T))
    step A_c on  CE(z_dat) + beta  T^2 KL(softmax(sg z_s / T)   || softmax(z_dat / T))

A_s is averaged; A_c never leaves the client; A_f is A_s as it arrived. The teacher's two act with weight 1/2 each.
Source: Chen et al. 2024 (FedDAT, arXiv 2308.12305). The released code fixes alpha = beta = 1 and T = 3 and halves both
sums (`share: 0.5`); that the paper ramps alpha and beta up is followed by `ramp`, whose shape is ours: linear.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

from torch import Tensor

from fedmm.bounds import Ge, Mistake, NotNegative
from fedmm.losses import Mutual
from fedmm.model import Model
from fedmm.types import Batch, Step


# parameters: each after * is a setting of conf/method/feddat.yaml
def feddat(
    model: Model,
    batch: Batch,
    step: Step,
    *,
    alpha: NotNegative = 1.0,
    beta: NotNegative = 1.0,
    temperature: Annotated[float, Ge(0.01)] = 3.0,
    ramp: NotNegative = 0.0,
    share: NotNegative = 1.0,
    teacher: Sequence[str] = ("local", "frozen"),
    student: Sequence[str] = ("shared",),
) -> Iterator[Tensor]:
    """The student's loss, then the teacher's. `ramp` is the share of the run in which alpha and beta rise from 0."""
    rise = min(1.0, progress(step) / ramp) if ramp else 1.0
    mutual = Mutual((rise * beta, rise * alpha), temperature)
    of_teacher, of_student = model.losses(batch, (teacher, student), mutual)
    yield share * of_student
    yield share * of_teacher


def check(sets: Sequence[str], merges: object, *, teacher: Sequence[str], student: Sequence[str]) -> Iterator[Mistake]:
    """What the first branch trains must not be in the second one's graph."""
    if both := sorted({*teacher} & {*student} - {"frozen"}):
        yield Mistake(
            "method.step.teacher",
            f"method.step.teacher={list(teacher)} and method.step.student={list(student)} both train {both[0]}, which "
            "the first step would change under the second; name it in one of them: local in the one, shared in the "
            "other",
        )


def progress(step: Step) -> float:
    """The share of the run that lies behind, this step included."""
    return (step.round - 1 + step.step / step.steps) / step.rounds
