"""Read a GGUF file's metadata and raw weights.

The `gguf` package's reader takes seconds for a vocabulary; this one reads the header once, after
`read_header` has checked every count in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf import GGUFValueType as Type
from numpy.typing import NDArray

from embedgrad.deploy.folder import digest
from embedgrad.deploy.formats.gguf_writer import TABLE, Contents, Entry, Weight, row_bytes
from embedgrad.errors import ExportError
from embedgrad.model.loading import ModelInfo
from embedgrad.model.loading.gguf_header import read_header
from embedgrad.model.loading.resolve import resolve

_DTYPES = GGUFReader.gguf_scalar_to_np


def from_gguf(info: ModelInfo) -> Contents:
    """The GGUF file that a model was loaded from. Raises `ExportError` if it has changed."""
    file = resolve(info.name, revision=None, local_files_only=True).path
    sha256 = digest(file)
    if sha256 != info.gguf_sha256:
        raise ExportError(
            f"{file}: is not the file that the model was loaded from (its SHA-256 begins with "
            f"{sha256[:12]}, not {str(info.gguf_sha256)[:12]}); load the model again"
        )
    return read_contents(file)


def read_contents(file: Path, *, writable: bool = False) -> Contents:
    """Metadata and weights of a GGUF file. Raises `ModelError` for a damaged one."""
    read_header(file)
    held = np.memmap(file, np.uint8, "r+" if writable else "r")
    cursor = _FileCursor(held)
    cursor.at = 8  # magic and version
    tensors, keys = cursor.number(Type.UINT64), cursor.number(Type.UINT64)
    metadata = {cursor.text(): cursor.entry() for _ in range(keys)}
    table = [cursor.tensor() for _ in range(tensors)]
    alignment = metadata["general.alignment"].value if "general.alignment" in metadata else 32
    start = -(-cursor.at // alignment) * alignment
    weights = [_weight(held, name, shape, kind, start + at) for name, shape, kind, at in table]
    return Contents(str(metadata["general.architecture"].value), metadata, weights)


def replace_rows(file: Path, ids: list[int], rows_PD: Any) -> None:
    """Change rows of the embedding table of a GGUF file in place."""
    (table,) = (w for w in read_contents(file, writable=True).weights if w.name == TABLE)
    for i, row in zip(ids, row_bytes(rows_PD, table.kind), strict=True):
        table.read(i, i + 1)[0] = row


@final
class _FileCursor:
    """Reads forward through a GGUF header."""

    def __init__(self, held: NDArray[np.uint8]):
        self.held = held.data
        self.at = 0

    def numbers(self, type_: Type, count: int) -> list[Any]:
        dtype = np.dtype(_DTYPES[type_]).newbyteorder("<")
        numbers = np.frombuffer(self.held, dtype, count, self.at)
        self.at += numbers.nbytes
        return list(numbers.tolist())

    def number(self, type_: Type) -> Any:
        return self.numbers(type_, 1)[0]

    def text(self) -> str:
        start = self.at + 8
        self.at = start + int.from_bytes(self.held[self.at : start], "little")
        return str(self.held[start : self.at], "utf-8")

    def entry(self) -> Entry:
        type_ = Type(self.number(Type.UINT32))
        if type_ == Type.STRING:
            return Entry(self.text(), type_)
        if type_ != Type.ARRAY:
            return Entry(self.number(type_), type_)
        element, count = Type(self.number(Type.UINT32)), self.number(Type.UINT64)
        if element == Type.STRING:
            return Entry([self.text() for _ in range(count)], type_, element)
        return Entry(self.numbers(element, count), type_, element)

    def tensor(self) -> tuple[str, tuple[int, ...], Kind, int]:
        name, rank = self.text(), self.number(Type.UINT32)
        shape = tuple(reversed(self.numbers(Type.UINT64, rank)))
        return name, shape, Kind(self.number(Type.UINT32)), self.number(Type.UINT64)


def _weight(
    held: NDArray[np.uint8], name: str, shape: tuple[int, ...], kind: Kind, start: int
) -> Weight:
    weight = Weight(name, kind, shape, lambda a, b: rows[a:b])
    rows = held[start : start + weight.nbytes].reshape(weight.rows, weight.row_bytes)
    return weight
