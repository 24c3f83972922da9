"""Muon: momentum, made orthogonal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, final

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from embedgrad.errors import RecipeError
from embedgrad.parts.optimizers.base import Optimizer


@final
@dataclass(frozen=True)
class Muon(Optimizer):
    """Step in every direction of the momentum equally far: its singular values become about one.

    theta <- theta - 0.2 sqrt(max(P, D)) learning_rate U V^T, with U S V^T = the momentum [P, D]
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, with the step sizes of
    Liu et al. 2025, https://arxiv.org/abs/2502.16982, eq. 4; torch.optim.Muon. Every tensor of
    theta must be a matrix, as one span's rows are.
    """

    learning_rate: Annotated[float, Gt(0), Le(1e30)] = 0.3
    """Step size: a fifth of it is the share of its norm that a row moves in one step."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.95
    """Memory of the gradient's mean."""

    def build(self, theta: Sequence[Tensor]) -> torch.optim.Optimizer:
        other = next((list(tensor.shape) for tensor in theta if tensor.ndim != 2), None)
        if other is not None:
            raise RecipeError(
                "optimizer",
                [f"muon steps matrices, but the parameterization trains {other}; take adamw"],
            )
        return torch.optim.Muon(
            list(theta),
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=0.0,
            adjust_lr_fn="match_rms_adamw",
        )
