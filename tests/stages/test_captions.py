"""Captions: asked once, the same after a kill, dropped for the reason they say; and every writer writes its own."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from helpers import PROMPT, small_llava, some_examples

from fedmm.config.composition import compose, load, options
from fedmm.config.targets import make
from fedmm.data.scenes import scenes
from fedmm.edge import frozen_modules
from fedmm.edge.prepare import collate, content_of, encode, prepare
from fedmm.evaluate.answers import answers
from fedmm.llm import packing
from fedmm.llm.loading import TINY, twin
from fedmm.llm.loading import tiny as load_tiny
from fedmm.llm.local import LocalLLM
from fedmm.model import SplitModel
from fedmm.stages.caption_records import Caption, keep
from fedmm.stages.captions import Writer, by_host, hub, oracle, prepared, training, write
from fedmm.stages.fingerprint import fingerprint

PROMPTS = ["{question}", "what is the sum ?", "which digit is left ?"]


class Counter:
    """A writer's `say` that numbers no answer: it says what it was asked, and dies when it is asked too often."""

    def __init__(self, limit: int = 10**9) -> None:
        self.asked: list[tuple[str, str]] = []
        self.limit = limit

    def __call__(self, examples):
        if len(self.asked) + len(examples) > self.limit:
            raise KeyboardInterrupt
        self.asked += [(content_of(example.images), example.question) for example in examples]
        return [f"{example.question} of {content_of(example.images)[:4]}" for example in examples]


# --- asking ---------------------------------------------------------------------------------------------------------


def test_every_prompt_is_asked_of_every_image_once(tmp_path):
    examples = some_examples(3)
    twin_of_first = replace(examples[0], id="train/9")
    blind = replace(examples[1], id="train/10", images=())
    say = Counter()
    made = write([*examples, twin_of_first, blind], Writer("w", say), PROMPTS, tmp_path / "captions.jsonl", chunk=4)
    # the own questions of the second and third are among the other prompts
    wanted = [(content_of(e.images), p.replace("{question}", e.question)) for e in examples for p in PROMPTS]
    wanted = list(dict.fromkeys(wanted))
    assert len(wanted) == 7 and [(c.image, c.prompt) for c in made] == say.asked == wanted
    lines = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [Caption(**line) for line in lines] == made
    assert lines[0].keys() == {"image", "prompt", "text", "writer"}


@pytest.mark.parametrize("cut", [b"", b'{"image": "abc", "prompt": "w', b"{", b'{"image": "\xc3'])
def test_a_killed_run_goes_on_and_asks_nothing_twice(tmp_path, cut):
    examples = some_examples(5)
    straight = write(examples, Writer("w", Counter()), PROMPTS, tmp_path / "straight.jsonl", chunk=4)
    killed, path = Counter(limit=9), tmp_path / "killed.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write(examples, Writer("w", killed), PROMPTS, path, chunk=4)
    assert len(killed.asked) == 8
    path.write_bytes(path.read_bytes() + cut)
    again = Counter()
    assert write(examples, Writer("w", again), PROMPTS, path, chunk=4) == straight
    assert killed.asked + again.asked == [(caption.image, caption.prompt) for caption in straight]
    assert path.read_bytes() == (tmp_path / "straight.jsonl").read_bytes()
    none = Counter()
    assert write(examples, Writer("w", none), PROMPTS, path) == straight and not none.asked


def test_what_was_said_is_on_disk_before_more_is_asked(tmp_path):
    """A process that is killed outright closes no file."""
    path, there = tmp_path / "captions.jsonl", []

    def say(examples):
        there.append(len(path.read_text().splitlines()))
        return ["text"] * len(examples)

    write(some_examples(5), Writer("w", say), PROMPTS[1:], path, chunk=4)
    assert there == [0, 4, 8]


def test_another_writer_asks_anew_and_leaves_the_others_lines(tmp_path):
    examples, path = some_examples(2), tmp_path / "captions.jsonl"
    first = write(examples, Writer("first", Counter()), PROMPTS, path)
    second = write(examples, Writer("second", Counter()), PROMPTS[1:], path)
    assert {caption.writer for caption in second} == {"second"} and len(second) == 4
    silent = Counter()
    assert write(examples, Writer("first", silent), PROMPTS, path) == first and not silent.asked
    assert len(path.read_text().splitlines()) == len(first) + len(second)


def test_a_broken_line_within_is_named_and_nothing_is_lost(tmp_path):
    path = tmp_path / "captions.jsonl"
    write(some_examples(2), Writer("w", Counter()), PROMPTS, path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"captions.jsonl, line 2 is no JSON .*; wanted .*content hash"):
        write(some_examples(2), Writer("w", Counter()), PROMPTS, path)
    assert path.read_bytes() == before


def test_to_ask_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="captions.prompts is empty; give what to ask"):
        write(some_examples(1), Writer("w", Counter()), [], tmp_path / "captions.jsonl")


# --- keeping --------------------------------------------------------------------------------------------------------


def said(text: str, prompt: str = "p", image: str = "i", writer: str = "w") -> Caption:
    return Caption(image, prompt, text, writer)


def test_each_reason_drops_its_own():
    good = said("a red three stands above a blue seven")
    texts = ["  ", "one", "a b c d e f g h i j", "left left left", "x y z x y z x y z x"]
    kept, dropped = keep([good, *map(said, texts)], min_words=2, max_words=9, repetition=0.5)
    assert kept == [good] and dropped == {"empty": 1, "short": 1, "long": 2, "repetitive": 1, "disagree": 0}
    kept, dropped = keep([good, *map(said, texts)], min_words=1, max_words=10, repetition=0.5)
    assert kept == [good, said("one"), said("a b c d e f g h i j")] and dropped["repetitive"] == 2


def test_repetition_is_counted_in_words_and_in_trigrams():
    words, both = said("3 3"), said("a b c a b c")  # 1 of 2 words; 3 of 6 words and 1 of 4 trigrams
    assert keep([words, both], repetition=0.5)[0] == [words, both]
    assert keep([words, both, said("fine")], repetition=0.49)[0] == [said("fine")]
    # 15 words of which 7 stood there before, 46.7%; of 13 trigrams 6, 46.2%
    long = said("a b c d e f g h a b c d e f g".upper())
    assert keep([long], repetition=0.47)[0] == [long]
    with pytest.raises(ValueError, match="1 repetitive"):
        keep([long], repetition=0.46)


def test_texts_that_contradict_each_other_both_go():
    agreeing = [said("Seven", "left", "a"), said(" seven", "larger", "a")]
    apart = [said("seven", "left", "b"), said("one", "larger", "b")]
    alone = said("two", "left", "c")
    others = [said("two", "left", "d", "w1"), said("three", "larger", "d", "w2"), said("five", "name", "b")]
    everything = [*agreeing, *apart, alone, *others]
    kept, dropped = keep(everything, agree=[("left", "larger")])
    assert kept == [*agreeing, alone, *others] and dropped["disagree"] == 2
    assert keep(everything)[0] == everything
    with pytest.raises(ValueError, match=r"captions.agree wants pairs of prompts, got \['left'\]"):
        keep(everything, agree=[("left",)])


def test_where_nothing_remains_it_says_why_and_what_to_turn():
    with pytest.raises(
        ValueError, match=r"of 2 captions none is kept: 1 empty, 1 short, .*captions.prompts .*captions.min_words=2,"
    ):
        keep([said(""), said("one")], min_words=2)


# --- training -------------------------------------------------------------------------------------------------------


def test_training_asks_the_prompt_and_wants_the_text_of_its_own_image(tmp_path):
    examples = some_examples(3)
    made = write(examples, Writer("w", Counter()), PROMPTS, tmp_path / "captions.jsonl")
    trained = training(made[::-1], examples)
    assert [(content_of(e.images), e.question, e.answer) for e in trained] == [
        (c.image, c.prompt, c.text) for c in made[::-1]
    ]
    assert len({e.id for e in trained}) == len(trained)
    by_id = {e.id: e for e in trained}
    assert {e.id for e in training(made[:3], examples[:1])} <= by_id.keys()  # the same whoever else is there
    assert by_id[trained[0].id].labels == {"source": "train/2", "writer": "w"}
    other = [replace(caption, writer="v") for caption in made]
    assert len({e.id for e in training([*made, *other, *made], examples)}) == 2 * len(made)
    with pytest.raises(ValueError, match="is none of the 2 examples"):
        training(made, examples[:2])
    with pytest.raises(ValueError, match="train/0: two texts of w for"):
        training([made[0], replace(made[0], text="another")], examples)


# --- writers --------------------------------------------------------------------------------------------------------


def test_own_says_what_the_llm_generates_without_adapters(tiny, open_scenes):
    model, processor, prompt = tiny
    wanted = []
    for item in encode(model.edge, prepare(open_scenes, processor, prompt)):  # each alone; adapters not reset are zero
        tokens_1N = model.generate(collate([item], answers=False))
        wanted.append(processor.tokenizer.decode(tokens_1N[0], skip_special_tokens=True).strip())
    assert len(set(wanted)) > 3
    moved = copy.deepcopy(model.edge)
    with torch.no_grad():
        for parameter in moved.trainable("shared").values():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    tuned = replace(model, edge=moved)
    assert by_host(tuned, processor, prompt, batch_size=5).say(open_scenes) == wanted
    found = answers(tuned, encode(moved, prepare(open_scenes, processor, prompt)), processor.tokenizer)
    assert [answer.said for answer in found] != wanted


def test_a_name_changes_with_what_the_text_depends_on_and_with_nothing_else(llava, edge, processor, tmp_path):
    def name(model, prompt=PROMPT, processor=processor, **options):
        return by_host(model, processor, prompt, **options).name

    model = SplitModel(edge, LocalLLM(llava[0]))
    base = name(model)
    others = frozen_modules.build(frozen_modules.take(*llava), rank=2, sets=("shared", "local"))[0]
    assert base == name(SplitModel(others, LocalLLM(llava[0]))) == name(model, batch_size=3)
    inside = twin(llava[0])
    make(compose(["llm.where=client", "inner=lora"]).inner)(inside.model.language_model, ("shared",))
    adapted = frozen_modules.build(
        frozen_modules.take(*llava), decoder=inside.model.language_model, lora=frozen_modules.Lora(2), sets=("shared",)
    )[0]
    assert base == name(SplitModel(adapted, LocalLLM(inside, inner=adapted.inner)))
    assert base != name(model, max_tokens=9)
    assert base != name(model, "{question} <image>")
    for path in ("lm_head", "model.language_model.layers.0.mlp.up_proj"):
        changed = twin(llava[0])
        weight = changed.get_submodule(path).weight
        weight.data = weight.data + 1
        assert base != name(SplitModel(edge, LocalLLM(changed)))
    other = small_llava(tmp_path / "other", image_size=24)
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    bigger = frozen_modules.build(
        frozen_modules.take(LlavaForConditionalGeneration.from_pretrained(other), AutoProcessor.from_pretrained(other))
    )[1]
    assert base != name(model, processor=bigger)
    assert fingerprint(model, processor, PROMPT)[:16] in base


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return packing.unpack(TINY, tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture(scope="module")
def tiny():
    backbone = load_tiny(prompt="<image> {question}")
    edge, processor = frozen_modules.build(frozen_modules.take(backbone.model, backbone.processor))
    return SplitModel(edge, LocalLLM(backbone.model)), processor, backbone.prompt


@pytest.fixture(scope="module")
def open_scenes():
    return scenes(train=0, validation=0, test=0, public=12)["public"]


def test_a_model_of_a_hub_says_what_the_same_model_says_as_the_hosts_own(tiny, tiny_folder, open_scenes):
    """By a template and by a chat template, in batches of prompts of different lengths."""
    options = {"path": str(tiny_folder), "dtype": "float32", "device": "cpu", "max_tokens": 8}
    mine = by_host(*tiny).say(open_scenes)
    plain = hub(*tiny, template="<image> {question}", batch_size=5, **options)
    assert plain.say(open_scenes) == mine
    assert sum(a == e.answer for a, e in zip(mine, open_scenes, strict=True)) >= 9
    with pytest.raises(ValueError, match=r"has no chat template; set captions.writer.template"):
        hub(*tiny, **options)
    (tiny_folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% for c in m.content %}"
        "{{ '<image>' if c.type == 'image' else c.text }}{{ '' if loop.last else ' ' }}"
        "{% endfor %}{% endfor %}"
    )
    chat = hub(*tiny, batch_size=5, **options)
    assert chat.say(open_scenes) == mine
    assert chat.name != plain.name and chat.name != hub(*tiny, **options | {"max_tokens": 4}).name
    assert chat.name == hub(*tiny, batch_size=2, **options).name


def test_a_question_with_places_for_images_keeps_them(tiny, tiny_folder):
    """Two images, the second in the question: what the first test does not see. The chat's own order is looked at."""
    from fedmm.stages.captions import _content

    one, two = (example.images[0] for example in some_examples(2))
    example = replace(some_examples(1)[0], images=[one, two])
    kinds = [[part["type"] for part in _content(replace(example, question=q))] for q in ("<image> which ?", "which ?")]
    assert kinds == [["image", "image", "text"], ["image", "image", "text"]]
    content = _content(replace(example, question="the left , <image> which ?"))
    assert [part.get("text") or part["image"] for part in content] == [one, "the left ,", two, "which ?"]
    with pytest.raises(ValueError, match="train/0: 2 places for 1 images"):
        _content(replace(example, images=[one], question="<image> <image>"))


def test_prepared_texts_are_found_by_content_and_by_id(tiny, tmp_path):
    first, second, _ = some_examples(3)
    lines = [
        {"image": content_of(first.images), "prompt": "what is this ?", "text": "noise é", "cost": 3},
        {"image": second.id, "prompt": "what is this ?", "text": ""},
    ]
    for i, line in enumerate(lines):
        (tmp_path / f"{i}.jsonl").write_text(json.dumps(line) + "\n\n")
    writer = prepared(*tiny, folder=str(tmp_path))
    asked = [replace(example, question="what is this ?") for example in (second, first)]
    assert writer.say(asked) == ["", "noise é"]
    with pytest.raises(ValueError, match=r"no text of image .*example train/0.* 'what else ?.*; add a line"):
        writer.say([replace(first, question="what else ?")])
    (tmp_path / "2.jsonl").write_text(json.dumps(lines[1]))  # the same again
    assert prepared(*tiny, folder=str(tmp_path)).name == writer.name
    (tmp_path / "2.jsonl").write_text(json.dumps(lines[1] | {"text": "now"}))
    with pytest.raises(ValueError, match=r"2.jsonl, line 1 says 'now' where .*1.jsonl, line 1 says ''; leave one out"):
        prepared(*tiny, folder=str(tmp_path))
    (tmp_path / "1.jsonl").unlink()
    assert prepared(*tiny, folder=str(tmp_path)).name != writer.name


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nonsense", r"a.jsonl, line 2 is no JSON .*; wanted .*content hash or example id"),
        ('{"image": "a", "prompt": "b"}', r"a.jsonl, line 2 has no string 'text'; wanted"),
        ('{"image": 3, "prompt": "b", "text": "c"}', r"a.jsonl, line 2 has no string 'image'"),
        ("[1]", r"a.jsonl, line 2 has no string 'image'"),
    ],
)
def test_a_broken_prepared_line_names_file_and_line(tiny, tmp_path, line, says):
    (tmp_path / "a.jsonl").write_text('{"image": "a", "prompt": "b", "text": "c"}\n' + line + "\n")
    with pytest.raises(ValueError, match=says):
        prepared(*tiny, folder=str(tmp_path))


def test_a_folder_without_texts_is_named(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"captions.writer.folder=.* has no \*.jsonl; prepare texts there, a line"):
        prepared(*tiny, folder=str(tmp_path / "nowhere"))


def test_the_oracle_knows_its_own_answers_and_no_others(tiny, tmp_path):
    examples = some_examples(3)
    writer = oracle(*tiny)
    made = write(examples, writer, ["{question}"], tmp_path / "captions.jsonl")
    assert [(c.prompt, c.text, c.writer) for c in made] == [(e.question, e.answer, "oracle") for e in examples]
    with pytest.raises(ValueError, match="captions=oracle knows .* got 'red ?"):
        write(examples, writer, ["red ?"], tmp_path / "captions.jsonl")


# --- as configured --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", options("captions"))
def test_a_node_of_captions_gives_examples_to_train_on(name, tiny, tiny_folder, open_scenes, tmp_path):
    (tmp_path / "texts").mkdir()
    question = "what is the sum ?"
    lines = [{"image": e.id, "prompt": question, "text": "they are 9"} for e in open_scenes]
    (tmp_path / "texts" / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    extra = {
        "own": [],
        "oracle": [],
        "prepared": [f"captions.writer.folder={tmp_path / 'texts'}", f"captions.prompts=['{question}']"],
        "hub": [
            f"captions.writer.path={tiny_folder}", "captions.writer.dtype=float32", f"captions.prompts=['{question}']",
            "captions.writer.template='<image> {question}'", "captions.min_words=1",
        ],
    }  # fmt: skip
    cfg = load([f"captions={name}", *extra[name]])
    made = make(cfg.captions)(*tiny, open_scenes, tmp_path / "captions.jsonl")
    asked = len((tmp_path / "captions.jsonl").read_text().splitlines())
    assert asked == len(made.used) + sum(made.dropped.values()) and len(made.examples) == len(made.used) > 0
    assert {caption.writer.split(":")[0] for caption in made.used} == {name}
    if name == "own":
        own_words = {e.question: e.answer for e in open_scenes}
        assert asked > 80 and sum(own_words.get(e.question) == e.answer for e in made.examples) > 0
    else:
        assert made.dropped == {"empty": 0, "short": 0, "long": 0, "repetitive": 0, "disagree": 0}


def test_knobs_of_a_node_reach_the_filter(tiny, open_scenes, tmp_path):
    pair = ["which digit is on the left ?", "which digit is on the right ?"]  # never the same of two digits
    cfg = load(["captions=own", f"captions.prompts={pair}", f"captions.agree=[{pair}]"])
    path = tmp_path / "captions.jsonl"
    made = make(cfg.captions)(*tiny, open_scenes, path)
    assert made.dropped["disagree"] >= 12
    with pytest.raises(ValueError, match="24 short"):
        make(load(["captions=own", f"captions.prompts={pair}", "captions.min_words=2"]).captions)(
            *tiny, open_scenes, path
        )
