"""Between a whole LLaVA and the frozen parts a client runs: taken out at the host, put together again at the client.

What travels is one dict of tensors: encoder, connector, token table, and the processor's files as bytes. A client so
needs neither a model hub nor the LLM. Its hash names it, at the host, on the link and in the client's cache.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fedmm import tree
from fedmm.edge.nano_edge import Lora, NanoEdge
from fedmm.types import State

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, ProcessorMixin

_FILES = (".json", ".jinja", ".model", ".txt")  # what a processor may consist of


def take(model: LlavaForConditionalGeneration, processor: ProcessorMixin) -> State:
    """The frozen parts of a LLaVA, and config and processor as files, in one dict of tensors."""
    parts: State = {}
    for name, module in (("encoder", model.model.vision_tower), ("connector", model.model.multi_modal_projector)):
        parts |= {f"{name}/{key}": tensor.detach().cpu() for key, tensor in module.state_dict().items()}
    parts["table"] = model.get_input_embeddings().weight.detach().cpu()
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            if path.suffix in _FILES:
                parts[f"file/{path.name}"] = torch.from_numpy(np.frombuffer(path.read_bytes(), np.uint8).copy())
    return parts


def describe(model: LlavaForConditionalGeneration, parts: State, prompt: str) -> dict[str, Any]:
    """What a client must know of the backbone, small enough for a header; and what it saves by not running the LLM."""
    text = model.config.get_text_config()
    return {
        "backbone": type(model).__name__,
        "width": text.hidden_size,
        "vocabulary": text.vocab_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompt": prompt,
        "edge": tree.digest(parts),
        "edge_bytes": tree.size_bytes(parts),
        "edge_parameters": sum(t.numel() for name, t in parts.items() if not name.startswith("file/")),
        "model_parameters": sum(p.numel() for p in model.parameters()),
    }


def build(
    parts: Mapping[str, torch.Tensor],
    *,
    sets: Sequence[str] = ("shared",),
    rank: int = 16,
    alpha: float = 32.0,
    lora: Lora | None = None,
) -> tuple[NanoEdge, ProcessorMixin]:
    """A NanoEdge and its processor from what `take` gave. Raises ValueError where it is not that.

    The frozen parts compute in fp32 whatever they are stored in; the table stays as it is stored, and is looked up.
    """
    from transformers import AutoModel

    config, processor = _files(parts)
    # fp32 by name: else transformers takes the checkpoint's dtype and sets it as torch's default, in every thread
    encoder = AutoModel.from_config(config.vision_config, dtype=torch.float32)
    encoder.load_state_dict(_of("encoder", parts))
    edge = NanoEdge(
        encoder.float(),
        *build_base(parts),
        layer=config.vision_feature_layer,
        drop_first=config.vision_feature_select_strategy == "default",
        sets=sets,
        rank=rank,
        alpha=alpha,
        lora=lora,
    )
    return edge, processor


def build_base(parts: Mapping[str, torch.Tensor]) -> tuple[nn.Module, torch.Tensor]:
    """Connector, in fp32, and token table from what `take` gave: what forms a base, at a client and at the host."""
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    connector = LlavaMultiModalProjector(_files(parts)[0])
    connector.load_state_dict(_of("connector", parts))
    return connector.float().eval().requires_grad_(False), parts["table"]


def _of(part: str, parts: Mapping[str, torch.Tensor]) -> State:
    return {key.removeprefix(f"{part}/"): t for key, t in parts.items() if key.startswith(f"{part}/")}


def _files(parts: Mapping[str, torch.Tensor]) -> tuple[Any, ProcessorMixin]:
    """Config and processor, from the files among the parts. Raises ValueError where they are no processor's."""
    from transformers import AutoConfig, AutoProcessor

    files = {name.removeprefix("file/"): t for name, t in parts.items() if name.startswith("file/")}
    if bad := [name for name in files if Path(name).name != name or Path(name).suffix not in _FILES]:
        raise ValueError(f"the host sent files that are no processor's: {bad}")
    with tempfile.TemporaryDirectory() as folder:
        for name, tensor in files.items():
            (Path(folder) / name).write_bytes(tensor.numpy().tobytes())
        return AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
