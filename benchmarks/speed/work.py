"""Floating-point work of a step, and the rate that a matrix multiply reaches here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_aten = torch.ops.aten


def operations(step: Callable[[], object]) -> int:
    """Floating-point operations that a step really does, counted as its kernels are called.

    Each matrix multiply counts 2 x multiplied numbers: weights x tokens forward, the same backward
    (the weights are frozen), attention, logits. Attention counts every query with every key that
    its kernel gets, masked ones too; its backward counts twice its forward, what is computed again
    for want of memory not.
    """
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        },
    )
    with counter:
        step()
    return int(counter.get_total_flops())


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    batch, prefixes, queries, size = query
    return int(2 * batch * prefixes * queries * key[2] * (size + value[3]))


def _attention_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    return 2 * _attention(query, key, value)


def matmul_rate(like: torch.Tensor, repeats: int = 5) -> float:
    """Floating-point operations per second of a large `torch.mm`; median of the repeats.

    Its matrices are of the kind and in the place of `like`.
    """
    size = 8192 if like.is_cuda else 2048
    left, right = (torch.randn(size, size).to(like) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        torch.mm(left, right)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(seconds[1:])
