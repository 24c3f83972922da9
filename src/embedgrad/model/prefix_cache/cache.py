"""Heads by their token ids, over one or more places with a budget each.

What stands before the span cannot depend on the span in a causal model, so it is computed once and
reused over steps, epochs, evaluations and candidate prompts. Over the budgets a head is computed
anew each time it is needed, with the same result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from embedgrad.model.prefix_cache.budget import budget_bytes, free_memory
from embedgrad.model.prefix_cache.disk_tier import Spill
from embedgrad.model.prefix_cache.entry import Head
from embedgrad.model.prefix_cache.memory_tier import PinnedShelf, Shelf, least_useful
from embedgrad.prompt.boundaries import Ids

HOST_SHARE = 0.25  # of free host memory, for heads over the budget of a GPU


class HeadCache:
    """Heads by their token ids, up to `budget` bytes in memory, then in `host` bytes, then on disk.

    Where room is short the heads that will be asked for most often stay; `expect` says how often
    that is. `precision="half"` stores 16 bits a number. `hits` counts the calls of `get` that
    found one, `misses` the heads that had to be computed, `most_bytes` and `most_spilled_bytes` are
    the largest sizes so far.
    """

    def __init__(
        self,
        budget: int,
        *,
        host: int = 0,
        spill: Spill | None = None,
        precision: Literal["model", "half"] = "model",
    ):
        self.budget = budget
        self.precision = precision
        self.most_bytes = 0
        self.most_spilled_bytes = 0
        self.hits = 0
        self.misses = 0
        self._memory = [Shelf(budget), *([PinnedShelf(host)] if host else [])]
        self._spill = spill
        self._shelves: Sequence[Shelf] = [*self._memory, *([] if spill is None else [spill])]
        self._uses: dict[Ids, float] = {}
        self._form = torch.device("cpu"), torch.float32  # in which heads are given back

    @classmethod
    def on(
        cls,
        device: torch.device,
        budget: str | float,
        *,
        spill: Spill | None = None,
        precision: Literal["model", "half"] = "model",
    ) -> HeadCache:
        """Heads on a device, within bytes, a size, or a share of its free memory.

        What a GPU has no room for goes to pinned host memory. Raises `RecipeError`.
        """
        room = budget_bytes(budget, free=lambda: free_memory(device))
        host = budget_bytes(HOST_SHARE) if room and device.type == "cuda" else 0
        return cls(room, host=host, spill=spill, precision=precision)

    def __len__(self) -> int:
        return sum(len(shelf) for shelf in self._shelves)

    def __contains__(self, ids: object) -> bool:
        return any(ids in shelf for shelf in self._shelves)

    @property
    def nbytes(self) -> int:
        """Bytes of the heads in memory."""
        return sum(shelf.nbytes for shelf in self._memory)

    @property
    def spilled_bytes(self) -> int:
        """Bytes of the heads on disk."""
        return 0 if self._spill is None else self._spill.nbytes

    @property
    def damaged(self) -> int:
        """Heads that could not be read back from disk."""
        return 0 if self._spill is None else self._spill.damaged

    @property
    def room(self) -> int:
        """Bytes that can be stored in all."""
        return sum(shelf.budget for shelf in self._shelves)

    @property
    def free(self) -> int:
        """Bytes that can be stored without anything going."""
        return self.room - self.nbytes - self.spilled_bytes

    @property
    def progress(self) -> dict[str, int]:
        """What an event of a step says of the heads."""
        return {
            "head_cache_bytes": self.nbytes,
            "head_cache_hits": self.hits,
            "head_cache_spilled_bytes": self.spilled_bytes,
        }

    @property
    def figures(self) -> dict[str, int]:
        """What `result.json` says of the heads."""
        return {
            "hits": self.hits,
            "misses": self.misses,
            "bytes": self.most_bytes,
            "spilled_bytes": self.most_spilled_bytes,
            "damaged": self.damaged,
        }

    def expect(self, *heads: tuple[Iterable[Ids], float]) -> None:
        """Say how often heads will be asked for, from now on; what was said before is void.

        A head that nobody expects is stored where there is room, and gives way to one expected.
        """
        self._uses = {}
        for group, times in heads:
            for ids in group:
                self._uses[ids] = self._uses.get(ids, 0.0) + times

    def get(self, ids: Ids) -> Head | None:
        """The head of these tokens, if it is stored; counts a hit or a miss, and one use."""
        if ids in self._uses:
            self._uses[ids] = max(self._uses[ids] - 1, 0.0)
        shelf = next((shelf for shelf in self._shelves if ids in shelf), None)
        head = shelf.load(ids) if shelf is not None else None
        if head is None:
            self.misses += 1
            return None
        self.hits += 1
        return head.moved(*self._form)

    def put(self, ids: Ids, head: Head) -> Head:
        """Store a head, if it is worth the room; returns it as `get` would give it back."""
        self._form = head.keys.device, head.keys.dtype
        kept = self.as_stored(head)
        if ids not in self:
            self._place(ids, kept, 0)
            self.most_bytes = max(self.most_bytes, self.nbytes)
            self.most_spilled_bytes = max(self.most_spilled_bytes, self.spilled_bytes)
        return head if kept is head else kept.moved(*self._form)

    def as_stored(self, head: Head) -> Head:
        """The head in the precision in which it is stored."""
        return head.halved() if self.precision == "half" else head

    def clear(self) -> None:
        """Forget every head, also those on disk; the counts stay."""
        for shelf in self._shelves:
            shelf.clear()

    def _place(self, ids: Ids, head: Head, first: int) -> None:
        """Store a head on a shelf from the `first` on; what makes room goes further down."""
        for level, shelf in enumerate(self._shelves[first:], first):
            if shelf.writes and not self._uses.get(ids, 1):
                return  # nothing to be gained by writing it
            going = least_useful(shelf, ids, head.nbytes, self._uses)
            if going is None:
                continue
            below = [(other, self._taken(shelf, other, level)) for other in going]
            if shelf.store(ids, head):
                for other, moved in below:
                    if moved is not None:
                        self._place(other, moved, level + 1)
                return

    def _taken(self, shelf: Shelf, ids: Ids, level: int) -> Head | None:
        """A head that leaves a shelf, if there is a place and a use for it further down."""
        last = level + 1 == len(self._shelves)
        head = None if last or not self._uses.get(ids) else shelf.load(ids)
        if ids in shelf:
            shelf.remove(ids)
        return head
