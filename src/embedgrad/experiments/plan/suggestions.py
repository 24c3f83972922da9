"""Which single setting brings a run under a budget, and to what value.

A candidate is the recipe with one setting changed, estimated like the recipe itself.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from embedgrad.experiments.plan.estimate import Estimate, Estimator
from embedgrad.recipe.overrides import override
from embedgrad.recipe.recipe import Recipe

NOTICED = 0.98  # a setting that saves less is not named


@typing.final
@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may take; None: anything."""

    memory_bytes: int | None = None
    seconds: float | None = None

    def over(self, estimate: Estimate) -> list[str]:
        """What the run takes too much of: "memory", "time"."""
        limits = {"memory": self.memory_bytes, "time": self.seconds}
        return [n for n, most in limits.items() if most is not None and estimate.taken(n) > most]


def suggest(recipe: Recipe, estimator: Estimator, budget: Budget) -> list[dict[str, Any]]:
    """Settings that save what is short: "setting", "value", and what the run takes with it.

    Of each setting the mildest value that "fits" the budget; where none does, the harshest. "exact"
    settings leave the results as they are up to rounding. Those that fit come first.
    """
    now, knobs = estimator(recipe), []
    over = budget.over(now)
    for setting, exact, values in _candidates(recipe, estimator, now, over):
        for value in values:
            plain = recipe.as_dict()
            override(plain, [f"{setting}={value}"])
            room = int(value) if setting == "prefix_cache.budget" else estimator.room
            then = replace(estimator, room=room)(Recipe.from_dict(plain))
            fits = not budget.over(then)
            if not fits and value != values[-1]:
                continue
            knob = {"setting": setting, "value": value, "exact": exact, "fits": fits}
            taken = {"memory_bytes": then.memory["peak"], "seconds": then.seconds["all"]}
            if fits or any(then.taken(n) < NOTICED * now.taken(n) for n in over):
                knobs.append(knob | taken)
            break
    return sorted(knobs, key=lambda knob: (not knob["fits"], not knob["exact"]))


def _candidates(
    recipe: Recipe, estimator: Estimator, now: Estimate, over: list[str]
) -> Iterator[tuple[str, bool, list[Any]]]:
    """Settings worth a try, whether results stay the same, and values from mild to harsh."""
    training, evaluation, splits = recipe.training, recipe.evaluation, estimator.splits
    steps, evaluations = now.workload.steps, now.workload.evaluations
    if "memory" in over:
        yield "prefix_cache.budget", True, [*_halves(int(now.memory["prefixes"]))[:5], 0]
        yield "prefix_cache.precision", False, ["half"]
        parts = [2**i for i in range(1, 12) if training.accumulate < 2**i <= training.batch_size]
        yield "training.accumulate", True, parts
        yield "evaluation.batch_size", True, _halves(evaluation.batch_size)
        yield "training.batch_size", False, _halves(training.batch_size)
    if "time" in over:
        yield "prefix_cache.budget", True, [now.prefix_bytes]
        every = math.ceil(steps / max(evaluations - 1, 1))
        rarer = [every * n for n in (2, 4, 8) if every * n < steps]
        yield "training.evaluate_every", False, [*rarer, steps]
        if training.steps:  # it goes before training.epochs
            yield "training.steps", False, _halves(training.steps)
        else:
            yield "training.epochs", False, [training.epochs / 2**i for i in range(1, 7)]
        if not recipe.target.choices:
            yield "evaluation.max_new_tokens", False, _halves(evaluation.max_new_tokens)
    for split in ("test", "dev", "train") if over else ():
        rows = len(getattr(splits, split))
        yield f"data.limit.{split}", False, _halves(min(rows, recipe.data.limit.get(split, rows)))


def _halves(value: int) -> list[int]:
    return [value // 2**i for i in range(1, value.bit_length())]
