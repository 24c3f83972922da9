"""What serving costs and what survives it, from `benchmarks/results/`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import measured


def cost(root: Path, up: str) -> str:
    """A refined query beside a text query, in llama.cpp."""
    results = measured.read(root, "serving")
    if results is None:
        return "Not measured yet: `serving`.\n"
    low, high = results["ratio"]["interval"]
    table = [("a query of", "tokens of the prompt", "mean time", "of it in the engine", "file")]
    for name, called in (("text", "the text prompt"), ("refined", "the refined prompt")):
        seconds, engine = results["seconds"][name], results["engine_seconds"][name]
        table.append(
            (
                called,
                f"{results['tokens'][name]:.1f}",
                f"{1000 * seconds:.0f} ms",
                f"{1000 * engine:.0f} ms",
                measured.size(results["file_bytes"][name]),
            )
        )
    return (
        measured.markdown(table)
        + f"\nRefined takes {results['ratio']['mean']:.3f} times as long (95 % interval "
        f"{low:.3f} to {high:.3f}; {results['pairs']} pairs in turns, prompt cache off, "
        f"{results['threads']} thread of a busy machine), "
        f"from [serving.json]({up}{measured.FOLDER}/serving.json).\n"
    )


def parity(root: Path, up: str) -> str:
    """Accuracy of both prompts wherever they were served."""
    results = measured.read(root, "parity")
    if results is None:
        return "Not measured yet: `parity`.\n"
    table = [("task", "answers", "served by", "text prompt", "refined prompt", "file")]
    for name, task in results["tasks"].items():
        for cell, found in task["cells"].items():
            table.append(
                (
                    name,
                    task.get("answers", ""),
                    cell,
                    _accuracy(found["text"]),
                    _accuracy(found["refined"]),
                    measured.size(found["bytes"]) if "bytes" in found else "",
                )
            )
    return (
        measured.markdown(table)
        + f"\nThe same {results['rows']} test rows in every line of a task, with 95 % intervals; "
        f"from [parity.json]({up}{measured.FOLDER}/parity.json).\n"
    )


def _accuracy(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{100 * found['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
