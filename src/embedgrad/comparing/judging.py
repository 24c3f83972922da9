"""Free answers that are kept, judged by the scorer as it is now."""

from __future__ import annotations

import math
from typing import Any

from embedgrad.comparing.folder import Folder, Part
from embedgrad.comparing.results import scores_of
from embedgrad.evaluation import Answered, judged
from embedgrad.events import say
from embedgrad.methods import Task
from embedgrad.methods.base import Answers
from embedgrad.scorers import name_of


def scorer_of(task: Task) -> dict[str, Any]:
    """What decides how free answers are scored, as plain JSON; nothing for choices."""
    if task.sequencer.target.choices:
        return {}
    scorer = task.recipe.evaluation.scorer
    return {"name": name_of(scorer), **scorer.fingerprint()}


def judge_again(task: Task, folder: Folder) -> None:
    """Judge the answers of finished parts again where the user's own function has changed.

    Raises `RunError` for damaged answers, and what the scorer raises.
    """
    now = scorer_of(task)
    for part in folder.finished():
        before = folder.scores(part)
        if before.get("scorer", now) == now:
            continue
        say(
            task.report,
            [
                f"{part}: evaluation.scorer has changed, and the answers are judged again; its "
                "training chose by the scorer as it was"
            ],
        )
        kept = [_read(values) for values in folder.answers(part)]
        answers = [judged(answer, task.recipe.evaluation.scorer) for answer in kept]
        again = scores_of(Answers(answers, [before["tokens"]]), (), before["scoring_seconds"])
        folder.keep_scores(part, answers, {**again, "scorer": now})


def judged_so_far(task: Task, folder: Folder, part: Part) -> tuple[Answers, float]:
    """The answers of an interrupted scoring, and the seconds. Raises `RunError`."""
    answers, seconds, scorer = folder.answers_so_far(part)
    now = scorer_of(task)
    if now and scorer is not None and scorer != now:
        again = [judged(answer, task.recipe.evaluation.scorer) for answer in answers.answered]
        answers = Answers(again, answers.tokens)
    return answers, seconds


def _read(values: dict[str, Any]) -> Answered:
    # An infinite loss is written as null.
    return Answered(**{**values, "loss": math.inf if values["loss"] is None else values["loss"]})
