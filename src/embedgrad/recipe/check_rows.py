"""Rows that a run keeps, so that exports can be checked anywhere.

RUN/check_rows.jsonl   rows of dev, test and train, one JSON object a line
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from embedgrad.atomic_files import to_json_lines, write_file
from embedgrad.data.examples import Example
from embedgrad.data.splits import Splits
from embedgrad.errors import RunError
from embedgrad.prompt.sequence import Sequencer, TokenSequence
from embedgrad.report.page.run_files import is_row, json_lines

FILE = "check_rows.jsonl"
KEPT = 128  # from either end: an export is checked with the first rows, calibrated with the last


def rows_to_check(splits: Splits) -> list[Example]:
    """All rows, those for checks first."""
    return [*splits.dev, *splits.test, *splits.train]


def keep_rows(folder: Path, sequencer: Sequencer, splits: Splits) -> None:
    """Write the first and the last rows that fit into the context whole. Raises `RunError`."""
    rows = rows_to_check(splits)
    first = whole_rows(sequencer, rows, KEPT)
    last = whole_rows(sequencer, reversed(rows[len(first) :]), KEPT)
    columns = sequencer.renderer.template.columns
    lines = [
        {
            "source": row.source,
            "answer": row.answer,
            "columns": {name: row.columns[name] for name in columns if name in row.columns},
        }
        for row in (sequence.example for sequence in (*first, *reversed(last)))
    ]
    write_file(folder / FILE, to_json_lines(lines))


def read_rows(folder: Path) -> list[Example] | None:
    """The rows that a run kept; None for a run without. Raises `RunError` for a damaged file."""
    path, rows = folder / FILE, []
    if not path.is_file():
        return None
    for number, line in json_lines(path):
        if line is None or "columns" not in line or not is_row(line):
            raise RunError(
                f"{path}:{number}: is damaged; remove the file, and rows of the data are used"
            )
        rows.append(Example(line["columns"], line["answer"], line["source"]))
    return rows


def whole_rows(
    sequencer: Sequencer, examples: Iterable[Example], most: int
) -> Sequence[TokenSequence]:
    """The first rows that fit into the context whole, as a client's query must."""
    rows: list[TokenSequence] = []
    for example in examples:
        before = sequencer.truncated
        row = sequencer(example)
        if sequencer.truncated == before:
            rows.append(row)
        if len(rows) == most:
            break
    return rows
