"""Schemas: what a client trains in a round, and what of it goes up.

    schema(round, rounds) -> Schema(trains, sends)

Both are patterns over names with their set in front: `shared.image.up`, `local.*`. Of a product B A, A is `down` or
peft's `lora_A`, B is `up` or `lora_B`; so are a bottleneck's two, though between them is a relu, and nothing exact. The
server's state is what some round sends, and nothing else: the rest of a client's adapters is at the common start, or at
what the client has trained, never sends, and so keeps from round to round. Schemas of the shared set let local ones
train whole, which never travel; `methods/feddpa` has one that says when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fedmm.types import State

A = ("shared.*.down", "shared.*.lora_A", "shared.*.bottleneck_down")
B = ("shared.*.up", "shared.*.lora_B", "shared.*.bottleneck_up")
LOCAL = ("local.*",)
IMAGE = ("image.*", "encoder.*", "connector.*")
"""What only an image can train, in any set."""


@dataclass(frozen=True)
class Schema:
    """What is trained in a round, and what is sent after it; `phase`, where a schedule of learning rates is in its own
    round and rounds."""

    trains: tuple[str, ...]
    sends: tuple[str, ...]
    phase: tuple[int, int] | None = None


AnySchema = Callable[[int, int], Schema]


def everything(round: int, rounds: int) -> Schema:
    """All but the frozen copy is trained, and all that is shared is sent."""
    return Schema(("shared.*", *LOCAL), ("shared.*",))


def freeze_a(round: int, rounds: int) -> Schema:
    """B alone is trained and sent; A is the same at all clients, so that the mean of B is the mean of the products.

    Source: Sun et al. 2024 (FFA-LoRA, arXiv 2403.12313).
    """
    return Schema((*B, *LOCAL), B)


def alternate(round: int, rounds: int) -> Schema:
    """B in odd rounds, A in even ones: exact as `freeze_a` is, for both. B first: where it is zero, A has no gradient.

    Source: Chen et al. 2025 (RoLoRA, arXiv 2502.01755).
    """
    half = B if round % 2 else A
    return Schema((*half, *LOCAL), half)


def share_a(round: int, rounds: int) -> Schema:
    """Both are trained, A alone is sent; every client keeps its own B.

    Source: Guo et al. 2025 (FedSA-LoRA, arXiv 2410.01463).
    """
    return Schema((*A, *B, *LOCAL), A)


def private_head(round: int, rounds: int) -> Schema:
    """Of a classifier (`head=classes`) the trunk travels; every client trains and keeps a head of its own.

    Source: Arivazhagan et al. 2019 (FedPer, arXiv 1912.00818); so are the heads of FedDAT's clients.
    """
    return Schema(("shared.*", *LOCAL), ("shared.trunk.*",))


def fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def sent(schema: AnySchema, rounds: int, names: Iterable[str], round: int | None = None) -> list[str]:
    """Those of the shared set's names that go up in `round`, or in any round: these are what the server holds."""
    some = [round] if round else range(1, max(1, rounds) + 1)  # without rounds the server may have one all the same
    patterns = {pattern for r in some for pattern in schema(r, rounds).sends}
    return [name for name in names if fits(f"shared.{name}", patterns)]


def private(schema: AnySchema, rounds: int, names: Iterable[str], round: int | None = None) -> list[str]:
    """Those of `names`, with their sets, that a client trained by the end of `round`, or of all, but never sends."""
    trained = {p for r in range(1, (rounds if round is None else round) + 1) for p in schema(r, rounds).trains}
    travels = {pattern for r in range(1, rounds + 1) for pattern in schema(r, rounds).sends}
    return [name for name in names if fits(name, trained) and not fits(name, travels)]


def without_images(state: State) -> State:
    """What is left to send of a client none of whose examples has an image."""
    return {name: tensor for name, tensor in state.items() if not fits(name, IMAGE)}
