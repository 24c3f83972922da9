"""A training that is stopped anywhere goes on to the bit; memory and numbers that fail are met."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from embedgrad.errors import DivergenceError, ModelError, RunError
from embedgrad.evaluation.answers import AnswerLog
from embedgrad.evaluation.evaluator import Evaluator, evaluate
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.outcome import Outcome
from embedgrad.parts.optimizers import SGD, AdamW, Extrapolated, Optimizer
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.loop import Loop
from embedgrad.training.loss import Loss
from embedgrad.training.settings import Parts, Refinement, Training
from kit_loop import QUICK, small, train
from laws.test_interruption import same

NO_MEMORY = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: x"


# -- stopped at every step -------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(
    "optimizer",
    [AdamW(learning_rate=0.1), SGD(), Extrapolated(direction="noise")],
    ids=["adamw", "sgd", "noise"],
)
def test_a_training_that_is_stopped_after_every_step_gives_the_same_bits(
    tmp_path: Any, optimizer: Optimizer, accumulate: int
) -> None:
    """24 steps over 8 epochs; each is taken by a new loop, from a file."""
    training = Training(steps=24, batch_size=3, evaluate_every=3, accumulate=accumulate)
    parts = Parts(optimizer=optimizer)
    whole: list[dict[str, Any]] = []
    once = train(small(), training, parts=parts, report=whole.append)
    events: list[dict[str, Any]] = []
    checkpoint: Checkpoint | None = None
    for step in range(1, 25):
        last = train(
            small(),
            training,
            parts=parts,
            checkpoint=checkpoint,
            should_stop=lambda: True,
            report=events.append,
            keep=lambda state: state.keep(tmp_path),
        )
        assert last.steps == step
        checkpoint = Checkpoint.find(tmp_path)
        assert checkpoint is not None
        assert checkpoint.step == step
    assert same(checkpoint, once.checkpoint)
    assert torch.equal(last.prompt.rows, once.prompt.rows)
    kinds = ("step", "evaluation")
    left_out = ("seconds", "cache", "hits", "prefix")

    def plain(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in e.items() if not k.startswith(left_out)}
            for e in found
            if e["event"] in kinds
        ]

    assert [e["step"] for e in plain(events)] == [e["step"] for e in plain(whole)]
    assert [e.get("loss") for e in plain(events)] == [e.get("loss") for e in plain(whole)]


def test_checkpoints_are_written_on_a_time_interval_between_evaluations() -> None:
    steps: list[int] = []
    often = Training(steps=6, batch_size=3, evaluate_every=6, checkpoint_seconds=1e-9)
    train(small(), often, keep=lambda state: steps.append(state.step))
    assert steps == [1, 2, 3, 4, 5, 6]
    steps.clear()
    train(
        small(),
        dataclasses.replace(often, checkpoint_seconds=60),
        keep=lambda state: steps.append(state.step),
    )
    assert steps == [6]


# -- whatever ends it ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ZeroDivisionError, RunError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize(("event", "step"), [("step", 3), ("evaluation", 4), ("end", 6)])
def test_any_end_leaves_the_best_rows_and_a_checkpoint_to_go_on_from(
    kind: type[BaseException], event: str, step: int
) -> None:
    training = dataclasses.replace(QUICK, evaluate_every=2)
    whole = train(small(), training)
    kept: list[Checkpoint] = []

    def fail(values: dict[str, Any]) -> None:
        if (values["event"], values.get("step", values.get("steps"))) == (event, step):
            raise kind("stop here")

    ended: Refinement | None = None
    try:
        ended = train(small(), training, report=fail, keep=kept.append)
    except (ZeroDivisionError, RunError, OSError) as error:
        ended = error.refinement  # type: ignore[union-attr]
    assert ended is not None
    assert torch.isfinite(ended.prompt.rows).all()
    assert kept[-1].step == step
    resumed = train(small(), training, checkpoint=kept[-1])
    assert same(resumed.checkpoint, whole.checkpoint)
    assert torch.equal(resumed.prompt.rows, whole.prompt.rows)


@pytest.mark.parametrize("failures", [1, 3])
def test_a_checkpoint_that_cannot_be_written_is_told_and_tried_again(failures: int) -> None:
    tries, kept, notes = 0, list[int](), list[str]()

    def keep(state: Checkpoint) -> None:
        nonlocal tries
        tries += 1
        if tries <= failures:
            raise RunError("RUN/checkpoint: cannot be written (No space left on device)")
        kept.append(state.step)

    def report(event: dict[str, Any]) -> None:
        if event["event"] == "note":
            notes.append(event["text"])

    found = train(small(), dataclasses.replace(QUICK, evaluate_every=2), keep=keep, report=report)
    assert found.ended == "finished"
    assert kept == list(range(2 + failures, 7)) if failures == 3 else kept == [3, 4, 6]
    (line,) = notes
    assert line == (
        "RUN/checkpoint: cannot be written (No space left on device); training continues, and the "
        "next step tries again"
    )


def test_rows_outside_the_region_are_not_believed() -> None:
    kept: list[Checkpoint] = []
    train(small(), QUICK, keep=kept.append)
    for changed in (
        {"best": {"span": kept[0].best["span"] * 9}},
        {"theta": {"span": kept[0].theta["span"] * torch.nan}},
    ):
        with pytest.raises(RunError, match="not in the trust region"):
            train(small(), QUICK, checkpoint=dataclasses.replace(kept[0], **changed))


# -- memory ----------------------------------------------------------------------------------------


class Cramped(LanguageModel):
    """A model that has memory for the gradients of so many rows."""

    rows = 1

    def outcome(self, prompt: Any, batch: Any, **options: Any) -> Outcome:
        if torch.is_grad_enabled() and len(batch) > self.rows:
            raise RuntimeError(NO_MEMORY)
        return super().outcome(prompt, batch, **options)


def cramped(rows: int) -> Any:
    made = small()
    model = Cramped(made.loaded)
    model.rows = rows
    return dataclasses.replace(made, model=model)


@pytest.mark.parametrize(("rows", "parts"), [(1, 4), (2, 2)])
def test_a_batch_that_does_not_fit_into_memory_is_computed_in_parts(rows: int, parts: int) -> None:
    training, notes = Training(steps=6, batch_size=4), list[str]()
    kept: list[Checkpoint] = []

    def report(event: dict[str, Any]) -> None:
        if event["event"] == "note":
            notes.append(event["text"])

    found = train(cramped(rows), training, report=report, keep=kept.append)
    assert notes == [
        f"out of memory: from step 1 on a batch is computed in {parts} parts; the gradient is the "
        "same"
    ]
    assert {state.accumulate for state in kept} == {parts}
    plain = train(small(), training)
    assert (found.prompt.rows - plain.prompt.rows).abs().max() < 1e-6
    # A resumed training does not have to find out again.
    notes.clear()
    train(cramped(rows), training, checkpoint=kept[0], report=report)
    assert notes == []


SINGLE = Training(steps=11, batch_size=1, evaluate_every=11)


@functools.cache
def whole() -> Tensor:
    return train(small(), SINGLE).prompt.rows


def failing(fails_at: int, error: Exception | None) -> Any:
    """A pass that fails where it is the given one of the training, or says nothing but NaN."""
    passes, plain = iter(range(1, 100)), LanguageModel.outcome

    def outcome(self: LanguageModel, *arguments: Any, **options: Any) -> Outcome:
        found = plain(self, *arguments, **options)
        if not torch.is_grad_enabled() or next(passes) != fails_at:
            return found
        if error is not None:
            raise error
        return dataclasses.replace(found, logprobs_BC=found.logprobs_BC * torch.nan)

    return outcome


@pytest.mark.parametrize("fails_at", range(1, 11))
def test_when_a_pass_fails_the_step_before_is_kept(
    fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_memory = [RuntimeError(NO_MEMORY), MemoryError()][fails_at % 2]
    size = r"a batch of 1 rows of up to \d+ tokens, 1 at a time; make training\.batch_size"
    ends = {
        "failed": (no_memory, rf"^step {fails_at}: out of memory for {size}"),
        "diverged": (None, rf"^step {fails_at}: .*optimizer\.learning_rate.*model\.dtype"),
    }
    for ended, (error, told) in ends.items():
        kept = list[Checkpoint]()
        with monkeypatch.context() as patch:
            patch.setattr(LanguageModel, "outcome", failing(fails_at, error))
            with pytest.raises((ModelError, DivergenceError), match=told) as caught:
                train(small(), SINGLE, keep=kept.append)
        assert "\n" not in str(caught.value)
        assert caught.value.refinement.ended == ended
        assert kept[-1].step == fails_at - 1
        resumed = train(small(), SINGLE, checkpoint=kept[-1])
        assert torch.equal(resumed.prompt.rows, whole())


# -- numbers ---------------------------------------------------------------------------------------


class SpoiledRow(LanguageModel):
    """A model that finds one row of the training data infinitely unlikely."""

    def outcome(self, prompt: Any, batch: Any, **options: Any) -> Outcome:
        found = super().outcome(prompt, batch, **options)
        if not torch.is_grad_enabled():
            return found
        bad_B1 = torch.tensor([[s.example.source.endswith(":5")] for s in batch])
        return dataclasses.replace(
            found, logprobs_BC=torch.where(bad_B1, torch.nan, found.logprobs_BC)
        )


def spoiled() -> Any:
    made = small()
    return dataclasses.replace(made, model=SpoiledRow(made.loaded))


def test_a_loss_that_is_not_finite_names_its_row() -> None:
    kept: list[Checkpoint] = []
    with pytest.raises(DivergenceError) as caught:
        train(spoiled(), QUICK, keep=kept.append)
    assert "(rows reviews.csv:5)" in str(caught.value)
    assert "training.not_finite = 'skip'" in str(caught.value)
    assert kept[-1].step == int(str(caught.value).split(":")[0].removeprefix("step ")) - 1


def test_batches_that_are_not_finite_can_be_left_out_and_counted() -> None:
    notes, events = list[str](), list[dict[str, Any]]()

    def report(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "note":
            notes.append(event["text"])

    training = dataclasses.replace(QUICK, not_finite="skip")
    found = train(spoiled(), training, report=report)
    assert (found.ended, found.steps) == ("finished", 6)
    assert found.checkpoint.skipped == 2  # the row's batch, in each of two epochs
    assert [e.get("skipped", 0) for e in events if e["event"] == "step"][-1] == 2
    (line,) = notes
    assert "reviews.csv:5" in line
    assert line.endswith("left out (told once, all are counted)")
    assert torch.isfinite(found.prompt.rows).all()
    assert not torch.equal(found.prompt.rows, found.prompt.start_rows)


def test_a_later_update_of_a_step_can_be_left_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    computed, plain = list[int](), Loss.gradient

    def gradient(self: Loss, *arguments: Any) -> Any:
        computed.append(1)
        found = plain(self, *arguments)
        return found._replace(loss=math.nan) if len(computed) == 2 else found

    monkeypatch.setattr(Loss, "gradient", gradient)
    monkeypatch.setattr(Loop, "updates", property(lambda _: 2, lambda *_: None), raising=False)
    found = train(small(), dataclasses.replace(QUICK, not_finite="skip"))
    assert (found.ended, found.checkpoint.skipped, len(computed)) == ("finished", 1, 12)


# -- scoring ---------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process."""


@functools.cache
def scoring() -> Any:
    """What scores rows, one at a time, with which prompt, and the scores."""
    made, prompt = small(), train(small(), QUICK, dev=()).prompt
    evaluator = Evaluator(made.model, made.sequencer)
    evaluator.evaluation = dataclasses.replace(evaluator.evaluation, batch_size=1)
    return evaluator, prompt, made.sequences, evaluate(evaluator, prompt, made.sequences)


@pytest.mark.parametrize("after", range(1, 21))
def test_a_scoring_that_is_killed_goes_on_at_the_last_rows(
    after: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    *given, whole = scoring()
    passes, plain = list[int](), Evaluator._score_batch

    def count(self: Evaluator, rows: Any, batch: Any) -> Any:
        if len(passes) == after:
            raise Killed
        passes.append(len(batch))
        return plain(self, rows, batch)

    monkeypatch.setattr(Evaluator, "_score_batch", count)
    made_from = {"rows": "these"}
    path = tmp_path / "answers.jsonl"
    with pytest.raises(Killed):
        evaluate(*given, log=AnswerLog(path, made_from))
    after = 10**6
    path.write_bytes(path.read_bytes()[:-7])  # the last line is torn
    assert evaluate(*given, log=AnswerLog(path, made_from)) == whole
    rows = 2 * len(given[-1])  # with each prompt
    assert len(passes) == rows + 1  # the torn one again
    # Another prompt's answers are not taken.
    assert AnswerLog(path, made_from).get("text prompt", 0, 1)
    assert not AnswerLog(path, {"rows": "other"}).get("text prompt", 0, 1)
