"""Provenance: the facts that an artifact and a result record."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict, final

from embedgrad.atomic_files import finite
from embedgrad.data.examples import Example
from embedgrad.environment import versions
from embedgrad.evaluation.drift import drift_facts, token_drift
from embedgrad.evaluation.evaluator import Comparison
from embedgrad.model.language_model import LanguageModel
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.recipe.build import Prepared, sources
from embedgrad.recipe.recipe import Recipe
from embedgrad.training.settings import Refinement


@final
class TrainFacts(TypedDict):
    """Steps, the step whose rows were kept, seconds, and why the training ended."""

    steps: int
    best_step: int
    seconds: float
    ended: str


def provenance_of(
    recipe: Recipe, ready: Prepared, refinement: Refinement, out: Path
) -> dict[str, Any]:
    """Where an artifact comes from: model, recipe, data, training; plain JSON values.

    Relative paths of the recipe are relative to the run's folder `out`.
    """
    info = ready.model.info
    return {
        "model": info.facts(),
        "recipe": recipe.as_dict(out),
        "data": sources(recipe, ready.splits),
        "solutions": {name: value for name, value in ready.solutions.items() if name != "file"},
        "licenses": {"model": info.license, "data": recipe.data.license},
        "decoding": {
            "do_sample": False,
            "max_new_tokens": recipe.evaluation.max_new_tokens,
            "stop": list(recipe.evaluation.stop),
        },
        "training": {
            "ended": refinement.ended,
            "steps": refinement.steps,
            "best_step": refinement.best.step,
            "dev_history": finite(refinement.best.history),
        },
        "versions": versions(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def training_facts(
    prompt: PromptEmbedding, model: LanguageModel, refinement: Refinement
) -> dict[str, Any]:
    """How far the rows moved and what the training took: `result.json` without the scores."""
    return {
        **drift_facts(prompt, token_drift(prompt, model)),
        "train": TrainFacts(
            steps=refinement.steps,
            best_step=refinement.best.step,
            seconds=refinement.seconds,
            ended=refinement.ended,
        ),
        "artifact": "prompt",
    }


def predictions(examples: Sequence[Example], comparison: Comparison) -> list[dict[str, Any]]:
    """Both prompts' answers to every row, and whether it is fixed, broken or the same."""
    rows = []
    pairs = zip(comparison.text_answers, comparison.refined_answers, strict=True)
    for example, (a, b) in zip(examples, pairs, strict=True):
        change = "fixed" if a.correct < b.correct else "broken" if a.correct > b.correct else "same"
        row: dict[str, Any] = {"source": a.source, "answer": a.answer, "change": change}
        row["columns"] = dict(example.columns)
        for name, answer in (("text", a), ("refined", b)):
            row[name] = {k: v for k, v in asdict(answer).items() if k not in ("source", "answer")}
        rows.append(row)
    return rows
