"""Oracles that decide by costs, and the regret of deciding by predictions."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from embedgrad.data.arrow import import_extra

Vector = npt.NDArray[np.float64]
TIES = 1e6  # predicted costs are tied where they differ by less than 1 / TIES of the largest


class Oracle(ABC):
    """Finds the decision d, a number for each of N costs, for which costs . d is lowest."""

    @abstractmethod
    def decide(self, costs_N: Vector) -> Vector:
        """The decision of lowest cost, shape [N]; of several the same one every time."""

    @abstractmethod
    def problem(self, rows: int) -> str:
        """What is wrong with this number of rows, or "" if they can be decided over."""


@final
@dataclass(frozen=True)
class TopK(Oracle):
    """Choose exactly k rows."""

    k: int

    def decide(self, costs_N: Vector) -> Vector:
        chosen = np.zeros(len(costs_N))
        chosen[np.argsort(costs_N, kind="stable")[: self.k]] = 1
        return chosen

    def problem(self, rows: int) -> str:
        return f"expected more than objective.k = {self.k}" if rows <= self.k else ""


@final
@dataclass(frozen=True)
class CostMatrix(Oracle):
    """Choose one of the actions for each row by itself."""

    actions: int

    def decide(self, costs_N: Vector) -> Vector:
        costs_BA = costs_N.reshape(-1, self.actions)
        chosen = np.zeros_like(costs_BA)
        chosen[np.arange(len(costs_BA)), costs_BA.argmin(axis=1)] = 1
        return chosen.ravel()

    def problem(self, rows: int) -> str:
        return ""


@final
@dataclass(frozen=True)
class FiniteSet(Oracle):
    """Choose one of the decisions that are listed, a number for each row."""

    decisions: tuple[tuple[float, ...], ...]

    def decide(self, costs_N: Vector) -> Vector:
        decisions_MN = np.array(self.decisions)
        best: Vector = decisions_MN[(decisions_MN @ costs_N).argmin()]
        return best

    def problem(self, rows: int) -> str:
        width = len(self.decisions[0])
        return f"expected {width}, as objective.decisions lists" if rows != width else ""


@final
@dataclass(frozen=True)
class Assignment(Oracle):
    """Pair the lines of a table of costs with its columns, each at most once."""

    width: int

    def decide(self, costs_N: Vector) -> Vector:
        costs_RW = costs_N.reshape(-1, self.width)
        chosen = np.zeros_like(costs_RW)
        chosen[_optimize().linear_sum_assignment(costs_RW)] = 1
        return chosen.ravel()

    def problem(self, rows: int) -> str:
        return _of_table(rows, self.width)


@final
@dataclass(frozen=True)
class LinearProgram(Oracle):
    """Numbers from 0 to 1 under constraints a . d <= b, each listed as a and then b."""

    constraints: tuple[tuple[float, ...], ...]

    def decide(self, costs_N: Vector) -> Vector:
        solved = self._solve(costs_N)
        assert solved.success, solved.message  # `problem` was asked before
        found: Vector = solved.x
        return found

    def problem(self, rows: int) -> str:
        width = len(self.constraints[0]) - 1
        if rows != width:
            return f"expected {width}, as objective.constraints lists numbers and a limit"
        feasible = self._solve(np.zeros(rows)).success
        return "" if feasible else "no decision meets all of objective.constraints; relax one"

    def _solve(self, costs_N: Vector) -> Any:
        table = np.array(self.constraints)
        return _optimize().linprog(costs_N, table[:, :-1], table[:, -1], bounds=(0, 1))


@final
@dataclass(frozen=True)
class GridPath(Oracle):
    """The cells of a path over a table from the first to the last, to the right and down."""

    width: int

    def decide(self, costs_N: Vector) -> Vector:
        costs_RW = costs_N.reshape(-1, self.width)
        total_RW = costs_RW.copy()
        for i, j in np.ndindex(*costs_RW.shape):
            before = [total_RW[i - 1, j]] * (i > 0) + [total_RW[i, j - 1]] * (j > 0)
            total_RW[i, j] += min(before, default=0.0)
        path = np.zeros_like(costs_RW)
        i, j = (size - 1 for size in costs_RW.shape)
        path[i, j] = 1
        while i or j:
            up = j == 0 or (i > 0 and total_RW[i - 1, j] <= total_RW[i, j - 1])
            i, j = (i - 1, j) if up else (i, j - 1)
            path[i, j] = 1
        return path.ravel()

    def problem(self, rows: int) -> str:
        return _of_table(rows, self.width) or (
            f"expected two lines or more of objective.width = {self.width}"
            if rows == self.width
            else ""
        )


@final
class Decided(NamedTuple):
    """What deciding by predictions costs over the `best` decision, in hindsight.

    `regret` is of the decision taken, `pessimistic` of the worst of those that the predictions say
    are as good.
    """

    regret: float
    pessimistic: float
    best: float


def judge(oracle: Oracle, predicted_N: Vector, actual_N: Vector) -> Decided:
    """The regret of deciding by predicted costs where others come true."""
    best = float(actual_N @ oracle.decide(actual_N))
    regret = float(actual_N @ oracle.decide(predicted_N)) - best
    against_N = TIES * _unit(predicted_N) - _unit(actual_N)
    pessimistic = float(actual_N @ oracle.decide(against_N)) - best
    return Decided(regret, max(regret, pessimistic), best)


def penalize(
    oracle: Oracle, predicted_N: Tensor, actual_N: Vector, penalty: float, *, anchored: bool
) -> Tensor:
    """A bound on the pessimistic regret, shape [], differentiable in the predictions.

    P(p) = -z(penalty p - c) + penalty p . d - z(c),  z(c) = min_d c . d
    with d the decision by the predictions p or, `anchored`, by the true costs c; that is SPO+ where
    the penalty is 2. By Danskin's theorem the decisions are constants of the gradient.
    """
    found_N = predicted_N.detach().double().cpu().numpy()
    worst_N = oracle.decide(penalty * found_N - actual_N)
    best_N = oracle.decide(actual_N)
    taken_N = best_N if anchored else oracle.decide(found_N)
    slope_N = predicted_N.new_tensor(penalty * (taken_N - worst_N))
    return predicted_N @ slope_N + float(actual_N @ (worst_N - best_N))


@functools.cache
def problem_of(oracle: Oracle, rows: int) -> str:
    """`Oracle.problem`, asked once."""
    return oracle.problem(rows)


def _of_table(rows: int, width: int) -> str:
    if rows > 1 and rows % width == 0:
        return ""
    return f"expected two or more, and a multiple of objective.width = {width}"


def _unit(costs_N: Vector) -> Vector:
    scaled: Vector = costs_N / (float(np.abs(costs_N).max()) or 1.0)
    return scaled


def _optimize() -> Any:
    return import_extra("scipy.optimize", "decisions", "objective.decision")


def rectangular(table: Sequence[Sequence[float]]) -> bool:
    """Whether a table has lines, all of the same length."""
    return bool(table) and len(table[0]) > 0 and len({len(line) for line in table}) == 1
