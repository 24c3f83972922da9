"""Keys and values of heads, stored within budgets."""

from embedgrad.model.prefix_cache.budget import budget_bytes
from embedgrad.model.prefix_cache.cache import HeadCache
from embedgrad.model.prefix_cache.disk_tier import Spill
from embedgrad.model.prefix_cache.entry import Head

__all__ = ["Head", "HeadCache", "Spill", "budget_bytes"]
