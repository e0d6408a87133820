"""What tests of several rooms make: a small random LLaVA of the real classes, a host that serves it, whole runs."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedmm.config import composition
from fedmm.edge import frozen_modules
from fedmm.edge.nano_edge import NanoEdge
from fedmm.link.session import Session
from fedmm.llm.local import LocalLLM
from fedmm.runs.folder import read_rows
from fedmm.serving.features import Features
from fedmm.serving.host import Host
from fedmm.serving.limits import Limits
from fedmm.storage.tensor_store import Store
from fedmm.types import Example, Update

ROOT = Path(__file__).parents[1]
PROMPT = "<image> {question}"
SMALL = ["rounds=2", "clients=3", "batch_size=8", "edge.rank=4", "partition=iid"]
DATA = ["dataset.train=36", "dataset.validation=9", "dataset.test=12"]
WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "which",
    "digit",
    "is",
    "red",
    "blue",
    "left",
    "right",
    "what",
    "colour",
    "the",
    "sum",
    "?",
    "one",
    "two",
    "three",
]


def small_llava(folder: Path, seed: int = 0, image_size: int = 16, tied: bool = False) -> Path:
    """Write a random LLaVA checkpoint with its processor to `folder`, as a hub would have it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, additional_special_tokens=["<image>"], **special)
    size = {"height": image_size, "width": image_size}
    images = CLIPImageProcessor(size=size, do_center_crop=False, do_resize=True)
    processor = LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    vision = CLIPVisionConfig(
        hidden_size=12, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        image_size=image_size, patch_size=8, projection_dim=12,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=WORDS.index("<image>"),
            tie_word_embeddings=tied,
        )
        model = LlavaForConditionalGeneration(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers starts them at zero, where a forgotten one would not be seen
                torch.nn.init.normal_(parameter, std=0.1)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def some_examples(count: int = 3, image_size: int = 16) -> list[Example]:
    """Noise with questions of different lengths and answers of one or two words."""
    pixels = np.random.default_rng(0).integers(0, 255, (count, image_size, image_size, 3), dtype=np.uint8)
    asked = [("which digit is red ?", "two"), ("what is the sum ?", "three one"), ("which digit is left ?", "one")]
    return [Example(f"train/{i}", [Image.fromarray(pixels[i])], *asked[i % 3]) for i in range(count)]


@contextmanager
def served(llava, edge: NanoEdge, llm: LocalLLM, **options) -> Iterator[tuple[Host, list[Update]]]:
    """A host in round 1 that awaits clients 0 and 1, and the updates that reached it; `traffic` gets theirs."""
    taken: list[Update] = []
    frozen = frozen_modules.take(*llava)
    card = frozen_modules.describe(llava[0], frozen, PROMPT)
    store = options.pop("store", Store(memory_bytes=1 << 30))
    features = Features(*frozen_modules.build_base(frozen), store)
    limits = Limits(**{field.name: options.pop(field.name) for field in fields(Limits) if field.name in options})
    traffic = options.pop("traffic", {})

    def keep(round, update, moved):
        taken.append(update)
        traffic.update(moved)

    with Host(llm, card=card, edge=frozen, features=features, on_update=keep, limits=limits, **options) as host:
        host.open_round(1, edge.state(), [0, 1])
        yield host, taken


@contextmanager
def visiting(host: Host, client: int = 0, **options) -> Iterator[Session]:
    address = options.pop("address", f"127.0.0.1:{host.port}")
    token = options.pop("token", host.token(1, client))
    with Session(address, client=client, round=1, token=token, **{"deadline_seconds": 10.0, **options}) as session:
        yield session


def gradients(edge: NanoEdge) -> dict[str, torch.Tensor]:
    """The gradients of the shared set, taken off it."""
    found = {name: p.grad.clone() for name, p in edge.trainable("shared").items() if p.grad is not None}
    edge.zero_grad()
    return found


def run(backbone, folder: Path, *overrides: str, page: bool = False) -> Path:
    """A whole run in this process, small enough for a test; `page` writes its report too, which takes as long again."""
    from fedmm.flower import inprocess
    from fedmm.flower.server_app import plan

    asked = [*backbone, *SMALL, *DATA, "run.at_once=1", *overrides, composition.quoted("run.dir", folder)]
    return inprocess.run(plan(asked), page=page)


def in_tiers(**tiers: Iterable[object]) -> list:
    """Parameters of a test by the tier that runs it: in_tiers(unit=["fedavg"], deploy=["feddat", "local"])."""
    marks = {tier: () if tier == "unit" else getattr(pytest.mark, tier) for tier in tiers}
    return [pytest.param(value, marks=marks[tier]) for tier, values in tiers.items() for value in values]


def every(group: str, *quick: str) -> list:
    """Every yaml of a group: those named here in the unit tier, the others in the tier that tries every yaml."""
    return in_tiers(unit=quick, deploy=[name for name in composition.options(group) if name not in quick])


def rounds(path: Path) -> list[dict]:
    return read_rows(path / "rounds.jsonl")


class CountingProxy:
    """Passes bytes between clients and a host and counts them, knowing nothing of frames."""

    def __init__(self, port: int) -> None:
        self.bytes = {"up": 0, "down": 0}
        self._port = port
        self._sockets = [socket.create_server(("127.0.0.1", 0))]
        self._threads: list[threading.Thread] = []
        self.address = f"127.0.0.1:{self._sockets[0].getsockname()[1]}"
        self._start(self._accept)

    def _start(self, work, *args) -> None:
        self._threads.append(threading.Thread(target=work, args=args, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._sockets[0].accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            self._sockets += [client, server]
            self._start(self._pump, client, server, "up")
            self._start(self._pump, server, client, "down")

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        try:
            while data := source.recv(1 << 16):
                self.bytes[way] += len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def close(self) -> None:
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join(timeout=5)
