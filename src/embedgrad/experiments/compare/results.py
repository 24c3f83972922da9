"""The results of a comparison as plain values: a row per run, an entry per method."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch

from embedgrad.environment import peak_memory, versions
from embedgrad.errors import RunError
from embedgrad.evaluation.evaluator import summarize
from embedgrad.evaluation.significance import bootstrap_mean, paired_p_value
from embedgrad.evaluation.verdict import row_differences, verdicts
from embedgrad.experiments.baselines.base import Answers
from embedgrad.experiments.compare.folder import Folder, Part
from embedgrad.experiments.compare.recipe_diff import recipe_digest
from embedgrad.model.loading import ModelInfo
from embedgrad.recipe.recipe import Recipe

TEXT = Part("text", None)


def scores_of(answers: Answers, choices: Sequence[str], seconds: float) -> dict[str, Any]:
    """What is kept of a part's answers to the test rows."""
    summary = asdict(summarize(answers.answered, choices))
    return {
        **summary,
        "interval": list(summary["interval"]),
        "tokens": fmean(answers.tokens),
        "scoring_seconds": seconds,
        **_judged_rows([answer.correct for answer in answers.answered]),
    }


def _judged_rows(scores: Sequence[float]) -> dict[str, Any]:
    """Right or wrong, a digit a row; where a function of the user's own says between, that too."""
    graded = any(score not in (0, 1) for score in scores)
    digits = "".join(str(round(score)) for score in scores)
    return {"correct": digits, "scores": list(scores) if graded else None}


def results_of(folder: Folder, recipe: Recipe, info: ModelInfo) -> dict[str, Any]:
    """Everything in the folder that is finished; without the text prompt's scores no rows."""
    parts = folder.finished()
    scores = {part: folder.scores(part) for part in parts}
    facts = {part: folder.training(part).facts for part in parts}
    rows = []
    for part in parts if TEXT in scores else ():
        if len(scores[part]["correct"]) != len(scores[TEXT]["correct"]):
            path = folder.work / part.folder / "scored.json"
            raise RunError(
                f"{path}: is of other test rows than the text prompt's; delete it to score again"
            )
        row = _row(part, facts[part], scores[part], scores[TEXT])
        rows.append({**row, "versions": folder.versions(part) or None})
    if not recipe.target.choices:
        for row in rows:
            row |= wrong_answers(folder.answers(Part(row["method"], row["seed"])))
    described = asdict(info)
    del described["path"]  # a place on one machine
    return {
        "rows": rows,
        "methods": methods_of(rows),
        "text": recipe.template.span,
        "test_rows": len(rows[0]["correct"]) if rows else 0,
        "seeds": seeds_of(parts),
        "recipe": as_compared(recipe.as_dict(), parts),
        "recipe_digest": recipe_digest(recipe),
        "model": described,
        "versions": versions("peft"),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "peak_memory_bytes": peak_memory(),
        },
    }


def wrong_answers(answers: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Free answers that are wrong: by their form, or by what they say.

    Of form are those that did not end within the limit, and those in which no answer was found.
    """
    wrong = [answer for answer in answers if answer["correct"] < 1]
    form = sum(answer["cut"] or answer["unread"] for answer in wrong)
    return {"wrong_in_form": form, "wrong_in_content": len(wrong) - form}


def _row(
    part: Part, facts: Mapping[str, Any], scores: Mapping[str, Any], text: Mapping[str, Any]
) -> dict[str, Any]:
    differences = row_differences(_scored(text), [_scored(scores)])
    return {
        "method": part.method,
        "seed": part.seed,
        "accuracy": scores["accuracy"],
        "interval": scores["interval"],
        "difference": sum(differences) / len(differences),
        "difference_interval": list(bootstrap_mean(differences)),
        "p_value": paired_p_value(differences),
        "fixed": sum(difference > 0 for difference in differences),
        "broken": sum(difference < 0 for difference in differences),
        "macro_f1": scores["macro_f1"],
        "log_loss": scores["log_loss"],
        "cut": scores["cut"],
        "unread": scores.get("unread"),
        "extra_tokens": scores["tokens"] - text["tokens"],
        "trained_numbers": facts["trained_numbers"],
        "stored_bytes": facts["stored_bytes"],
        "examples_seen": facts["examples_seen"],
        "train_seconds": facts["train_seconds"],
        "threads": facts.get("threads"),
        "scoring_seconds": scores["scoring_seconds"],
        "dev": facts["dev"],
        "history": facts.get("history", []),
        "ended": facts.get("ended"),
        "settings": facts["settings"],
        "correct": scores["correct"],
        "scores": scores.get("scores"),
    }


def methods_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """An entry per method over its seeds, judged together; the text prompt itself is not judged."""
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        runs.setdefault(row["method"], []).append(row)
    if not runs:
        return []
    (text,) = runs[TEXT.method]
    first = _scored(text)
    others = {
        name: [_scored(row) for row in found] for name, found in runs.items() if name != TEXT.method
    }
    judged = verdicts(first, others)
    entries = []
    for name, found in runs.items():
        told: dict[str, Any] = dict.fromkeys(_JUDGED)
        if name in judged:
            verdict, differences = judged[name], row_differences(first, others[name])
            found_of = verdict.difference, list(bootstrap_mean(differences)), verdict.p_value
            told = dict(zip(_JUDGED, (*found_of, verdict.p_holm, verdict.words), strict=True))
        entries.append({"method": name, **_entry(found), **told})
    return entries


_JUDGED = ("difference", "difference_interval", "p_value", "p_holm", "verdict")


def _entry(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    accuracies, f1 = [row["accuracy"] for row in rows], [row["macro_f1"] for row in rows]
    means = ("log_loss", "extra_tokens", "train_seconds", "scoring_seconds")
    most = ("trained_numbers", "stored_bytes", "examples_seen")
    wrong = ("wrong_in_form", "wrong_in_content")  # of free answers
    return {
        "runs": len(rows),
        "seeds": [row["seed"] for row in rows],
        "accuracy": fmean(accuracies),
        "min": min(accuracies),
        "max": max(accuracies),
        "macro_f1": _mean(f1),
        **{key: _mean([row[key] for row in rows]) for key in means},
        **{key: max(row[key] for row in rows) for key in most},
        **{key: fmean(row[key] for row in rows) for key in wrong if key in rows[0]},
    }


def _mean(numbers: Sequence[float | None]) -> float | None:
    """None where one is missing: free text has no macro-F1, and an infinite loss is not written."""
    there = [number for number in numbers if number is not None]
    return fmean(there) if len(there) == len(numbers) else None


def as_compared(recipe: Mapping[str, Any], parts: Sequence[Part]) -> dict[str, Any]:
    """A recipe's values with the methods and seeds that are there, whatever was asked for last."""
    methods = list(dict.fromkeys(part.method for part in parts))
    seeds = seeds_of(parts) or recipe["compare"]["seeds"]
    return {**recipe, "compare": {**recipe["compare"], "methods": methods, "seeds": seeds}}


def seeds_of(parts: Sequence[Part]) -> list[int]:
    """Every seed that is there."""
    return sorted({part.seed for part in parts if part.seed is not None})


def _scored(judged: Mapping[str, Any]) -> list[float]:
    return judged.get("scores") or [float(digit) for digit in judged["correct"]]
