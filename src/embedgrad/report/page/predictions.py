"""Rows with their answers on a page: JSON within a budget of bytes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from embedgrad.report.figures.comparison import TEXT
from embedgrad.report.figures.series import is_number
from embedgrad.report.page.run_files import PREDICTIONS, RunFiles, replies_differ
from embedgrad.report.page.safe_text import readable, script_json, shorten

# A page of 500 rows takes at most 2 MB, one of 10,000 rows 20 MB.
MOST_ROWS = 10_000
LARGEST_ROW, SMALLEST_ROW = 20_000, 1_800  # bytes
BYTES_OF_FEW = 1_900_000  # of the page, while rows may still take more than the smallest
FRAME = 230  # bytes of a row besides its texts
REPLY_FRAME = 70  # bytes of a reply besides its text and its prompt's name
MARK = 12  # bytes that say how much of a text is left out
MOST_COLUMNS = 12


@final
@dataclass(frozen=True, slots=True)
class Kind:
    """Rows that a reader may pick: the name on the button, what it means, how many there are."""

    name: str
    title: str
    count: int


@final
@dataclass(frozen=True, slots=True)
class PageRows:
    """Rows as JSON for a script element, what a reader may pick of them, and what is left out.

    `file` has the rows whole; `answer` is what their answers are called.
    """

    json: str
    kinds: tuple[Kind, ...]
    notes: tuple[str, ...]
    file: str = PREDICTIONS
    answer: str = "right answer"


def run_rows(run: RunFiles, columns: Sequence[str] = (), others: int = 0) -> PageRows | None:
    """The rows of a run, changed ones first where not all have room; None where there are none.

    `columns` are those that the prompt holds; others come after them. `others` are the bytes that
    the page's other parts take of what it may take in all.
    """
    survey = run.survey
    if not survey:
        return None
    by_weight = sorted(survey, key=lambda item: (item[1]["change"] == "same", item[0]))
    rows = (
        (number, {**row, "answers": {name: row[name] for name in ("text", "refined")}})
        for number, row in run.predictions()
    )
    json, notes = fit_rows(rows, [number for number, _ in by_weight], columns, others, _run_marks)
    scores = [item[name]["correct"] for _, item in survey for name in ("text", "refined")]
    graded = any(0 < score < 1 for score in scores)
    only = "the {} prompt scores higher" if graded else "only the {} prompt is right"
    titles = {
        "fixed": only.format("refined"),
        "broken": only.format("text"),
        "changed": "the answers differ",
    }
    kinds = [_run_kinds(item["change"], item["differ"]) for _, item in survey]
    return PageRows(json, count_kinds(titles, kinds), notes)


def comparison_rows(
    rows: Sequence[tuple[int, Mapping[str, Any]]], judged: str, others: int = 0
) -> PageRows | None:
    """The rows of a comparison, with one answer a method; None where there are none.

    Those that methods answer differently come first. `judged` is the method that the fixed and
    broken rows are of.
    """
    if not rows:
        return None
    merged = [(number, {**row, "answers": _by_method(row["answers"])}) for number, row in rows]
    marks = {number: _comparison_marks(row, judged) for number, row in merged}
    by_weight = sorted(marks, key=lambda n: (not marks[n]["kinds"], n))
    json, notes = fit_rows(
        merged, by_weight, (), others, lambda row: _comparison_marks(row, judged)
    )
    titles = {
        "disagree": "some methods are right and others wrong",
        "fixed": f"{judged} is right more often than the text prompt",
        "broken": f"{judged} is right less often than the text prompt",
    }
    kinds = [mark["kinds"] for mark in marks.values()]
    return PageRows(json, count_kinds(titles, kinds), notes)


def count_kinds(titles: Mapping[str, str], kinds: Sequence[Sequence[str]]) -> tuple[Kind, ...]:
    """What a reader may pick, of rows of these kinds: each kind, and every row."""
    counts = Counter(itertools.chain.from_iterable(kinds))
    own = (Kind(name, title, counts[name]) for name, title in titles.items())
    return (*own, Kind("all", "every row", len(kinds)))


def fit_rows(
    rows: Iterable[tuple[int, Mapping[str, Any]]],
    by_weight: Sequence[int],
    columns: Sequence[str],
    others: int,
    mark: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    first: str = "changed ones",
    file: str = PREDICTIONS,
) -> tuple[str, tuple[str, ...]]:
    """As many rows as a page holds as JSON, in their order, and notes on what is left out."""
    chosen = set(by_weight[:MOST_ROWS])
    size = max(SMALLEST_ROW, min(LARGEST_ROW, (BYTES_OF_FEW - others) // len(chosen)))
    kept, cut = [], 0
    for number, row in rows:
        if number in chosen:
            compact, whole = _compact(row, number, columns, size)
            kept.append({**compact, **mark(row)})
            cut += not whole
    notes = []
    if len(by_weight) > len(kept):
        notes.append(
            f"{len(kept):,} of {len(by_weight):,} rows are on this page, {first} first; "
            f"all are in {file}."
        )
    if cut:
        notes.append(
            f"In {cut:,} rows texts are shortened to keep this page small; each says by how much "
            f"and names its line of {file}, where it is whole."
        )
    return script_json(kept), tuple(notes)


def _compact(
    row: Mapping[str, Any], number: int, columns: Sequence[str], size: int
) -> tuple[dict[str, Any], bool]:
    """A row with short names and short texts, and whether its texts are whole."""
    given = row.get("columns", {})
    names = [name for name in columns if name in given]
    names += [name for name in given if name not in columns]
    more = len(names) - MOST_COLUMNS
    names = names[:MOST_COLUMNS]
    answers = row["answers"]
    texts = [row["source"], row["answer"], *(answer["predicted"] for answer in answers.values())]
    texts += [*names, *(given[name] for name in names)]
    budget = size - FRAME - sum(len(name) + REPLY_FRAME for name in answers)
    shown = shorten(texts, budget - MARK * len(texts))
    source, answer, *rest = shown
    said, rest = rest[: len(answers)], rest[len(answers) :]
    compact: dict[str, Any] = {
        "n": number,
        "source": source,
        "answer": answer,
        "main": sum(name in columns for name in names),
        "columns": list(zip(rest[: len(names)], rest[len(names) :], strict=True)),
        "answers": {
            readable(name): _reply(answer, text)
            for (name, answer), text in zip(answers.items(), said, strict=True)
        },
    }
    if more > 0:
        compact["more"] = more
    return compact, more <= 0 and all(isinstance(part, str) for part in shown)


def _reply(answered: Mapping[str, Any], text: Any) -> dict[str, Any]:
    score = answered["correct"]
    reply: dict[str, Any] = {"said": text, "right": score >= 1}
    if 0 < score < 1:
        reply["score"] = answered.get("seeds") or f"score {round(score, 4)}"
    if is_number(loss := answered.get("loss")):
        reply["loss"] = round(loss, 4)
    if shares := answered.get("probabilities"):
        reply["sure"] = round(max(shares), 4)
    if answered.get("cut"):
        reply["cut"] = True
    return reply


def _run_marks(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's badge and the kinds that it is of."""
    change, text = row["change"], row["text"]["correct"]
    right = (row["refined"] if change == "fixed" else row["text"])["correct"] >= 1
    badge = {
        "fixed": "fixed" if right else "better",
        "broken": "broken" if right else "worse",
        "same": "both right" if right else "same score" if text > 0 else "both wrong",
    }
    return {"badge": [change, badge[change]], "kinds": _run_kinds(change, replies_differ(row))}


def _run_kinds(change: str, differ: bool) -> list[str]:
    if change != "same":
        return [change, "changed"]
    return ["changed"] if differ else []


def _by_method(answers: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """An answer a method: what most seeds say, their mean score, and how many are right."""
    seeds: dict[str, list[Mapping[str, Any]]] = {}
    for answer in answers:
        seeds.setdefault(answer["method"], []).append(answer)
    merged = {}
    for method, own in seeds.items():
        scores = [answer["correct"] for answer in own]
        ((predicted, _),) = Counter(answer["predicted"] for answer in own).most_common(1)
        merged[method] = {"predicted": predicted, "correct": sum(scores) / len(own)}
        if len(own) > 1 and set(scores) == {0, 1}:
            merged[method]["seeds"] = f"right in {scores.count(1)} of {len(own)} seeds"
    return merged


def _comparison_marks(row: Mapping[str, Any], judged: str) -> dict[str, Any]:
    """A row's badge and the kinds that it is of."""
    scores = {name: answer["correct"] for name, answer in row["answers"].items()}
    before, after = scores.get(TEXT, 0), scores.get(judged, 0)
    change = "fixed" if after > before else "broken" if after < before else ""
    differ = len(set(scores.values())) > 1
    same = "all right" if all(score >= 1 for score in scores.values()) else "all wrong"
    badge = f"{change} by {judged}" if change else "methods disagree" if differ else same
    kinds = [name for name, holds in (("disagree", differ), (change, change)) if holds]
    return {"badge": [change or "same", readable(badge)], "kinds": kinds}
