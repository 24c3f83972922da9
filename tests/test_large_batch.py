"""The benchmark of large batches: what a row took to the target."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python -m` has it

from benchmarks.large_batch import summary

pytestmark = pytest.mark.harness


def row(optimizer: str, losses: list[float], **facts: Any) -> dict[str, Any]:
    curve = [{"step": i, "log_loss": loss, "seconds": 10.0 * i} for i, loss in enumerate(losses)]
    return {
        "optimizer": optimizer,
        "seed": 0,
        "quick": False,
        "gradients": 1,
        "curve": curve,
    } | facts


def test_the_target_is_the_best_without_a_point_ahead() -> None:
    rows = {
        "plain": row("adamw", [0.7, 0.5, 0.4, 0.45]),
        "past": row("adamw-past", [0.7, 0.4, 0.3]),
        "fresh": row("adamw-fresh", [0.7, 0.6, 0.4], gradients=2),
        "late": row("adamw-noise", [0.7, 0.5, 0.41]),
        "other rows": row("adamw-past", [0.7, 0.1], seed=1),
    }
    found = {entry["row"]: (entry["target"], entry["reached"]) for entry in summary(rows, None)}
    assert found == {
        "plain": (0.4, {"steps": 2, "gradients": 2, "seconds": 20.0}),
        "past": (0.4, {"steps": 1, "gradients": 1, "seconds": 10.0}),
        "fresh": (0.4, {"steps": 2, "gradients": 4, "seconds": 20.0}),
        "late": (0.4, None),
    }
    (other,) = [e for e in summary(rows, 0.2) if e["row"] == "other rows"]
    assert (other["target"], other["reached"]["steps"]) == (0.2, 1)
