"""Prefixes on disk: whatever happens to the files, a prefix comes back whole or not at all."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from embedgrad.errors import RecipeError, RunError
from embedgrad.model.prefix_cache import CachedPrefix, PrefixCache, Spill

IDS = (1, 2, 3)


def made(dtype: torch.dtype = torch.float32) -> CachedPrefix:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(3, 2, 7, 4, generator=generator).to(dtype)
    return CachedPrefix(keys, torch.randn(3, 2, 7, 6, generator=generator).to(dtype))


def only_file(spill: Spill) -> Path:
    (path,) = spill.folder.iterdir()
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_prefix_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    spill, prefix = Spill(tmp_path), made(dtype)
    assert spill.store(IDS, prefix)
    assert only_file(spill).stat().st_size == prefix.nbytes == spill.nbytes
    found = spill.load(IDS)
    assert found is not None
    assert torch.equal(found.keys, prefix.keys)
    assert torch.equal(found.values, prefix.values)
    assert (found.keys.dtype, found.values.dtype) == (dtype, dtype)


def test_a_view_comes_back_as_it_looks(tmp_path: Path) -> None:
    spill, wide = Spill(tmp_path), torch.randn(3, 2, 4, 7)
    spill.store(IDS, CachedPrefix(wide.transpose(2, 3), wide.transpose(2, 3)[:, :, :, :2]))
    found = spill.load(IDS)
    assert found is not None
    assert torch.equal(found.keys, wide.transpose(2, 3))


# ---------------------------------------------------------------------------------- damaged files


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swapped(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[4:8] + content[:4] + content[8:])


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "one bit": flipped,
    "two numbers swapped": swapped,
    "cut short": lambda path: os.truncate(path, 5),
    "emptied": lambda path: os.truncate(path, 0),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 4),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "gone": os.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "the folder is gone": lambda path: shutil.rmtree(path.parent),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_a_miss_and_is_told_once(tmp_path: Path, damage: str) -> None:
    notes: list[str] = []
    cache = PrefixCache(0, spill=Spill(tmp_path, report=lambda event: notes.append(event["text"])))
    cache.put(IDS, made())
    (folder,) = tmp_path.iterdir()
    (path,) = folder.iterdir()
    DAMAGES[damage](path)
    assert cache.get(IDS) is None
    assert (cache.damaged, cache.hits, cache.misses, cache.spilled_bytes) == (1, 0, 1, 0)
    assert IDS not in cache
    assert notes == [
        f"prefix_cache.spill: {path} is damaged or gone; such prefixes are computed again, the "
        "results stay the same (reported once)"
    ]
    if folder.exists() and not path.exists():  # the prefix is computed anew, and stored again
        cache.put(IDS, made())
        assert cache.get(IDS) is not None
        (again,) = folder.iterdir()
        flipped(again)
        assert cache.get(IDS) is None
        assert (cache.damaged, len(notes)) == (2, 1)


# -------------------------------------------------------------------------------------- full disks


@contextmanager
def small_files() -> Iterator[None]:
    """No file can grow beyond 1000 bytes, so a write breaks off in the middle.

    Nor can a file that pytest writes to, so nothing may be reported within the block.
    """
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Spill("~/prefixes").folder.parent == tmp_path / "prefixes"


def test_a_write_that_breaks_off_leaves_nothing_and_is_the_last(tmp_path: Path) -> None:
    notes: list[str] = []
    spill = Spill(tmp_path, report=lambda event: notes.append(event["text"]))
    cache = PrefixCache(0, spill=spill)
    cache.put((1,), CachedPrefix(made().keys[:1, :, :2], made().values[:1, :, :2]))
    prefixes = {ids: made() for ids in ((2,), (3,))}
    with small_files():
        for ids, prefix in prefixes.items():
            cache.put(ids, prefix)
    assert [cache.get(ids) for ids in prefixes] == [None, None]
    assert cache.get((1,)) is not None  # what was written stays
    assert cache.spilled_bytes == only_file(spill).stat().st_size < 1000
    assert cache.free == 0  # or prefixes would be computed ahead that cannot be stored
    assert notes == [
        f"prefix_cache.spill: {spill.folder}: {os.strerror(errno.EFBIG)}; from here on prefixes "
        "over the budget are computed again, the results stay the same"
    ]


def test_the_last_share_of_a_disk_stays_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 1_000_000
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: real._replace(total=10_000_000, free=free)
    )
    notes: list[str] = []
    spill = Spill(tmp_path, 0.25, notes.append)
    assert spill.budget == 250_000
    assert spill.store((1,), made())
    free = 500_000 + made().nbytes
    assert spill.store((2,), made())
    free -= 1
    assert not spill.store((3,), made())
    free = 1_000_000
    assert not spill.store((4,), made())
    (note,) = notes
    assert "less than 5 % of the disk is free; from here on" in note["text"]
    assert len(list(spill.folder.iterdir())) == 2


# ------------------------------------------------------------------------------------- the folder


def test_the_folder_is_private_and_goes_with_its_owner(tmp_path: Path) -> None:
    cache = PrefixCache(0, spill=Spill(tmp_path / "new" / "prefixes"))
    cache.put(IDS, made())
    (folder,) = (tmp_path / "new" / "prefixes").iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    cache.clear()
    assert list(folder.iterdir()) == []
    cache.put(IDS, made())
    del cache
    gc.collect()
    assert list((tmp_path / "new" / "prefixes").iterdir()) == []


def test_the_folder_goes_after_an_exception(tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from embedgrad.model.prefix_cache import CachedPrefix, Spill\n"
        "spill = Spill(sys.argv[1])\n"
        "spill.store((1,), CachedPrefix(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)))\n"
        "print(len(list(spill.folder.iterdir())))\n"
        "raise SystemError('a bug')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "1\n")
    assert "a bug" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_goes_at_the_next_start(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, torch\n"
        "from embedgrad.model.prefix_cache import CachedPrefix, Spill\n"
        "spill = Spill(sys.argv[1])\n"
        "spill.store((1,), CachedPrefix(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    machine, pid = left.name.rsplit("-", 2)[:2]
    others = [
        tmp_path / f"{machine}x-{pid}-abc",  # another machine's, whose processes are not known
        tmp_path / f"{machine}-{pid}-1-abc",  # one whose name only begins like ours
        tmp_path / f"{machine}-{10**20}-abc",  # no process
        tmp_path / f"{machine}-{os.getpid()}-abc",  # one that runs
        tmp_path / f"{machine}-{pid}",  # not ours
        tmp_path / "embedgrad-prefixes-abc",
    ]
    for other in others:
        other.mkdir()
    spill = Spill(tmp_path)
    assert set(tmp_path.iterdir()) == {*others, spill.folder}


def test_two_runs_may_share_a_folder(tmp_path: Path) -> None:
    one, other = Spill(tmp_path), Spill(tmp_path)
    one.store(IDS, made())
    other.store(IDS, made(torch.float64))
    found = one.load(IDS)
    assert found is not None
    assert torch.equal(found.keys, made().keys)


@pytest.mark.parametrize("below", ["", "inside"])
def test_a_folder_that_cannot_be_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        RunError, match=r"^prefix_cache\.spill: .*file.*; expected a folder"
    ) as told:
        Spill(tmp_path / "file" / below)
    assert "\n" not in str(told.value)
    assert "leave the option out" in str(told.value)


def test_no_name_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"^prefix_cache\.spill: '.*a.x00b': .*; expected a fold"
    ) as told:
        Spill(tmp_path / "a\0b")
    assert "\n" not in str(told.value)


def test_a_home_of_nobody_is_refused() -> None:
    with pytest.raises(RunError, match=r"^prefix_cache\.spill: '~nobody-here/x': .*home directory"):
        Spill("~nobody-here/x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="Permission denied"):
        Spill(tmp_path)


def test_a_folder_that_refuses_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("os.mkdir", refuse)
    with pytest.raises(RunError, match=r"^prefix_cache\.spill: .*Permission denied.*write to"):
        Spill(tmp_path)


def test_a_budget_of_the_disk_is_refused_by_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^prefix_cache\.spill_budget: 'lots'; expected bytes"):
        Spill(tmp_path, "lots")
    gc.collect()
    assert list(tmp_path.iterdir()) == []
