"""What a recipe takes before it runs: tokens, memory, time, and the problems of its data."""

from __future__ import annotations

import datetime
import time
from dataclasses import asdict, replace
from typing import Any

from embedgrad.data.splits import NAMES, Splits, label_balance
from embedgrad.deploy.rules import GGUF_KINDS, Facts, exportability
from embedgrad.errors import EmbedgradError
from embedgrad.events import Report, nowhere, stage
from embedgrad.experiments.plan.estimate import Estimate, Estimator
from embedgrad.experiments.plan.model_profile import Profile, profile_config, profile_loaded
from embedgrad.experiments.plan.probe import Meter, Rates, probe
from embedgrad.experiments.plan.problems import Problems, read_all, repeated_texts
from embedgrad.experiments.plan.suggestions import Budget, suggest
from embedgrad.experiments.plan.workload import TokenizedSplits, objective_choices, targets_of
from embedgrad.parts.scorers.checks import check_answers
from embedgrad.prompt.sequence import Sequencer
from embedgrad.prompt.template import Renderer
from embedgrad.recipe.prefix_cache_effect import lack_of_room
from embedgrad.recipe.recipe import Recipe
from embedgrad.training.self_training import source_of

WRITTEN = 64  # tokens that stand for a solution not yet written while others are measured


def plan(
    recipe: Recipe,
    *,
    budget: Budget = Budget(),
    measure: bool = True,
    report: Report = nowhere,
    started: float | None = None,
) -> dict[str, Any]:
    """What a recipe takes before it runs, as plain JSON values.

    With `measure` the model is loaded and a few batches are timed; without, memory and time are
    left out. `started` is when the process began, by `time.time`. "problems" lists what would keep
    a run from starting. Raises `ModelError` for a model that cannot be used.
    """
    start = 0.0 if started is None else time.time() - started
    problems = Problems()
    splits = read_all(recipe, problems)
    stage(report, f"loading {recipe.model.name}")
    began = time.perf_counter()
    profile = (profile_loaded if measure else profile_config)(recipe, report)
    fixed = {"start": start, "load": time.perf_counter() - began}
    meter = Meter(profile.device)
    loading, loaded = meter.most(), meter.now()
    values: dict[str, Any] = {
        "problems": problems.lines,
        "model": profile.as_dict(),
        "data": {},
        "notes": [],
    }
    if splits is None:
        return values
    splits, writes = _as_trained(recipe, splits, problems)
    answered = [*(splits.train if writes else ()), *splits.dev, *splits.test]
    scorer = recipe.evaluation.scorer
    problems.each(lambda example: check_answers([example], recipe.target, scorer), answered)
    stage(report, "tokenizing")
    began = time.perf_counter()
    try:
        sequencer, tokens = _tokenize(recipe, profile, splits, problems)
    except EmbedgradError as error:  # the template: nothing can be tokenized
        problems.add([str(error)])
        return values
    fixed["tokenize"] = time.perf_counter() - began
    merged = [s.example.source for s in tokens.all if s.plain is not None]
    if merged and recipe.merges == "refuse":
        problems.add([f"template.merges: 'refuse', but {len(merged)} rows merge with the span"])
    values |= {
        "data": _describe_data(recipe, splits, tokens, profile),
        "notes": [*splits.notes, *sequencer.notes(tokens.all)],
        "span": {
            **asdict(sequencer.span),
            "merged_rows": len(merged),
            "merged_first": next(iter(merged), None),
        },
    }
    if not tokens.train:
        return values
    most = recipe.evaluation.max_new_tokens
    rates, written = Rates({}, {}, replies=(most, most)), most
    if profile.model is not None:
        stage(report, "measuring a few batches")
        probed = tokens.with_solutions_of(min(most, WRITTEN)) if writes else tokens
        rates = probe(profile.model, recipe, sequencer, probed, meter)
        written = max(round(rates.mean), 1)
        lack = lack_of_room(profile.model, tokens.train, recipe.training.batch_size)
        values["notes"] += [lack] if lack and tokens.reuse else []
    if writes:
        tokens = tokens.with_solutions_of(written)
        rates = replace(rates, replies=(rates.replies[0],) * 2)
        values["notes"].append(
            "the model writes its own solutions first: the plan assumes that it solves every "
            f"question, in {written} tokens, and that no solutions are stored yet"
        )
    estimator = Estimator(
        splits=tokens,
        rates=rates,
        model_bytes=values["model"]["bytes"],
        token_bytes=profile.token_bytes,
        itemsize=profile.itemsize,
        room=profile.cache.budget,
        slower_room=profile.cache.room - profile.cache.budget,
        fixed=fixed,
        loading=loading,
        loaded=loaded,
        writes=writes,
    )
    now = estimator(recipe)
    values |= {**_count(recipe, estimator, profile, now), "measured": measure}
    if measure:
        values |= _measured(recipe, estimator, now, budget)
        values["memory"]["of"] = "gpu" if meter.on_gpu else "process"
    return values


def _as_trained(recipe: Recipe, splits: Splits, problems: Problems) -> tuple[Splits, bool]:
    """The rows with what is trained on, and whether the model writes that itself."""
    scorer = recipe.evaluation.scorer
    sources = problems.each(
        lambda rows: source_of(recipe.solutions, rows, recipe.target, scorer), [splits.train]
    )
    if sources == ["column"]:
        return splits, False
    # A column of solutions may be there and not be used.
    bare = tuple(replace(example, solution=None) for example in splits.train)
    return replace(splits, train=bare), sources == ["self-written"]


def _tokenize(
    recipe: Recipe, profile: Profile, splits: Splits, problems: Problems
) -> tuple[Sequencer, TokenizedSplits]:
    """Every row as tokens; rows that a run would refuse are problems."""
    cut, context = recipe.data.truncate, profile.parts.info.context
    sequencer = Sequencer(
        Renderer(recipe.template, profile.parts.tokenizer, date=datetime.date.today()),
        profile.parts.tokenizer,
        recipe.target,
        rows=splits.train,
        context=context if cut else 0,
        truncate=cut,
    )
    train, dev, test = (problems.each(sequencer, getattr(splits, name)) for name in NAMES)
    tokens = TokenizedSplits(
        train,
        dev,
        test,
        prompt=len(sequencer.span.ids),
        reuse=profile.why_not_reusable is None,
        longest_reuse=profile.longest_reuse,
    )
    problems.add(
        [
            f"{s.example.source}: {tokens.length(s)} tokens, but the model takes {context}; "
            "shorten the row, drop it, or set data.truncate to the column that may be cut"
            for s in tokens.all
            if 0 < context < tokens.length(s)
        ]
    )
    return sequencer, tokens


def _describe_data(
    recipe: Recipe, splits: Splits, tokens: TokenizedSplits, profile: Profile
) -> dict[str, Any]:
    """Rows, answers and lengths by split, and repeated texts."""
    data: dict[str, Any] = {}
    for name in NAMES:
        balance = label_balance(getattr(splits, name))
        data[name] = {
            "rows": len(getattr(splits, name)),
            "answers": balance if recipe.target.choices else len(balance),
            "longest": max(map(tokens.length, getattr(tokens, name)), default=0),
        }
    repeats = repeated_texts(splits, recipe.template.columns)
    return {**data, "context": profile.parts.info.context, "duplicates": repeats}


def _count(recipe: Recipe, estimator: Estimator, profile: Profile, now: Estimate) -> dict[str, Any]:
    """Tokens, floating-point operations and bytes of prefixes, and where the prompt could go.

    Operations are two per token and weight, as many again in a step's backward pass; attention and
    the output layer are left out.
    """
    workload, splits, choices = now.workload, estimator.splits, objective_choices(recipe)
    train, token = splits.train, estimator.stored_bytes(recipe)
    without = sum(splits.tokens_in_full(s, choices=choices) for s in train)
    without /= workload.steps_per_epoch
    flops = dict.fromkeys(("solutions", "prefixes", "steps", "dev", "test"), 0.0)
    for (part, _), work in workload.work.items():
        flops[part] += (4 if part == "steps" else 2) * profile.weights * work.tokens
    names = ("steps", "steps_per_epoch", "evaluations")
    return {
        "tokens": {
            "prefix": sum(len(s.prefix) for s in train),
            "different_prefixes": sum(map(len, {s.prefix for s in train})),
            "prompt": splits.prompt * len(train),
            "suffix": sum(len(s.suffix) for s in train),
            "target": sum(len(t) for s in train for t in targets_of(s, choices=choices)),
            "per_step": workload.work["steps", "steps"].tokens / workload.steps,
            "per_step_without_reuse": without,
        },
        "course": {name: getattr(workload, name) for name in names},
        "flops": {
            **flops,
            "all": sum(flops.values()),
            "steps_without_reuse": 4.0 * profile.weights * without * workload.steps,
        },
        "prefixes": {
            "reuse": splits.reuse,
            "reason": profile.why_not_reusable,
            "token_bytes": token,
            "bytes": token * workload.all_prefixes,
            "room_bytes": estimator.room,
            "slower_room_bytes": estimator.slower_room,
            "stored_bytes": min(estimator.room, token * workload.all_prefixes),
        },
        "exports": exportability(
            Facts(
                prefixes=frozenset(s.prefix for s in splits.all),
                template=recipe.template,
                model_type=profile.parts.model.config.model_type,
                embedding_scale=profile.parts.info.embedding_scale,
                from_gguf=profile.parts.info.kind in GGUF_KINDS,
            )
        ),
    }


def _measured(
    recipe: Recipe, estimator: Estimator, now: Estimate, budget: Budget
) -> dict[str, Any]:
    """Seconds and bytes, and whether they are within the budget."""
    rates, most = estimator.rates, recipe.evaluation.max_new_tokens
    train = sum(now.seconds[name] for name in ("prefixes", "steps", "dev"))
    seconds = {**now.seconds, "train": train, "all": now.total}
    if not recipe.target.choices:
        longest = replace(estimator, rates=replace(rates, replies=(most, most)))
        seconds["at_most"] = longest(recipe).total
    (text, refined), read = rates.replies, ("read", "cut", "upto", "mean")
    exceeded = budget.exceeded(now)
    return {
        "seconds": seconds,
        "memory": now.memory,
        "replies": {"text": text, "refined": refined, **{n: getattr(rates, n) for n in read}},
        "probe": {"seconds": rates.probe},
        "budget": {
            **asdict(budget),
            "fits": not exceeded,
            "over": exceeded,
            "knobs": [asdict(knob) for knob in suggest(recipe, estimator, budget)],
        },
    }
