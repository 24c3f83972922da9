"""The benchmark of what parts cost: ratios of the same steps, for each gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import part_cost
from embedgrad.training.settings import Parts

pytestmark = pytest.mark.harness


@pytest.mark.parametrize(("name", "gradients"), [("lars", 1), ("extrapolated-fresh", 2)])
def test_a_ratio_is_that_of_the_same_steps(
    name: str, gradients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[bool]()

    def seconds_of(ready: Any, parts: Parts, steps: int) -> list[float]:
        asked.append(parts != Parts())
        return [3.0, 30.0, 1.5][:steps] if parts != Parts() else [2.0, 10.0, 1.0][:steps]

    monkeypatch.setattr(part_cost, "seconds_of", seconds_of)
    model = SimpleNamespace(embed=lambda ids: torch.zeros(2, 3))
    ready: Any = SimpleNamespace(model=model, sequencer=SimpleNamespace(prompt_ids=(1, 2)))
    found = part_cost.measure(ready, name, steps=3, rounds=2)
    assert asked == [True, True, False, False, True]  # to warm up, then in turns
    assert found["ratio"] == pytest.approx(1.5 / gradients)
    assert (found["steps"], found["gradients"]) == (6, gradients)
    assert found["seconds"] == {"off": 2.0, "on": 3.0}


def test_every_part_is_another_than_the_default() -> None:
    for name, change in part_cost.PARTS.items():
        assert change(Parts(), 300) != Parts(), name


def test_the_first_step_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([5.0, 6.0, 8.0])
    monkeypatch.setattr(part_cost.time, "process_time", lambda: next(clock))
    watch = part_cost.Watch()
    for event in ("stage", "step", "step", "evaluation", "step"):
        watch({"event": event})
    assert watch.seconds == [1.0, 2.0]
