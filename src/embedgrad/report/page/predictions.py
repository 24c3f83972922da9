"""Predictions on a page: JSON within a budget of bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from embedgrad.report.figures.series import is_number
from embedgrad.report.page.run_files import RunFiles, replies_differ
from embedgrad.report.page.safe_text import script_json, shorten

# A page of 500 rows takes at most 2 MB, one of 10,000 rows 20 MB.
MOST_ROWS = 10_000
LARGEST_ROW, SMALLEST_ROW = 20_000, 1_800  # bytes
BYTES_OF_FEW = 1_900_000  # of the page, while rows may still take more than the smallest
FRAME = 330  # bytes of a row besides its texts
MARK = 12  # bytes that say how much of a text is left out
MOST_COLUMNS = 12


@final
@dataclass(frozen=True, slots=True)
class PageRows:
    """Rows as JSON for a script element, how many of each kind, and what is left out.

    `graded` says that scores lie between right and wrong.
    """

    json: str
    counts: Mapping[str, int]
    notes: tuple[str, ...]
    graded: bool = False


def page_rows(run: RunFiles, columns: Sequence[str] = (), others: int = 0) -> PageRows | None:
    """The rows of a run, changed ones first where not all have room; None where there are none.

    `columns` are those that the prompt holds; others come after them. `others` are the bytes that
    the page's other parts take of what it may take in all.
    """
    survey = run.survey
    if not survey:
        return None
    by_weight = sorted(survey, key=lambda item: (item[1]["change"] == "same", item[0]))
    chosen = {number for number, _ in by_weight[:MOST_ROWS]}
    size = max(SMALLEST_ROW, min(LARGEST_ROW, (BYTES_OF_FEW - others) // len(chosen)))
    kept, cut = [], 0
    for number, row in run.predictions():
        if number in chosen:
            compact, whole = _compact(row, number, columns, size - FRAME)
            kept.append(compact)
            cut += not whole
    changes = [item["change"] for _, item in survey]
    counts = {
        "fixed": changes.count("fixed"),
        "broken": changes.count("broken"),
        "changed": sum(item["differ"] or item["change"] != "same" for _, item in survey),
        "all": len(survey),
    }
    notes = []
    if len(survey) > len(kept):
        notes.append(
            f"{len(kept):,} of {len(survey):,} rows are on this page, changed ones first; "
            "all are in predictions.jsonl."
        )
    if cut:
        notes.append(
            f"In {cut:,} rows texts are shortened to keep this page small; each says by how much "
            "and names its line of predictions.jsonl, where it is whole."
        )
    scores = (item[name]["correct"] for _, item in survey for name in ("text", "refined"))
    return PageRows(script_json(kept), counts, tuple(notes), any(0 < score < 1 for score in scores))


def _compact(
    row: Mapping[str, Any], number: int, columns: Sequence[str], budget: int
) -> tuple[dict[str, Any], bool]:
    """A row with short names and short texts, and whether its texts are whole."""
    given = row.get("columns", {})
    names = [name for name in columns if name in given]
    names += [name for name in given if name not in columns]
    more = len(names) - MOST_COLUMNS
    names = names[:MOST_COLUMNS]
    text, refined = row["text"], row["refined"]
    texts = [row["source"], row["answer"], text["predicted"], refined["predicted"]]
    texts += [*names, *(given[name] for name in names)]
    shown = shorten(texts, budget - MARK * len(texts))
    source, answer, first, second, *rest = shown
    compact: dict[str, Any] = {
        "n": number,
        "source": source,
        "answer": answer,
        "change": row["change"],
        "differ": replies_differ(row),
        "main": sum(name in columns for name in names),
        "columns": list(zip(rest[: len(names)], rest[len(names) :], strict=True)),
        "text": _reply(text, first),
        "refined": _reply(refined, second),
    }
    if more > 0:
        compact["more"] = more
    return compact, more <= 0 and all(isinstance(part, str) for part in shown)


def _reply(answered: Mapping[str, Any], text: Any) -> dict[str, Any]:
    score = answered["correct"]
    reply: dict[str, Any] = {"said": text, "right": score >= 1}
    if 0 < score < 1:
        reply["score"] = round(score, 4)
    if is_number(loss := answered.get("loss")):
        reply["loss"] = round(loss, 4)
    if answered.get("probabilities"):
        reply["sure"] = round(max(answered["probabilities"]), 4)
    if answered.get("cut"):
        reply["cut"] = True
    return reply
