"""Base class of optimizers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class Optimizer(ABC):
    """Options of a `torch.optim` optimizer; the loop steps it with a closure."""

    learning_rate: float

    @property
    def gradients(self) -> int:
        """How many gradients a step takes: how often it calls its closure."""
        return 1

    @abstractmethod
    def build(self, theta: Sequence[Tensor]) -> torch.optim.Optimizer:
        """The torch optimizer over these leaves."""
