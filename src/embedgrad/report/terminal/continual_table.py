"""Tasks that share a prompt, as a terminal table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType

from embedgrad.formatting import percent, visible
from embedgrad.report.terminal.tables import Row, new_table, sentence


def continual_table(continual: Row) -> RenderableType:
    """A row per training, and the text prompt's and the separate prompts' accuracies below."""
    table = new_table()
    names = [visible(name) for name in continual["tasks"]]
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
