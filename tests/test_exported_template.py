"""An exported chat template gives training's tokens for plain messages, and to nobody else."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2.meta
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import _compile_jinja_template

import refusals
import tiny
from chats import CHATS, LLAMA
from embedgrad.data.examples import Example
from embedgrad.deploy.formats.chat_template import (
    check_rendering,
    exported_template,
    exported_tokenizer,
    uncut_rows,
)
from embedgrad.deploy.formats.token_names import new_tag, token_names
from embedgrad.deploy.job import ExportedPrompt
from embedgrad.deploy.programs import to_jinja
from embedgrad.deploy.query import plain_messages, query_of
from embedgrad.deploy.rules import Facts, exportability
from embedgrad.errors import EngineError, ExportError
from embedgrad.model.llamacpp.server import LlamaCppServer
from embedgrad.prompt.embedding import PromptEmbedding
from embedgrad.prompt.sequence import Sequencer
from embedgrad.prompt.template import Message, Renderer, Template
from kit import DAY, LABELS, PLACEMENTS
from kit_text import TEXTS
from tiny_gguf import write_gguf

refused = functools.partial(refusals.refused, error=ExportError)
TAG = "k3v9x0q7t2ma"
KINDS = tuple(tiny.TOKENIZERS)
PLACES = {
    **{name: PLACEMENTS[name] for name in ("system", "user-before", "user-after", "opening")},
    "two-columns": Template.chat(
        system="Be brief.", user="Rate it.\nReview: {review}\nBy: {label}.\n[[Is it good?]] Say."
    ),
    "opening-end": Template.chat(user="Review: {review}", assistant="So, [[is it good?]]"),
    "shots": Template(
        messages=(
            Message("system", "You are brief."),
            Message("user", "Review: [[[[dull]]]] {{x}}"),
            Message("assistant", "negative"),
            Message("user", "Review: {review}\n[[Is it good?]]"),
        )
    ),
    "following": Template(
        messages=(
            Message("user", "Review: {review}"),
            Message("assistant", "I have read it."),
            Message("user", "[[Is it positive or negative?]]"),
        )
    ),
}
PLACES |= {
    "spans": Template.chat(
        system="[[You rate.]] Be brief.", user="[[Read this:]] {review}\n[[Is it good?]] Say."
    ),
    "spans-opening": Template.chat(user="[[Rate]] this: {review}", assistant="So [[it is]]"),
}
BY_SYSTEM = {"system", "two-columns", "shots", "spans"}


def on_its_way(
    template: Template,
    tokenizer: Any,
    name: str = "p",
    *,
    date: datetime.date = DAY,
    rows: Sequence[Example] = (),
    **options: Any,
) -> ExportedPrompt:
    """A prompt to be exported; what its rows hold does not matter here."""
    renderer, examples = Renderer(template, tokenizer, date=date), tiny.reviews(4)
    made = Sequencer(renderer, tokenizer, LABELS, rows=examples, **options)
    rows_PD = torch.zeros(len(made.prompt_ids), 4)
    prompt = PromptEmbedding(template, LABELS, made.spans, date, rows_PD, rows_PD)
    return ExportedPrompt(name, prompt, made, made.build(rows or examples))


def exported(
    template: Template, chat: str = "chatml", kind: str = "bytelevel", name: str = "p", **how: Any
) -> ExportedPrompt:
    """The same for a chat template by name."""
    return on_its_way(template, tiny.with_template(tiny.tokenizer(kind), CHATS[chat]), name, **how)


@functools.cache
def one(
    place: str, chat: str = "chatml", kind: str = "bytelevel", name: str = "p"
) -> ExportedPrompt:
    return exported(PLACES[place], chat, kind, name)


@functools.cache
def served(*prompts: tuple[str, str], chat: str = "chatml", system: str = "append") -> Any:
    """The tokenizer of an export of prompts, each a name and a place."""
    made = [one(place, chat, name=name) for name, place in prompts]
    return exported_tokenizer(made, made[0].sequencer.tokenizer, TAG, system)


def shown(tokenizer: Any, messages: Sequence[dict[str, Any]], **asked: Any) -> str:
    """What an engine would tokenize; `[p]` for all tokens of prompt p, in their order."""
    asked = {"add_generation_prompt": True, **asked}
    text = str(tokenizer.apply_chat_template(list(messages), tokenize=False, **asked))
    pattern = rf"(?:<\|{TAG}_[\w-]+?_\d+\|>)+"
    for found in set(re.findall(pattern, text)):
        name = found.split("_")[1]
        count = found.count("<|")
        assert found == "".join(token_names(TAG, name, count)), found
        text = text.replace(found, f"[{name}]")
    return text


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: Any, role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": text}


# ------------------------------------------------------------------- plain queries, as trained


def test_several_spans_in_a_conversation() -> None:
    """Those of user messages go into the last; that of an opening, where an answer begins."""
    names = token_names(TAG, "p", 40)

    def template(place: str, *messages: dict[str, Any], **asked: Any) -> str:
        asked = {"add_generation_prompt": True, **asked}
        text = served(("p", place)).apply_chat_template(list(messages), tokenize=False, **asked)
        return re.sub(rf"(?:<\|{TAG}_p_\d+\|>)+", "[p]", text)

    turns = user("A"), assistant("B"), user("C")
    spans = template("spans", *turns)
    assert spans.count("[p]") == 3
    assert "A" in spans.partition("C")[0]
    assert re.search(r"\[p\] C\n\[p\] Say\.", spans)
    assert template("spans-opening", *turns).endswith("So[p]")  # the space is drawn in
    closed = template("spans-opening", *turns, assistant("Done."), add_generation_prompt=False)
    assert closed.count("[p]") == 1
    tokenizer = served(("p", "spans"))
    text = tokenizer.apply_chat_template([user("C")], tokenize=False)
    assert [name for name in re.findall(r"<\|\S+?\|>", text) if TAG in name] == list(
        names[: len(one("spans", name="p").prompt.prompt_ids)]
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chat", CHATS)
def test_a_plain_query_gives_the_tokens_of_training(chat: str, kind: str) -> None:
    """Every place a prompt can be trained at, all in one export."""
    places = [p for p in PLACES if not (chat == "no-system" and p in BY_SYSTEM)]
    prompts = [one(place, chat, kind, place) for place in places]
    base = prompts[0].sequencer.tokenizer
    tokenizer = exported_tokenizer(prompts, base, TAG, "append")
    first = len(base)
    for place, prompt in zip(places, prompts, strict=True):
        names = token_names(TAG, place, len(prompt.prompt.prompt_ids))
        new = tuple(range(first, first + len(names)))
        first += len(names)
        assert tokenizer.convert_ids_to_tokens(list(new)) == list(names)
        for row in prompt.sequences:
            messages = plain_messages(PLACES[place], row.example.columns)
            assert [m["role"] for m in messages] == ["user"]
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False, prompt=place
            )
            assert tuple(ids) == row.context(new)
    check_rendering(prompts, tokenizer, TAG)


@pytest.mark.parametrize(
    ("chat", "place", "kind", "left", "right"),
    [
        ("chatml", "user-before", "bytelevel", "", "\n"),  # of the message
        ("plain", "user-after", "bytelevel", "", "\n"),  # of the model's own template
        ("plain", "opening", "bytelevel", " ", ""),
        ("mistral", "user-before", "metaspace-always", " ", "\n\nReview:"),
        ("plain", "user-after", "metaspace-always", "", "\nASSISTANT:"),
    ],
)
def test_text_that_was_drawn_into_the_span_does_not_stand_beside_its_tokens(
    chat: str, place: str, kind: str, left: str, right: str
) -> None:
    """The law above is about these too: here it is seen that it has something to say of them."""
    prompt = one(place, chat, kind)
    assert (prompt.prompt.span.drawn_left, prompt.prompt.span.drawn_right) == (left, right)
    tokenizer = exported_tokenizer([prompt], prompt.sequencer.tokenizer, TAG, "append")
    text = shown(tokenizer, [user("x")])
    assert text.count("[p]") == 1
    whole = prompt.sequencer.renderer({"review": "x"}).text
    assert text.replace("[p]", prompt.prompt.span.text) == whole


@pytest.mark.parametrize("chat", ["trimming", "plain", "gemma", "mistral"])
@pytest.mark.parametrize("place", ["user-before", "user-after", "opening"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_so_does_any_query(chat: str, place: str, text: str) -> None:
    prompt = one(place, chat, "metaspace")
    tokenizer = _tokenizer(place, chat, "metaspace")
    row = prompt.sequencer(Example({"review": text}, "", "x"))
    new = tokenizer.convert_tokens_to_ids(list(token_names(TAG, "p", len(prompt.rows_PD))))
    ids = tokenizer.apply_chat_template([user(text)], add_generation_prompt=True, return_dict=False)
    assert tuple(ids) == (*row.prefix, *new, *row.suffix)


@functools.cache
def _tokenizer(place: str, chat: str, kind: str) -> Any:
    prompt = one(place, chat, kind)
    return exported_tokenizer([prompt], prompt.sequencer.tokenizer, TAG, "append")


def test_the_query_is_what_stands_between_the_columns() -> None:
    columns = {"review": "dull {x} [[y]]", "label": "Ann"}
    assert query_of(PLACES["two-columns"], columns) == "dull {x} [[y]]\nBy: Ann"
    assert query_of(PLACES["user-after"], columns) == "dull {x} [[y]]"
    assert plain_messages(PLACES["shots"], columns) == [user("dull {x} [[y]]")]
    with refused("no column 'label'", "known: review"):
        query_of(PLACES["two-columns"], {"review": "x"})


@pytest.mark.parametrize(
    "template",
    [
        Template.plain("[[Is it good?]] {a}"),
        Template.chat(user="{a} [[Is it good?]] {b}"),
        Template.chat(system="{a}", user="{b} [[Is it good?]]"),
        Template.chat(system="About {a}.", user="[[Is it good?]]"),
        Template.chat(user="[[Is it good?]]", assistant="{a}"),
        Template.chat(user="[[Is it good?]]"),
    ],
)
def test_what_no_plain_query_can_stand_for_is_refused_in_the_words_of_the_plan(
    template: Template,
) -> None:
    found = exportability(Facts(frozenset({(1,)}), template, "llama", 1.0))
    says = next(f for f in found if f["destination"] == "vocabulary")
    assert not says["possible"]
    with refused(says["remarks"][0]):
        query_of(template, {"a": "x", "b": "y"})


def test_rows_that_training_cut_are_not_asked() -> None:
    short, long = Example({"review": "good"}, "positive", "a:1"), "very dull " * 60
    rows = [short, Example({"review": long}, "positive", "a:2")]
    prompt = exported(PLACES["user-after"], rows=rows, context=100, truncate="review")
    assert prompt.sequencer.truncated == 1
    assert [row.example.source for row in uncut_rows(prompt)] == ["a:1"]
    tokenizer = exported_tokenizer([prompt], prompt.sequencer.tokenizer, TAG, "append")
    check_rendering([prompt], tokenizer, TAG)


# ---------------------------------------------------------------------- what the check catches


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ('"before": "Review: "', '"before": "Review:  "', "before the span"),
        (f"{TAG}_p_1|>", f"{TAG}_p_2|>", "in the span"),
        ("{{- embedgrad.text -}}", "{{- embedgrad.text -}}!", "after the span"),
    ],
)
def test_an_export_that_renders_otherwise_is_refused(old: str, new: str, place: str) -> None:
    prompt = one("user-after")
    tokenizer = exported_tokenizer([prompt], prompt.sequencer.tokenizer, TAG, "append")
    changed = tokenizer.chat_template.replace(old, new)
    assert changed != tokenizer.chat_template
    tokenizer.chat_template = changed
    with refused("reviews.csv:2", "other tokens than training", f"({place})"):
        check_rendering([prompt], tokenizer, TAG)


def test_an_export_that_refuses_a_plain_query_is_refused() -> None:
    prompt = one("user-after")
    tokenizer = exported_tokenizer([prompt], prompt.sequencer.tokenizer, TAG, "append")
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with refused("reviews.csv:2", "refuses a plain user message", "no such role"):
        check_rendering([prompt], tokenizer, TAG)


def test_every_row_is_checked() -> None:
    prompt = one("user-after")
    tokenizer = exported_tokenizer([prompt], prompt.sequencer.tokenizer, TAG, "append")
    last = prompt.sequences[-1]
    wrong = dataclasses.replace(last, suffix=(*last.suffix, 7))
    with refused(last.example.source, "after the span"):
        changed = dataclasses.replace(prompt, sequences=[*prompt.sequences[:-1], wrong])
        check_rendering([changed], tokenizer, TAG)


# ------------------------------------------------------------------------ turns and systems


@pytest.mark.parametrize("chat", [c for c in CHATS if c != "no-system"])
@pytest.mark.parametrize("place", ["system", "user-before", "user-after", "opening"])
def test_in_a_conversation_the_last_user_turn_holds_the_span(chat: str, place: str) -> None:
    """What the model's own template makes of the messages that stand for the prompt."""
    prompt = one(place, chat)
    base, span = prompt.sequencer.tokenizer, prompt.prompt.span
    turns = [user("First?"), assistant("Yes."), user("Second?")]
    texts = {m.role: m.content for m in PLACES[place].messages}
    content = texts["user"].replace("{review}", "Second?")
    own = [system(texts["system"])] if "system" in texts else []
    opening = [assistant(texts["assistant"] + "END")] if "assistant" in texts else []
    expected = base.apply_chat_template(
        [*own, *turns[:2], user(content), *opening],
        chat_template=prompt.sequencer.renderer.chat_template,
        tokenize=False,
        add_generation_prompt=not opening,
    )
    expected = expected.partition("END")[0]
    start = expected.index("[[") - len(span.drawn_left)
    end = expected.index("]]") + 2 + len(span.drawn_right)
    assert expected[start:end].replace("[[", "").replace("]]", "") == span.text
    expected = f"{expected[:start]}[p]{expected[end:]}"
    assert shown(served(("p", place), chat=chat), turns) == expected


def test_tools_and_their_results_may_follow_the_last_user_turn() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"a": 1}}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "1", "content": "rain"}
    text = shown(served(("p", "user-after"), chat="qwen"), [user("Now?"), asked, result])
    assert text == (
        "<|im_start|>user\nReview: Now?\n\n[p]<|im_end|>\n"
        '<|im_start|>assistant\n\nlook {"a": 1}<|im_end|>\n'
        "<|im_start|>tool\nrain<|im_end|>\n<|im_start|>assistant\n"
    )


def test_messages_of_the_template_keep_their_places() -> None:
    turns = [user("A"), assistant("B"), user("C")]
    assert shown(served(("p", "shots"), chat="phi"), turns) == (
        "<|system|>\nYou are brief.<|im_end|>\n"
        "<|user|>\nReview: [[dull]] {x}<|im_end|>\n<|assistant|>\nnegative<|im_end|>\n"
        "<|user|>\nA<|im_end|>\n<|assistant|>\nB<|im_end|>\n"
        "<|user|>\nReview: C\n[p]<|im_end|>\n<|assistant|>\n"
    )
    assert shown(served(("p", "following"), chat="phi"), turns) == (
        "<|user|>\nA<|im_end|>\n<|assistant|>\nB<|im_end|>\n"
        "<|user|>\nReview: C<|im_end|>\n<|assistant|>\nI have read it.<|im_end|>\n"
        "<|user|>\n[p]<|im_end|>\n<|assistant|>\n"
    )


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_of_the_client_follows_the_prompts_own(role: str) -> None:
    tokenizer = served(("p", "system"), chat="phi")
    assert shown(tokenizer, [system("Be kind.", role), user("Hi")]) == (
        "<|system|>\nYou are brief. [p] One word.\n\nBe kind.<|im_end|>\n"
        "<|user|>\nReview: Hi<|im_end|>\n<|assistant|>\n"
    )
    assert "One word.<|im_end|>" in shown(tokenizer, [system("", role), user("Hi")])
    without = served(("p", "user-after"), chat="phi")
    text = shown(without, [system("Be kind.", role), user("Hi")])
    assert text.startswith(f"<|{role}|>\nBe kind.<|im_end|>\n<|user|>\nReview: Hi")


@pytest.mark.parametrize("place", ["system", "user-after"])
def test_it_is_refused_where_the_recipe_says_so(place: str) -> None:
    tokenizer = served(("p", place), chat="phi", system="refuse")
    assert "[p]" in shown(tokenizer, [user("Hi")])
    assert "[p]" in shown(tokenizer, [system("<<prompt:p>>"), user("Hi")])
    for role, text in (("system", "Be kind."), ("developer", "x"), ("system", "<<prompt:p>> x")):
        with pytest.raises(jinja2.TemplateError, match="takes no system message"):
            shown(tokenizer, [system(text, role), user("Hi")])


def test_a_request_without_a_user_message_is_refused() -> None:
    with pytest.raises(jinja2.TemplateError, match="answers a user message; send one"):
        shown(served(("p", "user-after")), [system("x")])
    assert "[p]" in shown(served(("p", "system")), [system("x")])


def test_the_opening_stands_only_where_an_answer_is_to_come() -> None:
    tokenizer = served(("p", "opening"))
    assert shown(tokenizer, [user("Hi")]).endswith("<|im_start|>assistant\n[p] so:")
    whole = [user("Hi"), assistant("Well")]
    text = shown(tokenizer, whole, add_generation_prompt=False)
    assert text.endswith("assistant\nWell<|im_end|>\n")
    going_on = shown(tokenizer, whole, add_generation_prompt=False, continue_final_message=True)
    assert going_on.endswith("assistant\nWell")


def test_a_chat_template_that_looks_ahead_sees_the_opening_as_in_training() -> None:
    chat = "{{ '>' if add_generation_prompt else '=' }}"
    chat += "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    base = tiny.with_template(tiny.tokenizer("bytelevel"), chat)
    prompt = on_its_way(PLACES["opening"], base)
    tokenizer = exported_tokenizer([prompt], base, TAG, "append")
    check_rendering([prompt], tokenizer, TAG)
    assert shown(tokenizer, [user("Hi")]).startswith("=<user>")


# -------------------------------------------------------------------------- several prompts


def test_a_request_names_its_prompt() -> None:
    tokenizer = served(("a", "user-after"), ("b-2", "system"), ("c", "opening"), chat="phi")
    suffixes = {
        "a": "Review: Hi\n\n[a]<|im_end|>\n<|assistant|>\n",
        "b-2": "brief. [b-2] One word.<|im_end|>\n<|user|>\nReview: Hi<|im_end|>\n<|assistant|>\n",
        "c": "Review: Hi<|im_end|>\n<|assistant|>\n[c] so:",
    }
    assert shown(tokenizer, [user("Hi")]).endswith(suffixes["a"])
    for name, suffix in suffixes.items():
        assert shown(tokenizer, [user("Hi")], prompt=name).endswith(suffix)
        marked = [system(f" <<prompt:{name}>>\n"), user("Hi")]
        assert shown(tokenizer, marked) == shown(tokenizer, [user("Hi")], prompt=name)
        # The variable counts more, and the marker goes all the same.
        assert shown(tokenizer, marked, prompt="a") == shown(tokenizer, [user("Hi")])
    kind = shown(tokenizer, [system("Be kind.<<prompt:b-2>> Ever."), user("Hi")])
    assert "[b-2] One word.\n\nBe kind. Ever.<|im_end|>" in kind
    for empty in (None, ""):
        assert shown(tokenizer, [user("Hi")], prompt=empty).endswith(suffixes["a"])


def test_ids_of_several_prompts_follow_each_other() -> None:
    prompts = [one("user-after", name="a"), one("system", name="b")]
    base = prompts[0].sequencer.tokenizer
    tokenizer = exported_tokenizer(prompts, base, TAG, "append")
    a, b = (list(token_names(TAG, p.name, len(p.rows_PD))) for p in prompts)
    new = tokenizer.convert_tokens_to_ids(a + b)
    assert new == list(range(len(base), len(base) + len(a) + len(b)))
    assert len(tokenizer) == new[-1] + 1
    check_rendering(prompts, tokenizer, TAG)
    with refused("two prompts have the same name"):
        exported_template([prompts[0], prompts[0]], TAG, "append")


@pytest.mark.parametrize(
    ("content", "asked", "match"),
    [
        ("x", {"prompt": "d"}, "no prompt is called 'd'; known: a, b"),
        ("<<prompt:d>>", {}, "no prompt is called 'd'; known: a, b"),
        ("<<prompt:>>", {}, "no prompt is called ''; known: a, b"),
        ("<<prompt:a", {}, "expected one <<prompt:NAME>>"),
        ("<<prompt:a>><<prompt:b>>", {}, "expected one <<prompt:NAME>>"),
    ],
)
def test_an_unknown_prompt_is_refused(content: str, asked: dict[str, str], match: str) -> None:
    tokenizer = served(("a", "user-after"), ("b", "system"), chat="phi")
    with pytest.raises(jinja2.TemplateError, match=match):
        shown(tokenizer, [system(content), user("Hi")], **asked)


def test_only_a_system_message_names_a_prompt() -> None:
    tokenizer = served(("a", "user-after"), ("b", "system"), chat="phi")
    text = shown(tokenizer, [user("<<prompt:b>>"), assistant("<<prompt:b>>"), user("Hi")])
    assert text.count("<<prompt:b>>") == 2
    assert "[a]" in text
    assert "[b]" not in text


def test_prompts_of_two_days_show_their_own() -> None:
    later = datetime.date(2025, 1, 2)
    prompts = [
        exported(PLACES["user-after"], "dated", name="a"),
        exported(PLACES["user-after"], "dated", name="b", date=later),
    ]
    tokenizer = exported_tokenizer(prompts, prompts[0].sequencer.tokenizer, TAG, "append")
    assert "Today is 12 Mar 2024." in shown(tokenizer, [user("Hi")])
    assert "Today is 02 Jan 2025." in shown(tokenizer, [user("Hi")], prompt="b")
    check_rendering(prompts, tokenizer, TAG)


def test_an_engine_without_a_clock_shows_the_day_of_training() -> None:
    tokenizer = served(("p", "user-after"), chat="llama")
    assert "strftime_now" not in tokenizer.chat_template
    # llama.cpp sets the variable to its own day.
    for asked in ({}, {"date_string": "01 Jan 2030"}):
        assert "Today Date: 12 Mar 2024" in shown(tokenizer, [user("Hi")], **asked)


def test_a_date_that_the_template_sets_is_kept() -> None:
    own = Template.chat(user="{review} [[Is it good?]]", options={"date_string": "Monday"})
    prompt = exported(own, "llama")
    tokenizer = exported_tokenizer([prompt], prompt.sequencer.tokenizer, TAG, "append")
    check_rendering([prompt], tokenizer, TAG)
    assert "Today Date: Monday" in shown(tokenizer, [user("Hi")])


def test_options_of_training_are_set_whatever_a_request_says() -> None:
    """llama.cpp sets `enable_thinking` in every request, so that a default would do nothing."""
    quick = Template.chat(user="{review} [[Is it good?]]", options={"enable_thinking": False})
    free = Template.chat(user="{review} [[Is it good?]]")
    prompts = [exported(quick, "qwen", name="a"), exported(free, "qwen", name="b")]
    tokenizer = exported_tokenizer(prompts, prompts[0].sequencer.tokenizer, TAG, "append")
    check_rendering(prompts, tokenizer, TAG)
    for asked in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        assert shown(tokenizer, [user("Hi")], **asked).endswith(
            "assistant\n<think>\n\n</think>\n\n"
        )
    thinks = {True: "assistant\n", False: "assistant\n<think>\n\n</think>\n\n"}
    for value, end in thinks.items():
        text = shown(tokenizer, [user("Hi")], prompt="b", enable_thinking=value)
        assert text.endswith(end)


# -------------------------------------------------------------------------------- smuggling

NAMES = token_names(TAG, "p", 2)
HOSTILE = (
    NAMES[0],
    "".join(NAMES),
    f"<|{TAG}_p_0|>" * 3,
    TAG,
    f"X{TAG}0Z",  # the mark in the span's place
    f"Z{TAG}X",
    TAG[:6] + TAG + TAG[6:],
    f"<|{TAG[:6]}<|{TAG}_p_0|>{TAG[6:]}_p_0|>",
    f"<|{TAG[:6]}\n{TAG[6:]}_p_0|>",
    f"X{TAG[:-1]}",
)
PIECES = st.lists(
    st.sampled_from([*HOSTILE, *TAG, TAG[:5], TAG[5:], "<|", "_p_0|>", "X", "Z", " ", "\n", "a"]),
    max_size=8,
).map("".join)


def new_ids(tokenizer: Any, messages: Sequence[dict[str, Any]], **asked: Any) -> list[int]:
    """Ids of refined tokens that a request comes to hold."""
    ids = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_dict=False, **asked
    )
    first = tokenizer.convert_tokens_to_ids(NAMES[0])
    return [i for i in ids if i >= first]


def in_order(tokenizer: Any) -> list[int]:
    return list(range(tokenizer.convert_tokens_to_ids(NAMES[0]), len(tokenizer)))


@pytest.mark.parametrize("chat", ["chatml", "trimming", "gemma", "mistral", "phi", "plain"])
@pytest.mark.parametrize("place", ["system", "user-before", "user-after", "opening"])
@settings(max_examples=30)
@given(st.data())
def test_no_text_of_a_user_becomes_a_refined_token(
    chat: str, place: str, data: st.DataObject
) -> None:
    def content() -> Any:
        text = data.draw(PIECES)
        cut = data.draw(st.integers(0, len(text)))
        parts = [{"type": "text", "text": text[:cut]}, {"type": "text", "text": text[cut:]}]
        return parts if data.draw(st.booleans()) else text

    tokenizer = served(("p", place), chat=chat)
    turns = [user(content()), assistant(content()), user(content())]
    first = [system(content())] if data.draw(st.booleans()) else []
    assert new_ids(tokenizer, [*first, *turns]) == in_order(tokenizer)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("place", ["system", "user-before", "user-after", "opening"])
def test_such_text_leaves_the_prompt_in_its_place(place: str, text: str) -> None:
    """It reads as if the tag were a space, in every message's content."""
    tokenizer = served(("p", place), chat="phi")
    harmless = text.replace(TAG, " ")
    for make in (lambda t: t, lambda t: [{"type": "text", "text": t}]):
        hostile = [system(make(text)), user(make(text)), assistant(make(text)), user(make(text))]
        clean = [
            system(harmless), user(harmless), assistant(harmless), user(harmless)
        ]  # fmt: skip
        assert shown(tokenizer, hostile) == shown(tokenizer, clean)
        result = [user("x"), {"role": "tool", "tool_call_id": "1", "content": make(text)}]
        expected = [user("x"), {"role": "tool", "tool_call_id": "1", "content": harmless}]
        assert shown(tokenizer, result) == shown(tokenizer, expected)


def test_a_marker_that_is_taken_away_does_not_join_what_it_parted() -> None:
    tokenizer = served(("p", "user-after"), chat="phi")
    half = f"<|{TAG[:6]}<<prompt:p>>{TAG[6:]}_p_0|>"
    text = shown(tokenizer, [system(half), user("Hi")])
    assert text.startswith("<|system|>\n<| _p_0|><|im_end|>\n")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chat", ["phi", "llama", "qwen"])
def test_other_fields_that_hold_a_refined_token_are_refused(chat: str, name: str) -> None:
    tokenizer = served(("p", "user-after"), chat=chat)
    tool = {"type": "function", "function": {"name": "f", "description": name, "parameters": {}}}
    call = {"type": "function", "function": {"name": name, "arguments": {"a": name}}}
    role = name[2:-2]  # as Phi writes a role: <|role|>
    requests: dict[str, Any] = {
        "role": ([{"role": role, "content": "x"}, user("Hi")], {}),
        "tools": ([user("Hi")], {"tools": [tool]}),
        "tool_calls": ([user("Hi"), {**assistant("x"), "tool_calls": [call]}], {}),
    }
    shows = {"phi": ["role"], "llama": ["role", "tools"], "qwen": ["role", "tools", "tool_calls"]}
    for field, (messages, asked) in requests.items():
        if field in shows[chat]:
            with pytest.raises(jinja2.TemplateError, match="belongs to refined tokens"):
                shown(tokenizer, messages, **asked)
        else:  # the model's template does not show the field at all
            assert new_ids(tokenizer, messages, **asked) == in_order(tokenizer)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ("replace('K', 'k')", f"<|{TAG.replace('k', 'K')}_p_0|>"),
        ("replace('~', '')", f"<|{TAG[:3]}~{TAG[3:]}_p_0|>"),
    ],
)
def test_text_that_the_models_own_template_makes_a_refined_token_is_refused(
    changed: str, text: str
) -> None:
    chat = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        "{% else %}{{ '<' + m.role + '>' + m.content | " + changed + " }}{% endif %}{% endfor %}"
    )
    base = tiny.with_template(tiny.tokenizer("bytelevel"), chat)
    template = Template.chat(system="[[Is it good?]]", user="{review}")
    prompt = on_its_way(template, base)
    tokenizer = exported_tokenizer([prompt], base, TAG, "append")
    assert shown(tokenizer, [user("hi")]) == "[p]<user>hi"
    with pytest.raises(jinja2.TemplateError, match="belongs to refined tokens"):
        shown(tokenizer, [user(text)])


@pytest.mark.parametrize(("times", "tools"), [(0, []), (2, [1, 2])])
def test_a_request_for_which_the_chat_template_repeats_or_drops_the_prompt_is_refused(
    times: int, tools: list[int]
) -> None:
    chat = "{% for tool in tools or ([] if tools is defined and tools is not none else [1]) %}"
    base = tiny.with_template(
        tiny.tokenizer("bytelevel"), chat + "{{ messages[-1].content }}{% endfor %}"
    )
    prompt = on_its_way(Template.chat(user="{review} [[Is it good?]]"), base)
    tokenizer = exported_tokenizer([prompt], base, TAG, "append")
    assert shown(tokenizer, [user("Hi")]) == "Hi [p]"
    described = [{"type": "function", "function": {"name": str(n)}} for n in tools]
    with pytest.raises(jinja2.TemplateError, match=f"shows the prompt {times} times"):
        shown(tokenizer, [user("Hi")], tools=described)


# ------------------------------------------------------------------------- content in parts


def test_parts_of_text_are_joined_by_lines() -> None:
    tokenizer = served(("p", "user-after"), chat="chatml")
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    turns = [user(parts), assistant(parts), user(parts)]
    plain = [user("Hi\nthere"), assistant("Hi\nthere"), user("Hi\nthere")]
    assert shown(tokenizer, turns) == shown(tokenizer, plain)
    assert shown(tokenizer, [system(parts), user("x")]) == shown(
        tokenizer, [system("Hi\nthere"), user("x")]
    )
    with pytest.raises(jinja2.TemplateError, match="takes text only"):
        shown(tokenizer, [user([{"type": "image_url", "image_url": {"url": "x"}}])])


def test_a_message_that_stays_as_it_is_keeps_its_other_fields() -> None:
    chat = "{% for m in messages %}{{ m.role }} {{ m.name }}: {{ m.content }};{% endfor %}"
    base = tiny.with_template(tiny.tokenizer("bytelevel"), chat)
    prompt = on_its_way(PLACES["user-after"], base)
    tokenizer = exported_tokenizer([prompt], base, TAG, "append")
    turns: list[dict[str, Any]] = [
        {**user("A"), "name": "ann"},
        {**assistant([{"type": "text", "text": "B"}]), "name": "bot"},
        {**user("C"), "name": "cy"},
    ]
    assert shown(tokenizer, turns) == "user ann: A;assistant bot: B;user cy: Review: C\n\n[p];"


# --------------------------------------------------------------------- the pieces it is made of


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
@example({"a": "\\n \"'\n\r\n\t{{ %} #} {% raw %} \U0001f600 \u2028\\"})
def test_a_value_written_as_jinja_is_that_value(value: Any) -> None:
    found: list[Any] = []
    compiled = _compile_jinja_template(f"{{%- set x = {to_jinja(value)} -%}}{{{{ keep(x) }}}}")
    compiled.render(keep=found.append)
    assert found == [value]


def test_vllm_passes_on_the_variables_that_a_template_names() -> None:
    """It drops what `find_undeclared_variables` does not list."""
    text = served(("p", "user-after")).chat_template
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    names = jinja2.meta.find_undeclared_variables(environment.parse(text))
    assert {"messages", "prompt", "add_generation_prompt"} <= names


def test_vllm_and_sglang_take_contents_as_the_models_own_template_does() -> None:
    """They pass lists of parts where a loop over a message's content stands in the template."""

    def loops(text: str) -> list[str]:
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
        found = environment.parse(text).find_all(jinja2.nodes.For)
        over = [loop.iter for loop in found]
        names = [n for n in over if isinstance(n, jinja2.nodes.Getattr | jinja2.nodes.Getitem)]
        return [n.node.name for n in names if isinstance(n.node, jinja2.nodes.Name)]

    assert "message" in loops(CHATS["gemma"])
    assert "message" in loops(served(("p", "user-after"), chat="gemma").chat_template)
    assert "message" not in loops(served(("p", "user-after"), chat="phi").chat_template)


def test_new_tokens_are_special_and_not_normalized() -> None:
    tokenizer = served(("p", "user-after"))
    first = tokenizer.convert_tokens_to_ids(NAMES[0])
    token = tokenizer.added_tokens_decoder[first]
    assert token.special
    assert not token.normalized
    assert tokenizer.decode([first, *tokenizer("a")["input_ids"]], skip_special_tokens=True) == "a"


def test_a_tokenizer_that_has_such_tokens_already_refuses_them() -> None:
    prompt = one("user-after")
    tokenizer = exported_tokenizer([prompt], prompt.sequencer.tokenizer, TAG, "append")
    with refused("refuses new tokens", "0 of ", "--to vllm"):
        exported_tokenizer([prompt], tokenizer, TAG, "append")


def test_tags_and_names() -> None:
    tags = [new_tag() for _ in range(50)]
    assert len(set(tags)) == 50
    assert all(re.fullmatch("[a-z0-9]{12}", tag) for tag in tags)
    assert token_names(TAG, "a-B_1", 2) == (f"<|{TAG}_a-B_1_0|>", f"<|{TAG}_a-B_1_1|>")
    for bad in ("", "a b", "a>>", "ä", "x" * 65):
        with refused(repr(bad), "letters, digits, '-' and '_'"):
            token_names(TAG, bad, 1)


@pytest.mark.parametrize("broken_by", ["\r\n", "\r"])
def test_line_breaks_of_other_systems_are_those_that_jinja_reads(broken_by: str) -> None:
    chat = LLAMA.replace("\n", broken_by)
    prompt = on_its_way(PLACES["user-after"], tiny.with_template(tiny.tokenizer("metaspace"), chat))
    tokenizer = exported_tokenizer([prompt], prompt.sequencer.tokenizer, TAG, "append")
    assert "\r" not in tokenizer.chat_template.replace(r"\r", "")
    check_rendering([prompt], tokenizer, TAG)


# ------------------------------------------------------------------------------- llama.cpp


def test_a_token_that_the_tokenizer_lacks_is_not_made_up_by_llama_cpp(tmp_path: Path) -> None:
    assert one("user-after", "llama").sequencer.tokenizer.bos_token is None
    tokenizer = served(("a", "user-after"), chat="llama")
    model = tmp_path / "model.gguf"  # without a first token, and llama.cpp then takes id 11
    write_gguf(model, **{"tokenizer.chat_template": tokenizer.chat_template})
    messages = [user("Hi")]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    with LlamaCppServer(model) as engine:
        assert engine.ask("/apply-template", {"messages": messages}) == {"prompt": expected}


@pytest.mark.parametrize("chat", [c for c in CHATS if c != "no-system"])
def test_llama_cpp_renders_the_same(chat: str, tmp_path: Path) -> None:
    """Its own Jinja in its own server, against that of `transformers`."""
    prompts = (("a", "user-after"), ("b-2", "system"), ("c", "opening"))
    prompts += (("s", "spans"), ("o", "spans-opening"))
    tokenizer = served(*prompts, chat=chat)
    hostile = [user(f"x{''.join(NAMES)}y"), assistant(TAG), user(f"X{TAG}Z")]
    requests: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
        ([user("Hi \U0001f600 \\n {{ x }} {% if %}")], {}),
        ([system("Be kind."), user("A"), assistant("B"), user("C")], {}),
        ([system("Be kind."), user("A")], {"prompt": "b-2"}),
        ([system("<<prompt:b-2>>"), user("Hi")], {}),
        ([user("A"), assistant("B"), user("C")], {"prompt": "c"}),
        ([system("Be kind."), user("A"), assistant("B"), user("C")], {"prompt": "s"}),
        ([user("A"), assistant("B"), user("C")], {"prompt": "o"}),
        *((hostile, {"prompt": name}) for name in ("a", "b-2", "c", "s", "o")),
    ]
    model, marks = tmp_path / "model.gguf", {"bos_token": "<|end|>", "eos_token": "<|end|>"}
    changes = {"tokenizer.chat_template": tokenizer.chat_template}
    write_gguf(model, **changes, **{"tokenizer.ggml.bos_token_id": 0})
    with LlamaCppServer(model) as engine:
        for messages, asked in requests:
            expected = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **marks, **asked
            )
            in_parts = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages
            ]
            for sent in (messages, in_parts):
                body = {"messages": sent, "chat_template_kwargs": asked}
                assert engine.ask("/apply-template", body) == {"prompt": expected}
        with pytest.raises(EngineError, match="refused /apply-template"):
            engine.ask("/apply-template", {"messages": [system("<<prompt:d>>"), user("Hi")]})
