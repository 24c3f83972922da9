"""Read JSON: an object a line, or an array of objects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from embedgrad.data.table import Parsed, Row, data_error, decode, first_repeat, only_first, quote

LINES = "one plain JSON object a line (an array belongs into a .json file)"
ARRAY = "an array of plain JSON objects, or one object a line"

_BLANKS = re.compile(r"[ \t\r\n]*")


def read_json_lines(data: bytes, name: str, *, cut: bool = False) -> Parsed:
    """One object a line; `cut` says that others follow. Raises DataError."""
    parsed = _parse(_each_line(decode(data, name), name, LINES))
    return replace(parsed, notes=(only_first(len(parsed.rows)),)) if cut else parsed


def first_lines(lines: Iterator[bytes], most: int) -> Iterator[bytes]:
    """The lines of the first rows, and the blank ones between them."""
    for line in lines:
        yield line
        most -= bool(line.strip())
        if not most:
            return


def read_json(data: bytes, name: str) -> Parsed:
    """An array of objects, or one object a line. Raises DataError."""
    text = decode(data, name)
    is_array = text.startswith("[", _skip(text, 0))
    return _parse(_each_element(text, name) if is_array else _each_line(text, name, ARRAY))


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object from its pairs; raises ValueError where a key occurs twice."""
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError(f"key {quote(first_repeat([key for key, _ in pairs]))} occurs twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


def _parse(found: Iterator[tuple[int, Row]]) -> Parsed:
    numbers, rows = [], []
    columns: dict[str, None] = {}
    for number, row in found:
        columns.update(dict.fromkeys(row))
        rows.append(row)
        numbers.append(number)
    return Parsed(tuple(columns), rows, numbers)


def _each_line(text: str, name: str, expected: str) -> Iterator[tuple[int, Row]]:
    # not splitlines(): JSON strings may hold U+2028 and its like unescaped
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            row, end = _object(line, _skip(line, 0), f"{name}:{number}", expected)
            if _skip(line, end) < len(line):
                problem = f"broken JSON at character {end + 1} (Extra data)"
                raise data_error(f"{name}:{number}", f"{problem}; expected {expected}")
            yield number, row


def _each_element(text: str, name: str) -> Iterator[tuple[int, Row]]:
    line, counted = 1, 0
    at = _skip(text, _skip(text, 0) + 1)
    closed = text.startswith("]", at)
    while not closed:
        line += text.count("\n", counted, at)
        counted = at
        row, at = _object(text, at, f"{name}:{line}", ARRAY)
        yield line, row
        at = _skip(text, at)
        closed = text.startswith("]", at)
        if not closed and not text.startswith(",", at):
            raise data_error(f"{name}:{line}", "the object is followed by no comma or ]")
        if not closed:
            at = _skip(text, at + 1)
    if _skip(text, at + 1) < len(text):
        raise data_error(f"{name}:{line}", f"the array ends, but not the file; expected {ARRAY}")


def _object(text: str, at: int, where: str, expected: str) -> tuple[Row, int]:
    """The object that begins there, and where it ends."""
    try:
        row, end = _DECODER.raw_decode(text, at)
        if "\\ud" in text[at:end].lower():  # half of a pair parses, but no tokenizer can encode it
            json.dumps(row, ensure_ascii=False).encode()
        if isinstance(row, dict):
            return row, end
        problem = f"holds a {type(row).__name__}"
    except json.JSONDecodeError as error:
        if error.lineno > 1:  # of an array; a row has one line else
            where = f"{where.rpartition(':')[0]}:{error.lineno}"
        problem = f"broken JSON at character {error.colno} ({error.msg})"
    except UnicodeEncodeError:
        problem = "holds half of a surrogate pair (\\ud800 to \\udfff)"
    except (ValueError, RecursionError) as error:
        problem = str(error)
    raise data_error(where, f"{problem}; expected {expected}") from None


def _skip(text: str, at: int) -> int:
    """The next place that is not blank."""
    match = _BLANKS.match(text, at)
    assert match is not None
    return match.end()
