"""When a generated reply is right: one file per part, and the table of their names.

Choices are not scored here: they are ranked by their log-probabilities, without generating.
"""

from __future__ import annotations

from embedgrad.scorers.base import Scorer
from embedgrad.scorers.contains import Contains
from embedgrad.scorers.exact import Exact
from embedgrad.scorers.number import Number, parse_number

SCORERS: dict[str, type[Scorer]] = {
    "contains": Contains,
    "exact": Exact,
    "number": Number,
}

__all__ = ["SCORERS", "Contains", "Exact", "Number", "Scorer", "parse_number"]
