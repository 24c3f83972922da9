"""The rows that a training begins at: the words', or an earlier run's."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from embedgrad.errors import RunError
from embedgrad.model.compatibility import fit_to_model
from embedgrad.model.language_model import LanguageModel
from embedgrad.parts.parameterizations import Parameterization, text_rows
from embedgrad.prompt import artifact
from embedgrad.prompt.sequence import Sequencer
from embedgrad.prompt.span import rows_by_span
from embedgrad.recipe.paths import prompt_folder
from embedgrad.recipe.recipe import Recipe


def read_warm_start(
    recipe: Recipe, model: LanguageModel, sequencer: Sequencer
) -> dict[str, Tensor] | None:
    """The rows to begin at, by span; None: those of the words.

    Raises `RunError` for a prompt of other words or with rows for more layers, `ArtifactError` for
    one of another model, and `RecipeError` where the parameterization cannot begin there.
    """
    if recipe.training.warm_start is None:
        return None
    folder = Path(recipe.training.warm_start)
    prompt = fit_to_model(artifact.load(prompt_folder(folder)), model.info, model.embed)
    theirs, ours = ([span.text for span in spans] for spans in (prompt.spans, sequencer.spans))
    if theirs != ours:
        raise RunError(
            f"training.warm_start: {folder} refines {theirs}, and this recipe {ours}; the words of "
            "both must be the same"
        )
    parameterization, rows_PD = recipe.parts.parameterization, prompt.rows
    start_PD = text_rows(model, sequencer.prompt_ids, parameterization)
    missing = start_PD.shape[1] - rows_PD.shape[1]
    if missing < 0:
        raise RunError(
            f"training.warm_start: {folder} has rows for every layer; set parameterization.deep too"
        )
    rows = rows_by_span(torch.nn.functional.pad(rows_PD, (0, missing)), prompt.spans)
    parameterization.reach(rows, rows_by_span(start_PD, sequencer.spans))
    return rows


def start_rows(
    model: LanguageModel, sequencer: Sequencer, parameterization: Parameterization
) -> dict[str, Tensor]:
    """The rows that training begins at, those of a prompt's own words, by span."""
    rows_PD = text_rows(model, sequencer.prompt_ids, parameterization)
    return rows_by_span(rows_PD, sequencer.spans)
