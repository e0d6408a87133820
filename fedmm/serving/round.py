"""The round that a host serves: the state that goes down, the updates that come up, and the bytes that both take."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedmm import tree
from fedmm.adapters.schema import without_images
from fedmm.types import State, Update

ENTRY_LIMIT = 1e9  # of an update: sums and products of a thousand clients' stay finite in fp32


@dataclass(eq=False)
class Traffic:
    """What one client moved for one verb in one round, as counted on the wire, and the LLM's seconds in it."""

    up_bytes: int = 0
    down_bytes: int = 0
    fisher_bytes: int = 0  # of up_bytes
    frames: int = 0
    llm_seconds: float = 0.0
    llm_samples: int = 0  # that went into the LLM, once for each branch; backwards and later tokens are not counted


Moved = Mapping[tuple[int, str], Traffic]
"""Traffic by client and verb."""
OnUpdate = Callable[[int, Update, Moved], None]
"""Makes an update of a round safe, with what its client has moved so far; or refuses it by a ValueError."""
Shown = Callable[[int, State], State]
"""What of a state concerns a client."""


class Round:
    """The round that is open, if one is: number 0 stands for none. Safe to use from several threads."""

    def __init__(self, on_update: OnUpdate) -> None:
        self.number = 0
        self._on_update = on_update
        self._lock = threading.Lock()
        self._updating = threading.Lock()  # held from an update's check until it is safe; a round closes after it
        self._current: State = {}
        self._down: Shown = lambda client, current: current
        self._up: Shown = lambda client, current: current
        self._awaited: set[int] = set()
        self._refused: dict[int, str] = {}
        self._moved: dict[tuple[int, str], Traffic] = defaultdict(Traffic)

    def open(self, number: int, current: State, clients: list[int], down: Shown, up: Shown) -> None:
        """Serve `current`, await one update from each of these clients."""
        with self._lock:
            self.number, self._current, self._down, self._up = number, tree.clone(current), down, up
            self._awaited, self._refused = set(clients), {}

    def close(self) -> tuple[dict[int, str], Moved]:
        """Take no update any more. Returns why clients were refused, and the traffic that no update took along."""
        with self._updating, self._lock:
            self.number, self._awaited = 0, set()
            moved, self._moved = self._moved, defaultdict(Traffic)
            return self._refused, dict(moved)

    def over(self, number: int) -> str | None:
        """Why a session of this round can do nothing more."""
        now = f"in round {self.number}" if self.number else "between rounds"
        return None if number == self.number else f"round {number} is over, the run is {now}"

    def refuse(self, client: int, reason: str) -> None:
        """Tell the round's end why this client was refused."""
        with self._lock:
            self._refused[client] = reason

    def state(self, client: int) -> State:
        """What of the current state this client gets."""
        with self._lock:
            return self._down(client, self._current)

    def take(self, number: int, client: int, read: Callable[[], Update], traffic: Traffic) -> None:
        """Take the update that `read` gives. Raises ValueError where it is not awaited, or not one of this round."""
        with self._updating:
            if number != self.number or client not in self._awaited:
                raise ValueError(f"no update of client {client} is awaited in round {number}")
            try:
                update = read()
                _check(update, self._up(client, self._current))
                traffic.fisher_bytes += tree.size_bytes(update.fisher or {})
                with self._lock:
                    moved = {key: row for key, row in self._moved.items() if key[0] == client}
                self._on_update(number, update, moved)
            except ValueError as error:
                self.refuse(client, str(error))
                raise
            with self._lock:
                self._awaited.discard(client)
                self._refused.pop(client, None)
                for key in moved:
                    del self._moved[key]

    def traffic(self, client: int, verb: str) -> Traffic:
        """Where to count what this client moves for this verb; an update takes it along, so ask for it each time."""
        with self._lock:
            return self._moved[client, verb]

    @property
    def tensors(self) -> int:
        """How many tensors an update may have, with its Fisher."""
        return 2 * len(self._current)


def _check(update: Update, wanted: State) -> None:
    """Raises ValueError where an update is not one with the names and shapes of `wanted`."""
    if without_images(update.delta).keys() == update.delta.keys():  # of a client who has seen none
        wanted = without_images(wanted)
    for what, state in (("delta", update.delta), ("Fisher", update.fisher)):
        if state is None:
            continue
        if reason := tree.mismatch(state, wanted):
            raise ValueError(f"the {what} {reason}")
        if any((tensor.abs() > ENTRY_LIMIT).any() for tensor in state.values()):
            raise ValueError(f"the {what} has an entry above {ENTRY_LIMIT:g}, which no training makes")
    if any((tensor < 0).any() for tensor in (update.fisher or {}).values()):
        raise ValueError("the Fisher has a negative entry; it is a mean of squares")
