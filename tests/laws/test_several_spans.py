"""Law: rows of several spans are exact wherever they lie: scored, trained, generated, streamed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from embedgrad.model.decoding import Decoding
from embedgrad.model.generation import next_logits, replies, stream
from embedgrad.model.language_model import LanguageModel
from embedgrad.prompt.sequence import TokenSequence
from embedgrad.prompt.template import Template
from kit import SEVERAL, Kit, forget_longest_pass, kit, noisy, spliced
from kit_loss import LONG, assert_same, full_loss_and_gradient, loss_and_gradient, mixed

LATER = (2, 1)  # rows of the second and third span


def spread(made: Kit, spans: Sequence[int] = LATER) -> tuple[Tensor, list[TokenSequence]]:
    """Rows of several spans, and the sequences with later spans at places of their own.

    The last span of every second sequence ends it.
    """
    sequences = []
    for b, sequence in enumerate(made.sequences):
        suffix, later = list(sequence.suffix), []
        at = 1 + b % 3
        for n, size in enumerate(spans):
            at = len(suffix) if n + 1 == len(spans) and b % 2 else min(at, len(suffix))
            suffix[at:at] = [0] * size
            later += range(at, at + size)
            at += size + b % 2
        sequences.append(dataclasses.replace(sequence, suffix=tuple(suffix), later=tuple(later)))
    more = made.model.embed(range(20, 20 + sum(spans)))
    return noisy(torch.cat([made.start, more])), sequences


@pytest.mark.parametrize(
    ("architecture", "placement"),
    [
        *((a, p) for a in tiny.ARCHITECTURES for p in ("user-after", "system")),
        *(("qwen2", "plain-start"), ("gemma3", "plain-start")),
    ],
)
def test_loss_and_gradient_are_those_of_the_full_pass(architecture: str, placement: str) -> None:
    made = mixed(architecture, placement)
    rows, sequences = spread(made)
    expected = full_loss_and_gradient(made, rows, sequences)
    found = loss_and_gradient(made.model, rows, sequences)
    assert_same(found, expected)
    assert (found[1].norm(dim=1) > 0).all() or architecture == "mistral"  # a window of 8 tokens


@pytest.mark.parametrize(
    ("architecture", "placement"),
    [
        *(("llama", "system"), ("gemma3", "user-after"), ("gemma3", "system")),
        *(("llama-dynamic", "user-after"), ("mamba", "system")),
    ],
)
@settings(max_examples=3)
@given(order=st.permutations(range(6)), cuts=st.sets(st.integers(1, 5), max_size=5))
def test_a_batch_can_be_split_anyhow(
    architecture: str, placement: str, order: list[int], cuts: set[int]
) -> None:
    made = mixed(architecture, placement, rows=6)
    rows, sequences = spread(made)
    whole = made.model.outcome(rows, sequences).logprobs_BC
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 6], strict=True):
        part = order[start:end]
        found = made.model.outcome(rows, [sequences[i] for i in part]).logprobs_BC
        assert (found - whole[part]).abs().max().item() < 1e-10


@pytest.mark.parametrize("place", SEVERAL)
@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "mamba"])
def test_templates_with_several_spans_are_exact(architecture: str, place: str) -> None:
    made = kit(architecture, template=SEVERAL[place], target=LONG, rows=4, tie=False)
    assert all(s.later for s in made.sequences)
    rows = noisy(made.start)
    assert_same(
        loss_and_gradient(made.model, rows, made.sequences),
        full_loss_and_gradient(made, rows, made.sequences),
    )


def test_the_budget_changes_no_number() -> None:
    made = mixed()
    rows, sequences = spread(made)
    model = LanguageModel(made.loaded, prefix_cache_budget=0)
    found = loss_and_gradient(model, rows, sequences)
    expected = loss_and_gradient(made.model, rows, sequences)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "gpt2"])
@pytest.mark.parametrize("end", ["{review}", ""])
def test_spans_in_front_of_all_text_are_run_once_for_all(architecture: str, end: str) -> None:
    template = Template.plain(f"[[Judge]] the [[review. Say]] only [[one word]]{end}")
    made = kit(architecture, template=template, target=LONG, rows=4, tie=False)
    rows = noisy(made.start)
    context = made.model.prefixes.context_of(rows, made.sequences)
    assert context.prompt is not None
    one = made.sequences[0]
    last = one.later[-1] + 1
    if not end:  # the answer is read at the last token, which stays each row's own
        assert last == len(one.suffix)
        last = one.later[-2] + 1
    assert context.prompt.length == len(rows) - len(one.later) + last
    assert_same(
        loss_and_gradient(made.model, rows, made.sequences),
        full_loss_and_gradient(made, rows, made.sequences),
    )


def test_only_the_first_span_is_run_once_for_all() -> None:
    made = mixed(placement="system")
    rows, sequences = spread(made)
    context = made.model.prefixes.context_of(rows, sequences)
    first = len(made.start)
    assert context.prompt is not None
    assert context.prompt.length == first
    assert torch.equal(context.prompt_PD, rows[first:])
    assert context.before == [len(s.prefix) + first for s in sequences]


@pytest.mark.parametrize("placement", ["user-after", "system"])
def test_the_prompt_is_named_tensors(placement: str) -> None:
    made = mixed(placement=placement)
    rows, sequences = spread(made)
    sizes = [len(made.start), *LATER]
    names = dict(zip("abc", rows.split(sizes), strict=True))
    found = made.model.outcome(names, sequences).logprobs_BC
    assert torch.equal(found, made.model.outcome(rows, sequences).logprobs_BC)


# -- free answers ----------------------------------------------------------------------------------


@torch.no_grad()
def plain_answer(made: Kit, rows_PD: Tensor, sequence: TokenSequence, tokens: int) -> str:
    """A greedy answer by `transformers` on embeddings put together row by row."""
    model: Any = made.loaded.model
    embeds = spliced(made.loaded, rows_PD, sequence)
    forget_longest_pass(model)
    ids = model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return str(made.loaded.tokenizer.decode(ids[0], skip_special_tokens=True))


@pytest.mark.parametrize("placement", ["user-after", "system"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "llama-dynamic", "mamba"])
def test_free_answers_are_those_of_plain_transformers(architecture: str, placement: str) -> None:
    made = kit(architecture, template=placement, rows=5, tie=False)
    rows, sequences = spread(made)
    decoding = Decoding(max_new_tokens=8)
    found = replies(made.model, rows, sequences, decoding, end_ids=(), batch_size=3)
    assert [reply.text for (reply,) in found] == [plain_answer(made, rows, s, 8) for s in sequences]
    assert len({reply.text for (reply,) in found}) > 1
    pieces = stream(made.model, rows, sequences[1], decoding, end_ids=())
    assert "".join(pieces) == found[1][0].text


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
def test_samples_do_not_depend_on_their_company(architecture: str) -> None:
    made = kit(architecture, rows=4, tie=False)
    rows, sequences = spread(made)
    decoding = Decoding(6, temperature=1.0, samples=3, seed=2)
    together = replies(made.model, rows, sequences, decoding, end_ids=(), batch_size=12)
    alone = [
        replies(made.model, rows, [s], decoding, end_ids=(), batch_size=1, numbers=[i])[0]
        for i, s in enumerate(sequences)
    ]
    assert together == alone
    assert len(set(together[0])) > 1


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "llama-longrope", "mamba"])
@torch.no_grad()
def test_the_next_token_has_the_logits_of_plain_transformers(architecture: str) -> None:
    made = kit(architecture, rows=4, tie=False)
    rows, sequences = spread(made)
    model: Any = made.loaded.model
    for logits_V, sequence in zip(next_logits(made.model, rows, sequences), sequences, strict=True):
        forget_longest_pass(model)
        expected_V = model(inputs_embeds=spliced(made.loaded, rows, sequence)).logits[0, -1]
        assert (logits_V - expected_V).abs().max().item() < 1e-10


def test_an_answer_stops_at_the_context_with_all_spans_counted() -> None:
    made = kit(rows=3, tie=False)
    rows, sequences = spread(made)
    length = max(len(s.prefix) + len(made.start) + len(s.suffix) for s in sequences)
    info = dataclasses.replace(made.loaded.info, context=length + 2)
    model = LanguageModel(made.loaded._replace(info=info))
    tokens: list[int] = []
    plain = model.forward.logits

    def logits(embeds: Tensor, *rest: Any) -> Tensor:
        tokens.append(embeds.shape[1])
        return plain(embeds, *rest)

    model.forward.logits = logits  # type: ignore[method-assign]
    longest = max(sequences, key=lambda s: len(s.prefix) + len(s.suffix))
    replies(model, rows, [longest], Decoding(50), end_ids=())
    # Three answer tokens: the last one need not be read again.
    assert tokens[1:] == [1, 1]
