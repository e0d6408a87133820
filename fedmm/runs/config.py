"""Configuration: Hydra composes `conf/` from one list of overrides, the same on the server and on every client.

Everything is checked before anything starts, and every mistake is reported at once. What arrives over the network
may name only targets inside `fedmm.` and `torch.optim.`, and what this machine's FEDMM_ALLOW_TARGETS adds.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import shlex
import threading
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from beartype.door import is_bearable
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedmm.aggregate import lowrank, trimmed
from fedmm.edge import schema as schemas
from fedmm.edge.adapters import cut
from fedmm.edge.base import KINDS
from fedmm.runs.settings import AT_LEAST, ONE_OF, PLACES, SETS, Config, LinkConfig
from fedmm.types import State, Update

ALLOWED_TARGETS = ("fedmm.", "torch.optim.")
STAGES = ("captions", "pretrain", "align")  # groups of what the server does beside the rounds
FOLDING = "stack"  # the rule that folds products into the base
OF_PAIRS = ("exact_lowrank", FOLDING, "hetlora")  # rules that look at B and A together
_GLOBAL_HYDRA = threading.Lock()  # hydra composes in a process-wide singleton


class ConfigError(ValueError):
    """The overrides ask for something that is not there or cannot be; the message lists every mistake."""


ConfigStore.instance().store(name="types", node=Config)


def encrypted(link: LinkConfig) -> bool:
    """Whether the link is TLS: tensors of a run may cross a network in the clear only where that was asked for."""
    if link.tls != "auto":
        return link.tls == "always"
    return not all(map(_is_loopback, filter(None, (link.bind, link.address))))


def _is_loopback(address: str) -> bool:
    host = address.rsplit(":", 1)[0]
    return host in ("localhost", "[::1]") or host.startswith("127.")


def folder() -> Path:
    """Where the yaml files are: beside the package in a checkout and in a Flower bundle, inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def options(group: str) -> list[str]:
    """The names one may choose for a group, which are its files."""
    return sorted(path.stem for path in (folder() / group).glob("*.yaml"))


def groups() -> list[str]:
    return sorted(path.name for path in folder().iterdir() if path.is_dir())


def split(overrides: str) -> list[str]:
    """The one scalar that Flower's run config carries, as a list of overrides; quotes work as in a shell."""
    try:
        return shlex.split(overrides)
    except ValueError as error:
        raise ConfigError(f"overrides cannot be split: {error}: {overrides!r}") from error


def compose(overrides: Sequence[str] = ()) -> Config:
    """The configuration these overrides describe, read-only. Raises ConfigError with the available options.

    Typed as Config; in truth an OmegaConf node of that schema.
    """
    return typing.cast(Config, _compose(tuple(overrides)))


def load(overrides: Sequence[str] = ()) -> Config:
    """`compose`, then `check`: the one way in. Raises ConfigError with every mistake."""
    cfg = compose(overrides)
    if mistakes := list(check(cfg)):
        raise ConfigError("\n".join(mistakes))
    return cfg


@functools.lru_cache(maxsize=64)  # a client composes the same overrides for every message
def _compose(overrides: tuple[str, ...]) -> DictConfig:
    try:
        with _GLOBAL_HYDRA, initialize_config_dir(str(folder()), version_base="1.3", job_name="fedmm"):
            whole = hydra_compose("config", [*_of_arm(overrides), *overrides], return_hydra_config=True)
            choices = whole.hydra.runtime.choices
            cfg = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
            named = set(map(_key, overrides))
            if "label" not in named and (by_hand := named & {"method", "rule", "schema"}):
                cfg.label = "+".join(choices[group] for group in ("method", "rule", *by_hand & {"schema"}))
            apart = named & {"dataset", "partition"} or not choices["scenario"]
            if "data" not in named and (apart or not cfg.data):
                cfg.data = f"{choices['dataset']}, {choices['partition']}" if apart else choices["scenario"]
            OmegaConf.resolve(cfg)
            typed = OmegaConf.merge(OmegaConf.structured(Config), cfg)  # what an interpolation gave has its type too
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides)) from error
    OmegaConf.set_readonly(typed, True)
    return typing.cast(DictConfig, typed)


def _of_arm(overrides: Sequence[str]) -> list[str]:
    """What the file of a named arm sets, as overrides, where an experiment is named too: Hydra composes that after the
    arm, and it would win."""
    named = {_key(override): override.partition("=")[2] for override in overrides}
    if "experiment" not in named or named.get("arm") not in options("arm"):
        return []
    return [quoted(key, value) for key, value in leaves("", _arm_file(named["arm"]))]


def _key(override: str) -> str:
    """What an override sets: +, ++ and ~ in front of it are Hydra's."""
    return override.lstrip("+~").split("=", 1)[0]


def _arm_file(arm: str) -> Any:
    return OmegaConf.load(folder() / "arm" / f"{arm}.yaml")


def _explain(error: Exception, overrides: tuple[str, ...]) -> str:
    """Hydra's message and its cause; where an override names a key that is not there, the keys that are."""
    cause = error.__cause__ or error.__context__
    lines = [str(error) if "vailable options" in str(error) else str(error).split("\n")[0]]
    lines += [str(cause).split("\n")[0]] if cause else []
    unknown = re.search(r"Could not override '([^']+)'", str(error))
    choices = tuple(o for o in overrides if _key(o) in groups())
    if unknown and choices != overrides:  # else a yaml is wrong, and composing it again would be too
        parent = unknown[1].rpartition(".")[0]
        chosen = _compose(choices)
        node = OmegaConf.select(chosen, parent) if parent else chosen
        keys = [str(key) for key in node if not str(key).startswith("_")] if isinstance(node, DictConfig) else []
        names = ", ".join(sorted(keys)) or "none"
        lines.append(f"available options{f' in {parent}' if parent else ''}: {names}")
    return "\n".join(dict.fromkeys(filter(None, lines)))


# ---- checks, all before anything starts -----------------------------------------------------------------------------


def check(cfg: Config) -> Iterator[str]:
    """Every mistake in a composed configuration, one line each, with the knob to turn."""
    for path, low in AT_LEAST.items():
        value = OmegaConf.select(typing.cast(DictConfig, cfg), path)
        if isinstance(value, int | float) and value < low:  # of a step that is off there is none
            yield f"{path} must be at least {low:g}, got {value:g}"
    if cfg.clients_per_round is not None and not 1 <= cfg.clients_per_round <= cfg.clients:
        yield f"clients_per_round must be from 1 to clients={cfg.clients}, got {cfg.clients_per_round}"
    for path, choices in ONE_OF.items():
        if (chosen := OmegaConf.select(typing.cast(DictConfig, cfg), path)) not in choices:
            yield f"{path} must be {' or '.join(choices)}, got {chosen}"
    if cfg.clip_norm is not None and cfg.clip_norm <= 0:
        yield f"clip_norm must be above 0, or null for none, got {cfg.clip_norm:g}"
    yield from _check_head(cfg)
    if cfg.inner and cfg.llm.get("where", "server") == "server":
        yield "inner trains inside the LLM, which llm.where=server keeps there; set llm.where=client, or inner=none"
    if cfg.inner and isinstance(rank := cfg.inner.get("rank"), int) and rank < 1:
        yield f"inner.rank must be at least 1, got {rank}; inner=none trains nothing inside the LLM"
    if not (cfg.edge.rank or cfg.inner):
        yield "edge.rank must be at least 1 where nothing trains inside the LLM, got 0; raise it, or set inner=lora"
    if cfg.link.address is None and not _is_loopback(cfg.link.bind):
        yield f"link.bind={cfg.link.bind} needs link.address: the host and port that clients dial"
    if unknown := set(cfg.method.sets) - SETS:
        yield f"method.sets knows shared, local and frozen, got {sorted(unknown)}"
    if not cfg.method.use or set(cfg.method.use) - set(cfg.method.sets):
        yield f"method.use={list(cfg.method.use)} must name one or more of method.sets={list(cfg.method.sets)}"
    if cfg.edge.ranks is not None and not all(1 <= rank <= cfg.edge.rank for rank in cfg.edge.ranks or [0]):
        yield f"edge.ranks must be from 1 to edge.rank={cfg.edge.rank}, the server's, got {list(cfg.edge.ranks)}"
    if set(cfg.faulty) - set(range(max(1, cfg.clients))):
        yield f"faulty must name clients from 0 to below clients={cfg.clients}, got {list(cfg.faulty)}"
    byzantine, trim = ((cfg.rule or {}).get(name) for name in ("byzantine", "trim"))
    if isinstance(byzantine, int) and per_round(cfg) < 2 * byzantine + 3:
        yield (
            f"rule.byzantine={byzantine} needs at least {2 * byzantine + 3} clients in a round, got {per_round(cfg)}; "
            "lower it, or raise clients or clients_per_round"
        )
    K = per_round(cfg)
    if isinstance(trim, int | float) and (0 <= trim < 0.5 or trim >= 1) and trimmed.dropped(trim, K) * 2 >= K:
        yield (
            f"rule.trim={trim:g} must leave one of {K} clients in a round, and drops {trimmed.dropped(trim, K)} at "
            "each end; lower it, or raise clients or clients_per_round"
        )
    if (own := _own_schema(cfg)) and own != (cfg.schema or {}).get("_target_"):
        yield f"method.step has a schema of its own, {own}; leave schema=... out, or choose another method"
    for name, sets in _sets_asked(cfg):
        if lacking := sorted(set(sets) - set(cfg.method.sets)):
            yield f"method.step.{name}={sets} needs {lacking[0]} in method.sets, got {list(cfg.method.sets)}"
        elif set(sets) <= {"frozen"}:
            yield f"method.step.{name}={sets} has nothing that trains; name shared or local"
    yield from _check_groups(cfg)
    for arm in cfg.compare:
        if arm not in options("arm"):
            yield f"compare names {arm!r}; available options: {', '.join(options('arm'))}"
    whole = True
    for path, node in targets(cfg):
        for mistake in _check_target(path, node):
            whole &= path.split(".")[0] not in ("rule", "schema")
            yield mistake
    if whole:
        yield from _rehearse(cfg)


def _check_head(cfg: Config) -> Iterator[str]:
    """What goes with head=classes, where clients run no LLM, and what does not."""
    at_client = cfg.llm.get("where", "server") == "client"
    try:
        make(cfg.compact)
    except (ConfigError, TypeError, ValueError) as error:
        yield str(error)
    if cfg.compact and at_client:
        yield "compact stands in the place of the LLM's own encoder, llm.where=client runs that one; set compact=none"
    if cfg.compact and cfg.edge.lora.rank:
        yield f"edge.lora.rank={cfg.edge.lora.rank} trains in the LLM's own encoder; set it to 0, or compact=none"
    if cfg.pretrain.step and cfg.head == "classes" and "shared" not in cfg.method.sets:
        sets = list(cfg.method.sets)
        yield f"pretrain reaches clients in the shared state, method.sets={sets} has none; set pretrain=none"
    if cfg.pretrain.step and not cfg.compact:
        yield (
            "pretrain trains a compact encoder; set compact=resnet8 or pretrain=none, or take scenario=long_tail or "
            "experiment=mllmfl_embedded, which set all"
        )
    if cfg.pretrain.step and not cfg.captions.get("prompts", ["{question}"]):
        yield "captions.prompts is empty, and nothing is asked about open images; name one"
    by_creff = str((cfg.rule or {}).get("_target_")).endswith(".creff")
    if cfg.align.step and "shared" not in cfg.method.sets:
        yield f"align tunes the shared state, method.sets={list(cfg.method.sets)} has none; set align=none"
    if cfg.align.step and (cfg.method.retrained or at_client):
        which = "method.retrained" if cfg.method.retrained else "llm.where=client"
        yield f"align does not go with {which}; set align=none"
    if cfg.head == "llm":
        if cfg.method.retrained:
            yield "method.retrained is a classifier's second head; set head=classes, or choose another method"
        return
    if by_creff and not cfg.method.retrained:
        yield "rule=creff trains a head from gradients that no client sends; set method=creff, or choose another rule"
    if cfg.method.retrained and not by_creff:
        yield "method.retrained answers by a head that rule=creff alone trains; set rule=creff"
    if not cfg.compact:
        yield "head=classes needs a network under it; set compact=resnet8"
    if cfg.inner or at_client:
        yield "head=classes has no LLM at the client; set inner=none and llm.where=server"
    if cfg.edge.ranks:
        yield "edge.ranks are those of NanoAdapters, and head=classes has none; set edge.ranks=null"
    if cfg.classes is not None and len(set(cfg.classes)) != len(cfg.classes):
        yield f"classes must be different, got {list(cfg.classes)}"
    if cfg.classes is None and not cfg.run.has_data:
        yield "head=classes takes the names from the data, which run.has_data=false hides; set classes=[...]"


def _check_groups(cfg: Config) -> Iterator[str]:
    by = cfg.evaluate.groups
    if by is None:
        return
    numbers = [count for count in by if isinstance(count, int)] if isinstance(by, ListConfig) else []
    if by != "thirds" and not (len(numbers) == 2 == len(by) and numbers[0] >= numbers[1] >= 0):
        yield (
            "evaluate.groups must be null, thirds, or two counts such as [100,20], many above the first and few below "
            f"the second, got {by}"
        )
    for path in ("run.has_data", "evaluate.predictions"):
        if not OmegaConf.select(typing.cast(DictConfig, cfg), path):
            yield (
                f"evaluate.groups={by} needs {path}=true: the server counts the classes and reads the answers; set it, "
                "or set evaluate.groups=null"
            )


def _own_schema(cfg: Config) -> str | None:
    """The schema that stands beside a method's step and belongs to it, where there is one."""
    module = str((cfg.method.step or {}).get("_target_", "")).rpartition(".")[0]
    try:
        _locate(f"{module}.schema")
    except ConfigError:
        return None
    return f"{module}.schema"


def _sets_asked(cfg: Config) -> Iterator[tuple[str, list[str]]]:
    """The arguments of the method's step that name sets of adapters, given or by default."""
    try:
        parameters = inspect.signature(_locate(str(cfg.method.step["_target_"]))).parameters
    except (ConfigError, KeyError, TypeError):
        return  # told elsewhere
    for name, parameter in parameters.items():
        value = cfg.method.step.get(name, parameter.default)
        if isinstance(value, list | tuple | ListConfig) and value and set(value) <= SETS:
            yield name, list(value)


def per_round(cfg: Any) -> int:
    """How many clients train in a round."""
    return min(cfg.clients_per_round or cfg.clients, 1 if cfg.pooled else cfg.clients)


def _rehearse(cfg: Config) -> Iterator[str]:
    """What schema and rule say to rounds of clients who all changed the same: they know best what they cannot do."""
    one_set = _one_set(cfg) if "shared" in cfg.method.sets else {}
    try:
        schema, rule = make(cfg.schema), make(cfg.rule)
        current = {name: one_set[name] for name in schemas.sent(schema, cfg.rounds, one_set)}
        rounds = {schema(round, cfg.rounds).sends: round for round in range(1, cfg.rounds + 1)}  # of each kind, one
    except (TypeError, ValueError) as error:  # the former of a site's own that is none
        yield str(error)
        return
    named = str((cfg.rule or {}).get("_target_")).rpartition(".")[2]
    if named in OF_PAIRS and one_set and not list(lowrank.pairs(one_set)):
        yield f"rule={named} merges low-rank pairs B A, of which clients train none: it is the mean; set rule=mean"
    if named == FOLDING and cfg.align.step:
        yield "align does not see what rule=stack folds into the base; set align=none, or rule=exact_lowrank"
    if named == FOLDING and set(cfg.method.sets) > {"shared"}:
        yield (
            f"rule=stack folds products into the base, on which method.sets={list(cfg.method.sets)} stand too; "
            "take a method whose one set is shared, or rule=exact_lowrank"
        )
    told: dict[str, None] = {}
    for round in rounds.values():
        told |= dict.fromkeys(_rehearse_round(cfg, round, schema, rule, one_set, current))
    yield from told


def _rehearse_round(cfg: Config, round: int, schema: Any, rule: Any, one_set: State, current: State) -> Iterator[str]:
    clients = sorted(range(cfg.clients), key=lambda client: own_rank(cfg, client))[: max(per_round(cfg), 0)]
    names = schemas.sent(schema, cfg.rounds, one_set, round)
    every = [f"{name}.{key}" for name in cfg.method.sets for key in _one_set(cfg)]
    if every and not any(schemas.fits(name, schema(round, cfg.rounds).trains) for name in every):
        yield f"in round {round} the schema lets nothing train of what clients have; set schema=all"
    if current and not names and len(clients) < cfg.clients and not cfg.pooled:
        yield (
            f"in round {round} nothing is sent and each client trains for itself, so all must take part; set "
            "clients_per_round=null"
        )
    try:
        rule(current, (_alike(cfg, client, {name: one_set[name] for name in names}) for client in clients), {})
    except (TypeError, ValueError) as error:
        yield str(error)


def _alike(cfg: Config, client: int, delta: State) -> Update:
    delta = {name: torch.ones_like(tensor) for name, tensor in cut(delta, own_rank(cfg, client)).items()}
    return Update(client, delta, 1, None if cfg.method.fisher is None else delta)


def own_rank(cfg: Config, client: int) -> int:
    """The rank of a client's NanoAdapters."""
    return cfg.edge.ranks[client % len(cfg.edge.ranks)] if cfg.edge.ranks else cfg.edge.rank


def personal(cfg: Any) -> bool:
    """Whether each client ends with a model of its own: it keeps something that acts."""
    acting = {"shared" if name == "frozen" else name for name in cfg.method.use}
    return any(name.split(".")[0] in acting for name in kept(cfg))


def kept(cfg: Any) -> list[str]:
    """What clients train and never send, with its set in front."""
    names = [f"{name}.{key}" for name in cfg.method.sets for key in _one_set(cfg)]
    schema = make(cfg.get("schema")) or schemas.everything  # of a run from before there were schemas
    return schemas.kept(schema, cfg.rounds, names)


def _one_set(cfg: Any) -> State:
    """Zeros with the names and ranks of a set of adapters, one wide; one inside edge or LLM stands for all there."""
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


def targets(cfg: Config) -> Iterator[tuple[str, DictConfig]]:
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


def _check_target(path: str, node: DictConfig) -> Iterator[str]:
    try:
        function = _locate(str(node["_target_"]))
    except ConfigError as error:
        yield f"{path}: {error}"
        return
    parameters = inspect.signature(function).parameters
    known = {n: p for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    try:
        hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    except NameError:  # names for the type checker only: values are then not held against types
        hints = {}
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


def _locate(target: str) -> Callable[..., Any]:
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


def make(node: Any, *args: Any, **kwargs: Any) -> Any:
    """Instantiate a node of the configuration (a partial becomes a function); None stays None."""
    if node is None:
        return None
    for path, inner in _walk("", node):
        if "_args_" in inner:
            raise ConfigError(f"{path}._args_: name the arguments of {inner['_target_']}")
        _locate(str(inner["_target_"]))
    try:
        return instantiate(node, *args, _convert_="all", **kwargs)
    except InstantiationException as error:  # hydra's wrapping hides what the target said
        raise (error.__cause__ or error) from None


def arms(cfg: Config, overrides: Iterable[str]) -> list[tuple[str, list[str]]]:
    """The arms of a run by name, each with its overrides: the main one first, then those of `compare` that there are.

    A compared arm keeps everything that was asked for but the label, which is its own, and whatever its own file sets
    or chooses: a method, a rule. Settings of the server's stages it keeps where it has them.
    """
    overrides = list(overrides)
    return [("main", overrides), *((arm, _compared(arm, overrides)) for arm in cfg.compare if arm in options("arm"))]


def axes(overrides: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The values of each override by its key, as strings Hydra takes. Raises ConfigError where it cannot read one."""
    found: dict[str, tuple[str, ...]] = {}
    try:
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            several = override.is_sweep_override()
            values = tuple(override.sweep_string_iterator()) if several else (override.get_value_element_as_str(),)
            found[override.get_key_element()] = values
    except Exception as error:  # hydra's own class of a bad override is private, and it raises others
        raise ConfigError(f"overrides cannot be read: {error}") from error
    return found


def _compared(arm: str, overrides: list[str]) -> list[str]:
    file = _arm_file(arm)
    chosen = (str(group).removeprefix("override /") for choice in file.defaults for group in choice)
    own = {"arm", "method", "rule", "schema", "label", "compare", *chosen, *dict(leaves("", file))}
    keys = {override: _key(override) for override in overrides}
    of_stages = [o for o, key in keys.items() if "." in key and key.split(".")[0] in STAGES and key not in own]
    kept = [o for o, key in keys.items() if o not in of_stages and not {key, key.split(".")[0]} & own]
    there = dict(leaves("", _compose((*kept, f"arm={arm}"))) if of_stages else ())
    return [*kept, *(o for o in of_stages if keys[o] in there), f"arm={arm}"]


def leaves(path: str, node: Any) -> Iterator[tuple[str, Any]]:
    """The paths of the values that a yaml sets, and the values; its defaults list is none."""
    for key, value in node.items():
        if isinstance(value, DictConfig):
            yield from leaves(f"{path}{key}.", value)
        elif key != "defaults":
            yield f"{path}{key}", value


def what(cfg: Any) -> dict[str, Any]:
    """The settings that say what a run is, by path: all but those of where and how long."""
    places = tuple(f"{place}." for place in PLACES)
    return {key: value for key, value in leaves("", cfg) if not f"{key}.".startswith(places)}


def scale(adapters: Any) -> float:
    """alpha / r of a node of adapters; 0 where it has none."""
    return float(adapters.get("alpha", 0.0) / adapters["rank"]) if adapters.get("rank") else 0.0


def quoted(key: str, value: object) -> str:
    """An override whose value Hydra takes as it stands, whatever characters it holds."""
    if isinstance(value, bool | int | float | ListConfig):
        return f"{key}={value}"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'{key}="{text}"'
