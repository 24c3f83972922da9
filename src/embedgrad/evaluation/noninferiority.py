"""Non-inferiority: is one prompt not worse than another by a margin?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import final

from embedgrad.evaluation.significance import bootstrap_mean

LEVEL = 0.05  # chance of calling a prompt not inferior that is worse by the margin
_BISECTIONS = 50


@final
@dataclass(frozen=True, slots=True)
class NonInferiority:
    """`lower` is the one-sided 95 % limit of `difference`; it `holds` if that is above -`margin`.

    `test` names the limit: "Tango" or, for graded scores, "bootstrap".
    """

    margin: float
    difference: float
    lower: float
    test: str
    holds: bool


def non_inferiority(differences: Sequence[float], margin: float) -> NonInferiority:
    """Test paired differences of scores, one per row, against a margin that was fixed before."""
    mean = sum(differences) / len(differences)
    if set(differences) <= {-1, 0, 1}:
        better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
        test, lower = "Tango", tango_lower(better, worse, len(differences))
    else:
        test, lower = "bootstrap", bootstrap_mean(differences, confidence=1 - 2 * LEVEL)[0]
    return NonInferiority(margin, mean, lower, test, lower > -margin)


def tango_lower(better: int, worse: int, rows: int) -> float:
    """One-sided 95 % lower limit of a difference of paired proportions, (better - worse) / rows.

    The score interval, which keeps its level where few rows or none differ, as a bootstrap does
    not. Source: Tango 1998, Statistics in Medicine 17:891, eq. 10 to 15.
    """
    wanted = NormalDist().inv_cdf(1 - LEVEL)
    low, high = -1.0, (better - worse) / rows
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _tango_score(better, worse, rows, middle) > wanted:
            low = middle
        else:
            high = middle
    return low


def _tango_score(better: int, worse: int, rows: int, difference: float) -> float:
    """The score statistic of a hypothetical difference."""
    a = 2 * rows
    b = (2 * rows - better + worse) * difference - better - worse
    c = -worse * difference * (1 - difference)
    share_worse = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = rows * (2 * share_worse + difference * (1 - difference))
    distance = better - worse - rows * difference
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)
