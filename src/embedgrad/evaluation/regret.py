"""Regret: what decisions by both prompts' scores cost over the best ones."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TypedDict, final

from embedgrad.data.examples import Example
from embedgrad.evaluation.evaluator import Comparison, ScoredAnswer
from embedgrad.evaluation.significance import bootstrap_mean, paired_test
from embedgrad.evaluation.verdict import Words, word
from embedgrad.parts.objectives import Objective
from embedgrad.parts.objectives.decisions import Decided


@final
class RegretScores(TypedDict):
    """Means over the decisions; `normalized` is the share of the best decisions' total size.

    `pessimistic` is of the worst decision among those that the scores say are as good.
    """

    regret: float
    pessimistic: float
    normalized: float | None


@final
class RegretDifference(TypedDict):
    """Refined minus text, pessimistic, with its 95 % interval by a bootstrap over decisions."""

    regret: float
    interval: list[float]
    p_value: float
    verdict: Words


@final
class RegretComparison(TypedDict):
    """Both prompts' decisions over the same rows; `best` is the mean cost of the best ones."""

    decisions: int
    best: float
    text: RegretScores
    refined: RegretScores
    difference: RegretDifference


def decide(
    objective: Objective, examples: Sequence[Example], answers: Sequence[ScoredAnswer]
) -> list[Decided]:
    """Every decision over these rows by the probabilities of their choices."""
    return objective.judge(examples, [answer.probabilities or {} for answer in answers])


def regrets(
    objective: Objective, examples: Sequence[Example], answers: Sequence[ScoredAnswer]
) -> list[float]:
    """The pessimistic regret of every decision: a tie is no right one."""
    return [one.pessimistic for one in decide(objective, examples, answers)]


def mean_regret(
    objective: Objective, examples: Sequence[Example], answers: Sequence[ScoredAnswer]
) -> float | None:
    """The mean pessimistic regret, where an objective has one."""
    return fmean(regrets(objective, examples, answers)) if objective.decides else None


def compare_regret(
    objective: Objective, examples: Sequence[Example], comparison: Comparison
) -> dict[str, RegretComparison]:
    """Both prompts' regret as "regret" of `result.json`; empty for other objectives."""
    if not objective.decides:
        return {}
    text, refined = (
        decide(objective, examples, answers)
        for answers in (comparison.text_answers, comparison.refined_answers)
    )
    changes = [b.pessimistic - a.pessimistic for a, b in zip(text, refined, strict=True)]
    p_value = paired_test(changes)[1]
    return {
        "regret": RegretComparison(
            decisions=len(text),
            best=fmean(one.best for one in text),
            text=_scores(text),
            refined=_scores(refined),
            difference=RegretDifference(
                regret=fmean(changes),
                interval=list(bootstrap_mean(changes)),
                p_value=p_value,
                verdict=word(-sum(changes), p_value),
            ),
        )
    }


def _scores(decided: Sequence[Decided]) -> RegretScores:
    size = sum(abs(one.best) for one in decided)
    return RegretScores(
        regret=fmean(one.regret for one in decided),
        pessimistic=fmean(one.pessimistic for one in decided),
        normalized=sum(one.pessimistic for one in decided) / size if size else None,
    )
