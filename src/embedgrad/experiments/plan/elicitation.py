"""Is there anything to elicit? The model's answers before training.

A prompt brings out what a model can do and does not show. Scores of choices that rank no better
than chance, or samples that are never right, leave nothing to bring out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NotRequired, TypedDict, final

from embedgrad.errors import DataError
from embedgrad.evaluation.auc import macro_auc
from embedgrad.evaluation.evaluator import ScoredAnswer, summarize
from embedgrad.events import Report, part_of, stage
from embedgrad.experiments.baselines import METHODS, Task, Trained
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.report.expectation import expect

ROWS = 200  # with choices
FREE_ROWS = 48  # with free answers, which take longer
SAMPLES = 8  # answers to each of these, unless evaluation.samples asks for more


@final
class Prompted(TypedDict):
    """A prompt's answers; `failed` says why there are none.

    `auc` is that of the choices' scores, `form` the share of free answers that are cut or hold no
    answer, or of greedy replies that are no choice.
    """

    accuracy: NotRequired[float]
    interval: NotRequired[list[float]]
    auc: NotRequired[float | None]
    auc_interval: NotRequired[list[float] | None]
    form: NotRequired[float | None]
    shots: NotRequired[int]
    failed: NotRequired[str]


@final
class Elicitation(TypedDict):
    """What the model does before training, and what to expect in one sentence.

    `sampled` are the text prompt's sampled answers, of free text (see `evaluation.sampled`).
    """

    rows: int
    split: str
    text: Prompted
    no_template: Prompted
    few_shot: Prompted
    sampled: dict[str, Any] | None
    temperature: float | None
    expect: str
    sentence: str


def elicit(task: Task, report: Report) -> Elicitation:
    """Measure the text prompt, no template and k demonstrations on dev rows, or on train rows.

    No test row is read. Demonstrations are training rows that are not measured on.
    """
    free = not task.sequencer.target.choices
    split = "dev" if task.dev else "train"
    given = list(task.dev or task.train)
    most = FREE_ROWS if free else ROWS
    picked = sorted(random.Random("elicit").sample(range(len(given)), min(most, len(given))))
    rows, taken = [given[i] for i in picked], set(picked)
    rest = [s for i, s in enumerate(task.train) if split == "dev" or i not in taken]
    greedy = replace(task.recipe.evaluation, samples=0)
    samples = max(SAMPLES, task.recipe.evaluation.samples) if free else 0

    def ask(name: str, samples: int, which: str) -> tuple[Prompted, list[ScoredAnswer]]:
        evaluation = replace(greedy, samples=samples)
        own = replace(
            task,
            recipe=replace(task.recipe, evaluation=evaluation),
            train=rest,
            dev=(),
            report=part_of(report, which, 0, len(rows)),
            state=None,
        )
        stage(report, f"what there is to elicit: {which}")
        method = METHODS[name]
        trained = method.train(own, 0) if rest or name != "few-shot" else Trained({}, {})
        answered = method.answer(own, trained, rows).answered
        shots = trained.facts["settings"].get("shots")
        return _score_text(own, answered, rows, shots), answered

    text, answered = ask("text", samples, "text prompt")
    if not free:
        start_PD = task.model.embed(task.sequencer.prompt_ids)
        replied = task.evaluator().add_replies(answered, start_PD, rows)
        share = summarize(replied, task.sequencer.target.choices).greedy_is_choice
        text["form"] = None if share is None else 1 - share
    bare, _ = ask("no-template", 0, "no template")
    if rest:
        try:
            few, _ = ask("few-shot", 0, "demonstrations")
        except DataError as error:  # they leave too little room
            few = {"failed": str(error)}
    else:
        few = {"failed": "there are no training rows besides those that are measured on"}
    sampled = summarize(answered, task.sequencer.target.choices).sampled
    values: dict[str, Any] = {
        "rows": len(rows),
        "split": split,
        "text": text,
        "no_template": bare,
        "few_shot": few,
        "sampled": sampled,
        "temperature": greedy.temperature if free else None,
    }
    kind, sentence = expect(values)
    return {**values, "expect": kind, "sentence": sentence}  # type: ignore[typeddict-item]


def _score_text(
    task: Task,
    answered: Sequence[ScoredAnswer],
    rows: Sequence[TokenSequence],
    shots: int | None,
) -> Prompted:
    summary = summarize(answered, task.sequencer.target.choices)
    values: Prompted = {"accuracy": summary.accuracy, "interval": list(summary.interval)}
    if shots is not None:
        values["shots"] = shots
    if not task.sequencer.target.choices:
        values["form"] = sum(a.cut or a.unread for a in answered) / len(answered)
        return values
    shares = [list((a.probabilities or {}).values()) for a in answered]
    auc = macro_auc(shares, [row.gold for row in rows])
    values["auc"], values["auc_interval"] = (None, None) if auc is None else (auc[0], list(auc[1]))
    return values
