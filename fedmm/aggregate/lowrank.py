"""Low-rank pairs in a state, and the mean of their products.

    P = sum_k p_k B_k A_k / sum_k p_k           the exact mean of products
    error = |B A - P| / |P|                     of a merged pair B, A; Frobenius norms

The mean of factors is another thing: the mean of B times the mean of A leaves out how the clients' A and B vary
together. A pair is `.up` (B) and `.down` (A) of a NanoAdapter, or peft's `lora_B` and `lora_A`; the scale alpha / r is
the same everywhere and left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fedmm.aggregate import running
from fedmm.aggregate.gathered import Gathered
from fedmm.types import State, Update

Paired = Annotated[State, "of a rule that looks at B and A of a pair together"]
Folded = Annotated[State, "of a rule that looks at pairs and folds their products into the base"]

_UP = {"down": "up", "lora_A": "lora_B"}


@dataclass(frozen=True)
class Pair:
    """The names of the two factors of a product B A, and of what they have in common."""

    name: str
    down: str
    up: str


def pairs(state: State) -> Iterator[Pair]:
    """Every pair of matrices in a state; what else is in it is no product."""
    for key, tensor in state.items():
        name, _, end = key.rpartition(".")
        up = f"{name}.{_UP.get(end, '')}"
        if up in state and tensor.ndim == state[up].ndim == 2:
            yield Pair(name, key, up)


def whole_pairs(state: State, rule: str) -> list[Pair]:
    """Every pair. Raises ValueError for a factor without its other: of a product that is not here there is no mean."""
    found = list(pairs(state))
    whole = {name for pair in found for name in (pair.down, pair.up)}
    if half := [key for key in state if key not in whole and key.rpartition(".")[2] in {*_UP, *_UP.values()}]:
        raise ValueError(
            f"{rule} merges products B A, but {half[0]!r} travels without its other factor; set schema=all or rule=mean"
        )
    return found


@dataclass(frozen=True)
class Product:
    """A running weighted sum of products, as factors side by side: [p_1 B_1, p_2 B_2, ...] [A_1; A_2; ...].

    In float64. It grows by R columns a client up to 2 I; then it is multiplied out, once in I / R clients, and stays
    within that for any number of them. LLaVA-1.5 at rank 64: 4.2 MB a client and pair, never more than 537 MB.
    """

    lefts: tuple[Float[Tensor, "O _"], ...] = ()
    rights: tuple[Float[Tensor, "_ I"], ...] = ()
    total: float = 0.0

    def plus(self, up_OR: Float[Tensor, "O R"], down_RI: Float[Tensor, "R I"], weight: float) -> Product:
        lefts, rights = (*self.lefts, weight * up_OR.double()), (*self.rights, down_RI.double())
        if sum(map(len, rights)) > 2 * down_RI.shape[1]:
            lefts, rights = (torch.cat(lefts, 1) @ torch.cat(rights),), (torch.eye(down_RI.shape[1]).to(rights[0]),)
        return Product(lefts, rights, self.total + weight)

    def mean(self) -> tuple[Float[Tensor, "O M"], Float[Tensor, "M I"]]:
        """Factors of the weighted mean, as many columns as there are now."""
        return torch.cat(self.lefts, 1) / self.total, torch.cat(self.rights)


def plus(products: Mapping[Pair, Product], current: State, update: Update, weight: float) -> dict[Pair, Product]:
    """The sums of products after one more client; those of which it sent neither factor stay as they are."""
    return {
        pair: product.plus(*factors(pair, current, update), weight)
        if {pair.up, pair.down} & update.delta.keys()
        else product
        for pair, product in products.items()
    }


def factors(pair: Pair, current: State, update: Update) -> tuple[Float[Tensor, "O R"], Float[Tensor, "R I"]]:
    """A client's own B and A, at its own rank, in float64; it must have sent one of them."""
    up, down = update.delta.get(pair.up), update.delta.get(pair.down)
    R = len(down) if down is not None else update.delta[pair.up].shape[1]
    up_OR, down_RI = current[pair.up][:, :R].double(), current[pair.down][:R].double()
    return up_OR if up is None else up_OR + up.double(), down_RI if down is None else down_RI + down.double()


def padded(delta: Tensor, like: Tensor) -> Tensor:
    """A change of the first rows or columns of `like` as one of it all, zero beyond."""
    if delta.shape == like.shape:
        return delta
    (rows, columns), (R, C) = delta.shape, like.shape
    return F.pad(delta, (0, C - columns, 0, R - rows))


def product_error(
    merged: State,
    current: State,
    updates: Gathered,
    *,
    scale: float = 0.0,
    weights: running.Weights = "examples",
) -> dict[str, float]:
    """How far each merged pair's product is from the exact mean of the clients' products, relative to that.

    `scale` is the adapters' alpha / r, of which a pair on a folded base needs to know (`on_base`).
    By the names of the pairs; without any example behind the updates there is no mean, and nothing to tell. Reads
    the updates once, and never forms a product but where clients are many (`Product`): a difference of products is one
    product too, [B, -L] [A; R], and its norm is that of the triangular factors.
    """
    products = {pair: Product() for pair in pairs(current)}
    for update in updates:
        products = plus(products, current, update, running.share(update, weights))
    return {
        pair.name: _error(*_whole(pair, merged, current), *on_base(*product.mean(), pair, current, scale))
        for pair, product in products.items()
        if product.total
    }


def on_base(
    left_OM: Float[Tensor, "O M"], right_MI: Float[Tensor, "M I"], pair: Pair, current: State, scale: float
) -> tuple[Float[Tensor, "O M"], Float[Tensor, "M I"]]:
    """A product as it acts on what is before all adapters: of what `stack` has folded away under it, P (I + s W)."""
    folded = current.get(f"{pair.name}.folded")
    return left_OM, right_MI if folded is None else right_MI + scale * right_MI @ folded.to(right_MI)


def _whole(pair: Pair, merged: State, current: State) -> tuple[Tensor, Tensor]:
    """Factors of what a merged pair stands for: its product, and what has been folded away (`stack`) beside it."""
    up, down, folded = merged[pair.up].double(), merged[pair.down].double(), f"{pair.name}.folded"
    if folded not in merged:
        return up, down
    more = merged[folded].double() - current[folded].double() if folded in current else merged[folded].double()
    return torch.cat([up, more], 1), torch.cat([down, torch.eye(len(more)).to(down)])


def error_cost(current: State, clients: int) -> float:
    """A measure of what `product_error` costs: the triangular factors' width times columns^2, over all pairs."""
    folded = any(name.endswith(".folded") for name in current)  # a whole product is as wide as it is long
    shapes = [current[pair.down].shape for pair in pairs(current)]
    return sum(float(width) * (width if folded else min(rank * clients, 2 * width)) ** 2 for rank, width in shapes)


def _error(up: Tensor, down: Tensor, left: Tensor, right: Tensor) -> float:
    error, size = norm(torch.cat([up, -left], 1), torch.cat([down, right])), norm(left, right)
    return error / size if size else (math.inf if error else 0.0)


def norm(left_OM: Float[Tensor, "O M"], right_MI: Float[Tensor, "M I"]) -> float:
    """|L R| from the triangular factors of L and of R^T, of which the orthogonal ones drop out."""
    left, right = (torch.linalg.qr(tall, mode="r").R for tall in (left_OM, right_MI.T))
    return float(torch.linalg.matrix_norm(left @ right.T))
