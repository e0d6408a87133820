"""`rule=stack`: the exact mean of products over rounds and ranks, and one folded base at both ends of the link."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from helpers import PROMPT, gradients, rounds, run, served, some_examples, visiting

from fedmm import seeds, tree
from fedmm.adapters.nano import cut, draw
from fedmm.aggregate.lowrank import product_error
from fedmm.aggregate.stack import stack
from fedmm.edge import frozen_modules
from fedmm.edge.folding import fold, unfolded
from fedmm.edge.prepare import collate, encode, prepare
from fedmm.federation.export import export
from fedmm.link.remote import RemoteLLM
from fedmm.methods.fednano import diagonal_fisher
from fedmm.model import SplitModel
from fedmm.types import Step, Update

RANKS, COUNTS = (1, 4, 2, 3), (1, 3, 2, 7)
ALPHA, SCALE = 8.0, 2.0  # of the fixture's edge, of rank 4


def start(width=12, rank=4):
    generator = torch.Generator().manual_seed(0)
    return {
        f"{kind}.{name}": draw(rank, width, generator) if name == "down" else torch.zeros(width, rank)
        for kind in ("image", "text")
        for name in ("down", "up")
    }


def trained(current, round, ranks=RANKS, size=0.5):
    """Updates of clients of several ranks, and the weighted mean of their products, written out."""
    generator = torch.Generator().manual_seed(round)
    updates, means = [], {"image": 0.0, "text": 0.0}
    for client, (rank, count) in enumerate(zip(ranks, COUNTS[: len(ranks)], strict=True)):
        anchor = cut(unfolded(current), rank)
        delta = {name: size * torch.randn(tensor.shape, generator=generator) for name, tensor in anchor.items()}
        own = {name: anchor[name].double() + delta[name].double() for name in anchor}
        for kind in means:
            means[kind] = means[kind] + count / sum(COUNTS[: len(ranks)]) * own[f"{kind}.up"] @ own[f"{kind}.down"]
        updates.append(Update(client, delta, count))
    return updates, means


def merge(state, updates, memory, **more):
    return stack(state, updates, memory, alpha=ALPHA, rank=4, **more)


def test_over_rounds_and_ranks_it_is_the_mean_of_the_clients_models():
    state, memory, total, one = start(), {}, {"image": 0.0, "text": 0.0}, torch.eye(12, dtype=torch.float64)
    for round in (1, 2, 3):
        updates, means = trained(state, round)
        before = state
        state, memory = merge(state, iter(updates), memory, seed=5)
        assert max(product_error(state, before, updates, scale=SCALE).values()) < 1e-6
        for kind, mean in means.items():
            total[kind] = (one + SCALE * mean) @ (one + SCALE * total[kind]) / SCALE - one / SCALE
            assert (state[f"{kind}.folded"].double() - total[kind]).norm() / total[kind].norm() < 1e-6
            assert not state[f"{kind}.up"].any() and not torch.equal(state[f"{kind}.down"], before[f"{kind}.down"])
    assert torch.equal(state["image.down"], draw(4, 12, seeds.generator(5, "adapters", 3)))


def test_a_client_alone_gets_its_own_model_back_in_every_round(llava, edge, items):
    state, memory, frozen = {k: v.clone() for k, v in edge.state().items()}, {}, frozen_modules.take(*llava)

    def embeddings(adapters):
        own, _ = frozen_modules.build(frozen, rank=4, alpha=ALPHA)
        own.load(unfolded(adapters))
        own.fold({name: tensor for name, tensor in state.items() if name.endswith(".folded")}, SCALE)
        return own(collate(items))[0].dense()

    for round in (1, 2, 3):
        updates, _ = trained(state, round, ranks=(4,), size=0.1)
        before = embeddings(tree.moved(unfolded(state), updates[0].delta))
        state, memory = merge(state, updates, memory)
        torch.testing.assert_close(embeddings(state), before, rtol=1e-4, atol=1e-5)


def test_its_error_is_seen_where_it_is_not_exact():
    state, _ = merge(start(), trained(start(), 1)[0], {})
    updates, _ = trained(state, 2)
    merged, _ = merge(state, updates, {})
    wrong = merged | {"text.folded": merged["text.folded"] + 0.1 * state["text.folded"]}
    found = product_error(wrong, state, updates, scale=SCALE)
    assert found["image"] < 1e-6 < 1e-3 < found["text"]
    alone = state["text.folded"] + (merged["text.folded"] - state["text.folded"]) @ torch.linalg.inv(
        torch.eye(12) + SCALE * state["text.folded"]
    )
    assert product_error(merged | {"text.folded": alone}, state, updates, scale=SCALE)["text"] > 0.1, "P and no s P W"


def test_what_does_not_fold_is_refused_with_the_knob():
    lora = {"encoder.q.lora_A": torch.zeros(2, 3), "encoder.q.lora_B": torch.zeros(3, 2)}
    with pytest.raises(ValueError, match=r"'encoder.q' is a LoRA; set edge.lora.rank=0 or rule=mean"):
        merge(start() | lora, [], {})
    half = [Update(0, {"text.down": torch.zeros(4, 12)}, 1)]
    with pytest.raises(ValueError, match=r"rule=stack starts 'text' afresh in every round.*set schema=all"):
        merge(start(), half, {})


# ---- one base --------------------------------------------------------------------------------------------------------


@pytest.fixture
def products():
    generator = torch.Generator().manual_seed(3)
    return {f"{kind}.folded": 0.05 * torch.randn(16, 16, generator=generator) for kind in ("image", "text")}


def test_a_folded_base_is_that_of_an_adapter_that_is_no_more(llava, edge, products, items):
    """Rank 16 at width 16 says any product: B = P, A = 1."""
    full, _ = frozen_modules.build(frozen_modules.take(*llava), rank=16, alpha=32.0)
    identity = {f"{kind}.down": torch.eye(16) for kind in ("image", "text")}
    full.load(identity | {f"{kind}.up": products[f"{kind}.folded"] for kind in ("image", "text")})
    bare, _ = frozen_modules.build(frozen_modules.take(*llava), rank=4, alpha=8.0)
    bare.reset(seeds.generator(0, "test"))
    bare.fold(products, SCALE)
    batch = collate(items)
    torch.testing.assert_close(bare(batch)[0].dense(), full(batch)[0].dense(), rtol=1e-5, atol=1e-6)
    before = edge(batch)[0].dense()
    edge.fold({}, SCALE)
    assert torch.equal(edge(batch)[0].dense(), before), "nothing folded, not a bit moved"


@pytest.mark.parametrize("encoding", ["factored", "dense"])
@pytest.mark.parametrize("encoded", [True, False])
def test_remote_is_local_to_the_bit(llava, edge, processor, local_llm, products, encoding, encoded):
    items = prepare(some_examples(4), processor, PROMPT)
    items = encode(edge, items) if encoded else items
    edge.fold(products, SCALE)
    batch, prompts, step = collate(items), collate(items, answers=False), Step(1, 1, 1, 1, edge.state())

    def everything(llm):
        model = SplitModel(edge, llm)
        logits = model(batch)
        model.answer_loss(batch).backward()
        fisher = diagonal_fisher(model, items, step)
        return {"logits": logits.detach(), "said": model.generate(prompts, max_tokens=6), **gradients(edge), **fisher}

    here = everything(local_llm)
    with served(llava, edge, local_llm) as (host, _):
        host.open_round(1, edge.state() | products, [0, 1], scale=SCALE)
        with visiting(host) as session:
            there = everything(RemoteLLM(session, encoding=encoding))
            assert products.keys() <= session.call("state").tensors.keys()
        assert here.keys() == there.keys()
        for name, tensor in here.items():
            assert torch.equal(tensor, there[name]), name
        host.open_round(1, edge.state(), [0, 1])
        with visiting(host) as session:
            other = SplitModel(edge, RemoteLLM(session))(batch)
        assert encoding == "dense" or not torch.equal(other, here["logits"]), "a round without it starts from the parts"


def test_generated_tokens_pass_what_is_folded(llava, edge, local_llm, items, products, monkeypatch):
    """As the answer tokens of training did."""
    edge.fold(products, SCALE)
    passed = []
    embed = local_llm._embed

    def watched(token_B, terms, own):
        passed.append((token_B, out := embed(token_B, terms, own)))
        return out

    monkeypatch.setattr(local_llm, "_embed", watched)
    SplitModel(edge, local_llm).generate(collate(items, answers=False), max_tokens=3)
    token_B, out_BD = passed[0]
    x_BD = local_llm.decoder.embed_tokens(token_B)
    x_BD = x_BD + SCALE * x_BD @ products["text.folded"].T
    (term,) = edge.token_terms()
    wanted = x_BD + term.scale * (x_BD @ term.down_RD.T) @ term.up_DR.T
    torch.testing.assert_close(out_BD, wanted, rtol=1e-5, atol=1e-6)


def test_export_folds_it_before_the_adapters(llava_folder, edge, items, products, local_llm):
    from transformers import LlavaForConditionalGeneration

    from fedmm.llm.local import LocalLLM

    tuned = LlavaForConditionalGeneration.from_pretrained(llava_folder)
    fold(tuned, edge.state() | products, SCALE)
    edge.fold(products, SCALE)
    batch = collate(items)
    bare, _ = frozen_modules.build({**frozen_modules.take(tuned, _processor(llava_folder))}, rank=4, alpha=8.0)
    bare.reset(seeds.generator(0, "test"))
    wanted, found = SplitModel(edge, local_llm)(batch), SplitModel(bare, LocalLLM(tuned))(batch)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def _processor(folder):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.run
def test_flora_runs_clients_of_three_ranks_and_its_error_is_none(backbone, tmp_path):
    options = ["arm=flora", "edge.ranks=[1,4,2]", "compare=[exact_lowrank]"]
    path = run(backbone, tmp_path / "run", *options, "optimizer.lr=0.02")
    files = sorted((path / "checkpoints").glob("*.safetensors"))
    first, last = (safetensors.torch.load_file(file) for file in files)
    assert last["memory/round"].item() == 2
    assert last["state/text.folded"].shape == (16, 16) and last["state/text.folded"].norm() > 0
    assert not torch.equal(first["state/text.folded"], last["state/text.folded"])
    for row in rounds(path):
        assert row["product_error"].keys() == {"image", "text"} and max(row["product_error"].values()) < 1e-5
    export(path, tmp_path / "tuned")
    again = run(backbone, tmp_path / "again", *options, "optimizer.lr=0.02", "link.encoding=dense", "rounds=1")
    assert tree.digest(first) == tree.digest(safetensors.torch.load_file(next((again / "checkpoints").glob("*1.*"))))


@pytest.mark.run
def test_each_rule_tells_its_error_against_the_mean_of_products(backbone, tmp_path):
    path = run(backbone, tmp_path / "run", "arm=fedavg", "compare=[ffa_lora,rolora]", "rounds=3", "optimizer.lr=0.05")
    mean, ffa, rolora = (
        [row["product_error"] for row in rounds(folder)]
        for folder in (path, path / "arms" / "ffa_lora", path / "arms" / "rolora")
    )
    assert all(error > 1e-4 for row in mean[1:] for error in row.values()), "B has left zero, and A drifts"
    for rows in (ffa, rolora):  # one of A and B is everybody's
        assert all(0 <= error < 1e-5 for row in rows for error in row.values()) and all(rows)
