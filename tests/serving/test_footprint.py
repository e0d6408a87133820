"""What a step takes of memory is known before it runs, and a step that takes too much is refused before it does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import served, visiting

from fedmm.bench import served as bench
from fedmm.link.session import HostRefused
from fedmm.llm.local import LocalLLM
from fedmm.losses import Mutual
from fedmm.peak import peak_bytes
from fedmm.serving.footprint import LEAST_BYTES, Curve, Footprint, Shape, default_limit_bytes
from fedmm.types import Embeds

SHAPES = replace(bench.SHAPES["toy"], T=256, D=128, V=500)
MB = 1 << 20


@pytest.fixture(scope="module", params=[False, True], ids=["kept", "checkpointing"])
def llm(request):
    return LocalLLM(bench.llava(SHAPES, layers=4, heads=4, head=32, mlp=300), checkpointing=request.param)


@pytest.fixture(scope="module")
def footprint(llm):
    """Of tensors alone; what the heap adds is measured by `fedmm bench trust`."""
    return replace(Footprint.measured(llm, limit_bytes=1 << 40), overhead=1.0)


def inputs(B, T, A):
    mask_BT = torch.ones(B, T, dtype=torch.bool)
    mask_BT[0, T - 1 :] = False
    return mask_BT, torch.arange(A).repeat(B, 1), torch.ones(B, A, dtype=torch.int64)


@pytest.mark.parametrize(
    ("B", "T", "A", "branches", "mutual"),
    [
        (1, 16, 1, 1, False),
        (1, 256, 1, 1, False),
        (8, 100, 4, 1, False),
        (2, 40, 40, 2, True),
        (1, 8, 8, 6, True),
        (4, 64, 3, 3, False),
    ],
)
def test_the_estimate_is_above_the_peak_of_a_training_step_and_not_far(llm, footprint, B, T, A, branches, mutual):
    mask_BT, keep_BA, labels_BA = inputs(B, T, A)

    def step():
        leaves = [torch.randn(B, T, SHAPES.D).requires_grad_() for _ in range(branches)]
        learning = Mutual((1.0,) * branches, 2.0) if mutual else None
        losses = llm.losses([Embeds.whole(leaf) for leaf in leaves], mask_BT, keep_BA, labels_BA, learning)
        torch.autograd.grad(torch.stack(losses).sum(), leaves)

    pairs = B * branches * (branches - 1) if mutual else 0
    estimate = footprint.bytes(Shape(B * branches, T, A, pairs, grad=True))
    peak = peak_bytes(llm.device, step)
    assert peak <= estimate <= 5 * peak, (
        "with checkpointing each branch counts a layer made again, and one is at a time"
    )


@pytest.mark.parametrize(("B", "T", "tokens"), [(1, 16, 1), (8, 30, 8), (2, 200, 40)])
def test_the_estimate_is_above_the_peak_of_an_answer_and_not_far(llm, footprint, B, T, tokens):
    mask_BT, _, _ = inputs(B, T, 1)
    peak = peak_bytes(llm.device, lambda: llm.generate(Embeds.whole(torch.randn(B, T, SHAPES.D)), mask_BT, [], tokens))
    assert peak <= footprint.bytes(Shape(B, T, tokens=tokens)) <= 4 * peak


def test_a_peak_counts_what_is_alive_at_once():
    def work():
        for _ in range(5):
            torch.zeros(MB).add(1.0)  # 4 MB, and 4 MB more; views are not new
            torch.ones(MB).view(4, -1).T[0]

    assert peak_bytes(torch.device("cpu"), work) == 8 * MB


def test_a_curve_goes_through_its_points_or_above():
    law = {x: 7 + 3 * x + 2 * x * x for x in (16, 32, 64)}
    assert Curve.above(law) == Curve(7.0, 3.0, 2.0)
    bent = Curve.above({16: 100, 32: 300, 64: 400})  # a bend downwards is not carried on
    assert bent.square == 0 and all(bent.bytes(1, x) >= y for x, y in {16: 100, 32: 300, 64: 400}.items())
    assert Curve.above({8: 80}) == Curve(80.0, 0.0, 0.0)


def test_the_limit_is_a_share_of_what_is_free(monkeypatch):
    monkeypatch.setattr("fedmm.storage.memory.free_bytes", lambda: 21 << 30)
    cpu = torch.device("cpu")
    assert default_limit_bytes(cpu, 1, 1 << 30) == pytest.approx(0.8 * (20 << 30), rel=1e-6)
    assert 2.2 < default_limit_bytes(cpu, 1, 0) / default_limit_bytes(cpu, 2, 0) < 2.3, "and a small one beside two"
    assert default_limit_bytes(cpu, 2, 1 << 40) == LEAST_BYTES


def huge(B, T, D=16):
    """A factored step without images: 6 bytes a position, and 4 more of h."""
    shape = torch.ones(B, T, dtype=torch.bool)
    return {
        "mask": shape,
        "tokens": torch.ones(B, T, dtype=torch.int32),
        "image": ~shape,
        "keep": torch.zeros(B, 1, dtype=torch.int64),
        "labels": torch.ones(B, 1, dtype=torch.int64),
        "h.0": torch.zeros(B * T, 1),
        "up.0": torch.ones(D, 1),
    }


FACTORED = {"terms": [["text", 1.0, "a"]], "branches": [1], "grads": ["h.0"]}
DENSE = {"branches": 1, "grads": ["whole.0"]}


@pytest.mark.parametrize(
    ("verb", "meta"),
    [
        ("loss", FACTORED),
        ("loss", {**FACTORED, "grads": []}),
        ("loss", {**FACTORED, "branches": [1, *[0] * 40], "grads": [], "B": 70}),
        ("loss", DENSE),
        ("forward", {**FACTORED, "step": 1}),
        ("squares", {**FACTORED, "grads": []}),
        ("generate", {**FACTORED, "grads": [], "max_tokens": 4, "scales": []}),
    ],
)
def test_a_step_over_its_memory_is_refused_before_anything_is_made_for_it(llava, edge, local_llm, verb, meta):
    with served(llava, edge, local_llm, step_memory_bytes=8 * MB) as (host, _), visiting(host) as session:
        passes = []
        hook = local_llm.decoder.register_forward_hook(lambda *_: passes.append(1))
        B, meta = meta.get("B", 1500), {key: value for key, value in meta.items() if key != "B"}
        dense = {"whole.0": torch.zeros(B, 40, 16)} if meta["branches"] == 1 else {}
        with pytest.raises(HostRefused, match=r"a step of \d+ rows with 4\d positions takes about \d+ MB.*at most 8;.*"
                           r"lower batch_size at the client, or raise link.step_memory_mb"):  # fmt: skip
            session.call(verb, huge(B, 40) | dense, **meta)
        assert not passes
        assert torch.isfinite(session.call("loss", huge(3, 40), **FACTORED).tensors["losses"]).all()
        assert passes
        hook.remove()


def test_the_logits_of_branches_that_learn_from_each_other_count(llava, edge, local_llm):
    """64 branches have 4032 pairs, each with logits of its own."""
    with served(llava, edge, local_llm, step_memory_bytes=16 * MB) as (host, _), visiting(host) as session:
        meta = {**FACTORED, "branches": [1, *[0] * 63], "grads": []}
        wide = {"keep": torch.zeros(4, 20, dtype=torch.int64), "labels": torch.ones(4, 20, dtype=torch.int64)}
        session.call("loss", huge(4, 20) | wide, **meta)
        with pytest.raises(HostRefused, match=r"link.step_memory_mb"):
            session.call("loss", huge(4, 20) | wide, **meta, weights=[1.0] * 64, temperature=1.0)


def test_prompt_and_answer_are_within_the_positions_of_the_llm(llava, edge, local_llm):
    with served(llava, edge, local_llm) as (host, _), visiting(host) as session:
        meta = {**FACTORED, "grads": [], "scales": []}
        assert session.call("generate", huge(1, 60), max_tokens=4, **meta).tensors["tokens"].shape[0] == 1
        with pytest.raises(HostRefused, match=r"60 positions and 5 tokens.*the LLM has 64.*evaluate.max_tokens"):
            session.call("generate", huge(1, 60), max_tokens=5, **meta)
