"""Low-rank parameterization: the rows move in a subspace that is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

import torch
from annotated_types import Ge, Le

from embedgrad.model.backbone import Prompt
from embedgrad.parts.parameterizations.base import Parameterization, Theta, row_size


@final
@dataclass(frozen=True)
class LowRank(Parameterization):
    """Refine rows by a product of two thin matrices, R (P + D) numbers instead of P D.

    rows = start + s A B, with A [P, R] random, B [R, D] from zero, and s the root mean square of
    each start row. A rank of at least min(P, D) can reach any rows.
    Source: the low-rank factors of LoRA, https://arxiv.org/abs/2106.09685, on the prompt's rows;
    one slice of the CP form of Aurora, https://arxiv.org/abs/2305.08381.
    """

    rank: Annotated[int, Ge(1), Le(4096)] = 4
    """The rank R of the change of all rows of a span."""

    def init(self, start: Prompt, generator: torch.Generator) -> Theta:
        theta: Theta = {}
        for name, rows in start.items():
            left = torch.randn((*rows.shape[:-1], self.rank), generator=generator)
            theta[f"{name} left"] = left.to(rows) / self.rank**0.5
            theta[f"{name} right"] = rows.new_zeros(*rows.shape[:-2], self.rank, rows.shape[-1])
        return theta

    def prompt(self, theta: Theta, start: Prompt) -> Prompt:
        return {
            name: rows + row_size(rows) * (theta[f"{name} left"] @ theta[f"{name} right"])
            for name, rows in start.items()
        }
