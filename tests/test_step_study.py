"""The study of the step trains as the program does."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from embedgrad.evaluation.evaluator import Evaluation
from embedgrad.parts.optimizers import AdamW
from embedgrad.training.optimize import optimize
from embedgrad.training.settings import Parts, Training
from kit import kit

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python -m` has it

from benchmarks import step_study

pytestmark = pytest.mark.harness

CELL = step_study.Cell("", "", "adamw", 0.1, "cosine", 4, 3, 0.3, 1)


def task() -> step_study.Task:
    made = kit(rows=14, dtype=torch.float32)
    return step_study.Task(made.model, made.sequencer, made.sequences[:8], made.sequences[8:])


def test_a_row_is_the_training_of_the_same_settings() -> None:
    own = task()
    (end,) = step_study.measure(own, CELL)["curve"]
    refined = optimize(
        *(own.model, own.sequencer, own.train, own.dev),
        training=Training(epochs=3, batch_size=4, evaluate_every=6, seed=1),
        parts=Parts(optimizer=AdamW(learning_rate=0.1)),
        evaluation=Evaluation(max_new_tokens=1),
        report=lambda event: None,
    )
    assert (end["step"], end["examples"], end["calls"]) == (6, 24, 6)
    assert end["last"]["log_loss"] == refined.checkpoint.history[-1]["log_loss"]
    assert end["last"] != end["average"]


def test_rows_that_the_region_holds_back_are_at_the_edge() -> None:
    shares = {
        radius: step_study.measure(task(), replace(CELL, radius=radius))["curve"][-1]["at_the_edge"]
        for radius in (0.001, 100.0)
    }
    assert shares == {0.001: 1.0, 100.0: 0.0}


def test_an_optimizer_may_look_more_than_once_at_a_batch() -> None:
    (end,) = step_study.measure(task(), replace(CELL, optimizer="lbfgs", rate=1.0))["curve"]
    assert end["calls"] > end["step"]


def test_dev_is_scored_at_the_same_numbers_of_examples_whatever_the_batch() -> None:
    assert step_study.points(40, 16) == {16, 32, 40}
    assert step_study.points(80, 8) == {32, 64, 80}
