"""Whatever fails while something is written, what was there before is still there, whole."""

from __future__ import annotations

import builtins
import errno
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import refusals
from embedgrad import atomic_files as files
from embedgrad.atomic_files import write_file, write_folder
from embedgrad.errors import RunError
from embedgrad.prompt import artifact
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.training.checkpoint import Checkpoint
from kit import DAY, kit, noisy

refused = functools.partial(refusals.refused, error=RunError)


class FullDisk:
    """Operations on files fail from the `first`th on, or only that one."""

    def __init__(self, first: int, *, lasting: bool):
        self.first, self.lasting = first, lasting
        self.count = 0
        self.failed: list[str] = []

    def check(self, name: str) -> None:
        self.count += 1
        # A rename takes no room, so a disk that stays full still allows it.
        due = self.count >= self.first and name != "replace" if self.lasting else False
        if due or self.count == self.first:
            self.failed.append(name)
            raise OSError(errno.ENOSPC, "No space left on device")

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any, **kwargs: Any) -> Any:
            self.check(name)
            return function(*args, **kwargs)

        return checked

    def open(self, path: Any, mode: str = "r", **options: Any) -> Any:
        self.check("open")
        file = builtins.open(path, mode, **options)  # noqa: SIM115
        if "w" in mode:
            write = file.write

            def half(content: bytes) -> int:
                try:
                    self.check("write")
                except OSError:
                    write(content[: len(content) // 2])
                    raise
                return int(write(content))

            return _Half(file, half)
        return file


class _Half:
    """A file whose write is another."""

    def __init__(self, file: Any, write: Callable[[bytes], int]):
        self._file, self.write = file, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Half:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def let_everything_fail(
    monkeypatch: pytest.MonkeyPatch,
    *,
    lasting: bool,
    reset: Callable[[], object],
    write: Callable[[], object],
    old: Callable[[], bool],
    new: Callable[[], bool],
) -> set[str]:
    """Let each operation fail in turn; what is there afterwards is the old or the new, whole.

    Returns names of the operations whose failure was reported.
    """
    reported: set[str] = set()
    for first in range(1, 40):
        reset()
        disk = FullDisk(first, lasting=lasting)
        with monkeypatch.context() as patch:
            patch.setattr(files, "open", disk.open, raising=False)
            patch.setattr(os, "fsync", disk.wrap("fsync", os.fsync))
            patch.setattr(os, "replace", disk.wrap("replace", os.replace))
            patch.setattr(os, "mkdir", disk.wrap("mkdir", os.mkdir))
            try:
                write()
                error = ""
            except RunError as refusal:
                error = str(refusal)
        if error:
            assert "No space left on device" in error
            assert error.isprintable()
            assert old()
            reported.add(disk.failed[0])
        else:
            assert new()
            # Flushing a folder makes a rename last; that it failed takes nothing back.
            assert set(disk.failed) <= {"fsync"}
            if not disk.failed:
                return reported
    raise AssertionError("it never worked")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def prompt() -> PromptEmbedding:
    made = kit(dtype=torch.float32)
    return PromptEmbedding(
        template=made.sequencer.renderer.template,
        target=made.sequencer.target,
        spans=made.sequencer.spans,
        date=DAY,
        start_rows=made.start,
        rows=made.start,
    )


@pytest.mark.parametrize("lasting", [False, True])
def test_a_full_disk_leaves_the_old_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: PromptEmbedding, lasting: bool
) -> None:
    refined = prompt.with_rows(noisy(prompt.rows))
    folder = tmp_path / "prompt"

    def holds(rows: Tensor) -> bool:
        return (
            torch.equal(artifact.load(folder).rows, rows)
            and os.listdir(tmp_path) == ["prompt"]
            and sorted(os.listdir(folder)) == ["prompt.json", "prompt.safetensors"]
        )

    reported = let_everything_fail(
        monkeypatch,
        lasting=lasting,
        reset=lambda: artifact.save(prompt, folder),
        write=lambda: artifact.save(refined, folder),
        old=lambda: holds(prompt.rows),
        new=lambda: holds(refined.rows),
    )
    assert reported == {"mkdir", "open", "write", "fsync", "replace"}


@pytest.mark.parametrize("lasting", [False, True])
def test_a_full_disk_leaves_nothing_where_nothing_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lasting: bool
) -> None:
    folder = tmp_path / "new"
    let_everything_fail(
        monkeypatch,
        lasting=lasting,
        reset=lambda: shutil.rmtree(folder, ignore_errors=True),
        write=lambda: write_folder(folder, {"a": b"1234", "b": b"5678"}),
        old=lambda: os.listdir(tmp_path) == [],
        new=lambda: contents(tmp_path) == {"new/a": b"1234", "new/b": b"5678"},
    )


@pytest.mark.parametrize("lasting", [False, True])
def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lasting: bool
) -> None:
    path = tmp_path / "result.json"
    reported = let_everything_fail(
        monkeypatch,
        lasting=lasting,
        reset=lambda: write_file(path, b"old"),
        write=lambda: write_file(path, b"new"),
        old=lambda: contents(tmp_path) == {"result.json": b"old"},
        new=lambda: contents(tmp_path) == {"result.json": b"new"},
    )
    assert {"open", "write", "fsync", "replace"} <= reported


def test_an_interruption_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "state"
    write_folder(folder, {"a": b"old"})
    replace = os.replace

    for at in range(1, 8):
        calls = 0

        def interrupted(*args: Any, at: int = at) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt
            replace(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", interrupted)
            try:
                write_folder(folder, {"a": b"new"})
            except KeyboardInterrupt:
                assert (folder / "a").read_bytes() == b"old"
                assert list(tmp_path.iterdir()) == [folder]
            else:
                break
    assert at > 1
    assert (folder / "a").read_bytes() == b"new"


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("is_whole", [True, False])
def test_a_killed_write_hides_no_folder(tmp_path: Path, at: int, is_whole: bool) -> None:
    """A process that dies at a rename cleans up nothing: the new copy comes back, or the old."""
    folder = tmp_path / "prompt"
    write_folder(folder, {"a": b"old"})
    if os.fork() == 0:
        calls, replace = iter(range(1, 9)), os.replace
        os.replace = lambda a, b: os._exit(9) if next(calls) == at else replace(a, b)  # type: ignore[assignment, func-returns-value]
        write_folder(folder, {"a": b"new"})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 9
    assert folder.exists() == (at == 1)
    (aside,) = tmp_path.glob(".prompt.new-*")
    if not is_whole:
        (aside / "a").write_bytes(b"half")

    def check(copy: Path) -> None:
        if (copy / "a").read_bytes() not in (b"old", b"new"):
            raise RunError("not whole")

    files.restore_folder(folder, check)
    assert (folder / "a").read_bytes() == (b"new" if at == 2 and is_whole else b"old")
    (tmp_path / ".result.json.0123abcd").write_bytes(b"half")
    (tmp_path / ".keep").write_bytes(b"not ours")
    files.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".keep", "prompt"]


def test_a_path_that_cannot_be_is_refused(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"x")
    for write in (
        lambda: write_file(blocked / "inside", b"y"),
        lambda: write_file(tmp_path / ("n" * 300), b"y"),
        lambda: write_folder(blocked / "inside", {"a": b"y"}),
        lambda: write_folder(tmp_path / ("n" * 300), {"a": b"y"}),
        lambda: write_folder(blocked, {"a": b"y"}),
    ):
        with refused("cannot be written"):
            write()
    assert blocked.read_bytes() == b"x"
    assert list(tmp_path.iterdir()) == [blocked]


def test_what_else_is_in_a_folder_is_not_lost(tmp_path: Path, prompt: PromptEmbedding) -> None:
    home = tmp_path / "home"
    (home / "papers").mkdir(parents=True)
    (home / "papers" / "thesis.tex").write_text("years of work")
    (home / ".DS_Store").touch()  # macOS leaves one in every folder that it shows
    with refused("home", "it holds papers; move what is yours elsewhere; or name a new folder"):
        artifact.save(prompt, home)
    (home / ".DS_Store").unlink()
    assert contents(tmp_path) == {"home/papers/thesis.tex": b"years of work"}
    write_folder(tmp_path / "shown", {"a": b"1"})
    (tmp_path / "shown" / ".DS_Store").touch()
    write_folder(tmp_path / "shown", {"a": b"2"})
    assert (tmp_path / "shown" / "a").read_bytes() == b"2"


def test_the_current_folder_can_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with refused("current folder"):
        write_folder(Path(), {"a": b"1"})
    write_folder(Path("sub"), {"a": b"1"})
    assert (tmp_path / "here" / "sub" / "a").read_bytes() == b"1"


def test_a_checkpoint_survives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.arange(6.0).view(2, 3)
    optimizer = {
        "state": {0: {"step": torch.tensor(3.0), "average": rows}},
        "param_groups": [{"params": [0], "lr": 0.1}],
    }
    scores = [{"step": 2, "accuracy": 0.5, "log_loss": 0.5}]
    old = Checkpoint(3, {"change": rows}, optimizer, {"span": rows + 1}, [], 2, scores)
    new = Checkpoint(4, {"change": rows * 2}, optimizer, {"span": rows}, [], 4, [])
    folder = tmp_path / "checkpoint"

    def holds(expected: Checkpoint) -> bool:
        found = Checkpoint.load(folder)
        average = found.optimizer["state"][0]["average"]
        return (
            (found.step, found.best_step, found.history)
            == (expected.step, expected.best_step, expected.history)
            and torch.equal(found.theta["change"], expected.theta["change"])
            and torch.equal(found.best["span"], expected.best["span"])
            and torch.equal(average, rows)
            and os.listdir(tmp_path) == ["checkpoint"]
        )

    let_everything_fail(
        monkeypatch,
        lasting=True,
        reset=lambda: old.save(folder),
        write=lambda: new.save(folder),
        old=lambda: holds(old),
        new=lambda: holds(new),
    )
