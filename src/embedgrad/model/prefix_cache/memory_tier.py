"""Memory tier of the prefix cache: the device's memory, or pinned host memory beside a GPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import final

import torch
from torch import Tensor

from embedgrad.model.prefix_cache.entry import CachedPrefix
from embedgrad.prompt.boundaries import Ids


class Tier(ABC):
    """Stores prefixes, `nbytes` of them up to `budget`; `PrefixCache` decides which."""

    writes = False  # whether storing a prefix costs more than a copy in memory

    def __init__(self, budget: int):
        self.budget = budget
        self.nbytes = 0

    @property
    @abstractmethod
    def sizes(self) -> Iterator[tuple[Ids, int]]:
        """The stored prefixes, and the bytes of each."""

    @abstractmethod
    def __contains__(self, ids: object) -> bool: ...

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def store(self, ids: Ids, prefix: CachedPrefix) -> bool:
        """Store a prefix that fits; whether that worked."""

    @abstractmethod
    def load(self, ids: Ids) -> CachedPrefix | None:
        """A stored prefix; None where it was lost."""

    @abstractmethod
    def remove(self, ids: Ids) -> None:
        """Remove a stored prefix."""

    def clear(self) -> None:
        """Remove every prefix."""
        for ids, _ in list(self.sizes):
            self.remove(ids)


@final
class MemoryTier(Tier):
    """Prefixes in memory; `pinned`: on the host, from which a GPU fetches them without waiting."""

    def __init__(self, budget: int, *, pinned: bool = False):
        super().__init__(budget)
        self._pinned = pinned
        self._prefixes: dict[Ids, CachedPrefix] = {}

    @property
    def sizes(self) -> Iterator[tuple[Ids, int]]:
        return ((ids, prefix.nbytes) for ids, prefix in self._prefixes.items())

    def __contains__(self, ids: object) -> bool:
        return ids in self._prefixes

    def __len__(self) -> int:
        return len(self._prefixes)

    def store(self, ids: Ids, prefix: CachedPrefix) -> bool:
        copy = _pin if self._pinned else _own
        self._prefixes[ids] = CachedPrefix(copy(prefix.keys), copy(prefix.values))
        self.nbytes += prefix.nbytes
        return True

    def load(self, ids: Ids) -> CachedPrefix | None:
        return self._prefixes[ids]

    def remove(self, ids: Ids) -> None:
        self.nbytes -= self._prefixes.pop(ids).nbytes


def _own(tensor: Tensor) -> Tensor:
    """The tensor in memory of its own: a view would keep all that it is a view of."""
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


def _pin(tensor: Tensor) -> Tensor:
    # Blocking: the prefix may be written to disk from here, which no stream orders.
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def least_useful(tier: Tier, ids: Ids, nbytes: int, uses: Mapping[Ids, float]) -> list[Ids] | None:
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
        (uses.get(other, 0), size, other) for other, size in tier.sizes if uses.get(other, 0) < own
    )
    leaving: list[Ids] = []
    worth = 0.0
    for use, size, other in less:
        leaving.append(other)
        worth += use * size
        excess -= size
        if excess <= 0:
            return leaving if worth < own * nbytes else None
    return None
