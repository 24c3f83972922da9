"""Tasks trained together, or one after another, as a terminal table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType

from embedgrad.formatting import duration, percent, pluralize, visible
from embedgrad.report.terminal.progress import ENDINGS
from embedgrad.report.terminal.tables import Row, new_table, sentence, verdict_word


def tasks_table(result: Row) -> RenderableType:
    """Text prompt against refined prompt for every task, their mean, and where the prompts are."""
    columns = ("task", "rows", "text", "refined", "difference (95 %)", "verdict")
    table = new_table(*columns, left=("task", "verdict"))
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
    steps = pluralize(train["steps"], "step")
    line = f"{steps} in {duration(train['seconds'])} ({ENDINGS[train['ended']]})"
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


def continual_table(continual: Row) -> RenderableType:
    """A row per training, and the text prompt's and the separate prompts' accuracies below."""
    table, names = new_table(), [visible(name) for name in continual["tasks"]]
    table.add_column("accuracy on")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("mean", justify="right")
    for name, scores in rows_of(continual):
        table.add_row(name, *_cells(scores, len(names)))
    average, backward = continual["average"], 100 * continual["backward_transfer"]
    return Group(
        table,
        sentence(
            f"average accuracy {percent(average)}, backward transfer {backward:+.1f} points, with "
            f"one prompt of {continual['trained_numbers']:,} numbers, of which "
            f"{continual['directions']:,} directions are kept for the tasks so far"
        ),
    )


def rows_of(continual: Row) -> list[tuple[str, Sequence[float | None]]]:
    """What the table's rows hold, each with its name."""
    names = [visible(name) for name in continual["tasks"]]
    matrix = [
        (f"after {name}", scores) for name, scores in zip(names, continual["matrix"], strict=True)
    ]
    return [
        ("text prompt", continual["text"]),
        *matrix,
        ("one prompt per task", continual["separate"]),
    ]


def _cells(scores: Sequence[float | None], tasks: int) -> list[str]:
    known = [score for score in scores if score is not None]
    mean = percent(sum(known) / tasks) if len(known) == tasks else "-"
    cells = ["-" if score is None else percent(score) for score in scores]
    return [*cells, *["" for _ in range(tasks - len(cells))], mean]
