"""Law: with unrefined rows the model says what plain `transformers` says of the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

import tiny
from embedgrad.evaluation import Evaluation, Evaluator
from embedgrad.examples import Example
from embedgrad.generate import generate
from embedgrad.sequence import Ids, Target, TokenSequence
from embedgrad.template import Template
from kit import ATTENTION, LABELS, LONG_CHOICES, PLACEMENTS, Kit, cut, kit, plain_logprobs

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
    made = kit(architecture, kind, CHATS[kind], placement, target=LONG, rows=5)
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
    assert made.model.reuse_off == ""
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
    answered = evaluator.text(made.start, made.sequences)
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
        assert answered[b].probabilities == pytest.approx(shares.tolist(), abs=1e-6)
        gold = LABELS.choices.index(sequence.example.answer)
        assert answered[b].loss == pytest.approx(-shares[gold].log().item(), abs=1e-5)


@pytest.mark.parametrize("placement", ["system", "user-after", "opening", "plain-start"])
def test_the_text_prompt_and_unrefined_rows_score_alike(placement: str) -> None:
    made = kit("qwen2", template=placement, rows=7)
    evaluator = Evaluator(made.model, made.sequencer, Evaluation(batch_size=3))
    text = evaluator.text(made.start, made.sequences)
    assert text == evaluator.refined(made.start, made.sequences)
    assert [a.source for a in text] == [s.example.source for s in made.sequences]


def test_choices_can_be_compared_per_token() -> None:
    normalized = Target(choices=LONG_CHOICES, normalize=True)
    made = kit(target=normalized, rows=5)
    evaluator = Evaluator(made.model, made.sequencer, Evaluation())
    for answered, sequence in zip(
        evaluator.text(made.start, made.sequences), made.sequences, strict=True
    ):
        context = cut(sequence, made.sequencer.span.ids)
        sums = plain_logprobs(made.loaded, context, sequence.targets)
        lengths = torch.tensor([len(ids) for ids in sequence.targets])
        assert answered.probabilities == pytest.approx(
            torch.softmax(sums / lengths, dim=0).tolist(), abs=1e-6
        )


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
    return str(made.loaded.tokenizer.decode(new, skip_special_tokens=True))


def common_ends(made: Kit, sequences: Sequence[TokenSequence], most: int) -> Ids:
    """End ids under which some rows end early and others do not."""
    model: Any = made.loaded.model
    spoken = []
    for sequence in sequences:
        context = torch.tensor([cut(sequence, made.sequencer.span.ids)])
        ids = model.generate(context, max_new_tokens=most, do_sample=False, pad_token_id=0)[0]
        spoken.append(ids[context.shape[1] :].tolist())
    return (spoken[0][most // 2],)


@pytest.mark.parametrize("batch_size", [1, 3, 6])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_generation_is_that_of_transformers(architecture: str, batch_size: int) -> None:
    made = kit(architecture, target=FREE, rows=6)
    lengths = {len(s.head) for s in made.sequences}
    assert len(lengths) > 2
    ends = common_ends(made, made.sequences, 12)
    answers = generate(
        made.model,
        made.start,
        made.sequences,
        max_new_tokens=12,
        end_ids=ends,
        batch_size=batch_size,
    )
    expected = [by_transformers(made, context, ends, 12) for context in contexts(made)]
    assert answers == expected
    assert len(set(answers)) > 1


@pytest.mark.parametrize("architecture", ["llama", "mistral", "mamba"])
@pytest.mark.parametrize("placement", ["plain-start", "system", "opening"])
def test_generation_in_other_placements(architecture: str, placement: str) -> None:
    made = kit(architecture, template=placement, target=FREE, rows=4)
    answers = generate(
        made.model, made.start, made.sequences, max_new_tokens=6, end_ids=(3,), batch_size=3
    )
    assert answers == [by_transformers(made, ids, (3,), 6) for ids in contexts(made)]


@pytest.mark.parametrize("architecture", ["gemma3", "mamba"])
def test_free_answers_of_rows_that_merge_are_plain(architecture: str) -> None:
    made = kit(architecture, "bytelevel", None, GLUED, target=FREE, rows=GLUED_ROWS)
    evaluator = Evaluator(made.model, made.sequencer, Evaluation(max_new_tokens=6, batch_size=2))
    answered = evaluator.text(made.start, made.sequences)
    assert [a.predicted for a in answered] == [
        by_transformers(made, ids, evaluator.end_ids, 6) for ids in contexts(made)
    ]
    for a, context, sequence in zip(answered, contexts(made), made.sequences, strict=True):
        (target,) = sequence.targets
        expected = -plain_logprobs(made.loaded, context, [target])[0] / len(target)
        assert a.loss == pytest.approx(expected.item(), abs=1e-6)
        assert a.probabilities is None


def test_generation_stops_where_the_context_ends() -> None:
    made = kit("gpt2", target=FREE, rows=3)
    context = made.loaded.info.context
    long = TokenSequence(
        made.sequences[0].head * 12, made.sequences[0].tail, ((5,),), 0, None, tiny.reviews(1)[0]
    )
    length = len(cut(long, made.sequencer.span.ids))
    head = long.head[: len(long.head) - (length - context + 4)]
    long = TokenSequence(head, long.tail, long.targets, 0, None, long.example)
    answers = generate(
        made.model, made.start, [long, made.sequences[1]], max_new_tokens=12, end_ids=()
    )
    expected = by_transformers(made, cut(long, made.sequencer.span.ids), (), 4)
    assert answers[0][: len(expected)] == expected
    assert answers[1] == by_transformers(
        made, cut(made.sequences[1], made.sequencer.span.ids), (), 12
    )


def test_the_models_of_this_test_are_those_of_the_law() -> None:
    assert {architecture for architecture, _, _ in COVERED} == {*ATTENTION, "mamba"}
    assert {kind for _, kind, _ in COVERED} == set(CHATS)
