"""Targets of speed and memory, and what was measured, misses as plainly as hits."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

RATIOS = {
    ("A", "stored"): 10.0,
    ("B", "stored"): 1.6,
    ("C", "stored"): 1.8,
    ("D", "stored"): 15.0,
    ("E", "built"): 4.0,
    ("E", "stored"): 10.0,
    ("F", "built"): 4.5,
    ("F", "stored"): 10.0,
    ("G", "built"): 1.0,
    ("H", "built"): 3.0,
    ("I", "built"): 6.5,
}
MEMORY = {"A": 0.25, "C": 0.7}
MATMUL = {"B": 0.6, "C": 0.6}
GROWTH = 1.5
LOADING = 6.0


def reached(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each demand with its target, the measured number, and whether it is met.

    A ratio is that against the best peer, so the worst of the workload's rows counts; one void row,
    which has no ratio, voids them all. `met` is None where nothing was measured.
    """
    rows = values.get("rows", [])
    found = []
    for (letter, prefixes), target in RATIOS.items():
        mine = [r for r in rows if r["workload"] == letter and r["prefixes"] == prefixes]
        name = f"{letter}, prefixes {prefixes}: times as fast as the best peer"
        found.append(_demand(name, target, _worst(mine, "ratio", min), mine, operator.ge))
    for letter, target in MEMORY.items():
        mine = [r for r in rows if r["workload"] == letter and r.get("memory_ratio") is not None]
        name = f"{letter}: peak memory of a step, as a share of the best peer's"
        found.append(_demand(name, target, _worst(mine, "memory_ratio", max), mine, operator.le))
    for letter, target in MATMUL.items():
        mine = [r for r in rows if r["workload"] == letter]
        name = f"{letter}: floating-point rate, as a share of torch.mm's"
        found.append(_demand(name, target, _worst(mine, "matmul_fraction", min), mine, operator.ge))
    growth, loading = values.get("growth", {}), values.get("loading", {})
    name = "A: step time at a query of 800 tokens, over that at 100"
    found.append(_demand(name, GROWTH, growth.get("our_growth"), growth, operator.le))
    for part, key in (("start", "starts"), ("end", "done")):
        name = f"loading: seconds from the start of the process to the {part} of the first step"
        measured = loading.get(f"first_step_{key}_seconds")
        found.append(_demand(name, LOADING, measured, loading, operator.lt))
    return found


def _demand(
    name: str,
    target: float,
    measured: float | None,
    there: Sized,
    holds: Callable[[float, float], bool],
) -> dict[str, Any]:
    met = (measured is not None and holds(measured, target)) if there else None
    return {"demand": name, "target": target, "measured": measured, "met": met}


def _worst(
    rows: Sequence[Mapping[str, Any]], name: str, worst: Callable[[list[float]], float]
) -> float | None:
    numbers = [row[name] for row in rows if row["ratio"] is not None]
    return worst(numbers) if len(numbers) == len(rows) > 0 and None not in numbers else None
