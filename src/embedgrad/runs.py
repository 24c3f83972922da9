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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from embedgrad import artifact
from embedgrad.errors import DivergenceError, RunError
from embedgrad.evaluation import Evaluator, check_answers, evaluate
from embedgrad.files import finite, write_file, write_json
from embedgrad.head_cache import HeadCache, Spill
from embedgrad.language_model import LanguageModel, load_model
from embedgrad.optimization import optimize
from embedgrad.prompt import PromptEmbedding
from embedgrad.provenance import facts_of, peak_memory, predictions, provenance_of
from embedgrad.recipe import Recipe
from embedgrad.self_written import training_examples, training_for
from embedgrad.splits import Splits, label_balance, read_splits
from embedgrad.storage import measure_heads
from embedgrad.training import Refinement

Report = Callable[[dict[str, Any]], None]


def nowhere(event: dict[str, Any]) -> None:
    """Where events go that nobody asked for."""


def run(
    recipe: Recipe,
    out: str | Path,
    sinks: Callable[[], Report] = lambda: nowhere,
    *,
    model: LanguageModel | None = None,
) -> dict[str, Any]:
    """Do everything that a recipe says and return the content of `result.json`.

    A `model` that is loaded already serves several runs, with the heads that it stores.
    `sinks` is called once `out` exists, and what it returns gets events (plain JSON values). After
    Ctrl-C the best rows so far are saved, and the result says `interrupted` and has no scores.
    Raises `RunError` where `out` exists or cannot be written, and whatever the recipe's data,
    template and model raise; then, with nothing learned yet, no folder is left behind.
    """
    out = Path(out)
    recipe = Recipe.from_dict(recipe.as_dict())  # it may be made in Python, without any checks
    parents = [parent for parent in out.parents if not parent.exists()]
    new_folder(out)
    try:
        report = sinks()
        splits = read_data(recipe)
        check_answers([*splits.dev, *splits.test], recipe.target, recipe.evaluation.scorer)
        _say(report, [*splits.notes, _counts(splits)])
        report({"event": "stage", "text": f"loading {recipe.model.name}"})
        model = model or open_model(recipe, report)
        sequencer = model.sequencer(
            recipe.template,
            recipe.target,
            splits.train,
            merges=recipe.merges,
            truncate=recipe.data.truncate,
        )
        _say(report, [f"{model.info.architecture} in {model.info.dtype} on {model.device}"])
        examples, solutions = training_examples(
            model,
            sequencer,
            splits.train,
            recipe.solutions,
            evaluation=recipe.evaluation,
            report=report,
            keep_at=out / "solutions.jsonl",
        )
        report({"event": "stage", "text": "tokenizing"})
        train, dev, test = (sequencer.build(part) for part in (examples, splits.dev, splits.test))
        _say(report, sequencer.notes([*train, *dev, *test]))
        effect, notes = measure_heads(model, recipe, sequencer, train)
        _say(report, notes)
        write_file(out / "recipe.toml", recipe.as_toml().encode())
    except BaseException:
        # Nothing is learned yet, and the folder is our own.
        shutil.rmtree(out, ignore_errors=True)
        with suppress(OSError):  # another run may have moved in
            for parent in parents:
                parent.rmdir()
        raise

    def save(refinement: Refinement) -> PromptEmbedding:
        provenance = provenance_of(recipe, model, splits, refinement, solutions)
        prompt = refinement.prompt.with_provenance(**provenance)
        artifact.save(prompt, out / "prompt")
        return prompt

    report({"event": "stage", "text": "refining"})
    try:
        refinement = optimize(
            model,
            sequencer,
            train,
            dev,
            training=training_for(recipe.training, solutions["source"]),
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
    prompt = artifact.load(out / "prompt")
    result = facts_of(prompt, model, refinement, out)
    result["solutions"] = solutions
    result["interrupted"] = refinement.ended == "interrupted"
    if test and not result["interrupted"]:
        evaluator = Evaluator(model, sequencer, recipe.evaluation)
        try:
            comparison = evaluate(evaluator, prompt, test, lambda *args: report(scoring(*args)))
            scores = finite(comparison.as_dict())
            result = {**scores, **result}
            rows = predictions(splits.test, comparison)
            lines = "".join(f"{json.dumps(finite(row), ensure_ascii=False)}\n" for row in rows)
            write_file(out / "predictions.jsonl", lines.encode())
            artifact.save(prompt.with_provenance(scores=scores), out / "prompt")
        except KeyboardInterrupt:
            result["interrupted"] = True
    result["head_cache"] = {**model.heads.figures, "precision_effect": effect}
    result["peak_memory_bytes"] = peak_memory()
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


def read_data(recipe: Recipe) -> Splits:
    """The recipe's examples, checked and split."""
    data = recipe.data
    worked = recipe.solutions.source in ("auto", "column")
    return read_splits(
        data.train,
        data.dev,
        data.test,
        columns=recipe.template.columns,
        answer=data.answer,
        choices=recipe.target.choices,
        labels=data.labels,
        solution=data.solution if worked else None,
        group=data.group,
        where=data.where,
        dev_share=data.dev_share,
        test_share=data.test_share,
        seed=data.seed,
        limit=data.limit,
        allow_duplicates=data.allow_duplicates,
    )


def open_model(recipe: Recipe, report: Report) -> LanguageModel:
    """The recipe's model, with a store of heads as the recipe says."""

    def notify(text: str) -> None:
        report({"event": "note", "text": text})

    heads = recipe.head_cache
    # First of all: a folder that cannot be used is told at once.
    spill = None if heads.spill is None else Spill(heads.spill, heads.spill_budget, notify)
    model = load_model(**asdict(recipe.model), head_cache_budget=0, notify=notify)
    model.heads = HeadCache.on(model.device, heads.budget, spill=spill, precision=heads.precision)
    return model


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


def _counts(splits: Splits) -> str:
    parts = []
    for name in ("train", "dev", "test"):
        rows = getattr(splits, name)
        balance = label_balance(rows)
        listed = ", ".join(f"{n} {label}" for label, n in balance.items())
        few = 0 < len(balance) <= 5
        parts.append(f"{len(rows)} {name} rows" + (f" ({listed})" if few else ""))
    return "; ".join(parts)


def _say(report: Report, notes: Sequence[str]) -> None:
    for note in notes:
        report({"event": "note", "text": note})


def scoring(which: str, done: int, total: int) -> dict[str, Any]:
    """An event that says how far scoring is."""
    return {"event": "scoring", "which": which, "done": done, "total": total}
