"""The refined text in tokens, with as little fixed text drawn in as the tokenizer asks for.

"?" and a line feed are one token in Qwen: where fixed text next to the span merges with it, that
text is drawn into the span, so that the tokens of the refined prompt are those of the text prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from embedgrad.data.examples import Example
from embedgrad.errors import DataError, TemplateError
from embedgrad.prompt.boundaries import CuttingTokenizer, Ids
from embedgrad.prompt.template import Rendered, Renderer

DRAWN_AT_MOST = 16  # characters of fixed text on either side
ROWS_TO_FIT = 8  # rows that decide what is drawn in


@dataclass(frozen=True, slots=True)
class Span:
    """The refined text with what was drawn into it, its token ids, and how each token reads."""

    text: str
    ids: Ids
    tokens: tuple[str, ...]
    drawn_left: str = ""
    drawn_right: str = ""


def find_span(renderer: Renderer, tokenizer: CuttingTokenizer, rows: Sequence[Example]) -> Span:
    """The span with the least text drawn in for which cut and uncut tokens of `rows` agree.

    Where no choice makes all rows agree, the one that makes most agree. Raises `TemplateError` for
    a span without tokens, and `DataError` without rows.
    """
    if not rows:
        raise DataError("no rows to tokenize the template with; give at least one example")
    text = renderer.template.span
    if not tokenizer.suffix(text):
        raise TemplateError(
            f"template: the span {text!r} tokenizes to nothing; write words into it"
        )
    rendered = [renderer(row.columns) for row in rows[:ROWS_TO_FIT]]
    plain = [tokenizer.plain(r.text) for r in rendered]
    left, right = _fixed_text(renderer, rendered)
    widths = sorted(
        ((i, j) for i in range(len(left) + 1) for j in range(len(right) + 1)),
        key=lambda pair: (sum(pair), pair),
    )
    most, ids, drawn = 0, tokenizer.suffix(text), ("", "")
    for i, j in widths:
        middle, agreeing = _middle(tokenizer, rendered, plain, i, j)
        if agreeing > most:
            most, ids, drawn = agreeing, middle, (left[len(left) - i :], right[:j])
        if agreeing == len(rendered):
            break
    tokens = tuple(tokenizer.tokenizer.convert_ids_to_tokens(list(ids)))
    return Span(drawn[0] + text + drawn[1], ids, tokens, *drawn)


def _middle(
    tokenizer: CuttingTokenizer, rendered: Sequence[Rendered], plain: Sequence[Ids], i: int, j: int
) -> tuple[Ids, int]:
    """The span's ids with i and j characters drawn in, and for how many rows they are these."""
    middles: Counter[Ids] = Counter()
    for r, ids in zip(rendered, plain, strict=True):
        prefix = tokenizer.prefix(r.prefix[: len(r.prefix) - i], r.text)
        suffix = tokenizer.suffix(r.suffix[j:])
        middle = ids[len(prefix) : len(ids) - len(suffix)]
        if middle and ids == prefix + middle + suffix:
            middles[middle] += 1
    return middles.most_common(1)[0] if middles else ((), 0)


def _fixed_text(renderer: Renderer, rendered: Sequence[Rendered]) -> tuple[str, str]:
    """The text on either side of the span that no column reaches."""
    # What stays the same for quite other values of every column is fixed.
    names = renderer.template.columns
    probes = [renderer(dict.fromkeys(names, value)) for value in ("a.", "(b)")]
    left = _common(r.prefix[::-1] for r in (*rendered, *probes))[::-1]
    right = _common(r.suffix for r in (*rendered, *probes))
    return left[-DRAWN_AT_MOST:], right[:DRAWN_AT_MOST]


def _common(texts: Iterable[str]) -> str:
    """Longest common beginning."""
    first, *rest = texts
    for i, character in enumerate(first):
        if any(text[i : i + 1] != character for text in rest):
            return first[:i]
    return first
