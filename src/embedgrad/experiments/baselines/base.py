"""Base class of comparison methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

from torch import Tensor

from embedgrad.errors import RunError
from embedgrad.evaluation.evaluator import Evaluator, ScoredAnswer, summarize
from embedgrad.evaluation.regret import mean_regret
from embedgrad.events import Report, say
from embedgrad.model.language_model import LanguageModel
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import Sequencer, TokenSequence
from embedgrad.prompt.template import Template
from embedgrad.recipe.recipe import Recipe
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.demonstrations import LeaveOut
from embedgrad.training.selection import score_of


@final
@dataclass(frozen=True)
class Task:
    """A recipe's model and prompt, the rows to train on and to choose by; no test rows.

    `state` is the folder for checkpoints of the training, or None to save none.
    """

    recipe: Recipe
    model: LanguageModel
    sequencer: Sequencer
    train: Sequence[TokenSequence]
    dev: Sequence[TokenSequence]
    report: Report
    state: Path | None = None

    @property
    def learned(self) -> Sequence[TokenSequence]:
        """The training rows, each without the demonstration that is its own."""
        for augmentation in self.recipe.parts.augmentations:
            if isinstance(augmentation, LeaveOut):
                return augmentation.without_own(self.train)
        return self.train

    def load_checkpoint(self) -> Checkpoint | None:
        """The checkpoint of an interrupted training, or None if there is none that can be read."""
        try:
            return Checkpoint.find(self.state, self.report) if self.state else None
        except RunError as error:
            say(self.report, [f"{error}; this training starts from the beginning"])
            return None

    def keep(self, state: Checkpoint) -> None:
        """Save a checkpoint. Raises `RunError`."""
        if self.state is not None:
            state.keep(self.state)

    @property
    def metric(self) -> str:
        """The metric that picks the best on dev; the log-loss breaks ties."""
        choices = bool(self.sequencer.target.choices)
        return self.recipe.training.metric_for(self.recipe.parts.objective, choices=choices)

    def evaluator(self, model: LanguageModel | None = None) -> Evaluator:
        """The evaluator of all methods, for the recipe's model or another."""
        return Evaluator(model or self.model, self.sequencer, self.recipe.evaluation)

    def sequencer_of(self, template: Template) -> Sequencer:
        """The recipe's sequencer with another template."""
        return self.model.sequencer(
            template,
            self.sequencer.target,
            [sequence.example for sequence in self.train],
            date=self.sequencer.renderer.date,
            merges=self.sequencer.merges,
            truncate=self.sequencer.truncate,
        )

    def dev_score(self, answered: Sequence[ScoredAnswer], step: int) -> dict[str, float]:
        """Scores on dev as the training loop records them."""
        summary = summarize(answered, self.sequencer.target.choices)
        examples, objective = [s.example for s in self.dev], self.recipe.parts.objective
        regret = mean_regret(objective, examples, answered)
        scores = summary.accuracy, summary.log_loss, summary.macro_f1
        return score_of(step, *scores, regret=regret)


@final
@dataclass(frozen=True)
class Trained:
    """The result of a training: tensors, and plain JSON values about it.

    `facts` has at least "trained_numbers", "stored_bytes", "examples_seen", "dev" and "settings".
    """

    tensors: Mapping[str, Tensor]
    facts: dict[str, Any]


@final
class Answers(NamedTuple):
    """A method's answers to some rows, and the number of tokens of each question."""

    answered: list[ScoredAnswer]
    tokens: list[int]


class Method(ABC):
    """A way to improve a model at a task."""

    seeded = True
    """Whether another seed gives another result."""

    def __init__(self, name: str):
        self.name = name

    def why_not(self, recipe: Recipe) -> str | None:
        """Why the method cannot run; None if it can."""
        return None

    @abstractmethod
    def train(self, task: Task, seed: int) -> Trained:
        """Train on train rows, choose on dev rows; on Ctrl-C, raise with the model unchanged."""

    @abstractmethod
    def answer(self, task: Task, trained: Trained, sequences: Sequence[TokenSequence]) -> Answers:
        """Answer rows with the result of a training."""

    def score_on_dev(self, task: Task, trained: Trained) -> dict[str, float] | None:
        """The dev scores of a method that makes no steps; None without dev rows."""
        if not task.dev:
            return None
        return task.dev_score(self.answer(task, trained, task.dev).answered, 0)


def why_not_one_span(recipe: Recipe) -> str | None:
    """Why a method that replaces or moves the only span cannot run; None if it can."""
    if recipe.demonstrations.k:
        return "it needs a single [[span]], and demonstrations are spans too"
    count = len(recipe.template.spans)
    return None if count == 1 else f"it needs a single [[span]], and the template has {count}"


def why_not_choices(recipe: Recipe) -> str | None:
    """Why a method that reads the choices' scores cannot run; None if it can."""
    return None if recipe.target.choices else "it needs target.choices, and answers are free text"


def facts_of(
    stored: int,
    score: dict[str, float] | None,
    seconds: float = 0.0,
    settings: Mapping[str, Any] = {},
    *,
    numbers: int = 0,
    seen: int = 0,
) -> dict[str, Any]:
    """Facts of a method that makes no steps: `numbers` it fitted, on `seen` rows."""
    return {
        "trained_numbers": numbers,
        "stored_bytes": stored,
        "examples_seen": seen,
        "train_seconds": seconds,
        "dev": score,
        "settings": dict(settings),
    }


def question_ids(task: Task, sequence: TokenSequence) -> Ids:
    """What the model reads of the text prompt before it answers."""
    ids = task.sequencer.prompt_ids
    own = ids if sequence.rows is None else tuple(ids[row] for row in sequence.rows)
    return sequence.plain or sequence.context(own)


def question_tokens(sequence: TokenSequence, prompt: int, *, as_text: bool = False) -> int:
    """The number of tokens that the model reads before it answers."""
    if as_text and sequence.plain is not None:
        return len(sequence.plain)
    return sequence.length(prompt)
