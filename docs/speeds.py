"""Tables of measured speed, from `benchmarks/results/speed.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measured

LETTERS = "ABCDEFGHI"

Row = dict[str, Any]


def summary(root: Path, up: str) -> str:
    """One line per workload: ours against its best peer."""
    results = _results(root)
    table = [("workload", "times as fast as the best peer", "pairs", "ours", "peer", "peer's name")]
    for row in _best(results["rows"]):
        ours, peer = _seconds(row["our_seconds"]), _seconds(row["peer_seconds"])
        table.append((_name(row), _ratio(row), str(row["pairs"]), ours, peer, row["peer"]))
    source, machine = "", results.get("machine")
    if machine is not None:
        link = f"[speed.json]({up}{measured.FOLDER}/speed.json)"
        source = f"\nFrom {link}, on {machine['cores']} cores ({machine['processor']}).\n"
    return measured.markdown(table) + _missing(results) + source


def workers(root: Path, up: str) -> str:
    """A step of two workers against that of one, and what the model of it says."""
    results = measured.read(root, "workers")
    if results is None or "summary" not in results:
        return "Not measured yet: `workers`.\n"
    found = results["summary"]
    step, checkpoint = found["seconds"], found["checkpoint"]
    table = [
        ("", "measured"),
        ("a step of one process", _seconds(step["alone"])),
        ("of two processes that know nothing of each other", _seconds(step["apart"])),
        ("of two workers, with twice the rows", _seconds(step["together"])),
        ("efficiency", f"{found['efficiency']:.2f}"),
        ("the same by the model", f"{step['alone'] / found['modelled_seconds']:.2f}"),
        ("sent in a step", f"{found['bytes']:,} bytes, {found['bytes_beside_rows']:,} beside rows"),
        ("a checkpoint a minute", f"{100 * checkpoint['share']:.3f} % of the time"),
    ]
    link = f"[workers.json]({up}{measured.FOLDER}/workers.json)"
    return measured.markdown(table) + f"\nMedians, one thread a process; from {link}.\n"


def rows(root: Path) -> str:
    """Every row of the file."""
    results = _results(root)
    names = ("workload", "peer", "times as fast", "pairs", "ours", "the peer", "same result")
    table = [(*names, "memory", "of torch.mm", "note")]
    for row in results["rows"]:
        table.append(
            (
                _name(row),
                row["peer"],
                _ratio(row),
                str(row["pairs"]),
                _seconds(row["our_seconds"]),
                _seconds(row["peer_seconds"]),
                _same(row),
                _share(row["memory_ratio"]),
                _share(row["matmul_fraction"]),
                row["note"],
            )
        )
    return measured.markdown(table) + _missing(results) + _older(results)


def reached(root: Path) -> str:
    """What was demanded, and what was measured."""
    table = [("demand", "target", "measured", "met")]
    for line in _results(root).get("reached", []):
        number = "void" if line["measured"] is None else f"{line['measured']:.2f}"
        met = {True: "yes", False: "**no**", None: "not measured"}[line["met"]]
        number = "" if line["met"] is None else number
        table.append((line["demand"], f"{line['target']:g}", number, met))
    return measured.markdown(table)


def growth(root: Path) -> str:
    """Step time by the length of the query, and the seconds of a start."""
    results = _results(root)
    held, loading = results.get("growth"), results.get("loading")
    parts = []
    if held is None:
        parts.append("The growth with the query is not measured yet.\n")
    else:
        table = [("query", "ours", held["peer"])]
        columns = (held["queries"], held["our_seconds"], held["peer_seconds"])
        for query, ours, peer in zip(*columns, strict=True):
            table.append((f"{query} tokens", _seconds(ours), _seconds(peer)))
        table.append(("growth", f"{held['our_growth']:.2f}", f"{held['peer_growth']:.2f}"))
        parts.append(measured.markdown(table))
    if loading is None:
        parts.append("Loading is not measured yet.\n")
    else:
        parts.append(
            f"From the start of the process: {_seconds(loading['loaded_seconds'])} to the loaded "
            f"model, {_seconds(loading['first_step_starts_seconds'])} to the start of the first "
            f"training step, {_seconds(loading['first_step_done_seconds'])} to its end (medians of "
            f"{loading['starts']} starts{'' if loading.get('extras', True) else ', no extras'}).\n"
        )
    return "\n".join(parts)


def _results(root: Path) -> Row:
    return measured.read(root, "speed") or {"rows": []}


def _best(rows: Sequence[Row]) -> list[Row]:
    """The row of each workload's best peer; a void one counts as the best."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row["workload"], row["prefixes"]
        held = best.get(key)
        if held is None or (row["ratio"] or 0) < (held["ratio"] or 0):
            best[key] = row
    return list(best.values())


def _name(row: Row) -> str:
    return f"{row['workload']}: {row['title']}, prefixes {row['prefixes']}"


def _ratio(row: Row) -> str:
    if row["ratio"] is None:
        return "void"
    spread = f" ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})" if row["pairs"] > 1 else ""
    return f"**{row['ratio']:.2f}**{spread}"


def _same(row: Row) -> str:
    found = [row[name] for name in ("same_gradient", "same_result") if row[name] is not None]
    if found != [True]:
        return "**no**"
    if row["same_gradient"]:
        return f"loss {row['loss_difference']:.0e}, gradient {row['gradient_difference']:.0e}"
    difference = row["result_difference"]
    return "yes" if difference is None else f"{difference:.0e}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 100 else f"{seconds:.2f} s"


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.2f}"


def _missing(results: Row) -> str:
    held = {row["workload"] for row in results["rows"]}
    absent = [f"`{letter}`" for letter in LETTERS if letter not in held]
    return f"\nNot measured yet: {', '.join(absent)}.\n" if absent else ""


def _older(results: Row) -> str:
    digests = {row["code"] for row in results["rows"]}
    return "\nThe rows were not all measured with the same code.\n" if len(digests) > 1 else ""
