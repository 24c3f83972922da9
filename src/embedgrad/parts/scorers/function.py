"""Scorer: a user's Python function returns a score from 0 to 1.

It is called as function(reply, answer), with two texts, and must return True, False or a number
from 0 to 1 for every pair.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, final

from annotated_types import Gt, Le

from embedgrad.environment import cache_folder
from embedgrad.errors import RecipeError
from embedgrad.parts.scorers.base import Scorer
from embedgrad.prompt import sandbox, sandbox_child

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_SHOWN = 60  # characters of a reply in a message
_trusted = set[Path]()  # in this process: the cache may be read-only


class _FunctionScorer(Scorer):
    """What both kinds share: nothing is known of a function but the scores that it gives."""

    def usable(self, answer: str) -> bool:
        """Always; but the function is tried on it, before anything is spent."""
        self.score(answer, answer)
        return True

    def is_unread(self, reply: str) -> bool:
        """Never: only answers of the data are given to the function as answers."""
        return False


@final
@dataclass(frozen=True)
class SandboxedFunction(_FunctionScorer):
    """A Python function, named in a recipe, says how right the reply is, from 0 to 1.

    It runs in a child process; what it prints goes to the standard error.
    """

    function: str
    """The function's place, as "package.module:function"."""

    timeout: Annotated[float, Gt(0), Le(3600)] = 5.0
    """Time limit for one reply, in seconds; a function that takes longer ends the run."""

    folder: str | None = None
    """Where its module is; unset: the recipe's folder, the current one, or where Python looks."""

    asks = False  # whether it may not run, as nobody here has trusted it

    def ask_first(self) -> None:
        """Refuse to run from here on, unless the user has run or trusted this very function."""
        file = self._trust_file()
        object.__setattr__(self, "asks", not (file in _trusted or file.exists()))

    def trust(self) -> None:
        """Run, and remember in the cache that the user wants that."""
        object.__setattr__(self, "asks", False)
        _trusted.add(file := self._trust_file())
        with suppress(OSError):  # then another process asks again
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()

    def _trust_file(self) -> Path:
        module = self.function.partition(":")[0]
        path = _find_source(module, self.folder)
        known = [self.function, str(path and path.resolve()), _source_digest(module, self.folder)]
        key = hashlib.sha256(json.dumps(known).encode()).hexdigest()
        return cache_folder() / "trusted-scorers" / key

    def score(self, reply: str, answer: str) -> float:
        if self.asks:
            what = (
                f"{self.function!r} is code that came with the run, and nobody has run it here; "
                "read it, and give --trust-scorer to `embedgrad evaluate` once to allow it"
            )
            raise RecipeError("recipe", [f"evaluation.scorer.function: {what}"])
        if not _NAME.fullmatch(self.function):
            what = f"{self.function!r} names no function; expected 'package.module:function'"
            raise RecipeError("recipe", [f"evaluation.scorer.function: {what}"])
        try:
            return sandbox.score(
                self.function, reply, answer, seconds=self.timeout, folder=self.folder or ""
            )
        except sandbox.SandboxError as error:
            problem = f"evaluation.scorer.function: {error.what}"
            if not error.at_start:
                what = _describe(self.function, reply, error.what, error.advice)
                problem = f"evaluation.scorer: {what}"
            raise RecipeError("recipe", [problem]) from None

    def deciding(self) -> dict[str, Any]:
        """The function's name: what scores in time scores the same with more of it."""
        return {"function": self.function}

    def fingerprint(self) -> dict[str, Any]:
        """The function's name and its file's digest."""
        return {
            **self.deciding(),
            "source": _source_digest(self.function.partition(":")[0], self.folder),
        }


@final
@dataclass(frozen=True)
class DecoratedFunction(_FunctionScorer):
    """What `@scorer` makes of a function: a scorer that calls it in this process."""

    function: Callable[[str, str], float]

    def __call__(self, reply: str, answer: str) -> float:
        return self.function(reply, answer)

    def score(self, reply: str, answer: str) -> float:
        result = sandbox_child.score(self.function, reply, answer)
        if "value" not in result:
            problem = _describe(self._name, reply, result["what"], result["advice"])
            raise RecipeError("scorer", [problem])
        return float(result["value"])

    def deciding(self) -> dict[str, Any]:
        return {"function": self._name}

    def fingerprint(self) -> dict[str, Any]:
        """The function's name and the digest of its code, where that can be found."""
        source = None
        with suppress(OSError, TypeError):
            source = _digest(inspect.getsource(self.function).encode())
        return {**self.deciding(), "source": source}

    @property
    def _name(self) -> str:
        return f"{self.function.__module__}:{self.function.__qualname__}"


def scorer(function: Callable[[str, str], float] | None = None) -> Any:
    """Make a scorer of a function(reply, answer) that returns a number from 0 to 1, or a bool.

    The scorer goes into `Evaluation(scorer=...)`, and its function then runs in this process,
    without a time limit. A recipe names it as { name = "callable", function = "module:function" },
    and there it runs in a child process. Raises `RecipeError` for what does not take two texts.
    """
    if function is None:  # @scorer()
        return scorer
    name = getattr(function, "__qualname__", repr(function))
    try:
        if not inspect.isroutine(function) or inspect.iscoroutinefunction(function):
            raise TypeError("it is no plain function")
        signature = inspect.signature(function)
        signature.bind("reply", "answer")
        if next(iter(signature.parameters)) in ("self", "cls"):
            raise TypeError("it is a method")
    except (TypeError, ValueError) as error:
        problem = f"{name} does not take two texts, the reply and the answer: {error}"
        raise RecipeError("scorer", [problem]) from None
    return DecoratedFunction(function)


def _describe(function: str, reply: str, what: str, advice: str) -> str:
    shown = ascii(reply[:_SHOWN]) + ("..." if len(reply) > _SHOWN else "")
    return f"{function} {what} on the reply {shown}{advice}"


def _source_digest(module: str, first: str | None) -> str | None:
    """SHA-256 of a module's file."""
    path = _find_source(module, first)
    return None if path is None else _digest(path.read_bytes())


def _find_source(module: str, first: str | None) -> Path | None:
    """A module's file, found as Python would and without running anything."""
    place = module.replace(".", "/")
    for folder in (first or "", "", *sys.path):
        for name in (f"{place}/__init__.py", f"{place}.py"):
            path = Path(folder, name)
            with suppress(OSError):
                if path.is_file() and os.access(path, os.R_OK):
                    return path
    return None  # compiled, or in an archive


def _digest(source: bytes) -> str:
    return f"sha256:{hashlib.sha256(source).hexdigest()}"
