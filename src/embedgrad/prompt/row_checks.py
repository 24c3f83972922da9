"""Check a row's ids, and whether its prompt ends inside a thought."""

from __future__ import annotations

import re
from itertools import chain
from typing import TYPE_CHECKING, Any

from embedgrad.errors import DataError, TemplateError
from embedgrad.prompt.boundaries import Ids

if TYPE_CHECKING:
    from embedgrad.prompt.sequence import TokenSequence

# What opens a thought in the prompts of reasoning models, and no other tag behind it.
_THOUGHT = re.compile(
    r"(<\|?(?!end)(?:[a-z]+[:_])*(?:think|thinking|thoughts?|reason|reasoning)\|?>|\[THINK\]"
    r"|\u25c1think\u25b7|<\|channel\|>analysis<\|message\|>)[^<\[\u25c1]{0,200}\Z",
    re.IGNORECASE,
)


def open_thought(text: str) -> str:
    """The tag of a thought that a text ends inside, else ""."""
    found = _THOUGHT.search(text)
    return found[1] if found else ""


def check_ids(sequence: TokenSequence, prompt_ids: Ids, tokenizer: Any, vocabulary: int) -> None:
    """Raise `DataError` or `TemplateError` for an id that the model has no embedding for.

    `vocabulary` is how many it has; 0: unknown.
    """
    row = (sequence.prefix, sequence.suffix, *sequence.targets, sequence.end, sequence.plain or ())
    beyond = next((i for i in chain(prompt_ids, *row) if i >= vocabulary > 0), None)
    if beyond is None:
        return
    token, example = tokenizer.decode([beyond]).strip(), sequence.example
    what = f"token {token!r} has id {beyond}, but the model embeds only {vocabulary} tokens"
    own = (*example.columns.values(), example.answer, example.solution or "")
    if token and any(token in text for text in own):
        raise DataError(f"{example.source}: {what}; take it out of the row")
    raise TemplateError(
        f"template: {what} (first in {example.source}); it comes from the template or the "
        "tokenizer: use the tokenizer that the model was trained with"
    )
