"""Save, score and describe what a training of a recipe came to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast, final

import torch

from embedgrad.atomic_files import finite, remove_file, to_json_lines, write_file, write_json
from embedgrad.environment import peak_memory
from embedgrad.errors import RecipeError, RunError
from embedgrad.evaluation.answers import AnswerLog
from embedgrad.evaluation.evaluator import Evaluator, evaluate
from embedgrad.evaluation.per_group import GroupComparison, compare_groups
from embedgrad.evaluation.plain_scores import Difference, Scores
from embedgrad.evaluation.regret import RegretComparison, compare_regret
from embedgrad.events import Report, say
from embedgrad.experiments.agreement import Agreement, agree
from embedgrad.experiments.choose_place import Places
from embedgrad.model.compatibility import fit_to_model
from embedgrad.model.loading.info import weights_digest
from embedgrad.model.workers import here
from embedgrad.prompt import artifact
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.recipe.build import Prepared, sources
from embedgrad.recipe.provenance import TrainFacts, predictions, provenance_of, training_facts
from embedgrad.recipe.recipe import Recipe
from embedgrad.report.page.run_files import RESULT_VERSION, json_lines
from embedgrad.training.engine import summarize
from embedgrad.training.settings import Refinement

ANSWERS = "answers.jsonl"  # until the test rows are scored


@final
class Continual(TypedDict):
    """What `embedgrad continue` adds to a result; see `experiments.continual`.

    `matrix[i][j]` is the accuracy on task j after the training on task i, `text` that of the text
    prompt on each task, `separate` that of each task's own prompt; None where it was not trained.
    `directions` counts what is remembered, of `trained_numbers`.
    """

    tasks: list[str]
    matrix: list[list[float]]
    text: list[float]
    separate: list[float | None]
    average: float
    backward_transfer: float
    directions: int
    trained_numbers: int


@final
class RunResult(TypedDict):
    """The content of `result.json`; only a run that scored test rows has scores."""

    text: NotRequired[Scores]
    refined: NotRequired[Scores]
    teacher: NotRequired[Agreement]
    continual: NotRequired[Continual]
    difference: NotRequired[Difference]
    groups: NotRequired[GroupComparison]
    regret: NotRequired[RegretComparison]
    test_rows: NotRequired[int]
    drift: dict[str, float]
    cosine: dict[str, float]
    nearest_tokens_unchanged: float
    spans: NotRequired[list[dict[str, Any]]]
    tokens: list[dict[str, Any]]
    train: TrainFacts
    artifact: str
    place: NotRequired[Places]
    sampling: NotRequired[dict[str, float]]
    demonstrations: NotRequired[dict[str, Any]]
    solutions: dict[str, Any]
    interrupted: bool
    prefix_cache: dict[str, Any]
    peak_memory_bytes: int
    threads: int
    workers: NotRequired[dict[str, Any]]
    version: int


def save_prompt(recipe: Recipe, ready: Prepared, refinement: Refinement, out: Path) -> None:
    """Write RUN/prompt. Raises `RunError`."""
    provenance = provenance_of(recipe, ready, refinement, out)
    artifact.save(refinement.prompt.with_provenance(**provenance), out / "prompt")


def finish(
    recipe: Recipe,
    ready: Prepared,
    refinement: Refinement,
    out: Path,
    report: Report,
    *,
    effect: Any,
    places: Mapping[str, Any],
) -> RunResult:
    """Score the prompt that `save_prompt` wrote on the test rows, and write `result.json`.

    `effect` is what storing prefixes in fewer bits costs, `places` the trials of the prompt's
    place. Raises `RunError` where a file cannot be written or a scorer fails.
    """
    model, sequencer, test = ready.model, ready.sequencer, ready.test
    prompt = fit_to_model(artifact.load(out / "prompt"), model.info, model.embed)
    result = training_facts(prompt, model, refinement)
    if ready.demonstrations:
        sources_shown = [example.source for example in ready.demonstrations]
        result["demonstrations"] = {"sources": sources_shown, "text_prompt": "few-shot"}
    if "chosen" in places:
        result["place"] = places
    if recipe.parts.sampling.engine:
        mismatch = summarize(event for _, event in json_lines(out / "events.jsonl"))
        result |= {"sampling": mismatch} if mismatch else {}
    result["solutions"] = dict(ready.solutions)
    if "file" in ready.solutions:
        result["solutions"]["file"] = "solutions.jsonl"
    result["interrupted"] = refinement.ended in ("interrupted", "stopped")
    if test and not result["interrupted"]:
        evaluator = Evaluator(model, sequencer, recipe.evaluation)
        log = AnswerLog(out / ANSWERS, _scored_with(recipe, ready, prompt))
        try:
            comparison = evaluate(evaluator, prompt, test, report, log)
            groups = compare_groups(recipe.group_column, ready.splits.test, comparison)
            regret = compare_regret(recipe.parts.objective, ready.splits.test, comparison)
            scores = finite({**comparison.as_dict(), **groups, **regret})
            result = {**scores, **result}
            if ready.teacher:
                result["teacher"] = finite(agree(ready.teacher, prompt, test, comparison))
            rows = predictions(ready.splits.test, comparison)
            write_file(out / "predictions.jsonl", to_json_lines(rows))
            artifact.save(prompt.with_provenance(scores=scores), out / "prompt")
        except KeyboardInterrupt:
            result["interrupted"] = True
        except RecipeError as error:  # a user's scorer may fail at any reply
            kept = (
                f"{out / 'prompt'} holds the refined prompt; `embedgrad evaluate {out}` scores it"
            )
            raise RunError(f"{error}; {kept}") from error
    result["prefix_cache"] = {**model.prefix_cache.figures, "precision_effect": effect}
    result["peak_memory_bytes"] = peak_memory()
    result["threads"] = torch.get_num_threads()
    if here().count > 1:
        say(report, here().notes)
        result["workers"] = {"count": here().count, "bytes_sent": here().step_sent}
    result["version"] = RESULT_VERSION
    write_json(out / "result.json", result)
    if not result["interrupted"]:
        remove_file(out / ANSWERS)
    return cast(RunResult, {**result, "artifact": str(out / "prompt")})


def _scored_with(recipe: Recipe, ready: Prepared, prompt: PromptEmbedding) -> dict[str, Any]:
    """All that the answers to the test rows depend on."""
    rows = torch.cat([prompt.rows, prompt.start_rows]).contiguous().numpy().tobytes()
    return {
        "rows": hashlib.sha256(rows).hexdigest(),
        "model": ready.model.info.facts(),
        "weights": weights_digest(ready.model.model),
        "evaluation": {
            **asdict(recipe.evaluation),
            "scorer": recipe.evaluation.scorer.fingerprint(),
        },
        "template": prompt.template.as_dict(),
        "target": asdict(prompt.target),
        "date": prompt.date.isoformat(),
        "teacher": repr(recipe.teacher),
        "test": sources(recipe, ready.splits)["test"]["sha256"],
    }
