"""EmbedGrad as a comparison method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from embedgrad.errors import DivergenceError
from embedgrad.events import say
from embedgrad.experiments.baselines.base import (
    Answers,
    Method,
    Task,
    Trained,
    question_tokens,
)
from embedgrad.model.language_model import LanguageModel
from embedgrad.parts.objectives import Reward
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.prompt.trust_region import TrustRegion
from embedgrad.recipe.recipe import Recipe
from embedgrad.recipe.warm_start import read_warm_start
from embedgrad.training.optimize import optimize
from embedgrad.training.settings import Parts

Start = Callable[[LanguageModel, int, int], Tensor]


def without_region(parts: Parts) -> Parts:
    """The same parts without a trust region."""
    return replace(parts, trust_region=TrustRegion(radius=None))


def with_random_rewards(parts: Parts) -> Parts:
    """The same parts with rewards drawn by a coin."""
    assert isinstance(parts.objective, Reward)
    return replace(parts, objective=replace(parts.objective, random=True))


def why_not_reward(recipe: Recipe) -> str | None:
    """Why there are no rewards to draw at random; None if there are."""
    if isinstance(recipe.parts.objective, Reward):
        return None
    return 'it is the control of objective = "reward", and the objective is another'


def random_rows(model: LanguageModel, count: int, seed: int) -> Tensor:
    """Rows from a normal distribution with the vocabulary's mean and deviation per dimension."""
    rows_VD = model.vocabulary_rows()
    generator = torch.Generator().manual_seed(seed)
    noise_PD = torch.randn(count, rows_VD.shape[1], generator=generator).to(rows_VD)
    return rows_VD.mean(dim=0) + noise_PD * rows_VD.std(dim=0)


@final
class EmbedGrad(Method):
    """The recipe's own training, optionally with other parts or other start rows."""

    def __init__(
        self,
        name: str,
        parts: Callable[[Parts], Parts] = lambda parts: parts,
        start: Start | None = None,
        why_not: Callable[[Recipe], str | None] = lambda recipe: None,
    ):
        super().__init__(name)
        self._parts, self._start, self._why_not = parts, start, why_not

    def why_not(self, recipe: Recipe) -> str | None:
        return self._why_not(recipe)

    def train(self, task: Task, seed: int) -> Trained:
        recipe, count = task.recipe, len(task.sequencer.prompt_ids)
        training, parts = replace(recipe.training, seed=seed), self._parts(recipe.parts)
        start = None if self._start is None else {"span": self._start(task.model, count, seed)}
        warm_start = None if start else read_warm_start(recipe, task.model, task.sequencer)
        try:
            refinement = optimize(
                task.model,
                task.sequencer,
                task.train,
                task.dev,
                training=training,
                parts=parts,
                evaluation=recipe.evaluation,
                start=start,
                warm_start=warm_start,
                checkpoint=task.load_checkpoint(),
                report=task.report,
                keep=task.keep,
            )
        except DivergenceError as error:
            if error.refinement is None:
                raise
            refinement = error.refinement
            say(task.report, [f"{self.name}, seed {seed}: {error}"])
        if refinement.ended == "interrupted":
            raise KeyboardInterrupt
        prompt, best = refinement.prompt, refinement.best
        units = training.units([sequence.example.group for sequence in task.train])
        return Trained(
            {"rows": prompt.rows},
            {
                "trained_numbers": sum(t.numel() for t in refinement.checkpoint.theta.values()),
                "stored_bytes": 4 * prompt.rows.numel(),
                "examples_seen": sum(map(len, training.batches(units, refinement.steps))),
                "train_seconds": refinement.seconds,
                "dev": best.score if best.history else None,
                "history": best.history,
                "ended": refinement.ended,
                "settings": {
                    "learning_rate": parts.optimizer.learning_rate,
                    "radius": prompt.trust_region.radius,
                    "steps": refinement.steps,
                    "best_step": best.step,
                    "drift_mean": prompt.drift.mean().item(),
                    "drift_max": prompt.drift.max().item(),
                },
            },
        )

    def answer(self, task: Task, trained: Trained, sequences: Sequence[TokenSequence]) -> Answers:
        rows_PD = trained.tensors["rows"].to(task.model.device)
        answered = task.evaluator().score(rows_PD, sequences, task.report)
        return Answers(answered, [question_tokens(s, len(rows_PD)) for s in sequences])
