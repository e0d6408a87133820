"""What of a client's adapters may leave it while it trains and is scored.

Of a private set neither B, nor h, nor its token adapter leaves the client. So a step in which it acts sends the sum of
all terms alone, and an answer is made a token at a time, each a step of its own. What is sent after training is the
schema's to say (`adapters/schema.py`).
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
