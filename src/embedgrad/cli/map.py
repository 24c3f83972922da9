"""Command `map`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
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


@app.command(epilog="Example:  embedgrad map recipe.toml --over customers.csv --workers 2")
def map(
    recipe: RecipeFile,
    over: Annotated[
        Path,
        typer.Option(
            metavar="TABLE",
            help="A file with a row for each prompt; columns are settings, and `name`.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of all runs; unset: runs/map-RECIPE.")
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            min=0, help="Worker processes; 0: only this one, beside others in the same folder."
        ),
    ] = 1,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Let actors of this Ray cluster work; auto: this machine's; local: start one.",
        ),
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="How often a failed row is retried.")] = 2,
    overrides: Set = None,
    model: Model = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Refine a prompt for each row of a table, such as each customer.

    Each process loads the model once. After an interruption, run the same command again: it skips
    finished rows, resumes the others and tries failed ones again.
    """
    from embedgrad.errors import RunError
    from embedgrad.experiments import map as mapping
    from embedgrad.experiments.map_workers import LocalWorker, Worker
    from embedgrad.report.terminal.mapped_table import mapped_table
    from embedgrad.report.terminal.progress import Progress
    from embedgrad.report.terminal.tables import show

    out = out or Path("runs", f"map-{recipe.stem}")
    settings = with_model(overrides, model)
    jobs = mapping.read_jobs(recipe, over, settings)
    table = (recipe, over, out, settings, retries)
    workers = min(workers, len(jobs))
    starting: AbstractContextManager[Callable[[], Worker]]
    starting = nullcontext(partial(LocalWorker, mapping.join, *table, beside=workers))
    if ray is not None:
        from embedgrad.experiments.map_on_ray import ray_workers

        starting = ray_workers(ray, *table)
    try:
        with Progress(quiet=quiet) as progress:
            mapping.prepare(jobs, out)
            if ray is None and not workers:
                mapping.work(jobs, out, progress, retries=retries)
                found = mapping.collect(jobs, out)
            else:
                options = {"workers": max(1, workers), "retries": retries}
                with starting as start:
                    found = mapping.map_rows(jobs, out, start, progress, **options)
    except KeyboardInterrupt as error:
        raise Interruption(f"interrupted; the same command continues in {out}") from error
    print_values(found, as_json, lambda shown: show(mapped_table(shown)))
    if found["failed"]:
        raise RunError(
            f"{out}: {found['failed']} of {len(jobs)} prompts failed; the table says why"
        )
