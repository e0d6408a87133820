"""The most memory that tensors take at once while some work is done."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """The most that tensors made by `work` took at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Watch() as watch:
        work()
    return watch.peak_bytes


class _Watch(TorchDispatchMode):
    """Adds up the storages that operations make, for as long as they live. What an operation only views is not new."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = self._bytes = 0
        self._live: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        given: set[int] | None = None
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata in self._live:
                continue
            given = given or {own.untyped_storage()._cdata for own in _tensors((*args, *(kwargs or {}).values()))}
            if storage._cdata not in given:
                self._note(storage)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._live[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self._bytes += size
        self.peak_bytes = max(self.peak_bytes, self._bytes)

    def _forget(self, key: int, size: int) -> None:
        del self._live[key]
        self._bytes -= size


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
