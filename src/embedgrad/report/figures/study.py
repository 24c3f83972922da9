"""Figures of a study, from the `trials.json` of `embedgrad tune`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from embedgrad.errors import RunError
from embedgrad.formatting import visible
from embedgrad.report.figures.series import METRICS, number
from embedgrad.report.figures.theme import LIGHT, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 440  # SVG units
SHARES = ("accuracy", "macro_f1")
COSTS = {"seconds": "seconds of training", "tokens": "tokens of the prompt"}
LONGEST_VALUE = 24  # characters
Study = Mapping[str, Any]


def history(study: Study) -> Figure:
    """Every trial's score in the order of the trials, and the best score so far.

    Raises `RunError` where no trial has finished.
    """
    from matplotlib.ticker import MaxNLocator

    trials, name = _trials(study), study["objectives"][0]
    with style():
        figure = new_figure(WIDTH, 240)
        axes = figure.subplots()
        places, values = [t["trial"] + 1 for t in trials], _values(trials, name)
        best = accumulate(
            (v for t, v in zip(trials, values, strict=True) if not t["pruned"]),
            min if name in study["lower"] else max,
        )
        whole = [place for t, place in zip(trials, places, strict=True) if not t["pruned"]]
        axes.step(whole, list(best), where="post", color=LIGHT["refined"])
        _dots(axes, trials, places, values)
        axes.set_title(_title(name))
        axes.set_xlabel("trial")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.04, y=0.12)
    return figure


def settings(study: Study) -> Figure:
    """Every trial's score against each setting that was tuned, one below the other.

    Raises `RunError` where no trial has finished.
    """
    trials, name = _trials(study), study["objectives"][0]
    names = list(study["settings"])
    with style():
        figure = new_figure(WIDTH, 190 * len(names) + 20)
        panels = figure.subplots(len(names), squeeze=False, sharey=True)[:, 0]
        for axes, setting in zip(panels, names, strict=True):
            given = [trial[setting] for trial in trials]
            if kinds := study["settings"][setting]["values"]:
                order = {kind: i for i, kind in enumerate(kinds)}
                given = [order[one] for one in given]
                labels = [visible(str(kind))[:LONGEST_VALUE] for kind in kinds]
                axes.set_xticks(range(len(kinds)), labels)
                axes.set_xlim(-0.5, len(kinds) - 0.5)
            elif study["settings"][setting]["log"]:
                _logarithmic(axes, max(given) / min(given))
            _dots(axes, trials, given, _values(trials, name))
            axes.set_xlabel(visible(setting))
            axes.margins(x=0.06, y=0.12)
        panels[0].set_title(_title(name))
    return figure


def front(study: Study) -> Figure:
    """The first two objectives against each other; a line joins the trials that none beats in all.

    Raises `RunError` for a study of one objective, and where no trial has finished.
    """
    trials, names = _trials(study), study["objectives"]
    if len(names) < 2:
        raise RunError("front: the study has one objective; it is drawn for two or more")
    with style():
        figure = new_figure(WIDTH, 300)
        axes = figure.subplots()
        across, up = _values(trials, names[1]), _values(trials, names[0])
        points = zip(across, up, trials, strict=True)
        joined = sorted((x, y) for x, y, trial in points if trial["front"])
        axes.plot(*zip(*joined, strict=True), color=LIGHT["refined"], linewidth=1.2)
        _dots(axes, [{**trial, "pruned": not trial["front"]} for trial in trials], across, up)
        axes.set_title(_title(names[0]))
        axes.set_xlabel(_title(names[1]))
        axes.margins(0.08, 0.12)
    return figure


def _trials(study: Study) -> list[Mapping[str, Any]]:
    """The trials in the order in which they began; the best one says so."""
    if not study["trials"]:
        raise RunError("the study has no trial that finished")
    first, *others = study["trials"]
    return sorted([{**first, "best": True}, *others], key=lambda trial: trial["trial"])


def _values(trials: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [(100 if name in SHARES else 1) * number(t["values"].get(name)) for t in trials]


def _title(name: str) -> str:
    if name in COSTS:
        return COSTS[name]
    unit = ", %" if name in SHARES else ", nats" if name == "log_loss" else ""
    return f"dev {METRICS.get(name, name)}{unit}"


def _logarithmic(axes: Axes, range_: float) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if range_ > 100 else (1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")


def _dots(
    axes: Axes, trials: Sequence[Mapping[str, Any]], x: Sequence[float], y: Sequence[float]
) -> None:
    """A dot for each trial: hollow where it was stopped early, with a ring around the best."""
    for trial, place, value in zip(trials, x, y, strict=True):
        color = LIGHT["muted" if trial["pruned"] else "refined"]
        look = {"markerfacecolor": "none"} if trial["pruned"] else {"zorder": 3}
        axes.plot([place], [value], "o", markersize=5, color=color, **look)
        if trial.get("best"):
            axes.plot([place], [value], "o", markersize=11, color=color, markerfacecolor="none")


FIGURES_OF_STUDIES: dict[str, Callable[[Study], Figure]] = {
    "history": history,
    "settings": settings,
    "front": front,
}
