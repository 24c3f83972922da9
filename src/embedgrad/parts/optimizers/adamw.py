"""AdamW."""

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
class AdamW(Optimizer):
    """Adam with decoupled weight decay; with free rows the decay pulls back to the text prompt.

    Source: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101; torch.optim.AdamW.
    """

    learning_rate: Annotated[float, Gt(0), Le(1e30)] = 0.1
    """Step size in row sizes: the share of its norm that a row moves at most in one step."""
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Memory of the gradient's mean."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    """Memory of the gradient's square."""
    weight_decay: Annotated[float, Ge(0)] = 0.0
    """Share of theta taken off per step, times the step size."""

    def build(self, theta: Sequence[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            list(theta),
            lr=self.learning_rate,
            betas=(self.beta1, self.beta2),
            weight_decay=self.weight_decay,
        )
