"""The parts of a plan as plain JSON values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from embedgrad.data.splits import NAMES, Splits, label_balance
from embedgrad.deploy.rules import GGUF_KINDS, Facts
from embedgrad.experiments.plan.batches import Rows, over_choices, training_batches
from embedgrad.experiments.plan.estimate import Estimate, Estimator
from embedgrad.experiments.plan.flops import Reuse, total, tree, work
from embedgrad.experiments.plan.model_profile import Described
from embedgrad.experiments.plan.model_shape import Shape
from embedgrad.experiments.plan.problems import repeated_texts
from embedgrad.experiments.plan.suggestions import Budget, knobs, together
from embedgrad.experiments.plan.workload import step_passes
from embedgrad.prompt.sequence import Sequencer, TokenSequence
from embedgrad.recipe.recipe import Recipe

ROW_BYTES = 4  # a number of an artifact, in float32


def of_model(model: Described) -> dict[str, Any]:
    """What the model is."""
    return {
        "name": model.name,
        "architecture": (model.config.architectures or [model.config.model_type])[0],
        "parameters": model.shape.parameters,
        "bytes": model.shape.model_bytes,
        "dtype": model.dtype,
        "device": str(model.device),
        "context": model.context,
    }


def of_data(
    recipe: Recipe,
    splits: Splits,
    parts: dict[str, tuple[list[TokenSequence], int]],
    context: int,
) -> dict[str, Any]:
    """Rows, answers and lengths by split, and texts that stand twice."""
    found: dict[str, Any] = {}
    for name in NAMES:
        examples = getattr(splits, name)
        balance = label_balance(examples)
        found[name] = {
            "rows": len(examples),
            "answers": balance if recipe.target.choices else len(balance),
            "longest": parts[name][1],
        }
    found["context"] = context
    found["duplicates"] = repeated_texts(splits, recipe.template.columns)
    return found


def of_tokens(recipe: Recipe, rows: Rows, reuse: Reuse, now: Estimate) -> dict[str, Any]:
    """An epoch's tokens by part, and how many a step computes with reuse and without."""
    train, prompt = rows.train, rows.prompt
    choices = over_choices(recipe)
    wanted = [s.targets if choices else (s.targets[s.gold],) for s in train]
    reused = without = 0
    for s, targets in zip(train, wanted, strict=True):
        full = sum(len(s.prefix) + prompt + len(s.suffix) + len(ids) - 1 for ids in targets)
        own = prompt + len(s.suffix) + tree(tuple(targets))[0]
        reused += own if reuse.takes(s, prompt, targets) else full
        without += full
    steps = now.course.steps_per_epoch
    return {
        "prefix": sum(len(s.prefix) for s in train),
        "different_prefixes": sum(map(len, {s.prefix for s in train})),
        "prompt": prompt * len(train),
        "suffix": sum(len(s.suffix) for s in train),
        "target": sum(len(ids) for targets in wanted for ids in targets),
        "per_step": reused / steps,
        "per_step_without_reuse": without / steps,
    }


def of_span(sequencer: Sequencer, rows: Rows) -> dict[str, Any]:
    """Which tokens the span becomes, and the rows whose own text merges with it."""
    merged = [s for s in rows.everything if s.plain is not None]
    return {
        **asdict(sequencer.span),
        "merged_rows": len(merged),
        "merged_first": merged[0].example.source if merged else None,
    }


def of_prefixes(recipe: Recipe, model: Described, now: Estimate) -> dict[str, Any]:
    """Bytes of prefixes against the room for them."""
    return {
        "reuse": model.why_not_reusable is None,
        "reason": model.why_not_reusable,
        "token_bytes": model.shape.token_bytes(recipe.prefix_cache.precision),
        "bytes": now.course.building.all_bytes,
        "room_bytes": model.room,
        "slower_room_bytes": model.slower_room,
        "stored_bytes": now.course.building.test_bytes,
    }


def of_course(now: Estimate) -> dict[str, int]:
    """How often what is done."""
    run = now.course
    return {
        "steps": run.steps,
        "steps_per_epoch": run.steps_per_epoch,
        "evaluations": run.evaluations,
    }


def of_work(
    recipe: Recipe, rows: Rows, shape: Shape, reuse: Reuse, now: Estimate
) -> dict[str, float]:
    """Floating-point operations by what they are for."""
    run, off = now.course, reuse._replace(on=False)
    batches = [
        step_passes(recipe, batch, rows.prompt, off)
        for batch in training_batches(recipe, rows, run.steps)
    ]
    plain = total(work(shape, made, backward=True) for parts in batches for made in parts).flops
    return {
        "solutions": run.writing.flops,
        "prefixes": run.building.training.flops + run.building.test.flops,
        "steps": run.training.flops,
        "evaluations": run.dev.flops + run.dev_decoding.flops,
        "test": run.test.flops + run.test_decoding.flops,
        "all": run.all.flops,
        "steps_without_reuse": plain * run.steps / len(batches),
    }


def export_facts(recipe: Recipe, rows: Rows, model: Described) -> Facts:
    """What decides where the prompt could go."""
    return Facts(
        prefixes=frozenset(s.prefix for s in rows.everything),
        template=recipe.template,
        model_type=model.config.model_type,
        embedding_scale=model.embedding_scale,
        from_gguf=model.kind in GGUF_KINDS,
    )


def of_sizes(rows: Rows, model: Described) -> dict[str, int]:
    """Bytes of what is left on disk: rows before and after, and one export of each kind."""
    width, prompt = model.shape.width, rows.prompt
    longest = max(len(s.prefix) + prompt + len(s.suffix) for s in rows.everything)
    size = model.shape.itemsize
    return {
        "prompt.safetensors": 2 * prompt * width * ROW_BYTES,
        "vocabulary": model.shape.model_bytes + prompt * width * size,
        "prompt_embeddings_of_a_query": longest * width * size,
    }


def of_measurement(
    recipe: Recipe, estimator: Estimator, now: Estimate, budget: Budget, *, on_gpu: bool
) -> dict[str, Any]:
    """Seconds and bytes as measured, and whether they are within the budget."""
    rates = estimator.rates
    seconds = {**now.seconds, "train": now.train, "all": now.total}
    if not recipe.target.choices:
        seconds["at_most"] = estimator.at_most(recipe)
    over = budget.over(now)
    found = knobs(recipe, estimator, budget) if over else []
    fitting = any(knob.fits for knob in found)
    joint = together(recipe, estimator, budget, found) if over and not fitting else []
    return {
        "seconds": seconds,
        "memory": {**now.memory, "of": "gpu" if on_gpu else "process"},
        "replies": {
            **asdict(rates.replies),
            "read": rates.read,
            "cut": rates.cut,
            "upto": rates.upto,
            "mean": rates.mean_reply,
        },
        "probe": {"seconds": rates.probe_seconds},
        "budget": {
            **asdict(budget),
            "fits": not over,
            "over": over,
            "knobs": [asdict(knob) for knob in found],
            "together": [asdict(knob) for knob in joint],
        },
    }
