"""`embedgrad.figure`: one figure of a run, a comparison or a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedgrad.errors import OptionError, RunError, border, nearest
from embedgrad.report.figures import comparison, run
from embedgrad.report.figures.study import FIGURES_OF_STUDIES
from embedgrad.report.page.facts import describe_drift
from embedgrad.report.page.run_files import RunFiles, read_comparison, read_run
from embedgrad.report.page.study import read_study

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@border("the files of the run", RunError)
def figure(folder: str | Path, name: str) -> Figure:
    """A figure of a run, a comparison or a study, for matplotlib and notebooks.

    A run has `curves`, `drift`, `reliability` and, once `embedgrad report` has measured it,
    `interpolation`; a comparison has `forest` and `cost`; a study of `embedgrad tune` has
    `history`, `settings` and `front`. Raises `OptionError` for another name, `RunError` where the
    folder holds no data for it.
    """
    folder = Path(folder)
    results, trials = read_comparison(folder), read_study(folder)
    known = figures_of(results, trials)
    if name not in known:
        raise OptionError(f"figure: {name!r} is unknown; {nearest(name, known)}")
    if results is not None:
        return draw_comparison(results, name)
    if trials is not None:
        return draw_study(trials, name)
    return draw_run(read_run(folder), (), name)


def figures_of(
    results: Mapping[str, Any] | None, trials: Mapping[str, Any] | None
) -> tuple[str, ...]:
    """The names of the figures of a comparison, of a study, or of a run, which is neither."""
    if results is not None:
        return comparison.FIGURES_OF_COMPARISONS
    return run.FIGURES_OF_RUNS if trials is None else tuple(FIGURES_OF_STUDIES)


def draw_run(files: RunFiles, notes: Sequence[str], name: str) -> Figure:
    """A figure of a run; `notes` say why data that it needs is missing. Raises `RunError`."""
    if name == "curves":
        return run.curves(files.events)
    if name == "reliability":
        return run.reliability([row for _, row in files.survey])
    if name == "interpolation" and files.interpolation:
        return run.interpolation_figure(files.interpolation)
    if name == "drift" and (tokens := describe_drift(files)):
        return run.heat_strip(tokens["rows"], tokens["radius"])
    raise RunError(" ".join([*notes, *files.notes]) or "the run has no data for it")


def draw_comparison(results: Mapping[str, Any], name: str) -> Figure:
    """A figure of a comparison's results."""
    draw = comparison.forest if name == "forest" else comparison.accuracy_against_cost
    return draw(results)


def draw_study(trials: Mapping[str, Any], name: str) -> Figure:
    """A figure of a study."""
    return FIGURES_OF_STUDIES[name](trials)
