"""Extrapolated optimizers and row-wise LARS: games, equivalences, the region and a resume."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from embedgrad.errors import RecipeError
from embedgrad.parts.optimizers import LARS, OPTIMIZERS, SGD, Extrapolated, Optimizer
from embedgrad.parts.parameterizations import Free, LowRank, Parameterization
from embedgrad.prompt.trust_region import TrustRegion, drift_P
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.loss import Loss
from embedgrad.training.settings import Parts, Training
from kit_loop import FAST, small, train
from small_recipe import read

PLAIN = {"name": "sgd", "momentum": 0.0}
DIRECTIONS = ["past", "fresh", "noise"]


def descend(
    part: Optimizer, steps: int, gradient: Callable[[Tensor], Tensor], start: Tensor
) -> tuple[Tensor, int]:
    """Where the steps lead, and how many gradients they took."""
    theta = start.clone().requires_grad_(True)
    optimizer, calls = part.build([theta]), 0

    def closure() -> float:
        nonlocal calls
        calls += 1
        theta.grad = gradient(theta.detach())
        return 0.0

    for _ in range(steps):
        optimizer.step(closure)
    return theta.detach(), calls


def bowl(theta: Tensor) -> Tensor:
    """Gradient of a quadratic with curvatures from 0.1 to 2."""
    return theta * torch.linspace(0.1, 2.0, theta.numel(), dtype=theta.dtype).view_as(theta)


def game(theta: Tensor) -> Tensor:
    """Gradients of min over x, max over y of x y."""
    x, y = theta[0]
    return torch.stack([y, -x])[None]


START = torch.tensor([[1.0, 1.0]], dtype=torch.float64)


def test_extrapolation_solves_a_game_on_which_descent_diverges() -> None:
    plain, _ = descend(SGD(0.3, momentum=0.0), 300, game, START)
    assert plain.norm() > 1e5
    for direction, calls in (("fresh", 600), ("past", 300)):
        part: Any = Extrapolated(0.3, base=PLAIN, direction=direction, scale=1.0)  # type: ignore[arg-type]
        found, called = descend(part, 300, game, START)
        assert found.norm() < 1e-5
        assert called == calls == 300 * part.gradients


def test_fresh_and_past_are_the_methods_of_the_literature_around_sgd() -> None:
    """ExtraSGD of GauthierGidel/Variational-Inequality-GAN, and optimistic gradient descent."""
    start = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rate, extra, optimistic, last = 0.2, start.clone(), start.clone(), torch.zeros_like(start)
    for _ in range(20):
        extra = extra - rate * bowl(extra - rate * bowl(extra))
        last = bowl(optimistic - rate * last)
        optimistic = optimistic - rate * last
    for direction, expected in (("fresh", extra), ("past", optimistic)):
        part = Extrapolated(rate, base=PLAIN, direction=direction, scale=1.0)  # type: ignore[arg-type]
        assert torch.allclose(descend(part, 20, bowl, start)[0], expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("base", sorted(OPTIMIZERS.keys() - {"extrapolated"}))
def test_a_scale_of_zero_is_the_base_optimizer_and_another_is_not(
    base: str, direction: Any
) -> None:
    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    alone, _ = descend(OPTIMIZERS[base](), 9, bowl, start)
    off = Extrapolated(base=base, direction=direction, scale=0.0)
    assert off.learning_rate == OPTIMIZERS[base]().learning_rate
    assert torch.equal(descend(off, 9, bowl, start)[0], alone)
    on, calls = descend(dataclasses.replace(off, scale=0.5), 9, bowl, start)
    assert not torch.equal(on, alone)
    assert calls == (18 if direction == "fresh" else 9)
    # A scale that rounding swallows goes all the way round, and comes back to the bit.
    tiny = dataclasses.replace(off, scale=1e-30)
    assert torch.equal(descend(tiny, 9, bowl, start)[0], alone)


def test_looking_ahead_leaves_the_moments_alone_unless_asked() -> None:
    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    counts = []
    for moments in ("keep", "update"):
        theta = start.clone().requires_grad_(True)
        optimizer = Extrapolated(direction="fresh", moments=moments).build([theta])  # type: ignore[arg-type]

        def closure(theta: Tensor = theta) -> float:
            theta.grad = bowl(theta.detach())
            return 0.0

        for _ in range(5):
            optimizer.step(closure)
        counts.append(optimizer.state[theta]["step"].item())
    assert counts == [5, 10]


def test_noise_is_as_long_in_every_row_as_the_last_step() -> None:
    start = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    theta, seen = start.clone().requires_grad_(True), list[Tensor]()
    optimizer = Extrapolated(0.1, base="lars", direction="noise", scale=0.5).build([theta])

    def closure() -> float:
        seen.append(theta.detach().clone())
        theta.grad = bowl(theta.detach())
        return 0.0

    rows = [start]
    for _ in range(3):
        optimizer.step(closure)
        rows.append(theta.detach().clone())
    assert torch.equal(seen[0], start)
    ahead = seen[2] - rows[2]
    last = rows[2] - rows[1]
    assert torch.allclose(ahead.norm(dim=1), 0.5 * last.norm(dim=1), rtol=0.15)
    cosines = torch.cosine_similarity(ahead, last, dim=1)
    assert cosines.abs().max() < 0.2
    assert not torch.allclose((seen[1] - rows[1]).sign(), ahead.sign())


def test_lars_moves_every_row_by_the_same_share_of_its_size() -> None:
    start = torch.zeros(3, 8)
    gradient = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    gradient = gradient * torch.tensor([[1e-6], [1.0], [0.0]])
    found, _ = descend(LARS(0.1, momentum=0.5), 2, lambda _: gradient, start)
    sizes = found.pow(2).mean(1).sqrt()
    assert sizes[:2].tolist() == pytest.approx([0.25, 0.25])  # 0.1, then 0.1 + 0.05
    assert sizes[2] == 0


@pytest.mark.parametrize("parameterization", [Free(), LowRank()])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_point_ahead_is_in_the_region(
    direction: Any, parameterization: Parameterization, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, drifts, gradient = small(), list[float](), Loss.gradient

    def noted(self: Loss, theta: Any, *arguments: Any) -> Any:
        rows = self.parts.parameterization.prompt(theta, self.start)["span"]
        drifts.append(drift_P(rows.detach(), made.start).max().item())
        return gradient(self, theta, *arguments)

    monkeypatch.setattr(Loss, "gradient", noted)
    parts = Parts(
        optimizer=Extrapolated(1.0, direction=direction, scale=5.0),
        parameterization=parameterization,
        trust_region=TrustRegion(0.1),
    )
    refined = train(made, parts=parts, dev=())
    assert len(drifts) == 6 * parts.optimizer.gradients
    assert 0.05 < max(drifts) <= 0.1 * (1 + 1e-5)
    assert parts.trust_region.holds(refined.prompt.rows, made.start)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("base", ["adamw", "muon", "lars", PLAIN])
def test_a_resume_gives_the_same_bits(tmp_path: Path, direction: Any, base: Any) -> None:
    parts = Parts(optimizer=Extrapolated(base=base, direction=direction))
    training = Training(steps=6, batch_size=3, evaluate_every=2)

    def keep(checkpoint: Checkpoint) -> None:
        checkpoint.save(tmp_path / str(checkpoint.step))

    whole = train(small(), training, parts=parts, keep=keep)
    resumed = train(small(), training, parts=parts, checkpoint=Checkpoint.load(tmp_path / "4"))
    assert torch.equal(resumed.checkpoint.theta["span"], whole.checkpoint.theta["span"])
    base_alone = train(small(), training, parts=FAST)
    assert not torch.equal(whole.checkpoint.theta["span"], base_alone.checkpoint.theta["span"])


def test_a_recipe_names_it_and_its_mistakes_are_told(tmp_path: Path) -> None:
    table = {"name": "extrapolated", "base": {"name": "sgd", "momentum": 0.5}, "scale": 1.0}
    recipe = read(tmp_path, optimizer=table)
    part = recipe.parts.optimizer
    assert isinstance(part, Extrapolated)
    assert part.learning_rate == SGD().learning_rate
    group = part.build([torch.zeros(1, 2, requires_grad=True)]).param_groups[0]
    assert (group["lr"], group["momentum"]) == (1.0, 0.5)
    assert type(recipe).from_dict(recipe.as_dict()) == recipe
    for base, told in (
        ("adam", "optimizer.base: name: unknown optimizer 'adam'; did you mean 'adamw'"),
        ("extrapolated", "optimizer.base: 'extrapolated' cannot be inside itself"),
        ({"name": "sgd", "beta1": 0.5}, "optimizer.base: beta1: unknown option"),
        ({"name": "sgd", "learning_rate": 0.5}, "optimizer.base: learning_rate: give it beside"),
    ):
        with pytest.raises(RecipeError, match=told) as caught:
            read(tmp_path, optimizer={**table, "base": base})
        assert "\n" not in str(caught.value)
