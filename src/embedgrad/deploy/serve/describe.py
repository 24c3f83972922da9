"""Describe what is served: precision, scores, and what its check found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from embedgrad.deploy.card import AGREEMENTS, agreement, score_lines
from embedgrad.deploy.folder import REPORT
from embedgrad.formatting import percent

ENOUGH = 0.9  # the share of rows in agreement below which a check is a warning


def describe(export: Path, entries: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Lines on an export, and warnings; `entries` are those of its `export.json`."""
    facts = [_precision(entries)]
    for name, entry in entries["prompts"].items():
        if entry.get("scores"):
            facts += [f"{name}: {line}" for line in score_lines(entry["scores"])]
    checked: dict[str, Any] | None = None
    with suppress(OSError, ValueError):
        checked = json.loads((export / REPORT).read_text("utf-8"))
    if not isinstance(checked, dict):
        return facts, [f"this export was not checked; `embedgrad verify {export}` checks it"]
    shares = {key: checked[key] for key in AGREEMENTS if isinstance(checked.get(key), float)}
    facts += [
        f"check on {checked['rows']} rows: {AGREEMENTS[key]}: {agreement(share, checked['rows'])}"
        for key, share in shares.items()
    ]
    warnings = []
    if not checked.get("passed"):
        warnings.append(f"the check of this export failed; see {export / REPORT}")
    for key, share in shares.items():
        if share < ENOUGH:
            remedy = _remedy(entries)
            if key == "limited_agreement" and shares.get("choice_agreement", 0) >= ENOUGH:
                remedy = "rank the choices by log-probability, as the last request does"
            warnings.append(f"{AGREEMENTS[key]} in only {percent(share)} of the rows; {remedy}")
    return facts, warnings


def _precision(entries: Mapping[str, Any]) -> str:
    """The types of the weights against training's."""
    written, dtype = entries["written"], entries.get("model", {}).get("dtype", "unknown")
    kinds = [f"{kind} ({n} tensors)" for kind, n in written.get("types", {}).items()]
    served = ", ".join(kinds) or written.get("quantized") or written.get("rows_dtype", "unknown")
    return f"precision of the weights: {served}; in training: {dtype}"


def _remedy(entries: Mapping[str, Any]) -> str:
    """How to serve what training computed."""
    written = entries["written"]
    if "types" in written and set(written["types"]) != {"F32"}:
        return "serve the run with --set export.gguf=f32, or train with the weights that you serve"
    if written.get("rows_dtype", "float32") != "float32" and not written.get("quantized"):
        return "serve the run with --set export.dtype=float32"
    return "serve it with --engine llamacpp --set export.gguf=f32, or train with the served weights"
