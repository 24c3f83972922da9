"""The servers that `serve` can start: what they open, and their command lines."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

from embedgrad.errors import EngineError, nearest


@final
@dataclass(frozen=True, slots=True)
class Launch:
    """What a server is started with; clients call the model by `name`."""

    export: Path
    name: str
    host: str
    port: int


@final
@dataclass(frozen=True, slots=True)
class ServingEngine:
    """A server with an OpenAI-compatible API that answers at /health when it is ready.

    It opens exports to `destination`. `install_problem` returns what is missing, or None.
    `knows_names`: clients may call the model by a name instead of its folder.
    """

    destination: str
    install: str
    install_problem: Callable[[], str | None]
    command: Callable[[Launch], list[str]]
    knows_names: bool = True


def find_engine(name: str) -> ServingEngine:
    """The installed engine of that name. Raises `EngineError`."""
    if name not in ENGINES:
        raise EngineError(f"--engine: unknown engine {name!r}; {nearest(name, ENGINES)}")
    engine = ENGINES[name]
    problem = engine.install_problem()
    if problem:
        raise EngineError(f"--engine {name}: {problem}; {engine.install}")
    return engine


def _package(*names: str) -> Callable[[], str | None]:
    def problem() -> str | None:
        missing = next((name for name in names if importlib.util.find_spec(name) is None), None)
        return missing and f"{missing} is not installed"

    return problem


def _program(name: str) -> Callable[[], str | None]:
    return lambda: None if shutil.which(name) else f"the program {name!r} is not installed"


def _llamacpp(launch: Launch) -> list[str]:
    files = sorted(launch.export.glob("*.gguf"))
    if len(files) != 1:
        raise EngineError(f"{launch.export}: holds {len(files)} .gguf files; expected one")
    options = {
        "model": str(files[0]),
        "alias": launch.name,
        "host": launch.host,
        "port": launch.port,
        "cache_prompt": True,
    }
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal():  # as in PyTorch
        options["threads"] = int(threads)
    module = "embedgrad.deploy.verify.llamacpp_child"
    return [sys.executable, "-m", module, json.dumps(options)]


def _transformers(launch: Launch) -> list[str]:
    # As a module, so that it is this Python's transformers.
    serve = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
    return [*serve, str(launch.export), "--host", launch.host, "--port", str(launch.port)]


def _vllm(launch: Launch) -> list[str]:
    address = ["--host", launch.host, "--port", str(launch.port)]
    serve = [shutil.which("vllm") or "vllm", "serve", str(launch.export)]
    return [*serve, *address, "--served-model-name", launch.name]


ENGINES = {
    "llamacpp": ServingEngine(
        "gguf",
        'pip install "embedgrad[llamacpp]" installs it',
        _package("xllamacpp"),
        _llamacpp,
    ),
    "transformers": ServingEngine(
        "vocabulary",
        'pip install "embedgrad[serve]" installs it',
        _package("fastapi", "uvicorn", "openai"),
        _transformers,
        knows_names=False,
    ),
    "vllm": ServingEngine(
        "vocabulary",
        "install vLLM as its documentation describes, or choose --engine llamacpp",
        _program("vllm"),
        _vllm,
    ),
}
