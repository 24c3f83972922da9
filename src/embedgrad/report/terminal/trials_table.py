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
    more = [name for name in result["objectives"] if name not in ("accuracy", "log_loss")]
    columns = ("trial", "dev accuracy", "log-loss", *more, "settings")
    table = new_table(*columns, left=("settings",))
    for trial in result["trials"][:SHOWN]:
        given = {name: trial[name] for name in result["settings"]}
        listed = [f"{n}={f'{v:.4g}' if isinstance(v, float) else v}" for n, v in given.items()]
        listed += ["(stopped early)"] if trial["pruned"] else []
        loss = trial["dev"]["log_loss"]
        scores = [percent(trial["dev"]["accuracy"]), "-" if loss is None else f"{loss:.3f}"]
        others = [trial["values"][name] for name in more]
        scores += ["-" if value is None else f"{value:.4g}" for value in others]
        settings = Text(visible(" ".join(listed)), overflow="fold")
        table.add_row(str(trial["trial"] + 1), *scores, settings)
    judged = " and ".join(name.replace("_", "-") for name in result["objectives"])
    said = f"{len(result['trials'])} trials by dev {judged}; the best"
    return Group(table, sentence(f"{said} recipe is {result['recipe']}"))
