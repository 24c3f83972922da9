"""Every destination by name."""

from __future__ import annotations

import importlib

from embedgrad.errors import ExportError, nearest
from embedgrad.exporting.base import Destination

# Module and class; imported when first used, as some take long.
DESTINATIONS = {
    "safetensors": ("files_only", "FilesOnly"),
    "vocabulary": ("vocabulary", "Vocabulary"),
    "gguf": ("gguf_file", "Gguf"),
    "peft": ("peft_adapter", "PeftAdapter"),
    "vllm": ("vllm_bodies", "VllmBodies"),
    "sglang": ("sglang_bodies", "SglangBodies"),
}


def destination(name: str) -> Destination:
    """The destination of that name. Raises `ExportError` for an unknown one."""
    if name not in DESTINATIONS:
        raise ExportError(f"--to: unknown destination {name!r}; {nearest(name, DESTINATIONS)}")
    module, made = DESTINATIONS[name]
    found: Destination = getattr(importlib.import_module(f"embedgrad.exporting.{module}"), made)()
    return found
