"""How a floating tensor is written on the link: as it is, in half the bytes, or in a quarter with a scale a block.

    int8:   s = bf16(max|x| / 127)    c = round(x / s)      x' = c s        for each BLOCK entries of the flattened x

The codes are made against the rounded s: so the largest entry has code 127, |x' - x| <= s / 2 whatever rounding did to
s, and c s is exact in fp32, the same bits at both ends; and what was unpacked packs to the same codes again. An fp16 s
would be 0 where max|x| is below 3.8e-6.

| codec | bytes an entry | ends at | error of an entry |
| --- | --- | --- | --- |
| fp16 | 2 | 65504 | 2^-11 of it; below 6e-5 a fixed 3e-8, so what is below 3e-8 vanishes |
| bf16 | 2 | 3.4e38 | 2^-8 of it |
| int8 | 1.03 | 1.7e38 | 1/254 of its block's largest, and up to 0.4% of that more as s was rounded |

Source: an absolute maximum for each block is of Dettmers et al. 2022 (8-bit optimizers), who take blocks of 2048 and
codes that are not evenly spaced; even codes over 64 entries are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedmm.types import State

Codec = Literal["none", "fp16", "bf16", "int8"]
BLOCK = 64
"""Entries that share an int8 scale: 2 bytes for 64 are 3%, and one outlier spoils no more than 63 others."""

_DTYPES = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
_SCALE_LIMIT = 2.0**120  # times any int8 code it is still finite in fp32
_LIMITS = {"fp16": torch.finfo(torch.float16).max, "bf16": torch.finfo(torch.bfloat16).max, "int8": 127 * _SCALE_LIMIT}


@dataclass(frozen=True)
class Codecs:
    """How each kind of tensor is written: features, h with B, gradients, logits. All "none": every bit is kept."""

    features: str = "none"
    h: str = "none"
    gradients: str = "none"
    logits: str = "none"

    def of(self, kind: str | None) -> Codec:
        """The codec of a kind of tensors; what is of none goes as it is."""
        return getattr(self, kind) if kind else "none"


PLAIN = Codecs()


def stem(name: str) -> str:
    """What comes before the first dot or slash of a tensor's name, by which its kind is known."""
    return name.replace("/", ".").split(".")[0]


def named(words: object) -> Codecs:
    """The codecs that a frame names, in the order of `Codecs`; None for none. Raises ValueError for anything else."""
    if words is None:
        return PLAIN
    if not isinstance(words, list) or len(words) != 4 or not all(word in _DTYPES for word in map(str, words)):
        raise ValueError(f"codecs are four of {', '.join(_DTYPES)}, got {str(words)[:100]}")
    return Codecs(*words)


def write(
    tensors: State,
    codecs: Codecs,
    kinds: Mapping[str, str],
    feedback: Feedback | None = None,
    summed: Mapping[str, str] = {},
) -> State:
    """The tensors of a frame as they travel, each by its kind. `feedback` corrects those `summed`, under that name."""
    if codecs == PLAIN:
        return tensors
    out: State = {}
    for name, tensor in tensors.items():
        codec = codecs.of(kinds.get(stem(name)))
        correct = feedback is not None and name in summed
        pieces = feedback.pack(summed[name], tensor, codec) if correct else pack(tensor, codec)  # type: ignore[union-attr]
        out |= {name + (f"/{part}" if part else ""): value for part, value in pieces.items()}
    return out


def read(tensors: Mapping[str, Tensor], codecs: Codecs, kinds: Mapping[str, str]) -> Mapping[str, Tensor]:
    """The tensors of a frame as they were. Raises ValueError, with the tensor's name, where they are not so written."""
    if codecs == PLAIN:
        return tensors
    out: State = {}
    for name, tensor in tensors.items():
        if name.endswith("/scale"):
            continue
        pieces = {"": tensor} | ({"scale": tensors[f"{name}/scale"]} if f"{name}/scale" in tensors else {})
        try:
            out[name] = unpack(pieces, codecs.of(kinds.get(stem(name))), (None,) * tensor.dim())
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from error
    return out


def pack(tensor: Tensor, codec: Codec) -> dict[str, Tensor]:
    """Write `tensor` as the pieces that travel: "" the values, of its own shape, and for int8 also "scale" (bfloat16).

    With "none" the part is the tensor itself, of any dtype, unlooked at. Raises ValueError for a tensor that is not
    floating, not finite, or beyond what the codec holds. Nothing is differentiable through it.
    """
    if codec == "none":
        return {"": tensor}
    values = _floating(tensor, codec)
    if codec == "int8":
        return _quantise(values)
    narrow = values.to(_DTYPES[codec])
    if not finite(narrow):
        raise _refusal(values, codec)
    return {"": narrow}


def unpack(pieces: Mapping[str, Tensor], codec: Codec, shape: tuple[int | None, ...]) -> Tensor:
    """The tensor that `pack` wrote, in fp32; with "none" as it came. `shape` is the wanted one, None for any size.

    The pieces are what the network sent: raises ValueError where they are not what `pack` writes. What a codec other
    than "none" gives is finite.
    """
    wanted = {"": "its values"} | ({"scale": "its scales"} if codec == "int8" else {})
    if pieces.keys() != wanted.keys():
        raise ValueError(
            f"{codec} is the pieces {wanted}, got {str(sorted(pieces))[:100]}; do both ends run one codec?"
        )
    values, dtype = pieces[""], _DTYPES[codec]
    if values.dtype != (dtype or values.dtype):
        raise ValueError(f"{codec} holds {dtype}, got {values.dtype}; do both ends run one codec?")
    if not _fits(values, shape):
        want = tuple("any" if size is None else size for size in shape)
        raise ValueError(f"the values have shape {tuple(values.shape)}, wanted {want}")
    if codec == "int8":
        return _dequantise(values, pieces["scale"])
    if codec != "none" and not finite(values):
        raise ValueError(f"the {codec} values are not finite; lower the learning rate or clip gradients")
    return values if codec == "none" else values.float()


def finite(tensor: Tensor) -> bool:
    """Whether every entry is: the extremes show an inf or a nan, on a CPU 30 times as fast as asking every entry."""
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def rounded(tensor: Tensor, codec: Codec) -> Tensor:
    """The tensor as it is after it travelled; once more changes nothing."""
    return unpack(pack(tensor, codec), codec, tuple(tensor.shape))


class Feedback:
    """Error feedback: what one send of a name lost is added to the next, so that a sum over sends loses nothing.

        sent_t = Q(x_t + r_t)      r_t+1 = x_t + r_t - sent_t      hence  sum_t sent_t = sum_t x_t - r

    Only for a tensor whose sends are summed entry by entry, as updates of the same weights are. For activations, or
    gradients at positions that mean something else in the next batch, it adds one batch's error to another's.
    A name keeps one fp32 tensor of its size, and the `names` used last are kept: a peer chooses names. A refused send
    leaves the residual as it was.
    Source: EF-SGD, Karimireddy et al. 2019; first in Seide et al. 2014 (1-bit SGD).
    """

    def __init__(self, names: int = 64) -> None:
        self._residuals: State = {}  # the one used last at the end
        self._names = names

    @property
    def size_bytes(self) -> int:
        """What the residuals take."""
        return sum(residual.nbytes for residual in list(self._residuals.values()))

    def pack(self, name: str, tensor: Tensor, codec: Codec) -> dict[str, Tensor]:
        """`pack(tensor + residual)`. With "none" nothing is added or kept; another shape starts from no residual."""
        if codec == "none":
            return pack(tensor, codec)
        total = _floating(tensor, codec)
        residual = self._residuals.get(name)
        if residual is not None and residual.shape == total.shape:
            total = total + residual
        pieces = pack(total, codec)
        self._residuals.pop(name, None)
        self._residuals[name] = unpack(pieces, codec, tuple(total.shape)).neg_().add_(total)
        if len(self._residuals) > self._names:
            del self._residuals[next(iter(self._residuals))]
        return pieces


def _quantise(tensor: Tensor) -> dict[str, Tensor]:
    count = tensor.numel()
    # one padded fp32 copy, divided and rounded in place: fresh memory costs most, 35 of 65 ms for 90 MB on one core
    blocks = torch.zeros(-(-count // BLOCK), BLOCK, device=tensor.device)
    blocks.view(-1)[:count].view(tensor.shape).copy_(tensor)
    peaks = torch.maximum(blocks.amax(1), -blocks.amin(1))
    if not (peaks <= _LIMITS["int8"]).all():  # a nan is not
        raise _refusal(tensor, "int8")
    scales = (peaks / 127).bfloat16()
    divisors = scales.float().masked_fill_(scales == 0, 1.0)  # 0 / 0 as an integer is undefined
    codes = blocks.div_(divisors[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return {"": codes.view(-1)[:count].view(tensor.shape), "scale": scales}


def _dequantise(codes: Tensor, scales: Tensor) -> Tensor:
    wanted = -(-codes.numel() // BLOCK)
    if scales.dtype != torch.bfloat16 or tuple(scales.shape) != (wanted,):
        came = f"{tuple(scales.shape)} of {scales.dtype}"
        raise ValueError(f"{codes.numel()} codes need scales {(wanted,)} of {torch.bfloat16}, got {came}")
    if not ((scales >= 0) & (scales <= _SCALE_LIMIT)).all():  # a nan is neither
        low, high = (float(extreme) for extreme in torch.aminmax(scales))
        raise ValueError(f"scales lie in [0, {_SCALE_LIMIT:.3g}], got [{low:.3g}, {high:.3g}]")
    flat = codes.float().reshape(-1)
    whole = codes.numel() // BLOCK
    flat[: whole * BLOCK].view(whole, BLOCK).mul_(scales[:whole, None])
    flat[whole * BLOCK :].mul_(scales[whole:])  # the short last block, or nothing
    return flat.view(codes.shape)


def _floating(tensor: Tensor, codec: Codec) -> Tensor:
    if not tensor.is_floating_point():
        raise ValueError(f"{codec} writes floating tensors, got {tensor.dtype}; send it with codec none")
    return tensor.detach()


def _fits(tensor: Tensor, shape: tuple[int | None, ...]) -> bool:
    return tensor.dim() == len(shape) and all(
        want in (None, came) for want, came in zip(shape, tensor.shape, strict=True)
    )


def _refusal(tensor: Tensor, codec: Codec) -> ValueError:
    peak = float(tensor.double().abs().max())
    if peak > _LIMITS[codec] and peak != float("inf"):
        way_out = "use bf16 or int8, or clip gradients" if codec == "fp16" else "lower the learning rate"
        return ValueError(f"{codec} ends at {_LIMITS[codec]:.5g} and the tensor reaches {peak:.5g}; {way_out}")
    return ValueError(f"{codec} writes finite numbers and the tensor has an inf or a nan; lower the learning rate")
