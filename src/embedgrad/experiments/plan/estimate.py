"""Work times measured rates: seconds and bytes of a run."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass, replace
from typing import NamedTuple

from embedgrad.experiments.plan.probe import Rates
from embedgrad.experiments.plan.workload import TokenizedSplits, Workload, count
from embedgrad.recipe.recipe import Recipe


class Estimate(NamedTuple):
    """What a run does, its seconds by what they go into, and its bytes."""

    workload: Workload
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
    writes: bool

    def __call__(self, recipe: Recipe) -> Estimate:
        """Estimate a recipe that has the estimator's data, template and model."""
        rates, most = self.rates, recipe.evaluation.max_new_tokens
        limits = recipe.data.limit.items()
        splits = replace(self.splits, **{n: getattr(self.splits, n)[:rows] for n, rows in limits})
        token = self.stored_bytes(recipe)
        replies = min(rates.text, most), min(rates.refined, most)
        room = (self.room + self.slower_room) / token
        workload = count(recipe, splits, room, *replies, writes=self.writes)
        parts = ("solutions", "prefixes", "steps", "dev", "test")
        seconds = {**self.fixed, **dict.fromkeys(parts, 0.0)}
        for (part, kind), effort in workload.effort.items():
            seconds[part] += rates.seconds.get(kind, 0.0) * effort
        totals = {"train": sum(seconds[n] for n in parts[1:4]), "all": sum(seconds.values())}
        before = min(self.room, token * workload.train_prefixes)
        stored = min(self.room, token * workload.all_prefixes)
        # Prefixes not stored as they are used are in memory while their batch is computed.
        loose = 0 if token == self.token_bytes and stored < self.room else self.token_bytes
        lengths = sorted(map(len, {s.prefix for s in splits.all}), reverse=True)
        most = {
            "steps": math.ceil(recipe.training.batch_size / recipe.training.accumulate),
            "scoring": recipe.evaluation.batch_size,
        }
        rows = {"steps": len(splits.train), "scoring": max(len(splits.dev), len(splits.test))}
        step, scoring = (
            rates.bytes.get(kind, 0.0) * min(most[kind], rows[kind])
            + loose * sum(lengths[: most[kind]])
            for kind in most
        )
        memory = {
            "peak": max(self.loading, self.loaded + max(before + step, stored + scoring)),
            "loading": self.loading,
            "loaded": self.loaded,
            "prefixes": stored,
            "step": step,
            "scoring": scoring,
        }
        return Estimate(workload, seconds | totals, memory)

    def stored_bytes(self, recipe: Recipe) -> int:
        """Bytes of a prefix token as it is stored."""
        return self.token_bytes // (2 if recipe.prefix_cache.precision == "half" else 1)
