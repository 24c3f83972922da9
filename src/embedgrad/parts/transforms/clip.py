"""Gradient clipping by global norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, final

import torch
from annotated_types import Gt

from embedgrad.parts.parameterizations import Theta
from embedgrad.parts.transforms.base import Context, Gradients, Setup, State, Transform


@final
@dataclass(frozen=True)
class Clip(Transform):
    """Shorten a gradient that is longer than `max_norm`, over all trained numbers together.

    g <- g * min(1, max_norm / |g|)
    Source: Pascanu et al. 2013, https://arxiv.org/abs/1211.5063.
    """

    max_norm: Annotated[float, Gt(0)] = 1.0
    """Largest length; theta is measured in row sizes, so one value serves all models."""

    def init(self, theta: Theta, setup: Setup) -> State:
        return {}

    def before(
        self, gradients: Gradients, state: State, context: Context
    ) -> tuple[Gradients, State]:
        norm = torch.stack([g.pow(2).sum() for g in gradients.values()]).sum().sqrt()
        factor = (self.max_norm / norm.clamp(min=1e-12)).clamp(max=1.0)
        return {name: g * factor for name, g in gradients.items()}, state
