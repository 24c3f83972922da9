"""Law: with unrefined rows the model says what plain `transformers` says of the text."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import tiny
from embedgrad.data.examples import Example
from embedgrad.evaluation.evaluator import Evaluation, Evaluator
from embedgrad.model.decoding import Decoding
from embedgrad.model.generation import replies
from embedgrad.prompt.sequence import Ids, Target
from embedgrad.prompt.template import Template
from kit import (
    ATTENTION,
    LABELS,
    LONG_CHOICES,
    PLACEMENTS,
    SEVERAL,
    Kit,
    cut,
    kit,
    plain_logprobs,
)

LONG = Target(choices=LONG_CHOICES)
FREE = Target()
CHATS = {"bytelevel": tiny.CHATML, "metaspace": tiny.TRIMMING, "wordpiece": tiny.PLAIN}
# Every architecture with every placement, tokenizers taking turns; and with every tokenizer.
COVERED = sorted(
    {
        (architecture, list(CHATS)[(i + j) % 3], placement)
        for i, architecture in enumerate(tiny.ARCHITECTURES)
        for j, placement in enumerate(PLACEMENTS)
    }
    | {(architecture, kind, "plain") for architecture in tiny.ARCHITECTURES for kind in CHATS}
)
# Text that merges with the span in some rows, whatever the tokenizer.
GLUED = Template.plain("{review}[[lm is it good]]\nAnswer:")
GLUED_ROWS = [
    Example({"review": review}, answer, f"rows.csv:{i}")
    for i, (review, answer) in enumerate(
        [
            ("The fi", "positive"),
            ("Well, the film", "negative"),
            ("a\n", "positive"),
            ("", "negative"),
        ]
    )
]


def texts(*arguments: Any, most: int, **options: Any) -> list[str]:
    made = replies(*arguments, Decoding(max_new_tokens=most), **options)
    return [reply.text for (reply,) in made]


def largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()


def contexts(made: Kit) -> list[Sequence[int]]:
    """Plain tokens of every row, however the sequencer cut it."""
    ids = made.sequencer.span.ids
    return [s.plain if s.plain is not None else cut(s, ids) for s in made.sequences]


@pytest.mark.parametrize(("architecture", "kind", "placement"), COVERED)
def test_unrefined_rows_say_what_the_text_says(
    architecture: str, kind: str, placement: str
) -> None:
    made = kit(architecture, kind, CHATS[kind], placement, target=LONG, rows=3)
    outcome = made.model.outcome(made.start, made.sequences)
    for b, sequence in enumerate(made.sequences):
        assert sequence.plain is None
        ids = made.sequencer.span.ids
        expected = plain_logprobs(made.loaded, cut(sequence, ids), sequence.targets)
        assert largest(outcome.logprobs_BC[b] - expected) < 1e-10
        assert outcome.tokens_BC[b].tolist() == [len(ids) for ids in sequence.targets]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "gpt2", "qwen2-sliding"])
def test_attention_backends_and_precisions_agree(
    architecture: str, dtype: torch.dtype, attention: str
) -> None:
    made = kit(architecture, target=LONG, rows=5, dtype=dtype, attention=attention)
    assert made.model.why_not_reusable is None
    outcome = made.model.outcome(made.start, made.sequences)
    for b, sequence in enumerate(made.sequences):
        context = cut(sequence, made.sequencer.span.ids)
        expected = plain_logprobs(made.loaded, context, sequence.targets)
        assert largest(outcome.logprobs_BC[b] - expected) < (
            1e-10 if dtype == torch.float64 else 1e-4
        )


@pytest.mark.parametrize("kind", ["bytelevel", "metaspace-always"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "mamba"])
def test_the_text_prompt_is_scored_by_its_plain_tokens(architecture: str, kind: str) -> None:
    made = kit(architecture, kind, None, GLUED, rows=GLUED_ROWS)
    merged = [s.plain is not None for s in made.sequences]
    assert any(merged)
    assert not all(merged) or kind == "metaspace-always"
    evaluator = Evaluator(made.model, made.sequencer, Evaluation(batch_size=3))
    answered = evaluator.score_text_prompt(made.start, made.sequences)
    for b, (context, sequence) in enumerate(zip(contexts(made), made.sequences, strict=True)):
        text = made.sequencer.renderer(dict(sequence.example.columns)).text
        # Not by what the sequencer says: by the tokenizer, from the text.
        written = made.loaded.tokenizer(text)["input_ids"]
        assert list(context) == written
        targets = [
            made.loaded.tokenizer(f"{text} {choice}")["input_ids"][len(written) :]
            for choice in LABELS.choices
        ]
        expected = plain_logprobs(made.loaded, written, targets)
        shares = torch.softmax(expected, dim=0)
        assert answered[b].source == f"rows.csv:{b}"
        assert answered[b].predicted == LABELS.choices[int(expected.argmax())]
        named = dict(zip(LABELS.choices, shares.tolist(), strict=True))
        assert answered[b].probabilities == pytest.approx(named, abs=1e-6)
        gold = LABELS.choices.index(sequence.example.answer)
        assert answered[b].loss == pytest.approx(-shares[gold].log().item(), abs=1e-5)


@pytest.mark.parametrize("placement", ["system", "user-after", "opening", "plain-start"])
def test_the_text_prompt_and_unrefined_rows_score_alike(placement: str) -> None:
    made = kit("qwen2", template=placement, rows=7)
    evaluator = Evaluator(made.model, made.sequencer, Evaluation(batch_size=3))
    text = evaluator.score_text_prompt(made.start, made.sequences)
    assert text == evaluator.score(made.start, made.sequences)
    assert [a.source for a in text] == [s.example.source for s in made.sequences]


def test_choices_can_be_compared_per_token() -> None:
    normalized = Target(choices=LONG_CHOICES, normalize=True)
    made = kit(target=normalized, rows=5)
    evaluator = Evaluator(made.model, made.sequencer, Evaluation())
    for answered, sequence in zip(
        evaluator.score_text_prompt(made.start, made.sequences), made.sequences, strict=True
    ):
        context = cut(sequence, made.sequencer.span.ids)
        sums = plain_logprobs(made.loaded, context, sequence.targets)
        lengths = torch.tensor([len(ids) for ids in sequence.targets])
        shares = torch.softmax(sums / lengths, dim=0).tolist()
        named = dict(zip(LONG_CHOICES, shares, strict=True))
        assert answered.probabilities == pytest.approx(named, abs=1e-6)


# -------------------------------------------------------------------------------------- generation


def by_transformers(made: Kit, context: Sequence[int], ends: Ids, most: int) -> str:
    """Greedy decoding of one row alone, from its token ids."""
    model: Any = made.loaded.model
    for module in model.modules():  # what dynamic rotary scaling remembers of other rows
        if hasattr(module, "max_seq_len_cached"):
            module.max_seq_len_cached = 0
    ids = torch.tensor([list(context)])
    new = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=list(ends),
        pad_token_id=0,
    )[0, len(context) :]
    new = new[:-1] if new[-1] in ends else new
    return str(made.loaded.tokenizer.decode(new, skip_special_tokens=True))


def likely_end(made: Kit, most: int) -> Ids:
    """A token that ends some answers, but none at once."""
    model: Any = made.loaded.model
    spoken = []
    for context in contexts(made):
        ids = torch.tensor([list(context)])
        new = model.generate(ids, max_new_tokens=most, do_sample=False, pad_token_id=0)
        spoken.append(new[0, len(context) :].tolist())
    firsts = {row[0] for row in spoken}
    later = Counter(token for row in spoken for token in {*row[2:]} - firsts)
    return (later.most_common(1)[0][0],)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_generation_is_that_of_transformers(architecture: str) -> None:
    made = kit(architecture, target=FREE, rows=5, tie=False)
    assert len({len(s.prefix) for s in made.sequences}) > 2
    ends = likely_end(made, 8)
    expected = [by_transformers(made, context, ends, 8) for context in contexts(made)]
    assert len(set(expected)) > 1 or architecture == "mamba"
    for size in (1, 3, 5) if architecture in ("llama", "gemma3") else (3,):
        answers = texts(
            made.model,
            made.start,
            made.sequences,
            most=8,
            end_ids=ends,
            batch_size=size,
        )
        assert answers == expected


@pytest.mark.parametrize("architecture", ["llama", "mistral", "mamba"])
@pytest.mark.parametrize("placement", ["plain-start", "system", "opening"])
def test_generation_in_other_placements(architecture: str, placement: str) -> None:
    made = kit(architecture, template=placement, target=FREE, rows=4)
    answers = texts(made.model, made.start, made.sequences, most=6, end_ids=(3,), batch_size=3)
    assert answers == [by_transformers(made, ids, (3,), 6) for ids in contexts(made)]


@pytest.mark.parametrize("architecture", ["gemma3", "mamba"])
def test_free_answers_of_rows_that_merge_are_plain(architecture: str) -> None:
    made = kit(architecture, "bytelevel", None, GLUED, target=FREE, rows=GLUED_ROWS)
    evaluator = Evaluator(made.model, made.sequencer, Evaluation(max_new_tokens=6, batch_size=2))
    answered = evaluator.score_text_prompt(made.start, made.sequences)
    assert [a.predicted for a in answered] == [
        by_transformers(made, ids, evaluator.end_ids, 6) for ids in contexts(made)
    ]
    for a, context, sequence in zip(answered, contexts(made), made.sequences, strict=True):
        (target,) = sequence.targets
        expected = -plain_logprobs(made.loaded, context, [target])[0] / len(target)
        assert a.loss == pytest.approx(expected.item(), abs=1e-6)
        assert a.probabilities is None


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_generation_stops_where_the_context_ends(architecture: str) -> None:
    made = kit(architecture, target=FREE, rows=2, tie=False)
    short, other = made.sequences
    room = made.loaded.info.context - len(made.start) - len(short.suffix)
    prefix = (short.prefix * 40)[: room - 4]
    long = dataclasses.replace(short, prefix=prefix)
    answers = texts(made.model, made.start, [long, other], most=9, end_ids=())
    # The token after the last one that fits is still known.
    assert answers[0] == by_transformers(made, cut(long, made.sequencer.span.ids), (), 5)
    assert answers[1] == by_transformers(made, cut(other, made.sequencer.span.ids), (), 9)


def test_the_models_of_this_test_are_those_of_the_law() -> None:
    assert {architecture for architecture, _, _ in COVERED} == {*ATTENTION, "mamba"}
    assert {kind for _, kind, _ in COVERED} == set(CHATS)


# ---------------------------------------------------------------------------------- several spans


@pytest.mark.parametrize("place", SEVERAL)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "qwen2-sliding", "mamba"])
def test_unrefined_rows_of_several_spans_say_what_the_text_says(
    architecture: str, place: str
) -> None:
    made = kit(architecture, template=SEVERAL[place], target=LONG, rows=3)
    outcome = made.model.outcome(made.start, made.sequences)
    for b, sequence in enumerate(made.sequences):
        assert sequence.plain is None
        context = cut(sequence, made.sequencer.prompt_ids)
        expected = plain_logprobs(made.loaded, context, sequence.targets)
        assert largest(outcome.logprobs_BC[b] - expected) < 1e-10


@pytest.mark.parametrize("place", SEVERAL)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "mamba"])
def test_free_answers_to_several_spans_are_those_of_transformers(
    architecture: str, place: str
) -> None:
    made = kit(architecture, template=SEVERAL[place], target=FREE, rows=4)
    evaluator = Evaluator(made.model, made.sequencer, Evaluation(max_new_tokens=6, batch_size=3))
    expected = [
        by_transformers(made, cut(s, made.sequencer.prompt_ids), evaluator.end_ids, 6)
        for s in made.sequences
    ]
    for answered in (
        evaluator.score(made.start, made.sequences),
        evaluator.score_text_prompt(made.start, made.sequences),
    ):
        assert [a.predicted for a in answered] == expected
