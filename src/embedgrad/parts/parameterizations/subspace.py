"""Shared subspace: few numbers a row, one scale and shift for all."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, final

import torch
from annotated_types import Ge, Le
from torch import Tensor

from embedgrad.model.backbone import Prompt
from embedgrad.parts.parameterizations.base import Parameterization, Theta, row_size


@final
@dataclass(frozen=True)
class Subspace(Parameterization):
    """Refine rows within one random subspace, R P + 2 D numbers.

    rows = start + s ((Z M) scale + shift), with Z [P, R] from zero trained, M [R, D] random and
    frozen, drawn from `seed`, scale and shift [1, D] trained and shared by all rows, and s the root
    mean square of each start row. Rows share what they learn, which helps with few examples.
    Source: ULPT, https://arxiv.org/abs/2502.04501, on the change of the rows.
    """

    rank: Annotated[int, Ge(1), Le(4096)] = 16
    """The number R of trained numbers a row."""
    seed: Annotated[int, Ge(0)] = 0
    """What the frozen subspace is drawn from."""

    def init(self, start: Prompt, generator: torch.Generator) -> Theta:
        theta: Theta = {}
        for name, rows in start.items():
            theta[f"{name} codes"] = rows.new_zeros(*rows.shape[:-1], self.rank)
            theta[f"{name} scale"] = torch.ones_like(rows[..., :1, :])
            theta[f"{name} shift"] = torch.zeros_like(rows[..., :1, :])
        return theta

    def prompt(self, theta: Theta, start: Prompt) -> Prompt:
        return {
            name: rows + row_size(rows) * self._change(name, theta) for name, rows in start.items()
        }

    def _change(self, name: str, theta: Theta) -> Tensor:
        codes, scale, shift = (theta[f"{name} {kind}"] for kind in ("codes", "scale", "shift"))
        frozen = _draw(self.seed, self.rank, scale.shape[-1]).to(codes)
        change: Tensor = codes @ frozen / self.rank**0.5 * scale + shift
        return change


@functools.lru_cache(maxsize=4)
def _draw(seed: int, rank: int, width: int) -> Tensor:
    """The frozen subspace, [R, D], which every step asks for several times."""
    return torch.randn((rank, width), generator=torch.Generator().manual_seed(seed))
