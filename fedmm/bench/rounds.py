"""What a round of the embedded run costs beside its training alone, arm by arm.

A round is orders, sessions, steps over the link, updates, the rule and what is written, one client after another.
Beside it stand the same clients' training and Fisher with the LLM in their process, before the run and after it.
Scoring and the making of features, which the first round alone has, are in neither.

Then what a client costs beside its training, with few clients and with many in one process: they share what none of
them changes, so it must not grow with their number.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from omegaconf import OmegaConf

from fedmm.bench.common import Case, Size
from fedmm.config.composition import load
from fedmm.config.settings import Config
from fedmm.config.targets import make
from fedmm.edge.prepare import encode, prepare
from fedmm.edge.prepared import Prepared
from fedmm.federation.build import Whole, client_shards, initial_state, local_model, partition, splits, whole
from fedmm.flower.inprocess import InProcessGrid
from fedmm.flower.nodes import find_clients
from fedmm.flower.rounds import run_arm
from fedmm.model import Model
from fedmm.runs import events
from fedmm.runs.folder import RunFolder
from fedmm.storage.tensor_store import Store
from fedmm.train import train

ASKED = ("evaluate.every=0", "evaluate.everywhere=false", "partition=iid", "dataset.validation=5", "dataset.test=5")
ARMS = (  # what differs at the server alone costs a round nothing that FedAvg's does not show
    "centralised", "fedavg", "fedavg_plateau", "feddat", "fednano", "fednano_ef", "fedprox", "flora", "local",
)  # fmt: skip
SIZES = {
    "toy": ("rounds=2", "clients=2", "batch_size=8", "dataset.train=16"),
    "real": ("rounds=4",),  # of the default run: 1,500 examples at five clients
}
CLIENTS = {"toy": (2, 4), "real": (100, 400)}
FIXED_SECONDS = 0.05  # of a client whose backbone and settings are those of the client before


def cases(size: Size) -> Iterator[Case]:
    """Seconds of a round, without a bar; seconds of a client beside its training."""
    loaded = whole(load())
    for arm in ARMS:
        overrides = [*ASKED, *SIZES[size], f"arm={arm}"]
        cfg = load(overrides)
        before, rounds, after = _alone(cfg, loaded), _rounds(cfg, overrides, loaded), _alone(cfg, loaded)
        value, alone = statistics.median(rounds), (before + after) / 2
        detail = {"local": alone, "ratio": value / alone, "median_of": len(rounds)}
        yield Case("rounds", f"a round of {cfg.label}", value, "s", detail=detail)
    for clients in CLIENTS[size]:
        overrides = [*ASKED, "arm=fedavg", "rounds=2", f"dataset.train={20 * clients}", f"clients={clients}"]
        value = statistics.median(_fixed(load(overrides), overrides, loaded))
        bar = FIXED_SECONDS if size == "real" else None
        yield Case("rounds", f"a client beside its training, of {clients}", value, "s", bar, detail={"round": 2})


def _rounds(cfg: Config, overrides: list[str], loaded: Whole) -> list[float]:
    """Seconds of the rounds after the first."""
    with _finished(cfg, overrides, loaded) as folder:
        ended = [logged.event for logged in events.read(folder.path) if isinstance(logged.event, events.RoundEnded)]
    return [event.seconds for event in ended if event.round > 1]


def _fixed(cfg: Config, overrides: list[str], loaded: Whole) -> list[float]:
    """Each client's seconds in the second round, less those of its training; nobody is scored in it."""
    with _finished(cfg, overrides, loaded) as folder:
        second = [row for row in folder.rows("ledger.jsonl") if row["kind"] == "client" and row["round"] == 2]
    return [row["seconds"] - row["train_seconds"] - row["fisher_seconds"] for row in second]


@contextmanager
def _finished(cfg: Config, overrides: list[str], loaded: Whole) -> Iterator[RunFolder]:
    """The folder of a whole run in this process."""
    with (
        TemporaryDirectory() as path,
        mock.patch.dict(os.environ, {"FEDMM_HOME": f"{path}/home"}),
        InProcessGrid(cfg.clients) as grid,
        closing(Store(memory_bytes=cfg.link.cache_memory_mb << 20)) as store,
    ):
        folder = RunFolder(Path(path) / "run", OmegaConf.to_yaml(cfg), overrides)
        run_arm(grid, find_clients(grid, cfg.run, cfg.clients, folder.log), cfg, overrides, loaded, folder, store)
        yield folder


def _alone(cfg: Config, loaded: Whole) -> float:
    """Seconds of one round's training and Fisher of all clients, with the LLM in this process."""
    model, processor = local_model(cfg, loaded)
    indices, examples = partition(cfg, "train"), splits(cfg)["train"]
    seconds = 0.0
    for client in [0] if cfg.pooled else range(cfg.clients):
        own = [examples[i] for part in client_shards(cfg, client) for i in indices[part]]
        items = encode(model.edge, prepare(own, processor, loaded.backbone.prompt))
        began = time.perf_counter()
        _train(cfg, client, model, items)
        seconds += time.perf_counter() - began
    return seconds


def _train(cfg: Config, client: int, model: Model, items: list[Prepared]) -> None:
    for name in cfg.method.sets:
        model.edge.load(initial_state(cfg, model.edge, name), name)
    model.edge.freeze_all_but(make(cfg.schema)(1, cfg.rounds).trains)
    trained = train(
        model,
        items,
        make(cfg.method.step),
        make_optimizer=make(cfg.optimizer),
        anchor=model.edge.state(cfg.method.sets[0]),
        seed=cfg.seed,
        round=1,
        rounds=cfg.rounds,
        client=client,
        epochs=cfg.epochs,
        batch_size=cfg.batch_size,
        clip_norm=cfg.clip_norm,
    )
    if cfg.method.fisher is not None:
        make(cfg.method.fisher)(model, items, trained.last)
