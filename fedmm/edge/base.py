"""The base embeddings of a batch, formed in the same way at a client and at the host of a factored link.

base = connector(features) at image positions, token table at text positions; padding has none
"""

from __future__ import annotations

import hashlib
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fedmm.types import Segment

KEY_BYTES = 16
KINDS = ("image", "text")
"""The kinds of positions, each with an adapter of its own in every set."""


@runtime_checkable
class Table(Protocol):
    """A token table: a tensor (V, D), or what gives rows as one does."""

    @property
    def shape(self) -> torch.Size: ...

    def __getitem__(self, tokens_N: Tensor, /) -> Tensor: ...


class Connector(nn.Module):
    """LLaVA's two linear layers. transformers' own class of them takes a second and 60 MB to import."""

    def __init__(self, encoder_width: int, width: int, *, activation: str = "gelu", bias: bool = True) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        self.linear_1 = nn.Linear(encoder_width, width, bias=bias)
        self.act = ACT2FN[activation]
        self.linear_2 = nn.Linear(width, width, bias=bias)

    def forward(self, features_MPE: Float[Tensor, "M P E"]) -> Float[Tensor, "M P D"]:
        return self.linear_2(self.act(self.linear_1(features_MPE)))


def key_of(features_IPE: Float[Tensor, "I P E"]) -> bytes:
    """The name of a sample's features: a hash of their content, so that an old name never stands for new features."""
    about = f"{features_IPE.dtype} {tuple(features_IPE.shape)};".encode()
    raw = features_IPE.contiguous().flatten().view(torch.uint8).numpy().data
    return hashlib.blake2b(raw, digest_size=KEY_BYTES, key=about).digest()


def feature_width(connector: nn.Module) -> int:
    """How wide the features are that a connector takes."""
    return next(module.in_features for module in connector.modules() if isinstance(module, nn.Linear))


def image_segment(connector: nn.Module, features_MPE: Float[Tensor, "M P E"], image_N: Int[Tensor, " N"]) -> Segment:
    """The connector's outputs at the image positions. Raises ValueError where there are not as many of both."""
    x_ND = connector(features_MPE).flatten(0, 1)
    if len(image_N) != len(x_ND):
        raise ValueError(f"{len(image_N)} image positions for {len(x_ND)} image features")
    return Segment("image", x_ND, image_N)


def text_segment(table_VD: Table, tokens_BT: Int[Tensor, "B T"], text_N: Int[Tensor, " N"]) -> Segment:
    """The token table, looked up where it is needed and nowhere else, in fp32."""
    return Segment("text", table_VD[tokens_BT.flatten()[text_N]].float(), text_N)


def positions(image_BT: Bool[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
    """Where in the flattened (B T) axis the image positions are, and where the text positions."""
    image_N = (image_BT & mask_BT).flatten().nonzero().squeeze(1)
    text_N = (mask_BT & ~image_BT).flatten().nonzero().squeeze(1)
    return image_N, text_N
