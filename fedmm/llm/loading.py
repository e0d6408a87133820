"""Backbones: from a hub name or a folder to a frozen model, its processor and prompt. One function, one yaml each."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from fedmm.llm.packing import unpack
from fedmm.types import ReadPath

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, ProcessorMixin

Where = Literal["server", "client"]
TINY = Path(__file__).resolve().parents[1] / "assets" / "tiny_llava"


@dataclass(frozen=True)
class Backbone:
    """A whole LLaVA as the server holds it. `prompt` is a template with `{question}`; `checkpointing` is LocalLLM's."""

    model: LlavaForConditionalGeneration
    processor: ProcessorMixin
    prompt: str
    checkpointing: bool = False


def llava(
    *,
    path: ReadPath,
    prompt: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    load_in: Literal["4bit", "8bit"] | None = None,
    device: str = "auto",
    checkpointing: bool = False,
    where: Where = "server",
) -> Backbone:
    """A LLaVA by `from_pretrained`: `path` is a hub name or a local folder.

    `where` the LLM runs is for the run to read: the same model is loaded on either machine.

    `load_in` quantises the LLM by bitsandbytes (NF4 or int8); the parts that clients run, and the head, stay in
    `dtype`. Raises OSError where `path` holds no model.
    """
    from transformers import AutoProcessor, BitsAndBytesConfig, LlavaForConditionalGeneration

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    quantised = None
    if load_in:
        quantised = BitsAndBytesConfig(
            load_in_4bit=load_in == "4bit",
            load_in_8bit=load_in == "8bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=getattr(torch, dtype),
            llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],  # whole paths
        )
    model = LlavaForConditionalGeneration.from_pretrained(
        path,
        dtype=getattr(torch, dtype),
        device_map={"": device} if device != "cpu" or quantised else None,
        quantization_config=quantised,
    )
    if load_in == "4bit":
        _keep_backward(model)
    return Backbone(model.eval().requires_grad_(False), AutoProcessor.from_pretrained(path), prompt, checkpointing)


def tiny(*, prompt: str, where: Where = "server") -> Backbone:
    """The LLaVA that ships with the package, unpacked to a folder and loaded as any other."""
    with tempfile.TemporaryDirectory() as folder:
        return llava(path=str(unpack(TINY, Path(folder) / "tiny")), prompt=prompt, dtype="float32", device="cpu")


def twin(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Modules of its own on the memory of `model`: adapters put into them are in no other twin."""
    return copy.deepcopy(model, {id(tensor): copy.copy(tensor) for tensor in (*model.parameters(), *model.buffers())})


def _keep_backward(model: nn.Module) -> None:
    """On a CPU with AVX512_BF16 bitsandbytes 0.50 packs a 4-bit layer at its first pass without gradients, which an
    answer is; a packed one passes none back, and says nothing."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
