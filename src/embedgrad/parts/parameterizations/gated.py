"""Gated parameterization: a gate for each row opens from zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from embedgrad.model.backbone import Prompt
from embedgrad.parts.parameterizations.base import Parameterization, Theta, row_size


@final
@dataclass(frozen=True)
class Gated(Parameterization):
    """Refine every number of every row behind one gate a row, which starts closed.

    rows = start + s tanh(gate) delta, with gate [P, 1] from zero, delta [P, D] random of unit
    variance, and s the root mean square of each start row. The first step can only open gates, so
    a row that does not help stays as it is.
    Source: the gates of Aurora, https://arxiv.org/abs/2305.08381, and of Flamingo,
    https://arxiv.org/abs/2204.14198, section 2.2.
    """

    def init(self, start: Prompt, generator: torch.Generator) -> Theta:
        theta: Theta = {}
        for name, rows in start.items():
            theta[f"{name} gate"] = torch.zeros_like(rows[..., :1])
            theta[f"{name} delta"] = torch.randn(rows.shape, generator=generator).to(rows)
        return theta

    def prompt(self, theta: Theta, start: Prompt) -> Prompt:
        return {
            name: rows + row_size(rows) * theta[f"{name} gate"].tanh() * theta[f"{name} delta"]
            for name, rows in start.items()
        }
