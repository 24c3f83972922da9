"""Several methods on the same rows, judged by one evaluator and one test."""

from embedgrad.comparing.loop import compare
from embedgrad.comparing.verdict import Verdict, verdicts

__all__ = ["Verdict", "compare", "verdicts"]
