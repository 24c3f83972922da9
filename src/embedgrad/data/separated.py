"""Read CSV and TSV: a header, then rows of as many cells.

A quote that is opened by mistake swallows the rows up to the next one, and the result is a valid
file. So a row of several lines is refused where each of its lines could be a row by itself.
"""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import final

from embedgrad.data.bounded_reads import LARGEST_FILE
from embedgrad.data.table import Parsed, Row, data_error, decode, first_repeat, only_first, quote
from embedgrad.formatting import pluralize

# Excel takes a first line "sep=;" as the separator, and shows the rest.
_SEPARATOR = re.compile(r'"?sep=(.)"?(?:\r\n|\r|\n)', re.I)
_LINE = re.compile(r"\r\n|\r|\n")


@final
@dataclass(frozen=True, slots=True)
class Record:
    """The cells of one row, the line it begins on, and its text."""

    line: int
    cells: list[str]
    text: str


def read_separated(data: bytes, name: str, delimiter: str, *, cut: bool = False) -> Parsed:
    """Parse a file, or the `cut` first lines of one. Raises DataError."""
    whole, notes = decode(data, name), list[str]()
    delimiter, text = _separator_in(whole, delimiter)
    skipped = int(text != whole)
    with _large_cells():
        records = _records(text, name, delimiter, skipped, cut)
    if cut and not text.endswith(("\r", "\n")):  # in the middle of a very long line
        records = records[:-1]
    if not records:
        return Parsed((), [], [])
    start, written = records[0].line, records[0].cells
    header = [cell.strip() for cell in written]
    if blank := ", ".join(quote(cell) for cell in written if cell.strip() not in ("", cell)):
        notes.append(f"left out the blanks around the column names {blank}")
    nameless = [str(number) for number, cell in enumerate(header, 1) if not cell]
    if len(nameless) > 1:
        which = f"{', '.join(nameless[:-1])} and {nameless[-1]}"
        problem = f"columns {which} have no name; expected one for each column in the header"
        raise data_error(f"{name}:{start}", problem)
    notes += [f"column {number} has no name" for number in nameless]
    if len(set(header)) != len(header):
        raise data_error(
            f"{name}:{start}",
            f"column {quote(first_repeat(header))} occurs twice in the header; "
            "expected unique names",
        )
    for record in records:
        if len(record.cells) != len(header):
            counts = f"found {pluralize(len(record.cells), 'cell')}, expected {len(header)}"
            advice = f"quote cells that hold {delimiter!r}"
            raise data_error(f"{name}:{record.line}", f"{counts} as in the header; {advice}")
    notes += _check_quotes(records, name, delimiter)
    notes += [only_first(len(records) - 1)] if cut else []
    rows: list[Row] = [dict(zip(header, record.cells, strict=True)) for record in records[1:]]
    return Parsed(tuple(header), rows, [record.line for record in records[1:]], tuple(notes))


def first_rows(lines: Iterator[bytes], most: int, delimiter: str) -> list[bytes]:
    """The lines of the header and the first rows; the last row may lack its end."""
    read = list(islice(lines, 1))
    first = b"".join(read).decode("latin-1").removeprefix("\xef\xbb\xbf")
    delimiter, first = _separator_in(first, delimiter)

    def each() -> Iterator[str]:
        yield from io.StringIO(first, newline="")
        for line in lines:
            read.append(line)
            yield from io.StringIO(line.decode("latin-1"), newline="")  # never fails, keeps quotes

    with _large_cells(), contextlib.suppress(csv.Error):  # which the whole reading tells better
        for _ in islice(filter(None, csv.reader(each(), delimiter=delimiter)), most + 1):
            pass
    return read


def _separator_in(text: str, delimiter: str) -> tuple[str, str]:
    """The separator that a first line names, else `delimiter`; and the text behind that line."""
    match = _SEPARATOR.match(text)
    return (match[1], text[match.end() :]) if match else (delimiter, text)


@contextlib.contextmanager
def _large_cells() -> Iterator[None]:
    """Cells of any size: csv refuses those over 128 KiB, but for a process-wide setting."""
    before = csv.field_size_limit(LARGEST_FILE - 1)  # a C long, of 32 bits on Windows
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _records(text: str, name: str, delimiter: str, skipped: int, cut: bool) -> list[Record]:
    """Records that are not blank; of lines that are `cut` not one that ends elsewhere."""
    lines = io.StringIO(text, newline="").readlines()
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    records: list[Record] = []
    start = 0
    try:
        for cells in reader:
            if cells:
                if not records:  # first: with a wrong separator all quoting looks broken
                    _check_header(cells, f"{name}:{start + skipped + 1}", delimiter)
                written = "".join(lines[start : reader.line_num])
                records.append(Record(start + skipped + 1, cells, written))
            start = reader.line_num
    except csv.Error as error:
        if cut and reader.line_num == len(lines):
            return records
        advice = 'a cell that holds a quote is written "like ""this"""'
        line = start + skipped + 1
        raise data_error(f"{name}:{line}", f"broken quoting ({error}); {advice}") from None
    return records


def _check_header(cells: Sequence[str], where: str, delimiter: str) -> None:
    """Raise DataError for a header of one cell that holds another separator."""
    other = next((c for c in ",;\t|" if c in cells[0] and c != delimiter), "")
    if len(cells) == 1 and other:
        problem = f"one column, whose name holds {other!r}: separate cells by {delimiter!r}"
        raise data_error(where, problem)


def _check_quotes(records: Sequence[Record], name: str, delimiter: str) -> list[str]:
    """Refuse a record that swallowed rows, and note one that may have.

    Lines of swallowed rows have as many cells as the header, quotes aside, and values that other
    records have too, as labels. Those of a text with line breaks seldom have either.
    """
    width = len(records[0].cells)
    long: list[Record] = []
    plain: list[Record] = []
    for record in records:
        breaks = any("\n" in cell or "\r" in cell for cell in record.cells)
        (long if breaks else plain).append(record)
    if width == 1 or not long:
        return []
    header = 0 if long[0] is records[0] else 1
    known = [[_bare(record.cells[i]) for record in plain[header:]] for i in range(width)]
    values = [set(column) - {""} for column in known]
    # Few values that repeat, as labels do: lines without them are no rows.
    telling = [i for i, column in enumerate(known) if 2 * len(values[i]) <= len(column) > 3]
    unsure: list[int] = []
    for record in long:
        written = _LINE.split(record.text.rstrip("\r\n"))
        split = [
            [_bare(cell) for cell in line.split(delimiter)] for line in written if line.strip()
        ]
        full = [cells for cells in split if len(cells) == width]
        familiar = [sum(cells[i] in values[i] for cells in full) for i in range(width)]
        if max(familiar) < 2 or 2 * max(familiar) <= len(split):
            strange = any(2 * familiar[i] <= len(split) for i in telling)
            if strange or len(full) < len(split):
                if _may_hold_rows(record, split, telling, values):
                    unsure.append(record.line)
                continue
            if len(split) == 2 and delimiter != "\t":
                unsure.append(record.line)
                continue
        first, last = record.line, record.line + len(written) - 1
        raise data_error(
            f"{name}:{first}",
            f"a quote joins lines {first} to {last} into one row, but they have the {width} cells "
            'of rows by themselves; close the quote, or write one that is meant as text as """" '
            "(if the line breaks are meant, save the rows as .jsonl)",
        )
    if not unsure:
        return []
    return [
        f"in {pluralize(len(unsure), 'row')} a quote joins lines that might be rows by themselves "
        f"(first: line {unsure[0]}); if so, close the quote"
    ]


def _may_hold_rows(
    record: Record,
    split: Sequence[Sequence[str]],
    telling: Sequence[int],
    values: Sequence[set[str]],
) -> bool:
    """Whether a line is a row by columns on the far side of the quote, if some other is none.

    That is a known label, as in a row whose text follows a quote opened by mistake; where no column
    has labels, as many cells as the header.
    """
    width = len(record.cells)
    broken = [i for i, cell in enumerate(record.cells) if "\n" in cell or "\r" in cell]
    beyond = [range(width)] * len(split)  # the columns that a text with line breaks has not
    beyond[0], beyond[-1] = range(broken[0] + 1, width), range(broken[-1])
    return any(
        len(cells) == width
        and (
            any(cells[i] in values[i] for i in telling if i in places) if telling else bool(places)
        )
        for cells, places in zip(split, beyond, strict=True)
    )


def _bare(cell: str) -> str:
    return cell.strip().strip('"').strip()
