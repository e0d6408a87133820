"""What a host grants its clients: how many, how large, how long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The settings that bound a host, in bytes and seconds. Where one is None, the host decides by its free memory.

    Frames in work and pending steps of all sessions take `frames_bytes`, at least one frame's limit. Above it the
    session with the most is cut.
    """

    sessions: int = 64
    pending: int = 4  # forwards of a session that wait for their backward
    workers: int = 2
    merge_rows: int = 0  # see `engine`
    merge_wait_seconds: float = 0.01
    graph_bytes: int = 1 << 30
    step_memory_bytes: int | None = None  # of one step
    frames_bytes: int | None = None
    frame_limit_bytes: int = 1 << 30
    answer_tokens: int = 1024
    deadline_seconds: float = 60.0
