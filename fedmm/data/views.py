"""Parts of a split, and which of its examples have which label: without a look at any image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedmm.types import Example


@dataclass(frozen=True)
class Some(Sequence[Example]):
    """Some examples of a split, asked for one by one: a dataset may decode its images only then."""

    split: Sequence[Example]
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: Any) -> Any:
        return Some(self.split, self.indices[i]) if isinstance(i, slice) else self.split[self.indices[i]]


class Rows(Sequence[Example]):
    """A split that is asked for row by row; a slice of it is a view. `example` is given a row that there is."""

    @abstractmethod
    def example(self, row: int) -> Example: ...

    def __getitem__(self, i: Any) -> Any:
        row = range(len(self))[i]
        return Some(self, row) if isinstance(row, range) else self.example(row)


def by_value(examples: Sequence[Example], by: str, who: str, knob: str) -> dict[str, list[int]]:
    """Indices by label value, values sorted: numbers as numbers, before words. Raises ValueError for `who` asked."""
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        if by not in example.labels:
            raise ValueError(
                f"{who} groups by {by!r}, but example {example.id} has only "
                f"{', '.join(sorted(example.labels)) or 'no labels'}; set {knob} to one of these"
            )
        groups.setdefault(example.labels[by], []).append(index)
    return {value: groups[value] for value in sorted(groups, key=rank)}


def rank(value: str) -> tuple[bool, int, str]:
    """What label values are sorted by."""
    return not value.isdigit(), int(value) if value.isdigit() else 0, value
