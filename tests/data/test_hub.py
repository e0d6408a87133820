"""Datasets from the hub: small ones of the same schemas, written to folders here; no network."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import PROMPT
from PIL import Image

from fedmm.config import composition, targets
from fedmm.data import hub, partition
from fedmm.data.hub import classification, questions
from fedmm.data.joined import joined
from fedmm.data.long_tail import long_tail
from fedmm.edge.prepare import prepare
from fedmm.flower.server_app import plan

NAMES = ["zebra", "ant", "moth"]  # not in the order of the alphabet
TRAIN = [i % 3 for i in range(36)]


def picture(row: int, test: bool = False) -> Image.Image:
    image = Image.fromarray(np.full((4, 4, 3), 5 * row + 100 * test, np.uint8))
    return image.convert("L") if row == 1 else image


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Columns as CIFAR-100 has them; an image's file is called as ImageNet's copy on the hub calls it."""
    import datasets

    features = datasets.Features(
        {"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=NAMES), "note": datasets.Value("string")}
    )
    path = tmp_path_factory.mktemp("hub")
    files = tmp_path_factory.mktemp("files")
    for split, classes in (("train", TRAIN), ("test", [0, 1, 2, 0, 1, 2])):
        (files / split).mkdir()
        named = []
        for row, c in enumerate(classes):
            named.append(str(files / split / f"n0000000{c}_{row}_n0000000{c}.png"))
            picture(row, split == "test").save(named[-1])
        columns = {"img": named, "fine_label": classes, "note": ["-"] * len(classes)}
        made = datasets.Dataset.from_dict(columns, features=features)
        made.to_parquet(str(path / f"{split}-00000-of-00001.parquet"))
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")


def loaded(folder: Path, **options):
    return classification(**{"path": str(folder), "label": "fine_label", **options})


def test_rows_become_questions(folder):
    made = loaded(folder, question="what is it ?")
    assert {split: len(part) for split, part in made.items()} == {"train": 36, "test": 6, "public": 0}
    example = made["train"][5]
    assert (example.id, example.question, example.answer) == ("train/0000005", "what is it ?", "moth")
    assert example.labels == {"class": "moth", "answer": "moth", "rank": "2"}
    (image,) = example.images
    assert np.asarray(image).tolist() == np.asarray(picture(5)).tolist()
    assert made["train"][1].images[0].mode == "RGB", "a grey one too"
    assert made["train"][-1].id == "train/0000035" and [e.id for e in made["test"][4:]] == [
        "test/0000004",
        "test/0000005",
    ]
    with pytest.raises(IndexError):
        made["test"][6]


def test_labels_are_read_without_an_image(folder, monkeypatch):
    """The shapes' checker looks at the images of every Example; so what is made here is not one."""
    monkeypatch.setattr(hub, "Example", lambda *args: SimpleNamespace(**dict(zip(FIELDS, args, strict=True))))
    monkeypatch.setattr(hub._Images, "__getitem__", lambda self, i: pytest.fail("an image was decoded"))
    made = long_tail(of=lambda: loaded(folder, public=2), by="rank", imbalance=4)
    assert Counter(e.labels["class"] for e in made["train"]) == {"zebra": 10, "ant": 5, "moth": 2}
    assert len(partition.equal(made["train"], 2, seeded(), by="class")) == 2
    with pytest.raises(pytest.fail.Exception, match="decoded"):
        made["train"][0].images[0]


FIELDS = ("id", "images", "question", "answer", "labels")


def seeded():
    import torch

    return torch.Generator().manual_seed(0)


def test_the_tail_goes_by_the_datasets_own_order(folder):
    made = long_tail(of=lambda: loaded(folder), by="rank", imbalance=12)
    assert Counter(e.answer for e in made["train"]) == {"zebra": 12, "ant": 3, "moth": 1}
    other = long_tail(of=lambda: loaded(folder), by="class", imbalance=12)
    assert Counter(e.answer for e in other["train"]) == {"ant": 12, "moth": 3, "zebra": 1}, "by name it would be this"


def test_what_is_held_out_is_nobodys_training_data_and_fixed_by_the_seed(folder):
    def ids(split: str, **options) -> list[str]:
        return [e.id for e in loaded(folder, **options)[split]]

    made = loaded(folder, public=2, validation=3)
    sets = {split: {e.id for e in made[split]} for split in ("train", "public", "validation")}
    assert {split: len(found) for split, found in sets.items()} == {"train": 21, "public": 6, "validation": 9}
    assert len(set.union(*sets.values())) == 36
    assert set(Counter(e.answer for e in made["public"]).values()) == {2}
    assert ids("public", public=2) == ids("public", public=2, validation=3) != ids("public", public=2, seed=1)
    with pytest.raises(
        ValueError, match=r"has 12 examples of 'zebra', too few to hold out .*'public': 13.*; lower dataset.public"
    ):
        loaded(folder, public=13)


def test_a_list_says_which_rows_there_are(folder, tmp_path):
    """As ImageNet-LT's: other folders and suffixes, in its own order; open data are what no list names."""
    lists = {"train": tmp_path / "train.txt", "validation": tmp_path / "val.txt"}
    lists["train"].write_text("train/n00000002/n00000002_5.JPEG 2\ntrain/n00000000/n00000000_0.JPEG 0\n")
    lists["validation"].write_text("train/n00000000/n00000000_3.JPEG 0\n")
    splits = {"train": "train", "validation": "train", "test": "test"}
    ids = {ours: str(file) for ours, file in lists.items()}
    made = loaded(folder, splits=splits, ids=ids, public=10)
    assert [e.id for e in made["train"]] == ["train/0000005", "train/0000000"]
    assert [e.id for e in made["validation"]] == ["train/0000003"] and len(made["test"]) == 6
    public = {e.id for e in made["public"]}
    assert len(public) == 30 and not public & {"train/0000000", "train/0000003", "train/0000005"}

    lists["train"].write_text("train/n00000002/n00000002_99.JPEG 2\n")
    with pytest.raises(ValueError, match=r"names 1 of 1 images that are not in train of .*n00000002_99.JPEG; set data"):
        loaded(folder, ids={"train": ids["train"]})
    lists["train"].write_text("train/n00000002/n00000002_5.JPEG 1\n")
    with pytest.raises(ValueError, match=r"has class 1 in .* and class 2 in .*; they number classes differently"):
        loaded(folder, ids={"train": ids["train"]})
    lists["train"].write_text("train/n00000002/n00000002_5.JPEG\n")
    with pytest.raises(
        ValueError, match=r"has the line 'train/n00000002/n00000002_5.JPEG'; each line must be a file's path and"
    ):
        loaded(folder, ids={"train": ids["train"]})
    with pytest.raises(ValueError, match=r"dataset.ids.train=nowhere.txt is not a file"):
        loaded(folder, ids={"train": "nowhere.txt"})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"label": "label"}, r"dataset.label=label: .* has no such column; set it to one of img \(Image\), fine_label"),
        ({"image": "note"}, r"dataset.image=note: .* has no Image in that column; set it to one of img \(Image\)"),
        ({"splits": {"train": "trian"}}, r"(?s)trian.*train.*set dataset.splits or dataset.name"),
        (
            {"path": "./nowhere"},
            r"(?s)\./nowhere is neither a folder with data on this machine nor a dataset on the hub .*; set its path",
        ),
        ({"splits": {"test": "test"}}, r"must have train"),
        ({"splits": {"train": "train", "validation": "test"}, "validation": 2}, r"set dataset.validation=2 to 0"),
        ({"ids": {"valid": "x"}}, r"dataset.ids=.*valid.* may name only splits"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(folder, options, says):
    with pytest.raises(ValueError, match=says):
        loaded(folder, **options)


# ---- questions, and several datasets as one -----------------------------------------------------------------------

ASKED = [("how many ?", "two"), ("is it red ?", "yes"), ("who is it ?", "nobody")]


def asked_folder(path: Path, splits: tuple[str, ...] = ("train", "validation", "test"), pair: bool = False) -> Path:
    """Images with metadata.jsonl beside them, as a site would lay them out; `pair`: two images a question."""
    columns = ("left_file_name", "right_file_name") if pair else ("file_name",)
    for split in splits:
        (path / split).mkdir(parents=True)
        lines = []
        for row, (question, answer) in enumerate(ASKED):
            files = {column: f"{row}_{i}.png" for i, column in enumerate(columns)}
            for i, file in enumerate(files.values()):
                picture(row + 10 * i, split == "test").save(path / split / file)
            lines.append(json.dumps({**files, "question": question, "answer": answer, "type": row % 2}))
        (path / split / "metadata.jsonl").write_text("\n".join(lines))
    return path


def test_rows_with_their_own_questions(tmp_path):
    made = questions(path=str(asked_folder(tmp_path / "vqa")), labels=["type"])
    assert {split: len(part) for split, part in made.items()} == {"train": 3, "validation": 3, "test": 3}
    example = made["train"][1]
    assert (example.question, example.answer, example.labels) == ("is it red ?", "yes", {"answer": "yes", "type": "1"})
    assert example.images[0].mode == "RGB" and example.images[0].getpixel((0, 0)) == (5, 5, 5)
    assert made["test"][-1].images[0].getpixel((0, 0)) == (110, 110, 110)
    two = questions(path=str(asked_folder(tmp_path / "pair", pair=True)), images=["left", "right"])["train"][0]
    assert two.question == "<image> how many ?", "the prompt has the first one's place"
    assert [image.getpixel((0, 0)) for image in two.images] == [(0, 0, 0), (50, 50, 50)]


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ([["a", "b", "b"]], "b"),
        ([["b", "a"]], "b"),  # a tie: who came first
        ([["", "", "a"]], "a"),
        ([[{"answer": "x", "sure": "no"}, {"answer": "y", "sure": "yes"}, {"answer": "y", "sure": "no"}]], "y"),
        ([0], "0"),
    ],
)
def test_of_several_answers_the_commonest_counts(tmp_path, said, answer):
    assert questions(path=str(told(tmp_path, said)), splits={"train": "train"})["train"][0].answer == answer


def told(path: Path, answers: list) -> Path:
    import datasets

    image = path / "image.png"
    picture(0).save(image)
    rows = datasets.Dataset.from_dict(
        {"image": [str(image)] * len(answers), "question": ["?"] * len(answers), "answer": answers}
    )
    rows.cast_column("image", datasets.Image()).to_parquet(str(path / "data" / "train-00000-of-00001.parquet"))
    return path / "data"


def test_rows_without_an_answer_are_refused_with_the_way_out(tmp_path):
    path = told(tmp_path, ["yes", None, " "])
    with pytest.raises(ValueError, match=r"2 of 3 examples in train have no answer.*validation\[:50%\]"):
        questions(path=str(path), splits={"train": "train"})
    assert len(questions(path=str(path), splits={"train": "train[:1]"})["train"]) == 1, "the way out"
    with pytest.raises(ValueError, match=r"dataset.question=asked: .* has no such column; set it to one of image \(Im"):
        questions(path=str(path), splits={"train": "train[:1]"}, question="asked")
    with pytest.raises(ValueError, match=r"dataset.images\[0\]=question: .* has no Image in that column"):
        questions(path=str(path), splits={"train": "train[:1]"}, images=["question"])


def test_joined_datasets_go_to_a_client_each(tmp_path):
    parts = {name: partial(questions, path=str(asked_folder(tmp_path / name))) for name in ("vizwiz", "aqua")}
    made = joined(of=parts)
    train = made["train"]
    assert [(e.id, e.labels["dataset"]) for e in train[2:4]] == [
        ("vizwiz/train/0000002", "vizwiz"),
        ("aqua/train/0000000", "aqua"),
    ]
    assert len(train) == 6 and train[-1].question == "who is it ?"
    for split in made.values():
        shares = partition.by_label(split, 2, seeded(), by="dataset")
        assert [{split[i].labels["dataset"] for i in part} for part in shares] == [{"aqua"}, {"vizwiz"}]
    with pytest.raises(IndexError):
        train[6]


def test_a_split_that_one_has_not_is_refused(tmp_path):
    one, other = asked_folder(tmp_path / "one"), asked_folder(tmp_path / "other", ("train", "test"))
    some = partial(questions, path=str(other), splits={"train": "train", "test": "test"})
    with pytest.raises(
        ValueError, match=r"validation is empty or missing in b, but other datasets have it; give dataset.of.b one"
    ):
        joined(of={"a": partial(questions, path=str(one)), "b": some})
    assert joined(of={"a": lambda: {**some(), "public": [1, 2]}, "b": some})["public"][:].indices == range(2)


@pytest.mark.parametrize(("name", "clients"), [("domain", 5), ("function", 6), ("scene", 6), ("task", 4)])
def test_feddats_benchmarks_load_from_folders(tmp_path, monkeypatch, processor, name, clients):
    monkeypatch.setenv("FEDMM_DATA", str(tmp_path))
    cfg = composition.load([f"scenario=feddat_{name}"])
    for dataset in cfg.dataset.of:
        asked_folder(tmp_path / dataset, pair=dataset == "nlvr2")
    made = targets.make(cfg.dataset)()
    assert cfg.clients == clients == len({example.labels["dataset"] for example in made["train"]})
    shares = targets.make(cfg.partition)(made["train"], clients, seeded())
    assert [len(part) for part in shares] == [len(ASKED)] * clients
    places = [len(prepare([made["train"][part[0]]], processor, PROMPT)) for part in shares]
    assert places == [1] * clients, "also two images are read by the prompt of all"


@pytest.mark.parametrize("name", ["domain", "function", "scene", "task"])
def test_the_papers_settings_leave_a_scenario_its_clients(name):
    cfg = composition.load(["experiment=feddat", f"scenario=feddat_{name}"])
    assert cfg.clients == len(cfg.dataset.of) and cfg.rounds == 30


def test_a_split_that_is_to_be_scored_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMM_DATA", str(tmp_path))
    for name in ("nlvr2", "snli_ve", "vcr", "vqa_v2"):
        asked_folder(tmp_path / name, ("train", "test"), pair=name == "nlvr2")
    parts = [
        f"++dataset.of.{name}.splits={{train: train, test: test}}" for name in ("nlvr2", "snli_ve", "vcr", "vqa_v2")
    ]
    asked = ["scenario=feddat_task", *parts, f"run.dir={tmp_path / 'run'}", "compare=[]"]
    plan(asked)
    with pytest.raises(ValueError, match=r"split=validation is empty or not there; the dataset has train, test"):
        plan([*asked, "evaluate.split=validation"])
