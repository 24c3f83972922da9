"""What notebooks show of a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from embedgrad.report.page.safe_text import readable

MOST = 50  # tokens
BLANKS = str.maketrans("\u0120\u2581\u010a", "\u00b7\u00b7\u21b5")  # as tokenizers mark them


def prompt_html(spans: Sequence[str], moved: Iterable[tuple[str, float, float]]) -> str:
    """A prompt's words, and a table of its tokens by drift, with the cosine."""
    tokens = list(moved)
    farthest = sorted(tokens, key=lambda token: -token[1])[:MOST]
    words = " ... ".join(f"<q>{_safe(text)}</q>" for text in spans)
    rows = "".join(
        f"<tr><td>{_safe(token.translate(BLANKS))}</td><td>{drift:.3f}</td><td>{cosine:.3f}</td></tr>"
        for token, drift, cosine in farthest
    )
    left = f"<p>{len(tokens) - MOST} tokens more</p>" if len(tokens) > MOST else ""
    head = "<tr><th>token</th><th>drift</th><th>cosine</th></tr>"
    return f"<p>refined: {words}</p><table>{head}{rows}</table>{left}"


def _safe(text: str) -> str:
    return escape(readable(text))
