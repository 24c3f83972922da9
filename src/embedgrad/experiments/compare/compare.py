"""Train all methods first, then answer the test rows.

FOLDER/results.json   a row per method and seed, an entry per method
FOLDER/table.md       the same as a table
FOLDER/figure.svg     differences to the text prompt
FOLDER/events.jsonl   what happened, one JSON object per line
and what `compare.folder` keeps so that a comparison can resume.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, final

import torch

from embedgrad.atomic_files import lock_folder, to_json_lines, write_file, write_json
from embedgrad.errors import EmbedgradError, RecipeError, RunError, one_line
from embedgrad.events import Report, part_of, say, stage
from embedgrad.experiments.baselines import METHODS, Answers, Task
from embedgrad.experiments.compare.folder import Folder, Part
from embedgrad.experiments.compare.rescore import rescore, score_again, scorer_fingerprint
from embedgrad.experiments.compare.results import (
    TEXT,
    CompareResult,
    predictions_of,
    results_of,
    scores_of,
)
from embedgrad.formatting import duration, with_interval
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading.info import weights_digest
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.recipe.build import prepare, sources
from embedgrad.recipe.recipe import AUTO, Recipe
from embedgrad.report.event_files import write_events
from embedgrad.report.page.notebook import shown_as
from embedgrad.report.terminal.bars import show
from embedgrad.report.terminal.methods_table import figure_svg, methods_markdown, methods_table
from embedgrad.training.engine import SamplingEngine
from embedgrad.training.selection import accuracy_interval
from embedgrad.training.self_training import refuse_inside

BLOCK = 256  # test rows with choices that are answered before they are saved
BATCHES = 4  # batches of free answers, which take longer
# Our own, out of memory, and what PEFT refuses.
FAILURES = (EmbedgradError, MemoryError, RuntimeError, ValueError)


def compare(
    recipe: Recipe,
    out: str | Path,
    report: Report = show,
    *,
    model: LanguageModel | None = None,
) -> CompareResult:
    """Run `recipe.compare` and return the content of `results.json`.

    What is finished in `out` is not repeated; methods and seeds may be added. A method that fails
    is listed under "failed", and the others continue. `report` gets events (plain JSON values),
    which FOLDER/events.jsonl keeps. After Ctrl-C the results say `interrupted`, and the same call
    resumes. Raises `RunError` if `out` belongs to another recipe, `RecipeError` if a method that
    the recipe names cannot run, and the errors of its data, template and model.
    """
    recipe = Recipe.from_dict(recipe.as_dict())  # one that was made in Python is not checked yet
    recipe.needs_text("a comparison")
    parts, skipped = plan_parts(recipe)
    folder = Folder(out)
    new = not folder.path.exists()
    if new:
        refuse_inside(recipe.solutions, folder.path)
    failed: dict[Part, str] = {}
    interrupted = False
    with contextlib.ExitStack() as stack:
        if folder.path.is_dir():
            stack.enter_context(lock_folder(folder.path))
        mended = folder.open(recipe, parts)
        if new:
            try:
                folder.path.mkdir(parents=True)
            except OSError as error:
                reason = f"cannot be made ({error.strerror}); choose another --out"
                raise RunError(f"{folder.path}: {reason}") from error
            stack.enter_context(lock_folder(folder.path))
        try:
            report = stack.enter_context(write_events(report, folder.path))
            say(report, mended)
            trained = all(map(folder.is_trained, parts))
            setup = _set_up(recipe, folder, report, model, trained=trained)
        except BaseException:
            if new:  # nothing is trained yet
                shutil.rmtree(folder.path, ignore_errors=True)
            raise
        say(report, (f"{name} is left out: {reason}" for name, reason in skipped.items()))
        try:
            rescore(setup.task, folder, setup.scorer)
            _train(setup.task, folder, parts, failed)
            _score(setup, folder, parts, failed)
        except KeyboardInterrupt:
            interrupted = True
        examples = [sequence.example for sequence in setup.test]
        results = results_of(folder, recipe, setup.task.model.info, examples) | setup.facts
        results |= {
            "skipped": skipped,
            "failed": _failures_by_method(failed),
            "interrupted": interrupted,
            "planned": len(parts),
            "trained": sum(map(folder.is_trained, parts)),
            "scored": sum(map(folder.is_scored, parts)),
        }
        if results["rows"]:
            write_json(folder.path / "results.json", results)
            write_file(folder.path / "table.md", methods_markdown(results).encode())
            rows = predictions_of(folder, examples, recipe.group_column)
            write_file(folder.path / "predictions.jsonl", to_json_lines(rows))
            figure = figure_svg(results)
            if figure is not None:
                write_file(folder.path / "figure.svg", figure)
    return shown_as(methods_table, cast(CompareResult, results))


def plan_parts(recipe: Recipe) -> tuple[list[Part], dict[str, str]]:
    """The parts to train, seed by seed, and why other methods cannot run.

    Raises `RecipeError` if one of those is named in the recipe, or its place is not decided,
    and for training rows that are to have no answers.
    """
    if recipe.place == AUTO:
        problem = (
            "template.place: 'auto' is for `optimize`, whose recipe.toml then names the place; "
            "name one here"
        )
        raise RecipeError("recipe", [problem])
    if recipe.teacher and recipe.parts.objective.sampling:
        problem = (
            "objective.direction: 'reverse' is for optimize, as no other method can train on "
            "answers that a student samples; take it out here"
        )
        raise RecipeError("recipe", [problem])
    names = set(recipe.compare.methods)
    asked = [m for n, m in METHODS.items() if not names or n in names or n == TEXT.method]
    reasons = {method.name: method.why_not(recipe) for method in asked}
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    usable = [method for method in asked if method.name not in skipped]
    problems = [f"compare.methods: {n} cannot run: {r}" for n, r in skipped.items() if n in names]
    if problems:
        raise RecipeError("recipe", problems)
    once = [Part(method.name, None) for method in usable if not method.seeded]
    seeded = [method for method in usable if method.seeded]
    return once + [Part(m.name, seed) for seed in recipe.compare.seeds for m in seeded], skipped


@final
@dataclass(frozen=True)
class _Setup:
    """What all parts share; only the scoring sees the test rows."""

    task: Task
    test: Sequence[TokenSequence]
    scorer: dict[str, Any]  # taken at the start, as a scorer's process keeps the code it loaded
    facts: dict[str, Any]


def _set_up(
    recipe: Recipe, folder: Folder, report: Report, model: LanguageModel | None, *, trained: bool
) -> _Setup:
    # A chat template may contain the date; all parts use that of the first one.
    day = folder.shared.get("day", datetime.date.today().isoformat())
    own = replace(recipe.parts, sampling=SamplingEngine()) if trained else recipe.parts
    ready = prepare(
        replace(recipe, parts=own),  # where all is trained an engine has nothing to do
        folder.path / "solutions.jsonl",
        report,
        model=model,
        date=datetime.date.fromisoformat(day),
        tested=True,
    )
    data, info = sources(recipe, ready.splits), ready.model.info
    shared = {f"{name} split": entry["sha256"] for name, entry in data.items()}
    shared |= {"model": info.embedding_digest, "precision": info.dtype, "day": day}
    shared["set of weights"] = weights_digest(ready.model.model)
    solutions = [example.solution for example in ready.written]
    if any(solution is not None for solution in solutions):  # a split's digest has answers only
        texts = json.dumps(solutions).encode()
        shared["set of solutions"] = f"sha256:{hashlib.sha256(texts).hexdigest()}"
    folder.agree(recipe, shared)
    recipe = replace(recipe, training=ready.training, parts=ready.parts)
    task = Task(recipe, ready.model, ready.sequencer, ready.train, ready.dev, report)
    del shared["day"]
    facts = {"data": data, "solutions": ready.solutions, "shared": shared}
    return _Setup(task, ready.test, scorer_fingerprint(task), facts)


def _train(task: Task, folder: Folder, parts: Sequence[Part], failed: dict[Part, str]) -> None:
    greedy = replace(task.recipe.evaluation, samples=0)
    task = replace(task, recipe=replace(task.recipe, evaluation=greedy))
    for number, part in enumerate(parts, 1):
        if folder.is_trained(part):
            continue
        stage(task.report, f"{part}: training {number} of {len(parts)}")
        own = replace(
            task, report=_label_events(task.report, part), state=folder.unfinished / part.folder
        )
        with _note_failure(task.report, part, failed):
            trained = METHODS[part.method].train(own, part.seed or 0)
        if part in failed:
            torch.cuda.empty_cache()  # out here, as an error keeps the tensors of its frames
            continue
        folder.save_training(part, trained)
        took, dev = duration(trained.facts["train_seconds"]), trained.facts["dev"]
        score = ""
        if dev is not None:
            interval = accuracy_interval(dev["accuracy"], len(task.dev))
            score = f", dev accuracy {with_interval(dev['accuracy'], interval)}"
        say(task.report, [f"{part}: ready after {took}{score}"])


def _score(setup: _Setup, folder: Folder, parts: Sequence[Part], failed: dict[Part, str]) -> None:
    task, test = setup.task, setup.test
    left = [p for p in parts if folder.is_trained(p) and not folder.is_scored(p)]
    prefixes = [sequence.prefix for sequence in test]
    task.model.prefix_cache.expect((prefixes, len(left) * task.evaluator().lookups))
    for part in left:
        with _note_failure(task.report, part, failed):
            answers, seconds = _answer(setup, folder, part)
        if part in failed:
            torch.cuda.empty_cache()
            continue
        scores = scores_of(answers, task.sequencer.target.choices, seconds)
        folder.save_scores(part, answers.answered, {**scores, "scorer": setup.scorer})


def _answer(setup: _Setup, folder: Folder, part: Part) -> tuple[Answers, float]:
    """A part's answers to the test rows, and the seconds; resumes after the last saved block."""
    task, test = setup.task, setup.test
    try:
        answers, seconds, scorer = folder.partial_answers(part)
        if setup.scorer and scorer != setup.scorer:
            answers = Answers(score_again(task, answers.answered), answers.tokens)
    except RunError as error:
        say(task.report, [f"{error}; {part} is scored again from the start"])
        answers, seconds = Answers([], []), 0.0
    trained, report = folder.training(part), _label_events(task.report, part)
    free = not task.sequencer.target.choices
    size = BATCHES * task.recipe.evaluation.batch_size if free else BLOCK
    while (first := len(answers.answered)) < len(test):
        began = time.perf_counter()

        block = test[first : first + size]
        own = replace(task, report=part_of(report, str(part), first, len(test)))
        answered, tokens = METHODS[part.method].answer(own, trained, block)
        answers = Answers([*answers.answered, *answered], [*answers.tokens, *tokens])
        seconds += time.perf_counter() - began
        folder.save_partial_answers(part, answers, seconds, setup.scorer)
    return answers, seconds


@contextlib.contextmanager
def _note_failure(report: Report, part: Part, failed: dict[Part, str]) -> Iterator[None]:
    """Note what fails inside; a failure of the text prompt is raised, as all need its scores."""
    try:
        yield
    except FAILURES as error:
        if part == TEXT:
            raise
        failed[part] = text = one_line(error)
        named = text if text.startswith(part.method) else f"{part}: {text}"
        say(report, [f"{named}; the others continue"])


def _failures_by_method(failed: Mapping[Part, str]) -> dict[str, str]:
    """Why methods failed, and with which seeds."""
    seeds: dict[str, dict[str, list[str]]] = {}
    for part, text in failed.items():
        of_text = seeds.setdefault(part.method, {}).setdefault(text, [])
        of_text += [] if part.seed is None else [str(part.seed)]
    return {
        method: "; ".join(
            f"{text} (seed{'s' * (len(of_text) > 1)} {', '.join(of_text)})" if of_text else text
            for text, of_text in texts.items()
        )
        for method, texts in seeds.items()
    }


def _label_events(report: Report, part: Part) -> Report:
    """Add method and seed to events; a note that repeats in every block is reported once."""
    notes = set()

    def add_labels(event: dict[str, Any]) -> None:
        if event.get("event") == "note":
            if event["text"] in notes:
                return
            notes.add(event["text"])
        report({**event, "method": part.method, "seed": part.seed})

    return add_labels
