"""Where a machine keeps what outlives a process: frozen parts under their hash, a client's own state by run.

Everything is written aside and renamed, so that a reader never sees half a file.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from fedmm import tree
from fedmm.types import State


def home() -> Path:
    """FEDMM_HOME, else the user's cache folder."""
    return Path(os.environ.get("FEDMM_HOME") or Path.home() / ".cache" / "fedmm")


def save(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a state so that it is there whole or not at all."""
    data = safetensors.torch.save({name: t.detach().contiguous() for name, t in state.items()}, metadata)
    write(path, data)


def write(path: Path, data: bytes) -> None:
    """Write a file aside, flush it to the disk, rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def load_parts(digest: str) -> State | None:
    """The frozen parts with this hash, or None where they are not here or are not what they claim."""
    path = home() / "edge" / f"{_name(digest)}.safetensors"
    if not path.exists():
        return None
    try:
        parts = safetensors.torch.load_file(path)
    except SafetensorError:
        return None
    return parts if tree.digest(parts) == digest else None


def save_parts(digest: str, parts: State) -> None:
    save(parts, home() / "edge" / f"{_name(digest)}.safetensors")


def load_kept(run: str, client: int, round: int) -> State | None:
    """What the client kept at the end of `round` of this run, or None if it took part in none before."""
    return safetensors.torch.load_file(path) if (path := _kept(run, client, round)).exists() else None


def save_kept(run: str, client: int, round: int, state: State, needed: int) -> None:
    """Keep the client's own state of `round`. Those before `needed`, the last that the server knows of, go.

    `needed` itself stays: until the server has this round's update it will ask for that one again.
    """
    save(state, _kept(run, client, round))
    for path in _kept(run, client, round).parent.glob("round_*.safetensors"):
        if int(path.stem.removeprefix("round_")) < needed:
            path.unlink(missing_ok=True)


def _kept(run: str, client: int, round: int) -> Path:
    return home() / "kept" / _name(run) / f"client_{client:04d}" / f"round_{round:04d}.safetensors"


def _name(text: str) -> str:
    """A name that came over the network, fit for a path."""
    if not re.fullmatch(r"[0-9A-Za-z_-]{1,128}", text):
        raise ValueError(f"{text!r} is no name of a run or hash")
    return text
