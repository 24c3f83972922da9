"""Safe text for a page: escapes, JSON for `<script>`, no home directory."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

# What is not plain ASCII, a line end or a tab is looked at closer.
_UNSURE = re.compile(r"[^\n\t -~]")
_JOINERS = "\u200c\u200d"  # of Persian, of Indic scripts, of emoji; they turn nothing

Shown = str | list[Any]  # a text, or what is left of it and how many characters are left out


def readable(text: str) -> str:
    r"""Text with escapes for what does not print: \x00, \u202e, halves of surrogate pairs.

    Unlike `words.visible`, which is for one line of a terminal, it keeps line ends, tabs, spaces of
    every width, and the joiners that scripts and emoji are written with.
    """
    return _UNSURE.sub(_escape, text.replace("\r\n", "\n"))


def without_home(value: Any) -> Any:
    """A text with ~ for the user's home directory; the same for the texts in lists and objects."""
    if isinstance(value, dict):
        return {name: without_home(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_home(inner) for inner in value]
    home = os.path.expanduser("~")
    if not isinstance(value, str) or home in ("~", os.path.dirname(home)):
        return value
    return re.sub(rf"(?<![\w./~-]){re.escape(home)}(?![\w.-])", "~", value)


def script_json(value: Any) -> str:
    """A value as JSON that a `<script>` element may hold."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def shorten(texts: Sequence[str], budget: int) -> list[Shown]:
    """Texts, readable, that together take about `budget` bytes of JSON.

    Short ones stay whole, long ones share what is left; each says how many characters it lost.
    """
    sizes = [_bytes(readable(text[: budget + 1])) for text in texts]
    shown: list[Shown] = list(texts)
    left, waiting = budget, len(texts)
    for i in sorted(range(len(texts)), key=sizes.__getitem__):
        shown[i] = _fit(texts[i], max(0, left // waiting))
        taken = shown[i] if isinstance(shown[i], str) else shown[i][0]
        left -= _bytes(str(taken))
        waiting -= 1
    return shown


def _fit(text: str, most: int) -> Shown:
    if len(text) <= most and _bytes(whole := readable(text)) <= most:
        return whole
    lengths = range(min(len(text), most) + 1)
    low = bisect_right(lengths, most, key=lambda n: _bytes(readable(text[:n]))) - 1
    return [readable(text[:low]), len(text) - low]


def _bytes(text: str) -> int:
    return len(script_json(text).encode()) - 2  # without its quotes


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    if character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs":
        return character
    return ascii(character)[1:-1]
