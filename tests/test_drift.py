"""What is said of every refined row: how far it went, what is near it, what it is worth."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from embedgrad.evaluation import drift
from embedgrad.evaluation.drift import nearest_tokens, readable, row_worth, token_drift
from embedgrad.evaluation.evaluator import Evaluation, Evaluator, summarize
from embedgrad.events import scoring
from embedgrad.model.language_model import LanguageModel
from embedgrad.prompt.embedding import PromptEmbedding
from kit import CHOICES, DAY, Kit, kit, noisy


@pytest.fixture(scope="module")
def made() -> Kit:
    return kit(dtype=torch.float32, rows=8)


def prompt_of(made: Kit, rows: Tensor) -> PromptEmbedding:
    return PromptEmbedding(
        template=made.sequencer.renderer.template,
        target=made.sequencer.target,
        spans=made.sequencer.spans,
        date=DAY,
        start_rows=made.start,
        rows=rows,
    )


def moved(made: Kit, shares: dict[int, float], seed: int = 0) -> PromptEmbedding:
    """The prompt with some rows moved by hand, by these shares of their norms."""
    rows = made.start.clone()
    for p, share in shares.items():
        rows[p] = noisy(made.start, share, seed=seed)[p]
    return prompt_of(made, rows)


# ----------------------------------------------------------------------------------- nearest tokens


@settings(max_examples=30)
@given(seed=st.integers(0, 2**20), at_a_time=st.sampled_from([1, 7, 64, 10_000]))
def test_nearest_tokens_are_those_of_a_search_by_hand(seed: int, at_a_time: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(64, 8, generator=generator, dtype=torch.float64)
    rows = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drift, "ROWS_AT_A_TIME", at_a_time)
        found = nearest_tokens(rows, table, 4)
    for p, row in enumerate(rows):
        cosines = [
            (sum(a * b for a, b in zip(row.tolist(), entry.tolist(), strict=True)))
            / (row.norm().item() * entry.norm().item())
            for entry in table
        ]
        assert found[p] == sorted(range(64), key=lambda i: -cosines[i])[:4]


def test_length_does_not_make_a_token_near() -> None:
    table = torch.eye(4) * torch.tensor([[1.0], [100.0], [0.01], [1.0]])
    rows = torch.tensor([[0.9, 0.8, 0.0, 0.0], [0.0, 0.0, 5.0, 4.0]])
    assert nearest_tokens(rows, table, 2) == [[0, 1], [2, 3]]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_rows_that_did_not_move_are_nearest_to_their_tokens(architecture: str) -> None:
    made = kit(architecture, dtype=torch.float32)
    rows = token_drift(prompt_of(made, made.start), made.model, nearest=2)
    assert len(rows) == len(made.start)
    for p, row in enumerate(rows):
        assert (row.distance, row.unchanged, len(row.nearest)) == (0.0, True, 2)
        assert row.nearest[0] == row.token
        assert row.cosine == pytest.approx(1.0)
        assert row.token == readable(
            made.sequencer.span.tokens[p], made.loaded.tokenizer, made.sequencer.span.ids[p]
        )


def test_a_row_put_onto_another_token_says_so(made: Kit) -> None:
    other = 77
    assert other not in made.sequencer.span.ids
    rows = made.start.clone()
    rows[2] = made.model.embed([other])[0] * 1.5
    found = token_drift(prompt_of(made, rows), made.model, nearest=1)
    assert [row.unchanged for row in found] == [p != 2 for p in range(len(found))]
    token = made.loaded.tokenizer.convert_ids_to_tokens(other)
    assert found[2].nearest == (readable(token, made.loaded.tokenizer, other),)
    table = made.model.vocabulary_rows()
    typical = rows[2].norm() / table.norm(dim=1).mean()
    assert found[2].typical == pytest.approx(typical.item(), rel=1e-5)


def test_a_row_of_a_padded_table_that_is_no_token_is_named_by_its_number() -> None:
    model = LanguageModel(tiny.loaded(dtype=torch.float32), prefix_cache_budget="1 MiB")
    length = len(model.tokenizer)
    model.model.resize_token_embeddings(length + 1, mean_resizing=False)
    table = model.vocabulary_rows()
    made = kit(dtype=torch.float32, rows=8)
    rows = made.start.clone()
    rows[2] = table[length]
    found = token_drift(prompt_of(made, rows), model, nearest=1)
    assert found[2].nearest == (f"[row-{length}]",)


def test_twins_in_the_table_are_the_token_itself(made: Kit) -> None:
    table = made.model.vocabulary_rows()
    own = made.sequencer.span.ids[1]
    table[0] = table[own]  # a twin that stands first
    twin = dataclasses.replace(made, model=_WithTable(made, table))
    found = token_drift(prompt_of(made, noisy(made.start, 0.01)), twin.model, nearest=1)
    assert all(row.unchanged for row in found)


class _WithTable:
    """A model with another table, as far as drift looks at it."""

    def __init__(self, made: Kit, table: Tensor):
        self.tokenizer, self._table = made.model.tokenizer, table

    def vocabulary_rows(self) -> Tensor:
        return self._table


def test_rows_moved_by_hand_are_ranked_by_how_far(made: Kit) -> None:
    shares = {4: 0.5, 1: 0.3, 3: 0.1}
    found = token_drift(moved(made, shares), made.model)
    order = sorted(range(len(found)), key=lambda p: -found[p].distance)
    assert order[:3] == [4, 1, 3]
    for p, row in enumerate(found):
        assert row.distance == pytest.approx(shares.get(p, 0.0), abs=1e-6)
        assert row.cosine >= (1 - shares.get(p, 0.0) ** 2) ** 0.5 - 1e-6


@pytest.mark.parametrize(
    ("kind", "text", "shown"),
    [
        ("bytelevel", " positive", "\u00b7positive"),
        ("bytelevel", "?\n", "?\u21b5"),
        ("bytelevel", "\t", "\u21e5"),
        ("wordpiece", "positive", "positive"),
    ],
)
def test_tokens_are_readable(kind: str, text: str, shown: str) -> None:
    tokenizer = kit(tokenizer=kind).loaded.tokenizer
    (token_id,) = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert readable(tokenizer.convert_ids_to_tokens(token_id), tokenizer, token_id) == shown


def test_half_a_character_is_shown_as_its_token() -> None:
    tokenizer = kit().loaded.tokenizer
    first = tokenizer("\u00e9", add_special_tokens=False)["input_ids"][0]
    token = tokenizer.convert_ids_to_tokens(first)
    assert "\ufffd" in tokenizer.decode([first])
    assert readable(token, tokenizer, first) == token


# -------------------------------------------------------------------------------------- row worth


def test_a_row_that_did_not_move_is_worth_nothing(made: Kit) -> None:
    prompt = moved(made, {1: 0.6, 4: 0.9})
    evaluator = Evaluator(made.model, made.sequencer, Evaluation(batch_size=3))
    events: list[dict[str, Any]] = []
    worth = row_worth(prompt, evaluator, made.sequences, events.append)
    assert len(worth) == len(made.start)
    for p, entry in enumerate(worth):
        assert (entry["log_loss"] == 0) == (p not in (1, 4))
        if p not in (1, 4):
            assert entry["accuracy"] == 0
    expected = [scoring("each row alone", p + 1, len(worth)) for p in range(len(worth))]
    assert events == expected


def test_worth_is_what_is_lost_without_the_row(made: Kit) -> None:
    prompt = moved(made, {1: 0.6, 4: 0.9})
    evaluator = Evaluator(made.model, made.sequencer, Evaluation(batch_size=3))
    worth = row_worth(prompt, evaluator, made.sequences)
    whole = summarize(evaluator.score(prompt.rows, made.sequences), CHOICES)
    only_four = moved(made, {4: 0.9}).rows
    without = summarize(evaluator.score(only_four, made.sequences), CHOICES)
    assert worth[1]["accuracy"] == whole.accuracy - without.accuracy
    assert worth[1]["log_loss"] == without.log_loss - whole.log_loss
    assert torch.equal(prompt.rows, moved(made, {1: 0.6, 4: 0.9}).rows)


def test_a_single_moved_row_is_worth_the_whole_gain(made: Kit) -> None:
    prompt = moved(made, {2: 0.9})
    evaluator = Evaluator(made.model, made.sequencer, Evaluation())
    worth = row_worth(prompt, evaluator, made.sequences)
    text = summarize(evaluator.score(made.start, made.sequences), CHOICES)
    refined = summarize(evaluator.score(prompt.rows, made.sequences), CHOICES)
    assert worth[2]["log_loss"] == text.log_loss - refined.log_loss
    assert worth[2]["log_loss"] != 0
