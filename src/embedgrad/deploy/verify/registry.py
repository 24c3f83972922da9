"""The engine that checks each destination, and the package that it comes from."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from embedgrad.deploy.job import Exported, Job
from embedgrad.deploy.verify.engine import Engine
from embedgrad.errors import EngineError


class Entry(NamedTuple):
    """Where an engine's class is, and the optional package and extra that it needs.

    `copies`: whole exports that it writes beside the one that it checks, and removes.
    """

    module: str
    made: str
    package: str = ""
    extra: str = ""
    copies: int = 0


ENGINES = {
    "safetensors": Entry("safetensors", "SnippetEngine"),
    "vocabulary": Entry("vocabulary", "CheckpointEngine"),
    "gguf": Entry("llamacpp", "LlamaCppEngine", "xllamacpp", "llamacpp", copies=1),
    "peft": Entry("peft", "PeftEngine", "peft", "compare"),
    "vllm": Entry("embedding_server", "BodyEngine"),
    "sglang": Entry("embedding_server", "BodyEngine"),
}


def check_installed(destination: str) -> None:
    """Raise `EngineError` where the package of a destination's engine is missing."""
    package, extra = ENGINES[destination].package, ENGINES[destination].extra
    if package and importlib.util.find_spec(package) is None:
        raise EngineError(
            f"{destination}: its check needs the package {package}, which is not installed; "
            f"pip install 'embedgrad[{extra}]', or export without a check (--no-verify)"
        )


def engine_versions(destination: str) -> dict[str, str]:
    """Version of the package that a destination's engine comes from, if it is an optional one."""
    package = ENGINES[destination].package
    with suppress(importlib.metadata.PackageNotFoundError):
        return {package: importlib.metadata.version(package)} if package else {}
    return {}


def open_engine(
    destination: str, folder: Path, job: Job, exported: Exported, written: Mapping[str, Any]
) -> Engine:
    """An export of `job`, opened to check one of its prompts. Raises `EngineError`."""
    check_installed(destination)
    entry = ENGINES[destination]
    made = getattr(importlib.import_module(f"embedgrad.deploy.verify.{entry.module}"), entry.made)
    engine: Engine = made(folder, job, exported, {**written, "destination": destination})
    return engine
