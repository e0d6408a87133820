"""Every mistake in a composed configuration, found before anything starts and told at once, with the knob to turn.

What holds for one rule or method alone stands beside it: bounds in its signature, and a function `check` in its file.
"""

from __future__ import annotations

import inspect
import itertools
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from fedmm.adapters import schema as schemas
from fedmm.adapters.nano import cut
from fedmm.aggregate import lowrank
from fedmm.bounds import Mistake, hints_of
from fedmm.config import targets
from fedmm.config.derived import at_client, client_rank, is_loopback, per_round, zeros
from fedmm.config.settings import AT_LEAST, AT_MOST, ONE_OF, SETS, Config, ConfigError
from fedmm.config.targets import locate, make
from fedmm.types import ANCHORED, State, Update

OF_SERVER = ("rule", "captions", "pretrain", "align")
"""The groups that name what the server alone runs."""


def mistakes(cfg: Config, *, of_client: bool = False) -> Iterator[Mistake]:
    """Every mistake. A client (`of_client`) looks at what it runs; the rule and the server's stages it leaves alone."""
    if too_much := list(_too_much(cfg)):  # nothing below bears it
        yield from too_much
        return
    for checked in (_settings, _adapters, _head, _method, *(() if of_client else (_stages, _groups))):
        yield from checked(cfg)
    unsound: set[str] = set()
    for path, node in targets.nodes(cfg):
        if not (of_client and path.split(".")[0] in OF_SERVER):
            wrong = list(targets.mistakes(path, node))
            unsound |= {path} if wrong else set()
            yield from wrong
    if "method.step" not in unsound:
        yield from _beside(cfg.method.step, cfg.method.sets, _merges(cfg))
    if not of_client and not {"rule", "schema"} & {path.split(".")[0] for path in unsound}:
        yield from _beside(cfg.rule, per_round(cfg), zeros(cfg))
        yield from _rehearse(cfg)


def _too_much(cfg: Config) -> Iterator[Mistake]:
    for path, high, value in _bounded(cfg, AT_MOST):
        if value > high:
            yield Mistake(path, f"{path} must be at most {high:,}, got {value:,}")


def _bounded(cfg: Config, bounds: Mapping[str, float]) -> Iterator[tuple[str, float, float]]:
    """The settings of `bounds` that are numbers, each with its bound. A step that is off has none."""
    for path, bound in bounds.items():
        value = OmegaConf.select(typing.cast(DictConfig, cfg), path)
        if isinstance(value, int | float):
            yield path, bound, value


def _beside(node: Any, *given: Any) -> Iterator[Mistake]:
    """The mistakes that `check` in a function's file finds, in what is `given` and in the settings that it takes."""
    if node and (check := targets.beside(node, "check")):
        takes = {name for name, p in inspect.signature(check).parameters.items() if p.kind is p.KEYWORD_ONLY}
        yield from check(*given, **{name: value for name, value in targets.settings_of(node).items() if name in takes})


def _settings(cfg: Config) -> Iterator[Mistake]:
    """Settings by themselves."""
    for path, low, value in _bounded(cfg, AT_LEAST):
        if not value >= low:  # nan neither
            yield Mistake(path, f"{path} must be at least {low:g}, got {value:g}")
    for path, choices in ONE_OF.items():
        if (chosen := OmegaConf.select(typing.cast(DictConfig, cfg), path)) not in choices:
            yield Mistake(path, f"{path} must be {' or '.join(choices)}, got {chosen}")
    if cfg.clients_per_round is not None and not 1 <= cfg.clients_per_round <= cfg.clients:
        wanted = f"clients_per_round must be from 1 to clients={cfg.clients}"
        yield Mistake("clients_per_round", f"{wanted}, got {cfg.clients_per_round}")
    if cfg.clip_norm is not None and not cfg.clip_norm > 0:
        yield Mistake("clip_norm", f"clip_norm must be above 0, or null for none, got {cfg.clip_norm:g}")
    if cfg.link.address is None and not is_loopback(cfg.link.bind):
        needs = f"link.bind={cfg.link.bind} needs link.address: the host and port that clients dial"
        yield Mistake("link.address", needs)
    if cfg.run.nodes is not None and len(set(cfg.run.nodes)) != max(cfg.clients, len(cfg.run.nodes)):
        wanted = f"run.nodes must name one node for each of clients={cfg.clients}"
        yield Mistake("run.nodes", f"{wanted}, got {list(cfg.run.nodes)}")
    if set(cfg.faulty) - set(range(max(1, cfg.clients))):
        wanted = f"faulty must name clients from 0 to below clients={cfg.clients}"
        yield Mistake("faulty", f"{wanted}, got {list(cfg.faulty)}")


def _adapters(cfg: Config) -> Iterator[Mistake]:
    """What trains before the LLM and inside it."""
    if cfg.inner and not at_client(cfg):
        yield Mistake(
            "inner",
            "inner trains inside the LLM, which llm.where=server keeps there; set llm.where=client, or inner=none",
        )
    if cfg.inner and isinstance(rank := cfg.inner.get("rank"), int) and rank < 1:
        off = "inner=none trains nothing inside the LLM"
        yield Mistake("inner.rank", f"inner.rank must be at least 1, got {rank}; {off}")
    if not (cfg.edge.rank or cfg.inner):
        yield Mistake(
            "edge.rank",
            "edge.rank must be at least 1 where nothing trains inside the LLM, got 0; raise it, or set inner=lora",
        )
    if cfg.edge.ranks is not None and not all(1 <= rank <= cfg.edge.rank for rank in cfg.edge.ranks or [0]):
        wanted = f"edge.ranks must be from 1 to edge.rank={cfg.edge.rank}, the server's"
        yield Mistake("edge.ranks", f"{wanted}, got {list(cfg.edge.ranks)}")


def _head(cfg: Config) -> Iterator[Mistake]:
    """What goes with a compact encoder and with head=classes, where clients run no LLM, and what does not."""
    try:
        make(cfg.compact)
    except (ConfigError, TypeError, ValueError) as error:
        yield Mistake("compact", str(error))
    if cfg.compact and at_client(cfg):
        yield Mistake(
            "compact",
            "compact stands in the place of the LLM's own encoder, llm.where=client runs that one; set compact=none",
        )
    if cfg.compact and (rank := cfg.edge.lora.rank):
        trains = f"edge.lora.rank={rank} trains in the LLM's own encoder; set it to 0, or compact=none"
        yield Mistake("edge.lora.rank", trains)
    yield from _classes(cfg) if cfg.head == "classes" else _no_classes(cfg)


def _no_classes(cfg: Config) -> Iterator[Mistake]:
    if cfg.method.retrained:
        yield Mistake(
            "method.retrained",
            "method.retrained is a classifier's second head; set head=classes, or choose another method",
        )


def _classes(cfg: Config) -> Iterator[Mistake]:
    if not cfg.compact:
        yield Mistake("compact", "head=classes needs a network under it; set compact=resnet8")
    if cfg.inner or at_client(cfg):
        yield Mistake("head", "head=classes has no LLM at the client; set inner=none and llm.where=server")
    if cfg.edge.ranks:
        yield Mistake(
            "edge.ranks", "edge.ranks are those of NanoAdapters, and head=classes has none; set edge.ranks=null"
        )
    if cfg.classes is not None and len(set(cfg.classes)) != len(cfg.classes):
        yield Mistake("classes", f"classes must be different, got {list(cfg.classes)}")
    if cfg.classes is None and not cfg.run.has_data:
        yield Mistake(
            "classes", "head=classes takes the names from the data, which run.has_data=false hides; set classes=[...]"
        )


def _stages(cfg: Config) -> Iterator[Mistake]:
    """What the server does beside the rounds."""
    sets = list(cfg.method.sets)
    if cfg.pretrain.step and cfg.head == "classes" and "shared" not in sets:
        none = f"pretrain reaches clients in the shared state, method.sets={sets} has none; set pretrain=none"
        yield Mistake("pretrain", none)
    if cfg.pretrain.step and not cfg.compact:
        yield Mistake(
            "pretrain",
            "pretrain trains a compact encoder; set compact=resnet8 or pretrain=none, or take scenario=long_tail or "
            "experiment=mllmfl_embedded, which set all",
        )
    if cfg.pretrain.step and not cfg.captions.get("prompts", ["{question}"]):
        yield Mistake("captions.prompts", "captions.prompts is empty, and nothing is asked about open images; name one")
    if cfg.align.step and "shared" not in sets:
        yield Mistake("align", f"align tunes the shared state, method.sets={sets} has none; set align=none")
    if cfg.align.step and (cfg.method.retrained or at_client(cfg)):
        which = "method.retrained" if cfg.method.retrained else "llm.where=client"
        yield Mistake("align", f"align does not go with {which}; set align=none")


def _method(cfg: Config) -> Iterator[Mistake]:
    """The sets of adapters that a method has, trains and answers by."""
    sets = list(cfg.method.sets)
    if unknown := set(sets) - SETS:
        yield Mistake("method.sets", f"method.sets knows shared, local and frozen, got {sorted(unknown)}")
    if not cfg.method.use or set(cfg.method.use) - set(sets):
        wanted = f"method.use={list(cfg.method.use)} must name one or more of method.sets={sets}"
        yield Mistake("method.use", wanted)
    if (schema := _schema_beside(cfg)) and schema != (cfg.schema or {}).get("_target_"):
        leave = "leave schema=... out, or choose another method"
        yield Mistake("schema", f"method.step has a schema of its own, {schema}; {leave}")
    if cfg.method.fisher and "shared" not in sets:
        yield Mistake(
            "method.fisher",
            f"method.fisher is of the shared adapters, which method.sets={sets} lacks; name shared, or set "
            "method.fisher=null and rule=mean",
        )
    yield from _sets_of_step(cfg, sets)


def _sets_of_step(cfg: Config, sets: list[str]) -> Iterator[Mistake]:
    """What the method's step makes of the sets, by those of its settings that name some."""
    named, anchored = _sets_named(cfg)
    trained = {"frozen", *itertools.chain(*(named[name] for name in named.keys() - anchored))} if named else {*sets}
    if idle := {*sets} - trained:
        yield Mistake(
            "method.sets",
            f"method.sets has {min(idle)}, which no branch of method.step trains; name it in one, or take it out of "
            "method.sets and method.use",
        )
    for name, ones in named.items():
        path = f"method.step.{name}"
        if lacking := sorted(set(ones) - set(sets)):
            yield Mistake(path, f"{path}={ones} needs {lacking[0]} in method.sets, got {sets}")
        elif set(ones) <= {"frozen"}:
            yield Mistake(path, f"{path}={ones} has nothing that trains; name shared or local")


def _groups(cfg: Config) -> Iterator[Mistake]:
    by = cfg.evaluate.groups
    if by is None:
        return
    numbers = [count for count in by if isinstance(count, int)] if isinstance(by, ListConfig) else []
    if by != "thirds" and not (len(numbers) == 2 == len(by) and numbers[0] >= numbers[1] >= 0):
        yield Mistake(
            "evaluate.groups",
            "evaluate.groups must be null, thirds, or two counts such as [100,20], many above the first and few below "
            f"the second, got {by}",
        )
    for path in ("run.has_data", "evaluate.predictions"):
        if not OmegaConf.select(typing.cast(DictConfig, cfg), path):
            yield Mistake(
                path,
                f"evaluate.groups={by} needs {path}=true: the server counts the classes and reads the answers; set it, "
                "or set evaluate.groups=null",
            )


def _merges(cfg: Config) -> Any:
    """What the rule's signature says of the state that it merges."""
    try:
        return hints_of(locate(str((cfg.rule or {}).get("_target_")))).get("current")
    except ConfigError:
        return None  # a mistake of the rule's own node


def _schema_beside(cfg: Config) -> str | None:
    """The schema that stands in the file of a method's step and belongs to it, where there is one."""
    schema = targets.beside(cfg.method.step, "schema")
    return schema and f"{schema.__module__}.schema"


def _sets_named(cfg: Config) -> tuple[dict[str, list[str]], set[str]]:
    """The settings of the method's step that name sets of adapters, given or by default; and those of them that name
    sets which stay near the received state."""
    try:
        hints, values = hints_of(locate(str(cfg.method.step["_target_"]))), targets.settings_of(cfg.method.step)
    except (ConfigError, KeyError, TypeError):
        return {}, set()  # a mistake of the step's own node
    lists = {name: list(value) for name, value in values.items() if isinstance(value, list | tuple) and value}
    named = {name: value for name, value in lists.items() if set(map(str, value)) <= SETS}
    return named, {name for name in named if ANCHORED in getattr(hints.get(name), "__metadata__", ())}


def _rehearse(cfg: Config) -> Iterator[Mistake]:
    """Try schema and rule on rounds of made-up equal updates: they know best what they cannot do."""
    one_set = zeros(cfg) if "shared" in cfg.method.sets else {}
    try:
        schema, rule = make(cfg.schema), make(cfg.rule)
        current = {name: one_set[name] for name in schemas.sent(schema, cfg.rounds, one_set)}
        rounds = {schema(round, cfg.rounds).sends: round for round in range(1, cfg.rounds + 1)}  # of each kind, one
    except (TypeError, ValueError) as error:  # the former of a site's own that is none
        yield Mistake("rule", str(error))
        return
    yield from _travels(cfg, schema, one_set, current)
    yield from _low_rank(cfg, one_set)
    said: dict[Mistake, None] = {}
    for round in rounds.values():
        said |= dict.fromkeys(_rehearse_round(cfg, round, schema, rule, one_set, current))
    yield from said


def _travels(cfg: Config, schema: Any, one_set: State, current: State) -> Iterator[Mistake]:
    """What the schema leaves at the clients."""
    stay = schemas.private(schema, cfg.rounds, [f"shared.{name}" for name in one_set])
    if stay and not current:
        yield Mistake(
            "schema",
            f"the schema sends nothing of the shared set, such as {stay[0]}, and nobody learns from anybody; set "
            "schema=all (private_head is for head=classes)",
        )
    elif stay and cfg.align.step:
        whole = f"align tunes a whole model, and the schema leaves {stay[0]} at the clients"
        yield Mistake("align", f"{whole}; set align=none or schema=all")


def _low_rank(cfg: Config, one_set: State) -> Iterator[Mistake]:
    """What a rule's signature says of pairs B A, against what there is."""
    named, merges = str((cfg.rule or {}).get("_target_")).rpartition(".")[2], _merges(cfg)
    if merges in (lowrank.Paired, lowrank.Folded) and one_set and not list(lowrank.pairs(one_set)):
        none = f"rule={named} merges low-rank pairs B A, of which clients train none: it is the mean; set rule=mean"
        yield Mistake("rule", none)
    if merges == lowrank.Folded and cfg.align.step:
        folds = f"align does not see what rule={named} folds into the base; set align=none, or rule=exact_lowrank"
        yield Mistake("align", folds)
    if merges == lowrank.Folded and set(cfg.method.sets) > {"shared"}:
        yield Mistake(
            "rule",
            f"rule={named} folds products into the base, on which method.sets={list(cfg.method.sets)} stand too; "
            "take a method whose one set is shared, or rule=exact_lowrank",
        )


def _rehearse_round(
    cfg: Config, round: int, schema: Any, rule: Any, one_set: State, current: State
) -> Iterator[Mistake]:
    clients = sorted(range(cfg.clients), key=lambda client: client_rank(cfg, client))[: max(per_round(cfg), 0)]
    names = schemas.sent(schema, cfg.rounds, one_set, round)
    every = [f"{name}.{key}" for name in cfg.method.sets for key in zeros(cfg)]
    if every and not any(schemas.fits(name, schema(round, cfg.rounds).trains) for name in every):
        yield Mistake("schema", f"in round {round} the schema lets nothing train of what clients have; set schema=all")
    if current and not names and len(clients) < cfg.clients and not cfg.pooled:
        yield Mistake(
            "clients_per_round",
            f"in round {round} nothing is sent and each client trains for itself, so all must take part; set "
            "clients_per_round=null",
        )
    try:
        rule(current, (_alike(cfg, client, {name: one_set[name] for name in names}) for client in clients), {})
    except (TypeError, ValueError) as error:
        yield Mistake("rule", str(error))


def _alike(cfg: Config, client: int, delta: State) -> Update:
    delta = {name: torch.ones_like(tensor) for name, tensor in cut(delta, client_rank(cfg, client)).items()}
    return Update(client, delta, 1, None if cfg.method.fisher is None else delta)
