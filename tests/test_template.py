"""Text is cut into literals, columns and one span; a mistake is refused with its place."""

from __future__ import annotations

import functools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import refusals
from embedgrad.data.markup import parse
from embedgrad.errors import TemplateError
from embedgrad.prompt.template import Message, Template
from kit import PLACEMENTS

refused = functools.partial(refusals.refused, error=TemplateError)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
BRACKETS = st.text(st.sampled_from("[]{}a \n"), max_size=12)


def escaped(text: str) -> str:
    """What a user writes to get this text; brackets apart, so that no escape runs into another."""
    return text.replace("{", "{{").replace("}", "}}").replace("[[", "[[[[").replace("]]", "]]]]")


# ---------------------------------------------------------------------------------- parsing


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a [[b]] c", [("text", "a "), ("span", "b"), ("text", " c")]),
        ("[[b]]", [("span", "b")]),
        ("{x}[[b]]{y}", [("column", "x"), ("span", "b"), ("column", "y")]),
        ("{{x}} [[b]]", [("text", "{x} "), ("span", "b")]),
        ("{{{x}}} [[b]]", [("text", "{"), ("column", "x"), ("text", "} "), ("span", "b")]),
        ("[[[[x]]]] [[b]]", [("text", "[[x]] "), ("span", "b")]),
        ("[x] [[b]] ]", [("text", "[x] "), ("span", "b"), ("text", " ]")]),
        ("[[a list[0]]]", [("span", "a list[0]")]),
        ("[[say {{b}}]]", [("span", "say {b}")]),
        ("[[two\nlines]]", [("span", "two\nlines")]),
        ("{two words}[[b]]", [("column", "two words"), ("span", "b")]),
        ("", []),
    ],
)
def test_text_is_cut_into_pieces(text: str, pieces: list[tuple[str, str]]) -> None:
    assert [(piece.kind, piece.text) for piece in parse(text, "template.user")] == pieces


@given(TEXT | BRACKETS, TEXT.filter(bool), TEXT | BRACKETS)
def test_escaped_text_comes_back(before: str, span: str, after: str) -> None:
    # A bracket of the text next to one of the span's would be read with it.
    before, span, after = f"{before} ", f" {span} ", f" {after}"
    text = f"{escaped(before)}[[{escaped(span)}]]{escaped(after)}"
    found = [(piece.kind, piece.text) for piece in parse(text, "template.text")]
    assert found == [("text", before), ("span", span), ("text", after)]


@given(BRACKETS)
def test_any_text_is_parsed_or_refused_in_one_line(text: str) -> None:
    try:
        assert Template.plain(text).spans
    except TemplateError:
        with refused("template"):
            Template.plain(text)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("no span", ["no span", "[[the words to refine]]"]),
        ("", ["no span"]),
        ("[[a]", ["not closed", "]]"]),
        ("x [[a", ["template.text", "not closed", "character 5"]),
        ("[[a [[b]] c]]", ["span inside a span", "character 4"]),
        ("a]] [[b]]", ["without '[['", "character 1", "]]]]"]),
        ("[[]]", ["empty span"]),
        ("[[about {topic}]]", ["{topic}", "inside the span", "same for every row"]),
        ("{ [[b]]", ["lone '{'", "{{"]),
        ("a } [[b]]", ["lone '}'", "character 2"]),
        ("{} [[b]]", ["'{}'"]),
        ("{a\nb} [[c]]", ["lone '{'"]),
    ],
)
def test_a_bad_template_is_refused(text: str, parts: list[str]) -> None:
    with refused(*parts):
        Template.plain(text)


def test_the_message_with_the_mistake_is_named() -> None:
    with refused("template.user", "character 7", "near 'Review {text'"):
        Template.chat(system="[[b]]", user="Review {text")


def test_a_template_may_have_several_spans() -> None:
    chat = Template.chat(system="[[a]]", user="{x} [[b]][[a]]", assistant="[[c]] so")
    assert chat.spans == ("a", "b", "a", "c")
    assert Template.plain("[[a]] and [[b]]").spans == ("a", "b")
    with refused("4 spans", "works with one [[span]] only"):
        _ = chat.span


def test_messages_are_checked() -> None:
    with refused("either chat messages or one plain text"):
        Template()
    with refused("either chat messages or one plain text"):
        Template(messages=(Message("user", "[[a]]"),), text="[[a]]")
    with refused("'sytem'", "did you mean 'system'"):
        Template(messages=(Message("sytem", "[[a]]"), Message("user", "b")))
    with refused("last message is a system message"):
        Template.chat(system="[[a]]")


def test_what_it_says_of_itself() -> None:
    template = Template.chat(system="{b} {{x}}", user="{a} [[go]] {b}", options={"think": False})
    assert template.columns == ("b", "a")
    assert template.span == "go"


@pytest.mark.parametrize(
    "template",
    [
        *PLACEMENTS.values(),
        Template.plain("[[a]] {b}"),
        Template.chat(user="[[a]]", options={"k": 1}),
    ],
)
def test_a_template_survives_json(template: Template) -> None:
    assert Template.from_dict(json.loads(json.dumps(template.as_dict()))) == template
