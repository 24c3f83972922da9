"""What a run of the loop is told, and what it gives back."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from embedgrad.parts.objectives import CrossEntropy, Objective
from embedgrad.parts.optimizers import AdamW, Optimizer, Schedule
from embedgrad.parts.parameterizations import Free, Parameterization
from embedgrad.parts.transforms import Clip, Transform
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.prompt.trust_region import TrustRegion
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.selection import Best


@dataclass(frozen=True)
class Training:
    """How long to train, on how much at a time, and which rows to keep."""

    epochs: Annotated[float, Gt(0)] = 4.0
    """Passes over the training examples."""
    steps: Annotated[int, Gt(0)] | None = None
    """Steps in all, instead of epochs."""
    batch_size: Annotated[int, Gt(0)] = 16
    """Examples per step."""
    accumulate: Annotated[int, Gt(0)] = 1
    """Parts in which a batch is computed one after the other, to save memory; the same gradient."""
    evaluate_every: Annotated[int, Gt(0)] | None = None
    """Steps between evaluations on dev; unset: once per epoch."""
    metric: Literal["auto", "accuracy", "macro_f1", "log_loss"] = "auto"
    """What says which rows are best; auto: accuracy for choices and where the model is trained on
    solutions of its own, log_loss for other free text.
    Equal accuracies are told apart by log_loss."""
    patience: Annotated[int, Gt(0)] | None = None
    """Evaluations without a better score after which to stop; unset: never."""
    seed: Annotated[int, Ge(0)] = 0
    """Decides the order of the examples, and any random start."""

    def steps_per_epoch(self, rows: int) -> int:
        """Steps that take every row once; the last one may take fewer."""
        return math.ceil(rows / self.batch_size)

    def steps_in_all(self, rows: int) -> int:
        """Steps of a whole training."""
        return self.steps or max(1, round(self.epochs * self.steps_per_epoch(rows)))

    def steps_between_evaluations(self, rows: int) -> int:
        """Steps from one evaluation on dev to the next."""
        return self.evaluate_every or min(self.steps_per_epoch(rows), self.steps_in_all(rows))

    def metric_for(self, *, choices: bool) -> str:
        """What says which rows are best, where the answers are choices or free text."""
        auto = "accuracy" if choices else "log_loss"
        return auto if self.metric == "auto" else self.metric

    def epoch_order(self, rows: int, epoch: int) -> list[int]:
        """In which order an epoch takes the rows; depends on the seed and nothing else."""
        order = list(range(rows))
        random.Random(f"{self.seed}:{epoch}").shuffle(order)
        return order


@dataclass(frozen=True)
class Parts:
    """What a run is made of; every default is the plain method."""

    trust_region: TrustRegion = TrustRegion()
    parameterization: Parameterization = Free()
    objective: Objective = CrossEntropy()
    transforms: tuple[Transform, ...] = (Clip(),)
    optimizer: Optimizer = AdamW()
    schedule: Schedule = Schedule()


@dataclass(frozen=True)
class Refinement:
    """What a run of the loop gave: the best prompt, and where the loop stood at its end.

    `ended` is "finished", "patience", "interrupted" (Ctrl-C) or "diverged". `state` is that of the
    last evaluation, from which a run can go on; `best` holds the scores on dev.
    """

    prompt: PromptEmbedding
    state: Checkpoint
    ended: str
    steps: int
    seconds: float
    best: Best
