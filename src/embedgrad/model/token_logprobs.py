"""Compute log-probabilities of target tokens from logits."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_BYTES = 32 * 2**20  # of logits at a time


def token_logprobs(logits_NV: Tensor, places_W: Tensor, tokens_W: Tensor) -> Tensor:
    """Log-probabilities [W] of tokens at the given places."""
    logits = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    # Normalized before picking, so that a place shared by several choices is normalized once.
    return logits[places_W, tokens_W] - logits.logsumexp(dim=1)[places_W]


def hidden_logprobs(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, places_W: Tensor, tokens_W: Tensor
) -> Tensor:
    """Log-probabilities [W] of tokens after hidden states, under a linear output layer."""
    logprobs: Tensor = _HiddenLogprobs.apply(hidden_ND, weight_VD, bias_V, places_W, tokens_W)  # type: ignore[no-untyped-call]
    return logprobs


@final
class _HiddenLogprobs(torch.autograd.Function):
    """`hidden_logprobs`, without ever holding all logits.

    Logits are as long as the vocabulary, so all of them would take more memory than what the layers
    save. The gradient in a hidden state needs the expected output row only,

        d log p(v) / d h  =  W_v - sum_u p(u) W_u,

    which is formed while the chunk of logits is there. Twice differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        places: Tensor,
        tokens: Tensor,
    ) -> Tensor:
        wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        logprobs = hidden_ND.new_empty(len(places), dtype=wide)
        expected = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        size = max(1, CHUNK_BYTES // (len(weight_VD) * logprobs.element_size()))
        for first in range(0, len(hidden_ND), size):
            logits = F.linear(hidden_ND[first : first + size], weight_VD, bias_V).to(wide)
            here = ((places >= first) & (places < first + size)).nonzero().squeeze(1)
            at = places[here] - first
            of_tokens = logits[at, tokens[here]]
            top = logits.amax(dim=1, keepdim=True)
            weights = logits.sub_(top).exp_()
            total = weights.sum(dim=1, keepdim=True)
            logprobs[here] = of_tokens - (top + total.log()).squeeze(1)[at]
            if expected is not None and weight_VD.dtype == wide:
                expected[first : first + size] = (weights @ weight_VD).div_(total)
            elif expected is not None:  # sums of weights of up to 1 each overflow float16
                shares = weights.div_(total).to(weight_VD.dtype)
                expected[first : first + size] = shares @ weight_VD
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, expected, places, tokens)
        return logprobs

    @staticmethod
    def backward(ctx: Any, gradient_W: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient in the hidden states; by plain operations if that is to be differentiated."""
        hidden, weight, bias, expected, places, tokens = ctx.saved_tensors
        if torch.is_grad_enabled():
            logits = F.linear(hidden, weight, bias)
            wide = logits if logits.dtype == torch.float64 else logits.float()
            expected = torch.softmax(wide, dim=1).to(weight.dtype) @ weight
        gradient_W = gradient_W.to(hidden.dtype)
        share = gradient_W.new_zeros(len(hidden)).index_add(0, places, gradient_W)
        weighted = gradient_W[:, None] * weight[tokens]
        rows = torch.zeros_like(hidden).index_add(0, places, weighted)
        return rows - share[:, None] * expected, None, None, None, None
