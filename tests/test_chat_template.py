"""A chat template shows the span where it was written, or is refused with the reason."""

from __future__ import annotations

import datetime
import functools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refusals
import tiny
from embedgrad.data.examples import Example
from embedgrad.errors import TemplateError
from embedgrad.prompt.sequence import Sequencer, Target
from embedgrad.prompt.template import END_MARK, SPAN_MARK, Renderer, Template
from kit import DAY, LABELS

refused = functools.partial(refusals.refused, error=TemplateError)
SPAN = "Is it good?"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
BRACKETS = st.text(st.sampled_from("[]{}a \n"), max_size=12)
# Chat templates, and the placements that each can hold.
PLACES = {
    "system": Template.chat(system="Be kind. [[Is it good?]] Be brief.", user="{a} and {b}"),
    "system-whole": Template.chat(system="[[Is it good?]]", user="{a}{b}"),
    "user-before": Template.chat(user="[[Is it good?]]\nA: {a}\nB: {b}."),
    "user-after": Template.chat(user="A: {a}\nB: {b}\n[[Is it good?]]"),
    "opening": Template.chat(user="A: {a} B: {b}", assistant="So: [[Is it good?]] It is"),
    "opening-end": Template.chat(user="A: {a} B: {b}", assistant="[[Is it good?]]"),
}
CHATS = {
    "chatml": tiny.CHATML,
    "trimming": tiny.TRIMMING,
    "no-system": tiny.NO_SYSTEM,
    "plain": tiny.PLAIN,
    "dated": tiny.DATED,
}
HOLDS = [
    (chat, place)
    for chat in CHATS
    for place in PLACES
    if not (chat == "no-system" and place.startswith("system"))
]


def chat_tokenizer(chat: str, kind: str = "metaspace") -> Any:
    return tiny.with_template(tiny.tokenizer(kind), CHATS[chat])


def renderer(template: Template, chat: str = "chatml", date: datetime.date = DAY) -> Renderer:
    return Renderer(template, chat_tokenizer(chat), date=date)


# -------------------------------------------------------------------------------- rendering


def expected(chat: str, template: Template, columns: dict[str, str]) -> str:
    """What `transformers` makes of the messages; columns filled by plain replacement."""
    messages = []
    for message in template.messages:
        content = message.content.replace("[[", "").replace("]]", "")
        parts = content.replace("{a}", "\0a\0").replace("{b}", "\0b\0").split("\0")
        filled = "".join(columns[p] if i % 2 else p for i, p in enumerate(parts))
        messages.append({"role": message.role, "content": filled})
    opened = messages[-1]["role"] == "assistant"
    text = chat_tokenizer(chat).apply_chat_template(
        messages,
        chat_template=CHATS[chat].replace("strftime_now('%d %b %Y')", "'12 Mar 2024'"),
        tokenize=False,
        add_generation_prompt=not opened,
        continue_final_message=opened,
    )
    return str(text)


@pytest.mark.parametrize(("chat", "place"), HOLDS)
@settings(max_examples=20)
@given(a=TEXT | BRACKETS, b=TEXT | BRACKETS)
def test_text_is_what_transformers_renders(chat: str, place: str, a: str, b: str) -> None:
    template, columns = PLACES[place], {"a": a, "b": b}
    rendered = renderer(template, chat)(columns)
    assert rendered.text == expected(chat, template, columns)
    assert rendered.pieces[1::2] == (SPAN,)
    if place.startswith("opening"):
        assert rendered.texts[1] == ("" if place == "opening-end" else " It is")


@given(a=TEXT | BRACKETS | st.sampled_from(["{b}", "[[x]]", "{{ bos_token }}", "{% if %}"]))
def test_a_column_is_never_parsed(a: str) -> None:
    plain = Renderer(Template.plain("{a}[[go]]{b}"), tiny.tokenizer("metaspace"), date=DAY)
    assert plain({"a": a, "b": "z"}).texts == (a, "z")
    assert a in renderer(Template.chat(user="<{a}> [[go]]"))({"a": a}).texts[0]


def test_the_span_stands_where_it_was_written() -> None:
    columns = {"a": "x", "b": "y"}
    before = renderer(PLACES["user-before"])(columns)
    after = renderer(PLACES["user-after"])(columns)
    system = renderer(PLACES["system"])(columns)
    opening = renderer(PLACES["opening"])(columns)
    assert before.texts[0].endswith("<|im_start|>user\n")
    assert before.texts[1] == "\nA: x\nB: y.<|im_end|>\n<|im_start|>assistant\n"
    assert after.texts[0].endswith("<|im_start|>user\nA: x\nB: y\n")
    assert after.texts[1] == "<|im_end|>\n<|im_start|>assistant\n"
    assert system.texts[0] == "<|im_start|>system\nBe kind. "
    assert system.texts[1].startswith(" Be brief.<|im_end|>\n<|im_start|>user\nx and y<|im_end|>")
    assert opening.texts[0].endswith("<|im_start|>assistant\nSo: ")


def test_the_date_is_frozen() -> None:
    template = PLACES["user-after"]
    columns = {"a": "x", "b": "y"}
    assert "Today is 12 Mar 2024." in renderer(template, "dated")(columns).texts[0]
    other = renderer(template, "dated", datetime.date(1999, 1, 2))(columns)
    assert "Today is 02 Jan 1999." in other.texts[0]


def test_options_reach_the_chat_template() -> None:
    tokenizer = tiny.with_template(
        tiny.tokenizer("bytelevel"), "{% if loud %}!{% endif %}{{ messages[0]['content'] }}"
    )
    quiet = Template.chat(user="[[go]]")
    loud = Template.chat(user="[[go]]", options={"loud": True})
    assert Renderer(quiet, tokenizer, date=DAY)({}).texts[0] == ""
    assert Renderer(loud, tokenizer, date=DAY)({}).texts[0] == "!"


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "strftime_now"])
def test_an_option_that_is_ours_is_refused(name: str) -> None:
    template = Template.chat(user="[[go]]", options={name: True})
    with refused(f"template.options.{name}"):
        renderer(template)({})


@pytest.mark.parametrize(
    ("chat", "after"),
    [
        ("chatml", "<|im_end|>\n"),
        ("trimming", "<|im_end|>\n"),
        ("no-system", "<end_of_turn>\n"),
        ("plain", "\n"),
    ],
)
@pytest.mark.parametrize("place", ["user-after", "opening"])
def test_what_follows_an_answer(chat: str, after: str, place: str) -> None:
    assert renderer(PLACES[place], chat).after_answer() == after


def test_nothing_follows_an_answer_of_plain_text() -> None:
    tokenizer = chat_tokenizer("chatml")
    assert Renderer(Template.plain("[[a]]"), tokenizer, date=DAY).after_answer() == ""


# ------------------------------------------------------------- chat templates that cannot hold it


def test_a_model_without_a_chat_template_takes_plain_text_only() -> None:
    with refused("no chat template", "plain text"):
        Renderer(PLACES["system"], tiny.tokenizer("metaspace"), date=DAY)


def test_a_chat_template_without_a_system_role_is_named() -> None:
    with refused("refuses the messages", "system, user", "System role not supported"):
        renderer(PLACES["system"], "no-system")({"a": "x", "b": "y"})


@pytest.mark.parametrize("text", ["[[ Is it good? ]]", "[[Is it good?\n]]", "[[\nIs it good?]]"])
def test_a_span_that_the_chat_template_trims_is_refused(text: str) -> None:
    template = Template.chat(user=text)
    assert renderer(template, "chatml")({}).pieces[1] == text[2:-2]
    with refused("trims or rewrites", "white space"):
        renderer(template, "trimming")({})


@pytest.mark.parametrize(
    ("chat", "parts"),
    [
        ("{{ messages[0]['content'] * 2 }}", ["2 times instead of once"]),
        ("{{ messages | length }}", ["0 times instead of once"]),
        ("{{ messages[0]['content'] | upper }}", ["changes upper and lower case"]),
        ("{{ messages[0]['content'] | lower }}", ["changes upper and lower case"]),
        ("{{ messages[0]['content'] | replace('good', 'bad') }}", ["trims or rewrites"]),
        ("{{ messages[0]['content'] | length }}{{ messages[0]['content'] }}", ["rewrites"]),
        ("{{ messages[0]['content'] + 1 }}", ["refuses the messages"]),
        ("{{ messages[0]['parts'][0] }}", ["refuses the messages"]),
    ],
)
def test_a_chat_template_that_moves_the_span_is_refused(chat: str, parts: list[str]) -> None:
    tokenizer = tiny.with_template(tiny.tokenizer("bytelevel"), chat)
    with refused(*parts):
        Renderer(Template.chat(user="[[Is it good?]]"), tokenizer, date=DAY)({})


@pytest.mark.parametrize(
    ("chat", "parts"),
    [
        (
            "{{ messages[1]['content'] }}{{ messages[0]['content'] }}",
            ["moves the span 'Now? ' before the one", "in the order in which it shows them"],
        ),
        (
            "{{ messages[0]['content'] }}{{ messages[1]['content'] }}{{ messages[0]['content'] }}",
            ["shows the span 'Be kind.' 2 times instead of once"],
        ),
        ("{{ messages[0]['content'] }}", ["shows the span 'Now? ' 0 times instead of once"]),
        (
            "{{ messages[0]['content'] }}{{ messages[1]['content'] | trim }}",
            ["trims or rewrites"],
        ),
    ],
)
def test_a_chat_template_that_moves_one_of_several_spans_is_refused(
    chat: str, parts: list[str]
) -> None:
    tokenizer = tiny.with_template(tiny.tokenizer("bytelevel"), chat)
    template = Template.chat(system="[[Be kind.]]", user="a [[Now? ]]")
    with refused(*parts):
        Renderer(template, tokenizer, date=DAY)({})


def test_every_span_is_where_it_was_written() -> None:
    template = Template.chat(system="[[Be]] kind", user="{a}[[go]][[go]]", assistant="So: [[it]]")
    rendered = renderer(template)({"a": "x"})
    assert rendered.pieces[1::2] == ("Be", "go", "go", "it")
    assert rendered.texts[1:] == (
        " kind<|im_end|>\n<|im_start|>user\nx",
        "",
        "<|im_end|>\n<|im_start|>assistant\nSo: ",
        "",
    )
    drawn = rendered.draw_in(0, 0, 5).draw_in(3, 1, 0)
    assert drawn.text == rendered.text
    assert drawn.pieces[1::2] == ("Be kind", "go", "go", " it")


def test_an_opening_that_the_chat_template_drops_is_refused() -> None:
    tokenizer = tiny.with_template(
        tiny.tokenizer("bytelevel"), "{{ messages[0]['content'] }}{{ messages[1]['role'] }}"
    )
    with refused("drops an assistant message", "template.assistant"):
        Renderer(Template.chat(user="[[a]]", assistant="b"), tokenizer, date=DAY)({})


def test_a_column_that_is_missing_is_named() -> None:
    with refused("{reviw}", "did you mean 'review'"):
        renderer(Template.chat(user="{reviw} [[go]]"))({"review": "x"})


def test_a_row_with_our_mark_is_refused() -> None:
    for mark in (SPAN_MARK, END_MARK):
        with refused("column 'a'", "own mark"):
            renderer(Template.chat(user="{a} [[go]]"))({"a": f"x{mark}"})


# ------------------------------------------------------- what a model's own template asks for

PARTS = (
    "{% for m in messages %}<{{ m['role'] }}>{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ONE_SPAN = Template.chat(system="Be kind.", user="{a} [[Is it good?]]")


def with_chat(chat: Any, template: Template = ONE_SPAN) -> Renderer:
    return Renderer(template, tiny.with_template(tiny.tokenizer("bytelevel"), chat), date=DAY)


def test_a_chat_template_of_lists_of_parts_gets_them() -> None:
    made = with_chat(PARTS)
    text = made({"a": "Soup"}).text
    assert text == "<system>Be kind.;<user>Soup Is it good?;<assistant>"
    assert made.after_answer() == ";"
    # The template that exports take is given texts, as their clients send them.
    messages = [{"role": "user", "content": "hi"}]
    shown = with_chat(None, Template.plain("[[a]]"))._tokenizer.apply_chat_template(
        messages, chat_template=made.chat_template, tokenize=False, add_generation_prompt=True
    )
    assert shown == "<user>hi;<assistant>"


def test_a_chat_template_of_texts_or_parts_gets_texts() -> None:
    both = PARTS.replace(
        "{% for part", "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part"
    ).replace("{% endfor %};", "{% endfor %}{% endif %};")
    assert with_chat(both).chat_template == both


def test_one_of_several_chat_templates_is_chosen_by_name() -> None:
    named = {"rag": tiny.CHATML, "tool_use": tiny.PLAIN}
    with refused("no default", "template.options.chat_template: rag, tool_use"):
        with_chat(named)
    with refused("no chat template 'rug'", "rag, tool_use"):
        with_chat(named, replace(ONE_SPAN, options={"chat_template": "rug"}))
    chosen = with_chat(named, replace(ONE_SPAN, options={"chat_template": "rag"}))
    assert chosen({"a": "x"}) == with_chat(tiny.CHATML)({"a": "x"})
    assert with_chat({**named, "default": tiny.PLAIN})({"a": "x"}) == with_chat(tiny.PLAIN)(
        {"a": "x"}
    )
    with refused("no chat template 'rag'", "default"):
        with_chat(tiny.CHATML, replace(ONE_SPAN, options={"chat_template": "rag"}))


@pytest.mark.parametrize("option", ["enable_thinkin", "think"])
def test_an_option_that_the_chat_template_never_mentions_is_refused(option: str) -> None:
    thinks = tiny.CHATML + "{% if enable_thinking %}<think>{% endif %}"
    thinks += "{%- generation %}{% endgeneration -%}"  # a tag that only transformers knows
    with refused(f"template.options.{option}", "no such variable", "known: enable_thinking"):
        with_chat(thinks, replace(ONE_SPAN, options={option: True}))
    with_chat(thinks, replace(ONE_SPAN, options={"enable_thinking": True}))


@pytest.mark.parametrize(
    ("written", "shown", "template", "lost"),
    [
        (
            "m['content']",
            "m['content'].split('</think>')[-1]",
            Template.chat(user="{a}", assistant="<think>\nHm.\n</think>\n\n[[So]]"),
            "'<think>' in the assistant message",
        ),
        (
            "{% for m in messages %}",
            "{% for m in messages if m['role'] != 'system' %}",
            Template.chat(system="Be kind.", user="{a} [[Is it good?]]"),
            "'Be kind.' in the system message",
        ),
        (
            "m['content']",
            "m['content'][:40]",
            Template.chat(system="[[Is it good?]]", user="{a} " + "x" * 40 + "\nand more"),
            "in the user message",
        ),
        (
            "m['content']",
            "(m['content'] if m['role'] == 'system' else m['content'] | upper)",
            Template.chat(system="[[Is it good?]]", user="The text: {a}"),
            "'The text: soup' in the user message",
        ),
        (
            "{% for m in messages %}",
            "{% for m in messages if m['role'] != 'system' %}",
            Template.chat(system="good", user="{a} [[Is it good?]]"),
            "'good' in the system message",
        ),
        (
            "m['content']",
            "m['content'] | replace(' ', '')",
            Template.chat(user="The text: {a} [[Good?]]"),
            "'The text: soup Good?' in the user message",
        ),
    ],
    ids=["a thought", "a role", "an end", "letters", "a part", "blanks"],
)
def test_a_chat_template_that_drops_what_was_written_is_refused(
    written: str, shown: str, template: Template, lost: str
) -> None:
    chat = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    with_chat(chat, template)({"a": "soup"})
    with refused("drops or changes", lost):
        with_chat(chat.replace(written, shown), template)({"a": "soup"})


@pytest.mark.parametrize(
    "shown",
    [
        "m['content'] | trim",
        "m['content'].split() | join(' ')",
        "m['content'] | replace('\n\n', '\n')",
        "m['content'] | indent(4)",
        "m['content'].split('\n') | map('trim') | join('\n')",
    ],
)
def test_a_chat_template_may_change_white_space(shown: str) -> None:
    chat = f"{{% for m in messages %}}<{{{{ m['role'] }}}}>{{{{ {shown} }}}}{{% endfor %}}"
    render = with_chat(chat, Template.chat(system="Be  kind.", user="{a}\n\n[[Good?]]"))
    assert render({"a": "My \n\n  soup, \n"}).pieces[1] == "Good?"


def test_the_row_that_a_chat_template_changes_is_named() -> None:
    chat = "{% for m in messages %}{{ m['content'].split('|')[-1] }}{% endfor %}"
    words = tiny.with_template(tiny.tokenizer("bytelevel"), chat)
    template = Template.chat(user="{text}\n\n[[Good?]]")
    rows = [Example({"text": text}, "yes", f"rows:{i}") for i, text in enumerate(("a", "b | c"))]
    made = Sequencer(
        Renderer(template, words, date=DAY), words, Target(choices=("yes", "no")), rows=rows[:1]
    )
    with refused("drops or changes 'b | c'", "first in rows:1"):
        made.build(rows)


@pytest.mark.parametrize(
    ("end", "choices", "noted"),
    [
        ("<think>\n", True, True),
        ("<|think|>", True, True),
        ("[THINK]", True, True),
        ("<|START_THINKING|>", True, True),
        ("<|begin_of_thought|>", True, True),
        ("<|channel|>analysis<|message|>", True, True),
        ("<think>\nOkay, so", True, True),
        ("<think>\n", False, False),
        ("<|START_THINKING|><|END_THINKING|>", True, False),
        ("Think in <think> tags.<|im_start|>assistant\n", True, False),
        ("<think>\n\n</think>\n\n", True, False),
        ("", True, False),
    ],
)
def test_a_prompt_that_ends_inside_a_thought_is_noted(end: str, choices: bool, noted: bool) -> None:
    chat = tiny.CHATML + "{% if add_generation_prompt %}" + end + "{% endif %}"
    tokenizer = tiny.with_template(tiny.tokenizer("bytelevel"), chat)
    template = Template.chat(user="{review} [[Is it good?]]")
    made = Renderer(template, tokenizer, date=DAY)
    rows = tiny.reviews(4)
    sequencer = Sequencer(made, tokenizer, LABELS if choices else Target(), rows=rows)
    notes = sequencer.notes(sequencer.build(rows))
    told = [note for note in notes if "inside a thought" in note]
    assert len(told) == noted
    assert all(
        note.endswith(
            "), so the choices are scored as its first words; close it, by an option of the chat "
            "template such as enable_thinking = false, or by template.assistant"
        )
        for note in told
    )
