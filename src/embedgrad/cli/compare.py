"""Command `compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from embedgrad.cli.common import (
    AsJson,
    Interruption,
    Model,
    NoGain,
    Quiet,
    RecipeFile,
    RequireGain,
    Set,
    app,
    print_values,
    with_model,
)
from embedgrad.cli.completion import methods as methods_of


@app.command(epilog="Example:  embedgrad compare recipes/demo.toml --out runs/compare")
def compare(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option(help="Folder of the comparison; an existing one resumes.")],
    methods: Annotated[
        str | None,
        typer.Option(
            help="Short for --set compare.methods, as in text,embedgrad.",
            autocompletion=methods_of,
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Short for --set compare.seeds, as in 0,1,2.")
    ] = None,
    overrides: Set = None,
    model: Model = None,
    require_gain: RequireGain = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare methods on the same rows, over several seeds."""
    from embedgrad.errors import RunError
    from embedgrad.experiments.compare.compare import compare as run_all
    from embedgrad.recipe.recipe import Recipe
    from embedgrad.report.event_files import fan_out
    from embedgrad.report.terminal.methods_table import methods_table, reliable_gain
    from embedgrad.report.terminal.progress import Progress
    from embedgrad.report.terminal.tables import show

    settings = with_model(overrides, model)
    if methods is not None:
        names = [name.strip() for name in methods.split(",")]
        settings.append(f"compare.methods={json.dumps(names)}")
    if seeds is not None:
        settings.append(f"compare.seeds=[{seeds}]")
    checked = Recipe.read(recipe, settings)
    with Progress(quiet=quiet) as progress:
        results = run_all(checked, out, fan_out(progress))
    print_values(results, as_json, lambda values: show(methods_table(values)))
    if results["interrupted"]:
        trained, scored, planned = (results[n] for n in ("trained", "scored", "planned"))
        raise Interruption(
            f"interrupted; {out} has {trained} of {planned} trainings and {scored} of {planned} "
            "scorings, and the same command resumes from there"
        )
    failed = results["failed"]
    names = [name for name in dict.fromkeys(checked.compare.methods) if name in failed]
    reasons = [failed[n] if failed[n].startswith(n) else f"{n}: {failed[n]}" for n in names]
    if reasons:
        raise RunError("; ".join([*reasons, f"all others are in {out}"]))
    gained, verdict = reliable_gain(results)
    if require_gain and not gained:
        raise NoGain(verdict)
