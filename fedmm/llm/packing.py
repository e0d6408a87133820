"""A checkpoint as text: one JSON line for each tensor, for bundles that carry only text files.

    {"name": "lm_head.weight", "shape": [176, 128], "dtype": "F16", "data": "<base64 of the little-endian bytes>"}

A Flower app bundle takes py, toml, md, yaml, yml, json and jsonl; base64 costs a third more than the bytes.
"""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedmm.storage import disk

PACKED = "weights.jsonl"
WEIGHTS = "model.safetensors"
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def pack(folder: Path, into: Path) -> Path:
    """Write `folder`'s model.safetensors as `into`/weights.jsonl, its JSON files beside it; returns `into`."""
    _copy_json(folder, into)
    with disk.replacing(into / PACKED, public=True) as aside, aside.open("w") as file:
        with safe_open(folder / WEIGHTS, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                file.write(json.dumps(_line(name, tensors.get_tensor(name))) + "\n")
    return into


def unpack(folder: Path, into: Path) -> Path:
    """Write `folder`'s weights.jsonl as an ordinary checkpoint `into`, which `from_pretrained` takes; returns `into`.

    The weights are written last and whole, so a reader never sees half a checkpoint. If `into` has weights already,
    nothing is written.
    """
    packed = folder / PACKED
    if not packed.is_file():
        raise ValueError(f"{folder} has no {PACKED}; give the folder of a packed checkpoint")
    if (into / WEIGHTS).is_file():
        return into
    _copy_json(folder, into)
    with packed.open() as file:
        tensors = dict(_tensor(json.loads(line), packed) for line in file)
    with disk.replacing(into / WEIGHTS, public=True) as aside:
        save_file(tensors, aside, metadata={"format": "pt"})
    return into


def _copy_json(folder: Path, into: Path) -> None:
    for path in sorted(folder.glob("*.json")):
        with disk.replacing(into / path.name, public=True) as aside:
            shutil.copyfile(path, aside)


def _line(name: str, tensor: Tensor) -> dict[str, object]:
    names = {dtype: word for word, dtype in _DTYPES.items()}
    if tensor.dtype not in names:
        raise ValueError(f"{name} is {tensor.dtype}; pack takes {', '.join(map(str, names))}")
    raw = tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    data = base64.b64encode(raw).decode()
    return {"name": name, "shape": list(tensor.shape), "dtype": names[tensor.dtype], "data": data}


def _tensor(line: dict, source: Path) -> tuple[str, Tensor]:
    name, dtype = line["name"], _DTYPES[line["dtype"]]
    raw = bytearray(base64.b64decode(line["data"]))
    tensor = torch.frombuffer(raw, dtype=dtype) if raw else torch.zeros(0, dtype=dtype)
    if tensor.numel() != torch.Size(line["shape"]).numel():
        raise ValueError(f"{source}: {name} has {tensor.numel()} numbers, its shape wants {line['shape']}; pack again")
    return name, tensor.view(line["shape"])
