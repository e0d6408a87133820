"""Finished runs as evidence takes them: what each was asked and its figures, from its folder or from a file of many.

A file of records keeps what a page of results was made of, so that the page outlives the runs' folders, others compare
their own runs with it, and a sweep does not repeat what is in it. It is jsonl, a line each:

    {"settings": {...}}                                                          what all its runs were asked alike
    {"settings": {...}, "summary": {...}}                                        a run: what else, and its summary.json
    {"settings": {...}, "search": "optimizer.lr", "combination": [...], "tried": {...}, "chosen": ..., "across": [...]}
                                                                                 a search
    {"command": ..., "when": ...}                                                what made some of them

Settings are by path, as in `optimizer.lr`. They know a run again, not the code that made it, of which its summary tells
the day and the packages: a record of another version of this one is as good as its changelog says.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fedmm.config import composition, targets
from fedmm.runs import summary
from fedmm.runs.folder import read_config
from fedmm.storage import machine_cache

_CHOICES, _COMMANDS, _RUNS = "tuned.json", "commands.json", "runs.jsonl"  # in a sweep's folder
_COMMON, _RUN, _CHOICE, _COMMAND = (
    {"settings"}, {"settings", "summary"}, {"settings", "search", "combination", "across", "tried", "chosen"},
    {"command", "when"},
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished run of one arm: where it is told of, its settings and its summary."""

    where: str
    settings: Mapping[str, Any]
    summary: Mapping[str, Any]

    @property
    def seed(self) -> int:
        return int(self.settings["seed"])

    @property
    def place(self) -> tuple[str, str, int]:
        """Where it stands in a table: its data, its label, its seed. A table has one run for each."""
        return self.summary["data"], self.summary["label"], self.seed


def days(runs: Iterable[Run]) -> str:
    """The first and the last day on which some of these began; empty where none tells, as older ones do not."""
    told = sorted(run.summary["environment"]["started"][:10] for run in runs if "environment" in run.summary)
    return " to ".join(dict.fromkeys([told[0], told[-1]])) if told else ""


@dataclass(frozen=True)
class Choice:
    """What a search over the values of one setting found for a combination of a sweep, accuracy by value in the order
    of the values, and which it took: the best on average over combinations that differ in the keys of `across` alone.
    `settings` are the combination's, less the one that was searched and the seed."""

    key: str
    combination: tuple[str, ...]
    settings: Mapping[str, Any]
    tried: Mapping[str, float]
    chosen: str
    across: tuple[str, ...] = ()

    @property
    def at_the_edge(self) -> bool:
        """Whether what was taken is an end of three or more values."""
        values = list(self.tried)
        return len(values) > 2 and self.chosen in (values[0], values[-1])

    @classmethod
    def of(
        cls, key: str, combination: Sequence[str], tried: Mapping[str, float], chosen: str, across: Sequence[str] = ()
    ) -> Choice:
        return cls(key, tuple(combination), settings_around(key, combination), tried, chosen, tuple(across))


@dataclass(frozen=True)
class Records:
    """Runs, what searches chose, and the commands that made them with their days."""

    runs: Sequence[Run] = ()
    choices: Sequence[Choice] = ()
    commands: Mapping[str, str] = field(default_factory=dict)


def settings_of(cfg: Any) -> dict[str, Any]:
    """What a run is asked, by path, as json has it; not where and how long, nor what is compared with it."""
    found = composition.what(cfg).items()
    plain = {key: OmegaConf.to_object(value) if OmegaConf.is_config(value) else value for key, value in found}
    return {key: value for key, value in plain.items() if key != "compare"}


def settings_around(key: str, combination: Sequence[str]) -> dict[str, Any]:
    """What a combination of a sweep asks beside the setting that is searched and the seed."""
    return _less(settings_of(composition.compose(combination)), key)


def of_arm(folder: Path) -> Run:
    """A finished arm, from its folder."""
    asked = settings_of(read_config(folder))
    return Run(str(folder), asked, json.loads((folder / "summary.json").read_text()))


def load(paths: Iterable[Path]) -> Records:
    """What these folders, each a run's or a sweep's, and files of records tell. A run that is told of twice alike is
    one. Raises ValueError where a folder has no finished run, or a file is no file of records."""
    found = [_of_folder(path) if path.is_dir() else _read(path) for path in paths]
    runs: list[Run] = []
    for run in (run for records in found for run in records.runs):
        if not any((run.settings, run.summary) == (other.settings, other.summary) for other in runs):
            runs.append(run)
    choices = {_search_of(choice): choice for records in found for choice in records.choices}
    commands = {command: when for records in found for command, when in records.commands.items()}
    return Records(runs, list(choices.values()), commands)


def save(file: Path, records: Records) -> None:
    """Write a file of records."""
    first = dict(records.runs[0].settings) if records.runs else {}
    asked = [run.settings.items() for run in records.runs]
    asked += [{**_of(first, (choice.key, "seed")), **choice.settings}.items() for choice in records.choices]
    common = {key: value for key, value in first.items() if all((key, value) in items for items in asked)}.items()

    def own(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in settings.items() if (key, value) not in common}

    lines: list[Mapping[str, Any]] = [{"settings": dict(common)}]
    for run in sorted(records.runs, key=lambda run: run.place):
        lines.append({"settings": own(run.settings), "summary": run.summary})
    lines += [_row(choice) | {"settings": own(choice.settings)} for choice in records.choices]
    lines += [{"command": command, "when": when} for command, when in records.commands.items()]
    machine_cache.write(file, "".join(json.dumps(line) + "\n" for line in lines).encode(), public=True)


def only_in(file: Path, new: Records) -> list[str]:
    """The runs and searches that a file of records has, where there is one, and that nothing of `new` takes the place
    of, by their names."""
    there = _read(file) if file.exists() else Records()
    places, searches = {run.place for run in new.runs}, {_search_of(choice) for choice in new.choices}
    runs = [str(run.place) for run in there.runs if run.place not in places]
    return runs + [" ".join(name) for choice in there.choices if (name := _search_of(choice)) not in searches]


def differing(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The settings in which two runs, or what they were scored on, differ."""
    return sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))


def apart(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The settings in which two runs of an arm differ beside their seed, and those that follow it, as a rule's."""
    seeds = first["seed"], other["seed"]
    return [
        key for key in differing(first, other)
        if not f".{key}".endswith(".seed") or (first.get(key), other.get(key)) != seeds
    ]  # fmt: skip


# ---- a sweep's folder -----------------------------------------------------------------------------------------------


def noted(sweep: Path) -> Records:
    """What was noted with a sweep's folder."""
    runs = _read(sweep / _RUNS).runs if (sweep / _RUNS).exists() else ()
    return Records(runs, [_choice(row) for row in _json(sweep / _CHOICES, [])], _json(sweep / _COMMANDS, {}))


def note(sweep: Path, new: Records, planned: Iterable[Mapping[str, Any]] = ()) -> None:
    """Keep with a sweep's folder finished runs, its own and known ones, what searches chose, and commands with the
    first day that made a part of it. What is told later stands in the place of what was, and a table's row has runs of
    one arm: those leave that were asked otherwise than what is new, or than `planned`, settings of runs to come."""
    known = noted(sweep)
    wanted = {_row_of(settings): settings for settings in (*(run.settings for run in new.runs), *planned)}
    kept = [run for run in known.runs if not apart(run.settings, wanted.get(_row_of(run.settings), run.settings))]
    runs = {run.place: run for run in (*kept, *new.runs)}
    choices = {_search_of(choice): _row(choice) for choice in (*known.choices, *new.choices)}
    save(sweep / _RUNS, Records(list(runs.values())))
    machine_cache.write(sweep / _CHOICES, json.dumps(list(choices.values()), indent=1).encode())
    machine_cache.write(sweep / _COMMANDS, json.dumps({**new.commands, **known.commands}, indent=1).encode())


def now() -> str:
    """The day and the machine, as a page tells them."""
    return f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores"


def _of_folder(path: Path) -> Records:
    """A sweep's folder, by what is noted there, or a run's."""
    found = noted(path) if (path / _RUNS).exists() else Records([of_arm(arm) for arm in summary.arm_folders(path)])
    if not found.runs:
        raise ValueError(f"no finished run in {path}; a finished one has a summary.json")
    return found


# ---- lines ----------------------------------------------------------------------------------------------------------


def _read(file: Path) -> Records:
    if not file.exists():
        raise ValueError(f"{file} is not there; name a run's folder, a sweep's, or a file of records")
    common: Mapping[str, Any] | None = None
    runs, choices, commands = [], [], {}
    for line, row in _rows(file):
        if common is None or row.keys() == _COMMON:
            if common is not None or row.keys() != _COMMON:
                raise ValueError(f"{line} is where another file of records begins, or the first line is missing; "
                                 "name several files, each by itself")  # fmt: skip
            common = row["settings"]
        elif row.keys() == _RUN:
            run = Run(str(file), {**common, **row["settings"]}, row["summary"])
            if "seed" not in run.settings or not {"data", "label"} <= run.summary.keys():
                raise ValueError(f"{line} is a run without its seed, data or label; is the file whole?")
            runs.append(run)
        elif row.keys() | {"across"} == _CHOICE:
            choices.append(_choice(row | {"settings": _less({**common, **row["settings"]}, row["search"])}))
        elif row.keys() == _COMMAND:
            commands[row["command"]] = row["when"]
        else:
            raise ValueError(f"{line} is no run, search or command, it has {sorted(row)}; is it of another version?")
    return Records(runs, choices, commands)


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's place and what it says."""
    for number, text in enumerate(file.read_text(errors="replace").splitlines(), 1):
        line = f"{file}, line {number},"
        try:
            row = json.loads(targets.renamed(text))
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{line} is no record; name a run's folder, a sweep's, or the .jsonl that "
                             "fedmm compare --into leaves beside its page")  # fmt: skip
        yield line, row


def _row_of(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """Of a table."""
    return settings.get("data"), settings.get("label")


def _search_of(choice: Choice) -> tuple[str, ...]:
    return choice.key, *sorted(choice.combination)


def _row(choice: Choice) -> dict[str, Any]:
    return {
        "settings": dict(choice.settings), "search": choice.key, "combination": list(choice.combination),
        "tried": dict(choice.tried), "chosen": choice.chosen, "across": list(choice.across),
    }  # fmt: skip


def _choice(row: Mapping[str, Any]) -> Choice:
    across = tuple(row.get("across", ()))  # older records do not tell
    return Choice(row["search"], tuple(row["combination"]), row["settings"], row["tried"], row["chosen"], across)


def _of(settings: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: settings[key] for key in keys if key in settings}


def _less(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Without what was searched and without the seed."""
    return {name: value for name, value in settings.items() if name not in (key, "seed")}


def _json(file: Path, nothing: Any) -> Any:
    return json.loads(file.read_text()) if file.exists() else nothing
