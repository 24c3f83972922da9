"""Verbs that put a prompt where it is served: export, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from embedgrad.cli.common import AsJson, Quiet, Set, app, echo, print_values


@app.command(epilog="Example:  embedgrad export runs/first --to vocabulary --out served/first")
def export(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Folders that `optimize` wrote, each as RUN or NAME=RUN; the first answers "
            "unless a request names another.",
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Where to: safetensors, vocabulary, gguf, peft, vllm or sglang.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the export; it must not exist.")],
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not compare it with training; faster.")
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="copy|link",
            help="Copy unchanged files of the model (the default), or link them.",
        ),
    ] = None,
    overrides: Set = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a refined prompt for another engine, and check it there."""
    from embedgrad.deploy.export import export as write
    from embedgrad.report import Progress

    settings = [*(overrides or ()), *([f"export.weights={weights}"] if weights else [])]
    with Progress(quiet=quiet) as progress:
        found = write(runs, to, out, overrides=settings, verify=not no_verify, report=progress)
    print_values(found, as_json, _show_export)


@app.command(epilog="Example:  embedgrad verify served/first")
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `export` wrote.")],
    run: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]RUN",
            help="Where the run is that it was made from, if it moved; may be repeated.",
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check an export in its own engine against training."""
    from embedgrad.deploy.export import verify as check
    from embedgrad.errors import ExportError
    from embedgrad.report import Progress

    with Progress(quiet=quiet) as progress:
        found = check(folder, runs=run or (), report=progress)
    print_values(found, as_json, _show_check)
    if not found["passed"]:
        raise ExportError(
            f"{folder}: does not compute what training computed: {found['problems'][0]}"
        )


def _show_export(found: dict[str, Any]) -> None:
    from embedgrad.formatting import duration, size, visible

    linked = f" and {size(found['linked_bytes'])} in links" if found["linked_bytes"] else ""
    took = duration(found["seconds"])
    echo(f"wrote {visible(found['folder'])}: {size(found['bytes'])}{linked}, in {took}")
    if found["verify"] is None:
        echo("not checked; `embedgrad verify` does it")
    else:
        _show_check(found["verify"])
    echo("\nto use it:")
    for command in found["commands"]:
        echo("\n".join(f"  {visible(line)}" for line in command.split("\n")))
    if found["snippet"]:
        echo("\nor, with transformers only:\n")
        echo("\n".join(visible(line) for line in found["snippet"].split("\n")))
    if found["smaller"]:
        echo("\nsmaller ways:")
    for way in found["smaller"]:
        echo(f"  {way}")


def _show_check(found: dict[str, Any]) -> None:
    from embedgrad.deploy.card import check_rows, engine_of
    from embedgrad.formatting import visible

    told = "passed" if found["passed"] else "failed"
    echo(f"check of {found['destination']} in {engine_of(found['destination'])}: {told}")
    for name, value in check_rows(found):
        echo(f"  {name}: {value}")
    for problem in found["problems"]:
        echo(f"  {visible(problem)}")
