"""Scorer: the reply equals the answer."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import final

from embedgrad.parts.scorers.base import Scorer

_QUOTES = {'"': '"', "'": "'", "`": "`", "\u201c": "\u201d", "\u2018": "\u2019"}


@final
@dataclass(frozen=True)
class Exact(Scorer):
    """The same text, except for white space, one closing period and one pair of quotes."""

    rules = 2  # version 1 told Unicode forms apart

    casefold: bool = True
    """Whether upper and lower case count as the same."""

    def score(self, reply: str, answer: str) -> float:
        reply, answer = tidy(reply), tidy(answer)
        if self.casefold:
            reply, answer = reply.casefold(), answer.casefold()
        return float(answer != "" and reply == answer)


def tidy(text: str) -> str:
    """`text` in NFC, with single spaces, without a closing period and without quotes around it.

    Never empties a text: "." stays ".".
    """
    spaced = " ".join(unicodedata.normalize("NFC", text).split())
    bare = spaced.removesuffix(".")
    if len(bare) > 1 and _QUOTES.get(bare[0]) == bare[-1]:
        inside = bare[1:-1]
        # The period is after the quotes or inside them; only one is dropped.
        bare = inside.removesuffix(".") if bare == spaced else inside
    return bare.strip() or spaced
