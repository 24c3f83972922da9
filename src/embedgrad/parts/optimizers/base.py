"""Base class of optimizers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class Optimizer(ABC):
    """Options of a `torch.optim` optimizer; the loop steps it with a closure."""

    learning_rate: float

    @abstractmethod
    def build(self, theta: Sequence[Tensor]) -> torch.optim.Optimizer:
        """The torch optimizer over these leaves."""
