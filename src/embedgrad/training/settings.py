"""Settings and result of a training run."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, final

from annotated_types import Ge, Gt, Lt

from embedgrad.errors import DataError, RecipeError
from embedgrad.formatting import duration, pluralize
from embedgrad.parts.augmentations import Augmentation
from embedgrad.parts.objectives import CrossEntropy, Objective
from embedgrad.parts.optimizers import AdamW, Optimizer, Schedule
from embedgrad.parts.parameterizations import Free, Parameterization
from embedgrad.parts.transforms import Clip, Transform
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.prompt.trust_region import TrustRegion
from embedgrad.report.figures.series import METRICS
from embedgrad.report.page.notebook import or_else, prompt_html, table_html
from embedgrad.report.terminal.progress import ENDINGS, dev_score
from embedgrad.report.terminal.tables import sentence
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.engine import SamplingEngine
from embedgrad.training.selection import Best


@final
@dataclass(frozen=True)
class Training:
    """How long to train, on how much at a time, and which rows to keep."""

    epochs: Annotated[float, Gt(0)] = 4.0
    """Passes over the training examples."""
    steps: Annotated[int, Gt(0)] | None = None
    """Steps in all, instead of epochs."""
    batch_size: Annotated[int, Gt(0)] = 16
    """Examples per step, or groups per step where training.batch_by = "groups"."""
    batch_by: Literal["examples", "groups"] = "examples"
    """What a batch counts; groups: every batch holds whole groups, by the column data.group."""
    accumulate: Annotated[int, Gt(0)] = 1
    """Parts in which a batch is computed one after the other, to save memory; the same gradient."""
    evaluate_every: Annotated[int, Gt(0)] | None = None
    """Steps between evaluations on dev; unset: once per epoch."""
    metric: Literal["auto", "accuracy", "macro_f1", "log_loss", "regret"] = "auto"
    """What decides which rows are best; auto: regret with objective = "regret", log_loss
    with a teacher, else accuracy for choices, rewards and self-written solutions, log_loss for
    other free text. Between equal scores log_loss decides; if the loss is over both, the sum of
    both losses, and scores within one standard error are equal."""
    patience: Annotated[int, Gt(0)] | None = None
    """Early stopping: evaluations without a better score after which to stop; unset: never."""
    not_finite: Literal["stop", "skip"] = "stop"
    """What to do if a batch's loss or gradient is not finite: stop before its step, or skip the
    batch and count it."""
    checkpoint_seconds: Annotated[float, Gt(0)] = 60.0
    """Seconds between checkpoints; there is one after every evaluation too."""
    seed: Annotated[int, Ge(0)] = 0
    """Decides the order of the examples, and any random start."""
    warm_start: str | None = None
    """A run or prompt of the same words: training continues from its rows. The trust region stays
    around the rows of the words. Unset: training starts from the words."""
    replay: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of each batch that is added from the training rows of the run in warm_start, and of
    the runs before it."""

    def units(self, groups: Sequence[str | None]) -> list[list[int]]:
        """Indices of the examples that stay together in a batch, given the group of each example.

        Raises `DataError` where batches of groups are asked for and an example has none.
        """
        if self.batch_by == "examples":
            return [[i] for i in range(len(groups))]
        units: dict[str, list[int]] = {}
        for i, group in enumerate(groups):
            if group is None:
                raise DataError(
                    "training.batch_by: 'groups', but the examples have none; set data.group to "
                    "the column that says which rows belong together"
                )
            units.setdefault(group, []).append(i)
        return list(units.values())

    def strata(
        self, units: Sequence[Sequence[int]], train: Sequence[TokenSequence], column: str | None
    ) -> list[list[int]]:
        """Indices of the units by the value that their first example has in a column.

        One stratum of all where there is no column, or a batch holds all units anyway.
        """
        if column is None or len(units) <= self.batch_size:
            return [list(range(len(units)))]
        strata: dict[str, list[int]] = {}
        for i, unit in enumerate(units):
            strata.setdefault(train[unit[0]].example.group_in(column), []).append(i)
        return list(strata.values())

    def epoch_batches(
        self, units: Sequence[Sequence[int]], epoch: int, strata: Sequence[Sequence[int]] = ()
    ) -> list[list[int]]:
        """The batches of an epoch as indices of examples; the last one may be smaller.

        Of several `strata` every batch takes equally many units, or one more of some, and small
        ones begin again before large ones are through.
        """
        size = self.batch_size
        if len(strata) > 1:
            order = self._balanced_order(len(units), epoch, strata)
        else:
            order = self.epoch_order(len(units), epoch)
        return [
            [i for unit in order[start : start + size] for i in units[unit]]
            for start in range(0, len(order), size)
        ]

    def batches(
        self, units: Sequence[Sequence[int]], steps: int, strata: Sequence[Sequence[int]] = ()
    ) -> Iterator[list[int]]:
        """The batches of the first `steps` steps, over all epochs."""
        epochs = (self.epoch_batches(units, epoch, strata) for epoch in itertools.count())
        return itertools.islice(itertools.chain.from_iterable(epochs), steps)

    def epoch_order(self, rows: int, epoch: int) -> list[int]:
        """In which order an epoch takes the rows; depends on the seed and nothing else."""
        order = list(range(rows))
        random.Random(f"{self.seed}:{epoch}").shuffle(order)
        return order

    def _balanced_order(self, units: int, epoch: int, strata: Sequence[Sequence[int]]) -> list[int]:
        """The units of an epoch, in turn from every stratum, each shuffled anew in every round."""
        order, n = list[int](), len(strata)
        shuffled: dict[tuple[int, int], list[int]] = {}
        for turn in range(epoch * units, (epoch + 1) * units):
            stratum, members = turn % n, strata[turn % n]
            again, place = divmod(turn // n, len(members))
            if (stratum, again) not in shuffled:
                own = list(members)
                random.Random(f"{self.seed}:{stratum}:{again}").shuffle(own)
                shuffled[stratum, again] = own
            order.append(shuffled[stratum, again][place])
        return order

    def steps_per_epoch(self, rows: int) -> int:
        """Steps that take every row (or group) once; the last one may take fewer."""
        return math.ceil(rows / self.batch_size)

    def steps_in_all(self, rows: int) -> int:
        """Steps of a whole training."""
        return self.steps or max(1, round(self.epochs * self.steps_per_epoch(rows)))

    def steps_between_evaluations(self, rows: int) -> int:
        """Steps from one evaluation on dev to the next."""
        return self.evaluate_every or min(self.steps_per_epoch(rows), self.steps_in_all(rows))

    def metric_for(
        self, objective: Objective, *, choices: bool, source: str = "answer"
    ) -> Literal["accuracy", "macro_f1", "log_loss", "regret"]:
        """What decides which rows are best, given where the texts to learn come from.

        Dev examples have bare answers only. How likely one is directly after the question says
        little about a model that reasons first, so with self-written solutions accuracy decides.
        With a teacher's answers log-loss does, which feels changes that turn no choice over.
        """
        if self.metric != "auto":
            return self.metric
        if objective.decides:
            return "regret"
        if source == "teacher":
            return "log_loss"
        sampling = objective.sampling
        by_reward = sampling is not None and sampling.scored
        return "accuracy" if choices or by_reward or source == "self-written" else "log_loss"


@final
@dataclass(frozen=True)
class Parts:
    """What a run is made of; every default is the plain method."""

    trust_region: TrustRegion = TrustRegion()
    parameterization: Parameterization = Free()
    objective: Objective = CrossEntropy()
    augmentations: tuple[Augmentation, ...] = ()
    transforms: tuple[Transform, ...] = (Clip(),)
    optimizer: Optimizer = AdamW()
    schedule: Schedule = Schedule()
    sampling: SamplingEngine = SamplingEngine()

    @property
    def keeps_start(self) -> bool:
        """Whether a transform wants selection to begin at a warm start's rows."""
        return any(transform.keeps_start for transform in self.transforms)

    def check(self, train: Sequence[TokenSequence]) -> None:
        """Raise `RecipeError` for an augmentation that can do nothing with these rows."""
        for i, augmentation in enumerate(self.augmentations):
            problem = augmentation.problem(train)
            if problem:
                raise RecipeError("recipe", [f"augmentations.{i}: {problem}"])


@final
@dataclass(frozen=True)
class Refinement:
    """Result of a training run: the best prompt, and the checkpoint to resume from.

    `ended` is "finished", "patience" (early stopping), "stopped" (asked to), "interrupted"
    (Ctrl-C), "diverged" or "failed" (another error). `best` holds the scores on dev and the best
    prompt as named tensors.
    """

    prompt: PromptEmbedding
    checkpoint: Checkpoint
    ended: str
    steps: int
    seconds: float
    best: Best

    def _repr_html_(self) -> str:
        """What a notebook shows: how the training ended, its best dev score, and the prompt."""
        return or_else("Refinement", self._html)

    def _html(self) -> str:
        line = (
            f"{pluralize(self.steps, 'step')} in {duration(self.seconds)} ({ENDINGS[self.ended]})"
        )
        if self.best.history:
            dev, metric = self.best.event(), self.best.metric
            first, best = (dev_score(metric, dev[name]) for name in ("text", "best"))
            line += f"; dev {METRICS[metric]} {first} at first, {best} at step {self.best.step}"
        return table_html(sentence(line)) + prompt_html(self.prompt)
