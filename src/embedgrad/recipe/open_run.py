"""Open a finished run: its recipe, its artifact and its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from embedgrad.errors import RunError
from embedgrad.evaluation.evaluator import Evaluator
from embedgrad.events import Report, quiet, stage
from embedgrad.model.compatibility import fit_to_model
from embedgrad.model.language_model import LanguageModel
from embedgrad.prompt import artifact
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.prompt.sequence import Sequencer
from embedgrad.recipe.build import open_model
from embedgrad.recipe.recipe import Recipe


@final
@dataclass(frozen=True)
class Answering:
    """A prompt with its model, ready to answer."""

    prompt: PromptEmbedding
    model: LanguageModel
    sequencer: Sequencer
    evaluator: Evaluator


@final
@dataclass(frozen=True)
class OpenRun:
    """A finished run with its model."""

    prompt: PromptEmbedding
    model: LanguageModel
    sequencer: Sequencer
    evaluator: Evaluator
    folder: Path
    recipe: Recipe

    @property
    def answering(self) -> Answering:
        """Its prompt and model, to answer queries."""
        return Answering(self.prompt, self.model, self.sequencer, self.evaluator)


def open_run(
    folder: str | Path,
    overrides: Sequence[str] = (),
    report: Report = quiet,
    *,
    model: LanguageModel | None = None,
) -> OpenRun:
    """Load a run's recipe, artifact and model, and check that they belong together.

    `overrides` change the recipe, but cannot change what the prompt was trained with. A loaded
    `model` replaces the recipe's. Raises `RunError`, `RecipeError`, `ArtifactError` and
    `ModelError`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(
            f"{folder}: no such run folder; `embedgrad optimize RECIPE --out RUN` makes one"
        )
    if not (folder / "recipe.toml").is_file():
        raise RunError(f"{folder}: holds no recipe.toml; give the folder that `optimize` wrote")
    recipe = Recipe.read_run(folder, overrides)
    prompt = artifact.load(folder / "prompt")
    for name in ("template", "target"):
        if getattr(recipe, name) != getattr(prompt, name):
            raise RunError(
                f"{folder}: {name} of the recipe is not the one that the saved prompt was trained "
                "with; to change it, run optimize again into a new folder"
            )
    if model is None:
        stage(report, f"loading {recipe.model.name}")
        model = open_model(recipe, report)
    prompt = fit_to_model(prompt, model.info, model.embed)
    sequencer = model.sequencer(
        prompt.template,
        prompt.target,
        spans=prompt.spans,
        date=prompt.date,
        truncate=recipe.data.truncate,
    )
    evaluator = Evaluator(model, sequencer, recipe.evaluation)
    return OpenRun(prompt, model, sequencer, evaluator, folder, recipe)
