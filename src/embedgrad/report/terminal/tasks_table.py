"""Tasks that were trained together, as a terminal table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType

from embedgrad.formatting import duration, percent
from embedgrad.report.terminal.progress import ENDINGS
from embedgrad.report.terminal.tables import Row, new_table, sentence, verdict_word


def tasks_table(result: Row) -> RenderableType:
    """Text prompt against refined prompt for every task, their mean, and where the prompts are."""
    table = new_table()
    for name in ("task", "rows", "text", "refined", "difference (95 %)", "verdict"):
        table.add_column(name, justify="left" if name in ("task", "verdict") else "right")
    for name, task in result["tasks"].items():
        if "difference" not in task:
            continue
        scores = (percent(task[prompt]["accuracy"]) for prompt in ("text", "refined"))
        found = task["difference"]
        points = _points(found["accuracy"], found["interval"])
        table.add_row(name, str(task["test_rows"]), *scores, points, verdict_word(found))
    parts: list[RenderableType] = [table] if table.row_count else []
    if mean := result["mean"]:
        points = _points(mean["difference"], mean["interval"])
        table.add_row("mean", "", percent(mean["text"]), percent(mean["refined"]), points, "")
    train = result["train"]
    line = f"{train['steps']} steps in {duration(train['seconds'])} ({ENDINGS[train['ended']]})"
    places = ", ".join(task["artifact"] for task in result["tasks"].values())
    for text in (
        f"{line}, {result['trained_numbers']:,} trained numbers",
        f"refined prompts saved in {places}",
    ):
        parts.append(sentence(text))
    if not result["mean"]:
        parts.append(sentence("no test rows were scored", "bold"))
    return Group(*parts)


def _points(difference: float, interval: Sequence[float]) -> str:
    low, high = interval
    return f"{100 * difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
