"""Teachers for the prompts of `kit`."""

from __future__ import annotations

from typing import Any

from embedgrad.evaluation.evaluator import Evaluation
from embedgrad.events import Report, quiet
from embedgrad.parts.objectives import Distill
from embedgrad.prompt.template import Message, Template
from embedgrad.training.teacher import Teacher, Teaching
from kit import Kit

LONG = "Judge reviews with care. Dull is negative. Warm is positive. Say one word."
TEMPLATE = Template((Message("system", LONG), Message("user", "Review: {review}")), frozen=True)


def teacher_of(
    made: Kit,
    objective: Distill = Distill(),
    *,
    template: Template = TEMPLATE,
    evaluation: Evaluation = Evaluation(),
    report: Report = quiet,
    **options: Any,
) -> Teacher:
    """The same model with a longer instruction in front of the review."""
    teaching = Teaching(template=template, **options)
    return Teacher(
        made.model, made.sequencer, teaching, objective, evaluation=evaluation, report=report
    )
