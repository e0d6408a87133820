"""What a client of LLaVA-1.5-7B takes at its peak: true shapes, random weights, the client's own code, no network.

    first pass      a process of a client's first round: the frozen modules come and are kept, every image is encoded
    from the cache  a process of any later round: features from the disk, and training steps that no LLM answers, but
                    every gradient by h and B is there

Each is a new process with all that a ClientApp imports. A figure is its peak; beside it, what it held on the way there.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedmm import seeds, tree
from fedmm.bench.common import Case, Size
from fedmm.config.composition import load
from fedmm.edge.base import Connector
from fedmm.edge.frozen_modules import base, take_files
from fedmm.edge.nano_edge import NanoEdge
from fedmm.edge.prepare import prepare
from fedmm.edge.prepared import Prepared
from fedmm.federation import build
from fedmm.methods.lora import lora
from fedmm.model import LLM, SplitModel
from fedmm.storage import machine_cache
from fedmm.storage.memory import peak_rss_bytes, rss_bytes
from fedmm.train import train
from fedmm.types import Embeds, Example, State

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaProcessor

SAMPLES, BATCHES = 8, (1, 8)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
QUESTION_TOKENS, ANSWER_TOKENS = 64, 4  # drawn from the whole vocabulary: hardly two are near each other in the table


@dataclass(frozen=True)
class Shapes:
    """Of the client's modules: E encoder width, D LLM width, V vocabulary, R rank."""

    E: int
    layers: int
    heads: int
    mlp: int
    image: int
    patch: int
    D: int
    V: int
    R: int


SHAPES = {
    "toy": Shapes(E=16, layers=3, heads=2, mlp=32, image=28, patch=14, D=32, V=200, R=4),
    "real": Shapes(E=1024, layers=24, heads=16, mlp=4096, image=336, patch=14, D=4096, V=32064, R=64),
}


def cases(size: Size) -> Iterator[Case]:
    """The peaks, and what a client under llm.where=client holds before any activation.

    Bars are of real size; batches of 8 have none, as their base embeddings alone are 75 MB, thrice.
    """
    shapes, real = SHAPES[size], size == "real"
    count = whole_parameters(shapes)
    yield Case("memory", "the whole model in bf16, by arithmetic", _gb(2 * count), "GB", detail={"parameters": count})
    with TemporaryDirectory() as folder:
        yield _case(f"first pass, {SAMPLES} images", _alone(folder, _first, shapes), 2.0 if real else None)
        for batch_size, stages in zip(BATCHES, _alone(folder, _later, shapes), strict=True):
            yield _case(f"from the cache, batches of {batch_size}", stages, 0.6 if real and batch_size == 1 else None)


def _case(name: str, stages: dict[str, float], bar: float | None) -> Case:
    return Case("memory", name, stages.pop("peak_gb"), "GB", bar, detail=stages)


def _alone(folder: str, work: Callable[[Shapes], Any], shapes: Shapes) -> Any:
    """What `work` gives in a new process, whose FEDMM_HOME is `folder`."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, _enter, (folder,)) as pool:
        return pool.submit(work, shapes).result()


def _enter(folder: str) -> None:
    import fedmm.flower.client_app  # noqa: F401

    os.environ["FEDMM_HOME"] = folder
    torch.set_num_threads(1)


def _first(shapes: Shapes) -> dict[str, float]:
    stages = {"imports_gb": _gb(rss_bytes())}
    came = frozen(shapes)
    machine_cache.save_modules(tree.digest(came), came)
    del came
    stages["peak_until_kept_gb"] = _gb(peak_rss_bytes())
    _ready(shapes, stages)
    return stages | {"peak_gb": _gb(peak_rss_bytes())}


def _later(shapes: Shapes) -> list[dict[str, float]]:
    """For each size of batches, the larger after the smaller, as a peak only rises."""
    stages = {"imports_gb": _gb(rss_bytes())}
    edge, items = _ready(shapes, stages)
    found = []
    for batch_size in BATCHES:
        train(
            SplitModel(edge, cast(LLM, Answerless())),
            items,
            lora,
            make_optimizer=torch.optim.AdamW,
            anchor=edge.state(),
            seed=0,
            round=1,
            rounds=1,
            client=0,
            batch_size=batch_size,
            clip_norm=1.0,
        )
        found.append(stages | {"after_training_gb": _gb(rss_bytes()), "peak_gb": _gb(peak_rss_bytes())})
    return found


def _ready(shapes: Shapes, stages: dict[str, float]) -> tuple[NanoEdge, list[Prepared]]:
    """What a client does before it trains, as in `carry_out`."""
    cfg, digest = load([f"edge.rank={shapes.R}"]), next((machine_cache.home() / "edge").iterdir()).stem
    modules = machine_cache.load_modules(digest)
    assert modules is not None
    encoder = build.cached_encoder(cfg, modules, digest)
    assert encoder is not None
    shared = base(modules, modules.rows("table"))
    edge, processor = build.build_edge(cfg, modules, encoder=False, shared=shared)
    edge.reset(seeds.generator(0, "adapters"))
    items = prepare([_example(shapes, i) for i in range(SAMPLES)], processor, "<image> {question}", encoder)
    stages["built_gb"] = _gb(rss_bytes())
    encoder.fill(items)
    stages["filled_gb"] = _gb(rss_bytes())
    return edge, items


class Answerless:
    """In the place of the link: some loss, with all gradients that would come down."""

    def losses(self, branches: Sequence[Embeds], *_: object) -> tuple[Tensor, ...]:
        terms = [(term.h_NR, term.up_DR) for embeds in branches for term in embeds.terms]
        return (torch.stack([tensor.square().sum() for pair in terms for tensor in pair]).sum(),)


def frozen(shapes: Shapes) -> State:
    """Random frozen modules in fp16, under the names that those of a whole model have."""
    generator = seeds.generator(0, "frozen")
    modules = {
        name: torch.empty(size, dtype=torch.float16).normal_(std=0.02, generator=generator)
        for name, size in sizes(shapes).items()
    }
    return modules | take_files(_config(shapes), _processor(shapes))


def sizes(shapes: Shapes) -> dict[str, torch.Size]:
    """The shape of each tensor of the frozen modules."""
    from transformers import AutoModel

    with torch.device("meta"):
        tower, connector = AutoModel.from_config(_config(shapes).vision_config), Connector(shapes.E, shapes.D)
    modules = {"encoder": tower, "connector": connector}
    found = {f"{part}/{name}": t.shape for part, module in modules.items() for name, t in module.state_dict().items()}
    return found | {"table": torch.Size((shapes.V, shapes.D))}


def whole_parameters(shapes: Shapes) -> int:
    """Of encoder, connector and LLM together."""
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(_config(shapes))
    return sum(parameter.numel() for parameter in model.parameters())


def _config(shapes: Shapes) -> LlavaConfig:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=shapes.E, intermediate_size=shapes.mlp, num_hidden_layers=shapes.layers,
        num_attention_heads=shapes.heads, image_size=shapes.image, patch_size=shapes.patch,
    )  # fmt: skip
    text = LlamaConfig(vocab_size=shapes.V, hidden_size=shapes.D)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=SPECIAL.index("<image>"))


def _processor(shapes: Shapes) -> LlavaProcessor:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = [*SPECIAL, *map(str, range(shapes.V - len(SPECIAL)))]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    side = {"height": shapes.image, "width": shapes.image}
    images = CLIPImageProcessor(size={"shortest_edge": shapes.image}, crop_size=side)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=shapes.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _example(shapes: Shapes, i: int) -> Example:
    """Noise, asked about in any words."""
    drawn = np.random.default_rng(i)
    image = Image.fromarray(drawn.integers(0, 255, (shapes.image, shapes.image, 3), dtype=np.uint8))
    question, answer = (drawn.integers(0, shapes.V - len(SPECIAL), n) for n in (QUESTION_TOKENS, ANSWER_TOKENS))
    return Example(str(i), [image], " ".join(map(str, question)), " ".join(map(str, answer)))


def _gb(size_bytes: int) -> float:
    return size_bytes / 1e9
