"""A recipe read to the end without being run."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from embedgrad.data.splits import NAMES, Splits
from embedgrad.deploy.rules import exportability
from embedgrad.errors import EmbedgradError
from embedgrad.events import Report, nowhere, stage
from embedgrad.experiments.plan import summary
from embedgrad.experiments.plan.batches import Rows
from embedgrad.experiments.plan.estimate import Estimator, Machine, Rates
from embedgrad.experiments.plan.meter import Meter
from embedgrad.experiments.plan.model_profile import described, loaded, sequencer_of, tokenized
from embedgrad.experiments.plan.probe import probe
from embedgrad.experiments.plan.problems import Problems, answers_without_score, read_all
from embedgrad.experiments.plan.suggestions import Budget
from embedgrad.experiments.plan.workload import Replies
from embedgrad.recipe.prefix_cache_effect import lack_of_room
from embedgrad.recipe.recipe import Recipe
from embedgrad.training.self_training import source_of

WRITTEN = 64  # tokens of a solution that is not written yet, while others are measured


def plan(
    recipe: Recipe,
    *,
    budget: Budget = Budget(),
    measure: bool = True,
    report: Report = nowhere,
    started: float | None = None,
) -> dict[str, Any]:
    """Everything that can be said of a recipe before it runs, as plain JSON values.

    With `measure` the model is loaded and a few steps are timed; without, memory and time are left
    out. `started` is when the process began, by `time.time`. What would keep a run from starting is
    in "problems". Raises `ModelError` for a model that cannot be had.
    """
    start = 0.0 if started is None else time.time() - started
    problems = Problems()
    splits = read_all(recipe, problems)
    stage(report, f"loading {recipe.model.name}")
    began = time.perf_counter()
    model = loaded(recipe, report) if measure else described(recipe, report)
    load_seconds = time.perf_counter() - began
    meter = Meter(model.device)
    load_bytes = meter.most()
    found: dict[str, Any] = {
        "problems": problems.lines,
        "model": summary.of_model(model),
        "data": {},
        "notes": [],
    }
    if splits is None:
        return found
    splits, writes = _as_trained(recipe, splits, problems)
    scored = [*(splits.train if writes else ()), *splits.dev, *splits.test]
    answers_without_score(recipe, scored, problems)
    stage(report, "tokenizing")
    began = time.perf_counter()
    try:
        sequencer = sequencer_of(recipe, model, splits)
        parts = {
            name: tokenized(sequencer, getattr(splits, name), model.context, problems)
            for name in NAMES
        }
    except EmbedgradError as error:  # the template: nothing can be tokenized
        problems.add([str(error)])
        return found
    per_row = (time.perf_counter() - began) / sum(len(getattr(splits, name)) for name in NAMES)
    train, dev, test = (parts[name][0] for name in NAMES)
    rows = Rows(train, dev, test, len(sequencer.span.ids))
    found["data"] = summary.of_data(recipe, splits, parts, model.context)
    found["notes"] += [*splits.notes, *sequencer.notes(rows.everything)]
    found["span"] = summary.of_span(sequencer, rows)
    if found["span"]["merged_rows"] and recipe.merges == "refuse":
        problems.add(
            [f"template.merges: 'refuse', but {found['span']['merged_rows']} rows merge with it"]
        )
    if not train:
        return found
    machine = Machine(start, load_seconds, per_row, meter.now(), load_bytes)
    most = recipe.evaluation.max_new_tokens
    rates, length = Rates(replies=Replies(most, most)), most
    if model.model is not None:
        stage(report, "measuring a few steps")
        probed = rows.with_targets_of(min(most, WRITTEN)) if writes else rows
        rates = probe(model.model, recipe, sequencer, probed, model.shape, model.reuse, meter)
        length = max(round(rates.mean_reply), 1)
        if model.why_not_reusable is None:
            lack = lack_of_room(model.model, train, recipe.training.batch_size)
            found["notes"] += [lack] if lack else []
    if writes:
        rows = rows.with_targets_of(length)
        rates = dataclasses.replace(rates, replies=Replies(rates.replies.text, rates.replies.text))
        found["notes"].append(
            f"the model writes its own solutions first: every question is counted as solved, in "
            f"{length} tokens, and none as stored from before"
        )
    estimator = Estimator(
        rows, model.shape, model.reuse, machine, rates, model.room, model.slower_room, writes
    )
    now = estimator(recipe)
    found |= {
        "tokens": summary.of_tokens(recipe, rows, model.reuse, now),
        "course": summary.of_course(now),
        "flops": summary.of_work(recipe, rows, model.shape, model.reuse, now),
        "prefixes": summary.of_prefixes(recipe, model, now),
        "exports": exportability(summary.export_facts(recipe, rows, model)),
        "sizes": summary.of_sizes(rows, model),
        "measured": measure,
    }
    if measure:
        found |= summary.of_measurement(recipe, estimator, now, budget, on_gpu=meter.on_gpu)
    return found


def _as_trained(recipe: Recipe, splits: Splits, problems: Problems) -> tuple[Splits, bool]:
    """The rows with what is trained on, and whether the model writes that itself."""
    scorer = recipe.evaluation.scorer
    source = problems.tried(
        lambda: source_of(recipe.solutions, splits.train, recipe.target, scorer)
    )
    if source == "column":
        return splits, False
    # A column of solutions may be there and not be used.
    bare = tuple(dataclasses.replace(example, solution=None) for example in splits.train)
    return dataclasses.replace(splits, train=bare), source == "self-written"
