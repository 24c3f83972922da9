"""Scorers, is a generated reply right? Register them here.

Choices need no scorer: they are ranked by their log-probabilities, without generating.
"""

from __future__ import annotations

from embedgrad.parts.scorers.base import Scorer
from embedgrad.parts.scorers.contains import Contains
from embedgrad.parts.scorers.exact import Exact
from embedgrad.parts.scorers.function import DecoratedFunction, SandboxedFunction, scorer
from embedgrad.parts.scorers.maths import Math
from embedgrad.parts.scorers.number import Number, parse_number

SCORERS: dict[str, type[Scorer]] = {
    "callable": SandboxedFunction,
    "contains": Contains,
    "exact": Exact,
    "math": Math,
    "number": Number,
}


def name_of(scorer: Scorer) -> str:
    """The name of a scorer's kind in a recipe."""
    names = (name for name, cls in SCORERS.items() if type(scorer) is cls)
    return next(names, type(scorer).__name__)


__all__ = [
    "SCORERS",
    "Contains",
    "DecoratedFunction",
    "Exact",
    "Math",
    "Number",
    "SandboxedFunction",
    "Scorer",
    "name_of",
    "parse_number",
    "scorer",
]
