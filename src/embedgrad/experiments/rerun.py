"""Repeat a finished run, and see whether it comes to the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict, final

import torch

from embedgrad.data.bounded_reads import read_object
from embedgrad.errors import RecipeError, RunError
from embedgrad.events import Report
from embedgrad.experiments.run import run
from embedgrad.prompt import artifact
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.recipe.paths import find_run, no_run
from embedgrad.recipe.recipe import Recipe
from embedgrad.recipe.tasks import read_tasks
from embedgrad.report.terminal.bars import show

ENDED = ("finished", "patience")  # a run that is done


@final
class RerunResult(TypedDict):
    """Whether both runs have the same rows, to the bit.

    `farthest` is the largest difference of a row, in norms of the earlier one; None where the rows
    are not as many. `changed` names what is not as it was: data, versions, the model, threads, and
    the date that a chat template may show.
    """

    run: str
    again: str
    same: bool
    farthest: float | None
    changed: list[str]
    interrupted: bool


def rerun(
    path: Path, out: Path | None = None, report: Report = show, *, trust_scorer: bool = False
) -> RerunResult:
    """Run the recipe of a run into `out` (None: RUN-rerun beside it), and compare the rows.

    `path` is the run's folder or its prompt's. Raises `RunError` for a run that is not finished or
    not there, `RecipeError` for one of several tasks, and what a run raises.
    """
    folder = find_run(path)
    if folder is None:
        raise RunError(no_run(path))
    out = out or folder.with_name(f"{folder.resolve().name}-rerun")
    if read_tasks(folder / "recipe.toml") is not None:
        why = "a run of several [[tasks]] is not rerun; run its recipe.toml into another folder"
        raise RecipeError(str(folder / "recipe.toml"), [why])
    recipe = Recipe.read_run(folder, trust_scorer=trust_scorer)
    before = artifact.load(folder)
    if before.provenance.get("training", {}).get("ended") not in ENDED:
        raise RunError(f"{folder}: is not finished; `embedgrad resume {folder}` ends it")
    result = run(recipe, out, report)
    after = artifact.load(out)
    farthest = None
    if after.rows.shape == before.rows.shape:
        away = (after.rows - before.rows).norm(dim=-1) / before.rows.norm(dim=-1).clamp(min=1e-12)
        farthest = float(away.max())
    return {
        "run": str(folder),
        "again": str(out),
        "same": torch.equal(before.rows, after.rows),
        "farthest": farthest,
        "changed": _changes(_facts(folder, before), _facts(out, after)),
        "interrupted": bool(result["interrupted"]),
    }


def _facts(folder: Path, prompt: PromptEmbedding) -> dict[str, Any]:
    """What a run's rows depend on besides its recipe."""
    held = prompt.provenance
    return {
        **{f"{name} rows": split.get("sha256") for name, split in held.get("data", {}).items()},
        **held.get("versions", {}),
        "model": held.get("model", {}).get("embedding_digest"),
        "threads": read_object(folder / "result.json").get("threads"),
        "date": prompt.date,
    }


def _changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs, in words; of a digest only its name."""
    changed = []
    for name in {**then, **now}:
        a, b = then.get(name), now.get(name)
        if a != b:
            digest = name == "model" or name.endswith(" rows")
            changed.append(name if digest else f"{name} ({a}, now {b})")
    return changed
