"""The bench of a client's memory. That it runs, and what its lines hold, is in test_bench.py."""

from __future__ import annotations

import math

from fedmm.bench import memory


def test_the_real_shapes_are_those_of_llava():
    """CLIP-L/336, two linear layers and a table: with 1M of adapters the 457M parameters that a client stores."""
    assert sum(map(math.prod, memory.sizes(memory.SHAPES["real"]).values())) == 303_507_456 + 20_979_712 + 131_334_144


def test_the_whole_model_is_llava_7b():
    assert memory.whole_parameters(memory.SHAPES["real"]) == 7_063_427_072
