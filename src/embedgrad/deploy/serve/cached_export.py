"""Export for the server, cached per run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from embedgrad.deploy.export import export
from embedgrad.deploy.folder import FILE, VERSION, digest, read_export
from embedgrad.errors import ExportError, RunError
from embedgrad.events import Report, stage
from embedgrad.prompt import artifact
from embedgrad.recipe.paths import RECIPE, find_run, prompt_folder

FOLDER = "served"  # inside a run


def export_once(
    folder: Path, destination: str, overrides: Sequence[str], report: Report
) -> tuple[Path, str]:
    """An export to `destination`, and the name that clients call its model by.

    `folder` is such an export, a run, or a prompt alone. The export of the last two is stored
    inside and used again as long as prompt, recipe and overrides are the same. Raises
    `EmbedgradError`.
    """
    folder = find_run(folder) or folder
    name = folder.resolve().name
    if (folder / FILE).is_file():
        if overrides:
            raise ExportError(f"{folder}: is an export, which --set cannot change; give its run")
        to = read_export(folder)["destination"]
        if to != destination:
            raise ExportError(
                f"{folder}: is an export to {to}, but this engine opens {destination}; give the "
                "run, or another --engine"
            )
        return folder, name
    out = folder / FOLDER / f"{destination}-{_digest(folder, overrides)}"
    if out.is_dir():
        read_export(out)
        stage(report, f"opening {out}")
    else:
        stage(report, f"exporting to {destination}, once")
        export(folder, destination, out, overrides=overrides, report=report)
    return out, name


def _digest(folder: Path, overrides: Sequence[str]) -> str:
    """Digest of everything that determines an export, the format's version included."""
    prompt, recipe = prompt_folder(folder), folder / RECIPE
    inputs = [prompt / artifact.JSON_FILE, prompt / artifact.ROWS_FILE]
    inputs += [recipe] if recipe.is_file() else []
    try:
        parts = [str(VERSION), *map(digest, inputs), *overrides]
    except OSError as error:
        raise RunError(
            f"{error.filename}: cannot be read ({error.strerror}); give a folder that "
            "`optimize` or `export` wrote"
        ) from error
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
