"""A comparison of methods as a table: for a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from embedgrad.formatting import duration, size, visible, with_interval
from embedgrad.report.terminal.tables import sentence

Entry = Mapping[str, Any]
# Together they are too wide for a terminal.
_SCORES = ("method", "accuracy (95 %)", "over seeds")
_GAINS = ("method", "difference (95 %)", "p (Holm)", "verdict")
_GROUPS = ("method", "worst group (95 %)", "group")
_COSTS = ("method", "numbers", "training", "tokens")


def methods_table(results: Entry) -> RenderableType:
    """A line per method, what is missing and why, and the verdict in words."""
    cells = [_cells(entry) for entry in results["methods"]]
    parts: list[RenderableType] = []
    tables = (_SCORES, _GAINS, *([_GROUPS] if _has_groups(results) else []), _COSTS)
    for columns in tables if cells else ():
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for name in columns:
            left = name in ("method", "verdict", "group")
            table.add_column(name, justify="left" if left else "right", overflow="fold")
        for row in cells:
            style = "bold" if row["verdict"] == "improved" else ""
            table.add_row(*(Text(row[name]) for name in columns), style=style)
        parts += [table, ""]
    parts += [sentence(text) for text in _sentences(results)]
    if any(entry["verdict"] is not None for entry in results["methods"]):
        parts.append(sentence(reliable_gain(results)[1], "bold"))
    return Group(*parts)


def methods_markdown(results: Entry) -> str:
    """The same for a file."""
    rows = [_cells(entry) for entry in results["methods"]]
    columns = [*_SCORES[:2], "difference (95 %)", "verdict", "over seeds", "p (Holm)"]
    columns += _GROUPS[1:] if _has_groups(results) else ()
    columns += [*_COSTS[1:], "stored"]
    lines = [columns, ["---"] * len(columns), *([row[name] for name in columns] for row in rows)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines) if rows else ""
    sentences = "".join(f"\n{visible(text)}\n" for text in _sentences(results))
    return f"{table}{sentences}"


def figure_svg(results: Entry) -> bytes | None:
    """The forest plot of differences; None without a method to compare."""
    if not any(entry["verdict"] is not None for entry in results["methods"]):
        return None
    from embedgrad.report.figures.comparison import forest
    from embedgrad.report.figures.theme import image

    return image(forest(results), "svg")


def reliable_gain(results: Entry) -> tuple[bool, str]:
    """Whether EmbedGrad improved (without it: any method), and the answer in words.

    Where a seed of EmbedGrad failed, no other has improved in its place.
    """
    if "embedgrad" in results["failed"]:
        return False, f"embedgrad failed: {results['failed']['embedgrad']}"
    judged = {e["method"]: e["verdict"] for e in results["methods"] if e["verdict"] is not None}
    if "embedgrad" in judged:
        gained = judged["embedgrad"] == "improved"
        than = "than" if judged["embedgrad"] == "worse" else "over"
        return gained, f"embedgrad: {judged['embedgrad']} {than} the text prompt"
    gained = "improved" in judged.values()
    improved = ", ".join(name for name, verdict in judged.items() if verdict == "improved")
    return gained, f"improved: {improved}" if gained else "no method has a reliable gain"


def describe_regrets(methods: Sequence[Entry]) -> list[str]:
    """What each method's decisions cost over the best ones, and the difference to the text's."""
    shown, decisions = [], 0
    for entry in methods:
        if regret := entry.get("regret"):
            low, high = regret["difference_interval"]
            change = f" ({regret['difference']:+.4g}, 95 % interval {low:+.4g} to {high:+.4g})"
            line = f"{entry['method']} {regret['mean']:.4g}"
            shown.append(line if entry["method"] == "text" else line + change)
            decisions = regret["decisions"]
    return [f"mean regret of {decisions} decisions: " + "; ".join(shown)] if shown else []


def _has_groups(results: Entry) -> bool:
    return any("worst_group" in entry for entry in results["methods"])


def _cells(entry: Entry) -> dict[str, str]:
    """A method's cells by column."""
    cells = {
        "method": entry["method"],
        "accuracy (95 %)": with_interval(entry["accuracy"], entry.get("interval")),
        "numbers": f"{entry['trained_numbers']:,}",
        "stored": size(entry["stored_bytes"]),
        "training": duration(entry["train_seconds"]),
        "tokens": f"{entry['extra_tokens']:+.0f}",
        **dict.fromkeys(("over seeds", "difference (95 %)", "p (Holm)", "verdict"), "-"),
    }
    if worst := entry.get("worst_group"):
        cells["worst group (95 %)"] = with_interval(worst["accuracy"], worst["interval"])
        cells["group"] = visible(worst["group"])
    if entry["runs"] > 1:
        cells["over seeds"] = f"{100 * entry['min']:.1f} to {100 * entry['max']:.1f}"
    if entry["verdict"] is not None:
        low, high = (f"{100 * edge:+.1f}" for edge in entry["difference_interval"])
        cells["difference (95 %)"] = f"{100 * entry['difference']:+.1f} ({low} to {high})"
        cells["p (Holm)"] = "< 0.001" if entry["p_holm"] < 0.001 else f"{entry['p_holm']:.3f}"
        cells["verdict"] = entry["verdict"]
    return cells


def _sentences(results: Entry) -> list[str]:
    """What the table does not say."""
    lines = []
    if results["methods"]:
        seeds = ", ".join(map(str, results["seeds"])) or "none"
        test = "McNemar's exact test for one seed, by flipped signs for several"
        if any(row.get("scores") for row in results["rows"]):  # graded, by a function
            test = "flipped signs"
        lines += [
            f"{results['test_rows']} test rows, seeds: {seeds}; differences in points to the text "
            f"prompt, by rows; p by {test}",
            "numbers: how many are trained; training: mean time; tokens: more per question than "
            "the text prompt takes",
        ]
        if "wrong_in_form" in results["methods"][0]:
            counts = (
                f"{e['method']} {e['wrong_in_form']:.0f} and {e['wrong_in_content']:.0f}"
                for e in results["methods"]
            )
            lines.append(
                "wrong answers that did not end or held no answer (form), and that said another "
                "one (content): " + "; ".join(counts)
            )
        sampled = [(e["method"], e["sampled"]) for e in results["methods"] if e.get("sampled")]
        if sampled:
            lines.append(
                f"mean over {sampled[0][1]['samples']} sampled answers a row: "
                + "; ".join(
                    f"{name} {with_interval(s['accuracy'], s['interval'])}" for name, s in sampled
                )
            )
        lines += describe_regrets(results["methods"])
        learned: dict[str, list[str]] = {}
        for row in results["rows"]:
            if said := row["settings"].get("learns"):
                learned.setdefault(said, []).append(row["method"])
        lines += [
            f"{', '.join(dict.fromkeys(names))}: trained on {said}"
            for said, names in learned.items()
        ]
        names = [entry["method"] for entry in results["methods"]]
        firsts = [n for n in names if n.startswith("peft-") and n != "peft-lora"]
        if firsts:
            lines.append(
                f"{', '.join(firsts)}: PEFT can only put the prompt first, so the span's words "
                "leave their place in the template"
            )
    for kind in ("skipped", "failed"):
        lines += [f"{name} {kind}: {reason}" for name, reason in results.get(kind, {}).items()]
    return lines
