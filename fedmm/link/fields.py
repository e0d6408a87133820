"""Where a message's values and tensors stand in a frame: one end writes them, the other reads and checks them.

A field of a message says its place by an annotation: `keep_BA: Annotated[Tensor, One("keep", "B A", torch.int64)]`.
A shape is letters. The reader may give a letter its size (D is the LLM's width); else the first tensor that has the
letter does, and all others must agree. A mistake is a ValueError that says what came and what is wanted.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any

import torch
from torch import Tensor

from fedmm import codecs
from fedmm.link.wire import Frame
from fedmm.types import State

LIST_LIMIT = 64  # entries of a list in a header: low-rank terms of a step, over all its branches; FedDAT has six
FLOATING, ANY = "a floating type", "any type"

Entries = tuple[dict[str, Any], State]
"""What goes into a frame: of its header, and of its tensors."""
Sizes = dict[str, int]
"""What the letters of shapes stand for, filled while a frame is read."""


class Place:
    """Where one field of a message stands in a frame: entries of the header under `keys`, and `tensors`."""

    keys: tuple[str, ...] = ()
    tensors: tuple[One, ...] = ()

    def write(self, value: Any) -> Entries:
        raise NotImplementedError

    def read(self, frame: Frame, sizes: Sizes) -> Any:
        raise NotImplementedError

    def stands_in(self, frame: Frame) -> bool:
        return all(key in frame.meta for key in self.keys) and all(one.name in frame.tensors for one in self.tensors)


@dataclass(frozen=True)
class One(Place):
    """A tensor. A floating one must be finite. `codec` is the kind of codec that writes it, if any.

    With `below`, entries must be at least 0 and less than that letter's size. Entries equal to `but` are exempt.
    """

    name: str
    shape: str = ""
    dtype: torch.dtype | str = FLOATING
    codec: str = ""
    below: str = ""
    but: int | None = None

    @property
    def tensors(self) -> tuple[One, ...]:  # type: ignore[override]
        return (self,)

    def write(self, value: Tensor) -> Entries:
        return {}, {self.name: value}

    def read(self, frame: Frame, sizes: Sizes) -> Tensor:
        tensor = frame.tensors.get(self.name)
        if tensor is None:
            raise ValueError(f"tensor {self.name!r} is missing")
        letters = self.shape.split()
        wanted = [int(letter) if letter.isdecimal() else sizes.get(letter) for letter in letters]
        if tensor.dim() != len(wanted) or any(w not in (None, n) for w, n in zip(wanted, tensor.shape, strict=True)):
            texts = tuple("any" if size is None else size for size in wanted)
            raise ValueError(f"{self.name!r} has shape {tuple(tensor.shape)}, wanted {texts}")
        if self.dtype not in (ANY, tensor.dtype, FLOATING if tensor.is_floating_point() else None):
            raise ValueError(f"{self.name!r} is {tensor.dtype}, wanted {self.dtype}")
        if self.dtype == FLOATING and not codecs.finite(tensor):
            raise ValueError(f"{self.name!r} is not finite; lower the learning rate or clip gradients")
        if self.below:
            _within(tensor if self.but is None else tensor[tensor != self.but], self.name, sizes[self.below])
        sizes.update(zip(letters, tensor.shape, strict=True))
        return tensor

    def at(self, number: int | str) -> One:
        """The same tensor as one of several."""
        return dataclasses.replace(self, name=f"{self.name}.{number}")


@dataclass(frozen=True)
class Many(Place):
    """Numbered tensors, each with sizes of its own beside those that are set.

    The header's `key` or the letter `per` says how many there are; with neither, as many as come.
    """

    one: One
    key: str = ""
    per: str = ""

    @property
    def keys(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.key,) if self.key else ()

    @property
    def tensors(self) -> tuple[One, ...]:  # type: ignore[override]
        return (self.one.at("i"),)

    def write(self, value: tuple[Tensor, ...]) -> Entries:
        return dict.fromkeys(self.keys, len(value)), {self.one.at(i).name: tensor for i, tensor in enumerate(value)}

    def read(self, frame: Frame, sizes: Sizes) -> tuple[Tensor, ...]:
        if self.key or self.per:
            count = integer(frame.meta, self.key) if self.key else sizes[self.per]
        else:
            count = next(i for i in range(len(frame.tensors) + 1) if not self.one.at(i).stands_in(frame))
        return tuple(self.one.at(i).read(frame, dict(sizes)) for i in range(count))


@dataclass(frozen=True)
class Named(Place):
    """Tensors under names that the link does not know, behind a prefix or as the whole frame.

    With `flag`, the header says whether there is a state, because an empty state is not the same as none.
    """

    prefix: str = ""
    codec: str = ""
    flag: str = ""

    @property
    def keys(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.flag,) if self.flag else ()

    @property
    def tensors(self) -> tuple[One, ...]:  # type: ignore[override]
        return (One(f"{self.prefix}...", dtype=ANY, codec=self.codec),)

    def write(self, value: Mapping[str, Any] | None) -> Entries:
        tensors = {f"{self.prefix}{name}": tensor for name, tensor in (value or {}).items()}
        return dict.fromkeys(self.keys, value is not None), tensors

    def read(self, frame: Frame, sizes: Sizes) -> State | None:
        if self.flag and not frame.meta.get(self.flag):
            return None
        return {n.removeprefix(self.prefix): t for n, t in frame.tensors.items() if n.startswith(self.prefix)}


@dataclass(frozen=True)
class Value(Place):
    """An entry of the header, checked by `reader`."""

    key: str
    reader: Callable[[Mapping[str, Any], str], Any] = lambda meta, key: meta[key]

    @property
    def keys(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.key,)

    def write(self, value: Any) -> Entries:
        return {self.key: value}, {}

    def read(self, frame: Frame, sizes: Sizes) -> Any:
        return self.reader(frame.meta, self.key)


class Header(Place):
    """The header as a whole."""

    keys = ("...",)

    def write(self, value: Mapping[str, Any]) -> Entries:
        return dict(value), {}

    def read(self, frame: Frame, sizes: Sizes) -> dict[str, Any]:
        return dict(frame.meta)


@functools.cache
def places(kind: Any) -> Mapping[str, Place]:
    """The places of a message's fields, by the field's name."""
    hints = typing.get_type_hints(kind, include_extras=True)
    marks = {name: getattr(hint, "__metadata__", (None,))[0] for name, hint in hints.items()}
    return {name: mark for name, mark in marks.items() if isinstance(mark, Place)}


def written(message: Any) -> Entries:
    """Header and tensors of a message. A field that has its default is left out."""
    meta: dict[str, Any] = {}
    tensors: State = {}
    defaults = {field.name: field.default for field in dataclasses.fields(message)}
    for name, place in places(type(message)).items():  # type: ignore[arg-type]
        value = getattr(message, name)
        if value is not defaults[name]:
            entries, more = place.write(value)
            meta |= entries
            tensors |= more
    return meta, tensors


def taken(kind: Any, frame: Frame, sizes: Sizes, *names: str) -> dict[str, Any]:
    """The fields of a message that stand in a frame, by name: all, or those of `names`. Numbered tensors come last."""
    required = {field.name for field in dataclasses.fields(kind) if field.default is MISSING}
    chosen = {name: place for name, place in places(kind).items() if not names or name in names}
    return {
        name: place.read(frame, sizes)
        for name, place in sorted(chosen.items(), key=lambda item: isinstance(item[1], Many))
        if name in required or place.stands_in(frame)
    }


def _within(values: Tensor, name: str, end: int) -> None:
    if values.numel() and not (int(values.min()) >= 0 and int(values.max()) < end):
        raise ValueError(f"{name!r} must lie in [0, {end}), got [{int(values.min())}, {int(values.max())}]")


def integer(meta: Mapping[str, Any], key: str) -> int:
    value = meta.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{key} must be an integer, got {str(value)[:40]!r}")
    return value


def number(value: Any) -> bool:
    """Whether this is a finite number, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53  # false for NaN


def numbers(meta: Mapping[str, Any], key: str) -> tuple[float, ...]:
    values = meta.get(key)
    if not isinstance(values, list) or len(values) > LIST_LIMIT or not all(map(number, values)):
        raise ValueError(f"{key} must be a list of numbers, at most {LIST_LIMIT}, got {str(values)[:100]}")
    return tuple(float(value) for value in values)


def listed(meta: Mapping[str, Any], key: str) -> list[Any]:
    value = meta.get(key)
    if not isinstance(value, list) or len(value) > LIST_LIMIT:
        raise ValueError(f"{key} must be a list of at most {LIST_LIMIT}, got {str(value)[:100]}")
    return value


def names(meta: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = meta.get(key)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key} must be a list of names, got {str(value)[:100]}")
    return tuple(value)
