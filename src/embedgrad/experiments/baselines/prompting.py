"""Prompting baselines: text prompt, best of n, few-shot."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, final

from embedgrad.data.markup import Piece, parse, write
from embedgrad.data.table import quote
from embedgrad.errors import DataError
from embedgrad.events import say, stage
from embedgrad.experiments.baselines.base import (
    Answers,
    Method,
    Task,
    Trained,
    facts_of,
    question_tokens,
    why_not_one_span,
)
from embedgrad.prompt.sequence import Sequencer, TokenSequence
from embedgrad.prompt.template import Message, Template
from embedgrad.prompt.worked_examples import with_examples
from embedgrad.recipe.recipe import Recipe
from embedgrad.training.demonstrations import draw
from embedgrad.training.selection import Best


@final
class Text(Method):
    """The recipe's text prompt."""

    seeded = False

    def train(self, task: Task, seed: int) -> Trained:
        score = self.score_on_dev(task, Trained({}, {}))
        text = " ".join(task.recipe.template.spans)
        return Trained({}, facts_of(len(text.encode()), score))

    def answer(self, task: Task, trained: Trained, sequences: Sequence[TokenSequence]) -> Answers:
        return answer_as_text(task, task.sequencer, sequences)


@final
class BestOfN(Method):
    """The text that scores best on dev, among the recipe's own and `compare.prompts`."""

    seeded = False

    def why_not(self, recipe: Recipe) -> str | None:
        if not recipe.compare.prompts:
            return "compare.prompts lists no other texts"
        return why_not_one_span(recipe)

    def train(self, task: Task, seed: int) -> Trained:
        if not task.dev:
            raise DataError("best-of-n: there are no dev rows to choose by; set data.dev_share")
        template = task.sequencer.renderer.template
        texts = list(dict.fromkeys((template.span, *task.recipe.compare.prompts)))
        best = Best(task.metric, {})
        began = time.perf_counter()
        for i, text in enumerate(texts):
            stage(task.report, f"best-of-n: text {i + 1} of {len(texts)}")
            sequencer = task.sequencer_of(with_span(template, text))
            try:
                rows = sequencer.build(s.example for s in task.dev)
            except DataError as error:
                raise DataError(f"best-of-n: with the prompt {quote(text, 40)}: {error}") from error
            best.add(task.dev_score(answer_as_text(task, sequencer, rows).answered, i), {})
        seconds = time.perf_counter() - began
        scores = [
            {"prompt": text, **{k: v for k, v in score.items() if k != "step"}}
            for text, score in zip(texts, best.history, strict=True)
        ]
        chosen = {"prompt": texts[best.step], "candidates": scores}
        return Trained({}, facts_of(len(texts[best.step].encode()), best.score, seconds, chosen))

    def answer(self, task: Task, trained: Trained, sequences: Sequence[TokenSequence]) -> Answers:
        text = trained.facts["settings"]["prompt"]
        sequencer = task.sequencer_of(with_span(task.sequencer.renderer.template, text))
        rows = sequencer.build(s.example for s in sequences)
        return answer_as_text(task, sequencer, rows)


@final
class FewShot(Method):
    """The text prompt after k training examples with their answers, drawn by seed."""

    def why_not(self, recipe: Recipe) -> str | None:
        shown = recipe.demonstrations.k
        return f"the text prompt shows {shown} demonstrations already" if shown else None

    def train(self, task: Task, seed: int) -> Trained:
        began = time.perf_counter()
        examples = [sequence.example for sequence in task.train]
        shots = draw(examples, task.recipe.compare.shots, seed)
        sources = [examples[i].source for i in shots]
        settings: dict[str, Any] = {"shots": len(shots), "rows": shots, "sources": sources}
        template = _template(task, shots)
        sequencer = task.sequencer_of(template)
        rows = _build(task, sequencer, task.dev or task.train[:1], len(shots))
        score = (
            task.dev_score(answer_as_text(task, sequencer, rows).answered, 0) if task.dev else None
        )
        text = template.text or "".join(message.content for message in template.messages)
        seconds = time.perf_counter() - began
        return Trained({}, facts_of(len(text.encode()), score, seconds, settings))

    def answer(self, task: Task, trained: Trained, sequences: Sequence[TokenSequence]) -> Answers:
        shots = trained.facts["settings"]["rows"]
        sequencer = task.sequencer_of(_template(task, shots))
        rows = _build(task, sequencer, sequences, len(shots))
        return answer_as_text(task, sequencer, rows)


def with_span(template: Template, span: str) -> Template:
    """The template with another span text, and its columns still marked."""

    def changed(text: str) -> str:
        pieces = parse(text, "template")
        return write(Piece("span", span) if piece.kind == "span" else piece for piece in pieces)

    if template.text is not None:
        return Template.plain(changed(template.text))
    messages = tuple(Message(m.role, changed(m.content)) for m in template.messages)
    return Template(messages=messages, options=template.options)


def _template(task: Task, rows: Iterable[int]) -> Template:
    """The recipe's template after these training rows, with their answers."""
    examples = [task.train[i].example for i in rows]
    shots = [(e.columns, e.written) for e in examples]
    return with_examples(task.sequencer.renderer.template, task.sequencer.target, shots)


def _build(
    task: Task, sequencer: Sequencer, sequences: Sequence[TokenSequence], shots: int
) -> list[TokenSequence]:
    """The rows in tokens after worked examples, cut where the recipe allows, which is noted.

    Raises `DataError` if the examples leave too little context for a row or its answer.
    """
    examples = [sequence.example for sequence in sequences]
    context, span = sequencer.context, len(sequencer.prompt_ids)
    limit = 0 if task.sequencer.target.choices else task.recipe.evaluation.max_new_tokens
    if sequencer.truncate is not None and context > limit:
        sequencer.context = context - limit  # leaves room for a row's answer
    try:
        rows, failure = sequencer.build(examples), None
    except DataError as error:
        sequencer.context, failure = 0, error
        rows = sequencer.build(examples)
    needed = 0
    for row, alone in zip(rows, sequences, strict=True):
        # A row that has no room for its answer without the examples does not count.
        room = limit if question_tokens(alone, span) + limit <= context else 0
        answer = max(room, *(len(ids) for ids in row.targets))
        needed = max(needed, question_tokens(row, span) + answer)
    if context and needed > context:
        longest = f", {limit} of them for its answer (evaluation.max_new_tokens)" if limit else ""
        raise DataError(
            f"few-shot: with {shots} examples before it, a row needs {needed} tokens{longest}, "
            f"but the model takes {context}; make compare.shots smaller"
        ) from failure
    if failure is not None:
        raise failure
    if sequencer.truncated:
        column = f"column {sequencer.truncate!r} is cut in rows that do not fit"
        say(task.report, [f"few-shot: after {shots} examples {column}"])
    return rows


def answer_as_text(task: Task, sequencer: Sequencer, sequences: Sequence[TokenSequence]) -> Answers:
    """The answers to a text prompt."""
    start_PD = task.model.embed(sequencer.prompt_ids)
    answered = task.evaluator().score_text_prompt(start_PD, sequences, task.report)
    return Answers(answered, [question_tokens(s, len(start_PD), as_text=True) for s in sequences])
