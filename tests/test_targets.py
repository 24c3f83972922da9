"""Targets continue the text, end where they should, and fit into the model's context."""

from __future__ import annotations

import copy
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers.normalizers import NFC

import tiny
from embedgrad.data.examples import Example
from embedgrad.errors import DataError
from embedgrad.prompt.sequence import Sequencer, Target
from embedgrad.prompt.template import Renderer, Template
from kit import CHOICES, DAY, PLACEMENTS, cut
from kit_text import FREE, KINDS, TEXTS, example, sequencer, shared, tokens
from refusals import refused

ENDING = Template.plain("Review: {review}\n[[So it is]]")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", [*PLACEMENTS, "ending"])
def test_targets_continue_the_text_as_the_tokenizer_would(kind: str, placement: str) -> None:
    template = ENDING if placement == "ending" else PLACEMENTS[placement]
    made = sequencer(kind, template)
    is_text = template.text is not None
    for row in tiny.reviews(4):
        sequence = made(row)
        text = made.renderer(dict(row.columns)).text
        opening = "" if text[-1].isspace() else " "
        context = sequence.plain or tuple(cut(sequence, made.span.ids))
        for choice, ids in zip(CHOICES, sequence.targets, strict=True):
            whole = made.tokenizer(text + opening + choice, add_special_tokens=is_text)["input_ids"]
            scored = sequence if sequence.plain is None else sequence.uncut()
            assert [*context, *scored.targets[CHOICES.index(choice)]] == whole
            assert made.tokenizer.decode(list(ids)).strip() == choice
        assert sequence.gold == CHOICES.index(row.answer)


@pytest.mark.parametrize(
    ("text", "prefix", "answer"),
    [
        ("[[Is it?]] {review}:", None, [" ", "positive"]),
        ("[[Is it?]] {review}:\n", None, ["positive"]),
        ("[[Is it?]] {review}: ", None, ["positive"]),
        ("[[Is it?]] {review}:", "", ["positive"]),
        ("[[Is it?]] {review}:", "\n", ["\n", "positive"]),
    ],
)
def test_the_text_before_an_answer(text: str, prefix: str | None, answer: list[str]) -> None:
    made = sequencer("bytelevel", Template.plain(text), Target(CHOICES, answer_prefix=prefix))
    target = made(example("so")).targets[0]
    assert made.tokenizer.decode(list(target)) == "".join(answer)


def test_an_answer_that_would_merge_with_the_suffix_starts_anew() -> None:
    template = Template.plain("{review} [[it was]] positiv")
    made = sequencer("bytelevel", template, Target(("e", "al"), answer_prefix=""))
    sequence = made(example("So", "e"))
    assert made.tokenizer.tokenize(" positive") == ["\u0120positive"]
    assert tokens(made, sequence.suffix) == made.tokenizer.tokenize(" positiv")
    assert [tokens(made, ids) for ids in sequence.targets] == [["e"], ["al"]]


@pytest.mark.parametrize(
    ("chat", "kind", "placement", "end"),
    [
        ("chatml", "bytelevel", "user-after", "<|im_end|>"),
        ("trimming", "metaspace", "opening", "<|im_end|>"),
        ("chatml", "metaspace", "plain", "</s>"),
        ("plain", "wordpiece", "user-after", "</s>"),
    ],
)
def test_free_answers_end_the_turn(chat: str, kind: str, placement: str, end: str) -> None:
    row = example("fine", "great")
    free = shared(kind, placement, chat, "free")
    assert tokens(free, free(row).targets[0])[-1] == end
    assert tokens(free, free.end_ids) == [end]
    open_end = sequencer(kind, PLACEMENTS[placement], Target(end=False), chat)
    assert open_end(row).targets[0] == free(row).targets[0][:-1]
    labels = sequencer(kind, PLACEMENTS[placement], Target(CHOICES, end=True), chat)
    bare = shared(kind, placement, chat)
    assert labels(example("fine")).targets == tuple(
        ids + free.end_ids for ids in bare(example("fine")).targets
    )


def test_the_end_of_a_turn_need_not_be_a_named_special_token() -> None:
    # As Gemma 3: <end_of_turn> is special, but only the tokenizer's file says so.
    tokenizer = copy.deepcopy(tiny.tokenizer("metaspace"))
    tokenizer.add_tokens([AddedToken("<end>", special=True)], special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<end>\n{% endfor %}"
    renderer = Renderer(Template.chat(user="[[go]] {review}"), tokenizer, date=DAY)
    made = Sequencer(renderer, tokenizer, FREE, rows=tiny.reviews(2))
    assert tokenizer.convert_tokens_to_ids("<end>") not in tokenizer.all_special_ids
    assert tokens(made, made.end_ids) == ["<end>"]


@pytest.mark.parametrize(
    ("choices", "parts"),
    [
        (("one",), r"target\.choices.*two or more"),
        (("a", "b", "a"), r"target\.choices.*different"),
        (("a", ""), r"target\.choices"),
    ],
)
def test_bad_choices_are_refused(choices: tuple[str, ...], parts: str) -> None:
    with pytest.raises(DataError, match=parts):
        Target(choices=choices)


@pytest.mark.parametrize("choices", [("good", " "), ("good", "good \n")])
def test_choices_that_the_tokenizer_cannot_tell_apart_are_refused(choices: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=r"target\.choices"):
        sequencer("wordpiece", PLACEMENTS["plain"], Target(choices))(example("fine", "good"))


def test_choices_that_look_alike_are_refused_with_what_to_do() -> None:
    twins = ("n\u00e9gatif", "ne\u0301gatif", "positif")
    normalizing = copy.deepcopy(tiny.tokenizer("bytelevel"))
    normalizing.backend_tokenizer.normalizer = NFC()
    renderer = Renderer(PLACEMENTS["plain"], normalizing, date=DAY)
    made = Sequencer(renderer, normalizing, Target(twins), rows=tiny.reviews(8))
    with refused('keep "n\u00e9gatif", "positif" and set data.labels = { "ne\\u0301gatif" = '):
        made(example("fine", "positif"))
    apart = sequencer("bytelevel", PLACEMENTS["plain"], Target(twins[1:]))
    with refused('"n\u00e9gatif" differs from "ne\\u0301gatif" only in Unicode form'):
        apart(example("fine", twins[0]))


def test_an_answer_that_is_no_choice_is_refused() -> None:
    with pytest.raises(DataError, match=r"rows\.csv:2: .*'positiv'.*positive, negative|'positive'"):
        shared("bytelevel", "plain")(example("fine", "positiv"))


# ------------------------------------------------------------------------------ the context's limit


def size(made: Sequencer, row: Example) -> int:
    sequence = made(row)
    return len(cut(sequence, made.span.ids)) + max(len(ids) for ids in sequence.targets)


def test_a_row_longer_than_the_context_is_refused_with_both_numbers() -> None:
    row = example("The film was great. " * 5)
    length = size(shared("bytelevel", "user-before"), row)
    fits = sequencer("bytelevel", PLACEMENTS["user-before"], context=length)
    assert fits(row) == shared("bytelevel", "user-before")(row)
    tight = sequencer("bytelevel", PLACEMENTS["user-before"], context=length - 1)
    with pytest.raises(DataError, match=rf"rows\.csv:2: {length} tokens.* {length - 1};"):
        tight(row)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", ["user-before", "user-after"])
@settings(max_examples=10)
@given(review=TEXTS.map(lambda text: text * 4), spare=st.integers(1, 12))
def test_truncation_cuts_no_more_than_it_must(
    kind: str, placement: str, review: str, spare: int
) -> None:
    untouched = shared(kind, placement)
    context = size(untouched, example("")) + spare
    made = sequencer(kind, PLACEMENTS[placement], context=context, truncate="review")
    row = example(review)
    sequence = made(row)
    length = len(cut(sequence, made.span.ids)) + max(len(ids) for ids in sequence.targets)
    assert length <= context
    assert sequence.example is row
    if size(untouched, row) <= context:
        assert sequence == untouched(row)
        assert made.truncated == 0
    else:
        assert made.truncated == 1
        assert "column 'review' was cut in 1 row" in made.notes([])[-1]


def test_a_text_that_takes_more_tokens_in_its_place_is_cut_and_not_refused() -> None:
    kind, placement = "metaspace-always", "user-after"
    untouched, row = shared(kind, placement), example("<s>" * 4)
    context = size(untouched, example("")) + 1
    alone = len(untouched.tokenizer(row.columns["review"], add_special_tokens=False)["input_ids"])
    assert size(untouched, row) - context >= alone  # what stands behind them is cut otherwise too
    made = sequencer(kind, PLACEMENTS[placement], context=context, truncate="review")
    assert size(made, row) <= context
    assert made.truncated == 1


def test_truncation_keeps_the_beginning_and_fills_the_context() -> None:
    untouched = shared("bytelevel", "user-after")
    row = example("The film was great. " * 9)
    context = size(untouched, row) - 10
    made = sequencer("bytelevel", PLACEMENTS["user-after"], context=context, truncate="review")
    sequence = made(row)
    prefix = made.tokenizer.decode(list(sequence.prefix))
    assert context - 2 <= size(made, row) <= context
    assert prefix.split("Review: ")[1].rstrip("\n") in row.columns["review"]
    assert row.columns["review"].startswith(prefix.split("Review: ")[1].rstrip("\n"))


LETTERS = st.lists(
    st.sampled_from(
        ["film", " ", "was", "\n", "\u00e9", "\U0001f642", "\u4e2d", "\ufdfa", "1", "<s>"]
    ),
    min_size=1,
    max_size=12,
).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", ["user-before", "user-after"])
@settings(max_examples=15)
@given(review=LETTERS, spare=st.integers(0, 12))
def test_truncation_keeps_the_longest_beginning_that_fits_in_whole_characters(
    kind: str, placement: str, review: str, spare: int
) -> None:
    untouched = shared(kind, placement)
    beginnings = [untouched(example(review[:end])) for end in range(len(review) + 1)]
    sizes = [size(untouched, example(review[:end])) for end in range(len(review) + 1)]
    context = sizes[0] + spare
    made = sequencer(kind, PLACEMENTS[placement], context=context, truncate="review")
    end = max(end for end, length in enumerate(sizes) if length <= context)
    kept = dataclasses.replace(beginnings[end], example=made(example(review)).example)
    assert made(example(review)) == kept
    assert "\ufffd" not in made.tokenizer.decode(list(made(example(review)).prefix))


def test_a_column_of_which_nothing_is_left_is_counted() -> None:
    untouched = shared("bytelevel", "user-after")
    context = size(untouched, example("")) + 1
    made = sequencer("bytelevel", PLACEMENTS["user-after"], context=context, truncate="review")
    made(example("\U0001f642" * 3))
    cut = "column 'review' was cut in 1 row that did not fit"
    assert made.notes([]) == [f"{cut}, and nothing of it is left in 1"]
    made(example("\U0001f642" * 4))
    cut = "column 'review' was cut in 2 rows that did not fit"
    assert made.notes([]) == [f"{cut}, and nothing of it is left in 2"]
    made.emptied = 0
    assert made.notes([]) == [cut]


def test_a_template_that_does_not_fit_alone_is_refused() -> None:
    made = sequencer("bytelevel", PLACEMENTS["plain"], context=10, truncate="review")
    with pytest.raises(DataError, match=r"does not fit into the model's 10 tokens.*'review'"):
        made(example("The film"))


def test_choices_that_begin_one_another_are_told_apart_by_their_end() -> None:
    made = sequencer("bytelevel", Template.plain("[[Is it?]] {review}:"), Target(("is", "is the")))
    (sequence,) = made.build([example("so", "is")])
    short, long = sequence.targets
    assert short[-1:] == long[-1:] == made.end_ids
    assert long[: len(short) - 1] == short[:-1]
    told = "one choice begins another, so each is scored with the end of the turn"
    assert told in made.notes([sequence])
    whole = Target(("is", "is the"), normalize=True)
    apart = sequencer("bytelevel", Template.plain("[[Is it?]] {review}:"), whole)
    assert made.end_ids[0] not in apart(example("so", "is")).targets[0]
    never = Target(("is", "is the"), end=False)
    with pytest.raises(DataError, match="one begins another, so the longer can never win"):
        sequencer("bytelevel", Template.plain("[[Is it?]] {review}:"), never)(example("so", "is"))


def test_a_solution_is_what_is_written_and_the_answer_what_is_scored() -> None:
    made = sequencer("bytelevel", Template.plain("[[Is it?]] {review}:"), FREE)
    row = example("so", "2")
    solved = dataclasses.replace(row, solution="the one is 2")
    assert made(row).targets != made(solved).targets
    assert made.tokenizer.decode(list(made(solved).targets[0][:-1])).strip() == "the one is 2"
    assert made(solved).example.answer == "2"


@pytest.mark.parametrize(
    ("target", "solution", "reasoning"),
    [
        (FREE, "the one is 2", " the one is"),
        (FREE, "2 or 3, so 2.", " 2 or 3, so"),
        (FREE, "2", ""),
        (FREE, "the one is two", ""),
        (FREE, None, ""),
        (Target(("2", "3")), "the one is 2", ""),
    ],
)
def test_the_tokens_before_the_final_answer_are_counted(
    target: Target, solution: str | None, reasoning: str
) -> None:
    made = sequencer("bytelevel", Template.plain("[[Is it?]] {review}:"), target)
    sequence = made(dataclasses.replace(example("so", "2"), solution=solution))
    counted = sequence.targets[sequence.gold][: sequence.reasoning]
    assert made.tokenizer.decode(list(counted)).rstrip() == reasoning
