"""Training time to a dev score, as a table and a picture, and the study of the step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import measured

from embedgrad.report.figures.theme import LIGHT, image, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLACE = "docs/quality.svg"
WIDTH, HEIGHT = 440, 280  # SVG units, of a data set
METHODS = {  # name, color, mark
    "embedgrad": ("EmbedGrad", "refined", "o"),
    "peft-prompt-tuning-text": ("prompt tuning, best rate", "heat", "s"),
    "peft-lora": ("LoRA, best rate", "text", "^"),
}
TASKS = {"sst2": "SST-2", "imdb": "IMDb"}

Row = dict[str, Any]


def table(root: Path) -> str:
    """Seconds to the best dev score of PEFT prompt tuning, by method."""
    lines = [("data", "seed", "target on dev", *(name for name, _, _ in METHODS.values()), "ratio")]
    for line in _results(root).get("summary", []):
        score = line["target"]
        target = f"{100 * score:.1f} %" if line["metric"] == "accuracy" else f"{score:.3f} nats"
        times = ("never" if (s := line["seconds"][m]) is None else f"{s:.0f} s" for m in METHODS)
        ratio = "" if line["ratio"] is None else f"**{line['ratio']:.1f}**"
        lines.append((_title(line["data"]), str(line["seed"]), target, *times, ratio))
    return measured.markdown(lines) if len(lines) > 1 else "Not measured yet.\n"


def drawing(root: Path) -> str | None:
    """An SVG with the dev score by seconds of training; None where nothing is measured."""
    rows = list(_results(root).get("rows", {}).values())
    sets = list(dict.fromkeys(row["data"] for row in rows))
    if not sets:
        return None
    with style():
        figure = new_figure(WIDTH * len(sets), HEIGHT)
        for axes, data in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets, strict=True):
            _curves(axes, [row for row in rows if row["data"] == data])
            axes.set_title(_title(data))
    return image(figure, "svg").decode()


def _curves(axes: Axes, rows: list[Row]) -> None:
    for method, (name, color, mark) in METHODS.items():
        same = [row for row in rows if row["method"] == method]
        if not same:
            continue
        best = max(same, key=lambda row: max(point["accuracy"] for point in row["curve"]))
        points = best["curve"]
        axes.plot(
            [point["seconds"] for point in points],
            [100 * point["accuracy"] for point in points],
            color=LIGHT[color],
            marker=mark,
            markersize=4,
            label=name,
        )
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xlim(left=0)
    ticks = (0, 10, 30, 100, 300, 1000, 3000)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], minor=False)
    axes.set_xlabel("seconds of training on one thread")
    axes.set_ylabel("dev accuracy, %")
    axes.legend(loc="lower right")


def _title(data: str) -> str:
    name, _, rest = data.partition(", ")
    return TASKS.get(name, name) + (f", {rest}" if rest else "")


def _results(root: Path) -> Row:
    return measured.read(root, "time-to-quality") or {}


def study(root: Path) -> str:
    """Dev scores by optimizer, rate and length, and the seconds of training."""
    rows = (measured.read(root, "step-study") or {"rows": {}})["rows"].values()
    names = ("data", "place", "optimizer", "rate", "seed", "steps", "batch", "seconds")
    lines = [(*names, "accuracy", "log-loss", "rows at the edge")]
    for row in sorted(rows, key=lambda row: (row["data"], row["place"])):
        end = row["curve"][-1]
        accuracy = end["last"]["accuracy"]  # of free text only the log-loss is measured
        lines.append(
            (
                *(row["data"], row["place"], row["optimizer"], f"{row['rate']:g}"),
                *(str(row["seed"]), str(end["step"]), str(row["batch"]), f"{end['seconds']:.0f}"),
                "" if accuracy is None else f"{100 * accuracy:.1f} %",
                f"{end['last']['log_loss']:.3f}",
                f"{100 * end['at_the_edge']:.0f} %",
            )
        )
    return measured.markdown(lines) if len(lines) > 1 else "Not measured yet.\n"
