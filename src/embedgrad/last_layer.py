"""The last layer's feed-forward part, at the places that are read and nowhere else.

Elsewhere its output goes into no later layer's keys and values and into no logits. The place of the
feed-forward part in a model is a guess that `LanguageModel` checks by trying.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def last_feed_forward(model: Any, layers: int) -> nn.Module | None:
    """The `mlp` of the last of so many layers, where most models have it."""
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            found = getattr(module[-1], "mlp", None)
            return found if isinstance(found, nn.Module) else None
    return None


@contextlib.contextmanager
def only_at(feed_forward: nn.Module | None, keep_BT: Tensor) -> Iterator[None]:
    """Within the block the module computes kept places only, and gives zeros elsewhere."""
    if feed_forward is None:
        yield
        return

    def pick(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (hidden_BTD,) = inputs
        return (hidden_BTD[keep_BT][None],)

    def put(_: nn.Module, __: tuple[Tensor], output_1ND: Tensor) -> Tensor:
        zeros = output_1ND.new_zeros(*keep_BT.shape, output_1ND.shape[-1])
        return torch.index_put(zeros, (keep_BT,), output_1ND[0])

    hooks = (
        feed_forward.register_forward_pre_hook(pick),
        feed_forward.register_forward_hook(put),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
