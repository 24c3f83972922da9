"""The prompt as rows of an embedding table: where it starts, where it is, how far it may go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor


@dataclass(frozen=True)
class TrustRegion:
    """How far a row may move from where its token put it.

    Every row stays within `radius` times its start row's norm, and optionally within an angle.
    Since a row at relative distance r has a cosine of at least sqrt(1 - r^2) to its start, a radius
    of 0.3 keeps every cosine above 0.95.
    """

    radius: Annotated[float, Gt(0)] | None = 0.3
    """Largest distance from the start row, in norms of the start row; none: unbounded."""
    min_cosine: Annotated[float, Ge(0), Le(1)] | None = None
    """Smallest cosine to the start row, from 0 to 1; none: unbounded."""

    def project(self, rows_PD: Tensor, start_PD: Tensor) -> Tensor:
        """The rows, moved into the region; rows inside it are returned as they are."""
        if self.min_cosine is not None:
            rows_PD = _into_cone(rows_PD, start_PD, self.min_cosine)
        if self.radius is not None:
            # After the cone: going straight back to the axis of a cone never leaves it.
            step = rows_PD - start_PD
            # A hair inside, so that rounding cannot put a row outside.
            most = self.radius * (1 - 1e-6) * start_PD.norm(dim=1, keepdim=True)
            length = step.norm(dim=1, keepdim=True)
            rows_PD = torch.where(length > most, start_PD + step * (most / length), rows_PD)
        return rows_PD

    def holds(self, rows_PD: Tensor, start_PD: Tensor) -> bool:
        """Whether every row is inside, up to rounding."""
        drift, cosine = drift_P(rows_PD, start_PD), cosine_P(rows_PD, start_PD)
        # Rounding moves an fp32 row by up to 1e-7 of its norm, whatever the radius.
        near = self.radius is None or bool((drift <= self.radius * (1 + 1e-5) + 1e-6).all())
        # A row of zeros has no direction to keep.
        free = (start_PD == 0).all(dim=1)
        aligned = self.min_cosine is None or bool((free | (cosine >= self.min_cosine - 1e-5)).all())
        return near and aligned


def drift_P(rows_PD: Tensor, start_PD: Tensor) -> Tensor:
    """Distance of each row from its start row, in norms of the start row."""
    distance: Tensor = (rows_PD - start_PD).norm(dim=1)
    size: Tensor = start_PD.norm(dim=1).clamp(min=1e-12)
    return distance / size


def cosine_P(rows_PD: Tensor, start_PD: Tensor) -> Tensor:
    """Cosine of each row to its start row."""
    return torch.cosine_similarity(rows_PD, start_PD, dim=1)


def store_compact(rows_PD: Tensor) -> Tensor:
    """Start rows in 16 bits a number, where rounding moves them little: the model has them too."""
    if torch.equal(rows_PD.bfloat16().float(), rows_PD):
        return rows_PD.bfloat16()
    half = rows_PD.half()
    return half if near(half.float(), rows_PD, 1e-3) else rows_PD


def near(rows_PD: Tensor, others_PD: Tensor, share: float) -> bool:
    """Whether rows are equal up to a share of their numbers, and of their root mean square."""
    size = others_PD.square().mean().sqrt().item()
    return torch.allclose(rows_PD, others_PD, rtol=share, atol=share * size)


def distances(rows_PD: Tensor, start_PD: Tensor) -> dict[str, float]:
    """How far rows are from their start rows, in the numbers that events hold."""
    drift = drift_P(rows_PD, start_PD)
    return {
        "drift_mean": drift.mean().item(),
        "drift_max": drift.max().item(),
        "cosine_min": cosine_P(rows_PD, start_PD).min().item(),
    }


def _into_cone(rows_PD: Tensor, start_PD: Tensor, floor: float) -> Tensor:
    """Nearest rows whose cosine to the start rows is at least `floor`.

    The nearest to a row that points away would be zeros, which have no cosine: a thousandth of the
    start row's norm is left.
    """
    axis = torch.nn.functional.normalize(start_PD, dim=1)
    along = (rows_PD * axis).sum(dim=1, keepdim=True)
    across = rows_PD - along * axis
    side = across.norm(dim=1, keepdim=True)
    # On the cone's edge, in the plane of row and axis: unit vector (floor, sine).
    floor = min(floor + 1e-6, 1.0)
    sine = (1 - floor**2) ** 0.5
    least = 1e-3 * start_PD.norm(dim=1, keepdim=True)
    reach = torch.maximum(along * floor + side * sine, least)
    edge = reach * (floor * axis + sine * across / side.clamp(min=1e-12))
    outside = along < floor * rows_PD.norm(dim=1, keepdim=True)
    return torch.where(outside, edge, rows_PD)
