"""Short runs of the loop on the tiny models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from embedgrad.evaluation.evaluator import Evaluation
from embedgrad.parts.optimizers import AdamW
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.optimize import optimize
from embedgrad.training.settings import Parts, Refinement, Training
from kit import Kit, kit

QUICK = Training(steps=6, batch_size=3)
FAST = Parts(optimizer=AdamW(learning_rate=0.1))
EVALUATION = Evaluation(batch_size=4, max_new_tokens=8)


def small(architecture: str = "llama", **options: Any) -> Kit:
    return kit(architecture, **{"rows": 12, "dtype": torch.float32, **options})


def train(
    made: Kit,
    training: Training = QUICK,
    dev: Sequence[TokenSequence] | None = None,
    **options: Any,
) -> Refinement:
    """Eight rows to train on, four others to choose by."""
    options = {"parts": FAST, "evaluation": EVALUATION, **options}
    dev = made.sequences[8:] if dev is None else dev
    return optimize(
        made.model, made.sequencer, made.sequences[:8], dev, training=training, **options
    )


def rows_at_evaluations(made: Kit, **options: Any) -> tuple[Refinement, dict[int, Tensor]]:
    """A run, and the rows at each of its evaluations by step."""
    rows = {0: made.start}
    parameterization = options.get("parts", FAST).parameterization

    def keep(checkpoint: Checkpoint) -> None:
        prompt = parameterization.prompt(checkpoint.theta, {"span": made.start})
        rows[checkpoint.step] = prompt["span"].detach().clone()

    return train(made, keep=keep, **options), rows
