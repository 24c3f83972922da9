"""Law: what comes out of the loop is what scored best on dev."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from embedgrad.evaluation.evaluator import Evaluation, Evaluator, Summary, summarize
from embedgrad.evaluation.significance import wilson_interval
from embedgrad.parts.objectives import CrossEntropy
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.training import selection
from embedgrad.training.selection import Best, score_of
from embedgrad.training.settings import Training
from kit import CHOICES
from kit_loop import FAST, rows_at_evaluations, small, train

OVER_CHOICES = dataclasses.replace(FAST, objective=CrossEntropy(over="choices"))


def reversed_answers(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """The same rows with the other choice as the right one."""
    found = []
    for s in sequences:
        gold = 1 - s.gold
        example = dataclasses.replace(s.example, answer=CHOICES[gold])
        found.append(dataclasses.replace(s, gold=gold, example=example))
    return found


@pytest.mark.parametrize("metric", ["auto", "accuracy", "macro_f1", "log_loss"])
@pytest.mark.parametrize("contrary", [False, True])
def test_the_best_rows_on_dev_come_out(metric: Any, contrary: bool) -> None:
    made = small()
    training = Training(steps=6, batch_size=3, evaluate_every=1, metric=metric)
    dev = made.sequences[4:8]
    dev = reversed_answers(dev) if contrary else dev
    refined, rows = rows_at_evaluations(made, training=training, dev=dev, parts=OVER_CHOICES)
    history = refined.checkpoint.history
    assert [score["step"] for score in history] == list(range(7))
    name = "accuracy" if metric == "auto" else metric

    def worth(score: dict[str, float]) -> tuple[float, float]:
        return (-score[name] if name == "log_loss" else score[name]), -score["log_loss"]

    best = max(history, key=worth)
    assert refined.checkpoint.best_step == best["step"]
    assert torch.equal(refined.prompt.rows, rows[int(best["step"])])
    # What is right in training is wrong on dev: the text itself is best.
    assert contrary == torch.equal(refined.prompt.rows, made.start)
    evaluator = Evaluator(made.model, made.sequencer, Evaluation(batch_size=4))
    answered = evaluator.score(refined.prompt.rows, dev)
    score = summarize(answered, made.sequencer.target.choices)
    assert (score.accuracy, score.log_loss) == (best["accuracy"], best["log_loss"])


@pytest.mark.parametrize(
    ("metric", "accuracies", "losses", "patience", "best", "last"),
    [
        ("accuracy", [5, 7, 6, 9, 8, 8, 1], [5, 5, 5, 5, 5, 5, 5], None, 3, 6),
        ("accuracy", [5, 7, 7, 7, 7, 7, 7], [5, 5, 4, 4, 6, 3, 5], None, 5, 6),
        ("log_loss", [5, 7, 6, 9, 8, 8, 1], [5, 4, 3, 6, 2, 2, 3], None, 4, 6),
        ("accuracy", [5, 7, 6, 6, 9, 9, 9], [5, 5, 5, 5, 5, 5, 5], 2, 1, 3),
        ("accuracy", [5, 4, 4, 6, 4, 4, 4], [5, 5, 5, 5, 5, 5, 5], 3, 3, 6),
        ("accuracy", [5, 5, 5, 5, 5, 5, 5], [5, 5, 5, 5, 5, 5, 5], 1, 0, 1),
    ],
)
def test_scores_decide_what_is_kept_and_when_to_stop(
    monkeypatch: pytest.MonkeyPatch,
    metric: Any,
    accuracies: list[int],
    losses: list[int],
    patience: int | None,
    best: int,
    last: int,
) -> None:
    scripted = iter(zip(accuracies, losses, strict=True))

    def summary(*_: object) -> Summary:
        accuracy, loss = next(scripted)
        return Summary(4, accuracy / 10, (0.0, 1.0), 0.5, loss / 10, 0)

    monkeypatch.setattr(selection, "summarize", summary)
    training = Training(6, 6, 3, evaluate_every=1, metric=metric, patience=patience)
    refined, rows = rows_at_evaluations(small(), training=training, parts=OVER_CHOICES)
    assert (refined.checkpoint.best_step, refined.steps) == (best, last)
    assert refined.ended == ("finished" if last == 6 and patience is None else "patience")
    assert torch.equal(refined.prompt.rows, rows[best])
    assert not torch.equal(refined.prompt.rows, rows[last])


def test_without_dev_rows_the_last_rows_come_out() -> None:
    refined, rows = rows_at_evaluations(small(), dev=())
    assert torch.equal(refined.prompt.rows, rows[6])
    assert refined.checkpoint.best_step == 6


def test_the_first_score_is_the_text_prompts() -> None:
    made = small("qwen2")
    refined = train(made)
    evaluator = Evaluator(made.model, made.sequencer, Evaluation(batch_size=4))
    text = summarize(evaluator.score_text_prompt(made.start, made.sequences[8:]), CHOICES)
    first = refined.checkpoint.history[0]
    assert (first["accuracy"], first["log_loss"]) == (text.accuracy, text.log_loss)
    assert first["macro_f1"] == text.macro_f1


def test_a_score_has_a_macro_f1_only_where_there_is_one() -> None:
    score = {"step": 3, "accuracy": 0.5, "log_loss": 0.7}
    assert score_of(3, 0.5, 0.7, None) == score
    assert score_of(3, 0.5, 0.7, 0.4) == {**score, "macro_f1": 0.4}


@pytest.mark.parametrize(
    ("accuracies", "losses", "kept"),
    [
        # Of 24 rows, 10 right are 41.7 % with a standard error of 10.1: 8 right are as good, not 7.
        ([6, 8, 10, 8, 7], [8, 4, 3, 2, 1], [0, 1, 2, 3, 3]),
        ([6, 8, 8, 8, 7], [8, 4, 3, 5, 3], [0, 1, 2, 2, 2]),
        # Better by more than a standard error: kept in spite of its loss.
        ([6, 8, 16, 13, 14], [8, 1, 9, 8, 8], [0, 1, 2, 2, 4]),
        # Never below the text prompt, which only rows of its own score replace.
        ([6, 5, 5, 6, 5], [8, 1, 1, 7, 1], [0, 0, 0, 3, 3]),
        ([24, 23, 24], [8, 1, 9], [0, 0, 0]),
    ],
)
def test_within_a_standard_error_the_loss_decides(
    accuracies: list[int], losses: list[int], kept: list[int]
) -> None:
    best = Best("accuracy", {}, rows=24)
    for step, (right, loss) in enumerate(zip(accuracies, losses, strict=True)):
        # As resumed: the scores and the kept step alone decide.
        best = Best("accuracy", {}, best.step, list(best.history), rows=24)
        best.add(score_of(step, right / 24, 1.0, 0.5, loss / 10), {})
        assert best.step == kept[step]
        assert best.stops_early(2) == (step - kept[step] >= 2)
    by_loss, over_choices = (Best(metric, {}, rows=24) for metric in ("log_loss", "accuracy"))
    for step, (right, loss) in enumerate(zip(accuracies, losses, strict=True)):
        by_loss.add(score_of(step, right / 24, 1.0 + step, 0.5, loss / 10), {})
        over_choices.add(score_of(step, right / 24, 1.0 + step, 0.5), {})
    assert (by_loss.step, over_choices.step) == (0, accuracies.index(max(accuracies)))


@pytest.mark.parametrize("over", ["auto", "both", "answer", "choices"])
def test_the_answer_counts_where_it_is_trained_beside_the_choices(over: Any) -> None:
    made, objective = small(), CrossEntropy(over=over)
    parts = dataclasses.replace(FAST, objective=objective)
    refined, rows = rows_at_evaluations(made, parts=parts)
    history = refined.checkpoint.history
    for score in history:
        if over in ("answer", "choices"):
            assert "answer_loss" not in score
            continue
        outcome = made.model.outcome({"span": rows[int(score["step"])]}, made.sequences[8:])
        expected = CrossEntropy(over="answer").losses(outcome).mean().item()
        assert score["answer_loss"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("warm", "warm_loss", "kept"), [(9, 5, 1), (5, 1, 0), (6, 7, 0), (6, 2, 1)]
)
def test_a_warm_start_has_the_text_prompts_step_and_its_own_score(
    warm: int, warm_loss: int, kept: int
) -> None:
    best = Best("accuracy", {}, rows=24)
    for right, loss in ((6, 6), (warm, warm_loss)):
        best.add(score_of(0, right / 24, 1.0, 0.5, loss / 10), {"span": torch.ones(1) * right})
    assert best.score == best.history[kept]
    assert best.prompt["span"].item() == (6, warm)[kept]


def test_a_warm_start_that_is_worse_than_the_text_is_not_what_is_kept() -> None:
    best = Best("accuracy", {}, rows=10)
    for score in (score_of(0, 0.6, 0.5, None), score_of(0, 0.4, 0.9, None)):
        best.add(score, {})
    assert best.score["accuracy"] == 0.6
    assert not best.stops_early(1)  # it is no step that brought nothing
    best.add(score_of(1, 0.6, 0.8, None), {})  # as accurate, but likelier wrong than the text
    assert (best.step, best.score["log_loss"]) == (0, 0.5)
    assert best.stops_early(1)
    better = Best("accuracy", {}, rows=10)
    for score in (score_of(0, 0.6, 0.5, None), score_of(0, 0.7, 0.9, None)):
        better.add(score, {})
    assert better.score["accuracy"] == 0.7


def test_no_loss_keeps_the_text_prompt_from_rows_that_score_higher() -> None:
    best = Best("accuracy", {}, rows=24)
    for step, right, loss in ((0, 12, 0.1), (1, 13, 0.9), (2, 12, 0.2)):
        best.add(score_of(step, right / 24, 1.0, 0.5, loss), {})
    assert best.step == 2  # equal to the best step within an error, and to the text


def test_an_evaluation_shows_the_last_score_the_best_one_and_the_texts() -> None:
    best = Best("accuracy", {}, rows=10)
    for step, accuracy in enumerate((0.5, 0.9, 0.8)):
        best.add(score_of(step, accuracy, 1.0, None), {})
    text, first, last = (
        {"step": step, "accuracy": accuracy, "log_loss": 1.0, "interval": interval}
        for step, accuracy, interval in zip(
            range(3), (0.5, 0.9, 0.8), map(wilson_interval, (5, 9, 8), (10, 10, 10)), strict=True
        )
    )
    shown = {"event": "evaluation", **last, "metric": "accuracy", "best": first, "text": text}
    assert best.event() == shown
    assert best.event(text=False) == {**shown, "text": None}
    assert score_of(4, 0.5, 1.0, 0.25, 2.0, 3.0) == {
        **{"step": 4, "accuracy": 0.5, "log_loss": 1.0},
        **{"macro_f1": 0.25, "answer_loss": 2.0, "regret": 3.0},
    }
