"""Between a whole LLaVA and the frozen modules a client runs: taken out at the host, put together again at the client.

What travels is one dict of tensors: encoder, connector, token table, and the processor's files as bytes. A client so
needs neither a model hub nor the LLM. Its hash names it, at the host, on the link and in the client's cache.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import nn

from fedmm import tree
from fedmm.edge.base import Connector, Table, feature_width
from fedmm.edge.compact import Compact, Plan, pixels
from fedmm.edge.encoder import Encoder
from fedmm.edge.nano_edge import Lora, NanoEdge
from fedmm.edge.prepare import Processor
from fedmm.types import State

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PretrainedConfig, ProcessorMixin

_Module = TypeVar("_Module", bound=nn.Module)
_COMPACT = "file/compact.json"  # the plan of a compact encoder, where there is one
_FILES = (".json", ".jinja", ".model", ".txt")  # what a processor may consist of
_VISION_MODELS = ("clip_vision_model", "siglip_vision_model", "dinov2")
_IMAGE_PROCESSORS = tuple(
    f"{name}ImageProcessor{kind}" for name in ("CLIP", "Siglip", "Bit") for kind in ("", "Fast", "Pil")
)
"""What a client builds from the host's files: classes that take numbers from them, and open no path or address."""
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def take(model: LlavaForConditionalGeneration, processor: ProcessorMixin) -> State:
    """The frozen modules of a LLaVA, and config and processor as files, in one dict of tensors."""
    modules: State = {}
    for name, module in (("encoder", model.model.vision_tower), ("connector", model.model.multi_modal_projector)):
        modules |= {f"{name}/{key}": tensor.detach().cpu() for key, tensor in module.state_dict().items()}
    modules["table"] = model.get_input_embeddings().weight.detach().cpu()
    return modules | take_files(model.config, processor)


def take_files(config: PretrainedConfig, processor: ProcessorMixin) -> State:
    """Config and processor as files, as they are among the frozen modules."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        paths = [path for path in sorted(Path(folder).iterdir()) if path.suffix in _FILES]
        return {f"file/{path.name}": _as_tensor(path.read_bytes()) for path in paths}


def with_compact(modules: State, plan: Plan, state: State) -> State:
    """The frozen modules with a compact encoder, its state given, in the place of the large one."""
    kept = {name: tensor for name, tensor in modules.items() if not name.startswith("encoder/")}
    own = {f"encoder/{name}": tensor for name, tensor in state.items()}
    return kept | own | {_COMPACT: _as_tensor(json.dumps(asdict(plan)).encode())}


def empty_compact(modules: Mapping[str, torch.Tensor], plan: Plan) -> Compact:
    """A compact encoder that stands for the large one of these modules, its values not yet set.

    Raises ValueError where the large one's features are no square grid.
    """
    places = _processor(modules).places
    grid = math.isqrt(places)
    if grid**2 != places:
        raise ValueError(f"compact={plan.layer} needs a square grid of features, the LLM has {places} places an image")
    return Compact(plan, grid, feature_width(build_base(modules)[0]))


def describe(model: LlavaForConditionalGeneration, modules: State, prompt: str) -> dict[str, Any]:
    """What a client must know of the backbone, small enough for a header; and what it saves by not running the LLM."""
    text = model.config.get_text_config()
    return {
        "backbone": type(model).__name__,
        "width": text.hidden_size,
        "vocabulary": text.vocab_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompt": prompt,
        "stop_tokens": stop_tokens(model),
        "edge": tree.digest(modules),
        "edge_bytes": tree.size_bytes(modules),
        "edge_parameters": sum(t.numel() for name, t in modules.items() if not name.startswith("file/")),
        "model_parameters": sum(p.numel() for p in model.parameters()),
    }


def stop_tokens(model: LlavaForConditionalGeneration) -> list[int]:
    """The tokens after which an answer has ended, the usual one first."""
    text = model.config.get_text_config()
    ends = (model.generation_config.eos_token_id if model.generation_config else None) or text.eos_token_id
    return list(ends) if isinstance(ends, list) else [ends]


@dataclass(frozen=True)
class Base:
    """What all clients of a backbone have alike and no client changes, so that clients of one process can share one."""

    connector: Connector
    table: Table
    processor: Processor


def base(modules: Mapping[str, torch.Tensor], table: Table | None = None) -> Base:
    """The base from what `take` gave; `table` is another way to the rows of its token table."""
    connector, table_VD = build_base(modules)
    return Base(connector, table_VD if table is None else table, _processor(modules))


# parameters: what an edge is made of; NanoEdge takes the same, and a record between them would say it twice
def build(
    modules: Mapping[str, torch.Tensor],
    *,
    encoder: bool = True,
    shared: Base | None = None,
    sets: Sequence[str] = ("shared",),
    rank: int = 16,
    alpha: float = 32.0,
    client_rank: int | None = None,
    lora: Lora | None = None,
    decoder: nn.Module | None = None,
) -> tuple[NanoEdge, Processor]:
    """A NanoEdge, with its encoder or without, and its processor from what `take` gave. Raises ValueError for others.

    The frozen modules compute in fp32 whatever they are stored in; the table stays as it is stored. They are built anew
    unless `shared` has them; LoRA goes into a copy of its connector.
    """
    tower, own = build_encoder(modules) if encoder else None, shared or base(modules)
    connector = copy.deepcopy(own.connector) if lora else own.connector
    edge = NanoEdge(
        tower,
        connector,
        own.table,
        sets=sets,
        rank=rank,
        alpha=alpha,
        client_rank=client_rank,
        lora=lora,
        decoder=decoder,
    )
    return edge, own.processor


def build_encoder(modules: Mapping[str, torch.Tensor]) -> Encoder:
    """The encoder, in fp32, from what `take` gave."""
    from transformers import AutoModel

    if _COMPACT in modules:
        compact = _load(lambda: empty_compact(modules, _plan(modules)), "encoder", modules)
        return Encoder(compact, layer=0, drop_first=False)
    config = _config(modules)
    # fp32 by name: else transformers takes the checkpoint's dtype and sets it as torch's default, in every thread
    tower = _load(
        lambda: AutoModel.from_config(
            config.vision_config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
        ),
        "encoder",
        modules,
    )
    drop_first = config.vision_feature_select_strategy == "default"
    return Encoder(tower, layer=config.vision_feature_layer, drop_first=drop_first)


def build_base(modules: Mapping[str, torch.Tensor]) -> tuple[Connector, torch.Tensor]:
    """Connector, in fp32, and token table from what `take` gave: what forms a base, at a client and at the host."""
    config = _config(modules)
    layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
    connector = _load(
        lambda: Connector(
            layers * config.vision_config.hidden_size,
            config.text_config.hidden_size,
            activation=config.projector_hidden_act,
            bias=config.multimodal_projector_bias,
        ),
        "connector",
        modules,
    )
    return connector.eval().requires_grad_(False), modules["table"]


def _processor(modules: Mapping[str, torch.Tensor]) -> Processor:
    config = _config(modules)
    numbers = _file(modules, "processor_config.json")
    side = config.vision_config.image_size // numbers["patch_size"]
    first = numbers.get("num_additional_image_tokens", 0) - (numbers["vision_feature_select_strategy"] == "default")
    return Processor(
        _tokenizer(modules),
        placeholder=config.image_token_id,
        places=side * side + first,
        load_images=functools.cache(functools.partial(_images, modules)),
    )


def _images(modules: Mapping[str, torch.Tensor]) -> Any:
    if _COMPACT in modules:
        side = _plan(modules).side
        return lambda images, return_tensors: {"pixel_values": pixels(images, side)}
    from transformers import AutoImageProcessor

    kind = _file(modules, "processor_config.json").get("image_processor", {}).get("image_processor_type")
    if kind not in _IMAGE_PROCESSORS:
        raise ValueError(f"the host's image processor is {kind!r}; a client runs {', '.join(_IMAGE_PROCESSORS)}")
    with tempfile.TemporaryDirectory() as folder:
        raw = modules["file/processor_config.json"].numpy().tobytes()
        (Path(folder) / "processor_config.json").write_bytes(raw)
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _tokenizer(modules: Mapping[str, torch.Tensor]) -> Any:
    """The tokenizer, from its one file and the names of its special tokens; no other field of the host's is used."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if "file/tokenizer.json" not in modules:
        raise ValueError("the host's tokenizer has no tokenizer.json; give the server a model with a fast tokenizer")
    config = _file(modules, "tokenizer_config.json")
    special = {name: config[name] for name in _SPECIAL_TOKENS if config.get(name) is not None}
    special = {name: token["content"] if isinstance(token, dict) else token for name, token in special.items()}
    if odd := [name for name, token in special.items() if not isinstance(token, str)]:
        raise ValueError(f"the host's tokenizer has {special[odd[0]]!r} as its {odd[0]}, wanted a text")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(modules["file/tokenizer.json"].numpy().tobytes().decode()),
        clean_up_tokenization_spaces=bool(config.get("clean_up_tokenization_spaces", False)),
        **special,
    )


def _as_tensor(raw: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(raw, np.uint8).copy())


def _plan(modules: Mapping[str, torch.Tensor]) -> Plan:
    return Plan(**_file(modules, _COMPACT.removeprefix("file/")))


def _config(modules: Mapping[str, torch.Tensor]) -> Any:
    """The model's configuration, if it is one that clients know: transformers has classes that load files, or models
    of a hub, by names that their configuration holds."""
    from transformers import LlavaConfig

    config = _file(modules, "config.json")
    vision = config.get("vision_config")
    vision = vision if isinstance(vision, dict) else {}
    kinds = config.get("model_type"), vision.get("model_type")
    if kinds[0] != "llava" or kinds[1] not in _VISION_MODELS:
        raise ValueError(f"the host's model is {kinds}; a client runs llava with {', '.join(_VISION_MODELS)}")
    if isinstance(layers := vision.get("num_hidden_layers"), int) and layers > len(modules):
        raise ValueError(f"the host's config says {layers} layers, and it sent {len(modules)} tensors")
    return LlavaConfig.from_dict(config)


def _file(modules: Mapping[str, torch.Tensor], name: str) -> dict[str, Any]:
    """One of the host's JSON files. Raises ValueError where it is missing or no object."""
    if f"file/{name}" not in modules:
        raise ValueError(f"the host sent no {name}")
    value = json.loads(modules[f"file/{name}"].numpy().tobytes())
    if not isinstance(value, dict):
        raise ValueError(f"the host's {name} is no JSON object")
    return value


def _load(make: Callable[[], _Module], part: str, modules: Mapping[str, torch.Tensor]) -> _Module:
    """Make a module and copy one part into it, a tensor at a time: mapped from a file, it is so never in memory whole.

    Names and shapes are compared first, on a module without memory: a config of a kilobyte may name gigabytes.
    """
    with torch.device("meta"):
        wanted = {f"{part}/{name}": tensor.shape for name, tensor in make().state_dict().items()}
    if odd := wanted.keys() ^ {name for name in modules if name.startswith(f"{part}/")}:
        raise ValueError(f"the host's {part} is not what its config says: {sorted(odd)[:3]}")
    for name, shape in wanted.items():
        if (came := modules[name].shape) != shape:
            raise ValueError(f"{name!r} has shape {tuple(came)}, the host's config says {tuple(shape)}")
    module = make()
    for name, tensor in module.state_dict().items():
        tensor.copy_(modules[f"{part}/{name}"])
    return module
