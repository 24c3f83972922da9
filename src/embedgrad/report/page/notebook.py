"""What notebooks show of prompts and results, in the notebook's own colors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any, TypeVar, cast, final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from embedgrad.formatting import BLANKS
from embedgrad.report.page.safe_text import readable, without_home
from embedgrad.report.terminal.tables import Sentence

MOST = 50  # tokens
CELL = "white-space:nowrap"
WIDE = "display:block;overflow-x:auto"  # a narrow page scrolls it

T = TypeVar("T")


@final
class _Shown(dict[str, Any]):
    __slots__ = ("_table",)

    def __init__(self, values: Any, table: Callable[[Mapping[str, Any]], RenderableType]):
        super().__init__(values)
        self._table = table

    def _repr_html_(self) -> str:
        return or_else("result", lambda: table_html(self._table(self)))


def shown_as(table: Callable[[Mapping[str, Any]], RenderableType], values: T) -> T:
    """The same dict, which a notebook shows by the table that a terminal shows of it."""
    return cast(T, _Shown(values, table))


def or_else(name: str, make: Callable[[], str]) -> str:
    """What `make` returns; the name where it fails, as a notebook shows a traceback instead."""
    try:
        return make()
    except Exception:
        return f"<pre>{name}</pre>"


def table_html(shown: RenderableType) -> str:
    """Tables and lines for a terminal as HTML."""
    match shown:
        case Group():
            return "".join(map(table_html, shown.renderables))
        case Table():
            sides = [column.justify for column in shown.columns]
            head = _row("th", sides, [column.header for column in shown.columns])
            rows = zip(*(column.cells for column in shown.columns), strict=True)
            styles = (str(row.style) for row in shown.rows)
            body = (_row("td", sides, cells, s) for cells, s in zip(rows, styles, strict=True))
            return f'<table style="{WIDE}">{head}{"".join(body)}</table>'
        case Sentence():
            indent = f"padding-left:{shown.indent}ch"
            return f'<div style="{indent}">{_style(shown.text, shown.style)}</div>'
        case Text():
            return f"<div>{_style(shown.plain, str(shown.style))}</div>"
    return "<br>"  # a blank line


def prompt_html(prompt: Any) -> str:
    """A `PromptEmbedding`'s words, and a table of its tokens by drift, with the cosine."""
    tokens = [token.translate(BLANKS) for span in prompt.spans for token in span.tokens]
    moved = [*zip(tokens, prompt.drift.tolist(), prompt.cosine.tolist(), strict=True)]
    farthest = sorted(moved, key=lambda token: -token[1])[:MOST]
    texts = (span.text.replace("\n", "\u21b5") for span in prompt.spans)
    words = " ... ".join(f"<q>{_safe(text)}</q>" for text in texts)
    sides = ("left", "right", "right")
    rows = (_row("td", sides, (token, f"{d:.3f}", f"{c:.3f}")) for token, d, c in farthest)
    left = f"<div>{len(tokens) - MOST} tokens more</div>" if len(tokens) > MOST else ""
    head = _row("th", sides, ("token", "drift", "cosine"))
    return f"<div>refined: {words}</div><table>{head}{''.join(rows)}</table>{left}"


def _row(tag: str, sides: Sequence[str], cells: Iterable[RenderableType], style: str = "") -> str:
    pairs = zip(sides, cells, strict=True)
    made = (
        f'<{tag} style="{CELL};text-align:{s}">{_style(str(c), style)}</{tag}>' for s, c in pairs
    )
    return f"<tr>{''.join(made)}</tr>"


def _style(text: str, style: str) -> str:
    return f"<b>{_safe(text)}</b>" if "bold" in style else _safe(text)


def _safe(text: str) -> str:
    return escape(readable(without_home(text)))
