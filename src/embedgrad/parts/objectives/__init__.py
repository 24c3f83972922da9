"""What better means: one loss per example, and how they become one number."""

from embedgrad.parts.objectives.base import Objective
from embedgrad.parts.objectives.cross_entropy import CrossEntropy

OBJECTIVES: dict[str, type[Objective]] = {
    "cross_entropy": CrossEntropy,
}

__all__ = ["OBJECTIVES", "CrossEntropy", "Objective"]
