"""Package versions, processes, peak memory and the cache folder."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

PACKAGES = ("embedgrad", "torch", "transformers", "tokenizers", "safetensors")


def cache_folder() -> Path:
    """$EMBEDGRAD_CACHE, else $XDG_CACHE_HOME/embedgrad, else ~/.cache/embedgrad."""
    if own := os.environ.get("EMBEDGRAD_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "embedgrad"


def is_running(pid: int) -> bool:
    """Whether a process of this machine has not ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error as error:
        return isinstance(error, psutil.AccessDenied)


def process_name(pid: int | None = None) -> str:
    """The name of a process of this machine, by default this one, among those of all machines."""
    return f"{socket.gethostname()} {os.getpid() if pid is None else pid}"


def may_run(process: str) -> bool:
    """Whether a process of that name runs, as far as can be told from this machine."""
    host, pid = process.split()
    return host != socket.gethostname() or is_running(int(pid))


def versions(*more: str) -> dict[str, str]:
    """Versions of what the numbers depend on, and of `more` packages where they are installed."""
    by_name = {"python": sys.version.split()[0]}
    for name in (*PACKAGES, *more):
        with suppress(importlib.metadata.PackageNotFoundError):
            by_name[name] = _version_of(name)
    return by_name


_version_of = functools.cache(importlib.metadata.version)  # which reads a file


def peak_memory(device: torch.device | None = None) -> int:
    """The most bytes in use so far: of a GPU's own memory, else of this process."""
    if device is not None and device.type == "cuda":
        return int(_cuda().max_memory_allocated(device))
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_in_use(device: torch.device) -> int:
    """Bytes in use: of a GPU's own memory, else of this process."""
    if device.type == "cuda":
        return int(_cuda().memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def reset_peak_memory(device: torch.device) -> None:
    """Forget the peak. Of a process only Linux can; elsewhere it stays."""
    if device.type == "cuda":
        _cuda().reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _cuda() -> ModuleType:
    import torch  # takes seconds, and not every command needs it

    return torch.cuda
