"""Trust region: a ball and a cone around each row's start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, final

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

BISECTIONS = 24  # as many as an fp32 number has digits


@final
@dataclass(frozen=True)
class TrustRegion:
    """How far a row may move from its token's embedding.

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
        return self._holds(rows_PD, start_PD, slack=1e-5)

    def _holds(self, rows_PD: Tensor, start_PD: Tensor, slack: float) -> bool:
        if self.radius is not None:
            # Rounding moves an fp32 row by up to 1e-7 of its norm, whatever the radius.
            most = self.radius * (1 + slack) + slack / 10
            if not (drift_P(rows_PD, start_PD) <= most).all():  # also where they are NaN
                return False
        if self.min_cosine is not None:
            # A row of zeros has no direction to keep; nor has one too short to compute it.
            free = start_PD.norm(dim=-1) <= 1e-8
            aligned = cosine_P(rows_PD, start_PD) >= self.min_cosine - slack
            return bool((free | aligned).all())
        return True


def shrink_into(region: TrustRegion, start_PD: Tensor, rows_at: Callable[[float], Tensor]) -> float:
    """The largest t from 0 to 1, found by bisection, at which `rows_at(t)` is in the region.

    For parameterizations whose rows cannot be projected one by one: `rows_at(0)` must be the start
    rows, shape [P, D]. Ball and cone are star-shaped about the start, so that one t divides inside
    from outside wherever each row's way leads straight away from its start. The rows at the
    returned t are inside whatever their way is. A start row of zeros cannot move in a ball.
    """
    with torch.no_grad():
        if region._holds(rows_at(1.0), start_PD, slack=1e-6):
            return 1.0
        inside, outside = 0.0, 1.0
        for _ in range(BISECTIONS):
            middle = (inside + outside) / 2
            if region._holds(rows_at(middle), start_PD, slack=1e-6):
                inside = middle
            else:
                outside = middle
    return inside


def drift_P(rows_PD: Tensor, start_PD: Tensor) -> Tensor:
    """Distance of each row from its start row, in norms of the start row."""
    distance: Tensor = (rows_PD - start_PD).norm(dim=-1)
    size: Tensor = start_PD.norm(dim=-1).clamp(min=1e-12)
    return distance / size


def cosine_P(rows_PD: Tensor, start_PD: Tensor) -> Tensor:
    """Cosine of each row to its start row."""
    return torch.cosine_similarity(rows_PD, start_PD, dim=-1)


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
