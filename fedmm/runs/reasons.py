"""Why a client could not do its part: what the server hears is one of these reasons and a count, and no more.

An exception's text may hold a path, an environment variable or a value of the site's data. So it stays in the site's
log, and the server puts its own words to the reason.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from fedmm.llm.remote import HostGone, HostRefused
from fedmm.runs.settings import ConfigError
from fedmm.types import FedmmError


class Reason(StrEnum):
    """The closed list, each with what a server's operator may do about it."""

    ORDER = "order"
    SETTINGS = "settings"
    SITE = "site"
    DATA = "data"
    BACKBONE = "backbone"
    KEPT = "kept"
    HOST_GONE = "host_gone"
    HOST_REFUSED = "host_refused"
    MEMORY = "memory"
    DISK = "disk"
    TRAINING = "training"
    FAULT = "fault"

    @property
    def says(self) -> str:
        """The reason in words, for the server's log and its run folder."""
        return _WORDS[self]


_WORDS = {
    Reason.ORDER: "it cannot read the order, or the order is for another client; run the same fedmm at both",
    Reason.SETTINGS: "the order's settings do not compose there; run the same fedmm, with the same conf/, at both",
    Reason.SITE: "the site does not allow what the order asks: targets (FEDMM_ALLOW_TARGETS), data paths (FEDMM_DATA), "
    "settings it insists on (FEDMM_REQUIRE)",
    Reason.DATA: "it cannot read or divide its data",
    Reason.BACKBONE: "its backbone is not the server's, or cannot be loaded",
    Reason.KEPT: "what it kept from an earlier round is not there; its FEDMM_HOME may have moved",
    Reason.HOST_GONE: "it does not reach the host, or the host did not answer; see link.address and the server's log",
    Reason.HOST_REFUSED: "the host refused what it sent; the server's log has the reason",
    Reason.MEMORY: "its memory is full; lower batch_size",
    Reason.DISK: "its disk is full or cannot be written to",
    Reason.TRAINING: "its training or scoring failed",
    Reason.FAULT: "it failed in a way that has no reason of its own",
}


class Lost(FedmmError):
    """A client cannot do its part. `reason` and `count` may leave the site; the message may not."""

    def __init__(self, reason: Reason, message: str, count: int = 1) -> None:
        super().__init__(message)
        self.reason, self.count = reason, count


@contextmanager
def because(reason: Reason) -> Iterator[None]:
    """Give an exception this reason, unless it has a better one. Raises Lost, from the exception."""
    try:
        yield
    except Lost:
        raise
    except Exception as error:
        count = len(str(error).splitlines()) if isinstance(error, ConfigError) else 1  # it holds a mistake a line
        raise Lost(_known(error) or reason, str(error), count) from error


def told(reason: str, count: int) -> str:
    """The words for a reason that came from a client. Raises ValueError for one that is not on the list."""
    return f"{Reason(reason).says} ({count} in all; the site's log says more)"


def _known(error: Exception) -> Reason | None:
    """The reason that a kind of exception has wherever it is raised."""
    if isinstance(error, OSError):
        return Reason.DISK if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) else None
    kinds = (
        (HostGone, Reason.HOST_GONE),
        (HostRefused, Reason.HOST_REFUSED),
        (ConfigError, Reason.SETTINGS),
        (MemoryError, Reason.MEMORY),
    )
    return next((reason for kind, reason in kinds if isinstance(error, kind)), None)
