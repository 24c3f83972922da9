"""The sums of `benchmarks.triage`: regret of random decisions, and its difference over seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.triage import PLAIN, TOLD, cost_of, regret_of, summarize
from embedgrad.data.examples import Example

pytestmark = pytest.mark.harness


def test_regret_by_hand() -> None:
    costs = np.array([-8.0, 1.0, -1.0, 1.0, 1.0, -4.0, 1.0, 1.0])
    places = np.arange(8)[None]
    assert regret_of(costs, costs, places) == 0
    assert regret_of(np.arange(8.0), costs, places) == -7 + 12  # the first two are chosen
    assert regret_of(-np.arange(8.0), costs, places) == 2 + 12
    two = np.array([np.arange(8), np.arange(8)[::-1]])
    assert regret_of(np.arange(8.0), costs, two) == 5


def test_what_escalating_costs() -> None:
    complaint, praise = (
        Example({"domain": "electronics"}, answer, "") for answer in ("negative", "positive")
    )
    assert (cost_of(complaint), cost_of(praise)) == (-8.0, 1.0)


def test_variants_are_compared_on_the_seeds_that_both_have() -> None:
    worth = [8.0, 1.0] * 16
    costs = [-w if i % 4 < 2 else 1.0 for i, w in enumerate(worth)]
    reviews: dict[str, Any] = {"dev": {"cost": costs, "value": worth}}
    equal = [0.9 if c < 0 else 0.1 for c in costs]  # which complaint costs more is not told
    costly = [0.9 if c == -8 else 0.1 for c in costs]

    def row(variant: str, seed: int, complaint: list[float]) -> dict[str, Any]:
        return {"variant": variant, "seed": seed, "dev": {"complaint": complaint}}

    rows = {
        "a": row(PLAIN, 0, equal),
        "b": row(PLAIN, 1, equal),
        "c": row("spo+", 0, costly),
        "d": row("spo+", 1, costly),
        "e": row("spo+", 2, equal),
    }
    found = summarize(rows, reviews, "dev")
    assert set(found) == {PLAIN, TOLD, "spo+"}
    assert found["spo+"]["seeds"] == [0, 1, 2]
    over = found["spo+"]["over_cross_entropy"]
    assert over["difference"] < 0
    assert over["by_seed"] == pytest.approx([over["difference"]] * 2)
    assert over["interval"][0] < over["difference"] < over["interval"][1]
    assert found[TOLD]["regret"] < found[PLAIN]["regret"]
    assert summarize(rows, reviews, "test") == {}
