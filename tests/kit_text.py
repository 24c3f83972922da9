"""Sequencers on the tiny tokenizers, and texts to put into them."""

from __future__ import annotations

import functools
from typing import Any

from hypothesis import strategies as st

import tiny
from embedgrad.data.examples import Example
from embedgrad.prompt.sequence import Ids, Sequencer, Target
from embedgrad.prompt.template import END_MARK, SPAN_MARK, Renderer, Template
from kit import DAY, LABELS, PLACEMENTS

CHATS = {"chatml": tiny.CHATML, "trimming": tiny.TRIMMING, "plain": tiny.PLAIN}
KINDS = tuple(tiny.TOKENIZERS)
FREE = Target()
# Hypothesis also tries texts of our source, such as the marks that no column may hold.
ODD = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(
    lambda text: SPAN_MARK not in text and END_MARK not in text
)
TEXTS = ODD | st.lists(
    st.sampled_from(
        ["The film", " was", "?", "\n", " ", ".", "great", "\t", "  ", "<s>", "'s", "1"]
    ),
    max_size=8,
).map("".join)


def example(review: str, answer: str = "positive") -> Example:
    return Example({"review": review}, answer, "rows.csv:2")


def sequencer(
    kind: str, template: Template, target: Target = LABELS, chat: str = "chatml", **options: Any
) -> Sequencer:
    tokenizer = tiny.with_template(tiny.tokenizer(kind), CHATS[chat])
    renderer = Renderer(template, tokenizer, date=DAY)
    return Sequencer(renderer, tokenizer, target, **{"rows": tiny.reviews(8), **options})


@functools.cache
def shared(kind: str, placement: str, chat: str = "chatml", answers: str = "labels") -> Sequencer:
    target = {"labels": LABELS, "free": FREE}[answers]
    return sequencer(kind, PLACEMENTS[placement], target, chat)


def plain_ids(made: Sequencer, columns: dict[str, str]) -> list[int]:
    """What the tokenizer makes of the whole text, with its own BOS where it would stand."""
    text = made.renderer(columns).text
    # A chat template writes the BOS itself; plain text gets it from the tokenizer, but not twice.
    plain = made.renderer.template.text is not None
    bos = made.tokenizer.bos_token
    written = bos is not None and text.startswith(bos)
    ids = made.tokenizer(text, add_special_tokens=plain and not written)["input_ids"]
    return list(ids)


def tokens(made: Sequencer, ids: Ids) -> list[str]:
    return list(made.tokenizer.convert_ids_to_tokens(list(ids)))
