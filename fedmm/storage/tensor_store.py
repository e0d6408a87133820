"""Tensors by (owner, key), in memory and then on disk: bounded in both, the oldest forgotten first.

Where there is too much, the owner who holds most bytes gives up its oldest, so that nobody pushes out everybody else's.
An entry is in one place: in memory, then in `folder/owner/key.safetensors`, then nowhere. Whoever gets None makes the
tensor again; so nothing that happens to a disk is an error here.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedmm.storage import disk

log = logging.getLogger("fedmm.storage.tensor_store")
V = TypeVar("V")

_NAME = re.compile(r"(?!\.)[0-9A-Za-z_.-]{1,128}")
_ASIDE = re.compile(r"\..+\.safetensors\.[0-9a-f]{32}|\.tmp\w{6}")  # the latter is safetensors' own, from 0.8
_ASIDE_SECONDS = 3600.0  # a file still aside after this long is of a process that was killed
_LEAST_BYTES = (
    1024  # what an entry counts at least, or a flood of empty tensors had no bound; a file's header fits in it
)


class Store:
    """A bounded store, safe for threads. The tensors put and handed out are the stored ones: nobody may write to them.

    Processes may share `folder`: each finds what the others wrote, and age means last use by any of them.
    """

    def __init__(
        self,
        *,
        memory_bytes: int,
        folder: Path | None = None,
        disk_bytes: int = 0,
        ephemeral: bool = False,
        knobs: str = "link.cache_memory_mb or link.cache_disk_mb",
    ) -> None:
        """`folder` is the store's own: its oldest files get deleted. `knobs` are what an error says to raise."""
        self._memory: _Tier[Tensor] = _Tier(memory_bytes)
        self._disk = _Disk(folder or Path(), disk_bytes if folder else 0, knobs)
        self._ephemeral = ephemeral
        self._knobs = knobs
        self._lock = threading.Lock()  # held over reads from disk too: they map a file (70 us) and read no data

    def get(self, owner: str, key: str) -> Tensor | None:
        """The tensor, from now on the newest, or None where it is unknown or forgotten.

        What is on disk stays there: it left because memory is full, and a file in use is in the page cache anyway.
        """
        _check(owner, key)
        with self._lock:
            tensor = self._memory.get(owner, key)
            return self._disk.read(owner, key) if tensor is None else tensor

    def put(self, owner: str, key: str, tensor: Tensor) -> None:
        """Keep the tensor as the newest, in place of an older one of this name.

        Raises ValueError for a bad name and for a tensor that fits neither into memory nor onto the disk.
        """
        _check(owner, key)
        in_memory = self._memory.fits(tensor.nbytes)
        if not in_memory and not self._disk.fits(tensor):
            raise ValueError(
                f"a tensor of {tensor.nbytes} bytes fits neither into {self._memory.limit_bytes} bytes of memory "
                f"nor onto {self._disk.limit_bytes} bytes of disk; raise {self._knobs}"
            )
        tensor = _alone(tensor)
        with self._lock:
            if in_memory:
                self._disk.remove(owner, key)  # or the older one would be back when this one is forgotten
                self._memory.add(owner, key, tensor, tensor.nbytes)
            else:
                self._memory.pop(owner, key)
                self._disk.write(owner, key, tensor)
            for gone in self._memory.overflow():
                self._disk.write(*gone)

    def has(self, owner: str, key: str) -> bool:
        """Whether it is here; its age stays. A `get` may still find that the file is not whole."""
        _check(owner, key)
        with self._lock:
            return (owner, key) in self._memory or self._disk.has(owner, key)

    def __len__(self) -> int:
        """The entries this process knows of."""
        with self._lock:
            return len(self._memory) + len(self._disk.held)

    @property
    def memory_used_bytes(self) -> int:
        with self._lock:
            return self._memory.used_bytes

    @property
    def disk_used_bytes(self) -> int:
        with self._lock:
            return self._disk.held.used_bytes

    def close(self) -> None:
        """Drop the memory; where `ephemeral`, delete the files that this Store wrote, and folders left empty."""
        with self._lock:
            self._memory = _Tier(self._memory.limit_bytes)
            if self._ephemeral:
                self._disk.delete_written()


class _Tier(Generic[V]):
    """Values with their sizes, by owner and key, each owner's oldest first."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._entries: dict[str, dict[str, tuple[V, int]]] = {}
        self._owner_bytes: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(map(len, self._entries.values()))

    def __contains__(self, name: tuple[str, str]) -> bool:
        owner, key = name
        return key in self._entries.get(owner, {})

    @property
    def used_bytes(self) -> int:
        return self._owner_bytes.total()

    def fits(self, size_bytes: int) -> bool:
        """Whether an entry of this size could be here alone."""
        return max(size_bytes, _LEAST_BYTES) <= self.limit_bytes

    def get(self, owner: str, key: str) -> V | None:
        """The value, from now on its owner's newest."""
        if (owner, key) not in self:
            return None
        entries = self._entries[owner]
        entries[key] = entries.pop(key)
        return entries[key][0]

    def add(self, owner: str, key: str, value: V, size_bytes: int) -> None:
        """Hold the value as its owner's newest; `overflow` then brings the tier back within its bound."""
        self.pop(owner, key)
        counted_bytes = max(size_bytes, _LEAST_BYTES)
        self._entries.setdefault(owner, {})[key] = value, counted_bytes
        self._owner_bytes[owner] += counted_bytes

    def pop(self, owner: str, key: str) -> None:
        if (owner, key) in self:
            self._owner_bytes[owner] -= self._entries[owner].pop(key)[1]
            if not self._entries[owner]:
                del self._entries[owner], self._owner_bytes[owner]

    def overflow(self) -> Iterator[tuple[str, str, V]]:
        """Take out what is too much: again and again the oldest of the owner who holds most bytes."""
        while self.used_bytes > self.limit_bytes:
            owner = max(self._owner_bytes, key=self._owner_bytes.__getitem__)
            key, (value, _) = next(iter(self._entries[owner].items()))
            self.pop(owner, key)
            yield owner, key, value


class _Disk:
    """A file for each entry; with a limit of 0 there is none. Other processes write and delete here at any time."""

    def __init__(self, folder: Path, limit_bytes: int, knobs: str) -> None:
        self.limit_bytes, self._knobs = limit_bytes, knobs
        self._folder = folder
        self._written: set[Path] = set()
        self._warned = False
        self._scan()

    def fits(self, tensor: Tensor) -> bool:
        return self.held.fits(tensor.nbytes + _LEAST_BYTES)

    def has(self, owner: str, key: str) -> bool:
        return self.limit_bytes > 0 and self._path(owner, key).is_file()

    def read(self, owner: str, key: str) -> Tensor | None:
        """The tensor, mapped from its file. A file that is not whole goes; a wrong bit in a whole one is not noticed.

        `safe_open` maps on CPU: 64 MiB read and summed took 0 MiB of anonymous memory, and 64 MiB by `load(bytes)`.
        """
        if not self.limit_bytes:
            return None
        path = self._path(owner, key)
        try:
            with safe_open(path, "pt") as file:
                tensor: Tensor = file.get_tensor("tensor")
            size_bytes = path.stat().st_size
        except SafetensorError:
            self.remove(owner, key)
        except (OSError, RuntimeError):  # gone, or too many files are open; torch says RuntimeError for both
            self.held.pop(owner, key)
        else:
            _touch(path)
            self._hold(owner, key, size_bytes)
            return tensor
        return None

    def write(self, owner: str, key: str, tensor: Tensor) -> None:
        """Write the tensor's file whole. Where the disk does not take it, no file of this name is left.

        Not flushed: a file that a power cut left short is not whole, so it counts as absent.
        """
        if not self.fits(tensor):
            return
        path = self._path(owner, key)
        try:
            with disk.replacing(path, flush=False) as aside:
                save_file({"tensor": tensor}, aside)
                size_bytes = aside.stat().st_size
                _touch(aside)
        except (OSError, SafetensorError) as error:  # the latter is how safetensors reports a full disk
            self.remove(owner, key)
            if not self._warned:
                log.warning(
                    "%s does not take all tensors; going on without those: %s; make room there, or lower %s",
                    self._folder, error, self._knobs,
                )  # fmt: skip
            self._warned = True
            return
        self._written.add(path)
        self._hold(owner, key, size_bytes)
        self._unseen_bytes += size_bytes
        if self._unseen_bytes > self.limit_bytes // 8:  # what others write meanwhile exceeds the bound by no more
            self._scan()

    def remove(self, owner: str, key: str) -> None:
        self.held.pop(owner, key)
        if self.limit_bytes:
            self._delete(self._path(owner, key))

    def delete_written(self) -> None:
        for path in list(self._written):
            self.remove(path.parent.name, path.stem)
        for folder in (*_listed(self._folder), self._folder) if self.limit_bytes else ():
            with suppress(OSError):  # not empty, or no folder
                folder.rmdir()

    def _scan(self) -> None:
        """Take up what is in the folder, the oldest first, and clear away what killed processes left."""
        self.held: _Tier[Path] = _Tier(self.limit_bytes)
        self._unseen_bytes = 0
        found = []
        for path in (path for owner in _listed(self._folder) for path in _listed(owner)) if self.limit_bytes else ():
            with suppress(OSError):  # gone meanwhile
                status = path.stat()
                if path.suffix == ".safetensors" and _NAME.fullmatch(path.stem) and _NAME.fullmatch(path.parent.name):
                    found.append((status.st_mtime_ns, path, status.st_size))
                elif _ASIDE.fullmatch(path.name) and status.st_mtime < time.time() - _ASIDE_SECONDS:
                    _unlink(path)
        for _, path, size_bytes in sorted(found):
            self._hold(path.parent.name, path.stem, size_bytes)

    def _hold(self, owner: str, key: str, size_bytes: int) -> None:
        self.held.add(owner, key, self._path(owner, key), size_bytes)
        for _, _, path in self.held.overflow():
            self._delete(path)

    def _delete(self, path: Path) -> None:
        self._written.discard(path)
        _unlink(path)

    def _path(self, owner: str, key: str) -> Path:
        return self._folder / owner / f"{key}.safetensors"


def _check(*names: str) -> None:
    """Names come over the network in part, and become paths."""
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name[:40]!r} names no tensor; wanted 1 to 128 of 0-9 A-Z a-z _ . - and no dot first")


def _alone(tensor: Tensor) -> Tensor:
    """The tensor without what else its storage holds: a view would keep a big received buffer alive."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # no folder, or not any more
        return []


def _touch(path: Path) -> None:
    """Make the file the newest, by the fine clock: what a file system notes by itself is the same for some ms."""
    with suppress(OSError):  # a folder that may only be read
        os.utime(path, ns=(time.time_ns(),) * 2)


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
