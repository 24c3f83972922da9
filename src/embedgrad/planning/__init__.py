"""What a recipe will take, before anything is spent."""

from embedgrad.planning.ahead import plan
from embedgrad.planning.knobs import Budget

__all__ = ["Budget", "plan"]
