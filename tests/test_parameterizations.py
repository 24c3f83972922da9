"""What each parameterization can reach, and with how many numbers."""

from __future__ import annotations

import pytest
import torch

from embedgrad.parts.parameterizations import (
    Gated,
    LowRank,
    Parameterization,
    ScaleShift,
    Subspace,
)

P, D = 5, 12
START = {"span": torch.randn((P, D), generator=torch.Generator().manual_seed(7))}


def begin(part: Parameterization) -> dict[str, torch.Tensor]:
    return part.init(START, torch.Generator().manual_seed(0))


def distance(part: Parameterization, theta: dict[str, torch.Tensor]) -> torch.Tensor:
    wish = START["span"].roll(1, 0)
    return (part.prompt(theta, START)["span"] - wish).pow(2).mean()


def fitted(part: Parameterization) -> float:
    """How near to other rows the parameterization comes."""
    theta = {name: value.double().requires_grad_() for name, value in begin(part).items()}
    optimizer = torch.optim.LBFGS(
        list(theta.values()), max_iter=800, line_search_fn="strong_wolfe", tolerance_change=0
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = distance(part, theta)
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)
    return distance(part, theta).item()


@pytest.mark.parametrize(
    ("part", "numbers"),
    [
        (LowRank(rank=3), 3 * (P + D)),
        (ScaleShift(), 2 * D),
        (Gated(), P + P * D),
        (Subspace(rank=3), 3 * P + 2 * D),
    ],
)
def test_trained_numbers(part: Parameterization, numbers: int) -> None:
    assert sum(value.numel() for value in begin(part).values()) == numbers


@pytest.mark.parametrize("part", [LowRank(rank=P), Gated(), Subspace(rank=D)])
def test_enough_numbers_reach_any_rows(part: Parameterization) -> None:
    assert fitted(part) < 1e-10


@pytest.mark.parametrize("part", [LowRank(rank=2), ScaleShift(), Subspace(rank=2)])
def test_few_numbers_reach_some_rows(part: Parameterization) -> None:
    assert 1e-2 < fitted(part) < 0.95 * distance(part, begin(part)).item()


@pytest.mark.parametrize(
    ("part", "first", "later"),
    [(LowRank(), "right", "left"), (Gated(), "gate", "delta"), (Subspace(), "codes", "scale")],
)
def test_a_factor_from_zero_moves_first(part: Parameterization, first: str, later: str) -> None:
    theta = {name: value.requires_grad_() for name, value in begin(part).items()}
    for moving in (False, True):
        grads = torch.autograd.grad(distance(part, theta), list(theta.values()))
        sizes = dict(zip(theta, (g.norm().item() for g in grads), strict=True))
        assert sizes[f"span {first}"] > 0
        assert (sizes[f"span {later}"] > 0) == moving
        theta = {
            name: (value - 0.1 * grad).detach().requires_grad_()
            for (name, value), grad in zip(theta.items(), grads, strict=True)
        }


def test_the_subspace_is_drawn_from_its_seed() -> None:
    theta = begin(Subspace(seed=1))
    theta["span codes"] += 1
    rows = [Subspace(seed=seed).prompt(theta, START)["span"] for seed in (1, 1, 2)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    change = (rows[0] - START["span"]) / START["span"].pow(2).mean(-1, keepdim=True).sqrt()
    assert torch.allclose(change, change[:1].expand_as(change), atol=1e-6)  # the codes are equal
