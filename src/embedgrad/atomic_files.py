"""Atomic file writes, digests and locks: nothing is half written.

What a write names aside begins with a dot and ends in a tag; what dies with it is swept later.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from embedgrad.environment import is_running
from embedgrad.errors import EmbedgradError, RunError

LOCK = ".lock"
SEAL = "sha256"  # the entry of a JSON object that holds the digest of the others
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "; free some space"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "; give a folder that you may write to"
    ),
}
_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}  # of systems that show folders
_NODE = re.sub(r"[^A-Za-z0-9]", "", platform.node()) or "node"  # other machines may share a folder


def write_file(path: Path, content: bytes) -> None:
    """Write aside, flush to disk, then rename: the old file or the new one, never half of one.

    Raises `RunError` (a full disk, no permission); then the old file is as it was.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        _make_folder(path.parent)
        _write(aside, content)
        os.replace(aside, path)
    except OSError as error:
        raise RunError(not_written(path, error)) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
    _flush_folder(path.parent)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of files aside, then put it in the place of `folder`.

    Raises `RunError`; then the old folder is as it was. A folder that holds anything but these
    files, the current folder, and what is no folder are refused.
    """
    folder = Path(os.path.abspath(folder))
    tag = uuid.uuid4().hex[:8]
    aside, old = (folder.with_name(f".{folder.name}.{what}-{tag}") for what in ("new", "old"))
    try:
        _refuse_losses(folder, files)
        _make_folder(aside)
        for name, content in files.items():
            _write(aside / name, content)
        _flush_folder(aside)
        if os.path.exists(folder):
            os.replace(folder, old)
        os.replace(aside, folder)
        _flush_folder(folder.parent)  # before the old copy goes
    except OSError as error:
        raise RunError(not_written(folder, error)) from error
    finally:
        # Also after Ctrl-C, between the two renames.
        with contextlib.suppress(OSError):
            if os.path.exists(old) and not os.path.exists(folder):
                os.replace(old, folder)
        shutil.rmtree(aside, ignore_errors=True)
        if os.path.exists(folder):
            shutil.rmtree(old, ignore_errors=True)


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written, before anything is computed. Raises `RunError`."""
    place = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        raise RunError(not_written(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES))))


def remove_file(path: Path) -> None:
    """Remove a file, if it is there. Raises `RunError`."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{path}: cannot be removed ({error.strerror or error})") from error


def restore_folder(folder: Path, check: Callable[[Path], object]) -> None:
    """Put back a copy of a missing folder that a killed `write_folder` left aside, the new first.

    `check` raises an `EmbedgradError` for a copy that is not whole.
    """
    for kind in ("new", "old"):
        for aside in folder.parent.glob(f".{folder.name}.{kind}-*"):
            with contextlib.suppress(OSError, EmbedgradError):
                if not os.path.exists(folder):
                    check(aside)
                    os.replace(aside, folder)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writes left aside in a folder that nobody else writes to."""
    for path in folder.glob(".*"):
        if is_leftover(path) and path.name != LOCK:
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_leftover(path: Path) -> bool:
    """Whether a file has the name of a lock or a write that is under way, or was killed."""
    return re.fullmatch(r"\.lock|\..+\.((new|old)-)?[0-9a-f]{8}", path.name) is not None


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder until the end; a process that dies lets go of it.

    Raises `RunError`, which names the process that holds it.
    """
    path = folder / LOCK
    lock = filelock.FileLock(path)
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise OSError(errno.EINVAL, "is no regular file")
        lock.acquire(blocking=False)
        with contextlib.suppress(OSError):  # Windows lets nobody write to a file with a lock
            path.write_text(str(os.getpid()), encoding="ascii")
    except filelock.Timeout:
        holder = "another process"
        with contextlib.suppress(OSError, ValueError):
            holder = f"process {int(path.read_text(encoding='ascii'))}"
        raise RunError(
            f"{folder}: {holder} is at work in it; wait until it has ended, or end it"
        ) from None
    except OSError as error:
        lock.release()
        raise RunError(not_written(path, error)) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # still held, so that nobody locks a file without a name
            path.unlink()
        lock.release()


@contextlib.contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder in `parent`, removed at the end unless it was renamed.

    Folders of this name that dead processes of this machine left are removed first. Raises
    `OSError`.
    """
    for left in parent.glob(f"{name.replace('[', '[[]')}-{_NODE}-*-*"):
        owner = re.fullmatch(r"(\d{1,9})-[0-9a-f]{8}", left.name[len(name) + len(_NODE) + 2 :])
        if owner and not is_running(int(owner[1])):
            shutil.rmtree(left, ignore_errors=True)
    folder = parent / f"{name}-{_NODE}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(mode=0o700, parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish_folder(folder: Path, place: Path) -> None:
    """Flush a folder of finished files to disk and give it its name. Raises `OSError`."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            _flush_folder(path)
    _flush_folder(folder)
    os.rename(folder, place)
    _flush_folder(place.parent)


def seal(values: Mapping[str, Any], content: bytes = b"") -> dict[str, Any]:
    """The values, and the digest of them and of the `content` of a file beside them."""
    return {**values, SEAL: _digest(values, content)}


def check_seal(values: dict[str, Any], content: bytes = b"") -> None:
    """Take the digest out of sealed values that were read back. Raises `ValueError`."""
    if values.pop(SEAL, None) != _digest(values, content):
        raise ValueError("is not as it was written: the digest differs")


def _digest(values: Mapping[str, Any], content: bytes) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(content + text.encode("utf-8", "surrogatepass")).hexdigest()


def _refuse_losses(folder: Path, files: Mapping[str, bytes]) -> None:
    if not os.path.exists(folder):
        return
    others = sorted(set(os.listdir(folder)) - set(files) - _LITTER)  # OSError where it is no folder
    if others or folder == Path.cwd():
        what = "it is the current folder"
        if others:
            what = f"it holds {', '.join(others[:3])}; move what is yours elsewhere"
        raise RunError(f"{folder}: is not replaced, because {what}; or name a new folder")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write values as JSON, as `write_file` does. Raises `RunError`."""
    text = json.dumps(finite(values), indent=1, ensure_ascii=False, allow_nan=False)
    write_file(path, f"{text}\n".encode())


def to_json_lines(rows: Iterable[Any], default: Callable[[Any], str] | None = None) -> bytes:
    """A JSON value a line; `default` makes texts of values that JSON does not know, as of dates."""
    lines = (json.dumps(finite(row), ensure_ascii=False, default=default) for row in rows)
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")


def finite(value: Any) -> Any:
    """The value with None for every number that is not finite, which JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


def not_written(path: Path, error: OSError) -> str:
    """One line: what, why, and what to do about it."""
    advice = _ADVICE.get(error.errno or 0, "")
    return f"{path}: cannot be written ({error.strerror or error}){advice}"


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, to last."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        _flush_folder(folder.parent)


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make a rename last. Some systems cannot, and the rename itself has happened anyway."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
