"""Which engine checks each destination, and what that check can claim."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, final

from embedgrad.deploy.job import ExportedPrompt, Job
from embedgrad.deploy.verify.engine import Engine
from embedgrad.errors import EngineError


@final
class CheckEngine(NamedTuple):
    """An engine's class, the optional package and extra that it needs, and how a check calls it.

    `copies`: how many temporary copies of the export a check writes beside it.
    """

    module: str
    name: str
    package: str = ""
    extra: str = ""
    copies: int = 0
    description: str = "its own engine"


def _decoding(server: str) -> CheckEngine:
    asked = f"{server} request bodies, decoded and given to the base model"
    asked += f" ({server} itself was not asked)"
    return CheckEngine("embeddings", "BodyEngine", description=asked)


CHECK_ENGINES = {
    "safetensors": CheckEngine("embeddings", "SnippetEngine"),
    "vocabulary": CheckEngine("vocabulary", "CheckpointEngine"),
    "gguf": CheckEngine("llamacpp", "LlamaCppEngine", "xllamacpp", "llamacpp", copies=1),
    "peft": CheckEngine("peft", "PeftEngine", "peft", "compare"),
    "vllm": _decoding("vLLM"),
    "sglang": _decoding("SGLang"),
}


def check_installed(destination: str) -> None:
    """Raise `EngineError` if the package of a destination's engine is missing."""
    package, extra = CHECK_ENGINES[destination].package, CHECK_ENGINES[destination].extra
    if package and importlib.util.find_spec(package) is None:
        raise EngineError(
            f"{destination}: its check needs the package {package}, which is not installed; "
            f"pip install 'embedgrad[{extra}]', or export without a check (--no-verify)"
        )


def engine_versions(destination: str) -> dict[str, str]:
    """Version of the optional package that a destination's engine comes from."""
    package = CHECK_ENGINES[destination].package
    with suppress(importlib.metadata.PackageNotFoundError):
        return {package: importlib.metadata.version(package)} if package else {}
    return {}


def open_engine(
    destination: str, folder: Path, job: Job, exported: ExportedPrompt, written: Mapping[str, Any]
) -> Engine:
    """Open an export of `job` to check one of its prompts. Raises `EngineError`."""
    check_installed(destination)
    entry = CHECK_ENGINES[destination]
    module = importlib.import_module(f"embedgrad.deploy.verify.{entry.module}")
    open_export = getattr(module, entry.name)
    engine: Engine = open_export(folder, job, exported, {**written, "destination": destination})
    return engine
