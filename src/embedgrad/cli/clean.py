"""Command `clean`."""

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


@app.command(epilog="Example:  embedgrad clean recipes/demo.toml runs/clean --drop 0.2")
def clean(
    recipe: RecipeFile,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="Folder to write; unset: runs/clean-RECIPE."),
    ] = None,
    drop: Annotated[
        float,
        typer.Option(help="Largest share of rows to drop from cleaned.jsonl; may change later."),
    ] = 0.1,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="A column whose values are weighed too, such as the annotator."
        ),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(min=1, help="Number of hypergradients; more take longer and may rank better."),
    ] = 1,
    passes: Annotated[
        int, typer.Option(min=1, help="Most passes over the rows that a round trains for.")
    ] = 24,
    overrides: Set = None,
    model: Model = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Rank training rows by how suspicious their labels are.

    The dev rows are the judge, so their labels should be good. Writes the ranking, a page to look
    at it, and the training file without the worst rows. The same command continues where it was
    interrupted.
    """
    from embedgrad.experiments import clean as cleaning
    from embedgrad.recipe.recipe import Recipe
    from embedgrad.report.terminal.progress import Progress
    from embedgrad.report.terminal.suspects_table import suspects_table
    from embedgrad.report.terminal.tables import show
    from embedgrad.training.tuner import Tuning

    out = out or Path("runs", f"clean-{recipe.stem}")
    checked = Recipe.read(recipe, with_model(overrides, model))
    tuning = Tuning(rounds=rounds, passes=passes)
    try:
        with Progress(quiet=quiet) as progress:
            result = cleaning.clean(checked, out, progress, drop=drop, by=by, tuning=tuning)
    except KeyboardInterrupt as error:
        raise Interruption(f"interrupted; the same command continues in {out}") from error
    print_values(result, as_json, lambda shown: show(suspects_table(shown)))
