"""Methods against written-out loops, and the Fisher against one backward per sample."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import PROMPT, some_examples

from fedmm import seeds, tree
from fedmm.adapters.schema import fits
from fedmm.config import composition, targets
from fedmm.edge import frozen_modules
from fedmm.edge.prepare import batches, collate, encode, prepare
from fedmm.losses import answer_cross_entropy
from fedmm.methods.balanced import balanced_softmax, counts, logit_adjustment
from fedmm.methods.fednano import diagonal_fisher, fednano_ef, mean_of_squares
from fedmm.methods.lora import fedprox, lora
from fedmm.methods.sampling import class_balanced
from fedmm.model import SplitModel
from fedmm.train import rate_share, train
from fedmm.types import IGNORE, Step

SGD = functools.partial(torch.optim.SGD, lr=0.5)


def started(llava, llm, count=10):
    """A model at its common start, and ten examples to train on."""
    built, processor = frozen_modules.build(frozen_modules.take(*llava), rank=4, alpha=8.0)
    built.reset(seeds.generator(0, "test"))
    return SplitModel(built, llm), encode(built, prepare(some_examples(count), processor, PROMPT))


def trained(llava, llm, method, **options):
    model, items = started(llava, llm)
    anchor = model.edge.state()
    settings = {"make_optimizer": SGD, "seed": 0, "round": 1, "rounds": 2, "client": 0, "epochs": 2, "batch_size": 4}
    out = train(model, items, method, anchor=anchor, **{**settings, **options})
    return model, items, out, anchor


def test_the_loop_equals_a_written_out_one(llava, local_llm):
    model, *_ = trained(llava, local_llm, lora)
    written, items = started(llava, local_llm)
    optimizer = SGD(list(written.edge.trainable("shared").values()))
    for epoch in range(2):
        for batch in batches(items, 4, seeds.generator(0, f"batches/{epoch}", 1, 0)):
            optimizer.zero_grad()
            answer_cross_entropy(written(batch), batch.labels_BA).backward()
            optimizer.step()
    assert tree.digest(model.edge.state()) == tree.digest(written.edge.state())


def test_training_lowers_the_loss_and_moves_every_tensor(llava, local_llm):
    model, _, out, anchor = trained(llava, local_llm, lora, epochs=10)
    assert out.mean_loss < out.first_loss
    assert all(not torch.equal(anchor[name], tensor) for name, tensor in model.edge.state().items())


def test_a_cosine_lowers_the_rate_of_each_round_and_a_constant_does_not():
    assert [rate_share("constant", round, 4) for round in (1, 4)] == [1.0, 1.0]
    assert [round(rate_share("cosine", r, 4), 4) for r in (1, 2, 3, 4)] == [1.0, 0.8536, 0.5, 0.1464]


def test_the_schedule_scales_the_step(llava, local_llm):
    def moved(**options):
        options = {"epochs": 1, "batch_size": 10, "rounds": 2, **options}  # one step
        model, _, _, anchor = trained(llava, local_llm, lora, **options)
        return tree.subtract(model.edge.state(), anchor)["text.up"]

    torch.testing.assert_close(moved(round=2, schedule="cosine"), 0.5 * moved(round=2))


def test_a_clipped_step_has_the_norm_it_may_have(llava, local_llm):
    model, _, _, anchor = trained(llava, local_llm, lora, epochs=1, batch_size=10, clip_norm=1e-3)
    step = tree.subtract(model.edge.state(), anchor)
    norm = torch.stack([delta.norm() for delta in step.values()]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.5 * 1e-3), rtol=1e-3, atol=0)  # SGD at 0.5


def test_fedprox_with_mu_zero_is_lora_bit_for_bit(llava, local_llm):
    plain, *_ = trained(llava, local_llm, lora)
    proximal, *_ = trained(llava, local_llm, functools.partial(fedprox, mu=0.0))
    assert tree.digest(plain.edge.state()) == tree.digest(proximal.edge.state())


def test_fedprox_holds_near_the_anchor(llava, local_llm):
    def drift(mu):
        model, _, _, anchor = trained(llava, local_llm, functools.partial(fedprox, mu=mu), epochs=5)
        return sum(delta.pow(2).sum() for delta in tree.subtract(model.edge.state(), anchor).values())

    assert drift(0.5) < 0.7 * drift(0.0)


def test_fedprox_adds_half_mu_times_the_squared_distance(llava, local_llm):
    model, items = started(llava, local_llm)
    anchor = {name: tensor - 0.5 for name, tensor in model.edge.state().items()}
    batch = collate(items[:2])
    (loss,) = fedprox(model, batch, Step(1, 1, 1, 1, anchor), mu=0.1)
    count = sum(tensor.numel() for tensor in anchor.values())
    torch.testing.assert_close(loss, model.answer_loss(batch) + 0.05 * 0.25 * count)


def test_every_shuffle_is_its_own_and_repeats(llava, local_llm):
    _, items = started(llava, local_llm)

    def order(round, client, seed=0):
        return [
            id for batch in batches(items, 4, seeds.generator(seed, "batches/0", round, client)) for id in batch.ids
        ]

    assert order(1, 0) == order(1, 0)
    orders = {tuple(order(*place)) for place in ((1, 0), (2, 0), (1, 1), (1, 0, 5))}
    assert len(orders) == 4
    assert all(sorted(one) == sorted(order(1, 0)) for one in orders)


def test_the_fisher_is_squared_per_sample(llava, local_llm):
    model, items, out, _ = trained(llava, local_llm, lora)
    wanted = tree.zeros_like(model.edge.state())
    for item in items:  # one backward a sample, log p the sum over its answer's tokens
        batch = collate([item])
        model.edge.zero_grad()
        answer_cross_entropy(model(batch), batch.labels_BA, reduction="sum").backward()
        for name, parameter in model.edge.trainable("shared").items():
            wanted[name] += parameter.grad.pow(2) / len(items)
    for size in (1, 3, 32):
        found = diagonal_fisher(model, items, out.last, batch_size=size)
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-9)
    batch = collate(items)
    model.edge.zero_grad()
    model.answer_loss(batch).backward()
    square_of_mean = model.edge.trainable("shared")["text.up"].grad.pow(2)
    assert not torch.allclose(square_of_mean, wanted["text.up"], rtol=0.5), "the wrong formula must be told apart"


def test_at_the_start_nobody_is_sure_of_a(llava, local_llm):
    """B = 0 makes dL/dA = 0: what the rule's fall-back is for."""
    model, items = started(llava, local_llm)
    found = diagonal_fisher(model, items, Step(1, 1, 1, 1, model.edge.state()))
    assert found["text.down"].abs().sum() == 0 and found["image.down"].abs().sum() == 0
    assert found["text.up"].abs().sum() > 0


def test_the_fisher_leaves_the_adapters_as_they_are(llava, local_llm):
    model, items, out, _ = trained(llava, local_llm, lora)
    before = tree.digest(model.edge.state())
    diagonal_fisher(model, items, out.last, samples=3)
    assert tree.digest(model.edge.state()) == before


def test_the_fisher_of_some_examples_is_of_some_of_each_kind(llava, local_llm):
    """A client's examples may lie kind by kind, so they are taken evenly spaced."""
    model, items, out, _ = trained(llava, local_llm, lora)
    some = diagonal_fisher(model, items, out.last, samples=3)
    spaced = diagonal_fisher(model, [items[i * len(items) // 3] for i in range(3)], out.last)
    for name, wanted in spaced.items():
        assert torch.equal(some[name], wanted), name
    assert len(items) > 3 and not torch.equal(some["text.up"], diagonal_fisher(model, items[:3], out.last)["text.up"])


def test_ef_is_the_mean_of_the_squares_training_computed(llava, local_llm):
    model, items, out, _ = trained(llava, local_llm, fednano_ef)
    found = mean_of_squares(model, items, out.last)
    plain, *_ = trained(llava, local_llm, lora)
    assert tree.digest(plain.edge.state()) == tree.digest(model.edge.state()), "watching must not change training"

    written, _ = started(llava, local_llm)
    optimizer = SGD(list(written.edge.trainable("shared").values()))
    wanted, steps = tree.zeros_like(written.edge.state()), 0
    for epoch in range(2):
        for batch in batches(items, 4, seeds.generator(0, f"batches/{epoch}", 1, 0)):
            optimizer.zero_grad()
            written.answer_loss(batch).backward()
            for name, parameter in written.edge.trainable("shared").items():
                wanted[name] += parameter.grad.pow(2)
            optimizer.step()
            steps += 1
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name] / steps)


def test_a_loss_that_is_not_finite_ends_training_with_the_knob(llava, local_llm):
    def broken(model, batch, step):
        yield model.answer_loss(batch) * float("nan")

    with pytest.raises(ValueError, match=r"client 0, round 1: the loss is nan; lower optimizer.lr"):
        trained(llava, local_llm, broken)


# ---- long tails ---------------------------------------------------------------------------------------------------


class Said:
    """A model of three classes that says what it is given, and items and batches to go with it."""

    def __init__(self, logits: list[list[float]], truth: list[int]) -> None:
        self.logits_BAV = torch.tensor(logits, dtype=torch.float32)[:, None].requires_grad_()
        self.batch = SimpleNamespace(labels_BA=torch.tensor(truth)[:, None])

    def __call__(self, batch, use):
        return self.logits_BAV


def answered(*answers: list[int]) -> list[SimpleNamespace]:
    return [SimpleNamespace(answer=torch.tensor(a, dtype=torch.int32), truth=str(a)) for a in answers]


def step_with(*answers: list[int]) -> Step:
    return Step(1, 1, 1, 1, {}, {"begin": counts(None, answered(*answers))})


def test_counts_are_by_place():
    found = counts(None, answered([0, 3], [0, 3], [2, 3], [1, 1, 3]))["answers"]
    assert found.tolist() == [[2, 1, 1, 0], [0, 1, 0, 3], [0, 0, 0, 1]]


def test_balanced_softmax_by_hand():
    """Logits 0: what is left are the counts 6, 3, 1. And with other logits, e^z n / sum e^z n."""
    step = step_with(*6 * [[0]], *3 * [[1]], [2])
    (loss,) = balanced_softmax(model := Said([[0, 0, 0]], [2]), model.batch, step)
    assert loss.item() == pytest.approx(math.log(10))
    (loss,) = balanced_softmax(model := Said([[math.log(2), 0, math.log(5)]], [1]), model.batch, step)
    assert loss.item() == pytest.approx(-math.log(3 / (12 + 3 + 5)))
    loss.backward()
    assert model.logits_BAV.grad.flatten().tolist() == pytest.approx([0.6, 0.15 - 1, 0.25])


def test_alike_counts_change_nothing():
    step, logits, truth = step_with([0], [1], [2]), [[0.3, -1.0, 2.0], [1.0, 0.0, 0.5]], [0, 2]
    plain = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(truth))
    for method in (balanced_softmax, logit_adjustment, functools.partial(logit_adjustment, tau=3.0)):
        (loss,) = method(model := Said(logits, truth), model.batch, step)
        torch.testing.assert_close(loss, plain)


def test_a_class_that_a_client_lacks_gets_no_gradient_from_balanced_softmax_and_some_from_logit_adjustment():
    """Three classes of logits, of which the client's two answers name two: the third has a count of 0, log 0."""
    step, logits = step_with([0], [0], [1]), [[0.0, 0.0, 50.0]]
    (loss,) = balanced_softmax(model := Said(logits, [1]), model.batch, step)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3)), "however loud the absent class is"
    assert model.logits_BAV.grad.flatten().tolist() == pytest.approx([2 / 3, -2 / 3, 0])
    (loss,) = logit_adjustment(model := Said([[0.0, 0.0, 0.0]], [1]), model.batch, step)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(2 / 6)), "counts 3, 2 and 1 of 6"
    assert model.logits_BAV.grad.flatten().tolist() == pytest.approx([3 / 6, 2 / 6 - 1, 1 / 6])


def test_logit_adjustment_without_smoothing_is_balanced_softmax_and_tau_is_a_power():
    step, logits = step_with(*8 * [[0]], *2 * [[1]]), [[0.7, -0.2, 3.0]]
    (plain,) = balanced_softmax(model := Said(logits, [1]), model.batch, step)
    (same,) = logit_adjustment(model := Said(logits, [1]), model.batch, step, smoothing=0.0)
    torch.testing.assert_close(same, plain)
    same.backward()
    assert torch.isfinite(model.logits_BAV.grad).all()
    (squared,) = logit_adjustment(model := Said([[0, 0, 0]], [1]), model.batch, step, smoothing=0.0, tau=2.0)
    assert squared.item() == pytest.approx(-math.log(4 / (64 + 4)))
    for setting, wanted in (("smoothing=-1", "at least 0, got -1"), ("tau=0", "above 0, got 0")):
        with pytest.raises(ValueError, match=f"method.step.{setting.split('=')[0]} must be {wanted}"):
            composition.load(["arm=logit_adjustment", f"method.step.{setting}"])


def test_padded_places_count_nothing():
    """A batch of a short and a long answer: of the short one's second place nothing is asked."""
    step = step_with([0], [0], [1, 2])
    labels = torch.tensor([[0, IGNORE], [1, 2]])
    logits = torch.zeros(2, 2, 3, requires_grad=True)
    (loss,) = balanced_softmax(lambda batch, use: logits, SimpleNamespace(labels_BA=labels), step)
    assert loss.item() == pytest.approx((math.log(3 / 2) + math.log(3) + 0) / 3)
    loss.backward()
    assert torch.isfinite(logits.grad).all()


def test_what_begin_found_is_there_before_the_first_step(llava, local_llm):
    seen = []

    def looking(model, batch, step):
        seen.append((step.step, step.scratch["begin"]["answers"]))
        yield from lora(model, batch, step)

    trained(llava, local_llm, looking, begin=counts)
    _, items = started(llava, local_llm)
    assert seen[0][0] == 1 and all(found is seen[0][1] for _, found in seen)
    assert seen[0][1].equal(counts(None, items)["answers"]) and seen[0][1][0].sum() == len(items)


def test_each_class_is_drawn_as_often_whatever_its_size():
    items = answered(*90 * [[0]], *9 * [[1]], [2])
    drawn = [i for seed in range(60) for i in class_balanced(items, torch.Generator().manual_seed(seed))]
    assert len(drawn) == 60 * 100
    shares = torch.bincount(torch.tensor([int(items[i].answer) for i in drawn])) / len(drawn)
    assert (shares - 1 / 3).abs().max() < 0.03  # five standard deviations
    within = torch.bincount(torch.tensor(drawn), minlength=100)[90:99]
    assert within.max() < 1.4 * within.min(), "and those of a class alike"
    assert class_balanced(items, torch.Generator().manual_seed(1)) == class_balanced(
        items, torch.Generator().manual_seed(1)
    )


def test_sampling_orders_every_epoch_by_the_same_stream(llava, local_llm):
    """The loop draws with the generator of its batches, so that nothing else moves; without, it is as it was."""
    asked = []

    def backwards(items, generator):
        asked.append(torch.randperm(3, generator=generator).tolist())
        return [len(items) - 1] * len(items)

    def ids(model, batch, step):
        seen.extend(batch.ids)
        yield from lora(model, batch, step)

    seen: list[str] = []
    trained(llava, local_llm, ids, sampling=backwards)
    assert seen == ["train/9"] * 20
    assert asked == [torch.randperm(3, generator=seeds.generator(0, f"batches/{e}", 1, 0)).tolist() for e in (0, 1)]


@pytest.mark.parametrize(
    "name", sorted({*composition.options("method")} - {"creff"})
)  # of a classifier: test_classifier
def test_every_method_trains_what_it_says(llava, local_llm, name):
    """Over every yaml: the sets named are there, training moves them, and the Fisher has the state's shapes."""
    cfg = composition.compose([f"method={name}", "rule=mean"])
    built, processor = frozen_modules.build(frozen_modules.take(*llava), sets=tuple(cfg.method.sets), rank=4)
    for one in cfg.method.sets:
        built.reset(seeds.generator(0, "test"), one)
    schema = targets.make(cfg.schema)(2, 2)  # the last round: feddpa's local adapters train in it
    built.freeze_all_but(schema.trains)
    before = {one: built.state(one) for one in cfg.method.sets}
    model, items = SplitModel(built, local_llm), encode(built, prepare(some_examples(6), processor, PROMPT))
    anchor = before.get("shared", {})
    out = train(
        model,
        items,
        targets.make(cfg.method.step),
        make_optimizer=SGD,
        anchor=anchor,
        seed=0,
        round=2,
        rounds=2,
        client=0,
        begin=targets.make(cfg.method.begin),
    )
    for one in cfg.method.sets:
        moved = {key for key, tensor in built.state(one).items() if not torch.equal(before[one][key], tensor)}
        assert bool(moved) == any(fits(f"{one}.{key}", schema.trains) for key in before[one])
    if cfg.method.fisher:
        found = targets.make(cfg.method.fisher)(model, items, out.last)
        assert {k: t.shape for k, t in found.items()} == {k: t.shape for k, t in anchor.items()}
        assert all((tensor >= 0).all() for tensor in found.values())
