"""What happens in a run, as its folder's events.jsonl records it: one frozen record for each kind of event.

    {"time": 1767225600.0, "event": "update", "round": 1, "client": 0, "loss": 1.5}

`row` writes a record and `parse` reads it; nothing else knows the names in the file. A kind or a field that this
version does not know was written by a newer one, and is passed over.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

Reasons = Mapping[int, str]
"""Why, by client."""


@dataclass(frozen=True)
class RunBegan:
    """A process began, or goes on with, the run of these arms."""

    kind: ClassVar[str] = "run"
    arms: list[str]  # labels, the main one first
    dir: str = ""


@dataclass(frozen=True)
class RunFinished:
    kind: ClassVar[str] = "finished"
    report: str = ""  # the page's path


@dataclass(frozen=True)
class RunFailed:
    kind: ClassVar[str] = "failed"
    error: str = ""


@dataclass(frozen=True)
class NodeLeftAside:
    """A node of Flower is no client of the run."""

    kind: ClassVar[str] = "node_left_aside"
    node: str  # a node's number has more digits than JSON readers keep
    reason: str


@dataclass(frozen=True)
class ArmBegan:
    """An arm began, or goes on after round `start`."""

    kind: ClassVar[str] = "arm"
    label: str
    rounds: int
    clients: int
    start: int
    card: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ArmFinished:
    kind: ClassVar[str] = "arm_finished"
    label: str


@dataclass(frozen=True)
class StageProgress:
    """What the server does by itself, in words."""

    kind: ClassVar[str] = "stage"
    label: str
    says: str


@dataclass(frozen=True)
class StateAligned:
    """The server has aligned a round's state. The figures are in stages.jsonl."""

    kind: ClassVar[str] = "aligned"
    round: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class UpdateArrived:
    """A client's update is in the journal."""

    kind: ClassVar[str] = "update"
    round: int
    client: int
    loss: float | None = None


@dataclass(frozen=True)
class ClientScored:
    """How a client's own questions went, on the state after `round`."""

    kind: ClassVar[str] = "score"
    round: int
    client: int
    right: int
    count: int


@dataclass(frozen=True)
class BytesCounted:
    """The ledger has all bytes of the round."""

    kind: ClassVar[str] = "bytes"
    round: int


@dataclass(frozen=True)
class RoundEnded:
    """A round's state is in its checkpoint. `lost` clients sent no update; `failed` ones gave no report."""

    kind: ClassVar[str] = "round"
    round: int
    loss: float | None
    seconds: float
    lost: Reasons = field(default_factory=dict)
    failed: Reasons = field(default_factory=dict)


@dataclass(frozen=True)
class ClientsUnscored:
    """These clients did not score the final state."""

    kind: ClassVar[str] = "unscored"
    lost: Reasons


Event = (
    RunBegan
    | RunFinished
    | RunFailed
    | NodeLeftAside
    | ArmBegan
    | ArmFinished
    | StageProgress
    | StateAligned
    | UpdateArrived
    | ClientScored
    | BytesCounted
    | RoundEnded
    | ClientsUnscored
)
KINDS: Mapping[str, type[Event]] = {kind.kind: kind for kind in get_args(Event)}
_REASONS = {kind: {name for name, hint in get_type_hints(kind).items() if hint == Reasons} for kind in KINDS.values()}


@dataclass(frozen=True)
class Logged:
    """An event and when it was written, in seconds since the epoch."""

    time: float
    event: Event


def row(event: Event) -> dict[str, Any]:
    """The event as a row of events.jsonl, of now."""
    return {"time": time.time(), "event": event.kind, **vars(event)}


def parse(line: bytes | str) -> Logged | None:
    """The event in a line of events.jsonl.

    None if a kill has cut the line off, or if this version does not know the kind or lacks one of its fields.
    """
    try:
        written = json.loads(line)
    except ValueError:
        return None
    kind = KINDS.get(str(written.get("event"))) if isinstance(written, dict) else None
    if kind is None:
        return None
    values = {of.name: written[of.name] for of in fields(kind) if of.name in written}
    for name in _REASONS[kind] & values.keys():
        values[name] = {int(client): reason for client, reason in values[name].items()}  # JSON has no integer keys
    try:
        return Logged(float(written.get("time", 0.0)), kind(**values))
    except TypeError:  # a field is missing
        return None


class Tail:
    """The events of an arm's folder, from a file that grows and may not be there yet."""

    def __init__(self, folder: Path) -> None:
        self._path, self._offset = folder / "events.jsonl", 0

    def read(self) -> list[Logged]:
        """The events in whole lines beyond those read before, in the order in which they were written."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [logged for logged in map(parse, whole.splitlines()) if logged]


def read(folder: Path) -> list[Logged]:
    """All events of an arm's folder so far."""
    return Tail(folder).read()
