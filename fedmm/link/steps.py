"""What a step is made of on its way to the LLM: embeddings whole, or what the host forms them from.

`remote` makes one from embeddings, `requests` makes embeddings from one. Both name the tensors that have gradients by
`inputs`, and in no other way.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from fedmm.edge.base import KEY_BYTES, KINDS, positions
from fedmm.link.fields import (
    ANY,
    LIST_LIMIT,
    Entries,
    Many,
    One,
    Place,
    Sizes,
    integer,
    listed,
    number,
    numbers,
    places,
    taken,
    written,
)
from fedmm.link.wire import Frame
from fedmm.types import State, TokenTerm

RANK_LIMIT = 64  # or the LLM's width, beyond which a term is no shorter than what it stands for
FEATURES = One("features", "I P E", codec="features")
_IMAGE = One("image_part", "N D", codec="features")
_MASK = One("mask", "B T", torch.bool)
_BRANCHES = "branches"


@dataclass(frozen=True)
class DenseStep:
    """The embeddings of each branch."""

    mask_BT: Annotated[Tensor, _MASK]
    whole: Annotated[tuple[Tensor, ...], Many(One("whole", "B T D", codec="features"), key=_BRANCHES)]

    def inputs(self) -> dict[str, Tensor]:
        """The tensors that gradients may be wanted by."""
        return places(DenseStep)["whole"].write(self.whole)[1]

    def by_branch(self) -> list[list[str]]:
        """The inputs that each branch uses."""
        return [[name] for name in self.inputs()]

    def with_inputs(self, inputs: Mapping[str, Tensor]) -> DenseStep:
        """This step with other tensors in the place of its inputs, in the same order."""
        return replace(self, whole=tuple(inputs.values()))

    def summed(self) -> dict[str, str]:
        """The inputs whose gradients an optimiser sums over steps, with the adapter that each belongs to."""
        return {}


@dataclass(frozen=True)
class Term:
    """A low-rank term `scale h up^T` at the positions of one kind, image or text; `name` is its adapter's."""

    kind: str
    scale: float
    name: str
    h_NR: Tensor
    up_DR: Tensor


class Terms(Place):
    """The terms of each branch. `terms` has kind, scale and name of each, `branches` the count of each branch."""

    h, up = One("h", "N R", codec="h"), One("up", "D R", codec="h")
    keys = ("terms", _BRANCHES)
    tensors = (h.at("i"), up.at("i"))

    def write(self, value: Sequence[Sequence[Term]]) -> Entries:
        terms = list(itertools.chain.from_iterable(value))
        tensors: State = {}
        for i, term in enumerate(terms):
            tensors |= {self.h.at(i).name: term.h_NR, self.up.at(i).name: term.up_DR}
        texts = [[term.kind, term.scale, term.name] for term in terms]
        return dict(zip(self.keys, (texts, [len(few) for few in value]), strict=True)), tensors

    def read(self, frame: Frame, sizes: Sizes) -> tuple[tuple[Term, ...], ...]:
        texts, counts = (listed(frame.meta, key) for key in self.keys)
        terms = iter([self._term(frame, sizes, i, text) for i, text in enumerate(texts)])
        if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != len(texts):
            raise ValueError(f"branches share out {len(texts)} terms, got {str(counts)[:100]}")
        return tuple(tuple(itertools.islice(terms, count)) for count in counts)

    def _term(self, frame: Frame, sizes: Sizes, i: int, text: Any) -> Term:
        kind, scale, name = text if isinstance(text, list) and len(text) == 3 else ("", 0.0, "")
        if kind not in KINDS or not number(scale) or not isinstance(name, str) or len(name) > 128:
            raise ValueError(f"a term is a list of part ({' or '.join(KINDS)}), scale and name, got {str(text)[:100]}")
        sizes = {"D": sizes["D"], "N": sizes[kind]}
        up_DR = self.up.at(i).read(frame, sizes)
        _check_rank(sizes)
        return Term(kind, float(scale), name, self.h.at(i).read(frame, sizes), up_DR)


@dataclass(frozen=True)
class FactoredStep:
    """What the host forms embeddings from. Exactly one of `keys_SK`, `features` and `image_ND` gives the images.

    `keys_SK` name features that the host holds, for each of the S samples with images. `image_ND` are image positions
    behind the connector, where something trains in front of the LLM.
    """

    mask_BT: Annotated[Tensor, _MASK]
    tokens_BT: Annotated[Tensor, One("tokens", "B T", torch.int32, below="V")]
    image_BT: Annotated[Tensor, One("image", "B T", torch.bool)]
    keys_SK: Annotated[Tensor | None, One("keys", f"S {KEY_BYTES}", ANY)] = None
    features: Annotated[tuple[Tensor, ...], Many(FEATURES, per="S")] = ()
    image_ND: Annotated[Tensor | None, _IMAGE] = None
    branches: Annotated[tuple[tuple[Term, ...], ...], Terms()] = field(kw_only=True)

    def inputs(self) -> dict[str, Tensor]:
        inputs = {} if self.image_ND is None else {_IMAGE.name: self.image_ND}
        for i, term in enumerate(itertools.chain.from_iterable(self.branches)):
            inputs |= {Terms.up.at(i).name: term.up_DR, Terms.h.at(i).name: term.h_NR}
        return inputs

    def by_branch(self) -> list[list[str]]:
        names = iter(self.inputs())
        first = [] if self.image_ND is None else [next(names)]
        return [[*first, *itertools.islice(names, 2 * len(terms))] for terms in self.branches]

    def with_inputs(self, inputs: Mapping[str, Tensor]) -> FactoredStep:
        values = iter(inputs.values())
        image_ND = None if self.image_ND is None else next(values)
        branches = [[replace(t, up_DR=next(values), h_NR=next(values)) for t in terms] for terms in self.branches]
        return replace(self, image_ND=image_ND, branches=tuple(map(tuple, branches)))

    def summed(self) -> dict[str, str]:
        terms = enumerate(itertools.chain.from_iterable(self.branches))
        return {Terms.up.at(i).name: term.name for i, term in terms if term.name}


Step = DenseStep | FactoredStep


class StepPlace(Place):
    """A step in either encoding."""

    def write(self, value: Step) -> Entries:
        return written(value)

    def read(self, frame: Frame, sizes: Sizes) -> Step:
        if not _factored(frame):
            return DenseStep(**taken(DenseStep, frame, sizes))
        grid = taken(FactoredStep, frame, sizes, "mask_BT", "tokens_BT", "image_BT")
        image_N, text_N = positions(grid["image_BT"], grid["mask_BT"])
        sizes |= {"image": len(image_N), "text": len(text_N), "N": len(image_N)}
        sizes["S"] = int(grid["image_BT"].any(1).sum())
        images = taken(FactoredStep, frame, sizes, "image_ND") or taken(FactoredStep, frame, sizes, "keys_SK")
        if not images:
            images = {"features": Many(FEATURES, per="S").read(frame, sizes)}
        return FactoredStep(**grid, **images, **taken(FactoredStep, frame, sizes, "branches"))


class TokenTerms(Place):
    """The text adapters that a generated token passes, with the scale of each in the header."""

    down, up = One("token_down", "R D", codec="h"), One("token_up", "D R", codec="h")
    keys = ("scales",)
    tensors = (down.at("i"), up.at("i"))

    def write(self, value: Sequence[TokenTerm]) -> Entries:
        tensors: State = {}
        for i, term in enumerate(value):
            tensors |= {self.down.at(i).name: term.down_RD, self.up.at(i).name: term.up_DR}
        return {self.keys[0]: [term.scale for term in value]}, tensors

    def read(self, frame: Frame, sizes: Sizes) -> tuple[TokenTerm, ...]:
        scales = enumerate(numbers(frame.meta, self.keys[0]))
        return tuple(self._term(frame, {"D": sizes["D"]}, i, scale) for i, scale in scales)

    def _term(self, frame: Frame, sizes: Sizes, i: int, scale: float) -> TokenTerm:
        down_RD = self.down.at(i).read(frame, sizes)
        _check_rank(sizes)
        return TokenTerm(down_RD, self.up.at(i).read(frame, sizes), scale)


def _check_rank(sizes: Sizes) -> None:
    if sizes["R"] > max(RANK_LIMIT, sizes["D"]):
        raise ValueError(f"a term of rank {sizes['R']}, at most {max(RANK_LIMIT, sizes['D'])}; lower edge.rank")


def _factored(frame: Frame) -> bool:
    return Terms.keys[0] in frame.meta


def grid(frame: Frame) -> tuple[Tensor, int]:
    """The mask of a frame's step and how many branches it has, which can be told before its tensors are unpacked."""
    mask_BT = _MASK.read(frame, {})
    count = len(listed(frame.meta, _BRANCHES)) if _factored(frame) else integer(frame.meta, _BRANCHES)
    if not 1 <= count <= LIST_LIMIT:
        raise ValueError(f"a step has from 1 to {LIST_LIMIT} branches, got {count}")
    return mask_BT, count
