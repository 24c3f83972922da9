"""A disk whose operations are listed, that dies at any of them, and forgets what is not synced."""

from __future__ import annotations

import builtins
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from embedgrad import atomic_files


class Death(BaseException):
    """The process is gone: nothing that it still does has an effect."""


@dataclass
class Disk:
    """Lists the operations of `atomic_files`, and dies before, at or after one of them.

    `torn` is the share of its bytes that the write at which it dies leaves.
    """

    dies_at: int | None = None
    after: bool = False
    torn: float | None = None
    error: Callable[[int], OSError | None] = lambda number: None
    log: list[tuple[str, Path, Any]] = field(default_factory=list)
    dead: bool = False

    def do(self, name: str, path: Any, more: Any, act: Callable[[], Any]) -> Any:
        if self.dead:
            raise Death
        number = len(self.log)
        self.log.append((name, Path(path), more))
        if (error := self.error(number)) and name not in ("flush", "rmtree"):  # theirs are ignored
            raise error
        if number != self.dies_at:
            return act()
        self.dead = True
        if self.torn is not None and name == "write":
            Path(path).write_bytes(more[: int(self.torn * len(more))])
        elif self.after and hasattr(made := act(), "close"):
            made.close()
        raise Death

    def open(self, path: Any, mode: str = "r", **options: Any) -> Any:
        if mode != "wb":
            return builtins.open(path, mode, **options)
        file = self.do("open", path, None, lambda: builtins.open(path, mode, **options))  # noqa: SIM115
        return _File(self, path, file)

    @contextmanager
    def mounted(self) -> Iterator[Disk]:
        """Within it, what `atomic_files` does passes through here."""
        plain = {
            "replace": os.replace,
            "rename": os.rename,
            "mkdir": os.mkdir,
            "unlink": Path.unlink,
            "rmtree": shutil.rmtree,
            "flush": atomic_files._flush_folder,
        }

        def rename(name: str) -> Callable[..., Any]:
            return lambda a, b: self.do("rename", a, Path(b), lambda: plain[name](a, b))

        def other(name: str) -> Callable[..., Any]:
            return lambda path, *args, **options: self.do(
                name, path, None, lambda: plain[name](path, *args, **options)
            )

        with (
            mock.patch.object(atomic_files, "open", self.open, create=True),
            mock.patch.object(os, "replace", rename("replace")),
            mock.patch.object(os, "rename", rename("rename")),
            mock.patch.object(os, "mkdir", other("mkdir")),
            mock.patch.object(Path, "unlink", other("unlink")),
            mock.patch.object(shutil, "rmtree", other("rmtree")),
            mock.patch.object(atomic_files, "_flush_folder", other("flush")),
            mock.patch.object(os, "fsync"),
        ):
            yield self


class _File:
    def __init__(self, disk: Disk, path: Any, file: Any):
        self.disk, self.path, self.file = disk, path, file

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, content: bytes) -> Any:
        return self.disk.do("write", self.path, content, lambda: self.file.write(content))

    def flush(self) -> None:
        self.file.flush()

    def fileno(self) -> Any:
        # What is written is flushed to disk next.
        self.disk.do("fsync", self.path, None, lambda: None)
        return self.file.fileno()


Tree = dict[str, bytes]
FOLDER = -1


def after_power_loss(log: list[tuple[str, Path, Any]], root: Path, draw: random.Random) -> Tree:
    """The files below `root` after these operations and a power loss, with random damage.

    Of a file that was not synced any bytes may be there; an entry of a folder that was not synced
    since may be missing. Entries of one folder reach the disk in order, those of several in any.
    """
    content: dict[int, bytes] = {FOLDER: b""}
    synced: set[int] = set()
    names: dict[str, int] = {}  # as the process sees them
    pending: dict[str, list[tuple[str, str, int | str]]] = {}  # by folder, in order
    durable: dict[str, int] = {}

    def below(path: str, table: dict[str, int]) -> list[str]:
        return [name for name in table if name == path or name.startswith(f"{path}/")]

    def apply(table: dict[str, int], kind: str, path: str, more: int | str) -> None:
        if kind == "add" and isinstance(more, int):
            table[path] = more
        elif kind == "rename" and isinstance(more, str):
            for name in below(path, table):
                table[more + name.removeprefix(path)] = table.pop(name)
        elif kind == "remove":
            for name in below(path, table):
                del table[name]

    for name, path, more in log:
        at = str(path)
        if name == "mkdir":
            if at not in names:
                names[at] = FOLDER
                pending.setdefault(str(path.parent), []).append(("add", at, FOLDER))
        elif name == "open":
            number = len(content)
            content[number] = b""
            names[at] = number
            pending.setdefault(str(path.parent), []).append(("add", at, number))
        elif name == "write":
            content[names[at]] = more
        elif name == "fsync":
            synced.add(names[at])
        elif name == "rename":
            apply(names, "rename", at, str(more))
            pending.setdefault(str(path.parent), []).append(("rename", at, str(more)))
        elif name in ("rmtree", "unlink"):
            if not below(at, names):
                continue
            apply(names, "remove", at, "")
            pending.setdefault(str(path.parent), []).append(("remove", at, ""))
        elif name == "flush":
            for entry in pending.pop(at, []):
                apply(durable, *entry)
    for entries in draw.sample(list(pending.values()), len(pending)):
        for entry in entries[: draw.randint(0, len(entries))]:
            apply(durable, *entry)
    tree: Tree = {}
    for at, number in durable.items():
        folders = [str(p) for p in Path(at).parents if p.is_relative_to(root) and p != root]
        if number == FOLDER or any(durable.get(folder) != FOLDER for folder in folders):
            continue
        whole = content[number]
        if number not in synced:
            damage = draw.choice(("empty", "cut", "zeros", "garbled", "whole"))
            cut = draw.randint(0, len(whole))
            if damage == "empty":
                whole = b""
            elif damage == "cut":
                whole = whole[:cut]
            elif damage == "zeros":
                whole = whole[:cut] + bytes(len(whole) - cut)
            elif damage == "garbled":
                whole = whole[:cut] + draw.randbytes(len(whole) - cut)
        tree[os.path.relpath(at, root)] = whole
    return tree


def write_tree(tree: Tree, root: Path) -> None:
    """Make `root` hold these files and no others."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for name, content in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
