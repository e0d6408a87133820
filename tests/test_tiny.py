"""The shipped model: loads as any LLaVA, reads what its card says, and knows no client's word."""

from __future__ import annotations

import importlib.util
import json
import re

import numpy as np
import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file, save_file

from fedmm.data import glyphs, scene_plans, scenes
from fedmm.llm import packing

TINY = ROOT / "fedmm" / "assets" / "tiny_llava"
CLIENT_WORDS = [word for words in scene_plans.VOCABULARIES.values() for word in words.values()]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_tiny", ROOT / "scripts" / "make_tiny.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["make_tiny"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = packing.unpack(TINY, tmp_path_factory.mktemp("tiny") / "model")
    return LlavaForConditionalGeneration.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def on_card(row: str) -> float:
    """The card's figure over all kinds in the row that starts so."""
    return float(re.search(rf"^\| {row} \| ([0-9.]+)", (TINY / "README.md").read_text(), re.MULTILINE)[1])


# --- packing --------------------------------------------------------------------------------------------------------


def test_pack_and_unpack_give_the_same_bits(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "half": torch.randn(3, 4, generator=generator).half(),
        "brain": torch.randn(5, generator=generator).bfloat16(),
        "full": torch.tensor([float("inf"), -0.0, 1e-45]),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 7),
    }
    (tmp_path / "plain").mkdir()
    save_file(tensors, tmp_path / "plain" / "model.safetensors")
    (tmp_path / "plain" / "config.json").write_text('{"a": 1}')
    packed = packing.pack(tmp_path / "plain", tmp_path / "packed")
    back = load_file(packing.unpack(packed, tmp_path / "back") / "model.safetensors")
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert back[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))  # -0.0 is not 0.0
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == {"a": 1}
    assert sorted(path.name for path in packed.iterdir()) == ["config.json", "weights.jsonl"]
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["config.json", "model.safetensors"]


def test_unpack_leaves_what_is_there(tmp_path):
    first = packing.unpack(TINY, tmp_path / "model") / "model.safetensors"
    before = first.stat().st_mtime_ns
    packing.unpack(TINY, tmp_path / "model")
    assert first.stat().st_mtime_ns == before


def test_unpack_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"has no weights.jsonl; give the folder of a packed checkpoint"):
        packing.unpack(tmp_path, tmp_path / "into")
    line = {"name": "w", "shape": [2, 2], "dtype": "F32", "data": "AAAAAA=="}
    (tmp_path / "weights.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"w has 1 numbers, its shape wants \[2, 2\]"):
        packing.unpack(tmp_path, tmp_path / "into")
    assert not (tmp_path / "into").exists()


# --- what ships -----------------------------------------------------------------------------------------------------


def test_the_bundle_is_text_and_small():
    files = list(TINY.iterdir())
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".md"}
    assert sum(path.stat().st_size for path in files) < 4_000_000


def test_prompt_answer_and_end_are_separate_tokens(tiny):
    _, processor = tiny
    image = scenes.scenes(train=1, validation=0, test=0)["train"][0].images[0]
    whole = processor(images=[image], text=["<image> read the digits ? 3 7 </s>"])["input_ids"][0]
    prompt = processor(images=[image], text=["<image> read the digits ?"])["input_ids"][0]
    answer = processor.tokenizer("3 7", add_special_tokens=False)["input_ids"]
    assert list(whole) == [*prompt, *answer, processor.tokenizer.eos_token_id]
    assert len(answer) == 2 and sum(token == processor.image_token_id for token in whole) == 36
    assert processor.tokenizer.decode(answer) == "3 7"


def test_every_word_of_every_site_is_one_known_token(tiny):
    _, processor = tiny
    made = scenes.scenes(train=70, validation=0, test=0, styles=tuple(scene_plans.SITES))["train"]
    for example in made:
        for text in (example.question, example.answer):
            tokens = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert len(tokens) == len(text.split()) and processor.tokenizer.unk_token_id not in tokens


def test_pretraining_text_held_no_client_word(script):
    feed = script.Feed(seed=5, glyphs=200)
    lesson = next(iter(feed.batches(1, 400)))
    words = {script.WORDS[row] for row in lesson.tokens_BT.unique().tolist()}
    assert len(words) > 40 and not words & set(CLIENT_WORDS)


def test_patches_are_labelled_by_what_lies_under_them(script):
    """A single digit in the very middle, 24 pixels: the four middle patches and no corner."""
    plan = scene_plans.plan_scenes(np.random.default_rng(0), 1, glyphs.handwriting("train"), ("plain",), ("count",))
    plan.shown[0], plan.centres[0, 0], plan.sizes[0, 0], plan.digits[0, 0], plan.colours[0, 0] = 1, 0, 24, 7, 3
    digits, colours = (labels.view(6, 6) for labels in script.under_patches(plan))
    assert (digits[2:4, 2:4] == 7).all() and (colours[2:4, 2:4] == 3).all()
    assert digits[0, 0] == 10 and colours[5, 5] == len(scene_plans.COLOURS)


def test_client_words_stand_where_they_started_and_others_do_not(tiny, script):
    model, processor = tiny
    torch.manual_seed(0)
    start, _ = script.build()
    before, after = (m.get_input_embeddings().weight.detach() for m in (start, model))
    rows = processor.tokenizer.convert_tokens_to_ids(CLIENT_WORDS)
    own = processor.tokenizer.convert_tokens_to_ids(list(scene_plans.ASKED))
    assert after[rows].equal(before[rows].half().float())
    assert (after[own] - before[own]).norm(dim=1).min() > 0.05
    assert 0.5 < after[rows].norm(dim=1).mean() / after[own].norm(dim=1).mean() < 2


def test_fresh_open_scenes_are_read_as_the_card_says(tiny, script):
    """500 scenes: the standard error of 95% is 1 point, and 3 points are three of them."""
    fresh = scenes.scenes(seed=77, train=0, validation=0, test=0, public=500)["public"]
    score = script.accuracy(*tiny, fresh)["all"]
    assert score >= 0.90
    assert abs(score - on_card("open digits, english")) < 0.03


def test_handwriting_is_read_and_client_words_are_not(tiny, script):
    own = scenes.scenes(seed=77, train=0, validation=400, test=0, styles=("plain",))["validation"]
    client = scenes.scenes(seed=77, train=0, validation=400, test=0)["validation"]
    assert abs(script.accuracy(*tiny, own)["all"] - on_card("handwriting, plain, english")) < 0.06
    assert abs(script.accuracy(*tiny, client)["all"] - on_card("handwriting, turku, finnish")) < 0.07


@pytest.mark.run
@pytest.mark.timeout(300)
def test_the_same_seed_gives_the_same_bits(script):
    """Three steps of each stage, twice."""

    def weights():
        torch.manual_seed(0)
        model, _ = script.build()
        feed = script.Feed(seed=0, glyphs=100)
        script.teach_tower(model, feed, steps=3, batch=8)
        script.teach_answers(model, feed, steps=3, batch=8)
        return model.state_dict()

    first, again = weights(), weights()
    torch.manual_seed(0)
    start = script.build()[0].state_dict()
    assert all(first[name].equal(again[name]) for name in first)
    assert sum(not first[name].equal(start[name]) for name in first) > 90
