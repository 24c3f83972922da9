r"""Scorer: final answers are mathematically equal, by math-verify.

    "so \boxed{\frac{1}{2}}"     0.5       numbers are compared to six decimal places
    "It is $y + x$."             x + y     but "y + x" among plain words is not found
    "\boxed{x = 5}"              5         the name of an unknown is no part of its value
    "50%"                        0.5, 50   math-verify takes a percentage for either
    "(1, 2)", "[1, 2]"           [1, 2)    the ends of an interval matter: both are wrong
    "\{2, 1\}"                   \{1, 2\}  the order in a set does not

Where a text has no mathematics, or comparing takes too long, only an identical text is right.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Annotated, final

from annotated_types import Gt, Le

from embedgrad.errors import RecipeError
from embedgrad.parts.scorers.base import Scorer
from embedgrad.prompt.sandbox import SandboxError, score


@final
@dataclass(frozen=True)
class Math(Scorer):
    """The reply's last boxed answer or formula equals the answer."""

    timeout: Annotated[float, Gt(0), Le(3600)] = 5.0
    """Time limit for one reply, in seconds; one that takes longer is wrong."""

    def score(self, reply: str, answer: str) -> float:
        _require_library()
        reply, answer = reply.strip(), answer.strip()
        if not reply or not answer:
            return 0.0
        return 1.0 if reply == answer else self._equal(reply, answer)

    def usable(self, answer: str) -> bool:
        _require_library()
        return self._equal(answer, answer) > 0

    def _equal(self, reply: str, answer: str) -> float:
        try:
            equal = "embedgrad.parts.scorers.maths_child:equal"
            return score(equal, reply, answer, seconds=self.timeout)
        except SandboxError as error:
            if not error.at_start:
                return 0.0
            problem = f"evaluation.scorer: math-verify cannot be used: {error.what}"
            raise RecipeError("recipe", [problem]) from None


@cache
def _require_library() -> None:
    for name in ("math_verify", "antlr4"):
        if find_spec(name) is None:
            problem = f"evaluation.scorer: 'math' needs the library {name.replace('_', '-')}"
            raise RecipeError("recipe", [f"{problem}; pip install 'embedgrad[math]'"])
