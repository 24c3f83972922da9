"""A recipe's whole run: read, refine, save, reload, score. Everything ends up in one folder.

RUN/recipe.toml        every setting, defaults included
RUN/prompt/            the artifact
RUN/state/             where the loop stood at its last evaluation
RUN/events.jsonl       what happened, one JSON object a line
RUN/solutions.jsonl    what the model wrote to be trained on, if it did
RUN/predictions.jsonl  the test rows with both prompts' answers
RUN/result.json        the scores
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from embedgrad.atomic_files import finite, write_file, write_json
from embedgrad.environment import peak_memory
from embedgrad.errors import DivergenceError, RecipeError, RunError
from embedgrad.evaluation.evaluator import Evaluator, evaluate
from embedgrad.events import Report, nowhere, say, scoring, stage
from embedgrad.model.compatibility import fit_to_model
from embedgrad.model.language_model import LanguageModel
from embedgrad.prompt import artifact
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.recipe.build import prepare
from embedgrad.recipe.prefix_cache_effect import measure_prefixes
from embedgrad.recipe.provenance import predictions, provenance_of, training_facts
from embedgrad.recipe.recipe import Recipe
from embedgrad.training.loop import optimize
from embedgrad.training.self_training import refuse_inside
from embedgrad.training.settings import Refinement


def run(
    recipe: Recipe,
    out: str | Path,
    sinks: Callable[[], Report] = lambda: nowhere,
    *,
    model: LanguageModel | None = None,
) -> dict[str, Any]:
    """Do everything that a recipe says and return the content of `result.json`.

    A `model` that is loaded already serves several runs, with the prefixes that it stores.
    `sinks` is called once `out` exists, and what it returns gets events (plain JSON values). After
    Ctrl-C the best rows so far are saved, and the result says `interrupted` and has no scores.
    Raises `RunError` where `out` exists or cannot be written, and whatever the recipe's data,
    template and model raise; then, with nothing learned yet, no folder is left behind.
    """
    out = Path(out)
    recipe = Recipe.from_dict(recipe.as_dict())  # it may be made in Python, without any checks
    refuse_inside(recipe.solutions, out)
    parents = [parent for parent in out.parents if not parent.exists()]
    new_folder(out)
    try:
        report = sinks()
        ready = prepare(recipe, out / "solutions.jsonl", report, model=model)
        model, sequencer, test = ready.model, ready.sequencer, ready.test
        effect, notes = measure_prefixes(model, recipe, sequencer, ready.train)
        say(report, notes)
        write_file(out / "recipe.toml", recipe.as_toml().encode())
    except BaseException:
        # Nothing is learned yet, and the folder is our own.
        shutil.rmtree(out, ignore_errors=True)
        with suppress(OSError):  # another run may have moved in
            for parent in parents:
                parent.rmdir()
        raise

    def save(refinement: Refinement) -> PromptEmbedding:
        provenance = provenance_of(recipe, ready, refinement)
        prompt = refinement.prompt.with_provenance(**provenance)
        artifact.save(prompt, out / "prompt")
        return prompt

    stage(report, "refining")
    try:
        refinement = optimize(
            model,
            sequencer,
            ready.train,
            ready.dev,
            training=ready.training,
            parts=recipe.parts,
            evaluation=recipe.evaluation,
            report=report,
            keep=lambda state: state.save(out / "state"),
        )
    except DivergenceError as error:
        if error.refinement is not None:
            save(error.refinement)
        error.args = (f"{error}; the last good rows are in {out / 'prompt'}",)
        raise
    save(refinement)
    # From here on only what was saved counts.
    prompt = fit_to_model(artifact.load(out / "prompt"), model.info, model.embed)
    result = training_facts(prompt, model, refinement, out)
    result["solutions"] = ready.solutions
    result["interrupted"] = refinement.ended == "interrupted"
    if test and not result["interrupted"]:
        evaluator = Evaluator(model, sequencer, recipe.evaluation)
        try:
            comparison = evaluate(evaluator, prompt, test, lambda *args: report(scoring(*args)))
            scores = finite(comparison.as_dict())
            result = {**scores, **result}
            rows = predictions(ready.splits.test, comparison)
            lines = "".join(f"{json.dumps(finite(row), ensure_ascii=False)}\n" for row in rows)
            write_file(out / "predictions.jsonl", lines.encode())
            artifact.save(prompt.with_provenance(scores=scores), out / "prompt")
        except KeyboardInterrupt:
            result["interrupted"] = True
        except RecipeError as error:  # a scorer of the user's own may fail at any reply
            kept = (
                f"{out / 'prompt'} holds the refined prompt; `embedgrad evaluate {out}` scores it"
            )
            raise RunError(f"{error}; {kept}") from error
    result["prefix_cache"] = {**model.prefix_cache.figures, "precision_effect": effect}
    result["peak_memory_bytes"] = peak_memory()
    result["threads"] = torch.get_num_threads()
    write_json(out / "result.json", result)
    return result


def interruption(result: Mapping[str, Any]) -> str:
    """What an interrupted run left, in one line."""
    train, artifact_folder = result["train"], result["artifact"]
    if train["best_step"]:
        rows = f"the best rows so far, of step {train['best_step']}"
    else:
        rows = "the text prompt's own rows, as no others were scored better on dev"
    return f"interrupted at step {train['steps']}; {artifact_folder} holds {rows}"


def new_folder(out: Path) -> None:
    """Make the run's folder; one that exists is never touched. Raises `RunError`."""
    try:
        out.mkdir(parents=True)
    except FileExistsError as error:
        raise RunError(f"{out}: exists already; choose another folder for --out") from error
    except OSError as error:
        raise RunError(
            f"{out}: cannot be made ({error.strerror}); choose another folder"
        ) from error
