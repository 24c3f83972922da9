"""The export that a server opens, made once per run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from embedgrad.deploy.export import export
from embedgrad.deploy.folder import read_export
from embedgrad.errors import ExportError, RunError
from embedgrad.events import Report, stage

FOLDER = "served"  # inside a run
DECIDES = ("recipe.toml", "prompt/prompt.json", "prompt/prompt.safetensors")


def prepared(
    folder: Path, destination: str, overrides: Sequence[str], report: Report
) -> tuple[Path, str]:
    """An export of this kind, and what clients call its model by.

    `folder` is such an export, or a run, beside which the export is kept and found again as long as
    its prompt, its recipe and the settings from outside are the same. Raises `EmbedgradError`.
    """
    if (folder / "embedgrad" / "export.json").is_file():
        return _given(folder, destination, overrides), folder.resolve().name
    out = folder / FOLDER / f"{destination}-{_digest(folder, overrides)}"
    if out.is_dir():
        read_export(out)
        stage(report, f"opening {out}")
    else:
        stage(report, f"exporting to {destination}, once")
        export(folder, destination, out, overrides=overrides, report=report)
    return out, folder.resolve().name


def _given(folder: Path, destination: str, overrides: Sequence[str]) -> Path:
    if overrides:
        raise ExportError(f"{folder}: is an export, which --set cannot change; give its run")
    found = read_export(folder)["destination"]
    if found != destination:
        raise ExportError(
            f"{folder}: is an export to {found}, and this engine opens {destination}; "
            "give the run, or another --engine"
        )
    return folder


def _digest(folder: Path, overrides: Sequence[str]) -> str:
    """Of all that decides what an export holds."""
    digest = hashlib.sha256()
    for name in DECIDES:
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise RunError(
                f"{folder / name}: cannot be read ({error.strerror}); give a folder that "
                "`optimize` or `export` wrote"
            ) from error
        digest.update(hashlib.sha256(content).digest())
    for setting in overrides:
        digest.update(hashlib.sha256(setting.encode()).digest())
    return digest.hexdigest()[:12]
