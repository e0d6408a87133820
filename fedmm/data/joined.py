"""Several datasets as one, each of them one kind of data: what FedDAT's benchmarks give to one client each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from fedmm.data.views import Rows
from fedmm.types import Example


def joined(
    *,
    of: Mapping[str, Callable[[], Mapping[str, Sequence[Example]]]],  # datasets by the name they are to have
) -> dict[str, Sequence[Example]]:
    """The datasets one after the other; where an example is from stands in its label `dataset` and before its id.

    Nothing is copied and no image is looked at. Open data may be of some only; raises ValueError where another split
    is, and with the mistakes of all datasets.
    """
    found, mistakes = {}, []
    for name, make in of.items():
        try:
            found[name] = dict(make())
        except ValueError as error:
            mistakes.append(f"dataset.of.{name}: {error}")
    if mistakes:
        raise ValueError("\n".join(mistakes))
    splits = dict.fromkeys(split for made in found.values() for split in made)
    for split in splits:
        if split != "public" and (without := [name for name, made in found.items() if not made.get(split)]):
            raise ValueError(
                f"split {split} is empty or missing in {', '.join(without)}, but other datasets have it; give "
                f"dataset.of.{without[0]} one, or leave that dataset out"
            )
    return {split: _Joined({name: made.get(split, ()) for name, made in found.items()}) for split in splits}


@dataclass(frozen=True)
class _Joined(Rows):
    parts: Mapping[str, Sequence[Example]]

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    def example(self, row: int) -> Example:
        ends = accumulate(map(len, self.parts.values()))
        name, part, end = next(
            (name, part, end) for (name, part), end in zip(self.parts.items(), ends, strict=True) if row < end
        )
        example = part[row - end + len(part)]
        return replace(example, id=f"{name}/{example.id}", labels={**example.labels, "dataset": name})
