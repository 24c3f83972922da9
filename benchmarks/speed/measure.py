"""Timing of two sides in turns, and whether both computed the same."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from benchmarks.speed.ours import Step

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
HALF_LOSS, HALF_GRADIENT = 1e-2, 0.1  # 16-bit weights: 0.001 and 0.03 at 24 and at 48 layers
SCORE_TOLERANCE = 1e-4

T = TypeVar("T")


@dataclass(frozen=True)
class Pairs(Generic[T]):
    """Seconds of both sides in every pair, and what each side computed last."""

    ours: T
    peer: T
    our_seconds: list[float]
    peer_seconds: list[float]

    def summary(self) -> dict[str, Any]:
        """The part of a row that is about time; ratios above 1: ours is faster."""
        ratios = [p / o for o, p in zip(self.our_seconds, self.peer_seconds, strict=True)]
        return {
            "ratio": statistics.median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "pairs": len(ratios),
            "our_seconds": statistics.median(self.our_seconds),
            "peer_seconds": statistics.median(self.peer_seconds),
        }


@dataclass(frozen=True)
class Side(Generic[T]):
    """What is timed, and what puts everything in its place before."""

    run: Callable[[], T]
    prepare: Callable[[], object] = lambda: None

    def timed(self) -> tuple[float, T]:
        """Seconds, and what was computed."""
        self.prepare()
        gc.collect()
        began = time.perf_counter()
        result = self.run()
        return time.perf_counter() - began, result


def alternate(ours: Mapping[str, Side[T]], peer: Side[T], pairs: int) -> dict[str, Pairs[T]]:
    """Time all sides, one after the other, `pairs` times; ours by name, each beside the peer."""
    timed = [
        ({name: side.timed() for name, side in ours.items()}, peer.timed()) for _ in range(pairs)
    ]
    last, (_, theirs) = timed[-1]
    peer_seconds = [seconds for _, (seconds, _) in timed]
    return {
        name: Pairs(last[name][1], theirs, [found[name][0] for found, _ in timed], peer_seconds)
        for name in ours
    }


def compare_steps(ours: Step, peer: Step, *, half: bool = False) -> dict[str, Any]:
    """Whether two steps at the same place found the same, relative to the peer's."""
    losses = HALF_LOSS if half else LOSS_TOLERANCE
    gradients = HALF_GRADIENT if half else GRADIENT_TOLERANCE
    loss = abs(ours.loss - peer.loss) / abs(peer.loss)
    change = (ours.gradient_PD - peer.gradient_PD).norm() / peer.gradient_PD.norm()
    gradient = change.item()
    same = loss <= losses and gradient <= gradients  # False where one is NaN
    return {"same_gradient": same, "loss_difference": loss, "gradient_difference": gradient}


def compare_scores(ours: Tensor, peer: Tensor) -> dict[str, Any]:
    """Whether two tables of log-probabilities agree, in nats."""
    difference = (ours - peer).abs().max().item()
    return {"same_result": difference <= SCORE_TOLERANCE, "result_difference": difference}


def voided(row: dict[str, Any]) -> dict[str, Any]:
    """The row, without its ratios where both sides did not compute the same."""
    wrong = [name for name in ("same_gradient", "same_result") if row.get(name) is False]
    if not wrong:
        return row
    found = ", ".join(
        f"{name.replace('_', ' ')} {row[name]:.1e}"
        for name in ("loss_difference", "gradient_difference", "result_difference")
        if row.get(name) is not None and math.isfinite(row[name])
    )
    reason = "void: the two sides differ" + (f" ({found})" if found else "")
    note = "; ".join(part for part in (reason, row.get("note", "")) if part)
    return {**row, "ratio": None, "ratio_low": None, "ratio_high": None, "note": note}
