"""How the step size changes over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, final

from annotated_types import Ge, Le


@final
@dataclass(frozen=True)
class Schedule:
    """Rise linearly, then fall.

    Source of the cosine: Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983, eq. 5.
    """

    warmup: Annotated[float, Ge(0), Le(1)] = 0.1
    """Share of all steps in which the step size rises to its full value."""
    shape: Literal["cosine", "linear", "constant"] = "cosine"
    """How the step size decays until the end of the run."""

    def factor(self, step: int, total: int) -> float:
        """Share of the full step size at `step` of `total` (from 0)."""
        rising = round(self.warmup * total)
        if step < rising:
            return (step + 1) / rising
        gone = (step - rising) / max(total - rising, 1)
        if self.shape == "cosine":
            return 0.5 * (1 + math.cos(math.pi * gone))
        return 1 - gone if self.shape == "linear" else 1.0
