"""How far a model's confidence can be believed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

BINS = 10


@final
@dataclass(frozen=True, slots=True)
class Bin:
    """Rows of like confidence: how sure the model was on average, and how often it was right."""

    confidence: float
    accuracy: float
    count: int


@final
@dataclass(frozen=True, slots=True)
class Calibration:
    """Bins that hold rows, least confident first, and their expected calibration error."""

    bins: tuple[Bin, ...]
    ece: float


def calibration(confident: Sequence[tuple[float, float]], bins: int = BINS) -> Calibration:
    """Calibration of (confidence, right: 1 or 0) pairs over bins of equal width.

    ECE is the mean distance of a bin's accuracy from its confidence, weighted by its rows
    (Guo et al. 2017, arXiv:1706.04599, equation 3).
    """
    held: dict[int, list[tuple[float, float]]] = {}
    for pair in confident:
        held.setdefault(min(int(pair[0] * bins), bins - 1), []).append(pair)
    groups = tuple(
        Bin(
            confidence=sum(confidence for confidence, _ in pairs) / len(pairs),
            accuracy=sum(right for _, right in pairs) / len(pairs),
            count=len(pairs),
        )
        for _, pairs in sorted(held.items())
    )
    ece = sum(b.count * abs(b.accuracy - b.confidence) for b in groups) / max(1, len(confident))
    return Calibration(groups, ece)


def confidences(predictions: Iterable[Mapping[str, Any]], prompt: str) -> list[tuple[float, float]]:
    """How sure a prompt ("text" or "refined") was of each row's choice, and whether it was right.

    Rows without probabilities, as free answers are, have no place in it.
    """
    answers = (row[prompt] for row in predictions)
    return [(max(a["probabilities"]), a["correct"]) for a in answers if a.get("probabilities")]
