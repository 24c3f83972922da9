"""Several methods on the same rows, judged by one evaluator and one test."""

from embedgrad.evaluation.verdict import Verdict, verdicts
from embedgrad.experiments.compare.compare import compare

__all__ = ["Verdict", "compare", "verdicts"]
