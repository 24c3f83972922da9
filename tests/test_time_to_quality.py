"""Time to quality: the target is PEFT's best score, and the first evaluation as good counts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from embedgrad import Recipe
from embedgrad.experiments.baselines import Task
from kit import kit
from run_kit import values

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python -m` has it

from benchmarks import time_to_quality as measured

pytestmark = pytest.mark.harness


def training(method: str, *points: tuple[float, float, float], seed: int = 0) -> dict[str, Any]:
    names = ("seconds", "accuracy", "log_loss")
    curve = [dict(zip(names, point, strict=True)) for point in points]
    return {"data": "sst2", "method": method, "seed": seed, "curve": curve}


ROWS = [
    training(measured.TUNED, (0, 0.6, 0.7), (50, 0.8, 0.4), (90, 0.8, 0.5)),
    training(measured.TUNED, (0, 0.6, 0.7), (40, 0.7, 0.3), (80, 0.8, 0.6)),
    training(measured.OURS, (0, 0.6, 0.7), (5, 0.9, 0.5), (10, 0.7, 0.2)),
    training(measured.OURS, (0, 0.6, 0.7), (4, 0.9, 0.5), (12, 0.7, 0.2)),
    training(measured.LORA, (0, 0.6, 0.7), (20, 0.7, 0.6)),
    training(measured.OURS, (3, 0.9, 0.1), seed=1),
]


def test_the_best_of_any_rate_is_the_target_and_our_slower_time_counts() -> None:
    accuracy, log_loss = measured.summary(ROWS)
    assert (accuracy["target"], log_loss["target"]) == (0.8, 0.3)
    assert accuracy["seconds"] == {measured.OURS: 5, measured.TUNED: 50, measured.LORA: None}
    assert accuracy["ratio"] == 10
    assert log_loss["seconds"] == {measured.OURS: 12, measured.TUNED: 40, measured.LORA: None}
    assert log_loss["ratio"] == pytest.approx(40 / 12)


def test_no_ratio_where_a_target_is_not_reached() -> None:
    rows = [training(measured.TUNED, (9, 0.95, 0.1)), ROWS[2]]
    assert [line["ratio"] for line in measured.summary(rows)] == [None, None]


def test_seconds_of_evaluations_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 7.0, 7.0, 10.0, 10.0, 60.0, 60.0, 64.0, 64.0, 70.0])
    monkeypatch.setattr(measured.time, "process_time", lambda: next(clock))
    watch = measured.Watch(since=next(clock))
    score = {"accuracy": 0.5, "log_loss": 0.7}
    watch({"event": "evaluation", "step": 0, **score})
    watch({"event": "step", "step": 1})
    watch({"event": "evaluation", "step": 1, **score})
    watch({"event": "step", "step": 2})
    assert watch.seconds == 3 + 4
    assert [point["seconds"] for point in watch.curve] == [0, 3]


def small_task(**training: int) -> Task:
    """Eight rows to train on, six to choose by."""
    made = kit(rows=14, dtype=torch.float32)
    settings = values(Path("tiny"), Path("data"), training={"batch_size": 3, **training})
    recipe, rows = Recipe.from_dict(settings), made.sequences
    return Task(recipe, made.model, made.sequencer, rows[:8], rows[8:], lambda event: None)


@pytest.mark.parametrize("method", [measured.OURS, measured.TUNED, measured.LORA])
def test_a_training_is_a_curve(method: str) -> None:
    task = small_task(steps=5, evaluate_every=2)
    found = measured.train(task, method, None if method == measured.OURS else 0.05, 0)
    assert [point["step"] for point in found["curve"]] == [0, 2, 4, 5]
    seconds = [point["seconds"] for point in found["curve"]]
    assert seconds[0] == 0
    assert seconds == sorted(seconds)
    assert (found["steps"], found["train_rows"]) == (5, 8)


def test_a_rate_is_that_of_the_training() -> None:
    task = small_task(steps=2)
    ends = [measured.train(task, measured.TUNED, rate, 0)["curve"][-1] for rate in (1e-4, 0.1)]
    assert ends[0]["log_loss"] != ends[1]["log_loss"]
