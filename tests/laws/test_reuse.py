"""Law: with stored prefixes, losses and gradients are those of the full pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from benchmarks.speed.memory import saved
from embedgrad.model.language_model import LanguageModel
from embedgrad.model.prefix_cache import PrefixCache
from kit import ATTENTION, PLACEMENTS, REUSING, Kit, full_logprobs, kit, noisy
from kit_loss import assert_same, full_loss_and_gradient, loss_and_gradient, mixed

BY_LENGTH = ("llama-dynamic", "llama-longrope")


@contextmanager
def passes(made: Kit) -> Iterator[list[tuple[int, int]]]:
    """Rows and tokens of every pass through the model."""
    seen: list[tuple[int, int]] = []

    def note(_: object, __: object, kwargs: dict[str, Tensor]) -> None:
        seen.append((kwargs["inputs_embeds"].shape[0], kwargs["inputs_embeds"].shape[1]))

    handle = made.loaded.model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


# ------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize(
    ("architecture", "attention"),
    # `transformers` has no Gemma 2 in sdpa.
    [*((a, "eager") for a in ATTENTION), *((a, "sdpa") for a in ATTENTION if a != "gemma2")],
)
def test_loss_and_gradient_are_those_of_the_full_pass(architecture: str, attention: str) -> None:
    made = mixed(architecture, attention=attention)
    assert made.model.why_not_reusable is None
    rows = noisy(made.start)
    assert_same(
        loss_and_gradient(made.model, rows, made.sequences),
        full_loss_and_gradient(made, rows, made.sequences),
    )
    assert (len(made.model.prefix_cache) > 0) == (architecture in REUSING)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_every_placement_is_exact(architecture: str, placement: str) -> None:
    made = mixed(architecture, placement)
    rows = noisy(made.start)
    assert_same(
        loss_and_gradient(made.model, rows, made.sequences),
        full_loss_and_gradient(made, rows, made.sequences),
    )


@pytest.mark.parametrize("architecture", REUSING)
def test_single_precision_stays_close(architecture: str) -> None:
    made = mixed(architecture, dtype=torch.float32)
    rows = noisy(made.start)
    assert_same(
        loss_and_gradient(made.model, rows, made.sequences),
        full_loss_and_gradient(made, rows, made.sequences),
        loss=1e-5,
        gradient=1e-4,
    )


@pytest.mark.parametrize("architecture", ["gemma3", "gemma2", "qwen2-sliding", "mistral", "llama"])
def test_windows_look_back_into_the_prefix(architecture: str) -> None:
    made = mixed(architecture)
    one, two = made.sequences[:2]
    prefixes = (one.prefix * 2)[:20], (two.prefix * 2)[:12]
    cut = [dataclasses.replace(s, prefix=h) for s, h in zip((one, two), prefixes, strict=True)]
    short = [dataclasses.replace(s, suffix=s.suffix[:1]) for s in cut]
    for sequences in (cut, short, [cut[0], short[1]]):
        rows = noisy(made.start)[:3]
        assert_same(
            loss_and_gradient(made.model, rows, sequences),
            full_loss_and_gradient(made, rows, sequences),
        )


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_empty_prefixes_are_exact(architecture: str) -> None:
    made = mixed(architecture, "plain-start")
    assert {s.prefix for s in made.sequences} == {()}
    full = mixed(architecture).sequences[:2]
    rows = noisy(made.start)
    for sequences in (made.sequences, [*made.sequences[:2], *full]):
        assert_same(
            loss_and_gradient(made.model, rows, sequences),
            full_loss_and_gradient(made, rows, sequences),
        )


def test_rows_with_fewer_targets_are_exact() -> None:
    made = mixed()
    rows = noisy(made.start)
    first = dataclasses.replace(made.sequences[0], targets=made.sequences[0].targets[:1], gold=0)
    outcome = made.model.outcome(rows, [first, made.sequences[1]])
    expected = full_logprobs(made.loaded, rows, [first, made.sequences[1]])
    assert outcome.logprobs_BC[0, 1:].tolist() == [-torch.inf] * 2
    assert outcome.tokens_BC[0, 1:].tolist() == [0, 0]
    assert (outcome.logprobs_BC[0, 0] - expected[0][0]).abs().item() < 1e-10
    assert (outcome.logprobs_BC[1] - expected[1]).abs().max().item() < 1e-10


@pytest.mark.parametrize("architecture", ["llama", "mamba", "llama-longrope"])
def test_the_right_answer_alone_scores_as_among_the_choices(architecture: str) -> None:
    made = mixed(architecture)
    rows = noisy(made.start)
    every = made.model.outcome(rows, made.sequences)
    alone = made.model.outcome(rows, made.sequences, choices=False)
    assert (every.answer_logprobs_B - alone.answer_logprobs_B).abs().max().item() < 1e-10
    assert every.gold_B.tolist() == [s.gold for s in made.sequences]
    assert torch.equal(every.answer_tokens_B, alone.answer_tokens_B)
    assert alone.logprobs_BC.shape == (5, 1)
    assert every.groups == tuple(s.example.group for s in made.sequences)


# ------------------------------------------------------------------------------ batches and budgets


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "llama-dynamic", "mamba"])
@settings(max_examples=6)
@given(order=st.permutations(range(6)), cuts=st.sets(st.integers(1, 5), max_size=5))
def test_a_batch_can_be_split_anyhow(architecture: str, order: list[int], cuts: set[int]) -> None:
    made = mixed(architecture, rows=6)
    rows = noisy(made.start)
    whole = made.model.outcome(rows, made.sequences).logprobs_BC
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 6], strict=True):
        part = order[start:end]
        found = made.model.outcome(rows, [made.sequences[i] for i in part]).logprobs_BC
        assert (found - whole[part]).abs().max().item() < 1e-10


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("budget", [0, "one prefix", "1 GiB"])
def test_the_budget_changes_nothing_but_time(architecture: str, budget: str | int) -> None:
    made = mixed(architecture)
    rows = noisy(made.start)
    (prefix,) = made.model.prefixes_of([made.sequences[0].prefix])
    room = prefix.nbytes if budget == "one prefix" else budget
    model = LanguageModel(made.loaded, prefix_cache_budget=room)
    expected = full_loss_and_gradient(made, rows, made.sequences)
    for _ in range(2):
        assert_same(loss_and_gradient(model, rows, made.sequences), expected)
        assert model.prefix_cache.nbytes <= model.prefix_cache.budget
    kept = {0: [0], "one prefix": [0, 1], "1 GiB": [5]}[budget]
    assert len(model.prefix_cache) in kept
    assert (model.prefix_cache.hits, model.prefix_cache.misses) == (
        len(model.prefix_cache),
        10 - len(model.prefix_cache),
    )


def test_one_shared_prefix_and_the_prompt_behind_it_are_computed_once() -> None:
    made = mixed(placement="system")
    assert len({s.prefix for s in made.sequences}) == 1
    prefix = len(made.sequences[0].prefix)
    with passes(made) as seen:
        loss_and_gradient(made.model, noisy(made.start), made.sequences)
        loss_and_gradient(made.model, made.start, made.sequences[:2])
    # A prefix is built from at least 16 tokens, so that its bits are those it has in company.
    prompt = (1, len(made.start))
    assert seen[:2] == [(max(1, -(-16 // prefix)), prefix), prompt]
    again = seen.index(prompt, 2)
    assert sum(rows for rows, _ in seen[2:again]) == 5
    assert sum(rows for rows, _ in seen[again + 1 :]) == 2
    assert (made.model.prefix_cache.hits, made.model.prefix_cache.misses) == (1, 1)


def test_stored_prefixes_are_not_computed_again() -> None:
    made = mixed()
    made.model.outcome(made.start, made.sequences)
    with passes(made) as seen:
        made.model.outcome(made.start, made.sequences)
        made.model.outcome(noisy(made.start), made.sequences[1:3])
    assert [rows for rows, _ in seen] == [5, 2]
    assert (made.model.prefix_cache.hits, made.model.prefix_cache.misses) == (7, 5)
    (prefix,) = made.model.prefixes_of([made.sequences[0].prefix])
    assert prefix.length == len(made.sequences[0].prefix)
    assert not prefix.keys.requires_grad


def test_behind_400_tokens_a_step_keeps_at_most_a_third_of_the_full_pass() -> None:
    """As in SynQT: activations of prompt and answer only, and nothing stale in a second step."""
    rows = tiny.reviews(8)[3:5]
    long = [dataclasses.replace(e, columns={"review": e.columns["review"] * 20}) for e in rows]
    made = kit(rows=long, attention="sdpa", tie=False)
    assert [len(s.prefix) for s in made.sequences] == [416, 436]
    prompt, weights = noisy(made.start).requires_grad_(True), list(made.loaded.model.parameters())
    made.model.prepare(made.sequences)
    scored = [(s, s.targets, ()) for s in made.sequences]
    reused = saved(lambda: made.model.outcome(prompt, made.sequences), weights)
    full = saved(lambda: made.model.forward.in_full(prompt, scored, 2), weights)
    assert 0 < reused <= 0.35 * full, (reused, full)
    first = loss_and_gradient(made.model, made.start, made.sequences)
    again = loss_and_gradient(made.model, made.start, made.sequences)
    assert all(map(torch.equal, first, again))


def test_another_cache_is_handed_over_and_nothing_is_tried_again() -> None:
    made = mixed()
    rows = noisy(made.start)
    expected = loss_and_gradient(made.model, rows, made.sequences)
    with passes(made) as seen:
        other = made.model.with_prefix_cache(PrefixCache(0))
    assert seen == []
    assert other.forward is made.model.forward
    found = loss_and_gradient(other, rows, made.sequences)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert (len(other.prefix_cache), other.prefix_cache.misses) == (0, 5)
    stored = made.model.prefix_cache
    assert (len(stored), stored.hits, stored.misses) == (5, 0, 5)


# ------------------------------------------------------------------------- where reuse is not exact


def test_a_recurrent_model_goes_without_and_says_so() -> None:
    made = mixed("mamba")
    rows = noisy(made.start)
    assert "recurrent" in str(made.model.why_not_reusable)
    assert_same(
        loss_and_gradient(made.model, rows, made.sequences),
        full_loss_and_gradient(made, rows, made.sequences),
    )
    assert len(made.model.prefix_cache) == 0


@pytest.mark.parametrize("architecture", BY_LENGTH)
def test_rows_that_cross_a_rotary_limit_are_exact(architecture: str) -> None:
    made = mixed(architecture)
    rows = noisy(made.start)[:3]
    limit = made.model.forward.longest_reuse
    assert limit == 16
    # From well below the limit to well above it; with longer choices some cross it alone.
    sequences = [
        dataclasses.replace(s, prefix=s.prefix[:length], suffix=s.suffix[:2])
        for s, length in zip(made.sequences, (2, 5, 9, 11, 20), strict=True)
    ]
    for batch in (sequences, sequences[::-1], sequences[:1], sequences[4:], sequences[1:4]):
        assert_same(
            loss_and_gradient(made.model, rows, batch), full_loss_and_gradient(made, rows, batch)
        )
    assert 0 < len(made.model.prefix_cache) < 5


def test_every_architecture_is_here() -> None:
    assert {*REUSING, *BY_LENGTH, "mamba"} == set(tiny.ARCHITECTURES)
