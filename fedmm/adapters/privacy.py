"""Which of a client's adapters may leave it while it trains and is scored.

B, h and the token adapter of a private set stay at the client. So a step in which the set acts sends only the sum of
all terms. An answer is generated one token at a time, with a step for each token. The schema decides what is sent
after training (`adapters/schema.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Privacy:
    """The names of the private sets."""

    sets: frozenset[str] = frozenset()

    def covers(self, names: Iterable[str]) -> bool:
        """Whether any of these names of sets, or of adapters with their set in front, is private."""
        return any(name.split(".")[0] in self.sets for name in names)


EVERYTHING_MAY_LEAVE = Privacy()
