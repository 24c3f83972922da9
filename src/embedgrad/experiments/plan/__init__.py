"""Estimate a recipe's cost before running it."""

from embedgrad.experiments.plan.estimate import Budget
from embedgrad.experiments.plan.plan import PlanResult, plan

__all__ = ["Budget", "PlanResult", "plan"]
