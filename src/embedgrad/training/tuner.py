"""Tune by hypergradients; a step is accepted by the error bound.

    round:  minimize g -> hypergradient -> good enough by its bound? -> step that lowers f

Source: MAID, Salehi et al. 2023, https://arxiv.org/abs/2308.10098, algorithm 1: tolerances shrink
until the bound says that the hypergradient points down, and grow after a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, final

import torch
from annotated_types import Gt, Lt
from torch import Tensor

from embedgrad.events import Report, quiet, say, scoring, stage
from embedgrad.training.hypergradient import (
    Bilevel,
    Constants,
    Hyper,
    Hypergradient,
    Mode,
    error_bound,
    hypergradient,
    size_of,
)
from embedgrad.training.weighted import WeightedTraining

CHUNK = 8  # passes between two saved points
MEMORY = 10  # pairs that L-BFGS keeps
COUNTS = ("n_iter", "func_evals")
ETA = 1e-4  # how far below its bound the hypergradient must be, and how much f must fall


@final
@dataclass(frozen=True)
class Tuning:
    """How much to compute; every number bounds passes over the data."""

    rounds: Annotated[int, Gt(0)] = 1
    """Hypergradients; between two of them is a step, and training with the new weights."""
    passes: Annotated[int, Gt(0)] = 24
    """Passes over the training rows in which each training converges, at most."""
    products: Annotated[int, Gt(0)] = 8
    """Hessian-vector products for each hypergradient, at most."""
    mode: Mode = "cg"
    """How A^-1 is approximated."""
    tolerance: Annotated[float, Gt(0), Lt(1)] = 0.1
    """What share of its gradient a training may keep, and a linear system of its residual."""
    step: Annotated[float, Gt(0)] = 1.0
    """Root mean square of a step in the tuned numbers."""
    tries: Annotated[int, Gt(0)] = 3
    """Steps to try, each half as long as the one before."""


@final
class State(NamedTuple):
    """Where a tuning is: what `tune` saves and resumes from.

    `passes` are those that the present training has taken, `memory` is what its L-BFGS remembers,
    `history` holds one entry a round.
    """

    x: Tensor
    hyper: Hyper
    step: float
    tolerance: float
    passes: int
    memory: dict[str, Tensor]
    history: list[dict[str, Any]]


Keep = Callable[[State], None]


@final
class Tuned(NamedTuple):
    """The last round: where the training ended, the hypergradient there, the step that is next."""

    state: State
    found: Hypergradient
    suggested: Hyper


def minimize(
    problem: Bilevel,
    state: State,
    *,
    passes: int,
    target: float,
    report: Report = quiet,
    keep: Keep = lambda state: None,
) -> tuple[State, float]:
    """Minimize g by L-BFGS until |g_x| <= target; returns where it is then, and |g_x| there.

    It takes about `passes` passes, those before a resume included: a line search is finished.
    """
    seen = list[tuple[Tensor, float, Tensor]]()  # a line search ends at a point that it has seen

    def inner(x: Tensor) -> tuple[float, Tensor]:
        nonlocal state
        for point, value, gradient in seen:
            if torch.equal(point, x):
                return value, gradient
        value, gradient = problem.inner(x, state.hyper)
        again = state.passes > 0 and not seen  # a resumed training's first point is counted
        state = state._replace(passes=state.passes + (not again))
        seen.append((x.clone(), value, gradient))
        norm = gradient.norm().item()
        report(scoring("passes of training", min(state.passes, passes), passes))
        report({"event": "inner", "passes": state.passes, "loss": value, "gradient_norm": norm})
        return value, gradient

    norm = inner(state.x)[1].norm().item()
    leaf = state.x.clone().requires_grad_(True)
    optimizer: torch.optim.Optimizer = torch.optim.LBFGS(
        [leaf],
        max_iter=CHUNK,
        tolerance_grad=target / len(leaf) ** 0.5,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
        history_size=MEMORY,
    )
    optimizer.state[leaf].update(_unpack(state.memory))

    def closure() -> float:
        value, leaf.grad = inner(leaf.detach())
        return value

    while norm > target and state.passes < passes:
        optimizer.param_groups[0]["max_eval"] = min(CHUNK, passes - state.passes)
        optimizer.step(closure)
        moved = not torch.equal(leaf, state.x)
        memory = _pack(optimizer.state[leaf])
        state = state._replace(x=leaf.detach().clone(), memory=memory)
        norm = inner(state.x)[1].norm().item()
        seen[:] = [known for known in seen if torch.equal(known[0], state.x)]
        keep(state)
        if not moved:
            break
    return state, norm


def _pack(memory: dict[str, Any]) -> dict[str, Tensor]:
    """The memory of L-BFGS as tensors that a file can hold."""
    return {
        name: torch.stack(value)
        if isinstance(value, list)
        else value.clone()
        if isinstance(value, Tensor)
        else torch.tensor(value, dtype=torch.float64)
        for name, value in memory.items()
        if name != "al" and not (isinstance(value, list) and not value)
    }


def _unpack(memory: dict[str, Tensor]) -> dict[str, Any]:
    """That memory again, in copies: a sum may depend on where in memory its numbers stand."""
    lists = ("old_dirs", "old_stps", "ro")
    empty: dict[str, Any] = {name: [] for name in lists} if memory else {}
    return empty | {
        name: [part.clone() for part in value]
        if name in lists
        else int(value)
        if name in COUNTS
        else value.clone()
        for name, value in memory.items()
    }


def tune(
    problem: WeightedTraining,
    hyper: Hyper,
    settings: Tuning = Tuning(),
    *,
    state: State | None = None,
    report: Report = quiet,
    keep: Keep = lambda state: None,
) -> Tuned:
    """Tune `hyper` for the dev rows; `keep` gets the states from which `state` resumes.

    A training that does not converge within its passes is said with its residual, and what it came
    to is used. Raises `ModelError` for a model that cannot be differentiated twice, and
    `DivergenceError`.
    """
    if state is None:
        state = State(problem.start_x, hyper, settings.step, settings.tolerance, 0, {}, [])
    first = problem.inner(problem.start_x, hyper)[1].norm().item()
    while True:
        number = len(state.history) + 1
        stage(report, f"round {number} of {settings.rounds}: training on weighted rows")
        state, norm, found, bound = _measure(problem, state, settings, first, report, keep)
        converged = norm <= state.tolerance * first
        entry = {
            "dev_loss": found.value,
            "residual": norm / max(first, 1e-30),
            "converged": converged,
            "passes": state.passes,
            "products": found.solved.products,
            "system_residual": found.solved.residual / max(found.outer_norm, 1e-30),
            "damping": found.solved.damping,
            "hypergradient": found.norm,
            "bound": bound,
            "certified": bound <= (1 - ETA) * found.norm,
        }
        report({"event": "tuning", "round": number, "total": settings.rounds, **entry})
        if not converged:
            left = f"its gradient is {entry['residual']:.2g} of what it began with"
            point = "what follows is of this point, and more passes may change it"
            took = f"the training did not converge in {state.passes} passes"
            say(report, [f"{took}: {left}; {point}"])
        state = state._replace(history=[*state.history, entry])
        suggested = _step_down(state.hyper, found.gradient, state.step)
        if number >= settings.rounds:
            return Tuned(state, found, suggested)
        stepped = _step(problem, state, found, settings, first, report)
        if stepped is None:
            say(report, [f"no step lowers the loss on dev after round {number}; tuning ends here"])
            return Tuned(state, found, suggested)
        state = stepped
        keep(state)


def _measure(
    problem: WeightedTraining,
    state: State,
    settings: Tuning,
    first: float,
    report: Report,
    keep: Keep,
) -> tuple[State, float, Hypergradient, float]:
    """Minimize and differentiate, more precisely until the bound allows a step or effort ends."""
    while True:
        target = state.tolerance * first
        state, norm = minimize(
            problem, state, passes=settings.passes, target=target, report=report, keep=keep
        )
        stage(report, "hypergradient")
        found = hypergradient(
            problem,
            state.x,
            state.hyper,
            inner_norm=norm,
            mode=settings.mode,
            steps=settings.products,
            tolerance=state.tolerance,
            report=report,
        )
        bound = estimate_bound(problem, state.x, state.hyper, found)
        spent = state.passes >= settings.passes or found.solved.products >= settings.products
        if bound <= (1 - ETA) * found.norm or spent or settings.rounds == 1:
            return state, norm, found, bound
        state = state._replace(tolerance=state.tolerance / 2)


def _step(
    problem: WeightedTraining,
    state: State,
    found: Hypergradient,
    settings: Tuning,
    first: float,
    report: Report,
) -> State | None:
    """A step that lowers f enough, with the training after it; None: none of those tried does."""
    for number in range(settings.tries):
        trial = state.step / 2**number
        moved = _step_down(state.hyper, found.gradient, trial)
        slope = sum(
            ((state.hyper[name] - moved[name]) * part).sum().item()
            for name, part in found.gradient.items()
        )
        stage(report, f"trying a step ({number + 1} of {settings.tries})")
        after, _ = minimize(
            problem,
            state._replace(hyper=moved, passes=0, memory={}),
            passes=max(1, settings.passes // 2),
            target=state.tolerance * first,
            report=report,
        )
        if problem.outer(after.x)[0] <= found.value - ETA * slope:
            tolerance = min(0.5, state.tolerance * 1.05)
            return after._replace(step=trial * 10 / 9, tolerance=tolerance)
    return None


def estimate_bound(
    problem: WeightedTraining, x: Tensor, hyper: Hyper, found: Hypergradient
) -> float:
    """`error_bound` with constants as they are along q, by two more passes and one over dev.

    An estimate: in other directions the constants may be larger, and the smallest curvature that
    conjugate gradients saw is not the smallest of all.
    """
    solved, size = found.solved, found.solved.q.norm().item()
    if not size:
        return 0.0
    mu = solved.lowest + solved.damping
    if not mu > 0:  # NaN where no curvature was looked for
        return torch.inf
    d = 10 * problem.reach(x, solved.q) * solved.q
    there = problem.mixed_product(x + d, hyper, solved.q)
    change = size_of({name: there[name] + found.gradient[name] for name in there})
    bend = (problem.outer(x + d)[1] - found.outer_gradient).norm().item()
    far = d.norm().item()
    known = Constants(
        mu=mu,
        B=found.norm / size,
        lipschitz_B=change / (far * size),
        lipschitz_f=bend / far,
    )
    return error_bound(
        known, residual=solved.residual, inner=found.inner_norm, outer=found.outer_norm
    )


def _step_down(hyper: Hyper, gradient: Hyper, step: float) -> Hyper:
    """A step down; its root mean square is `step` in each of the named tensors."""
    sizes = {name: part.square().mean().sqrt().clamp(min=1e-30) for name, part in gradient.items()}
    return {name: value - step * gradient[name] / sizes[name] for name, value in hyper.items()}
