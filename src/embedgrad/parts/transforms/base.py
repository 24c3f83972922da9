"""What every gradient transform offers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

Gradients = dict[str, Tensor]


class Transform(ABC):
    """Changes the gradient of theta; transforms of a recipe are applied in order."""

    @abstractmethod
    def __call__(self, gradients: Gradients) -> Gradients:
        """New gradients of the same names and shapes; the given ones are left as they are."""
