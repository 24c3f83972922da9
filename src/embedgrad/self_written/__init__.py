"""What the model is trained to write, its own solutions included."""

from __future__ import annotations

from embedgrad.self_written.sampling import training_examples
from embedgrad.self_written.source import (
    Solutions,
    refuse_inside,
    source_of,
    source_problems,
    training_for,
)
from embedgrad.self_written.store import Solved, Store

__all__ = [
    "Solutions",
    "Solved",
    "Store",
    "refuse_inside",
    "source_of",
    "source_problems",
    "training_examples",
    "training_for",
]
