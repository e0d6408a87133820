"""Many runs from one line of overrides: every combination of what has several values, each a process of its own.

    fedmm sweep DIR arm=fedavg,feddat scenario=domain,function seed=0,1,2 --tune optimizer.lr=3e-3,6e-3

Hydra reads the values (lists, range, choice). With `--tune` each combination, seeds apart, is first run with every rate
on the validation split under a seed of its own, and goes on with the best by the clients' own accuracy: the same
small search for each. With `--tune-across scenario` it goes on with the best on average over scenarios, as one run says
little. Of three values or more the search goes on past an end that is best, by the same step, twice at most. A run is
done when it has its summary; what is done is not repeated, what was cut goes on.

The same folder takes more values later: what it holds of them is done. Where a wider search then chooses another value,
runs of the former are set aside.

    DIR/tune/<name>  DIR/runs/<name>  <name>.log beside each     DIR/aside/<name>  runs of a value no longer chosen
    DIR/tuned.json  what was chosen     DIR/known.jsonl  what --known gave     DIR/commands.json
    DIR/results.md  .png  .jsonl
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedmm.runs import config, evidence, records, settings
from fedmm.runs.folder import alone
from fedmm.runs.records import Choice, Records, Run
from fedmm.types import FedmmError

PAGE = "results.md"  # in a sweep's folder; picture and records beside it
TUNING_SEED = 100
FURTHER = 2  # values at most that a search takes beyond its ends
_NAMED = ("arm", "method", "rule", "scenario", "dataset", "partition", "seed", "label", "data")  # name themselves
_IN_NAME = ("arm", "method", "rule", "scenario")  # of a run's folder, and the seed, also of one value: more may come
_TUNING = (
    "evaluate.split=validation", "evaluate.everywhere=false", "evaluate.every=0", "evaluate.groups=null",
    "evaluate.predictions=false",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    name: str
    path: Path
    overrides: tuple[str, ...]

    @property
    def done(self) -> bool:
        return (self.path / "summary.json").exists()

    @property
    def log(self) -> Path:
        return self.path.with_name(f"{self.name}.log")


@dataclass(frozen=True)
class Search:
    """A setting to choose: its key and the values to try, and the seed that is used for nothing else. Combinations that
    differ in the keys of `across` alone take one value, the best on average over them."""

    key: str
    values: tuple[str, ...]
    across: tuple[str, ...] = ()
    seed: int = TUNING_SEED


def search(text: str | None, across: str | None = None) -> Search | None:
    """`optimizer.lr=3e-3,6e-3` as a search, numbers in rising order; `across` names keys, `scenario,dataset.train`.
    Raises ConfigError where it gives fewer than two values, or one twice."""
    if text is None:
        if across:
            raise settings.ConfigError(
                f"--tune-across {across} has nothing to choose; add --tune optimizer.lr=3e-3,6e-3"
            )
        return None
    ((key, values),) = config.axes([text]).items()
    if len(values) < 2:
        raise settings.ConfigError(f"--tune {text} gives one value; name two or more, as in optimizer.lr=3e-3,6e-3")
    if all(map(_number, values)):
        values = tuple(sorted(values, key=float))
    if twice := [value for value, beside in itertools.pairwise(values) if value == beside or _same(value, beside)]:
        raise settings.ConfigError(f"--tune {text} gives {twice[0]} twice; leave one out")
    return Search(key, values, tuple(across.split(",")) if across else ())


def jobs(path: Path, overrides: Sequence[str], chosen: Callable[[Sequence[str]], Sequence[str]] = tuple) -> list[Job]:
    """Every combination of the overrides' values. `chosen` gives what tuning adds to a combination without its seed.

    What has several values and no name stands behind the label, `FedAvg, edge.rank=8`, or, where it makes other data,
    behind the name of these: `long_tail, dataset.imbalance=10`. Raises ConfigError for `compare`.
    """
    found = config.axes(overrides)
    if "compare" in found:
        raise settings.ConfigError("a sweep takes arms as values, arm=fedavg,local, and no compare=...")
    several = _several(found)
    made = []
    for pairs in _combinations(found):
        asked = _overrides(pairs)
        asked += chosen([override for override in asked if not override.startswith("seed=")])
        name = _name(pairs, several) or "run"
        for name_of, of_data in (("label", False), ("data", True)):
            unnamed = (key for key in sorted(several) if key not in _NAMED and evidence.of_data(key) == of_data)
            own = [f"{key}={pairs[key]}" for key in unnamed]
            if own and name_of not in found:
                asked.append(config.quoted(name_of, ", ".join([getattr(config.compose(asked), name_of), *own])))
        made.append(_job(path, name, asked))
    return made


def trials(
    path: Path, overrides: Sequence[str], tuned: Search, wider: Mapping[tuple[str, ...], Sequence[str]] | None = None
) -> dict[tuple[str, ...], dict[str, Job]]:
    """The runs that tuning takes, by combination (seeds apart) and value, on the validation split. `wider` has the
    values of combinations whose search has gone on."""
    found = config.axes(overrides)
    if str(tuned.seed) in found.pop("seed", ()):
        raise settings.ConfigError(
            f"seed={tuned.seed} is that of the search, and is used for nothing else; take another"
        )
    several = _several(found)
    made = {}
    for pairs in _combinations(found):
        cell = _overrides(pairs)
        made[tuple(cell)] = {
            value: _job(path, _name(pairs | {tuned.key: value}, [*several, tuned.key]),
                        [*_without(cell, _TUNING), *_TUNING, f"seed={tuned.seed}", f"{tuned.key}={value}"])
            for value in (wider or {}).get(tuple(cell), tuned.values)
        }  # fmt: skip
    return made


def accuracy(job: Job) -> float:
    """Own accuracy of a trial, mean over clients."""
    own = json.loads((job.path / "summary.json").read_text())["final"]["own"]
    if not own:
        raise FedmmError(f"{job.path} scored no client; see {job.log}")
    return statistics.fmean(own.values())


def best(tried: Mapping[str, float]) -> str:
    """The value with the highest accuracy; of equal ones the first."""
    return max(tried, key=lambda value: tried[value])


def further(tried: Mapping[str, float], most: int) -> tuple[str, ...] | None:
    """The values tried and one beyond the end, where that was the best of three or more; None where it was not, `most`
    are tried, they are no positive numbers, or whole ones and the next is none."""
    values = tuple(tried)
    if not 2 < len(values) < most or not all(_number(value) and float(value) > 0 for value in values):
        return None
    if (chosen := best(tried)) not in (values[0], values[-1]):
        return None
    first = chosen == values[0]
    end, beside = values[:2] if first else values[:-3:-1]
    beyond = float(end) ** 2 / float(beside)
    if (whole := all(map(str.isdigit, values))) and not beyond.is_integer():
        return None
    text = f"{beyond:.0f}" if whole else f"{beyond:g}"
    return (text, *values) if first else (*values, text)


def run(path: Path, overrides: Sequence[str], tuned: Search | None, *, at_once: int, check: Callable[[list[str]], Any],
        say: Callable[[str], None], known: Records | None = None, against: str | None = None,
        command: str | None = None) -> Records:  # fmt: skip
    """Run what is not done yet, in its folder or in what is `known`; returns the records of all that was asked.
    `check` plans a run's overrides and raises ValueError. `against`: the label of an arm that must be among them.
    `command` is kept as what made them.

    Raises ValueError with the mistakes of all runs before any starts, also where a folder holds another run, and
    FedmmError at the end where runs failed; the others are then done.
    """
    if "=" in path.name or (path / "config.yaml").exists():
        raise settings.ConfigError(f"{path} is no folder for a sweep (an override, or a run's); name one of its own")
    if tuned and (unknown := set(tuned.across) - config.axes(overrides).keys()):
        raise settings.ConfigError(f"--tune-across {min(unknown)} is no override of this sweep; name one that is")
    if tuned and tuned.key in config.axes(overrides):
        raise settings.ConfigError(f"{tuned.key} is what --tune chooses; leave {tuned.key}=... or --tune out")
    known = known or Records()
    cells = trials(path / "tune", overrides, tuned) if tuned else {}
    tried = _known_trials(known, cells, tuned) if tuned else {}
    tune_jobs = _untried(cells, tried)
    final = jobs(path / "runs", overrides)
    unplaced = [replace(job, overrides=job.overrides[:-1]) for job in final]  # their folders hold what tuning chose
    _check([*tune_jobs, *unplaced] if tuned else final, check)
    evidence.against(_told_apart(final), against)
    with alone(path):
        records.note(path, Records(commands={command: records.now()} if command else {}))
        chosen: dict[tuple[str, ...], Choice] = {}
        if tuned:
            key = tuned.key
            chosen = _tuned(path / "tune", overrides, tuned, tried, check, lambda asked: _run_all(asked, at_once, say))
            final = jobs(path / "runs", overrides, lambda cell: [f"{key}={chosen[tuple(cell)].chosen}"])
            _set_aside(path / "aside", final, key, say)
        found = _known_runs(known, final, say)
        missing = [job for job in final if job not in found]
        if tuned:
            _check(missing, check)
        commands = known.commands if found or tried else {}
        records.note(path, Records(list(found.values()), list(chosen.values()), commands))
        _run_all(missing, at_once, say)
    runs = [found.get(job) or records.of_arm(job.path) for job in final]
    return Records(runs, list(chosen.values()), records.beside(path).commands)


def _known_trials(
    known: Records, cells: Iterable[tuple[str, ...]], tuned: Search
) -> dict[tuple[str, ...], dict[str, float]]:
    """What searches of the same setting, for combinations that ask the same, have found, by value."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    choices = [choice for choice in known.choices if choice.key == tuned.key]
    for cell in cells if choices else ():
        asked = records.settings_around(tuned.key, cell)
        for choice in choices:
            if choice.settings == asked:
                found[cell] = {**found.get(cell, {}), **choice.tried}
    return found


def _untried(
    cells: Mapping[tuple[str, ...], Mapping[str, Job]], tried: Mapping[tuple[str, ...], Mapping[str, float]]
) -> list[Job]:
    return [
        job for cell, by_value in cells.items() for value, job in by_value.items() if value not in tried.get(cell, {})
    ]


def _known_runs(known: Records, asked: Sequence[Job], say: Callable[[str], None]) -> dict[Job, Run]:
    """What was asked just this. Says of how many that is so, and why not of the first that goes by the same name."""
    found: dict[Job, Run] = {}
    odd: list[str] = []
    for job in asked if known.runs else ():
        wanted = records.settings_of(config.compose(job.overrides))
        for run in known.runs:
            differ = evidence.differing(run.settings, wanted)
            if not differ:
                found[job] = run
            elif all(run.settings.get(key) == wanted[key] for key in ("data", "label", "seed")):
                key = differ[0]
                odd.append(
                    f"{job.name} is known with {key}={run.settings.get(key)!r}, and not with {wanted.get(key)!r}"
                )
    if known.runs:
        say(f"{len(found)} of {len(asked)} are known" + (f"; {odd[0]}" if odd else ""))
    return found


def _tuned(
    path: Path,
    overrides: Sequence[str],
    tuned: Search,
    tried: Mapping[tuple[str, ...], Mapping[str, float]],
    check: Callable[[list[str]], Any],
    run_all: Callable[[Sequence[Job]], None],
) -> dict[tuple[str, ...], Choice]:
    """What is chosen for every combination once no search goes on; `tried` is known already. A search ends before a
    value that cannot be."""
    wider: dict[tuple[str, ...], Sequence[str]] = {}
    while True:
        cells = trials(path, overrides, tuned, wider)
        run_all(_untried(cells, tried))
        found = {
            cell: {value: known[value] if value in known else accuracy(job) for value, job in by_value.items()}
            for cell, by_value in cells.items()
            for known in [tried.get(cell, {})]
        }
        means = {cell: _mean_of([found[other] for other in _alike(cell, found, tuned.across)]) for cell in found}
        most = len(tuned.values) + FURTHER
        more = {cell: values for cell, mean in means.items() if (values := further(mean, most))}
        next_jobs = trials(path, overrides, tuned, more) if more else {}
        odd = {cell for cell in more if _mistakes(_untried({cell: next_jobs[cell]}, found), check)}
        more = {cell: values for cell, values in more.items() if not odd & {*_alike(cell, found, tuned.across)}}
        if not more:
            return {cell: Choice.of(tuned.key, cell, found[cell], best(means[cell]), tuned.across) for cell in found}
        wider |= more


def _alike(cell: Sequence[str], cells: Iterable[tuple[str, ...]], across: Sequence[str]) -> list[tuple[str, ...]]:
    """The combinations that differ from this one in the keys of `across` alone, itself among them."""
    wanted = list(_without(cell, across))
    return [other for other in cells if list(_without(other, across)) == wanted]


def _mean_of(tried: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Accuracy by value, mean over searches of the same values."""
    return {value: statistics.fmean(found[value] for found in tried) for value in tried[0]}


def _run_all(asked: Sequence[Job], at_once: int, say: Callable[[str], None]) -> None:
    waiting = [job for job in asked if not job.done]
    if len(asked) > len(waiting):
        say(f"{len(asked) - len(waiting)} of {len(asked)} are done already")
    began = time.monotonic()
    failed: list[Job] = []
    with ThreadPoolExecutor(max(1, at_once)) as pool:
        running = {pool.submit(_run_one, job): job for job in waiting}
        try:
            for done, future in enumerate(as_completed(running), 1):
                job = running[future]
                left = (time.monotonic() - began) / done * (len(waiting) - done)
                if future.result():
                    say(f"[{done}/{len(waiting)}] {job.name}, about {left / 60:.0f} min left")
                else:
                    failed.append(job)
                    say(f"[{done}/{len(waiting)}] {job.name} FAILED: {_last_line(job.log)}")
        except BaseException:
            for future in running:
                future.cancel()
            raise
    if failed:
        raise FedmmError(
            f"{len(failed)} of {len(asked)} runs failed, the first is {failed[0].name}: {_last_line(failed[0].log)}\n"
            f"see {failed[0].log}; the same command goes on with what is missing"
        )


def _run_one(job: Job) -> bool:
    """Run a job in a process of its own; whether it came to its end."""
    with alone(job.path, wait=True):  # a sweep that was killed may have left it running
        if job.done:
            return True
    command = [sys.executable, "-m", "fedmm.cli", "run", *job.overrides, "run.at_once=1"]
    # Threads that spin while they wait hold up other runs: with two of two threads each, steps took 3.6 times as long.
    env = {"OMP_WAIT_POLICY": "passive", **os.environ}
    with job.log.open("a") as log:
        ended = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env)
    return ended.returncode == 0 and job.done


def _set_aside(path: Path, final: Sequence[Job], key: str, say: Callable[[str], None]) -> None:
    """Move runs that differ in the value of the searched setting alone from what is asked now."""
    for job in final:
        if not (job.path / "config.yaml").exists():
            continue
        there, wanted = records.asked_in(job.path), records.settings_of(config.compose(job.overrides))
        if evidence.differing(there, wanted) == [key]:
            with alone(job.path, wait=True):  # a sweep that was killed may have left it running
                path.mkdir(exist_ok=True)
                job.path.rename(path / f"{job.name}_{key}-{there[key]}_{time.time_ns()}")
            say(f"{job.name} with {key}={there[key]} is set aside, {wanted[key]} is chosen now")


def _check(asked: Sequence[Job], check: Callable[[list[str]], Any]) -> None:
    if mistakes := _mistakes(asked, check):
        lines = (f"{message}\n  ({_some(names)})" for message, names in mistakes.items())
        raise settings.ConfigError("\n".join(lines))


def _mistakes(asked: Sequence[Job], check: Callable[[list[str]], Any]) -> dict[str, list[str]]:
    """What is wrong, and with which runs."""
    found: dict[str, list[str]] = {}
    for job in asked:
        try:
            check(list(job.overrides))
        except ValueError as error:
            found.setdefault(str(error), []).append(job.name)
    return found


def _told_apart(planned: Sequence[Job]) -> list[str]:
    """The labels there will be. Raises ConfigError where two runs would stand in one row of the table with one seed."""
    seen: dict[tuple[str, str, int], str] = {}
    for job in planned:
        cfg = config.compose(job.overrides)
        if other := seen.get(row := (cfg.data, cfg.label, cfg.seed)):
            raise settings.ConfigError(
                f"{other} and {job.name} are both called {cfg.label!r}; take method=... and rule=... instead of arms, "
                "or a sweep for each with its label=..."
            )
        seen[row] = job.name
    return list(dict.fromkeys(label for _, label, _ in seen))


def _several(found: Mapping[str, Sequence[str]]) -> list[str]:
    return [key for key, values in found.items() if len(values) > 1]


def _combinations(found: Mapping[str, Sequence[str]]) -> Iterator[dict[str, str]]:
    """A value for each key, in every combination, the last key's changing first."""
    return (dict(zip(found, values, strict=True)) for values in itertools.product(*found.values()))


def _overrides(pairs: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in pairs.items()]


def _job(path: Path, name: str, overrides: Sequence[str]) -> Job:
    """A run of one arm: what a preset sets beside it is left out. The last override is run.dir."""
    one_arm = ["compare=[]"] if config.compose(overrides).compare else []
    return Job(name, path / name, (*overrides, *one_arm, config.quoted("run.dir", (path / name).absolute())))


def _without(overrides: Sequence[str], others: Sequence[str]) -> Iterator[str]:
    keys = {other.split("=", 1)[0] for other in others}
    return (override for override in overrides if override.split("=", 1)[0] not in keys)


def _name(pairs: Mapping[str, str], several: Sequence[str]) -> str:
    others = sorted(set(several) - {*_IN_NAME, "seed"})  # in whatever order they were asked
    keys = [key for key in (*_IN_NAME, *others, "seed") if key in pairs]
    return "_".join(re.sub(r"[^\w.-]+", "-", f"{key}={pairs[key]}") for key in keys)


def _number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _same(value: str, other: str) -> bool:
    return _number(value) and _number(other) and float(value) == float(other)


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1][:300] if lines else "it left no log"
