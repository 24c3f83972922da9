"""Worked examples in context against the same ones refined: five draws of k = 4 on two tasks.

    python -m benchmarks.demonstrations --data FOLDER [--model NAME] [--tasks ...] [--draws 0 1 ...]

Every row is a run whose text prompt is the few-shot prompt with the draw's demonstrations, scored
on test; draw -1 is the run without any. Runs are kept in runs/demonstrations/ and resume where they
stopped; rows in `benchmarks/results/demonstrations.json` are not measured again. `--data` is a
folder with sst2/ and amazon_multidomain/. Small models do worse with demonstrations than without:
the default is Qwen2.5-Coder-0.5B-Instruct, of which CONTRIBUTING.md says where it is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import embedgrad as eg
from benchmarks.measurements import ROOT
from benchmarks.places import TASKS
from benchmarks.run import read_results
from embedgrad.atomic_files import write_json
from embedgrad.environment import versions

RESULT = ROOT / "benchmarks" / "results" / "demonstrations.json"
K = 4
SETTINGS = [
    "training.steps=48",
    "training.evaluate_every=16",
    "data.limit.train=256",
    "data.limit.dev=150",
    "data.limit.test=400",
]


def main() -> None:
    """Read the command line and measure what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="qwen.gguf")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=["sst2", "amazon-groups"])
    parser.add_argument("--draws", nargs="*", type=int, default=[0, -1, 1, 2, 3, 4])
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = stored()
    for draw in given.draws:
        for task in given.tasks:
            key = {"task": task, "draw": draw, "model": Path(given.model).name}
            if any(key.items() <= row.items() for row in found["rows"]):
                continue
            row = {**key, **measure(task, given.data, given.model, draw)}
            found["rows"].append(row)
            write_json(RESULT, found)
            print(json.dumps(row), flush=True)


def stored() -> dict[str, Any]:
    """The results so far."""
    command = "python -m benchmarks.demonstrations --data DATA"
    beginning = {"command": command, "settings": SETTINGS, "versions": versions(), "rows": []}
    return read_results(RESULT, beginning)


def measure(task: str, data: Path, model: str, draw: int) -> dict[str, Any]:
    """A run with the demonstrations of a draw: in context, and refined."""
    name, settings = TASKS[task]
    shown = [f"demonstrations.k={K}", f"demonstrations.seed={draw}"] if draw >= 0 else []
    own = [*(s.format(data=data) for s in settings), *SETTINGS, *shown]
    own.append(f"model.name={json.dumps(model)}")
    recipe = eg.Recipe.read(ROOT / "recipes" / f"{name}.toml", own)
    out = ROOT / "runs" / "demonstrations" / f"{task}-{draw}-{Path(model).stem}"
    result = eg.run(recipe, out, resume=(out / "recipe.toml").is_file())
    if result["interrupted"]:
        raise SystemExit("interrupted: the row is not measured")
    kept = ("text", "refined", "difference", "test_rows", "train", "demonstrations", "threads")
    return {
        "k": recipe.demonstrations.k,
        "rows": len(result["tokens"]),
        **{name: dict(result)[name] for name in kept if name in result},
    }


if __name__ == "__main__":
    main()
