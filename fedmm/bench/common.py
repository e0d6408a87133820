"""What every bench shares: a figure as a line of JSON, medians, and runs that take turns.

Two cores that others use too make an absolute time worth little: what is compared is run in turn, A B A B, in one
process, and its medians are set against each other.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Size = Literal["toy", "real"]


@dataclass(frozen=True)
class Case:
    """One figure of a bench. `bar` is what it must not exceed, or with `at_least` not fall short of."""

    bench: str
    case: str
    value: float
    unit: str
    bar: float | None = None
    at_least: bool = False
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool | None:
        """Whether the bar is kept; None without one."""
        if self.bar is None:
            return None
        return self.value >= self.bar if self.at_least else self.value <= self.bar

    def line(self) -> str:
        """The line of JSON that `fedmm bench` prints."""
        shown = {"bench": self.bench, "case": self.case, "value": _short(self.value), "unit": self.unit}
        return json.dumps(shown | {"bar": self.bar, "holds": self.holds} | _short(dict(self.detail)))


def in_turn(
    runs: Mapping[str, Callable[[], object]], rounds: int, before: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each run, in turn for `rounds` rounds, after a round that does not count. Those of `before`, which
    comes before each, are not in them."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round in range(rounds + 1):
        for name, run in runs.items():
            before()
            began = time.perf_counter()
            run()
            if round:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def median_ms(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds)


def _short(value: Any) -> Any:
    """Numbers to five digits: no measurement has more."""
    if isinstance(value, dict):
        return {key: _short(inner) for key, inner in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value
