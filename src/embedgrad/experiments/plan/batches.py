"""A recipe's rows, in the batches in which a run takes them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from embedgrad.prompt.sequence import TokenSequence
from embedgrad.recipe.recipe import Recipe


@dataclass(frozen=True)
class Rows:
    """A recipe's rows in tokens; `prompt` counts the refined rows."""

    train: Sequence[TokenSequence]
    dev: Sequence[TokenSequence]
    test: Sequence[TokenSequence]
    prompt: int

    def with_targets_of(self, tokens: int) -> Rows:
        """The rows with so many tokens for the model to write in training, whatever they are."""
        train = [dataclasses.replace(s, targets=((0,) * tokens,), gold=0) for s in self.train]
        return dataclasses.replace(self, train=train)

    @property
    def everything(self) -> list[TokenSequence]:
        """The rows of all splits."""
        return [*self.train, *self.dev, *self.test]


def training_batches(recipe: Recipe, rows: Rows, steps: int) -> Iterator[list[TokenSequence]]:
    """The batches of the first epoch, as far as there are so many steps."""
    order = recipe.training.epoch_order(len(rows.train), 0)
    size = recipe.training.batch_size
    for start in range(0, min(steps * size, len(order)), size):
        yield [rows.train[i] for i in order[start : start + size]]


def scoring_batches(recipe: Recipe, part: Sequence[TokenSequence]) -> list[list[TokenSequence]]:
    """The batches in which rows are scored: rows of like length together."""
    order = sorted(part, key=lambda s: len(s.prefix) + len(s.suffix))
    size = recipe.evaluation.batch_size
    return [order[start : start + size] for start in range(0, len(order), size)]


def writing_batches(recipe: Recipe, rows: Rows) -> list[list[TokenSequence]]:
    """The batches of questions whose solutions the model writes itself."""
    size = max(1, recipe.evaluation.batch_size // recipe.solutions.samples)
    questions = list(rows.train)
    return [questions[start : start + size] for start in range(0, len(questions), size)]


def over_choices(recipe: Recipe) -> bool:
    """Whether a training step computes all choices."""
    available = bool(recipe.target.choices)
    return recipe.parts.objective.needs_choices(available=available)


def parts_of(recipe: Recipe, batch: Sequence[TokenSequence]) -> list[Sequence[TokenSequence]]:
    """The parts in which a batch is computed."""
    size = math.ceil(len(batch) / recipe.training.accumulate)
    return [batch[start : start + size] for start in range(0, len(batch), size)]
