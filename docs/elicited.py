"""What there was to elicit before training, against what training gained: a scatter and a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import StatisticsError, correlation
from typing import TYPE_CHECKING, Any, NamedTuple

import gains
import measured

from embedgrad.report.figures.theme import LIGHT, image, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLACE = "docs/elicit.svg"
NAME = "elicit"


class Point(NamedTuple):
    """A comparison: its task, the meter's reading with its interval, and the gain on test rows."""

    task: str
    reading: float
    low: float
    high: float
    gain: Mapping[str, Any]
    row: Mapping[str, Any]


def points(root: Path) -> tuple[list[Point], list[Point]]:
    """Comparisons of choices by AUC, and of free text by pass@k less pass@1."""
    choices, free = [], []
    readings = ((measured.read(root, NAME) or {}).get("rows") or {}).values()
    for name, row in [(name, reading) for reading in readings for name in reading["gains"]]:
        path = root / measured.FOLDER / f"{name}.json"
        methods = json.loads(path.read_text("utf-8"))["methods"] if path.exists() else []
        gain = next((m for m in methods if m["method"] == "embedgrad"), None)
        if gain is None:
            continue
        name = name.removeprefix("compare-")
        task = ", ".join(filter(None, gains.TASKS.get(name, (name, ""))))
        if row["sampled"] is None:
            if row["text"]["auc"] is not None:
                choices.append(
                    Point(task, row["text"]["auc"], *row["text"]["auc_interval"], gain, row)
                )
        else:
            one, some = row["sampled"]["pass_at"]["1"], list(row["sampled"]["pass_at"].values())[-1]
            low, high = (max(0.0, edge - one) for edge in row["sampled"]["pass_interval"])
            free.append(Point(task, some - one, low, high, gain, row))
    return choices, free


def drawing(root: Path) -> str | None:
    """An SVG with a panel for choices and one for free text; None where nothing is measured."""
    choices, free = points(root)
    if not choices and not free:
        return None
    with style():
        figure = new_figure(880, 380)
        left, right = figure.subplots(1, 2, sharey=True)
        _panel(left, choices, "AUC of the text prompt's scores, dev rows")
        left.axvline(0.5, color=LIGHT["muted"], linewidth=1, linestyle=":")
        left.set_title("choices")
        left.set_ylabel("gain of the refined prompt, points on test rows")
        _panel(right, free, "pass@k less pass@1 of the text prompt, dev rows")
        right.set_title("free text")
    return image(figure, "svg").decode()


def _panel(axes: Axes, found: Sequence[Point], label: str) -> None:
    axes.axhline(0, color=LIGHT["muted"], linewidth=1)
    axes.set_xlabel(label)
    for point in found:
        low, high = (100 * edge for edge in point.gain["difference_interval"])
        y = 100 * point.gain["difference"]
        color = LIGHT["refined"] if point.gain["verdict"] == "improved" else LIGHT["muted"]
        axes.plot([point.reading] * 2, [low, high], color=color, linewidth=1.2)
        axes.plot([point.low, point.high], [y, y], color=color, linewidth=1.2)
        axes.plot([point.reading], [y], "o", color=color, markersize=6.5)
        axes.annotate(
            point.task,
            (point.reading, y),
            xytext=(5, 5),
            textcoords="offset points",
            fontsize=8.5,
            color=LIGHT["ink"],
        )


def table(root: Path, up: str) -> str:
    """A line for each comparison that the meter was held against, and how far they agree."""
    choices, free = points(root)
    if not choices and not free:
        return "Not measured yet.\n"
    lines: list[Sequence[str]] = [
        ("task", "dev rows", "expected", "why", "gain on test (95 %)", "verdict")
    ]
    for point in sorted((*choices, *free), key=lambda p: -p.gain["difference"]):
        low, high = (f"{100 * edge:+.1f}" for edge in point.gain["difference_interval"])
        lines.append(
            (
                *(point.task, str(point.row["rows"]), point.row["expect"], point.row["sentence"]),
                f"{100 * point.gain['difference']:+.1f} ({low} to {high})",
                point.gain["verdict"],
            )
        )
    said = [
        f"over the {len(found)} {name}, {of} and gain correlate with r = {r:.2f}"
        for name, of, found in (
            ("comparisons with choices", "AUC", choices),
            ("with free text", "pass@k less pass@1", free),
        )
        if (r := _correlation(found)) is not None
    ]
    sentence = f"\n{'; '.join(said)[0].upper()}{'; '.join(said)[1:]}.\n" if said else ""
    return (
        f"{measured.markdown(lines)}{sentence}\n"
        f"From [elicit.json]({up}{measured.FOLDER}/elicit.json).\n"
    )


def _correlation(found: Sequence[Point]) -> float | None:
    """Pearson's r of reading and gain; None where there are too few points, or they do not vary."""
    try:
        own = [(point.reading, point.gain["difference"]) for point in found]
        return correlation(*zip(*own, strict=True)) if len(own) > 2 else None
    except StatisticsError:
        return None
