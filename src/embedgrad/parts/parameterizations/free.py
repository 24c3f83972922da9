"""Every number of every row is free."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embedgrad.parts.parameterizations.base import Parameterization, Theta


@dataclass(frozen=True)
class Free(Parameterization):
    """Refine every number of every row.

    rows = start + s * theta, with s the root mean square of each start row, theta from zero. So a
    step of size r in theta moves a row by at most r of its own norm, whatever the model's scale.
    Source: EmbedGrad, https://arxiv.org/abs/2508.03533, which moves the rows themselves; the scale
    is ours, so that one step size serves all models.
    """

    def init(self, start_PD: Tensor, generator: torch.Generator) -> Theta:
        return {"change": torch.zeros_like(start_PD)}

    def rows(self, theta: Theta, start_PD: Tensor) -> Tensor:
        return start_PD + _size(start_PD) * theta["change"]

    def fit(self, theta: Theta, rows_PD: Tensor, start_PD: Tensor) -> Theta:
        return {"change": (rows_PD - start_PD) / _size(start_PD).clamp(min=1e-12)}


def _size(start_PD: Tensor) -> Tensor:
    return start_PD.pow(2).mean(dim=1, keepdim=True).sqrt()
