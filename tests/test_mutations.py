"""Central lines that are broken are noticed by the unit tier."""

from __future__ import annotations

import mutations
import pytest

NAMES = [mutation.name for mutation in mutations.MUTATIONS]


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=NAMES)
def test_the_line_to_break_is_there_once(mutation):
    assert [count for _, count in mutations.places(mutation, mutations.ROOT / "fedmm")] == [1]


@pytest.mark.nightly
def test_the_tests_pass_where_nothing_is_broken(tmp_path):
    """Else whatever is broken would count as noticed."""
    mutations.copy(tmp_path)
    assert mutations.failures(tmp_path, sorted({mutation.tests for mutation in mutations.MUTATIONS})) == []


@pytest.mark.nightly
@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=NAMES)
def test_a_broken_line_is_noticed(mutation, tmp_path):
    assert mutations.caught(mutation, tmp_path)
