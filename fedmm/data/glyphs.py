"""Digits to compose scenes of: real handwriting for clients, printed and pen-drawn ones that anybody may have.

Handwriting: UCI optical digits as scikit-learn carries them, 1,797 pictures of 8x8, split 60/20/20 by glyph.
Open: the fonts matplotlib ships and a pen that follows skeletons, both bent, thickened and, mostly, put through the
same 8x8 raster as the handwriting. No handwritten glyph went into them.
Source: Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI 1998; elastic bending as Simard et al. 2003.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIDE = 32
"""Pixels of a glyph's side: four to each cell of the 8x8 raster, as the UCI digits were scanned."""

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Glyphs:
    """Pictures of single digits, ink 1 on paper 0. `ids_N` say which picture of its source each one is."""

    pixels_NHW: Float[Tensor, "N 32 32"]
    digits_N: Int[np.ndarray, " N"]
    ids_N: Int[np.ndarray, " N"]


@lru_cache
def handwriting(split: str) -> Glyphs:
    """The handwritten digits of one split; 60/20/20 within every digit, the same glyphs whatever the seed.

    The split is by glyph, not by writer: scikit-learn's copy does not say who wrote what.
    """
    if split not in SPLITS:
        raise ValueError(f"handwriting has no split {split!r}; take one of {', '.join(SPLITS)}")
    from sklearn.datasets import load_digits  # 1 s to import, and only here

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    ids = np.sort(np.concatenate([_share(order[bunch.target[order] == digit], split) for digit in range(10)]))
    cells = torch.from_numpy(bunch.images[ids]).float() / 16
    return Glyphs(_from_cells(cells), bunch.target[ids].astype(np.int64), ids)


def open_digits(count: int, generator: torch.Generator, *, pen: float = 0.6, raster: float = 0.8) -> Glyphs:
    """`count` open digits, each bent afresh.

    `pen`: the share drawn with the pen. A small convolutional net taught on 30,000 of these reads 91% of the
    handwritten validation glyphs; taught on bent prints alone, 67%.
    `raster`: the share put through the 8x8 raster; the rest keeps sharp edges, so that plain print is still read.
    `ids_N` name the print or skeleton, not the picture: two pictures of one print differ by their bending.
    """
    prints = _prints()
    chunks = [
        _bent(prints, min(1024, count - start), generator, pen=pen, raster=raster) for start in range(0, count, 1024)
    ]
    if not chunks:
        return Glyphs(torch.zeros(0, SIDE, SIDE), np.zeros(0, np.int64), np.zeros(0, np.int64))
    pixels, digits, ids = zip(*chunks, strict=True)
    return Glyphs(torch.cat(pixels), np.concatenate(digits), np.concatenate(ids))


def _share(ids: Int[np.ndarray, " N"], split: str) -> Int[np.ndarray, " M"]:
    first, second = int(0.6 * len(ids)), int(0.8 * len(ids))
    return {"train": ids[:first], "validation": ids[first:second], "test": ids[second:]}[split]


def _from_cells(cells_N88: Tensor) -> Tensor:
    """8x8 grey levels to smooth 32x32 strokes; the contrast undoes what the raster blurred."""
    up = F.interpolate(cells_N88[:, None], size=(SIDE, SIDE), mode="bicubic", align_corners=False)[:, 0]
    return (1.6 * (up - 0.5) + 0.55).clamp(0, 1)


# --- printed digits -------------------------------------------------------------------------------------------------

_FONTS = (
    "DejaVuSans",
    "DejaVuSans-*",
    "DejaVuSansMono*",
    "DejaVuSerif",
    "DejaVuSerif-*",
    "STIXGeneral*",
    "cm[br]*10",
    "cmss10",
    "cmt[it]10",
)
_BASE = 2 * SIDE


@lru_cache
def _prints() -> Glyphs:
    """Every digit of every bundled font, cropped to its ink, 7/8 of the picture high."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = [path for name in _FONTS for path in sorted(folder.glob(f"{name}.ttf"))]
    pictures = [_print(path, digit) for path in files for digit in range(10)]
    pixels = torch.from_numpy(np.stack(pictures)).float() / 255
    return Glyphs(pixels, np.tile(np.arange(10), len(files)), np.arange(len(pictures)))


def _print(path: Path, digit: int) -> np.ndarray:
    font = ImageFont.truetype(str(path), 96)
    left, top, right, bottom = (int(edge) for edge in font.getbbox(str(digit)))
    canvas = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(canvas).text((-left, -top), str(digit), font=font, fill=255)
    height = 7 * _BASE // 8
    width = min(height, max(1, round(height * canvas.width / canvas.height)))
    page = Image.new("L", (_BASE, _BASE))
    page.paste(canvas.resize((width, height)), ((_BASE - width) // 2, (_BASE - height) // 2))
    return np.asarray(page)


# --- the pen --------------------------------------------------------------------------------------------------------

# Control points (x, y) of strokes in a box of width 1 and height 1.4, y down; a smooth line runs through them.
_SKELETONS: dict[int, Sequence[Sequence[Sequence[tuple[float, float]]]]] = {
    0: [
        [[(0.5, 0), (0.1, 0.3), (0.05, 0.8), (0.3, 1.35), (0.7, 1.3), (0.95, 0.8), (0.85, 0.25), (0.5, 0)]],
        [[(0.6, 0.05), (0.2, 0.3), (0.05, 1.0), (0.4, 1.4), (0.85, 1.0), (0.95, 0.4), (0.6, 0.0), (0.4, 0.1)]],
    ],
    1: [
        [[(0.5, 0), (0.5, 0.5), (0.5, 0.9), (0.5, 1.4)]],
        [[(0.25, 0.35), (0.4, 0.2), (0.55, 0.0)], [(0.55, 0.0), (0.55, 0.7), (0.55, 1.4)]],
        [[(0.25, 0.35), (0.55, 0.0)], [(0.55, 0.0), (0.55, 1.4)], [(0.2, 1.4), (0.9, 1.4)]],
        [[(0.65, 0), (0.55, 0.5), (0.45, 0.9), (0.35, 1.4)]],
        [[(0.2, 0.45), (0.35, 0.35), (0.6, 0.0)], [(0.6, 0.0), (0.6, 1.4)], [(0.35, 0.35), (0.6, 0.45)]],
        [[(0.3, 0.4), (0.6, 0.0)], [(0.6, 0.0), (0.6, 1.4)], [(0.35, 0.4), (0.6, 0.7), (0.55, 0.2)]],
        [[(0.1, 0.65), (0.55, 0.0)], [(0.55, 0.0), (0.55, 1.4)], [(0.2, 0.6), (0.5, 0.7)], [(0.35, 0.3), (0.5, 0.7)]],
    ],
    2: [
        [[(0.1, 0.3), (0.35, 0.0), (0.8, 0.1), (0.8, 0.5), (0.4, 1.0), (0.05, 1.4)], [(0.05, 1.4), (0.95, 1.35)]],
        [
            [(0.1, 0.2), (0.5, 0.0), (0.85, 0.3), (0.6, 0.9), (0.2, 1.35), (0.1, 1.15), (0.4, 1.15), (0.7, 1.35)],
            [(0.7, 1.35), (1.0, 1.25)],
        ],
        [[(0.2, 0.15), (0.6, 0.0), (0.8, 0.4), (0.5, 0.95), (0.1, 1.4), (0.5, 1.35), (0.9, 1.4)]],
    ],
    3: [
        [
            [(0.1, 0.15), (0.5, 0.0), (0.85, 0.3), (0.45, 0.65)],
            [(0.45, 0.65), (0.9, 0.95), (0.7, 1.35), (0.3, 1.4), (0.05, 1.2)],
        ],
        [[(0.15, 0.1), (0.7, 0.0), (0.8, 0.4), (0.4, 0.65), (0.85, 0.9), (0.75, 1.3), (0.35, 1.4), (0.1, 1.3)]],
        [[(0.1, 0.05), (0.85, 0.0)], [(0.85, 0.0), (0.4, 0.55)], [(0.4, 0.55), (0.9, 0.8), (0.7, 1.3), (0.1, 1.35)]],
    ],
    4: [
        [[(0.65, 0), (0.35, 0.45), (0.05, 0.95)], [(0.05, 0.95), (1.0, 0.95)], [(0.7, 0.5), (0.7, 1.4)]],
        [[(0.2, 0), (0.1, 0.4), (0.15, 0.75), (0.85, 0.7)], [(0.85, 0.1), (0.8, 0.7), (0.7, 1.4)]],
        [[(0.45, 0), (0.15, 0.45), (0.05, 0.85), (0.5, 0.9), (0.95, 0.8)], [(0.7, 0.45), (0.6, 0.9), (0.5, 1.4)]],
        [[(0.7, 0), (0.05, 0.9)], [(0.05, 0.9), (0.95, 0.9)], [(0.7, 0.0), (0.7, 1.4)]],
    ],
    5: [
        [
            [(0.9, 0.0), (0.25, 0.02)],
            [(0.25, 0.02), (0.2, 0.55)],
            [(0.2, 0.55), (0.7, 0.5), (0.9, 0.95), (0.6, 1.35), (0.1, 1.3)],
        ],
        [
            [(0.95, 0.0), (0.3, 0.05)],
            [(0.3, 0.05), (0.15, 0.6), (0.5, 0.6), (0.8, 0.8), (0.75, 1.2), (0.4, 1.4), (0.05, 1.3)],
        ],
        [[(0.85, 0.05), (0.4, 0.0), (0.2, 0.4), (0.45, 0.65), (0.75, 0.9), (0.6, 1.3), (0.2, 1.4)]],
    ],
    6: [
        [
            [(0.75, 0.0), (0.3, 0.35), (0.05, 0.9), (0.25, 1.35), (0.7, 1.35), (0.9, 1.0), (0.6, 0.7)],
            [(0.6, 0.7), (0.3, 0.8), (0.1, 1.05)],
        ],
        [[(0.5, 0), (0.2, 0.5), (0.1, 1.0), (0.35, 1.4), (0.75, 1.3), (0.8, 0.95), (0.5, 0.8), (0.2, 1.05)]],
    ],
    7: [
        [[(0.05, 0.05), (0.95, 0.0)], [(0.95, 0.0), (0.6, 0.6), (0.4, 1.4)]],
        [[(0.05, 0.05), (0.95, 0.0)], [(0.95, 0.0), (0.55, 0.7), (0.4, 1.4)], [(0.25, 0.7), (0.9, 0.65)]],
        [[(0.05, 0.3), (0.1, 0.05), (0.5, 0.1), (0.95, 0.0)], [(0.95, 0.0), (0.7, 0.5), (0.5, 1.4)]],
        [[(0.1, 0.1), (0.5, 0.0), (0.85, 0.1), (0.75, 0.6), (0.5, 1.4)], [(0.2, 0.75), (0.95, 0.65)]],
    ],
    8: [
        [
            [(0.5, 0.65), (0.15, 0.35), (0.5, 0.0), (0.85, 0.3), (0.5, 0.65), (0.1, 1.05), (0.5, 1.4), (0.9, 1.05)],
            [(0.9, 1.05), (0.75, 0.8), (0.5, 0.65)],
        ],
        [
            [(0.8, 0.15), (0.4, 0.0), (0.2, 0.35), (0.6, 0.75), (0.8, 1.15), (0.45, 1.4), (0.2, 1.1)],
            [(0.2, 1.1), (0.45, 0.75), (0.75, 0.4), (0.8, 0.15)],
        ],
    ],
    9: [
        [
            [(0.85, 0.3), (0.5, 0.0), (0.1, 0.25), (0.2, 0.65), (0.6, 0.7), (0.85, 0.3)],
            [(0.85, 0.3), (0.8, 0.9), (0.65, 1.4)],
        ],
        [
            [(0.8, 0.15), (0.4, 0.05), (0.15, 0.4), (0.45, 0.7), (0.8, 0.45), (0.8, 0.15)],
            [(0.8, 0.15), (0.85, 0.8), (0.6, 1.3), (0.15, 1.35)],
        ],
        [[(0.8, 0.1), (0.3, 0.1), (0.2, 0.55), (0.7, 0.55), (0.8, 0.1)], [(0.8, 0.1), (0.7, 0.8), (0.3, 1.4)]],
        [
            [(0.8, 0.2), (0.45, 0.0), (0.1, 0.3), (0.4, 0.6), (0.8, 0.35), (0.8, 0.2)],
            [(0.8, 0.2), (0.9, 0.8), (0.75, 1.3), (0.4, 1.4), (0.1, 1.2)],
        ],
        [
            [(0.75, 0.1), (0.3, 0.1), (0.15, 0.45), (0.5, 0.7), (0.8, 0.5)],
            [(0.8, 0.1), (0.85, 0.7), (0.8, 1.2), (0.5, 1.4), (0.15, 1.3)],
        ],
    ],
}
_BEADS = 24  # points along a stroke; closer than a pen is thick


@lru_cache
def _beads() -> tuple[Tensor, Int[np.ndarray, " N"]]:
    """All skeletons as beads in [-1, 1]^2, strokes padded by repeating, and their digits."""
    lines, digits = [], []
    for digit, variants in _SKELETONS.items():
        for strokes in variants:
            beads = np.concatenate([_curve(np.array(stroke)) for stroke in strokes])
            lines.append(np.resize(beads, (4 * _BEADS, 2)))
            digits.append(digit)
    stacked = torch.from_numpy(np.stack(lines)).float()
    return (stacked - torch.tensor([0.5, 0.7])) / 0.8, np.array(digits)


def _curve(points: np.ndarray) -> np.ndarray:
    """A Catmull-Rom line through the control points."""
    padded = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    at = np.linspace(0, len(points) - 1 - 1e-6, _BEADS)
    low, t = at.astype(int), (at % 1)[:, None]
    a, b, c, d = (padded[low + shift] for shift in range(4))
    return 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)


def _drawn(which: Tensor, matrix_N22: Tensor, field_N2HW: Tensor, generator: torch.Generator) -> Tensor:
    """Pen strokes: distance to the nearest bead, bent by the affine matrix and the field, inked within a width."""
    beads = _beads()[0][which] @ matrix_N22.transpose(1, 2)
    bend = F.grid_sample(field_N2HW, beads[:, :, None], mode="bilinear", padding_mode="border", align_corners=False)
    beads = beads + 1.2 * bend[..., 0].transpose(1, 2)
    low, high = beads.amin(1, keepdim=True), beads.amax(1, keepdim=True)
    beads = (beads - (low + high) / 2) * (1.64 / (high - low)[..., 1:].clamp(min=0.5)).clamp(max=1.6)  # height filled
    axis = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).view(1, -1, 2).expand(len(which), -1, -1)
    distance = torch.cdist(grid, beads).amin(-1).view(-1, SIDE, SIDE)
    width = _uniform(generator, len(which), 0.09, 0.26)[:, None, None]
    stretch = _uniform(generator, len(which), 1.0, 2.4)[:, None, None]  # of a 1: scans are fitted to their frame
    width = torch.where(torch.from_numpy(_beads()[1] == 1)[which][:, None, None], stretch * width, width)
    return ((width - distance) * SIDE / 2 + 0.5).clamp(0, 1)


# --- bending --------------------------------------------------------------------------------------------------------


def _bent(prints: Glyphs, count: int, generator: torch.Generator, *, pen: float, raster: float) -> tuple:
    """One chunk: choose, bend, thicken, and put through the raster."""
    matrix, field = _matrices(generator, count), _fields(generator, count)
    skeletons, drawn = _beads()[1], torch.rand(count, generator=generator) < pen
    digits = torch.randperm(count, generator=generator).numpy() % 10  # even, however many variants a digit has
    pick = torch.rand(count, generator=generator).numpy()
    ids, pixels = np.zeros(count, np.int64), torch.zeros(count, SIDE, SIDE)
    for source, mine in ((prints.digits_N, ~drawn), (skeletons, drawn)):
        rows = np.flatnonzero(mine.numpy())
        ids[rows] = [_nth(source, digits[row], pick[row]) for row in rows]
    here = torch.from_numpy(ids)
    if not drawn.all():
        pixels[~drawn] = _warped(prints.pixels_NHW[here[~drawn]], matrix[~drawn], field[~drawn], generator)
    if drawn.any():
        pixels[drawn] = _drawn(here[drawn], matrix[drawn], field[drawn], generator)
    cells = (F.avg_pool2d(pixels[:, None], 4)[:, 0] * 16).round() / 16
    through = torch.rand(count, generator=generator) < raster
    pixels[through] = _from_cells(cells[through])
    ids[drawn.numpy()] += len(prints.digits_N)
    return pixels, digits, ids


def _nth(source: np.ndarray, digit: int, pick: float) -> int:
    found = np.flatnonzero(source == digit)
    return int(found[int(pick * len(found))])


def _warped(pixels_NHW: Tensor, matrix_N22: Tensor, field_N2HW: Tensor, generator: torch.Generator) -> Tensor:
    """Prints bent by the inverse of the matrix, thickened by blurring and cutting at a level (a rounded pen)."""
    count = len(pixels_NHW)
    theta = torch.cat([torch.linalg.inv(matrix_N22), torch.zeros(count, 2, 1)], 2)
    grid = F.affine_grid(theta, [count, 1, SIDE, SIDE], align_corners=False)
    grid = grid + F.interpolate(field_N2HW, size=(SIDE, SIDE), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    soft = F.avg_pool2d(F.avg_pool2d(pixels_NHW[:, None], 5, 1, 2), 5, 1, 2)
    page = F.grid_sample(soft, grid, mode="bilinear", align_corners=False)[:, 0]
    level = _uniform(generator, count, 0.12, 0.4)[:, None, None]
    return (6 * (page - level) + 0.5).clamp(0, 1)


def _matrices(generator: torch.Generator, count: int) -> Tensor:
    """Scale, shear and turn; 7 degrees and a slant of 0.25 are one standard deviation."""
    turn = 0.13 * torch.randn(count, generator=generator)
    slant = 0.25 * torch.randn(count, generator=generator)
    wide, high = _uniform(generator, count, 0.6, 1.2), _uniform(generator, count, 0.9, 1.1)
    zero = torch.zeros(count)
    scale = torch.stack([wide, slant, zero, high], 1).view(-1, 2, 2)
    rotate = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], 1).view(-1, 2, 2)
    return rotate @ scale


def _fields(generator: torch.Generator, count: int) -> Tensor:
    """Smooth displacements, as much as a tenth of the picture between neighbouring thirds."""
    size = _uniform(generator, count, 0.0, 0.09)[:, None, None, None]
    return size * torch.randn(count, 2, 4, 4, generator=generator)


def _uniform(generator: torch.Generator, count: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)
