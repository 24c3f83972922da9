"""What a recipe will take, before anything is spent."""

from embedgrad.planning.knobs import Budget
from embedgrad.planning.plan import plan

__all__ = ["Budget", "plan"]
