"""Cases in which every two values of three lists meet, without every three."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any


def pairwise(first: Sequence[Any], second: Sequence[Any], third: Sequence[Any]) -> list[Any]:
    """All of `first` x `second`, each with a value of `third` by turns.

    A fault of two values that do not go together is found as by the whole product.
    """
    cases = [
        (a, b, third[(i + j) % len(third)])
        for (i, a), (j, b) in product(enumerate(first), enumerate(second))
    ]
    # Values are told apart by their places: some are equal to others, or have no hash.
    assert min(len(first), len(second)) >= len(third), "the third list is to be the shortest"
    return cases
