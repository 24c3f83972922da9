"""What a run does, from its recipe and its token sequences.

    dev -> [steps -> dev]* -> test with the text prompt -> test with the refined prompt

Every batch is laid out as the run will lay it out; of several epochs the first stands for all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from embedgrad.experiments.plan.batches import (
    Rows,
    over_choices,
    parts_of,
    scoring_batches,
    training_batches,
    writing_batches,
)
from embedgrad.experiments.plan.flops import (
    Pass,
    Reuse,
    Work,
    activation_bytes,
    answer_passes,
    decoding_passes,
    total,
    work,
)
from embedgrad.experiments.plan.model_shape import Shape
from embedgrad.experiments.plan.prefix_workload import Builder, Building
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Replies:
    """How long the longest free answer of a batch is, in tokens."""

    text: int = 0
    refined: int = 0

    def within(self, most: int) -> Replies:
        """Not longer than they may be."""
        return Replies(min(self.text, most), min(self.refined, most))


@dataclass(frozen=True, slots=True)
class Course:
    """How often what is done, its work, and the bytes that it holds for a while.

    `writing` is that of self-written solutions. `dev` and `test` are all evaluations together, and
    `dev_decoding` and `test_decoding` the free answers in them.
    """

    steps: int
    steps_per_epoch: int
    evaluations: int
    writing: Work
    training: Work
    dev: Work
    test: Work
    dev_decoding: Work
    test_decoding: Work
    building: Building
    step_bytes: float
    scoring_bytes: float

    @property
    def all(self) -> Work:
        """All work of the run."""
        prefixes = (self.building.training, self.building.test)
        scoring = (self.dev, self.test, self.dev_decoding, self.test_decoding)
        return total([self.writing, self.training, *prefixes, *scoring])


def course(
    recipe: Recipe,
    rows: Rows,
    shape: Shape,
    reuse: Reuse,
    room: int,
    replies: Replies,
    *,
    writes: bool = False,
) -> Course:
    """Everything that a run of the recipe will do, with so much `room` for prefixes.

    `writes` says that the model writes solutions of its own first.
    """
    training, free = recipe.training, not recipe.target.choices
    per_epoch = training.steps_per_epoch(len(rows.train))
    steps = training.steps_in_all(len(rows.train))
    every = training.steps_between_evaluations(len(rows.train))
    evaluations = (1 + math.ceil(steps / every)) if rows.dev else 0
    batches = [
        step_passes(recipe, batch, rows.prompt, reuse)
        for batch in training_batches(recipe, rows, steps)
    ]
    done = [total(work(shape, made, backward=True) for made in parts) for parts in batches]
    scoring = _Scoring(recipe, rows.prompt, shape, reuse)
    dev, test = scoring.once(rows.dev), scoring.once(rows.test)
    decoding = [Work(), Work()]
    if free:
        later = max(evaluations - 1, 0)
        decoding = [
            total([scoring.decoded(part, replies.text), scoring.decoded(part, replies.refined, n)])
            for part, n in ((rows.dev, later), (rows.test, 1))
        ]
    builder = Builder(
        recipe,
        _with_prefixes(rows, reuse),
        shape,
        room,
        steps=steps,
        evaluations=evaluations,
        lookups=2 if free and reuse.longest is None else 1,
    )
    return Course(
        steps=steps,
        steps_per_epoch=per_epoch,
        evaluations=evaluations,
        writing=scoring.written(rows, replies.text) if writes else Work(),
        training=total(done).times(steps / len(done)),
        dev=dev.times(evaluations),
        test=test.times(2),
        dev_decoding=decoding[0],
        test_decoding=decoding[1],
        building=builder.follow() if reuse.on else Building(),
        step_bytes=max(step_bytes(shape, parts) for parts in batches),
        scoring_bytes=scoring.held,
    )


def _with_prefixes(rows: Rows, reuse: Reuse) -> Rows:
    """The rows, without the prefixes of those that are computed in full."""

    def part(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
        return [
            s
            if reuse.takes(s, rows.prompt, s.targets)
            else dataclasses.replace(s, prefix=(), shared=0)
            for s in sequences
        ]

    if reuse.longest is None:
        return rows
    return Rows(part(rows.train), part(rows.dev), part(rows.test), rows.prompt)


def step_passes(
    recipe: Recipe, batch: Sequence[TokenSequence], prompt: int, reuse: Reuse
) -> list[list[Pass]]:
    """The passes of a training step, by the parts of its batch."""
    choices = over_choices(recipe)
    return [answer_passes(p, prompt, reuse, choices=choices) for p in parts_of(recipe, batch)]


def step_bytes(shape: Shape, parts: Iterable[Sequence[Pass]]) -> float:
    """Bytes that a step holds at its peak."""
    return max(activation_bytes(shape, made, backward=True) for made in parts)


class _Scoring:
    """Work of scoring rows, and the most bytes that it holds."""

    def __init__(self, recipe: Recipe, prompt: int, shape: Shape, reuse: Reuse):
        self.recipe, self.prompt, self.shape, self.reuse = recipe, prompt, shape, reuse
        self.held = 0.0

    def once(self, part: Sequence[TokenSequence]) -> Work:
        """The rows' answers read off once."""
        choices = bool(self.recipe.target.choices)
        return total(
            self._work(answer_passes(batch, self.prompt, self.reuse, choices=choices))
            for batch in scoring_batches(self.recipe, part)
        )

    def decoded(self, part: Sequence[TokenSequence], longest: int, times: int = 1) -> Work:
        """The rows answered freely, so many times."""
        once = total(
            self._work(decoding_passes(batch, self.prompt, self.reuse, longest))
            for batch in scoring_batches(self.recipe, part)
        )
        return once.times(times)

    def written(self, rows: Rows, longest: int) -> Work:
        """Solutions written for all training questions."""
        most = self.recipe.solutions.max_new_tokens or longest
        samples = self.recipe.solutions.samples
        return total(
            self._work(decoding_passes(batch, self.prompt, self.reuse, min(longest, most), samples))
            for batch in writing_batches(self.recipe, rows)
        )

    def _work(self, made: Sequence[Pass]) -> Work:
        self.held = max(self.held, activation_bytes(self.shape, made, backward=False))
        return work(self.shape, made)
