"""Refine a prompt, or those of several tasks at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from embedgrad.evaluation.evaluator import Evaluation
from embedgrad.events import Report
from embedgrad.model.backbone import Backbone, Prompt
from embedgrad.parts.parameterizations import Theta
from embedgrad.prompt.images import ImageSequencer
from embedgrad.prompt.joint import JointSequencer
from embedgrad.prompt.sequence import Sequencer, TokenSequence
from embedgrad.report.terminal.bars import show
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.loop import Loop
from embedgrad.training.settings import Parts, Refinement, Training
from embedgrad.training.teacher import Teacher


def optimize(
    model: Backbone,
    sequencer: Sequencer | ImageSequencer,
    train: Sequence[TokenSequence],
    dev: Sequence[TokenSequence] = (),
    *,
    training: Training = Training(),
    parts: Parts = Parts(),
    evaluation: Evaluation = Evaluation(),
    start: Prompt | None = None,
    warm_start: Prompt | None = None,
    teacher: Teacher | None = None,
    checkpoint: Checkpoint | None = None,
    report: Report = show,
    keep: Callable[[Checkpoint], None] = lambda checkpoint: None,
    keep_best: Callable[[Refinement], None] = lambda refinement: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Refinement:
    """Refine the rows of the span on `train`, and keep those that score best on `dev`.

    `start` replaces the text's own rows. `warm_start` are rows of an earlier training to go on
    from; the trust region stays around the text's. `teacher` says what it finds likely in answers
    that the objective samples. Without dev examples the last rows are kept. `report` gets one event
    (plain JSON values) per step, evaluation and note. `keep` gets a checkpoint after every
    evaluation, every `training.checkpoint_seconds` and however the training ends, and `keep_best`
    the best rows so far with the first checkpoint after they were found; a `RunError` of theirs is
    reported, and they are called again. `checkpoint` resumes from a checkpoint. `should_stop` is
    asked after every step; then, as after Ctrl-C, the best rows so far are returned. Raises
    `DivergenceError` before a step whose loss or gradient is not finite, and what a scorer raises;
    the error's `refinement` holds the best rows so far.
    """
    loop = Loop(model, sequencer, train, dev, training, parts, evaluation, report, start, teacher)

    def result(ended: str) -> Refinement:
        return loop.result(sequencer, ended)

    keep = _with_best(loop, keep, lambda: keep_best(result("running")))
    ended, failure = loop.train_through(checkpoint, warm_start, keep, should_stop)
    if failure is not None:
        failure.refinement = result(ended)  # type: ignore[attr-defined]
        raise failure
    return result(ended)


def optimize_tasks(
    model: Backbone,
    tasks: Mapping[str, Sequencer],
    train: Mapping[str, Sequence[TokenSequence]],
    dev: Mapping[str, Sequence[TokenSequence]],
    *,
    training: Training = Training(),
    parts: Parts = Parts(),
    evaluation: Evaluation = Evaluation(),
    checkpoint: Checkpoint | None = None,
    report: Report = show,
    keep: Callable[[Checkpoint], None] = lambda checkpoint: None,
    keep_best: Callable[[Mapping[str, Refinement]], None] = lambda refined: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, Refinement], Theta]:
    """Refine the prompts of several tasks in one training; see `optimize`.

    Every batch draws from the rows of all tasks, and each row has its own task's prompt. What the
    prompts share is the parameterization's: `cp` has them share a subspace, under the others each
    is trained for itself. The step that does best on dev over all tasks is kept. Returns each
    task's refinement, and the theta that they come from.
    """
    joint = JointSequencer(tasks)
    loop = Loop(
        *(model, joint, joint.join(train), joint.join(dev), training, parts, evaluation, report),
        start=None,
        teacher=None,
    )

    def results(ended: str) -> dict[str, Refinement]:
        names, found = iter(loop.start_prompt), dict[str, Refinement]()
        for name, sequencer in tasks.items():
            own = [next(names) for _ in sequencer.spans]
            found[name] = loop.result(sequencer, ended, own)
        return found

    keep = _with_best(loop, keep, lambda: keep_best(results("running")))
    ended, failure = loop.train_through(checkpoint, None, keep, should_stop)
    if failure is not None:
        failure.refinement = results(ended)  # type: ignore[attr-defined]
        raise failure
    return results(ended), loop.best_theta


def _with_best(
    loop: Loop, keep: Callable[[Checkpoint], None], keep_best: Callable[[], None]
) -> Callable[[Checkpoint], None]:
    """`keep`, and then `keep_best` where there are new best rows."""
    kept: int | None = None

    def both(checkpoint: Checkpoint) -> None:
        nonlocal kept
        keep(checkpoint)
        if kept != checkpoint.best_step:
            keep_best()
            kept = checkpoint.best_step

    return both
