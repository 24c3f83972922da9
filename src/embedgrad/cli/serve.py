"""Command `serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embedgrad.cli.common import Quiet, Set, app, echo, warn
from embedgrad.cli.completion import ENGINES, one_of


@app.command(epilog="Example:  embedgrad serve runs/first")
def serve(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="A folder that `optimize` or `export` wrote, or a saved prompt's."
        ),
    ],
    engine: Annotated[
        str,
        typer.Option(help="llamacpp, transformers or vllm.", autocompletion=one_of(*ENGINES)),
    ] = "llamacpp",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")
    ] = 8080,
    overrides: Set = None,
    quiet: Quiet = False,
) -> None:
    """Serve a refined prompt behind an OpenAI-compatible API."""
    from embedgrad.deploy.serve import serve as start
    from embedgrad.formatting import visible
    from embedgrad.report.terminal.progress import Progress

    with Progress(quiet=quiet) as progress:
        served = start(
            folder, engine, host=host, port=port, overrides=overrides or (), report=progress
        )
    with served:
        lines = [f"{engine} serves {served.model} at {served.url}"]
        lines += [f"  {visible(fact)}" for fact in served.facts]
        echo("\n".join([*lines, *(f"\n{request}" for request in served.examples), ""]), whole=True)
        warn(*(f"warning: {warning}" for warning in served.warnings))
        served.wait()
