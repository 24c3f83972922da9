"""Where the prompt stands: move a template's span to another place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, final

from embedgrad.data.markup import Piece, parse, write
from embedgrad.data.table import quote
from embedgrad.errors import TemplateError
from embedgrad.prompt.template import Message, Template

PLACES = ("system", "before", "after", "around")
_GAP = Piece("text", "\n\n")  # between the span and what it is moved next to


def place_of(template: Template) -> str | None:
    """The place of the spans; None where they are in several, or in none of `PLACES`.

    The query is the last user message, or the plain text.
    """
    parts, found = _parts(template), list[str]()
    query = _query(parts)
    for number, part in enumerate(parts):
        own = [i for i, piece in enumerate(part.pieces) if piece.kind == "column"]
        own = own or [i for i, piece in enumerate(part.pieces) if piece.kind == "text"]
        for i, piece in enumerate(part.pieces):
            if piece.kind == "span" and number == query and own:
                found.append("before" if i < own[0] else "after" if i > own[-1] else "")
            elif piece.kind == "span":
                found.append("system" if part.role == "system" else "")
    if found == ["before", "after"]:
        return "around"
    return found[0] or None if len(found) == 1 else None


def place_span(template: Template, place: str) -> Template:
    """The template with its span in another place; one that has it there is returned as it is.

    "system" puts the words behind the text of a system message, "before" and "after" at the ends
    of the query (in plain text, "after" is behind the line of the last column). "around" parts the
    words in two, so that every place has the same words, once, and as many rows. Raises
    `TemplateError`.
    """
    if place_of(template) == place:
        return template
    spans = template.spans
    if len(spans) != 1:
        raise TemplateError(
            f"template.place: {place!r} moves one [[span]], and the template has {len(spans)}; "
            "join them, or leave template.place out"
        )
    parts = [part for part in map(_without_span, _parts(template)) if part.pieces]
    if place == "system":
        if template.text is not None:
            raise TemplateError(
                "template.place: 'system', but the template is plain text, which has no system "
                "message; choose 'before', 'after' or 'around'"
            )
        system = [Piece("span", spans[0])]
        if parts and parts[0].role == "system":
            system = [*parts.pop(0).pieces, _GAP, *system]
        parts.insert(0, _Part("system", tuple(system)))
    query = _query(parts)
    if query is None:
        raise TemplateError(
            f"template.place: {place!r}, but without the span the template has no query; write "
            "the query's {columns} into template.user"
        )
    before, after = {
        "before": (spans[0], ""),
        "after": ("", spans[0]),
        "around": _halves(spans[0]) if place == "around" else ("", ""),
    }.get(place, ("", ""))
    pieces = [*parts[query].pieces]
    if after:
        at = len(pieces) if template.text is None else _end_of_line(pieces)
        pieces[at:at] = [_GAP, Piece("span", after)]
    if before:
        pieces[:0] = [Piece("span", before), _GAP]
    parts[query] = _Part(parts[query].role, tuple(pieces))
    if template.text is not None:
        return Template.plain(write(parts[0].pieces))
    messages = tuple(Message(part.role, write(part.pieces)) for part in parts)
    return Template(messages=messages, options=template.options)


@final
class _Part(NamedTuple):
    """A message, or the plain text with "" as its role, in pieces."""

    role: str
    pieces: tuple[Piece, ...]


def _parts(template: Template) -> list[_Part]:
    if template.text is not None:
        return [_Part("", parse(template.text, "template.text"))]
    return [_Part(m.role, parse(m.content, f"template.{m.role}")) for m in template.messages]


def _query(parts: Sequence[_Part]) -> int | None:
    return next((i for i in reversed(range(len(parts))) if parts[i].role in ("user", "")), None)


def _without_span(part: _Part) -> _Part:
    """Without the span and the white space that set it off; no pieces if nothing else is left."""
    at = next((i for i, piece in enumerate(part.pieces) if piece.kind == "span"), None)
    if at is None:
        return part
    left, right = list(part.pieces[:at]), list(part.pieces[at + 1 :])
    gaps = [""]
    if left and left[-1].kind == "text":
        text = left.pop().text
        gaps.append(text[len(text.rstrip()) :])
        left += [Piece("text", text.rstrip())] if text.strip() else []
    if right and right[0].kind == "text":
        text = right.pop(0).text
        gaps.append(text[: len(text) - len(text.lstrip())])
        right[:0] = [Piece("text", text.lstrip())] if text.strip() else []
    between = [Piece("text", max(gaps, key=len))] if left and right else []
    return _Part(part.role, (*left, *between, *right))


def _halves(words: str) -> tuple[str, str]:
    """The words in two, at the end of a sentence if there is one, as near the middle as can be."""
    for gap in (r"(?<=[.!?])\s+(?=\S)", r"(?<=\S)\s+(?=\S)"):
        cuts = [found.span() for found in re.finditer(gap, words)]
        if cuts:
            end, start = min(cuts, key=lambda cut: abs(sum(cut) - len(words)))
            return words[:end], words[start:]
    raise TemplateError(
        f"template.place: 'around' parts the span's words in two, and {quote(words, 40)} is one "
        "word; choose another place, or write more words"
    )


def _end_of_line(pieces: list[Piece]) -> int:
    """Where the line of the last column ends, at which a text is cut in two, in place."""
    at = max((i + 1 for i, piece in enumerate(pieces) if piece.kind == "column"), default=0)
    while at < len(pieces):
        line, found, _ = pieces[at].text.partition("\n")
        if found:
            rest = Piece("text", pieces[at].text[len(line) :])
            pieces[at : at + 1] = [Piece("text", line), rest] if line else [rest]
            return at + bool(line)
        at += 1
    return at
