"""Export for the server, cached per run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from embedgrad.deploy.export import export
from embedgrad.deploy.folder import FILE, VERSION, digest, read_export
from embedgrad.errors import ExportError, RunError
from embedgrad.events import Report, stage

FOLDER = "served"  # inside a run
INPUTS = ("recipe.toml", "prompt/prompt.json", "prompt/prompt.safetensors")


def export_once(
    folder: Path, destination: str, overrides: Sequence[str], report: Report
) -> tuple[Path, str]:
    """An export to `destination`, and the name that clients call its model by.

    `folder` is such an export, or a run. A run's export is stored inside it and used again as long
    as its prompt, its recipe and the overrides are the same. Raises `EmbedgradError`.
    """
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
    try:
        parts = [str(VERSION), *(digest(folder / name) for name in INPUTS), *overrides]
    except OSError as error:
        raise RunError(
            f"{error.filename}: cannot be read ({error.strerror}); give a folder that "
            "`optimize` or `export` wrote"
        ) from error
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
