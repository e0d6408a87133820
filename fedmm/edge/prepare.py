"""From examples to batches: tokens at once, pixels or the encoder's features when a batch wants them."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fedmm.codecs import Codec
from fedmm.edge import base
from fedmm.edge.encoder import CachedEncoder, Encoder
from fedmm.edge.nano_edge import NanoEdge
from fedmm.edge.prepared import Prepared, Sampling
from fedmm.edge.sets import Edge
from fedmm.storage.tensor_store import Store
from fedmm.types import IGNORE, Batch, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Processor:
    """A LLaVA's processor. Its half for images is loaded when it sees one: importing that takes a second and 60 MB.

    `placeholder` is the token that stands for an image in a prompt, and `places` how many positions an image takes.
    """

    tokenizer: PreTrainedTokenizerBase
    placeholder: int
    places: int
    load_images: Callable[[], Any]

    def pixels(self, images: Sequence[Image.Image]) -> Float[Tensor, "I C H W"]:
        return self.load_images()(list(images), return_tensors="pt")["pixel_values"]


def prepare(
    examples: Sequence[Example], processor: Processor, prompt: str, encoder: CachedEncoder | None = None
) -> list[Prepared]:
    """Tokenise. `prompt` is a template with `{question}`; the answer ends with the stop token.

    For an example without images the template loses its placeholder, and the space after it. The tokens are the
    processor's own, which finds how many placeholders an image takes by looking at its pixels. Raises ValueError where
    a prompt has more or fewer of them than the example has images.
    """
    tokenizer = processor.tokenizer
    seen = [(replace(e, images=()), len(e.images), content_of(e.images)) for e in examples]  # may be decoded on access
    if not seen:
        return []
    place = re.escape(tokenizer.convert_ids_to_tokens(processor.placeholder))
    plain = re.sub(rf"{place}\s*", "", prompt)
    # a template is the host's: `str.format` would let it ask for attributes, or for a gigabyte of padding
    asked = [(prompt if count else plain).replace("{question}", example.question) for example, count, _ in seen]
    prompts = tokenizer(asked)["input_ids"]
    answers = tokenizer([example.answer for example, _, _ in seen], add_special_tokens=False)["input_ids"]
    items = []
    for i, ((example, count, content), tokens, answer) in enumerate(zip(seen, prompts, answers, strict=True)):
        tokens_T = torch.tensor(tokens, dtype=torch.int32)
        image_T = tokens_T == processor.placeholder
        if (places := int(image_T.sum())) != count:
            raise ValueError(f"{example.id}: {places} placeholders in its prompt for {count} images; see llm.prompt")
        times_T = torch.where(image_T, processor.places, 1)
        items.append(
            Prepared(
                id=example.id,
                prompt=tokens_T.repeat_interleave(times_T),
                image=image_T.repeat_interleave(times_T),
                answer=torch.tensor([*answer, tokenizer.eos_token_id], dtype=torch.int32),
                truth=example.answer,
                content=content,
                pixels=functools.partial(_pixels, processor, examples, i),
                encoder=encoder,
            )
        )
    return items


def content_of(images: Sequence[Image.Image]) -> str:
    """A hash of all that a processor sees of some images."""
    total = hashlib.blake2b(digest_size=16)
    for image in images:
        about = image.mode, image.size, image.getpalette(), image.info.get("transparency")
        total.update(f"{about};".encode())
        total.update(image.tobytes())
    return total.hexdigest()


def encode(edge: Edge, items: Sequence[Prepared], codec: Codec = "none") -> list[Prepared]:
    """The items with features in the place of pixels, in memory; see `CachedEncoder` for another place.

    That is exact while the encoder is frozen, but for what another codec than none rounds.
    """
    encoder = edge.encoder if isinstance(edge, NanoEdge) else None
    assert isinstance(encoder, Encoder), "an edge built without its encoder makes no features"
    cached = CachedEncoder(lambda: encoder, Store(memory_bytes=1 << 40), "memory", codec)
    cached.fill(items)
    return [replace(item, encoder=cached) for item in items]


def collate(items: Sequence[Prepared], *, answers: bool = True) -> Batch:
    """A batch, right-padded; with `answers=False` the prompts alone, for generation."""
    rows = [torch.cat([item.prompt, item.answer[:-1]]) if answers else item.prompt for item in items]  # no stop token
    B, T, A = len(items), max(map(len, rows)), max(len(item.answer) for item in items)
    tokens_BT = torch.zeros(B, T, dtype=torch.int64)
    mask_BT, image_BT = torch.zeros(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
    keep_BA, labels_BA = torch.zeros(B, A, dtype=torch.int64), torch.full((B, A), IGNORE)
    for b, (item, row) in enumerate(zip(items, rows, strict=True)):
        tokens_BT[b, : len(row)] = row
        mask_BT[b, : len(row)] = True
        image_BT[b, : len(item.image)] = item.image
        if answers:
            start = len(item.prompt) - 1  # the logits at t predict the token at t + 1
            keep_BA[b, : len(item.answer)] = torch.arange(start, start + len(item.answer))
            labels_BA[b, : len(item.answer)] = item.answer
    encoder, seeing = items[0].encoder, [item for item in items if item.sees]
    features = encoder(seeing) if encoder and seeing else []
    return Batch(
        ids=tuple(item.id for item in items),
        tokens_BT=tokens_BT,
        mask_BT=mask_BT,
        image_BT=image_BT,
        keep_BA=keep_BA,
        labels_BA=labels_BA,
        pixels=None if encoder or not seeing else torch.cat([item.pixels() for item in seeing]),
        features_MPE=torch.cat(features) if features else None,
        keys=tuple(map(base.key_of, features)) if encoder else None,
    )


def batches(
    items: Sequence[Prepared], size: int, generator: torch.Generator, sampling: Sampling | None = None
) -> Iterator[Batch]:
    """One epoch in an order drawn from `generator`, each item once or as `sampling` says; the last may be smaller."""
    order = sampling(items, generator) if sampling else torch.randperm(len(items), generator=generator).tolist()
    for start in range(0, len(order), size):
        yield collate([items[i] for i in order[start : start + size]])


def _pixels(processor: Processor, examples: Sequence[Example], i: int) -> Tensor:
    return processor.pixels(examples[i].images)
