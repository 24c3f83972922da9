"""Memory tier of the prefix cache; its entries and evictions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple, final

import torch
from torch import Tensor

from embedgrad.prompt.boundaries import Ids


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


class Tier(ABC):
    """Stores prefixes up to `budget` bytes; `PrefixCache` decides which.

    `sizes` holds the bytes of each, `nbytes` is their sum; `damaged` counts those lost.
    """

    writes = False  # whether storing a prefix costs more than a copy in memory

    def __init__(self, budget: int):
        self.budget = budget
        self.nbytes = self.damaged = 0
        self.sizes: dict[Ids, int] = {}

    def store(self, ids: Ids, prefix: CachedPrefix) -> bool:
        """Store a prefix that fits; whether that worked."""
        if not self._write(ids, prefix):
            return False
        self.sizes[ids] = prefix.nbytes
        self.nbytes += prefix.nbytes
        return True

    def remove(self, ids: Ids) -> None:
        """Remove a stored prefix."""
        self.nbytes -= self.sizes.pop(ids)
        self._delete(ids)

    @abstractmethod
    def load(self, ids: Ids) -> CachedPrefix | None:
        """A stored prefix; None where it was lost."""

    @abstractmethod
    def _write(self, ids: Ids, prefix: CachedPrefix) -> bool: ...

    @abstractmethod
    def _delete(self, ids: Ids) -> None: ...


@final
class MemoryTier(Tier):
    """Prefixes in memory; `pinned`: on the host, from which a GPU fetches them without waiting."""

    def __init__(self, budget: int, *, pinned: bool = False):
        super().__init__(budget)
        self._copy = _pin if pinned else _own
        self._prefixes: dict[Ids, CachedPrefix] = {}

    def load(self, ids: Ids) -> CachedPrefix | None:
        return self._prefixes[ids]

    def _write(self, ids: Ids, prefix: CachedPrefix) -> bool:
        self._prefixes[ids] = CachedPrefix(*map(self._copy, prefix))
        return True

    def _delete(self, ids: Ids) -> None:
        del self._prefixes[ids]


def _to_half(tensor: Tensor) -> Tensor:
    """float16, whose error is an eighth of bfloat16's; bfloat16 where float16 overflows."""
    if tensor.element_size() <= 2:
        return tensor
    half = tensor.half()
    return half if torch.isfinite(half).all() else tensor.bfloat16()


def _own(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own: a view would keep all that it is a view of."""
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


def _pin(tensor: Tensor) -> Tensor:
    # Blocking: the prefix may be written to disk from here, which no stream orders.
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def choose_evictions(
    tier: Tier, ids: Ids, nbytes: int, uses: Mapping[Ids, float]
) -> list[Ids] | None:
    """The prefixes to remove so that another fits; None where it may not take the room.

    Bytes and the work of computing a prefix again both grow with its tokens, so per byte a prefix
    is as useful as the number of its expected uses. A tie keeps what is stored: with cyclic access
    that saves the share that fits, where least-recently-used would save nothing.
    """
    excess = tier.nbytes + nbytes - tier.budget
    if excess <= 0:
        return []
    own = uses.get(ids, 0)
    if nbytes > tier.budget or not own:
        return None
    evicted: list[Ids] = []
    worth = 0.0
    less = ((uses.get(i, 0), n, i) for i, n in tier.sizes.items() if uses.get(i, 0) < own)
    for use, size, other in sorted(less):
        evicted.append(other)
        worth += use * size
        excess -= size
        if excess <= 0:
            return evicted if worth < own * nbytes else None
    return None
