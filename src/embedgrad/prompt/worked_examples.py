"""Worked examples in a template: few-shot demonstrations.

The examples' columns are written into the template as literal text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from embedgrad.data.markup import fill, literal, parse
from embedgrad.prompt.sequence import Target
from embedgrad.prompt.template import Message, Template

Shot = tuple[Mapping[str, str], str]  # columns, and the answer to show


def with_examples(
    template: Template, target: Target, shots: Sequence[Shot], *, refine: bool = False
) -> Template:
    """The template after worked examples, each with its answer, in the words of the text prompt.

    Chat: each example repeats the messages after the leading system messages, with the answer as
    the assistant's. Plain text: the filled-in text and its answer. With `refine` the texts of the
    examples are spans: those of every message, without white space at its ends, or the plain text.
    """

    def shown(text: str) -> str:
        return f"[[{literal(text)}]]" if refine else literal(text)

    if template.text is not None:
        blocks = []
        for columns, answer in shots:
            filled = _fill(template.text, columns)
            reply = target.text_before(filled, opened=True) + answer
            blocks.append(shown(f"{filled}{reply}\n\n"))
        return Template.plain("".join(blocks) + template.text)
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
        for m in filled_turns:
            filled_messages.append(
                Message(m.role, shown(m.content.strip() if refine else m.content))
            )
    return Template(messages=(*filled_messages, *turns), options=template.options)


def _fill(text: str, columns: Mapping[str, str]) -> str:
    return fill(parse(text, "template"), columns)
