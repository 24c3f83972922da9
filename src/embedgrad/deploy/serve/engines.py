"""The servers that exist: what they open, and how they are started."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from embedgrad.errors import EngineError, nearest


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a server is started with; `name` is what clients shall call it by."""

    export: Path
    name: str
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class ServingEngine:
    """An existing server with an OpenAI-compatible API that says at /health when it is ready.

    `destination` is the export that it opens. `lacks` names what is not installed, or is "".
    `knows_names`: whether clients may call the model by a name instead of by its folder.
    """

    destination: str
    install: str
    lacks: Callable[[], str]
    command: Callable[[Wanted], list[str]]
    knows_names: bool = True


def engine_of(name: str) -> ServingEngine:
    """The engine of that name, which can run here. Raises `EngineError`."""
    if name not in ENGINES:
        raise EngineError(f"--engine: unknown engine {name!r}; {nearest(name, ENGINES)}")
    engine = ENGINES[name]
    lacking = engine.lacks()
    if lacking:
        raise EngineError(f"--engine {name}: {lacking} is not installed; {engine.install}")
    return engine


def _package(*names: str) -> Callable[[], str]:
    def lacks() -> str:
        return next((name for name in names if importlib.util.find_spec(name) is None), "")

    return lacks


def _program(name: str) -> Callable[[], str]:
    return lambda: "" if shutil.which(name) else f"the program {name!r}"


def _llamacpp(wanted: Wanted) -> list[str]:
    files = sorted(wanted.export.glob("*.gguf"))
    if len(files) != 1:
        raise EngineError(f"{wanted.export}: holds {len(files)} .gguf files; expected one")
    options = {
        "model": str(files[0]),
        "alias": wanted.name,
        "host": wanted.host,
        "port": wanted.port,
        "cache_prompt": True,
    }
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal():  # as PyTorch takes it
        options["threads"] = int(threads)
    module = "embedgrad.deploy.verify.llamacpp_child"
    return [sys.executable, "-m", module, json.dumps(options)]


def _transformers(wanted: Wanted) -> list[str]:
    # By its module, so that it is the transformers of this Python.
    serve = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
    return [*serve, str(wanted.export), "--host", wanted.host, "--port", str(wanted.port)]


def _vllm(wanted: Wanted) -> list[str]:
    place = ["--host", wanted.host, "--port", str(wanted.port)]
    serve = [shutil.which("vllm") or "vllm", "serve", str(wanted.export)]
    return [*serve, *place, "--served-model-name", wanted.name]


ENGINES = {
    "llamacpp": ServingEngine(
        "gguf",
        'pip install "embedgrad[llamacpp]" brings it',
        _package("xllamacpp"),
        _llamacpp,
    ),
    "transformers": ServingEngine(
        "vocabulary",
        'pip install "embedgrad[serve]" brings it',
        _package("fastapi", "uvicorn", "openai"),
        _transformers,
        knows_names=False,
    ),
    "vllm": ServingEngine(
        "vocabulary",
        "install vLLM as its own documentation says, or choose --engine llamacpp",
        _program("vllm"),
        _vllm,
    ),
}
