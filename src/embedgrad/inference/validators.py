"""Validators: how far an answer is to be trusted, from 0 to 1."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from embedgrad.inference.policy import vote
from embedgrad.parts.scorers import Exact, Math, Number, Scorer

NO_EQUATION = 0.5  # there is nothing to compute again
_ALLOWED = "0123456789.,()+-*/x\u00d7\u00f7\u2212 $%"
_SPELLED = str.maketrans({"x": "*", "\u00d7": "*", "\u00f7": "/", "\u2212": "-"}) | str.maketrans(
    {",": None, "$": None, "%": "/100"}
)
_BULLET = re.compile(r"^\s*(?:[-*\u2022]|\d+[.)])\s+")
_STATED = re.compile(r"\s*\$?(-?\d[\d,]*(?:\.(\d+))?)(%?)")
_LONGEST = 200  # characters of an expression
_OPERATIONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def check(
    names: Sequence[str],
    texts: Sequence[str],
    scorer: Scorer | None,
    *,
    margin: float = 1.0,
    cut: bool = False,
    pattern: str | None = None,
) -> tuple[str, dict[str, float]]:
    """The answer that most of the texts give, and what each validator says of it.

    format       1 if the first text ended by itself, the pattern is in the answer, and the scorer
                 finds one in it
    arithmetic   see `check_arithmetic`
    agreement    the share of the texts that give it (Wang et al. 2022, self-consistency)
    margin       as given: what the model says of the first text
    """
    answer = vote([(text, 1.0) for text in texts], partial(alike, scorer))
    checks: dict[str, Callable[[], float]] = {
        "format": lambda: float(
            not cut
            and re.search(pattern or "", answer) is not None
            and not (scorer and scorer.is_unread(answer))
        ),
        "arithmetic": lambda: check_arithmetic(answer),
        "agreement": lambda: fmean(alike(scorer, text, answer) for text in texts),
        "margin": lambda: margin,
    }
    return answer, {name: checks[name]() for name in names}


def alike(scorer: Scorer | None, text: str, other: str) -> bool:
    """Whether two answers count as one: the same text, or the same value to a scorer of values."""
    if text == other or not isinstance(scorer, Exact | Number | Math):
        return text == other  # other scorers take answers of the data alone
    return scorer.score(text, other) == 1


def check_arithmetic(answer: str) -> float:
    """1 if all equations of an answer hold when computed again, 0 if not; without any 0.5.

    "3 * 4 = 12, so 12 - 5 = 7"    1      "7 / 2 = 4"       0      whole numbers are exact
    "<<48/2=24>>"                  1      "10 / 3 = 3.33"   1      decimals may be rounded
    """
    found = [holds for line in answer.splitlines() for holds in _equations(line)]
    return float(all(found)) if found else NO_EQUATION


def _equations(line: str) -> list[bool]:
    """Whether each equation of a line holds; what is no arithmetic is passed over."""
    left, *after = _BULLET.sub("", line).split("=")
    found = []
    for part in after:
        expression = left[len(left.rstrip(_ALLOWED)) :].lstrip(" .,)*/+%x\u00d7\u00f7")
        stated = _STATED.match(part)
        value = _compute(expression) if stated else None
        if stated and value is not None:
            number = float(stated[1].replace(",", "")) / (100 if stated[3] else 1)
            digits = len(stated[2] or "") + 2 * bool(stated[3])
            slack = 0.5 * 10.0**-digits if stated[2] else 0.0
            found.append(abs(value - number) <= slack + 1e-9 * max(1.0, abs(number)))
        left = part
    return found


def _compute(expression: str) -> float | None:
    """The value of an expression with at least one operation; None for anything else."""
    try:
        if len(expression) > _LONGEST:
            return None
        tree = ast.parse(expression.translate(_SPELLED).strip(), mode="eval").body
        return _value(tree) if isinstance(tree, ast.BinOp) else None
    except ZeroDivisionError:
        return math.nan
    except (SyntaxError, ValueError, OverflowError):
        return None


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return float(_OPERATIONS[type(node.op)](_value(node.left), _value(node.right)))
    raise ValueError("not plain arithmetic")
