"""LARS, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, final

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from embedgrad.parts.optimizers.base import Optimizer


@final
@dataclass(frozen=True)
class LARS(Optimizer):
    """Move every row by the same share of its size, however long its gradient; with momentum.

    m_i <- momentum m_i + learning_rate |row_i| g_i / |g_i|,   theta_i <- theta_i - m_i
    |row_i| is that of the start row, which free rows are measured in, so that rows which have moved
    far step no further. Source: You et al. 2017, https://arxiv.org/abs/1708.03888, with a
    row in the place of a layer and without weight decay.
    """

    learning_rate: Annotated[float, Gt(0), Le(1e30)] = 0.02
    """Step size: the share of its norm that a row moves in one step, before momentum."""
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Share of the last step that is kept."""

    def build(self, theta: Sequence[Tensor]) -> torch.optim.Optimizer:
        return _RowwiseSGD(list(theta), lr=self.learning_rate, momentum=self.momentum)


@final
class _RowwiseSGD(torch.optim.SGD):
    """SGD on gradients whose rows have a root mean square of one; zeros stay zeros."""

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        assert closure is not None

        def scaled() -> float:
            loss = closure()
            for group in self.param_groups:
                for leaf in group["params"]:
                    size = leaf.grad.pow(2).mean(-1, keepdim=True).sqrt()
                    leaf.grad = leaf.grad / size.clamp(min=1e-12)
            return loss

        return super().step(scaled)
