"""What a client sent, checked before it touches the LLM: integers, tensors, and the embeddings of a step.

A step comes in one of two encodings. Names of tensors, per branch or term i:

    dense      whole.i (B T D)
    factored   tokens, image (B T); keys (S 16) or features.s (I P E) or image_part (N D); h.i (N R), up.i (D R)
               s counts the samples with images

The host has the connector and the token table, which a factored step lacks. So it forms the same sums of the same
numbers in the same order as the client would. Everything wrong is a ValueError that says what came and what is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedmm import codecs
from fedmm.edge import base
from fedmm.edge.folding import embed_of
from fedmm.link.features import Features
from fedmm.link.footprint import Footprint, Shape
from fedmm.link.wire import Frame
from fedmm.losses import Mutual
from fedmm.types import IGNORE, Embeds, LowRank, Part, Source, TokenTerm

TERMS_LIMIT = 64  # low-rank terms of a step, over all its branches; FedDAT has six
RANK_LIMIT = 64  # or the LLM's width, beyond which a term is no shorter than what it stands for


@dataclass(frozen=True)
class Read:
    """A step as it came: branches of embeddings over one mask, and the tensors whose gradient is asked for."""

    branches: list[Embeds]
    mask_BT: Tensor
    leaves: dict[str, Tensor]

    def summed(self) -> dict[str, str]:
        """The gradients that an optimiser sums over steps, with the name of what they are by."""
        terms = [term for embeds in self.branches for term in embeds.terms]
        return {f"grad/up.{i}": term.name for i, term in enumerate(terms) if term.name}


@dataclass(frozen=True)
class Reader:
    """Reads steps for one LLM: its width, positions and vocabulary, and the features that clients left at the host.

    `footprint` refuses a step by its size, before anything is made for it.
    """

    width: int
    positions: int
    vocabulary: int
    device: torch.device
    features: Features
    footprint: Footprint
    limit_bytes: int = 1 << 30  # of what a step makes here: what its dense frame could have been

    def step(self, frame: Frame, client: int, *, grad: bool = False, tokens: int = 0) -> Read:
        """The branches of a step; gradients are asked for by name in `grads`.

        With `grad` the host wants some of its own; `tokens` are to be generated.
        """
        mask_BT = tensor(frame.tensors, "mask", (None, None), dtype=torch.bool)
        B, T = mask_BT.shape
        if self.positions < T + tokens:
            generated = f" and {tokens} tokens to generate" if tokens else ""
            wanted = "shorten the questions" + (" or lower evaluate.max_tokens" if tokens else "")
            raise ValueError(f"{T} positions{generated}, the LLM has {self.positions}; {wanted}")
        if not (B and T) or not mask_BT.any(1).all():
            raise ValueError(f"every row needs at least one position, got a mask of {tuple(mask_BT.shape)}")
        by = _names(frame, "grads")
        self.footprint.check(_shape(frame, B, T, grad=grad or bool(by), tokens=tokens))
        tensors = codecs.read(frame.tensors, codecs.named(frame.meta.get("codecs")))
        inputs = _Inputs(tensors, by, self.device)
        branches = (
            self._factored(frame, inputs, mask_BT, client)
            if "terms" in frame.meta
            else self._dense(frame, inputs, B, T)
        )
        if unknown := inputs.wanted - inputs.leaves.keys():
            raise ValueError(f"no gradient by {sorted(unknown)[0]!r}: it is no tensor of this step")
        embed = embed_of(self.features.table)
        return Read([replace(embeds, embed=embed) for embeds in branches], mask_BT, inputs.leaves)

    def _dense(self, frame: Frame, inputs: _Inputs, B: int, T: int) -> list[Embeds]:
        return [Embeds.whole(inputs.take(f"whole.{i}", (B, T, self.width))) for i in range(_branches(frame))]

    def _factored(self, frame: Frame, inputs: _Inputs, mask_BT: Tensor, client: int) -> list[Embeds]:
        shape = tuple(mask_BT.shape)
        tokens_BT = tensor(inputs.tensors, "tokens", shape, dtype=torch.int32)
        within(tokens_BT, "tokens", 0, self.vocabulary)
        image_BT = tensor(inputs.tensors, "image", shape, dtype=torch.bool)
        image_N, text_N = base.positions(image_BT, mask_BT)
        parts = {
            "image": self._image_part(inputs, image_BT, image_N.to(self.device), client),
            "text": self.features.text_part(tokens_BT.to(self.device), text_N.to(self.device)),
        }
        terms = [self._term(inputs, parts, i, given) for i, given in enumerate(_list(frame, "terms"))]
        counts = _list(frame, "branches")
        if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != len(terms):
            raise ValueError(f"branches share out {len(terms)} terms, got {str(counts)[:100]}")
        self._bound("embeddings", len(counts) * mask_BT.numel() * self.width)
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        own = [tuple(terms[end - count : end]) for end, count in zip(ends, counts, strict=True)]
        # whether something trains in front of the LLM is for `Embeds.squares` to know
        source = Source(tokens_BT, image_BT) if "image_part" in inputs.tensors else None
        return [Embeds(shape, tuple(parts.values()), few, source) for few in own]

    def _image_part(self, inputs: _Inputs, image_BT: Tensor, image_N: Tensor, client: int) -> Part:
        if "image_part" in inputs.tensors:
            return Part("image", inputs.take("image_part", (len(image_N), self.width)), image_N)
        seeing = int(image_BT.any(1).sum())  # samples with images
        if "keys" in inputs.tensors:
            keys = tensor(inputs.tensors, "keys", (seeing, base.KEY_BYTES))
            features = self.features.fetch(client, keys, len(image_N))
        else:
            own = (f"features.{i}" for i in range(seeing))
            sent = [tensor(inputs.tensors, n, (None, None, None), floating=True) for n in own]
            features = self.features.joined(sent, len(image_N))
        return self.features.image_part(features.to(self.device), image_N)

    def _term(self, inputs: _Inputs, parts: Mapping[str, Part], i: int, given: Any) -> LowRank:
        kind, scale, name = given if isinstance(given, list) and len(given) == 3 else ("", 0.0, "")
        if kind not in parts or not number(scale) or not isinstance(name, str) or len(name) > 128:
            raise ValueError(f"a term is a list of part ({' or '.join(parts)}), scale and name, got {str(given)[:100]}")
        up_DR = inputs.take(f"up.{i}", (self.width, None))
        if up_DR.shape[1] > max(RANK_LIMIT, self.width):
            raise ValueError(f"a term of rank {up_DR.shape[1]}, at most {max(RANK_LIMIT, self.width)}; lower edge.rank")
        h_NR = inputs.take(f"h.{i}", (len(parts[kind].positions_N), up_DR.shape[1]))
        return LowRank(parts[kind], h_NR, up_DR, float(scale), name)

    def keep(self, frame: Frame, mask_BT: Tensor) -> Tensor:
        """The positions whose logits are asked for."""
        B, T = mask_BT.shape
        keep_BA = tensor(frame.tensors, "keep", (B, None), dtype=torch.int64)
        if not 1 <= keep_BA.shape[1] <= T:
            raise ValueError(f"'keep' names {keep_BA.shape[1]} positions a row, wanted 1 to {T}")
        within(keep_BA, "keep", 0, T)
        self._bound("logits", keep_BA.numel() * self.vocabulary)
        return keep_BA

    def _bound(self, what: str, numbers: int) -> None:
        if 4 * numbers > self.limit_bytes:
            raise ValueError(
                f"{what} of {4 * numbers} bytes, at most {self.limit_bytes}; "
                "lower batch_size or raise link.frame_limit_mb"
            )

    def labels(self, frame: Frame, keep_BA: Tensor) -> Tensor:
        """The answer tokens at `keep_BA`."""
        labels_BA = tensor(frame.tensors, "labels", tuple(keep_BA.shape), dtype=torch.int64)
        within(labels_BA[labels_BA != IGNORE], "labels", 0, self.vocabulary)
        if (labels_BA == IGNORE).all():
            raise ValueError("labels hold no answer token")
        return labels_BA

    def mutual(self, frame: Frame, branches: int) -> Mutual | None:
        """How branches learn from each other, where they do."""
        if "weights" not in frame.meta:
            return None
        weights, temperature = numbers(frame, "weights"), frame.meta.get("temperature", 0.0)
        if len(weights) != branches or not (number(temperature) and 1e-3 <= temperature <= 1e3):
            raise ValueError(
                f"mutual learning takes a weight for each of {branches} branches and a temperature from 0.001 to "
                f"1000, got {len(weights)} and {str(temperature)[:32]}"
            )
        return Mutual(tuple(weights), float(temperature))

    def token_terms(self, frame: Frame) -> list[TokenTerm]:
        """The text adapters that a generated token passes."""
        tensors = codecs.read(frame.tensors, codecs.named(frame.meta.get("codecs")))
        terms = []
        for i, scale in enumerate(numbers(frame, "scales")):
            down_RD = tensor(tensors, f"token_down.{i}", (None, self.width), floating=True)
            up_DR = tensor(tensors, f"token_up.{i}", (self.width, down_RD.shape[0]), floating=True)
            terms.append(TokenTerm(down_RD, up_DR, scale))
        return terms


class _Inputs:
    """The floating tensors of a step, taken one by one; those whose gradient is wanted become leaves."""

    def __init__(self, tensors: Mapping[str, Tensor], wanted: set[str], device: torch.device) -> None:
        self.tensors, self.wanted = tensors, wanted
        self.leaves: dict[str, Tensor] = {}
        self._device = device

    def take(self, name: str, shape: tuple[int | None, ...]) -> Tensor:
        taken = tensor(self.tensors, name, shape, floating=True).to(self._device)
        if name in self.wanted:
            self.leaves[name] = taken.requires_grad_()
        return taken


def integer(frame: Frame, key: str) -> int:
    value = frame.meta.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{key} must be an integer, got {str(value)[:40]!r}")
    return value


def number(value: Any) -> bool:
    """Whether this is a finite number, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53  # false for NaN


def tensor(
    tensors: Mapping[str, Tensor],
    name: str,
    shape: tuple[int | None, ...],
    *,
    dtype: torch.dtype | None = None,
    floating: bool = False,
) -> Tensor:
    """The tensor `name`, of this shape (None: any size) and kind; what floats must be finite."""
    found = tensors.get(name)
    if found is None:
        raise ValueError(f"tensor {name!r} is missing")
    fits = found.dim() == len(shape) and all(
        want in (None, came) for want, came in zip(shape, found.shape, strict=True)
    )
    if not fits:
        wanted = tuple("any" if size is None else size for size in shape)
        raise ValueError(f"{name!r} has shape {tuple(found.shape)}, wanted {wanted}")
    if (dtype and found.dtype != dtype) or (floating and not found.is_floating_point()):
        raise ValueError(f"{name!r} is {found.dtype}, wanted {dtype or 'a floating type'}")
    if floating and not codecs.finite(found):
        raise ValueError(f"{name!r} is not finite; lower the learning rate or clip gradients")
    return found


def within(values: Tensor, name: str, low: int, high: int) -> None:
    if values.numel() and not (low <= int(values.min()) and int(values.max()) < high):
        raise ValueError(f"{name!r} must lie in [{low}, {high}), got [{int(values.min())}, {int(values.max())}]")


def numbers(frame: Frame, key: str) -> list[float]:
    values = frame.meta.get(key)
    if not isinstance(values, list) or len(values) > TERMS_LIMIT or not all(map(number, values)):
        raise ValueError(f"{key} must be a list of numbers, at most {TERMS_LIMIT}, got {str(values)[:100]}")
    return [float(value) for value in values]


def _list(frame: Frame, key: str) -> list[Any]:
    value = frame.meta.get(key)
    if not isinstance(value, list) or len(value) > TERMS_LIMIT:
        raise ValueError(f"{key} must be a list of at most {TERMS_LIMIT}, got {str(value)[:100]}")
    return value


def _branches(frame: Frame) -> int:
    """How many branches a step has, in either encoding."""
    count = len(_list(frame, "branches")) if "terms" in frame.meta else integer(frame, "branches")
    if not 1 <= count <= TERMS_LIMIT:
        raise ValueError(f"a step has from 1 to {TERMS_LIMIT} branches, got {count}")
    return count


def _shape(frame: Frame, B: int, T: int, *, grad: bool, tokens: int) -> Shape:
    """How large a step is, by what can be told before its tensors are checked."""
    branches, keep = _branches(frame), frame.tensors.get("keep")
    answers = keep.shape[1] if keep is not None and keep.dim() == 2 else 1
    pairs = B * branches * (branches - 1) if "weights" in frame.meta else 0
    sent = sum(tensor.numel() for tensor in frame.tensors.values())
    return Shape(B * branches, T, answers, pairs, tokens, grad, sent)


def _names(frame: Frame, key: str) -> set[str]:
    value = frame.meta.get(key, [])
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key} must be a list of names, got {str(value)[:100]}")
    return set(value)
