"""Work times measured rates: seconds and bytes of a run."""

from __future__ import annotations

import typing
from dataclasses import dataclass

from embedgrad.experiments.plan.probe import Rates
from embedgrad.experiments.plan.workload import TokenizedSplits, Workload, count
from embedgrad.recipe.recipe import Recipe


@typing.final
@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run does, its seconds by what they go into, and its bytes."""

    workload: Workload
    seconds: dict[str, float]
    memory: dict[str, float]

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(self.seconds.values())

    @property
    def peak(self) -> float:
        """The most bytes in use at once."""
        return self.memory["peak"]


@typing.final
@dataclass(frozen=True)
class Estimator:
    """Says what a recipe takes, from its tokens and what was measured.

    `fixed` are seconds that no setting changes. Bytes: `loading` is the most while the model was
    loaded, `loaded` what it then holds, `model_bytes` its weights, `token_bytes` a prefix token in the model's precision, and
    `room` that for prefixes in memory, `slower_room` elsewhere.
    """

    splits: TokenizedSplits
    rates: Rates
    model_bytes: int
    token_bytes: int
    itemsize: int
    room: int
    slower_room: int = 0
    fixed: dict[str, float] | None = None
    loading: float = 0.0
    loaded: float = 0.0
    writes: bool = False

    def __call__(self, recipe: Recipe) -> Estimate:
        """Estimate a recipe that has the estimator's data, template and model."""
        rates, most = self.rates, recipe.evaluation.max_new_tokens
        token, splits = self.stored_bytes(recipe), self.splits.limit(recipe.data.limit)
        text, refined = (min(reply, most) for reply in rates.replies)
        room = (self.room + self.slower_room) / token
        workload = count(recipe, splits, room, (text, refined), writes=self.writes)
        parts = ("solutions", "prefixes", "steps", "dev", "test")
        seconds = {**(self.fixed or {}), **dict.fromkeys(parts, 0.0)}
        for (part, kind), work in workload.work.items():
            seconds[part] += rates.seconds.get(kind, 0.0) * work.effort
        seconds["steps"] += rates.first
        return Estimate(workload, seconds, self._memory(recipe, splits, workload))

    def stored_bytes(self, recipe: Recipe) -> int:
        """Bytes of a prefix token as it is stored."""
        halved = recipe.prefix_cache.precision == "half" and self.itemsize > 2
        return self.token_bytes * 2 // self.itemsize if halved else self.token_bytes

    def _memory(
        self, recipe: Recipe, splits: TokenizedSplits, workload: Workload
    ) -> dict[str, float]:
        token, training, rates = self.stored_bytes(recipe), recipe.training, self.rates.bytes
        train, every = (
            min(self.room, token * n) for n in (workload.train_prefixes, workload.all_prefixes)
        )
        passes = {
            "steps": -(-min(training.batch_size, len(splits.train)) // training.accumulate),
            "scoring": min(recipe.evaluation.batch_size, max(len(splits.dev), len(splits.test))),
        }
        # Prefixes that are not stored as they are used are in memory while their batch is computed.
        fits = token == self.token_bytes and token * workload.all_prefixes <= self.room
        lengths = sorted(map(len, {s.prefix for s in splits.all}), reverse=True)
        step, scoring = (
            rates.get(kind, 0.0) * examples
            + (0 if fits else self.token_bytes * sum(lengths[:examples]))
            for kind, examples in passes.items()
        )
        building = rates.get("prefixes", 0.0)
        peak = max(train + step, every + max(scoring, building)) + self.loaded
        return {
            "peak": max(self.loading, peak),
            "loading": self.loading,
            "loaded": self.loaded,
            "prefixes": every,
            "step": step,
            "scoring": scoring,
            "building_prefixes": building,
        }
