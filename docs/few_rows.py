"""Accuracy by the number of training rows, a curve for each method."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import measured

from embedgrad.report.figures.theme import LIGHT, image, new_figure, style

PLACE = "docs/few-rows.svg"
WIDTH, HEIGHT = 560, 330  # SVG units
FILE = re.compile(r"compare-sst2-(\d+)-rows-")
METHODS = {  # name, color, mark
    "embedgrad": ("EmbedGrad", "refined", "o"),
    "peft-prompt-tuning-text": ("prompt tuning", "heat", "s"),
    "peft-lora": ("LoRA", "ink", "^"),
    "linear-probe": ("linear probe", "muted", "x"),
}

Scores = dict[int, list[float]]


def drawing(root: Path) -> str | None:
    """An SVG: means over seeds, and every seed as a faint mark; None where nothing is measured."""
    text, curves = read(root)
    if not curves:
        return None
    with style():
        figure = new_figure(WIDTH, HEIGHT)
        axes = figure.subplots()
        for method, (name, color, mark) in METHODS.items():
            rows = sorted(curves.get(method, ()))
            if not rows:
                continue
            means = [100 * sum(scores) / len(scores) for scores in map(curves[method].get, rows)]
            axes.plot(rows, means, color=LIGHT[color], marker=mark, label=name)
            for count in rows:
                dots = [100 * score for score in curves[method][count]]
                axes.plot([count] * len(dots), dots, mark, color=LIGHT[color], alpha=0.3)
        axes.axhline(100 * text, color=LIGHT["ink"], linestyle=":", label="text prompt")
        axes.set_xscale("log")
        counts = sorted({count for curve in curves.values() for count in curve})
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("training rows")
        axes.set_ylabel("accuracy on test rows, %")
        axes.legend(loc="center")
    return image(figure, "svg").decode()


def table(root: Path) -> str:
    """The picture, and the mean accuracy over seeds by method and number of training rows."""
    text, curves = read(root)
    if not curves:
        return "Not measured yet.\n"
    counts = sorted({count for curve in curves.values() for count in curve})
    lines: list[tuple[str, ...]] = [("training rows", *(f"{count:,}" for count in counts))]
    for method, (name, _, _) in METHODS.items():
        if curve := curves.get(method):
            lines.append((name, *(_cell(curve.get(count)) for count in counts)))
    picture = "![Accuracy by the number of training rows](few-rows.svg)"
    return f"{picture}\n\n{measured.markdown(lines)}\nThe text prompt: {100 * text:.1f} %.\n"


def read(root: Path) -> tuple[float, dict[str, Scores]]:
    """Accuracy of the text prompt; of every method by training rows, a score for each seed."""
    text, curves = 0.0, dict[str, Scores]()
    for path in (root / measured.FOLDER).glob("compare-sst2-*-rows-*.json"):
        found = FILE.match(path.stem)
        results: dict[str, Any] = measured.read(root, path.stem) or {"rows": []}
        for row in results["rows"] if found else ():
            if row["method"] == "text":
                text = row["accuracy"]
            elif found and row["method"] in METHODS:
                by_count = curves.setdefault(row["method"], {})
                by_count.setdefault(int(found[1]), []).append(row["accuracy"])
    return text, curves


def _cell(scores: list[float] | None) -> str:
    if not scores:
        return ""
    mean = f"{100 * sum(scores) / len(scores):.1f} %"
    return f"{mean} ({len(scores)} seeds)" if len(scores) > 1 else mean
