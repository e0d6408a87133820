"""Nodes that name a target: which may be named, whether their arguments are there and of their types, and making them.

What arrives over the network may name only targets inside `fedmm.` and `torch.optim.`, and what this machine's
FEDMM_ALLOW_TARGETS adds.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

from beartype.door import is_bearable
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from fedmm.runs.settings import Config, ConfigError

ALLOWED_TARGETS = ("fedmm.", "torch.optim.")


def make(node: Any, *args: Any, **kwargs: Any) -> Any:
    """Instantiate a node of the configuration (a partial becomes a function); None stays None."""
    if node is None:
        return None
    for path, inner in _walk("", node):
        if "_args_" in inner:
            raise ConfigError(f"{path}._args_: name the arguments of {inner['_target_']}")
        locate(str(inner["_target_"]))
    try:
        return instantiate(node, *args, _convert_="all", **kwargs)
    except InstantiationException as error:  # hydra's wrapping hides what the target said
        raise (error.__cause__ or error) from None


def nodes(cfg: Config) -> Iterator[tuple[str, DictConfig]]:
    """Every node that names a target, with its path."""
    yield from _walk("", typing.cast(DictConfig, cfg))


def _walk(path: str, node: Any) -> Iterator[tuple[str, DictConfig]]:
    if isinstance(node, ListConfig) and not node._is_none():
        for i, inner in enumerate(node):
            yield from _walk(f"{path}[{i}]", inner)
    if not isinstance(node, DictConfig) or node._is_none():
        return
    if "_target_" in node:
        yield path, node
    for key in node:
        yield from _walk(f"{path}.{key!s}".lstrip("."), node[key])


def locate(target: str) -> Callable[..., Any]:
    """The function or class that a target names: one that is at home in an allowed package, or a site's own."""
    own = tuple(filter(None, os.environ.get("FEDMM_ALLOW_TARGETS", "").split(",")))
    allowed = (*ALLOWED_TARGETS, *own)
    if not target.startswith(allowed):
        raise ConfigError(f"_target_={target} is outside {', '.join(allowed)}; FEDMM_ALLOW_TARGETS adds to them")
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"_target_={target} does not exist: {error}") from error
    if not callable(found):
        raise ConfigError(f"_target_={target} is a {type(found).__name__}, wanted a function")
    if not (own and target.startswith(own)) and not str(found.__module__).startswith(ALLOWED_TARGETS):
        raise ConfigError(f"_target_={target} is only imported there, from {found.__module__}, which is outside")
    return typing.cast(Callable[..., Any], found)


def mistakes(path: str, node: DictConfig) -> Iterator[str]:
    try:
        function = locate(str(node["_target_"]))
    except ConfigError as error:
        yield f"{path}: {error}"
        return
    parameters = inspect.signature(function).parameters
    known = {n: p for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    hints = hints_of(function)
    given = OmegaConf.to_container(node, resolve=True)
    assert isinstance(given, dict)
    if "_args_" in given:
        yield f"{path}._args_: name the arguments of {node['_target_']}"
    for name, value in given.items():
        if str(name).startswith("_"):
            continue
        if name not in known:
            yield f"{path}.{name!s} is unknown to {node['_target_']}; available options: {', '.join(known)}"
        elif name in hints and not _fits(value, hints[name]):
            yield f"{path}.{name!s} must be {_plain(hints[name])}, got {value!r}"
    needed = [n for n, p in known.items() if p.kind is p.KEYWORD_ONLY and p.default is p.empty and n not in given]
    if needed:
        yield f"{path} lacks {', '.join(needed)} for {node['_target_']}"


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of its arguments, with what `Annotated` says of them; not of one whose type only a checker can name."""
    plain: Any = inspect.unwrap(function.__init__ if inspect.isclass(function) else function)
    found: dict[str, Any] = {}
    for name, hint in getattr(plain, "__annotations__", {}).items():
        one = types.SimpleNamespace(__annotations__={name: hint})
        with contextlib.suppress(NameError):  # imported under TYPE_CHECKING
            found |= typing.get_type_hints(one, getattr(plain, "__globals__", {}), include_extras=True)
    return found


def _fits(value: Any, hint: Any) -> bool:
    if _is_node(value) or (isinstance(value, dict) and value and all(map(_is_node, value.values()))):
        return True  # checked as nodes of their own
    if isinstance(value, int) and not isinstance(value, bool) and is_bearable(float(value), hint):
        return True
    return is_bearable(value, hint)


def _is_node(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def _plain(hint: Any) -> str:
    return hint.__name__ if inspect.isclass(hint) else str(hint).replace("typing.", "")
