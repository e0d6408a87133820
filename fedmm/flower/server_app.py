"""The ServerApp: composes the configuration, loads the frozen LLM once, runs every arm, writes the report."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from omegaconf import OmegaConf

from fedmm.flower.rounds import find_clients, run_arm
from fedmm.runs import config, report
from fedmm.runs.client import partition, splits
from fedmm.runs.folder import RunFolder

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run, from the overrides of Flower's run config. Raises with the reason, and leaves it in events.jsonl."""
    run(grid, config.split(str(context.run_config.get("overrides", ""))))


def run(grid: Grid, overrides: list[str]) -> Path:
    """Check everything, then run the arms in turn. Returns the run's folder; nothing is written before the checks."""
    cfg = config.load(overrides)
    path = Path(cfg.run.dir).absolute()
    overrides = [*(o for o in overrides if not o.startswith("run.dir=")), f"run.dir={path}"]
    arms = [(name, asked, config.load(asked)) for name, asked in config.arms(cfg, overrides)]
    for _, _, arm in arms:
        _check_partition(arm)
    main_folder = RunFolder(path, OmegaConf.to_yaml(cfg), overrides)
    try:
        main_folder.event("run", arms=[arm.label for _, _, arm in arms], dir=str(path))
        nodes = find_clients(grid, cfg.clients, cfg.run.wait_seconds)
        backbone = config.make(cfg.llm)
        for name, asked, arm in arms:
            folder = main_folder
            if name != "main":
                folder = RunFolder(path / "arms" / name, OmegaConf.to_yaml(arm), asked)
            run_arm(grid, nodes, arm, asked, backbone, folder)
        report.write(path)
        main_folder.event("finished", report=str(path / "report.html"))
    except BaseException as error:
        main_folder.event("failed", error=f"{type(error).__name__}: {error}")
        raise
    return path


def _check_partition(cfg: config.Config) -> None:
    """Divide every split once, so that an impossible partition is refused before anything starts."""
    if not cfg.run.examples:
        return  # the server does not hold the clients' data
    for split, examples in splits(cfg).items():
        if split in ("train", cfg.evaluate.split) and examples:
            partition(cfg, split)
