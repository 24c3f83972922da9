"""Where the prompt stands: the same words in every place, trained briefly and scored on dev.

    python -m benchmarks.places --data FOLDER [--tasks sst2 demo ...] [--seeds 0 1 2]

Every row is a short training of one recipe with the span in one place: the dev scores of the text
prompt and of the best rows, the number of rows, and the time of a step (one thread). Test is not
read. `--data` is a folder with sst2/, amazon_multidomain/ and imdb/. Rows in
`benchmarks/results/places.json` are not measured again; delete the file to do so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import embedgrad as eg
from benchmarks.measurements import ROOT, files
from benchmarks.run import read_results
from embedgrad.atomic_files import write_json
from embedgrad.environment import versions
from embedgrad.events import quiet
from embedgrad.experiments.choose_place import put_at
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.prefix_cache import PrefixCache
from embedgrad.prompt.place import PLACES
from embedgrad.recipe.build import open_model, prepare

RESULT = ROOT / "benchmarks" / "results" / "places.json"
# At this rate few steps reach what the default rate reaches in many (the demo's dev rows).
SETTINGS = [
    "optimizer.learning_rate=0.1",
    "training.steps=16",
    "training.evaluate_every=16",
    "training.batch_size=8",
    "data.limit.train=128",
    "data.limit.dev=100",
]
SMALL = ["data.limit.train=64", "data.limit.dev=60"]
GROUPS = "Which product is this review about: books, dvd, electronics or kitchen? One word:"
# A task by name: its recipe, and what replaces the data, with {data} for --data.
TASKS = {
    "sst2": ("sst2", files("sst2")),
    "demo": ("demo", ["data.limit.test=1"]),
    "amazon-groups": (
        "sst2",
        [
            *files("amazon_multidomain"),
            'data.truncate="text"',
            'data.answer="domain"',
            'target.choices=["books", "dvd", "electronics", "kitchen"]',
            f'template.system="[[{GROUPS}]]"',
        ],
    ),
    "imdb": ("imdb", [*files("imdb"), *SMALL, 'data.answer="label_text"', "data.labels="]),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = stored()
    model: LanguageModel | None = None
    for seed in given.seeds:
        for task in given.tasks:
            for place in PLACES:
                key = {"task": task, "place": place, "seed": seed}
                if any(key.items() <= row.items() for row in found["rows"]):
                    continue
                recipe = recipe_of(task, given.data, seed)
                model = model or open_model(recipe, quiet)
                row = {**key, **measure(recipe, place, model)}
                found["rows"].append(row)
                write_json(RESULT, found)
                print(json.dumps(row), flush=True)


def stored() -> dict[str, Any]:
    """The results so far."""
    command = "python -m benchmarks.places --data DATA"
    facts = {"threads": 1, "cores": os.cpu_count(), "versions": versions()}
    return read_results(RESULT, {"command": command, "settings": SETTINGS, **facts, "rows": []})


def recipe_of(task: str, data: Path, seed: int) -> eg.Recipe:
    """The task's recipe, its data from a folder, trained briefly."""
    name, settings = TASKS[task]
    settings = [*SETTINGS, f"training.seed={seed}", *(s.format(data=data) for s in settings)]
    return eg.Recipe.read(ROOT / "recipes" / f"{name}.toml", settings)


def measure(recipe: eg.Recipe, place: str, model: LanguageModel) -> dict[str, Any]:
    """A short training with the span in a place."""
    recipe = put_at(recipe, place)
    cached = model.with_prefix_cache(PrefixCache.on(model.device, "1.5 GiB"))
    ready = prepare(recipe, None, quiet, model=cached)
    seconds: list[float] = []

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            seconds.append(event["seconds"])

    done = eg.optimize(
        cached,
        ready.sequencer,
        ready.train,
        ready.dev,
        training=ready.training,
        parts=recipe.parts,
        evaluation=replace(recipe.evaluation, batch_size=16),
        report=watch,
    )
    if done.ended != "finished":
        raise SystemExit(f"{done.ended}: the row is not measured")
    return {
        "rows": len(ready.sequencer.prompt_ids),
        "template": list(recipe.template.as_dict()["messages"]),
        "train_rows": len(ready.train),
        "dev_rows": len(ready.dev),
        "steps": done.steps,
        "text": scores(done.best.history[:1]),
        "refined": scores([done.best.score]),
        "seconds_per_step": statistics.median(seconds[1:]),
        "fastest_step": min(seconds[1:]),
        "seconds": done.seconds,
    }


def scores(history: Sequence[dict[str, float]]) -> dict[str, float]:
    """Accuracy and log-loss of the first score."""
    return {name: history[0][name] for name in ("step", "accuracy", "log_loss")}


if __name__ == "__main__":
    main()
