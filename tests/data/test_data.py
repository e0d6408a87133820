"""Scenes and partitions: the laws they promise."""

from __future__ import annotations

import decimal
import functools
import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

from fedmm.config.composition import load
from fedmm.data import glyphs, partition, scene_plans, scenes
from fedmm.data.long_tail import long_tail, long_tail_counts
from fedmm.federation import build
from fedmm.types import Example

CONF = ROOT / "conf"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labelled(*values: str) -> list[Example]:
    return [Example(f"train/{i}", (), "?", "!", {"kind": value}) for i, value in enumerate(values)]


def many(counts: dict[str, int]) -> list[Example]:
    return labelled(*(value for value, count in counts.items() for _ in range(count)))


# --- glyphs ---------------------------------------------------------------------------------------------------------


def test_splits_share_no_glyph_and_lose_none():
    ids = [set(glyphs.handwriting(split).ids_N.tolist()) for split in glyphs.SPLITS]
    assert not ids[0] & ids[1] and not ids[0] & ids[2] and not ids[1] & ids[2]
    assert ids[0] | ids[1] | ids[2] == set(range(1797))
    assert [round(len(part) / 1797, 1) for part in ids] == [0.6, 0.2, 0.2]


def test_every_split_has_every_digit():
    for split in glyphs.SPLITS:
        assert np.bincount(glyphs.handwriting(split).digits_N, minlength=10).min() >= 30


def test_handwriting_is_what_scikit_learn_says_it_is():
    """Cells of the upsampled glyph, averaged back, follow the original grey levels, and the digit is the original's."""
    from sklearn.datasets import load_digits

    made, bunch = glyphs.handwriting("validation"), load_digits()
    back = torch.nn.functional.avg_pool2d(made.pixels_NHW[:, None], 4)[:, 0].flatten(1)
    original = torch.from_numpy(bunch.images[made.ids_N]).float().flatten(1)
    assert (made.digits_N == bunch.target[made.ids_N]).all()
    together = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(back, original, strict=True)])
    assert together.min() > 0.95


def test_open_digits_are_even_bounded_and_a_function_of_the_generator():
    first, again, other = (glyphs.open_digits(200, seeded(seed)) for seed in (1, 1, 2))
    assert first.pixels_NHW.equal(again.pixels_NHW) and not first.pixels_NHW.equal(other.pixels_NHW)
    assert set(np.bincount(first.digits_N)) == {20}
    assert first.pixels_NHW.shape == (200, 32, 32) and first.pixels_NHW.min() >= 0 and first.pixels_NHW.max() <= 1
    assert first.pixels_NHW.mean((1, 2)).min() > 0.01  # none is blank


def test_open_digits_name_their_print_or_skeleton():
    """The id of a picture is a print or skeleton of that very digit."""
    made = glyphs.open_digits(300, seeded())
    sources = np.concatenate([glyphs._prints().digits_N, glyphs._beads()[1]])
    assert (sources[made.ids_N] == made.digits_N).all()


def test_unknown_split():
    with pytest.raises(ValueError, match="handwriting has no split 'tset'; take one of train, validation, test"):
        glyphs.handwriting("tset")


# --- scenes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> dict:
    return scenes.scenes(train=350, validation=140, test=140, public=140)


def test_examples_are_pictures_with_words(made):
    everything = [example for part in made.values() for example in part]
    assert len({example.id for example in everything}) == len(everything) == 770
    assert made["test"][3].id == "test/000003"
    for example in everything:
        (image,) = example.images
        assert image.size == (48, 48) and image.mode == "RGB"
        assert 1 <= len(example.answer.split()) <= 2
        assert example.labels["answer"] == example.answer and example.labels["kind"] in scene_plans.KINDS
        assert example.labels["digit"] in "0123456789"


def test_every_split_holds_every_kind_evenly(made):
    for part in made.values():
        counts = Counter(example.labels["kind"] for example in part)
        assert set(counts) == set(scene_plans.KINDS) and len(set(counts.values())) == 1


def test_same_seed_same_data_whatever_the_other_sizes():
    one = scenes.scenes(seed=3, train=40, validation=20, test=20, public=10)
    torch.manual_seed(99)
    np.random.seed(99)
    two = scenes.scenes(seed=3, train=40, validation=30, test=20, public=10)
    other = scenes.scenes(seed=4, train=40, validation=0, test=0)
    for split in ("train", "test", "public"):
        assert [e.question for e in one[split]] == [e.question for e in two[split]]
        assert [e.images[0].tobytes() for e in one[split]] == [e.images[0].tobytes() for e in two[split]]
    assert one["train"][0].images[0].tobytes() != other["train"][0].images[0].tobytes()


def test_clients_scenes_show_only_their_splits_glyphs(monkeypatch):
    """By identity: what is drawn for a split is looked up in that split's bank, and public scenes in none of them."""
    drawn = {}
    draw = scenes.draw

    def spy(rng, plan, bank):
        drawn[len(plan.kinds)] = bank
        return draw(rng, plan, bank)

    monkeypatch.setattr(scenes, "draw", spy)
    scenes.scenes(train=11, validation=12, test=13, public=14)
    for size, split in ((11, "train"), (12, "validation"), (13, "test")):
        assert drawn[size] is glyphs.handwriting(split)
    assert all(drawn[14] is not glyphs.handwriting(split) for split in glyphs.SPLITS)


def test_answers_follow_from_the_plan():
    """Worked by hand: 7 in red at the left, 2 in white at the right; red and white are palette words."""
    plan = scene_plans.plan_scenes(np.random.default_rng(0), 1, glyphs.handwriting("train"), ("plain",), ("sum",))
    plan.digits[0], plan.colours[0], plan.shown[0] = [7, 2, 9], [0, 5, 1], 2
    plan.upright[0], plan.target[0], plan.smaller[0] = False, 1, False
    expected = {
        "colour": ("which digit is white ?", "2"),
        "compare": ("which side is larger ?", "left"),
        "count": ("how many digits are there ?", "2"),
        "name": ("what colour is the 2 ?", "white"),
        "place": ("which digit is on the right ?", "2"),
        "read": ("read the digits ?", "7 2"),
        "sum": ("what is the sum ?", "9"),
    }
    for kind, pair in expected.items():
        plan.kinds[0] = kind
        assert scene_plans.ask(plan, 0) == pair
    plan.kinds[0], plan.upright[0], plan.smaller[0] = "compare", True, True
    assert scene_plans.ask(plan, 0) == ("which side is smaller ?", "bottom")


def test_left_is_left_top_is_top_and_colours_are_the_palettes():
    """The ink in the half of the picture that a question means has the colour the site shows for the word."""
    rng, bank = np.random.default_rng(1), glyphs.handwriting("train")
    for style in ("plain", "turku"):
        plan = scene_plans.plan_scenes(rng, 200, bank, (style,), ("place",))
        pictures = scenes.draw(rng, plan, bank).astype(float)
        shades = np.array(list(scene_plans.COLOURS.values()))
        for row, picture in enumerate(pictures):
            first = picture[:24] if plan.upright[row] else picture[:, :24]
            brightest = first.reshape(-1, 3)[first.reshape(-1, 3).max(1).argsort()[-20:]].mean(0)
            nearest = int(np.abs(shades - brightest).sum(1).argmin())
            assert nearest == scene_plans.SITES[style].palette[plan.colours[row, 0]]


def test_vocabularies_are_disjoint_and_complete():
    client_words = [word for words in scene_plans.VOCABULARIES.values() for word in words.values()]
    assert len(set(client_words)) == len(client_words)
    assert not set(client_words) & set(scene_plans.ASKED)
    for name, words in scene_plans.VOCABULARIES.items():
        assert name == "english" or set(words) <= set(scene_plans.ASKED)


def test_open_questions_hold_no_client_word(made):
    client_words = {word for words in scene_plans.VOCABULARIES.values() for word in words.values()}
    assert not client_words & {word for e in made["public"] for word in f"{e.question} {e.answer}".split()}
    assert client_words & {word for e in made["train"] for word in e.question.split()}
    assert not client_words & {word for e in made["train"] for word in e.answer.split()}


def test_vocabulary_overrides_the_sites():
    own = scenes.scenes(train=30, validation=0, test=0, vocabulary="english")["train"]
    other = scenes.scenes(train=30, validation=0, test=0)["train"]
    assert [scenes.translate(e.question, "finnish", scene_plans.KEPT) for e in own] == [e.question for e in other]
    assert [e.images[0].tobytes() for e in own] == [e.images[0].tobytes() for e in other]


def test_kept_words_are_kept_and_no_other():
    question = "which digit is on the left ?"
    assert scenes.translate(question, "german") == "welche ziffer ist auf die links ?"
    assert scenes.translate(question, "german", ("is", "digit")) == "welche digit is auf die links ?"
    asked = scenes.scenes(train=70, validation=0, test=0, kept=())["train"]
    assert {word for e in asked for word in e.question.split()} & set(scene_plans.ASKED) == {"?"}


def test_palettes_are_permutations():
    for site in scene_plans.SITES.values():
        assert sorted(site.palette) == list(range(len(scene_plans.COLOURS)))


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match=r"dataset.styles has atlantis; take some of plain, turku"):
        scenes.scenes(train=5, styles=("turku", "atlantis"))
    with pytest.raises(ValueError, match=r"dataset.kinds has nothing; take some of colour, compare"):
        scenes.scenes(train=5, kinds=())
    with pytest.raises(ValueError, match=r"dataset.kept has der; take some of"):
        scenes.scenes(train=5, kept=("der",))
    with pytest.raises(ValueError, match=r"dataset.vocabulary has klingon"):
        scenes.scenes(train=5, vocabulary="klingon")
    with pytest.raises(ValueError, match=r"dataset.layouts has heap; take some of taught, one"):
        scenes.scenes(train=5, layouts=("two", "heap"))
    with pytest.raises(ValueError, match=r"dataset.layouts has nothing"):
        scenes.scenes(train=5, layouts=())
    with pytest.raises(
        ValueError,
        match=r"has one, whose questions are of the kinds colour, name, verify, but dataset.kinds has sum; add",
    ):
        scenes.scenes(train=5, layouts=("two", "one"), kinds=("sum",))


@pytest.mark.parametrize(
    ("options", "digest", "light"),
    [
        ({}, "13b4ab234a6f93b8", 151_655_057),
        ({"styles": ("izmir", "lyon", "sevilla", "turku", "vienna")}, "90c470a4dc65b512", 167_019_390),
    ],
)
def test_the_default_data_stay_what_they_were(options, digest, light):
    """Results stand on them. Pixels are held by their sum: their last bits are the machine's."""
    made = scenes.scenes(train=300, validation=50, test=50, public=20, **options)
    asked = "".join(f"{e.id}|{e.question}|{e.answer}\n" for part in made.values() for e in part)
    assert hashlib.sha256(asked.encode()).hexdigest()[:16] == digest
    seen = sum(int(np.asarray(e.images[0], np.int64).sum()) for part in made.values() for e in part)
    assert seen == pytest.approx(light, rel=1e-5)


# --- layouts --------------------------------------------------------------------------------------------------------

FIVE = ("crowded", "one", "overlapping", "tiny", "two")


def planned(layout: str, count: int = 200) -> scene_plans.Plan:
    bank = glyphs.handwriting("train")
    return scene_plans.plan_scenes(np.random.default_rng(2), count, bank, ("plain",), scene_plans.KINDS, (layout,))


def test_layouts_and_their_kinds_come_in_even_shares():
    made = scenes.scenes(train=900, validation=0, test=0, layouts=FIVE, styles=("turku", "lyon"))["train"]
    assert set(Counter(e.labels["layout"] for e in made).values()) == {180}
    asked = Counter((e.labels["layout"], e.labels["kind"]) for e in made)
    for layout in FIVE:
        own = {kind: count for (name, kind), count in asked.items() if name == layout}
        assert (
            set(own) == set(scene_plans.LAYOUTS[layout].digits) & set(scene_plans.KINDS) and len(set(own.values())) == 1
        )
    sites = Counter((e.labels["layout"], e.labels["style"]) for e in made)
    assert min(sites.values()) > 60  # of 90: independent of the site


@pytest.mark.parametrize(("layout", "fewest", "most"), [("one", 1, 1), ("two", 2, 2), ("crowded", 4, 6)])
def test_a_layout_has_its_digits_all_different_and_within_the_picture(layout, fewest, most):
    plan = planned(layout)
    assert {fewest, most} <= set(plan.shown.tolist()) <= set(range(fewest, most + 1))
    for row, shown in enumerate(plan.shown):
        assert len(set(plan.digits[row, :shown])) == len(set(plan.colours[row, :shown])) == shown
        assert np.abs(plan.centres[row, :shown]).max() < 0.75
    if layout == "crowded":
        count = [row for row, kind in enumerate(plan.kinds) if kind == "count"]
        assert [scene_plans.ask(plan, row)[1] for row in count] == [str(plan.shown[row]) for row in count]
        first = plan.centres[:, :4]
        apart = np.abs(first[:, :, None] - first[:, None]).max(3) + 9 * np.eye(4)
        assert apart.min() > 0.5  # each in a cell of its own


def test_overlapping_digits_overlap_and_those_of_two_do_not():
    for layout, overlap in (("overlapping", True), ("two", False)):
        plan = planned(layout)
        gaps = np.abs(plan.centres[:, 0] - plan.centres[:, 1]).max(1) * scene_plans.SIDE / 2
        half = plan.sizes[:, :2].mean(1) * 0.7  # a digit fills about two thirds of its square's width
        assert (gaps < half).all() if overlap else (gaps > half).mean() > 0.95


def test_tiny_digits_have_a_third_of_the_ink():
    def ink(layout: str) -> float:
        pictures = scenes.draw(np.random.default_rng(0), planned(layout), glyphs.handwriting("train"))
        return float((pictures.max(-1) > 120).mean())

    assert 0.25 < ink("tiny") / ink("two") < 0.45


# --- tasks ----------------------------------------------------------------------------------------------------------


def test_every_kind_is_of_one_task_and_says_nothing_that_the_model_was_not_taught():
    assert set(scene_plans.TASKS) == set(scene_plans.QUESTIONS) >= set(scene_plans.KINDS)
    assert set(scene_plans.WORDS) == {
        word for kind in scene_plans.KINDS for word in scene_plans.QUESTIONS[kind].split() if "{" not in word
    }


def test_a_statement_holds_where_the_digit_of_that_colour_is_above_the_middle():
    made = scenes.scenes(train=300, validation=0, test=0, kinds=("verify",), vocabulary="english")["train"]
    plan = scene_plans.plan_scenes(
        np.random.default_rng([0, 0]), 300, glyphs.handwriting("train"), ("turku",), ("verify",)
    )
    for row, example in enumerate(made):
        _, _, colour, *rest = example.question.split()
        assert rest == ["digit", "larger", "4", "?"]
        meant = plan.digits[row, : plan.shown[row]][
            plan.colours[row, : plan.shown[row]] == [*scene_plans.COLOURS].index(colour)
        ]
        assert example.answer == ("1" if meant.item() in (5, 6, 7, 8, 9) else "0")
        assert example.labels["task"] == "entailment" and len(example.images) == 1
    assert 0.4 < sum(e.answer == "1" for e in made) / 300 < 0.6


def test_a_pair_is_two_pictures_of_a_digit_each_and_the_larger_ones_side_is_the_answer():
    """Each picture is told by the colour of its ink, as the site shows it: so neither can be the other's."""
    bank = glyphs.handwriting("train")
    made = scenes.scenes(train=200, validation=0, test=0, kinds=("pair",), styles=("plain",))["train"]
    plan = scene_plans.plan_scenes(np.random.default_rng([0, 0]), 200, bank, ("plain",), ("pair",))
    shades = np.array(list(scene_plans.COLOURS.values()))
    for row, example in enumerate(made):
        assert example.question == "<image> which side is larger ?" and example.labels["task"] == "pair"
        left, right = plan.digits[row, :2]
        assert example.answer == ("left" if left > right else "right")
        for slot, image in enumerate(example.images):
            pixels = np.asarray(image, float).reshape(-1, 3)
            ink = pixels[pixels.max(1).argsort()[-20:]].mean(0)
            assert np.abs(shades - ink).sum(1).argmin() == plan.colours[row, slot]
    assert 0.4 < sum(e.answer == "left" for e in made) / 200 < 0.6


def test_only_pairs_have_two_pictures_and_they_are_asked_for_by_name():
    made = scenes.scenes(train=60, validation=0, test=0, kinds=("pair", "read", "verify"))["train"]
    assert Counter((e.labels["kind"], len(e.images)) for e in made) == {
        ("pair", 2): 20,
        ("read", 1): 20,
        ("verify", 1): 20,
    }
    assert not {"pair", "verify"} & {e.labels["kind"] for e in scenes.scenes(train=60, validation=0, test=0)["train"]}


def test_the_default_data_are_made_in_a_moment():
    for split in glyphs.SPLITS:
        glyphs.handwriting(split)  # scikit-learn's import is not ours to hurry
    started = time.process_time()
    scenes.scenes()
    assert time.process_time() - started < 3  # 0.6 s on one core


# --- partitions -----------------------------------------------------------------------------------------------------

ALL = {
    "iid": partition.iid,
    "dirichlet": partition.dirichlet,
    "by_label": lambda *args: partition.by_label(*args, by="kind", share=True),
    "equal": lambda *args: partition.equal(*args, by="kind"),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("clients", [1, 3, 5, 9])
def test_every_index_once_and_every_client_served(name, clients):
    examples = many({"a": 120, "b": 90, "c": 100, "d": 110})
    parts = ALL[name](examples, clients, seeded())
    dealt = [index for part in parts for index in part]
    assert len(parts) == clients and all(parts)
    assert sorted(dealt) == list(range(len(examples)))


@pytest.mark.parametrize("name", ALL)
def test_only_the_given_generator_matters(name):
    examples = many({"a": 60, "b": 50, "c": 40})
    first = ALL[name](examples, 3, seeded(5))
    torch.manual_seed(1)
    np.random.seed(1)
    assert ALL[name](examples, 3, seeded(5)) == first
    assert ALL[name](examples, 3, seeded(6)) != first


@pytest.mark.parametrize("name", ["dirichlet", "equal"])
def test_splits_follow_one_law(name):
    """Equal seeds, other sizes: a client's mix of labels is the same to rounding; with another seed it is not."""
    sizes = ({"a": 3000, "b": 3000, "c": 3000}, {"a": 300, "b": 300, "c": 300})
    large, small = (_mix(ALL[name](many(size), 4, seeded(3)), many(size)) for size in sizes)
    other = _mix(ALL[name](many(sizes[1]), 4, seeded(5)), many(sizes[1]))
    assert np.abs(large - small).max() < 0.05
    assert np.abs(large - other).max() > 0.2


@pytest.mark.parametrize("name", ["dirichlet", "by_label", "equal"])
def test_a_client_is_tested_on_what_it_trained_on_where_a_split_lacks_a_value(name):
    """Drawn by the split's own values, the law of c would fall to b's clients and d's to c's."""
    own = {"dirichlet": {"alpha": 0.05}, "by_label": {}, "equal": {}}
    deal = functools.partial(getattr(partition, name), by="kind", **own[name])
    train, test = many({"a": 900, "b": 900, "c": 900, "d": 900}), many({"a": 300, "c": 300, "d": 300, "unseen": 30})

    def shares(examples: list[Example]) -> np.ndarray:
        parts = deal(examples, 4, seeded(3), trained=train)
        assert sorted(i for part in parts for i in part) == list(range(len(examples)))
        rows = [Counter(examples[i].labels["kind"] for i in part) for part in parts]
        return np.array([[row[value] / 900 for value in "acd"] for row in rows])

    if name == "by_label":
        with pytest.raises(ValueError, match="1 would have none"):  # b's client has nothing to be tested on
            shares(test)
        train = [example for example in train if example.labels["kind"] != "b"]
        deal = functools.partial(deal, share=True)
    for held, tested in zip(shares(train).T, 3 * shares(test).T, strict=True):
        assert held.argmax() == tested.argmax()
        assert name == "equal" or np.abs(held - tested).max() < 0.08


@pytest.mark.parametrize("asked", ["scenario=dirichlet partition=equal", "scenario=domain", "scenario=dirichlet"])
def test_a_split_is_dealt_out_where_nobody_trains(asked):
    """By its own values then."""
    cfg = load([*asked.split(), "rounds=0", "dataset.train=0", "dataset.test=200", "clients=3"])
    parts = build.partition(cfg, "test")
    assert sorted(i for part in parts for i in part) == list(range(200)) and all(parts)


def _mix(parts: list[list[int]], examples: list[Example]) -> np.ndarray:
    rows = [Counter(examples[i].labels["kind"] for i in part) for part in parts]
    return np.array([[row[value] / sum(row.values()) for value in "abc"] for row in rows])


def test_iid_is_even():
    assert sorted(map(len, partition.iid(many({"a": 11}), 4, seeded()))) == [2, 3, 3, 3]


def test_dirichlet_steals_from_the_largest_for_the_smallest():
    examples = many({"a": 200, "b": 200})
    bare = partition.dirichlet(examples, 8, seeded(2), alpha=0.05, min_examples=1)
    parts = partition.dirichlet(examples, 8, seeded(2), alpha=0.05, min_examples=20)
    assert min(map(len, bare)) < 20 <= min(map(len, parts))
    largest = max(range(8), key=lambda k: len(bare[k]))
    assert set(parts[largest]) < set(bare[largest])


def test_dirichlet_approaches_iid_with_alpha():
    examples = many({"a": 1000, "b": 1000})
    even = _mix(partition.dirichlet(examples, 4, seeded(), alpha=1e4), examples)[:, :2]
    skewed = _mix(partition.dirichlet(examples, 4, seeded(), alpha=0.1), examples)[:, :2]
    assert np.abs(even - 0.5).max() < 0.03 < 0.3 < np.abs(skewed - 0.5).max()


def test_by_label_gives_one_value_a_client_doubles_up_and_where_asked_goes_round():
    examples = many({"a": 10, "b": 20, "c": 30})

    def held(clients: int, **options) -> list[list[str]]:
        parts = partition.by_label(examples, clients, seeded(), by="kind", **options)
        return [sorted({examples[i].labels["kind"] for i in part}) for part in parts]

    assert held(3) == [["a"], ["b"], ["c"]]
    assert held(2) == [["a", "c"], ["b"]]
    assert held(5, share=True) == [["a"], ["b"], ["c"], ["a"], ["b"]]
    shared = partition.by_label(examples, 5, seeded(), by="kind", share=True)
    assert [len(part) for part in shared] == [5, 10, 30, 5, 10]


def test_more_clients_than_values_are_refused_with_the_knobs():
    """One value for several clients would be iid under another name."""
    says = r"partition.by=kind gives each client one value, but the dataset has 2 \(a, b\) for clients=3"
    with pytest.raises(ValueError, match=says):
        partition.by_label(many({"a": 9, "b": 9}), 3, seeded(), by="kind")
    with pytest.raises(
        ValueError,
        match=r"partition.by=style gives each client one value, but the dataset has 1 \(turku\) for clients=2",
    ):
        partition.by_label(scenes.scenes(train=9, validation=0, test=0)["train"], 2, seeded())


@pytest.mark.parametrize("alpha", [0.1, 0.5, None])
def test_equal_clients_are_equal_and_use_everything_up(alpha):
    examples = many({"0": 90, "2": 30, "10": 11})
    parts = partition.equal(examples, 4, seeded(), by="kind", alpha=alpha)
    assert sorted(map(len, parts)) == [32, 33, 33, 33]
    assert sorted(index for part in parts for index in part) == list(range(131))
    if alpha is None:
        mix = [Counter(examples[i].labels["kind"] for i in part) for part in parts]
        assert all(22 <= row["0"] <= 23 and 7 <= row["2"] <= 8 and 2 <= row["10"] <= 4 for row in mix)


def test_a_client_without_a_share_of_a_rare_class_gets_none_of_it():
    """Ten examples at two of twenty clients: whole numbers must not spread them over whoever has room."""
    mix = np.ones((20, 3))
    mix[:, 2] = 0
    mix[3:5] = [0.1, 0.1, 0.8]
    shares = partition._even(mix, [500, 140, 10])
    assert shares.sum(0).tolist() == [500, 140, 10] and set(shares.sum(1)) == {32, 33}
    assert shares[3:5, 2].tolist() == [5, 5]


def test_a_balanced_test_split_beside_a_long_tail_follows_the_same_law():
    """Its shares cannot be the train split's; whoever has more of a class there than others has more of it here."""
    counts = dict(zip("abcdefghij", long_tail_counts(10, 500, 10), strict=True))
    kinds, mixes = list(counts), []
    for split in (counts, dict.fromkeys(counts, 100)):
        examples = many(split)
        parts = partition.equal(examples, 20, seeded(3), by="kind")
        assert len({len(part) for part in parts}) <= 2 and sum(map(len, parts)) == len(examples)
        rows = [Counter(examples[i].labels["kind"] for i in part) for part in parts]
        mixes.append(np.array([[row[kind] / split[kind] for kind in kinds] for row in rows]))
    assert np.corrcoef(mixes[0].ravel(), mixes[1].ravel())[0, 1] > 0.8
    other = partition.equal(many(dict.fromkeys(counts, 100)), 20, seeded(4), by="kind")
    rows = [Counter(kinds[i // 100] for i in part) for part in other]
    mixes.append(np.array([[row[kind] / 100 for kind in kinds] for row in rows]))
    assert np.corrcoef(mixes[0].ravel(), mixes[2].ravel())[0, 1] < 0.3


def test_too_few_examples_are_reported_with_the_knob():
    few = many({"a": 3})
    enough = (
        "partition=iid needs at least one example per client, but with 3 examples and clients=5.*or raise dataset.train"
    )
    with pytest.raises(ValueError, match=enough):
        partition.iid(few, 5, seeded())
    with pytest.raises(ValueError, match="partition=by_label needs at least one example per client"):
        partition.by_label(few, 5, seeded(), by="kind", share=True)
    with pytest.raises(ValueError, match="needs 8 examples for each of 5 clients, but the dataset has 3"):
        partition.dirichlet(few, 5, seeded())
    with pytest.raises(ValueError, match=r"groups by 'style', but example train/0 has only kind; set partition.by"):
        partition.by_label(few, 2, seeded(), by="style")
    with pytest.raises(ValueError, match=r"partition=equal has alpha=-1; set partition.alpha above 0 or to null"):
        partition.equal(few, 2, seeded(), by="kind", alpha=-1)
    with pytest.raises(ValueError, match=r"alpha=0; set partition.alpha above 0"):
        partition.dirichlet(few, 2, seeded(), alpha=0)


# --- long tails -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("imbalance", [10, 50, 100, 12.5])
@pytest.mark.parametrize(("classes", "largest"), [(10, 5000), (100, 500), (3, 100), (1000, 1280)])
def test_counts_are_the_formulas_to_the_last_whole_number(classes, largest, imbalance):
    """Against decimals of 60 digits, and at the ends against the division itself."""
    counts = long_tail_counts(classes, largest, imbalance)
    with decimal.localcontext(prec=60):
        share = decimal.Decimal(str(imbalance))
        exact = [largest * share ** (decimal.Decimal(-c) / (classes - 1)) for c in range(classes)]
        assert counts == [int(x + decimal.Decimal("1e-40")) for x in exact]
    assert counts[0] == largest and counts[-1] == int(largest / imbalance)


def test_counts_by_hand():
    assert long_tail_counts(3, 100, 100) == [100, 10, 1]
    assert long_tail_counts(10, 5000, 100)[:3] == [5000, 2997, 1796]  # CIFAR-10-LT's published counts
    assert long_tail_counts(10, 500, 10)[-1] == 50 and long_tail_counts(1, 40, 50) == [40]
    assert long_tail_counts(7, 320, 64) == [320, 160, 80, 40, 20, 10, 5]
    assert int(320 * 64 ** (-5 / 6)) == 9, "what a float makes of the 10"


def tailed(counts: dict[str, int], **options) -> dict:
    test = many({"0": 5, "2": 5, "10": 5})
    return long_tail(of=lambda: {"train": many(counts), "test": test, "public": ()}, by="kind", **options)


def test_only_train_is_thinned_and_the_head_is_the_smallest_number():
    made = tailed({"10": 95, "2": 90, "0": 100}, imbalance=9)
    assert Counter(e.labels["kind"] for e in made["train"]) == {"0": 90, "2": 30, "10": 10}
    assert len(made["test"]) == 15 and made["public"] == ()
    assert Counter(e.labels["kind"] for e in tailed({"10": 9, "2": 30, "0": 80}, imbalance=9, largest=80)["train"]) == {
        "0": 80, "2": 26, "10": 8,
    }  # fmt: skip


def test_which_ones_stay_is_the_seeds_and_a_longer_tail_keeps_some_of_the_same():
    def ids(seed: int, imbalance: float) -> set[str]:
        return {e.id for e in tailed({"0": 60, "2": 60, "10": 60}, imbalance=imbalance, seed=seed)["train"]}

    assert ids(0, 9) == ids(0, 9) != ids(1, 9)
    assert ids(0, 36) < ids(0, 4)


def test_a_tail_that_cannot_be_is_refused_with_the_knob():
    says = (
        r"leaves no example with kind '10' in train: the commonest value has 5, .* less than one; lower dataset.imbal"
    )
    with pytest.raises(ValueError, match=says):
        tailed({"10": 9, "2": 30, "0": 80}, imbalance=9, largest=5)
    says = r"needs 26 examples with kind '2' in train, but there are 20; lower dataset.largest=80, set it to null"
    with pytest.raises(ValueError, match=says):
        tailed({"10": 9, "2": 20, "0": 80}, imbalance=9, largest=80)
    with pytest.raises(ValueError, match=r"imbalance=0.5, .*set dataset.imbalance to 1 or more"):
        tailed({"0": 9}, imbalance=0.5)
    with pytest.raises(ValueError, match=r"largest=0 and 9 examples.*dataset.largest to null or to 1 or more"):
        tailed({"0": 9}, imbalance=2, largest=0)
    with pytest.raises(ValueError, match=r"long_tail groups by 'class', but .* has only kind; set dataset.by to"):
        long_tail(of=lambda: {"train": many({"0": 9})}, imbalance=2)


def test_a_tail_asks_for_no_image():
    class Unseen(Sequence):
        def __len__(self):
            return 1

        def __getitem__(self, i):
            assert not forbidden, "an image was decoded"
            return Image.new("RGB", (1, 1))

    forbidden = False  # the shapes' checker looks at what examples are made of
    examples = [replace(e, images=Unseen()) for e in many({"0": 12, "1": 12})]
    forbidden = True
    made = long_tail(of=lambda: {"train": examples}, imbalance=4, by="kind")["train"]
    assert len(made) == 15 and [e.labels["kind"] for e in made[:2]] == ["0", "0"]
    assert len(partition.equal(made, 3, seeded(), by="kind")) == 3


def test_digits_in_even_shares_are_digits_the_question_is_about():
    options = {"kinds": ("colour",), "layouts": ("one",), "even": True, "vocabulary": "english", "styles": ("plain",)}
    made = scenes.scenes(train=200, validation=0, test=100, public=50, public_layouts=("one",), **options)
    for split, each in (("train", 20), ("test", 10), ("public", 5)):
        assert Counter(e.answer for e in made[split]) == {str(digit): each for digit in range(10)}
        assert all(e.labels["digit"] == e.answer and e.labels["layout"] == "one" for e in made[split])
    with pytest.raises(ValueError, match=r"dataset.even=true needs scenes of one digit, but these have up to 3; set"):
        scenes.scenes(train=5, even=True)


def test_public_scenes_may_be_asked_and_laid_out_apart():
    made = scenes.scenes(train=10, validation=0, test=0, public=30, public_kinds=("name",), public_layouts=("one",))
    assert {(e.labels["kind"], e.labels["layout"]) for e in made["public"]} == {("name", "one")}
    same = scenes.scenes(train=10, validation=0, test=0, public=30)
    assert [e.images[0].tobytes() for e in made["train"]] == [e.images[0].tobytes() for e in same["train"]]


def test_public_digits_are_drawn_with_a_pen_as_often_as_asked(monkeypatch):
    shares = []
    monkeypatch.setattr(
        scenes, "open_digits", lambda *a, pen, **k: shares.append(pen) or glyphs.open_digits(*a, pen=pen, **k)
    )
    options = {"train": 10, "validation": 0, "test": 0, "public": 30}
    pen, prints = scenes.scenes(**options), scenes.scenes(**options, public_pen=0.0)
    assert shares == [0.6, 0.0]
    assert [e.images[0].tobytes() for e in pen["train"]] == [e.images[0].tobytes() for e in prints["train"]]
    assert [e.images[0].tobytes() for e in pen["public"]] != [e.images[0].tobytes() for e in prints["public"]]


# --- the yaml of both groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((CONF / "dataset").glob("scenes*.yaml")), ids=lambda path: path.stem)
def test_every_scenes_yaml_makes_data(path):
    hydra, omegaconf = pytest.importorskip("hydra"), pytest.importorskip("omegaconf")
    dataset = hydra.utils.instantiate(omegaconf.OmegaConf.load(path), _convert_="all")
    data = dataset(train=90, validation=90, test=90)
    assert {example.labels["kind"] for example in data["train"]} == set(dataset.keywords["kinds"])


@pytest.mark.parametrize("path", sorted((CONF / "partition").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_partition_yaml_deals_out_the_sites(path):
    hydra, omegaconf = pytest.importorskip("hydra"), pytest.importorskip("omegaconf")
    styles = ("turku", "lyon", "izmir", "vienna", "sevilla")
    made = scenes.scenes(train=700, validation=0, test=0, styles=styles, layouts=FIVE)["train"]
    examples = [replace(e, labels={**e.labels, "dataset": e.labels["style"]}) for e in made]
    deal = hydra.utils.instantiate(omegaconf.OmegaConf.load(path))
    parts = deal(examples, 5, seeded())
    dealt = [index for part in parts for index in part]
    assert len(parts) == 5 and all(parts) and len(set(dealt)) == len(dealt)
