"""Keys and values of heads, kept within a byte budget.

What stands before the span cannot depend on the span in a causal model, so it is computed once and
reused over steps, epochs, evaluations and candidate prompts. Over the budget a head is computed
anew each time it is needed, with the same result.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import psutil
import torch

from embedgrad.cutting import Ids
from embedgrad.errors import RecipeError

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}


@dataclass(frozen=True, slots=True)
class Head:
    """Keys and values of one head: two tensors of shape [layers, key-value heads, tokens, size]."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def length(self) -> int:
        """Tokens of the head."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.keys.nbytes + self.values.nbytes


class HeadCache:
    """Heads by their token ids, up to `budget` bytes.

    A head that does not fit is not stored, and none is thrown out for it: with the cyclic access of
    training that keeps the share that fits, where least-recently-used would keep nothing.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.nbytes = 0
        self.most_bytes = 0
        self.hits = 0
        self.misses = 0
        self._heads: dict[Ids, Head] = {}

    def __len__(self) -> int:
        return len(self._heads)

    def get(self, ids: Ids) -> Head | None:
        """The head of these tokens, if it is stored; counts a hit or a miss."""
        head = self._heads.get(ids)
        if head is None:
            self.misses += 1
        else:
            self.hits += 1
        return head

    def put(self, ids: Ids, head: Head) -> None:
        """Store a head if it fits into what is left of the budget."""
        if ids not in self._heads and self.nbytes + head.nbytes <= self.budget:
            self._heads[ids] = head
            self.nbytes += head.nbytes
            self.most_bytes = max(self.most_bytes, self.nbytes)

    def clear(self) -> None:
        """Forget every head; the counts stay."""
        self._heads.clear()
        self.nbytes = 0


def budget_bytes(budget: str | float) -> int:
    """Bytes of a budget: a number of bytes, "2 GiB", or a fraction (below 1) of free memory.

    Raises `RecipeError` for anything else.
    """
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", budget)
        unit = _UNITS.get(match[2].lower()) if match else None
        try:
            number = float(match[1]) if match else -1.0
        except ValueError:
            number = -1.0
        if unit is None or number < 0:
            raise RecipeError(
                "head_cache.budget",
                [f"{budget!r}; expected bytes, a size such as '2 GiB', or a fraction below 1"],
            )
        budget = number * unit
    if not math.isfinite(budget):
        raise RecipeError("head_cache.budget", ["expected a finite number of bytes"])
    if budget < 0:
        raise RecipeError("head_cache.budget", [f"{budget}; expected 0 or more"])
    if 0 < budget < 1:
        return int(psutil.virtual_memory().available * budget)
    return int(budget)
