"""Configuration: Hydra composes `conf/` from one list of overrides, the same on the server and on every client.

Everything is checked before anything starts, and every mistake is reported at once.
"""

from __future__ import annotations

import difflib
import functools
import re
import shlex
import threading
import typing
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedmm.bounds import Mistake
from fedmm.config import checks, targets
from fedmm.config.settings import PLACES, Config, ConfigError
from fedmm.config.targets import environment, folder, folders

STAGES = ("captions", "pretrain", "align")  # groups of what the server does beside the rounds
OVERRIDES_LIMIT = 100_000  # characters; classes=[...] of ImageNet's thousand names has 20,000
_KEY = re.compile(r"[+~]{0,2}[A-Za-z_][\w.\[\]]*")
_GLOBAL_HYDRA = threading.Lock()  # hydra composes in a process-wide singleton
ConfigStore.instance().store(name="types", node=Config)


def options(group: str) -> list[str]:
    """The names one may choose for a group, which are its files."""
    return sorted({path.stem for folder in folders() for path in (folder / group).glob("*.yaml")})


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


def load(overrides: Sequence[str] = (), *, of_client: bool = False) -> Config:
    """`compose`, then `check`: the one way in. Raises ConfigError with every mistake.

    With `of_client` the server's own part is left alone, and what was looked at once is not looked at again.
    """
    cfg = compose(overrides)
    if mistakes := _of_client(tuple(overrides), environment()) if of_client else tuple(check(cfg)):
        raise ConfigError("\n".join(mistake.text for mistake in mistakes))
    return cfg


def check(cfg: Config) -> Iterator[Mistake]:
    """Every mistake in a composed configuration; schema and rule are run on made-up updates."""
    yield from checks.mistakes(cfg)
    for arm in cfg.compare:
        if arm not in options("arm"):
            yield Mistake("compare", f"compare names {arm!r}; available options: {', '.join(options('arm'))}")


@functools.lru_cache(maxsize=64)  # a process that runs many clients gets the same settings from each order
def _of_client(overrides: tuple[str, ...], environment: tuple[str, ...]) -> tuple[Mistake, ...]:
    return tuple(checks.mistakes(typing.cast(Config, _composed(overrides, environment)), of_client=True))


def _compose(overrides: tuple[str, ...]) -> DictConfig:
    return _composed(overrides, environment())


def _refused(overrides: tuple[str, ...]) -> Iterator[str]:
    """The overrides that Hydra must not see, one line each: they come from another machine, and Hydra would read
    environment variables, files and folders for them."""
    if (length := sum(map(len, overrides))) > OVERRIDES_LIMIT:
        yield f"the overrides have {length} characters, at most {OVERRIDES_LIMIT}"
        return
    for override in overrides:
        key, _, value = override.partition("=")
        if "$" in override:
            yield f"{override}: an override holds a value, and no $, which would have Hydra look it up"
        if not _KEY.fullmatch(key) or key_of(override).split(".")[0] == "hydra":
            yield f"{override}: an override sets a group or a setting by its path, as rule=mean or optimizer.lr=0.01"
        elif (group := key_of(override)) in groups() and re.search(r"[/\\]|\.\.", value):
            yield f"{override}: {group} is chosen by name; available options: {', '.join(options(group))}"


@functools.lru_cache(maxsize=1024)  # a client composes the same for every message, a sweep for every question about it
def _composed(overrides: tuple[str, ...], _environment: tuple[str, ...]) -> DictConfig:
    if refused := list(_refused(overrides)):
        raise ConfigError("\n".join(refused))
    try:
        with _GLOBAL_HYDRA, initialize_config_dir(str(folder()), version_base="1.3", job_name="fedmm"):
            own = [f"file://{path}" for path in folders()[1:]]
            more = [*([quoted("hydra.searchpath", own)] if own else []), *_of_arm(overrides), *overrides]
            whole = hydra_compose("config", more, return_hydra_config=True)
            choices = whole.hydra.runtime.choices
            cfg = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
            named = set(map(key_of, overrides))
            if "label" not in named and (by_hand := named & {"method", "rule", "schema"}):
                cfg.label = "+".join(choices[group] for group in ("method", "rule", *by_hand & {"schema"}))
            both = f"{choices['dataset']}, {choices['partition']}"
            if "data" not in named and named & {"dataset", "partition", *(["scenario"] if cfg.data else [])}:
                cfg.data = both
            cfg.data = cfg.data or choices["scenario"] or both
            OmegaConf.resolve(cfg)
            typed = OmegaConf.merge(OmegaConf.structured(Config), cfg)  # what an interpolation gave has its type too
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides)) from error
    if unlisted := list(targets.unlisted(typing.cast(DictConfig, typed))):
        raise ConfigError("\n".join(unlisted))
    OmegaConf.set_readonly(typed, True)
    return typing.cast(DictConfig, typed)


def _of_arm(overrides: Sequence[str]) -> list[str]:
    """What the file of a named arm sets, as overrides, where an experiment is named too: Hydra composes that after the
    arm, and it would win."""
    named = {key_of(override): override.partition("=")[2] for override in overrides}
    if "experiment" not in named or named.get("arm") not in options("arm"):
        return []
    return [quoted(key, value) for key, value in leaves("", _arm_file(named["arm"]))]


def key_of(override: str) -> str:
    """What an override sets: +, ++ and ~ in front of it are Hydra's."""
    return override.lstrip("+~").split("=", 1)[0]


def _arm_file(arm: str) -> Any:
    """What an arm sets and chooses, all of it told in its own file. Raises ConfigError where it stands on another."""
    path = next(path for folder in folders() if (path := folder / "arm" / f"{arm}.yaml").exists())
    file: Any = OmegaConf.load(path)
    if others := [choice for choice in file.get("defaults", ()) if isinstance(choice, str) and choice != "_self_"]:
        raise ConfigError(f"{path} stands on {others[0]}; name in it what that one chooses and sets")
    return file


def _explain(error: Exception, overrides: tuple[str, ...]) -> str:
    """Hydra's message and its cause; where an override names a key that is not there, the keys that are."""
    cause = error.__cause__ or error.__context__
    lines = [str(error) if "vailable options" in str(error) else str(error).split("\n")[0]]
    lines += [str(cause).split("\n")[0]] if cause else []
    if "Ambiguous value" in lines[0]:
        lines.append("several values are for fedmm sweep; a run takes one, and other arms beside it by compare=[...]")
    if missing := re.search(r"Could not find '([^/']+)/([^']+)'", str(error)):
        lines += _meant(missing[2], options(missing[1]))
    unknown = re.search(r"Could not override '([^']+)'", str(error))
    choices = tuple(o for o in overrides if key_of(o) in groups())
    if unknown and choices != overrides:  # else a yaml is wrong, and composing it again would be too
        parent = unknown[1].rpartition(".")[0]
        chosen = _compose(choices)
        node = OmegaConf.select(chosen, parent) if parent else chosen
        keys = [str(key) for key in node if not str(key).startswith("_")] if isinstance(node, DictConfig) else []
        keys += [] if parent else [group for group in groups() if group not in keys]
        names = ", ".join(sorted(keys)) or "none"
        lines.append(f"available options{f' in {parent}' if parent else ''}: {names}")
        lines += _meant(unknown[1], [*groups(), *dict(leaves("", chosen))])
    return "\n".join(dict.fromkeys(filter(None, lines)))


def _meant(name: str, there: Collection[str]) -> list[str]:
    """What a name that is not there may stand for."""
    inside, _, last = name.rpartition(".")
    beside = [path.rpartition(".")[2] for path in there if path.rpartition(".")[0] == inside]
    close = [path for path in there if path.rpartition(".")[2] == last] or difflib.get_close_matches(last, beside, n=2)
    return [f"did you mean {' or '.join(close)}?"] if close else []


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
            key = override.get_key_element()
            if key_of(key) in map(key_of, found):
                raise ValueError(f"{key_of(key)} is given twice; give its values once, with commas between them")
            if key_of(key) == "seed" != key:
                raise ValueError(f"{key}=... sets the seed; write seed=...")
            found[key] = values
    except Exception as error:  # hydra's own class of a bad override is private, and it raises others
        raise ConfigError(f"overrides cannot be read: {error}") from error
    return found


def _compared(arm: str, overrides: list[str]) -> list[str]:
    file = _arm_file(arm)
    chosen = (str(group).removeprefix("override /") for choice in file.get("defaults", ()) for group in choice)
    own = {"arm", "method", "rule", "schema", "label", "compare", *chosen, *dict(leaves("", file))}
    keys = {override: key_of(override) for override in overrides}
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


def quoted(key: str, value: object) -> str:
    """An override whose value Hydra takes as it stands, whatever characters it holds."""
    if isinstance(value, bool | int | float | list | ListConfig):
        return f"{key}={value}"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'{key}="{text}"'
