"""Open a finished run, or a prompt alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

from embedgrad.data.examples import Example
from embedgrad.data.splits import Splits
from embedgrad.errors import ArtifactError, EmbedgradError, ModelError, RunError
from embedgrad.evaluation.evaluator import Evaluator
from embedgrad.events import Report, quiet, stage
from embedgrad.model.compatibility import fit_to_model
from embedgrad.model.language_model import LanguageModel
from embedgrad.parts.registry import build
from embedgrad.prompt import artifact
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.prompt.images import Images
from embedgrad.prompt.sequence import Sequencer
from embedgrad.recipe.build import (
    open_model,
    open_teacher,
    read_data,
    teaching_prompt,
    with_answers,
)
from embedgrad.recipe.check_rows import read_rows, rows_to_check
from embedgrad.recipe.hub import local_folder
from embedgrad.recipe.overrides import override
from embedgrad.recipe.paths import find_run, is_path, no_run
from embedgrad.recipe.recipe import Recipe

CURE = "give --set model.name=PLACE"
_KEPT = ("evaluation", "export", "images")  # of the recipe that an artifact records


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
    """A finished run with its model; `alone`: only its prompt is there."""

    prompt: PromptEmbedding
    model: LanguageModel
    sequencer: Sequencer
    evaluator: Evaluator
    folder: Path
    recipe: Recipe
    alone: bool = False

    @property
    def answering(self) -> Answering:
        """Its prompt and model, to answer queries."""
        return Answering(self.prompt, self.model, self.sequencer, self.evaluator)

    def read_data(self) -> Splits:
        """Its rows. Raises `RunError` for a prompt alone, and `DataError`."""
        if self.alone:
            raise RunError(
                f"{self.folder}: is a prompt without its run, which knows the rows; give the run"
            )
        refined = teaching_prompt(self.recipe)
        splits = read_data(self.recipe, refined=refined, part=True)
        asked = (self.recipe, self.model, self.sequencer, quiet)
        teacher = open_teacher(*asked, refined=refined)
        return with_answers(splits, teacher) if teacher else splits

    def trained_on_others(self, splits: Splits) -> bool:
        """Whether these splits have other training rows than the prompt was trained on."""
        data = self.prompt.provenance.get("data")
        train = data.get("train") if isinstance(data, dict) else None
        known = train.get("sha256") if isinstance(train, dict) else None
        return known is not None and known != splits.digests.get("train")

    def check_rows(self) -> list[Example]:
        """The rows that it kept for checks, else those of its data; none for a prompt alone."""
        kept = None if self.alone else read_rows(self.folder)
        return [] if self.alone else kept or rows_to_check(self.read_data())


def load_prompt(folder: Path) -> PromptEmbedding:
    """A run's prompt, or one alone; where its model moved with the run, it names the new place."""
    prompt, run = artifact.load(folder), find_run(folder)
    made_for = prompt.provenance.get("model")
    if run and isinstance(made_for, dict) and _is_gone(made_for.get("name")):
        try:
            moved = Recipe.read_run(run).model.name
        except EmbedgradError:
            return prompt
        if not _is_gone(moved):
            return prompt.with_provenance(model={**made_for, "name": os.path.abspath(moved)})
    return prompt


def model_of(prompt: PromptEmbedding, advice: str) -> Mapping[str, Any]:
    """What a prompt says of its model. Raises `ArtifactError`, with `advice`, if it names none.

    A local model of an export, or of another machine, is none.
    """
    known = prompt.provenance.get("model")
    known = known if isinstance(known, dict) else {}
    name = known.get("name")
    if not isinstance(name, str):
        raise ArtifactError(f"this prompt does not say which model it is for; {advice}")
    local = known.get("kind") in ("folder", "gguf")
    if (local and not os.path.isabs(name)) or _is_gone(name):
        raise ArtifactError(
            f"this prompt is for the model {name}, which is not a place on this machine; {advice}"
        )
    return known


def open_run(
    folder: str | Path,
    overrides: Sequence[str] = (),
    report: Report = quiet,
    *,
    model: LanguageModel | None = None,
    trust_scorer: bool = False,
) -> OpenRun:
    """Load the recipe, artifact and model of a run, and check that they belong together.

    A prompt's folder is opened as its run if it lies in one, else with what the artifact says.
    `overrides` change the recipe, but cannot change what the prompt was trained with. A loaded
    `model` replaces the recipe's; `trust_scorer` lets a user's scorer that it names run;
    `hub:OWNER/NAME` is a prompt on the Hub. Raises `RunError`, `RecipeError`, `ArtifactError` and
    `ModelError`.
    """
    folder = local_folder(folder, report)
    if not folder.is_dir():
        raise RunError(no_run(folder))
    run = find_run(folder)
    if run is None and not (folder / artifact.JSON_FILE).is_file():
        raise RunError(
            f"{folder}: holds no recipe.toml and no prompt.json; give the folder that `optimize` "
            "wrote, or a prompt's"
        )
    if run is None:
        prompt = load_prompt(folder)
        recipe = recipe_of(prompt, folder, overrides)
    else:
        recipe = Recipe.read_run(run, overrides, trust_scorer=trust_scorer)
        prompt = load_prompt(folder)
        if model is None and _is_gone(recipe.model.name):
            recipe = _with_recorded_model(recipe, prompt, run)
    recorded = prompt.provenance.get("recipe") or {}
    if recipe.demonstrations.k and recorded.get("template") == recipe.as_dict()["template"]:
        recipe = replace(recipe, template=prompt.template)  # with its demonstrations
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
    return OpenRun(prompt, model, sequencer, evaluator, run or folder, recipe, alone=run is None)


def _is_gone(model: object) -> bool:
    return (
        isinstance(model, str) and is_path(model) and not os.path.exists(os.path.expanduser(model))
    )


def _with_recorded_model(recipe: Recipe, prompt: PromptEmbedding, run: Path) -> Recipe:
    """A run's recipe with the model's place at the time of training, for a run that moved alone."""
    try:
        name = model_of(prompt, CURE)["name"]
    except ArtifactError as error:
        raise ModelError(
            f"{run}: its model is not at {recipe.model.name} any more; {CURE}"
        ) from error
    return replace(recipe, model=replace(recipe.model, name=name))


def images_of(prompt: PromptEmbedding) -> Images | None:
    """How a prompt's images are read; None for one of text."""
    recipe = prompt.provenance.get("recipe")
    saved = recipe.get("images") if isinstance(recipe, dict) else None
    return build(Images, saved, "images", []) if isinstance(saved, dict) else None


def recipe_of(prompt: PromptEmbedding, folder: Path, overrides: Sequence[str]) -> Recipe:
    """A recipe to use a prompt alone, as far as the artifact knows it; nothing that runs code."""
    saved = prompt.provenance.get("recipe")
    saved = saved if isinstance(saved, dict) else {}
    decoding = prompt.provenance.get("decoding")
    decoding = decoding if isinstance(decoding, dict) else {}
    kept = {name: dict(saved[name]) for name in _KEPT if isinstance(saved.get(name), dict)}
    values: dict[str, Any] = {
        "model": {},
        "evaluation": {n: decoding[n] for n in ("max_new_tokens", "stop") if n in decoding},
        **kept,
        "data": {"train": "unknown"},
        "template": prompt.template.as_dict(),
        "target": asdict(prompt.target),
    }
    values["evaluation"].pop("scorer", None)
    data = saved.get("data")
    if isinstance(data, dict) and data.get("truncate"):
        values["data"]["truncate"] = data["truncate"]
    given: dict[str, Any] = {}
    override(given, overrides)
    if not (isinstance(given.get("model"), dict) and given["model"].get("name")):
        known = model_of(prompt, CURE)
        values["model"] |= {n: known[n] for n in ("name", "revision", "dtype") if known.get(n)}
    override(values, overrides)
    return Recipe.from_dict(values, str(folder / artifact.JSON_FILE))
