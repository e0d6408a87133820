"""Why a client could not do its part: it sends the server only one of these reasons and a count.

An exception's text may hold a path, an environment variable or a value of the site's data. So it stays in the site's
log, and the server puts its own words to the reason.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from fedmm.config.settings import ConfigError
from fedmm.link.session import HostGone, HostRefused
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
    Reason.ORDER: "the site cannot use the order: it is another client's, or another version of fedmm wrote it",
    Reason.SETTINGS: "the site refuses the order's settings; use the same fedmm and conf/ at server and site",
    Reason.SITE: "the site's policy forbids what the order asks (FEDMM_DATA, FEDMM_ALLOW_HUB, FEDMM_REQUIRE)",
    Reason.DATA: "the site cannot read its data, or cannot divide them among clients",
    Reason.BACKBONE: "the site cannot build its part of the model, or its model is not the server's",
    Reason.KEPT: "the site has no local adapters of that round that fit the order; its FEDMM_HOME may have moved",
    Reason.HOST_GONE: "the site does not reach the host, or it did not answer; see link.address and the server's log",
    Reason.HOST_REFUSED: "the host refused what the site sent; see the server's log",
    Reason.MEMORY: "the site's memory is full; lower batch_size",
    Reason.DISK: "the site's disk is full or read-only",
    Reason.TRAINING: "training or scoring failed at the site",
    Reason.FAULT: "an unexpected error at the site",
}


class Lost(FedmmError):
    """A client cannot do its part. `reason` and `count` may leave the site; the message may not."""

    def __init__(self, reason: Reason, message: str, count: int = 1) -> None:
        super().__init__(message)
        self.reason, self.count = reason, count


@contextmanager
def because(reason: Reason) -> Iterator[None]:
    """Raises Lost, from any exception inside: with `reason`, or with the one that the exception's kind always has."""
    try:
        yield
    except (Lost, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic in a library's Rust is no Exception
        count = len(str(error).splitlines()) if isinstance(error, ConfigError) else 1  # it holds a mistake a line
        raise Lost(_known(error) or reason, str(error), count) from error


def describe(reason: str, count: int) -> str:
    """The words for a reason that came from a client. Raises ValueError for one that is not on the list."""
    return f"{Reason(reason).says} (mistakes: {count}; the site's log has the text)"


def _known(error: BaseException) -> Reason | None:
    """The reason for a kind of exception that means the same wherever it is raised."""
    if isinstance(error, OSError):
        return Reason.DISK if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) else None
    kinds = (
        (HostGone, Reason.HOST_GONE),
        (HostRefused, Reason.HOST_REFUSED),
        (ConfigError, Reason.SETTINGS),
        (MemoryError, Reason.MEMORY),
    )
    return next((reason for kind, reason in kinds if isinstance(error, kind)), None)
