"""A figure for each task of docs/gallery.md, from the measured results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import measured

from embedgrad.experiments.compare.results import methods_of
from embedgrad.report.figures.comparison import forest
from embedgrad.report.figures.run import curves
from embedgrad.report.figures.theme import LIGHT, image, new_figure, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Mapping[str, Any]
Scores = Mapping[str, float]  # accuracy by what answered

WIDTH, ROW_HEIGHT = 460, 40  # SVG units
COLORS = ("text", "refined", "heat", "muted")


def drawings(root: Path) -> dict[Path, str]:
    """An SVG for each task that is measured, by its file."""
    made = {}
    for task, (name, draw) in FIGURES.items():
        results = measured.read(root, name)
        if results is not None:
            made[root / "docs" / f"gallery-{task}.svg"] = image(draw(results), "svg").decode()
    return made


def dots(rows: Mapping[str, Scores]) -> Figure:
    """A line of dots for each row: who answered, and how many answers are right."""
    names = list(dict.fromkeys(name for scores in rows.values() for name in scores))
    with style():
        figure = new_figure(WIDTH, ROW_HEIGHT * len(rows) + 78)
        axes = figure.subplots()
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        for y, scores in enumerate(rows.values()):
            ends = (100 * min(scores.values()), 100 * max(scores.values()))
            axes.plot(ends, (y, y), color=LIGHT["line"], zorder=1)
        for i, (name, color, mark) in enumerate(zip(names, COLORS, "so^v", strict=False)):
            aside = 0.2 * (i - (len(names) - 1) / 2)  # so that equal ones are all seen
            points = [(100 * s[name], y + aside) for y, s in enumerate(rows.values()) if name in s]
            axes.plot(*zip(*points, strict=True), mark, color=LIGHT[color], label=name)
        low, high = axes.get_xlim()
        axes.set_xlim(low - 5, min(high + 5, 101))
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="accuracy on held-out rows, %")
        figure.legend(loc="outside upper center", ncols=len(names))
    return figure


def compared(results: Results) -> Figure:
    """The forest plot of a comparison."""
    return forest({**results, "methods": methods_of(results["rows"])})


def compressed(results: Results) -> Figure:
    """A long prompt, its short instruction, its first tokens, and the refined rows."""
    names = {"instruction": "short prompt", "refined": "refined rows"}
    names |= {"first_tokens": "first tokens", "long": "long prompt"}
    entries = [entry for entry in results["entries"] if "teacher" in entry]
    return dots({e["task"]: {shown: e[key] for key, shown in names.items()} for e in entries})


def asked(results: Results) -> Figure:
    """One prompt, a policy over three, and the vote of all three."""

    def scores(chosen: Results) -> dict[str, float]:
        ways = {"first prompt": "first", "policy": "policy", "majority vote": "vote"}
        told = {name: chosen[key] for name, key in ways.items()}
        return {f"{name}, {t['calls']:.1f} calls": t["accuracy"] for name, t in told.items()}

    return dots({row["task"]: scores(row["chosen"]) for row in results["rows"].values()})


def together(results: Results) -> Figure:
    """Tasks trained together: the text prompts, shared factors, and separate prompts."""
    ways = {"refined together": "cp16,", "refined separately": "separate,"}

    def mean(way: str, task: str, prompt: str) -> float:
        found = [row for name, row in results["rows"].items() if name.startswith(way)]
        return fmean(row["tasks"][task][prompt] for row in found)

    tasks: Sequence[str] = list(next(iter(results["rows"].values()))["tasks"])
    return dots(
        {
            task: {
                "text prompt": mean("separate,", task, "text"),
                **{name: mean(way, task, "refined") for name, way in ways.items()},
            }
            for task in tasks
        }
    )


def rewarded(results: Results) -> Figure:
    """Dev accuracy while the model learns from its own answers."""
    (row,) = (row for name, row in results["rows"].items() if name.startswith("reward,"))
    events = [{"event": "evaluation", "metric": "accuracy", **s} for s in row["dev_history"]]
    return curves(events)


def seen(results: Results) -> Figure:
    """A frozen vision transformer, read in four ways."""
    split = "test" if "test" in results["summary"] else "dev"
    found = {k: v for k, v in results["summary"][split].items() if isinstance(v, dict)}
    return dots({"images": {name: entry["accuracy"] for name, entry in found.items()}})


FIGURES: dict[str, tuple[str, Callable[[Results], Figure]]] = {
    "sentiment": ("compare-sst2-smollm2-135m", compared),
    "maths": ("compare-svamp-equations-smollm2-135m", compared),
    "causal": ("compare-causal-judgement-smollm2-135m", compared),
    "compress": ("compress", compressed),
    "policy": ("policy", asked),
    "tasks": ("tasks", together),
    "reward": ("reward-svamp", rewarded),
    "vision": ("vision", seen),
}
