"""The benchmark of two workers: what it makes of seconds and bytes."""

from __future__ import annotations

import pytest

from benchmarks.workers import summarize

pytestmark = pytest.mark.harness


def test_a_model_of_a_step_is_a_step_apart_and_what_is_sent() -> None:
    one = {"exchange": 0.1, "checkpoint": 0.06, "bytes": 430, "numbers": 100}
    launches = {
        f"round {i} {way}": {"seconds": [s * f for f in (0.9, 1.0, 9.0)], **one}
        for i in range(2)
        for way, s in (("alone", 1.0), ("apart", 1.1), ("together", 1.25))
    }
    found = summarize(launches)
    assert found["efficiency"] == pytest.approx(0.8)
    assert found["modelled_seconds"] == pytest.approx(1.2)
    assert found["model_error"] == pytest.approx(1.2 / 1.25 - 1)
    assert found["bytes_beside_rows"] == 30
    assert found["checkpoint"]["share"] == pytest.approx(0.001)
