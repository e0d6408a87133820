"""Scenes of coloured digits and questions about them: the default data, made on the spot.

A scene is 48x48 pixels: one to three digits in different colours, two side by side or one above the other, or three in
cells of a 2x2 grid; other layouts crowd, overlap or shrink them. Clients' scenes show handwriting and are asked in the
client's own words about the client's own colours; answers are in the model's words. Public scenes show open digits
(print and pen) and speak the model's words. What adapters cannot bring back (a tower that never learnt a shape) is left
out on purpose: words and colours they can.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fedmm.data.glyphs import Glyphs, handwriting, open_digits
from fedmm.types import IMAGE_PLACE, Example

SIDE = 48
"""Pixels of a scene's side."""

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (230, 50, 45),
    "green": (50, 190, 70),
    "blue": (60, 100, 245),
    "yellow": (240, 215, 60),
    "purple": (185, 70, 215),
    "white": (240, 240, 240),
}

KINDS = ("colour", "compare", "count", "name", "place", "read", "sum")
"""What the embedded model was taught. colour: which digit is red. compare: which side is larger. count: how many
digits. name: what colour is the 3. place: which digit is on the left. read: read the digits (two words). sum: what is
the sum."""

QUESTIONS = {
    "colour": "which digit is {colour} ?",
    "compare": "which side is {order} ?",
    "count": "how many digits are there ?",
    "name": "what colour is the {digit} ?",
    "place": "which digit is on the {side} ?",
    "read": "read the digits ?",
    "sum": "what is the sum ?",
    "pair": "{image} which side is {order} ?",
    "verify": "is the {colour} digit {order} {middle} ?",
}
"""The last two it was not. pair: two images of one digit each, and which holds the larger, the first being the left.
verify: whether what is said of a digit holds. Their words are among the others': its vocabulary has no more."""
SIDES = ("left", "right", "top", "bottom")
ORDERS = ("larger", "smaller")
WORDS = tuple(sorted({word for text in QUESTIONS.values() for word in text.split() if "{" not in word}))

TASKS: Mapping[str, str] = {
    "colour": "digit",
    "compare": "side",
    "count": "number",
    "name": "colour",
    "pair": "pair",
    "place": "digit",
    "read": "reading",
    "sum": "number",
    "verify": "entailment",
}
"""By the answers they want: a digit, a side, a number, a colour, two words, yes or no."""
YES, NO = "1", "0"  # the embedded model has no such words, and says only what it was taught to say
MIDDLE = 4  # half the digits are above. "is the red digit 3 ?", with any number, was not learnt in 128 steps of tuning
ASKED = (*WORDS, *COLOURS, *SIDES, *ORDERS)
"""Every word of the model's own that a question can hold, numerals apart."""

# --- client sites -----------------------------------------------------------------------------------------------------

_OWN = (
    "red green blue yellow purple white left right top bottom larger smaller which what how many digit digits colour "
    "side sum read is the on are there"
)


def _lexicon(words: str) -> dict[str, str]:
    return dict(zip(_OWN.split(), words.split(), strict=True))


VOCABULARIES: Mapping[str, Mapping[str, str]] = {
    "english": {},
    "german": _lexicon(
        "rot grün blau gelb lila weiß links rechts oben unten größer kleiner welche was wie viele ziffer ziffern farbe "
        "seite summe lies ist die auf sind da"
    ),
    "french": _lexicon(
        "rouge vert bleu jaune violet blanc gauche droite haut bas grand petit quel quoi combien plusieurs chiffre "
        "chiffres couleur côté somme lisez est la sur sont là"
    ),
    "spanish": _lexicon(
        "rojo verde azul amarillo morado blanco izquierda derecha arriba abajo mayor menor cuál qué cómo muchos cifra "
        "cifras color lado suma lee es el sobre son ahí"
    ),
    "finnish": _lexicon(
        "punainen vihreä sininen keltainen violetti valkoinen vasen oikea ylhäällä alhaalla suurempi pienempi kumpi "
        "mikä kuinka monta numero numerot väri puoli summa lue onpa se päällä ovat siellä"
    ),
    "turkish": _lexicon(
        "kırmızı yeşil mavi sarı mor beyaz sol sağ üst alt büyük küçük hangi ne nasıl kaç rakam rakamlar renk taraf "
        "toplam oku dir bu üstünde var orada"
    ),
}
"""Client words for the model's words; a word that is not in the table stays as it is."""

KEPT = ("is", "the", "on", "are", "there", "what", "which")
"""What clients by default say as the model does. With none kept it starts at 7% on the default sites' questions."""


@dataclass(frozen=True)
class Site:
    """How one client's scenes differ. `palette[i]` is the colour shown where the site speaks of colour i."""

    vocabulary: str = "english"
    palette: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    noise: float = 0.0  # standard deviation on a scale of 0 to 1
    blur: float = 0.0  # 0 sharp, 1 a 3x3 mean
    light: tuple[float, float] = (1.0, 0.0)  # gain, offset: a scanner's exposure


SITES: Mapping[str, Site] = {
    "plain": Site(),
    "turku": Site("finnish", palette=(1, 2, 0, 3, 4, 5)),
    "vienna": Site("german", palette=(2, 1, 0, 4, 3, 5), noise=0.06),
    "lyon": Site("french", palette=(3, 2, 1, 0, 5, 4), blur=0.5),
    "sevilla": Site("spanish", palette=(5, 3, 4, 1, 2, 0), light=(0.7, 0.05)),
    "izmir": Site("turkish", palette=(4, 5, 3, 2, 0, 1), noise=0.03, light=(0.85, 0.15)),
}

# --- layouts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How digits stand in a scene. `digits`: for each kind of question it can be asked, the fewest and most of them."""

    digits: Mapping[str, tuple[int, int]]
    spread: float = 1.0  # of their centres about the middle
    zoom: float = 1.0  # of their sizes


_TWO = dict.fromkeys(("colour", "compare", "name", "place", "read", "sum", "verify"), (2, 2))
LAYOUTS: Mapping[str, Layout] = {
    "taught": Layout({**_TWO, "colour": (2, 3), "count": (1, 3), "name": (2, 3), "pair": (2, 2)}),
    "one": Layout(dict.fromkeys(("colour", "name", "verify"), (1, 1))),
    "two": Layout({**_TWO, "pair": (2, 2)}),
    "crowded": Layout(dict.fromkeys(("colour", "count", "name", "verify"), (4, 6))),
    "overlapping": Layout(_TWO, spread=0.5),  # 11 to 13 pixels apart, 20 to 29 high
    "tiny": Layout(
        {**_TWO, "pair": (2, 2)}, zoom=0.6
    ),  # 12 to 17 pixels high; at 9 to 13 the tower reads next to nothing
}
"""`taught` is what the embedded model has seen; its counts overlap, so that three digits betray no kind. The others are
FedDAT's scenes. Where an answer would be always the same or none (how many in `one`), the kind is not asked."""


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
    made = {
        name: compose(
            name,
            np.random.default_rng([seed, stream]),
            size,
            handwriting(name),
            styles,
            vocabulary,
            kinds,
            kept,
            layouts,
            even,
        )
        for stream, (name, size) in enumerate(sizes.items())
    }
    rng = np.random.default_rng([seed, len(sizes)])
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    bank = open_digits(min(_BANK, 30 + 3 * public) if public else 0, generator, pen=public_pen)
    asked = kinds if public_kinds is None else public_kinds
    shown = compose("public", rng, public, bank, ("plain",), "english", asked, layouts=public_layouts, even=even)
    return {**made, "public": shown}


# parameters: the laws that scenes are drawn by, most of them left at their defaults by a caller
def compose(
    prefix: str,
    rng: np.random.Generator,
    count: int,
    glyphs: Glyphs,
    styles: Sequence[str] = ("plain",),
    vocabulary: str | None = None,
    kinds: Sequence[str] = KINDS,
    kept: Sequence[str] = KEPT,
    layouts: Sequence[str] = ("taught",),
    even: bool = False,
) -> list[Example]:
    """`count` scenes made of `glyphs`; ids are `prefix/000000` and on."""
    _known("styles", styles, SITES)
    _known("kinds", kinds, QUESTIONS)
    _known("vocabulary", [vocabulary] if vocabulary else [], VOCABULARIES)
    _known("kept", kept, ASKED)
    _known("layouts", layouts, LAYOUTS)
    if not count:
        return []
    plan = plan_scenes(rng, count, glyphs, styles, kinds, layouts, even)
    pictures = pictures_of(rng, plan, glyphs)
    examples = []
    for row in range(count):
        question, answer = ask(plan, row)
        style = plan.styles[row]
        digit = str(plan.digits[row, plan.target[row]])
        kind, layout = plan.kinds[row], plan.layouts[row]
        labels = {"kind": kind, "task": TASKS[kind], "style": style, "layout": layout, "answer": answer, "digit": digit}
        said = translate(question, vocabulary or SITES[style].vocabulary, kept)
        examples.append(Example(f"{prefix}/{row:06d}", pictures[row], said, answer, labels))
    return examples


def translate(question: str, vocabulary: str, kept: Sequence[str] = ()) -> str:
    """The question word for word in another vocabulary, but for the words that are kept."""
    words = VOCABULARIES[vocabulary]
    return " ".join(word if word in kept else words.get(word, word) for word in question.split())


# --- what is in a scene ----------------------------------------------------------------------------------------------

_TAUGHT_SLOTS = 3


@dataclass(frozen=True)
class Plan:
    """Rows are scenes, columns slots; the first `shown` slots of a row are drawn, slot 0 left of or above slot 1.

    There are 3 slots, and more where a layout has more digits. Those of a pair are in two pictures, in either anywhere.
    """

    kinds: list[str]
    layouts: list[str]
    styles: list[str]
    shown: np.ndarray  # (N,)
    digits: np.ndarray  # (N, S) all different
    picks: np.ndarray  # (N, S) rows of the glyph bank
    colours: np.ndarray  # (N, S) all different, as the site names them
    upright: np.ndarray  # (N,) two digits stand one above the other
    target: np.ndarray  # (N,) the slot a question is about
    smaller: np.ndarray  # (N,) the order asked about
    centres: np.ndarray  # (N, S, 2) in [-1, 1], x before y
    sizes: np.ndarray  # (N, S) pixels of a glyph's side
    start: int = 0  # the first slot drawn

    @property
    def apart(self) -> np.ndarray:
        """Which rows are pairs."""
        return np.array([kind == "pair" for kind in self.kinds])


def plan_scenes(
    rng: np.random.Generator,
    count: int,
    glyphs: Glyphs,
    styles: Sequence[str],
    kinds: Sequence[str],
    layouts: Sequence[str] = ("taught",),
    even: bool = False,
) -> Plan:
    """What is in `count` scenes, and what is asked about them."""
    deck = _deck(layouts, kinds)
    layout, kind = zip(*(deck[i] for i in rng.permutation(count) % len(deck)), strict=True)
    style = [styles[i] for i in rng.permutation(count) % len(styles)]
    fewest, most = np.array([LAYOUTS[name].digits[asked] for name, asked in zip(layout, kind, strict=True)]).T
    shown = rng.integers(fewest, most + 1)
    slots = max(_TAUGHT_SLOTS, *(LAYOUTS[name].digits[asked][1] for name, asked in deck))  # others would draw anew
    keys = rng.random((count, 10))
    if even:
        if most.max() > 1:
            raise ValueError(
                f"dataset.even=true deals out single digits, but scenes have up to {most.max()}; set dataset.layouts "
                "(dataset.public_layouts) to [one], or dataset.even=false"
            )
        keys[np.arange(count), rng.permutation(count) % 10] = -1  # comes first, which is the one that is shown
    digits = keys.argsort(1)[:, :slots]
    order = np.argsort(glyphs.digits_N, kind="stable")
    many = np.bincount(glyphs.digits_N, minlength=10)
    picks = order[(np.cumsum(many) - many)[digits] + rng.integers(many[digits])]
    apart, only_larger = (np.isin(kind, names) for names in (["pair"], ["pair", "verify"]))
    upright = (rng.random(count) < 0.5) & ~apart
    centres, sizes = _places(rng, np.where(apart, 1, shown), upright, slots)
    return Plan(
        kinds=list(kind),
        layouts=list(layout),
        styles=style,
        shown=shown,
        digits=digits,
        picks=picks,
        colours=rng.random((count, len(COLOURS))).argsort(1)[:, :slots],
        upright=upright,
        target=rng.integers(shown),
        smaller=(rng.random(count) < 0.5) & ~only_larger,
        centres=centres * np.array([LAYOUTS[name].spread for name in layout])[:, None, None],
        sizes=sizes * np.array([LAYOUTS[name].zoom for name in layout])[:, None],
    )


def _deck(layouts: Sequence[str], kinds: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of layout and kind to deal out: every layout as often, and within it every kind that it can be asked."""
    asked = {name: [kind for kind in kinds if kind in LAYOUTS[name].digits] for name in layouts}
    if silent := [name for name in layouts if not asked[name]]:
        able = ", ".join(LAYOUTS[silent[0]].digits)
        raise ValueError(
            f"dataset.layouts has {silent[0]}, which can be asked {able}, but dataset.kinds has {', '.join(kinds)}; "
            "add a kind or leave the layout out"
        )
    turns = math.lcm(*map(len, asked.values()))
    return [(name, own[turn % len(own)]) for turn in range(turns) for name, own in asked.items()]


def _places(
    rng: np.random.Generator, shown: np.ndarray, upright: np.ndarray, slots: int
) -> tuple[np.ndarray, np.ndarray]:
    """Centres and sizes: one digit anywhere, two in a row or a column, three in cells of a 2x2 grid, more of a 3x2."""
    count, many = len(shown), shown > _TAUGHT_SLOTS
    order = rng.random((count, max(4, slots)))
    order[~many, 4:] = 1  # cells that a 2x2 grid does not have come last
    cells, wide = order.argsort(1)[:, :slots], np.where(many, 3, 2)[:, None]
    centres = np.stack([(cells % wide + 0.5) * 2 / wide - 1, cells // wide - 0.5], 2)
    pair, single = shown == 2, shown == 1
    row = np.zeros((slots, 2))
    row[:2, 0] = -0.5, 0.5
    centres[pair] = np.where(upright[pair, None, None], row[:, ::-1], row)
    centres[single] = 0
    free = single[:, None] | (pair[:, None] & (centres[:, :2] == 0).all(1))  # directions with room to spare
    jitter = np.where(single[:, None], 0.4, np.where(free, 0.2, 0.04))
    centres = centres + jitter[:, None, :] * rng.uniform(-1, 1, centres.shape)
    largest = np.where(many, 18, np.where(shown == 3, 23, np.where(pair & upright, 24, 29)))  # what fits its part
    return centres, rng.uniform(np.where(many, 15, 20)[:, None], largest[:, None], (count, slots))


def ask(plan: Plan, row: int) -> tuple[str, str]:
    """The question about a scene and its answer, both in the model's own words."""
    kind, target, digits = plan.kinds[row], plan.target[row], plan.digits[row]
    colour = list(COLOURS)[plan.colours[row, target]]
    sides = SIDES[2:] if plan.upright[row] else SIDES[:2]
    order = int(plan.smaller[row])
    question = QUESTIONS[kind].format(
        colour=colour,
        digit=digits[target],
        side=sides[target % 2],
        order=ORDERS[order],
        middle=MIDDLE,
        image=IMAGE_PLACE,
    )
    answer = {
        "colour": str(digits[target]),
        "compare": sides[int(digits[1] > digits[0]) ^ order],
        "count": str(plan.shown[row]),
        "name": colour,
        "place": str(digits[target]),
        "read": f"{digits[0]} {digits[1]}",
        "sum": str(digits[0] + digits[1]),
        "pair": sides[int(digits[1] > digits[0])],
        "verify": YES if digits[target] > MIDDLE else NO,
    }[kind]
    return question, answer


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
