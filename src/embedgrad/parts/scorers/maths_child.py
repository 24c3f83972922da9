r"""Compare two maths answers with math-verify, in the sandbox.

Only the sandbox imports this file. math-verify reads the last \boxed{...} of a text (adjacent ones
as a list), else its last formula in $...$, \(...\) or \[...\], else its last number. Other answers
are put into a box for it:

    #### 18                 the line of a worked solution that holds its result: "18"
    y + x                   a bare formula, as data sets give their answers: \boxed{y + x}
    Evelyn                  a word or three: \boxed{\text{Evelyn}}
"""

from __future__ import annotations

import logging
import re
from contextlib import suppress

from math_verify import parse, verify

LONGEST = 20_000  # characters from the end of a text, some ten times a long worked solution
MEMORY = 2**31  # bytes of addresses, some thirty times what sympy takes at first

_RESULT = re.compile(r"^[ \t]*####[ \t]*(?:\\?\$)?(.*)$", re.MULTILINE)
_MATHS = re.compile(r"\\boxed|\\\(|\\\[|(?<!\\)\$")
# Words, except those of formulas; "2xy" and "\alpha" have none.
_COMMAND = re.compile(r"\\(?:text|math|mbox|operator|begin|end)[a-z]*\s*\{[^{}]*\}|\\[A-Za-z]+")
_FORMULA_WORDS = "and|or|sqrt|pi|inf|infinity|log|ln|exp|(arc)?(sin|cos|tan|cot|sec|csc)"
_WORD = re.compile(rf"(?<![\w}}])(?!({_FORMULA_WORDS})(?![^\W\d_]))[^\W\d_]{{2,}}")


def equal(reply: str, answer: str) -> bool:
    """Whether the reply's final answer equals the answer's."""
    expected = _read(answer)
    return bool(expected and verify(expected, _read(reply), timeout_seconds=None))


def _read(text: str) -> list[object]:
    """All that math-verify extracts from a text: a sympy formula, and its source."""
    text = text[-LONGEST:].strip()
    results = [line for line in _RESULT.findall(text) if _is_bare(line)]
    formula = results[-1] if results else text
    if _is_bare(formula):
        formula = formula.strip().removesuffix(".")
        return _parse(rf"\boxed{{{formula}}}") or _parse(text)
    parsed = _parse(text)
    if not parsed and len(text.split()) <= 3 and not _MATHS.search(text):
        return _parse(rf"\boxed{{\text{{{text}}}}}")
    return parsed


def _parse(text: str) -> list[object]:
    return list(parse(text, parsing_timeout=None))


def _is_bare(text: str) -> bool:
    """Whether a text is only a formula, without marks around it."""
    if not text.strip() or "\n" in text or _MATHS.search(text):
        return False
    return not _WORD.search(_COMMAND.sub(" ", text))


# Both libraries log a complaint about every text that is no mathematics.
logging.disable(logging.CRITICAL)
with suppress(ImportError, ValueError, OSError):
    import resource

    # One tower of powers must not take the memory that a run of hours needs.
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
equal(r"\boxed{\frac{1}{2}}", "0.5")  # compiles the patterns and grammars
