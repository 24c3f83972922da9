"""What every scorer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Scorer(ABC):
    """Decide whether a generated reply is right. Options are the fields of the subclass."""

    rules: ClassVar[int] = 1
    """Goes up when it begins to score some text otherwise."""

    def deciding(self) -> dict[str, Any]:
        """The options that decide its scores, as plain JSON values."""
        return asdict(self)

    def fingerprint(self) -> dict[str, Any]:
        """All that decides its scores, as plain JSON values: equal ones score alike."""
        return {**self.deciding(), "rules": self.rules}

    @abstractmethod
    def score(self, reply: str, answer: str) -> float:
        """1.0 if `reply` gives `answer`, else 0.0; a function of the user's own may say between.

        A usable answer, taken as the reply, scores 1.0; an empty reply scores 0.0. Any text is
        allowed on both sides: it raises nothing. What does raise `RecipeError` is a scorer that
        cannot work: a library that is missing, a function of the user's own that fails.
        """

    def usable(self, answer: str) -> bool:
        """Whether any reply could give `answer`; asked of every row before anything is spent."""
        return self.score(answer, answer) > 0

    def is_unread(self, reply: str) -> bool:
        """Whether it finds no answer in a wrong reply, be it right or wrong."""
        return not self.usable(reply)
