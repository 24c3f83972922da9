"""Which setting brings a run under a budget, and to what.

A candidate is the recipe with one setting changed; what it takes is computed as for the recipe
itself. Settings that leave the results alone come first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from embedgrad.experiments.plan.estimate import Estimate, Estimator
from embedgrad.recipe.recipe import Recipe

SPLITS = ("test", "dev", "train")
SHARES = (0.75, 0.5, 0.25, 0.1)
NOTICED = 0.98  # a setting that saves less is not named

Candidate = tuple[str, bool, Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Knob:
    """One changed setting, and what the run takes then.

    `exact` says that the results stay the same up to rounding, `fits` that the budget is kept.
    `seconds` is None where the setting changes the speed in a way that was not measured.
    """

    setting: str
    value: Any
    exact: bool
    fits: bool
    memory_bytes: float
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may take; None: anything."""

    memory_bytes: int | None = None
    seconds: float | None = None

    def over(self, estimate: Estimate) -> list[str]:
        """What of it the run exceeds: "memory", "time"."""
        found = []
        if self.memory_bytes is not None and estimate.peak > self.memory_bytes:
            found.append("memory")
        if self.seconds is not None and estimate.total > self.seconds:
            found.append("time")
        return found


def knobs(recipe: Recipe, estimator: Estimator, budget: Budget) -> list[Knob]:
    """Every setting that saves what is short, those first that bring the run under the budget.

    Of each the mildest value that does; where none does, the value that saves most. Empty where
    the recipe fits as it is.
    """
    now = estimator(recipe)
    over = budget.over(now)
    found = []
    for setting, exact, values in _candidates(recipe, now, over):
        best: Knob | None = None
        for value in values:
            knob = _turned(recipe, estimator, budget, setting, exact, value)
            if knob.fits or _saves(knob, best, now, over):
                best = knob
            if knob.fits:
                break
        if best is not None:
            found.append(best)
    return sorted(found, key=lambda knob: (not knob.fits, not knob.exact))


def together(
    recipe: Recipe, estimator: Estimator, budget: Budget, found: Sequence[Knob]
) -> list[Knob]:
    """Knobs that fit one upon the other where none fits alone; empty if all of them do not."""
    turned: list[Knob] = []
    for knob in found:
        recipe, estimator = _with(recipe, estimator, knob.setting, knob.value)
        estimate = estimator(recipe)
        fits = not budget.over(estimate)
        turned.append(
            Knob(knob.setting, knob.value, knob.exact, fits, estimate.peak, estimate.total)
        )
        if fits:
            return turned
    return []


def _turned(
    recipe: Recipe, estimator: Estimator, budget: Budget, setting: str, exact: bool, value: Any
) -> Knob:
    changed, estimating = _with(recipe, estimator, setting, value)
    estimate = estimating(changed)
    seconds = None if setting == "model.dtype" else estimate.total
    return Knob(setting, value, exact, not budget.over(estimate), estimate.peak, seconds)


def _saves(knob: Knob, best: Knob | None, now: Estimate, over: Sequence[str]) -> bool:
    """Whether a knob takes clearly less of what is short than the best so far."""
    memory, seconds = now.peak, now.total
    if best is not None:
        memory, seconds = best.memory_bytes, best.seconds or seconds
    less_time = knob.seconds is not None and knob.seconds < NOTICED * seconds
    return ("memory" in over and knob.memory_bytes < NOTICED * memory) or (
        "time" in over and less_time
    )


def _with(
    recipe: Recipe, estimator: Estimator, setting: str, value: Any
) -> tuple[Recipe, Estimator]:
    """The recipe with one setting changed, and what estimates it."""
    values = recipe.as_dict()
    *sections, name = setting.split(".")
    inner = values
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = value
    if setting == "prefix_cache.budget":
        estimator = estimator.with_room(value)
    if setting == "model.dtype":
        estimator = estimator.in_half()
    return Recipe.from_dict(values), estimator


def _candidates(recipe: Recipe, now: Estimate, over: Sequence[str]) -> Iterator[Candidate]:
    """Settings worth a try, whether results stay the same, and values from mild to harsh."""
    if "memory" in over:
        yield from _for_memory(recipe, now)
    if "time" in over:
        yield from _for_time(recipe, now)
    for split in SPLITS if over else ():
        rows = now.rows[split]
        fewer = sorted({max(1, int(rows * share)) for share in SHARES} - {rows}, reverse=True)
        if rows:
            yield f"data.limit.{split}", False, fewer


def _for_memory(recipe: Recipe, now: Estimate) -> Iterator[Candidate]:
    prefixes, size = now.course.building, recipe.training.batch_size
    if prefixes.all_bytes and now.room:
        used = min(now.room, prefixes.all_bytes)
        yield "prefix_cache.budget", True, [int(used * share) for share in (0.9, *SHARES, 0)]
        if recipe.prefix_cache.precision == "model":
            yield "prefix_cache.precision", False, ["half"]
    parts = [2**i for i in range(1, 12) if recipe.training.accumulate < 2**i <= size]
    yield "training.accumulate", True, parts
    yield "evaluation.batch_size", True, _halves(recipe.evaluation.batch_size)
    yield "training.batch_size", False, _halves(size)
    if recipe.model.dtype in ("auto", "float32", "float64"):
        yield "model.dtype", False, ["bfloat16"]


def _for_time(recipe: Recipe, now: Estimate) -> Iterator[Candidate]:
    run = now.course
    if now.room < run.building.all_bytes:
        yield "prefix_cache.budget", True, [run.building.all_bytes]
    if run.evaluations > 2:
        every = math.ceil(run.steps / (run.evaluations - 1))
        rarer = [every * n for n in (2, 4, 8) if every * n < run.steps]
        yield "training.evaluate_every", False, [*rarer, run.steps]
    if recipe.training.steps:  # it goes before training.epochs
        yield "training.steps", False, [math.ceil(run.steps * share) for share in SHARES]
    else:
        epochs = run.steps / run.steps_per_epoch
        # Two digits that count: a small number of epochs never becomes 0, which no recipe may say.
        yield "training.epochs", False, [float(f"{epochs * share:.2g}") for share in SHARES]
    if not recipe.target.choices:
        yield "evaluation.max_new_tokens", False, _halves(recipe.evaluation.max_new_tokens)


def _halves(value: int) -> list[int]:
    return [value // 2**i for i in range(1, value.bit_length())]
