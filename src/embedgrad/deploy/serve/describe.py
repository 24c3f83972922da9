"""Describe what is served: precision, scores, and what its check found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedgrad.data.bounded_reads import read_object
from embedgrad.deploy.card import (
    AGREEMENTS,
    agreement,
    agreements,
    low_agreement,
    score_lines,
)
from embedgrad.deploy.folder import REPORT
from embedgrad.errors import ExportError, border
from embedgrad.report.terminal.tables import FREE_ENOUGH


def describe(
    export: Path, entries: Mapping[str, Any], *, limits: bool = True
) -> tuple[list[str], list[str]]:
    """Lines on an export, and warnings; `entries` are those of its `export.json`.

    `limits`: the server can hold replies to the choices. Raises `ExportError` for scores and checks
    that cannot be read.
    """
    with border(export, ExportError):
        return _describe(export, entries, limits=limits)


def _describe(
    export: Path, entries: Mapping[str, Any], *, limits: bool
) -> tuple[list[str], list[str]]:
    facts, warnings = [_precision(entries)], [] if limits else _find_unlimited(entries)
    for name, entry in entries["prompts"].items():
        if entry.get("scores"):
            facts += [f"{name}: {line}" for line in score_lines(entry["scores"])]
    checked = read_object(export / REPORT)
    if not checked:
        unchecked = (
            f"this export was not checked; `embedgrad verify {export}` checks it, with --run RUN "
            "if it was made from a prompt alone"
        )
        return facts, [*warnings, unchecked]
    if not limits:  # the answers that the check counted were limited
        checked["limited_agreement"] = None
    facts += [
        f"check on {checked['rows']} rows: {AGREEMENTS[key]}: {agreement(share, checked['rows'])}"
        for key, share in agreements(checked).items()
    ]
    if not checked.get("passed"):
        warnings.append(f"the check of this export failed; see {export / REPORT}")
    return facts, [*warnings, *low_agreement(checked, entries)]


def _find_unlimited(entries: Mapping[str, Any]) -> list[str]:
    """Prompts whose replies may be no choice where nothing limits them."""
    names = []
    for name, entry in entries["prompts"].items():
        refined = (entry.get("scores") or {}).get("refined", {})
        if entry.get("choices") and (refined.get("greedy_is_choice") or 0) < FREE_ENOUGH:
            names.append(name)
    return [
        f"{name}: this server cannot limit replies to the choices, so they may be any text; serve "
        "it with --engine llamacpp or vllm"
        for name in names
    ]


def _precision(entries: Mapping[str, Any]) -> str:
    """The types of the weights against training's."""
    written, dtype = entries["written"], entries.get("model", {}).get("dtype", "unknown")
    kinds = [f"{kind} ({n} tensors)" for kind, n in written.get("types", {}).items()]
    served = ", ".join(kinds) or written.get("quantized") or written.get("rows_dtype", "unknown")
    return f"precision of the weights: {served}; in training: {dtype}"
