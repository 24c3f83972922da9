"""Law: an outcome is a pure function of rows and sequences, differentiable twice."""

from __future__ import annotations

import pytest
import torch

from embedgrad.model.language_model import LanguageModel
from kit import REUSING, noisy
from kit_loss import loss_and_gradient, mixed, weighted


@pytest.mark.parametrize("architecture", [*REUSING, "mamba"])
def test_second_derivatives_are_right(architecture: str) -> None:
    made = mixed(architecture, rows=2)
    point = noisy(made.start)
    direction = noisy(torch.ones_like(point), seed=1) * point.norm() / point.numel() ** 0.5
    rows = point.clone().requires_grad_(True)
    loss = weighted(list(made.model.outcome(rows, made.sequences).logprobs_BC))
    (gradient,) = torch.autograd.grad(loss, rows, create_graph=True)
    (product,) = torch.autograd.grad((gradient * direction).sum(), rows)
    step = 1e-5
    _, above = loss_and_gradient(made.model, point + step * direction, made.sequences)
    _, below = loss_and_gradient(made.model, point - step * direction, made.sequences)
    numeric = (above - below) / (2 * step)
    assert numeric.norm().item() > 1e-3
    assert ((product - numeric).norm() / numeric.norm()).item() < 1e-6


@pytest.mark.parametrize("budget", [0, 60_000, "1 GiB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_inputs_give_the_same_bits(dtype: torch.dtype, budget: int | str) -> None:
    made = mixed(dtype=dtype, budget=budget, rows=6)
    rows = noisy(made.start)
    before = rows.clone()
    first = loss_and_gradient(made.model, rows, made.sequences)
    stored = len(made.model.prefix_cache)
    assert stored == {0: 0, "1 GiB": 6}[budget] if budget != 60_000 else 0 < stored < 6
    made.model.outcome(made.start, made.sequences[2:4])
    second = loss_and_gradient(made.model, rows, made.sequences)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(rows, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_was_computed_before_changes_no_bit(dtype: torch.dtype) -> None:
    made = mixed(dtype=dtype, rows=6)
    rows = noisy(made.start)
    fresh = LanguageModel(made.loaded)
    fresh.outcome(rows, made.sequences)  # prefixes of six rows together
    found = loss_and_gradient(fresh, rows, made.sequences[:2])
    expected = loss_and_gradient(made.model, rows, made.sequences[:2])
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
