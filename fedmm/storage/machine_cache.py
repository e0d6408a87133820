"""Where a machine keeps what outlives a process: frozen modules under their hash, a client's own state by run.

Everything is written by `disk.replacing`, so a reader never sees half a file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedmm import tree
from fedmm.storage import disk
from fedmm.types import State

RUN_KNOB = "set run.dir to another folder for a new run; with room, the same command goes on with this one"


def home() -> Path:
    """FEDMM_HOME, else the user's cache folder."""
    return Path(os.environ.get("FEDMM_HOME") or Path.home() / ".cache" / "fedmm")


def save(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a state so that it is there whole or not at all. Raises FedmmError as `write` does."""
    with writing(path.parent), disk.replacing(path) as aside:
        safetensors.torch.save_file({name: t.detach().contiguous() for name, t in state.items()}, aside, metadata)


def write(path: Path, data: bytes, *, public: bool = False) -> None:
    """Write a file so that it is there whole or not at all.

    A `public` one is a page that was asked for by name: who may read it is the umask's to say. Raises FedmmError where
    the disk does not take it, with the folder and the knob.
    """
    failing = disk.named(path.parent, "name another file") if public else writing(path.parent)
    with failing, disk.replacing(path, public=public) as aside:
        aside.write_bytes(data)


def writing(folder: Path) -> AbstractContextManager[None]:
    """For what is written in a folder of this machine's or of a run: it fails with the folder and the knob."""
    return disk.named(folder, disk.HOME_KNOB if folder.is_relative_to(home()) else RUN_KNOB)


def read_ahead(path: Path) -> None:
    """Have the system begin to read a file that will be wanted soon; where it cannot be asked, nothing."""
    if advise := getattr(os, "posix_fadvise", None):  # not on macOS
        with path.open("rb") as file:
            advise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


class Mapped(Mapping[str, Tensor]):
    """The tensors of a file, each mapped anew when it is asked for: its pages leave memory when it does.

    Raises SafetensorError for a file that is not whole.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, "pt") as file:
            self._names = frozenset(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path, "pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def rows(self, name: str) -> Rows:
        """A tensor of which only rows are wanted."""
        with self._path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            start, _ = json.loads(file.read(header_bytes))[name]["data_offsets"]
        return Rows(self._path, 8 + header_bytes + start, self[name].shape, self[name].dtype)


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor in a file, read when they are asked for.

    Of a mapped one they would stay in memory, and what lies around them: 1.2 MB a row on ext4 of Linux 6.18.
    """

    path: Path
    start: int  # where the tensor is in the file
    shape: torch.Size
    dtype: torch.dtype

    def __getitem__(self, rows_N: Tensor) -> Tensor:
        found = torch.empty(len(rows_N), *self.shape[1:], dtype=self.dtype)
        raw = found.view(torch.uint8).numpy()
        with self.path.open("rb", buffering=0) as file:
            for into, row in zip(raw, rows_N.tolist(), strict=True):
                file.seek(self.start + row * into.nbytes)
                file.readinto(into.data)
        return found


def load_modules(digest: str) -> Mapped | None:
    """The frozen modules of this hash, or None where they are not here or their file is not whole.

    They had it when they were saved; to hash what may be a gigabyte in every process would read it all.
    """
    try:
        return Mapped(_modules(digest))
    except (FileNotFoundError, NotADirectoryError, SafetensorError):
        return None


def save_modules(digest: str, modules: State) -> None:
    """Keep the frozen modules. Raises ValueError where they have another hash, or odd names that could imitate one."""
    if odd := [name for name in modules if not re.fullmatch(r"[\w./-]{1,256}", name, re.ASCII)]:
        raise ValueError(f"the host's frozen modules have a tensor with the name {odd[0][:100]!r}")
    if (came := tree.digest(modules)) != digest:
        raise ValueError(f"the host's frozen modules have hash {came[:12]}, its card says {digest[:12]}")
    save(modules, _modules(digest))


def load_private(run: str, client: int, round: int) -> State | None:
    """What the client kept at the end of `round` of this run, or None if it took part in none before."""
    return safetensors.torch.load_file(path) if (path := _kept(run, client, round)).exists() else None


def save_private(run: str, client: int, round: int, state: State, needed: int) -> None:
    """Keep the client's own state of `round`, and that of `needed`, the last round that the server knows of: until it
    has this round's update it will ask for that one again. Others before this round go; a later one stays, which a
    client that was given up in this round and ended late would take away.
    """
    save(state, _kept(run, client, round))
    for path in _kept(run, client, round).parent.glob("round_*.safetensors"):
        if (other := int(path.stem.removeprefix("round_"))) < round and other != needed:
            path.unlink(missing_ok=True)


def _modules(digest: str) -> Path:
    return home() / "edge" / f"{_name(digest)}.safetensors"


def _kept(run: str, client: int, round: int) -> Path:
    return home() / "kept" / _name(run) / f"client_{client:04d}" / f"round_{round:04d}.safetensors"


def _name(text: str) -> str:
    """A name that came over the network, fit for a path."""
    if not re.fullmatch(r"[0-9A-Za-z_-]{1,128}", text):
        raise ValueError(f"{text!r} is no name of a run or hash")
    return text
