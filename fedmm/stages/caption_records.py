"""Captions as records: a line of a jsonl each, and which of them are worth training on."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedmm.stages.fingerprint import mend
from fedmm.storage import disk

_KEYS = ("image", "prompt", "text", "writer")
WANTED = '{"image": <content hash or example id>, "prompt": <as asked>, "text": <what was written>}'


@dataclass(frozen=True)
class Caption:
    """What one writer wrote about one image: `image` is `content_of`, `prompt` as it was asked."""

    image: str
    prompt: str
    text: str
    writer: str


def resume(path: Path) -> list[Caption]:
    """The captions of a file; what a kill cut off at its end is taken out of it."""
    if not path.exists():
        return []
    whole = mend(path)
    return [Caption(**{key: line[key] for key in _KEYS}) for _, line in lines_of(path, whole.split(b"\n"), _KEYS)]


def append(path: Path, captions: Sequence[Caption]) -> None:
    """Add lines to a file, which is made where there is none. Raises FedmmError where the disk takes no more."""
    lines = "".join(json.dumps(asdict(caption), ensure_ascii=False) + "\n" for caption in captions)
    with disk.named(path.parent, disk.HOME_KNOB):
        disk.make_folder(path.parent)
        disk.append(path, lines.encode())


def lines_of(path: Path, lines: Sequence[bytes], keys: Sequence[str]) -> Iterator[tuple[str, Mapping[str, str]]]:
    """The lines of a jsonl with where they stand. Raises ValueError for one without a string under each key."""
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        try:
            line = json.loads(raw)
        except ValueError as error:  # a UnicodeDecodeError is one too
            raise ValueError(f"{path}, line {number} is no JSON ({error}); wanted {WANTED}") from error
        lacking = [key for key in keys if not isinstance(line, dict) or not isinstance(line.get(key), str)]
        if lacking:
            raise ValueError(f"{path}, line {number} has no string {lacking[0]!r}; wanted {WANTED}")
        yield f"{path}, line {number}", line


def keep(
    captions: Sequence[Caption],
    *,
    min_words: int = 1,
    max_words: int = 60,
    repetition: float = 0.5,
    agree: Sequence[Sequence[str]] = (),
) -> tuple[list[Caption], dict[str, int]]:
    """The captions worth training on, and how many of the others for which reason, the first that held.

    `repetition` is the largest share of words, or of trigrams, that stood in the text before: a greedy LLM that has
    lost its thread repeats itself. `agree` are pairs of prompts, as they were asked, which want the same text of an
    image: where what is left of a writer's two differs, but for case, both go. Raises ValueError where nothing remains.
    """
    if odd := [pair for pair in agree if len(pair) != 2]:
        raise ValueError(f"captions.agree wants pairs of prompts, got {list(odd[0])}")
    reasons = Counter({"empty": 0, "short": 0, "long": 0, "repetitive": 0, "disagree": 0})
    left: list[Caption] = []
    for caption in captions:
        words = caption.text.casefold().split()
        if reason := _reason(words, min_words, max_words, repetition):
            reasons[reason] += 1
        else:
            left.append(caption)
    apart = _apart(left, agree)
    kept = [caption for caption in left if caption not in apart]
    reasons["disagree"] = len(left) - len(kept)
    if not kept:
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        raise ValueError(
            f"of {len(captions)} captions none is kept: {counts}; look at them in their jsonl, then change "
            f"captions.prompts or captions.writer, or loosen captions.min_words={min_words}, "
            f"captions.max_words={max_words}, captions.repetition={repetition:g}, "
            f"captions.agree={[list(pair) for pair in agree]}"
        )
    return kept, dict(reasons)


def _reason(words: Sequence[str], min_words: int, max_words: int, repetition: float) -> str | None:
    if not words:
        return "empty"
    if len(words) < min_words:
        return "short"
    if len(words) > max_words:
        return "long"
    return "repetitive" if max(_repeats(words, 1), _repeats(words, 3)) > repetition else None


def _repeats(words: Sequence[str], n: int) -> float:
    """The share of runs of n words that stood there before."""
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _apart(captions: Sequence[Caption], agree: Sequence[Sequence[str]]) -> set[Caption]:
    """The captions that another of the same image and writer contradicts."""
    by_image: dict[tuple[str, str], dict[str, Caption]] = defaultdict(dict)
    for caption in captions:
        by_image[caption.image, caption.writer][caption.prompt] = caption
    apart = set()
    for said in by_image.values():
        for one, other in agree:
            pair = [said[prompt] for prompt in (one, other) if prompt in said]
            if len({" ".join(caption.text.casefold().split()) for caption in pair}) > 1:
                apart |= set(pair)
    return apart
