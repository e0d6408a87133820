"""Every mistake in a composed configuration, found before anything starts and told at once, with the knob to turn."""

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
from fedmm.aggregate import creff, lowrank, trimmed
from fedmm.config import targets
from fedmm.config.derived import at_client, is_loopback, own_rank, per_round, zeros
from fedmm.config.settings import AT_LEAST, AT_MOST, ONE_OF, SETS, Config, ConfigError
from fedmm.config.targets import locate, make
from fedmm.types import State, Update


def mistakes(cfg: Config, *, rehearse: bool = True) -> Iterator[str]:
    """Every mistake, one line each. Without `rehearse` the rule is not called: it is the server's."""
    if too_much := list(_too_much(cfg)):  # nothing below bears it
        yield from too_much
        return
    for part in (_settings, _adapters, _head, _stages, _method, _rule, _groups):
        yield from part(cfg)
    whole = True
    for path, node in targets.nodes(cfg):
        for mistake in targets.mistakes(path, node):
            whole &= path.split(".")[0] not in ("rule", "schema")
            yield mistake
    if whole and rehearse:
        yield from _rehearse(cfg)


def _too_much(cfg: Config) -> Iterator[str]:
    for path, high, value in _bounded(cfg, AT_MOST):
        if value > high:
            yield f"{path} must be at most {high:,}, got {value:,}"


def _bounded(cfg: Config, bounds: Mapping[str, float]) -> Iterator[tuple[str, float, float]]:
    """The settings of `bounds` that have a number, each with its bound; of a step that is off there is none."""
    for path, bound in bounds.items():
        value = OmegaConf.select(typing.cast(DictConfig, cfg), path)
        if isinstance(value, int | float):
            yield path, bound, value


def _settings(cfg: Config) -> Iterator[str]:
    """Settings by themselves."""
    for path, low, value in _bounded(cfg, AT_LEAST):
        if not value >= low:  # nan neither
            yield f"{path} must be at least {low:g}, got {value:g}"
    for path, choices in ONE_OF.items():
        if (chosen := OmegaConf.select(typing.cast(DictConfig, cfg), path)) not in choices:
            yield f"{path} must be {' or '.join(choices)}, got {chosen}"
    if cfg.clients_per_round is not None and not 1 <= cfg.clients_per_round <= cfg.clients:
        yield f"clients_per_round must be from 1 to clients={cfg.clients}, got {cfg.clients_per_round}"
    if cfg.clip_norm is not None and not cfg.clip_norm > 0:
        yield f"clip_norm must be above 0, or null for none, got {cfg.clip_norm:g}"
    if cfg.link.address is None and not is_loopback(cfg.link.bind):
        yield f"link.bind={cfg.link.bind} needs link.address: the host and port that clients dial"
    if cfg.run.nodes is not None and len(set(cfg.run.nodes)) != max(cfg.clients, len(cfg.run.nodes)):
        yield f"run.nodes must name one node for each of clients={cfg.clients}, got {list(cfg.run.nodes)}"
    if set(cfg.faulty) - set(range(max(1, cfg.clients))):
        yield f"faulty must name clients from 0 to below clients={cfg.clients}, got {list(cfg.faulty)}"


def _adapters(cfg: Config) -> Iterator[str]:
    """What trains before the LLM and inside it."""
    if cfg.inner and not at_client(cfg):
        yield "inner trains inside the LLM, which llm.where=server keeps there; set llm.where=client, or inner=none"
    if cfg.inner and isinstance(rank := cfg.inner.get("rank"), int) and rank < 1:
        yield f"inner.rank must be at least 1, got {rank}; inner=none trains nothing inside the LLM"
    if not (cfg.edge.rank or cfg.inner):
        yield "edge.rank must be at least 1 where nothing trains inside the LLM, got 0; raise it, or set inner=lora"
    if cfg.edge.ranks is not None and not all(1 <= rank <= cfg.edge.rank for rank in cfg.edge.ranks or [0]):
        yield f"edge.ranks must be from 1 to edge.rank={cfg.edge.rank}, the server's, got {list(cfg.edge.ranks)}"


def _head(cfg: Config) -> Iterator[str]:
    """What goes with a compact encoder and with head=classes, where clients run no LLM, and what does not."""
    try:
        make(cfg.compact)
    except (ConfigError, TypeError, ValueError) as error:
        yield str(error)
    if cfg.compact and at_client(cfg):
        yield "compact stands in the place of the LLM's own encoder, llm.where=client runs that one; set compact=none"
    if cfg.compact and cfg.edge.lora.rank:
        yield f"edge.lora.rank={cfg.edge.lora.rank} trains in the LLM's own encoder; set it to 0, or compact=none"
    if cfg.head == "llm":
        if cfg.method.retrained:
            yield "method.retrained is a classifier's second head; set head=classes, or choose another method"
        return
    by_creff = _merges(cfg) == creff.Retrained
    if by_creff and not cfg.method.retrained:
        yield "rule=creff trains a head from gradients that no client sends; set method=creff, or choose another rule"
    if cfg.method.retrained and not by_creff:
        yield "method.retrained answers by a head that rule=creff alone trains; set rule=creff"
    if not cfg.compact:
        yield "head=classes needs a network under it; set compact=resnet8"
    if cfg.inner or at_client(cfg):
        yield "head=classes has no LLM at the client; set inner=none and llm.where=server"
    if cfg.edge.ranks:
        yield "edge.ranks are those of NanoAdapters, and head=classes has none; set edge.ranks=null"
    if cfg.classes is not None and len(set(cfg.classes)) != len(cfg.classes):
        yield f"classes must be different, got {list(cfg.classes)}"
    if cfg.classes is None and not cfg.run.has_data:
        yield "head=classes takes the names from the data, which run.has_data=false hides; set classes=[...]"


def _stages(cfg: Config) -> Iterator[str]:
    """What the server does beside the rounds."""
    sets = list(cfg.method.sets)
    if cfg.pretrain.step and cfg.head == "classes" and "shared" not in sets:
        yield f"pretrain reaches clients in the shared state, method.sets={sets} has none; set pretrain=none"
    if cfg.pretrain.step and not cfg.compact:
        yield (
            "pretrain trains a compact encoder; set compact=resnet8 or pretrain=none, or take scenario=long_tail or "
            "experiment=mllmfl_embedded, which set all"
        )
    if cfg.pretrain.step and not cfg.captions.get("prompts", ["{question}"]):
        yield "captions.prompts is empty, and nothing is asked about open images; name one"
    if cfg.align.step and "shared" not in sets:
        yield f"align tunes the shared state, method.sets={sets} has none; set align=none"
    if cfg.align.step and (cfg.method.retrained or at_client(cfg)):
        which = "method.retrained" if cfg.method.retrained else "llm.where=client"
        yield f"align does not go with {which}; set align=none"


def _method(cfg: Config) -> Iterator[str]:
    """The sets of adapters that a method has, trains and answers by."""
    if unknown := set(cfg.method.sets) - SETS:
        yield f"method.sets knows shared, local and frozen, got {sorted(unknown)}"
    if not cfg.method.use or set(cfg.method.use) - set(cfg.method.sets):
        yield f"method.use={list(cfg.method.use)} must name one or more of method.sets={list(cfg.method.sets)}"
    if (own := _own_schema(cfg)) and own != (cfg.schema or {}).get("_target_"):
        yield f"method.step has a schema of its own, {own}; leave schema=... out, or choose another method"
    asked = list(_sets_asked(cfg))
    branches = {name: sets for name, sets in asked if name != "near"}  # a set that only stays near trains in none
    trained = {"frozen", *itertools.chain(*branches.values())} if asked else {*cfg.method.sets}
    if idle := {*cfg.method.sets} - trained:
        yield (
            f"method.sets has {min(idle)}, which no branch of method.step trains; name it in one, or take it out of "
            "method.sets and method.use"
        )
    if cfg.method.fisher and "shared" not in cfg.method.sets:
        yield (
            f"method.fisher is of the shared adapters, which method.sets={list(cfg.method.sets)} lacks; name shared, "
            "or set method.fisher=null and rule=mean"
        )
    for name, sets in asked:
        if lacking := sorted(set(sets) - set(cfg.method.sets)):
            yield f"method.step.{name}={sets} needs {lacking[0]} in method.sets, got {list(cfg.method.sets)}"
        elif set(sets) <= {"frozen"}:
            yield f"method.step.{name}={sets} has nothing that trains; name shared or local"
    if "near" in dict(asked) and "shared" not in cfg.method.sets:
        yield (
            f"method.step.near is held near what the server sent, and method.sets={list(cfg.method.sets)} has no "
            "shared; name it, or set method=lora"
        )
    teacher, student = (branches.get(name, []) for name in ("teacher", "student"))
    if both := sorted({*teacher} & {*student} - {"frozen"}):
        yield (
            f"method.step.teacher={teacher} and method.step.student={student} both train {both[0]}, which the first "
            "step would change under the second; name it in one of them: local in the one, shared in the other"
        )


def _rule(cfg: Config) -> Iterator[str]:
    """How many clients a robust rule needs; the rest its rehearsal says."""
    K = per_round(cfg)
    byzantine, keep, trim = ((cfg.rule or {}).get(name) for name in ("byzantine", "keep", "trim"))
    if isinstance(byzantine, int) and 2 * byzantine + 3 > K:
        yield (
            f"rule.byzantine={byzantine} needs at least {2 * byzantine + 3} clients in a round, got {K}; "
            "lower it, or raise clients or clients_per_round"
        )
    elif isinstance(byzantine, int) and isinstance(keep, int) and keep > K - byzantine:
        yield (
            f"rule.keep={keep} of {K} clients in a round keeps some of rule.byzantine={byzantine}; lower one, or raise "
            "clients or clients_per_round"
        )
    if isinstance(trim, float) and trim >= 1 and not trim.is_integer():
        yield f"rule.trim must be a share below 0.5, or a whole number of clients from 1, got {trim:g}"
    elif isinstance(trim, int | float) and (0 <= trim < 0.5 or trim >= 1) and trimmed.dropped(trim, K) * 2 >= K:
        yield (
            f"rule.trim={trim:g} must leave one of {K} clients in a round, and drops {trimmed.dropped(trim, K)} at "
            "each end; lower it, or raise clients or clients_per_round"
        )


def _groups(cfg: Config) -> Iterator[str]:
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


def _merges(cfg: Config) -> Any:
    """What the rule's signature says of the state that it merges."""
    try:
        return targets.hints_of(locate(str((cfg.rule or {}).get("_target_")))).get("current")
    except ConfigError:
        return None  # told elsewhere


def _own_schema(cfg: Config) -> str | None:
    """The schema that stands beside a method's step and belongs to it, where there is one."""
    module = str((cfg.method.step or {}).get("_target_", "")).rpartition(".")[0]
    try:
        locate(f"{module}.schema")
    except ConfigError:
        return None
    return f"{module}.schema"


def _sets_asked(cfg: Config) -> Iterator[tuple[str, list[str]]]:
    """The arguments of the method's step that name sets of adapters, given or by default."""
    try:
        parameters = inspect.signature(locate(str(cfg.method.step["_target_"]))).parameters
    except (ConfigError, KeyError, TypeError):
        return  # told elsewhere
    for name, parameter in parameters.items():
        value = cfg.method.step.get(name, parameter.default)
        if isinstance(value, list | tuple | ListConfig) and value and set(value) <= SETS:
            yield name, list(value)


def _rehearse(cfg: Config) -> Iterator[str]:
    """What schema and rule say to rounds of clients who all changed the same: they know best what they cannot do."""
    one_set = zeros(cfg) if "shared" in cfg.method.sets else {}
    try:
        schema, rule = make(cfg.schema), make(cfg.rule)
        current = {name: one_set[name] for name in schemas.sent(schema, cfg.rounds, one_set)}
        rounds = {schema(round, cfg.rounds).sends: round for round in range(1, cfg.rounds + 1)}  # of each kind, one
    except (TypeError, ValueError) as error:  # the former of a site's own that is none
        yield str(error)
        return
    named = str((cfg.rule or {}).get("_target_")).rpartition(".")[2]
    own = schemas.kept(schema, cfg.rounds, [f"shared.{name}" for name in one_set])
    if own and not current:
        yield (
            f"the schema sends nothing of the shared set, such as {own[0]}, and nobody learns from anybody; set "
            "schema=all (private_head is for head=classes)"
        )
    elif own and cfg.align.step:
        yield f"align tunes a whole model, and the schema leaves {own[0]} at the clients; set align=none or schema=all"
    if _merges(cfg) in (lowrank.Paired, lowrank.Folded) and one_set and not list(lowrank.pairs(one_set)):
        yield f"rule={named} merges low-rank pairs B A, of which clients train none: it is the mean; set rule=mean"
    if _merges(cfg) == lowrank.Folded and cfg.align.step:
        yield f"align does not see what rule={named} folds into the base; set align=none, or rule=exact_lowrank"
    if _merges(cfg) == lowrank.Folded and set(cfg.method.sets) > {"shared"}:
        yield (
            f"rule={named} folds products into the base, on which method.sets={list(cfg.method.sets)} stand too; "
            "take a method whose one set is shared, or rule=exact_lowrank"
        )
    told: dict[str, None] = {}
    for round in rounds.values():
        told |= dict.fromkeys(_rehearse_round(cfg, round, schema, rule, one_set, current))
    yield from told


def _rehearse_round(cfg: Config, round: int, schema: Any, rule: Any, one_set: State, current: State) -> Iterator[str]:
    clients = sorted(range(cfg.clients), key=lambda client: own_rank(cfg, client))[: max(per_round(cfg), 0)]
    names = schemas.sent(schema, cfg.rounds, one_set, round)
    every = [f"{name}.{key}" for name in cfg.method.sets for key in zeros(cfg)]
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
