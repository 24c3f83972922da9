"""What a recipe will take, before anything is spent."""

from embedgrad.experiments.plan.plan import plan
from embedgrad.experiments.plan.suggestions import Budget

__all__ = ["Budget", "plan"]
