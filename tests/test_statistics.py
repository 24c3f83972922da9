"""Scores, intervals and paired tests, against published values, scipy and simulation."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from embedgrad.evaluation.significance import (
    bootstrap_mean,
    holm,
    macro_f1,
    mcnemar_exact,
    paired_test,
    score_interval,
    sign_flip_test,
    wilson_interval,
)

CONFIDENCES = st.floats(0.5, 0.999)
COUNTS = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


# Wilson interval


@pytest.mark.parametrize(
    ("successes", "n", "confidence", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
        (81, 263, 0.95, 0.2553, 0.3662),
        (15, 148, 0.95, 0.0624, 0.1605),
        (0, 20, 0.95, 0.0, 0.1611),
        (1, 29, 0.95, 0.0061, 0.1718),
        (8, 10, 0.95, 0.4902, 0.9433),
        (20, 20, 0.95, 0.8389, 1.0),
    ],
)
def test_wilson_interval_gives_published_values(
    successes: int, n: int, confidence: float, low: float, high: float
) -> None:
    assert wilson_interval(successes, n, confidence) == pytest.approx((low, high), abs=6e-5)


@settings(deadline=None)  # scipy starts slowly
@given(COUNTS, CONFIDENCES)
def test_wilson_interval_equals_scipy(count: tuple[int, int], confidence: float) -> None:
    expected = stats.binomtest(*count).proportion_ci(confidence, method="wilson")
    assert wilson_interval(*count, confidence) == pytest.approx(tuple(expected), abs=1e-9)


@given(COUNTS, CONFIDENCES)
def test_wilson_interval_holds_the_share_and_stays_a_probability(
    count: tuple[int, int], confidence: float
) -> None:
    low, high = wilson_interval(*count, confidence)
    assert 0 <= low <= count[0] / count[1] <= high <= 1
    assert low < high


@given(COUNTS, CONFIDENCES, st.integers(2, 50))
def test_wilson_interval_narrows_with_rows_and_widens_with_confidence(
    count: tuple[int, int], confidence: float, times: int
) -> None:
    def width(successes: int, n: int, confidence: float) -> float:
        low, high = wilson_interval(successes, n, confidence)
        return high - low

    successes, n = count
    here = width(successes, n, confidence)
    assert width(times * successes, times * n, confidence) < here
    assert width(successes, n, (1 + confidence) / 2) > here


@pytest.mark.parametrize(
    ("successes", "n", "confidence"),
    [(0, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 0), (1, 2, 1)],
)
def test_wilson_interval_refuses_nonsense(successes: int, n: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        wilson_interval(successes, n, confidence)


# McNemar's test


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value"),
    [
        (0, 0, 1.0),
        (0, 1, 1.0),
        (0, 5, 2 / 32),
        (1, 9, 2 * (1 + 10) / 1024),
        (5, 5, 1.0),
        (4, 5, 1.0),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
    ],
)
def test_mcnemar_counts_coin_tosses(only_first: int, only_second: int, p_value: float) -> None:
    assert mcnemar_exact(only_first, only_second) == p_value


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_mcnemar_is_symmetric_and_a_probability(only_first: int, only_second: int) -> None:
    p_value = mcnemar_exact(only_first, only_second)
    assert p_value == mcnemar_exact(only_second, only_first)
    assert 0 <= p_value <= 1


@settings(deadline=None)  # scipy starts slowly
@given(st.integers(0, 3000), st.integers(0, 3000).filter(bool))
def test_mcnemar_equals_scipy(only_first: int, only_second: int) -> None:
    expected = stats.binomtest(only_first, only_first + only_second).pvalue
    # Below 1e-270 scipy's own value turns into 0.
    assert mcnemar_exact(only_first, only_second) == pytest.approx(expected, rel=1e-9, abs=1e-250)


def test_mcnemar_is_quick_for_many_rows() -> None:
    started = time.process_time()
    assert mcnemar_exact(10_000, 10_000) == 1.0
    assert 0 < mcnemar_exact(9_000, 10_000) < 1e-11
    assert time.process_time() - started < 5  # 0.1 s on an idle core


def test_mcnemar_refuses_negative_counts() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        mcnemar_exact(-1, 4)


# Bootstrap


def paired(first: list[float], second: list[float], **options: int) -> tuple[float, float]:
    return bootstrap_mean([b - a for a, b in zip(first, second, strict=True)], **options)


def test_bootstrap_agrees_with_the_normal_interval_on_many_rows() -> None:
    values = np.random.default_rng(3).normal(5.0, 2.0, size=1000)
    half = 1.96 * values.std() / math.sqrt(1000)
    expected = (values.mean() - half, values.mean() + half)
    assert bootstrap_mean(values.tolist()) == pytest.approx(expected, abs=0.01)


def test_bootstrap_resamples_rows_together() -> None:
    hard = np.random.default_rng(4).normal(0.0, 10.0, size=300)
    first, second = hard.tolist(), (hard + 0.5).tolist()
    assert paired(first, second) == pytest.approx((0.5, 0.5), abs=1e-9)
    low, high = bootstrap_mean(second)
    assert high - low > 2  # what an unpaired interval would look like


@pytest.mark.parametrize("scores", ["right or wrong", "log-loss"])
def test_bootstrap_covers_no_difference_as_often_as_it_says(scores: str) -> None:
    generator = np.random.default_rng(5)
    covered = 0
    for seed in range(600):
        hardness = generator.normal(size=150)
        both = hardness + generator.normal(size=(2, 150))
        first, second = (both > 0).astype(float) if scores == "right or wrong" else both
        low, high = paired(first.tolist(), second.tolist(), samples=400, seed=seed)
        covered += low <= 0 <= high
    # Three standard errors of a 95 % interval; a 90 % interval would fail.
    assert 0.923 <= covered / 600 <= 0.977


def test_bootstrap_follows_its_seed_and_confidence() -> None:
    values = np.random.default_rng(6).normal(size=80).tolist()
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)
    wide_low, wide_high = bootstrap_mean(values, confidence=0.99)
    low, high = bootstrap_mean(values, confidence=0.8)
    assert wide_low < low < high < wide_high


def test_bootstrap_changes_sign_with_its_sides() -> None:
    first, second = np.random.default_rng(7).normal(size=(2, 60)).tolist()
    low, high = paired(first, second)
    assert paired(second, first) == pytest.approx((-high, -low), abs=1e-12)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40))
def test_bootstrap_interval_holds_the_mean(values: list[float]) -> None:
    low, high = bootstrap_mean(values, samples=500)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert low - 1e-9 <= sum(values) / len(values) <= high + 1e-9


def test_bootstrap_narrows_with_rows() -> None:
    values = np.random.default_rng(8).normal(size=50).tolist()
    low, high = bootstrap_mean(values)
    narrow_low, narrow_high = bootstrap_mean(values * 16)
    assert (high - low) / (narrow_high - narrow_low) == pytest.approx(4, rel=0.1)


def test_bootstrap_is_quick_for_a_test_split() -> None:
    first, second = np.random.default_rng(9).random(size=(2, 2000)).tolist()
    started = time.process_time()
    paired(first, second)
    assert time.process_time() - started < 3  # 0.1 s on an idle core


@pytest.mark.parametrize("values", [[], [math.nan, 1.0], [math.inf]])
def test_bootstrap_refuses_values_without_a_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match="all finite"):
        bootstrap_mean(values)


# Macro-F1


def test_macro_f1_by_hand() -> None:
    gold = ["a", "a", "a", "b", "b", "c"]
    predicted = ["a", "a", "b", "b", "c", "a"]
    # a: 2 of 3 gold, 3 predicted: 4/6. b: 1 of 2, 2 predicted: 2/4. c: 0.
    assert macro_f1(gold, predicted, ["a", "b", "c"]) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_macro_f1_leaves_out_labels_that_never_occur() -> None:
    assert macro_f1(["a", "b"], ["a", "b"], ["a", "b", "unseen"]) == 1.0
    # "c" occurs as a prediction only: its F1 of 0 counts. a: 2/3, b: 0/1.
    assert macro_f1(["a", "a"], ["a", "c"], ["a", "b", "c"]) == pytest.approx((2 / 3 + 0) / 2)


@pytest.mark.parametrize("odd", [None, "neither"])
def test_macro_f1_counts_a_prediction_outside_the_labels_as_a_miss(odd: str | None) -> None:
    assert macro_f1(["a", "a", "b"], ["a", odd, "b"], ["a", "b"]) == pytest.approx((2 / 3 + 1) / 2)


def test_macro_f1_of_one_lazy_answer_is_below_accuracy() -> None:
    gold = ["yes"] * 90 + ["no"] * 10
    assert macro_f1(gold, ["yes"] * 100, ["yes", "no"]) == pytest.approx((180 / 190) / 2)


@pytest.mark.parametrize("gold", [[], ["z"]])
def test_macro_f1_refuses_rows_that_it_cannot_count(gold: list[str]) -> None:
    with pytest.raises(ValueError, match="every gold label"):
        macro_f1(gold, ["a"] * len(gold), ["a"])


# Signs flipped, and several tests at once


def test_flipped_signs_of_ones_are_mcnemars_test() -> None:
    for better, worse in ((12, 3), (7, 7), (30, 12)):
        differences = [1.0] * better + [-1.0] * worse + [0.0] * 50
        exact = mcnemar_exact(worse, better)
        assert sign_flip_test(differences, samples=40_000) == pytest.approx(exact, abs=0.01)


def test_flipped_signs_equal_scipys_randomization_test() -> None:
    differences = [0.9, -0.2, 0.4, 0.7, -0.1, 0.3, 0.55, -0.35, 0.6, 0.15]

    def mean(values: np.ndarray, axis: int) -> np.ndarray:
        return np.asarray(values.mean(axis=axis))

    expected = stats.permutation_test(
        (np.array(differences),), mean, permutation_type="samples", vectorized=True
    ).pvalue
    assert sign_flip_test(differences, samples=100_000) == pytest.approx(expected, abs=0.005)


def test_thirds_that_rounding_made_unequal_count_as_equal() -> None:
    assert 1 - 2 / 3 != 1 / 3
    mixed = sign_flip_test([1 / 3] * 6 + [1 - 2 / 3] * 6 + [-1 / 3] * 3)
    assert mixed == sign_flip_test([1 / 3] * 12 + [-1 / 3] * 3)


def test_the_test_is_named_and_graded_scores_have_their_own() -> None:
    assert paired_test([1, 1, 0, -1]) == ("McNemar", mcnemar_exact(1, 2))
    graded = [0.5, 1, 0, -1]
    assert paired_test(graded) == ("sign-flip", sign_flip_test(graded))


def test_a_mean_of_graded_scores_has_no_interval_of_a_rounded_count() -> None:
    assert score_interval([1.0, 0.0, 1.0, 1.0]) == wilson_interval(3, 4)
    graded = [0.25, 0.75, 0.25] * 10
    low, high = score_interval(graded)
    assert (low, high) == bootstrap_mean(graded)
    assert 0.25 < low < sum(graded) / 30 < high < 0.52 < wilson_interval(12, 30)[1]


def test_flipped_signs_of_nothing_show_nothing() -> None:
    assert sign_flip_test([0.0, 0.0]) == 1.0
    assert sign_flip_test([0.5, -0.5]) == 1.0
    # The smallest p-value that so many samples can show.
    assert sign_flip_test([1.0] * 200, samples=999) == pytest.approx(1e-3)


@pytest.mark.parametrize("differences", [[], [math.nan], [1.0, math.inf]])
def test_flipping_signs_refuses_what_is_no_difference(differences: list[float]) -> None:
    with pytest.raises(ValueError, match="difference"):
        sign_flip_test(differences)


def test_holm_gives_a_worked_example() -> None:
    # Of 0.01, 0.04, 0.03 and 0.005 by hand: 4 * 0.005, 3 * 0.01, 2 * 0.03, then not below it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_no_correction_and_bonferroni(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for p_value, p_holm in zip(p_values, adjusted, strict=True):
        assert p_value <= p_holm <= min(1.0, len(p_values) * p_value) + 1e-12
    order = np.argsort(p_values, kind="stable")
    assert sorted(adjusted) == [adjusted[i] for i in order]


def test_holm_refuses_what_is_no_probability() -> None:
    with pytest.raises(ValueError, match="p-values"):
        holm([0.5, 1.5])
