"""A recipe's whole run: read, refine, save, reload, score. Everything ends up in one folder.

RUN/recipe.toml        every setting, defaults included
RUN/prompt/            the artifact
RUN/state/             where the loop stood at its last evaluation
RUN/events.jsonl       what happened, one JSON object a line
RUN/predictions.jsonl  the test rows with both prompts' answers
RUN/result.json        the scores
"""

from __future__ import annotations

import datetime
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from embedgrad import artifact
from embedgrad.drift import token_drift
from embedgrad.errors import DivergenceError, RunError
from embedgrad.evaluation import Comparison, Evaluator, check_answers, evaluate
from embedgrad.examples import Example
from embedgrad.files import finite, write_file, write_json
from embedgrad.head_cache import HeadCache, Spill
from embedgrad.language_model import LanguageModel, load_model
from embedgrad.optimization import optimize
from embedgrad.prompt import PromptEmbedding
from embedgrad.recipe import Recipe
from embedgrad.settings import DataSettings
from embedgrad.splits import Splits, label_balance, read_splits
from embedgrad.storage import measure_heads
from embedgrad.training import Refinement
from embedgrad.versions import versions

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
        report({"event": "stage", "text": "tokenizing"})
        train, dev, test = (
            sequencer.build(part) for part in (splits.train, splits.dev, splits.test)
        )
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
        provenance = provenance_of(recipe, model, splits, refinement)
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
            training=recipe.training,
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
    result = _facts(prompt, model, refinement, out)
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
    return read_splits(
        data.train,
        data.dev,
        data.test,
        columns=recipe.template.columns,
        answer=data.answer,
        choices=recipe.target.choices,
        labels=data.labels,
        solution=data.solution,
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


def provenance_of(
    recipe: Recipe, model: LanguageModel, splits: Splits, refinement: Refinement
) -> dict[str, Any]:
    """What the artifact says of where it comes from; plain JSON values."""
    info = asdict(model.info)
    del info["path"]  # a place on one machine
    return {
        "model": {**info, "fits_revisions": [info["revision"]] if info["revision"] else []},
        "recipe": recipe.as_dict(),
        "data": {
            name: {"source": _source(recipe.data, name), "rows": len(rows), "sha256": digest}
            for name, rows, digest in (
                (name, getattr(splits, name), splits.digests.get(name))
                for name in ("train", "dev", "test")
            )
        },
        "licenses": {"model": info["license"], "data": recipe.data.license},
        "decoding": {"do_sample": False, "max_new_tokens": recipe.evaluation.max_new_tokens},
        "training": {
            "ended": refinement.ended,
            "steps": refinement.steps,
            "best_step": refinement.best.step,
            "dev_history": finite(refinement.best.history),
        },
        "versions": versions(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


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


def predictions(examples: Sequence[Example], comparison: Comparison) -> list[dict[str, Any]]:
    """One plain value per row with both prompts' answers, and whether it was fixed or broken."""
    rows = []
    pairs = zip(comparison.text_answers, comparison.refined_answers, strict=True)
    for example, (a, b) in zip(examples, pairs, strict=True):
        change = {(0.0, 1.0): "fixed", (1.0, 0.0): "broken"}.get((a.correct, b.correct), "same")
        row: dict[str, Any] = {"source": a.source, "answer": a.answer, "change": change}
        row["columns"] = dict(example.columns)
        for name, answered in (("text", a), ("refined", b)):
            kept = asdict(answered).items()
            row[name] = {k: v for k, v in kept if k not in ("source", "answer")}
        rows.append(row)
    return rows


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _facts(
    prompt: PromptEmbedding, model: LanguageModel, refinement: Refinement, out: Path
) -> dict[str, Any]:
    tokens = token_drift(prompt, model)
    return {
        "drift": {"mean": prompt.drift.mean().item(), "max": prompt.drift.max().item()},
        "cosine": {"mean": prompt.cosine.mean().item(), "min": prompt.cosine.min().item()},
        "nearest_tokens_unchanged": sum(t.unchanged for t in tokens) / len(tokens),
        "tokens": [asdict(token) for token in tokens],
        "train": {
            "steps": refinement.steps,
            "best_step": refinement.best.step,
            "seconds": refinement.seconds,
            "ended": refinement.ended,
        },
        "artifact": str(out / "prompt"),
    }


def _counts(splits: Splits) -> str:
    parts = []
    for name in ("train", "dev", "test"):
        rows = getattr(splits, name)
        balance = label_balance(rows)
        listed = ", ".join(f"{n} {label}" for label, n in balance.items())
        few = 0 < len(balance) <= 5
        parts.append(f"{len(rows)} {name} rows" + (f" ({listed})" if few else ""))
    return "; ".join(parts)


def _source(data: DataSettings, name: str) -> str:
    return str(getattr(data, name) or f"a share of {data.train}")


def _say(report: Report, notes: Sequence[str]) -> None:
    for note in notes:
        report({"event": "note", "text": note})


def scoring(which: str, done: int, total: int) -> dict[str, Any]:
    """An event that says how far scoring is."""
    return {"event": "scoring", "which": which, "done": done, "total": total}
