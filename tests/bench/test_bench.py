"""Benches at toy size: their lines, their bytes and their bits. No test asks how long anything took."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
from dataclasses import replace

import pytest
from helpers import CountingProxy

from fedmm.bench import served, traffic
from fedmm.bench.common import Case, in_turn
from fedmm.cli import BENCHES, main
from fedmm.storage.memory import give_back, peak_rss_bytes, rss_bytes

TOY = served.SHAPES["toy"]
KEYS = ["bench", "case", "value", "unit", "bar", "holds"]


def printed(name, capsys):
    assert main(["bench", name]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.run
@pytest.mark.parametrize("name", [name for name in BENCHES if importlib.util.find_spec(f"fedmm.bench.{name}")])
def test_a_bench_prints_a_line_for_each_case_and_keeps_what_is_exact(name, capsys):
    lines = printed(name, capsys)
    assert lines and all(list(line)[: len(KEYS)] == KEYS and line["bench"] == name for line in lines)
    assert len({line["case"] for line in lines}) == len(lines)
    assert all((line["bar"] is None) == (line["holds"] is None) for line in lines)
    assert all(line["holds"] for line in lines if line["bar"] is not None)
    assert all(line["value"] >= 0 for line in lines if line["unit"] != "ms"), "a difference of times may be negative"
    assert not multiprocessing.active_children()


def test_a_bar_is_kept_from_below_or_from_above():
    assert Case("b", "c", 1.0, "ms").holds is None
    assert [Case("b", "c", value, "ms", 2.0).holds for value in (1.0, 2.0, 3.0)] == [True, True, False]
    assert [Case("b", "c", value, "x", 2.0, at_least=True).holds for value in (1.0, 2.0, 3.0)] == [False, True, True]
    line = Case("b", "c", 1.234567, "ms", 2.0, detail={"floor": 0.1234567, "median_of": 7}).line()
    assert line == (
        '{"bench": "b", "case": "c", "value": 1.2346, "unit": "ms", "bar": 2.0, "holds": true, "floor": 0.12346, '
        '"median_of": 7}'
    )


def test_runs_take_turns_and_the_first_round_does_not_count():
    order = []
    seconds = in_turn({name: lambda name=name: order.append(name) for name in "ab"}, 2)
    assert "".join(order) == "ababab" and {name: len(s) for name, s in seconds.items()} == {"a": 2, "b": 2}


def test_the_peak_is_of_this_process_and_freed_heap_is_given_back():
    assert 10 << 20 < rss_bytes() <= peak_rss_bytes() + (1 << 20)
    blocks = [bytearray(100_000) for _ in range(2000)]  # below what glibc maps one by one
    last, held = blocks.pop(), rss_bytes()
    blocks.clear()  # the last one lies above them, and holds them
    give_back()
    assert rss_bytes() < held - (100 << 20) and len(last) == 100_000


@pytest.fixture(scope="module")
def door():
    with served.served(TOY) as doors:
        yield doors["plain"]


@pytest.fixture(scope="module")
def edge():
    return served.edge(TOY, served.llava(TOY))


@pytest.mark.parametrize(("codec", "entry_bytes"), [("none", 4), ("fp16", 2)])
def test_a_warm_step_moves_what_the_design_counts(door, edge, codec, entry_bytes):
    B, T, D, R, A = 8, TOY.T, TOY.D, TOY.R, TOY.A
    h_and_up = (B * T * R + 2 * D * R) * entry_bytes
    about = B * (T * (4 + 1 + 1) + 16 + 2 * 8 * A)  # tokens, image, mask; key; keep and labels
    features = B * TOY.P * TOY.E * entry_bytes
    found = traffic.frames(door, TOY, edge, B, traffic.Way(codec))
    assert 0 < found.step - (2 * h_and_up + about) < 2000, "headers"
    assert 0 < found.fill - features < 3000, "keys twice, headers"
    dense = traffic.frames(door, TOY, edge, B, traffic.Way(codec, "dense"))
    assert 0 < dense.step - 2 * B * T * D * entry_bytes < 2000 and dense.fill == 0
    assert found.total(batches=3, epochs=2) == 3 * (found.fill + 2 * found.step)


def test_frames_are_nearly_all_that_is_on_the_wire(door, edge):
    way = traffic.Way("none", "dense")
    proxy = CountingProxy(int(door.address.rpartition(":")[2]))
    try:
        found = traffic.frames(replace(door, address=proxy.address), TOY, edge, 16, way)
    finally:
        proxy.close()
    counted = found.fill + 2 * found.step
    assert counted < sum(proxy.bytes.values()) < 1.02 * counted


def test_samples_are_their_own_and_the_same_every_time():
    one, again, other = (served.batch(TOY, range(start, start + 2)) for start in (0, 0, 1))
    assert one.keys == again.keys and one.keys[1] == other.keys[0] and len({*one.keys, *other.keys}) == 3
