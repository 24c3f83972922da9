"""Commands `export` and `verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from embedgrad.cli.common import AsJson, BaseModel, Quiet, Set, app, echo, print_values
from embedgrad.cli.completion import DESTINATIONS, one_of

CheckRows = Annotated[
    int, typer.Option(min=1, metavar="N", help="How many rows to compare with training.")
]


@app.command(epilog="Example:  embedgrad export runs/first --to vocabulary --out served/first")
def export(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Folders that `optimize` or `map` wrote, or saved prompts, each as RUN or "
            "NAME=RUN; the first is the default for requests.",
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Destination: safetensors, vocabulary, gguf, peft, vllm or sglang.",
            autocompletion=one_of(*DESTINATIONS),
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the export; must not exist.")],
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Skip the comparison with training.")
    ] = False,
    check_rows: CheckRows = 32,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="copy|link",
            help="Copy unchanged files of the model (the default), or link them.",
            autocompletion=one_of("copy", "link"),
        ),
    ] = None,
    base_model: BaseModel = None,
    overrides: Set = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a refined prompt for another engine, and check it there."""
    from embedgrad.deploy.export import export as write
    from embedgrad.report.terminal.progress import Progress

    given = {"weights": weights, "base_model": base_model}
    short = [f"export.{name}={json.dumps(value)}" for name, value in given.items() if value]
    settings = [*(overrides or ()), *short]
    with Progress(quiet=quiet) as progress:
        values = write(
            runs,
            to,
            out,
            overrides=settings,
            verify=not no_verify,
            check_rows=check_rows,
            report=progress,
        )
    print_values(values, as_json, _show_export)


@app.command(epilog="Example:  embedgrad verify served/first")
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `export` wrote.")],
    run: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]RUN", help="The run it was made from, if that moved; may be repeated."
        ),
    ] = None,
    check_rows: CheckRows = 32,
    overrides: Set = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check an export in its own engine against training."""
    from embedgrad.deploy.export import verify as check
    from embedgrad.errors import ExportError
    from embedgrad.report.terminal.progress import Progress

    with Progress(quiet=quiet) as progress:
        checked = check(
            folder,
            runs=run or (),
            overrides=overrides or (),
            check_rows=check_rows,
            report=progress,
        )
    print_values(checked, as_json, _show_check)
    if not checked["passed"]:
        raise ExportError(
            f"{folder}: does not compute what training computed: {checked['problems'][0]}"
        )


def _show_export(values: dict[str, Any]) -> None:
    from embedgrad.formatting import duration, size, visible

    linked = f" and {size(values['linked_bytes'])} in links" if values["linked_bytes"] else ""
    took = duration(values["seconds"])
    echo(f"wrote {visible(values['folder'])}: {size(values['bytes'])}{linked}, in {took}")
    if values["verify"] is None:
        why = (note for note in values["notes"] if note.startswith("not checked"))
        echo(visible(next(why, "not checked; run `embedgrad verify`")))
    else:
        _show_check(values["verify"])
    echo("\nto use it:")
    for command in values["commands"]:
        echo("\n".join(f"  {visible(line)}" for line in command.split("\n")), whole=True)
    if values["snippet"]:
        echo("\nor, with transformers only:\n")
        echo("\n".join(visible(line) for line in values["snippet"].split("\n")), whole=True)
    if values["smaller"]:
        echo("\nsmaller exports:")
    for way in values["smaller"]:
        echo(f"  {way}")


def _show_check(checked: dict[str, Any]) -> None:
    from embedgrad.deploy.card import check_figures
    from embedgrad.formatting import visible

    result = "passed" if checked["passed"] else "failed"
    echo(f"check of {checked['destination']} by {checked['engine']}: {result}")
    for name, value in check_figures(checked):
        echo(f"  {name}: {value}")
    for problem in checked["problems"]:
        echo(f"  {visible(problem)}")
