"""Command `plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from embedgrad.cli.common import (
    AsJson,
    Model,
    Quiet,
    RecipeFile,
    Set,
    app,
    print_values,
    with_model,
)


@app.command(epilog="Example:  embedgrad plan recipes/demo.toml --minutes 10")
def plan(
    recipe: RecipeFile,
    memory: Annotated[
        str | None, typer.Option(help='Memory the run may take, as in "4 GiB".')
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.0, help="Minutes the run may take.")
    ] = None,
    no_probe: Annotated[
        bool, typer.Option("--no-probe", help="Load no weights and time nothing; count only.")
    ] = False,
    elicit: Annotated[
        bool,
        typer.Option(
            "--elicit", help="Answer dev rows as well: is there anything to elicit by training?"
        ),
    ] = False,
    overrides: Set = None,
    model: Model = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Estimate what a recipe takes before it runs."""
    import psutil

    from embedgrad.errors import RecipeError
    from embedgrad.experiments import plan as planning
    from embedgrad.model.prefix_cache import budget_bytes
    from embedgrad.recipe.recipe import Recipe
    from embedgrad.report.terminal.plan_table import plan_table
    from embedgrad.report.terminal.progress import Progress
    from embedgrad.report.terminal.tables import show

    checked = Recipe.read(recipe, with_model(overrides, model))
    if no_probe and elicit:
        raise RecipeError("--no-probe", ["--elicit needs the weights; leave one of them out"])
    if no_probe and (memory is not None or minutes is not None):
        raise RecipeError("--no-probe", ["a budget needs the measurement; leave one of them out"])
    budget = planning.Budget(
        None if memory is None else budget_bytes(memory, "--memory"),
        None if minutes is None else 60 * minutes,
    )
    with Progress(quiet=quiet) as progress:
        values = planning.plan(
            checked,
            budget=budget,
            measure=not no_probe,
            elicit=elicit,
            report=progress,
            started=psutil.Process().create_time(),
        )
    shown = {"recipe": str(recipe), **values}
    print_values(shown, as_json, lambda shown: show(plan_table(shown)))
    if values["problems"]:
        raise RecipeError(str(recipe), values["problems"])
