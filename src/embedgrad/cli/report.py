"""The verb that makes a page or a figure: report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from embedgrad.cli.common import AsJson, Quiet, Set, app, echo, print_values, warn

FORMATS = ("html", "png", "svg")


@app.command(epilog="Example:  embedgrad report runs/first")
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="What `optimize` or `compare` wrote.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write; default: RUN/report.html.")
    ] = None,
    rows: Annotated[
        int, typer.Option(min=1, help="Dev rows for the interpolation to the refined rows.")
    ] = 100,
    no_model: Annotated[
        bool, typer.Option("--no-model", help="Leave out what needs the model.")
    ] = False,
    form: Annotated[str, typer.Option("--format", help="html, png or svg.")] = "html",
    figure: Annotated[
        str | None, typer.Option(help="The one figure to write as png or svg.")
    ] = None,
    overrides: Set = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make a page or a figure of a run or a comparison."""
    from embedgrad.atomic_files import write_file
    from embedgrad.report.page.page import comparison_page, run_page
    from embedgrad.report.page.run_files import read_comparison, read_run

    results = read_comparison(run)
    _check_form(form, figure, results is not None)
    path = out or _beside(run, f"{figure or 'report'}.{form}")
    if path.suffix != f".{form}":
        raise typer.BadParameter(f"--out: {path} does not end in .{form}")
    notes: list[str] = []
    if results is not None:
        name = run.stem if run.is_file() else run.resolve().name
        page = partial(comparison_page, results, name)
        drawn = partial(_comparison_figure, results)
    else:
        found = read_run(run)
        if figure in (None, "interpolation"):
            notes = _walked(found, rows, overrides or (), no_model, quiet)
        page = partial(run_page, found, run.resolve().name, notes)
        drawn = partial(_run_figure, found, notes)
    written = page().encode() if figure is None else _image(run, figure, form, drawn)
    write_file(path, written)
    if not no_model:
        warn(*notes)
    told = {"written": str(path), "bytes": len(written), "notes": notes}
    print_values(told, as_json, _show)


def _show(told: dict[str, Any]) -> None:
    from embedgrad.formatting import size, visible

    echo(f"wrote {visible(told['written'])} ({size(told['bytes'])})")


def _check_form(form: str, figure: str | None, comparison: bool) -> None:
    from embedgrad.errors import nearest
    from embedgrad.report.figures.run import FIGURES_OF_COMPARISONS, FIGURES_OF_RUNS

    known = FIGURES_OF_COMPARISONS if comparison else FIGURES_OF_RUNS
    if form not in FORMATS:
        raise typer.BadParameter(f"--format: unknown format {form!r}; {nearest(form, FORMATS)}")
    if figure is not None and figure not in known:
        raise typer.BadParameter(f"--figure: unknown figure {figure!r}; {nearest(figure, known)}")
    if figure is not None and form == "html":
        raise typer.BadParameter("--figure: give --format png or svg with it")
    if figure is None and form != "html":
        raise typer.BadParameter(
            f"--format {form}: give --figure with it, one of {', '.join(known)}"
        )


def _beside(run: Path, name: str) -> Path:
    """In the run's folder; beside a results file, with its name."""
    return run / name if run.is_dir() else run.with_name(f"{run.stem}-{name}")


def _walked(
    found: Any, rows: int, overrides: Sequence[str], no_model: bool, quiet: bool
) -> list[str]:
    """Give `found` its interpolation, kept or computed now; else say why there is none."""
    from embedgrad.errors import EmbedgradError
    from embedgrad.report.page.run_files import asked_for

    wanted, kept = asked_for(found.folder, rows, overrides)["from"], found.interpolation.get("from")
    same_rows = isinstance(kept, dict) and kept.get("artifact") == wanted["artifact"]
    if kept == wanted or (no_model and same_rows):
        return []
    found.interpolation = {}
    if no_model:
        return ["Left out: what needs the model (--no-model)."]
    from embedgrad.experiments.interpolation import interpolate, keep_interpolation
    from embedgrad.report import Progress

    try:
        with Progress(quiet=quiet) as progress:
            found.interpolation = interpolate(found.folder, rows, overrides, progress)
    except EmbedgradError as error:
        return [f"Left out: what needs the model ({error})."]
    try:
        keep_interpolation(found.folder, found.interpolation)
    except EmbedgradError as error:
        return [f"Not kept: what needs the model ({error}); the next report asks it again."]
    return []


def _image(run: Path, name: str, form: str, drawn: Callable[[str], Any]) -> bytes:
    from embedgrad.errors import RunError
    from embedgrad.report.figures.theme import image
    from embedgrad.report.page.page import DAMAGE

    try:
        return image(drawn(name), form)
    except DAMAGE as error:
        raise RunError(f"{run}: {name} cannot be drawn: {error}") from error


def _run_figure(found: Any, notes: Sequence[str], name: str) -> Any:
    from embedgrad.errors import RunError
    from embedgrad.report.figures import run as figures
    from embedgrad.report.page.facts import describe_drift

    if name == "curves":
        return figures.curves(found.events)
    if name == "reliability":
        return figures.reliability([row for _, row in found.survey])
    if name == "interpolation" and found.interpolation:
        return figures.interpolation_figure(found.interpolation)
    if name == "drift" and (tokens := describe_drift(found)):
        return figures.heat_strip(tokens["rows"], tokens["radius"])
    raise RunError(" ".join([*notes, *found.notes]) or "the run holds nothing for it")


def _comparison_figure(results: dict[str, Any], name: str) -> Any:
    from embedgrad.report.figures import run as figures

    return figures.forest(results) if name == "forest" else figures.accuracy_against_cost(results)
