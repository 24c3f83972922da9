"""Laws of the loop: only rows move, never out of their region, and the best of them come out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from embedgrad.errors import DataError
from embedgrad.model.language_model import LanguageModel
from embedgrad.parts.objectives import CrossEntropy
from embedgrad.parts.optimizers import OPTIMIZERS, SGD, Schedule
from embedgrad.parts.parameterizations import PARAMETERIZATIONS
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.prompt.trust_region import TrustRegion, drift_P
from embedgrad.training.optimize import optimize
from embedgrad.training.settings import Parts, Training
from kit import Kit
from kit_loop import QUICK, small, train
from pairwise import pairwise


def digest(made: Kit) -> str:
    """Of every weight and buffer."""
    total = hashlib.sha256()
    for name, value in sorted(made.loaded.model.state_dict().items()):
        total.update(name.encode())
        total.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


# ------------------------------------------------------------------------------ only rows move


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "gpt2", "mamba"])
def test_frozen_is_frozen(architecture: str) -> None:
    made = small(architecture)
    before = digest(made)
    refined = train(made, dataclasses.replace(QUICK, steps=2))
    model = made.loaded.model
    assert digest(made) == before
    assert not model.training
    for weight in model.parameters():
        assert weight.grad is None
        assert not weight.requires_grad
    assert refined.prompt.rows.dtype == torch.float32
    assert not torch.equal(refined.checkpoint.theta["span"], torch.zeros_like(made.start))
    assert torch.equal(refined.prompt.start_rows, made.start)


def test_rows_are_kept_in_float32_for_a_model_that_is_not() -> None:
    made = small(dtype=torch.bfloat16)
    assert made.start.dtype == torch.float32
    refined = train(made, dev=())
    assert refined.prompt.rows.dtype == torch.float32
    assert not torch.equal(refined.prompt.rows, refined.prompt.rows.bfloat16().float())


@pytest.mark.parametrize(
    ("optimizer", "parameterization", "region"),
    pairwise(
        sorted(OPTIMIZERS),
        sorted(PARAMETERIZATIONS),
        [TrustRegion(0.3), TrustRegion(0.05, 0.999), TrustRegion(1e-4), TrustRegion(None, 0.99)],
    ),
)
def test_the_region_holds_after_every_step(
    optimizer: str, parameterization: str, region: TrustRegion
) -> None:
    events: list[dict[str, Any]] = []
    parts = Parts(
        optimizer=OPTIMIZERS[optimizer](learning_rate=5.0),
        parameterization=PARAMETERIZATIONS[parameterization](),
        trust_region=region,
    )
    refined = train(small(), parts=parts, report=events.append, dev=())
    steps = [event for event in events if event["event"] == "step"]
    assert len(steps) == 6
    for event in steps:
        assert event["drift_max"] <= (region.radius or math.inf) * (1 + 1e-5) + 1e-6
        assert event["cosine_min"] >= (region.min_cosine or -1.0) - 1e-5
    assert region.holds(refined.prompt.rows, refined.prompt.start_rows)
    # The region, and nothing else, stopped the rows.
    assert max(event["drift_max"] for event in steps) > 0.2 * (region.radius or 0.1)


# ------------------------------------------------------------------------------------- seeds


def test_the_same_seed_gives_the_same_bits() -> None:
    first, again = train(small()), train(small())
    other = train(small(), dataclasses.replace(QUICK, seed=1))
    assert torch.equal(first.prompt.rows, again.prompt.rows)
    assert first.checkpoint.history == again.checkpoint.history
    assert torch.equal(first.checkpoint.theta["span"], again.checkpoint.theta["span"])
    assert not torch.equal(first.checkpoint.theta["span"], other.checkpoint.theta["span"])


@pytest.mark.parametrize("accumulate", [2, 4, 7])
def test_accumulating_gives_the_same_rows(accumulate: int) -> None:
    made = small(dtype=torch.float64)
    training = Training(steps=4, batch_size=5)
    whole = train(made, training, dev=())
    parts = train(made, dataclasses.replace(training, accumulate=accumulate), dev=())
    assert not torch.equal(whole.prompt.rows, made.start)
    assert (whole.prompt.rows - parts.prompt.rows).abs().max().item() < 1e-10


# --------------------------------------------------------------------------- how long, and on what


@pytest.mark.parametrize(
    ("training", "batches", "evaluations"),
    [
        (Training(epochs=2, batch_size=3), [3, 3, 2] * 2, [0, 3, 6]),
        (Training(epochs=0.5, batch_size=3), [3, 3], [0, 2]),
        (Training(epochs=9, steps=4, batch_size=3), [3, 3, 2, 3], [0, 3, 4]),
        (Training(steps=5, batch_size=3, evaluate_every=2), [3, 3, 2, 3, 3], [0, 2, 4, 5]),
        (Training(steps=1, batch_size=99), [8], [0, 1]),
    ],
)
def test_steps_epochs_and_evaluations(
    training: Training, batches: list[int], evaluations: list[int]
) -> None:
    events: list[dict[str, Any]] = []
    refined = train(small(), training, report=events.append)
    steps = [event for event in events if event["event"] == "step"]
    assert [event["examples"] for event in steps] == batches
    assert [event["step"] for event in steps] == list(range(1, len(batches) + 1))
    assert {event["total"] for event in steps} == {len(batches)}
    assert [e["step"] for e in events if e["event"] == "evaluation"] == evaluations
    assert (refined.ended, refined.steps) == ("finished", len(batches))
    assert events[-1]["event"] == "end"
    for event in events:
        json.dumps(event, allow_nan=False)


def test_an_epoch_visits_every_example_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = small()
    seen: list[str] = []
    outcome = LanguageModel.outcome

    def noted(self: Any, rows: Tensor, sequences: list[TokenSequence], **options: Any) -> Any:
        seen.extend(s.example.source for s in sequences)
        return outcome(self, rows, sequences, **options)

    monkeypatch.setattr(LanguageModel, "outcome", noted)
    train(made, Training(epochs=2, batch_size=3), dev=())
    sources = sorted(s.example.source for s in made.sequences[:8])
    assert sorted(seen[:8]) == sorted(seen[8:]) == sources
    assert seen[:8] != seen[8:]


def test_learning_rates_follow_the_schedule() -> None:
    events: list[dict[str, Any]] = []
    parts = Parts(optimizer=SGD(learning_rate=0.5), schedule=Schedule(warmup=0.34, shape="linear"))
    train(small(), parts=parts, report=events.append)
    rates = [event["learning_rate"] for event in events if event["event"] == "step"]
    assert rates == pytest.approx([0.25, 0.5, 0.5, 0.375, 0.25, 0.125])


def test_without_training_rows_it_says_so() -> None:
    made = small()
    with pytest.raises(DataError, match="no training"):
        optimize(made.model, made.sequencer, [], training=QUICK)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_small_task_is_learned(architecture: str) -> None:
    made = small(architecture, rows=24)
    drift: list[float] = []
    refined = optimize(
        made.model,
        made.sequencer,
        made.sequences,
        made.sequences,
        training=Training(steps=80, batch_size=8, metric="log_loss"),
        parts=Parts(objective=CrossEntropy(over="choices")),
        report=lambda event: drift.append(event.get("drift_max", 0.0)),
    )
    first, *_, best = sorted(refined.checkpoint.history, key=lambda score: -score["log_loss"])
    assert first["step"] == 0
    assert best["log_loss"] < 0.8 * first["log_loss"]
    assert drift_P(refined.prompt.rows, made.start).max().item() <= 0.3 + 1e-5
