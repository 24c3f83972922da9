"""Command `tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embedgrad.cli.common import (
    AsJson,
    Interruption,
    Model,
    Quiet,
    RecipeFile,
    Set,
    app,
    print_values,
    with_model,
)


@app.command(epilog="Example:  embedgrad tune recipe.toml --over training.batch_size=4..32")
def tune(
    recipe: RecipeFile,
    over: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUES",
            help="A setting to tune and its values, LOW..HIGH, LOW..HIGH log or [A, B]; may be "
            "repeated.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the study; unset: runs/tune-RECIPE.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Trials in all, of all processes.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the suggestions.")] = 0,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What to judge by in place of the training's metric: accuracy, macro_f1, "
            "log_loss, regret, tokens or seconds; may be repeated.",
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="An SQL database to share the study by; unset: a file in --out."
        ),
    ] = None,
    overrides: Set = None,
    model: Model = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Try settings of a recipe and keep those that do best on dev.

    Worse trials are stopped early, and no test row is scored. The same command in another shell, or
    on another machine with the same folder, shares the work, or continues it
    after an interruption.
    """
    from embedgrad.experiments.tune import tune as search
    from embedgrad.report.terminal.progress import Progress
    from embedgrad.report.terminal.tables import show
    from embedgrad.report.terminal.trials_table import trials_table

    out = out or Path("runs", f"tune-{recipe.stem}")
    settings = with_model(overrides, model)
    try:
        with Progress(quiet=quiet) as progress:
            found = search(
                recipe,
                out,
                over or (),
                progress,
                trials=trials,
                seed=seed,
                overrides=settings,
                objectives=objective or (),
                storage=storage,
            )
    except KeyboardInterrupt as error:
        raise Interruption(f"interrupted; the same command continues in {out}") from error
    print_values(found, as_json, lambda shown: show(trials_table(shown)))
