"""Objectives, one file each; register them in `__init__.py`."""

from embedgrad.parts.objectives.base import Objective
from embedgrad.parts.objectives.cross_entropy import CrossEntropy
from embedgrad.parts.objectives.distill import Distill

OBJECTIVES: dict[str, type[Objective]] = {
    "cross_entropy": CrossEntropy,
    "distill": Distill,
}

__all__ = ["OBJECTIVES", "CrossEntropy", "Distill", "Objective"]
