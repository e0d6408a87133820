"""CONTRIBUTING.md's glossary: each term once, and no public name of the package with a retired word in it.

python tests/test_glossary.py       lists the names that still have one
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from helpers import ROOT

GLOSSARY = (ROOT / "CONTRIBUTING.md").read_text().partition("## Glossary")[2]
TERMS = re.findall(r"\*\*([^*]+)\*\*", GLOSSARY)
RETIRED = {word for row in re.findall(r"^\| (`.*?) \|", GLOSSARY, re.MULTILINE) for word in re.findall(r"`(\w+)`", row)}
EXCEPTIONS = re.findall(r"`(\w+)`(?: in `([\w/.]+)`)? \(", GLOSSARY.partition("Exceptions:")[2])

SOURCE = """
class PartA:
    held_name: int
    _about: int
    def own(self, found, *asked, fine=1, **told): ...
def fine():
    def about(): ...
def _told(kept): ...
class _Own:
    kept: int
    def part(self): ...
def held_out(partial, apart, kept_round): ...
async def there(): ...
"""


def test_each_term_stands_once_and_none_is_retired():
    assert len(TERMS) > 30 and len(RETIRED) > 8
    assert sorted(TERMS) == sorted(set(TERMS))
    assert not RETIRED & set(TERMS)


def test_the_finder_finds_every_kind_of_public_name(tmp_path):
    (tmp_path / "kept.py").write_text(SOURCE)
    names = [name for name, _ in public_names(tmp_path)]
    assert sorted(filter(retired, names)) == sorted(
        ["kept", "PartA", "held_name", "own", "found", "asked", "told", "held_out", "kept_round", "there"]
    )
    assert "partial" in names and "apart" in names and "_told" not in names and "about" not in names


def test_no_public_name_has_a_retired_word():
    assert not offenders()


def retired(name: str) -> set[str]:
    """The retired words in a name, written as `snake_case` or `CamelCase`."""
    return RETIRED & {word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)}


def public_names(package: Path) -> Iterator[tuple[str, Path]]:
    """Every public file, function, class, parameter and annotated attribute, and the file that it is in."""
    for file in sorted(package.rglob("*.py")):
        yield file.stem, file
        yield from ((name, file) for name in _names(ast.parse(file.read_text())))


def _names(node: ast.Module | ast.ClassDef) -> Iterator[str]:
    for child in node.body:
        if isinstance(child, ast.AnnAssign) and isinstance(node, ast.ClassDef):
            yield from (name for name in [ast.unparse(child.target)] if not name.startswith("_"))
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if child.name.startswith("_") and child.name != "__init__":
            continue
        yield child.name
        if isinstance(child, ast.ClassDef):
            yield from _names(child)
        else:
            yield from (argument.arg for argument in ast.walk(child.args) if isinstance(argument, ast.arg))


def offenders() -> list[tuple[str, str]]:
    """Public names of fedmm with a retired word, and their files; without the exceptions."""
    at = ((name, str(file.relative_to(ROOT))) for name, file in public_names(ROOT / "fedmm") if retired(name))
    allowed = {(name, file) for name, file in EXCEPTIONS}
    return sorted({(name, file) for name, file in at if (name, file) not in allowed and (name, "") not in allowed})


if __name__ == "__main__":
    for name, file in offenders():
        print(f"{name:24} {file}")
