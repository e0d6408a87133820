"""From examples to batches: tokens, pixels, and once per example, where the encoder is frozen, its features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedmm import codecs
from fedmm.edge import base
from fedmm.edge.nano_edge import NanoEdge
from fedmm.types import IGNORE, Batch, Example

if TYPE_CHECKING:
    from transformers import ProcessorMixin

ENCODE_AT_ONCE = 32  # images; fixed, because another shape would change the last bits of the features


@dataclass(frozen=True)
class Prepared:
    """One example as the edge reads it; `pixels` (images, C, H, W), or `features` (images, P, E) in their place."""

    id: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    image: tuple[bool, ...]
    truth: str
    pixels: Tensor | None = None
    features: Tensor | None = None
    key: bytes = b""  # of the features


def prepare(examples: Sequence[Example], processor: ProcessorMixin, prompt: str) -> list[Prepared]:
    """Tokenise and preprocess. `prompt` is a template with `{question}`; the answer ends with the stop token."""
    if not examples:
        return []
    tokenizer, stop = processor.tokenizer, processor.tokenizer.eos_token_id
    texts = [prompt.format(question=example.question) for example in examples]
    images = [image for example in examples for image in example.images]
    inputs = processor(images=images, text=texts)
    pixels = torch.as_tensor(inputs["pixel_values"]) if isinstance(inputs["pixel_values"], Tensor) else None
    if pixels is None:
        pixels = torch.stack([torch.as_tensor(image) for image in inputs["pixel_values"]])
    parts = pixels.split([len(example.images) for example in examples])
    answers = tokenizer([example.answer for example in examples], add_special_tokens=False)["input_ids"]
    placeholder = processor.image_token_id
    return [
        Prepared(
            example.id,
            tuple(tokens),
            (*answer, stop),
            tuple(token == placeholder for token in tokens),
            example.answer,
            part,
        )
        for example, tokens, answer, part in zip(examples, inputs["input_ids"], answers, parts, strict=True)
    ]


@torch.no_grad()
def encode(edge: NanoEdge, items: Sequence[Prepared], codec: codecs.Codec = "none") -> list[Prepared]:
    """Put features in the place of pixels, which is exact while the encoder is frozen, and so is what follows.

    With another codec than none they are rounded here, once, to what travels and is kept.
    """
    pixels = torch.cat([item.pixels for item in items if item.pixels is not None])
    features = torch.cat([edge.encode(chunk) for chunk in pixels.split(ENCODE_AT_ONCE)])
    parts = features.split([len(item.pixels) for item in items if item.pixels is not None])
    own = [codecs.rounded(part, codec).clone() for part in parts]  # a sample at a time, as they travel
    return [
        replace(item, pixels=None, features=features_IPE, key=base.key_of(features_IPE))
        for item, features_IPE in zip(items, own, strict=True)
    ]


def collate(items: Sequence[Prepared], *, answers: bool = True) -> Batch:
    """A batch, right-padded; with `answers=False` the prompts alone, for generation."""
    rows = [item.prompt + (item.answer[:-1] if answers else ()) for item in items]  # the stop token predicts nothing
    B, T, A = len(items), max(map(len, rows)), max(len(item.answer) for item in items)
    tokens_BT = torch.zeros(B, T, dtype=torch.int64)
    mask_BT, image_BT = torch.zeros(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
    keep_BA, labels_BA = torch.zeros(B, A, dtype=torch.int64), torch.full((B, A), IGNORE)
    for b, (item, row) in enumerate(zip(items, rows, strict=True)):
        tokens_BT[b, : len(row)] = torch.tensor(row)
        mask_BT[b, : len(row)] = True
        image_BT[b, : len(item.image)] = torch.tensor(item.image)
        if answers:
            start = len(item.prompt) - 1  # the logits at t predict the token at t + 1
            keep_BA[b, : len(item.answer)] = torch.arange(start, start + len(item.answer))
            labels_BA[b, : len(item.answer)] = torch.tensor(item.answer)
    pixels = [item.pixels for item in items if item.pixels is not None]
    features = [item.features for item in items if item.features is not None]
    return Batch(
        ids=tuple(item.id for item in items),
        tokens_BT=tokens_BT,
        mask_BT=mask_BT,
        image_BT=image_BT,
        keep_BA=keep_BA,
        labels_BA=labels_BA,
        pixels=torch.cat(pixels) if pixels else None,
        features_MPE=torch.cat(features) if features else None,
        keys=tuple(item.key for item in items) if features else None,
    )


def batches(items: Sequence[Prepared], size: int, generator: torch.Generator) -> Iterator[Batch]:
    """One epoch in an order drawn from `generator`; the last batch may be smaller."""
    order = torch.randperm(len(items), generator=generator).tolist()
    for start in range(0, len(order), size):
        yield collate([items[i] for i in order[start : start + size]])
