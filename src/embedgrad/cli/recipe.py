"""Commands `new` and `parts`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from embedgrad.cli.common import (
    DEFAULT_MODEL,
    AsJson,
    Plain,
    app,
    command_lines,
    echo,
    print_values,
    show_next,
    show_recipe,
)
from embedgrad.cli.completion import kinds


@app.command(epilog="Example:  embedgrad parts optimizer")
def parts(
    kind: Annotated[
        str | None,
        typer.Argument(help="Show only this kind of part or section.", autocompletion=kinds),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List every setting and part that a recipe can have."""
    from embedgrad.recipe.catalog import catalog, catalog_text

    print_values(catalog(kind), as_json, lambda values: echo(catalog_text(values)))


@app.command(epilog="Example:  embedgrad new reviews.csv --out reviews.toml")
def new(
    data: Annotated[str, typer.Argument(help="A data file, or hub:OWNER/NAME.")],
    out: Annotated[Path, typer.Option(help="The recipe to write; it must not exist.")],
    model: Annotated[str, typer.Option(help="The model that the recipe names.")] = DEFAULT_MODEL,
    plain: Plain = False,
    as_json: AsJson = False,
) -> None:
    """Write a commented starter recipe for a data file."""
    from embedgrad.recipe.starter import write_starter

    path, notes = write_starter(data, out, model, plain=plain)
    run = Path("runs", path.stem)
    commands = [["plan", path], ["optimize", path, "--out", run], ["report", run]]
    values = {"recipe": str(path), "notes": list(notes), "next": command_lines(commands)}
    print_values(values, as_json, _show_starter)


def _show_starter(values: dict[str, Any]) -> None:
    show_recipe(values)
    show_next(values)
