"""Estimate a run's remaining time from its events."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any, final

RECENT = 20  # steps


@final
class TimeLeft:
    """Seconds that the steps and evaluations of a run still take.

    A step takes the median of the recent ones, so that a few slow ones (a warm-up, a long batch) do
    not count for all. An evaluation takes what the last one took: the first, which also fills the
    prefix cache, is forgotten as soon as there is another.
    """

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._evaluation = 0.0
        self._evaluated = 0
        self._every: int | None = None

    def step(self, event: dict[str, Any]) -> float:
        """Seconds left after a step."""
        self._steps.append(event["seconds"])
        return self._estimate(event["step"], event["total"])

    def evaluation(self, event: dict[str, Any], seconds: float) -> float | None:
        """Seconds left after an evaluation that took `seconds`; None before any step."""
        step: int = event["step"]
        # Until two are seen, only the one at the end is certain, unless the event says more.
        self._every = event.get("every") or (step - self._evaluated) or None
        self._evaluation, self._evaluated = seconds, step
        return self._estimate(step, event["total"]) if self._steps else None

    def _estimate(self, step: int, total: int) -> float:
        every = self._every or total
        evaluations = 0
        if self._evaluated < total:
            evaluations = math.ceil(total / every) - self._evaluated // every
        return median(self._steps) * (total - step) + self._evaluation * evaluations
