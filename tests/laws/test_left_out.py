"""Law: demonstrations are exact, left out or not, and their own questions never see them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from embedgrad.data.examples import Example
from embedgrad.model.language_model import LanguageModel
from embedgrad.parts.augmentations import BatchContext
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.prompt.template import Template
from embedgrad.training.demonstrations import (
    Demonstrations,
    LeaveOut,
    Shown,
    demonstrate,
    leave_out,
    without_rows,
)
from embedgrad.training.loss import Loss
from embedgrad.training.settings import Parts
from kit import LABELS, PLACEMENTS, Kit, kit, noisy
from kit_loss import LONG, assert_same, full_loss_and_gradient, loss_and_gradient

TWO = Demonstrations(k=2, drop=0.3)


def shown(
    placement: str, architecture: str = "llama", settings: Demonstrations = TWO, **options: Any
) -> tuple[Kit, Shown, LeaveOut]:
    """A tiny model behind demonstrations, which are rows 3 and further of those to train on."""
    examples = tiny.reviews(6)
    made = demonstrate(PLACEMENTS[placement], LABELS, examples, settings)
    one = kit(architecture, template=made.template, rows=examples, tie=False, **options)
    out = leave_out(made, one.model, one.sequencer, one.sequences, settings)
    return one, made, out


def own_rows(prompt_PD: Tensor, sequence: TokenSequence) -> Tensor:
    return prompt_PD if sequence.rows is None else prompt_PD[list(sequence.rows)]


def in_full(made: Kit, rows: Tensor, batch: list[TokenSequence]) -> tuple[Tensor, Tensor]:
    """Loss and gradient of every sequence in a full pass of its own."""
    losses, gradients = [], []
    for sequence in batch:
        leaf = rows.clone().requires_grad_(True)
        loss, gradient = full_loss_and_gradient(
            made, own_rows(leaf, sequence).detach(), [dataclasses.replace(sequence, rows=None)]
        )
        whole = torch.zeros_like(rows)
        kept = range(len(rows)) if sequence.rows is None else sequence.rows
        whole[list(kept)] = gradient
        losses.append(loss)
        gradients.append(whole)
    return torch.stack(losses), torch.stack(gradients)


@pytest.mark.parametrize(
    ("architecture", "placement"),
    [
        *((a, p) for a in ("llama", "gemma3") for p in ("system", "user-after", "plain")),
        ("mamba", "user-before"),
        ("qwen2", "opening"),
        ("llama-dynamic", "user-after"),
    ],
)
def test_loss_and_gradient_are_those_of_the_full_pass(architecture: str, placement: str) -> None:
    made, _, out = shown(placement, architecture)
    rows = noisy(made.start)
    batch = out(made.sequences, BatchContext(seed=0, step=1, total=4, vocabulary=9))
    lacking = {sequence.rows for sequence in batch}
    assert len(lacking) == 3  # without the first, without the second, with both
    assert all(kept is not None and len(kept) < len(rows) for kept in lacking)
    losses, gradients = in_full(made, rows, batch)
    for i in range(len(batch)):  # one of a batch, behind what the others share
        leaf = rows.clone().requires_grad_(True)
        outcome = made.model.outcome(leaf, batch)
        row = outcome.logprobs_BC[i]
        loss = (row * torch.linspace(1, 2, len(row), dtype=row.dtype)).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert_same((loss.detach(), gradient), (losses[i], gradients[i]))


def test_the_budget_and_the_parts_of_a_batch_change_no_number() -> None:
    made, _, out = shown("user-after")
    batch = out(made.sequences, BatchContext(seed=0, step=1, total=4, vocabulary=9))
    start = {"span": noisy(made.start)}
    parts = Parts()
    theta = {
        name: value.requires_grad_(True)
        for name, value in parts.parameterization.init(
            start, torch.Generator().manual_seed(0)
        ).items()
    }
    whole = Loss(made.model, parts, LABELS, start).gradient(theta, batch)
    bare = LanguageModel(made.loaded, prefix_cache_budget=0)
    for loss, accumulate in (
        (Loss(bare, parts, LABELS, start), 1),
        (Loss(made.model, parts, LABELS, start), 3),
    ):
        found = loss.gradient(theta, batch, accumulate)
        assert (found.losses_B - whole.losses_B).abs().max().item() < 1e-10
        for name, gradient in whole.gradients.items():
            assert (found.gradients[name] - gradient).abs().max().item() < 1e-10


def test_a_row_whose_demonstration_is_left_out_has_the_plain_prompt_without_it() -> None:
    made, prompt, out = shown("user-after", settings=Demonstrations(k=2, drop=0.0))
    batch = out(made.sequences, BatchContext(seed=0, step=0, total=1, vocabulary=9))
    seen = 0
    for sequence, whole in zip(batch, made.sequences, strict=True):
        texts = [e.columns["review"] for e in prompt.examples]
        question = sequence.example.columns["review"]
        ids = sequence.context(
            tuple(made.sequencer.prompt_ids[i] for i in sequence.rows or range(len(made.start)))
        )
        text = made.loaded.tokenizer.decode(list(ids))
        if question in texts:
            other = next(t for t in texts if t != question)
            alone = made.model.sequencer(
                prompt.without(texts.index(question), LABELS), LABELS, [sequence.example]
            )
            assert ids == alone(sequence.example).context(alone.prompt_ids)
            assert text.count(question) == text.count(other) == 1
            seen += 1
        else:
            assert sequence is whole
            assert all(shown_text in text for shown_text in texts)
    assert seen == 2


def test_rows_are_dropped_by_step_alike_for_the_whole_batch() -> None:
    made, prompt, out = shown("user-after", settings=Demonstrations(k=2, drop=0.1))
    ours = {r for i in range(2) for r in prompt.rows_of(made.sequencer.spans, i)}
    assert ours == set(out.rows)
    assert 0 < len(ours) < len(made.start)
    counts = []
    others = [s for s in made.sequences if s.example not in prompt.examples]
    for step in range(300):
        batch = out(others, BatchContext(seed=0, step=step, total=300, vocabulary=9))
        assert len({sequence.rows for sequence in batch}) == 1
        gone = set(range(len(made.start))) - set(batch[0].rows or range(len(made.start)))
        assert gone <= ours
        counts.append(len(gone))
        assert out(others, BatchContext(seed=0, step=step, total=300, vocabulary=9)) == batch
    assert abs(sum(counts) / len(counts) / len(ours) - 0.1) < 0.02
    assert out(others, BatchContext(seed=1, step=0, total=1, vocabulary=9)) != out(
        others, BatchContext(seed=0, step=0, total=1, vocabulary=9)
    )


def test_a_batch_runs_its_demonstrations_once() -> None:
    made, prompt, out = shown("user-after", settings=Demonstrations(k=2, drop=0.2))
    others = [s for s in made.sequences if s.example not in prompt.examples]
    batch = out(others, BatchContext(seed=0, step=1, total=4, vocabulary=9))
    rows = own_rows(noisy(made.start), batch[0])
    context = made.model.prefixes.context_of(rows, batch)
    assert context.prompt is not None
    assert context.prompt.length + len(batch[0].prefix) == context.before[0]
    left = len(made.sequencer.spans[-1].ids)  # the instruction stands behind the question
    assert len(context.prompt_PD) == left
    text = made.loaded.tokenizer.decode(list(batch[0].suffix[context.begun :]))
    assert text.startswith("</s>") or "Review:" in text


def test_rows_without_a_place_are_gone_from_the_sequence() -> None:
    example = Example({}, "a", "x:1")
    sequence = TokenSequence((1,), (5, 0, 0, 6, 0, 7), ((9,),), 0, None, example, later=(1, 2, 4))
    cut = without_rows(sequence, 5, frozenset({1, 3}))
    assert (cut.rows, cut.suffix, cut.later) == ((0, 2, 4), (5, 0, 6, 0, 7), (1, 3))
    again = without_rows(cut, 5, frozenset({0, 2}))
    assert (again.rows, again.suffix, again.later) == ((4,), (5, 6, 0, 7), (2,))
    assert without_rows(sequence, 5, frozenset()) is sequence


@pytest.mark.parametrize("placement", ["system", "user-after", "opening", "plain"])
def test_every_demonstration_knows_its_spans(placement: str) -> None:
    template = PLACEMENTS[placement]
    examples = tiny.reviews(4)
    made = demonstrate(template, LABELS, examples, Demonstrations(k=3))
    assert isinstance(made.template, Template)
    for i, example in enumerate(made.examples):
        texts = made.template.spans[made.spans_of(i)]
        assert example.columns["review"] in " ".join(texts)
        assert example.answer in texts[-1]
    assert len(made.template.spans) == len(template.spans) + 3 * len(
        made.template.spans[made.spans_of(0)]
    )


def test_the_loss_with_stored_prefixes_is_that_of_targets_of_several_tokens() -> None:
    examples = tiny.reviews(6)
    made = demonstrate(PLACEMENTS["system"], LABELS, examples, TWO)
    one = kit("llama", template=made.template, target=LONG, rows=6, tie=False)
    rows = noisy(one.start)
    assert_same(
        loss_and_gradient(one.model, rows, one.sequences),
        full_loss_and_gradient(one, rows, one.sequences),
    )
