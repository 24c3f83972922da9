"""Facts on a page: verdict, scores, classes, drift, learning, provenance."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from itertools import groupby
from operator import itemgetter
from pathlib import PureWindowsPath
from typing import Any

from embedgrad.formatting import BLANKS
from embedgrad.report.figures.comparison import TEXT, rank_methods
from embedgrad.report.figures.series import MOST_POINTS, is_number
from embedgrad.report.figures.theme import NO_GAIN
from embedgrad.report.page.run_files import RunFiles
from embedgrad.report.terminal.methods_table import describe_regrets
from embedgrad.report.terminal.progress import ENDINGS, describe_engine
from embedgrad.report.terminal.tables import (
    FREE_ENOUGH,
    NOTHING_BETTER,
    describe_demonstrations,
    describe_greedy,
    describe_place,
    describe_regret,
    describe_teacher,
    kept_text,
    verdict,
    verdict_word,
)

LINE_END = "\u21b5"
SPACES = f"\u00b7{LINE_END}"  # as `drift.readable` writes them
OURS = "embedgrad"
WIDEST_MATRIX = 12  # classes
MOST_CONFUSIONS = 20
MOST_CLASSES = 200
OF_PROVENANCE = ("model", "data", "licenses", "versions", "decoding", "created")


def headline(run: RunFiles) -> dict[str, Any] | None:
    """The two scores and the verdict on them; None where no test rows were scored."""
    result = run.result
    if "difference" not in result:
        return None
    difference = result["difference"]
    values = {
        "text": result["text"],
        "refined": result["refined"],
        "difference": difference,
        "rows": result["test_rows"],
        "kind": verdict_word(difference),
        "verdict": verdict(difference),
        "greedy": "",
        "more": [
            *describe_regret(result.get("regret") or {}),
            *describe_teacher(result.get("teacher") or {}),
        ],
        "nothing_better": NOTHING_BETTER if kept_text(result) else "",
    }
    free = result["refined"].get("greedy_is_choice")
    if is_number(free) and free < FREE_ENOUGH:
        values["greedy"] = describe_greedy(free)
    for name in ("text", "refined"):
        shares = (*result[name]["interval"], result[name]["accuracy"])
        values[f"{name}_scale"] = [100 * share for share in shares]
    # The difference on a scale of its own, with 0 in the middle.
    shares = (*difference["interval"], difference["accuracy"])
    widest = max(map(abs, shares)) or 1.0
    values["difference_scale"] = [50 + 45 * share / widest for share in shares]
    return {"headline": values}


def describe_verdict(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The verdict on a comparison: on its `subject` first, then all methods by verdict."""
    judged = [entry for entry in rank_methods(results) if entry.get("verdict")]
    if not judged:
        return None
    words = ("improved", NO_GAIN, "worse")
    groups = [(word, [e for e in judged if e["verdict"] == word]) for word in words]
    return {
        "subject": next(e for e in judged if e["method"] == subject(results)),
        "groups": [(word, entries) for word, entries in groups if entries],
        "count": len(judged),
        "rows": results.get("test_rows"),
        "text": next((e for e in results["methods"] if e["method"] == TEXT), {}),
        "more": describe_regrets(results["methods"]),
    }


def subject(results: Mapping[str, Any]) -> str:
    """The method that a comparison is about: `embedgrad`, or else the best one."""
    names = [entry["method"] for entry in rank_methods(results)]
    return OURS if OURS in names else (names or [TEXT])[0]


def describe_drift(run: RunFiles) -> dict[str, Any] | None:
    """How far every row went, span by span, from the result or else from the saved prompt."""
    tokens = run.result.get("tokens")
    if not tokens and run.prompt:
        tokens = [
            {"span": number, "token": name.translate(BLANKS), "distance": d, "cosine": c}
            for number, span in enumerate(run.prompt["spans"], 1)
            for name, d, c in zip(span["tokens"], span["drift"], span["cosine"], strict=True)
        ]
    if not tokens:
        return None
    radius = (run.prompt.get("trust_region") or {}).get("radius")
    most = max([*(token["distance"] for token in tokens), *([radius] if radius else [])])
    rows = []
    before: dict[str, Any] = {"span": 0, "token": ""}
    for number, token in enumerate(tokens, 1):
        word, last = str(token["token"]), str(before["token"])[-1:]
        # Where the tokenizer wrote no space and no line ended.
        joined = word[:1] not in SPACES and last != LINE_END and before["span"] == token["span"]
        rows.append(
            {
                **token,
                "number": number,
                "share": token["distance"] / most if most else 0.0,
                "joined": joined,
                "word": word.removeprefix(SPACES[0]) or word,
                # The nearest vocabulary token where it is no longer the row's own.
                "other": "" if token.get("unchanged", True) else str(token["nearest"][0]),
            }
        )
        before = token
    return {
        "rows": rows,
        "spans": [list(span) for _, span in groupby(rows, key=itemgetter("span"))],
        "most": most,
        "radius": radius,
        "moved": sum(not token.get("unchanged", True) for token in tokens),
        "named": all("nearest" in token for token in tokens),
    }


def describe_classes(scores: Mapping[str, Any]) -> dict[str, Any] | None:
    """Per-class scores with a confusion matrix, or of many classes the usual confusions."""
    if not scores:
        return None
    classes, confusion = scores["classes"], scores["confusion"]
    labels = [one["label"] for one in classes]
    values: dict[str, Any] = {"classes": classes[:MOST_CLASSES], "left": classes[MOST_CLASSES:]}
    if len(labels) <= WIDEST_MATRIX:
        matrices = {
            name: [{"label": a, "counts": [pairs[a, said] for said in labels]} for a in labels]
            for name, pairs in confusion.items()
        }
        return {**values, "labels": labels, "matrices": matrices}
    wrong: Counter[tuple[str, str]] = sum(map(Counter, confusion.values()), Counter())
    usual = [pair for pair, _ in wrong.most_common() if pair[0] != pair[1]][:MOST_CONFUSIONS]
    rows = [{"pair": pair, **{n: pairs[pair] for n, pairs in confusion.items()}} for pair in usual]
    return {**values, "confusions": rows}


def describe_groups(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Scores by group, of a run's two prompts or of a comparison's methods."""
    if groups := result.get("groups"):
        scores = {f"{name} prompt": groups[name] for name in ("text", "refined")}
        return {"column": groups["column"], "scores": scores, "verdicts": groups["verdicts"]}
    if "groups" in result.get("methods", [{}])[0]:
        scores = {entry["method"]: entry["groups"] for entry in result["methods"]}
        return {"column": result["group_column"], "scores": scores, "verdicts": []}
    return None


def describe_learning(run: RunFiles) -> dict[str, Any]:
    """How training went: its end, and the dev scores by step.

    Of many scores 1 in `every`, with the last and that of the rows that were kept.
    """
    events = [event for event in run.events if event.get("event") == "evaluation"]
    scores = [score for score in events if is_number(score.get("step"))]
    train = run.result.get("train") or {}
    every = math.ceil(len(scores) / MOST_POINTS) or 1
    ends = (scores[-1]["step"], train.get("best_step")) if scores else ()
    return {
        "scores": [s for i, s in enumerate(scores) if i % every == 0 or s["step"] in ends],
        "of": len(scores),
        "every": every,
        "train": train,
        "ended": ENDINGS.get(str(train.get("ended")), ""),
        "notes": [
            *describe_place(run.result),
            *describe_demonstrations(run.result),
            *describe_engine(run.result),
        ],
    }


def without_path(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The facts with the name of a local model instead of its path."""
    model = entries.get("model")
    if not (isinstance(model, dict) and model.get("kind") in ("folder", "gguf")):
        return dict(entries)
    name = PureWindowsPath(str(model.get("name"))).name  # it knows both kinds of slashes
    return {**entries, "model": {**model, "name": name}}


def provenance(run: RunFiles) -> dict[str, Any]:
    """Model, data, licenses, versions and seeds, as far as the saved prompt has them."""
    entries = {name: run.prompt[name] for name in OF_PROVENANCE if name in run.prompt}
    entries = without_path(entries)
    recipe = run.prompt.get("recipe") or {}
    seeds = {
        name: recipe[name]["seed"]
        for name in ("data", "training")
        if "seed" in recipe.get(name, {})
    }
    return {**entries, **({"seeds": seeds} if seeds else {})}


def recipe_columns(run: RunFiles) -> tuple[str, ...]:
    """The columns in the saved prompt's template."""
    from embedgrad.data.markup import parse

    template = run.prompt.get("template") or {}
    texts = [template.get("text") or "", *(m["content"] for m in template.get("messages", ()))]
    pieces = (piece for text in texts for piece in parse(text, "template"))
    return tuple(dict.fromkeys(piece.text for piece in pieces if piece.kind == "column"))
