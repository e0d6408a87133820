"""How likely the host's multimodal LLM holds each class name to be the answer: MLLM-FL's supervision of an alignment.

    s_c = log p(name_c | image, question) - log sum_c' p(name_c' | image, question)

p runs over all answer tokens of a name and the stop token, so that a name which another begins with is not favoured.
It is made once per open image and kept in a folder. An MLLM's labels are not the truth: `agreement` says how far off.
Source: MLLM-FL (arXiv 2409.06067) aligns on the server under an MLLM's supervision; that it is by scores of class names
is ours, not stated in the paper.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fedmm.edge.prepare import Processor, collate, content_of, encode, prepare
from fedmm.evaluate.answers import Answer
from fedmm.model import Model
from fedmm.stages.fingerprint import fingerprint, mend
from fedmm.storage import disk
from fedmm.types import IGNORE, Example

log = logging.getLogger("fedmm.stages")
MORE_OPEN = "raise dataset.public (of a dataset made from another, dataset.of.public)"


@torch.no_grad()
def class_scores(
    model: Model,
    processor: Processor,
    prompt: str,
    examples: Sequence[Example],
    names: Sequence[str],
    *,
    batch_size: int = 64,
    path: Path | None = None,
) -> Float[Tensor, "N C"]:
    """A row for each example, log-softmax over the names: `row.exp()` sums to 1. No adapters are in use.

    Every name is one more pass of prompt and name: N C rows through the LLM, `batch_size` at a time. With `path`, a
    folder, each image and question is scored once: a jsonl for each LLM and choice of names holds the log p(name), not
    normalised, and grows as it goes. Raises ValueError where the LLM cannot tell names apart, or has no word for one.
    """
    _can_be_told(processor, names)
    kept = _Kept(path, model, processor, prompt, names) if path else None
    keys = [(content_of(example.images), example.question) for example in examples]
    found: dict[tuple[str, str], list[float]] = dict(kept.rows) if kept else {}
    once = list(dict(zip(keys, examples, strict=True)).items())
    for start in range(0, len(once), step := max(1, batch_size // len(names))):  # the same bounds after a kill
        lacking = {key: example for key, example in once[start : start + step] if key not in found}
        if lacking:
            log_p_NC = _log_p(model, processor, prompt, list(lacking.values()), names, batch_size)
            new = dict(zip(lacking, log_p_NC.tolist(), strict=True))
            if kept:
                kept.append(new)
            found |= new
    return F.log_softmax(torch.tensor([found[key] for key in keys]).view(-1, len(names)), dim=-1)


def agreement(said: Sequence[str], truths: Sequence[str]) -> float:
    """The share of answers that are the truth, case and outer space ignored; of an MLLM's, its zero-shot accuracy.

    Raises ValueError without any.
    """
    if len(said) != len(truths) or not truths:
        raise ValueError(f"{len(said)} answers for {len(truths)} truths; wanted as many, and at least one")
    return sum(Answer("", *pair).right for pair in zip(said, truths, strict=True)) / len(truths)


def balanced_set(
    answers: Sequence[str], names: Sequence[str], per_class: int, held_out: int, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """Which open examples to tune on, and which others to stop by: `per_class` and `held_out` of each class, drawn
    without replacement, class by class.

    `answers` are the classes of all open examples; of one that is not among `names` none is taken. A class with fewer
    gives all it has, in the same shares, and a warning says how many. One with less than two raises ValueError.
    """
    wanted = per_class + held_out
    rows = {name: [i for i, answer in enumerate(answers) if answer == name] for name in names}
    if empty := [name for name, own in rows.items() if len(own) < 2]:
        raise ValueError(
            f"of {len(answers)} open examples fewer than two are of class {', '.join(empty)}; {MORE_OPEN}, or set "
            "align.labels to another source"
        )
    if short := {name: len(own) for name, own in rows.items() if len(own) < wanted}:
        log.warning("fewer than %d open examples of %d classes; all of them are taken: %s", wanted, len(short), short)
    chosen: tuple[list[int], list[int]] = [], []
    for own in rows.values():
        drawn = [own[i] for i in torch.randperm(len(own), generator=generator)[:wanted].tolist()]
        aside = min(len(drawn) - 1, max(1, len(drawn) * held_out // wanted))
        chosen[0].extend(drawn[aside:])
        chosen[1].extend(drawn[:aside])
    return chosen


def _log_p(
    model: Model, processor: Processor, prompt: str, examples: Sequence[Example], names: Sequence[str], batch_size: int
) -> Float[Tensor, "N C"]:
    """log p(name, stop | image, question), summed over tokens. An image is encoded once, its prompt read C times."""
    asked = [replace(example, answer=name) for example in examples for name in names]
    items = encode(model.edge, prepare(asked, processor, prompt))
    sums = []
    for start in range(0, len(items), batch_size):
        batch = collate(items[start : start + batch_size])
        logits_BAV = model(batch, use=()).cpu()
        answer_BA = batch.labels_BA != IGNORE
        chosen_BA1 = batch.labels_BA.masked_fill(~answer_BA, 0)[:, :, None]
        log_p_BA = F.log_softmax(logits_BAV.float(), dim=-1).gather(2, chosen_BA1)[:, :, 0]
        sums.append(log_p_BA.masked_fill(~answer_BA, 0).sum(1))
    return torch.cat(sums).view(len(examples), len(names))


def _can_be_told(processor: Processor, names: Sequence[str]) -> None:
    if len(names) < 2:
        raise ValueError(f"class names must be two or more, got {list(names)}")
    tokenizer = processor.tokenizer
    told: dict[tuple[int, ...], str] = {}
    for name, tokens in zip(names, tokenizer(list(names), add_special_tokens=False)["input_ids"], strict=True):
        if not tokens or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokens):
            raise ValueError(f"the LLM has no words for the class name {name!r}; name the class in words it knows")
        if (other := told.setdefault(tuple(tokens), name)) is not name or names.count(name) > 1:
            raise ValueError(f"the class names {other!r} and {name!r} are the same to the LLM; give each its own words")


class _Kept:
    """Scores in a file of their LLM and names; what a kill cut off at its end is taken out of it."""

    def __init__(self, folder: Path, model: Model, processor: Processor, prompt: str, names: Sequence[str]) -> None:
        about = json.dumps([fingerprint(model, processor, prompt), *names])
        self._file = folder / f"scores_{hashlib.sha256(about.encode()).hexdigest()[:16]}.jsonl"
        self._names = names
        with disk.named(folder, disk.HOME_KNOB):
            disk.make_folder(folder)
        lines = mend(self._file).split(b"\n") if self._file.exists() else []
        self.rows = dict(self._row(number, raw) for number, raw in enumerate(lines, 1) if raw.strip())

    def append(self, rows: dict[tuple[str, str], list[float]]) -> None:
        lines = [
            {"image": image, "question": question, "log_p": dict(zip(self._names, row, strict=True))}
            for (image, question), row in rows.items()
        ]
        with disk.named(self._file.parent, disk.HOME_KNOB):
            disk.append(self._file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())

    def _row(self, number: int, raw: bytes) -> tuple[tuple[str, str], list[float]]:
        try:
            line = json.loads(raw)
            row = [float(line["log_p"][name]) for name in self._names]
            return (str(line["image"]), str(line["question"])), row
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._file}, line {number} is no row of scores ({type(error).__name__}: {error}); wanted "
                '{"image": ..., "question": ..., "log_p": {<each class name>: <number>}}; delete the line, and it is '
                "made again"
            ) from error
