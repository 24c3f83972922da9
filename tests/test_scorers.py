"""The law of scorers, over every registered one, and what each one calls right."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from embedgrad.data.examples import Example
from embedgrad.errors import DataError
from embedgrad.parts.registry import build_part
from embedgrad.parts.scorers import (
    SCORERS,
    Contains,
    Exact,
    Math,
    Number,
    SandboxedFunction,
    Scorer,
    name_of,
    parse_number,
)
from embedgrad.parts.scorers.checks import check_answers
from embedgrad.prompt.sequence import Target

# Characters that the patterns care about, so that chance finds their corners; and any at all.
ODD_TEXT = st.one_of(
    st.text(st.sampled_from("0123456789.,-+$%/#\\{}eE \n\t\"'\u2212\u0663x")),
    st.lists(
        st.sampled_from(["\\boxed{", "\\frac{", "}", "{", "####", "1e999", "7", ",000", " / "])
    ).map("".join),
    st.text(st.characters()),  # with lone surrogates
)
USABLE_ANSWERS = {
    "callable": st.text().filter(str.strip),
    "contains": st.text().filter(str.strip),
    "exact": st.text().filter(str.strip),
    "math": st.text().filter(str.strip),
    "number": st.one_of(
        st.integers(-(10**30), 10**30).map(str),
        st.integers(-(10**12), 10**12).map("{:,}".format),
        st.floats(allow_nan=False, allow_infinity=False).map(repr),
    ),
}
LENGTH = 2**19
HUGE = {
    "digits": "9" * 2**20,
    "fraction digits": "0." + "9" * LENGTH,
    "exponent": "1e" + "9" * LENGTH,
    "groups of thousands": "1" + ",234" * (LENGTH // 4) + "5",
    "minuses": "-" * LENGTH,
    "hashes": "#" * LENGTH,
    "marks and blanks": ("####" + " " * 60) * (LENGTH // 64),
    "slashes": "1 / " * (LENGTH // 4),
    "points": "1." * (LENGTH // 2),
    "open braces": "\\boxed{" + "{" * LENGTH,
    "boxes": "\\boxed{" * (LENGTH // 7),
    "fractions": "\\frac{1" * (LENGTH // 7),
    "blanks": " " * LENGTH,
    "quotes": '"' * LENGTH,
    "one letter": "a" * LENGTH,
    "words": "a " * (LENGTH // 2),
}


# Those of a process of their own; a score may cost milliseconds there, and a start of the process.
IN_WORKERS: dict[str, Scorer] = {
    "callable": SandboxedFunction(function="functions_to_call:same", timeout=60),
    "math": Math(timeout=0.5),
}


def made(name: str) -> Scorer:
    return IN_WORKERS[name] if name in IN_WORKERS else SCORERS[name]()


def examples(name: str) -> int:
    return 30 if name in IN_WORKERS else 100


def test_every_scorer_is_under_the_law() -> None:
    assert USABLE_ANSWERS.keys() == SCORERS.keys()


@pytest.mark.parametrize("name", SCORERS)
def test_a_scorer_knows_its_name(name: str) -> None:
    assert name_of(made(name)) == name


@pytest.mark.parametrize("name", SCORERS)
def test_the_answer_itself_is_right(name: str) -> None:
    @settings(max_examples=examples(name))
    @given(USABLE_ANSWERS[name])
    def law(answer: str) -> None:
        assert made(name).score(answer, answer) == 1.0

    law()


@pytest.mark.parametrize("name", SCORERS)
def test_an_empty_reply_is_wrong(name: str) -> None:
    @settings(max_examples=examples(name))
    @given(answer=ODD_TEXT, blank=st.sampled_from(["", " ", "\n\t"]))
    def law(answer: str, blank: str) -> None:
        assert made(name).score(blank, answer) == 0.0

    law()


@pytest.mark.parametrize("name", SCORERS)
def test_odd_text_gets_a_score(name: str) -> None:
    @settings(max_examples=examples(name))
    @given(reply=ODD_TEXT, answer=ODD_TEXT)
    @example(reply="1e999999999", answer="1e999999999")
    @example(reply="\\boxed{{{}", answer="}}{")
    @example(reply="\ud800", answer="\udfff")
    @example(reply="\0", answer="\0\0")
    def law(reply: str, answer: str) -> None:
        assert made(name).score(reply, answer) in (0.0, 1.0)

    law()


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("kind", HUGE)
def test_long_text_is_scored_in_linear_time(name: str, kind: str) -> None:
    text = HUGE[kind]
    started = time.perf_counter()
    assert made(name).score(text, text[: LENGTH // 2] + "b") in (0.0, 1.0)
    # 0.2 s on an idle core; quadratic takes minutes. A worker may have to start first.
    assert time.perf_counter() - started < (20 if name in IN_WORKERS else 5)


def test_answers_that_no_reply_could_match_are_named_the_first_three() -> None:
    answers = ("7", "seven", "", "eight", "9", "ten")
    rows = [Example({}, answer, f"rows.csv:{n}") for n, answer in enumerate(answers, 2)]
    with pytest.raises(DataError) as raised:
        check_answers(rows, Target(), Number())
    told = str(raised.value)
    assert told.startswith("rows.csv:3: the answer 'seven' is none that evaluation.scorer = 'numb")
    assert "(of 4 such rows the next: '' (rows.csv:4), 'eight' (rows.csv:5))" in told
    assert "ten" not in told
    check_answers(rows, Target(("seven", "eight")), Number())
    check_answers([rows[0]], Target(), Number())


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("Paris", "Paris", 1.0),
        ("  paris\n", "Paris", 1.0),
        ("New \n York", "New York", 1.0),
        ("Paris.", "Paris", 1.0),
        ('"Paris"', "Paris", 1.0),
        ('"Paris".', "Paris", 1.0),
        ('"Paris."', "Paris", 1.0),
        ("\u201cParis\u201d", "Paris", 1.0),
        ("Paris..", "Paris", 0.0),
        ('"Paris.".', "Paris", 0.0),
        ('"Paris', "Paris", 0.0),
        ("It is Paris", "Paris", 0.0),
        ("Pari s", "Paris", 0.0),
        ("STRASSE", "stra\u00dfe", 1.0),
        ("Me\u0301rida", "m\u00e9rida", 1.0),
        (".", ".", 1.0),
        ("", "", 0.0),
    ],
)
def test_exact(reply: str, answer: str, score: float) -> None:
    assert Exact().score(reply, answer) == score


def test_exact_can_mind_capitals() -> None:
    assert Exact(casefold=False).score("paris", "Paris") == 0.0
    assert Exact(casefold=False).score("Paris.", "Paris") == 1.0


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("The capital is Paris, of course.", "paris", 1.0),
        ("It is **Paris**!", "Paris", 1.0),
        ("It is _Paris_", "Paris", 1.0),
        ("Comparison", "Paris", 0.0),
        ("no", "not", 0.0),
        ("nothing", "no", 0.0),
        ("in New\nYork now", "New York.", 1.0),
        ("New, York", "New York", 0.0),
        ("about 3.5 apples", "5", 0.0),
        ("about 3.5 apples", "3.5", 1.0),
        ("It is -5", "5", 0.0),
        ("It is -5, so", "-5", 1.0),
        ("pages 3-5", "5", 1.0),
        ("about .5", "5", 0.0),
        ("5/6 of it", "5", 0.0),
        ("cafe\u0301", "cafe", 0.0),
        ("cafe\u0301", "caf\u00e9", 1.0),
        ("\u0915\u093f", "\u0915", 0.0),
        ("It has 5.", "5", 1.0),
        ("the 5th", "5", 0.0),
        ("no,5 of them", "no", 1.0),
        ("anything", "", 0.0),
    ],
)
def test_contains(reply: str, answer: str, score: float) -> None:
    assert Contains().score(reply, answer) == score


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is 5.", 5.0),
        ("2 + 3 = 5", 5.0),
        ("1,234", 1234.0),
        ("1,234,567.5 in all", 1234567.5),
        ("1, 2, 3", 3.0),
        ("1,2345", 2345.0),
        ("$1,234.50.", 1234.5),
        ("-$5", -5.0),
        ("$-5", -5.0),
        ("-\u20ac5", -5.0),
        ("75%", 75.0),
        ("x = -3", -3.0),
        ("x=\u22123", -3.0),
        ("**-3**", -3.0),
        ("10-4", 4.0),
        ("pages 3\u20135", 5.0),
        ("GPT-4", 4.0),
        (".5", 0.5),
        ("so it is...5", 5.0),
        ("-.5", -0.5),
        ("3/4", 0.75),
        ("-3 / 4", -0.75),
        ("3/0", None),
        ("1/1e999", None),
        ("1e3", 1000.0),
        ("2.5E-3 m", 0.0025),
        ("1e999", None),
        ("-1e999", None),
        ("9" * 5000, None),
        ("\u0661\u0662", 12.0),
        ("5kg", 5.0),
        ("no number", None),
        ("", None),
        ("3 + 4 = 7\n#### 7\nThat took 2 steps.", 7.0),
        ("####7", 7.0),
        ("#### $1,200", 1200.0),
        ("#### -3\n1", -3.0),
        ("#### 3 then #### 4, not 5", 4.0),
        ("#### Step 1: add\nIt is 12.", 12.0),
        ("#### 1. Add\nIt is 12.", 12.0),
        ("#### 12. Add\nIt is 3.", 3.0),
        (r"So \boxed{42}, in 3 steps", 42.0),
        (r"\boxed{1} or rather \boxed{x = \text{a } 2} 3", 2.0),
        (r"\boxed{\frac{3}{4}} 9", 0.75),
        (r"\boxed{-\dfrac{3}{4}} 9", -0.75),
        (r"\frac{-1}{2}", -0.5),
        (r"\frac{3}{-4}", -0.75),
        (r"-\frac{-1}{2}", 0.5),
        (r"x=\dfrac{ -3 }{ 4 }", -0.75),
        (r"\frac12", 0.5),
        (r"$-\frac{3}4$", -0.75),
        (r"3-\frac{1}{2}", 0.5),
        (r"1\frac{1}{2}", 0.5),
        (r"\boxed{1{,}234} 9", 1234.0),
        (r"\boxed{10,\!000} 9", 10000.0),
        (r"\boxed{1\,234\,cm} 9", 1234.0),
        (r"\boxed{\$5} 9", 5.0),
        (r"\boxed{5", 5.0),
        (r"\boxed{x} 9", 9.0),
        (r"7 } 9", 9.0),
    ],
)
def test_parse_number(text: str, value: float | None) -> None:
    assert parse_number(text) == value


def test_number_reads_a_worked_solution_as_the_answer() -> None:
    answer = "She sells 16 - 3 - 4 = 9 eggs.\nThat is 9 * 2 = $18.\n#### 18"
    assert Number().score("She makes $18.00 every day.", answer) == 1.0
    assert Number().score("She makes $19 every day.", answer) == 0.0


@pytest.mark.parametrize(("reply", "answer"), [("1e999", "1e999"), ("1e999", "1e9999"), ("a", "a")])
def test_number_without_a_value_equals_nothing(reply: str, answer: str) -> None:
    assert Number(absolute_tolerance=1e300).score(reply, answer) == 0.0


def test_number_tolerances() -> None:
    assert Number().score("0.333", "1/3") == 0.0
    assert Number(absolute_tolerance=0.001).score("0.333", "1/3") == 1.0
    assert Number(absolute_tolerance=0.5).score("-9.5", "-10") == 1.0
    assert Number(absolute_tolerance=0.5).score("-9.4", "-10") == 0.0
    assert Number(relative_tolerance=0.1).score("110", "100") == 1.0
    assert Number(relative_tolerance=0.1).score("111", "100") == 0.0  # a share of the answer
    assert Number(relative_tolerance=0.1).score("-100", "100") == 0.0
    assert Number(relative_tolerance=0.1, absolute_tolerance=2).score("1", "3") == 1.0


@pytest.mark.parametrize(
    ("option", "value", "bound"),
    [
        ("relative_tolerance", 1.0, "less than 1"),
        ("relative_tolerance", -0.1, "greater than or equal to 0"),
        ("absolute_tolerance", -0.1, "greater than or equal to 0"),
        ("absolute_tolerance", math.nan, "greater than or equal to 0"),
    ],
)
def test_a_tolerance_out_of_range_is_a_problem_of_the_recipe(
    option: str, value: float, bound: str
) -> None:
    problems: list[str] = []
    assert build_part("scorer", {"name": "number", option: value}, "scorer", problems) is None
    assert len(problems) == 1
    assert problems[0].startswith(f"scorer.{option}: ")
    assert bound in problems[0]
