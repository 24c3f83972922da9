"""Measure size and precision of stored prefixes before a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from embedgrad.formatting import size
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.prefix_cache import PrefixCache
from embedgrad.parts.objectives import Objective
from embedgrad.prompt.sequence import Sequencer, TokenSequence
from embedgrad.recipe.recipe import Recipe


def measure_prefixes(
    model: LanguageModel, recipe: Recipe, sequencer: Sequencer, train: Sequence[TokenSequence]
) -> tuple[float | None, list[str]]:
    """The change of the loss by half precision, if that is used, and notes for the user."""
    batch = recipe.training.batch_size
    if model.why_not_reusable is not None:
        return None, [f"prefixes are not reused: {model.why_not_reusable}"]
    lack = lack_of_room(model, train, batch)
    notes = [lack] if lack else []
    if model.prefix_cache.precision != "half":
        return None, notes
    objective, target, rows = recipe.parts.objective, sequencer.target, train[:batch]
    effect = precision_effect(
        model,
        model.embed(sequencer.prompt_ids),
        rows,
        objective,
        choices=objective.needs_choices(available=bool(target.choices)),
        normalize=target.normalize,
    )
    change = f"change a row's loss by {effect:.1e} nats (mean of {len(rows)} rows)"
    return effect, [*notes, f"half-precision prefixes {change}"]


@torch.no_grad()
def precision_effect(
    model: LanguageModel,
    rows_PD: Tensor,
    sequences: Sequence[TokenSequence],
    objective: Objective,
    *,
    choices: bool,
    normalize: bool = False,
) -> float:
    """Mean absolute change of a row's loss, in nats, when prefixes are stored in half precision."""

    def losses_B(prefixes: PrefixCache) -> Tensor:
        outcome = model.with_prefix_cache(prefixes).outcome(
            rows_PD, sequences, choices=choices, normalize=normalize
        )
        return objective.losses(outcome)

    exact, half = PrefixCache(sys.maxsize), PrefixCache(sys.maxsize, precision="half")
    before = losses_B(exact)
    for ids in {sequence.prefix for sequence in sequences}:
        prefix = exact.get(ids)
        if prefix is not None:
            half.put(ids, prefix)
    return (losses_B(half) - before).abs().mean().item()


def lack_of_room(
    model: LanguageModel, sequences: Sequence[TokenSequence], batch: int
) -> str | None:
    """Why not even the prefixes of one batch can be stored; None if they can.

    Also None for a budget of 0, which is deliberate.
    """
    prefixes = {s.prefix for s in sequences if s.prefix}
    if not prefixes or not model.prefix_cache.room:
        return None
    shortest = min(prefixes, key=len)
    # In a separate cache, so that it does not count as a use of this prefix.
    (sample,) = model.with_prefix_cache(PrefixCache(0)).prefixes_of([shortest])
    per_token = model.prefix_cache.to_storage(sample).nbytes / len(shortest)
    need = per_token * sum(sorted(map(len, prefixes))[-batch:])
    if need <= model.prefix_cache.room:
        return None
    return (
        f"prefix_cache.budget: the prefixes of a batch of {batch} rows need {size(need)}, and "
        f"there is room for {size(model.prefix_cache.room)}; the others are computed again in "
        "every step, with the same results; raise the budget or name a folder in prefix_cache.spill"
    )
