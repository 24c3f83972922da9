"""The store of heads keeps to its budget; a budget is read or refused."""

from __future__ import annotations

import math

import psutil
import pytest
import torch

from embedgrad.errors import RecipeError
from embedgrad.head_cache import Head, HeadCache, budget_bytes


def head(tokens: int) -> Head:
    """A head of 64 bytes per token."""
    return Head(torch.zeros(2, 2, tokens, 2), torch.zeros(2, 2, tokens, 2))


def test_a_head_knows_its_size() -> None:
    assert (head(3).length, head(3).nbytes) == (3, 192)


def test_what_fits_stays_and_what_does_not_is_left_out() -> None:
    cache = HeadCache(64 * 5)
    for ids, tokens in (((1,), 2), ((2,), 4), ((3,), 3), ((4,), 1)):
        cache.put(ids, head(tokens))
    assert (len(cache), cache.nbytes) == (2, 64 * 5)
    assert cache.get((1,)) is not None
    assert cache.get((2,)) is None
    assert cache.get((3,)) is not None
    assert (cache.hits, cache.misses) == (2, 1)
    cache.put((1,), head(1))
    assert cache.nbytes == 64 * 5
    cache.clear()
    assert (len(cache), cache.nbytes, cache.hits) == (0, 0, 2)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0, 0),
        (1, 1),
        (1e9, 10**9),
        ("0", 0),
        ("2 GiB", 2 * 2**30),
        ("1.5kB", 1500),
        (" 7 MB ", 7 * 10**6),
        ("512b", 512),
    ],
)
def test_a_budget_is_read(budget: str | float, expected: int) -> None:
    assert budget_bytes(budget) == expected


@pytest.mark.parametrize("budget", [0.25, "0.25"])
def test_a_share_is_one_of_free_memory(
    monkeypatch: pytest.MonkeyPatch, budget: str | float
) -> None:
    free = psutil.virtual_memory()._replace(available=4000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert budget_bytes(budget) == 1000


@pytest.mark.parametrize(
    "budget", [-1, -0.5, math.nan, math.inf, "", "much", "2 parsecs", "-1", "1.2.3", "inf", "GiB"]
)
def test_a_budget_that_cannot_be_is_refused(budget: str | float) -> None:
    with pytest.raises(RecipeError, match=r"head_cache\.budget: .*expected") as caught:
        budget_bytes(budget)
    assert "\n" not in str(caught.value)
