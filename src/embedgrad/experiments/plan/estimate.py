"""Work times measured rates: seconds and bytes of a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from embedgrad.data.splits import NAMES
from embedgrad.experiments.plan.batches import Rows
from embedgrad.experiments.plan.flops import Reuse
from embedgrad.experiments.plan.model_shape import Shape
from embedgrad.experiments.plan.workload import Course, Replies, course
from embedgrad.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Machine:
    """What was measured once and does not depend on the recipe's settings.

    Seconds from the start of the process to the plan, of loading, and of tokenizing a row; bytes in
    use with the model loaded, and the most while it was.
    """

    start: float = 0.0
    load: float = 0.0
    per_row: float = 0.0
    base_bytes: int = 0
    load_bytes: int = 0


@dataclass(frozen=True)
class Estimate:
    """Seconds by what they go into, and bytes; `peak` is the most of all."""

    course: Course
    seconds: dict[str, float]
    memory: dict[str, float]
    room: int
    rows: dict[str, int]

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(self.seconds.values())

    @property
    def train(self) -> float:
        """Seconds from the first evaluation to the last; `train.seconds` of a result."""
        return sum(self.seconds[name] for name in ("prefixes", "steps", "dev"))

    @property
    def peak(self) -> float:
        """The most bytes in use at once."""
        return self.memory["peak"]


@dataclass(frozen=True)
class Estimator:
    """Says what a recipe takes, from its rows, the model's shape and what was measured."""

    rows: Rows
    shape: Shape
    reuse: Reuse
    machine: Machine
    rates: Rates
    room: int
    slower_room: int = 0
    writes: bool = False

    def __call__(self, recipe: Recipe) -> Estimate:
        """Seconds and bytes of a run of `recipe`, whose data and template are the estimator's."""
        rows = limited(self.rows, recipe)
        rates, machine = self.rates, self.machine
        most = recipe.evaluation.max_new_tokens
        replies = rates.replies.within(most)
        room = self.room + self.slower_room
        run = course(recipe, rows, self.shape, self.reuse, room, replies, writes=self.writes)
        seconds = {
            "start": machine.start,
            "load": machine.load,
            "tokenize": machine.per_row * len(rows.everything),
            "solutions": rates.decoding * run.writing.effort,
            "prefixes": rates.prefixes * run.building.training.effort,
            "steps": rates.steps * run.training.effort + rates.first,
            "dev": rates.scoring * run.dev.effort + rates.decoding * run.dev_decoding.effort,
            "test": rates.prefixes * run.building.test.effort
            + rates.scoring * run.test.effort
            + rates.decoding * run.test_decoding.effort,
        }
        counts = {name: len(getattr(rows, name)) for name in NAMES}
        return Estimate(run, seconds, self._memory(run), self.room, counts)

    def with_room(self, room: int) -> Estimator:
        """The same with so many bytes for prefixes in memory."""
        return dataclasses.replace(self, room=room)

    def in_half(self) -> Estimator:
        """The same model in 16 bits a number; what time it takes then is not known."""
        saved = self.shape.model_bytes - self.shape.parameters * 2
        machine = dataclasses.replace(
            self.machine,
            base_bytes=self.machine.base_bytes - saved,
            load_bytes=self.machine.load_bytes - saved,
        )
        shape = dataclasses.replace(self.shape, itemsize=2)
        return dataclasses.replace(self, shape=shape, machine=machine)

    def at_most(self, recipe: Recipe) -> float:
        """Seconds where every free answer goes on as long as it may."""
        most = recipe.evaluation.max_new_tokens
        rates = dataclasses.replace(self.rates, replies=Replies(most, most))
        return dataclasses.replace(self, rates=rates)(recipe).total

    def _memory(self, run: Course) -> dict[str, float]:
        prefixes, rates = run.building, self.rates
        step = rates.step_bytes * run.step_bytes + prefixes.loose_bytes
        # What earlier work leaves behind does not grow with the rows.
        scoring = rates.scoring_bytes + run.scoring_bytes + prefixes.loose_bytes
        building = rates.held_bytes * prefixes.held_bytes
        base = self.machine.base_bytes
        training, test = (
            min(prefixes.training_bytes, self.room),
            min(prefixes.test_bytes, self.room),
        )
        peak = max(
            self.machine.load_bytes,
            base + training + max(step, scoring, building),
            base + test + max(scoring, building),
        )
        return {
            "peak": peak,
            "loading": self.machine.load_bytes,
            "loaded": base,
            "prefixes": max(training, test),
            "step": step,
            "scoring": scoring,
            "building_prefixes": building,
        }


def limited(rows: Rows, recipe: Recipe) -> Rows:
    """The rows that data.limit leaves."""
    limit = recipe.data.limit
    parts = {name: getattr(rows, name)[: limit.get(name)] for name in NAMES}
    return dataclasses.replace(rows, **parts)


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds per unit of effort by kind, and what memory shows beside the computed bytes.

    `step_bytes` and `held_bytes` (of building prefixes) are bytes per computed byte,
    `scoring_bytes` those beyond the computed ones: there most is what earlier work left behind.

    `first` are seconds that the first step takes beyond any other. `replies` are the longest free
    answers to expect; `read` of them were read, of `mean_reply` tokens, and `cut` of these did not
    end in `upto` tokens.
    """

    prefixes: float = 0.0
    steps: float = 0.0
    scoring: float = 0.0
    decoding: float = 0.0
    first: float = 0.0
    step_bytes: float = 1.0
    scoring_bytes: float = 0.0
    held_bytes: float = 1.0
    replies: Replies = Replies()
    read: int = 0
    cut: int = 0
    upto: int = 0
    mean_reply: float = 0.0
    probe_seconds: float = 0.0
