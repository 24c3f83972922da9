"""The verdict on methods keeps its word over many simulated comparisons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from embedgrad.evaluation.verdict import verdicts

Scores = list[float]
COMPARISONS, MOST_FALSE = 2000, 130
TABLE = ("a", "b", "c", "d")


def drawn(rng: np.random.Generator, shares: np.ndarray) -> np.ndarray:
    return (rng.random(len(shares)) < shares).astype(float)


def like_text(rng: np.random.Generator, rows: int, runs: int) -> tuple[Scores, list[Scores]]:
    """Answers of a text prompt, and of runs that are as often right about each row.

    Rows are easy or hard for both, and the runs of a method mostly agree among themselves.
    """
    shares = rng.beta(2, 0.7, size=rows)
    text, common = drawn(rng, shares), drawn(rng, shares)
    made = []
    for _ in range(runs):
        alone = rng.random(rows) < 0.2
        made.append(np.where(alone, drawn(rng, shares), common).tolist())
    return text.tolist(), made


def five_points_better(
    rng: np.random.Generator, rows: int, runs: int
) -> tuple[Scores, list[Scores]]:
    """A text prompt that is right 4 times in 5; runs mend 9 % of all rows and break 4 %."""
    order = rng.permutation(rows)
    wrong, right = np.split(order, [rows // 5])
    text = np.ones(rows)
    text[wrong] = 0
    made = []
    for _ in range(runs):
        run = text.copy()
        run[rng.choice(wrong, 9 * rows // 100, replace=False)] = 1
        run[rng.choice(right, 4 * rows // 100, replace=False)] = 0
        made.append(run.tolist())
    return text.tolist(), made


def words(text: Scores, methods: dict[str, Sequence[Scores]]) -> dict[str, str]:
    return {name: verdict.words for name, verdict in verdicts(text, methods).items()}


@pytest.mark.parametrize(("rows", "runs"), [(400, 1), (60, 1), (250, 3)])
def test_without_a_difference_improved_is_rarely_said(rows: int, runs: int) -> None:
    rng = np.random.default_rng(0)
    said = []
    for _ in range(COMPARISONS):
        text, made = like_text(rng, rows, runs)
        said += words(text, {"refined": made}).values()
    assert said.count("improved") <= MOST_FALSE
    assert said.count("worse") <= MOST_FALSE
    # So strict that it never speaks would pass, too: half of 5 % is near what chance allows.
    assert said.count("improved") >= 5


def test_in_a_table_of_methods_improved_is_rarely_said_of_any() -> None:
    rng = np.random.default_rng(1)
    tables = 0
    for _ in range(COMPARISONS):
        # All alike, the text prompt among them.
        _, (text, *others) = like_text(rng, 200, 1 + len(TABLE))
        found = words(text, {name: [run] for name, run in zip(TABLE, others, strict=True)})
        tables += "improved" in found.values()
    assert 5 <= tables <= MOST_FALSE


@pytest.mark.parametrize("runs", [1, 3])
def test_five_points_on_a_thousand_rows_are_found(runs: int) -> None:
    rng = np.random.default_rng(2)
    found = 0
    for _ in range(100):
        text, made = five_points_better(rng, 1000, runs)
        found += words(text, {"refined": made})["refined"] == "improved"
    assert found >= 95


def test_five_points_are_found_in_a_table_of_methods() -> None:
    rng = np.random.default_rng(3)
    found = 0
    for _ in range(100):
        text, made = five_points_better(rng, 1000, 1)
        table: dict[str, Sequence[Scores]] = {"refined": made}
        for name in TABLE:
            flips = rng.random(1000) < 0.1
            table[name] = [np.where(flips, drawn(rng, np.full(1000, 0.8)), text).tolist()]
        found += words(text, table)["refined"] == "improved"
    assert found >= 95


def test_a_loss_is_worse_and_few_rows_say_nothing() -> None:
    better = [1.0] * 30 + [0.0] * 10
    assert words(better, {"refined": [[0.0] * 40]}) == {"refined": "worse"}
    assert words([0.0] * 40, {"refined": [better]}) == {"refined": "improved"}
    assert words([0.0] * 5, {"refined": [[1.0] * 5]}) == {"refined": "no reliable gain"}


def test_other_methods_of_a_table_raise_the_bar() -> None:
    text = [0.0] * 6 + [1.0] * 20
    six = [[1.0] * 26]  # p = 1/32
    assert words(text, {"refined": six}) == {"refined": "improved"}
    beside = {"refined": six, **{name: [text] for name in TABLE}}
    assert words(text, beside)["refined"] == "no reliable gain"
    verdict = verdicts(text, beside)["refined"]
    assert verdict.p_value == pytest.approx(1 / 32)
    assert verdict.p_holm == pytest.approx(5 / 32)
    assert verdict.difference == pytest.approx(6 / 26)


def test_other_rows_are_no_comparison() -> None:
    with pytest.raises(ValueError, match="shorter"):
        verdicts([0.0, 1.0], {"refined": [[1.0]]})
