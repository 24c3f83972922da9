"""Weighted training: weights of rows, of sources and of the text to tune.

    g(x) = 1/n sum_i w_i l_i(x) + anchor / 2 sum_p |e_p - e0_p|^2 / |e0_p|^2
    f(x) = the objective of the dev rows

x is the theta of the prompt as one vector, e_p its rows, e0_p the text's. The anchor stands in for
the trust region: a quadratic price of leaving it, which gives g the curvature that a minimum needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from embedgrad.errors import DivergenceError, ModelError
from embedgrad.events import Report, quiet, scoring
from embedgrad.model.outcome import Outcome
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
        places = [self.sources.index(name) for name in sources or ()]
        self.source_of = torch.tensor(places, dtype=torch.long, device=self.start_x.device)
        count = min(curvature_rows or len(train), len(train))
        self.curved = [i * len(train) // count for i in range(count)]  # evenly over the rows

    def hyper(self, *names: str) -> Hyper:
        """The start of what is to be tuned: the training as it is."""
        sizes = {"examples": (len(self.train),), "sources": (len(self.sources),), "anchor": ()}
        return {name: self.start_x.new_zeros(sizes[name]) for name in names}

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

    def inner(self, x: Tensor, hyper: Hyper) -> tuple[float, Tensor]:
        """g and its gradient, by one pass over the training rows. Raises `DivergenceError`."""
        weights, n = self.weights(hyper), len(self.train)
        leaf = x.detach().clone().requires_grad_(True)
        value = self.price(hyper) * self.drift(leaf)
        (total,) = torch.autograd.grad(value, leaf)
        worth = value.item()
        for rows in self._batches(range(n)):
            losses_B = self.loss(self.theta(leaf), [self.train[i] for i in rows])
            share = (weights[rows] * losses_B).sum() / n
            total = total + torch.autograd.grad(share, leaf)[0]
            worth += share.item()
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
        weights = self.weights(hyper)
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
            losses_B = self.loss(self.theta(leaf), [self.train[i] for i in rows])
            total = total + twice((weights[rows] * losses_B).sum() / len(self.curved))
        return total

    def mixed(self, x: Tensor, hyper: Hyper, q: Tensor) -> Hyper:
        """B^T q by two passes without gradients: d/dt of dg/dhyper at x + t q, as a difference.

        So the product of every row's gradient with q costs no backward pass.
        """
        t = self.reach(x, q)
        above, below = (self._in_hyper(self.losses(x + s * q), x + s * q, hyper) for s in (t, -t))
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

    def _in_hyper(self, losses_N: Tensor, x: Tensor, hyper: Hyper) -> Hyper:
        """dg/dhyper, which needs losses alone."""
        leaves = {
            name: value.detach().clone().requires_grad_(True) for name, value in hyper.items()
        }
        with torch.no_grad():
            drift = self.drift(x)
        value = (self.weights(leaves) * losses_N).mean() + self.price(leaves) * drift
        found = torch.autograd.grad(value, list(leaves.values()))
        return dict(zip(leaves, found, strict=True))

    def losses(self, x: Tensor) -> Tensor:
        """The loss of every training row, shape [n], without a graph."""
        return self.outcome(x)[0]

    @torch.no_grad()
    def outcome(self, x: Tensor) -> tuple[Tensor, Outcome]:
        """The losses of the training rows, and what the model says of them."""
        theta, losses, outcomes = self.theta(x), list[Tensor](), list[Outcome]()
        for rows in self._batches(range(len(self.train))):
            outcome = self.loss.outcome(theta, [self.train[i] for i in rows])
            losses.append(self.loss.parts.objective.losses(outcome))
            outcomes.append(outcome)
            self.report(scoring("training rows", rows[-1] + 1, len(self.train)))
        return torch.cat(losses), join_outcomes(outcomes)

    def _batches(self, rows: Sequence[int]) -> list[list[int]]:
        size = self.batch_size
        return [list(rows[i : i + size]) for i in range(0, len(rows), size)]
