"""Both prompts' scores by group as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from embedgrad.formatting import visible, with_interval

Row = Mapping[str, Any]


def groups_table(groups: Row) -> Table:
    """A line per group of a `GroupComparison`."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(Text(visible(groups["column"])), overflow="fold")
    for name in ("rows", "text prompt", "refined prompt"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("verdict", overflow="fold")
    lines = zip(groups["text"], groups["refined"], groups["verdicts"], strict=True)
    for text, refined, word in lines:
        cells = (
            with_interval(scores["accuracy"], scores["interval"]) for scores in (text, refined)
        )
        table.add_row(Text(visible(text["group"])), str(text["rows"]), *cells, word)
    return table


def describe_worst(groups: Row) -> str:
    """The group that is worst off with either prompt, with its interval."""
    accuracies = (
        f"{with_interval(score['accuracy'], score['interval'])} with the {name} prompt "
        f"({score['group']})"
        for name, score in groups["worst"].items()
    )
    return f"worst group: {', '.join(accuracies)}"
