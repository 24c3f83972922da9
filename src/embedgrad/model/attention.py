"""Attention over a KV cache's stored keys and the current tokens.

Stored keys and values are neither copied next to new ones nor repeated per query head, and prefixes
get no gradient that nobody asks for. Plain matrix products, so it can be differentiated twice on
every device.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from embedgrad.model.kv_cache import KVCache

NAME = "embedgrad"
BLOCK = 96  # queries at a time: later ones than a block's last are not even multiplied
_SCORING = ("position_bias", "indices", "block_indices", "sinks")
_cache: contextvars.ContextVar[KVCache] = contextvars.ContextVar("cache")


@contextlib.contextmanager
def attend_to(config: Any, cache: KVCache) -> Iterator[None]:
    """Within the block a model of this configuration attends to `cache` by `attend`."""
    own, token = config._attn_implementation, _cache.set(cache)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = own
        _cache.reset(token)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that `transformers` calls: [B, heads, T, size] -> [B, T, heads, size].

    `softcap` bounds the scores (Gemma 2), `s_aux` are sinks, one score per head (gpt-oss). Raises
    `NotImplementedError` for anything else that would change the scores.
    """
    unknown = [name for name in _SCORING if more.get(name) is not None]
    if unknown:
        raise NotImplementedError(f"attention with {', '.join(unknown)}")
    cache, layer = _cache.get(), module.layer_idx
    cache.attended.add(layer)
    masks = cache.masks[cache.kinds[layer] if cache.kinds else next(iter(cache.masks))]
    # On another device only where the model is spread over several.
    *stored, own = (mask if mask is None else mask.to(query.device) for mask in masks)
    assert own is not None
    keys = [piece.keys[layer].to(query.device) for piece in cache.cached]
    values = [piece.values[layer].to(query.device) for piece in cache.cached]
    batch, heads, length, size = query.shape
    grouped = heads // key.shape[1]
    scale = 1 / math.sqrt(size) if scaling is None else scaling
    queries = (query * scale).view(batch, key.shape[1], grouped, length, size)
    outputs = []
    block = math.ceil(length / math.ceil(length / BLOCK))
    before = key.shape[2] - length
    for start in range(0, length, block):
        end = min(start + block, length)
        upto = before + end
        seen = [None if mask is None else mask[:, :, start:end] for mask in stored]
        seen.append(own[:, :, start:end, :upto])
        pieces = [*keys, key[:, :, :upto]], [*values, value[:, :, :upto]]
        outputs.append(_attend(queries[:, :, :, start:end], *pieces, seen, softcap, s_aux))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


def _attend(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    masks: list[Tensor | None],
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Queries [B, key-value heads, group, T, size] over all keys -> [B, T, heads, size]."""
    batch, kv_heads, grouped, length, size = query.shape
    flat = query.reshape(batch, kv_heads, grouped * length, size)
    parts = []
    for key, mask in zip(keys, masks, strict=True):
        scores = _product(flat, key.mT).reshape(batch, kv_heads, grouped, length, -1)
        if scores.dtype in (torch.float16, torch.bfloat16):
            scores = scores.float()
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        parts.append(scores if mask is None else scores + mask[:, :, None])
    if sinks is not None:
        sink = sinks.to(parts[0]).view(1, kv_heads, grouped, 1, 1)
        parts.append(sink.expand(batch, -1, -1, length, -1))
    weights = torch.softmax(torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0], dim=-1)
    widths = [part.shape[-1] for part in parts]
    shares = torch.split(weights.to(values[0].dtype).flatten(2, 3), widths, dim=-1)
    output = _product(shares[0], values[0])
    for share, value in zip(shares[1:], values[1:], strict=False):
        output = output + _product(share, value)
    return output.reshape(batch, kv_heads * grouped, length, -1).transpose(1, 2)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """[B, H, M, K] @ [B or 1, H, K, N]; what the whole batch shares is not copied for each."""
    batch, heads, length, _ = left.shape
    if len(right) == batch:
        return left @ right
    folded = left.transpose(0, 1).reshape(heads, batch * length, -1) @ right[0]
    return folded.view(heads, batch, length, -1).transpose(0, 1)


AttentionInterface.register(NAME, attend)
