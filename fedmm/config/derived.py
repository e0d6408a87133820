"""What follows from a configuration without being one of its settings, asked for in more than one place."""

from __future__ import annotations

import ipaddress
from typing import Any

import torch

from fedmm.adapters import schema as schemas
from fedmm.adapters.privacy import EVERYTHING_MAY_LEAVE, Privacy
from fedmm.config.settings import Config, LinkConfig
from fedmm.config.targets import make
from fedmm.edge.base import KINDS
from fedmm.serving.limits import Limits
from fedmm.types import State


def encrypted(link: LinkConfig) -> bool:
    """Whether the link is TLS: tensors of a run may cross a network in the clear only where that was asked for."""
    if link.tls != "auto":
        return link.tls == "always"
    return not all(map(is_loopback, filter(None, (link.bind, link.address))))


def is_loopback(address: str) -> bool:
    """Whether host:port is this machine's own loopback: `localhost`, or an IP address of 127.0.0.0/8 or ::1.

    Any other name is not, whatever it looks like: 127.0.0.1.example.org is wherever its owner says.
    """
    host = _host(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host(address: str) -> str:
    """The host of host, host:port, [IPv6], [IPv6]:port, or of an IPv6 address by itself."""
    if address.startswith("["):
        host, _, port = address[1:].partition("]")
        return host if not port or port.startswith(":") else ""
    host, _, port = address.partition(":")
    return address if ":" in port else host


def at_client(cfg: Config) -> bool:
    """Whether clients run the whole model themselves."""
    return cfg.llm.get("where") == "client"


def per_round(cfg: Any) -> int:
    """How many clients train in a round."""
    return min(cfg.clients_per_round or cfg.clients, 1 if cfg.pooled else cfg.clients)


def sessions(cfg: Config) -> int:
    """How many sessions the host has: a client has one at most."""
    return min(cfg.link.sessions, cfg.clients)


def host_limits(cfg: Config) -> Limits:
    """What the host grants clients."""
    link = cfg.link
    return Limits(
        sessions=sessions(cfg),
        pending=link.pending,
        workers=link.workers,
        merge_rows=link.merge_rows,
        merge_wait_seconds=link.merge_wait_ms / 1000,
        graph_bytes=link.graphs_mb << 20,
        step_memory_bytes=link.step_memory_mb << 20 if link.step_memory_mb else None,
        frames_bytes=link.frames_mb << 20 if link.frames_mb else None,
        frame_limit_bytes=link.frame_limit_mb << 20,
        answer_tokens=cfg.evaluate.max_tokens,
        deadline_seconds=link.deadline_seconds,
    )


def client_rank(cfg: Config, client: int) -> int:
    """The rank of a client's NanoAdapters."""
    return cfg.edge.ranks[client % len(cfg.edge.ranks)] if cfg.edge.ranks else cfg.edge.rank


def personal(cfg: Any) -> bool:
    """Whether each client ends with a model of its own: it keeps something that acts."""
    acting = {"shared" if name == "frozen" else name for name in cfg.method.use}
    return any(name.split(".")[0] in acting for name in private_names(cfg))


def private_names(cfg: Any) -> list[str]:
    """What clients train and never send, with its set in front."""
    names = [f"{name}.{key}" for name in cfg.method.sets for key in zeros(cfg)]
    schema = make(cfg.get("schema")) or schemas.everything  # of a run from before there were schemas
    return schemas.private(schema, cfg.rounds, names)


def privacy(cfg: Config) -> Privacy:
    """With `link.local=dense` the sets that hold something a client keeps are private, and so is the frozen copy of
    such a shared set."""
    if cfg.link.local != "dense":
        return EVERYTHING_MAY_LEAVE
    sets = {name.split(".")[0] for name in private_names(cfg)}
    return Privacy(frozenset(sets | ({"frozen"} if "shared" in sets else set())))


def zeros(cfg: Any) -> State:
    """A set of adapters with the names and ranks of this run's, one wide; one inside edge or LLM stands for all."""
    R, r, inner = max(cfg.edge.rank, 0), max(cfg.edge.lora.rank, 0), (cfg.get("inner") or {}).get("rank", 0)
    if cfg.get("head") == "classes":
        beside = {"retrained.weight": (1, 1), "retrained.bias": (1,), "gradients": (1, 1, 2)}
        network = {"trunk.weight": (1, 1, 1, 1), "head.weight": (1, 1), "head.bias": (1,)}
        return {n: torch.zeros(s) for n, s in (network | (beside if cfg.method.retrained else {})).items()}
    factors = {f"{kind}.down": (R, 1) for kind in KINDS} | {f"{kind}.up": (1, R) for kind in KINDS} if R else {}
    factors |= {"encoder.lora_A": (r, 1), "encoder.lora_B": (1, r)} if r else {}
    a, b = ("bottleneck_down", "bottleneck_up") if "alpha" not in (cfg.get("inner") or {}) else ("lora_A", "lora_B")
    factors |= {f"llm.{a}": (inner, 1), f"llm.{b}": (1, inner)} if inner else {}
    return {name: torch.zeros(shape) for name, shape in factors.items()}


def scale(adapters: Any) -> float:
    """alpha / r of a node of adapters; 0 where it has none."""
    return float(adapters.get("alpha", 0.0) / adapters["rank"]) if adapters.get("rank") else 0.0
