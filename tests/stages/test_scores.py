"""Class scores: those of a written-out loop, made once; and class-balanced sets of open examples."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import PROMPT, some_examples

from fedmm import seeds
from fedmm.edge import frozen_modules
from fedmm.edge.prepare import content_of
from fedmm.llm.local import LocalLLM
from fedmm.model import Model, SplitModel
from fedmm.stages import scores
from fedmm.stages.scores import agreement, balanced_set, class_scores

NAMES = ["one", "three one", "two", "red"]  # of one and of two tokens, "three one" ending as another is


@pytest.fixture
def model(edge, local_llm) -> Model:
    return SplitModel(edge, local_llm)


def written_out(llava, examples, names) -> torch.Tensor:
    """By transformers' own LLaVA, a row at a time and a token at a time; no batch, no padding, no edge."""
    llava, processor = llava
    rows = []
    for example in examples:
        row = []
        for name in names:
            said = processor.tokenizer(name, add_special_tokens=False)["input_ids"] + [processor.tokenizer.eos_token_id]
            text = PROMPT.format(question=example.question)
            inputs = processor(images=list(example.images), text=text, return_tensors="pt")
            log_p = 0.0
            for token in said:
                with torch.no_grad():
                    logits = llava(**inputs).logits[0, -1]
                log_p += F.log_softmax(logits, dim=-1)[token].item()
                inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], dim=1)
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            row.append(log_p)
        total = torch.tensor(row).logsumexp(0).item()
        rows.append([log_p - total for log_p in row])
    return torch.tensor(rows)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_are_those_of_a_written_out_loop(llava, model, processor, batch_size):
    examples = some_examples(3)
    made = class_scores(model, processor, PROMPT, examples, NAMES, batch_size=batch_size)
    assert torch.allclose(made, written_out(llava, examples, NAMES), atol=2e-5)
    assert torch.allclose(made.exp().sum(1), torch.ones(3))
    assert (made.max(1).values - made.min(1).values).min() > 0.5  # something is told apart


def test_no_adapter_acts_on_scores(llava, model, processor, local_llm):
    """The fixture's adapters have left their start, and answers do change with them."""
    examples = some_examples(2)
    plain = SplitModel(frozen_modules.build(frozen_modules.take(*llava), rank=2)[0], local_llm)
    assert class_scores(model, processor, PROMPT, examples, NAMES).equal(
        class_scores(plain, processor, PROMPT, examples, NAMES)
    )


class Counting(LocalLLM):
    """Raises when it has been asked for more than `limit` samples."""

    limit = 10**9

    def __call__(self, *args):
        if self.samples + len(args[2]) > self.limit:
            raise KeyboardInterrupt
        return super().__call__(*args)


def test_a_kept_score_is_not_made_again_and_a_killed_run_goes_on(llava, edge, processor, tmp_path):
    llm = Counting(llava[0])
    model = SplitModel(edge, llm)
    examples = some_examples(5)
    straight = class_scores(model, processor, PROMPT, examples, NAMES, batch_size=8)
    llm.samples, llm.limit = 0, 2 * len(NAMES)
    with pytest.raises(KeyboardInterrupt):
        class_scores(model, processor, PROMPT, examples, NAMES, batch_size=8, path=tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    assert len(file.read_text().splitlines()) == 2
    file.write_bytes(file.read_bytes() + b'{"image": "cut o')
    llm.samples, llm.limit = 0, 10**9
    twice = [*examples, examples[1]]
    resumed = class_scores(model, processor, PROMPT, twice, NAMES, batch_size=8, path=tmp_path)
    assert resumed[:5].equal(straight) and resumed[5].equal(straight[1])
    assert llm.samples == 3 * len(NAMES)
    assert class_scores(model, processor, PROMPT, twice, NAMES, path=tmp_path).equal(resumed)
    assert llm.samples == 3 * len(NAMES)


def test_another_question_prompt_or_choice_of_names_is_scored_anew(llava, edge, processor, tmp_path):
    llm = Counting(llava[0])
    model = SplitModel(edge, llm)
    example = some_examples(1)[0]
    changed = [
        (PROMPT, example, NAMES),
        (PROMPT, replace(example, question="what is the sum ?"), NAMES),
        ("{question} <image>", example, NAMES),
        (PROMPT, example, NAMES[::-1]),
    ]
    for prompt, one, names in changed:
        llm.samples = 0
        kept = class_scores(model, processor, prompt, [one], names, path=tmp_path)
        assert llm.samples == len(names)
        assert kept.equal(class_scores(model, processor, prompt, [one], names))
    assert len(list(tmp_path.glob("*.jsonl"))) == 3


def test_a_broken_line_of_kept_scores_is_named(model, processor, tmp_path):
    class_scores(model, processor, PROMPT, some_examples(2), NAMES, path=tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    file.write_text(file.read_text().replace('"red"', '"blue"', 1))
    with pytest.raises(ValueError, match=rf"{file.name}, line 1 is no row of scores \(KeyError: 'red'\); wanted"):
        class_scores(model, processor, PROMPT, some_examples(2), NAMES, path=tmp_path)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["one", "cat"], "no words for the class name 'cat'"),
        (["one", "two", "one"], "'one' and 'one' are the same"),
        (["one", " two", "two"], "' two' and 'two' are the same"),
        (["one"], "two or more, got ..one"),
        (["one", ""], "no words for the class name ''"),
    ],
)
def test_names_that_cannot_be_told_apart_are_refused(model, processor, names, says):
    with pytest.raises(ValueError, match=says):
        class_scores(model, processor, PROMPT, some_examples(1), names)


def test_without_examples_there_are_no_rows(model, processor):
    assert class_scores(model, processor, PROMPT, [], NAMES).shape == (0, 4)


def test_agreement_by_hand():
    assert agreement(["two", "one", "two", "one"], ["Two", "one ", "one", "seven"]) == 0.5
    with pytest.raises(ValueError, match="2 answers for 1 truths"):
        agreement(["one", "one"], ["one"])
    with pytest.raises(ValueError, match="0 answers for 0 truths; wanted as many, and at least one"):
        agreement([], [])


def test_a_balanced_set_holds_as_many_of_each_class(caplog):
    answers, names = ["a"] * 30 + ["b"] * 4 + ["c"] * 8 + ["other"], ["a", "b", "c"]
    with caplog.at_level(logging.WARNING, scores.log.name):
        chosen, held_out = balanced_set(answers, names, 5, 2, seeds.generator(0, "balanced"))
    assert [answers[i] for i in chosen] == ["a"] * 5 + ["b"] * 3 + ["c"] * 5
    assert [answers[i] for i in held_out] == ["a"] * 2 + ["b"] + ["c"] * 2
    assert len({*chosen, *held_out}) == len(chosen) + len(held_out)
    assert "fewer than 7 open examples of 1 classes; all of them are taken: {'b': 4}" in caplog.text
    assert (chosen, held_out) == balanced_set(answers, names, 5, 2, seeds.generator(0, "balanced"))
    assert (chosen, held_out) != balanced_set(answers, names, 5, 2, seeds.generator(1, "balanced"))


def test_a_balanced_set_says_what_it_lacks():
    with pytest.raises(ValueError, match=r"are of class b, d; raise dataset.public .*, or set align.labels"):
        balanced_set(["a", "a", "c", "c", "b"], ["a", "b", "c", "d"], 1, 1, seeds.generator(0, "balanced"))


def test_what_is_kept_can_be_read(model, processor, tmp_path):
    import json

    example = some_examples(1)[0]
    row = class_scores(model, processor, PROMPT, [example], NAMES, path=tmp_path)[0]
    (line,) = map(json.loads, next(tmp_path.glob("*.jsonl")).read_text().splitlines())
    assert line["image"] == content_of(example.images) and line["question"] == example.question
    log_p = torch.tensor([line["log_p"][name] for name in NAMES])
    assert log_p.exp().sum() < 0.99 and torch.allclose(F.log_softmax(log_p, dim=0), row)
