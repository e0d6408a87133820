"""Every random stream is a function of (seed, purpose, round, client). None is stored, so a resume needs none."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, round: int = 0, client: int = 0) -> torch.Generator:
    """A fresh CPU generator whose stream depends on exactly these four; purposes never share a stream."""
    name = f"{seed}/{purpose}/{round}/{client}".encode()
    state = int.from_bytes(hashlib.sha256(name).digest()[:8], "little") >> 1  # manual_seed takes 63 bits safely
    return torch.Generator().manual_seed(state)


def sample_clients(seed: int, round: int, clients: int, per_round: int) -> list[int]:
    """The clients of one round, in client order, drawn without replacement by (seed, round)."""
    order = torch.randperm(clients, generator=generator(seed, "clients", round))
    return sorted(order[:per_round].tolist())
