"""Command `continue`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from embedgrad.cli.common import (
    AsJson,
    Interruption,
    Model,
    Quiet,
    Run,
    Set,
    app,
    print_values,
    with_model,
)
from embedgrad.cli.run import show_result


@app.command("continue", epilog="Example:  embedgrad continue runs/a --on b.toml --out runs/b")
def continue_(
    run: Run,
    on: Annotated[Path, typer.Option(metavar="RECIPE.toml", help="The further task's recipe.")],
    out: Annotated[Path, typer.Option(help="Folder of the new run; an interrupted one continues.")],
    separate: Annotated[
        bool,
        typer.Option(
            "--separate/--no-separate",
            help="Also train the task's own prompt, without the earlier tasks, to compare.",
        ),
    ] = True,
    overrides: Set = None,
    model: Model = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train a run's prompt on a further task, and keep what it knows.

    For one prompt that serves several tasks. Where each query says its task, one prompt per task
    forgets nothing; the table shows both.
    """
    from embedgrad.experiments.continual import continue_run
    from embedgrad.recipe.recipe import Recipe
    from embedgrad.report.event_files import fan_out
    from embedgrad.report.terminal.progress import Progress

    recipe = Recipe.read(on, with_model(overrides, model))
    with Progress(quiet=quiet) as progress:
        result = continue_run(run, recipe, out, fan_out(progress), separate=separate)
    print_values(result, as_json, _show)
    if result["interrupted"]:
        raise Interruption(
            f"interrupted at step {result['train']['steps']}; the same command continues the run"
        )


def _show(result: Mapping[str, Any]) -> None:
    from embedgrad.report.terminal.tables import show
    from embedgrad.report.terminal.tasks_table import continual_table

    show_result(result)
    if "continual" in result:
        show(continual_table(result["continual"]))
