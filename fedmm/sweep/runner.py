"""Many runs from one line of overrides: every combination of what has several values, each a process of its own.

    fedmm sweep DIR arm=fedavg,feddat scenario=domain,function seed=0,1,2 --tune optimizer.lr=3e-3,6e-3

With `--tune` each combination, seeds apart, is first run with every rate
on the validation split under a seed of its own, and goes on with the best by the clients' own accuracy: the same
small search for each. With `--tune-across scenario` it goes on with the best on average over scenarios, as one run says
little. Of three values or more the search goes on past an end that is best, by the same step, twice at most. A run is
done when it has its summary; what is done is not repeated, what was cut goes on.

The same folder takes more values later: what it holds of them is done. Where a wider search then chooses another value,
other runs are made, and those of the former stay in their folders, out of the folder's tables.

    DIR/tune/<name>  DIR/runs/<name>  <name>.log beside each
    DIR/runs.jsonl  the runs that the folder stands for, its own and what --known gave
    DIR/tuned.json  what was chosen     DIR/commands.json     DIR/results.md  .png  .jsonl  of what was asked last
"""

from __future__ import annotations

import fcntl
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedmm.config import composition, settings
from fedmm.results import intervals
from fedmm.runs import records
from fedmm.runs.folder import alone
from fedmm.runs.records import Choice, Records, Run
from fedmm.storage import disk
from fedmm.sweep import plan
from fedmm.sweep.plan import Job, Search
from fedmm.types import FedmmError

PAGE = "results.md"  # in a sweep's folder; picture and records beside it


# parameters: options of `fedmm sweep`, and what the command line brings along: check and say
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
        raise settings.ConfigError(
            f"{path} cannot be a sweep's folder: it is an override or the folder of a run; name a new one"
        )
    given = composition.axes(overrides).keys()
    if tuned and (unknown := {*tuned.across} - (given - {"seed"})):
        raise settings.ConfigError(
            f"--tune-across {min(unknown)} must name settings that this sweep overrides, other than seed"
        )
    if tuned and tuned.key in map(composition.key_of, given):
        raise settings.ConfigError(f"{tuned.key} is set by --tune and by {tuned.key}=...; remove one of them")
    known = known or Records()
    cells = plan.trials(path / "tune", overrides, tuned) if tuned else {}
    tried = _known_trials(known, cells, tuned) if tuned else {}
    tune_jobs = _untried(cells, tried)
    final = plan.jobs(path / "runs", overrides)
    unplaced = [replace(job, overrides=job.overrides[:-1]) for job in final]  # their folders hold what tuning chose
    _check([*tune_jobs, *unplaced] if tuned else final, check)
    intervals.against(_told_apart(final), against)
    with alone(path):
        records.note(path, Records(commands={command: records.now()} if command else {}))
        chosen: dict[tuple[str, ...], Choice] = {}
        if tuned:
            key = tuned.key
            chosen = _tuned(path / "tune", overrides, tuned, tried, check, lambda asked: _run_all(asked, at_once, say),
                            say)  # fmt: skip
            final = plan.jobs(path / "runs", overrides, lambda cell: [f"{key}={chosen[tuple(cell)].chosen}"])
        found = _known_runs(known, final, say)
        missing = [job for job in final if job not in found]
        if tuned:
            _check(missing, check)
        commands = known.commands if found or tried else {}
        there = [*found.values(), *(records.of_arm(job.path) for job in missing if job.done)]
        asked = [records.settings_of(composition.compose(job.overrides)) for job in missing]
        records.note(path, Records(there, list(chosen.values()), commands), asked)
        _run_all(missing, at_once, say, lambda job: records.note(path, Records([records.of_arm(job.path)])))
    runs = [found.get(job) or records.of_arm(job.path) for job in final]
    return Records(runs, list(chosen.values()), records.noted(path).commands)


def accuracy(job: Job) -> float:
    """Own accuracy of a trial, mean over clients; one that the run lost on its way answered nothing."""
    told = json.loads((job.path / "summary.json").read_text())
    own = told["final"]["own"]
    if not own:
        raise FedmmError(f"{job.path} has no score of any client; its log {job.log} says why")
    return sum(own.values()) / (len(own) + len(told.get("unscored", ())))


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
        wanted = records.settings_of(composition.compose(job.overrides))
        for run in known.runs:
            differ = records.differing(run.settings, wanted)
            if not differ:
                found[job] = run
            elif all(run.settings.get(key) == wanted[key] for key in ("data", "label", "seed")):
                key = differ[0]
                odd.append(f"{job.name} has {key}={run.settings.get(key)!r} there, and {wanted.get(key)!r} here")
    if known.runs:
        of = f", of {days}" if (days := records.days(found.values())) else ""
        say(f"{len(found)} of {len(asked)} runs are in --known{of}" + (f"; {odd[0]}" if odd else ""))
    return found


def _tuned(
    path: Path,
    overrides: Sequence[str],
    tuned: Search,
    tried: Mapping[tuple[str, ...], Mapping[str, float]],
    check: Callable[[list[str]], Any],
    run_all: Callable[[Sequence[Job]], None],
    say: Callable[[str], None],
) -> dict[tuple[str, ...], Choice]:
    """What is chosen for every combination once no search goes on; `tried` is known already. A search ends before a
    value that cannot be, and before one of its own whose run fails, as where training diverges."""
    run_all(_untried(plan.trials(path, overrides, tuned), tried))
    wider: dict[tuple[str, ...], Sequence[str]] = {}
    ended: set[tuple[str, ...]] = set()
    while True:
        found = {
            cell: {value: known[value] if value in known else accuracy(job) for value, job in by_value.items()}
            for cell, by_value in plan.trials(path, overrides, tuned, wider).items()
            for known in [tried.get(cell, {})]
        }
        means = {cell: _mean_of([found[other] for other in plan.alike(cell, found, tuned.across)]) for cell in found}
        most = len(tuned.values) + plan.FURTHER
        asked = {c: values for c, mean in means.items() if c not in ended and (values := plan.further(mean, most))}
        more = plan.trials(path, overrides, tuned, asked)
        beyond = {cell: _untried({cell: more[cell]}, {cell: {**tried.get(cell, {}), **found[cell]}}) for cell in asked}
        ended |= _alike_to((cell for cell in asked if _mistakes(beyond[cell], check)), found, tuned)
        try:
            run_all([job for cell in asked if cell not in ended for job in beyond[cell]])
        except FedmmError as error:
            say(f"the search stops before a value whose run failed: {error}")
            failed = (cell for cell in asked if not all(job.done for job in beyond[cell]))
            ended |= _alike_to(failed, found, tuned)
        if not (goes_on := {cell: values for cell, values in asked.items() if cell not in ended}):
            return {
                cell: Choice.of(tuned.key, cell, found[cell], plan.best(means[cell]), tuned.across) for cell in found
            }
        wider |= goes_on


def _alike_to(
    cells: Iterable[tuple[str, ...]], among: Collection[tuple[str, ...]], tuned: Search
) -> set[tuple[str, ...]]:
    """These combinations and those that take one value with them."""
    return {other for cell in cells for other in plan.alike(cell, among, tuned.across)}


def _mean_of(tried: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Accuracy by value, mean over searches of the same values."""
    return {value: statistics.fmean(found[value] for found in tried) for value in tried[0]}


def _run_all(
    asked: Sequence[Job], at_once: int, say: Callable[[str], None], ended: Callable[[Job], None] = lambda job: None
) -> None:
    waiting = [job for job in asked if not job.done]
    if len(asked) > len(waiting):
        say(f"{len(asked) - len(waiting)} of {len(asked)} runs are already done")
    began = time.monotonic()
    failed: list[Job] = []
    with ThreadPoolExecutor(max(1, at_once)) as pool:
        running = {pool.submit(_run_one, job): job for job in waiting}
        try:
            for done, future in enumerate(as_completed(running), 1):
                job = running[future]
                left = (time.monotonic() - began) / done * (len(waiting) - done)
                if future.result():
                    ended(job)
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
            f"{len(failed)} of {len(asked)} runs failed. The first is {failed[0].name}: {_last_line(failed[0].log)}\n"
            f"The whole log is {failed[0].log}. The same command runs only what is missing."
        )


def _run_one(job: Job) -> bool:
    """Run a job in a process of its own; whether it came to its end.

    The process holds its log from its first moment to its last: one that a killed sweep left running is waited for.
    """
    command = [sys.executable, "-m", "fedmm.cli", "run", *job.overrides, "run.at_once=1"]
    # Threads that spin while they wait hold up other runs: with two of two threads each, steps took 3.6 times as long.
    env = {"OMP_WAIT_POLICY": "passive", **os.environ}
    with disk.named(job.log.parent, "name another folder for the sweep"):
        disk.make_folder(job.log.parent)
        opened = disk.opened(job.log, "a")
    with opened as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        if job.done:
            return True
        ended = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env)
    return ended.returncode == 0 and job.done


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
        cfg = composition.compose(job.overrides)
        if other := seen.get(row := (cfg.data, cfg.label, cfg.seed)):
            raise settings.ConfigError(
                f"{other} and {job.name} both have the label {cfg.label!r}; sweep over method=... and rule=... instead "
                "of arms, or make a sweep with its own label=... for each"
            )
        seen[row] = job.name
    return list(dict.fromkeys(label for _, label, _ in seen))


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1][:300] if lines else "it wrote no log"
