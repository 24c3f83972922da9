"""Scores as plain JSON values, as `result.json` holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, final

from embedgrad.evaluation.sampled import Sampled


@final
class Scores(TypedDict):
    """A `Summary` as plain values."""

    rows: int
    accuracy: float
    interval: Sequence[float]
    macro_f1: float | None
    log_loss: float
    cut: int
    unread: int
    greedy_is_choice: float | None
    sampled: Sampled | None


@final
class Difference(TypedDict):
    """Refined minus text, as in `Comparison`; `fixed` and `broken` are numbers of rows."""

    accuracy: float
    interval: Sequence[float]
    test: str
    p_value: float
    fixed: int
    broken: int


@final
class ComparisonScores(TypedDict):
    """The part of `result.json` that holds scores."""

    text: Scores
    refined: Scores
    difference: Difference
    test_rows: int
