"""Keys and values of heads, stored within budgets."""

from embedgrad.head_cache.budget import budget_bytes
from embedgrad.head_cache.cache import HeadCache
from embedgrad.head_cache.head import Head
from embedgrad.head_cache.spill import Spill

__all__ = ["Head", "HeadCache", "Spill", "budget_bytes"]
