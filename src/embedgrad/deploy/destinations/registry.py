"""Every destination by name."""

from __future__ import annotations

import importlib

from embedgrad.deploy.job import Destination
from embedgrad.errors import ExportError, nearest

# Module and class; imported when first used, as some take long.
DESTINATIONS = {
    "safetensors": ("safetensors", "FilesOnly"),
    "vocabulary": ("vocabulary", "Vocabulary"),
    "gguf": ("gguf", "Gguf"),
    "peft": ("peft", "PeftAdapter"),
    "vllm": ("vllm", "VllmBodies"),
    "sglang": ("sglang", "SglangBodies"),
}


def destination(name: str) -> Destination:
    """The destination of that name. Raises `ExportError` for an unknown one."""
    if name not in DESTINATIONS:
        raise ExportError(f"--to: unknown destination {name!r}; {nearest(name, DESTINATIONS)}")
    module, made = DESTINATIONS[name]
    place = f"embedgrad.deploy.destinations.{module}"
    found: Destination = getattr(importlib.import_module(place), made)()
    return found
