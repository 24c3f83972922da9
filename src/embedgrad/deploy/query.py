"""The user message that a client sends to an export.

The query is the text of a template from its first column to its last. The text around it is
constant, and goes into the exported chat template.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from embedgrad.data.markup import Piece, fill, parse
from embedgrad.deploy.rules import plain_query_problem
from embedgrad.errors import ExportError, nearest
from embedgrad.prompt.template import Template


def query_of(template: Template, columns: Mapping[str, str]) -> str:
    """The user's message for one example: the text from the first column to the last, filled in.

    Raises `ExportError` for a missing column, and for a template whose query is not one message.
    """
    contents, at, first, end = _find_query(template)
    query = contents[at][first:end]
    for piece in query:
        if piece.kind == "column" and piece.text not in columns:
            raise ExportError(f"no column {piece.text!r}; {nearest(piece.text, columns)}")
    return fill(query, columns)


def plain_messages(template: Template, columns: Mapping[str, str]) -> list[dict[str, str]]:
    """Everything that a client sends for one example. Raises `ExportError`."""
    return [{"role": "user", "content": query_of(template, columns)}]


def surroundings(template: Template, marks: Iterable[str]) -> dict[str, Any]:
    """The constant text around the query, with a mark for each span. Raises `ExportError`.

    "system" is the prompt's system message, "leading" the messages between it and the query's,
    "before" and "after" the text around the query in its message, "following" the messages after
    it, "opening" the text that opens the answer. None: there is no such message.
    """
    contents, at, first, end = _find_query(template)
    left = iter(marks)
    marked = [
        [Piece("text", next(left)) if p.kind == "span" else p for p in pieces]
        for pieces in contents
    ]
    messages = [
        {"role": message.role, "content": "" if i == at else fill(marked[i], {})}
        for i, message in enumerate(template.messages)
    ]
    leading, following = messages[:at], messages[at + 1 :]
    system = leading.pop(0)["content"] if leading and leading[0]["role"] == "system" else None
    opened = bool(following) and following[-1]["role"] == "assistant"
    opening = following.pop()["content"] if opened else None
    return {
        "system": system,
        "leading": leading,
        "before": fill(marked[at][:first], {}),
        "after": fill(marked[at][end:], {}),
        "following": following,
        "opening": opening,
    }


def _find_query(template: Template) -> tuple[list[tuple[Piece, ...]], int, int, int]:
    """Every message in pieces; the query's message, its first piece, and the end of its pieces."""
    problem = plain_query_problem(template)
    if problem:
        raise ExportError(f"template: {problem}")
    contents = [parse(message.content, message.role) for message in template.messages]
    at = next(i for i, pieces in enumerate(contents) if any(p.kind == "column" for p in pieces))
    places = [i for i, piece in enumerate(contents[at]) if piece.kind == "column"]
    return contents, at, places[0], places[-1] + 1
