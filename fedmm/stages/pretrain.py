"""MLLM-FL's first stage: a compact encoder learns to see for the frozen LLM, from what a large one shows it.

    z = (1 - w_t) teacher(x) + w_t compact(x)
    loss = text CE(text | z) + mean ((compact(x) - teacher(x)) / spread)^2

w_t goes from 0 to 1: at first the LLM sees what the teacher sees and the compact encoder only bends it, at last the
compact one stands alone. Only its weights move. The text is what an MLLM wrote about open images.
Source: MLLM-FL 2024 (arXiv 2409.06067), dynamic weighted pretraining; the shape of w_t is not known to us, and the
second term is ours. On the embedded model, open digits read after 1,000 steps: 60% by the second term alone, 65% by
both at text = 0.05, 34% at 0.3; the first alone stayed at chance (10%) in 600 steps. The teacher reads 73%.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from fedmm import seeds
from fedmm.bounds import Count, Ge, NotNegative
from fedmm.edge.compact import Compact
from fedmm.edge.prepare import collate
from fedmm.edge.prepared import Prepared
from fedmm.model import Model
from fedmm.train import rate_share
from fedmm.types import State

FIRST = 256  # looks from which mean and spread of the teacher's features are taken
Schedule = Literal["linear", "cosine"]


class Notes(Protocol):
    """Where a long stage leaves how far it is: a killed one goes on from the last note."""

    def read(self) -> tuple[int, State] | None: ...

    def write(self, step: int, loss: float, state: State) -> None: ...


@dataclass(frozen=True)
class Look:
    """An image and its text twice: as the teacher's model reads it, and its pixels as the compact encoder does."""

    item: Prepared
    pixels: Callable[[], Float[Tensor, "I 3 H H"]]


def weight(schedule: Schedule, step: int, steps: int, ramp: float) -> float:
    """w_t at `step` of `steps`, from 1: it rises over the first `ramp` of them, and is 1 from there."""
    place = min(1.0, step / max(1.0, ramp * steps))
    return place if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * place))


def blend(teacher_MPE: Float[Tensor, "M P E"], compact_MPE: Float[Tensor, "M P E"], w: float) -> Float[Tensor, "M P E"]:
    """The teacher's features at w = 0 and the compact encoder's at w = 1, each to the bit."""
    return (1 - w) * teacher_MPE + w * compact_MPE


def losses(
    model: Model, compact: Compact, looks: Sequence[Look], w: float, texts: int
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Cross-entropy of the first `texts` texts, seen through the blend, and the distance of all features from the
    teacher's; `model` has no adapters in use."""
    teacher_MPE = _teacher(looks)
    compact_MPE = compact.features(torch.cat([look.pixels() for look in looks]))
    distance = ((compact_MPE - teacher_MPE) / compact.spread).pow(2).mean()
    if not texts:
        return compact_MPE.new_zeros(()), distance
    batch = collate([look.item for look in looks[:texts]])
    M = len(batch.features_MPE) if batch.features_MPE is not None else 0
    blended_MPE = blend(teacher_MPE[:M], compact_MPE[:M], w)
    return model.answer_loss(replace(batch, features_MPE=blended_MPE, keys=None), ()), distance


# parameters: each after * is a setting of conf/pretrain/; those before are what a stage is given
def pretrain(
    compact: Compact,
    model: Model,
    looks: Sequence[Look],
    notes: Notes,
    seed: int,
    *,
    steps: Count = 1500,
    batch_size: Count = 64,
    texts: Annotated[int, Ge(0)] = 16,
    lr: NotNegative = 4e-3,
    text: NotNegative = 0.05,
    schedule: Schedule = "linear",
    ramp: float = 1.0,
    note_every: Count = 100,
) -> list[float]:
    """Train `compact` where it stands; the losses of the steps that were taken here. The last one is always noted.

    Of a step's images `texts` pass the LLM, which is most of the time. AdamW, its rate on a half cosine. A step's batch
    is a function of (seed, step), so a run that was killed and goes on from its last note ends with the same bits.
    Raises ValueError when the loss is not finite.
    """
    optimizer = torch.optim.AdamW(compact.parameters(), lr=lr)
    done = 0
    if found := notes.read():
        done, state = found
        _restore(compact, optimizer, state)
    else:
        compact.fit(_teacher(looks[:FIRST]))
    taken: list[float] = []
    for step in range(done + 1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * rate_share("cosine", step, steps)
        picks = torch.randint(len(looks), (batch_size,), generator=seeds.generator(seed, "pretrain", step)).tolist()
        w = weight(schedule, step, steps, ramp)
        said, distance = losses(model, compact, [looks[i] for i in picks], w, texts if text else 0)
        loss = text * said + distance
        if not torch.isfinite(loss):
            raise ValueError(f"pretraining diverged at step {step}: the loss is {loss.item()}; lower pretrain.step.lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(compact.parameters(), 1.0)
        optimizer.step()
        taken.append(loss.item())
        if step % note_every == 0 or step == steps:
            notes.write(step, loss.item(), _noted(compact, optimizer))
    return taken


def _teacher(looks: Sequence[Look]) -> Float[Tensor, "M P E"]:
    """The large encoder's features, which the items' cached encoder gives."""
    features_MPE = collate([look.item for look in looks], answers=False).features_MPE
    assert features_MPE is not None, "a look has an image and an encoder"
    return features_MPE


def _noted(compact: Compact, optimizer: torch.optim.Optimizer) -> State:
    noted: State = {f"compact/{name}": tensor for name, tensor in compact.state_dict().items()}
    for i, own in optimizer.state_dict()["state"].items():
        noted |= {f"optimizer/{i}/{key}": torch.as_tensor(value) for key, value in own.items()}
    return noted


def _restore(compact: Compact, optimizer: torch.optim.Optimizer, noted: State) -> None:
    compact.load_state_dict({n.removeprefix("compact/"): t for n, t in noted.items() if n.startswith("compact/")})
    whole = optimizer.state_dict()
    for name, tensor in noted.items():
        if name.startswith("optimizer/"):
            _, i, key = name.split("/")
            whole["state"].setdefault(int(i), {})[key] = tensor
    optimizer.load_state_dict(whole)
