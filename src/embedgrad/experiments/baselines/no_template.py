"""No-template baseline: the bare question, no chat template.

A model may answer better without its chat template than with a poor one: Liu et al. 2025,
https://arxiv.org/abs/2503.20783, table 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import final

from embedgrad.experiments.baselines.base import Answers, Method, Task, Trained, facts_of
from embedgrad.prompt.boundaries import CuttingTokenizer
from embedgrad.prompt.sequence import TokenSequence


@final
class NoTemplate(Method):
    """The row's columns alone as plain text, with an empty line between several."""

    seeded = False

    def train(self, task: Task, seed: int) -> Trained:
        return Trained({}, facts_of(0, self.score_on_dev(task, Trained({}, {}))))

    def answer(self, task: Task, trained: Trained, sequences: Sequence[TokenSequence]) -> Answers:
        cutting = CuttingTokenizer(task.sequencer.tokenizer, adds_bos=True)
        rows = [_bare(task, cutting, sequence) for sequence in sequences]
        nothing_PD = task.model.embed(task.sequencer.prompt_ids)[:0]
        answered = task.evaluator().score(nothing_PD, rows, task.report)
        return Answers(answered, [len(row.suffix) for row in rows])


def _bare(task: Task, cutting: CuttingTokenizer, sequence: TokenSequence) -> TokenSequence:
    """A row's columns, its answers behind them; answers that end the turn still end it."""
    sequencer, example = task.sequencer, sequence.example
    text = "\n\n".join(example.columns[name] for name in sequencer.renderer.template.columns)
    opening = sequencer.target.text_before(text, opened=True)
    end = sequencer.end_ids
    targets = tuple(
        cutting.suffix(opening + answer) + (end if end and before[-len(end) :] == end else ())
        for answer, before in zip(
            sequencer.target.choices or (example.written,), sequence.targets, strict=True
        )
    )
    ids = cutting.plain(text)
    if sequencer.context:  # a column that the sequencer cut may be too long here as well
        ids = ids[: sequencer.context - max(map(len, targets))]
    return replace(
        sequence,
        prefix=(),
        suffix=ids,
        targets=targets,
        plain=None,
        shared=0,
        later=(),
        reasoning=0,
        inputs=None,
    )
