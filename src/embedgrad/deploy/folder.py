"""Create an export's folder, complete or not at all.

OUT/...                      the destination's files
OUT/embedgrad/NAME/          the artifact of each prompt
OUT/embedgrad/export.json    origin, what was written, and the digest of every file
OUT/README.md                the card
OUT/verify.json              the report of the check
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, final

from annotated_types import MinLen
from pydantic import ValidationError
from safetensors import SafetensorError

from embedgrad.atomic_files import publish_folder, scratch_folder
from embedgrad.data.bounded_reads import file_digest, read_json
from embedgrad.data.typed import adapter_of
from embedgrad.deploy.choices import Choices
from embedgrad.deploy.formats.token_names import check_name
from embedgrad.deploy.job import DESTINATIONS
from embedgrad.errors import ExportError, RunError, border
from embedgrad.formatting import size

FORMAT, VERSION = "embedgrad-export", 2
OWN = "embedgrad"
FILE = f"{OWN}/export.json"
CARD = "README.md"
REPORT = "verify.json"
SPARE = 2**20  # bytes for everything besides the destination's own files


@final
@dataclass(frozen=True)
class _Prompt:
    """A prompt's entry of `export.json`."""

    run: str
    artifact: str
    tokens: Annotated[list[int], MinLen(1)]
    choices: Choices | None = None


@final
@dataclass(frozen=True)
class _Export:
    """The part of `export.json` that a check needs."""

    destination: str
    tag: str
    prompts: Annotated[dict[str, _Prompt], MinLen(1)]
    settings: list[str]
    written: dict[str, Any]
    files: dict[str, str]


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A new folder that becomes `out` at the end, on disk, or is removed if anything fails.

    Raises `ExportError` if `out` exists or cannot be made.
    """
    refuse_existing(out)
    parents = [parent for parent in out.parents if not parent.exists()]
    try:
        with contextlib.ExitStack() as stack:
            with one_line(out):
                name = f".{out.name}.new"
                aside = stack.enter_context(scratch_folder(out.parent, name))
            yield aside
            with one_line(out):
                publish_folder(aside, out)
    except BaseException:
        with contextlib.suppress(OSError):  # others may have put files there
            for parent in parents:
                parent.rmdir()
        raise


def refuse_existing(out: Path) -> None:
    """Raise `ExportError` if there is something already."""
    if os.path.lexists(out):
        raise ExportError(f"{out}: exists already; choose another folder for --out")


@contextlib.contextmanager
def one_line(out: Path) -> Iterator[None]:
    """Turn an error of the disk into an `ExportError`."""
    try:
        yield
    except (OSError, SafetensorError, RunError) as error:
        # A `RunError` names the temporary folder, which no longer exists when it is read.
        cause = error.__cause__ if isinstance(error, RunError) else error
        if not isinstance(cause, OSError | SafetensorError):
            raise
        reason = getattr(cause, "strerror", None) or str(cause).partition("\n")[0]
        raise ExportError(
            f"{out}: cannot be written ({reason}); nothing was left there; free some space, or "
            "choose another folder for --out"
        ) from error


def check_room(out: Path, need: int, *, links: bool = False) -> None:
    """Raise `ExportError` if the disk lacks `need` bytes and a little more.

    `links`: links instead of copies would take less.
    """
    parent = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < need + SPARE:
        more = ", or --set export.weights=link" if links else ""
        raise ExportError(
            f"{out}: needs {size(need + SPARE)}, but only {size(free)} are free there; free some "
            f"space, or choose another folder for --out{more}"
        )


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file by its path, except those that describe the export."""
    describing = {folder / name for name in (FILE, CARD, REPORT)}
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {p.relative_to(folder).as_posix(): file_digest(p) for p in files if p not in describing}


def sizes(folder: Path) -> tuple[int, int]:
    """Bytes of an export's own files, and of its links to a model's files."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    links = [path for path in files if path.is_symlink() or path.stat().st_nlink > 1]
    everything, linked = (sum(path.stat().st_size for path in group) for group in (files, links))
    return everything - linked, linked


def read_export(folder: str | Path) -> dict[str, Any]:
    """The content of `export.json`. Raises `ExportError` if it is missing, old or damaged."""
    path = Path(folder) / FILE
    try:
        values = read_json(path)
    except OSError as error:
        raise ExportError(
            f"{path}: cannot be read ({error.strerror}); expected a folder that "
            "`embedgrad export RUN --to NAME --out DIR` wrote"
        ) from error
    except ValueError as error:
        raise ExportError(f"{path}: is not JSON ({error}); export the run again") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ExportError(f'{path}: does not describe an export; expected "format": "{FORMAT}"')
    if values.get("version") != VERSION:
        raise ExportError(
            f"{path}: has format version {values.get('version')!r}, but this embedgrad reads "
            f"{VERSION}; export the run again"
        )
    try:
        adapter_of(_Export).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ExportError(f"{path}: {place}: {first['msg']}; export the run again") from error
    if values["destination"] not in DESTINATIONS:
        raise ExportError(f"{path}: unknown destination {values['destination']!r}")
    for name in values["prompts"]:
        check_name(name)
    return values


def check_files(folder: Path, entries: Mapping[str, Any]) -> None:
    """Raise `ExportError` if a file is missing or changed."""
    for name, expected in entries["files"].items():
        path = folder / name
        with border(folder / FILE, ExportError):  # a name that no file can have
            missing = not path.is_file()
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ExportError(f"{folder / FILE}: names {name!r}, which is not in the export")
        if missing:
            raise ExportError(f"{path}: is missing; export the run again")
        if file_digest(path) != expected:
            raise ExportError(f"{path}: was changed (its digest differs); export the run again")
