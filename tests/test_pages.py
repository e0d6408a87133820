"""The pages a person reads: short enough, and no link that leads nowhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import ROOT

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1300


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if not leads_somewhere(page, link)] == []


def leads_somewhere(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    return target.exists() and (not anchor or anchor in anchors(target.read_text()))


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page):
    named = re.findall(
        r"(?<![\w/.])(?:docs|scripts|fedmm|conf|tests)/[\w/]+\.(?:md|jsonl|sh|py|yaml)", page.read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_test_that_security_names_is_there():
    """Entries are `file.py::test` or, for a further test of the same file, `::test`."""
    text = (ROOT / "docs" / "SECURITY.md").read_text()
    file, missing, count = "", [], 0
    for name, test in re.findall(r"`(\w+\.py)?::(\w+)`", text):
        file = name or file
        sources = [path.read_text() for path in (ROOT / "tests").rglob(file)]
        count += 1
        if not any(re.search(rf"^def {test}\(", source, flags=re.MULTILINE) for source in sources):
            missing.append(f"{file}::{test}")
    assert count > 50 and missing == []
