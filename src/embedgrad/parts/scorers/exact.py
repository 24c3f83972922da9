"""The reply is the answer and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from embedgrad.parts.scorers.base import Scorer

_QUOTES = {'"': '"', "'": "'", "`": "`", "\u201c": "\u201d", "\u2018": "\u2019"}


@final
@dataclass(frozen=True)
class Exact(Scorer):
    """Same text, but for white space, one closing period and one pair of quotes around it."""

    casefold: bool = True
    """Whether capitals and small letters count as the same."""

    def score(self, reply: str, answer: str) -> float:
        found, wanted = tidy(reply), tidy(answer)
        if self.casefold:
            found, wanted = found.casefold(), wanted.casefold()
        return float(wanted != "" and found == wanted)


def tidy(text: str) -> str:
    """`text` with single spaces, without a closing period and without quotes around it.

    What would leave nothing is not done: "." stays ".".
    """
    spaced = " ".join(text.split())
    bare = spaced.removesuffix(".")
    if len(bare) > 1 and _QUOTES.get(bare[0]) == bare[-1]:
        inside = bare[1:-1]
        # The period stands after the quotes or inside them, but only one is dropped.
        bare = inside.removesuffix(".") if bare == spaced else inside
    return bare.strip() or spaced
