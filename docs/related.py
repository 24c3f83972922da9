"""What the parts from related work did, from `benchmarks/results/`."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import measured


def fairness(root: Path, up: str) -> str:
    """Mean and worst-group accuracy by objective, on test rows if they were scored."""
    results = measured.read(root, "fairness")
    if results is None:
        return "Not measured yet: `fairness`.\n"
    split = "test" if "test" in results["summary"] else "dev"
    table = [("groups of", "objective", "accuracy", "worst group", "against the mean (95 %)")]
    for name, entry in results["summary"][split].items():
        data, variant = name.split(", ")
        change = "-"
        if over := entry.get("worst_over_mean"):
            low, high = (f"{100 * edge:+.1f}" for edge in over["interval"])
            change = f"{100 * over['difference']:+.1f} ({low} to {high})"
        scores = (f"{100 * entry['accuracy']:.1f} %", f"{100 * entry['worst']:.1f} %")
        table.append((data, f"{variant} ({len(entry['seeds'])})", *scores, change))
    about = f"on {split} rows, means over the seeds in brackets; the last column in points of the"
    return (
        measured.markdown(table)
        + f"\n{about} worst group, by a bootstrap of rows; {_link('fairness', up)}.\n"
    )


def triage(root: Path, up: str) -> str:
    """Regret of decisions by objective, on test rows if they were scored."""
    results = measured.read(root, "triage")
    if results is None:
        return "Not measured yet: `triage`.\n"
    split = "test" if "test" in results["summary"] else "dev"
    table = [("trained by", "seeds", "regret", "against cross-entropy (95 %)")]
    for name, entry in results["summary"][split].items():
        change = "-"
        if over := entry.get("over_cross_entropy"):
            low, high = (f"{edge:+.2f}" for edge in over["interval"])
            change = f"{over['difference']:+.2f} ({low} to {high})"
        table.append((name, f"{len(entry['seeds'])}", f"{entry['regret']:.2f}", change))
    about = f"per decision of 8 {split} reviews, by a bootstrap of reviews and seeds"
    return measured.markdown(table) + f"\n{about}; {_link('triage', up)}.\n"


def tasks(root: Path, up: str) -> str:
    """Gains of six tasks by parameterization, against prompts that are trained separately."""
    rows = _rows(root, "tasks")
    if not rows:
        return "Not measured yet: `tasks`.\n"
    runs: dict[str, list[dict[str, Any]]] = {}
    for name, row in rows.items():
        runs.setdefault(name.partition(",")[0], []).append(row)
    separate = runs.get("separate", [])
    table = [("trained", "numbers", "of the separate", "text", "refined", "gain", "of it", "seeds")]
    for variant, own in runs.items():
        numbers, gain = own[0]["trained_numbers"], fmean(row["mean_gain"] for row in own)
        shares = ("", "")
        if separate:
            of_numbers = numbers / separate[0]["trained_numbers"]
            of_gain = gain / fmean(row["mean_gain"] for row in separate)
            shares = (f"{100 * of_numbers:.0f} %", f"{100 * of_gain:.0f} %")
        text, refined = (
            fmean(task[prompt] for row in own for task in row["tasks"].values())
            for prompt in ("text", "refined")
        )
        scores = (f"{100 * text:.1f} %", f"{100 * refined:.1f} %", f"{100 * gain:+.1f}")
        table.append((variant, f"{numbers:,}", shares[0], *scores, shares[1], str(len(own))))
    return (
        measured.markdown(table)
        + f"\nMeans over tasks and seeds on dev rows, {_link('tasks', up)}.\n"
    )


def continual(root: Path, up: str) -> str:
    """Average accuracy, backward transfer and learned accuracy by way of going on."""
    results = measured.read(root, "continual")
    if not results or not results.get("rows"):
        return "Not measured yet: `continual`.\n"
    table = [("variant", "rows", "accuracy at the end", "when learned", "backward transfer")]
    for variant, entry in results["summary"].items():
        average, learned = (f"{100 * entry[name]:.1f} %" for name in ("average", "learned"))
        backward = f"{100 * entry['backward_transfer']:+.1f}"
        table.append((variant, str(entry["rows"]), average, learned, backward))
    (split,) = {row["split"] for row in results["rows"].values()}
    about = f"Four tasks in turn, means over orders on {split} rows"
    return measured.markdown(table) + f"\n{about}, {_link('continual', up)}.\n"


def masked_thought(root: Path, up: str) -> str:
    """Dev accuracy and log-loss by noise and rate."""
    rows = _rows(root, "masked-thought")
    runs: dict[str, list[dict[str, Any]]] = {}
    for name, row in rows.items():
        if not name.endswith("quick"):
            runs.setdefault(name.partition(",")[0], []).append(row)
    if not runs:
        return "Not measured yet: `masked-thought`.\n"
    table = [("noise and rate", "accuracy", "log-loss of the solutions", "seeds")]
    for cell, own in runs.items():
        accuracy, loss = (
            fmean(row["dev"][name] for row in own) for name in ("accuracy", "log_loss")
        )
        table.append((cell, f"{100 * accuracy:.1f} %", f"{loss:.3f}", str(len(own))))
    return measured.markdown(table) + f"\nMeans on dev rows, {_link('masked-thought', up)}.\n"


def context(root: Path, up: str) -> str:
    """Dev accuracy with 30 % flipped labels by context transform."""
    found = (measured.read(root, "context") or {}).get("summary")
    if not found:
        return "Not measured yet: `context`.\n"
    table = [("transform", "accuracy", "log-loss", "seeds")]
    for variant, entry in found.items():
        scores = (f"{100 * entry['accuracy']:.1f} %", f"{entry['log_loss']:.3f}")
        table.append((variant, *scores, str(entry["seeds"])))
    return (
        measured.markdown(table)
        + f"\nSST-2 with 30 % flipped labels, means over seeds of the last rows on dev rows, "
        f"{_link('context', up)}.\n"
    )


def large_batch(root: Path, up: str) -> str:
    """Steps, gradients and seconds to a dev loss by optimizer."""
    results = measured.read(root, "large-batch") or {}
    found = [e for e in results.get("summary", ()) if not e["row"].endswith("quick")]
    if not found:
        return "Not measured yet: `large-batch`.\n"
    table = [("optimizer", "dev loss to reach", "steps", "gradients", "seconds")]
    for entry in found:
        reached = entry["reached"] or {"steps": "not reached", "gradients": "", "seconds": None}
        seconds = "" if reached["seconds"] is None else f"{reached['seconds']:.0f}"
        name = entry["row"].partition(", seed")[0]
        steps = (str(reached["steps"]), str(reached["gradients"]))
        table.append((name, f"{entry['target']:.3f}", *steps, seconds))
    return measured.markdown(table) + f"\nOne seed, on one thread, {_link('large-batch', up)}.\n"


def clean(root: Path, up: str) -> str:
    """How well each ranking finds flipped labels, and what leaving rows out gains."""
    results = measured.read(root, "clean")
    if not results or not results.get("rows"):
        return "Not measured yet: `clean`.\n"
    table = [("ranked by", "AUC", "over loss ranking", "accuracy", "over all rows", "seeds")]
    for method, entry in results["summary"].items():
        over = [
            f"{100 * fmean(entry[name]):+.1f}" if entry.get(name) else ""
            for name in ("auc_over_loss", "accuracy_over_none")
        ]
        auc = f"{entry['auc']:.3f}" if "auc" in entry else ""
        accuracy = f"{100 * entry['accuracy']:.1f} %"
        table.append((method, auc, over[0], accuracy, over[1], str(len(entry["seeds"]))))
    about = "SST-2 with 30 % flipped labels, means over seeds on test rows"
    return measured.markdown(table) + f"\n{about}, {_link('clean', up)}.\n"


def vision(root: Path, up: str) -> str:
    """Accuracy and saved activations of queries, against prompting among the tokens."""
    results = measured.read(root, "vision")
    if not results or not results.get("rows"):
        return "Not measured yet: `vision`.\n"
    split = "test" if "test" in results["summary"] else "dev"
    table = [("trained", "accuracy", "against in sequence (95 %)", "saved activations", "numbers")]
    summary = dict(results["summary"][split])
    ratio = summary.pop("saved_ratio", None)
    for variant, entry in summary.items():
        change = "-"
        if over := entry.get("over_in_sequence"):
            low, high = (f"{100 * edge:+.1f}" for edge in over["interval"])
            change = f"{100 * over['difference']:+.1f} ({low} to {high})"
        size = f"{entry['saved_bytes'] / 2**20:.1f} MiB" if "saved_bytes" in entry else "-"
        numbers = f"{entry['trained_numbers']:,.0f}" if "trained_numbers" in entry else "0"
        accuracy = f"{100 * entry['accuracy']:.1f} % ({len(entry['seeds'])})"
        table.append((variant, accuracy, change, size, numbers))
    about = f"On {split} images, means over the seeds in brackets; activations for a batch of 32"
    about += f" ({ratio:.2f} of those in sequence)" if ratio else ""
    return measured.markdown(table) + f"\n{about}, {_link('vision', up)}.\n"


def policy(root: Path, up: str) -> str:
    """Accuracy and tokens of a policy by precision, beside the vote and the first prompt."""
    rows = _rows(root, "policy")
    if not rows:
        return "Not measured yet: `policy`.\n"
    heads = ("asked", "accuracy", "predicted", "calls", "predicted", "tokens", "against the vote")
    table = [("task", *heads)]
    for name, row in rows.items():
        chosen = row["chosen"]
        low, high = (f"{100 * edge:+.1f}" for edge in chosen["difference"]["interval"])
        change = f"{100 * chosen['difference']['accuracy']:+.1f} ({low} to {high})"
        shown = {point["calls"]: point for point in reversed(row["curve"])}
        for asked, own in (
            ("first prompt", chosen["first"]),
            *((f"policy {p['precision']}", p) for p in reversed(shown.values()) if p["calls"] > 1),
            ("majority vote", chosen["vote"]),
        ):
            told, mine = own.get("predicted"), own.get("precision") == chosen["precision"]
            accuracy, calls = f"{100 * own['accuracy']:.1f} %", f"{own['calls']:.2f}"
            expected = (
                (f"{100 * told['accuracy']:.1f} %", f"{told['calls']:.2f}") if told else ("",) * 2
            )
            costs = (accuracy, expected[0], calls, expected[1], f"{own['tokens']:.0f}")
            table.append((name, asked, *costs, change if mine else ""))
    about = (
        "Means over test rows; the numbers behind `policy` are precisions, of which dev rows chose "
        "the one that is compared with the vote, in points with a bootstrap interval (95 %)"
    )
    return measured.markdown(table) + f"\n{about}; {_link('policy', up)}.\n"


def part_cost(root: Path, up: str) -> str:
    """What each part costs a training step, as the ratio of processor seconds on and off."""
    rows = _rows(root, "part-cost")
    if not rows:
        return "Not measured yet: `part-cost`.\n"
    table = [("part", "time of a step", "quartiles", "gradients a step")]
    for name, row in rows.items():
        low, high = row["quartiles"]
        change = f"{100 * (row['ratio'] - 1):+.1f} %"
        table.append((name, change, f"{low:.3f} to {high:.3f}", str(row["gradients"])))
    return measured.markdown(table) + f"\nFor each gradient, {_link('part-cost', up)}.\n"


def _rows(root: Path, name: str) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = (measured.read(root, name) or {"rows": {}})["rows"]
    return rows


def _link(name: str, up: str) -> str:
    return f"from [{name}.json]({up}{measured.FOLDER}/{name}.json)"
