"""What a method of a comparison is given, and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from embedgrad.errors import RunError
from embedgrad.evaluation.evaluator import Evaluator, OnProgress, ScoredAnswer, summarize
from embedgrad.events import Report, say
from embedgrad.model.language_model import LanguageModel
from embedgrad.prompt.sequence import Sequencer, TokenSequence
from embedgrad.prompt.template import Template
from embedgrad.recipe.recipe import Recipe
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.selection import score_of


@dataclass(frozen=True)
class Task:
    """A recipe's model, prompt, and the rows to learn from and choose by; no test row.

    `state` is the folder in which a training keeps where it stands, if it keeps it.
    """

    recipe: Recipe
    model: LanguageModel
    sequencer: Sequencer
    train: Sequence[TokenSequence]
    dev: Sequence[TokenSequence]
    report: Report
    state: Path | None = None

    def saved(self) -> Checkpoint | None:
        """Where an interrupted training stood, if anything of it can be read."""
        if self.state is None or not self.state.exists():
            return None
        try:
            return Checkpoint.load(self.state)
        except RunError as error:
            say(self.report, [f"{error}; this training starts anew"])
            return None

    def keep(self, state: Checkpoint) -> None:
        """Write where the training stands. Raises `RunError`."""
        if self.state is not None:
            state.save(self.state)

    @property
    def metric(self) -> str:
        """What the best on dev is chosen by; equal ones are told apart by log-loss."""
        return self.recipe.training.metric_for(choices=bool(self.sequencer.target.choices))

    def evaluator(self, model: LanguageModel | None = None) -> Evaluator:
        """The one scorer of all methods."""
        return Evaluator(model or self.model, self.sequencer, self.recipe.evaluation)

    def sequencer_of(self, template: Template) -> Sequencer:
        """As the recipe's own, for another template."""
        return self.model.sequencer(
            template,
            self.sequencer.target,
            [sequence.example for sequence in self.train],
            date=self.sequencer.renderer.date,
            merges=self.sequencer.merges,
            truncate=self.sequencer.truncate,
        )

    def dev_score(self, answered: Sequence[ScoredAnswer], step: int) -> dict[str, float]:
        """Scores on dev as the training loop notes them."""
        summary = summarize(answered, self.sequencer.target.choices)
        return score_of(step, summary.accuracy, summary.log_loss, summary.macro_f1)


@dataclass(frozen=True)
class Trained:
    """What is kept of a training: tensors, and plain JSON values about it.

    `facts` hold at least "trained_numbers", "stored_bytes", "examples_seen", "dev" and "settings".
    """

    tensors: Mapping[str, Tensor]
    facts: dict[str, Any]


class Answers(NamedTuple):
    """A method's answers to some rows, and how many tokens each question took."""

    answered: list[ScoredAnswer]
    tokens: list[int]


class Method(ABC):
    """A way to make a model better at a task."""

    seeded = True
    """Whether another seed gives another result."""

    def __init__(self, name: str):
        self.name = name

    def lacks(self, recipe: Recipe) -> str:
        """Why it cannot run, "" if it can."""
        return ""

    @abstractmethod
    def train(self, task: Task, seed: int) -> Trained:
        """Learn from train and choose by dev. Ctrl-C goes through, with the model as it was."""

    @abstractmethod
    def answer(
        self,
        task: Task,
        trained: Trained,
        sequences: Sequence[TokenSequence],
        progress: OnProgress | None = None,
    ) -> Answers:
        """Answer rows with what was trained."""


def question_tokens(sequence: TokenSequence, prompt: int, *, as_text: bool = False) -> int:
    """Tokens that the model reads before it answers."""
    if as_text and sequence.plain is not None:
        return len(sequence.plain)
    return len(sequence.prefix) + prompt + len(sequence.suffix)


def examples_seen(rows: int, batch_size: int, steps: int) -> int:
    """Training examples in so many steps; the last batch of an epoch may be smaller."""
    steps_per_epoch = -(-rows // batch_size)
    epochs, rest = divmod(steps, steps_per_epoch)
    return epochs * rows + min(rest * batch_size, rows)
