"""Figures of a comparison of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from embedgrad.errors import RunError
from embedgrad.formatting import scale, visible
from embedgrad.report.figures.series import is_number
from embedgrad.report.figures.theme import LIGHT, MARKERS, NO_GAIN, SIGNS, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES_OF_COMPARISONS = ("cost", "forest")
TEXT = "text"  # the method that the others are compared with
WIDTH = 440  # SVG units
LONGEST_NAME = 40  # characters
TICKS = (
    *(0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 20.0),  # seconds
    *(60.0 * n for n in (0.5, 1, 2, 5, 10, 20, 30)),
    *(3600.0 * n for n in (1, 2, 5, 10, 20, 50, 100, 1000)),
)


def forest(results: Mapping[str, Any]) -> Figure:
    """Difference to the text prompt by method: interval, mean, and a dot for each seed.

    Raises `RunError` where no method has a difference.
    """
    methods = rank_methods(results)
    if not methods:
        raise RunError("forest: the results hold no method with a difference to the text prompt")
    with style():
        figure = new_figure(WIDTH, 40 * len(methods) + 64)
        axes = figure.subplots()
        axes.axvline(0, color=LIGHT["text"], linewidth=1.2)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        for y, entry in enumerate(methods):
            name = entry["method"]
            seeds = [r.get("difference") for r in results["rows"] if r.get("method") == name]
            _estimate(axes, y, entry, [100 * s for s in seeds if is_number(s)])
        axes.set(ylim=(len(methods) - 0.3, -0.75), yticks=[])
        axes.margins(x=0.06)
        axes.set_xlabel("difference to the text prompt, points of accuracy")
    return figure


def accuracy_against_cost(results: Mapping[str, Any]) -> Figure:
    """Accuracy by training time, with its 95 % interval, the verdict and the numbers trained.

    A bar spans the seeds in results of before, which have no interval.

    Raises `RunError` where no method has both.
    """
    points = _costs(results)
    if not points:
        raise RunError("cost: the results hold no method with an accuracy and training seconds")
    trained = [p["seconds"] for p in points if p["seconds"] > 0]
    # Untrained methods are at 0, left of everything that took time.
    least = min(trained, default=1.0)
    with style():
        figure = new_figure(WIDTH, 340)
        axes = figure.subplots()
        # Round times from just below the least up to the most, six at the most.
        round_ones = [s for s in TICKS if least < s <= max(p["seconds"] for p in points)]
        below = max((s for s in TICKS if s <= least), default=TICKS[0])
        ticks = [below, *round_ones][:: 1 + len(round_ones) // 6]
        axes.set_xscale("symlog", linthresh=ticks[0], linscale=0.3)
        for point in points:
            which = "text" if point["name"] == TEXT else "refined"
            place, color = point["seconds"], LIGHT[which]
            axes.plot([place] * 2, [point["min"], point["max"]], color=color, alpha=0.4)
            axes.plot([place], [point["accuracy"]], marker=MARKERS[which], color=color)
        axes.set_xlim(-0.25 * ticks[0], max(*ticks, *trained, least) * 1.3)
        axes.set_xticks([0, *ticks], ["0", *map(_time, ticks)])
        axes.set_xticks([], minor=True)
        axes.margins(y=0.14)
        _label(axes, points)
        axes.set_xlabel("training time")
        axes.set_title("accuracy, %")
    return figure


def rank_methods(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The methods besides the text prompt that have a difference to it, the best first."""
    others = [entry for entry in results["methods"] if entry["method"] != TEXT]
    compared = [entry for entry in others if is_number(entry.get("difference"))]
    return sorted(compared, key=lambda entry: -entry["difference"])


def count(numbers: float) -> str:
    """A count as people say it: 576, 7.5k, 1.2M."""
    return scale(numbers, ("", "k", "M", "G"))


def _estimate(axes: Axes, y: int, entry: Mapping[str, Any], seeds: Sequence[float]) -> None:
    difference = 100 * entry["difference"]
    verdict = entry.get("verdict") or NO_GAIN
    color = LIGHT[{"improved": "right", "worse": "wrong"}.get(verdict, "muted")]
    label = f"{difference:+.1f}"
    if entry.get("difference_interval"):
        low, high = (100 * edge for edge in entry["difference_interval"])
        axes.plot([low, high], [y, y], color=color, linewidth=2)
        label += f"  ({low:+.1f} to {high:+.1f})"
    label += f"  {SIGNS.get(verdict, SIGNS[NO_GAIN])} {verdict}"
    if len(seeds) > 1:
        axes.plot(seeds, [y] * len(seeds), "o", color=color, markersize=4, alpha=0.45)
    axes.plot([difference], [y], marker="D", markersize=6.5, color=color)
    across = axes.get_yaxis_transform()
    name = visible(entry["method"])[:LONGEST_NAME]
    for x, text, ink, side in ((0, name, LIGHT["ink"], "left"), (1, label, color, "right")):
        at = axes.text(x, y - 0.36, text, color=ink, va="center", ha=side, transform=across)
        at.set_bbox({"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 1.5})


def _costs(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the figure draws of each method that has an accuracy and training seconds."""
    points = []
    for entry in results["methods"]:
        if not (is_number(entry.get("train_seconds")) and is_number(entry.get("accuracy"))):
            continue
        spread = [entry.get(name) for name in ("min", "max")]
        edges = [
            edge if is_number(edge) else entry["accuracy"]
            for edge in entry.get("interval") or spread
        ]
        points.append(
            {
                "name": str(entry["method"]),
                "seconds": entry["train_seconds"],
                "accuracy": 100 * entry["accuracy"],
                "min": 100 * edges[0],
                "max": 100 * edges[1],
                "numbers": entry.get("trained_numbers") or 0,
                "sign": SIGNS.get(entry.get("verdict") or "", ""),
            }
        )
    return points


def _label(axes: Axes, points: Sequence[Mapping[str, Any]]) -> None:
    """A name beside each point, moved up or down where two would overlap."""
    low, high = axes.get_ylim()
    height = 0.05 * (high - low)
    middle = axes.transAxes.inverted()
    placed: list[tuple[bool, float]] = []
    for point in sorted(points, key=lambda p: -p["accuracy"]):
        at = middle.transform(axes.transData.transform((point["seconds"], point["accuracy"])))
        left = bool(at[0] > 0.5)
        y = point["accuracy"]
        for beside, other in placed:
            if beside == left and abs(other - y) < height:
                y = other - height
        placed.append((left, y))
        numbers = f", {count(point['numbers'])} numbers" if point["numbers"] else ""
        label = f"{point['sign']} {visible(point['name'])[:LONGEST_NAME]}{numbers}".strip()
        side: dict[str, Any] = {"xytext": (-8 if left else 8, 0), "ha": "right" if left else "left"}
        look: dict[str, Any] = {"va": "center", "fontsize": 9.5, "color": LIGHT["ink"]}
        place = (point["seconds"], y)
        axes.annotate(label, place, textcoords="offset points", **side, **look)


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:g} s"
    return f"{seconds / 60:g} min" if seconds < 3600 else f"{seconds / 3600:g} h"
