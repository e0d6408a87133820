"""What the stages keep of an MLLM's word: under whose name, and how a file is mended that a kill has cut."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from fedmm import tree
from fedmm.edge.prepare import Processor
from fedmm.llm.local import LocalLLM
from fedmm.model import Model, SplitModel


def fingerprint(model: Model, processor: Processor, prompt: str) -> str:
    """A hash of all that the answers of the host's own LLM depend on, its adapters apart."""
    assert isinstance(model, SplitModel) and isinstance(model.llm, LocalLLM), "the host's own LLM"
    assert model.edge.encoder is not None, "and its encoder"
    adapters = {id(parameter) for parameter in model.edge.named().values()}
    modules = (model.edge.encoder, model.edge.connector, model.llm.decoder, model.llm.head)
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers()) if id(t) not in adapters]
    weights = tree.digest({str(i): tensor for i, tensor in enumerate(tensors)})  # their names change with adapters
    about = f"{weights} {prompt} {reads(processor.tokenizer, processor.load_images())}"
    return hashlib.sha256(about.encode()).hexdigest()


def reads(tokenizer: Any, images: Any) -> str:
    """How a model is given its tokens and pixels, in words."""
    return f"{sorted(tokenizer.get_vocab().items())} {images.to_json_string()}"


def mend(path: Path) -> bytes:
    """Take a last line that was cut off out of a jsonl, so that it can be appended to; returns what is left."""
    whole = path.read_bytes()
    if not whole.endswith(b"\n") and whole:
        whole = whole[: whole.rfind(b"\n") + 1]
        with path.open("rb+") as file:
            file.truncate(len(whole))
    return whole
