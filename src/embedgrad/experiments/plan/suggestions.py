"""Which single setting brings a run under a budget, and to what value.

A candidate is the recipe with one setting changed, estimated like the recipe itself. Settings that
leave the results as they are come first.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from embedgrad.experiments.plan.estimate import Estimate, Estimator
from embedgrad.recipe.overrides import override
from embedgrad.recipe.recipe import Recipe

SHARES = (0.75, 0.5, 0.25, 0.1)
NOTICED = 0.98  # a setting that saves less is not named


@typing.final
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


@typing.final
@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may take; None: anything."""

    memory_bytes: int | None = None
    seconds: float | None = None

    def exceeded(self, estimate: Estimate) -> list[str]:
        """What the run takes too much of: "memory", "time"."""
        limits = {
            "memory": (self.memory_bytes, estimate.peak),
            "time": (self.seconds, estimate.total),
        }
        return [name for name, (most, taken) in limits.items() if most is not None and taken > most]


def suggest(recipe: Recipe, estimator: Estimator, budget: Budget) -> list[Knob]:
    """Every setting that saves what is short, those first that bring the run under the budget.

    Of each the mildest value that does; where none does, the one that saves most. Empty where the
    recipe fits as it is.
    """
    now = estimator(recipe)
    exceeded, knobs = budget.exceeded(now), []
    for setting, exact, values in _candidates(recipe, estimator, now, exceeded):
        best: Knob | None = None
        for value in values:
            changed = estimate_with(recipe, estimator, setting, value)
            fits = not budget.exceeded(changed)
            seconds = None if setting == "model.dtype" else changed.total
            saves = {
                "memory": changed.peak < NOTICED * now.peak,
                "time": changed.total < NOTICED * now.total,
            }
            if fits or any(saves[name] for name in exceeded):
                best = Knob(setting, value, exact, fits, changed.peak, seconds)
            if fits:
                break
        knobs += [best] if best else []
    return sorted(knobs, key=lambda knob: (not knob.fits, not knob.exact))


def estimate_with(recipe: Recipe, estimator: Estimator, setting: str, value: Any) -> Estimate:
    """What a recipe takes with one setting changed."""
    values = recipe.as_dict()
    override(values, [f"{setting}={value}"])
    if setting == "prefix_cache.budget":
        estimator = replace(estimator, room=value)
    if setting == "model.dtype":  # only the weights' bytes are known
        saved = estimator.model_bytes * (1 - 2 / estimator.itemsize)
        names = ("loading", "loaded")
        estimator = replace(estimator, **{n: getattr(estimator, n) - saved for n in names})
    return estimator(Recipe.from_dict(values))


def _candidates(
    recipe: Recipe, estimator: Estimator, now: Estimate, exceeded: Sequence[str]
) -> Iterator[tuple[str, bool, Sequence[Any]]]:
    """Settings worth a try, whether results stay the same, and values from mild to harsh."""
    training, evaluation, work = recipe.training, recipe.evaluation, now.workload
    prefixes = estimator.stored_bytes(recipe) * work.all_prefixes
    if "memory" in exceeded:
        used = min(estimator.room, prefixes)
        if used:
            yield "prefix_cache.budget", True, [int(used * share) for share in (0.9, *SHARES, 0)]
            yield "prefix_cache.precision", False, ["half"]
        parts = [2**i for i in range(1, 12) if training.accumulate < 2**i <= training.batch_size]
        yield "training.accumulate", True, parts
        yield "evaluation.batch_size", True, _halves(evaluation.batch_size)
        yield "training.batch_size", False, _halves(training.batch_size)
        if estimator.itemsize > 2:
            yield "model.dtype", False, ["bfloat16"]
    if "time" in exceeded:
        if estimator.room < prefixes:
            yield "prefix_cache.budget", True, [prefixes]
        if work.evaluations > 2:
            every = math.ceil(work.steps / (work.evaluations - 1))
            rarer = [every * n for n in (2, 4, 8) if every * n < work.steps]
            yield "training.evaluate_every", False, [*rarer, work.steps]
        if training.steps:  # it goes before training.epochs
            yield "training.steps", False, [math.ceil(work.steps * share) for share in SHARES]
        else:
            # Two digits that count: a few epochs never become 0, which no recipe may say.
            fewer = [float(f"{training.epochs * share:.2g}") for share in SHARES]
            yield "training.epochs", False, fewer
        if not recipe.target.choices:
            yield "evaluation.max_new_tokens", False, _halves(evaluation.max_new_tokens)
    for split in ("test", "dev", "train") if exceeded else ():
        rows = len(getattr(estimator.splits.limit(recipe.data.limit), split))
        fewer = sorted({max(1, int(rows * share)) for share in SHARES} - {rows}, reverse=True)
        yield f"data.limit.{split}", False, fewer if rows else []


def _halves(value: int) -> list[int]:
    return [value // 2**i for i in range(1, value.bit_length())]
