"""Adapters inside the LLM's layers: as they start, as they act together, as they train, what they leave alone."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from feddat_loop import run, states, written_out
from helpers import PROMPT, served, small_llava, some_examples, visiting

from fedmm import seeds
from fedmm.adapters import inner
from fedmm.config import composition
from fedmm.edge import frozen_modules
from fedmm.edge.folding import fold
from fedmm.edge.nano_edge import Lora
from fedmm.edge.prepare import batches, collate, encode, prepare
from fedmm.federation.build import local_model, whole
from fedmm.link.remote import RemoteLLM
from fedmm.llm.loading import llava as load
from fedmm.llm.loading import twin
from fedmm.llm.local import LocalLLM
from fedmm.losses import Mutual, branch_losses
from fedmm.methods.fednano import diagonal_fisher
from fedmm.methods.lora import lora
from fedmm.model import SplitModel
from fedmm.train import train
from fedmm.types import Step

SETS = ("shared", "local", "frozen")
TEACHER, STUDENT = ("local", "frozen"), ("shared",)
KINDS = {
    "lora": functools.partial(inner.lora, rank=2, alpha=4.0),
    "bottleneck": functools.partial(inner.bottleneck, rank=3),
}


def started(llava, kind, *, rank=0, checkpointing=False, moved=0.0, **options):
    """A whole model with adapters of three sets inside its LLM, and six examples to train on."""
    model = twin(llava[0])
    decoder = model.model.language_model
    KINDS[kind](decoder, SETS)
    edge, processor = frozen_modules.build(
        frozen_modules.take(*llava), sets=SETS, rank=rank, alpha=8.0, decoder=decoder, **options
    )
    llm = LocalLLM(model, checkpointing=checkpointing, inner=edge.inner)
    generator = seeds.generator(0, "moved")
    for name in SETS:
        edge.reset(seeds.generator(0, "adapters"), name)
        for parameter in edge.trainable(name).values():
            parameter.data += moved * torch.randn(parameter.shape, generator=generator)
    edge.freeze_all_but(["shared.*", "local.*"])
    items = prepare(some_examples(6), processor, PROMPT)
    return SplitModel(edge, llm), items if options else encode(edge, items)


def plain(llava):
    return SplitModel(frozen_modules.build(frozen_modules.take(*llava))[0], LocalLLM(twin(llava[0])))


@pytest.mark.parametrize("kind", KINDS)
def test_they_start_as_nothing_and_are_in_their_own_model_only(llava, kind):
    before = plain(llava)
    model, items = started(llava, kind)
    moved, _ = started(llava, kind, moved=0.1)
    batch = collate(items)
    for use in (STUDENT, TEACHER):
        assert torch.equal(model(batch, use), before(batch))
        assert not torch.equal(moved(batch, use), before(batch))
    assert torch.equal(plain(llava)(batch), before(batch))
    norms = [llama.layers[0].input_layernorm.weight for llama in (moved.llm.decoder, llava[0].model.language_model)]
    assert norms[0].data_ptr() == norms[1].data_ptr(), "the frozen tensors are in memory once"


@pytest.mark.parametrize("kind", KINDS)
def test_every_set_has_the_same_names_and_none_is_another_thing(llava, kind):
    model, _ = started(llava, kind, rank=4)
    names = [set(model.edge.trainable(name)) for name in SETS]
    assert names[0] == names[1] == names[2] and {"text.up", "image.down"} < names[0]
    inside = {name for name in names[0] if name.startswith("llm.")}
    assert len(inside) == {"lora": 8, "bottleneck": 4}[kind]  # two layers; two places or one; two factors
    parameters = [p for name in SETS for p in model.edge.trainable(name).values()]
    assert len({id(p) for p in parameters}) == len(parameters)
    model.edge.load(model.edge.state("shared"), "local")
    assert states(model)["local"] == states(model)["shared"]


def test_two_sets_of_lora_are_the_mean_of_both(llava):
    model, items = started(llava, "lora", moved=0.5)
    batch, (first, second) = collate(items), (model.edge.state(name) for name in TEACHER)
    by_hand = twin(llava[0])
    for name in first:
        if name.endswith("lora_A"):
            path = name.removeprefix("llm.").removesuffix(".lora_A")
            layer = by_hand.model.language_model.get_submodule(path)
            products = [own[name.replace("lora_A", "lora_B")] @ own[name] for own in (first, second)]
            layer.weight = torch.nn.Parameter(layer.weight + 2.0 * (products[0] + products[1]) / 2)
    wanted = SplitModel(plain(llava).edge, LocalLLM(by_hand))(batch)
    torch.testing.assert_close(model(batch, TEACHER), wanted, rtol=0, atol=1e-5)
    assert (model(batch, ("local",)) - wanted).abs().max() > 1e-3, "one of them alone is something else"


def test_two_bottlenecks_are_the_mean_of_both_outputs(llava):
    model, items = started(llava, "bottleneck", moved=0.5)
    batch, both = collate(items), [model.edge.state(name) for name in TEACHER]
    by_hand = twin(llava[0])

    def mean(i, module, inputs, y):
        down, up = (f"llm.layers.{i}.mlp.bottleneck_{factor}" for factor in ("down", "up"))
        return sum(y + F.relu(y @ own[down].T) @ own[up].T for own in both) / 2

    for i, layer in enumerate(by_hand.model.language_model.layers):
        layer.mlp.register_forward_hook(functools.partial(mean, i))
    wanted = SplitModel(plain(llava).edge, LocalLLM(by_hand))(batch)
    torch.testing.assert_close(model(batch, TEACHER), wanted, rtol=0, atol=1e-5)
    assert (model(batch, ("local",)) - wanted).abs().max() > 1e-3, "one of them alone is something else"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_feddat_equals_a_written_out_loop(llava, kind, checkpointing):
    """A checkpointed layer runs again in the backward, after the other branch: the adapters must be its own again."""
    model, items = started(llava, kind, checkpointing=checkpointing, rank=4)
    before = states(model)
    run(model, items)
    other, _ = started(llava, kind, rank=4)
    written_out(other, items, 1.0, 1.0)
    assert states(model) == states(other)
    assert states(model)["frozen"] == before["frozen"]
    moved = {name: model.edge.state(name) for name in ("shared", "local")}
    start, _ = started(llava, kind, rank=4)
    assert all(not torch.equal(start.edge.state(name)[key], t) for name in moved for key, t in moved[name].items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_llm_itself_never_changes(llava, kind):
    before = {name: tensor.clone() for name, tensor in llava[0].state_dict().items()}
    model, items = started(llava, kind)
    run(model, items)
    assert all(torch.equal(before[name], tensor) for name, tensor in llava[0].state_dict().items())
    adapters = {id(p) for name in SETS for p in model.edge.trainable(name).values()}
    own = [p for p in model.edge.parameters() if id(p) not in adapters]
    assert len(own) > 20 and all(p.grad is None and not p.requires_grad for p in own)


@pytest.mark.parametrize("loss_at", ["auto", "client"])
def test_each_branch_has_its_own_adapters(llava, loss_at):
    model, items = started(llava, "lora", moved=0.1)
    model = SplitModel(model.edge, model.llm, loss_at)
    batch, mutual = collate(items), Mutual((1.0, 1.0), 3.0)
    wanted = branch_losses([model(batch, use) for use in (TEACHER, STUDENT)], batch.labels_BA, mutual)
    found = model.losses(batch, (TEACHER, STUDENT), mutual)
    assert [loss.item() for loss in found] == [loss.item() for loss in wanted]
    assert found[0] != found[1]
    found[0].backward()
    assert all(p.grad is None for p in model.edge.trainable("shared").values())
    assert all(p.grad.abs().sum() > 0 for p in model.edge.trainable("local").values())


def test_the_fisher_is_that_of_the_split_model_where_both_have_it(llava, local_llm):
    """At B = 0 inside, what stands in front of the LLM has the Fisher that one pass a batch finds."""
    model, items = started(llava, "lora", rank=4)
    split, _ = frozen_modules.build(frozen_modules.take(*llava), rank=4, alpha=8.0)
    generator = seeds.generator(0, "test")
    for parameter in split.trainable("shared").values():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    model.edge.load(model.edge.state() | split.state())
    step = Step(1, 1, 1, 1, {})
    wanted, found = diagonal_fisher(SplitModel(split, local_llm), items, step), diagonal_fisher(model, items, step)
    assert found.keys() == model.edge.trainable("shared").keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-9)
    assert all((tensor.abs().sum() > 0) == (not name.endswith("lora_A")) for name, tensor in found.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_set_trains_as_by_hand(llava, kind):
    model, items = started(llava, kind)
    settings = {"seed": 0, "round": 1, "rounds": 1, "client": 0, "batch_size": 6}
    sgd = functools.partial(torch.optim.SGD, lr=0.5)
    train(model, items, lora, make_optimizer=sgd, anchor=model.edge.state(), **settings)
    other, _ = started(llava, kind)
    (batch,) = batches(items, 6, seeds.generator(0, "batches/0", 1, 0))
    other.answer_loss(batch).backward()
    for name, parameter in other.edge.trainable("shared").items():
        assert torch.equal(model.edge.state()[name], parameter.detach() - 0.5 * parameter.grad)


def test_lora_in_the_encoder_serves_several_sets_too(llava, local_llm):
    """FedDAT with edge.lora, near and through the link."""

    def model(llm):
        built, processor = frozen_modules.build(
            frozen_modules.take(*llava), sets=SETS, rank=4, alpha=8.0, lora=Lora(rank=2)
        )
        for name in SETS:
            built.reset(seeds.generator(0, "adapters"), name)
            for parameter in built.trainable(name).values():
                parameter.data += 0.05
        built.freeze_all_but(["shared.*", "local.*"])
        return SplitModel(built, llm), prepare(some_examples(6), processor, PROMPT)

    near, items = model(local_llm)
    run(near, items)
    far, _ = model(local_llm)
    with served(llava, far.edge, local_llm) as (host, _), visiting(host) as session:
        run(SplitModel(far.edge, RemoteLLM(session)), items)
    assert states(near) == states(far)
    written, _ = model(local_llm)
    written_out(written, items, 1.0, 1.0)
    assert states(near) == states(written)


def test_targets_that_name_nothing_are_told_with_what_there_is(llava):
    decoder = twin(llava[0]).model.language_model
    for place in (inner.lora, inner.bottleneck):
        with pytest.raises(ValueError, match=r"inner.targets=\['query'\] names no layer of the LLM; .*mlp.*q_proj"):
            place(decoder, SETS, targets=["query"])


def test_adapters_inside_fold_into_an_ordinary_checkpoint(tmp_path):
    folder = str(small_llava(tmp_path))
    backbone = load(path=folder, prompt=PROMPT, dtype="float32", device="cpu")
    llava = backbone.model, backbone.processor
    model, items = started(llava, "lora", rank=4, moved=0.1, lora=Lora(rank=2, alpha=6))
    folded = load(path=folder, prompt=PROMPT, dtype="float32", device="cpu").model
    fold(folded, model.edge.state(), 2.0, {"encoder": 3.0, "connector": 3.0, "llm": 2.0})
    batch = collate(items)
    whole = folded(input_ids=batch.tokens_BT, pixel_values=batch.pixels, attention_mask=batch.mask_BT).logits
    rows = torch.arange(len(whole))[:, None]
    torch.testing.assert_close(whole[rows, batch.keep_BA], model(batch), rtol=0, atol=1e-4)
    said = model.generate(collate(items, answers=False), max_tokens=6)
    for item, row in zip(items, said, strict=True):
        out = folded.generate(
            input_ids=item.prompt[None].long(), pixel_values=item.pixels(), max_new_tokens=6, do_sample=False
        )[0, len(item.prompt) :]
        assert out.tolist() == row[: len(out)].tolist()


def test_what_does_not_fold_is_told(llava_folder):
    backbone = load(path=str(llava_folder), prompt=PROMPT, dtype="float32", device="cpu")
    llava = backbone.model, backbone.processor
    model, _ = started(llava, "bottleneck")
    with pytest.raises(ValueError, match=r"bottleneck_down' is no linear adapter.*train with inner=lora"):
        fold(llava[0], model.edge.state(), 1.0)
    model, _ = started(llava, "lora")
    llava[0].model.language_model.layers[0].self_attn.q_proj.weight.data = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"q_proj' is a Linear of torch.uint8.*llm.load_in=null"):
        fold(llava[0], model.edge.state(), 1.0, {"llm": 2.0})


@pytest.mark.parametrize("arm", ["fedavg_llm", "feddat_llm"])
def test_an_arm_inside_the_llm_trains_as_many_parameters_as_nano_adapters(arm):
    def count(*overrides):
        cfg = composition.load(overrides)
        edge = local_model(cfg, whole(cfg), encoder=False)[0].edge
        return {sum(p.numel() for p in edge.trainable(name).values()) for name in cfg.method.sets}

    assert count(f"arm={arm}") == count(f"arm={arm.removesuffix('_llm')}") == {8192}


def test_a_narrow_llm_has_adapters_that_are_not(llava_folder):
    backbone = load(path=str(llava_folder), prompt=PROMPT, dtype="bfloat16", device="cpu")
    for kind in KINDS:
        model, items = started((backbone.model, backbone.processor), kind)
        model.answer_loss(collate(items)).backward()
        grads = [p.grad for p in model.edge.trainable("shared").values()]
        assert all(grad.dtype == torch.float32 for grad in grads) and sum(grad.abs().sum() for grad in grads) > 0
