"""Prepare number series for figures."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, TypeGuard

METRICS = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "log_loss": "log-loss",
    "regret": "regret",
}
MOST_POINTS = 400  # of a line


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value can be drawn."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def number(value: object) -> float:
    """The value as a number; NaN where it is none."""
    return float(value) if is_number(value) else math.nan


def percents(shares: Iterable[Any]) -> list[float]:
    """Shares of one in percent."""
    return [100 * number(share) for share in shares]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Moving means: over the last `window` values up to each one."""
    sums = list(accumulate(values, initial=0.0))
    starts = [max(0, i - window) for i in range(1, len(sums))]
    return [(sums[i] - sums[a]) / (i - a) for i, a in enumerate(starts, 1)]


def thin(values: Sequence[float]) -> list[float]:
    """At most `MOST_POINTS` numbers, each the mean of neighbors."""
    size = math.ceil(len(values) / MOST_POINTS) or 1
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    return [sum(part) / len(part) for part in parts]
