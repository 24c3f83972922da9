"""A comparison of methods: every training first, then, and only then, the test rows.

FOLDER/results.json   a row per method and seed, an entry per method
FOLDER/table.md       the same as a table
FOLDER/figure.svg     differences to the text prompt
FOLDER/events.jsonl   what happened, one JSON object a line
and what `comparing.folder` keeps to go on from.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from embedgrad.comparing.folder import Folder, Part
from embedgrad.comparing.results import TEXT, results_of, scores_of
from embedgrad.errors import EmbedgradError, RecipeError, RunError
from embedgrad.events import Report, nowhere, say, scoring, stage
from embedgrad.files import write_file, write_json
from embedgrad.language_model import LanguageModel
from embedgrad.methods import METHODS, Task
from embedgrad.methods.base import Answers
from embedgrad.preparation import prepare, sources
from embedgrad.recipe import Recipe
from embedgrad.report.methods_table import figure_svg, methods_markdown
from embedgrad.report.words import duration
from embedgrad.sequence import TokenSequence

BLOCK = 256  # test rows that are answered before they are kept


def compare(
    recipe: Recipe,
    out: str | Path,
    sinks: Callable[[], Report] = lambda: nowhere,
    *,
    model: LanguageModel | None = None,
) -> dict[str, Any]:
    """Run `recipe.compare` and return the content of `results.json`.

    What is finished in `out` is not done again; methods and seeds may be added. A method that fails
    is told under "failed", and the others go on. After Ctrl-C the results say `interrupted`, and
    the same call goes on. Raises `RunError` where `out` is of another recipe, `RecipeError` where a
    method that is named cannot run, and whatever the recipe's data, template and model raise.
    """
    recipe = Recipe.from_dict(recipe.as_dict())  # it may be made in Python, without any checks
    parts, skipped = planned(recipe)
    folder = Folder(out)
    folder.open(recipe)
    fresh = not folder.path.exists()
    try:
        _make(folder.path)
        report = sinks()
        opened = _opened(recipe, folder, report, model)
    except BaseException:
        if fresh:  # nothing is learned yet, and the folder is our own
            shutil.rmtree(folder.path, ignore_errors=True)
        raise
    say(report, (f"{name} is left out: {reason}" for name, reason in skipped.items()))
    failed: dict[str, str] = {}
    interrupted = False
    try:
        _train(opened.task, folder, parts, failed)
        _score(opened.task, folder, parts, failed, opened.test)
    except KeyboardInterrupt:
        interrupted = True
    results = results_of(folder, recipe, opened.task.model.info) | opened.told
    results |= {
        "skipped": skipped,
        "failed": failed,
        "interrupted": interrupted,
        "planned": len(parts),
        "trained": sum(map(folder.is_trained, parts)),
        "scored": sum(map(folder.is_scored, parts)),
    }
    if results["rows"]:
        write_json(folder.path / "results.json", results)
        write_file(folder.path / "table.md", methods_markdown(results).encode())
        figure = figure_svg(results)
        if figure is not None:
            write_file(folder.path / "figure.svg", figure)
    return results


def planned(recipe: Recipe) -> tuple[list[Part], dict[str, str]]:
    """What is to be done, seed by seed, and which methods cannot run and why.

    Raises `RecipeError` for one of these that the recipe names.
    """
    settings = recipe.compare
    named = set(settings.methods)
    wanted = [name for name in METHODS if not named or name in named or name == TEXT.method]
    reasons = {name: METHODS[name].lacks(recipe) for name in wanted}
    skipped = {name: reason for name, reason in reasons.items() if reason}
    problems = [f"compare.methods: {n} cannot run: {r}" for n, r in skipped.items() if n in named]
    if problems:
        raise RecipeError("recipe", problems)
    usable = [METHODS[name] for name in wanted if name not in skipped]
    once = [Part(method.name, None) for method in usable if not method.seeded]
    seeded = [method for method in usable if method.seeded]
    return once + [Part(m.name, seed) for seed in settings.seeds for m in seeded], skipped


@dataclass(frozen=True)
class _Opened:
    """What the parts share, and the test rows, which only the scoring gets."""

    task: Task
    test: Sequence[TokenSequence]
    told: dict[str, Any]


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{path}: cannot be made ({error.strerror}); choose another --out"
        ) from error


def _opened(recipe: Recipe, folder: Folder, report: Report, model: LanguageModel | None) -> _Opened:
    # A chat template may tell the day, which is then that of the comparison's first part.
    day = folder.shared.get("day", datetime.date.today().isoformat())
    ready = prepare(
        recipe,
        folder.path / "solutions.jsonl",
        report,
        model=model,
        date=datetime.date.fromisoformat(day),
        tested=True,
    )
    data = sources(recipe, ready.splits)
    digests = {f"{name} split": entry["sha256"] for name, entry in data.items()}
    shared = {**digests, "model": ready.model.info.embedding_digest, "day": day}
    if (
        ready.solutions["source"] == "self-written"
    ):  # what the model wrote may have been written anew
        texts = json.dumps([example.solution for example in ready.written])
        shared["set of solutions"] = f"sha256:{hashlib.sha256(texts.encode()).hexdigest()}"
    folder.agree(recipe, shared)
    recipe = replace(recipe, training=ready.training)
    task = Task(recipe, ready.model, ready.sequencer, ready.train, ready.dev, report)
    return _Opened(task, ready.test, {"data": data, "solutions": ready.solutions})


def _train(task: Task, folder: Folder, parts: Sequence[Part], failed: dict[str, str]) -> None:
    for number, part in enumerate(parts, 1):
        if folder.is_trained(part) or part.method in failed:
            continue
        where = f"training {number} of {len(parts)}"
        stage(task.report, f"{part}: {where}")
        own = replace(
            task, report=_tagged(task.report, part), state=folder.unfinished / part.folder
        )
        try:
            trained = METHODS[part.method].train(own, part.seed or 0)
        except EmbedgradError as error:
            if part == TEXT:
                raise  # there is nothing to compare with
            _note_failure(task.report, part, error, failed)
            continue
        folder.keep_training(part, trained)
        took, dev = duration(trained.facts["train_seconds"]), trained.facts["dev"]
        score = "" if dev is None else f", dev accuracy {100 * dev['accuracy']:.1f} %"
        say(task.report, [f"{part}: ready after {took}{score}"])


def _score(
    task: Task,
    folder: Folder,
    parts: Sequence[Part],
    failed: dict[str, str],
    test: Sequence[TokenSequence],
) -> None:
    left = [p for p in parts if folder.is_trained(p) and not folder.is_scored(p)]
    heads = [sequence.head for sequence in test]
    task.model.heads.expect((heads, len(left) * task.evaluator().lookups))
    for part in left:
        if part.method in failed:
            continue
        try:
            so_far = folder.answers_so_far(part)
        except RunError as error:
            say(task.report, [f"{error}; {part} is scored anew"])
            so_far = Answers([], []), 0.0
        found = _answers(task, folder, part, test, so_far, failed)
        if found is None:
            continue
        answers, seconds = found
        scores = scores_of(answers, task.sequencer.target.choices, seconds)
        folder.keep_scores(part, answers.answered, scores)


def _answers(
    task: Task,
    folder: Folder,
    part: Part,
    test: Sequence[TokenSequence],
    so_far: tuple[Answers, float],
    failed: dict[str, str],
) -> tuple[Answers, float] | None:
    """A part's answers to the test rows, and the seconds, or None where its method fails.

    Every block is kept when it is done.
    """
    own, trained = replace(task, report=_tagged(task.report, part)), folder.training(part)
    answers, seconds = so_far
    while (first := len(answers.answered)) < len(test):
        began = time.perf_counter()

        def progress(done: int, first: int = first) -> None:
            task.report(scoring(str(part), first + done, len(test)))

        block = test[first : first + BLOCK]
        try:
            answered, tokens = METHODS[part.method].answer(own, trained, block, progress)
        except EmbedgradError as error:
            if part == TEXT:
                raise
            _note_failure(task.report, part, error, failed)
            return None
        answers = Answers([*answers.answered, *answered], [*answers.tokens, *tokens])
        seconds += time.perf_counter() - began
        folder.keep_answers(part, answers, seconds)
    return answers, seconds


def _note_failure(
    report: Report, part: Part, error: EmbedgradError, failed: dict[str, str]
) -> None:
    failed[part.method] = text = str(error)
    named = text if text.startswith(part.method) else f"{part}: {text}"
    say(report, [f"{named}; the other methods go on"])


def _tagged(report: Report, part: Part) -> Report:
    """Events that say whose they are."""
    return lambda event: report({**event, "method": part.method, "seed": part.seed})
