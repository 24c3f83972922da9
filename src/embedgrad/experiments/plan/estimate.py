"""Estimate time and memory from measured rates."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from embedgrad.experiments.plan.probe import Rates
from embedgrad.experiments.plan.workload import TokenizedSplits, Workload, count
from embedgrad.recipe.overrides import override
from embedgrad.recipe.recipe import Recipe

NOTICED = 0.98  # a setting that saves less is not named


@typing.final
@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run does, bytes of all its prefixes, and its seconds and bytes by their cause."""

    workload: Workload
    prefix_bytes: int
    seconds: dict[str, float]
    memory: dict[str, float]

    def amount(self, what: str) -> float:
        """Bytes at the peak for "memory", seconds for "time"."""
        return self.memory["peak"] if what == "memory" else self.seconds["all"]


@typing.final
@dataclass(frozen=True)
class Estimator:
    """Says what a recipe takes, from its tokens and what was measured.

    Bytes: `token_bytes` of a prefix token, `room` and `slower_room` for prefixes in memory and
    elsewhere, `loading` at most while the model was loaded, `loaded` after it. `fixed` are seconds
    that no setting changes.
    """

    splits: TokenizedSplits
    rates: Rates
    token_bytes: int
    room: int
    slower_room: int
    loading: int
    loaded: int
    fixed: dict[str, float]

    def __call__(self, recipe: Recipe) -> Estimate:
        """Estimate a recipe that has the estimator's data, template and model."""
        rates, most, limits = self.rates, recipe.evaluation.max_new_tokens, recipe.data.limit
        fewer = {name: getattr(self.splits, name)[:rows] for name, rows in limits.items()}
        splits = replace(self.splits, **fewer)
        half = recipe.prefix_cache.precision == "half"
        token = self.token_bytes // (2 if half else 1)
        everything = token * sum(map(len, splits.prefixes(splits.all)))
        stored = min(1.0, (self.room + self.slower_room) / max(everything, 1))
        replies = min(rates.text, most), min(rates.refined, most)
        workload = count(recipe, splits, stored, *replies)
        parts = ("solutions", "prefixes", "sampling", "steps", "dev", "test")
        seconds = {**self.fixed, **dict.fromkeys(parts, 0.0)}
        for (part, kind), effort in workload.effort.items():
            seconds[part] += rates.seconds.get(kind, 0.0) * effort
        totals = {"train": sum(seconds[n] for n in parts[1:5]), "all": sum(seconds.values())}
        before = token * sum(map(len, splits.prefixes(workload.trained_on, splits.dev)))
        prefixes = min(self.room, everything)
        size, units = recipe.evaluation.batch_size, splits.units(recipe.training)
        batch = sum(sorted(map(len, units))[-recipe.training.batch_size :])  # rows, at most
        sampling = recipe.parts.objective.sampling
        answers = 1 if sampling is None else sampling.samples
        examples = {
            "steps": math.ceil(answers * batch / recipe.training.accumulate),
            "scoring": min(size, max(len(splits.dev), len(splits.test))),
        }
        # Prefixes not stored as they are used are in memory while their batch is computed.
        loose = self.token_bytes if half or everything > self.room else 0
        lengths = sorted(map(len, splits.prefixes(splits.all)), reverse=True)
        step, scoring = (
            rates.bytes.get(kind, 0.0) * n + loose * sum(lengths[:n])
            for kind, n in examples.items()
        )
        work = max(min(self.room, before) + step, prefixes + scoring)
        memory = {
            "peak": max(self.loading, self.loaded + work),
            "loading": self.loading,
            "loaded": self.loaded,
            "prefixes": prefixes,
            "step": step,
            "scoring": scoring,
        }
        return Estimate(workload, everything, seconds | totals, memory)


@typing.final
@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may take; None: anything."""

    memory_bytes: int | None = None
    seconds: float | None = None

    def over(self, estimate: Estimate) -> list[str]:
        """What the run takes too much of: "memory", "time"."""
        limits = (("memory", self.memory_bytes), ("time", self.seconds))
        return [n for n, most in limits if most is not None and estimate.amount(n) > most]


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
            if fits or value == values[-1]:
                knob = {"setting": setting, "value": value, "exact": exact, "fits": fits}
                knob |= {"memory_bytes": then.amount("memory"), "seconds": then.amount("time")}
                saves = any(then.amount(n) < NOTICED * now.amount(n) for n in over)
                knobs += [knob] if fits or saves else []
                break
    return sorted(knobs, key=lambda knob: (not knob["fits"], not knob["exact"]))


def _candidates(
    recipe: Recipe, estimator: Estimator, now: Estimate, over: list[str]
) -> Iterator[tuple[str, bool, list[Any]]]:
    """Settings worth a try, whether results stay the same, and values from mild to harsh."""
    training, evaluation, work = recipe.training, recipe.evaluation, now.workload
    if "memory" in over:
        yield "prefix_cache.budget", True, [*_halves(int(now.memory["prefixes"]))[:5], 0]
        yield "prefix_cache.precision", False, ["half"]
        parts = [2**i for i in range(1, 12) if training.accumulate < 2**i <= training.batch_size]
        yield "training.accumulate", True, parts
        yield "evaluation.batch_size", True, _halves(evaluation.batch_size)
        yield "training.batch_size", False, _halves(training.batch_size)
    if "time" in over:
        yield "prefix_cache.budget", True, [now.prefix_bytes]
        every = math.ceil(work.steps / max(work.evaluations - 1, 1))
        rarer = [every * n for n in (2, 4, 8) if every * n < work.steps]
        yield "training.evaluate_every", False, [*rarer, work.steps]
        if training.steps:  # it goes before training.epochs
            yield "training.steps", False, _halves(training.steps)
        else:
            yield "training.epochs", False, [training.epochs / 2**i for i in range(1, 7)]
        if not recipe.target.choices:
            yield "evaluation.max_new_tokens", False, _halves(evaluation.max_new_tokens)
    whole = recipe.parts.objective.needs_groups
    for split in ("test", "dev", "train") if over and not whole else ():
        rows = len(getattr(estimator.splits, split))
        yield f"data.limit.{split}", False, _halves(min(rows, recipe.data.limit.get(split, rows)))


def _halves(value: int) -> list[int]:
    return [value // 2**i for i in range(1, value.bit_length())]
