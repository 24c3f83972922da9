"""The sums of `benchmarks.fairness`: worst groups over seeds, and their difference to the mean."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.fairness import summarize

pytestmark = pytest.mark.harness


def row(variant: str, seed: int, **correct: str) -> dict[str, Any]:
    return {"set": "toy", "variant": variant, "seed": seed, "dev": {"correct": correct}}


def test_the_worst_group_is_each_seeds_own() -> None:
    rows = {
        "text": row("text", 0, a="0000", b="0000"),
        "m0": row("mean", 0, a="1111", b="1000"),
        "m1": row("mean", 1, a="1100", b="1111"),
        "w0": row("worst", 0, a="1110", b="1110"),
        "w1": row("worst", 1, a="1110", b="1110"),
        "w2": row("worst", 2, a="0000", b="0000"),
    }
    found = summarize(rows, "dev")
    assert set(found) == {"toy, mean", "toy, worst"}
    assert found["toy, mean"]["worst"] == pytest.approx((0.25 + 0.5) / 2)
    assert found["toy, mean"]["accuracy"] == pytest.approx((5 / 8 + 6 / 8) / 2)
    gain = found["toy, worst"]["worst_over_mean"]  # on the seeds that both have
    assert gain["difference"] == pytest.approx(0.75 - 0.375)
    assert gain["interval"][0] < gain["difference"] < gain["interval"][1]
    assert found["toy, worst"]["accuracy_over_mean"]["difference"] == pytest.approx(1 / 16)
    assert summarize(rows, "test") == {}
