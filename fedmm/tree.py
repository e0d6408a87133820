"""Arithmetic on states: pure functions over named tensors, inputs untouched."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from fedmm.types import State


def clone(state: Mapping[str, torch.Tensor]) -> State:
    """A detached copy that shares no memory with `state`."""
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def zeros_like(state: State) -> State:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def joined(**states: Mapping[str, torch.Tensor]) -> State:
    """Several states as one, each name behind its state's: `delta/image.up`."""
    return {f"{part}/{name}": tensor for part, state in states.items() for name, tensor in state.items()}


def parted(tensors: Mapping[str, torch.Tensor], *prefixes: str) -> tuple[State, ...]:
    """The states that `joined` put together. Raises ValueError for a tensor under none of these prefixes."""
    found: dict[str, State] = {prefix: {} for prefix in prefixes}
    for name, tensor in tensors.items():
        part, _, key = name.partition("/")
        if part not in found:
            raise ValueError(f"unknown tensor {name!r}; there are {', '.join(f'{prefix}/...' for prefix in prefixes)}")
        found[part][key] = tensor
    return tuple(found.values())


def moved(state: State, change: State) -> State:
    """`state + change`; what `change` lacks stays as it is."""
    return {name: tensor + change[name] if name in change else tensor for name, tensor in state.items()}


def subtract(left: State, right: State) -> State:
    return {name: left[name] - right[name] for name in left}


def scale(state: State, factor: float) -> State:
    return {name: tensor * factor for name, tensor in state.items()}


def size_bytes(state: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """The sha256 of names, dtypes, shapes and bits, whatever the order of the names: equal digests, equal states."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def mismatch(state: Mapping[str, torch.Tensor], like: State) -> str | None:
    """Why `state` is not like `like` (same names, shapes and dtypes, all finite), or None if it does."""
    if missing := sorted(like.keys() - state.keys()):
        return f"lacks {missing[0]!r} and {len(missing) - 1} more" if len(missing) > 1 else f"lacks {missing[0]!r}"
    if unknown := sorted(state.keys() - like.keys()):
        return f"has {unknown[0]!r}, which the server does not know"
    for name, wanted in like.items():
        came = state[name]
        if came.shape != wanted.shape:
            return f"{name!r} has shape {tuple(came.shape)}, wanted {tuple(wanted.shape)}"
        if came.dtype != wanted.dtype:
            return f"{name!r} is {came.dtype}, wanted {wanted.dtype}"
    return not_finite({name: state[name] for name in like})


def not_finite(state: Mapping[str, torch.Tensor]) -> str | None:
    """What of `state` is not finite, or None if all is."""
    return next((f"{name!r} is not finite" for name, tensor in state.items() if not tensor.isfinite().all()), None)
