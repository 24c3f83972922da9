"""Read Parquet, Arrow and pandas, column by column.

Only what is used must be readable: a value that Python cannot hold, in a column that nobody names,
stops nothing.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, BinaryIO

from embedgrad.data.bounded_reads import most_unpacked
from embedgrad.data.table import (
    Parsed,
    Part,
    Row,
    data_error,
    first_repeat,
    only_first,
    quote,
    refuse_many,
)
from embedgrad.errors import DataError
from embedgrad.formatting import size

_MOST_ROWS = 8  # for each byte of a file
_PIECE = 256  # rows

Used = Collection[str] | None  # the columns that must be read; None: all that can be


def read_parquet(file: BinaryIO, name: str, used: Used = None, part: Part = Part()) -> Parsed:
    """A Parquet file, or its first rows. Raises DataError."""
    arrow = import_extra("pyarrow", "parquet", name)
    parquet = import_extra("pyarrow.parquet", "parquet", name)
    try:
        length = file.seek(0, os.SEEK_END)
        opened = parquet.ParquetFile(file)
        schema, whole = opened.schema_arrow, opened.metadata.num_rows
        _check_claims(opened.metadata, length)
    except Exception as error:  # files may be broken in any way
        raise data_error(name, f"is not a readable Parquet file ({brief(error)})") from None
    count, room, groups = part.rows_of(whole), most_unpacked(length), list[int]()
    refuse_many(count, name)
    have = 0
    while have < count:
        have += opened.metadata.row_group(len(groups)).num_rows
        groups.append(len(groups))

    def read(column: str) -> Any:
        """A column, in pieces: one text of a dictionary may stand in a million rows."""
        pieces, held, rows = [], 0, 0
        for batch in opened.iter_batches(_PIECE, row_groups=groups, columns=[column]):
            pieces.append(batch.column(column))
            if (held := held + batch.nbytes) > room:
                raise ValueError(f"it holds more than {size(room)}, packed into {size(length)}")
            if (rows := rows + len(batch)) >= count:
                break
        return arrow.chunked_array(pieces, type=schema.field(column).type)[:count]

    parsed = _from_columns(schema, count, read, name, used)
    return replace(parsed, notes=(*parsed.notes, only_first(count))) if count < whole else parsed


def _check_claims(metadata: Any, length: int) -> None:
    """Raise `ValueError` for a file that would grow far beyond what data of its size does."""
    if metadata.num_rows > _MOST_ROWS * length:
        raise ValueError(f"{metadata.num_rows:,} rows in {size(length)}")
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    if (whole := sum(group.total_byte_size for group in groups)) > most_unpacked(length):
        raise ValueError(f"{size(whole)}, packed into {size(length)}")


def read_arrow(table: Any, name: str, used: Used = None) -> Parsed:
    """An Arrow table, whose schema may hold the features of a Hub data set. Raises DataError."""
    return _from_columns(table.schema, table.num_rows, table.column, name, used)


def read_frame(frame: Any, name: str) -> Parsed:
    """A pandas data frame; cells that are missing are None. Raises DataError."""
    columns = _unique([str(column) for column in frame.columns], name)
    cells = []
    for i in range(len(columns)):
        series = frame.iloc[:, i].astype(object)
        cells.append(
            [
                None if missing else value.tolist() if hasattr(value, "dtype") else value
                for value, missing in zip(series.tolist(), series.isna().tolist(), strict=True)
            ]
        )
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*cells, strict=True)]
    return Parsed(columns, rows, range(1, len(frame) + 1))


def import_extra(module: str, extra: str, source: str) -> Any:
    """An optional package; raises DataError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        advice = f"pip install 'embedgrad[{extra}]'"
        raise data_error(source, f"needs the package {package}; install it: {advice}") from None


def brief(error: Exception, width: int = 200) -> str:
    """What an exception of another package says, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= width else text[: width - 3] + "..."


def _from_columns(
    schema: Any, count: int, read: Callable[[str], Any], name: str, used: Used
) -> Parsed:
    columns = _unique(schema.names, name)
    needed = {*columns} if used is None else {*used}
    if needed - {*columns}:
        needed.add("messages")  # of which a chat's columns are made
    rows: list[Row] = [{} for _ in range(count)]
    unread: list[str] = []
    for column in columns:
        kind = schema.field(column).type
        if column not in needed and (kind.num_fields or "binary" in str(kind)):
            continue  # no text
        try:
            cells = read(column).to_pylist()
        except Exception as error:  # whatever else stands in a file must not stop its reader
            if used is not None and column in needed:
                raise _unreadable(read, column, name, error) from None
            unread.append(column)
            continue
        for row, cell in zip(rows, cells, strict=True):
            row[column] = cell
    notes = []
    if used is None:
        notes = [f"column {quote(column)} is left out, as it cannot be read" for column in unread]
        columns = tuple(column for column in columns if column not in unread)
    return Parsed(columns, rows, range(1, count + 1), tuple(notes), _class_names(schema))


def _unreadable(read: Callable[[str], Any], column: str, name: str, error: Exception) -> DataError:
    """The error for a column, at its first odd value if that can be found."""
    where = name
    try:
        for number, cell in enumerate(read(column), 1):
            where = f"{name}:{number}"
            cell.as_py()
    except Exception as of_cell:
        error = of_cell
    problem = f"{type(error).__name__}: {brief(error)}"
    return data_error(where, f"column {quote(column)} holds what cannot be read ({problem})")


def _unique(columns: Sequence[str], name: str) -> tuple[str, ...]:
    if len(set(columns)) != len(columns):
        raise data_error(name, f"column {quote(first_repeat(columns))} occurs twice")
    return tuple(columns)


def _class_names(schema: Any) -> dict[str, tuple[str, ...]]:
    """Names of the classes of each `ClassLabel`, which Hub data sets keep in the metadata."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        named = {
            column: tuple(map(str, feature["names"]))
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (TypeError, KeyError, ValueError, AttributeError):
        return {}
    return named
