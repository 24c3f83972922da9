"""Command `rerun`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embedgrad.cli.common import (
    AsJson,
    Interruption,
    Quiet,
    Run,
    TrustScorer,
    app,
    echo,
    print_values,
)

if TYPE_CHECKING:
    from embedgrad.experiments.rerun import RerunResult


@app.command(epilog="Example:  embedgrad rerun runs/first")
def rerun(
    run: Run,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the new run; unset: RUN-rerun.")
    ] = None,
    trust_scorer: TrustScorer = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Repeat a finished run, and say whether its rows are the same.

    On a CPU they are the same to the bit, with the same data, versions and number of threads.
    """
    from embedgrad.experiments.rerun import rerun as run_again
    from embedgrad.report.terminal.progress import Progress

    with Progress(quiet=quiet) as progress:
        found = run_again(run, out, progress, trust_scorer=trust_scorer)
    if found["interrupted"]:
        raise Interruption(f"interrupted; `embedgrad resume {found['again']}` continues the run")
    print_values(found, as_json, _show)


def _show(found: RerunResult) -> None:
    from embedgrad.formatting import visible

    both = f"the rows of {found['again']} and {found['run']}"
    if found["same"]:
        echo(visible(f"same: {both} are equal to the bit"))
    elif found["farthest"] is None:
        echo(visible(f"different: {both} are not as many"))
    else:
        far = f"by at most {found['farthest']:.2g} of a row's norm"
        echo(visible(f"different: {both} differ {far}"))
    if found["changed"]:
        echo(visible(f"not as before: {', '.join(found['changed'])}"))
