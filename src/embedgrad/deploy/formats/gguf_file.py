"""Read and write a GGUF file: its metadata and raw weights.

The `gguf` package's reader takes seconds for a vocabulary; this one reads the header once, after
`read_header` has checked every count in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Type
from gguf import GGUFWriter, dequantize, quantize
from gguf.constants import GGML_QUANT_SIZES
from numpy.typing import NDArray
from torch import Tensor

from embedgrad.data.bounded_reads import file_digest
from embedgrad.errors import ExportError
from embedgrad.model.loading import ModelInfo
from embedgrad.model.loading.gguf_header import SCALARS, HeaderCursor, read_header
from embedgrad.model.loading.resolve import resolve

TABLE, LM_HEAD = "token_embd.weight", "output.weight"
Bytes = NDArray[np.uint8]  # [rows, bytes of a row]
_CHUNK_BYTES = 1 << 24
_BY_THE_WRITER = ("general.architecture", "general.alignment")


@final
class Entry(NamedTuple):
    """A value of the metadata with its type; `element` is the type of a list's elements."""

    value: Any
    type: Type
    element: Type | None = None


@final
class Contents(NamedTuple):
    """What a GGUF file holds."""

    architecture: str
    metadata: Mapping[str, Entry]
    weights: Sequence[Weight]

    @property
    def nbytes(self) -> int:
        """Upper bound of the file's size."""
        texts = 0
        for key, (value, *_) in self.metadata.items():
            values = value if isinstance(value, list) else [value]
            texts += sum(4 * len(v) + 8 if isinstance(v, str) else 8 for v in values)
            texts += 64 + 4 * len(key)
        return texts + sum(w.nbytes + 256 + len(w.name) for w in self.weights) + 4096


_SCALARS = {str: Type.STRING, bool: Type.BOOL, int: Type.UINT32, float: Type.FLOAT32}
_ELEMENTS = {str: Type.STRING, int: Type.INT32, float: Type.FLOAT32}


def entry(value: Any) -> Entry:
    """A text, bool, uint32 or float32, or a list of texts, int32 or float32, with its type."""
    if isinstance(value, list):
        return Entry(value, Type.ARRAY, _ELEMENTS[type(value[0])])
    return Entry(value, _SCALARS[type(value)])


@final
@dataclass(frozen=True)
class Weight:
    """A tensor of a GGUF file: `shape` in elements, rows last; `read(a, b)` gives rows a to b."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    read: Callable[[int, int], Bytes]

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    def chunks(self) -> Iterator[Bytes]:
        """All rows, a few at a time."""
        step = max(1, _CHUNK_BYTES // self.row_bytes)
        for start in range(0, self.rows, step):
            yield self.read(start, min(start + step, self.rows))

    def convert(self, kind: Kind) -> Weight:
        """The same weights in another kind, rounded if need be.

        Raises `ExportError` for a kind that the `gguf` package cannot read.
        """
        if kind == self.kind:
            return self
        try:
            dequantize(np.ascontiguousarray(self.read(0, 1)), self.kind)
        except NotImplementedError as error:
            raise ExportError(
                f"{self.name}: weights of the kind {self.kind.name} cannot be read here; use a "
                "GGUF file of another quantization"
            ) from error

        def read(start: int, stop: int) -> Bytes:
            values = dequantize(np.ascontiguousarray(self.read(start, stop)), self.kind)
            return encode(values, kind, self.name)

        return replace(self, kind=kind, read=read)

    def with_rows(self, first: int, new: Bytes) -> Weight:
        """With `new` rows from row `first` on, which replace old rows and extend them."""
        assert first <= self.rows, "no gap between old rows and new ones"
        stop = first + len(new)
        rows = max(self.rows, stop)

        def read(start: int, end: int) -> Bytes:
            a, b = min(max(start, first), end), max(min(end, stop), start)
            if a >= b:
                return self.read(start, end)
            parts = [new[a - first : b - first]]
            if start < a:
                parts.insert(0, self.read(start, a))
            if b < end:
                parts.append(self.read(b, end))
            return np.concatenate(parts)

        return replace(self, shape=(rows, *self.shape[1:]), read=read)


def from_gguf(info: ModelInfo) -> Contents:
    """The GGUF file that a model was loaded from. Raises `ExportError` if it has changed."""
    file = resolve(info.name, revision=None, local_files_only=True).path
    sha256 = file_digest(file)
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
    with file.open("rb") as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as data:
        cursor = HeaderCursor(file, data)
        cursor.at = 8  # magic and version
        tensors, keys = cursor.take("<Q"), cursor.take("<Q")
        metadata = {cursor.text("a key"): _entry(cursor) for _ in range(keys)}
        table = [_tensor(cursor) for _ in range(tensors)]
    alignment = metadata["general.alignment"].value if "general.alignment" in metadata else 32
    start = -(-cursor.at // alignment) * alignment
    weights = [_weight(held, name, shape, kind, start + at) for name, shape, kind, at in table]
    return Contents(str(metadata["general.architecture"].value), metadata, weights)


def replace_rows(file: Path, ids: list[int], rows_PD: Any) -> None:
    """Change rows of the embedding table of a GGUF file in place."""
    (table,) = (w for w in read_contents(file, writable=True).weights if w.name == TABLE)
    for i, row in zip(ids, row_bytes(rows_PD, table.kind), strict=True):
        table.read(i, i + 1)[0] = row


def _entry(cursor: HeaderCursor) -> Entry:
    type_ = Type(cursor.take("<I"))
    if type_ != Type.ARRAY:
        return Entry(_value(cursor, type_), type_)
    element, count = Type(cursor.take("<I")), cursor.take("<Q")
    return Entry([_value(cursor, element) for _ in range(count)], type_, element)


def _value(cursor: HeaderCursor, type_: Type) -> Any:
    return cursor.text("a text") if type_ == Type.STRING else cursor.take(SCALARS[type_])


def _tensor(cursor: HeaderCursor) -> tuple[str, tuple[int, ...], Kind, int]:
    name, rank = cursor.text("a tensor name"), cursor.take("<I")
    shape = tuple(reversed([cursor.take("<Q") for _ in range(rank)]))
    return name, shape, Kind(cursor.take("<I")), cursor.take("<Q")


def _weight(
    held: NDArray[np.uint8], name: str, shape: tuple[int, ...], kind: Kind, start: int
) -> Weight:
    weight = Weight(name, kind, shape, lambda a, b: rows[a:b])
    rows = held[start : start + weight.nbytes].reshape(weight.rows, weight.row_bytes)
    return weight


def write_gguf(path: Path, contents: Contents) -> None:
    """Write a GGUF file of version 3."""
    writer = GGUFWriter(str(path), contents.architecture)
    alignment = contents.metadata.get("general.alignment")
    if alignment:
        writer.add_custom_alignment(int(alignment.value))
    for key, (value, kind, element) in contents.metadata.items():
        empty = kind == Type.ARRAY and not value  # the writer refuses those
        if key not in _BY_THE_WRITER and not empty:
            writer.add_key_value(key, value, kind, element)
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


def encode(values: NDArray[np.float32], kind: Kind, what: str) -> Bytes:
    """Rows of numbers as bytes. Raises `ExportError` where f16 cannot hold them."""
    if kind == Kind.F16 and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise ExportError(
            f"{what}: values beyond {np.finfo(np.float16).max:.0f}, which f16 cannot hold; "
            "use export.gguf = 'f32'"
        )
    raw: Bytes = np.ascontiguousarray(quantize(values, kind)).view(np.uint8)
    return raw


def served_kind(weight: Weight, setting: str) -> Kind:
    """The kind of a weight under the setting export.gguf. Vectors and routers of experts stay in
    f32, as llama.cpp expects."""
    if setting == "keep":
        return weight.kind
    if len(weight.shape) == 1 or weight.name.endswith(("_norm.weight", "ffn_gate_inp.weight")):
        return Kind.F32
    kind = {"f32": Kind.F32, "f16": Kind.F16, "q8_0": Kind.Q8_0}[setting]
    block, _ = GGML_QUANT_SIZES[kind]
    return Kind.F16 if weight.shape[-1] % block else kind


def table_rows(rows_PD: Tensor, info: ModelInfo) -> Tensor:
    """Rows of `inputs_embeds` in table space: scaled in f32, they give those rows exactly.

    llama.cpp scales Gemma's by the square root of the width in every precision.
    """
    scale = torch.tensor(info.embedding_scale, dtype=torch.float32)
    if info.architecture.lower().startswith("gemma"):
        scale = torch.tensor(info.width, dtype=torch.float32).sqrt()
    rows = rows_PD.detach().float().cpu()
    nearest = unscaled = rows / scale
    for other in (nearest.nextafter(nearest + 1), nearest.nextafter(nearest - 1)):
        unscaled = torch.where(unscaled * scale == rows, unscaled, other)
    return torch.where(unscaled * scale == rows, unscaled, nearest)


def row_bytes(rows_PD: Tensor, kind: Kind) -> Bytes:
    """Rows of a prompt as bytes of a table of that kind."""
    return encode(rows_PD.to(torch.float32).numpy(), kind, "the refined rows")
