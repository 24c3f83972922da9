"""Parse a GGUF header safely, within the file's size.

The `gguf` package and transformers trust the counts in a file: 43 bytes that announce an array of
2**60 elements make them loop and eat memory. So this reads every file first.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, final

from embedgrad.data.bounded_reads import open_regular
from embedgrad.errors import ModelError

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q",
            11: "<q", 12: "<d"}  # fmt: skip
_STRING, _ARRAY = 8, 9

# Far above any real model (a vocabulary of 262,144 with scores, types and merges makes 1.3 million
# elements), and low enough that the slower readers behind us stay within seconds.
_MOST_ELEMENTS = 1 << 22
_MOST_TENSORS = _MOST_KEYS = 1 << 16
_FEW = 1 << 10  # numbers of an array that is read

# The fewest bytes an entry can take: key length + type + value; name length + rank + type + offset.
_SMALLEST_KEY = 8 + 4 + 1
_SMALLEST_TENSOR = 8 + 4 + 4 + 8


@final
class GgufHeader(NamedTuple):
    """What a GGUF file says about itself, and the names of its tensors.

    Of an array, `metadata` holds the numbers if they are few (one per layer), else the length.
    """

    metadata: Mapping[str, Any]
    tensors: tuple[str, ...]
    weights: int  # in all tensors together


def read_header(path: Path) -> GgufHeader:
    """Check a GGUF file's header and tensors; raises `ModelError` unless they can be a model's."""
    try:
        with open_regular(path) as file:
            size = path.stat().st_size
            if size < 24:
                problem = "but a GGUF header alone takes 24; download it again"
                raise ModelError(f"{path}: {size} bytes, {problem}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _read(HeaderCursor(path, data))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    _check_language_model(path, header)
    return header


@final
class HeaderCursor:
    """Reads forward through a mapped file, and never past its end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data = path, data
        self.size, self.at = len(data), 0

    def fail(self, problem: str) -> NoReturn:
        raise ModelError(f"{self.path}: damaged GGUF file: {problem}; download it again")

    def take(self, layout: str) -> Any:
        width = struct.calcsize(layout)
        if width > self.size - self.at:
            self.fail(f"it ends at byte {self.size} in the middle of its header")
        (value,) = struct.unpack_from(layout, self.data, self.at)
        self.at += width
        return value

    def count(self, what: str, smallest: int, most: int | None = None) -> int:
        """Take a count of things of at least `smallest` bytes each; the rest must hold them."""
        count: int = self.take("<Q")
        left = self.size - self.at
        if count * smallest > left:
            self.fail(f"{what} is given as {count:,}, but only {left:,} bytes follow")
        if most is not None and count > most:
            self.fail(f"{what} is {count:,}, more than the {most:,} that are accepted")
        return count

    def text(self, what: str) -> str:
        length = self.count(f"the length of {what}", 1)
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} at byte {self.at - length:,} is not UTF-8")


def _read(cursor: HeaderCursor) -> GgufHeader:
    magic, version = cursor.take("<4s"), cursor.take("<I")
    if magic != b"GGUF":
        pointer = " (a Git LFS pointer: run `git lfs pull`)" if magic == b"vers" else ""
        problem = f"it starts with {magic!r} instead of b'GGUF'{pointer}"
        raise ModelError(f"{cursor.path}: not a GGUF file: {problem}")
    if version not in (2, 3):
        raise ModelError(f"{cursor.path}: GGUF version {version}; versions 2 and 3 can be read")
    tensors = cursor.count("the number of tensors", _SMALLEST_TENSOR, _MOST_TENSORS)
    keys = cursor.count("the number of metadata keys", _SMALLEST_KEY, _MOST_KEYS)
    metadata = _read_metadata(cursor, keys)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        cursor.fail(f"general.alignment is {alignment}, not a power of two")
    return GgufHeader(metadata, *_read_tensors(cursor, tensors, alignment))


def _read_metadata(cursor: HeaderCursor, keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    elements = 0
    for _ in range(keys):
        key = cursor.text("a metadata key")
        if key in metadata:
            cursor.fail(f"the key {key!r} occurs twice")
        kind = cursor.take("<I")
        if kind in SCALARS:
            metadata[key] = cursor.take(SCALARS[kind])
        elif kind == _STRING:
            metadata[key] = cursor.text(repr(key))
        elif kind == _ARRAY:
            length, values = _read_array(cursor, key)
            metadata[key] = values or length
            elements += length
            if elements > _MOST_ELEMENTS:
                cursor.fail(f"its arrays hold more than {_MOST_ELEMENTS:,} elements")
        else:
            cursor.fail(f"{key!r} has a value of unknown type {kind}")
    return metadata


def _read_array(cursor: HeaderCursor, key: str) -> tuple[int, tuple[Any, ...]]:
    """Read an array of few numbers, pass over any other; returns its length and these numbers."""
    kind = cursor.take("<I")
    if kind in SCALARS:
        width = struct.calcsize(SCALARS[kind])
        length = cursor.count(f"the length of {key!r}", width, _MOST_ELEMENTS)
        if length <= _FEW:
            return length, tuple(cursor.take(SCALARS[kind]) for _ in range(length))
        cursor.at += length * width
        return length, ()
    if kind != _STRING:
        what = "an array of arrays" if kind == _ARRAY else f"an array of unknown type {kind}"
        cursor.fail(f"{key!r} is {what}")
    length = cursor.count(f"the length of {key!r}", 8, _MOST_ELEMENTS)
    at, read_length = cursor.at, struct.Struct("<Q").unpack_from  # a vocabulary is long: be quick
    for _ in range(length):
        at += 8
        if at <= cursor.size:
            at += read_length(cursor.data, at - 8)[0]
        if at > cursor.size:
            cursor.fail(f"the texts of {key!r} reach beyond its end")
    cursor.at = at
    return length, ()


def _read_tensors(
    cursor: HeaderCursor, tensors: int, alignment: int
) -> tuple[tuple[str, ...], int]:
    """Check the tensor table, and that its data is in the file.

    Returns the tensors' names and the number of weights.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    names: dict[str, None] = {}
    last, last_end, weights = "", 0, 0
    for _ in range(tensors):
        name = cursor.text("a tensor name")
        if name in names:
            cursor.fail(f"the tensor {name!r} occurs twice")
        names[name] = None
        rank = cursor.take("<I")
        if not 1 <= rank <= 4:
            cursor.fail(f"the tensor {name!r} has {rank} dimensions")
        shape = [cursor.take("<Q") for _ in range(rank)]
        kind, offset = cursor.take("<I"), cursor.take("<Q")
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except ValueError:
            cursor.fail(f"the tensor {name!r} has the unknown type {kind}")
        if 0 in shape or shape[0] % block or offset % alignment:
            place = f"of shape {shape} at offset {offset}"
            cursor.fail(f"the tensor {name!r} {place} does not fit its type")
        weights += math.prod(shape)
        end = offset + math.prod(shape) // block * block_bytes
        if end > last_end:
            last, last_end = name, end
    data_start = -(-cursor.at // alignment) * alignment
    if last_end and data_start + last_end > cursor.size:
        raise ModelError(
            f"{cursor.path}: truncated GGUF file: the tensor {last!r} ends at byte"
            f" {data_start + last_end:,}, but the file has {cursor.size:,} bytes; download it again"
        )
    return tuple(names), weights


def _check_language_model(path: Path, header: GgufHeader) -> None:
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    parts = metadata.get("split.count", 1)
    blocks = metadata.get(f"{architecture}.block_count", 0)
    if not isinstance(architecture, str):
        problem = "names no architecture (metadata key general.architecture)"
    elif parts not in (0, 1):
        problem = f"one of {parts!r} parts of a model; join them first: llama-gguf-split --merge"
    elif type(blocks) is not int or blocks > len(header.tensors):
        sizes = f"{blocks!r} layers are given, but it holds {len(header.tensors)} tensors"
        problem = f"damaged GGUF file: {sizes}; download it again"
    elif "tokenizer.ggml.tokens" not in metadata:
        problem = "holds no tokenizer (metadata key tokenizer.ggml.tokens)"
    else:
        return
    raise ModelError(f"{path}: {problem}")
