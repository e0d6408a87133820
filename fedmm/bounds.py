"""What a setting may be: the bounds that stand beside a parameter, and the record of a mistake.

    def rule(..., *, byzantine: Annotated[int, Ge(0)] = 1)

The configuration is checked against the bounds of every function that a yaml names. A condition over several settings
is a function `check` beside the one it is about, which yields mistakes: see `aggregate/krum.py`, `methods/feddat.py`.
"""

from __future__ import annotations

import contextlib
import inspect
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Mistake:
    """What is wrong with a configuration: the path of the setting, and the line that a person reads."""

    path: str
    text: str


@dataclass(frozen=True)
class Ge:
    limit: float
    words = "at least"

    def admits(self, value: float) -> bool:
        return value >= self.limit


@dataclass(frozen=True)
class Gt:
    limit: float
    words = "above"

    def admits(self, value: float) -> bool:
        return value > self.limit


@dataclass(frozen=True)
class Lt:
    limit: float
    words = "below"

    def admits(self, value: float) -> bool:
        return value < self.limit


Bound = Ge | Gt | Lt
Count = Annotated[int, Ge(1)]
NotNegative = Annotated[float, Ge(0)]


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of a function's arguments, with `Annotated`; without types that are imported for type checkers only."""
    plain: Any = inspect.unwrap(function.__init__ if inspect.isclass(function) else function)
    hints: dict[str, Any] = {}
    for name, hint in getattr(plain, "__annotations__", {}).items():
        one = types.SimpleNamespace(__annotations__={name: hint})
        with contextlib.suppress(NameError):  # imported under TYPE_CHECKING
            hints |= typing.get_type_hints(one, getattr(plain, "__globals__", {}), include_extras=True)
    return hints


def outside(path: str, value: Any, hint: Any) -> Iterator[Mistake]:
    """A number that is not within the bounds of its type; nan is within none."""
    bounds = _bounds_of(hint)
    if isinstance(value, int | float) and not all(bound.admits(value) for bound in bounds):
        wanted = " and ".join(f"{bound.words} {bound.limit:g}" for bound in bounds)
        null = ", or null" if type(None) in typing.get_args(hint) else ""
        yield Mistake(path, f"{path} must be {wanted}{null}, got {value:g}")


def hold(place: str, function: Callable[..., Any], **values: Any) -> None:
    """Raises ValueError where a value is not within the bounds of the function's parameter of that name."""
    hints = hints_of(function)
    for mistake in (m for name, value in values.items() for m in outside(f"{place}.{name}", value, hints[name])):
        raise ValueError(mistake.text)


def _bounds_of(hint: Any) -> list[Bound]:
    """The bounds in a type, those of `Annotated[int, Ge(1)] | None` among them."""
    own = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Bound)]
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return own + [bound for inner in (typing.get_args(hint) if union else ()) for bound in _bounds_of(inner)]
