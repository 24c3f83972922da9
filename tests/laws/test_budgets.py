"""Law: where prefixes are stored, and how many, changes no bit of what a run gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embedgrad.evaluation.evaluator import Evaluator, evaluate
from embedgrad.model.prefix_cache import PrefixCache, Spill
from kit_loop import small, train

# Bytes of memory, and of disk if there is one. A prefix of the kit takes about 15 kB.
STORES = {
    "nothing": (0, None),
    "some prefixes": (60_000, None),
    "some on disk": (0, 60_000),
    "some in memory, some on disk": (30_000, 60_000),
    "all on disk": (0, 2**30),
    "all": (2**30, None),
}


def outcome(
    architecture: str, dtype: torch.dtype, prefixes: PrefixCache
) -> tuple[torch.Tensor, object, object]:
    """Rows, dev scores and test scores of a run."""
    made = small(architecture, dtype=dtype).with_cache(prefixes)
    refined = train(made)
    evaluator = Evaluator(made.model, made.sequencer)
    scores = evaluate(evaluator, refined.prompt, made.sequences[4:])
    return refined.prompt.rows, refined.checkpoint.history, scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_a_run_gives_the_same_bits_under_any_budget(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    hits = {}
    expected = None
    for name, (memory, disk) in STORES.items():
        spill = None if disk is None else Spill(tmp_path, disk)
        prefixes = PrefixCache(memory, spill=spill)
        rows, history, scores = outcome(architecture, dtype, prefixes)
        expected = (rows, history, scores) if expected is None else expected
        assert torch.equal(rows, expected[0]), name
        assert history == expected[1], name
        assert scores == expected[2], name
        assert (prefixes.nbytes > 0, prefixes.spilled_bytes > 0) == (memory > 0, bool(disk)), name
        hits[name] = prefixes.hits
    assert hits["nothing"] == 0
    assert 0 < hits["some prefixes"] < hits["all"] == hits["all on disk"]
    assert 0 < hits["some on disk"] < hits["all"]
    assert hits["some prefixes"] <= hits["some in memory, some on disk"] <= hits["all"]


def test_damage_on_the_disk_changes_no_bit(tmp_path: Path) -> None:
    expected = outcome("llama", torch.float32, PrefixCache(2**30))
    prefixes = PrefixCache(0, spill=Spill(tmp_path))
    original, calls = prefixes.get, 0

    def get_from_a_bad_disk(ids: tuple[int, ...]) -> object:
        nonlocal calls
        calls += 1
        paths = sorted(tmp_path.glob("*/*.prefix"))
        if paths and calls % 5 == 0:
            path = paths[calls % len(paths)]
            path.write_bytes(path.read_bytes()[::-1])
        return original(ids)

    prefixes.get = get_from_a_bad_disk  # type: ignore[method-assign, assignment]
    rows, history, scores = outcome("llama", torch.float32, prefixes)
    assert prefixes.damaged > 2
    assert torch.equal(rows, expected[0])
    assert (history, scores) == expected[1:]


@pytest.mark.parametrize("memory", [0, 30_000, 2**30])
def test_half_precision_gives_the_same_bits_under_any_budget(memory: int, tmp_path: Path) -> None:
    exact = outcome("llama", torch.float32, PrefixCache(2**30))
    half = outcome("llama", torch.float32, PrefixCache(2**30, precision="half"))
    spill = Spill(tmp_path, 30_000)
    prefixes = PrefixCache(memory, spill=spill, precision="half")
    found = outcome("llama", torch.float32, prefixes)
    assert torch.equal(found[0], half[0])
    assert found[1:] == half[1:]
    assert not torch.equal(half[0], exact[0])  # it does round
    torch.testing.assert_close(half[0], exact[0], rtol=0.05, atol=0.02)
