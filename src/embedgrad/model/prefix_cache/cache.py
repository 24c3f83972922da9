"""Prefix cache: KV caches of prefixes, looked up by token ids.

In a causal model nothing before the span depends on it, so it is computed once and reused over
steps, epochs, evaluations and candidate prompts. Over the budgets a prefix is computed again each
time it is needed, with the same result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, final

import torch

from embedgrad.model.prefix_cache.budget import budget_bytes, free_memory
from embedgrad.model.prefix_cache.disk_tier import Spill
from embedgrad.model.prefix_cache.memory_tier import (
    CachedPrefix,
    MemoryTier,
    Tier,
    choose_evictions,
)
from embedgrad.prompt.boundaries import Ids

HOST_SHARE = 0.25  # of free host memory, for prefixes over the budget of a GPU


@final
class PrefixCache:
    """Prefixes by token ids: up to `budget` bytes in memory, then `host` bytes, then on disk.

    Where room is short the prefixes with the most uses ahead stay; see `expect`.
    `precision="half"` stores 16 bits a number. `hits` counts the calls of `get` that found one,
    `misses` the prefixes computed; `most_bytes` and `most_spilled_bytes` are the largest sizes.
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
        self.most_bytes = self.most_spilled_bytes = self.hits = self.misses = 0
        tiers = [MemoryTier(budget), MemoryTier(host, pinned=True) if host else None, spill]
        self._tiers: Sequence[Tier] = [tier for tier in tiers if tier is not None]
        self._uses: dict[Ids, float] = {}
        self._form = torch.device("cpu"), torch.float32  # of the prefixes that `get` returns

    @classmethod
    def on(
        cls,
        device: torch.device,
        budget: str | float,
        *,
        spill: Spill | None = None,
        precision: Literal["model", "half"] = "model",
    ) -> PrefixCache:
        """A cache on a device with a budget for `budget_bytes`; a GPU gets host memory too."""
        room = budget_bytes(budget, free=lambda: free_memory(device))
        host = budget_bytes(HOST_SHARE) if room and device.type == "cuda" else 0
        return cls(room, host=host, spill=spill, precision=precision)

    def __len__(self) -> int:
        return sum(len(tier.sizes) for tier in self._tiers)

    def __contains__(self, ids: object) -> bool:
        return any(ids in tier.sizes for tier in self._tiers)

    @property
    def nbytes(self) -> int:
        """Bytes of the prefixes in memory."""
        return sum(tier.nbytes for tier in self._tiers if not tier.writes)

    @property
    def spilled_bytes(self) -> int:
        """Bytes of the prefixes on disk."""
        return sum(tier.nbytes for tier in self._tiers if tier.writes)

    @property
    def damaged(self) -> int:
        """Prefixes that could not be read back from disk."""
        return sum(tier.damaged for tier in self._tiers)

    @property
    def room(self) -> int:
        """Bytes that can be stored in all."""
        return sum(tier.budget for tier in self._tiers)

    @property
    def free(self) -> int:
        """Bytes that can be stored without removing anything."""
        return self.room - self.nbytes - self.spilled_bytes

    @property
    def progress(self) -> dict[str, int]:
        """Size and hits, for the events of training steps."""
        return {
            "prefix_cache_bytes": self.nbytes,
            "prefix_cache_hits": self.hits,
            "prefix_cache_spilled_bytes": self.spilled_bytes,
        }

    @property
    def figures(self) -> dict[str, int]:
        """Counts for `result.json`."""
        return {
            "hits": self.hits,
            "misses": self.misses,
            "bytes": self.most_bytes,
            "spilled_bytes": self.most_spilled_bytes,
            "damaged": self.damaged,
        }

    def expect(self, *prefixes: tuple[Iterable[Ids], float]) -> None:
        """Announce how often prefixes will be asked for; replaces earlier announcements.

        A prefix without expected uses is stored where there is room, and gives way to one with.
        """
        self._uses = {}
        for group, times in prefixes:
            for ids in group:
                self._uses[ids] = self._uses.get(ids, 0.0) + times

    def get(self, ids: Ids) -> CachedPrefix | None:
        """The prefix of these tokens, if it is stored; counts a hit or a miss, and one use."""
        if ids in self._uses:
            self._uses[ids] = max(self._uses[ids] - 1, 0.0)
        prefix = next((tier.load(ids) for tier in self._tiers if ids in tier.sizes), None)
        if prefix is None:
            self.misses += 1
            return None
        self.hits += 1
        return prefix.to(*self._form)

    def put(self, ids: Ids, prefix: CachedPrefix) -> CachedPrefix:
        """Store a prefix, if it is worth the room; returns it as `get` would."""
        self._form = prefix.keys.device, prefix.keys.dtype
        kept = self.to_storage(prefix)
        if ids not in self:
            self._place(ids, kept, 0)
            self.most_bytes = max(self.most_bytes, self.nbytes)
            self.most_spilled_bytes = max(self.most_spilled_bytes, self.spilled_bytes)
        return prefix if kept is prefix else kept.to(*self._form)

    def to_storage(self, prefix: CachedPrefix) -> CachedPrefix:
        """The prefix in the precision in which it is stored."""
        return prefix.to_half() if self.precision == "half" else prefix

    def clear(self) -> None:
        """Remove every prefix, also those on disk; the counts stay."""
        for tier in self._tiers:
            for ids in list(tier.sizes):
                tier.remove(ids)

    def _place(self, ids: Ids, prefix: CachedPrefix, first: int) -> None:
        """Store a prefix in a tier from the `first` on; evicted ones move further down."""
        for level, tier in enumerate(self._tiers[first:], first):
            if tier.writes and not self._uses.get(ids, 1):
                return  # nothing to be gained by writing it
            evicted = choose_evictions(tier, ids, prefix.nbytes, self._uses)
            if evicted is None:
                continue
            below = [(other, self._evict(tier, other, level)) for other in evicted]
            if tier.store(ids, prefix):
                for other, moved in below:
                    if moved is not None:
                        self._place(other, moved, level + 1)
                return

    def _evict(self, tier: Tier, ids: Ids, level: int) -> CachedPrefix | None:
        """Remove a prefix from a tier; returns it if there is a use for it further down."""
        last = level + 1 == len(self._tiers)
        prefix = None if last or not self._uses.get(ids) else tier.load(ids)
        if ids in tier.sizes:  # a damaged one is gone already
            tier.remove(ids)
        return prefix
