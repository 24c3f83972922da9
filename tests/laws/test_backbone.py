"""Law: a prompt is named tensors, and another kind of model stands behind the same protocol."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from embedgrad.errors import ModelError
from embedgrad.model.backbone import Backbone, joined
from embedgrad.model.decoding import Decoding
from embedgrad.model.generation import replies
from kit import Kit, kit, noisy, spliced
from kit_deep import DeepBackbone
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
        joined(torch.zeros(3, 2, 32))


def test_an_outcome_carries_what_its_examples_say() -> None:
    made = mixed()
    outcome = made.model.outcome(made.start, made.sequences)
    assert outcome.groups == tuple(s.example.group for s in made.sequences)
    assert outcome.tasks == (None,) * len(made.sequences)
    assert outcome.extra == {}
    first, *rest = made.sequences
    costly: Any = SimpleNamespace(group="a", task="sums", extra={"cost": 2.5})
    tagged = [
        dataclasses.replace(first, example=costly),
        *(dataclasses.replace(s, example=dataclasses.replace(s.example, task="b")) for s in rest),
    ]
    outcome = made.model.outcome(made.start, tagged)
    assert outcome.groups[0] == "a"
    assert outcome.tasks == ("sums", "b", "b", "b", "b")
    assert outcome.extra == {"cost": [2.5, None, None, None, None]}


# -- one set of rows per layer ---------------------------------------------------------------------


def layer_inputs(made: Kit, rows_PD: Tensor) -> Tensor:
    """What each layer gets in the prompt's place of the first sequence: [layers, P, D]."""
    seen: list[Tensor] = []
    sequence = made.sequences[0]
    place = slice(len(sequence.prefix), len(sequence.prefix) + len(rows_PD))
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, place]))
        for layer in made.loaded.model.base_model.layers
    ]
    made.loaded.model(inputs_embeds=spliced(made.loaded, rows_PD, sequence), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


def test_a_deep_prompt_that_changes_nothing_gives_the_causal_models_numbers() -> None:
    made = kit(rows=2)
    rows = noisy(made.start)
    backbone: Backbone = DeepBackbone(made.loaded)
    deep = layer_inputs(made, rows).requires_grad_()
    outcome = backbone.outcome({"deep": deep}, made.sequences[:1])
    expected = made.model.outcome(rows, made.sequences[:1])
    assert (outcome.logprobs_BC - expected.logprobs_BC).abs().max().item() < 1e-10
    decoding = Decoding(5)
    free = backbone.generate({"deep": deep}, made.sequences[:1], decoding, end_ids=())
    assert free == made.model.generate(rows, made.sequences[:1], decoding, end_ids=())
    (gradient,) = torch.autograd.grad(outcome.answer_logprobs_B.sum(), deep)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
