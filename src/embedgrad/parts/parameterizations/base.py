"""Base class: map trained numbers to the rows of a soft prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

from embedgrad.errors import RecipeError
from embedgrad.model.backbone import Prompt
from embedgrad.prompt.trust_region import TrustRegion, shrink_into

Theta = dict[str, Tensor]


class Parameterization(ABC):
    """Maps trained numbers `theta` (a dict of tensors) to a prompt.

    A prompt is a set of named tensors [..., P, D] of one width D: one per span, or one [L, P, D]
    where every layer has rows of its own. The options are the fields of a frozen dataclass.
    Law: `prompt(init(start), start)` is `start`, to the bit.
    """

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that its rows depend on, which a resumed run must find as they were."""
        return ()

    @abstractmethod
    def init(self, start: Prompt, generator: torch.Generator) -> Theta:
        """The trained numbers whose prompt is the start."""

    @abstractmethod
    def prompt(self, theta: Theta, start: Prompt) -> Prompt:
        """The prompt, with the names and shapes of the start, differentiable in theta."""

    def reach(self, prompt: Prompt, start: Prompt) -> Theta:
        """The theta of a prompt near its start, for a warm start. Raises `RecipeError`."""
        name = type(self).__name__
        raise RecipeError(
            "parameterization",
            [f"{name} cannot begin at given rows; take training.warm_start out"],
        )

    def fit(self, theta: Theta, origin: Theta, start: Prompt, region: TrustRegion) -> Theta:
        """Theta whose rows are all in the trust region; theta itself where they are already.

        Here theta shrinks towards its `origin`, the theta of `init`, which any map allows. One
        that can move each row alone projects the rows instead.
        """

        def at(share: float) -> Theta:
            return {name: origin[name] + share * (theta[name] - origin[name]) for name in theta}

        share = shrink_into(
            region, all_rows(start), lambda share: all_rows(self.prompt(at(share), start))
        )
        return theta if share == 1 else at(share)


def all_rows(prompt: Prompt) -> Tensor:
    """Every row of a prompt, shape [N, D], in the order of the names."""
    rows = [tensor.flatten(0, -2) for tensor in prompt.values()]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def row_size(rows: Tensor) -> Tensor:
    """The root mean square of each row, shape [..., 1]: one step size then serves all models."""
    return rows.pow(2).mean(dim=-1, keepdim=True).sqrt()
