"""A number made of every log-probability, its gradient, and both by the full pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from embedgrad.model.language_model import LanguageModel
from embedgrad.prompt.sequence import Target, TokenSequence
from kit import LONG_CHOICES, Kit, full_logprobs, kit

LONG = Target(choices=LONG_CHOICES)


def mixed(architecture: str = "llama", placement: str = "user-after", **options: Any) -> Kit:
    """Rows of mixed lengths with choices of several tokens, on an untied model."""
    return kit(architecture, template=placement, target=LONG, tie=False, **{"rows": 5, **options})


def loss_and_gradient(
    model: LanguageModel, rows_PD: Tensor, sequences: Sequence[TokenSequence], **options: bool
) -> tuple[Tensor, Tensor]:
    """Some number of every log-probability, and its gradient."""
    rows = rows_PD.clone().requires_grad_(True)
    loss = weighted(list(model.outcome(rows, sequences, **options).logprobs_BC))
    (gradient,) = torch.autograd.grad(loss, rows)
    return loss.detach(), gradient


def full_loss_and_gradient(
    made: Kit, rows_PD: Tensor, sequences: Sequence[TokenSequence]
) -> tuple[Tensor, Tensor]:
    rows = rows_PD.clone().requires_grad_(True)
    loss = weighted(full_logprobs(made.loaded, rows, sequences))
    (gradient,) = torch.autograd.grad(loss, rows)
    return loss.detach(), gradient


def weighted(logprobs: Sequence[Tensor]) -> Tensor:
    """A sum in which no two choices of no two rows can be confused."""
    parts = [
        (row * torch.linspace(1, 2 + b, len(row), dtype=row.dtype)).sum()
        for b, row in enumerate(logprobs)
    ]
    return torch.stack(parts).sum()


def assert_same(
    found: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor],
    loss: float = 1e-10,
    gradient: float = 1e-10,
) -> None:
    """Relative distance of the losses, and of the gradients (L2)."""
    assert ((found[0] - expected[0]).abs() / expected[0].abs()).item() < loss
    assert expected[1].norm().item() > 1e-3
    assert ((found[1] - expected[1]).norm() / expected[1].norm()).item() < gradient
