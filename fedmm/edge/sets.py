"""What a client trains, in named sets with the same names in each: how one is read, written, started and frozen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from fedmm.adapters.schema import fits
from fedmm.types import State


class Edge(nn.Module, ABC):
    """The part of a model that a client runs: a NanoEdge before an LLM, or a classifier."""

    @property
    @abstractmethod
    def sets(self) -> Sequence[str]:
        """The names of the sets."""

    @abstractmethod
    def trainable(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of one set, under names that are the same in every set: `text.up`, `encoder....lora_A`."""

    @abstractmethod
    def reset(self, generator: torch.Generator, name: str = "shared") -> None:
        """Start one set, from `generator` alone."""

    @abstractmethod
    def fold(self, state: State, scale: float) -> None:
        """Put what `rule=stack` folded under the adapters; once, for it is not taken out again."""

    def named(self) -> dict[str, nn.Parameter]:
        """The parameters of all sets, each under its name with its set in front."""
        return {f"{name}.{key}": parameter for name in self.sets for key, parameter in self.trainable(name).items()}

    def state(self, name: str = "shared") -> State:
        """A copy of one set."""
        return {key: parameter.detach().to("cpu", copy=True) for key, parameter in self.trainable(name).items()}

    def load(self, state: State, name: str = "shared") -> None:
        """Write `state` into one set. Raises ValueError where names or shapes differ."""
        own = self.trainable(name)
        if own.keys() != state.keys():
            raise ValueError(
                f"adapters differ: {sorted(own.keys() ^ state.keys())[:3]}; use the same edge.* everywhere"
            )
        with torch.no_grad():
            for key, parameter in own.items():
                if parameter.shape != state[key].shape:
                    raise ValueError(f"{key}: {tuple(state[key].shape)} into {tuple(parameter.shape)}; same edge.rank?")
                parameter.copy_(state[key])

    def freeze_all_but(self, patterns: Iterable[str]) -> None:
        """Let exactly what a schema's patterns name be trained: `shared.*.up`, `local.*`."""
        for name, parameter in self.named().items():
            parameter.requires_grad_(fits(name, patterns))
