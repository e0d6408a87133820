"""Write the generated half of docs/SETTINGS.md: every choice of conf/ and every setting, with its default and reason.

    python scripts/settings_page.py

The yaml files and fedmm/config/settings.py are the only source: edit those, then run this. The text above MARK is
written by hand and stays.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
PAGE = ROOT / "docs" / "SETTINGS.md"
MARK = "<!-- Everything below is written by `python scripts/settings_page.py`. -->"


def page() -> str:
    """The whole text of docs/SETTINGS.md as it should be."""
    by_hand, _, _ = PAGE.read_text().partition(MARK)
    return by_hand + MARK + "\n\n" + "\n\n".join([*_choices(), *_settings()]) + "\n"


# ---- groups: a folder of conf/ each ---------------------------------------------------------------------------------


def _choices() -> Iterator[str]:
    yield "## Choices"
    yield (
        "A choice names a file of `conf/`: `rule=median` takes `conf/rule/median.yaml`. Its settings are overridden by "
        "their full names, as in `rule.trim=0.1`; the reason for each default stands in the file."
    )
    lines = (CONF / "config.yaml").read_text().splitlines()
    for line in lines[lines.index("defaults:") + 1 :]:
        choice, _, comment = line.removeprefix("  - ").partition(" # ")
        group, colon, default = choice.partition(": ")
        if not line.startswith("  - "):
            return
        if colon:
            yield f"### `{group}=`"
            default = "none" if default == "null" else f"`{default}`"
            yield _sentence(f"{comment}. Default: {default}." if comment else f"default: {default}.")
            yield _table(("choice", "what it is", "what it sets"), map(_choice, sorted((CONF / group).glob("*.yaml"))))


def _choice(file: Path) -> tuple[str, str, str]:
    text = file.read_text()
    content = yaml.safe_load(text) or {}
    chosen = [f"{key}={value}" for key, value in _overridden(content.pop("defaults", ()))]
    in_place = "# @package _global_" in text
    values = [f"{key}={_value(value)}" for key, value in _flat(content, "" if in_place else f"{file.parent.name}.")]
    return (
        f"`{file.stem}`",
        _head_comment(text) or content.get("label", ""),
        " ".join(f"`{x}`" for x in chosen + values),
    )


def _overridden(defaults: Any) -> Iterator[tuple[str, str]]:
    """The choices that a file makes, from Hydra's list of defaults."""
    for entry in defaults:
        if isinstance(entry, Mapping):
            for group, name in entry.items():
                yield group.removeprefix("override /").partition("@")[0], name


def _flat(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif key not in ("_target_", "_partial_", "_convert_"):
            yield prefix + key, value


def _head_comment(text: str) -> str:
    """The comment at the head of a yaml file, less Hydra's own line and the command of an experiment."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith(("# @package", "# fedmm run")):
            lines.append(line.lstrip("# "))
    return " ".join(lines)


# ---- settings: the records of fedmm/config/settings.py --------------------------------------------------------------


def _settings() -> Iterator[str]:
    yield "## Settings"
    yield "Types, defaults and reasons as they stand in `fedmm/config/settings.py` and `conf/config.yaml`."
    source = (ROOT / "fedmm" / "config" / "settings.py").read_text()
    records = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    yield from _record(records, comments, "Config", "")


def _record(records: Mapping[str, ast.ClassDef], comments: Mapping[int, str], name: str, prefix: str) -> Iterator[str]:
    fields = [node for node in records[name].body if isinstance(node, ast.AnnAssign)]
    ends = [node.lineno for node in fields[1:]] + [(records[name].end_lineno or 0) + 1]
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    inner, rows = [], []
    for node, end in zip(fields, ends, strict=True):
        key, kind = prefix + ast.unparse(node.target), ast.unparse(node.annotation)
        if kind in records:
            inner.append((kind, f"{key}."))
        elif key not in groups:
            why = " ".join(comments[line] for line in range(node.lineno, end) if line in comments)
            if why or kind != "Any":  # else one of conf/'s choices sets it
                default = f"`{_default(node)}`" if _default(node) else ""
                rows.append((f"`{key}`", f"`{kind.replace('|', 'or')}`", default, why or _conf_comment(key)))
    if rows:
        yield f"### `{prefix.rstrip('.')}`" if prefix else "### Top level"
        yield _table(("setting", "type", "default", "meaning"), rows)
    for kind, below in inner:
        yield from _record(records, comments, kind, below)


def _default(node: ast.AnnAssign) -> str:
    value = node.value
    if isinstance(value, ast.Call):  # field(default_factory=...)
        (factory,) = (keyword.value for keyword in value.keywords if keyword.arg == "default_factory")
        return _value(ast.literal_eval(factory.body)) if isinstance(factory, ast.Lambda) else "[]"
    return _value(ast.literal_eval(value)) if value else ""


def _conf_comment(key: str) -> str:
    for line in (CONF / "config.yaml").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return line.partition(" # ")[2]
    return ""


# ---- markdown -------------------------------------------------------------------------------------------------------


def _value(value: Any) -> str:
    """As it is typed in an override."""
    if isinstance(value, list):
        return f"[{','.join(map(_value, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value).replace("\n", "\\n")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _table(heads: tuple[str, ...], rows: Any) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page())
