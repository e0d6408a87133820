"""Questions without an image: through prepare, the edge, both encodings of the link, Fisher and generation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import safetensors.torch
import torch
from helpers import PROMPT, gradients, rounds, run, served, some_examples, visiting

from fedmm import tree
from fedmm.edge.encoder import CachedEncoder
from fedmm.edge.prepare import collate, encode, prepare
from fedmm.federation import build
from fedmm.federation import client as client_side
from fedmm.link.remote import RemoteLLM
from fedmm.methods.fednano import diagonal_fisher
from fedmm.model import SplitModel
from fedmm.storage.tensor_store import Store
from fedmm.types import Example, Step


def mixed(count=3, seeing=(1,)):
    """Examples of which only some have an image."""
    return [e if i in seeing else replace(e, images=()) for i, e in enumerate(some_examples(count))]


def ready(edge, processor, examples, encoded=True):
    items = prepare(examples, processor, PROMPT)
    return encode(edge, items) if encoded else items


def test_the_prompt_loses_its_placeholder(processor):
    (item,) = prepare(mixed(1, ()), processor, "what <image>\n {question} ?")
    words = processor.tokenizer.convert_ids_to_tokens(item.prompt)
    assert words == ["what", "which", "digit", "is", "red", "?", "?"]
    assert not item.sees and not item.image.any()
    with pytest.raises(ValueError, match="1 placeholders in its prompt for 2 images"):
        two = Example("a", 2 * some_examples(1)[0].images, "is", "one")
        prepare([two], processor, PROMPT)


@pytest.mark.parametrize("encoded", [True, False])
@pytest.mark.parametrize("seeing", [(), (1,)])
def test_a_row_without_an_image_is_what_it_is_alone(edge, processor, local_llm, seeing, encoded):
    items = ready(edge, processor, mixed(3, seeing), encoded)
    whole = collate(items)
    embeds, mask_BT = edge(whole)
    for b, item in enumerate(items):
        alone, own_BT = edge(collate([item]))
        length = int(own_BT.sum())
        torch.testing.assert_close(embeds.dense()[b, :length], alone.dense()[0], rtol=0, atol=1e-6)
    losses = local_llm.losses([embeds], mask_BT, whole.keep_BA, whole.labels_BA)
    losses[0].backward()
    found = gradients(edge)
    assert found["text.up"].abs().max() > 0
    assert bool(found["image.up"].abs().max() > 0) == bool(seeing)


def test_an_encoder_is_not_built_for_questions_alone(edge, processor):
    def never():
        raise AssertionError("built")

    cached = CachedEncoder(never, Store(memory_bytes=1 << 20), "owner")
    items = [replace(item, encoder=cached) for item in prepare(mixed(3, ()), processor, PROMPT)]
    cached.fill(items)
    batch = collate(items)
    assert batch.features_MPE is None and batch.pixels is None and batch.keys == ()
    assert edge(batch)[0].dense().isfinite().all()


WAYS = [("factored", "run"), ("factored", "none"), ("dense", "run")]


@pytest.mark.parametrize(("encoding", "cache"), WAYS)
@pytest.mark.parametrize("encoded", [True, False])
@pytest.mark.parametrize("seeing", [(), (0, 2), (1,)])
def test_over_the_link_it_is_the_same_to_the_bit(llava, edge, processor, local_llm, encoding, cache, encoded, seeing):
    items = ready(edge, processor, mixed(4, seeing), encoded)
    batch, prompts = collate(items), collate(items, answers=False)
    step = Step(1, 1, 1, 1, edge.state())

    def everything(llm):
        model = SplitModel(edge, llm)
        logits = model(batch)
        logits.pow(2).mean().backward()
        first = gradients(edge)
        loss = model.answer_loss(batch)
        loss.backward()
        fisher = diagonal_fisher(model, items, step)
        return logits.detach(), first, loss.detach(), gradients(edge), fisher, model.generate(prompts, max_tokens=4)

    here = everything(local_llm)
    with served(llava, edge, local_llm) as (host, _), visiting(host) as session:
        there = everything(RemoteLLM(session, encoding=encoding, cache=cache))
    for mine, other in zip(here, there, strict=True):
        if isinstance(mine, dict):
            assert mine.keys() == other.keys()
            for name in mine:
                torch.testing.assert_close(mine[name], other[name], rtol=0, atol=0)
        else:
            assert torch.equal(mine, other)
    assert here[4]["text.up"].abs().max() > 0


@pytest.mark.parametrize("rows", [(0,), (0, 1)])
def test_features_that_the_host_lost_are_sent_again(llava, edge, processor, local_llm, rows):
    """Samples are counted among those with an image."""
    items = ready(edge, processor, mixed(4, (1, 3)))
    batch = collate(items)
    with served(llava, edge, local_llm) as (host, _), visiting(host) as session:
        llm = RemoteLLM(session)
        before = SplitModel(edge, llm).answer_loss(batch)
        for row in rows:
            host._features.store._memory.pop("0", batch.keys[row].hex())
        assert torch.equal(SplitModel(edge, llm).answer_loss(batch), before)


@pytest.mark.run
@pytest.mark.parametrize("arm", ["fednano", "feddat"])
def test_a_client_without_images_abstains_from_their_adapter(backbone, tmp_path, monkeypatch, arm):
    """Client 1 has questions alone: it sends no image tensor, and the others' mean is not diluted by it."""
    ask, deltas, sure = client_side._items, {}, {}

    def blind(cfg, built, split, part):
        if part != 1 or split != "train":
            return ask(cfg, built, split, part)
        some = [build.splits(cfg)[split][i] for i in build.partition(cfg, split)[part]]
        return built.ready([replace(e, images=()) for e in some])

    send = client_side._send

    def sent(session, update):
        deltas[session.round, update.client], sure[session.round, update.client] = update.delta, update.fisher
        send(session, update)

    monkeypatch.setattr(client_side, "_items", blind)
    monkeypatch.setattr(client_side, "_send", sent)
    path = run(backbone, tmp_path / "run", f"arm={arm}", "rule=mean", "rule.weights=uniform", "rounds=1")
    assert rounds(path)[0]["clients"] == [0, 1, 2]
    assert set(deltas[1, 1]) == {"text.down", "text.up"} and set(deltas[1, 0]) == set(deltas[1, 2]) != set(deltas[1, 1])
    assert arm == "feddat" or set(sure[1, 1]) == set(deltas[1, 1])
    state = safetensors.torch.load_file(path / "checkpoints" / "round_0001.safetensors")
    image = (deltas[1, 0]["image.up"] + deltas[1, 2]["image.up"]) / 2  # from zero
    torch.testing.assert_close(state["state/image.up"], image, rtol=0, atol=1e-7)
    text = sum(deltas[1, client]["text.up"] for client in range(3)) / 3
    torch.testing.assert_close(state["state/text.up"], text, rtol=0, atol=1e-7)
    assert tree.digest(deltas[1, 1]) != tree.digest(deltas[1, 0])
