"""Early stopping and selection of the best prompt on dev."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, final

from embedgrad.evaluation.evaluator import ScoredAnswer, summarize
from embedgrad.evaluation.regret import mean_regret
from embedgrad.evaluation.significance import wilson_interval
from embedgrad.model.backbone import Prompt
from embedgrad.parts.objectives import Objective
from embedgrad.prompt.sequence import TokenSequence

LOWER_IS_BETTER = ("log_loss", "regret")


def score_of(
    step: int,
    accuracy: float,
    log_loss: float,
    macro_f1: float | None,
    answer_loss: float | None = None,
    regret: float | None = None,
) -> dict[str, float]:
    """A step's scores on dev, as they are kept.

    Free text has no macro-F1, and the answer's loss is there where training lowers it beside the
    ranking of the choices. Regret is there where training lowers that of decisions.
    """
    score = {"step": step, "accuracy": accuracy, "log_loss": log_loss}
    more = {"macro_f1": macro_f1, "answer_loss": answer_loss, "regret": regret}
    return score | {name: value for name, value in more.items() if value is not None}


def score_dev(
    step: int,
    rows: Sequence[TokenSequence],
    answers: Sequence[ScoredAnswer],
    choices: Sequence[str],
    objective: Objective,
) -> dict[str, float]:
    """The scores of a step's answers to the dev rows, as far as the objective has them."""
    summary = summarize(answers, choices)
    losses = [answer.answer_loss for answer in answers if answer.answer_loss is not None]
    return score_of(
        step,
        summary.accuracy,
        summary.log_loss,
        summary.macro_f1,
        answer_loss=fmean(losses) if losses and objective.needs_end else None,
        regret=mean_regret(objective, [row.example for row in rows], answers),
    )


def accuracy_interval(accuracy: float, rows: int) -> tuple[float, float]:
    """95 % interval of an accuracy (Wilson); of graded scores, a little too wide."""
    return wilson_interval(round(accuracy * rows), rows)


@final
@dataclass
class Best:
    """Keeps the best prompt that it sees.

    `metric` is "accuracy", "macro_f1", "regret" or "log_loss", which also decides between equal
    scores.
    `history` holds the scores in order, each with its `step`. Scores with an "answer_loss" are
    equal within one standard error of the best of `rows` dev rows, as few rows cannot tell them
    apart, and the sum of both losses decides between them (the one-standard-error rule: Breiman et
    al. 1984, Classification and Regression Trees, section 3.4.3). Nothing below the first score,
    the text prompt's, is kept, and anything above it is better. Only the kept prompt and the new
    one are compared, so what is kept is a function of the scores up to now.
    """

    metric: str
    prompt: Prompt
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    rows: int = 0

    def add(self, score: dict[str, float], prompt: Prompt) -> None:
        """Note a score, and keep its prompt if it is better than the one that is kept."""
        better = not self.history or self._is_better(score)
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
        first, *warm = [score for score in self.history if score["step"] == self.step]
        return warm[0] if warm and self._beats(warm[0], first, [first, *warm]) else first

    def event(self, *, text: bool = True) -> dict[str, Any]:
        """The last score beside the best and the text prompt's, each with its interval.

        The text prompt's is the first, or None where only a warm start's rows were scored.
        """
        now, best, first = (
            {**score, "interval": accuracy_interval(score["accuracy"], self.rows)}
            for score in (self.history[-1], self.score, self.history[0])
        )
        scores = {**now, "metric": self.metric, "best": best, "text": first if text else None}
        return {"event": "evaluation", **scores}

    def stops_early(self, patience: int | None) -> bool:
        """Early stopping: whether the last `patience` scores of steps brought nothing better."""
        if patience is None or not self.history:
            return False
        return sum(score["step"] > self.step for score in self.history) >= patience

    def _is_better(self, score: dict[str, float]) -> bool:
        return self._beats(score, self.score, [*self.history, score])

    def _beats(
        self, score: dict[str, float], kept: dict[str, float], known: list[dict[str, float]]
    ) -> bool:
        if kept is known[0] and self._worth(score) > self._worth(kept):
            return True
        best = lowest = max(map(self._worth, known))
        if self.metric != "log_loss" and "answer_loss" in score:
            error = math.sqrt(best * (1 - best) / self.rows)
            lowest = max(best - error, self._worth(known[0]))
        if self._worth(score) < lowest or self._worth(kept) < lowest:
            return self._worth(score) >= lowest
        return _loss(score) < _loss(kept)

    def _worth(self, score: dict[str, float]) -> float:
        return -score[self.metric] if self.metric in LOWER_IS_BETTER else score[self.metric]


def _loss(score: dict[str, float]) -> float:
    return score["log_loss"] + score.get("answer_loss", 0.0)
