"""A GGUF file, written from weights that are read a few rows at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGUFValueType as Type
from gguf import GGUFWriter

from embedgrad.exporting.gguf_weights import Weight

_BY_THE_WRITER = ("general.architecture", "general.alignment")


class Entry(NamedTuple):
    """A value of the metadata with its type; `element` is the type of a list's elements."""

    value: Any
    type: Type
    element: Type | None = None


class Contents(NamedTuple):
    """What a GGUF file holds."""

    architecture: str
    metadata: Mapping[str, Entry]
    weights: Sequence[Weight]

    @property
    def nbytes(self) -> int:
        """Size of the file at most."""
        texts = sum(_bytes(entry) + 64 + 4 * len(key) for key, entry in self.metadata.items())
        return texts + sum(w.nbytes + 256 + len(w.name) for w in self.weights) + 4096


def string(text: str) -> Entry:
    return Entry(text, Type.STRING)


def count(number: int) -> Entry:
    return Entry(number, Type.UINT32)


def number(value: float) -> Entry:
    return Entry(value, Type.FLOAT32)


def flag(value: bool) -> Entry:
    return Entry(value, Type.BOOL)


def listed(values: Sequence[Any], element: Type) -> Entry:
    return Entry(list(values), Type.ARRAY, element)


def write_gguf(path: Path, contents: Contents) -> None:
    """Write a GGUF file of version 3."""
    writer = GGUFWriter(str(path), contents.architecture)
    alignment = contents.metadata.get("general.alignment")
    if alignment:
        writer.add_custom_alignment(int(alignment.value))
    for key, entry in contents.metadata.items():
        empty = entry.type == Type.ARRAY and not entry.value  # the writer takes none
        if key not in _BY_THE_WRITER and not empty:
            writer.add_key_value(key, entry.value, entry.type, entry.element)
    for w in contents.weights:
        writer.add_tensor_info(w.name, w.shape, np.dtype(np.float32), w.nbytes, raw_dtype=w.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    step = writer.data_alignment
    with path.open("ab") as file:
        file.write(bytes(-file.tell() % step))
        for weight in contents.weights:
            for chunk in weight.chunks():
                file.write(np.ascontiguousarray(chunk).data)
            file.write(bytes(-file.tell() % step))


def _bytes(entry: Entry) -> int:
    values = entry.value if entry.type == Type.ARRAY else [entry.value]
    return sum(4 * len(v) + 8 if isinstance(v, str) else 8 for v in values)
