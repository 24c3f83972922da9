"""Read a run's or comparison's files for the page."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from embedgrad.data.bounded_reads import parse_json, read_bytes, read_json, read_lines
from embedgrad.errors import RunError
from embedgrad.report.figures.series import is_number

EVENTS = "events.jsonl"
PREDICTIONS = "predictions.jsonl"
INTERPOLATION = "interpolation.json"
ELICITATION = "elicitation.json"
RESULTS = "results.json"  # of a comparison
UNFINISHED = Path("work", "comparison.json")  # of one, from its beginning on
PROMPT_FILE = "prompt.json"
ROWS_FILE = Path("prompt", "prompt.safetensors")
RESULT_VERSION = 2  # of result.json and results.json; version 1 had no such field
_OF_RUNS = ("recipe.toml", "result.json", EVENTS, "prompt/prompt.json", PREDICTIONS)
_LONGEST_RECIPE = 200_000  # characters


@final
@dataclass
class RunFiles:
    """A run's files as plain values, empty where there are none; `notes` list what is left out."""

    folder: Path
    result: dict[str, Any] = field(default_factory=dict)
    prompt: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    interpolation: dict[str, Any] = field(default_factory=dict)
    elicitation: dict[str, Any] = field(default_factory=dict)
    survey: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """Line number and scores of every row of the predictions, without its texts."""
    notes: list[str] = field(default_factory=list)
    alone: bool = False
    """Only the prompt is there, without its run."""

    def predictions(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Line number and content of every whole row, read as it is asked for."""
        return ((number, row) for number, row in _predictions(self.folder) if row is not None)


def read_run(folder: Path) -> RunFiles:
    """Read the folder of a run, or of a prompt alone. Raises `RunError` for any other."""
    if not any((folder / name).is_file() for name in _OF_RUNS):
        if (folder / PROMPT_FILE).is_file():
            return _read_prompt(folder)
        raise RunError(
            f"{folder}: holds no run, comparison, study or prompt; give a folder that `embedgrad "
            "optimize`, `compare` or `tune` wrote"
        )
    run = RunFiles(folder)
    run.result = _read(run, "result.json", "the scores are left out")
    run.notes += version_notes(folder, run.result)
    run.prompt = _read(run, "prompt/prompt.json", "provenance is left out")
    run.recipe = _recipe(run)
    lines = [event for _, event in json_lines(folder / EVENTS)]
    run.events = [event for event in lines if event is not None]
    _note_damage(run, EVENTS, "the curves are left out", len(lines) - len(run.events), len(lines))
    damaged = 0
    for number, row in _predictions(folder):
        if row is None:
            damaged += 1
            continue
        kept = {"change": row["change"], "differ": replies_differ(row)}
        for name in ("text", "refined"):
            kept[name] = {k: row[name].get(k) for k in ("correct", "probabilities")}
            if row[name].get("probabilities"):  # a choice, and no long text
                kept["answer"] = row["answer"]
                kept[name]["predicted"] = row[name]["predicted"]
        run.survey.append((number, kept))
    rows = damaged + len(run.survey)
    _note_damage(run, PREDICTIONS, "the rows are left out", damaged, rows)
    if (folder / INTERPOLATION).is_file():
        run.interpolation = _read(run, INTERPOLATION, "it is left out")
    if (folder / ELICITATION).is_file():
        run.elicitation = _read(run, ELICITATION, "it is left out")
    return run


def _read_prompt(folder: Path) -> RunFiles:
    """A prompt alone, which knows the scores of its run."""
    run = RunFiles(folder, alone=True)
    run.prompt = _read(run, PROMPT_FILE, "everything is left out")
    scores = run.prompt.get("scores")
    run.result = scores if isinstance(scores, dict) else {}
    run.notes.append("This is a prompt without its run: what needs the run's rows is left out.")
    return run


def _predictions(folder: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Every line's number and row, None if damaged; probabilities without their choices."""
    for number, row in json_lines(folder / PREDICTIONS):
        for answer in () if row is None else (row.get("text"), row.get("refined")):
            if isinstance(answer, dict) and isinstance(answer.get("probabilities"), dict):
                answer["probabilities"] = list(answer["probabilities"].values())
        yield number, row if row is not None and is_prediction(row) else None


def read_comparison(path: Path) -> dict[str, Any] | None:
    """The results of a comparison, from its folder or file; None where it is none.

    Raises `RunError` for a file that is damaged, and where no row is scored yet.
    """
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        if (path / UNFINISHED).is_file():
            raise RunError(
                f"{path}: a comparison without results yet; `embedgrad compare` with its recipe "
                "and this folder continues it"
            )
        return None
    try:
        values = read_json(file)
        for entry in (*values["methods"], *values["rows"]):
            if not isinstance(entry["method"], str):
                raise TypeError("a method's name is no text")
        if not all(isinstance(values.get(name, {}), dict) for name in ("skipped", "failed")):
            raise TypeError("skipped and failed are no objects")
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise RunError(
            f"{file}: is no results file of `embedgrad compare` ({why}); run it again"
        ) from error
    results: dict[str, Any] = values
    return results


def compared_rows(folder: Path, notes: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """The rows of a comparison's `predictions.jsonl`, each with its line; damage gets a note."""
    lines = list(json_lines(folder / PREDICTIONS))
    rows = [(number, row) for number, row in lines if row is not None and _is_compared(row)]
    if not lines:
        again = "`embedgrad compare` with its recipe and folder writes it"
        notes.append(f"There is no {PREDICTIONS}: the rows are left out ({again}).")
    if damaged := len(lines) - len(rows):
        notes.append(f"{PREDICTIONS} has damaged lines, left out: {damaged:,} of {len(lines):,}.")
    return rows


def version_notes(path: Path, result: Mapping[str, Any]) -> list[str]:
    """A note if the result of a run or comparison is of another version than this one's."""
    version = result.get("version", 1)
    if not result or version == RESULT_VERSION:
        return []
    age = "an older" if version == 1 else "another"
    return [
        f"{path} was written by {age} embedgrad (result version {version}; this one reads "
        f"{RESULT_VERSION}): some of it may be missing."
    ]


def interpolation_inputs(folder: Path, rows: int, overrides: Sequence[str]) -> dict[str, Any]:
    """What a kept interpolation depends on: digests of files, and the options."""
    digests = {}
    for name, path in (("artifact", folder / ROWS_FILE), ("recipe", folder / "recipe.toml")):
        content = read_bytes(path) if path.is_file() else b""
        digests[name] = hashlib.sha256(content).hexdigest()
    return {"from": {**digests, "at_most": rows, "overrides": list(overrides)}}


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Number and content of every line that is not blank; None for one that holds no object.

    Raises `RunError` for a file that is too large, or cannot be read.
    """
    if not path.is_file():
        return
    try:
        for number, line in enumerate(read_lines(path), 1):
            if line.strip():
                yield number, _parse_object(line)
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror or error})") from error


def _parse_object(line: bytes) -> dict[str, Any] | None:
    try:
        value = parse_json(line, halves=True)  # a page shows them
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def is_prediction(row: Mapping[str, Any]) -> bool:
    """Whether a row has everything that a page shows, in the right types."""
    return (
        is_row(row)
        and row.get("change") in ("fixed", "broken", "same")
        and all(_is_answer(row.get(name)) for name in ("text", "refined"))
    )


def _is_compared(row: Mapping[str, Any]) -> bool:
    answers = row.get("answers")
    return (
        is_row(row)
        and isinstance(answers, list)
        and all(_is_answer(answer) and isinstance(answer.get("method"), str) for answer in answers)
    )


def is_row(row: Mapping[str, Any]) -> bool:
    """Whether a row has a source, an answer and, where it names columns, texts in them."""
    columns = row.get("columns", {})
    return (
        isinstance(row.get("source"), str)
        and isinstance(row.get("answer"), str)
        and isinstance(columns, dict)
        and all(isinstance(text, str) for text in columns.values())
    )


def _is_answer(answer: object) -> bool:
    if not isinstance(answer, dict) or not isinstance(answer.get("predicted"), str):
        return False
    shares = answer.get("probabilities")
    known = isinstance(shares, list) and shares and all(map(is_number, shares))
    return is_number(answer.get("correct")) and bool(shares is None or known)


def replies_differ(row: Mapping[str, Any]) -> bool:
    """Whether the refined prompt's answer is another one, right or wrong."""
    return bool(row["text"]["predicted"] != row["refined"]["predicted"])


def _read(run: RunFiles, name: str, what: str) -> dict[str, Any]:
    path = run.folder / name
    if not path.is_file():
        run.notes.append(f"There is no {name}: {what}.")
        return {}
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        run.notes.append(f"{name} is damaged ({error}): {what}.")
        return {}
    return values


def _recipe(run: RunFiles) -> str:
    try:
        text = read_bytes(run.folder / "recipe.toml").decode(errors="replace")
    except OSError:
        run.notes.append("There is no recipe.toml: the recipe is left out.")
        return ""
    if len(text) > _LONGEST_RECIPE:
        run.notes.append(f"Of recipe.toml the first {_LONGEST_RECIPE:,} characters are shown.")
    return text[:_LONGEST_RECIPE]


def _note_damage(run: RunFiles, name: str, what: str, damaged: int, lines: int) -> None:
    if not (run.folder / name).is_file():
        run.notes.append(f"There is no {name}: {what}.")
    if damaged:
        run.notes.append(f"{name} has damaged lines, left out: {damaged:,} of {lines:,}.")
