"""Command `report`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from embedgrad.cli.common import AsJson, Quiet, Set, app, echo, print_values, warn
from embedgrad.cli.completion import FIGURES, one_of

FORMATS = ("html", "png", "svg")


@app.command(epilog="Example:  embedgrad report runs/first")
def report(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="A folder that `optimize`, `compare` or `tune` wrote, or a saved prompt's.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The file to write; default: RUN/report.html.")
    ] = None,
    rows: Annotated[
        int,
        typer.Option(
            min=1, help="Number of dev rows for the interpolation from text to refined prompt."
        ),
    ] = 100,
    no_model: Annotated[
        bool, typer.Option("--no-model", help="Leave out everything that needs the model.")
    ] = False,
    form: Annotated[
        str, typer.Option("--format", help="html, png or svg.", autocompletion=one_of(*FORMATS))
    ] = "html",
    figure: Annotated[
        str | None,
        typer.Option(help="The figure to write as png or svg.", autocompletion=one_of(*FIGURES)),
    ] = None,
    overrides: Set = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make a page or a figure of a run, a comparison or a study."""
    from embedgrad.atomic_files import check_writable, write_file
    from embedgrad.errors import RunError
    from embedgrad.evaluation.per_class import per_class
    from embedgrad.formatting import size, visible
    from embedgrad.recipe.paths import find_run, no_run
    from embedgrad.report.page.figure import draw_comparison, draw_run, draw_study, figures_of
    from embedgrad.report.page.page import comparison_page, run_page
    from embedgrad.report.page.run_files import (
        compared_rows,
        read_comparison,
        read_run,
        version_notes,
    )
    from embedgrad.report.page.study import read_study, study_page

    if run.is_file() and run.name != "results.json" and find_run(run.parent):
        raise RunError(no_run(run))
    run = find_run(run) or run
    results, study = read_comparison(run), read_study(run)
    _check_form(form, figure, figures_of(results, study))
    file = f"{figure or 'report'}.{form}"
    path = out or (run / file if run.is_dir() else run.with_name(f"{run.stem}-{file}"))
    if path.suffix != f".{form}":
        raise typer.BadParameter(f"--out: {path} does not end in .{form}")
    check_writable(path)  # before minutes of computing
    notes: list[str] = []
    if results is not None:
        notes = version_notes(run, results)
        name = run.stem if run.is_file() else run.resolve().name
        more: list[str] = []
        compared = compared_rows(run if run.is_dir() else run.parent, more)
        page = partial(comparison_page, results, name, compared, [*notes, *more])
        draw = partial(draw_comparison, results)
    elif study is not None:
        page = partial(study_page, study, run.resolve().name)
        draw = partial(draw_study, study)
    else:
        files = read_run(run)
        if figure in (None, "interpolation") and not files.alone:
            notes = _interpolate(files, rows, overrides or (), no_model, quiet)
        classes = per_class(row for _, row in files.survey)
        page = partial(run_page, files, run.resolve().name, notes, classes)
        draw = partial(draw_run, files, notes)
    written = page().encode() if figure is None else _image(run, figure, form, draw)
    write_file(path, written)
    if not no_model:
        warn(*notes)
    values = {"written": str(path), "bytes": len(written), "notes": notes}
    line = f"wrote {visible(str(path))} ({size(len(written))})"
    print_values(values, as_json, lambda _: echo(line))


def _check_form(form: str, figure: str | None, known: Sequence[str]) -> None:
    from embedgrad.errors import nearest

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


def _interpolate(
    files: Any, rows: int, overrides: Sequence[str], no_model: bool, quiet: bool
) -> list[str]:
    """Compute the interpolation unless the saved one is current; returns notes if there is none."""
    from embedgrad.errors import EmbedgradError
    from embedgrad.report.page.run_files import INTERPOLATION, interpolation_inputs

    current = interpolation_inputs(files.folder, rows, overrides)["from"]
    saved = files.interpolation.get("from")
    same_rows = isinstance(saved, dict) and saved.get("artifact") == current["artifact"]
    if saved == current or (no_model and same_rows):
        return []
    files.interpolation = {}
    if no_model:
        return ["Left out: everything that needs the model (--no-model)."]
    from embedgrad.atomic_files import write_json
    from embedgrad.experiments.interpolation import interpolate
    from embedgrad.report.terminal.progress import Progress

    try:
        with Progress(quiet=quiet) as progress:
            files.interpolation = interpolate(files.folder, rows, overrides, progress)
    except EmbedgradError as error:
        return [f"Left out: everything that needs the model ({error})."]
    try:
        write_json(files.folder / INTERPOLATION, files.interpolation)
    except EmbedgradError as error:
        return [f"The interpolation is not saved ({error}); the next report computes it again."]
    return []


def _image(run: Path, name: str, form: str, draw: Callable[[str], Any]) -> bytes:
    from embedgrad.errors import RunError
    from embedgrad.report.figures.theme import image
    from embedgrad.report.page.page import DAMAGE

    try:
        return image(draw(name), form)
    except DAMAGE as error:
        raise RunError(f"{run}: {name} cannot be drawn: {error}") from error
