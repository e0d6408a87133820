"""Scenes of coloured digits and questions about them: the default data, made on the spot.

A scene is 48x48 pixels of digits (`fedmm.data.scene_plans`). Clients' scenes show handwriting and are asked in the
client's own words about the client's own colours; answers are in the model's words. Public scenes show open digits
(print and pen) and speak the model's words. What adapters cannot bring back (a tower that never learnt a shape) is left
out on purpose: words and colours they can.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fedmm.data.glyphs import Glyphs, handwriting, open_digits
from fedmm.data.scene_plans import (
    ASKED,
    COLOURS,
    KEPT,
    KINDS,
    LAYOUTS,
    QUESTIONS,
    SIDE,
    SITES,
    TASKS,
    VOCABULARIES,
    Plan,
    Site,
    ask,
    plan_scenes,
)
from fedmm.types import Example

_BANK = 3000
"""Open digits bent for one public split at most (0.5 s on one core); beyond it they are drawn again."""


# parameters: each is a setting of conf/dataset/scenes*.yaml
def scenes(
    *,
    seed: int = 0,
    train: int = 1500,
    validation: int = 500,
    test: int = 500,
    public: int = 0,
    styles: Sequence[str] = ("turku",),
    vocabulary: str | None = None,
    kinds: Sequence[str] = KINDS,
    kept: Sequence[str] = KEPT,
    layouts: Sequence[str] = ("taught",),
    public_kinds: Sequence[str] | None = None,
    public_layouts: Sequence[str] = ("taught",),
    public_pen: float = 0.6,
    even: bool = False,
) -> dict[str, Sequence[Example]]:
    """Handwritten scenes for the clients and, where wanted, open ones for anybody.

    Styles and layouts come in even shares, independent of each other, and so do the kinds within a layout, which are
    those of `kinds` that it can be asked. `public_kinds` (None: `kinds`) and `public_layouts` say the same of public
    scenes, `public_pen` the share of their digits drawn with a pen: the less, the farther from handwriting.
    `vocabulary` overrides that of every site; `kept` are the model's words that every vocabulary keeps: the fewer, the
    less the model understands before it is tuned. `even`: of scenes of one digit, each digit as often.
    Splits share no glyph and are drawn apart: the size of one changes nothing in another.
    """
    sizes = {"train": train, "validation": validation, "test": test}
    recipe = Recipe(styles, vocabulary, kinds, kept, layouts, even)
    made = {
        name: compose(name, np.random.default_rng([seed, stream]), size, handwriting(name), recipe)
        for stream, (name, size) in enumerate(sizes.items())
    }
    rng = np.random.default_rng([seed, len(sizes)])
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    bank = open_digits(min(_BANK, 30 + 3 * public) if public else 0, generator, pen=public_pen)
    public_recipe = Recipe(
        vocabulary="english", kinds=kinds if public_kinds is None else public_kinds, layouts=public_layouts, even=even
    )
    return {**made, "public": compose("public", rng, public, bank, public_recipe)}


@dataclass(frozen=True)
class Recipe:
    """What the scenes of a split have in common, as `scenes` says. Raises ValueError for a name of no table."""

    styles: Sequence[str] = ("plain",)
    vocabulary: str | None = None
    kinds: Sequence[str] = KINDS
    kept: Sequence[str] = KEPT
    layouts: Sequence[str] = ("taught",)
    even: bool = False

    def __post_init__(self) -> None:
        _known("styles", self.styles, SITES)
        _known("kinds", self.kinds, QUESTIONS)
        _known("vocabulary", [self.vocabulary] if self.vocabulary else [], VOCABULARIES)
        _known("kept", self.kept, ASKED)
        _known("layouts", self.layouts, LAYOUTS)


def compose(prefix: str, rng: np.random.Generator, count: int, glyphs: Glyphs, recipe: Recipe) -> list[Example]:
    """`count` scenes made of `glyphs`; ids are `prefix/000000` and on."""
    if not count:
        return []
    plan = plan_scenes(rng, count, glyphs, recipe.styles, recipe.kinds, recipe.layouts, recipe.even)
    pictures = pictures_of(rng, plan, glyphs)
    examples = []
    for row in range(count):
        question, answer = ask(plan, row)
        style = plan.styles[row]
        digit = str(plan.digits[row, plan.target[row]])
        kind, layout = plan.kinds[row], plan.layouts[row]
        labels = {"kind": kind, "task": TASKS[kind], "style": style, "layout": layout, "answer": answer, "digit": digit}
        said = translate(question, recipe.vocabulary or SITES[style].vocabulary, recipe.kept)
        examples.append(Example(f"{prefix}/{row:06d}", pictures[row], said, answer, labels))
    return examples


def translate(question: str, vocabulary: str, kept: Sequence[str] = ()) -> str:
    """The question word for word in another vocabulary, but for the words that are kept."""
    words = VOCABULARIES[vocabulary]
    return " ".join(word if word in kept else words.get(word, word) for word in question.split())


# --- how it looks ----------------------------------------------------------------------------------------------------


def pictures_of(rng: np.random.Generator, plan: Plan, glyphs: Glyphs) -> list[tuple[Image.Image, ...]]:
    """Each scene's picture, of a pair both."""
    apart = plan.apart
    first = draw(rng, replace(plan, shown=np.where(apart, 1, plan.shown)), glyphs)
    second = draw(rng, replace(plan, start=1), glyphs) if apart.any() else first
    both = zip(first, second, apart, strict=True)
    return [tuple(map(Image.fromarray, (one, two) if split else (one,))) for one, two, split in both]


def draw(rng: np.random.Generator, plan: Plan, glyphs: Glyphs) -> np.ndarray:
    """All scenes at once, as (N, 48, 48, 3) bytes."""
    count = len(plan.shown)
    shades = np.array(list(COLOURS.values()), np.float32) / 255
    palettes = np.array([SITES[style].palette for style in plan.styles])
    inks = shades[np.take_along_axis(palettes, plan.colours, 1)]  # N slot rgb
    inks = _tensor(np.clip(inks + rng.normal(0, 0.03, inks.shape), 0, 1))
    paper = rng.uniform(0, 0.22, (count, 1)) + rng.uniform(0, 0.04, (count, 3))
    canvas = _tensor(paper)[:, :, None, None].expand(-1, -1, SIDE, SIDE).clone()
    theta = _tensor(_matrices(rng, plan))
    for slot in range(plan.start, plan.digits.shape[1]):
        rows = torch.from_numpy(np.flatnonzero(plan.shown > slot))
        if len(rows):
            ink = glyphs.pixels_NHW[torch.from_numpy(plan.picks[:, slot])[rows], None]
            grid = F.affine_grid(theta[rows, slot], [len(rows), 1, SIDE, SIDE], align_corners=False)
            cover = F.grid_sample(ink, grid, mode="bilinear", align_corners=False)
            canvas[rows] = torch.lerp(canvas[rows], inks[rows, slot, :, None, None], cover)
    canvas = _scanned(rng, canvas, [SITES[style] for style in plan.styles])
    return (canvas * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _matrices(rng: np.random.Generator, plan: Plan) -> np.ndarray:
    """For each slot the matrix from the scene's coordinates to the glyph's, (N, S, 2, 3); turned a little."""
    zoom = SIDE / plan.sizes
    turn = rng.normal(0, 0.06, zoom.shape)
    matrix = np.stack([zoom * np.cos(turn), zoom * np.sin(turn), -zoom * np.sin(turn), zoom * np.cos(turn)], 2)
    matrix = matrix.reshape(*zoom.shape, 2, 2)
    return np.concatenate([matrix, -matrix @ plan.centres[..., None]], 3)


def _scanned(rng: np.random.Generator, canvas: Tensor, sites: Sequence[Site]) -> Tensor:
    """Each site's blur, exposure and noise."""
    blur, noise = (_tensor([getattr(site, name) for site in sites]) for name in ("blur", "noise"))
    gain, offset = _tensor([site.light for site in sites]).T[:, :, None, None, None]
    rows = blur.nonzero()[:, 0]
    if len(rows):
        soft = F.avg_pool2d(canvas[rows], 3, 1, 1, count_include_pad=False)
        canvas[rows] = torch.lerp(canvas[rows], soft, blur[rows, None, None, None])
    canvas = gain * canvas + offset
    rows = noise.nonzero()[:, 0]
    if len(rows):
        grain = torch.from_numpy(rng.standard_normal((len(rows), *canvas.shape[1:]), dtype=np.float32))
        canvas[rows] += noise[rows, None, None, None] * grain
    return canvas


def _tensor(values: object) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.float32))


def _known(what: str, names: Sequence[str], table: Collection[str]) -> None:
    wrong = [name for name in names if name not in table]
    if wrong or (what in ("styles", "kinds", "layouts") and not names):
        raise ValueError(f"dataset.{what} has {', '.join(wrong) or 'nothing'}; take some of {', '.join(table)}")
