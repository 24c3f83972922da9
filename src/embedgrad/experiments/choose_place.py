"""Choose where the prompt stands, by a short training in every place.

RUN/places.json   every finished trial, and the choice
"""

from __future__ import annotations

import datetime
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast, final

from embedgrad.atomic_files import write_json
from embedgrad.data.bounded_reads import read_object
from embedgrad.errors import DataError, DivergenceError, RunError, TemplateError
from embedgrad.events import Report, quiet, say, scoring, stage
from embedgrad.formatting import percent
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.prefix_cache import PrefixCache
from embedgrad.prompt.place import PLACES, place_of, place_span
from embedgrad.recipe.build import open_model, prepare
from embedgrad.recipe.recipe import AUTO, Recipe
from embedgrad.recipe.warm_start import read_warm_start
from embedgrad.training.optimize import optimize
from embedgrad.training.selection import Best

FILE = "places.json"
SHARE = 4  # a trial is this many times shorter than the run


@final
class Trial(TypedDict):
    """A short training with the span in one place: its rows, best dev scores, and seconds."""

    rows: int
    steps: int
    dev_rows: int
    text: dict[str, float]
    refined: dict[str, float]
    seconds: float
    seconds_per_step: float


@final
class Places(TypedDict):
    """The content of `places.json`; `left_out` says why a place could not be tried."""

    date: str
    metric: NotRequired[str]
    trials: dict[str, Trial]
    left_out: dict[str, str]
    chosen: NotRequired[str]


def choose_place(
    recipe: Recipe,
    out: Path,
    report: Report = quiet,
    *,
    model: LanguageModel | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Recipe, LanguageModel | None]:
    """The recipe with its span in the place that does best on dev, and the model if it was loaded.

    Every place is trained with the recipe's seed for a quarter of its steps; what decides between
    the steps of a run decides here (`Best`), and of equal places the template's own. Trials that
    `out` has are not repeated. A place that the model's chat template does not take is left out
    with a note, and so is one that parts the words of `training.warm_start`. Raises `DataError`
    without dev rows, and what the recipe's data, template and model raise; Ctrl-C, or
    `should_stop`, ends it with the finished trials kept.
    """
    found = read_places(out)
    own = place_of(recipe.template)
    places = sorted(PLACES, key=lambda place: place != own)
    for place in places:
        if place in found["trials"] or place in found["left_out"]:
            continue
        model = model or open_model(recipe, report)
        try:
            trial, metric = _try(recipe, place, found, out, model, report, should_stop)
        except (TemplateError, RunError) as error:  # RunError: the words of a warm start are others
            found["left_out"][place] = str(error)
            say(report, [f"place {place} is left out: {error}"])
            if len(found["left_out"]) == len(PLACES):
                raise
        else:
            found["trials"][place], found["metric"] = trial, metric
            say(report, [f"place {place}: {describe_trial(trial)}"])
        write_json(out / FILE, found)
    tried = [place for place in places if place in found["trials"]]
    best = Best(found["metric"], {}, rows=found["trials"][tried[0]]["dev_rows"])
    for i, place in enumerate(tried):
        # JSON has no infinite log-loss.
        score = found["trials"][place]["refined"].items()
        best.add({**{n: math.inf if v is None else v for n, v in score}, "step": i}, {})
    found["chosen"] = tried[best.step]
    write_json(out / FILE, found)
    say(report, [f"template.place: {found['chosen']}, of {len(tried)} that were tried on dev"])
    return put_at(recipe, found["chosen"]), model


def read_places(out: Path) -> Places:
    """The trials in a run's folder; none, with today's date, where there are none to read."""
    found = read_object(out / FILE)
    if {"date", "trials", "left_out"} <= found.keys():
        return cast(Places, found)
    return Places(date=datetime.date.today().isoformat(), trials={}, left_out={})


def with_choice(recipe: Recipe, out: Path) -> Recipe:
    """The recipe with the place that an earlier run in `out` has chosen for it."""
    chosen = read_places(out).get("chosen") if recipe.place == AUTO else None
    return put_at(recipe, chosen) if chosen else recipe


def put_at(recipe: Recipe, place: str) -> Recipe:
    """The recipe with its span in a place."""
    return replace(recipe, template=place_span(recipe.template, place), place=place)


def describe_trial(trial: Mapping[str, Any]) -> str:
    """What a trial found, in one line."""
    text, refined = trial["text"], trial["refined"]
    return (
        f"dev accuracy {percent(refined['accuracy'])}, log-loss {refined['log_loss']:.3f} after "
        f"{trial['steps']} steps ({percent(text['accuracy'])}, {text['log_loss']:.3f} with the "
        f"text prompt); {trial['rows']} rows, {trial['seconds_per_step']:.2f} s a step"
    )


def _try(
    recipe: Recipe,
    place: str,
    found: Places,
    out: Path,
    model: LanguageModel,
    report: Report,
    should_stop: Callable[[], bool],
) -> tuple[Trial, str]:
    stage(report, f"trying the place: {place}")
    # Prefixes of one place are of no use to another.
    budget = model.prefix_cache.budget
    ready = prepare(
        put_at(recipe, place),
        None,
        quiet,
        model=model.with_prefix_cache(PrefixCache(budget, precision=model.prefix_cache.precision)),
        date=datetime.date.fromisoformat(found["date"]),
    )
    if not ready.dev:
        raise DataError(
            "template.place: 'auto' chooses on dev rows, and there are none; set data.dev_share, "
            f"or name a place: {', '.join(PLACES)}"
        )
    units = ready.training.units([s.example.group for s in ready.train])
    steps = math.ceil(ready.training.steps_in_all(len(units)) / SHARE)
    seconds: list[float] = []

    def watch(event: dict[str, Any]) -> None:
        """A trial's steps are no steps of the run."""
        if event["event"] == "step":
            seconds.append(event["seconds"])
            report(scoring(f"place {place}, step", event["step"], steps))

    try:
        refinement = optimize(
            ready.model,
            ready.sequencer,
            ready.train,
            ready.dev,
            training=replace(ready.training, steps=steps, evaluate_every=steps, patience=None),
            parts=ready.parts,
            evaluation=recipe.evaluation,
            teacher=ready.teacher,
            warm_start=read_warm_start(recipe, ready.model, ready.sequencer),
            report=watch,
            should_stop=should_stop,
        )
    except DivergenceError as error:
        if error.refinement is None or not error.refinement.best.history:
            raise
        refinement = error.refinement
        say(report, [f"place {place}: {error}"])
    if refinement.ended in ("interrupted", "stopped"):
        if found["trials"]:
            kept = f"{len(found['trials'])} finished trials are kept"
            say(report, [f"{kept}; `embedgrad resume {out}` continues"])
        raise KeyboardInterrupt
    best = refinement.best
    return Trial(
        rows=len(ready.sequencer.prompt_ids),
        steps=refinement.steps,
        dev_rows=len(ready.dev),
        text=_score(best.history[0]),
        refined=_score(best.score),
        seconds=refinement.seconds,
        seconds_per_step=statistics.median(seconds[1:] or seconds or [0.0]),
    ), best.metric


def _score(score: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in score.items() if name != "step"}
