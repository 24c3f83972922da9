"""Work times measured rates: seconds and bytes of a run, also with other settings."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass, replace

from embedgrad.experiments.plan.probe import Rates
from embedgrad.experiments.plan.workload import TokenizedSplits, Workload, count
from embedgrad.recipe.recipe import Recipe


@typing.final
@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run does, its seconds by what they go into, and bytes; `prefix_bytes` of them all."""

    workload: Workload
    prefix_bytes: int
    seconds: dict[str, float]
    memory: dict[str, float]

    def taken(self, what: str) -> float:
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
        parts = ("solutions", "prefixes", "steps", "dev", "test")
        seconds = {**self.fixed, **dict.fromkeys(parts, 0.0)}
        for (part, kind), effort in workload.effort.items():
            seconds[part] += rates.seconds.get(kind, 0.0) * effort
        totals = {"train": sum(seconds[n] for n in parts[1:4]), "all": sum(seconds.values())}
        before = token * sum(map(len, splits.prefixes(workload.trained_on, splits.dev)))
        prefixes = min(self.room, everything)
        size, batch = recipe.evaluation.batch_size, recipe.training.batch_size
        examples = {
            "steps": math.ceil(min(batch, len(splits.train)) / recipe.training.accumulate),
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
