"""The loop: from a text prompt to a refined one.

    sequences -> [batch -> losses -> one number -> gradient -> step -> trust region]* -> rows

Only the rows move. They are scored on dev before the first step and at every evaluation, and the
best ones seen come out: a run never ends with a prompt that dev says is worse than the text.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from embedgrad.errors import DataError, DivergenceError, ModelError, RunError
from embedgrad.evaluation.evaluator import Evaluation, Evaluator, summarize
from embedgrad.events import Report, nowhere
from embedgrad.model.language_model import LanguageModel
from embedgrad.parts.parameterizations import Theta
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.prompt.sequence import Sequencer, TokenSequence
from embedgrad.prompt.trust_region import distances
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.selection import Best, score_of
from embedgrad.training.settings import Parts, Refinement, Training


def optimize(
    model: LanguageModel,
    sequencer: Sequencer,
    train: Sequence[TokenSequence],
    dev: Sequence[TokenSequence] = (),
    *,
    training: Training = Training(),
    parts: Parts = Parts(),
    evaluation: Evaluation = Evaluation(),
    start_rows: Tensor | None = None,
    state: Checkpoint | None = None,
    report: Report = nowhere,
    keep: Callable[[Checkpoint], None] = lambda state: None,
) -> Refinement:
    """Refine the rows of the span on `train`, keeping those that score best on `dev`.

    `start_rows`, shape [P, D], take the place of the text's own rows. Without dev rows the last
    rows are kept. `report` gets one event (plain JSON values) per step,
    evaluation and note; `keep` gets the state after every evaluation, and `state` continues from
    one. Ctrl-C ends the loop and returns the best rows so far. Raises `DivergenceError` when a loss
    or gradient is not finite, before the step is made; its `refinement` holds the best rows so far.
    """
    loop = _Loop(model, sequencer, train, dev, training, parts, evaluation, report, start_rows)
    started = time.perf_counter()
    failure: DivergenceError | None = None
    try:
        loop.start(state)
        ended = loop.run(keep)
    except KeyboardInterrupt:
        ended = "interrupted"
    except DivergenceError as error:
        ended, failure = "diverged", error
    seconds = time.perf_counter() - started
    if not dev:  # nothing says which rows are best: take the last, after a failure the last proven
        loop.best.take(loop.rows() if failure is None else loop.proven, loop.step)
    refinement = loop.result(ended, seconds)
    report({"event": "end", "ended": ended, "steps": loop.step, "seconds": seconds})
    if failure is not None:
        failure.refinement = refinement
        raise failure
    return refinement


class _Loop:
    """The names that the steps of one run share."""

    def __init__(
        self,
        model: LanguageModel,
        sequencer: Sequencer,
        train: Sequence[TokenSequence],
        dev: Sequence[TokenSequence],
        training: Training,
        parts: Parts,
        evaluation: Evaluation,
        report: Report,
        start_rows: Tensor | None,
    ):
        if not train:
            raise DataError("no training rows; give at least one example")
        self.model, self.sequencer, self.train, self.dev = model, sequencer, train, dev
        self.training, self.parts, self.report = training, parts, report
        self.evaluator = Evaluator(model, sequencer, evaluation)
        self.choices = parts.objective.needs_choices(available=bool(sequencer.target.choices))
        text_PD = model.embed(sequencer.prompt_ids)
        self.is_text = start_rows is None
        self.start_PD = text_PD if start_rows is None else start_rows.to(text_PD)
        generator = torch.Generator().manual_seed(training.seed)
        self.theta = parts.parameterization.init(self.start_PD, generator)
        for value in self.theta.values():
            value.requires_grad_(True)
        self.optimizer = parts.optimizer.build(list(self.theta.values()))
        self.steps_per_epoch = training.steps_per_epoch(len(train))
        self.total = training.steps_in_all(len(train))
        self.every = training.steps_between_evaluations(len(train))
        metric = training.metric_for(choices=bool(sequencer.target.choices))
        self.best = Best(metric, self.start_PD)
        self.proven = self.start_PD  # the last rows whose loss was finite
        self.step = 0
        self.state = self._snapshot()

    # -- the run -------------------------------------------------------------------------------

    def start(self, state: Checkpoint | None) -> None:
        """Begin at the text prompt, scored on dev; or go on from a state."""
        if state is not None:
            self._restore(state)
        left, new = self.total - self.step, not self.best.history
        self.model.prefix_cache.expect(
            ([s.prefix for s in self.train], left / self.steps_per_epoch),
            ([s.prefix for s in self.dev], (left / self.every + new) * self.evaluator.lookups),
        )
        if self.dev and new:
            self._evaluate()
        self.state = self._snapshot()

    def run(self, keep: Callable[[Checkpoint], None]) -> str:
        """All steps; returns why it ended."""
        if self.best.stops_early(self.training.patience):  # cut off right after its last state
            return "patience"
        for step, batch in self._batches(self.step):
            began = time.perf_counter()
            loss, norm = self._step(step, batch)
            self.step = step + 1
            self._report_step(loss, norm, len(batch), time.perf_counter() - began)
            if self.step % self.every == 0 or self.step == self.total:
                if self.dev:
                    self._evaluate()
                else:
                    self.best.take(self.rows(), self.step)
                self.state = self._snapshot()
                keep(self.state)
                if self.best.stops_early(self.training.patience):
                    return "patience"
        return "finished"

    def _snapshot(self) -> Checkpoint:
        """Where the loop stands, out of reach of its next step."""
        return Checkpoint(
            step=self.step,
            theta={name: value.detach().clone() for name, value in self.theta.items()},
            optimizer=copy.deepcopy(self.optimizer.state_dict()),
            best_rows=self.best.rows.clone(),
            best_step=self.best.step,
            history=list(self.best.history),
        )

    def _restore(self, state: Checkpoint) -> None:
        saved, own = ({k: v.shape for k, v in t.items()} for t in (state.theta, self.theta))
        if saved != own:
            raise RunError("the saved state belongs to another prompt, model or parameterization")
        self._set_theta(state.theta)
        self.optimizer.load_state_dict(copy.deepcopy(state.optimizer))
        rows = state.best_rows.to(self.start_PD)
        self.best = Best(self.best.metric, rows, state.best_step, list(state.history))
        self.step = state.step

    def _batches(self, first: int) -> Iterator[tuple[int, list[TokenSequence]]]:
        """Batches by step; the order of an epoch depends on nothing but seed and epoch."""
        size = self.training.batch_size
        for epoch in range(math.ceil(self.total / self.steps_per_epoch)):
            order = self.training.epoch_order(len(self.train), epoch)
            for i in range(self.steps_per_epoch):
                step, rows = epoch * self.steps_per_epoch + i, order[i * size :]
                if first <= step < self.total:
                    if step > first:  # the first step shall not wait for others' prefixes
                        ahead = size * min(16, self.total - step)
                        self.model.prepare([self.train[j] for j in rows[:ahead]])
                    yield step, [self.train[j] for j in rows[:size]]

    # -- one step ------------------------------------------------------------------------------

    def _step(self, step: int, batch: Sequence[TokenSequence]) -> tuple[float, float]:
        parts, names, norm = self.parts, list(self.theta), math.nan

        def closure() -> float:
            nonlocal norm
            loss, gradients = self._gradients(batch)
            norm = math.sqrt(sum(g.pow(2).sum().item() for g in gradients.values()))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                where = ", ".join(s.example.source for s in batch[:3])
                raise DivergenceError(
                    f"step {step + 1}: the loss is {loss} and its gradient's length {norm} (rows "
                    f"{where}, ...); stopped before the step; try a smaller "
                    "optimizer.learning_rate, or model.dtype = 'float32'"
                )
            self.proven = self.rows().detach().clone()
            for transform in parts.transforms:
                gradients = transform(gradients)
            for name in names:
                self.theta[name].grad = gradients[name]
            return loss

        for group in self.optimizer.param_groups:
            group["lr"] = parts.optimizer.learning_rate * parts.schedule.factor(step, self.total)
        loss = float(self.optimizer.step(closure))
        self._into_region()
        return loss, norm

    def _gradients(self, batch: Sequence[TokenSequence]) -> tuple[float, dict[str, Tensor]]:
        """Loss of a batch and its gradient in theta; parts of a batch add up to the whole."""
        names, leaves = list(self.theta), list(self.theta.values())
        size = math.ceil(len(batch) / self.training.accumulate)
        total, sums = 0.0, [torch.zeros_like(leaf) for leaf in leaves]
        for i in range(0, len(batch), size):
            part = batch[i : i + size]
            share = len(part) / len(batch)
            loss = self._loss(self.theta, part) * share
            total += loss.item()
            for held, new in zip(sums, torch.autograd.grad(loss, leaves), strict=True):
                held += new
        return total, dict(zip(names, sums, strict=True))

    def _loss(self, theta: Theta, batch: Sequence[TokenSequence]) -> Tensor:
        """One number, a pure function of theta."""
        rows = self.parts.parameterization.rows(theta, self.start_PD)
        normalize = self.sequencer.target.normalize
        outcome = self.model.outcome(rows, batch, choices=self.choices, normalize=normalize)
        return self.parts.objective.reduce(self.parts.objective.losses(outcome), outcome)

    @torch.no_grad()
    def _into_region(self) -> None:
        """Last of all that happens to theta in a step."""
        region, rows = self.parts.trust_region, self.rows()
        if not torch.isfinite(rows.norm(dim=1)).all():
            where = f"step {self.step + 1}: a row went to infinity"
            raise DivergenceError(f"{where}; try a smaller optimizer.learning_rate")
        inside = region.project(rows, self.start_PD)
        if not torch.equal(rows, inside):
            self._set_theta(self.parts.parameterization.fit(self.theta, inside, self.start_PD))
        assert region.holds(self.rows(), self.start_PD), "a row left the trust region"

    def rows(self) -> Tensor:
        """The rows as they are now, differentiable in theta."""
        return self.parts.parameterization.rows(self.theta, self.start_PD)

    @torch.no_grad()
    def _set_theta(self, theta: Theta) -> None:
        for name, value in theta.items():
            self.theta[name].copy_(value)

    # -- scores --------------------------------------------------------------------------------

    @torch.no_grad()
    def _evaluate(self) -> None:
        rows = self.rows().detach()
        plain = self.is_text and not self.step
        try:
            answered = (self.evaluator.score_text_prompt if plain else self.evaluator.score)(
                rows, self.dev
            )
        except ModelError as error:
            why = f"step {self.step}: {error}, or a smaller optimizer.learning_rate"
            raise DivergenceError(why) from error
        summary = summarize(answered, self.sequencer.target.choices)
        score = score_of(self.step, summary.accuracy, summary.log_loss, summary.macro_f1)
        self.best.add(score, rows)
        told = {"metric": self.best.metric, "best": self.best.score, "text": self.best.history[0]}
        plan = {"total": self.total, "every": self.every}
        self.report({"event": "evaluation", **score, **told, **plan})

    # -- what comes out ------------------------------------------------------------------------

    @torch.no_grad()
    def _report_step(self, loss: float, norm: float, examples: int, seconds: float) -> None:
        self.report(
            {
                "event": "step",
                "step": self.step,
                "total": self.total,
                "loss": loss,
                "gradient_norm": norm,
                "learning_rate": self.optimizer.param_groups[0]["lr"],
                **distances(self.rows(), self.start_PD),
                "examples": examples,
                "seconds": seconds,
                **self.model.prefix_cache.progress,
            }
        )

    def result(self, ended: str, seconds: float) -> Refinement:
        """The best rows so far as a prompt."""
        prompt = PromptEmbedding(
            template=self.sequencer.renderer.template,
            target=self.sequencer.target,
            spans=self.sequencer.spans,
            date=self.sequencer.renderer.date,
            start_rows=self.start_PD.cpu(),
            rows=self.best.rows.cpu(),
            trust_region=self.parts.trust_region,
        )
        return Refinement(prompt, self.state, ended, self.step, seconds, self.best)
