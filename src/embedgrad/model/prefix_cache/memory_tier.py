"""Memory tier of the prefix cache: the device's memory, or pinned host memory beside a GPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from embedgrad.model.prefix_cache.entry import CachedPrefix
from embedgrad.prompt.boundaries import Ids


class Tier(ABC):
    """Stores prefixes up to `budget` bytes; `PrefixCache` decides which.

    `sizes` holds the bytes of each, `nbytes` is their sum.
    """

    writes = False  # whether storing a prefix costs more than a copy in memory

    def __init__(self, budget: int):
        self.budget = budget
        self.nbytes = 0
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
    less = sorted(
        (uses.get(other, 0), size, other)
        for other, size in tier.sizes.items()
        if uses.get(other, 0) < own
    )
    evicted: list[Ids] = []
    worth = 0.0
    for use, size, other in less:
        evicted.append(other)
        worth += use * size
        excess -= size
        if excess <= 0:
            return evicted if worth < own * nbytes else None
    return None
