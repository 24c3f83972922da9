"""Scale and shift: all rows of a span are changed alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from embedgrad.model.backbone import Prompt
from embedgrad.parts.parameterizations.base import Parameterization, Theta, row_size


@final
@dataclass(frozen=True)
class ScaleShift(Parameterization):
    """Scale and shift every row of a span alike, 2 D numbers however many rows there are.

    rows = start (1 + scale) + s shift, with s the root mean square of each start row, and scale
    and shift [1, D] from zero.
    Source: what the released code of Aurora computes as gated query transformation,
    https://arxiv.org/abs/2305.08381; SSF, https://arxiv.org/abs/2210.08823.
    """

    def init(self, start: Prompt, generator: torch.Generator) -> Theta:
        return {
            f"{name} {kind}": torch.zeros_like(rows[..., :1, :])
            for name, rows in start.items()
            for kind in ("scale", "shift")
        }

    def prompt(self, theta: Theta, start: Prompt) -> Prompt:
        return {
            name: rows * (1 + theta[f"{name} scale"]) + row_size(rows) * theta[f"{name} shift"]
            for name, rows in start.items()
        }
