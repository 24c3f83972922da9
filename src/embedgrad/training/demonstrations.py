"""Demonstrations as the span: worked examples, refined with its words.

After Context Tuning (Lu et al. 2025, https://arxiv.org/abs/2507.04221): rows begin as those of k
worked examples; while a demonstration's own question is trained on, it is left out (leave one
out), and some rows are dropped at random. Left out means that the sequence is that of a prompt
without these rows: nothing is masked, and later positions move up. Which rows are dropped is drawn
once a step, so that the demonstrations are still run once for a whole batch.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple, final

from annotated_types import Ge, Lt

from embedgrad.data.examples import Example
from embedgrad.data.markup import parse
from embedgrad.errors import DataError
from embedgrad.model.language_model import LanguageModel
from embedgrad.parts.augmentations import Augmentation, BatchContext
from embedgrad.prompt.sequence import Sequencer, Target, TokenSequence
from embedgrad.prompt.span import Span, span_places
from embedgrad.prompt.template import Template
from embedgrad.prompt.worked_examples import with_examples


@final
@dataclass(frozen=True)
class Demonstrations:
    """Training examples with their answers that are shown before the query, and refined."""

    k: Annotated[int, Ge(0)] = 0
    """How many, drawn from train, in equal numbers for every choice; 0: none."""
    drop: Annotated[float, Ge(0), Lt(1)] = 0.05
    """Share of their rows that every training step leaves out, at random."""
    seed: Annotated[int, Ge(0)] = 0
    """Decides which examples are drawn."""


@final
class Shown(NamedTuple):
    """A template with its demonstrations, the same without any, and the examples."""

    template: Template
    written: Template
    examples: tuple[Example, ...] = ()

    def without(self, number: int, target: Target) -> Template:
        """The template without one of the demonstrations."""
        examples = (*self.examples[:number], *self.examples[number + 1 :])
        return _fill(self.written, target, examples)

    def spans_of(self, number: int) -> slice:
        """Which of the template's spans are a demonstration's."""
        messages, each, first = self.written.messages, 1, 0
        if messages:
            leading = next(i for i, m in enumerate(messages) if m.role != "system")
            pieces = [p for m in messages[:leading] for p in parse(m.content, "template")]
            first = sum(piece.kind == "span" for piece in pieces)
            each = len(messages) - leading + (messages[-1].role != "assistant")
        return slice(first + number * each, first + (number + 1) * each)

    def rows_of(self, spans: Sequence[Span], number: int) -> range:
        """Which of the prompt's rows are a demonstration's."""
        places = list(span_places(spans).values())[self.spans_of(number)]
        return range(places[0].start, places[-1].stop)


def demonstrate(
    template: Template, target: Target, train: Sequence[Example], settings: Demonstrations
) -> Shown:
    """The template with k demonstrations as spans. Raises `DataError` where train has too few."""
    if not settings.k:
        return Shown(template, template)
    without = next((example.source for example in train if not example.written), None)
    if without is not None:
        raise DataError(
            f"demonstrations.k: {settings.k}, but {without} has no answer to show; name the column "
            "of the answers in data.answer, or leave demonstrations out"
        )
    drawn = draw(train, settings.k, settings.seed)
    if len(drawn) < settings.k:
        raise DataError(
            f"demonstrations.k: {settings.k}, but train has {len(drawn)} different questions; make "
            "it smaller, or give more rows"
        )
    examples = tuple(train[i] for i in drawn)
    return Shown(_fill(template, target, examples), template, examples)


def check_length(shown: Shown, sequencer: Sequencer) -> None:
    """Raise `DataError` for demonstrations that leave no room for a question."""
    lengths = [len(shown.rows_of(sequencer.spans, i)) for i in range(len(shown.examples))]
    if lengths and sum(lengths) >= sequencer.context > 0:
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        raise DataError(
            f"demonstrations.k: {len(lengths)} demonstrations take {sum(lengths)} tokens, "
            f"{lengths[longest]} of them {shown.examples[longest].source}, but the model takes "
            f"{sequencer.context}; make it smaller, or try another demonstrations.seed"
        )


@final
@dataclass(frozen=True)
class LeaveOut(Augmentation):
    """Leaves out a row's own demonstration, and some of the demonstrations' rows in every step.

    `own` are the rows of train whose question is a demonstration's, as they are without it.
    """

    own: Mapping[tuple[str, str], TokenSequence]
    rows: tuple[int, ...]
    total: int
    drop: float

    def __call__(
        self, batch: Sequence[TokenSequence], context: BatchContext
    ) -> list[TokenSequence]:
        generator = random.Random(f"{context.seed}:{context.step}/drop")
        dropped = frozenset(row for row in self.rows if generator.random() < self.drop)
        return [without_rows(s, self.total, dropped) for s in self.without_own(batch)]

    def without_own(self, rows: Sequence[TokenSequence]) -> list[TokenSequence]:
        """Rows of train, each without the demonstration that is its own."""
        return [self.own.get(_key(sequence.example), sequence) for sequence in rows]


def leave_out(
    shown: Shown,
    model: LanguageModel,
    sequencer: Sequencer,
    train: Sequence[TokenSequence],
    settings: Demonstrations,
) -> LeaveOut:
    """What a training leaves out of its batches."""
    own: dict[tuple[str, str], TokenSequence] = {}
    places = [shown.rows_of(sequencer.spans, i) for i in range(len(shown.examples))]
    total = len(sequencer.prompt_ids)
    for number, example in enumerate(shown.examples):
        same = [s.example for s in train if s.example.columns == example.columns]
        spans = list(sequencer.spans)
        del spans[shown.spans_of(number)]
        without = model.sequencer(
            shown.without(number, sequencer.target),
            sequencer.target,
            spans=spans,
            date=sequencer.renderer.date,
            truncate=sequencer.truncate,
        )
        without.context = sequencer.context
        rows = tuple(row for row in range(total) if row not in places[number])
        own |= {
            _key(e): replace(s, rows=rows) for e, s in zip(same, without.build(same), strict=True)
        }
    return LeaveOut(own, tuple(row for place in places for row in place), total, settings.drop)


def without_rows(sequence: TokenSequence, total: int, dropped: frozenset[int]) -> TokenSequence:
    """The sequence of a prompt of `total` rows without some of those that it has."""
    rows = tuple(range(total)) if sequence.rows is None else sequence.rows
    if dropped.isdisjoint(rows):
        return sequence
    first = len(rows) - len(sequence.later)
    gone = [at for at, row in zip(sequence.later, rows[first:], strict=True) if row in dropped]
    kept = [at for at in sequence.later if at not in gone]
    return replace(
        sequence,
        rows=tuple(row for row in rows if row not in dropped),
        suffix=tuple(token for at, token in enumerate(sequence.suffix) if at not in gone),
        later=tuple(at - bisect(gone, at) for at in kept),
        plain=None,
    )


def draw(examples: Sequence[Example], count: int, seed: int) -> list[int]:
    """Draw the indices of `count` examples, balanced over the answers if these repeat.

    A question with several solutions is drawn once.
    """
    generator = random.Random(f"{seed}/few-shot")
    order = list(range(len(examples)))
    generator.shuffle(order)
    first: dict[tuple[tuple[str, str], ...], int] = {}
    for i in order:
        first.setdefault(tuple(examples[i].columns.items()), i)
    order = list(first.values())
    pools: dict[str, list[int]] = {}
    if len({example.answer for example in examples}) <= len(examples) // 2:
        for i in order:
            pools.setdefault(examples[i].answer, []).append(i)
    else:
        pools[""] = order
    drawn: list[int] = []
    while len(drawn) < min(count, len(order)):
        for pool in pools.values():
            drawn += [pool.pop()] if pool and len(drawn) < count else []
    generator.shuffle(drawn)
    return drawn


def _fill(template: Template, target: Target, examples: Sequence[Example]) -> Template:
    shots = [(example.columns, example.written) for example in examples]
    return with_examples(template, target, shots, refine=True)


def _key(example: Example) -> tuple[str, str]:
    """One of the texts that a row of the data is to be answered with."""
    return example.source, example.written
