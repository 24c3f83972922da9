"""What storing heads takes and changes, measured on a run's own rows before it starts."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from embedgrad.formatting import size
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.prefix_cache import HeadCache
from embedgrad.parts.objectives import Objective
from embedgrad.prompt.sequence import Sequencer, TokenSequence
from embedgrad.recipe.recipe import Recipe


def measure_heads(
    model: LanguageModel, recipe: Recipe, sequencer: Sequencer, train: Sequence[TokenSequence]
) -> tuple[float | None, list[str]]:
    """What half precision changes in the loss, if it is used, and what is to be said of heads."""
    batch = recipe.training.batch_size
    if model.reuse_off:
        return None, [f"heads are not reused: {model.reuse_off}"]
    lack = lack_of_room(model, train, batch)
    notes = [lack] if lack else []
    if model.heads.precision != "half":
        return None, notes
    objective, target, rows = recipe.parts.objective, sequencer.target, train[:batch]
    effect = precision_effect(
        model,
        model.embed(sequencer.span.ids),
        rows,
        objective,
        choices=objective.needs_choices(available=bool(target.choices)),
        normalize=target.normalize,
    )
    told = f"change a row's loss by {effect:.1e} nats (mean of {len(rows)} rows)"
    return effect, [*notes, f"half-precision heads {told}"]


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
    """Mean absolute change of a row's loss, in nats, when heads are stored in half precision."""

    def losses_B(heads: HeadCache) -> Tensor:
        model.heads = heads
        outcome = model.outcome(rows_PD, sequences, choices=choices, normalize=normalize)
        return objective.losses(outcome)

    stored, exact = model.heads, HeadCache(sys.maxsize)
    half = HeadCache(sys.maxsize, precision="half")
    try:
        before = losses_B(exact)
        for ids in {sequence.head for sequence in sequences}:
            head = exact.get(ids)
            if head is not None:
                half.put(ids, head)
        return (losses_B(half) - before).abs().mean().item()
    finally:
        model.heads = stored


def lack_of_room(model: LanguageModel, sequences: Sequence[TokenSequence], batch: int) -> str:
    """A note where not even the heads of one batch can be stored; else nothing.

    A budget of 0 is meant, and gets none.
    """
    heads = {s.head for s in sequences if s.head}
    if not heads or not model.heads.room:
        return ""
    shortest = min(heads, key=len)
    stored, model.heads = model.heads, HeadCache(0)  # a look at one head is no use of it
    try:
        (sample,) = model.heads_of([shortest])
    finally:
        model.heads = stored
    per_token = stored.as_stored(sample).nbytes / len(shortest)
    need = per_token * sum(sorted(map(len, heads))[-batch:])
    if need <= model.heads.room:
        return ""
    return (
        f"head_cache.budget: the heads of a batch of {batch} rows need {size(need)}, and there is "
        f"room for {size(model.heads.room)}; the others are computed anew in every step, with the "
        "same results; raise the budget, or name a folder in head_cache.spill"
    )
