"""Prompts of `embedgrad map` with their scores, as a terminal table."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from embedgrad.formatting import percent, visible
from embedgrad.report.terminal.tables import Row, new_table, sentence

SHOWN = 20  # rows


def mapped_table(result: Row) -> RenderableType:
    """The first rows, those that failed before the others, and where all of them are."""
    table = new_table("row", "text", "refined", "", left=("row", ""))
    rows = sorted(result["rows"], key=lambda row: row["status"] == "finished")
    for row in rows[:SHOWN]:
        scores = [percent(row[name]) if name in row else "-" for name in ("text", "refined")]
        said = row.get("error") or row.get("verdict") or row["status"]
        table.add_row(row["name"], *scores, Text(visible(said), overflow="fold"))
    counts = f"{result['finished']} of {len(rows)} prompts finished, {result['failed']} failed"
    return Group(table, sentence(f"{counts}; all of them: {result['results']}"))
