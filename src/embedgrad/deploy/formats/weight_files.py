"""Copy a checkpoint with some tensors replaced.

    WeightFiles: names of tensors -> where their bytes are, in one safetensors file or in shards
    write:      rewrites a file with changed tensors, in pieces; copies or links the others

The format is that of https://github.com/huggingface/safetensors: eight bytes for the length of a
JSON header, the header, then the bytes of all tensors.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from embedgrad.data.bounded_reads import open_regular, read_json
from embedgrad.errors import ExportError, ModelError
from embedgrad.model.loading.checkpoint_folder import INDEX, WEIGHTS, check_folder

CHUNK = 8 * 2**20  # bytes in memory at a time

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@final
@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `size` bytes from `start` on."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def part(self, first: int, last: int) -> StoredTensor:
        """The entries [first, last) along the first axis."""
        entry = self.size // self.shape[0]
        shape = (last - first, *self.shape[1:])
        return replace(
            self, shape=shape, start=self.start + first * entry, size=(last - first) * entry
        )

    def read(self) -> Tensor:
        """All of it in memory; a floating tensor."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            raw = bytearray(file.read(self.size))
        return torch.frombuffer(raw, dtype=DTYPES[self.dtype]).view(self.shape)


@final
@dataclass(frozen=True)
class NewTensor:
    """A tensor to write: stored and new pieces, joined; stored bytes may be rounded to `dtype`."""

    dtype: str
    shape: tuple[int, ...]
    pieces: Sequence[StoredTensor | Tensor]

    @classmethod
    def join(cls, dtype: str, *pieces: StoredTensor | Tensor) -> NewTensor:
        """Pieces joined along the first axis."""
        entries = sum(piece.shape[0] for piece in pieces)
        return cls(dtype, (entries, *pieces[0].shape[1:]), pieces)

    @property
    def size(self) -> int:
        """Bytes."""
        if self.dtype in DTYPES:
            return math.prod(self.shape) * DTYPES[self.dtype].itemsize
        return sum(piece.size for piece in self.pieces if isinstance(piece, StoredTensor))

    def content(self) -> Iterator[bytes]:
        """Its bytes in chunks. Raises `ExportError` for a number that does not fit."""
        for piece in self.pieces:
            if isinstance(piece, Tensor):
                yield _bytes(piece, self.dtype)
                continue
            for raw in _chunks(piece):
                if piece.dtype == self.dtype:
                    yield raw
                else:
                    numbers = torch.frombuffer(bytearray(raw), dtype=DTYPES[piece.dtype])
                    yield _bytes(numbers, self.dtype)


@final
@dataclass(frozen=True)
class WeightFiles:
    """The weights of a model folder: where each tensor is, by name."""

    folder: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, Mapping[str, str]]
    index: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> WeightFiles:
        """Read the headers only. Raises `ExportError` for weights that are not safetensors."""
        try:
            check_folder(folder)
        except ModelError as error:
            raise ExportError(f"the base model cannot be copied: {error}") from error
        index: dict[str, Any] = {}
        files = [folder / WEIGHTS]
        if not files[0].is_file():
            index = read_json(folder / INDEX)
            files = [folder / name for name in sorted(set(index["weight_map"].values()))]
        tensors: dict[str, StoredTensor] = {}
        metadata = {}
        for file in files:
            with open_regular(file) as opened:
                length = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(length))
            metadata[file.name] = header.pop("__metadata__", {})
            for name, entry in header.items():
                first, last = entry["data_offsets"]
                shape, start = tuple(entry["shape"]), 8 + length + first
                tensors[name] = StoredTensor(file, entry["dtype"], shape, start, last - first)
        return cls(folder, tensors, metadata, index)

    def files(
        self, changes: Mapping[str, NewTensor], beside: str
    ) -> dict[str, dict[str, NewTensor]]:
        """The tensors of every file; new ones go into the file of the tensor `beside`."""
        files: dict[str, dict[str, NewTensor]] = {name: {} for name in self.metadata}
        for name, stored in self.tensors.items():
            whole = NewTensor(stored.dtype, stored.shape, [stored])
            files[stored.file.name][name] = changes.get(name, whole)
        home = self.tensors[beside].file.name
        for name in changes.keys() - self.tensors.keys():
            files[home][name] = changes[name]
        return files

    def bytes_needed(self, changes: Mapping[str, NewTensor], beside: str, *, link: bool) -> int:
        """Disk space that `write` takes, without headers."""
        return sum(
            sum(tensor.size for tensor in tensors.values())
            for name, tensors in self.files(changes, beside).items()
            if not link or tensors.keys() & changes.keys()
        )

    def write(
        self, folder: Path, changes: Mapping[str, NewTensor], beside: str, *, link: bool
    ) -> list[str]:
        """Write all files into `folder`; returns the names of the linked ones."""
        linked = []
        files = self.files(changes, beside)
        for name, tensors in files.items():
            if tensors.keys() & changes.keys():
                _write(folder / name, tensors, self.metadata[name])
            elif link:
                source = (self.folder / name).resolve()
                try:
                    os.link(source, folder / name)
                except OSError:  # another disk
                    (folder / name).symlink_to(source)
                linked.append(name)
            else:
                shutil.copyfile(self.folder / name, folder / name)
        if self.index:
            total = sum(t.size for tensors in files.values() for t in tensors.values())
            index = {
                **self.index,
                "metadata": {**self.index.get("metadata", {}), "total_size": total},
                "weight_map": {t: name for name, tensors in files.items() for t in tensors},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        return linked


def _write(path: Path, tensors: Mapping[str, NewTensor], metadata: Mapping[str, str]) -> None:
    # Wide numbers first, as in the library, so that each tensor is aligned.
    sizes = {name: t.size // max(1, math.prod(t.shape)) for name, t in tensors.items()}
    order = sorted(tensors, key=lambda name: (-sizes[name], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.size],
        }
        at += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for chunk in tensors[name].content():
                file.write(chunk)


def _chunks(stored: StoredTensor) -> Iterator[bytes]:
    left = stored.size
    with stored.file.open("rb") as file:
        file.seek(stored.start)
        while left:
            raw = file.read(min(CHUNK, left))
            if not raw:
                raise ExportError(f"{stored.file}: is truncated; download or copy it again")
            left -= len(raw)
            yield raw


def _bytes(numbers: Tensor, dtype: str) -> bytes:
    rounded = numbers.to(DTYPES[dtype])
    if not rounded.isfinite().all():
        raise ExportError(
            f"export.dtype: {dtype} cannot hold all of the model's weights; choose bfloat16"
        )
    return bytes(rounded.contiguous().view(-1).view(torch.uint8).numpy().data)
