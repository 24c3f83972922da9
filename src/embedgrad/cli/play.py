"""Command `play`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embedgrad.cli.common import Quiet, Set, app, echo


@app.command(epilog="Example:  embedgrad play runs/first runs/second")
def play(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of `optimize`, or saved prompts'."),
    ],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the page; 0: any free one.")
    ] = 0,
    browse: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    overrides: Set = None,
    quiet: Quiet = False,
) -> None:
    """Try prompts on your own queries, on a local page."""
    import webbrowser

    from embedgrad.inference.play import play as prepare
    from embedgrad.report.terminal.progress import Progress

    with Progress(quiet=quiet) as progress:
        page = prepare(folders, port=port, overrides=overrides or (), report=progress)
    echo(f"{page.url}\n\nOpen this address on this machine; Ctrl-C ends the page.", whole=True)
    if browse:
        webbrowser.open(page.url)
    page.run()
