"""A policy's scores beside a majority vote, as a terminal table."""

from __future__ import annotations

from rich.console import Group, RenderableType

from embedgrad.formatting import percent, visible, with_interval
from embedgrad.report.terminal.tables import Row, new_table, sentence, verdict


def policy_table(result: Row) -> RenderableType:
    """Scores and what they cost, the prompts' figures on dev rows, and the verdict."""
    rows = f"on {result['rows']} {result['split']} rows"
    table = new_table(rows, "accuracy", "calls", "tokens", left=(rows,))
    names = {"policy": "policy", "vote": "majority vote", "first": "first prompt alone"}
    for key, name in names.items():
        own = result[key]
        costs = (f"{own['calls']:.2f}", f"{own['tokens']:.0f}")
        table.add_row(name, with_interval(own["accuracy"], own["interval"]), *costs)
    told = result["predicted"]
    table.add_row("predicted", percent(told["accuracy"]), f"{told['calls']:.2f}", "")
    columns = ("asked on dev rows", "right", "accepts right", "accepts wrong", "threshold")
    prompts = new_table(*columns, left=columns[:1])
    for one in result["prompts"]:
        shares = (percent(one[n]) for n in ("right", "accepts_right", "accepts_wrong"))
        limit = "accepts none" if one["threshold"] is None else f"{one['threshold']:.3f}"
        prompts.add_row(visible(one["prompt"]), *shares, limit)
    own = result["policy"]
    right = "" if own["precision"] is None else f", {percent(own['precision'])} of them right"
    lines = [f"{percent(own['accepted'])} of the answers were accepted{right}; the others voted"]
    if all(one["threshold"] is None for one in result["prompts"]):
        lines.append("warning: on dev rows no score reaches the precision; lower it")
    if own["unanswered"]:
        lines.append(f"warning: the budget leaves {own['unanswered']} rows without an answer")
    lines.append(f"against the majority vote: {verdict(result['difference'])}")
    return Group(prompts, "", table, *map(sentence, lines))
