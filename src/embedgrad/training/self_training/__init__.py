"""Self-training: targets for free-answer tasks."""

from __future__ import annotations

from embedgrad.training.self_training.sampling import training_examples
from embedgrad.training.self_training.settings import (
    Solutions,
    refuse_inside,
    source_of,
    source_problems,
)
from embedgrad.training.self_training.store import SampledQuestion, Store

__all__ = [
    "SampledQuestion",
    "Solutions",
    "Store",
    "refuse_inside",
    "source_of",
    "source_problems",
    "training_examples",
]
