"""Weighted training: weights of rows, of sources and of the text to tune.

    g(x) = R(w_1 l_1(x), ..., w_n l_n(x)) + anchor / 2 sum_p |e_p - e0_p|^2 / |e0_p|^2
    f(x) = the objective of the dev rows

R is the mean, or with the objective owa the ordered weighted average of the groups' means.

x is the theta of the prompt as one vector, e_p its rows, e0_p the text's. The anchor stands in for
the trust region: a quadratic price of leaving it, which gives g the curvature that a minimum needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from embedgrad.errors import DivergenceError, ModelError, RecipeError
from embedgrad.events import Report, quiet, scoring
from embedgrad.model.outcome import Outcome
from embedgrad.parts.objectives import OWA, CrossEntropy
from embedgrad.parts.objectives.owa import project
from embedgrad.parts.parameterizations import Theta, all_rows
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.training.hypergradient import Bilevel, Hyper
from embedgrad.training.loss import Loss, join_outcomes

REACH = {torch.float32: 1e-3, torch.float64: 1e-5}
"""How far a row moves, in norms of its start, for a difference of losses."""


@final
class WeightedTraining(Bilevel):
    """What may be tuned, by its name in `hyper`:

        examples [n]   w_i = 2 sigmoid(lambda_i): 1 at the start, from 0 to 2
        sources [S]    the same for all rows of a source, which `sources` names row by row
        anchor []      the logarithm of a factor of the anchor
        mix []         l_i = 2 sigmoid(lambda) of the loss over the choices and 2 sigmoid(-lambda)
                       of that over the answer, for cross_entropy over both
        smoothing []   the logarithm of a factor of the smoothing, for owa

    Products of A take `curvature_rows` of the training rows, the same each time (None: all).
    """

    def __init__(
        self,
        loss: Loss,
        origin: Theta,
        train: Sequence[TokenSequence],
        dev: Sequence[TokenSequence],
        *,
        anchor: float,
        sources: Sequence[str] | None = None,
        curvature_rows: int | None = None,
        batch_size: int = 16,
        report: Report = quiet,
    ):
        self.loss, self.train, self.dev, self.anchor = loss, train, dev, anchor
        self.origin, self.batch_size, self.report = origin, batch_size, report
        self.start_x = torch.cat([value.flatten() for value in origin.values()])
        self.sources = list(dict.fromkeys(sources or ()))
        self.source_of = self._number(sources or ())
        objective = loss.parts.objective
        self.fair = objective if isinstance(objective, OWA) else None
        groups = [s.example.group_in(self.fair.group) for s in train] if self.fair else []
        self.group_of = self._number(groups)
        count = min(curvature_rows or len(train), len(train))
        self.curved = [i * len(train) // count for i in range(count)]  # evenly over the rows

    def _number(self, names: Sequence[str]) -> Tensor:
        """Each name's place among the different ones."""
        places = {name: i for i, name in enumerate(dict.fromkeys(names))}
        numbers = [places[name] for name in names]
        return torch.tensor(numbers, dtype=torch.long, device=self.start_x.device)

    def hyper(self, *names: str) -> Hyper:
        """The start of what is to be tuned: the training as it is.

        Raises `RecipeError` for what the objective does not have.
        """
        x = self.start_x
        if "mix" in names and len(self._terms(self._outcome(x, [0]))) < 2:
            raise RecipeError("objective", ["'mix' is for cross_entropy over both; set it"])
        if "smoothing" in names and not (self.fair and self.fair.smoothing):
            raise RecipeError("objective", ["'smoothing' is for owa with some; set both"])
        sizes = {"examples": (len(self.train),), "sources": (len(self.sources),)}
        return {name: x.new_zeros(sizes.get(name, ())) for name in names}

    def theta(self, x: Tensor) -> Theta:
        """The vector as named tensors."""
        parts = torch.split(x, [value.numel() for value in self.origin.values()])
        named = zip(self.origin.items(), parts, strict=True)
        return {name: part.view_as(value) for (name, value), part in named}

    def drift(self, x: Tensor) -> Tensor:
        """The sum of the rows' squared distances from the text's, in norms of these."""
        prompt = self.loss.parts.parameterization.prompt(self.theta(x), self.loss.start)
        start_PD = all_rows(self.loss.start)
        size_P = start_PD.square().sum(1).clamp(min=1e-12)
        drift: Tensor = ((all_rows(prompt) - start_PD).square().sum(1) / size_P).sum()
        return drift

    def weights(self, hyper: Hyper) -> Tensor:
        """The weight of every training row, shape [n]."""
        weights = self.start_x.new_ones(len(self.train))
        if "examples" in hyper:
            weights = weights * 2 * torch.sigmoid(hyper["examples"])
        if "sources" in hyper:
            weights = weights * 2 * torch.sigmoid(hyper["sources"])[self.source_of]
        return weights

    def price(self, hyper: Hyper) -> Tensor:
        """The weight of the squared drift."""
        half = self.start_x.new_tensor(self.anchor / 2)
        return half * hyper["anchor"].exp() if "anchor" in hyper else half

    def reduce(self, losses_N: Tensor, hyper: Hyper) -> Tensor:
        """R, differentiable in the losses and in `hyper`."""
        weighted_N = self.weights(hyper) * losses_N
        if self.fair is None:
            return weighted_N.mean()
        if self.fair.excess:
            weighted_N = weighted_N - self.text_N
        counts_G = torch.bincount(self.group_of)
        means_G = losses_N.new_zeros(len(counts_G)).index_add(0, self.group_of, weighted_N)
        means_G, weights = means_G / counts_G, self.fair.weights_of(len(counts_G))
        smoothing = self.fair.smoothing * hyper.get("smoothing", losses_N.new_zeros(())).exp()
        shares = project(means_G.tolist(), weights, smoothing.item())
        shares_G = losses_N.new_tensor(shares)
        return shares_G @ means_G - smoothing / 2 * (shares_G @ shares_G)

    def shares(self, x: Tensor, hyper: Hyper) -> Tensor:
        """The derivative of R in every row's loss, shape [n]; the same for all x if R is a mean."""
        losses_N = _mix(self._all_terms(x), hyper) if self.fair else x.new_zeros(len(self.train))
        leaf = losses_N.requires_grad_(True)
        (shares_N,) = torch.autograd.grad(self.reduce(leaf, hyper), leaf)
        return shares_N

    def inner(self, x: Tensor, hyper: Hyper) -> tuple[float, Tensor]:
        """g and its gradient, by a pass over the training rows. Raises `DivergenceError`."""
        shares_N, losses = self.shares(x, hyper), list[Tensor]()
        leaf = x.detach().clone().requires_grad_(True)
        value = self.price(hyper) * self.drift(leaf)
        (total,) = torch.autograd.grad(value, leaf)
        for rows in self._batches(range(len(self.train))):
            losses_B = self._losses(leaf, rows, hyper)
            total = total + torch.autograd.grad((shares_N[rows] * losses_B).sum(), leaf)[0]
            losses.append(losses_B.detach())
        worth = (value.detach() + self.reduce(torch.cat(losses), hyper)).item()
        if not (math.isfinite(worth) and bool(torch.isfinite(total).all())):
            raise DivergenceError("the loss of the weighted rows is not finite; see model.dtype")
        return worth, total

    def outer(self, x: Tensor) -> tuple[float, Tensor]:
        """The objective of the dev rows, and its gradient."""
        parts = math.ceil(len(self.dev) / self.batch_size)
        leaves = self.theta(x.detach().clone()).items()
        theta = {name: value.requires_grad_(True) for name, value in leaves}
        found = self.loss.gradient(theta, self.dev, parts)
        return found.loss, torch.cat([found.gradients[name].flatten() for name in theta])

    def product(self, x: Tensor, hyper: Hyper, v: Tensor) -> Tensor:
        """A v, differentiated twice. Raises `ModelError` for a model that allows it once."""
        scale = len(self.train) / len(self.curved)
        shares_N, change_N = scale * self.shares(x, hyper), None
        if self.fair:
            t = self.reach(x, v)
            ends = [self.shares(x + s * v, hyper) for s in (t, -t)]
            change_N = scale * (ends[0] - ends[1]) / (2 * t)
        leaf = x.detach().clone().requires_grad_(True)

        def twice(value: Tensor) -> Tensor:
            try:
                (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
                return torch.autograd.grad(gradient @ v, leaf, materialize_grads=True)[0]
            except RuntimeError as error:
                if "not implemented" not in str(error):
                    raise
                raise ModelError(
                    "the model's attention can be differentiated only once; set model.attention = "
                    "'eager'"
                ) from error

        total = twice(self.price(hyper) * self.drift(leaf))
        for rows in self._batches(self.curved):
            losses_B = self._losses(leaf, rows, hyper)
            if change_N is not None:
                change = (change_N[rows] * losses_B).sum()
                total = total + torch.autograd.grad(change, leaf, retain_graph=True)[0]
            total = total + twice((shares_N[rows] * losses_B).sum())
        return total

    def mixed_product(self, x: Tensor, hyper: Hyper, q: Tensor) -> Hyper:
        """B^T q by two passes without gradients: d/dt of dg/dhyper at x + t q, as a difference.

        So the product of every row's gradient with q costs no backward pass.
        """
        t = self.reach(x, q)
        above, below = (self._in_hyper(x + s * q, hyper) for s in (t, -t))
        return {name: (above[name] - below[name]) / (2 * t) for name in hyper}

    def reach(self, x: Tensor, q: Tensor) -> float:
        """The t at which x + t q moves the farthest row by `REACH`, in norms of its start."""
        prompt = self.loss.parts.parameterization.prompt
        start_PD, size = all_rows(self.loss.start), q.norm().clamp(min=1e-30)
        unit = 1e-3 * q / size
        moved_PD = all_rows(prompt(self.theta(x + unit), self.loss.start)) - all_rows(
            prompt(self.theta(x), self.loss.start)
        )
        far = (moved_PD.norm(dim=1) / start_PD.norm(dim=1).clamp(min=1e-12)).max().item()
        return float(REACH.get(x.dtype, 1e-3) * 1e-3 / (max(far, 1e-30) * size.item()))

    def _in_hyper(self, x: Tensor, hyper: Hyper) -> Hyper:
        """dg/dhyper, which needs losses alone."""
        leaves = {
            name: value.detach().clone().requires_grad_(True) for name, value in hyper.items()
        }
        with torch.no_grad():
            drift = self.drift(x)
        terms_KN = self._all_terms(x)
        value = self.reduce(_mix(terms_KN, leaves), leaves) + self.price(leaves) * drift
        found = torch.autograd.grad(value, list(leaves.values()))
        return dict(zip(leaves, found, strict=True))

    def _outcome(self, x: Tensor, rows: Sequence[int]) -> Outcome:
        """What the model says of some training rows."""
        return self.loss.outcome(self.theta(x), [self.train[i] for i in rows])

    def _terms(self, outcome: Outcome) -> Tensor:
        """Each kind of loss of some rows, shape [K, B]."""
        objective = self.loss.parts.objective
        if isinstance(objective, CrossEntropy):
            return torch.stack([*objective.terms(outcome).values()])
        return objective.losses(outcome)[None]

    def _losses(self, x: Tensor, rows: Sequence[int], hyper: Hyper) -> Tensor:
        return _mix(self._terms(self._outcome(x, rows)), hyper)

    @torch.no_grad()
    def _all_outcomes(self, x: Tensor) -> Iterator[Outcome]:
        """What the model says of all training rows, without a graph."""
        for rows in self._batches(range(len(self.train))):
            yield self._outcome(x, rows)
            self.report(scoring("training rows", rows[-1] + 1, len(self.train)))

    def _all_terms(self, x: Tensor) -> Tensor:
        """Each kind of loss of every training row, shape [K, n], without a graph."""
        return torch.cat([self._terms(outcome) for outcome in self._all_outcomes(x)], 1)

    @cached_property
    def text_N(self) -> Tensor:
        """The loss of every training row with the text prompt, shape [n]."""
        return self._all_terms(self.start_x).sum(0)

    def outcome(self, x: Tensor) -> tuple[Tensor, Outcome]:
        """The losses of the training rows, and what the model says of them."""
        outcomes = list(self._all_outcomes(x))
        losses = [self.loss.parts.objective.losses(outcome) for outcome in outcomes]
        return torch.cat(losses), join_outcomes(outcomes)

    def _batches(self, rows: Sequence[int]) -> list[list[int]]:
        size = self.batch_size
        return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


def _mix(terms_KB: Tensor, hyper: Hyper) -> Tensor:
    """The loss of each row from its kinds of loss."""
    if "mix" not in hyper:
        return terms_KB.sum(0)
    return 2 * torch.sigmoid(hyper["mix"] * terms_KB.new_tensor([1.0, -1.0])) @ terms_KB
