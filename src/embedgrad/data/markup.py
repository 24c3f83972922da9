"""The marks in a prompt's text.

    {name}     the row's column `name`            {{  }}       literal braces
    [[text]]   the span whose rows are refined    [[[[  ]]]]   literal double brackets

Values of columns are never parsed, so a review that contains `[[` is only a review.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

from embedgrad.errors import TemplateError

_TOKEN = re.compile(r"\{\{|\}\}|\{[^{}\n]*\}|\{|\}|\[\[\[\[|\]\]\]\]|\[\[|\](?=\]\](?!\]))|\]\]")


@final
@dataclass(frozen=True, slots=True)
class Piece:
    """One part of a message: literal text, the name of a column, or the span's text."""

    kind: str
    text: str


@functools.lru_cache(maxsize=256)
def parse(text: str, where: str) -> tuple[Piece, ...]:
    """Cut one message into pieces; `where` names it in messages of `TemplateError`."""
    pieces: list[Piece] = []
    literal: list[str] = []
    inside = False
    end = 0

    def close(kind: str) -> None:
        pieces.append(Piece(kind, "".join(literal)))
        literal.clear()

    def refuse(problem: str, position: int) -> TemplateError:
        around = text[max(0, position - 10) : position + 20]
        return TemplateError(f"{where}: {problem} at character {position} (near {around!r})")

    for match in _TOKEN.finditer(text):
        literal.append(text[end : match.start()])
        end = match.end()
        token = match.group()
        if token in ("{{", "}}", "[[[[", "]]]]", "]"):  # doubled, or a bracket before the end
            literal.append(token[: (len(token) + 1) // 2])
        elif token in ("{", "}", "{}"):
            raise refuse(f"lone {token!r}; write {{{{ or }}}} for a literal brace", match.start())
        elif token == "[[":
            if inside:
                raise refuse("a span inside a span", match.start())
            close("text")
            inside = True
        elif token == "]]":
            if not inside:
                raise refuse("']]' without '[['; write ]]]] for literal brackets", match.start())
            close("span")
            if not pieces[-1].text:
                raise refuse("an empty span; put the words to refine between [[ and ]]", end)
            inside = False
        else:
            if inside:
                raise refuse(
                    f"column {token} inside the span, whose words must be the same for every row",
                    match.start(),
                )
            close("text")
            pieces.append(Piece("column", token[1:-1]))
    literal.append(text[end:])
    if inside:
        raise refuse("a span that is not closed; end it with ]]", len(text))
    close("text")
    return tuple(piece for piece in pieces if piece.text)


def fill(pieces: Iterable[Piece], columns: Mapping[str, str]) -> str:
    """The text with the row's columns in it; a span is its own text."""
    return "".join(columns[p.text] if p.kind == "column" else p.text for p in pieces)


def write(pieces: Iterable[Piece]) -> str:
    """The text that `parse` cuts into these pieces."""
    marks = {"text": ("", ""), "column": ("{", "}"), "span": ("[[", "]]")}
    parts = []
    for piece in pieces:
        text = piece.text if piece.kind == "column" else literal(piece.text)
        parts.append(text.join(marks[piece.kind]))
    return "".join(parts)


def literal(text: str) -> str:
    """The text as `parse` gives it back: braces and double brackets are doubled."""
    for mark in ("{", "}", "[[", "]]"):
        text = text.replace(mark, 2 * mark)
    return text
