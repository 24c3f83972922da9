"""Fair objective: an ordered weighted average (OWA) of group losses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Annotated, Literal, final

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from embedgrad.data.examples import Example, cell_text
from embedgrad.errors import DataError, nearest
from embedgrad.model.outcome import Outcome
from embedgrad.parts.objectives.base import Objective, State
from embedgrad.parts.objectives.cross_entropy import CrossEntropy
from embedgrad.prompt.sequence import TokenSequence

SAMPLE = 16  # rows of each group for the text prompt's loss


@final
@dataclass(frozen=True)
class OWA(Objective):
    """Make the worse-off groups better: the larger a group's loss, the larger its weight.

    loss = max_p p . L - smoothing / 2 |p|^2,  p in the permutahedron of `weights`
    where L_g is the mean cross-entropy of the examples of group g, and the permutahedron is all
    averages of the weights' orders. Without smoothing that is w_1 times the largest L_g, plus w_2
    times the second, and so on; with much of it the mean over groups. The maximum is where p is the
    projection of L / smoothing on the permutahedron, found by isotonic regression in O(n log n),
    and p is the gradient in L (Danskin), so that no group jumps to another weight from one step
    to the next. Its derivative in L is left out, which second derivatives would need.

    p is of running estimates of the groups' losses, as a batch has few examples of each group. A
    group that is missing from a batch keeps its estimate; before it is seen it has the mean of the
    others. Every batch is balanced: small groups come back earlier than large ones.

    dual_rate > 0 is the dual form, the game min over theta, max over p. Instead of jumping to its
    maximum, p starts equal and takes one projected step up for each step of training,
        p <- projection of p + dual_rate (L - smoothing p) on the permutahedron,
    so that noisy batches cannot throw it about; dual_rate = 1 / smoothing is the form above. Plain
    steps may circle around the saddle point: optimizer extrapolated is for that, and with
    direction = "past" and scale = 1 the two are the method of Chambolle and Pock.

    It helps where a group is worse than it needs to be because others outweigh it. It does not
    where the worst group is only the hardest: then compare excess losses. Rows are still chosen on
    dev by training.metric over all dev rows.
    Source: OWA in learning, Dinh et al. 2024, https://arxiv.org/abs/2402.07772; the smoothed
    gradient as a projection: Do and Usunier 2022, https://arxiv.org/abs/2204.06521; the steps of
    the game: Chambolle and Pock 2011, https://doi.org/10.1007/s10851-010-0251-1, algorithm 1.
    """

    group: str
    """The column that names each row's group."""
    weights: Literal["mean", "worst", "cvar", "gini"] | tuple[float, ...] = "gini"
    """Weights of the groups, from the largest loss to the smallest: mean (equal), worst (the worst
    group alone), cvar (equal for a share of the groups), gini (in steps, as 7, 5, 3, 1), or a
    list of numbers that do not rise and sum to 1."""
    share: Annotated[float, Gt(0), Le(1)] | None = None
    """With cvar: the share of groups that count."""
    smoothing: Annotated[float, Ge(0)] = 0.05
    """In nats: two groups share their weights in part where their losses differ by less than this
    times the difference of the weights; 0: only where they are equal."""
    memory: Annotated[float, Ge(0), Lt(1)] | None = None
    """How much of a group's estimate a step keeps; 0: the batch alone decides, but for groups that
    are missing from it. Unset: 0.9, or 0 in the dual form, where p remembers."""
    dual_rate: Annotated[float, Ge(0)] = 0.0
    """Step size of the groups' weights in the dual form, per nat; 0: they have no step of their
    own."""
    excess: bool = False
    """Compare groups by how much more their loss is than the text prompt's, on 16 rows of each."""
    balanced: bool = True
    """Whether every batch holds equally many examples of each group."""
    over: Literal["auto", "answer", "choices", "both"] = "auto"
    """What the cross-entropy is over, as with cross_entropy."""

    def __post_init__(self) -> None:
        if (self.weights == "cvar") != (self.share is not None):
            raise DataError("objective.share: is for weights = 'cvar', which needs it; give both")
        if isinstance(self.weights, str):
            return
        listed, problem = list(self.weights), ""
        if not listed or min(listed) < 0:
            problem = "expected numbers of at least 0"
        elif abs(sum(listed) - 1) > 1e-6:
            problem = f"they sum to {sum(listed):.6g}; expected 1"
        elif any(later > earlier for earlier, later in pairwise(listed)):
            problem = "they rise, which favors groups that are well off; list the largest first"
        if problem:
            raise DataError(f"objective.weights: {listed}; {problem}")

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.group,)

    @property
    def group_column(self) -> str:
        return self.group

    @property
    def balance_by(self) -> str | None:
        return self.group if self.balanced else None

    @property
    def needs_end(self) -> bool:
        return self._loss.needs_end

    @property
    def _loss(self) -> CrossEntropy:
        return CrossEntropy(self.over)

    def needs_choices(self, *, available: bool) -> bool:
        return self._loss.needs_choices(available=available)

    def check(
        self, train: Sequence[Example], dev: Sequence[Example], test: Sequence[Example] = ()
    ) -> None:
        known = Counter(example.group_in(self.group) for example in train)
        if len(known) < 2:
            raise DataError(
                f"objective.group: all {len(train)} training rows have {next(iter(known))!r} in "
                f"column {self.group!r}; name a column with two groups or more, or use "
                "cross_entropy"
            )
        if not isinstance(self.weights, str) and len(self.weights) != len(known):
            raise DataError(
                f"objective.weights: {len(self.weights)} numbers, but column {self.group!r} has "
                f"{len(known)} groups in the training rows ({', '.join(sorted(known))}); give one "
                "for each"
            )
        for example in dev:
            if (name := example.group_in(self.group)) not in known:
                raise DataError(
                    f"{example.source}: group {name!r} in column {self.group!r} is in no training "
                    f"row; {nearest(name, known)}"
                )

    def init(
        self,
        train: Sequence[TokenSequence],
        losses: Callable[[Sequence[TokenSequence]], Tensor],
        steps: int,
    ) -> State:
        members: dict[str, list[TokenSequence]] = {}
        for sequence in train:
            members.setdefault(sequence.example.group_in(self.group), []).append(sequence)
        state = {}
        for name, sequences in members.items():
            some = sequences[:: -(-len(sequences) // SAMPLE)]
            text = losses(some).double().mean().item() if self.excess else 0.0
            share = [1 / len(members)] if self.dual_rate else []
            state[name] = torch.tensor([torch.nan, text, *share], dtype=torch.float64)
        return state

    def losses(self, outcome: Outcome) -> Tensor:
        return self._loss.losses(outcome)

    def reduce(self, losses_B: Tensor, outcome: Outcome) -> Tensor:
        return self.reduce_with({}, losses_B, outcome)

    def reduce_with(self, state: State, losses_B: Tensor, outcome: Outcome) -> Tensor:
        means = self._means(losses_B, outcome)
        compared, shares = self._compare(state, self._estimates(state, means))
        total = losses_B.new_tensor(-self.smoothing / 2 * sum(p * p for p in shares.values()))
        for name, p in shares.items():
            text = state[name][1].item() if name in state else 0.0
            total = total + p * (means[name] - text if name in means else compared[name])
        return total

    def update(self, state: State, losses_B: Tensor, outcome: Outcome) -> State:
        new = dict(state)
        estimates = self._estimates(state, self._means(losses_B, outcome))
        _, shares = self._compare(state, estimates)
        for name, loss in estimates.items():
            text = state[name][1].item() if name in state else 0.0
            share = [shares[name]] if self.dual_rate else []
            held = torch.nan if loss is None else loss
            new[name] = torch.tensor([held, text, *share], dtype=torch.float64)
        return new

    def _compare(
        self, state: State, estimates: Mapping[str, float | None]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """The losses by which groups are compared, and the groups' weights p."""
        typical = fmean(loss for loss in estimates.values() if loss is not None)
        compared = [typical if loss is None else loss for loss in estimates.values()]
        weights, scale = self.weights_of(len(compared)), self.smoothing
        point = compared
        if rate := self.dual_rate:
            old = [state[n][2].item() if n in state else 1 / len(compared) for n in estimates]
            moves = zip(old, compared, strict=True)
            point, scale = [p + rate * (loss - self.smoothing * p) for p, loss in moves], 1.0
        shares = project(point, weights, scale)
        return (
            dict(zip(estimates, compared, strict=True)),
            dict(zip(estimates, shares, strict=True)),
        )

    def _means(self, losses_B: Tensor, outcome: Outcome) -> dict[str, Tensor]:
        """The mean loss of each group in the batch."""
        members: dict[str, list[int]] = {}
        for b, cell in enumerate(outcome.extra.get(self.group, [None] * len(losses_B))):
            if (name := cell_text(cell)) is None:
                raise DataError(
                    f"objective.group: no group in Example.extra[{self.group!r}]; every example "
                    "needs one"
                )
            members.setdefault(name, []).append(b)
        return {name: losses_B[places].mean() for name, places in members.items()}

    def _estimates(self, state: State, means: Mapping[str, Tensor]) -> dict[str, float | None]:
        """Each group's running loss, or excess loss, with this batch; None: never seen."""
        memory = self.memory
        if memory is None:
            memory = 0.0 if self.dual_rate else 0.9
        estimates: dict[str, float | None] = {}
        for name in dict.fromkeys((*state, *means)):
            before, text, *_ = state[name].tolist() if name in state else (torch.nan, 0.0)
            estimates[name] = None if math.isnan(before) else before
            if name in means:
                now = means[name].item() - text
                past = now if math.isnan(before) else before
                estimates[name] = now + memory * (past - now)
        return estimates

    def weights_of(self, groups: int) -> list[float]:
        """Weights for this number of groups, from the largest loss to the smallest."""
        match self.weights:
            case "mean":
                raw = [1.0] * groups
            case "worst":
                raw = [1.0] + [0.0] * (groups - 1)
            case "cvar":
                count = (self.share or 1.0) * groups
                raw = [min(max(count - i, 0.0), 1.0) for i in range(groups)]
            case "gini":
                raw = [2.0 * (groups - i) - 1 for i in range(groups)]
            case tuple() as listed:  # a batch that is alone may have fewer groups
                raw = [*listed, *[0.0] * groups][:groups]
        return [weight / sum(raw) for weight in raw]


def project(losses: Sequence[float], weights: Sequence[float], smoothing: float) -> list[float]:
    """The projection of losses / smoothing on the permutahedron of weights that do not rise.

    With s the sorted losses it is (s - v) / smoothing, v the nearest to s - smoothing * weights
    that does not rise (isotonic regression by pooling adjacent violators); for smoothing 0 its
    limit, where equal losses share their weights. Source: Do and Usunier 2022.
    """
    order = sorted(range(len(losses)), key=lambda i: -losses[i])
    blocks: list[tuple[float, int]] = []  # means of pooled values, and how many
    for i, weight in zip(order, weights, strict=True):
        mean, count = losses[i] - smoothing * weight, 1
        while blocks and blocks[-1][0] <= mean:
            above, more = blocks.pop()
            mean, count = above + (mean - above) * count / (count + more), count + more
        blocks.append((mean, count))
    found, first = [0.0] * len(losses), 0
    for _, count in blocks:
        block = order[first : first + count]
        loss = fmean(losses[i] for i in block)
        weight = fmean(weights[first : first + count])
        for i in block:
            found[i] = weight + ((losses[i] - loss) / smoothing if smoothing else 0.0)
        first += count
    return found
