"""Hypergradients: how a loss at a minimum changes with what is minimized.

    min_lambda f(x*(lambda)),   x*(lambda) = argmin_x g(x, lambda)
    dF/dlambda = -B^T A^-1 grad f,   A = d2g/dx2,   B = d2g/dx dlambda

Both steps are inexact: x is a point with a small gradient g_x, and q an approximation of A^-1 times
the gradient of f. Conjugate gradients are implicit differentiation, a Neumann series is what
reverse mode through gradient descent computes at the minimum.
Source: Ehrhardt and Roberts 2023, https://arxiv.org/abs/2301.04764.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from embedgrad.events import Report, quiet, scoring

Hyper = dict[str, Tensor]
"""The numbers to tune, named."""
Product = Callable[[Tensor], Tensor]
Mode = Literal["cg", "neumann", "identity"]


class Bilevel(ABC):
    """An inner problem g(x, hyper) and an outer loss f(x), of a vector x of N numbers."""

    @abstractmethod
    def inner(self, x: Tensor, hyper: Hyper) -> tuple[float, Tensor]:
        """g and its gradient in x, shape [N]."""

    @abstractmethod
    def outer(self, x: Tensor) -> tuple[float, Tensor]:
        """f and its gradient, shape [N]."""

    @abstractmethod
    def product(self, x: Tensor, hyper: Hyper, v: Tensor) -> Tensor:
        """A v, shape [N]."""

    @abstractmethod
    def mixed_product(self, x: Tensor, hyper: Hyper, q: Tensor) -> Hyper:
        """B^T q, in the shapes of `hyper`."""


@final
class Solved(NamedTuple):
    """An approximate solution q of A q = b.

    `residual` is |A q - b|, `lowest` the smallest curvature seen, NaN where none was looked for.
    """

    q: Tensor
    residual: float
    products: int
    lowest: float = torch.nan
    damping: float = 0.0


def conjugate_gradients(
    product: Product, b: Tensor, *, steps: int, tolerance: float, damping: float = 0.0
) -> Solved:
    """Solve (A + damping) q = b to |residual| <= tolerance |b|, by at most `steps` products.

    Where A has no positive curvature in some direction, the damping doubles until it has. The
    iterates are those of conjugate gradients, computed from Lanczos' basis: under another damping
    they need no new products.
    """
    size = b.norm().item()
    if not size:
        return Solved(b.clone(), 0.0, 0)
    basis, diagonal, below = [b / size], list[float](), list[float]()
    while True:
        w = product(basis[-1])
        diagonal.append((w @ basis[-1]).item())
        for _ in range(2):  # once is not enough in fp32
            for v in basis:
                w = w - (w @ v) * v
        beta = w.norm().item()
        T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        off = torch.tensor(below, dtype=torch.float64)
        T += torch.diag(off, 1) + torch.diag(off, -1)
        values = torch.linalg.eigvalsh(T)
        lowest, scale = values[0].item(), values.abs().max().item()
        shift = damping
        while lowest + shift <= 1e-9 * scale:
            shift = max(2 * shift, 1.1 * abs(lowest), 1e-6 * scale, 1e-30)
        e1 = torch.zeros(len(T), dtype=torch.float64)
        e1[0] = size
        y = torch.linalg.solve(T + shift * torch.eye(len(T), dtype=torch.float64), e1)
        residual = beta * abs(y[-1].item())
        if len(T) >= min(steps, len(b)) or residual <= tolerance * size or beta <= 1e-7 * scale:
            q = torch.stack(basis, 1) @ y.to(b)
            return Solved(q, residual + shift * q.norm().item(), len(T), lowest, shift)
        below.append(beta)
        basis.append(w / beta)


def neumann(product: Product, b: Tensor, *, steps: int, step_size: float) -> Solved:
    """q = step_size * sum_{k < steps} (I - step_size A)^k b."""
    q, term = torch.zeros_like(b), b.clone()
    for _ in range(steps):
        q = q + step_size * term
        term = term - step_size * product(term)
    return Solved(q, term.norm().item(), steps)  # the next term is b - A q


def safe_step_size(product: Product, b: Tensor, steps: int = 8) -> float:
    """0.9 over the largest curvature, by power iteration."""
    v, largest = b, 0.0
    for _ in range(steps):
        v = product(v / v.norm().clamp(min=1e-30))
        largest = max(largest, v.norm().item())
    return 0.9 / max(largest, 1e-30)


def unroll(
    problem: Bilevel, x: Tensor, hyper: Hyper, *, steps: int, step_size: float
) -> tuple[Tensor, Hyper]:
    """Where `steps` of gradient descent from x lead, and the gradient of f there through them.

    The steps are differentiated backwards one by one, so that memory holds points and no graphs.
    """
    path = [x]
    for _ in range(steps):
        path.append(path[-1] - step_size * problem.inner(path[-1], hyper)[1])
    last = path.pop()
    _, p = problem.outer(last)
    total = {name: torch.zeros_like(value) for name, value in hyper.items()}
    for point in reversed(path):
        for name, value in problem.mixed_product(point, hyper, p).items():
            total[name] -= step_size * value
        p = p - step_size * problem.product(point, hyper, p)
    return last, total


@final
@dataclass(frozen=True)
class Constants:
    """What the bound needs of a problem: mu (A >= mu I), |B| at the point, and how things vary.

    `lipschitz_B`, `lipschitz_f` and `lipschitz_inverse` are Lipschitz constants in x: of B, of the
    gradient of f, and of A^-1 (0 where A does not depend on x).
    """

    mu: float
    B: float
    lipschitz_B: float
    lipschitz_f: float
    lipschitz_inverse: float = 0.0


def error_bound(known: Constants, *, residual: float, inner: float, outer: float) -> float:
    """A bound on |h - dF/dlambda| from what was computed, never below it for true constants.

    |B| r / mu + |f_x| L_B e / mu + |B| L_f e / mu + L_B L_f e^2 / mu + L_A |f_x| (|B| + L_B e) e
    with e = |g_x| / mu, which bounds the distance to the minimum; r is the residual of q.
    Source: Ehrhardt and Roberts 2023, theorem 10; the last term is for an A that varies.
    """
    e = inner / known.mu
    B, L_B, L_f = known.B, known.lipschitz_B, known.lipschitz_f
    linear = B * residual + outer * L_B * e + B * L_f * e + L_B * L_f * e * e
    return linear / known.mu + known.lipschitz_inverse * outer * (B + L_B * e) * e


@final
class Hypergradient(NamedTuple):
    """dF/dlambda at an inexact minimum, and what it was computed from.

    `value` is f, `inner_norm` |g_x|, `outer_gradient` f_x.
    """

    gradient: Hyper
    solved: Solved
    value: float
    inner_norm: float
    outer_gradient: Tensor

    @property
    def outer_norm(self) -> float:
        """|f_x|."""
        return float(self.outer_gradient.norm())

    @property
    def norm(self) -> float:
        """The length of the hypergradient."""
        return size_of(self.gradient)


def hypergradient(
    problem: Bilevel,
    x: Tensor,
    hyper: Hyper,
    *,
    inner_norm: float,
    mode: Mode = "cg",
    steps: int = 10,
    tolerance: float = 0.01,
    step_size: float | None = None,
    report: Report = quiet,
) -> Hypergradient:
    """-B^T q at x, by `steps` products of A at most; `inner_norm` is |g_x| there.

    The Neumann series takes 8 more where it has no `step_size`.
    """
    value, b = problem.outer(x)
    taken = 0

    def product(v: Tensor) -> Tensor:
        nonlocal taken
        taken += 1
        report(scoring("Hessian-vector products", min(taken, steps), steps))
        return problem.product(x, hyper, v)

    if mode == "identity":  # DARTS: A is taken for I
        solved = Solved(b, torch.nan, 0)
    elif mode == "cg":
        solved = conjugate_gradients(product, b, steps=steps, tolerance=tolerance)
    else:
        size = safe_step_size(product, b) if step_size is None else step_size
        solved = neumann(product, b, steps=steps, step_size=size)
    solved = solved._replace(products=taken)
    found = {name: -part for name, part in problem.mixed_product(x, hyper, solved.q).items()}
    return Hypergradient(found, solved, value, inner_norm, b)


def size_of(hyper: Hyper) -> float:
    """The length of all numbers as one vector."""
    return math.sqrt(sum(value.double().square().sum().item() for value in hyper.values()))
