"""Objectives, one file each; register them in `__init__.py`."""

from embedgrad.parts.objectives.base import Objective, Sampling, State
from embedgrad.parts.objectives.cross_entropy import CrossEntropy
from embedgrad.parts.objectives.distill import Distill
from embedgrad.parts.objectives.owa import OWA
from embedgrad.parts.objectives.regret import Regret
from embedgrad.parts.objectives.reward import Reward

OBJECTIVES: dict[str, type[Objective]] = {
    "cross_entropy": CrossEntropy,
    "distill": Distill,
    "owa": OWA,
    "regret": Regret,
    "reward": Reward,
}

__all__ = [
    "OBJECTIVES",
    "OWA",
    "CrossEntropy",
    "Distill",
    "Objective",
    "Regret",
    "Reward",
    "Sampling",
    "State",
]
