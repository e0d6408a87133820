"""Text that another party sent, fit to be shown: nothing in it moves a cursor, ends a line or hides what follows.

Characters that a terminal or a browser acts on are written as escapes (`\\x1b`): the controls, line separators, what
turns the direction of writing, and halves of surrogate pairs, which no file takes.
"""

from __future__ import annotations

import re

_ACTS = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_CONTROLS, _CONTROLS_AND_LINES = re.compile(f"[{_ACTS}]"), re.compile(f"[{_ACTS}\t\n]")
REASON_CHARACTERS = 1000  # of a reason; the longest of ours has some 300


def visible(text: str) -> str:
    """The text with every character that acts as an escape; tabs and line feeds stay."""
    return _CONTROLS.sub(_escape, text)


def one_line(text: str, limit: int | None = REASON_CHARACTERS) -> str:
    """The text in one line of at most `limit` characters, and three dots where there was more."""
    if limit is not None and len(text) > limit:
        text = text[:limit] + "..."
    return _CONTROLS_AND_LINES.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
