"""CReFF's server: the mean, and a head trained anew on features that no client sent.

    for each class c: find features f so that the gradient of CE at them is that of the clients' own images
    then train a head on as many features of each class

The features are matched at the head that the clients were given, by the cosine of each row of the gradient; the new
head starts as the aggregated one. It answers; the aggregated one goes on being trained and averaged.
Source: Shang et al. 2022 (CReFF), section 4; the numbers are those of its released code as far as we know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fedmm import seeds, tree
from fedmm.aggregate import running
from fedmm.bounds import Count, Ge, Mistake, NotNegative
from fedmm.types import State, Update

GRADIENTS, WEIGHT, BIAS = "gradients", "retrained.weight", "retrained.bias"
Retrained = Annotated[State, "of a rule that trains a classifier's second head"]


# parameters: each after * is a setting of conf/rule/creff.yaml
def creff(
    current: Retrained,
    updates: Iterable[Update],
    memory: State,
    *,
    seed: int = 0,
    weights: running.Weights = "examples",
    per_class: Count = 100,
    match_steps: Annotated[int, Ge(0)] = 100,
    match_lr: NotNegative = 0.1,
    head_steps: Annotated[int, Ge(0)] = 300,
    head_lr: NotNegative = 0.1,
) -> tuple[State, State]:
    """The mean, with `retrained.*` trained on features, which `memory` keeps.

    `gradients` of the state are zero before and after: clients' deltas of it are what they tell, of each class over
    those who have it. A class that nobody has told of keeps its features. Without such tensors it is `mean`.
    """
    if GRADIENTS not in current:
        return tree.moved(current, running.average(current, updates, weights)), memory
    told = _Told(torch.zeros_like(current[GRADIENTS]))
    merged = tree.moved(current, running.average(current, told.seen(updates), weights))
    features_CMW = memory.get("features")
    if features_CMW is None:
        C, _, W1 = current[GRADIENTS].shape
        features_CMW = torch.randn(C, per_class, W1 - 1, generator=seeds.generator(seed, "creff"))
    with torch.enable_grad():
        features_CMW = _matched(current, features_CMW, told.mean(), told.clients > 0, match_steps, match_lr)
        head = _head(merged["head.weight"], merged["head.bias"], features_CMW, head_steps, head_lr)
    merged |= {WEIGHT: head[0], BIAS: head[1], GRADIENTS: torch.zeros_like(current[GRADIENTS])}
    return merged, memory | {"features": features_CMW}


def check(clients: int, adapters: State) -> Iterator[Mistake]:
    """A classifier's clients must tell what the second head is trained on."""
    if "head.weight" in adapters and GRADIENTS not in adapters:
        yield Mistake(
            "rule",
            "rule=creff trains a head from gradients that no client sends; set method=creff, or choose another rule",
        )


class _Told:
    """Sums the clients' class gradients on their way into the mean."""

    def __init__(self, zero_CCW: Tensor) -> None:
        self._sum_CCW, self.clients = zero_CCW, torch.zeros(len(zero_CCW))

    def seen(self, updates: Iterable[Update]) -> Iterator[Update]:
        for update in updates:
            own_CCW = update.delta[GRADIENTS]
            self._sum_CCW = self._sum_CCW + own_CCW
            self.clients = self.clients + own_CCW.flatten(1).any(1)
            yield update

    def mean(self) -> Float[Tensor, "C C W1"]:
        return self._sum_CCW / self.clients.clamp(min=1)[:, None, None]


def _matched(
    current: State,
    features_CMW: Float[Tensor, "C M W"],
    wanted_CCW: Float[Tensor, "C C W1"],
    has_C: Bool[Tensor, " C"],
    steps: int,
    lr: float,
) -> Float[Tensor, "C M W"]:
    """Features whose gradient at the given head is near the wanted one: plain gradient descent, all classes at once."""
    weight_CW, bias_C = current[WEIGHT], current[BIAS]
    off_CC = torch.eye(len(bias_C))
    features = features_CMW.clone().requires_grad_()
    for _ in range(steps):
        p_CMC = (features @ weight_CW.T + bias_C).softmax(-1)
        wide_CMW = torch.cat([features, torch.ones_like(features[:, :, :1])], dim=2)
        found_CCW = (p_CMC - off_CC[:, None]).transpose(1, 2) @ wide_CMW / features.shape[1]
        distance = (1 - F.cosine_similarity(found_CCW, wanted_CCW, dim=2, eps=1e-6)).sum(1)
        (grad,) = torch.autograd.grad(distance[has_C].sum(), features)
        with torch.no_grad():
            features -= lr * grad
    return features.detach()


def _head(
    weight_CW: Tensor, bias_C: Tensor, features_CMW: Float[Tensor, "C M W"], steps: int, lr: float
) -> tuple[Tensor, Tensor]:
    """A head trained on all features at once."""
    parts = [weight_CW.clone().requires_grad_(), bias_C.clone().requires_grad_()]
    C, M, _ = features_CMW.shape
    labels = torch.arange(C).repeat_interleave(M)
    for _ in range(steps):
        loss = F.cross_entropy(F.linear(features_CMW.flatten(0, 1), parts[0], parts[1]), labels)
        grads = torch.autograd.grad(loss, parts)
        with torch.no_grad():
            for part, grad in zip(parts, grads, strict=True):
                part -= lr * grad
    return parts[0].detach(), parts[1].detach()
