"""What is in a scene, and what is asked about it: digits, colours, words, client sites, layouts, questions, answers.

A scene has one to three digits in different colours: two side by side or one above the other, or three in cells of a
2x2 grid. Other layouts crowd, overlap or shrink them. A plan holds many scenes as arrays. `fedmm.data.scenes` draws it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmm.data.glyphs import Glyphs
from fedmm.types import IMAGE_PLACE

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
                f"dataset.even=true needs scenes of one digit, but these have up to {most.max()}; set dataset.layouts "
                "and dataset.public_layouts to [one], or set dataset.even=false"
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
            f"dataset.layouts has {silent[0]}, whose questions are of the kinds {able}, but dataset.kinds has "
            f"{', '.join(kinds)}; add one of its kinds, or leave this layout out"
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
