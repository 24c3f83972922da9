"""A Python function says how right the reply is."""

from __future__ import annotations

import hashlib
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, final

from annotated_types import Gt, Le

from embedgrad.errors import RecipeError, nearest
from embedgrad.parts.scorers.base import Scorer
from embedgrad.parts.scorers.sandbox import WorkerError, call

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_SHOWN = 60  # characters of a reply in a message


@final
@dataclass(frozen=True)
class Called(Scorer):
    """A Python function says how right the reply is, from 0 to 1.

    It is called as function(reply, answer), with two texts, and returns True, False or a number
    from 0 to 1, for any text whatever. It runs in a process of its own, which finds modules as this
    one does and in the current folder first; what it prints goes to the standard error.
    """

    path: str
    """Where the function is, as "package.module:function"; the current folder comes first."""

    timeout: Annotated[float, Gt(0), Le(3600)] = 5.0
    """Longest time for one reply, in seconds; a function that takes longer ends the run."""

    def score(self, reply: str, answer: str) -> float:
        if not _PATH.fullmatch(self.path):
            raise self._problem(
                f"path: {self.path!r} names no function; expected 'package.module:function'"
            )
        try:
            return call(self.path, reply, answer, seconds=self.timeout)
        except WorkerError as error:
            raise self._problem(self._told(error, reply)) from None

    def deciding(self) -> dict[str, Any]:
        """The path: what scored in time scores the same with more of it."""
        return {"path": self.path}

    def fingerprint(self) -> dict[str, Any]:
        """The path and its file's digest."""
        return {**self.deciding(), "source": _source_digest(self.path.partition(":")[0])}

    def usable(self, answer: str) -> bool:
        """Always; but the function is tried on it, before anything is spent."""
        self.score(answer, answer)
        return True

    def is_unread(self, reply: str) -> bool:
        """Never: only answers of the data are given to the function as answers."""
        return False

    def _told(self, error: WorkerError, reply: str) -> str:
        """What went wrong, and what to do about it."""
        module, _, function = self.path.partition(":")
        on = f"on the reply {_begin(reply)}"
        match error.kind:
            case "module":
                known = nearest(error.text, error.known)
                return f"path: there is no module {error.text!r} for {self.path!r}; {known}"
            case "function":
                known = nearest(function, error.known)
                return f"path: module {module!r} has no function {function!r}; {known}"
            case "import":
                return f"path: {module!r} cannot be imported: {error.text}"
            case "raised":
                return f"{self.path} raised {error.text} {on}; it must score any text"
            case "returned":
                return f"{self.path} returned {error.text} {on}; expected a number from 0 to 1"
            case "ended":
                return f"the process of {self.path} {error.text} {on}"
            case "hung":
                advice = "mend it, or raise evaluation.scorer.timeout"
                return f"{self.path} {error.text} {on} and was stopped; {advice}"

    def _problem(self, told: str) -> RecipeError:
        dot = "." if told.startswith("path: ") else ": "
        return RecipeError("recipe", [f"evaluation.scorer{dot}{told}"])


def _source_digest(module: str) -> str | None:
    """SHA-256 of a module's file, found as Python would and without running anything."""
    place = module.replace(".", "/")
    for folder in ("", *sys.path):
        for name in (f"{place}/__init__.py", f"{place}.py"):
            path = Path(folder, name)
            with suppress(OSError):
                if path.is_file():
                    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    return None  # compiled, or in an archive


def _begin(text: str) -> str:
    return ascii(text[:_SHOWN]) + ("..." if len(text) > _SHOWN else "")
