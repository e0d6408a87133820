"""What the documentation names of the tests exists."""

from __future__ import annotations

import re

import pytest
from helpers import ROOT

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
CLAIM = re.compile(r"`(?:tests/)?((?:\w+/)*test_\w+\.py)?(?:::(test_\w+))?`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page):
    """`file.py::name`, or `::name` of the file named before it."""
    texts, missing = [], []
    for file, name in CLAIM.findall(page.read_text()):
        if file:
            texts = [path.read_text() for path in ROOT.glob(f"tests/**/{file}")]
        if (file or name) and not any(f"def {name}" in text for text in texts):
            missing.append(f"{file}::{name}")
    assert not missing
