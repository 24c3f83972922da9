"""The page of rows that are ranked by how suspicious their labels are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from embedgrad.report.page.page import Page
from embedgrad.report.page.predictions import PageRows, count_kinds, fit_rows

RANKING = "ranking.jsonl"


def suspects_page(
    result: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    name: str,
    columns: Sequence[str] = (),
) -> str:
    """The page of a `CleanResult` and its ranking; `columns` are those of the template."""
    page = Page([])
    top = page.render("suspects_top", {"name": name, "result": result})
    parts = [page.part("suspects", lambda: {"result": result}), ""]  # the rows stand between
    return page.whole(
        name,
        top,
        parts,
        lambda taken: _suspect_rows(rows, columns, taken, result["most"]),
        "flagged",
        "",
    )


def _suspect_rows(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], others: int, most: int
) -> PageRows:
    """The ranking's rows as cards: given label, what the model says, and how suspicious it is."""

    def mark(row: Mapping[str, Any]) -> dict[str, Any]:
        badge = f"{row['rank']}: suspicion {row['suspicion']:.2f}, harm {row['harm']:+.2f}"
        return {
            "badge": ["broken" if row["harm"] > 0 else "same", badge],
            "kinds": _kinds(row, most),
        }

    numbered = [(row["rank"], {**row, "answers": _describe(row)}) for row in rows]
    by_weight = [number for number, _ in numbered]
    json, notes = fit_rows(
        numbered, by_weight, columns, others, mark, first="the most suspicious", file=RANKING
    )
    titles = {
        "dropped": "cleaned.jsonl lacks them",
        "flagged": "dev would be better if they counted less",
        "contradicted": "the model says something else",
    }
    kinds = count_kinds(titles, [_kinds(row, most) for row in rows])
    return PageRows(json, kinds, notes, RANKING, "label")


def _kinds(row: Mapping[str, Any], most: int) -> list[str]:
    kinds = {
        "dropped": row["rank"] <= most and row["harm"] > 0,
        "flagged": row["harm"] > 0,
        "contradicted": row.get("suggested", row["answer"]) != row["answer"],
    }
    return [kind for kind, holds in kinds.items() if holds]


def _describe(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the model says of a row, as a card's reply."""
    if "suggested" not in row:
        return {}
    said = {
        "predicted": row["suggested"],
        "correct": float(row["suggested"] == row["answer"]),
        "loss": row["loss"],
        "probabilities": list(row["probabilities"].values()),
    }
    return {"the model": said}
