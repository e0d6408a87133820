"""Nodes that name a target: which targets are allowed, whether their arguments are complete and typed, and making them.

A target is a function's name, and a run calls it. So a configuration may name only what a file of `conf/` names at the
same place (`rule`, `method.step`, `dataset.of.*`), or a file of a folder in this machine's FEDMM_CONF, and what its
FEDMM_ALLOW_TARGETS adds to those places.
This is checked before anything is imported. A rule such as "inside fedmm" is too wide: fedmm has functions that write
files.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from beartype.door import is_bearable
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from fedmm.bounds import Mistake, hints_of, outside
from fedmm.config.settings import Config, ConfigError
from fedmm.types import READ_PATH


def folder() -> Path:
    """Where the yaml files are: beside the package in a checkout and in a Flower bundle, inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def folders() -> tuple[Path, ...]:
    """Where this process finds yaml files: the package's own, and those that its FEDMM_CONF names, with : between them.
    Of two with one name the first counts."""
    return folder(), *(Path(own).absolute() for own in os.environ.get("FEDMM_CONF", "").split(os.pathsep) if own)


def environment() -> tuple[str, ...]:
    """What this process's environment adds to a configuration: as a key for what is kept of one."""
    return tuple(os.environ.get(f"FEDMM_{name}", "") for name in ("DATA", "ALLOW_TARGETS", "CONF"))


_MOVED = {
    "fedmm.edge.schema.": "fedmm.adapters.schema.",
    "fedmm.edge.inner.": "fedmm.adapters.inner.",
    "fedmm.stages.captions.own": "fedmm.stages.captions.by_host",
}


def renamed(text: str) -> str:
    """A configuration or a record of an older version, with the names that its targets have today."""
    for before, now in _MOVED.items():
        text = text.replace(before, now)
    return text


def make(node: Any) -> Any:
    """Instantiate a node of the configuration (a partial becomes a function); None stays None.

    A partial is the same object for the same content, so that a process with many clients makes it once, and what is
    computed from it can be kept under it. It must hold nothing of a client.
    """
    if node is None:
        return None
    if not node.get("_partial_"):
        return _instantiated(node)
    values = OmegaConf.to_container(node, resolve=True)
    return _partial(_Content(repr(values), values), environment())


@dataclass(frozen=True)
class _Content:
    """What a node says, as a key."""

    text: str
    values: Any = field(compare=False)


@functools.lru_cache(maxsize=128)
def _partial(content: _Content, _environment: tuple[str, ...]) -> Callable[..., Any]:
    return typing.cast(Callable[..., Any], _instantiated(OmegaConf.create(content.values)))


def _instantiated(node: DictConfig) -> Any:
    anywhere = frozenset().union(*listed().values())
    for path, _, inner in _walk(node):
        if "_args_" in inner:
            raise ConfigError(f"{path}._args_: name the arguments of {inner['_target_']}")
        if not _admitted(str(inner["_target_"]), anywhere):
            raise ConfigError(f"_target_={inner['_target_']} is named by no file of conf/, nor by FEDMM_ALLOW_TARGETS")
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:  # hydra's wrapping hides what the target said
        raise (error.__cause__ or error) from None


def nodes(cfg: Config) -> Iterator[tuple[str, DictConfig]]:
    """Every node that names a target, with its path."""
    yield from ((path, node) for path, _, node in _walk(cfg))


def unlisted(cfg: DictConfig) -> Iterator[str]:
    """Every target that may not stand where it does, one line each. Imports nothing."""
    for _, place, node in _walk(cfg):
        target, known = str(node["_target_"]), listed().get(place, frozenset())
        if not known:
            yield f"{place} takes no _target_, got {target}; no file of conf/ has one there"
        elif not _admitted(target, known):
            yield (
                f"{place}._target_={target} is not allowed; conf/ names {', '.join(sorted(known))} there, and "
                "FEDMM_ALLOW_TARGETS adds to them"
            )


def paths_read(cfg: Config, groups: Sequence[str]) -> Iterator[tuple[str, str, bool]]:
    """What these groups read from this machine's disk or from a hub: each setting that names it, its value, and
    whether a file of `conf/` has the same value at the same place, as for a public dataset."""
    for path, place, node in _walk(cfg):
        if path.split(".")[0] in groups:
            hints = hints_of(locate(str(node["_target_"])))
            for name in (str(key) for key in node if READ_PATH in str(hints.get(str(key)))):
                values = node[name].values() if isinstance(node[name], DictConfig) else [node[name]]
                known = _values(folders()).get(f"{place}.{name}", frozenset())
                yield from ((f"{path}.{name}", str(v), str(v) in known) for v in values if v is not None)


def listed() -> dict[str, frozenset[str]]:
    """The targets that this process's yaml files name, by place."""
    return _listed(folders())


@functools.lru_cache(maxsize=8)
def _listed(folders: tuple[Path, ...]) -> dict[str, frozenset[str]]:
    values = _values(folders).items()
    return {place[: -len("._target_")]: named for place, named in values if place.endswith("._target_")}


@functools.lru_cache(maxsize=8)
def _values(folders: tuple[Path, ...]) -> dict[str, frozenset[str]]:
    """What the yaml files set in nodes that name a target, by place; an interpolation is no value."""
    found: dict[str, frozenset[str]] = {}
    for path in sorted(path for folder in folders for path in folder.glob("*/*.yaml")):
        text = path.read_text()
        file = OmegaConf.create(text.replace("${", "$<"))  # a file by itself has nothing that it could refer to
        prefix = "" if text.startswith("# @package _global_") else path.parent.name
        for _, place, node in _walk(file, prefix, prefix):
            for name, value in node.items():
                found[f"{place}.{name!s}"] = found.get(f"{place}.{name!s}", frozenset()) | {str(value)}
    return found


def _admitted(target: str, listed: frozenset[str]) -> bool:
    """Whether a target may be named where `conf/` names those `listed`. An entry of FEDMM_ALLOW_TARGETS is a whole
    name, or everything below a package where it ends in a dot."""
    own = filter(None, os.environ.get("FEDMM_ALLOW_TARGETS", "").split(","))
    return target in listed or any(target.startswith(name) if name.endswith(".") else target == name for name in own)


def _walk(node: Any, path: str = "", place: str = "") -> Iterator[tuple[str, str, DictConfig]]:
    """Every node in here that names a target, with its path, and with the place that `conf/` knows it by: in a mapping
    of nodes by name (`dataset.of`) the name is free, and the place has a * for it."""
    if isinstance(node, ListConfig) and not node._is_none():
        for i, inner in enumerate(node):
            yield from _walk(inner, f"{path}[{i}]", f"{place}[{i}]")
    if not isinstance(node, DictConfig) or node._is_none():
        return
    if "_target_" in node:
        yield path, place, node
    free = (
        place and "_target_" not in node and all(isinstance(v, DictConfig) and "_target_" in v for v in node.values())
    )
    for key in node:
        own = "*" if free else key
        yield from _walk(node[key], f"{path}.{key!s}".lstrip("."), f"{place}.{own!s}".lstrip("."))


def locate(target: str) -> Callable[..., Any]:
    """The function or class that a target names. Raises ConfigError where there is none."""
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"_target_={target} does not exist: {error}") from error
    if not callable(found):
        raise ConfigError(f"_target_={target} is a {type(found).__name__}, wanted a function")
    return typing.cast(Callable[..., Any], found)


def mistakes(path: str, node: DictConfig) -> Iterator[Mistake]:
    """What is wrong with a node's settings by the signature of what it names: names, types and bounds."""
    try:
        function = locate(str(node["_target_"]))
    except ConfigError as error:
        yield Mistake(path, f"{path}: {error}")
        return
    parameters = _parameters(function)
    hints = hints_of(function)
    given = OmegaConf.to_container(node, resolve=True)
    assert isinstance(given, dict)
    if "_args_" in given:
        yield Mistake(path, f"{path}._args_: name the arguments of {node['_target_']}")
    for name, value in ((str(name), value) for name, value in given.items() if not str(name).startswith("_")):
        if name not in parameters:
            options = ", ".join(parameters)
            yield Mistake(path, f"{path}.{name} is unknown to {node['_target_']}; available options: {options}")
        elif name in hints and not _fits(value, hints[name]):
            yield Mistake(f"{path}.{name}", f"{path}.{name} must be {_plain(hints[name])}, got {value!r}")
        elif name in hints:
            yield from outside(f"{path}.{name}", value, hints[name])
    needed = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and p.default is p.empty and n not in given]
    if needed:
        yield Mistake(path, f"{path} lacks {', '.join(needed)} for {node['_target_']}")


def settings_of(node: Any) -> dict[str, Any]:
    """The settings of what a node names: as given, else by default. Raises ConfigError where it names nothing."""
    given = typing.cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))
    defaults = _parameters(locate(str(given["_target_"]))).items()
    return {name: given.get(name, p.default) for name, p in defaults if name in given or p.default is not p.empty}


def beside(node: Any, name: str) -> Callable[..., Any] | None:
    """The function of that name that is written in the file of what a node names, where there is one."""
    module = str((node or {}).get("_target_", "")).rpartition(".")[0]
    try:
        function = locate(f"{module}.{name}")
    except ConfigError:
        return None
    return function if inspect.isfunction(function) and function.__module__ == module else None


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters that a setting can be given to."""
    parameters = inspect.signature(function).parameters
    return {n: p for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}


def _fits(value: Any, hint: Any) -> bool:
    if _is_node(value) or (isinstance(value, dict) and value and all(map(_is_node, value.values()))):
        return True  # checked as nodes of their own
    if isinstance(value, int) and not isinstance(value, bool) and is_bearable(float(value), hint):
        return True
    return is_bearable(value, hint)


def _is_node(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def _plain(hint: Any) -> str:
    """A type as a person reads it, without what `Annotated` adds."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _plain(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join("None" if one is type(None) else _plain(one) for one in arguments)
    return hint.__name__ if inspect.isclass(hint) and not arguments else str(hint).replace("typing.", "")
