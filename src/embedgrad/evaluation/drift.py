"""How far refined rows have moved from the text's rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from torch import Tensor

from embedgrad.evaluation.evaluator import Evaluator, summarize
from embedgrad.events import Report, quiet, scoring
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.vision import VisionModel
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.prompt.sequence import TokenSequence

ROWS_AT_A_TIME = 8192  # of the embedding table


@final
@dataclass(frozen=True, slots=True)
class TokenDrift:
    """One refined row.

    `span` is the number of its span, from 1. `distance` is in norms of the start row. `nearest` are
    the vocabulary's tokens with the largest cosine to the row, `unchanged` whether the nearest one
    reads as the row's own token. `typical` is the row's norm over the vocabulary's mean norm.
    """

    span: int
    token: str
    distance: float
    cosine: float
    nearest: tuple[str, ...]
    unchanged: bool
    typical: float


def token_drift(
    prompt: PromptEmbedding, model: LanguageModel | VisionModel, *, nearest: int = 3
) -> list[TokenDrift]:
    """Drift of every row, with its nearest vocabulary tokens by cosine.

    Without a vocabulary, as for images, the mean drift of each layer's rows.
    """
    if isinstance(model, VisionModel):
        return _layer_drift(prompt)
    table = model.vocabulary_rows()
    rows, start = (r[:, : table.shape[1]].to(table) for r in (prompt.rows, prompt.start_rows))
    ids = nearest_tokens(rows, table, nearest)
    tokenizer, own = model.tokenizer, prompt.prompt_ids
    mean_norm = table.norm(dim=1).mean().item()
    same = nearest_tokens(start, table, 1)
    tokens = [(n, token) for n, span in enumerate(prompt.spans, 1) for token in span.tokens]
    return [
        TokenDrift(
            span=number,
            token=readable(token, tokenizer, own[p]),
            distance=prompt.drift[p].item(),
            cosine=prompt.cosine[p].item(),
            # A padded table has rows without a token.
            nearest=tuple(
                readable(tokenizer.convert_ids_to_tokens(i) or f"[row-{i}]", tokenizer, i)
                for i in ids[p]
            ),
            # Twins in the table (equal rows) count as the token itself.
            unchanged=ids[p][0] in (own[p], same[p][0]),
            typical=rows[p].norm().item() / mean_norm,
        )
        for p, (number, token) in enumerate(tokens)
    ]


def _layer_drift(prompt: PromptEmbedding) -> list[TokenDrift]:
    """Means over the rows of a span that are called alike but for the last word, a number."""
    drifts = []
    for number, (span, place) in enumerate(
        zip(prompt.spans, prompt.places().values(), strict=True), 1
    ):
        own: dict[str, list[int]] = {}
        for row, token in enumerate(span.tokens, place.start):
            own.setdefault(token.rpartition(" ")[0] or token, []).append(row)
        for name, rows in own.items():
            far, alike = prompt.drift[rows].mean().item(), prompt.cosine[rows].mean().item()
            norms = prompt.rows[rows].norm(dim=1) / prompt.start_rows[rows].norm(dim=1)
            label = f"{span.text}: {name}"
            typical = norms.mean().item()
            drifts.append(TokenDrift(number, label, far, alike, (), True, typical))
    return drifts


def drift_facts(prompt: PromptEmbedding, tokens: Sequence[TokenDrift]) -> dict[str, Any]:
    """What a result holds of the rows: means and extremes of all, and `token_drift`'s rows.

    "spans" has the same for each span, where there are several.
    """

    def facts(place: slice, number: int = 0) -> dict[str, Any]:
        drift, cosine = prompt.drift[place], prompt.cosine[place]
        part = [token for token in tokens if number in (0, token.span)]
        return {
            "drift": {"mean": drift.mean().item(), "max": drift.max().item()},
            "cosine": {"mean": cosine.mean().item(), "min": cosine.min().item()},
            "nearest_tokens_unchanged": sum(t.unchanged for t in part) / len(part),
        }

    spans = [facts(place, number) for number, place in enumerate(prompt.places().values(), 1)]
    several = {"spans": spans} if len(spans) > 1 else {}
    return {**facts(slice(None)), **several, "tokens": [asdict(token) for token in tokens]}


def nearest_tokens(rows_PD: Tensor, table_VD: Tensor, count: int) -> list[list[int]]:
    """Ids of the `count` tokens with the largest cosine to each row, best first."""
    rows = torch.nn.functional.normalize(rows_PD, dim=1)
    parts = [
        rows @ torch.nn.functional.normalize(part, dim=1).T
        for part in torch.split(table_VD, ROWS_AT_A_TIME)
    ]
    best: list[list[int]] = torch.cat(parts, dim=1).topk(count, dim=1).indices.tolist()
    return best


def row_worth(
    prompt: PromptEmbedding,
    evaluator: Evaluator,
    sequences: Sequence[TokenSequence],
    report: Report = quiet,
) -> list[dict[str, float]]:
    """What is lost when one row alone goes back to text, measured on `sequences`.

    Per row: `accuracy` and `log_loss` (nats) lost; positive means that the refined row helps.
    Measured one row at a time, so the numbers do not add up to the whole gain.
    """
    evaluator, choices = evaluator.greedy, evaluator.target.choices
    whole = summarize(evaluator.score(prompt.rows, sequences), choices)
    worth = []
    for p in range(len(prompt.rows)):
        rows = prompt.rows.clone()
        rows[p] = prompt.start_rows[p]
        without = summarize(evaluator.score(rows, sequences), choices)
        worth.append(
            {
                "accuracy": whole.accuracy - without.accuracy,
                "log_loss": without.log_loss - whole.log_loss,
            }
        )
        report(scoring("each row alone", p + 1, len(prompt.rows)))
    return worth


def readable(token: str, tokenizer: Any, token_id: int) -> str:
    """A token as text, with spaces and line feeds visible."""
    text = str(tokenizer.decode([token_id]))
    if not text or "�" in text:
        text = token
    return text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")
