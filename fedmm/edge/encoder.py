"""The encoder: pixels in, features out; and, while it is frozen, only where nobody has kept them from before.

A sample's features are stored under a hash of everything that their bits depend on: the frozen modules (the owner), its
images, the codec that rounds them, the number of threads and the libraries. So nothing stale is ever found, and what a
store forgot is made again with the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedmm import codecs
from fedmm.edge.prepared import Prepared
from fedmm.storage import memory
from fedmm.storage.tensor_store import Store

CHUNK_BYTES = 64 << 20  # of hidden states; one image of CLIP-L/336 is 59 MB, and a second would lead past 2 GB in all
CHUNK_IMAGES = 8  # more gains a small tower nothing: the embedded one takes 0.75 ms an image in eights, 0.85 in 32s


class Encoder(nn.Module):
    """A vision tower, and which of its layers the features are."""

    def __init__(self, tower: nn.Module, *, layer: int | Sequence[int] = -2, drop_first: bool = True) -> None:
        super().__init__()
        self.tower = tower.eval().requires_grad_(False)
        self._layer, self._drop_first = layer, drop_first

    def forward(self, pixels_MCHW: Float[Tensor, "M C H W"]) -> Float[Tensor, "M P E"]:
        """The chosen layers side by side, without the class token where it is dropped."""
        hidden = self.tower(pixels_MCHW, output_hidden_states=True).hidden_states
        layers = [self._layer] if isinstance(self._layer, int) else self._layer
        return torch.cat([hidden[layer][:, 1:] if self._drop_first else hidden[layer] for layer in layers], dim=-1)

    @property
    def chunk(self) -> int:
        """The images to encode at once: the hidden states of all layers are in memory together."""
        config: Any = self.tower.config
        image_bytes = 4 * (config.image_size // config.patch_size) ** 2 * config.hidden_size * config.num_hidden_layers
        return max(1, min(CHUNK_IMAGES, CHUNK_BYTES // image_bytes))

    def in_chunks(self, pixels_MCHW: Float[Tensor, "M C H W"]) -> Float[Tensor, "M P E"]:
        """The features of any number of images, in chunks of one shape, filled up with blank ones.

        Another shape would change an image's last bits; so they do not depend on how many come with it.
        """
        blank = pixels_MCHW.new_zeros(-len(pixels_MCHW) % self.chunk, *pixels_MCHW.shape[1:])
        chunks = torch.cat([pixels_MCHW, blank]).split(self.chunk)
        return torch.cat([self(chunk) for chunk in chunks])[: len(pixels_MCHW)]


class CachedEncoder:
    """The features of samples: from a store, else by the encoder, which is built when one is missing.

    `owner` names the frozen modules, encoder and processor among them. Not for use from several threads.
    """

    def __init__(self, build: Callable[[], Encoder], store: Store, owner: str, codec: codecs.Codec = "none") -> None:
        self._build, self._store, self._owner, self._codec = build, store, owner, codec
        self._encoder: Encoder | None = None

    def __call__(self, items: Sequence[Prepared]) -> list[Float[Tensor, "I P E"]]:
        """The features of samples with images, rounded once, to what travels and is kept."""
        found = [self._store.get(self._owner, self._name(item)) for item in items]
        made = iter(self._make([item for item, own in zip(items, found, strict=True) if own is None]))
        return [next(made) if own is None else own for own in found]

    def fill(self, items: Sequence[Prepared]) -> None:
        """Make what the store lacks, a chunk at a time, and let go of the encoder."""
        names = {self._name(item): item for item in items if item.sees}
        lacking = [item for name, item in names.items() if not self._store.has(self._owner, name)]
        step = self._built().chunk if lacking else 1
        for start in range(0, len(lacking), step):
            self._make(lacking[start : start + step])
        self._encoder = None
        if lacking:
            memory.give_back()

    @torch.no_grad()
    def _make(self, items: Sequence[Prepared]) -> list[Tensor]:
        if not items:
            return []
        pixels = [item.pixels() for item in items]
        features = self._built().in_chunks(torch.cat(pixels)).split([len(own) for own in pixels])
        made = [codecs.rounded(own, self._codec) for own in features]  # a sample at a time, as they travel
        for item, own in zip(items, made, strict=True):
            self._store.put(self._owner, self._name(item), own)
        return made

    def _built(self) -> Encoder:
        self._encoder = self._encoder or self._build()
        return self._encoder

    def _name(self, item: Prepared) -> str:
        import transformers  # its processors changed pixels between versions

        about = f"{item.content} {self._codec} {torch.get_num_threads()} {torch.__version__} {transformers.__version__}"
        return hashlib.blake2b(about.encode(), digest_size=16).hexdigest()
