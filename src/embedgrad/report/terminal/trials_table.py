"""Trials of `embedgrad tune`, best first, as a terminal table."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from embedgrad.formatting import percent, visible
from embedgrad.report.terminal.tables import Row, new_table, sentence

SHOWN = 10  # trials


def trials_table(result: Row) -> RenderableType:
    """The best trials with their settings and dev scores, and where the best recipe is."""
    if not result["trials"]:
        return sentence("no trial has finished")
    table = new_table()
    for name in ("trial", "dev accuracy", "log-loss", "settings"):
        table.add_column(name, justify="left" if name == "settings" else "right")
    for trial in result["trials"][:SHOWN]:
        given = {n: v for n, v in trial.items() if n not in ("trial", "dev", "pruned")}
        listed = [f"{n}={f'{v:.4g}' if isinstance(v, float) else v}" for n, v in given.items()]
        listed += ["(stopped early)"] if trial["pruned"] else []
        scores = percent(trial["dev"]["accuracy"]), f"{trial['dev']['log_loss']:.3f}"
        settings = Text(visible(" ".join(listed)), overflow="fold")
        table.add_row(str(trial["trial"] + 1), *scores, settings)
    said = f"{len(result['trials'])} trials by dev {result['metric'].replace('_', '-')}; the best"
    return Group(table, sentence(f"{said} recipe is {result['recipe']}"))
