"""The compact encoder: a small residual network, in the place of a vision tower or under a classifier's head.

    trunk     image -> (W, H, H), a ResNet
    features  mean + spread project(pool(trunk(image))) -> (P, E), in number and width the large encoder's

Its norms are over groups of channels and not over the batch: running means of a batch are no trained tensors, so they
would not travel, and they differ between clients whose classes do.
Source: He et al. 2016 (ResNet; the 8-layer one for 32x32 is section 4.2's with n = 1); Hsieh et al. 2020, section 5
(group norm in place of batch norm where clients' labels are skewed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

CHANNELS_A_GROUP = 8  # Wu & He 2018 find 16 as good; the 16 channels of a narrow stem would then be one group
MEAN, STD = 0.5, 0.25  # of pixels from 0 to 1, roughly an image's own


@dataclass(frozen=True)
class Plan:
    """What a trunk is made of, and the side in pixels that its images are brought to."""

    depths: Sequence[int]
    widths: Sequence[int]
    layer: Literal["basic", "bottleneck"]
    stem: Literal["3x3", "7x7"]
    side: int

    @property
    def out_width(self) -> int:
        return self.widths[-1]


def resnet(
    *,
    depths: Sequence[int] = (1, 1, 1),
    widths: Sequence[int] = (16, 32, 64),
    layer: Literal["basic", "bottleneck"] = "basic",
    stem: Literal["3x3", "7x7"] = "3x3",
    side: int = 32,
) -> Plan:
    """A residual network by its stages: `depths` blocks of `widths` channels each.

    A 3x3 stem keeps the image's size, for small ones; the 7x7 one quarters it, as ImageNet's does. Raises ValueError
    where depths and widths are not as many, or a width is no multiple of 8.
    """
    if len(depths) != len(widths) or not depths or min(depths) < 1:
        raise ValueError(f"compact.depths={list(depths)} and compact.widths={list(widths)} must be as many, above 0")
    least = CHANNELS_A_GROUP * (4 if layer == "bottleneck" else 1)  # inside a bottleneck are a quarter of the channels
    if any(width % least for width in widths):
        raise ValueError(f"compact.widths={list(widths)} must be multiples of {least}, so that norms have whole groups")
    return Plan(tuple(depths), tuple(widths), layer, stem, side)


def pixels(images: Sequence[Image.Image], side: int) -> Float[Tensor, "I 3 H H"]:
    """Images as a trunk sees them: RGB, brought to `side`, about zero."""
    sized = (image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR) for image in images)
    stacked = np.stack([np.asarray(image, dtype=np.float32) for image in sized])
    return (torch.from_numpy(stacked).permute(0, 3, 1, 2) / 255 - MEAN) / STD


def channels_last(pixels_MCHW: Float[Tensor, "M C H W"]) -> Float[Tensor, "M C H W"]:
    """The same pixels in an order that convolutions keep: a step of the eight-layer trunk takes 0.8 of the time."""
    return pixels_MCHW.contiguous(memory_format=torch.channels_last)


def trunk(plan: Plan) -> nn.Module:
    """The network up to its last feature map, its values not yet set."""
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(
        embedding_size=plan.widths[0] if plan.stem == "3x3" else 64,
        hidden_sizes=list(plan.widths),
        depths=list(plan.depths),
        layer_type=plan.layer,
        downsample_in_first_stage=False,
    )
    whole = ResNetModel._from_config(config, dtype=torch.float32)
    if plan.stem == "3x3":
        width = plan.widths[0]
        whole.embedder = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
    layers = nn.Sequential(whole.embedder, *whole.encoder.stages)
    return _in_groups(layers)


def reset(module: nn.Module, generator: torch.Generator) -> None:
    """Set every value, in the order of the modules: He's law for what convolves, norms at one, biases at zero."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(part, nn.Linear):
            bound = part.in_features**-0.5
            nn.init.uniform_(part.weight, -bound, bound, generator=generator)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.GroupNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


class Compact(nn.Module):
    """A trunk whose feature map is brought to the grid, width, mean and spread of the large encoder's features.

    To whoever runs it, it is a vision tower: `hidden_states` holds the features, and `config` tells their size.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, plan: Plan, grid: int, width: int) -> None:
        super().__init__()
        self.trunk, self.project = trunk(plan), nn.Linear(plan.out_width, width)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self._grid = grid
        widest = sum(depth * width for depth, width in zip(plan.depths, plan.widths, strict=True))
        self.config = SimpleNamespace(image_size=plan.side, patch_size=4, hidden_size=widest, num_hidden_layers=4)

    def forward(self, pixels_MCHW: Float[Tensor, "M C H W"], **_: Any) -> SimpleNamespace:
        """The features as a tower's only layer."""
        return SimpleNamespace(hidden_states=(self.features(pixels_MCHW),))

    def features(self, pixels_MCHW: Float[Tensor, "M C H W"]) -> Float[Tensor, "M P E"]:
        """One feature for each cell of the grid, row by row, as patches go."""
        map_MWHH = self.trunk(channels_last(pixels_MCHW))
        pooled = F.adaptive_avg_pool2d(map_MWHH, self._grid)
        return self.mean + self.spread * self.project(pooled.flatten(2).transpose(1, 2))

    def fit(self, features_MPE: Float[Tensor, "M P E"]) -> None:
        """Take over the mean and spread of the large encoder's features: CLIP's last layer is some 15 wide, a linear
        layer's output 0.5, and by its gradients it would never get there."""
        self.mean.copy_(features_MPE.mean((0, 1)))
        self.spread.copy_(features_MPE.std((0, 1)))


def _in_groups(module: nn.Module) -> nn.Module:
    """The module with group norms where it had batch norms."""
    for name, part in module.named_children():
        if isinstance(part, nn.BatchNorm2d):
            channels = part.num_features
            setattr(module, name, nn.GroupNorm(channels // CHANNELS_A_GROUP, channels))
        else:
            _in_groups(part)
    return module
