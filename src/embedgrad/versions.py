"""Versions of what the numbers depend on."""

from __future__ import annotations

import importlib.metadata
import sys
from contextlib import suppress

PACKAGES = ("embedgrad", "torch", "transformers", "tokenizers", "safetensors")


def versions(*more: str) -> dict[str, str]:
    """Versions of what the numbers depend on, and of `more` packages where they are installed."""
    found = {"python": sys.version.split()[0]}
    for name in (*PACKAGES, *more):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
