"""CReFF's client: plain training of a classifier, and what the server needs to train a head of its own on.

    g_c = mean over the client's images of class c of d CE / d (retrained head)  =  (p - e_c) [h, 1]^T

h is what the received trunk makes of an image, p what the retrained head says to it. No image leaves, but a gradient of
each class does, and tells which classes the client has. Without them there is nothing for a class that it lacks.
Source: Shang et al. 2022 (CReFF), section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedmm.adapters.schema import Schema
from fedmm.aggregate.creff import Retrained
from fedmm.bounds import Mistake
from fedmm.edge.classifier import Classifier
from fedmm.edge.prepare import collate
from fedmm.edge.prepared import Prepared
from fedmm.losses import answer_cross_entropy
from fedmm.model import Model
from fedmm.types import Batch, State, Step

BATCH = 64


def schema(round: int, rounds: int) -> Schema:
    """Trunk and head are trained; the retrained head is the server's, and the gradients are written, not trained."""
    return Schema(("shared.trunk.*", "shared.head.*"), ("shared.*",))


@torch.no_grad()
def tell(model: Model, items: Sequence[Prepared]) -> State:
    """Write each class's gradient where it travels, before anything is trained; zero for a class without an image."""
    assert isinstance(model.edge, Classifier)
    net = model.edge.net()
    assert net.retrained is not None and net.gradients is not None, "method.retrained=true goes with it"
    sums = torch.zeros_like(net.gradients)
    counts = torch.zeros(len(sums))
    for start in range(0, len(items), BATCH):
        batch = collate(items[start : start + BATCH])
        assert batch.pixels is not None
        h_BW = net(batch.pixels)
        labels_B = batch.labels_BA[:, 0].long()
        off_BC = net.retrained(h_BW).softmax(-1) - torch.nn.functional.one_hot(labels_B, len(sums))
        wide_BW1 = torch.cat([h_BW, h_BW.new_ones(len(h_BW), 1)], dim=1)
        sums.index_add_(0, labels_B, off_BC[:, :, None] * wide_BW1[:, None, :])
        counts += torch.bincount(labels_B, minlength=len(sums))
    net.gradients.copy_(sums / counts.clamp(min=1)[:, None, None])
    return {}


def creff(model: Model, batch: Batch, step: Step) -> Iterator[Tensor]:
    """Cross-entropy of the head that is averaged; the retrained one is left alone."""
    assert isinstance(model.edge, Classifier) and batch.pixels is not None
    net = model.edge.net()
    yield answer_cross_entropy(net.head(net(batch.pixels))[:, None], batch.labels_BA)


def check(sets: Sequence[str], merges: object) -> Iterator[Mistake]:
    """The second head needs the rule that trains it."""
    if merges != Retrained:
        yield Mistake("rule", "method.retrained answers by a head that rule=creff alone trains; set rule=creff")
