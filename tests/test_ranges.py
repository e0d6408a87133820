"""pyproject.toml says of each dependency which versions it may be; scripts/ranges.sh runs both ends."""

from __future__ import annotations

import re
import tomllib

import pytest
from helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WANTED = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]


@pytest.mark.parametrize("wanted", WANTED)
def test_each_range_has_two_ends(wanted):
    assert re.match(r"[\w-]+(\[\w+\])?>=[\w.]+,<[\w.]+(;|$)", wanted.replace(" ", ""))
