"""Folders and files that only their owner may read, whatever the umask; and what is said where a disk takes none.

`replacing` is the one place where a file is written whole or not at all. Runs hold answers and truths of sites,
journals hold their updates, so nothing of it is for other users of a machine.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from fedmm.types import FedmmError

OWNER_FOLDER, OWNER_FILE = 0o700, 0o600
HOME_KNOB = "point FEDMM_HOME to a folder that can be written, on a disk with room"
"""What to do where FEDMM_HOME takes nothing."""


@contextmanager
def named(folder: Path, knob: str) -> Iterator[None]:
    """What fails to be written in here, as an error that names the folder and the knob."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter is how safetensors tells of a full disk
        raise FedmmError(f"{folder} cannot be written: {error}; make room there, or {knob}") from error


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, for the owner alone."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(OWNER_FOLDER, exist_ok=True)


def opened(path: Path, mode: str, **options: Any) -> IO[Any]:
    """`open`; a file that is made by it is for the owner alone."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags, OWNER_FILE), **options)


@contextmanager
def replacing(path: Path, *, public: bool = False, flush: bool = True) -> Iterator[Path]:
    """A new file beside `path`, to be written inside the block; at its end it takes the place of `path`.

    A reader sees the old file or the new one, each whole. If the block raises, the old one stays. The new file, and
    folders that are missing, are for their owner alone; if `public`, the umask decides. Without `flush` a power cut
    may leave a short file under `path`, so its reader must be able to tell.
    """
    path.parent.mkdir(parents=True, exist_ok=True) if public else make_folder(path.parent)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        (open if public else opened)(aside, "xb").close()
        yield aside
        if flush:
            with aside.open("rb+") as file:
                os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def append(path: Path, data: bytes) -> None:
    """Add to the end of a file all of `data`, or nothing where the disk does not take it."""
    with opened(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise
