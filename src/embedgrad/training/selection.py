"""Early stopping and selection of the best prompt on dev."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from embedgrad.model.backbone import Prompt


def score_of(
    step: int, accuracy: float, log_loss: float, macro_f1: float | None
) -> dict[str, float]:
    """A step's scores on dev, as they are kept; free text has no macro-F1."""
    score = {"step": step, "accuracy": accuracy, "log_loss": log_loss}
    return score if macro_f1 is None else {**score, "macro_f1": macro_f1}


@final
@dataclass
class Best:
    """Keeps the best prompt that it sees.

    `metric` is "accuracy", "macro_f1" or "log_loss", which also decides between equal scores.
    `history` holds the scores in order, each with its `step`.
    """

    metric: str
    prompt: Prompt
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def add(self, score: dict[str, float], prompt: Prompt) -> None:
        """Note a score, and keep its prompt if none before was as good."""
        better = not self.history or self._worth(score) > max(map(self._worth, self.history))
        self.history.append(score)
        if better:
            self.take(prompt, int(score["step"]))

    def take(self, prompt: Prompt, step: int) -> None:
        """Keep a prompt, whatever was kept before."""
        self.prompt = {name: rows.detach().clone() for name, rows in prompt.items()}
        self.step = step

    @property
    def score(self) -> dict[str, float]:
        """The score of the prompt that is kept."""
        # Of two at step 0, the second is a warm start's, and kept only where it is better.
        return next(s for s in reversed(self.history) if s["step"] == self.step)

    def stops_early(self, patience: int | None) -> bool:
        """Early stopping: whether the last `patience` scores brought nothing better."""
        if patience is None or not self.history:
            return False
        return len(self.history) - 1 - self.history.index(self.score) >= patience

    def _worth(self, score: dict[str, float]) -> tuple[float, float]:
        first = -score["log_loss"] if self.metric == "log_loss" else score[self.metric]
        return first, -score["log_loss"]
