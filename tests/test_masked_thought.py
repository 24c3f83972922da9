"""Masked thought: noise in what the model reads of a worked solution, and nowhere else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from embedgrad.data.examples import Example
from embedgrad.errors import RecipeError
from embedgrad.events import quiet
from embedgrad.experiments.plan import plan
from embedgrad.model.prefix_cache import PrefixCache
from embedgrad.parts.augmentations import BatchContext, MaskedThought
from embedgrad.prompt.sequence import DROPPED, MEAN, ZERO, Target, TokenSequence
from embedgrad.recipe.build import prepare
from embedgrad.recipe.recipe import Recipe
from embedgrad.training.checkpoint import Checkpoint
from embedgrad.training.settings import Parts, Refinement
from kit import Kit, forget_longest_pass, noisy
from kit_loop import FAST, QUICK, small, train
from run_kit import values
from tiny import reviews

pytest_plugins = ["tiny_runs"]

KINDS = ["random", "mean", "zero", "drop"]


def solved(architecture: str = "llama", **options: Any) -> Kit:
    """Rows whose answer comes behind a worked solution."""
    rows = [
        dataclasses.replace(e, solution=f"dull, cold, a waste of money: {e.answer} it is")
        for e in reviews(12)
    ]
    return small(architecture, rows=rows, target=Target(), **options)


def long_row(tokens: int) -> TokenSequence:
    return TokenSequence(
        (), (1,), ((7,) * tokens,), 0, None, Example({}, "a", "s:1"), reasoning=tokens
    )


def noised(kind: str, batch: list[TokenSequence], **options: Any) -> list[TokenSequence]:
    settings: dict[str, Any] = {"rate": 0.9, "ramp": 0.0, "noise": kind, **options}
    return MaskedThought(**settings)(batch, BatchContext(seed=0, step=1, total=9, vocabulary=300))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_reasoning_is_noised_and_no_label(kind: str) -> None:
    batch = solved().sequences
    for row, out in zip(batch, noised(kind, batch), strict=True):
        assert 3 < row.reasoning < len(row.targets[0]) - 2
        assert out.inputs is not None
        assert dataclasses.replace(out, inputs=None) == row
        changed = [a != b for a, b in zip(out.inputs[0], out.targets[0], strict=True)]
        assert sum(changed) >= row.reasoning / 2
        assert not any(changed[row.reasoning :])
    beyond = [
        a != b
        for row in noised(kind, batch, protect_answer=False)
        for a, b in list(zip((row.inputs or row.targets)[0], row.targets[0], strict=True))[
            row.reasoning :
        ]
    ]
    assert sum(beyond) >= len(beyond) / 2
    bare = [dataclasses.replace(s, reasoning=0) for s in batch]
    assert noised(kind, bare) == bare


@pytest.mark.parametrize("share", [0.0, 0.33, 0.66, 1.0])
def test_the_rate_rises_to_its_full_value(share: float) -> None:
    total, tokens = 1000, 20_000
    step = round(share * total)
    masked = MaskedThought(rate=0.4, noise="zero")
    (out,) = masked([long_row(tokens)], BatchContext(seed=0, step=step, total=total, vocabulary=9))
    expected = min(0.4, 0.4 * step / (0.66 * total + 1))
    assert expected == pytest.approx({0.0: 0, 0.33: 0.2, 0.66: 0.4, 1.0: 0.4}[share], abs=1e-3)
    found = 0 if out.inputs is None else out.inputs[0].count(ZERO) / tokens
    assert found == pytest.approx(expected, abs=3 * (expected * (1 - expected) / tokens) ** 0.5)


def test_random_tokens_are_drawn_from_the_whole_vocabulary() -> None:
    masked = MaskedThought(rate=0.5, ramp=0.0)
    (out,) = masked([long_row(20_000)], BatchContext(seed=0, step=1, total=9, vocabulary=50))
    assert out.inputs is not None
    counts = [out.inputs[0].count(token) for token in range(50) if token != 7]
    assert all(120 < count < 280 for count in counts)
    assert sum(counts) + out.inputs[0].count(7) == 20_000


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "llama-dynamic"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_reads_the_noise(architecture: str, kind: str) -> None:
    made = solved(architecture, dtype=torch.float64)
    batch, rows = noised(kind, made.sequences[:4], rate=0.5), noisy(made.start)
    model: Any = made.loaded.model
    table = model.get_input_embeddings()
    plain = made.model.outcome(rows, made.sequences[:4]).logprobs_BC
    found = made.model.outcome(rows, batch).logprobs_BC
    assert (found - plain).abs().min() > 1e-4
    mean_D = table(torch.arange(table.num_embeddings)).mean(0)
    for row, logprob in zip(batch, found[:, 0], strict=True):
        assert row.inputs is not None
        read = torch.tensor([*row.suffix, *row.inputs[0][:-1]])
        embeds = table(read.clamp(min=0))
        embeds[read < 0] = 0.0
        embeds[read == MEAN] = mean_D
        embeds = torch.cat([table(torch.tensor(row.prefix)), rows, embeds])[None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        mask[0, -len(read) :] = (read != DROPPED).long()
        forget_longest_pass(model)
        with torch.no_grad():
            logits = model(inputs_embeds=embeds, attention_mask=mask).logits[0]
        labels = torch.tensor(row.targets[0])
        logprobs = torch.log_softmax(logits[-len(labels) :], dim=1)
        assert abs(logprob - logprobs[torch.arange(len(labels)), labels].sum()) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_stored_prefixes_stay_exact(kind: str) -> None:
    """The noise lies behind the rows, so that no prefix is built for it."""
    made = solved()
    batch, rows = noised(kind, made.sequences), noisy(made.start)
    made.model.outcome(rows, made.sequences)
    misses = made.model.prefix_cache.misses
    found = made.model.outcome(rows, batch).logprobs_BC
    assert made.model.prefix_cache.misses == misses > 0
    nothing_stored = made.with_cache(PrefixCache(0)).model
    assert torch.equal(found, nothing_stored.outcome(rows, batch).logprobs_BC)


@pytest.mark.parametrize("kind", KINDS)
def test_rate_zero_is_no_augmentation_and_a_resume_gives_the_same_rows(kind: Any) -> None:
    made, kept = solved(), list[Checkpoint]()

    def run(*rates: float, checkpoint: Checkpoint | None = None) -> Refinement:
        masked = tuple(MaskedThought(rate=rate, noise=kind) for rate in rates)
        parts = dataclasses.replace(FAST, augmentations=masked)
        training = dataclasses.replace(QUICK, evaluate_every=2)
        options = {"parts": parts, "checkpoint": checkpoint, "keep": kept.append}
        return train(made, training, **options)

    plain, silent, whole = run(), run(0.0), run(0.5)
    assert torch.equal(plain.checkpoint.theta["span"], silent.checkpoint.theta["span"])
    assert not torch.equal(plain.checkpoint.theta["span"], whole.checkpoint.theta["span"])
    resumed = run(0.5, checkpoint=kept[-2])
    assert torch.equal(resumed.checkpoint.theta["span"], whole.checkpoint.theta["span"])


def test_what_cannot_be_noised_is_refused(model_folder: Path, data: Path) -> None:
    with pytest.raises(RecipeError, match="rate: 1 leaves no token of a solution; give a share"):
        MaskedThought(rate=1)
    settings = values(model_folder, data)
    with pytest.raises(RecipeError, match=r"augmentations\.0\.rate: .*less than or equal to 1"):
        Recipe.from_dict(settings | {"augmentations": [{"name": "masked_thought", "rate": 1.5}]})
    with pytest.raises(RecipeError, match=r"augmentations\.0: masked_thought .*data\.solution"):
        train(small(), parts=Parts(augmentations=(MaskedThought(),)))
    choices = Recipe.from_dict(settings | {"augmentations": ["masked_thought"]})
    with pytest.raises(RecipeError, match=r"augmentations\.0: masked_thought .*take it out"):
        prepare(choices, None, quiet)
    (told,) = plan(choices, measure=False)["problems"]
    assert told.startswith("recipe: augmentations.0: masked_thought noises worked solutions")
