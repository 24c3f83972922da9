"""Scorer: the reply contains the answer."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import final

import regex

from embedgrad.parts.scorers.base import Scorer
from embedgrad.parts.scorers.exact import tidy

_LETTER = r"[\p{L}\p{M}\p{N}]"
_PLAIN = r"\d++(?:[.,]\d++)*+"
_SIGNED = rf"(?:(?<![\p{{L}}\p{{M}}\p{{N}})\]}}])[-\u2212])?(?:(?<!\w)\.)?{_PLAIN}"
# A number with its sign and the marks inside it ("-1,234.5", "5/6"), a word, or one mark by itself.
# A letter keeps the marks that are combined with it (category M), which `re` cannot name.
_WORD = regex.compile(
    rf"(?<!/){_SIGNED}/{_PLAIN}(?![.,/]?{_LETTER})"
    rf"|{_SIGNED}{_LETTER}*+"
    rf"|{_LETTER}++(?:(?<=\d)[.,](?=\d){_LETTER}++)*+"
    r"|\S"
)


@final
@dataclass(frozen=True)
class Contains(Scorer):
    """The answer's words occur in the reply side by side, as whole words, in any case.

    A reply that names several candidates, or says "not" before the answer, is right too: ask for
    one short answer. Scripts without spaces between words need `exact`.
    """

    rules = 2  # version 1 read fewer numbers

    def score(self, reply: str, answer: str) -> float:
        words = _split_words(tidy(answer))
        # A plain substring search over spaced words takes linear time on any input.
        return float(words != "  " and words in _split_words(reply))


def _split_words(text: str) -> str:
    """The words of `text`, each between two spaces: " one two "."""
    text = unicodedata.normalize("NFC", " ".join(text.split())).casefold()
    return f" {' '.join(_WORD.findall(text))} "
