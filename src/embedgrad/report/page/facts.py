"""Facts on a run's page: scores, drift, learning, provenance."""

from __future__ import annotations

import math
from itertools import groupby
from operator import itemgetter
from typing import Any

from embedgrad.report.figures.series import MOST_POINTS, is_number
from embedgrad.report.page.run_files import RunFiles
from embedgrad.report.terminal.progress import ENDINGS
from embedgrad.report.terminal.tables import NOTHING_BETTER, reliable, verdict

LINE_END = "\u21b5"
SPACES = f"\u00b7{LINE_END}"  # as `drift.readable` writes them
_READABLE = str.maketrans("\u0120\u2581\u010a", SPACES[0] * 2 + LINE_END)  # of byte-level tokens
OF_PROVENANCE = ("model", "data", "licenses", "versions", "decoding", "created")


def headline(run: RunFiles) -> dict[str, Any] | None:
    """The two scores and the verdict on them; None where no test rows were scored."""
    result = run.result
    if "difference" not in result:
        return None
    difference = result["difference"]
    kind = "none"
    if reliable(difference):
        kind = "gain" if difference["accuracy"] > 0 else "loss"
    sentence = verdict(difference)
    nothing = (result.get("train") or {}).get("best_step") == 0
    values = {
        "text": result["text"],
        "refined": result["refined"],
        "difference": difference,
        "rows": result["test_rows"],
        "kind": kind,
        "verdict": sentence[0].upper() + sentence[1:],
        "nothing_better": NOTHING_BETTER if nothing else "",
    }
    for name in ("text", "refined"):
        low, high = result[name]["interval"]
        values[f"{name}_interval"] = [100 * low, 100 * high]
        values[f"{name}_at"] = 100 * result[name]["accuracy"]
    return {"headline": values}


def describe_drift(run: RunFiles) -> dict[str, Any] | None:
    """How far every row went, span by span, from the result or else from the saved prompt."""
    tokens = run.result.get("tokens")
    if not tokens and run.prompt:
        tokens = [
            {"span": number, "token": name.translate(_READABLE), "distance": d, "cosine": c}
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
    }


def provenance(run: RunFiles) -> dict[str, Any]:
    """Model, data, licenses, versions and seeds, as far as the saved prompt has them."""
    entries = {name: run.prompt[name] for name in OF_PROVENANCE if name in run.prompt}
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
