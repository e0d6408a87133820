"""What runs there are in a sweep: every combination of the overrides' values, and the trials of a search.

Hydra reads the values (lists, range, choice). A run's folder is named by what it is asked, whatever part asks it.
"""

from __future__ import annotations

import itertools
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmm.config import composition, settings
from fedmm.results import intervals

TUNING_SEED = 100  # of trials, and of nothing else
FURTHER = 2  # values at most that a search takes beyond its ends
_NAMED = ("arm", "method", "rule", "scenario", "dataset", "partition", "seed", "label", "data")  # name themselves
_IN_NAME = ("arm", "method", "rule", "scenario")  # of a run's folder, and the seed, also of one value: more may come
_TUNING = (
    "evaluate.split=validation", "evaluate.everywhere=false", "evaluate.every=0", "evaluate.groups=null",
    "evaluate.predictions=false",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    name: str
    path: Path
    overrides: tuple[str, ...]

    @property
    def done(self) -> bool:
        return (self.path / "summary.json").exists()

    @property
    def log(self) -> Path:
        return self.path.with_name(f"{self.name}.log")


@dataclass(frozen=True)
class Search:
    """A setting to choose: its key and the values to try. Combinations that differ in the keys of `across` alone take
    one value, the best on average over them."""

    key: str
    values: tuple[str, ...]
    across: tuple[str, ...] = ()


def search(text: str | None, across: str | None = None) -> Search | None:
    """`optimizer.lr=3e-3,6e-3` as a search, numbers in rising order; `across` names keys, `scenario,dataset.train`.
    Raises ConfigError where it gives fewer than two values, or one twice."""
    if text is None:
        if across:
            raise settings.ConfigError(
                f"--tune-across {across} needs a setting to choose; add --tune, such as --tune optimizer.lr=3e-3,6e-3"
            )
        return None
    ((key, values),) = composition.axes([text]).items()
    if len(values) < 2:
        raise settings.ConfigError(f"--tune {text} gives one value; name two or more, as in optimizer.lr=3e-3,6e-3")
    if all(map(_number, values)):
        values = tuple(sorted(values, key=float))
    if twice := [value for value, beside in itertools.pairwise(values) if value == beside or _same(value, beside)]:
        raise settings.ConfigError(f"--tune {text} gives {twice[0]} twice; leave one out")
    return Search(key, values, tuple(across.split(",")) if across else ())


def jobs(
    path: Path, overrides: Sequence[str], chosen: Callable[[Sequence[str]], Sequence[str]] = lambda cell: ()
) -> list[Job]:
    """Every combination of the overrides' values. `chosen` gives what tuning adds to a combination without its seed, in
    the folder's name too, as another search may choose another value.

    What has several values and no name stands behind the label, `FedAvg, edge.rank=8`, or, where it makes other data,
    behind the name of these: `long_tail, dataset.imbalance=10`. Raises ConfigError for `compare`.
    """
    found = composition.axes(overrides)
    if "compare" in found:
        raise settings.ConfigError("a sweep cannot use compare=...; list the arms instead, as in arm=fedavg,local")
    several = _several(found)
    made = []
    for pairs in _combinations(found):
        asked = _overrides(pairs)
        added = chosen([override for override in asked if not override.startswith("seed=")])
        asked += added
        own_pairs = dict(override.split("=", 1) for override in added)
        name = _name(pairs | own_pairs, [*several, *own_pairs]) or "run"
        for name_of, of_data in (("label", False), ("data", True)):
            unnamed = (key for key in sorted(several) if key not in _NAMED and intervals.of_data(key) == of_data)
            own = [f"{key}={pairs[key]}" for key in unnamed]
            if own and name_of not in found:
                asked.append(
                    composition.quoted(name_of, ", ".join([getattr(composition.compose(asked), name_of), *own]))
                )
        made.append(_job(path, name, asked))
    return made


def trials(
    path: Path, overrides: Sequence[str], tuned: Search, wider: Mapping[tuple[str, ...], Sequence[str]] | None = None
) -> dict[tuple[str, ...], dict[str, Job]]:
    """The runs that tuning takes, by combination (seeds apart) and value, on the validation split. `wider` has the
    values of combinations whose search has gone on."""
    found = composition.axes(overrides)
    if str(TUNING_SEED) in found.pop("seed", ()):
        raise settings.ConfigError(f"seed={TUNING_SEED} is reserved for the search of --tune; choose another seed")
    several = _several(found)
    made = {}
    for pairs in _combinations(found):
        cell = _overrides(pairs)
        made[tuple(cell)] = {
            value: _job(path, _name(pairs | {tuned.key: value}, [*several, tuned.key]),
                        [*_without(cell, _TUNING), *_TUNING, f"seed={TUNING_SEED}", f"{tuned.key}={value}"])
            for value in (wider or {}).get(tuple(cell), tuned.values)
        }  # fmt: skip
    return made


def best(tried: Mapping[str, float]) -> str:
    """The value with the highest accuracy; of equal ones the first."""
    return max(tried, key=lambda value: tried[value])


def further(tried: Mapping[str, float], most: int) -> tuple[str, ...] | None:
    """The values tried and one beyond the end, where that was the best of three or more; None where it was not, `most`
    are tried, they are no positive numbers, or whole ones and the next is none."""
    values = tuple(tried)
    if not 2 < len(values) < most or not all(_number(value) and float(value) > 0 for value in values):
        return None
    if (chosen := best(tried)) not in (values[0], values[-1]):
        return None
    first = chosen == values[0]
    end, beside = values[:2] if first else values[:-3:-1]
    beyond = float(end) ** 2 / float(beside)
    if (whole := all(map(str.isdigit, values))) and not beyond.is_integer():
        return None
    text = f"{beyond:.0f}" if whole else f"{beyond:g}"
    return (text, *values) if first else (*values, text)


def alike(cell: Sequence[str], cells: Iterable[tuple[str, ...]], across: Sequence[str]) -> list[tuple[str, ...]]:
    """The combinations that differ from this one in the keys of `across` alone, itself among them."""
    wanted = list(_without(cell, across))
    return [other for other in cells if list(_without(other, across)) == wanted]


def _several(found: Mapping[str, Sequence[str]]) -> list[str]:
    return [key for key, values in found.items() if len(values) > 1]


def _combinations(found: Mapping[str, Sequence[str]]) -> Iterator[dict[str, str]]:
    """A value for each key, in every combination, the last key's changing first."""
    return (dict(zip(found, values, strict=True)) for values in itertools.product(*found.values()))


def _overrides(pairs: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in pairs.items()]


def _job(path: Path, name: str, overrides: Sequence[str]) -> Job:
    """A run of one arm: what a preset sets beside it is left out. The last override is run.dir."""
    one_arm = ["compare=[]"] if composition.compose(overrides).compare else []
    return Job(name, path / name, (*overrides, *one_arm, composition.quoted("run.dir", (path / name).absolute())))


def _without(overrides: Sequence[str], others: Sequence[str]) -> Iterator[str]:
    keys = {other.split("=", 1)[0] for other in others}
    return (override for override in overrides if override.split("=", 1)[0] not in keys)


def _name(pairs: Mapping[str, str], several: Sequence[str]) -> str:
    others = sorted(set(several) - {*_IN_NAME, "seed"})  # in whatever order they were asked
    keys = [key for key in (*_IN_NAME, *others, "seed") if key in pairs]
    return "_".join(f"{key}-{_plain(pairs[key])}" for key in keys)


def _plain(value: str) -> str:
    """A value as a folder's name has it; with a sum of what it lacks there, so that no two are one."""
    plain = re.sub(r"[^\w.-]+", "-", value)
    return plain if plain == value else f"{plain}-{zlib.crc32(value.encode()):08x}"


def _number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _same(value: str, other: str) -> bool:
    return _number(value) and _number(other) and float(value) == float(other)
