"""Teachers for the prompts of `kit`."""

from __future__ import annotations

from typing import Any

from embedgrad.parts.objectives import Distill
from embedgrad.prompt.template import Message, Template
from embedgrad.training.teacher import Teacher, Teaching
from kit import Kit

LONG = "Judge reviews with care. Dull is negative. Warm is positive. Say one word."


def teacher_of(made: Kit, objective: Distill = Distill(), **options: Any) -> Teacher:
    """The same model with a longer instruction in front of the review."""
    plain = made.sequencer.renderer.template.text is not None
    messages = (Message("system", LONG), Message("user", "Review: {review}"))
    template = (
        Template(text=f"{LONG}\nReview: {{review}}\nAnswer:", frozen=True)
        if plain
        else Template(messages, frozen=True)
    )
    teaching = Teaching(template=template, **options)
    return Teacher(made.model, made.sequencer, teaching, objective)
