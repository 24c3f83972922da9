"""The answer stands somewhere in the reply."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import final

from embedgrad.scorers.base import Scorer
from embedgrad.scorers.exact import tidy

# A word, with the marks inside a number ("1,234.5"), or one mark by itself.
_WORD = re.compile(r"[^\W_]+(?:(?<=\d)[.,](?=\d)[^\W_]+)*|\S")


@final
@dataclass(frozen=True)
class Contains(Scorer):
    """The answer's words stand in the reply side by side, as whole words, in any case.

    A reply that names several candidates, or says "not" before the answer, is right too: ask for
    one short answer. Scripts without spaces between words need `exact`.
    """

    def score(self, reply: str, answer: str) -> float:
        wanted = _words(tidy(answer))
        # A plain substring search over spaced words takes linear time on any input.
        return float(wanted != "  " and wanted in _words(reply))


def _words(text: str) -> str:
    """The words of `text`, each between two spaces: " one two "."""
    return f" {' '.join(_WORD.findall(text.casefold()))} "
