r"""Scorer: the reply's final number equals the answer's.

    "So she pays $1,234.50."          1234.5    $ and % are units and carry no value: 75% is 75
    "#### 18\n\nThat is 3 more."      18        a number straight after "####" comes first,
    "\boxed{\frac{3}{4}}, in 2 steps" 0.75      then the last one in the last \boxed{...},
    "10 - 4 = 6, so 6"                6         then the last one of all
    "pages 3-5"                       5         a minus after a word or a number is no sign
    "\frac{-1}2"                      -0.5      but inside a fraction it is one

The decimal mark is the point; mixed numbers ("1 1/2") are not read. Values are Python floats:
beyond 15 digits, neighbors are equal.
"""

from __future__ import annotations

import math
import re
from collections import deque
from dataclasses import dataclass
from typing import Annotated, final

from annotated_types import Ge, Lt

from embedgrad.parts.scorers.base import Scorer

# Every pattern here takes linear time: no open-ended quantifier backtracks (`++`, `(?>...)`), and a
# group of thousands is recognized on the spot.
_DIGITS = r"(?:\d{1,3}(?:,\d{3}(?!\d))++|\d++)"
_PLAIN = rf"(?:{_DIGITS}(?:\.\d++)?|(?<![\w.])\.\d++)(?:[eE][+-]?\d++)?"
_SIGN = r"(?:(?<![\w)\]}])-(?:\\?[$\u20ac\u00a3\u00a5])?)?"
_NUMBER = rf"(?>({_SIGN})({_PLAIN})(?: ?/ ?({_PLAIN}))?)"

_ANYWHERE = re.compile(_NUMBER)
# "#### 2. Then" and "#### 2: Then" are headings of a worked solution, not its result.
_MARKED = re.compile(rf"####\s*+(?:\\?[$\u20ac\u00a3\u00a5])?+{_NUMBER}(?![.:)][ \t]++\S)")
_PART = r"(?:\{\s*+([+-]?)\s*+([\d.,]++)\s*+\}|()(\d))"
_FRACTION = re.compile(rf"(-?)\\[dt]?frac\s*+{_PART}\s*+{_PART}(?!\d)")
_LATEX = {"{,}": ",", r"\,": ",", r"\!": ""}  # between groups of thousands
_BRACE = re.compile(r"[{}]")
_MINUSES = str.maketrans(dict.fromkeys("\u2212\u2013\u2011\ufe63\uff0d", "-"))


@final
@dataclass(frozen=True)
class Number(Scorer):
    """The reply's final number equals the answer's, within the wider of two tolerances."""

    rules = 2  # version 1 read fewer numbers

    relative_tolerance: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Largest distance that counts as equal, as a share of the answer (0 to below 1)."""

    absolute_tolerance: Annotated[float, Ge(0)] = 0.0
    """Largest distance that counts as equal, in the answer's own unit (0 or more)."""

    def score(self, reply: str, answer: str) -> float:
        value, target = parse_number(reply), parse_number(answer)
        if value is None or target is None:
            return 0.0
        tolerance = max(self.relative_tolerance * abs(target), self.absolute_tolerance)
        return float(abs(value - target) <= tolerance)


def parse_number(text: str) -> float | None:
    """The final number of `text`; None if there is none, or if it is too large for a float."""
    for latex, plain in _LATEX.items():
        text = text.replace(latex, plain)
    text = _FRACTION.sub(_plain_fraction, text.translate(_MINUSES))
    for pattern, part in ((_MARKED, text), (_ANYWHERE, _box_content(text)), (_ANYWHERE, text)):
        last = deque(pattern.finditer(part), maxlen=1)
        if last:
            return _value(last[0])
    return None


def _plain_fraction(match: re.Match[str]) -> str:
    """ "-3/4", with one sign for all that it has."""
    minus, *parts = match.groups("")
    above, below = parts[1] or parts[3], parts[5] or parts[7]
    negative = (minus, parts[0], parts[4]).count("-") % 2
    # A minus inside the fraction is always a sign, and a digit before it is another number.
    joined = not minus and match.string[: match.start()][-1:].isdigit()
    apart = joined or bool(minus) != bool(negative)
    return f"{' ' * apart}{'-' * negative}{above}/{below}"


def _box_content(text: str) -> str:
    r"""The content of the last \boxed{...}; empty if there is none, or if it never ends."""
    _, opening, inside = text.rpartition(r"\boxed{")
    depth = 1
    for brace in _BRACE.finditer(inside if opening else ""):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return inside[: brace.start()]
    return ""


def _value(match: re.Match[str]) -> float | None:
    """Value of a match of `_NUMBER`."""
    sign, above, below = match.groups()
    value = float(above.replace(",", ""))
    if below is not None:
        divisor = float(below.replace(",", ""))
        # An infinite divisor would turn the fraction into a plausible 0.
        value = value / divisor if 0 < divisor < math.inf else math.inf
    if not math.isfinite(value):
        return None
    return -value if sign else value
