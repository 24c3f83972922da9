"""Non-inferiority: the level of the test, and its limits."""

from __future__ import annotations

import pytest
from scipy import stats  # type: ignore[import-untyped]

from embedgrad.evaluation.noninferiority import LEVEL, non_inferiority, tango_lower


@pytest.mark.parametrize(("worse", "better"), [(0.1, 0.0), (0.2, 0.1), (0.35, 0.25)])
@pytest.mark.parametrize("rows", [40, 80])
def test_a_prompt_worse_by_the_margin_seldom_passes(worse: float, better: float, rows: int) -> None:
    """Over all tables: the chance of passing is the level, as far as whole rows allow."""
    tables = stats.multinomial(rows, [worse, better, 1 - worse - better])
    chance = sum(
        tables.pmf([w, b, rows - w - b])
        for w in range(rows + 1)
        for b in range(rows + 1 - w)
        if tables.pmf([w, b, rows - w - b]) > 1e-6 and tango_lower(b, w, rows) > -0.1
    )
    assert 0.01 < chance < 1.35 * LEVEL


def test_rows_that_are_all_alike_leave_room_for_doubt() -> None:
    wanted = stats.norm.ppf(1 - LEVEL) ** 2
    for rows in (5, 50, 500):
        assert tango_lower(0, 0, rows) == pytest.approx(-wanted / (rows + wanted), abs=1e-9)


def test_limits_are_mirrored_by_the_upper_ones_and_shrink_with_rows() -> None:
    limits = [tango_lower(2 * n, 6 * n, 40 * n) for n in (1, 4, 16, 64)]
    assert limits == sorted(limits)
    assert all(limit < -0.1 for limit in limits)
    assert limits[-1] == pytest.approx(-0.1, abs=0.02)
    assert tango_lower(40, 0, 40) < 1
    assert tango_lower(0, 40, 40) == -1.0


def test_the_margin_decides() -> None:
    differences = [0.0] * 95 + [-1.0] * 3 + [1.0] * 2
    wide, narrow = (non_inferiority(differences, margin) for margin in (0.06, 0.04))
    assert wide.difference == pytest.approx(-0.01)
    assert wide.lower == narrow.lower == tango_lower(2, 3, 100)
    assert -0.06 < wide.lower < -0.04
    assert (wide.holds, narrow.holds, wide.test) == (True, False, "Tango")


def test_graded_scores_get_a_bootstrap() -> None:
    found = non_inferiority([0.25, -0.5] * 50, 0.25)
    assert found.test == "bootstrap"
    assert found.difference == -0.125
    assert found.lower == pytest.approx(-0.125 - 1.645 * 0.375 / 10, abs=0.01)
    assert found.holds
