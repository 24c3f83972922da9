"""Keys and values of one prefix, as computed or in half precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CachedPrefix:
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

    def halved(self) -> CachedPrefix:
        """The prefix in 16 bits a number, rounded."""
        return CachedPrefix(_half(self.keys), _half(self.values))

    def owned(self) -> CachedPrefix:
        """The prefix in memory of its own: a view would keep all that it is a view of."""
        return CachedPrefix(_own(self.keys), _own(self.values))

    def moved(self, device: torch.device, dtype: torch.dtype) -> CachedPrefix:
        """The prefix elsewhere; from pinned memory the copy does not wait."""
        return CachedPrefix(
            self.keys.to(device, non_blocking=True).to(dtype),
            self.values.to(device, non_blocking=True).to(dtype),
        )


def _half(tensor: Tensor) -> Tensor:
    """float16, whose error is an eighth of bfloat16's; bfloat16 where float16 overflows."""
    if tensor.element_size() <= 2:
        return tensor
    half = tensor.half()
    return half if torch.isfinite(half).all() else tensor.bfloat16()


def _own(tensor: Tensor) -> Tensor:
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
