"""Prefix, span and suffix are the tokens of the plain text, or the row says that they are not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

import tiny
from embedgrad.errors import DataError, EmbedgradError, TemplateError
from embedgrad.prompt.sequence import Sequencer, TokenSequence
from embedgrad.prompt.template import Renderer, Template
from kit import DAY, LABELS, PLACEMENTS, cut
from kit_text import CHATS, FREE, KINDS, TEXTS, example, plain_ids, sequencer, shared, tokens
from refusals import refused

# --------------------------------------------------------------- prefix, span and suffix are the te


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(review=TEXTS)
def test_a_row_is_its_plain_tokens_or_says_so(
    kind: str, placement: str, chat: str, review: str
) -> None:
    made = shared(kind, placement, chat)
    sequence = made(example(review))
    expected = plain_ids(made, {"review": review})
    deployed = cut(sequence, made.span.ids)
    if sequence.plain is None:
        assert deployed == expected
    else:
        assert list(sequence.plain) == expected
        assert deployed != expected
        assert sequence.uncut().suffix == sequence.plain


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", ["bytelevel", "metaspace", "wordpiece"])
def test_ordinary_rows_do_not_merge(kind: str, placement: str) -> None:
    made = shared(kind, placement)
    assert [s.plain for s in made.build(tiny.reviews(12))] == [None] * 12


@pytest.mark.parametrize("kind", ["bytelevel", "metaspace", "metaspace-always"])
def test_a_row_deployed_reads_as_the_text(kind: str) -> None:
    made = shared(kind, "user-after")
    row = example(" The film:  a\n\n\u00e9?\n ok ")
    text = made.renderer(dict(row.columns)).text
    spaced = made.tokenizer.decode(cut(made(row), made.span.ids))
    assert "".join(spaced.split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("chat", "template", "review", "error", "where"),
    [
        (tiny.CHATML, PLACEMENTS["user-after"], "a <x> b", DataError, "rows.csv:2: token '<x>'"),
        (tiny.CHATML + "<x>", PLACEMENTS["user-after"], "a", TemplateError, "first in rows.csv:2"),
        (None, Template.plain("<x>{review}\n[[Good?]]"), "a", TemplateError, "first in rows.csv:2"),
        (None, Template.plain("{review}\n[[Good <x>?]]"), "a", TemplateError, "template: token"),
        (None, Template.plain("{review}[[x> Good?]]"), "a <", TemplateError, "first in rows.csv:2"),
    ],
    ids=["a row", "the chat template", "the template", "the span", "a row and the span"],
)
def test_a_token_without_an_embedding_is_refused(
    chat: str | None, template: Template, review: str, error: type[EmbedgradError], where: str
) -> None:
    tokenizer = tiny.with_template(tiny.tokenizer("bytelevel"), chat)
    vocabulary = len(tokenizer)
    tokenizer.add_tokens(["<x>"])
    renderer = Renderer(template, tokenizer, date=DAY)
    made = Sequencer(renderer, tokenizer, LABELS, rows=[example("b")], vocabulary=vocabulary)
    with refused(f"id {vocabulary}", f"only {vocabulary} tokens", where, error=error):
        made(example(review))
    made.vocabulary += 1
    made(example(review))


def test_a_token_of_a_solution_without_an_embedding_is_the_rows() -> None:
    tokenizer = tiny.with_template(tiny.tokenizer("bytelevel"), tiny.CHATML)
    vocabulary = len(tokenizer)
    tokenizer.add_tokens(["<x>"])
    renderer = Renderer(PLACEMENTS["user-after"], tokenizer, date=DAY)
    made = Sequencer(renderer, tokenizer, FREE, rows=[example("b")], vocabulary=vocabulary)
    with refused("rows.csv:2: token '<x>'", "take it out of the row"):
        made(replace(example("a", "yes"), solution="so <x>, yes"))


def test_a_mark_before_a_line_feed_draws_it_in() -> None:
    made = shared("bytelevel", "plain-start")
    assert made.span.text == "[[Is it positive or negative?\n"[2:]
    assert (made.span.drawn_left, made.span.drawn_right) == ("", "\n")
    assert made.span.tokens[-1] == "?\u010a"
    assert "the span became 'Is it positive or negative?\\n'" in made.notes([])[0]


def test_a_space_before_the_span_is_drawn_in() -> None:
    made = sequencer("bytelevel", Template.chat(system="Say. [[it was positive]]", user="{review}"))
    assert (made.span.text, made.span.drawn_left) == (" it was positive", " ")
    assert made.span.tokens[0] == "\u0120it"
    assert tokens(made, made(example("x")).prefix)[-1] == "."


def test_nothing_is_drawn_in_next_to_special_tokens_and_line_feeds() -> None:
    for kind in ("bytelevel", "metaspace", "wordpiece"):
        span = shared(kind, "user-after").span
        assert (span.text, span.drawn_left, span.drawn_right) == (
            "Is it positive or negative?",
            "",
            "",
        )


def test_a_column_that_merges_keeps_its_plain_tokens() -> None:
    made = sequencer("bytelevel", Template.plain("{review}[[lm is it good]]\n"))
    merged, apart = made(example("The fi")), made(example("The fi "))
    assert apart.plain is None
    assert merged.plain is not None
    assert "\u0120film" in tokens(made, merged.plain)
    assert merged.uncut() == type(merged)(
        (), merged.plain, merged.targets, merged.gold, None, merged.example, end=merged.end
    )


def test_a_row_with_the_end_of_the_turn_and_one_without_a_cut() -> None:
    plain, targets, inputs = (1, 2, 3, 4, 5), ((7,), (8, 9)), ((17,), (18, 19))
    own = example("x")
    row = TokenSequence((1, 2), (3, 0, 5), targets, 1, plain, own, shared=1, later=(1,))
    row = replace(row, inputs=inputs, end=(6,), rows=(0, 1))
    ended = replace(row, targets=(*targets, (8, 9, 6)), inputs=(*inputs, (18, 19, 6)), end=())
    assert row.with_end() == ended
    assert replace(row, inputs=None).with_end() == replace(ended, inputs=None)
    assert row.uncut() == TokenSequence((), plain, targets, 1, None, own, end=(6,))


def test_rows_that_merge_are_reported_or_refused() -> None:
    template = Template.plain("{review}[[\nSo is it good]]\n")
    rows = [example("It was great"), example("Was it great?")]
    made = sequencer("bytelevel", template, rows=rows)
    sequences = made.build(rows)
    assert [s.plain is None for s in sequences] == [True, False]
    assert made.notes(sequences) == [
        "in 1 of 2 rows the text next to a span merges with it; the text prompt is scored with its "
        "plain tokens there"
    ]
    refusing = sequencer("bytelevel", template, rows=rows, merges="refuse")
    with pytest.raises(TemplateError, match=r"in 1 of 2 rows .*first: rows\.csv:2.*line feed"):
        refusing.build(rows)
    assert len(refusing.build(rows[:1])) == 1


def test_notes_say_what_free_answers_follow_and_what_does_not_end_them() -> None:
    follow = "answers follow a space, as the text before them has none at its end"
    endless = "this model has no end token: free answers run to evaluation.max_new_tokens"
    template = Template.plain("{review}\n[[Is it good?]]")
    for target, has_end, notes in (
        (FREE, True, [follow]),
        (FREE, False, [follow, endless]),
        (LABELS, False, [follow]),
    ):
        made = sequencer("bytelevel", template, target)
        if not has_end:
            made.end_ids = ()
        assert made.notes(made.build([example("x")])) == notes


def test_without_columns_nothing_can_merge() -> None:
    made = sequencer("bytelevel", Template.plain("Is it?[[\nSay so]] now"), rows=[example("x")])
    assert made(example("x")).plain is None


def test_a_span_that_tokenizes_to_nothing_is_refused() -> None:
    for text in ("[[ ]] {review}", "a [[ ]] {review}", "{review} [[\n\n]] {review}"):
        with pytest.raises(TemplateError, match="tokenizes to nothing; write words"):
            sequencer("wordpiece", Template.plain(text))


def test_rows_are_needed_to_find_the_span() -> None:
    with pytest.raises(DataError, match="no rows to tokenize"):
        sequencer("bytelevel", PLACEMENTS["plain"], rows=[])


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_span_gives_the_same_ids(kind: str, placement: str) -> None:
    made = shared(kind, placement)
    again = sequencer(kind, PLACEMENTS[placement], rows=(), spans=made.spans)
    for row in tiny.reviews(4, seed=3):
        assert again(row) == made(row)


def test_a_saved_span_of_another_template_is_refused() -> None:
    span = shared("bytelevel", "system").span
    for system in (
        "[[Is it?]]",
        "[[Is the review positive or negative? ]]",
        "[[Is the review positive or negative?]] [[or]]",
    ):
        with pytest.raises(TemplateError, match="are not those it was prepared for"):
            sequencer("bytelevel", Template.chat(system=system, user="x"), spans=(span,))(
                example("x")
            )


def test_a_row_with_the_cut_token_is_refused() -> None:
    with pytest.raises(TemplateError, match="embedgrad-cut"):
        shared("bytelevel", "user-after")(example("a <|embedgrad-cut|> b"))


# ---------------------------------------------------------------------------------------------- BOS


@pytest.mark.parametrize("kind", ["metaspace", "metaspace-always"])
@pytest.mark.parametrize(
    ("chat", "placement", "count"),
    [
        ("chatml", "plain", 1),
        ("chatml", "plain-start", 1),
        ("trimming", "user-after", 1),
        ("trimming", "system", 1),
        ("chatml", "user-after", 0),
    ],
)
def test_bos_stands_once_where_the_model_expects_it(
    kind: str, chat: str, placement: str, count: int
) -> None:
    made = shared(kind, placement, chat)
    sequence = made(example("fine"))
    ids = [*cut(sequence, made.span.ids)]
    assert ids.count(made.tokenizer.bos_token_id) == count
    assert (sequence.prefix[:1] == (made.tokenizer.bos_token_id,)) == bool(count)


def test_plain_text_that_writes_its_bos_gets_no_second() -> None:
    made = sequencer("metaspace", Template.plain("<s>{review}\n[[Is it good?]]\nSo:"))
    sequence = made(example("fine"))
    assert cut(sequence, made.span.ids).count(made.tokenizer.bos_token_id) == 1
    assert sequence.plain is None
    assert cut(sequence, made.span.ids) == plain_ids(made, {"review": "fine"})
