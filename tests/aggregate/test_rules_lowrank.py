"""The mean of products: against the dense one, its truncation against numpy's SVD, and each rule's error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedmm import tree
from fedmm.aggregate.exact_lowrank import exact_lowrank, refactor
from fedmm.aggregate.hetlora import hetlora
from fedmm.aggregate.lowrank import Pair, Product, factors, pairs, product_error
from fedmm.aggregate.mean import mean
from fedmm.types import Update

COUNTS = (1, 3, 2, 7, 4)
PAIR = Pair("image", "image.down", "image.up")


def cut_to(delta, rank):
    return {name: t if "gate" in name else t[:rank] if "down" in name else t[:, :rank] for name, t in delta.items()}


def state(rank=3, down=8, up=6, seed=0):
    """Two adapters, wider on one side than on the other, and something that is no pair."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"image.down": (rank, down), "image.up": (up, rank), "text.down": (rank, down), "text.up": (up, rank)}
    return {n: torch.randn(shape, generator=generator) for n, shape in (shapes | {"gate": (5,)}).items()}


def drifted(current, counts=COUNTS, size=0.5):
    generator = torch.Generator().manual_seed(1)
    for client, count in enumerate(counts):
        delta = {name: size * torch.randn(t.shape, generator=generator) for name, t in current.items()}
        yield Update(client, delta, count)


def dense(current, updates, name="image"):
    """The weighted mean of products, written out."""
    factors = [{n: (current[n].double() + u.delta[n].double()).numpy() for n in current} for u in updates]
    products = [u.num_examples * f[f"{name}.up"] @ f[f"{name}.down"] for u, f in zip(updates, factors, strict=True)]
    return sum(products) / sum(u.num_examples for u in updates)


def product(merged, name="image"):
    return merged[f"{name}.up"].double().numpy() @ merged[f"{name}.down"].double().numpy()


def relative(got, wanted):
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


# ---- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [6, 7, 9])  # of products 6 x 8: as many as there can be, and more
def test_at_full_rank_it_is_the_mean_of_products(rank):
    current = state(rank)
    given = list(drifted(current))
    merged, _ = exact_lowrank(current, iter(given), {})
    for name in ("image", "text"):
        assert relative(product(merged, name), dense(current, given, name)) < 1e-6
    assert relative(product(mean(current, given, {})[0]), dense(current, given)) > 0.01


@pytest.mark.parametrize("clients", [2, 5, 40])  # 40 at rank 3 are 120 columns, which are multiplied out on the way
def test_at_rank_r_the_error_is_that_of_the_discarded_singular_values(clients):
    current = state()
    given = list(drifted(current, counts=range(1, clients + 1), size=1.0))
    merged, _ = exact_lowrank(current, iter(given), {})
    exact = dense(current, given)
    values = np.linalg.svd(exact, compute_uv=False)
    discarded = np.sqrt((values[3:] ** 2).sum()) / np.linalg.norm(exact)
    assert discarded > 0.01
    assert relative(product(merged), exact) == pytest.approx(discarded, abs=1e-6)
    told = product_error(merged, current, iter(given))
    assert told["image"] == pytest.approx(discarded, abs=1e-6)


def test_clients_of_any_rank_have_a_mean_of_products():
    """At the rank of the products it is exact: also where some clients have one row of A and one column of B."""
    current = state(6)
    given = [Update(u.client, cut_to(u.delta, 1 + u.client), u.num_examples) for u in drifted(current)]
    merged, _ = exact_lowrank(current, iter(given), {})
    wanted = sum(
        u.num_examples / sum(COUNTS) * np.matmul(*(factor.numpy() for factor in factors(PAIR, current, u)))
        for u in given
    )
    assert relative(product(merged), wanted) < 1e-6
    assert factors(PAIR, current, given[1])[0].shape == (6, 2)
    assert product_error(merged, current, given)["image"] < 1e-6


def test_where_all_have_less_than_the_servers_rank_its_other_rows_stay():
    current = state(6)
    given = [Update(u.client, cut_to(u.delta, 2), u.num_examples) for u in drifted(current)]
    merged, _ = exact_lowrank(current, given, {})
    assert product_error(merged, current, given)["image"] < 1e-6
    was, now = torch.linalg.svdvals(mean_of_rows(current, given)), torch.linalg.svdvals(merged["image.down"])
    torch.testing.assert_close(now, was, rtol=1e-4, atol=1e-5)


def mean_of_rows(current, given):
    """mean(A), what a client lacks taken as not changed."""
    total = sum(u.num_examples for u in given)
    rows = current["image.down"].clone()
    for u in given:
        rows[:2] += u.num_examples / total * u.delta["image.down"]
    return rows


def test_hetlora_by_hand():
    """Ranks 1 and 2, products of norms 3 and 1: so weights 3/4 and 1/4; A's second row is a quarter of client 1's."""
    current = {"text.down": torch.eye(2), "text.up": torch.zeros(2, 2)}
    small = {"text.down": torch.zeros(1, 2), "text.up": torch.tensor([[3.0], [0.0]])}
    large = {"text.down": torch.zeros(2, 2), "text.up": torch.tensor([[0.0, 0.0], [0.0, 1.0]])}
    merged, _ = hetlora(current, [Update(0, small, 1), Update(1, large, 100)], {})
    torch.testing.assert_close(merged["text.up"], torch.tensor([[2.25, 0.0], [0.0, 0.25]]))
    torch.testing.assert_close(merged["text.down"], torch.tensor([[1.0, 0.0], [0.0, 0.25]]))


def test_no_pair_takes_the_plain_mean():
    current = state()
    merged, _ = exact_lowrank(current, drifted(current), {})
    assert torch.equal(merged["gate"], mean(current, drifted(current), {})[0]["gate"])


def test_an_adapter_that_nobody_moved_keeps_its_bits_beside_one_that_moved():
    current = state()
    given = [
        Update(u.client, u.delta | {n: torch.zeros_like(t) for n, t in current.items() if "text" in n}, u.num_examples)
        for u in drifted(current)
    ]
    merged, _ = exact_lowrank(current, given, {})
    for factor in ("down", "up"):
        assert torch.equal(merged[f"text.{factor}"], current[f"text.{factor}"])
        assert not torch.equal(merged[f"image.{factor}"], current[f"image.{factor}"])


def test_changes_that_cancel_are_changes():
    """Their mean is zero, that of their products is not."""
    current = state()
    step = next(drifted(current)).delta
    given = [Update(0, step, 1), Update(1, tree.scale(step, -1.0), 1)]
    merged, _ = exact_lowrank(current, given, {})
    assert relative(product(merged), product(current)) > 0.01
    assert relative(product(merged), dense(current, given)) < relative(product(current), dense(current, given))


def test_clients_without_examples_count_nothing():
    current = state()
    merged, _ = exact_lowrank(current, drifted(current, counts=(0, 0)), {})
    assert tree.digest(merged) == tree.digest(current)
    assert product_error(merged, current, drifted(current, counts=(0, 0))) == {}


# ---- which factors ---------------------------------------------------------------------------------------------------


def test_one_client_gets_its_own_factors_back():
    current = state()
    only = next(drifted(current))
    merged, _ = exact_lowrank(current, [only], {})
    for name in current:
        torch.testing.assert_close(merged[name], current[name] + only.delta[name], rtol=0, atol=1e-6)


def test_the_rows_of_a_are_turned_and_nothing_else():
    """Their lengths and angles are those of the mean; projected instead, A is short where clients went apart."""
    current = state()
    down = exact_lowrank(current, drifted(current), {})[0]["image.down"]
    plain = mean(current, drifted(current), {})[0]["image.down"]
    torch.testing.assert_close(down @ down.T, plain @ plain.T, rtol=0, atol=1e-5)
    assert not torch.allclose(down, plain, atol=0.1)


def test_the_rows_of_a_are_turned_no_more_than_needed():
    """Of all W S Q N with a rotation Q, Q = 1 is nearest to the mean just where S W^T mean N^T is symmetric."""
    current = state()
    current["image.down"] *= torch.tensor([[3.0], [1.0], [0.3]])  # rows of one length would not show how they weigh
    down = exact_lowrank(current, drifted(current), {})[0]["image.down"].double()
    plain = mean(current, drifted(current), {})[0]["image.down"].double()
    W, S, N = torch.linalg.svd(down, full_matrices=False)
    pull = S[:, None] * W.T @ plain @ N.T
    torch.testing.assert_close(pull, pull.T, rtol=0, atol=1e-5)


def test_with_a_common_a_it_is_the_mean_of_b():
    current = state()
    given = [
        Update(u.client, {n: t * ("down" not in n) for n, t in u.delta.items()}, u.num_examples)
        for u in drifted(current)
    ]
    merged, _ = exact_lowrank(current, given, {})
    plain, _ = mean(current, given, {})
    for name in current:
        torch.testing.assert_close(merged[name], plain[name], rtol=0, atol=1e-6)


def test_from_b_at_zero_a_stays_near_where_it_was():
    """The first round: no direction of A may die, nor may A be turned or scaled, for steps as small as one likes."""
    current = {n: t * ("up" not in n) for n, t in state().items()}
    merged, _ = exact_lowrank(current, drifted(current, size=1e-3), {})
    assert relative(merged["image.down"].numpy(), current["image.down"].numpy()) < 1e-2
    assert relative(product(merged), dense(current, list(drifted(current, size=1e-3)))) < 1e-2


def test_where_the_products_are_zero_a_is_the_mean_and_b_is_zero():
    current = {n: t * ("up" not in n) for n, t in state().items()}
    given = [
        Update(u.client, {n: t * ("up" not in n) for n, t in u.delta.items()}, u.num_examples) for u in drifted(current)
    ]
    merged, _ = exact_lowrank(current, given, {})
    torch.testing.assert_close(merged["image.down"], mean(current, given, {})[0]["image.down"], rtol=0, atol=1e-6)
    assert merged["image.up"].abs().max() < 1e-6


def test_products_of_lower_rank_leave_the_rest_of_a_alive():
    """Only one column of B has moved: one direction is known, the others come from the mean of A."""
    current = {n: t * ("up" not in n) for n, t in state().items()}
    given = []
    for u in drifted(current):
        delta = {n: torch.zeros_like(t) for n, t in u.delta.items()}
        delta["image.up"][:, 0] = u.delta["image.up"][:, 0]
        given.append(Update(u.client, delta, u.num_examples))
    merged, _ = exact_lowrank(current, given, {})
    torch.testing.assert_close(merged["image.down"], current["image.down"], rtol=0, atol=1e-5)
    assert relative(product(merged), dense(current, given)) < 1e-6


def test_a_mean_of_a_that_vanishes_harms_nothing():
    """Clients with A and -A, B and -B: the products agree, the factors cancel."""
    current = tree.scale(state(), 0.0)
    step = next(drifted(state())).delta
    merged, _ = exact_lowrank(current, [Update(0, step, 1), Update(1, tree.scale(step, -1.0), 1)], {})
    assert relative(product(merged), product(step)) < 1e-6
    assert all(torch.isfinite(tensor).all() for tensor in merged.values())


def test_lapacks_signs_are_not_seen(monkeypatch):
    """Other LAPACKs choose other signs for the columns of Q and the singular vectors."""
    current = state()
    merged, _ = exact_lowrank(current, drifted(current), {})
    generator = torch.Generator().manual_seed(2)
    qr, svd = torch.linalg.qr, torch.linalg.svd

    def signs(count):
        return (torch.randint(2, (count,), generator=generator) * 2 - 1).double()

    def other_qr(matrix, **options):
        Q, R = qr(matrix, **options)
        s = signs(len(R))
        return torch.return_types.linalg_qr((Q * s, s[:, None] * R))

    def other_svd(matrix, **options):
        U, S, Vh = svd(matrix, **options)
        s = signs(len(S))
        return torch.return_types.linalg_svd((U * s, S, s[:, None] * Vh))

    monkeypatch.setattr(torch.linalg, "qr", other_qr)
    monkeypatch.setattr(torch.linalg, "svd", other_svd)
    for _ in range(5):
        again, _ = exact_lowrank(current, drifted(current), {})
        for name in merged:
            torch.testing.assert_close(again[name], merged[name], rtol=0, atol=1e-7)


def test_equal_singular_values_are_no_matter():
    """A product with one value three times over: its singular vectors may be rotated at will."""
    identity = torch.eye(5, dtype=torch.float64)[:, :3]
    near = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angle = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    one = refactor(identity, identity.T, near @ identity @ identity.T)
    other = refactor(identity @ angle, angle.T @ identity.T, near @ identity @ identity.T)
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


# ---- the error -------------------------------------------------------------------------------------------------------


def test_the_mean_of_factors_has_the_error_of_its_dense_product():
    current = state()
    merged, _ = mean(current, drifted(current), {})
    told = product_error(merged, current, drifted(current))
    assert told.keys() == {"image", "text"}
    for name, error in told.items():
        wanted = relative(product(merged, name), dense(current, list(drifted(current)), name))
        assert error == pytest.approx(wanted, rel=1e-9)
    alike = product_error(merged, current, drifted(current), weights="uniform")
    assert alike["image"] != pytest.approx(told["image"], rel=0.01)


def test_the_error_of_the_exact_mean_is_nothing_and_of_nothing_is_nothing():
    current = state()
    still = [Update(u.client, tree.scale(u.delta, 0.0), u.num_examples) for u in drifted(current)]
    assert product_error(current, current, still)["image"] < 1e-12
    zero = tree.scale(current, 0.0)
    assert product_error(zero, zero, still) == {"image": 0.0, "text": 0.0}
    assert product_error(current, zero, still)["image"] == float("inf")


def test_pairs_are_known_by_their_names():
    names = ["image.down", "image.up", "encoder.q_proj.lora_A", "encoder.q_proj.lora_B", "text.down", "gate", "up"]
    found = pairs(
        dict.fromkeys(names, torch.zeros(2, 2)) | {"c.lora_A": torch.zeros(2, 2, 1), "c.lora_B": torch.zeros(2)}
    )
    wanted = [("image", "down", "up"), ("encoder.q_proj", "lora_A", "lora_B")]
    assert list(found) == [Pair(n, f"{n}.{down}", f"{n}.{up}") for n, down, up in wanted]


def test_the_sum_of_products_does_not_grow_without_end():
    product, widths = Product(), []
    for _ in range(200):
        product = product.plus(torch.ones(6, 3), torch.ones(3, 8), 0.5)
        widths.append(product.mean()[0].shape[1])
    assert max(widths) == 2 * 8 - 1  # in steps of 3, from 8 after each time
    left, right = product.mean()
    torch.testing.assert_close(left @ right, torch.full((6, 8), 3.0).double())


class Largest(TorchDispatchMode):
    """The most elements that any tensor had."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.count = max(self.count, tensor.numel())
        return out


def test_the_product_is_never_formed():
    """Three clients of width 3,000 and rank 2 have factors of 18,000 numbers a side; the product has 9 million."""
    current = state(rank=2, down=3000, up=3000)
    given = list(drifted(current, counts=(1, 2, 3)))
    with Largest() as largest:
        merged, _ = exact_lowrank(current, given, {})
        product_error(merged, current, given)
    assert largest.count <= 3000 * 2 * 4
