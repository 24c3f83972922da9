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
import hashlib
import os
import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

from embedgrad.data.arrow import brief, import_extra, read_arrow, read_frame, read_parquet
from embedgrad.data.bounded_reads import LARGEST_FILE, read_bytes
from embedgrad.data.chat import add_chat_columns
from embedgrad.data.images import read_arrays
from embedgrad.data.json_rows import read_json, read_json_lines
from embedgrad.data.separated import read_separated
from embedgrad.data.table import Parsed, Table, data_error
from embedgrad.errors import DataError, border
from embedgrad.formatting import visible

Source = str | os.PathLike[str] | Any  # a path, a Hub name, a data frame or a data set

HUB_FORM = "hub:OWNER/NAME[@CONFIG][:SPLIT]"
_HUB = re.compile(r"hub:(?P<path>[\w.-]+/[\w.-]+)(?:@(?P<config>[^:]+))?(?::(?P<split>.+))?", re.A)


def read_table(
    source: Source,
    *,
    split: str | None = None,
    revision: str | None = None,
    used: Collection[str] | None = None,
) -> Table:
    """Read a data file, a Hub data set, a pandas data frame or a `datasets.Dataset`.

    An existing path always wins over a Hub name. `split` and `revision` belong to Hub data sets
    only. `used` names the columns that must be readable (None: unknown); a Parquet or Hub column
    that is not among them may be left out. Raises DataError.
    """
    if not isinstance(source, str | os.PathLike):
        return add_chat_columns(_read_object(source, used), used)
    text = os.fspath(source)
    with border(visible(text), DataError):
        if not os.path.exists(text) and text.startswith("hub:"):
            return add_chat_columns(_read_hub(text, split, revision, used), used)
        return add_chat_columns(_read_file(text, split, revision, used), used)


def _read_file(
    text: str, split: str | None, revision: str | None, used: Collection[str] | None
) -> Table:
    path = Path(text)
    if not os.path.exists(text):
        if path.parent.is_dir():
            close = difflib.get_close_matches(path.name, _names(path.parent), n=3, cutoff=0.6)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            problem = f"no such file{hint or _listing(path.parent)}"
        else:
            problem = f"no such file, and no folder {str(path.parent)!r}"
        problem = f"{problem} (a Hub data set is written {HUB_FORM})"
        raise data_error(text, problem, "missing file")
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
        data = read_bytes(path, LARGEST_FILE)
    except OSError as error:
        raise data_error(text, f"cannot be read ({error.strerror or error})") from None
    if not data:
        raise data_error(text, "the file is empty; expected at least one row")
    options = {"used": used} if reader is read_parquet else {}
    parsed = reader(data, path.name, **options)
    return Table.of(path.name, parsed, hashlib.sha256(data).hexdigest())


def _listing(folder: Path, most: int = 8) -> str:
    names = [name for name in _names(folder) if Path(name).suffix.lower() in _READERS]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"; data files there: {', '.join(names[:most]) or 'none'}{more}"


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _read_hub(
    source: str, split: str | None, revision: str | None, used: Collection[str] | None
) -> Table:
    match = _HUB.fullmatch(source)
    if match is None:
        raise data_error(source, f"is not a Hub data set; expected {HUB_FORM}")
    if split is not None and match["split"] not in (None, split):
        raise data_error(source, f"names another split than {split!r}; name it in one place")
    split = match["split"] or split
    datasets = import_extra("datasets", "hub", source)
    try:
        dataset = datasets.load_dataset(
            match["path"], match["config"], split=split, revision=revision
        )
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
    return _read_dataset(dataset, name, split, used)


def _read_dataset(
    dataset: Any, name: str, split: str | None, used: Collection[str] | None
) -> Table:
    # Arrow format: columns of images or sound stay undecoded, selected rows stay selected
    parsed = read_arrow(dataset.with_format("arrow")[:], name, used)
    return Table.of(name, parsed, f"{dataset._fingerprint}:{split}")


def _read_object(source: Any, used: Collection[str] | None) -> Table:
    """A pandas data frame or a data set, told apart without importing either."""
    kinds = [f"{t.__module__.partition('.')[0]}.{t.__name__}" for t in type(source).__mro__]
    if "datasets.Dataset" in kinds:
        return _read_dataset(source, f"Dataset {source.split or ''}".strip(), source.split, used)
    if "pandas.DataFrame" in kinds:
        parsed = read_frame(source, "DataFrame")
        content = repr(parsed.rows).encode()
        return Table.of("DataFrame", parsed, hashlib.sha256(content).hexdigest())
    advice = "; name one of its splits" if "datasets.DatasetDict" in kinds else ""
    raise data_error(
        kinds[0], f"cannot be read; expected a file's name, a DataFrame or a Dataset{advice}"
    )


_READERS: dict[str, Callable[..., Parsed]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json-lines": read_json_lines,
    ".json": read_json,
    ".csv": partial(read_separated, delimiter=","),
    ".tsv": partial(read_separated, delimiter="\t"),
    ".parquet": read_parquet,
    ".npz": read_arrays,
}
