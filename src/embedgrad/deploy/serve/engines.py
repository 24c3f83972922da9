"""Command lines of the servers that `serve` starts."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from embedgrad.data.bounded_reads import read_text
from embedgrad.deploy.destinations.gguf import GRAMMAR
from embedgrad.errors import EngineError, nearest


@final
@dataclass(frozen=True, slots=True)
class ServingEngine:
    """A server with an OpenAI-compatible API that answers at /health when it is ready.

    It opens exports to `destination`, and needs `packages` or a `program`. `command` takes the
    export, the name that clients call the model by, host and port. `knows_names`: clients may use
    that name instead of the export's folder. `limits`: it can hold replies to the choices.
    """

    destination: str
    install: str
    command: Callable[[Path, str, str, int], list[str]]
    packages: Sequence[str] = ()
    program: str = ""
    knows_names: bool = True
    limits: bool = True


def find_engine(name: str) -> ServingEngine:
    """The installed engine of that name. Raises `EngineError`."""
    if name not in ENGINES:
        raise EngineError(f"--engine: unknown engine {name!r}; {nearest(name, ENGINES)}")
    engine = ENGINES[name]
    missing = [package for package in engine.packages if importlib.util.find_spec(package) is None]
    if engine.program and not shutil.which(engine.program):
        missing.append(f"the program {engine.program!r}")
    if missing:
        raise EngineError(f"--engine {name}: {missing[0]} is not installed; {engine.install}")
    return engine


def _llamacpp(export: Path, name: str, host: str, port: int) -> list[str]:
    files = sorted(export.glob("*.gguf"))
    if len(files) != 1:
        raise EngineError(f"{export}: holds {len(files)} .gguf files; expected one")
    options: dict[str, Any] = {"model": str(files[0]), "alias": name, "host": host, "port": port}
    options |= {"cache_prompt": True, "temperature": 0.0}  # unless a request says otherwise
    grammar = export / GRAMMAR
    if grammar.is_file():
        options["grammar"] = read_text(grammar)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal():  # as in PyTorch
        options["threads"] = int(threads)
    module = "embedgrad.model.llamacpp.child"
    return [sys.executable, "-m", module, json.dumps(options)]


def _transformers(export: Path, name: str, host: str, port: int) -> list[str]:
    # As a module, so that it is this Python's transformers.
    serve = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
    return [*serve, str(export), "--host", host, "--port", str(port)]


def _vllm(export: Path, name: str, host: str, port: int) -> list[str]:
    serve = [shutil.which("vllm") or "vllm", "serve", str(export)]
    return [*serve, "--host", host, "--port", str(port), "--served-model-name", name]


ENGINES = {
    "llamacpp": ServingEngine(
        "gguf",
        'pip install "embedgrad[llamacpp]" installs it',
        _llamacpp,
        packages=("xllamacpp",),
    ),
    "transformers": ServingEngine(
        "vocabulary",
        'pip install "embedgrad[serve]" installs it',
        _transformers,
        packages=("fastapi", "uvicorn", "openai"),
        knows_names=False,
        limits=False,
    ),
    "vllm": ServingEngine(
        "vocabulary",
        "install vLLM as its documentation describes, or choose --engine llamacpp",
        _vllm,
        program="vllm",
    ),
}
