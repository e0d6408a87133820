"""Laws over every rule's yaml, and numbers worked by hand on two clients."""

from __future__ import annotations

import typing
import weakref

import pytest
import torch

from fedmm import tree
from fedmm.adapters.nano import cut
from fedmm.aggregate.fisher import fisher
from fedmm.aggregate.gathered import Gathered
from fedmm.aggregate.mean import mean
from fedmm.aggregate.norm_clip import norm_clip
from fedmm.config import composition, targets
from fedmm.runs.folder import RunFolder, latest_checkpoint
from fedmm.types import Update

RULES = composition.options("rule")


def rule_of(name):
    return targets.make(composition.compose([f"rule={name}"]).rule)


def gathers(name):
    """Whether a rule's signature says that its memory grows with the clients."""
    return typing.get_type_hints(rule_of(name).func, include_extras=True)["updates"] == Gathered


RUNNING = [name for name in RULES if not gathers(name)]
OWN_LENGTH = {"fedadam", "fedyogi"}  # steps of about lr, whatever the length of the change
MIXED = {"exact_lowrank", "hetlora", "stack"}  # ranks: products of any rank have a mean, padded factors too
FRESH = {"stack"}  # products are folded, and factors start afresh
SHAPES = {"image.down": (2, 4), "image.up": (4, 2), "text.down": (2, 4), "text.up": (4, 2), "gate": (3,)}


def current():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def updates(count=5, still=False):
    generator = torch.Generator().manual_seed(1)
    for client in range(count):
        delta = {name: torch.randn(shape, generator=generator) * (not still) for name, shape in SHAPES.items()}
        sure = {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}
        yield Update(client, delta, 10 * (client + 1), sure)


def products(state):
    """What pairs stand for, with what is folded beside them; and what is no pair."""
    found = {kind: state[f"{kind}.up"] @ state[f"{kind}.down"] for kind in ("image", "text")}
    return {kind: product + state.get(f"{kind}.folded", 0) for kind, product in found.items()} | {"gate": state["gate"]}


@pytest.mark.parametrize("name", RULES)
def test_clients_who_changed_nothing_change_nothing(name):
    merged, _ = rule_of(name)(current(), updates(still=True), {})
    assert tree.digest(merged) == tree.digest(current())


@pytest.mark.parametrize("name", RULES)
def test_clients_who_agree_are_followed(name):
    step = {key: torch.full_like(tensor, 0.25) for key, tensor in current().items()}
    agreed = [Update(u.client, step, u.num_examples, u.fisher) for u in updates()]
    merged, _ = rule_of(name)(current(), agreed, {})
    followed = {key: tensor + 0.25 for key, tensor in current().items()}
    if name in OWN_LENGTH:
        assert all((tensor > current()[key]).all() for key, tensor in merged.items())
    for key in () if name in OWN_LENGTH else products(current()):
        torch.testing.assert_close(products(merged)[key], products(followed)[key], rtol=0, atol=1e-5)
    for key in current() if name not in OWN_LENGTH | FRESH else ():
        torch.testing.assert_close(merged[key], followed[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_renaming_the_clients_changes_nothing(name):
    given = list(updates())
    merged, _ = rule_of(name)(current(), given, {})
    renamed = [Update(9 - u.client, u.delta, u.num_examples, u.fisher) for u in reversed(given)]
    again, _ = rule_of(name)(current(), renamed, {})
    for key in merged:
        torch.testing.assert_close(merged[key], again[key], rtol=0, atol=1e-6)


def without(update, *names):
    delta, sure = ({n: t for n, t in state.items() if n not in names} for state in (update.delta, update.fisher))
    return Update(update.client, delta, update.num_examples, sure)


@pytest.mark.parametrize("name", RULES)
def test_a_tensor_that_nobody_sent_waits_with_its_memory(name):
    _, memory = rule_of(name)(current(), updates(), {})
    merged, kept = rule_of(name)(current(), [without(u, "text.down", "text.up") for u in updates()], memory)
    for key, tensor in current().items():
        assert torch.equal(merged[key], tensor) == key.startswith("text.")
    assert all(torch.equal(kept[key], tensor) for key, tensor in memory.items() if "text" in key)


@pytest.mark.parametrize("name", RULES)
def test_who_abstains_from_a_tensor_does_not_dilute_it(name):
    step = {key: torch.full_like(tensor, 0.25) for key, tensor in current().items()}
    agreed = [Update(u.client, step, u.num_examples, u.fisher) for u in updates(7)]
    given = [without(u, "image.down", "image.up") if u.client in (1, 4) else u for u in agreed]
    merged, _ = rule_of(name)(current(), given, {})
    whole, _ = rule_of(name)(current(), agreed, {})
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, whole[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_other_ranks_are_merged_or_refused_with_the_knob(name):
    def at(update, rank):
        delta, sure = (cut(state, rank) for state in (update.delta, update.fisher))
        return Update(update.client, delta, update.num_examples, sure)

    given = [at(u, 1 + u.client % 2) for u in updates()]
    if name not in MIXED:
        with pytest.raises(ValueError, match="set edge.ranks=null, or rule=hetlora"):
            rule_of(name)(current(), given, {})
        return
    merged, _ = rule_of(name)(current(), given, {})
    assert {k: merged[k].shape for k in current()} == {k: t.shape for k, t in current().items()}
    alone, _ = rule_of(name)(current(), [at(u, 1) for u in updates()], {})
    for key in ("image", "text"):
        assert not torch.allclose(products(merged)[key], products(alone)[key]), "the larger ones' last row counts"


def twice(state):
    """What the image adapter has, for the text adapter too."""
    return state | {key.replace("image", "text"): t for key, t in state.items() if key.startswith("image")}


@pytest.mark.parametrize("name", RULES)
def test_every_tensor_is_merged_alike(name):
    """Tensors with the same values get the same result: catches a weight applied to the first tensor only."""
    same = [Update(u.client, twice(u.delta), u.num_examples, twice(u.fisher)) for u in updates()]
    merged, _ = rule_of(name)(twice(current()), same, {})
    for factor in ("folded", "up") if name in FRESH else ("down", "up"):
        assert torch.equal(merged[f"image.{factor}"], merged[f"text.{factor}"])
    assert not any(torch.equal(merged[key], tensor) for key, tensor in twice(current()).items())


@pytest.mark.parametrize("name", RULES)
def test_inputs_stay_untouched_and_keys_and_dtypes_are_kept(name):
    rule, state, given = rule_of(name), current(), list(updates())
    _, memory = rule(state, given, {})
    inputs = [state, memory, *(u.delta for u in given), *(u.fisher for u in given)]
    before = [tree.digest(each) for each in inputs]
    merged, _ = rule(state, given, memory)
    assert before == [tree.digest(each) for each in inputs]
    assert {k: (merged[k].shape, merged[k].dtype) for k in state} == {k: (t.shape, t.dtype) for k, t in state.items()}
    assert merged.keys() - state.keys() == ({"image.folded", "text.folded"} if name in FRESH else set())


@pytest.mark.parametrize("name", RULES)
def test_no_update_and_no_tensor_change_nothing(name):
    """The latter is also how a configuration can be tried before anything starts: a rule refuses what it cannot do."""
    merged, _ = rule_of(name)(current(), [], {})
    assert tree.digest(merged) == tree.digest(current())
    assert rule_of(name)({}, (Update(client, {}, 3, {}) for client in range(5)), {}) == ({}, {})


@pytest.mark.parametrize("name", RULES)
def test_a_resumed_rule_goes_on_with_the_same_bits(name, tmp_path):
    rule = rule_of(name)
    first = rule(current(), updates(5), {})
    RunFolder(tmp_path, "", []).save_checkpoint(1, *first)
    _, *resumed = latest_checkpoint(tmp_path)
    straight, again = (rule(state, updates(6), memory) for state, memory in (first, resumed))
    assert [tree.digest(part) for part in straight] == [tree.digest(part) for part in again]


def hold_one_at_a_time(rule):
    """When an update is asked for, the tensors of those before the last are gone."""
    given: list[list[weakref.ref]] = []

    def watched():
        for update in updates():
            assert all(ref() is None for refs in given[:-1] for ref in refs), "an update's tensors are still held"
            given.append([weakref.ref(tensor) for state in (update.delta, update.fisher) for tensor in state.values()])
            yield update

    rule(current(), watched(), {})
    assert len(given) == 5


@pytest.mark.parametrize("name", RUNNING)
def test_updates_are_held_one_at_a_time(name):
    """Memory must not grow with the clients where a rule's signature does not say so."""
    hold_one_at_a_time(rule_of(name))


def test_a_bound_that_is_known_needs_no_gathering():
    hold_one_at_a_time(lambda *given: norm_clip(*given, bound=1.0))


def test_rules_that_can_run_do_not_say_that_they_gather():
    """Or the law above would be silenced by a word."""
    assert {"mean", "fisher", "fedavgm", "fedadam", "fedyogi"} <= set(RUNNING)


def two(first_delta, second_delta, first_fisher=None, second_fisher=None, counts=(1, 3)):
    given = zip((first_delta, second_delta), (first_fisher, second_fisher), counts, strict=True)
    return [
        Update(client, {"w": torch.tensor(delta)}, count, {"w": torch.tensor(sure)} if sure else None)
        for client, (delta, sure, count) in enumerate(given)
    ]


W = [1.0, 2.0, 3.0]


def test_mean_by_hand():
    given = two([4.0, 0.0, -8.0], [0.0, 4.0, 8.0])
    by_examples, _ = mean({"w": torch.tensor(W)}, given, {})
    assert by_examples["w"].tolist() == [1 + 1.0, 2 + 3.0, 3 + 4.0]  # weights 1/4 and 3/4
    uniform, _ = mean({"w": torch.tensor(W)}, given, {}, weights="uniform")
    assert uniform["w"].tolist() == [1 + 2.0, 2 + 2.0, 3 + 0.0]


def test_fisher_by_hand():
    """w + (F1 d1 + F2 d2) / (F1 + F2); the last coordinate nobody is sure of takes the mean of the deltas."""
    given = two([4.0, 0.0, -8.0], [0.0, 4.0, 2.0], [1.0, 1.0, 0.0], [3.0, 1.0, 0.0])
    merged, _ = fisher({"w": torch.tensor(W)}, given, {}, weights="uniform", normalise="none")
    assert merged["w"].tolist() == [1 + 1.0, 2 + 2.0, 3 - 3.0]


def test_fisher_by_hand_normalised_and_weighted():
    """Client 1's Fisher is a hundred times client 0's and counts no more: both have mean 1 before the weights 1 and 3.

    c0 = 1 * [3, 0, 0] / 1, c1 = 3 * [0, 300, 0] / 100: coordinate 0 follows client 0, 1 follows client 1, 2 the mean.
    """
    given = two([4.0, 4.0, 4.0], [8.0, 8.0, 8.0], [3.0, 0.0, 0.0], [0.0, 300.0, 0.0])
    merged, _ = fisher({"w": torch.tensor(W)}, given, {})
    torch.testing.assert_close(merged["w"], torch.tensor([1 + 4.0, 2 + 8.0, 3 + 7.0]), rtol=0, atol=1e-6)


def test_fisher_with_equal_certainty_is_the_mean():
    given = [
        Update(u.client, u.delta, u.num_examples, {k: torch.ones_like(t) for k, t in u.delta.items()})
        for u in updates()
    ]
    merged, _ = fisher(current(), given, {})
    plain, _ = mean(current(), given, {})
    for key in plain:
        torch.testing.assert_close(merged[key], plain[key], rtol=0, atol=1e-6)


def test_fisher_where_nobody_has_learnt_is_the_mean_to_the_bit():
    given = [Update(u.client, u.delta, u.num_examples, tree.zeros_like(u.delta)) for u in updates()]
    assert tree.digest(fisher(current(), given, {})[0]) == tree.digest(mean(current(), given, {})[0])


@pytest.mark.parametrize("count", [300, 2**31 - 1])
@pytest.mark.parametrize("tiny", [1e-27, 1e-30, 1e-38, 1e-44])
def test_fisher_bears_a_client_whose_certainty_is_next_to_nothing(tiny, count):
    given = [
        Update(
            u.client, u.delta, count, {k: torch.full_like(t, tiny if u.client else 1e-3) for k, t in u.delta.items()}
        )
        for u in updates()
    ]
    merged, _ = fisher(current(), given, {})
    assert tree.not_finite(merged) is None


def test_without_normalisation_a_large_loss_dominates():
    """What `normalise: trace` is there against."""
    given = two([0.0, 0.0, 0.0], [8.0, 8.0, 8.0], [1.0, 1.0, 1.0], [1e6, 1e6, 1e6], counts=(1, 1))
    raw, _ = fisher({"w": torch.tensor(W)}, given, {}, normalise="none")
    normal, _ = fisher({"w": torch.tensor(W)}, given, {}, normalise="trace")
    torch.testing.assert_close(raw["w"], torch.tensor(W) + 8, rtol=0, atol=1e-4)
    torch.testing.assert_close(normal["w"], torch.tensor(W) + 4, rtol=0, atol=1e-6)


def test_fisher_without_a_fisher_says_which_method_makes_one():
    with pytest.raises(ValueError, match="method=fednano or method=fednano_ef, or rule=mean"):
        fisher({"w": torch.tensor(W)}, two([1.0] * 3, [1.0] * 3), {})
