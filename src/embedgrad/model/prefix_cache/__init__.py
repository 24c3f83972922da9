"""Prefix cache: stored keys and values, within budgets."""

from embedgrad.model.prefix_cache.budget import budget_bytes
from embedgrad.model.prefix_cache.cache import PrefixCache
from embedgrad.model.prefix_cache.disk_tier import Spill
from embedgrad.model.prefix_cache.memory_tier import CachedPrefix

__all__ = ["CachedPrefix", "PrefixCache", "Spill", "budget_bytes"]
