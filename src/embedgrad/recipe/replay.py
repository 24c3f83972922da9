"""Replay: rows of earlier tasks in every batch of a further one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from embedgrad.data.examples import Example
from embedgrad.model.language_model import LanguageModel
from embedgrad.parts.augmentations import Augmentation, BatchContext
from embedgrad.prompt.sequence import Sequencer, TokenSequence
from embedgrad.recipe.recipe import Recipe
from embedgrad.training.self_training import training_examples


@final
@dataclass(frozen=True)
class Replay(Augmentation):
    """Adds earlier tasks' rows to a batch, so that they are a share of it.

    Source: experience replay, Rolnick et al. 2019, https://arxiv.org/abs/1811.11682.
    """

    earlier: Sequence[TokenSequence]
    share: float

    def __call__(
        self, batch: Sequence[TokenSequence], context: BatchContext
    ) -> list[TokenSequence]:
        count = max(1, round(len(batch) * self.share / (1 - self.share)))
        draw = random.Random(f"replay:{context.seed}:{context.step}")
        return [*batch, *draw.choices(self.earlier, k=count)]


def as_written(
    examples: Sequence[Example],
    folder: Path,
    recipe: Recipe,
    model: LanguageModel | None,
    sequencer: Sequencer,
) -> list[Example]:
    """The training examples of the run in `folder` with what it was trained to write.

    That is in its solutions.jsonl, if the model wrote it itself; without a model, it is the data's
    answers. Raises `DataError` where that file does not fit.
    """
    file = folder / "solutions.jsonl"
    if recipe.teacher or model is None or not file.is_file():
        return list(examples)
    solutions = replace(recipe.solutions, source="self-written", file=str(file))
    evaluation = recipe.evaluation
    return training_examples(model, sequencer, examples, solutions, evaluation=evaluation)[0]
