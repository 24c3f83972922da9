"""A place for prefixes with a budget of its own: memory, or pinned host memory beside a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from embedgrad.model.prefix_cache.entry import CachedPrefix
from embedgrad.prompt.boundaries import Ids


class Shelf:
    """Prefixes in memory, up to `budget` bytes; what to keep is decided by `PrefixCache`."""

    writes = False  # whether storing a prefix costs more than a copy in memory

    def __init__(self, budget: int):
        self.budget = budget
        self.nbytes = 0
        self._prefixes: dict[Ids, CachedPrefix] = {}

    @property
    def sizes(self) -> Iterator[tuple[Ids, int]]:
        """The stored prefixes, and the bytes of each."""
        return ((ids, prefix.nbytes) for ids, prefix in self._prefixes.items())

    def __contains__(self, ids: object) -> bool:
        return ids in self._prefixes

    def __len__(self) -> int:
        return len(self._prefixes)

    def store(self, ids: Ids, prefix: CachedPrefix) -> bool:
        """Keep a prefix that fits; whether that worked."""
        self._prefixes[ids] = self._placed(prefix)
        self.nbytes += prefix.nbytes
        return True

    def load(self, ids: Ids) -> CachedPrefix | None:
        """A stored prefix; None where it was lost."""
        return self._prefixes[ids]

    def remove(self, ids: Ids) -> None:
        """Forget a stored prefix."""
        self.nbytes -= self._prefixes.pop(ids).nbytes

    def clear(self) -> None:
        """Forget every prefix."""
        self._prefixes.clear()
        self.nbytes = 0

    def _placed(self, prefix: CachedPrefix) -> CachedPrefix:
        return prefix.owned()


class PinnedShelf(Shelf):
    """Prefixes in pinned host memory, from which a GPU fetches them without waiting."""

    def _placed(self, prefix: CachedPrefix) -> CachedPrefix:
        return CachedPrefix(_pinned(prefix.keys), _pinned(prefix.values))


def _pinned(tensor: Tensor) -> Tensor:
    # Blocking: the prefix may be written to disk from here, which no stream orders.
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def least_useful(
    shelf: Shelf, ids: Ids, nbytes: int, uses: Mapping[Ids, float]
) -> list[Ids] | None:
    """What must go so that a prefix fits; None where it may not take the room.

    Bytes and the work of computing a prefix anew both grow with its tokens, so per byte a prefix is
    as useful as the number of its expected uses. A tie keeps what is stored: with cyclic access
    that saves the share that fits, where least-recently-used would save nothing.
    """
    excess = shelf.nbytes + nbytes - shelf.budget
    if excess <= 0:
        return []
    own = uses.get(ids, 0)
    if nbytes > shelf.budget or not own:
        return None
    less = sorted(
        (uses.get(other, 0), size, other) for other, size in shelf.sizes if uses.get(other, 0) < own
    )
    going: list[Ids] = []
    worth = 0.0
    for use, size, other in less:
        going.append(other)
        worth += use * size
        excess -= size
        if excess <= 0:
            return going if worth < own * nbytes else None
    return None
