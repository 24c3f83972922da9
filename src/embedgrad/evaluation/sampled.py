"""Scores of sampled answers: Avg@k and pass@k, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TypedDict, final

from embedgrad.evaluation.significance import bootstrap_mean


@final
class Sampled(TypedDict):
    """`samples` answers a row: `accuracy` is their mean score (Avg@k), with its 95 % interval.

    Samples of one row are no independent draws, so the bootstrap draws whole rows. `pass_at` is
    pass@k for the powers of two up to `samples`, and for `samples`.
    """

    samples: int
    accuracy: float
    interval: list[float]
    pass_at: dict[str, float]
    pass_interval: list[float]


def summarize_samples(scores: Sequence[Sequence[float]]) -> Sampled | None:
    """Scores of every row's samples in short; None where there are none.

    `pass_interval` is that of the last of `pass_at`. A sample is right from a score of 0.5 on.
    """
    if not scores or not scores[0]:
        return None
    samples = len(scores[0])
    counts = [1 << n for n in range(samples.bit_length()) if 1 << n < samples] + [samples]
    right = [sum(score >= 0.5 for score in row) for row in scores]
    passed = {k: [pass_at_k(samples, c, k) for c in right] for k in counts}
    means = [fmean(row) for row in scores]
    return {
        "samples": samples,
        "accuracy": fmean(means),
        "interval": list(bootstrap_mean(means)),
        "pass_at": {str(k): fmean(values) for k, values in passed.items()},
        "pass_interval": list(bootstrap_mean(passed[samples])),
    }


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that one of `k` of a question's samples is right, where `right` of them are.

    1 - C(samples - right, k) / C(samples, k), unbiased: Chen et al. 2021,
    https://arxiv.org/abs/2107.03374, eq. 1.
    """
    if not (0 <= right <= samples and 1 <= k <= samples):
        raise ValueError(f"expected 0 <= right <= samples >= k >= 1, got {right}, {samples}, {k}")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)
