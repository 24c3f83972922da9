"""Results of a comparison as plain values, a row per part."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, NotRequired, TypedDict, final

import torch

from embedgrad.data.examples import Example
from embedgrad.environment import peak_memory, versions
from embedgrad.errors import RunError
from embedgrad.evaluation.evaluator import summarize
from embedgrad.evaluation.per_group import GroupScore, group_scores, worst
from embedgrad.evaluation.regret import regrets
from embedgrad.evaluation.sampled import Sampled
from embedgrad.evaluation.significance import bootstrap_mean, paired_test, score_interval
from embedgrad.evaluation.verdict import row_differences, verdicts
from embedgrad.experiments.baselines import Answers
from embedgrad.experiments.compare.folder import FACTS, Folder, Part
from embedgrad.experiments.compare.recipe_diff import recipe_digest
from embedgrad.model.loading import ModelInfo
from embedgrad.recipe.recipe import Recipe
from embedgrad.report.page.run_files import RESULT_VERSION

TEXT = Part("text", None)
OF_SCORES = (
    *("accuracy", "interval", "macro_f1", "log_loss", "cut", "unread", "sampled"),
    *("scoring_seconds", "correct", "scores", "sampled_scores"),
)
OF_TRAINING = (*sorted(FACTS), "threads", "ended")


@final
class MethodRun(TypedDict):
    """One method with one seed, and its difference to the text prompt on the same rows.

    `correct` has a digit per test row; `scores` has numbers per row where a scorer grades;
    `sampled_scores` has the mean score of each row's sampled answers, where there are any;
    `regrets` the pessimistic regret of every decision, with the objective of that name.
    """

    method: str
    seed: int | None
    accuracy: float
    interval: list[float]
    macro_f1: float | None
    log_loss: float | None
    cut: int
    unread: int | None
    wrong_in_form: NotRequired[int]
    wrong_in_content: NotRequired[int]
    sampled: Sampled | None
    correct: str
    scores: list[float] | None
    sampled_scores: list[float] | None
    regrets: NotRequired[list[float]]
    groups: NotRequired[list[GroupScore]]
    worst_group: NotRequired[GroupScore]
    difference: float
    difference_interval: list[float]
    p_value: float
    fixed: int
    broken: int
    trained_numbers: int
    stored_bytes: int
    examples_seen: int
    train_seconds: float
    scoring_seconds: float
    extra_tokens: float
    dev: dict[str, float] | None
    settings: dict[str, Any]
    threads: int | None
    ended: str | None
    history: list[dict[str, float]]
    versions: dict[str, str] | None


@final
class MethodResult(TypedDict):
    """One method over its seeds; the text prompt has no difference to itself."""

    method: str
    runs: int
    seeds: list[int | None]
    accuracy: float
    interval: list[float]
    min: float
    max: float
    macro_f1: float | None
    log_loss: float | None
    wrong_in_form: NotRequired[float]
    wrong_in_content: NotRequired[float]
    sampled: NotRequired[dict[str, Any]]
    regret: NotRequired[dict[str, Any]]
    groups: NotRequired[list[GroupScore]]
    worst_group: NotRequired[GroupScore]
    difference: float | None
    difference_interval: list[float] | None
    p_value: float | None
    p_holm: float | None
    verdict: str | None
    trained_numbers: int
    stored_bytes: int
    examples_seen: int
    train_seconds: float | None
    scoring_seconds: float | None
    extra_tokens: float | None


@final
class CompareResult(TypedDict):
    """The content of `results.json`; `skipped` and `failed` say why, by method."""

    methods: list[MethodResult]
    rows: list[MethodRun]
    text: str
    test_rows: int
    seeds: list[int]
    group_column: NotRequired[str]
    skipped: dict[str, str]
    failed: dict[str, str]
    interrupted: bool
    planned: int
    trained: int
    scored: int
    recipe: dict[str, Any]
    recipe_digest: str
    model: dict[str, Any]
    data: dict[str, Any]
    solutions: dict[str, Any]
    shared: dict[str, str]
    versions: dict[str, str]
    machine: dict[str, Any]
    version: int


def scores_of(answers: Answers, choices: Sequence[str], seconds: float) -> dict[str, Any]:
    """The scores of a part's answers: a summary, and a digit per test row (0 wrong, 1 right).

    `scores` has numbers per row if a user's scorer gave any between 0 and 1.
    """
    summary = asdict(summarize(answers.answered, choices))
    scores = [answer.correct for answer in answers.answered]
    return {
        **summary,
        "interval": list(summary["interval"]),
        "tokens": fmean(answers.tokens),
        "scoring_seconds": seconds,
        "correct": "".join(str(round(score)) for score in scores),
        "scores": scores if any(score not in (0, 1) for score in scores) else None,
        "sampled_scores": [fmean(answer.sample_scores) for answer in answers.answered]
        if summary["sampled"]
        else None,
    }


def results_of(
    folder: Folder, recipe: Recipe, info: ModelInfo, examples: Sequence[Example]
) -> dict[str, Any]:
    """All finished parts of the folder; no rows while the text prompt is not scored.

    `examples` are the test rows.
    """
    column = recipe.group_column
    groups = [] if column is None else [example.group_in(column) for example in examples]
    parts = folder.finished_parts()
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
        row["versions"] = folder.versions(part) or None
        if not recipe.target.choices:
            row |= wrong_answers(folder.answers(part))
        if recipe.parts.objective.decides:
            answers = folder.scored_answers(part, len(examples))
            row["regrets"] = regrets(recipe.parts.objective, examples, answers)
        row |= _by_group(groups, _scores(row))
        rows.append(row)
    model = asdict(info)
    del model["path"]  # of this machine only
    return {
        "version": RESULT_VERSION,
        "rows": rows,
        "methods": methods_of(rows, groups),
        "text": " ".join(recipe.template.spans),
        "test_rows": len(rows[0]["correct"]) if rows else 0,
        "seeds": seeds_of(parts),
        **({"group_column": column} if groups else {}),
        "recipe": recipe_of_parts(recipe.as_dict(), parts),
        "recipe_digest": recipe_digest(recipe),
        "model": model,
        "versions": versions("peft"),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "peak_memory_bytes": peak_memory(),
        },
    }


def predictions_of(
    folder: Folder, examples: Sequence[Example], column: str | None = None
) -> Iterator[dict[str, Any]]:
    """Every test row with the answers of all finished parts, and its group in a column.

    Raises `RunError` for damage.
    """
    parts = folder.finished_parts()
    answered = [folder.scored_answers(part, len(examples)) for part in parts]
    for example, *answers in zip(examples, *answered, strict=True):
        yield {
            "source": example.source,
            "answer": example.answer,
            "columns": dict(example.columns),
            **({} if column is None else {"group": example.group_in(column)}),
            "answers": [
                {**part._asdict(), "predicted": answer.predicted, "correct": answer.correct}
                for part, answer in zip(parts, answers, strict=True)
            ],
        }


def wrong_answers(answers: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many free answers are wrong: in form (no end, or no answer found) or in content."""
    wrong = [answer for answer in answers if answer["correct"] < 1]
    form = sum(answer["cut"] or answer["unread"] for answer in wrong)
    return {"wrong_in_form": form, "wrong_in_content": len(wrong) - form}


def _row(
    part: Part, facts: Mapping[str, Any], scores: Mapping[str, Any], text: Mapping[str, Any]
) -> dict[str, Any]:
    differences = row_differences(_scores(text), [_scores(scores)])
    return {
        "method": part.method,
        "seed": part.seed,
        "difference": sum(differences) / len(differences),
        "difference_interval": list(bootstrap_mean(differences)),
        "p_value": paired_test(differences)[1],
        "fixed": sum(difference > 0 for difference in differences),
        "broken": sum(difference < 0 for difference in differences),
        **{name: scores.get(name) for name in OF_SCORES},
        "extra_tokens": scores["tokens"] - text["tokens"],
        **{name: facts.get(name) for name in OF_TRAINING},
        "history": facts.get("history", []),
    }


def methods_of(
    rows: Sequence[Mapping[str, Any]], groups: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """An entry per method over its seeds, tested together against the text prompt.

    `groups` are those of the test rows, where scores are given by group.
    """
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        runs.setdefault(row["method"], []).append(row)
    if not runs:
        return []
    (text,) = [_scores(row) for row in runs[TEXT.method]]
    others = {
        name: [_scores(row) for row in rows] for name, rows in runs.items() if name != TEXT.method
    }
    tests: dict[str, dict[str, Any]] = {
        name: {
            "difference": verdict.difference,
            "difference_interval": list(bootstrap_mean(row_differences(text, others[name]))),
            "p_value": verdict.p_value,
            "p_holm": verdict.p_holm,
            "verdict": verdict.words,
        }
        for name, verdict in verdicts(text, others).items()
    }
    tests[TEXT.method] = dict.fromkeys(
        ("difference", "difference_interval", "p_value", "p_holm", "verdict")
    )
    return [
        {
            "method": name,
            **_entry(rows),
            "interval": list(score_interval(_mean_scores(rows))),
            **_by_group(groups, _mean_scores(rows)),
            **tests[name],
            **_sampled(rows, runs[TEXT.method][0]),
            **_regret(rows, runs[TEXT.method][0]),
        }
        for name, rows in runs.items()
    ]


def _sampled(rows: Sequence[Mapping[str, Any]], text: Mapping[str, Any]) -> dict[str, Any]:
    """A method's Avg@k over its seeds, and its difference to the text prompt's, by rows."""
    every = [row.get("sampled_scores") for row in (text, *rows)]
    if not all(every):
        return {}
    before, *runs = [scores for scores in every if scores]
    means = [fmean(scores) for scores in zip(*runs, strict=True)]
    differences = row_differences(before, runs)
    return {
        "sampled": {
            "samples": rows[0]["sampled"]["samples"],
            "accuracy": fmean(means),
            "interval": list(bootstrap_mean(means)),
            "difference": fmean(differences),
            "difference_interval": list(bootstrap_mean(differences)),
        }
    }


def _regret(rows: Sequence[Mapping[str, Any]], text: Mapping[str, Any]) -> dict[str, Any]:
    """A method's mean regret over its seeds, and its difference to the text prompt's."""
    if "regrets" not in text:
        return {}
    means = [fmean(own) for own in zip(*(row["regrets"] for row in rows), strict=True)]
    changes = [own - before for own, before in zip(means, text["regrets"], strict=True)]
    return {
        "regret": {
            "decisions": len(means),
            "mean": fmean(means),
            "difference": fmean(changes),
            "difference_interval": list(bootstrap_mean(changes)),
        }
    }


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


def _mean_scores(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """A method's mean score over its seeds, for every test row."""
    return [fmean(scores) for scores in zip(*map(_scores, rows), strict=True)]


def _by_group(groups: Sequence[str], scores: Sequence[float]) -> dict[str, Any]:
    """The scores of each group and of the worst; nothing without groups."""
    if not groups:
        return {}
    found = group_scores(groups, scores)
    return {"groups": found, "worst_group": worst(found)}


def _mean(numbers: Sequence[float | None]) -> float | None:
    """The mean, or None if a number is missing: macro-F1 of free text, or an infinite loss."""
    known = [number for number in numbers if number is not None]
    return fmean(known) if len(known) == len(numbers) else None


def recipe_of_parts(recipe: Mapping[str, Any], parts: Sequence[Part]) -> dict[str, Any]:
    """A recipe's values with the methods and seeds of all these parts."""
    methods = list(dict.fromkeys(part.method for part in parts))
    seeds = seeds_of(parts) or recipe["compare"]["seeds"]
    return {**recipe, "compare": {**recipe["compare"], "methods": methods, "seeds": seeds}}


def seeds_of(parts: Sequence[Part]) -> list[int]:
    """Every seed of these parts."""
    return sorted({part.seed for part in parts if part.seed is not None})


def _scores(row: Mapping[str, Any]) -> list[float]:
    """The score of every test row."""
    return row.get("scores") or [float(digit) for digit in row["correct"]]
