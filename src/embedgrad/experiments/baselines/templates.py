"""Templates for baselines: another text in the span."""

from __future__ import annotations

from embedgrad.data.markup import Piece, parse, write
from embedgrad.prompt.template import Message, Template


def with_span(template: Template, span: str) -> Template:
    """The template with another span text."""
    if template.text is not None:
        return Template.plain(_replace_span(template.text, span))
    messages = tuple(Message(m.role, _replace_span(m.content, span)) for m in template.messages)
    return Template(messages=messages, options=template.options)


def _replace_span(text: str, span: str) -> str:
    """The text with another span, and its columns still marked."""
    pieces = parse(text, "template")
    return write(Piece("span", span) if piece.kind == "span" else piece for piece in pieces)
