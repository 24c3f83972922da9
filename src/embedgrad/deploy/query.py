"""What a client sends to an export: the user's own words.

A prompt's messages are cut at the query, the text from the first column to the last. All that
stands around it is constant, and goes into the exported chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from embedgrad.data.markup import Piece, parse
from embedgrad.deploy.rules import RULES, TOKENS_OF_A_CHAT, Facts
from embedgrad.errors import ExportError, nearest
from embedgrad.prompt.template import Message, Template


@dataclass(frozen=True)
class Surroundings:
    """The constant text around a query, with `mark` in the span's place.

    `system` is the prompt's own system message, `leading` what stands between it and the query's
    message, `before` and `after` the text around the query in that message, `following` the
    messages behind it, `opening` the text that opens the answer. None: there is no such message.
    """

    system: str | None
    leading: tuple[Message, ...]
    before: str
    after: str
    following: tuple[Message, ...]
    opening: str | None


def query_of(template: Template, columns: Mapping[str, str]) -> str:
    """The user's message for one row: the text from the first column to the last, filled in.

    Raises `ExportError` for a template that no plain query can stand for, and for a missing column.
    """
    _, (_, query, _) = _cut(template)
    parts = []
    for piece in query:
        if piece.kind == "column" and piece.text not in columns:
            raise ExportError(f"no column {piece.text!r}; {nearest(piece.text, columns)}")
        parts.append(columns[piece.text] if piece.kind == "column" else piece.text)
    return "".join(parts)


def plain_messages(template: Template, columns: Mapping[str, str]) -> list[dict[str, str]]:
    """All that a client sends for one row. Raises `ExportError`."""
    return [{"role": "user", "content": query_of(template, columns)}]


def surroundings(template: Template, mark: str) -> Surroundings:
    """The constant text around the query. Raises `ExportError`."""
    at, (before, _, after) = _cut(template)
    filled = [
        Message(m.role, "" if i == at else _text(parse(m.content, m.role), mark))
        for i, m in enumerate(template.messages)
    ]
    leading, following = filled[:at], filled[at + 1 :]
    own = leading.pop(0).content if leading and leading[0].role == "system" else None
    opened = bool(following) and following[-1].role == "assistant"
    opening = following.pop().content if opened else None
    texts = (_text(before, mark), _text(after, mark))
    return Surroundings(own, tuple(leading), *texts, tuple(following), opening)


def _cut(
    template: Template,
) -> tuple[int, tuple[Sequence[Piece], Sequence[Piece], Sequence[Piece]]]:
    """Place of the query's message; what in it stands before the query, the query, and the rest."""
    facts = Facts(frozenset(), template, "", 1.0)
    for rule in RULES:
        if rule.refuses and rule.destinations == TOKENS_OF_A_CHAT and rule.applies(facts):
            raise ExportError(f"template: {rule.says(facts)}")
    contents = [parse(message.content, message.role) for message in template.messages]
    at = next(i for i, pieces in enumerate(contents) if any(p.kind == "column" for p in pieces))
    places = [i for i, piece in enumerate(contents[at]) if piece.kind == "column"]
    first, end = places[0], places[-1] + 1
    return at, (contents[at][:first], contents[at][first:end], contents[at][end:])


def _text(pieces: Sequence[Piece], mark: str) -> str:
    return "".join(mark if piece.kind == "span" else piece.text for piece in pieces)
