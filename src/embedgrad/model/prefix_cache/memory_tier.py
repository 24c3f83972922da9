"""A place for heads with a budget of its own: memory, or pinned host memory beside a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from embedgrad.model.prefix_cache.entry import Head
from embedgrad.prompt.boundaries import Ids


class Shelf:
    """Heads in memory, up to `budget` bytes; what to keep is decided by `HeadCache`."""

    writes = False  # whether storing a head costs more than a copy in memory

    def __init__(self, budget: int):
        self.budget = budget
        self.nbytes = 0
        self._heads: dict[Ids, Head] = {}

    @property
    def sizes(self) -> Iterator[tuple[Ids, int]]:
        """The stored heads, and the bytes of each."""
        return ((ids, head.nbytes) for ids, head in self._heads.items())

    def __contains__(self, ids: object) -> bool:
        return ids in self._heads

    def __len__(self) -> int:
        return len(self._heads)

    def store(self, ids: Ids, head: Head) -> bool:
        """Keep a head that fits; whether that worked."""
        self._heads[ids] = self._placed(head)
        self.nbytes += head.nbytes
        return True

    def load(self, ids: Ids) -> Head | None:
        """A stored head; None where it was lost."""
        return self._heads[ids]

    def remove(self, ids: Ids) -> None:
        """Forget a stored head."""
        self.nbytes -= self._heads.pop(ids).nbytes

    def clear(self) -> None:
        """Forget every head."""
        self._heads.clear()
        self.nbytes = 0

    def _placed(self, head: Head) -> Head:
        return head.owned()


class PinnedShelf(Shelf):
    """Heads in pinned host memory, from which a GPU fetches them without waiting."""

    def _placed(self, head: Head) -> Head:
        return Head(_pinned(head.keys), _pinned(head.values))


def _pinned(tensor: Tensor) -> Tensor:
    # Blocking: the head may be written to disk from here, which no stream orders.
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def least_useful(
    shelf: Shelf, ids: Ids, nbytes: int, uses: Mapping[Ids, float]
) -> list[Ids] | None:
    """What must go so that a head fits; None where it may not take the room.

    Bytes and the work of computing a head anew both grow with its tokens, so per byte a head is as
    useful as the number of its expected uses. A tie keeps what is stored: with cyclic access that
    saves the share that fits, where least-recently-used would save nothing.
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
