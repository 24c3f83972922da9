"""Find the tokens of the spans to refine.

"?" and a line feed are one token in Qwen: where fixed text next to a span merges with it, that text
is drawn into the span, so that the tokens of the refined prompt are those of the text prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, takewhile
from typing import TYPE_CHECKING, final

from embedgrad.data.examples import Example
from embedgrad.errors import DataError, TemplateError
from embedgrad.prompt.boundaries import CuttingTokenizer, Ids
from embedgrad.prompt.template import Rendered, Renderer

if TYPE_CHECKING:
    from torch import Tensor

DRAWN_AT_MOST = 16  # characters of fixed text on either side
ROWS_TO_FIT = 8  # rows that decide what is drawn in


@final
@dataclass(frozen=True, slots=True)
class Span:
    """The refined text with what was drawn into it, its token ids, and how each token reads."""

    text: str
    ids: Ids
    tokens: tuple[str, ...]
    drawn_left: str = ""
    drawn_right: str = ""


def find_spans(
    renderer: Renderer, tokenizer: CuttingTokenizer, rows: Sequence[Example]
) -> tuple[Span, ...]:
    """Every span with the least text drawn in for which cut and uncut tokens of `rows` agree.

    Where no choice makes all rows agree, the one that makes most agree. One span never draws in
    another's text. Raises `TemplateError` for a span without tokens, and `DataError` without rows.
    """
    if not rows:
        raise DataError("no rows to tokenize the template with; give at least one example")
    rendered = [renderer(row.columns) for row in rows[:ROWS_TO_FIT]]
    # What stays the same for quite other values of every column is fixed.
    names = renderer.template.columns
    probes = [renderer(dict.fromkeys(names, value)) for value in ("a.", "(b)")]
    plain = [tokenizer.plain(r.text) for r in rendered]
    spans: list[Span] = []
    for number, text in enumerate(renderer.template.spans):
        if not tokenizer.suffix(text):
            raise TemplateError(
                f"template: the span {text!r} tokenizes to nothing; write words into it"
            )
        left = _common(r.texts[number][::-1] for r in (*rendered, *probes))[:DRAWN_AT_MOST]
        right = _common(r.texts[number + 1] for r in (*rendered, *probes))[:DRAWN_AT_MOST]
        widths = sorted(
            ((i, j) for i in range(len(left) + 1) for j in range(len(right) + 1)),
            key=lambda pair: (sum(pair), pair),
        )
        most, ids, drawn = 0, tokenizer.suffix(text), (0, 0)
        for width in widths:
            wider = [r.draw_in(number, *width) for r in rendered]
            middle, agreeing = _middle(tokenizer, wider, plain, number)
            if agreeing > most:
                most, ids, drawn = agreeing, middle, width
            if agreeing == len(rendered):
                break
        # The next span finds the text between them shorter by what this one took.
        rendered = [r.draw_in(number, *drawn) for r in rendered]
        probes = [r.draw_in(number, *drawn) for r in probes]
        tokens = tuple(tokenizer.tokenizer.convert_ids_to_tokens(list(ids)))
        before, after = left[: drawn[0]][::-1], right[: drawn[1]]
        spans.append(Span(before + text + after, ids, tokens, before, after))
    return tuple(spans)


def _middle(
    tokenizer: CuttingTokenizer, rendered: Sequence[Rendered], plain: Sequence[Ids], number: int
) -> tuple[Ids, int]:
    """A span's ids, cut from the plain ones, and for how many rows they are these."""
    middles: Counter[Ids] = Counter()
    for r, ids in zip(rendered, plain, strict=True):
        at = 2 * number + 1
        prefix = tokenizer.prefix("".join(r.pieces[:at]), r.text)
        suffix = tokenizer.suffix("".join(r.pieces[at + 1 :]))
        middle = ids[len(prefix) : len(ids) - len(suffix)]
        if middle and ids == prefix + middle + suffix:
            middles[middle] += 1
    return middles.most_common(1)[0] if middles else ((), 0)


def _common(texts: Iterable[str]) -> str:
    """Longest common beginning."""
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    return "".join(letters[0] for letters in same)


def rows_by_span(rows_PD: Tensor, spans: Sequence[Span]) -> dict[str, Tensor]:
    """The rows of all spans, one behind the other, as a prompt: by the names of `span_places`."""
    return {name: rows_PD[place] for name, place in span_places(spans).items()}


def span_places(spans: Sequence[Span]) -> dict[str, slice]:
    """Which of all rows each span has: "span", or "span 1", "span 2" and so on, in order."""
    edges = accumulate((len(span.ids) for span in spans), initial=0)
    names = [f"span {number}" for number in range(1, len(spans) + 1)]
    slices = (slice(*edge) for edge in pairwise(edges))
    return dict(zip(names if len(names) > 1 else ["span"], slices, strict=True))
