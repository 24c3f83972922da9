"""Plan a recipe: tokens, memory, time, data problems."""

from __future__ import annotations

import datetime
import math
import time
from dataclasses import asdict, replace
from typing import Any, Required, TypedDict, cast, final

import torch

from embedgrad.data.duplicates import shared_texts
from embedgrad.data.problems import Problems
from embedgrad.data.splits import NAMES, Splits, label_balance
from embedgrad.deploy.rules import GGUF_KINDS, Facts, exportability
from embedgrad.environment import memory_in_use, peak_memory
from embedgrad.errors import DataError, EmbedgradError
from embedgrad.events import Report, stage
from embedgrad.experiments.baselines import Task
from embedgrad.experiments.choose_place import SHARE
from embedgrad.experiments.plan.elicitation import Elicitation
from embedgrad.experiments.plan.elicitation import elicit as measure_elicitation
from embedgrad.experiments.plan.estimate import Budget, Estimate, Estimator, suggest
from embedgrad.experiments.plan.probe import UPTO, Probe, Rates
from embedgrad.experiments.plan.workload import Examples, TokenizedSplits, as_trained, over_choices
from embedgrad.model.capabilities import key_value_bytes, rope_limit, why_not_reusable
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.loading import LoadedModel
from embedgrad.model.loading.device import choose_device
from embedgrad.parts.objectives import CrossEntropy
from embedgrad.parts.scorers.checks import check_answers
from embedgrad.prompt.sequence import Sequencer
from embedgrad.prompt.template import Renderer
from embedgrad.recipe.build import load_parts, read_data, with_replay
from embedgrad.recipe.prefix_cache_effect import lack_of_room
from embedgrad.recipe.recipe import AUTO, Recipe
from embedgrad.recipe.warm_start import read_warm_start
from embedgrad.report.page.notebook import shown_as
from embedgrad.report.terminal.bars import show
from embedgrad.report.terminal.plan_table import plan_and_problems
from embedgrad.training.demonstrations import check_length, demonstrate
from embedgrad.training.self_training import source_of

TEACHER = "the teacher's own passes over the queries are not counted"
UNANSWERED = (
    "--elicit: not measured, as rows lack answers; report.elicit asks for the teacher's first"
)


@final
class PlanResult(TypedDict, total=False):
    """What a recipe takes; problems may end it early, and time and memory need measuring."""

    problems: Required[list[str]]
    model: Required[dict[str, Any]]
    data: Required[dict[str, Any]]
    notes: Required[list[str]]
    spans: list[dict[str, Any]]
    merged: dict[str, Any]
    tokens: dict[str, float]
    course: dict[str, int]
    flops: dict[str, float]
    prefixes: dict[str, Any]
    exports: list[dict[str, Any]]
    measured: bool
    seconds: dict[str, float]
    memory: dict[str, Any]
    replies: dict[str, Any]
    budget: dict[str, Any]
    elicitation: Elicitation


def plan(
    recipe: Recipe,
    *,
    budget: Budget = Budget(),
    measure: bool = True,
    elicit: bool = False,
    report: Report = show,
    started: float | None = None,
) -> PlanResult:
    """What a recipe takes before it runs, as plain JSON values.

    With `measure` the model is loaded and a few batches are timed; without, memory and time are
    left out. With `elicit` too the model answers dev rows, to say whether there is anything to
    elicit. `started` is when the process began, by `time.time`. "problems" lists what would keep a
    run from starting; a plan that they end early lacks what comes after. Raises `ModelError` for
    a model that cannot be used.
    """
    recipe.needs_text("a plan")
    problems, start = Problems(), max(0.0, time.time() - started) if started else 0.0
    splits: Splits | None = None
    try:
        splits = read_data(recipe, problems)
    except DataError as error:
        problems.add([] if problems.lines else [str(error)])
    stage(report, f"loading {recipe.model.name}")
    began = time.perf_counter()
    parts, cache = load_parts(recipe, report, weights=measure)
    (network, tokenizer, info), device = parts, choose_device(recipe.model.device)
    config = network.config.get_text_config(decoder=True)
    model = LanguageModel(parts, prefix_cache_budget=0) if measure else None
    reason = model.why_not_reusable if model else why_not_reusable(network, config)
    fixed = {"start": start, "load": time.perf_counter() - began}
    loading, loaded = peak_memory(device), memory_in_use(device)
    itemsize = getattr(torch, info.dtype).itemsize
    parameters = sum(p.numel() for p in network.parameters())
    values: PlanResult = {
        "problems": problems.lines,
        "model": {
            **{n: getattr(info, n) for n in ("name", "architecture", "dtype", "context")},
            "parameters": parameters,
            "bytes": parameters * itemsize,
            "device": str(device),
        },
        "data": {},
        "notes": [],
    }
    values = shown_as(plan_and_problems, values)
    if splits is None:
        return values
    if recipe.teacher:
        if not recipe.parts.objective.sampling:
            # Cross-entropy reads the same places and choices, and needs no teacher.
            recipe = replace(recipe, parts=replace(recipe.parts, objective=CrossEntropy()))
        values["notes"].append(TEACHER)
    splits, writes = _resolve_solutions(recipe, splits, problems)
    stage(report, "tokenizing")
    began = time.perf_counter()
    try:
        shown = demonstrate(recipe.template, recipe.target, splits.train, recipe.demonstrations)
        sequencer = Sequencer(
            Renderer(shown.template, tokenizer, date=datetime.date.today()),
            tokenizer,
            recipe.target,
            rows=splits.train,
            context=info.context,
            vocabulary=info.vocabulary,
            truncate=recipe.data.truncate,
        )
        check_length(shown, sequencer)
        recipe = replace(recipe, template=shown.template)
        train, dev, test = (problems.each(sequencer, getattr(splits, name)) for name in NAMES)
    except EmbedgradError as error:  # the template: nothing can be tokenized
        problems.add([str(error)])
        return values
    fixed["tokenize"] = time.perf_counter() - began
    try:
        if train and not (writes or recipe.teacher):  # else what is trained on is not written yet
            recipe.parts.check(train)
        if recipe.place != AUTO:  # which leaves out a place of other words
            recipe = replace(recipe, parts=with_replay(recipe, model, sequencer))
            if model is not None:
                read_warm_start(recipe, model, sequencer)
    except EmbedgradError as error:
        problems.add([str(error)])
    limit, prompt = recipe.evaluation.max_new_tokens, len(sequencer.prompt_ids)
    asked = train
    sampling, choices = recipe.parts.objective.sampling, recipe.target.choices
    if sampling is not None and not choices:
        limit = sampling.max_new_tokens or limit
    if writes or (sampling is not None and not choices):
        train = [*_with_solutions(train, min(limit, UPTO))]
    longest_reuse = 0 if reason else rope_limit(config) or math.inf
    tokens = TokenizedSplits(train, dev, test, prompt, longest_reuse, writes)
    merged = [s.example.source for s in tokens.all if s.plain is not None]
    if merged and recipe.merges == "refuse":
        problems.add([f"template.merges: 'refuse', but {len(merged)} rows merge with the span"])
    rows = {name: getattr(splits, name) for name in NAMES}
    data: dict[str, Any] = {}
    for name, part in rows.items():
        balance = label_balance(part)
        answers = balance if recipe.target.choices else len(balance)
        most = max(map(tokens.length, getattr(tokens, name)), default=0)
        data[name] = {"rows": len(part), "answers": answers, "longest": most}
    repeats = shared_texts(rows, recipe.template.columns)
    values |= {
        "data": {**data, "context": info.context, "duplicates": repeats},
        "notes": [
            *values["notes"],
            *splits.notes,
            *sequencer.notes(tokens.all),
            *_trials(recipe),
        ],
        "spans": [asdict(span) for span in sequencer.spans],
        "merged": {"rows": len(merged), "first": next(iter(merged), None)},
    }
    if not train:
        return values
    rates = Rates(text=limit, refined=limit, mean=limit)
    if model is not None:
        stage(report, "measuring a few batches")
        rates = Probe(model, recipe, sequencer, tokens).run()
        if reason is None:
            lack = lack_of_room(model.with_prefix_cache(cache), train, recipe.training.batch_size)
            values["notes"] += [lack] if lack else []
    if writes:
        length = max(round(rates.mean), 1)
        tokens, rates.refined = replace(tokens, train=_with_solutions(train, length)), rates.text
        values["notes"].append(
            "the model writes its own solutions first: the plan assumes that it solves every "
            f"question, in {length} tokens, and that no solutions are stored yet"
        )
    if sampling is not None:
        length = max(round(rates.mean), 1) if rates.mean else max(map(len, train[0].targets)) + 1
        tokens, rates.refined = replace(tokens, train=_with_solutions(train, length)), rates.text
        questions = min(recipe.training.batch_size, len(train))
        values["notes"].append(
            f"a step samples {questions * sampling.samples} answers of about {length} tokens, to "
            f"{questions} questions"
            + f", and up to {sampling.tries} times as many where answers to a question are all "
            "right or all wrong, which the plan does not count"
            * sampling.scored
            + f"; {recipe.parts.sampling.engine} writes them, in a time that the plan does not know"
            * bool(recipe.parts.sampling.engine)
        )
    token = 0 if reason else key_value_bytes(config, itemsize)
    sizes = (token, cache.budget, cache.room - cache.budget, loading, loaded)
    estimator = Estimator(tokens, rates, *sizes, fixed)
    now = estimator(recipe)
    counts = {**_count(recipe, estimator, parts, now), "measured": measure}
    values |= cast(PlanResult, counts)
    values["prefixes"]["reason"] = reason
    if measure:
        over, replies = budget.over(now), asdict(rates)
        longest = replace(estimator, rates=replace(rates, text=limit, refined=limit))
        knobs = suggest(recipe, estimator, budget)
        values |= {
            "seconds": {**now.seconds, "at_most": longest(recipe).seconds["all"]},
            "memory": {**now.memory, "of": "gpu" if device.type == "cuda" else "process"},
            "replies": {n: replies[n] for n in ("text", "refined", "read", "cut", "upto", "mean")},
            "budget": {**asdict(budget), "fits": not over, "over": over, "knobs": knobs},
        }
    if elicit and not all(s.example.answer for s in (*asked, *dev)):
        values["notes"].append(UNANSWERED)
    elif elicit and model is not None and not problems.lines:
        own = model.with_prefix_cache(cache)
        values["elicitation"] = measure_elicitation(
            Task(recipe, own, sequencer, asked, dev, report), report
        )
    return values


def _trials(recipe: Recipe) -> list[str]:
    """A note on what is not in the plan: the trials of the prompt's place."""
    if recipe.place != AUTO:
        return []
    return [
        "template.place = 'auto' comes first: a trial in each of four places, of 1/"
        f"{SHARE} of the steps and two evaluations; the plan is of a run with the span where it "
        "is written"
    ]


def _resolve_solutions(recipe: Recipe, splits: Splits, problems: Problems) -> tuple[Splits, bool]:
    """The rows with what is trained on, and whether the model writes that itself."""
    target, scorer, train = recipe.target, recipe.evaluation.scorer, splits.train
    (source,) = problems.each(
        lambda rows: source_of(recipe.solutions, rows, target, scorer), [train]
    ) or ("answer",)
    if recipe.teacher:
        given = target.choices or recipe.parts.objective.sampling
        source = "answer" if given else "self-written"
    answered = (*splits.dev, *splits.test, *(train if source == "self-written" else ()))
    answered = tuple(example for example in answered if example.answer or not recipe.teacher)
    problems.each(lambda example: check_answers([example], target, scorer), answered)
    if source != "column":  # there may be one that is not used
        splits = replace(splits, train=tuple(replace(row, solution=None) for row in train))
    return splits, source == "self-written"


def _with_solutions(train: Examples, length: int) -> Examples:
    """Examples with targets of `length` tokens; the plan needs no more than their number."""
    return [replace(s, targets=((0,) * length,), gold=0) for s in train]


def _answers(recipe: Recipe, rows: int) -> int:
    """How many answers a run samples from itself, without those that replace others."""
    sampling = recipe.parts.objective.sampling
    assert sampling is not None
    asked = min(recipe.training.batch_size, rows)
    return recipe.training.steps_in_all(rows) * asked * sampling.samples


def _count(
    recipe: Recipe, estimator: Estimator, parts: LoadedModel, now: Estimate
) -> dict[str, Any]:
    """What a recipe takes without any measurement, and where its prompt could be exported."""
    workload, splits, (network, _, info) = now.workload, estimator.splits, parts
    train, choices = as_trained(recipe, splits.train), over_choices(recipe)
    sampling = recipe.parts.objective.sampling
    step = workload.step_tokens
    full = sum(splits.tokens_in_full(s, choices=choices) for s in train) / workload.steps_per_epoch
    weights = sum(p.numel() for p in network.parameters())
    weights -= info.vocabulary * info.width * (1 if info.tied else 2)
    flops = 4 * weights  # 2 a token, and in the backward pass; no attention, no output layer
    counts = ("steps", "steps_per_epoch", "evaluations")
    return {
        "tokens": {
            "prefix": sum(len(s.prefix) for s in train),
            "prompt": splits.prompt * len(train),
            "suffix": sum(splits.own(s) - splits.prompt for s in train),
            "target": sum(len(t) for s in train for t in splits.targets(s, choices=choices)),
            "per_step": step,
            "per_step_without_reuse": full,
        },
        "course": {name: getattr(workload, name) for name in counts}
        | ({} if sampling is None else {"answers": _answers(recipe, len(splits.train))}),
        "flops": {"per_step": flops * step, "per_step_without_reuse": flops * full},
        "prefixes": {
            "token_bytes": estimator.token_bytes,
            "bytes": now.prefix_bytes,
            "room_bytes": estimator.room,
            "slower_room_bytes": estimator.slower_room,
        },
        "exports": exportability(
            Facts(
                prefixes=frozenset(s.prefix for s in splits.all),
                template=recipe.template,
                model_type=network.config.model_type,
                embedding_scale=info.embedding_scale,
                from_gguf=info.kind in GGUF_KINDS,
            )
        ),
    }
