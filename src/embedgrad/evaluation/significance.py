"""Confidence intervals and paired significance tests.

Everything here takes plain sequences. Arguments that make no sense (no rows, unequal lengths,
numbers that are not finite) raise ValueError: no user input reaches this file with them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist

_DRAWS_AT_ONCE = 1 << 19  # of the bootstrap: about 6 MB


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion, `successes` out of `n` (Wilson 1927, JASA 22:209).

    Unlike the normal interval it stays inside [0, 1] and does not collapse at 0 or n successes.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n and n >= 1, got {successes} of {n}")
    z = NormalDist().inv_cdf(1 - _tail(confidence))
    share = successes / n
    scale = 1 + z * z / n
    center = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    # At the ends the formula gives 0 and 1 exactly; floating point does not.
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == n else center + half
    return low, high


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test on paired right-or-wrong answers.

    `only_first` and `only_second` count the discordant rows, which one side alone got right. If
    neither side is better, each such row is a fair coin (McNemar 1947, Psychometrika 12:153; exact
    binomial form). 1.0 when there are no discordant rows.
    """
    fewer, n = min(only_first, only_second), only_first + only_second
    if fewer < 0:
        raise ValueError(f"expected counts of at least 0, got {only_first} and {only_second}")
    # Whole numbers, so that nothing is lost to rounding before the one division.
    ways = total = 1
    for k in range(fewer):
        ways = ways * (n - k) // (k + 1)
        total += ways
    return min(1.0, 2 * total / (1 << n))


def bootstrap_mean(
    values: Sequence[float], *, samples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean (Efron 1979, Annals of Statistics 7:1).

    Too narrow for a handful of rows: a single row, or rows that are all equal, give no width.
    """
    import numpy as np

    values_N = np.asarray(values, dtype=np.float64)
    n = len(values_N)
    if n < 1 or samples < 1 or not np.isfinite(values_N).all():
        raise ValueError("expected at least one value, all finite, and at least one sample")
    tail = _tail(confidence)
    generator = np.random.default_rng(seed)
    means_S = np.empty(samples)
    chunk = max(1, _DRAWS_AT_ONCE // n)
    for start in range(0, samples, chunk):
        size = (min(chunk, samples - start), n)
        rows_SN = generator.integers(n, size=size, dtype=np.int32)
        means_S[start : start + chunk] = values_N[rows_SN].mean(axis=1)
    low, high = np.quantile(means_S, [tail, 1 - tail])
    return float(low), float(high)


def score_interval(scores: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean score: Wilson's where each row is right (1) or wrong (0).

    A mean of graded scores is no share of the rows: its interval is the bootstrap's.
    """
    if set(scores) <= {0, 1}:
        return wilson_interval(round(sum(scores)), len(scores))
    return bootstrap_mean(scores)


def sign_flip_test(differences: Sequence[float], *, samples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value that paired differences are as likely to be below 0 as above it.

    The randomization test of a mean: every difference keeps its size and gets a sign by a fair coin
    (Fisher 1935, The Design of Experiments, section 21). The drawn assignments count together with
    the observed one (Phipson and Smyth 2010), so the smallest p-value is 1 / (samples + 1).
    """
    import numpy as np

    values_N = np.asarray(differences, dtype=np.float64)
    if len(values_N) < 1 or samples < 1 or not np.isfinite(values_N).all():
        raise ValueError("expected at least one difference, all finite, and at least one sample")
    # Differences of one size share a binomial draw; rounding lets 1 - 2/3 and 1/3 be one size.
    sizes_K, counts_K = np.unique(np.abs(values_N).round(12), return_counts=True)
    sizes_K, counts_K = sizes_K[sizes_K > 0], counts_K[sizes_K > 0]
    observed = abs(math.fsum(differences))
    slack = 1e-9 * max(1.0, float(sizes_K @ counts_K))
    generator = np.random.default_rng(seed)
    sums_S = np.zeros(samples)
    for size, count in zip(sizes_K.tolist(), counts_K.tolist(), strict=True):
        sums_S += size * (2 * generator.binomial(count, 0.5, size=samples) - count)
    beyond = int((np.abs(sums_S) >= observed - slack).sum())
    return (beyond + 1) / (samples + 1)


def paired_test(differences: Sequence[float]) -> tuple[str, float]:
    """The test for a mean of paired differences, one per row, and its two-sided p-value.

    "McNemar", the exact test, where each is -1, 0 or 1, as for answers that are right or wrong;
    "sign-flip" where there is something between, as means over seeds and graded scores have.
    """
    if set(differences) <= {-1, 0, 1}:
        worse, better = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
        return "McNemar", mcnemar_exact(worse, better)
    return "sign-flip", sign_flip_test(differences)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of several tests, in their order (Holm 1979, Scand. J. Statistics 6:65).

    Rejecting what stays below a level keeps the chance of any false rejection below that level.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"expected p-values, got {list(p_values)}")
    adjusted, most = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        most = max(most, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = most
    return adjusted


def macro_f1(gold: Sequence[str], predicted: Sequence[str | None], labels: Sequence[str]) -> float:
    """Mean F1 over those `labels` that occur in `gold` or `predicted`.

    A prediction that is None, or no label, is wrong for its row and counts for no other label.
    """
    if not gold or not set(gold) <= set(labels):
        raise ValueError("expected at least one row, and every gold label among the labels")
    right = Counter(g for g, p in zip(gold, predicted, strict=True) if g == p)
    occurrences = Counter(gold) + Counter(p for p in predicted if p is not None)
    # F1 = 2 TP / (2 TP + FP + FN); the lower part counts each label's gold and predicted rows.
    scores = [2 * right[label] / occurrences[label] for label in set(labels) & set(occurrences)]
    return math.fsum(scores) / len(scores)


def _tail(confidence: float) -> float:
    """Probability left out at either end of a two-sided interval."""
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence between 0 and 1, got {confidence}")
    return (1 - confidence) / 2
