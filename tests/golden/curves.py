"""Golden curves: what short trainings of tiny models give, number by number.

    make golden        writes curves.json anew

`tests/test_golden.py` compares. A change of these numbers is a decision: it gets a line in the
CHANGELOG, and the file is written anew in the same commit.

One training per architecture that the tests know, and two settings of each kind of part. Weights
come from integer arithmetic, so that they are the same bits on every platform.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import tiny
from embedgrad.evaluation.evaluator import Evaluation
from embedgrad.model.language_model import LanguageModel
from embedgrad.parts.objectives import CrossEntropy
from embedgrad.parts.optimizers import SGD, AdamW, Muon, Schedule
from embedgrad.parts.scorers import Contains, Exact
from embedgrad.parts.transforms import Clip
from embedgrad.prompt.sequence import Sequencer, Target
from embedgrad.prompt.template import Renderer
from embedgrad.prompt.trust_region import TrustRegion
from embedgrad.training.optimize import optimize
from embedgrad.training.settings import Parts, Training
from kit import DAY, LABELS, PLACEMENTS

FILE = Path(__file__).with_name("curves.json")
ROWS = 12  # of which the last four are dev
FREE = Target()
CHOICES = CrossEntropy(over="choices")  # of every case with choices that names no other

# Name -> what differs from the plain run: Llama, the span behind the review, default parts.
CASES: dict[str, dict[str, Any]] = {
    **{f"architecture {name}": {"architecture": name} for name in tiny.ARCHITECTURES},
    "place system": {"place": "system"},
    "place plain-start": {"place": "plain-start"},
    "objective over the answer": {"objective": CrossEntropy(over="answer")},
    "objective over the choices": {"objective": CHOICES},
    "objective over both": {"objective": CrossEntropy(over="both")},
    "optimizer adamw": {"optimizer": AdamW(learning_rate=0.1, beta2=0.9, weight_decay=0.1)},
    "optimizer muon": {"optimizer": Muon(learning_rate=0.1)},
    "optimizer sgd": {"optimizer": SGD(learning_rate=0.5)},
    "schedule linear": {"schedule": Schedule(warmup=0.5, shape="linear")},
    "schedule constant": {"schedule": Schedule(warmup=0.0, shape="constant")},
    "transforms clip": {"transforms": (Clip(max_norm=0.01),), "optimizer": SGD()},
    "transforms none": {"transforms": (), "optimizer": SGD()},
    "region ball": {"trust_region": TrustRegion(0.02)},
    "region cone": {"trust_region": TrustRegion(0.1, 0.9999)},
    "scorer exact": {"target": FREE, "scorer": Exact(), "answer": "is", "tokens": 1},
    "scorer contains": {"target": FREE, "scorer": Contains(), "answer": "the", "tokens": 8},
}


def train(
    architecture: str = "llama",
    place: str = "user-after",
    target: Target = LABELS,
    scorer: Exact | Contains = Exact(),
    answer: str | None = None,
    tokens: int = 4,
    **parts: Any,
) -> dict[str, Any]:
    """Losses, dev scores and final rows of six steps in float64 on one thread.

    `answer` takes the place of every example's own, `tokens` is the longest free answer.
    """
    if target.choices:
        parts = {"objective": CHOICES, **parts}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        loaded = tiny.loaded(architecture)
        fill(loaded.model)
        renderer = Renderer(PLACEMENTS[place], loaded.tokenizer, date=DAY)
        examples = tiny.reviews(ROWS)
        if answer is not None:
            examples = [dataclasses.replace(e, answer=answer) for e in examples]
        sequencer = Sequencer(renderer, loaded.tokenizer, target, rows=examples)
        sequences = sequencer.build(examples)
        events: list[dict[str, Any]] = []
        refined = optimize(
            LanguageModel(loaded),
            sequencer,
            sequences[:8],
            sequences[8:],
            training=Training(steps=6, batch_size=4),
            parts=Parts(**parts),
            evaluation=Evaluation(scorer=scorer, max_new_tokens=tokens, batch_size=4),
            report=events.append,
        )
    finally:
        torch.set_num_threads(threads)
    start = refined.prompt.start_rows
    prompt = Parts(**parts).parameterization.prompt(refined.checkpoint.theta, {"span": start})
    rows = prompt["span"].detach()
    assert rows.dtype == torch.float64
    return {
        "losses": [event["loss"] for event in events if event["event"] == "step"],
        "dev": refined.checkpoint.history,
        "best_step": refined.best.step,
        "rows_sha256": hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
        "rows": [rows[0, :3].tolist(), rows[-1, -3:].tolist()],
    }


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Weights of standard deviation 0.2 from a linear congruence, in order of their names."""
    start = 0
    for _, weight in sorted(model.named_parameters()):
        if weight.dim() > 1:
            index = torch.arange(start, start + weight.numel(), dtype=torch.int64)
            mixed = ((index * 2654435761 + 12345) % 2**32) >> 8
            mixed = ((mixed * 1103515245 + 54321) % 2**31) >> 7
            uniform = mixed.to(torch.float64) / 2**24 - 0.5
            weight.copy_((uniform * (0.2 * math.sqrt(12))).view_as(weight))
            start += weight.numel()


def this_platform() -> dict[str, str]:
    """What the last bits of a number depend on."""
    models = Path("/proc/cpuinfo")
    lines = models.read_text(encoding="utf-8").splitlines() if models.is_file() else []
    name = next((line for line in lines if line.startswith("model name")), platform.processor())
    return {
        "processor": name.partition(":")[2].strip() or name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def record(note: Callable[[str], None] = lambda line: None) -> None:
    """Train every case and write the file."""
    curves = {}
    for name, settings in CASES.items():
        curves[name] = train(**settings)
        note(f"{name}: loss {curves[name]['losses'][0]:.4f} to {curves[name]['losses'][-1]:.4f}")
    values = {"platform": this_platform(), "curves": curves}
    FILE.write_text(f"{json.dumps(values, indent=1)}\n", encoding="utf-8")


if __name__ == "__main__":
    record(print)
