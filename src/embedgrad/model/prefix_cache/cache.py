"""Prefixes by their token ids, over one or more places with a budget each.

What stands before the span cannot depend on the span in a causal model, so it is computed once and
reused over steps, epochs, evaluations and candidate prompts. Over the budgets a prefix is computed
anew each time it is needed, with the same result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from embedgrad.model.prefix_cache.budget import budget_bytes, free_memory
from embedgrad.model.prefix_cache.disk_tier import Spill
from embedgrad.model.prefix_cache.entry import CachedPrefix
from embedgrad.model.prefix_cache.memory_tier import PinnedShelf, Shelf, least_useful
from embedgrad.prompt.boundaries import Ids

HOST_SHARE = 0.25  # of free host memory, for prefixes over the budget of a GPU


class PrefixCache:
    """Prefixes by their token ids, up to `budget` bytes in memory, then in `host` bytes, then on
    disk.

    Where room is short the prefixes that will be asked for most often stay; `expect` says how often
    that is. `precision="half"` stores 16 bits a number. `hits` counts the calls of `get` that
    found one, `misses` the prefixes that had to be computed, `most_bytes` and `most_spilled_bytes`
    are the largest sizes so far.
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
        self._form = torch.device("cpu"), torch.float32  # in which prefixes are given back

    @classmethod
    def on(
        cls,
        device: torch.device,
        budget: str | float,
        *,
        spill: Spill | None = None,
        precision: Literal["model", "half"] = "model",
    ) -> PrefixCache:
        """Prefixes on a device, within bytes, a size, or a share of its free memory.

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
        """Bytes of the prefixes in memory."""
        return sum(shelf.nbytes for shelf in self._memory)

    @property
    def spilled_bytes(self) -> int:
        """Bytes of the prefixes on disk."""
        return 0 if self._spill is None else self._spill.nbytes

    @property
    def damaged(self) -> int:
        """Prefixes that could not be read back from disk."""
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
        """What an event of a step says of the prefixes."""
        return {
            "prefix_cache_bytes": self.nbytes,
            "prefix_cache_hits": self.hits,
            "prefix_cache_spilled_bytes": self.spilled_bytes,
        }

    @property
    def figures(self) -> dict[str, int]:
        """What `result.json` says of the prefixes."""
        return {
            "hits": self.hits,
            "misses": self.misses,
            "bytes": self.most_bytes,
            "spilled_bytes": self.most_spilled_bytes,
            "damaged": self.damaged,
        }

    def expect(self, *prefixes: tuple[Iterable[Ids], float]) -> None:
        """Say how often prefixes will be asked for, from now on; what was said before is void.

        A prefix that nobody expects is stored where there is room, and gives way to one expected.
        """
        self._uses = {}
        for group, times in prefixes:
            for ids in group:
                self._uses[ids] = self._uses.get(ids, 0.0) + times

    def get(self, ids: Ids) -> CachedPrefix | None:
        """The prefix of these tokens, if it is stored; counts a hit or a miss, and one use."""
        if ids in self._uses:
            self._uses[ids] = max(self._uses[ids] - 1, 0.0)
        shelf = next((shelf for shelf in self._shelves if ids in shelf), None)
        prefix = shelf.load(ids) if shelf is not None else None
        if prefix is None:
            self.misses += 1
            return None
        self.hits += 1
        return prefix.moved(*self._form)

    def put(self, ids: Ids, prefix: CachedPrefix) -> CachedPrefix:
        """Store a prefix, if it is worth the room; returns it as `get` would give it back."""
        self._form = prefix.keys.device, prefix.keys.dtype
        kept = self.as_stored(prefix)
        if ids not in self:
            self._place(ids, kept, 0)
            self.most_bytes = max(self.most_bytes, self.nbytes)
            self.most_spilled_bytes = max(self.most_spilled_bytes, self.spilled_bytes)
        return prefix if kept is prefix else kept.moved(*self._form)

    def as_stored(self, prefix: CachedPrefix) -> CachedPrefix:
        """The prefix in the precision in which it is stored."""
        return prefix.halved() if self.precision == "half" else prefix

    def clear(self) -> None:
        """Forget every prefix, also those on disk; the counts stay."""
        for shelf in self._shelves:
            shelf.clear()

    def _place(self, ids: Ids, prefix: CachedPrefix, first: int) -> None:
        """Store a prefix on a shelf from the `first` on; what makes room goes further down."""
        for level, shelf in enumerate(self._shelves[first:], first):
            if shelf.writes and not self._uses.get(ids, 1):
                return  # nothing to be gained by writing it
            going = least_useful(shelf, ids, prefix.nbytes, self._uses)
            if going is None:
                continue
            below = [(other, self._taken(shelf, other, level)) for other in going]
            if shelf.store(ids, prefix):
                for other, moved in below:
                    if moved is not None:
                        self._place(other, moved, level + 1)
                return

    def _taken(self, shelf: Shelf, ids: Ids, level: int) -> CachedPrefix | None:
        """A prefix that leaves a shelf, if there is a place and a use for it further down."""
        last = level + 1 == len(self._shelves)
        prefix = None if last or not self._uses.get(ids) else shelf.load(ids)
        if ids in shelf:
            shelf.remove(ids)
        return prefix
