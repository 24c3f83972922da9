"""Base class of scorers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Scorer(ABC):
    """Decide whether a generated reply is right. Options are the fields of the subclass."""

    rules: ClassVar[int] = 1
    """Version of its rules; goes up when some text gets another score than before."""

    def deciding(self) -> dict[str, Any]:
        """The options that affect its scores, as plain JSON values."""
        return asdict(self)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that affects its scores, as plain JSON values; equal ones score alike."""
        return {**self.deciding(), "rules": self.rules}

    @abstractmethod
    def score(self, reply: str, answer: str) -> float:
        """1.0 if `reply` gives `answer`, else 0.0; a user's function may return values between.

        A usable answer, taken as the reply, scores 1.0; an empty reply scores 0.0. No text raises
        an error. A scorer that cannot work raises `RecipeError`: its library is missing, or the
        user's function fails.
        """

    def usable(self, answer: str) -> bool:
        """Whether any reply could give `answer`; checked for every example before training."""
        return self.score(answer, answer) > 0

    def is_unread(self, reply: str) -> bool:
        """Whether it finds no answer at all in a wrong reply."""
        return not self.usable(reply)
