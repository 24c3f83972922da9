"""Read rows from files or the Hub.

    reviews.jsonl  .ndjson  .json-lines   one JSON object a line
    reviews.csv    .tsv                   a header, then rows of as many cells
    reviews.parquet                       optional extra "parquet"
    hub:OWNER/NAME[@CONFIG][:SPLIT]       optional extra "hub"

Nothing is repaired and nothing is skipped but blank lines: what cannot be read exactly is refused.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import importlib
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

from embedgrad.errors import DataError

Row = dict[str, object]
Parsed = tuple[tuple[str, ...], list[Row], list[int]]  # columns, rows, line (or row) numbers

HUB_FORM = "hub:OWNER/NAME[@CONFIG][:SPLIT]"
_HUB = re.compile(r"hub:(?P<path>[\w.-]+/[\w.-]+)(?:@(?P<config>[^:]+))?(?::(?P<split>.+))?", re.A)


@final
@dataclass(frozen=True, slots=True)
class Table:
    """Rows of one source.

    `sources[i]` is where `rows[i]` begins, "reviews.csv:18" (line of a text file, row of any
    other, both 1-based). `digest` is the SHA-256 of the file's bytes; for a Hub data set its
    fingerprint and split.
    """

    name: str
    columns: tuple[str, ...]
    rows: list[Row]
    sources: list[str]
    digest: str


def read_table(
    source: str | os.PathLike[str], *, split: str | None = None, revision: str | None = None
) -> Table:
    """Read a data file or a Hub data set; an existing path always wins over a Hub name.

    `split` and `revision` belong to Hub data sets only. Raises DataError.
    """
    text = os.fspath(source)
    if not os.path.exists(text) and text.startswith("hub:"):
        return _read_hub(text, split, revision)
    path = Path(text)
    if not os.path.exists(text):
        if path.parent.is_dir():
            close = difflib.get_close_matches(path.name, _names(path.parent), n=3, cutoff=0.6)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            problem = f"no such file{hint or _listing(path.parent)}"
        else:
            problem = f"no such file, and no folder {str(path.parent)!r}"
        raise data_error(text, f"{problem} (a Hub data set is written {HUB_FORM})")
    if split is not None or revision is not None:
        raise data_error(
            text, f"a split or a revision needs a Hub data set ({HUB_FORM}), this is a file"
        )
    if path.is_dir():
        raise data_error(text, f"is a folder; name one data file{_listing(path)}")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise data_error(
            text, f"unknown kind of data file {path.suffix!r}; known: {', '.join(_READERS)}"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise data_error(text, f"cannot be read ({error.strerror or error})") from None
    if not data:
        raise data_error(text, "the file is empty; expected at least one row")
    columns, rows, numbers = reader(data, path.name)
    if not rows:
        raise data_error(text, "the file holds no rows; expected at least one")
    sources = [f"{path.name}:{number}" for number in numbers]
    return Table(path.name, columns, rows, sources, hashlib.sha256(data).hexdigest())


def data_error(where: str, problem: str) -> DataError:
    """Build a DataError of one line; what does not print becomes an escape."""
    line = f"{where}: {problem}"
    return DataError("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))


def quote(value: object, width: int = 60) -> str:
    """Quote a value for a message, cut to `width` characters."""
    text = str(value)
    return repr(text if len(text) <= width else text[: width - 3] + "...")


def _listing(folder: Path, most: int = 8) -> str:
    names = [name for name in _names(folder) if Path(name).suffix.lower() in _READERS]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"; data files there: {', '.join(names[:most]) or 'none'}{more}"


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _decode(data: bytes, name: str) -> str:
    """Decode UTF-8, with or without a byte order mark; refuse NUL, which no text holds."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # error.object may lack the byte order mark, which holds no line break: lines still agree
        line = error.object.count(b"\n", 0, error.start) + 1
        problem = f"byte 0x{error.object[error.start]:02x} is not UTF-8"
    else:
        nul = data.find(b"\0")
        if nul < 0:
            return text
        line = data.count(b"\n", 0, nul) + 1
        problem = "holds a NUL byte"
    raise data_error(f"{name}:{line}", f"{problem}; expected a text file saved as UTF-8")


def _read_jsonl(data: bytes, name: str) -> Parsed:
    columns: dict[str, None] = {}
    rows: list[Row] = []
    numbers: list[int] = []
    # not splitlines(): JSON strings may hold U+2028 and its like unescaped
    for number, line in enumerate(_decode(data, name).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique_keys)
            if "\\ud" in line.lower():  # half of a pair parses, but no tokenizer can encode it
                json.dumps(row, ensure_ascii=False).encode()
            problem = "" if isinstance(row, dict) else f"holds a {type(row).__name__}"
        except json.JSONDecodeError as error:
            problem = f"broken JSON at character {error.colno} ({error.msg})"
        except UnicodeEncodeError:
            problem = "holds half of a surrogate pair (\\ud800 to \\udfff)"
        except (ValueError, RecursionError) as error:
            problem = str(error)
        if problem:
            problem += "; expected one plain JSON object a line"
            raise data_error(f"{name}:{number}", problem)
        columns.update(dict.fromkeys(row))
        rows.append(row)
        numbers.append(number)
    return tuple(columns), rows, numbers


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object from its pairs; raises ValueError where a key occurs twice."""
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError(f"key {quote(_first_repeat([key for key, _ in pairs]))} occurs twice")
    return row


def _first_repeat(names: Sequence[str]) -> str:
    """Return the first name that occurs more than once."""
    return next(name for name in names if names.count(name) > 1)


def _read_separated(data: bytes, name: str, delimiter: str) -> Parsed:
    text = _decode(data, name)
    # the csv module refuses cells over 128 KiB, and only a process-wide setting lifts that
    old_limit = csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        records = _records(text, name, delimiter)
    finally:
        csv.field_size_limit(old_limit)
    if not records:
        return (), [], []
    start, header = records[0]
    if len(header) == 1 and (other := next((c for c in ";\t|" if c in header[0]), "")):
        problem = f"one column, whose name holds {other!r}: separate cells by {delimiter!r}"
        raise data_error(f"{name}:{start}", problem)
    if len(set(header)) != len(header):
        raise data_error(
            f"{name}:{start}",
            f"column {quote(_first_repeat(header))} occurs twice in the header; "
            "expected unique names",
        )
    rows: list[Row] = []
    for number, cells in records[1:]:
        if len(cells) != len(header):
            counts = f"found {len(cells)} cells, expected {len(header)}"
            advice = f"quote cells that hold {delimiter!r}"
            raise data_error(f"{name}:{number}", f"{counts} as in the header; {advice}")
        rows.append(dict(zip(header, cells, strict=True)))
    return tuple(header), rows, [number for number, _ in records[1:]]


def _records(text: str, name: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Records that are not blank, each with the line it begins on."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records: list[tuple[int, list[str]]] = []
    start = 1
    try:
        for cells in reader:
            if cells:
                records.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        advice = 'a cell that holds a quote is written "like ""this"""'
        raise data_error(f"{name}:{start}", f"broken quoting ({error}); {advice}") from None
    return records


def _read_parquet(data: bytes, name: str) -> Parsed:
    arrow = _extra("pyarrow", "parquet", name)
    parquet = _extra("pyarrow.parquet", "parquet", name)
    try:
        return _from_arrow(parquet.ParquetFile(arrow.BufferReader(data)).read(), name)
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise data_error(name, f"is not a readable Parquet file ({_brief(error)})") from None


def _from_arrow(table: Any, name: str) -> Parsed:
    columns = tuple(table.column_names)
    if len(set(columns)) != len(columns):
        raise data_error(name, f"column {quote(_first_repeat(columns))} occurs twice")
    return columns, table.to_pylist(), list(range(1, table.num_rows + 1))


def _read_hub(source: str, split: str | None, revision: str | None) -> Table:
    match = _HUB.fullmatch(source)
    if match is None:
        raise data_error(source, f"is not a Hub data set; expected {HUB_FORM}")
    if split is not None and match["split"] not in (None, split):
        raise data_error(source, f"names another split than {split!r}; name it in one place")
    split = match["split"] or split
    datasets = _extra("datasets", "hub", source)
    try:
        dataset = datasets.load_dataset(
            match["path"], match["config"], split=split, revision=revision
        )
    except Exception as error:  # the package raises a dozen kinds, of several other packages
        raise data_error(
            source,
            f"cannot be loaded ({type(error).__name__}: {_brief(error)}); "
            "check owner, name, configuration, split and the network",
        ) from None
    if isinstance(dataset, dict):  # no split named: all of them
        if len(dataset) != 1:
            raise data_error(source, f"name one of its splits as {HUB_FORM}: {', '.join(dataset)}")
        split, dataset = next(iter(dataset.items()))
    config = f"@{match['config']}" if match["config"] else ""
    name = f"hub:{match['path']}{config}:{split}"
    # Arrow format: columns of images or sound stay undecoded, selected rows stay selected
    columns, rows, numbers = _from_arrow(dataset.with_format("arrow")[:], name)
    if not rows:
        raise data_error(name, "holds no rows; expected at least one")
    digest = f"{dataset._fingerprint}:{split}"
    return Table(name, columns, rows, [f"{name}:{number}" for number in numbers], digest)


def _extra(module: str, extra: str, source: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        advice = f"pip install 'embedgrad[{extra}]'"
        raise data_error(source, f"needs the package {package}; install it: {advice}") from None


def _brief(error: Exception, width: int = 200) -> str:
    """What an exception of another package says, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= width else text[: width - 3] + "..."


_READERS: dict[str, Callable[[bytes, str], Parsed]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json-lines": _read_jsonl,
    ".csv": partial(_read_separated, delimiter=","),
    ".tsv": partial(_read_separated, delimiter="\t"),
    ".parquet": _read_parquet,
}
