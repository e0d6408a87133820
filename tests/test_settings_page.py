"""docs/SETTINGS.md against what it is made of."""

from __future__ import annotations

import runpy
from dataclasses import fields, is_dataclass
from typing import get_type_hints

from helpers import ROOT

from fedmm.config.settings import Config


def test_the_page_of_settings_is_up_to_date():
    page = runpy.run_path(str(ROOT / "scripts" / "settings_page.py"))["page"]()
    assert (ROOT / "docs" / "SETTINGS.md").read_text() == page, "run python scripts/settings_page.py"


def test_the_page_has_every_setting_and_every_choice():
    text = (ROOT / "docs" / "SETTINGS.md").read_text()
    groups = [path.name for path in (ROOT / "conf").iterdir() if path.is_dir()]
    assert not [group for group in groups if f"### `{group}=`" not in text]
    assert not [file for file in (ROOT / "conf").glob("*/*.yaml") if f"\n| `{file.stem}` |" not in text]
    missing = [name for name in names(Config) if f"\n| `{name}` |" not in text and name.split(".")[0] not in groups]
    assert not missing


def names(record: type, prefix: str = "") -> list[str]:
    """Every setting of a record and of the records in it."""
    kinds = get_type_hints(record)
    below = [
        names(kinds[f.name], f"{prefix}{f.name}.") if is_dataclass(kinds[f.name]) else [prefix + f.name]
        for f in fields(record)
    ]
    return [name for group in below for name in group]
