"""Execute a recipe, new or resumed, in one run folder.

RUN/recipe.toml        every setting, defaults included
RUN/prompt/            the artifact
RUN/checkpoint/        the training at its last evaluation, from which a run resumes
RUN/events.jsonl       what happened, one JSON object a line
RUN/places.json        the trials of the prompt's place, if the run chose it
RUN/solutions.jsonl    what the model wrote to be trained on, if it did
RUN/elicitation.json   what there was to elicit before the training, if the recipe asks
RUN/check_rows.jsonl   rows by which exports are checked
RUN/predictions.jsonl  the test rows with both prompts' answers
RUN/result.json        the scores
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast, final

import torch

from embedgrad.atomic_files import finite, is_leftover, remove_leftovers, write_file, write_json
from embedgrad.environment import peak_memory
from embedgrad.errors import EmbedgradError, RecipeError, RunError
from embedgrad.evaluation.evaluator import Evaluator, evaluate
from embedgrad.evaluation.per_group import GroupComparison, compare_groups
from embedgrad.evaluation.plain_scores import Difference, Scores
from embedgrad.events import Report, quiet, say, stage
from embedgrad.experiments.agreement import Agreement, agree
from embedgrad.experiments.baselines import Task
from embedgrad.experiments.choose_place import Places, choose_place, read_places, with_choice
from embedgrad.experiments.compare.recipe_diff import MAY_CHANGE, differences, flatten
from embedgrad.experiments.plan.elicitation import elicit
from embedgrad.model.compatibility import fit_to_model
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading.info import embedding_digest, weights_digest
from embedgrad.prompt import artifact
from embedgrad.recipe.build import prepare, read_warm_start, sources
from embedgrad.recipe.check_rows import keep_rows
from embedgrad.recipe.paths import moved
from embedgrad.recipe.prefix_cache_effect import measure_prefixes
from embedgrad.recipe.provenance import TrainFacts, predictions, provenance_of, training_facts
from embedgrad.recipe.recipe import AUTO, Recipe
from embedgrad.report.event_files import write_events
from embedgrad.report.figures.series import is_number
from embedgrad.report.page.run_files import ELICITATION, RESULT_VERSION, json_lines
from embedgrad.report.terminal.bars import show
from embedgrad.report.terminal.tables import kept_text
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.loop import optimize
from embedgrad.training.selection import Best
from embedgrad.training.self_training import refuse_inside
from embedgrad.training.settings import Refinement

LENGTHS = ("training.epochs", "training.steps")  # may grow when a run resumes
PATIENCE = "training.patience"  # may change then


@final
class RunResult(TypedDict):
    """The content of `result.json`; only a run that scored test rows has scores."""

    text: NotRequired[Scores]
    refined: NotRequired[Scores]
    teacher: NotRequired[Agreement]
    difference: NotRequired[Difference]
    groups: NotRequired[GroupComparison]
    test_rows: NotRequired[int]
    drift: dict[str, float]
    cosine: dict[str, float]
    nearest_tokens_unchanged: float
    spans: NotRequired[list[dict[str, Any]]]
    tokens: list[dict[str, Any]]
    train: TrainFacts
    artifact: str
    place: NotRequired[Places]
    demonstrations: NotRequired[dict[str, Any]]
    solutions: dict[str, Any]
    interrupted: bool
    prefix_cache: dict[str, Any]
    peak_memory_bytes: int
    threads: int
    version: int


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

    With `template.place = "auto"` the run first chooses a place; see `choose_place`.

    Raises `RunError` where `out` exists (with `resume`: is no run, or one of another recipe, data
    or model) or cannot be written, and whatever the recipe's data, template and model raise. A new
    run that fails before it trains leaves no folder behind, unless it holds solutions.
    """
    out = Path(out)
    recipe = Recipe.from_dict(recipe.as_dict())  # it may be made in Python, without any checks
    refuse_inside(recipe.solutions, out)
    recipe = with_choice(recipe, out) if resume else recipe
    if resume and (finished := read_finished(recipe, out)) is not None:
        steps = finished["train"]["steps"]
        say(report, [f"{out}: finished already, at step {steps}; nothing is left to resume"])
        return finished
    with ExitStack() as stack:
        events = write_events(report, out, tensorboard=recipe.report.tensorboard)
        start_events = partial(stack.enter_context, events)
        return _run(recipe, out, start_events, model, resume=resume, should_stop=should_stop)


def _run(
    recipe: Recipe,
    out: Path,
    start_events: Callable[[], Report],
    model: LanguageModel | None,
    *,
    resume: bool,
    should_stop: Callable[[], bool],
) -> RunResult:
    checkpoint: Checkpoint | None = None
    parents = [parent for parent in out.parents if not parent.exists()]
    if resume:
        checkpoint = Checkpoint.find(out / "checkpoint")
    else:
        try:
            with suppress(FileExistsError):
                out.mkdir(parents=True)
            # A run that was killed at once leaves a folder without a recipe.
            if not (out.is_dir() and all(map(is_leftover, out.iterdir()))):
                raise RunError(f"{out}: exists already; choose another folder for --out")
        except OSError as error:
            why = f"cannot be made ({error.strerror}); choose another folder"
            raise RunError(f"{out}: {why}") from error
    made_from = checkpoint.made_from if checkpoint else {}

    def begin() -> Report:
        remove_leftovers(out)
        if resume:
            _drop_events(out / "events.jsonl", checkpoint.step if checkpoint else -1)
            (out / "result.json").unlink(missing_ok=True)  # of a shorter run
        write_file(out / "recipe.toml", recipe.as_toml(out).encode())
        return start_events()

    try:
        report = quiet if checkpoint else begin()  # a resume that is refused changes no file
        if recipe.place == AUTO:
            recipe, model = choose_place(recipe, out, report, model=model, should_stop=should_stop)
            write_file(out / "recipe.toml", recipe.as_toml(out).encode())
        places = read_places(out)
        day = datetime.date.fromisoformat(made_from.get("date", places["date"]))
        solutions = None if checkpoint else out / "solutions.jsonl"
        ready = prepare(recipe, solutions, report, model=model, date=day)
        model, sequencer, test = ready.model, ready.sequencer, ready.test
        splits = sources(recipe, ready.splits)
        found = {  # what a training depends on besides the recipe
            "date": day.isoformat(),
            "model": {
                "embedding_digest": model.info.embedding_digest,
                "weights": weights_digest(model.model),
            },
            "data": {name: {"sha256": splits[name]["sha256"]} for name in splits},
            "solutions": {"kept": ready.solutions.get("kept")},
        }
        if column := recipe.parts.objective.group_column:
            names = json.dumps([s.example.group_in(column) for s in ready.train])
            found["groups"] = {"sha256": hashlib.sha256(names.encode()).hexdigest()}
        warm_start = read_warm_start(recipe, model, sequencer)
        if warm_start is not None:
            found["warm_start"] = {
                name: embedding_digest(rows) for name, rows in warm_start.items()
            }
        if checkpoint:
            changes = differences(flatten(made_from), flatten(found))
            units = ready.training.units([s.example.group for s in ready.train])
            if checkpoint.step > (total := ready.training.steps_in_all(len(units))):
                changes.append(f"its checkpoint is of step {checkpoint.step} of {total}")
            if changes:
                raise RunError(
                    f"{out}: cannot be resumed, as {changes[0]}; bring back what the run began "
                    "with, or start a new one"
                )
            report = begin()
        keep_rows(out, sequencer, ready.splits)
        if recipe.report.elicit and not (out / ELICITATION).exists():
            before = Task(recipe, model, sequencer, ready.train, ready.dev, report)
            write_json(out / ELICITATION, finite(elicit(before, report)))
        effect, notes = measure_prefixes(model, recipe, sequencer, ready.train)
        say(report, notes)
    except BaseException as error:
        sampled = (out / "solutions.jsonl").exists() and not isinstance(error, EmbedgradError)
        if not (resume or sampled or read_places(out)["trials"]):
            # Nothing is learned yet, and the folder is our own; samples are in the cache too.
            shutil.rmtree(out, ignore_errors=True)
            with suppress(OSError):  # another run may have moved in
                for parent in parents:
                    parent.rmdir()
        raise

    def save(refinement: Refinement) -> None:
        provenance = provenance_of(recipe, ready, refinement, out)
        artifact.save(refinement.prompt.with_provenance(**provenance), out / "prompt")

    stage(report, "refining")
    if checkpoint:
        say(report, [f"resuming at step {checkpoint.step}"])
        choices = bool(recipe.target.choices)
        metric = ready.training.metric_for(recipe.parts.objective, choices=choices)
        step, history = checkpoint.best_step, checkpoint.history
        best = Best(metric, checkpoint.best, step, history, len(ready.dev))
        if best.stops_early(ready.training.patience):
            say(report, [f"early stopping ended this run; to train on, set a larger {PATIENCE}"])
    elif resume:
        say(report, ["no checkpoint: starts again at step 0"])
    try:
        refinement = optimize(
            model,
            sequencer,
            ready.train,
            ready.dev,
            training=ready.training,
            parts=ready.parts,
            evaluation=recipe.evaluation,
            warm_start=warm_start,
            teacher=ready.teacher,
            checkpoint=checkpoint,
            report=report,
            keep=lambda state: replace(state, made_from=found).save(out / "checkpoint"),
            should_stop=should_stop,
        )
    except EmbedgradError as error:
        if error.refinement is not None:
            save(error.refinement)
            error.args = (f"{error}; the last good rows are in {out / 'prompt'}",)
        raise
    save(refinement)
    # From here on only what was saved counts.
    prompt = fit_to_model(artifact.load(out / "prompt"), model.info, model.embed)
    result = training_facts(prompt, model, refinement)
    if ready.demonstrations:
        sources_shown = [example.source for example in ready.demonstrations]
        result["demonstrations"] = {"sources": sources_shown, "text_prompt": "few-shot"}
    if "chosen" in places:
        result["place"] = places
    result["solutions"] = dict(ready.solutions)
    if "file" in ready.solutions:
        result["solutions"]["file"] = "solutions.jsonl"
    result["interrupted"] = refinement.ended in ("interrupted", "stopped")
    if test and not result["interrupted"]:
        evaluator = Evaluator(model, sequencer, recipe.evaluation)
        try:
            comparison = evaluate(evaluator, prompt, test, report)
            groups = compare_groups(recipe.group_column, ready.splits.test, comparison)
            scores = finite({**comparison.as_dict(), **groups})
            result = {**scores, **result}
            if ready.teacher:
                result["teacher"] = finite(agree(ready.teacher, prompt, test, comparison))
            rows = predictions(ready.splits.test, comparison)
            lines = "".join(f"{json.dumps(finite(row), ensure_ascii=False)}\n" for row in rows)
            write_file(out / "predictions.jsonl", lines.encode())
            artifact.save(prompt.with_provenance(scores=scores), out / "prompt")
        except KeyboardInterrupt:
            result["interrupted"] = True
        except RecipeError as error:  # a user's scorer may fail at any reply
            kept = (
                f"{out / 'prompt'} holds the refined prompt; `embedgrad evaluate {out}` scores it"
            )
            raise RunError(f"{error}; {kept}") from error
    result["prefix_cache"] = {**model.prefix_cache.figures, "precision_effect": effect}
    result["peak_memory_bytes"] = peak_memory()
    result["threads"] = torch.get_num_threads()
    result["version"] = RESULT_VERSION
    write_json(out / "result.json", result)
    return cast(RunResult, {**result, "artifact": str(out / "prompt")})


def read_resumable(out: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run that can be resumed. Raises `RunError` and `RecipeError`."""
    if not (out / "recipe.toml").is_file():
        raise RunError(
            f"{out}: holds no run to resume; `embedgrad optimize RECIPE --out {out}` starts one"
        )
    return Recipe.read_run(out, overrides)


def read_finished(recipe: Recipe, out: Path) -> RunResult | None:
    """The result of the run in a folder if it has nothing left to do. Raises `RunError`."""
    then = flatten(read_resumable(out).as_dict())
    now = flatten(recipe.as_dict())
    longer = [name for name in LENGTHS if now.get(name, 0) > then.get(name, math.inf)]
    changes = differences(then, now, (*MAY_CHANGE, *longer, PATIENCE, *moved(then, now)))
    if changes:
        raise RunError(
            f"{out}: {'; '.join(changes)}; a resumed run keeps its recipe, of which only "
            f"{' and '.join(LENGTHS)} may grow and {PATIENCE} may change"
        )
    versions = {"result.json": RESULT_VERSION, "prompt/prompt.json": artifact.VERSION}
    values: dict[str, Any] = {}
    for name, known in versions.items():
        version = None
        with suppress(OSError, ValueError, RecursionError, AttributeError):
            values[name] = json.loads((out / name).read_text(encoding="utf-8"))
            version = values[name].get("version")
        if version not in (None, known):
            raise RunError(
                f"{out / name}: written by another embedgrad (version {version!r}, this one reads "
                f"{known}); resume with the one that wrote it, or start a new run"
            )
    try:
        result: RunResult = values["result.json"]
        train = result["train"]
        more = longer or (train["ended"] == "patience" and then.get(PATIENCE) != now.get(PATIENCE))
        done = "version" in result and "steps" in train and not (more or result["interrupted"])
    except (KeyError, TypeError):
        return None  # scored again, which writes it again
    return {**result, "artifact": str(out / "prompt")} if done else None


def _drop_events(path: Path, step: int) -> None:
    """Take the events after a step out of a log: the resumed run reports them again."""
    if path.is_file():
        kept = [
            f"{json.dumps(event)}\n"
            for _, event in json_lines(path)
            if event and event.get("event") not in (None, "end", "scoring")
            if not is_number(event.get("step")) or event["step"] <= step
        ]
        write_file(path, "".join(kept).encode())


def describe_interruption(result: Mapping[str, Any]) -> str:
    """What an interrupted run leaves, in one line."""
    train, artifact_folder = result["train"], result["artifact"]
    if train["best_step"]:
        rows = f"the best rows so far, of step {train['best_step']}"
    else:
        began = "the text prompt's own rows" if kept_text(result) else "the rows of its warm start"
        rows = f"{began}, as no others scored better on dev"
    return (
        f"interrupted at step {train['steps']}; {artifact_folder} holds {rows}; "
        f"`embedgrad resume {Path(artifact_folder).parent}` continues the run"
    )
