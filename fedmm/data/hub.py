"""Datasets from the Hugging Face hub, or from folders of the same schema, as questions and answers.

    classification   one row: an image and a class          ->  Example(image, question, the class's name)
    questions        one row: images, a question, answers   ->  Example(images, question, the commonest answer)

Labels: `answer`; of a class `class`, its name, and `rank`, its place in the dataset's own order, which a long tail goes
by. Images are decoded when they are asked for, so that a split may be larger than memory.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fedmm.data.views import Rows, Some
from fedmm.types import IMAGE_PLACE, Example, ReadPath

if TYPE_CHECKING:
    from datasets import Dataset


# parameters: each is a setting of a yaml of conf/dataset/
def classification(
    *,
    path: ReadPath,  # as datasets.load_dataset takes it: owner/name on the hub, or a folder
    name: str | None = None,  # of the dataset's configuration, where it has several
    image: str = "img",  # the columns
    label: str = "label",
    splits: Mapping[str, str] | None = None,  # our names to the dataset's; None: train and test
    question: str = "what is in the image ?",
    public: int = 0,  # images of each class held out of train as open data
    validation: int = 0,  # images of each class held out of train, where the dataset has no such split
    ids: Mapping[str, ReadPath] | None = None,  # our split's name to a file of the images it has: lines `path label`
    seed: int = 0,  # of what is held out
) -> dict[str, Sequence[Example]]:
    """The splits of a dataset, with `public` (which may be empty) beside them.

    A split named in `ids` has the rows of that list only, and what is held out is then drawn from the rows of train's
    source that no list names. Raises ValueError where columns, splits, or listed images are not there.
    """
    splits = dict(splits or {"train": "train", "test": "test"})
    if (
        "train" not in splits
        or "public" in splits
        or (validation and "validation" in splits)
        or set(ids or ()) - {*splits}
    ):
        raise ValueError(
            f"dataset.splits={splits} must have train and must not have public; with a validation split set "
            f"dataset.validation={validation} to 0; dataset.ids={dict(ids or {})} may name only splits of "
            "dataset.splits"
        )
    sources = {theirs: _source(path, name, theirs, image, label, question) for theirs in dict.fromkeys(splits.values())}
    chosen: dict[str, list[int]] = {ours: list(range(len(sources[theirs]))) for ours, theirs in splits.items()}
    for ours, file in (ids or {}).items():
        chosen[ours] = _listed(sources[splits[ours]], Path(file), ours)
    pool = chosen["train"]
    if "train" in (ids or {}):
        named = {row for ours in ids or {} if splits[ours] == splits["train"] for row in chosen[ours]}
        pool = [row for row in range(len(sources[splits["train"]])) if row not in named]
    held = _hold_out(sources[splits["train"]], pool, {"public": public, "validation": validation}, seed)
    out = {row for rows in held.values() for row in rows}
    chosen["train"] = [row for row in chosen["train"] if row not in out]
    made: dict[str, Sequence[Example]] = {ours: Some(sources[splits[ours]], rows) for ours, rows in chosen.items()}
    return made | {
        ours: Some(sources[splits["train"]], rows) for ours, rows in held.items() if rows or ours == "public"
    }


def questions(
    *,
    path: ReadPath,  # as datasets.load_dataset takes it: owner/name on the hub, or a folder
    name: str | None = None,  # of the dataset's configuration, where it has several
    images: Sequence[str] = ("image",),  # the columns, in the order in which the question speaks of them
    question: str = "question",
    answer: str = "answer",  # a text, a class, or a list of what several people said, of which the commonest counts
    labels: Sequence[str] = (),  # columns that partitions may group by, beside the answer
    splits: Mapping[str, str] | None = None,  # our names to the dataset's; None: train, validation and test
) -> dict[str, Sequence[Example]]:
    """The splits of a dataset whose rows have their own questions.

    The first image stands where the prompt has it, further ones before the question where it does not say where.
    A folder may hold `train/metadata.jsonl` with lines `{"file_name": ..., "question": ..., "answer": ...}` beside its
    images, or parquet. Raises ValueError where columns or splits are not there, or where rows have no answer.
    """
    splits = splits or {split: split for split in ("train", "validation", "test")}
    columns = {"question": question, "answer": answer} | {f"labels[{i}]": column for i, column in enumerate(labels)}
    return {ours: _asked(path, name, theirs, tuple(images), columns) for ours, theirs in splits.items()}


@dataclass(frozen=True)
class _Asked(Rows):
    """A whole split of the dataset: its texts are in memory, its images are not."""

    split: str
    rows: Dataset  # the image columns alone
    images: Sequence[str]
    questions: Sequence[str]
    answers: Sequence[str]
    labels: Mapping[str, Sequence[object]]

    def __len__(self) -> int:
        return len(self.questions)

    def example(self, row: int) -> Example:
        labels = {"answer": self.answers[row], **{name: str(values[row]) for name, values in self.labels.items()}}
        images = _Images(self.rows, self.images, row)
        return Example(f"{self.split}/{row:07d}", images, self.questions[row], self.answers[row], labels)


@dataclass(frozen=True)
class _Source(Rows):
    """A whole split of the dataset: its classes are in memory, its images are not."""

    path: str
    split: str
    rows: Dataset  # the image column alone
    image: str
    classes: Sequence[int]
    names: Sequence[str]
    question: str

    def __len__(self) -> int:
        return len(self.classes)

    def example(self, row: int) -> Example:
        name = self.names[self.classes[row]]
        labels = {"class": name, "answer": name, "rank": str(self.classes[row])}
        return Example(f"{self.split}/{row:07d}", _Images(self.rows, [self.image], row), self.question, name, labels)

    def files(self) -> list[str | None]:
        """The name of each image's file, for which no image is read."""
        import pyarrow.compute as pc

        return list(pc.struct_field(self.rows.data.column(self.image), "path").to_pylist())


@dataclass(frozen=True)
class _Images(Sequence[Image.Image]):
    """The images of a row, decoded each time they are asked for; in colour, as ImageNet has grey ones too."""

    rows: Dataset
    columns: Sequence[str]
    row: int

    def __len__(self) -> int:
        return len(self.columns)

    def __getitem__(self, i: Any) -> Any:
        found = range(len(self))[i]
        if isinstance(found, range):
            return [self[k] for k in found]
        image: Image.Image = self.rows[self.row][self.columns[found]]
        return image if image.mode == "RGB" else image.convert("RGB")


def _source(path: str, name: str | None, split: str, image: str, label: str, question: str) -> _Source:
    import datasets

    rows = _rows(path, name, split, {"image": (image, datasets.Image), "label": (label, datasets.ClassLabel)})
    classes = list(rows[label][:])
    if unlabelled := sum(c is None or c < 0 for c in classes):
        raise ValueError(
            f"{path}: {unlabelled} of {len(classes)} examples in {split} have no label; choose another split in "
            "dataset.splits"
        )
    return _Source(path, split, rows.select_columns([image]), image, classes, rows.features[label].names, question)


def _asked(path: str, name: str | None, split: str, images: Sequence[str], columns: Mapping[str, str]) -> _Asked:
    import datasets

    wanted: dict[str, tuple[str, Any]] = {knob: (column, object) for knob, column in columns.items()}
    rows = _rows(path, name, split, wanted | {f"images[{i}]": (c, datasets.Image) for i, c in enumerate(images)})
    named = rows.features[columns["answer"]]
    asked, given = (list(rows[columns[knob]][:]) for knob in ("question", "answer"))
    more = f"{IMAGE_PLACE} " * (len(images) - 1)
    asked = [text if IMAGE_PLACE in text else more + text for text in asked]
    said = [named.int2str(a) if isinstance(named, datasets.ClassLabel) and a is not None else _said(a) for a in given]
    if unanswered := sum(not text for text in said):
        raise ValueError(
            f"{path}: {unanswered} of {len(said)} examples in {split} have no answer, as is usual in test splits; "
            "choose other splits, or slices of them such as validation[:50%]"
        )
    labels = {column: list(rows[column][:]) for knob, column in columns.items() if knob.startswith("labels")}
    return _Asked(split, rows.select_columns(list(images)), images, asked, said, labels)


def _said(answer: object) -> str:
    """What is counted as the answer; of several people's, each a text or with a text under `answer`, the commonest."""
    if isinstance(answer, dict):
        return _said(answer.get("answer"))
    if not isinstance(answer, list):
        return "" if answer is None else str(answer).strip()
    texts = Counter(map(_said, answer))
    return max(texts, key=lambda text: (bool(text), texts[text]), default="")


def _rows(path: str, name: str | None, split: str, wanted: Mapping[str, tuple[str, Any]]) -> Dataset:
    """A split with these columns of these kinds, by the setting that names each."""
    import datasets

    try:
        rows: Dataset = datasets.load_dataset(path, name, split=split)
    except ValueError as error:  # an unknown split or configuration: it lists those that there are
        raise ValueError(f"{path}: {error}; set dataset.splits or dataset.name") from error
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"{path} is neither a folder with data on this machine nor a dataset on the hub ({error}); "
                         "set its path, or FEDMM_DATA to the folder that contains it") from error  # fmt: skip
    has = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in rows.features.items())
    for knob, (column, kind) in wanted.items():
        if column not in rows.features or not isinstance(rows.features[column], kind):
            what = "has no such column" if column not in rows.features else f"has no {kind.__name__} in that column"
            raise ValueError(f"dataset.{knob}={column}: {path} {what}; set it to one of {has}")
    return rows


def _hold_out(source: _Source, pool: Iterable[int], each: Mapping[str, int], seed: int) -> dict[str, list[int]]:
    """Rows held out by name, so many of each class of the pool; the classes' draws do not depend on how many."""
    rng = np.random.default_rng(seed)
    members: dict[int, list[int]] = {c: [] for c in range(len(source.names))}
    for row in pool:
        members[source.classes[row]].append(row)
    held: dict[str, list[int]] = {name: [] for name in each}
    for c, rows in members.items():
        if rows and len(rows) < sum(each.values()):
            raise ValueError(
                f"{source.path} has {len(rows)} examples of {source.names[c]!r}, too few to hold out {dict(each)}; "
                "lower dataset.public or dataset.validation"
            )
        drawn = rng.permutation(rows).tolist()
        for name, count in each.items():
            held[name] += drawn[:count]
            drawn = drawn[count:]
    return {name: sorted(rows) for name, rows in held.items()}


def _listed(source: _Source, file: Path, ours: str) -> list[int]:
    """The rows whose files a list names, in its order. Raises ValueError where one is missing or of another class."""
    if not file.is_file():
        raise ValueError(f"dataset.ids.{ours}={file} is not a file; set it to the list's path, or set dataset.ids=null")
    files = source.files()
    if None in files:
        raise ValueError(f"dataset.ids needs file names, but images of {source.path} have none; set dataset.ids=null")
    rows = {_stem(str(name)): row for row, name in enumerate(files)}
    lines = [line for line in file.read_text().splitlines() if line.strip()]
    if wrong := [line for line in lines if not re.fullmatch(r"\s*\S.*\s\d+\s*", line)]:
        raise ValueError(f"{file} has the line {wrong[0]!r}; each line must be a file's path and its class number")
    asked = [line.rsplit(maxsplit=1) for line in lines]
    missing = [path for path, _ in asked if _stem(path) not in rows]
    if missing:
        raise ValueError(
            f"{file} names {len(missing)} of {len(asked)} images that are not in {source.split} of {source.path}, "
            f"first {missing[0]}; set dataset.splits.{ours} or dataset.ids.{ours}"
        )
    for path, c in asked:
        if source.classes[rows[_stem(path)]] != int(c):
            raise ValueError(
                f"{path} has class {c} in {file} and class {source.classes[rows[_stem(path)]]} in {source.path}; they "
                "number classes differently, so set dataset.ids=null"
            )
    return [rows[_stem(path)] for path, _ in asked]


def _stem(path: str) -> str:
    """A file's name without folder, suffix, and the synset that ImageNet's copy on the hub has behind it."""
    return re.sub(r"_n\d{8}$", "", PurePosixPath(path).stem)
