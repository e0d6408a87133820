"""What the host adds to a factored step: connector, token table, and the features that clients left with it.

A sample's features come once and are named by their content, so a stale name cannot stand for them: an unknown one is
asked for again. A client sees its own only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedmm.edge import base
from fedmm.edge.folding import base_of
from fedmm.storage.tensor_store import Store
from fedmm.types import Segment, State

KEYS_LIMIT = 1 << 14  # asked about at once: rows of a batch; a million took 21 s


class FeaturesMissing(ValueError):
    """The host does not hold some of a step's features; `rows` are the samples that lack them."""

    def __init__(self, rows: Sequence[int]) -> None:
        super().__init__(f"the features of {len(rows)} samples are not here; send them again")
        self.rows = list(rows)


class Features:
    """Forms the parts of a base. With `store` None, nothing is kept: clients send features with every step."""

    def __init__(self, connector: nn.Module, table_VD: Float[Tensor, "V D"], store: Store | None = None) -> None:
        self._connector, self._table_VD, self.store = connector, table_VD, store
        self.connector: nn.Module = connector
        self.table: base.Table = table_VD
        self._width = base.feature_width(connector)

    def fold(self, state: State, scale: float) -> None:
        """Form bases as clients do whose state this is: with what `rule=stack` has folded, and nothing from before."""
        self.connector, self.table = base_of(self._connector, self._table_VD, state, scale)

    def missing(self, client: int, keys_BK: Tensor) -> list[int]:
        """Which of these samples are not here. Raises ValueError for more of them than a step has."""
        if len(keys_BK) > KEYS_LIMIT:
            raise ValueError(f"{len(keys_BK)} keys at once, at most {KEYS_LIMIT}; ask for a batch at a time")
        store = self._kept()
        return [b for b, key in enumerate(_hex(keys_BK)) if not store.has(str(client), key)]

    def keep(self, client: int, keys_BK: Tensor, features: Sequence[Tensor]) -> None:
        """Take features in. Raises ValueError where they are not those that their keys name."""
        for key, features_IPE in zip(_hex(keys_BK), features, strict=True):
            if (came := base.key_of(features_IPE).hex()) != key:
                raise ValueError(f"features with key {key} have content {came}; do both ends round them alike?")
            self._check(features_IPE)
            self._kept().put(str(client), key, features_IPE)

    def fetch(self, client: int, keys_BK: Tensor, places: int) -> Float[Tensor, "M P E"]:
        """The features of a batch with so many image positions. Raises FeaturesMissing."""
        store = self._kept()
        found = [store.get(str(client), key) for key in _hex(keys_BK)]
        if rows := [b for b, features_IPE in enumerate(found) if features_IPE is None]:
            raise FeaturesMissing(rows)
        return self.joined([features_IPE for features_IPE in found if features_IPE is not None], places)

    def joined(self, features: Sequence[Float[Tensor, "_ _ _"]], places: int) -> Float[Tensor, "M P E"]:
        """The features of a batch from those of its samples with images, of which there may be none.

        Raises ValueError where they are not of `places` image positions: one key may stand in every row of a batch, so
        that a frame of a kilobyte would have gigabytes joined.
        """
        for features_IPE in features:
            self._check(features_IPE)
        if (came := sum(len(f) * f.shape[1] for f in features)) != places:
            raise ValueError(f"the step has {places} image positions and {came} image features")
        if len({features_IPE.shape[1] for features_IPE in features}) > 1:
            raise ValueError("all images of a step must have equally many features")
        return torch.cat(list(features)) if features else torch.zeros(0, 1, self._width)

    def image_segment(self, features_MPE: Float[Tensor, "M P E"], image_N: Int[Tensor, " N"]) -> Segment:
        with torch.no_grad():
            return base.image_segment(self.connector, features_MPE, image_N)

    def text_segment(self, tokens_BT: Int[Tensor, "B T"], text_N: Int[Tensor, " N"]) -> Segment:
        return base.text_segment(self.table, tokens_BT, text_N)

    def _check(self, features_MPE: Tensor) -> None:
        if features_MPE.shape[2] != self._width or not features_MPE.numel() or features_MPE.dtype != torch.float32:
            came = f"{tuple(features_MPE.shape)} of {features_MPE.dtype}"
            raise ValueError(f"features are fp32 and {self._width} wide, as the connector takes them, got {came}")

    def _kept(self) -> Store:
        if self.store is None:
            raise ValueError("this host keeps no features (link.cache=none); send them with the step")
        return self.store


def _hex(keys_BK: Tensor) -> list[str]:
    if keys_BK.dtype != torch.uint8 or keys_BK.dim() != 2 or keys_BK.shape[1] != base.KEY_BYTES:
        raise ValueError(f"keys are {base.KEY_BYTES} bytes a sample, got {tuple(keys_BK.shape)} of {keys_BK.dtype}")
    return [row.numpy().tobytes().hex() for row in keys_BK]
