"""How many files and connections a run opens at once, and whether the system lets this process open so many.

Counted in runs of 5 and of 12 clients in one process: two sockets a client, one file of its own while it reads or
writes, and 16 others. What the port takes stands in serving/door.py.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator

from fedmm.bounds import Mistake
from fedmm.config.derived import sessions
from fedmm.config.settings import Config
from fedmm.serving import door

OTHERS = 64  # models being loaded, the run's folder, stores, Flower's own
A_CLIENT = 3  # a socket, a file and some room, where clients run in this process


def wanted(cfg: Config) -> int:
    """The most that the run opens at once."""
    return OTHERS + A_CLIENT * sessions(cfg) + door.connections(sessions(cfg))


def mistakes(cfg: Config) -> Iterator[Mistake]:
    """What to change where the system does not let this process open so many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and wanted(cfg) > hard:
        yield Mistake(
            "link.sessions",
            f"{sessions(cfg)} sessions need {wanted(cfg)} open files and connections, and this process may have "
            f"{hard}; run `ulimit -n {wanted(cfg)}` before it, or lower link.sessions",
        )


def claim(cfg: Config) -> None:
    """Raise this process's soft limit to what the run needs, where it is below; `mistakes` has seen that it can be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and wanted(cfg) > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted(cfg), hard))
