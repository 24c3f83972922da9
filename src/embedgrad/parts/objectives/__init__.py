"""Objectives, one file each; register them in `__init__.py`."""

from embedgrad.parts.objectives.base import Objective, Sampling
from embedgrad.parts.objectives.cross_entropy import CrossEntropy
from embedgrad.parts.objectives.distill import Distill
from embedgrad.parts.objectives.reward import Reward

OBJECTIVES: dict[str, type[Objective]] = {
    "cross_entropy": CrossEntropy,
    "distill": Distill,
    "reward": Reward,
}

__all__ = ["OBJECTIVES", "CrossEntropy", "Distill", "Objective", "Reward", "Sampling"]
