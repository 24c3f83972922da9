"""Estimate a recipe's cost before running it."""

from embedgrad.experiments.plan.estimate import Budget
from embedgrad.experiments.plan.plan import plan

__all__ = ["Budget", "plan"]
