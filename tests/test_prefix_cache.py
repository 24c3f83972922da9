"""The store of prefixes keeps to its budgets, and what stays is what is needed most."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedgrad.errors import RecipeError
from embedgrad.model.prefix_cache import CachedPrefix, PrefixCache, Spill, budget_bytes


def prefix(tokens: int, number: float = 0.0, dtype: torch.dtype = torch.float32) -> CachedPrefix:
    """A prefix of 64 bytes per token in float32; keys and values are of different size."""
    keys = torch.full((2, 2, tokens, 3), number, dtype=dtype)
    return CachedPrefix(keys, torch.full((2, 2, tokens, 1), -number, dtype=dtype))


def ask(cache: PrefixCache, ids: int, tokens: int = 1) -> bool:
    """Get a prefix, or store it anew; whether it was stored."""
    found = cache.get((ids,))
    if found is None:
        cache.put((ids,), prefix(tokens, ids))
    else:
        assert torch.equal(found.keys, prefix(tokens, ids).keys)
        assert torch.equal(found.values, prefix(tokens, ids).values)
    return found is not None


def stored(cache: PrefixCache) -> list[int]:
    return [ids for ids in range(100) if (ids,) in cache]


def test_a_prefix_knows_its_size() -> None:
    assert (prefix(3).length, prefix(3).nbytes) == (3, 192)


def test_what_fits_stays_and_what_does_not_is_left_out() -> None:
    cache = PrefixCache(64 * 5)
    for ids, tokens in (((1,), 2), ((2,), 4), ((3,), 3), ((4,), 1)):
        cache.put(ids, prefix(tokens))
    assert (len(cache), cache.nbytes) == (2, 64 * 5)
    assert cache.get((1,)) is not None
    assert cache.get((2,)) is None
    assert cache.get((3,)) is not None
    assert (cache.hits, cache.misses) == (2, 1)
    cache.put((1,), prefix(1))
    assert cache.nbytes == 64 * 5
    cache.clear()
    assert (len(cache), cache.nbytes, cache.hits, cache.most_bytes) == (0, 0, 2, 64 * 5)


def test_a_view_is_stored_without_what_it_is_a_view_of() -> None:
    cache, batch = PrefixCache(2**20), torch.rand(2, 50, 2, 4, 3)
    cache.put((1,), CachedPrefix(batch[:, 7], batch[:, 8]))
    found = cache.get((1,))
    assert found is not None
    assert torch.equal(found.keys, batch[:, 7])
    assert found.keys.untyped_storage().nbytes() == found.keys.nbytes


# ------------------------------------------------------------------------------------- what stays


def test_cyclic_access_keeps_the_share_that_fits() -> None:
    cache = PrefixCache(64 * 3)
    cache.expect(([(ids,) for ids in range(6)], 4))
    for _ in range(4):
        for ids in range(6):
            ask(cache, ids)
    assert (cache.hits, cache.misses) == (3 * 3, 6 + 3 * 3)


def test_a_tie_keeps_what_is_stored_also_where_more_would_fit() -> None:
    cache = PrefixCache(64 * 4)
    cache.expect(([(1,), (2,)], 3))
    cache.put((1,), prefix(3))
    cache.put((2,), prefix(4))
    assert stored(cache) == [1]


def test_prefixes_that_are_asked_for_more_often_push_others_out() -> None:
    cache = PrefixCache(64 * 3)
    cache.expect(([(1,), (2,), (3,)], 2), ([(4,), (5,)], 5))
    for ids in (1, 2, 3, 4, 5):
        ask(cache, ids)
    assert {4, 5} < set(stored(cache))
    assert cache.nbytes == 64 * 3


def test_a_prefix_that_nobody_expects_takes_free_room_and_gives_way() -> None:
    cache = PrefixCache(64 * 2)
    cache.expect(([(1,), (2,)], 2))
    ask(cache, 8)
    ask(cache, 1)
    ask(cache, 9)
    assert stored(cache) == [1, 8]
    ask(cache, 2)
    assert stored(cache) == [1, 2]


def test_prefixes_that_are_used_up_give_way() -> None:
    cache = PrefixCache(64 * 2)
    cache.expect(([(1,), (2,)], 2), ([(3,), (4,)], 2))
    for ids in (1, 2, 1, 2):
        ask(cache, ids)
    assert stored(cache) == [1, 2]
    for ids in (3, 4):
        ask(cache, ids)
    assert stored(cache) == [3, 4]


def test_what_was_expected_before_is_void() -> None:
    cache = PrefixCache(64 * 2)
    cache.expect(([(1,), (2,)], 9))
    for ids in (1, 2):
        ask(cache, ids)
    cache.expect(([(3,), (4,)], 2))
    for ids in (3, 4):
        ask(cache, ids)
    assert stored(cache) == [3, 4]


def test_a_prefix_named_twice_is_expected_twice_as_often() -> None:
    cache = PrefixCache(64)
    cache.expect(([(1,)], 3), ([(2,)], 2), ([(2,)], 2))
    ask(cache, 1)
    ask(cache, 2)
    assert stored(cache) == [2]


def test_uses_count_by_the_byte() -> None:
    # Three prefixes of two uses each save more than one of their size that is used three times.
    cache = PrefixCache(64 * 4)
    cache.expect(([(1,), (2,), (3,), (4,)], 3), ([(5,)], 4))
    for ids in (1, 2, 3, 4):
        ask(cache, ids)
    cache.get((5,))
    cache.put((5,), prefix(5))
    assert stored(cache) == [1, 2, 3, 4]  # too large
    cache.expect(([(1,), (2,), (3,), (4,)], 2), ([(5,)], 2.9))
    cache.put((5,), prefix(2))
    assert stored(cache) == [3, 4, 5]
    cache.expect(([(3,), (4,)], 2), ([(5,)], 1), ([(6,)], 1.5))
    cache.put((6,), prefix(1))
    assert stored(cache) == [3, 4, 5]  # 1.5 uses of 64 bytes against 1 of 128


# ------------------------------------------------------------------------------ memory, then disk


def test_what_is_pushed_out_of_memory_goes_to_disk_while_it_is_needed(tmp_path: Path) -> None:
    cache = PrefixCache(64 * 2, spill=Spill(tmp_path, 2**20))
    cache.expect(([(1,), (2,)], 3), ([(3,), (4,)], 9))
    for ids in (1, 2, 3, 4):
        ask(cache, ids)
    assert stored(cache) == [1, 2, 3, 4]
    assert (cache.nbytes, cache.spilled_bytes) == (64 * 2, 64 * 2)
    assert all(ask(cache, ids) for ids in (1, 2, 3, 4))
    cache.clear()
    cache.expect(([(1,), (2,)], 1), ([(3,), (4,)], 9))
    for ids in (1, 2, 3, 4):
        ask(cache, ids)
    assert (stored(cache), cache.spilled_bytes) == ([3, 4], 0)  # used up: not worth a file


def test_what_nobody_expects_any_more_is_not_moved_to_disk(tmp_path: Path) -> None:
    cache = PrefixCache(64, spill=Spill(tmp_path, 2**20))
    cache.expect(([(1,)], 9))
    ask(cache, 1)
    cache.expect(([(2,)], 2))
    ask(cache, 2)
    assert (stored(cache), cache.spilled_bytes) == ([2], 0)


def test_a_prefix_on_its_last_use_is_not_written(tmp_path: Path) -> None:
    cache = PrefixCache(0, spill=Spill(tmp_path, 2**20))
    cache.expect(([(1,)], 1), ([(2,)], 2))
    for ids in (1, 2, 3):
        ask(cache, ids)
    assert stored(cache) == [2, 3]  # of 3 nothing is known


def test_the_disk_has_a_budget_too(tmp_path: Path) -> None:
    cache = PrefixCache(64, spill=Spill(tmp_path, 128))
    cache.expect(([(1,), (2,), (3,), (4,)], 4), ([(5,)], 8))
    for ids in (1, 2, 3, 4):
        ask(cache, ids)
    assert stored(cache) == [1, 2, 3]
    ask(cache, 5)
    assert (len(cache), cache.spilled_bytes) == (3, 128)
    assert (5,) in cache
    assert cache.room == 64 + 128
    assert cache.figures == {
        "hits": 0,
        "misses": 5,
        "bytes": 64,
        "spilled_bytes": 128,
        "damaged": 0,
    }


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    budget=st.integers(0, 12),
    disk=st.none() | st.integers(0, 12),
    expected=st.dictionaries(st.integers(0, 9), st.integers(0, 4)),
    asked=st.lists(st.integers(0, 9), max_size=40),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_no_order_of_calls_breaks_a_budget_or_a_prefix(
    tmp_path: Path,
    budget: int,
    disk: int | None,
    expected: dict[int, int],
    asked: list[int],
    dtype: torch.dtype,
) -> None:
    spill = None if disk is None else Spill(tmp_path, 64 * disk)
    cache = PrefixCache(64 * budget, spill=spill)
    cache.expect(*(([(ids,)], uses) for ids, uses in expected.items()))
    for ids in asked:
        made, found = prefix(1 + ids % 4, ids, dtype), cache.get((ids,))
        if found is None:
            found = cache.put((ids,), made)
        assert torch.equal(found.keys, made.keys)
        assert torch.equal(found.values, made.values)
        assert found.keys.dtype == dtype
        assert cache.nbytes <= 64 * budget
        assert cache.spilled_bytes <= 64 * (disk or 0)
    assert cache.hits + cache.misses == len(asked)
    files = sum(1 for _ in spill.folder.iterdir()) if spill else 0
    assert files == (0 if spill is None else len(spill.sizes))
    cache.clear()
    assert cache.nbytes == cache.spilled_bytes == 0


# --------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("place", ["memory", "disk", "nowhere"])
def test_half_precision_rounds_alike_stored_or_not(
    tmp_path: Path, dtype: torch.dtype, place: str
) -> None:
    made = CachedPrefix(torch.randn(2, 2, 5, 3, dtype=dtype), torch.randn(2, 2, 5, 1, dtype=dtype))
    budget = {"memory": 80 * 2, "disk": 0, "nowhere": 0}[place]
    spill = Spill(tmp_path, 2**20) if place == "disk" else None
    cache = PrefixCache(budget, spill=spill, precision="half")
    given_back = cache.put((1,), made)
    assert given_back.keys.dtype == dtype
    assert torch.equal(given_back.keys, made.keys.half().to(dtype))
    assert torch.equal(given_back.values, made.values.half().to(dtype))
    assert cache.nbytes + cache.spilled_bytes == (0 if place == "nowhere" else 80 * 2)
    found = cache.get((1,))
    assert (found is None) == (place == "nowhere")
    if found is not None:
        assert torch.equal(found.keys, given_back.keys)
        assert torch.equal(found.values, given_back.values)


def test_half_precision_holds_what_float16_cannot(tmp_path: Path) -> None:
    keys, values = torch.full((1, 1, 2, 2), 1e6), torch.full((1, 1, 2, 2), 1.0 + 2**-9)
    for cache in (
        PrefixCache(100, precision="half"),
        PrefixCache(0, spill=Spill(tmp_path, 100), precision="half"),
    ):
        cache.put((1,), CachedPrefix(keys, values))
        found = cache.get((1,))
        assert found is not None
        assert torch.equal(found.keys, keys.bfloat16().float())
        assert torch.equal(found.values, values)  # bfloat16 would lose it


def test_half_precision_leaves_a_model_in_half_precision_as_it_is() -> None:
    made = prefix(3, 1.5, torch.bfloat16)
    cache = PrefixCache(2**20, precision="half")
    assert cache.put((1,), made).keys is made.keys
    assert cache.nbytes == made.nbytes


# ----------------------------------------------------------------------------------------- budgets


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
        ("1.5 TiB", 3 * 2**39),
        ("2 TB", 2 * 10**12),
        ("0.5 B", 0),  # no share of what is free
        (10**400, 10**400),
    ],
)
def test_a_budget_is_read(budget: str | float, expected: int) -> None:
    assert budget_bytes(budget) == expected


@pytest.mark.parametrize("budget", [0.25, "0.25", ".25"])
def test_a_share_is_one_of_free_memory(
    monkeypatch: pytest.MonkeyPatch, budget: str | float
) -> None:
    free = psutil.virtual_memory()._replace(available=4000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert budget_bytes(budget) == 1000
    cache = PrefixCache.on(torch.device("cpu"), budget)
    assert (cache.budget, cache.room) == (1000, 1000)


def test_on_a_gpu_a_share_is_one_of_its_own_memory_and_the_rest_is_pinned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = psutil.virtual_memory()._replace(available=4000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (800, 10_000))
    cache = PrefixCache.on(torch.device("cuda"), 0.25)
    assert (cache.budget, cache.room) == (200, 200 + 1000)
    assert PrefixCache.on(torch.device("cuda"), 0).room == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_fetches_from_pinned_memory_what_it_has_no_room_for(tmp_path: Path) -> None:
    prefixes = {
        (i,): CachedPrefix(*(torch.rand(2, 2, 4, 3, device="cuda") for _ in "kv")) for i in range(4)
    }
    size = prefixes[0,].nbytes
    cache = PrefixCache(size, host=2 * size, spill=Spill(tmp_path, size))
    for ids, made in prefixes.items():
        cache.put(ids, made)
    assert (cache.nbytes, cache.spilled_bytes) == (3 * size, size)
    for ids, made in prefixes.items():
        found = cache.get(ids)
        assert found is not None
        assert found.keys.is_cuda
        assert torch.equal(found.keys, made.keys)
        assert torch.equal(found.values, made.values)


NO_BUDGETS = (-1, -0.5, 1.0, math.nan, math.inf, None, True, [1])
NO_TEXTS = ("", ".", "..5", 400 * "9", "much", "2 parsecs", "-1", "1.0", "1.2.3", "inf", "GiB")


@pytest.mark.parametrize("budget", [*NO_BUDGETS, *NO_TEXTS])
def test_a_budget_that_cannot_be_is_refused(budget: Any) -> None:
    with pytest.raises(RecipeError, match=r"prefix_cache\.budget: .*expected") as caught:
        budget_bytes(budget)
    assert "\n" not in str(caught.value)
