"""Templates for baselines: other span text, few-shot examples.

The examples' columns are written into the template as literal text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from embedgrad.data.markup import Piece, fill, literal, parse, write
from embedgrad.prompt.sequence import Target
from embedgrad.prompt.template import Message, Template

Shot = tuple[Mapping[str, str], str]  # columns, and the answer to show
_BETWEEN = "\n\n"  # between worked examples of a plain text


def with_span(template: Template, span: str) -> Template:
    """The template with another span text."""
    if template.text is not None:
        return Template.plain(_replace_span(template.text, span))
    messages = tuple(Message(m.role, _replace_span(m.content, span)) for m in template.messages)
    return Template(messages=messages, options=template.options)


def with_examples(template: Template, target: Target, shots: Sequence[Shot]) -> Template:
    """The template after worked examples, each with its answer, in the words of the text prompt.

    Chat: each example repeats the messages after the leading system messages, with the answer as
    the assistant's. Plain text: the filled-in text and its answer.
    """
    if template.text is not None:
        blocks = []
        for columns, answer in shots:
            filled = _fill(template.text, columns)
            blocks.append(literal(filled + target.text_before(filled, opened=True) + answer))
        return Template.plain("".join(block + _BETWEEN for block in blocks) + template.text)
    messages = list(template.messages)
    leading = next(i for i, m in enumerate(messages) if m.role != "system")
    turns = messages[leading:]
    filled_messages = messages[:leading]
    for columns, answer in shots:
        filled_turns = [Message(m.role, _fill(m.content, columns)) for m in turns]
        opened = filled_turns[-1].role == "assistant"
        opening = filled_turns.pop().content if opened else ""
        reply = opening + target.text_before(opening, opened=opened) + answer
        filled_turns.append(Message("assistant", reply))
        filled_messages += [Message(m.role, literal(m.content)) for m in filled_turns]
    return Template(messages=(*filled_messages, *turns), options=template.options)


def _fill(text: str, columns: Mapping[str, str]) -> str:
    return fill(parse(text, "template"), columns)


def _replace_span(text: str, span: str) -> str:
    """The text with another span, and its columns still marked."""
    pieces = parse(text, "template")
    return write(Piece("span", span) if piece.kind == "span" else piece for piece in pieces)
