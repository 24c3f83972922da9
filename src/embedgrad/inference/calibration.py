"""What a policy learns from dev rows: who is asked, what is accepted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple, final


@final
class Round(NamedTuple):
    """How a prompt and its threshold do on rows: shares from 0 to 1.

    `right` of the answers are right; `accepts_right` of the right ones are accepted (s), and
    `accepts_wrong` of the others (f).
    """

    right: float
    accepts_right: float
    accepts_wrong: float

    @property
    def accepted(self) -> float:
        """Share of the answers that are accepted: p s + (1 - p) f."""
        return self.right * self.accepts_right + (1 - self.right) * self.accepts_wrong


def lowest_threshold(judged: Sequence[tuple[float, float]], precision: float) -> float:
    """The lowest score from which on answers are right often enough; infinity if there is none.

    `judged` holds the score of each answer, and how right it is.
    """
    found, total = math.inf, 0.0
    ordered = sorted(judged, reverse=True)
    for i, (score, right) in enumerate(ordered, start=1):
        total += right
        last = i == len(ordered) or ordered[i][0] < score
        if last and total >= precision * i - 1e-9:
            found = score
    return found


def measure(judged: Sequence[tuple[float, float]], threshold: float) -> Round:
    """A prompt's figures on rows; where nothing is right, or wrong, that share is 0."""
    right = sum(r for _, r in judged)
    passed = [r for score, r in judged if score >= threshold]
    return Round(
        right / len(judged),
        sum(passed) / (right or 1.0),
        sum(1 - r for r in passed) / ((len(judged) - right) or 1.0),
    )


def predict(rounds: Sequence[Round]) -> tuple[float, float]:
    """Accuracy and expected rounds by the closed form, with the last answer as the fallback.

    Rounds are taken to be independent. For K equal ones with a = p s + (1 - p) f it is

        accuracy = p s / a (1 - (1 - a)^K) + (1 - a)^(K - 1) p (1 - s)
        rounds   = (1 - (1 - a)^K) / a
    """
    accuracy = asked = 0.0
    reached = 1.0
    *earlier, last = rounds
    for one in earlier:
        accuracy += reached * one.right * one.accepts_right
        asked += reached
        reached *= 1 - one.accepted
    return accuracy + reached * last.right, asked + reached


def halve(
    count: int, rows: int, score: Callable[[int, range], Sequence[float]], keep: int
) -> list[int]:
    """The `keep` best of `count` prompts by successive halving, best first.

    Karnin et al. 2013 (Almost Optimal Exploration in Multi-Armed Bandits): all are scored on a few
    rows, the better half on twice as many, and so on; those that are kept have seen all rows.
    `score` gives a prompt's scores on a range of the rows, each of which it is asked once.
    """
    alive = list(range(count))
    scores: dict[int, list[float]] = {i: [] for i in alive}
    halvings = max(0, math.ceil(math.log2(count / keep)))
    for left in range(halvings, -1, -1):
        seen = max(1, rows >> left)
        for i in alive:
            scores[i] += score(i, range(len(scores[i]), seen))
        alive.sort(key=lambda i: -fmean(scores[i]))
        alive = alive[: max(keep, math.ceil(len(alive) / 2))] if left else alive[:keep]
    return alive
