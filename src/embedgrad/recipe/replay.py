"""Replay: rows of earlier tasks in every batch of a further one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from embedgrad.data.examples import Example
from embedgrad.errors import RecipeError
from embedgrad.parts.augmentations import Augmentation, BatchContext
from embedgrad.prompt.sequence import Sequencer, TokenSequence
from embedgrad.recipe.build import read_data
from embedgrad.recipe.recipe import Recipe


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


def replay_of(recipe: Recipe, sequencer: Sequencer) -> Replay | None:
    """The rows of the earlier runs that a recipe continues; None where none are asked for.

    Raises `RecipeError` where there is no such run, or where its tasks have another template.
    """
    if not recipe.training.replay:
        return None
    rows: list[Example] = []
    place = recipe.training.warm_start
    if place is None:
        problem = "needs a run that the training continues; `embedgrad continue` names one"
        raise RecipeError("training.replay", [problem])
    while place is not None:
        earlier = Recipe.read_run(Path(place))
        if (earlier.template, earlier.target) != (recipe.template, recipe.target):
            problem = f"{place} has another template or target, whose rows cannot be replayed here"
            raise RecipeError("training.replay", [f"{problem}; leave it out"])
        rows += read_data(earlier).train
        place = earlier.training.warm_start
    return Replay(sequencer.build(rows), recipe.training.replay)
