"""The training loop: from a text prompt to a refined one.

    sequences -> [batch -> losses -> one number -> gradient -> step -> trust region]* -> prompt

Only the prompt's rows move. They are scored on dev before the first step and at every evaluation,
and the best ones are kept (`selection.Best`), never any that dev scores below the text prompt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor

from embedgrad.errors import (
    DataError,
    DivergenceError,
    ModelError,
    RunError,
    is_out_of_memory,
    one_line,
)
from embedgrad.evaluation.evaluator import Evaluation, Evaluator
from embedgrad.events import Report, say
from embedgrad.model.backbone import Backbone, Prompt
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.workers import here
from embedgrad.parts.augmentations import BatchContext
from embedgrad.parts.parameterizations import Theta, all_rows, text_rows
from embedgrad.parts.transforms import Context, Setup
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.prompt.images import ImageSequencer
from embedgrad.prompt.joint import JointSequencer
from embedgrad.prompt.sequence import Sequencer, TokenSequence
from embedgrad.prompt.span import rows_by_span
from embedgrad.prompt.trust_region import distances
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.interruption import hold_interrupts
from embedgrad.training.loop_state import restore_checkpoint, take_checkpoint
from embedgrad.training.loss import Loss, length_of
from embedgrad.training.rollouts import Rollouts
from embedgrad.training.selection import Best, score_dev
from embedgrad.training.settings import Parts, Refinement, Training
from embedgrad.training.teacher import Teacher


@final
class Loop:
    """The names that the steps of one run share; `optimize` and `optimize_tasks` use it."""

    def __init__(
        self,
        model: Backbone,
        sequencer: Sequencer | JointSequencer | ImageSequencer,
        train: Sequence[TokenSequence],
        dev: Sequence[TokenSequence],
        training: Training,
        parts: Parts,
        evaluation: Evaluation,
        report: Report,
        start: Prompt | None,
        teacher: Teacher | None,
    ):
        if not train:
            raise DataError("no training rows; give at least one example")
        parts.check(train)
        self.model, self.sequencer, self.train, self.dev = model, sequencer, train, dev
        self.training, self.parts, self.report, self.teacher = training, parts, report, teacher
        self.language_model = model if isinstance(model, LanguageModel) else None
        self.evaluator = Evaluator(model, sequencer, evaluation).greedy
        self.is_text, self.scores_text = start is None, True
        text_PD = text_rows(model, sequencer.prompt_ids, parts.parameterization)
        start = start or rows_by_span(text_PD, sequencer.spans)
        self.start_prompt = {name: rows.to(text_PD) for name, rows in start.items()}
        self.loss = Loss(model, parts, sequencer.target, self.start_prompt)
        generator = torch.Generator().manual_seed(training.seed)
        self.theta = parts.parameterization.init(self.start_prompt, generator)
        self.origin = {name: value.clone() for name, value in self.theta.items()}
        for value in self.theta.values():
            value.requires_grad_(True)
        self.optimizer = parts.optimizer.build(list(self.theta.values()))
        setup = Setup(self.start_prompt, train, sequencer.vocabulary, model.embed)
        self.transforms = [transform.init(self.origin, setup) for transform in parts.transforms]
        self.memory = dict[str, Tensor]()  # of the objective
        self.units = training.units([s.example.group for s in train])
        self.strata = training.strata(self.units, train, parts.objective.balance_by)
        self.steps_per_epoch = training.steps_per_epoch(len(self.units))
        self.total = training.steps_in_all(len(self.units))
        self.every = training.steps_between_evaluations(len(self.units))
        sampling = parts.objective.sampling
        self.updates = 1 if sampling is None else sampling.updates
        self.rollouts: Rollouts | None = None
        if sampling is not None:
            own = (model, self.evaluator, train, sampling, parts.sampling)
            start = self.start_prompt
            self.rollouts = Rollouts(*own, seed=training.seed, start=start, report=report)
        metric = training.metric_for(parts.objective, choices=bool(sequencer.target.choices))
        self.best = Best(metric, self.start_prompt, rows=len(dev))
        self.best_theta = self.copy_theta()
        self.proven = self.start_prompt  # the last whose loss was finite
        self.step, self.skipped, self.dead = 0, 0, dict[str, Any]()
        self.accumulate = training.accumulate
        self.whole = False  # whether what is here is what the next step needs, and nothing more
        self.saved = self.began = time.perf_counter()
        self.seconds_before = 0.0
        self.checkpoint = take_checkpoint(self)

    def train_through(
        self,
        checkpoint: Checkpoint | None,
        warm_start: Prompt | None,
        keep: Callable[[Checkpoint], None],
        should_stop: Callable[[], bool],
    ) -> tuple[str, Exception | None]:
        """Begin or resume, and take all steps; returns why it ended, and the error that ended it.

        Whatever ends it, there are best rows, and a checkpoint of the last whole step. Raises
        `RunError` for a checkpoint that does not fit: nothing was trained.
        """
        if checkpoint is not None:
            restore_checkpoint(self, checkpoint)
        failure: Exception | None = None
        try:
            try:
                self.start(checkpoint, warm_start)
                ended = self.run(keep, should_stop)
            except Exception as error:  # a user's scorer may fail at any answer, memory at any step
                ended = "diverged" if isinstance(error, DivergenceError) else "failed"
                failure = here().explain(error)
                if is_out_of_memory(error):
                    failure = ModelError(f"step {self.step + 1}: {one_line(error)}")
        except KeyboardInterrupt:  # also while a failure is explained
            failure = here().failure()  # where one is gone, the launcher ends the others
            ended = "failed" if failure else "interrupted"
        if not self.dev:  # nothing decides which rows are best: take the last of finite loss
            self.best.take(self.prompt() if failure is None else self.proven, self.step)
        self.note_theta()  # also of rows that Ctrl-C came after
        try:
            if self.whole and ended not in ("finished", "patience", "stopped"):
                self._keep(keep)
            end = {"event": "end", "ended": ended, "steps": self.step}
            self.report({**end, "seconds": self.seconds()})
        except KeyboardInterrupt:
            ended = "interrupted"
        except Exception as error:
            ended, failure = "failed", failure or error
        return ended, failure

    def start(self, checkpoint: Checkpoint | None, warm_start: Prompt | None) -> None:
        """Begin at the text prompt, scored on dev, or warm; or resume from a checkpoint."""
        if checkpoint is None:
            measured = self.loss.losses_at(self.theta)
            self.memory = self.parts.objective.init(self.train, measured, self.total)
        left, new = self.total - self.step, not self.best.history
        if self.language_model is not None:
            train, dev = (here().select_stored(rows) for rows in (self.train, self.dev))
            self.language_model.prefix_cache.expect(
                ([s.prefix for s in train], left / self.steps_per_epoch),
                ([s.prefix for s in dev], (left / self.every + new) * self.evaluator.lookups),
            )
        self.scores_text = not (warm_start and self.parts.keeps_start)
        if self.dev and new and self.scores_text:
            self._evaluate()
        if checkpoint is None and warm_start is not None:
            rows = {name: warm_start[name].to(own) for name, own in self.start_prompt.items()}
            self.set_theta(self.parts.parameterization.reach(rows, self.start_prompt))
            self._into_region()
            self.proven = {name: rows.detach().clone() for name, rows in self.prompt().items()}
            if self.dev:
                self._evaluate(warm=True)
        self.checkpoint, self.whole = take_checkpoint(self), True

    def run(self, keep: Callable[[Checkpoint], None], should_stop: Callable[[], bool]) -> str:
        """All steps; returns why it ended."""
        scored = not self.dev or self.step in [score["step"] for score in self.best.history]
        if self.step and self._is_due() and not scored:  # it ended in the middle
            self._evaluate()
            self._keep(keep)
        if self.best.stops_early(self.training.patience):  # ended right after its last checkpoint
            return "patience"
        for step, batch in self._batches(self.step):
            began = time.perf_counter()
            here().begin_step()
            loss, norm, figures = 0.0, 0.0, dict[str, float]()
            if self.rollouts is not None:
                batch, figures = self.rollouts.draw(self.prompt(), batch, step)
                if self.teacher is not None:
                    batch = self.teacher.teach(batch, self.prompt())
            with hold_interrupts():
                for _ in range(self.updates if batch else 0):  # no answers to learn from: no step
                    loss, norm = self._step_or_skip(step, batch)
                self.step, self.whole = step + 1, True
                self.dead = self.rollouts.dead if self.rollouts else {}
                figures |= {"skipped": self.skipped} if self.skipped else {}
                self._report_step(loss, norm, len(batch), time.perf_counter() - began, figures)
            due = self._is_due()
            if due and self.dev:
                self._evaluate()
            elif due:
                self.best.take(self.prompt(), self.step)
            stop = self.step < self.total and should_stop()
            late = time.perf_counter() - self.saved > self.training.checkpoint_seconds
            if due or stop or late:
                self._keep(keep)
            if due and self.best.stops_early(self.training.patience):
                return "patience"
            if stop:
                return "stopped"
        return "finished"

    def _is_due(self) -> bool:
        """Whether the present step is one after which dev is scored."""
        return self.step % self.every == 0 or self.step == self.total

    def _keep(self, keep: Callable[[Checkpoint], None]) -> None:
        """Write a checkpoint; if that fails, report it and retry after the next step."""
        self.checkpoint = take_checkpoint(self)
        try:
            with hold_interrupts():
                keep(self.checkpoint)
        except RunError as error:
            if self.saved > 0:
                say(self.report, [f"{error}; training continues, and the next step tries again"])
            self.saved = -math.inf
        else:
            self.saved = time.perf_counter()

    def _batches(self, first: int) -> Iterator[tuple[int, list[TokenSequence]]]:
        """Batches by step; an epoch's depend on nothing but seed and epoch."""
        for epoch in range(math.ceil(self.total / self.steps_per_epoch)):
            batches = self.training.epoch_batches(self.units, epoch, self.strata)
            for i, batch in enumerate(batches):
                step = epoch * self.steps_per_epoch + i
                if not first <= step < self.total:
                    continue
                # The first step does not wait for the prefixes of others.
                if step > first and self.language_model is not None:
                    ahead = batches[i : i + min(16, self.total - step)]
                    self.language_model.prepare([self.train[j] for next_ in ahead for j in next_])
                sequences = [self.train[j] for j in batch]
                seed, vocabulary = self.training.seed, self.sequencer.vocabulary
                for augmentation in self.parts.augmentations:
                    context = BatchContext(seed, step, self.total, vocabulary)
                    sequences = augmentation(sequences, context)
                yield step, sequences

    def _step_or_skip(self, step: int, batch: Sequence[TokenSequence]) -> tuple[float, float]:
        """A step; where it would diverge and the recipe says so, none."""
        try:
            return self._step(step, batch)
        except DivergenceError as error:
            if self.touched or self.training.not_finite == "stop":
                raise
            self.skipped += 1
            if self.skipped == 1:
                say(self.report, [f"{error}; left out (told once, all are counted)"])
            return math.nan, math.nan

    def _step(self, step: int, batch: Sequence[TokenSequence]) -> tuple[float, float]:
        """Move theta; returns the loss and the length of its gradient."""
        parts, norm = self.parts, math.nan
        context: Context | None = None
        old, self.touched = self.copy_theta(), False

        def closure() -> float:
            nonlocal norm, context
            if any(not torch.equal(value, old[name]) for name, value in self.theta.items()):
                self._into_region()  # the optimizer asks for the gradient of another point
            found, parts_in = self.loss.gradient_in_memory(
                self.theta, batch, self.accumulate, self.memory
            )
            if parts_in > self.accumulate:
                where = f"out of memory: from step {step + 1} on a batch is computed in"
                say(self.report, [f"{where} {parts_in} parts; the gradient is the same"])
                self.accumulate = parts_in
            loss, gradients, losses_B, outcome = found
            norm = length_of(found, step, batch)
            self.whole, self.touched = False, True  # until the step is done
            self.proven = {name: rows.detach().clone() for name, rows in self.prompt().items()}
            context = Context(step, self.total, batch, outcome, losses_B, rate)
            for i, transform in enumerate(parts.transforms):
                gradients, self.transforms[i] = transform.before(
                    gradients, self.transforms[i], context
                )
            for name, value in self.theta.items():
                value.grad = gradients[name]
            return loss

        rate = parts.optimizer.learning_rate * parts.schedule.factor(step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = float(self.optimizer.step(closure))
        assert context is not None, "the optimizer did not call its closure"
        self.memory = parts.objective.update(self.memory, context.losses_B, context.outcome)
        with torch.no_grad():
            theta = self.copy_theta()
            for i, transform in enumerate(parts.transforms):
                theta, self.transforms[i] = transform.after(old, theta, self.transforms[i], context)
            self.set_theta(theta)
            self._into_region()
        return loss, norm

    def _into_region(self) -> None:
        """Last of all that happens to theta in a step."""
        if not torch.isfinite(all_rows(self.prompt()).norm(dim=1)).all():
            where = f"step {self.step + 1}: a row went to infinity"
            raise DivergenceError(f"{where}; try a smaller optimizer.learning_rate")
        region, fit = self.parts.trust_region, self.parts.parameterization.fit
        self.set_theta(fit(self.copy_theta(), self.origin, self.start_prompt, region))
        inside = region.holds(all_rows(self.prompt()), all_rows(self.start_prompt))
        assert inside, "a row left the trust region"

    def prompt(self) -> Prompt:
        """The prompt now, differentiable in theta."""
        return self.parts.parameterization.prompt(self.theta, self.start_prompt)

    def copy_theta(self) -> Theta:
        """Theta as it is now."""
        return {name: value.detach().clone() for name, value in self.theta.items()}

    @torch.no_grad()
    def note_theta(self) -> None:
        """Keep the theta of the best prompt, if it is the present one."""
        if torch.equal(all_rows(self.prompt()), all_rows(self.best.prompt)):
            self.best_theta = self.copy_theta()

    @torch.no_grad()
    def set_theta(self, theta: Theta) -> None:
        """Move theta there."""
        for name, value in theta.items():
            self.theta[name].copy_(value)

    @torch.no_grad()
    def _evaluate(self, *, warm: bool = False) -> None:
        prompt, plain = self.prompt(), self.is_text and not (self.step or warm)
        score_prompt = self.evaluator.score_text_prompt if plain else self.evaluator.score
        try:
            answers = score_prompt(prompt, self.dev)
        except ModelError as error:
            why = f"step {self.step}: {error}, or a smaller optimizer.learning_rate"
            raise DivergenceError(why) from error
        objective, choices = self.parts.objective, self.sequencer.target.choices
        self.best.add(score_dev(self.step, self.dev, answers, choices, objective), prompt)
        event = self.best.event(text=self.scores_text) | {"total": self.total, "every": self.every}
        self.report({**event, "warm_start": warm})

    @torch.no_grad()
    def _report_step(
        self, loss: float, norm: float, examples: int, seconds: float, figures: dict[str, float]
    ) -> None:
        cache = {} if self.language_model is None else self.language_model.prefix_cache.progress
        self.report(
            {
                "event": "step",
                "step": self.step,
                "total": self.total,
                "loss": loss,
                "gradient_norm": norm,
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                **distances(all_rows(self.prompt()), all_rows(self.start_prompt)),
                "examples": examples,
                "seconds": seconds,
                **figures,
                **cache,
                **here().end_step(),
            }
        )

    def seconds(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self.seconds_before + time.perf_counter() - self.began

    def result(
        self, sequencer: Sequencer | ImageSequencer, ended: str, names: Sequence[str] | None = None
    ) -> Refinement:
        """The best rows so far as a prompt, or those of the spans of one of several tasks."""
        best, start = (
            torch.cat([rows for name, rows in prompt.items() if names is None or name in names], -2)
            for prompt in (self.best.prompt, self.start_prompt)
        )
        prompt = PromptEmbedding(
            template=sequencer.renderer.template,
            target=sequencer.target,
            spans=sequencer.spans,
            date=sequencer.renderer.date,
            start_rows=start.cpu(),
            rows=best.cpu(),
            trust_region=self.parts.trust_region,
            provenance={"model": i.facts()} if (i := getattr(self.model, "info", None)) else {},
        )
        return Refinement(prompt, self.checkpoint, ended, self.step, self.seconds(), self.best)
