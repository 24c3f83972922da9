"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, final

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from embedgrad.parts.optimizers.base import Optimizer


@final
@dataclass(frozen=True)
class SGD(Optimizer):
    """Follow the gradient, with momentum. Source: torch.optim.SGD."""

    learning_rate: Annotated[float, Gt(0), Le(1e30)] = 1.0
    """Step size: theta (in row sizes) moves by this times the gradient."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Share of the last step that is kept."""

    def build(self, theta: Sequence[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(list(theta), lr=self.learning_rate, momentum=self.momentum)
