"""The `fisher` rule over a thousand clients: its time beside that of reading their updates, and its peak memory.

Updates come as in a run, one file after another through `RunFolder.updates`. Of a few files that are read again and
again, so that they lie in the page cache and no disk is measured; and of as many files as clients, which the system was
told to forget before. Reading is `read_bytes`: every byte copied once, nothing done.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fedmm import seeds
from fedmm.aggregate.fisher import fisher
from fedmm.bench.common import Case, Size, in_turn, median_ms
from fedmm.edge.base import KINDS
from fedmm.runs.folder import RunFolder
from fedmm.storage.memory import peak_rss_bytes, rss_bytes
from fedmm.types import State, Update

CLIENTS, WIDTH = {"toy": 50, "real": 1000}, {"toy": 64, "real": 4096}
RANK = 64  # at width 4096, with an adapter each for image and text: 1.05M parameters
FILES = 8  # of the page cache
ON_DISK = {"toy": 8, "real": 1000}  # clients; 8.4 MB each at real size
FEW, MANY = 10, 200  # clients whose peaks are compared
ROUNDS = 3


def cases(size: Size) -> Iterator[Case]:
    """Time and memory. Bars are of real size."""
    width = WIDTH[size]
    time_bar, memory_bar = (2.0, 1.2) if size == "real" else (None, None)
    with TemporaryDirectory() as path:
        folder = _open(Path(path))
        for client in range(max(FILES, ON_DISK[size])):
            generator = seeds.generator(0, "update", client=client % FILES)
            folder.save_update(1, Update(client, _state(width, generator), 100, _state(width, generator)))
        yield _time(folder, width, [client % FILES for client in range(CLIENTS[size])], time_bar)
        yield _time(folder, width, list(range(ON_DISK[size])), time_bar, from_disk=True)
        yield _memory(folder, width, memory_bar)


def _time(folder: RunFolder, width: int, clients: list[int], bar: float | None, *, from_disk: bool = False) -> Case:
    """The rule over all clients, over reading the same bytes."""
    files = sorted(folder.path.glob("journal/*/*.safetensors"))

    def read() -> None:
        for client in clients:
            files[client].read_bytes()

    runs = {"rule": lambda: _merge(folder, width, clients), "read": read}
    seconds = in_turn(runs, ROUNDS, lambda: _forget(files) if from_disk else None)
    rule, reading = (median_ms(seconds[name]) / len(clients) for name in ("rule", "read"))
    detail = {"rule_ms_a_client": rule, "read_ms_a_client": reading, "median_of": ROUNDS}
    where = "from the disk" if from_disk else "from the page cache"
    return Case(
        "aggregate", f"fisher over reading, {len(clients)} clients {where}", rule / reading, "times", bar, detail=detail
    )


def _forget(files: list[Path]) -> None:
    """Have the system drop these files from its page cache; to a file system in memory, as some /tmp is, nothing."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if advise := getattr(os, "posix_fadvise", None):  # not on macOS
                advise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _memory(folder: RunFolder, width: int, bar: float | None) -> Case:
    """What many clients take at the peak over what few take, each in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        few, many = (pool.submit(_growth_bytes, folder.path, width, clients).result() for clients in (FEW, MANY))
    detail = {"few_bytes": few, "many_bytes": many}
    return Case("aggregate", f"peak memory, {MANY} clients over {FEW}", many / few, "times", bar, detail=detail)


def _growth_bytes(path: Path, width: int, clients: int) -> int:
    torch.set_num_threads(1)
    before = rss_bytes()
    _merge(_open(path), width, [client % FILES for client in range(clients)])
    return peak_rss_bytes() - before


def _merge(folder: RunFolder, width: int, clients: list[int]) -> None:
    current = {name: torch.zeros_like(tensor) for name, tensor in _state(width, seeds.generator(0, "current")).items()}
    fisher(current, folder.updates(1, clients), {})


def _state(width: int, generator: torch.Generator) -> State:
    """The adapters of an edge; never negative, so that it may be a Fisher too."""
    shapes = {"down": (RANK, width), "up": (width, RANK)}
    return {f"{kind}.{name}": torch.rand(shapes[name], generator=generator) for kind in KINDS for name in shapes}


def _open(path: Path) -> RunFolder:
    return RunFolder(path, "bench: aggregate\n", [])
