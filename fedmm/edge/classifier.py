"""A compact network with a linear head over class names: what clients train where no LLM answers for them.

    logits = head(mean over the map of trunk(image))          averaged over the sets that act

To methods and evaluation it is a model like any other (`fedmm.model.ClassifierModel`). It is trained whole.
Source: MLLM-FL 2024, whose clients train ResNets.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedmm.edge import compact
from fedmm.edge.prepared import Prepared
from fedmm.edge.sets import Edge
from fedmm.types import Batch, Example, State


class Net(nn.Module):
    """Trunk and head; where the server trains a head of its own on what clients tell of theirs, that one too.

    Then `retrained` answers, and `gradients` carry each class's gradient by it, weight and bias side by side (CReFF).
    """

    def __init__(self, plan: compact.Plan, classes: int, retrained: bool) -> None:
        super().__init__()
        self.trunk, self.head = compact.trunk(plan), nn.Linear(plan.out_width, classes)
        self.retrained = nn.Linear(plan.out_width, classes) if retrained else None
        self.gradients = nn.Parameter(torch.zeros(classes, classes, plan.out_width + 1)) if retrained else None

    def forward(self, pixels_MCHW: Float[Tensor, "M C H W"]) -> Float[Tensor, "M F"]:
        """What a head reads."""
        return self.trunk(compact.channels_last(pixels_MCHW)).mean((2, 3))


class Classifier(Edge):
    """Sets of whole networks, each with its head."""

    def __init__(
        self, plan: compact.Plan, classes: int, *, sets: Sequence[str] = ("shared",), retrained: bool = False
    ) -> None:
        super().__init__()
        self.nets = nn.ModuleDict({name: Net(plan, classes, retrained) for name in sets})

    @property
    def sets(self) -> Sequence[str]:
        return tuple(self.nets)

    def net(self, name: str = "shared") -> Net:
        return cast(Net, self.nets[name])

    def trainable(self, name: str) -> dict[str, nn.Parameter]:
        return dict(self.nets[name].named_parameters())

    def reset(self, generator: torch.Generator, name: str = "shared") -> None:
        """Start one set by `compact.reset`; a retrained head starts as the head."""
        net = self.net(name)
        compact.reset(net, generator)
        if net.retrained is not None:
            net.retrained.load_state_dict(net.head.state_dict())

    def fold(self, state: State, scale: float) -> None:
        if any(name.endswith(".folded") for name in state):
            raise ValueError("rule=stack folds NanoAdapters, a classifier has none; choose another rule")

    def logits(self, batch: Batch, use: Sequence[str]) -> Float[Tensor, "B C"]:
        """The mean over the acting sets."""
        assert batch.pixels is not None, "a classifier takes pixels"
        nets = [self.net(name) for name in use]
        logits = [(net.retrained or net.head)(net(batch.pixels)) for net in nets]
        return torch.stack(logits).mean(0) if len(logits) > 1 else logits[0]


@dataclass(frozen=True)
class Classes:
    """The class names as a tokenizer of one token an answer, and how images become pixels."""

    names: Sequence[str]
    side: int

    def batch_decode(self, tokens_BN: Int[Tensor, "B N"], *, skip_special_tokens: bool = True) -> list[str]:
        """The name each row says."""
        return [self.names[row[0]] for row in tokens_BN.tolist()]

    def prepare(self, examples: Sequence[Example]) -> list[Prepared]:
        """Examples as a classifier reads them. Raises ValueError where one has no single image, or another class."""
        place = {name: i for i, name in enumerate(self.names)}
        items = []
        for i, example in enumerate(examples):
            if len(example.images) != 1:
                raise ValueError(f"{example.id} has {len(example.images)} images, head=classes takes one; set head=llm")
            if example.answer not in place:
                raise ValueError(
                    f"{example.id} is of class {example.answer!r}, which is none of the {len(place)} at the server; "
                    "set classes=[...] to all of them, in one order for everybody"
                )
            items.append(
                Prepared(
                    id=example.id,
                    prompt=torch.zeros(1, dtype=torch.int32),
                    image=torch.ones(1, dtype=torch.bool),
                    answer=torch.tensor([place[example.answer]], dtype=torch.int32),
                    truth=example.answer,
                    content="",  # names features in a cache, of which there are none
                    pixels=functools.partial(_pixels, examples, i, self.side),
                )
            )
        return items


def _pixels(examples: Sequence[Example], i: int, side: int) -> Tensor:
    return compact.pixels(examples[i].images, side)
