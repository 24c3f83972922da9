"""Execute a recipe, new or resumed, in one run folder.

RUN/recipe.toml        every setting, defaults included
RUN/prompt/            the artifact
RUN/checkpoint/step-N/ the training after a step, from which a run resumes; the last two stay
RUN/events.jsonl       what happened, one JSON object a line
RUN/places.json        the trials of the prompt's place, if the run chose it
RUN/solutions.jsonl    what the model wrote to be trained on, if it did
RUN/elicitation.json   what there was to elicit before the training, if the recipe asks
RUN/check_rows.jsonl   rows by which exports are checked
RUN/answers.jsonl      answers to the test rows, kept until all are scored
RUN/predictions.jsonl  the test rows with both prompts' answers
RUN/result.json        the scores
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from embedgrad.atomic_files import finite, write_file, write_json
from embedgrad.errors import add_place, rows_so_far
from embedgrad.events import Report, quiet, say, stage
from embedgrad.experiments.baselines import Task
from embedgrad.experiments.choose_place import choose_place, read_places, with_choice
from embedgrad.experiments.compare.recipe_diff import flatten
from embedgrad.experiments.finish import RunResult, finish, save_prompt
from embedgrad.experiments.plan.elicitation import elicit
from embedgrad.experiments.run_folder import (
    AGAIN,
    PATIENCE,
    begin_files,
    check_resumed,
    facts_of,
    let_scorer_run,
    preparing,
    read_finished,
)
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading.info import embedding_digest
from embedgrad.recipe.build import prepare
from embedgrad.recipe.check_rows import keep_rows
from embedgrad.recipe.prefix_cache_effect import measure_prefixes
from embedgrad.recipe.recipe import AUTO, Recipe
from embedgrad.recipe.warm_start import read_warm_start
from embedgrad.report.event_files import write_events
from embedgrad.report.page.notebook import shown_as
from embedgrad.report.page.run_files import ELICITATION
from embedgrad.report.terminal.bars import show
from embedgrad.report.terminal.tables import comparison_table
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.optimize import optimize
from embedgrad.training.selection import Best
from embedgrad.training.self_training import refuse_inside


def run(
    recipe: Recipe,
    out: str | Path,
    report: Report = show,
    *,
    model: LanguageModel | None = None,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> RunResult:
    """Do everything that a recipe says and return the content of `result.json`.

    A `model` that is loaded already serves several runs, with the prefixes that it stores. `report`
    gets events (plain JSON values), which RUN/events.jsonl keeps; an error that it raises ends the
    run. After Ctrl-C, or once `should_stop`, asked after every step, returns true, the
    best rows so far are saved, and the result says `interrupted` and has no scores.

    `resume` continues the run in `out`, whatever ended it, from its last checkpoint, and comes to
    the rows of a run of that length that was never interrupted, to the bit. Its recipe must be the
    same, but for settings without effect on the training, `training.patience`, and
    `training.epochs` and `training.steps`, which may grow: the longer schedule then holds from the
    step where it resumes. The result of a run that has finished is returned as it is.

    With `template.place = "auto"` the run first chooses a place; see `choose_place`. Until it has
    one there are no rows to save: `should_stop` then raises `KeyboardInterrupt`, as Ctrl-C does.

    Raises `RunError` where `out` exists (with `resume`: is no run, or one of another recipe, data
    or model) or cannot be written, and whatever the recipe's data, template and model raise. A new
    run that fails before it trains leaves no folder behind, unless it holds solutions.
    """
    out = Path(out)
    recipe = Recipe.from_dict(recipe.as_dict())  # it may be made in Python, without any checks
    refuse_inside(recipe.solutions, out)
    recipe = with_choice(recipe, out) if resume else recipe
    let_scorer_run(recipe, resume=resume)
    if resume and (finished := read_finished(recipe, out)) is not None:
        steps = finished["train"]["steps"]
        say(report, [f"{out}: finished already, at step {steps}; nothing is left to resume"])
        return shown_as(comparison_table, finished)
    with ExitStack() as stack:
        settings = flatten(recipe.as_dict())
        events = write_events(report, out, trackers=recipe.report.trackers, settings=settings)
        prepared = preparing(out, report, stack, resume=resume)
        start_events = partial(stack.enter_context, events)
        result = _run(
            recipe, out, prepared, start_events, model, resume=resume, should_stop=should_stop
        )
        return shown_as(comparison_table, result)


def _run(
    recipe: Recipe,
    out: Path,
    prepared: AbstractContextManager[Checkpoint | None],
    start_events: Callable[[], Report],
    model: LanguageModel | None,
    *,
    resume: bool,
    should_stop: Callable[[], bool],
) -> RunResult:
    with prepared as checkpoint:
        made_from = checkpoint.made_from if checkpoint else {}

        def begin() -> Report:
            begin_files(out, recipe.as_toml(out), checkpoint)
            return start_events()

        report = quiet if checkpoint else begin()  # a resume that is refused changes no file
        if recipe.place == AUTO:
            recipe, model = choose_place(recipe, out, report, model=model, should_stop=should_stop)
            write_file(out / "recipe.toml", recipe.as_toml(out).encode())
        places = read_places(out)
        day = datetime.date.fromisoformat(made_from.get("date", places["date"]))
        solutions = None if checkpoint else out / "solutions.jsonl"
        ready = prepare(recipe, solutions, report, model=model, date=day)
        model, sequencer = ready.model, ready.sequencer
        found = facts_of(recipe, ready)
        warm_start = read_warm_start(recipe, model, sequencer)
        if warm_start is not None:
            found["warm_start"] = {
                name: embedding_digest(rows) for name, rows in warm_start.items()
            }
        if checkpoint:
            units = ready.training.units([s.example.group for s in ready.train])
            check_resumed(out, checkpoint, found, ready.training.steps_in_all(len(units)))
            report = begin()
        if recipe.images is None:
            keep_rows(out, sequencer, ready.splits)
        if recipe.report.elicit and not (out / ELICITATION).exists():
            before = Task(recipe, model, sequencer, ready.train, ready.dev, report)
            write_json(out / ELICITATION, finite(elicit(before, report)))
        effect, notes = None, list[str]()
        if recipe.images is None:
            effect, notes = measure_prefixes(model, recipe, sequencer, ready.train)
        say(report, notes)

    stage(report, "refining")
    if checkpoint:
        say(report, [f"resuming at step {checkpoint.step}"])
        step, history = checkpoint.best_step, checkpoint.history
        best = Best(ready.training.metric, checkpoint.best, step, history, len(ready.dev))
        if best.stops_early(ready.training.patience):
            say(report, [f"early stopping ended this run; to train on, set a larger {PATIENCE}"])
    elif resume:
        say(report, [AGAIN])
    try:
        refinement = optimize(
            model,
            sequencer,
            ready.train,
            ready.dev,
            training=ready.training,
            parts=ready.parts,
            evaluation=recipe.evaluation,
            start=ready.start,
            warm_start=warm_start,
            teacher=ready.teacher,
            checkpoint=checkpoint,
            report=report,
            keep=lambda state: replace(state, made_from=found).keep(out / "checkpoint"),
            keep_best=lambda best: save_prompt(recipe, ready, best, out),
            should_stop=should_stop,
        )
    except Exception as error:
        if (kept := rows_so_far(error)) is not None:
            save_prompt(recipe, ready, kept, out)
            add_place(error, out / "prompt")
        raise
    save_prompt(recipe, ready, refinement, out)
    return finish(recipe, ready, refinement, out, report, effect=effect, places=places)
