"""Sampled solutions, stored on disk.

    {"format": "embedgrad-solutions", "version": 2, "model": {...}, "decoding": {...}, ...}
    {"question": "5f0c...", "source": "train.jsonl:7", "answer": "18", "solutions": [...], ...}

Lines are appended batch by batch, so an interruption loses little.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, final

from pydantic import TypeAdapter, ValidationError

from embedgrad.atomic_files import not_written, write_file
from embedgrad.data.bounded_reads import LARGEST_FILE, parse_json, read_bytes
from embedgrad.environment import versions
from embedgrad.errors import DataError, RunError

FORMAT: dict[str, Any] = {"format": "embedgrad-solutions", "version": 2}
_MOST_DIFFERENCES = 3
_LONGEST_VALUE = 40  # characters


@final
@dataclass(frozen=True)
class SampledQuestion:
    """What the model wrote for one question.

    `question` is a digest. Of `tried` replies `right` have the right answer, `cut` did not end by
    themselves, and `verified` are right and ended; `solutions` are these, without repeats, in the
    order of the samples. `sample` is the beginning of the first reply.
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


_QUESTION = TypeAdapter(SampledQuestion)


@final
class Store:
    """The solutions of a file, by question; `header` holds the conditions that decide them."""

    def __init__(
        self, path: Path, header: Mapping[str, Any], questions: Iterable[SampledQuestion] = ()
    ):
        self.path = path
        self.header = header
        self.questions = {entry.question: entry for entry in questions}

    @classmethod
    def open(cls, path: Path, conditions: Mapping[str, Any]) -> Self:
        """Read a file, or begin one; an unfinished last line is dropped.

        `conditions` are plain JSON values. Raises `DataError` for a file that is damaged or was
        sampled under other conditions, with what differs, and `RunError` where writing fails.
        """
        conditions = json.loads(json.dumps(conditions))
        try:
            content = read_bytes(path, LARGEST_FILE)
        except FileNotFoundError:
            today = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            header = {**FORMAT, **conditions, "versions": versions(), "created": today}
            write_file(path, _line(header))
            return cls(path, header)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); name another file in solutions.file"
            ) from error
        whole, _, unfinished = content.rpartition(b"\n")
        first, *lines = whole.split(b"\n")
        header = _read_header(path, first)
        differences = _compare({name: header.get(name) for name in conditions}, conditions)
        if differences:
            more = len(differences) - _MOST_DIFFERENCES
            shown = ", ".join(differences[:_MOST_DIFFERENCES]) + f", and {more} more" * (more > 0)
            raise DataError(
                f"{path}: holds solutions made with another {shown}; name another file in "
                "solutions.file, or remove this one"
            )
        questions = [_read_question(path, number, line) for number, line in enumerate(lines, 2)]
        if unfinished:
            write_file(path, whole + b"\n")
        return cls(path, header, questions)

    def add(self, questions: Iterable[SampledQuestion]) -> None:
        """Append questions to the file. Raises `RunError`."""
        new = [entry for entry in questions if entry.question not in self.questions]
        try:
            with self.path.open("ab") as file:
                file.write(b"".join(_line(asdict(entry)) for entry in new))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(not_written(self.path, error)) from error
        self.questions.update((entry.question, entry) for entry in new)

    def content(self) -> bytes:
        """The whole file, in the order of the questions' digests."""
        entries = (asdict(self.questions[digest]) for digest in sorted(self.questions))
        return b"".join(map(_line, (self.header, *entries)))


def _line(values: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(values, ensure_ascii=False)}\n".encode()


def _read_header(path: Path, line: bytes) -> dict[str, Any]:
    try:
        header = parse_json(line)
    except ValueError:
        header = None
    advice = "name another file in solutions.file, or remove this one"
    if not isinstance(header, dict) or header.get("format") != FORMAT["format"]:
        raise DataError(f"{path}: does not begin as a file of solutions does; {advice}")
    version, known = header.get("version"), FORMAT["version"]
    if version != known:
        raise DataError(f"{path}: has version {version!r} of its format, not {known}; {advice}")
    return header


def _read_question(path: Path, number: int, line: bytes) -> SampledQuestion:
    try:
        return _QUESTION.validate_json(line, strict=True)
    except ValidationError as error:
        raise DataError(
            f"{path}:{number}: is damaged; remove this line, and its question is sampled again"
        ) from error


def _compare(theirs: Any, ours: Any, path: str = "") -> list[str]:
    """Every dotted name whose values differ, with both values."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        return [
            difference
            for name in dict.fromkeys([*ours, *theirs])
            for difference in _compare(
                theirs.get(name), ours.get(name), f"{path}.{name}" if path else name
            )
        ]
    return [] if theirs == ours else [f"{path} ({_shorten(theirs)}, now {_shorten(ours)})"]


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
