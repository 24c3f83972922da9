"""Scores of each group of rows, and of the group that is worst off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, final

from embedgrad.data.examples import Example
from embedgrad.evaluation.evaluator import Comparison
from embedgrad.evaluation.significance import holm, paired_test, score_interval
from embedgrad.evaluation.verdict import Words, word


@final
class GroupScore(TypedDict):
    """Accuracy in one group with its 95 % interval, as `score_interval` gives it."""

    group: str
    rows: int
    accuracy: float
    interval: list[float]


@final
class GroupComparison(TypedDict):
    """Both prompts in the same groups, in alphabetical order, and where each is worst.

    The `verdicts` on the differences are Holm-corrected over the groups.
    """

    column: str
    text: list[GroupScore]
    refined: list[GroupScore]
    verdicts: list[Words]
    worst: dict[str, GroupScore]


def group_scores(groups: Sequence[str], scores: Sequence[float]) -> list[GroupScore]:
    """The scores of each group, in alphabetical order, given the group and score of every row."""
    own = _by_group(groups, scores)
    return [
        GroupScore(
            group=name,
            rows=len(part),
            accuracy=sum(part) / len(part),
            interval=list(score_interval(part)),
        )
        for name, part in own.items()
    ]


def worst(scores: Sequence[GroupScore]) -> GroupScore:
    """The group of the lowest accuracy; its interval takes no account of the choice."""
    return min(scores, key=lambda score: score["accuracy"])


def compare_groups(
    column: str | None, examples: Sequence[Example], comparison: Comparison
) -> dict[str, GroupComparison]:
    """Both prompts' scores by a column, as "groups" of `result.json`; empty without a column."""
    if column is None:
        return {}
    groups = [example.group_in(column) for example in examples]
    text, refined = (
        [answer.correct for answer in answers]
        for answers in (comparison.text_answers, comparison.refined_answers)
    )
    changes = _by_group(groups, [b - a for a, b in zip(text, refined, strict=True)]).values()
    adjusted = holm([paired_test(change)[1] for change in changes])
    before, after = group_scores(groups, text), group_scores(groups, refined)
    return {
        "groups": GroupComparison(
            column=column,
            text=before,
            refined=after,
            verdicts=[word(sum(c), p) for c, p in zip(changes, adjusted, strict=True)],
            worst={"text": worst(before), "refined": worst(after)},
        )
    }


def _by_group(groups: Sequence[str], scores: Sequence[float]) -> dict[str, list[float]]:
    held: dict[str, list[float]] = {name: [] for name in sorted(set(groups))}
    for name, score in zip(groups, scores, strict=True):
        held[name].append(score)
    return held
