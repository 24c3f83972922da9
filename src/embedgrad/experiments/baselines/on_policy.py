"""Train a PEFT model on its own answers, by the recipe's own objective.

    questions -> answers of the model as it is -> rewards -> gradient of PEFT's weights

Answers, rewards, groups and loss are those of EmbedGrad's training; PEFT's loop makes the steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from embedgrad.experiments.baselines.base import Task
from embedgrad.model.backbone import Prompt
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading import LoadedModel
from embedgrad.parts.parameterizations import Parameterization, Theta
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.training.loss import Loss
from embedgrad.training.rollouts import Rollouts


def without_prefixes(task: Task) -> LanguageModel:
    """The task's model as PEFT has changed it, with none of the bare model's stored prefixes."""
    own = task.model
    return LanguageModel(LoadedModel(own.model, own.tokenizer, own.info), prefix_cache_budget=0)


@final
class OnPolicy:
    """Draws answers of a model that PEFT trains, and computes the gradient of its leaves.

    `rows` gives the prompt's rows as they are now, with their graph. `questions` are the training
    rows as the model reads them. They have no prefix: a stored one would outlive the weights that
    it was computed with, and would have no gradient. Within `reference` the model is the one that
    training began with. Everything is computed without dropout, so that what is made more or less
    likely is what was drawn from.
    """

    def __init__(
        self,
        task: Task,
        seed: int,
        leaves: Sequence[Tensor],
        rows: Callable[[], Tensor],
        questions: Sequence[TokenSequence],
        reference: Callable[[], contextlib.AbstractContextManager[Any]],
    ):
        assert not any(question.prefix for question in questions)
        model, sampling = without_prefixes(task), task.recipe.parts.objective.sampling
        assert sampling is not None
        start = {"prompt": rows().detach()}
        parts = replace(task.recipe.parts, parameterization=_Weights(rows))
        self.updates, self._questions, self._rows = sampling.updates, questions, rows
        self._theta = {str(i): leaf for i, leaf in enumerate(leaves)}
        self._loss = Loss(model, parts, task.sequencer.target, start)
        self.rollouts = Rollouts(
            *(model, task.evaluator(model), questions, sampling),
            seed=seed,
            start=start,
            reference=reference,
        )

    def draw(self, batch: Sequence[int], step: int) -> tuple[list[TokenSequence], dict[str, float]]:
        """Answers to the batch's questions, and figures; see `Rollouts.draw`."""
        prompt = {"prompt": self._rows()}
        return self.rollouts.draw(prompt, [self._questions[i] for i in batch], step)

    def gradients(self, answers: Sequence[TokenSequence], parts: int) -> float:
        """The objective of these answers; its gradient is left in the leaves."""
        loss, gradients, *_ = self._loss.gradient(self._theta, answers, parts)
        for name, leaf in self._theta.items():
            leaf.grad = gradients[name]
        return loss


@final
class _Weights(Parameterization):
    """Theta are weights inside a model, which gives the rows that it reads with them."""

    def __init__(self, rows: Callable[[], Tensor]):
        self._rows = rows

    def init(self, start: Prompt, generator: torch.Generator) -> Theta:
        raise NotImplementedError("the library that trains the weights makes them")

    def prompt(self, theta: Theta, start: Prompt) -> Prompt:
        return {"prompt": self._rows()}
