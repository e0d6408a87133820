"""How a rule weighs clients is read from its signature."""

from __future__ import annotations

from functools import partial

import pytest

from fedmm.aggregate import running
from fedmm.aggregate.mean import mean
from fedmm.aggregate.norm_clip import norm_clip
from fedmm.aggregate.trimmed import median
from fedmm.config.composition import compose
from fedmm.config.targets import make


@pytest.mark.parametrize(
    ("rule", "weights"),
    [
        (mean, "examples"), (partial(mean, weights="uniform"), "uniform"), (norm_clip, "uniform"),
        (partial(norm_clip, weights="examples"), "examples"), (median, "uniform"),
    ],
)  # fmt: skip
def test_weights_are_those_bound_else_the_default_and_without_any_all_count_alike(rule, weights):
    assert running.weights_of(rule) == weights


@pytest.mark.parametrize(
    ("overrides", "weights"),
    [
        (["rule=mean"], "examples"), (["rule=mean", "rule.weights=uniform"], "uniform"),
        (["rule=mean", "~rule.weights"], "examples"), (["rule=median"], "uniform"),
    ],
)  # fmt: skip
def test_a_configured_rule_that_leaves_its_weights_out_has_its_functions_default(overrides, weights):
    assert running.weights_of(make(compose(overrides).rule)) == weights
