"""Read files of strangers: regular ones only, of bounded size.

A pipe would be waited for without end, a device read without end, and a few bytes of JSON can take
a hundred times as much memory. Problems are `ValueError` and `OSError`, which names the file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from io import BufferedReader, BufferedWriter
from typing import Any, BinaryIO

LARGEST_FILE = 2**31  # bytes of data, rows and events
LARGEST_TEXT = 2**26  # bytes of a file that a person or a program of ours wrote
MOST_VALUES = 2**20  # in one document of JSON: lists, objects and their members
MOST_VALUES_OF_ROWS = 2**24  # in one of rows and answers
LONGEST_LINE = 2**26  # bytes
DEEPEST = 64  # nested values, and parts of a dotted name in TOML

_NO_NAME = re.compile(
    r"""\"{3}(?:[^\\]|\\.)*?\"{3}|'{3}.*?'{3}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|\#[^\n]*""", re.S
)
_LONG_NAME = re.compile(rf"(?:\.[^.,=\n\[\]]*){{{DEEPEST}}}")


def most_unpacked(length: int) -> int:
    """Bytes that data of strangers may take where they are packed into `length` bytes."""
    return 2**26 + 64 * length


def open_regular(path: str | os.PathLike[str], most: int | None = None) -> BufferedReader:
    """Open a file of at most `most` bytes. Raises `OSError`, also for a pipe and a device."""
    try:
        # Without O_NONBLOCK the opening of a pipe would wait for a writer.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags)
    except ValueError:  # a NUL in its name
        raise OSError(errno.EINVAL, "is no name of a file", path) from None
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and (most is None or found.st_size <= most):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "is no regular file", path)
    raise OSError(errno.EFBIG, f"is larger than {most:,} bytes", path)


def open_to_append(path: str | os.PathLike[str]) -> BufferedWriter:
    """Open a file to write at its end, which makes it. Raises `OSError`, also for a pipe."""
    if os.path.exists(path) and stat.S_ISFIFO(os.stat(path).st_mode):  # it waits for a reader
        raise OSError(errno.EINVAL, "is no regular file", path)
    return open(path, "ab")


def read_bytes(path: str | os.PathLike[str], most: int = LARGEST_TEXT) -> bytes:
    """A whole file of at most `most` bytes. Raises `OSError`."""
    with open_regular(path, most) as file:
        return file.read(os.fstat(file.fileno()).st_size)  # `most` would be taken from memory


def read_part(file: BinaryIO) -> Iterator[bytes]:
    """The lines of an open file, of which a part is wanted. Raises `OSError` where it is large."""
    left = LARGEST_FILE
    for line in iter(partial(file.readline, LONGEST_LINE), b""):
        if (left := left - len(line)) < 0:
            raise OSError(errno.EFBIG, f"its first rows are larger than {LARGEST_FILE:,} bytes")
        yield line


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file of any size, which is not held in memory. Raises `OSError`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: str | os.PathLike[str], most: int = LARGEST_TEXT) -> str:
    """A whole text, with or without a byte order mark. Raises `OSError` and `ValueError`."""
    return read_bytes(path, most).decode("utf-8-sig")


def read_json(path: str | os.PathLike[str], most: int = LARGEST_TEXT) -> Any:
    """What a file of JSON holds. Raises `OSError` and `ValueError`."""
    return parse_json(read_bytes(path, most))


def read_object(path: str | os.PathLike[str], most: int = LARGEST_TEXT) -> dict[str, Any]:
    """What a file of a JSON object holds; nothing where there is none that can be read."""
    with suppress(OSError, ValueError):
        values = read_json(path, most)
        return values if isinstance(values, dict) else {}
    return {}


def parse_json(
    content: bytes,
    hook: Callable[[Any], Any] | None = None,
    most: int = MOST_VALUES,
    *,
    halves: bool = False,
) -> Any:
    """What JSON holds; `hook` makes objects of their pairs. Raises `ValueError`.

    Texts with half of a surrogate pair, which no file can hold, are refused but for `halves`.
    """
    opened = content.count(b"[") + content.count(b"{")
    if opened + content.count(b",") > most:
        raise ValueError(f"it holds more than {most:,} values")
    try:
        values = json.loads(content, object_pairs_hook=hook)
        if opened > DEEPEST:
            _refuse_deep(values)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not halves and b"\\ud" in content.lower():
        json.dumps(values, ensure_ascii=False).encode()  # refuses halves of surrogate pairs
    return values


def parse_toml(text: str) -> dict[str, Any]:
    """What TOML holds. Raises `ValueError`."""
    # tomllib takes time with the square of a dotted name's parts, and everyone a nested table.
    if _LONG_NAME.search(_NO_NAME.sub("", text)):
        raise ValueError(f"a dotted name has more than {DEEPEST} parts")
    try:
        values = tomllib.loads(text)
        _refuse_deep(values)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return values


def _refuse_deep(value: Any, left: int = DEEPEST) -> None:
    """Raise `RecursionError` for values that others could not walk through."""
    if isinstance(value, dict | list):
        if not left:
            raise RecursionError
        for inner in value.values() if isinstance(value, dict) else value:
            _refuse_deep(inner, left - 1)


def read_lines(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The lines of a file of at most `LARGEST_FILE`; one longer than `LONGEST_LINE` is in parts."""
    with open_regular(path, LARGEST_FILE) as file:
        while line := file.readline(LONGEST_LINE):
            yield line
