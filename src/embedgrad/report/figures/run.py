"""Figures of one run.

Each function takes JSON values and returns a matplotlib figure, drawn in `theme`'s light colors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from embedgrad.errors import RunError
from embedgrad.formatting import visible
from embedgrad.report.figures.calibration import BINS, Calibration, calibration, confidences
from embedgrad.report.figures.series import (
    METRICS,
    MOST_POINTS,
    is_number,
    number,
    percents,
    smooth,
    thin,
)
from embedgrad.report.figures.theme import LIGHT, MARKERS, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

FIGURES_OF_RUNS = ("curves", "drift", "reliability", "interpolation")

WIDTH = 380  # SVG units; on a phone a little less, on a screen a little more
SMOOTHED_OVER = 0.1  # of all steps
MOST_DOTS = 60  # on a line
LINE_OF_TOKENS = 54  # characters
MOST_TOKENS = 600  # of a strip


def curves(events: Sequence[Row]) -> Figure:
    """Training loss by step, and the dev score by step beside the text prompt's.

    Where the model learns from its own answers, their rewards take the place of the loss, and their
    form is below.

    Raises `RunError` where the events hold neither.
    """
    rows = [e for e in events if e.get("event") == "step" and is_number(e.get("step"))]
    sampled = [e for e in rows if is_number(e.get("reward"))]
    name = "reward" if sampled else "loss"
    steps = [(e["step"], e[name]) for e in rows if is_number(e.get(name))]
    scores = [e for e in events if e.get("event") == "evaluation"]
    metric = str(scores[0].get("metric", "accuracy")) if scores else ""
    scores = [e for e in scores if is_number(e.get(metric)) and is_number(e.get("step"))]
    count = bool(steps) + bool(scores) + 2 * bool(sampled)
    if not count:
        raise RunError("curves: the events hold no step and no evaluation to draw")
    with style():
        figure = new_figure(WIDTH, 190 * count + 20)
        axes = figure.subplots(count, squeeze=False, sharex=True)[:, 0]
        if steps:
            _by_step(axes[0], steps, "refined")
            axes[0].set_title(
                "mean reward of sampled answers" if sampled else "training loss, nats"
            )
        if sampled:
            shares = (("groups_alive", "refined"), ("answers_cut", "text"))
            for share, color in shares:
                _by_step(axes[1], [(e["step"], 100 * number(e.get(share))) for e in sampled], color)
            axes[1].set_title("questions to learn from (orange) and answers cut, %")
            _by_step(axes[2], [(e["step"], number(e["answer_tokens"])) for e in sampled], "refined")
            axes[2].set_title("tokens of an answer")
        if scores:
            _dev(axes[-1], scores, metric)
        axes[-1].set_xlabel("step")
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
    return figure


def interpolation_figure(interpolation: Row) -> Figure:
    """Accuracy and log-loss along the straight line from the text rows, and beyond the refined."""
    points = interpolation["points"]
    places = [number(point["t"]) for point in points]
    with style():
        figure = new_figure(WIDTH, 400)
        upper, lower = figure.subplots(2, sharex=True)
        low, high = zip(*(point["interval"] for point in points), strict=True)
        upper.fill_between(
            places, percents(low), percents(high), color=LIGHT["refined"], alpha=0.13, linewidth=0
        )
        _interpolation_line(upper, places, percents([point["accuracy"] for point in points]))
        where = f"{interpolation['rows']} {interpolation['split']} rows"
        upper.set_title(f"accuracy on {where} with 95 % interval, %")
        _interpolation_line(lower, places, [number(point["log_loss"]) for point in points])
        lower.set_title("log-loss, nats")
        names = {0.0: "0\ntext", 1.0: "1\nrefined"}
        ticks = [place for place in places if place in names or (place * 2).is_integer()]
        lower.set_xticks(ticks, [names.get(place, f"{place:g}") for place in ticks])
        lower.set_xlabel("place on the line")
    return figure


def reliability(predictions: Iterable[Row]) -> Figure:
    """Accuracy against confidence for both prompts, with the share of rows at each confidence.

    Raises `RunError` where there are no rows, and for free answers, which have no probabilities.
    """
    rows = list(predictions)
    if not rows:
        raise RunError("reliability: there are no scored rows to draw")
    calibrations = {name: calibration(confidences(rows, name)) for name in ("text", "refined")}
    if not all(calibrations[name].bins for name in calibrations):
        raise RunError("reliability: free answers have no probabilities; it is drawn for choices")
    with style():
        figure = new_figure(WIDTH, 400)
        upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        upper.plot([0, 100], [0, 100], color=LIGHT["muted"], linewidth=1, linestyle=(0, (3, 3)))
        for name, side in (("text", -1), ("refined", 1)):
            _draw_bins(upper, lower, name, calibrations[name], 1.9 * side)
        least = min(b.confidence for name in calibrations for b in calibrations[name].bins)
        upper.set(xlim=(max(0, math.floor(least * 10) * 10) - 2, 102), ylim=(-4, 104))
        upper.set_title("right, %")
        # Outside the axes, where it covers no point.
        figure.legend(loc="outside upper left", handlelength=1.2)
        lower.set_title("share of rows, %")
        lower.set_xlabel("confidence in the chosen answer, %")
    return figure


def heat_strip(tokens: Sequence[Row], radius: float | None = None) -> Figure:
    """The prompt's tokens on colors that say how far each one went; a span begins a line.

    Tokens are `TokenDrift`s as dicts; the scale ends at `radius`, or at the farthest token.
    """
    from rich.cells import cell_len

    words = [visible(str(token["token"]))[:LINE_OF_TOKENS] for token in tokens[:MOST_TOKENS]]
    far = [number(token["distance"]) for token in tokens[:MOST_TOKENS]]
    most = max([radius or 0, *(d for d in far if math.isfinite(d))]) or 1.0
    spans = [token.get("span") for token in tokens[:MOST_TOKENS]]
    places, x, y = [], 0, 0
    for i, word in enumerate(words):
        width = max(1, cell_len(word))
        if x and (x + width > LINE_OF_TOKENS or spans[i] != spans[i - 1]):
            x, y = 0, y + 1
        places.append((x, y, width))
        x += width + 1
        if word.endswith("\u21b5"):
            x, y = 0, y + 1
    lines = 1 + max((y for _, y, _ in places), default=0)
    with style():
        figure = new_figure(WIDTH, 26 * lines + 52)
        axes = figure.subplots()
        axes.set(xlim=(-0.5, LINE_OF_TOKENS + 0.5), ylim=(lines + 0.1, -0.5))
        axes.axis("off")
        for word, d, (x, y, width) in zip(words, far, places, strict=True):
            _token(axes, word, d / most, x, y, width)
        _scale(figure, most, radius)
    return figure


def continual_figure(continual: Row) -> Figure:
    """A heat map of the accuracy on each task after each training, %.

    Raises `RunError` where no task has been added.
    """
    matrix, tasks = continual.get("matrix") or [], continual.get("tasks") or []
    if not matrix:
        raise RunError("continual: the run is no continuation of another")
    names = [visible(str(name)) for name in tasks]
    shares = [[*row, *[math.nan] * (len(names) - len(row))] for row in matrix]
    with style():
        figure = new_figure(WIDTH, 60 + 34 * len(names))
        axes = figure.subplots()
        axes.imshow(shares, cmap=_heat(), vmin=0, vmax=1, aspect="auto")
        for i, row in enumerate(matrix):
            for j, share in enumerate(row):
                axes.text(j, i, f"{100 * share:.1f}", ha="center", va="center")
        axes.set_xticks(range(len(names)), labels=names)
        axes.set_yticks(range(len(names)), labels=[f"after {name}" for name in names])
        axes.grid(visible=False)
    return figure


def _by_step(axes: Axes, points: Sequence[tuple[float, float]], color: str) -> None:
    """A line by step and, stronger, its moving mean."""
    places, values = thin([step for step, _ in points]), [value for _, value in points]
    window = max(4, round(len(points) * SMOOTHED_OVER))
    axes.plot(places, thin(values), color=LIGHT[color], alpha=0.3, linewidth=1)
    axes.plot(places, thin(smooth(values, window)), color=LIGHT[color])


def _dev(axes: Axes, scores: Sequence[Row], metric: str) -> None:
    scale = 1 if metric in ("log_loss", "regret") else 100
    places = [e["step"] for e in scores]
    values = [scale * e[metric] for e in scores]
    kept = (scores[-1].get("best") or {}).get("step")
    highest = max if scale > 1 else min
    best = places.index(kept) if kept in places else values.index(highest(values))
    text = (scores[0].get("text") or {}).get(metric)
    if is_number(text):
        axes.axhline(scale * text, color=LIGHT["text"], linewidth=1.2, linestyle=(0, (4, 3)))
        at: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        beside: dict[str, Any] = {"xytext": (4, 0), "va": "center", "color": LIGHT["text"]}
        axes.annotate("text", (1, scale * text), annotation_clip=False, **at, **beside)
    marker = "o" if len(places) <= MOST_DOTS else None
    few = slice(None, None, 1 + len(places) // MOST_POINTS)
    intervals = [e.get("interval") for e in scores]
    interval = ""
    if metric == "accuracy" and all(intervals):  # logs of before have none
        low, high = (percents(edges) for edges in zip(*intervals, strict=True))
        shade: dict[str, Any] = {"color": LIGHT["refined"], "alpha": 0.13, "linewidth": 0}
        axes.fill_between(places[few], low[few], high[few], **shade)
        interval = f" ({low[best]:.1f} to {high[best]:.1f})"
    axes.plot(places[few], values[few], color=LIGHT["refined"], marker=marker, markersize=4)
    ring: dict[str, Any] = {"color": LIGHT["refined"], "markersize": 9, "markerfacecolor": "none"}
    axes.plot([places[best]], [values[best]], "o", **ring)
    form = f"{values[best]:.3f}" if scale == 1 else f"{values[best]:.1f} %{interval}"
    axes.set_title(f"dev {METRICS.get(metric, metric)}, best {form} at step {places[best]}")
    axes.margins(y=0.15)


def _interpolation_line(axes: Axes, places: Sequence[float], values: Sequence[float]) -> None:
    axes.axvspan(1, max(places), color=LIGHT["panel"], linewidth=0, zorder=0)
    axes.plot(places, values, color=LIGHT["refined"], marker="o", markersize=4)
    for place, name in ((0.0, "text"), (1.0, "refined")):
        if place in places:
            value = values[list(places).index(place)]
            edge: dict[str, Any] = {"markeredgecolor": LIGHT["paper"], "markeredgewidth": 1.5}
            axes.plot([place], [value], MARKERS[name], markersize=9, color=LIGHT[name], **edge)
    axes.margins(x=0.03, y=0.12)


def _draw_bins(upper: Axes, lower: Axes, name: str, curve: Calibration, aside: float) -> None:
    """Accuracy by confidence, and below it a bar per bin, beside the other prompt's."""
    total = sum(b.count for b in curve.bins)
    across = [100 * b.confidence for b in curve.bins]
    up = [100 * b.accuracy for b in curve.bins]
    label = f"{name} prompt, ECE {100 * curve.ece:.1f} points"
    upper.plot(across, up, color=LIGHT[name], label=label, marker=MARKERS[name], markersize=3)
    sizes = [20 + 200 * b.count / total for b in curve.bins]
    shape = MARKERS[name]
    upper.scatter(across, up, s=sizes, color=LIGHT[name], marker=shape, alpha=0.55, linewidths=0)
    wide = 100 / BINS
    middles = [(min(int(b.confidence * BINS), BINS - 1) + 0.5) * wide for b in curve.bins]
    shares = [100 * b.count / total for b in curve.bins]
    lower.bar([m + aside for m in middles], shares, width=3.4, color=LIGHT[name])


def _token(axes: Axes, word: str, share: float, x: float, y: float, width: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    if math.isfinite(share):
        alpha = min(1.0, max(0.0, share)) * 0.85
        rounded = "round,pad=0,rounding_size=0.12"
        box = FancyBboxPatch((x - 0.15, y - 0.36), width + 0.3, 0.72, boxstyle=rounded)
        box.set(color=LIGHT["heat"], alpha=alpha, linewidth=0)
        axes.add_patch(box)
    middle: dict[str, Any] = {"ha": "center", "va": "center"}
    axes.text(x + width / 2, y, word, fontsize=10, fontfamily=["DejaVu Sans Mono"], **middle)


def _heat() -> Colormap:
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    ends = [(*to_rgba(LIGHT["heat"])[:3], alpha) for alpha in (0.0, 0.85)]
    return LinearSegmentedColormap.from_list("heat", ends, N=32)


def _scale(figure: Figure, most: float, radius: float | None) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    shades = ScalarMappable(Normalize(0, most), _heat())
    below: dict[str, Any] = {"orientation": "horizontal", "fraction": 0.08, "aspect": 40}
    bar = figure.colorbar(shades, ax=figure.axes[0], pad=0.02, **below)
    edge = f"{most:.2f}, the trust region's edge" if most == radius else f"{most:.2f}"
    bar.set_ticks([0, most], labels=["0", edge])
    bar.ax.get_xticklabels()[-1].set_horizontalalignment("right")
    bar.set_label("distance from the start row, in its norms")
    bar.outline.set_edgecolor(LIGHT["line"])
