"""What every objective offers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from embedgrad.model.outcome import Outcome


class Objective(ABC):
    """Turns what the model says of a batch into one number to make smaller.

    Its options are the fields of a frozen dataclass.
    """

    @abstractmethod
    def needs_choices(self, *, available: bool) -> bool:
        """Whether it wants every choice scored; `available` says whether the rows have choices."""

    @abstractmethod
    def losses(self, outcome: Outcome) -> Tensor:
        """One loss per example, shape [B], in nats."""

    @abstractmethod
    def reduce(self, losses_B: Tensor, outcome: Outcome) -> Tensor:
        """One number from the losses of a batch, shape []."""
