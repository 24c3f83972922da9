"""Free answers that are kept, judged by the scorer as it is now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embedgrad.errors import RunError
from embedgrad.evaluation.evaluator import ScoredAnswer, score_answer
from embedgrad.events import say, stage
from embedgrad.experiments.baselines import Task
from embedgrad.experiments.baselines.base import Answers
from embedgrad.experiments.compare.folder import Folder, Part, answered_from
from embedgrad.experiments.compare.results import scores_of
from embedgrad.parts.scorers import name_of


def scorer_of(task: Task) -> dict[str, Any]:
    """What decides how free answers are scored, as plain JSON; nothing for choices."""
    if task.sequencer.target.choices:
        return {}
    scorer = task.recipe.evaluation.scorer
    return {"name": name_of(scorer), **scorer.fingerprint()}


def judge_again(task: Task, folder: Folder, now: Mapping[str, Any]) -> None:
    """Judge the answers of finished parts again where another scorer did, or one not known.

    All or none of them. Raises `RunError` for damaged answers, and what the scorer raises.
    """
    if not now:
        return
    made: list[tuple[Part, list[ScoredAnswer], dict[str, Any]]] = []
    for part in folder.finished():
        before = folder.scores(part)
        if before.get("scorer") == now:
            continue
        if not made:
            stage(task.report, "judging answers again")
        answers = [
            score_answer(a, task.recipe.evaluation.scorer) for a in _kept(folder, part, before)
        ]
        again = scores_of(Answers(answers, [before["tokens"]]), (), before["scoring_seconds"])
        made.append((part, answers, {**again, "scorer": now}))
        if again["correct"] != before["correct"] or again["scores"] != before.get("scores"):
            told = "evaluation.scorer has changed, and its answers are judged again"
            say(task.report, [f"{part}: {told}; its training chose by the scorer as it was"])
    for part, answers, scores in made:
        folder.keep_scores(part, answers, scores)


def judged_so_far(
    task: Task, folder: Folder, part: Part, now: Mapping[str, Any]
) -> tuple[Answers, float]:
    """The answers of an interrupted scoring, and the seconds. Raises `RunError`."""
    answers, seconds, scorer = folder.answers_so_far(part)
    if now and scorer != now:
        again = [score_answer(answer, task.recipe.evaluation.scorer) for answer in answers.answered]
        answers = Answers(again, answers.tokens)
    return answers, seconds


def _kept(folder: Folder, part: Part, scores: Mapping[str, Any]) -> list[ScoredAnswer]:
    values = folder.answers(part)
    try:
        kept = [answered_from(value) for value in values]
        if len(kept) != len(scores["correct"]):
            raise ValueError(f"{len(kept)} answers for {len(scores['correct'])} scores")
    except (KeyError, TypeError, ValueError) as error:
        path = folder.work / part.folder
        raise RunError(
            f"{path / 'answers.jsonl'}: is damaged ({error}); delete {path / 'scored.json'} to "
            "answer again"
        ) from error
    return kept
