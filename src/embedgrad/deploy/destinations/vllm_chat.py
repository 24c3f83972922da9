"""vLLM's chat route: its messages, and whether it is exact.

vLLM 0.33 (`vllm/renderers/chat_utils`, `hf.py`) joins the parts of a message by line feeds, drops
empty ones, puts one special token where embeddings go, renders the chat template, tokenizes the
result, and replaces that token by the embeddings. So the rows are where training had them only if
the template has line feeds around each span. Every example is tried here in the same way.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

from embedgrad.data.markup import Piece, fill, parse
from embedgrad.deploy.destinations.client_code import pieces_source
from embedgrad.deploy.formats.chat_template import uncut_rows
from embedgrad.deploy.job import ExportedPrompt
from embedgrad.deploy.programs import to_source
from embedgrad.prompt.sequence import Sequencer
from embedgrad.prompt.template import Message, Template

PLACEHOLDER = "<prompt_embeds>"  # vLLM's special token for embeddings
JOIN = "\n"  # between the parts of a message
Part = tuple[Piece, ...]  # text, or one piece of the kind "span"


def chat_problem(exported: ExportedPrompt) -> str | None:
    """Why a chat request would not give training's tokens; None if it does."""
    template, sequencer = exported.prompt.template, exported.sequencer
    if template.text is not None:
        return "plain text goes through no chat template"
    if template.messages[-1].role == "assistant":
        return "the opening of the answer cannot be part of a chat request"
    if any(span.drawn_left or span.drawn_right for span in exported.spans):
        return "text next to the span is part of its rows"
    messages = [(message, message_parts(message)) for message in template.messages]
    if any(parts is None for _, parts in messages):
        return "the server puts line feeds around the rows, which the template does not have"
    rows_part = {"type": "prompt_embeds", "data": ""}  # the rows themselves are not read
    for row in uncut_rows(exported):
        contents = []
        for message, parts in messages:
            content = [
                rows_part
                if _is_span(part)
                else {"type": "text", "text": fill(part, row.example.columns)}
                for part in parts or ()
            ]
            contents.append({"role": message.role, "content": content})
        first, *others = exported.texts(row)
        expected = [*first, *(i for text in others for i in (None, *text))]
        body = {"messages": contents, "chat_template_kwargs": dict(template.variables)}
        if server_prompt(body, sequencer)[0] != expected:
            return f"the server would make other tokens of {row.example.source}"
    return None


def message_parts(message: Message) -> list[Part] | None:
    """The parts of a message that the server joins to the message again.

    None if text next to a span lacks the line feed that the server adds.
    """
    parts: list[Part] = [()]
    for piece in parse(message.content, f"template.{message.role}"):
        if piece.kind == "span":
            parts += [(piece,), ()]
        else:
            parts[-1] = (*parts[-1], piece)
    joined = []
    for i, part in enumerate(parts):
        if i % 2 or len(parts) == 1:  # a span, or a message without one
            joined.append(part)
        elif 0 < i < len(parts) - 1 and part == (Piece("text", JOIN),):
            continue  # the server's own line feed between two spans
        elif part:
            trimmed = _trim(part, start=i > 0, end=i < len(parts) - 1)
            if not trimmed:
                return None
            joined.append(trimmed)
        elif 0 < i < len(parts) - 1:
            return None  # two spans without a line feed between them
    return joined


def _trim(part: Part, *, start: bool, end: bool) -> Part | None:
    """A text without the line feeds that the server adds; None if it lacks one or nothing is left.

    The server drops an empty part together with its line feed.
    """
    first, *_ = part
    if start:
        if first.kind != "text" or not first.text.startswith(JOIN):
            return None
        part = (Piece("text", first.text.removeprefix(JOIN)), *part[1:])
    *_, last = part
    if end:
        if last.kind != "text" or not last.text.endswith(JOIN):
            return None
        part = (*part[:-1], Piece("text", last.text.removesuffix(JOIN)))
    return tuple(piece for piece in part if piece.text) or None


def messages_source(template: Template) -> str:
    """The messages as a Python list that refers to `columns` and to the parts `spans`."""
    number = 0
    messages = []
    for message in template.messages:
        sources = []
        parts = message_parts(message) or []
        for part in parts:
            if _is_span(part):
                sources.append(f"spans[{number}]")
                number += 1
            else:
                sources.append(f'{{"type": "text", "text": {pieces_source(part)}}}')
        rows = any(map(_is_span, parts))
        content = f"[{', '.join(sources)}]" if rows else pieces_source(parts[0])
        messages.append(f'{{"role": {to_source(message.role)}, "content": {content}}}')
    return f"[{', '.join(messages)}]"


def server_prompt(
    body: Mapping[str, Any], sequencer: Sequencer
) -> tuple[list[int | None], list[str]]:
    """A chat request as the server reads it: token ids, None where embeddings go, and payloads."""
    payloads: list[str] = []
    messages = []
    for message in body["messages"]:
        content = message["content"]
        texts = [content] if isinstance(content, str) else []
        for part in [] if isinstance(content, str) else content:
            if part["type"] == "prompt_embeds":
                payloads.append(part["data"])
            texts.append(PLACEHOLDER if part["type"] == "prompt_embeds" else part["text"])
        messages.append({**message, "content": JOIN.join(text for text in texts if text)})
    tokenizer = _with_placeholder(sequencer.tokenizer)
    text = tokenizer.apply_chat_template(
        messages,
        chat_template=sequencer.renderer.chat_template,
        tokenize=False,
        add_generation_prompt=True,
        **body.get("chat_template_kwargs", {}),
    )
    place = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [None if i == place else i for i in ids], payloads


def _is_span(part: Part) -> bool:
    return any(piece.kind == "span" for piece in part)


@functools.lru_cache(maxsize=1)  # a copy takes long, and every example needs it
def _with_placeholder(tokenizer: Any) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens([PLACEHOLDER], special_tokens=True)
    return changed
