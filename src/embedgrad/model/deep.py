"""Rows for every layer: what a prompt adds to later hidden states.

Such a prompt is [P, L D]: a token's row, and behind it what is added where the layers 2 to L begin
to read the token. Start rows have zeros there, so that step zero is the text prompt. Hidden states
are longer than embeddings, by other factors in every layer; the same numbers mean as much in each.
Source: SynQT's queries of every layer (Zhang et al. 2024, https://arxiv.org/abs/2407.06964), as
deep prompts have them in language models (P-tuning v2, https://arxiv.org/abs/2110.07602).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from embedgrad.errors import ModelError

PROBE = 32  # tokens by which layers are measured
NOT_DEEP = (
    "parameterization.deep: rows for every layer are read behind stored prefixes only, which {} "
    "does without; leave it out"
)


@final
class Deep(NamedTuple):
    """What is added to the hidden states at flat positions `at`: [L - 1, B P, D]."""

    at: Tensor
    rows_LND: Tensor


@final
class DeepLayers:
    """The layers of a model, which rows can be added between."""

    def __init__(self, model: Any, layers: int):
        self._model, self._found = model, layer_list(model, layers)

    @property
    def count(self) -> int:
        """How many layers there are; 0 where they are not found."""
        return len(self._found or ())

    def widen(self, rows_PD: Tensor) -> Tensor:
        """Rows for every layer [P, L D] that begin as the text's."""
        return nn.functional.pad(rows_PD, (0, (self.count - 1) * rows_PD.shape[1]))

    def split(self, later_NE: Tensor) -> Tensor:
        """What each of the later layers gets, [L - 1, N, D]. Raises `ModelError`."""
        width = self._model.get_input_embeddings().weight.shape[1]
        if later_NE.shape[1] != (self.count - 1) * width:
            raise ModelError(
                f"rows of {later_NE.shape[1] + width} numbers, but this model has {self.count} "
                f"layers of {width}; use the model that they were made with"
            )
        rows_LND = later_NE.view(len(later_NE), -1, width).transpose(0, 1)
        return rows_LND * self._sizes_L.to(rows_LND)[:, None, None]

    def refuse(self, prompt_PD: Tensor) -> None:
        """Raise `ModelError` for rows of every layer where no stored prefix is used."""
        if prompt_PD.shape[1] != self._model.get_input_embeddings().weight.shape[1]:
            raise ModelError(NOT_DEEP.format("this engine"))

    @contextlib.contextmanager
    def adding(self, deep: Deep | None) -> Iterator[None]:
        """Within the block the layers find the rows added."""

        def add(rows_ND: Tensor, _: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden_BTD, *rest = inputs
            at = deep.at.to(hidden_BTD.device)  # type: ignore[union-attr]
            added = hidden_BTD.flatten(0, 1).index_add(0, at, rows_ND.to(hidden_BTD))
            return (added.view_as(hidden_BTD), *rest)

        with contextlib.ExitStack() as stack:
            if deep is not None and self._found is not None:
                for layer, rows_ND in zip(self._found[1:], deep.rows_LND, strict=True):
                    hook = functools.partial(add, rows_ND)
                    stack.enter_context(layer.register_forward_pre_hook(hook))
            yield

    @functools.cached_property
    @torch.no_grad()
    def _sizes_L(self) -> Tensor:
        """How much longer than embeddings the hidden states before layers 2 to L are.

        Powers of two, which do not depend on precision or machine; of some ordinary tokens.
        """
        table = self._model.get_input_embeddings()
        count = table.weight.shape[0]
        ids = torch.arange(count // 4, count, max(1, count // PROBE), device=table.weight.device)
        embeds = table(ids[:PROBE][None])
        states = self._model.base_model(
            inputs_embeds=embeds, use_cache=False, output_hidden_states=True
        ).hidden_states
        first, *later = (
            state.float().norm(dim=2).median().item() for state in states[: self.count]
        )
        return torch.tensor([2.0 ** round(math.log2(size / first)) for size in later])


def layer_list(model: Any, layers: int) -> nn.ModuleList | None:
    """The layers of a model in order; None where they are not found."""
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers > 0:
            return module
    return None
