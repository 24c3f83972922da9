"""Oracles against brute force; bounds on regret: their order, slopes and PyEPO's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp

from embedgrad.errors import DataError
from embedgrad.parts.objectives import decisions
from embedgrad.parts.objectives.decisions import (
    Assignment,
    CostMatrix,
    FiniteSet,
    GridPath,
    LinearProgram,
    Oracle,
    TopK,
    Vector,
    judge,
    penalize,
    problem_of,
)

WEIGHTS, ROOM = np.array([3.0, 4.0, 2.0, 5.0, 1.0]), 8.0


def subsets(rows: int) -> list[tuple[float, ...]]:
    return list(itertools.product((0.0, 1.0), repeat=rows))


def paths(height: int, width: int) -> Iterator[tuple[float, ...]]:
    for down in itertools.combinations(range(height + width - 2), height - 1):
        cells, i, j = {(0, 0)}, 0, 0
        for step in range(height + width - 2):
            i, j = (i + 1, j) if step in down else (i, j + 1)
            cells.add((i, j))
        yield tuple(float((i, j) in cells) for i in range(height) for j in range(width))


def pairings(height: int, width: int) -> Iterator[tuple[float, ...]]:
    for chosen in subsets(height * width):
        table = np.array(chosen).reshape(height, width)
        if table.sum() == min(height, width) and table.sum(0).max() == table.sum(1).max() == 1:
            yield chosen


KNAPSACK = tuple(d for d in subsets(5) if np.array(d) @ WEIGHTS <= ROOM)
ORACLES: dict[str, tuple[Oracle, list[tuple[float, ...]]]] = {
    "top_k": (TopK(2), [d for d in subsets(5) if sum(d) == 2]),
    "cost_matrix": (
        CostMatrix(3),
        [a + b for a in np.eye(3).tolist() for b in np.eye(3).tolist()],
    ),
    "finite_set": (FiniteSet(KNAPSACK), list(KNAPSACK)),
    "assignment": (Assignment(3), list(pairings(3, 3))),
    "wide assignment": (Assignment(3), list(pairings(2, 3))),
    "linear_program": (
        LinearProgram(((-1.0, -1.0, -1.0, -2.0), (1.0, 0.0, 1.0, 1.0))),  # two or more, one of 0, 2
        [(1.0, 1.0, 0.0), (0.0, 1.0, 1.0)],
    ),
    "grid_path": (GridPath(3), list(paths(3, 3))),
}


@pytest.fixture(params=sorted(ORACLES))
def case(request: pytest.FixtureRequest) -> tuple[Oracle, Vector]:
    oracle, feasible = ORACLES[request.param]
    return oracle, np.array([list(d) for d in feasible])


def draws(rows: int, count: int) -> Iterator[tuple[Vector, Vector]]:
    """Predicted and true costs; every other pair of small whole numbers, which tie."""
    rng = np.random.default_rng(rows)
    for i in range(count):
        if i % 2:
            yield rng.integers(-2, 3, rows).astype(float), rng.integers(-2, 3, rows).astype(float)
        else:
            yield rng.normal(size=rows), rng.normal(size=rows)


def test_oracles_find_what_brute_force_finds(case: tuple[Oracle, Vector]) -> None:
    oracle, feasible = case
    for costs, _ in draws(feasible.shape[1], 30):
        found = oracle.decide(costs)
        assert found @ costs == pytest.approx((feasible @ costs).min(), abs=1e-9)
        if not isinstance(oracle, LinearProgram):  # whose corners alone are listed
            assert found.tolist() in feasible.tolist()


def bound(oracle: Oracle, p: Vector, c: Vector, penalty: float, *, anchored: bool = False) -> float:
    return penalize(oracle, torch.from_numpy(p), c, penalty, anchored=anchored).item()


def test_every_bound_is_above_the_next_and_all_are_above_the_regret(
    case: tuple[Oracle, Vector],
) -> None:
    """SPO+ >= P_2 >= P_4 >= ... >= pessimistic regret >= regret >= 0, ties included."""
    oracle, feasible = case
    slow = isinstance(oracle, LinearProgram)
    for p, c in draws(feasible.shape[1], 20 if slow else 300):
        true = feasible @ c
        tied = np.isclose(feasible @ p, (feasible @ p).min(), atol=1e-9)
        decided = judge(oracle, p, c)
        worst = true[tied].max() - true.min()
        chain = [
            bound(oracle, p, c, 2.0, anchored=True),
            *(bound(oracle, p, c, lam) for lam in (2.0, 4.0, 8.0, 64.0)),
            decided.pessimistic,
            decided.regret,
            0.0,
        ]
        assert all(a >= b - 1e-7 for a, b in itertools.pairwise(chain))
        assert decided.pessimistic == pytest.approx(worst, abs=1e-6)
        assert bound(oracle, p, c, 1e5) == pytest.approx(worst, abs=1e-3)
        assert decided.best == pytest.approx(true.min(), abs=1e-9)


def test_spo_plus_is_zero_where_the_decision_is_right_by_half_the_true_margin() -> None:
    oracle, feasible = ORACLES["top_k"]
    table, zeros = np.array(feasible), 0
    for p, c in draws(5, 2000):
        over = table - oracle.decide(c)
        robust = bool((2 * over @ p >= over @ c - 1e-9).all())
        loss = bound(oracle, p, c, 2.0, anchored=True)
        assert (abs(loss) < 1e-9) == robust
        zeros += robust
        if robust:
            assert judge(oracle, p, c).pessimistic == pytest.approx(0, abs=1e-9)
    assert 50 < zeros < 1000
    assert bound(oracle, 3 * c, c, 2.0, anchored=True) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("penalty", "anchored"), [(2.0, True), (2.0, False), (8.0, False)])
def test_the_slope_is_that_of_finite_differences(
    case: tuple[Oracle, Vector], penalty: float, anchored: bool
) -> None:
    oracle, feasible = case
    rng, step, moved = np.random.default_rng(3), 1e-6, 0
    for _ in range(5):
        p, c = rng.normal(size=(2, feasible.shape[1])) * [[1], [2 * penalty]]
        there = torch.from_numpy(p).requires_grad_(True)
        loss = penalize(oracle, there, c, penalty, anchored=anchored)
        (slope,) = torch.autograd.grad(loss, there)
        moved += bool(slope.abs().max() > 0)
        for i in range(len(p)):
            up, down = p.copy(), p.copy()
            up[i] += step
            down[i] -= step
            found = bound(oracle, up, c, penalty, anchored=anchored)
            found -= bound(oracle, down, c, penalty, anchored=anchored)
            assert found / (2 * step) == pytest.approx(slope[i].item(), abs=1e-6)
    assert moved


def test_spo_plus_is_convex_in_the_predictions() -> None:
    oracle, _ = ORACLES["grid_path"]
    for p, c in draws(9, 200):
        q = np.roll(p, 1)
        middle, ends = (
            bound(oracle, (p + q) / 2, c, 2.0, anchored=True),
            [bound(oracle, one, c, 2.0, anchored=True) for one in (p, q)],
        )
        assert middle <= sum(ends) / 2 + 1e-9


def test_pyepo_computes_the_same_on_a_knapsack() -> None:
    pyepo = pytest.importorskip("pyepo")
    from pyepo.metric.unambregret import calUnambRegret

    class Knapsack(pyepo.model.opt.optModel):  # type: ignore[misc]
        """min c . d with WEIGHTS . d <= ROOM, by SciPy's integer programs."""

        def _getModel(self) -> tuple[list[LinearConstraint], range]:
            return [LinearConstraint(WEIGHTS, ub=ROOM)], range(5)

        def setObj(self, c: Vector) -> None:
            self.costs = np.asarray(c, dtype=float)

        def solve(self) -> tuple[Vector, float]:
            found = milp(
                self.costs, constraints=self._model, integrality=np.ones(5), bounds=Bounds(0, 1)
            )
            return np.round(found.x), found.fun

        def addConstr(self, coefs: Vector, rhs: float) -> Knapsack:
            other = Knapsack()
            other._model = [*self._model, LinearConstraint(np.asarray(coefs), ub=rhs)]
            return other

    model = Knapsack()
    spo_plus = pyepo.func.SPOPlus(model)
    oracle = FiniteSet(KNAPSACK)
    for p, c in draws(5, 16):
        if len({*c.tolist()}) < 5:  # PyEPO's slope depends on which of the tied decisions it finds
            c = c + np.linspace(0, 0.01, 5)
        model.setObj(c)
        best, value = model.solve()
        theirs, ours = (torch.tensor(p, requires_grad=True) for _ in range(2))
        costs = torch.tensor(c)[None]
        loss = spo_plus(theirs[None], costs, torch.tensor(best)[None], torch.tensor([[value]]))
        own = penalize(oracle, ours, c, 2.0, anchored=True)
        assert own.item() == pytest.approx(loss.item(), abs=1e-5)
        (slope,) = torch.autograd.grad(own, ours)
        assert slope.numpy() == pytest.approx(torch.autograd.grad(loss, theirs)[0].numpy())
        worst = calUnambRegret(model, p, c, value)
        assert judge(oracle, p, c).pessimistic == pytest.approx(worst, abs=1e-6)


@pytest.mark.parametrize(
    ("oracle", "rows", "problem"),
    [
        (TopK(3), 3, "expected more than objective.k = 3"),
        (TopK(1), 1, "expected more than objective.k = 1"),
        (FiniteSet(((0.0, 1.0),)), 3, "expected 2, as objective.decisions lists"),
        (Assignment(2), 3, "expected two or more, and a multiple of objective.width = 2"),
        (Assignment(1), 1, "expected two or more, and a multiple of objective.width = 1"),
        (GridPath(3), 3, "expected two lines or more of objective.width = 3"),
        (GridPath(3), 7, "expected two or more, and a multiple of objective.width = 3"),
        (LinearProgram(((1.0, 1.0, 1.0),)), 3, "expected 2, as objective.constraints lists"),
        (
            LinearProgram(((1.0, 1.0, 1.0), (-1.0, -1.0, -1.5))),
            2,
            "no decision meets all of objective.constraints; relax one",
        ),
    ],
)
def test_what_cannot_be_decided_says_why(oracle: Oracle, rows: int, problem: str) -> None:
    assert problem in problem_of(oracle, rows)
    assert problem_of(TopK(2), 3) == problem_of(GridPath(2), 4) == ""


def test_without_scipy_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(DataError, match=r"objective\.decision: needs the package scipy.*embedgrad"):
        Assignment(2).decide(np.zeros(4))
    assert decisions.TopK(1).decide(np.array([2.0, 1.0])).tolist() == [0, 1]
