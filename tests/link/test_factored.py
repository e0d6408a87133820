"""The factored link against the dense one and the LLM in this process: the same bits, a fraction of the bytes."""

from __future__ import annotations

import pytest
import torch
from helpers import PROMPT, gradients, served, some_examples, visiting

from fedmm import seeds
from fedmm.codecs import Codecs
from fedmm.edge import base, frozen_modules
from fedmm.edge.nano_edge import Lora
from fedmm.edge.prepare import collate, encode, prepare
from fedmm.link.remote import RemoteLLM
from fedmm.link.session import HostRefused
from fedmm.losses import Mutual
from fedmm.methods.fednano import diagonal_fisher
from fedmm.model import SplitModel
from fedmm.storage.tensor_store import Store
from fedmm.types import Step

BRANCHES = (("local", "frozen"), ("shared",))  # FedDAT's: the dual adapter teacher, and the shared adapter
MUTUAL = Mutual((0.5, 2.0), temperature=3.0)


def shaken(edge):
    """An edge whose adapters have left their start, each set another way."""
    generator = seeds.generator(0, "shaken")
    with torch.no_grad():
        for parameter in edge.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return edge


@pytest.fixture
def triple(llava):
    """Shared, local and frozen adapters, the last without gradients."""
    built, _ = frozen_modules.build(frozen_modules.take(*llava), sets=("shared", "local", "frozen"), rank=4, alpha=8.0)
    for name in ("shared", "local", "frozen"):
        built.reset(seeds.generator(0, name), name)
    shaken(built).freeze_all_but(["shared.*", "local.*"])
    return built


@pytest.fixture
def featured(edge, items):
    return collate(encode(edge, items))


def all_gradients(edge):
    found = {name: p.grad.clone() for name, p in edge.named_parameters() if p.grad is not None}
    edge.zero_grad()
    return found


def train_on(losses):
    for loss in losses:
        loss.backward()


@pytest.mark.parametrize("loss_at", ["auto", "client"])
@pytest.mark.parametrize("encoding", ["factored", "dense"])
def test_branches_that_learn_from_each_other_have_the_bits_of_one_process(
    llava, local_llm, triple, featured, encoding, loss_at
):
    wanted = SplitModel(triple, local_llm).losses(featured, BRANCHES, MUTUAL)
    train_on(wanted)
    wanted_grads = all_gradients(triple)
    plain = SplitModel(triple, local_llm).losses(featured, BRANCHES)
    assert all(not torch.equal(a, b) for a, b in zip(wanted, plain, strict=True)), "mutual learning did nothing"
    with served(llava, triple, local_llm) as (host, _), visiting(host) as session:
        remote = SplitModel(triple, RemoteLLM(session, encoding=encoding), loss_at)
        losses = remote.losses(featured, BRANCHES, MUTUAL)
        train_on(losses)
    came = all_gradients(triple)
    assert all(torch.equal(a, b) for a, b in zip(losses, wanted, strict=True))
    assert came.keys() == wanted_grads.keys() and not any("frozen" in name for name in came)
    assert all(torch.equal(came[name], wanted_grads[name]) for name in came)


def test_each_loss_trains_its_own_branch_only(llava, local_llm, triple, featured):
    with served(llava, triple, local_llm) as (host, _), visiting(host) as session:
        for llm in (local_llm, RemoteLLM(session), RemoteLLM(session, encoding="dense")):
            for i, name in enumerate(("local", "shared")):
                SplitModel(triple, llm).losses(featured, BRANCHES, MUTUAL)[i].backward()
                assert {key.split(".")[1] for key in all_gradients(triple)} == {name}


def fisher_by_autograd(model, items):
    """The definition, one sample at a time."""
    parameters = model.edge.trainable("shared")
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for item in items:
        batch = collate([item])
        loss = model.answer_loss(batch) * (batch.labels_BA >= 0).sum()
        grads = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        for name, grad in zip(parameters, grads, strict=True):
            total[name] += grad.pow(2) / len(items)
    return total


@pytest.mark.parametrize("rank", [0, 2])
def test_the_fisher_is_the_same_over_every_link(llava, local_llm, items, rank):
    built, _ = frozen_modules.build(frozen_modules.take(*llava), rank=4, alpha=8.0, lora=Lora(rank=rank))
    built.reset(seeds.generator(0, "test"))
    shaken(built)
    if not rank:
        items = encode(built, items)
    step = Step(1, 1, 1, 1, {})
    wanted = diagonal_fisher(SplitModel(built, local_llm), items, step, batch_size=2)
    defined = fisher_by_autograd(SplitModel(built, local_llm), items)
    assert wanted.keys() == defined.keys()
    assert sum(bool(fisher.any()) for fisher in defined.values()) > (12 if rank else 3)
    for name, fisher in defined.items():
        torch.testing.assert_close(wanted[name], fisher, rtol=1e-4, atol=1e-10)
    with served(llava, built, local_llm) as (host, _), visiting(host) as session:
        for encoding in ("factored", "dense"):
            came = diagonal_fisher(SplitModel(built, RemoteLLM(session, encoding=encoding)), items, step, batch_size=2)
            assert all(torch.equal(came[name], wanted[name]) for name in wanted)


def test_what_trains_in_front_of_the_llm_goes_up_whole(llava, local_llm, caplog):
    """Image positions then travel dense, and that is said; text stays factored. The bits stay those of one process."""
    built, processor = frozen_modules.build(frozen_modules.take(*llava), rank=4, alpha=8.0, lora=Lora(rank=2))
    built.reset(seeds.generator(0, "test"))
    shaken(built)
    batch = collate(prepare(some_examples(), processor, PROMPT))
    SplitModel(built, local_llm).answer_loss(batch).backward()
    wanted = gradients(built)
    with served(llava, built, local_llm) as (host, _), visiting(host) as session:
        SplitModel(built, RemoteLLM(session)).answer_loss(batch).backward()
        assert caplog.text.count("edge.lora trains in front of the LLM") == 1
        assert torch.equal(
            SplitModel(built, RemoteLLM(session)).generate(batch), SplitModel(built, local_llm).generate(batch)
        )
    came = gradients(built)
    assert all(torch.equal(came[name], wanted[name]) for name in wanted)


def test_a_warm_step_carries_no_features_and_a_cold_one_each_once(llava, edge, local_llm, featured):
    with served(llava, edge, local_llm) as (host, _):
        for expected in (len(featured.ids), 0):  # a later process of the same client finds them there
            with visiting(host) as session:
                model = SplitModel(edge, RemoteLLM(session))
                for _ in range(2):
                    model.answer_loss(featured)
                sent = session.sent_bytes["features"]
                features_bytes = featured.features_MPE.nbytes * expected / len(featured.ids)
                assert features_bytes <= sent <= features_bytes + 1000 * (expected > 0)
        with visiting(host, client=1) as session:
            SplitModel(edge, RemoteLLM(session)).answer_loss(featured)
            assert session.sent_bytes["features"] > featured.features_MPE.nbytes, "another client's are not its own"


@pytest.mark.parametrize("memory_bytes", [0, 2048])
def test_what_the_host_forgot_is_sent_again(llava, edge, local_llm, items, tmp_path, memory_bytes):
    """A store too small for the data but not for a batch: steps go on, with the bits they have otherwise."""
    items = encode(edge, items)
    store = Store(memory_bytes=memory_bytes or 3000, folder=tmp_path, disk_bytes=3000 if not memory_bytes else 0)
    batches = [collate(items[i : i + 1]) for i in (0, 1, 2, 0, 1, 2)]
    wanted = [SplitModel(edge, local_llm).answer_loss(batch) for batch in batches]
    with served(llava, edge, local_llm, store=store) as (host, _), visiting(host) as session:
        llm = RemoteLLM(session)
        assert [SplitModel(edge, llm).answer_loss(batch).item() for batch in batches] == [
            loss.item() for loss in wanted
        ]


def test_a_host_that_lost_everything_is_filled_again(llava, edge, local_llm, featured):
    store = Store(memory_bytes=1 << 20)
    with served(llava, edge, local_llm, store=store) as (host, _), visiting(host) as session:
        model = SplitModel(edge, RemoteLLM(session))
        before = model.answer_loss(featured)
        store.close()  # drops what it holds
        assert torch.equal(model.answer_loss(featured), before)


def test_with_a_store_too_small_for_a_batch_features_go_up_with_the_step(llava, edge, local_llm, featured, caplog):
    with served(llava, edge, local_llm, store=Store(memory_bytes=2048)) as (host, _), visiting(host) as session:
        loss = SplitModel(edge, RemoteLLM(session)).answer_loss(featured)
    assert torch.equal(loss, SplitModel(edge, local_llm).answer_loss(featured))
    assert "raise link.cache_memory_mb or link.cache_disk_mb" in caplog.text


def test_a_sample_larger_than_the_store_says_so(llava, edge, local_llm, featured):
    with (
        served(llava, edge, local_llm, store=Store(memory_bytes=64)) as (host, _),
        visiting(host) as session,
        pytest.raises(HostRefused, match="fits neither into 64 bytes of memory"),
    ):
        SplitModel(edge, RemoteLLM(session)).answer_loss(featured)


def test_a_host_that_keeps_nothing_holds_nothing(llava, edge, local_llm, featured):
    with served(llava, edge, local_llm, store=None) as (host, _), visiting(host) as session:
        assert torch.isfinite(SplitModel(edge, RemoteLLM(session, cache="none")).answer_loss(featured))
        with pytest.raises(HostRefused, match="link.cache=none"):
            SplitModel(edge, RemoteLLM(session)).answer_loss(featured)


def factored(batch, edge, **changes):
    """A warm factored step as its frame holds it."""
    embeds, mask_BT = edge(batch)
    tensors = {
        "mask": mask_BT, "tokens": batch.tokens_BT.int(), "image": batch.image_BT,
        "keep": batch.keep_BA, "labels": batch.labels_BA,
    }  # fmt: skip
    tensors |= {f"features.{b}": features for b, features in enumerate(batch.features_MPE.split(1))}
    for i, term in enumerate(embeds.terms):
        tensors |= {f"h.{i}": term.h_NR.detach(), f"up.{i}": term.up_DR.detach()}
    meta = {"terms": [["image", 2.0, "a"], ["text", 2.0, "b"]], "branches": [2], "grads": ["up.0"]}
    for name, value in changes.items():
        (meta if name in meta or name in ("weights", "temperature", "codecs") else tensors)[name.replace("__", ".")] = (
            value
        )
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}, meta


nan = torch.full((16, 4), float("nan"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"up__0": torch.zeros(16, 5)}, r"'h.0' has shape \(12, 4\), wanted \(12, 5\)"),
        ({"up__0": torch.zeros(15, 4)}, r"'up.0' has shape \(15, 4\), wanted \(16, 'any'\)"),
        ({"up__1": nan}, "'up.1' is not finite"),
        ({"h__0": None}, "'h.0' is missing"),
        ({"h__1": torch.zeros(3, 4)}, "'h.1' has shape"),
        ({"tokens": torch.full((3, 11), 99, dtype=torch.int32)}, r"'tokens' must lie in \[0, 20\)"),
        ({"image": torch.zeros(3, 11, dtype=torch.bool)}, r"'h.0' has shape \(12, 4\), wanted \(0, 4\)"),
        (
            {"image": torch.arange(11).expand(3, 11) < 3, "h__0": torch.zeros(9, 4), "h__1": torch.zeros(22, 4)},
            "9 image positions and 12 image features",
        ),
        ({f"features__{b}": torch.zeros(1, 4, 7) for b in range(3)}, r"fp32 and 12 wide.*got \(1, 4, 7\)"),
        ({"features__1": None}, "'features.1' is missing"),
        ({"keys": torch.zeros(2, 16, dtype=torch.uint8)}, "'keys' has shape"),
        ({"keys": torch.zeros(3, 16)}, "keys are 16 bytes a sample"),
        (
            {"terms": [["sound", 1.0, "a"], ["text", 1.0, "b"]]},
            r"a term is a list of part \(image or text\), scale and name",
        ),
        (
            {"terms": [["image", "big", "a"], ["text", 1.0, "b"]]},
            r"a term is a list of part \(image or text\), scale and name",
        ),
        ({"terms": [["image", 1.0], ["text", 1.0]]}, r"a term is a list of part \(image or text\), scale and name"),
        (
            {"terms": [["image", 1.0, "a" * 129], ["text", 1.0, "b"]]},
            r"a term is a list of part \(image or text\), scale and name",
        ),
        ({"terms": "all"}, "terms must be a list"),
        ({"terms": [["image", 1.0, "a"]] * 65}, "terms must be a list of at most 64"),
        ({"branches": [1]}, "branches share out 2 terms"),
        ({"branches": [-1, 3]}, "branches share out 2 terms"),
        ({"branches": [2] + [0] * 64}, "branches must be a list of at most 64"),
        ({"branches": [2] + [0] * 60, "limit": 1 << 16}, "embeddings of .* bytes, at most"),
        ({"grads": ["tokens"]}, "no gradient by 'tokens'"),
        ({"grads": "up.0"}, "grads must be a list of names"),
        ({"weights": [1.0, 1.0], "temperature": 1.0}, "a weight for each of 1 branches"),
        ({"weights": [1.0], "temperature": 0.0}, "a temperature from 0.001"),
        ({"codecs": ["zip"] * 4}, "codecs are four of"),
        ({"up__0": torch.zeros(16, 65), "h__0": torch.zeros(12, 65)}, "a term of rank 65, at most 64; lower edge.rank"),
        ({"up__0": torch.zeros(16, 1 << 20), "step_memory_bytes": 16 << 20}, "MB of the host's memory, at most 16"),
        ({"codecs": ["none", "int8", "none", "none"]}, "'h.0': int8 is the pieces"),
    ],
)
def test_a_factored_step_that_is_wrong_is_refused(llava, edge, local_llm, featured, changes, says):
    changes = dict(changes)
    limit = {"frame_limit_bytes": changes.pop("limit")} if "limit" in changes else {}
    limit |= {"step_memory_bytes": changes.pop("step_memory_bytes")} if "step_memory_bytes" in changes else {}
    with served(llava, edge, local_llm, **limit) as (host, _), visiting(host) as session:
        tensors, meta = factored(featured, edge, **changes)
        with pytest.raises(HostRefused, match=says):
            session.call("loss", tensors, **meta)
        tensors, meta = factored(featured, edge)
        assert torch.isfinite(session.call("loss", tensors, **meta).tensors["losses"]).all()


def test_one_key_in_every_row_has_nothing_joined(llava, edge, local_llm, featured):
    """Found in a review: a frame of a kilobyte named features of 16 MB in 32 rows, and the host joined them all."""
    with served(llava, edge, local_llm) as (host, _), visiting(host) as session:
        connector, passed = host._features.connector, []
        connector.register_forward_hook(lambda module, args, output: passed.append(args[0].shape))
        large_IPE = torch.rand(1, 4000, 12)
        key_K = torch.frombuffer(bytearray(base.key_of(large_IPE)), dtype=torch.uint8)
        session.call("features", {"keys": key_K[None], "features.0": large_IPE})
        tensors, meta = factored(featured, edge)
        tensors = {name: t for name, t in tensors.items() if not name.startswith("features")}
        with pytest.raises(HostRefused, match="12 image positions and 12000 image features"):
            session.call("loss", tensors | {"keys": key_K.repeat(3, 1)}, **meta)
        assert not passed


def test_no_more_keys_are_asked_about_than_a_step_has(llava, edge, local_llm):
    """Found in a review: a million took 21 s and 731 MB."""
    with served(llava, edge, local_llm) as (host, _), visiting(host) as session:
        with pytest.raises(HostRefused, match="16385 keys at once, at most 16384"):
            session.call("known", {"keys": torch.zeros(16385, 16, dtype=torch.uint8)})


def test_features_that_are_not_what_their_key_says_are_refused(llava, edge, local_llm, featured):
    """Else a wrong gradient could come of it, and nobody would know."""
    with served(llava, edge, local_llm) as (host, _), visiting(host) as session:
        key = torch.frombuffer(bytearray(featured.keys[0]), dtype=torch.uint8)[None]
        with pytest.raises(HostRefused, match="do both ends round them alike"):
            session.call("features", {"keys": key, "features.0": featured.features_MPE[1:2]})
        with pytest.raises(HostRefused, match="'features.0' is missing"):
            session.call("features", {"keys": key})


def test_a_key_is_of_the_content(featured):
    one, two = featured.features_MPE[:1], featured.features_MPE[1:2]
    assert base.key_of(one) == base.key_of(one.clone()) != base.key_of(two)
    assert base.key_of(one) != base.key_of(one.flatten(1, 2)[:, None]), "the same numbers in another shape"
    assert len(set(featured.keys)) == len(featured.ids)


@pytest.mark.parametrize("codec", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("kind", ["features", "h", "gradients", "logits"])
def test_codecs_save_bytes_and_stay_close(llava, edge, local_llm, items, codec, kind):
    loss_at = "client" if kind == "logits" else "auto"
    codecs = Codecs(**{kind: codec})
    batch = collate(encode(edge, items))
    rounded = collate(encode(edge, items, codecs.features))
    SplitModel(edge, local_llm).answer_loss(batch).backward()
    exact = gradients(edge)
    moved = {}
    with served(llava, edge, local_llm) as (host, _):
        for name, chosen, given in (("none", Codecs(), batch), (codec, codecs, rounded)):
            with visiting(host) as session:
                SplitModel(edge, RemoteLLM(session, codecs=chosen), loss_at).answer_loss(given).backward()
                moved[name] = sum(session.sent_bytes.values()) + sum(session.received_bytes.values())
            came = gradients(edge)
            far = max(((came[n] - exact[n]).norm() / exact[n].norm()).item() for n in exact)
            assert far == 0 if name == "none" else 0 < far < 0.05
    assert moved[codec] < moved["none"]


@pytest.mark.parametrize("cache", ["run", "none"])
def test_lossy_features_are_the_same_at_both_ends(llava, edge, local_llm, items, cache):
    """Rounded where they are made: the client's h and the host's base are of one image, so gradients are exact."""
    batch = collate(encode(edge, items, "int8"))
    SplitModel(edge, local_llm).answer_loss(batch).backward()
    wanted = gradients(edge)
    with served(llava, edge, local_llm) as (host, _), visiting(host) as session:
        SplitModel(edge, RemoteLLM(session, cache=cache, codecs=Codecs(features="int8"))).answer_loss(batch).backward()
    came = gradients(edge)
    assert all(torch.equal(came[name], wanted[name]) for name in wanted)


def test_batches_need_not_hold_features(llava, edge, local_llm, batch):
    """With no place to keep them they are made anew in every step, and travel with it."""
    SplitModel(edge, local_llm).answer_loss(batch).backward()
    wanted = gradients(edge)
    with served(llava, edge, local_llm) as (host, _), visiting(host) as session:
        SplitModel(edge, RemoteLLM(session)).answer_loss(batch).backward()
        assert "features" not in session.sent_bytes
    came = gradients(edge)
    assert all(torch.equal(came[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("loss_at", ["auto", "client"])
def test_error_feedback_keeps_each_adapters_own_residual(llava, local_llm, triple, featured, loss_at):
    """Branches whose gradients differ a thousandfold: a residual under the wrong name would drown the smaller."""
    losses = SplitModel(triple, local_llm).losses(featured, BRANCHES)
    train_on([losses[0], 1000 * losses[1]])
    wanted = all_gradients(triple)
    total = {name: torch.zeros_like(grad) for name, grad in wanted.items()}
    with served(llava, triple, local_llm) as (host, _), visiting(host) as session:
        model = SplitModel(triple, RemoteLLM(session, codecs=Codecs(gradients="int8")), loss_at)
        for _ in range(20):
            losses = model.losses(featured, BRANCHES)
            train_on([losses[0], 1000 * losses[1]])
            total = {name: total[name] + grad / 20 for name, grad in all_gradients(triple).items()}
    for name, grad in wanted.items():
        if name.endswith("up"):
            # with the loss at the client the logits' gradient travels too, each time with the same error
            assert (total[name] - grad).norm() < (2e-3 if loss_at == "auto" else 5e-2) * grad.norm(), name
