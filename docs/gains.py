"""The README's picture: text prompt -> refined prompt, for every measured comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measured

from embedgrad.report.figures.theme import LIGHT, image, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLACE = "docs/gains.svg"
WIDTH, ROW_HEIGHT = 880, 34  # SVG units
NAMES, GAINS = -3, 103  # x of the texts on either side, in points of accuracy
TASKS = {  # results file -> task, and what is special about it
    "demo-smollm2-135m": ("Movie snippets (demo)", ""),
    "sst2-smollm2-135m": ("SST-2", "prompt before the review"),
    "sst2-after-smollm2-135m": ("SST-2", "prompt after the review"),
    **{
        f"sst2-{rows}-rows-smollm2-135m": ("SST-2", f"{rows:,} training rows, larger steps")
        for rows in (32, 100, 256, 1000)
    },
    "imdb-smollm2-135m": ("IMDb", ""),
    "operation-smollm2-135m": ("SVAMP", "which operation solves it"),
    "causal-judgement-smollm2-135m": ("Causal judgement", "split by story"),
    "causal-judgement-random-split-smollm2-135m": ("Causal judgement", "random split"),
    "svamp-smollm2-135m": ("SVAMP", "trained on answers"),
    "svamp-equations-smollm2-135m": ("SVAMP", "trained on equations"),
    "svamp-equations-radius-0.6-smollm2-135m": ("SVAMP", "on equations, larger steps"),
    "svamp-self-written-smollm2-135m": ("SVAMP", "trained on own solutions"),
    "gsm8k-qwen2.5-coder-0.5b": ("GSM8K", "trained on human solutions"),
    "gsm8k-self-written-qwen2.5-coder-0.5b": ("GSM8K", "trained on own solutions"),
}


def drawing(root: Path) -> str | None:
    """An SVG with a row for each comparison, largest gain first; None where none is measured."""
    rows = []
    for path in sorted((root / measured.FOLDER).glob("compare-*.json")):
        methods = {m["method"]: m for m in json.loads(path.read_text("utf-8"))["methods"]}
        if {"text", "embedgrad"} <= set(methods):
            name = path.stem.removeprefix("compare-")
            rows.append((name, methods["text"]["accuracy"], methods["embedgrad"]))
    if not rows:
        return None
    rows.sort(key=lambda row: -row[2]["difference"])
    with style():
        figure = new_figure(WIDTH, ROW_HEIGHT * len(rows) + 66)
        axes = figure.subplots()
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        for y, (name, text, refined) in enumerate(rows):
            _row(axes, y, name, text, refined)
        axes.set(xlim=(0, 100), ylim=(len(rows) - 0.4, -1.3), yticks=[])
        axes.set_xticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)])
        _text(axes, NAMES, -0.9, "accuracy on held-out rows", LIGHT["ink"], ha="right")
        axes.plot([0.8], [-0.9], "o", **_mark(LIGHT["text"], 8))
        _text(axes, 2.5, -0.9, "text prompt", LIGHT["ink"])
        axes.plot([24.8], [-0.9], "D", **_mark(LIGHT["refined"]))
        _text(axes, 26.5, -0.9, "refined prompt", LIGHT["ink"])
        _text(axes, GAINS, -0.9, "gain in points (95 % interval)", LIGHT["ink"])
        figure.get_layout_engine().set(w_pad=0.16, h_pad=0.12)
    return image(figure, "svg").decode()


def _row(axes: Axes, y: int, name: str, text: float, refined: Mapping[str, Any]) -> None:
    before, after = 100 * text, 100 * refined["accuracy"]
    low, high = (100 * edge for edge in refined["difference_interval"])
    reliable = refined["verdict"] in ("improved", "worse")
    color = LIGHT["muted"]
    if reliable:
        color = LIGHT["refined"] if refined["difference"] > 0 else LIGHT["wrong"]
    axes.plot([before, after], [y, y], color=color, linewidth=7, alpha=0.3, solid_capstyle="butt")
    axes.plot([before + low, before + high], [y, y], color=color, linewidth=1.4)
    axes.plot([before], [y], "o", **_mark(LIGHT["text"], 8))
    axes.plot([after], [y], "D", **_mark(color))
    task, special = TASKS.get(name, (name, ""))
    _text(axes, NAMES, y - 0.16 * bool(special), task, LIGHT["ink"], ha="right")
    _text(axes, NAMES, y + 0.24, special, LIGHT["muted"], ha="right", fontsize=8.5)
    gain = f"{after - before:+.1f}  ({low:+.1f} to {high:+.1f})"
    if after == before and low == high == 0:
        gain = "0  (kept the text prompt)"
    _text(axes, GAINS, y, gain, color, fontweight="bold" if reliable else "normal")


def _mark(color: str, size: float = 6.5) -> dict[str, Any]:
    return {"color": color, "markersize": size, "clip_on": False}


def _text(axes: Axes, x: float, y: float, text: str, color: str, **options: Any) -> None:
    axes.text(x, y, text, **{"color": color, "va": "center", "clip_on": False, **options})
