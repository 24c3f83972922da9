"""Hypergradients: of quadratics with known answers, and of a tiny prompt by finite differences."""

from __future__ import annotations

from typing import final

import pytest
import torch
from torch import Tensor

from embedgrad.training.hypergradient import (
    Bilevel,
    Constants,
    Hyper,
    conjugate_gradients,
    error_bound,
    hypergradient,
    neumann,
    safe_step_size,
    unroll,
)


def positive(size: int, generator: torch.Generator, least: float = 0.3) -> Tensor:
    """A positive definite matrix."""
    M = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
    return M @ M.T + least * torch.eye(size, dtype=torch.float64)


@final
class Quadratic(Bilevel):
    """g = x' A(lam) x / 2 - c' x with A = A0 + sum_j lam_j A_j, f = |M (x - t)|^2 / 2.

    A varies with lambda and not with x, so that B = [A_j x]_j varies with x.
    """

    def __init__(self, seed: int, size: int = 12, tuned: int = 3):
        generator = torch.Generator().manual_seed(seed)
        self.A0 = positive(size, generator)
        self.As = torch.stack([positive(size, generator, 0.0) for _ in range(tuned)])
        self.c, self.t, noise, lam = (
            torch.randn(count, generator=generator, dtype=torch.float64)
            for count in (size, size, size, tuned)
        )
        self.M = positive(size, generator)
        self.noise, self.lam = noise, {"lam": lam.abs()}

    def A(self, hyper: Hyper) -> Tensor:
        return self.A0 + torch.einsum("j,jkl->kl", hyper["lam"], self.As)

    def minimum(self, hyper: Hyper) -> Tensor:
        return torch.linalg.solve(self.A(hyper), self.c)

    def inner(self, x: Tensor, hyper: Hyper) -> tuple[float, Tensor]:
        A = self.A(hyper)
        return (x @ A @ x / 2 - self.c @ x).item(), A @ x - self.c

    def outer(self, x: Tensor) -> tuple[float, Tensor]:
        far = self.M @ (x - self.t)
        return (far @ far / 2).item(), self.M.T @ far

    def product(self, x: Tensor, hyper: Hyper, v: Tensor) -> Tensor:
        return self.A(hyper) @ v

    def mixed_product(self, x: Tensor, hyper: Hyper, q: Tensor) -> Hyper:
        return {"lam": torch.einsum("jkl,l,k->j", self.As, x, q)}

    def true(self) -> Tensor:
        lam = self.lam["lam"].clone().requires_grad_(True)
        far = self.M @ (self.minimum({"lam": lam}) - self.t)
        return torch.autograd.grad(far @ far / 2, lam)[0]

    def constants(self, x: Tensor) -> Constants:
        return Constants(
            mu=torch.linalg.eigvalsh(self.A(self.lam))[0].item(),
            B=torch.linalg.matrix_norm(torch.einsum("jkl,l->kj", self.As, x), 2).item(),
            lipschitz_B=sum(torch.linalg.matrix_norm(A, 2).item() ** 2 for A in self.As) ** 0.5,
            lipschitz_f=torch.linalg.matrix_norm(self.M, 2).item() ** 2,
        )


@pytest.mark.parametrize("mode", ["cg", "neumann"])
def test_the_bound_is_never_below_the_error_of_random_quadratics(mode: str) -> None:
    tight = []
    for seed in range(100):
        problem = Quadratic(seed)
        x = problem.minimum(problem.lam) + 10.0 ** -(1 + seed % 5) * problem.noise
        inner = problem.inner(x, problem.lam)[1].norm().item()
        found = hypergradient(
            problem, x, problem.lam, inner_norm=inner, mode=mode, steps=1 + seed % 7, tolerance=0.0
        )
        error = (found.gradient["lam"] - problem.true()).norm().item()
        bound = error_bound(
            problem.constants(x),
            residual=found.solved.residual,
            inner=inner,
            outer=found.outer_norm,
        )
        assert bound >= error > 0
        tight.append(error / bound)
    assert max(tight) > 1e-3  # a bound, and not just a large number


def test_the_bound_counts_a_curvature_that_varies() -> None:
    known = Constants(mu=2.0, B=3.0, lipschitz_B=0.5, lipschitz_f=1.0, lipschitz_inverse=4.0)
    plain = Constants(mu=2.0, B=3.0, lipschitz_B=0.5, lipschitz_f=1.0)
    seen = {"residual": 0.1, "inner": 0.2, "outer": 0.7}
    e = 0.1
    linear = (3 * 0.1 + 0.7 * 0.5 * e + 3 * e + 0.5 * e * e) / 2
    assert error_bound(plain, **seen) == pytest.approx(linear)
    assert error_bound(known, **seen) == pytest.approx(linear + 4 * 0.7 * (3 + 0.5 * e) * e)


def test_conjugate_gradients_neumann_and_unrolled_agree() -> None:
    problem = Quadratic(7)
    x = problem.minimum(problem.lam)
    settings = {"inner_norm": 0.0, "tolerance": 1e-12}
    exact = hypergradient(problem, x, problem.lam, mode="cg", steps=30, **settings)  # type: ignore[arg-type]
    series = hypergradient(problem, x, problem.lam, mode="neumann", steps=4000, **settings)  # type: ignore[arg-type]
    torch.testing.assert_close(exact.gradient["lam"], problem.true(), rtol=1e-9, atol=0)
    torch.testing.assert_close(series.gradient["lam"], problem.true(), rtol=1e-6, atol=0)
    assert exact.solved.products <= 12
    assert series.solved.products == 4000 + 8  # of these 8 for the step size
    assert series.solved.residual < 1e-6


@pytest.mark.parametrize("steps", [1, 5, 50])
def test_unrolled_at_the_minimum_is_neumanns_series(steps: int) -> None:
    problem = Quadratic(3)
    x = problem.minimum(problem.lam)
    size = safe_step_size(lambda v: problem.product(x, problem.lam, v), problem.outer(x)[1])
    last, through = unroll(problem, x, problem.lam, steps=steps, step_size=size)
    series = hypergradient(
        problem, x, problem.lam, inner_norm=0, mode="neumann", steps=steps, step_size=size
    )
    torch.testing.assert_close(last, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(through["lam"], series.gradient["lam"], rtol=1e-12, atol=1e-13)


def test_unrolled_steps_are_differentiated_where_they_were_taken() -> None:
    problem, size = Quadratic(4), 0.05
    first = problem.noise
    _, found = unroll(problem, first, problem.lam, steps=6, step_size=size)
    lam = problem.lam["lam"].clone().requires_grad_(True)
    x = first
    for _ in range(6):
        x = x - size * (problem.A({"lam": lam}) @ x - problem.c)
    far = problem.M @ (x - problem.t)
    (expected,) = torch.autograd.grad(far @ far / 2, lam)
    torch.testing.assert_close(found["lam"], expected, rtol=1e-10, atol=0)


def test_a_residual_is_what_is_left() -> None:
    generator = torch.Generator().manual_seed(0)
    A, b = positive(20, generator), torch.randn(20, generator=generator, dtype=torch.float64)
    for solved in (
        conjugate_gradients(A.mv, b, steps=4, tolerance=0.0),
        neumann(A.mv, b, steps=4, step_size=0.1),
    ):
        assert solved.products == 4
        assert solved.residual == pytest.approx((A @ solved.q - b).norm().item(), rel=1e-8)


def test_negative_curvature_doubles_the_damping_without_new_products() -> None:
    generator = torch.Generator().manual_seed(1)
    A = positive(10, generator) - 0.8 * torch.eye(10, dtype=torch.float64)
    assert torch.linalg.eigvalsh(A)[0] < 0
    b = torch.randn(10, generator=generator, dtype=torch.float64)
    asked = list[Tensor]()

    def product(v: Tensor) -> Tensor:
        asked.append(v)
        return A @ v

    solved = conjugate_gradients(product, b, steps=10, tolerance=0.0)
    assert solved.lowest < 0 < solved.lowest + solved.damping
    assert len(asked) == solved.products == 10
    damped = A + solved.damping * torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(damped @ solved.q, b, rtol=1e-8, atol=1e-9)
    # What the damping changes counts as residual of the system that was asked for.
    assert solved.residual >= (A @ solved.q - b).norm().item() * (1 - 1e-9)


def test_nothing_to_solve_is_solved_by_zero() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert conjugate_gradients(lambda v: v, zero, steps=3, tolerance=0.1).products == 0


def test_identity_takes_no_product() -> None:
    problem = Quadratic(0)
    x = problem.minimum(problem.lam)
    found = hypergradient(problem, x, problem.lam, inner_norm=0, mode="identity")
    expected = -problem.mixed_product(x, problem.lam, problem.outer(x)[1])["lam"]
    torch.testing.assert_close(found.gradient["lam"], expected)
