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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from embedgrad.atomic_files import write_file, write_json
from embedgrad.errors import EmbedgradError, RecipeError, RunError, one_line
from embedgrad.events import Report, nowhere, say, scoring, stage
from embedgrad.experiments.baselines import METHODS, Task
from embedgrad.experiments.baselines.base import Answers
from embedgrad.experiments.compare.folder import Folder, Part
from embedgrad.experiments.compare.rescore import judge_again, judged_so_far, scorer_of
from embedgrad.experiments.compare.results import TEXT, results_of, scores_of
from embedgrad.formatting import duration
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading.info import weights_digest
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.recipe.build import prepare, sources
from embedgrad.recipe.recipe import Recipe
from embedgrad.report.terminal.methods_table import figure_svg, methods_markdown
from embedgrad.training.self_training import refuse_inside

BLOCK = 256  # test rows with choices that are answered before they are kept
BATCHES = 4  # of free answers, which take longer
FAILURES = (EmbedgradError, RuntimeError, ValueError)  # out of memory, and what PEFT refuses


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
    if fresh:
        refuse_inside(recipe.solutions, folder.path)
    try:
        _make(folder.path)
        report = sinks()
        opened = _opened(recipe, folder, report, model)
    except BaseException:
        if fresh:  # nothing is learned yet, and the folder is our own
            shutil.rmtree(folder.path, ignore_errors=True)
        raise
    say(report, (f"{name} is left out: {reason}" for name, reason in skipped.items()))
    failed: dict[Part, str] = {}
    interrupted = False
    try:
        judge_again(opened.task, folder, opened.scorer)
        _train(opened.task, folder, parts, failed)
        _score(opened, folder, parts, failed)
    except KeyboardInterrupt:
        interrupted = True
    results = results_of(folder, recipe, opened.task.model.info) | opened.told
    results |= {
        "skipped": skipped,
        "failed": _by_method(failed),
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
    scorer: dict[str, Any]  # as it was when it was first needed: its process keeps it
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
    info = ready.model.info
    shared = {**digests, "model": info.embedding_digest, "precision": info.dtype, "day": day}
    shared["set of weights"] = weights_digest(ready.model.model)
    solutions = [example.solution for example in ready.written]
    if any(solution is not None for solution in solutions):  # a split's digest is of answers alone
        texts = json.dumps(solutions).encode()
        shared["set of solutions"] = f"sha256:{hashlib.sha256(texts).hexdigest()}"
    folder.agree(recipe, shared)
    recipe = replace(recipe, training=ready.training)
    task = Task(recipe, ready.model, ready.sequencer, ready.train, ready.dev, report)
    del shared["day"]
    told = {"data": data, "solutions": ready.solutions, "shared": shared}
    return _Opened(task, ready.test, scorer_of(task), told)


def _train(task: Task, folder: Folder, parts: Sequence[Part], failed: dict[Part, str]) -> None:
    for number, part in enumerate(parts, 1):
        if folder.is_trained(part):
            continue
        where = f"training {number} of {len(parts)}"
        stage(task.report, f"{part}: {where}")
        own = replace(
            task, report=_tagged(task.report, part), state=folder.unfinished / part.folder
        )
        try:
            trained = METHODS[part.method].train(own, part.seed or 0)
        except FAILURES as error:
            _note_failure(task.report, part, error, failed)
        if part in failed:
            torch.cuda.empty_cache()  # outside, as an error holds on to what it was raised among
            continue
        folder.keep_training(part, trained)
        took, dev = duration(trained.facts["train_seconds"]), trained.facts["dev"]
        score = "" if dev is None else f", dev accuracy {100 * dev['accuracy']:.1f} %"
        say(task.report, [f"{part}: ready after {took}{score}"])


def _score(opened: _Opened, folder: Folder, parts: Sequence[Part], failed: dict[Part, str]) -> None:
    task, test = opened.task, opened.test
    left = [p for p in parts if folder.is_trained(p) and not folder.is_scored(p)]
    prefixes = [sequence.prefix for sequence in test]
    task.model.prefix_cache.expect((prefixes, len(left) * task.evaluator().lookups))
    for part in left:
        try:
            answers, seconds = _answers(opened, folder, part)
        except FAILURES as error:
            _note_failure(task.report, part, error, failed)
        if part in failed:
            torch.cuda.empty_cache()
            continue
        scores = scores_of(answers, task.sequencer.target.choices, seconds)
        folder.keep_scores(part, answers.answered, {**scores, "scorer": opened.scorer})


def _answers(opened: _Opened, folder: Folder, part: Part) -> tuple[Answers, float]:
    """A part's answers to the test rows, and the seconds; what there is of them is taken.

    Every block is kept when it is done.
    """
    task, test = opened.task, opened.test
    try:
        answers, seconds = judged_so_far(task, folder, part, opened.scorer)
    except RunError as error:
        say(task.report, [f"{error}; {part} is scored anew"])
        answers, seconds = Answers([], []), 0.0
    own, trained = replace(task, report=_tagged(task.report, part)), folder.training(part)
    free = not task.sequencer.target.choices
    size = BATCHES * task.recipe.evaluation.batch_size if free else BLOCK
    while (first := len(answers.answered)) < len(test):
        began = time.perf_counter()

        def progress(done: int, first: int = first) -> None:
            task.report(scoring(str(part), first + done, len(test)))

        block = test[first : first + size]
        answered, tokens = METHODS[part.method].answer(own, trained, block, progress)
        answers = Answers([*answers.answered, *answered], [*answers.tokens, *tokens])
        seconds += time.perf_counter() - began
        folder.keep_answers(part, answers, seconds, opened.scorer)
    return answers, seconds


def _note_failure(report: Report, part: Part, error: Exception, failed: dict[Part, str]) -> None:
    """Note it; without the text prompt there is nothing to compare with, and it is raised."""
    if part == TEXT:
        raise error
    failed[part] = text = one_line(error)
    named = text if text.startswith(part.method) else f"{part}: {text}"
    say(report, [f"{named}; the others go on"])


def _by_method(failed: Mapping[Part, str]) -> dict[str, str]:
    """Why methods failed, and in which seeds."""
    told: dict[str, dict[str, list[str]]] = {}
    for part, text in failed.items():
        seeds = told.setdefault(part.method, {}).setdefault(text, [])
        seeds += [] if part.seed is None else [str(part.seed)]
    return {method: "; ".join(map(_with_seeds, t.items())) for method, t in told.items()}


def _with_seeds(failure: tuple[str, list[str]]) -> str:
    text, seeds = failure
    return f"{text} (seed{'s' * (len(seeds) > 1)} {', '.join(seeds)})" if seeds else text


def _tagged(report: Report, part: Part) -> Report:
    """Events that say whose they are; what is noted of block after block is told once."""
    noted = set()

    def tagged(event: dict[str, Any]) -> None:
        if event.get("event") == "note":
            if event["text"] in noted:
                return
            noted.add(event["text"])
        report({**event, "method": part.method, "seed": part.seed})

    return tagged
