"""Law: a language model is a backbone, and a prompt is named tensors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from embedgrad.data.examples import Example
from embedgrad.errors import ModelError
from embedgrad.model.backbone import Backbone, join_spans
from embedgrad.model.decoding import Decoding
from embedgrad.model.generation import replies
from embedgrad.training.loss import join_outcomes
from kit import noisy
from kit_loss import mixed


def test_a_prompt_is_named_tensors_or_their_rows() -> None:
    made = mixed()
    rows = noisy(made.start)
    backbone: Backbone = made.model
    decoding = Decoding(max_new_tokens=3)
    expected = backbone.outcome(rows, made.sequences)
    for prompt in ({"span": rows}, {"first": rows[:2], "second": rows[2:]}):
        found = backbone.outcome(prompt, made.sequences)
        assert torch.equal(found.logprobs_BC, expected.logprobs_BC)
        free = backbone.generate(prompt, made.sequences, decoding, end_ids=())
        assert free == replies(made.model, rows, made.sequences, decoding, end_ids=())


def test_rows_for_each_layer_are_refused() -> None:
    made = mixed()
    with pytest.raises(ModelError, match=r"'deep' has rows of shape \[3, 2, 32\].*all layers"):
        made.model.outcome({"deep": torch.zeros(3, 2, 32)}, made.sequences)
    with pytest.raises(ModelError, match="one set of rows"):
        join_spans(torch.zeros(3, 2, 32))


def test_an_outcome_carries_what_its_examples_say() -> None:
    made = mixed()
    outcome = made.model.outcome(made.start, made.sequences)
    assert outcome.groups == tuple(s.example.group for s in made.sequences)
    assert outcome.tasks == (None,) * len(made.sequences)
    assert outcome.extra == {}
    first, *rest = made.sequences
    costly = Example({}, "", "a.csv:1", group="a", task="sums", extra={"cost": 2.5})
    tagged = [
        dataclasses.replace(first, example=costly, reasoning=1),
        *(dataclasses.replace(s, example=dataclasses.replace(s.example, task="b")) for s in rest),
    ]
    outcome = made.model.outcome(made.start, tagged)
    assert outcome.groups[0] == "a"
    assert outcome.reasoning_tokens == (1, 0, 0, 0, 0)
    joined_outcome = join_outcomes([made.model.outcome(made.start, [row]) for row in tagged])
    assert joined_outcome.reasoning_tokens == outcome.reasoning_tokens
    assert outcome.tasks == ("sums", "b", "b", "b", "b")
    assert outcome.extra == {"cost": [2.5, None, None, None, None]}
