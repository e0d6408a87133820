"""The ServerApp: composes the configuration, loads the frozen LLM once, runs every arm, writes the report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from omegaconf import OmegaConf

from fedmm.bounds import Mistake
from fedmm.config import composition, settings
from fedmm.config.settings import Config
from fedmm.federation import descriptors
from fedmm.federation.build import Whole, partition, splits, whole
from fedmm.federation.server_stages import check_stages
from fedmm.flower.nodes import find_clients
from fedmm.flower.rounds import run_arm
from fedmm.results import report
from fedmm.runs.events import RunBegan, RunFailed, RunFinished
from fedmm.runs.folder import RunFolder, alone, check_folder
from fedmm.storage.tensor_store import Store
from fedmm.types import FedmmError

app = ServerApp()


@dataclass(frozen=True)
class Arm:
    """One arm of a run: where it goes, what was asked, and the configuration that is."""

    name: str
    folder: Path
    overrides: list[str]
    cfg: Config


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run, from the overrides of Flower's run config. Raises with the reason, and leaves it in events.jsonl."""
    run(grid, plan(composition.split(str(context.run_config.get("overrides", "")))))


def plan(overrides: list[str]) -> list[Arm]:
    """The arms that `overrides` ask for, the main one first, each checked whole; writes nothing.

    Raises ConfigError with every mistake of every arm, that the data cannot be divided as asked among them.
    """
    cfg = composition.compose(overrides)
    path = Path(cfg.run.dir or time.strftime("runs/%Y-%m-%d_%H-%M-%S")).absolute()
    overrides = [*(o for o in overrides if not o.startswith("run.dir=")), composition.quoted("run.dir", path)]
    arms = [
        Arm(name, path if name == "main" else path / "arms" / name, asked, composition.compose(asked))
        for name, asked in composition.arms(cfg, overrides)
    ]
    labels = [arm.cfg.label for arm in arms]
    mistakes = dict.fromkeys(mistake.text for arm in arms for mistake in _mistakes(arm))
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        mistakes[f"two arms are called {twice[0]}; set label=... or take one out of compare"] = None
    if mistakes:
        raise settings.ConfigError("\n".join(mistakes))
    return arms


def run(grid: Grid, arms: list[Arm], *, page: bool = True) -> Path:
    """Run the arms in turn and write the report, unless `page` is false. Returns the run's folder.

    The folder is there once the LLM is loaded. `fedmm.results.report.write` can write the report later.
    """
    for arm in arms:
        descriptors.claim(arm.cfg)
    loaded = whole(arms[0].cfg)
    with alone(arms[0].folder):
        return _run(grid, arms, loaded, page)


def _run(grid: Grid, arms: list[Arm], loaded: Whole, page: bool) -> Path:
    folders = [RunFolder(arm.folder, OmegaConf.to_yaml(arm.cfg), arm.overrides) for arm in arms]
    top = folders[0]
    try:
        top.log(RunBegan([arm.cfg.label for arm in arms], str(top.path)))
        nodes = find_clients(grid, arms[0].cfg.run, arms[0].cfg.clients, top.log)
        with closing(_feature_store(arms[0].cfg, top.path)) as store:
            for arm, folder in zip(arms, folders, strict=True):
                run_arm(grid, nodes, arm.cfg, arm.overrides, loaded, folder, store)
        top.log(RunFinished(str(report.write(top.path)) if page else ""))
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        with suppress(FedmmError):  # of a full disk: `error` says so already, and this one would hide it
            top.log(RunFailed("stopped from the keyboard" if stopped else f"{type(error).__name__}: {error}"))
        raise
    return top.path


def _feature_store(cfg: Config, path: Path) -> Store:
    """Where clients leave their samples' features: for all arms of the run, and gone with it; a killed one's go now."""
    shutil.rmtree(path / "features", ignore_errors=True)
    memory_bytes, disk_bytes = cfg.link.cache_memory_mb << 20, cfg.link.cache_disk_mb << 20
    return Store(memory_bytes=memory_bytes, folder=path / "features", disk_bytes=disk_bytes, ephemeral=True)


OF_DATA = ("dataset.", "partition.", "clients.", "evaluate.split.")  # what the data are made and divided by


def _mistakes(arm: Arm) -> Iterator[Mistake]:
    """What is wrong with one arm; every split is divided once, to see that it can be."""
    found = list(composition.check(arm.cfg))
    yield from found
    if not found:
        yield from descriptors.mistakes(arm.cfg)
    try:
        check_folder(arm.folder, OmegaConf.to_yaml(arm.cfg))
    except ValueError as error:
        yield Mistake("run.dir", str(error))
    try:
        if arm.cfg.run.has_data and not any(f"{mistake.path}.".startswith(OF_DATA) for mistake in found):
            made = splits(arm.cfg)
            if not made.get(arm.cfg.evaluate.split):
                has = ", ".join(split for split, examples in made.items() if examples)
                empty = f"evaluate.split={arm.cfg.evaluate.split} is empty or not there; the dataset has {has}"
                yield Mistake("evaluate.split", empty)
            check_stages(arm.cfg)
            for split in ("train", arm.cfg.evaluate.split):
                if made.get(split):
                    partition(arm.cfg, split)
    except ValueError as error:
        yield Mistake("dataset", str(error))
