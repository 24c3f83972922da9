"""Regret: train for what decisions by the model's scores cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, final

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from embedgrad.data.examples import Example, cell_text
from embedgrad.errors import DataError, RecipeError
from embedgrad.model.outcome import Outcome
from embedgrad.parts.objectives.base import Objective, State
from embedgrad.parts.objectives.cross_entropy import CrossEntropy
from embedgrad.parts.objectives.decisions import (
    Assignment,
    CostMatrix,
    Decided,
    FiniteSet,
    GridPath,
    LinearProgram,
    Oracle,
    TopK,
    Vector,
    judge,
    penalize,
    problem_of,
    rectangular,
)
from embedgrad.prompt.sequence import TokenSequence

NEEDS = {
    "top_k": ("k",),
    "cost_matrix": (),
    "finite_set": ("decisions", "place"),
    "assignment": ("width", "place"),
    "linear_program": ("constraints", "place"),
    "grid_path": ("width", "place"),
}


@final
@dataclass(frozen=True)
class Regret(Objective):
    """Make cheaper decisions from the model's scores of several rows together.

    The rows of one data.group are one decision d, which makes costs . d as low as it can: choose k
    of them, pair them, find a path. It is made by predicted costs p and judged by true ones c:
    regret = c . d(p) - c . d(c). That has no gradient, but a bound on it has:

    loss = P / rows + mix * cross-entropy over the choices
    P = -z(penalty p - c) + penalty p . d(p) - z(c),  z(c) = min_d c . d
    spo+: penalty 2, and d(c) for d(p), which makes P convex in p. SPO+ >= P_2 >= P_4 >= ..., down
    to the regret of the worst of equally good decisions. True costs are divided by their mean size.

    It helps where errors differ in what they cost and the model cannot get all right; where they
    do not, cross-entropy does as well. A batch has to hold whole decisions: set data.group, and
    training.batch_by = "groups". Dev regret decides which rows are kept.
    Source: SPO+, Elmachtoub and Grigas 2022, https://arxiv.org/abs/1710.08005, eq. 9; pessimistic
    regret: https://arxiv.org/abs/2312.17640, of which this penalty is no part.
    """

    decides: ClassVar[bool] = True

    costs: str | tuple[float, ...] | tuple[tuple[float, ...], ...]
    """True cost of choosing a row, less than 0 for a gain: the name of a column, or a number for
    each right answer in the order of target.choices; with cost_matrix a list for each right answer,
    of what each action costs."""
    decision: Literal[
        "top_k", "cost_matrix", "finite_set", "assignment", "linear_program", "grid_path"
    ] = "top_k"
    """What is decided: top_k (choose k rows), cost_matrix (an action for each row by itself),
    finite_set (one of a list), assignment (pair the lines and columns of a table), linear_program
    (shares from 0 to 1 under constraints), grid_path (from the first cell of a table to the last,
    to the right and down). assignment and linear_program need SciPy."""
    k: Annotated[int, Gt(0)] | None = None
    """With top_k: how many rows are chosen."""
    width: Annotated[int, Gt(0)] | None = None
    """With assignment and grid_path: columns of the table, whose cells are a decision's rows."""
    decisions: tuple[tuple[float, ...], ...] | None = None
    """With finite_set: the decisions, a number for each row."""
    constraints: tuple[tuple[float, ...], ...] | None = None
    """With linear_program: a number for each row, and last the limit that their sum keeps to."""
    place: str | None = None
    """The column with each row's place in its decision, from 0; for all but top_k and cost_matrix,
    for which places are alike."""
    weights: tuple[float, ...] | None = None
    """What each choice adds to a row's predicted cost; unset: costs, where these are listed."""
    score: Literal["auto", "log_odds", "probabilities"] = "auto"
    """What the weights are for: log_odds (the log-probabilities of the choices, with weights that
    are centered), or probabilities (then the prediction is the expected cost); auto: probabilities
    with cost_matrix, else log_odds."""
    kind: Literal["spo+", "pessimistic", "cross_entropy"] = "spo+"
    """The loss: spo+, pessimistic (after a start with spo+), or cross_entropy alone, with regret as
    a mere score, to compare with."""
    penalty: Annotated[float, Gt(1)] = 8.0
    """With pessimistic: the larger, the closer to the regret, and the less smooth."""
    warm_share: Annotated[float, Ge(0), Le(1)] = 0.7
    """With pessimistic: the share of steps that start with spo+."""
    mix: Annotated[float, Ge(0)] = 0.1
    """Weight of cross-entropy, which keeps scores calibrated and learns where decisions agree."""

    def __post_init__(self) -> None:
        needed = NEEDS[self.decision]
        for name in ("k", "width", "decisions", "constraints", "place"):
            if (getattr(self, name) is None) == (name in needed):
                do = "needs it; set it" if name in needed else "has no use for it; take it out"
                raise DataError(f"objective.{name}: decision = {self.decision!r} {do}")
        for name in ("decisions", "constraints"):
            table = getattr(self, name)
            if table is not None and not rectangular(table):
                raise DataError(f"objective.{name}: expected lists of numbers, all equally long")
        if self.decision == "grid_path" and self.width == 1:
            raise DataError("objective.width: 1 leaves one path; expected 2 or more")
        if self.decisions is not None and len({*self.decisions}) < 2:
            raise DataError("objective.decisions: leave no choice; expected two or more")
        listed = not isinstance(self.costs, str)
        matrix = listed and all(isinstance(line, tuple) for line in self.costs)
        if (self.decision == "cost_matrix") != matrix or (
            matrix and not (rectangular(self.table) and len(self.table[0]) > 1)
        ):
            problem = "decision = 'cost_matrix' takes a list of two actions' costs or more for each"
            raise DataError(f"objective.costs: {problem} choice, and others take none")
        if (self.weights is None) != listed:
            problem = "are for costs from a column, which need them; give both or neither"
            raise DataError(f"objective.weights: {problem}")
        if len({*self.table}) < 2:
            what = "costs" if listed else "weights"
            problem = "are all equal, which tells no row from another; expected different numbers"
            raise DataError(f"objective.{what}: {problem}")

    @property
    def table(self) -> tuple[tuple[float, ...], ...]:
        """For each choice what it adds to each predicted cost."""
        values: Any = self.costs if self.weights is None else self.weights
        return tuple(v if isinstance(v, tuple) else (v,) for v in values)

    @property
    def oracle(self) -> Oracle:
        """What decides."""
        match self.decision:
            case "top_k":
                return TopK(self.k or 1)
            case "cost_matrix":
                return CostMatrix(len(self.table[0]))
            case "finite_set":
                return FiniteSet(self.decisions or ())
            case "assignment":
                return Assignment(self.width or 1)
            case "linear_program":
                return LinearProgram(self.constraints or ())
            case "grid_path":
                return GridPath(self.width or 1)

    @property
    def needs_groups(self) -> bool:
        return self.decision != "cost_matrix"

    @property
    def columns(self) -> tuple[str, ...]:
        named = [self.costs if isinstance(self.costs, str) else None, self.place]
        return tuple(name for name in named if name is not None)

    def needs_choices(self, *, available: bool) -> bool:
        return True

    def check(
        self, train: Sequence[Example], dev: Sequence[Example], test: Sequence[Example] = ()
    ) -> None:
        for part in (train, dev, test):
            extra = {name: [e.extra.get(name) for e in part] for name in self.columns}
            self.members([e.group for e in part], extra)
            self._actual([0] * len(part), extra, [e.source for e in part])

    def init(
        self,
        train: Sequence[TokenSequence],
        losses: Callable[[Sequence[TokenSequence]], Tensor],
        steps: int,
    ) -> State:
        extra = {name: [s.example.extra.get(name) for s in train] for name in self.columns}
        size = float(np.abs(self._actual([s.gold for s in train], extra)).mean())
        warm = round(self.warm_share * steps) if self.kind == "pessimistic" else 0
        figures = {"size": size or 1.0, "step": 0.0, "warm": float(warm)}
        return {n: torch.tensor(figure, dtype=torch.float64) for n, figure in figures.items()}

    def update(self, state: State, losses_B: Tensor, outcome: Outcome) -> State:
        return {**state, "step": state["step"] + 1} if state else state

    def losses(self, outcome: Outcome) -> Tensor:
        """Cross-entropy over the choices, and behind it the K predicted costs: shape [B, 1 + K]."""
        if outcome.logprobs_BC.shape[1] == 1:
            raise RecipeError("objective", ["needs choices; name them in target.choices"])
        entropy_B = CrossEntropy(over="choices").losses(outcome)
        shares_BC = torch.log_softmax(outcome.scores_BC, dim=1)
        return torch.cat([entropy_B[:, None], self.predict(shares_BC)], dim=1)

    def predict(self, shares_BC: Tensor) -> Tensor:
        """Predicted costs by the choices' log-probabilities, shape [B, K]."""
        weights_CK = shares_BC.new_tensor(self.table)[: shares_BC.shape[1]]
        if self._in_nats:
            weights_CK = weights_CK - weights_CK.mean(dim=0)
            weights_CK = weights_CK / weights_CK.abs().max()
            return shares_BC.masked_fill(shares_BC == -math.inf, 0) @ weights_CK
        return shares_BC.exp() @ weights_CK

    def reduce(self, losses_B: Tensor, outcome: Outcome) -> Tensor:
        return self.reduce_with({}, losses_B, outcome)

    def reduce_with(self, state: State, losses_B: Tensor, outcome: Outcome) -> Tensor:
        entropy, predicted_BK = losses_B[:, 0].mean(), losses_B[:, 1:]
        if self.kind == "cross_entropy":
            return entropy
        size = state["size"].item() if state else 1.0
        actual_BK = self._actual(outcome.gold_B.tolist(), outcome.extra) / size
        if not self._in_nats:
            predicted_BK = predicted_BK / size
        anchored = self.kind == "spo+" or bool(state and state["step"] < state["warm"])
        penalty = 2.0 if anchored else self.penalty
        bounds = [
            penalize(
                self.oracle,
                predicted_BK[rows].flatten(),
                actual_BK[rows].ravel(),
                penalty,
                anchored=anchored,
            )
            for rows in self.members(outcome.groups, outcome.extra)
        ]
        return torch.stack(bounds).sum() / len(losses_B) + self.mix * entropy

    def judge(
        self, examples: Sequence[Example], shares: Sequence[Mapping[str, float]]
    ) -> list[Decided]:
        """Every decision over these rows, given the probabilities of each row's choices."""
        shares_BC = torch.tensor([list(row.values()) for row in shares], dtype=torch.float64)
        predicted_BK = self.predict(shares_BC.clamp(min=1e-40).log()).numpy()
        extra = {name: [e.extra.get(name) for e in examples] for name in self.columns}
        gold = [list(row).index(e.answer) for e, row in zip(examples, shares, strict=True)]
        actual_BK = self._actual(gold, extra)
        return [
            judge(self.oracle, predicted_BK[rows].ravel(), actual_BK[rows].ravel())
            for rows in self.members([e.group for e in examples], extra)
        ]

    def members(
        self, groups: Sequence[str | None], extra: Mapping[str, Sequence[Any]]
    ) -> list[list[int]]:
        """The rows of each decision, in their places. Raises `DataError` for one without any."""
        if not self.needs_groups:
            return [[b] for b in range(len(groups))]
        members: dict[str, list[int]] = {}
        for b, group in enumerate(groups):
            if group is None:
                problem = "the rows have none; set data.group to the column of their decision"
                raise DataError(f"objective: 'regret' decides over groups, but {problem}")
            members.setdefault(group, []).append(b)
        for group, rows in members.items():
            if problem := problem_of(self.oracle, len(rows)):
                raise DataError(
                    f"objective.decision: {self.decision!r} over the {len(rows)} row"
                    f"{'s' * (len(rows) != 1)} of group {group!r} cannot be made; {problem}"
                )
            if self.place is None:
                continue
            cells = self._cells(extra, self.place)
            places = {cell_text(cells[b]) or "": b for b in rows}
            wanted = [str(i) for i in range(len(rows))]
            if {*places} != {*wanted}:
                raise DataError(
                    f"objective.place: column {self.place!r} of group {group!r} holds "
                    f"{', '.join(sorted(places)[:8])}; expected each of 0 to {len(rows) - 1} once"
                )
            members[group] = [places[name] for name in wanted]
        return list(members.values())

    @property
    def _in_nats(self) -> bool:
        by_default = self.score == "auto" and self.decision != "cost_matrix"
        return by_default or self.score == "log_odds"

    def _cells(self, extra: Mapping[str, Sequence[Any]], column: str) -> Sequence[Any]:
        if column not in extra:
            raise DataError(
                f"objective: no value in Example.extra[{column!r}]; every example needs one"
            )
        return extra[column]

    def _actual(
        self,
        gold: Sequence[int],
        extra: Mapping[str, Sequence[Any]],
        sources: Sequence[str] | None = None,
    ) -> Vector:
        """True costs of each row, shape [B, K]."""
        if not isinstance(self.costs, str):
            return np.array([self.table[i] for i in gold], dtype=np.float64)
        found: list[float] = []
        for b, cell in enumerate(self._cells(extra, self.costs)):
            try:
                found.append(float(cell))
            except (TypeError, ValueError, OverflowError):
                found.append(math.nan)
            if not math.isfinite(found[-1]):
                where = f"{sources[b]}: " if sources else ""
                raise DataError(
                    f"{where}column {self.costs!r} holds {cell!r}; objective.costs expects a number"
                )
        return np.array(found, dtype=np.float64)[:, None]
