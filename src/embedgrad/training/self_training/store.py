"""Solutions on disk: how they were made, then a line per question.

    {"format": "embedgrad-solutions", "version": 1, "model": {...}, "decoding": {...}, ...}
    {"question": "5f0c...", "source": "train.jsonl:7", "answer": "18", "solutions": [...], ...}

Lines are appended as they are made, so that an interruption loses little.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from embedgrad.atomic_files import write_file
from embedgrad.environment import versions
from embedgrad.errors import DataError, RunError

FORMAT = {"format": "embedgrad-solutions", "version": 1}
# What files of older versions lack, or have and need not; it is taken to be as it is now.
_NOT_IN_ALL = ("model.weights", "scorer.timeout")
_MOST_DIFFERENCES = 3
_LONGEST_VALUE = 40  # characters


@dataclass(frozen=True)
class Solved:
    """What the model wrote for one question.

    `question` is a digest. `solutions` are the replies that are right and ended by themselves,
    without repeats, in the order of the samples. Of `tried` replies `right` have the right answer,
    `cut` did not end, and `verified` are right and ended. `sample` is how the first reply begins.
    """

    question: str
    source: str
    answer: str
    solutions: tuple[str, ...]
    tried: int
    right: int
    cut: int
    verified: int
    sample: str


_SOLVED = TypeAdapter(Solved)


class Store:
    """The solutions of a file, by question; `made_by` is what they depend on, as plain JSON."""

    def __init__(self, path: Path, header: Mapping[str, Any], solved: Iterable[Solved] = ()):
        self.path = path
        self.header = header
        self.solved = {entry.question: entry for entry in solved}

    @classmethod
    def open(cls, path: Path, made_by: Mapping[str, Any]) -> Self:
        """Read a file, or begin one. A last line that was never finished is dropped.

        Raises `DataError` for a file that is damaged or holds other solutions than these, with what
        differs, and `RunError` where it cannot be written.
        """
        made_by = json.loads(json.dumps(made_by))
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            today = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            header = {**FORMAT, **made_by, "versions": versions(), "created": today}
            write_file(path, _line(header))
            return cls(path, header)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); name another file in solutions.file"
            ) from error
        whole, _, unfinished = content.rpartition(b"\n")
        first, *lines = whole.split(b"\n")
        header = _header(path, first)
        told = _differences({name: header.get(name) for name in made_by}, made_by)
        if told:
            more = f", and {len(told) - _MOST_DIFFERENCES} more" * (len(told) > _MOST_DIFFERENCES)
            raise DataError(
                f"{path}: holds solutions made with another {', '.join(told[:_MOST_DIFFERENCES])}"
                f"{more}; name another file in solutions.file, or remove this one"
            )
        solved = [_solved(path, number, line) for number, line in enumerate(lines, start=2)]
        if unfinished:
            write_file(path, whole + b"\n")
        return cls(path, header, solved)

    @staticmethod
    def weights_of(path: Path) -> str | None:
        """The weights that a file's header names; None where it names none or cannot be read."""
        try:
            with path.open("rb") as file:
                return str(_header(path, file.readline())["model"]["weights"])
        except (OSError, DataError, KeyError, TypeError):
            return None

    def add(self, solved: Iterable[Solved]) -> None:
        """Append what was made to the file. Raises `RunError`."""
        new = [entry for entry in solved if entry.question not in self.solved]
        try:
            with self.path.open("ab") as file:
                file.write(b"".join(_line(asdict(entry)) for entry in new))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror})") from error
        self.solved.update((entry.question, entry) for entry in new)

    def content(self) -> bytes:
        """The whole file, in the order of the questions' digests."""
        entries = (asdict(self.solved[question]) for question in sorted(self.solved))
        return b"".join(map(_line, (self.header, *entries)))


def _line(values: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(values, ensure_ascii=False)}\n".encode()


def _header(path: Path, line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or {name: header.get(name) for name in FORMAT} != FORMAT:
        raise DataError(
            f"{path}: does not begin as a file of solutions does; name another file in "
            "solutions.file, or remove this one"
        )
    return header


def _solved(path: Path, number: int, line: bytes) -> Solved:
    try:
        return _SOLVED.validate_json(line, strict=True)
    except ValidationError as error:
        raise DataError(
            f"{path}:{number}: is damaged; remove this line, and its question is sampled again"
        ) from error


def _differences(theirs: Any, ours: Any, path: str = "") -> list[str]:
    """Every dotted name whose values differ, with both."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        names = dict.fromkeys([*ours, *theirs])
        dotted = {name: f"{path}.{name}" if path else name for name in names}
        for name in set(ours) ^ set(theirs):
            if dotted[name] in _NOT_IN_ALL:
                del names[name]
        pairs = ((theirs.get(name), ours.get(name), dotted[name]) for name in names)
        return [told for pair in pairs for told in _differences(*pair)]
    return [] if theirs == ours else [f"{path} ({_shown(theirs)}, now {_shown(ours)})"]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
