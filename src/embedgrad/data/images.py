"""Images in a table: columns of pixels or arrays become an image a row.

digits.npz        arrays with one entry per image, such as `image` [N, 8, 8] and `label` [N]
digits.parquet    a column per pixel, or a column of lists; as do .csv and .jsonl
"""

from __future__ import annotations

import hashlib
import io
import math
import sys
import zipfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from embedgrad.data.bounded_reads import most_unpacked
from embedgrad.data.examples import Example
from embedgrad.data.labels import closest
from embedgrad.data.table import Parsed, Row, Table, data_error, quote
from embedgrad.errors import DataError
from embedgrad.formatting import size

IMAGE, PIXELS = "image", "pixels"  # a row's digest, and its numbers as fp32 bytes


def read_arrays(data: bytes, name: str) -> Parsed:
    """Read a .npz file's arrays as columns. Raises `DataError`; pickled objects are refused."""
    import numpy as np

    try:
        most, columns = most_unpacked(len(data)), dict[str, Any]()
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            if (whole := sum(part.file_size for part in packed.infolist())) > most:
                raise ValueError(f"{size(whole)}, packed into {size(len(data))}")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            for key in arrays.files:
                shape = (cells := arrays[key]).shape
                if math.prod(max(1, n) for n in shape) > most:  # cells without bytes
                    raise ValueError(f"{key} of shape {list(shape)} in {size(len(data))}")
                columns[key] = cells.tolist()
    except Exception as error:  # a file from elsewhere: zip, header or numbers may be damaged
        why = str(error).partition("\n")[0]
        problem = f"is not a .npz file of plain arrays ({why}); write it with numpy.savez"
        raise data_error(name, problem) from None
    lengths = {key: len(c) if isinstance(c, list) else 0 for key, c in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{count} {key}" for key, count in lengths.items())
        raise data_error(name, f"holds {listed}; expected arrays with one entry per image")
    count = next(iter(lengths.values()), 0)
    rows: list[Row] = [{key: column[i] for key, column in columns.items()} for i in range(count)]
    return Parsed(tuple(columns), rows, range(1, count + 1))


def with_images(table: Table, patterns: Sequence[str], mean: float, std: float) -> Table:
    """The table with the numbers of each row's image as one cell, and their digest as another.

    `patterns` name the columns. Every number is (cell - mean) / std. Raises `DataError`.
    """
    names: dict[str, None] = {}
    for pattern in patterns:
        found = [name for name in table.columns if fnmatchcase(name, pattern)]
        if not found:
            problem = f"no column {pattern!r}, which images.columns names"
            raise data_error(table.name, f"{problem}; {closest(pattern, table.columns)}")
        names |= dict.fromkeys(found)
    rows = []
    for row, source in zip(table.rows, table.sources, strict=True):
        cells = [number for name in names for number in _numbers(row.get(name), source, name)]
        pixels = to_pixels([(cell - mean) / std for cell in cells])
        rest = {name: cell for name, cell in row.items() if name not in names}
        rows.append({**rest, IMAGE: hashlib.sha256(pixels).hexdigest(), PIXELS: pixels})
    others = tuple(name for name in table.columns if name not in names)
    return replace(table, columns=(*others, IMAGE, PIXELS), rows=rows)


def image_examples(images: Any, answers: Sequence[str], source: str = "image") -> list[Example]:
    """Examples of images that are in memory, an array [N, ...] of numbers as the model reads them.

    Raises `DataError` for numbers that are not finite, and for other than one answer an image.
    """
    if len(images) != len(answers):
        problem = f"{len(images)} images and {len(answers)} answers; expected as many"
        raise DataError(f"image_examples: {problem}")
    examples = []
    for i, (image, answer) in enumerate(zip(images, answers, strict=True)):
        pixels = to_pixels(list(_numbers(image, f"{source}:{i + 1}", "images")))
        columns = {IMAGE: hashlib.sha256(pixels).hexdigest()}
        examples.append(Example(columns, answer, f"{source}:{i + 1}", extra={PIXELS: pixels}))
    return examples


def image_query(row: object, where: str, read: Callable[[Table], Table]) -> Example:
    """An example without an answer of columns by name; `read` is `with_images` of a recipe."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected the columns of an image by name, as in training")
    (cells,) = read(Table(where, tuple(row), [dict(row)], [where])).rows
    return Example({IMAGE: str(cells[IMAGE])}, "", where, extra={PIXELS: cells[PIXELS]})


def to_pixels(numbers: Sequence[float]) -> bytes:
    """Numbers as fp32, little-endian."""
    packed = array("f", numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _numbers(cell: object, source: str, name: str) -> Iterator[float]:
    """The numbers of a cell, nested lists and arrays line by line. Raises `DataError`."""
    cell = cell.tolist() if hasattr(cell, "tolist") else cell
    if isinstance(cell, list | tuple):
        for part in cell:
            yield from _numbers(part, source, name)
        return
    try:
        number = float(cell)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) < 1e30:  # also where it is no number
        held = "nothing" if cell in (None, "") else quote(cell)
        raise data_error(
            source,
            f"column {name!r} holds {held}; expected the number of a pixel; a recipe with [images] "
            "reads no text",
        )
    yield number
