"""Prompt templates with `{columns}` and `[[spans to refine]]`.

A span may be in any message. A last assistant message is the opening of the model's answer.
"""

from __future__ import annotations

import datetime
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, TypeVar, final

from embedgrad.data.markup import Piece, parse
from embedgrad.data.table import quote
from embedgrad.errors import TemplateError, nearest
from embedgrad.prompt.chat_rendering import render
from embedgrad.prompt.chat_template import NAME, choose_chat_template, freeze_chat_template

T = TypeVar("T")

ROLES = ("system", "user", "assistant")

# Plain letters and digits, because chat templates trim, and some would escape anything rarer.
SPAN_MARK = "Xembedgrad7span7markX"  # with a number behind it: see `span_mark`
END_MARK = "Xembedgrad7end7markX"


@final
@dataclass(frozen=True, slots=True)
class Message:
    """A chat message before its columns are filled in."""

    role: str
    content: str


@final
@dataclass(frozen=True, slots=True)
class Rendered:
    """A filled template.

    `pieces` alternate between text and span: what comes before the first span, the first span, what
    comes between it and the second, and so on; they begin and end with a text, which may be empty.
    """

    pieces: tuple[str, ...]

    @property
    def text(self) -> str:
        """The whole text, as a model without refined rows gets it."""
        return "".join(self.pieces)

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts around the spans, one more than there are spans."""
        return self.pieces[::2]

    def draw_in(self, number: int, left: int, right: int) -> Rendered:
        """The same text with characters on either side drawn into a span (0: the first)."""
        at = 2 * number
        before, span, after = self.pieces[at : at + 3]
        edge = len(before) - left
        drawn = (before[:edge], before[edge:] + span + after[:right], after[right:])
        return Rendered((*self.pieces[:at], *drawn, *self.pieces[at + 3 :]))


@final
@dataclass(frozen=True)
class Template:
    """Chat messages or plain text with `{columns}` and one or several `[[spans]]`.

    Build it with `Template.chat` or `Template.plain`. Raises `TemplateError` for a template without
    a span, an unclosed bracket or brace, a column inside a span, or an unknown role.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Extra variables for the model's chat template, such as `enable_thinking = false`.

    `chat_template` names the one to use where the model has several."""
    frozen: bool = False
    """Whether nothing of it is refined, as of a teacher's: it then needs no span."""

    def __post_init__(self) -> None:
        if (self.text is None) == (not self.messages):
            raise TemplateError("template: give either chat messages or one plain text")
        for message in self.messages:
            if message.role not in ROLES:
                raise TemplateError(
                    f"template: unknown role {message.role!r}; {nearest(message.role, ROLES)}"
                )
        if self.messages and self.messages[-1].role == "system":
            raise TemplateError(
                "template: the last message is a system message; add a user message, "
                "or an assistant message that opens the answer"
            )
        if not (self.spans or self.frozen):
            raise TemplateError("template: no span; mark some text as [[the words to refine]]")

    @classmethod
    def chat(
        cls,
        *,
        user: str | None = None,
        system: str | None = None,
        assistant: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Template:
        """One system, one user and one opening assistant message, each of them optional."""
        texts = {"system": system, "user": user, "assistant": assistant}
        return cls(by_role(texts), options=dict(options or {}))

    @classmethod
    def plain(cls, text: str) -> Template:
        """Text for a model without a chat template; the answer follows its end."""
        return cls(text=text)

    @property
    def spans(self) -> tuple[str, ...]:
        """The words whose rows are refined, span by span."""
        return tuple(piece.text for piece in self._pieces() if piece.kind == "span")

    @property
    def span(self) -> str:
        """The words of the only span. Raises `TemplateError` where there are several."""
        return only(self.spans)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns it needs, in order of appearance."""
        names = (piece.text for piece in self._pieces() if piece.kind == "column")
        return tuple(dict.fromkeys(names))

    def as_dict(self) -> dict[str, Any]:
        """What `Template.from_dict` takes: plain JSON values."""
        if self.text is not None:
            return {"text": self.text}
        messages = [{"role": m.role, "content": m.content} for m in self.messages]
        return {"messages": messages, "options": dict(self.options)}

    @property
    def variables(self) -> dict[str, Any]:
        """The options that are variables of the chat template, and not its name."""
        return {name: value for name, value in self.options.items() if name != NAME}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Template:
        """The template that `as_dict` wrote."""
        if "text" in values:
            return cls.plain(values["text"])
        messages = tuple(Message(m["role"], m["content"]) for m in values["messages"])
        return cls(messages=messages, options=dict(values.get("options", {})))

    def _pieces(self) -> Iterator[Piece]:
        if self.text is not None:
            yield from parse(self.text, "template.text")
        for message in self.messages:
            yield from parse(message.content, f"template.{message.role}")


@final
class Renderer:
    """Fills a template for one model, through the model's own chat template.

    A chat template that asks for today's date gets `date`, so that a prompt trained today is the
    same prompt tomorrow. Raises `TemplateError` where the chat template is missing, refuses a role,
    or changes the text around a span (it trims or reorders), so that the span would not be where it
    was trained.
    """

    def __init__(self, template: Template, tokenizer: Any, *, date: datetime.date):
        self.template = template
        self.date = date
        self._tokenizer = tokenizer
        if template.messages:
            self._own = choose_chat_template(tokenizer, template.options)

    def __call__(self, columns: Mapping[str, str]) -> Rendered:
        """Fill in the columns of one row."""
        spans = self.template.spans
        marks = [span_mark(number) for number in range(len(spans))]
        rest = marked = self._render(columns, marks)
        pieces: list[str] = []
        for mark, span in zip(marks, spans, strict=True):
            if (count := marked.count(mark)) != 1:
                if not count and mark.casefold() in marked.casefold():
                    raise TemplateError(
                        "template: the chat template changes upper and lower case in the text of a "
                        "message that holds a span, so no words come out as they are written; use "
                        "another chat template, or `text` instead of messages"
                    )
                raise TemplateError(
                    f"template: the chat template shows the span {span!r} {count} times instead of "
                    "once; put the span into another message"
                )
            before, found, rest = rest.partition(mark)
            if not found:
                raise TemplateError(
                    f"template: the chat template moves the span {span!r} before the one that the "
                    "template has first; write the spans in the order in which it shows them"
                )
            pieces += [before, span]
        rendered = Rendered((*pieces, rest))
        if self._render(columns, spans) != rendered.text:
            raise TemplateError(
                "template: the chat template changes the text of a message that holds a span "
                "(it trims or rewrites it); remove white space at the message's ends, "
                "or put the span into another message"
            )
        self._check_whole(self._messages(columns, iter(spans)), rendered.text)
        return rendered

    def _check_whole(self, messages: Sequence[Mapping[str, str]], text: str) -> None:
        """Refuse a chat template that leaves out what was written, as of a thought.

        White space between words may change. Every message needs a place of its own, so that a
        short one is not taken for part of another.
        """
        for message in sorted(messages, key=lambda message: -len(message["content"])):
            content = message["content"].strip()
            place = _find(content, text)
            if place is None:
                lines = content.splitlines()
                lost = next((line for line in lines if _find(line, text) is None), lines[0])
                raise TemplateError(
                    f"template: the chat template drops or changes {quote(lost.strip())} in the "
                    f"{message['role']} message; leave it out, or move it to another message"
                )
            text = f"{text[: place.start]}\n{text[place.stop :]}"

    def after_answer(self) -> str:
        """What the chat template puts behind an answer, as `<|im_end|>`; "" for plain text."""
        if self.template.text is not None:
            return ""
        messages = self._messages(dict.fromkeys(self.template.columns, "x"), repeat("x"))
        if messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        messages[-1]["content"] = f"x{END_MARK}"
        return self._apply(messages, generation=False).partition(END_MARK)[2]

    @functools.cached_property
    def chat_template(self) -> str:
        """The model's own chat template with the date written into it. Raises `TemplateError`."""
        return freeze_chat_template(self._tokenizer, self._own, self.template.options, self.date)

    def _render(self, columns: Mapping[str, str], spans: Sequence[str]) -> str:
        if self.template.text is not None:
            return _fill(parse(self.template.text, "template.text"), columns, iter(spans))
        messages = self._messages(columns, iter(spans))
        if messages[-1]["role"] != "assistant":
            return self._apply(messages, generation=True)
        # The opening of the answer ends at the mark; the template may add more.
        messages[-1]["content"] += END_MARK
        text, mark, _ = self._apply(messages, generation=False).partition(END_MARK)
        if not mark:
            raise TemplateError(
                "template: the chat template drops an assistant message at the end; "
                "remove template.assistant"
            )
        return text

    def _messages(self, columns: Mapping[str, str], spans: Iterator[str]) -> list[dict[str, str]]:
        return [
            {
                "role": m.role,
                "content": _fill(parse(m.content, f"template.{m.role}"), columns, spans),
            }
            for m in self.template.messages
        ]

    def _apply(self, messages: list[dict[str, str]], *, generation: bool) -> str:
        return render(
            self._tokenizer,
            messages,
            self.chat_template,
            generation=generation,
            **self.template.variables,
        )


def _find(written: str, text: str) -> slice | None:
    """Where a text stands in another, but for the amount of white space between its words."""
    if (start := text.find(written)) >= 0:
        return slice(start, start + len(written))
    found = re.search(r"\s+".join(map(re.escape, written.split())), text)
    return slice(*found.span()) if found else None


def by_role(texts: Mapping[str, str | None]) -> tuple[Message, ...]:
    """Messages of a text for each role, in the order of a chat; None: there is none."""
    return tuple(Message(role, text) for role in ROLES if (text := texts.get(role)) is not None)


def span_mark(number: int) -> str:
    """What takes a span's place while a template is rendered (0: the first span)."""
    return f"{SPAN_MARK}{number}X"


def only(spans: Sequence[T]) -> T:
    """The only one. Raises `TemplateError` where a template has several spans."""
    if len(spans) != 1:
        raise TemplateError(
            f"template: {len(spans)} spans, but this works with one [[span]] only; "
            "join them, or leave the others out"
        )
    return spans[0]


def _fill(pieces: tuple[Piece, ...], columns: Mapping[str, str], spans: Iterator[str]) -> str:
    parts: list[str] = []
    for piece in pieces:
        if piece.kind == "text":
            parts.append(piece.text)
        elif piece.kind == "span":
            parts.append(next(spans))
        else:
            value = columns.get(piece.text)
            if value is None:
                raise TemplateError(
                    f"template: unknown column {{{piece.text}}}; {nearest(piece.text, columns)}"
                )
            if SPAN_MARK in value or END_MARK in value:
                raise TemplateError(
                    f"template: the text of column {piece.text!r} contains embedgrad's own mark"
                )
            parts.append(value)
    return "".join(parts)
