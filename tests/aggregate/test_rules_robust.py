"""Median, trimmed mean, Krum, norm clipping: numbers by hand, a second implementation, and what garbage can do."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from fedmm import tree
from fedmm.aggregate.krum import krum, multi_krum, scores
from fedmm.aggregate.mean import mean
from fedmm.aggregate.norm_clip import norm, norm_clip
from fedmm.aggregate.trimmed import median, trimmed_mean
from fedmm.types import Update

ROBUST = [median, trimmed_mean, krum, multi_krum]
SHAPES = {"image.down": (2, 4), "text.up": (5, 3)}


def clients(*deltas):
    """One weight or a few for each client, all in one tensor."""
    return [Update(client, {"w": torch.tensor(delta)}, 1) for client, delta in enumerate(deltas)]


def like_minded(count=5, spread=0.1, seed=0):
    """Clients who agree but for noise, as those of one task."""
    generator = torch.Generator().manual_seed(seed)
    common = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for client in range(count):
        delta = {n: t + spread * torch.randn(t.shape, generator=generator) for n, t in common.items()}
        yield Update(client, delta, 10)


def nothing():
    return {name: torch.zeros(shape) for name, shape in SHAPES.items()}


def flat(state):
    return np.concatenate([state[name].double().numpy().ravel() for name in SHAPES])


# ---- numbers by hand -------------------------------------------------------------------------------------------------

W = {"w": torch.tensor([1.0, 2.0])}


def test_median_by_hand():
    odd, _ = median(W, clients([1.0, 9.0], [2.0, -9.0], [9.0, 0.0]), {})
    assert odd["w"].tolist() == [1 + 2.0, 2 + 0.0]
    even, _ = median(W, clients([1.0, 9.0], [2.0, -9.0], [9.0, 0.0], [4.0, 1.0]), {})
    assert even["w"].tolist() == [1 + 3.0, 2 + 0.5]


def test_trimmed_mean_by_hand():
    """Of -9, 1, 2, 6, 900 the middle three have mean 3, the middle one is 2; the other coordinate is its mirror."""
    given = clients([900.0, -900.0], [1.0, -1.0], [6.0, -6.0], [-9.0, 9.0], [2.0, -2.0])
    for trim, wanted in ((0.2, 3.0), (1, 3.0), (0.3, 2.0), (2, 2.0), (0, 180.0)):  # 0.3 of five is two: rounded up
        merged, _ = trimmed_mean(W, given, {}, trim=trim)
        assert merged["w"].tolist() == [1 + wanted, 2 - wanted]


def test_krum_by_hand():
    """On a line at 0, 1, 3, 7, 100 with f = 1 the two nearest count.

    0: 1 + 9,  1: 1 + 4,  3: 4 + 9,  7: 16 + 36,  100: 93^2 + 97^2.  So 1 is followed, and of four all but 100.
    """
    given = clients([0.0], [1.0], [3.0], [7.0], [100.0])
    assert scores([u.delta for u in given], byzantine=1).tolist() == [10, 5, 13, 52, 93**2 + 97**2]
    state = {"w": torch.tensor([1.0])}
    assert krum(state, given, {})[0]["w"].tolist() == [1 + 1.0]
    assert multi_krum(state, given, {})[0]["w"].tolist() == [1 + 11 / 4]
    assert multi_krum(state, given, {}, keep=2)[0]["w"].tolist() == [1 + 0.5]


def test_of_equal_scores_krum_takes_the_first_client():
    given = clients([5.0], [5.0], [0.0], [5.0], [0.0], [0.0])
    assert krum({"w": torch.zeros(1)}, given, {})[0]["w"].tolist() == [5.0]
    assert krum({"w": torch.zeros(1)}, given[::-1], {})[0]["w"].tolist() == [0.0]


def test_norm_clip_by_hand():
    """The norm is over all tensors: (3, 4) has 5, and is halved for a bound of 2.5; what is shorter stays."""
    given = [
        Update(0, {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, 1),
        Update(1, {"a": torch.tensor([0.0]), "b": torch.tensor([1.0])}, 3),
    ]
    state = {"a": torch.zeros(1), "b": torch.zeros(1)}
    merged, _ = norm_clip(state, given, {}, bound=2.5)
    assert (merged["a"].tolist(), merged["b"].tolist()) == ([1.5 / 2], [(2 + 1) / 2])
    merged, _ = norm_clip(state, given, {}, bound=2.5, weights="examples")
    assert (merged["a"].tolist(), merged["b"].tolist()) == ([1.5 / 4], [(2 + 3) / 4])


def test_without_a_bound_it_is_the_median_of_the_norms():
    given = clients([1.0, 0.0], [0.0, 2.0], [30.0, 40.0])
    merged, _ = norm_clip({"w": torch.zeros(2)}, given, {})
    torch.testing.assert_close(merged["w"], torch.tensor([1 + 1.2, 2 + 1.6]) / 3)


def test_clients_within_the_bound_make_it_the_mean_to_the_bit():
    given, state = list(like_minded()), nothing()
    clipped, _ = norm_clip(state, given, {}, bound=1e3, weights="examples")
    assert tree.digest(clipped) == tree.digest(mean(state, given, {})[0])


# ---- a second implementation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_median_is_numpys(count):
    given = list(like_minded(count, spread=3.0))
    for name, merged in median(nothing(), given, {})[0].items():
        wanted = np.median(np.stack([u.delta[name].numpy() for u in given]), axis=0)
        np.testing.assert_allclose(merged.numpy(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("count", "trim"), [(5, 0.2), (10, 0.1), (10, 0.3), (25, 0.28), (7, 2), (5, 0)])
def test_trimmed_mean_is_scipys(count, trim):
    given = list(like_minded(count, spread=3.0))
    for name, merged in trimmed_mean(nothing(), given, {}, trim=trim)[0].items():
        share = trim if trim < 1 else trim / count + 1e-9
        wanted = stats.trim_mean(np.stack([u.delta[name].numpy() for u in given]), share + 1e-9, axis=0)
        np.testing.assert_allclose(merged.numpy(), wanted, rtol=0, atol=1e-6)


def krum_by_force(vectors, f, m):
    """Every set of n - f - 2 others is tried; the smallest sum is the score."""
    n = len(vectors)
    score = [
        min(
            sum(float(np.sum((vectors[k] - vectors[i]) ** 2)) for i in others)
            for others in itertools.combinations([i for i in range(n) if i != k], n - f - 2)
        )
        for k in range(n)
    ]
    best = sorted(range(n), key=lambda k: score[k])[:m]
    return sum(vectors[k] for k in best) / m


@pytest.mark.parametrize(("count", "byzantine", "keep"), [(5, 1, 1), (7, 2, 1), (7, 2, 5), (8, 1, 3), (3, 0, 3)])
def test_krum_is_that_by_force(count, byzantine, keep):
    given = list(like_minded(count, spread=3.0, seed=count))
    merged, _ = multi_krum(nothing(), given, {}, byzantine=byzantine, keep=keep)
    wanted = krum_by_force([flat(u.delta) for u in given], byzantine, keep)
    np.testing.assert_allclose(flat(merged), wanted, rtol=0, atol=1e-6)


# ---- garbage ---------------------------------------------------------------------------------------------------------

GARBAGE = {
    "1000 x": lambda t: 1000 * t,
    "sign flipped": lambda t: -t,
    "sign flipped, 1000 x": lambda t: -1000 * t,
    "NaN": lambda t: torch.full_like(t, torch.nan),
    "inf": lambda t: torch.full_like(t, torch.inf),
    "1e30": lambda t: torch.full_like(t, 1e30),
}


def with_garbage(kind, liar):
    """Five clients who agree but for noise, one of whom sends garbage and says that he has most examples."""
    return [
        Update(u.client, {n: GARBAGE[kind](t) for n, t in u.delta.items()}, 10**6) if u.client == liar else u
        for u in like_minded()
    ]


def off(state, liar):
    """How far the merged change is from the mean of the honest ones, in their greatest distance from it."""
    honest = np.stack([flat(u.delta) for u in like_minded() if u.client != liar])
    centre = honest.mean(axis=0)
    return np.linalg.norm(flat(state) - centre) / np.linalg.norm(honest - centre, axis=1).max()


@pytest.mark.parametrize("liar", [0, 4])
@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.parametrize("rule", ROBUST, ids=lambda rule: rule.__name__)
def test_one_of_five_sends_garbage_and_nothing_breaks(rule, kind, liar):
    """Robust rules stay among the honest clients; the mean leaves them far behind, or is no number any more."""
    given = with_garbage(kind, liar)
    assert off(rule(nothing(), given, {})[0], liar) <= 1.0
    moved = off(mean(nothing(), given, {}, weights="uniform")[0], liar)
    assert not moved < 2.0


@pytest.mark.parametrize("kind", ["1000 x", "sign flipped, 1000 x", "1e30"])
@pytest.mark.parametrize("bound", [None, 5.0])
def test_norm_clipping_bounds_what_one_client_can_do(kind, bound):
    """At most his share of the bound, which is the others' own size or a number."""
    given = with_garbage(kind, liar=2)
    without = [Update(u.client, tree.scale(u.delta, 0.0), 1) if u.client == 2 else u for u in given]
    limit = bound or sorted(norm(u.delta) for u in given)[2]
    here, there = (norm_clip(nothing(), each, {}, bound=limit)[0] for each in (given, without))
    assert norm(tree.subtract(here, there)) == pytest.approx(limit / 5, rel=1e-5)
    if bound is None:
        assert tree.digest(norm_clip(nothing(), given, {})[0]) == tree.digest(here)


@pytest.mark.parametrize("keep", [None, 1, 4])
def test_krum_goes_on_without_those_who_did_not_arrive(keep):
    """Of five one was refused: the other four bear as many as they can, which is none; two choose nobody."""
    given = [Update(client, {"w": torch.tensor([float(client)])}, 1) for client in range(4)]
    merged, _ = multi_krum({"w": torch.zeros(1)}, given, {}, byzantine=1, keep=keep)
    assert merged["w"].item() == pytest.approx({None: 1.5, 1: 1.0, 4: 1.5}[keep])
    assert multi_krum({"w": torch.zeros(1)}, given[:2], {}, byzantine=1)[0]["w"].item() == 0.0


@pytest.mark.parametrize(("trim", "count"), [(0.2, 2), (3, 5), (0.4, 1), (0.4, 4)])
def test_of_too_few_to_trim_it_is_the_median(trim, count):
    given = [Update(client, {"w": torch.tensor([float(client**2 + 1)])}, 1) for client in range(count)]
    merged, _ = trimmed_mean({"w": torch.zeros(1)}, given, {}, trim=trim)
    assert merged["w"].item() == median({"w": torch.zeros(1)}, given, {})[0]["w"].item() > 0


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "settings", "count", "words"),
    [
        (krum, {"byzantine": -1}, 6, "rule.byzantine must be at least 0, got -1"),
        (multi_krum, {"keep": 0}, 5, "rule.keep must be at least 1, .*got 0"),
        (trimmed_mean, {"trim": 0.5}, 9, "rule.trim must be a share from 0 to below 0.5, or a number from 1, got 0.5"),
        (trimmed_mean, {"trim": -0.2}, 5, "a share from 0"),
        (norm_clip, {"bound": 0.0}, 5, "rule.bound must be above 0, or null"),
    ],
)
def test_what_cannot_be_is_refused_with_the_knob(rule, settings, count, words):
    """On empty updates too, which is how a configuration can be tried before anything starts."""
    with pytest.raises(ValueError, match=words):
        rule({}, (Update(client, {}, 1) for client in range(count)), {}, **settings)
