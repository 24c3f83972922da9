"""A model's own chat template: chosen by name, its date frozen."""

from __future__ import annotations

import datetime
import inspect
import json
import re
from collections.abc import Mapping
from typing import Any

from embedgrad.errors import TemplateError, nearest
from embedgrad.prompt.chat_rendering import render, variables_of

NAME = "chat_template"  # the option that chooses one of several

_DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])(.{0,200}?)\1\s*\)""")
_DATE_KNOWN = re.compile(r"\bstrftime_now\s+is\s+defined\b")
_DATE_SET = re.compile(r"""\bset\s+(\w+)\s*=\s*strftime_now\(\s*(["'])(.{0,200}?)\2\s*\)""")

# Gives texts to a template that only takes lists of parts, as those of vision models do.
_AS_PARTS = (
    "{%- set parts = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- set parts.messages = parts.messages + [{'role': message.role, 'content': "
    "[{'type': 'text', 'text': message.content}]} if message.content is string else message] -%}"
    "{%- endfor -%}{%- set messages = parts.messages -%}\n"
)
_PROBE = "Xembedgrad7probeX"
_OF_TRANSFORMERS = {"messages", "add_generation_prompt", "tools", "documents", "strftime_now"}


def choose_chat_template(tokenizer: Any, options: Mapping[str, Any]) -> str:
    """The chat template that a prompt's options name, else the model's only or default one.

    Raises `TemplateError`, also for an option that the chat template never mentions.
    """
    held = getattr(tokenizer, "chat_template", None)
    if not held:
        raise TemplateError(
            "template: this model has no chat template; give the prompt as plain text "
            "([template] text = ..., or --plain)"
        )
    named = held if isinstance(held, dict) else {"default": held}
    name = options.get(NAME, "default")
    if name not in named:
        what = f"this model has no chat template {name!r}"
        if NAME not in options:
            what = "this model has several chat templates and no default"
        raise TemplateError(
            f"template: {what}; choose one with template.options.{NAME}: {', '.join(sorted(named))}"
        )
    source = str(named[name])
    reserved = inspect.signature(tokenizer.apply_chat_template).parameters
    for option in options.keys() - {NAME}:
        if option in reserved or option == "strftime_now":
            raise TemplateError(
                f"template.options.{option}: is set by embedgrad; name variables of the model's "
                "own chat template only"
            )
        if option not in (known := _variables(source, tokenizer)):
            raise TemplateError(
                f"template.options.{option}: the model's chat template has no such variable; "
                f"{nearest(option, known)}"
            )
    return source


def freeze_chat_template(
    tokenizer: Any, own: str, options: Mapping[str, Any], date: datetime.date
) -> str:
    """The chat template with a date written into it, and in front of it what gives it our texts.

    It has no other clock: engines without one, or that set the date themselves, take the same path.
    Raises `TemplateError`.
    """

    def freeze_date(call: re.Match[str]) -> str:
        return json.dumps(date.strftime(call[2]))

    chat_template = _DATE_KNOWN.sub("true", _DATE_CALL.sub(freeze_date, own))
    if "strftime_now(" in chat_template:
        raise TemplateError(
            "template: the model's chat template asks for today's date in a way that cannot be "
            "frozen; give the prompt as plain text ([template] text = ...)"
        )
    # llama.cpp sets Llama's `date_string` to today, and the template would take that.
    for name, day in {found[1]: found[3] for found in _DATE_SET.finditer(own)}.items():
        asks = re.search(rf"\b{name}\s+is\s+(not\s+)?(un)?defined\b", own)
        if asks and name not in options:
            chat_template = (
                f"{{% set {name} = {json.dumps(date.strftime(day))} %}}\n{chat_template}"
            )
    parts = [{"type": "text", "text": _PROBE}]
    takes_texts = _shows(tokenizer, chat_template, options, _PROBE)
    if not takes_texts and _shows(tokenizer, chat_template, options, parts):
        return _AS_PARTS + chat_template
    return chat_template


def _shows(tokenizer: Any, chat_template: str, options: Mapping[str, Any], content: Any) -> bool:
    """Whether a user message with this content is in the rendered text."""
    variables = {name: value for name, value in options.items() if name != NAME}
    messages = [{"role": "user", "content": content}]
    try:
        return _PROBE in render(tokenizer, messages, chat_template, **variables)
    except TemplateError:
        return False


def _variables(source: str, tokenizer: Any) -> set[str]:
    """What a chat template reads and does not set itself."""
    names = variables_of(tokenizer, source) - set(tokenizer.special_tokens_map)
    return names - _OF_TRANSFORMERS - {"raise_exception"}
