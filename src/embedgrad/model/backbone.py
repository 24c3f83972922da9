"""Backbone: the interface that training needs from a frozen model.

`LanguageModel` is the causal backbone; another kind of model needs the same three methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from embedgrad.errors import ModelError
from embedgrad.prompt.boundaries import Ids
from embedgrad.prompt.sequence import TokenSequence

if TYPE_CHECKING:
    from embedgrad.model.decoding import Decoding
    from embedgrad.model.generation import Reply
    from embedgrad.model.outcome import Outcome

Prompt = Mapping[str, Tensor]
"""Span name -> its rows [P, D], in the order of the spans; [layers, P, D] for rows per layer."""


def join_spans(prompt: Prompt | Tensor) -> Tensor:
    """Concatenate the rows of all spans to [P, D]; a tensor is returned as it is.

    Raises `ModelError` for one set of rows per layer, which a causal language model cannot take.
    """
    spans = {"prompt": prompt} if isinstance(prompt, Tensor) else prompt
    for name, rows in spans.items():
        if rows.dim() != 2:
            raise ModelError(
                f"span {name!r} has rows of shape {list(rows.shape)}; a causal language model "
                "takes one set of rows [P, D] for all layers, not one set per layer"
            )
    parts = list(spans.values())
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Backbone(Protocol):
    """A frozen model that scores and generates answers behind a soft prompt.

    `prompt` is named tensors, or the rows [P, D] of all spans.
    """

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Rows [T, D] of token ids, from which a prompt starts."""

    def outcome(
        self,
        prompt: Prompt | Tensor,
        batch: Sequence[TokenSequence],
        *,
        choices: bool = True,
        normalize: bool = False,
        read: Sequence[Sequence[Ids]] | None = None,
    ) -> Outcome:
        """Log-probabilities of the batch's answers, differentiable in the prompt.

        `read`: further tokens to read at each token of each right answer.
        """

    def generate(
        self,
        prompt: Prompt | Tensor,
        batch: Sequence[TokenSequence],
        decoding: Decoding,
        *,
        end_ids: Ids,
        batch_size: int = 16,
        numbers: Sequence[int] | None = None,
    ) -> list[tuple[Reply, ...]]:
        """Free answers, `decoding.samples` per sequence."""
