"""Per-class scores and confusion matrices of both prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from embedgrad.evaluation.significance import holm, paired_test, wilson_interval
from embedgrad.evaluation.verdict import word

PROMPTS = ("text", "refined")


def per_class(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What both prompts make of each class; empty for free answers.

    `confusion[prompt]` counts (answer, prediction). `classes` holds for each label its `rows`, per
    prompt `recall` with Wilson's 95 % `interval`, `precision` and `f1` (None where undefined), and
    the `verdict` on the difference in recall, by McNemar's test, Holm-corrected over the classes.
    """
    chosen = [row for row in rows if row["text"].get("probabilities")]
    gold = [row["answer"] for row in chosen]
    predicted = {name: [row[name]["predicted"] for row in chosen] for name in PROMPTS}
    labels = sorted(set(gold).union(*predicted.values()))
    held = {label: [i for i, answer in enumerate(gold) if answer == label] for label in labels}
    p_values = _adjusted_p_values(held, predicted)
    classes = []
    for label in labels:
        scores = {name: _scores(label, gold, predicted[name]) for name in PROMPTS}
        verdict = None
        if label in p_values:
            difference = scores["refined"]["recall"] - scores["text"]["recall"]
            verdict = word(difference, p_values[label])
        classes.append({"label": label, "rows": len(held[label]), **scores, "verdict": verdict})
    confusion = {name: Counter(zip(gold, predicted[name], strict=True)) for name in PROMPTS}
    return {"confusion": confusion, "classes": classes} if chosen else {}


def _adjusted_p_values(
    held: Mapping[str, Sequence[int]], predicted: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """By class: how likely chance alone makes the difference in recall."""
    p_values = {}
    for label, rows in held.items():
        pairs = [tuple(predicted[name][i] == label for name in PROMPTS) for i in rows]
        if pairs:
            p_values[label] = paired_test([after - before for before, after in pairs])[1]
    return dict(zip(p_values, holm(list(p_values.values())), strict=True))


def _scores(label: str, gold: Sequence[str], predicted: Sequence[str]) -> dict[str, Any]:
    right = sum(g == p == label for g, p in zip(gold, predicted, strict=True))
    rows, said = gold.count(label), predicted.count(label)
    return {
        "recall": right / rows if rows else None,
        "interval": list(wilson_interval(right, rows)) if rows else None,
        "precision": right / said if said else None,
        "f1": 2 * right / (rows + said) if rows + said else None,
    }
