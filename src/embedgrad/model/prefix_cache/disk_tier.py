"""Disk tier: prefixes that do not fit into memory spill here.

A file holds the raw bytes of keys and values; shapes and checksum stay in memory. Nothing read
back is used unless its checksum is that of the bytes written.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import weakref
import zlib
from pathlib import Path
from typing import NamedTuple, final

import torch
from torch import Tensor

from embedgrad.atomic_files import scratch_folder
from embedgrad.errors import RunError
from embedgrad.events import Report, quiet, say
from embedgrad.model.prefix_cache.budget import budget_bytes
from embedgrad.model.prefix_cache.memory_tier import CachedPrefix, Tier
from embedgrad.prompt.boundaries import Ids

KEPT_FREE = 0.05  # share of the disk that is never filled
EXACT = "the results stay the same"


@final
class _File(NamedTuple):
    path: Path
    checksum: int
    nbytes: int
    parts: tuple[tuple[torch.Size, torch.dtype], tuple[torch.Size, torch.dtype]]


@final
class Spill(Tier):
    """Prefixes in files of a private folder in `folder`, which is removed when it is not needed.

    `budget` is in bytes, a size, or a share of the free disk. `report` gets a note when the disk is
    full or a file is damaged. Raises `RunError` where the folder cannot be used.
    """

    writes = True

    def __init__(self, folder: str | Path, budget: str | float = 0.5, report: Report = quiet):
        try:
            folder = Path(folder).expanduser()
            stack = contextlib.ExitStack()
            private = scratch_folder(folder.absolute(), "embedgrad-prefixes")
            self.folder = stack.enter_context(private)
        # ValueError: a NUL byte in the name; RuntimeError: ~ of a user that is none.
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RunError(
                f"prefix_cache.spill: {str(folder)!r}: no folder can be made here ({reason}); "
                "expected a folder that you may write to; name another, or leave the option out"
            ) from error
        # Also at the interpreter's end.
        weakref.finalize(self, stack.close)
        name = "prefix_cache.spill_budget"
        super().__init__(budget_bytes(budget, name, lambda: shutil.disk_usage(folder).free))
        self._full = False
        self._written = 0
        self._files: dict[Ids, _File] = {}
        self._report = report

    def _write(self, ids: Ids, prefix: CachedPrefix) -> bool:
        """Write a prefix; once the disk is full nothing more is written."""
        if self._full:
            return False
        path = self.folder / f"{self._written}.prefix"
        self._written += 1
        tensors = [t.detach().cpu().contiguous() for t in prefix]
        checksum = 0
        try:
            disk = shutil.disk_usage(self.folder)
            if disk.free - prefix.nbytes < KEPT_FREE * disk.total:
                self._stop(f"less than {100 * KEPT_FREE:.0f} % of the disk is free")
                return False
            with open(path, "xb") as file:
                for raw in map(_raw, tensors):
                    checksum = zlib.crc32(raw, checksum)
                    file.write(raw)
        except BaseException as error:  # also Ctrl-C in the middle
            with contextlib.suppress(OSError):
                path.unlink()
            if not isinstance(error, OSError):
                raise
            self._stop(error.strerror or str(error))
            return False
        keys, values = ((tensor.shape, tensor.dtype) for tensor in tensors)
        self._files[ids] = _File(path, checksum, prefix.nbytes, (keys, values))
        return True

    def load(self, ids: Ids) -> CachedPrefix | None:
        """Read a prefix back; one that is not as it was written is removed, and None."""
        file = self._files[ids]
        raw = _read(file)
        if raw is None:
            self.remove(ids)
            self.damaged += 1
            if self.damaged == 1:
                text = (
                    f"prefix_cache.spill: {file.path} is damaged or gone; such prefixes are "
                    f"computed again, {EXACT} (reported once)"
                )
                say(self._report, [text])
            return None
        (shape, dtype), (value_shape, value_dtype) = file.parts
        end = shape.numel() * dtype.itemsize
        values = raw[end:].view(value_dtype).view(value_shape)
        return CachedPrefix(raw[:end].view(dtype).view(shape), values)

    def _delete(self, ids: Ids) -> None:
        with contextlib.suppress(OSError):
            self._files.pop(ids).path.unlink()

    def _stop(self, reason: str) -> None:
        self._full = True
        self.budget = self.nbytes  # no room, so that nothing is built ahead in vain
        text = (
            f"prefix_cache.spill: {self.folder}: {reason}; from here on prefixes over the budget "
            f"are computed again, {EXACT}"
        )
        say(self._report, [text])


def _raw(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data


def _read(file: _File) -> Tensor | None:
    """A file's bytes; None if they are not those written.

    No memory map: it shows later changes too, and an error of the disk would end the process.
    """
    with contextlib.suppress(OSError, ValueError), open(file.path, "rb") as opened:
        if os.fstat(opened.fileno()).st_size == file.nbytes:
            raw = torch.empty(file.nbytes, dtype=torch.uint8)
            opened.readinto(raw.numpy().data)  # ValueError: cut short this very moment
            return raw if zlib.crc32(_raw(raw)) == file.checksum else None
    return None
