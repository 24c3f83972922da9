"""What every parameterization offers."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

Theta = dict[str, Tensor]


class Parameterization(ABC):
    """Maps trained numbers `theta` (a plain dict of fp32 tensors) to rows.

    Its options are the fields of a frozen dataclass. Law: `rows(init(start), start)` is `start`, to
    the bit.
    """

    @abstractmethod
    def init(self, start_PD: Tensor, generator: torch.Generator) -> Theta:
        """The trained numbers whose rows are the start rows."""

    @abstractmethod
    def rows(self, theta: Theta, start_PD: Tensor) -> Tensor:
        """Rows [P, D], differentiable in theta."""

    @abstractmethod
    def fit(self, theta: Theta, rows_PD: Tensor, start_PD: Tensor) -> Theta:
        """Theta whose rows are as near to `rows_PD` as can be; the trust region's way back."""
