"""Folders as `optimize` and `compare` leave them, made without a model, as large as wanted."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embedgrad.atomic_files import write_json
from embedgrad.evaluation.significance import mcnemar_exact, wilson_interval
from embedgrad.report.page.run_files import RESULT_VERSION, interpolation_inputs
from run_kit import write_jsonl

CHOICES = ("negative", "positive")
WORDS = ["\u21b5", "Is", "\u00b7this", "\u00b7good", "?"]

# What no page may run, obey or choke on. Each one says what it would do.
HOSTILE = {
    "script": "<script>window.hacked = 1</script>",
    "end of data": "</script><script>window.hacked = 2</script>",
    "comment": "<!-- <script> --><![CDATA[ ]]>",
    "image": '<img src="https://example.com/x.png" onerror="window.hacked = 3">',
    "attribute": '" onmouseover="window.hacked = 4" style=\'position:fixed\'',
    "template": "{{ 7 * 7 }} {% raw %} {# #}",
    "direction": "\u202eright to left\u2066 \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628",
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f600",
    "control": "a\x00b\x1b[31mred\x07\x7f\u2028line\u2029end\ufeff",
    "surrogate": "half \ud800 and \udfff",
    "stacked": "Z" + "\u0351\u0489\u034b" * 40,
    "math": r"$\frac{1}{0}$ &lt;b&gt; &amp;",
    "wide": "W" * 3_000,
}


def answered_rows(
    count: int, *, texts: Sequence[str] = (), free: bool = False, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of `predictions.jsonl`: the refined prompt is right more often. Texts take turns."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        right = (draw.random() < 0.6, draw.random() < 0.85)
        gold = CHOICES[i % 2]
        row: dict[str, Any] = {"source": f"test.jsonl:{i + 1}", "answer": gold}
        pair = {(False, True): "fixed", (True, False): "broken"}
        row["change"] = pair.get(right, "same")
        text = texts[i % len(texts)] if texts else f"Row {i} of a good film about {draw.random()}."
        row["columns"] = {"text": text, "label": gold}
        for name, is_right in zip(("text", "refined"), right, strict=True):
            share = 0.5 + draw.random() / 2
            said = gold if is_right else CHOICES[1 - i % 2]
            shares = [share, 1 - share] if said == CHOICES[0] else [1 - share, share]
            row[name] = {
                "predicted": f"I think that {said} is the {name} answer." if free else said,
                "correct": float(is_right),
                "loss": 1 - share if is_right else share,
                "probabilities": None if free else shares,
                "cut": free and i % 7 == 0,
            }
        rows.append(row)
    return rows


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as a run writes it, with the choices beside their probabilities."""
    written = dict(row)
    for name in ("text", "refined"):
        shares = row[name]["probabilities"]
        named = shares and dict(zip(CHOICES, shares, strict=True))
        written[name] = {**row[name], "probabilities": named}
    return written


def made_run(folder: Path, rows: Sequence[Mapping[str, Any]], **changes: Any) -> Path:
    """Write a run whose scores are those of its rows. `changes` replace entries of its prompt."""
    tokens = [
        {
            "span": 1,
            "token": word,
            "distance": 0.05 * (i + 1),
            "cosine": 1 - 0.01 * i,
            "nearest": [word, "\u00b7other", "$x$"],
            "unchanged": i != 3,
            "typical": 0.9,
        }
        for i, word in enumerate(changes.pop("words", WORDS))
    ]
    train = {"steps": 32, "best_step": 24, "seconds": 61.5, "ended": "finished"}
    write_json(
        folder / "result.json",
        {
            **_scores(rows),
            "drift": {"mean": 0.15, "max": 0.25},
            "cosine": {"mean": 0.98, "min": 0.96},
            "nearest_tokens_unchanged": 0.8,
            "tokens": tokens,
            "train": train,
            "interrupted": False,
            "version": RESULT_VERSION,
        },
    )
    write_json(folder / "prompt" / "prompt.json", {**_prompt(tokens), **changes})
    (folder / "prompt" / "prompt.safetensors").write_bytes(b"rows")
    (folder / "recipe.toml").write_text('[model]\nname = "tiny"\n', encoding="utf-8")
    write_jsonl(folder / "events.jsonl", events())
    write_jsonl(folder / "predictions.jsonl", [_named(row) for row in rows])
    write_json(
        folder / "interpolation.json",
        {**interpolation_inputs(folder, 100, ()), **made_interpolation()},
    )
    return folder


def events(steps: int = 32) -> list[dict[str, Any]]:
    """Steps whose loss falls, and dev scores that rise, then fall."""
    told: list[dict[str, Any]] = [{"event": "stage", "text": "refining"}]
    text = {"step": 0, "accuracy": 0.6, "log_loss": 0.7}
    for step in range(steps + 1):
        if step:
            told.append({"event": "step", "step": step, "total": steps, "loss": 0.7 - 0.01 * step})
        if step % 8 == 0:
            score: dict[str, Any] = {
                "accuracy": 0.6 + 0.01 * step - 0.0003 * step**2,
                "log_loss": 0.7,
            }
            score["interval"] = [score["accuracy"] - 0.1, score["accuracy"] + 0.1]
            best = {"step": min(step, 16)}
            told.append(
                {"event": "evaluation", "step": step, **score, "metric": "accuracy"}
                | {"text": text, "best": best}
            )
    return told


def made_interpolation() -> dict[str, Any]:
    """What `interpolation.json` holds besides what it was made from."""
    points = [
        {"t": t, "accuracy": 0.6 + 0.2 * t - 0.05 * t**2, "interval": [0.5, 0.9], "log_loss": 0.6}
        for t in (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5)
    ]
    said = {"reply": "It asks whether the film is good.", "cut": False}
    replies = [{"question": "What does ... ask for?", "text": said, "refined": said}]
    return {"split": "dev", "rows": 40, "points": points, "replies": replies}


def made_results(seeds: int = 3) -> dict[str, Any]:
    """What `results.json` of a comparison holds, as far as a page shows it."""
    methods = {
        "text": (0.0, 0, 0.0),
        "best-of-n": (0.02, 0, 0.0),
        "embedgrad": (0.18, 7_488, 95.0),
        "random-init": (0.04, 7_488, 96.0),
        "peft-prompt-tuning-random": (-0.06, 7_488, 410.0),
        "peft-lora": (0.2, 460_800, 700.0),
    }
    draw = random.Random(0)
    rows, entries = [], []
    for name, (difference, numbers, seconds) in methods.items():
        wide = 0.015 * (name != "text")
        found = [difference + wide * draw.uniform(-1, 1) for _ in range(seeds if seconds else 1)]
        costs = {
            "trained_numbers": numbers,
            "stored_bytes": 4 * numbers,
            "train_seconds": seconds,
            "scoring_seconds": 30.0,
            "extra_tokens": 0.0,
        }
        rows += [
            {"method": name, "seed": i if seconds else None, "accuracy": 0.66 + d}
            | {"interval": [0.6 + d, 0.72 + d], "difference": d, "p_value": 0.04}
            | {"difference_interval": [d - 0.03, d + 0.03]}
            | costs
            for i, d in enumerate(found)
        ]
        mean = sum(found) / len(found)
        judged = {"difference": 0.0, "difference_interval": [0.0, 0.0], "p_holm": None}
        verdict = None
        if name != "text":
            judged = {
                "difference": mean,
                "difference_interval": [mean - 0.03, mean + 0.03],
                "p_holm": 0.001 if abs(mean) > 0.05 else 0.4,
            }
            verdict = "no reliable gain"
            if judged["p_holm"] == 0.001:
                verdict = "improved" if mean > 0 else "worse"
        entries.append(
            {
                "method": name,
                "runs": len(found),
                "seeds": list(range(len(found))),
                "accuracy": 0.66 + mean,
                "interval": [0.6 + mean, 0.72 + mean],
                "min": 0.66 + min(found),
                "max": 0.66 + max(found),
                "verdict": verdict,
                **judged,
                **costs,
            }
        )
    return {
        "version": RESULT_VERSION,
        "rows": rows,
        "methods": entries,
        "skipped": {"peft-cpt": "the package peft is missing"},
        "failed": {},
        "test_rows": 1821,
        "model": {"name": "tiny"},
        "recipe": {"model": {"name": "tiny"}},
    }


def compared_rows(count: int, *, seeds: int = 3, free: bool = False) -> list[dict[str, Any]]:
    """Rows of a comparison's `predictions.jsonl`: every third is answered alike by all."""
    methods = [entry["method"] for entry in made_results()["methods"]]
    draw = random.Random(0)
    rows = []
    for i in range(count):
        gold = CHOICES[i % 2]
        answers = []
        for method in methods:
            for seed in range(seeds) if method not in ("text", "best-of-n") else [None]:
                right = i % 3 == 0 or draw.random() < 0.7
                said = gold if right else CHOICES[1 - i % 2]
                said = f"I think that {said} is the {method} answer." if free else said
                score = {"predicted": said, "correct": float(right)}
                answers.append({"method": method, "seed": seed, **score})
        columns = {"text": f"Row {i} of a good film about {draw.random()}."}
        rows.append({"source": f"test.jsonl:{i + 1}", "answer": gold} | {"columns": columns})
        rows[-1]["answers"] = answers
    return rows


def made_comparison(folder: Path) -> Path:
    """Write a comparison's folder."""
    write_json(folder / "results.json", made_results())
    write_jsonl(folder / "predictions.jsonl", compared_rows(30))
    return folder


def _scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    count = len(rows)
    scores: dict[str, Any] = {"test_rows": count}
    for name in ("text", "refined"):
        right = round(sum(row[name]["correct"] for row in rows))
        scores[name] = {
            "rows": count,
            "accuracy": right / count,
            "interval": wilson_interval(right, count),
            "macro_f1": None,
            "log_loss": sum(row[name]["loss"] for row in rows) / count,
            "cut": sum(row[name]["cut"] for row in rows),
        }
    fixed, broken = (sum(row["change"] == kind for row in rows) for kind in ("fixed", "broken"))
    gain = (fixed - broken) / count
    scores["difference"] = {
        "accuracy": gain,
        "interval": [gain - 0.04, gain + 0.04],
        "p_value": mcnemar_exact(broken, fixed),
        "fixed": fixed,
        "broken": broken,
    }
    return scores


def _prompt(tokens: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    digest = hashlib.sha256(b"rows").hexdigest()
    return {
        "spans": [
            {
                "text": "\nIs this good?",
                "tokens": [token["token"] for token in tokens],
                "drift": [token["distance"] for token in tokens],
                "cosine": [token["cosine"] for token in tokens],
            }
        ],
        "template": {"messages": [{"role": "user", "content": "{text}\n\n[[Is this good?]]"}]},
        "trust_region": {"radius": 0.3, "min_cosine": None},
        "rows": {"count": len(tokens), "width": 8, "sha256": digest},
        "model": {"name": "tiny", "architecture": "LlamaForCausalLM", "license": "apache-2.0"},
        "data": {"train": {"source": "train.jsonl", "rows": 256, "sha256": "ab" * 32}},
        "licenses": {"model": "apache-2.0", "data": "MIT"},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "recipe": {"data": {"seed": 3}, "training": {"seed": 4}},
        "created": "2026-11-23T10:00:00+00:00",
    }
