"""The rows that scored best on dev so far, and when to stop looking for better ones."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


def score_of(
    step: int, accuracy: float, log_loss: float, macro_f1: float | None
) -> dict[str, float]:
    """A step's scores on dev, as they are kept; free text has no macro-F1."""
    score = {"step": step, "accuracy": accuracy, "log_loss": log_loss}
    return score if macro_f1 is None else {**score, "macro_f1": macro_f1}


@dataclass
class Best:
    """Keeps the best of the rows it is shown.

    `metric` is "accuracy", "macro_f1" or "log_loss"; equal ones are told apart by log_loss.
    `history` holds the scores in order, each with its `step`.
    """

    metric: str
    rows: Tensor
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def add(self, score: dict[str, float], rows_PD: Tensor) -> None:
        """Take note of a score, and keep its rows if none before was as good."""
        better = not self.history or self._worth(score) > max(map(self._worth, self.history))
        self.history.append(score)
        if better:
            self.take(rows_PD, int(score["step"]))

    def take(self, rows_PD: Tensor, step: int) -> None:
        """Keep these rows, whatever was kept before."""
        self.rows, self.step = rows_PD.detach().clone(), step

    @property
    def score(self) -> dict[str, float]:
        """The score of the rows that are kept."""
        return next(score for score in self.history if score["step"] == self.step)

    def stops_early(self, patience: int | None) -> bool:
        """Whether the last `patience` scores brought nothing better."""
        if patience is None or not self.history:
            return False
        return len(self.history) - 1 - self.history.index(self.score) >= patience

    def _worth(self, score: dict[str, float]) -> tuple[float, float]:
        first = -score["log_loss"] if self.metric == "log_loss" else score[self.metric]
        return first, -score["log_loss"]
