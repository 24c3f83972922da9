"""Rows to examples: text of every cell, answers among the choices, and guesses at columns."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import pytest

from embedgrad.data.examples import Example, cell_text, examples_from
from embedgrad.data.guess_columns import guess_columns
from embedgrad.data.labels import escape
from embedgrad.data.splits import make_splits
from embedgrad.data.table import Row, Table
from embedgrad.errors import DataError, EmbedgradError
from refusals import refused


def table(rows: Sequence[Row], name: str = "reviews.csv") -> Table:
    columns = tuple(dict.fromkeys(column for row in rows for column in row))
    sources = [f"{name}:{line}" for line in range(2, len(rows) + 2)]
    return Table(name, columns, list(rows), sources)


REVIEWS = table(
    [
        {"text": " Good. ", "label": 1, "domain": "film", "stars": 4.5, "tags": ["a"]},
        {"text": "Bad.", "label": 0, "domain": "book", "stars": None, "tags": []},
        {"text": "Fine.", "label": 1, "domain": "film", "stars": 3.0, "tags": None},
    ]
)
NAMES = {"0": "negative", "1": "positive"}


# ------------------------------------------------------------------------------- examples


def test_rows_become_examples_with_text_answer_source_and_group() -> None:
    examples = examples_from(
        REVIEWS,
        columns=["text"],
        answer="label",
        choices=["negative", "positive"],
        labels=NAMES,
        group="domain",
    )
    assert examples[0] == Example(
        columns={"text": " Good. ", "label": "1", "domain": "film", "stars": "4.5"},
        answer="positive",
        source="reviews.csv:2",
        group="film",
    )
    assert [example.answer for example in examples] == ["positive", "negative", "positive"]
    assert [example.group for example in examples] == ["film", "book", "film"]
    assert examples[1].columns == {"text": "Bad.", "label": "0", "domain": "book"}
    assert examples[2].columns["stars"] == "3"


def test_without_an_answer_column_there_is_no_answer_and_no_group() -> None:
    examples = examples_from(REVIEWS, columns=["text", "domain"])
    assert {(example.answer, example.group) for example in examples} == {("", None)}


@pytest.mark.parametrize("raw", [0, "0", 0.0])
def test_labels_match_raw_values_as_text(raw: object) -> None:
    data = table([{"text": "Bad.", "label": raw}])
    assert examples_from(data, columns=["text"], answer="label", labels=NAMES)[0].answer == (
        "negative"
    )
    by_number: Any = {0: "negative"}
    assert examples_from(data, columns=["text"], answer="label", labels=by_number)[0].answer == (
        "negative"
    )


def test_labels_match_booleans_and_leave_choices_alone() -> None:
    data = table([{"t": "a", "y": True}, {"t": "b", "y": False}, {"t": "c", "y": "yes"}])
    examples = examples_from(
        data,
        columns=["t"],
        answer="y",
        choices=["no", "yes"],
        labels={"true": "yes", "false": "no"},
    )
    assert [example.answer for example in examples] == ["yes", "no", "yes"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("  a\n ", "  a\n "),
        ("", ""),
        (7, "7"),
        (10**30, "1" + "0" * 30),
        (1.0, "1"),
        (-2.0, "-2"),
        (-0.0, "0"),
        (0.1, "0.1"),
        (1e300, "1e+300"),
        (math.inf, "inf"),
        (math.nan, None),
        (True, "true"),
        (False, "false"),
        (Decimal("1.50"), "1.50"),
        (date(2024, 2, 29), "2024-02-29"),
        (datetime(2024, 2, 29, 12), "2024-02-29 12:00:00"),
        (None, None),
        ([1], None),
        ({"a": 1}, None),
        (b"a", None),
    ],
)
def test_text_of_a_cell(value: object, text: str | None) -> None:
    assert cell_text(value) == text


def test_where_keeps_matching_rows_and_their_sources() -> None:
    kept = examples_from(REVIEWS, columns=["text"], where={"domain": "film"})
    assert [example.source for example in kept] == ["reviews.csv:2", "reviews.csv:4"]
    kept = examples_from(REVIEWS, columns=["text"], where={"domain": "film", "stars": "3"})
    assert [example.source for example in kept] == ["reviews.csv:4"]


def test_rows_that_where_drops_are_not_checked() -> None:
    data = table([{"text": "", "part": "a"}, {"text": "Good.", "part": "b"}])
    assert len(examples_from(data, columns=["text"], where={"part": "b"})) == 1


SUMS = table([{"q": "Two and [[two]]?", "left": "{2 + 2}", "sum": 4.0}])


@pytest.mark.parametrize(
    ("solution", "text"),
    [
        ("left", "{2 + 2}"),
        ("{left} = {sum}", "{2 + 2} = 4"),
        ("{q}", "Two and [[two]]?"),
        ("{{}} {sum}", "{} 4"),
    ],
)
def test_a_solution_is_a_column_or_a_text_with_columns(solution: str, text: str) -> None:
    (example,) = examples_from(SUMS, columns=["q"], answer="sum", solution=solution)
    assert (example.solution, example.answer) == (text, "4")


def test_extra_cells_come_as_they_are_and_a_task_as_text() -> None:
    first, second = examples_from(
        table([{"text": "a", "cost": 1.5, "plan": [1, 2]}, {"text": "b", "cost": 0, "plan": []}]),
        columns=["text"],
        task="cost",
        extra=("cost", "plan"),
    )
    assert first.extra == {"cost": 1.5, "plan": [1, 2]}
    assert second.extra == {"cost": 0, "plan": []}
    assert (first.task, second.task) == ("1.5", "0")
    (bare,) = examples_from(table([{"text": "a", "cost": 1.5}]), columns=["text"])
    assert (bare.task, bare.extra) == (None, {})


@pytest.mark.parametrize("empty", [None, "", math.nan])
def test_an_empty_extra_cell_is_refused_with_its_line(empty: object) -> None:
    data = table([{"text": "a", "cost": 1}, {"text": "b", "cost": empty}])
    with refused("reviews.csv:3: column 'cost' is empty; the objective needs a value"):
        examples_from(data, columns=["text"], extra=["cost"])


# -------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("solution", "said"),
    [
        ("{left} = {som}", "no column 'som', which solution names; did you mean 'sum'?"),
        ("{left} = {", "data.solution: lone '{'"),
        ("{left} [[is]] {sum}", "data.solution: '{left} [[is]] {sum}' holds [[ ]]"),
        ("", "no column '', which solution names"),
    ],
)
def test_a_solution_that_cannot_be_filled_is_refused(solution: str, said: str) -> None:
    with refused(said, error=EmbedgradError):
        examples_from(SUMS, columns=["q"], solution=solution)


@pytest.mark.parametrize(
    ("asked", "role"),
    [
        ({"columns": ["txet"]}, "no column 'txet', which template names"),
        ({"answer": "txet"}, "no column 'txet', which answer names"),
        ({"group": "txet"}, "no column 'txet', which group names"),
        ({"where": {"txet": "a"}}, "no column 'txet', which where names"),
        ({"task": "txet"}, "no column 'txet', which task names"),
        ({"extra": ["txet"]}, "no column 'txet', which the objective names"),
    ],
)
def test_missing_column_is_refused_with_the_nearest(asked: dict[str, Any], role: str) -> None:
    with refused(f"reviews.csv: {role}", "did you mean 'text'?", "domain, label, stars, tags"):
        examples_from(REVIEWS, **{"columns": ["text"], **asked})


@pytest.mark.parametrize("empty", [None, "", " \n", math.nan])
@pytest.mark.parametrize("role", ["columns", "answer", "group"])
def test_empty_cell_is_refused_with_its_line(empty: object, role: str) -> None:
    data = table([{"text": "Good.", "x": "a"}, {"text": "Bad.", "x": empty}])
    asked: dict[str, Any] = {"columns": ["text"]} | {role: ["x"] if role == "columns" else "x"}
    with refused("reviews.csv:3: column 'x' is empty", "expected text"):
        examples_from(data, **asked)


def test_key_that_one_json_row_lacks_is_refused_with_its_line() -> None:
    with refused("a.jsonl:3: column 'text' is empty"):
        examples_from(table([{"text": "Good."}, {"label": 1}], "a.jsonl"), columns=["text"])


@pytest.mark.parametrize(("value", "kind"), [(["a"], "list"), ({"a": 1}, "dict"), (b"a", "bytes")])
def test_needed_cell_that_is_no_scalar_is_refused(value: object, kind: str) -> None:
    data = table([{"text": "Good.", "x": value}])
    with refused(f"reviews.csv:2: column 'x' holds a {kind}", "expected text or a number"):
        examples_from(data, columns=["text", "x"])
    assert "x" not in examples_from(data, columns=["text"])[0].columns


def test_label_that_is_no_choice_is_refused_with_its_line_and_the_choices() -> None:
    with refused("reviews.csv:3: label '0' in column 'label'", "choices '1', 'positive'"):
        examples_from(REVIEWS, columns=["text"], answer="label", choices=["1", "positive"])
    with refused("reviews.csv:3: label '0' (mapped to 'bad') in column 'label'", "choices '1'"):
        examples_from(REVIEWS, columns=["text"], answer="label", choices=["1"], labels={"0": "bad"})
    with refused("reviews.csv:3: label '0'", "not among the choices 'positive'", "labels"):
        examples_from(REVIEWS, columns=["text"], answer="label", labels={"1": "positive"})


def test_labels_that_are_no_choices_are_named_the_first_three() -> None:
    rows = [{"text": "a", "label": label} for label in ("warm", "cold", "wet", "hot", "dry")]
    with pytest.raises(DataError) as raised:
        examples_from(table(rows), columns=["text"], answer="label", choices=["warm"])
    told = str(raised.value)
    assert told.startswith("reviews.csv:3: label 'cold' in column 'label' is not among")
    assert told.endswith("(of 4 such rows the next: 'wet' (reviews.csv:4), 'hot' (reviews.csv:5))")


def test_label_with_odd_characters_is_refused_on_one_line() -> None:
    data = table([{"text": "Good.", "label": "a\nb" + "c" * 100}])
    with refused(r"label 'a\nbccc", "...'"):
        examples_from(data, columns=["text"], answer="label", choices=["a"])


def test_where_that_keeps_nothing_is_refused_with_the_values_there() -> None:
    with refused("reviews.csv: none of 3 rows has domain = 'music'", "holds 'film', 'book'"):
        examples_from(REVIEWS, columns=["text"], where={"domain": "music"})
    many = table([{"text": "a", "part": f"p{i}"} for i in range(20)])
    with refused("part = 'q'", "'p0', 'p1'", "'p7' and 12 more"):
        examples_from(many, columns=["text"], where={"part": "q"})


TWINS = {
    "blanks": ("positive ", "positive", '"positive " = "positive"'),
    "case": ("Positive", "positive", '"Positive" = "positive"'),
    "Unicode form": ("ne\u0301gatif", "n\u00e9gatif", '"ne\\u0301gatif" = "n\u00e9gatif"'),
    "case, blanks or Unicode form": ("\uff30ositive", "positive", '"\uff30ositive" = "positive"'),
    "how a number is written": ("1.0", "1", '"1.0" = "1"'),
    "blank that nobody sees": ("positive\u200b", "positive", '"positive\\u200b" = "positive"'),
}


@pytest.mark.parametrize("kind", TWINS)
def test_labels_that_look_alike_are_named_with_what_to_do(kind: str) -> None:
    odd, plain, mapping = TWINS[kind]
    said = "case, blanks or Unicode form" if "sees" in kind else kind
    rows = [{"text": f"film {i}", "label": (plain, odd, "other")[i % 3]} for i in range(31)]
    data = table(rows)
    with refused(
        "reviews.csv:3: label", f"only in {said}: write", f"data.labels = {{ {mapping} }}"
    ):
        examples_from(data, columns=["text"], answer="label", choices=[plain, "other"])
    mapped = examples_from(
        data, columns=["text"], answer="label", choices=[plain, "other"], labels={odd: plain}
    )
    assert {example.answer for example in mapped} == {plain, "other"}
    for choices in ([odd, plain, "other"], None):
        examples = examples_from(data, columns=["text"], answer="label", choices=choices)
        (note,) = [
            note
            for note in make_splits(examples, columns=["text"], choices=choices).notes
            if "look alike" in note
        ]
        assert f"(10 rows) and {escape(plain)} (11 rows) differ only in {said}" in note
        assert f"data.labels = {{ {mapping} }}" in note
    guess = guess_columns(data)
    assert set(guess.choices or ()) == {plain, "other"}
    assert guess.labels == {odd: plain}
    assert any(f"{{ {mapping} }}" in note for note in guess.notes)
    with refused(f"label holds {escape(plain)}, which differs from {escape(odd)} only in {said}"):
        examples_from(table(rows[:1]), columns=["text"], where={"label": odd})
    with refused(f"{escape(odd)} differs from {escape(plain)} only in {said}: write them alike"):
        examples_from(table([{plain: "a"}]), columns=[odd])
    if kind != "case":  # of which the most frequent stays
        assert guess_columns(table([*rows, *(10 * [rows[1]])])).labels == {odd: plain}


def test_names_of_classes_are_offered() -> None:
    rows = [{"text": f"film {i}", "label": i % 2} for i in range(30)]
    data = dataclasses.replace(table(rows), class_names={"label": ("bad", "good")})
    mapping = 'data.labels = { "0" = "bad", "1" = "good" }'
    with refused("label '0' in column", f"the data set names its classes: set {mapping}"):
        examples_from(data, columns=["text"], answer="label", choices=["bad", "good"])
    unlabelled = dataclasses.replace(data, rows=[{"text": "a", "label": -1}, *rows[1:]])
    with refused("label '-1' in column", f"the data set names its classes: set {mapping}"):
        examples_from(unlabelled, columns=["text"], answer="label", choices=["bad", "good"])
    guess = guess_columns(data)
    assert guess.choices == ("bad", "good")
    assert guess.labels == {"0": "bad", "1": "good"}
    assert any(mapping in note for note in guess.notes)


# -------------------------------------------------------------------------------- guesses


def many(**columns: Sequence[object]) -> Table:
    """Forty rows; each column repeats the given values."""
    return table(
        [{name: cells[i % len(cells)] for name, cells in columns.items()} for i in range(40)]
    )


WORDS = [f"A sentence about thing number {i}, long enough to be read." for i in range(40)]


def test_guess_prefers_label_words_over_label_numbers() -> None:
    data = many(id=range(40), text=WORDS, label=[0, 1], label_text=["negative", "positive"])
    guess = guess_columns(data)
    assert (guess.text, guess.answer, guess.group) == ("text", "label_text", None)
    assert guess.choices == ("negative", "positive")
    assert guess.notes == (
        "Guessed that the text to read is in column 'text'.",
        "Guessed that column 'label_text' is the answer, one of 'negative', 'positive'.",
    )


def test_guess_goes_by_shape_where_names_say_nothing() -> None:
    data = many(
        kind=["a", "b", "c"], verdict=["guilty", "free"], remark=["short", "shorter"], story=WORDS
    )
    guess = guess_columns(data)
    assert (guess.text, guess.answer) == ("story", "verdict")
    assert guess.choices == ("free", "guilty")


def test_guess_takes_a_named_answer_with_many_values_as_generation() -> None:
    data = many(question=WORDS, solution=[w * 2 for w in WORDS], answer=range(40), type=["a", "b"])
    guess = guess_columns(data)
    assert (guess.text, guess.answer, guess.choices) == ("question", "answer", None)
    assert "column 'answer' is the answer to generate" in guess.notes[1]


def test_guess_finds_the_group_and_warns_about_numbered_answers() -> None:
    guess = guess_columns(many(Group_ID=[1, 2, 3], Review=WORDS, stars=["1", "2"]))
    assert (guess.text, guess.answer, guess.group) == ("Review", "stars", "Group_ID")
    assert any("say which by data.labels" in note for note in guess.notes)
    assert any("'Group_ID' belong together" in note for note in guess.notes)
    assert guess_columns(many(group=[1, 2], Review=WORDS)).answer is None


def test_guess_leaves_out_what_is_no_text() -> None:
    data = many(choices=[["Yes", "No"]], question=WORDS, label=["Yes", "No"])
    assert guess_columns(data).answer == "label"
    guess = guess_columns(many(passage=WORDS, constant=["same"]))
    assert (guess.text, guess.answer, guess.choices) == ("passage", None, None)
    assert "no column that looks like an answer" in guess.notes[1]


def test_guess_without_text_is_refused() -> None:
    with refused("reviews.csv: no column holds text", "its columns are a, b"):
        guess_columns(many(a=range(40), b=[1.5]))
    for cell, kind in (({"x": "y"}, "an object"), (["x"], "a list"), (math.nan, "NaN")):
        told = f"its columns are a (in reviews.csv:2 {kind}; expected plain text), b"
        with refused("reviews.csv: no column holds text", told):
            guess_columns(many(a=[cell], b=[1.5]))


def test_a_hundred_thousand_rows_take_about_a_second() -> None:
    data = table([{"text": f"row {i} " * 5, "label": i % 2, "id": i} for i in range(100_000)])
    start = time.process_time()
    examples = examples_from(data, columns=["text"], answer="label", choices=["0", "1"])
    assert time.process_time() - start < 4  # measured 0.4 s; the rest is for slow machines
    assert len(examples) == 100_000
