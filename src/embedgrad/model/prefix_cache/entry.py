"""Entry of the prefix cache: keys and values of one prefix."""

from __future__ import annotations

from typing import NamedTuple, final

import torch
from torch import Tensor


@final
class CachedPrefix(NamedTuple):
    """Keys and values of one prefix, [layers, key-value heads, tokens, size] each."""

    keys: Tensor
    values: Tensor

    @property
    def length(self) -> int:
        """Tokens of the prefix."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.keys.nbytes + self.values.nbytes

    def to_half(self) -> CachedPrefix:
        """The prefix in 16 bits a number, rounded."""
        return CachedPrefix(*map(_to_half, self))

    def to(self, device: torch.device, dtype: torch.dtype) -> CachedPrefix:
        """The prefix on a device; from pinned memory the copy does not wait."""
        return CachedPrefix(*(part.to(device, non_blocking=True).to(dtype) for part in self))


def _to_half(tensor: Tensor) -> Tensor:
    """float16, whose error is an eighth of bfloat16's; bfloat16 where float16 overflows."""
    if tensor.element_size() <= 2:
        return tensor
    half = tensor.half()
    return half if torch.isfinite(half).all() else tensor.bfloat16()
