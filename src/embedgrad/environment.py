"""What a measurement depends on: package versions, and the peak memory of this process."""

from __future__ import annotations

import importlib.metadata
import sys
from contextlib import suppress

import psutil

PACKAGES = ("embedgrad", "torch", "transformers", "tokenizers", "safetensors")


def versions(*more: str) -> dict[str, str]:
    """Versions of what the numbers depend on, and of `more` packages where they are installed."""
    found = {"python": sys.version.split()[0]}
    for name in (*PACKAGES, *more):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
