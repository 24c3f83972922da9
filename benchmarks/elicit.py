"""What there is to elicit before training, recipe by recipe: `benchmarks/results/elicit.json`.

    python -m benchmarks.elicit [NAME ...] [--data FOLDER]

A row is what `embedgrad plan --elicit` measures on dev rows, of the recipe and settings of one
comparison of `benchmarks/measurements.py`; docs/results.md draws it against the gains on test that
"gains" names. Test is not read. Rows that the results hold already are kept; a comparison
whose data or model is not there is left out. One thread.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measurements import COMPARISONS
from benchmarks.run import RESULTS, data_problem, local_settings, placeless, read, read_results
from embedgrad import EmbedgradError
from embedgrad.atomic_files import finite, write_json
from embedgrad.environment import versions
from embedgrad.experiments.baselines import Task
from embedgrad.experiments.plan.elicitation import elicit
from embedgrad.recipe.build import open_model, read_data
from embedgrad.recipe.recipe import Recipe
from embedgrad.report.terminal.progress import Progress

RESULT = RESULTS / "elicit.json"
FEW = {  # dev rows, where a recipe has more
    "compare-sst2-smollm2-135m": 100,
    "compare-sst2-after-smollm2-135m": 100,
    "compare-imdb-smollm2-135m": 40,
}
# The same model, prompt and task, trained otherwise: one reading serves all.
SAME = {
    f"compare-svamp-{how}-smollm2-135m": "compare-svamp-smollm2-135m"
    for how in ("equations", "self-written")
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(COMPARISONS))
    parser.add_argument("--data", type=Path, help="folder of local data")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(COMPARISONS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(COMPARISONS)}")
    torch.set_num_threads(1)
    for name in arguments.names or COMPARISONS:
        if name in SAME or name in stored()["rows"]:
            continue
        compared, data = COMPARISONS[name], arguments.data
        problem = data_problem(compared, data)
        if problem:
            print(f"{name} is left out: {problem}", flush=True)
            continue
        if data and compared.prepare:
            data = compared.prepare(data)
        local = local_settings(compared, data) if data else []
        few = [f"data.limit.dev={FEW[name]}"] if name in FEW else []
        settings = [*compared.settings, *few]
        began = time.perf_counter()
        try:
            row = measure(read(compared.recipe, [*settings, *local]))
        except EmbedgradError as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        results = stored()  # another process may have measured another row meanwhile
        results["rows"][name] = {
            **row,
            "gains": [name, *(other for other, same in SAME.items() if same == name)],
            "recipe": f"recipes/{compared.recipe}",
            "settings": [*settings, *placeless(local, data)],
            "seconds": time.perf_counter() - began,
            "versions": versions(),
        }
        write_json(RESULT, finite(results))
        print(f"{name}: {row['sentence']}", flush=True)


def stored() -> dict[str, Any]:
    """The content of the results file."""
    machine = {"cores": os.cpu_count(), "machine": platform.machine()}
    return read_results(RESULT, {"rows": {}, "machine": machine})


def measure(recipe: Recipe) -> dict[str, Any]:
    """The meter's reading on the recipe's dev rows."""
    with Progress() as report:
        splits = read_data(recipe)
        model = open_model(recipe, report)
        sequencer = model.sequencer(
            recipe.template,
            recipe.target,
            splits.train,
            merges=recipe.merges,
            truncate=recipe.data.truncate,
        )
        examples = (splits.train, splits.dev)
        train, dev = (
            sequencer.build([replace(e, solution=None) for e in part]) for part in examples
        )
        task = Task(recipe, model, sequencer, train, dev, report)
        return {**elicit(task, report), "model": model.info.name}


if __name__ == "__main__":
    main()
