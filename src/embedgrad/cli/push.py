"""Command `push`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from embedgrad.cli.common import AsJson, BaseModel, Prompt, app, echo, print_values


@app.command(epilog="Example:  embedgrad push runs/first my-name/review-prompt")
def push(
    run: Prompt,
    repository: Annotated[
        str,
        typer.Argument(metavar="OWNER/NAME", help="The repository; created if it does not exist."),
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    base_model: BaseModel = None,
    as_json: AsJson = False,
) -> None:
    """Push a refined prompt to the Hugging Face Hub."""
    from embedgrad.deploy.hub import push as upload

    result = upload(run, repository, private=private, base_model=base_model)
    print_values(result, as_json, _show)


def _show(result: Any) -> None:
    echo(f"pushed to {result['url']}", whole=True)
    echo(f"load it: {result['load']}, or hub:{result['repository']} in place of a run", whole=True)
