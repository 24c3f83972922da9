"""Commands `optimize`, `resume`, `evaluate` and `inspect`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedgrad.cli.common import (
    AsJson,
    Interruption,
    Model,
    NoGain,
    Policy,
    Quiet,
    RecipeFile,
    RequireGain,
    Run,
    Set,
    TrustScorer,
    app,
    echo,
    print_values,
    show_next,
    with_model,
)
from embedgrad.cli.completion import SPLITS, one_of

if TYPE_CHECKING:
    from embedgrad.recipe.recipe import Recipe


@app.command(epilog="Example:  embedgrad optimize recipes/demo.toml --out runs/first")
def optimize(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option(help="Folder for the run; it must not exist.")],
    overrides: Set = None,
    model: Model = None,
    device: Annotated[str | None, typer.Option(help="Short for --set model.device=...")] = None,
    dtype: Annotated[str | None, typer.Option(help="Short for --set model.dtype=...")] = None,
    attention: Annotated[
        str | None, typer.Option(help="Short for --set model.attention=...")
    ] = None,
    require_gain: RequireGain = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Refine a prompt as a recipe says and score it on held-out rows."""
    from embedgrad.recipe.recipe import Recipe
    from embedgrad.recipe.tasks import read_tasks

    flags = {"device": device, "dtype": dtype, "attention": attention}
    short = [f"model.{name}={json.dumps(value)}" for name, value in flags.items() if value]
    settings = [*with_model(overrides, model), *short]
    checked = read_tasks(recipe, settings) or Recipe.read(recipe, settings)
    execute(checked, out, resume=False, require_gain=require_gain, as_json=as_json, quiet=quiet)


@app.command(epilog="Example:  embedgrad resume runs/first")
def resume(
    run: Run,
    overrides: Set = None,
    trust_scorer: TrustScorer = False,
    require_gain: RequireGain = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Resume an interrupted run, or train a finished one for longer.

    It starts from the last checkpoint and gives the same rows as an uninterrupted run. To train
    longer, add --set training.epochs=8 for example.
    """
    from embedgrad.experiments.run_folder import let_scorer_run, read_resumable
    from embedgrad.recipe.tasks import read_tasks

    path = run / "recipe.toml"
    tasks = read_tasks(path, overrides or ()) if path.is_file() else None
    for task in (tasks or {}).values() if trust_scorer else ():
        let_scorer_run(task, resume=False)
    recipe = tasks or read_resumable(run, overrides or (), trust_scorer=trust_scorer)
    execute(recipe, run, resume=True, require_gain=require_gain, as_json=as_json, quiet=quiet)


@app.command(epilog="Example:  embedgrad evaluate runs/first --split dev")
def evaluate(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="A folder that `optimize` wrote.")
    ] = None,
    split: Annotated[
        str, typer.Option(help="train, dev or test.", autocompletion=one_of(*SPLITS))
    ] = "test",
    policy: Policy = None,
    overrides: Set = None,
    trust_scorer: TrustScorer = False,
    require_gain: RequireGain = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Score a run's saved prompt and its text prompt, or a policy.

    A policy asks several prompts; its thresholds are set on dev rows and kept beside its file.
    """
    from embedgrad.data.splits import NAMES
    from embedgrad.errors import DataError, OptionError, nearest
    from embedgrad.evaluation.evaluator import evaluate as score
    from embedgrad.evaluation.per_group import compare_groups
    from embedgrad.evaluation.regret import compare_regret
    from embedgrad.events import say
    from embedgrad.inference.pool import load_policy
    from embedgrad.recipe.open_run import open_run
    from embedgrad.recipe.provenance import predictions
    from embedgrad.report.terminal.policy_table import policy_table
    from embedgrad.report.terminal.progress import Progress
    from embedgrad.report.terminal.tables import show

    if split not in NAMES:
        raise DataError(f"--split: unknown split {split!r}; {nearest(split, NAMES)}")
    if policy is not None or run is None:
        if policy is None or run is not None:
            raise OptionError("evaluate: give a RUN, or --policy FILE, and not both")
        with Progress(quiet=quiet) as progress:
            result = load_policy(policy, overrides or (), progress).evaluate(split, progress)
        print_values(result, as_json, lambda shown: show(policy_table(shown)))
        if require_gain:
            _refuse_no_gain(result)
        return
    with Progress(quiet=quiet) as progress:
        opened = open_run(run, overrides or (), progress, trust_scorer=trust_scorer)
        data = opened.read_data()
        examples = getattr(data, split)
        if not examples:
            raise DataError(f"--split {split}: the recipe leaves it no rows; choose another split")
        sequences = opened.sequencer.build(examples)
        say(progress, opened.sequencer.notes(sequences))
        if overrides and split != "train" and opened.trained_on_others(data):
            moved = "with --set the training rows are not those that the prompt was trained on"
            say(progress, [f"{moved}: it may have been trained on rows that are scored here"])
        if split == "train" and (shown := opened.recipe.demonstrations.k):
            in_view = f"{shown} rows of train are demonstrations in the prompt"
            say(progress, [f"{in_view}: these are scored with their own answers in view"])
        comparison = score(opened.evaluator, opened.prompt, sequences, progress)
    rows = [row for row in predictions(examples, comparison) if row["change"] != "same"]
    groups = compare_groups(opened.recipe.group_column, examples, comparison)
    regret = compare_regret(opened.recipe.parts.objective, examples, comparison)
    result = {**comparison.as_dict(), **groups, **regret, "split": split, "changed": rows}
    print_values(result, as_json, show_result)
    if require_gain:
        _refuse_no_gain(result)


@app.command(epilog="Example:  embedgrad inspect runs/first")
def inspect(
    run: Run,
    rows: Annotated[
        int,
        typer.Option(
            min=0, help="Number of dev rows to measure each token's contribution on; 0: none."
        ),
    ] = 48,
    overrides: Set = None,
    trust_scorer: TrustScorer = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show how far every token moved, and what each move contributes."""
    from dataclasses import asdict

    from embedgrad.evaluation.drift import row_worth, token_drift
    from embedgrad.recipe.open_run import open_run
    from embedgrad.report.terminal.progress import Progress

    with Progress(quiet=quiet) as progress:
        opened = open_run(run, overrides or (), progress, trust_scorer=trust_scorer)
        sequences = []
        tokens = [asdict(token) for token in token_drift(opened.prompt, opened.model)]
        if rows and opened.recipe.images is None:
            data = opened.read_data()
            sequences = opened.sequencer.build((data.dev or data.test or data.train)[:rows])
            worth = row_worth(opened.prompt, opened.evaluator, sequences, progress)
            tokens = [{**t, "worth": w} for t, w in zip(tokens, worth, strict=True)]
    values = {
        "spans": [span.text for span in opened.prompt.spans],
        "measured_on_rows": len(sequences),
        "tokens": tokens,
        **{k: opened.prompt.provenance.get(k) for k in ("model", "scores", "versions", "created")},
    }
    print_values(values, as_json, _show_tokens)


def execute(
    recipe: Recipe | dict[str, Recipe],
    out: Path,
    *,
    resume: bool,
    require_gain: bool,
    as_json: bool,
    quiet: bool,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Run a recipe with its progress, and print the result, with `more` of it and what is next.

    Raises `Interruption`, `NoGain`.
    """
    from embedgrad.experiments.run import run
    from embedgrad.experiments.run_folder import describe_interruption
    from embedgrad.experiments.tasks import run_tasks
    from embedgrad.experiments.together import together
    from embedgrad.report.event_files import fan_out
    from embedgrad.report.terminal.progress import Progress

    result: Mapping[str, Any]
    with (
        Progress(quiet=quiet) as progress,
        together(recipe, out, fan_out(progress), resume=resume) as (workers, recipe, out, log),
    ):
        if isinstance(recipe, dict):
            result = run_tasks(recipe, out, log, resume=resume)
            runs: list[Mapping[str, Any]] = list(result["tasks"].values())
            saved = {"artifact": f"{out}/*/prompt"}
        else:
            result = run(recipe, out, log, resume=resume)
            runs, saved = [result], {}
        workers.waits = not result["interrupted"]
        lost = "".join(f"; {name}" for name in workers.dead().values())
    if not workers.is_first:
        return
    show = _show_tasks if isinstance(recipe, dict) else show_result
    print_values({**result, **(more or {})}, as_json, show)
    if more and not as_json and not result["interrupted"]:
        show_next(more)
    if result["interrupted"]:
        raise Interruption(describe_interruption({**runs[0], **saved}, out) + lost)
    if require_gain:
        for one in runs:
            _refuse_no_gain(one)


def _refuse_no_gain(result: Mapping[str, Any]) -> None:
    """--require-gain: raise `NoGain` unless the verdict is "improved"."""
    from embedgrad.report.terminal.tables import verdict

    words = verdict(result["difference"]) if "difference" in result else "no test rows were scored"
    if not words.startswith("improved"):
        raise NoGain(words)


def show_result(result: Mapping[str, Any]) -> None:
    """A run's scores, where its rows went, and the verdict."""
    from embedgrad.report.terminal.tables import changes_table, comparison_table, drift_table, show

    if "changed" in result:
        show(changes_table(result["changed"]))
    if "tokens" in result:
        show(drift_table(result["tokens"]))
    show(comparison_table(result))  # last, as it ends with the verdict


def _show_tasks(result: Mapping[str, Any]) -> None:
    from embedgrad.report.terminal.tables import show
    from embedgrad.report.terminal.tasks_table import tasks_table

    show(tasks_table(result))


def _show_tokens(values: dict[str, Any]) -> None:
    from embedgrad.formatting import visible
    from embedgrad.report.terminal.tables import drift_table, show

    for text in values["spans"]:
        echo(f"prompt: {visible(text)}")
    show(drift_table(values["tokens"]))
