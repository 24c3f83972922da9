"""Training rows with suspicious labels, as a terminal table."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from embedgrad.formatting import percent, visible
from embedgrad.report.terminal.tables import Row, new_table, sentence

SHOWN = 15  # rows


def suspects_table(result: Row) -> RenderableType:
    """The first rows of the ranking, and what was written."""
    texts = ("row", "label", "the model says")
    table = new_table("", "row", "suspicion", "harm", "label", "the model says", left=texts)
    for row in result["worst"][:SHOWN]:
        said = "-"
        if "suggested" in row:
            said = f"{row['suggested']} ({percent(max(row['probabilities'].values()))})"
        numbers = f"{row['suspicion']:.2f}", f"{row['harm']:+.2f}"
        cells = (row["source"], *numbers, row["answer"], said)
        table.add_row(str(row["rank"]), *(Text(visible(c[:60]), overflow="fold") for c in cells))
    parts: list[RenderableType] = [table]
    if result["sources"]:
        weights = sorted(result["sources"].items(), key=lambda item: item[1])
        listed = ", ".join(f"{name} {weight:.2f}" for name, weight in weights[:SHOWN])
        parts.append(sentence(f"weights of sources, 1 at the start: {listed}"))
    files = result["files"]
    parts += [
        sentence(
            f"{result['flagged']} of {result['train_rows']} rows make dev worse the more they "
            f"count; {files['cleaned']} lacks {result['dropped']} of them, which are among the "
            f"{result['most']} most suspicious, and has {result['kept']} rows"
        ),
        sentence(f"all rows, worst first: {files['ranking']}; to look at them: {files['page']}"),
    ]
    return Group(*parts)
