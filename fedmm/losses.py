"""Losses on answer logits. The same functions run at the client and at the host, so their bits agree."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fedmm.types import IGNORE


def answer_cross_entropy(
    logits_BAV: Float[Tensor, "B A V"], labels_BA: Int[Tensor, "B A"], reduction: str = "mean"
) -> Float[Tensor, ""]:
    """Cross-entropy over answer tokens; `mean` over all of the batch, or `sum`. Padded positions count nothing."""
    return F.cross_entropy(
        logits_BAV.flatten(0, 1).float(), labels_BA.flatten(), ignore_index=IGNORE, reduction=reduction
    )
