"""Rescore saved free answers after a scorer change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embedgrad.evaluation.evaluator import ScoredAnswer, score_answer
from embedgrad.events import say, stage
from embedgrad.experiments.baselines import Answers, Task
from embedgrad.experiments.compare.folder import Folder, Part
from embedgrad.experiments.compare.results import scores_of
from embedgrad.parts.scorers import name_of


def scorer_fingerprint(task: Task) -> dict[str, Any]:
    """What decides how free answers are scored, as plain JSON; empty for choices."""
    if task.sequencer.target.choices:
        return {}
    scorer = task.recipe.evaluation.scorer
    return {"name": name_of(scorer), **scorer.fingerprint()}


def rescore(task: Task, folder: Folder, scorer: Mapping[str, Any]) -> None:
    """Score the answers of finished parts again unless this scorer did: all of them, or none.

    Raises `RunError` for damaged answers, and what the scorer raises.
    """
    if not scorer:
        return
    rescored: list[tuple[Part, list[ScoredAnswer], dict[str, Any]]] = []
    for part in folder.finished_parts():
        before = folder.scores(part)
        if before.get("scorer") == scorer:
            continue
        if not rescored:
            stage(task.report, "scoring saved answers again")
        answers = score_again(task, folder.scored_answers(part, len(before["correct"])))
        scores = scores_of(Answers(answers, [before["tokens"]]), (), before["scoring_seconds"])
        rescored.append((part, answers, {**scores, "scorer": scorer}))
        if scores["correct"] != before["correct"] or scores["scores"] != before.get("scores"):
            changed = "evaluation.scorer has changed, and its answers are scored again"
            say(task.report, [f"{part}: {changed}; its training chose by the old scorer"])
    for part, answers, scores in rescored:
        folder.save_scores(part, answers, scores)


def score_again(task: Task, answers: list[ScoredAnswer]) -> list[ScoredAnswer]:
    """The same answers, scored by the recipe's scorer."""
    return [score_answer(answer, task.recipe.evaluation.scorer) for answer in answers]
