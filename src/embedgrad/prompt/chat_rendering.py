"""Render chat templates, programs from elsewhere, within limits.

A template that loops or grows would run in this process for ever. So each text is made in a child
process (`sandbox.py`), within `SECONDS` and `MEMORY`; it may add `LONGEST` characters to
what it is given.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from embedgrad.errors import TemplateError
from embedgrad.prompt.sandbox import SandboxError, call

SECONDS = 5.0
LONGEST = 2**20  # characters: of a template, and what one may add to its messages
_CHILD = "embedgrad.prompt.chat_rendering_child"


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    chat_template: str,
    *,
    generation: bool = False,
    **variables: Any,
) -> str:
    """The text that `tokenizer.apply_chat_template` gives for messages. Raises `TemplateError`."""
    values = {
        **tokenizer.special_tokens_map,
        **variables,
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": generation,
    }
    made: Mapping[str, str] = _call(tokenizer, "render", chat_template, values, LONGEST)
    if "broke" in made:
        raise _explain_failure(tokenizer, made["broke"])
    if "text" not in made:
        roles = ", ".join(message["role"] for message in messages)
        raise TemplateError(
            f"template: the model's chat template refuses the messages ({roles}): {made['problem']}"
        )
    return made["text"]


def variables_of(tokenizer: Any, chat_template: str) -> set[str]:
    """What a chat template reads and does not set itself. Raises `TemplateError`."""
    return set(_call(tokenizer, "variables", chat_template))


def _call(tokenizer: Any, function: str, chat_template: str, *arguments: Any) -> Any:
    if len(chat_template) > LONGEST:
        raise _explain_failure(tokenizer, f"is longer than {LONGEST:,} characters")
    try:
        return call(f"{_CHILD}:{function}", chat_template, *arguments, seconds=SECONDS)
    except SandboxError as error:
        raise _explain_failure(tokenizer, error.what) from error


def _explain_failure(tokenizer: Any, what: str) -> TemplateError:
    model = os.path.basename(str(tokenizer.name_or_path)) or "this model"
    return TemplateError(
        f"template: the chat template of {model} {what}; give the prompt as plain text "
        "([template] text = ...), or take another model"
    )
