"""Read rows from files, the Hub or Python objects.

    reviews.jsonl  .ndjson  .json-lines   one JSON object a line
    reviews.json                          an array of objects, or one a line
    reviews.csv    .tsv                   a header, then rows of as many cells
    reviews.parquet                       optional extra "parquet"
    digits.npz                            arrays with an entry per row
    hub:OWNER/NAME[@CONFIG][:SPLIT]       optional extra "hub"
    pandas.DataFrame, datasets.Dataset    in Python

Nothing is repaired and nothing is skipped but blank lines: what cannot be read exactly is refused.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from embedgrad.data.arrow import Used, brief, import_extra, read_arrow, read_frame, read_parquet
from embedgrad.data.bounded_reads import LARGEST_FILE, open_regular, read_part
from embedgrad.data.chat import add_chat_columns
from embedgrad.data.images import read_arrays
from embedgrad.data.json_rows import first_lines, read_json, read_json_lines
from embedgrad.data.separated import first_rows, read_separated
from embedgrad.data.table import MOST_ROWS, Parsed, Part, Table, data_error, only_first, refuse_many
from embedgrad.errors import DataError, border
from embedgrad.formatting import visible

Source = str | os.PathLike[str] | Any  # a path, a Hub name, a data frame or a data set

HUB_FORM = "hub:OWNER/NAME[@CONFIG][:SPLIT]"
_HUB = re.compile(r"hub:(?P<path>[\w.-]+/[\w.-]+)(?:@(?P<config>[^:]+))?(?::(?P<split>.+))?", re.A)


def read_table(
    source: Source, *, used: Used = None, most: int | None = None, carved: bool = False
) -> Table:
    """Read a data file, a Hub data set, a pandas data frame or a `datasets.Dataset`.

    An existing path always wins over a Hub name. `used` names the columns that must be readable
    (None: unknown); a Parquet or Hub column that is not among them may be left out. `most` is the
    number of rows after which reading stops, where the source has an order to stop in: lines,
    Parquet, data sets; one that is `carved` is read whole all the same, unless it is too large for
    that. Raises DataError.
    """
    part = Part(most, carved)
    if not isinstance(source, str | os.PathLike):
        return add_chat_columns(_read_object(source, used, part), used)
    text = os.path.expanduser(os.fspath(source))
    with border(visible(text), DataError):
        if not os.path.exists(text) and text.startswith("hub:"):
            return add_chat_columns(_read_hub(text, used, part), used)
        return add_chat_columns(_read_file(text, used, part), used)


def _read_file(text: str, used: Used, part: Part) -> Table:
    path = Path(text)
    if not os.path.exists(text):
        if not text.strip():
            raise data_error("data", "the name of the file is empty; name a data file")
        if "://" in text:
            problem = "is an address, which is not read; download the file and name that"
            raise data_error(text, problem, "missing file")
        if path.is_symlink():
            problem = f"is a link to {os.readlink(path)!r}, which leads nowhere"
        elif path.parent.is_dir():
            close = difflib.get_close_matches(path.name, _names(path.parent), n=3, cutoff=0.6)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            problem = f"no such file{hint or _listing(path.parent)}"
        else:
            problem = f"no such file, and no folder {str(path.parent)!r}"
        problem = f"{problem} (a Hub data set is written {HUB_FORM})"
        raise data_error(text, problem, "missing file")
    if path.is_dir():
        raise data_error(text, f"is a folder; name one data file{_listing(path)}")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise data_error(
            text, f"unknown kind of data file {path.suffix!r}; known: {', '.join(_READERS)}"
        )
    first = _FIRST.get(reader)
    stops = first is not None or reader is read_parquet
    try:
        with open_regular(path, None if stops and part.most else LARGEST_FILE) as file:
            if not os.fstat(file.fileno()).st_size:
                raise data_error(text, "the file is empty; expected at least one row")
            if reader is read_parquet:
                return Table.of(path.name, read_parquet(file, path.name, used, part))
            if first and part.most and not (part.carved and _fits(file)):
                head = b"".join(first(read_part(file), part.most))
                return Table.of(path.name, reader(head, path.name, cut=bool(file.read(1))))
            data = file.read()
    except OSError as error:
        hint = "; data.limit reads its first rows alone" if stops else ""
        hint = hint if error.errno == errno.EFBIG else ""
        raise data_error(text, f"cannot be read ({error.strerror or error}){hint}") from None
    if first:  # before they are parsed
        refuse_many(data.count(b"\n"), path.name, "lines")
    parsed = reader(data, path.name)
    refuse_many(len(parsed.rows), path.name, stops=False)
    return Table.of(path.name, parsed)


def _fits(file: BinaryIO) -> bool:
    """Whether a file of lines may be read whole."""
    if os.fstat(file.fileno()).st_size > LARGEST_FILE:
        return False
    lines = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(2**16), b""))
    file.seek(0)
    return lines <= MOST_ROWS


def _listing(folder: Path, most: int = 8) -> str:
    names = [name for name in _names(folder) if Path(name).suffix.lower() in _READERS]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"; data files there: {', '.join(names[:most]) or 'none'}{more}"


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _read_hub(source: str, used: Used, part: Part) -> Table:
    match = _HUB.fullmatch(source)
    if match is None:
        raise data_error(source, f"is not a Hub data set; expected {HUB_FORM}")
    split = match["split"]
    datasets = import_extra("datasets", "hub", source)
    try:
        dataset = datasets.load_dataset(match["path"], match["config"], split=split)
    except Exception as error:  # the package raises a dozen kinds, of several other packages
        raise data_error(
            source,
            f"cannot be loaded ({type(error).__name__}: {brief(error)}); "
            "check owner, name, configuration, split and the network",
        ) from None
    if isinstance(dataset, dict):  # no split named: all of them
        if len(dataset) != 1:
            raise data_error(source, f"name one of its splits as {HUB_FORM}: {', '.join(dataset)}")
        split, dataset = next(iter(dataset.items()))
    config = f"@{match['config']}" if match["config"] else ""
    name = f"hub:{match['path']}{config}:{split}"
    return _read_dataset(dataset, name, used, part)


def _read_dataset(dataset: Any, name: str, used: Used, part: Part) -> Table:
    most = part.rows_of(len(dataset))
    refuse_many(most, name)
    # Arrow format: columns of images or sound stay undecoded, selected rows stay selected
    parsed = read_arrow(dataset.with_format("arrow")[:most], name, used)
    cut = (only_first(len(parsed.rows)),) if len(parsed.rows) < len(dataset) else ()
    return Table.of(name, replace(parsed, notes=(*parsed.notes, *cut)))


def _read_object(source: Any, used: Used, part: Part) -> Table:
    """A pandas data frame or a data set, told apart without importing either."""
    kinds = [f"{t.__module__.partition('.')[0]}.{t.__name__}" for t in type(source).__mro__]
    if "datasets.Dataset" in kinds:
        return _read_dataset(source, f"Dataset {source.split or ''}".strip(), used, part)
    if "pandas.DataFrame" in kinds:
        return Table.of("DataFrame", read_frame(source, "DataFrame"))
    advice = "; name one of its splits" if "datasets.DatasetDict" in kinds else ""
    raise data_error(
        kinds[0], f"cannot be read; expected a file's name, a DataFrame or a Dataset{advice}"
    )


_CSV, _TSV = (partial(read_separated, delimiter=delimiter) for delimiter in ",\t")
_READERS: dict[str, Callable[..., Parsed]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json-lines": read_json_lines,
    ".json": read_json,
    ".csv": _CSV,
    ".tsv": _TSV,
    ".parquet": read_parquet,
    ".npz": read_arrays,
}
# The lines of a file's first rows.
_FIRST: dict[Callable[..., Parsed], Callable[[Iterator[bytes], int], Iterable[bytes]]] = {
    read_json_lines: first_lines,
    _CSV: partial(first_rows, delimiter=","),
    _TSV: partial(first_rows, delimiter="\t"),
}
