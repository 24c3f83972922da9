"""Free parameterization: every number of every row is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from embedgrad.model.backbone import Backbone, Prompt
from embedgrad.model.language_model import LanguageModel
from embedgrad.parts.parameterizations.base import Parameterization, Theta, row_size
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.trust_region import TrustRegion


@final
@dataclass(frozen=True)
class Free(Parameterization):
    """Refine every number of every row.

    rows = start + s * theta, with s the root mean square of each start row, theta from zero. So a
    step of size r in theta moves a row by at most r of its own norm in every model.
    Source: EmbedGrad, https://arxiv.org/abs/2508.03533, which moves the rows themselves; the scale
    is ours, so that one step size serves all models.
    """

    deep: bool = False
    """Rows for every layer of the model, and not only where the words are embedded; the trust
    region is around all rows of a token together. No other engine takes such a prompt."""

    def init(self, start: Prompt, generator: torch.Generator) -> Theta:
        return {name: torch.zeros_like(rows) for name, rows in start.items()}

    def prompt(self, theta: Theta, start: Prompt) -> Prompt:
        return {name: rows + row_size(rows) * theta[name] for name, rows in start.items()}

    def reach(self, prompt: Prompt, start: Prompt) -> Theta:
        return {name: _change(rows, start[name]) for name, rows in prompt.items()}

    def fit(self, theta: Theta, origin: Theta, start: Prompt, region: TrustRegion) -> Theta:
        fitted: Theta = {}
        for name, rows in self.prompt(theta, start).items():
            first = start[name]
            inside = region.project(rows.flatten(0, -2), first.flatten(0, -2)).view_as(rows)
            moved = not torch.equal(inside, rows)
            fitted[name] = _change(inside, first) if moved else theta[name]
        return fitted


def is_deep(parameterization: Parameterization) -> bool:
    """Whether it has rows for every layer."""
    return isinstance(parameterization, Free) and parameterization.deep


def text_rows(model: Backbone, ids: Ids, parameterization: Parameterization) -> Tensor:
    """The rows of a prompt's own words [P, D], or [P, L D] with rows for every layer."""
    rows_PD = model.embed(ids)
    if isinstance(model, LanguageModel) and is_deep(parameterization):
        return model.forward.widen(rows_PD)
    return rows_PD


def _change(rows: Tensor, start: Tensor) -> Tensor:
    return (rows - start) / row_size(start).clamp(min=1e-12)
