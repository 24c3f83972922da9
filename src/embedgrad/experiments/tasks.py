"""Execute a recipe with [[tasks]]: one training, one run folder each.

OUT/recipe.toml            every setting of every task
OUT/TASK/                  a run folder as `run` writes it, which every command takes
OUT/family.safetensors     what the prompts share, if the parameterization shares anything
OUT/checkpoint/step-N/     the training after a step; the last two stay
OUT/events.jsonl           what happened
OUT/result.json            the scores of all tasks
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypedDict, cast, final

from embedgrad.atomic_files import finite, write_file, write_json
from embedgrad.data.bounded_reads import read_json
from embedgrad.errors import RecipeError, RunError, add_place, rows_so_far
from embedgrad.events import Report, quiet, say, stage
from embedgrad.experiments.compare.recipe_diff import flatten
from embedgrad.experiments.finish import RunResult, finish, save_prompt
from embedgrad.experiments.run_folder import (
    AGAIN,
    begin_files,
    changed_length,
    check_resumed,
    facts_of,
    has_ended,
    let_scorer_run,
    preparing,
    require_run,
)
from embedgrad.model.language_model import LanguageModel
from embedgrad.parts.parameterizations.cp import save_family
from embedgrad.prompt.joint import JointSequencer
from embedgrad.recipe.build import Prepared, prepare
from embedgrad.recipe.check_rows import keep_rows
from embedgrad.recipe.prefix_cache_effect import measure_prefixes
from embedgrad.recipe.provenance import TrainFacts
from embedgrad.recipe.recipe import Recipe
from embedgrad.recipe.tasks import as_toml, read_tasks
from embedgrad.report.event_files import write_events
from embedgrad.report.page.notebook import shown_as
from embedgrad.report.page.run_files import RESULT_VERSION
from embedgrad.report.terminal.bars import show
from embedgrad.report.terminal.tasks_table import tasks_table
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.optimize import optimize_tasks
from embedgrad.training.self_training import refuse_inside
from embedgrad.training.settings import Refinement


@final
class TasksResult(TypedDict):
    """The content of OUT/result.json.

    `tasks` holds each task's result; `mean` the mean over tasks of both prompts' accuracies and of
    their difference, with its 95 % interval, if test rows were scored. `trained_numbers` counts
    those of all prompts together.
    """

    tasks: dict[str, RunResult]
    mean: dict[str, Any] | None
    trained_numbers: int
    train: TrainFacts
    interrupted: bool
    version: int


def run_tasks(
    recipes: Mapping[str, Recipe],
    out: str | Path,
    report: Report = show,
    *,
    model: LanguageModel | None = None,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> TasksResult:
    """Train the prompts of several recipes at once; see `read_tasks`, `optimize_tasks` and `run`.

    Raises what `run` raises.
    """
    out = Path(out)
    for recipe in recipes.values():
        refuse_inside(recipe.solutions, out)
        let_scorer_run(recipe, resume=resume)
    if resume and (finished := _read_finished(recipes, out)) is not None:
        say(report, [f"{out}: finished already; nothing is left to resume"])
        return shown_as(tasks_table, finished)
    some = next(iter(recipes.values()))
    with ExitStack() as stack:
        with preparing(out, report, stack, resume=resume) as checkpoint:

            def begin() -> Report:
                begin_files(out, as_toml(recipes, out), checkpoint, list(recipes))
                settings = flatten({name: each.as_dict() for name, each in recipes.items()})
                trackers = some.report.trackers
                log = write_events(report, out, trackers=trackers, settings=settings)
                return stack.enter_context(log)

            told = quiet if checkpoint else begin()  # a resume that is refused changes no file
            ready, found = _prepare_all(recipes, out, told, model, checkpoint)
            told = begin() if checkpoint else told
        if resume:
            at = f"resuming at step {checkpoint.step}" if checkpoint else AGAIN
            say(told, [at])
        result = _train(recipes, ready, found, out, told, checkpoint, should_stop)
        return shown_as(tasks_table, result)


def _prepare_all(
    recipes: Mapping[str, Recipe],
    out: Path,
    report: Report,
    model: LanguageModel | None,
    checkpoint: Checkpoint | None,
) -> tuple[dict[str, Prepared], dict[str, Any]]:
    """Every task's data and sequences for one model, and what a resumed training must find."""
    made_from = checkpoint.made_from if checkpoint else {}
    dates = [facts["date"] for facts in made_from.values()] or [datetime.date.today().isoformat()]
    day = datetime.date.fromisoformat(dates[0])
    ready: dict[str, Prepared] = {}
    for name, recipe in recipes.items():
        stage(report, f"task {name}")
        solutions = None if checkpoint else out / name / "solutions.jsonl"
        ready[name] = prepare(recipe, solutions, report, model=model, date=day, part=True)
        model = ready[name].model
    JointSequencer({name: each.sequencer for name, each in ready.items()})  # which may refuse
    _check_rows(list(ready.values()))
    found = {name: facts_of(recipes[name], each) for name, each in ready.items()}
    if checkpoint:
        check_resumed(out, checkpoint, found, _steps(ready))
    return ready, found


def _check_rows(ready: Sequence[Prepared]) -> None:
    """What objective, augmentations and metric demand of the rows of all tasks together."""
    parts = ready[0].parts
    parts.check([s for each in ready for s in each.train])
    train, dev = ([e for each in ready for e in getattr(each.splits, n)] for n in ("train", "dev"))
    parts.objective.check(train, dev)
    if len(metrics := {each.training.metric for each in ready}) > 1:
        differ = " or ".join(sorted(metrics))
        why = f"training.metric: 'auto' would be {differ}, by the tasks' solutions; set it"
        raise RecipeError("tasks", [why])


def _steps(ready: Mapping[str, Prepared]) -> int:
    rows = [s.example.group for each in ready.values() for s in each.train]
    training = next(iter(ready.values())).training
    return training.steps_in_all(len(training.units(rows)))


def _train(
    recipes: Mapping[str, Recipe],
    ready: Mapping[str, Prepared],
    found: Mapping[str, Any],
    out: Path,
    report: Report,
    checkpoint: Checkpoint | None,
    should_stop: Callable[[], bool],
) -> TasksResult:
    some, first = next(iter(recipes.values())), next(iter(ready.values()))
    effects: dict[str, float | None] = {}
    for name, each in ready.items():
        write_file(out / name / "recipe.toml", recipes[name].as_toml(out / name).encode())
        keep_rows(out / name, each.sequencer, each.splits)
        effects[name], notes = measure_prefixes(
            each.model, recipes[name], each.sequencer, each.train
        )
        say(report, notes)

    def save_prompts(refined: Mapping[str, Refinement]) -> None:
        for name, refinement in refined.items():
            save_prompt(recipes[name], ready[name], refinement, out / name)

    stage(report, "refining")
    try:
        refined, theta = optimize_tasks(
            first.model,
            {name: each.sequencer for name, each in ready.items()},
            {name: each.train for name, each in ready.items()},
            {name: each.dev for name, each in ready.items()},
            training=first.training,
            parts=first.parts,
            evaluation=some.evaluation,
            checkpoint=checkpoint,
            report=report,
            keep=lambda state: replace(state, made_from=dict(found)).keep(out / "checkpoint"),
            keep_best=save_prompts,
            should_stop=should_stop,
        )
    except Exception as error:
        if (kept := rows_so_far(error)) is not None:
            save_prompts(kept)
            add_place(error, f"{out}/*/prompt")
        raise
    save_family(theta, out)
    save_prompts(refined)  # before any is scored, which may fail
    tasks: dict[str, RunResult] = {}
    for name, refinement in refined.items():
        if any(task["interrupted"] for task in tasks.values()):  # while one was scored
            refinement = replace(refinement, ended="interrupted")
        stage(report, f"scoring {name}")
        tasks[name] = finish(
            *(recipes[name], ready[name], refinement, out / name, report),
            effect=effects[name],
            places={},
        )
    result = TasksResult(
        tasks=tasks,
        mean=_mean(tasks),
        trained_numbers=sum(value.numel() for value in theta.values()),
        train=next(iter(tasks.values()))["train"],
        interrupted=any(task["interrupted"] for task in tasks.values()),
        version=RESULT_VERSION,
    )
    shown = {name: {**task, "artifact": f"{name}/prompt"} for name, task in tasks.items()}
    write_json(out / "result.json", finite({**result, "tasks": shown}))
    return result


def _mean(tasks: Mapping[str, RunResult]) -> dict[str, Any] | None:
    """Means over tasks, the interval of the difference from those of the tasks, as independent."""
    scored = [task for task in tasks.values() if "difference" in task]
    if not scored or len(scored) < len(tasks):
        return None
    edges = [task["difference"]["interval"] for task in scored]
    half = math.sqrt(sum(((high - low) / 2) ** 2 for low, high in edges)) / len(scored)
    difference = fmean(task["difference"]["accuracy"] for task in scored)
    return {
        "text": fmean(task["text"]["accuracy"] for task in scored),
        "refined": fmean(task["refined"]["accuracy"] for task in scored),
        "difference": difference,
        "interval": [difference - half, difference + half],
    }


def _read_finished(recipes: Mapping[str, Recipe], out: Path) -> TasksResult | None:
    """The result of a run that is as long as its recipe says. Raises `RunError`."""
    require_run(out)
    then = read_tasks(out / "recipe.toml") or {}
    if list(then) != list(recipes):
        there, here = (", ".join(names) or "none" for names in (then, recipes))
        raise RunError(f"{out}: [[tasks]] are {there} there and {here} here; start a new run")
    changed = [name for task in recipes for name in changed_length(then[task], recipes[task], out)]
    with suppress(OSError, ValueError, KeyError, TypeError):
        result = read_json(out / "result.json")
        known = result["version"] == RESULT_VERSION and list(result["tasks"]) == list(recipes)
        if known and has_ended(result, changed):
            for name, task in result["tasks"].items():
                task["artifact"] = str(out / name / "prompt")
            return cast(TasksResult, result)
    return None
