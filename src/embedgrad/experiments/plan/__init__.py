"""What a recipe will take, before anything is spent."""

from embedgrad.experiments.plan.estimate import Budget
from embedgrad.experiments.plan.plan import plan

__all__ = ["Budget", "plan"]
