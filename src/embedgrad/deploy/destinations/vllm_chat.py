"""When vLLM's chat route makes the tokens of training, and the messages for it.

vLLM 0.33 (`vllm/renderers/chat_utils`, `hf.py`) joins the parts of a message by line feeds, drops
empty ones, puts one special token where embeddings go, renders the chat template, tokenizes the
whole, and puts the embeddings in that token's place. So the rows stand where they were trained only
if the template has line feeds around the span. Every row is tried here in the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from embedgrad.data.markup import Piece, parse
from embedgrad.deploy.destinations.client_code import pieces_source, text_source
from embedgrad.deploy.formats.chat_template import askable
from embedgrad.deploy.job import Exported
from embedgrad.prompt.template import Message, Template

PLACEHOLDER = "<prompt_embeds>"  # vLLM's special token in the place of a part
JOIN = "\n"  # between the parts of a message
Pieces = tuple[Piece, ...]


def chat_off(exported: Exported) -> str:
    """Why a chat request would not make the tokens of training; "" where it does."""
    template, sequencer = exported.prompt.template, exported.sequencer
    if template.text is not None:
        return "plain text goes through no chat template"
    if template.messages[-1].role == "assistant":
        return "the opening of the answer is not part of a chat request"
    if sequencer.span.drawn_left or sequencer.span.drawn_right:
        return "text next to the span belongs to its rows"
    if span_parts(template) is None:
        return "the server puts line feeds around the rows, which the template does not have"
    tokenizer = with_placeholder(sequencer.tokenizer)
    for sequence in askable(exported):
        columns = sequence.example.columns
        made = prompt_ids(
            [{**m, "content": joined(m["content"])} for m in filled_messages(template, columns)],
            tokenizer,
            sequencer.renderer.chat_template,
            template.options,
        )
        place = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
        if made != [*sequence.prefix, place, *sequence.suffix]:
            return f"the server would make other tokens of {sequence.example.source}"
    return ""


def span_parts(template: Template) -> tuple[Message, Pieces, Pieces] | None:
    """The span's message, and what is sent before and behind the rows in it.

    None where the message lacks the line feeds that the server adds.
    """
    for message in template.messages:
        pieces = parse(message.content, f"template.{message.role}")
        at = next((i for i, piece in enumerate(pieces) if piece.kind == "span"), None)
        if at is None:
            continue
        before, after = pieces[:at], pieces[at + 1 :]
        if before and not (before[-1].kind == "text" and before[-1].text.endswith(JOIN)):
            return None
        if after and not (after[0].kind == "text" and after[0].text.startswith(JOIN)):
            return None
        if before:
            before = _kept(*before[:-1], Piece("text", before[-1].text.removesuffix(JOIN)))
        if after:
            after = _kept(Piece("text", after[0].text.removeprefix(JOIN)), *after[1:])
        # A part that held nothing but the line feed would be dropped with it.
        if (at > 0 and not before) or (at + 1 < len(pieces) and not after):
            return None
        return message, before, after
    return None


def _kept(*pieces: Piece) -> Pieces:
    return tuple(piece for piece in pieces if piece.text)


def parts_source(template: Template) -> str:
    """The messages as a Python list; the name `span` stands for the rows' part."""
    found = span_parts(template)
    assert found is not None
    holder, before, after = found
    made = []
    for message in template.messages:
        content = text_source(message.content)
        if message is holder:
            texts = [
                f'{{"type": "text", "text": {pieces_source(pieces)}}}' if pieces else ""
                for pieces in (before, after)
            ]
            content = f"[{', '.join(part for part in (texts[0], 'span', texts[1]) if part)}]"
        made.append(f'{{"role": "{message.role}", "content": {content}}}')
    return f"[{', '.join(made)}]"


def filled_messages(template: Template, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """The messages that the client sends, with the placeholder for the rows' part."""
    found = span_parts(template)
    assert found is not None
    holder, before, after = found
    made: list[dict[str, Any]] = []
    for message in template.messages:
        pieces = parse(message.content, f"template.{message.role}")
        content: Any = _filled(pieces, columns)
        if message is holder:
            texts = [_filled(part, columns) for part in (before, after)]
            content = [text for text in (texts[0], PLACEHOLDER, texts[1]) if text]
        made.append({"role": message.role, "content": content})
    return made


def _filled(pieces: Pieces, columns: Mapping[str, str]) -> str:
    return "".join(columns[p.text] if p.kind == "column" else p.text for p in pieces)


def joined(content: str | Sequence[str]) -> str:
    """A message's text as the server makes it of its parts."""
    return content if isinstance(content, str) else JOIN.join(text for text in content if text)


def with_placeholder(tokenizer: Any) -> Any:
    """A copy of a tokenizer with the server's special token."""
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens([PLACEHOLDER], special_tokens=True)
    return changed


def prompt_ids(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    chat_template: str,
    options: Mapping[str, Any],
) -> list[int]:
    """Token ids of a chat as the server makes them, one placeholder for all rows of a part."""
    text = tokenizer.apply_chat_template(
        list(messages),
        chat_template=chat_template,
        tokenize=False,
        add_generation_prompt=True,
        **options,
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
