"""Fixtures of all rooms. What tests import stands in helpers.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finished import write_arm
from helpers import PROMPT, run, small_llava, some_examples

from fedmm import seeds
from fedmm.edge import frozen_modules
from fedmm.edge.nano_edge import NanoEdge
from fedmm.edge.prepare import Processor, collate, prepare
from fedmm.edge.prepared import Prepared
from fedmm.llm.local import LocalLLM
from fedmm.types import Batch

torch.set_num_threads(1)  # as in clients and host: sums depend on the number of threads


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def llava(llava_folder: Path):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(llava_folder)
    return model, AutoProcessor.from_pretrained(llava_folder)


@pytest.fixture(scope="session")
def local_llm(llava) -> LocalLLM:
    return LocalLLM(llava[0])


@pytest.fixture(scope="session")
def processor(llava) -> Processor:
    return frozen_modules.build(frozen_modules.take(*llava))[1]


@pytest.fixture
def edge(llava) -> NanoEdge:
    """An edge whose adapters have left their start, so that every gradient is something."""
    built, _ = frozen_modules.build(frozen_modules.take(*llava), rank=4, alpha=8.0)
    generator = seeds.generator(0, "test edge")
    built.reset(generator)
    with torch.no_grad():
        for parameter in built.trainable("shared").values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return built


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """What processes keep between runs, a test keeps to itself."""
    monkeypatch.setenv("FEDMM_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def backbone(tmp_path_factory) -> list[str]:
    """The overrides that put a small random LLaVA in the place of LLaVA-1.5-7B, through the same yaml and loader."""
    path = small_llava(tmp_path_factory.mktemp("backbone"), image_size=48)
    return [
        "llm=llava_1_5_7b",
        f"llm.path={path}",
        "llm.dtype=float32",
        "llm.device=cpu",
        r'llm.prompt="<image> {question}"',
    ]


@pytest.fixture(scope="session")
def finished(backbone, tmp_path_factory) -> Callable[..., Path]:
    """A whole run of some overrides, made once and only to be read; its home is its own."""

    @functools.cache
    def made(*overrides: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEDMM_HOME", str(tmp_path_factory.mktemp("home")))
            return run(backbone, tmp_path_factory.mktemp("finished") / "run", *overrides)

    return made


@pytest.fixture
def items(processor) -> list[Prepared]:
    return prepare(some_examples(), processor, PROMPT)


@pytest.fixture
def batch(items) -> Batch:
    return collate(items)


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """FedAvg and local, three seeds: client 0 gains 10 points by joining, client 1 loses 0, 2 and 4."""
    made = []
    for seed, (base, loss) in enumerate(((0.50, 0.00), (0.60, 0.02), (0.70, 0.04))):
        made.append(write_arm(tmp_path / f"avg{seed}", "FedAvg", seed, {"0": base + 0.1, "1": base - loss}))
        made.append(write_arm(tmp_path / f"local{seed}", "local", seed, {"0": base, "1": base}))
    return made
