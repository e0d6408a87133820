"""Remote = local = undivided: the same bits where the shapes are the same, a stated tolerance where they are not."""

from __future__ import annotations

import pytest
import torch
from helpers import PROMPT, gradients, served, small_llava, some_examples, visiting
from torch import nn

from fedmm import seeds
from fedmm.config import composition, targets
from fedmm.edge import frozen_modules
from fedmm.edge.folding import fold
from fedmm.edge.nano_edge import Lora
from fedmm.edge.prepare import collate, encode, prepare
from fedmm.link.remote import RemoteLLM
from fedmm.llm.local import LocalLLM
from fedmm.losses import answer_cross_entropy
from fedmm.model import SplitModel


def load(folder):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("cache", ["run", "none"])
@pytest.mark.parametrize("encoding", ["factored", "dense"])
@pytest.mark.parametrize("loss_at", ["auto", "client"])
def test_remote_equals_local(llava, local_llm, edge, items, loss_at, encoding, cache):
    batch = collate(encode(edge, items))
    model = SplitModel(edge, local_llm, loss_at)
    loss = model.answer_loss(batch)
    loss.backward()
    wanted, logits = gradients(edge), model(batch)
    assert all(gradient.abs().sum() > 0 for gradient in wanted.values())
    with served(llava, edge, local_llm) as (host, _), visiting(host) as session:
        remote = SplitModel(edge, RemoteLLM(session, encoding=encoding, cache=cache), loss_at)
        remote_loss = remote.answer_loss(batch)
        remote_loss.backward()
        came = gradients(edge)
        assert torch.equal(remote(batch), logits)
    assert torch.equal(remote_loss, loss)
    assert came.keys() == wanted.keys()
    assert all(torch.equal(came[name], wanted[name]) for name in wanted)


def test_the_embedded_backbone_keeps_parity_too():
    """As it ships, on its own data, in a batch as training has it."""
    cfg = composition.compose()
    backbone = targets.make(cfg.llm)
    frozen = (backbone.model, backbone.processor)
    built, processor = frozen_modules.build(frozen_modules.take(*frozen), rank=4)
    built.reset(seeds.generator(0, "test"))
    examples = targets.make(cfg.dataset)(train=32, validation=0, test=0)["train"]
    batch, llm = collate(prepare(examples, processor, backbone.prompt)), LocalLLM(backbone.model)
    loss = SplitModel(built, llm).answer_loss(batch)
    loss.backward()
    wanted = gradients(built)
    with served(frozen, built, llm) as (host, _), visiting(host) as session:
        remote_loss = SplitModel(built, RemoteLLM(session)).answer_loss(batch)
        remote_loss.backward()
    assert torch.equal(remote_loss, loss)
    came = gradients(built)
    assert all(torch.equal(came[name], wanted[name]) for name in wanted)


@pytest.fixture(scope="module")
def tasks():
    """The embedded backbone with an edge that has left its start, and ten questions, two of them about two images."""
    cfg = composition.compose(["scenario=task"])
    backbone = targets.make(cfg.llm)
    built, processor = frozen_modules.build(frozen_modules.take(backbone.model, backbone.processor), rank=4)
    built.reset(seeds.generator(0, "test"))
    examples = targets.make(cfg.dataset)(train=10, validation=0, test=0)["train"]
    return backbone, built, examples, encode(built, prepare(examples, processor, backbone.prompt))


def test_questions_about_two_images_are_the_undivided_models(tasks):
    backbone, built, examples, items = tasks
    llm = LocalLLM(backbone.model)
    for example, item in zip(examples, items, strict=True):
        text = backbone.prompt.format(question=example.question)
        whole = backbone.processor(images=list(example.images), text=[text], return_tensors="pt")
        with torch.no_grad():
            wanted = backbone.model(**whole).logits[0, -1]
            torch.testing.assert_close(SplitModel(built, llm)(collate([item]))[0, 0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", ["run", "none"])
@pytest.mark.parametrize("encoding", ["factored", "dense"])
def test_questions_about_two_images_keep_parity_in_one_batch_with_others(tasks, encoding, cache):
    backbone, built, _, items = tasks
    llm, batch, prompts = LocalLLM(backbone.model), collate(items), collate(items, answers=False)
    assert sorted(batch.image_BT.sum(1).tolist()) == [36] * 8 + [72] * 2
    model = SplitModel(built, llm)
    loss = model.answer_loss(batch)
    loss.backward()
    wanted, said = gradients(built), model.generate(prompts)
    with served((backbone.model, backbone.processor), built, llm) as (host, _), visiting(host) as session:
        remote = SplitModel(built, RemoteLLM(session, encoding=encoding, cache=cache))
        for _ in range(2):  # with the features that went up, and with those that the host kept
            remote_loss = remote.answer_loss(batch)
            remote_loss.backward()
            came = gradients(built)
            assert torch.equal(remote_loss, loss)
            assert all(torch.equal(came[name], wanted[name]) for name in wanted)
        assert torch.equal(remote.generate(prompts), said)


def test_both_places_of_the_loss_agree(local_llm, edge, batch):
    assert torch.equal(
        SplitModel(edge, local_llm, "auto").answer_loss(batch), SplitModel(edge, local_llm, "client").answer_loss(batch)
    )


def test_remote_generates_what_local_does(llava, local_llm, edge, items):
    prompts = collate(items, answers=False)
    wanted = SplitModel(edge, local_llm).generate(prompts)
    with served(llava, edge, local_llm) as (host, _), visiting(host) as session:
        assert torch.equal(SplitModel(edge, RemoteLLM(session)).generate(prompts), wanted)


def test_lora_in_the_encoder_trains_across_the_link(llava, local_llm):
    built, processor = frozen_modules.build(frozen_modules.take(*llava), rank=4, alpha=8.0, lora=Lora(rank=2))
    built.reset(seeds.generator(0, "test"))
    with torch.no_grad():
        for parameter in built.trainable("shared").values():
            parameter.add_(0.05)
    batch = collate(prepare(some_examples(), processor, PROMPT))
    SplitModel(built, local_llm).answer_loss(batch).backward()
    wanted = gradients(built)
    assert any("encoder" in name and gradient.abs().sum() > 0 for name, gradient in wanted.items())
    with served(llava, built, local_llm) as (host, _), visiting(host) as session:
        SplitModel(built, RemoteLLM(session)).answer_loss(batch).backward()
    came = gradients(built)
    assert all(torch.equal(came[name], wanted[name]) for name in wanted)


class Adapted(nn.Module):
    """A module with an adapter behind it, as somebody would write it into a whole LLaVA."""

    def __init__(self, inner: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.inner, self.adapter = inner, adapter

    def forward(self, *args):
        x = self.inner(*args)
        return x + self.adapter.scale * (x @ self.adapter.down.T) @ self.adapter.up.T


def test_split_equals_undivided(llava_folder, edge, processor):
    """Two questions of one length, so that both models multiply matrices of the same shape."""
    model, _ = load(llava_folder)
    examples = [example for example in some_examples(6) if example.answer in ("two", "one")]
    batch = collate(prepare(examples, processor, PROMPT))
    split = SplitModel(edge, LocalLLM(model))(batch)
    split_loss = answer_cross_entropy(split, batch.labels_BA)
    split_loss.backward()
    wanted = gradients(edge)

    whole, _ = load(llava_folder)
    whole.eval().requires_grad_(False)
    adapters = edge.adapters["shared"]
    whole.model.multi_modal_projector = Adapted(whole.model.multi_modal_projector, adapters["image"])
    whole.set_input_embeddings(Adapted(whole.get_input_embeddings(), adapters["text"]))
    logits = whole(
        input_ids=batch.tokens_BT,
        pixel_values=batch.pixels,
        attention_mask=batch.mask_BT,
        logits_to_keep=batch.keep_BA[0],
    ).logits
    loss = answer_cross_entropy(logits, batch.labels_BA)
    loss.backward()
    assert (batch.keep_BA == batch.keep_BA[0]).all()
    assert torch.equal(logits, split)
    assert torch.equal(loss, split_loss)
    for name, gradient in gradients(edge).items():  # another order of the sum over positions: rounding
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tied", [False, True])
def test_folded_equals_adapted(tmp_path, edge, items, tied):
    folder = small_llava(tmp_path, tied=tied)
    model, processor = load(folder)
    built, _ = frozen_modules.build(frozen_modules.take(model, processor), rank=4, alpha=8.0)
    built.load(edge.state())
    batch = collate(items)
    logits = SplitModel(built, LocalLLM(model))(batch)
    folded, _ = load(folder)
    fold(folded, built.state(), scale=2.0)
    plain = folded(input_ids=batch.tokens_BT, pixel_values=batch.pixels, attention_mask=batch.mask_BT).logits
    rows = torch.arange(len(plain))[:, None]
    torch.testing.assert_close(plain[rows, batch.keep_BA], logits, rtol=0, atol=1e-5)
    unfolded = load(folder)[0](
        input_ids=batch.tokens_BT, pixel_values=batch.pixels, attention_mask=batch.mask_BT
    ).logits
    assert (unfolded - plain).abs().max() > 1e-3, "the adapters did nothing, so the test showed nothing"


def test_a_folded_checkpoint_generates_what_the_split_does(tmp_path, llava_folder, edge, items):
    """New tokens pass the text adapter at the host; in a folded checkpoint they find it in the table."""
    model, processor = load(llava_folder)
    said = SplitModel(edge, LocalLLM(model)).generate(collate(items, answers=False), max_tokens=6)
    folded, _ = load(llava_folder)
    fold(folded, edge.state(), scale=2.0)
    folded.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    for item, row in zip(items, said, strict=True):
        out = again.generate(
            input_ids=item.prompt[None].long(), pixel_values=item.pixels(), max_new_tokens=6, do_sample=False
        )[0, len(item.prompt) :]
        assert out.tolist() == row[: len(out)].tolist()


def test_features_in_the_place_of_pixels_change_nothing(local_llm, edge, items):
    with_pixels, with_features = collate(items), collate(encode(edge, items))
    assert with_features.pixels is None
    assert torch.equal(SplitModel(edge, local_llm)(with_pixels), SplitModel(edge, local_llm)(with_features))


def test_padding_changes_nothing_beyond_rounding(local_llm, edge, items):
    together = SplitModel(edge, local_llm)(collate(items))
    for b, item in enumerate(items):
        alone = SplitModel(edge, local_llm)(collate([item]))[0]
        torch.testing.assert_close(together[b, : len(item.answer)], alone, rtol=0, atol=1e-5)


def test_the_llm_stays_frozen(local_llm, edge, batch):
    before = {name: tensor.clone() for name, tensor in local_llm.decoder.state_dict().items()}
    SplitModel(edge, local_llm).answer_loss(batch).backward()
    assert all(p.grad is None and not p.requires_grad for p in local_llm.decoder.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in local_llm.decoder.state_dict().items())
