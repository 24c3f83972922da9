"""Versions of what the numbers depend on."""

from __future__ import annotations

import importlib.metadata
import sys
from contextlib import suppress

PACKAGES = ("embedgrad", "torch", "transformers", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
